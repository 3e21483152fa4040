"""The authors' own ImageReward behind an address, for `--reward http://HOST:PORT`."""

import argparse

import ImageReward
import torch
from PIL import Image

from dmdr.remote.server import serve

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--checkpoint", default="ImageReward-v1.0", help="ImageReward.pt; left out: fetched from the hub")
parser.add_argument("--med-config", help="the med_config.json beside it; left out: fetched from the hub")
given = parser.parse_args()
model = ImageReward.load(given.checkpoint, med_config=given.med_config)


def score(images: torch.Tensor, prompts: list[str], **columns: list) -> list[float]:
    """[B, 3, H, W] in [0, 1] and B prompts -> B scores; the package resizes 8-bit images."""
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [model.score(prompt, Image.fromarray(array)) for prompt, array in zip(prompts, arrays, strict=True)]


serve(score, host=given.host, port=given.port, name="image-reward")
