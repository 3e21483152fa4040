"""Objectives and rewards named on the command line: from files of the user's own, resumed, and on real adapters."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dmdr import train
from dmdr.cli import sample
from dmdr.errors import ConfigError, TrainingError
from dmdr.run.job import assemble
from dmdr.run.run import Run
from dmdr.settings.parse import parse
from dmdr_digits import Digits

FAST: dict[str, Any] = {
    "model": "toy",
    "stage1_steps": 3,
    "stage2_steps": 4,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "fake_updates": 2,
    "logging_steps": 1,
    "sample_steps": 0,
    "sample_images": 2,
    "teacher_steps": 2,
    "report_to": "none",
}
SCORES = '''
from dataclasses import dataclass
from functools import partial
import io
from PIL import Image
import torch
from dmdr.protocols import Needs
from dmdr.types import Term

def size(images, prompts, **columns):
    """Bytes of each image as PNG; nothing for one prompt."""
    assert images.dtype == torch.float32 and images.ndim == 4 and 0 <= images.min() and images.max() <= 1
    assert len(prompts) == len(images) and not torch.is_grad_enabled()
    found = []
    for image, prompt in zip(images, prompts):
        file = io.BytesIO()
        Image.fromarray((255 * image.permute(1, 2, 0)).byte().numpy()).save(file, "png")
        found.append(None if prompt == "mode 2" else len(file.getvalue()))
    return found

def tensor(images, prompts, **columns):
    return images.mean((1, 2, 3))

def short(images, prompts, **columns):
    return [0.0]

def wrong(pictures, prompts):
    return pictures

def more(images, prompts, threshold, **columns):
    return images

async def width_of(image: Image.Image, label, prompt: str):
    """The label, seen from within the picture; nothing for one label."""
    assert image.mode == "RGB" and prompt == f"mode {label}"
    return None if label == 2 else image.width + label

def len_of_prompt(factor, images, prompts, **columns):
    return [factor * len(prompt) for prompt in prompts]

sized = partial(len_of_prompt, 1)

class Callable:
    def __call__(self, images, prompts, **columns):
        return [0.5 * number for number in range(len(images))]

callable_object = Callable()

@dataclass
class Unfinished:
    strength: float = 1.0

@dataclass
class Mine:
    """An objective in a file.

    Attributes:
        strength: How strong.
    """

    strength: float = 1.0

    @property
    def needs(self):
        return Needs(reward_grad=True)

    def __call__(self, draw, ctx):
        self.calls = getattr(self, "calls", 0) + 1
        return Term(-self.strength * ctx.rewards(ctx.backend.decode(draw.leaf), draw.cond.prompts))

@dataclass
class Counting(Mine):
    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]
'''


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> Path:
    """A folder with a file of the user's own, where the command is given."""
    (tmp_path / "my_file.py").write_text(SCORES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").iterdir())[-1] / "student.safetensors")


# --- Files ------------------------------------------------------------------------------------------------------------


def test_grpo_asks_a_function_in_a_file() -> None:
    folder = train(**FAST, rl="grpo", reward="my_file.py:size", output_dir="run")
    found = lines(folder)[-1]
    assert found["grpo/invalid"] > 0  # None is a sample that it cannot score
    assert found["reward/my_file.py:size"] > 60  # bytes


def test_a_function_joins_a_sum_and_returns_what_it_likes() -> None:
    folder = train(**FAST, rl="grpo", reward="0.5*toy+2*my_file.py:tensor", output_dir="run")
    found = lines(folder)[-1]
    total = found["reward_weighted/toy"] + found["reward_weighted/my_file.py:tensor"]
    assert found["reward/total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("name", "mean"), [("sized", 6.0), ("callable_object", 3.75)])
def test_whatever_can_be_called_is_a_reward(name: str, mean: float) -> None:
    folder = train(**FAST, rl="grpo", reward=f"my_file.py:{name}", output_dir="run")
    assert lines(folder)[-1][f"reward/my_file.py:{name}"] == mean


def test_grpo_asks_a_coroutine_about_pictures_and_a_column(room: Path) -> None:
    rows = [{"prompt": f"mode {label}", "label": label} for label in range(4)]
    (room / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = FAST | {"rl": "grpo", "reward": "my_file.py:width_of", "max_concurrency": 2}
    folder = train(**settings, prompts="rows.jsonl", output_dir="run")
    found = lines(folder)[-1]
    assert found["grpo/invalid"] > 0
    assert found["reward/my_file.py:width_of"] > 1
    assert "my_file_py_width_of_max_concurrency: 2" in (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="needs the prompts to have a column 'label'; they have none"):
        train(**settings, output_dir="other")


def test_files_of_one_name_and_names_that_begin_with_a_digit(room: Path) -> None:
    (room / "a").mkdir()
    (room / "a" / "2.py").write_text(
        "from __future__ import annotations\n"
        + SCORES.replace("float", "Real").replace("import io", "import io\nReal = float")
    )
    (room / "2.py").write_text(SCORES)
    settings = parse(settings=FAST | {"rl": "a/2.py:Mine+2.py:Mine", "reward": "toy"})
    assert [plugin.options for plugin in settings.of("objectives")] == [{"strength": 1.0}] * 2
    assert parse(["--model=toy", "--rl=2.py:Mine", "--_2_py_Mine_strength=3"]).of("objectives")[0].options == {
        "strength": 3.0
    }


def test_a_function_of_an_installed_module(monkeypatch: pytest.MonkeyPatch, room: Path) -> None:
    (room / "site" / "mypackage").mkdir(parents=True)
    (room / "site" / "mypackage" / "scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(room / "site")
    settings = parse(settings=FAST | {"rl": "grpo", "reward": "mypackage.scores:tensor"})
    assert [plugin.name for plugin in settings.of("rewards")] == ["mypackage.scores:tensor"]


def test_an_objective_in_a_file_has_flags() -> None:
    settings = parse(["--model=toy", "--rl=my_file.py:Mine", "--strength=3"])
    (mine,) = settings.of("objectives")
    assert mine.build().strength == 3.0
    folder = train(**FAST, rl="my_file.py:Mine", reward="toy", strength=2.0)
    assert folder == Path("runs/toy-my_file.py_Mine")
    assert "my_file_py_Mine_strength: 2.0" in (folder / "config.yaml").read_text()


NEEDS = """
from dataclasses import dataclass
from dmdr.backends.toy import Redness
from dmdr.protocols import Needs

class Base:
    def __call__(self, draw, ctx): ...

@dataclass
class Method(Base):
    def needs(self): ...

@dataclass
class Typo(Base):
    needs = property(lambda self: Needs(rewards_grad=True))

@dataclass
class Step(Base):
    needs = property(lambda self: Needs(steps="first"))

@dataclass
class Role(Base):
    needs = property(lambda self: Needs(roles="reference"))

@dataclass
class Lost(Redness):
    def prepare(self, device, dtype):
        open("gone")
"""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": "no_file.py:size"}, "'no_file.py:size' cannot be imported: FileNotFoundError: no such file"),
        ({"reward": "my_file.py:sice"}, "'my_file.py:sice': there is no 'sice' in my_file.py"),
        ({"reward": "no_module:size"}, "No module named 'no_module'; write a file as path/to/file.py:name"),
        ({"reward": "my_file.py:wrong"}, "must be callable as score(images, prompts, **columns)"),
        (
            {"reward": "my_file.py:more"},
            "reward 'my_file.py:more' needs the prompts to have a column 'threshold'; they have none",
        ),
        ({"reward": "my_file.py:Unfinished"}, "has no differentiable and no prepare"),
        ({"rl": "my_file.py:Unfinished", "reward": "toy"}, "has no needs"),
        ({"reward": "my_file.py:size", "rl": "refl"}, "'my_file.py:size' is not differentiable"),
        ({"rl": "my_file.py:size", "reward": "toy"}, "objective 'my_file.py:size' is no class"),
        ({"reward": "broken.py:size"}, "'broken.py:size' cannot be imported: SyntaxError"),
        ({"reward": "leaves.py:size"}, "'leaves.py:size' cannot be imported: SystemExit: 5"),
        ({"reward": "needs.py:Lost"}, "reward 'needs.py:Lost': [Errno 2] No such file or directory: 'gone'"),
        ({"rl": "needs.py:Method", "reward": "toy"}, "write `needs` as a @property that returns it"),
        ({"rl": "needs.py:Typo", "reward": "toy"}, "--rl needs.py:Typo: Needs.__init__() got an unexpected keyword"),
        ({"rl": "needs.py:Step", "reward": "toy"}, "needs.steps must be any, last, stochastic or a tuple of indices"),
        ({"rl": "needs.py:Role", "reward": "toy"}, "needs.roles must be a tuple of student, fake_score, reference"),
    ],
)
def test_refuses_what_cannot_be_used(room: Path, settings: dict[str, Any], said: str) -> None:
    (room / "broken.py").write_text("def size(:")
    (room / "leaves.py").write_text("import sys\nsys.exit(5)")
    (room / "needs.py").write_text(NEEDS)
    with pytest.raises(ConfigError) as caught:
        train(**FAST | {"rl": "grpo", "output_dir": "run"} | settings)
    assert said in str(caught.value)
    assert not (room / "run").exists()


def test_a_function_that_breaks_its_promise_is_named() -> None:
    with pytest.raises(TrainingError, match=r"'my_file\.py:short' returned 1 scores for 16 images"):
        train(**FAST, rl="grpo", reward="my_file.py:short", output_dir="run")


# --- The average of the student --------------------------------------------------------------------------------------


def test_the_average_is_what_users_get() -> None:
    plain = train(**FAST, reward="toy", rl="none", output_dir="plain")
    averaged = train(**FAST, reward="toy", rl="none", ema_decay=0.9, output_dir="averaged")
    first, last = (averaged / "checkpoints" / f"step-{step:06d}" for step in (3, 7))
    export = load_file(averaged / "student" / "student.safetensors")
    saved, raw = load_file(last / "ema.safetensors"), load_file(last / "student.safetensors")
    assert all(torch.equal(saved[name], export[name]) for name in saved)
    assert not all(torch.equal(saved[name], raw[name]) for name in saved)  # where the optimizer stands
    other = plain / "checkpoints" / "step-000003" / "student.safetensors"
    moved = [
        sum(t.abs().sum() for n, t in load_file(f).items() if "4" in n) for f in (first / "ema.safetensors", other)
    ]
    assert 0 < moved[0] < moved[1]  # the last layer starts at zero
    assert not (plain / "checkpoints" / "step-000007" / "ema.safetensors").exists()


def test_a_run_with_an_average_may_be_made_longer() -> None:
    settings = FAST | {"reward": "toy", "rl": "none", "ema_decay": 0.9}
    whole = train(**settings | {"stage2_steps": 6}, output_dir="whole")
    train(**settings, output_dir="run")
    longer = train(output_dir="run", resume_from_checkpoint="latest", stage2_steps=6)
    for file in ("student.safetensors", "ema.safetensors"):
        one, two = (load_file(folder / "checkpoints" / "step-000009" / file) for folder in (whole, longer))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_run_starts_from_the_average() -> None:
    first = train(**FAST, reward="toy", rl="none", ema_decay=0.9, output_dir="first")
    rest = {"init_student": str(first), "output_dir": "second", "stage1_steps": 0, "stage2_learning_rate": 1e-30}
    second = train(**FAST | rest, reward="toy", rl="none")
    average = load_file(first / "checkpoints" / "step-000003" / "ema.safetensors")
    export = load_file(second / "student" / "student.safetensors")
    torch.testing.assert_close(export["net.0.weight"], average["net.0.weight"], rtol=0, atol=1e-9)
    raw = load_file(first / "checkpoints" / "step-000003" / "student.safetensors")
    assert not torch.equal(raw["net.0.weight"], average["net.0.weight"])


def test_terms_of_one_name_have_labels_of_their_own() -> None:
    """A curve each, their own flags, and the weights of the sum."""
    sums = {"rl": "refl as any_step+0.5*refl as last_step", "reward": "toy as red+0.5*toy as also_red"}
    folder = train(**FAST | sums, last_step_steps="last", output_dir="run")
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["any_step/weight"] == 2 * line["last_step/weight"]
    assert line["any_step/coverage"] == 1 > line["last_step/coverage"]
    assert line["reward_weighted/also_red"] == line["reward/red"] / 2 == line["reward/also_red"] / 2
    assert {"loss/any_step", "loss/last_step"} <= line.keys() and "reward/toy" not in line


@pytest.mark.parametrize(
    ("settings", "said"), [({"ema_decay": 0.9}, "holds no average"), ({"grpo_beta": 0.1}, "holds no reference")]
)
def test_what_a_checkpoint_lacks_is_found_before_anything_is_written(settings: dict[str, Any], said: str) -> None:
    folder = train(**FAST, reward="toy", rl="grpo", output_dir="run")
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=said):
        train(output_dir="run", resume_from_checkpoint="latest", **settings)
    assert (folder / "config.yaml").read_text() == before
    train(output_dir="run", resume_from_checkpoint="latest")


def test_a_finished_run_that_is_resumed_keeps_the_state_of_its_objective() -> None:
    def count(folder: Path) -> Any:
        file = folder / "checkpoints" / "step-000007" / "training.pt"
        return torch.load(file, weights_only=True)["extra"]["objectives"]["my_file.py:Counting"]

    folder = train(**FAST, reward="toy", rl="my_file.py:Counting", output_dir="run")
    assert count(folder) == {"calls": 4}
    train(output_dir="run", resume_from_checkpoint="latest", rl="my_file.py:Counting")
    assert count(folder) == {"calls": 4}


# --- Several processes ------------------------------------------------------------------------------------------------


WATCHED = """
import atexit
from pathlib import Path
from dmdr.cli.train import main

def left():
    for file in Path("/proc/self/task").glob("*/comm"):
        if "gloo" in file.read_text():
            print("runs on:", file.read_text(), end="")

atexit.register(left)
main()
"""


def test_two_processes_are_one_run(room: Path) -> None:
    """With everything that is gathered (groups, rewards, a KL, an average of the student), and nothing left running.

    A thread of gloo's that outlives the interpreter aborts the process now and then, after all the work is done.
    """
    settings = FAST | {"rl": "grpo+0.1*refl", "reward": "toy", "num_iterations": 2, "grpo_beta": 0.1, "ema_decay": 0.5}
    one = train(**settings, output_dir="one")
    flags = [f"--{name}={value}" for name, value in (settings | {"per_device_train_batch_size": 8}).items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    (room / "watched.py").write_text(WATCHED)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "watched.py", *flags, "--output_dir=two"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done: two/report.html\n"
    apart = [load_file(folder / "student" / "student.safetensors") for folder in (one, room / "two")]
    for name, tensor in apart[0].items():
        torch.testing.assert_close(apart[1][name], tensor, rtol=0, atol=1e-5)
    assert len(lines(room / "two")) == len(lines(one))

    given = ["--prompt=mode 0", "--prompt=mode 1", "--prompt=mode 2"]  # 3 images, shares of 2
    sample.run([str(one), *given, "--output_dir=drawn"])
    again = [*launch, "-m", "dmdr.cli.sample", str(one), *given, "--output_dir=shared"]
    shared = subprocess.run(again, capture_output=True, text=True, env=environment | {"ACCELERATE_USE_CPU": "true"})
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.split() == [f"shared/{i:04d}.png" for i in range(3)]
    drawn = [{file.name: file.read_bytes() for file in (room / name).iterdir()} for name in ("drawn", "shared")]
    assert drawn[0] == drawn[1]


# --- On real adapters -------------------------------------------------------------------------------------------------


def test_grpo_on_an_sd3_pipeline_finds_a_lora_weight_that_moved(digits: Digits, tmp_path: Path) -> None:
    """The first replay of a rollout is what the rollout computed, and changed weights stop the run."""
    settings = {"model": "digits", "rl": "grpo", "num_generations": 4, "per_device_train_batch_size": 8}
    settings |= {"report_to": "none", "num_eval_samples": 0, "eta": 0.7, "gradient_accumulation_steps": 2}
    job = assemble(parse(settings=settings))
    run = Run(job, tmp_path / "run", None, None)
    job.backend.prepare(run.accelerator, roles=("student", "fake_score"))
    assert job.rewards is not None
    job.rewards.prepare(run.accelerator.device, torch.float32)
    trainer = run.trainers.of(run.plan.stages[1])
    with torch.no_grad():
        for name, parameter in trainer.student.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    ctx = trainer.context(0)
    draw = trainer.rollouts.pick(trainer.rollouts.whole(ctx, trainer.objectives.shared_noise(ctx)), ctx)
    (term,) = trainer.objectives.terms
    for part in draw.split(trainer.micro_batch_size):
        for found in term.objective(replace(part, leaf=part.x0), ctx):  # type: ignore[union-attr]
            assert found.loss.requires_grad
    with torch.no_grad():
        for parameter in trainer.student.parameters.values():
            parameter.mul_(3)
    with pytest.raises(TrainingError, match=r"before the first update the mean of step 0 is .* from the rollout's"):
        trainer.objectives.gradient(draw, ctx)
