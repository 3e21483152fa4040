"""A LoRA that starts from other weights than the network's own: the largest part of the difference to them."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmdr.errors import ConfigError, one_line
from dmdr.states import refuse_misfits

SPARE = 8  # directions more than are kept, and passes over the matrix: the error is then near the smallest possible
PASSES = 4
NOTHING = 1e-6  # of the largest singular value


@torch.no_grad()
def low_rank_difference(
    own: Mapping[str, Path], other: Mapping[str, Path], adapter: Mapping[str, Tensor], device: torch.device, what: str
) -> tuple[dict[str, Tensor], float]:
    """The best adapter that leads from one network's weights to another's, by randomised SVD of each layer.

    Source: Halko et al. 2011, arXiv:0909.4061, as torch has it (`torch.svd_lowrank`).

    Args:
        own, other: Safetensors file of each tensor, by the name that both networks have for it.
        adapter: At its initial values, `<module>.lora_A.weight` [r, ...] and `<module>.lora_B.weight` [out, r, ...].
            Directions in which there is no difference keep their initial A, or they would never learn.
        device: Where to compute.
        what: Where the other weights are, for messages.

    Returns:
        The same names at full strength, float32, and the share of the difference that is lost: the norm of what remains
        over that of the whole, of all tensors.

    Raises:
        ConfigError: If the other network has other tensors, or of other shapes, or a file is damaged.
    """
    refuse_misfits(what, own.keys() - other.keys(), other.keys() - own.keys())
    found, whole, lost = dict[str, Tensor](), 0.0, 0.0
    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the directions that are tried first
        opened: dict[Path, Any] = {}

        def read(file: Path, name: str) -> Tensor:
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                tensor: Tensor = opened[file].get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{file} cannot be read as safetensors: {one_line(error)}") from error
            return tensor.to(device, torch.float32)

        for name in own:
            before, after = read(own[name], name), read(other[name], name)
            if before.shape != after.shape:
                refuse_misfits(what, (), (), [f"{name} {tuple(after.shape)} for {tuple(before.shape)}"])
            rest = after - before
            whole += float(rest.square().sum())
            if not math.isfinite(whole):
                raise ConfigError(f"{what}, or the teacher's weights: {name} has numbers that are not finite")
            a, b = (f"{name.removesuffix('.weight')}.lora_{part}.weight" for part in "AB")
            if name.endswith(".weight") and a in adapter:
                found[a], found[b] = _factors(rest.flatten(1), adapter[a], adapter[b])
                rest = rest.flatten(1) - found[b].flatten(1) @ found[a].flatten(1)
            lost += float(rest.square().sum())
    return found, (lost / whole) ** 0.5 if whole else 0.0


def _factors(matrix: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of these shapes with B A near the matrix [out, in], each with the square root of the singular values."""
    rank = min(len(a), *matrix.shape)
    u, s, v = torch.svd_lowrank(matrix, q=min(rank + SPARE, *matrix.shape), niter=PASSES)
    kept = int((s[:rank] > NOTHING * s[0]).sum()) if s[0] > 0 else 0
    root = s[:kept].sqrt()
    new_a, new_b = a.detach().to(matrix).flatten(1).clone(), torch.zeros_like(b, device=matrix.device).flatten(1)
    new_a[:kept], new_b[:, :kept] = (v[:, :kept] * root).mT, u[:, :kept] * root
    return new_a.view(a.shape), new_b.view(b.shape)
