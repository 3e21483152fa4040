"""The distribution table: how close images are to real ones, in the features of Inception and of DINOv2."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmdr.benchmarks import Answers, Figure, Layout
from dmdr.errors import ConfigError, one_line
from dmdr.images import to_pil
from dmdr.metrics import Moments, frechet_distance_of_moments, inception_score, kernel_distance, neighbours
from dmdr.prompts import read_prompts
from dmdr_benchmarks.loading import load

CHUNK = 5000  # images of an inception score, as in ADM's evaluator
SPATIAL = 7  # channels of the spatial features
DINO_SIZE = 224
DINO_NORM = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
STATISTICS = {"FID": ("mu", "sigma"), "sFID": ("mu_s", "sigma_s")}  # of an .npz file of ADM's


@dataclass
class Distribution:
    """FID, sFID, IS, precision, recall, density, coverage, KID, and the Frechet distance in DINOv2's space.

    A model that was trained for a low FID shows in the last one. Inception is torch-fidelity's port of the network of
    2015, which resizes as TensorFlow 1 did. The conventions are those of ADM's evaluator: covariances over N - 1,
    spatial features of 7 channels, logits without bias, an inception score by chunks of 5,000 in the order of the
    images, k = 3 of precision and recall, by distances in float32 where ADM's are float16. Density and coverage have
    k = 5.

    Attributes:
        reference: Real images: a folder, or an .npz file with `arr_0`, or with ADM's `mu`, `sigma`, `mu_s`, `sigma_s`,
            which then give FID and sFID, while its images give the rest.
        networks: "inception", "dinov2" or both.
        inception: Weights file of torch-fidelity (`weights-inception-2015-12-05-6726825d.pth`); None fetches it.
        dinov2: A folder or hub id of transformers' `Dinov2Model`.

    Source: Dhariwal and Nichol 2021, arXiv:2105.05233, and github.com/openai/guided-diffusion; sFID: Nash et al. 2021,
        arXiv:2103.03841; DINOv2: Stein et al. 2023, arXiv:2306.04675, whose network interpolates positions otherwise.
    """

    images_per_prompt: ClassVar[int] = 1
    layout: ClassVar[Layout] = "flat"
    reads_prompts = False
    reference: str = field(kw_only=True)
    networks: Literal["both", "inception", "dinov2"] = "both"
    inception: str | None = None
    dinov2: str = "facebook/dinov2-large"

    def about(self) -> str:
        networks = {"inception": "Inception of torch-fidelity", "dinov2": self.dinov2}
        named = " and ".join(name for key, name in networks.items() if self.networks in (key, "both"))
        return (
            f"Distances to {self.reference}, by {named}; IS by chunks of {CHUNK:,} in the order of the images. Images "
            "that dmdr draws are rounded to 8 bits; ADM truncates."
        )

    def rows(self, prompts: str, column: str) -> Sequence[Mapping[str, Any]]:
        return read_prompts(prompts, column=column, repeated=True).rows

    def reference_images(self) -> str | None:
        """As `dmdr.benchmarks.ComparesWithImages`: none where the file has statistics alone."""
        return None if self._file() and "arr_0" not in self._statistics() else self.reference

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        if self.networks in ("both", "inception"):
            self._inception = _open_inception(self.inception, device)
            self._inception.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        if self.networks in ("both", "dinov2"):
            from transformers import Dinov2Model

            self._dino = load(Dinov2Model, self.dinov2, "dinov2", device, dtype)

    def _keep(self, module: object, given: object, result: Tensor) -> None:
        # Channels last, as TensorFlow has them: sFID depends on which 7 of the 192 come first.
        self._spatial = result[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)

    def answers(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor | Sequence[str]]:
        found: dict[str, Tensor] = {}
        if self.networks in ("both", "inception"):
            pool, logits = self._inception((images * 255).round().to(torch.uint8))
            found |= {"pool": pool, "spatial": self._spatial, "probabilities": logits.double().softmax(1).float()}
        if self.networks in ("both", "dinov2"):
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
        if count <= 5:
            raise ConfigError(f"distribution needs more than 5 images of each, not {count}")
        found: dict[str, float] = {}
        if self.networks in ("both", "inception"):
            pool = answers.tensor("pool")
            for name, features in (("FID", "pool"), ("sFID", "spatial")):
                real = self._moments(name) or (reference and Moments.of(reference.tensor(features)))
                if real:
                    found[name] = self._distance(name, real, Moments.of(answers.tensor(features)))
            found["IS"] = inception_score(answers.tensor("probabilities"), CHUNK)
            if reference:
                real_pool = reference.tensor("pool")
                near, wide = (neighbours(real_pool, pool, k, device=self._device) for k in (3, 5))
                found |= {"precision": near.precision, "recall": near.recall}
                found |= {"density": wide.density, "coverage": wide.coverage}
                found["KID x 1000"] = 1000 * kernel_distance(real_pool, pool)[0]
        if self.networks in ("both", "dinov2") and reference:
            real, fake = (Moments.of(each.tensor("dinov2")) for each in (reference, answers))
            found["FD-DINOv2"] = frechet_distance_of_moments(real, fake)
        shares = ("precision", "recall", "density", "coverage")
        return {name: Figure(value, decimals=4 if name in shares else 2) for name, value in found.items()}

    def _distance(self, name: str, real: Moments, fake: Moments) -> float:
        try:
            return frechet_distance_of_moments(real, fake)
        except ValueError as error:
            raise ConfigError(f"{self.reference}: {name} cannot be computed: {error}") from error

    def _moments(self, name: str) -> Moments | None:
        """Those of an .npz file; None where it has none."""
        statistics = self._statistics() if self._file() else {}
        mean, covariance = (statistics.get(key) for key in STATISTICS[name])
        if mean is None or covariance is None:
            return None
        size = len(mean)
        if mean.shape != (size,) or covariance.shape != (size, size):
            what = f"{list(mean.shape)} and {list(covariance.shape)}"
            raise ConfigError(f"{self.reference}: {' and '.join(STATISTICS[name])} must be [D] and [D, D], not {what}")
        return Moments(0, torch.from_numpy(mean).double(), torch.from_numpy(covariance).double())

    def _file(self) -> bool:
        return Path(self.reference).suffix == ".npz"

    def _statistics(self) -> dict[str, Any]:
        """The statistics in the file, and the names of what else is there."""
        try:
            with np.load(self.reference) as file:
                known = [key for keys in STATISTICS.values() for key in keys if key in file.files]
                return dict.fromkeys(file.files) | {key: file[key] for key in known}
        except Exception as error:  # of the system, zipfile and NumPy
            raise ConfigError(f"reference {self.reference} cannot be read: {one_line(error)}") from error


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
        network = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=weights)
    except Exception as error:  # of torch, pickle and the network
        what = f"weights {weights} cannot be loaded" if weights else "the weights cannot be fetched"
        raise ConfigError(f"inception: {what} ({one_line(error)}); give a local file with --inception") from error
    return network.to(device)
