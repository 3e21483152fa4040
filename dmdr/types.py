"""The tensors that flow through one training step, named and frozen.

Legend of shapes: B samples, K student steps, `*latent` the latent's own dimensions (C, H, W for images).
Times are in [0, 1]; t = 1 is noise, t = 0 is data.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import TrainingError

ABSENT: Any = None  # a tensor that only those have who may read it


def dtype_of(precision: str) -> torch.dtype:
    """What `--mixed_precision` and `--dtype` mean: bf16 and fp16; float32 by any other name."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


@dataclass(frozen=True)
class Condition:
    """What B images shall show: prompts, their other columns, and the backend's encoding of them.

    Attributes:
        prompts: B strings.
        tensors: The backend's own encodings, each [B, ...]; the core only slices them.
        columns: Further columns of the prompt rows (labels, reference answers), each of length B.
    """

    prompts: Sequence[str]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, part: slice) -> "Condition":
        return Condition(
            self.prompts[part],
            {name: tensor[part] for name, tensor in self.tensors.items()},
            {name: column[part] for name, column in self.columns.items()},
        )

    def ordered(self, rows: Tensor) -> "Condition":
        """These rows in this order, [n] int64 on the CPU."""
        numbers = rows.tolist()
        on_device = {device: rows.to(device, non_blocking=True) for device in {t.device for t in self.tensors.values()}}
        return Condition(
            [self.prompts[row] for row in numbers],
            {name: tensor[on_device[tensor.device]] for name, tensor in self.tensors.items()},
            {name: [column[row] for row in numbers] for name, column in self.columns.items()},
        )


@dataclass(frozen=True)
class Rollout:
    """One complete trajectory per sample, made without gradient.

    Attributes:
        cond: Condition of the B samples.
        t: The student's time grid, [K + 1] float64; t[K] = 0. At the first step the student is conditioned on t[0].
        x_t: The states, [K + 1, B, *latent] float32. x_t[0] is unit Gaussian even at t[0] below 1; x_t[K] = x0[K - 1].
        x0: The student's prediction at each step, [K, B, *latent] float32.
        sample: Index of each sample in the global batch, [B] int64; the key of its random numbers.
        group: Index of each sample's group (same prompt) in the global batch, [B] int64.
        log_prob: Log-probability of each stochastic transition, [K - 1, B] float64, or None where nobody asked.
        finished: Whether all samples went through all steps. Where one did not, what comes after its drawn step is NaN.
    """

    cond: Condition
    t: Tensor
    x_t: Tensor
    x0: Tensor
    sample: Tensor
    group: Tensor
    log_prob: Tensor | None = None
    finished: bool = True

    @property
    def final(self) -> Tensor:
        """The finished latents, [B, *latent].

        Raises:
            TrainingError: If the rollout is not finished.
        """
        if not self.finished:
            raise TrainingError(
                "this rollout ends at the drawn steps: what looks at finished images must declare needs.finished"
            )
        return self.x0[-1]

    def pick(self, index: Tensor) -> "Draw":
        """One stored state of each sample's own trajectory, and the prediction that was made there.

        Args:
            index: Student step of each sample, [B] int64 in [0, K).
        """
        rows = torch.arange(len(self.cond), device=self.x_t.device)
        index = index.to(self.x_t.device)
        return Draw(
            x_t=self.x_t[index, rows],
            t=self.t.to(self.x_t.device, non_blocking=True)[index],
            index=index,
            x0=self.x0[index, rows],
            cond=self.cond,
            sample=self.sample,
            group=self.group,
            mask=torch.ones(len(self.cond), dtype=torch.bool, device=self.x_t.device),
            rollout=self,
        )


@dataclass(frozen=True)
class Direction:
    """Where distribution matching wants the anchor to move from: `total`, and the parts that it is the sum of.

    Attributes:
        total: [B, *latent] float32, a gradient times the number of elements of a sample; most matchings normalise it
            per sample.
        parts: Named summands of `total`, e.g. `dm` (distribution matching) and `ca` (guidance augmentation).
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, part: slice) -> "Direction":
        return Direction(self.total[part], {name: value[part] for name, value in self.parts.items()})

    def only(self, names: Collection[str]) -> "Direction":
        """With these of its parts.

        Raises:
            TrainingError: If it has no part of that name.
        """
        for name in names:
            if name not in self.parts:
                raise TrainingError(f"the matching's direction has no part '{name}'; it has {list(self.parts)}")
        return Direction(self.total, {name: self.parts[name] for name in names})

    def weighted(self, weight: Tensor) -> "Direction":
        """Total and parts of each sample times its weight, [B]."""
        weight = weight.view(-1, *[1] * (self.total.ndim - 1)).to(self.total.dtype)
        return Direction(weight * self.total, {name: weight * value for name, value in self.parts.items()})


@dataclass(frozen=True)
class Draw:
    """The student step that each sample is trained on.

    Attributes:
        x_t, t: Stored state [B, *latent] and its time [B]: the student's input.
        index: Student step, [B] int64.
        x0: The student's answer there, [B, *latent], detached.
        cond, sample, group: As in Rollout.
        mask: Samples whose step the objective declared, [B] bool. The others stay in the batch: where only stochastic
            steps are declared, they are at the last one, whose standard deviation is 0.
        rollout: The whole trajectories (of these samples) that the states came from.
        leaf: x0 as a leaf that takes the objective's gradient, [B, *latent]. Only an objective's call has one, and only
            objectives read it, so that its type is a Tensor; elsewhere it is None.
        direction: Gradient of the distribution-matching loss at the matching's anchor, x0 for DMD, times numel, after
            the sample weight, with the parts that objectives declare in `needs.parts`; None before it is known.
        iteration: How often this rollout has been used before, 0 at first.
    """

    x_t: Tensor
    t: Tensor
    index: Tensor
    x0: Tensor
    cond: Condition
    sample: Tensor
    group: Tensor
    mask: Tensor
    rollout: Rollout
    leaf: Tensor = ABSENT
    direction: Direction | None = None
    iteration: int = 0

    def __len__(self) -> int:
        return len(self.cond)

    @property
    def x_next(self) -> Tensor:
        """The stored state after the drawn step, [B, *latent]; x0 for the last one."""
        rows = torch.arange(len(self), device=self.x_t.device)
        return self.rollout.x_t[self.index + 1, rows]

    def __getitem__(self, part: slice) -> "Draw":
        whole = self.rollout
        return replace(
            self,
            x_t=self.x_t[part],
            t=self.t[part],
            index=self.index[part],
            x0=self.x0[part],
            cond=self.cond[part],
            sample=self.sample[part],
            group=self.group[part],
            mask=self.mask[part],
            leaf=ABSENT if self.leaf is None else self.leaf[part],
            direction=None if self.direction is None else self.direction[part],
            rollout=Rollout(
                whole.cond[part],
                whole.t,
                whole.x_t[:, part],
                whole.x0[:, part],
                whole.sample[part],
                whole.group[part],
                None if whole.log_prob is None else whole.log_prob[:, part],
                whole.finished,
            ),
        )

    def split(self, size: int) -> Iterator["Draw"]:
        """The samples in order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


@dataclass(frozen=True)
class Renoised:
    """A noisy version of the student's answer, where teacher and fake score are compared.

    Attributes:
        x_t, t: Noisy state [B, *latent] and its time [B].
        x0, eps: The pair that made it, each [B, *latent]: what the fake score regresses on.
        weight: Loss weight of the fake score, [B].
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    eps: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Real:
    """A real image for each sample of a draw, and what it shows.

    Attributes:
        x0: Clean latents, [B, *latent] float32.
        cond: Condition of the images: their own captions, not the draw's prompts.
    """

    x0: Tensor
    cond: Condition


RESERVED_METRICS = ("coverage", "invalid", "weight")  # what the run logs of every objective beside its own metrics


@dataclass(frozen=True)
class Term:
    """One additive loss.

    Attributes:
        loss: Per-sample loss, [B] float32 or float64, with a graph into `draw.leaf` and/or the student's parameters.
        valid: Samples that count, [B] bool; None means all. The others' gradient is dropped at `draw.leaf`; a loss that
            reaches the student's parameters has to mask them itself, before 0 * NaN can arise in its backward.
        grad: d loss_b / d leaf_b where the objective has taken it itself, [B, *latent]; `loss` is then a monitor.
        metrics: Values to log, each a number, a scalar or [B] (averaged over the valid samples).
        trains: Name of the objective's own learner (`protocols.OwnLearner`) whose loss this is, with a graph into its
            parameters alone; it has no weight, and is a mean over the valid samples as the others are.
    """

    loss: Tensor
    valid: Tensor | None = None
    grad: Tensor | None = None
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    trains: str | None = None


def terms_of(answer: Term | Iterable[Term]) -> Iterator[Term]:
    """What an objective returned, one term at a time.

    Raises:
        TrainingError: If it is neither a term nor a sequence or generator of terms.
    """
    answers = (answer,) if isinstance(answer, Term) else answer
    if not isinstance(answers, Iterable):
        raise TrainingError(f"it must return a Term, or yield several, but returned {answers!r}")
    for found in answers:
        if not isinstance(found, Term):
            raise TrainingError(f"it must return a Term, or yield several, but gave {type(found)}")
        yield found


def checked(term: Term, count: int) -> Term:
    """The term, if it is what a micro-batch of `count` samples asks for.

    Raises:
        TrainingError: If its loss, `valid` or a metric is of another shape or dtype, or a metric has a name that the
            run logs itself (RESERVED_METRICS).
    """

    def what(value: Any) -> str:
        return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__

    def fits(value: Any, dtypes: tuple[torch.dtype, ...], name: str, wanted: str) -> None:
        if not isinstance(value, Tensor) or value.shape != (count,) or value.dtype not in dtypes:
            raise TrainingError(f"Term.{name} must be {wanted}, not {what(value)}")

    floats = torch.float32, torch.float64
    fits(term.loss, floats, "loss", f"one loss per sample, [{count}] float32 or float64")
    if term.valid is not None:
        fits(term.valid, (torch.bool,), "valid", f"[{count}] bool, or None for all")
    for name, value in term.metrics.items():
        if name in RESERVED_METRICS:
            raise TrainingError(f"the run logs '{name}' of every objective itself; give the metric another name")
        if not isinstance(value, int | float) and (not isinstance(value, Tensor) or value.shape not in ((), (count,))):
            raise TrainingError(f"the metric '{name}' must be a number or [{count}], not {what(value)}")
    return term
