"""A trained role: parameters, optimizer, schedule, and the average that follows them."""

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
        self.owner = owner  # the plugin that brought it, for messages; "" for student and fake score

    @contextmanager
    def apart(self) -> Iterator[Callable[[Tensor], None]]:
        """Keep the gradients that arrive inside apart from those that were there, and add them up at the end.

        Yields:
            Multiplies the gradients that have arrived, and only those, by a factor.
        """
        parameters = list(self.parameters.values())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None

        def rescale(factor: Tensor) -> None:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

        yield rescale
        for parameter, other in zip(parameters, before, strict=True):
            if other is not None:
                parameter.grad = other if parameter.grad is None else parameter.grad + other

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Drop the gradients that arrive inside."""
        before = [parameter.grad for parameter in self.parameters.values()]
        for parameter in self.parameters.values():
            parameter.grad = None
        yield
        for parameter, grad in zip(self.parameters.values(), before, strict=True):
            parameter.grad = grad

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
            self.ema.update()
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
        TrainingError: If one is not finite; no parameter has moved. Under a loss scaler such a step is skipped instead,
            as usual.
    """
    norms = [learner.prepare() for learner in learners]
    scaler = learners[0].scaler
    for learner, norm in zip(learners, norms, strict=True):
        if not scaler.is_enabled() and norm - norm != 0:
            raise TrainingError(f"the gradient norm of the {learner.name} is {norm}; nothing was updated")
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
