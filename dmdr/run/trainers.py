"""The trainer of each stage: learners with their optimizers, the prompt stream, and the parts of the job."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dmdr.ema import EMA
from dmdr.prompts import PromptStream
from dmdr.protocols import OwnLearner, matching_needs
from dmdr.run.job import Job
from dmdr.run.learners import described, own_learners
from dmdr.run.plan import Stage
from dmdr.run.real_images import RealLatents
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.training.bad_steps import BadSteps
from dmdr.training.learner import Learner
from dmdr.training.objectives import Objectives
from dmdr.training.rollouts import Rollouts
from dmdr.training.schedules import Schedule
from dmdr.training.scorer import RolloutScorer
from dmdr.training.trainer import Trainer

AT_ONCE = 2  # micro-batches in a pass without gradient, which still takes less memory than one with it


@dataclass
class Trainers:
    """Builds trainers for a job whose backend and rewards are prepared.

    Attributes:
        accelerator: `accelerate.Accelerator`, or what a dry run has in its place.
        scaler: Loss scaler of the whole run.
    """

    job: Job
    accelerator: Any
    scaler: torch.amp.GradScaler

    def of(self, stage: Stage, step: int = 0) -> Trainer:
        """The trainer of a stage, `step` updates into it, with new optimizers."""
        job, config, plan, accelerator = self.job, self.job.config, self.job.plan, self.accelerator
        roles = {role: job.backend.parameters(role) for role in plan.roles}
        student = self.learner("student", roles["student"], stage.learning_rate, step, decay=config.weight_decay)
        if config.ema_decay:
            student.ema = EMA(student.parameters, config.ema_decay)
        own = {owner: self._own(owner, learners, step) for owner, learners in self.own_learners.items()}
        fake_learners = own.pop("", [])
        if "fake_score" in roles:
            fake_learners.insert(0, self.learner("fake_score", roles["fake_score"], stage.fake_learning_rate, step))
        active = {term.name: own[term.name] for term in stage.objectives if term.name in own}
        micro = plan.batch.micro
        return Trainer(
            backend=job.backend,
            rollouts=self.rollouts(),
            student=student,
            fake_learners=fake_learners,
            matching=job.matching,
            objectives=Objectives(stage.objectives, stage.rl_weight, student, fake_learners, micro, active),
            accelerator=accelerator,
            scaler=self.scaler,
            seed=config.seed,
            micro_batch_size=micro,
            matches=plan.matches,
            rounds=plan.rounds,
            dmd_weight=stage.dmd_weight,
            balances=stage.rl_balance == "grad_norm",
            fake_mix=stage.fake_mix,
            renoise=stage.renoise,
            guidance=plan.guidance,
            guidance_interval=plan.guidance_interval,
            scorer=self.scorer,
            sample_weight=stage.sample_weight,
            real_images=self.real_images,
            bad=BadSteps(config.max_bad_steps),
            first_step=stage.first_step,
            step=step,
        )

    def rollouts(self) -> Rollouts:
        """From the first prompts on."""
        job, plan = self.job, self.job.plan
        finished = matching_needs(job.matching).finished
        passes = AT_ONCE * plan.batch.micro
        return Rollouts(
            job.backend, job.sampler, self.prompts(), self.accelerator, plan.rollouts, passes, finished, plan.shards
        )

    def prompts(self) -> PromptStream:
        """The prompts of the run, this process's share, from the start."""
        return PromptStream(
            self.job.prompts,
            self.job.plan.batch.whole,
            group_size=self.job.plan.batch.group,
            seed=self.job.config.seed,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )

    @cached_property
    def scorer(self) -> RolloutScorer | None:
        """Of the whole run, since it counts batches in a row that no reward could score."""
        job = self.job
        return RolloutScorer(job.rewards, job.backend, self.accelerator, job.plan.batch.micro) if job.rewards else None

    @cached_property
    def real_images(self) -> RealLatents | None:
        """Of the whole run, since it keeps latents."""
        job = self.job
        return RealLatents(job.real_images, job.backend, self.accelerator.device) if job.real_images else None

    @cached_property
    def own_learners(self) -> dict[str, list[OwnLearner]]:
        """What matching and objectives train themselves; asked for once."""
        return own_learners(self.job, self.job.backend, self.accelerator.device)

    def _own(self, owner: str, learners: Iterable[OwnLearner], step: int) -> list[Learner]:
        return [
            self.learner(each.name, each.parameters, Schedule(each.learning_rate), step, owner=described(owner))
            for each in learners
        ]

    def learner(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        rate: Schedule,
        step: int,
        *,
        decay: float = 0.0,
        owner: str = "",
    ) -> Learner:
        """Parameters with the optimizer of --optim and a schedule, `step` updates into the stage."""
        config = self.job.config
        options = OPTIMIZERS[config.optim].options(config, rate=rate.value, decay=decay)
        optimizer = self.optimizer(parameters.values(), **options)
        for group in optimizer.param_groups:
            group["initial_lr"] = rate.value
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, replace(rate, value=1.0), last_epoch=step - 1)
        clip = config.max_grad_norm
        return Learner(name, parameters, optimizer, scheduler, self.accelerator, self.scaler, clip, owner=owner)

    def optimizer(self, parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        """The optimizer that --optim names; as one kernel where it has that."""
        chosen, given = OPTIMIZERS[self.job.config.optim], list(parameters)
        if chosen.fused:
            options["fused"] = all(parameter.device.type in ("cpu", "cuda") for parameter in given)
        return chosen.build(given, **options)
