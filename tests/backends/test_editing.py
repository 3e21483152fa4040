"""Models that edit an image need no other protocol: a family for FLUX.2 klein's reference images, against stock.

A row names its image in a column; `encode` puts its latents beside the embeddings of the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from torch import Tensor

import flux2
from dmdr import train
from dmdr.backends.pipeline import Network
from dmdr.run.device import open_accelerator
from dmdr.types import Condition
from dmdr_flux2 import Flux2KleinBackend

PROMPTS = ["a handwritten seven", "a handwritten two"]
LENGTH, GUIDANCE, SIZE = 48, 4.0, 64  # the least that the pipeline edits


class KleinEdit(Flux2KleinBackend):
    """FLUX.2 klein with one reference image a row, of the size that is drawn."""

    def encode(self, prompts: Sequence[str], **columns: Sequence[Any]) -> Condition:
        pixels = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in columns["source"]]
        sources = self.encode_images(torch.stack(pixels).permute(0, 3, 1, 2).float() / 255)
        cond = super().encode(prompts, **columns)
        return replace(cond, tensors={**cond.tensors, "source": sources})

    def unconditional(self, cond: Condition) -> Mapping[str, Tensor]:
        """Guidance leads away from the empty prompt, and keeps the image."""
        return {**super().unconditional(cond), "source": cond.tensors["source"]}

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        height, width = x_t.shape[2:]
        own, source = self.pack(x_t), self.pack(cond["source"].to(x_t.dtype))
        place = self.image_ids[height, width]
        packed: Tensor = network(
            hidden_states=torch.cat([own, source], 1),
            timestep=self.path.timestep(t).to(x_t.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=cond["sequence"],
            txt_ids=self.text_ids,
            img_ids=torch.cat([place, place + torch.tensor([10, 0, 0, 0])]),  # another frame
            return_dict=False,
        )[0]
        return self.unpack(packed[:, : own.shape[1]], height, width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux2.build(path)
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
    return path


def stock_step(folder: Path, i: int, guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, timestep and latents of the stock pipeline's first step, which edits an image."""
    pipe: Any = Flux2KleinPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step = pipe.scheduler.step

    def spy(output: Tensor, t: Tensor, latents: Tensor, **kwargs: Any) -> Any:
        seen.append((output.clone(), t.clone(), latents.clone()))
        return step(output, t, latents, **kwargs)

    pipe.scheduler.step = spy
    torch.manual_seed(0)
    call = {
        "num_inference_steps": 2,
        "guidance_scale": guidance,
        "max_sequence_length": LENGTH,
        "output_type": "latent",
    }
    pipe(image=Image.open(folder / f"{i}.png"), prompt=PROMPTS[i], **call)
    return seen[0]


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_its_teacher_is_the_stock_pipeline(folder: Path, guidance: float) -> None:
    options = KleinEdit.Options(resolution=str(SIZE), max_sequence_length=LENGTH, guidance_scale=GUIDANCE)
    backend = KleinEdit(str(folder), options)
    backend.prepare(open_accelerator("no", cpu=True), roles=())
    cond = backend.encode(PROMPTS, source=[str(folder / f"{i}.png") for i in range(2)])
    steps = [stock_step(folder, i, guidance) for i in range(2)]
    outputs, latents = (
        backend.unpack(torch.cat([step[k] for step in steps]), *backend.latent_shape[1:]) for k in (0, 2)
    )
    t = torch.stack([step[1] for step in steps]).double() / 1000
    found = backend.teacher(latents, t, cond, guidance=guidance).value
    torch.testing.assert_close(found, outputs, rtol=1e-5, atol=1e-5 * guidance)
    swapped = replace(cond, tensors={**cond.tensors, "source": cond.tensors["source"].flip(0)})
    assert (backend.teacher(latents, t, swapped, guidance=guidance).value - found).abs().max() > 1e-3


def test_a_run_of_edits(folder: Path, tmp_path: Path, no_report: None) -> None:
    """Joint DMD and GRPO from rows with images, which the reward is given as well."""
    rows = [f'{{"prompt": "{prompt}", "source": "{folder / f"{i}.png"}"}}' for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "edits.jsonl").write_text("\n".join(rows))
    code = "def near(images, prompts, source):\n    assert all(path.endswith('.png') for path in source)\n"
    (tmp_path / "near.py").write_text(code + "    return -images.mean((1, 2, 3))\n")
    given = {
        "model": str(folder), "backend": f"{__file__}:KleinEdit", "prompts": str(tmp_path / "edits.jsonl"),
        "rl": "grpo", "num_generations": 2, "reward": f"{tmp_path}/near.py:near", "guidance_scale": GUIDANCE,
        "resolution": str(SIZE), "max_sequence_length": LENGTH, "num_inference_steps": 2, "fake_updates": 1, "eta": 0.9,
        "stage1_steps": 1, "stage2_steps": 1, "per_device_train_batch_size": 4, "sample_images": 2,
        "teacher_steps": 2, "report_to": "none", "num_eval_samples": 4, "lora_rank": 4,
    }  # fmt: skip
    run = train(**given, output_dir=str(tmp_path / "run"))
    assert (run / "student" / "pytorch_lora_weights.safetensors").is_file()
