"""Every length, batch and schedule of a run, computed once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dmdr.errors import ConfigError
from dmdr.protocols import Backend, ChecksSampler, Role, SampleWeight
from dmdr.run.checkpoint import read_progress
from dmdr.sampling import FewStepSampler
from dmdr.settings.fields import Config
from dmdr.times import LogitNormal, Uniform
from dmdr.training.objectives import WeightedObjective, combined_needs
from dmdr.training.schedules import DynaDG, DynaRS, Schedule, Steady


@dataclass(frozen=True)
class Batch:
    """How many images an update is made of.

    Attributes:
        micro: Images of one pass through the networks, in one process.
        accumulated: Micro-batches of an update.
        processes: Processes that work side by side.
        group: Images per prompt.
    """

    micro: int
    accumulated: int
    processes: int
    group: int

    @property
    def whole(self) -> int:
        """Images of an update, of all processes."""
        return self.micro * self.accumulated * self.processes

    def __str__(self) -> str:
        factors = (
            (self.micro, "a pass"),
            (self.accumulated, "passes"),
            (self.processes, "processes"),
        )
        product = " x ".join(f"{number} {what}" for number, what in factors if number > 1 or what == "a pass")
        return f"{self.whole} images ({product}), {self.group} of each prompt"


@dataclass(frozen=True)
class Stage:
    """One of the two stages, complete.

    Attributes:
        number: 1 (RT-DM, DynaDG, DynaRS) or 2 (joint DMD and RL).
        steps: Student updates.
        first_step: Student updates of the run before it.
        learning_rate, fake_learning_rate: Of student and fake score.
        dmd_weight, rl_weight: Of the two losses.
        objectives: What the RL loss is made of.
        rl_balance: "grad_norm" where rl_weight is a ratio of gradients, "none" where it is the weight of a loss.
        sample_weight: Weight of each sample's direction (RT-DM), or None.
        fake_mix, renoise: DynaDG and the law of renoise times.
    """

    number: int
    steps: int
    first_step: int
    learning_rate: Schedule
    fake_learning_rate: Schedule
    dmd_weight: Schedule
    rl_weight: Schedule
    objectives: tuple[WeightedObjective, ...]
    rl_balance: str
    sample_weight: SampleWeight | None
    fake_mix: DynaDG
    renoise: DynaRS | Steady

    def __str__(self) -> str:
        parts = [f"{self.steps} update{'s' * (self.steps > 1)}", f"learning rate {self.learning_rate}"]
        if self.dmd_weight.value:
            parts.append(f"matching x {self.dmd_weight}")
        if self.objectives:
            terms = " + ".join(f"{term.weight:g} {term.name}" for term in self.objectives)
            unit = " of the matching's gradient norm" if self.rl_balance == "grad_norm" else ""
            parts.append(f"RL ({terms}) x {self.rl_weight}{unit}")
        if self.fake_mix.steps and self.fake_mix.start:
            parts.append(f"DynaDG for {self.fake_mix.steps}")
        return ", ".join(filter(None, [*parts, str(self.renoise)]))


@dataclass(frozen=True)
class Plan:
    """What a run does, before anything is loaded.

    Attributes:
        batch: Images of an update.
        shards: Processes that share one copy of the frozen network.
        num_inference_steps: Steps of the student.
        times: The student's time grid without its last time, 0, where the user gives it; None for the model's own.
        matches: Whether distributions are matched and the fake score is trained; without, the run is RL only.
        rounds: Updates of the fake score per student update.
        rollouts: Rollouts per student update.
        guidance: Range of the teacher's guidance.
        guidance_interval: The least and the greatest time at which the teacher is guided.
        roles: Roles of the backend that the run needs.
        stages: In order; those without updates are left out.
    """

    batch: Batch
    shards: int
    num_inference_steps: int
    times: tuple[float, ...] | None
    matches: bool
    rounds: int
    rollouts: int
    guidance: tuple[float, float]
    guidance_interval: tuple[float, float]
    roles: tuple[Role, ...]
    stages: tuple[Stage, ...]

    @classmethod
    def of(
        cls,
        config: Config,
        objectives: Sequence[WeightedObjective] = (),
        sample_weight: SampleWeight | None = None,
        processes: int = 1,
        fake_score: Literal["lora", "full"] | None = "lora",
    ) -> "Plan":
        """The plan of a run.

        Args:
            objectives: Of stage 2.
            sample_weight: Of stage 1.
            processes: Processes that work side by side.
            fake_score: What it is; a matching may do without.
        """
        compared: tuple[Role, ...] = ("student", "fake_score") if fake_score and config.dmd_weight else ("student",)
        times = config.sigmas or [timestep / 1000 for timestep in config.timesteps or ()]
        jitter = config.guidance_jitter if config.guidance_scale > 1 else 0.0
        rounds = config.fake_updates if config.dmd_weight else 1
        steps = len(times) or config.num_inference_steps
        rollouts = min(2, rounds) if steps > 1 else rounds  # a trajectory of one step has no others to share
        return cls(
            batch=Batch(
                config.per_device_train_batch_size,
                config.gradient_accumulation_steps,
                processes,
                config.num_generations,
            ),
            shards=_shards(config.shard, processes),
            num_inference_steps=steps,
            times=tuple(times) or None,
            matches=config.dmd_weight > 0,
            rounds=rounds,
            rollouts=rollouts if config.rollouts is None else config.rollouts,
            guidance=(config.guidance_scale - jitter, config.guidance_scale + jitter),
            guidance_interval=(config.guidance_interval[0], config.guidance_interval[1]),
            roles=(*compared, *combined_needs(objectives).roles),
            stages=_stages(config, tuple(objectives), sample_weight, fake_score),
        )

    @property
    def updates(self) -> int:
        """Student updates of the whole run."""
        return sum(stage.steps for stage in self.stages)

    @property
    def batches_read(self) -> int:
        """Global batches of prompts that the whole run reads."""
        return self.updates * self.rollouts

    def samplers(self, backend: Backend, config: Config) -> tuple[FewStepSampler, FewStepSampler]:
        """The student's sampler in training, and that of its users, on one grid.

        Raises:
            ConfigError: If the model's stock schedulers do not take the latter's steps.
        """
        if self.times is None:
            grid = backend.grid(self.num_inference_steps)
        else:
            grid = torch.tensor([*self.times, 0.0], dtype=torch.float64)
        renoising = config.sde_type == "cps" and config.eta >= 0.5  # the others keep the ODE's marginals
        sample_eta = renoising if config.sample_eta is None else config.sample_eta
        used = FewStepSampler.stock(backend.path, grid, float(sample_eta))
        if isinstance(backend, ChecksSampler):
            backend.check_sampler(used)
        elif 0 < used.eta < 1:
            raise ConfigError(f"--sample_eta {used.eta:g}: this model family supports 0 and 1 only")
        return FewStepSampler(backend.path, grid, config.eta, config.sde_type), used

    def check_resumable(self, checkpoint: Path) -> None:
        """Refuse lengths of the stages, or a batch, with which the checkpoint's step would be another.

        Raises:
            ConfigError: If its stage began at another step, or is over, or an update had other images.
        """
        progress = read_progress(checkpoint)
        stage = next((stage for stage in self.stages if stage.number == progress.stage), None)
        if stage is None or progress.total - progress.step != stage.first_step or progress.step > stage.steps:
            raise ConfigError(
                f"--resume_from_checkpoint {checkpoint} is at update {progress.step} of stage {progress.stage}, "
                f"after {progress.total - progress.step} of stage 1: --stage1_steps or --stage2_steps does not fit"
            )
        if progress.batch not in (None, self.batch.whole):
            raise ConfigError(
                f"--resume_from_checkpoint {checkpoint}: an update had {progress.batch} images, and would have "
                f"{self.batch.whole} now; change --per_device_train_batch_size or --gradient_accumulation_steps"
            )


def _shards(wanted: str, processes: int) -> int:
    """Processes that share one copy.

    Raises:
        ConfigError: If the processes cannot be split so.
    """
    node = os.environ.get("LOCAL_WORLD_SIZE") or processes  # as launchers say it
    count = int({"node": node, "all": processes}.get(wanted, wanted))
    if processes % count:
        raise ConfigError(
            f"--shard {wanted}: {processes} process{'es' * (processes > 1)} cannot be split into groups of {count}; "
            "a dry run takes their number from WORLD_SIZE"
        )
    return count


def _stages(
    config: Config,
    objectives: tuple[WeightedObjective, ...],
    sample_weight: SampleWeight | None,
    fake_score: Literal["lora", "full"] | None,
) -> tuple[Stage, ...]:
    """The stages that a run goes through, as of `Plan.of`; a given student needs no stage 1.

    DynaDG mixes an adapter of the fake score into the teacher. Without a fake score there is no DynaRS, either.
    """
    first = 0 if config.init_student else config.stage1_steps
    second = config.stage2_steps
    rate, fake_rate = config.learning_rate, config.fake_learning_rate
    dyna = min(config.stage1_steps if config.dyna_steps is None else config.dyna_steps, config.stage1_steps)
    dyna = dyna if fake_score else 0

    def student_rate(value: float, steps: int) -> Schedule:
        return Schedule(value, config.lr_scheduler_type, steps, config.warmup_steps)

    stages = (
        Stage(
            number=1,
            steps=first,
            first_step=0,
            learning_rate=student_rate(rate, first),
            fake_learning_rate=Schedule(fake_rate),
            dmd_weight=Schedule(config.dmd_weight),
            rl_weight=Schedule(0.0),
            objectives=(),
            rl_balance="none",
            sample_weight=sample_weight,
            fake_mix=DynaDG(config.dyna_guidance if fake_score == "lora" else 0.0, dyna),
            renoise=_renoise(config, dyna),
        ),
        Stage(
            number=2,
            steps=second,
            first_step=first,
            learning_rate=student_rate(config.stage2_learning_rate or rate / 2, second),
            fake_learning_rate=Schedule(config.stage2_fake_learning_rate or fake_rate),
            dmd_weight=Schedule(config.dmd_weight),
            rl_weight=Schedule(config.rl_weight, config.rl_weight_schedule, second, config.rl_warmup_steps),
            objectives=objectives if config.rl_weight else (),
            rl_balance=config.rl_balance,
            sample_weight=None,
            fake_mix=DynaDG(0.0, 0),
            renoise=_renoise(config, 0),
        ),
    )
    return tuple(stage for stage in stages if stage.steps)


def _renoise(config: Config, steps: int) -> DynaRS | Steady:
    """The law of renoise times; DynaRS anneals the first two in so many steps, the others stay the same."""
    if config.renoise_times == "uniform":
        return Steady(Uniform())
    if config.renoise_times == "logit_normal":
        return Steady(LogitNormal(config.logit_mean, config.logit_std))
    return DynaRS(config.dyna_renoise[0], config.dyna_renoise[1], steps, config.renoise_times == "shifted")
