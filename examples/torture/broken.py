"""A user's own reward, decoder and matching, which break when they are told to; faults.py trains with them.

FAULT is a kind of fault, and the first and the last of the calls that it strikes, counted by kind: "score 7 7". Without
it all is sound. Of several processes, it strikes in the one that FAULT_RANK says.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmdr.backends.toy import Redness, ToyBackend
from dmdr.matching import DMD
from dmdr.paths import Prediction
from dmdr.protocols import Context, Denoiser
from dmdr.types import Draw, Term

KIND, FIRST, LAST = os.environ.get("FAULT", "none 0 0").split()
HERE = os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0")
calls: Counter[str] = Counter()


def strikes(kind: str) -> bool:
    """Whether a call that could have this fault has it."""
    calls[kind] += 1
    return HERE and kind == KIND and int(FIRST) <= calls[kind] <= int(LAST)


class Reward(Redness):
    """The toy's."""

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        score = super().__call__(images, prompts, **columns)
        if strikes("raise"):
            raise OSError("no judge today")
        if strikes("exit"):
            sys.exit(0)
        if strikes("hang"):
            print("hanging", flush=True)
            time.sleep(10**6)
        if score.requires_grad and strikes("gradient"):
            score = score + (0 * score).sqrt()  # the root of 0 is 0, and its gradient is infinite
        return score * torch.nan if strikes("score") else score


class Backend(ToyBackend):
    """The toy. As each update decodes, it may also run the command in FAULT_COMMAND."""

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        if strikes("command"):
            subprocess.run(os.environ["FAULT_COMMAND"], shell=True, check=True)
        images = super().decode(latents, exact=exact)
        return images * torch.nan if strikes("decoder") else images


class Matching(DMD):
    """The default."""

    def fake_loss(self, draw: Draw, fake: Denoiser, ctx: Context) -> Term:
        term = super().fake_loss(draw, fake, ctx)
        return Term(term.loss * torch.nan) if strikes("fake") else term

    def anchor(self, prediction: Prediction, draw: Draw, ctx: Context) -> Tensor:
        x0 = super().anchor(prediction, draw, ctx)
        return x0 * torch.nan if strikes("student") else x0
