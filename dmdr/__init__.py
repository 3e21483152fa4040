"""DMDR: few-step distillation and reinforcement learning of diffusion models, in one run."""

from pathlib import Path
from typing import Any

__all__ = ["train"]


def train(**settings: Any) -> Path:
    """The same as `dmdr-train`; see `dmdr.run.run.train`. Imports nothing heavy until it is called."""
    from dmdr.run.run import train

    return train(**settings)
