"""Frozen networks in 4 or 8 bits; nf4 is skipped where bitsandbytes is missing."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from test_families import trained
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr.backends.quantized import PACKAGES, Format, QuantizedLinear, quantize
from dmdr.cli.sample import arguments
from dmdr.dry_run.estimate import estimate
from dmdr.errors import ConfigError
from dmdr.run.drawing import UNUSED, open_export
from dmdr.settings.parse import parse
from dmdr_sd3 import SD3Backend
from family import FAMILIES

CPU = torch.device("cpu")
# Relative RMS error of normal weights: uniform steps of int8 over +-4 sigma have .0091; e4m3 has 2^-4/sqrt(3) at most
# and about .026; QLoRA's 16 levels have about .09.
ERRORS = {"nf4": (0.08, 0.1), "int8": (0.003, 0.012), "fp8": (0.02, 0.03)}
formats = pytest.mark.parametrize(
    "to",
    [
        pytest.param(to, marks=pytest.mark.skipif(find_spec(PACKAGES[to]) is None, reason=f"needs {PACKAGES[to]}"))
        for to in get_args(Format)
    ],
)


def linear(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 384).to(dtype).requires_grad_(False)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_close_and_small(to: Format, dtype: torch.dtype) -> None:
    layer = linear(dtype)
    nn.init.normal_(layer.weight)
    packed = QuantizedLinear(layer, to, CPU)
    found = packed.unpacked()
    assert (found.dtype, found.shape) == (dtype, layer.weight.shape)
    error = (found.float() - layer.weight.float()).norm() / layer.weight.float().norm()
    assert ERRORS[to][0] < error < ERRORS[to][1]


def held(weight: Any) -> int:
    """Bytes of a packed weight with its scales."""
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        parts = [weight.data, state.absmax, state.state2.absmax]
    else:
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return sum(part.untyped_storage().nbytes() for part in parts)


@formats
def test_a_weight_without_values_has_the_size_of_a_real_one(to: Format) -> None:
    layer = nn.Linear(256, 512, dtype=torch.bfloat16)
    real, counted = (QuantizedLinear(layer, to, torch.device(device)).weight for device in ("cpu", "meta"))
    assert held(real) == counted.untyped_storage().nbytes()  # with torchao 0.18, bitsandbytes 0.50
    assert counted.is_meta


@formats
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_and_backward_are_those_of_the_unpacked_weight_and_keep_nothing(to: Format, autocast: bool) -> None:
    dtype = torch.bfloat16 if autocast else torch.float32
    layer = QuantizedLinear(linear(dtype), to, CPU)
    x, kept = torch.randn(2, 5, 256), list[Tensor]()
    answers = []
    for forward in (layer, lambda x: F.linear(x, layer.unpacked(), layer.bias)):
        given = x.clone().requires_grad_()
        kept.clear()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        ):
            out = forward(given)
        if forward is layer:
            assert not kept
        out.square().sum().backward()
        answers.append((out, given.grad))
    (out, grad), (same_out, same_grad) = answers
    assert out.dtype == same_out.dtype == dtype
    assert torch.equal(out, same_out)
    torch.testing.assert_close(grad, same_grad)


def prepared(model: Path, **options: Any) -> Any:
    backend = SD3Backend(str(model), SD3Backend.Options(lora_rank=2, prompt_cache="off", **options))
    accelerator = SimpleNamespace(
        mixed_precision="no", device=CPU, autocast=lambda: torch.autocast("cpu", enabled=False)
    )
    backend.prepare(accelerator, roles=("student", "fake_score"))
    return backend


@formats
def test_a_network_is_the_one_of_its_unpacked_weights_in_every_role(model: Path, to: Format) -> None:
    """All linear layers of its blocks are packed, and nothing else; with checkpointing, gradients are the same, too."""
    plain, packed = prepared(model), prepared(model, quantize=to, gradient_checkpointing=True)
    layers = {n: m for n, m in packed.roles.network.named_modules() if isinstance(m, QuantizedLinear)}
    same = dict(plain.roles.network.named_modules())
    in_blocks = {n for n, m in same.items() if n.startswith("transformer_blocks.") and type(m) is nn.Linear}
    assert layers.keys() == {name for name in in_blocks if ".lora_" not in name}
    for name, layer in layers.items():
        same[name].weight.copy_(layer.unpacked())
    x, t = torch.randn(2, *packed.latent_shape), torch.tensor([0.3, 0.9])
    answers = []
    for backend in (plain, packed):
        for role in ("student", "fake_score"):
            for parameter in backend.parameters(role).values():
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        cond = backend.encode(["a handwritten seven", "a handwritten two"])
        teacher, student = backend.teacher(x, t, cond, guidance=3.0).value, backend.student(x, t, cond).value
        student.square().mean().backward()
        y = x.clone().requires_grad_()
        features = torch.stack(backend.features("fake_score", y, t, cond, [0, 1]))
        features.square().mean().backward()
        grads = [y.grad, *(p.grad for p in backend.parameters("student").values())]
        answers.append([teacher, student, features, *grads])
    torch.testing.assert_close(*answers)


@formats
def test_packed_blocks_compile(to: Format) -> None:
    import sd3

    torch.manual_seed(0)
    network = sd3.transformer().requires_grad_(False).eval()
    quantize(network, to, CPU)
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 3, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([500.0]),
    }
    plain = network(**given).sample
    for block in network.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(network(**given).sample, plain)
    torch._dynamo.reset()


@formats
def test_a_run_trains_exports_and_samples(model: Path, tmp_path: Path, to: Format) -> None:
    """Its export is a LoRA for the model as published, which is sampled whole unless the caller says otherwise."""
    student = (
        trained(model, FAMILIES["sd3"], tmp_path, "none", stage1_steps=1, stage2_steps=0, quantize=to).output
        / "student"
    )
    about, rows = json.loads((student / "sampling.json").read_text()), FAMILIES["sd3"].rows[:1]
    whole, packed = (
        np.asarray(Image.open(open_export(student, about, **given).draw(rows, 0, tmp_path / str(to))[0])).astype(float)
        for to, given in ((None, {}), (to, {"options": {"quantize": to}}))
    )
    assert 0 < np.abs(whole - packed).mean() < 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"full_finetune": True}, "--quantize needs a LoRA student: leave out --full_finetune"),
        ({"fake_score": "full"}, "--quantize needs a LoRA fake score: leave out --fake_score full"),
        ({"shard": "all"}, "--shard: a network with --quantize cannot be shared; leave one of them out"),
    ],
)
def test_refused(
    model: Path, tmp_path: Path, given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "prompts.txt").write_text("a handwritten seven")
    settings = {
        "model": str(model),
        "prompts": str(tmp_path / "prompts.txt"),
        "quantize": "int8",
        "dry_run": True,
        **given,
    }
    with pytest.raises(ConfigError, match=said):
        estimate(parse(settings=settings))


def test_a_student_that_had_a_full_fake_score_can_be_sampled_packed() -> None:
    trained = asdict(SD3Backend.Options(fake_score="full"))
    assert SD3Backend.Options(**{**trained, **UNUSED, "quantize": "int8"}).quantize == "int8"


def test_dmdr_sample_knows_the_same_formats() -> None:
    """It names them itself: its help comes before torch is imported."""
    assert next(a.choices for a in arguments()._actions if a.dest == "quantize") == get_args(Format)


def test_a_missing_package_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmdr.backends.quantized.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^--quantize nf4 needs bitsandbytes: pip install bitsandbytes$"):
        prepared(model, quantize="nf4")
