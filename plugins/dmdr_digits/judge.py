"""An independent eye: a small CNN trained on real scans only."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_digits.data import label_of, scans, train_scans
from dmdr_digits.fit import fit

COMPONENTS = 32
SCALE = 2.5  # the unit of the Frechet distance: two random halves of the scans lie about 19 apart


class Network(nn.Module):
    """Grey 8x8 images to 64 features to 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.mean(1, keepdim=True)))


class DigitJudge:
    """The `Judge` of the digits; images are [B, 3, H, W] in [0, 1], results are on their device.

    It was trained on 8 x 8 pixels, which it makes of other sizes.
    """

    def __init__(self, folder: Path) -> None:
        state = load_file(folder / "judge.safetensors")
        self._mean, self._basis = state.pop("pca.mean"), state.pop("pca.basis")
        self._network = Network().requires_grad_(False).eval()
        self._network.load_state_dict(state)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer, [B, 64]."""
        return SCALE * self._network.to(images.device).body(as_scans(images).mean(1, keepdim=True))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """The first 32 principal components of the pixels, [B, 32]."""
        pixels = as_scans(images).mean(1).flatten(1)
        return (pixels - self._mean.to(pixels.device)) @ self._basis.to(pixels.device)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Of the ten digits, [B, 10]."""
        return self._network.to(images.device)(as_scans(images)).softmax(1)

    @torch.no_grad()
    def correct(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """1 where the image is classified as the digit that its prompt names, else 0, [B] float32."""
        asked = torch.tensor([label_of(prompt) for prompt in prompts], device=images.device)
        predicted = self._network.to(images.device)(as_scans(images)).argmax(1)
        return (predicted == asked).float()

    def reference(self) -> Tensor:
        """All 1,797 real scans."""
        return scans().images


def as_scans(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in the size of the scans, [B, 3, 8, 8] float32."""
    images = images.float()
    return images if images.shape[2:] == (8, 8) else F.interpolate(images, (8, 8), mode="bilinear", antialias=True)


def build_judge(folder: Path) -> None:
    """Train it, at full length whatever the budget: it is the measure of all the others."""
    train = train_scans()
    network = Network()

    def loss(rows: Tensor) -> Tensor:
        images = F.pad(train.images[rows], (1, 1, 1, 1))
        x, y = torch.randint(3, (2,)).tolist()  # shifts by up to one pixel
        return F.cross_entropy(network(images[..., y : y + 8, x : x + 8]), train.labels[rows])

    fit(network, loss, "digits: judge", examples=len(train), steps=750, weight_decay=0.01)

    pixels = train.images.mean(1).flatten(1).double()
    mean = pixels.mean(0)
    vectors = torch.linalg.eigh((pixels - mean).T @ (pixels - mean)).eigenvectors  # by ascending variance
    basis = vectors[:, -COMPONENTS:].flip(1)
    pca = {"pca.mean": mean.float(), "pca.basis": basis.float().contiguous()}
    save_file({**network.state_dict(), **pca}, folder / "judge.safetensors")
