"""Stable Diffusion 3 and 3.5: flow matching on an MMDiT, as diffusers' `StableDiffusion3Pipeline`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from dmdr.backends.images import to_unit_range
from dmdr.backends.lora import LoRARoles
from dmdr.errors import ConfigError
from dmdr.paths import Prediction, RectifiedFlow
from dmdr.protocols import BackendOptions, Role, Sampler
from dmdr.sampling import unshift_times
from dmdr.states import load_strict
from dmdr.types import Condition

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
# All attention projections of the MMDiT blocks, of the image and of the text stream (DMDR's released scripts).
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

SNIPPET = """\
import json, torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

student = "path/to/this/folder"
pipe = StableDiffusion3Pipeline.from_pretrained("{base}"{absent})
{load}
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(student, subfolder="scheduler")
torch.manual_seed(0)
image = pipe({prompt!r}, **json.load(open(student + "/sampling.json"))["call"]).images[0]
image.save("image.png")"""


def own_call_arguments(folder: str) -> dict[str, Any]:
    """Call arguments that a local pipeline folder asks for in its `dmdr.json`, over the pipeline's own defaults.

    A model trained with another text length than the pipeline's default has no other place to say so.
    """
    file = Path(folder) / "dmdr.json"
    return {"max_sequence_length": 256} | (json.loads(file.read_text()) if file.is_file() else {})


class SD3Backend:
    """Teacher, fake score and student on one SD3 transformer (`protocols.Backend`)."""

    def __init__(self, folder: str, options: BackendOptions) -> None:
        self.folder, self.options = folder, options
        self.path = RectifiedFlow()
        transformer = SD3Transformer2DModel.load_config(folder, subfolder="transformer")
        self.vae_scale = 2 ** (len(AutoencoderKL.load_config(folder, subfolder="vae")["block_out_channels"]) - 1)
        cell = self.vae_scale * transformer["patch_size"]
        resolution = options.resolution or self.vae_scale * transformer["sample_size"]
        if resolution % cell:
            raise ConfigError(f"--resolution {resolution} is no multiple of {cell}, as {folder} needs")
        side = resolution // self.vae_scale
        self.latent_shape: tuple[int, ...] = (transformer["in_channels"], side, side)
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler")
        self.shift = float(options.shift or scheduler.get("shift", 1.0))
        self.max_sequence_length = options.max_sequence_length or own_call_arguments(folder)["max_sequence_length"]

    def prepare(self, accelerator: Any, *, roles: Sequence[Role]) -> None:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        self.accelerator = accelerator
        self._empty: tuple[Tensor, Tensor] | None = None  # encoding of the empty prompt, for guidance
        index = StableDiffusion3Pipeline.load_config(self.folder)
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(self.folder, dtype=dtype, **absent)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(accelerator.device)
        for module in self.pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        options = self.options
        self.roles = LoRARoles(
            self.pipeline.transformer,
            roles=roles,
            rank={"student": options.lora_rank, "reference": options.lora_rank, "fake_score": options.fake_lora_rank},
            alpha={
                "student": options.lora_alpha,
                "reference": options.lora_alpha,
                "fake_score": options.fake_lora_alpha,
            },
            target_modules=options.lora_target_modules or LORA_TARGETS,
            full_student=options.full_finetune,
            seed=options.seed,
        )
        if options.gradient_checkpointing:
            for network in self.roles.networks:
                network.enable_gradient_checkpointing(self.roles.checkpoint_function())

    # --- Text and images -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Sequence [B, L, D] and pooled [B, P] embeddings, each distinct prompt encoded once."""
        distinct = list(dict.fromkeys(prompts))
        sequence, _, pooled, _ = self.pipeline.encode_prompt(
            distinct,
            None,
            None,
            device=self.accelerator.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=sequence.device)
        return sequence[rows], pooled[rows]

    def encode(self, prompts: Sequence[str], **columns: Sequence[Any]) -> Condition:
        sequence, pooled = self._embed(prompts)
        return Condition(tuple(prompts), {"sequence": sequence, "pooled": pooled}, columns)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return to_unit_range(vae.decode(latents.to(vae.dtype), return_dict=False)[0])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = vae.encode((images * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).float()

    # --- Roles -----------------------------------------------------------------------------------------------------

    def _predict(
        self, role: Role | None, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], share: float = 1.0
    ) -> Prediction:
        with self.accelerator.autocast():
            velocity = self.roles(
                role,
                hidden_states=x_t.to(self.pipeline.transformer.dtype),
                timestep=self.path.timestep(t).to(torch.float32),
                encoder_hidden_states=cond["sequence"],
                pooled_projections=cond["pooled"],
                return_dict=False,
                share=share,
            )[0]
        return Prediction(velocity.float(), "velocity", x_t, t, self.path)

    def student(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict("student", x_t, t, cond.tensors)

    def fake_score(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict("fake_score", x_t, t, cond.tensors)

    @torch.no_grad()
    def reference(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict("reference", x_t, t, cond.tensors)

    @torch.no_grad()
    def teacher(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float = 1.0, fake_mix: float = 0.0
    ) -> Prediction:
        def predict(tensors: Mapping[str, Tensor]) -> Prediction:
            return self._predict("fake_score" if fake_mix else None, x_t, t, tensors, share=fake_mix)

        if guidance == 1:
            return predict(cond.tensors)
        if self._empty is None:
            self._empty = self._embed([""])
        sequence, pooled = (tensor.expand(len(cond), *tensor.shape[1:]) for tensor in self._empty)
        u = predict({"sequence": sequence, "pooled": pooled})
        if guidance == 0:
            return u
        c = predict(cond.tensors)
        return Prediction(u.value + guidance * (c.value - u.value), "velocity", x_t, t, self.path)

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        return self.roles.parameters(role)

    def snapshot(self) -> None:
        self.roles.snapshot()

    # --- Export ----------------------------------------------------------------------------------------------------

    def export(self, directory: Path, sampler: Sampler) -> Mapping[str, Any]:
        """A LoRA file for `load_lora_weights` (or a full transformer folder), and the scheduler of the student's grid.

        The scheduler holds the shift, the call arguments the grid before the shift: passing shifted sigmas would shift
        them twice.
        """
        if self.options.full_finetune:
            student = self.roles.copies["student"]
            student.save_pretrained(directory / "transformer")
        else:
            layers = self.roles.folded("student")
            StableDiffusion3Pipeline.save_lora_weights(directory, transformer_lora_layers=layers)
        config = dict(self.pipeline.scheduler.config) | {
            "shift": self.shift,
            "use_dynamic_shifting": False,
            "shift_terminal": None,
            "stochastic_sampling": sampler.eta == 1,
        }
        FlowMatchEulerDiscreteScheduler.from_config(config).save_pretrained(directory / "scheduler")
        _, height, width = self.latent_shape
        return {
            "num_inference_steps": len(sampler.t) - 1,
            "sigmas": unshift_times(sampler.t[:-1], self.shift).tolist(),
            "guidance_scale": 1.0,
            "max_sequence_length": self.max_sequence_length,
            "height": height * self.vae_scale,
            "width": width * self.vae_scale,
        }

    def snippet(self, base: str, prompt: str) -> str:
        index = StableDiffusion3Pipeline.load_config(self.folder)
        absent = ", text_encoder_3=None, tokenizer_3=None" if index["text_encoder_3"][0] is None else ""
        full = 'pipe.transformer = SD3Transformer2DModel.from_pretrained(student, subfolder="transformer")'
        load = full if self.options.full_finetune else "pipe.load_lora_weights(student)"
        return SNIPPET.format(base=base, prompt=prompt, absent=absent, load=load)

    def load_export(self, directory: Path) -> None:
        kind, file = ("a full transformer", "transformer") if self.options.full_finetune else ("a LoRA", LORA_FILE)
        if not (directory / file).exists():
            raise ConfigError(f"{directory} holds no {file}: {kind} is needed (--full_finetune says which)")
        if self.options.full_finetune:
            given = SD3Transformer2DModel.from_pretrained(directory, subfolder="transformer").state_dict()
            load_strict(self.roles.copies["student"].state_dict(), given, str(directory / file))
        else:
            given = {name.removeprefix("transformer."): value for name, value in load_file(directory / file).items()}
            self.roles.unfold("student", given, str(directory / file))
