"""The training step. Read `Trainer.train_step` first: it is the algorithm."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from dmdr.errors import TrainingError
from dmdr.groups import judged
from dmdr.prompts import PromptStream, split_columns
from dmdr.protocols import Backend, Matching, Needs, RewardObjective, SampleWeight
from dmdr.randomness import Random
from dmdr.rewards import RewardError, Rewards
from dmdr.sampling import FewStepSampler
from dmdr.training.learner import Learner
from dmdr.types import Direction, Draw, Rollout, Term, checked, terms_of

PATIENCE = 10  # batches in a row without a judged sample, before the run stops: a small one may have none by chance


@dataclass(frozen=True)
class WeightedObjective:
    """One summand of `--rl "grpo+0.1*refl"`."""

    name: str
    weight: float
    objective: RewardObjective

    def terms(self, draw: Draw, ctx: "Step") -> Iterator[Term]:
        """What the objective answers, one term at a time.

        Raises:
            TrainingError: If it is no answer; names the objective.
        """
        try:
            given = False
            for found in terms_of(self.objective(draw, ctx)):
                yield checked(found, len(draw))
                given = True
            if not given:
                raise TrainingError("it yielded no term; one with nothing valid says that there is nothing to learn")
        except RewardError:
            raise
        except TrainingError as error:
            raise TrainingError(f"objective '{self.name}': {error}") from error

    def declared(self, draw: Draw, last: int) -> Tensor:
        """Samples whose student step the objective acts on, [B] bool."""
        steps = self.objective.needs.steps
        if steps == "any":
            return torch.ones_like(draw.mask)
        if steps == "last":
            return draw.index == last
        if steps == "stochastic":
            return draw.index < last
        return torch.isin(draw.index, torch.tensor(steps, device=draw.index.device))


@dataclass
class Step:
    """The running step, as plugins see it (`protocols.Context`)."""

    backend: Backend
    sampler: FewStepSampler
    rewards: Rewards | None
    random: Random
    step: int
    renoise: tuple[float, float]
    guidance: tuple[float, float]
    fake_mix: float
    trainer: "Trainer"
    rollout: Rollout | None = None
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    _scores: dict[str, Tensor] | None = None
    _global: tuple[dict[str, Tensor], Tensor] | None = None

    def scores(self, rollout: Rollout) -> dict[str, Tensor]:
        """Raw rewards of the rollout's finished images, by name, each [B]; scored once, sliced afterwards."""
        if self.rewards is None or self.rollout is None:
            raise TrainingError("a reward was asked for, but the run has none; pass --reward")
        if self._scores is None:
            self._scores = self.trainer.score(self.rollout)
        rows = rollout.sample - self.rollout.sample[0]
        return {name: score[rows] for name, score in self._scores.items()}

    def global_scores(self) -> tuple[dict[str, Tensor], Tensor]:
        if self.rollout is None:
            raise TrainingError("there is no rollout yet that could be scored")
        if self._global is None:
            scores = {name: self.gather(score) for name, score in self.scores(self.rollout).items()}
            self._global = scores, self.gather(self.rollout.group)
        return self._global

    def gather(self, values: Tensor) -> Tensor:
        return self.trainer.accelerator.gather(values)

    def backward(self, loss: Tensor) -> None:
        self.trainer.scaler.scale(loss).backward()

    def log(self, metrics: Mapping[str, Tensor | float]) -> None:
        self.metrics.update(metrics)


class Answer(NamedTuple):
    """What an objective made of a micro-batch.

    Attributes:
        grad: At x0, scaled, [B, *latent].
        losses: Of the valid samples, the sum over its terms, [B] float32.
        valid: Samples that count in any of its terms, [B] bool.
        metrics: The mean over its terms, each [B] or a scalar.
        reached: Whether there was a gradient, here or in the student's parameters.
    """

    grad: Tensor
    losses: Tensor
    valid: Tensor
    metrics: Mapping[str, Tensor]
    reached: bool


@dataclass
class Trainer:
    """Joint distribution matching and reinforcement learning of a few-step student.

    Attributes:
        backend: Prepared model family.
        sampler: The student's sampler in training.
        prompts: Stream of prompt rows, this process's share.
        student, fake_score: The two learners.
        matching: How the distributions are compared.
        micro_batch_size: Samples per forward and backward pass.
        fake_updates: Fake-score updates per student update.
        dmd_weight: Weight of the matching loss; 0 switches matching and the fake score off (RL only).
        rl_weight: lambda of L = L_DMD + lambda L_RL.
        objectives: The RL half; empty in stage 1.
        sample_weight: Weight of each sample's direction (RT-DM), or None.
        fake_mix, renoise: DynaDG and DynaRS, functions of the step.
        guidance: Range of the teacher's guidance, drawn per sample.
        step: Steps so far in this stage; `first_step` those before it.
        silent: Batches in a row that no reward could judge.
    """

    backend: Backend
    sampler: FewStepSampler
    prompts: PromptStream
    student: Learner
    fake_score: Learner
    matching: Matching
    accelerator: Accelerator
    scaler: torch.amp.GradScaler
    seed: int
    micro_batch_size: int
    fake_updates: int
    fake_mix: Callable[[int], float]
    renoise: Callable[[int], tuple[float, float]]
    guidance: tuple[float, float] = (1.0, 1.0)
    dmd_weight: float = 1.0
    rl_weight: float = 0.0
    objectives: Sequence[WeightedObjective] = ()
    rewards: Rewards | None = None
    sample_weight: SampleWeight | None = None
    first_step: int = 0
    step: int = 0
    objective_states: Mapping[str, Any] = field(default_factory=dict)  # of a checkpoint, given back after `setup`
    silent: int = 0
    last_context: Step | None = None  # of the last step, for its log line
    _set_up: bool = field(default=False, init=False)

    @property
    def fake_updates_due(self) -> int:
        return self.fake_updates if self.dmd_weight else 0

    @property
    def active_objectives(self) -> Sequence[WeightedObjective]:
        return self.objectives if self.rl_weight else ()

    def train_step(self) -> dict[str, float]:
        """One student update: L = dmd_weight L_DMD + rl_weight L_RL (DMDR, arXiv 2511.13649, eq. 3)."""
        backend, matching = self.backend, self.matching

        rounds = max(self.fake_updates_due, 1)
        for k in range(rounds):  # 1. the fake score catches up with the student
            ctx = self.context(k)
            shared = self.shared_noise(ctx) if k + 1 == rounds else ()
            rollout = self.rollout(ctx, shared)  #    all steps, no gradient
            draw = self.pick(rollout, ctx)  #    one stored state of each trajectory, and the answer given there
            if self.fake_updates_due:
                self.learn_fake_score(draw, ctx)

        for iteration in range(self.updates_per_rollout):  # 2. where should the student's answer move?
            if iteration:
                draw = self.answer_again(draw, iteration)
            direction = self.direction(draw, ctx)  #    match the distribution ...
            draw = replace(draw, direction=direction)
            reward_grad = self.climb(draw, ctx)  #    ... and climb the reward; its graphs are freed here

            for part, g, r in self.parts(draw, direction, reward_grad):  # 3. the only student graph alive
                if not self.dmd_weight and not r.any():
                    continue  # the objective has reached the student's parameters itself
                prediction = backend.student(part.x_t, part.t, part.cond)
                matched = (matching.anchor(prediction, part, ctx) * g).sum() / direction.numel()
                ctx.backward(self.dmd_weight * matched + (prediction.x0 * r).sum())
            ctx.log({"grad_norm/student": self.student.update()})

        self.tell_objectives("after_update", ctx)
        self.step += 1
        for learner in (self.student, self.fake_score) if self.fake_updates_due else (self.student,):
            learner.scheduler.step()
        return self.logged(ctx)

    # --- The verbs of the step -------------------------------------------------------------------------------------

    def context(self, k: int) -> Step:
        """Fresh context of the k-th rollout of this step."""
        random = Random(self.seed, self.first_step + self.step, f"rollout/{k}")
        return Step(
            self.backend,
            self.sampler,
            self.rewards,
            random,
            self.step,
            self.renoise(self.step),
            self.guidance,
            self.fake_mix(self.step),
            trainer=self,
        )

    def shared_noise(self, ctx: Step) -> Sequence[int]:
        """The noises that every objective with an opinion wants the images of a group to share."""
        wanted = [
            set(t.objective.shared_noise(ctx)) for t in self.active_objectives if hasattr(t.objective, "shared_noise")
        ]
        return sorted(set.intersection(*wanted)) if wanted else ()

    def rollout(self, ctx: Step, shared: Sequence[int] = ()) -> Rollout:
        """Complete trajectories of the next prompts, made without gradient by the student as it is.

        Args:
            shared: Noises that the images of a group share (`RewardObjective.shared_noise`).
        """
        rows = next(self.prompts)
        prompts, columns = split_columns(rows)
        cond = self.backend.encode(prompts, **columns)
        sample = self.accelerator.process_index * len(rows) + torch.arange(len(rows), device=self.accelerator.device)
        group = sample // self.prompts.group_size
        shape = (self.sampler.num_inference_steps, *self.backend.latent_shape)
        log_prob = combined_needs(self.active_objectives).log_prob
        chunks = []
        for start in range(0, len(rows), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            noise = ctx.random.normal("noise", sample[part], shape)
            if shared:
                noise[:, shared] = ctx.random.normal("noise/group", group[part], shape)[:, shared]
            chunks.append(
                self.sampler.rollout(
                    self.backend.student,
                    noise.transpose(0, 1),
                    cond[part],
                    sample=sample[part],
                    group=group[part],
                    log_prob=log_prob,
                )
            )
        ctx.rollout = Rollout(
            cond=cond,
            t=self.sampler.t,
            x_t=torch.cat([chunk.x_t for chunk in chunks], 1),
            x0=torch.cat([chunk.x0 for chunk in chunks], 1),
            sample=sample,
            group=group,
            log_prob=torch.cat([chunk.log_prob for chunk in chunks], 1) if log_prob else None,  # type: ignore[misc]
        )
        return ctx.rollout

    def pick(self, rollout: Rollout, ctx: Step) -> Draw:
        """A uniformly drawn student step for each sample."""
        return rollout.pick(ctx.random.integers("index", rollout.sample, self.sampler.num_inference_steps))

    def learn_fake_score(self, draw: Draw, ctx: Step) -> None:
        """One update of the fake score on the student's answers."""
        total, metrics = 0.0, []
        for part in draw.split(self.micro_batch_size):
            term = self.matching.fake_loss(part, self.backend.fake_score, ctx)
            loss = term.loss.sum() / len(draw)
            ctx.backward(loss)
            total += loss.item()
            metrics.append({name: torch.as_tensor(value).detach().float() for name, value in term.metrics.items()})
        everyone = ctx.gather(torch.ones_like(draw.mask))
        means = over_the_batch(metrics, everyone, ctx, "the matching's fake_loss")
        ctx.log({f"fake/{name}": value for name, value in means.items()})
        ctx.log({"loss/fake": total, "grad_norm/fake_score": self.fake_score.update()})

    @torch.no_grad()
    def answer_again(self, draw: Draw, iteration: int) -> Draw:
        """The same states, answered by the student as it is now."""
        answers = [self.backend.student(p.x_t, p.t, p.cond).x0 for p in draw.split(self.micro_batch_size)]
        return replace(draw, x0=torch.cat(answers), iteration=iteration)

    @torch.no_grad()
    def direction(self, draw: Draw, ctx: Step) -> Tensor:
        """The weighted direction of distribution matching at x0, [B, *latent] float32."""
        if not self.dmd_weight:
            return torch.zeros_like(draw.x0)
        found = [
            self.matching.direction(part, self.backend.teacher, self.backend.fake_score, ctx)
            for part in draw.split(self.micro_batch_size)
        ]
        names = found[0].parts
        direction = Direction(
            torch.cat([d.total for d in found]), {name: torch.cat([d.parts[name] for d in found]) for name in names}
        )
        # The value of 0.5 mean((x0 - sg(x0 - g))^2): a monitor; after normalisation it does not tell convergence.
        ctx.log({"loss/dmd": 0.5 * (direction.total**2).mean()})
        if self.sample_weight is None:
            return direction.total
        weight = self.sample_weight(draw, direction, ctx)
        return weight.view(-1, *[1] * (direction.total.ndim - 1)).to(direction.total.dtype) * direction.total

    def climb(self, draw: Draw, ctx: Step) -> Tensor:
        """Gradient of rl_weight L_RL at x0, [B, *latent]; what reaches the student itself is accumulated there."""
        if not self._set_up:
            self.tell_objectives("setup", ctx)
            for term in self.active_objectives:
                if term.name in self.objective_states:
                    term.objective.load_state_dict(self.objective_states[term.name])  # type: ignore[attr-defined]
            self._set_up = True
        total = torch.zeros_like(draw.x0)
        for term in self.active_objectives:
            mask = term.declared(draw, self.sampler.num_inference_steps - 1)
            total += self.gradient_of(term, replace(draw, mask=mask), ctx)
        return total

    def gradient_of(self, term: WeightedObjective, draw: Draw, ctx: Step) -> Tensor:
        """Gradient at x0 of the objective's mean over the declared and valid samples of the global batch.

        Raises:
            TrainingError: If its answer is none, reaches nothing, or reaches the fake score.
        """
        asked = ctx.gather(draw.mask).sum()
        scale = self.accelerator.num_processes * self.rl_weight * term.weight / asked.clamp_min(1)
        with self.own_gradient_apart(term.name) as rescale:
            answers = [self.ask(term, part, scale, ctx) for part in draw.split(self.micro_batch_size)]
            valid = ctx.gather(torch.cat([answer.valid for answer in answers]))
            counted = valid.sum()
            rescale(asked / counted.clamp_min(1))
        if asked and not counted:
            ctx.scores(draw.rollout)  # raises for a reward that goes on judging nothing, and names it
        losses = ctx.gather(torch.cat([answer.losses for answer in answers]))
        reached = ctx.gather(draw.mask.new_tensor([any(answer.reached for answer in answers)]))
        if losses.any() and not reached.any():  # a part of the batch may have nothing to learn
            raise TrainingError(f"objective '{term.name}' trains nothing: its loss has no graph; is there a detach?")
        metrics = over_the_batch([answer.metrics for answer in answers], valid, ctx, f"objective '{term.name}'")
        ctx.log(
            {
                f"loss/{term.name}": losses.sum() / counted.clamp_min(1),
                f"{term.name}/coverage": counted / len(valid),
                f"{term.name}/invalid": asked - counted,
                f"{term.name}/weight": self.rl_weight * term.weight,
                **{f"{term.name}/{name}": value for name, value in metrics.items()},
            }
        )
        return torch.cat([answer.grad for answer in answers]) * (asked / counted.clamp_min(1))

    def ask(self, term: WeightedObjective, part: Draw, scale: Tensor, ctx: Step) -> Answer:
        """Objective and backward on a micro-batch."""
        leaf = part.x0.detach().requires_grad_()
        grad, counted = torch.zeros_like(leaf), torch.zeros_like(part.mask)
        losses, reached = torch.zeros(len(part), device=leaf.device), False
        metrics: dict[str, list[Tensor]] = {}
        for found in term.terms(replace(part, leaf=leaf), ctx):
            valid = part.mask if found.valid is None else part.mask & found.valid
            loss = torch.where(valid, found.loss, 0.0)
            taken = None
            if found.grad is not None:
                taken = scale * found.grad
            elif loss.requires_grad:
                ctx.backward(scale * loss.sum())
                taken = None if leaf.grad is None else leaf.grad / self.scaler.get_scale()
            leaf.grad = None
            reached |= taken is not None or loss.requires_grad
            if taken is not None:
                grad += torch.where(valid.view(-1, *[1] * (leaf.ndim - 1)), taken, 0.0)
            losses, counted = losses + loss.detach().float(), counted | valid  # one dtype for all processes
            for name, value in found.metrics.items():
                metrics.setdefault(name, []).append(torch.as_tensor(value).detach().float())
        return Answer(grad, losses, counted, {n: torch.stack(values).mean(0) for n, values in metrics.items()}, reached)

    @contextmanager
    def own_gradient_apart(self, name: str) -> Iterator[Callable[[Tensor], None]]:
        """Keep what the student's parameters get inside apart from what they had, so that it alone can be rescaled.

        A term's denominator, its valid samples, is known only after its passes.

        Raises:
            TrainingError: If the objective of this name reaches the fake score, which is not its to train.
        """
        parameters = list(self.student.parameters.values())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None

        def rescale(factor: Tensor) -> None:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

        yield rescale
        if any(parameter.grad is not None for parameter in self.fake_score.parameters.values()):
            raise TrainingError(f"objective '{name}' reaches the fake score's parameters: detach what it answers")
        for parameter, other in zip(parameters, before, strict=True):
            if other is not None:
                parameter.grad = other if parameter.grad is None else parameter.grad + other

    def tell_objectives(self, event: str, ctx: Step) -> None:
        """Call an optional method of each objective that has it: `setup` or `after_update`."""
        for term in self.active_objectives:
            if hasattr(term.objective, event):
                getattr(term.objective, event)(ctx)

    def states_of_objectives(self) -> Mapping[str, Any]:
        """For a checkpoint; what the last one held as long as no objective has been set up since."""
        if not self._set_up:
            return self.objective_states
        return {t.name: t.objective.state_dict() for t in self.objectives if hasattr(t.objective, "state_dict")}

    def parts(self, draw: Draw, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Micro-batches of a draw and of tensors that go with it."""
        return zip(draw.split(self.micro_batch_size), *(t.split(self.micro_batch_size) for t in tensors), strict=True)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> dict[str, Tensor]:
        """Raw rewards of the finished images, by name, each [B] float32."""
        assert self.rewards is not None
        scores: dict[str, list[Tensor]] = {name: [] for name in self.rewards.parts}
        failure: RewardError | None = None
        try:
            for start in range(0, len(rollout.cond), self.micro_batch_size):
                part = slice(start, start + self.micro_batch_size)
                images, cond = self.backend.decode(rollout.final[part]), rollout.cond[part]
                for name, score in self.rewards.each(images, cond.prompts, **cond.columns).items():
                    scores[name].append(score)
        except RewardError as error:
            failure = error
        failed = torch.tensor([failure is not None], device=rollout.final.device)
        if self.accelerator.gather(failed).any():  # all processes stop, and the main one saves
            raise failure or RewardError("a reward failed in another process")
        found = {name: torch.cat(score) for name, score in scores.items()}
        everyone = {name: self.accelerator.gather(score) for name, score in found.items()}
        self.silent = 0 if judged(everyone).any() else self.silent + 1
        if self.silent >= PATIENCE:
            self.rewards.require_finite(everyone)
        return found

    # --- What the run asks of it -----------------------------------------------------------------------------------

    @property
    def updates_per_rollout(self) -> int:
        return combined_needs(self.active_objectives).updates_per_rollout

    def logged(self, ctx: Step) -> dict[str, float]:
        """This step's log line: plain numbers, averaged over the processes."""
        values = {key: float(value) for key, value in ctx.metrics.items()}
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(torch.tensor(list(values.values())).to(self.accelerator.device), "mean")
            values = dict(zip(values, mean.tolist(), strict=True))
        self.last_context = ctx
        return values | {
            "learning_rate/student": float(self.student.scheduler.get_last_lr()[0]),
            "dyna/fake_mix": ctx.fake_mix,
        }

    def reward_metrics(self) -> dict[str, float]:
        """Mean rewards of the last step's finished images: raw by name, weighted by name, and their total."""
        ctx = self.last_context
        if self.rewards is None or ctx is None or ctx.rollout is None:
            return {}
        scores, _ = ctx.global_scores()
        means = {name: score.nanmean().item() for name, score in scores.items()}
        line = {f"reward/{name}": mean for name, mean in means.items()}
        line |= {f"reward_weighted/{name}": self.rewards.parts[name][0] * mean for name, mean in means.items()}
        return line | {"reward/total": self.rewards.total(scores).nanmean().item()}


def over_the_batch(parts: Sequence[Mapping[str, Tensor]], valid: Tensor, ctx: Step, who: str) -> dict[str, Tensor]:
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
            raise TrainingError(f"{who}: the metric '{name}' is missing in a micro-batch: give it in each")
    means: dict[str, Tensor] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if not values[0].ndim:
            means[name] = torch.stack(values).mean()
        elif valid.any():
            means[name] = ctx.gather(torch.cat(values))[valid].mean()
    return means


def combined_needs(objectives: Sequence[WeightedObjective]) -> Needs:
    """What a sum of objectives asks of the loop."""
    needs = [term.objective.needs for term in objectives]
    return Needs(
        log_prob=any(n.log_prob for n in needs),
        roles=tuple(dict.fromkeys(role for n in needs for role in n.roles)),
        updates_per_rollout=max((n.updates_per_rollout for n in needs), default=1),
    )
