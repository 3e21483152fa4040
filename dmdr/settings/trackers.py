"""The trackers of accelerate that --report_to names, and what each takes from a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmdr.errors import ConfigError


@dataclass(frozen=True)
class Tracker:
    """What one takes, beside metrics and settings, which all do.

    Attributes:
        run_name: What its constructor calls the name of the run; None if it takes none.
        project: Whether it takes the name of a project.
        images: Further arguments of its `log_images`; None if it has none that takes batches of images.
    """

    run_name: str | None = None
    project: bool = True
    images: Mapping[str, Any] | None = None


# Tensorboard and wandb are tested; of the others this is what accelerate's source says.
TRACKERS = {
    "aim": Tracker(),
    "clearml": Tracker("task_name"),
    "comet_ml": Tracker(),
    "dvclive": Tracker(project=False),
    "mlflow": Tracker("run_name"),
    "swanlab": Tracker("experiment_name", images={}),
    "tensorboard": Tracker(project=False, images={"dataformats": "NHWC"}),  # it calls a run by the name of its folder
    "trackio": Tracker("name"),
    "wandb": Tracker("name", images={}),
}


def trackers_of(report_to: str) -> dict[str, Tracker]:
    """The trackers that are named, by name; imports accelerate, and with it torch.

    Args:
        report_to: Names with commas between them, `none`, or `all` for those that are installed.

    Raises:
        ConfigError: Names the one that is unknown, or not installed.
    """
    if report_to == "none":
        return {}
    from accelerate.tracking import get_available_trackers

    installed = {str(name) for name in get_available_trackers()}
    if report_to == "all":
        return {name: tracker for name, tracker in TRACKERS.items() if name in installed}
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",")))
    for name in names:
        if name in ("all", "none"):
            raise ConfigError(f"--report_to {report_to}: '{name}' stands alone")
        if name not in TRACKERS:
            raise ConfigError(f"--report_to: accelerate has no tracker '{name}'; it has {', '.join(TRACKERS)}")
        if name not in installed:
            raise ConfigError(f"--report_to: the package of '{name}' is not installed: pip install {name}")
    return {name: TRACKERS[name] for name in names}
