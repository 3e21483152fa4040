"""The checks of benchmarks catch what they name, and `pytest --dmdr-plugin` runs them."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import trl.trainer.utils  # noqa: F401  # pytester forgets what is imported in a test, and this cannot be imported twice
from torch import Tensor, nn

from dmdr.benchmarks import Answers, Benchmark, Figure, KeptAnswers, Layout
from dmdr.errors import ConfigError
from dmdr.metrics import Rows
from dmdr.prompts import read_prompts
from dmdr.protocols import NamedModel, RewardSum
from dmdr.testing import BENCHMARK_CHECKS, check_benchmark

Given = Mapping[str, Tensor | Sequence[str]]
Row = Mapping[str, Any]
ROWS = [{"prompt": "one", "item_id": "1"}, {"prompt": "two", "item_id": "2"}, {"prompt": "two", "item_id": "3"}]


@dataclass
class Shade:
    """A sound benchmark: mean brightness, a thumbnail, and a text about each image."""

    images_per_prompt: ClassVar[int] = 2
    layout: ClassVar[Layout] = "flat"
    dark: float = 0.3
    seen: int = field(default=0, init=False)

    def about(self) -> str:
        return "Mean brightness. Published numbers are of another network."

    def rows(self, prompts: str, column: str) -> Sequence[Row]:
        return read_prompts(prompts, column=column, repeated=True).rows

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None: ...

    def answers(self, images: Tensor, rows: Sequence[Row]) -> Given:
        level = images.mean((1, 2, 3))
        said = [f"{row['prompt']}: {{'level': {value:.6f}}}" for row, value in zip(rows, level.tolist(), strict=True)]
        return {"level": level, "small": nn.functional.adaptive_avg_pool2d(images, 2), "said": said}

    def figures(self, answers: Answers, rows: Sequence[Row], reference: Answers | None) -> Mapping[str, Figure]:
        level = answers.tensor("level").whole()
        spread = torch.cat(list(answers.tensor("small"))).double().std().item()  # read in parts
        assert len(answers.texts("said")) == len(answers) == len(rows)
        return {"level": Figure.mean(level, rows), "spread": Figure(spread), "none": Figure(float("nan"))}


def with_method(name: str, method: Callable[..., Any], **declared: Any) -> Any:
    """Shade with another method, and other class attributes."""
    return type("Flawed", (Shade,), {name: method, **declared})()


def answering(change: Callable[[dict[str, Any], Tensor, Any], Any]) -> Callable[..., Any]:
    """`answers` of which `change(answers, images, rows)` makes something else."""
    return lambda self, images, rows: change(dict(Shade.answers(self, images, rows)), images, rows)


def with_figures(change: Callable[[dict[str, Figure], Answers], Any]) -> Callable[..., Any]:
    """`figures` of which `change(figures, answers)` makes something else."""
    return lambda self, answers, rows, reference: change(dict(Shade.figures(self, answers, rows, reference)), answers)


def test_a_sound_benchmark_passes() -> None:
    check_benchmark(Shade())
    check_benchmark(Shade(dark=0.5), ROWS, size=16)
    check_benchmark(with_method("x", Shade.about, layout="grids", images_per_prompt=4), ROWS)
    check_benchmark(with_method("x", Shade.about, layout="grids", images_per_prompt=4))
    check_benchmark(with_method("x", Shade.about, layout="samples", images_per_prompt=1), ROWS[:2])


def drawn_in_python(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    random.random()
    return given


def changes_images(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    images.clamp_(0.1)
    return given


def changes_rows(given: dict[str, Any], images: Tensor, rows: Sequence[Any]) -> Any:
    for row in rows:
        row["level"] = 1
    return given


@torch.enable_grad()
def with_graph(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    return {"level": images.requires_grad_().mean((1, 2, 3))}


def joined(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    return given | {"said": " ".join(given["said"])}


def of_the_batch(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    return given | {"level": given["level"] / given["level"].max()}


def sorted_texts(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    return given | {"said": sorted(given["said"])}


def numbered(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    return given | {"said": [f"{i}: {text}" for i, text in enumerate(given["said"])]}


def rounded(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    """No flaw: in the last digits of a number a network may say something else in another batch."""
    noise = 1e-6 * len(images)
    return given | {"level": given["level"] + noise, "said": [f"{value + noise}" for value in given["level"].tolist()]}


def of_its_size(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    return given | {"small": images[:, 0]}


def only_of_several(given: dict[str, Any], images: Tensor, rows: Sequence[Row]) -> Any:
    return given | ({"more": given["level"]} if len(images) > 3 else {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given, *_: None, r"returns tensors \[B, ...\] or B texts by name, not None"),
        (lambda given, *_: {}, "by name, not {}"),
        (lambda given, *_: given | {"prompt": given["said"]}, "neither image nor prompt"),
        (
            lambda given, *_: given | {"level": given["level"].mean()},
            r"'level' must be \[8, ...\] for 8 images, not \[\]",
        ),
        (lambda given, *_: given | {"level": given["level"][1:]}, r"must be \[8, ...\] for 8 images, not \[7\]"),
        (lambda given, *_: given | {"said": given["said"][1:]}, "'said' must be 8 texts for 8 images, not 7"),
        (lambda given, *_: given | {"level": given["level"].tolist()}, "or 8 texts, not list"),
        (joined, "or 8 texts, not str"),
        (with_graph, "'level' has a graph under no_grad"),
        (of_its_size, "'small' about an oblong image is .*: all answers of a name are kept together"),
        (only_of_several, "give the same in every call"),
        (changes_images, "changed the images"),
        (changes_rows, "changed the rows"),
        (of_the_batch, "'level' of an image must not depend on the rest of the batch"),
        (sorted_texts, "'said' of an image must not depend on the order of the batch"),
        (numbered, "'said' of an image must not depend on the order of the batch"),
        (lambda given, *_: given | {"level": given["level"] + torch.rand(1)}, "'level' of an image must not depend on"),
        (drawn_in_python, "drew from Python's global random generator"),
    ],
)
def test_broken_answers_are_taught(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_benchmark(with_method("answers", answering(change)))


def test_rounding_is_no_flaw() -> None:
    check_benchmark(with_method("answers", answering(rounded)))


def test_a_benchmark_that_counts_its_calls_is_caught() -> None:
    class Counting(Shade):
        def answers(self, images: Tensor, rows: Sequence[Row]) -> Given:
            self.seen += 1
            return {**super().answers(images, rows), "calls": torch.full((len(images),), 1 + 1e-7 * self.seen).double()}

    with pytest.raises(AssertionError, match="the same images got two different answers 'calls'"):
        check_benchmark(Counting())


def shifted(figures: dict[str, Figure], answers: Answers) -> dict[str, Figure]:
    return figures | {"level": replace(figures["level"], value=figures["level"].value + 0.01)}


def cut(figures: dict[str, Figure], answers: Answers) -> dict[str, Figure]:
    level = figures["level"]
    assert level.values is not None
    return figures | {"level": replace(level, values=level.values[1:])}


def changing(figures: dict[str, Figure], answers: Answers) -> dict[str, Figure]:
    answers.tensor("level").whole().mul_(2)
    return figures


def single(figures: dict[str, Figure], answers: Answers) -> dict[str, Figure]:
    return figures | {"level": replace(figures["level"], values=answers.tensor("level").whole())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda figures, _: None, "figures returns Figures by name, not None"),
        (lambda figures, _: {}, "figures returns Figures by name, not {}"),
        (lambda figures, _: figures | {"level": 0.5}, "by name; 'level' is a float"),
        (
            lambda figures, _: figures | {"spread": Figure(torch.tensor(1.0))},
            "value of 'spread' is a number of Python's",
        ),
        (lambda figures, _: figures | {"spread": Figure(float("inf"))}, "value of 'spread' is infinite"),
        (lambda figures, _: figures | {"spread": Figure(1.0, float("inf"))}, "error of 'spread' is infinite"),
        (
            lambda figures, _: figures | {"spread": Figure(1.0, -1.0)},
            "error of 'spread' is a standard error, and cannot",
        ),
        (lambda figures, _: figures | {"spread": Figure(1.0, decimals=-1)}, "decimals of 'spread'"),
        (lambda figures, _: {"none": figures["none"]}, "none of its figures has a value"),
        (changing, "figures changed the answers 'level' in place"),
        (shifted, "value of 'level' is .* --baseline compares values"),
        (cut, r"values of 'level' are one of each image, \(torch.float64, \[8\]\), not \(torch.float64, \[7\]\)"),
        (single, r"one of each image, \(torch.float64, \[8\]\), not \(torch.float32, \[8\]\)"),
        (lambda figures, answers: figures | {"x": answers.tensor("gone")}, "gone"),
        (lambda figures, answers: figures | {"x": answers.tensor("said")}, "said"),
        (lambda figures, answers: figures | {"x": answers.texts("level")}, "level"),
    ],
)
def test_broken_figures_are_taught(change: Callable[..., Any], message: str) -> None:
    with pytest.raises((AssertionError, KeyError), match=message):
        check_benchmark(with_method("figures", with_figures(change)))


def test_figures_of_what_only_answers_knew_are_caught() -> None:
    """They would be others after an evaluation that was stopped and went on."""

    class Remembering(Shade):
        def answers(self, images: Tensor, rows: Sequence[Row]) -> Given:
            self.seen = 8
            return super().answers(images, rows)

        def figures(self, answers: Answers, rows: Sequence[Row], reference: Answers | None) -> Mapping[str, Figure]:
            return {"seen": Figure(float(self.seen))}

    with pytest.raises(AssertionError, match="finds another 'seen' in the same answers: keep nothing of `answers`"):
        check_benchmark(Remembering())


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"images_per_prompt": 0}, "must have images_per_prompt in the class, a whole number of at least 1, not 0"),
        ({"images_per_prompt": property(lambda self: 2)}, "a whole number of at least 1, not <property"),
        ({"layout": "grid"}, "must have a layout in the class, one of flat, samples, grids, not 'grid'"),
        ({"layout": "grids"}, "images_per_prompt is 4, not 2"),
        ({"reads_prompts": "no"}, "reads_prompts is True or False in the class, not 'no'"),
        ({"reads_prompts": False}, "reads_prompts = False, but 'said' is another one with another prompt"),
        ({"use": lambda self, rewards: None, "reward": ["toy"]}, "reward is a text in the class"),
        ({"own_row": lambda self: []}, "has a method own_row: do you mean own_rows"),
        ({"about": lambda self: "Two\nlines."}, "about returns a sentence, on one line and with a full stop"),
        ({"about": lambda self: "brightness"}, "about returns a sentence"),
        ({"rows": lambda self, prompts: []}, r"a run refuses it: benchmark Flawed cannot be called as rows\(prompts, "),
        (
            {"prepare": lambda self, device, dtype: setattr(self, "net", nn.Linear(2, 2))},
            "its net would take gradients",
        ),
    ],
)
def test_a_broken_class_is_taught(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_benchmark(type("Flawed", (Shade,), declared)())  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [["1", "1"], ["1", "a/b"], ["1", None], ["1", ""]])
def test_grids_have_names(names: list[Any]) -> None:
    grids = with_method("x", Shade.about, layout="grids", images_per_prompt=4)
    with pytest.raises(AssertionError, match=r"grids are called by the column item_id|have the same item_id"):
        check_benchmark(grids, [{"prompt": "one", "item_id": name} for name in names])


def test_what_is_read_off_the_class_is_no_flag() -> None:
    @dataclass
    class Chosen(Shade):
        reads_prompts: bool = True

    with pytest.raises(AssertionError, match="reads_prompts is read off the class and cannot be a flag"):
        check_benchmark(Chosen())


def once(self: Any, prompts: str, column: str) -> Sequence[Row]:
    return read_prompts(prompts).rows


def with_a_dot(self: Any, prompts: str, column: str) -> Sequence[Row]:
    return [{"prompt": f"{row['prompt']}."} for row in Shade.rows(self, prompts, column)]


def by_open(self: Any, prompts: str, column: str) -> Sequence[Row]:
    return [json.loads(line) for line in Path(prompts).read_text().splitlines()]


def whatever_is_there(self: Any, prompts: str, column: str) -> Sequence[Row]:
    return by_open(self, prompts, column) if Path(prompts).exists() else []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (once, "rows reads 1 of 2 lines"),
        (with_a_dot, "rows must bring back a row that lies beside its images: {'prompt': 'one'} became"),
        (by_open, "rows raises a ConfigError .*; it raised FileNotFoundError"),
        (whatever_is_there, "rows raises a ConfigError .*; it raised nothing"),
    ],
)
def test_rows_that_do_not_come_back_are_caught(rows: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_benchmark(with_method("rows", rows, layout="samples"), [{"prompt": "one"}] * 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "one"}], "tried on two prompt rows or more, not on 1"),
        ([{"text": "one"}, {"text": "two"}], "a row is a mapping with a text 'prompt'"),
        ([{"prompt": "one", "at": {1}}, {"prompt": "two"}], "written as JSON beside images"),
    ],
)
def test_rows_that_are_none(rows: list[Row], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_benchmark(Shade(), rows)


def test_coarse_networks_that_lose_an_answer_are_caught() -> None:
    @dataclass
    class Coarse(Shade):
        lost: bool = field(default=False, init=False)

        def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
            self.lost = dtype == torch.bfloat16

        def answers(self, images: Tensor, rows: Sequence[Row]) -> Given:
            given = dict(super().answers(images, rows))
            return given | ({"level": torch.full((len(images),), torch.nan)} if self.lost else {})

    with pytest.raises(AssertionError, match="prepared with bfloat16 it gives no finite 'level'"):
        check_benchmark(Coarse())


# --- Optional protocols ----------------------------------------------------------------------------------------------


class Compares(Shade):
    """Its answers and figures need no prompt."""

    place: ClassVar[Any] = "real.npz"

    def compared_with(self) -> str | None:
        return self.place  # type: ignore[no-any-return]

    def answers(self, images: Tensor, rows: Sequence[Row]) -> Given:
        return {"level": images.mean((1, 2, 3))}

    def figures(self, answers: Answers, rows: Sequence[Row], reference: Answers | None) -> Mapping[str, Figure]:
        if reference is None:
            return {"level": Figure.mean(answers.tensor("level").whole(), rows)}
        both: list[Rows] = [answers.tensor("level"), reference.tensor("level")]
        assert len(reference) == len(answers) and not torch.equal(both[0].whole(), both[1].whole())
        return {"distance": Figure(abs(both[0].whole().mean() - both[1].whole().mean()).item())}


def test_a_benchmark_is_asked_about_what_it_compares_with() -> None:
    class Elsewhere(Compares):
        place: ClassVar[Any] = None

    class Spoken(Compares):
        def answers(self, images: Tensor, rows: Sequence[Row]) -> Given:
            return {"level": images.mean((1, 2, 3)), **({"said": ["yes"] * len(rows)} if rows[0]["prompt"] else {})}

    check_benchmark(Compares())
    check_benchmark(Elsewhere())
    with pytest.raises(AssertionError, match="compared_with returns the path of images, or None, not 3"):
        check_benchmark(type("Odd", (Compares,), {"place": 3})())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="the answers about images without a prompt are level, but in a batch"):
        check_benchmark(Spoken())


def test_a_benchmark_that_needs_a_model_is_given_one() -> None:
    class Asks(Shade):
        def ask(self, model: NamedModel | None) -> None:
            if model is None:
                raise ConfigError("name one with --model")

        def own_rows(self) -> Sequence[Row]:
            return [{"prompt": f"mode {i}"} for i in range(100)]

        def answers(self, images: Tensor, rows: Sequence[Row]) -> Given:
            assert len(images) <= 8 and rows[0]["prompt"].startswith("mode")
            return super().answers(images, rows)

    model: Any = object()
    check_benchmark(Asks(), model=model)
    with pytest.raises(
        AssertionError, match=r"asks for a named model \(name one with --model\): give check_benchmark a"
    ):
        check_benchmark(Asks())


def test_a_benchmark_is_given_rewards() -> None:
    @dataclass
    class Scores(Shade):
        reward: ClassVar[str] = "hps"
        _rewards: RewardSum | None = field(default=None, init=False)

        def use(self, rewards: RewardSum) -> None:
            self._rewards = rewards

        def answers(self, images: Tensor, rows: Sequence[Row]) -> Given:
            assert (self._rewards is None) == (self.reward == "none")
            scores = self._rewards.each(images, [row["prompt"] for row in rows]) if self._rewards else {}
            return {**super().answers(images, rows), **scores}

    class Seldom(Scores):
        reward: ClassVar[str] = "none"

    check_benchmark(Scores())
    check_benchmark(Seldom())


# --- pytest --dmdr-plugin ------------------------------------------------------------------------------------------


MINE = """
from dataclasses import dataclass

from dmdr.benchmarks import Figure
from dmdr.prompts import read_prompts

@dataclass
class Mine:
    scale: float = 1.0
    images_per_prompt = 1
    layout = "flat"

    def about(self):
        return "Brightness."

    def rows(self, prompts, column):
        return read_prompts(prompts, column=column, repeated=True).rows

    def prepare(self, device, dtype): ...

    def answers(self, images, rows):
        assert self.scale == 2
        return {"level": self.scale * images.mean((1, 2, 3)), "said": [row["prompt"] for row in rows]}

    def figures(self, answers, rows, reference):
        return {"level": Figure.mean(answers.tensor("level").whole(), rows)}

class Counted(Mine):
    def answers(self, images, rows):
        assert {row["prompt"] for row in rows} <= set("abcd") and all(row["number"] < 5 for row in rows)
        return super().answers(images, rows)

class Asking(Mine):
    def ask(self, model):
        assert type(model).__name__ == "Toy"

class Wrong(Mine):
    def figures(self, answers, rows, reference):
        return {"level": 1.0}
"""


def check(pytester: pytest.Pytester, *arguments: str) -> tuple[int, str]:
    """`pytest --dmdr-plugin` in an empty folder: exit code and what is printed."""
    pytester.makepyfile(mine=MINE)
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v", "--dmdr-option=scale=2", *arguments)
    return int(done.ret), str(done.stdout) + str(done.stderr)


def test_each_promise_is_a_test(pytester: pytest.Pytester) -> None:
    columns = ("--dmdr-column=prompt=[a, b, c, d]", "--dmdr-column=number=[1, 2, 3, 4]")
    plugins = [f"--dmdr-plugin=mine.py:{name}" for name in ("Mine", "Counted", "Asking")]
    code, out = check(pytester, *plugins, *columns, "--dmdr-model=toy")
    assert code == 0 and f"{3 * len(BENCHMARK_CHECKS)} passed" in out, out
    assert "mine.py:Mine::figures_are_finite_or_nan PASSED" in out


def test_a_broken_promise_is_a_line(pytester: pytest.Pytester) -> None:
    code, out = check(pytester, "--dmdr-plugin=mine.py:Wrong")
    assert code == 1 and "figures returns Figures by name; 'level' is a float" in out and "Traceback" not in out
    code, out = check(pytester, "--dmdr-plugin=mine.py:Counted")
    assert code == 1 and "1 failed, 14 skipped" in out


def test_answers_in_memory_are_those_of_a_benchmark() -> None:
    kept = KeptAnswers(Shade().answers(torch.rand(5, 3, 4, 4), [{"prompt": "one"}] * 5))
    small = kept.tensor("small")
    assert len(kept) == len(small) == 5
    assert torch.equal(torch.cat(list(small)), small.whole()) and len(small[torch.tensor([4, 0])]) == 2
    assert isinstance(Shade(), Benchmark)
