"""Image-text agreement: CLIP."""

from dataclasses import dataclass

import torch

from dmdr_rewards.network import ResizingReward
from dmdr_rewards.preprocess import Preprocess
from dmdr_rewards.towers import CosineReward, open_towers

PUBLISHED = "apple/DFN5B-CLIP-ViT-H-14"


@dataclass
class CLIP(CosineReward, ResizingReward):
    """Cosine of image and prompt in a CLIP model; DFN-5B ViT-H/14 unless another is named.

    About 0.2 to 0.45 in DFN-5B. What happens to images that are not square is up to the model's own configuration:
    DFN-5B squashes them, OpenAI's models crop the centre. With OpenAI's ViT-B/32, the prefix "A photo depicts" and a
    weight of 2.5 this is CLIPScore (Hessel et al. 2021, arXiv:2104.08718), but for its cut at 0.

    At full size, with random weights, resize "float" moves a score by up to 4e-5 from "exact", which is Pillow's,
    at 512 x 512, 768 x 512 and 512 x 768.

    Attributes:
        checkpoint: A folder or hub id in the layout of open_clip (`open_clip_config.json`) or of transformers
            (`config.json`), or a single weights file, which is taken for ViT-H-14 with QuickGELU, as DFN-5B is; None
            for the published DFN-5B.

    Source: Radford et al. 2021, arXiv:2103.00020; Fang et al. 2023, arXiv:2309.17425, and the model card of
        apple/DFN5B-CLIP-ViT-H-14, whose configuration says QuickGELU and images squashed to a square.
    """

    printed_times = 100.0

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frozen weights; a ConfigError (ValueError) says what is wrong with the checkpoint."""
        squash = Preprocess(size=224, geometry="squash")
        self.use(open_towers(self.checkpoint, PUBLISHED, device, dtype, "ViT-H-14-quickgelu", squash))
