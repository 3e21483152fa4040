"""The quality gates of the README, on the full digits: `make verify`."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dmdr_digits import Digits
from dmdr_digits.data import PROMPTS, Scans, held_out_scans, nearest_neighbour_distances, train_scans

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FULL = {key: value for key, value in os.environ.items() if key not in ("DMDR_DIGITS_BUDGET", "DMDR_CACHE")}

pytestmark = pytest.mark.verify


@pytest.fixture(scope="module", autouse=True)
def full_digits(own_cache: None) -> Digits:
    """The model of the package; what it does not hold is built at full length into the user's own cache."""
    patch = pytest.MonkeyPatch()
    patch.delenv("DMDR_CACHE")
    digits = Digits()
    digits.folder()
    for reward in ("hps", "clip", "dinov2"):
        digits.reward_checkpoint(reward)
    digits.judge()
    yield digits
    patch.undo()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of both tables, which share their first stage."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("table", ["table.py", "objectives.py"])
def test_tables_and_gates(runs: Path, table: str) -> None:
    """Every gate, seeds 0-2, 2,000 samples each, as the README prints them."""
    found = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "digits" / table), "--output_dir", str(runs)],
        env=FULL,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    print("\n" + found.stdout)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(("flags", "seconds"), [([], 240), (["--stage1_steps", "20", "--stage2_steps", "10"], 60)])
def test_time_and_memory(tmp_path: Path, flags: list[str], seconds: int) -> None:
    """`dmdr-train` from start to report, teacher cached; resident memory under 3 GB."""
    started = time.perf_counter()
    command = [str(BIN / "dmdr-train"), "--output_dir", str(tmp_path / "run"), *flags]
    subprocess.run(command, env=FULL, check=True, stderr=subprocess.DEVNULL)
    took = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\n{' '.join(command[1:])}: {took:.0f} s, {peak:.2f} GiB")
    assert took < seconds
    assert peak < 3


@pytest.mark.parametrize("command", [["dmdr-train", "--help"], ["dmdr-plugins"]], ids=" ".join)
def test_help_within_two_seconds(command: list[str]) -> None:
    started = time.perf_counter()
    subprocess.run([str(BIN / command[0]), *command[1:]], check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - started
    print(f"\n{' '.join(command)}: {took:.1f} s")
    assert took < 2


@pytest.mark.parametrize("flags", [[], ["--model", "toy"]], ids=["digits", "toy"])
def test_first_line_within_three_seconds(tmp_path: Path, flags: list[str]) -> None:
    started = time.perf_counter()
    command = [str(BIN / "dmdr-train"), "--output_dir", str(tmp_path / "run"), *flags]
    with subprocess.Popen(command, env=FULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        line = run.stderr.readline()
        took = time.perf_counter() - started
        run.kill()
    print(f"\n{took:.1f} s: {line}", end="")
    assert "loading torch" in line
    assert took < 3


def knows(digits: Digits, name: str, scans: Scans, held_out: bool = False) -> tuple[float, float]:
    """How often a reward knows which digit a scan is, and that it is better than a degraded copy."""
    import torch

    from dmdr.settings import registry
    from dmdr_digits.cache import isolated
    from dmdr_digits.lessons import degrade

    reward = registry.load("rewards", name)(checkpoint=str(digits.reward_checkpoint(name, held_out=held_out)))
    reward.prepare(torch.device("cpu"), torch.float32)
    with isolated(), torch.no_grad():
        scores = torch.stack([reward(scans.images, [prompt] * len(scans)) for prompt in PROMPTS])
        own = scores.gather(0, scans.labels[None])[0]
        worse = reward(degrade(scans, torch.arange(len(scans))), [PROMPTS[label] for label in scans.labels])
    accuracy = (scores.argmax(0) == scans.labels).float().mean().item()
    preferred = (own > worse).float().mean().item()
    print(f"\n{name}{', held out' * held_out}: accuracy {accuracy:.3f}, prefers the scan {preferred:.3f}")
    return accuracy, preferred


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", ["hps", "clip"])
def test_rewards_know_scans_that_they_never_saw(full_digits: Digits, name: str, held_out: bool) -> None:
    """A held-out reward is no worse a judge."""
    accuracy, preferred = knows(full_digits, name, train_scans() if held_out else held_out_scans(), held_out)
    assert accuracy > 0.93
    assert preferred > 0.87


def test_trained_anew_the_digits_are_as_good_as_those_of_the_package(
    full_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher, judge and the rewards of the demo, each trained by the same code; 10 minutes on one core."""
    import torch

    from dmdr.metrics import frechet_distance

    judge, held_out = full_digits.judge(), held_out_scans()
    packaged = teacher_samples(full_digits)
    monkeypatch.setenv("DMDR_DIGITS_BUDGET", "1")
    monkeypatch.setenv("DMDR_CACHE", str(tmp_path))
    anew = Digits()
    samples, prompts = teacher_samples(anew), [row["prompt"] for row in anew.prompts()] * 200
    reference = judge.features(judge.reference())
    found = [
        (judge.correct(images, prompts).mean().item(), frechet_distance(judge.features(images), reference))
        for images in (packaged, samples)
    ]
    seen = [
        each.correct(held_out.images, [PROMPTS[i] for i in held_out.labels]).mean() for each in (judge, anew.judge())
    ]
    print(f"\nteacher, accuracy and Frechet distance: packaged {found[0]}, anew {found[1]}; judges {seen}")
    assert abs(found[1][0] - found[0][0]) < 0.01 and abs(found[1][1] - found[0][1]) < 5  # noise: see the digits' README
    assert abs(float(seen[1] - seen[0])) < 0.01
    for name in ("hps", "clip"):
        accuracy, preferred = knows(anew, name, held_out)
        assert accuracy > 0.93 and preferred > 0.87
    assert torch.isfinite(samples).all()


def teacher_samples(digits: Digits) -> Any:
    """2,000 images of the teacher in 28 steps, [2000, 3, 8, 8], the digits in turn."""
    import torch
    from accelerate import Accelerator

    from dmdr.randomness import Random
    from dmdr.sampling import FewStepSampler, time_grid
    from dmdr_sd3 import SD3Backend

    backend = SD3Backend(str(digits.folder()), SD3Backend.Options(max_sequence_length=1))
    backend.prepare(Accelerator(cpu=True), roles=("student",))
    prompts = [row["prompt"] for row in digits.prompts()] * 200
    noise = Random(0, 0, "memorisation").normal("noise", torch.arange(len(prompts)), backend.latent_shape)
    sampler = FewStepSampler(backend.path, time_grid(28), 0.0)
    cond = backend.encode(prompts[:200])
    with torch.no_grad():
        parts = [sampler.rollout(backend.teacher, [part] * 28, cond).final for part in noise.split(200)]
        return torch.cat([backend.decode(part) for part in parts])


def test_teacher_does_not_memorise(full_digits: Digits) -> None:
    """Samples lie no nearer to the training scans than held-out scans do, nor than to as many scans never seen."""
    samples = teacher_samples(full_digits)
    train, held_out = train_scans().images, held_out_scans().images
    equal = train[: len(held_out)]
    near = {
        "samples to training scans": nearest_neighbour_distances(samples, equal).mean().item(),
        "samples to held-out scans": nearest_neighbour_distances(samples, held_out).mean().item(),
        "held-out to training scans": nearest_neighbour_distances(held_out, equal).mean().item(),
    }
    print("\n" + ", ".join(f"{name} {value:.3f}" for name, value in near.items()))
    assert near["samples to training scans"] > 0.9 * near["held-out to training scans"]
    assert near["samples to training scans"] > 0.9 * near["samples to held-out scans"]
