"""The commands as their users meet them: help, refusals in one line, signals, and few-step samples."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from safetensors.torch import load_file

import dmdr.run.run
from dmdr.cli import plugins, sample, train
from dmdr.run.checkpoint import checkpoints
from log_lines import untimed
from old_files import SAMPLING_OPTIONS

BIN = Path(sys.executable).parent
FAST = {
    "model": "toy",
    "rl": "refl",
    "stage1_steps": 6,
    "stage2_steps": 4,
    "per_device_train_batch_size": 8,
    "fake_updates": 2,
    "logging_steps": 1,
    "sample_steps": 0,
    "sample_images": 2,
    "teacher_steps": 2,
    "report_to": "none",
}

MODULE = """
import os
import time
from dataclasses import dataclass
from typing import ClassVar

from dmdr.backends.toy import Redness

@dataclass
class Opaque:
    differentiable: ClassVar[bool] = False

    def prepare(self, device, dtype): ...

    def __call__(self, images, prompts, **columns):
        return images.detach().float().mean((1, 2, 3))

@dataclass
class Sleepy(Redness):
    def __call__(self, images, prompts, **columns):
        time.sleep(float(os.environ.get("NAP", 0)))
        return super().__call__(images, prompts)

@dataclass
class Plain(Opaque):
    differentiable: ClassVar[bool] = True

@dataclass
class Picky(Opaque):
    def prepare(self, device, dtype):
        raise ValueError("no such\\ncheckpoint")
"""


ADAPTERS = (
    "model family with this flag: Flux2KleinPipeline, FluxPipeline, Krea2Pipeline, QwenImagePipeline, SiTPipeline, "
    "StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, ZImagePipeline; this run uses "
    "ToyPipeline, so leave it out"
)
GROUPS = {"per_device_train_batch_size": 8, "num_generations": 4}


def flags(**settings: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in (FAST | settings).items()]


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package of somebody else with some rewards, a cache of our own, and no report."""
    site = tmp_path_factory.mktemp("site")
    info = site / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    names = ("Opaque", "Picky", "Plain", "Sleepy")
    points = [f"{name.lower()} = stranger_cli:{name}" for name in names]
    points = ["[dmdr.rewards]", *points, "absent = stranger_gone:Absent"]
    (info / "entry_points.txt").write_text("\n".join(points))
    (site / "stranger_cli.py").write_text(MODULE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("DMDR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        yield
    torch.set_num_threads(threads)
    sys.modules.pop("stranger_cli", None)


@pytest.fixture(scope="module")
def finished(surroundings: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    return dmdr.run.run.train(**FAST, output_dir=str(tmp_path_factory.mktemp("finished") / "run"))


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process: its exit code, stdout and stderr."""

    def call(command: ModuleType, *arguments: str) -> tuple[int, str, str]:
        name = f"dmdr-{command.__name__.rpartition('.')[2]}"
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{name}", *arguments])
        with pytest.raises(SystemExit) as end:
            command.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(call: Call, room: Path, recwarn: pytest.WarningsRecorder) -> Callable[..., str]:
    """The one line of a refusal: exit code 2, nothing on stdout, nothing written, no warning of a library."""

    def refused(*arguments: str, command: ModuleType = train) -> str:
        before = everything(room)
        code, out, err = call(command, *arguments)
        assert code == 2, err
        assert out == ""
        assert err.count("\n") == 1
        assert err.endswith("\n")
        name = f"dmdr-{command.__name__.rpartition('.')[2]}: "
        assert err.startswith(name)
        assert everything(room) == before
        assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
        return err.removeprefix(name).strip()

    return refused


# --- Help ----------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "open_clip", "sklearn", "matplotlib")
PLUGINS = ("dmdr_refl", "dmdr_rewards", "dmdr_sd3", "dmdr_digits", "dmdr.backends", "dmdr.matching", "stranger_cli")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ("dmdr-train", "--help"),
            ["objectives: ca_advantage", "refl", "hps", "StableDiffusion3Pipeline", "digits", "--rl TEXT"],
        ),
        (("dmdr-sample", "--help"), ["--prompt", "--num_images"]),
        (("dmdr-plugins", "--help"), ["usage: dmdr-plugins"]),
        (("dmdr-plugins",), ["dmdr_refl:ReFL", "dmdr-plugins check"]),
    ],
    ids=" ".join,
)
def test_help_comes_at_once_and_imports_nothing_heavy(command: tuple[str, ...], said: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(BIN / command[0]), *command[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0
    for text in said:
        assert text in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dmdr.cli.common" in imported
    assert not [name for name in imported if name.split(".")[0] in HEAVY or name.startswith(PLUGINS)]


TRACED = """
import sys
from dmdr.cli import train

class Stderr:  # which says of each line whether torch was there before it
    def write(self, text):
        sys.__stderr__.write(text if text.isspace() else f"{'torch' in sys.modules} {text}")

    def flush(self): ...

    def isatty(self):
        return False

sys.argv[0], sys.stderr = "dmdr-train", Stderr()
train.main()
"""
STARTS = "model toy, rl refl; loading torch and the plugins"


@pytest.mark.parametrize(
    ("arguments", "rank", "code", "said"),
    [
        ((), "0", 2, [f"False dmdr-train: {STARTS}", "True dmdr-train: --eta must be between 0 and 1"]),
        ((), "1", 2, ["True dmdr-train: --eta must be between 0 and 1"]),
        (("--dry_run",), "0", 2, ["True dmdr-train: --eta must be between 0 and 1"]),
        (("--help",), "0", 0, []),
        (("--reward=hpss",), "0", 2, ["False dmdr-train: unknown reward 'hpss' (did you mean 'hps'?)"]),
        (("--backend=nosuch",), "0", 2, ["False dmdr-train: unknown backend 'nosuch'"]),
        (("--model=nosuch",), "0", 2, ["False dmdr-train: --model nosuch is neither a diffusers pipeline folder"]),
        (("--stage1_steps=few",), "0", 2, ["False dmdr-train: --stage1_steps: invalid int value: 'few'"]),
        (("--config=run.yaml",), "0", 2, ["False dmdr-train: --warmup_steps: invalid int value: 'few'"]),
    ],
)
def test_what_is_said_before_torch_is_imported(
    room: Path, arguments: tuple[str, ...], rank: str, code: int, said: list[str]
) -> None:
    Path("run.yaml").write_text("warmup_steps: few\n")
    command = [sys.executable, "-c", TRACED, "--model=toy", "--rl=refl", "--eta=5", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RANK": rank})
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def test_plugins_lists_every_entry_with_its_origin(call: Call) -> None:
    code, out, told = call(plugins, "check")
    rows = [line.split() for line in out.splitlines()]
    assert code == 2 and told == "dmdr-plugins: check: plugins that do not work: 1; the list says why\n"
    assert ["objective", "refl", "dmdr", rows[0][3], "dmdr_refl:ReFL"] in rows
    assert ["reward", "opaque", "stranger", "1.0", "stranger_cli:Opaque"] in rows
    groups = {"objective", "reward", "matching", "sample_weight", "backend", "model", "benchmark"}
    assert {row[0] for row in rows} == groups
    broken = [line for line in out.splitlines() if "broken: " in line]
    assert [line.split()[:4] for line in broken] == [["reward", "absent", "stranger", "1.0"]]
    assert broken[0].endswith("broken: has no module 'stranger_gone': reinstall stranger")


def test_unknown_arguments_of_the_other_commands(refused: Callable[..., str]) -> None:
    assert "--fast" in refused("run", "--prompt", "mode 1", "--fast", command=sample)
    assert "--fast" in refused("--fast", command=plugins)


def test_half_precision_on_a_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [str(BIN / "dmdr-train"), "--model=toy", "--mixed_precision=fp16", "--output_dir=run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == "dmdr-train: --mixed_precision fp16 needs a GPU; on a CPU use bf16 or no"
    assert not list(tmp_path.iterdir())


# --- Bad input of dmdr-train ---------------------------------------------------------------------------------------


def test_a_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BIN / "dmdr-train"), "--rl=refll", "--output_dir=run"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dmdr-train: unknown objective 'refll' (did you mean 'refl'?)")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rl": "refll"}, "unknown objective 'refll' (did you mean 'refl'?)"),
        ({"reward": "toyy"}, "unknown reward 'toyy' (did you mean 'toy'?)"),
        ({"matching": "dmdd"}, "unknown matching 'dmdd' (did you mean 'dmd'?)"),
        ({"model": "toyy"}, "(did you mean 'toy'?)"),
        ({"model": "digit"}, "(did you mean 'digits'?)"),
        ({"rl": "refl+"}, "objective expression 'refl+'"),
        ({"reward": "0.3*"}, "reward expression '0.3*'"),
        ({"reward": "toy+-1*opaque"}, "the weight -1 of 'opaque'"),
        ({"reward": "nan*toy"}, "the weight nan of 'toy'"),
        ({"reward": "absent"}, "stranger_gone"),
        ({"reward": "picky", "rl": "none"}, "reward 'picky': no such checkpoint"),
        ({"reward": "opaque"}, "--rl refl needs the gradient of the reward, and 'opaque' is not differentiable"),
        ({"reward": "toy+opaque"}, "'opaque' is not differentiable"),
        ({"reward": "none"}, "--rl refl reads a reward: name one with --reward"),
        ({"teacher_lora": "x"}, f"unknown argument --teacher_lora=x ({ADAPTERS})"),
        ({"attention_backend": "flash"}, f"unknown argument --attention_backend=flash ({ADAPTERS})"),
        ({"rl_wieght": 1}, "unknown argument --rl_wieght=1 (did you mean '"),
        ({"rl_weight": -1}, "--rl_weight must be at least 0"),
        ({"rl_weight": "nan"}, "--rl_weight must be"),
        ({"sigmas": 0.5, "num_inference_steps": 0}, "--num_inference_steps must be at least 1"),
        ({"per_device_train_batch_size": 5, "num_generations": 2}, "divisible by --num_generations"),
        ({"steps": 4}, "acts on step 4, but the student's last step is 3"),
        ({"steps": 2, "sigmas": 1}, "acts on step 2, but the student's last step is 0"),
        ({"steps": "first"}, "'first'"),
        ({"rl": "grpo"}, "--rl grpo needs --num_generations of at least 2"),
        (GROUPS | {"rl": "grpo", "num_inference_steps": 1}, "it needs --num_inference_steps of at least 2 and --eta"),
        (GROUPS | {"rl": "grpo", "eta": 0}, "it needs --num_inference_steps of at least 2 and --eta above 0"),
        (GROUPS | {"rl": "grpo", "policy_steps": "random:4"}, "--num_inference_steps of at least 5"),
        (GROUPS | {"rl": "grpo", "beta": -1}, "beta must be at least 0, not -1.0"),
        (GROUPS | {"rl": "grpo", "num_generations": 3}, "divisible by --num_generations (3)"),
        ({"rl": "grpo+dpo", "beta": 1}, "unknown argument --beta=1"),
        ({"rl": "dpo"}, "--rl dpo needs --num_generations of at least 2"),
        (GROUPS | {"rl": "dpo", "beta": -1}, "beta must be above 0, not -1.0"),
        (GROUPS | {"rl": "dpo", "form": "transition", "num_inference_steps": 1}, "of at least 2 and --eta above 0"),
        ({"rl": "dpo", "pairs": "pairs.jsonl"}, "pairs.jsonl line 2: no such image: there.png"),
        ({"rl": "srpo", "reward": "opaque"}, "--rl srpo needs the gradient of the reward, and 'opaque' is not"),
        ({"rl": "srpo", "reward": "plain"}, "--rl srpo needs a reward with text features, and 'plain' has none"),
        ({"rl": "srpo", "template": "{prompt}"}, "template must hold {word} and {prompt}"),
        ({"matching": "ac_dmd", "sde_type": "odd"}, "--sde_type"),
        ({"prompts": "none.txt"}, "none.txt"),
        ({"prompts": "."}, "--prompts"),
        ({"prompts": "empty.txt"}, "empty.txt holds no prompt"),
        ({"prompts": "noise.png"}, "--prompts: DMDR cannot read noise.png: the name must end with "),
        ({"config": "none.yaml"}, "cannot read none.yaml"),
        ({"config": "typo.yaml"}, "unknown setting 'lerning_rate' (did you mean 'learning_rate'?)"),
        ({"resume_from_checkpoint": "latest"}, "holds no checkpoint"),
        ({"resume_from_checkpoint": "stray"}, "stray is no checkpoint"),
        ({"init_student": "nonsense", "stage1_steps": 0}, "--init_student nonsense is no checkpoint"),
        ({"init_student": "stray", "stage1_steps": 0}, "--init_student stray is no checkpoint"),
        ({"output_dir": "empty.txt"}, "--output_dir empty.txt"),
        ({"output_dir": "empty.txt/run"}, "--output_dir empty.txt/run"),
        ({"output_dir": "stray"}, "--output_dir stray is not empty"),
        ({"report_to": "paper"}, "--report_to"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input(refused: Callable[..., str], room: Path, settings: dict[str, Any], said: str) -> None:
    (room / "empty.txt").write_text(" \n\n")
    (room / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (room / "typo.yaml").write_text("lerning_rate: 1.0e-4\n")
    Image.new("RGB", (4, 4)).save(room / "here.png")
    pairs = [{"prompt": "mode 0", "chosen": "here.png", "rejected": name} for name in ("here.png", "there.png")]
    (room / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (room / "stray").mkdir()
    (room / "stray" / "thesis.tex").write_text("years of work")
    assert said in refused(*flags(**{"output_dir": "run"} | settings))


def test_a_grid_that_does_not_fall(refused: Callable[..., str]) -> None:
    assert (
        refused(*flags(), "--sigmas", "0.5", "0.7")
        == "--sigmas must be decreasing numbers, above 0 and at most 1, not [0.5, 0.7]"
    )


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (None, "is neither a diffusers pipeline folder (no model_index.json)"),
        ("{", "model_index.json is damaged"),
        ("", "model_index.json is damaged"),
        ("[]", "model_index.json is damaged"),
        ("{}", "model_index.json is damaged"),
        ("\0\xff", "model_index.json is damaged"),
        ('{"_class_name": "KandinskyPipeline"}', "is a KandinskyPipeline, and no backend can train it"),
        ('{"_class_name": ["ToyPipeline"]}', "and no backend can train it"),
    ],
)
def test_a_folder_that_is_no_pipeline(refused: Callable[..., str], room: Path, index: str | None, said: str) -> None:
    (room / "teacher").mkdir()
    (room / "prompts.txt").write_text("a fox\n")
    if index is not None:
        (room / "teacher" / "model_index.json").write_text(index, encoding="latin-1")
    arguments = flags(model="teacher", reward="toy", output_dir="run")
    assert said in refused(*arguments, "--prompts", "prompts.txt")


def test_a_pipeline_folder_without_prompts(refused: Callable[..., str], room: Path) -> None:
    (room / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
    assert "--prompts" in refused(*flags(model=str(room), reward="toy"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "nobody/nothing",
            "--model nobody/nothing: no such folder, and it is not in the hub's cache (it does not answer)",
        ),
        ("./nothing", "--model ./nothing is neither a diffusers pipeline folder (no model_index.json), nor a hub id, "),
    ],
)
def test_a_model_that_is_nowhere(
    refused: Callable[..., str], room: Path, monkeypatch: pytest.MonkeyPatch, model: str, said: str
) -> None:
    """Without a connection, at once, and not when the hub's library has given up."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(room))
    monkeypatch.setattr("dmdr.hub._silence", lambda: "it does not answer")
    monkeypatch.setattr(time, "sleep", None)  # as its library does between two tries
    (room / "prompts.txt").write_text("a fox\n")
    assert refused(*flags(model=model, reward="toy"), "--prompts", "prompts.txt").startswith(said)


def test_a_folder_that_holds_a_run(refused: Callable[..., str], finished: Path, room: Path) -> None:
    shutil.copytree(finished, room / "run")
    line = refused(*flags(output_dir="run"))
    assert "--resume_from_checkpoint latest" in line
    assert "--overwrite_output_dir" in line


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml"])
def test_overwriting_a_folder_that_is_no_run_of_ours(refused: Callable[..., str], room: Path, name: str) -> None:
    (room / "thesis" / "chapters").mkdir(parents=True)
    (room / "thesis" / name).write_text("title: years of work\n")
    (room / "thesis" / "chapters" / "1.tex").write_text("so much of it")
    line = refused(*flags(output_dir="thesis"), "--overwrite_output_dir")
    assert line.startswith("--overwrite_output_dir: thesis has no config.yaml of a DMDR run")


@pytest.mark.parametrize(
    "bad",
    [
        {"rl": "refll"},
        {"reward": "opaque"},
        {"prompts": "none.txt"},
        {"init_student": "x", "stage1_steps": 0},
        {"reward": "picky", "rl": "none"},  # which is found out only when the reward is loaded
    ],
    ids=str,
)
def test_overwriting_deletes_nothing_until_the_settings_are_good(
    refused: Callable[..., str], finished: Path, room: Path, bad: dict[str, Any]
) -> None:
    shutil.copytree(finished, room / "run")
    refused(*flags(output_dir="run", **bad), "--overwrite_output_dir")


# --- Signals -------------------------------------------------------------------------------------------------------


def signalled(arguments: list[str], folder: Path, after: int, number: signal.Signals) -> tuple[int, str]:
    """Exit code and stderr of a `dmdr-train` that gets a signal once it has logged a step beyond `after`."""
    command = [str(BIN / "dmdr-train"), *arguments, "--output_dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        log, ends = folder / "metrics.jsonl", time.monotonic() + 120
        while process.poll() is None and time.monotonic() < ends:
            lines = log.read_text().splitlines() if log.exists() else []
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] > after:
                process.send_signal(number)
                break
            time.sleep(0.02)
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert out == ""
    return process.returncode, err


def test_signals_save_and_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"reward": "sleepy", "stage1_steps": 10, "stage2_steps": 30}
    whole = dmdr.run.run.train(**FAST | settings, output_dir=str(tmp_path / "whole"))

    folder, arguments = tmp_path / "run", flags(**settings)
    resumed = [*arguments, "--resume_from_checkpoint", "latest"]
    reached = [0]
    for given, after, number, expected in (
        (arguments, 0, signal.SIGINT, 130),
        (resumed, 10, signal.SIGINT, 130),
        (resumed, 10, signal.SIGUSR1, 138),
    ):
        monkeypatch.setenv("NAP", "0.25")  # a step is slow enough to be hit
        code, err = signalled(given, folder, max(after, reached[-1]), number)
        monkeypatch.delenv("NAP")
        assert code == expected, err
        said = [line for line in err.replace("\r", "\n").splitlines() if "--resume_from_checkpoint latest" in line]
        assert len(said) == 1
        assert said[0].startswith("stopped at step ")  # on a line of its own, not behind the progress bar
        assert "Traceback" not in err
        latest = checkpoints(folder)[-1]
        assert {path.name for path in latest.iterdir()} == {
            "student.safetensors",
            "fake_score.safetensors",
            "training.pt",
            "progress.json",
            "manifest.json",
        }
        reached.append(json.loads((latest / "progress.json").read_text())["total"])
    assert 0 < reached[1] < 10 < reached[2] < reached[3] < 40

    dmdr.run.run.train(**FAST | settings, output_dir=str(folder), resume_from_checkpoint="latest")
    logs = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, folder)]
    assert [untimed(line) for line in logs[0]] == [untimed(line) for line in logs[1]]
    students = [load_file(f / "student" / "student.safetensors") for f in (whole, folder)]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    assert not list(folder.rglob("*.partial"))


# --- dmdr-sample ---------------------------------------------------------------------------------------------------


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def test_sample_writes_pictures_and_prints_where(call: Call, finished: Path, room: Path) -> None:
    (room / "rows.csv").write_text("text,label\nmode 2,2\nmode 3,3\nmode 2,2\n")
    arguments = ("--prompt", "mode 0", "--prompts", "rows.csv", "--prompt_column", "text", "--num_images", "2")
    code, out, err = call(sample, str(finished), *arguments)
    assert (code, err) == (0, "")
    assert out.split() == [f"samples/{i:04d}.png" for i in range(8)]
    found = pixels(room / "samples")
    assert [picture.shape for picture in found] == [(4, 4, 3)] * 8
    files = [path.name for path in sorted((room / "samples").iterdir())]
    assert files == [*(f"{i:04d}.png" for i in range(8)), "metadata.jsonl"]
    where = {"data_dir": str(room / "samples"), "cache_dir": str(room / "cache")}
    index = load_dataset("imagefolder", split="train", **where)  # as users load it
    assert index["prompt"] == [f"mode {mode}" for mode in (0, 0, 2, 2, 3, 3, 2, 2)]
    assert index["label"] == [None, None, 2, 2, 3, 3, 2, 2]
    assert all(map(np.array_equal, map(np.asarray, index["image"]), found))
    red = [picture[0, 0, 0] for picture in found]
    assert min(red[:2]) > max(red[2:])  # mode 0 lies to the right, 2 to the left, 3 in between
    assert max(red[2:4]) < min(red[4:6])
    kept = pixels(room / "samples")
    for more in (["--num_images", "8"], []):  # of another prompt: none takes the place of one that is there
        code, _, err = call(sample, str(finished), "--prompt", "mode 1", *more)
        count = more[-1] if more else "1"
        said = f"--output_dir samples: samples/metadata.jsonl lists other images than the {count} of this command; give"
        assert code == 2 and said in err
    assert all(map(np.array_equal, pixels(room / "samples"), kept))
    assert call(sample, str(finished), *arguments, "--prompt", "mode 1")[0] == 2  # which would be the first
    (room / "rows.jsonl").write_text('{"prompt": "mode 1", "file_name": "a"}\n')
    assert "rename the column 'file_name'" in call(sample, str(finished), "--prompts", "rows.jsonl")[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cpu_offload"], "--cpu_offload: the model family of {} does not read it; leave it out"),
        (["--quantize", "int8"], "--quantize: the model family of {} does not read it; leave it out"),
        (["--resolution", "64"], "--resolution: the model family of {} does not read it; leave it out"),
        (["--resolution", "64,32"], "--resolution 64,32: give one size"),
    ],
)
def test_sample_refuses_options_that_are_not_read(
    call: Call, finished: Path, room: Path, flags: list[str], said: str
) -> None:
    code, out, err = call(sample, str(finished), "--prompt", "mode 1", *flags)
    assert (code, out, err) == (2, "", f"dmdr-sample: {said.format(finished / 'student')}\n")
    assert not (room / "samples").exists()


def test_sample_is_its_seed(call: Call, finished: Path, room: Path) -> None:
    for name, seed in (("one", "5"), ("two", "5"), ("three", "6")):
        arguments = ("--prompt", "mode 1", "--num_images", "3", "--seed", seed, "--output_dir", name)
        assert call(sample, str(finished / "student"), *arguments)[0] == 0
    one, two, three = (pixels(room / name) for name in ("one", "two", "three"))
    assert all(map(np.array_equal, one, two))
    assert not any(map(np.array_equal, one, three))
    assert not np.array_equal(one[0], one[1])


def test_sample_where_the_teacher_has_moved(call: Call, finished: Path, room: Path) -> None:
    folder = Path(shutil.copytree(finished / "student", room / "student"))
    about = json.loads((folder / "sampling.json").read_text())
    teacher = shutil.copytree(about["base_model"], room / "moved")
    (folder / "sampling.json").write_text(json.dumps(about | {"base_model": str(room / "gone")}))
    code, _, err = call(sample, "student", "--prompt", "mode 1")
    assert code == 2
    assert str(room / "gone") in err
    assert call(sample, "student", "--prompt", "mode 1", "--model", str(teacher))[0] == 0


def test_sample_of_an_older_versions_export(call: Call, finished: Path, room: Path) -> None:
    """Its options are those of all families."""
    old = Path(shutil.copytree(finished / "student", room / "student"))
    about = json.loads((old / "sampling.json").read_text())
    (old / "sampling.json").write_text(json.dumps(about | {"options": SAMPLING_OPTIONS}))
    for name, student in (("one", finished), ("two", old)):
        assert call(sample, str(student), "--prompt", "mode 1", "--num_images", "3", "--output_dir", name)[0] == 0
    assert all(map(np.array_equal, pixels(room / "one"), pixels(room / "two")))


DEEP = """
from dataclasses import dataclass
from dmdr.backends.toy import ToyBackend, ToyOptions

@dataclass(frozen=True, kw_only=True)
class DeepOptions(ToyOptions):
    depth: int

class Deep(ToyBackend):
    Options = DeepOptions

    def decode(self, latents, *, exact=False):
        return super().decode(latents * self.options.depth, exact=exact)
"""


def test_a_strangers_family_is_trained_and_sampled(call: Call, room: Path) -> None:
    """With an option that has no default."""
    (room / "deep.py").write_text(DEEP)
    few = flags(rl="none", stage1_steps=2, stage2_steps=0, backend="deep.py:Deep")
    assert call(train, *few, "--output_dir", "refused")[:2] == (2, "")
    assert call(train, *few, "--output_dir", "run", "--depth", "0")[0] == 0
    assert json.loads((room / "run" / "student" / "sampling.json").read_text())["options"]["depth"] == 0
    code, _, err = call(sample, "run", "--prompt", "mode 0")
    said = "run/student/sampling.json names the model family 'deep.py:Deep', which is not installed; if you trust"
    assert code == 2 and err == f"dmdr-sample: {said} its code, add --backend deep.py:Deep\n"
    assert call(sample, "run", "--prompt", "mode 0", "--backend", "deep.py:Deep")[0] == 0
    (picture,) = pixels(room / "samples")
    assert picture[0, 0].tolist() == [128, 128, 128]  # as far right as left


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((".", "--prompt", "mode 1"), "no sampling.json"),
        (("nowhere", "--prompt", "mode 1"), "nowhere"),
        (("{run}",), "--prompt"),
        (("{run}", "--prompt", "mode 1", "--num_images", "0"), "--num_images"),
        (("{run}", "--prompt", "mode 1", "--num_images", "many"), "many"),
        (("{run}", "--prompt", "mode 1", "--seed", "x"), "--seed"),
        (("{run}", "--prompts", "none.txt"), "none.txt"),
        (("{run}", "--prompts", "empty.txt"), "empty.txt holds no prompt"),
        (("{run}", "--prompt", "mode 1", "--model", "empty.txt"), "--model empty.txt"),
        (("{run}", "--prompt", "mode 1", "--output_dir", "empty.txt"), "--output_dir empty.txt"),
        ((), "student"),
    ],
)
def test_bad_input_of_sample(
    refused: Callable[..., str], finished: Path, room: Path, arguments: tuple[str, ...], said: str
) -> None:
    (room / "empty.txt").touch()
    assert said in refused(*(a.format(run=finished) for a in arguments), command=sample)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_sample_of_a_damaged_export(refused: Callable[..., str], finished: Path, room: Path, content: str) -> None:
    folder = Path(shutil.copytree(finished / "student", room / "student"))
    (folder / "sampling.json").write_text(content)
    assert "sampling.json" in refused("student", "--prompt", "mode 1", command=sample)
