"""Which model is meant by `--model`, and which family trains it: known before anything is built or loaded."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from dmdr.errors import ConfigError
from dmdr.hub import fetch, is_hub_id, unreachable
from dmdr.settings import registry


@dataclass(frozen=True)
class Model:
    """A model that has been found.

    Attributes:
        typed: What `--model` says.
        cls: The class of a registered model; None for a folder or hub id.
        distribution: Where that comes from, whose other plugins its defaults mean; "" for a folder or hub id.
    """

    typed: str
    cls: type | None = None
    distribution: str = ""

    @classmethod
    def find(cls, typed: str) -> "Model":
        """The registered model of this name, or a folder or hub id, at which nobody has looked yet.

        Raises:
            ConfigError: If a registered model cannot be used.
        """
        head = registry.registered("models", typed)
        found = registry.load_installed("models", typed) if head else None
        return cls(typed, found, registry.find("models", head).distribution) if head and found else cls(typed)

    def family(self, backend: str | None, revision: str | None, architecture: str | None) -> tuple[str, type]:
        """Name and class of the backend that trains it.

        Args:
            backend: The one that the user names.
            revision: Of a hub id.
            architecture: Folder of configuration files that stands in for the model.

        Raises:
            ConfigError: If there is no such pipeline, or nobody trains it.
        """
        if revision and (self.cls or os.path.exists(self.typed)):
            raise ConfigError(f"--revision {revision}: --model {self.typed} is not on the hub; leave out --revision")
        if architecture and not os.path.isfile(Path(architecture) / "model_index.json"):
            raise ConfigError(f"--architecture {architecture} is no pipeline folder (no model_index.json)")
        if backend:
            if not self.cls:
                pipeline_class(architecture or self.typed, revision)  # refuses what is no pipeline
            return backend, registry.load("backends", backend)
        known = self.cls and not architecture
        name = self.cls.pipeline if known else pipeline_class(architecture or self.typed, revision)  # type: ignore[union-attr]
        if not registry.is_installed("backends", name):  # a stranger's folder names no file or module
            raise ConfigError(
                f"--model {self.typed} is a {name}, and no backend can train it; there are backends for "
                f"{', '.join(registry.plugins('backends'))} (choose another with --backend; a package can add one "
                "under the entry-point group 'dmdr.backends')"
            )
        return name, registry.load("backends", name, self.distribution or None)


def check_place(folder: str) -> None:
    """Refuse what is no diffusers pipeline; of a hub id nobody is asked yet.

    Raises:
        ConfigError: As `pipeline_class`.
    """
    if _is_local(folder):
        pipeline_class(folder)


def _is_local(folder: str) -> bool:
    return os.path.exists(folder) or not is_hub_id(folder)  # Path.exists raises for a name that is too long


def pipeline_class(folder: str, revision: str | None = None) -> str:
    """Class name of the pipeline in a folder, or of a hub id at some revision.

    Raises:
        ConfigError: If it is no diffusers pipeline.
    """
    if _is_local(folder):
        index = Path(folder) / "model_index.json"
        if not os.path.isfile(index):
            known = ", ".join(registry.plugins("models"))
            raise ConfigError(
                f"--model {folder} is neither a diffusers pipeline folder (no model_index.json), nor a hub id, nor a "
                f"registered model{registry.suggest(folder, list(registry.plugins('models')))}; registered: {known}"
            )
        try:
            return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"--model {folder}: model_index.json is damaged: {error}") from error
    try:
        index = fetch(folder, "model_index.json", revision)
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except Exception as error:  # every hub and network failure; the first line says which
        why = unreachable()
        said = f"and it is not in the hub's cache ({why})" if why else f"and the hub says: {str(error).splitlines()[0]}"
        raise ConfigError(f"--model {folder}: no such folder, {said}") from error
