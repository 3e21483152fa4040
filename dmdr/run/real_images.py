"""Real images in training: which one each sample is given, as a latent of its update's shape."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dmdr.errors import ConfigError
from dmdr.evaluation.captions import FLAG, Captioned, captioned
from dmdr.evaluation.pictures import read_ahead
from dmdr.hub import is_hub_id
from dmdr.prompts import Row, Rows, split_columns
from dmdr.protocols import Backend, ChecksPrompts, NamedModel, sizes_of
from dmdr.randomness import Random
from dmdr.run.device import failing_together
from dmdr.settings.fields import Config
from dmdr.sizes import Size
from dmdr.training.context import rollout_random
from dmdr.types import Draw, Real

AHEAD = 4  # files that are read meanwhile; photos may be large
KEPT = 2**30  # bytes of latents that a process keeps


@dataclass(frozen=True)
class Blank:
    """One grey image, which stands in for real ones in a dry run (`evaluation.pictures.Pictures`)."""

    size: Size

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "blank"

    def read(self, index: int) -> Tensor:
        return torch.full((3, self.size.height, self.size.width), 128, dtype=torch.uint8)

    def stamp(self, index: int) -> str:
        return "blank"


def open_real_images(
    config: Config, model: NamedModel | None, prompts: Rows, backend: Backend, readers: Sequence[str]
) -> Captioned | None:
    """The images that the user names, or else the model's own, where a part of the run reads them.

    Args:
        prompts: Of the run.
        readers: The parts that read real images, as users named them.

    Raises:
        ConfigError: If there are none, or the model family cannot encode what they show.
    """
    if not readers:
        return None
    own: Callable[[], Path] | None = getattr(model, "real_images", None)
    place = config.real_images
    if config.dry_run and _is_elsewhere(place):  # nothing is downloaded or built
        size = max(sizes_of(backend), key=prod, default=Size(8, 8))
        return Captioned(Blank(size), prompts.first(1))
    if place is None:
        if own is None:
            raise ConfigError(f"{readers[0]} reads real images: give a folder or a dataset with {FLAG}")
        place = str(own())
    found = captioned(place, config.caption_column, _by_label(prompts), checked=not config.dry_run)
    if isinstance(backend, ChecksPrompts):
        texts, columns = split_columns(found.rows)
        backend.check_prompts(texts, **columns)
    return found


def _by_label(prompts: Rows) -> dict[Any, list[Row]] | None:
    """The prompt rows of each label; None where they are streamed."""
    if prompts.size is None:
        return None
    found: dict[Any, list[Row]] = {}
    for row in prompts.first(prompts.size):
        if "label" in row:
            found.setdefault(row["label"], []).append(row)
    return found


def _is_elsewhere(place: str | None) -> bool:
    """Whether images are on the hub, or nobody has named any."""
    return place is None or (not Path(place).exists() and is_hub_id(place.partition(":")[0]))


def drawn(random: Random, samples: Tensor, count: int) -> list[int]:
    """Which of so many images each sample is given, with replacement."""
    return random.integers("real", samples, count).tolist()


def captions(images: Captioned, *, seed: int, updates: int, rounds: int, uses: int, batch: int) -> list[str]:
    """The captions of the images that a run may draw, of all processes.

    Args:
        updates: Of the student, in the whole run.
        rounds: Updates of the fake score for each of them.
        uses: Of a rollout, at most.
        batch: Images of an update.
    """
    count, samples = len(images.rows), torch.arange(batch)
    rows = set(range(count))
    if updates * rounds * uses * batch < count:
        each = (rollout_random(seed, *numbers) for numbers in product(range(updates), range(rounds), range(uses)))
        rows = {row for random in each for row in drawn(random, samples, count)}
    return list(dict.fromkeys(images.rows[row]["prompt"] for row in sorted(rows)))


class RealLatents:
    """What `ctx.real` gives (`training.context.RealImages`).

    Images are read and encoded when they are drawn, one at a time, so that a latent depends on its image alone; the
    last ones are kept in memory.

    Args:
        images: All of them.
        backend: Prepared.
        device: Where latents are wanted.
        kept: Bytes of latents that stay in memory.
    """

    def __init__(self, images: Captioned, backend: Backend, device: torch.device, kept: int = KEPT) -> None:
        self.images, self.backend, self.device, self._most = images, backend, device, kept
        self._sizes = dict(zip(getattr(backend, "latent_shapes", ()), getattr(backend, "sizes", ()), strict=True))
        self._kept: OrderedDict[tuple[int, tuple[int, ...]], Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, draw: Draw, random: Random) -> Real:
        rows = drawn(random, draw.sample.cpu(), len(self.images.rows))
        with failing_together():
            found = self.latents(rows, tuple(draw.x0.shape[1:]))
        x0 = torch.stack(found)
        prompts, columns = split_columns([self.images.rows[row] for row in rows])
        return Real(x0.to(self.device, non_blocking=True), self.backend.encode(prompts, **columns))

    @torch.no_grad()
    def latents(self, rows: Sequence[int], shape: tuple[int, ...]) -> list[Tensor]:
        """Those of some images, each of this shape, on the CPU.

        Raises:
            ConfigError: If a file is damaged, or the image has another size where the model family says none.
        """
        found = {row: self._kept[row, shape] for row in rows if (row, shape) in self._kept}
        missing = [row for row in dict.fromkeys(rows) if row not in found]
        with closing(read_ahead(self.images.pictures, missing, AHEAD)) as pictures:
            for row, picture in zip(missing, pictures, strict=True):
                found[row] = self._encode(row, picture, shape)
        for row in dict.fromkeys(rows):
            self._keep((row, shape), found[row])
        return [found[row] for row in rows]

    def _encode(self, row: int, picture: Tensor, shape: tuple[int, ...]) -> Tensor:
        image = picture.float() / 255
        if shape in self._sizes:
            image = covering(image, self._sizes[shape])
        latent = self.backend.encode_images(image[None].to(self.device))[0].float().cpu()
        if tuple(latent.shape) != shape:
            name, found = self.images.pictures.name(row), f"a latent of {list(latent.shape)}, not {list(shape)}"
            raise ConfigError(f"{FLAG}: {name} becomes {found}: give images of the model's own size")
        return latent

    def _keep(self, key: tuple[int, tuple[int, ...]], latent: Tensor) -> None:
        """As the newest; the oldest ones go."""
        if key not in self._kept:
            self._bytes += latent.nbytes
        self._kept[key] = latent
        self._kept.move_to_end(key)
        while self._bytes > self._most:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


def covering(image: Tensor, size: Size) -> Tensor:
    """An image [3, h, w] in [0, 1] of this size: its shorter side resized (bicubic), its centre cut out."""
    _, height, width = image.shape
    if (width, height) == size:
        return image
    scale = max(size.width / width, size.height / height)
    inner = max(size.height, round(height * scale)), max(size.width, round(width * scale))
    resized = F.interpolate(image[None], inner, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = (inner[0] - size.height) // 2, (inner[1] - size.width) // 2
    return resized[:, top : top + size.height, left : left + size.width]
