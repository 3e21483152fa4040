"""What a benchmark promises."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dmdr.backends.toy import Redness
from dmdr.benchmarks import (
    AsksTheModel,
    Benchmark,
    BringsRows,
    ComparesWithImages,
    Figure,
    KeptAnswers,
    ScoresByRewards,
    prompts_of,
)
from dmdr.errors import ConfigError
from dmdr.protocols import NamedModel, RewardSum
from dmdr.rewards import Rewards
from dmdr.statistics import prompt_means
from dmdr.testing.common import CannotRun, networks, same, spelt, taken_by_a_run, untouched_global_rng

Given = dict[str, Tensor | list[str]]

# A benchmark of texts finds one between quotes.
PROMPTS = (
    'a red square with the text "one"',
    'a handwritten "two"',
    'a shop with a sign that says "three"',
    'a cat under the word "four"',
)
ALONE = 3  # images that are also asked about one by one
NO_PROMPT: Mapping[str, Any] = {"prompt": ""}  # the row of an image that nobody said anything of
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
CPU = torch.device("cpu")


def check_benchmark(
    benchmark: Benchmark,
    rows: Sequence[Mapping[str, Any]] | None = None,
    *,
    size: int = 32,
    model: NamedModel | None = None,
    rewards: RewardSum | None = None,
) -> None:
    """Check a benchmark; calls `prepare` of copies on the CPU.

    Args:
        benchmark: Not prepared yet.
        rows: A few prompt rows, as `rows` of the benchmark returns them: two or more, and so many that there are
            figures. By default the first four of its own, where it has some, or else four prompts that quote a text.
        size: Side of the test images in pixels.
        model: The named model, for one that asks for it (`AsksTheModel`).
        rewards: Loaded rewards, for one that scores by them (`ScoresByRewards`); by default that of the model `toy`,
            unless its `reward` is "none".

    Raises:
        AssertionError: With the broken promise.
    """
    taken_by_a_run("benchmarks", benchmark)
    trial = BenchmarkTrial(benchmark, rows, size, model, rewards)
    for check in BENCHMARK_CHECKS:
        check(trial)


@dataclass
class BenchmarkTrial:
    """A benchmark and what it is tried on.

    Attributes:
        benchmark: Not prepared yet.
        given: The prompt rows; its own or four prompts by default.
        size: Side of the images in pixels.
        model: The named model, for one that asks for it.
        rewards: Loaded rewards, for one that scores by them; that of the toy by default.
    """

    benchmark: Benchmark
    given: Sequence[Mapping[str, Any]] | None = None
    size: int = 32
    model: NamedModel | None = None
    rewards: RewardSum | None = None

    def asked(self) -> Benchmark:
        """A fresh copy, which has its model and is not prepared.

        Raises:
            CannotRun: If it needs a model.
        """
        benchmark = deepcopy(self.benchmark)
        if isinstance(benchmark, AsksTheModel):
            try:
                benchmark.ask(self.model)
            except ConfigError as error:
                if self.model:
                    raise
                instead = "give check_benchmark a `model`, or name one: pytest --dmdr-plugin NAME --dmdr-model MODEL"
                raise CannotRun(f"it asks for a named model ({error}): {instead}") from error
        return benchmark

    def copy(self, dtype: torch.dtype) -> Benchmark:
        """A fresh copy, which has its model and rewards, prepared on the CPU."""
        benchmark = self.asked()
        if isinstance(benchmark, ScoresByRewards) and (self.rewards or benchmark.reward != "none"):
            rewards = self.rewards
            if rewards is None:
                rewards = Rewards({"toy": (1.0, Redness())})
                rewards.prepare(CPU, torch.float32)
            benchmark.use(rewards)
        benchmark.prepare(CPU, dtype)
        return benchmark

    @cached_property
    def prepared(self) -> Benchmark:
        """A copy in float32."""
        return self.copy(torch.float32)

    @property
    def each(self) -> int:
        """Images of a prompt."""
        return self.benchmark.images_per_prompt

    @cached_property
    def prompt_rows(self) -> list[dict[str, Any]]:
        """A row of each prompt.

        Raises:
            CannotRun: If they are no rows, or too few.
        """
        given = self.given
        if given is None and isinstance(self.benchmark, BringsRows):
            own = self.asked()
            given = own.own_rows()[:4] if isinstance(own, BringsRows) else None
        if given is None:
            named = getattr(self.benchmark, "layout", None) == "grids"
            given = [{"prompt": text} | ({"item_id": str(i)} if named else {}) for i, text in enumerate(PROMPTS)]
        for row in given:
            if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
                raise CannotRun(f"a row is a mapping with a text 'prompt', not {row!r:.80}")
        if len(given) < 2:
            raise CannotRun(f"it is tried on two prompt rows or more, not on {len(given)}")
        return [dict(row) for row in given]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row of each image."""
        return [dict(row) for row in self.prompt_rows for _ in range(self.each)]

    def pictures(self, seed: int = 0) -> Tensor:
        """The same images anew, as files hold them: [N, 3, size, size] float32 in [0, 1], darker and brighter ones."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.rows), 3, self.size, self.size)
        noise = torch.randint(256, shape, generator=generator)
        light = torch.linspace(0.3, 1.0, len(self.rows)).view(-1, 1, 1, 1)
        return (noise * light).round() / 255

    def asks(self, images: Tensor, rows: Sequence[Mapping[str, Any]], *, of: Benchmark | None = None) -> Given:
        """The answers about images [B, 3, H, W], as `dmdr-eval` asks for them.

        Args:
            images: [B, 3, H, W] float32 in [0, 1].
            rows: Of each image.
            of: Another copy than the one that is prepared in float32.

        Raises:
            CannotRun: If they are not tensors [B, ...] and B texts.
        """
        with torch.no_grad():
            given = (of or self.prepared).answers(images, rows)
        return _sound(given, len(images))

    def rows_of(self, index: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of some of the images anew."""
        return deepcopy([self.rows[i] for i in index])

    def asks_about(self, index: Sequence[int], *, of: Benchmark | None = None) -> Given:
        """The answers about some of the images in one batch."""
        return self.asks(self.pictures()[list(index)], self.rows_of(index), of=of)

    @cached_property
    def answers(self) -> Given:
        """Those about all images in one batch."""
        return self.asks_about(range(len(self.rows)))

    @cached_property
    def reference(self) -> KeptAnswers | None:
        """Answers about the images that it compares with, if it wants some; other images stand in for them."""
        place = self.prepared.compared_with() if isinstance(self.prepared, ComparesWithImages) else None
        if place is None:
            return None
        assert isinstance(place, str), f"compared_with returns the path of images, or None, not {place!r:.80}"
        return KeptAnswers(self.asks(self.pictures(seed=1), [dict(NO_PROMPT) for _ in self.rows]))

    def figures_by(self, benchmark: Benchmark) -> dict[str, Figure]:
        """What a prepared copy makes of the answers, which it only reads.

        Raises:
            CannotRun: If these are no figures.
        """
        rows, kept = deepcopy(self.rows), [KeptAnswers(self.answers)] + ([self.reference] if self.reference else [])
        lent = deepcopy(kept)
        with torch.no_grad():
            found = benchmark.figures(lent[0], rows, lent[1] if self.reference else None)
        for mine, other in zip(lent, kept, strict=True):
            for name, answer in other.given.items():
                unchanged = same(mine.given[name], answer)
                assert unchanged, f"figures changed the answers '{name}' in place; a run makes figures of them again"
        assert rows == self.rows, "figures changed the rows in place"
        if not isinstance(found, Mapping) or not found:
            raise CannotRun(f"figures returns Figures by name, not {found!r:.80}")
        for name, figure in found.items():
            if not isinstance(name, str) or not isinstance(figure, Figure):
                raise CannotRun(f"figures returns Figures by name; {name!r} is a {type(figure).__name__}")
        return dict(found)

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """What it makes of its answers."""
        return self.figures_by(self.prepared)


def _sound(given: Any, count: int) -> Given:
    """Answers that `dmdr-eval` can keep.

    Raises:
        CannotRun: If they are not tensors [B, ...] and B texts, without a graph.
    """
    if not isinstance(given, Mapping) or not given:
        raise CannotRun(f"answers returns tensors [B, ...] or B texts by name, not {given!r:.80}")
    found: Given = {}
    for name, value in given.items():
        if not isinstance(name, str) or name in ("image", "prompt"):
            raise CannotRun(f"an answer's name is a text, and neither image nor prompt, which are there: {name!r}")
        if isinstance(value, Tensor):
            if value.ndim == 0 or len(value) != count:
                raise CannotRun(f"'{name}' must be [{count}, ...] for {count} images, not {list(value.shape)}")
            if value.requires_grad:
                raise CannotRun(f"'{name}' has a graph under no_grad; is there an enable_grad inside?")
            found[name] = value
            continue
        many = isinstance(value, Sequence) and not isinstance(value, str)
        if not many or not all(isinstance(text, str) for text in value):
            raise CannotRun(f"'{name}' must be a tensor [{count}, ...] or {count} texts, not {type(value).__name__}")
        if len(value) != count:
            raise CannotRun(f"'{name}' must be {count} texts for {count} images, not {len(value)}")
        found[name] = list(value)
    return found


def _form(answer: Tensor | list[str]) -> object:
    """What all answers of a name have in common: they are kept in one tensor, or in one list."""
    return (answer.dtype, tuple(answer.shape[1:])) if isinstance(answer, Tensor) else "texts"


def _forms(given: Given) -> dict[str, object]:
    return {name: _form(answer) for name, answer in given.items()}


def _rows_of(given: Given, index: Sequence[int]) -> Given:
    """The answers about some of the images."""
    return {
        name: answer[list(index)] if isinstance(answer, Tensor) else [answer[i] for i in index]
        for name, answer in given.items()
    }


def _other(found: Given, wanted: Given) -> str | None:
    """The name of an answer that differs by more than rounding, or None."""
    return next((name for name in wanted if not _alike(found[name], wanted[name])), None)


def _alike(a: Tensor | list[str], b: Tensor | list[str]) -> bool:
    """Numbers, also those in texts, up to 1e-4 of the largest; all else alike."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if not a.is_floating_point():
            return torch.equal(a, b)
        largest = b.abs()[b.isfinite()]
        tolerance = 1e-6 + (1e-4 * largest.max().item() if len(largest) else 0.0)
        return torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance, equal_nan=True)
    return all(_alike_texts(mine, other) for mine, other in zip(a, b, strict=True))


def _alike_texts(a: Any, b: Any) -> bool:
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    pairs = zip(map(float, NUMBER.findall(a)), map(float, NUMBER.findall(b)), strict=True)
    return all(math.isclose(mine, other, rel_tol=1e-4, abs_tol=1e-4) for mine, other in pairs)


def _require_forms(found: Given, wanted: Given, where: str) -> None:
    assert found.keys() == wanted.keys(), (
        f"the answers {where} are {', '.join(found)}, but in a batch {', '.join(wanted)}: give the same in every call"
    )
    for name, form in _forms(wanted).items():
        assert _form(found[name]) == form, (
            f"'{name}' {where} is {_form(found[name])}, but {form} in a batch: all answers of a name are kept together"
        )


# --- The checks ------------------------------------------------------------------------------------------------------


def one_answer_per_image(trial: BenchmarkTrial) -> None:
    """Tensors [B, ...] or B texts by name, without a graph."""
    assert trial.answers


def its_class_says_how_it_is_used(trial: BenchmarkTrial) -> None:
    """`reward` and `reads_prompts` are read before there is an instance; grids have a name and four images."""
    cls: Any = type(trial.benchmark)
    if cls.layout == "grids":
        assert trial.each == 4, f"a grid holds the four images of a prompt: images_per_prompt is 4, not {trial.each}"
        names = [row.get("item_id") for row in trial.prompt_rows]
        assert all(isinstance(name, str) and name and not set(name) & set("/\\") for name in names), (
            f"grids are called by the column item_id of the rows, a text without slashes; here {names[:4]}"
        )
        assert len(set(names)) == len(names), "two prompts have the same item_id, and hence the same grid"
    reads = getattr(cls, "reads_prompts", True)
    assert isinstance(reads, bool), f"reads_prompts is True or False in the class, not {reads!r}"
    flags = {field.name for field in fields(cls) if field.init}
    for name in {"reward", "reads_prompts"} & flags:
        raise AssertionError(f"{name} is read off the class and cannot be a flag: annotate it as a ClassVar")
    if isinstance(trial.benchmark, ScoresByRewards):
        assert isinstance(cls.reward, str) and cls.reward, f"reward is a text in the class, not {cls.reward!r}"


def images_of_any_kind_are_answered(trial: BenchmarkTrial) -> None:
    """Black, white and oblong ones: with the same names and shapes, for the answers are kept together."""
    blank = trial.pictures()[:2]
    blank[0], blank[1] = 0.0, 1.0
    _require_forms(trial.asks(blank, trial.rows_of([0, 1])), trial.answers, "about black and white images")
    oblong = trial.pictures()[:1, :, :, : trial.size // 2]
    _require_forms(trial.asks(oblong, trial.rows_of([0])), trial.answers, "about an oblong image")


def images_and_rows_are_only_read(trial: BenchmarkTrial) -> None:
    """What it is given stays as it is."""
    images, rows = trial.pictures()[:2], trial.rows_of([0, 1])
    trial.asks(images, rows)
    assert torch.equal(images, trial.pictures()[:2]), "it changed the images that it was given"
    assert rows == trial.rows[:2], "it changed the rows that it was given; figures get them, too"


def an_answer_does_not_depend_on_the_batch(trial: BenchmarkTrial) -> None:
    """The answer about an image is the same alone, in a batch and in another order, up to 1e-4 of the largest."""
    order = list(range(len(trial.rows)))[::-1]
    shuffled = trial.asks_about(order)
    _require_forms(shuffled, trial.answers, "in another order")
    name = _other(shuffled, _rows_of(trial.answers, order))
    assert name is None, f"'{name}' of an image must not depend on the order of the batch"
    step = max(1, len(trial.rows) // ALONE)
    for i in range(0, len(trial.rows), step):
        alone = trial.asks_about([i])
        _require_forms(alone, trial.answers, "about one image alone")
        name = _other(alone, _rows_of(trial.answers, [i]))
        assert name is None, f"'{name}' of an image must not depend on the rest of the batch"


def no_random_numbers(trial: BenchmarkTrial) -> None:
    """The same images have the same answers, and nothing is drawn from a global generator."""
    first = trial.answers
    with untouched_global_rng("benchmark", "answer alike about the same image, or use a generator of your own"):
        second = trial.asks_about(range(len(trial.rows)))
    for name, answer in first.items():
        assert same(second[name], answer), f"the same images got two different answers '{name}'"


def its_networks_are_frozen(trial: BenchmarkTrial) -> None:
    """Its networks take no gradients and are in eval mode."""
    for name, network in networks(trial.prepared):
        trained = any(p.requires_grad for p in network.parameters())
        assert not trained, f"its {name} would take gradients: call requires_grad_(False) in `prepare`"
        assert not network.training, f"its {name} is in training mode, with dropout on: call eval() in `prepare`"


def bfloat16_weights_answer_too(trial: BenchmarkTrial) -> None:
    """What `--dtype bf16` does to a benchmark: it answers where it does in float32."""
    coarse, plain = trial.asks_about([0, 1], of=trial.copy(torch.bfloat16)), _rows_of(trial.answers, [0, 1])
    assert coarse.keys() == plain.keys(), f"prepared with bfloat16 it gives other answers: {', '.join(coarse)}"
    for name, value in plain.items():
        found = coarse[name]
        if isinstance(value, Tensor) and isinstance(found, Tensor) and found.shape == value.shape:
            lost = found[value.isfinite()]
            assert lost.isfinite().all(), f"prepared with bfloat16 it gives no finite '{name}' where it can in float32"


def images_without_a_prompt_are_answered(trial: BenchmarkTrial) -> None:
    """Those that it compares with have none, and neither has a folder of images, if it says that it reads none."""
    reads = getattr(trial.prepared, "reads_prompts", True)
    if reads and not isinstance(trial.prepared, ComparesWithImages):
        return
    blind = trial.asks(trial.pictures()[:2], [dict(NO_PROMPT)] * 2)
    _require_forms(blind, trial.answers, "about images without a prompt")
    if not reads:
        name = _other(blind, _rows_of(trial.answers, [0, 1]))
        assert name is None, f"reads_prompts = False, but '{name}' is another one with another prompt"


def prompt_rows_come_back(trial: BenchmarkTrial) -> None:
    """Beside images that are drawn lie their rows, a JSON object a line, which `rows` reads; in order, as often."""
    flat, wanted = trial.benchmark.layout == "flat", trial.rows
    if not flat:  # there is a line a prompt
        wanted = trial.prompt_rows
    names: list[dict[str, Any]] = [{"file_name": f"{i:04d}.png"} if flat else {} for i in range(len(wanted))]
    try:
        lines = [json.dumps(name | row) for name, row in zip(names, wanted, strict=True)]
    except TypeError as error:
        raise AssertionError(f"its rows are written as JSON beside images that are drawn: {error}") from error
    benchmark = trial.asked()
    with TemporaryDirectory() as folder:
        file, missing = Path(folder) / "metadata.jsonl", Path(folder) / "missing.jsonl"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        found = [_told(row) for row in benchmark.rows(str(file), "prompt")]
        _require_refusal(benchmark, str(missing))
    expected = [_told(json.loads(line)) for line in lines]
    assert len(found) == len(expected), (
        f"rows reads {len(found)} of {len(expected)} lines of the rows that lie beside its images: keep each line, "
        "also one that is there twice"
    )
    for mine, other in zip(found, expected, strict=True):
        assert mine == other, (
            f"rows must bring back a row that lies beside its images: {other!r:.80} became {mine!r:.80}"
        )


def _require_refusal(benchmark: Benchmark, missing: str) -> None:
    """A missing file is a ConfigError, which users see as one line."""
    instead = "rows raises a ConfigError that names the file, where it cannot be read; it "
    try:
        benchmark.rows(missing, "prompt")
    except ConfigError:
        return
    except Exception as error:
        raise AssertionError(f"{instead}raised {type(error).__name__}: {error}") from error
    raise AssertionError(f"{instead}raised nothing")


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what it says nothing in, and without the name of its image."""
    return {name: value for name, value in row.items() if value is not None and name != "file_name"}


def figures_are_finite_or_nan(trial: BenchmarkTrial) -> None:
    """A value is a number or NaN, with a standard error of at least 0 or NaN."""
    for name, figure in trial.figures.items():
        for what, number in (("value", figure.value), ("error", figure.error)):
            assert type(number) in (int, float), (
                f"{what} of '{name}' is a number of Python's, not {type(number).__name__}"
            )
            assert not math.isinf(number), f"{what} of '{name}' is infinite; NaN says that there is none"
        assert not figure.error < 0, f"error of '{name}' is a standard error, and cannot be {figure.error}"
        decimals = figure.decimals
        assert type(decimals) is int and decimals >= 0, f"decimals of '{name}' is a number of digits, not {decimals!r}"
    assert any(math.isfinite(figure.value) for figure in trial.figures.values()), (
        "none of its figures has a value: give check_benchmark more rows, or others"
    )


def values_have_the_figure_as_their_mean(trial: BenchmarkTrial) -> None:
    """`values` are [N] float64, of which `value` is the mean of the prompts' means: differences are taken of them."""
    for name, figure in trial.figures.items():
        if figure.values is None:
            continue
        form = (figure.values.dtype, list(figure.values.shape)) if isinstance(figure.values, Tensor) else None
        wanted = (torch.float64, [len(trial.rows)])
        assert form == wanted, f"values of '{name}' are one of each image, {wanted}, not {form}"
        means = prompt_means(figure.values, prompts_of(trial.rows))
        mean = means[means.isfinite()].mean().item()  # NaN where there is none
        alike = math.isclose(mean, figure.value, rel_tol=1e-6, abs_tol=1e-9)
        assert alike or (math.isnan(mean) and math.isnan(figure.value)), (
            f"value of '{name}' is {figure.value}, but its values have the mean {mean} over prompts, and --baseline "
            "compares values: use Figure.mean, or leave values out"
        )


def figures_come_of_the_answers_alone(trial: BenchmarkTrial) -> None:
    """An evaluation that goes on reads its answers from disk, and asks about no image before the figures."""
    other = trial.copy(torch.float32)
    with untouched_global_rng("benchmark", "make the same figures of the same answers"):
        again = trial.figures_by(other)
    assert list(again) == list(trial.figures), (
        f"a copy that was not asked about images has the figures {', '.join(again)} of the same answers, not "
        f"{', '.join(trial.figures)}: keep nothing of `answers` but what it returns"
    )
    for name, figure in trial.figures.items():
        assert same([again[name].value, again[name].error], [figure.value, figure.error]), (
            f"a copy that was not asked about images finds another '{name}' in the same answers: keep nothing of "
            "`answers` but what it returns"
        )


def the_table_has_a_title(trial: BenchmarkTrial) -> None:
    """`about` is a line of text: what was computed, by which networks."""
    said = trial.prepared.about()
    assert isinstance(said, str) and re.fullmatch(r"\S.*\.", said), (
        f"about returns a sentence, on one line and with a full stop, not {said!r:.80}"
    )


def no_method_is_misspelt(trial: BenchmarkTrial) -> None:
    """`dmdr-eval` calls optional methods by their names in `dmdr.benchmarks`, and never one whose name is nearly it."""
    spelt("benchmarks", trial.benchmark)


BENCHMARK_CHECKS: tuple[Callable[[BenchmarkTrial], None], ...] = (
    one_answer_per_image,
    its_class_says_how_it_is_used,
    images_of_any_kind_are_answered,
    images_and_rows_are_only_read,
    an_answer_does_not_depend_on_the_batch,
    no_random_numbers,
    its_networks_are_frozen,
    bfloat16_weights_answer_too,
    images_without_a_prompt_are_answered,
    prompt_rows_come_back,
    figures_are_finite_or_nan,
    values_have_the_figure_as_their_mean,
    figures_come_of_the_answers_alone,
    the_table_has_a_title,
    no_method_is_misspelt,
)
