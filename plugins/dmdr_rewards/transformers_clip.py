"""CLIP models in transformers' layout."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr.errors import ConfigError
from dmdr_rewards.checkpoint import Source, from_pretrained, image_processor, tokenizer_of
from dmdr_rewards.network import at_least_float32, frozen, no_autocast
from dmdr_rewards.preprocess import Preprocess


class TransformersCLIP:
    """`Towers` of a `CLIPModel`."""

    def __init__(
        self,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        published: Mapping[str, Any] = MappingProxyType({}),
        *,
        images_only: bool = False,
    ) -> None:
        """Load it.

        Args:
            source: A folder or hub id with the model, and its tokenizer unless `images_only`.
            device: Where it runs.
            dtype: Of its weights.
            published: The configuration of the published one.
            images_only: Keep no text tower.

        Raises:
            ConfigError: If the checkpoint is missing, damaged or of another architecture.
        """
        from transformers import CLIPModel

        model = from_pretrained(CLIPModel, source, published)
        self.scale = 1.0 if source.meta else model.logit_scale.exp().item()
        self._length = model.config.text_config.max_position_embeddings
        self._tokenizer = None if images_only else tokenizer_of(source, model.config.text_config.vocab_size)
        if images_only:
            del model.text_model, model.text_projection
        self._model: Any = frozen(model, device, dtype)
        self._device, self._dtype = device, dtype
        size = model.config.vision_config.image_size
        self.preprocess = Preprocess.of_processor(image_processor(source), Preprocess(size=size), source.name)
        if self.preprocess.size != size:
            raise ConfigError(
                f"{source.name}: its processor crops to {self.preprocess.size} pixels, its network takes {size}"
            )
        self.width: int = model.config.projection_dim

    def image(self, pixels: Tensor) -> Tensor:
        """[B, 3, size, size] -> [B, D] of length one, at least float32."""
        features = self._model.get_image_features(pixel_values=pixels.to(self._dtype)).pooler_output
        return F.normalize(at_least_float32(features), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, D] of length one, at least float32."""
        assert self._tokenizer is not None
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        if self._device.type == "meta":  # transformers would ask it whether it leaves out any token
            del tokens["attention_mask"]
        with no_autocast(self._device):
            features = self._model.get_text_features(**tokens.to(self._device)).pooler_output
            return F.normalize(at_least_float32(features), dim=-1)
