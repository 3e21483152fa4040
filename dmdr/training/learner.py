"""A trained role: parameters, optimizer, schedule, and the average that follows them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dmdr.ema import EMA
from dmdr.errors import TrainingError
from dmdr.states import is_shared, own_rows, whole
from dmdr.training.phases import gather, phase

if torch.distributed.is_available():
    # Before a process group is there. Functions of this module have the default group as a default argument: imported
    # later, as torch does during the first step, they keep a destroyed group and gloo's threads, which may abort the
    # process while its interpreter ends.
    import torch.distributed.nn


MAX_SKIPPED = 50  # updates in a row that a loss scaler may skip; a healthy one skips a few at its start
Grads = list[Tensor | None]  # a gradient, parameter by parameter


class Update(NamedTuple):
    """What became of an update.

    Attributes:
        norm: Of the gradient before clipping; NaN where a loss is not finite.
        skipped: Whether it was left out, since a loss or the gradient is not finite. What a loss scaler skips is not.
        fault: Then the first parameter whose gradient is not finite, and the processes that brought it; "" where the
            gradient is finite.
    """

    norm: float
    skipped: bool = False
    fault: str = ""


class Learner:
    """One trained role: its parameters, optimizer and learning-rate schedule.

    Gradients are averaged over the processes here, once per update: no wrapper has to know which role is active. Those
    of parameters that the processes share have been averaged as they arrived.
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
        self.skipped = 0  # updates in a row that the loss scaler has skipped
        self._own_norm: Tensor | None = None  # of this process's gradient, before it was averaged
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

    def note_own(self, grads: Sequence[Tensor]) -> None:
        """Keep the norm of this process's own gradient; what has been averaged is no longer its own."""
        if self._own_norm is None and not any(map(is_shared, grads)):
            self._own_norm = nn.utils.get_total_norm(grads)

    def prepare(self, losses: Iterable[Tensor] = ()) -> float:
        """Average, unscale and clip the gradients; without a wait for the device but for the norm.

        Args:
            losses: That the gradients are of, each a scalar.

        Returns:
            The norm before clipping, the same in all processes. It is NaN where a loss is not finite in one of them,
            unless there is a loss scaler, which judges by the gradients. What is not finite is not clipped.
        """
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        health = own_rows(grads[0]).new_zeros(())
        if not self.scaler.is_enabled():
            for loss in losses:
                health = health + (0 * loss.detach()).to(health)  # NaN of a loss that is not finite
        if self.accelerator.num_processes > 1:
            self.note_own(grads)
            average([*grads, health])
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.get_total_norm(grads))
        found = (norm + health).item()
        if math.isfinite(found):
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return found

    def step(self) -> None:
        """Move the parameters, and their average."""
        self._own_norm = None
        self.scaler.step(self.optimizer)
        if self.ema:
            self.ema.update(seen=self.scheduler.last_epoch)
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> str:
        """Drop a prepared gradient. Parameters, their average and the optimizer's state stay as they are.

        Returns:
            `Update.fault`; all processes must ask for it together.
        """
        finite = torch.stack([whole(grad.isfinite().all()) for grad in self.grads if grad is not None]).tolist()
        names = [name for name, each in zip(self.parameters, finite, strict=True) if not each]
        where = [f"first in {names[0]}"] if names else []
        if self._own_norm is not None:
            where[:0] = processes(gather(self.accelerator, ~self._own_norm.isfinite()[None]))
            self._own_norm = None
        self.optimizer.zero_grad(set_to_none=True)
        return ", ".join(where)

    def update(self) -> float:
        """`update_together` of this learner alone; returns its gradient norm before clipping."""
        (update,) = update_together([self])
        return update.norm


def update_together(learners: Sequence[Learner], losses: Sequence[Iterable[Tensor]] | None = None) -> list[Update]:
    """Average, unscale and clip the gradients of learners that had their backward passes together, then step them.

    A loss scaler changes once, after all of them. Their averages take the new parameters in. A learner whose loss or
    gradient is not finite is skipped, and the others are not.

    Args:
        losses: Of each learner, each a scalar; left out, gradients alone are looked at.

    Raises:
        TrainingError: If a loss scaler has skipped more than `MAX_SKIPPED` updates in a row.
    """
    norms = [each.prepare(own) for each, own in zip(learners, losses or [()] * len(learners), strict=True)]
    scaler = learners[0].scaler
    updates = []
    for learner, norm in zip(learners, norms, strict=True):
        finite = math.isfinite(norm)
        learner.skipped = learner.skipped + 1 if scaler.is_enabled() and not finite else 0
        if learner.skipped > MAX_SKIPPED:
            raise TrainingError(
                f"the gradients of the {learner.name} have overflowed float16 in {learner.skipped} updates in a row, "
                "and these updates were skipped: use --mixed_precision bf16"
            )
        updates.append(Update(norm, skipped=not finite and not scaler.is_enabled()))
    for index, learner in enumerate(learners):
        if updates[index].skipped:
            updates[index] = updates[index]._replace(fault=learner.skip())
        else:
            learner.step()
    scaler.update()
    return updates


def processes(found: Tensor) -> list[str]:
    """Those of which something is true, in words; none if it is true of all of several or of none.

    Args:
        found: By process, [P] bool.
    """
    ranks = found.nonzero()[:, 0].tolist()
    if not ranks or len(ranks) == len(found):
        return []
    return [f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"]


@phase("communication")
def average(grads: Sequence[Tensor], bucket: int = 2**28) -> None:
    """Replace gradients by their means over the processes, in place, but those that are means already.

    Args:
        grads: Of one dtype and device, in the same order in every process.
        bucket: Bytes that are sent in one call and take memory beside the gradients; what is larger goes as it is.
    """
    for part in _buckets([grad for grad in grads if not is_shared(grad)], bucket):
        alone = len(part) == 1 and part[0].is_contiguous()  # as all_reduce wants it
        flat = part[0] if alone else torch.cat([grad.flatten() for grad in part])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        if not alone:
            for grad, mean in zip(part, flat.split([grad.numel() for grad in part]), strict=True):
                grad.copy_(mean.view_as(grad))


def _buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if part and held + tensor.nbytes > size:
            yield part
            part, held = [], 0
        part.append(tensor)
        held += tensor.nbytes
    if part:
        yield part
