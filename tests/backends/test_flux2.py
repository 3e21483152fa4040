"""FLUX.2 klein beyond what every family must show: its grid, its latents, its adapters, what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline

import flux2
from dmdr.errors import ConfigError
from dmdr.run.device import open_accelerator
from dmdr.sampling import FewStepSampler
from dmdr_flux2 import Flux2KleinBackend
from family import refuses_unread


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux2.build(path)
    return path


def built(folder: Path, **options: Any) -> Flux2KleinBackend:
    given = {"resolution": 16, "max_sequence_length": 48} | options
    return Flux2KleinBackend(str(folder), Flux2KleinBackend.Options(**given))


@pytest.mark.parametrize(("size", "steps"), [(16, 1), (16, 4), (48, 4), (48, 50), (272, 4)])
def test_the_grid_is_the_pipelines_own_at_each_size_and_length(folder: Path, size: int, steps: int) -> None:
    """On both sides of the 4,300 tokens where its rule changes; the export's scheduler makes it without sigmas, too."""
    pipe = Flux2KleinPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.forward = lambda hidden_states, **others: (hidden_states,)
    embedded = torch.zeros(1, 48, 3 * flux2.WIDTH)
    call = {"height": size, "width": size, "guidance_scale": 1.0, "output_type": "latent"}
    pipe(prompt_embeds=embedded, num_inference_steps=steps, **call)
    backend = built(folder, resolution=size)
    grid = backend.grid(steps)
    torch.testing.assert_close(grid.float(), pipe.scheduler.sigmas, rtol=0, atol=1e-6)
    exported = backend.scheduler(FewStepSampler(backend.path, grid, 0.0))
    exported.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    torch.testing.assert_close(exported.sigmas, pipe.scheduler.sigmas, rtol=0, atol=1e-6)
    # Renoising keeps FLUX.1's rule, and --shift is both.
    assert backend.shift == pytest.approx(math.exp(0.5 + 0.65 * ((size // 4) ** 2 - 256) / (4096 - 256)))
    assert built(folder, resolution=size, shift=5.0).grid(4)[1] == pytest.approx(5 * 0.75 / (1 + 4 * 0.75))


def test_latents_are_the_pipelines(folder: Path) -> None:
    backend = built(folder)
    backend.prepare(open_accelerator("no", cpu=True), roles=())
    images = torch.rand(2, 3, 16, 16)
    theirs = backend.pipeline._encode_vae_image(images * 2 - 1, None)
    found = backend.encode_images(images)
    assert found.shape == (2, *backend.latent_shape) == (2, 16, 4, 4)
    torch.testing.assert_close(found, theirs)


def test_every_projection_of_attention_has_an_adapter(folder: Path) -> None:
    backend = built(folder)
    backend.prepare(open_accelerator("no", cpu=True), roles=("student",))
    found = {name.rpartition(".attn.")[2] for name in backend.roles.layers}
    assert found == {
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("to_qkv_mlp_proj", "to_out"),
    }
    assert sum(name.endswith(".to_out") for name in backend.roles.layers) == 2  # of two single blocks


def test_padding_is_a_part_of_the_text(folder: Path) -> None:
    answers = []
    for length in (48, 64):
        backend = built(folder, max_sequence_length=length)
        backend.prepare(open_accelerator("no", cpu=True), roles=())
        x_t = torch.ones(1, *backend.latent_shape)
        answers.append(backend.teacher(x_t, torch.tensor([0.5]), backend.encode(["a handwritten seven"])).value)
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_what_it_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    flux2.build(tmp_path, is_distilled=True)
    with pytest.raises(ConfigError, match=r"--guidance_scale 4: .* is distilled and is not guided; give 1"):
        built(tmp_path, guidance_scale=4.0)
    built(tmp_path)
    with pytest.raises(ConfigError, match="--resolution 18 must be a multiple of 4"):
        built(folder, resolution=18)
    for option, value in (("negative_prompt", "blurry"), ("zero_empty_prompt", True), ("reward_vae", "tiny")):
        refuses_unread(folder, option, value)
