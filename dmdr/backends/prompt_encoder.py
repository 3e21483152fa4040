"""Text encoders of a pipeline: prompts to embeddings, from the disk cache or by the encoders."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from dmdr.backends.component import parts_of
from dmdr.backends.loading import (
    Source,
    identity,
    load_text_encoder,
    load_tokenizer,
    on_device,
    read_text_config,
)
from dmdr.backends.prompt_cache import PromptCache, Rows
from dmdr.backends.texts import LENGTH
from dmdr.cache import cache_folder, fingerprint
from dmdr.errors import ConfigError

TEXT = ("text_encoder", "tokenizer")  # how text components are called
FORMAT = 1  # of what is stored; raise it whenever it changes
BATCH = 16  # prompts that go through the encoders at a time: language models keep all their states, and logits

Components = Mapping[str, tuple[str, str]]  # name -> library and class


def text_components(index: Mapping[str, Any], drop: Sequence[str]) -> Components:
    """Text encoders and tokenizers of a pipeline.

    Args:
        index: The pipeline's `model_index.json`.
        drop: Encoders that are left out, with their tokenizers.

    Raises:
        ConfigError: If one of them is not there.
    """
    there = {
        name: (library, str(cls))
        for name, (library, cls) in parts_of(index).items()
        if name.startswith(TEXT) and library is not None
    }
    for name in drop:
        if name not in there:
            has = ", ".join(part for part in there if part.startswith("text_encoder")) or "none"
            raise ConfigError(f"--drop_text_encoders {name}: the pipeline has {has}")
        del there[name]
        there.pop(name.replace("text_encoder", "tokenizer"), None)
    return there


class PromptEncoder:
    """Embeddings of prompts, from disk where they are there, or else by a pipeline's own text encoders.

    Encoders are loaded with the first prompt that is not on disk. They stay where prompts are not known beforehand;
    once `fill` was told of all, they are let go again.

    Args:
        source: Of the pipeline.
        components: Its text encoders and tokenizers.
        prompt_cache: Folder of embeddings, 'off' for none; None for the usual one.
        cpu_offload: Keep the encoders on the CPU while they are idle.
        open_pipeline: The stock pipeline around text encoders and tokenizers, by name.
        embed: That pipeline and B prompts -> embeddings by name, each [B, ...].
        blank: Tensors of such shapes for a number of prompts, in place of `embed` on the meta device.
        settings: What else embeddings depend on.
        padded: As of `PromptCache`.
        unconditional: The prompt that guidance leads away from.
    """

    def __init__(
        self,
        source: Source,
        components: Components,
        prompt_cache: str | None,
        cpu_offload: bool,
        *,
        open_pipeline: Callable[..., Any],
        embed: Callable[[Any, Sequence[str]], Rows],
        blank: Callable[[int], Rows],
        settings: Sequence[object],
        padded: Mapping[str, int],
        unconditional: str,
    ) -> None:
        self.source, self.components = source, components
        self.prompt_cache, self.cpu_offload = prompt_cache, cpu_offload
        self._open_pipeline, self._embed, self._blank, self._settings = open_pipeline, embed, blank, settings
        self._padded, self.unconditional = padded, unconditional
        self._pipeline: Any = None
        self._transient = False

    def prepare(self, accelerator: Any, dtype: torch.dtype) -> None:
        """Say where the encoders run, and in which precision; loads nothing."""
        self.accelerator, self.device, self.dtype = accelerator, accelerator.device, dtype
        cached = self.components and self.prompt_cache != "off"
        self.cache = PromptCache(self._folder(), self.encode, self._padded) if cached else None

    def _class(self, name: str) -> Any:
        """The class of a text encoder or tokenizer.

        Raises:
            ConfigError: If the pipeline's index names one that transformers does not have.
        """
        called = self.components[name][1]
        if not isinstance(getattr(transformers, called, None), type):
            where = f"{self.source.folder}/model_index.json"
            raise ConfigError(f"{where}: {name} is a {called}, which transformers does not have")
        return getattr(transformers, called)

    def clip_length(self) -> int:
        """Tokens of the CLIP text encoder; 77 without one, as pipelines have it."""
        if "text_encoder" not in self.components:
            return 77
        cls = self._class("text_encoder")
        return int(read_text_config(cls, self.source, "text_encoder").max_position_embeddings)

    def load_encoders(self) -> dict[str, Any]:
        """The text encoders by name; loaded anew by each call."""
        return {
            name: load_text_encoder(self._class(name), self.source, name, self.dtype, meta=self.device.type == "meta")
            for name, (library, _) in self.components.items()
            if library == "transformers" and name.startswith("text_encoder")
        }

    def pipeline(self) -> Any:
        """The stock pipeline with its text encoders, loaded on first use."""
        if self._pipeline is None:
            place = "cpu" if self.cpu_offload else self.device
            parts = {name: encoder.to(place) for name, encoder in self.load_encoders().items()}
            for name in self.components:
                if name not in parts:
                    parts[name] = load_tokenizer(self._class(name), self.source, name)
            self._pipeline = self._open_pipeline(**parts)
        return self._pipeline

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Rows:
        """Embeddings of B prompts by the encoders, each [B, ...]."""
        if self.device.type == "meta":
            return self._blank(len(prompts))
        pipeline = self.pipeline()
        encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
        with on_device(self.device, *encoders, offload=self.cpu_offload):
            parts = [self._embed(pipeline, prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __call__(self, prompts: Sequence[str]) -> Rows:
        """[B, ...] each on the device, every distinct prompt encoded once.

        The lengths of texts stay on the CPU: each pass of a network asks for them.
        """
        distinct = list(dict.fromkeys(prompts))
        found = self.cache(distinct) if self.cache else self.encode(distinct)
        if self._transient:
            self._let_go()
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        chosen = {name: tensor[rows.to(tensor.device)] for name, tensor in found.items()}
        return {
            name: tensor if name == LENGTH else tensor.to(self.device, non_blocking=True)
            for name, tensor in chosen.items()
        }

    def fill(self, prompts: Sequence[str]) -> None:
        """Store the embeddings of all prompts, where they are missing, by shares, and let go of the encoders.

        Raises:
            ConfigError: If the disk has no room for them.
        """
        if self.cache is None:
            return
        # Shares of all prompts: of what is missing they would differ where one process looks later than another.
        distinct = list(dict.fromkeys([*prompts, self.unconditional]))
        share = distinct[self.accelerator.process_index :: self.accelerator.num_processes]
        self.cache.fill(share, show=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        self.cache.fill(distinct)  # what another machine has stored on a disk of its own
        self._transient = True
        self._let_go()

    def _let_go(self) -> None:
        if self._pipeline is not None:
            self._pipeline = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _folder(self) -> Path:
        """Of all that embeddings depend on."""
        place = Path(self.prompt_cache or cache_folder() / "prompts").expanduser()
        if os.path.exists(place) and not place.is_dir():  # Path.exists raises where it may not look
            raise ConfigError(f"--prompt_cache {place} is no folder; give one, or 'off'")
        return place / fingerprint(
            FORMAT,
            diffusers.__version__,
            transformers.__version__,
            identity(self.source, self.components),
            sorted((name, *kind, self.source.taken(name)) for name, kind in self.components.items()),
            self.dtype,
            *self._settings,
        )
