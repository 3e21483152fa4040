"""The training step. Read `Trainer.train_step` first: it is the algorithm."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dmdr.errors import TrainingError
from dmdr.prompts import PromptStream
from dmdr.protocols import Backend, BringsLearners, Context, Denoiser, Matching, Needs, SampleWeight
from dmdr.sampling import FewStepSampler
from dmdr.times import TimeLaw
from dmdr.training.bad_steps import BadSteps
from dmdr.training.balance import Balance
from dmdr.training.context import RealImages, StepContext, over_the_batch, rollout_random
from dmdr.training.learner import Learner, update_together
from dmdr.training.objectives import Objectives
from dmdr.training.phases import phase
from dmdr.training.rollouts import Rollouts
from dmdr.training.scorer import RolloutScorer
from dmdr.types import Direction, Draw, Term, checked


@dataclass
class Trainer:
    """Joint distribution matching and reinforcement learning of a few-step student.

    Attributes:
        backend: Prepared model family.
        rollouts: The student's trajectories, of its sampler and the stream of prompts.
        student: The learner that all of this is about.
        fake_learners: The fake score, if there is one, and what the matching trains itself.
        matching: How the distributions are compared.
        objectives: The RL half of the loss.
        micro_batch_size: Samples per forward and backward pass.
        matches: Whether distributions are matched and the fake score is trained; without, a run is RL only.
        rounds: Updates of the fake score per student update, the last of them after it.
        dmd_weight: Weight of the matching loss, a function of the step.
        balances: Whether RL is scaled so that rl_weight is the ratio of its gradient's norm to matching's.
        fake_mix, renoise: DynaDG and the law of renoise times, functions of the step.
        guidance: Range of the teacher's guidance, drawn per sample.
        guidance_interval: The least and the greatest time at which the teacher is guided.
        scorer: The run's rewards, or None.
        sample_weight: Weight of each sample's direction (RT-DM), or None.
        real_images: What `ctx.real` gives, or None.
        bad: Counts the steps whose updates are skipped, since a loss or a gradient is not finite.
        step: Steps so far in this stage; `first_step` those before it.
        last_context: Of the last step, for its log line.
    """

    backend: Backend
    rollouts: Rollouts
    student: Learner
    fake_learners: Sequence[Learner]
    matching: Matching
    objectives: Objectives
    accelerator: Accelerator
    scaler: torch.amp.GradScaler
    seed: int
    micro_batch_size: int
    matches: bool
    rounds: int
    dmd_weight: Callable[[int], float]
    fake_mix: Callable[[int], float]
    renoise: Callable[[int], TimeLaw]
    balances: bool = False
    guidance: tuple[float, float] = (1.0, 1.0)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    scorer: RolloutScorer | None = None
    sample_weight: SampleWeight | None = None
    real_images: RealImages | None = None
    bad: BadSteps = field(default_factory=lambda: BadSteps(0))
    first_step: int = 0
    step: int = 0
    last_context: StepContext | None = None

    @property
    def sampler(self) -> FewStepSampler:
        """The student's, in training."""
        return self.rollouts.sampler

    @property
    def prompts(self) -> PromptStream:
        """Prompt rows, this process's share."""
        return self.rollouts.prompts

    @property
    def bad_steps(self) -> int:
        """How many steps in a row have just had an update skipped, since a loss or a gradient was not finite."""
        return self.bad.in_a_row

    @property
    def learners(self) -> Mapping[str, Learner]:
        """All that is trained, by name."""
        return {each.name: each for each in (self.student, *self.fake_learners, *self.objectives.own_learners)}

    @property
    def brought(self) -> list[Learner]:
        """What the matching trains itself."""
        return [each for each in self.fake_learners if each.owner]

    @property
    def trained(self) -> list[Learner]:
        """Of these, all but the fake score where nothing is matched."""
        return [each for each in self.learners.values() if self.matches or each not in self.fake_learners]

    @phase("student")
    def train_step(self, *, noted: bool = False) -> dict[str, float]:
        """One student update: L = dmd_weight L_DMD + rl_weight L_RL (DMDR, arXiv 2511.13649, eq. 3).

        Args:
            noted: The step gets a line in the log, for which images are finished (`reward_metrics`) and RL is compared
                with matching; that takes memory for one more gradient of each objective, and a pass through the
                student for those that act at x0.
        """
        backend, matching, objectives = self.backend, self.matching, self.objectives

        *earlier, (ctx, draw) = self.draws(noted)  # 1. the student answers, without gradient
        for before, answered in earlier:  #    and the fake score catches up with it
            self.learn_fake_score(answered, before)

        for iteration in range(objectives.needs.updates_per_rollout):  # 2. where should the student's answer move?
            if iteration:
                draw = self.answer_again(draw, ctx)
            draw = replace(draw, direction=self.direction(draw, ctx))  #    match the distribution ...
            balance = self.balance(noted, ctx)
            reward_grad = objectives.gradient(draw, ctx, balance)  #    ... and climb the reward; its graphs are freed

            for part, r in self.micro_batches(draw, reward_grad):  # 3. the only student graph alive
                if not self.matches and not ctx.gather(r.any()[None]).any():
                    continue  # the objectives of all processes have reached the student's parameters themselves
                prediction = backend.student(part.x_t, part.t, part.cond)
                matched = (matching.anchor(prediction, part, ctx) * part.direction.total).sum() / reward_grad.numel()
                ctx.backward(self.dmd_weight(self.step) * matched + (prediction.x0 * r).sum())
            if balance:
                self.settle(balance, draw, ctx)
            self.update([self.student, *objectives.own_learners], ctx)

        if self.matches:  # 4. the fake score learns the last rollout, too
            self.learn_fake_score(draw, ctx)
        objectives.after_update(ctx)
        self.step += 1
        for learner in self.trained:
            learner.scheduler.step()
        return self.logged(ctx)

    # --- The verbs of the step -------------------------------------------------------------------------------------

    def context(self, k: int) -> StepContext:
        """Fresh context of the k-th rollout of this step."""
        return StepContext(
            self.backend,
            self.sampler,
            self.scorer,
            self.matching,
            rollout_random(self.seed, self.first_step + self.step, k),
            self.step,
            self.renoise(self.step),
            self.guidance,
            self.guidance_interval,
            self.fake_mix(self.step),
            self.accelerator,
            self.scaler,
            self.real_images,
        )

    def draws(self, noted: bool) -> list[tuple[StepContext, Draw]]:
        """What each update of the fake score learns, the last one after the student, each with its context."""
        contexts = [self.context(k) for k in range(self.rounds)]
        needs, last = self.objectives.needs, contexts[-1]
        finish, shared = noted or needs.finished or self.weighs_finished, self.objectives.shared_noise(last)
        draws = self.rollouts(contexts, finish=finish, shared=shared, log_prob=needs.log_prob)
        return list(zip(contexts, draws, strict=True))

    @property
    def weighs_finished(self) -> bool:
        """Whether the weight of a sample depends on its finished image."""
        return self.sample_weight is not None and getattr(self.sample_weight, "needs", Needs()).finished

    @phase("fake")
    def learn_fake_score(self, draw: Draw, ctx: StepContext) -> None:
        """One update of the fake score, and of what the matching trains beside it, on the student's answers."""
        metrics = []
        total = torch.zeros((), dtype=torch.float64, device=draw.x0.device)
        for part in draw.split(self.micro_batch_size):
            term = fake_loss_of(self.matching, part, self.backend.fake_score, ctx)
            loss = term.loss.sum() / len(draw)
            ctx.backward(loss)
            total += loss.detach().double()
            metrics.append({name: torch.as_tensor(value).detach().float() for name, value in term.metrics.items()})
        everyone = ctx.gather(torch.ones_like(draw.mask))
        means = over_the_batch(metrics, everyone, ctx, "the matching's fake_loss")
        ctx.log({f"fake/{name}": value for name, value in means.items()})
        ctx.log({"loss/fake": total})
        for learner in self.brought:
            if not ctx.gather(draw.mask.new_tensor([learner.reached])).any():
                raise TrainingError(f"{learner.owner}: its learner '{learner.name}' got no gradient from fake_loss")
        self.update(self.fake_learners, ctx)

    @torch.no_grad()
    def answer_again(self, draw: Draw, ctx: StepContext) -> Draw:
        """The same states, answered by the student as it is now: the next use of the rollout."""
        ctx.iteration += 1
        answers = [self.backend.student(p.x_t, p.t, p.cond).x0 for p in draw.split(self.rollouts.batch_size)]
        return replace(draw, x0=torch.cat(answers), iteration=ctx.iteration)

    @phase("direction")
    @torch.no_grad()
    def direction(self, draw: Draw, ctx: StepContext) -> Direction:
        """The weighted direction of distribution matching at the matching's anchor, [B, *latent] float32."""
        if not self.matches:
            return Direction(torch.zeros_like(draw.x0))
        # What learns beside the fake score may be asked for a gradient, which takes the memory of one.
        size = self.micro_batch_size if isinstance(self.matching, BringsLearners) else self.rollouts.batch_size
        found = [
            self.matching.direction(part, self.backend.teacher, self.backend.fake_score, ctx)
            for part in draw.split(size)
        ]
        names = found[0].parts
        direction = Direction(
            torch.cat([d.total for d in found]), {name: torch.cat([d.parts[name] for d in found]) for name in names}
        )
        # The value of 0.5 mean((x0 - sg(x0 - g))^2): a monitor; after normalisation it does not tell convergence.
        ctx.log({"loss/dmd": 0.5 * (direction.total**2).mean()})
        if self.sample_weight is not None:
            direction = direction.weighted(self.sample_weight(draw, direction, ctx))
        return direction.only(self.objectives.needs.parts)  # each takes memory

    def balance(self, noted: bool, ctx: StepContext) -> Balance | None:
        """What compares RL with matching in this step, where both are there."""
        if not self.objectives.terms or not self.dmd_weight(ctx.step) or not (noted or self.balances):
            return None
        return Balance(self.student, {term.name: term.weight for term in self.objectives.terms})

    def settle(self, balance: Balance, draw: Draw, ctx: StepContext) -> None:
        """Log the ratios of the RL objectives' gradients to matching's, and bring them to rl_weight."""

        def backward(at_x0: Tensor) -> None:
            for part, r in self.micro_batches(draw, at_x0):
                ctx.backward((self.backend.student(part.x_t, part.t, part.cond).x0 * r).sum())

        balance.carry(backward)
        ratios = balance.settle(self.objectives.weight(ctx.step) if self.balances else None)
        ctx.log({f"rl_ratio/{name}": ratio for name, ratio in ratios.items()})

    def update(self, learners: Sequence[Learner], ctx: StepContext) -> None:
        """Update learners that had their backward passes together, but for those whose loss or gradient is not finite.

        Raises:
            TrainingError: If that happens in too many steps in a row.
        """
        losses = [self.losses_of(learner, ctx) for learner in learners]
        updates = update_together(learners, [own.values() for own in losses])
        ctx.log({f"grad_norm/{learner.name}": update.norm for learner, update in zip(learners, updates, strict=True)})
        for learner, update, own in zip(learners, updates, losses, strict=True):
            if update.skipped:
                self.bad.note(learner, update, own, ctx, self.first_step + self.step + 1)

    def losses_of(self, learner: Learner, ctx: StepContext) -> dict[str, Tensor]:
        """What has been logged of the losses that train it, by name."""
        own, device = self.objectives.own_losses, self.accelerator.device
        names = [name for name in ctx.metrics if name.startswith("loss/") and own.get(name, self.student) is learner]
        if learner in self.fake_learners:
            names = ["loss/fake"]
        return {name: torch.as_tensor(ctx.metrics[name]).to(device, non_blocking=True) for name in names}

    def micro_batches(self, draw: Draw, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Micro-batches of a draw and of tensors that go with it."""
        return zip(draw.split(self.micro_batch_size), *(t.split(self.micro_batch_size) for t in tensors), strict=True)

    # --- What the run asks of it -----------------------------------------------------------------------------------

    def logged(self, ctx: StepContext) -> dict[str, float]:
        """This step's log line: plain numbers, averaged over the processes."""
        device = self.accelerator.device
        processes = self.accelerator.num_processes  # times which a mean over them is the sum
        ctx.log({f"unscored/{name}": processes * count for name, count in ctx.unscored.items()})
        found = [torch.as_tensor(value, dtype=torch.float64) for value in ctx.metrics.values()]
        line = torch.stack([value.detach().reshape(()).to(device, non_blocking=True) for value in found])
        if self.accelerator.num_processes > 1:
            with phase("communication"):
                line = self.accelerator.reduce(line, "mean")
        values = dict(zip(ctx.metrics, line.tolist(), strict=True)) | self.bad.close(ctx, self.first_step + self.step)
        self.last_context = ctx
        if self.scorer:
            self.scorer.warn(values, self.first_step + self.step)
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
        rates = {f"learning_rate/{each.name}": float(each.scheduler.get_last_lr()[0]) for each in self.trained}
        return values | rates | {"dyna/fake_mix": ctx.fake_mix}

    def reward_metrics(self) -> dict[str, float]:
        """Mean rewards of the last step's finished images: raw by name, weighted by name, and their total.

        Images are scored now if nothing has asked for it in the step; all processes must call this together.
        """
        ctx = self.last_context
        if self.scorer is None or ctx is None or ctx.rollout is None:
            return {}
        means = self.scorer.means(ctx.all_scores())
        missing = {f"unscored/{name}": counts.sum() for name, counts in ctx.unscored_everywhere().items()}
        line = {name: value.item() for name, value in {**means, **missing}.items()}
        self.scorer.warn(line, self.first_step + self.step)
        return line


def fake_loss_of(matching: Matching, part: Draw, fake: Denoiser, ctx: Context) -> Term:
    """A matching's loss of the fake score on a micro-batch.

    Raises:
        TrainingError: If it is not one loss per sample, or says what only an objective can.
    """
    term = matching.fake_loss(part, fake, ctx)
    if not isinstance(term, Term):
        raise TrainingError(f"the matching's fake_loss must return a Term, not {type(term).__name__}")
    try:
        checked(term, len(part))
    except TrainingError as error:
        raise TrainingError(f"the matching's fake_loss: {error}") from error
    for name in ("valid", "grad", "trains"):
        if getattr(term, name) is not None:
            raise TrainingError(f"the matching's fake_loss: Term.{name} is for objectives; leave it out")
    return term
