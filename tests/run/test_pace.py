"""What a run's log, bar and tracker say: time, speed, memory, learning rates, images, settings and messages."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import dmdr.run.run
from dmdr import train
from dmdr.evaluation.names import metric
from dmdr.run.log import beside_the_bar
from dmdr.run.observer import Observer
from dmdr.run.pace import GIB, Pace

FAST: dict[str, Any] = {
    "model": "toy",
    "rl": "refl",
    "reward": "toy",
    "stage1_steps": 3,
    "stage2_steps": 3,
    "per_device_train_batch_size": 8,
    "fake_updates": 2,
    "logging_steps": 2,
    "sample_steps": 2,
    "sample_images": 2,
    "teacher_steps": 2,
    "seed": 3,
}


def test_a_line_sums_up_the_updates_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = Pace(torch.device("cpu"))
    with pace.clock:
        for seconds, missing in ((1.0, 2), (3.0, 1)):
            now[0] += 2 * seconds  # as much again beside the steps
            pace.add({"unscored/toy": missing, "loss/dmd": 1.0}, seconds, images=16)
        line = pace.line(updates_left=10)
    assert (line["seconds"], line["samples_per_second"], line["unscored/toy"]) == (2.0, 8.0, 3)
    assert line["seconds_left"] == 10 * 4.0 and "loss/dmd" not in line
    assert 0.05 < line["peak_memory_gib"] < 64 and GIB == 1024**3
    pace.add({"unscored/toy": 0}, 1.0, images=16)
    assert pace.line(0)["unscored/toy"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the parent")
def test_memory_is_that_of_the_process_and_not_of_its_parent() -> None:
    child = "import torch\nfrom dmdr.run.pace import peak_memory\nprint(peak_memory(torch.device('cpu')))"
    parent = (
        f"import subprocess, sys\nblock = b'1' * 2**30\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < 0.9 * 2**30


def test_what_image_grids_and_evaluations_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = Pace(torch.device("cpu"))
    with pace.clock:
        for seconds in (1.0, 3.0):
            now[0] += seconds
            pace.add({}, seconds, images=1)
        with pace.evaluating():
            now[0] += 4.0
    assert pace.clock.read()["evaluation"] == 0.5
    with pace.evaluating():  # after the training
        now[0] += 2.0
    assert pace.evaluated() == "6 of 10 seconds (60%)"
    assert pace.too_often(4.0, "eval_steps", 2) == "take 50% of the training's time; --eval_steps 18 would make it 10%"
    assert pace.too_often(4.0, "x", 17) == "take 11% of the training's time; --x 18 would make it 10%"
    assert pace.too_often(4.0, "x", 18) == ""


def test_a_run_says_once_which_setting_makes_it_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dmdr")
    draw, measure = Observer.draw_grid, Observer.measure_student

    def slow(of: Any) -> Any:
        def slowly(*args: Any) -> Any:
            time.sleep(0.3)
            return of(*args)

        return slowly

    monkeypatch.setattr(Observer, "draw_grid", slow(draw))
    monkeypatch.setattr(Observer, "measure_student", slow(measure))
    often = {"eval_steps": 1, "num_eval_samples": 2}
    train(**FAST | often, report_to="none", output_dir=str(tmp_path / "run"))
    said = [message for message in caplog.messages if "of the training's time" in message]
    for each, start in zip(sorted(said), ("evaluations take ", "image grids take "), strict=True):
        assert each.startswith(start)
    assert any(message.startswith("image grids and evaluations: ") for message in caplog.messages)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run with TensorBoard, and what its progress bar was given."""
    shown: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        patch.setattr(tqdm, "set_postfix", lambda self, values, refresh=True: shown.append(values))
        folder = train(**FAST, report_to="tensorboard", output_dir=str(tmp_path_factory.mktemp("run") / "run"))
    return folder, shown


def test_lines_say_where_the_time_went_and_what_is_left(run: tuple[Path, list[dict[str, Any]]]) -> None:
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    for line in lines:
        assert sum(value for name, value in line.items() if name.startswith("time/")) == pytest.approx(1)
        assert line["samples_per_second"] == pytest.approx(2 * 8 / line["seconds"])
        assert (line["seconds_left"] > 0) == (line["step"] < 6)
        assert {"learning_rate/student", "learning_rate/fake_score"} <= line.keys()
        assert all(metric(name) for name in line if name not in ("step", "stage") and not name.startswith("refl/"))
    assert lines[2]["time/evaluation"] > 0 and lines[1]["time/evaluation"] == 0  # the grid of step 2 is in the next


def test_the_bar_shows_each_update(run: tuple[Path, list[dict[str, Any]]]) -> None:
    shown = run[1]
    assert [values["stage"] for values in shown] == ["1"] * 3 + ["2"] * 3
    assert len({values["fake"] for values in shown}) == 6
    assert all({"stage", "dmd", "fake", "left"} <= values.keys() for values in shown)
    assert all("reward" in values for values in shown[:3])  # scored in each update


def test_tensorboard_gets_images_settings_and_both_learning_rates(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder = run[0] / "tensorboard"
    assert any(folder.glob("events.*"))
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert {"learning_rate/student", "learning_rate/fake_score", "time/rollout"} <= set(events.Tags()["scalars"])
    assert [image.step for image in events.Images("samples/teacher")] == [0]
    assert {image.step for image in events.Images("samples/student")} == {0, 2, 3, 4, 6}
    with Image.open(run[0] / "samples" / "step-000006.png") as grid:
        assert (events.Images("samples/student")[-1].width, events.Images("samples/student")[-1].height) == grid.size
    (settings,) = folder.glob("*/hparams.yml")
    text = settings.read_text()
    assert "model: toy" in text and "seed: 3" in text and "dyna_renoise: '[4.0, 1.5]'" in text


@pytest.mark.parametrize("where", ["root", "dmdr", "nowhere", "file"])
def test_messages_go_above_the_bar(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever handler prints them; what prints nothing still prints nothing."""
    said: list[str] = []
    logger, root = logging.getLogger("dmdr"), logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(logger, "handlers", [])
    handler = logging.FileHandler(tmp_path / "log") if where == "file" else logging.StreamHandler(sys.stderr)
    if where != "nowhere":
        (logger if where == "dmdr" else root).addHandler(handler)
    monkeypatch.setattr(tqdm, "write", lambda message, **to: said.append(message))
    with beside_the_bar():
        logger.warning("look")
    assert said == ([] if where == "file" else ["look"])
    handler.close()
