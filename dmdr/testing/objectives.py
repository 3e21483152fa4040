"""What an RL objective promises."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmdr.backends.toy import Redness
from dmdr.errors import TrainingError
from dmdr.matching import DMD
from dmdr.protocols import BringsLearners, Needs, Reward, SetsUp
from dmdr.states import load_strict
from dmdr.testing.bench import Bench, Build, bench_of, drawn, train, trainer_of, valid_of
from dmdr.testing.common import (
    LATE,
    CannotRun,
    Mute,
    Silent,
    answers_in_bfloat16,
    brings_back_its_state,
    networks,
    numbers_are_new,
    only_read,
    passes_counted,
    same,
    spelt,
    taken_by_a_run,
    untouched_global_rng,
)
from dmdr.types import Term


def check_objective(build: Build, reward: Reward | None = None) -> None:
    """Check an RL objective.

    Args:
        build: Makes a fresh objective; called several times.
        reward: What it climbs; `dmdr.backends.toy.Redness` by default.

    Raises:
        AssertionError: With the broken promise. What the objective itself raises is passed on.
    """
    taken_by_a_run("objectives", build())
    for check in OBJECTIVE_CHECKS:
        check(build, reward)


@dataclass
class _Flat(Redness):
    """A reward without gradient, as functions and servers are."""

    differentiable: ClassVar[bool] = False

    def __call__(self, *args: Any, **columns: Any) -> Tensor:
        return super().__call__(*args, **columns).detach()


def it_can_be_called(build: Build, reward: Reward | None = None) -> None:
    """Given all that there is, declared or not, it answers with a Term, or several, of the right shapes."""
    needs = build().needs
    if not isinstance(needs, Needs):
        raise CannotRun(f"needs must be a property or an attribute that is a Needs, not {type(needs).__name__}")
    bench_of(build, reward, needs=_with_everything(needs)).ask_and_learn()


def _with_everything(needs: Needs) -> Needs:
    return replace(
        needs,
        reward=True,
        reward_grad=True,
        matching=True,
        parts=DMD.parts,
        log_prob=True,
        real_images=True,
        roles=tuple({*needs.roles, "reference"}),
        batch_size=max(needs.batch_size, 4),
        group_size=max(needs.group_size, 4),
    )


def declared_needs_are_honest(build: Build, reward: Reward | None = None) -> None:
    """It runs when it is given what it declares, and nothing else."""
    needs = build().needs

    def given(needs: Needs) -> Bench:
        flat: Any = _Flat()
        return bench_of(build, reward if needs.reward_grad else flat, needs=needs, least=True, on_declared=True)

    def runs(needs: Needs) -> bool:
        try:
            given(needs).ask_and_learn()
        except Exception:
            return False
        return True

    bench = given(needs)
    try:
        reaches = bench.reaches_the_student()
    except AssertionError:
        raise
    except Exception as error:
        extras: dict[str, dict[str, Any]] = {
            "a reward: declare reward=True": {"reward": True},
            "a reward with a gradient: declare reward_grad=True": {"reward": True, "reward_grad": True},
            "draw.direction: declare matching=True": {"matching": True},
            **{
                f"draw.direction.parts['{part}']: declare parts=('{part}',)": {"matching": True, "parts": (part,)}
                for part in DMD.parts
            },
            "rollout.log_prob: declare log_prob=True": {"log_prob": True},
            "real images: declare real_images=True": {"real_images": True},
            "the reference: add it to roles": {"roles": (*needs.roles, "reference")},
            **{
                f"{size} images: declare batch_size={size}, or group_size={size} where they must be of one prompt": {
                    "batch_size": size
                }
                for size in (2, 4)
            },
            **{f"groups of {size}: declare group_size={size}": {"group_size": size} for size in (2, 4)},
        }
        helped = [extra for extra, more in extras.items() if runs(replace(needs, **more))]
        if not helped and runs(_with_everything(needs)):
            several = "log_prob, matching, real_images, roles, a reward, larger groups"
            helped = [f"several things that it does not declare: {several}?"]
        if not helped:
            raise
        raise CannotRun(
            f"given only what `needs` declares, the objective failed with {type(error).__name__}: {error}; it runs "
            f"if it is given {helped[0]}"
        ) from error
    if not reaches and not needs.reward_grad:
        assert not given(replace(needs, reward=True, reward_grad=True)).reaches_the_student(), (
            "without the gradient of the reward the loss has no gradient: declare reward_grad=True"
        )


def nothing_costly_is_declared_in_vain(build: Build, reward: Reward | None = None) -> None:
    """Further roles, log-probabilities and the matching's gradient cost a run memory or time, or users a setting."""
    needs = build().needs
    without = {f"the {role} in roles": replace(needs, roles=tuple({*needs.roles} - {role})) for role in needs.roles}
    without |= {f"'{part}' in parts": replace(needs, parts=tuple({*needs.parts} - {part})) for part in needs.parts}
    if needs.matching:
        without["matching=True"] = replace(needs, matching=False, parts=())
    if needs.log_prob:
        without["log_prob=True"] = replace(needs, log_prob=False)
    if needs.real_images:
        without["real_images=True"] = replace(needs, real_images=False)

    def answers(needs: Needs) -> Iterator[list[Term]]:
        """At several steps and uses of a rollout: it may be wanted at some of them only."""
        for step in (*range(8), LATE):
            for iteration in range(needs.updates_per_rollout):
                bench = bench_of(build, reward, needs=needs, least=True, on_declared=True)
                bench.ctx.step, bench.ctx.iteration = step, iteration
                bench.draw = replace(bench.draw, iteration=iteration)
                yield bench.ask_and_learn()[0]

    for what, less in without.items():
        try:
            same = all(map(_same_terms, answers(needs), answers(less)))
        except Exception:  # whatever it raises for want of it
            continue
        assert not same, f"the objective declares {what}, but gives the same answer without it: do not declare it"


def _same_terms(a: Sequence[Term], b: Sequence[Term]) -> bool:
    return same([vars(term) for term in a], [vars(term) for term in b])


def one_finite_loss_per_sample(build: Build, reward: Reward | None = None) -> None:
    """`Term.loss` is [B], and finite for each valid sample."""
    _losses_are_finite(bench_of(build, reward), "Term.loss must be finite for every valid sample")


def what_it_is_given_is_only_read(build: Build, reward: Reward | None = None) -> None:
    """Other objectives, and the matching, read the same draw and the same scores; parameters are the optimizer's."""
    bench = bench_of(build, reward)
    with only_read("objective", bench.draw, bench.ctx):
        bench.ask_and_learn()


def gradient_reaches_the_student_only(build: Build, reward: Reward | None = None) -> None:
    """The loss has a gradient in `draw.leaf` or the student, and in nothing else."""
    bench = bench_of(build, reward)
    backend = bench.trainer.backend
    _, climbed = bench.ask_and_learn()
    assert climbed or any(p.grad is not None for p in backend.parameters("student").values()), (
        "the loss reaches neither draw.leaf, the student's answer, nor the student's parameters: is there a detach or "
        "a no_grad on the way, or draw.x0 in place of draw.leaf?"
    )
    assert climbed or not bench.needs.reward_grad or not _learns_from(_Flat(), build), (
        "needs.reward_grad is declared, but it runs without a gradient of the reward: do not declare it, or a run "
        "refuses rewards without gradient for no reason"
    )
    reached = any(p.grad is not None for p in backend.parameters("fake_score").values())
    assert not reached, "the loss must not reach the fake score; detach its prediction"
    for _, part in bench.ctx.rewards.parts.values() if bench.ctx.scorer else ():
        for name, network in networks(part):
            trained = any(p.grad is not None for p in network.parameters())
            assert not trained, f"the loss reaches the reward's {name}; a reward is frozen in `prepare`"


def _learns_from(reward: Any, build: Build) -> bool:
    """Whether the student has a gradient with this reward."""
    try:
        return bench_of(build, reward).reaches_the_student()
    except Exception:  # whatever it raises for want of another
        return False


def a_sample_does_not_depend_on_its_micro_batch(build: Build, reward: Reward | None = None) -> None:
    """Neither the company of other groups nor the order of the calls changes a sample's loss."""
    bench = bench_of(build, reward)
    whole = len(bench.draw)
    size = bench.needs.group_size
    half = size * max(whole // size // 2, 1)

    def losses(micro_batch: int, order: slice) -> Tensor:
        bench = bench_of(build, reward, micro_batch_size=micro_batch)
        parts = [replace(part, leaf=part.x0.detach().requires_grad_()) for part in bench.draw.split(micro_batch)]
        found = {}
        for index in range(len(parts))[order]:
            answers = bench.ask(parts[index])
            found[index] = torch.stack([torch.where(valid_of(a, parts[index]), a.loss, 0.0) for a in answers]).sum(0)
        return torch.cat([found[index] for index in range(len(parts))]).detach()

    forwards, backwards = slice(None), slice(None, None, -1)
    together = losses(whole, forwards)
    for micro_batch, order in ((half, forwards), (half, backwards), (size, forwards), (size, backwards)):
        try:
            apart = losses(micro_batch, order)
        except TrainingError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            raise AssertionError(
                f"it fails on micro-batches of {micro_batch} of {whole} samples with {type(error).__name__}: {error}"
                f"; they hold whole groups of needs.group_size, which is {bench.needs.group_size}"
            ) from error
        assert torch.allclose(together, apart, atol=1e-5, equal_nan=True), (
            "a sample's loss must not depend on which other groups share its micro-batch, nor on those before it; take "
            "statistics of a group within it, and those of the batch from ctx.global_scores() or ctx.gather"
        )


def random_numbers_are_keyed(build: Build, reward: Reward | None = None) -> None:
    """Two calls on the same draw answer the same, and nothing is drawn from a global generator."""
    instead = "draw from ctx.random, keyed by draw.sample"
    found = []
    for _ in range(2):
        bench = bench_of(build, reward)
        with untouched_global_rng("objective", instead):
            found.append(bench.ask_and_learn()[0])
    assert _same_terms(*found), f"two calls on the same draw gave different answers; {instead}"


def numbers_are_new_in_each_use_of_a_rollout(build: Build, reward: Reward | None = None) -> None:
    """Noise that repeats makes one sample of two; what is decided once for a rollout says so with `of_rollout`."""
    if build().needs.updates_per_rollout < 2:
        return
    for step in (0, LATE):
        bench = bench_of(build, reward)
        bench.ctx.step = step

        def use(iteration: int, bench: Bench = bench) -> None:
            bench.ctx.iteration, bench.draw = iteration, replace(bench.draw, iteration=iteration)
            bench.ask_and_learn()

        numbers_are_new(use)


def bfloat16_predictions_are_enough(build: Build, reward: Reward | None = None) -> None:
    """A network in bfloat16 has coarse answers; the loss is finite all the same."""
    bench = bench_of(build, reward)
    answers_in_bfloat16(bench.trainer.backend)
    bench.draw = drawn(bench.trainer, bench.ctx)
    _losses_are_finite(bench, "with a network in bfloat16 the loss must still be finite")


def _losses_are_finite(bench: Bench, promise: str) -> None:
    for term in bench.ask_and_learn()[0]:
        finite = term.loss[valid_of(term, bench.draw)].isfinite()
        assert finite.all(), f"{promise}; {int((~finite).sum())} of {len(finite)} are not"


def unscored_samples_are_left_out(build: Build, reward: Reward | None = None) -> None:
    """A NaN score must not become a NaN gradient."""
    objective = build()
    if not objective.needs.reward:
        return
    silent: Any = Silent()
    for step in (0, LATE):
        trainer = trainer_of(objective, silent, on_declared=True)
        trainer.step = step
        train(
            trainer,
            "with a reward that is NaN for some images",
            "; say in Term.valid which samples count, and replace the others' scores (torch.where) before anything "
            "with a gradient is computed from them",
        )
    assert silent.unscored, (
        "needs.reward is declared, but no score was asked for: declare reward=False, so that it runs without --reward"
    )


def passes_do_not_depend_on_the_samples(build: Build, reward: Reward | None = None) -> None:
    """Processes that share one network (--shard) wait for each other in each pass, forward and backward."""
    if not build().needs.reward:
        return
    cases = {"each image has a score": Redness(), "none has": Mute(), "no sample is at a declared step": Redness()}
    counts = {}
    for case, scores in cases.items():
        trainer = trainer_of(build(), scores, on_declared=True)
        ctx = trainer.context(0)
        draw = drawn(trainer, ctx)
        (term,) = trainer.objectives.terms
        trainer.objectives.set_up(ctx)
        with passes_counted(trainer.backend) as count:
            mask = draw.mask if "step" not in case else torch.zeros_like(draw.mask)
            trainer.objectives.gradient_of(term, replace(draw, mask=mask), ctx)
        counts[case] = _listed(count)
    said = "; ".join(f"{count} where {case}" for case, count in counts.items())
    assert len(set(counts.values())) == 1, (
        f"the passes through the networks depend on the samples: {said}; "
        "compute the same for all samples, and say in Term.valid which count"
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items()) or "none"


def whole_training_steps_run(build: Build, reward: Reward | None = None) -> None:
    """Two steps with DMD and two without, where it can do without: the student moves, and nothing else does."""
    for dmd_weight in (1.0,) if build().needs.matching else (1.0, 0.0):
        trainer = trainer_of(build(), reward, dmd_weight=dmd_weight)
        backend = trainer.backend
        reference = {name: p.detach().clone() for name, p in backend.parameters("reference").items()}
        before = {name: p.detach().clone() for name, p in backend.parameters("student").items()}
        for _ in range(2):
            train(trainer, f"in a whole training step with dmd_weight {dmd_weight}")
        moved = any(not torch.equal(p, before[name]) for name, p in backend.parameters("student").items())
        assert moved, f"two training steps with dmd_weight {dmd_weight} left the student as it was"
        for name, p in backend.parameters("reference").items():
            assert torch.equal(p, reference[name]), "the objective changed the reference, which nothing may train"


def state_survives_a_checkpoint(build: Build, reward: Reward | None = None) -> None:
    """After some steps, what goes on from a checkpoint answers as what has gone on all the time."""
    objective: Any = build()
    trainer = trainer_of(objective, reward, learning_rate=0.01)
    trainer.step = LATE
    for _ in range(2):
        trainer.train_step()
    ctx = trainer.context(0)
    draw = drawn(trainer, ctx)
    other: Any = build()
    if isinstance(other, BringsLearners):  # the run saves and loads their parameters
        for own, learner in zip(
            other.learners(ctx.backend, torch.device("cpu")), trainer.objectives.own["checked"], strict=True
        ):
            load_strict(own.parameters, learner.parameters, own.name)
    if isinstance(other, SetsUp):
        other.setup(ctx)
    brings_back_its_state(objective, other)
    answers = [Bench(each, trainer, ctx, draw).ask_and_learn()[0] for each in (objective, other)]
    assert _same_terms(*answers), (
        "it keeps something that a checkpoint does not hold: after setup and load_state_dict(state_dict()), a new one "
        "answers differently; put all that it keeps from step to step into state_dict()"
    )


def no_method_is_misspelt(build: Build, reward: Reward | None = None) -> None:
    """A run calls optional methods by their names in `dmdr.protocols`, and never one whose name is nearly that."""
    spelt("objectives", build())


OBJECTIVE_CHECKS: tuple[Callable[[Build, Reward | None], None], ...] = (
    it_can_be_called,
    declared_needs_are_honest,
    nothing_costly_is_declared_in_vain,
    one_finite_loss_per_sample,
    what_it_is_given_is_only_read,
    gradient_reaches_the_student_only,
    random_numbers_are_keyed,
    numbers_are_new_in_each_use_of_a_rollout,
    a_sample_does_not_depend_on_its_micro_batch,
    bfloat16_predictions_are_enough,
    unscored_samples_are_left_out,
    passes_do_not_depend_on_the_samples,
    whole_training_steps_run,
    state_survives_a_checkpoint,
    no_method_is_misspelt,
)
