"""What rewards that are a frozen network share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmdr.errors import ConfigError
from dmdr.states import load_strict, refuse_misfits
from dmdr_rewards.preprocess import Method

HEAD_LAYERS = (0, 2, 4, 6, 7)
HEAD_WIDTHS = (768, 1024, 128, 64, 16, 1)  # of the published heads


@dataclass
class NetworkReward:
    """A frozen network that looks at images; a subclass loads it in `prepare`.

    Attributes:
        checkpoint: What is loaded; None for the published file.
        chunk_size: Images that go through the network at a time; None for the whole batch.
        gradient_checkpointing: Recompute the network's activations in backward, a chunk at a time, instead of keeping
            them.
    """

    differentiable = True  # not annotated, hence no flag; nor is the next
    weightless = True
    checkpoint: str | None = None
    chunk_size: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ConfigError(f"chunk_size must be at least 1, not {self.chunk_size}")

    @property
    def method(self) -> Method:
        """How images are resized."""
        return "float"

    def look(self, network: Callable[..., Tensor], pixels: Tensor, *columns: Tensor) -> Tensor:
        """`network(pixels, *columns)` by chunks, in the precision of its weights whatever the caller runs in.

        Args:
            pixels: [B, 3, size, size].
            columns: Further tensors with one row per image.

        Returns:
            [B, ...], at least float32.
        """
        run: Callable[..., Tensor] = partial(_precisely, network)
        if self.gradient_checkpointing and torch.is_grad_enabled() and pixels.requires_grad:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)  # nothing here draws
        size = self.chunk_size or max(1, len(pixels))
        parts = zip(*(tensor.split(size) for tensor in (pixels, *columns)), strict=True)
        return torch.cat([run(*part) for part in parts])


@dataclass
class ResizingReward(NetworkReward):
    """A network whose authors resize 8-bit images with Pillow.

    Attributes:
        resize: "float" resizes once in floating point; "exact" reproduces the 8-bit Pillow resize of the published
            evaluation, with the same gradient. Left out: "float" in training, "exact" in dmdr-eval and the server.
    """

    resize: Literal["float", "exact"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize not in ("float", "exact", None):
            raise ConfigError(f"resize must be 'float' or 'exact', not {self.resize!r}")

    @property
    def method(self) -> Method:
        """As `resize` says."""
        return self.resize or "float"


def _precisely(network: Callable[..., Tensor], pixels: Tensor, *columns: Tensor) -> Tensor:
    with no_autocast(pixels.device):
        return at_least_float32(network(pixels, *columns))


def no_autocast(device: torch.device) -> torch.autocast:
    """Of the caller's; that of meta tensors in --dry_run goes by the CPU's."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; float64, in which gradients are checked, stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def frozen(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same model, in eval mode and without gradients of its own."""
    return model.to(device, dtype).eval().requires_grad_(False)


def score_head(state: Mapping[str, Tensor], prefix: str, what: str) -> nn.Sequential:
    """Five linear layers without activations, of the widths of `state`: the head of LAION's predictor and ImageReward.

    Args:
        state: Weights `{prefix}.N.weight` and biases at N = 0, 2, 4, 6, 7; the published heads have dropout between.
        prefix: Of their names.
        what: Where from, for messages.

    Raises:
        ConfigError: If one is missing, unexpected or of another shape.
    """
    names = {f"{prefix}.{i}.{part}" for i in HEAD_LAYERS for part in ("weight", "bias")}
    refuse_misfits(what, names - state.keys(), state.keys() - names)
    if any(state[name].ndim != 1 + name.endswith("weight") for name in names):
        raise ConfigError(f"{what} has no linear layers under {prefix}")
    widths = [state[f"{prefix}.0.weight"].shape[-1], *(len(state[f"{prefix}.{i}.bias"]) for i in HEAD_LAYERS)]
    head = new_head(widths, state[f"{prefix}.0.weight"].device)
    load_strict({f"{prefix}.{name}": value for name, value in head.state_dict().items()}, state, what)
    return head


def new_head(widths: Sequence[int], device: torch.device) -> nn.Sequential:
    """The five layers of `score_head`, without what they learnt."""
    layers = iter([nn.Linear(*pair, device=device) for pair in pairwise(widths)])
    return nn.Sequential(*(next(layers) if i in HEAD_LAYERS else nn.Identity() for i in range(HEAD_LAYERS[-1] + 1)))
