"""Qwen-Image and Krea 2 beyond what every family must show: guidance, latents, texts, grids, what they refuse."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import Krea2Pipeline, QwenImagePipeline

import krea2
import qwen_image
from dmdr.errors import ConfigError
from dmdr.matching import teach
from dmdr.randomness import Random
from dmdr.run.device import open_accelerator
from dmdr.settings import registry
from family import refuses_unread

BUILD: dict[str, Callable[..., None]] = {"QwenImagePipeline": qwen_image.build, "Krea2Pipeline": krea2.build}
LONG, SHORT = "a handwritten seven on a page as long as can be", "a handwritten two"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in BUILD}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, folder in found.items():
            BUILD[name](folder)
    return found


@pytest.fixture(params=BUILD)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def built(name: str, folder: Path, **options: Any) -> Any:
    cls = registry.load("backends", name)
    return cls(str(folder), cls.Options(**{"resolution": 16, "max_sequence_length": qwen_image.TEXT} | options))


def ready(name: str, folder: Path, **options: Any) -> Any:
    backend = built(name, folder, **options)
    backend.prepare(open_accelerator("no", cpu=True), roles=("student",))
    return backend


def test_matching_meets_the_guided_teacher(folders: dict[str, Path]) -> None:
    """Its answer is no line through c and u: each token has the norm of c's."""
    backend = ready("QwenImagePipeline", folders["QwenImagePipeline"])
    cond, x_t, t = backend.encode([SHORT] * 2), torch.randn(2, *backend.latent_shape), torch.tensor([0.6, 0.3])
    u, c, guided = (backend.teacher(x_t, t, cond, guidance=w) for w in (0.0, 1.0, 4.0))
    tokens = [backend.pack(answer.value).norm(dim=-1) for answer in (c, guided)]
    torch.testing.assert_close(*tokens)
    assert ((u.value + 4 * (c.value - u.value)) - guided.value).abs().max() > 1e-2
    ctx = SimpleNamespace(
        backend=backend, guidance=(4.0, 4.0), guidance_interval=(0.0, 1.0), fake_mix=0.0, random=Random(0, 0, "test")
    )
    draw = SimpleNamespace(cond=cond, sample=torch.arange(2))
    c0, ca = teach(backend.teacher, SimpleNamespace(x_t=x_t, t=t), draw, ctx)  # type: ignore[arg-type]
    torch.testing.assert_close(c0, c.x0)
    torch.testing.assert_close(c0 - ca, guided.x0)


def test_latents_are_the_pipelines_and_saturated_pixels_have_a_gradient(name: str, folders: dict[str, Path]) -> None:
    backend = ready(name, folders[name])
    latents = torch.randn(2, *backend.latent_shape, requires_grad=True)
    scale, shift = (torch.tensor(backend.vae.config[key]).view(1, -1, 1, 1) for key in ("latents_std", "latents_mean"))
    theirs = backend.vae.decode((latents * scale + shift).unsqueeze(2)).sample[:, :, 0]
    torch.testing.assert_close(backend.decode(latents), theirs / 2 + 0.5)
    images = torch.rand(2, 3, 16, 16)
    encoded = backend.vae.encode((images * 2 - 1).unsqueeze(2)).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(backend.encode_images(images), (encoded - shift) / scale)
    tiled = ready(name, folders[name], vae_tiling=True)
    torch.testing.assert_close(tiled.decode(latents), backend.decode(latents), rtol=1e-4, atol=1e-4)
    small = ready(name, folders[name], vae_tiling=True, gradient_checkpointing=True)
    for one in (small, tiled):
        one.vae.tile_sample_min_height = one.vae.tile_sample_min_width = 12  # several tiles
        one.vae.tile_sample_stride_height = one.vae.tile_sample_stride_width = 8
    gradients = [torch.autograd.grad(one.decode(latents).square().sum(), latents)[0] for one in (small, tiled)]
    torch.testing.assert_close(*gradients)
    backend.vae.decoder.conv_out.weight.data *= 100
    images = backend.decode(latents)
    saturated = (images - 0.5).abs() > 0.4999
    assert 0.1 < saturated.float().mean() < 1
    assert torch.autograd.grad(images[saturated].sum(), latents)[0].any()


def test_texts_of_unequal_length_go_together(name: str, folders: dict[str, Path]) -> None:
    backend = ready(name, folders[name])
    cond = backend.encode([LONG, "", SHORT])
    lengths = cond.tensors["length"].tolist()
    assert cond.tensors["sequence"].shape[:2] == (3, qwen_image.TEXT) and len(set(lengths)) == 3
    assert not cond.tensors["sequence"][1, lengths[1] :].any()
    x_t, t = torch.randn(3, *backend.latent_shape), torch.tensor([0.6, 0.9, 0.3])
    together = backend.student(x_t, t, cond).value
    for i, prompt in enumerate((LONG, "", SHORT)):
        alone = backend.student(x_t[i : i + 1], t[i : i + 1], backend.encode([prompt])).value
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert (together[1] - backend.student(x_t[1:2], t[1:2], backend.encode([LONG])).value).abs().max() > 1e-3
    seen: list[Any] = []
    mask = "encoder_hidden_states_mask" if name == "QwenImagePipeline" else "encoder_attention_mask"
    backend.roles.network.register_forward_pre_hook(
        lambda module, args, given: seen.append(given[mask]), with_kwargs=True
    )
    for prompts in ([LONG, LONG], [LONG, SHORT]):
        backend.teacher(x_t[:2], t[:2], backend.encode(prompts))
    assert seen[0] is None and seen[1].sum(1).tolist() == [lengths[0], lengths[2]]


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("is_distilled", [False, True])
def test_the_grid_of_krea_is_the_pipelines_own(tmp_path: Path, size: int, is_distilled: bool) -> None:
    krea2.build(tmp_path, is_distilled=is_distilled)
    pipe = Krea2Pipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": size, "width": size, "max_sequence_length": qwen_image.TEXT, "guidance_scale": 0.0}
    pipe(SHORT, num_inference_steps=4, output_type="latent", **call)
    backend = built("Krea2Pipeline", tmp_path, resolution=size)
    torch.testing.assert_close(backend.grid(4).float(), pipe.scheduler.sigmas, rtol=0, atol=1e-6)
    assert (backend.shift == pytest.approx(math.exp(1.15))) == is_distilled


def test_the_grid_of_qwen_image_ends_without_the_terminal_stretch(folders: dict[str, Path]) -> None:
    """As that of the published few-step students: shifted by the pipeline's rule, from 1."""
    folder = folders["QwenImagePipeline"]
    pipe = QwenImagePipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    mu = 0.5 + 0.4 * (16 - 256) / (8192 - 256)
    pipe.scheduler.register_to_config(shift_terminal=None)
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    torch.testing.assert_close(
        built("QwenImagePipeline", folder).grid(4).float(), pipe.scheduler.sigmas, rtol=0, atol=1e-6
    )


def test_what_they_cannot_do_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    unread = {"zero_empty_prompt": True, "reward_vae": "tiny", "drop_text_encoders": ["text_encoder"]}
    for option, value in unread.items():
        refuses_unread(folders[name], option, value)
    with pytest.raises(ConfigError, match="--resolution 18 must be a multiple of 4"):
        built(name, folders[name], resolution=18)
    wrong: list[tuple[str, str, Any, str]] = [
        ("vae", "latents_std", [1.0, 1.0, 0.0, 1.0], "expected numbers above 0"),
        ("vae", "temperal_downsample", None, "expected a list with an entry for each block"),
        ("transformer", "in_channels", 64, "is 64; expected 16, of latents with 4 channels"),
    ]
    if name == "QwenImagePipeline":
        wrong += [
            ("transformer", key, True, f"{key} is true; expected false") for key in ("zero_cond_t", "guidance_embeds")
        ]
        wrong += [("transformer", "out_channels", 16, "is 16; expected 4")]
    BUILD[name](tmp_path)
    for part, key, value, said in wrong:
        file = tmp_path / part / "config.json"
        before = file.read_text()
        file.write_text(json.dumps(json.loads(before) | {key: value}))
        with pytest.raises(ConfigError, match=said):
            built(name, tmp_path)
        file.write_text(before)
