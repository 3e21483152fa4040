"""One self-contained page that shows images of several models side by side, a row for each prompt.

The page needs no network and no library, and opens from a file. Its script sorts, searches and lays two images over
each other; without it, and in print, the page shows all images side by side.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.evaluation.pictures import Pictures
from dmdr.evaluation.report import TEMPLATES, template
from dmdr.images import write_atomically
from dmdr.randomness import Random

SMALL = 128  # px; a smaller image is enlarged with sharp pixels
QUALITY = 90  # of WebP, at which 512 x 512 px of a photograph are 40 to 100 kB
RANDOM = Random(seed=0, step=0, phase="comparison")  # so that the same images give the same page


@dataclass(frozen=True)
class Shown:
    """A model of the comparison.

    Attributes:
        name: How it is called, unlike any other model.
        about: One line: how its images were drawn.
        images: One for each prompt.
        scores: Of each image by the score's name, [N] each, any float dtype; NaN where there is none.
    """

    name: str
    about: str
    images: Pictures
    scores: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Tile:
    """An embedded image: its data URI, its size in pixels, and whether its pixels are to stay sharp."""

    uri: str
    width: int
    height: int
    small: bool


@dataclass(frozen=True)
class Score:
    """A score of the shown rows.

    Attributes:
        name: Of the score.
        digits: Decimal places that it is written with.
        values: A row's list holds a value for each model, None where there is none.
        models: Whether each model has this score at all.
    """

    name: str
    digits: int
    values: list[list[float | None]]
    models: list[bool]

    def text(self, row: int, model: int) -> str:
        """One value as the page shows it."""
        value = self.values[row][model]
        return "\N{EN DASH}" if value is None else f"{value:.{self.digits}f}".replace("-", "\N{MINUS SIGN}")


def write_comparison(
    path: Path,
    title: str,
    prompts: Sequence[str],
    models: Sequence[Shown],
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]] = (),
    notes: Sequence[str] = (),
    max_rows: int = 100,
    width: int = 512,
) -> None:
    """Write the page, atomically.

    Args:
        path: The HTML file; its folder is made.
        title: Of the page.
        prompts: What each row's images shall show, N strings. A prompt may occur more than once.
        models: One or more. The page begins with the difference of the second from the first.
        tables: What each is about, and rows of texts, such as means and intervals. The first row is the head, the
            first column names the rows.
        notes: Lines that a reader should know, such as warnings, seeds and versions.
        max_rows: Rows that are shown at most. Of more rows, a third has the largest gain of the second model over the
            first in the first score that both have, a third the largest loss, and the rest is drawn with a fixed seed;
            without such a score the first rows are shown. The page says so.
        width: Pixels that an embedded image is wide at most. 100 rows of 3 models at 512 px are 20 to 50 MB,
            the more the finer their details.

    Raises:
        ConfigError: There is no model or no prompt, two models have the same name, lengths differ, a limit is below 1,
            or an image cannot be read. Nothing is written then.
        OSError: The page cannot be written.
    """
    _check(prompts, models, max_rows, width)
    rows, choice = _choose(models, len(prompts), max_rows)
    # One at a time: of a large image only its small copy stays in memory.
    tiles = [[_embed(model.images, row, width) for model in models] for row in rows]
    scores = [_score(name, models, rows) for name in _score_names(models)]
    digest = blake2b(digest_size=8)
    for tile in (tile for row in tiles for tile in row):
        digest.update(tile.uri.encode())
    count = len(models)
    orders = [RANDOM.uniform("order", row * count + torch.arange(count)).argsort().tolist() for row in rows]
    html = template(TEMPLATES / "comparison.html.jinja").render(
        title=title,
        models=models,
        tables=tables,
        notes=notes,
        total=len(prompts),
        choice=choice,
        rows=[(row + 1, prompts[row], cells) for row, cells in zip(rows, tiles, strict=True)],
        scores=scores,
        small=all(tile.small for row in tiles for tile in row),
        data={
            "key": digest.hexdigest(),  # votes are kept under it: they belong to these very images
            "title": title,
            "models": [model.name for model in models],
            "scores": [vars(score) for score in scores],
            "orders": orders,
        },
    )
    write_atomically(Path(path), html.encode(errors="replace"))


def _check(prompts: Sequence[str], models: Sequence[Shown], max_rows: int, width: int) -> None:
    """Refuse what cannot be shown, before an image is read."""
    if not models or not prompts:
        raise ConfigError(f"a comparison needs a {'prompt' if models else 'model'}; there is none")
    if max_rows < 1 or width < 1:
        raise ConfigError(f"a comparison needs 1 row and 1 pixel or more, not {max_rows} and {width}")
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two models are called '{name}'; give each a name of its own")
    for model in models:
        if len(model.images) != len(prompts):
            counts = f"{len(model.images)} images for {len(prompts)} prompts"
            raise ConfigError(f"model '{model.name}' has {counts}; give one image for each prompt")
        for name, values in model.scores.items():
            if values.shape != (len(prompts),):
                shape = f"the shape {list(values.shape)}, not [{len(prompts)}]"
                raise ConfigError(f"score '{name}' of model '{model.name}' has {shape}; give one value for each image")


def _score_names(models: Sequence[Shown]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model.scores))


def _choose(models: Sequence[Shown], count: int, max_rows: int) -> tuple[list[int], str]:
    """The rows to show, in their order, and a sentence on how they were chosen; "" if all are shown."""
    if count <= max_rows:
        return list(range(count)), ""
    begin = f"{max_rows} of {count} prompts are shown: "
    for name in _score_names(models):
        pair = [model for model in models if name in model.scores][:2]
        if len(pair) < 2:
            continue
        first, second = (model.scores[name].detach().cpu().double() for model in pair)
        difference = (second - first).tolist()
        finite = [row for row in range(count) if math.isfinite(difference[row])]
        if not finite:
            continue
        gains = sorted((row for row in finite if difference[row] > 0), key=lambda row: -difference[row])
        losses = sorted((row for row in finite if difference[row] < 0), key=lambda row: difference[row])
        gains, losses = gains[: max_rows // 3], losses[: max_rows // 3]
        order = RANDOM.uniform("rows", torch.arange(count)).argsort().tolist()
        drawn = [row for row in order if row not in (*gains, *losses)][: max_rows - len(gains) - len(losses)]
        which = (
            f"the {len(gains)} with the largest gain of {pair[1].name} over {pair[0].name} in {name}, "
            f"the {len(losses)} with the largest loss, and {len(drawn)} drawn at random."
        )
        return sorted([*gains, *losses, *drawn]), begin + which
    return list(range(max_rows)), f"{begin}the first {max_rows}."


def _score(name: str, models: Sequence[Shown], rows: Sequence[int]) -> Score:
    """The values of one score that the page shows."""
    columns = [
        model.scores[name].detach().cpu().double()[list(rows)].tolist() if name in model.scores else None
        for model in models
    ]
    largest = max((abs(value) for column in columns for value in column or () if math.isfinite(value)), default=0.0)
    digits = max(1, 4 - int(math.log10(max(largest, 1))))  # as many as the run report has for a reward
    values = [
        # Three places more than are shown, for the order; a float64 of a float32 has 17, which say nothing.
        [round(column[i], digits + 3) if column and math.isfinite(column[i]) else None for column in columns]
        for i in range(len(rows))
    ]
    return Score(name, digits, values, [column is not None for column in columns])


def _embed(pictures: Pictures, row: int, width: int) -> Tile:
    """An image as a WebP of at most `width` px; a small one without loss, as enlarging would show it.

    Raises:
        ConfigError: It is damaged.
    """
    image = Image.fromarray(pictures.read(row).permute(1, 2, 0).contiguous().numpy())
    if image.width > width:
        size = (width, max(1, round(image.height * width / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    small = max(image.size) < SMALL
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, lossless=small)
    return Tile(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size, small)
