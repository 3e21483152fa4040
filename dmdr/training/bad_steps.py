"""Steps whose updates are skipped, since a loss or a gradient is not finite: how many in a row, and why."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmdr.errors import TrainingError
from dmdr.training.context import StepContext
from dmdr.training.learner import Learner, Update, processes

logger = logging.getLogger("dmdr")


@dataclass
class BadSteps:
    """Counts them, says why in one warning a step, and ends the training after too many in a row.

    Attributes:
        limit: So many in a row may be; the next one ends the training.
        in_a_row: So many have just been, the running one included as soon as an update of it is skipped.
        causes: Of the running step.
    """

    limit: int
    in_a_row: int = 0
    causes: list[str] = field(default_factory=list)

    def note(
        self, learner: Learner, update: Update, losses: Mapping[str, Tensor], ctx: StepContext, total: int
    ) -> None:
        """Take down why an update was skipped; all processes must do so together.

        Args:
            losses: Of the learner, by name.
            total: The step's number in the run.

        Raises:
            TrainingError: If it is one too many in a row, in all processes.
        """
        if not self.causes:
            self.in_a_row += 1
        found = [f"its gradient is not finite ({update.fault})" if update.fault else ""]
        if losses:
            finite = torch.stack([loss.detach().isfinite() for loss in losses.values()]).to(ctx.accelerator.device)
            everywhere = ctx.gather(~finite[None])  # [processes, losses]
            for name, bad in zip(losses, everywhere.T, strict=True):
                if bad.any():
                    found.append(f"{name} is not finite{_in(processes(bad))}")
        for name, counts in ctx.unscored_everywhere().items():
            if missing := int(counts.sum()):
                found.append(f"the reward '{name}' left {missing} images without a score{_in(processes(counts > 0))}")
        said = ", ".join(filter(None, found)) or "its gradient's norm is not finite, though its parts are"
        cause = f"the {learner.name} was not updated: {said}"
        self.causes += [] if cause in self.causes else [cause]  # the fake score may have one in each round
        if self.in_a_row > self.limit:
            row = f" ({self.in_a_row} steps in a row)" if self.in_a_row > 1 else ""
            raise TrainingError(f"step {total}: {'; '.join(self.causes)}{row}")

    def close(self, ctx: StepContext, total: int) -> dict[str, float]:
        """End the step, with a warning of the main process if it was a bad one.

        Returns:
            For the log line: how many have been in a row, if this was one.
        """
        if not self.causes:
            self.in_a_row = 0
            return {}
        if ctx.accelerator.is_main_process:
            logger.warning(
                "step %d: %s (bad step %d of %d in a row)", total, "; ".join(self.causes), self.in_a_row, self.limit
            )
        self.causes = []
        return {"bad_steps": self.in_a_row}


def _in(where: list[str]) -> str:
    return f" ({where[0]})" if where else ""
