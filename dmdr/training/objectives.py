"""The RL half of the loss: objectives, added up by weight, each a mean over the samples that it acts on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmdr.errors import TrainingError
from dmdr.protocols import FollowsUpdates, Needs, RewardObjective, SetsUp, SharesNoise, Stateful
from dmdr.rewards import RewardError
from dmdr.training.context import StepContext, over_the_batch
from dmdr.training.learner import Learner
from dmdr.types import Draw, Term, checked, terms_of


@dataclass(frozen=True)
class WeightedObjective:
    """One summand of `--rl "grpo+0.1*refl"`."""

    name: str
    weight: float
    objective: RewardObjective

    def terms(self, draw: Draw, ctx: StepContext) -> Iterator[Term]:
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


def combined_needs(objectives: Sequence[WeightedObjective]) -> Needs:
    """What a sum of objectives asks of the loop."""
    needs = [term.objective.needs for term in objectives]
    return Needs(
        log_prob=any(n.log_prob for n in needs),
        roles=tuple(dict.fromkeys(role for n in needs for role in n.roles)),
        updates_per_rollout=max((n.updates_per_rollout for n in needs), default=1),
    )


class Answer(NamedTuple):
    """What an objective made of a micro-batch.

    Attributes:
        grad: At x0, [B, *latent].
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
class Objectives:
    """weight(step) * L_RL, with L_RL the weighted sum of the objectives.

    Attributes:
        terms: The objectives of the stage; none where it has no RL.
        weight: lambda of L = L_DMD + lambda L_RL, a function of the step.
        student: The learner that they train.
        others: The learners that they must not reach.
        micro_batch_size: Samples per forward and backward pass.
        own: Learners that objectives have brought, by objective.
        states: Of a checkpoint, by name, given back after `setup`.
    """

    terms: Sequence[WeightedObjective]
    weight: Callable[[int], float]
    student: Learner
    others: Sequence[Learner]
    micro_batch_size: int
    own: Mapping[str, Sequence[Learner]] = field(default_factory=dict)
    states: Mapping[str, Any] = field(default_factory=dict)
    _set_up: bool = field(default=False, init=False)

    @property
    def needs(self) -> Needs:
        """What they ask of the loop together."""
        return combined_needs(self.terms)

    def shared_noise(self, ctx: StepContext) -> Sequence[int]:
        """The noises that every objective with an opinion wants the images of a group to share."""
        parts = (term.objective for term in self.terms)
        wanted = [set(part.shared_noise(ctx)) for part in parts if isinstance(part, SharesNoise)]
        return sorted(set.intersection(*wanted)) if wanted else ()

    def gradient(self, draw: Draw, ctx: StepContext) -> Tensor:
        """Gradient of weight L_RL at x0, [B, *latent]; what reaches the student itself is accumulated there."""
        self._begin(ctx)
        total = torch.zeros_like(draw.x0)
        for term in self.terms:
            mask = term.declared(draw, ctx.sampler.num_inference_steps - 1)
            total += self.gradient_of(term, replace(draw, mask=mask), ctx)
        return total

    def gradient_of(self, term: WeightedObjective, draw: Draw, ctx: StepContext) -> Tensor:
        """Gradient at x0 of one objective's mean over the declared and valid samples of the global batch.

        Raises:
            TrainingError: If its answer is none, reaches nothing, or reaches a learner that is not its to train.
        """
        weight = self.weight(ctx.step) * term.weight
        asked = ctx.gather(draw.mask).sum()
        scale = ctx.accelerator.num_processes * weight / asked.clamp_min(1)
        with ExitStack() as stack:
            stack.enter_context(self._others_untouched(term.name))
            rescalers = [stack.enter_context(each.apart()) for each in (self.student, *self._own_of(term))]
            answers = [self.ask(term, part, scale, ctx) for part in draw.split(self.micro_batch_size)]
            valid = ctx.gather(torch.cat([answer.valid for answer in answers]))
            counted = valid.sum()
            for rescale in rescalers:
                rescale(asked / counted.clamp_min(1))  # the denominator is known only now
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
                f"{term.name}/weight": weight,
                **{f"{term.name}/{name}": value for name, value in metrics.items()},
            }
        )
        return torch.cat([answer.grad for answer in answers]) * (asked / counted.clamp_min(1))

    def ask(self, term: WeightedObjective, part: Draw, scale: Tensor, ctx: StepContext) -> Answer:
        """Objective and backward on a micro-batch."""
        leaf = part.x0.detach().requires_grad_()
        grad, counted = torch.zeros_like(leaf), torch.zeros_like(part.mask)
        losses, reached = torch.zeros(len(part), device=leaf.device), False
        metrics: dict[str, list[Tensor]] = {}
        unweighted = scale / (self.weight(ctx.step) * term.weight)
        for found in term.terms(replace(part, leaf=leaf), ctx):
            valid = part.mask if found.valid is None else part.mask & found.valid
            loss = torch.where(valid, found.loss, 0.0)
            if found.trains is not None:
                self._train_own(term, found.trains, unweighted * loss.sum(), leaf, ctx)
                counted = counted | valid
                metrics.setdefault(f"loss/{found.trains}", []).append(loss.detach().float())
                continue
            taken = None
            if found.grad is not None:
                taken = scale * found.grad
            elif loss.requires_grad:
                with ExitStack() as stack:
                    for learner in self._own_of(term):
                        stack.enter_context(learner.spared())
                    ctx.backward(scale * loss.sum())
                taken = None if leaf.grad is None else leaf.grad / ctx.scaler.get_scale()
            leaf.grad = None
            reached |= taken is not None or loss.requires_grad
            if taken is not None:
                grad += torch.where(valid.view(-1, *[1] * (leaf.ndim - 1)), taken, 0.0)
            losses, counted = losses + loss.detach().float(), counted | valid  # one dtype for all processes
            for name, value in found.metrics.items():
                metrics.setdefault(name, []).append(torch.as_tensor(value).detach().float())
        return Answer(grad, losses, counted, {n: torch.stack(values).mean(0) for n, values in metrics.items()}, reached)

    def _own_of(self, term: WeightedObjective) -> Sequence[Learner]:
        return self.own.get(term.name, ())

    def _train_own(self, term: WeightedObjective, name: str, loss: Tensor, leaf: Tensor, ctx: StepContext) -> None:
        """Backward of a loss that trains one of the objective's own learners, and nothing else.

        Raises:
            TrainingError: If there is no learner of this name, or the loss reaches the student.
        """
        names = [learner.name for learner in self._own_of(term)]
        if name not in names:
            known = ", ".join(names) or "none"
            raise TrainingError(f"objective '{term.name}': Term.trains names '{name}', but its learners are {known}")
        if not loss.requires_grad:
            return  # which its update will find
        with self.student.apart():
            ctx.backward(loss)
            reached = leaf.grad is not None or self.student.reached
        leaf.grad = None
        if reached:
            what = f"objective '{term.name}': the loss of its learner '{name}' reaches the student"
            raise TrainingError(f"{what}: detach what it is given")

    @contextmanager
    def _others_untouched(self, name: str) -> Iterator[None]:
        yield
        for learner in self.others:
            if learner.reached:
                what = learner.name.replace("_", " ")
                raise TrainingError(f"objective '{name}' reaches the {what}'s parameters: detach what it answers")

    # --- Events and states -------------------------------------------------------------------------------------------

    def _begin(self, ctx: StepContext) -> None:
        """Before the first call: set up, and take the checkpoint's states."""
        if self._set_up:
            return
        for term in self.terms:
            if isinstance(term.objective, SetsUp):
                term.objective.setup(ctx)
        for term in self.terms:
            if isinstance(term.objective, Stateful) and term.name in self.states:
                term.objective.load_state_dict(self.states[term.name])
        self._set_up = True

    def update_own(self, ctx: StepContext) -> None:
        """Update the objectives' own learners."""
        for learners in self.own.values():
            for learner in learners:
                ctx.log({f"grad_norm/{learner.name}": learner.update()})

    def after_update(self, ctx: StepContext) -> None:
        """The updates of a step are done."""
        for term in self.terms:
            if isinstance(term.objective, FollowsUpdates):
                term.objective.after_update(ctx)

    def state_dict(self) -> Mapping[str, Any]:
        """For a checkpoint; what the last one held as long as no objective has been set up since."""
        if not self._set_up:
            return self.states
        return {term.name: term.objective.state_dict() for term in self.terms if isinstance(term.objective, Stateful)}
