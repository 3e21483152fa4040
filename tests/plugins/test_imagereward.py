"""ImageReward against what the authors' package gave for the same random checkpoint; see parity/image_reward."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dmdr_rewards.imagereward import ImageReward, network_of
from dmdr_rewards.preprocess import CLIP_NORM

PARITY = Path(__file__).parent / "parity" / "image_reward"
spec = importlib.util.spec_from_file_location("image_reward_checkpoint", PARITY / "checkpoint.py")
assert spec and spec.loader
sys.modules[spec.name] = checkpoint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checkpoint)

GOLDEN = json.loads((PARITY / "golden.json").read_text())
IMAGES = checkpoint.images(checkpoint.SMALL.image)
PROMPTS = list(checkpoint.PROMPTS)
OWN = [name for name in IMAGES if name.startswith("own")]  # of the network's size: nothing is resized
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imagereward")
    assert checkpoint.write(path) == GOLDEN["weights"], "golden.json is of another checkpoint: run golden.py again"
    return path


def prepared(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> ImageReward:
    reward = ImageReward(str(folder), **settings)
    reward.prepare(CPU, dtype)
    return reward


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def own_batch() -> Tensor:
    return torch.cat([tensor(IMAGES[name]) for name in OWN])


def scored(reward: ImageReward, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of three images, and the gradient of their sum."""
    images = images.clone().requires_grad_()
    scores = reward(images, PROMPTS[: len(images)])
    return scores.detach(), torch.autograd.grad(scores.sum(), images)[0]


@pytest.mark.parametrize("name", IMAGES)
def test_scores_are_those_of_the_authors_package(folder: Path, name: str) -> None:
    expected = torch.tensor(GOLDEN["scores"][name])
    assert expected.std() > 0.1  # the prompt matters, and the empty one is one
    image = tensor(IMAGES[name]).expand(len(PROMPTS), -1, -1, -1)
    # Where images are resized, a pixel or two differ from Pillow's by 1/255; its rounding is absent from "float".
    for resize, resized in (("exact", 2e-4), ("float", 6e-3)):
        scores = prepared(folder, resize=resize)(image, PROMPTS)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5 if name in OWN else resized)


@pytest.mark.parametrize("resize", ["exact", "float", None])
def test_gradients_are_those_of_the_authors_package(folder: Path, resize: Any) -> None:
    reward = prepared(folder, resize=resize)
    assert reward.differentiable
    for name in OWN:
        golden = GOLDEN["gradients"][name]
        image = tensor(IMAGES[name]).requires_grad_()
        score = reward(image, [PROMPTS[golden["prompt"]]])
        gradient = torch.autograd.grad(score.sum(), image)[0] * torch.tensor(CLIP_NORM[1])[:, None, None]
        assert gradient.norm().item() == pytest.approx(golden["norm"], rel=1e-5)
        values = gradient.flatten()[golden["places"]]
        torch.testing.assert_close(values, torch.tensor(golden["values"]), rtol=0, atol=1e-6 * golden["norm"])


def test_gradients_are_right_and_reach_every_pixel(folder: Path) -> None:
    precise = prepared(folder, torch.float64, resize="float")
    images = 0.25 + 0.5 * torch.cat([tensor(IMAGES["512x512"][i : i + 80, 200:270]) for i in (0, 200, 400)]).double()
    scores, gradient = scored(precise, images)
    assert scores.dtype == torch.float64
    torch.manual_seed(0)
    for direction in (gradient / gradient.norm(), torch.randn_like(gradient) / gradient.numel() ** 0.5):
        slope = sum(sign * precise(images + sign * 1e-4 * direction, PROMPTS[:3]) for sign in (1, -1)).sum() / 2e-4
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-6, atol=1e-9)
    order = [2, 0, 1]
    torch.testing.assert_close(precise(images[order], [PROMPTS[i] for i in order]), scores[order])
    assert not precise(images, PROMPTS[:3]).requires_grad  # the weights are frozen

    _, gradient = scored(prepared(folder), own_batch().gt(0.5).float())
    assert (gradient != 0).float().mean() > 0.99  # saturated ones, too


def test_the_exact_resize_has_the_gradient_of_the_cheap_one(folder: Path) -> None:
    exact, cheap = (prepared(folder, resize=resize) for resize in ("exact", "float"))
    torch.testing.assert_close(scored(exact, own_batch())[1], scored(cheap, own_batch())[1], rtol=0, atol=0)
    large = tensor(IMAGES["300x200"])
    ours, theirs = (scored(reward, large)[1] for reward in (exact, cheap))
    assert (ours - theirs).norm() < 0.05 * theirs.norm()  # of a network that is fed slightly other pixels


def test_chunks_and_checkpointing_change_memory_only(folder: Path) -> None:
    found, kept = [], []
    for settings in ({}, {"chunk_size": 2}, {"chunk_size": 2, "gradient_checkpointing": True}):
        sizes: list[int] = []
        reward = prepared(folder, **settings)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            found.append(scored(reward, own_batch()))
        kept.append(sum(sizes))
    for scores, gradient in found[1:]:
        torch.testing.assert_close(scores, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])
    assert kept[2] < kept[0] / 3


def test_half_precision_is_close_and_the_callers_autocast_ignored(folder: Path) -> None:
    expected = prepared(folder)(own_batch(), PROMPTS[:3])
    close = prepared(folder, torch.bfloat16)(own_batch(), PROMPTS[:3])
    assert close.dtype == torch.float32
    assert 0 < (close - expected).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        inside = prepared(folder)(own_batch(), PROMPTS[:3])
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)


def test_prompts_are_cut_and_their_tokenizer_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    reward = prepared(folder)
    image, long = tensor(IMAGES[OWN[0]]), PROMPTS[2]
    expected = reward(image, [long])
    assert torch.equal(reward(image, [f"{long} and a cat"]), expected)
    assert not torch.equal(reward(image, [f"a cat and {long}"]), expected)
    weights, words = tmp_path / "weights", tmp_path / "words"
    shutil.copytree(folder, weights)
    words.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.move(weights / name, words)
    torch.testing.assert_close(prepared(weights, tokenizer=str(words))(image, [long]), expected)


def test_misfits_are_named_as_in_the_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    good = checkpoint.state(checkpoint.SMALL)

    def refusal(change: dict[str, Tensor | None]) -> str:
        state = {name: value for name, value in (good | change).items() if value is not None}
        torch.save(state, tmp_path / checkpoint.WEIGHTS)
        with pytest.raises(ValueError, match="checkpoint") as caught:
            prepared(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    block = "blip.visual_encoder.blocks.1"
    absent = [f"{block}.attn.proj.bias", f"{block}.attn.qkv.weight", f"{block}.norm2.bias"]
    layer = "blip.text_encoder.encoder.layer.0.output.dense.bias"
    missing = f"5 missing ({layer}, {absent[0]}, {absent[1]})"
    absent += [layer, "blip.visual_encoder.norm.weight"]
    assert missing in refusal(dict.fromkeys(absent))
    added = {f"{name}.extra": torch.ones(1) for name in ("blip.text_encoder", "blip.visual_encoder", "a", "b")}
    assert "4 unexpected (a.extra, b.extra, blip.text_encoder.extra)" in refusal(added)
    assert "2 missing (mlp.layers.7.bias, mlp.layers.7.weight)" in refusal(
        dict.fromkeys(["mlp.layers.7.bias", "mlp.layers.7.weight"])
    )
    assert "1 of another shape (blip.visual_encoder.norm.weight (5,) for (128,))" in refusal(
        {"blip.visual_encoder.norm.weight": torch.ones(5)}
    )
    assert "is no ImageReward (it lacks 'blip.visual_encoder.pos_embed')" in refusal(
        {"blip.visual_encoder.pos_embed": None}
    )
    unused = [name for name in good if name.startswith(("blip.vision_proj", "blip.text_proj")) or "_ids" in name]
    assert len(unused) == 5
    torch.save({name: value for name, value in good.items() if name not in unused}, tmp_path / checkpoint.WEIGHTS)
    prepared(tmp_path)


def test_the_published_size_is_built_from_the_shapes_of_its_file() -> None:
    with torch.device("meta"):
        given = {name: torch.empty(shape) for name, shape in checkpoint.shapes(checkpoint.FULL)}
        network = network_of(given, {}, "meta")
    assert sum(value.numel() for value in given.values()) == 446_665_953
    unused = 256 * (1024 + 1 + 768 + 1)
    assert sum(value.numel() for value in network.parameters()) == 446_665_953 - unused
    assert network.size == 224
    assert math.isclose(network.vision.encoder.layers[0].self_attn.scale, 64**-0.5)
    assert len(network.vision.encoder.layers) == 24 and len(network.text.encoder.layer) == 12
