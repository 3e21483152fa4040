"""The distribution table: how close images are to real ones, in the features of Inception and of DINOv2."""

import math
import zipfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, KeptAnswers, Layout, prompts_of
from dmdr.errors import ConfigError, one_line
from dmdr.images import to_pil
from dmdr.metrics import (
    Moments,
    Rows,
    frechet_distance,
    frechet_distance_of_moments,
    inception_score,
    kernel_distance,
    neighbours,
)
from dmdr.prompts import read_prompts
from dmdr.statistics import jackknife, numbered
from dmdr_benchmarks.loading import load

CHUNK = 5000  # images of an inception score, as in ADM's evaluator
SPATIAL = 7  # channels of the spatial features
DINO_SIZE = 224
DINO_NORM = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
WIDE = 5  # neighbours of density and coverage
GROUPS = 10  # parts of the prompts, of which the jackknife leaves out one at a time
SMALL, MANY = 2000, 50_000  # images up to which there are standard errors, and diversity
FEW = 1000  # images, fewer than the features have numbers: an exact distance then costs less than their covariance
IMAGES = "arr_0"
FEATURES = ("pool", "spatial", "probabilities", "dinov2")  # what is known of each image
# Of Inception, by figure: the name of its features, their size, and what an .npz file of ADM's calls their statistics.
STATISTICS = {"FID": ("pool", 2048, "mu", "sigma"), "sFID": ("spatial", 2023, "mu_s", "sigma_s")}


@dataclass
class Distribution:
    """FID, sFID, IS, precision, recall, density, coverage, KID, diversity, and Frechet distance in DINOv2's space.

    A model that was trained for a low FID shows in the last one. Inception is torch-fidelity's port of the network of
    2015, which resizes as TensorFlow 1 did. The conventions are those of ADM's evaluator: covariances over N - 1,
    spatial features of 7 channels, logits without bias, an inception score by chunks of 5,000 in the order of the
    images, k = 3 of precision and recall, by distances in float32 where ADM's are float16. Density and coverage have
    k = 5. Where DINOv2 alone is asked, they are in its space. Diversity is 1 - cosine between images of one prompt.
    Standard errors are a jackknife's over prompts, up to 2,000 images of each. Those of shares of images (precision,
    recall, coverage) are binomial, over prompts and real images: in a trial the jackknife's were 2.5 times too large.

    Attributes:
        reference_images: A folder, a dataset (NAME, or NAME:SPLIT), or an .npz file with `arr_0`, or with ADM's `mu`,
            `sigma`, `mu_s`, `sigma_s`, which then give FID and sFID, while its images give the rest. Without images
            there is no rest but IS.
        networks: "inception", "dino" or both. --dtype is of DINOv2 alone: Inception computes in float32.
        inception: Weights file of torch-fidelity (`weights-inception-2015-12-05-6726825d.pth`); None fetches it.
        dinov2: A folder or hub id of transformers' `Dinov2Model`.

    Source: Dhariwal and Nichol 2021, arXiv:2105.05233, and github.com/openai/guided-diffusion; sFID: Nash et al. 2021,
        arXiv:2103.03841; DINOv2: Stein et al. 2023, arXiv:2306.04675, whose network interpolates positions otherwise.
    """

    images_per_prompt: ClassVar[int] = 1
    layout: ClassVar[Layout] = "flat"
    reads_prompts = False
    reference_images: str | None = None
    networks: Literal["both", "inception", "dino"] = "both"
    inception: str | None = None
    dinov2: str = "facebook/dinov2-large"

    def __post_init__(self) -> None:
        if self.reference_images is None:
            raise ConfigError(
                "benchmark 'distribution' needs --reference_images: a folder, a dataset, or an .npz file as ADM's"
            )
        self._count = ""

    def about(self) -> str:
        said = {
            "inception": f"torch-fidelity's Inception (IS: the mean over each {CHUNK:,} images in their order)",
            "dino": self.dinov2,
        }
        named = " and ".join(text for network, text in said.items() if self._asks(network))
        what = f"Distances to {self._count}{self.reference_images} by {named}."
        return f"{what} Images that dmdr draws are rounded to 8 bits; ADM truncates."

    def rows(self, prompts: str, column: str) -> Sequence[Mapping[str, Any]]:
        return read_prompts(prompts, column=column, repeated=True).rows

    def compared_with(self) -> str | None:
        """As `dmdr.benchmarks.ComparesWithImages`: nothing where the file has statistics alone."""
        if self._reference[0]:
            return self.reference_images
        if self.networks == "dino":
            raise ConfigError(f"{self.reference_images} has no images ('{IMAGES}'), which --networks dino needs")
        return None

    def _asks(self, network: str) -> bool:
        """Whether a network is asked: DINOv2 where there are images to compare with."""
        return (network == "inception" or self.compared_with() is not None) and self.networks in (network, "both")

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self.compared_with()  # what is no reference is refused before networks are loaded
        if self._asks("inception"):
            self._inception = _open_inception(self.inception, device)
            self._inception.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        if self._asks("dino"):
            from transformers import Dinov2Model

            self._dino = load(Dinov2Model, self.dinov2, "dinov2", device, dtype)

    def _keep(self, module: object, given: object, result: Tensor) -> None:
        # Channels last, as TensorFlow has them: sFID depends on which 7 of the 192 come first.
        self._spatial = result[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)

    def answers(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor | Sequence[str]]:
        found: dict[str, Tensor] = {}
        if self._asks("inception"):
            pool, logits = self._inception((images * 255).round().to(torch.uint8))
            found |= {"pool": pool, "spatial": self._spatial, "probabilities": logits.double().softmax(1).float()}
        if self._asks("dino"):
            found["dinov2"] = self._embed(images)
        return found

    def _embed(self, images: Tensor) -> Tensor:
        """The class token after the last norm, [B, D] float32; images are squashed to 224 x 224 by Pillow's bicubic."""
        size = (DINO_SIZE, DINO_SIZE)
        small = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in to_pil(images)]
        pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255
        mean, deviation = DINO_NORM
        weight = next(self._dino.parameters())
        pixels = ((pixels - mean) / deviation).to(weight.device, weight.dtype)
        embedded: Tensor = self._dino(pixels).pooler_output
        return embedded.float()

    def figures(
        self, answers: Answers, rows: Sequence[Mapping[str, Any]], reference: Answers | None
    ) -> Mapping[str, Figure]:
        count = min(len(answers), len(reference) if reference else len(answers))
        if count <= WIDE:
            raise ConfigError(f"distribution needs more than {WIDE} images of each, not {count}")
        self._count = f"{len(reference):,} images of " if reference else ""
        prompts = prompts_of(rows)
        values = self._distances(answers, reference)
        errors = torch.full((len(values),), math.nan)
        real = len(reference) if reference else 0
        if max(len(answers), real) <= SMALL and len(set(prompts)) >= GROUPS:  # of more, it takes too long
            names = [name for name in FEATURES if self._asks("dino" if name == "dinov2" else "inception")]
            every = {name: answers.tensor(name).whole() for name in names}

            def of_some(index: Tensor) -> Tensor:
                some = KeptAnswers({name: value[index] for name, value in every.items()})
                return torch.tensor([*self._distances(some, reference).values()])

            errors = jackknife(of_some, prompts, groups=GROUPS)
        shares = {"precision": len(set(prompts)), "recall": real, "coverage": real}
        for i, (name, value) in enumerate(values.items()):
            if name in shares:
                errors[i] = math.sqrt(value * (1 - value) / shares[name])
        found = {
            name: Figure(value, error, decimals=4 if name in (*shares, "density") else 2)
            for (name, value), error in zip(values.items(), errors.tolist(), strict=True)
        }
        space = "dinov2" if self._asks("dino") else "pool"
        if len(set(prompts)) < len(prompts) <= MANY:
            found["diversity"] = Figure.mean(diversity(answers.tensor(space).whole(), prompts), rows)
        return found

    def _distances(self, answers: Answers, reference: Answers | None) -> dict[str, float]:
        """All figures that are of the set as a whole."""
        found: dict[str, float] = {}
        if self._asks("inception"):
            for name, (features, *_) in STATISTICS.items():
                if known := self._reference[1].get(name):
                    found[name] = frechet_distance_of_moments(known, Moments.of(answers.tensor(features)))
                elif reference:
                    found[name] = _distance(reference.tensor(features), answers.tensor(features))
            found["IS"] = inception_score(answers.tensor("probabilities"), CHUNK)
        if reference:
            space = "pool" if self._asks("inception") else "dinov2"
            real, fake = reference.tensor(space), answers.tensor(space)
            near = neighbours(real, fake, k_density=WIDE, device=self._device)
            found |= {"precision": near.precision, "recall": near.recall}
            found |= {"density": near.density, "coverage": near.coverage}
            found["KID x 1000"] = 1000 * kernel_distance(real, fake)[0]
            if self._asks("dino"):
                found["FD-DINOv2"] = _distance(reference.tensor("dinov2"), answers.tensor("dinov2"))
        return found

    @cached_property
    def _reference(self) -> tuple[bool, dict[str, Moments]]:
        """Whether the reference has images, and its statistics by figure.

        Raises:
            ConfigError: If an .npz file cannot be read, has neither, or has statistics that are not of Inception.
        """
        place = Path(str(self.reference_images))
        if place.suffix != ".npz":
            return True, {}
        if place.is_file() and not zipfile.is_zipfile(place):
            raise ConfigError(f"{place} is no .npz file")
        found: dict[str, Moments] = {}
        try:
            with np.load(place) as file:
                pictured = IMAGES in file.files
                for name, (_, size, *keys) in STATISTICS.items():
                    if there := {key: file[key] for key in keys if key in file.files}:
                        found[name] = _moments(there, keys, size)
        except Exception as error:  # of the system, zipfile and NumPy
            what = str(error) if isinstance(error, ConfigError) else f"cannot be read: {one_line(error)}"
            raise ConfigError(f"{place} {what}") from error
        if not pictured and not found:
            raise ConfigError(f"{place} has neither images ('{IMAGES}') nor 'mu' and 'sigma'")
        return pictured, found


def diversity(features: Tensor, prompts: Sequence[Hashable]) -> Tensor:
    """Mean of 1 - cosine over the pairs of images of each image's prompt, [N] float64; NaN of a prompt's only image.

    Args:
        features: [N, D].
        prompts: Of each image.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    index, number = numbered(prompts)
    sums = torch.zeros(number, unit.shape[1], dtype=torch.float64).index_add_(0, index, unit)
    count = torch.bincount(index, minlength=number).double()
    cosine = (sums.square().sum(1) - count) / (count * (count - 1))  # of all ordered pairs; 0 / 0 is NaN
    return (1 - cosine)[index]


def _moments(arrays: Mapping[str, np.ndarray], keys: Sequence[str], size: int) -> Moments:
    """Published statistics of features of `size` numbers.

    Raises:
        ConfigError: If they are no such statistics; the file is to be named before it.
    """
    mean, covariance = (torch.from_numpy(np.asarray(arrays.get(key, np.nan), np.float64)) for key in keys)
    if mean.shape != (size,) or covariance.shape != (size, size):
        shapes = " and ".join(f"{key} {list(array.shape)}" for key, array in arrays.items())
        raise ConfigError(f"needs {keys[0]} [{size}] and {keys[1]} [{size}, {size}] of Inception, and has {shapes}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ConfigError(f"has numbers in {keys[0]} or {keys[1]} that are not finite")
    return Moments(0, mean, covariance)


def _distance(real: Rows, fake: Rows) -> float:
    if max(len(real), len(fake)) <= FEW:
        return frechet_distance(real.whole(), fake.whole())
    return frechet_distance_of_moments(Moments.of(real), Moments.of(fake))


def _open_inception(weights: str | None, device: torch.device) -> Any:
    """The network of 2015, frozen, that answers with pooled features [B, 2048] and logits [B, 1008].

    Raises:
        ConfigError: If torch-fidelity is missing, or the weights cannot be had.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise ConfigError(f"distribution needs the package '{error.name}': pip install 'dmdr[fid]'") from error
    names = ["2048", "logits_unbiased"]
    try:
        if weights:  # a pickle that could run code is refused; they would run it
            torch.load(weights, "cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=weights)
    except Exception as error:  # of torch, pickle and the network
        what = f"weights {weights} cannot be loaded" if weights else "the weights cannot be fetched"
        raise ConfigError(f"inception: {what} ({one_line(error)}); give a local file with --inception") from error
    return network.to(device)
