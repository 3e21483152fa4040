"""The checks for plugin authors catch what they name, and `pytest --dmdr-plugin` runs them."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import trl.trainer.utils  # noqa: F401  # pytester forgets what is imported in a test, and this cannot be imported twice
from torch import Tensor, nn

from dmdr.backends.toy import PROMPTS, Redness, ToyBackend, ToyOptions
from dmdr.ema import EMA
from dmdr.errors import ConfigError, TrainingError
from dmdr.matching import DMD
from dmdr.paths import Prediction
from dmdr.protocols import Context, Needs, Role, Sampler
from dmdr.randomness import Random
from dmdr.testing import MATCHING_CHECKS, OBJECTIVE_CHECKS, check_backend, check_objective, check_reward
from dmdr.types import Condition, Draw, Term
from dmdr_nft import DiffusionNFT
from dmdr_refl import ReFL

Answer = Callable[[Draw, Context], Term | Iterable[Term]]


def objective(answer: Answer, **declared: Any) -> Callable[[], Any]:
    """Makes an objective out of its answer and its needs."""

    @dataclass
    class Tried:
        needs: ClassVar[Needs] = Needs(**declared)
        calls: int = field(default=0, init=False)

        def __call__(self, draw: Draw, ctx: Context) -> Term | Iterable[Term]:
            self.calls += 1
            return answer(draw, ctx)

    return Tried


def climb(draw: Draw, ctx: Context) -> Tensor:
    """What ReFL minimises."""
    return -ctx.rewards(ctx.backend.decode(draw.leaf), draw.cond.prompts)


def noisy(draw: Draw, ctx: Context) -> Term:
    return Term(climb(draw, ctx) + 0.1 * torch.rand(len(draw)))


def asking_where_scored(draw: Draw, ctx: Context) -> Term:
    """A pass through the student for samples that have a score, and none where there is no such sample."""
    score = ctx.scores(draw.rollout)["toy"]
    loss = draw.leaf.flatten(1).sum(1)  # type: ignore[union-attr]
    if score.isfinite().any():
        loss = loss + ctx.backend.student(draw.x_t, draw.t, draw.cond).x0.flatten(1).sum(1)
    return Term(loss, score.isfinite())


def drawing_elsewhere(draw: Draw, ctx: Context) -> Term:
    """What it draws decides nothing, yet others may draw after it."""
    np.random.rand()
    return Term(climb(draw, ctx))


def drawing_in_python(draw: Draw, ctx: Context) -> Term:
    random.random()
    return Term(climb(draw, ctx))


def fake_trained(draw: Draw, ctx: Context) -> Term:
    fake = ctx.backend.fake_score(draw.x_t, draw.t, draw.cond).x0
    return Term(climb(draw, ctx) + (fake - draw.leaf).square().mean(1))


def referring(draw: Draw, ctx: Context) -> Term:
    return Term(climb(draw, ctx) + ctx.backend.reference(draw.x_t, draw.t, draw.cond).x0.mean(1))


def paired(draw: Draw, ctx: Context) -> Term:
    return Term(climb(draw, ctx) * ctx.scores(draw.rollout)["toy"].view(-1, 4).std(1).repeat_interleave(4))


def without_valid(draw: Draw, ctx: Context) -> Term:
    return Term(climb(draw, ctx))


def changing(draw: Draw, ctx: Context) -> Term:
    draw.rollout.final.mul_(2)
    return Term(climb(draw, ctx))


def rescoring(draw: Draw, ctx: Context) -> Term:
    for scores in ctx.global_scores()[0].values():
        scores.sub_(scores.mean())
    return Term(climb(draw, ctx))


def relabelling(draw: Draw, ctx: Context) -> Term:
    draw.cond.tensors["label"].zero_()
    return Term(climb(draw, ctx))


def nudging(role: Role) -> Answer:
    """Trains behind the optimizer's back."""

    def answer(draw: Draw, ctx: Context) -> Term:
        for parameter in ctx.backend.parameters(role).values():
            parameter.data.mul_(0.9)
        return Term(climb(draw, ctx))

    return answer


def learning_itself(draw: Draw, ctx: Context) -> Term:
    loss = climb(draw, ctx)
    loss.sum().backward()
    return Term(loss.detach())


def own_parameters(draw: Draw, ctx: Context) -> Term:
    """Finite, but not its gradient."""
    student = ctx.backend.student(draw.x_t, draw.t, draw.cond).x0
    return Term(climb(draw, ctx) + (student - student.detach()).square().sum(1).sqrt())


def to_the_reference(draw: Draw, ctx: Context) -> Term:
    assert draw.leaf is not None
    reference = ctx.backend.reference(draw.x_t, draw.t, draw.cond).x0.detach()
    return Term(((draw.leaf - reference) ** 2).mean(1))


def everything_valid(draw: Draw, ctx: Context) -> Term:
    return Term(climb(draw, ctx), valid=torch.ones(len(draw), dtype=torch.bool))


@pytest.mark.parametrize(
    ("answer", "needs", "message"),
    [
        (lambda d, c: Term(climb(d, c).mean()), {}, "one loss per sample"),
        (lambda d, c: Term(climb(d, c).half()), {}, r"float32 or float64, not \[16\] torch.float16"),
        (lambda d, c: Term(climb(d, c) / 0.0), {}, "must be finite for every valid sample"),
        (lambda d, c: Term(climb(d, c), valid=torch.ones(3, dtype=torch.bool)), {}, r"Term.valid must be \[16\] bool"),
        (
            lambda d, c: Term(climb(d, c), metrics={"odd": torch.zeros(3)}),
            {},
            r"metric 'odd' must be a number or \[16\]",
        ),
        (lambda d, c: iter(()), {}, "yielded no term"),
        (lambda d, c: Term(climb(d, c).detach()), {}, "reaches neither draw.leaf"),
        (fake_trained, {}, "must not reach the fake score"),
        (lambda d, c: Term(climb(d, c)), {"reward_grad": False}, r"declare reward_grad=True"),
        (
            lambda d, c: Term(climb(d, c)),
            {"reward": False, "reward_grad": False},
            "it runs if it is given a reward: declare reward=True",
        ),
        (
            lambda d, c: Term(d.leaf.sum(1) * d.direction.total.sum(1)),
            {"reward_grad": False},
            "draw.direction: declare matching=True",
        ),
        (
            lambda d, c: Term(d.leaf.sum(1) + d.rollout.log_prob[0]),
            {"reward_grad": False},
            "rollout.log_prob: declare log_prob=True",
        ),
        (referring, {}, "the reference: add it to roles"),
        (
            lambda d, c: Term(((d.leaf - c.real(d).x0) ** 2).mean(1)),
            {"reward_grad": False},
            "real images: declare real_images=True",
        ),
        (
            lambda d, c: Term(c.backend.student(d.x_t, d.t, d.cond).x0.sum(1)),
            {},
            "runs without a gradient of the reward",
        ),
        (lambda d, c: Term(climb(d, c) - climb(d, c).mean()), {}, "which other groups share its micro-batch"),
        (noisy, {}, "drew from torch's global random generator"),
        (drawing_elsewhere, {}, "drew from numpy's global random generator"),
        (drawing_in_python, {}, "drew from Python's global random generator"),
        (
            asking_where_scored,
            {"reward": True},
            "depend on the samples: 1 of the student, 1 backward through the student where .*; none where none has",
        ),
        (everything_valid, {}, "say in Term.valid which samples count"),
        (without_valid, {"steps": "last"}, "say in Term.valid which samples count"),
        (without_valid, {"steps": (-1,)}, "names none of the 4 student steps"),
        (paired, {}, "given 4 images: declare batch_size=4, or group_size=4 where they must be of one prompt"),
        (changing, {}, r"changed draw.rollout.x0 in place"),
        (rescoring, {}, r"changed ctx.global_scores\(\)\[0\]\['toy'\] in place"),
        (relabelling, {}, r"changed draw.cond.tensors\['label'\] in place"),
        (nudging("student"), {}, "changed the student's net.0.weight in place"),
        (nudging("fake_score"), {}, "changed the fake_score's net.0.weight in place"),
        (lambda d, c: Term(climb(d, c)), {"matching": True}, "declares matching=True, but gives the same answer"),
        (lambda d, c: Term(climb(d, c)), {"log_prob": True}, "declares log_prob=True, but gives the same answer"),
        (
            lambda d, c: Term(climb(d, c)),
            {"roles": ("reference",)},
            "declares the reference in roles, but gives the same answer",
        ),
        (
            lambda d, c: Term(climb(d, c), metrics={"weight": 1.0}),
            {},
            "the run logs 'weight' of every objective itself",
        ),
        (learning_itself, {}, "ran backward into draw.leaf itself"),
        (own_parameters, {}, "its gradient in the student's parameters"),
        (
            lambda d, c: Term(d.leaf.sum(1) + d.rollout.log_prob[0] * d.direction.total.sum(1)),
            {"reward_grad": False},
            "several things that it does not declare",
        ),
        (lambda d, c: Term(d.leaf.sum(1)), {"reward_grad": False}, "declare reward=False"),
        (lambda d, c: Term(d.x0.sum(1)), {"reward_grad": False}, "reaches neither draw.leaf"),
    ],
)
def test_a_broken_objective_is_taught(answer: Answer, needs: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=message):
        check_objective(objective(answer, **({"reward_grad": True} | needs)))


def noised(numbers: Callable[[Context], Random]) -> Answer:
    """Pulls the student's answers at random places, with noise of these numbers."""

    def answer(draw: Draw, ctx: Context) -> Term:
        noise = numbers(ctx).normal("mine", draw.sample, tuple(draw.x0.shape[1:]))
        return Term((draw.leaf - noise).square().mean(1))

    return answer


def test_numbers_that_repeat_are_caught() -> None:
    own = noised(lambda ctx: Random(7, ctx.step, "mine"))
    with pytest.raises(AssertionError, match="16 random numbers of the first, such as those of '7/0/mine/mine/0"):
        check_objective(objective(own, reward=False, updates_per_rollout=2))
    check_objective(objective(own, reward=False))  # which uses each rollout once
    check_objective(objective(noised(lambda ctx: ctx.random), reward=False, updates_per_rollout=2))
    check_objective(objective(noised(lambda ctx: ctx.random.of_rollout), reward=False, updates_per_rollout=2))


def test_what_no_run_takes_is_caught() -> None:
    """A run reads flags and signatures off the class."""

    @dataclass
    class Written(Redness):
        differentiable: bool = True  # type: ignore[misc]

    @dataclass
    class Strange:
        needs: ClassVar[Needs] = Needs(reward=False)
        table: dict[str, float] = field(default_factory=dict)

        def __call__(self, draw: Draw, ctx: Context) -> Term:
            return Term(pulling(draw))

    class Family(ToyBackend):
        Options: ClassVar[Any] = dict

    with pytest.raises(
        AssertionError,
        match="a run refuses it: reward Written has a field 'differentiable', which cannot be a flag: annotate",
    ):
        check_reward(Written())
    with pytest.raises(AssertionError, match="a run refuses it: objective Strange has a field 'table' of a type that"):
        check_objective(Strange)
    with pytest.raises(AssertionError, match="a run refuses it: backend Family has Options that are no dataclass"):
        check_backend(Family("", ToyOptions()), PROMPTS)


def test_a_pure_regulariser_is_an_objective() -> None:
    check_objective(objective(to_the_reference, reward=False, roles=("reference",)))


def pulling(draw: Draw) -> Tensor:
    assert draw.leaf is not None
    return draw.leaf.square().mean(1)


def later_to_the_reference(draw: Draw, ctx: Context) -> Term:
    return Term(pulling(draw) + to_the_reference(draw, ctx).loss) if ctx.step > 10 else Term(pulling(draw))


def sometimes_to_the_reference(draw: Draw, ctx: Context) -> Term:
    return Term(pulling(draw) + to_the_reference(draw, ctx).loss) if ctx.step % 4 == 3 else Term(pulling(draw))


def to_the_reference_where_asked(draw: Draw, ctx: Context) -> Term:
    return Term(pulling(draw) + (to_the_reference(draw, ctx).loss if draw.mask.any() else 0.0))


def clipped_again(draw: Draw, ctx: Context) -> Term:
    return Term(pulling(draw) * (draw.rollout.log_prob[0].float() if draw.iteration else 1.0))


def against_the_matching(draw: Draw, ctx: Context) -> Term:
    loss = pulling(draw)
    return Term(loss.detach(), grad=draw.x0 if draw.direction is None else draw.x0 - draw.direction.total)


def backwards_itself(draw: Draw, ctx: Context) -> Term:
    loss = pulling(draw)
    loss.sum().backward()
    assert draw.leaf is not None and draw.leaf.grad is not None
    return Term(loss.detach(), grad=draw.leaf.grad.clone())


@pytest.mark.parametrize(
    ("answer", "needs"),
    [
        (later_to_the_reference, {"roles": ("reference",)}),
        (sometimes_to_the_reference, {"roles": ("reference",)}),
        (to_the_reference_where_asked, {"roles": ("reference",), "steps": (1,)}),
        (clipped_again, {"log_prob": True, "updates_per_rollout": 2}),
        (against_the_matching, {"matching": True}),
        (backwards_itself, {}),
        (lambda d, c: Term(pulling(d)), {"steps": (5,)}),
    ],
)
def test_what_is_used_now_and_then_is_used(answer: Answer, needs: dict[str, Any]) -> None:
    check_objective(objective(answer, **({"reward": False} | needs)))


def test_a_reward_that_sets_in_later_is_used() -> None:
    def later(draw: Draw, ctx: Context) -> Term:
        if ctx.step < 500:
            return Term(pulling(draw))
        scores = ctx.scores(draw.rollout)["toy"]
        return Term(pulling(draw) * scores.nan_to_num(), scores.isfinite())

    check_objective(objective(later))


def test_a_batch_that_is_not_declared_is_told() -> None:
    def compares(draw: Draw, ctx: Context) -> Term:
        (scores,) = ctx.global_scores()[0].values()
        low, high = sorted(scores.nan_to_num().tolist())[:2]
        return Term(pulling(draw) * (high - low + 1), ctx.scores(draw.rollout)["toy"].isfinite())

    with pytest.raises(AssertionError, match="it runs if it is given 2 images: declare batch_size=2, or group_size=2"):
        check_objective(objective(compares))
    check_objective(objective(compares, batch_size=2))


@dataclass
class Remembering:
    """Keeps a value, and gives it back."""

    needs: ClassVar[Needs] = Needs(reward=False)
    value: ClassVar[Any] = float("nan")
    kept: Any = field(default=None, init=False)

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        return Term(pulling(draw))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.value if self.kept is None else self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept = state["best"]


def test_a_state_may_be_nan_and_must_be_storable() -> None:
    class Keeps(Remembering):
        value: ClassVar[Any] = np.float64(1.0)

    class KeepsArray(Remembering):
        value: ClassVar[Any] = [{"all": np.ones(2)}]

    check_objective(Remembering)
    with pytest.raises(AssertionError, match=r"state_dict\(\), best: .* but not a numpy.float64"):
        check_objective(Keeps)
    with pytest.raises(AssertionError, match=r"state_dict\(\), best, all: .* but not a numpy.ndarray"):
        check_objective(KeepsArray)


@pytest.mark.parametrize("error", [ConfigError("too few steps"), TrainingError("went astray"), KeyError("caption")])
def test_what_an_objective_raises_is_passed_on(error: Exception) -> None:
    """No need would have helped."""

    def failing(draw: Draw, ctx: Context) -> Term:
        raise error

    with pytest.raises(type(error)) as raised:
        check_objective(objective(failing))
    assert raised.value is error


def test_an_objective_that_remembers_its_last_call_is_caught() -> None:
    @dataclass
    class Remembers(ReFL):
        calls: int = field(default=0, init=False)

        def __call__(self, draw: Draw, ctx: Context) -> Term:
            self.calls += 1
            return Term(self.calls * climb(draw, ctx))

    with pytest.raises(AssertionError, match="nor on those before it"):
        check_objective(Remembers)


def test_a_state_that_is_only_saved_is_caught() -> None:
    class Forgets(ReFL):
        def state_dict(self) -> dict[str, Any]:
            return {"calls": 1}

    with pytest.raises(AssertionError, match=r"load_state_dict\(state\)"):
        check_objective(Forgets)


def test_a_state_that_is_not_brought_back_is_caught() -> None:
    """An average of the student is the student itself at first, and so after every setup."""

    class Forgetful(DiffusionNFT):
        def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
            pass

    check_objective(DiffusionNFT)
    with pytest.raises(AssertionError, match="must bring back the state"):
        check_objective(Forgetful)


def test_a_method_that_is_nearly_called_right_is_caught() -> None:
    class Follows(ReFL):
        def after_updates(self, ctx: Context) -> None: ...

    class Losses(DMD):
        def fake_losses(self, draw: Draw, fake: Any, ctx: Context) -> Term: ...

    with pytest.raises(AssertionError, match=r"has a method after_updates: do you mean after_update of dmdr"):
        OBJECTIVE_CHECKS[-1](Follows, None)
    with pytest.raises(AssertionError, match=r"has a method fake_losses: do you mean fake_loss of dmdr"):
        MATCHING_CHECKS[-1](Losses)


def test_a_division_by_a_deviation_of_zero_is_explained() -> None:
    """At the last step, which is not declared; the loss of those samples is dropped, and their gradient is NaN."""

    def divides(draw: Draw, ctx: Context) -> Term:
        mean, std = ctx.sampler.moments(draw.index, ctx.backend.student(draw.x_t, draw.t, draw.cond))
        return Term(((draw.x_next - mean) / std).square().mean(1))

    with pytest.raises(AssertionError, match=r"by draw.mask or Term.valid, may be the cause, since 0 \* NaN is NaN"):
        check_objective(objective(divides, reward=False, steps="stochastic"))


def test_a_memory_that_no_checkpoint_holds_is_caught() -> None:
    @dataclass
    class Averages:
        needs: ClassVar[Needs] = Needs(reward=False)
        _old: EMA | None = field(default=None, init=False)

        def setup(self, ctx: Context) -> None:
            self._old = EMA(ctx.backend.parameters("student"), 0.5)

        def after_update(self, ctx: Context) -> None:
            assert self._old is not None
            self._old.update()

        def __call__(self, draw: Draw, ctx: Context) -> Term:
            assert self._old is not None
            with self._old.applied(), torch.no_grad():
                old = ctx.backend.student(draw.x_t, draw.t, draw.cond).x0
            assert draw.leaf is not None
            return Term((draw.leaf - 2 * old).square().mean(1))

    with pytest.raises(AssertionError, match="keeps something that a checkpoint does not hold"):
        check_objective(Averages)


class Judge(Redness):
    """A reward with a network."""

    def __init__(self, frozen: bool = True, **flaws: Any) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 1, 3, padding=1)
        nn.init.constant_(self.network.weight, 0.02)
        nn.init.zeros_(self.network.bias)
        if frozen:
            self.network.requires_grad_(False).eval()

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return self.network(images).sigmoid().mean((1, 2, 3))


@dataclass
class Flawed(Redness):
    flaw: str = ""
    dtype: torch.dtype = field(default=torch.float32, init=False)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        super().prepare(device, dtype)
        self.dtype = dtype

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        scores = images.mean((1, 2, 3))
        if self.flaw == "double":
            return scores.double()
        if self.flaw == "infinite":
            return scores.log()  # of black images
        if self.flaw == "silent":
            return scores * torch.nan
        if self.flaw == "coarse" and self.dtype == torch.bfloat16:
            return scores * torch.nan
        if self.flaw == "coarse dtype":
            return scores.to(self.dtype)
        if self.flaw == "scalar":
            return scores.mean()
        if self.flaw == "unscored":  # no flaw
            return torch.where((images[:, 0, 0, 0] * 1e4).long() % 2 == 0, torch.nan, scores)
        if self.flaw == "batch":
            return scores - scores.mean()
        if self.flaw == "changes":
            images.clamp_(0.1)
        if self.flaw == "detached":
            return scores.detach()
        if self.flaw == "random":
            return scores + torch.rand(len(images))
        if self.flaw == "shuffled":
            random.shuffle([*prompts])
        if self.flaw == "generator":
            self.calls += 1
            return scores + self.calls * 1e-6
        if self.flaw == "columns" and columns.keys() - {"label"}:
            raise TypeError(f"unexpected {', '.join(columns)}")
        return scores


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("double", r"returns \[4\] float32; this one torch.float64"),
        ("infinite", "are infinite"),
        ("silent", "scores none of four images"),
        ("coarse", "prepared with bfloat16 it cannot score"),
        ("coarse dtype", r"returns \[4\] float32; this one torch.bfloat16"),
        ("scalar", r"returns \[4\] float32; this one torch.float32 \[\]"),
        ("batch", "must not depend on the rest of the batch"),
        ("changes", "changed the images"),
        ("detached", "has no graph"),
        ("random", "must not depend on the"),
        ("shuffled", "drew from Python's global random generator"),
        ("generator", "got two different scores"),
    ],
)
def test_a_broken_reward_is_taught(flaw: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_reward(Flawed(flaw))
    check_reward(Flawed())
    check_reward(Flawed("unscored"))


def test_a_reward_that_stumbles_over_others_columns_is_caught() -> None:
    with pytest.raises(TypeError, match="somebody_elses"):
        check_reward(Flawed("columns"), columns={"label": [0, 1, 2, 3]})


def test_a_reward_that_would_be_trained_is_caught() -> None:
    check_reward(Judge())
    with pytest.raises(AssertionError, match=r"its network would take gradients: call requires_grad_\(False\)"):
        check_reward(Judge(frozen=False))


def flawed(method: str, instead: Callable[..., Any]) -> ToyBackend:
    """The toy with one method that calls `instead(backend, own method, *arguments)`."""

    def called(self: ToyBackend, *args: Any, **kwargs: Any) -> Any:
        return instead(self, partial(getattr(ToyBackend, method), self), *args, **kwargs)

    return type("Flawed", (ToyBackend,), {method: called})("", ToyOptions())


def plus(prediction: Prediction, more: Tensor | float) -> Prediction:
    return replace(prediction, value=prediction.value + more)


def of_the_fake(backend: ToyBackend, state: Sequence[Any]) -> Tensor:
    """Zero, with the fake score's graph."""
    fake = backend.fake_score(*state).value
    return fake - fake.detach()


def without_columns(b: ToyBackend, own: Any, prompts: Sequence[str], **columns: Any) -> Condition:
    return own(prompts)


def of_one_row(b: ToyBackend, own: Any, prompts: Sequence[str], **columns: Any) -> Condition:
    return replace(own(prompts, **columns), tensors={"label": torch.zeros(1, dtype=torch.long)})


def as_the_longest(b: ToyBackend, own: Any, prompts: Sequence[str], **columns: Any) -> Condition:
    label = len(max(prompts, key=len)) % 4
    return replace(own(prompts, **columns), tensors={"label": torch.full((len(prompts),), label)})


def drawn_text(b: ToyBackend, own: Any, prompts: Sequence[str], **columns: Any) -> Condition:
    torch.rand(1)
    return own(prompts, **columns)


def in_another_order(b: ToyBackend, own: Any, role: str) -> dict[str, Any]:
    b.asked = not getattr(b, "asked", False)  # type: ignore[attr-defined]
    return dict(sorted(own(role).items(), reverse=b.asked))  # type: ignore[attr-defined]


def frozen(b: ToyBackend, own: Any, role: str) -> dict[str, Any]:
    return {name: p.requires_grad_(False) for name, p in own(role).items()}


def aliased(b: ToyBackend, own: Any) -> None:
    """All but the first time."""
    if b.residuals["student"].net[-1].weight.any():
        for mine, others in zip(*(b.parameters(role).values() for role in ("reference", "student")), strict=True):
            mine.data = others.data
    else:
        own()


def unmixed(b: ToyBackend, own: Any, *state: Any, guidance: float = 1.0, fake_mix: float = 0.0) -> Prediction:
    return own(*state, guidance=guidance)


def switched(b: ToyBackend, own: Any, *state: Any, guidance: float = 1.0, fake_mix: float = 0.0) -> Prediction:
    return own(*state, guidance=guidance, fake_mix=float(fake_mix > 0))


def overshooting(b: ToyBackend, own: Any, *state: Any, guidance: float = 1.0, fake_mix: float = 0.0) -> Prediction:
    return own(*state, guidance=guidance + (guidance == 3), fake_mix=fake_mix)


def on_the_students_way(b: ToyBackend, own: Any, *asked: Any) -> list[Tensor]:
    return [f + 0 * b.residuals["student"].net[0].weight.sum() for f in own(*asked)]


def anew(b: ToyBackend, own: Any, name: str, **like: Any) -> Mapping[str, Any]:
    b.residuals.pop(name, None)
    found: Mapping[str, Any] = own(name, **like)
    return found


def into_the_fake_score(b: ToyBackend, own: Any, directory: Any) -> None:
    own(directory)
    b.residuals["fake_score"].load_state_dict(b.residuals["student"].state_dict())


@pytest.mark.parametrize(
    ("method", "instead", "message"),
    [
        ("grid", lambda b, own, k: own(k)[:-1], r"grid\(1\) is \[2\] float64"),
        ("grid", lambda b, own, k: own(k).flip(0), "decreases within"),
        ("encode", without_columns, "encode keeps the other columns"),
        ("encode", of_one_row, "have a row per prompt"),
        ("encode", drawn_text, "drew from torch's global random generator"),
        ("parameters", lambda b, own, role: own(role) if role == "student" else {}, r"'fake_score'\) is empty"),
        ("parameters", in_another_order, "in the same order every time"),
        ("parameters", frozen, "of the student must require a gradient"),
        ("parameters", lambda b, own, role: own("student" if role == "fake_score" else role), "is also the student's"),
        ("student", torch.no_grad()(lambda b, own, *x: own(*x)), "without one; the student does not"),
        ("teacher", lambda b, own, *x, **k: plus(own(*x, **k), of_the_fake(b, x)), "the teacher does not"),
        ("student", lambda b, own, *x: replace(own(*x), value=own(*x).value.bfloat16()), "prediction is float32"),
        ("student", lambda b, own, *x: plus(own(*x), torch.nan), "must be finite"),
        ("student", lambda b, own, *x: plus(own(*x), 1e-3), "before training the student is the teacher"),
        ("student", lambda b, own, *x: b.fake_score(*x), "must change its answer alone; changed: none"),
        ("student", lambda b, own, *x: plus(own(*x), of_the_fake(b, x)), "of the student reaches the fake_score"),
        ("reference", torch.no_grad()(lambda b, own, *x: b.student(*x)), "alone; changed: student, reference"),
        ("snapshot", lambda b, own: None, r"after snapshot\(\) the reference is the student"),
        ("snapshot", aliased, r"must keep what snapshot\(\) made it"),
        ("teacher", unmixed, "at fake_mix 1 the teacher is the fake score"),
        ("teacher", switched, "fake_mix is a share"),
        ("teacher", overshooting, r"guidance w is u \+ w \(c - u\)"),
        ("_exact", lambda b, own, *x: own(*x) - own(*x).mean(0), "must not depend on the rest of the batch"),
        ("encode", as_the_longest, "the prediction for a prompt depends on the other prompts that are encoded with it"),
        ("features", lambda b, own, *x: [f[:, 0] for f in own(*x)], r"features are \[B, N, C\] float32"),
        ("features", lambda b, own, *x: [f - f.mean(0) for f in own(*x)], "features depend on the rest of the batch"),
        ("features", lambda b, own, role, *x: own("teacher", *x), "training the fake score must change its features"),
        ("features", lambda b, own, role, *x: own("fake_score", *x), "must not change the teacher's features"),
        ("features", torch.no_grad()(lambda b, own, *x: own(*x)), "of the teacher have no graph into x_t"),
        ("features", lambda b, own, role, x, *y: own(role, x.detach(), *y), "of the teacher have no graph into x_t"),
        ("features", on_the_students_way, "the features of the teacher reach student"),
        ("decode", lambda b, own, x, **k: own(x) * 2, r"images are float32 in \[0, 1\]"),
        ("decode", lambda b, own, x, **k: own(x)[:, :1], r"images are \[B, 3, H, W\]"),
        ("decode", lambda b, own, x, **k: own(x).detach(), "decode must be differentiable"),
        (
            "encode_images",
            lambda b, own, images: own(images)[:, :1],
            r"makes \[B, \*latent\] of what decode makes, \[4, 2\]",
        ),
        ("add_role", anew, "where there is one"),
        ("add_role", lambda b, own, name, **k: own(name, **k) and b.parameters("student"), "misses an added role"),
        ("ask_role", lambda b, own, *x, role, guidance: own(*x, role=role), "is the teacher, also at guidance 3"),
        ("ask_role", lambda b, own, *x, role, guidance: b.teacher(*x, guidance=guidance), "answers with a graph"),
        ("ask_role", lambda b, own, *x, **k: plus(own(*x, **k), of_the_fake(b, x)), "reaches another role"),
        ("export", lambda b, own, *x: own(*x) | {"sigmas": torch.ones(4)}, "for a JSON file"),
        ("snippet", lambda b, own, *x: None, "snippet returns Python code"),
        ("load_export", lambda b, own, directory: None, "must bring back the student"),
        ("load_export", into_the_fake_score, "the fake_score changed"),
    ],
)
def test_a_broken_backend_is_taught(method: str, instead: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_backend(flawed(method, instead), PROMPTS)


def test_an_export_that_writes_nothing_is_caught() -> None:
    class Minded(ToyBackend):
        def export(self, directory: Path, sampler: Sampler) -> Mapping[str, Any]:
            self.exported = {name: p.detach().clone() for name, p in self.parameters("student").items()}
            return {}

        def load_export(self, directory: Path) -> None:
            self.residuals["student"].load_state_dict(getattr(self, "exported", self.parameters("student")))

    with pytest.raises(AssertionError, match="must bring back the student"):
        check_backend(Minded("", ToyOptions()), PROMPTS)


def test_a_family_without_stochastic_steps_is_sound() -> None:
    class Deterministic(ToyBackend):
        def export(self, directory: Path, sampler: Sampler) -> Mapping[str, Any]:
            if sampler.eta:
                raise ConfigError("the scheduler of this family has no noise: pass --sample_eta 0")
            return super().export(directory, sampler)

    check_backend(Deterministic("", ToyOptions()), PROMPTS)
    check_backend(ToyBackend("", ToyOptions()), PROMPTS)


# --- pytest --dmdr-plugin ------------------------------------------------------------------------------------------


MINE = """
from dataclasses import dataclass
from dmdr.backends.toy import Redness
from dmdr.matching import DMD
from dmdr.protocols import Needs
from dmdr.types import Term

@dataclass
class Mine:
    scale: float = 1.0
    needs = Needs(reward_grad=True)

    def __call__(self, draw, ctx):
        scores = ctx.rewards(ctx.backend.decode(draw.leaf), draw.cond.prompts)
        return Term(-self.scale * scores, scores.isfinite())

@dataclass(frozen=True)
class Nearer(DMD):
    floor: float = 1e-3

@dataclass
class Mild:
    edge: float = 2.0
    needs = Needs()

    def __call__(self, draw, direction, ctx):
        scores = ctx.rewards.total(ctx.global_scores()[0])
        weights = 1 + (self.edge - 1) * (scores > scores.nanmedian()).float()
        return (weights / weights.mean())[draw.sample]

@dataclass
class Score(Redness):
    checkpoint: str = ""

    def prepare(self, device, dtype):
        assert self.checkpoint == "here", f"no {self.checkpoint}"
        super().prepare(device, dtype)

    def __call__(self, images, prompts, **columns):
        return super().__call__(images, prompts).double()
"""


def check(pytester: pytest.Pytester, *arguments: str) -> tuple[int, str]:
    """`pytest --dmdr-plugin` in an empty folder: exit code and what is printed."""
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v", *arguments)
    return int(done.ret), str(done.stdout) + str(done.stderr)


def test_each_promise_is_a_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=MINE)
    code, out = check(pytester, "--dmdr-plugin=mine.py:Mine", "--dmdr-option=scale=3.5")
    assert code == 0, out
    assert "gradient_reaches_the_student_only PASSED" in out
    assert "15 passed" in out
    code, out = check(pytester, "--dmdr-plugin=mine.py:Score", "--dmdr-option=checkpoint=here")
    assert code == 1
    assert "a reward returns [4] float32; this one torch.float64 [4]" in out
    assert "Traceback" not in out and "def one_finite" not in out


def test_the_kind_of_a_plugin_in_a_file_is_told(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=MINE)
    names = ("decoupled", "mine.py:Mild", "mine.py:Nearer")
    code, out = check(pytester, *(f"--dmdr-plugin={name}" for name in names), "--dmdr-option=edge=3", "-k", "keyed")
    assert code == 0 and "3 passed" in out and all(f"{name}::random_numbers_are_keyed PASSED" in out for name in names)


UNFIT = """
from dataclasses import dataclass
from dmdr.protocols import Needs

class Nothing: ...

class Plain:
    needs = None
    def __call__(self, draw, ctx): ...

@dataclass
class Picky:
    file: str = ""
    needs = Needs()
    def __post_init__(self): {}[self.file]
    def __call__(self, draw, ctx): ...
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dmdr-plugin=refll"], "is installed (did you mean 'refl'?)"),
        (["--dmdr-plugin=gone.py:Mine"], "no such file"),
        (["--dmdr-plugin=refl", "--dmdr-option=steps"], "--dmdr-option steps is no KEY=VALUE"),
        (
            ["--dmdr-plugin=refl", "--dmdr-option=stepz=3"],
            "'stepz' (did you mean 'steps'?); refl has hinge, kl_beta,",
        ),
        (["--dmdr-plugin=refl", "--dmdr-option=refll.steps=3"], "no --dmdr-plugin is called refll"),
        (["--dmdr-plugin=nft", "--dmdr-option=beta=[3"], "--dmdr-option beta=[3 is no YAML"),
        (["--dmdr-plugin=nft", "--dmdr-option=beta=[3]"], "--dmdr-option beta must be a finite number, not [3]"),
        (["--dmdr-plugin=nft", "--dmdr-option=beta=nan"], "--dmdr-option beta must be a finite number, not nan"),
        (
            ["--dmdr-plugin=refl", "--dmdr-option=steps=2024-01-01"],
            "steps must be 'any', 'last' or a step index, not '2",
        ),
        (["--dmdr-plugin=nft", "--dmdr-option=beta=abc"], "--dmdr-option beta must be a finite number, not 'abc'"),
        (
            ["--dmdr-plugin=odd.py:Picky"],
            "it cannot be built: KeyError: ''; --dmdr-option KEY=VALUE sets its fields: file",
        ),
        (["--dmdr-plugin=toy", "--dmdr-column=label=[1, 2]"], "takes a list of four values"),
        (["--dmdr-plugin=digits"], "this is one of the models, which have no checks"),
        (["--dmdr-plugin=odd.py:Nothing"], "it is no plugin: an objective has `needs`"),
        (["--dmdr-plugin=odd.py:Plain"], "is no dataclass"),
        (["--dmdr-plugin=ToyPipeline"], "name its folder with --dmdr-model"),
    ],
)
def test_a_plugin_that_cannot_be_checked(pytester: pytest.Pytester, arguments: list[str], message: str) -> None:
    pytester.makepyfile(odd=UNFIT)
    code, out = check(pytester, *arguments)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert message in out and "Traceback" not in out and "INTERNALERROR" not in out
    assert "reward 'odd" not in out and "backend 'odd" not in out


ODD = """
from dataclasses import dataclass
from dmdr.protocols import Needs

@dataclass
class Raises:
    needs = Needs()

    def __call__(self, draw, ctx):
        return self.helper(draw)

    def helper(self, draw):
        return draw.leaf.view(7, 99)

@dataclass
class Asserts(Raises):
    def helper(self, draw):
        assert draw.leaf is None

@dataclass
class Method(Raises):
    def needs(self):
        return Needs()

@dataclass
class Captioned:
    differentiable = False
    columns = ("caption",)

    def prepare(self, device, dtype): ...

    def __call__(self, images, prompts, **columns):
        return images.detach().mean((1, 2, 3)) * images.new_tensor([len(text) for text in columns["caption"]])
"""


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("Raises", ["in helper", "return draw.leaf.view(7, 99)", "RuntimeError: shape '[7, 99]' is invalid"]),
        ("Asserts", ["in helper", "assert draw.leaf is None", "AssertionError"]),
        ("Method", ["needs must be a property or an attribute that is a Needs, not method"]),
    ],
)
def test_what_cannot_run_fails_once(pytester: pytest.Pytester, name: str, lines: list[str]) -> None:
    pytester.makepyfile(odd=ODD)
    code, out = check(pytester, f"--dmdr-plugin=odd.py:{name}")
    assert code == 1 and "1 failed, 14 skipped" in out and "it_can_be_called FAILED" in out
    assert all(line in out for line in lines)
    assert "runner.py" not in out and "dmdr/testing" not in out
    assert (
        len(out[out.index("= FAILURES =") :].splitlines()) < 25
    )  # pytest's own heading differs from machine to machine


def test_columns_and_fields_of_several_plugins(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(odd=ODD, mine=MINE)
    _, out = check(pytester, "--dmdr-plugin=odd.py:Captioned")
    assert "TypeError: object of type 'int' has no len()" in out and "1 failed, 8 skipped" in out
    arguments = ["--dmdr-plugin=odd.py:Captioned", "--dmdr-column=caption=[a, bb, c, dd]", "--dmdr-plugin=mine.py:Mine"]
    code, out = check(pytester, *arguments, "--dmdr-option=mine.py:Mine.scale=2", "--dmdr-option=scale=3")
    assert code == 0 and "24 passed" in out, out


TYPED = """
from dataclasses import dataclass
from typing import Literal
from dmdr.protocols import Needs
from dmdr.types import Term

@dataclass
class Typed:
    rate: float = 1.0
    limit: float | None = 2.0
    words: str = ""
    file: str | None = "x"
    when: Literal["yes", "no"] = "no"
    names: list[str] | None = None
    fast: bool = False
    count: int = 0
    needs = Needs(reward=False)

    def __post_init__(self):
        found = (self.rate, self.limit, self.words, self.file, self.when, self.names, self.fast, self.count)
        assert found == (1e-4, None, "null", None, "yes", ["a", "b"], True, 3), found

    def __call__(self, draw, ctx):
        return Term(draw.leaf.square().mean(1))
"""


def test_options_are_read_as_flags_are(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=TYPED)
    given = ["rate=1e-4", "limit=null", "words=null", "file=null", "when=yes", "names=[a, b]", "fast=true", "count=3"]
    options = [f"--dmdr-option={option}" for option in given]
    code, out = check(pytester, "--dmdr-plugin=mine.py:Typed", *options, "-k", "one_finite")
    assert code == 0, out


def test_checks_are_collected(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=MINE)
    _, out = check(pytester, "--dmdr-plugin=mine.py:Mine", "--collect-only", "-q")
    assert "collected 15 items" in out or "mine.py:Mine::declared_needs_are_honest" in out
    code, out = check(pytester, "--dmdr-plugin=mine.py:Mine", "-k", "whole or only_read")
    assert code == 0 and "2 passed, 13 deselected" in out and "mine.py:Mine::whole_training_steps_run PASSED" in out


def test_a_backend_is_checked_on_a_pipeline(pytester: pytest.Pytester) -> None:
    code, out = check(
        pytester, "--dmdr-plugin=ToyPipeline", "--dmdr-model=.", "--dmdr-prompt=mode 1", "--dmdr-prompt=mode 2"
    )
    assert code == 0 and "19 passed" in out, out


DEEP = """
from dataclasses import dataclass
from dmdr.backends.toy import ToyBackend, ToyOptions

@dataclass(frozen=True, kw_only=True)
class DeepOptions(ToyOptions):
    depth: int

class Deep(ToyBackend):
    Options = DeepOptions
"""


def test_a_backends_options_are_given_as_fields(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=DEEP)
    arguments = ("--dmdr-plugin=mine.py:Deep", "--dmdr-model=.", "--dmdr-prompt=mode 1", "-k", "decode")
    code, out = check(pytester, *arguments, "--dmdr-option=depth=3", "--dmdr-option=shift=2.0")
    assert code == 0 and "passed" in out, out
    code, out = check(pytester, *arguments)
    assert code == 4
    assert "it cannot be built: TypeError: " in out
    assert "--dmdr-option KEY=VALUE sets its fields: shift, seed, depth" in out
    code, out = check(pytester, *arguments, "--dmdr-option=depth=deep")
    assert code == 4 and "--dmdr-option depth must be a whole number, not 'deep'" in out
