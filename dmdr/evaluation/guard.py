"""A guard against hacked rewards: a reward that rises while variety, or a reward that only measures, falls.

It needs no judge: evaluations draw the same prompts from the same noise each time, so that the student is compared with
itself at the end of stage 1, image by image.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dmdr.metrics import NEIGHBOURS, neighbours
from dmdr.statistics import bootstrap, paired, wilson

LEVEL = 0.99  # of the intervals
KEPT = 0.7  # of stage 1's variety and images; on the digits joint training keeps 0.8 and RL alone 0.5
SIDE = 8  # of a thumbnail, in pixels


@dataclass(frozen=True)
class Look:
    """What the guard keeps of an evaluation of N images.

    Attributes:
        prompts: Of each image.
        trained: Total of the rewards that are trained on, [N].
        thumbnails: The images in so few pixels that their distance is one of colour and composition, [N, 192].
        held_out: Total of the rewards that only measure, [N], if there are any.
    """

    prompts: Sequence[Hashable]
    trained: Tensor
    thumbnails: Tensor
    held_out: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """For a file, by name."""
        found = {"trained": self.trained, "thumbnails": self.thumbnails, "held_out": self.held_out}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}


def thumbnails(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as means over 8 x 8 parts, [B, 192] float32."""
    return adaptive_avg_pool2d(images.detach().float(), SIDE).flatten(1)


def variety(look: Look) -> Tensor:
    """Mean squared distance between images of each prompt that has several, [P] float64."""
    rows: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(look.prompts):
        rows.setdefault(prompt, []).append(row)
    found = []
    for own in rows.values():
        if len(own) > 1:  # the mean of |a - b|^2 over pairs is twice the unbiased variance
            found.append(2 * look.thumbnails[own].double().var(0).sum())
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def compare(before: Look, now: Look) -> tuple[dict[str, float], list[str]]:
    """What has become of stage 1's images.

    Args:
        before: At the end of stage 1.
        now: The same prompts, from the same noise.

    Returns: Metrics for the log, and in words what speaks for a hacked reward: nothing, unless the trained reward has
        risen beyond its noise and something else has fallen beyond its own.

    Raises:
        ValueError: If the two are of different prompts.
    """
    if list(before.prompts) != list(now.prompts):
        raise ValueError("evaluations of different prompts cannot be compared")
    gain = paired(now.trained, before.trained, now.prompts, level=LEVEL)
    metrics, causes = {"reward_gain": gain.mean}, []
    if now.held_out is not None and before.held_out is not None:
        held = paired(now.held_out, before.held_out, now.prompts, level=LEVEL)
        metrics["held_out_gain"] = held.mean
        if held.high < 0:
            causes.append(f"the held-out rewards fell by {-held.mean:.3g} ({-held.high:.3g} to {-held.low:.3g})")
    old, new = variety(before), variety(now)
    if len(old) and old.mean() > 0:
        metrics["variety"] = float(new.mean() / old.mean())
        if bootstrap(new - KEPT * old, level=LEVEL).high < 0:
            causes.append(f"images of one prompt differ {metrics['variety']:.2f} times as much as after stage 1")
    if len(now.trained) > NEIGHBOURS:
        recall = neighbours(before.thumbnails, now.thumbnails).recall
        metrics["recall"] = recall
        if wilson(round(recall * len(now.trained)), len(now.trained), level=LEVEL)[1] < KEPT:
            causes.append(f"{recall:.0%} of stage 1's images lie among the present ones")
    if not gain.low > 0:
        return metrics, []
    rose = f"the trained reward rose by {gain.mean:.3g} ({gain.low:.3g} to {gain.high:.3g})"
    return metrics, [rose, *causes] if causes else []


def look_of(tensors: Mapping[str, Tensor], prompts: Sequence[Hashable]) -> Look:
    """What `Look.tensors` became."""
    return Look(prompts, tensors["trained"], tensors["thumbnails"], tensors.get("held_out"))
