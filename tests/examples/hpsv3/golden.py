"""mu and sigma of the published package `hpsv3`, on the random checkpoint of checkpoint.py: rewrites golden.json."""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import checkpoint
import torch
from hpsv3 import HPSv3RewardInferencer
from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor

PACKAGES = ("hpsv3", "transformers", "tokenizers", "torch", "torchvision", "pillow", "numpy")


def load(base: Path, weights: Path) -> HPSv3RewardInferencer:
    """The package's model as its `create_model_and_processor` makes it, without the weights of the base, in float32."""
    processor = AutoProcessor.from_pretrained(base, padding_side="right")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = AutoConfig.from_pretrained(base, attn_implementation="sdpa")
    ids = processor.tokenizer.convert_tokens_to_ids(["<|Reward|>"])
    model = Qwen2VLRewardModelBT(
        config, output_dim=2, reward_token="special", special_token_ids=ids, rm_head_type="ranknet"
    )
    model.resize_token_embeddings(len(processor.tokenizer))
    model.load_state_dict(load_file(weights), strict=True)
    model.config.pad_token_id = processor.tokenizer.pad_token_id
    made = HPSv3RewardInferencer.__new__(HPSv3RewardInferencer)
    made.model, made.processor, made.device, made.use_special_tokens = model.float().eval(), processor, "cpu", True
    return made


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        inferencer = load(*checkpoint.write(Path(folder)))
        scores = {}
        for seed, (height, width) in enumerate(checkpoint.SIZES):
            pictures = [Image.fromarray(checkpoint.image(height, width, seed))] * len(checkpoint.PROMPTS)
            scores[f"{height}x{width}"] = inferencer.reward(pictures, list(checkpoint.PROMPTS)).tolist()
    found = {"versions": {name: version(name) for name in PACKAGES}, "mu and sigma": scores}
    Path(__file__).with_name("golden.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, rows in scores.items():
        print(f"{name:8}", " ".join(f"{mu:8.4f}" for mu, _ in rows))
