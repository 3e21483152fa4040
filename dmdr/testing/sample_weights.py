"""What a sample weight promises."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmdr.backends.toy import Redness
from dmdr.errors import TrainingError
from dmdr.protocols import Needs, Reward, SampleWeight, Stateful
from dmdr.testing.common import (
    CannotRun,
    Silent,
    brings_back_its_state,
    only_read,
    same,
    spelt,
    taken_by_a_run,
    trained_a_little,
    untouched_global_rng,
)
from dmdr.testing.toy import toy_trainer
from dmdr.training.context import StepContext
from dmdr.training.trainer import Trainer
from dmdr.types import Direction, Draw

Build = Callable[[], SampleWeight]
ALIKE_IN_ALL = (
    "ctx.gather joins what each process says of its own samples: all of them call it equally often, with values that "
    "do not depend on the other samples of the process"
)


def check_sample_weight(build: Build, reward: Reward | None = None) -> None:
    """Check a sample weight.

    Args:
        build: Makes a fresh one; called several times.
        reward: What it weighs by; `dmdr.backends.toy.Redness` by default.

    Raises:
        AssertionError: With the broken promise. What the sample weight itself raises is passed on.
    """
    taken_by_a_run("sample_weights", build())
    for check in SAMPLE_WEIGHT_CHECKS:
        check(build, reward)


@dataclass
class Alike(Redness):
    """A reward that gives every image the same score.

    Attributes:
        score: Which.
    """

    score: float = 0.5

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B] float32."""
        return torch.full((len(images),), self.score)


@dataclass
class WeightBench:
    """A sample weight in a toy run that gives it what it declares, and no more.

    Attributes:
        weight: The one that is tried.
        trainer: The run; student and fake score have left the teacher.
        ctx: The running step.
        draw: What the trainer would hand to it: the whole batch,
        direction: and its direction.
    """

    weight: SampleWeight
    trainer: Trainer
    ctx: StepContext
    draw: Draw
    direction: Direction

    def weigh(self, part: slice = slice(None)) -> Tensor:
        """The weights of a process that has this part of the batch, [B] float32.

        Raises:
            CannotRun: If they are not.
        """
        with torch.no_grad():  # as the trainer asks for them
            found = self.weight(self.draw[part], self.direction[part], self.ctx)
        shape = self.draw.sample[part].shape
        if not isinstance(found, Tensor) or found.shape != shape or found.dtype != torch.float32:
            what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise CannotRun(f"a sample weight returns {list(shape)} float32; this one {what}")
        return found

    def later(self) -> "WeightBench":
        """The next step, of the same student."""
        self.trainer.step += 1
        return _at_work(self.weight, self.trainer)

    def steps(self, count: int) -> Iterator[Tensor]:
        """The weights of this step and of those after it, `count` times [B] float32."""
        bench = self
        for step in range(count):
            bench = bench.later() if step else bench
            yield bench.weigh()


def weight_bench(build: Build, reward: Reward | None = None, *, least: bool = False) -> WeightBench:
    """A fresh sample weight before its first call.

    Args:
        least: A batch of no more images than it declares, instead of 16 or more in several groups.
    """
    weight = build()
    if getattr(weight, "idle", False):
        raise CannotRun(
            "it does nothing with these values of its fields: a run leaves it out, and nothing can be checked"
        )
    needs = _needs(weight)
    group = needs.group_size
    images = max(needs.batch_size, group if least else 4 * max(group, 4))
    trainer = toy_trainer(
        reward=reward,
        batch_size=-(-images // group) * group,
        group_size=group,
        guidance=(2.0, 4.0),
        sample_weight=weight,
    )
    if not needs.reward:
        trainer.scorer = None
    if not needs.real_images:
        trainer.real_images = None
    return _at_work(weight, trained_a_little(trainer))


def _needs(weight: SampleWeight) -> Needs:
    """What it declares; one without `needs` is checked against nothing before a run, which may have no reward."""
    needs = getattr(weight, "needs", Needs(reward=False))
    if not isinstance(needs, Needs):
        raise CannotRun(f"needs must be a property or an attribute that is a Needs, not {type(needs).__name__}")
    return needs


def _at_work(weight: SampleWeight, trainer: Trainer) -> WeightBench:
    ctx = trainer.context(0)
    draw = trainer.rollouts.pick(trainer.rollouts.whole(ctx), ctx)
    with torch.no_grad():
        direction = trainer.matching.direction(draw, trainer.backend.teacher, trainer.backend.fake_score, ctx)
    return WeightBench(weight, trainer, ctx, draw, direction)


def declared_needs_are_honest(build: Build, reward: Reward | None = None) -> None:
    """It runs when it is given what it declares, and nothing else, and asks for the reward that it declares."""
    bench = weight_bench(build, reward, least=True)
    asked: list[object] = []
    bench.ctx._count_unscored = asked.append  # type: ignore[method-assign, assignment]
    try:
        bench.weigh()
    except TrainingError as error:
        if _needs(bench.weight).reward:
            raise
        raise CannotRun("it asks for a reward, which a run may not have: declare needs = Needs(reward=True)") from error
    assert asked or not _needs(bench.weight).reward, (
        "needs.reward is declared, but no score was asked for: declare reward=False, so that it runs without --reward"
    )


def weights_are_finite_and_not_negative(build: Build, reward: Reward | None = None) -> None:
    """Whatever the rewards are: as usual, all the same, or missing (NaN) for some images or for all."""
    situations: dict[str, Any] = {"": reward}
    if _needs(build()).reward:
        situations |= {
            " with a reward that is NaN for some images": Silent(),
            " with a reward that is NaN for all images": Alike(score=torch.nan),
            " with a reward that is the same for all images": Alike(),
        }
    for situation, given in situations.items():
        for least in (False, True):
            for weights in weight_bench(build, given, least=least).steps(2):
                assert weights.isfinite().all(), f"weights must be finite{situation}, not {weights.tolist()}"
                assert bool((weights >= 0).all()), f"weights must not be negative{situation}, as {weights.min():.3g} is"


def weights_have_mean_one(build: Build, reward: Reward | None = None) -> None:
    """Over the global batch, or over time for one that remembers; else --sample_weight changes --dmd_weight, too."""
    bench = weight_bench(build, reward)
    means = torch.stack([weights.mean() for weights in bench.steps(10)])
    if isinstance(bench.weight, Stateful) and (means - 1).abs().max() > 1e-3:
        assert (means.mean() - 1).abs() < 0.1, f"weights have mean one over time, not {means.mean():.3g} over 10 steps"
    else:
        assert (means - 1).abs().max() <= 1e-3, (
            f"weights have mean one over the global batch, not {means.min():.3g} to {means.max():.3g}: divide by the "
            "mean over ctx.global_scores() or ctx.gather"
        )


def processes_weigh_their_own_share_of_one_batch(build: Build, reward: Reward | None = None) -> None:
    """What a process says of its share is what one process would say of the whole batch."""
    gathered: list[Tensor] = []
    bench = weight_bench(build, reward)
    bench.ctx.gather = lambda values: gathered.append(values) or values  # type: ignore[method-assign, func-returns-value]
    whole = bench.weigh()
    group = _needs(bench.weight).group_size
    half = len(whole) // group // 2 * group
    for part in (slice(0, half), slice(half, None)):
        bench, left = weight_bench(build, reward), iter(gathered)

        def everyones(values: Tensor, part: slice = part, left: Iterator[Tensor] = left) -> Tensor:
            everyone = next(left, None)
            assert everyone is not None, ALIKE_IN_ALL
            exact = not values.is_floating_point()  # else up to the rounding of other passes through a network
            close = torch.equal if exact else partial(torch.allclose, rtol=1e-4, atol=1e-5, equal_nan=True)
            assert everyone[part].shape == values.shape and close(everyone[part], values), ALIKE_IN_ALL
            return everyone

        bench.ctx.gather = everyones  # type: ignore[method-assign]
        weights = bench.weigh(part)
        assert next(left, None) is None, ALIKE_IN_ALL
        assert torch.allclose(weights, whole[part], rtol=1e-4, atol=1e-5), (
            "with two processes, a sample has another weight than with one: take statistics over ctx.global_scores() "
            "or ctx.gather, and use the rows draw.sample of what covers the global batch"
        )


def what_it_is_given_is_only_read(build: Build, reward: Reward | None = None) -> None:
    """The objectives read the same draw and the same scores, and the direction is the matching's."""
    bench = weight_bench(build, reward)
    total = bench.direction.total.clone()
    with only_read("sample weight", bench.draw, bench.ctx):
        bench.weigh()
    assert same(bench.direction.total, total), "the sample weight changed the direction; it only weighs it"


def random_numbers_are_keyed(build: Build, reward: Reward | None = None) -> None:
    """Two sample weights say the same of the same draw, and nothing is drawn from a global generator."""
    instead = "draw from ctx.random, keyed by draw.sample"
    found = []
    for _ in range(2):
        bench = weight_bench(build, reward)
        with untouched_global_rng("sample weight", instead):
            found.append(bench.weigh())
    assert same(*found), f"two calls on the same draw gave different weights; {instead}"


def whole_training_steps_run(build: Build, reward: Reward | None = None) -> None:
    """Two steps with it."""
    trainer = weight_bench(build, reward).trainer
    try:
        for _ in range(2):
            trainer.train_step()
    except TrainingError as error:
        raise AssertionError(f"in a whole training step, the training stopped: {error}") from error


def state_survives_a_checkpoint(build: Build, reward: Reward | None = None) -> None:
    """After some steps, what goes on from a checkpoint weighs as what has gone on all the time."""
    bench, other = weight_bench(build, reward), build()
    for _ in range(3):
        bench.weigh()
        bench = bench.later()
    brings_back_its_state(bench.weight, other)
    assert same(*(replace(bench, weight=each).weigh() for each in (bench.weight, other))), (
        "it keeps something that a checkpoint does not hold: after load_state_dict(state_dict()), a new one gives "
        "other weights; put all that it keeps from step to step into state_dict()"
    )


def no_method_is_misspelt(build: Build, reward: Reward | None = None) -> None:
    """A run calls optional methods by their names in `dmdr.protocols`, and never one whose name is nearly that."""
    spelt("sample_weights", build())


SAMPLE_WEIGHT_CHECKS: tuple[Callable[[Build, Reward | None], None], ...] = (
    declared_needs_are_honest,
    weights_are_finite_and_not_negative,
    weights_have_mean_one,
    processes_weigh_their_own_share_of_one_batch,
    what_it_is_given_is_only_read,
    random_numbers_are_keyed,
    whole_training_steps_run,
    state_survives_a_checkpoint,
    no_method_is_misspelt,
)
