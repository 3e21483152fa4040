"""What an RL objective promises."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmdr.backends.toy import Redness
from dmdr.paths import Prediction
from dmdr.protocols import Needs, Reward, RewardObjective
from dmdr.testing.common import networks, untouched_global_rng
from dmdr.testing.toy import toy_trainer
from dmdr.trainer import Step, Trainer, WeightedObjective
from dmdr.types import Draw, Term, terms_of

Build = Callable[[], RewardObjective]


def check_objective(build: Build, reward: Reward | None = None) -> None:
    """Check an RL objective.

    Args:
        build: Makes a fresh objective; called several times.
        reward: What it climbs; `dmdr.backends.toy.Redness` by default.

    Raises:
        AssertionError: With the broken promise.
    """
    for check in OBJECTIVE_CHECKS:
        check(build, reward)


@dataclass
class _Bench:
    """A fresh objective before its first call, in a run that gives it what it declares, and no more."""

    objective: RewardObjective
    trainer: Trainer
    ctx: Step
    draw: Draw

    @property
    def needs(self) -> Needs:
        return self.objective.needs

    def ask(self, draw: Draw) -> list[Term]:
        """Its answer for a micro-batch; a generator's graphs stay alive."""
        return list(terms_of(self.objective(draw, self.ctx)))

    def ask_and_learn(self) -> tuple[Tensor, list[Term]]:
        """Its answer for the whole batch after the backward of each term, and the leaf that took the gradient."""
        leaf = self.draw.x0.detach().requires_grad_()
        answers = []
        for term in terms_of(self.objective(replace(self.draw, leaf=leaf), self.ctx)):
            answers.append(term)
            if term.grad is None and term.loss.requires_grad:
                torch.where(_valid(term, self.draw), term.loss, 0.0).sum().backward()
        return leaf, answers


def _bench(build: Build, reward: Reward | None, *, groups: int = 4) -> _Bench:
    objective = build()
    size = max(objective.needs.group_size, 1)
    term = WeightedObjective("checked", 1.0, objective)
    trainer = toy_trainer(term, reward=reward, batch_size=groups * max(size, 4) // size * size)
    if not objective.needs.reward:
        trainer.rewards = None
    ctx = trainer.context(0)
    draw = trainer.pick(trainer.rollout(ctx, trainer.shared_noise(ctx)), ctx)
    if objective.needs.matching:
        draw = replace(draw, direction=trainer.direction(draw, ctx))
    draw = replace(draw, mask=term.declared(draw, trainer.sampler.num_inference_steps - 1))
    if hasattr(objective, "setup"):
        objective.setup(ctx)
    return _Bench(objective, trainer, ctx, draw)


def _valid(term: Term, draw: Draw) -> Tensor:
    """The samples that count, [B] bool."""
    if term.valid is None:
        return draw.mask
    shape, dtype = term.valid.shape, term.valid.dtype
    wanted = f"Term.valid must be [{len(draw)}] bool, or None for all, not {list(shape)} {dtype}"
    assert shape == draw.mask.shape and dtype == torch.bool, wanted
    return draw.mask & term.valid


def _reaches(leaf: Tensor, answers: list[Term], trainer: Trainer) -> bool:
    """Whether there is a gradient for the student, at its answer or in its parameters."""
    climbed = leaf.grad is not None or any(term.grad is not None for term in answers)
    return climbed or any(p.grad is not None for p in trainer.backend.parameters("student").values())


def one_finite_loss_per_sample(build: Build, reward: Reward | None = None) -> None:
    bench = _bench(build, reward)
    count = len(bench.draw)
    _, answers = bench.ask_and_learn()
    assert answers, "the objective yielded no term; return a Term, or yield one or several"
    for term in answers:
        loss = term.loss
        assert loss.shape == (count,), f"Term.loss must be one loss per sample, [{count}], not {list(loss.shape)}"
        assert loss.dtype in (torch.float32, torch.float64), f"Term.loss must be float32 or float64, not {loss.dtype}"
        assert loss[_valid(term, bench.draw)].isfinite().all(), "Term.loss must be finite for every valid sample"
        for name, value in term.metrics.items():
            shape = torch.as_tensor(value).shape
            assert shape in ((), (count,)), f"the metric '{name}' must be a number or [{count}], not {list(shape)}"


def gradient_reaches_the_student_only(build: Build, reward: Reward | None = None) -> None:
    bench = _bench(build, reward)
    leaf, answers = bench.ask_and_learn()
    backend = bench.trainer.backend
    assert _reaches(leaf, answers, bench.trainer), (
        "the loss reaches neither draw.leaf, the student's answer, nor the student's parameters: is there a detach or "
        "a no_grad on the way, or draw.x0 in place of draw.leaf?"
    )
    climbed = leaf.grad is not None or any(term.grad is not None for term in answers)
    assert climbed or not bench.needs.reward_grad, (
        "needs.reward_grad is declared, but no gradient arrives at draw.leaf: leave it out, or users of rewards "
        "without gradient are turned away for nothing"
    )
    reached = any(p.grad is not None for p in backend.parameters("fake_score").values())
    assert not reached, "the loss must not reach the fake score; detach its prediction"
    for _, part in bench.trainer.rewards.parts.values() if bench.trainer.rewards else ():
        for name, network in networks(part):
            trained = any(p.grad is not None for p in network.parameters())
            assert not trained, f"the loss reaches the reward's {name}; a reward is frozen in `prepare`"


@dataclass
class _Flat(Redness):
    """A reward without gradient, as functions and servers are."""

    differentiable: ClassVar[bool] = False

    def __call__(self, *args: Any, **columns: Any) -> Tensor:
        return super().__call__(*args, **columns).detach()


def declared_needs_are_honest(build: Build, reward: Reward | None = None) -> None:
    """It needs what it declares, and nothing that it does not."""
    needs = build().needs
    flat: Any = _Flat()
    bench = _bench(build, reward if needs.reward_grad else flat, groups=1)
    if "reference" not in needs.roles:
        bench.trainer.backend.reference = _undeclared("the reference", "needs.roles")  # type: ignore[method-assign]
    if not needs.reward:
        assert bench.trainer.rewards is None
    try:
        leaf, answers = bench.ask_and_learn()
    except AssertionError:
        raise
    except Exception as error:
        lacking = [
            *(["a reward (reward=True)"] if not needs.reward else []),
            *(["a reward with a gradient (reward_grad=True)"] if not needs.reward_grad else []),
            *(["draw.direction (matching=True)"] if not needs.matching else []),
            *(["rollout.log_prob (log_prob=True)"] if not needs.log_prob else []),
            f"groups of more than {needs.group_size} (group_size)",
        ]
        raise AssertionError(
            f"given only what `needs` declares, the objective failed with {type(error).__name__}: {error}; it may use, "
            f"without declaring it, {', '.join(lacking)}"
        ) from error
    assert needs.reward_grad or _reaches(leaf, answers, bench.trainer), (
        "given a reward without gradient the loss has none, either; if it needs the reward's, declare reward_grad=True"
    )


def _undeclared(what: str, declare: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"the objective calls {what}, which it does not declare: add it to {declare}")

    return refuse


def a_sample_does_not_depend_on_its_micro_batch(build: Build, reward: Reward | None = None) -> None:
    """Neither the company of other groups nor the order of the calls changes a sample's loss."""
    size = max(build().needs.group_size, 1)

    def losses(micro_batch: int, backwards: bool) -> Tensor:
        bench = _bench(build, reward)
        parts = [replace(part, leaf=part.x0.detach().requires_grad_()) for part in bench.draw.split(micro_batch)]
        found = {}
        for index in reversed(range(len(parts))) if backwards else range(len(parts)):
            answers = bench.ask(parts[index])
            found[index] = torch.stack([torch.where(_valid(a, parts[index]), a.loss, 0.0) for a in answers]).sum(0)
        return torch.cat([found[index] for index in range(len(parts))]).detach()

    whole = len(_bench(build, reward).draw)
    together = losses(whole, False)
    for backwards in (False, True):
        apart = losses(size * max(whole // size // 2, 1), backwards)
        assert torch.allclose(together, apart, atol=1e-5), (
            "a sample's loss must not depend on which other groups share its micro-batch, nor on those before it; take "
            "statistics of a group within it, and those of the batch from ctx.global_scores() or ctx.gather"
        )


def random_numbers_are_keyed(build: Build, reward: Reward | None = None) -> None:
    instead = "draw from ctx.random, keyed by draw.sample"
    found = []
    for _ in range(2):
        bench = _bench(build, reward)
        with untouched_global_rng("objective", instead):
            found.append([term.loss.detach() for term in bench.ask_and_learn()[1]])
    for first, second in zip(*found, strict=True):
        same = torch.equal(first.nan_to_num(), second.nan_to_num())
        assert same, f"two calls on the same draw gave different losses; {instead}"


def bfloat16_predictions_are_enough(build: Build, reward: Reward | None = None) -> None:
    """A network in bfloat16 has coarse answers; the loss is as finite and as precise."""
    bench = _bench(build, reward)
    backend: Any = bench.trainer.backend
    for role in ("student", "fake_score", "reference", "teacher"):
        setattr(backend, role, _coarse(getattr(backend, role)))
    bench.draw = bench.trainer.pick(bench.trainer.rollout(bench.ctx), bench.ctx)
    if bench.needs.matching:
        bench.draw = replace(bench.draw, direction=bench.trainer.direction(bench.draw, bench.ctx))
    for term in bench.ask_and_learn()[1]:
        loss = term.loss[_valid(term, bench.draw)]
        precise = loss.dtype in (torch.float32, torch.float64)
        assert precise and loss.isfinite().all(), f"with a network in bfloat16 the loss must be finite float32: {loss}"


def _coarse(role: Callable[..., Prediction]) -> Callable[..., Prediction]:
    def call(*args: Any, **kwargs: Any) -> Prediction:
        found = role(*args, **kwargs)
        return replace(found, value=found.value.bfloat16().float())

    return call


@dataclass
class _Silent(Redness):
    """A reward that cannot judge every third image, as functions and servers may."""

    def __call__(self, images: Tensor, *args: Any, **columns: Any) -> Tensor:
        scores = super().__call__(images, *args, **columns)
        return torch.where((images[:, 0, 0, 0] * 1e4).long() % 3 == 0, torch.nan, scores)


def unjudged_samples_are_left_out(build: Build, reward: Reward | None = None) -> None:
    """A NaN score must not become a NaN gradient."""
    if not build().needs.reward:
        return
    silent: Any = _Silent()
    trainer = toy_trainer(WeightedObjective("checked", 1.0, build()), reward=silent, batch_size=_whole_batch(build))
    line = trainer.train_step()
    bad = [name for name, value in line.items() if name.startswith(("loss/", "grad_norm/")) and value != value]
    assert not bad, (
        f"with a reward that is NaN for some images, {', '.join(bad)} is NaN: say in Term.valid which samples count, "
        "and replace the others' scores (torch.where) before anything with a gradient is computed from them"
    )


def _whole_batch(build: Build) -> int:
    size = max(build().needs.group_size, 1)
    return 4 * max(size, 4) // size * size


def whole_training_steps_run(build: Build, reward: Reward | None = None) -> None:
    """Two steps with DMD and two without, where it can do without: the student moves, and nothing else does."""
    for dmd_weight in (1.0,) if build().needs.matching else (1.0, 0.0):
        trainer = toy_trainer(
            WeightedObjective("checked", 1.0, build()),
            reward=reward,
            batch_size=_whole_batch(build),
            dmd_weight=dmd_weight,
        )
        if not build().needs.reward:
            trainer.rewards = None
        backend = trainer.backend
        reference = {name: p.detach().clone() for name, p in backend.parameters("reference").items()}
        before = {name: p.detach().clone() for name, p in backend.parameters("student").items()}
        for _ in range(2):
            line = trainer.train_step()
            bad = [name for name, value in line.items() if name.startswith(("loss/", "grad_norm/")) and value != value]
            assert not bad, f"a whole training step with dmd_weight {dmd_weight} logged NaN for {', '.join(bad)}"
        moved = any(not torch.equal(p, before[name]) for name, p in backend.parameters("student").items())
        assert moved, f"two training steps with dmd_weight {dmd_weight} left the student as it was"
        for name, p in backend.parameters("reference").items():
            assert torch.equal(p, reference[name]), "the objective changed the reference, which is nobody's to train"


def state_survives_a_checkpoint(build: Build, reward: Reward | None = None) -> None:
    bench = _bench(build, reward)
    objective: Any = bench.objective
    has = [hasattr(objective, name) for name in ("state_dict", "load_state_dict")]
    assert has[0] == has[1], "an objective with a state has both, state_dict() and load_state_dict(state)"
    if not has[0]:
        return
    bench.ask_and_learn()
    if hasattr(objective, "after_update"):
        objective.after_update(bench.ctx)
    other: Any = build()
    if hasattr(other, "setup"):
        other.setup(bench.ctx)
    other.load_state_dict(objective.state_dict())
    assert _same(objective.state_dict(), other.state_dict()), "load_state_dict(state_dict()) must bring back the state"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


OBJECTIVE_CHECKS: tuple[Callable[[Build, Reward | None], None], ...] = (
    declared_needs_are_honest,
    one_finite_loss_per_sample,
    gradient_reaches_the_student_only,
    random_numbers_are_keyed,
    a_sample_does_not_depend_on_its_micro_batch,
    bfloat16_predictions_are_enough,
    unjudged_samples_are_left_out,
    whole_training_steps_run,
    state_survives_a_checkpoint,
)
