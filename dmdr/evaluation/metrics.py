"""How good a student's images are: distances between sets of features, accuracy, and mean rewards.

A reward alone does not measure quality: a student that has collapsed to one clean image per prompt scores higher than
the teacher. Only the Frechet distance and the recall see it, so that all are reported together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dmdr.protocols import Judge
from dmdr.rewards import RewardError

NEIGHBOURS = 3  # k of the precision and recall that papers report


class Scorer(Protocol):
    """What `evaluate` asks of the run's rewards (`dmdr.rewards.Rewards`)."""

    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        """Raw reward by name, each [B]."""

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        """The weighted sum, [B]."""


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with the means m and covariances C of two sets.

        d = |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2))

    The trace of the root is the sum of the roots of the eigenvalues of C1 C2. With C = R^T R (R from a QR decomposition
    of the centred features) these roots are the singular values of R1 R2^T. Taking them there never squares a small
    number, so that features that do not vary, or fewer samples than dimensions, cost no precision.

    Args:
        real, fake: Features [N, D] and [M, D], any float dtype; N and M are 2 or more. Computed in float64 on the CPU.

    Returns: 0 or more; NaN where a feature is not finite.

    Raises:
        ValueError: The shapes do not fit, or a set has fewer than two samples.

    Source: Heusel et al. 2017 (arXiv:1706.08500), eq. 6; covariances are unbiased (N - 1), as in their code.
    """
    _check(real, fake, least=2)
    real, fake = real.detach().cpu().double(), fake.detach().cpu().double()
    if not (real.isfinite().all() and fake.isfinite().all()):
        return math.nan
    root_real, root_fake = _root(real), _root(fake)
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    spread = root_real.square().sum() + root_fake.square().sum()  # Tr(R^T R)
    overlap = torch.linalg.svdvals(root_real @ root_fake.T).sum()
    return max(0.0, float(shift + spread - 2 * overlap))  # rounding can leave -1e-14


def _root(features: Tensor) -> Tensor:
    """R with R^T R the unbiased covariance of features [N, D]; [min(N, D), D]."""
    return torch.linalg.qr(features - features.mean(0), mode="r").R / math.sqrt(len(features) - 1)


@dataclass(frozen=True)
class Moments:
    """Number, mean [D] and unbiased covariance [D, D] of features, float64.

    Sets that are too large to keep are summed up in parts: `Moments.of(a) + Moments.of(b)` is that of both.
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of features [N, D], any float dtype; N is 1 or more, and a single one has covariance 0."""
        found = features.detach().cpu().double()
        centred = found - found.mean(0)
        return cls(len(found), found.mean(0), centred.T @ centred / max(len(found) - 1, 1))

    def __add__(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan et al. 1979, "Updating Formulae and a Pairwise Algorithm")."""
        count, shift = self.count + other.count, other.mean - self.mean
        scatter = (self.count - 1) * self.covariance + (other.count - 1) * other.covariance
        scatter = scatter + self.count * other.count / count * torch.outer(shift, shift)
        return Moments(count, self.mean + other.count / count * shift, scatter / (count - 1))


def frechet_distance_of_moments(real: Moments, fake: Moments) -> float:
    """`frechet_distance` of sets of which no more is known than their moments, such as published references.

    Tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric. With fewer
    samples than dimensions the roots of eigenvalues near 0 are less exact than those of `frechet_distance`.

    Returns: 0 or more; NaN where a moment is not finite.

    Raises:
        ValueError: The features have different sizes.
    """
    if real.mean.shape != fake.mean.shape:
        raise ValueError(f"features of {len(real.mean)} and of {len(fake.mean)} numbers cannot be compared")
    tensors = [t.double() for each in (real, fake) for t in (each.mean, each.covariance)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        return math.nan
    mean_a, c_a, mean_b, c_b = tensors
    values, vectors = torch.linalg.eigh(c_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ c_b @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float((mean_a - mean_b).square().sum() + c_a.trace() + c_b.trace() - 2 * overlap))


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance (KID): the unbiased squared MMD of random subsets with the kernel (x y / D + 1)^3.

    Unlike the Frechet distance it has no bias for small sets, and may therefore be a little below 0.

    Args:
        real, fake: Features [N, D] and [M, D], any float dtype. Computed in float64 on the CPU.
        subsets: How many are drawn, each without replacement.
        subset_size: Features of each in a subset; fewer where a set has fewer.
        seed: Of the draws.

    Returns: Mean and standard deviation over the subsets; NaN where a feature is not finite.

    Raises:
        ValueError: The shapes do not fit, or a set has fewer than two samples.

    Source: Binkowski et al. 2018 (arXiv:1801.01401), eq. 3 and section 4.1.
    """
    _check(real, fake, least=2)
    generator, distances = torch.Generator().manual_seed(seed), []
    size = min(subset_size, len(real), len(fake))
    for _ in range(subsets):
        x, y = (
            each[torch.randperm(len(each), generator=generator)[:size].to(each.device)].detach().cpu().double()
            for each in (real, fake)
        )
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        distances.append(within - 2 * xy.mean())
    found = torch.stack(distances)
    return float(found.mean()), float(found.std(unbiased=False))


def density_coverage(real: Tensor, fake: Tensor, k: int = 5, *, max_distances: int = 2**24) -> tuple[float, float]:
    """How densely the fakes lie among real images, and the share of real images that they cover.

        density = 1 / (k M) sum_f #{ r: |f - r| <= radius(r) }    coverage = mean_r [ any f with |f - r| <= radius(r) ]

    with radii to the k-th nearest other real point. Density may exceed 1. Outliers among the fakes, which widen their
    balls in `precision_recall`, change neither.

    Args:
        real, fake: Embeddings [N, D] and [M, D], any float dtype; more than k real ones.
        k: Neighbours, 1 or more.
        max_distances: Distances held at a time, which bounds the memory.

    Raises:
        ValueError: The shapes do not fit, or there are k real points or fewer.

    Source: Naeem et al. 2020 (arXiv:2002.09797), eq. 4 and 5.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, not {k}")
    _check(real, fake, least=1)
    if len(real) <= k:
        raise ValueError(f"density and coverage need more than {k} real images; there are {len(real)}")
    real, fake = real.detach().float(), fake.detach().float()
    radius = _radii(real, k, max_distances)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in fake.split(max(1, max_distances // len(real))):
        within = _distances(part, real) <= radius
        inside, covered = inside + int(within.sum()), covered | within.any(0)
    return inside / (k * len(fake)), covered.double().mean().item()


def precision_recall(
    real: Tensor, fake: Tensor, k: int = NEIGHBOURS, *, max_distances: int = 2**24
) -> tuple[float, float]:
    """Precision: share of the fakes that look real. Recall: share of the reals that the fakes cover.

    The manifold of a set is the union of balls around its points; a ball's radius is the distance to the k-th nearest
    other point of the set.

        precision = mean_f [ |f - r| <= radius(r) for any real r ]        recall: the same with the sets exchanged

    A point that is not finite lies in no ball and has none. The result does not depend on `max_distances`.

    Args:
        real, fake: Embeddings [N, M] and [N', M], any float dtype; more than k points each.
        k: Neighbours, 1 or more.
        max_distances: Distances held at a time, which bounds the memory (at least one row of them is held).

    Returns: (precision, recall), each in [0, 1].

    Raises:
        ValueError: The shapes do not fit, or a set has k points or fewer.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991), eq. 1 and 2.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, not {k}")
    _check(real, fake, least=k + 1)
    real, fake = real.detach().float(), fake.detach().float()
    return _covered(fake, real, k, max_distances), _covered(real, fake, k, max_distances)


def inception_score(probabilities: Tensor, chunk: int | None = None) -> float:
    """How sure a classifier is of each image, and of how many classes over all.

        score = exp( mean_x KL( p(y|x) || p(y) ) ),  p(y) = mean_x p(y|x)

    Args:
        probabilities: p(y|x), [N, C], any float dtype; rows sum to 1, N is 1 or more.
        chunk: The mean of the scores of consecutive parts of so many images; by default all at once. ADM's evaluator
            takes 5,000: images that are sorted by class then score less.

    Returns: From 1 (each image says the same) to C (certain, and every class as often); NaN where one is not finite.

    Raises:
        ValueError: It is no such matrix.

    Source: Salimans et al. 2016 (arXiv:1606.03498), eq. 1.
    """
    if probabilities.ndim != 2 or probabilities.numel() == 0:
        raise ValueError(f"expected probabilities [N, C], not {list(probabilities.shape)}")
    p = probabilities.detach().cpu().double()
    if chunk is not None:
        parts = [inception_score(part) for part in p.split(chunk)]
        return sum(parts) / len(parts)
    entropy = torch.special.entr(p).sum(1).mean()
    return float((torch.special.entr(p.mean(0)).sum() - entropy).exp())  # the mean KL is H(y) - H(y|x)


def _covered(points: Tensor, manifold: Tensor, k: int, max_distances: int) -> float:
    """Share of `points` inside the k-NN manifold of another set."""
    rows = max(1, max_distances // len(manifold))
    radius = _radii(manifold, k, max_distances)
    inside = [(_distances(part, manifold) <= radius).any(dim=1).cpu() for part in points.split(rows)]
    return torch.cat(inside).double().mean().item()


def _radii(points: Tensor, k: int, max_distances: int) -> Tensor:
    """Distance of each point to its k-th nearest other, [N]."""
    # The k + 1st smallest: each point's distance to itself, 0, comes first.
    parts = points.split(max(1, max_distances // len(points)))
    return torch.cat([_distances(part, points).kthvalue(k + 1, dim=1).values for part in parts])


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    # By matrix products a distance depends on the chunk it is computed in, and that of a point to itself is not 0.
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _check(real: Tensor, fake: Tensor, least: int) -> None:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"expected two sets [N, D] of the same D, not {list(real.shape)} and {list(fake.shape)}")
    if min(len(real), len(fake)) < least:
        raise ValueError(f"each set needs {least} samples or more; there are {len(real)} real and {len(fake)} fake")


@dataclass(frozen=True)
class Evaluation:
    """What there is to say of a set of images.

    Attributes:
        metrics: By name.
        totals: Weighted sum of the rewards of each image, [N], under `reward` and `eval_reward`, where there are such.
    """

    metrics: dict[str, float]
    totals: dict[str, Tensor]


@torch.no_grad()
def evaluate(
    images: Tensor,
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    judge: Judge | None,
    rewards: Scorer | None,
    eval_rewards: Scorer | None = None,
    *,
    chunk: int = 128,
    device: torch.device | None = None,
    together: Callable[[Tensor], Tensor] = lambda values: values,
) -> Evaluation:
    """All metrics of one set of images: a column of the metric table.

    With a judge: `accuracy` in [0, 1], `frechet_distance` of `judge.features`, `precision` and `recall` of
    `judge.embed`, each against all of `judge.reference()`; the last three are left out of an evaluation of k = 3 images
    or fewer, where they mean nothing; `inception_score` in [1, C], of a judge that has `probabilities`. With rewards:
    `reward/<name>` and `reward/total`, means over the images whose reward is finite (NaN where none is); the same under
    `eval_reward/` for those that only measure.

    Args:
        images: [B, 3, H, W] float32 in [0, 1], B >= 1.
        prompts: What each image shall show, B strings.
        columns: Further columns of the prompt rows, each of length B.
        judge: The model's independent eye, or None.
        rewards, eval_rewards: The run's rewards, and those that only measure, or None.
        chunk: Images that the judge and the rewards see at a time.
        device: Where they are seen; where `images` lie by default.
        together: Where several processes each have a share of the images: their values, [B, ...] -> [all, ...].

    Raises:
        ValueError: There is no image, or the lengths differ.
        RewardError: In all processes, if a reward fails in one.
    """
    lengths = {"prompts": len(prompts)} | {name: len(column) for name, column in columns.items()}
    wrong = [f"{length} {name}" for name, length in lengths.items() if length != len(images)]
    if len(images) == 0 or wrong:
        raise ValueError(f"{len(images)} images to evaluate" + "".join(f", {text}" for text in wrong))
    device = images.device if device is None else device
    starts = range(0, len(images), chunk)
    metrics: dict[str, float] = {}
    totals: dict[str, Tensor] = {}

    if judge is not None:
        parts = [judge.correct(images[i : i + chunk].to(device), prompts[i : i + chunk]).float().cpu() for i in starts]
        correct = together(torch.cat(parts))
        metrics["accuracy"] = correct.mean().item()
        if hasattr(judge, "probabilities"):
            metrics["inception_score"] = inception_score(together(_map(judge.probabilities, images, chunk, device)))
        real = judge.reference()
        if min(len(correct), len(real)) > NEIGHBOURS:
            features, points = (
                [_map(function, real, chunk, device), together(_map(function, images, chunk, device))]
                for function in (judge.features, judge.embed)
            )
            metrics["frechet_distance"] = frechet_distance(features[0], features[1])
            metrics["precision"], metrics["recall"] = precision_recall(points[0], points[1])

    for kind, scorer in (("reward", rewards), ("eval_reward", eval_rewards)):
        if scorer is None:
            continue
        scored, failure = [], None
        try:
            for i in starts:
                row = {name: column[i : i + chunk] for name, column in columns.items()}
                scored.append(scorer.each(images[i : i + chunk].to(device), prompts[i : i + chunk], **row))
        except RewardError as error:  # the others would wait for this process
            failure = error
        if together(torch.full((len(images),), failure is not None)).any():
            raise failure or RewardError("a reward failed in another process")
        # The total is taken of all images at once, in case it depends on the statistics of its batch.
        scores = {name: together(torch.cat([part[name] for part in scored])) for name in scored[0]}
        metrics |= {f"{kind}/{name}": _finite_mean(values) for name, values in scores.items()}
        totals[kind] = scorer.total(scores)
        metrics[f"{kind}/total"] = _finite_mean(totals[kind])
    return Evaluation(metrics, totals)


def _map(function: Callable[[Tensor], Tensor], images: Tensor, chunk: int, device: torch.device) -> Tensor:
    """`function` of all images, chunk by chunk on `device`; the result on the CPU."""
    return torch.cat([function(part.to(device)).float().cpu() for part in images.split(chunk)])


def _finite_mean(values: Tensor) -> float:
    values = values.cpu().double()
    return values[values.isfinite()].mean().item()
