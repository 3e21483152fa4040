"""ca_advantage: with matching, dm + (1 + weight A) ca, and what it is refused for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr import train
from dmdr.backends.toy import PROMPTS
from dmdr.errors import ConfigError, TrainingError
from dmdr.groups import advantages
from dmdr.matching import DMD
from dmdr.protocols import Matching, Needs
from dmdr.types import Direction, Draw
from dmdr_ac_dmd import ACDMD
from dmdr_decoupled import Decoupled
from dmdr_decoupled.advantage import CAAdvantage
from toy_trainer import Constant, DoubleToy, Plain, prepared, step_of, trainer

GUIDED: dict[str, Any] = {"guidance": (2.0, 3.0), "batch": 8, "group_size": 4}


@dataclass(frozen=True)
class Weighted:
    """A matching whose `ca` is multiplied by 1 + factor, [N], after the normaliser."""

    of: Any
    factor: Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def direction(self, draw: Draw, *args: Any) -> Direction:
        found = self.of.direction(draw, *args)
        return Direction(found.parts["dm"] + (1 + self.factor[draw.sample, None]) * found.parts["ca"])


@pytest.mark.parametrize("micro_batch", [8, 4])
@pytest.mark.parametrize("matching", [DMD(), Decoupled(), ACDMD()])
def test_with_the_matching_the_guidance_is_weighted(matching: Matching, micro_batch: int) -> None:
    """The student's step is that of a matching with dm + (1 + weight A) ca, also where the anchor is not x0."""
    settings: dict[str, Any] = {**GUIDED, "eta": 0.7, "micro_batch": micro_batch}
    found = step_of(
        trainer(
            prepared(DoubleToy),
            matching=matching,
            objectives=[(0.5, CAAdvantage(scale_rewards="group"))],
            rl_weight=0.6,
            rewards=Plain(),
            **settings,
        )
    )
    by_hand: Any = Weighted(matching, 0.0 * torch.ones(8))
    plain = step_of(trainer(prepared(DoubleToy), matching=by_hand, **settings))
    running = trainer(prepared(DoubleToy), matching=matching, rewards=Plain(), **settings)
    ((ctx, _),) = running.draws(noted=True)
    scores, group = ctx.global_scores()
    by_hand = Weighted(matching, 0.3 * advantages(scores, {"toy": 1.0}, group, "group")[0])
    expected = step_of(trainer(prepared(DoubleToy), matching=by_hand, **settings))
    assert (expected - plain).norm() > 0.05 * plain.norm()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # of float32: weight over the batch


def test_equal_rewards_leave_the_matching_as_it_is() -> None:
    plain = step_of(trainer(prepared(DoubleToy), **GUIDED))
    running = trainer(prepared(DoubleToy), objectives=[CAAdvantage()], rewards=Constant(), **GUIDED)
    assert torch.equal(step_of(running), plain)


def test_images_without_a_score_do_not_count() -> None:
    rewards = Plain({PROMPTS[1]: float("nan")})
    running = trainer(prepared(DoubleToy), objectives=[CAAdvantage()], rewards=rewards, **GUIDED)
    line = running.train_step()
    assert (line["caadvantage/invalid"], line["caadvantage/coverage"]) == (4, 0.5)
    assert line["caadvantage/advantage"] > 0


def test_a_balanced_run_holds_the_ratio_of_the_norms() -> None:
    running = trainer(
        prepared(DoubleToy), objectives=[CAAdvantage()], rewards=Plain(), rl_weight=0.4, balances=True, **GUIDED
    )
    assert running.train_step()["rl_ratio/caadvantage"] == pytest.approx(0.4)


def test_its_settings_are_those_of_the_advantages() -> None:
    assert CAAdvantage().needs == Needs(group_size=2, matching=True, parts=("ca",))
    running = trainer(prepared(DoubleToy), rewards=Plain(), **GUIDED)
    networks = running.backend.teacher, running.backend.fake_score
    ((ctx, draw),) = running.draws(noted=True)
    draw = replace(draw, direction=running.matching.direction(draw, *networks, ctx))
    draw = replace(draw, leaf=draw.x0.detach().requires_grad_())
    scores, group = ctx.global_scores()
    for scale in ("group", "batch", "none"):
        term = CAAdvantage(scale_rewards=scale)(draw, ctx)
        wanted, _ = advantages(scores, {"toy": 1.0}, group, scale)
        torch.testing.assert_close(term.metrics["advantage"], wanted.abs(), rtol=0, atol=0)
        (grad,) = torch.autograd.grad(term.loss.sum(), draw.leaf)
        assert draw.direction is not None
        torch.testing.assert_close(grad, wanted[:, None] * draw.direction.parts["ca"] / 2, rtol=1e-12, atol=0)


TOTAL_ONLY = """
from dataclasses import dataclass
from dmdr.matching import DMD
from dmdr.types import Direction

@dataclass(frozen=True)
class Total(DMD):
    parts = ()

    def direction(self, *args):
        return Direction(super().direction(*args).total)

@dataclass(frozen=True)
class Untrue(DMD):
    def direction(self, *args):
        return Direction(super().direction(*args).total)
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 1.0}, "--rl ca_advantage reads what guidance adds to the matching gradient: it needs "),
        ({"matching": "total.py:Total"}, "reads the part 'ca' of directions, and --matching total.py:Total has none"),
        ({"num_generations": 1}, "--rl ca_advantage needs --num_generations of at least 2"),
        ({"matching": "total.py:Untrue"}, "the matching's direction has no part 'ca'"),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "total.py").write_text(TOTAL_ONLY)
    given: dict[str, Any] = {"model": "toy", "rl": "ca_advantage", "num_generations": 2, "guidance_scale": 2.0}
    given |= {"stage1_steps": 0, "stage2_steps": 1, "report_to": "none", "per_device_train_batch_size": 4}
    with pytest.raises((ConfigError, TrainingError), match=message):
        train(**given | settings, output_dir="run")
