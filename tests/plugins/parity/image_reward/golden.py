"""Scores and gradients of the published package `image-reward`, on the random checkpoints of checkpoint.py.

python golden.py                        # small: rewrites golden.json
python golden.py --full FOLDER OUT      # FOLDER holds a checkpoint of the published size
"""

import argparse
import contextlib
import io
import json
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import checkpoint
import torch
from PIL import Image

package = import_module("ImageReward.ImageReward")
blip = import_module("ImageReward.models.BLIP.blip")
blip_pretrain = import_module("ImageReward.models.BLIP.blip_pretrain")
PACKAGES = ("image-reward", "transformers", "tokenizers", "torch", "torchvision", "timm", "pillow", "numpy")
SAMPLES = 20


def use_tokenizer_of(folder: Path) -> None:
    """The package fetches bert-base-uncased; to what is loaded here it adds its own two tokens."""
    tokenizer = blip.BertTokenizer.from_pretrained(str(folder))
    blip.BertTokenizer.from_pretrained = lambda name: tokenizer


def use_sizes(sizes: checkpoint.Sizes) -> None:
    """Make small what the package hard-codes: its ViT-L, the 224 of its transform and the 768 of its head."""
    heads = sizes.vision // 64
    vit, transform, head = blip.VisionTransformer, package._transform, package.MLP
    blip_pretrain.create_vit = lambda *_: (
        vit(sizes.image, sizes.patch, embed_dim=sizes.vision, depth=sizes.vision_layers, num_heads=heads),
        sizes.vision,
    )
    package._transform = lambda size: transform(sizes.image)
    package.MLP = lambda width: head(sizes.text)


def load(folder: Path) -> Any:
    """The package's model, with its own loader; nothing may be missing or left over, which it would pass over."""
    path, config = folder / checkpoint.WEIGHTS, folder / "med_config.json"
    with contextlib.redirect_stdout(io.StringIO()):
        model = import_module("ImageReward.utils").load(str(path), device="cpu", med_config=str(config))
    given, own = torch.load(path, map_location="cpu", mmap=True), model.state_dict()
    assert given.keys() == own.keys(), sorted(given.keys() ^ own.keys())[:5]
    assert all(torch.equal(given[name], own[name]) for name in own)
    return model.requires_grad_(False)


def measure(model: Any, digest: str, sizes: checkpoint.Sizes) -> dict[str, Any]:
    """Scores of every image with every prompt, and gradients where nothing is resized."""
    scores: dict[str, list[float]] = {}
    gradients: dict[str, Any] = {}
    for number, (name, pixels) in enumerate(checkpoint.images(sizes.image).items()):
        image = Image.fromarray(pixels)
        with torch.no_grad():
            scores[name] = [model.score(prompt, image) for prompt in checkpoint.PROMPTS]
        if pixels.shape[:2] != (sizes.image, sizes.image):
            continue
        prompt = checkpoint.PROMPTS[number]
        tokens = model.blip.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        normalised = model.preprocess(image)[None].requires_grad_()
        score = model.score_gard(tokens.input_ids, tokens.attention_mask, normalised)
        (gradient,) = torch.autograd.grad(score.sum(), normalised)
        places = [i * 7919 % gradient.numel() for i in range(SAMPLES)]
        values = gradient.flatten()[places].tolist()
        gradients[name] = {"prompt": number, "norm": gradient.norm().item(), "places": places, "values": values}
    versions = {name: version(name) for name in PACKAGES}
    return {"versions": versions, "size": sizes.image, "weights": digest, "scores": scores, "gradients": gradients}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score with the package image-reward.")
    parser.add_argument("--full", nargs=2, type=Path, metavar=("FOLDER", "OUT"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if given.full:
            (folder, out), sizes, digest = given.full, checkpoint.FULL, "not computed"
        else:
            folder, out, sizes = Path(temporary), Path(__file__).with_name("golden.json"), checkpoint.SMALL
            digest = checkpoint.write(folder)
            use_sizes(sizes)
        use_tokenizer_of(folder)
        found = measure(load(folder), digest, sizes)
    out.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found["scores"].items():
        print(f"{name:8}", " ".join(f"{score:8.4f}" for score in row))
