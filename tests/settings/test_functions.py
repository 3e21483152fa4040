"""Functions as rewards: what they are given, what they may return, and how coroutines run side by side."""

import asyncio
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmdr import train
from dmdr.errors import ConfigError
from dmdr.protocols import Reward
from dmdr.settings.chosen import Chosen
from dmdr.settings.functions import as_reward
from dmdr.settings.verify import check_columns

PROMPTS = ["a", "bb", "ccc"]
COLUMNS = {"label": [3, 1, 2], "answer": ["x", None, "y"]}
PATIENCE = 30.0  # s; only reached by a test that fails


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def score(function: Callable[..., Any], images: Tensor, **flags: Any) -> list[float]:
    scores = as_reward(function, "f.py:score")(**flags)(images, PROMPTS, **COLUMNS)
    assert (scores.shape, scores.dtype, scores.requires_grad) == ((3,), torch.float32, False)
    return scores.tolist()


# --- What it is given -------------------------------------------------------------------------------------------------


def test_all_images_at_once(images: Tensor) -> None:
    def everything(images: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        assert not torch.is_grad_enabled() and not images.requires_grad
        assert (prompts, columns) == (PROMPTS, COLUMNS)
        return images.mean((1, 2, 3))

    expected = images.mean((1, 2, 3)).tolist()
    assert score(everything, images.requires_grad_()) == expected
    assert isinstance(as_reward(everything, "f")(), Reward)


def test_one_image_at_a_time(images: Tensor) -> None:
    given = []

    def single(image: Tensor, prompt: str, label: int, **columns: Any) -> float:
        given.append((prompt, label, columns))
        assert image.shape == (3, 4, 4) and not torch.is_grad_enabled()
        return image.mean()  # a tensor without dimensions is a number

    assert score(single, images) == pytest.approx(images.mean((1, 2, 3)).tolist())
    assert given == [("a", 3, {"answer": "x"}), ("bb", 1, {"answer": None}), ("ccc", 2, {"answer": "y"})]


def test_columns_by_name(images: Tensor) -> None:
    def needs(images: Tensor, label: list[int], *, answer: list[str | None]) -> list[int]:
        assert answer == COLUMNS["answer"]
        return label

    def spares(image: Tensor, label: int = 7, seed: int = 5) -> int:
        return label + seed

    assert score(needs, images) == [3, 1, 2]
    assert score(spares, images) == [8, 6, 7]
    assert as_reward(needs, "f").columns == ("label", "answer")
    assert as_reward(spares, "f").columns == ()
    assert as_reward(lambda images, prompts, **columns: [], "f").columns == ()


def test_a_column_that_is_not_there_is_refused() -> None:
    def needs(image: Tensor, answer: str, label: int = 0) -> float: ...

    chosen = [Chosen("rewards", "f.py:score", "f.py:score", 1.0, as_reward(needs, "f.py:score"))]
    with pytest.raises(ConfigError) as caught:
        check_columns(chosen, [{"prompt": "a", "label": 3, "tags": []}])
    expected = "reward 'f.py:score' needs the prompts to have a column 'answer'; they have label, tags"
    assert str(caught.value) == expected
    check_columns(chosen, [{"prompt": "a", "answer": None}])


def test_columns_do_not_take_the_place_of_its_own(images: Tensor) -> None:
    def single(image: Tensor, **columns: Any) -> int:
        assert set(columns) == {"label", "answer"} and image.shape == (3, 4, 4)
        return 1

    reward = as_reward(single, "f")()
    assert reward(images, PROMPTS, image=["a.png"] * 3, prompt=["z"] * 3, **COLUMNS).tolist() == [1, 1, 1]


def batch_module(images: list[PIL.Image.Image]) -> list[Any]: ...
def batch_class(images: Sequence[Image.Image]) -> list[Any]: ...
def batch_text(images: "list[Image.Image]") -> list[Any]: ...
def batch_inner_text(images: list["Image.Image"]) -> list[Any]: ...
def batch_inner_name(images: list["Image"]) -> list[Any]: ...
def batch_unknown(images: "list[Image]", other: "Unknown" = None) -> list[Any]: ...  # noqa: F821
def batch_module_itself(images: list[Image]) -> list[Any]: ...
def single_class(image: Image.Image) -> Any: ...
def single_optional(image: Image.Image | None) -> Any: ...


@pytest.mark.parametrize(
    "annotated",
    [
        batch_module,
        batch_class,
        batch_text,
        batch_inner_text,
        batch_inner_name,
        batch_unknown,
        batch_module_itself,
        single_class,
        single_optional,
    ],
)
def test_pil_images_where_it_asks_for_them(annotated: Callable[..., Any], images: Tensor) -> None:
    def check(image: Any) -> float:
        assert isinstance(image, Image.Image) and (image.mode, image.size) == ("RGB", (4, 4))
        return float(np.asarray(image).mean() / 255)

    @functools.wraps(annotated)
    def function(image: Any = None, images: Any = None) -> Any:
        return check(image) if images is None else [check(image) for image in images]

    assert score(function, images) == pytest.approx(images.mean((1, 2, 3)).tolist(), abs=0.5 / 255)


def test_tensors_otherwise(images: Tensor) -> None:
    def named_alike(images: "ImageBatch") -> list[float]:  # noqa: F821
        return [float(isinstance(images, Tensor))] * 3

    assert score(named_alike, images) == [1.0] * 3


class Judge:
    def __call__(self, images: Tensor) -> list[float]:
        return [0.0, 1.0, 2.0]

    async def later(self, image: Tensor, prompt: str) -> int:
        return len(prompt)


class AsyncJudge:
    async def __call__(self, images: Tensor) -> list[float]:
        return [0.0, 1.0, 2.0]


def test_whatever_can_be_called_by_name(images: Tensor) -> None:
    def factor(factor: float, images: Tensor, prompts: Sequence[str]) -> list[float]:
        return [factor * len(prompt) for prompt in prompts]

    assert score(functools.partial(factor, 2), images) == [2, 4, 6]
    assert score(Judge(), images) == score(AsyncJudge(), images) == [0, 1, 2]
    assert score(Judge().later, images) == [1, 2, 3]
    assert score(functools.partial(Judge().later), images) == [1, 2, 3]


@pytest.mark.parametrize("grad", [True, False])
def test_no_graph_is_left(grad: bool, images: Tensor) -> None:
    def mean(image: Tensor) -> Tensor:
        return image.mean()

    async def later(image: Tensor) -> Tensor:
        return image.mean()

    def width(images: list[Image.Image]) -> list[int]:
        return [image.width for image in images]

    with torch.set_grad_enabled(grad):
        decoded = images.requires_grad_() * 1
        assert score(mean, decoded) == score(later, decoded) == pytest.approx(images.detach().mean((1, 2, 3)).tolist())
        assert score(width, decoded) == [4, 4, 4]


# --- What it may return -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        [1, None, 0.5],
        [True, math.nan, np.float64(0.5)],
        torch.tensor([1, math.nan, 0.5]).double(),
        np.array([1, math.nan, 0.5]),
        iter([1.0, None, 0.5]),
        (value for value in (1, None, 0.5)),
        [np.float16(1), None, np.array(0.5)],
        [torch.tensor(1), torch.tensor(math.nan), torch.tensor([0.5])],
        (np.int64(1), np.float32(math.nan), Fraction(1, 2)),
    ],
)
def test_numbers_of_any_kind_and_none_where_it_cannot_judge(result: Any, images: Tensor) -> None:
    assert score(lambda images: result, images) == pytest.approx([1.0, math.nan, 0.5], nan_ok=True)


def test_none_of_a_single_image(images: Tensor) -> None:
    def plain(answer: str | None, image: Tensor) -> float | None:
        return None if answer is None else 1.0

    async def later(answer: str | None, image: Tensor) -> float | None:
        return plain(answer, image)

    for function in (plain, later):
        assert score(function, images) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)


LIST = "it must return a list with a number or None for each image"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([1.0], "returned 1 scores for 3 images"),
        (torch.zeros(()), f"returned Tensor; {LIST}"),
        (None, f"returned NoneType; {LIST}"),
        ({"a": 1.0, "b": 2.0, "c": 0.0}, f"returned dict; {LIST}"),
        ({0: 1.0, 1: 2.0, 2: 0.0}, f"returned dict; {LIST}"),
        ({1.0, 2.0, 3.0}, f"returned set; {LIST}"),
        (frozenset((1, 2, 3)), f"returned frozenset; {LIST}"),
        (b"123", f"returned bytes; {LIST}"),
        (0.5, f"returned float; {LIST}"),
        ({1: 0.0, 2: 1.0, 3: 0.5}.values(), f"returned dict_values; {LIST}"),
        ([1j, 1.0, 1.0], "returned no number for image 0, but 1j"),
        ([np.complex64(1), 1.0, 1.0], "returned no number for image 0, but np.complex64(1+0j)"),
        (np.ones(3, complex), "returned no number for image 0, but (1+0j)"),
        ([np.str_("1"), 1.0, 1.0], "returned no number for image 0, but np.str_('1')"),
        (np.array(["1", "2", "3"]), "returned no number for image 0, but '1'"),
        ([[0.0, 1.0, 2.0]], "returned 1 scores for 3 images"),
        ([0.0, "good", 1.0], "returned no number for image 1, but 'good'"),
        ("123", f"returned str; {LIST}"),
        ([0.0, 1.0, [0.5]], "returned no number for image 2, but [0.5]"),
        (torch.zeros(3, 1), "returned no number for image 0, but [0.0]"),
    ],
)
def test_anything_else_is_named(result: Any, said: str, images: Tensor) -> None:
    async def later(images: Tensor) -> Any:
        return result

    for function in (lambda images: result, later):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            score(function, images)
        assert str(caught.value) == f"'f.py:score' {said}"


def test_a_tensor_of_several_is_no_number(images: Tensor) -> None:
    with pytest.raises(ValueError, match="returned no number for image 0, but tensor"):
        score(lambda image: image, images)


def test_a_number_beyond_all_floats_is_none(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"returned no number for image 0, but 1000.*\.\.\..*000$"):
        score(lambda image: 10**400, images)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x, prompts: None, "it must have an argument 'images' or 'image', and not both"),
        (lambda *images, **columns: None, "it must have an argument 'images' or 'image', and not both"),
        (lambda images, image: None, "it must have an argument 'images' or 'image', and not both"),
        (lambda image, prompts: None, "it cannot have both 'image' and 'prompts'"),
        (lambda images, prompt: None, "it cannot have both 'images' and 'prompt'"),
        (lambda images, /, prompts: None, "'images' cannot be given by name"),
        (min, "no signature found for builtin <built-in function min>"),
    ],
)
def test_a_signature_that_cannot_be_served_is_refused(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        as_reward(function, "f.py:score")
    forms = "score(images, prompts, **columns) or score(image, prompt, **columns)"
    assert str(caught.value) == f"reward 'f.py:score' must be callable as {forms}: {said}"


def test_flags_need_no_torch() -> None:
    code = """
import dataclasses, sys
from dmdr.settings.functions import as_reward
async def later(image): ...
assert [f.name for f in dataclasses.fields(as_reward(later, "f"))] == ["max_concurrency"]
assert not dataclasses.fields(as_reward(lambda image: 0, "f"))
assert "torch" not in sys.modules and "PIL" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Coroutines -------------------------------------------------------------------------------------------------------


def test_single_images_are_scored_concurrently(images: Tensor) -> None:
    together = asyncio.Barrier(3)

    async def later(image: Tensor, label: int) -> int:
        assert not torch.is_grad_enabled()
        async with asyncio.timeout(PATIENCE):
            await together.wait()  # passes only when all three are here
        return label

    assert score(later, images) == [3, 1, 2]


def test_no_more_than_max_concurrency_at_a_time() -> None:
    together = asyncio.Barrier(2)
    running: list[int] = []
    peaks = []

    async def later(image: Tensor, label: int) -> int:
        running.append(label)
        peaks.append(len(running))
        async with asyncio.timeout(PATIENCE):
            await together.wait()
        running.remove(label)
        return label

    reward = as_reward(later, "f")(max_concurrency=2)
    assert reward(torch.rand(6, 3, 4, 4), ["p"] * 6, label=list(range(6))).tolist() == list(range(6))
    assert max(peaks) == 2
    assert as_reward(later, "f")().max_concurrency == 16
    with pytest.raises(ConfigError, match="reward 'f': max_concurrency must be at least 1"):
        as_reward(later, "f")(max_concurrency=0)


def test_one_failure_cancels_the_rest(images: Tensor) -> None:
    together = asyncio.Barrier(3)
    cancelled = []

    async def later(image: Tensor, label: int) -> int:
        await together.wait()
        if label == 1:
            raise KeyError("no key") from OSError("why")
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(label)
            raise
        return label

    with pytest.raises(KeyError, match="no key") as caught:
        score(later, images)
    assert isinstance(caught.value.__cause__, OSError)
    assert sorted(cancelled) == [2, 3]


def test_one_loop_for_the_process(images: Tensor) -> None:
    loops = set()

    async def later(images: Tensor) -> list[float]:
        loops.add(asyncio.get_running_loop())
        return [0.0] * 3

    for _ in range(2):
        score(later, images)
    assert len(loops) == 1


def test_a_coroutine_may_exit_and_the_loop_goes_on(images: Tensor) -> None:
    async def later(image: Tensor, label: int) -> int:
        return sys.exit(3) if label == 1 else label

    answer = as_reward(later, "f")().submit(images, PROMPTS, label=[3, 1, 2])
    with pytest.raises(SystemExit):
        answer.result(PATIENCE)
    answer = as_reward(later, "f")().submit(images, PROMPTS, label=[3, 4, 2])
    assert answer.result(PATIENCE).tolist() == [3, 4, 2]


def test_what_is_not_waited_for_can_be_cancelled(images: Tensor) -> None:
    async def never(image: Tensor) -> float:
        await asyncio.Event().wait()
        return 0.0

    answer = as_reward(never, "f")().submit(images, PROMPTS)
    assert not answer.done()
    assert answer.cancel()


# --- In a run ---------------------------------------------------------------------------------------------------------

WISHED = """
from __future__ import annotations
from PIL import Image

async def wished(image: Image.Image, colour: int) -> float:
    return image.getpixel((0, 0))[colour] / 255
"""


def test_grpo_climbs_a_coroutine_that_looks_at_pictures_and_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    rows = [{"prompt": f"mode {i}", "colour": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_file.py").write_text(WISHED)
    monkeypatch.chdir(tmp_path)

    def climbed(rl_weight: float) -> float:
        folder = train(
            model="toy",
            prompts="rows.jsonl",
            rl="grpo",
            reward="my_file.py:wished",
            rl_weight=rl_weight,
            stage1_steps=3,
            stage2_steps=40,
            num_generations=8,
            fake_updates=2,
            logging_steps=1,
            sample_steps=0,
            sample_images=2,
            teacher_steps=2,
            report_to="none",
            output_dir=f"run-{rl_weight}",
        )
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rewards = [line["reward/my_file.py:wished"] for line in lines if line["stage"] == 2]
        return (sum(rewards[-5:]) - sum(rewards[:5])) / 5

    # Over five seeds: 0.028 to 0.040, and -0.002 to 0.004 where it hardly counts.
    assert climbed(3.0) > 0.015
    assert abs(climbed(1e-6)) < 0.01
