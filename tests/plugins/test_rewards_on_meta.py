"""Rewards on the meta device, as --dry_run prepares them: the network's architecture, and neither weights nor a hub."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmdr import hub
from dmdr.dry_run.memory import GPUKernels, Meter, autocast
from dmdr.errors import ConfigError
from dmdr.protocols import FeatureReward
from dmdr.rewards import Rewards
from dmdr_digits import Digits
from dmdr_rewards.aesthetic import Aesthetic
from dmdr_rewards.clip import CLIP
from dmdr_rewards.dinov2 import DINOv2
from dmdr_rewards.hps import HPS
from dmdr_rewards.imagereward import ImageReward
from dmdr_rewards.pickscore import PickScore

KINDS: dict[str, Any] = {
    "hps": HPS,
    "clip": CLIP,
    "pickscore": PickScore,
    "aesthetic": Aesthetic,
    "imagereward": ImageReward,
    "dinov2": DINOv2,
}
PROMPTS, LABELS = ["a seven", "a photo of the number two", "a seven"], [7, None, 2]
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and no way to fill it or to ask whether the hub is there."""

    def refuse(*given: Any, **options: Any) -> None:
        raise AssertionError("the hub was asked")

    for module, name in (("huggingface_hub", "hf_hub_download"), ("torch.hub", "download_url_to_file")):
        monkeypatch.setattr(f"{module}.{name}", refuse)
    monkeypatch.setattr(hub, "unreachable", refuse)
    monkeypatch.setattr("dmdr_rewards.checkpoint.unreachable", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def prepared(reward: Any, device: torch.device = META, dtype: torch.dtype = torch.float32) -> Any:
    reward.prepare(device, dtype)
    return reward


def tensors(reward: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a reward's networks."""
    parts = {**vars(reward), "towers": getattr(getattr(reward, "_towers", None), "_model", None)}
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    found = [(f"{of}.{n}", t) for of, m in modules.items() for n, t in (*m.named_parameters(), *m.named_buffers())]
    assert found
    return dict(found)


def described(reward: Any) -> dict[str, Any]:
    return {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors(reward).items()}


def count(reward: Any) -> int:
    return sum(tensor.numel() for tensor in tensors(reward).values() if isinstance(tensor, nn.Parameter))


def score(reward: Any, height: int = 40, width: int = 33) -> Tensor:
    """Scores of three images, whose gradient has been taken."""
    images = torch.empty(3, 3, height, width, device=META, requires_grad=True)
    scores = reward(images, PROMPTS, label=LABELS)
    scores.sum().backward()
    assert scores.is_meta and scores.shape == (3,) and scores.dtype == torch.float32
    assert images.grad is not None and images.grad.is_meta and images.grad.shape == images.shape
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_the_network_is_that_of_the_checkpoint(digits: Digits, name: str, dtype: torch.dtype) -> None:
    folder = str(digits.reward_checkpoint(name))
    weightless, loaded = prepared(KINDS[name](folder), META, dtype), prepared(KINDS[name](folder), CPU, dtype)
    assert all(tensor.is_meta for tensor in tensors(weightless).values())
    assert described(weightless) == described(loaded)
    assert count(weightless) == count(loaded) > 10_000


@pytest.mark.parametrize("name", KINDS)
def test_scores_have_gradients(digits: Digits, name: str) -> None:
    folder = str(digits.reward_checkpoint(name))
    exact = {"resize": "exact"} if "resize" in vars(KINDS[name]()) else {}
    score(prepared(KINDS[name](folder, chunk_size=2, gradient_checkpointing=True, **exact), META, torch.bfloat16))
    reward, loaded = (prepared(KINDS[name](folder), device) for device in (META, CPU))
    if isinstance(reward, FeatureReward):
        for found, expected in (
            (
                reward.image_features(torch.empty(3, 3, 40, 33, device=META)),
                loaded.image_features(torch.rand(3, 3, 40, 33)),
            ),
            (reward.text_features(PROMPTS), loaded.text_features(PROMPTS)),
        ):
            assert found.is_meta and (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("name", KINDS)
def test_in_a_dry_run_the_precision_is_the_rewards_own(digits: Digits, name: str) -> None:
    folder = str(digits.reward_checkpoint(name))
    kept: list[torch.dtype] = []
    with Meter() as meter, GPUKernels():
        reward = prepared(KINDS[name](folder))
        meter.label(name, tensors(reward).values())
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t)
        with autocast(torch.bfloat16), hooks:
            score(reward)
        assert meter.now[name] == sum(tensor.untyped_storage().nbytes() for tensor in tensors(reward).values())
    assert torch.bfloat16 not in kept


@pytest.mark.parametrize(
    ("reward", "parameters", "gib"),
    [
        (HPS(), 986_109_441, 1.93),  # embeddings and norms stay float32
        (CLIP(), 986_109_441, 1.93),
        (PickScore(), 986_109_441, 1.84),
        (Aesthetic(), 303_966_209 + 927_969, 0.57),  # image tower, projection and scale of the 427,616,513; head
        (ImageReward(), 446_665_953 - 256 * (1024 + 1 + 768 + 1), 0.83),  # two layers of BLIP are not used
        (DINOv2(), 306_417_640, 0.57),
        (DINOv2("dinov2_vitl14_lc"), 308_349_928, 0.57),
    ],
)
def test_a_published_network_is_known(reward: Any, parameters: int, gib: float) -> None:
    with Meter(), GPUKernels():  # which answers sooner
        prepared(reward, META, torch.bfloat16)
        assert count(reward) == parameters
        assert sum(tensor.nbytes for tensor in tensors(reward).values()) / 2**30 == pytest.approx(gib, abs=0.005)
        score(reward, 64, 80)


def test_of_torch_hub_the_shapes_say_the_architecture(tmp_path: Path) -> None:
    width = 64
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 1 + 37 * 37, width), "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
        "blocks.0.attn.qkv.weight": (3 * width, width), "blocks.0.attn.qkv.bias": (3 * width,),
        "blocks.0.attn.proj.weight": (width, width), "blocks.0.attn.proj.bias": (width,),
        "blocks.0.mlp.fc1.weight": (4 * width, width), "blocks.0.mlp.fc1.bias": (4 * width,),
        "blocks.0.mlp.fc2.weight": (width, 4 * width), "blocks.0.mlp.fc2.bias": (width,),
    }  # fmt: skip
    vectors = ("ls1.gamma", "ls2.gamma", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    torch.save(state | {f"blocks.0.{name}": torch.ones(width) for name in vectors}, tmp_path / "a_pretrain.pth")
    torch.save({"weight": torch.ones(10, 2 * width), "bias": torch.ones(10)}, tmp_path / "a_linear_head.pth")
    weightless, loaded = (prepared(DINOv2(str(tmp_path)), device) for device in (META, CPU))
    assert all(tensor.is_meta for tensor in tensors(weightless).values())
    assert described(weightless) == described(loaded)
    score(weightless)
    torch.save({"weight": torch.ones(10, 2 * width)}, tmp_path / "a_linear_head.pth")
    with pytest.raises(ConfigError, match=r"_head\.pth does not fit its architecture: 1 missing \(bias\)"):
        prepared(DINOv2(str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "settings", "option"),
    [
        (HPS, {"checkpoint": "some/hps:weights.pt"}, "checkpoint"),
        (CLIP, {"checkpoint": "some/clip"}, "checkpoint"),
        (PickScore, {"checkpoint": "some/clip"}, "checkpoint"),
        (Aesthetic, {"checkpoint": "some/head:head.pth"}, "checkpoint"),
        (Aesthetic, {"clip": "some/clip"}, "clip"),
        (ImageReward, {"checkpoint": "some/blip"}, "checkpoint"),
        (ImageReward, {"tokenizer": "some/words"}, "tokenizer"),
        (DINOv2, {"checkpoint": "some/dinov2"}, "checkpoint"),
    ],
)
def test_what_is_neither_known_nor_here_is_refused(kind: Any, settings: dict[str, str], option: str) -> None:
    name = settings[option]
    line = rf"checkpoint {name} cannot be built without its files: .* is not in the hub's cache here; .*'{option}'"
    with pytest.raises(ConfigError, match=line) as caught:
        Rewards({"it": (1.0, kind(**settings))}).prepare(META, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_cached_configuration_is_enough(digits: Digits, no_hub: Path) -> None:
    folder = digits.reward_checkpoint("dinov2")
    assert folder
    cached = no_hub / "models--some--one"
    shutil.copytree(folder, cached / "snapshots" / "abc", ignore=shutil.ignore_patterns("model.safetensors"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    weightless = prepared(DINOv2("some/one"))
    assert described(weightless) == described(prepared(DINOv2(str(folder)), CPU))
    score(weightless)


def test_another_model_is_refused(digits: Digits) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be built as CLIPModel \(ValueError: its config.json is of a dinov2\)"
    ):
        prepared(PickScore(str(digits.reward_checkpoint("dinov2"))))
