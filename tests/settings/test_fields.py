"""Settings: where each value comes from, and what is refused, in which words."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import yaml

from dmdr.errors import ConfigError
from dmdr.settings.fields import Config
from dmdr.settings.hints import ELSEWHERE
from dmdr.settings.parse import Settings, parse, read_yaml

MODULE = '''
from dataclasses import dataclass
from dmdr.protocols import Needs

@dataclass
class Climber:
    """An objective.

    Attributes:
        temperature: How warm it is, in
            degrees; 5 % is cool.
        floor: A name that the matching has, too.
        eta: A name that the core has, too.
    """

    temperature: float = 0.5
    floor: float = 7.0
    eta: float = 8.0
    needs = Needs()

    def __call__(self, draw, ctx): ...

@dataclass
class Heap:
    help: str = ""
    config: str = ""
    climb_floor: float = 1.0
    needs = Needs()

    def __call__(self, draw, ctx): ...

@dataclass
class Save:
    steps: int = 5
    needs = Needs()

    def __call__(self, draw, ctx): ...

class Hill:
    pipeline = "ToyPipeline"
    folder = prompts = judge = lambda self: None
    reward_checkpoint = lambda self, reward, *, held_out=False: None
    recipe = {"stage1_steps": 7, "rl": "climb", "reward": "toy", "rl_weight": 0.1,
              "objectives": {"climb": {"rl_weight": 0.9, "stage2_steps": 9}}}
'''


@pytest.fixture(scope="module", autouse=True)
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package of somebody else, with an objective `climb` and a model `hill` whose recipe knows that objective."""
    site = tmp_path_factory.mktemp("site")
    info = site / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    objectives = "climb = stranger_config:Climber\nheap = stranger_config:Heap\nsave = stranger_config:Save\n"
    points = f"[dmdr.objectives]\n{objectives}\n[dmdr.models]\nhill = stranger_config:Hill\n"
    (info / "entry_points.txt").write_text(points)
    (site / "stranger_config.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield
    sys.modules.pop("stranger_config", None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


@pytest.fixture
def sd3(tmp_path: Path) -> str:
    """A folder of a family with many flags: all that is looked at before a run is which family it is."""
    return pipeline(tmp_path / "sd3", "StableDiffusion3Pipeline")


def pipeline(folder: Path, name: str) -> str:
    """A folder that says of itself that it is a pipeline of this class."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return str(folder)


def toy(*arguments: str, **settings: Any) -> Settings:
    return parse(["--model", "toy", *arguments], settings)


def refusal(*arguments: str, **settings: Any) -> str:
    """The one line with which settings are refused."""
    with pytest.raises(ConfigError) as error:
        toy(*arguments, **settings)
    line = str(error.value)
    assert "\n" not in line
    return line


# --- Where a value comes from --------------------------------------------------------------------------------------


def test_flag_over_yaml_over_recipe_over_default(file: Path) -> None:
    default, recipe = Config().stage1_steps, toy().config.stage1_steps
    file.write_text("stage1_steps: 12\n")
    from_file = toy("--config", str(file)).config.stage1_steps
    flag = toy("--config", str(file), "--stage1_steps", "13").config.stage1_steps
    assert (default, recipe, from_file, flag) == (2000, 100, 12, 13)
    assert toy().config.seed == Config().seed  # what the recipe does not say is the default


def test_python_over_yaml_and_flag_over_both(file: Path) -> None:
    file.write_text("model: toy\nseed: 1\n")
    assert parse(["--config", str(file)], {"seed": 2}).config.seed == 2
    assert parse(["--config", str(file), "--seed", "3"], {"seed": 2}).config.seed == 3


def test_settings_of_a_plugin_that_flags_replace_are_left_out(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(
        "model: toy\nrl: grpo\nreward: hps+clip\ngrpo_epsilon: 0.1\nhps_prompt_prefix: a\nclip_checkpoint: c\n"
    )
    settings = parse(["--config", str(file), "--reward", "clip", "--rl", "refl"])
    assert [plugin.name for plugin in settings.plugins] == ["refl", "clip", "dmd", "rt_dm", "ToyPipeline"]
    assert settings.of("rewards")[0].options["checkpoint"] == "c"
    assert {record.args[0] for record in caplog.records} == {"grpo_epsilon", "hps_prompt_prefix"}
    file.write_text("model: toy\nreward: clip\nhps_prompt_prefix: a\n")  # which it never named
    with pytest.raises(ConfigError, match="unknown setting 'hps_prompt_prefix'"):
        parse(["--config", str(file), "--reward", "toy"])


def test_the_weight_of_a_matching_that_flags_replace_stays(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It begins as the flags of `dmd` do, and is the run's."""
    file.write_text("model: toy\nmatching: dmd\ndmd_weight: 0.5\ndmd_floor: 0.1\n")
    settings = parse(["--config", str(file), "--matching", "decoupled"])
    assert settings.config.dmd_weight == 0.5
    assert [record.args[0] for record in caplog.records] == ["dmd_floor"]


def test_a_file_chooses_the_weight_of_samples(file: Path) -> None:
    (file.parent / "mine.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    high: float = 1.0\n"
        "    def __call__(self, draw, direction, ctx): ...\n"
    )
    mine = f"{file.parent}/mine.py:Mine"
    file.write_text(f"model: toy\nsample_weight: {mine}\nhigh: 2.0\n")
    for arguments in ((), ("--reward", "none"), ("--reward", "clip")):  # with a reward to weigh samples by, and without
        settings = parse(["--config", str(file), *arguments])
        assert settings.config.sample_weight == mine
        assert [(p.name, p.options) for p in settings.of("sample_weights")] == [(mine, {"high": 2.0})]
    file.write_text("model: toy\nsample_weight: none\n")
    measured = ("--reward", "clip", "--num_eval_samples", "4")
    assert parse(["--config", str(file), *measured]).of("sample_weights") == []


def test_model_and_plugins_may_be_named_in_yaml(file: Path) -> None:
    file.write_text("model: toy\nrl: 0.1*refl\nreward: 2*toy\nhinge: 0.7\n")
    settings = parse(["--config", str(file)])
    assert settings.config.stage1_steps == 100
    assert [(p.group, p.name, p.weight) for p in settings.plugins] == [
        ("objectives", "refl", 0.1),
        ("rewards", "toy", 2.0),
        ("matchings", "dmd", 1.0),
        ("sample_weights", "rt_dm", 1.0),
        ("backends", "ToyPipeline", 1.0),
    ]
    assert settings.of("objectives")[0].options == {"steps": "any", "kl_beta": 0.0, "hinge": 0.7}


def test_a_recipe_may_differ_by_objective() -> None:
    climbing, plain = parse(["--model", "hill"]).config, parse(["--model", "hill", "--rl", "none"]).config
    assert (climbing.rl, climbing.rl_weight, climbing.stage1_steps, climbing.stage2_steps) == ("climb", 0.9, 7, 9)
    assert (plain.rl, plain.rl_weight, plain.stage1_steps, plain.stage2_steps) == ("none", 0.1, 7, 1000)
    assert parse(["--model", "hill", "--rl_weight", "0.5"]).config.rl_weight == 0.5


def test_nothing_at_all_is_the_embedded_default() -> None:
    settings = parse()
    assert settings.config.model == "digits"
    assert [p.name for p in settings.of("objectives")] == ["refl"]
    assert [p.name for p in settings.of("rewards")] == ["hps", "clip"]


@pytest.mark.parametrize("value", ["1e-4", '"1e-4"', "0.0001", "'0.0001'"])
def test_yaml_reads_numbers_as_flags_do(file: Path, value: str) -> None:
    file.write_text(f"learning_rate: {value}\n")  # YAML 1.1 takes 1e-4, without a point, for a string
    assert toy("--config", str(file)).config.learning_rate == 1e-4


def test_whole_numbers_do_for_floats() -> None:
    config = toy(learning_rate=1, sigmas=[1, 0.5], eta=0).config
    assert config.learning_rate == 1.0
    assert isinstance(config.learning_rate, float)
    assert config.sigmas == [1, 0.5]


def test_booleans_need_no_value(sd3: str) -> None:
    assert toy("--overwrite_output_dir", output_dir="x").config.overwrite_output_dir
    assert not toy("--overwrite_output_dir", "false").config.overwrite_output_dir
    assert toy(overwrite_output_dir="yes", output_dir="x").config.overwrite_output_dir

    def full(*arguments: str, **settings: Any) -> Any:
        return parse(["--model", sd3, *arguments], settings).family.options["full_finetune"]

    assert full("--full_finetune")
    assert not full("--full_finetune", "false")
    assert full(full_finetune="yes")


def test_flags_may_be_written_with_an_equals_sign_and_with_dashes() -> None:
    assert toy("--stage1_steps=3", "--stage2-steps", "4").config.stage2_steps == 4


def test_an_empty_yaml_changes_nothing(file: Path) -> None:
    file.write_text("# learning_rate: 1e-4\n")
    assert toy("--config", str(file)) == toy()


# --- Flags of plugins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--refl_steps", "--steps", "--refl-steps"])
def test_objective_flags_with_and_without_prefix(flag: str) -> None:
    assert toy("--rl", "refl", flag, "last").of("objectives")[0].options["steps"] == "last"


@pytest.mark.parametrize("key", ["refl_steps", "steps"])
def test_objective_keys_with_and_without_prefix(file: Path, key: str) -> None:
    file.write_text(f"rl: refl\n{key}: last\n")
    assert toy("--config", str(file)).of("objectives")[0].options["steps"] == "last"
    assert toy("--config", str(file), "--steps", "any").of("objectives")[0].options["steps"] == "any"


def test_a_step_index_in_yaml_needs_no_quotes(file: Path) -> None:
    file.write_text("rl: refl\nsteps: 2\n")
    assert toy("--config", str(file)).of("objectives")[0].options["steps"] == "2"


def test_names_that_are_taken_need_their_prefix() -> None:
    settings = toy("--rl", "climb", "--climb_floor", "1", "--dmd_floor", "2", "--climb_eta", "3", "--eta", "0.5")
    assert settings.of("objectives")[0].options == {"temperature": 0.5, "floor": 1.0, "eta": 3.0}
    assert settings.of("matchings")[0].options == {"floor": 2.0, "time_weight": "none"}
    assert settings.config.eta == 0.5
    assert refusal("--rl", "climb", "--floor", "1") == "unknown argument --floor (write --climb_floor or --dmd_floor)"
    assert refusal("--rl", "climb", floor=1) == "unknown setting 'floor' (write --climb_floor or --dmd_floor)"


def test_a_label_is_what_flags_begin_with(file: Path) -> None:
    flags = ("--reward", "clip as one+0.5*clip as two", "--one_checkpoint", "a", "--two_checkpoint", "b")
    flags += ("--rl", "grpo as fast+0.1*grpo as slow", "--fast_epsilon", "0.1", "--slow_epsilon", "0.4")
    flags += ("--eval_reward", "clip as held", "--num_eval_samples", "4", "--eval_held_checkpoint", "c")
    settings = toy(*flags)
    found = {
        p.label: (p.name, p.weight, p.options.get("checkpoint", p.options.get("epsilon"))) for p in settings.plugins
    }
    assert (
        found["one"] == ("clip", 1.0, "a") and found["two"] == ("clip", 0.5, "b") and found["held"] == ("clip", 1, "c")
    )
    assert found["fast"] == ("grpo", 1.0, 0.1) and found["slow"] == ("grpo", 0.1, 0.4)
    file.write_text(settings.as_yaml())
    assert parse(["--config", str(file)]) == parse(["--config", str(file), "--reward", settings.config.reward])
    assert parse(["--config", str(file)]).plugins == settings.plugins
    assert "unknown argument --clip_checkpoint" in refusal("--reward", "clip as one", "--clip_checkpoint", "a")
    assert "'clip' is named twice; write it once, with the sum of the weights, or give one" in refusal(
        "--reward", "clip+clip"
    )
    both = parse(["--model", "digits", "--rl", "srpo as s+rwr", "--s_k", "2"]).of("objectives")  # a recipe knows names
    assert [(p.options.get("positive"), p.options.get("k"), p.options.get("temperature")) for p in both] == [
        ([""], 2.0, None),
        (None, None, 0.2),
    ]


def test_a_plugin_may_call_its_fields_as_it_likes() -> None:
    """Where a name is taken, they have a prefix; what is a flag of the core's even so is refused."""
    settings = toy("--rl", "climb+heap", "--heap_help", "a", "--heap_climb_floor", "2", "--climb_floor", "3")
    climb, heap = settings.of("objectives")
    assert climb.options["floor"] == 3
    assert heap.options == {"help": "a", "config": "", "climb_floor": 2}
    assert (
        refusal("--rl", "save") == "objective 'save' has a field 'steps', but --save_steps is a flag of dmdr; rename it"
    )


def test_flags_of_a_plugin_that_was_not_chosen_are_unknown() -> None:
    assert refusal("--rl", "none", "--refl_steps", "last").startswith("unknown argument --refl_steps")
    assert refusal("--rl", "none", refl_steps="last").startswith("unknown setting 'refl_steps'")


def test_help_of_a_chosen_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--model", "toy", "--rl", "refl+climb", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--refl_steps", "--steps", "--hinge", "--climb_temperature", "--temperature", "--climb_floor"):
        assert re.search(f" {flag}[ ,]", text)
    assert "--climb_temperature, --temperature FLOAT How warm it is, in degrees; 5 % is cool. (default: 0.5)" in text
    assert " --floor" not in text  # climb has one, and dmd


# --- The written configuration -------------------------------------------------------------------------------------


def test_the_resolved_yaml_repeats_the_settings(file: Path, sd3: str) -> None:
    flags = (
        *("--rl", "0.1*refl+climb", "--reward", "0.3*toy", "--refl_steps", "2", "--hinge", "0.7", "--temperature", "4"),
        *("--sigmas", "1", "0.7", "0.3", "--learning_rate", "3e-7", "--lora_target_modules", "to_q", "to_k"),
        *("--dyna_renoise", "2", "1", "--mixed_precision", "no", "--output_dir", "somewhere"),
        *("--reward_tilt", "2", "--tilt_clip", "0.5", "2", "--fake_lora_rank", "8", "--shift", "3", "--full_finetune"),
    )
    settings = parse(["--model", sd3, *flags])
    file.write_text(settings.as_yaml())
    again = parse(["--config", str(file)])
    assert again.plugins == settings.plugins
    assert again.model == settings.model
    assert again.config == dataclasses.replace(settings.config, output_dir=None)


def test_the_resolved_yaml_holds_every_setting_but_where_to_write() -> None:
    written = yaml.safe_load(toy("--rl", "refl", "--resume_from_checkpoint", "latest").as_yaml())
    names = {f.name for f in dataclasses.fields(Config)}
    assert names - written.keys() == {
        "dry_run", "gpu_memory", "architecture", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"
    }  # fmt: skip
    tilt = {"reward_tilt", "tilt_weight", "tilt_divergence", "tilt_baseline", "tilt_clip"}
    own = {"refl_steps", "refl_kl_beta", "refl_hinge", "dmd_floor", "dmd_time_weight", "shift"}
    own |= {f"rt_dm_{name}" for name in tilt}
    assert written.keys() - names == own


def test_rewards_that_only_measure_have_flags_of_their_own(file: Path) -> None:
    flags = ("--reward", "clip", "--eval_reward", "0.5*clip+hps", "--num_eval_samples", "4")
    settings = toy(*flags, "--checkpoint", "a", "--eval_clip_checkpoint", "b")  # which leave short names alone
    assert [(p.name, p.options["checkpoint"]) for p in settings.of("rewards")] == [("clip", "a")]
    measured = [(p.weight, p.name, p.options["checkpoint"]) for p in settings.of("eval_rewards")]
    assert measured == [(0.5, "clip", "b"), (1.0, "hps", None)]
    file.write_text(settings.as_yaml())
    assert parse(["--config", str(file)]).plugins == settings.plugins
    assert "unknown argument --eval_clip_checkpoint" in refusal("--reward", "clip", "--eval_clip_checkpoint", "b")
    assert "unknown reward 'clipp'" in refusal("--eval_reward", "clipp")
    assert "eval_reward expression" in refusal("--eval_reward", "2*")


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rl", "refll"), "unknown objective 'refll' (did you mean 'refl'?)"),
        (("--reward", "toyy"), "unknown reward 'toyy' (did you mean 'toy'?)"),
        (("--matching", "dmdd"), "unknown matching 'dmdd' (did you mean 'dmd'?)"),
        *(
            (("--matching", value), f"--matching {value}: write the name of one matching; --dmd_weight is its weight")
            for value in ("none", "dmd+ac_dmd", "0.5*dmd")
        ),
        (("--learning_rat", "1"), "unknown argument --learning_rat (did you mean "),
        (("--learning_rat=1",), "unknown argument --learning_rat=1 (did you mean "),
        (("--rl", "refl", "--refl_step", "last"), "unknown argument --refl_step (did you mean "),
        (("stray",), "unknown argument stray"),
        (("--learning_rate", "fast"), "'fast'"),
        (("--stage1_steps", "2.5"), "'2.5'"),
        (("--lr_scheduler_type", "cosinus"), "'constant', 'linear', 'cosine'"),
        (("--overwrite_output_dir", "maybe"), "maybe"),
        (("--seed",), "--seed: expected one argument"),
    ],
)
def test_bad_flags(arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal(*arguments)


def test_a_flag_has_one_spelling_in_a_message() -> None:
    assert refusal("--rl", "grpo", "--ratio", "odd").startswith("--ratio: invalid choice: 'odd'")
    assert refusal("--num-inference-steps", "odd") == "--num_inference_steps: invalid int value: 'odd'"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--full_finetune", "maybe"), "maybe"),
        (("--lora_rank", "0"), "--lora_rank must be at least 1, not 0"),
        (("--fake_lora_rank", "-1"), "--fake_lora_rank must be at least 1, not -1"),
        (("--lora_alpha", "0"), "--lora_alpha must be above 0, not 0.0"),
        (
            ("--resolution", "0"),
            "--resolution must be sizes such as 1024 or 1152x896 (width x height)",
        ),
        (("--resolution", "16,8x0"), "with commas between several, not 16,8x0"),
        (("--max_sequence_length", "0"), "--max_sequence_length must be above 0, not 0"),
        (("--decode_chunk_size", "-2"), "--decode_chunk_size must be above 0, not -2"),
        (("--shift", "0"), "--shift must be above 0, not 0.0"),
        (("--student_weights", "x"), "--student_weights needs --full_finetune"),
    ],
)
def test_bad_flags_of_a_family(sd3: str, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(["--model", sd3, *arguments])
    assert said in str(error.value)


def test_names_of_other_trainers_say_what_they_are_called_here(sd3: str) -> None:
    assert refusal("--lr", "1e-4") == "unknown argument --lr (write --learning_rate)"
    assert (
        refusal("--train-batch-size=4") == "unknown argument --train-batch-size=4 (write --per_device_train_batch_size)"
    )
    assert refusal(bf16=True) == "unknown setting 'bf16' (write --mixed_precision bf16)"
    assert "which counts the student's sampling steps; objective with this flag: refl" in refusal("--steps", "4")
    family = parse(["--model", sd3]).family
    there = {f.name for kind in (Config, family.flags) for f in dataclasses.fields(kind)}
    assert not there & ELSEWHERE.keys()
    for meant in ELSEWHERE.values():
        assert set(re.findall(r"--(\w+)", meant)) <= there
        if re.fullmatch(r"--\w+ \S+", meant):
            parse(["--model", sd3, "--output_dir", "x", *meant.split()])


@pytest.mark.parametrize("flag", ["--config", "--model", "--rl", "--reward", "--matching"])
def test_a_leading_flag_without_its_value(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag}.*expected one argument"):
        parse([flag])


@pytest.mark.parametrize("flag", ["--rl", "--reward", "--matching"])
def test_an_empty_name_is_not_the_default(flag: str) -> None:
    refusal(flag, "")


@pytest.mark.parametrize(
    "expression",
    ["0.3*", "*toy", "toy+", "+toy", "toy toy", "0.3**toy", "0.3*toy+0.2*toy", "x*toy", "'toy", " "],
)
def test_malformed_reward_expression(expression: str) -> None:
    assert "reward expression" in refusal("--reward", expression)


@pytest.mark.parametrize("weight", ["-1", "0", "nan", "inf", "1e999"])
@pytest.mark.parametrize("flag", ["reward", "rl"])
def test_weights_of_a_sum_are_positive_and_finite(flag: str, weight: str) -> None:
    expression = f"{weight}*{'toy' if flag == 'reward' else 'refl'}"
    assert f"the weight {weight}" in refusal(f"--{flag}={expression}")
    assert f"the weight {weight}" in refusal(**{flag: expression})


@pytest.mark.parametrize("flag", ["--reward", "--rl"])
def test_a_weight_with_a_leading_minus_is_refused_in_one_line(flag: str) -> None:
    line = refusal(flag, "-1*toy" if flag == "--reward" else "-1*refl")  # which argparse takes for a flag
    assert flag in line or "the weight -1" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lerning_rate: 1", "unknown setting 'lerning_rate' (did you mean 'learning_rate'?)"),
        ("learning-rate: 1", "unknown setting 'learning-rate' (did you mean 'learning_rate'?)"),
        ("3: 1", "unknown setting"),
        ("no: 1", "unknown setting"),
        ("refl: {steps: last}", "unknown setting 'refl'"),
        ("- seed", "must hold a mapping"),
        ("seed", "must hold a mapping"),
        ("seed: [", "is no YAML"),
        ("seed: !!python/object:os.system {}", "is no YAML"),
        ("seed: 1\n\x07", "is no YAML"),
        ("seed: 1\nrl: none\nseed: 2", "the key 'seed' is there twice, in lines 1 and 3"),
        ("lora: {a: 1, a: 2}", "the key 'a' is there twice, in lines 1 and 1"),
        ("seed: " + "[" * 3000, "is nested too deeply"),
        ("seed: " + "{a: " * 3000, "is nested too deeply"),
        ("seed: 2020-13-45", "is no YAML"),
        ("seed: " + "1" * 5000, "is no YAML"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nseed: &c [*b, *b]", "--seed must be a whole number"),
    ],
)
def test_bad_yaml(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    assert said in refusal("--config", str(file))


def test_yaml_that_is_not_there(tmp_path: Path) -> None:
    assert refusal("--config", str(tmp_path / "none.yaml")).endswith("No such file or directory")
    assert refusal("--config", str(tmp_path)).startswith("--config: cannot read")
    (tmp_path / "noise.yaml").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ConfigError, match="is no YAML"):
        read_yaml(str(tmp_path / "noise.yaml"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "one"),
        ("seed", 1.5),
        ("seed", True),
        ("seed", None),
        ("seed", [1]),
        ("learning_rate", True),
        ("learning_rate", None),
        ("learning_rate", {}),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("rl_weight", "nan"),
        ("sigmas", 1.0),
        ("sigmas", ["1.0"]),
        ("sigmas", [1.0, float("nan")]),
        ("overwrite_output_dir", 1),
        ("overwrite_output_dir", "maybe"),
        ("output_dir", True),
        ("output_dir", [3]),
        ("model", ["toy"]),
        ("save_total_limit", "all"),
        ("rt_dm_tilt_clip", 0.1),
        ("rt_dm_tilt_clip", [None, 5.0]),
    ],
)
def test_wrong_types(file: Path, name: str, value: Any) -> None:
    file.write_text(yaml.safe_dump({name: value}))
    with pytest.raises(ConfigError, match=f"--{name}"):
        parse(["--config", str(file)] if name == "model" else ["--config", str(file), "--model", "toy"])
    with pytest.raises(ConfigError, match=f"--{name}"):
        parse(settings={"model": "toy", name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("full_finetune", 1),
        ("full_finetune", "maybe"),
        ("lora_target_modules", "to_q,to_k"),
        ("lora_target_modules", [1]),
        ("lora_rank", None),
    ],
)
def test_wrong_types_of_a_family(file: Path, sd3: str, name: str, value: Any) -> None:
    file.write_text(yaml.safe_dump({name: value}))
    with pytest.raises(ConfigError, match=f"--{name}"):
        parse(["--config", str(file), "--model", sd3])
    with pytest.raises(ConfigError, match=f"--{name}"):
        parse(settings={"model": sd3, name: value})


@pytest.mark.parametrize("value", ["half", False])  # unquoted, YAML 1.1 takes `no` for false
def test_a_wrong_choice_names_the_right_ones(value: Any) -> None:
    line = refusal(mixed_precision=value)
    assert line.startswith("--mixed_precision must be")
    assert "bf16" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rl_weight": -1.0}, "--rl_weight must be at least 0, not -1.0"),
        ({"dmd_weight": -1.0}, "--dmd_weight must be at least 0"),
        ({"learning_rate": 0.0}, "--learning_rate must be above 0"),
        ({"stage2_learning_rate": -1e-3}, "--stage2_learning_rate must be above 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"stage1_steps": -1}, "--stage1_steps must be at least 0"),
        ({"num_inference_steps": 0}, "--num_inference_steps must be at least 1"),
        ({"fake_updates": 0}, "--fake_updates must be at least 1"),
        ({"logging_steps": 0}, "--logging_steps must be at least 1"),
        ({"save_total_limit": 0}, "--save_total_limit must be at least 1"),
        ({"eta": 1.1}, "--eta must be between 0 and 1"),
        ({"sample_eta": 0.5}, "--sample_eta must be 0 or 1"),
        ({"sample_eta": 1.5, "sde_type": "ddim"}, "--sample_eta must be 0 or 1"),
        ({"dyna_guidance": -0.1}, "--dyna_guidance must be between 0 and 1"),
        ({"dyna_renoise": [1.0]}, "--dyna_renoise must be two numbers"),
        ({"dyna_renoise": [0.5, 1.0]}, "--dyna_renoise must be two numbers of at least 1"),
        ({"logit_std": 0.0}, "--logit_std must be above 0"),
        ({"logit_mean": 200.0}, "--logit_mean must be at most 100"),
        ({"guidance_interval": [0.5]}, "--guidance_interval must be two numbers between 0 and 1"),
        ({"guidance_interval": [0.5, 0.5]}, "between 0 and 1, the first below the second, not [0.5, 0.5]"),
        ({"guidance_interval": [0.5, 1.5]}, "--guidance_interval must be two numbers between 0 and 1"),
        ({"dyna_steps": -1}, "--dyna_steps must be at least 0"),
        ({"adam_beta2": 1.0}, "--adam_beta2 must be at least 0 and below 1"),
        ({"sigmas": []}, "--sigmas must be decreasing"),
        ({"sigmas": [0.5, 0.7]}, "--sigmas must be decreasing"),
        ({"sigmas": [1.0, 1.0]}, "--sigmas must be decreasing"),
        ({"sigmas": [1.0, 0.0]}, "--sigmas must be decreasing"),
        ({"sigmas": [0.0]}, "--sigmas must be decreasing"),
        ({"sigmas": [1.5, 0.5]}, "--sigmas must be decreasing"),
        ({"per_device_train_batch_size": 5, "num_generations": 2}, "divisible by --num_generations (2), not 5"),
        ({"stage1_steps": 0, "stage2_steps": 0}, "nothing to train"),
        ({"dmd_weight": 0.0, "rl": "refl"}, "--init_student"),
        ({"dmd_weight": 0.0, "init_student": "x"}, "leaves nothing to train"),
        ({"dmd_weight": 0.0, "init_student": "x", "rl": "refl", "rl_weight": 0.0}, "leaves nothing to train"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_values_that_cannot_be_meant(settings: dict[str, Any], said: str) -> None:
    assert said in refusal(**settings)


HUGE = [10**400, -(10**400), 2**63, -(2**63) - 1, 10**5000, 1e38, -1e300]


@pytest.mark.parametrize("value", HUGE, ids=lambda value: f"{type(value).__name__}-{value > 0}")
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config)])
def test_numbers_beyond_all_use_are_refused(name: str, value: Any) -> None:
    """Of whatever kind the setting is, in one line that stays short."""
    kind = get_type_hints(Config)[name]
    if abs(value) <= 1e30 and (kind in (str, str | None) or (kind in (float, float | None) and value > 0)):
        return
    with pytest.raises(ConfigError) as error:
        parse(settings={"model": "toy", "output_dir": "x", name: value})
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_inference_steps": 10**6}, "--num_inference_steps must be at most 1000"),
        ({"teacher_steps": 2**40}, "--teacher_steps must be at most 1000"),
        ({"num_eval_samples": 2**40}, "--num_eval_samples must be at most 1048576"),
        ({"gradient_accumulation_steps": 2**19}, "an update has at most 1048576 images"),
        ({"stage2_fake_learning_rate": 1e29}, "--stage2_fake_learning_rate must be at most 1000"),
        ({"rl_weight": 1e7}, "--rl_weight must be at most 1000000"),
        ({"guidance_scale": 1e30}, "--guidance_scale must be at most 1000"),
        ({"rl": "1e31*refl"}, "must be above 0 and at most 1000000"),
        ({"output_dir": "a\0b"}, "--output_dir must be text"),
        (
            {"sigmas": [1e38]},
            "--sigmas must be a list, each item a finite number or null, not [1e+38] (whole numbers must",
        ),
    ],
    ids=str,
)
def test_limits(settings: dict[str, Any], said: str) -> None:
    assert said in refusal(**settings)


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "x/" * 3000, "[" * 99])
def test_a_name_of_no_file(name: str) -> None:
    for source in ({"settings": {"model": name}}, {"arguments": ["--model", name]}):
        with pytest.raises(ConfigError) as error:
            parse(**source)
        assert " is neither a diffusers pipeline folder" in str(error.value) and "\n" not in str(error.value)


def test_numbers_of_numpy_are_kept_as_pythons_own() -> None:
    """YAML keeps no others."""
    found = parse(settings={"model": "toy", "learning_rate": np.float64(1e-3), "sigmas": [np.float64(1), 0.5]})
    assert "learning_rate: 0.001\n" in found.as_yaml()
    assert type(found.config.learning_rate) is type(found.config.sigmas[0]) is float
    assert "--learning_rate must be" in refusal(learning_rate=np.ones(2))
    assert "--lr_scheduler_type must be" in refusal(lr_scheduler_type=np.array(["linear", "cosine"]))


@pytest.mark.parametrize("flag", ["--sigmas", "--rl_weight", "--learning_rate", "--guidance_scale"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_numbers_of_flags_are_finite_and_not_negative(flag: str, value: str) -> None:
    assert refusal(flag, value).startswith(flag)


@pytest.mark.parametrize("word", ["none", "null", "None"])
def test_a_flag_takes_a_value_of_a_file_away(tmp_path: Path, word: str) -> None:
    """Of choices as of numbers."""
    file = tmp_path / "settings.yaml"
    file.write_text("model: toy\nrl: none\ntilt_baseline: ema\nstage2_learning_rate: 1.0e-3\n")
    flags = ["--config", str(file), "--rt_dm_tilt_baseline", word, "--stage2_learning_rate", word, "--reward", "toy"]
    found = parse(flags)
    assert found.of("sample_weights")[0].options["tilt_baseline"] is None
    assert found.config.stage2_learning_rate is None
