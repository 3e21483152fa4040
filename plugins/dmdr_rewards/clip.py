"""Image-text agreement: CLIP."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr_rewards.openclip import CosineReward, Towers
from dmdr_rewards.preprocess import fit, normalise


@dataclass
class CLIP(CosineReward):
    """Cosine of image and prompt in a CLIP model; DFN-5B ViT-H/14 unless another is named.

    Attributes:
        checkpoint: A folder with `open_clip_config.json` and the weights, the hub id of one, or a bare weights file,
            which is taken for ViT-H-14 with QuickGELU, as DFN-5B is; None for the published DFN-5B.
        resize: "float" resizes once in floating point; "exact" reproduces the 8-bit Pillow resize of the published
            evaluation, with the same gradient.

    Source: Radford et al. 2021, arXiv:2103.00020; Fang et al. 2023, arXiv:2309.17425, and the model card of
        apple/DFN5B-CLIP-ViT-H-14, whose configuration says QuickGELU and images squashed to a square.
    """

    checkpoint: str | None = None
    resize: Literal["float", "exact"] = "float"

    def __post_init__(self) -> None:
        if self.resize not in ("float", "exact"):
            raise ConfigError(f"resize is 'float' or 'exact', not {self.resize!r}")

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frozen weights; a ConfigError (ValueError) says what is wrong with the checkpoint."""
        checkpoint = self.checkpoint or "apple/DFN5B-CLIP-ViT-H-14"
        self._towers = Towers(checkpoint, "ViT-H-14-quickgelu", device, dtype)

    def pixels(self, images: Tensor) -> Tensor:
        """Resized and normalised as `preprocess_cfg` says."""
        towers = self.towers
        return normalise(fit(images, towers.size, towers.geometry, self.resize), towers.mean, towers.std)
