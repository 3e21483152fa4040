"""Flags of model families: each has its own, a stranger's as ours, and files of older versions hold all of them."""

import dataclasses
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmdr.backends.quantized import Format
from dmdr.errors import ConfigError
from dmdr.matching import DMD
from dmdr.settings import models, registry
from dmdr.settings.parse import Settings, parse
from family import READERS, refuses_unread
from old_files import old_config

PIPELINES = sorted(registry.plugins("backends"))
ADAPTERS = (
    "Flux2KleinPipeline, FluxPipeline, Krea2Pipeline, QwenImagePipeline, SiTPipeline, StableDiffusion3Pipeline, "
    "StableDiffusionPipeline, StableDiffusionXLPipeline, ZImagePipeline"
)
MODULE = '''
from dataclasses import dataclass
from dmdr.backends.toy import ToyBackend
from dmdr.protocols import unread

@dataclass(frozen=True, kw_only=True)
class Base:
    """Options.

    Attributes:
        width: How wide it is.
        weight: What it weighs.
    """

    width: int = 4
    weight: float = 0.5

@dataclass(frozen=True, kw_only=True)
class MyOptions(Base):
    """Options of mine.

    Attributes:
        depth: How deep it is; 5 % is flat.
        places: Where it is.
        file: What it cannot do without.
        seed: That of the core.
    """

    depth: int = 3
    places: list[str] | None = None
    file: str
    seed: int = 0
    weight: None = unread()

    def __post_init__(self):
        if self.depth < 0:
            raise ValueError("depth is above ground")

class Mine(ToyBackend):
    Options = MyOptions

    def __init__(self, folder, options):
        self.options = options

class Bare:
    grid = prepare = encode = encode_images = decode = student = fake_score = reference = teacher = parameters = (
        snapshot
    ) = export = snippet = load_export = lambda self, *arguments, **named: None

class Nothing(Bare):
    Options = None

class Plain(Bare):
    class Options:
        depth = 3

class Odd(Bare):
    @dataclass
    class Options:
        depth: dict = None

class Greedy(Bare):
    @dataclass
    class Options:
        help: str = ""
'''


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder that says of itself that it is a pipeline of some class."""

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": name}))
        return tmp_path / name

    return folder


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """A stranger's backend, in a file."""
    (tmp_path / "my_file.py").write_text(MODULE)
    return str(tmp_path / "my_file.py")


def refusal(*arguments: str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        parse(arguments, settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The help, on one line."""
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


# --- Each has its own -----------------------------------------------------------------------------------------------


def example(hint: Any) -> tuple[list[str], Any]:
    """What a flag of a type may be given, and the value that it makes."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    examples: dict[Any, tuple[list[str], Any]] = {
        bool: (["true"], True),
        int: (["3"], 3),
        float: (["0.25"], 0.25),
        str: (["32"], "32"),  # a size, too
        list[str]: (["some", "more"], ["some", "more"]),
        Format: (["int8"], "int8"),
        "lora": (["full"], "full"),
    }
    return examples[kinds[0]]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_family_takes_its_own_flags_and_no_other(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place, options = folder(name), registry.load("backends", name).Options
    hints, taken = typing.get_type_hints(options), set()
    for field in dataclasses.fields(options):
        if not field.init:
            refuses_unread(place, field.name, True)
            continue
        given, value = example(hints[field.name])
        if field.name == "drop_text_encoders":  # which takes one value
            given, value = ["text_encoder_3"], ["text_encoder_3"]
        needed = {"student_weights": ["--full_finetune"], "reward_vae": ["--reward", "toy"]}.get(field.name, [])
        with monkeypatch.context() as patch:
            model = str(place)
            if field.name == "revision":  # of a model on the hub
                model = "somebody/something"
                patch.setattr(models, "pipeline_class", lambda *place: name)
            settings = parse(["--model", model, f"--{field.name}", *given, *needed])
        assert settings.family.name == name
        assert getattr(settings.family_options(), field.name) == value
        taken.add(field.name)
    others = {f.name for n in PIPELINES for f in dataclasses.fields(registry.load("backends", n).Options) if f.init}
    for option in others - taken - {"guidance_scale", "revision", "seed"}:  # which the core has
        assert refusal("--model", str(place), f"--{option}", "1").endswith(f"; this run uses {name}, so leave it out)")


def test_the_families_that_read_a_flag() -> None:
    """What the refusals say."""
    reads = {n: {f.name for f in dataclasses.fields(registry.load("backends", n).Options) if f.init} for n in PIPELINES}
    for option, who in {**READERS, "lora_rank": ADAPTERS, "teacher_lora": ADAPTERS}.items():
        assert ", ".join(name for name in PIPELINES if option in reads[name]) == who


def test_a_setting_of_the_core_is_given_to_the_family_that_asks(folder: Callable[[str], Path]) -> None:
    flags = ["--guidance_scale", "3.5", "--seed", "7"]
    flux = parse(["--model", str(folder("FluxPipeline")), *flags])
    assert (flux.family_options().guidance_scale, flux.family_options().seed) == (3.5, 7)
    assert [f.name for f in flux.family.own_flags] == list(flux.family.options)
    assert not {"guidance_scale", "seed", "revision"} & flux.family.options.keys()  # the core writes them
    sd3 = parse(["--model", str(folder("StableDiffusion3Pipeline")), *flags]).family_options()
    assert sd3.seed == 7 and not hasattr(sd3, "guidance_scale")
    toy = parse(["--model", "toy", *flags])
    assert toy.family_options() == toy.family.flags(seed=7)


@pytest.mark.parametrize(("flag", "value"), [("teacher_lora", "x"), ("attention_backend", "flash"), ("lora_rank", "4")])
def test_the_toy_has_no_adapters(flag: str, value: str) -> None:
    who = f"(model family with this flag: {ADAPTERS}; this run uses ToyPipeline, so leave it out)"
    assert refusal("--model", "toy", f"--{flag}", value) == f"unknown argument --{flag} {who}"
    assert refusal("--model", "toy", f"--{flag}={value}") == f"unknown argument --{flag}={value} {who}"
    assert refusal(model="toy", **{flag: value}) == f"unknown setting '{flag}' {who}"


def test_flags_of_another_matching_or_weight_say_so() -> None:
    said = "unknown argument --ac_steps (matching with this flag: ac_dmd; this run uses dmd)"
    common = {f.name for f in dataclasses.fields(DMD)}
    name = next(f.name for f in dataclasses.fields(registry.load("matchings", "ac_dmd")) if f.name not in common)
    assert refusal("--model", "toy", f"--{name}", "1") == said.replace("ac_steps", name)
    said = "unknown argument --tilt_weight (sample weight with this flag: rt_dm; this run uses none)"
    assert refusal("--model", "toy", "--sample_weight", "none", "--tilt_weight", "rank") == said


# --- Help -----------------------------------------------------------------------------------------------------------


def test_help_shows_a_familys_flags_where_a_model_is_named(
    capsys: pytest.CaptureFixture[str], folder: Callable[[str], Path]
) -> None:
    few, whole = shown(capsys, "--help"), shown(capsys, "--help", "all")
    for text in (few, whole):
        assert not re.search(r"model family \w+: --", text)
        assert "--lora_rank" not in text and "--shift" not in text
    for hidden in ("--eta FLOAT", "--adam_beta1 FLOAT", "--dyna_renoise FLOAT ...", "--report_to TEXT", "--backend "):
        assert hidden not in few and hidden in whole
    for common in ("--model TEXT", "--rl TEXT", "--learning_rate FLOAT", "--dry_run", "--output_dir TEXT"):
        assert common in few and common in whole
    text = shown(capsys, "--model", str(folder("StableDiffusion3Pipeline")), "--help")
    _, _, own = text.partition("model family StableDiffusion3Pipeline: ")
    flags = ("--lora_rank INT", "--teacher_lora TEXT", "--full_finetune Train", "--lora_target_modules TEXT ...")
    for flag in (*flags, "--shift FLOAT", "--resolution TEXT", "--zero_empty_prompt BOOL"):
        assert flag in own
    assert "Rank of the student's LoRA. (default: 64)" in own  # of a base of its options
    assert "--eta" not in text and "--seed INT seed of all random numbers" in text
    for arguments in (["--help=all"], ["-h", "all"], ["-h=all"]):
        assert shown(capsys, *arguments) == whole
    for arguments in (["--help", "all"], ["--help=all"], ["-h=all"]):
        assert shown(capsys, "--model", "toy", *arguments) == shown(capsys, "--model", "toy", "-h", "all")
    toy = shown(capsys, "--model", "toy", "-h", "all")
    assert "model family ToyPipeline: --shift FLOAT" in toy and "--lora_rank" not in toy and "--eta FLOAT" in toy


def test_help_of_part_of_the_settings_has_titles(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--model", "toy", "--rl", "grpo", "--help")
    for title in ("common settings: ", "objective grpo: ", "reward toy: ", "matching dmd: ", "sample weight rt_dm: "):
        assert (title in text) == (title != "reward toy: "), title  # which has no flags
    for arguments in (["--help", "some"], ["--help=some"], ["--help="]):
        assert refusal(*arguments).startswith("--help: invalid choice: ")


# --- A stranger's -----------------------------------------------------------------------------------------------------


def test_a_strangers_family_has_its_flags(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = ("--model", "toy", "--backend", f"{mine}:Mine")
    settings = parse([*named, "--depth", "5", "--places", "here", "there", "--file", "a", "--seed", "2"])
    assert settings.family.options == {"width": 4, "depth": 5, "places": ["here", "there"], "file": "a"}
    options = settings.open_backend("").options
    assert (options.depth, options.places, options.file, options.seed) == (5, ["here", "there"], "a", 2)

    file = tmp_path / "run.yaml"
    file.write_text("depth: 6\nfile: b\n")
    assert parse([*named, "--config", str(file)]).family_options().depth == 6
    assert parse([*named, "--config", str(file), "--depth", "7"]).family_options().depth == 7
    file.write_text(settings.as_yaml())
    assert parse(["--config", str(file)]).family.options == settings.family.options

    for arguments in (named, named[2:]):
        text = shown(capsys, *arguments, "--file", "a", "--help")
        own = text.partition(f"model family {mine}:Mine: ")[2]
        assert "--depth INT How deep it is; 5 % is flat. (default: 3)" in own
        assert "--width INT How wide it is. (default: 4)" in own
        assert "--weight FLOAT" not in own

    said = f"(model family with this flag: {ADAPTERS}; this run uses {mine}:Mine, so leave it out)"
    assert refusal(*named, "--file", "a", "--lora_rank", "2") == f"unknown argument --lora_rank {said}"
    assert refusal(*named, "--file", "a", "--dept", "2") == "unknown argument --dept (did you mean 'depth'?)"
    assert refusal(*named, "--file", "a", "--weight", "2").startswith("unknown argument --weight")
    assert refusal(*named) == "the following arguments are required: --file"
    assert refusal(*named, "--file", "a", "--depth", "deep") == "--depth: invalid int value: 'deep'"
    assert refusal(*named, "--file", "a", depth=1.5) == "--depth must be a whole number, not 1.5"
    assert refusal(*named, "--file", "a", "--depth", "-1") == f"backend '{mine}:Mine': depth is above ground"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Bare", "has no Options; see dmdr.protocols"),
        ("Nothing", "has no Options; see dmdr.protocols"),
        ("Plain", "has Options that are no dataclass; make it one: its fields are the command-line flags"),
        ("Odd", "has a field 'depth' of a type that no flag can have: <class 'dict'>"),
        ("Greedy", "has a field 'help', but --help is a flag of dmdr"),
    ],
)
def test_a_strangers_family_without_options(mine: str, name: str, said: str) -> None:
    line = refusal("--model", "toy", "--backend", f"{mine}:{name}")
    assert line.startswith(f"backend '{mine}:{name}' {said}")


# --- Files of older versions ------------------------------------------------------------------------------------------


def written(folder: Path, values: dict[str, Any]) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "config.yaml")


def kept(settings: Settings, old: dict[str, Any]) -> set[str]:
    """Names of an old file's settings that have their value in new ones, perhaps by another name."""
    values = settings.values()
    names = {key: {key, f"rt_dm_{key}"} & values.keys() for key in old}
    return {key for key, found in names.items() if [values[name] for name in found] == [old[key]]}


def test_an_old_file_means_what_it_meant(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    place, old = folder("StableDiffusion3Pipeline"), old_config("digits")
    own_balance = {"refl_balance"}  # gone; "fixed" changed nothing
    assert kept(parse(["--config", written(tmp_path, old)]), old) == old.keys() - own_balance
    said = refusal("--config", written(tmp_path, old | {"refl_balance": "grad_norm"}))
    assert said == "unknown setting 'refl_balance' (write --rl_balance)"
    old |= {"model": str(place), "shift": 3.0, "reward_tilt": 0.5, "tilt_weight": "rank", "full_finetune": True}
    old |= {"tilt_baseline": "ema", "resolution": 512, "drop_text_encoders": ["text_encoder_3"], "prompt_cache": "off"}
    settings = parse(["--config", written(tmp_path, old)])
    old["resolution"] = "512"  # which may be several now
    assert kept(settings, old) == old.keys() - own_balance
    assert settings.of("sample_weights")[0].build().tilt_baseline == "ema"
    again = tmp_path / "again.yaml"
    again.write_text(settings.as_yaml())
    assert parse(["--config", str(again)]) == settings


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "StableDiffusion3Pipeline"])
def test_an_old_file_holds_defaults_of_other_families(
    tmp_path: Path, folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    old = old_config("toy", model=str(folder(name)))
    settings = parse(["--config", written(tmp_path, old)])
    own = {f.name for f in dataclasses.fields(settings.family.flags) if f.init}
    assert own & old.keys() <= kept(settings, old)
    assert not caplog.records


def test_an_old_file_of_the_toy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = old_config("toy")
    settings = parse(["--config", written(tmp_path, old)])
    assert settings.config == parse(["--model", "toy", "--mixed_precision", "no"]).config
    assert settings.plugins == parse(["--model", "toy"]).plugins
    (tmp_path / "run").mkdir()
    written(tmp_path / "run", old | {"seed": 5})
    resumed = ["--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path / "run")]
    assert parse(resumed).config.seed == 5
    none = parse(["--config", written(tmp_path, old | {"reward": "none"})])
    assert [plugin.name for plugin in none.plugins] == ["dmd", "ToyPipeline"]
    assert not caplog.records
    who = f"model family with this flag: {ADAPTERS}; this run uses ToyPipeline, so leave it out"
    asked = written(tmp_path, old | {"lora_rank": 8})
    assert refusal("--config", asked) == f"unknown setting 'lora_rank' ({who})"


def test_settings_of_a_family_that_flags_replace_are_left_out(
    tmp_path: Path, folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    place = folder("StableDiffusion3Pipeline")
    flags = ["--lora_rank", "8", "--reward", "toy", "--reward_tilt", "2"]
    file = tmp_path / "run.yaml"
    file.write_text(parse(["--model", str(place), *flags]).as_yaml())
    toy = parse(["--config", str(file), "--model", "toy"])
    assert [plugin.name for plugin in toy.plugins] == ["toy", "dmd", "rt_dm", "ToyPipeline"]
    assert toy.of("sample_weights")[0].options["reward_tilt"] == 2
    assert [record.args[0] for record in caplog.records] == ["lora_rank"]
    assert "unknown argument --lora_rank" in refusal("--config", str(file), "--model", "toy", "--lora_rank", "8")
    assert "unknown setting 'lora_rank'" in refusal("--config", str(file), model="toy", lora_rank=8)


def test_a_run_without_a_reward_weighs_no_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    file.write_text(parse(["--model", "toy", "--reward_tilt", "2"]).as_yaml())
    plain = parse(["--config", str(file), "--reward", "none"])
    assert plain.config.sample_weight == "none" and plain.of("sample_weights") == []
    assert "rt_dm_reward_tilt" in {record.args[0] for record in caplog.records}
    again.write_text(plain.as_yaml())
    assert parse(["--config", str(again)]) == plain
    assert parse(["--config", str(again), "--reward", "toy"]).config.sample_weight == "none"
    line = refusal("--config", str(again), "--reward_tilt", "2")
    assert line == "unknown argument --reward_tilt (sample weight with this flag: rt_dm; this run uses none)"
