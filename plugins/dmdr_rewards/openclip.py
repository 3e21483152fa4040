"""CLIP models in open_clip's layout."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr.errors import ConfigError
from dmdr.states import load_strict
from dmdr_rewards.checkpoint import SUFFIXES, Source, read_json, read_state, reason
from dmdr_rewards.network import at_least_float32, no_autocast
from dmdr_rewards.preprocess import CLIP_NORM, Preprocess

CONFIG = "open_clip_config.json"
# Tried in this order; a local folder may hold a single file of another name instead.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


class OpenCLIP:
    """`Towers` of an open_clip model. In half precision norms and embeddings stay float32."""

    def __init__(
        self, source: Source, device: torch.device, dtype: torch.dtype, architecture: str, preprocess: Preprocess
    ) -> None:
        """Build and load it; see `towers.open_towers`.

        Raises:
            ConfigError: If open_clip is not installed, or the checkpoint missing, damaged or of another architecture.
        """
        try:
            import open_clip
        except ModuleNotFoundError as error:
            raise ConfigError(f"needs the package '{error.name}': pip install 'dmdr[clip]'") from error
        if source.known or source.file:
            path, config = source.file, open_clip.get_model_config(architecture)
        else:
            path, config, preprocess = self._of_folder(source)
        state = read_state(path, meta=source.meta) if path else None
        half = dtype if dtype in (torch.float16, torch.bfloat16) else None
        try:
            text_config = config["text_cfg"]
            if text_config.get("hf_tokenizer_name") or config["vision_cfg"].get("timm_model_name"):
                raise ValueError("towers and tokenizers of other libraries are not supported")
            with device:
                model = open_clip.CLIP(**config, cast_dtype=half)
            options = text_config.get("tokenizer_kwargs") or {}
            self._tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length, **options)
        except Exception as error:  # whatever odd settings lead to
            raise ConfigError(f"{source.name} is no plain CLIP ({reason(error)})") from error
        if state is not None:
            load_strict(model.state_dict(), state, f"checkpoint {path}")
        if half:
            open_clip.convert_weights_to_lp(model, half)
        else:
            model.to(dtype)
        self._model: Any = model.eval().requires_grad_(False)
        self._device = device
        size = model.visual.image_size
        self.preprocess = replace(preprocess, size=size if isinstance(size, int) else size[0])

    @staticmethod
    def _of_folder(source: Source) -> tuple[Path, dict[str, Any], Preprocess]:
        """Weights file, architecture and preprocessing, as the folder's own configuration says."""
        found = source.find(CONFIG)
        if found is None and source.folder:
            raise ConfigError(f"{source.name} is a folder without {CONFIG}; add it, or name the weights file itself")
        if found is None:
            raise source.lacks(CONFIG, "config.json")
        config = read_json(found)
        if not isinstance(config.get("model_cfg"), dict):
            raise ConfigError(f"{found} is no configuration of open_clip: it has no model_cfg")
        defaults = {"resize_mode": "shortest", "interpolation": "bicubic"}
        about, norms = config.get("preprocess_cfg") or {}, zip(("mean", "std"), CLIP_NORM, strict=True)
        try:
            given = defaults | {key: value for key, value in about.items() if value is not None}
            geometry = given["resize_mode"]
            mean, std = (tuple(map(float, given.get(key, norm))) for key, norm in norms)
            usual = geometry in ("squash", "longest", "shortest") and given["interpolation"] == "bicubic"
            usual = usual and not given.get("fill_color") and len(mean) == len(std) == 3
        except (AttributeError, TypeError, ValueError):
            usual = False
        if not usual:
            raise ConfigError(f"{source.name}: this preprocess_cfg is not supported: {about}")
        weights = source.find(*WEIGHTS) or (source.only(*SUFFIXES) if source.folder else source.require(*WEIGHTS))
        return weights, config["model_cfg"], Preprocess(size=0, geometry=geometry, mean=mean, std=std)

    def image(self, pixels: Tensor) -> Tensor:
        """[B, 3, size, size] -> [B, D] of length one, at least float32."""
        features = self._model.encode_image(pixels.to(self._model.visual.conv1.weight.dtype))
        return F.normalize(at_least_float32(features), dim=-1)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> [B, D] of length one, at least float32."""
        with no_autocast(self._device):
            features = self._model.encode_text(self._tokenizer(list(prompts)).to(self._device))
            return F.normalize(at_least_float32(features), dim=-1)
