"""The plan of a run: its batch, lengths and schedules, from settings alone; and what of them a run logs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dmdr.errors import ConfigError
from dmdr.run.job import assemble, planned
from dmdr.run.observer import Observer
from dmdr.run.plan import Plan
from dmdr.run.run import train
from dmdr.settings.parse import parse, resolve
from dmdr.times import Beta, LogitNormal, Uniform

FEW: dict[str, Any] = {
    "model": "toy",
    "rl": "0.5*refl",
    "reward": "toy",
    "stage1_steps": 1,
    "stage2_steps": 6,
    "rl_weight": 0.6,
    "per_device_train_batch_size": 4,
    "fake_updates": 1,
    "logging_steps": 1,
    "sample_steps": 0,
    "sample_images": 1,
    "teacher_steps": 1,
    "report_to": "none",
}
pytestmark = pytest.mark.usefixtures("no_report")


def plan(processes: int = 1, **settings: Any) -> Plan:
    return planned(resolve(settings=FEW | settings), processes)[0]


# --- Batch and lengths ----------------------------------------------------------------------------------------------


def test_the_batch_is_of_all_processes() -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_generations": 2}
    batch = plan(2, **settings).batch
    assert (batch.micro, batch.accumulated, batch.processes, batch.group, batch.whole) == (4, 3, 2, 2, 24)
    assert str(batch) == "24 images (4 a pass x 3 passes x 2 processes), 2 of each prompt"
    assert str(plan().batch) == "4 images (4 a pass), 1 of each prompt"


def test_an_objective_that_compares_a_batch_counts_all_processes() -> None:
    alone = {"rl": "rwr", "per_device_train_batch_size": 1}
    with pytest.raises(ConfigError, match="--per_device_train_batch_size of at least 2 in all processes together, not"):
        plan(1, **alone)
    assert plan(2, **alone).batch.whole == 2


def test_rounds_updates_and_rollouts() -> None:
    def of(**settings: Any) -> tuple[bool, int, int, int, int]:
        found = plan(fake_updates=5, **settings)
        return found.matches, found.rounds, found.rollouts, found.updates, found.batches_read

    assert of(stage1_steps=7, stage2_steps=6) == (True, 5, 2, 13, 26)
    assert of(stage1_steps=7, stage2_steps=6, rollouts=5) == (True, 5, 5, 13, 65)
    assert of(stage1_steps=7, init_student="x") == (True, 5, 2, 6, 12)  # which needs no stage 1
    assert of(dmd_weight=0.0, init_student="x") == (False, 1, 1, 6, 6)  # there is no fake score to catch up
    assert plan(fake_updates=1).rollouts == 1
    assert plan(fake_updates=5, num_inference_steps=1).rollouts == 5  # of one step, there are no others to share
    assert plan(fake_updates=5, timesteps=[400], rollouts=2).rollouts == 2


def test_steps_of_the_student_and_the_teachers_guidance() -> None:
    assert (plan().num_inference_steps, plan().times) == (4, None)
    assert (plan(sigmas=[1.0, 0.5]).num_inference_steps, plan(sigmas=[1.0, 0.5]).times) == (2, (1.0, 0.5))
    told = plan(timesteps=[999, 500, 250])
    assert (told.num_inference_steps, told.times) == (3, (0.999, 0.5, 0.25))
    assert plan(guidance_scale=4.0, guidance_jitter=0.5).guidance == (3.5, 4.5)
    assert plan(guidance_scale=1.0, guidance_jitter=0.5).guidance == (1.0, 1.0)


def test_roles_are_those_that_objectives_need() -> None:
    assert plan().roles == ("student", "fake_score")
    groups = {"num_generations": 2, "rl": "grpo+0.1*dpo"}
    assert plan(**groups, grpo_beta=0.1).roles == ("student", "fake_score", "reference")


# --- Stages ---------------------------------------------------------------------------------------------------------


def test_each_stage_has_what_is_its_own() -> None:
    settings = {"stage1_steps": 4, "learning_rate": 1e-3, "fake_learning_rate": 2e-3, "stage2_learning_rate": None}
    decay = {"lr_scheduler_type": "linear", "warmup_steps": 1}
    first, second = plan(**settings, **decay, dyna_steps=2, dyna_guidance=0.5, dyna_renoise=[3.0, 2.0]).stages
    assert [(stage.number, stage.steps, stage.first_step) for stage in (first, second)] == [(1, 4, 0), (2, 6, 4)]

    assert [first.learning_rate(step) for step in range(4)] == pytest.approx([5e-4, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    half = [2.5e-4, *(5e-4 * (1 - step / 5) for step in range(5))]  # half the rate, over the six steps of its own
    assert [second.learning_rate(step) for step in range(6)] == pytest.approx(half)
    for stage in (first, second):
        assert [stage.fake_learning_rate(step) for step in (0, 3)] == [2e-3, 2e-3]
        assert stage.dmd_weight(0) == 1

    assert first.objectives == () and [first.rl_weight(step) for step in range(4)] == [0] * 4
    assert [(term.name, term.weight) for term in second.objectives] == [("refl", 0.5)]
    assert second.rl_weight(5) == 0.6
    assert type(first.sample_weight).__name__ == "RewardTilt" and second.sample_weight is None

    assert [first.fake_mix(step) for step in range(3)] == pytest.approx([0.5, 0.25, 0])
    assert [first.renoise(step) for step in (0, 2)] == [Beta(3, 2), Beta(1, 1)]
    assert second.fake_mix(0) == 0 and second.renoise(0) == Beta(1, 1)


def test_renoise_times_follow_the_chosen_law_in_both_stages() -> None:
    laws = {
        "shifted": (Beta(4, 1.5, True), Beta(1, 1, True), "DynaRS for 4, shifted renoise times"),
        "uniform": (Uniform(), Uniform(), "uniform renoise times"),
        "logit_normal": (LogitNormal(0.5, 2), LogitNormal(0.5, 2), "logit-normal (0.5, 2) renoise times"),
    }
    for name, (start, end, text) in laws.items():
        own = {"logit_mean": 0.5, "logit_std": 2.0} if name == "logit_normal" else {}
        first, second = plan(renoise_times=name, dyna_guidance=0.0, stage1_steps=4, **own).stages
        assert [first.renoise(0), first.renoise(4), second.renoise(0)] == [start, end, end]
        assert str(first).endswith(text)


def test_rates_of_stage_2_may_be_its_own() -> None:
    _, second = plan(stage2_learning_rate=3e-4, stage2_fake_learning_rate=4e-4).stages
    assert (second.learning_rate(0), second.fake_learning_rate(0)) == (3e-4, 4e-4)


def test_stages_without_updates_are_left_out() -> None:
    assert [stage.number for stage in plan().stages] == [1, 2]
    assert [stage.number for stage in plan(stage2_steps=0).stages] == [1]
    for settings in ({"stage1_steps": 0}, {"init_student": "x"}):
        (stage,) = plan(**settings).stages
        assert (stage.number, stage.steps, stage.first_step) == (2, 6, 0)


def test_what_is_switched_off_is_not_there() -> None:
    assert plan(rl_weight=0.0).stages[1].objectives == ()
    for settings in ({"reward_tilt": 0.0}, {"sample_weight": "none"}):
        assert plan(**settings).stages[0].sample_weight is None
    assert plan(rl="none", reward="none").stages[0].sample_weight is None


def test_a_full_fake_score_has_no_adapter_to_mix_into_the_teacher(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    for fake, mix in (("lora", 0.25), ("full", 0.0)):
        stage, _ = plan(model=str(tmp_path), fake_score=fake, prompts="prompts.txt").stages
        assert stage.fake_mix(0) == mix and stage.renoise(0) == Beta(4.0, 1.5)
        assert ("DynaDG" in str(stage)) == (fake == "lora")


def test_a_stage_says_what_it_does() -> None:
    first, second = plan(rl_weight_schedule="cosine", rl_warmup_steps=2, stage2_learning_rate=1e-4).stages
    assert str(first) == "1 update, learning rate 0.001, matching x 1, DynaDG for 1, DynaRS for 1"
    assert (
        str(second) == "6 updates, learning rate 0.0001, matching x 1, RL (0.5 refl) x 0.6, warm-up of 2, cosine to 0"
    )


# --- The weight of the objectives over a run ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"rl_warmup_steps": 2}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ({"rl_weight_schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"rl_weight_schedule": "linear", "rl_warmup_steps": 2}, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        (
            {"rl_weight_schedule": "cosine", "rl_warmup_steps": 2},
            [1 / 3, 2 / 3, *((1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))],
        ),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_weight_of_an_objective_follows_its_schedule(
    tmp_path: Path, settings: dict[str, Any], share: list[float]
) -> None:
    folder = train(**FEW | settings, output_dir=str(tmp_path / "run"), save_steps=4, save_total_limit=None)

    def weights() -> list[float | None]:
        lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
        return [line.get("refl/weight") for line in lines]

    logged = weights()
    assert logged[0] is None  # stage 1 has no objective
    assert logged[1:] == pytest.approx([0.6 * 0.5 * part for part in share])
    train(**FEW | settings, resume_from_checkpoint=str(folder / "checkpoints" / "step-000004"))
    assert weights() == logged


def test_the_teacher_is_sampled_at_its_own_times() -> None:
    """Whatever the shift of the student's."""
    job = assemble(parse(settings={"model": "toy", "shift": 3.0, "teacher_steps": 5}))
    _, sampler = Observer(job, None, Path()).teacher()
    assert sampler.t.tolist() == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert job.sampler.t[1] > 0.8


def test_a_sampler_that_a_family_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"--sample_eta 0\.5: this model family supports 0 and 1 only"):
        assemble(parse(settings=FEW | {"sde_type": "ddim", "eta": 0.9, "sample_eta": 0.5}))
    with pytest.raises(ConfigError, match="this model family supports"):  # where training needs no sde_type
        assemble(parse(settings=FEW | {"sde_type": "ddim", "eta": 0.0, "sample_eta": 0.5}))


def test_needs_that_only_objectives_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("asking.py").write_text(
        "from dataclasses import dataclass\nfrom dmdr.matching import DMD\nfrom dmdr.protocols import Needs\n\n"
        '@dataclass(frozen=True)\nclass Asking(DMD):\n    needs = Needs(reward=False, roles=("reference",))\n'
    )
    with pytest.raises(ConfigError, match=r"--matching asking\.py:Asking: needs of roles are for objectives"):
        plan(matching="asking.py:Asking")
