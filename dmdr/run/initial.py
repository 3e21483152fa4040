"""What a student to start from is, and was trained for, where the run uses it otherwise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmdr.errors import ConfigError
from dmdr.run.checkpoint import holds
from dmdr.run.export import is_export, read_export, resolution_of
from dmdr.settings.parse import read_yaml
from dmdr.sizes import Size, join_sizes, parse_sizes

KINDS = {True: "a full network", False: "a LoRA"}


def differences(initial: Path, steps: int, sizes: Sequence[Size]) -> list[str]:
    """How the run that a student comes from used it otherwise.

    Args:
        initial: Its export, or a checkpoint in its run's folder.
        steps: Those that it is to take now.
        sizes: Of its images now; none where the family does not say.
    """
    before, trained = _trained_for(initial)
    found = []
    if before not in (None, steps):
        found.append(f"was trained for {before} step{'s' * (before != 1)}, but this run uses {steps}")
    if trained and sizes and set(trained) != set(sizes):
        found.append(f"was trained at a resolution of {join_sizes(trained)}, but this run uses {join_sizes(sizes)}")
    return found


def _trained_for(initial: Path) -> tuple[int | None, tuple[Size, ...]]:
    """Steps, None where they are not known, and sizes: a model's own resolution is in no settings."""
    if is_export(initial):
        about = read_export(initial)
        return len(about["grid"]) - 1, _sizes(resolution_of(about))
    given = _settings_of(initial)
    times = next((value for key in ("sigmas", "timesteps") if isinstance(value := given.get(key), list)), [])
    return len(times) or _whole(given.get("num_inference_steps")), _sizes(given.get("resolution"))


def _sizes(value: Any) -> tuple[Size, ...]:
    """The sizes that a file names, as a text or, in older files, as a number; none where it names no sizes."""
    try:
        return parse_sizes(str(value))
    except ValueError:
        return ()


def _whole(value: Any) -> int | None:
    """What a file of another version, or of anybody, has in the place of a whole number."""
    return value if type(value) is int else None


def check_kind(initial: Path, options: Any, *, scores: bool = True) -> None:
    """Refuse to start a full student from a LoRA, or a LoRA from a full student; of a checkpoint, the fake score, too.

    Args:
        initial: Its export, or a checkpoint in its run's folder.
        options: Of the model family.
        scores: Whether this run has a fake score.

    Raises:
        ConfigError: If it is of the other kind.
    """
    given = read_export(initial)["options"] if is_export(initial) else _settings_of(initial)
    full, wanted = given.get("full_finetune"), getattr(options, "full_finetune", None)
    both = not full and any(initial.glob("*/*.safetensors"))  # an export of a LoRA with the network that it makes
    if None not in (full, wanted) and full != wanted and not both:
        cure = f"set --full_finetune {str(full).lower()}"
        raise ConfigError(
            f"--init_student {initial} is {KINDS[bool(full)]}, but this run trains {KINDS[bool(wanted)]}: {cure}"
        )
    if is_export(initial) or not given or not scores or not holds(initial, "fake_score"):
        return
    held, fake = (said == "full" for said in (given.get("fake_score"), getattr(options, "fake_score", None)))
    if held != fake:
        cure = f"set --fake_score {'full' if held else 'lora'}, or start from the export of that run"
        what = f"the fake score of --init_student {initial} is {KINDS[held]}"
        raise ConfigError(f"{what}, but this run trains {KINDS[fake]}: {cure}")


def _settings_of(checkpoint: Path) -> Mapping[str, Any]:
    """The settings of a checkpoint's run; none where it has left its folder."""
    file = checkpoint.resolve().parents[1] / "config.yaml"
    return read_yaml(str(file), "--init_student") if file.is_file() else {}
