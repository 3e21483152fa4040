"""Distances between sets of features: how close images are to others, and how much of their variety they have.

A reward alone does not measure quality: a student that has collapsed to one clean image per prompt scores higher than
the teacher. Only the Frechet distance and the recall see it, so that all are reported together.

Features are tensors, or `Rows`, which need not fit into memory.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

NEIGHBOURS = 3  # k of the precision and recall that papers report
DISTANCES = 2**24  # held at a time
BLOCK = 4096  # rows of which the distances to so many others are computed at a time


class Rows(Protocol):
    """A tensor [N, ...] that is read in parts, as often as one likes."""

    def __len__(self) -> int:
        """N."""

    def __iter__(self) -> Iterator[Tensor]:
        """Its parts [n, ...], in order."""

    def __getitem__(self, index: Tensor) -> Tensor:
        """The rows of these indices [n] int64, as [n, ...]."""

    def whole(self) -> Tensor:
        """All of it, [N, ...]."""


Features = Tensor | Rows


def chunks(features: Features, size: int) -> Iterator[Tensor]:
    """Parts [size, ...] of features [N, ...], in order; the last one may be shorter."""
    if isinstance(features, Tensor):
        yield from features.split(size)
        return
    kept: list[Tensor] = []
    for part in features:
        kept.append(part)
        while sum(map(len, kept)) >= size:
            joined = torch.cat(kept)
            yield joined[:size]
            kept = [joined[size:]]
    if sum(map(len, kept)):
        yield torch.cat(kept)


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
    """Of features [N, D], as far as a Frechet distance needs them.

    `Moments.of(a) + Moments.of(b)` is that of both sets together.

    Attributes:
        count: N.
        mean: [D] float64.
        covariance: [D, D] float64, over N - 1.
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """Of features [N, D], any float dtype; N is 1 or more, and a single one has covariance 0."""
        return reduce(operator.add, map(cls._of, chunks(features, BLOCK)))

    @classmethod
    def _of(cls, features: Tensor) -> "Moments":
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
    real: Features, fake: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
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
        drawn = [torch.randperm(len(each), generator=generator)[:size] for each in (real, fake)]
        x, y = (each[i].detach().cpu().double() for each, i in zip((real, fake), drawn, strict=True))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        distances.append(within - 2 * xy.mean())
    found = torch.stack(distances)
    return float(found.mean()), float(found.std(unbiased=False))


@dataclass(frozen=True)
class Neighbours:
    """What balls around the points of two sets say of each other (`neighbours`).

    Attributes:
        precision: Share of the fakes that lie in a ball of the reals.
        recall: Share of the reals that lie in a ball of the fakes.
        density: Balls of the reals that a fake lies in, over k; the mean over the fakes. It may exceed 1.
        coverage: Share of the reals whose ball holds a fake. Outliers among the fakes, whose balls are wide, change it
            as little as the density.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(
    real: Features,
    fake: Features,
    k: int = NEIGHBOURS,
    *,
    k_density: int | None = None,
    max_distances: int = DISTANCES,
    device: torch.device | None = None,
) -> Neighbours:
    """Precision, recall, density and coverage by k nearest neighbours.

    The manifold of a set is the union of balls around its points; a ball's radius is the distance to the k-th nearest
    other point of the set, and a point on its edge is inside.

        precision = mean_f [ |f - r| <= radius(r) for any real r ]     recall: the same with the sets exchanged
        density = 1 / (k M) sum_f #{ r: |f - r| <= radius(r) }         coverage = mean_r [ ... for any fake f ]

    A point that is not finite lies in no ball and has none. The result does not depend on `max_distances`.

    Args:
        real, fake: Embeddings [N, D] and [M, D], any float dtype; more than k points each.
        k: Neighbours, 1 or more; 3 is usual for precision and recall.
        k_density: Those of density and coverage, where 5 is usual; k by default.
        max_distances: Distances held at a time, which bounds the memory.
        device: Where distances are computed; where the embeddings lie by default.

    Raises:
        ValueError: The shapes do not fit, or a set has k points or fewer.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991), eq. 1 and 2; Naeem et al. 2020 (arXiv:2002.09797), eq. 4 and 5.
    """
    ks = [k, k if k_density is None else k_density]
    if min(ks) < 1:
        raise ValueError(f"k must be 1 or more, not {min(ks)}")
    _check(real, fake, least=max(ks) + 1)
    columns = max(1, min(BLOCK, max_distances))
    rows = max(1, max_distances // columns)
    place = device or next(chunks(real, 1)).device

    def blocks(features: Features, size: int) -> Iterator[Tensor]:
        return (part.detach().to(place, torch.float32) for part in chunks(features, size))

    def radii(features: Features) -> Tensor:
        """Distances of each point to its k-th nearest other, of both k, [2, N]; -1 where there is none."""
        found, most = [], max(ks) + 1
        for points in blocks(features, rows):
            nearest = points.new_full((len(points), most), torch.inf)  # each point's distance to itself, 0, is one
            for others in blocks(features, columns):
                distances = _distances(points, others).nan_to_num_(torch.inf, posinf=torch.inf)
                part = distances.topk(min(most, len(others)), largest=False).values
                del distances  # before the next ones are there
                nearest = torch.cat([nearest, part], 1).topk(most, largest=False).values
            found.append(nearest[:, ks].T)
        radius = torch.cat(found, 1)
        return torch.where(radius.isinf(), -1.0, radius)

    (radius, wide), (radius_fake, _) = radii(real), radii(fake)
    precise = torch.zeros(len(fake), dtype=torch.bool, device=place)
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool, device=place)
    balls = at = 0
    for points in blocks(fake, rows):
        own, start = slice(at, at + len(points)), 0
        for others in blocks(real, columns):
            part = slice(start, start + len(others))
            distances = _distances(points, others)
            precise[own] |= (distances <= radius[part]).any(1)
            recalled[part] |= (distances <= radius_fake[own, None]).any(0)
            within = distances <= wide[part]
            covered[part] |= within.any(0)
            balls += int(within.sum())
            del distances, within
            start += len(others)
        at += len(points)
    return Neighbours(
        precision=precise.double().mean().item(),
        recall=recalled.double().mean().item(),
        density=balls / (ks[1] * len(fake)),
        coverage=covered.double().mean().item(),
    )


def inception_score(probabilities: Features, chunk: int | None = None) -> float:
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
    if len(probabilities) == 0 or (first := next(chunks(probabilities, 1))).ndim != 2 or first.shape[1] == 0:
        what = list(probabilities.shape) if isinstance(probabilities, Tensor) else f"[{len(probabilities)}, ...]"
        raise ValueError(f"expected probabilities [N, C], not {what}")
    if chunk is not None:
        parts = [inception_score(part) for part in chunks(probabilities, chunk)]
        return sum(parts) / len(parts)
    total, entropy = torch.zeros(first.shape[1], dtype=torch.float64), 0.0
    for part in chunks(probabilities, BLOCK):
        p = part.detach().cpu().double()
        total, entropy = total + p.sum(0), entropy + torch.special.entr(p).sum().item()
    mean = total / len(probabilities)
    return float((torch.special.entr(mean).sum() - entropy / len(probabilities)).exp())  # the mean KL is H(y) - H(y|x)


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    # By matrix products a distance depends on the chunk it is computed in, and that of a point to itself is not 0.
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _check(real: Features, fake: Features, least: int) -> None:
    shapes = [_shape(real), _shape(fake)]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"expected two sets [N, D] of the same D, not {shapes[0]} and {shapes[1]}")
    if min(len(real), len(fake)) < least:
        raise ValueError(f"each set needs {least} samples or more; there are {len(real)} real and {len(fake)} fake")


def _shape(features: Features) -> list[int]:
    if isinstance(features, Tensor):
        return list(features.shape)
    first = next(chunks(features, 1), torch.empty(0, 0))
    return [len(features), *first.shape[1:]]
