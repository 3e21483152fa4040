"""The RL half of the loss: objectives, added up by weight, each a mean over the samples that it acts on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmdr.errors import TrainingError, not_exiting, one_line
from dmdr.protocols import FollowsUpdates, Needs, RewardObjective, SetsUp, SharesNoise, Stateful
from dmdr.rewards import RewardError
from dmdr.training.balance import Balance
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
                raise TrainingError(
                    "it yielded no Term; if nothing can be learned, yield one Term without valid samples"
                )
        except RewardError:
            raise
        except TrainingError as error:
            raise TrainingError(f"objective '{self.name}': {error}") from error
        except (SystemExit, StopIteration) as error:  # GeneratorExit is ours: nobody asks for the rest
            raise TrainingError(f"objective '{self.name}' failed: {one_line(error)}") from error

    def event(self) -> AbstractContextManager[None]:
        """Around every other call of the objective."""
        return not_exiting(f"objective '{self.name}'")

    def acts_on(self, index: Tensor, last: int) -> Tensor:
        """Whether the objective acts on student steps, [B] bool, of their indices [B]."""
        steps = self.objective.needs.steps
        if steps == "any":
            return torch.ones_like(index, dtype=torch.bool)
        if steps == "last":
            return index == last
        if steps == "stochastic":
            return index < last
        return torch.isin(index, torch.tensor(steps, device=index.device))


def combined_needs(objectives: Sequence[WeightedObjective]) -> Needs:
    """What a sum of objectives asks of the loop."""
    needs = [term.objective.needs for term in objectives]
    return Needs(
        log_prob=any(n.log_prob for n in needs),
        roles=tuple(dict.fromkeys(role for n in needs for role in n.roles)),
        updates_per_rollout=max((n.updates_per_rollout for n in needs), default=1),
        matching=any(n.matching for n in needs),
        parts=tuple(dict.fromkeys(part for n in needs for part in n.parts)),
        finished=any(n.finished for n in needs),
    )


@dataclass
class Share:
    """What the terms for the student, or for one of the objective's own learners, made of a micro-batch.

    Attributes:
        losses: Of the valid samples, the sum over the terms, [B] float32.
        valid: Samples that count in any of the terms, [B] bool.
        metrics: Of each term, by name, each [B] or a scalar.
    """

    losses: Tensor
    valid: Tensor
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, term: Term, loss: Tensor, valid: Tensor) -> None:
        """Count a term in."""
        self.losses, self.valid = self.losses + loss.detach().float(), self.valid | valid  # one dtype everywhere
        for name, value in term.metrics.items():
            self.metrics.setdefault(name, []).append(torch.as_tensor(value).detach().float())

    @property
    def means(self) -> dict[str, Tensor]:
        """The metrics' means over the terms."""
        return {name: torch.stack(values).mean(0) for name, values in self.metrics.items()}


class Answer(NamedTuple):
    """What an objective made of a micro-batch.

    Attributes:
        grad: At x0, [B, *latent].
        shares: By the learner that the terms train; "" is the student.
        reached: Whether there was a gradient, here or in the student's parameters.
        at_x0: Whether there was one at x0.
    """

    grad: Tensor
    shares: Mapping[str, Share]
    reached: bool
    at_x0: bool


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
        wanted = []
        for term in self.terms:
            if isinstance(term.objective, SharesNoise):
                with term.event():
                    wanted.append(set(term.objective.shared_noise(ctx)))
        return sorted(set.intersection(*wanted)) if wanted else ()

    def gradient(self, draw: Draw, ctx: StepContext, balance: Balance | None = None) -> Tensor:
        """Gradient of weight L_RL at x0, [B, *latent]; what reaches the student itself is accumulated there.

        Args:
            balance: Takes down the gradient of each objective.
        """
        self.set_up(ctx)
        total = torch.zeros_like(draw.x0)
        for term in self.terms:
            mask = term.acts_on(draw.index, ctx.sampler.num_inference_steps - 1)
            total += self.gradient_of(term, replace(draw, mask=mask), ctx, balance)
        return total

    def gradient_of(
        self, term: WeightedObjective, draw: Draw, ctx: StepContext, balance: Balance | None = None
    ) -> Tensor:
        """Gradient at x0 of one objective's mean over the declared and valid samples of the global batch.

        Raises:
            TrainingError: If its answer is none, reaches nothing, or reaches a learner that is not its to train.
        """
        weight = self.weight(ctx.step) * term.weight
        asked = ctx.gather(draw.mask).sum()
        scale = ctx.accelerator.num_processes * weight / asked.clamp_min(1)
        learners = {"": self.student} | {learner.name: learner for learner in self._own_of(term)}
        with ExitStack() as stack:
            stack.enter_context(self._others_untouched(term.name))
            rescale = {name: stack.enter_context(learner.apart()) for name, learner in learners.items()}
            answers = [self.ask(term, part, scale, ctx) for part in draw.split(self.micro_batch_size)]
            valid = {name: ctx.gather(torch.cat([a.shares[name].valid for a in answers])) for name in learners}
            counted = {name: found.sum() for name, found in valid.items()}
            for name in learners:  # the denominators are known only now
                rescale[name](asked / counted[name].clamp_min(1))
            for learner in self._own_of(term):
                self._check_reached(term, learner, asked, ctx)
            if balance:
                balance.note(term.name)
        if term.objective.needs.reward and (asked > 0) & (counted[""] == 0):
            ctx.check_scores(draw)
        flags = [any(answer.reached for answer in answers), any(answer.at_x0 for answer in answers)]
        reached, at_x0 = ctx.gather(draw.mask.new_tensor([flags])).any(0)
        self._log(term, answers, valid, counted, reached, ctx)
        ctx.log({f"{term.name}/invalid": asked - counted[""], f"{term.name}/weight": weight})
        grad = torch.cat([answer.grad for answer in answers]) * (asked / counted[""].clamp_min(1))
        if balance and at_x0:
            balance.at_x0[term.name] = grad
        return grad

    def _log(
        self,
        term: WeightedObjective,
        answers: Sequence[Answer],
        valid: Mapping[str, Tensor],
        counted: Mapping[str, Tensor],
        reached: Tensor,
        ctx: StepContext,
    ) -> None:
        """Losses and metrics, by the learner that they train.

        Args:
            answers: Of this process's micro-batches.
            valid, counted: The samples that count, of all processes, by learner; and how many.
            reached: Whether a gradient has come in any process.

        Raises:
            TrainingError: If the student's loss has no graph.
        """
        for name in valid:
            who = f"{term.name}/{name}" if name else term.name
            shares = [answer.shares[name] for answer in answers]
            losses = ctx.gather(torch.cat([share.losses for share in shares]))
            if not name and losses.any() & ~reached:  # a part of the batch may have nothing to learn
                what = f"objective '{term.name}' trains nothing: its loss has no graph"
                raise TrainingError(f"{what}; is there a detach?")
            means = over_the_batch([share.means for share in shares], valid[name], ctx, f"objective '{who}'")
            ctx.log({f"loss/{who}": losses.sum() / counted[name].clamp_min(1)})
            ctx.log({f"{who}/{metric}": value for metric, value in means.items()})
        ctx.log({f"{term.name}/coverage": counted[""] / len(valid[""])})

    def ask(self, term: WeightedObjective, part: Draw, scale: Tensor, ctx: StepContext) -> Answer:
        """Objective and backward on a micro-batch; `scale` turns a sum over samples into the weighted mean."""
        leaf = part.x0.detach().requires_grad_()
        grad, reached, at_x0 = torch.zeros_like(leaf), False, False
        mean = scale / (self.weight(ctx.step) * term.weight)  # of a loss of one's own learner, which has no weight
        names = ("", *(learner.name for learner in self._own_of(term)))
        zeros = torch.zeros(len(part), device=leaf.device)
        shares = {name: Share(zeros, torch.zeros_like(part.mask)) for name in names}
        for found in term.terms(replace(part, leaf=leaf), ctx):
            valid = part.mask if found.valid is None else part.mask & found.valid
            loss = torch.where(valid, found.loss, 0.0)
            if found.trains is not None:
                self._train_own(term, found.trains, mean * loss.sum(), leaf, ctx)
                shares[found.trains].add(found, loss, valid)
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
                at_x0 = True
                grad += torch.where(valid.view(-1, *[1] * (leaf.ndim - 1)), taken, 0.0)
            shares[""].add(found, loss, valid)
        return Answer(grad, shares, reached, at_x0)

    def _check_reached(self, term: WeightedObjective, learner: Learner, asked: Tensor, ctx: StepContext) -> None:
        """Refuse a learner of the objective that no process has a gradient for; before anything is updated.

        Raises:
            TrainingError: In all processes.
        """
        reached = ctx.gather(asked.new_tensor([int(learner.reached)]))
        if asked and not reached.any():
            what = f"objective '{term.name}': its learner '{learner.name}' got no gradient"
            raise TrainingError(f"{what}; is there a detach, or is its loss missing?")

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
            return  # that no gradient came is found at the learner's update
        with self.student.apart():
            ctx.backward(loss)
            reached = leaf.grad is not None or self.student.reached
        leaf.grad = None
        if reached:
            what = f"objective '{term.name}': the loss of its learner '{name}' reaches the student"
            raise TrainingError(f"{what}: detach the inputs of this loss")

    @contextmanager
    def _others_untouched(self, name: str) -> Iterator[None]:
        yield
        for learner in self.others:
            if learner.reached:
                what = learner.name.replace("_", " ")
                raise TrainingError(f"objective '{name}' reaches the {what}'s parameters: detach its output")

    # --- Events and states -------------------------------------------------------------------------------------------

    def set_up(self, ctx: StepContext) -> None:
        """Before the first call: set up, and take the checkpoint's states."""
        if self._set_up:
            return
        for term in self.terms:
            if isinstance(term.objective, SetsUp):
                with term.event():
                    term.objective.setup(ctx)
        for term in self.terms:
            if isinstance(term.objective, Stateful) and term.name in self.states:
                with term.event():
                    term.objective.load_state_dict(self.states[term.name])
        self._set_up = True

    @property
    def own_learners(self) -> list[Learner]:
        """All that objectives have brought."""
        return [learner for learners in self.own.values() for learner in learners]

    @property
    def own_losses(self) -> dict[str, Learner]:
        """What each of them is trained by: names in the log."""
        return {f"loss/{term}/{learner.name}": learner for term, own in self.own.items() for learner in own}

    def after_update(self, ctx: StepContext) -> None:
        """The updates of a step are done."""
        for term in self.terms:
            if isinstance(term.objective, FollowsUpdates):
                with term.event():
                    term.objective.after_update(ctx)

    def state_dict(self) -> Mapping[str, Any]:
        """For a checkpoint; what the last one held as long as no objective has been set up since."""
        if not self._set_up:
            return self.states
        return {term.name: term.objective.state_dict() for term in self.terms if isinstance(term.objective, Stateful)}
