"""The settings of a run: flags override YAML, YAML the model's recipe, the recipe the defaults."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dmdr.errors import ConfigError
from dmdr.settings import registry
from dmdr.settings.chosen import ALONE, SUMS, Chosen, load, named_in, parts_of
from dmdr.settings.fields import Config, Flags
from dmdr.settings.leftovers import left_out
from dmdr.settings.models import Model
from dmdr.settings.parser import Parser, first_look, joined, parse_flags

EPILOG = (
    "--help all lists every setting; --model NAME --help adds those of NAME's family, --rl, --reward and --matching "
    "NAME --help those of NAME. A registered model's recipe replaces these defaults."
)
DESCRIPTION = "Distil a diffusion model to a few steps and align it with a reward, in the same run."

F = TypeVar("F", bound=Flags)


@dataclass(frozen=True)
class Settings:
    """A resolved run: the core's settings, the model, and the plugins that it names, its family among them."""

    config: Config
    model: Model
    plugins: tuple[Chosen, ...]

    def of(self, group: str) -> list[Chosen]:
        return [plugin for plugin in self.plugins if plugin.group == group]

    def values(self) -> dict[str, Any]:
        """Every setting by its full name, but for where the run is written to."""
        values = dataclasses.asdict(self.config)
        for name in ("dry_run", "architecture", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"):
            del values[name]
        for plugin in self.plugins:
            values |= {plugin.key(name): value for name, value in plugin.options.items()}
        return values

    @property
    def family(self) -> Chosen:
        """The model family that trains."""
        (family,) = self.of("backends")
        return family

    def family_options(self) -> Any:
        """The family's `Options`: its own flags, and the settings of the core that it asks for.

        Raises:
            ConfigError: If it refuses their values.
        """
        flags, core = self.family.flags, dataclasses.asdict(self.config)
        shared = {f.name: core[f.name] for f in dataclasses.fields(flags) if f.init and f.name in core}
        return self.family.called(flags, self.family.options | shared)

    def open_backend(self, folder: str) -> Any:
        """The model family on a pipeline's folder, or hub id; loads no weights.

        Raises:
            ConfigError: If it refuses the folder, or the options for it.
        """
        return self.family.cls(folder, self.family_options())

    def as_yaml(self) -> str:
        """What `--config` reads to repeat the run, wherever it is written to."""
        return yaml.safe_dump(self.values(), sort_keys=False)


def parse(arguments: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Settings:
    """Settings of a run from flags, over those given as a mapping, over `--config`, over the model's recipe.

    A run that is resumed takes its own `config.yaml` where no other is named.

    Args:
        arguments: Command-line flags.
        settings: Settings by name, as Python calls give them.

    Raises:
        ConfigError: For anything unknown, malformed or contradictory.
        SystemExit: After printing `--help`.
    """
    arguments = joined(arguments)
    names = ("model", *SUMS.values())
    place = ("backend", "revision", "architecture")
    first = first_look(arguments, *names, *place, "dry_run", "resume_from_checkpoint", "output_dir")
    settings = dict(settings or {})
    resume, output = (settings.get(k) or getattr(first, k) for k in ("resume_from_checkpoint", "output_dir"))
    file = first.config or (resume and _config_of(resume, output))
    given = read_yaml(file) if file else {}
    if file and isinstance(given.get("architecture"), str):  # a recipe's, beside its YAML
        given["architecture"] = str(Path(file).parent / given["architecture"])
    in_file = dict(given)
    given |= settings
    if first.model is None and (bare := first.architecture or given.get("architecture")):
        given.setdefault("model", bare)  # of which there is no recipe; only --dry_run can do with it
    look = {key: _first_given(getattr(first, key), given.get(key)) for key in names}
    about = {"prog": "dmdr-train", "description": DESCRIPTION, "epilog": f"{EPILOG} {installed(*registry.GROUPS)}"}
    where = {key: _first_given(getattr(first, key), given.get(key)) for key in place}
    if first.help and all(value is None for value in (*look.values(), where["backend"])):
        Parser(Config, whole=first.help == "all", **about).print_help()
        raise SystemExit(0)

    default = {f.name: f.default for f in dataclasses.fields(Config)}
    if look["model"] is None:  # of several models of the default's name, nobody has typed a stranger's
        meant = registry.find("models", str(default["model"]), own="dmdr")
        default["model"] = registry.typed_names("models")[meant]
    model = Model.find(str(_first_given(look["model"], default["model"])))
    recipe = {"model": model.typed, **(model.cls.recipe if model.cls else {})}  # type: ignore[attr-defined]
    per_objective = recipe.pop("objectives", {})
    named = {key: str(_first_given(look[key], recipe.get(key), default[key])) for key in SUMS.values()}
    typed = _first_given(first.sample_weight, settings.get("sample_weight"))
    if named["reward"] == "none" and typed is None and named["sample_weight"] == Config.sample_weight:
        recipe["sample_weight"] = named["sample_weight"] = "none"  # there is nothing to weigh samples by
        given.pop("sample_weight", None)
    untyped = {group: key for group, key in SUMS.items() if look[key] is None}
    own = {group: model.distribution if key in recipe else "dmdr" for group, key in untyped.items()}
    chosen = load(parts_of(named), own)
    for group, why in ALONE.items():
        weights = [plugin.weight for plugin in chosen if plugin.group == group]
        if weights != [1.0] and (weights or group == "matchings"):
            raise ConfigError(
                f"--{SUMS[group]} {named[SUMS[group]]}: write the name of one {registry.NOUNS[group]}; {why}"
            )
    if str(_first_given(first.dry_run, given.get("dry_run"))).lower() not in ("true", "1", "yes", "y", "t"):
        where["architecture"] = None  # only --dry_run reads it
    chosen.append(Chosen("backends", *_family(model, where)))
    for plugin in reversed(chosen):  # of several objectives, the first named has the last word
        if plugin.group == "objectives":
            recipe |= per_objective.get(plugin.name, {})
    asked = {"model": model.typed, "backend": where["backend"]}
    moved = any(key in in_file and str(in_file[key]) != str(value) for key, value in asked.items())
    dropped = left_out(in_file, chosen, moved) - settings.keys()
    given = {key: value for key, value in given.items() if key not in dropped}
    config, plugins = parse_flags(Config, chosen, arguments, given, recipe, whole=first.help == "all", **about)
    resolved = Settings(config, model, plugins)
    resolved.family_options()  # refuses invalid values
    return resolved


def _family(model: Model, where: Mapping[str, Any]) -> tuple[str, float, type]:
    """Name, weight and class of the model family."""
    given = {key: None if value is None else str(value) for key, value in where.items()}
    name, cls = model.family(**given)
    return name, 1.0, cls


def parse_command(
    command: type[F], arguments: Sequence[str], *, prog: str, description: str
) -> tuple[F, tuple[Chosen, ...]]:
    """The flags of a command that only scores, over `--config`, and the rewards that it names.

    Args:
        command: The command's own flags, a dataclass.
        arguments: Command-line flags.
        prog, description: What `--help` says of the command.

    Raises:
        ConfigError: For anything unknown, malformed or missing.
        SystemExit: After printing `--help`.
    """
    arguments = joined(arguments)
    first = first_look(arguments, "reward")
    given = read_yaml(first.config) if first.config else {}
    reward = _first_given(first.reward, given.get("reward"))
    chosen = load(named_in("rewards", str(reward)), {}) if reward is not None else []
    epilog = f"--reward NAME --help adds the flags of NAME. {installed('rewards', 'models')}"
    options, rewards = parse_flags(
        command, chosen, arguments, given, {}, prog=prog, description=description, epilog=epilog
    )
    if not rewards:
        raise ConfigError(f"--reward {options.reward} names no reward")
    return options, rewards


def installed(*groups: str) -> str:
    """A sentence of the installed names by group; imports no plugin."""
    names = "; ".join(f"{group}: {', '.join(registry.plugins(group))}" for group in groups)
    return f"Installed {names}."


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def read_yaml(path: str) -> dict[str, Any]:
    """A mapping of settings.

    Raises:
        ConfigError: If the file is missing or holds no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is no YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {path} must hold a mapping of settings")
    return values


def _config_of(resume: str, output: str | None) -> str | None:
    """The settings of the run that is resumed, where they can be found."""
    folder = Path(resume).resolve().parent.parent if resume != "latest" else Path(output) if output else None
    return str(folder / "config.yaml") if folder and (folder / "config.yaml").is_file() else None
