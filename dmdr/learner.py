"""A trained role: parameters, optimizer, schedule, and the average that follows them."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import nn

from dmdr.ema import EMA
from dmdr.errors import TrainingError


class Learner:
    """One trained role: its parameters, optimizer and learning-rate schedule.

    Gradients are averaged over the processes here, once per update: no wrapper has to know which role is active.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        accelerator: Accelerator,
        scaler: torch.amp.GradScaler,
        max_grad_norm: float,
        ema: EMA | None = None,
    ) -> None:
        self.name, self.parameters, self.optimizer, self.scheduler = name, dict(parameters), optimizer, scheduler
        self.accelerator, self.scaler, self.max_grad_norm, self.ema = accelerator, scaler, max_grad_norm, ema

    def update(self) -> float:
        """Average, unscale and clip the gradients, then step, and take the new parameters into their average.

        Returns:
            The gradient norm before clipping.

        Raises:
            TrainingError: If it is not finite; the parameters have not moved. Under a loss scaler such a step is
                skipped instead, as usual.
        """
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            flat = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
            flat = self.accelerator.reduce(flat, "mean")
            for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = grad.view_as(parameter)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm).item()
        if not self.scaler.is_enabled() and norm - norm != 0:
            raise TrainingError(f"the gradient norm of the {self.name} is {norm}; nothing was updated")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
