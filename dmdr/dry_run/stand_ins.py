"""What stands in for parts of a run in a dry run.

What networks answer has no values there. The trainer's own tensors, small beside a network's, lie on the CPU and have
values, so that whatever looks at them goes its usual way; `Bridge` and `MetaReward` stand between.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dmdr.backends.pipeline import PipelineBackend
from dmdr.dry_run.memory import Blockwise, Meter, Note, autocast
from dmdr.paths import Prediction
from dmdr.prompts import split_columns
from dmdr.protocols import Backend, FeatureRole, LatentReward, Reward
from dmdr.rewards import Rewards
from dmdr.run.plan import Plan
from dmdr.run.trainers import Trainers
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.sizes import Size
from dmdr.training.rollouts import Rollouts
from dmdr.types import Condition, Draw, dtype_of

META, CPU = torch.device("meta"), torch.device("cpu")


@dataclass(frozen=True)
class Process:
    """One process of a run, as far as backend and trainer ask accelerate for it."""

    device: torch.device
    mixed_precision: str = "no"
    note: Note = lambda leaf, cast: None
    num_processes = 1
    process_index = 0
    is_main_process = True

    def autocast(self) -> AbstractContextManager[Any]:
        """What `GPUKernels` takes for autocast."""
        dtype = dtype_of(self.mixed_precision)
        return nullcontext() if dtype == torch.float32 else autocast(dtype, self.note)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass
class DryTrainers(Trainers):
    """Trainers on the CPU around a backend on the meta device, whose optimizers keep what they would on a GPU.

    Attributes:
        real: The plan of the run; that of the job has fewer micro-batches, rollouts and updates.
    """

    real: Plan

    def rollouts(self) -> Rollouts:
        made, few = super().rollouts(), self.job.plan
        given = {f.name: getattr(made, f.name) for f in fields(made)}
        batch = self.real.batch.accumulated / few.batch.accumulated
        return DryRollouts(**given, more=(batch, self.real.rollouts / few.rollouts, self.real.rounds / few.rounds))

    def optimizer(self, parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        chosen = OPTIMIZERS[self.job.config.optim]
        if chosen.blocks:
            return Blockwise(parameters, *chosen.blocks)
        if chosen.fused:
            options["foreach"] = False  # one kernel on CUDA, and no copies, either
        return chosen.build(parameters, **options)


@dataclass
class DryRollouts(Rollouts):
    """Rollouts that also hold what further micro-batches, rollouts and updates of the fake score would.

    Attributes:
        more: Micro-batches, rollouts and updates of the fake score of the run, each over the number that is followed.
        rest: As many bytes on the meta device: while rollouts are made, and then until the next ones.
    """

    more: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rest: Tensor | None = None
    _trajectories: float = 0.0

    def __call__(self, *args: Any, **options: Any) -> list[Draw]:
        batch, rollouts, rounds = self.more
        steps, samples = self.sampler.num_inference_steps, self.count * (self.mine.stop - self.mine.start)
        prompts, columns = split_columns(self.prompts.prompts.first(1))
        state = 4 * prod(self.backend.latent_shape)  # float32
        made = (3 * steps + 1) * state + _bytes(self.backend.encode(prompts, **columns).tensors.values())
        self._hold(samples * (batch * rollouts - 1) * made)  # noise, states and answers
        draws = super().__call__(*args, **options)
        kept = [t for d in draws for t in (d.rollout.x_t, d.rollout.x0, *d.rollout.cond.tensors.values())]
        picked = [t for d in draws for t in (d.x_t, d.x0)]
        # Of each sample there are also its direction and its gradient.
        alike = 2 * draws[-1].x0.nbytes * (batch - 1)
        self._trajectories = _bytes(kept) * (batch * rollouts - 1)
        self._hold(self._trajectories + _bytes(picked) * (batch * rounds - 1) + alike)
        return draws

    def end_step(self) -> None:
        """Only the trajectories stay."""
        self._hold(self._trajectories)

    def _hold(self, size: float) -> None:
        self.rest = None  # before there is another
        self.rest = torch.empty(int(size), dtype=torch.uint8, device=META)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages."""
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())


class Bridge:
    """A backend on the meta device, as a trainer on the CPU sees it; conditions stay on the meta device.

    What makes it an optional protocol is written out: from Python 3.12 on, `isinstance` does not ask `__getattr__`.
    """

    def __init__(self, backend: PipelineBackend, meter: Meter) -> None:
        self._backend, self._meter = backend, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    @property
    def feature_widths(self) -> Sequence[int]:
        return self._backend.feature_widths

    @property
    def sizes(self) -> Sequence[Size]:
        return self._backend.sizes

    @property
    def latent_shapes(self) -> Sequence[tuple[int, ...]]:
        return self._backend.latent_shapes

    def other_guidance(self) -> float:
        return self._backend.other_guidance()

    def guided(self, c: Prediction, other: Prediction, w: Tensor) -> Prediction:
        return self._backend.guided(c, other, w)

    def add_role(self, name: str, *, rank: int, alpha: float) -> Mapping[str, nn.Parameter]:
        return self._backend.add_role(name, rank=rank, alpha=alpha)

    def _predict(self, method: str, x_t: Tensor, t: Tensor, cond: Condition, **options: Any) -> Prediction:
        backend, x, times = self._backend, x_t.to(META), t.to(META)
        answer: Callable[[], Tensor] = lambda: getattr(backend, method)(x, times, cond, **options).value  # noqa: E731
        if not torch.is_grad_enabled():
            of = tuple((name, tensor.shape) for name, tensor in cond.tensors.items())
            value = self._meter.passed((method, x.shape, of, *options.items()), answer)
        else:
            value = answer()
        return Prediction(value.to(CPU), backend.kind, x_t, t, backend.path)

    def student(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict("student", x_t, t, cond)

    def fake_score(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict("fake_score", x_t, t, cond)

    def reference(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict("reference", x_t, t, cond)

    def ask_role(self, x_t: Tensor, t: Tensor, cond: Condition, *, role: str, guidance: float = 1.0) -> Prediction:
        return self._predict("ask_role", x_t, t, cond, role=role, guidance=guidance)

    def teacher(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float = 1.0, fake_mix: float = 0.0
    ) -> Prediction:
        return self._predict("teacher", x_t, t, cond, guidance=guidance, fake_mix=fake_mix)

    def features(
        self, role: FeatureRole, x_t: Tensor, t: Tensor, cond: Condition, layers: Sequence[int]
    ) -> list[Tensor]:
        found = self._backend.features(role, x_t.to(META), t.to(META), cond, layers)
        return [each.to(CPU) for each in found]

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        return self._backend.decode(latents.to(META), exact=exact).to(CPU)

    def encode_images(self, images: Tensor) -> Tensor:
        return self._backend.encode_images(images.to(META)).to(CPU)


def on_meta(rewards: Rewards) -> Rewards:
    """The same sum, of rewards on the meta device and stand-ins for those that cannot be there."""
    found = copy(rewards)
    found.parts = {
        name: (weight, _meta_reward(reward) if getattr(reward, "weightless", False) else AnyReward())
        for name, (weight, reward) in rewards.parts.items()
    }
    return found


class MetaReward:
    """A reward on the meta device, as a trainer on the CPU sees it; no two of a batch score the same."""

    def __init__(self, reward: Any) -> None:
        self._reward = reward
        self.differentiable: bool = reward.differentiable

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        self._reward.prepare(device, dtype)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._reward, name)
        if name == "image_features":
            return lambda images: value(images.to(META)).to(CPU)
        return (lambda prompts: value(prompts).to(CPU)) if name == "text_features" else value

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        scores: Tensor = self._reward(images.to(META), prompts, **columns).to(CPU)
        return scores + torch.arange(len(images))


class MetaLatentReward(MetaReward):
    """One that can look at latents."""

    def reads(self, backend: Backend) -> bool:
        found: bool = self._reward.reads(backend)
        return found

    def score_latents(self, latents: Tensor, cond: Condition) -> Tensor:
        scores: Tensor = self._reward.score_latents(latents.to(META), cond).to(CPU)
        return scores + torch.arange(len(latents))


def _meta_reward(reward: Reward) -> MetaReward:
    return MetaLatentReward(reward) if isinstance(reward, LatentReward) else MetaReward(reward)


class AnyReward:
    """A differentiable reward of no cost, in the place of one that has weights; no two of a batch score the same."""

    differentiable = True

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load."""

    def image_features(self, images: Tensor) -> Tensor:
        return images.flatten(2).mean(2)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.ones(len(prompts), 3)

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return self.image_features(images).mean(1) + torch.arange(len(images))
