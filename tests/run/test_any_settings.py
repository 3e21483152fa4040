"""Whatever is set, as flags, in a file or from Python: a run trains, or says in one line which setting it refuses."""

import contextlib
import dataclasses
import datetime
import io
import os
import re
import shutil
import sys
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from huggingface_hub import constants
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import dmdr.run.run
from dmdr.cli import train as command
from dmdr.cli.common import command as run_command
from dmdr.errors import ConfigError
from dmdr.run.run import train
from dmdr.settings.fields import Config

TINY: dict[str, Any] = {
    "model": "toy",
    "rl": "refl",
    "reward": "toy",
    "stage1_steps": 1,
    "stage2_steps": 1,
    "num_inference_steps": 2,
    "fake_updates": 1,
    "per_device_train_batch_size": 4,
    "sample_steps": 0,
    "sample_images": 1,
    "teacher_steps": 1,
    "report_to": "none",
}
# What a run of seconds can be asked for, by setting; beside these come values that cannot be meant.
SMALL: dict[str, list[Any]] = {
    "model": ["toy", "gone", "a/b"],
    "rl": [
        "none",
        "refl",
        "0.5*refl + grpo",
        "rwr",
        "nft",
        "lcm",
        "tdm_r1",
        "refl as a+refl as b",
        "-1*refl",
        "1e-3*refl",
    ],
    "reward": ["none", "toy", "0.3*toy", "toy as red+toy", "toy+toy", "clipp", "gone.py:score"],
    "eval_reward": ["none", "toy"],
    "matching": ["dmd", "decoupled", "ac_dmd", "tdm", "gndm", "dmd2", "ladd", "none", "dmd+dmd"],
    "sample_weight": ["none", "rt_dm", "gdmd"],
    "prompts": ["prompts.txt", "rows.csv", "none.txt"],
    "prompt_column": ["prompt", "text", "label"],
    "real_images": ["photos", "prompts.txt", "none", "photos:test"],
    "caption_column": ["text", "prompt"],
    "sigmas": [[1.0, 0.5], [1.0], [0.5, 1.0], []],
    "timesteps": [[1000, 500], [1], [0], []],
    "dyna_renoise": [[1.0, 1.0], [4.0, 1.5], [1.0]],
    "guidance_interval": [[0.0, 1.0], [0.2, 0.7], [0.7, 0.2]],
    "per_device_train_batch_size": [1, 2, 4, 6],
    "num_generations": [1, 2, 4],
    "report_to": ["none", "aim", "tensorboard", "tensorboard,"],
    "optim": ["adamw_torch"],
    "init_student": ["gone", "prompts.txt"],
    "resume_from_checkpoint": ["latest", "gone"],
    "output_dir": ["run", "a/b/c", "prompts.txt", "prompts.txt/run"],
    "lr_scheduler_type": ["constant", "linear", "cosine", "loop"],
    "seed": [0, 7, 2**32 - 1, 2**32],
    # of plugins, by their full and short names
    "shift": [1.0, 3, 0, None],
    "refl_steps": ["last", "any", "none"],
    "grpo_beta": [0.0, 0.1, -1],
    "rt_dm_reward_tilt": [0.0, 1.0, -1.0],
    "reward_tilt": [0.5],
    "lora_rank": [4],
    "lerning_rate": [1e-4],
}
NUMBERS = [0, 1, 2, 3, -1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400]
REALS = [0.0, -0.0, 0.5, 1, 1.5, 2, -1.0, 5e-324, 1e-30, 1e-8, 1e30, 1e31, 1e300, 10**400, float("nan"), float("inf")]
# No folder above the room: datasets would read all that is there.
TEXTS = ["", " ", "none", "a\0b", "\ud83d", "x" * 300, "a\nb", "\x1b[31m", "--", "[", "1", "*", "'", "~"]
OTHERS = [None, True, False, [], [1], [[1]], {}, {"a": 1}, b"x", datetime.date(2020, 1, 1), 1.5, "1", object, 1j]
SLOW = {"fake_updates", "stage1_steps", "stage2_steps", "eval_steps", "num_eval_samples"}  # each counts work
HINTS = typing.get_type_hints(Config)


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Values for a setting: usable ones more often than others."""
    kind = HINTS.get(name, Any)
    kinds = (kind, *typing.get_args(kind))
    usual, edges = list(SMALL.get(name, [])), [*TEXTS, *OTHERS]
    usual += [value for each in kinds if typing.get_origin(each) is Literal for value in typing.get_args(each)]
    if bool in kinds:
        usual += [True, False, "yes"]
    if float in kinds:
        usual, edges = [*usual, 0.5, 1, 0.9, 0.1], edges + REALS
    if int in kinds:
        few = [number for number in NUMBERS if not (name in SLOW and 3 < number < 2**63)]
        usual, edges = [*usual, 1, 2, 3], edges + few
    odd = st.sampled_from(edges)
    return st.one_of(*[st.sampled_from(usual)] * 5, odd) if usual else odd


NAMES = sorted({f.name for f in dataclasses.fields(Config)} | SMALL.keys())
SETTINGS = st.lists(st.sampled_from(NAMES), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: values_of(name) for name in names})
)
SOURCES = st.sampled_from(["flags", "file", "python", "mixed"])


@contextlib.contextmanager
def room() -> Iterator[Path]:
    """A folder to be in, with some prompts."""
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp())
    (folder / "prompts.txt").write_text("mode 0\nmode 1\n")
    (folder / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "photos" / "a.png")
    (folder / "photos" / "a.txt").write_text("mode 1")
    (folder / "rows.csv").write_text("prompt,text,label\nmode 0,mode 1,1\nmode 2,mode 3,2\n")
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def as_flags(given: dict[str, Any]) -> list[str]:
    """What a shell could hand over."""
    found = []
    for name, value in given.items():
        texts = [str(each) for each in value] if isinstance(value, list) else [str(value)]
        found += [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
    return [
        text.replace("\0", "").encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") for text in found
    ]


def tried(given: dict[str, str], source: str) -> tuple[int, str]:
    """Exit code and last words of a run with these settings."""
    errors = io.StringIO()
    if source == "python":
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                train(**given)
        except ConfigError as error:
            return 2, f"{error}\n"
        return 0, ""
    arguments = ["--config", "settings.yaml"] if source in ("file", "mixed") else as_flags(given)
    if source == "mixed":
        arguments += as_flags(dict(list(given.items())[::2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dmdr-train", *arguments])
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = run_command(command.run)
    return code, errors.getvalue()


def check(odd: dict[str, Any], source: str, counts: dict[int, int]) -> None:
    if source != "python" and any("\ud800" <= letter <= "\udfff" for value in odd.values() for letter in str(value)):
        odd = {}
    # what no shell and no file could hold is given from Python alone
    given = TINY | ({"output_dir": "run"} if "output_dir" not in odd else {}) | odd
    with room() as folder:
        if source in ("file", "mixed"):
            (folder / "settings.yaml").write_text(yaml.dump(given))
        before = everything(folder)
        code, err = tried(given, source)
        counts[code] = counts.get(code, 0) + 1
        if code == 0:
            assert (folder / "run").exists() or "output_dir" in odd or odd.get("dry_run")
            return
        assert code == 2, err
        assert err.count("\n") == 1 and len(err) < 2000, err
        assert everything(folder) == before, "something was written"
        names = [name for name in given if re.search(rf"\b{re.escape(name)}\b", err)]
        parts = "expression unknown objective reward matching weight model checkpoint --config arguments imported refl:"
        names += [part for part in parts.split() if part in err]
        assert names, err


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """No report, no hub, one cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


EVERY = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.generate,),
}


@given(odd=SETTINGS, source=SOURCES)
@settings(max_examples=60, **EVERY)
def test_a_run_trains_or_says_what_it_refuses(odd: dict[str, Any], source: str) -> None:
    check(odd, source, {})


@pytest.mark.verify
def test_a_thousand_runs_train_or_say_what_they_refuse() -> None:
    counts: dict[int, int] = {}

    @given(odd=SETTINGS, source=SOURCES)
    @settings(max_examples=1000, **EVERY)
    def every(odd: dict[str, Any], source: str) -> None:
        check(odd, source, counts)

    every()
    print(f"\nof {sum(counts.values())} settings, {counts.get(0, 0)} trained and {counts.get(2, 0)} were refused")
