"""Networks of the published shapes: the memory of a step beside `--dry_run`, and a decoder's gradient."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from examples.benchmarks import published

from dmdr.backends.images import to_unit_range
from dmdr.backends.latents import ShiftedLatents
from dmdr.backends.loading import Source
from dmdr.dry_run.estimate import estimate
from dmdr.settings.parse import resolve
from steps import prepared, trainer_of

pytestmark = pytest.mark.gpu
GIB = 2**30
COMMON = {
    "rl": "none", "reward": "none", "mixed_precision": "bf16", "num_inference_steps": 2, "fake_updates": 1,
    "stage1_steps": 1000, "stage2_steps": 0, "per_device_train_batch_size": 4, "report_to": "none",
}  # fmt: skip
Case = tuple[Callable[..., None], list[str], dict[str, Any]]
CASES: dict[str, Case] = {
    "SD3-Medium": (
        published.sd3,
        ["a red fox", "a blue bird"],
        {"resolution": 1024, "gradient_checkpointing": True, "guidance_scale": 7.0, "prompt_cache": "cache"},
    ),
    "SDXL": (
        published.sdxl,
        ["a red fox", "a blue bird"],
        {"resolution": 1024, "gradient_checkpointing": True, "guidance_scale": 7.0, "prompt_cache": "cache"},
    ),
    "SiT-XL/2 in full": (
        published.sit,
        ["class 7", "class 2"],
        {"full_finetune": True, "per_device_train_batch_size": 64},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_memory_of_a_step_is_the_estimate(case: str) -> None:
    """Within 15 %: the estimate leaves out workspaces of kernels and what the allocator loses."""
    build, prompts, settings = CASES[case]
    with TemporaryDirectory() as place:
        build(Path(place) / "model", torch.device("cuda"))
        gc.collect()
        torch.cuda.empty_cache()
        measured, estimated, seconds = compared(Path(place), prompts, settings)
    print(f"\n{case}: {measured / GIB:.2f} GiB, estimated {estimated / GIB:.2f}; {seconds:.2f} s a step")
    assert measured == pytest.approx(estimated, rel=0.15)


def compared(place: Path, prompts: list[str], settings: dict[str, Any]) -> tuple[int, int, float]:
    """Peak bytes of a step in which nothing is new, what `--dry_run` says, and the step's seconds."""
    (place / "prompts.txt").write_text("\n".join(prompts))
    given = COMMON | {"model": str(place / "model"), "prompts": str(place / "prompts.txt")} | settings
    if "prompt_cache" in given:
        given["prompt_cache"] = str(place / "cache")
    estimated = sum(estimate(resolve(settings=given | {"dry_run": True})).phases["stage 1"].values())
    before = torch.cuda.memory_allocated()
    trainer = trainer_of(prepared(given))
    trainer.train_step(noted=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train_step(noted=True)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return torch.cuda.max_memory_allocated() - before, estimated, seconds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_decoders_gradient_at_1024_pixels(dtype: torch.dtype) -> None:
    """SD3's decoder, which runs in float16 here though its file asks for float32: finite, not lost, and not too large.

    Its random weights keep numbers near 1, so that this is about kernels and memory.
    """
    latents_of = ShiftedLatents(Source(str(published.ROOT / "sd3" / "architecture")), "vae", "pipeline")
    vae = published.component("sd3", AutoencoderKL, "vae", torch.device("cuda")).to(dtype).requires_grad_(False)
    latents = torch.randn(1, 16, 128, 128, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    images = to_unit_range(latents_of.decode(vae, latents))
    (gradient,) = torch.autograd.grad(2**16 * images.mean(), latents)
    peak = torch.cuda.max_memory_allocated()
    print(f"\ndecoder in {dtype}: {peak / GIB:.1f} GiB")
    assert bool(gradient.isfinite().all()) and (gradient != 0).float().mean() > 0.9
    assert peak < 16 * GIB
