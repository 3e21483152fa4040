import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2ForImageClassification,
)

from dmdr import hub
from dmdr.errors import ConfigError, MissingFile
from dmdr.protocols import FeatureReward, Reward
from dmdr.rewards import RewardError, Rewards
from dmdr.settings.chosen import Chosen
from dmdr_digits.text import build_tokenizer
from dmdr_rewards import dinov2, preprocess, towers
from dmdr_rewards.aesthetic import Aesthetic
from dmdr_rewards.clip import CLIP
from dmdr_rewards.dinov2 import DINOv2
from dmdr_rewards.hps import HPS
from dmdr_rewards.imagereward import ImageReward
from dmdr_rewards.pickscore import PickScore
from dmdr_rewards.preprocess import CLIP_NORM, IMAGENET_NORM, fit, resize

SIZE = 28
PROMPTS = ["a red fox", "two \u201cold\u201d boats &amp; a dog", "a photo of the number seven " * 5]
LABELS = [0, 4, 2]
CPU = torch.device("cpu")


def clip_config(**flags: Any) -> dict[str, Any]:
    # Dropout acts in training mode only, in which a reward has no business.
    vision = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14, "patch_dropout": 0.5}
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


def write_pickscore(folder: Path, **processor: Any) -> str:
    """A transformers CLIP with its processor and tokenizer; GELU, as laion's ViT-H/14."""
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 12}
    vision = {"hidden_size": 32, "intermediate_size": 64, "image_size": SIZE, "patch_size": 14}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text | tower | ends, vision_config=vision | tower, projection_dim=16)
    model = CLIPModel(config)
    model.load_state_dict(randomised(model))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPImageProcessor(**(side | processor)).save_pretrained(folder)
    return str(folder)


def write_aesthetic(folder: Path) -> str:
    """A CLIP of transformers, and LAION's head: five linear layers, between them dropout and no activation."""
    write_pickscore(folder)
    layers = {0: (16, 32), 2: (32, 8), 4: (8, 8), 6: (8, 4), 7: (4, 1)}
    torch.manual_seed(1)
    state = {f"layers.{i}.weight": torch.randn(out, width) / width**0.5 for i, (width, out) in layers.items()}
    state |= {f"layers.{i}.bias": torch.randn(out) for i, (_, out) in layers.items()}
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return str(folder)


WRITERS: dict[type, Any] = {
    HPS: write_hps,
    CLIP: write_clip,
    PickScore: write_pickscore,
    Aesthetic: write_aesthetic,
    DINOv2: write_dinov2,
}


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


@pytest.mark.parametrize(("height", "width"), [(64, 64), (90, 41), (41, 90), (20, 33), (SIZE, 19)])
def test_exact_resize_is_pillows_with_the_gradient_of_one_pass(height: int, width: int) -> None:
    image = pixels(1, height, width).requires_grad_()
    exact, once = (resize(image, SIZE, SIZE, method) for method in ("exact", "float"))
    # In two calls: since Pillow 13 a single one may begin with the vertical pass.
    theirs = pil(image.detach()[0]).resize((SIZE, height), Image.BICUBIC).resize((SIZE, SIZE), Image.BICUBIC)
    steps = (exact[0] * 255 - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs()
    assert steps.max() < 1.01
    assert (steps > 0.01).float().mean() < 0.01
    assert 0 <= once.min() <= once.max() <= 1
    # Clamps and roundings pass every gradient: that of the plain linear map, saturated bars included.
    linear = F.interpolate(image, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    weight = torch.randn_like(linear)
    expected = torch.autograd.grad((linear * weight).sum(), image)[0]
    for resized in (exact, once):
        torch.testing.assert_close(torch.autograd.grad((resized * weight).sum(), image)[0], expected)


def test_resize_takes_half_precision_and_refuses_bytes() -> None:
    assert fit(pixels(1).bfloat16(), 14, "squash").dtype == torch.float32
    with pytest.raises(ValueError, match=r"torch.uint8 \[1, 3, 28, 28\]; expected floating point"):
        fit(pixels(1).byte(), 14, "squash")


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest", None])
def test_clip_scores_as_open_clip_does(tmp_path: Path, mode: str | None) -> None:
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]} | ({"resize_mode": mode} if mode else {})
    scores = {}
    for quick_gelu in (True, False):
        folder = write_clip(tmp_path / str(quick_gelu), preprocess, quick_gelu=quick_gelu)
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
        reward = prepared(CLIP(folder, resize="exact"))
        # Where nothing is resized the pixels are the same, elsewhere the odd one differs by 1/255.
        for shape, tolerance in (((SIZE, SIZE), 1e-5), ((41, 63), 3e-4)):
            images = pixels(3, *shape)
            with torch.no_grad():
                image, text, _ = model.eval()(torch.stack([transform(pil(i)) for i in images]), tokens)
            scores[quick_gelu] = reward(images, PROMPTS)
            torch.testing.assert_close(scores[quick_gelu], (image * text).sum(-1), atol=tolerance, rtol=0)
    assert (scores[True] - scores[False]).abs().max() > 1e-3  # the same weights: QuickGELU is honoured


def test_hps_scores_as_its_authors_do(tmp_path: Path) -> None:
    model = open_clip.CLIP(**clip_config())
    open_clip.load_checkpoint(model, f"{write_hps(tmp_path)}/HPS_v2.1_compressed.pt")
    tokens = open_clip.SimpleTokenizer(context_length=20)([f"Photo: {prompt}" for prompt in PROMPTS])
    reward = prepared(HPS(str(tmp_path), prompt_prefix="Photo:"))
    for shape in ((SIZE, SIZE), (64, 64), (41, 63), (90, 31), (SIZE, 19)):
        images = pixels(3, *shape)
        scale = SIZE / max(shape)
        height, width = (round(side * scale) for side in shape)
        letterbox = TF.resize(images, [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
        left, top = (SIZE - width) // 2, (SIZE - height) // 2
        letterbox = TF.pad(letterbox, [left, top, SIZE - width - left, SIZE - height - top])
        with torch.no_grad():
            image, text, _ = model.eval()(TF.normalize(letterbox, *CLIP_NORM), tokens)
        torch.testing.assert_close(reward(images, PROMPTS), (image * text).sum(-1), atol=1e-6, rtol=0)
    assert (prepared(HPS(str(tmp_path)))(images, PROMPTS) - reward(images, PROMPTS)).abs().max() > 1e-3


def test_pickscore_scores_as_its_model_card_does(tmp_path: Path) -> None:
    norm = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    folder = write_pickscore(tmp_path, **norm)
    model = CLIPModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    reward = prepared(PickScore(folder, resize="exact"))
    # Where nothing is resized the pixels are the same, elsewhere the odd one differs by 1/255; Pillow 13 resizes tall
    # images in another order than the releases that published scores were made with.
    for shape, tolerance in (((SIZE, SIZE), 1e-5), ((512, 512), 3e-4), ((41, 64), 3e-4), ((90, 41), 5e-3)):
        images = pixels(3, *shape)
        with torch.no_grad():
            seen = processor([pil(image) for image in images], return_tensors="pt")
            image = model.get_image_features(**seen).pooler_output
            text = model.get_text_features(**tokens).pooler_output
            theirs = model.logit_scale.exp() * F.cosine_similarity(image, text)
        ours = reward(images, PROMPTS)
        torch.testing.assert_close(ours / reward.scale, theirs / reward.scale, atol=tolerance, rtol=0)
    torch.testing.assert_close(  # linear in its text features, which SRPO builds on
        (reward.image_features(images) * reward.text_features(PROMPTS)).sum(-1), reward(images, PROMPTS)
    )
    # The same folder is a CLIP for `clip`, without the scale.
    cosine = prepared(CLIP(folder, resize="exact"))(images, PROMPTS)
    torch.testing.assert_close(cosine * model.logit_scale.exp(), reward(images, PROMPTS))


def test_aesthetic_scores_as_its_authors_do(tmp_path: Path) -> None:
    folder = write_aesthetic(tmp_path)
    head = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 8), torch.nn.Dropout(0.2),
        torch.nn.Linear(8, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1),
    )  # fmt: skip
    file = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    state = torch.load(file)
    head.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
    model = CLIPModel.from_pretrained(folder).eval()
    reward = prepared(Aesthetic(folder, resize="exact"))
    for shape, tolerance in (((SIZE, SIZE), 1e-5), ((512, 512), 3e-3), ((41, 63), 3e-3), ((300, 200), 3e-3)):
        images = pixels(3, *shape)
        cropped = [TF.center_crop(TF.resize(pil(image), SIZE, TF.InterpolationMode.BICUBIC), SIZE) for image in images]
        seen = torch.stack([TF.normalize(TF.to_tensor(image), *CLIP_NORM) for image in cropped])
        with torch.no_grad():
            features = F.normalize(model.get_image_features(seen).pooler_output, dim=-1)
            theirs = head.eval()(features).squeeze(-1)
        torch.testing.assert_close(reward(images, PROMPTS), theirs, atol=tolerance, rtol=0)
    file.rename(tmp_path.parent / "head.pth")  # a head alone, and its CLIP
    apart = prepared(Aesthetic(str(tmp_path.parent / "head.pth"), clip=folder, resize="exact"))
    torch.testing.assert_close(apart(images, PROMPTS), reward(images, PROMPTS), rtol=0, atol=0)


@pytest.mark.parametrize("processor", [None, {"crop_size": {"height": 14, "width": 14}, "size": {"shortest_edge": 20}}])
def test_dinov2_gives_the_log_probability_of_the_label(tmp_path: Path, processor: dict[str, Any] | None) -> None:
    folder, side, edge = write_dinov2(tmp_path), (14 if processor else SIZE), (20 if processor else 32)
    # The published config.json says 518 pixels, and its preprocessor_config.json 224.
    given = processor or {"crop_size": {"height": SIZE, "width": SIZE}, "size": {"shortest_edge": 32}}
    given |= {"image_mean": IMAGENET_NORM[0], "image_std": IMAGENET_NORM[1]}
    if processor:
        BitImageProcessor(**given).save_pretrained(folder)
    model = Dinov2ForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = BitImageProcessorPil(**given)
    for shape, tolerance in (((side, side), 1e-5), ((512, 512), 2e-3), ((41, 63), 2e-3)):
        images = pixels(3, *shape)
        pictures = [pil(image) for image in images]
        squashed = torch.stack([TF.to_tensor(picture.resize((side, side), Image.BICUBIC)) for picture in pictures])
        for geometry, seen in (
            ("squash", TF.normalize(squashed, *IMAGENET_NORM)),
            ("crop", theirs(pictures, return_tensors="pt").pixel_values),
        ):
            with torch.no_grad():
                logits = model(seen).logits
            reward: Any = prepared(DINOv2(folder, geometry=geometry, resize="exact"))  # type: ignore[arg-type]
            ours = reward(images, PROMPTS, label=LABELS)
            expected = -F.cross_entropy(logits, torch.tensor(LABELS), reduction="none")
            atol = tolerance if geometry == "squash" or shape != (side, side) else 2e-3  # the crop resizes even then
            torch.testing.assert_close(ours, expected, atol=atol, rtol=0)
    assert edge > side
    some = reward(images, PROMPTS, label=[0, None, 2])
    assert some.isnan().tolist() == [False, True, False]


def write_dinov2_of_torch_hub(folder: Path, blocks: int = 4, *, gated: bool = False) -> dict[str, Tensor]:
    """The authors' two files, 64 wide: a backbone of five blocks for 518 pixels, and a head on one or four of them."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shapes = {
        "cls_token": (1, 1, 64), "pos_embed": (1, 1 + 37 * 37, 64), "mask_token": (1, 64),
        "patch_embed.proj.weight": (64, 3, 14, 14), "patch_embed.proj.bias": (64,),
        "norm.weight": (64,), "norm.bias": (64,),
    }  # fmt: skip
    for i in range(5):
        block = {
            "norm1.weight": (64,), "norm1.bias": (64,), "attn.qkv.weight": (192, 64), "attn.qkv.bias": (192,),
            "attn.proj.weight": (64, 64), "attn.proj.bias": (64,), "ls1.gamma": (64,), "norm2.weight": (64,),
            "norm2.bias": (64,), "mlp.fc1.weight": (256, 64), "mlp.fc1.bias": (256,), "mlp.fc2.weight": (64, 256),
            "mlp.fc2.bias": (64,), "ls2.gamma": (64,),
        }  # fmt: skip
        if gated:  # as ViT-g
            block = {name: shape for name, shape in block.items() if not name.startswith("mlp.")}
            block |= {"mlp.w12.weight": (352, 64), "mlp.w12.bias": (352,)}
            block |= {"mlp.w3.weight": (64, 176), "mlp.w3.bias": (64,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    state = {name: 0.15 * torch.randn(shape) for name, shape in shapes.items()}
    state |= {name: value + 1 for name, value in state.items() if re.search(r"norm\d?\.weight|gamma", name)}
    head = {"weight": 0.2 * torch.randn(7, 64 * (blocks + 1)), "bias": torch.randn(7)}
    torch.save(state, folder / "dinov2_vitl14_pretrain.pth")
    torch.save(head, folder / f"dinov2_vitl14_linear{'4' if blocks == 4 else ''}_head.pth")
    return {**state, "head.weight": head["weight"], "head.bias": head["bias"]}


def logits_of_torch_hub(w: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The authors' vision transformer, written down from its definition (Oquab et al. 2023; one head of 64)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (64,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    side = x.shape[-1] // 14
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14).flatten(2).transpose(1, 2)
    grid = w["pos_embed"][:, 1:].reshape(1, 37, 37, 64).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((side + 0.1) / 37,) * 2, mode="bicubic", antialias=False)
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), x + grid.flatten(2).mT], 1)
    normed = []
    for i in range(5):
        b = f"blocks.{i}"
        q, k, v = F.linear(norm(x, f"{b}.norm1"), w[f"{b}.attn.qkv.weight"], w[f"{b}.attn.qkv.bias"]).chunk(3, -1)
        mixed = (q @ k.mT / 8).softmax(-1) @ v
        x = x + w[f"{b}.ls1.gamma"] * F.linear(mixed, w[f"{b}.attn.proj.weight"], w[f"{b}.attn.proj.bias"])
        first, second = ("w12", "w3") if f"{b}.mlp.w12.weight" in w else ("fc1", "fc2")
        hidden = F.linear(norm(x, f"{b}.norm2"), w[f"{b}.mlp.{first}.weight"], w[f"{b}.mlp.{first}.bias"])
        hidden = F.silu(hidden[..., :176]) * hidden[..., 176:] if first == "w12" else F.gelu(hidden)
        x = x + w[f"{b}.ls2.gamma"] * F.linear(hidden, w[f"{b}.mlp.{second}.weight"], w[f"{b}.mlp.{second}.bias"])
        normed.append(norm(x, "norm"))
    features = torch.cat([*(y[:, 0] for y in normed[-blocks:]), normed[-1][:, 1:].mean(1)], 1)
    return F.linear(features, w["head.weight"], w["head.bias"])


@pytest.mark.parametrize(("blocks", "gated"), [(1, False), (4, False), (4, True)])
def test_dinov2_of_torch_hub_is_the_authors_network(tmp_path: Path, blocks: int, gated: bool) -> None:
    folder = tmp_path / "hub"
    weights = write_dinov2_of_torch_hub(folder, blocks, gated=gated)
    reward = prepared(DINOv2(str(folder), geometry="crop", resize="exact"))
    # From 512 pixels the odd one differs by 1/255 from Pillow's, at the size itself none does.
    for shape, tolerance in (((256, 300), 1e-5), ((512, 512), 5e-3), ((300, 420), 5e-3)):
        images = pixels(2, *shape)
        resized = [TF.resize(pil(image), 256, TF.InterpolationMode.BICUBIC) for image in images]
        seen = torch.stack([TF.normalize(TF.to_tensor(TF.center_crop(i, 224)), *IMAGENET_NORM) for i in resized])
        expected = logits_of_torch_hub(weights, seen, blocks).log_softmax(-1)[torch.arange(2), torch.tensor([6, 2])]
        torch.testing.assert_close(reward(images, ["", ""], label=[6, 2]), expected, atol=tolerance, rtol=0)
    images, seen = pixels(2, 256, 300), TF.normalize(TF.center_crop(pixels(2, 256, 300), 224), *IMAGENET_NORM)
    expected = logits_of_torch_hub(weights, seen, blocks).log_softmax(-1)[torch.arange(2), torch.tensor([6, 2])]
    # Without the authors' offset of 0.1 the positions, and so the scores, are others.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2, "OFFSET", 0.0)
        other = prepared(DINOv2(str(folder), geometry="crop"))(images, ["", ""], label=[6, 2])
    assert (other - expected).abs().max() > 1e-4
    head = next(folder.glob("*_head.pth"))
    torch.save({"weight": torch.ones(7, 3 * 64), "bias": torch.ones(7)}, head)
    with pytest.raises(ValueError, match="takes 192 features; a backbone of width 64 gives 128 or 320"):
        prepared(DINOv2(str(folder)))
    head.unlink()
    with pytest.raises(ValueError, match="holds only one of the two files"):
        prepared(DINOv2(str(folder)))


def test_a_processor_as_transformers_5_saves_it_is_obeyed(tmp_path: Path) -> None:
    """One `processor_config.json` in place of `preprocessor_config.json`."""
    folder = write_pickscore(tmp_path, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    expected = prepared(PickScore(folder))(pixels(3), PROMPTS)
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    (tmp_path / "preprocessor_config.json").unlink()
    assert (prepared(PickScore(folder))(pixels(3), PROMPTS) - expected).abs().max() > 0.1
    processor.save_pretrained(folder)
    assert not (tmp_path / "preprocessor_config.json").exists()
    torch.testing.assert_close(prepared(PickScore(folder))(pixels(3), PROMPTS), expected)


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    """torch reads a damaged record without a word."""
    file = Path(write_hps(tmp_path)) / "HPS_v2.1_compressed.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot be read \(BadZipFile: .* is damaged\); download it again"):
        prepared(HPS(str(tmp_path)))


@pytest.mark.parametrize("kind", [HPS, CLIP, Aesthetic])
def test_a_state_without_names_is_refused(tmp_path: Path, kind: type) -> None:
    torch.save({0: torch.ones(2)}, tmp_path / "int.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        prepared(kind(str(tmp_path / "int.pt")))


@pytest.mark.parametrize(
    "change",
    [
        {"model_cfg": {"text_cfg": {"heads": 3}}},
        {"model_cfg": {"vision_cfg": {"width": 33}}},
        {"model_cfg": {"vision_cfg": {"patch_size": 0}}},
        {"model_cfg": {"embed_dim": -1}},
        {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"odd": 1}}}},
        {"preprocess_cfg": {"mean": 0.5}},
        {"preprocess_cfg": {"mean": [0.5, 0.5]}},
        {"preprocess_cfg": ["squash"]},
    ],
)
def test_an_odd_configuration_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    file = Path(write_clip(tmp_path)) / "open_clip_config.json"
    config = json.loads(file.read_text())
    for section, values in change.items():
        if not isinstance(values, dict):
            config[section] = values
            continue
        for key, value in values.items():
            old = config[section].get(key)
            config[section][key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is no plain CLIP|this preprocess_cfg is not supported") as caught:
        prepared(CLIP(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_every_clip_folder_says_how_it_is_fed(tmp_path: Path) -> None:
    for number, (settings, refused) in enumerate(
        (
            ({"resample": 2}, True),
            ({"do_center_crop": False}, True),
            ({"size": {"height": SIZE, "width": SIZE}}, True),
            ({"size": {"longest_edge": SIZE}}, True),
            ({"image_mean": 0.5}, True),
            ({"image_mean": [0.5]}, True),
            ({"rescale_factor": 1 / 127.5}, True),
            ({"size": {"shortest_edge": 32}}, False),
        )
    ):
        folder = write_pickscore(tmp_path / str(number), **settings)
        if refused:
            with pytest.raises(ValueError, match=r"these settings of its image processor are not supported"):
                prepared(PickScore(folder))
        else:
            assert prepared(PickScore(folder)).towers.preprocess.edge == 32


@pytest.mark.parametrize(("kind", "write"), [*WRITERS.items(), (DINOv2, write_dinov2_of_torch_hub)])
def test_gradients_are_right_and_reach_every_pixel(tmp_path: Path, kind: type, write: Any) -> None:
    write(tmp_path)
    folder = str(tmp_path)
    assert kind().differentiable
    order = torch.tensor([2, 0, 1])

    def score(reward: Any, images: Tensor, rows: Sequence[int] = (0, 1, 2)) -> Tensor:
        return reward(images, [PROMPTS[i] for i in rows], label=[LABELS[i] for i in rows])

    precise = prepared(kind(folder), torch.float64)
    images = (0.25 + 0.5 * pixels(3, 40, 33)).double().requires_grad_()
    assert not score(precise, images.detach()).requires_grad  # the weights are frozen
    (grad,) = torch.autograd.grad(score(precise, images).sum(), images)
    torch.manual_seed(1)
    with torch.no_grad():
        for direction in (grad / grad.norm(), torch.randn_like(grad) / grad.numel() ** 0.5):
            slope = sum(sign * score(precise, images + sign * 1e-4 * direction) for sign in (1, -1)).sum() / 2e-4
            torch.testing.assert_close(slope, (grad * direction).sum(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(score(precise, images[order], order.tolist()), score(precise, images)[order])

    reward = prepared(kind(folder))
    images = images.detach().float()
    black_and_white = pixels(3, 40, 40).gt(0.5).float().requires_grad_()
    (grad,) = torch.autograd.grad(score(reward, black_and_white).sum(), black_and_white)
    assert (grad != 0).float().mean() > 0.99

    half = prepared(kind(folder), torch.bfloat16)
    close = score(half, images)
    assert close.dtype == torch.float32
    unit = reward.scale if kind is PickScore else 1.0
    assert 0 < (close - score(reward, images)).abs().max() < 0.05 * unit
    with torch.autocast("cpu", torch.bfloat16):  # precision is what `prepare` was told, not what the caller runs in
        inside = score(reward, images)
    torch.testing.assert_close(inside, score(reward, images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "write", "size"),
    [*((k, w, SIZE) for k, w in WRITERS.items() if k is not HPS), (DINOv2, write_dinov2_of_torch_hub, 224)],
)
def test_the_exact_resize_has_the_gradient_of_the_cheap_one(tmp_path: Path, kind: type, write: Any, size: int) -> None:
    write(tmp_path)
    folder, found = str(tmp_path), {}
    for resize_method in ("float", "exact"):
        images = pixels(3, size, size).requires_grad_()
        reward = prepared(kind(folder, resize=resize_method))
        (found[resize_method],) = torch.autograd.grad(reward(images, PROMPTS, label=LABELS).sum(), images)
    torch.testing.assert_close(found["exact"], found["float"])


@pytest.mark.parametrize("kind", WRITERS)
def test_chunks_and_checkpointing_change_memory_only(tmp_path: Path, kind: type) -> None:
    folder = WRITERS[kind](tmp_path)
    found, kept = [], []
    for settings in ({}, {"chunk_size": 2}, {"chunk_size": 2, "gradient_checkpointing": True}):
        reward = prepared(kind(folder, **settings))
        reward(pixels(3), PROMPTS, label=LABELS)  # the prompts are cached
        images, sizes = pixels(3).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            scores = reward(images, PROMPTS, label=LABELS)
        (grad,) = torch.autograd.grad(scores.sum(), images)
        found.append((scores.detach(), grad))
        kept.append(sum(sizes))
    for scores, grad in found[1:]:
        torch.testing.assert_close(scores, found[0][0])
        torch.testing.assert_close(grad, found[0][1])
    assert kept[2] < kept[0] / 3
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        kind(chunk_size=0)


def test_rewards_that_are_fed_alike_share_the_resize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, type] = {"pickscore": PickScore, "aesthetic": Aesthetic, "clip": CLIP}
    rewards = Rewards({name: (1.0, kind(WRITERS[kind](tmp_path / name))) for name, kind in kinds.items()})
    rewards.prepare(CPU, torch.float32)
    resized: list[tuple[int, ...]] = []
    interpolate = preprocess._bicubic
    monkeypatch.setattr(
        preprocess, "_bicubic", lambda images, *size: resized.append(images.shape) or interpolate(images, *size)
    )
    images = pixels(3, 64, 64).requires_grad_()
    shared = rewards.each(images, PROMPTS)
    assert len(resized) == 1  # a square has one geometry only
    (together,) = torch.autograd.grad(sum(shared.values()).sum(), images)
    apart = torch.zeros_like(images)
    for name, (_, reward) in rewards.parts.items():
        alone = reward(images, PROMPTS)
        torch.testing.assert_close(alone, shared[name])
        apart += torch.autograd.grad(alone.sum(), images)[0]
    assert len(resized) == 4
    torch.testing.assert_close(together, apart)
    rewards.each(pixels(3, 64, 50), PROMPTS)
    assert len(resized) == 7  # clip squashes, and the others take the middle of 35 pixels for another one


def test_prompts_are_encoded_once_and_their_features_survive_inference_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = prepared(CLIP(write_clip(tmp_path)))
    encoded: list[int] = []
    encode = reward.towers._model.encode_text
    reward.towers._model.encode_text = lambda tokens: encoded.append(len(tokens)) or encode(tokens)
    with torch.inference_mode():
        first = reward.text_features([*PROMPTS, *PROMPTS])
    assert encoded == [1, 1, 1]  # one by one: what a prompt's feature is must not depend on the others
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(6))
    images = pixels(3).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert encoded == [1, 1, 1]
    monkeypatch.setattr(towers, "CACHED_PROMPTS", 8)
    many = [f"prompt {i}" for i in range(9)]
    assert len(reward.text_features(many)) == 9
    reward.text_features([many[0], PROMPTS[0], many[-1]])
    assert len(encoded) == 3 + 9 + 2  # the two that were used least recently had gone
    for prompts in ([many[3]], ["new"], [many[3]]):
        reward.text_features(prompts)
    assert len(encoded) == 3 + 9 + 2 + 1
    assert isinstance(reward, FeatureReward)


def test_construction_is_cheap() -> None:
    code = (
        "import sys; from dmdr_rewards import aesthetic, clip, dinov2, hps, imagereward, pickscore;"
        "clip.CLIP('x'), dinov2.DINOv2('x'), hps.HPS('x'), pickscore.PickScore('x'), aesthetic.Aesthetic('x');"
        "imagereward.ImageReward('x');"
        "print([name for name in ('open_clip', 'transformers', 'torchvision') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("kind", "files", "architecture"),
    [
        (HPS, ["xswu/HPSv2:HPS_v2.1_compressed.pt"], "ViT-H-14"),
        (
            CLIP,
            [f"apple/DFN5B-CLIP-ViT-H-14:{name}" for name in ("open_clip_config.json", "open_clip_pytorch_model.bin")],
            None,
        ),
    ],
)
def test_the_default_is_the_published_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, files: list[str], architecture: str | None
) -> None:
    folder = Path(WRITERS[kind](tmp_path))
    if kind is CLIP:
        torch.save(load_file(folder / "open_clip_model.safetensors"), folder / "open_clip_pytorch_model.bin")
    fetched = []

    def download(repo: str, name: str, **where: Any) -> str:
        if name.endswith(".safetensors"):
            raise EntryNotFoundError(name)
        fetched.append(f"{repo}:{name}")
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    if architecture:
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, clip_config())
    score = prepared(kind())(pixels(3), PROMPTS)
    assert list(dict.fromkeys(fetched)) == files  # the hub keeps what it gave
    torch.testing.assert_close(score, prepared(kind(str(folder)))(pixels(3), PROMPTS))


def test_a_bare_clip_file_is_quick_gelu_and_squashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_clip(tmp_path, quick_gelu=True)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14-quickgelu", clip_config(quick_gelu=True))
    state = load_file(f"{folder}/open_clip_model.safetensors")  # as DataParallel saves it
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "bare.pt")
    bare = prepared(CLIP(str(tmp_path / "bare.pt")))(pixels(3, 20, 50), PROMPTS)
    torch.testing.assert_close(bare, prepared(CLIP(folder))(pixels(3, 20, 50), PROMPTS))


@pytest.mark.parametrize("kind", [CLIP, PickScore])
def test_a_missing_tokenizer_is_refused(tmp_path: Path, kind: type) -> None:
    folder = write_pickscore(tmp_path)
    for file in (*tmp_path.glob("tokenizer*"), *tmp_path.glob("vocab*"), *tmp_path.glob("merges*")):
        file.unlink()
    with pytest.raises(ValueError, match=r"holds none of tokenizer\.json, vocab\.json, vocab\.txt"):
        prepared(kind(folder))


def test_parts_that_do_not_fit_are_refused_before_a_run(tmp_path: Path) -> None:
    folder = write_aesthetic(tmp_path)
    with pytest.raises(ValueError, match=r"--?clip|checkpoint no/such/clip does not exist"):
        prepared(Aesthetic(folder, clip="no/such/clip"))  # what is named is not passed over
    head = next(tmp_path.glob("*.pth"))
    torch.save(torch.load(head) | {"layers.0.weight": torch.ones(32, 17)}, head)
    with pytest.raises(ValueError, match=r"needs 17 features, but checkpoint \S+ gives 16"):
        prepared(Aesthetic(folder))
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its processor crops to 56 pixels, its network takes 28"):
        prepared(PickScore(folder))
    with pytest.raises(ValueError, match="checkpoint /dev/null is neither a file nor a folder"):
        prepared(CLIP("/dev/null"))


PUBLISHED: dict[str, tuple[Any, str]] = {
    "hps": (HPS(), "checkpoint xswu/HPSv2:HPS_v2.1_compressed.pt"),
    "clip": (CLIP(), "checkpoint apple/DFN5B-CLIP-ViT-H-14"),
    "pickscore": (PickScore(), "checkpoint yuvalkirstain/PickScore_v1"),
    "aesthetic": (Aesthetic(), "checkpoint trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"),
    "imagereward": (ImageReward(), "checkpoint THUDM/ImageReward"),
    "dinov2": (DINOv2(), "checkpoint facebook/dinov2-large-imagenet1k-1-layer"),
}
WANTED = {
    "hps": "HPS_v2.1_compressed.pt",
    "clip": "open_clip_config.json or config.json",
    "pickscore": "config.json",
    "aesthetic": "aesthetic-model.pth",
    "imagereward": "ImageReward.pt",
    "dinov2": "config.json",
}


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A hub whose address answers no one, and an empty cache of it."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub._silence.cache_clear()
    yield address
    hub._silence.cache_clear()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_without_a_connection(silent_hub: str, name: str) -> None:
    """Refused at once, by the file and the flag that can name another one."""
    reward, checkpoint = PUBLISHED[name]
    rewards = Rewards({name: (1.0, reward)}, {name: Chosen("eval_rewards", name, name, 1.0, type(reward)).key})
    start = time.monotonic()
    with pytest.raises(ConfigError) as error:
        rewards.prepare(CPU, torch.float32)
    assert time.monotonic() - start < 5  # not the half minute that the hub's library tries for
    assert re.fullmatch(
        f"reward '{name}': {checkpoint} is no local path and cannot be fetched from the hub: {re.escape(WANTED[name])} "
        rf"\({silent_hub} does not answer: .*\); download it and give its local path with --eval_{name}_checkpoint",
        str(error.value),
    )


def test_the_second_part_of_a_checkpoint_without_a_connection(silent_hub: str, tmp_path: Path) -> None:
    head = next(Path(write_aesthetic(tmp_path)).glob("*.pth"))
    said = r"openai/clip-vit-large-patch14 is no local path and .* give its local path as 'clip'$"
    with pytest.raises(MissingFile, match=said):
        Aesthetic(str(head)).prepare(CPU, torch.float32)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (HPS, "HPS_v2.1_compressed.pt"),
        (CLIP, "open_clip_model.safetensors"),
        (PickScore, "model.safetensors"),
        (Aesthetic, "sac+logos+ava1-l14-linearMSE.pth"),
        (DINOv2, "model.safetensors"),
    ],
)
def test_bad_checkpoints_are_one_clear_line(tmp_path: Path, kind: type, weights: str) -> None:
    folder = Path(WRITERS[kind](tmp_path / "it")) if kind is not HPS else Path(write_hps(tmp_path))
    path = folder / weights
    safe = weights.endswith(".safetensors")

    def refusal(checkpoint: Path | str = folder) -> str:
        with pytest.raises(ValueError, match="checkpoint") as caught:
            kind(str(checkpoint)).prepare(CPU, torch.float32)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for absent in ("no/such/folder", "runs/absent.pt"):  # without asking the hub
        assert f"checkpoint {absent} does not exist" in refusal(absent)
    good = load_file(path) if safe else torch.load(path)
    good = good.get("state_dict", good)
    names = sorted(good)[:5]
    for added in ([], ["z1", "z2"]):
        state = {name: value for name, value in good.items() if name not in names} | {n: torch.ones(1) for n in added}
        save_file(state, path, {"format": "pt"}) if safe else torch.save({"state_dict": state}, path)
        message = refusal()
        assert f"5 missing ({', '.join(names[:3])})" in message
        assert ("2 unexpected (z1, z2)" in message) == bool(added)
    path.write_bytes(path.read_bytes()[:1000])
    of_transformers = kind in (DINOv2, PickScore)
    assert str(folder if of_transformers else path) in refusal()
    if not of_transformers:
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
        assert "is a Git LFS pointer; fetch the file itself" in refusal()
    path.unlink()
    assert str(folder) in refusal()
    pickled = folder / ("pytorch_model.bin" if of_transformers else "weights.pt")
    torch.save({"state_dict": Malicious(tmp_path / "owned")}, pickled)
    assert "holds more than tensors, which DMDR does not load" in refusal()
    assert not (tmp_path / "owned").exists()


def test_shapes_configurations_and_first_use_are_checked(tmp_path: Path) -> None:
    folder = Path(write_clip(tmp_path))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = (
        42  # open_clip itself would silently resize the position embedding
    )
    for broken, problem in (
        (config, r"1 of another shape \(visual.positional_embedding \(5, 32\) for \(10, 32\)\)"),
        (
            {"model_cfg": clip_config(), "preprocess_cfg": {"interpolation": "bilinear"}},
            "preprocess_cfg is not supported",
        ),
        ({"model_cfg": clip_config(custom_text=True)}, "is no plain CLIP"),
        ({"embed_dim": 16}, "no configuration of open_clip"),
    ):
        (folder / "open_clip_config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=problem):
            prepared(CLIP(str(folder)))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match=r"is a folder without open_clip_config.json; add it"):
        prepared(CLIP(str(folder)))
    for kind in (CLIP, PickScore, Aesthetic, DINOv2):
        with pytest.raises(RuntimeError, match="call prepare"):
            kind()(pixels(1), PROMPTS[:1], label=[0])
        with pytest.raises(ValueError, match="not 'nearest'"):
            kind(resize="nearest")  # type: ignore[arg-type]


class Fake:
    """Scores the mean of the red channel, or does what it is told."""

    differentiable = True

    def __init__(self, result: Any = None, differentiable: bool = True) -> None:
        self.result, self.differentiable = result, differentiable

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.result == "bad":
            raise ValueError("no such\nfile")

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        if isinstance(self.result, BaseException):
            raise self.result
        return images[:, 0].mean((1, 2)) if self.result is None else self.result


def test_rewards_add_up_and_stay_visible() -> None:
    nan = torch.tensor([0.5, float("nan"), -2.0])
    rewards = Rewards({"red": (0.3, Fake()), "other": (2.0, Fake(nan))})
    images = pixels(3).requires_grad_()
    scores = rewards.each(images, PROMPTS, label=LABELS)
    torch.testing.assert_close(scores["red"], images[:, 0].mean((1, 2)))
    assert scores["other"] is nan
    total = rewards(images, PROMPTS, label=LABELS)
    torch.testing.assert_close(total, 0.3 * scores["red"] + 2 * nan, equal_nan=True)
    total[0].backward()
    torch.testing.assert_close(images.grad[0, 0], torch.full((SIZE, SIZE), 0.3 / SIZE**2))
    assert isinstance(rewards, Reward)
    assert rewards.differentiable
    assert not Rewards({"red": (1.0, Fake()), "judge": (1.0, Fake(differentiable=False))}).differentiable
    rewards.require_finite(scores)
    with pytest.raises(RewardError, match="'other' has scored none of 2 images"):
        rewards.require_finite({"red": nan, "other": torch.tensor([float("nan"), float("inf")])})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (KeyError("x\ny"), rf"reward 'odd' failed: KeyError: 'x\ny' ({__file__}, line LINE)"),
        (SystemExit(3), f"reward 'odd' failed: SystemExit: 3 ({__file__}, line LINE)"),
        (GeneratorExit(), f"reward 'odd' failed: GeneratorExit ({__file__}, line LINE)"),
        (StopIteration("on"), f"reward 'odd' failed: StopIteration: on ({__file__}, line LINE)"),
        ({"a": 1.0}, "reward 'odd' returned dict; expected torch.float32 [3]"),
        (
            torch.zeros(3, dtype=torch.complex64),
            "reward 'odd' returned torch.complex64 [3]; expected torch.float32 [3]",
        ),
        (OSError("a\n b"), f"reward 'odd' failed: OSError: a b ({__file__}, line LINE)"),
        (torch.zeros(3, 1), r"reward 'odd' returned torch.float32 [3, 1]; expected torch.float32 [3]"),
        (torch.zeros(3).double(), "reward 'odd' returned torch.float64 [3]; expected torch.float32 [3]"),
        (0.5, "reward 'odd' returned float; expected torch.float32 [3]"),
    ],
)
def test_a_reward_that_breaks_is_named(result: Any, message: str) -> None:
    rewards = Rewards({"red": (1.0, Fake()), "odd": (1.0, Fake(result))})
    expected = re.escape(message).replace("LINE", r"\d+")  # of the user's file that raised
    with pytest.raises(RewardError, match=f"^{expected}$"):
        rewards.each(pixels(3), PROMPTS)


def test_bad_settings_columns_and_sums_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^reward 'odd': no such file$"):
        Rewards({"odd": (1.0, Fake("bad"))}).prepare(CPU, torch.float32)
    with pytest.raises(ValueError, match="at least one"):
        Rewards({})
    rewards = Rewards({"dinov2": (1.0, DINOv2(write_dinov2(tmp_path)))})
    rewards.prepare(CPU, torch.float32)
    with pytest.raises(ValueError, match="3 images, but 2 label"):
        rewards.each(pixels(3), PROMPTS, label=LABELS[:2])
    with pytest.raises(RewardError, match="'dinov2' failed: ValueError: the prompts have no column 'label'"):
        rewards.each(pixels(3), PROMPTS)
    with pytest.raises(RewardError, match="the label 5 must be between 0 and 4"):
        rewards.each(pixels(3), PROMPTS, label=[0, 1, 5])
    with pytest.raises(RewardError, match="the column 'label' is not all integers"):
        rewards.each(pixels(3), PROMPTS, label=[0, 1, "cat"])
