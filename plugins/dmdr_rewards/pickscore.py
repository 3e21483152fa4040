"""Human preference: PickScore."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr_rewards.checkpoint import Source
from dmdr_rewards.network import ResizingReward
from dmdr_rewards.towers import CosineReward
from dmdr_rewards.transformers_clip import TransformersCLIP

VIT_H = {  # of the published `config.json`
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "projection_dim": 1024,
}


@dataclass
class PickScore(CosineReward, ResizingReward):
    """PickScore v1: scaled cosine of image and prompt in a CLIP ViT-H/14 tuned on choices of users.

    exp(logit_scale) * cos, as its model card computes it: about 18 to 24. Others divide it by 26 (Flow-GRPO) or 20
    (SRPO): give it a weight such as 0.0385. The shortest edge of an image is brought to 224 and the centre cropped.

    At full size, with random weights, resize "float" moves the cosine by up to 2e-5 (the score by 2e-3 at a scale of
    100) from "exact", which is Pillow's, at 512 x 512, 768 x 512 and 512 x 768.

    Attributes:
        checkpoint: A folder or hub id of a transformers `CLIPModel` with its tokenizer; None for the published one.

    Source: Kirstain et al. 2023, arXiv:2305.01569, and the model card of yuvalkirstain/PickScore_v1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale = 1.0

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frozen weights; a ConfigError (ValueError) says what is wrong with the checkpoint."""
        source = Source(self.checkpoint, "yuvalkirstain/PickScore_v1", device)
        towers = TransformersCLIP(source, device, dtype, VIT_H)
        self.scale = towers.scale
        self.use(towers)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, D] float32, scaled: the score is linear in them."""
        return self.scale * super().text_features(prompts)
