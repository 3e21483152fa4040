"""The student's average: its closed form, when it moves, and that a checkpoint holds all of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dmdr.ema import EMA
from dmdr.errors import ConfigError
from dmdr.run.checkpoint import Progress, load_parameters, save_checkpoint
from dmdr_grpo import GRPO
from toy_trainer import Plain, prepared, state, trainer


def test_average_follows_its_formula() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = EMA({"p": parameter}, 0.75)
    for step in range(1, 4):
        with torch.no_grad():
            parameter.fill_(float(step))
        ema.update()
    # 0.75^3 start + 0.25 (0.75^2 1 + 0.75 2 + 3)
    expected = 0.75**3 * torch.tensor([1.0, -2.0]) + 0.25 * (0.75**2 + 0.75 * 2 + 3)
    torch.testing.assert_close(ema.average["p"], expected)


def test_applied_puts_the_student_back_even_after_an_error() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = EMA({"p": parameter}, 0.5)
    with torch.no_grad():
        parameter.fill_(3.0)
    ema.update()
    seen = []

    def fail() -> None:
        with ema.applied():
            seen.append(parameter.item())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [2.0]
    assert parameter.item() == 3.0
    assert ema.average["p"].item() == 2.0
    ema.settle()
    assert parameter.item() == 2.0


@pytest.mark.parametrize(("iterations", "micro_batch"), [(1, 16), (1, 4), (2, 4), (3, 16)])
def test_average_moves_once_per_optimizer_step(iterations: int, micro_batch: int) -> None:
    """Neither micro-batches nor policy steps nor fake-score updates count, but every use of a rollout does."""
    toy = trainer(
        prepared(),
        batch=16,
        micro_batch=micro_batch,
        group_size=4,
        rewards=Plain(),
        objectives=[GRPO(num_iterations=iterations)],
        fake_updates=3,
        optimize=lambda p: torch.optim.SGD(p, lr=0.01),
    )
    toy.student.ema = EMA(toy.student.parameters, 0.9)
    averages, expected = [], {name: p.clone() for name, p in state(toy).items()}
    steps = 0
    step = toy.student.step

    def spy() -> None:
        nonlocal steps
        steps += 1
        decay = (1 + toy.step) / (10 + toy.step)  # below 0.9 for the first 80 steps
        step()
        for name, parameter in state(toy).items():
            expected[name] = decay * expected[name] + (1 - decay) * parameter

    toy.student.step = spy  # type: ignore[method-assign]
    for _ in range(2):
        toy.train_step()
        averages.append(toy.student.ema.average["net.0.weight"].clone())
    assert steps == 2 * iterations
    assert not torch.equal(*averages)
    for name, value in expected.items():
        torch.testing.assert_close(toy.student.ema.average[name], value)


def test_the_start_does_not_weigh_on_a_short_runs_average() -> None:
    """Of 100 updates at decay 0.999, nine tenths of the average would still be the start."""
    parameter = nn.Parameter(torch.zeros(1))
    ema = EMA({"weight": parameter}, 0.999)
    with torch.no_grad():
        parameter += 1
    for seen in range(100):
        ema.update(seen=seen)
    assert ema.average["weight"].item() > 0.99
    late = EMA({"weight": nn.Parameter(torch.zeros(1))}, 0.999)
    with torch.no_grad():
        late.parameters["weight"] += 1
    late.update(seen=10**6)
    assert late.average["weight"].item() == pytest.approx(0.001)


def test_a_checkpoint_holds_the_whole_average(tmp_path: Path) -> None:
    toy = trainer(prepared())
    ema = EMA(toy.student.parameters, 0.5)
    toy.train_step()
    ema.update()
    kept = {name: average.clone() for name, average in ema.average.items()}
    folder = save_checkpoint(tmp_path, Progress(1, 1, 1, 1), {"ema": ema.average}, {}, {})
    assert load_file(folder / "ema.safetensors").keys() == kept.keys()
    other = EMA(toy.student.parameters, 0.5)
    load_parameters(folder, "ema", other.average)
    assert all(torch.equal(other.average[name], kept[name]) for name in kept)
    assert not all(torch.equal(kept[name], p) for name, p in state(toy).items())
    without = save_checkpoint(tmp_path, Progress(1, 2, 2, 2), {}, {}, {})
    with pytest.raises(ConfigError, match="holds no average of the student"):
        load_parameters(without, "ema", other.average)
