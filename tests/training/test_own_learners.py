"""Learners that objectives bring: trained by their own losses alone, saved, resumed, and refused if nothing does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dmdr import train
from dmdr.errors import ConfigError, TrainingError
from toy_trainer import Critic, Plain, flat, state, step_of, trainer

CRITIC = """
from toy_trainer import Critic as Base
from dataclasses import dataclass

@dataclass
class Critic(Base):
    pass

@dataclass
class Greedy(Base):
    def learners(self, backend, device):
        (own,) = super().learners(backend, device)
        return [type(own)("student", own.parameters, own.learning_rate)]
"""
RUN: dict[str, Any] = {
    "model": "toy",
    "stage1_steps": 1,
    "stage2_steps": 6,
    "per_device_train_batch_size": 8,
    "fake_updates": 1,
    "logging_steps": 1,
    "sample_steps": 0,
    "sample_images": 2,
    "teacher_steps": 2,
    "report_to": "none",
    "save_steps": 3,
    "save_total_limit": None,
}


def test_a_term_that_trains_a_learner_trains_nothing_else() -> None:
    """Its gradient is that of a mean over the valid samples, whatever the objective weighs; other terms spare it."""
    found = {}
    for weight in (1.0, 3.0):
        critic = Critic()
        running = trainer(objectives=[critic], rewards=Plain(), rl_weight=weight, dmd_weight=0.0)
        before = critic.head.weight.detach().clone()
        by_hand = trainer(rewards=Plain())
        ctx = by_hand.context(0)
        draw = by_hand.rollouts.pick(by_hand.rollouts.whole(ctx), ctx)
        error = (critic.head(draw.rollout.final)[:, 0] - ctx.rewards.total(ctx.scores(draw.rollout))) ** 2  # type: ignore[union-attr]
        (expected,) = torch.autograd.grad(error.mean(), [critic.head.weight])
        running.train_step()
        found[weight] = before - critic.head.weight.detach()  # one step of plain gradient descent at rate 1
        torch.testing.assert_close(found[weight], expected, rtol=1e-5, atol=1e-7)
    assert found[1.0].abs().max() > 0


def test_each_learner_has_a_denominator_and_metrics_of_its_own() -> None:
    """The critic learns from even samples; the student's mean is over all of them."""
    whole, even = (trainer(objectives=[Critic(flaw)], rewards=Plain(), dmd_weight=0.0) for flaw in ("", "even"))
    before = [running.objectives.own["critic"][0].parameters["bias"].detach().clone() for running in (whole, even)]
    by_hand = trainer(rewards=Plain())
    ctx = by_hand.context(0)
    draw = by_hand.rollouts.pick(by_hand.rollouts.whole(ctx), ctx)
    guess = draw.rollout.final @ torch.tensor([0.1, -0.2])
    gap = guess - ctx.rewards.total(ctx.scores(draw.rollout))
    lines = [running.train_step() for running in (whole, even)]
    found = [
        old - r.objectives.own["critic"][0].parameters["bias"] for old, r in zip(before, (whole, even), strict=True)
    ]
    torch.testing.assert_close(found[0], 2 * gap.mean()[None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], 2 * gap[::2].mean()[None], rtol=1e-5, atol=1e-6)
    assert torch.equal(flat(state(whole)), flat(state(even)))
    assert lines[1]["critic/critic/error"] == pytest.approx((gap[::2] ** 2).mean().item(), rel=1e-5)
    assert lines[1]["loss/critic/critic"] == pytest.approx((gap[::2] ** 2).mean().item(), rel=1e-5)
    assert lines[0]["loss/critic"] == lines[1]["loss/critic"]


def test_a_loss_scaler_that_changes_changes_no_gradient() -> None:
    """It does so after each update; the learners of one backward pass are unscaled by one scale."""
    found = []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1, enabled=enabled)
        running = trainer(objectives=[Critic()], rewards=Plain(), scaler=scaler)
        for _ in range(2):
            running.train_step()
        found.append(flat({k: p.detach() for k, p in running.learners["critic"].parameters.items()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_the_student_learns_from_the_other_terms_alone() -> None:
    with_critic = step_of(trainer(objectives=[Critic()], rewards=Plain(), dmd_weight=0.0))
    # d (-w . x0) / d x0 = -w for each sample: the same as of a reward that is linear in x0
    running = trainer(dmd_weight=0.0)
    ctx = running.context(0)
    draw = running.rollouts.pick(running.rollouts.whole(ctx), ctx)
    x0 = running.backend.student(draw.x_t, draw.t, draw.cond).x0
    loss = -(x0 @ torch.tensor([0.1, -0.2])).mean()
    expected = torch.autograd.grad(loss, list(running.student.parameters.values()))
    torch.testing.assert_close(-with_critic, torch.cat([grad.flatten() for grad in expected]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        (
            "idle",
            "objective 'critic': its learner 'critic' got no gradient; is there a detach",
        ),
        (
            "attached",
            "objective 'critic': the loss of its learner 'critic' reaches the student: detach",
        ),
        ("stranger", "objective 'critic': Term.trains names 'nobody', but its learners are critic"),
    ],
)
def test_a_flaw_is_named(flaw: str, said: str) -> None:
    running = trainer(objectives=[Critic(flaw)], rewards=Plain())
    before = flat(state(running))
    with pytest.raises(TrainingError, match=said):
        running.train_step()
    assert flaw == "idle" or torch.equal(flat(state(running)), before)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> Path:
    (tmp_path / "mine.py").write_text(CRITIC)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_saved_and_resumed_to_the_same_bits(room: Path) -> None:
    settings = RUN | {"rl": "mine.py:Critic"}
    whole = train(**settings, output_dir="whole")
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000003", "step-000006", "step-000007"]
    first, middle, last = (load_file(whole / "checkpoints" / name / "critic.safetensors") for name in names[1:])
    assert not (whole / "checkpoints" / names[0] / "critic.safetensors").exists()  # stage 1 has no objectives
    assert not torch.equal(first["weight"], middle["weight"])
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm/critic"] > 0 for line in lines if line["stage"] == 2)
    again = train(**settings, output_dir="again", resume_from_checkpoint=str(whole / "checkpoints" / names[1]))
    resumed = load_file(again / "checkpoints" / names[-1] / "critic.safetensors")
    for key, value in last.items():
        assert torch.equal(resumed[key], value)
    for role in ("student", "fake_score"):
        ours, theirs = (load_file(run / "checkpoints" / names[-1] / f"{role}.safetensors") for run in (whole, again))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_taken_name_is_refused(room: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner 'student' of objective 'mine\.py:Greedy': the name is taken"):
        train(**RUN | {"rl": "mine.py:Greedy"}, output_dir="greedy")
    assert not (room / "greedy").exists()


def test_an_optimizer_that_finds_the_learning_rate_takes_none(room: Path) -> None:
    pytest.importorskip("prodigyopt")
    rates = dict.fromkeys(("learning_rate", "stage2_learning_rate", "fake_learning_rate"), 1.0)
    with pytest.raises(ConfigError, match=r"learner 'critic' of .*Critic' has a learning rate of its own, and --optim"):
        train(**RUN | rates, rl="mine.py:Critic", optim="prodigy", output_dir="run")
    assert not (room / "run").exists()
