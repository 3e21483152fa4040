"""Rewards that compare an image with its prompt in a CLIP model's space."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dmdr_rewards.checkpoint import Source
from dmdr_rewards.network import NetworkReward
from dmdr_rewards.preprocess import Preprocess

CACHED_PROMPTS = 4096


class Towers(Protocol):
    """A frozen CLIP model in eval mode.

    Attributes:
        preprocess: What its image tower is fed, as its files say.
    """

    preprocess: Preprocess

    def image(self, pixels: Tensor) -> Tensor:
        """[B, 3, size, size] -> [B, D] of length one; differentiable."""

    def text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, D] float32 of length one."""


def open_towers(
    checkpoint: str | None,
    published: str,
    device: torch.device,
    dtype: torch.dtype,
    architecture: str,
    preprocess: Preprocess,
) -> Towers:
    """The model of a checkpoint, with open_clip or transformers as its files ask.

    Args:
        checkpoint, published: See `checkpoint.Source`. A folder's own configuration says what it holds.
        device: Where it runs.
        dtype: Of its matrices.
        architecture: open_clip's name of what a single weights file holds, and the published checkpoint.
        preprocess: What that is fed.

    Raises:
        ConfigError: If the checkpoint is missing, damaged, or of another architecture.
    """
    source = Source(checkpoint, published, device)
    if source.file is None and source.find("open_clip_config.json") is None and source.find("config.json"):
        from dmdr_rewards.transformers_clip import TransformersCLIP

        return TransformersCLIP(source, device, dtype)
    from dmdr_rewards.openclip import OpenCLIP

    return OpenCLIP(source, device, dtype, architecture, preprocess)


class PromptCache:
    """Rows of encoded prompts, computed once each and kept for the last 4096."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor]) -> None:
        self._encode = encode
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, D]; a new tensor: rows made in inference mode could not be saved for a backward pass."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if new:
            # One by one, so that a resumed run, whose cache is empty, finds the same bits.
            self._rows.update((prompt, self._encode([prompt])[0].clone()) for prompt in new)
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        with torch.inference_mode(False):
            found = torch.stack([self._rows[prompt] for prompt in prompts])
        while len(self._rows) > CACHED_PROMPTS:
            self._rows.popitem(last=False)
        return found


@dataclass
class CosineReward(NetworkReward):
    """score = cos(image features, text features), in [-1, 1]; a `FeatureReward`.

    A subclass loads its towers in `prepare`, with `use`.

    Attributes:
        prompt_prefix: Put before every prompt, with a space.
    """

    prompt_prefix: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._towers: Towers | None = None
        self._texts: PromptCache | None = None

    def use(self, towers: Towers) -> None:
        """Score with these towers from now on."""
        self._towers = towers
        self._texts = PromptCache(towers.text)

    @property
    def towers(self) -> Towers:
        """The loaded towers.

        Raises:
            RuntimeError: Before `prepare`.
        """
        if self._towers is None:
            raise RuntimeError(f"{type(self).__name__} has no weights yet; call prepare(device, dtype) first")
        return self._towers

    def image_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D] float32 of length one; differentiable."""
        return self.look(self.towers.image, self.towers.preprocess(images, self.method))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, D] float32 of length one; constants, on the device of the weights."""
        if self._texts is None:
            raise RuntimeError(f"{type(self).__name__} has no weights yet; call prepare(device, dtype) first")
        return self._texts([f"{self.prompt_prefix} {prompt}" if self.prompt_prefix else prompt for prompt in prompts])

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1] and B prompts -> [B] float32."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)
