"""What a student to start from was trained for, where the run uses it otherwise."""

from pathlib import Path

from dmdr.run.export import is_export, read_export
from dmdr.settings.parse import read_yaml


def differences(initial: Path, steps: int, resolution: int | None) -> list[str]:
    """How the run that a student comes from used it otherwise.

    Args:
        initial: Its export, or a checkpoint in its run's folder.
        steps: Those that it is to take now.
        resolution: Pixels along a side of its images now; None where the family does not say.
    """
    before, size = _trained_for(initial)
    found = []
    if before not in (None, steps):
        found.append(f"was trained for {before} step{'s' * (before != 1)}, and is to take {steps} now")
    if None not in (size, resolution) and size != resolution:
        found.append(f"was trained at a resolution of {size}, which is {resolution} now")
    return found


def _trained_for(initial: Path) -> tuple[int | None, int | None]:
    """Steps and resolution, None where they are not known: a model's own resolution is in no settings."""
    if is_export(initial):
        about = read_export(initial)
        return len(about["grid"]) - 1, about["call"].get("height")
    settings = initial.resolve().parents[1] / "config.yaml"
    given = read_yaml(str(settings)) if settings.is_file() else {}
    times = given.get("sigmas") or given.get("timesteps")
    return len(times) if times else given.get("num_inference_steps"), given.get("resolution")
