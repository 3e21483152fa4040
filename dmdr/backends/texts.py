"""Texts of unequal lengths in one tensor."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def padded(texts: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """Embeddings of B texts as `sequence` [B, length, ...], zero after each text's own `length` [B] int64.

    Args:
        texts: [L, ...] each; rows after `length` are left out.
        length: Of all.
    """
    texts = [text[:length] for text in texts]
    rows = [pad(text, (0, 0) * (text.ndim - 1) + (0, length - len(text))) for text in texts]
    return {"sequence": torch.stack(rows), "length": torch.tensor([len(text) for text in texts])}


def cut(cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The texts up to the longest of them, [B, L, ...], and which rows are theirs, [B, L] bool.

    There is no mask where all have L rows, as some attention kernels take none.
    """
    lengths = cond["length"].tolist()
    sequence = cond["sequence"][:, : max(lengths)]
    if min(lengths) == max(lengths):
        return sequence, None
    return sequence, torch.arange(max(lengths), device=sequence.device) < cond["length"].to(sequence.device)[:, None]
