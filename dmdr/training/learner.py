"""A trained role: parameters, optimizer, schedule, and the average that follows them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dmdr.ema import EMA
from dmdr.errors import TrainingError

if torch.distributed.is_available():
    # Before a process group is there. Functions of this module have the default group as a default argument: imported
    # later, as torch does during the first step, they keep a destroyed group and gloo's threads, which may abort the
    # process while its interpreter ends.
    import torch.distributed.nn


MAX_SKIPPED = 50  # updates in a row that a loss scaler may skip; a healthy one skips a few at its start
Grads = list[Tensor | None]  # a gradient, parameter by parameter


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
        owner: str = "",
    ) -> None:
        self.name, self.parameters, self.optimizer, self.scheduler = name, dict(parameters), optimizer, scheduler
        self.accelerator, self.scaler, self.max_grad_norm, self.ema = accelerator, scaler, max_grad_norm, ema
        self.skipped = 0  # updates in a row, since their gradients were not finite
        self.owner = owner  # the plugin that brought it, for messages; "" for student and fake score

    @property
    def grads(self) -> Grads:
        """The gradient, by parameter; None where none has arrived."""
        return [parameter.grad for parameter in self.parameters.values()]

    @grads.setter
    def grads(self, grads: Grads) -> None:
        for parameter, grad in zip(self.parameters.values(), grads, strict=True):
            parameter.grad = grad

    @contextmanager
    def collecting(self, grads: Grads) -> Iterator[None]:
        """Add the gradients that arrive inside to a list beside the learner's own, in place."""
        before, self.grads = self.grads, grads
        yield
        grads[:], self.grads = self.grads, before

    @contextmanager
    def apart(self) -> Iterator[Callable[[Tensor], None]]:
        """Keep the gradients that arrive inside apart from those that were there, and add them up at the end.

        Yields:
            Multiplies the gradients that have arrived, and only those, by a factor.
        """

        def rescale(factor: Tensor) -> None:
            for grad in self.grads:
                if grad is not None:
                    grad.mul_(factor)

        arrived: Grads = [None] * len(self.parameters)
        with self.collecting(arrived):
            yield rescale
        for parameter, grad in zip(self.parameters.values(), arrived, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad + parameter.grad

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Drop the gradients that arrive inside."""
        with self.collecting([None] * len(self.parameters)):
            yield

    @property
    def reached(self) -> bool:
        """Whether a parameter has got a gradient since the last update."""
        return any(parameter.grad is not None for parameter in self.parameters.values())

    def prepare(self) -> float:
        """Average, unscale and clip the gradients; returns their norm before clipping."""
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            average([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(parameters, self.max_grad_norm).item()

    def step(self) -> None:
        """Move the parameters, and their average."""
        self.scaler.step(self.optimizer)
        if self.ema:
            self.ema.update(seen=self.scheduler.last_epoch)
        self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> float:
        """`update_together` of this learner alone; returns its gradient norm before clipping."""
        (norm,) = update_together([self])
        return norm


def update_together(learners: Sequence[Learner]) -> list[float]:
    """Average, unscale and clip the gradients of learners that had their backward passes together, then step them.

    A loss scaler changes once, after all of them. Their averages take the new parameters in.

    Returns:
        The gradient norm of each before clipping.

    Raises:
        TrainingError: If one is not finite; no parameter has moved. Under a loss scaler such an update is skipped
            instead, as usual, but not more than `MAX_SKIPPED` in a row.
    """
    norms = [learner.prepare() for learner in learners]
    scaler = learners[0].scaler
    for learner, norm in zip(learners, norms, strict=True):
        learner.skipped = 0 if math.isfinite(norm) else learner.skipped + 1
        if learner.skipped and not scaler.is_enabled():
            raise TrainingError(f"the gradient norm of the {learner.name} is {norm}; nothing was updated")
        if learner.skipped > MAX_SKIPPED:
            raise TrainingError(
                f"the gradients of the {learner.name} have overflowed float16 in {learner.skipped} updates in a row, "
                "none of which was made: use --mixed_precision bf16"
            )
    for learner in learners:
        learner.step()
    scaler.update()
    return norms


def average(grads: Sequence[Tensor], bucket: int = 2**28) -> None:
    """Replace gradients by their means over the processes, in place.

    Args:
        grads: Of one dtype and device, in the same order in every process.
        bucket: Bytes that are sent in one call and take memory beside the gradients; what is larger goes as it is.
    """
    for part in _buckets(grads, bucket):
        alone = len(part) == 1 and part[0].is_contiguous()  # as all_reduce wants it
        flat = part[0] if alone else torch.cat([grad.flatten() for grad in part])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        if not alone:
            for grad, mean in zip(part, flat.split([grad.numel() for grad in part]), strict=True):
                grad.copy_(mean.view_as(grad))


def _buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    for tensor in tensors:
        if part and sum(t.nbytes for t in part) + tensor.nbytes > size:
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part
