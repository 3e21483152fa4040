"""What a reward promises."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dmdr.protocols import Reward
from dmdr.testing.common import CannotRun, networks, spelt, taken_by_a_run, untouched_global_rng

PROMPTS = ["a red square", "a handwritten seven", "", "a very long prompt " * 40]
ALL = (0, 1, 2, 3)


def check_reward(reward: Reward, *, size: int = 32, columns: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Check a reward; calls `prepare` of copies on the CPU.

    Args:
        reward: Not prepared yet.
        size: Side of the test images in pixels.
        columns: Further columns that it needs, each of length 4.

    Raises:
        AssertionError: With the broken promise.
    """
    taken_by_a_run("rewards", reward)
    trial = RewardTrial(reward, size, dict(columns or {}))
    for check in REWARD_CHECKS:
        check(trial)


@dataclass
class RewardTrial:
    """A reward and what it is tried on.

    Attributes:
        reward: Not prepared yet.
        size: Side of the images in pixels.
        columns: Further columns of the four rows.
    """

    reward: Reward
    size: int = 32
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)

    @cached_property
    def prepared(self) -> Reward:
        """A copy in float32."""
        return self.copy(torch.float32)

    def copy(self, dtype: torch.dtype) -> Reward:
        """A fresh copy, prepared on the CPU."""
        reward = deepcopy(self.reward)
        reward.prepare(torch.device("cpu"), dtype)
        return reward

    @property
    def images(self) -> Tensor:
        """The same four images anew, [4, 3, size, size]."""
        return torch.rand(4, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def score(self, images: Tensor, rows: Sequence[int] = ALL, *, by: Reward | None = None) -> Tensor:
        """Scores of images with the prompts and columns of these rows.

        Raises:
            CannotRun: If they are not [B] float32.
        """
        columns = {name: [column[row] for row in rows] for name, column in self.columns.items()}
        scores = (by or self.prepared)(images, [PROMPTS[row] for row in rows], **columns)
        if not isinstance(scores, Tensor) or scores.shape != (len(rows),) or scores.dtype != torch.float32:
            found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise CannotRun(f"a reward returns [{len(rows)}] float32; this one {found} for images {list(images.shape)}")
        return scores


def one_float32_score_per_image(trial: RewardTrial) -> None:
    """Also of black, white and oblong images; NaN says that it cannot score one."""
    black, white = torch.zeros(3, trial.size, trial.size), torch.ones(3, trial.size, trial.size)
    oblong = trial.images[:, :, :, : trial.size // 2]
    for images, rows in ((trial.images, ALL), (torch.stack([black, white]), (0, 1)), (oblong, ALL)):
        with torch.no_grad():
            scores = trial.score(images, rows)
        assert not scores.isinf().any(), f"scores of images {list(images.shape)} are infinite: {scores.tolist()}"
    with torch.no_grad():
        assert not trial.score(trial.images).isnan().all(), "it scores none of four images: their scores are all NaN"


def a_score_does_not_depend_on_the_batch(trial: RewardTrial) -> None:
    """An image has the same score alone, in a batch and in another order, up to 1e-4 of the largest."""
    order = [2, 0, 3, 1]
    with torch.no_grad():
        scores, shuffled = trial.score(trial.images), trial.score(trial.images[order], order)
        single = torch.cat([trial.score(trial.images[row : row + 1], [row]) for row in ALL])
    tolerance = 1e-4 * max(scores.nan_to_num().abs().max().item(), 1.0)
    for found, wanted, what in ((shuffled, scores[order], "order"), (single, scores, "rest")):
        same = torch.allclose(found, wanted, rtol=0, atol=tolerance, equal_nan=True)
        assert same, f"a score must not depend on the {what} of the batch"


def images_are_only_read(trial: RewardTrial) -> None:
    """The images that it is given stay as they are."""
    images = trial.images
    with torch.no_grad():
        trial.score(images)
    assert torch.equal(images, trial.images), (
        "the reward changed the images that it was given; other rewards read them, too"
    )


def the_gradient_is_as_declared(trial: RewardTrial) -> None:
    """The score has a finite gradient in the images if `differentiable` says so, and otherwise no graph."""
    leaf = trial.images.requires_grad_()
    answer = trial.score(leaf)
    if not trial.prepared.differentiable:
        assert not answer.requires_grad, "differentiable = False, but the score has a graph; detach it"
        return
    assert answer.requires_grad, "differentiable = True, but the score has no graph; is there a no_grad inside?"
    scored = answer.isfinite()
    torch.where(scored, answer, 0.0).sum().backward()
    assert leaf.grad is not None and leaf.grad[scored].any(), "no gradient reaches the images"
    assert leaf.grad[scored].isfinite().all(), "the gradient of the images that it scores must be finite"
    with torch.no_grad():
        assert not trial.score(leaf).requires_grad, (
            "under no_grad a score must have no graph; is there an enable_grad inside?"
        )


def its_networks_are_frozen(trial: RewardTrial) -> None:
    """Its networks take no gradients and are in eval mode."""
    for name, network in networks(trial.prepared):
        trained = any(p.requires_grad for p in network.parameters())
        assert not trained, f"its {name} would take gradients: call requires_grad_(False) in `prepare`"
        assert not network.training, f"its {name} is in training mode, with dropout on: call eval() in `prepare`"


def further_columns_are_welcome(trial: RewardTrial) -> None:
    """Prompt rows have columns that are others' business."""
    with torch.no_grad():
        trial.prepared(trial.images, PROMPTS, **trial.columns, somebody_elses=[None] * 4)


def no_random_numbers(trial: RewardTrial) -> None:
    """The same images have the same scores, and nothing is drawn from a global generator."""
    with (
        untouched_global_rng("reward", "score the same image alike, or use a generator of your own"),
        torch.no_grad(),
    ):
        first, second = trial.score(trial.images), trial.score(trial.images)
    assert torch.allclose(first, second, rtol=0, atol=0, equal_nan=True), "the same images got two different scores"


def bfloat16_weights_score_in_float32(trial: RewardTrial) -> None:
    """What `--mixed_precision bf16` does to a reward."""
    with torch.no_grad():
        plain, coarse = trial.score(trial.images), trial.score(trial.images, by=trial.copy(torch.bfloat16))
    lost = coarse[plain.isfinite()]
    assert lost.isfinite().all(), f"prepared with bfloat16 it cannot score what it can in float32: {lost.tolist()}"


def no_method_is_misspelt(trial: RewardTrial) -> None:
    """A run calls optional methods by their names in `dmdr.protocols`, and never one whose name is nearly that."""
    spelt("rewards", trial.reward)


REWARD_CHECKS: tuple[Callable[[RewardTrial], None], ...] = (
    one_float32_score_per_image,
    images_are_only_read,
    a_score_does_not_depend_on_the_batch,
    the_gradient_is_as_declared,
    its_networks_are_frozen,
    further_columns_are_welcome,
    no_random_numbers,
    bfloat16_weights_score_in_float32,
    no_method_is_misspelt,
)
