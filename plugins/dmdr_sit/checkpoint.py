"""Published SiT checkpoints: their sizes, their layout, and the pipeline folder that is made of one."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from filelock import FileLock
from torch import Tensor

from dmdr.backends.loading import Source, identity, load_network, quiet, read_weights
from dmdr.cache import cache_folder, fingerprint
from dmdr.errors import ConfigError
from dmdr.states import load_strict
from dmdr_sit.pipeline import SiTPipeline, SiTTransformer2DModel

# Table 1 of Peebles & Xie 2022; "-2" is the patch size.
SIZES = {
    "sit-s-2": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "sit-b-2": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "sit-l-2": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "sit-xl-2": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}
PUBLISHED_VAE = "stabilityai/sd-vae-ft-ema"


def pipeline_folder(size: str, checkpoint: Path) -> Path:
    """The pipeline folder of a checkpoint, made on first use and whenever the file has changed.

    The VAE is the folder `vae` beside the checkpoint or, where there is none, the published one.

    Raises:
        ConfigError: If the checkpoint does not fit its size, is damaged or holds code, or there is no VAE.
    """
    beside = checkpoint.parent / "vae"
    vae = str(beside) if beside.is_dir() else PUBLISHED_VAE
    about = checkpoint.stat()
    key = fingerprint(
        checkpoint, about.st_size, about.st_mtime_ns, identity(Source(str(checkpoint.parent)), ["vae"]) or PUBLISHED_VAE
    )
    target = cache_folder() / "sit" / f"{size}-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # one process converts, the others wait for it
        if not target.exists():
            network = convert(size, checkpoint)
            try:
                decoder = load_network(AutoencoderKL, Source(vae), "", torch.float32)
            except ConfigError as error:
                raise ConfigError(f"{error}; or put the VAE beside {checkpoint.name}, as {beside}") from error
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            with quiet():
                SiTPipeline(network, decoder, FlowMatchEulerDiscreteScheduler(shift=1.0)).save_pretrained(partial)
            partial.rename(target)
    return target


def convert(size: str, checkpoint: Path) -> SiTTransformer2DModel:
    """The network of a checkpoint, strictly.

    The SiT authors' release is told by its eight output channels: there t = 0 is noise. REPA's has four, and t = 1.

    Raises:
        ConfigError: If it does not fit this size; names the first three missing and unexpected weights.
    """
    state = published_layout(read_weights(str(checkpoint), within=("ema", "model")))
    authors = len(state.get("final_layer.linear.bias", ())) == 2 * 4 * 4  # 2 x 2 latents of twice four channels
    with torch.device("meta"):
        network = SiTTransformer2DModel(**SIZES[size], learn_sigma=authors, noise_at_zero=authors)
    network.to_empty(device="cpu")
    load_strict(network.state_dict(), state, f"{checkpoint} as {size}")
    return network


def published_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without REPA's projectors, which only its training uses; the blocks of its first release in one list.

    There the `encoder_depth` first blocks were `blocks`, and the others, counted from 0 again, `decoder_blocks`.
    """
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})

    def renamed(match: re.Match[str]) -> str:
        return f"blocks.{depth + int(match[1])}."

    return {
        re.sub(r"^decoder_blocks\.(\d+)\.", renamed, name): tensor
        for name, tensor in state.items()
        if not name.startswith("projectors.")
    }
