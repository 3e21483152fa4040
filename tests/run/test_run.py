"""A run and its folder: what it holds, how it is interrupted and resumed, and what rewards may do to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import dmdr.run.keeper
import dmdr.run.run
import dmdr.training.scorer
from dmdr.cli.train import main
from dmdr.errors import ConfigError, TrainingError
from dmdr.matching import DMD
from dmdr.run.checkpoint import checkpoints, read_progress
from dmdr.run.run import Trainer, train
from dmdr.run.signals import STOPPING
from dmdr.settings.parse import parse
from log_lines import untimed
from old_files import old_config

# A schedule that moves with the step, so that a resumed run at the wrong one would show.
FAST: dict[str, Any] = {
    "model": "toy",
    "rl": "refl",
    "reward": "toy",
    "stage1_steps": 6,
    "stage2_steps": 4,
    "per_device_train_batch_size": 8,
    "fake_updates": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "seed": 3,
    "logging_steps": 2,
    "sample_steps": 0,
    "sample_images": 2,
    "teacher_steps": 2,
    "report_to": "none",
}
STAGE1 = {name: value for name, value in FAST.items() if name != "rl"} | {"stage2_steps": 0}
STAGE2 = FAST | {"stage1_steps": 0}  # of a given student
RL_ONLY = {name: value for name, value in STAGE2.items() if name != "fake_updates"} | {"dmd_weight": 0.0}
LOGGED = [1, 2, 4, 6, 7, 8, 10]  # the first of a stage, and every second one in it

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

@dataclass
class Greenness:
    differentiable: ClassVar[bool] = True

    def prepare(self, device, dtype): ...

    def __call__(self, images, prompts, **columns):
        return images[:, 1].float().mean((1, 2))

@dataclass
class Moody(Greenness):
    """Fails, or has nothing to say, from its n-th call on."""

    fails: int = 10**9
    blank: int = 10**9
    calls: ClassVar[int] = 0

    def prepare(self, device, dtype):
        type(self).calls = 0

    def __call__(self, images, prompts, **columns):
        type(self).calls += 1
        if self.calls >= self.fails:
            raise RuntimeError("out of\\nsorts")
        scores = super().__call__(images, prompts)
        return scores * float("nan") if self.calls >= self.blank else scores
'''


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package of somebody else with the rewards `green` and `moody`, one thread, and no report: it takes longest."""
    site = tmp_path_factory.mktemp("site")
    info = site / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dmdr.rewards]\ngreen = stranger_run:Greenness\nmoody = stranger_run:Moody")
    (site / "stranger_run.py").write_text(MODULE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("DMDR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        yield
    torch.set_num_threads(threads)
    sys.modules.pop("stranger_run", None)


@pytest.fixture(scope="module")
def whole(surroundings: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, with all that a run folder may hold."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        from dmdr.evaluation.report import write_report

        patch.setattr(dmdr.run.run, "write_report", write_report)
        extra = {"save_steps": 2, "save_total_limit": None, "sample_steps": 4, "num_eval_samples": 4}
        extra |= {"report_to": "tensorboard"}
        assert train(**FAST | extra, output_dir=str(folder)) == folder
    return folder


@pytest.fixture(scope="module")
def stage1(surroundings: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 alone, the start of others."""
    return train(**STAGE1, output_dir=str(tmp_path_factory.mktemp("stage1") / "run"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


def kept(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]


def student(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student" / "student.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether tensors agree to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(patch: pytest.MonkeyPatch, total: int, number: signal.Signals) -> None:
    """A signal during the `total`-th student update of the run."""
    step = Trainer.train_step

    def stepped(self: Trainer, **how: Any) -> dict[str, float]:
        if self.first_step + self.step + 1 == total:
            signal.raise_signal(number)
        return step(self, **how)

    patch.setattr(Trainer, "train_step", stepped)


# --- The folder ----------------------------------------------------------------------------------------------------


def test_run_folder_holds_what_it_promises(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "evaluation.json",
        "guard.safetensors",
        "hacking.json",
        "inputs.json",
        "metrics.jsonl",
        "overview.json",
        "report.html",
        "samples",
        "student",
        "tensorboard",
    }
    names = {"teacher.png", *(f"step-{step:06d}.png" for step in (0, 4, 6, 8, 10))}
    assert {path.name for path in (whole / "samples").iterdir()} == names
    for name in names:
        with Image.open(whole / "samples" / name) as image:
            image.load()
            assert image.mode == "RGB"
    assert {path.name for path in (whole / "student").iterdir()} == {
        "README.md",
        "sampling.json",
        "student.safetensors",
    }
    assert any((whole / "tensorboard").rglob("events.*"))


def test_nothing_partial_is_left_over(whole: Path) -> None:
    hidden = [str(path) for path in whole.rglob("*") if path.name.startswith(".") or "partial" in path.name]
    assert hidden == []


def test_metrics_have_the_promised_keys(whole: Path) -> None:
    assert steps(whole) == LOGGED
    always = {"step", "stage", "loss/dmd", "loss/fake", "reward/toy", "reward_weighted/toy", "reward/total"}
    always |= {"grad_norm/student", "seconds"}
    for line in lines(whole):
        assert line["stage"] == (1 if line["step"] <= 6 else 2)
        assert always <= line.keys()
        assert ("loss/refl" in line) == (line["stage"] == 2)
        assert all(isinstance(value, int | float) for value in line.values())
        assert line["seconds"] > 0
        assert line["reward_weighted/toy"] == line["reward/total"] == line["reward/toy"]


def test_learning_rates_follow_the_schedule_of_each_stage(whole: Path) -> None:
    rates = {line["step"]: line["learning_rate/student"] for line in lines(whole)}
    peak = parse(["--model", "toy"]).config.learning_rate
    assert rates[1] == rates[7] < rates[2] == rates[8] <= peak  # warm-up, anew in stage 2
    assert rates[6] < rates[4] < peak
    assert rates[10] < rates[8]


def test_checkpoints_say_where_the_run_stood(whole: Path) -> None:
    assert kept(whole) == [2, 4, 6, 8, 10]
    progress = [read_progress(path) for path in checkpoints(whole)]
    assert [(p.stage, p.step, p.total, p.prompts_consumed) for p in progress] == [
        (1, 2, 2, 4),
        (1, 4, 4, 8),
        (1, 6, 6, 12),
        (2, 2, 8, 16),
        (2, 4, 10, 20),
    ]
    assert [path.name for path in checkpoints(whole) if (path / "stage_end").exists()] == ["step-000006", "step-000010"]


def test_checkpoints_that_end_a_stage_are_kept_beyond_the_limit(tmp_path: Path) -> None:
    folder = train(**FAST | {"save_steps": 2, "save_total_limit": 2}, output_dir=str(tmp_path / "run"))
    assert kept(folder) == [4, 6, 8, 10]  # two of 2, 4 and 8; 6 and 10 end a stage


def test_evaluations_on_the_way_join_the_line_of_their_step(tmp_path: Path) -> None:
    settings = STAGE1 | {"eval_steps": 4, "num_eval_samples": 4}
    folder = train(**settings, output_dir=str(tmp_path / "run"))
    assert steps(folder) == [1, 2, 4, 6]
    assert [line["step"] for line in lines(folder) if "eval/toy" in line] == [4]
    assert all("loss/dmd" in line for line in lines(folder))


def test_rewards_that_only_measure_are_in_every_evaluation(tmp_path: Path) -> None:
    settings = FAST | {"eval_steps": 3, "num_eval_samples": 4, "eval_reward": "0.5*toy", "reward": "green", "seed": 4}
    folder = train(**settings, output_dir=str(tmp_path / "run"))
    logged = {line["step"]: line for line in lines(folder) if "eval/green" in line}
    assert list(logged) == [3, 6, 9]
    assert "rl_ratio/refl" in logged[9]  # as every line of stage 2 has it, also one that only an evaluation makes
    for line in logged.values():
        assert line["eval_reward/total"] == pytest.approx(0.5 * line["eval_reward/toy"])
        assert "eval/toy" not in line
    for column in json.loads((folder / "evaluation.json").read_text())["columns"].values():
        assert set(column) == {"reward/green", "reward/total", "eval_reward/toy", "eval_reward/total"}
    apart = train(**settings | {"eval_reward": "none"}, output_dir=str(tmp_path / "apart"))
    assert same(student(apart), student(folder))  # it has trained nothing


def test_evaluation_has_its_columns(whole: Path) -> None:
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert evaluation["samples"] == 4
    assert list(evaluation["columns"]) == ["stage 1", "stage 2", "teacher, 2 steps", "teacher, 4 steps"]
    assert all("reward/toy" in column for column in evaluation["columns"].values())


def test_export_says_how_it_is_sampled(whole: Path) -> None:
    about = json.loads((whole / "student" / "sampling.json").read_text())
    assert about["grid"] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert about["sample_eta"] == 1
    assert about["call"] == {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    assert Path(about["base_model"]).is_dir()
    card = (whole / "student" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "4-step student" in card
    assert "`refl` on `toy`" in card


def test_report_is_one_page(whole: Path) -> None:
    html = (whole / "report.html").read_text()
    for part in ("data:image/png", "stage 2", "teacher, 2 steps", "loss/dmd", "stage1_steps"):
        assert part in html


def test_training_has_moved_the_student(whole: Path, stage1: Path) -> None:
    assert not same(student(whole), student(stage1))
    first, last = (load_file(path / "student.safetensors") for path in checkpoints(whole)[::4])
    assert not same(first, last)
    assert same(last, student(whole))


def test_only_stage_1(stage1: Path, whole: Path) -> None:
    assert steps(stage1) == [1, 2, 4, 6]
    assert kept(stage1) == [6]
    assert same(student(stage1), load_file(whole / "checkpoints" / "step-000006" / "student.safetensors"))


def test_an_older_export_is_replaced(copy: Path) -> None:
    (copy / "student" / "old.txt").touch()
    train(**FAST, output_dir=str(copy), resume_from_checkpoint="latest")
    assert "old.txt" not in everything(copy / "student")


# --- The same run again --------------------------------------------------------------------------------------------


def test_command_line_and_python_are_the_same_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{name}={value}" for name, value in FAST.items()]
    monkeypatch.setattr(sys, "argv", ["dmdr-train", *flags, "--output_dir", str(tmp_path / "cli")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"done: {tmp_path / 'cli'}/report.html\n"
    assert same(student(tmp_path / "cli"), student(whole))


def test_config_yaml_repeats_the_run(whole: Path, tmp_path: Path) -> None:
    settings = parse(["--config", str(whole / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    assert settings.as_yaml() == (whole / "config.yaml").read_text()
    again = dmdr.run.run.run(settings)
    assert (again / "config.yaml").read_text() == (whole / "config.yaml").read_text()
    assert same(student(again), student(whole))
    for name in os.listdir(whole / "samples"):
        assert (again / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()


def test_another_seed_is_another_run(stage1: Path, tmp_path: Path) -> None:
    other = train(**STAGE1 | {"seed": 4}, output_dir=str(tmp_path / "other"))
    assert not same(student(other), student(stage1))


def test_train_of_the_package_can_be_called_twice(tmp_path: Path) -> None:
    settings = STAGE1 | {"stage1_steps": 1}
    for name in ("first", "second"):
        import dmdr

        assert dmdr.train(**settings, output_dir=str(tmp_path / name)) == tmp_path / name
    assert same(student(tmp_path / "first"), student(tmp_path / "second"))


def test_python_gets_errors_as_exceptions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'refl'"):
        train(**FAST | {"rl": "refll"}, output_dir=str(tmp_path / "x"))
    with pytest.raises(TrainingError, match="'moody'"):
        train(**FAST | {"reward": "moody", "fails": 1}, output_dir=str(tmp_path / "y"))


def test_python_may_train_in_a_thread(tmp_path: Path) -> None:
    settings = STAGE1 | {"stage1_steps": 1, "output_dir": str(tmp_path / "x")}
    with ThreadPoolExecutor() as pool:  # only the main thread may handle signals; others go without
        assert pool.submit(train, **settings).result() == tmp_path / "x"


def test_python_may_change_the_precision_between_runs(tmp_path: Path) -> None:
    settings = STAGE1 | {"stage1_steps": 1}
    for precision in ("no", "bf16", "no"):
        train(**settings, mixed_precision=precision, output_dir=str(tmp_path / "x"), overwrite_output_dir=True)
        about = json.loads((tmp_path / "x" / "student" / "sampling.json").read_text())
        assert about["mixed_precision"] == precision


def test_numbered_folders_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = FAST | {"stage1_steps": 1, "stage2_steps": 1, "rl": "0.5*refl"}
    assert [str(train(**settings)) for _ in range(2)] == ["runs/toy-0.5xrefl", "runs/toy-0.5xrefl-2"]
    with pytest.raises(ConfigError, match="name the run's folder with --output_dir"):
        train(**settings | {"stage2_steps": 2}, resume_from_checkpoint="latest")
    assert [kept(tmp_path / folder) for folder in ("runs/toy-0.5xrefl", "runs/toy-0.5xrefl-2")] == [[1, 2], [1, 2]]


def test_overwriting_starts_anew(copy: Path) -> None:
    (copy / "notes.txt").touch()
    train(**FAST | {"stage1_steps": 1, "stage2_steps": 1}, output_dir=str(copy), overwrite_output_dir=True)
    assert steps(copy) == [1, 2]
    assert kept(copy) == [1, 2]
    assert not (copy / "notes.txt").exists()
    assert not (copy / "evaluation.json").exists()


def test_an_empty_folder_may_be_the_output(tmp_path: Path) -> None:
    assert train(**STAGE1 | {"stage1_steps": 1}, output_dir=str(tmp_path)) == tmp_path


# --- Steps that are not finite -------------------------------------------------------------------------------------


def broken_from(patch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """The fake score's loss is NaN in these updates of a stage."""
    whole = DMD.fake_loss

    def fake_loss(self: DMD, draw: Any, fake: Any, ctx: Any) -> Any:
        term = whole(self, draw, fake, ctx)
        return replace(term, loss=term.loss * float("nan")) if first <= ctx.step + 1 <= last else term

    patch.setattr(DMD, "fake_loss", fake_loss)


def test_a_run_gets_over_a_few_bad_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a line of its own."""
    broken_from(monkeypatch, 3, 5)
    folder = train(**STAGE1 | {"logging_steps": 4}, output_dir=str(tmp_path / "run"))
    assert [(line["step"], line.get("bad_steps")) for line in lines(folder)] == [(1, None), (3, 1), (4, 2), (5, 3)]
    assert all(p.isfinite().all() for p in student(folder).values())


def test_bad_steps_push_no_checkpoint_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_from(monkeypatch, 3, 6)
    settings = STAGE1 | {"save_steps": 1, "save_total_limit": 1, "max_bad_steps": 2}
    with pytest.raises(TrainingError, match=r"step 5: the fake_score was not updated: .*\(3 steps in a row\)"):
        train(**settings, output_dir=str(tmp_path / "run"))
    assert kept(tmp_path / "run") == [2, 3, 4]  # 2 is the last one of a good step


# --- Interrupted and resumed ---------------------------------------------------------------------------------------


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """A run that nohup started ignores a terminal that closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize(
    ("total", "number"),
    [(1, signal.SIGINT), (3, signal.SIGUSR1), (6, signal.SIGTERM), (7, signal.SIGHUP), (10, signal.SIGTERM)],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, number: signal.Signals
) -> None:
    handlers = {n: signal.getsignal(n) for n in STOPPING}
    with monkeypatch.context() as patch:
        interrupt(patch, total, number)
        expected: type[BaseException] = KeyboardInterrupt if number == signal.SIGINT else SystemExit
        with pytest.raises(expected) as end:
            train(**FAST, output_dir=str(tmp_path / "run"))
    if isinstance(end.value, SystemExit):
        assert end.value.code == 128 + number
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert kept(tmp_path / "run") == sorted({total, 6} if total > 6 else {total})
    assert not (tmp_path / "run" / "student").exists()

    train(**FAST, output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    assert same(student(tmp_path / "run"), student(whole))
    assert steps(tmp_path / "run") == LOGGED
    assert {6, 10} <= set(kept(tmp_path / "run"))
    ends = [path.name for path in checkpoints(tmp_path / "run") if (path / "stage_end").exists()]
    assert ends == ["step-000006", "step-000010"]


@pytest.mark.parametrize("step", [4, 6, 8])
def test_resuming_from_a_saved_step(whole: Path, copy: Path, step: int) -> None:
    before = {line["step"]: line for line in lines(whole)}
    shutil.rmtree(copy / "student")
    resumed = train(**FAST, resume_from_checkpoint=str(copy / "checkpoints" / f"step-{step:06d}"))
    assert resumed == copy
    assert same(student(copy), student(whole))
    assert steps(copy) == LOGGED
    for line in lines(copy):
        assert untimed(line) == untimed(before[line["step"]])


def test_a_run_of_an_older_version_goes_on(whole: Path, copy: Path) -> None:
    """Its config.yaml holds the flags of all families."""
    now = yaml.safe_load((whole / "config.yaml").read_text())
    old = old_config("toy")
    assert {"lora_rank", "reward_tilt"} <= old.keys() - now.keys()
    old |= {name: value for name, value in now.items() if name in old or name.startswith("refl_")}
    (copy / "config.yaml").write_text(yaml.safe_dump(old))
    shutil.rmtree(copy / "student")
    train(resume_from_checkpoint=str(copy / "checkpoints" / "step-000004"))
    assert same(student(copy), student(whole))
    assert (copy / "config.yaml").read_text() == (whole / "config.yaml").read_text()


def test_weight_and_matching_that_keep_a_state_go_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(DMD, "state_dict", lambda self: {"age": torch.tensor(7)}, raising=False)
    monkeypatch.setattr(DMD, "load_state_dict", lambda self, state: loaded.append(state), raising=False)
    settings = STAGE1 | {"tilt_baseline": "ema", "save_steps": 3, "logging_steps": 1}
    smooth = train(**settings, output_dir=str(tmp_path / "smooth"))
    copy = shutil.copytree(smooth, tmp_path / "copy")
    train(**settings, resume_from_checkpoint=str(copy / "checkpoints" / "step-000003"))
    assert loaded == [{"age": torch.tensor(7)}]
    assert same(student(copy), student(smooth))
    for found, expected in zip(lines(copy), lines(smooth), strict=True):
        assert untimed(found) == untimed(expected)
    assert len({line["tilt/max"] for line in lines(smooth)}) == 6

    older = copy / "checkpoints" / "step-000003" / "training.pt"  # of before there was such a state
    saved = torch.load(older, weights_only=True)
    assert saved["extra"].pop("sample_weight")["reward/toy"][0] == 3
    del saved["extra"]["matching"]
    torch.save(saved, older)
    (older.parent / "manifest.json").unlink()
    train(**settings, resume_from_checkpoint=str(older.parent))
    assert not same(student(copy), student(smooth))


def test_resuming_a_finished_run_changes_nothing(whole: Path, copy: Path) -> None:
    train(**FAST | {"save_total_limit": None}, output_dir=str(copy), resume_from_checkpoint="latest")
    assert same(student(copy), student(whole))
    assert (copy / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert kept(copy) == kept(whole)
    assert (
        everything(copy / "checkpoints" / "step-000010").keys() == everything(whole / "checkpoints/step-000010").keys()
    )


def test_a_finished_run_may_be_made_longer(whole: Path, copy: Path) -> None:
    settings = FAST | {"lr_scheduler_type": "constant"}
    train(**settings | {"stage2_steps": 6}, output_dir=str(copy), resume_from_checkpoint="latest")
    assert steps(copy) == [*LOGGED, 12]
    assert 12 in kept(copy)
    assert not same(student(copy), student(whole))


def test_the_learning_rate_of_the_new_settings_counts(copy: Path) -> None:
    new = FAST | {"learning_rate": 5e-4, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}
    train(**new, output_dir=str(copy), resume_from_checkpoint=str(copy / "checkpoints" / "step-000004"))
    rates = {line["step"]: line["learning_rate/student"] for line in lines(copy)}
    assert rates[5] == rates[6] == 5e-4
    assert rates[7] == 1e-3  # stage 2 has its own
    assert "learning_rate: 0.0005\n" in (copy / "config.yaml").read_text()


@pytest.mark.parametrize(("step", "stage1_steps"), [(4, 2), (8, 4), (8, 7)])
def test_another_length_of_stage_1_confuses_no_log(copy: Path, step: int, stage1_steps: int) -> None:
    checkpoint = str(copy / "checkpoints" / f"step-{step:06d}")
    with suppress(ConfigError):  # to refuse it is fine
        train(**FAST | {"stage1_steps": stage1_steps}, resume_from_checkpoint=checkpoint)
    assert steps(copy) == sorted(set(steps(copy)))


def test_what_is_not_complete_is_not_resumed_from(whole: Path, copy: Path) -> None:
    for path in checkpoints(copy)[1:]:
        shutil.rmtree(path)
    partial = copy / "checkpoints" / ".step-000099.partial"
    partial.mkdir()
    (partial / "progress.json").write_text("{")
    train(**FAST, output_dir=str(copy), resume_from_checkpoint="latest")
    assert same(student(copy), student(whole))
    assert steps(copy) == LOGGED


def test_a_torn_log_line_does_not_hinder_resuming(whole: Path, copy: Path) -> None:
    with (copy / "metrics.jsonl").open("a") as log:
        log.write('{"step": 11, "sta')  # a power cut
    train(**FAST, output_dir=str(copy), resume_from_checkpoint="latest")
    assert steps(copy) == LOGGED


def test_a_checkpoint_that_does_not_fit_changes_nothing(copy: Path) -> None:
    (copy / "checkpoints" / "step-000004" / "fake_score.safetensors").unlink()
    before = everything(copy)
    with pytest.raises(ConfigError, match="step-000004 is not complete: it lacks fake_score"):
        train(**FAST | {"seed": 9}, resume_from_checkpoint=str(copy / "checkpoints" / "step-000004"))
    assert everything(copy) == before


def test_the_first_student_is_not_needed_to_resume(
    stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = shutil.copytree(stage1, tmp_path / "start")
    settings = STAGE2 | {"init_student": str(start), "output_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        interrupt(patch, 2, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(**settings)
    shutil.rmtree(start)
    train(**settings, resume_from_checkpoint="latest")
    assert steps(tmp_path / "run") == [1, 2, 4]


def test_a_signal_in_the_save_that_ends_a_stage_waits_for_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, folder = dmdr.run.keeper.save_checkpoint, tmp_path / "run"

    def signalled(*args: Any, **how: Any) -> Path:
        if how["stage_end"]:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(dmdr.run.keeper, "save_checkpoint", signalled)
        with pytest.raises(SystemExit) as end:
            train(**FAST | {"save_steps": 0}, output_dir=str(folder))
    assert end.value.code == 143 and kept(folder) == [6]
    train(**FAST, output_dir=str(folder), resume_from_checkpoint="latest")
    assert same(student(folder), student(whole))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_of_another_kind_ends_at_once(second: signal.Signals) -> None:
    program = (
        "import signal; from accelerate import Accelerator; from dmdr.run.signals import Interrupts\n"
        "with Interrupts(Accelerator(cpu=True)):\n"
        f"    signal.raise_signal(signal.SIGUSR1); signal.raise_signal({int(second)})\n"
        "    print('still here')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == -second and not found.stdout


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(self: Trainer, **how: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(Trainer, "train_step", stuck)
    with pytest.raises(KeyboardInterrupt):
        train(**FAST, output_dir=str(tmp_path / "run"))
    assert kept(tmp_path / "run") == []


# --- A given student -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "step"),
    [("", 6), ("checkpoints/step-000006", 6), ("checkpoints/step-000008", 8), ("student", 10)],
    ids=["run folder", "checkpoint", "checkpoint of stage 2", "export"],
)
def test_starting_from_a_given_student(whole: Path, tmp_path: Path, start: str, step: int) -> None:
    still = {"stage2_learning_rate": 1e-30, "weight_decay": 0.0, "init_student": str(whole / start)}
    folder = train(**STAGE2 | still, output_dir=str(tmp_path / "run"))
    given = load_file(whole / "checkpoints" / f"step-{step:06d}" / "student.safetensors")
    assert same(student(folder), given)
    grids = (folder / "samples" / "step-000000.png", whole / "samples" / f"step-{step:06d}.png")
    assert grids[0].read_bytes() == grids[1].read_bytes()
    assert {line["stage"] for line in lines(folder)} == {2}
    assert steps(folder) == [1, 2, 4]
    assert "loss/refl" in lines(folder)[0]


def test_rl_alone_matches_nothing(stage1: Path, tmp_path: Path) -> None:
    settings = RL_ONLY | {"init_student": str(stage1)}
    folder = train(**settings, output_dir=str(tmp_path / "run"))
    for line in lines(folder):
        assert {"loss/refl", "reward/toy", "grad_norm/student"} <= line.keys()
        assert not {"loss/dmd", "loss/fake", "grad_norm/fake_score"} & line.keys()
    assert not [*folder.rglob("fake_score*")]
    assert not same(student(folder), student(stage1))


def test_overwriting_the_run_that_the_student_comes_from_is_refused(copy: Path) -> None:
    before = everything(copy)
    with pytest.raises(ConfigError, match=r"--overwrite_output_dir|--init_student"):
        train(**STAGE2 | {"init_student": str(copy)}, output_dir=str(copy), overwrite_output_dir=True)
    assert everything(copy) == before


# --- Rewards -------------------------------------------------------------------------------------------------------


def test_each_of_several_rewards_is_logged(tmp_path: Path) -> None:
    folder = train(**FAST | {"reward": "0.5*toy+2*green"}, output_dir=str(tmp_path / "run"))
    assert steps(folder) == LOGGED
    for line in lines(folder):
        assert line["reward/toy"] != line["reward/green"]
        assert line["reward_weighted/toy"] == pytest.approx(0.5 * line["reward/toy"])
        assert line["reward_weighted/green"] == pytest.approx(2 * line["reward/green"])
        assert line["reward/total"] == pytest.approx(line["reward_weighted/toy"] + line["reward_weighted/green"])


def test_without_rewards_none_is_logged(tmp_path: Path) -> None:
    folder = train(**FAST | {"reward": "none", "rl": "none"}, output_dir=str(tmp_path / "run"))
    assert not any(key.startswith(("reward", "tilt")) for line in lines(folder) for key in line)
    assert "aligned" not in (folder / "student" / "README.md").read_text()


@pytest.fixture
def failing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, Path]]:
    """Run with the reward `moody` from the command line: its last line on stderr, and the run folder."""
    monkeypatch.setattr(dmdr.training.scorer, "PATIENCE", 1)

    def run(**settings: Any) -> tuple[str, Path]:
        flags = [f"--{name}={value}" for name, value in (FAST | {"reward": "toy+moody"} | settings).items()]
        monkeypatch.setattr(sys, "argv", ["dmdr-train", *flags, "--output_dir", str(tmp_path / "run")])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert end.value.code == 1
        assert captured.out == ""
        bar, line, rest = captured.err.rsplit("\n", 2)  # the bar is one line that overwrites itself
        assert rest == ""
        assert "\n" not in bar.strip()
        return line, tmp_path / "run"

    return run


@pytest.mark.parametrize("call", [1, 3])
def test_a_reward_that_raises_stops_the_run(failing: Callable[..., tuple[str, Path]], call: int) -> None:
    line, folder = failing(fails=call)
    assert line.startswith("dmdr-train: reward 'moody' failed: RuntimeError: out of sorts (") and ".py, line " in line
    if call == 1:  # there is nothing to go on with
        assert not (folder / "checkpoints").exists()
        return
    assert kept(folder) == [call - 1]
    assert {path.name for path in (folder / "checkpoints" / f"step-{call - 1:06d}").iterdir()} == {
        *("student.safetensors", "fake_score.safetensors", "training.pt", "progress.json", "manifest.json")
    }
    assert steps(folder) == [step for step in LOGGED if step < call]


def test_a_reward_that_raises_only_for_the_log_leaves_the_rest_of_the_line(
    failing: Callable[..., tuple[str, Path]],
) -> None:
    """The first update of stage 2 asks for it twice."""
    _, folder = failing(fails=8)
    assert kept(folder) == [6, 7]
    assert steps(folder) == [step for step in LOGGED if step <= 7]
    assert "loss/refl" in lines(folder)[-1] and "reward/moody" not in lines(folder)[-1]


@pytest.mark.parametrize("call", [1, 3])
def test_a_reward_with_no_finite_value_stops_the_run(failing: Callable[..., tuple[str, Path]], call: int) -> None:
    line, folder = failing(blank=call)
    assert line.startswith("dmdr-train: reward 'moody' has scored none of")
    assert kept(folder) == [call - 1][call == 1 :]


def test_a_reward_with_no_finite_value_stops_stage_2_between_log_lines(
    failing: Callable[..., tuple[str, Path]],
) -> None:
    # Stage 1 and the first step of stage 2 are logged and score once or twice each; then nothing is logged any more.
    line, _ = failing(blank=10, logging_steps=50)
    assert line.startswith("dmdr-train: reward 'moody' has scored none of")


def test_batches_without_a_score_are_counted_over_both_stages(
    failing: Callable[..., tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at the end of stage 1, and the second of stage 2 is the fifth; what was saved before the first stays."""
    monkeypatch.setattr(dmdr.training.scorer, "PATIENCE", 5)
    _, folder = failing(blank=4, logging_steps=1, save_steps=1, save_total_limit=1)
    assert kept(folder) == [3, 4, 5, 6, 7]


def test_a_failure_at_the_start_of_stage_2_leaves_the_stage_1_that_was_reached(
    failing: Callable[..., tuple[str, Path]], stage1: Path
) -> None:
    line, folder = failing(fails=1, reward_tilt=0)  # without RT-DM no reward is asked for before stage 2
    assert "'moody'" in line
    assert kept(folder) == [6]
    assert (folder / "checkpoints" / "step-000006" / "stage_end").exists()
    again = train(**STAGE2 | {"init_student": str(folder)}, output_dir=str(folder.parent / "again"))
    assert steps(again) == [1, 2, 4]


def test_a_failure_does_not_spoil_the_checkpoint_before_it(
    failing: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    smooth = train(**FAST | {"reward": "toy+moody"}, output_dir=str(tmp_path / "smooth"))
    _, folder = failing(fails=5, save_steps=4)  # in the fifth step, after its updates of the fake score
    # Everything else comes from the run's own config.yaml.
    train(output_dir=str(folder), resume_from_checkpoint="latest", moody_fails=1_000_000_000)
    assert same(student(folder), student(smooth))


def test_a_bug_keeps_its_traceback_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def broken(self: Trainer, **how: Any) -> dict[str, float]:
        if self.step:
            raise ZeroDivisionError
        return step(self, **how)

    monkeypatch.setattr(Trainer, "train_step", broken)
    flags = [f"--{name}={value}" for name, value in FAST.items()]
    monkeypatch.setattr(sys, "argv", ["dmdr-train", *flags, "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ZeroDivisionError):
        main()
    assert kept(tmp_path / "run") == [1]


def test_a_run_that_never_trained_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Trainer, **how: Any) -> dict[str, float]:
        raise ZeroDivisionError

    folder = tmp_path / "run"
    settings = STAGE1 | {"stage1_steps": 1, "output_dir": str(folder), "report_to": "tensorboard"}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", broken)
        for seed in (1, 2):  # the second finds what the first has left
            with pytest.raises(ZeroDivisionError):
                train(**settings | {"seed": seed})
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 2
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "overview.json", "samples/teacher.png", "samples/step-000000.png"} < left
    for name in ("notes.txt", "samples/mine.png", "tensorboard/notes.txt", "metrics.jsonl", "evaluation.json"):
        (folder / name).touch()
        with pytest.raises(ConfigError, match="is not empty; go on with"):
            train(**settings)
        (folder / name).unlink()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is not empty; go on with"):
        train(**settings)
    (folder / "link").unlink()
    caplog.clear()
    caplog.set_level("INFO", "dmdr")
    train(**settings)
    assert len([message for message in caplog.messages if "before its first update" in message]) == 1
    assert kept(folder) == [1] and len(list((folder / "tensorboard").glob("events.*"))) == 1
    with pytest.raises(ConfigError, match="is not empty; go on with"):
        train(**settings)


def test_a_folder_that_is_a_link_is_emptied_and_stays_one(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    train(**STAGE1 | {"stage1_steps": 1}, output_dir=str(tmp_path / "link"), overwrite_output_dir=True)
    assert (tmp_path / "link").is_symlink() and kept(copy) == [1] and not (copy / "evaluation.json").exists()


def test_resuming_an_older_checkpoint_leaves_the_later_branch(tmp_path: Path) -> None:
    settings = STAGE1 | {"save_steps": 2, "logging_steps": 1}
    folder = train(**settings, output_dir=str(tmp_path / "run"))
    assert kept(folder) == [2, 4, 6]
    older = folder / "checkpoints" / "step-000002"
    train(**settings | {"stage1_steps": 3}, output_dir=str(folder), resume_from_checkpoint=str(older))
    assert kept(folder) == [2, 3]
    assert steps(folder) == [1, 2, 3]


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    settings = STAGE1
    folder = train(**settings, output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="nothing to train"):
        train(**settings, init_student=str(folder), output_dir=str(tmp_path / "next"))
    assert not (tmp_path / "next").exists()


def test_balancing_by_a_gradient_that_is_switched_off_is_refused(tmp_path: Path) -> None:
    folder = train(**STAGE1, output_dir=str(tmp_path / "run"))
    settings = {"rl_balance": "grad_norm", "init_student": str(folder)}
    with pytest.raises(ConfigError, match="--rl_balance is not read with --dmd_weight 0; leave it out"):
        train(**RL_ONLY | settings, output_dir=str(tmp_path / "next"))


# --- Optimizers -------------------------------------------------------------------------------------------------------


def test_moments_in_eight_bits_are_resumed_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra 8bit")
    settings = FAST | {"optim": "adamw_bnb_8bit", "save_steps": 3}
    smooth = train(**settings, output_dir=str(tmp_path / "smooth"))
    moments = torch.load(smooth / "checkpoints" / "step-000010" / "training.pt", weights_only=True)["moments"]
    for role in ("student", "fake_score"):
        assert "torch.uint8" in str(moments[role])  # of layers large enough
    copy = shutil.copytree(smooth, tmp_path / "copy")
    train(**settings, resume_from_checkpoint=str(copy / "checkpoints" / "step-000003"))
    assert same(student(copy), student(smooth))
    plain = student(train(**FAST, output_dir=str(tmp_path / "plain")))
    gaps = [(value - plain[name]).abs().max().item() for name, value in student(smooth).items()]
    assert 0 < max(gaps) < 2e-3  # ten steps at 1e-3


def test_a_missing_optimizer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="needs bitsandbytes: pip install bitsandbytes"):
        train(**FAST, optim="adamw_bnb_8bit", output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
