"""Small stand-ins for networks and for the running step, on which distribution matching is tried in float64."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dmdr.paths import Kind, NoisePath, Prediction, RectifiedFlow, VariancePreserving
from dmdr.randomness import Random
from dmdr.sampling import FewStepSampler, time_grid
from dmdr.times import Beta
from dmdr.types import Condition, Draw, Rollout

FLOW = RectifiedFlow()
VP = VariancePreserving(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))
Stub = Callable[..., Prediction]


def context(
    path: NoisePath = FLOW,
    *,
    step: int = 0,
    guidance: tuple[float, float] = (1.0, 1.0),
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    renoise: tuple[float, float] = (1.0, 1.0),
    fake_mix: float = 0.0,
) -> Any:
    return SimpleNamespace(
        backend=SimpleNamespace(path=path),
        random=Random(0, step, "rollout/0"),
        guidance=guidance,
        guidance_interval=guidance_interval,
        renoise=Beta(*renoise),
        fake_mix=fake_mix,
    )


def draw_of(x0: Tensor) -> Draw:
    count = len(x0)
    cond = Condition([""] * count)
    rollout = Rollout(
        cond, torch.tensor([1.0, 0.0]), torch.stack([x0, x0]), x0[None], torch.arange(count), torch.arange(count)
    )
    return rollout.pick(torch.zeros(count, dtype=torch.int64))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Network(nn.Module):
    """A trainable, guided stub of any parameterisation; `asked` keeps its inputs and `told` the guidance and mix."""

    def __init__(self, seed: int, path: NoisePath = FLOW, kind: Kind = "velocity") -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(3, 3, seed=seed))
        self.path, self.kind = path, kind
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.told: list[tuple[float, float]] = []

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float = 1.0, fake_mix: float = 0.0
    ) -> Prediction:
        self.asked.append((x_t, t))
        self.told.append((guidance, fake_mix))
        return Prediction((x_t @ self.weight + guidance).sin(), self.kind, x_t, t, self.path)


def gaussian_posterior(x_t: Tensor, t: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """E[x0 | x_t] of rectified flow for x0 ~ N(mean, std^2), [B, D]."""
    alpha, sigma = 1 - t[:, None], t[:, None]
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)


def kind_of(path: NoisePath) -> Kind:
    return "velocity" if path is FLOW else "eps"


def rolled(
    path: NoisePath = FLOW, *, eta: float = 0.0, count: int = 8, grid: Tensor | None = None, **settings: Any
) -> tuple[Draw, Any]:
    """Real trajectories of a student in float64, every step drawn in turn, and the context of the running step."""
    sampler = FewStepSampler(path, time_grid(4) if grid is None else grid, eta)
    steps = sampler.num_inference_steps
    noise = torch.stack([normal(count, 3, seed=seed) for seed in range(steps)])
    rollout = sampler.rollout(Network(3, path, kind_of(path)), noise, Condition([""] * count))
    ctx = context(path, **settings)
    ctx.sampler = sampler
    return rollout.pick(torch.arange(count) % steps), ctx


def networks(path: NoisePath = FLOW) -> tuple[Network, Network]:
    """Teacher and fake score."""
    return Network(2, path, kind_of(path)), Network(1, path, kind_of(path))
