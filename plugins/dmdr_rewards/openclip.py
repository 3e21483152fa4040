"""What rewards on an open_clip model share: its two frozen towers, and the cosine between them."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr.errors import ConfigError
from dmdr.states import load_strict
from dmdr_rewards.checkpoint import locate, read_state, reason
from dmdr_rewards.preprocess import CLIP_NORM

CACHED_PROMPTS = 4096


class Towers:
    """A frozen open_clip model in eval mode.

    Attributes:
        size: Side of the input, in pixels.
        geometry: How images are brought to a square: `resize_mode` of the folder's `preprocess_cfg`; where that says
            none, "shortest" as open_clip does. "squash" for a bare weights file.
        mean, std: Of the input's three channels; of OpenAI's CLIP where nothing else is said.
    """

    def __init__(self, checkpoint: str, architecture: str, device: torch.device, dtype: torch.dtype) -> None:
        """Find, build and load it.

        Args:
            checkpoint: See `checkpoint.locate`. A folder's own configuration wins over `architecture`.
            architecture: open_clip's name of what a bare weights file holds.
            device: Where it runs.
            dtype: Of the matrices; norms and embeddings stay float32.

        Raises:
            ConfigError: If open_clip is not installed, or the checkpoint missing, damaged or of another architecture.
        """
        try:
            import open_clip
        except ModuleNotFoundError as error:
            raise ConfigError(f"needs the package '{error.name}': pip install 'dmdr[clip]'") from error
        path, config = locate(checkpoint)
        if config is None:
            config = {
                "model_cfg": open_clip.get_model_config(architecture),
                "preprocess_cfg": {"resize_mode": "squash"},
            }
        self._read_preprocess(config["preprocess_cfg"], checkpoint)
        half = dtype if dtype in (torch.float16, torch.bfloat16) else None
        try:
            text_config = config["model_cfg"]["text_cfg"]
            if text_config.get("hf_tokenizer_name") or config["model_cfg"]["vision_cfg"].get("timm_model_name"):
                raise ValueError("towers and tokenizers of other libraries are not supported")
            with device:
                model = open_clip.CLIP(**config["model_cfg"], cast_dtype=half)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"checkpoint {checkpoint} is no plain CLIP ({reason(error)})") from error
        load_strict(model.state_dict(), read_state(path), f"checkpoint {path}")
        if half:
            open_clip.convert_weights_to_lp(model, half)
        self._model = model.to(device).eval().requires_grad_(False)
        options = text_config.get("tokenizer_kwargs") or {}
        self._tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length, **options)
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._device = device
        size = model.visual.image_size
        self.size: int = size if isinstance(size, int) else size[0]

    def _read_preprocess(self, given: dict[str, Any], checkpoint: str) -> None:
        defaults = {"mean": CLIP_NORM[0], "std": CLIP_NORM[1], "resize_mode": "shortest", "interpolation": "bicubic"}
        config = defaults | {key: value for key, value in given.items() if value is not None}
        self.mean, self.std, self.geometry = config["mean"], config["std"], config["resize_mode"]
        supported = self.geometry in ("squash", "longest", "shortest") and config["interpolation"] == "bicubic"
        if not supported or config.get("fill_color"):
            raise ConfigError(f"checkpoint {checkpoint}: this preprocess_cfg is not supported: {given}")

    def image(self, pixels: Tensor) -> Tensor:
        """Features of preprocessed images [B, 3, size, size]: [B, D] float32 of length one."""
        with torch.autocast(pixels.device.type, enabled=False):  # the precision is what `prepare` was told
            features = self._model.encode_image(pixels.to(self._model.visual.conv1.weight.dtype))
            return F.normalize(features.float(), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Features of prompts, computed once each and kept for the last 4096: [B, D] float32 of length one."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        if new:
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                features = self._model.encode_text(self._tokenizer(new).to(self._device))
                rows = F.normalize(features.float(), dim=-1)
            self._features.update((prompt, row.clone()) for prompt, row in zip(new, rows, strict=True))
        for prompt in prompts:
            self._features.move_to_end(prompt)
        # A new tensor, even of rows made in inference mode, which a backward pass could not save.
        found = torch.stack([self._features[prompt] for prompt in prompts])
        while len(self._features) > CACHED_PROMPTS:
            self._features.popitem(last=False)
        return found


class CosineReward:
    """score = cos(image features, text features), in [-1, 1]; a `FeatureReward`.

    A subclass loads its towers in `prepare` and says what their pixels are.
    """

    differentiable = True
    _towers: Towers | None = None

    @property
    def towers(self) -> Towers:
        """The loaded towers.

        Raises:
            RuntimeError: Before `prepare`.
        """
        if self._towers is None:
            raise RuntimeError(f"{type(self).__name__} has no weights yet; call prepare(device, dtype) first")
        return self._towers

    def pixels(self, images: Tensor) -> Tensor:
        """The towers' input for images [B, 3, H, W] in [0, 1]; differentiable."""
        raise NotImplementedError

    def image_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D] float32 of length one; differentiable."""
        return self.towers.image(self.pixels(images))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, D] float32 of length one; constants, on the device of the weights."""
        return self.towers.text(prompts)

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1] and B prompts -> [B] float32."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)
