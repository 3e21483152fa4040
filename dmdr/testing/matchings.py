"""What a matching promises."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import TrainingError
from dmdr.paths import add_noise
from dmdr.protocols import BringsLearners, Matching, matching_needs
from dmdr.states import load_strict
from dmdr.testing.common import (
    LATE,
    CannotRun,
    answers_in_bfloat16,
    brings_back_its_state,
    numbers_are_new,
    only_read,
    same,
    spelt,
    taken_by_a_run,
    trained_a_little,
    untouched_global_rng,
)
from dmdr.testing.toy import toy_trainer
from dmdr.training.context import StepContext
from dmdr.training.trainer import Trainer, fake_loss_of
from dmdr.types import Direction, Draw, Renoised, Term

Build = Callable[[], Matching]


def check_matching(build: Build) -> None:
    """Check a matching.

    Args:
        build: Makes a fresh matching; called several times.

    Raises:
        AssertionError: With the broken promise. What the matching itself raises is passed on.
    """
    taken_by_a_run("matchings", build())
    for check in MATCHING_CHECKS:
        check(build)


@dataclass
class MatchingBench:
    """A matching in a toy run, and what it answers there.

    Attributes:
        matching: The one that is tried.
        trainer: The run; student and fake score have left the teacher.
        ctx: The running step.
        draw: What the trainer would hand to the matching, of the whole batch.
    """

    matching: Matching
    trainer: Trainer
    ctx: StepContext
    draw: Draw

    def anchor(self, draw: Draw) -> Tensor:
        """What the direction acts on in a micro-batch, [B, *latent], with its graph."""
        prediction = self.trainer.backend.student(draw.x_t, draw.t, draw.cond)
        return _fitting("anchor", self.matching.anchor(prediction, draw, self.ctx), draw.x0.shape)

    def renoised(self, draw: Draw) -> tuple[Renoised, ...]:
        """The noisy versions of a micro-batch."""
        found = self.matching.renoise(draw, self.ctx)
        if not isinstance(found, tuple) or not found or not all(isinstance(each, Renoised) for each in found):
            raise CannotRun(f"renoise returns a tuple of one or more Renoised, not {found!r:.100}")
        for each in found:
            for name in ("x_t", "x0", "eps"):
                _fitting(f"renoise(...).{name}", getattr(each, name), draw.x0.shape)
            for name in ("t", "weight"):
                _fitting(f"renoise(...).{name}", getattr(each, name), draw.t.shape)
        return found

    def fake_loss(self, draw: Draw) -> Term:
        """The loss of the fake score, and of learners of the matching's own, on a micro-batch."""
        fake_score = self.trainer.backend.fake_score
        try:
            return fake_loss_of(self.matching, draw, fake_score, self.ctx)
        except TrainingError as error:
            raise CannotRun(str(error)) from error

    def direction(self, draw: Draw) -> Direction:
        """Where a micro-batch shall move from."""
        backend = self.trainer.backend
        found = self.matching.direction(draw, backend.teacher, backend.fake_score, self.ctx)
        if not isinstance(found, Direction):
            raise CannotRun(f"direction returns a Direction, not {type(found).__name__}")
        _fitting("direction(...).total", found.total, draw.x0.shape, torch.float32)
        for name, part in found.parts.items():
            _fitting(f"direction(...).parts['{name}']", part, draw.x0.shape)
        return found

    def answers(self, draw: Draw) -> dict[str, Tensor]:
        """All that it answers for a micro-batch, by name, each [B, ...] and without a graph."""
        found = {"fake_loss": self.fake_loss(draw).loss, "anchor": self.anchor(draw)}
        with torch.no_grad():  # as the trainer asks for it
            direction = self.direction(draw)
        found |= {"direction": direction.total}
        found |= {f"direction(...).parts['{name}']": part for name, part in direction.parts.items()}
        for i, renoised in enumerate(self.renoised(draw)):
            found |= {f"renoise(...)[{i}].{name}": value for name, value in vars(renoised).items()}
        return {name: value.detach() for name, value in found.items()}

    def reached(self) -> list[str]:
        """Names of what has got a gradient since this was last asked; all are cleared."""
        owned = {role: self.trainer.backend.parameters(role) for role in ("student", "fake_score")}
        owned |= {learner.name: learner.parameters for learner in self.trainer.brought}
        found = [name for name, own in owned.items() if any(p.grad is not None for p in own.values())]
        for own in owned.values():
            for parameter in own.values():
                parameter.grad = None
        return found


def _fitting(name: str, found: Any, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor, if it is of this shape and, where none is named, of any floating dtype."""
    fits = isinstance(found, Tensor) and found.shape == shape and found.is_floating_point()
    if not fits or dtype not in (None, found.dtype):
        what = f"{list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise CannotRun(f"{name} must be {list(shape)} {dtype or 'of floating dtype'}, not {what}")
    return found


def matching_bench(build: Build, *, guidance: tuple[float, float] = (2.0, 4.0), **settings: Any) -> MatchingBench:
    """A fresh matching before its first call; `settings` are those of `toy_trainer`."""
    matching = build()
    needs = matching_needs(matching)
    settings["group_size"] = needs.group_size
    trainer = trained_a_little(toy_trainer(matching=matching, guidance=guidance, **settings))
    if not needs.real_images:
        trainer.real_images = None
    ctx = trainer.context(0)
    return MatchingBench(matching, trainer, ctx, trainer.rollouts([ctx], finish=False)[0])


def _benches(build: Build) -> Iterator[tuple[str, MatchingBench]]:
    """With and without guidance, with several student steps and one, and late in a run."""
    yield "", matching_bench(build)
    yield " without guidance", matching_bench(build, guidance=(1.0, 1.0))
    yield " of a student with one step", matching_bench(build, num_inference_steps=1)
    late = matching_bench(build)
    late.ctx.step = LATE
    yield f" at step {LATE}", late


def the_anchor_follows_the_student(build: Build) -> None:
    """`anchor` is finite, and its gradient reaches the student and nothing else."""
    for where, bench in _benches(build):
        anchor = bench.anchor(bench.draw)
        assert anchor.isfinite().all(), f"the anchor{where} must be finite"
        assert anchor.requires_grad, "the anchor has no graph: compute it from `prediction`, not from draw.x0"
        anchor.square().sum().backward()
        reached = bench.reached()
        assert reached == ["student"], f"the anchor must reach the student alone, not {' and '.join(reached) or 'none'}"


def renoised_states_are_made_of_their_pair(build: Build) -> None:
    """`renoise` gives x_t = alpha(t) x0 + sigma(t) eps at times above 0, finite, and weights that are not negative."""
    for where, bench in _benches(build):
        for each in bench.renoised(bench.draw):
            for name, value in vars(each).items():
                assert value.isfinite().all(), f"renoise(...).{name}{where} must be finite"
                assert not value.requires_grad, f"renoise(...).{name} has a graph; the student's answers are constants"
            assert bool((each.t > 0).all() and (each.t <= 1).all()), "renoise times are above 0, data, and at most 1"
            assert bool((each.weight >= 0).all()), "renoise weights must not be negative"
            made = add_noise(bench.trainer.backend.path, each.x0, each.eps, each.t)
            size = 1 + max(each.x0.abs().max().item(), each.eps.abs().max().item())
            assert torch.allclose(made, each.x_t, rtol=0, atol=1e-5 * size), (
                "Renoised.x_t is what x0 and eps make at t (dmdr.paths.add_noise): the fake score regresses on them"
            )


def the_fake_loss_trains_what_it_is_for(build: Build) -> None:
    """`fake_loss` is finite; its gradient reaches the fake score and the matching's own learners, and nothing else."""
    for where, bench in _benches(build):
        loss = bench.fake_loss(bench.draw).loss
        assert loss.isfinite().all(), f"the fake_loss{where} must be finite for every sample"
        assert loss.requires_grad, "the fake_loss has no graph: is there a no_grad or a detach on the way?"
        loss.sum().backward()
        reached, wanted = bench.reached(), [learner.name for learner in bench.trainer.fake_learners]
        assert "student" not in reached, "the fake_loss must not reach the student: its answers are in draw, detached"
        missed = [name for name in wanted if name not in reached]
        assert not missed, f"no gradient of the fake_loss arrives at the {' and the '.join(missed)}"


def the_direction_is_finite_and_the_sum_of_its_parts(build: Build) -> None:
    """`direction` has no graph, and its parts, if it names any, add up to the total."""
    for where, bench in _benches(build):
        found = bench.direction(bench.draw)
        for name, value in {"total": found.total, **found.parts}.items():
            assert value.isfinite().all(), f"the direction's {name}{where} must be finite"
            assert not value.requires_grad, f"the direction's {name} has a graph: decorate `direction` with no_grad"
        if found.parts:
            total, size = torch.stack([*found.parts.values()]).sum(0), 1 + found.total.abs().max().item()
            assert torch.allclose(total, found.total.to(total.dtype), rtol=0, atol=1e-5 * size), (
                f"the parts of a direction add up to its total; {' and '.join(found.parts)} do not"
            )


def what_it_is_given_is_only_read(build: Build) -> None:
    """The objectives read the same draw; parameters are the optimizer's."""
    bench = matching_bench(build)
    with only_read("matching", bench.draw, bench.ctx):
        bench.answers(bench.draw)


def random_numbers_are_keyed(build: Build) -> None:
    """Two matchings answer the same on the same draw, and nothing is drawn from a global generator."""
    instead = "draw from ctx.random, keyed by draw.sample"
    found = []
    for _ in range(2):
        bench = matching_bench(build)
        with untouched_global_rng("matching", instead):
            found.append(bench.answers(bench.draw))
    assert same(*found), (
        f"two calls on the same draw gave different answers; {instead}, and the initial values of learners from a seed "
        "of your own, within torch.random.fork_rng()"
    )


def numbers_are_new_in_each_use_of_a_rollout(build: Build) -> None:
    """The direction is asked for in each use; what is decided once for a rollout says so with `of_rollout`."""
    bench = matching_bench(build)

    def use(iteration: int) -> None:
        bench.ctx.iteration = iteration
        bench.direction(replace(bench.draw, iteration=iteration))

    numbers_are_new(use)


def a_sample_does_not_depend_on_its_micro_batch(build: Build) -> None:
    """Neither the company of other groups nor the order of the calls changes what is answered for one."""
    bench = matching_bench(build)
    together = bench.answers(bench.draw)
    for size in (len(bench.draw) // 2, matching_needs(bench.matching).group_size):
        for order in (slice(None), slice(None, None, -1)):
            bench = matching_bench(build, micro_batch_size=size)
            parts = list(bench.draw.split(size))
            found = {index: bench.answers(parts[index]) for index in range(len(parts))[order]}
            assert all(found[index].keys() == together.keys() for index in found), (
                "direction names the same parts in every micro-batch; the trainer puts them together by name"
            )
            for name, whole in together.items():
                apart = torch.cat([found[index][name] for index in range(len(parts))])
                assert torch.allclose(whole, apart, rtol=1e-4, atol=1e-5), (
                    f"{name} of a sample must not depend on which others share its micro-batch, nor on those before it"
                )


def bfloat16_predictions_are_enough(build: Build) -> None:
    """Networks in bfloat16 have coarse answers; those of the matching are finite all the same."""
    bench = matching_bench(build)
    answers_in_bfloat16(bench.trainer.backend)
    for name, value in bench.answers(bench.draw).items():
        assert value.isfinite().all(), f"with networks in bfloat16, {name} must still be finite"


def whole_training_steps_run(build: Build) -> None:
    """Two steps in micro-batches: student, fake score and the matching's own learners move."""
    bench = matching_bench(build, micro_batch_size=8)
    trainer = bench.trainer
    learners = [trainer.student, *trainer.fake_learners]
    before = [[p.detach().clone() for p in learner.parameters.values()] for learner in learners]
    try:
        for _ in range(2):
            trainer.train_step()
    except TrainingError as error:
        raise AssertionError(f"in a whole training step, the training stopped: {error}") from error
    for learner, values in zip(learners, before, strict=True):
        moved = not all(map(torch.equal, learner.parameters.values(), values))
        assert moved, f"two training steps left the {learner.name} as it was"


def state_survives_a_checkpoint(build: Build) -> None:
    """After some steps, what goes on from a checkpoint answers as what has gone on all the time."""
    bench = matching_bench(build)
    trainer, other = bench.trainer, build()
    for _ in range(2):
        trainer.train_step()
    if isinstance(other, BringsLearners):  # the run saves and loads their parameters
        brought = other.learners(trainer.backend, torch.device("cpu"))
        for own, learner in zip(brought, trainer.brought, strict=True):
            load_strict(own.parameters, learner.parameters, own.name)
    brings_back_its_state(bench.matching, other)
    answers = [replace(bench, matching=each).answers(bench.draw) for each in (bench.matching, other)]
    assert same(*answers), (
        "it keeps something that a checkpoint does not hold: after load_state_dict(state_dict()), a new one answers "
        "differently; put all that it keeps from step to step into state_dict()"
    )


def the_parts_that_it_names_are_there(build: Build) -> None:
    """Objectives read parts that the class names, and a run looks at the class before it trains."""
    for _, bench in _benches(build):
        missing = sorted({*getattr(bench.matching, "parts", ())} - {*bench.direction(bench.draw).parts})
        assert not missing, (
            f"its class has parts = {bench.matching.parts}, as each direction is to have, but this one has no "  # type: ignore[attr-defined]
            f"{' and no '.join(missing)}"
        )


def no_method_is_misspelt(build: Build) -> None:
    """A run calls optional methods by their names in `dmdr.protocols`, and never one whose name is nearly that."""
    spelt("matchings", build())


MATCHING_CHECKS: tuple[Callable[[Build], None], ...] = (
    the_anchor_follows_the_student,
    renoised_states_are_made_of_their_pair,
    the_fake_loss_trains_what_it_is_for,
    the_direction_is_finite_and_the_sum_of_its_parts,
    what_it_is_given_is_only_read,
    random_numbers_are_keyed,
    numbers_are_new_in_each_use_of_a_rollout,
    a_sample_does_not_depend_on_its_micro_batch,
    bfloat16_predictions_are_enough,
    whole_training_steps_run,
    state_survives_a_checkpoint,
    the_parts_that_it_names_are_there,
    no_method_is_misspelt,
)
