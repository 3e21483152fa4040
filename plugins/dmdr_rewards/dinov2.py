"""ImageNet classes: DINOv2 with its linear classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.states import refuse_misfits
from dmdr_rewards.checkpoint import reason, require_hub_id
from dmdr_rewards.preprocess import IMAGENET_NORM, Geometry, fit, normalise


@dataclass
class DINOv2:
    """log p(label | image), at most 0, of a DINOv2 classifier; reads the column `label`.

    Attributes:
        checkpoint: A folder or hub id of transformers' `Dinov2ForImageClassification`; None for the published one.
        resize: "squash" ignores the aspect ratio; "crop" is the published evaluation: shortest edge, then the centre.

    Source: Oquab et al. 2023, arXiv:2304.07193, and the model card of facebook/dinov2-large-imagenet1k-1-layer.
        Deviates: away from the pre-training size, transformers interpolates position embeddings by size, the authors'
        code by a scale factor with an offset of 0.1.
    """

    differentiable = True  # not annotated, hence no flag
    checkpoint: str | None = None
    resize: Literal["squash", "crop"] = "squash"

    def __post_init__(self) -> None:
        if self.resize not in ("squash", "crop"):
            raise ConfigError(f"resize is 'squash' or 'crop', not {self.resize!r}")
        self._model: Any = None

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the frozen weights.

        Raises:
            ConfigError: A ValueError that says what is wrong with the checkpoint.
        """
        from transformers import Dinov2ForImageClassification
        from transformers.image_processing_base import ImageProcessingMixin
        from transformers.utils import logging

        name = str(self.checkpoint or "facebook/dinov2-large-imagenet1k-1-layer")
        path = Path(name).expanduser()
        source = str(path) if path.exists() else name
        if not path.exists():
            require_hub_id(name)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # its table of missing names would bury our line
        try:
            # float32 first: transformers otherwise follows the dtype that the file's configuration names.
            loaded: Any = Dinov2ForImageClassification.from_pretrained(
                source, dtype=torch.float32, weights_only=True, output_loading_info=True
            )
        except Exception as error:
            raise ConfigError(
                f"checkpoint {name} cannot be loaded as Dinov2ForImageClassification "
                f"({reason(error)}); give a folder or hub id that holds one"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        model, report = loaded
        refuse_misfits(f"checkpoint {name}", report["missing_keys"], report["unexpected_keys"])
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
        except OSError:  # it is optional
            processor = {}
        # The published network was pre-trained at 518 pixels, which is what its config says, and is evaluated at 224.
        self._size = _side(processor.get("crop_size") or model.config.image_size)
        self._edge = max(self._size, _side(processor.get("size") or self._size * 8 // 7))
        self._model = model.to(device, dtype).eval().requires_grad_(False)

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1], prompts (unused) and the column `label` -> [B] float32.

        Raises:
            ValueError: If the column is missing, or a label is not one of the classifier's.
        """
        if self._model is None:
            raise RuntimeError("DINOv2 has no weights yet; call prepare(device, dtype) first")
        labels = self._labels(columns.get("label")).to(images.device)
        geometry: Geometry = "squash" if self.resize == "squash" else "shortest"
        pixels = normalise(fit(images, self._size, geometry, edge=self._edge), *IMAGENET_NORM)
        with torch.autocast(images.device.type, enabled=False):  # the precision is what `prepare` was told
            logits = self._model(pixel_values=pixels.to(self._model.dtype)).logits
        return logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    def _labels(self, column: Sequence[Any] | None) -> Tensor:
        """[B] int64, checked here: on a GPU a class that does not exist would end the process."""
        if column is None:
            raise ValueError("the prompts have no column 'label' (the class of each image, an integer)")
        count = self._model.config.num_labels
        try:
            labels = [int(label) for label in column]
        except (TypeError, ValueError) as error:
            raise ValueError(f"the column 'label' is not all integers: {error}") from error
        if wrong := [label for label in labels if not 0 <= label < count]:
            raise ValueError(f"the label {wrong[0]} is not one of the classifier's 0 to {count - 1}")
        return torch.tensor(labels)


def _side(size: Any) -> int:
    """Pixels: transformers writes 224, [224, 224], {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size["height"]
    return int(size[0] if isinstance(size, (list, tuple)) else size)
