"""DMDR: few-step distillation and reinforcement learning of diffusion models, in one run."""

import logging
from pathlib import Path
from typing import Any

__all__ = ["train"]

# Where torchao is installed, importing diffusers or accelerate brings two lines about versions, of no use to anybody.
for _name in ("diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def train(**settings: Any) -> Path:
    """The same as `dmdr-train`; see `dmdr.run.run.train`. Imports nothing heavy until it is called."""
    from dmdr.run.run import train

    return train(**settings)
