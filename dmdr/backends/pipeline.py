"""What all model families on diffusers pipelines share: loading, roles, text, guidance, decoder and export.

A family subclasses `PipelineBackend` and says what is its own: the pipeline's class, how prompts are embedded, how its
network is called, and the scheduler that samples a student.
"""

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmdr.backends.images import to_unit_range
from dmdr.backends.loading import (
    build_network,
    build_text_encoder,
    identity,
    load_network,
    load_pipeline,
    load_text_encoder,
    load_tokenizer,
    merge_lora,
    one_line,
    quiet,
    read_config,
    read_text_config,
    read_weights,
)
from dmdr.backends.lora import LoRARoles, joined, parted
from dmdr.backends.prompt_cache import PromptCache, fingerprint
from dmdr.cache import cache_folder
from dmdr.errors import ConfigError
from dmdr.paths import Kind, NoisePath, Prediction
from dmdr.protocols import BackendOptions, Role, Sampler
from dmdr.states import load_strict
from dmdr.types import Condition

TEXT = ("text_encoder", "tokenizer")  # how text components are called
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for

SNIPPET = """\
import json, torch
from diffusers import {imports}

student = "path/to/this/folder"
pipe = {pipeline}.from_pretrained("{base}"{absent})
{load}
pipe.scheduler = {scheduler}.from_pretrained(student, subfolder="scheduler")
torch.manual_seed(0)
image = pipe({prompt!r}, **json.load(open(student + "/sampling.json"))["call"]).images[0]
image.save("image.png")"""

# A network with its role chosen: keyword arguments in, tuple out.
Network = Callable[..., Any]


class PipelineBackend:
    """Teacher, fake score and student on the one denoising network of a pipeline (`protocols.Backend`).

    A subclass sets the class attributes and `path`, and implements `embed`, `blank_embeddings`, `call`, `scheduler` and
    `call_arguments`. Prepared on the meta device it has shapes and no values, for --dry_run.

    Attributes:
        pipeline_class: The stock pipeline that loads the folder and samples the export.
        network_class: Class of the denoising network.
        network_name: The component that it is.
        lora_targets: Modules that get an adapter, as PEFT matches names.
        droppable: Text encoders that the pipeline can do without.
        default_size: Resolution in latent pixels where neither the user nor the network's configuration says one.
    """

    pipeline_class: ClassVar[Any]
    network_class: ClassVar[Any]
    network_name: ClassVar[str] = "transformer"
    lora_targets: ClassVar[Sequence[str]]
    droppable: ClassVar[Sequence[str]] = ()
    default_size: ClassVar[int] = 128
    kind: Kind = "velocity"
    path: NoisePath
    shift: float = 1.0

    def __init__(self, folder: str, options: BackendOptions) -> None:
        """Read the configuration files of a local folder or hub id; nothing heavy.

        Raises:
            ConfigError: If one is missing, or the options do not fit this model.
        """
        self.folder, self.options = folder, options
        self._text: Any = None  # a second pipeline, with the text encoders
        self.index = read_config(self.pipeline_class, folder)
        self.network_config = read_config(self.network_class, folder, self.network_name)
        self.vae_config = read_config(AutoencoderKL, folder, "vae")
        self.vae_scale = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        size = self.network_config.get("sample_size") or self.default_size
        resolution = options.resolution or self.vae_scale * size
        cell = self.vae_scale * self.patch_size
        if resolution % cell:
            raise ConfigError(f"--resolution {resolution} is no multiple of {cell}, as {folder} needs")
        side = resolution // self.vae_scale
        self.latent_shape: tuple[int, ...] = (self.vae_config["latent_channels"], side, side)
        self.resolution = resolution
        own = self.own_call_arguments.get("max_sequence_length")
        if own is None and options.max_sequence_length:
            raise ConfigError(f"--max_sequence_length: the text length of a {self.pipeline_class.__name__} is fixed")
        self.max_sequence_length: int | None = options.max_sequence_length or own
        if self.max_sequence_length and self.max_sequence_length > self.text_limit:
            raise ConfigError(
                f"--max_sequence_length {self.max_sequence_length}: {folder} takes {self.text_limit} at most"
            )
        if options.student_weights and not options.full_finetune:
            raise ConfigError("--student_weights are of a full network: they need --full_finetune")

    # --- What a family says of itself --------------------------------------------------------------------------------

    @property
    def patch_size(self) -> int:
        """Latent pixels along a side that the network cannot divide."""
        return int(self.network_config.get("patch_size") or 1)

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
        """Tensors as `embed` returns them for `count` prompts, made with `blank`: for --dry_run, without encoders."""
        raise NotImplementedError

    def blank(self, *shape: int) -> Tensor:
        """Of a shape, and of no values in particular."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def call(self, network: Network, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Raw output [B, *latent] for states x_t [B, *latent] in the network's dtype, times t [B] and embeddings."""
        raise NotImplementedError

    def scheduler(self, sampler: Sampler) -> Any:
        """The stock scheduler that takes the sampler's steps."""
        raise NotImplementedError

    def lora_key(self, name: str) -> str:
        """Key in the exported file of `<module>.lora_A.weight` or `<module>.lora_B.weight`."""
        return f"{self.network_name}.{name}"

    def call_arguments(self, sampler: Sampler) -> dict[str, Any]:
        """Arguments of the pipeline's call that no scheduler can hold; a family adds its grid."""
        text = {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}
        size = {"height": self.resolution, "width": self.resolution}
        return {"num_inference_steps": len(sampler.t) - 1} | text | size

    @cached_property
    def own_call_arguments(self) -> dict[str, Any]:
        """Defaults of the pipeline's call, under those that a local folder asks for in its `dmdr.json`.

        A model trained with another text length than the pipeline's default has no other place to say so.
        """
        parameters = inspect.signature(self.pipeline_class.__call__).parameters
        file = Path(self.folder) / "dmdr.json"
        own = json.loads(file.read_text()) if file.is_file() else {}
        return {name: parameter.default for name, parameter in parameters.items()} | own

    # --- Loading -----------------------------------------------------------------------------------------------------

    def prepare(self, accelerator: Any, *, roles: Sequence[Role]) -> None:
        """Load network and VAE onto the device and create the roles; text encoders are loaded when they are needed.

        Raises:
            ConfigError: If weights are missing or unexpected, or an option finds nothing to act on.
        """
        options = self.options
        self.connect(accelerator)
        network = self._load_network(self.network_class, self.folder, self.network_name, self.dtype)
        self.vae = self._load_vae(AutoencoderKL, self.folder, "vae")
        self.reward_vae = self._load_vae(AutoencoderTiny, options.reward_vae) if options.reward_vae else self.vae
        self.pipeline = self._pipeline(network, vae=self.vae)
        self._empty: Mapping[str, Tensor] | None = None  # embeddings of the empty prompt, for guidance
        self._teacher_lora: Mapping[str, Tensor] = {}
        if options.teacher_lora:
            self._teacher_lora = merge_lora(self.pipeline, self.network_name, options.teacher_lora)
        network.to(self.device)
        if options.attention_backend:
            set_attention_backend(network, options.attention_backend)
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
            full_student=options.full_finetune,
            seed=options.seed,
        )
        network.to(self.device)  # PEFT leaves the adapters of a network on the meta device on the CPU
        if options.student_weights:
            given = read_weights(options.student_weights)
            load_strict(self.roles.copies["student"].state_dict(), given, options.student_weights)
        if options.gradient_checkpointing:
            for each in self.roles.networks:
                each.enable_gradient_checkpointing(self.roles.checkpoint_function())
        if options.torch_compile:
            for each in self.roles.networks:
                compile_blocks(each)

    def connect(self, accelerator: Any) -> None:
        """Where and in which precision all that is loaded will lie."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        self.accelerator, self.device, self.dtype = accelerator, accelerator.device, dtype
        cached = self.text_components and self.options.prompt_cache != "off"
        self.cache = PromptCache(self._cache_folder(), self._embed) if cached else None

    def _load_network(self, cls: Any, folder: str, subfolder: str, dtype: torch.dtype) -> Any:
        load = build_network if self.device.type == "meta" else load_network
        return load(cls, folder, subfolder, dtype)

    def _load_vae(self, cls: Any, folder: str, subfolder: str = "") -> Any:
        # Decoders of the Stable Diffusion families overflow in float16, which their `force_upcast` says.
        upcast = self.dtype == torch.float16 and read_config(cls, folder, subfolder).get("force_upcast", False)
        vae = self._load_network(cls, folder, subfolder, torch.float32 if upcast else self.dtype)
        if self.options.vae_tiling:
            vae.enable_tiling()
        return vae.to("cpu" if self.options.cpu_offload else self.device).requires_grad_(False)

    def _pipeline(self, network: Any, **parts: Any) -> Any:
        """The stock pipeline around our network and these parts; it does without all others but the scheduler."""
        others = [name for name, value in self.index.items() if isinstance(value, list) and name != "scheduler"]
        given = dict.fromkeys(others) | {self.network_name: network} | parts
        return load_pipeline(self.pipeline_class, self.folder, self.dtype, **given)

    # --- Text --------------------------------------------------------------------------------------------------------

    @cached_property
    def text_components(self) -> dict[str, tuple[str, str]]:
        """Text encoders and tokenizers of the pipeline but those that the user drops: name -> library and class.

        Raises:
            ConfigError: If an encoder is dropped that is not there, or that the pipeline cannot do without.
        """
        there = {
            name: (str(value[0]), str(value[1]))
            for name, value in self.index.items()
            if name.startswith(TEXT) and isinstance(value, list) and value[0] is not None
        }
        for name in self.options.drop_text_encoders:
            if name not in there or name not in self.droppable:
                has = ", ".join(part for part in there if part.startswith("text_encoder")) or "none"
                why = f"a {self.pipeline_class.__name__} needs it" if name in there else f"{self.folder} has {has}"
                raise ConfigError(f"--drop_text_encoders {name}: {why}")
            del there[name]
            there.pop(name.replace("text_encoder", "tokenizer"), None)
        return there

    def clip_length(self) -> int:
        """Tokens of the CLIP text encoder; 77 without one, as pipelines have it."""
        if "text_encoder" not in self.text_components:
            return 77
        cls = getattr(transformers, self.text_components["text_encoder"][1])
        return int(read_text_config(cls, self.folder, "text_encoder").max_position_embeddings)

    def load_text_encoders(self) -> dict[str, Any]:
        """Those that are not dropped, by name; loaded anew by each call."""
        load = build_text_encoder if self.device.type == "meta" else load_text_encoder
        return {
            name: load(getattr(transformers, cls), self.folder, name, self.dtype)
            for name, (library, cls) in self.text_components.items()
            if library == "transformers" and name.startswith("text_encoder")
        }

    def _text_pipeline(self) -> Any:
        """The pipeline with its text encoders, loaded on first use."""
        if self._text is None:
            place = "cpu" if self.options.cpu_offload else self.device
            parts = {name: encoder.to(place) for name, encoder in self.load_text_encoders().items()}
            for name, (_, cls) in self.text_components.items():
                if name not in parts:
                    parts[name] = load_tokenizer(getattr(transformers, cls), self.folder, name)
            # Around a network whose configuration may be asked, and no weights.
            self._text = self._pipeline(
                build_network(self.network_class, self.folder, self.network_name, self.dtype), **parts
            )
        return self._text

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if self.device.type == "meta":
            return self.blank_embeddings(len(prompts))
        pipeline = self._text_pipeline()
        encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
        with self._on_device(*encoders):
            return self.embed(pipeline, prompts)

    def cache_prompts(self, accelerator: Any, prompts: Sequence[str]) -> None:
        """Store the embeddings of all prompts, where they are missing, by shares, and let go of the encoders.

        Raises:
            ConfigError: If the disk has no room for them.
        """
        self.connect(accelerator)
        if self.cache is None:
            return
        # Shares of all prompts: of what is missing they would differ where one process looks later than another.
        distinct = list(dict.fromkeys([*prompts, ""]))
        share = distinct[self.accelerator.process_index :: self.accelerator.num_processes]
        self.cache.fill(share, show=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        self.cache.fill(distinct)  # what another machine has stored on a disk of its own
        self._text = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _cache_folder(self) -> Path:
        """Of what the embeddings depend on: model, encoders, precision and text length."""
        place = Path(self.options.prompt_cache or cache_folder() / "prompts").expanduser()
        if os.path.exists(place) and not place.is_dir():  # Path.exists raises where it may not look
            raise ConfigError(f"--prompt_cache {place} is no folder; give one, or 'off'")
        return place / fingerprint(
            self.pipeline_class.__name__,
            identity(self.folder, self.text_components),
            sorted(self.text_components),
            self.dtype,
            self.max_sequence_length,
        )

    def _embeddings(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """[B, ...] each on the device, every distinct prompt encoded once."""
        distinct = list(dict.fromkeys(prompts))
        found = self.cache(distinct) if self.cache else self._embed(distinct)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return {name: tensor[rows.to(tensor.device)].to(self.device) for name, tensor in found.items()}

    def encode(self, prompts: Sequence[str], **columns: Sequence[Any]) -> Condition:
        return Condition(tuple(prompts), self._embeddings(prompts), columns)

    # --- Images ------------------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        vae = self.vae if exact else self.reward_vae
        size = self.options.decode_chunk_size or len(latents)
        decode = partial(self._decode, vae)
        if self.options.decode_chunk_size and latents.requires_grad and torch.is_grad_enabled():
            decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False)
        with self._on_device(vae):
            return torch.cat([decode(part) for part in latents.split(size)])

    @staticmethod
    def _decode(vae: Any, latents: Tensor) -> Tensor:
        scale, shift = _latent_statistics(vae, latents)
        return to_unit_range(vae.decode((latents * scale + shift).to(vae.dtype), return_dict=False)[0])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        with self._on_device(self.vae):
            latents = self.vae.encode((images * 2 - 1).to(self.device, self.vae.dtype)).latent_dist.mode().float()
        scale, shift = _latent_statistics(self.vae, latents)
        return (latents - shift) / scale

    @contextmanager
    def _on_device(self, *modules: nn.Module) -> Iterator[None]:
        """With --cpu_offload these rest on the CPU. What a graph was built with stays, for its backward pass."""
        for module in modules:
            module.to(self.device)
        yield
        if self.options.cpu_offload and not torch.is_grad_enabled():
            for module in modules:
                module.to("cpu")

    # --- Roles -------------------------------------------------------------------------------------------------------

    def _predict(
        self, role: Role | None, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], share: float = 1.0
    ) -> Prediction:
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
        def predict(tensors: Mapping[str, Tensor]) -> Prediction:
            return self._predict("fake_score" if fake_mix else None, x_t, t, tensors, share=fake_mix)

        if guidance == 1:
            return predict(cond.tensors)
        u = predict(self.unconditional(cond))
        if guidance == 0:
            return u
        c = predict(cond.tensors)
        return Prediction(u.value + guidance * (c.value - u.value), self.kind, x_t, t, self.path)

    def unconditional(self, cond: Condition) -> Mapping[str, Tensor]:
        """What guidance leads away from: the empty prompt's embeddings, or zeros."""
        if self._empty is None:
            self._empty = self._embeddings([""])
            if self.zero_empty_prompt:
                self._empty = {name: torch.zeros_like(tensor) for name, tensor in self._empty.items()}
        return {name: tensor.expand(len(cond), *tensor.shape[1:]) for name, tensor in self._empty.items()}

    @property
    def zero_empty_prompt(self) -> bool:
        """Whether the unconditional branch is given zeros, as the pipeline says unless the user does."""
        given = self.options.zero_empty_prompt
        own = self.index.get("force_zeros_for_empty_prompt", False)
        return bool(own) if given is None else given

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        return self.roles.parameters(role)

    def snapshot(self) -> None:
        self.roles.snapshot()

    # --- Export ------------------------------------------------------------------------------------------------------

    def export(self, directory: Path, sampler: Sampler) -> Mapping[str, Any]:
        """A LoRA file for `load_lora_weights` (or a full network's folder), and the scheduler of the student's grid.

        A merged teacher's LoRA is part of the student's file, which thus acts on the model as published.
        """
        if self.options.full_finetune:
            self.roles.copies["student"].save_pretrained(directory / self.network_name)
        else:
            layers = joined(self.roles.folded("student"), self._teacher_lora)
            directory.mkdir(parents=True, exist_ok=True)
            keyed = {self.lora_key(name): tensor for name, tensor in layers.items()}
            save_file(keyed, directory / LORA_FILE, {"format": "pt"})
        self.scheduler(sampler).save_pretrained(directory / "scheduler")
        return self.call_arguments(sampler)

    def snippet(self, base: str, prompt: str, sampler: Sampler) -> str:
        absent = [name for name in self.index if name.startswith(TEXT) and name not in self.text_components]
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
            absent="".join(f", {name}=None" for name in absent),
            base=base,
            prompt=prompt,
            load=load,
        )

    def load_export(self, directory: Path) -> None:
        full = self.options.full_finetune
        kind, file = (f"a full {self.network_name}", self.network_name) if full else ("a LoRA", LORA_FILE)
        if not (directory / file).exists():
            raise ConfigError(f"{directory} holds no {file}: {kind} is needed (--full_finetune says which)")
        if full:
            given = load_network(self.network_class, str(directory), self.network_name, torch.float32).state_dict()
            load_strict(self.roles.copies["student"].state_dict(), given, str(directory / file))
        else:
            names = {self.lora_key(name): name for name in (*self.parameters("student"), *self._teacher_lora)}
            given = {names.get(key, key): value for key, value in load_file(directory / file).items()}
            student = parted(given, self._teacher_lora, self.parameters("student"))
            self.roles.unfold("student", student, str(directory / file))


def set_attention_backend(network: Any, name: str) -> None:
    """Let diffusers compute attention with another kernel.

    Raises:
        ConfigError: If diffusers does not know it, or this machine or network cannot run it.
    """
    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in network.modules()):
        raise ConfigError(f"--attention_backend {name}: diffusers would ignore it for a {type(network).__name__}")
    try:
        with quiet():
            network.set_attention_backend(name)
    except Exception as error:
        raise ConfigError(f"--attention_backend {name}: {one_line(error)}") from error


def compile_blocks(network: Any) -> None:
    """Compile the blocks that a network repeats, one graph for all of a kind and a role.

    Raises:
        ConfigError: If the network does not say which they are.
    """
    names = network._repeated_blocks or network._no_split_modules or ()
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(f"--torch_compile: a {type(network).__name__} does not name its repeated blocks")
    # Every role, with and without gradient, is a graph of its own; beyond this limit torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks:
        block.compile()


def _latent_statistics(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """scale and shift with vae latents = latents * scale + shift: by number, or per channel where the VAE says so."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return 1 / config.scaling_factor, config.get("shift_factor") or 0.0
    scale, shift = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (std, mean))
    return scale / config.scaling_factor, shift
