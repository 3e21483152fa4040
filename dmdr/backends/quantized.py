"""A frozen network with the linear layers of its blocks in 4 or 8 bits a number (--quantize)."""

import math
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr.backends.kernels import blocks_of
from dmdr.errors import ConfigError

Format = Literal["nf4", "int8", "fp8"]
PACKAGES: dict[Format, str] = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
# Bits of the scales: nf4 has 8 for 64 weights and 32 for 256 of those; the others 32 for a row, int8 with a zero point.
NF4_BITS, ROW_BITS = 4 + 8 / 64 + 32 / (64 * 256), {"int8": 40, "fp8": 32}


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is packed; it is unpacked for each use, in backward once more.

    The libraries' own layers keep the unpacked weight for backward (torchao), or answer in the input's precision,
    float32 under autocast (both), and so take the memory that they save.

    Args:
        layer: Its weight [out, in] and bias, in the precision that it is to compute in.
        to: How the weight is packed: nf4 as QLoRA has it (arXiv 2305.14314, section 3), with quantized scales;
            int8 and fp8 (e4m3) with a scale for each row.
        device: Where to. On the meta device the weight has a size and no values, and `numbers`, how many it packs.
    """

    def __init__(self, layer: nn.Linear, to: Format, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(device), False)
        self.weight = _packed(layer.weight.detach(), to, device)

    def unpacked(self) -> Tensor:
        """The weight, [out, in]."""
        weight: Any = self.weight
        if weight.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        if hasattr(weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)
        return weight.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [B, ..., in] to outputs [B, ..., out], under autocast in its precision."""
        return _Frozen.apply(x, self)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked(), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.unpacked().to(gradient.dtype), None


def check_quantize(to: Format | None) -> None:
    """Refuse what needs a package that is not there.

    Raises:
        ConfigError: If it is not.
    """
    if to and find_spec(PACKAGES[to]) is None:
        raise ConfigError(f"--quantize {to} needs {PACKAGES[to]}: pip install {PACKAGES[to]}")


def quantize(network: Any, to: Format, device: torch.device) -> None:
    """Pack the linear layers of a network's blocks, one after the other, onto the device; the rest stays as it is.

    Raises:
        ConfigError: If the network does not say which its blocks are.
    """
    if not (blocks := blocks_of(network)):
        raise ConfigError(f"--quantize: a {type(network).__name__} does not name its repeated blocks; leave it out")
    for parent in {module: None for block in blocks for module in block.modules()}:
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, QuantizedLinear(layer, to, device))


def _packed(weight: Tensor, to: Format, device: torch.device) -> Any:
    if device.type == "meta":
        bits = weight.numel() * (NF4_BITS if to == "nf4" else 8) + len(weight) * ROW_BITS.get(to, 0)
        packed: Any = nn.Parameter(torch.empty(math.ceil(bits / 8), dtype=torch.uint8, device=device), False)
        packed.numbers = weight.numel()
        return packed
    if to == "nf4":
        from bitsandbytes.nn import Params4bit

        return Params4bit(weight, False, quant_type="nf4").to(device)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    holder = nn.Linear(1, 1, bias=False, device="meta")
    holder.weight = nn.Parameter(weight.to(device), False)
    quantize_(holder, Int8WeightOnlyConfig(version=2) if to == "int8" else Float8WeightOnlyConfig())
    return holder.weight
