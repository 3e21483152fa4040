"""Texts of unequal lengths in one tensor."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

LENGTH = "length"  # of a text, [B] int64 on the CPU


def stacked(texts: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """Embeddings of B texts as `sequence` [B, length, ...], zero after each text's own `length` [B] int64.

    Args:
        texts: [L, ...] each; rows after `length` are left out.
        length: Of all.
    """
    texts = [text[:length] for text in texts]
    rows = [pad(text, (0, 0) * (text.ndim - 1) + (0, length - len(text))) for text in texts]
    return {"sequence": torch.stack(rows), LENGTH: torch.tensor([len(text) for text in texts])}


def by_length(
    call: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor], x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]
) -> Tensor:
    """What a network answers, asked about texts of one length at a time: for kernels that take no mask.

    Args:
        call: Of states [B, ...], times [B] and embeddings with the `length` of each.
        x_t, t, cond: For all of them.
    """
    lengths = cond[LENGTH].tolist()
    rows = [[i for i, length in enumerate(lengths) if length == each] for each in dict.fromkeys(lengths)]
    answers = [call(x_t[own], t[own], {name: tensor[own] for name, tensor in cond.items()}) for own in rows]
    order = torch.tensor([i for own in rows for i in own], device=x_t.device).argsort()
    return torch.cat(answers)[order]


def cut(cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The texts up to the longest of them, [B, L, ...], and which rows are theirs, [B, L] bool.

    There is no mask where all have L rows, as some attention kernels take none.
    """
    lengths = cond[LENGTH].tolist()
    sequence = cond["sequence"][:, : max(lengths)]
    if min(lengths) == max(lengths):
        return sequence, None
    own = cond[LENGTH].to(sequence.device, non_blocking=True)
    return sequence, torch.arange(max(lengths), device=sequence.device) < own[:, None]
