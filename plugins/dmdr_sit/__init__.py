"""SiT (Scalable Interpolant Transformers): class-conditional flow matching on ImageNet 256.

Checkpoints as published by REPA, or by the authors of SiT, are given with their size: `--model sit-xl-2:PATH`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dmdr.backends.flow import FlowBackend, FlowOptions
from dmdr.backends.latents import Latents
from dmdr.backends.loading import load_network, quiet
from dmdr.backends.pipeline import Network
from dmdr.errors import ConfigError
from dmdr.protocols import Sampler, unread
from dmdr.types import Condition
from dmdr_sit.pipeline import SiTPipeline, SiTTransformer2DModel, class_index

__all__ = ["SiTBackend", "SiTModel"]

# All attention projections. DMDR's released scripts adapt the queries and values of the fake score alone, and train the
# student in full (--full_finetune); here queries, keys and values are one layer.
LORA_TARGETS = ("attn.qkv", "attn.proj")

SNIPPET = """\
import json, torch
from diffusers import DiffusionPipeline

student = "path/to/this/folder"
pipe = DiffusionPipeline.from_pretrained(student, custom_pipeline=student, trust_remote_code=True{dtype})
torch.manual_seed(0)
image = pipe({prompt!r}, **json.load(open(student + "/sampling.json"))["call"]).images[0]
image.save("image.png")"""


@dataclass(frozen=True, kw_only=True)
class SiTOptions(FlowOptions):
    """Options of SiT, which reads no text: guidance leads away from a null label of its own."""

    max_sequence_length: None = unread()
    negative_prompt: None = unread()
    zero_empty_prompt: None = unread()
    prompt_cache: None = unread()
    quantize: None = unread()


class SiTBackend(FlowBackend):
    """Teacher, fake score and student on one SiT (`protocols.Backend`).

    A sample's class is its column `label`; where the prompts have no such column, the prompt "class 207" says it.
    """

    Options = SiTOptions
    pipeline_class = SiTPipeline
    network_class = SiTTransformer2DModel
    lora_targets = LORA_TARGETS
    latents_class = Latents
    feature_blocks = ("blocks",)

    def __init__(self, folder: str, options: SiTOptions) -> None:
        super().__init__(folder, options)
        own = self.latents.scale * self.network_config.whole("sample_size")
        for size in self.sizes:
            if size != (own, own):
                raise ConfigError(f"--resolution {size} does not work with {folder}: give {own}")
        self.num_classes = self.network_config.whole("num_classes")

    def _pipeline(self, network: Any, **parts: Any) -> Any:
        # diffusers takes a network of a custom pipeline from its folder only, but ours is loaded already.
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config)
        return SiTPipeline(network, scheduler=scheduler, **parts)

    def check_prompts(self, prompts: Sequence[str], **columns: Sequence[Any]) -> None:
        """Refuse what has no class.

        Raises:
            ConfigError: If a label or prompt names none.
        """
        self._labels(prompts, columns)

    def encode(self, prompts: Sequence[str], **columns: Sequence[Any]) -> Condition:
        """`label`, [B] int64; raises as `check_prompts` does."""
        labels = torch.tensor(self._labels(prompts, columns), device=self.device)
        return Condition(tuple(prompts), {"label": labels}, columns)

    def _labels(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[int]:
        given = columns.get("label", [None] * len(prompts))
        meant = [prompt if label is None else label for prompt, label in zip(prompts, given, strict=True)]
        try:
            return [class_index(label, self.num_classes) for label in meant]
        except ValueError as error:
            what = (
                "the column 'label'"
                if "label" in columns
                else "there is no column 'label', so each prompt must be a class"
            )
            raise ConfigError(f"--prompts: {what}: {error}") from error

    def unconditional(self, cond: Condition) -> Mapping[str, Tensor]:
        return {"label": torch.full_like(cond.tensors["label"], self.num_classes)}

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = network(x_t, t.to(torch.float32), cond["label"], return_dict=False)[0]
        return output

    def draw_noise(self, step: int, count: int) -> Tensor:
        """All in float32."""
        return self._randn((count, *self.latent_shape), torch.float32)

    def call_arguments(self, sampler: Sampler) -> dict[str, Any]:
        """Without height and width: the network has one size."""
        return {n: value for n, value in super().call_arguments(sampler).items() if n in self.own_call_arguments()}

    # --- Export: no stock pipeline knows SiT, so that the student brings a whole one ----------------------------------

    def check_shardable(self) -> None:
        raise ConfigError("--shard: a SiT is exported as a whole network, and fits on one GPU; leave out --shard")

    def export(self, directory: Path, sampler: Sampler) -> Mapping[str, Any]:
        """A pipeline folder with its code; `transformer/*.safetensors` has the layout of the published checkpoints.

        A LoRA is merged into it, and also written as the file that `load_lora_weights` reads.
        """
        if not self.options.full_finetune:
            super().export(directory, sampler)
        with torch.device("meta"):
            network = SiTTransformer2DModel.from_config(self.network_config)
        network.load_state_dict(self.roles.merged("student"), assign=True)
        vae = load_network(AutoencoderKL, self.source, "vae", torch.float32)
        with quiet():
            SiTPipeline(network, vae, self.scheduler(sampler)).save_pretrained(directory)
        return self.call_arguments(sampler)

    def snippet(self, base: str, prompt: str, sampler: Sampler) -> str:
        dtype = "" if self.dtype == torch.float32 else f", torch_dtype={self.dtype}"
        return SNIPPET.format(prompt=prompt, dtype=dtype)


class SiTModel:
    """`--model sit-xl-2:PATH`, and sit-l-2, sit-b-2, sit-s-2 (`protocols.NamedModel`).

    PATH is a checkpoint of REPA or of SiT's authors: a .pt or .safetensors file of weights, or a training checkpoint,
    whose `ema` is taken. The VAE is a folder `vae` beside it, or else stabilityai/sd-vae-ft-ema.
    """

    size: ClassVar[str]
    checkpoint: ClassVar[Path]
    pipeline: ClassVar[str] = "SiTPipeline"
    # The cold start that DMDR published for SiT-XL/2; its global batch of 512 and fp16 are left to the user.
    recipe: ClassVar[Mapping[str, Any]] = {
        "full_finetune": True,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "fake_lora_rank": 32,
        "learning_rate": 2e-5,
        "stage2_learning_rate": 1e-5,
        "fake_learning_rate": 2e-5,
        "stage2_fake_learning_rate": 1e-5,
        "stage1_steps": 20000,
        "stage2_steps": 2000,
        "dyna_steps": 10000,
        "dyna_guidance": 0.375,  # the fake score's adapter at .75 of its own strength 2
        "objectives": {"refl": {"rl_weight": 0.05}},
    }

    @classmethod
    def at(cls, address: str) -> type["SiTModel"]:
        """The model of a size and a checkpoint, `sit-xl-2:PATH`.

        Raises:
            ConfigError: If no path follows the name.
        """
        size, _, path = address.partition(":")
        if not path:
            raise ConfigError(f"model '{size}' needs a checkpoint: --model {size}:PATH")
        own = {"size": size, "checkpoint": Path(path).expanduser().resolve()}
        return type(cls.__name__, (cls,), own | {"__doc__": cls.__doc__, "__module__": cls.__module__})

    def __init__(self) -> None:
        if not self.checkpoint.is_file():
            raise ConfigError(f"--model {self.size}:{self.checkpoint} is no file; expected a checkpoint of SiT or REPA")

    def folder(self) -> Path:
        """The checkpoint as a pipeline, converted on first use."""
        from dmdr_sit.checkpoint import pipeline_folder

        return pipeline_folder(self.size, self.checkpoint)

    def prompts(self) -> list[dict[str, Any]]:
        """A row for each of ImageNet's 1000 classes: `prompt`, and the class as `label`."""
        return [{"prompt": f"class {label}", "label": label} for label in range(1000)]

    def reward_checkpoint(self, reward: str, *, held_out: bool = False) -> Path | None:
        return None

    def judge(self) -> None:
        return None
