"""What of a run outlives its process: checkpoints are written, read back, and said how to go on with."""

import logging
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError, TrainingError
from dmdr.protocols import Stateful
from dmdr.run.checkpoint import Once, Progress, Tensors, alone, prune, restore, save_checkpoint
from dmdr.run.device import on_main_process
from dmdr.run.folder import SETTINGS, check_there
from dmdr.run.plan import Stage
from dmdr.run.trainers import Trainers
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.settings.trust import check_config
from dmdr.states import is_shared
from dmdr.training.trainer import Trainer

logger = logging.getLogger("dmdr")


@dataclass
class Keeper:
    """Saves and restores the trainers of a run.

    Attributes:
        output: The run's folder.
        unscored: Counts of images without a score since the last line of the log.
    """

    trainers: Trainers
    output: Path
    unscored: Counter[str]

    def resumed(self, stage: Stage, step: int, checkpoint: Path) -> Trainer:
        """The trainer of a stage, `step` updates into it, as a checkpoint left it.

        Raises:
            ConfigError: If the checkpoint does not fit.
        """
        trainer = self.trainers.of(stage, step)
        tensors, optimizers = self._kept(trainer, with_reference=stage.number == 2)
        extra = restore(checkpoint, tensors, optimizers)
        if (held := extra.get("optim", self._optim)) != self._optim:
            what = "go on with it, or begin anew from its student with --init_student"
            raise ConfigError(f"{checkpoint} holds the state of --optim {held}; {what}")
        for role, optimizer in optimizers.items():
            for group, own in zip(optimizer.param_groups, extra.get("groups", {}).get(role, ()), strict=False):
                group.update(own)
        if missing := {"scaler", "objectives"} - extra.keys():
            raise ConfigError(f"{checkpoint} holds no state of: {', '.join(sorted(missing))}")
        trainer.scaler.load_state_dict(extra["scaler"])
        trainer.objectives.states = extra["objectives"]
        trainer.bad.in_a_row = extra.get("bad_steps", 0)
        self.unscored.update(extra.get("unscored", {}))
        for name, part in _stateful_parts(trainer).items():
            if name in extra:
                part.load_state_dict(extra[name])
        return trainer

    def save(self, trainer: Trainer, progress: Progress, *, stage_end: bool = False) -> None:
        """Write a checkpoint, in all processes together; or raise in all of them why there is none."""
        self._write(trainer, progress, partial(on_main_process, self.trainers.accelerator), stage_end=stage_end)

    def save_before_leaving(self, trainer: Trainer, progress: Progress, reason: Exception) -> None:
        """Write what a failing run has learned so far; of the others this process knows nothing."""
        if not progress.total or not self.trainers.accelerator.is_main_process:
            return  # before the first update there is nothing to go on with
        if any(is_shared(each) for learner in trainer.learners.values() for each in learner.parameters.values()):
            how = self.how_to_go_on()
            logger.warning(
                "one process cannot save a network that all share; go on from the last checkpoint with %s", how
            )
            return
        try:
            self._write(trainer, progress)
        except TrainingError as error:
            if str(error) != str(reason):  # which the command says: perhaps it was this save that failed
                logger.warning("%s", error)
        else:
            logger.warning("saved at step %d; go on with %s", progress.total, self.how_to_go_on())

    @property
    def _optim(self) -> str:
        return self.trainers.job.config.optim

    def how_to_go_on(self) -> str:
        """The flags that resume this run."""
        file, values = self.output / SETTINGS, self.trainers.job.settings.values()
        flags = f"--output_dir {shlex.quote(str(self.output))} --resume_from_checkpoint latest"
        try:
            check_config(str(file), values, values)
        except ConfigError:  # a part of the user's own, which no folder may name by itself
            flags += f" --config {shlex.quote(str(file))}"
        return flags

    def _write(self, trainer: Trainer, progress: Progress, once: Once = alone, *, stage_end: bool = False) -> None:
        once(lambda: check_there(self.output))
        tensors, optimizers = self._kept(trainer)
        extra = {
            "scaler": trainer.scaler.state_dict(),
            "objectives": trainer.objectives.state_dict(),
            "bad_steps": trainer.bad_steps,
            "unscored": dict(self.unscored),
            "optim": self._optim,
            "groups": {
                role: [
                    {name: group[name] for name in OPTIMIZERS[self._optim].group_state} for group in each.param_groups
                ]
                for role, each in optimizers.items()
            },
            **{name: part.state_dict() for name, part in _stateful_parts(trainer).items()},
        }
        folder = self.output / "checkpoints"
        saved = save_checkpoint(folder, progress, tensors, optimizers, extra, stage_end=stage_end, once=once)
        unscored = trainer.scorer is not None and trainer.scorer.silent
        if not (trainer.bad_steps or unscored):  # what was saved before them may be worth going back to
            once(lambda: prune(self.output, self.trainers.job.config.save_total_limit, saved))

    def _kept(
        self, trainer: Trainer, *, with_reference: bool = True
    ) -> tuple[Tensors, dict[str, torch.optim.Optimizer]]:
        """What a checkpoint holds: tensors by role, and optimizers by role."""
        learners = trainer.learners
        tensors: dict[str, Mapping[str, Tensor]] = {name: learner.parameters for name, learner in learners.items()}
        reference = self.trainers.job.backend.parameters("reference")
        if reference and with_reference:
            tensors["reference"] = reference
        if trainer.student.ema:
            tensors["ema"] = trainer.student.ema.average
        return tensors, {name: learner.optimizer for name, learner in learners.items()}


def _stateful_parts(trainer: Trainer) -> dict[str, Any]:
    """Matching and weight of samples, where they have a state to be saved."""
    parts = {"matching": trainer.matching, "sample_weight": trainer.sample_weight}
    return {name: part for name, part in parts.items() if isinstance(part, Stateful)}
