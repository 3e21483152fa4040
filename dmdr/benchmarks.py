"""What a benchmark is: its prompts, what it asks about each image, and the figures that come of the answers.

`dmdr-eval` does the rest: it draws or reads the images, asks about a batch of them at a time, in all processes, keeps
the answers on disk, so that a stopped evaluation goes on, and prints the table. A benchmark registers under the
entry-point group `dmdr.benchmarks`. It is a dataclass; its fields are its command-line flags.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmdr.metrics import Rows
from dmdr.protocols import NamedModel, RewardSum
from dmdr.statistics import prompt_means, standard_error

# How the images of a benchmark lie in a folder:
# "flat"     0000.png, 0001.png, ... with a metadata.jsonl: the `imagefolder` layout of `datasets`
# "samples"  00000/samples/0000.png of prompt 0, image 0, with 00000/metadata.jsonl: GenEval's
# "grids"    ID.png, four images of a prompt as 2 x 2, ID from the column `item_id`, a text that no other prompt has:
#            DPG-Bench's; the four also lie alone, as in "samples"
Layout = Literal["flat", "samples", "grids"]
PART = 64  # rows of a tensor in memory that are read at a time


@dataclass(frozen=True)
class Figure:
    """A cell of the table.

    Attributes:
        value: What is printed; NaN where there is nothing to say.
        error: Its standard error; NaN where there is none, as of a distance between sets.
        values: Of each image, [N] float64, where `value` is the mean of the prompts' means; two models are then
            compared prompt by prompt. NaN leaves an image out.
        decimals: Digits after the point.
        strata: Of each image, where the prompts are of kinds that another experiment would have as many of: the
            interval of a difference then draws prompts within their kind.
    """

    value: float
    error: float = math.nan
    values: Tensor | None = None
    decimals: int = 4
    strata: Sequence[Hashable] | None = None

    @classmethod
    def mean(cls, values: Tensor, rows: Sequence[Mapping[str, Any]], decimals: int = 4) -> "Figure":
        """The mean over prompts of the means of their images, with its standard error over prompts.

        Args:
            values: Of each image, [N], any dtype; those that are not finite are left out.
            rows: Of each image.
            decimals: Digits after the point.
        """
        means = prompt_means(values, prompts_of(rows))
        finite = means[means.isfinite()]
        value = finite.mean().item() if len(finite) else math.nan
        return cls(value, standard_error(means), values.detach().cpu().double(), decimals)


def prompts_of(rows: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """What the images of a prompt have in common; an image without a prompt shares it with no other."""
    return [row["prompt"] or index for index, row in enumerate(rows)]


class Answers(Protocol):
    """All answers about N images, in their order. Tensors are read from disk in parts: N may be large.

    `KeptAnswers` holds some in memory.
    """

    def __len__(self) -> int:
        """N."""

    def tensor(self, name: str) -> Rows:
        """The tensors [B, ...] of this name, as [N, ...].

        Raises:
            KeyError: If `answers` gives none of this name.
        """

    def texts(self, name: str) -> list[str]:
        """The texts of this name, N of them.

        Raises:
            KeyError: If `answers` gives none of this name.
        """


@dataclass(frozen=True)
class KeptRows:
    """A tensor in memory (`dmdr.metrics.Rows`).

    Attributes:
        tensor: [N, ...].
    """

    tensor: Tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensor.split(PART))

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.tensor[index]

    def whole(self) -> Tensor:
        """All of it, [N, ...]."""
        return self.tensor


@dataclass(frozen=True)
class KeptAnswers:
    """Answers about N images in memory (`Answers`).

    Attributes:
        given: What `answers` of the benchmark returns about all images at once.
    """

    given: Mapping[str, Tensor | Sequence[str]]

    def __len__(self) -> int:
        return len(next(iter(self.given.values())))

    def tensor(self, name: str) -> KeptRows:
        """As of `Answers`: [N, ...].

        Raises:
            KeyError: If there is none of this name.
        """
        found = self.given[name]
        if not isinstance(found, Tensor):
            raise KeyError(name)
        return KeptRows(found)

    def texts(self, name: str) -> list[str]:
        """As of `Answers`.

        Raises:
            KeyError: If there are none of this name.
        """
        found = self.given[name]
        if isinstance(found, Tensor):
            raise KeyError(name)
        return list(found)


@runtime_checkable
class Benchmark(Protocol):
    """A dataclass whose fields are its flags. Construction is cheap; `prepare` loads the weights.

    It is called in this order, as far as it has these: `ask`, `own_rows` or `rows`, `use`, `prepare`, `answers` for
    each batch that was not answered before, `figures` for each model, `about`. Nothing of `answers` is there later but
    what it returned.

    It may also be `ScoresByRewards`, `ComparesWithImages`, `AsksTheModel` and `BringsRows`. Optional: `reads_prompts =
    False`, of one that looks at images only.
    """

    @property
    def images_per_prompt(self) -> int:
        """As the published protocol has it; a class attribute, which is read off the class."""

    @property
    def layout(self) -> Layout:
        """How its images lie in a folder; a class attribute."""

    def about(self) -> str:
        """A sentence over the table: what was computed by which networks, and where that is not as published."""

    def rows(self, prompts: str, column: str) -> Sequence[Mapping[str, Any]]:
        """The prompt rows, each with a `prompt`, of a file or dataset in the published layout.

        They are written as JSON beside images that are drawn, in a .jsonl file, which it must read as well: a line a
        prompt, or with layout "flat" a line an image, with a `file_name`.

        Args:
            prompts: Path or hub id (--prompts).
            column: Column that holds the prompts, where the layout has columns (--prompt_column).

        Raises:
            ConfigError: If it cannot be read, or lacks what the benchmark asks about. Names file and row.
        """

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights, frozen, in eval mode.

        Raises:
            ConfigError: If a setting or a checkpoint is no good. An OSError or a ValueError is turned into one.
        """

    def answers(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor | Sequence[str]]:
        """What there is to say of images [B, 3, H, W] float32 in [0, 1], by name: tensors [B, ...], or B texts.

        The answer about an image may depend on its own row only; images that others are compared with have the row
        `{"prompt": ""}`. Names are the same in each call, and none is `image` or `prompt`. Answers with one number [B]
        and the texts are also written as columns of a CSV file.
        """

    def figures(
        self, answers: Answers, rows: Sequence[Mapping[str, Any]], reference: Answers | None
    ) -> Mapping[str, Figure]:
        """The cells of the table, by column. It only reads what it is given.

        Args:
            answers: About N images.
            rows: Of each image, N of them: the row of a prompt comes once for each of its images.
            reference: About the images that it compares with, where it is `ComparesWithImages`.

        Raises:
            ConfigError: If there are too few images.
        """


@runtime_checkable
class ScoresByRewards(Protocol):
    """A benchmark that scores images by rewards."""

    @property
    def reward(self) -> str:
        """The sum of rewards where --reward names none, or "none"; a class attribute, which is read off the class."""

    def use(self, rewards: RewardSum) -> None:
        """Called before `prepare` with the rewards, which are loaded, if there are any."""


@runtime_checkable
class ComparesWithImages(Protocol):
    """A benchmark that compares with other images, about which it is asked as well."""

    def compared_with(self) -> str | None:
        """A folder of images, an .npz file with an `arr_0` [N, H, W, 3] uint8, or a dataset; None where it needs none.

        A run may answer for the user: a field `reference_images` of the benchmark has what --reference_images names.
        """


@runtime_checkable
class AsksTheModel(Protocol):
    """A benchmark that asks the named model of --model for something, such as its judge."""

    def ask(self, model: NamedModel | None) -> None:
        """Called before `rows` and `prepare`.

        Raises:
            ConfigError: If it is no model that the benchmark can do with.
        """


@runtime_checkable
class BringsRows(Protocol):
    """A benchmark that has prompts of its own."""

    def own_rows(self) -> Sequence[Mapping[str, Any]]:
        """The prompt rows where --prompts names none; called after `ask`."""


OPTIONAL: tuple[type, ...] = (ScoresByRewards, ComparesWithImages, AsksTheModel, BringsRows)
