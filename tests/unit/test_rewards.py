import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from transformers import Dinov2Config, Dinov2ForImageClassification

from dmdr.protocols import FeatureReward, Reward
from dmdr.rewards import RewardError, Rewards
from dmdr_rewards.clip import CLIP
from dmdr_rewards.dinov2 import DINOv2
from dmdr_rewards.hps import HPS
from dmdr_rewards.preprocess import CLIP_NORM, IMAGENET_NORM, fit, normalise, resize

SIZE = 28
PROMPTS = ["a red fox", "two \u201cold\u201d boats &amp; a dog", "a photo of the number seven " * 5]
LABELS = [0, 4, 2]
CPU = torch.device("cpu")


def clip_config(**flags: Any) -> dict[str, Any]:
    vision = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
    text = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **flags}


def randomised(model: torch.nn.Module) -> dict[str, Tensor]:
    """A state without the symmetries of a fresh one: biases, norms and attention that matter."""
    torch.manual_seed(0)
    return {name: (value + 0.2 * torch.randn_like(value)).contiguous() for name, value in model.state_dict().items()}


def write_clip(folder: Path, preprocess: dict[str, Any] | None = None, **flags: Any) -> str:
    folder.mkdir(exist_ok=True)
    save_file(randomised(open_clip.CLIP(**clip_config())), folder / "open_clip_model.safetensors")
    config = {"model_cfg": clip_config(**flags), "preprocess_cfg": preprocess or {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return str(folder)


def write_hps(folder: Path) -> str:
    state = {name: value.half() for name, value in randomised(open_clip.CLIP(**clip_config())).items()}
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip_config()}))
    return str(folder)


def write_dinov2(folder: Path, safe: bool = True, **settings: Any) -> str:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    model = Dinov2ForImageClassification(Dinov2Config(image_size=SIZE, num_labels=5, **sizes, **settings))
    model.load_state_dict(randomised(model))
    model.save_pretrained(folder)
    config = folder / "config.json"  # a half-precision config with float32 weights must not halve the model
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float16"}))
    return str(folder)


WRITERS: dict[type, Any] = {HPS: write_hps, CLIP: write_clip, DINOv2: write_dinov2}


def prepared(reward: Any, dtype: torch.dtype = torch.float32) -> Any:
    reward.prepare(CPU, dtype)
    return reward


def pixels(count: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """8-bit images with smooth parts, noise and saturated bars."""
    torch.manual_seed(height * width)
    images = F.interpolate(torch.rand(count, 3, 5, 5), (height, width), mode="bicubic")
    images[..., :: max(2, height // 6)] = torch.arange(width)[:: max(2, height // 6)].remainder(2).float()
    return ((images + 0.1 * torch.randn(images.shape)).clamp(0, 1) * 255).round() / 255


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("geometry", ["squash", "shortest", "longest"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (90, 41), (20, 33), (SIZE, 19)])
def test_exact_resize_is_pillows_with_the_gradient_of_one_pass(geometry: Any, height: int, width: int) -> None:
    config = open_clip.transform.PreprocessCfg(size=SIZE, mean=(0,) * 3, std=(1,) * 3, resize_mode=geometry)
    image = pixels(1, height, width).requires_grad_()
    exact = fit(image, SIZE, geometry, "exact")
    theirs = open_clip.transform.image_transform_v2(config, is_train=False)(pil(image.detach()[0]))
    steps = (exact[0] - theirs).abs() * 255
    assert steps.max() < 1.01
    assert (steps > 0.01).float().mean() < 0.02
    weight = torch.randn_like(exact)
    grads = [torch.autograd.grad((fit(image, SIZE, geometry, m) * weight).sum(), image)[0] for m in ("exact", "float")]
    torch.testing.assert_close(grads[0], grads[1])
    if geometry == "squash":  # every clamp passes gradients: that of the plain linear map, though bars are saturated
        linear = F.interpolate(image, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(grads[0], torch.autograd.grad((linear * weight).sum(), image)[0])
    assert fit(image, SIZE, geometry).min() >= 0 > fit(2 * image - 0.5, SIZE, geometry, "unclamped").min()


def test_resize_takes_half_precision_and_refuses_bytes() -> None:
    assert fit(pixels(1).bfloat16(), 14, "squash").dtype == torch.float32
    with pytest.raises(ValueError, match=r"torch.uint8 \[1, 3, 28, 28\]; expected floating point"):
        fit(pixels(1).byte(), 14, "squash")


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("mode", ["squash", "shortest", "longest", None])
def test_clip_scores_as_open_clip_does(tmp_path: Path, mode: str | None, quick_gelu: bool) -> None:
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]} | ({"resize_mode": mode} if mode else {})
    folder = write_clip(tmp_path, preprocess, quick_gelu=quick_gelu)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    for shape, tolerance in (((SIZE, SIZE), 1e-5), ((41, 63), 2e-3)):
        images = pixels(3, *shape)
        with torch.no_grad():
            image_features, text_features, _ = model.eval()(torch.stack([transform(pil(i)) for i in images]), tokens)
        ours = prepared(CLIP(folder, resize="exact"))(images, PROMPTS)
        torch.testing.assert_close(ours, (image_features * text_features).sum(-1), atol=tolerance, rtol=0)
    other = prepared(CLIP(write_clip(tmp_path, preprocess, quick_gelu=not quick_gelu)))
    assert (other(pixels(3), PROMPTS) - prepared(CLIP(folder))(pixels(3), PROMPTS)).abs().max() == 0
