"""What all model families on diffusers pipelines share: loading, roles, text, guidance, decoder and export.

A family subclasses `PipelineBackend` and says what is its own: the pipeline's class, how prompts are embedded, how its
network is called, and the scheduler that samples a student.
"""

import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dmdr.backends.component import parts_of, read_component
from dmdr.backends.difference import low_rank_difference
from dmdr.backends.images import recomputed, to_unit_range
from dmdr.backends.kernels import answers_of, compile_blocks, set_attention_backend
from dmdr.backends.latents import Latents, TinyLatents, refuse_other_latents
from dmdr.backends.loading import (
    Source,
    check_there,
    load_network,
    load_pipeline,
    on_device,
    open_network,
    read_config,
    read_weights,
    weight_files,
)
from dmdr.backends.lora import LoRARoles, check_targets, joined, merge, parted
from dmdr.backends.lora_files import read_lora
from dmdr.backends.options import PipelineOptions
from dmdr.backends.prompt_encoder import TEXT, PromptEncoder, text_components
from dmdr.backends.quantized import check_quantize, quantize
from dmdr.backends.sharding import copy, fill, gather_in_backward, shard, stored
from dmdr.backends.texts import LENGTH, alike, in_order
from dmdr.errors import ConfigError, TrainingError
from dmdr.paths import Kind, NoisePath, Prediction, guided
from dmdr.protocols import LORA_FILE, FeatureRole, Role, Sampler
from dmdr.sizes import Size
from dmdr.states import load_strict, own_rows, read_tensors, refuse_infinite, whole
from dmdr.types import Condition, dtype_of

logger = logging.getLogger("dmdr")
SNIPPET = """\
import json, torch
from diffusers import {imports}

student = "path/to/this/folder"
pipe = {pipeline}.from_pretrained({base}{given})
{load}
pipe.scheduler = {scheduler}.from_pretrained(student, subfolder="scheduler")
torch.manual_seed(0)
image = pipe(prompt={prompt!r}, **json.load(open(student + "/sampling.json"))["call"]).images[0]
image.save("image.png")"""

# A network with its role chosen: keyword arguments in, tuple out.
Network = Callable[..., Any]


class PipelineBackend:
    """Teacher, fake score and student on the one denoising network of a pipeline (`protocols.Backend`).

    A subclass sets the class attributes and `path`, and implements `embed`, `blank_embeddings`, `call`, `scheduler` and
    `call_arguments`. Prepared on the meta device it has shapes and no values, for --dry_run.

    Attributes:
        Options: The family's flags.
        pipeline_class: The stock pipeline that loads the folder and samples the export.
        network_class: Class of the denoising network.
        network_name: The component that it is.
        lora_targets: Modules that get an adapter, as PEFT matches names; a family may set it by its configuration.
        default_size: Resolution in latent pixels where neither the user nor the network's configuration says one.
        latents_class: Of its VAE and the states that it makes.
        padded: Embeddings [B, text_length, ...] that are zero after each prompt's own `length`, [B] int64.
        text_length: Tokens of the longest text encoder, where the pipeline's call asks for them; 0 where it does not.
        text_unit: The network fills texts up to a multiple of so many tokens, and masks what one has less than another;
            0 if all texts have as many.
        feature_blocks: Modules of the network, or lists of them, whose answers are the layers of `features`.
    """

    Options: ClassVar[type[PipelineOptions]] = PipelineOptions
    pipeline_class: ClassVar[Any]
    network_class: ClassVar[Any]
    network_name: ClassVar[str] = "transformer"
    lora_targets: Sequence[str]
    default_size: ClassVar[int] = 128
    latents_class: ClassVar[type[Latents]] = Latents
    padded: ClassVar[Sequence[str]] = ()
    text_unit: ClassVar[int] = 0
    feature_blocks: ClassVar[Sequence[str]] = ("transformer_blocks",)
    kind: Kind = "velocity"
    path: NoisePath
    shift: float = 1.0

    def __init__(self, folder: str, options: PipelineOptions) -> None:
        """Read the configuration files of a local folder or hub id; nothing heavy.

        Raises:
            ConfigError: If one is missing or has an invalid value, or the options do not fit this model.
        """
        self.options, self.source = options, Source(folder, options.revision, options.variant)
        self.start: Source | None = None  # of the student, where that is not the teacher
        if options.teacher:
            self.start, self.source = self.source, Source(options.teacher, None, options.variant)
            check_there("--teacher", options.teacher)
        self.folder = folder = self.source.folder
        self.index = read_component(self.pipeline_class, self.source)
        if self.start:
            self._check_class(self.start)
        self.network_config = read_component(self.network_class, self.source, self.network_name)
        if self.start:
            self._check_start(self.start)
        self.latents = self.latents_class(self.source, "vae", self.pipeline_class.__name__)
        channels, scale = self.latents.channels, self.latents.scale
        for name, wanted in self.network_channels.items():
            if self.network_config.get(name) not in (None, wanted):
                raise self.network_config.refused(name, f"{wanted}, of latents with {channels} channels")
        self.sizes = options.sizes() or (Size(*[scale * self._own_size()] * 2),)
        cell = scale * self.patch_size
        for size in self.sizes:
            if size.width % cell or size.height % cell:
                raise ConfigError(f"--resolution {size} must be a multiple of {cell} for {folder}")
        self.latent_shapes = tuple((channels, size.height // scale, size.width // scale) for size in self.sizes)
        self.latent_shape: tuple[int, ...] = self.latent_shapes[0]
        self._teacher_lora: Mapping[str, Tensor] = {}
        own = min(self.own_call_arguments().get("max_sequence_length", 0), self.text_limit)
        self.text_length: int = options.max_sequence_length or own
        if self.text_length > self.text_limit:
            raise ConfigError(f"--max_sequence_length {self.text_length}: {folder} takes {self.text_limit} at most")
        self.text = PromptEncoder(
            self.source,
            text_components(self.index, self.dropped_text_encoders),
            options.prompt_cache,
            options.cpu_offload,
            open_pipeline=self._text_pipeline,
            embed=self.embed,
            blank=self.blank_embeddings,
            settings=(self.pipeline_class.__name__, self.text_length),
            padded=dict.fromkeys(self.padded, self.text_length),
            unconditional=options.negative_prompt or "",
        )

    def _check_class(self, start: Source) -> None:
        """Refuse a student of another pipeline, whose components have other names."""
        theirs, cls = self.index["_class_name"], read_component(self.pipeline_class, start)["_class_name"]
        if theirs != cls:
            raise ConfigError(f"--teacher {self.folder} is a {theirs}, but --model {start.folder} is a {cls}")

    def _check_start(self, start: Source) -> None:
        """Refuse a student that is no network like the teacher's."""
        network = read_component(self.network_class, start, self.network_name)
        for name in sorted(self.network_config.keys() | network.keys()):
            own, other = (json.dumps(config.get(name)) for config in (self.network_config, network))
            if own != other and not name.startswith("_") and name != "sample_size":  # which changes no weight
                what = f"{name} is {own} there and {other} in --model {start.folder}"
                raise ConfigError(f"--teacher {self.folder} is another architecture: {what}")

    def _own_size(self) -> int:
        """The network's resolution in latent pixels.

        Raises:
            ConfigError: If its configuration names one that is no square.
        """
        config = self.network_config
        if not config.get("sample_size"):
            return self.default_size
        if isinstance(config["sample_size"], list | tuple):
            raise config.refused("sample_size", "a single number; give the image size with --resolution")
        return config.whole("sample_size")

    # --- What a family says of itself --------------------------------------------------------------------------------

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side that the network cannot divide."""
        return self.network_config.whole("patch_size") if self.network_config.get("patch_size") else 1

    @property
    def packing(self) -> int:
        """Latent pixels that are one of the network's."""
        return 1

    @property
    def feature_width(self) -> int:
        """Channels of each layer of `features`."""
        return self.network_config.whole("num_attention_heads") * self.network_config.whole("attention_head_dim")

    @property
    def network_channels(self) -> Mapping[str, int]:
        """What the network's configuration must say, if it does."""
        return dict.fromkeys(("in_channels", "out_channels"), self.latents.channels * self.packing)

    @property
    def dropped_text_encoders(self) -> Sequence[str]:
        """Text encoders that are not loaded, of a pipeline that can do without."""
        return ()

    @property
    def text_limit(self) -> int:
        """Tokens at most; more than these are refused by most pipelines' calls, after all the training."""
        return 512

    def grid(self, num_inference_steps: int) -> Tensor:
        """The student's times where the user names none, [K + 1] float64 from noise to exactly 0."""
        raise NotImplementedError

    def embed(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of B prompts by the pipeline's own text encoders, each [B, ...]."""
        raise NotImplementedError

    def blank_embeddings(self, count: int) -> dict[str, Tensor]:
        """Tensors as `embed` returns them, each [count, ...], made with `blank`: for --dry_run, without encoders."""
        raise NotImplementedError

    def blank(self, *shape: int) -> Tensor:
        """A tensor of this shape with no values in particular, on the device and in the dtype of the network."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Raw output [B, *latent] for states x_t [B, *latent] in the network's dtype, times t [B] and embeddings."""
        raise NotImplementedError

    def image_places(self, answer: Any, x_t: Tensor) -> Tensor:
        """Those of the image, [B, N, C], in what a block answers for states [B, *latent].

        Here of a transformer, that answers tokens of the image alone, behind a text's, or as the last of a tuple.
        """
        tokens: Tensor = answer[-1] if isinstance(answer, tuple) else answer
        return tokens[:, -(x_t[0, 0].numel() // self.patch_size**2) :]

    def scheduler(self, sampler: Sampler) -> Any:
        """The stock scheduler that takes the sampler's steps.

        Raises:
            ConfigError: If there is none.
        """
        raise NotImplementedError

    def check_sampler(self, sampler: Sampler) -> None:
        self.scheduler(sampler)

    def lora_key(self, name: str) -> str:
        """Key in the exported file of `<module>.lora_A.weight` or `<module>.lora_B.weight`."""
        return f"{self.network_name}.{name}"

    def draw_noise(self, step: int, count: int) -> Tensor:
        """Latents [count, *latent] float32, as the stock pipeline draws them from torch's generator.

        Here of a pipeline that draws its initial state, of step 0, in its own precision; a flow-matching scheduler
        computes in float32. A random number depends on its precision.
        """
        return self._randn((count, *self.latent_shape), self.dtype if step == 0 else torch.float32)

    def _randn(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(tuple(shape), device=self.device, dtype=dtype).float()

    def call_arguments(self, sampler: Sampler) -> dict[str, Any]:
        """Arguments of the pipeline's call that no scheduler can hold; a family adds its grid."""
        text = {"max_sequence_length": self.text_length} if self.text_length else {}
        width, height = self.sizes[0]
        return {"num_inference_steps": len(sampler.t) - 1} | text | {"height": height, "width": width}

    def own_call_arguments(self) -> dict[str, Any]:
        """Defaults of the pipeline's call."""
        parameters = inspect.signature(self.pipeline_class.__call__).parameters
        return {name: parameter.default for name, parameter in parameters.items()}

    def own_guidance(self) -> float | None:
        """The guidance w that the pipeline's call has by default; None where it has none."""
        own = self.own_call_arguments().get("guidance_scale")
        return float(own) if isinstance(own, int | float) else None

    # --- Loading -----------------------------------------------------------------------------------------------------

    def prepare(self, accelerator: Any, *, roles: Sequence[Role], sharding: DeviceMesh | None = None) -> None:
        """Load network and VAE onto the device and create the roles; no text encoder yet.

        Args:
            sharding: Processes that share the network.

        Raises:
            ConfigError: If weights are missing or unexpected, or an option finds nothing to act on.
        """
        options = self.options
        self.connect(accelerator)
        if sharding is None:
            network = self._load(self.network_class, self.source, self.network_name, self.dtype)
        else:
            network = open_network(self.network_class, self.source, self.network_name, self.dtype)
        self.vae = self._load_vae(self.latents, self.source, "vae")
        self.reward_vae = self._load_reward_vae(self.reward_decoder) if self.reward_decoder else self.vae
        self.pipeline = self._pipeline(network, vae=self.vae)
        self._gathered: dict[str, Tensor] = {}
        self._empty: Mapping[str, Tensor] | None = None  # embeddings of the empty prompt, for guidance
        if sharding is None:
            merge(network.state_dict(), self._teacher_lora, f"--teacher_lora {options.teacher_lora}")
            if options.quantize:
                quantize(network, options.quantize, self.device)
            network.to(self.device)
        if options.attention_backend:
            set_attention_backend(network, options.attention_backend, self.blank)
        check_targets(network, options.lora_target_modules or ())
        self.roles = LoRARoles(
            network,
            roles=roles,
            rank={"student": options.lora_rank, "reference": options.lora_rank, "fake_score": options.fake_lora_rank},
            alpha={
                "student": options.lora_alpha,
                "reference": options.lora_alpha,
                "fake_score": options.fake_lora_alpha,
            },
            target_modules=options.lora_target_modules or self.lora_targets,
            full=options.full_roles,
            seed=options.seed,
        )
        if options.gradient_checkpointing:
            self.latents.checkpoint(self.vae)  # for a reward's gradient
            if self.reward_vae is not self.vae:
                self._reward_latents.checkpoint(self.reward_vae)
        for each in self.roles.networks:
            if options.gradient_checkpointing:
                each.enable_gradient_checkpointing(self.roles.checkpoint_function())
            if options.torch_compile:
                compile_blocks(each)
        if sharding is None:
            network.to(self.device)  # PEFT leaves the adapters of a network on the meta device on the CPU
        else:
            self._share(sharding)
        if options.student_weights:
            given = read_weights(options.student_weights)
            load_strict(self.roles.copies["student"].state_dict(), given, options.student_weights)

    def _share(self, mesh: DeviceMesh) -> None:
        """Spread the network, and its full copies like it, over processes, and read the weights."""
        network, copies = self.roles.network, self.roles.copies
        adapters = [p for role in self.roles.roles if role not in copies for p in self.roles.parameters(role).values()]
        shard(network, mesh, adapters)
        fill(network, weight_files(self.source, self.network_name), self.source.place(self.network_name))
        merge(stored(network), self._teacher_lora, f"--teacher_lora {self.options.teacher_lora}")
        for each in copies.values():
            shard(each, mesh, dtype=self.dtype)
            copy(network, each)

    def start_student(self) -> None:
        """Give the student the weights of --model where the teacher is another, or the LoRA that is nearest to them."""
        if self.start is None:
            return
        files, place = weight_files(self.start, self.network_name), self.start.place(self.network_name)
        if self.options.full_finetune:
            fill(self.roles.copies["student"], files, place)
            return
        if self.accelerator.is_main_process:
            own = weight_files(self.source, self.network_name)
            found, lost = low_rank_difference(own, files, self.roles.folded("student"), self.device, place)
            self.roles.unfold("student", found, place)
            said = "the student starts from %s: a LoRA of rank %d, which lacks %.0f%% of the difference to %s"
            logger.info(said, self.start.folder, self.options.lora_rank, 100 * lost, self.folder)
        for parameter in self.roles.parameters("student").values():
            broadcast(parameter.data)

    def check_shardable(self) -> None:
        if self.options.quantize:
            raise ConfigError("--shard: a network with --quantize cannot be shared; leave one of them out")

    def connect(self, accelerator: Any) -> None:
        """Say where and in which precision all that is loaded will lie; loads nothing.

        Raises:
            ConfigError: If --reward_vae is of other latents, a file or variant that is named is not there, or
                --teacher_lora is no LoRA of this network.
        """
        check_there("--student_weights", self.options.student_weights)
        self.read_teacher_lora()
        if self.reward_decoder:
            self._reward_latents = self._reward_latents_of(self.reward_decoder)
        self.accelerator, self.device = accelerator, accelerator.device
        if self.device.type != "meta":
            self._check_variant()
            check_quantize(self.options.quantize)
        self.dtype = dtype_of(accelerator.mixed_precision)
        self.text.prepare(accelerator, self.dtype)

    def read_teacher_lora(self) -> None:
        """Read --teacher_lora, if it is given; its weights are merged later.

        Raises:
            ConfigError: If it is not there, or no LoRA of this network.
        """
        check_there("--teacher_lora", self.options.teacher_lora)
        if self.options.teacher_lora and not self._teacher_lora:
            shapes = load_network(self.network_class, self.source, self.network_name, torch.float32, meta=True)
            self._teacher_lora = read_lora(self.options.teacher_lora, shapes, self.pipeline_class)

    @property
    def reward_decoder(self) -> str | None:
        """Where the rewards' own decoder is; None where they share the model's."""
        return None if self.options.reward_vae == "none" else self.options.reward_vae

    @property
    def _saved_parts(self) -> list[str]:
        """The components that the pipeline was saved with."""
        return list(parts_of(self.index))

    def _check_variant(self) -> None:
        """Refuse a variant that no component has, as the stock pipeline would."""
        known = {variant for name in self._saved_parts for variant in self.source.variants(name)}
        if self.options.variant and known and self.options.variant not in known:
            there = ", ".join(sorted(f"of variant {variant}" if variant else "without a variant" for variant in known))
            raise ConfigError(f"--variant {self.options.variant}: {self.folder} only has weights {there}")

    def _reward_latents_of(self, folder: str) -> Latents:
        """Those that a decoder takes, which must be of this model's shape."""
        tiny = TinyLatents(Source(folder), "", TinyLatents.vae_class.__name__)
        if (tiny.channels, tiny.scale) != (self.latents.channels, self.latents.scale):
            raise ConfigError(
                f"--reward_vae {folder} takes {tiny.channels} channels and enlarges by {tiny.scale}; the latents of "
                f"{self.folder} have {self.latents.channels} channels and need {self.latents.scale}"
            )
        return tiny

    def _load_reward_vae(self, folder: str) -> Any:
        """The rewards' own decoder, which must make the same images of this model's latents."""
        decoder = self._load_vae(self._reward_latents, Source(folder))
        if self.device.type != "meta":
            with on_device(self.device, self.vae, decoder, offload=self.options.cpu_offload):
                refuse_other_latents((self.latents, self.vae), (self._reward_latents, decoder), folder)
        return decoder

    def _load(self, cls: Any, source: Source, subfolder: str, dtype: torch.dtype) -> Any:
        return load_network(cls, source, subfolder, dtype, meta=self.device.type == "meta")

    def _load_vae(self, latents: Latents, source: Source, subfolder: str = "") -> Any:
        cls = latents.vae_class
        # Decoders that overflow in float16 say so in their file. One that does not say is taken at the run's precision,
        # whatever the class has as its default: the older ones, which everybody runs in float16, do not have the key.
        upcast = self.dtype == torch.float16 and read_config(cls, source, subfolder).get("force_upcast", False)
        vae = self._load(cls, source, subfolder, torch.float32 if upcast else self.dtype)
        latents.adjust(vae)
        if self.options.vae_tiling:
            vae.enable_tiling()
        return vae.to("cpu" if self.options.cpu_offload else self.device).requires_grad_(False)

    def _pipeline(self, network: Any, **parts: Any) -> Any:
        """The stock pipeline around our network and these parts; it does without all others but the scheduler."""
        others = [name for name in self._saved_parts if name != "scheduler"]
        given = dict.fromkeys(others) | {self.network_name: network} | parts
        return load_pipeline(self.pipeline_class, self.source, self.dtype, **given)

    def _text_pipeline(self, **text: Any) -> Any:
        """For `embed`: with a network whose configuration may be asked, and no weights."""
        network = load_network(self.network_class, self.source, self.network_name, self.dtype, meta=True)
        return self._pipeline(network, **text)

    # --- Text --------------------------------------------------------------------------------------------------------

    def cache_prompts(self, accelerator: Any, prompts: Sequence[str]) -> None:
        """Store the embeddings of all prompts, where they are missing, and let go of the encoders.

        Raises:
            ConfigError: If the disk has no room for them.
        """
        self.connect(accelerator)
        self.text.fill(prompts)

    def encode(self, prompts: Sequence[str], **columns: Sequence[Any]) -> Condition:
        return Condition(tuple(prompts), self.text(prompts), columns)

    # --- Images ------------------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        own = exact or self.reward_vae is self.vae
        vae, space = (self.vae, self.latents) if own else (self.reward_vae, self._reward_latents)
        size = self.options.decode_chunk_size or len(latents)

        def decode(part: Tensor) -> Tensor:
            return to_unit_range(space.decode(vae, part))

        if self.options.decode_chunk_size and latents.requires_grad and torch.is_grad_enabled():
            decode = partial(recomputed, decode)
        with on_device(self.device, vae, offload=self.options.cpu_offload):
            return torch.cat([decode(part) for part in latents.split(size)])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        with on_device(self.device, self.vae, offload=self.options.cpu_offload):
            return self.latents.encode(self.vae, (images * 2 - 1).to(self.device, self.vae.dtype))

    # --- Roles -------------------------------------------------------------------------------------------------------

    def _predict(
        self, role: str | None, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], share: float = 1.0
    ) -> Prediction:
        if role and role not in self.roles.roles:
            raise TrainingError(f"this run has no {role}: who asks for it must declare it in needs.roles")
        network = partial(self.roles, role, share=share)
        with self.accelerator.autocast():
            value = self.call(network, x_t.to(self.dtype), t, cond)
        return Prediction(value.float(), self.kind, x_t, t, self.path)

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
        return self._guided("fake_score" if fake_mix else None, x_t, t, cond, guidance, fake_mix)

    def add_role(self, name: str, *, rank: int, alpha: float) -> Mapping[str, nn.Parameter]:
        self.roles.add(name, rank, alpha)
        if self.device.type == "meta":
            self.roles.network.to(self.device)  # as in `prepare`
        return self.roles.parameters(name)

    def ask_role(self, x_t: Tensor, t: Tensor, cond: Condition, *, role: str, guidance: float = 1.0) -> Prediction:
        return self._guided(role, x_t, t, cond, guidance)

    def _guided(
        self, role: str | None, x_t: Tensor, t: Tensor, cond: Condition, guidance: float, share: float = 1.0
    ) -> Prediction:
        def answer(scale: float) -> Prediction:
            return self._predict(role, x_t, t, self.asked(cond, scale), share=share)

        other = self.other_guidance()
        if guidance in (1.0, other):
            return answer(guidance)
        w = torch.full((len(cond),), guidance, device=self.device)
        return self.guided(answer(1.0), answer(other), w)

    def together(self, cond: Mapping[str, Tensor]) -> list[list[int]]:
        """The rows of embeddings [B, ...] that go through the network at once: a chosen kernel may take no mask."""
        if self.text_unit and self.options.attention_backend:
            return alike(cond[LENGTH].tolist(), self.text_unit)
        return [list(range(len(next(iter(cond.values())))))]

    def _feature_blocks(self, network: Any) -> list[nn.Module]:
        found = [getattr(network, name) for name in self.feature_blocks]
        return [block for each in found for block in (each if isinstance(each, nn.ModuleList) else [each])]

    @property
    def feature_widths(self) -> Sequence[int]:
        """Channels of the layers that `features` can show; known after `prepare`."""
        return (self.feature_width,) * len(self._feature_blocks(self.roles.network))

    def features(
        self, role: FeatureRole, x_t: Tensor, t: Tensor, cond: Condition, layers: Sequence[int]
    ) -> list[Tensor]:
        own: Role | None = None if role == "teacher" else role
        network, asked = self.roles.network_of(own), self.asked(cond, 1.0)
        blocks = self._feature_blocks(network)
        with answers_of([blocks[layer] for layer in layers]) as answers:
            self._predict(own, x_t, t, asked)
        places = [torch.cat([self.image_places(answer, x_t) for answer in each]) for each in answers]
        gather_in_backward(network, places)
        return [in_order(each.float(), self.together(asked)) for each in places]

    def other_guidance(self) -> float:
        return 0.0

    def guided(self, c: Prediction, other: Prediction, w: Tensor) -> Prediction:
        return guided(c, other, w, self.other_guidance())

    def asked(self, cond: Condition, guidance: float) -> Mapping[str, Tensor]:
        """What the network is given at guidance 1, or at `other_guidance()`, by name, each [B, ...]."""
        return cond.tensors if guidance == 1 else self.unconditional(cond)

    def unconditional(self, cond: Condition) -> Mapping[str, Tensor]:
        """What guidance leads away from, by name, each [B, ...]: embeddings of the negative prompt, or zeros."""
        if self._empty is None:
            self._empty = self.text([self.text.unconditional])
            if self.zero_empty_prompt:
                self._empty = {name: torch.zeros_like(tensor) for name, tensor in self._empty.items()}
        return {name: tensor.expand(len(cond), *tensor.shape[1:]) for name, tensor in self._empty.items()}

    @property
    def zero_empty_prompt(self) -> bool:
        """Whether the unconditional branch is given zeros, as the pipeline says unless the user does."""
        given = self.options.zero_empty_prompt
        own = self.index.get("force_zeros_for_empty_prompt", False) and self.options.negative_prompt is None
        return bool(own) if given is None else given

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        return self.roles.parameters(role)

    def snapshot(self) -> None:
        self.roles.snapshot()

    # --- Export ------------------------------------------------------------------------------------------------------

    def export(self, directory: Path, sampler: Sampler) -> Mapping[str, Any]:
        """A LoRA file for `load_lora_weights` (or a full network's folder), and the scheduler of its time grid.

        A merged teacher's LoRA is part of the student's file, which thus acts on the model as published.
        """
        if self.options.full_finetune:
            self._whole_network().save_pretrained(directory / self.network_name)
        else:
            layers = joined(self.roles.folded("student"), self._teacher_lora)
            directory.mkdir(parents=True, exist_ok=True)
            keyed = {self.lora_key(name): tensor for name, tensor in layers.items()}
            save_file(keyed, directory / LORA_FILE, {"format": "pt"})
        self.scheduler(sampler).save_pretrained(directory / "scheduler")
        return self.call_arguments(sampler)

    def gather(self) -> None:
        """All the student's weights onto the CPU of the main process, for its `export`."""
        shared = self.roles.copies["student"].state_dict() if self.options.full_finetune else {}
        for name, tensor in shared.items():
            value = whole(tensor)
            if self.accelerator.is_main_process:
                self._gathered[name] = value.cpu()

    def _whole_network(self) -> Any:
        """The student's network as diffusers knows it, on the CPU or the device: to be saved."""
        network = load_network(self.network_class, self.source, self.network_name, torch.float32, meta=True)
        network.load_state_dict(self._gathered or self.roles.merged("student"), assign=True)
        return network

    def snippet(self, base: str, prompt: str, sampler: Sampler) -> str:
        variants = filter(None, map(self.source.taken, self._saved_parts))
        given = {"revision": self.source.revision, "variant": self.options.variant or next(variants, None)}
        said = [f"{name}={_literal(value)}" for name, value in given.items() if value]
        left_out = [name for name in self._saved_parts if name.startswith(TEXT) and name not in self.text.components]
        said += [f"{name}=None" for name in left_out if name.isidentifier()]  # a folder's own index is no code
        said.append(f"torch_dtype={self.dtype}")  # left out, text encoders would have that of their files
        pipeline, network, scheduler = (
            kind.__name__ for kind in (self.pipeline_class, self.network_class, type(self.scheduler(sampler)))
        )
        imports, load = [pipeline, scheduler], "pipe.load_lora_weights(student)"
        if self.options.full_finetune:
            imports.append(network)
            name = self.network_name
            load = f'pipe.{name} = {network}.from_pretrained(student, subfolder="{name}")'
        return SNIPPET.format(
            imports=", ".join(sorted(imports)),
            pipeline=pipeline,
            scheduler=scheduler,
            given="".join(f", {argument}" for argument in said),
            base=_literal(base),
            prompt=prompt,
            load=load,
        )

    def load_export(self, directory: Path) -> None:
        full = self.options.full_finetune
        kind, file = (f"a full {self.network_name}", self.network_name) if full else ("a LoRA", LORA_FILE)
        if not (directory / file).exists():
            raise ConfigError(f"{directory} holds no {file}: this run needs {kind}; check --full_finetune")
        if full:
            student, place = self.roles.copies["student"], Source(str(directory))
            fill(student, weight_files(place, self.network_name), str(directory / file))
            refuse_infinite({name: own_rows(tensor) for name, tensor in stored(student).items()}, str(directory / file))
        else:
            names = {self.lora_key(name): name for name in (*self.parameters("student"), *self._teacher_lora)}
            given = {names.get(key, key): value for key, value in read_tensors(directory / file).items()}
            student = parted(given, self._teacher_lora, self.parameters("student"), str(directory / file))
            self.roles.unfold("student", student, str(directory / file))


def _literal(text: str) -> str:
    """Text as Python writes it, in double quotes where it holds none."""
    found = repr(text)
    return found if set("'\"") & set(text) else f'"{found[1:-1]}"'
