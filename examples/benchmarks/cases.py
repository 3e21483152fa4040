"""What is measured: pipelines with random weights in the shape of real ones, and the settings of their runs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from dmdr_digits import Digits
from dmdr_digits.text import WIDTH, build_text_encoder, build_tokenizer
from dmdr_sit.pipeline import SiTPipeline, SiTTransformer2DModel

from . import published

# Of a run in stage 2: nothing fades out any more, nothing is written.
STEADY = {"stage1_steps": 0, "seed": 0, "num_eval_samples": 0, "report_to": "none"}
# Distillation alone is stage 1, here without its cold start, which the plain loop has not.
DISTILS = {"reward": "none", "sample_weight": "none", "dyna_guidance": 0.0, "dyna_renoise": [1.0, 1.0]}
DISTILS |= {"stage1_steps": 1000, "stage2_steps": 0}
GROUPS = {"num_generations": 4}
# Of the published models: LoRA students, the same settings for all, and the small CLIP of the digits as reward.
LARGE = {"mixed_precision": "bf16", "gradient_checkpointing": True, "per_device_train_batch_size": 4}
LARGE |= {"learning_rate": 1e-6, "fake_learning_rate": 5e-7, "rl_weight": 1.0}
SD3 = LARGE | {"gradient_checkpointing": False, "max_sequence_length": 128, "gradient_accumulation_steps": 4}
EIGHT = {"num_generations": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
JOINT: Mapping[str, Mapping[str, Any]] = {"none": {}, "refl": {}, "grpo": EIGHT}


@dataclass(frozen=True)
class Case:
    """A model, and what is trained on it.

    Attributes:
        about: The model, in words.
        settings: Of every run, as flags.
        objectives: Those that are measured, each with settings of its own; "none" is distillation alone.
        build: Saves the pipeline into a folder; None for the digits, which dmdr builds itself.
        gpu: Whether it is too large for a CPU.
    """

    about: str
    settings: Mapping[str, Any]
    objectives: Mapping[str, Mapping[str, Any]]
    build: Callable[[Path], None] | None = None
    gpu: bool = False

    def run(self, objective: str, root: Path) -> dict[str, Any]:
        """Settings of a run; the model is built into `root` if it is not there yet."""
        own = {"rl": objective} | (DISTILS if objective == "none" else {})
        if self.build is not None:
            if not (root / "model_index.json").exists():
                torch.manual_seed(0)
                self.build(root)
                (root / "prompts.jsonl").write_text("".join(map(row, range(1000))))
            own |= {"model": str(root), "prompts": str(root / "prompts.jsonl")}
            if objective != "none":
                own |= {"reward": "0.3*clip", "clip_checkpoint": str(Digits().reward_checkpoint("clip"))}
        else:
            own["model"] = "digits"
        return STEADY | own | dict(self.settings) | dict(self.objectives[objective])


def row(number: int) -> str:
    """A line of the prompt file."""
    digit = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")[number % 10]
    return json.dumps({"prompt": f"a handwritten {digit}", "label": number}) + "\n"


def vae(channels: int, **config: Any) -> AutoencoderKL:
    """Eight pixels a side for each latent one, as published, and an eighth of the width."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        norm_num_groups=16,
        latent_channels=channels,
        **config,
    )


def sd3(folder: Path, *, width: int, layers: int, size: int) -> None:
    """`StableDiffusion3Pipeline` of SD3's shape: heads of 64, 16 latent channels, patches of 2."""
    tokenizer = build_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=size,
        num_layers=layers,
        num_attention_heads=width // 64,
        attention_head_dim=64,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=size,
    )
    text = {"text_encoder": build_text_encoder(tokenizer), "text_encoder_2": build_text_encoder(tokenizer)}
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        **text,
    ).save_pretrained(folder)


def sit(folder: Path, *, width: int, layers: int, heads: int) -> None:
    """`SiTPipeline` of SiT's shape for images of 256 pixels."""
    network = SiTTransformer2DModel(num_layers=layers, num_attention_heads=heads, attention_head_dim=width // heads)
    SiTPipeline(network, vae(4, scaling_factor=0.18215), FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)


CASES = {
    "digits": Case(
        "StableDiffusion3Pipeline of 0.4M parameters, 16 + 7 tokens, LoRA on every layer, 4 steps",
        {},
        {name: {} for name in ("none", "refl", "grpo", "dpo", "srpo", "nft")},
    ),
    "sd3-100m": Case(
        "StableDiffusion3Pipeline of 113M parameters, 64 + 22 tokens, LoRA 64, 4 steps, guidance 7",
        # As examples/sd3/refl.yaml, but for precision and optimizer.
        {"max_sequence_length": 16, "per_device_train_batch_size": 4}
        | {"learning_rate": 1e-6, "fake_learning_rate": 5e-7, "rl_weight": 1.0},
        {"none": {}, "refl": {}, "grpo": GROUPS},
        partial(sd3, width=512, layers=12, size=16),
    ),
    "sit-b": Case(
        "SiT-B/2 of 130M parameters, 256 tokens, full student, 1 step, no guidance",
        # As examples/sit/stage1.yaml, but for precision and batch.
        {"full_finetune": True, "num_inference_steps": 1, "guidance_scale": 1.0, "per_device_train_batch_size": 2}
        | {"fake_lora_rank": 32, "fake_lora_alpha": 64.0, "learning_rate": 2e-5, "fake_learning_rate": 2e-5},
        {"none": {}},
        partial(sit, width=768, layers=12, heads=12),
    ),
    "sd3-medium-512": Case(
        "SD3-Medium without T5, 512 pixels, 16 images in 4 passes, LoRA 64, 4 steps, guidance 7, bfloat16",
        SD3 | {"resolution": 512},
        JOINT,
        published.sd3,
        gpu=True,
    ),
    "sd3-medium-1024": Case(
        "the same at 1024 pixels, checkpointed",
        SD3 | {"resolution": 1024, "gradient_checkpointing": True},
        JOINT,
        published.sd3,
        gpu=True,
    ),
    "sdxl": Case(
        "SDXL, 1024 pixels, 8 images in 2 passes, LoRA 64, 4 steps, guidance 8, bfloat16, checkpointed",
        LARGE | {"resolution": 1024, "guidance_scale": 8.0, "gradient_accumulation_steps": 2},
        {"none": {}, "refl": {}},
        published.sdxl,
        gpu=True,
    ),
    "sd35-large": Case(
        "SD3.5-Large without T5, 1024 pixels, 8 images in 2 passes, LoRA 64, guidance 7, bfloat16, checkpointed",
        LARGE | {"max_sequence_length": 128, "resolution": 1024, "gradient_accumulation_steps": 2},
        {"none": {}, "refl": {}},
        partial(published.sd3, recipe="sd35l"),
        gpu=True,
    ),
    "flux-dev": Case(
        "FLUX.1-dev, 1024 pixels, 2 images, LoRA 64, 4 steps, guidance 3.5 as an input, bfloat16, checkpointed",
        LARGE | {"resolution": 1024, "guidance_scale": 3.5, "guidance_jitter": 0.0, "per_device_train_batch_size": 2},
        {"none": {}, "refl": {}},
        published.flux,
        gpu=True,
    ),
}
