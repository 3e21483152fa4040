"""A `Trainer` of small parts on the analytic mixture, and what tests do with one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from dmdr.backends.toy import PROMPTS, ToyBackend, ToyOptions
from dmdr.matching import DMD
from dmdr.paths import Prediction, VariancePreserving, expand
from dmdr.prompts import Prompts, PromptStream
from dmdr.protocols import BringsLearners, Matching, Needs, OwnLearner, SampleWeight, matching_needs
from dmdr.rewards import Rewards
from dmdr.sampling import FewStepSampler, time_grid
from dmdr.settings.chosen import compares_scores
from dmdr.times import Beta
from dmdr.training.learner import Learner
from dmdr.training.objectives import Objectives, WeightedObjective
from dmdr.training.rollouts import Rollouts
from dmdr.training.schedules import Schedule
from dmdr.training.scorer import RolloutScorer
from dmdr.training.tilt import bounded, density_ratio
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Term

Optimize = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def descend(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Steps that are the gradient itself, so that a step shows what gradient it took."""
    return torch.optim.SGD(parameters, lr=1.0)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def cpu() -> Accelerator:
    """accelerate keeps one state per process; a test before this one may have used a GPU."""
    try:
        return Accelerator(cpu=True)
    except ValueError:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True)


def steadily(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)


class DoubleToy(ToyBackend):
    """The toy in float64; only images and rewards stay in float32."""

    def _create(self, *roles: str) -> None:
        super()._create(*roles)
        for role in roles:
            self.residuals[role].double()

    def _exact(self, x_t: Tensor, t: Tensor, cond: Any, guidance: float) -> Tensor:
        return super()._exact(x_t.double(), t, cond, guidance)

    def _predict(self, x_t: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super()._predict(x_t.double(), *args, **kwargs)


class EpsToy(ToyBackend):
    """The toy as an epsilon model: the same mixture on the variance-preserving path of SDXL."""

    def __init__(self, folder: str, options: ToyOptions) -> None:
        super().__init__(folder, options)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.path = VariancePreserving((1 - betas).cumprod(0))

    def _as_eps(self, prediction: Prediction) -> Prediction:
        """What the flow model would answer as a velocity, read as a change of the exact noise."""
        x_t, t = prediction.x_t, prediction.t
        alpha, sigma = expand(self.path.alpha(t), x_t), expand(self.path.sigma(t), x_t)
        mean = x_t - prediction.value * expand(t, x_t)  # undoes ToyBackend's velocity
        return Prediction((x_t - alpha * mean) / sigma, "eps", x_t, t, self.path)

    def _predict(self, *args: Any, **kwargs: Any) -> Prediction:
        return self._as_eps(super()._predict(*args, **kwargs))

    def teacher(self, *args: Any, **kwargs: Any) -> Prediction:
        return self._as_eps(super().teacher(*args, **kwargs))


def at_rest(cls: type[ToyBackend] = ToyBackend) -> ToyBackend:
    """A backend whose student and fake score are the teacher."""
    backend = cls("", ToyOptions(seed=0))
    backend.prepare(cpu(), roles=("student", "fake_score"))
    return backend


def prepared(cls: type[ToyBackend] = ToyBackend, *, roles: Sequence[Any] = ("student", "fake_score")) -> ToyBackend:
    """A backend whose student and fake score differ from the teacher and from each other."""
    backend = cls("", ToyOptions(seed=0))
    backend.prepare(cpu(), roles=roles)
    for number, role in enumerate(("student", "fake_score"), start=1):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in backend.parameters(role).values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return backend


def trainer(
    backend: ToyBackend | None = None,
    *,
    batch: int = 8,
    micro_batch: int | None = None,
    group_size: int = 1,
    steps: int = 4,
    eta: float = 1.0,
    grid: Tensor | None = None,
    objectives: Sequence[Any] = (),
    rewards: Any = None,
    rl_weight: float = 1.0,
    dmd_weight: float = 1.0,
    fake_updates: int = 1,
    rollouts: int | None = None,
    sample_weight: SampleWeight | None = None,
    sde_type: Any = "cps",
    matching: Matching | None = None,
    optimize: Optimize = descend,
    fake_optimize: Optimize | None = None,
    scaler: torch.amp.GradScaler | None = None,
    max_grad_norm: float = float("inf"),
    rows: Sequence[dict[str, Any]] = ROWS,
    shards: int = 1,
    **kwargs: Any,
) -> Trainer:
    """A trainer of `batch` images per process; `objectives` are objects, or pairs of a weight and one.

    `rewards` is a `Rewards` or a single reward.
    """
    accelerator = cpu()
    backend = backend or prepared()
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def learner(name: str, parameters: Any, optimize: Optimize, owner: str = "") -> Learner:
        optimizer = optimize(list(parameters.values()))
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        return Learner(name, parameters, optimizer, scheduler, accelerator, scaler, max_grad_norm, owner=owner)

    weighted = [term if isinstance(term, tuple) else (1.0, term) for term in objectives]
    terms = [WeightedObjective(type(o).__name__.lower(), w, o) for w, o in weighted] if rl_weight else []
    student = learner("student", backend.parameters("student"), optimize)
    compares = ["fake_score"] if compares_scores(matching) else []
    fake_learners = [learner(role, backend.parameters(role), fake_optimize or optimize) for role in compares]

    def own_of(part: Any, owner: str) -> list[Learner]:
        brought = part.learners(backend, accelerator.device) if isinstance(part, BringsLearners) else ()
        return [learner(each.name, each.parameters, optimize, owner) for each in brought]

    own = {term.name: own_of(term.objective, f"objective '{term.name}'") for term in terms}
    fake_learners += own_of(matching, "the matching")
    micro = micro_batch or batch
    if rewards is not None and not isinstance(rewards, Rewards):
        rewards = Rewards({"toy": (1.0, rewards)})
    settings = {"seed": 0, "fake_mix": lambda step: 0.0, "renoise": lambda step: Beta(4.0, 1.5)}
    return Trainer(
        backend=backend,
        rollouts=Rollouts(
            backend,
            FewStepSampler(backend.path, time_grid(steps) if grid is None else grid, eta, sde_type),
            PromptStream(
                Prompts(rows),
                batch * accelerator.num_processes,
                group_size=group_size,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
            ),
            accelerator,
            count=rollouts or (fake_updates if dmd_weight else 1),
            batch_size=micro,
            always_finished=matching_needs(matching).finished,
            shards=shards,
        ),
        student=student,
        fake_learners=fake_learners,
        matching=matching or DMD(),
        objectives=Objectives(terms, Schedule(rl_weight), student, fake_learners, micro, own),
        accelerator=accelerator,
        scaler=scaler,
        micro_batch_size=micro,
        matches=dmd_weight > 0,
        rounds=fake_updates if dmd_weight else 1,
        dmd_weight=Schedule(dmd_weight),
        scorer=None if rewards is None else RolloutScorer(rewards, backend, accelerator, micro),
        sample_weight=sample_weight,
        **{**settings, **kwargs},
    )


def tilt_weights(
    rewards: Tensor, beta: float, *, valid: Tensor | None = None, clip: tuple[float, float] = (0.1, 5.0)
) -> Tensor:
    """The weights of RT-DM as published, in [N] float32 for rewards [N]."""
    valid = rewards.isfinite() if valid is None else valid
    return bounded(density_ratio(rewards, beta, valid), valid, clip)


def state(trainer: Trainer, role: Any = "student") -> dict[str, Tensor]:
    """A copy of a role's parameters."""
    return {name: p.detach().clone() for name, p in trainer.backend.parameters(role).items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def step_of(trainer: Trainer, role: Any = "student", count: int = 1) -> Tensor:
    """How the role's parameters move in `count` training steps, [P]; in one step of `descend`, minus the gradient."""
    before = flat(state(trainer, role))
    for _ in range(count):
        trainer.train_step()
    return flat(state(trainer, role)) - before


@dataclass
class Plain:
    """How far to the right the point lies, without bound; NaN or infinite where `broken` says so, by prompt."""

    differentiable: ClassVar[bool] = True
    broken: dict[str, float] = field(default_factory=dict)
    calls: int = 0

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        self.calls += 1
        score = images[:, 0].mean((1, 2)) + images[:, 1].square().mean((1, 2))
        factor = torch.tensor([self.broken.get(prompt, 1.0) for prompt in prompts])
        return score * factor


@dataclass
class Constant:
    """The same for every image; no gradient."""

    differentiable: ClassVar[bool] = False
    value: float = 0.3
    calls: int = 0

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        self.calls += 1
        return torch.full((len(images),), self.value)


@dataclass
class Policy:
    """An objective whose loss reaches the student's parameters itself, and whose even samples do not count."""

    needs: Needs = field(default_factory=Needs)
    all_valid: bool = True

    def __call__(self, draw: Draw, ctx: Any) -> Term:
        value = ctx.backend.student(draw.x_t, draw.t, draw.cond).value
        return Term(value.square().flatten(1).sum(1), None if self.all_valid else draw.sample % 2 == 1)


@dataclass
class Critic:
    """An objective with a learner of its own: a linear guess of the reward from the finished latents, which is climbed.

    Attributes:
        flaw: What is wrong with it: "idle" never trains the critic, "attached" lets the critic's loss reach the
            student, "stranger" names a learner that is not there. "even" is none: the critic learns from even samples.
    """

    flaw: str = ""

    @property
    def needs(self) -> Needs:
        return Needs()

    def learners(self, backend: Any, device: torch.device) -> list[OwnLearner]:
        self.head = nn.Linear(2, 1).to(device)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.1, -0.2]]))
            self.head.bias.zero_()
        return [OwnLearner("critic", dict(self.head.named_parameters()), 0.05)]

    def __call__(self, draw: Draw, ctx: Any) -> Iterator[Term]:
        scores = ctx.rewards.total(ctx.scores(draw.rollout))
        valid = scores.isfinite()
        yield Term(-self.head(draw.leaf)[:, 0], valid)
        if self.flaw != "idle":
            latents = draw.leaf if self.flaw == "attached" else draw.rollout.final
            error = (self.head(latents)[:, 0] - torch.where(valid, scores, 0.0)) ** 2
            seen = valid & (draw.sample % 2 == 0) if self.flaw == "even" else valid
            name = "nobody" if self.flaw == "stranger" else "critic"
            yield Term(error, seen, metrics={"error": error.detach()}, trains=name)


class Meter:
    """Bytes of the tensors that autograd keeps for backward, parameters aside."""

    def __init__(self, backend: ToyBackend) -> None:
        self.alive = self.peak = 0
        modules = [*backend.residuals.values(), getattr(backend, "decoder", nn.Identity())]
        self.parameters = {p.data_ptr() for module in modules for p in module.parameters()}

    def pack(self, tensor: Tensor) -> "Saved":
        return Saved(
            self, tensor, 0 if tensor.data_ptr() in self.parameters else tensor.numel() * tensor.element_size()
        )

    def __enter__(self) -> "Meter":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


class Saved:
    def __init__(self, meter: Meter, tensor: Tensor, size: int) -> None:
        self.meter, self.tensor, self.size = meter, tensor, size
        meter.alive += size
        meter.peak = max(meter.peak, meter.alive)

    def __del__(self) -> None:
        self.meter.alive -= self.size
