"""Settings that others leave unread, refused where they are typed; and settings that undo each other."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmdr.errors import ConfigError
from dmdr.settings import unread
from dmdr.settings.fields import Config
from dmdr.settings.parse import parse

# What a run reads whatever the others say. The teacher's image grid is drawn in every run, and one of the student.
ALWAYS = """
    model prompts dmd_weight stage2_steps init_student sigmas timesteps eta sample_eta guidance_scale
    stage2_learning_rate lr_scheduler_type warmup_steps optim adam_beta1 adam_beta2 adam_epsilon weight_decay ema_decay
    max_grad_norm max_bad_steps per_device_train_batch_size gradient_accumulation_steps num_generations mixed_precision
    backend revision seed dry_run output_dir resume_from_checkpoint save_steps save_total_limit logging_steps report_to
    sample_steps sample_images validation_prompts num_eval_samples teacher_steps push_to_hub shard ddp_timeout
"""
ALONE = {"init_student": "run"}
NO_DYNA = "where neither DynaDG nor DynaRS acts"
RL_ONLY = ALONE | {"dmd_weight": 0.0, "rl": "refl"}
CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # the others, what they leave unread, and why
    ({}, {"prompt_column": "text"}, "without --prompts"),
    ({}, {"real_images": "photos"}, "by any part of the run"),
    ({}, {"caption_column": "text"}, "without --real_images (that of --prompts is --prompt_column)"),
    ({}, {"rl_balance": "grad_norm"}, "with --rl none"),
    ({"reward": "none", "sample_weight": "none"}, {"reward_dtype": "bf16"}, "without a reward"),
    ({}, {"dataset_config": "a"}, "without --prompts"),
    ({}, {"dataset_train_split": "test"}, "without --prompts"),
    ({}, {"dataset_streaming": True}, "without --prompts"),
    ({"rl": "none"}, {"rl_weight": 2.0}, "with --rl none"),
    ({"rl": "none"}, {"rl_weight_schedule": "linear"}, "with --rl none"),
    ({"rl": "none"}, {"rl_warmup_steps": 3}, "with --rl none"),
    ({"rl_weight": 0.0}, {"rl": "refl"}, "with --rl_weight 0"),
    (RL_ONLY, {"matching": "ac_dmd"}, "with --dmd_weight 0"),
    (RL_ONLY, {"dmd_floor": 0.1}, "with --dmd_weight 0"),
    (RL_ONLY, {"fake_updates": 2}, "with --dmd_weight 0"),
    (RL_ONLY, {"fake_learning_rate": 0.1}, "with --dmd_weight 0"),
    (RL_ONLY, {"stage2_fake_learning_rate": 0.1}, "with --dmd_weight 0"),
    *(
        ({"matching": "ladd"}, {name: value}, "by --matching ladd, which has no fake score")
        for name, value in {
            **dict.fromkeys(["fake_learning_rate", "stage2_fake_learning_rate"], 0.1),
            "dyna_steps": 3,
            "dyna_guidance": 0.1,
            "dyna_renoise": [2.0, 1.0],
        }.items()
    ),
    (ALONE, {"reward": "2*toy"}, "without RL, sample weights and evaluation"),
    ({"sample_weight": "none"}, {"reward": "clip"}, "without RL, sample weights and evaluation"),
    ({"reward_tilt": 0.0}, {"reward": "clip"}, "without RL, sample weights and evaluation"),
    ({"stage1_steps": 0}, {"dyna_steps": 3}, "with --stage1_steps 0"),
    ({"stage1_steps": 0}, {"sample_weight": "my.py:W"}, "with --stage1_steps 0"),
    ({"stage1_steps": 0}, {"rt_dm_reward_tilt": 2.0}, "with --stage1_steps 0"),
    (ALONE, {"stage1_steps": 7}, "with --init_student, which skips stage 1"),
    (ALONE, {"dyna_renoise": [2.0, 1.0]}, "with --init_student, which skips stage 1"),
    ({"stage2_steps": 0}, {"rl": "refl"}, "with --stage2_steps 0"),
    ({"stage2_steps": 0}, {"stage2_learning_rate": 0.1}, "with --stage2_steps 0"),
    (ALONE | {"stage2_learning_rate": 0.1}, {"learning_rate": 0.1}, "without stage 1 and with --stage2_learning_rate"),
    (
        ALONE | {"stage2_fake_learning_rate": 0.1},
        {"fake_learning_rate": 0.1},
        "without stage 1 and with --stage2_fake_learning_rate",
    ),
    ({"dyna_steps": 0}, {"dyna_guidance": 0.5}, "with --dyna_steps 0"),
    (
        {"dyna_guidance": 0.0, "dyna_renoise": [1, 1]},
        {"dyna_steps": 3},
        NO_DYNA,
    ),
    ({"renoise_times": "uniform"}, {"dyna_renoise": [2.0, 1.0]}, "with --renoise_times uniform"),
    (
        {"renoise_times": "logit_normal", "dyna_guidance": 0.0},
        {"dyna_steps": 3},
        NO_DYNA,
    ),
    ({"renoise_times": "shifted"}, {"logit_mean": 0.5}, "with --renoise_times shifted"),
    ({"matching": "ladd"}, {"guidance_jitter": 0.1}, "by any part of the run"),
    (RL_ONLY, {"guidance_interval": [0.2, 0.8]}, "by any part of the run"),
    (RL_ONLY, {"renoise_times": "uniform"}, "by any part of the run"),
    (RL_ONLY | {"rl": "lcm"}, {"renoise_times": "uniform"}, "by any part of the run"),
    ({"sigmas": [1.0, 0.5]}, {"num_inference_steps": 3}, "with --sigmas or --timesteps"),
    ({"eta": 0.0}, {"sde_type": "ddim"}, "with --eta 0"),
    ({"guidance_scale": 1.0}, {"guidance_jitter": 0.1}, "with --guidance_scale of at most 1"),
    ({"guidance_scale": 1.0}, {"guidance_interval": [0.2, 0.8]}, "with --guidance_scale 1"),
    ({}, {"run_name": "mine"}, "by --report_to tensorboard"),
    ({}, {"hub_model_id": "mine"}, "without --push_to_hub"),
    ({}, {"hub_private_repo": True}, "without --push_to_hub"),
    ({"report_to": "none"}, {"tracker_project_name": "mine"}, "by --report_to none"),
    ({}, {"eval_reward": "toy"}, "without --num_eval_samples"),
    ({}, {"eval_steps": 5}, "without --num_eval_samples"),
    ({}, {"overwrite_output_dir": True}, "without --output_dir, because the folder is new then"),
    (
        {"output_dir": "x", "resume_from_checkpoint": "latest"},
        {"overwrite_output_dir": True},
        "with --resume_from_checkpoint",
    ),
]
FAMILY: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"reward_vae": "x"}, "without a reward that is trained on"),
    ({"full_finetune": True}, {"lora_rank": 3}, "with --full_finetune"),
    ({"full_finetune": True}, {"lora_alpha": 3.0}, "with --full_finetune"),
    ({"fake_score": "full"}, {"fake_lora_rank": 3}, "with --fake_score full"),
    ({"fake_score": "full"}, {"fake_lora_alpha": 3.0}, "with --fake_score full"),
    (
        {"fake_score": "full"},
        {"dyna_guidance": 0.5},
        "with --fake_score full, which has no adapter to mix into the teacher",
    ),
    ({"fake_score": "full", "dyna_renoise": [1, 1]}, {"dyna_steps": 3}, NO_DYNA),
    ({"fake_score": "full", "renoise_times": "uniform"}, {"dyna_steps": 3}, NO_DYNA),
    (RL_ONLY, {"fake_lora_rank": 3}, "with --dmd_weight 0"),
    (RL_ONLY, {"fake_score": "full"}, "with --dmd_weight 0"),
    (
        {"fake_score": "full", "full_finetune": True},
        {"lora_target_modules": ["to_q"]},
        "with --full_finetune and --fake_score full: nothing is a LoRA",
    ),
    ({"matching": "ladd"}, {"fake_lora_rank": 3}, "by --matching ladd, which has no fake score"),
    ({"matching": "ladd"}, {"fake_lora_alpha": 3.0}, "by --matching ladd, which has no fake score"),
]
WITH_MODEL = [("toy", *case) for case in CASES] + [("sd3", *case) for case in FAMILY]
each_case = pytest.mark.parametrize(
    ("model", "others", "setting", "why"),
    WITH_MODEL,
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a weight of samples in a file, and one that says of itself that it is a pipeline."""
    (tmp_path / "my.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass W:\n    def __call__(self, draw, direction, ctx): ...\n"
    )
    (tmp_path / "sd3").mkdir()
    (tmp_path / "sd3" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*arguments: str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse(arguments, settings)
    return str(error.value)


def as_flags(settings: dict[str, Any]) -> list[str]:
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


@each_case
def test_refused_where_it_is_typed(model: str, others: dict[str, Any], setting: dict[str, Any], why: str) -> None:
    (name,) = setting
    said = f"--{name} is not read {why}; leave it out"
    assert refusal(model=model, **others | setting) == said
    assert refusal("--model", model, *as_flags(setting), **others) == said


@each_case
def test_warned_of_where_a_file_has_it(
    place: Path, caplog: pytest.LogCaptureFixture, model: str, others: dict[str, Any], setting: dict[str, Any], why: str
) -> None:
    (name,) = setting
    (place / "run.yaml").write_text(yaml.safe_dump({"model": model} | setting))
    values = parse(["--config", "run.yaml"], others)
    found = vars(values.config) | values.values()
    assert found[name] == setting[name]
    assert f"the file sets {name}: not read {why}" in caplog.messages
    caplog.clear()
    again = values.values()
    (place / "again.yaml").write_text(yaml.safe_dump(again))
    assert parse(["--config", "again.yaml"], {k: v for k, v in others.items() if k not in again}).values() == again


def test_all_that_is_typed_for_nothing_is_named_at_once() -> None:
    line = refusal("--model", "toy", "--sample_weight", "none", "--reward", "clip", "--checkpoint", "x")
    assert line.startswith(
        "--clip_checkpoint and --reward are not read without RL, sample weights and evaluation; leave"
    )


def test_every_setting_has_been_thought_of() -> None:
    """A new one is read by every run, or has a row in the table."""
    settings = parse(settings={"model": "toy"})
    rows = {name for _, names, _ in unread._unread(settings.config, settings.plugins) for name in names.split()}
    fields = {f.name for f in dataclasses.fields(Config)}
    assert fields - rows == set(ALWAYS.split()) - {"stage2_learning_rate"}
    assert rows - fields == {
        *("objectives", "matchings", "rewards", "eval_rewards", "sample_weights", "benchmarks"),
        *("reward_vae", "lora_rank", "lora_alpha", "negative_prompt", "zero_empty_prompt"),
        *("fake_score", "fake_lora_rank", "fake_lora_alpha", "lora_target_modules"),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"rl": "refl", "rl_warmup_steps": 5},  # with a constant weight, too
        {"rl": "none", "rl_weight": 0.3},  # the default
        {
            "rl": "none",
            "rl_weight": 0.0,
            "eval_steps": 0,
            "guidance_scale": 1.0,
            "guidance_jitter": 0.0,
        },  # off, as said
        {"rl": "none", "stage2_steps": 0, "reward": "none"},
        {"init_student": "run", "stage1_steps": 0},
        {"init_student": "run", "learning_rate": 0.1, "stage2_learning_rate": None},
        {"sigmas": [1.0, 0.5], "num_inference_steps": 2},
        {"sample_weight": "none", "reward": "clip", "num_eval_samples": 2, "eval_reward": "hps"},
        {"output_dir": "x", "overwrite_output_dir": True},
    ],
)
def test_what_is_read_or_agrees_is_accepted(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    parse(settings={"model": "toy"} | settings)
    assert not caplog.records


def test_a_plugin_may_be_told_to_do_without() -> None:
    assert parse(settings={"model": "sd3", "reward_vae": "none"}).family.options["reward_vae"] == "none"


def test_of_a_recipe_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    settings = parse(["--model", "digits", "--stage2_steps", "0"])
    assert settings.config.rl == "refl"  # the recipe's, as are a learning rate for stage 2 and a weight
    line = refusal("--model", "digits", "--stage2_steps", "0", "--hinge", "3", "--rl_weight", "0.7")
    assert line == "--refl_hinge and --rl_weight are not read with --stage2_steps 0; leave them out"
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"warmup_steps": 50}, "stage 2 ends after 50 updates, before --warmup_steps 50 are over"),
        (
            {"rl": "refl", "rl_warmup_steps": 60},
            "stage 2 ends after 50 updates, before --rl_warmup_steps 60 are over",
        ),
        ({"warmup_steps": 49, "rl": "refl", "rl_warmup_steps": 49}, None),
    ],
)
def test_settings_that_undo_each_other(
    settings: dict[str, Any], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    parse(settings={"model": "toy"} | settings)
    assert caplog.messages == ([said] if said else [])
