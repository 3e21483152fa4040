"""Evaluations of a run that ask a benchmark, compare with images, or have nothing to measure."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dmdr.run.run
from dmdr import images, train
from dmdr.cli import train as train_command
from dmdr.errors import ConfigError
from dmdr.images import read_image
from processes import start

BENCHMARK = '''
from dataclasses import dataclass

from dmdr.benchmarks import Figure
from dmdr.prompts import read_prompts


@dataclass
class Near:
    """Mean redness, and how far it is from that of other images."""

    images_per_prompt = 1
    layout = "flat"
    reference_images: str | None = None
    times: float = 1.0

    def about(self):
        return f"Near {self.reference_images}."

    def rows(self, prompts, column):
        return read_prompts(prompts, column=column).rows

    def compared_with(self):
        return self.reference_images

    def prepare(self, device, dtype):
        if self.times < 0:
            raise ValueError("times must be 0 or more")

    def answers(self, images, rows):
        return {"red": images[:, 0].mean((1, 2)), "said": [row["prompt"] for row in rows]}

    def figures(self, answers, rows, reference):
        assert answers.texts("said") == [row["prompt"] for row in rows]
        assert len(answers.tensor("red")) == len(rows)
        found = {"red": Figure.mean(answers.tensor("red").whole(), rows)}
        found["all"] = Figure(float(answers.tensor("red").whole().mean()))
        if reference:
            shift = answers.tensor("red").whole().mean() - reference.tensor("red").whole().mean()
            found["shift"] = Figure(self.times * float(shift))
        return found
'''
SETTINGS: dict[str, Any] = {
    "model": "toy",
    "rl": "none",
    "reward": "none",
    "stage1_steps": 2,
    "stage2_steps": 0,
    "fake_updates": 1,
    "sample_images": 2,
    "teacher_steps": 2,
    "report_to": "none",
    "num_eval_samples": 5,
    "eval_steps": 1,
}


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near.py").write_text(BENCHMARK)
    return tmp_path


def column(folder: Path, title: str) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and errors of an evaluation."""
    found = json.loads((folder / "evaluation.json").read_text())
    return found["columns"][title], found["errors"][title]


def in_processes(rank: int, folder: str) -> None:
    settings = {**SETTINGS, "eval_benchmark": "near.py:Near", "reference_images": "teacher", "near_py_Near_times": 2.0}
    settings["per_device_train_batch_size"] = 4
    train(**settings, output_dir=folder)


def test_a_benchmark_is_asked_in_each_evaluation(room: Path) -> None:
    settings = {**SETTINGS, "eval_benchmark": "near.py:Near", "reference_images": "teacher", "times": 2.0}
    folder = train(**settings, output_dir="run")
    kept = sorted((folder / "reference").glob("*.png"))
    assert len(kept) == 5 and (folder / "reference" / "metadata.jsonl").is_file()
    red = torch.stack([read_image(path)[0].double().mean() / 255 for path in kept]).mean().item()
    metrics, errors = column(folder, "stage 1")
    name = "near.py:Near/{}".format
    assert metrics[name("shift")] == pytest.approx(2 * (metrics[name("all")] - red), abs=1e-4)
    assert errors.keys() == {name("red")} and errors[name("red")] > 0
    assert "teacher, 2 steps" in json.loads((folder / "evaluation.json").read_text())["columns"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(f"eval/{name('red')}" in line for line in lines) == 2  # every update
    report = (folder / "report.html").read_text()
    assert f"{metrics[name('red')]:.3f} ± {errors[name('red')]:.3f}" in report and "Near teacher." in report
    # The same of a folder, and of two processes
    other = train(**{**settings, "reference_images": str(folder / "reference")}, output_dir="again")
    assert column(other, "stage 1")[0] == pytest.approx(metrics)
    start(in_processes, 2, "both")
    close = pytest.approx(metrics, abs=3 / 255 / 5)  # images of one colour in 8 bits: one of five may round otherwise
    assert column(room / "both", "stage 1")[0] == close


def test_what_a_benchmark_refuses_is_one_line(room: Path) -> None:
    settings = {**SETTINGS, "eval_benchmark": "near.py:Near"}
    for more, said in (
        ({"times": -1.0}, "benchmark 'near.py:Near': times must be 0 or more"),
        ({"eval_benchmark": "near.py:Near+judge"}, "write the name of one benchmark; an evaluation has one"),
        ({"eval_benchmark": "nothing"}, "unknown benchmark 'nothing'"),
        ({"num_eval_samples": 0}, "--eval_benchmark and --eval_steps are not read without --num_eval_samples"),
    ):
        with pytest.raises(ConfigError, match=said.replace("+", r"\+")):
            train(**{**settings, **more}, output_dir="run")
    with pytest.raises(ConfigError, match="no such folder: nowhere"):
        train(**settings, reference_images="nowhere", output_dir="run")


def test_what_no_evaluation_could_be_made_with_is_refused_before_training(room: Path) -> None:
    settings = {**SETTINGS, "eval_steps": 0}
    for more, said in (
        (
            {"eval_benchmark": "preference"},
            "--eval_benchmark preference scores by rewards, which an evaluation measures",
        ),
        ({"eval_benchmark": "judge"}, "--eval_benchmark judge scores by rewards"),
        ({"eval_benchmark": "ocr"}, "--eval_benchmark ocr: the run's prompts: row 1 has no text between"),
        ({"eval_benchmark": "geneval"}, "--eval_benchmark geneval: the run's prompts row 1: tag must be"),
        ({"eval_benchmark": "near.py:Near", "reference_images": "nowhere"}, "no such folder: nowhere"),
        (
            {"eval_benchmark": "ocr", "reference_images": "nowhere"},
            "--reference_images is not read by --eval_benchmark ocr",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            train(**{**settings, **more}, output_dir="run")
        assert not (room / "run").exists()


def test_the_teachers_images_are_drawn_anew_where_they_would_be_others(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmdr.run.run, "write_report", lambda folder: None)
    settings = {**SETTINGS, "eval_benchmark": "near.py:Near", "reference_images": "teacher", "eval_steps": 0}
    folder = train(**settings, output_dir="run") / "reference"
    first = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    longer = {"stage1_steps": 3, "resume_from_checkpoint": "latest", "output_dir": "run"}
    train(**{**settings, **longer})
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == first
    train(**{**settings, **longer, "stage1_steps": 4, "num_eval_samples": 3, "teacher_steps": 3})
    again = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(again) == 3 and again != {name: first[name] for name in again}


def test_an_evaluation_that_measures_nothing_is_not_made(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmdr.run.run, "write_report", lambda folder: None)
    with caplog.at_level(logging.WARNING, "dmdr"):
        folder = train(**{**SETTINGS, "eval_steps": 0}, output_dir="run")
    assert (
        "no evaluation is made: there is no reward, no judge, and no --reference_images to compare with" in caplog.text
    )
    assert not (folder / "evaluation.json").exists()


def test_images_to_compare_with_name_the_benchmark(room: Path) -> None:
    """Where none is named, it is the distance in DINOv2's space; networks and folder are still the user's."""
    images.save(images.to_pil(torch.rand(1, 3, 8, 8))[0], room / "real" / "0.png")
    with pytest.raises(ConfigError, match="dinov2 none is no folder"):
        train(**SETTINGS, reference_images="real", dinov2="none", output_dir="run")


def test_what_a_file_says_of_evaluations_that_are_not_made_stops_no_run(
    room: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmdr.run.run, "write_report", lambda folder: None)
    left = {name: value for name, value in SETTINGS.items() if name not in ("num_eval_samples", "eval_steps")}
    (room / "run.yaml").write_text(yaml.dump(left | {"reference_images": "gone", "output_dir": "run"}))
    with caplog.at_level(logging.WARNING, "dmdr"):
        train_command.run(["--config", "run.yaml"])
    assert "the file sets reference_images: not read without --num_eval_samples" in caplog.text
    assert (room / "run" / "student").is_dir()
