"""The report of whole, degraded and hostile run folders."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmdr.evaluation.names import TIMES
from dmdr.evaluation.report import _running_mean, _thin, write_report
from dmdr.images import image_grid, save

CONFIG = """\
model: digits
rl: refl
reward: 0.3*hps+0.3*clip
num_inference_steps: 4
stage1_steps: 6
stage2_steps: 4
dmd_weight: 1.0
seed: 0
"""
COLUMNS = {
    "teacher, 28 steps": {"accuracy": 0.988, "frechet_distance": 13.12, "reward/hps": 0.28113},
    "stage 1": {"accuracy": 1.0, "frechet_distance": 681.5, "recall": float("nan"), "novel": 3},
}
STAGE_LINE = 'class="stage-boundary"'


class Checker(HTMLParser):
    """Collects what a browser would fetch or run, the tags that are open, and the words of the page."""

    void = ("meta", "link", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.images = 0
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "foreignobject")
        values = {name: value or "" for name, value in attrs}
        assert not [name for name in values if name.startswith("on")]
        self.addresses += [values[name] for name in ("src", "href", "xlink:href", "srcset") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        self.images += tag == "img"
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(folder: Path) -> tuple[str, Checker]:
    """Write the report; it must be well formed, fetch nothing, and leave no other file behind."""
    before = set(folder.iterdir())
    path = write_report(folder)
    assert set(folder.iterdir()) == before | {folder / "report.html"}
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    assert all(address.startswith(("data:", "#")) for address in checker.addresses)
    assert len(checker.ids) == len(set(checker.ids))
    assert {address[1:] for address in checker.addresses if address.startswith("#")} <= set(checker.ids)
    assert not re.search(r"https?://|@import", html)
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    return html, checker


def log(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step: int, **metrics: Any) -> dict[str, Any]:
    return {"step": step, "stage": 1 if step <= 6 else 2, "loss/dmd": 1 / step, "seconds": 0.5} | metrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run of two stages; each grid has a grey of its own."""
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "evaluation.json").write_text(json.dumps({"columns": COLUMNS, "samples": 2000}))
    log(folder, [row(step, **{"reward/hps": 0.3, "grad_norm/student": 10.0**step}) for step in range(1, 11)])
    for i, name in enumerate(("teacher", "step-000003", "step-000006", "step-000008", "step-000010")):
        save(image_grid(torch.full((4, 3, 8, 8), i / 10)), folder / "samples" / f"{name}.png")
    return folder


def test_report_of_a_complete_run(run: Path) -> None:
    html, page = check(run)
    words = " ".join(page.text.split())
    summary = (
        "A 4-step student of digits, trained by 6 updates of distribution matching, then 4 joint updates with refl"
    )
    assert f"{summary} on the reward 0.3*hps+0.3*clip." in words
    assert page.images == 3
    assert "Student, stage 1 update 6" in words
    assert "Student, stage 2 update 10" in words
    assert html.count(STAGE_LINE) == 4  # one a curve
    assert "Frechet distance lower is better \u2193" in words.replace("distancelower", "distance lower")
    assert re.search(r"13\.1</td>\s*<td>681\.5<", html)
    assert re.search(r"0\.2811</td>\s*<td>\u2013<", html)  # a metric that a column has not
    assert re.search(r"\u2013</td>\s*<td>nan<", html)
    assert "Samples: 2000." in words
    command = f"dmdr-train --config '{run}/config.yaml' --output_dir '{run}-again'"
    assert command in words
    assert "torch " + torch.__version__.split("+")[0] in words
    assert html == check(run)[0]  # the same files give the same report


def test_the_time_of_each_stage_in_words(run: Path) -> None:
    """A line speaks of as many updates as there are since the one before, and evaluations are no part of a step."""
    shares = dict.fromkeys((f"time/{name}" for name in TIMES), 0.0)
    first = shares | {"samples_per_second": 16.0, "peak_memory_gib": 1.5}
    log(
        run,
        [
            row(1, **first | {"time/rollout": 1.0}),
            row(6, **first | {"time/fake": 0.5, "time/rollout": 0.3, "time/evaluation": 0.2}),
            row(8),  # of an older version
        ],
    )
    words = " ".join(check(run)[1].text.split())
    # of 0.5 s and 2.5 s / 0.8
    assert (
        "Stage 1 took 0.5 s a step and rolled out 16 images a second, in at most 1.5 GiB of memory. Its time went into "
        "updates of the fake score (43 %), the student's trajectories (40 %) and evaluations and image grids (17 %)."
    ) in words
    assert "Stage 2 took" not in words


def test_grids_are_the_last_of_each_stage_also_between_logged_steps(run: Path) -> None:
    log(run, [row(5), row(10)])  # the grid of step 6 is summed up by the line of step 10
    words = " ".join(check(run)[1].text.split())
    assert "Student, stage 1 update 3" in words
    assert "Student, stage 2 update 10" in words


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "evaluation.json", "samples"])
def test_report_without_one_of_the_files(run: Path, missing: str) -> None:
    (run / missing).rename(run.parent / missing)
    html, page = check(run)
    assert page.images == (0 if missing == "samples" else 2 if missing == "metrics.jsonl" else 3)
    assert ("evaluation" in page.text) == (missing == "evaluation.json")
    assert (STAGE_LINE in html) == (missing != "metrics.jsonl")
    assert ("dmdr-train" in html) == (missing != "config.yaml")


def test_report_of_an_empty_folder(tmp_path: Path) -> None:
    assert "A few-step student." in " ".join(check(tmp_path)[1].text.split())
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "absent")


def test_report_of_one_stage_that_is_not_finished(run: Path) -> None:
    (run / "config.yaml").write_text(
        CONFIG.replace("rl: refl", "rl: none").replace("stage2_steps: 4", "stage2_steps: 0")
    )
    log(run, [row(step) for step in range(1, 5)])
    html, page = check(run)
    assert STAGE_LINE not in html
    assert "by 6 updates of distribution matching; so far 4 of 6 updates." in " ".join(page.text.split())


def test_report_of_a_single_step_and_of_values_that_are_not_finite(run: Path) -> None:
    nan = float("nan")
    log(run, [row(1, **{"reward/hps": nan, "loss/fake": None, "loss/rl": float("inf"), "note": "text"})])
    html, _ = check(run)
    assert html.count("No finite value was logged.") == 3
    assert html.count("1 not finite") == 3
    assert html.count("<svg") == 2  # loss/dmd and seconds
    assert "note" not in re.sub("<style.*</style>", "", html, flags=re.DOTALL).replace('class="note', "")
    log(run, [row(step, **{"reward/hps": nan if step == 4 else 0.1}) for step in range(1, 11)])
    assert "1 not finite, last 0.1" in check(run)[0]


def test_damaged_files_are_left_out(run: Path) -> None:
    (run / "config.yaml").write_text("model: [unclosed")
    (run / "evaluation.json").write_text("{")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(row(10, **{"loss/dmd": 77.0})) + '\n{"step": 11, "lo')  # logged again, and torn
    (run / "samples" / "teacher.png").write_bytes(b"no image")
    (run / "samples" / "step-000010.png").write_bytes((run / "samples" / "step-000010.png").read_bytes()[:80])
    html, page = check(run)
    assert page.images == 1
    assert "last 77" in html
    assert "model: [unclosed" in html


def test_hostile_text_is_escaped(run: Path) -> None:
    evil = "<script>alert('1')</script><img src=x onerror=y>"
    (run / "config.yaml").write_text(json.dumps({"model": evil, "rl": evil, "reward": evil, "prompts": [evil]}))
    log(run, [row(1, **{f"loss/{evil}": 1.0, f"{evil}/x": 2.0})])
    evaluation = {"columns": {evil: {evil: 1.0}}, "samples": evil, "\ud800": "lone surrogate"}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    html, page = check(run)  # asserts that there is no script element and no event handler
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 8
    assert evil in page.text


def test_stage_line_is_exact_between_logged_steps(run: Path) -> None:
    def boundary(config: str) -> str:
        (run / "config.yaml").write_text(config)
        match = re.search(STAGE_LINE + r'.*?<path d="M ([\d.]+) ', check(run)[0], flags=re.DOTALL)
        assert match
        return match[1]

    log(run, [row(4), row(10)])
    logged, exact = boundary(CONFIG.replace("stage1_steps: 6", "")), boundary(CONFIG)
    assert float(logged) < float(exact)
    assert boundary(CONFIG.replace("stage1_steps: 6", "stage1_steps: 400")) == logged  # contradicts the log


def test_long_logs_stay_small_and_keep_their_spikes(run: Path) -> None:
    log(run, [row(step, stage=1, **{"loss/fake": 9.0 if step == 777 else step % 7 / 7}) for step in range(1, 5001)])
    html, _ = check(run)
    assert len(html) < 300_000
    x, y = np.arange(5000.0), np.zeros(5000)
    y[777], y[100:200] = 9.0, np.nan
    thin_x, thin_y = _thin(x, y)
    assert len(thin_x) <= 800
    assert (np.diff(thin_x) > 0).all()
    assert np.nanmax(thin_y) == 9.0
    assert np.isnan(thin_y).any()


def test_a_metric_of_one_stage_in_a_long_log(run: Path) -> None:
    late = [
        row(step, **({"loss/rl": 0.1, "reward/hps": 0.3} if step > 6 else {"loss/fake": 1.0})) for step in range(1, 101)
    ]
    log(run, late)
    assert check(run)[0].count(STAGE_LINE) == 5
    log(run, [line | {"stage": 1 if line["step"] <= 94 else 2} for line in late])
    assert check(run)[0].count(STAGE_LINE) == 5


def test_running_mean_skips_what_is_not_finite() -> None:
    values = np.array([1.0, np.nan, 3.0] + [2.0] * 37)  # a window of 3
    mean = _running_mean(values)
    assert mean[:4].tolist() == pytest.approx([1.0, np.nan, 2.5, 7 / 3], nan_ok=True)
    assert mean[5:].tolist() == pytest.approx([2.0] * 35)


def test_it_explains_the_metrics_that_are_there_and_no_others(run: Path) -> None:
    _, page = check(run)
    assert "Frechet distance" in page.text and "by balls" in page.text  # recall
    assert "Inception score" not in page.text and "Held-out rewards" not in page.text
    (run / "evaluation.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "stage": 1, "loss/dmd": 0.5}\n')
    _, page = check(run)
    assert "Of the fake score, of distribution matching and of each objective." in page.text
    assert "accuracy" not in page.text.lower()


def test_a_hacked_reward_is_named_at_the_top(run: Path) -> None:
    assert 'class="alarm"' not in check(run)[0]
    findings = [{"text": "earlier"}, {"text": "the reward looks <hacked> since update 20"}, {"text": ""}]
    (run / "hacking.json").write_text(json.dumps(findings))
    html, _ = check(run)
    assert html.index("the reward looks &lt;hacked&gt; since update 20.") < html.index("<h2>") and "earlier" not in html
    (run / "hacking.json").write_text("[]")
    assert 'class="alarm"' not in check(run)[0]


def test_the_plan_is_shown(run: Path) -> None:
    (run / "overview.json").write_text('{"update": "64 images (64 a pass)", "stage 1": "5 updates"}')
    _, page = check(run)
    assert "64 images (64 a pass)" in page.text and "5 updates" in page.text
