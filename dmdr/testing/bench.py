"""A toy run in which one RL objective is tried: it gives the objective what it declares, and no more."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import TrainingError
from dmdr.protocols import Needs, Reward, RewardObjective, SetsUp
from dmdr.testing.common import CannotRun, trained_a_little
from dmdr.testing.toy import toy_trainer
from dmdr.training.context import StepContext
from dmdr.training.objectives import WeightedObjective
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Term, checked, terms_of

Build = Callable[[], RewardObjective]


@dataclass
class Bench:
    """A fresh objective before its first call, in a run that gives it what it declares, and no more.

    Attributes:
        objective: Set up, if it sets itself up.
        trainer: The toy run.
        ctx: The running step.
        draw: What the trainer would hand to the objective, of the whole batch.
    """

    objective: RewardObjective
    trainer: Trainer
    ctx: StepContext
    draw: Draw

    @property
    def needs(self) -> Needs:
        """What the objective declares."""
        return self.objective.needs

    def terms(self, draw: Draw) -> Iterator[Term]:
        """Its answer for a micro-batch, a term at a time."""
        given = False
        for term in terms_of(self.objective(draw, self.ctx)):
            yield sound(term, draw)
            given = True
        if not given:
            raise CannotRun("the objective yielded no term; return a Term, or yield one or several")

    def ask(self, draw: Draw) -> list[Term]:
        """Its answer for a micro-batch; a generator's graphs stay alive."""
        return list(self.terms(draw))

    def ask_and_learn(self) -> tuple[list[Term], bool]:
        """Its answer for the whole batch, each term's backward done, and whether a gradient arrived at the leaf."""
        leaf = self.draw.x0.detach().requires_grad_()
        answers, climbed = [], False
        for term in self.terms(replace(self.draw, leaf=leaf)):
            if leaf.grad is not None and term.grad is None:
                raise CannotRun(
                    "the objective ran backward into draw.leaf itself, where the trainer does not look for it: return "
                    "a loss with its graph, or the gradient in Term.grad"
                )
            answers.append(term)
            if term.grad is None and term.loss.requires_grad:
                torch.where(valid_of(term, self.draw), term.loss, 0.0).sum().backward()
            climbed |= leaf.grad is not None or term.grad is not None
            leaf.grad = None
        return answers, climbed

    def reaches_the_student(self) -> bool:
        """Whether its answer has a gradient for the student, at draw.leaf or in the parameters."""
        _, climbed = self.ask_and_learn()
        return climbed or any(p.grad is not None for p in self.trainer.backend.parameters("student").values())


def trainer_of(
    objective: RewardObjective,
    reward: Reward | None,
    *,
    least: bool = False,
    on_declared: bool = False,
    **settings: Any,
) -> Trainer:
    """A toy run with this objective, and a reward only if it declares one.

    Args:
        least: Batches of no more images than the objective declares, instead of several groups of several.
        on_declared: Each sample is at a student step that the objective acts on.
    """
    needs = objective.needs
    images = max(needs.batch_size, needs.group_size if least else 4 * max(needs.group_size, 4))
    batch_size = math.ceil(images / needs.group_size) * needs.group_size
    steps = [4, needs.stochastic_steps + 1, *(step + 1 for step in needs.steps if isinstance(step, int))]
    settings["num_inference_steps"] = max(steps)
    if "ca" in needs.parts:
        settings["guidance"] = (2.0, 3.0)
    term = WeightedObjective("checked", 1.0, objective)
    trainer = toy_trainer(term, reward=reward, batch_size=batch_size, **settings)
    if not needs.reward:
        trainer.scorer = None
    if not needs.real_images:
        trainer.real_images = None
    if on_declared:
        trainer.rollouts.drawn = partial(drawn_declared, trainer)  # type: ignore[method-assign]
    return trained_a_little(trainer)


def bench_of(build: Build, reward: Reward | None, *, needs: Needs | None = None, **settings: Any) -> Bench:
    """A bench; `needs` stand in for those that the objective declares."""
    objective: Any = build() if needs is None else declaring(needs, build())
    trainer = trainer_of(objective, reward, **settings)
    ctx = trainer.context(0)
    bench = Bench(objective, trainer, ctx, drawn(trainer, ctx))
    if isinstance(objective, SetsUp):
        objective.setup(ctx)
    return bench


def drawn(trainer: Trainer, ctx: StepContext) -> Draw:
    """What the trainer would hand to the objective."""
    (term,) = trainer.objectives.terms
    (draw,) = trainer.rollouts(
        [ctx],
        finish=term.objective.needs.finished,
        shared=trainer.objectives.shared_noise(ctx),
        log_prob=term.objective.needs.log_prob,
    )
    if term.objective.needs.matching:
        draw = replace(draw, direction=trainer.direction(draw, ctx))
    return replace(draw, mask=term.acts_on(draw.index, trainer.sampler.num_inference_steps - 1))


def declaring(needs: Needs, objective: RewardObjective) -> RewardObjective:
    """The objective with other needs than its own.

    Of a subclass, and not wrapped: from Python 3.12 on, isinstance of a protocol looks past `__getattr__`.
    """
    cls = type(objective)
    declares = {"needs": property(lambda self: needs), "__slots__": ()}
    object.__setattr__(objective, "__class__", type(cls.__name__, (cls,), declares))  # it may be frozen
    return objective


def sound(term: Term, draw: Draw) -> Term:
    """The term, if a trainer can read it.

    Raises:
        CannotRun: If a shape or a dtype is not what `Term` says.
    """
    try:
        return checked(term, len(draw))
    except TrainingError as error:
        raise CannotRun(str(error)) from error


def valid_of(term: Term, draw: Draw) -> Tensor:
    """The samples that count, [B] bool."""
    return draw.mask if term.valid is None else draw.mask & term.valid


def drawn_declared(trainer: Trainer, ctx: StepContext) -> Tensor:
    """The steps that the objective acts on in turn, so that it acts on every sample; [B] int64."""
    rollouts = trainer.rollouts
    (term,), own = trainer.objectives.terms, rollouts.mine
    count, index = trainer.sampler.num_inference_steps, torch.arange(own.stop - own.start)
    steps = [step for step in range(count) if term.acts_on(torch.tensor([step]), count - 1).any()]
    assert steps, f"needs.steps {term.objective.needs.steps} names none of the {count} student steps"
    return torch.tensor(steps)[index % len(steps)]


UNCOUNTED = (
    "; a sample that does not count, by draw.mask or Term.valid, may be the cause, since 0 * NaN is NaN: replace its "
    "values (torch.where) before the division or the logarithm"
)


def train(trainer: Trainer, situation: str, advice: str = UNCOUNTED) -> None:
    """A whole training step, in which the objective's share is looked at before the update.

    Raises:
        AssertionError: If its loss or its gradient is not finite.
    """
    gradient_of = trainer.objectives.gradient_of

    def watched(term: WeightedObjective, draw: Draw, ctx: StepContext, balance: Any = None) -> Tensor:
        grad = gradient_of(term, draw, ctx, balance)
        own = [p.grad for p in trainer.student.parameters.values() if p.grad is not None]
        shares = {
            "loss": torch.as_tensor(ctx.metrics[f"loss/{term.name}"]),
            "gradient at draw.leaf": grad,
            "gradient in the student's parameters": torch.cat([g.flatten() for g in own]) if own else torch.zeros(()),
        }
        bad = [name for name, value in shares.items() if not value.isfinite().all()]
        assert not bad, (
            f"{situation}, the objective gives numbers that are not finite: its {' and its '.join(bad)}{advice}"
        )
        return grad

    trainer.objectives.gradient_of = watched  # type: ignore[method-assign]
    try:
        trainer.train_step()
    except TrainingError as error:
        raise AssertionError(f"{situation}, the training stopped: {error}") from error
    finally:
        trainer.objectives.gradient_of = gradient_of  # type: ignore[method-assign]
