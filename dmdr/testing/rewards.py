"""What a reward promises."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dmdr.protocols import Reward
from dmdr.testing.common import networks, untouched_global_rng

PROMPTS = ("a red square", "a handwritten seven", "", "a very long prompt " * 40)


def check_reward(reward: Reward, *, size: int = 32, columns: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Check a reward; calls `prepare` on the CPU.

    Args:
        reward: Not prepared yet.
        size: Side of the test images in pixels.
        columns: Further columns that it needs, each of length 4.

    Raises:
        AssertionError: With the broken promise.
    """
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
        self.reward.prepare(torch.device("cpu"), torch.float32)
        return self.reward

    @cached_property
    def images(self) -> Tensor:
        return torch.rand(4, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def score(self, images: Tensor, rows: Sequence[int] = (0, 1, 2, 3)) -> Tensor:
        """Scores of images with the prompts and columns of these rows."""
        columns = {name: [column[row] for row in rows] for name, column in self.columns.items()}
        return self.prepared(images, [PROMPTS[row] for row in rows], **columns)


def one_finite_float32_score_per_image(trial: RewardTrial) -> None:
    ordinary, plain = (
        trial.images,
        torch.stack([torch.zeros(3, trial.size, trial.size), torch.ones(3, trial.size, trial.size)]),
    )
    for images, rows in (
        (ordinary, (0, 1, 2, 3)),
        (plain, (0, 1)),
        (ordinary[:, :, :, : trial.size // 2], (0, 1, 2, 3)),
    ):
        with torch.no_grad():
            scores = trial.score(images, rows)
        assert isinstance(scores, Tensor) and scores.shape == (len(rows),) and scores.dtype == torch.float32, (
            f"a reward returns [{len(rows)}] float32; this one {getattr(scores, 'dtype', type(scores).__name__)} "
            f"{list(getattr(scores, 'shape', []))} for images {list(images.shape)}"
        )
        assert scores.isfinite().all(), (
            f"scores of images {list(images.shape)} in [0, 1] must be finite: {scores.tolist()}"
        )


def a_score_does_not_depend_on_the_batch(trial: RewardTrial) -> None:
    order = (2, 0, 3, 1)
    with torch.no_grad():
        scores, shuffled = trial.score(trial.images), trial.score(trial.images[list(order)], order)
        single = torch.cat([trial.score(trial.images[row : row + 1], (row,)) for row in range(4)])
    tolerance = 1e-4 * max(scores.abs().max().item(), 1.0)
    assert torch.allclose(shuffled, scores[list(order)], rtol=0, atol=tolerance), (
        "a score must not depend on the order of the batch"
    )
    assert torch.allclose(single, scores, rtol=0, atol=tolerance), "a score must not depend on the rest of the batch"


def images_are_only_read(trial: RewardTrial) -> None:
    before = trial.images.clone()
    with torch.no_grad():
        trial.score(trial.images)
    assert torch.equal(before, trial.images), (
        "the reward changed the images that it was given; other rewards read them, too"
    )


def the_gradient_is_as_declared(trial: RewardTrial) -> None:
    leaf = trial.images.clone().requires_grad_()
    answer = trial.score(leaf)
    if not trial.prepared.differentiable:
        assert not answer.requires_grad, "differentiable = False, but the score has a graph; detach it"
        return
    assert answer.requires_grad, "differentiable = True, but the score has no graph; is there a no_grad inside?"
    answer.sum().backward()
    grad = leaf.grad
    assert grad is not None and grad.isfinite().all() and grad.any(), "no finite gradient reaches the images"
    with torch.no_grad():
        assert not trial.score(leaf).requires_grad, (
            "under no_grad a score must have no graph; is there an enable_grad inside?"
        )


def its_networks_are_frozen(trial: RewardTrial) -> None:
    for name, network in networks(trial.prepared):
        trained = any(p.requires_grad for p in network.parameters())
        assert not trained, f"its {name} would take gradients: call requires_grad_(False) in `prepare`"
        assert not network.training, f"its {name} is in training mode, with dropout on: call eval() in `prepare`"


def further_columns_are_welcome(trial: RewardTrial) -> None:
    """Prompt rows have columns that are others' business."""
    with torch.no_grad():
        trial.prepared(trial.images, PROMPTS, **trial.columns, somebody_elses=[None] * 4)


def no_random_numbers(trial: RewardTrial) -> None:
    with (
        untouched_global_rng("reward", "score the same image alike, or use a torch.Generator of your own"),
        torch.no_grad(),
    ):
        first, second = trial.score(trial.images), trial.score(trial.images)
    assert torch.equal(first, second), "the same images got two different scores"


def bfloat16_weights_score_in_float32(trial: RewardTrial) -> None:
    """What `--mixed_precision bf16` does to a reward."""
    trial.reward.prepare(torch.device("cpu"), torch.bfloat16)
    answer = trial.score(trial.images)
    finite = answer.dtype == torch.float32 and bool(answer.isfinite().all())
    assert finite, f"prepared with bfloat16, a score is still finite float32, not {answer.dtype}: {answer.tolist()}"


REWARD_CHECKS: tuple[Callable[[RewardTrial], None], ...] = (
    images_are_only_read,
    one_finite_float32_score_per_image,
    a_score_does_not_depend_on_the_batch,
    the_gradient_is_as_declared,
    its_networks_are_frozen,
    further_columns_are_welcome,
    no_random_numbers,
    bfloat16_weights_score_in_float32,
)
