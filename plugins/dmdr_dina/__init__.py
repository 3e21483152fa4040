"""A reward that looks at latents: DiNa-LRM, whose network is the first half of Stable Diffusion 3.5 Medium."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from dmdr.backends.images import recomputed
from dmdr.backends.loading import Source, load_network, load_pipeline, quiet, read_weights, refusing
from dmdr.backends.lora import merge
from dmdr.backends.lora_files import read_lora
from dmdr.errors import ConfigError, MissingFile, one_line
from dmdr.protocols import Backend
from dmdr.states import load_strict
from dmdr.types import Condition
from dmdr_dina.head import Head

PUBLISHED = "liuhuohuo/DiNa-LRM-SD35M-12layers"
CONFIG: Mapping[str, Any] = {  # of the published one, for --dry_run
    "backbone_model_id": "stabilityai/stable-diffusion-3.5-medium",
    "num_transformer_layers": 12,
    "visual_head_idx": [4, 8, 12],
    "text_head_idx": [4, 8, 12],
    "use_lora": True,
    "reward_head": {},
}
BACKBONE: Mapping[str, Any] = {  # of Stable Diffusion 3.5 Medium, likewise
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
HEAD = {"width": -1, "out_dim": 1, "num_queries": 4, "num_attn_heads": 8, "dropout": 0.0, "use_proj_in": False}
TOKENS = 128  # of T5, as in the authors' training
WEIGHTS = "model.safetensors"
SIDE = 16  # pixels that a side of an image is a multiple of


@dataclass
class DiNa:
    """DiNa-LRM (Liu et al. 2026, github.com/HKUST-C4G/diffusion-rm).

    The score is (raw + 10) / 10, as the authors print it. A run of an SD3 or SD3.5 model gives it latents and the
    embeddings of the prompts, which are there anyway: nothing is decoded, and no text encoder is loaded. In any other
    place it looks at images: the VAE and the text encoders of `backbone` are then loaded at the first call.

    It looks at latents with some noise, which is the same for all images, so that a score is the same each time; the
    authors draw it anew. They train with 128 tokens of T5, which it reads where it looks at images; a run's embeddings
    are of --max_sequence_length tokens.

    Attributes:
        checkpoint: Folder or hub id in the authors' layout: `config.json`, `checkpoint/backbone_lora`,
            `checkpoint/rm_head.pt`; None for the published one.
        backbone: Folder or hub id of Stable Diffusion 3.5 Medium; None for the one that the configuration names.
        noise: Time of the noise, in [0, 1]; the authors take 0.4 for a model's own latents, and 0.1 for images.
        gradient_checkpointing: Recompute the blocks in backward: less memory, more time.

    Raises:
        ConfigError: If noise is not in [0, 1].
    """

    differentiable = True
    weightless = True
    checkpoint: str | None = None
    backbone: str | None = None
    noise: float = 0.4
    gradient_checkpointing: bool = False
    _noises: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)
    _pipeline: Any = field(default=None, init=False, repr=False)
    _model: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 1:
            raise ConfigError(f"dina: noise must be in [0, 1], not {self.noise}")

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load backbone, adapter and head, frozen.

        Raises:
            ConfigError: If one is missing or of another layout.
        """
        meta = device.type == "meta"
        place = Source(self.checkpoint or PUBLISHED)
        known = meta and not Path(place.folder).is_dir()
        config = _checked(dict(CONFIG) if known else _read_config(place), place.folder)
        self._source = Source(self.backbone or config["backbone_model_id"])
        transformer, scheduler = _of_architecture(self._source, dtype) if meta else _of_files(self._source, dtype)
        if config["use_lora"] and not meta:
            files = [_fetch(place, f"checkpoint/backbone_lora/adapter_{name}") for name in ("config.json", WEIGHTS)]
            folder = str(files[0].parent)
            merge(transformer.state_dict(), read_lora(folder, transformer, StableDiffusion3Pipeline), f"dina: {folder}")
        model = Network(transformer, config, recompute=self.gradient_checkpointing)
        if not meta:
            file = _fetch(place, "checkpoint/rm_head.pt")
            load_strict(model.reward_head.state_dict(), read_weights(str(file)), str(file))
        self._model = model.to(device, dtype).eval().requires_grad_(False)
        self._dtype = dtype
        nearest = (scheduler.sigmas - self.noise).abs().argmin()  # the authors look at its times only
        self._sigma, self._timestep = float(scheduler.sigmas[nearest]), float(scheduler.timesteps[nearest])

    def reads(self, backend: Backend) -> bool:
        """A family on `StableDiffusion3Pipeline`s with latents and embeddings of the sizes of its backbone."""
        if getattr(backend, "pipeline_class", None) is not StableDiffusion3Pipeline:
            return False
        names = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
        theirs: Any = backend
        return all(theirs.network_config.get(name) == self._model.config[name] for name in names)

    def score_latents(self, latents: Tensor, cond: Condition) -> Tensor:
        """Latents [B, C, h, w] and an SD3 family's embeddings -> [B] float32."""
        return self._score(latents, cond.tensors["sequence"], cond.tensors["pooled"])

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1] and B prompts -> [B] float32; sides are cropped to multiples of 16, in the middle.

        Raises:
            ConfigError: If VAE or text encoders cannot be loaded.
        """
        if images.is_meta:
            raise ConfigError("a dry run counts it for SD3 families only, whose latents it looks at")
        if self._pipeline is None:
            self._pipeline = load_pipeline(StableDiffusion3Pipeline, self._source, self._dtype, transformer=None)
            self._pipeline.to(images.device)
            for part in self._pipeline.components.values():
                if isinstance(part, nn.Module):
                    part.requires_grad_(False)
        pipeline, vae = self._pipeline, self._pipeline.vae
        with torch.no_grad(), quiet():  # of prompts that are longer than CLIP reads
            sequence, _, pooled, _ = pipeline.encode_prompt(
                list(prompts),
                None,
                None,
                device=images.device,
                do_classifier_free_guidance=False,
                max_sequence_length=TOKENS,
            )
        found = vae.encode(self._fitting(images).mul(2).sub(1).to(vae.dtype)).latent_dist.mode().float()
        return self._score((found - vae.config.shift_factor) * vae.config.scaling_factor, sequence, pooled)

    def _fitting(self, images: Tensor) -> Tensor:
        height, width = (side - side % SIDE for side in images.shape[2:])
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, top : top + height, left : left + width]

    def _score(self, latents: Tensor, sequence: Tensor, pooled: Tensor) -> Tensor:
        noisy = (1 - self._sigma) * latents + self._sigma * self._noise_like(latents)
        times = torch.full((len(latents),), self._timestep, device=latents.device)
        kind = "cpu" if latents.is_meta else latents.device.type
        with torch.autocast(kind, enabled=False):  # the caller's
            raw = self._model(*(each.to(self._dtype) for each in (noisy, sequence, pooled)), times)
        return (raw.float() + 10) / 10

    def _noise_like(self, latents: Tensor) -> Tensor:
        key = (*latents.shape[1:], latents.device)
        if key not in self._noises:
            drawn = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
            self._noises[key] = drawn.to(latents.device)
        return self._noises[key]


class Network(nn.Module):
    """The first blocks of an SD3 transformer, and a head on the tokens after some of them.

    Args:
        transformer: Its later blocks are dropped.
        config: The model's configuration.
        recompute: The blocks in backward.
    """

    def __init__(self, transformer: Any, config: Mapping[str, Any], *, recompute: bool) -> None:
        super().__init__()
        self.config, self.recompute = transformer.config, recompute
        self.pos_embed, self.time_text_embed = transformer.pos_embed, transformer.time_text_embed
        self.context_embedder = transformer.context_embedder
        self.transformer_blocks = transformer.transformer_blocks[: config["num_transformer_layers"]]
        self.image_layers, self.text_layers = config["visual_head_idx"], config["text_head_idx"]
        tokens, head = transformer.inner_dim, HEAD | config["reward_head"]
        with torch.device(next(transformer.parameters()).device):
            self.reward_head = Head(
                tokens,
                tokens if head["width"] == -1 else head["width"],
                len(self.image_layers),
                len(self.text_layers),
                head["num_queries"],
                head["num_attn_heads"],
                project=head["use_proj_in"],
            )

    def forward(self, latents: Tensor, sequence: Tensor, pooled: Tensor, times: Tensor) -> Tensor:
        """Noisy latents [B, C, h, w], embeddings [B, T, D] and [B, P], and times [B] in [0, 1000] -> scores [B]."""
        image, text = self.pos_embed(latents), self.context_embedder(sequence)
        time = self.time_text_embed(times, pooled)
        images, texts = [image], [text]  # after each block
        for block in self.transformer_blocks:
            if self.recompute and torch.is_grad_enabled():
                text, image = recomputed(block, image, text, time)
            else:
                text, image = block(image, text, time)
            images.append(image)
            texts.append(text)
        seen, read = [images[index] for index in self.image_layers], [texts[index] for index in self.text_layers]
        score: Tensor = self.reward_head(seen, read, time)
        return score


def _of_files(source: Source, dtype: torch.dtype) -> tuple[Any, Any]:
    """Transformer and scheduler of a pipeline."""
    with refusing(f"{source.place('scheduler')} has no readable configuration"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(source.folder, **source.files("scheduler"))
    return load_network(SD3Transformer2DModel, source, "transformer", dtype), scheduler


def _of_architecture(source: Source, dtype: torch.dtype) -> tuple[Any, Any]:
    """The same on the meta device; the published ones where the pipeline is not on this machine."""
    if Path(source.folder).is_dir():
        network = load_network(SD3Transformer2DModel, source, "transformer", dtype, meta=True)
    else:
        with torch.device("meta"):
            network = SD3Transformer2DModel(**BACKBONE)
    return network, FlowMatchEulerDiscreteScheduler(shift=3.0)


def _read_config(place: Source) -> dict[str, Any]:
    """The `model` part of the configuration.

    Raises:
        ConfigError: If it is missing or has none.
    """
    file = _fetch(place, "config.json")
    with refusing(f"{file} is no configuration of DiNa-LRM"):
        found = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
    return dict(CONFIG) | {"use_lora": False} | found


def _fetch(place: Source, path: str) -> Path:
    """A file of the checkpoint, on this machine.

    Raises:
        ConfigError: If it is not there.
    """
    try:
        file = place.fetch(*path.rpartition("/")[::2])
    except Exception as error:  # of the hub, which has its own
        raise MissingFile(f"{place.folder} cannot be fetched from the hub ({one_line(error)})", "checkpoint") from error
    if not file.is_file():
        raise ConfigError(f"{place.folder} has no {path}")
    return file


def _checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A configuration that this reward can build.

    Raises:
        ConfigError: Names what it cannot.
    """
    unknown = config["reward_head"].keys() - HEAD.keys()
    whole = not config["use_lora"] and not config.get("freeze_backbone", False)
    for what, found in {
        "use_logistic": config.get("use_logistic"),
        "a backbone that was trained as a whole (full_model.pt)": whole,
        f"reward_head: {', '.join(sorted(unknown))}": unknown,
        "reward_head: out_dim": config["reward_head"].get("out_dim", 1) != 1,
    }.items():
        if found:
            raise ConfigError(f"{where}: its configuration asks for {what}, which this reward does not know")
    return config
