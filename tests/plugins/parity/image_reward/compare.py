"""How far DMDR's ImageReward is from scores and gradients that golden.py wrote.

python compare.py FOLDER GOLDEN
"""

import argparse
import json
from pathlib import Path

import checkpoint
import torch

from dmdr_rewards.imagereward import ImageReward
from dmdr_rewards.preprocess import CLIP_NORM

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare with the package image-reward.")
    parser.add_argument("folder", type=Path, help="the checkpoint that golden.py scored")
    parser.add_argument("golden", type=Path)
    given = parser.parse_args()
    golden = json.loads(given.golden.read_text())
    reward = ImageReward(str(given.folder), chunk_size=1)
    reward.prepare(torch.device("cpu"), torch.float32)
    std = torch.tensor(CLIP_NORM[1])[:, None, None]
    for name, pixels in checkpoint.images(golden["size"]).items():
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        expected = torch.tensor(golden["scores"][name])
        for reward.resize in ("exact", "float"):
            with torch.no_grad():
                scores = reward(image.expand(len(expected), -1, -1, -1), checkpoint.PROMPTS)
            print(f"{name} {reward.resize}: scores differ by at most {(scores - expected).abs().max():.1e}")
        if theirs := golden["gradients"].get(name):
            score = reward(image.requires_grad_(), [checkpoint.PROMPTS[theirs["prompt"]]])
            gradient = torch.autograd.grad(score.sum(), image)[0] * std
            off = (gradient.flatten()[theirs["places"]] - torch.tensor(theirs["values"])).abs().max()
            norm = gradient.norm() / theirs["norm"] - 1
            print(
                f"{name} gradient: norm off by {norm:.1e} of itself, values of {gradient.abs().max():.1e} by {off:.1e}"
            )
