"""Aesthetic quality: LAION's predictor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr_rewards.checkpoint import Source, read_state
from dmdr_rewards.network import HEAD_WIDTHS, ResizingReward, frozen, new_head, score_head
from dmdr_rewards.transformers_clip import TransformersCLIP

CLIP = "openai/clip-vit-large-patch14"
VIT_L = {  # of its `config.json`
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "projection_dim": 768,
}


@dataclass
class Aesthetic(ResizingReward):
    """LAION's aesthetic score: a linear head on the unit image feature of OpenAI's CLIP ViT-L/14; reads no prompt.

    Trained on ratings from 1 to 10 and unbounded; 4.5 to 7 on generated images. The head's five layers have no
    activation in between, so the score is affine in the feature. The shortest edge of an image is brought to 224 and
    the centre cropped.

    At full size, with random weights, resize "float" moves a score by up to 3e-5 from "exact", which is Pillow's,
    at 512 x 512, 768 x 512 and 512 x 768.

    Attributes:
        checkpoint: The head (`sac+logos+ava1-l14-linearMSE.pth`), `org/name:file` on the hub, or a folder with the head
            as its one `.pth` file and its CLIP in the layout of transformers; None for the copy of LAION's head on the
            hub.
        clip: Folder or hub id of the CLIP under the head, in the layout of transformers; None for that of the folder,
            or OpenAI's ViT-L/14 under a head that is a single file.

    Source: github.com/christophschuhmann/improved-aesthetic-predictor. Deviates: the head runs in float32, or more,
        after a tower in any precision.
    """

    reads_prompts = False
    clip: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._towers: TransformersCLIP | None = None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frozen weights; a ConfigError (ValueError) says what is wrong with the checkpoint."""
        source = Source(self.checkpoint, "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth", device)
        what = source.name
        if source.known:
            head = new_head(HEAD_WIDTHS, device)
        else:
            path = source.file or source.only(".pt", ".pth")
            what = f"checkpoint {path}"
            head = score_head(read_state(path, meta=source.meta), "layers", what)
        self._head = frozen(head, device, torch.promote_types(dtype, torch.float32))
        tower = source if source.folder and not self.clip else Source(self.clip, CLIP, device, "clip")
        self._towers = TransformersCLIP(tower, device, dtype, VIT_L, images_only=True)
        if head[0].in_features != self._towers.width:
            raise ConfigError(
                f"{what} needs {head[0].in_features} features, but {tower.name} gives {self._towers.width}"
            )
        # The authors crop as torchvision does, which may differ by a pixel.
        self._towers.preprocess = replace(self._towers.preprocess, offset="round")

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1]; prompts are unused -> [B] float32."""
        if self._towers is None:
            raise RuntimeError("Aesthetic has no weights yet; call prepare(device, dtype) first")
        return self.look(self._score, self._towers.preprocess(images, self.method))

    def _score(self, pixels: Tensor) -> Tensor:
        assert self._towers
        return self._head(self._towers.image(pixels)).squeeze(-1)
