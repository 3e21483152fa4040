"""The judge of a named model as a benchmark: the metrics of a run, of any images, in a memory that stays flat."""

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dmdr import images
from dmdr.benchmarks import AsksTheModel, Benchmark, BringsRows, KeptAnswers, ScoresByRewards
from dmdr.cli import eval as command
from dmdr.errors import ConfigError
from dmdr.evaluation.evaluate import evaluate
from dmdr.statistics import prompt_means
from dmdr_benchmarks.judged import Judged
from dmdr_digits import Digits
from dmdr_digits.data import PROMPTS, scans
from pretend_device import DEVICE, pretended

CPU = torch.device("cpu")
EACH = 6  # images of a digit
MIX = "0.5*toy+2*mine.py:score"
NAMES = {  # of `evaluate`, and of the benchmark
    "accuracy": "accuracy",
    "frechet_distance": "frechet_distance",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "inception_score",
    "reward/toy": "reward/toy",
    "reward/mine.py:score": "reward/mine.py:score",
    "reward/total": "reward/total",
}


class Scorer:
    """The rewards of MIX."""

    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        return {"toy": images[:, 0].mean((1, 2)), "mine.py:score": images.amax((1, 2, 3)) + len(prompts[0]) * 0}

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        return 0.5 * scores["toy"] + 2 * scores["mine.py:score"]


def drawn(each: int = EACH) -> tuple[Tensor, list[str]]:
    """So many scans of each digit, of which half are made hard to read, as their files hold them; their prompts."""
    rows = torch.cat([(scans().labels == digit).nonzero()[:each, 0] for digit in range(10)])
    found = scans()[rows]
    noise = torch.rand(found.images.shape, generator=torch.Generator().manual_seed(0))
    share = 0.7 * (torch.arange(len(rows)) % 2)[:, None, None, None]
    return (found.images.lerp(noise, share) * 255).round() / 255, [PROMPTS[label] for label in found.labels]


def write(folder: Path, pictures: Tensor, prompts: Sequence[str]) -> None:
    for i, image in enumerate(images.to_pil(pictures)):
        images.save(image, folder / "images" / f"{i}.png")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run dmdr-eval by the judge in this process: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "mine.py").write_text("def score(image, prompt):\n    return image.max()\n")

    def call(*arguments: str) -> tuple[int, str, str]:
        flags = ["images", "--benchmark=judge", "--prompts=prompts.txt", "--device=cpu", *arguments]
        monkeypatch.setattr(sys, "argv", ["/usr/bin/dmdr-eval", *flags])
        with pytest.raises(SystemExit) as end:
            command.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def figures(folder: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(folder.read_text())["models"]["images"][0]["figures"]
    return found


def asked(model: Any = None) -> Judged:
    benchmark = Judged()
    benchmark.ask(model or Digits())
    benchmark.prepare(CPU, torch.float32)
    return benchmark


# --- Figures ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_a_run_says(call: Callable[..., Any], digits: Digits, tmp_path: Path) -> None:
    pictures, prompts = drawn()
    write(tmp_path, pictures, prompts)
    code, out, err = call("--model=digits", f"--reward={MIX}", "--output_dir=out")
    assert code == 0, err
    expected = evaluate(pictures, prompts, {}, digits.judge(), Scorer()).metrics
    assert expected.keys() == NAMES.keys()
    found = figures(tmp_path / "out" / "judge.json")
    assert list(found) == ["accuracy", "frechet_distance", *list(NAMES.values())[2:]]
    for theirs, ours in NAMES.items():
        assert found[ours]["value"] == pytest.approx(expected[theirs], rel=1e-6), ours
    assert 0.3 < expected["accuracy"] < 0.95 and 0 < expected["precision"] < 1 and 0 < expected["recall"] < 1
    correct = digits.judge().correct(pictures, prompts)
    error = prompt_means(correct, prompts).std() / 10**0.5
    assert found["accuracy"]["standard_error"] == pytest.approx(error.item(), rel=1e-5)
    assert found["frechet_distance"]["standard_error"] is None
    about = "By DigitJudge, against 1,797 real images; accuracy and rewards, which are raw, are means over prompts."
    assert out.splitlines()[0] == about
    with (tmp_path / "out" / "images" / "judge.csv").open() as lines:
        header, *rows = csv.reader(lines)
    assert header == ["image", "prompt", "accuracy", "reward/toy", "reward/mine.py:score", "reward/total"]
    assert [row[1] for row in rows] == prompts
    assert [float(row[2]) for row in rows] == correct.tolist()


def test_means_are_over_prompts(call: Callable[..., Any], digits: Digits, tmp_path: Path) -> None:
    """A run draws as many images of each prompt; of other images, a prompt with many does not count more."""
    pictures, prompts = drawn()
    pictures, prompts = pictures[:15], prompts[:15]
    write(tmp_path, pictures, prompts)
    assert call("--model=digits", "--reward=toy")[0] == 0
    found = figures(tmp_path / "evaluation" / "judge.json")
    correct = digits.judge().correct(pictures, prompts)
    assert found["accuracy"]["value"] == pytest.approx(prompt_means(correct, prompts).mean().item(), rel=1e-6)
    assert abs(found["accuracy"]["value"] - correct.mean().item()) > 0.01
    assert "reward/total" not in found  # of a single reward


def test_parts_of_it(digits: Digits) -> None:
    """Of three images there is no distance; of a judge without probabilities, no inception score; no reward."""
    pictures, prompts = drawn(1)
    rows: list[Mapping[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    benchmark = asked()
    assert isinstance(benchmark, Benchmark) and isinstance(benchmark, AsksTheModel)
    assert isinstance(benchmark, BringsRows) and isinstance(benchmark, ScoresByRewards)
    assert benchmark.own_rows() == digits.prompts()
    three = KeptAnswers(benchmark.answers(pictures[:3], rows[:3]))
    assert list(benchmark.figures(three, rows[:3], None)) == ["accuracy", "inception_score"]
    four = KeptAnswers(benchmark.answers(pictures[:4], rows[:4]))
    assert list(benchmark.figures(four, rows[:4], None)) == list(NAMES.values())[:2] + list(NAMES.values())[2:5]

    class Unsure:
        """A judge that has no probabilities."""

        def __init__(self) -> None:
            judge = digits.judge()
            self.features, self.embed, self.correct = judge.features, judge.embed, judge.correct
            self.reference = judge.reference

    class Model(Digits):
        def judge(self) -> Any:
            return Unsure()

    other = asked(Model())
    answers = other.answers(pictures, rows)
    assert "probabilities" not in answers
    assert "inception_score" not in other.figures(KeptAnswers(answers), rows, None)


def test_on_a_device(digits: Digits) -> None:
    pictures, prompts = drawn()
    rows: list[Mapping[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    benchmark = asked()
    answers = benchmark.answers(pictures, rows)
    expected = benchmark.figures(KeptAnswers(answers), rows, None)
    with torch.no_grad(), pretended():
        benchmark.ask(digits)
        benchmark.prepare(DEVICE, torch.float32)
        found = benchmark.answers(pictures.to(DEVICE), rows)
        kept = {name: value.cpu() for name, value in found.items() if isinstance(value, Tensor)}
        assert {value.device.type for value in found.values() if isinstance(value, Tensor)} == {DEVICE.type}
        figures = benchmark.figures(KeptAnswers(kept), rows, None)
    assert kept.keys() == answers.keys()
    for name, figure in expected.items():
        assert figures[name].value == pytest.approx(figure.value, rel=1e-6), name


@pytest.mark.parametrize("model", [(), ("--model=toy",)])
def test_a_model_with_a_judge_is_needed(call: Callable[..., Any], tmp_path: Path, model: tuple[str, ...]) -> None:
    write(tmp_path, *drawn(1))
    code, out, err = call(*model)
    said = "dmdr-eval: benchmark 'judge' needs a model that brings a judge: --model digits\n"
    assert (code, out, err) == (2, "", said)
    assert not (tmp_path / "evaluation").exists()
    with pytest.raises(ConfigError):
        Judged().ask(None)


# --- Memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def peak_of(folder: Path, count: int) -> float:
    """MiB at the peak of dmdr-eval on so many scans, each a little changed. A process counts what its parent had when
    it began, and this one has much: one between them has little."""
    random = np.random.default_rng(0)
    rows = np.arange(count) % len(scans())
    pixels = (scans().images.permute(0, 2, 3, 1).numpy()[rows] * 239).round().astype(np.uint8)
    pixels += random.integers(0, 16, pixels.shape, dtype=np.uint8)
    folder.mkdir()
    np.savez(folder / "samples.npz", pixels)
    (folder / "prompts.txt").write_text("".join(f"{PROMPTS[label]}\n" for label in scans().labels[rows].tolist()))
    flags = ["--benchmark=judge", "--model=digits", "--prompts=prompts.txt", "--device=cpu", "--batch_size=64"]
    run = [sys.executable, "-m", "dmdr.cli.eval", "samples.npz", *flags]
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURE, *run], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) / 1024
    print(f"\n{count:,} images: {peak:,.0f} MiB at the peak, {time.monotonic() - begun:.0f} s")
    found = json.loads((folder / "evaluation" / "judge.json").read_text())["models"]["samples"][0]
    assert found["images"] == count and found["figures"]["accuracy"]["value"] > 0.9
    return peak


@pytest.mark.verify
def test_memory_is_flat(tmp_path: Path) -> None:
    few, many = (peak_of(tmp_path / str(count), count) for count in (5_000, 50_000))
    assert many == pytest.approx(few, rel=0.1)
