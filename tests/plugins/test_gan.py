"""DMD2 and LADD: their losses and gradients in float64, whom they reach, and that they lead to real images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu, softplus

import sd3
from dmdr import train
from dmdr.backends.toy import CENTRES, PROMPTS, STD
from dmdr.errors import ConfigError
from dmdr.matching import DMD
from dmdr.randomness import Random
from dmdr.sampling import shift_times
from dmdr.settings.parse import parse
from dmdr.testing.toy import real_points
from dmdr.types import Condition, Draw, Real
from dmdr_gan import DMD2, LADD
from dmdr_gan.discriminator import Discriminator
from dmdr_sd3 import SD3Backend
from toy_trainer import DoubleToy, adam, at_rest, flat, prepared, state, step_of, trainer


class Exact(DoubleToy):
    """The toy in float64 throughout, with a timestep shift."""

    def prepare(self, accelerator: Any, *, roles: Sequence[Any]) -> None:
        super().prepare(accelerator, roles=roles)
        self._untrained.double()
        self.shift = 3.0

    def features(self, role: Any, x_t: Tensor, t: Tensor, cond: Condition, layers: Sequence[int]) -> list[Tensor]:
        network = self._untrained if role == "teacher" else self.residuals[role]
        return [network.hidden(x_t.double(), t, cond.tensors["label"])[layer][:, None] for layer in layers]


def others(draw: Draw, random: Random) -> Real:
    """Real points that show something else than the draw's prompts."""
    label = (draw.cond.tensors["label"] + 1) % len(CENTRES)
    x0 = CENTRES[label] + STD * random.normal("real", draw.sample, (2,))
    return Real(x0.double(), replace(draw.cond, tensors={"label": label}))


def running(matching: Any, **settings: Any) -> Any:
    """A trainer in float64."""
    found = trainer(prepared(Exact), matching=matching, **{"real_images": others} | settings)
    matching._discriminator._heads.double()
    return found


def drawn(run: Any) -> tuple[Draw, Any]:
    ctx = run.context(0)
    draw = run.rollouts([ctx], finish=False)[0]
    return replace(draw, x0=draw.x0.double()), ctx


def logits(
    matching: Any, run: Any, ctx: Any, x0: Tensor, label: Tensor, t: Tensor, name: str, sample: Tensor
) -> Tensor:
    """What the discriminator must say of clean points, by hand: [B, layers]."""
    eps = ctx.random.normal(f"gan/{name}/eps", sample, (2,)).double()
    x_t = (1 - t[:, None]) * x0 + t[:, None] * eps
    own = matching._discriminator
    network = run.backend._untrained if own.role == "teacher" else run.backend.residuals["fake_score"]
    given = torch.cat([x_t, t[:, None], t[:, None] ** 2, nn.functional.one_hot(label, 4).double()], 1)
    first = silu(given @ network.net[0].weight.T + network.net[0].bias)
    hidden = [first, silu(first @ network.net[2].weight.T + network.net[2].bias)]
    found = []
    for layer, (norm, inner, _, last) in zip(own.layers, own._heads, strict=True):
        y = layer_norm(hidden[layer], norm.normalized_shape, norm.weight, norm.bias)
        found.append(silu(y @ inner.weight.T + inner.bias) @ last.weight.T + last.bias)
    return torch.cat(found, 1)


def time_of(matching: Any, ctx: Any, name: str, sample: Tensor) -> Tensor:
    if isinstance(matching, DMD2):
        return shift_times(ctx.random.uniform(f"gan/{name}/t", sample), 3.0)
    n = ctx.random.normal(f"gan/{name}/t", sample, ()).double()
    return 1 / (1 + torch.exp(-(matching.noise_mean + matching.noise_std * n)))


CASES: list[tuple[Callable[[], Any], Callable[..., Tensor], Callable[[Tensor], Tensor]]] = [
    (
        lambda: DMD2(gan_layers=[0, 1], gan_cls_weight=0.3, gan_weight=0.7),
        lambda fake, real: (1 + fake.exp()).log() + (1 + (-real).exp()).log(),
        lambda fake: (1 + (-fake).exp()).log(),
    ),
    (
        lambda: LADD(noise_mean=0.5, noise_std=0.8),
        lambda fake, real: (1 + fake).clamp(min=0) + (1 - real).clamp(min=0),
        lambda fake: -fake,
    ),
]


@pytest.mark.parametrize(("build", "of_both", "of_fake"), CASES, ids=["dmd2", "ladd"])
def test_losses_and_gradients_are_the_published_ones(
    build: Callable[[], Any], of_both: Callable[..., Tensor], of_fake: Callable[[Tensor], Tensor]
) -> None:
    """The student's by finite differences, through noise, network and heads."""
    matching = build()
    run = running(matching)
    (draw, ctx), backend = drawn(run), run.backend
    with torch.no_grad():
        for head in matching._discriminator._heads:  # as far from zero as that the hinges act on some
            head[3].weight.mul_(20)
    sample, label, real = draw.sample, draw.cond.tensors["label"], ctx.real(draw)
    assert (real.cond.tensors["label"] != label).all()
    t, t_real, own = (time_of(matching, ctx, name, sample) for name in ("fake", "real", "student"))
    by_hand = partial(logits, matching, run, ctx)
    fake_logits = by_hand(draw.x0, label, t, "fake", sample)
    real_logits = by_hand(real.x0, real.cond.tensors["label"], t_real, "real", sample)
    expected = of_both(fake_logits, real_logits).mean(1)
    if isinstance(matching, DMD2):
        expected = DMD().fake_loss(draw, backend.fake_score, ctx).loss + matching.gan_cls_weight * expected
    term = matching.fake_loss(draw, backend.fake_score, ctx)
    torch.testing.assert_close(term.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(term.metrics["logit_real"], real_logits.detach().mean(1), rtol=1e-12, atol=1e-12)

    found = matching.direction(draw, backend.teacher, backend.fake_score, ctx)
    weight, gan = 1.0, found.total
    if isinstance(matching, DMD2):
        weight, gan = matching.gan_weight, found.parts["gan"]
        matched = DMD().direction(draw, backend.teacher, backend.fake_score, ctx)
        assert torch.equal(found.total, matched.total + gan) and list(found.parts) == ["dm", "ca", "gan"]
    difference = torch.empty_like(draw.x0)
    for column in range(2):
        step = 1e-6 * nn.functional.one_hot(torch.tensor(column), 2).double()
        up, down = (of_fake(by_hand(draw.x0 + s, label, own, "student", sample)).mean(1) for s in (step, -step))
        difference[:, column] = ((up - down) / 2e-6).detach()
    torch.testing.assert_close(gan, 2 * weight * difference, rtol=1e-6, atol=1e-9)
    assert gan.abs().max() > 1e-3


def test_the_student_moves_as_by_the_sum_of_both_losses() -> None:
    """L_DMD + gan_weight softplus(-D), each a mean over the samples, whatever the size of the latent."""
    matching = DMD2(gan_weight=0.7)
    run = running(matching)
    moved = step_of(run)
    again = running(other := DMD2(gan_weight=0.7))
    draw, ctx = drawn(again)
    matched = DMD().direction(draw, again.backend.teacher, again.backend.fake_score, ctx).total
    x0 = again.backend.student(draw.x_t, draw.t, draw.cond).x0
    t = time_of(other, ctx, "student", draw.sample)
    fake = logits(other, again, ctx, x0, draw.cond.tensors["label"], t, "student", draw.sample)
    loss = (x0 * matched).mean() + 0.7 * softplus(-fake).mean()
    expected = torch.autograd.grad(loss, list(again.backend.parameters("student").values()))
    torch.testing.assert_close(-moved, torch.cat([g.flatten() for g in expected]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("build", [lambda: DMD2(gan_r1_weight=100.0), LADD], ids=["dmd2", "ladd"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_neither_side_trains_the_other(tmp_path: Path, build: Callable[[], Any], checkpointing: bool) -> None:
    """On a small SD3: the direction leaves no gradient anywhere, and the discriminator's loss none in the student."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(tmp_path / "sd3")
    options = {"prompt_cache": "off", "lora_rank": 4, "fake_lora_rank": 4, "gradient_checkpointing": checkpointing}
    backend: Any = SD3Backend(str(tmp_path / "sd3"), SD3Backend.Options(**options))
    backend.prepare(Accelerator(cpu=True), roles=("student", "fake_score"))
    with torch.no_grad():
        for role in ("student", "fake_score"):
            for number, parameter in enumerate(backend.parameters(role).values()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    matching = build()
    (own,) = matching.learners(backend, torch.device("cpu"))
    toy = trainer(matching=DMD())
    ctx: Any = toy.context(0)
    ctx.backend, cond = backend, backend.encode(["seven", "two"])
    x0 = torch.randn((2, *backend.latent_shape), generator=torch.Generator().manual_seed(7))
    ctx.real_images = lambda draw, random: Real(x0.flip(0), cond.ordered(torch.tensor([1, 0])))
    base = toy.rollouts([toy.context(0)], finish=False)[0]
    draw = replace(base[:2], x0=x0, cond=cond, t=torch.tensor([0.5, 0.9], dtype=torch.float64))
    everything = {role: backend.parameters(role) for role in ("student", "fake_score")} | {"heads": own.parameters}

    def reached() -> list[str]:
        return [name for name, of in everything.items() if any(p.grad is not None for p in of.values())]

    with torch.no_grad():
        direction = matching.direction(draw, backend.teacher, backend.fake_score, ctx)
    assert not direction.total.requires_grad and direction.total.isfinite().all() and direction.total.any()
    assert direction.total.dtype == torch.float32 and reached() == []
    matching.fake_loss(draw, backend.fake_score, ctx).loss.sum().backward()
    assert reached() == (["fake_score", "heads"] if isinstance(matching, DMD2) else ["heads"])
    trained = [p.grad for p in own.parameters.values()]
    assert all(grad is not None and grad.isfinite().all() for grad in trained)


def test_the_discriminators_loss_trains_the_fake_score_beside_its_own() -> None:
    """In another direction than the denoising loss."""
    grads = {}
    for name, matching in (("dmd", DMD()), ("dmd2", DMD2(gan_cls_weight=1.0))):
        run = trainer(prepared(Exact), matching=matching, real_images=others)
        if isinstance(matching, DMD2):
            matching._discriminator._heads.double()
        draw, ctx = drawn(run)
        loss = matching.fake_loss(draw, run.backend.fake_score, ctx).loss.sum()
        hidden = list(run.backend.parameters("fake_score").values())[:4]  # the last layer is behind the features
        grads[name] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, hidden)])
    assert (grads["dmd2"] - grads["dmd"]).norm() > 0.01 * grads["dmd"].norm()


def test_approximate_r1_is_the_squared_change_of_the_logits() -> None:
    found = {}
    for weight in (0.0, 100.0):
        matching = DMD2(gan_r1_weight=weight, gan_cls_weight=0.5)
        run = running(matching)
        draw, ctx = drawn(run)
        found[weight] = matching.fake_loss(draw, run.backend.fake_score, ctx)
    real, sample = ctx.real(draw), draw.sample
    t, label = time_of(matching, ctx, "real", sample), real.cond.tensors["label"]
    near = real.x0 + 0.1 * ctx.random.normal("gan/r1", sample, (2,))
    on_real, on_near = (logits(matching, run, ctx, x0, label, t, "real", sample) for x0 in (real.x0, near))
    r1 = ((on_real - on_near) ** 2).mean(1)
    torch.testing.assert_close(found[100.0].loss - found[0.0].loss, 0.5 * 100.0 * r1, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[100.0].metrics["r1"], r1.detach(), rtol=1e-12, atol=1e-12)
    assert "r1" not in found[0.0].metrics and r1.min() > 0


# --- In training ------------------------------------------------------------------------------------------------------

SHIFTED = torch.tensor([0.4, -0.3])


def shifted(draw: Draw, random: Random) -> Real:
    """Real points beside those that the teacher knows."""
    found = real_points(draw, random)
    return replace(found, x0=found.x0 + SHIFTED)


def quickly(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, betas=(0.5, 0.99), weight_decay=0.0)


def share_after(matching: Any, steps: int = 60) -> float:
    """How far a student that starts as the teacher has come from the modes to the real points, on average."""
    backend = at_rest()
    run = trainer(backend, matching=matching, batch=32, fake_updates=2, optimize=quickly, real_images=shifted)
    for _ in range(steps):
        run.train_step()
    noise = torch.randn((4, 2000, 2), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        final = run.sampler.rollout(backend.student, noise, backend.encode(PROMPTS * 500)).final
    return float((final - CENTRES.repeat(500, 1)).mean(0) @ SHIFTED / SHIFTED.square().sum())


def test_a_student_goes_where_real_images_are() -> None:
    """DMD alone stays with the teacher, and holds DMD2 back."""
    strong = DMD2(gan_weight=5.0, gan_cls_weight=1.0, gan_layers=[0, 1])
    alone, both, ladd = (share_after(matching) for matching in (DMD(), strong, LADD()))
    assert abs(alone) < 0.03
    assert both > 0.1
    assert ladd > 0.1


def test_ladd_has_no_fake_score() -> None:
    run = trainer(matching=LADD(), optimize=adam, real_images=real_points)
    before = flat(state(run, "fake_score"))
    lines = [run.train_step() for _ in range(2)]
    assert list(run.learners) == ["student", "discriminator"]
    assert torch.equal(flat(state(run, "fake_score")), before)
    assert "grad_norm/fake_score" not in lines[0] and lines[0]["grad_norm/discriminator"] > 0


def test_a_second_run_goes_on_with_the_discriminator(tmp_path: Path, no_report: None) -> None:
    """Of the stage 1 that its student comes from; its own rate is too low to move the heads."""
    small: dict[str, Any] = {"model": "toy", "matching": "dmd2", "per_device_train_batch_size": 4, "fake_updates": 1}
    small |= {"sample_steps": 0, "sample_images": 1, "teacher_steps": 1, "report_to": "none"}
    heads = []
    for name, settings in (
        ("first", {"stage1_steps": 3, "stage2_steps": 0, "gan_learning_rate": 1e-2}),
        ("second", {"init_student": str(tmp_path / "first"), "stage2_steps": 1, "gan_learning_rate": 1e-12}),
        ("fresh", {"stage1_steps": 1, "stage2_steps": 0, "gan_learning_rate": 1e-12}),
    ):
        run = train(**small | settings, output_dir=str(tmp_path / name))
        (last,) = (run / "checkpoints").iterdir()
        heads.append(flat(load_file(last / "discriminator.safetensors")))
    first, second, fresh = heads
    torch.testing.assert_close(second, first, rtol=0, atol=1e-6)
    assert (fresh - first).abs().max() > 1e-3


# --- Flags ------------------------------------------------------------------------------------------------------------


def test_flags() -> None:
    settings = parse(["--model", "toy", "--matching", "dmd2", "--gan_layers", "0", "1", "--gan_weight", "0.003"])
    assert settings.of("matchings")[0].build() == DMD2(gan_layers=[0, 1], gan_weight=3e-3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"gan_weight": 0.0}, "--gan_weight must be above 0, not 0.0"),
        ({"gan_cls_weight": -1.0}, "--gan_cls_weight must be above 0"),
        ({"gan_r1_weight": -1.0}, "--gan_r1_weight must be at least 0"),
        ({"gan_layers": [0, -1]}, r"--gan_layers must be numbers of layers, from 0, not \[0, -1\]"),
        ({"gan_layers": []}, r"--gan_layers must be numbers of layers, from 0, not \[\]"),
        ({"gan_layers": [2]}, "--gan_layers 2: the layers of this network are 0 to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DMD2(**flags).learners(prepared(), torch.device("cpu"))


def test_a_family_without_features_is_refused() -> None:
    class Blind:
        pass

    with pytest.raises(ConfigError, match="--matching: a Blind gives no features"):
        LADD().learners(Blind(), torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fake_learning_rate", "dyna_guidance"])
def test_ladd_refuses_what_belongs_to_scores(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name} is not read by --matching ladd, which has no fake score"):
        parse(["--model", "toy", "--matching", "ladd", f"--{name}", "0.1"])


def test_layers_are_the_middle_one_of_dmd2_and_all_of_ladd() -> None:
    for build, layers in ((DMD2, [1]), (LADD, [0, 1])):
        matching: Any = build()
        matching.learners(prepared(), torch.device("cpu"))
        own: Discriminator = matching._discriminator
        assert list(own.layers) == layers and len(own._heads) == len(layers)
