"""Stable Diffusion 1, 2 and XL: UNets on the variance-preserving path, as diffusers' pipelines of these names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dmdr.backends.component import ComponentConfig
from dmdr.backends.latents import Latents
from dmdr.backends.loading import quiet, read_config
from dmdr.backends.options import PipelineOptions
from dmdr.backends.pipeline import Network, PipelineBackend
from dmdr.errors import ConfigError, one_line
from dmdr.paths import Kind, VariancePreserving
from dmdr.protocols import Role, Sampler, unread
from dmdr.sampling import time_grid

# Attention, feed-forward and convolution layers (DMD2's and DMDR's released SDXL scripts).
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
# Modules that diffusers finds in Kohya's form by SDXL's original names only.
ORIGINAL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
ONE_STEP = 0.399  # what a one-step student is told: at 999 an eps-predictor's x0 is its error 15-fold
KINDS: Mapping[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# What makes a noise schedule, by the names that all schedulers of this path give it.
SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    "prediction_type",
)
# What the network is told, by the names of the schedulers that could tell it otherwise.
OWN_TIMES = {"timestep_type": "discrete", "use_flow_sigmas": False}


@dataclass(frozen=True, kw_only=True)
class UNetOptions(PipelineOptions):
    """Options of a UNet, whose text lengths are fixed, and which needs each of its text encoders."""

    max_sequence_length: None = unread()


class UNetBackend(PipelineBackend):
    """A `UNet2DConditionModel` that was trained on a table of 1000 noise levels.

    Attributes:
        needed: Text encoders that the network cannot do without.
    """

    Options = UNetOptions
    network_class = UNet2DConditionModel
    network_name = "unet"
    lora_targets = LORA_TARGETS
    needed: ClassVar[Sequence[str]] = ("text_encoder",)
    feature_blocks = ("mid_block",)  # as in DMD2

    def __init__(self, folder: str, options: UNetOptions) -> None:
        super().__init__(folder, options)
        name = self.pipeline_class.__name__
        absent = [part for part in self.needed if part not in self.text.components]
        if absent:
            raise ConfigError(f"{folder} has no {', '.join(absent)}, but a {name} needs it")
        if self.network_config.get("time_cond_proj_dim"):
            raise ConfigError(
                f"{folder} takes guidance as an input (time_cond_proj_dim); give the model that it was made from"
            )
        self.schedule = self._own_schedule()
        table = self._lcm().alphas_cumprod.double()
        self.path = VariancePreserving(table)
        self.kind = KINDS[self.schedule["prediction_type"]]
        if self.kind == "eps" and table[-1] == 0:
            raise ConfigError(f"{folder}/scheduler: rescale_betas_zero_snr does not work with epsilon prediction")

    def _own_schedule(self) -> dict[str, Any]:
        """Betas and prediction type of the folder's own scheduler, with the defaults of its class.

        Raises:
            ConfigError: If it is no scheduler of this path, or says that the network is told other times than 0 to 999.
        """
        where = f"{self.source.place('scheduler')}/{DDPMScheduler.config_name}"
        given = read_config(DDPMScheduler, self.source, "scheduler")
        try:
            with quiet():
                own = getattr(diffusers, given["_class_name"]).from_config(given)
                schedule = {name: own.config[name] for name in SCHEDULE if name in own.config}
                exported: Any = LCMScheduler(**schedule)  # it may not know these betas
                levels = getattr(own, "alphas_cumprod", torch.empty(0))
        except Exception as error:  # attribute, value and type errors of whatever the file holds
            raise ConfigError(f"{where} cannot be read: {one_line(error)}") from error
        if len(levels) != 1000:
            raise ConfigError(f"{where} is a {type(own).__name__} of {len(levels)} noise levels; expected 1000")
        config = ComponentConfig(OWN_TIMES | {"prediction_type": "epsilon"} | own.config, where)
        config.require("prediction_type", *KINDS)
        for name, expected in OWN_TIMES.items():
            config.require(name, expected)
        if not torch.allclose(levels.double(), exported.alphas_cumprod.double(), rtol=0, atol=1e-6):
            raise ConfigError(f"{where}: the noise levels of this {type(own).__name__} do not follow from its betas")
        return schedule | {"prediction_type": config["prediction_type"]}

    def _lcm(self) -> Any:
        """x0, noised anew: the sampler's step at eta 1, but for the boundary scalings of consistency models.

        With this scaling c_skip is below 1e-8 and c_out above 1 - 1e-8 from timestep 1 on; by default c_skip is 0.0025
        there. 1000 original steps put every timestep on the scheduler's own grid.
        """
        return LCMScheduler(**self.schedule, original_inference_steps=1000, timestep_scaling=1e4)

    def _ddim(self, sampler: Sampler) -> Any:
        """DDIM with noise, whose steps are all of one length.

        Raises:
            ConfigError: If the sampler's are not.
        """
        steps = sampler.num_inference_steps
        if 1000 % steps:
            what = f"--sample_eta {sampler.eta:g} needs a number of steps that divides 1000, such as 2, 4, 5 or 8"
            raise ConfigError(f"{what}, not {steps}")
        ddim: Any = DDIMScheduler(**self.schedule, timestep_spacing="trailing", clip_sample=False)
        ddim.set_timesteps(steps)
        if not torch.equal(ddim.timesteps, self.path.timestep(sampler.t[:-1])):
            own = " ".join(map(str, ddim.timesteps.tolist()))
            raise ConfigError(f"--sample_eta {sampler.eta:g} needs the times of DDIMScheduler: pass --timesteps {own}")
        return ddim

    @staticmethod
    def _noisy_ddim(sampler: Sampler) -> bool:
        """Whether steps are DDIM's with noise; the last one, and so a single one, has none."""
        return 0 < sampler.eta < 1 and sampler.num_inference_steps > 1

    def grid(self, num_inference_steps: int) -> Tensor:
        """A straight line; told 999, 750, 500 and 250 with four steps.

        A single step is fed pure noise and told 399.

        Source: the released one-step SDXL of DMD2 (Yin et al. 2024, arXiv 2405.14867), "cond399", and DMDR's scripts.
        """
        if num_inference_steps == 1:
            return torch.tensor([ONE_STEP, 0.0], dtype=torch.float64)
        return time_grid(num_inference_steps)

    def scheduler(self, sampler: Sampler) -> Any:
        """Euler's step in x_t / alpha is DDIM's; with "leading" the network is fed unit noise at any first time."""
        if sampler.eta == 1:
            return self._lcm()
        if self._noisy_ddim(sampler):
            return self._ddim(sampler)
        return EulerDiscreteScheduler(**self.schedule, timestep_spacing="leading")

    def draw_noise(self, step: int, count: int) -> Tensor:
        """All in the pipeline's own precision."""
        return self._randn((count, *self.latent_shape), self.dtype)

    def call_arguments(self, sampler: Sampler) -> dict[str, Any]:
        given: dict[str, Any] = {"timesteps": self.path.timestep(sampler.t[:-1]).tolist()}
        if self._noisy_ddim(sampler):
            given = {"eta": sampler.eta}
        return super().call_arguments(sampler) | given | {"guidance_scale": 1.0}

    def lora_key(self, name: str) -> str:
        """Kohya's form, which diffusers and ComfyUI read; ComfyUI does not know PEFT's names of a UNet's attention."""
        module, part = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
        module = ORIGINAL.get(module, module)
        return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if part == 'A' else 'up'}.weight"

    def blank_embeddings(self, count: int) -> dict[str, Tensor]:
        width = self.network_config.whole("cross_attention_dim")
        return {"sequence": self.blank(count, self.text.clip_length(), width)}

    @property
    def feature_width(self) -> int:
        return self.network_config.wholes("block_out_channels")[-1]

    def image_places(self, answer: Tensor, x_t: Tensor) -> Tensor:
        return answer.flatten(2).mT

    def added(self, x_t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """What the network is told beside time and prompt."""
        return None

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = network(
            sample=x_t,
            timestep=self.path.timestep(t),
            encoder_hidden_states=cond["sequence"],
            added_cond_kwargs=self.added(x_t, cond),
            return_dict=False,
        )[0]
        return output


class SDXLLatents(Latents):
    """Those whose pipeline also reads means and deviations."""

    reads = ("scaling_factor", "latents_mean", "latents_std")


class SDXLBackend(UNetBackend):
    """Teacher, fake score and student on one SDXL UNet (`protocols.Backend`)."""

    pipeline_class = StableDiffusionXLPipeline
    needed = ("text_encoder", "text_encoder_2")
    latents_class = SDXLLatents

    def __init__(self, folder: str, options: UNetOptions) -> None:
        super().__init__(folder, options)
        self.network_config.require("addition_embed_type", "text_time")

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Sequence [B, 77, D1 + D2] of both encoders, and pooled [B, P] of the second."""
        sequence, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"sequence": sequence, "pooled": pooled}

    def blank_embeddings(self, count: int) -> dict[str, Tensor]:
        config = self.network_config
        times = 6 * config.whole("addition_time_embed_dim")
        pooled = config.whole("projection_class_embeddings_input_dim") - times
        return super().blank_embeddings(count) | {"pooled": self.blank(count, pooled)}

    def prepare(self, accelerator: Any, *, roles: Sequence[Role], sharding: DeviceMesh | None = None) -> None:
        super().prepare(accelerator, roles=roles, sharding=sharding)

        def ids(width: int, height: int) -> Tensor:
            """As the pipeline gives them: original size, corner of the crop, target size."""
            return torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype, device=self.device)

        self.time_ids: dict[tuple[int, ...], Tensor] = {
            shape[1:]: ids(*size) for shape, size in zip(self.latent_shapes, self.sizes, strict=True)
        }

    def added(self, x_t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pooled embeddings, and sizes."""
        return {"text_embeds": cond["pooled"], "time_ids": self.time_ids[x_t.shape[2:]].expand(len(x_t), -1)}


class SD1Backend(UNetBackend):
    """The same of Stable Diffusion 1 and 2."""

    pipeline_class = StableDiffusionPipeline
    default_size = 64

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Sequence [B, 77, D]."""
        return {"sequence": pipeline.encode_prompt(list(prompts), self.device, 1, False)[0]}
