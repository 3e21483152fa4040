"""HPSv3 behind an address, for `--reward http://HOST:PORT`; transformers loads it, not the authors' package."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from dmdr.images import to_pil
from dmdr.remote.server import serve
from dmdr.states import load_strict, refuse_misfits

INSTRUCTION = (Path(__file__).parent / "instruction.txt").read_text(encoding="utf-8")
EMBEDDING = "model.embed_tokens.weight"
TOKEN = "<|Reward|>"  # in the instruction; the head reads the hidden state at its place
PIXELS = 256 * 28 * 28  # to which each image is resized, at its own ratio of sides


class HPSv3:
    """Qwen2-VL-7B with a head that estimates a normal distribution of how much people like an image; the score is mu.

    Source: Ma et al. 2025, arXiv:2508.03789, and the package hpsv3 1.0.0, whose scores these are.
    """

    def __init__(self, checkpoint: str, base: str, device: torch.device, dtype: torch.dtype) -> None:
        """Load it.

        Args:
            checkpoint: HPSv3.safetensors, or the hub id or folder that has it.
            base: Hub id or folder of Qwen2-VL-7B-Instruct, of which configuration and tokenizer are read, no weights.
            device, dtype: Of the network; its head is float32 in any case.

        Raises:
            ConfigError: If the checkpoint has other weights.
        """
        self.processor = AutoProcessor.from_pretrained(base, padding_side="right")
        self.processor.tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
        self.token: int = self.processor.tokenizer.convert_tokens_to_ids(TOKEN)
        given = load_file(_file(checkpoint))
        config = Qwen2VLConfig.from_pretrained(base)
        self.head = _head(config.text_config.hidden_size)
        ours = {f"rm_head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        refuse_misfits(f"HPSv3 {checkpoint}", {*ours, EMBEDDING} - given.keys(), ())
        load_strict(ours, {name: given.pop(name) for name in ours}, f"HPSv3 {checkpoint}")
        config.text_config.vocab_size = len(given[EMBEDDING])  # the base has some to spare
        given.pop("lm_head.weight", None)  # it says nothing
        renamed = {f"language_{name}" if name.startswith("model.") else name: tensor for name, tensor in given.items()}
        network, report = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=renamed, dtype=dtype, output_loading_info=True
        )
        refuse_misfits(f"HPSv3 {checkpoint}", report["missing_keys"], report["unexpected_keys"])
        self.network = network.to(device).eval().requires_grad_(False)
        self.head.to(device).eval().requires_grad_(False)
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] in [0, 1] and B prompts -> mu [B] float32, about -5 to 15."""
        return self.distribution(images, prompts)[:, 0]

    def distribution(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the head says, [B, 2] float32: mu, and sigma before the function that makes it positive."""
        inputs = self._inputs(images, prompts)
        ids = inputs["input_ids"]
        # The authors' transformers numbered all tokens in a row where nothing is generated, those of the image, too.
        places = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)
        hidden = self.network(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            position_ids=places,
            pixel_values=inputs["pixel_values"].to(self.dtype),
            image_grid_thw=inputs["image_grid_thw"],
            use_cache=False,
        ).last_hidden_state
        found: Tensor = self.head(hidden[ids == self.token].float())
        return found

    def _inputs(self, images: Tensor, prompts: Sequence[str]) -> Any:
        pictures = [_resized(picture) for picture in to_pil(images)]
        asked = [INSTRUCTION.replace("{text_prompt}", prompt.replace(TOKEN, "")) for prompt in prompts]
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in asked
        ]
        texts = [self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        return self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(self.device)


def _resized(picture: Image.Image) -> Image.Image:
    height, width = smart_resize(picture.height, picture.width, min_pixels=PIXELS, max_pixels=PIXELS)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _head(width: int) -> nn.Sequential:
    """The published head; without the dropout at 2, which does nothing here."""
    layers = [nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)]
    return nn.Sequential(*layers).float()


def _file(checkpoint: str) -> str:
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return str(path / "HPSv3.safetensors")
    return str(path) if path.is_file() else hf_hub_download(checkpoint, "HPSv3.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--checkpoint", default="MizzenAI/HPSv3", help="hub id, folder or file HPSv3.safetensors")
    parser.add_argument("--base", default="Qwen/Qwen2-VL-7B-Instruct", help="hub id or folder, not for its weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the network")
    parser.add_argument("--max_batch_size", type=int, default=8, help="images at a time")
    given = parser.parse_args()
    try:
        model = HPSv3(given.checkpoint, given.base, torch.device(given.device), getattr(torch, given.dtype))
        serve(model, host=given.host, port=given.port, name="hpsv3", max_batch_size=given.max_batch_size)
    except (
        OSError,
        ValueError,
    ) as error:  # of transformers, the hub and ourselves, for what is not there or does not fit
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
