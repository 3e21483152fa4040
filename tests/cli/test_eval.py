"""`dmdr-eval` and `dmdr-reward-server` as their users meet them: scores, help, and refusals in one line."""

import csv
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dmdr import images, train
from dmdr.backends.toy import Toy
from dmdr.cli import eval as evaluate
from dmdr.cli import reward_server
from dmdr.evaluation import answers
from dmdr.images import read_image
from dmdr.run.drawing import open_place
from dmdr.statistics import prompt_means
from dmdr_digits import Digits
from dmdr_digits.data import PROMPTS, held_out_scans
from dmdr_rewards.clip import CLIP
from dmdr_rewards.dinov2 import DINOv2
from dmdr_rewards.hps import HPS

BIN = Path(sys.executable).parent
COUNT = 25
KINDS: dict[str, type] = {"hps": HPS, "clip": CLIP, "dinov2": DINOv2}

REWARD = """
import atexit
import os
import signal
from pathlib import Path

calls = []

@atexit.register
def left():
    for file in Path("/proc/self/task").glob("*/comm"):
        if "gloo" in file.read_text():
            print("runs on:", file.read_text(), end="")

def fails(images, prompts, **columns):
    raise RuntimeError("out of order")

def fails_elsewhere(images, prompts):
    calls.append(prompts)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise RuntimeError("out of order")
    return images.mean((1, 2, 3))

def is_stopped(images, prompts):
    signal.raise_signal(signal.SIGTERM)
    return images.mean((1, 2, 3))

def labels(image, prompt, label):
    return None if label == 3 else label + len(prompt) / 100
"""


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder of real scans, 0.png to 24.png, their prompts, and their prompts with labels."""
    monkeypatch.chdir(tmp_path)
    scans = held_out_scans()[:COUNT]
    for i, scan in enumerate(images.to_pil(scans.images)):
        images.save(scan, tmp_path / "scans" / f"{i}.png")
    labels = scans.labels.tolist()
    rows = [{"prompt": PROMPTS[label], "label": label} for label in labels]
    (tmp_path / "prompts.txt").write_text("".join(f"{row['prompt']}\n\n" for row in rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def call(room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run dmdr-eval on the scans in this process: its exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        subjects = [] if any(argument.startswith("--subjects") for argument in arguments) else ["scans"]
        monkeypatch.setattr(sys, "argv", ["/usr/bin/dmdr-eval", *subjects, "--model=digits", *arguments])
        with pytest.raises(SystemExit) as end:
            evaluate.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def launched(*arguments: str) -> list[tuple[int, str, str]]:
    """Run dmdr-eval on the scans in two processes, as a launcher starts them: exit code, stdout and stderr of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    flags = ["scans", "--model=digits", "--prompts=rows.jsonl", "--device=cpu", *arguments]
    command = [sys.executable, "-m", "dmdr.cli.eval", *flags]
    places = [os.environ | place | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, env=place, stdout=pipe, stderr=pipe, text=True) for place in places]
    said = [process.communicate() for process in both]
    return [(process.returncode, *texts) for process, texts in zip(both, said, strict=True)]


def seen() -> tuple[Tensor, list[str], list[int]]:
    """The scans as their files hold them, their prompts and labels."""
    scans = held_out_scans()[:COUNT]
    return (scans.images * 255).round() / 255, [PROMPTS[label] for label in scans.labels], scans.labels.tolist()


def directly(digits: Digits, name: str) -> Tensor:
    """The scores of one reward, asked for without any command."""
    reward = KINDS[name](checkpoint=str(digits.reward_checkpoint(name)))
    if hasattr(reward, "resize"):
        reward.resize = "exact"
    reward.prepare(torch.device("cpu"), torch.float32)
    pictures, prompts, labels = seen()
    with torch.no_grad():
        scores: Tensor = reward(pictures, prompts, label=labels)
    return scores


TABLE = Path("evaluation/scans/preference.csv")  # of the scans


def read(file: Path) -> tuple[list[str], list[list[str]]]:
    with file.open(newline="", encoding="utf-8") as lines:
        header, *rows = csv.reader(lines)
    return header, rows


def column(rows: list[list[str]], i: int) -> Tensor:
    return torch.tensor([float(row[i]) for row in rows])


# --- Scores --------------------------------------------------------------------------------------------------------


def test_scores_of_the_command_are_those_of_the_rewards(room: Path, digits: Digits, call: Callable[..., Any]) -> None:
    expected = {name: directly(digits, name) for name in ("hps", "clip")}
    arguments = ("--prompts=prompts.txt", "--reward=0.3*hps+2*clip", "--output_dir=out", "--batch_size=10")
    code, out, err = call(*arguments)
    assert code == 0, err
    header, rows = read(room / "out" / "scans" / "preference.csv")
    assert header == ["image", "prompt", "hps", "clip", "total"]
    assert [row[:2] for row in rows] == [[f"{i}.png", prompt] for i, prompt in enumerate(seen()[1])]
    forms = {f"preference.{form}" for form in ("json", "md", "tex")}
    assert {path.name for path in (room / "out").iterdir()} == {"scans", *forms}
    expected["total"] = 0.3 * expected["hps"] + 2 * expected["clip"]
    for i, name in enumerate(("hps", "clip", "total"), 2):
        torch.testing.assert_close(column(rows, i), expected[name], atol=1e-5, rtol=0)

    about, heading, line = out.splitlines()[:3]
    assert about == "Mean rewards over prompts, and their standard errors; hps times 100, clip times 100."
    assert heading.split() == ["model", "hps", "clip", "total", "images"]
    said = re.split(r" {2,}", line)
    assert (said[0], said[-1]) == ("scans", str(COUNT))
    for text, (name, scores) in zip(said[1:-1], expected.items(), strict=True):
        means = prompt_means(scores, seen()[1]) * (1 if name == "total" else 100)
        mean, error = map(float, text.split(" ± "))
        assert mean == pytest.approx(means.mean().item(), abs=1e-3)
        assert error == pytest.approx((means.std() / len(means) ** 0.5).item(), rel=1e-2, abs=1e-3)
    assert out.splitlines()[-1] == "saved as out/preference.json, out/preference.md, out/preference.tex"


def test_two_processes_score_as_one(room: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To every bit here, where the score of an image does not depend on those in its batch; and no thread is left."""
    (room / "mine.py").write_text(REWARD)
    (room / "sitecustomize.py").write_text("import dmdr.evaluation.answers as answers\n\nanswers.SHARD = 4\n")
    monkeypatch.setenv("PYTHONPATH", str(room))
    arguments = ("--reward=0.3*toy+2*mine.py:labels", "--batch_size=4")
    code, out, err = call("--prompts=rows.jsonl", "--device=cpu", "--output_dir=alone", *arguments)
    assert code == 0, err
    (first, said, bar), (second, nothing, silent) = launched("--output_dir=both", *arguments)
    assert (first, second, said.replace("both", "alone"), nothing) == (0, 0, out, ""), bar + silent
    assert len(list((room / "both" / "scans" / "preference").iterdir())) == 7
    alone, both = (room / name / "scans" / "preference.csv" for name in ("alone", "both"))
    assert both.read_bytes() == alone.read_bytes()


def test_rows_with_columns(room: Path, digits: Digits, call: Callable[..., Any]) -> None:
    assert call("--prompts=rows.jsonl", "--reward=dinov2", "--dtype=bf16", "--device=cpu")[0] == 0
    rough = column(read(room / TABLE)[1], 2)
    assert call("--prompts=rows.jsonl", "--reward=dinov2")[0] == 0  # other answers, in the place of the first
    _, rows = read(room / TABLE)
    torch.testing.assert_close(column(rows, 2), directly(digits, "dinov2"), atol=1e-5, rtol=0)
    assert 0 < (column(rows, 2) - rough).abs().max() < 0.2


def test_a_server_scores_as_the_command_does(room: Path, call: Callable[..., Any]) -> None:
    command = [BIN / "dmdr-reward-server", "--reward=2*toy", "--port=0", "--max_batch_size=8"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"DMDR_REWARD_TOKEN": "open sesame"}
    ) as server:
        try:
            assert server.stdout
            address = server.stdout.readline().split()[-1]
            assert "asks for a token" in call("--prompts=rows.jsonl", f"--reward={address}")[2]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DMDR_REWARD_TOKEN", "open sesame")
                code, _, err = call("--prompts=rows.jsonl", f"--reward={address}")
        finally:
            server.terminate()
    assert (code, server.wait()) == (0, 0), err
    header, rows = read(room / TABLE)
    assert header == ["image", "prompt", address]
    torch.testing.assert_close(column(rows, 2), 2 * seen()[0][:, 0].mean((1, 2)))


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--port=70000", "--port must be between 0 and 65535, not 70000"),
        ("--max_queue=0", "--max_queue must be above 0, not 0"),
        ("--max_request_mb=nan", "--max_request_mb must be a finite number"),
    ],
)
def test_bad_flags_of_the_server(
    flag: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dmdr-reward-server", "--reward=toy", flag])
    with pytest.raises(SystemExit) as end:
        reward_server.main()
    captured = capsys.readouterr()
    assert (end.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith(f"dmdr-reward-server: {said}")


def test_an_index_says_the_prompt_of_each_image(room: Path, call: Callable[..., Any]) -> None:
    """As `dmdr-sample --num_images 2` writes it: each prompt belongs to two images, whatever their names' order."""
    (room / "mine.py").write_text("def score(image, prompt, label):\n    return label + len(prompt) / 100\n")
    lines = [json.dumps({"file_name": f"{i}.png", "prompt": "x" * (i // 2), "label": i}) for i in range(COUNT)]
    index = room / "scans" / "metadata.jsonl"
    index.write_text("\n".join(reversed(lines)))
    assert call("--reward=mine.py:score")[0] == 0
    _, rows = read(room / TABLE)
    assert [row[0] for row in rows] == [f"{i}.png" for i in reversed(range(COUNT))]
    expected = torch.tensor([i + (i // 2) / 100 for i in reversed(range(COUNT))])
    torch.testing.assert_close(column(rows, 2), expected)
    index.write_text("\n".join(reversed(lines)).replace('"prompt"', '"caption"'))
    assert call("--reward=mine.py:score", "--prompt_column=caption")[0] == 0
    assert read(room / TABLE)[1] == rows
    for content, arguments, said in (
        (lines, ["--prompts=prompts.txt"], '0.png is an image of "", but --prompts prompts.txt has "a handwritten'),
        (lines[2:], [], "metadata.jsonl does not name 2 of the images in its folder, such as 0.png"),
        ([*lines, lines[0].replace("0.png", "x.png")], [], "names x.png, but this image is not in the folder"),
        (
            [*lines, '{"prompt": "a"}'],
            [],
            f"metadata.jsonl row {COUNT + 1} needs a 'file_name': an image in the same folder",
        ),
    ):
        index.write_text("\n".join(content))
        code, _, err = call("--reward=mine.py:score", *arguments)
        assert (code, err.count("\n")) == (2, 1) and said in err


# --- Help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [("dmdr-eval", ["--benchmark TEXT", "--batch_size INT"]), ("dmdr-reward-server", ["--port", "DMDR_REWARD_TOKEN"])],
)
def test_help_comes_at_once(name: str, said: list[str]) -> None:
    before = os.times()
    done = subprocess.run([sys.executable, "-X", "importtime", BIN / name, "--help"], capture_output=True, text=True)
    after = os.times()  # of the processor, which a busy machine does not stretch as it does the clock
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
    assert done.returncode == 0
    for text in (f"usage: {name}", "--reward TEXT", "dinov2", "digits", *said):
        assert text in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "dmdr" in imported
    assert not imported & {"torch", "diffusers", "transformers", "accelerate", "open_clip", "uvicorn", "dmdr_rewards"}


def test_help_of_a_reward(call: Callable[..., Any]) -> None:
    code, out, _ = call("--reward=clip", "--help")
    assert code == 0
    assert all(flag in out for flag in ("--clip_checkpoint", "--checkpoint", "--resize", "--batch_size"))


# --- Bad input -----------------------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--subjects=nowhere",), "no such folder: nowhere"),
        (("--subjects=empty",), "empty holds no image"),
        (("--subjects=noise",), "noise/2.png is no image"),
        (
            ("--prompts=few.txt",),
            "scans holds 25 images, but --prompts few.txt has 2 prompts (blank lines do not count)",
        ),
        (("--prompts=none.txt",), "--prompts: no such file: none.txt"),
        (("--prompts=torn.jsonl",), "--prompts: torn.jsonl line 1 is no JSON: Expecting"),
        (("--reward=dinov2",), "reward 'dinov2' needs the prompts to have a column 'label'; they have none"),
        (("--reward=hsp",), "unknown reward 'hsp' (did you mean 'hps'?)"),
        (("--reward=none",), "--reward none names no reward"),
        (("--rewards=hps",), "unknown argument --rewards=hps (did you mean 'reward'?)"),
        (("--checkpoint=none.pt",), "reward 'hps': checkpoint none.pt does not exist"),
        (("--batch_size=0",), "--batch_size must be at least 1, not 0"),
        (("--device=gpu",), "--device gpu: "),
        (("--device=cuda:99",), "--device cuda:99: "),
        (("--model=digit",), "unknown model 'digit' (did you mean 'digits'?)"),
        (("--output_dir=few.txt",), "--output_dir few.txt cannot be written"),
        (("--output_dir=few.txt/here",), "--output_dir few.txt/here cannot be written"),
        (("--baseline=scan",), "--baseline scan is none of what is measured: scans"),
        (("--benchmark=preferences",), "unknown benchmark 'preferences' (did you mean 'preference'?)"),
        (("--subjects", "scans", "./scans"), "two of what is evaluated are called scans: write NAME=PLACE"),
        (("--subjects", "a=scans", "a=scans", "--baseline=a"), "repetitions cannot be compared image by image"),
        (("--subjects", "teacher"), "teacher: name a run before it, whose teacher it is"),
        (("--num_inference_steps=0",), "--num_inference_steps must be 1 to 1000"),
        (("--seed=1",), "--seed is not read here: nothing is drawn; leave it out"),
        (("--guidance_scale=2",), "--guidance_scale is not read here: neither a pipeline nor a teacher draws"),
        (("--reference_images=empty",), "--reference_images is not read here: the benchmark compares with no images"),
        (
            ("--subjects", "scans", "runs/x"),
            "no such folder: runs/x (if it is a pipeline of the hub, give --guidance_scale)",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(room: Path, digits: Digits, call: Callable[..., Any], arguments: tuple[str, ...], said: str) -> None:
    (room / "few.txt").write_text("one\n\ntwo\n")
    (room / "torn.jsonl").write_text("{'prompt': 'one'}\n")
    (room / "empty").mkdir()
    images.save(images.to_pil(torch.zeros(1, 3, 4, 4))[0], room / "noise" / "1.png")
    (room / "noise" / "2.png").write_text("a text file")
    before = everything(room)
    code, out, err = call("--reward=hps", "--prompts=prompts.txt", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("dmdr-eval: ")
    assert said in err
    assert everything(room) == before


def test_prompts_are_needed_where_a_reward_reads_them(room: Path, call: Callable[..., Any]) -> None:
    code, _, err = call("--reward=hps")
    assert (code, err) == (2, "dmdr-eval: --prompts is missing: scans holds images and no prompts\n")
    blind = "from dmdr.backends.toy import Redness\n\nclass Blind(Redness):\n    reads_prompts = False\n"
    (room / "blind.py").write_text(blind)
    assert call("--reward=blind.py:Blind")[0] == 0
    header, rows = read(room / TABLE)
    assert header == ["image", "prompt", "blind.py:Blind"]
    assert {row[1] for row in rows} == {""}
    torch.testing.assert_close(column(rows, 2), seen()[0][:, 0].mean((1, 2)))


def test_a_failure_on_the_way_keeps_what_has_been_answered(
    room: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "SHARD", 4)
    (room / "mine.py").write_text(REWARD)
    code, out, err = call("--reward=mine.py:fails", "--prompts=prompts.txt")
    assert (code, out) == (1, "")
    where = f"({room / 'mine.py'}, line 16)"
    assert err.splitlines()[-1].endswith(f"reward 'mine.py:fails' failed: RuntimeError: out of order {where}")
    broken = room / "scans" / "23.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-30])
    code, out, err = call("--reward=toy", "--prompts=prompts.txt", "--batch_size=2")
    assert (code, out) == (2, "")
    kept = "the answers about 20 of 25 images are kept in evaluation/scans/preference; the same command goes on"
    assert err.splitlines()[-2:] == [kept, "dmdr-eval: scans/23.png cannot be read: image file is truncated"]
    assert not list(room.rglob("*.tmp")) and not list(room.rglob("*.csv"))
    broken.write_bytes(whole)
    shards = room / "evaluation" / "scans" / "preference"
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    code, resumed, err = call("--reward=toy", "--prompts=prompts.txt")
    assert code == 0 and len(before) == 5
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}.items()
    assert (
        call("--reward=toy", "--prompts=prompts.txt", "--output_dir=anew")[1].splitlines()[:4]
        == (resumed.splitlines()[:4])
    )
    code, _, err = call("--reward=mine.py:is_stopped", "--prompts=prompts.txt", "--batch_size=4")
    assert code == 143 and "the answers about 4 of 25 images are kept in evaluation/scans/preference" in err


def test_a_failure_in_one_process_ends_both(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both have found until then is kept."""
    (room / "mine.py").write_text(REWARD)
    (room / "sitecustomize.py").write_text("import dmdr.evaluation.answers as answers\n\nanswers.SHARD = 5\n")
    monkeypatch.setenv("PYTHONPATH", str(room))
    (first, out, err), (second, nothing, said) = launched("--reward=mine.py:fails_elsewhere", "--batch_size=5")
    why = f"reward 'mine.py:fails_elsewhere' failed: RuntimeError: out of order ({room / 'mine.py'}, line 21)"
    assert (first, out, second, nothing) == (1, "", 1, "")
    kept = "the answers about 15 of 25 images are kept in evaluation/scans/preference; the same command goes on"
    assert err.splitlines()[-2:] == [kept, f"dmdr-eval: {why}"]
    assert said.splitlines()[-1] == f"dmdr-eval: {why}" and "Traceback" not in err + said


def test_what_no_reward_scored_is_no_success(room: Path, call: Callable[..., Any]) -> None:
    (room / "mine.py").write_text("def none(image):\n    return None\n")
    code, out, err = call("--reward=mine.py:none", "--prompts=prompts.txt")
    assert code == 1 and "saved as evaluation/preference.json" in out
    assert err.splitlines()[-1].endswith(
        "dmdr-eval: scans: 'mine.py:none' is of none of 25 images: no answer is finite"
    )


def test_commands_are_modules_that_run(room: Path) -> None:
    for name in ("plugins", "reward_server"):  # other tests run the others
        done = subprocess.run([sys.executable, "-m", f"dmdr.cli.{name}", "--help"], capture_output=True, text=True)
        assert done.stdout.startswith(f"usage: dmdr-{name.replace('_', '-')} "), done.stderr


@pytest.mark.parametrize("place", ["/proc/here", "n" * 300])
def test_a_place_that_takes_no_file_is_refused_before_anything_is_scored(call: Callable[..., Any], place: str) -> None:
    code, out, err = call("--reward=toy", "--prompts=prompts.txt", f"--output_dir={place}")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_refusal_in_a_process_of_its_own(room: Path) -> None:
    done = subprocess.run([BIN / "dmdr-eval", "scans", "--reward=hsp"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("dmdr-eval: unknown reward 'hsp' (did you mean 'hps'?)")


# --- What is drawn -------------------------------------------------------------------------------------------------

BENCHMARK = '''
from dataclasses import dataclass

from dmdr.benchmarks import Figure
from dmdr.prompts import read_prompts


@dataclass
class Red:
    """How red images are.

    Attributes:
        times: What it is multiplied by.
    """

    images_per_prompt = 4
    layout = "grids"
    times: float = 1.0

    def about(self):
        return f"Redness times {self.times:g}."

    def rows(self, prompts, column):
        return read_prompts(prompts, column=column).rows

    def prepare(self, device, dtype):
        pass

    def answers(self, images, rows):
        return {"red": images[:, 0].mean((1, 2)), "id": [row["item_id"] for row in rows]}

    def figures(self, answers, rows, reference):
        assert answers.texts("id") == [row["item_id"] for row in rows]
        return {"redness": Figure.mean(self.times * answers.tensor("red").whole(), rows)}
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run."""
    settings: dict[str, Any] = {"model": "toy", "rl": "none", "reward": "none", "guidance_scale": 1.5}
    settings |= {"stage1_steps": 2, "stage2_steps": 0, "fake_updates": 1, "sample_images": 2, "teacher_steps": 2}
    return train(**settings, report_to="none", output_dir=str(tmp_path_factory.mktemp("runs") / "toy"))


@pytest.fixture
def evaluated(room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run dmdr-eval in this process: its exit code, stdout and stderr."""
    rows = [{"prompt": f"mode {i}", "item_id": f"id{i}"} for i in range(3)]
    (room / "modes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (room / "red.py").write_text(BENCHMARK)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/dmdr-eval", *arguments])
        with pytest.raises(SystemExit) as end:
            evaluate.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def test_a_run_and_its_teacher_are_drawn_measured_and_compared(
    trained: Path, evaluated: Callable[..., Any], room: Path
) -> None:
    place = room / "toy"
    shutil.copytree(trained, place)
    arguments = ["toy", "teacher", "--prompts=modes.jsonl", "--reward=toy", "--baseline=teacher-2"]
    arguments += ["--num_inference_steps", "2", "3", "--images_per_prompt=2", "--guidance_scale=1.5"]
    code, out, err = evaluated("compare", *arguments)
    assert code == 0, err
    names = ["toy-2", "toy-3", "teacher-2", "teacher-3"]
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == names and {line.split()[-1] for line in lines[2:6]} == {"6"}
    assert [line.split()[0] for line in lines[9:12]] == ["toy-2", "toy-3", "teacher-3"]
    output = place / "evaluation"  # beside the run
    assert {path.name for path in output.iterdir()} == {*names, "comparison.html"} | {
        f"preference.{form}" for form in ("json", "md", "tex")
    }
    rows = [{"prompt": f"mode {i}", "item_id": f"id{i}"} for i in range(3) for _ in range(2)]
    for name, teacher in (("toy-3", False), ("teacher-3", True)):
        artist = open_place("toy", teacher=teacher, num_inference_steps=3)
        for one, other in zip(
            artist.draw(rows, 0, room / name), sorted((output / name).glob("images-*/*.png")), strict=True
        ):
            assert torch.equal(read_image(one), read_image(other))
    report = (place / "report.html").read_text()
    assert 'href="evaluation/comparison.html"' in report and 'href="evaluation/preference.md"' in report
    assert (output / "comparison.html").read_text().count("<article") == 6
    with pytest.MonkeyPatch.context() as patch:  # nothing is loaded where all images are there
        patch.setattr("dmdr.run.benchmarking.open_place", None)
        assert evaluated(*arguments)[1].splitlines()[:12] == lines[:12]
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    (room / "two.txt").write_text("mode 1\nmode 2\n")
    arguments[2] = "--prompts=two.txt"
    code, out, err = evaluated(*arguments)
    assert code == 0 and out.splitlines()[2].split()[-1] == "4", err
    # The images of before are still there, and the tables of both.
    assert before.items() <= {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}.items()


def test_a_strangers_benchmark_with_grids(trained: Path, evaluated: Callable[..., Any], room: Path) -> None:
    arguments = ["--benchmark=red.py:Red", "--prompts=modes.jsonl", "--times=100", "--output_dir=out"]
    code, out, err = evaluated(str(trained), *arguments)
    assert code == 0, err
    assert out.splitlines()[:2] == ["Redness times 100.", "model            redness  images"]
    (folder,) = (path for path in (room / "out").iterdir() if path.is_dir())
    (grids,) = folder.glob("images-*/grids")
    assert sorted(path.name for path in grids.iterdir()) == ["id0.png", "id1.png", "id2.png"]
    again = evaluated(f"toy={grids}", *arguments)[1]
    assert again.splitlines()[2].split()[1:] == out.splitlines()[2].split()[1:]
    pixels = np.stack([read_image(path).permute(1, 2, 0).numpy() for path in sorted(folder.rglob("samples/*.png"))])
    np.savez(room / "toy.npz", pixels)
    assert evaluated("toy.npz", *arguments)[1].splitlines()[2].split() == ["toy", *again.splitlines()[2].split()[1:]]
    for name, said in (
        ("--reward=toy", "--reward: benchmark 'red.py:Red' does not score by rewards; leave it out"),
        (
            "--reference_images=scans",
            "--reference_images is not read here: the benchmark compares with no images; leave it out",
        ),
        ("--prompts=prompts.txt", "holds 12 images, but --prompts prompts.txt has"),
    ):
        code, _, err = evaluated("toy.npz", *arguments, name)
        assert (code, err.count("\n")) == (2, 1) and said in err


def test_what_cannot_be_measured_is_not_drawn(trained: Path, evaluated: Callable[..., Any], room: Path) -> None:
    arguments = [str(trained), "--prompts=modes.jsonl", "--output_dir=out"]
    for asked, said in (
        (["--reward=aesthetic", "--aesthetic_checkpoint=none.pth"], "none.pth"),
        (["--benchmark=distribution", "--networks=dino", "--reference_images=none"], "no such folder: none"),
        (
            ["--benchmark=distribution", "--networks=dino", "--reference_images=scans", "--dinov2=none"],
            "dinov2 none is",
        ),
    ):
        code, _, err = evaluated(*arguments, *asked)
        assert (code, err.count("\n")) == (2, 1) and said in err
        assert not [*room.glob("out/**/*.png")]


def test_answers_depend_on_code_and_weights(evaluated: Callable[..., Any], room: Path) -> None:
    (room / "mine.py").write_text("def grey(images, prompts):\n    return images.mean((1, 2, 3))\n")
    arguments = ("scans", "--prompts=prompts.txt", "--reward=2*mine.py:grey+toy")
    first = evaluated(*arguments)[1].splitlines()[2].split()
    other = evaluated("scans", "--prompts=prompts.txt", "--reward=mine.py:grey+toy")[1].splitlines()
    assert "total" not in other[1] and other[2].split()[1] == first[1]
    (room / "mine.py").write_text("def grey(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n")
    importlib.invalidate_caches()
    changed = evaluated(*arguments)[1].splitlines()[2].split()
    assert float(changed[1]) == pytest.approx(1 - float(first[1]), abs=2e-4)


def test_a_judge_reads_prompts_whatever_its_rewards_do(evaluated: Callable[..., Any], room: Path) -> None:
    code, _, err = evaluated("scans", "--benchmark=judge", "--model=digits", "--reward=aesthetic")
    assert code == 2 and "--prompts is missing: scans holds images and no prompts" in err


def test_images_alone_are_compared(trained: Path, evaluated: Callable[..., Any], room: Path) -> None:
    code, out, err = evaluated("compare", str(trained), "teacher", "--prompts=modes.jsonl", "--output_dir=out")
    assert (code, out) == (0, "saved as out/comparison.html\n"), err
    code, _, err = evaluated("compare", "scans", f"run={trained}", "--prompts=modes.jsonl", "--output_dir=out")
    assert code == 2 and "scans holds 25 images, but --prompts modes.jsonl has 3 prompts" in err
    shutil.copytree("scans", "same")
    code, out, err = evaluated("compare", "scans", "same", "--output_dir=without")  # whose names say which they are
    assert (code, out) == (0, "saved as without/comparison.html\n"), err
    assert "24.png" in (room / "without" / "comparison.html").read_text()
    code, out, err = evaluated(str(trained), "--reward=toy", "--output_dir=own")
    assert code == 0 and out.splitlines()[2].split()[-1] == str(len(Toy().prompts())), err
    shutil.copytree(trained, "other")
    config = (room / "other" / "config.yaml").read_text()
    (room / "other" / "config.yaml").write_text(config.replace("prompts: null", "prompts: mine.txt"))
    code, _, err = evaluated("other", "--reward=toy")
    assert code == 2 and "--prompts is missing: other draws images of them (it was trained on mine.txt)" in err
