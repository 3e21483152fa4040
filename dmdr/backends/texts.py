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


def alike(lengths: Sequence[int], unit: int = 1) -> list[list[int]]:
    """Rows of texts that fill as many units of tokens, group by group."""
    units = [-(-length // unit) for length in lengths]
    return [[row for row, each in enumerate(units) if each == number] for number in dict.fromkeys(units)]


def in_groups(
    call: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor],
    groups: Sequence[Sequence[int]],
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Tensor],
) -> Tensor:
    """What a network answers, asked about one group of rows at a time.

    Args:
        call: Of states [B, ...], times [B] and embeddings.
        groups: All rows, each in one group.
        x_t, t, cond: For all of them.
    """
    if len(groups) == 1:
        return call(x_t, t, cond)
    answers = [call(x_t[rows], t[rows], {name: tensor[rows] for name, tensor in cond.items()}) for rows in groups]
    return in_order(torch.cat(answers), groups)


def in_order(answers: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Answers that came group by group, [B, ...], in the order of the rows."""
    if len(groups) == 1:
        return answers
    return answers[torch.tensor([row for rows in groups for row in rows], device=answers.device).argsort()]


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
