"""Human preference: HPSv2.1."""

from dataclasses import dataclass, replace

import torch

from dmdr_rewards.preprocess import Method, Preprocess
from dmdr_rewards.towers import CosineReward, open_towers

PUBLISHED = "xswu/HPSv2:HPS_v2.1_compressed.pt"


@dataclass
class HPS(CosineReward):
    """Human Preference Score v2.1: cosine of image and prompt in a CLIP ViT-H/14 tuned on human choices.

    Raw cosines, as the authors' `score` returns them: about 0.15 to 0.35 (their benchmark multiplies by 100). Images
    that are not square are letterboxed with black. The authors resize float tensors, with antialiasing since
    torchvision 0.17 (their tables of 2023 may lack it), and do not clamp what bicubic overshoots; nor do we, so that
    there is no cheaper resize: from any size the score is theirs to 1e-6.

    Attributes:
        checkpoint: A weights file of ViT-H-14 (`HPS_v2.1_compressed.pt`), a folder with `open_clip_config.json` and the
            weights, or `org/name:file` on the hub; None for the published one.

    Source: Wu et al. 2023, arXiv:2306.09341, and github.com/tgxs002/HPSv2. Deviates: the dot product is float32 where
        theirs is under half-precision autocast, and an image whose longest edge is 224 already is padded, too.
    """

    printed_times = 100.0

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frozen weights; a ConfigError (ValueError) says what is wrong with the checkpoint."""
        towers = open_towers(self.checkpoint, PUBLISHED, device, dtype, "ViT-H-14", Preprocess(size=224))
        towers.preprocess = replace(towers.preprocess, geometry="longest", edge=None)  # whatever a folder says
        self.use(towers)

    @property
    def method(self) -> Method:
        """As the authors."""
        return "unclamped"
