"""FLUX.1 beyond what every family must show: guidance as an input, the dynamic shift, what it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline

import flux
from dmdr.errors import ConfigError
from dmdr.matching import teach
from dmdr.randomness import Random
from dmdr_flux import FluxBackend
from family import refuses_unread

OWN = 3.5  # --guidance_scale


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux")
    flux.dev(path)
    return path


def built(folder: Path, **options: Any) -> FluxBackend:
    return FluxBackend(str(folder), FluxBackend.Options(**{"resolution": 16, "max_sequence_length": 8} | options))


@pytest.mark.parametrize("own", [OWN, 1.0])
def test_guidance_is_a_line_through_the_networks_own_answers(folder: Path, own: float) -> None:
    backend = built(folder, guidance_scale=own)
    backend.prepare(Accelerator(cpu=True), roles=("student",))
    cond = backend.encode(["a handwritten seven"])
    x_t, t = torch.randn(1, *backend.latent_shape), torch.tensor([0.6])
    told: list[float] = []
    backend.roles.network.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["guidance"].item()), with_kwargs=True
    )
    c, guided = (backend.teacher(x_t, t, cond, guidance=w).value for w in (1.0, own))
    assert told == [1.0, own]  # one call each
    if own != 1:
        assert (guided - c).abs().max() > 1e-3
    direction = (guided - c) / (own - 1) if own != 1 else torch.zeros_like(c)
    for w in (0.0, 2.0, 6.0):
        torch.testing.assert_close(backend.teacher(x_t, t, cond, guidance=w).value, c + (w - 1) * direction)
    told.clear()
    backend.student(x_t, t, cond)
    assert told == [1.0]
    told.clear()
    ctx = SimpleNamespace(
        backend=backend, guidance=(4.0, 4.0), guidance_interval=(0.0, 1.0), fake_mix=0.0, random=Random(0, 0, "test")
    )
    draw = SimpleNamespace(cond=cond, sample=torch.zeros(1, dtype=torch.int64))
    c0, ca = teach(backend.teacher, SimpleNamespace(x_t=x_t, t=t), draw, ctx)  # type: ignore[arg-type]
    assert told == ([1.0, own] if own != 1 else [1.0, 1.0])  # of matching, too
    torch.testing.assert_close(c0 - ca, backend.teacher(x_t, t, cond, guidance=4.0).x0)


@pytest.mark.parametrize("resolution", [16, 48])
def test_the_grid_is_the_pipelines_own_at_each_resolution(folder: Path, resolution: int) -> None:
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": resolution, "width": resolution}
    pipe("a handwritten seven", num_inference_steps=4, max_sequence_length=8, output_type="latent", **size)
    grid = built(folder, resolution=resolution).grid(4)
    torch.testing.assert_close(grid.float(), pipe.scheduler.sigmas, rtol=0, atol=1e-6)
    shifted = built(folder, resolution=resolution, shift=9.0)  # the student; the teacher stays as its users know it
    assert not torch.equal(shifted.grid(4), grid)
    assert torch.equal(shifted.teacher_grid(4), grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_empty_prompt": True}, "--zero_empty_prompt: .*guidance is an input"),
        ({"max_sequence_length": 513}, "--max_sequence_length 513: .* takes 512 at most"),
        ({"resolution": 18}, "--resolution 18 must be a multiple of 4"),
    ],
)
def test_refuses_in_one_line(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        built(folder, **options).prepare(Accelerator(cpu=True), roles=())
    assert "\n" not in str(error.value)


def test_needs_its_text_encoders(folder: Path) -> None:
    refuses_unread(folder, "drop_text_encoders", ["text_encoder_2"])


def test_the_guidance_of_the_network_does_not_change_the_texts(folder: Path, tmp_path: Path) -> None:
    def missing(scale: float) -> list[str]:
        backend = built(folder, guidance_scale=scale, prompt_cache=str(tmp_path))
        backend.connect(Accelerator(cpu=True))
        backend.cache_prompts(backend.accelerator, ["a handwritten seven"] if scale == OWN else [])
        assert backend.text.cache is not None
        return backend.text.cache.missing(["a handwritten seven", "a handwritten two"])

    assert missing(OWN) == missing(7.0) == ["a handwritten two"]
