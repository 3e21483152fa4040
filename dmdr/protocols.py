"""The contract between the core and its plugins, on one page.

A plugin implements one of these protocols (no base class needed), and registers it under an entry-point group:
`dmdr.objectives`, `dmdr.rewards`, `dmdr.matchings`, `dmdr.sample_weights`, `dmdr.backends` or `dmdr.models`.
Objectives, rewards, matchings and sample weights are dataclasses; their fields are their command-line flags.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from dmdr.errors import ConfigError
from dmdr.paths import NoisePath, Prediction
from dmdr.randomness import Random
from dmdr.sizes import Size
from dmdr.times import TimeLaw
from dmdr.types import Condition, Direction, Draw, Real, Renoised, Rollout, Term

Role = Literal["student", "fake_score", "reference"]
FeatureRole = Literal["teacher", "fake_score"]
# Counts in `Needs`, with the least value of each.
COUNTS = {"group_size": 1, "batch_size": 1, "updates_per_rollout": 1, "student_steps": 1, "stochastic_steps": 0}
LORA_FILE = "pytorch_lora_weights.safetensors"  # in an export: the name that load_lora_weights looks for


class Denoiser(Protocol):
    """`backend.student`, `backend.fake_score`, `backend.reference`: of x_t [B, *latent] at times t [B] in [0, 1]."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction: ...


class GuidedDenoiser(Protocol):
    """`backend.teacher`, of x_t [B, *latent] at times t [B] in [0, 1].

    `guidance` 1 is the conditional prediction c, 0 the unconditional u, and w is u + w (c - u), or what the family
    makes of them (`GuidanceRule`). `fake_mix` is the share of the fake score's adapter that is mixed in (DynaDG): 0 is
    the pure teacher, 1 the fake score. Of a fake score that is a full network, nothing between them is asked for.
    """

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float = 1.0, fake_mix: float = 0.0
    ) -> Prediction: ...


@dataclass(frozen=True, kw_only=True)
class RoleOptions:
    """How a family with adapters sets up its roles; its own options inherit from this.

    Attributes:
        lora_rank: Rank of the student's LoRA.
        lora_alpha: Alpha of the student's LoRA; its strength is alpha / rank.
        fake_lora_rank: Rank of the fake score's LoRA.
        fake_lora_alpha: Alpha of the fake score's LoRA.
        lora_target_modules: Modules that get a LoRA; the family's own choice by default.
        full_finetune: Train a full copy of the network as the student instead of a LoRA.
        fake_score: Train the fake score as a LoRA, or as a full copy of the network.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        seed: Of the adapters' initial values.

    Raises:
        ConfigError: For a rank below 1, or an alpha that is not above 0.
    """

    lora_rank: int = 64
    lora_alpha: float = 128.0
    fake_lora_rank: int = 32
    fake_lora_alpha: float = 64.0
    lora_target_modules: list[str] | None = None
    full_finetune: bool = False
    fake_score: Literal["lora", "full"] = "lora"
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lora_rank", "fake_lora_rank"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("lora_alpha", "fake_lora_alpha"):
            require(self, name, getattr(self, name) > 0, "above 0")

    @property
    def full_roles(self) -> tuple[Role, ...]:
        """The trained roles that are full copies of the network."""
        full: dict[Role, bool] = {"student": self.full_finetune, "fake_score": self.fake_score == "full"}
        return tuple(role for role, is_full in full.items() if is_full)


def unread() -> Any:
    """An option of a base class that a family does not read: no flag, and always None."""
    return field(default=None, init=False)


def require(options: Any, name: str, holds: bool, what: str) -> None:
    """Refuse the value of an option.

    Args:
        options: The dataclass with the value.
        name: Its field, which is also the flag.
        holds: Whether the value is allowed.
        what: What it may be, in words that go on from "must be".

    Raises:
        ConfigError: Unless `holds`; names the flag, what it must be, and its value.
    """
    if not holds:
        raise ConfigError(f"--{name} must be {what}, not {getattr(options, name)}")


def with_options(options: Any, **values: Any) -> Any:
    """A family's options with these values; those of options that it does not read are left out.

    Args:
        options: Its `Options`, or an instance, of which a copy keeps the other values.
    """
    known = {f.name for f in fields(options) if f.init}
    given = {name: value for name, value in values.items() if name in known}
    return options(**given) if isinstance(options, type) else replace(options, **given)


@runtime_checkable
class Backend(Protocol):
    """One model family: three roles on one network, an encoder of prompts, a decoder of latents.

    Constructed as `cls(folder_or_hub_id, options)`, which must be cheap but may refuse what is no such pipeline
    (`ConfigError`). `options` is an instance of the class's own `Options`, a dataclass whose fields are the family's
    flags (`RoleOptions` is one to inherit from). A field with the name of a setting of the core (`seed`, `revision`,
    `guidance_scale`, ...) is given that setting's value.

    It may also be any of `ChecksPrompts`, `CachesPrompts`, `ChecksSampler`, `DrawsNoise`, `TeacherGrid`,
    `GuidanceRule`, `StartsElsewhere`, `SeveralSizes`, `GivesFeatures`, `AddsRoles` and `Shardable`.
    """

    options: Any
    path: NoisePath
    latent_shape: tuple[int, ...]
    shift: float  # timestep shift of training, such as of the times of renoising; 1 where the family has none

    def grid(self, num_inference_steps: int) -> Tensor:
        """The student's times where the user names none, [K + 1] float64 from noise to exactly 0."""

    def prepare(self, accelerator: Any, *, roles: Sequence[Role]) -> None:
        """Load weights onto the device and create the trainable roles; the only expensive call."""

    def encode(self, prompts: Sequence[str], **columns: Sequence[Any]) -> Condition:
        """The condition of B prompts: the prompts, their encodings, each [B, ...], and the columns as they are."""

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> latents [B, *latent]."""

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        """Latents -> [B, 3, H, W] float32 in [0, 1]; differentiable, the clamp passes gradients straight through.

        `exact` asks for what users see, where rewards are content with a cheaper decoder.
        """

    def student(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """The student's prediction (`Denoiser`) for x_t [B, *latent] at times t [B], float32, with a graph."""

    def fake_score(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """The fake score's prediction (`Denoiser`) for x_t [B, *latent] at times t [B], float32, with a graph."""

    def reference(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """The last `snapshot`'s prediction (`Denoiser`) for x_t [B, *latent] at times t [B], float32; no graph."""

    def teacher(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float = 1.0, fake_mix: float = 0.0
    ) -> Prediction:
        """The teacher's prediction (`GuidedDenoiser`) for x_t [B, *latent] at times t [B], float32, without a graph.

        `guidance` and `fake_mix` are as in `GuidedDenoiser`.
        """

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """Named parameters of a role, stable in name and order; empty for a role that was not prepared."""

    def snapshot(self) -> None:
        """Make the reference what the student is now."""

    def export(self, directory: Path, sampler: "Sampler") -> Mapping[str, Any]:
        """Write the student as its family's stock pipeline loads it; return that pipeline's call arguments."""

    def snippet(self, base: str, prompt: str, sampler: "Sampler") -> str:
        """Python that samples the export with the stock pipeline, for the model card."""

    def load_export(self, directory: Path) -> None:
        """Load what `export` wrote into the student.

        Raises:
            ConfigError: If the directory holds no export of this family, or one of another kind or shape.
        """


class Sampler(Protocol):
    """The few-step sampler (`dmdr.sampling.FewStepSampler`)."""

    @property
    def path(self) -> NoisePath:
        """Noise path of the model."""

    @property
    def t(self) -> Tensor:
        """Grid, [K + 1] float64 from noise to exactly 0."""

    @property
    def eta(self) -> float:
        """Share of fresh noise, in [0, 1]."""

    @property
    def num_inference_steps(self) -> int:
        """K."""

    def moments(self, i: int | Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Mean [B, *latent] and standard deviation [1 or B, 1, ...] of the state after step i, one or [B] of them."""

    def transition(self, prediction: Prediction, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, *latent] and standard deviation [1 or B, 1, ...] of the state at a time t_next, a scalar or [B]."""

    def step(self, i: int, prediction: Prediction, noise: Tensor | None) -> Tensor:
        """State after step i, [B, *latent]; `noise` is unit Gaussian of this shape, None for the mean."""

    def log_prob(
        self, i: int | Tensor, prediction: Prediction, x_next: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Gaussian log-probability of x_next [B, *latent] after step i, [B] float64, as the mean over the elements.

        Args:
            i: The step, one or [B] of them.
            prediction: The student's, at the state before the step.
            x_next: The state after it; `draw.x_next` after the step `draw.index`.
            mask: The samples to compute it of, [B] bool, as `draw.mask`: the others have 0, without a gradient.

        Raises:
            TrainingError: If the step of a sample is deterministic.
        """

    def kl(self, i: int | Tensor, prediction: Prediction, reference: Prediction) -> Tensor:
        """KL divergence of step i, one or [B], by a prediction from that by a reference, [B]: a mean over the elements.

        Both are at the state before the step. Where it is deterministic, half the squared distance of the states after.
        """


@runtime_checkable
class Reward(Protocol):
    """A score of images; higher is better. Construction is cheap; `prepare` loads the weights, frozen.

    Optional: `columns: ClassVar[tuple[str, ...]]`, the columns of the prompt rows that it cannot do without;
    `reads_prompts = False`, of one that looks at images only; `printed_times`, the factor of published tables, 100 for
    cosines; `weightless = True`, of one that `prepare` builds on the meta device without its weights, so that --dry_run
    counts its memory. It may also be `Submits`, a `FeatureReward` or a `LatentReward`.
    """

    @property
    def differentiable(self) -> bool:
        """Whether its score has a gradient in the images; a class attribute, which is read off the class."""

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights, frozen, in eval mode.

        Raises:
            ConfigError: If a setting or a checkpoint is no good. An OSError or a ValueError is turned into one.
        """

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] float32 in [0, 1] -> [B] float32; differentiable in `images` where `differentiable` says so."""


@runtime_checkable
class FeatureReward(Reward, Protocol):
    """A reward whose score is linear in a separable text feature."""

    def image_features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in [0, 1] -> features [B, F] with a graph."""

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> features [B, F]; the score is the sum of both features' products, times a constant."""


@runtime_checkable
class LatentReward(Reward, Protocol):
    """A reward that can also look at the latents of some families: it then needs no decoder, nor a text encoder."""

    def reads(self, backend: Backend) -> bool:
        """Whether it can look at the latents and conditions of this family; cheap, and after `prepare`."""

    def score_latents(self, latents: Tensor, cond: Condition) -> Tensor:
        """Clean latents [B, *latent] float32 -> [B] float32; differentiable in them where `differentiable` says so.

        Args:
            latents: Of a family that it `reads`.
            cond: As that family encodes B prompts.
        """


class RewardSum(Reward, Protocol):
    """The run's rewards and their weighted sum, itself a `Reward` (`dmdr.rewards.Rewards`)."""

    @property
    def parts(self) -> Mapping[str, tuple[float, Reward]]:
        """Weight and reward by name, in the order of the sum."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each part in the sum, by name."""

    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        """Images [B, 3, H, W] float32 in [0, 1] -> raw scores by name, each [B] float32, before their weights."""

    def each_of(
        self, latents: Tensor, cond: Condition, backend: Backend, images: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Clean latents [B, *latent] of a family -> `each`; decodes them only if a reward looks at images.

        Args:
            images: What they decode to, [B, 3, H, W] float32 in [0, 1], where it is known.
        """

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what `each` returned, [B] float32; NaN where any part is."""


@dataclass(frozen=True)
class Needs:
    """What an objective requires; checked before step 0.

    Attributes:
        reward: The run must have a reward.
        group_size: Least number of images per prompt.
        batch_size: Least number of images in the global batch.
        reward_grad: The rewards must be differentiable.
        text_features: The rewards must have separable text features.
        log_prob: The rollout must store the log-probabilities of its transitions.
        roles: Further roles, e.g. ("reference",).
        student_steps: Least number of steps of the student.
        stochastic_steps: Least number of stochastic steps of the sampler (all but the last, at eta above 0).
        steps: Student steps it acts on: "any", "last", "stochastic" (all but the last), or explicit indices.
        updates_per_rollout: How often one rollout is used.
        matching: It reads the matching gradient (`draw.direction`), which --dmd_weight 0 takes away.
        parts: Parts of it that it reads (`draw.direction.parts`). `ca`, what guidance adds, needs a guided teacher.
        finished: It looks at finished images: `rollout.final`, `ctx.scores`, or a state after `draw.x_next`. Where
            nothing does, rollouts end at the drawn steps.
        real_images: It reads real images (`ctx.real`), which --real_images names.
        times: It draws renoise times (`dmdr.matching.renoise_times`), as --renoise_times says.
        guided: It asks the guided teacher (`dmdr.matching.teach`). All matchings that compare scores do both.
    """

    reward: bool = True
    group_size: int = 1
    batch_size: int = 1
    reward_grad: bool = False
    text_features: bool = False
    log_prob: bool = False
    roles: tuple[Role, ...] = ()
    student_steps: int = 1
    stochastic_steps: int = 0
    steps: Literal["any", "last", "stochastic"] | tuple[int, ...] = "any"
    updates_per_rollout: int = 1
    matching: bool = False
    parts: tuple[str, ...] = ()
    finished: bool = True
    real_images: bool = False
    times: bool = False
    guided: bool = False

    def __post_init__(self) -> None:
        """Refuse what nobody could meet.

        Raises:
            ConfigError: Names the field.
        """
        for name in (each.name for each in fields(self) if each.type is bool):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"needs.{name} must be True or False, not {getattr(self, name)!r}")
        for name, least in COUNTS.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ConfigError(
                    f"needs.{name} must be a whole number of at least {least}, not {getattr(self, name)!r}"
                )
        if not isinstance(self.parts, tuple) or (self.parts and not self.matching):
            raise ConfigError(f"needs.parts must be a tuple of names, beside matching=True, not {self.parts!r}")
        roles, steps = get_args(Role), self.steps
        if not isinstance(self.roles, tuple) or not set(self.roles) <= set(roles):
            raise ConfigError(f"needs.roles must be a tuple of {', '.join(roles)}, not {self.roles!r}")
        explicit = isinstance(steps, tuple) and bool(steps) and all(isinstance(step, int) for step in steps)
        if not explicit and steps not in ("any", "last", "stochastic"):
            raise ConfigError(f"needs.steps must be any, last, stochastic or a tuple of indices, not {steps!r}")


class Context(Protocol):
    """What a matching, a weight or an objective may ask of the running step."""

    @property
    def backend(self) -> Backend:
        """The networks, and the way to latents and images and back."""

    @property
    def sampler(self) -> Sampler:
        """The student's sampler."""

    @property
    def rewards(self) -> RewardSum:
        """The run's rewards.

        Raises:
            TrainingError: If the run has none; it has one for every part that declares `needs.reward`.
        """

    @property
    def matching(self) -> "Matching":
        """How student and teacher are compared; its `anchor` tells what a direction acts on."""

    @property
    def random(self) -> Random:
        """Numbers keyed by sample, new in each use of a rollout; `random.of_rollout` stay the same in all of them."""

    @property
    def step(self) -> int:
        """Steps so far in this stage; each is one student update, or several on one rollout."""

    @property
    def renoise(self) -> TimeLaw:
        """Law of renoise times, which `dmdr.matching.renoise_times` draws from."""

    @property
    def guidance(self) -> tuple[float, float]:
        """Range of the teacher's guidance."""

    @property
    def guidance_interval(self) -> tuple[float, float]:
        """The least and the greatest time at which the teacher is guided (`dmdr.matching.teach`)."""

    @property
    def fake_mix(self) -> float:
        """Share of the fake score's adapter in the teacher (DynaDG)."""

    def scores(self, rollout: Rollout) -> dict[str, Tensor]:
        """Raw reward of the finished images by name, each [B] float32; decoded and scored once per rollout."""

    def score(self, latents: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Raw reward of other latents for the prompts of a draw, [B, *latent], by name, each [B] float32.

        A few at a time are decoded and scored, without a gradient, in each call; all processes must call it together.
        """

    def global_scores(self) -> tuple[dict[str, Tensor], Tensor]:
        """`scores` of the global batch, each [N], and the groups [N]; row i is the sample of index i."""

    def real(self, draw: Draw) -> Real:
        """A real image for each sample of the draw, of its latent shape; drawn with replacement, keyed by sample.

        All calls in one use of a rollout give a sample the same image; other rollouts and uses give it others.

        Raises:
            TrainingError: If the run has none; it has some for every part that declares `needs.real_images`.
        """

    def gather(self, values: Tensor) -> Tensor:
        """The same tensor of all processes, [B, ...] each, as [N, ...] in the order of the global batch."""

    def grad(self, loss: Tensor, at: Tensor) -> Tensor:
        """d loss / d at of a scalar loss, shaped like `at`; frees the graph.

        Use this and not `torch.autograd.grad`: it goes through the loss scaler, without which float16 loses gradients
        below 6e-8.
        """

    def log(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Add values to this step's log line, each a number or a scalar tensor."""


class Matching(Protocol):
    """How the student's distribution is compared with the teacher's; `dmdr.matching.DMD` is the default.

    It may also be `Stateful`, and bring learners (`BringsLearners`), whose losses are then part of `fake_loss`.
    Optional: `needs`, where it requires anything of the run: a reward, finished or real images, or several images of a
    prompt; such as `Needs(reward=False, finished=False, real_images=True)` (`matching_needs`). `parts`, in the class,
    are the names of parts that each of its directions has, for objectives that read them (`Needs.parts`).
    `compares_scores = False`, in the class, is of one that does without scores, as a GAN: the run has no fake score,
    and `fake` must not be asked.
    """

    def anchor(self, prediction: Prediction, draw: Draw, ctx: Context) -> Tensor:
        """What the direction acts on, [B, *latent], with the graph of `prediction`: x0 for DMD."""

    def renoise(self, draw: Draw, ctx: Context) -> tuple[Renoised, ...]:
        """Noisy versions of the student's answers, at which teacher and fake score are compared."""

    def fake_loss(self, draw: Draw, fake: Denoiser, ctx: Context) -> Term:
        """The loss of the fake score, and of learners of its own, on the student's answers; [B], with a graph."""

    def direction(self, draw: Draw, teacher: GuidedDenoiser, fake: Denoiser, ctx: Context) -> Direction:
        """Where the anchor shall move from, as `teacher` and `fake` tell: [B, *latent], without a graph."""


def matching_needs(matching: object) -> Needs:
    """What a matching requires of the run: what it says, or nothing."""
    found: Needs = getattr(matching, "needs", Needs(reward=False, finished=False))
    return found


class SampleWeight(Protocol):
    """A dataclass whose fields are its flags: a weight of each sample's direction in stage 1, [B] float32, at least 0.

    It may read the direction. Mean one over the global batch, or over time where the batch is too small to compare.
    Optional: `needs`, as of an objective; `idle`, true where all weights would be 1: the run then does without it. It
    may also be `Stateful`.
    """

    def __call__(self, draw: Draw, direction: Direction, ctx: Context) -> Tensor: ...


@runtime_checkable
class RewardObjective(Protocol):
    """The one thing an RL plugin writes: a dataclass whose fields are its flags.

    It may also be any of `SetsUp`, `SharesNoise`, `FollowsUpdates`, `Stateful`, `BringsPrompts` and `BringsLearners`.
    """

    @property
    def needs(self) -> Needs:
        """What it requires of the run; a function of its fields alone."""

    def __call__(self, draw: Draw, ctx: Context) -> Term | Iterable[Term]:
        """The loss of a micro-batch of whole groups.

        A generator of terms, whose sum is the loss, holds one graph at a time: each term's backward runs, and its graph
        is freed, before the next is asked for. A sample counts if it is valid in any of them.
        """


# --- What a plugin may do beside: each of these is optional ----------------------------------------------------------


@runtime_checkable
class Stateful(Protocol):
    """A part that remembers something from step to step."""

    def state_dict(self) -> Mapping[str, Any]:
        """For a checkpoint: tensors, numbers, text, and lists and dicts of them."""

    def load_state_dict(self, state: Any) -> None:
        """What `state_dict` returned; of an objective, after `setup`.

        Where processes share a student (--shard), a tensor like its parameters may come back whole, or shared:
        `dmdr.states.load_strict` copies it in any case.
        """


@runtime_checkable
class SetsUp(Protocol):
    """An objective that prepares itself."""

    def setup(self, ctx: Context) -> None:
        """Called once, before the first call."""


@runtime_checkable
class FollowsUpdates(Protocol):
    """An objective that does something after the updates of each step."""

    def after_update(self, ctx: Context) -> None:
        """Called once a step, after the last update of the student."""


@runtime_checkable
class SharesNoise(Protocol):
    """An objective whose images of a group share some of their noises."""

    def shared_noise(self, ctx: Context) -> Iterable[int]:
        """Called before a rollout: 0 is the initial state, i + 1 the fresh noise of step i.

        Several objectives share what all of them name.
        """


@runtime_checkable
class BringsPrompts(Protocol):
    """An objective that encodes prompts of its own beside the run's."""

    def prompts(self) -> Sequence[str]:
        """All of them, known from the start."""


@dataclass(frozen=True)
class OwnLearner:
    """Parameters that a matching or an objective trains itself, such as the heads of a discriminator.

    The run gives them the optimizer of --optim, clips and averages their gradients, steps, saves and resumes them as it
    does the two roles of its own.

    Attributes:
        name: Of the file in checkpoints; no other learner of the run may have it.
        parameters: By name, float32, on the device; they require gradients.
        learning_rate: Constant, above 0.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    learning_rate: float


@runtime_checkable
class BringsLearners(Protocol):
    """A matching or an objective that trains parameters of its own.

    A matching's are updated with the fake score, from the gradients of `fake_loss`. An objective's are updated after
    the student, from terms that name them in `Term.trains`; other terms do not reach them.
    """

    def learners(self, backend: Backend, device: torch.device) -> Sequence[OwnLearner]:
        """Called once, when the backend is prepared; the parameters are then what they are at the start."""


@runtime_checkable
class AddsRoles(Protocol):
    """A family whose network can take further trained roles, which an objective brings as learners (`BringsLearners`).

    They are for training alone: no export holds them.
    """

    def add_role(self, name: str, *, rank: int, alpha: float) -> Mapping[str, nn.Parameter]:
        """A LoRA that starts as the teacher, or the one of this name that is there already; called in `learners`.

        Returns: Its parameters by name, float32, which require gradients.
        """

    def ask_role(self, x_t: Tensor, t: Tensor, cond: Condition, *, role: str, guidance: float = 1.0) -> Prediction:
        """The prediction of an added role for x_t [B, *latent] at times t [B], float32, with a graph.

        `guidance` is as in `GuidedDenoiser`.
        """


@runtime_checkable
class ChecksPrompts(Protocol):
    """A family that cannot encode just any text."""

    def check_prompts(self, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        """Called before weights are loaded.

        Raises:
            ConfigError: If a prompt cannot be encoded.
        """


@runtime_checkable
class Shardable(Protocol):
    """A family whose network several processes can share (--shard).

    Its `prepare` takes `sharding`, a `torch.distributed.device_mesh.DeviceMesh`, beside `roles`. Adapters stay whole in
    each process. The parameters of a role that is a whole network may be `DTensor`s (`dmdr.states.is_shared`); their
    gradients are then averaged over all processes as they arrive.
    """

    def check_shardable(self) -> None:
        """Called before anything is loaded.

        Raises:
            ConfigError: If its options need the whole network in each process.
        """

    def gather(self) -> None:
        """Called in all processes before the main one exports: bring what they share of the student there."""


@runtime_checkable
class CachesPrompts(Protocol):
    """A family that stores embeddings, so that its text encoders need not share the memory with its network."""

    def cache_prompts(self, accelerator: Any, prompts: Sequence[str]) -> None:
        """Called once before `prepare`, with all prompts of a run, unless they are streamed."""


@runtime_checkable
class DrawsNoise(Protocol):
    """A family whose stock pipeline draws noise in its own way."""

    def draw_noise(self, step: int, count: int) -> Tensor:
        """Latents, [count, *latent] float32, as the stock pipeline draws them from torch's generator.

        Those of step 0 are its initial state; those of a later step are what its scheduler adds before it.
        """


@runtime_checkable
class ChecksSampler(Protocol):
    """A family whose stock scheduler takes the steps of some samplers only."""

    def check_sampler(self, sampler: Sampler) -> None:
        """Called before training with the sampler that the student is to be used with.

        Raises:
            ConfigError: If no stock scheduler takes its steps.
        """


@runtime_checkable
class TeacherGrid(Protocol):
    """A family whose own pipeline samples at other times than the student."""

    def teacher_grid(self, num_inference_steps: int) -> Tensor:
        """The teacher's times in image grids and evaluation, [K + 1] float64 from noise to exactly 0."""


@runtime_checkable
class StartsElsewhere(Protocol):
    """A family whose student may start from other weights than the teacher's."""

    def start_student(self) -> None:
        """Called once after `prepare`, in all processes, unless the student comes from a checkpoint or an export."""


@runtime_checkable
class GuidanceRule(Protocol):
    """A family whose guided answer is another than u + w (c - u), or costs less from other answers than c and u."""

    def other_guidance(self) -> float:
        """The guidance beside 1 at which the teacher answers in a single pass."""

    def guided(self, c: Prediction, other: Prediction, w: Tensor) -> Prediction:
        """The teacher's answer at guidance w [B], of those at guidance 1 and at `other_guidance()`."""


@runtime_checkable
class SeveralSizes(Protocol):
    """A family whose images may have several sizes in a run; each update of the student draws one.

    A draw's latents then have the shape of its update: what an objective builds for `latent_shape` fits the first size.

    Attributes:
        sizes: Width and height of images in pixels, at least one; those of image grids and evaluations come first.
        latent_shapes: Of each size, in the same order; `latent_shape` is the first.
    """

    sizes: Sequence[Size]
    latent_shapes: Sequence[tuple[int, ...]]


@runtime_checkable
class GivesFeatures(Protocol):
    """A family that shows what its denoising network computes inside, for discriminators.

    Attributes:
        feature_widths: Channels C of each layer that it can show, in the order of the computation.
    """

    feature_widths: Sequence[int]

    def features(
        self, role: FeatureRole, x_t: Tensor, t: Tensor, cond: Condition, layers: Sequence[int]
    ) -> list[Tensor]:
        """What layers answer on the way to a conditional prediction, each [B, N, C] float32: N places of the image.

        There is a graph into x_t and, of the fake score, into its parameters. Costs a pass through the network.

        Args:
            role: "teacher" (without the fake score's adapter) or "fake_score".
            x_t, t: States [B, *latent] at times t [B].
            cond: Their condition.
            layers: Indices into `feature_widths`, ascending.
        """


def grid_of_teacher(backend: Backend, num_inference_steps: int) -> Tensor:
    """The times [N + 1] at which the teacher is sampled, which `--shift` does not change where the family says so."""
    own = backend.teacher_grid if isinstance(backend, TeacherGrid) else backend.grid
    return own(num_inference_steps)


def sizes_of(backend: Backend) -> Sequence[Size]:
    """The image sizes of a run; none where the family does not say them."""
    return backend.sizes if isinstance(backend, SeveralSizes) else ()


@runtime_checkable
class Submits(Protocol):
    """A reward that waits for something else, such as a server."""

    def submit(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Future[Tensor]:
        """Like a call of the reward, without waiting: images [B, 3, H, W] in [0, 1] -> future scores [B] float32."""


OPTIONAL: Mapping[str, tuple[type, ...]] = {  # by group of plugins
    "objectives": (SetsUp, FollowsUpdates, SharesNoise, Stateful, BringsPrompts, BringsLearners),
    "rewards": (Submits, FeatureReward, LatentReward),
    "matchings": (Stateful, BringsLearners),
    "sample_weights": (Stateful,),
    "backends": (
        *(ChecksPrompts, CachesPrompts, ChecksSampler, DrawsNoise, TeacherGrid, GuidanceRule, SeveralSizes),
        *(GivesFeatures, StartsElsewhere, Shardable, AddsRoles),
    ),
    "models": (),
}


class Judge(Protocol):
    """A classifier for evaluation, trained on real images only; it is never a reward.

    Optional: `probabilities(images) -> [B, C]` of its classes, each row summing to 1, for the inception score.
    """

    def features(self, images: Tensor) -> Tensor:
        """[B, D] features of the Frechet distance."""

    def embed(self, images: Tensor) -> Tensor:
        """[B, M] space of the k-NN precision and recall."""

    def correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] float32, 1 where the image shows what its prompt asks for."""

    def reference(self) -> Tensor:
        """Real images, [N, 3, H, W] in [0, 1]."""


@runtime_checkable
class NamedModel(Protocol):
    """A model with a name of its own (`--model digits`): it builds or finds a pipeline folder, and has a recipe.

    Optional: a classmethod `at(address) -> type`, of one whose name is followed by a file (`--model sit-xl-2:PATH`);
    `real_images() -> Path`, a folder of real images with captions, as --real_images takes it, for runs that read some.

    Attributes:
        recipe: Defaults of settings and of the parts' flags, by name.
        pipeline: Class name of its pipeline, which says the family before the folder is built.
    """

    recipe: Mapping[str, Any]
    pipeline: str

    def folder(self) -> Path:
        """The pipeline folder, built on first use with a progress bar and cached."""

    def prompts(self) -> list[dict[str, Any]]:
        """Rows with a `prompt` and any further columns."""

    def reward_checkpoint(self, reward: str, *, held_out: bool = False) -> Path | None:
        """A checkpoint for this reward in its published layout, built on first use; None for the published one.

        `held_out` asks for one that was trained on other data, for --eval_reward.
        """

    def judge(self) -> Judge | None:
        """Who evaluates its images; None where there is nobody."""
