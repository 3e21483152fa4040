"""Human preference: HPSv2.1."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr_rewards.openclip import CosineReward, Towers
from dmdr_rewards.preprocess import fit, normalise


@dataclass
class HPS(CosineReward):
    """Human Preference Score v2.1: cosine of image and prompt in a CLIP ViT-H/14 tuned on human choices.

    Raw cosines, as the authors' `score` returns them: about 0.15 to 0.35 (their benchmark multiplies by 100).

    Attributes:
        checkpoint: A weights file of ViT-H-14 (`HPS_v2.1_compressed.pt`), a folder with `open_clip_config.json` and the
            weights, or `org/name:file` on the hub; None for the published one.
        prompt_prefix: Put before every prompt, with a space.

    Source: Wu et al. 2023, arXiv:2306.09341, and github.com/tgxs002/HPSv2. Deviates: the dot product is float32 where
        theirs is under half-precision autocast.
    """

    checkpoint: str | None = None
    prompt_prefix: str = ""

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frozen weights; a ConfigError (ValueError) says what is wrong with the checkpoint."""
        self._towers = Towers(self.checkpoint or "xswu/HPSv2:HPS_v2.1_compressed.pt", "ViT-H-14", device, dtype)

    def pixels(self, images: Tensor) -> Tensor:
        """Letterboxed. The authors resize float tensors, and do not clamp what bicubic overshoots; nor do we."""
        towers = self.towers
        return normalise(fit(images, towers.size, "longest", method="unclamped"), towers.mean, towers.std)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, D] float32 of length one, with the prefix."""
        if self.prompt_prefix:
            prompts = [f"{self.prompt_prefix} {prompt}" for prompt in prompts]
        return super().text_features(prompts)
