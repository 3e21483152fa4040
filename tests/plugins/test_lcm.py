"""Latent consistency distillation: its loss by hand, the consistency function of a Gaussian, and a trained student."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdxl
from dmdr.backends.toy import CENTRES, STD, Toy
from dmdr.errors import ConfigError
from dmdr.paths import NoisePath, Prediction, add_noise, expand
from dmdr.run.run import train
from dmdr.testing import check_objective
from dmdr.testing.toy import real_points
from dmdr.types import Condition, Draw, Real, Term
from dmdr_lcm import LCM
from toy_trainer import DoubleToy, EpsToy, at_rest, prepared, trainer


def consistency(x_t: Tensor, t: Tensor, path: NoisePath, mean: Tensor) -> Tensor:
    """Where the probability-flow ODE of N(mean, STD^2 I) leads from x_t, [B, D]: it keeps the standardised state."""
    alpha, sigma = expand(path.alpha(t), x_t), expand(path.sigma(t), x_t)
    return mean + STD * (x_t - alpha * mean) / (alpha**2 * STD**2 + sigma**2).sqrt()


class Consistent(DoubleToy):
    """Its student is the consistency function of its teacher."""

    def student(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        mean = CENTRES.double()[cond.tensors["label"]]
        return Prediction(consistency(x_t.double(), t, self.path, mean), "x0", x_t.double(), t, self.path)


def doubled(draw: Draw, random: Any) -> Real:
    real = real_points(draw, random)
    return Real(real.x0.double(), real.cond)


def ask(objective: LCM, backend: Any, guidance: float = 1.0, batch: int = 64) -> tuple[Term, Draw, Any]:
    """The objective's answer to the first draw."""
    options = {"real_images": doubled, "guidance": (guidance, guidance), "batch": batch, "dmd_weight": 0.0}
    toy = trainer(backend, objectives=[objective], **options)
    ctx = toy.context(0)
    draw = toy.rollouts.pick(toy.rollouts.whole(ctx), ctx)
    return objective(draw, ctx), draw, ctx


def points(steps: int, backend: Any, draw: Draw, ctx: Any, guidance: float) -> tuple[Tensor, ...]:
    """x_t, t, x_s and s of each sample, by the formulas."""
    real, grid = doubled(draw, ctx.random), backend.grid(steps)
    i = ctx.random.integers("lcm/index", draw.sample, steps)
    t, s = grid[i], grid[i + 1]
    x_t = add_noise(backend.path, real.x0, ctx.random.normal("lcm/eps", draw.sample, (2,)).double(), t)
    c, u = (backend.teacher(x_t, t, real.cond, guidance=w).x0 for w in (1.0, 0.0))
    x0 = u + guidance * (c - u)
    alpha, sigma = (expand(f(t), x_t) for f in (backend.path.alpha, backend.path.sigma))
    x_s = expand(backend.path.alpha(s), x_t) * x0 + expand(backend.path.sigma(s), x_t) * (x_t - alpha * x0) / sigma
    return x_t, t, x_s, s


class DoubleEps(EpsToy, DoubleToy):
    """Predicts the noise, on the path of SDXL, in float64."""


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("cls", [DoubleToy, DoubleEps])
def test_loss_by_hand(cls: Any, guidance: float, loss_type: Any) -> None:
    backend, steps = prepared(cls), 5
    own = {"huber_c": 0.1} if loss_type == "huber" else {}
    term, draw, ctx = ask(LCM(steps, loss_type, **own), backend, guidance)
    x_t, t, x_s, s = points(steps, backend, draw, ctx, guidance)
    assert (s == 0).any() and (s > 0).any()
    answer, moved = backend.student(x_t, t, draw.cond).x0, s > 0
    target = x_s.clone()
    target[moved] = backend.student(x_s[moved], s[moved], draw.cond.ordered(moved.nonzero()[:, 0])).x0
    error = answer - target
    wanted = error**2 if loss_type == "l2" else (error**2 + 0.01).sqrt() - 0.1
    torch.testing.assert_close(term.loss, wanted.mean(1), rtol=1e-6, atol=1e-9)


def test_the_target_has_no_gradient() -> None:
    backend = prepared(DoubleToy)
    term, draw, ctx = ask(LCM(5, "l2"), backend)
    x_t, t, x_s, s = points(5, backend, draw, ctx, 1.0)
    with torch.no_grad():
        target = torch.where(expand(s, x_s) > 0, backend.student(x_s, s, draw.cond).x0, x_s)
    parameters = list(backend.parameters("student").values())
    wanted = torch.autograd.grad(((backend.student(x_t, t, draw.cond).x0 - target) ** 2).mean(1).sum(), parameters)
    for found, grad in zip(torch.autograd.grad(term.loss.sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-6, atol=1e-9)


def test_the_consistency_function_has_no_loss_but_the_solvers() -> None:
    """A DDIM step errs by h^2, so that the squared error falls with the fourth power of the number of steps."""
    losses = [ask(LCM(steps, "l2"), at_rest(Consistent), batch=512)[0].loss.mean().item() for steps in (100, 200, 400)]
    assert losses[0] < 1e-6
    for coarse, fine in pairwise(losses):
        assert 8 < coarse / fine < 32
    teacher = ask(LCM(100, "l2"), at_rest(DoubleToy), batch=512)[0].loss.mean().item()
    assert teacher > 30 * losses[0], "the teacher's own answers are not consistent"


def test_a_trained_student_has_the_spread_of_the_data_in_one_step() -> None:
    """Where the teacher answers noise with the mean."""

    def fast(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0, betas=(0.9, 0.99))

    backend = at_rest()
    toy = trainer(
        backend, objectives=[LCM(8, "l2")], dmd_weight=0.0, batch=128, optimize=fast, real_images=real_points, steps=1
    )
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(400) % 4
    cond, t = Condition([""] * 400, {"label": labels}), torch.ones(400, dtype=torch.float64)

    def gap() -> float:
        with torch.no_grad():
            found = (backend.student(noise, t, cond).x0 - CENTRES[labels]) / STD
        return (found - noise).square().mean().sqrt().item()

    assert gap() > 0.9
    for _ in range(200):
        toy.train_step()
    assert gap() < 0.6


def test_it_keeps_its_promises() -> None:
    check_objective(LCM)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_ddim_timesteps": 1}, "--num_ddim_timesteps must be from 2 to 1000, not 1"),
        ({"huber_c": 0.0}, "--huber_c must be above 0, not 0.0"),
        ({"huber_c": 0.1, "loss_type": "l2"}, "huber_c is not read with loss_type l2"),
    ],
)
def test_refused_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LCM(**settings)


@pytest.mark.usefixtures("no_report")
def test_plain_lcm_of_a_noise_predicting_pipeline(tmp_path: Path) -> None:
    """SDXL by real images alone, exported with diffusers' LCMScheduler."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sdxl.build(tmp_path / "sdxl")
    settings: dict[str, Any] = {
        "model": str(tmp_path / "sdxl"), "prompts": str(tmp_path / "prompts.txt"), "rl": "lcm", "reward": "none",
        "dmd_weight": 0.0, "stage1_steps": 0, "stage2_steps": 2, "real_images": str(Toy().real_images()),
        "guidance_scale": 4.0, "lora_rank": 4, "per_device_train_batch_size": 2,
        "sample_images": 1, "teacher_steps": 1, "report_to": "none", "prompt_cache": str(tmp_path / "cache"),
    }  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a handwritten seven\n")
    run = train(**settings, output_dir=str(tmp_path / "run"))
    assert "LCMScheduler" in (run / "student" / "scheduler" / "scheduler_config.json").read_text()
