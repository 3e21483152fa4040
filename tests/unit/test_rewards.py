import json
import os
import re
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from transformers import Dinov2Config, Dinov2ForImageClassification

from dmdr.protocols import FeatureReward, Reward
from dmdr.rewards import RewardError, Rewards
from dmdr_rewards.clip import CLIP
from dmdr_rewards.dinov2 import DINOv2
from dmdr_rewards.hps import HPS
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


@pytest.mark.parametrize("processor", [None, {"crop_size": {"height": 14, "width": 14}, "size": {"shortest_edge": 20}}])
def test_dinov2_gives_the_log_probability_of_the_label(tmp_path: Path, processor: dict[str, Any] | None) -> None:
    folder, side, edge = write_dinov2(tmp_path), (14 if processor else SIZE), (20 if processor else 32)
    if processor:  # the published config.json says 518 pixels, and its preprocessor_config.json 224
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = Dinov2ForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    images = pixels(3, 41, 63)
    squashed = TF.resize(images, [side, side], TF.InterpolationMode.BICUBIC, antialias=True)
    cropped = TF.center_crop(TF.resize(images, edge, TF.InterpolationMode.BICUBIC, antialias=True), side)
    for resize_mode, seen in (("squash", squashed), ("crop", cropped)):
        with torch.no_grad():
            logits = model(TF.normalize(seen.clamp(0, 1), *IMAGENET_NORM)).logits
        ours = prepared(DINOv2(folder, resize=resize_mode))(images, PROMPTS, label=LABELS)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, -F.cross_entropy(logits, torch.tensor(LABELS), reduction="none"))


@pytest.mark.parametrize("kind", [HPS, CLIP, DINOv2])
def test_gradients_reach_every_pixel_and_are_right(tmp_path: Path, kind: type) -> None:
    reward = prepared(kind(WRITERS[kind](tmp_path)))
    assert kind().differentiable
    order = torch.tensor([2, 0, 1])

    def score(images: Tensor, rows: Sequence[int] = (0, 1, 2)) -> Tensor:
        return reward(images, [PROMPTS[i] for i in rows], label=[LABELS[i] for i in rows])

    images = (0.25 + 0.5 * pixels(3, 40, 33)).requires_grad_()
    assert not score(images.detach()).requires_grad  # the weights are frozen
    (grad,) = torch.autograd.grad(score(images).sum(), images)
    direction = grad / grad.norm()
    with torch.no_grad():
        slope = (score(images + 0.02 * direction) - score(images - 0.02 * direction)).double().sum() / 0.04
        torch.testing.assert_close(slope.float(), grad.norm(), rtol=3e-3, atol=0)
        torch.testing.assert_close(score(images[order], order.tolist()), score(images)[order])
    black_and_white = images.detach().gt(0.5).float().requires_grad_()
    (grad,) = torch.autograd.grad(score(black_and_white).sum(), black_and_white)
    assert (grad != 0).float().mean() > 0.99

    half = prepared(kind(reward.checkpoint), torch.bfloat16)
    close = half(images, PROMPTS, label=LABELS)
    assert close.dtype == torch.float32
    assert 0 < (close - score(images)).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):  # precision is what `prepare` was told, not what the caller runs in
        inside = score(images)
    torch.testing.assert_close(inside, score(images), rtol=0, atol=0)


def test_prompts_are_encoded_once_and_their_features_survive_inference_mode(tmp_path: Path) -> None:
    reward = prepared(CLIP(write_clip(tmp_path)))
    encoded: list[int] = []
    encode = reward.towers._model.encode_text
    reward.towers._model.encode_text = lambda tokens: encoded.append(len(tokens)) or encode(tokens)
    with torch.inference_mode():
        first = reward.text_features([*PROMPTS, *PROMPTS])
    assert encoded == [3]
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(6))
    images = pixels(3).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert encoded == [3]
    many = [f"prompt {i}" for i in range(4097)]
    assert len(reward.text_features(many)) == 4097
    reward.text_features([many[0], PROMPTS[0], many[-1]])
    assert encoded == [3, 4097, 2]  # the two that were used least recently had gone
    for prompts in ([many[3]], ["new"], [many[3]]):
        reward.text_features(prompts)
    assert encoded == [3, 4097, 2, 1]
    assert isinstance(reward, FeatureReward)


def test_construction_is_cheap() -> None:
    code = (
        "import sys; from dmdr_rewards import clip, dinov2, hps; clip.CLIP('x'), dinov2.DINOv2('x'), hps.HPS('x');"
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

    def download(repo: str, name: str) -> str:
        if name.endswith(".safetensors"):
            raise EntryNotFoundError(name)
        fetched.append(f"{repo}:{name}")
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    if architecture:
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, clip_config())
    score = prepared(kind())(pixels(3), PROMPTS)
    assert fetched == files
    torch.testing.assert_close(score, prepared(kind(str(folder)))(pixels(3), PROMPTS))


def test_a_bare_clip_file_is_quick_gelu_and_squashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_clip(tmp_path, quick_gelu=True)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14-quickgelu", clip_config(quick_gelu=True))
    state = load_file(f"{folder}/open_clip_model.safetensors")  # as DataParallel saves it
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "bare.pt")
    bare = prepared(CLIP(str(tmp_path / "bare.pt")))(pixels(3, 20, 50), PROMPTS)
    torch.testing.assert_close(bare, prepared(CLIP(folder))(pixels(3, 20, 50), PROMPTS))


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [(HPS, "HPS_v2.1_compressed.pt"), (CLIP, "open_clip_model.safetensors"), (DINOv2, "model.safetensors")],
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
    good = load_file(path) if safe else torch.load(path)["state_dict"]
    names = sorted(good)[:5]
    for added in ([], ["z1", "z2"]):
        state = {name: value for name, value in good.items() if name not in names} | {n: torch.ones(1) for n in added}
        save_file(state, path, {"format": "pt"}) if safe else torch.save({"state_dict": state}, path)
        message = refusal()
        assert f"5 missing ({', '.join(names[:3])})" in message
        assert ("2 unexpected (z1, z2)" in message) == bool(added)
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path if kind is not DINOv2 else folder) in refusal()
    path.unlink()
    assert str(folder) in refusal()
    pickled = folder / ("pytorch_model.bin" if kind is DINOv2 else "weights.pt")
    torch.save({"state_dict": Malicious(tmp_path / "owned")}, pickled)
    assert "holds more than tensors and is refused" in refusal()
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
    with pytest.raises(ValueError, match=r"has no open_clip_config.json; add it"):
        prepared(CLIP(str(folder)))
    for kind in (CLIP, DINOv2):
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
        if isinstance(self.result, Exception):
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
    with pytest.raises(RewardError, match="'other' has no finite score among the 2 of"):
        rewards.require_finite({"red": nan, "other": torch.tensor([float("nan"), float("inf")])})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (KeyError("x\ny"), r"reward 'odd' failed: KeyError: 'x\ny'"),
        (OSError("a\n b"), "reward 'odd' failed: OSError: a b"),
        (torch.zeros(3, 1), r"reward 'odd' returned torch.float32 [3, 1]; expected torch.float32 [3]"),
        (torch.zeros(3).double(), "reward 'odd' returned torch.float64 [3]; expected torch.float32 [3]"),
        (0.5, "reward 'odd' returned float; expected torch.float32 [3]"),
    ],
)
def test_a_reward_that_breaks_is_named(result: Any, message: str) -> None:
    rewards = Rewards({"red": (1.0, Fake()), "odd": (1.0, Fake(result))})
    with pytest.raises(RewardError, match=f"^{re.escape(message)}$"):
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
    with pytest.raises(RewardError, match="the label 5 is not one of the classifier's 0 to 4"):
        rewards.each(pixels(3), PROMPTS, label=[0, 1, 5])
    with pytest.raises(RewardError, match="the column 'label' is not all integers"):
        rewards.each(pixels(3), PROMPTS, label=[0, 1, "cat"])
