"""The checks for plugin authors catch what they name, and `pytest --dmdr-plugin` runs them."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dmdr.backends.toy import PROMPTS, Redness, ToyBackend
from dmdr.errors import ConfigError, TrainingError
from dmdr.paths import Prediction
from dmdr.protocols import BackendOptions, Context, Needs
from dmdr.testing import check_backend, check_objective, check_reward
from dmdr.types import Condition, Draw, Term
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
        (lambda d, c: Term(climb(d, c).half()), {}, r"float32 or float64, not \[4\] torch.float16"),
        (lambda d, c: Term(climb(d, c) / 0.0), {}, "must be finite for every valid sample"),
        (lambda d, c: Term(climb(d, c), valid=torch.ones(3, dtype=torch.bool)), {}, r"Term.valid must be \[4\] bool"),
        (
            lambda d, c: Term(climb(d, c), metrics={"odd": torch.zeros(3)}),
            {},
            r"metric 'odd' must be a number or \[4\]",
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
            lambda d, c: Term(d.leaf.sum(1) * d.direction.sum(1)),
            {"reward_grad": False},
            "draw.direction: declare matching=True",
        ),
        (
            lambda d, c: Term(d.leaf.sum(1) + d.rollout.log_prob[0]),
            {"reward_grad": False},
            "rollout.log_prob: declare log_prob=True",
        ),
        (referring, {}, "the reference: add it to roles"),
        (lambda d, c: Term(c.backend.student(d.x_t, d.t, d.cond).x0.sum(1)), {}, "no gradient arrives at draw.leaf"),
        (lambda d, c: Term(climb(d, c) - climb(d, c).mean()), {}, "which other groups share its micro-batch"),
        (noisy, {}, "drew from torch's global random generator"),
        (drawing_elsewhere, {}, "drew from numpy's global random generator"),
        (drawing_in_python, {}, "drew from Python's global random generator"),
        (everything_valid, {}, "say in Term.valid which samples count"),
        (without_valid, {"steps": "last"}, "say in Term.valid which samples count"),
        (without_valid, {"steps": (4,)}, "names none of the 4 student steps"),
        (paired, {}, "declare reward_grad=True|on micro-batches of 1 of 16 samples"),
        (changing, {}, r"changed draw.rollout.x0 in place"),
        (learning_itself, {}, "ran backward into draw.leaf itself"),
        (own_parameters, {}, "its gradient in the student's parameters"),
        (
            lambda d, c: Term(d.leaf.sum(1) + d.rollout.log_prob[0] * d.direction.sum(1)),
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


def test_a_pure_regulariser_is_an_objective() -> None:
    check_objective(objective(to_the_reference, reward=False, roles=("reference",)))


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
        if self.flaw == "unjudged":  # no flaw
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
        ("silent", "judges none of four images"),
        ("coarse", "prepared with bfloat16 it cannot judge"),
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
    check_reward(Flawed("unjudged"))


def test_a_reward_that_stumbles_over_others_columns_is_caught() -> None:
    with pytest.raises(TypeError, match="somebody_elses"):
        check_reward(Flawed("columns"), columns={"label": [0, 1, 2, 3]})


def test_a_reward_that_would_be_trained_is_caught() -> None:
    check_reward(Judge())
    with pytest.raises(AssertionError, match=r"its network would take gradients: call requires_grad_\(False\)"):
        check_reward(Judge(frozen=False))


class Lopsided(ToyBackend):
    """A family with one flaw."""

    def __init__(self, flaw: str) -> None:
        super().__init__("", BackendOptions())
        self.flaw = flaw

    def student(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        role = "fake_score" if self.flaw == "role" else "student"
        return self._predict(x_t, t, cond, role)  # type: ignore[arg-type]

    def teacher(self, *args: Any, guidance: float = 1.0, fake_mix: float = 0.0) -> Prediction:
        return super().teacher(
            *args, guidance=guidance + (self.flaw == "guidance") * (guidance == 3), fake_mix=fake_mix
        )

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        return super().decode(latents) * (2 if self.flaw == "range" else 1)

    def grid(self, num_inference_steps: int) -> Tensor:
        return super().grid(num_inference_steps)[:-1] if self.flaw == "grid" else super().grid(num_inference_steps)


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("role", "the gradient of the student misses the student"),
        ("guidance", r"guidance w is u \+ w \(c - u\)"),
        ("range", r"images are float32 in \[0, 1\]"),
        ("grid", r"grid\(1\) is \[2\] float64"),
    ],
)
def test_a_broken_backend_is_taught(flaw: str, message: str) -> None:
    check_backend(Lopsided(""), PROMPTS)
    with pytest.raises(AssertionError, match=message):
        check_backend(Lopsided(flaw), PROMPTS)


# --- pytest --dmdr-plugin ------------------------------------------------------------------------------------------


MINE = """
from dataclasses import dataclass
from dmdr.backends.toy import Redness
from dmdr.protocols import Needs
from dmdr.types import Term

@dataclass
class Mine:
    scale: float = 1.0
    needs = Needs(reward_grad=True)

    def __call__(self, draw, ctx):
        scores = ctx.rewards(ctx.backend.decode(draw.leaf), draw.cond.prompts)
        return Term(-self.scale * scores, scores.isfinite())

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
    assert "10 passed" in out
    code, out = check(pytester, "--dmdr-plugin=mine.py:Score", "--dmdr-option=checkpoint=here")
    assert code == 1
    assert "a reward returns [4] float32; this one torch.float64 [4]" in out
    assert "Traceback" not in out and "def one_finite" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dmdr-plugin=refll"], "is installed (did you mean 'refl'?)"),
        (["--dmdr-plugin=gone.py:Mine"], "no such file"),
        (["--dmdr-plugin=refl", "--dmdr-option=steps"], "--dmdr-option steps is no KEY=VALUE"),
        (["--dmdr-plugin=refl", "--dmdr-option=stepz=3"], "'stepz' (did you mean 'steps'?); refl has balance, hinge"),
        (["--dmdr-plugin=refl", "--dmdr-option=refll.steps=3"], "no --dmdr-plugin is called refll"),
        (["--dmdr-plugin=refl", "--dmdr-option=steps=[3"], "--dmdr-option steps=[3 is no YAML"),
        (["--dmdr-plugin=refl", "--dmdr-option=steps=3"], "it cannot be built: AttributeError"),
        (["--dmdr-plugin=toy", "--dmdr-column=label=[1, 2]"], "takes a list of four values"),
        (["--dmdr-plugin=decoupled"], "this is one of the matchings; only objectives, rewards, backends have checks"),
        (["--dmdr-plugin=digits"], "this is one of the models"),
        (["--dmdr-plugin=odd.py:Nothing"], "it has no `needs` as an objective has"),
        (["--dmdr-plugin=odd.py:Plain"], "is no dataclass"),
        (["--dmdr-plugin=ToyPipeline"], "name its folder with --dmdr-model"),
    ],
)
def test_a_plugin_that_cannot_be_checked(pytester: pytest.Pytester, arguments: list[str], message: str) -> None:
    pytester.makepyfile(
        odd="class Nothing: ...\nclass Plain:\n    needs = None\n    def __call__(self, draw, ctx): ..."
    )
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
    assert code == 1 and "1 failed, 9 skipped" in out
    assert all(line in out for line in lines)
    assert "runner.py" not in out and "dmdr/testing" not in out
    assert len(out.splitlines()) < 40


def test_columns_and_fields_of_several_plugins(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(odd=ODD, mine=MINE)
    _, out = check(pytester, "--dmdr-plugin=odd.py:Captioned")
    assert "TypeError: object of type 'int' has no len()" in out and "1 failed, 7 skipped" in out
    arguments = ["--dmdr-plugin=odd.py:Captioned", "--dmdr-column=caption=[a, bb, c, dd]", "--dmdr-plugin=mine.py:Mine"]
    code, out = check(pytester, *arguments, "--dmdr-option=mine.py:Mine.scale=2", "--dmdr-option=scale=3")
    assert code == 0 and "18 passed" in out, out


def test_checks_are_collected(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(mine=MINE)
    _, out = check(pytester, "--dmdr-plugin=mine.py:Mine", "--collect-only", "-q")
    assert "collected 10 items" in out or "mine.py:Mine::declared_needs_are_honest" in out
    code, out = check(pytester, "--dmdr-plugin=mine.py:Mine", "-k", "whole or only_read")
    assert code == 0 and "2 passed, 8 deselected" in out and "mine.py:Mine::whole_training_steps_run PASSED" in out


def test_a_backend_is_checked_on_a_pipeline(pytester: pytest.Pytester) -> None:
    code, out = check(
        pytester, "--dmdr-plugin=ToyPipeline", "--dmdr-model=.", "--dmdr-prompt=mode 1", "--dmdr-prompt=mode 2"
    )
    assert code == 0 and "8 passed" in out, out
