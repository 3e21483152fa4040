"""The running step, as plugins see it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from dmdr.errors import TrainingError
from dmdr.protocols import Backend, Matching
from dmdr.randomness import Random
from dmdr.rewards import Rewards
from dmdr.sampling import FewStepSampler
from dmdr.times import TimeLaw
from dmdr.training.phases import gather
from dmdr.training.scorer import RolloutScorer, Scores, Watched
from dmdr.types import Draw, Real, Rollout

RealImages = Callable[[Draw, Random], Real]  # of a draw, by the numbers of its context


def rollout_random(seed: int, step: int, k: int, iteration: int = 0) -> Random:
    """The numbers of the k-th rollout of an update, by the number of updates in the run before it."""
    return Random(seed, step, f"rollout/{k}", iteration)


@dataclass
class StepContext:
    """One rollout of a training step (`protocols.Context`), and what is logged of it.

    Attributes:
        first_random: The numbers of its first use.
        real_images: The run's, or None.
        iteration: How often it has been used before.
        scored: The scores of its images, once they were asked for.
        unscored: How many images each reward left without a finite score, of all that it was asked about in this
            process; int64 scalars.
    """

    backend: Backend
    sampler: FewStepSampler
    scorer: RolloutScorer | None
    matching: Matching
    first_random: Random
    step: int
    renoise: TimeLaw
    guidance: tuple[float, float]
    guidance_interval: tuple[float, float]
    fake_mix: float
    accelerator: Accelerator
    scaler: torch.amp.GradScaler
    real_images: RealImages | None = None
    rollout: Rollout | None = None
    iteration: int = 0
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    scored: Scores | None = None
    unscored: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scorer:  # in every process, whether it asks for scores or not: they are added up over all
            zero = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
            self.unscored = dict.fromkeys(self.scorer.rewards.parts, zero)

    @property
    def random(self) -> Random:
        return replace(self.first_random, iteration=self.iteration)

    @property
    def rewards(self) -> Rewards:
        return Watched(self._scorer().rewards, self._count_unscored)

    def scores(self, rollout: Rollout) -> dict[str, Tensor]:
        scores = self.all_scores().own
        assert self.rollout is not None
        rows = rollout.sample - self.rollout.sample[0]
        return {name: score[rows] for name, score in scores.items()}

    def score(self, latents: Tensor, draw: Draw) -> dict[str, Tensor]:
        scores = self._scorer()(replace(draw.rollout, x0=latents[None], finished=True)).own
        self._count_unscored(scores)
        return scores

    def global_scores(self) -> tuple[dict[str, Tensor], Tensor]:
        scores = self.all_scores()
        return scores.everyone, scores.group

    def all_scores(self) -> Scores:
        """The scores of the whole rollout, computed and logged when first asked for."""
        scorer = self._scorer()
        if self.rollout is None:
            raise TrainingError("scores were asked for before the first rollout")
        if self.scored is None:
            self.scored = scorer(self.rollout)
            self.log(scorer.means(self.scored))
            self._count_unscored(self.scored.own)
        return self.scored

    def check_scores(self, draw: Draw) -> None:
        """Count a batch that no reward could score.

        Raises:
            RewardError: If there were several in a row; names a reward.
        """
        if draw.rollout.finished:
            self.scores(draw.rollout)
        else:
            self._scorer()(replace(draw.rollout, x0=draw.x0[None], finished=True))

    def _count_unscored(self, scores: Mapping[str, Tensor]) -> None:
        for name, score in scores.items():
            self.unscored[name] = self.unscored[name] + (~score.detach().isfinite()).sum()

    def unscored_everywhere(self) -> dict[str, Tensor]:
        """`unscored` of each process, [P] int64, by reward; all processes must ask together."""
        if not self.unscored:
            return {}
        counts = self.gather(torch.stack([*self.unscored.values()])[None])
        return dict(zip(self.unscored, counts.T, strict=True))

    def _scorer(self) -> RolloutScorer:
        if self.scorer is None:
            raise TrainingError("a reward was asked for, but the run has none; pass --reward")
        return self.scorer

    def real(self, draw: Draw) -> Real:
        if self.real_images is None:
            raise TrainingError(
                "real images were asked for, but the run has none: what reads them must declare needs.real_images"
            )
        return self.real_images(draw, self.random)

    def gather(self, values: Tensor) -> Tensor:
        return gather(self.accelerator, values)

    def backward(self, loss: Tensor) -> None:
        """Backward through the loss scaler."""
        self.scaler.scale(loss).backward()

    def grad(self, loss: Tensor, at: Tensor) -> Tensor:
        (scaled,) = torch.autograd.grad(self.scaler.scale(loss), at)
        return scaled / self.scaler.get_scale()

    def log(self, metrics: Mapping[str, Tensor | float]) -> None:
        self.metrics.update(metrics)


def over_the_batch(
    parts: Sequence[Mapping[str, Tensor]], valid: Tensor, ctx: StepContext, who: str
) -> dict[str, Tensor]:
    """Metrics of the micro-batches over the global batch.

    Args:
        parts: Of each micro-batch, by name: [B] is averaged over the valid samples and left out where there are none;
            a scalar is averaged over the micro-batches.
        valid: Valid samples of the global batch, [N] bool.
        who: Whose metrics they are.

    Raises:
        TrainingError: If a metric is not there in all of them.
    """
    for name in {name for part in parts for name in part}:
        if not all(name in part for part in parts):
            raise TrainingError(f"{who}: the metric '{name}' is missing in a micro-batch: return it in every one")
    means: dict[str, Tensor] = {}
    some = any(value.ndim for value in parts[0].values())
    counted = valid.nonzero()[:, 0] if some else valid  # once: the host waits for it
    for name in parts[0]:
        values = [part[name] for part in parts]
        if not values[0].ndim:
            means[name] = torch.stack(values).mean()
        elif len(counted):
            means[name] = ctx.gather(torch.cat(values))[counted].mean()
    return means
