"""Rewards at their published size, with random weights in the published layouts: they load, score, and fit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmdr_digits.text import build_tokenizer

pytestmark = pytest.mark.verify

GIB = 2**30
SCORE = """
import sys, torch
from dmdr.settings import registry
from dmdr.rewards import Rewards
from dmdr.run.pace import peak_memory

name, options = sys.argv[1], dict(pair.split("=", 1) for pair in sys.argv[2:])
rewards = Rewards({name: (1.0, registry.load("rewards", name)(**options))})
rewards.prepare(torch.device("cpu"), torch.float32)
images = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)).requires_grad_()
score = rewards(images, ["a red fox"], label=[3])
score.sum().backward()
assert score.isfinite().all() and images.grad.isfinite().all() and images.grad.any()

def pictures(height, width):
    # 1/f noise, like photographs, and bars of black and white; in steps of 8 bits
    torch.manual_seed(height)
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width) ** 2).sqrt().clamp_min(1 / height)
    noise = torch.fft.ifft2(torch.fft.fft2(torch.randn(3, height, width)) / frequency).real
    bars = (torch.arange(width) // 12 % 2).float().expand(3, height, width)
    return (torch.stack([(noise / noise.std() / 5 + 0.5).clamp(0, 1), bars]) * 255).round() / 255

if hasattr(rewards.parts[name][1], "resize"):
    found = {}
    for method in ("float", "exact"):
        rewards.parts[name][1].resize = method
        with torch.no_grad():
            pairs = [pictures(*size) for size in ((512, 512), (768, 512), (512, 768))]
            found[method] = torch.stack([rewards(pair, ["a red fox"] * 2, label=[3, 3]) for pair in pairs])
    photographs, bars = (found["float"] - found["exact"]).abs().amax(0).tolist()
    print(f"{name}: float differs from exact by {photographs:.1e} (photographs) and {bars:.1e} (bars)")
    scale = getattr(rewards.parts[name][1], "scale", 1.0)
    bounds = {"clip": 4e-5, "pickscore": 2e-5 * scale, "aesthetic": 3e-5, "imagereward": 1e-3, "dinov2": 2e-3}
    assert max(photographs, bars) <= bounds[name]  # what the docstrings say
print(peak_memory(torch.device("cpu")))
"""


def write_hps(folder: Path) -> dict[str, str]:
    import open_clip

    model = open_clip.create_model("ViT-H-14")
    state = model.state_dict()
    assert sum(value.numel() for value in model.parameters()) == 986_109_441
    torch.save({"state_dict": {name: value.half() for name, value in state.items()}}, folder / "HPS_v2.1_compressed.pt")
    return {"checkpoint": str(folder / "HPS_v2.1_compressed.pt")}


def write_clip(folder: Path) -> dict[str, str]:
    import open_clip

    torch.save(open_clip.create_model("ViT-H-14-quickgelu").state_dict(), folder / "open_clip_pytorch_model.bin")
    return {"checkpoint": str(folder / "open_clip_pytorch_model.bin")}


def write_pickscore(folder: Path) -> dict[str, str]:
    return {"checkpoint": write_transformers_clip(folder, width=1280, layers=32, text=1024, text_layers=24, out=1024)}


def write_aesthetic(folder: Path) -> dict[str, str]:
    write_transformers_clip(folder, width=1024, layers=24, text=768, text_layers=12, out=768)
    sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    state = {f"layers.{i}.weight": torch.randn(out, width) / width**0.5 for i, (width, out) in sizes.items()}
    state |= {f"layers.{i}.bias": torch.randn(out) for i, (_, out) in sizes.items()}
    assert sum(value.numel() for value in state.values()) == 927_969
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return {"checkpoint": str(folder)}


def write_transformers_clip(folder: Path, *, width: int, layers: int, text: int, text_layers: int, out: int) -> str:
    from transformers import CLIPConfig, CLIPModel

    tower = {"intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 16, "patch_size": 14}
    words = {"intermediate_size": 4 * text, "num_hidden_layers": text_layers, "num_attention_heads": text // 64}
    config = CLIPConfig(
        vision_config={"hidden_size": width, "hidden_act": "gelu", **tower},
        text_config={"hidden_size": text, "hidden_act": "gelu", **words},
        projection_dim=out,
    )
    CLIPModel(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def write_imagereward(folder: Path) -> dict[str, str]:
    script = Path(__file__).parents[1] / "plugins" / "parity" / "image_reward" / "checkpoint.py"
    subprocess.run([sys.executable, str(script), "--full", str(folder)], check=True)
    return {"checkpoint": str(folder)}


def write_dinov2(folder: Path) -> dict[str, str]:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=518, num_labels=1000
    )
    model = Dinov2ForImageClassification(config)
    assert sum(value.numel() for value in model.parameters()) == 306_417_640
    model.save_pretrained(folder)
    return {"checkpoint": str(folder)}


WRITERS = [write_hps, write_clip, write_pickscore, write_aesthetic, write_imagereward, write_dinov2]


@pytest.mark.parametrize("write", WRITERS)
def test_a_published_size_loads_and_scores(tmp_path: Path, write: Callable[[Path], dict[str, str]]) -> None:
    name = write.__name__.removeprefix("write_")
    options = [f"{key}={value}" for key, value in write(tmp_path).items()]
    found = subprocess.run([sys.executable, "-c", SCORE, name, *options], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    *deviation, peak = found.stdout.splitlines()
    print(*deviation, sep="\n")
    print(f"{name}: peak memory of loading, scoring and the gradient of one image {int(peak) / GIB:.1f} GiB")
    assert int(peak) < 24 * GIB
