"""What `evaluate` says of images, and image files: the rounding of diffusers, grids."""

import errno
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from dmdr.evaluation.evaluate import Evaluation, evaluate
from dmdr.images import embed, image_grid, save, to_pil
from dmdr.metrics import (
    frechet_distance,
    neighbours,
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class PixelJudge:
    """Sees the first pixel column; an image is correct where its mean is above its prompt."""

    def __init__(self, real: Tensor) -> None:
        self.real = real

    def features(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return images[:, 0, :, 0]

    embed = features

    def correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images.mean((1, 2, 3)) > torch.tensor([float(p) for p in prompts])).float()

    def reference(self) -> Tensor:
        return self.real


class TwoRewards:
    """`mean` is NaN for the images of prompt 1; `column` returns the column `label`."""

    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        asked = torch.tensor([float(p) for p in prompts])
        mean = torch.where(asked == 1, torch.nan, images.mean((1, 2, 3)))
        return {"mean": mean, "column": torch.tensor(columns["label"])}

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        return 2 * scores["mean"] + scores["column"]


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_evaluate(chunk: int, generator: torch.Generator) -> None:
    real, images = torch.rand(2, 20, 3, 4, 4, generator=generator)
    prompts = ["0"] * 15 + ["1"] * 5
    label = [float(i) for i in range(20)]
    metrics = evaluate(images, prompts, {"label": label}, PixelJudge(real), TwoRewards(), chunk=chunk).metrics
    assert set(metrics) == {
        *("accuracy", "frechet_distance", "precision", "recall"),
        *("reward/mean", "reward/column", "reward/total"),
    }
    means = images[:15].mean((1, 2, 3))
    features = real[:, 0, :, 0], images[:, 0, :, 0]
    assert metrics["accuracy"] == 0.75
    assert metrics["frechet_distance"] == frechet_distance(*features)
    near = neighbours(*features)
    assert (metrics["precision"], metrics["recall"]) == (near.precision, near.recall)
    assert metrics["reward/mean"] == pytest.approx(means.mean().item())  # NaN of prompt 1 is left out
    assert metrics["reward/column"] == 9.5
    assert metrics["reward/total"] == pytest.approx((2 * means + torch.arange(15.0)).mean().item())


def test_evaluate_without_judge_rewards_or_enough_images(generator: torch.Generator) -> None:
    images = torch.rand(3, 3, 4, 4, generator=generator)
    judge, columns = PixelJudge(images), {"label": [1.0, 2.0, 3.0]}
    assert evaluate(images, ["0"] * 3, {}, None, None) == Evaluation({}, {})
    assert evaluate(images, ["0"] * 3, {}, judge, None).metrics == {"accuracy": 1.0}
    metrics = evaluate(images, ["1"] * 3, columns, None, TwoRewards()).metrics
    assert metrics["reward/column"] == 2.0
    assert math.isnan(metrics["reward/mean"])
    with pytest.raises(ValueError, match="3 images to evaluate, 2 prompts, 4 label"):
        evaluate(images[:3], ["0"] * 2, {"label": [0.0] * 4}, judge, None)
    with pytest.raises(ValueError, match="0 images"):
        evaluate(images[:0], [], {}, judge, None)


def test_to_pil_rounds_as_diffusers_does(generator: torch.Generator) -> None:
    images = torch.rand(3, 3, 5, 7, generator=generator)
    images[0].flatten()[:6] = (torch.arange(6) + 0.5) / 255  # ties
    for dtype in (torch.float32, torch.bfloat16):
        stock = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images.to(dtype)))
        ours = to_pil(images.clone().requires_grad_().to(dtype))
        assert [i.size for i in ours] == [(7, 5)] * 3
        assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(ours, stock, strict=True))
    assert np.array(to_pil(torch.tensor([-1.0, 2.0, torch.nan]).reshape(1, 3, 1, 1))[0]).tolist() == [[[0, 255, 0]]]


@pytest.mark.parametrize(
    ("shape", "columns", "scale", "size"),
    [
        ((16, 8, 8), None, None, (4 * 50 - 2, 4 * 50 - 2)),  # 8 px cells become 48 px
        ((5, 8, 8), 10, None, (5 * 50 - 2, 48)),
        ((5, 8, 8), 2, 1, (2 * 10 - 2, 3 * 10 - 2)),
        ((3, 20, 30), None, None, (2 * 92 - 2, 2 * 62 - 2)),
        ((1, 512, 256), None, None, (256, 512)),
    ],
)
def test_grid_sizes(shape: tuple[int, ...], columns: int | None, scale: int | None, size: tuple[int, int]) -> None:
    count, height, width = shape
    assert image_grid(torch.zeros(count, 3, height, width), columns, scale).size == size


def test_grid_places_images_by_row_with_white_gaps() -> None:
    images = torch.tensor([0.0, 0.2, 0.4]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
    pixels = np.array(image_grid(images, columns=2, scale=2))[..., 0]
    assert [pixels[y, x] for y, x in ((0, 0), (15, 15), (0, 18), (18, 0))] == [0, 0, 51, 102]
    assert (pixels[:, 16:18] == 255).all()
    assert (pixels[16:, 18:] == 255).all()
    for bad in ({"columns": 0}, {"scale": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            image_grid(images, **bad)
    with pytest.raises(ValueError, match="at least one"):
        image_grid(images[:0])
    with pytest.raises(ValueError, match="must be"):
        image_grid(images[:, :1])


def test_save_is_complete_or_absent_and_embed_bounds_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples" / "step-000001.png"
    save(image_grid(torch.zeros(1, 3, 8, 8)), path)
    with Image.open(path) as image:
        assert image.size == (48, 48)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        save(image_grid(torch.ones(1, 3, 8, 8)), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    assert embed(path)[1:] == (48, 48)
    uri, *size = embed(path, max_width=24)
    assert uri.startswith("data:image/jpeg;base64,")
    assert size == [24, 24]


def test_only_a_judge_with_probabilities_gives_an_inception_score(generator: torch.Generator) -> None:
    class SureJudge(PixelJudge):
        def probabilities(self, images: Tensor) -> Tensor:
            return torch.eye(3)[torch.arange(len(images)) % 3]

    real, images = torch.rand(2, 6, 3, 2, 2, generator=generator)
    with_, without = (
        evaluate(images, ["0"] * 6, {}, kind(real), None, chunk=3).metrics for kind in (SureJudge, PixelJudge)
    )
    assert with_.pop("inception_score") == pytest.approx(3)
    assert with_ == without


def test_rewards_that_only_measure_are_named_apart(generator: torch.Generator) -> None:
    images, columns = torch.rand(4, 3, 2, 2, generator=generator), {"label": [1.0, 2.0, 3.0, 4.0]}
    trained = evaluate(images, ["0"] * 4, columns, None, TwoRewards()).metrics
    both = evaluate(images, ["0"] * 4, columns, None, TwoRewards(), TwoRewards()).metrics
    assert both == trained | {f"eval_{name}": value for name, value in trained.items()}
