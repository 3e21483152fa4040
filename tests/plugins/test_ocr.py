"""Text in images: the real engine on drawn text, the rules by hand, and what the reward and the benchmark promise."""

import itertools
import logging
import math
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dmdr.benchmarks import Benchmark
from dmdr.errors import ConfigError
from dmdr.protocols import Reward
from dmdr.rewards import RewardError, Rewards
from dmdr.testing import check_reward
from dmdr_ocr import OCR, OCRAccuracy, Reader, agreement, target_of
from dmdr_ocr.rules import levenshtein

CPU = torch.device("cpu")
HELLO = 'a sign that says "Hello World"'


def drawn(text: str, ink: str = "black", paper: str = "white") -> Tensor:
    """[1, 3, 320, 320]"""
    image = Image.new("RGB", (320, 320), paper)
    ImageDraw.Draw(image).text((20, 90), text, ink, font=ImageFont.load_default(44))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


SHOWN = ["Hello World", "Helo World", "", "Hello World\nSALE", "Hello\nWorld"]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat([drawn(text) for text in SHOWN])


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


@pytest.fixture
def one_engine(monkeypatch: pytest.MonkeyPatch, reader: Reader) -> None:
    """Loading it takes a second."""
    monkeypatch.setattr("dmdr_ocr.Reader", lambda threads: reader)


def prepared(plugin: Any) -> Any:
    plugin.prepare(CPU, torch.float32)
    return plugin


# --- The engine -------------------------------------------------------------------------------------------------------


def test_the_engine_reads_what_is_drawn(reader: Reader, images: Tensor) -> None:
    assert reader.read(images) == [text.replace("\n", " ") for text in SHOWN]
    assert reader.read(drawn("STOP!", "yellow", "red")) == ["STOP!"]
    assert reader.read(images[:0]) == []


def test_it_is_loaded_quietly_without_a_network_and_reads_with_one_thread(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    reader = Reader()
    assert reader.read(drawn("")) == [""]
    assert capfd.readouterr() == ("", "")
    for network in (reader._engine.text_det, reader._engine.text_rec):  # both are there before the first image
        options = network.session.session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert reader._engine.text_cls is None
    assert reader._engine.text_score == 0


def test_it_sees_blue_green_red_rounded_as_files_are(monkeypatch: pytest.MonkeyPatch, reader: Reader) -> None:
    seen: list[np.ndarray] = []

    def engine(pixels: np.ndarray) -> Any:
        seen.append(pixels)
        return SimpleNamespace(txts=("a", "b"))

    monkeypatch.setattr(reader, "_engine", engine)
    assert reader.read(torch.tensor([1.0, 0.5, 0.249]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4)) == ["a b"]
    assert seen[0].shape == (2, 4, 3) and seen[0].dtype == np.uint8 and seen[0].flags.c_contiguous
    assert seen[0][0, 0].tolist() == [63, 128, 255]


def test_where_the_engine_fails_there_is_no_text(
    monkeypatch: pytest.MonkeyPatch, reader: Reader, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(pixels: np.ndarray) -> None:
        raise RuntimeError("odd pixels")

    monkeypatch.setattr(reader, "_engine", failing)
    with caplog.at_level(logging.WARNING, "dmdr"):
        assert reader.read(images[:1]) == [""]
    assert "RuntimeError: odd pixels" in caplog.text
    assert agreement("", "Hello") == (0, 0, 0)


def test_an_engine_that_is_absent_or_broken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rapidocr.RapidOCR.__call__", lambda *given, **options: 1 / 0)
        with pytest.raises(ConfigError, match="rapidocr cannot load its networks: ZeroDivisionError"):
            Reader()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for use in (lambda: prepared(OCR()), lambda: prepared(OCRAccuracy()), OCRAccuracy().about):
        with pytest.raises(ConfigError, match=r"needs the package 'onnxruntime': pip install 'dmdr\[ocr\]'"):
            use()


def test_naming_the_plugin_imports_no_engine() -> None:
    code = "import sys, dmdr_ocr; dmdr_ocr.OCR(), dmdr_ocr.OCRAccuracy(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not {"rapidocr", "onnxruntime", "cv2"} & set(run.stdout.split())


# --- The rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        (HELLO, "Hello World"),
        ('"A" and "B"', "A"),
        ("a card with “Happy Birthday” on it", "Happy Birthday"),
        ('“curly” before "straight"', "straight"),  # as published, which knows no curly ones
        ('a 12" record called “Blue”', "Blue"),
        ("it's 'single'", None),
        ('one " alone', None),
        ("ein Schild „Ausgang“ und „Halt“", "Ausgang"),
        ("one “ alone", None),
        ('"" then "B"', None),
        ('"  "', None),
        ("", None),
    ],
)
def test_the_target_is_between_the_first_quotes(prompt: str, target: str | None) -> None:
    assert target_of(prompt) == target
    assert target_of(prompt, "column") == "column"
    assert target_of(prompt, " ") == target


def test_a_column_without_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="the column 'text' must hold text, not 2024"):
        target_of(HELLO, 2024)


@pytest.mark.parametrize(
    ("read", "target", "published", "strict", "exact"),
    [
        ("HELLO world", "Hello World", 1, 1, 1),  # neither case nor spaces count
        ("Helo World", "Hello World", 0.9, 0.9, 0),
        ("Hello World SALE", "Hello World", 1, 10 / 14, 0),
        ("Hello Wurld SALE", "Hello World", 0.5, 9 / 14, 0),  # five edits
        ("", "Hello", 0, 0, 0),
        ("xyz xyz", "No", 0, 0, 0),  # six edits, of which the published rule counts two
        ("ab", "b", 1, 0.5, 0),
    ],
)
def test_scores_by_hand(read: str, target: str, published: float, strict: float, exact: float) -> None:
    assert agreement(read, target) == pytest.approx((published, strict, exact))


def test_without_a_target_there_is_no_score() -> None:
    assert all(math.isnan(score) for score in agreement("Hello", None))


def test_the_edit_distance_is_that_of_its_definition() -> None:
    def defined(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(defined(a[1:], b) + 1, defined(a, b[1:]) + 1, defined(a[1:], b[1:]) + (a[0] != b[0]))

    words = ["".join(letters) for n in range(5) for letters in itertools.product("ab", repeat=n)]
    for a, b in itertools.product([*words, "abc", "cabab"], words):
        assert levenshtein(a, b) == defined(a, b), (a, b)
    assert levenshtein("kitten", "sitting") == 3


# --- The reward -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_engine")
def test_the_reward_by_both_rules(images: Tensor) -> None:
    published: Reward = prepared(OCR())
    strict: Reward = prepared(OCR(rule="strict"))
    torch.testing.assert_close(published(images, [HELLO] * 5), torch.tensor([1, 0.9, 0, 1, 1]))
    torch.testing.assert_close(strict(images[1:4], [HELLO] * 3), torch.tensor([0.9, 0, 10 / 14]))


@pytest.mark.usefixtures("one_engine")
def test_a_prompt_without_quotes_has_no_score_and_is_not_read(monkeypatch: pytest.MonkeyPatch, reader: Reader) -> None:
    seen: list[Any] = []

    def engine(pixels: np.ndarray) -> Any:
        seen.append(pixels)
        return SimpleNamespace(txts=("Hello",))

    monkeypatch.setattr(reader, "_engine", engine)
    reward, images = prepared(OCR()), torch.rand(4, 3, 8, 8)
    prompts = ["a tree", 'a "Hello"', "a sign", "a “World”"]
    assert reward(images, prompts).nan_to_num(-1).tolist() == pytest.approx([-1, 1, -1, 0.2])
    assert len(seen) == 2
    scores = reward(images, prompts, text=["Hello", None, "", "Help"], other=[1] * 4)
    assert scores.nan_to_num(-1).tolist() == pytest.approx([1, 1, -1, 0.5])
    assert reward(images, ["a tree"] * 4).isnan().all()
    with pytest.raises(RewardError, match=r"reward 'ocr' failed: .*the column 'text' must hold text, not 7"):
        Rewards({"ocr": (1.0, reward)}).each(images, prompts, text=[7] * 4)


def test_the_reward_keeps_its_contract() -> None:
    check_reward(OCR(), columns={"text": ["red", None, None, None]})  # one target: each image read takes 0.4 s


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rule": "loose"}, "rule must be 'published' or 'strict'"), ({"ocr_threads": 0}, "ocr_threads must be at least")],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OCR(**options)


def test_it_must_be_prepared() -> None:
    with pytest.raises(RuntimeError, match="OCR has no weights yet"):
        OCR()(torch.rand(1, 3, 8, 8), [HELLO])


# --- The benchmark ----------------------------------------------------------------------------------------------------


class Given:
    """Answers in memory."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    def __len__(self) -> int:
        return len(self.answers["score"])

    def tensor(self, name: str) -> Any:
        return SimpleNamespace(whole=lambda: self.answers[name])

    def texts(self, name: str) -> list[str]:
        return list(self.answers[name])


@pytest.mark.usefixtures("one_engine")
def test_the_benchmark_from_its_prompts_to_its_figures(images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f'{HELLO}\n\n{HELLO}\na wall" with “Hello”\n')
    benchmark: Benchmark = prepared(OCRAccuracy())
    assert isinstance(benchmark, Benchmark)
    assert (OCRAccuracy.images_per_prompt, OCRAccuracy.layout) == (1, "flat")
    rows = benchmark.rows(str(path), "prompt")
    assert len(rows) == 3  # a prompt that is there twice counts twice
    answers = benchmark.answers(images[[0, 3, 4]], rows)
    assert answers["read"] == ["Hello World", "Hello World SALE", "Hello World"]
    expected = {"score": [1, 1, 1], "strict": [1, 10 / 14, 0.5], "exact": [1, 0, 0]}
    for name, values in expected.items():
        torch.testing.assert_close(answers[name], torch.tensor(values, dtype=torch.float64))

    figures = benchmark.figures(Given(dict(answers)), rows, None)
    assert list(figures) == ["OCR accuracy", "strict", "exact match"]
    assert [figure.value for figure in figures.values()] == pytest.approx([1, (12 / 14 + 0.5) / 2, 0.25])
    # Half the difference of the two prompts' means, whatever the images of one differ by.
    assert [figure.error for figure in figures.values()] == pytest.approx([0, (12 / 14 - 0.5) / 2, 0.25])
    for figure, values in zip(figures.values(), expected.values(), strict=True):
        assert figure.values is not None and figure.values.tolist() == pytest.approx(values)


def test_rows_may_have_their_target_in_a_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"caption": "a sign", "text": "Open"}\n{"caption": "a “door”", "text": null}\n')
    rows = OCRAccuracy().rows(str(path), "caption")
    assert [target_of(row["prompt"], row["text"]) for row in rows] == ["Open", "door"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", f"{HELLO}\na tree\n", r"a\.txt: row 2 has no text between double quotes.*: 'a tree'$"),
        (
            "a.jsonl",
            '{"prompt": "a \\"b\\"", "text": 5}\n',
            r"a\.jsonl: row 1: the column 'text' must hold text, not 5",
        ),
        ("a.jsonl", '{"prompt": "\\"b\\""}\n{"prompt": ""}\n', r"row 2 has no text.*: ''$"),
        ("a.jsonl", '{"caption": "a"}\n', "text under the key 'prompt'"),
    ],
)
def test_prompts_without_a_target_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        OCRAccuracy().rows(str(path), "prompt")
    assert str(caught.value).startswith("--prompts: ") and "\n" not in str(caught.value)


def test_about_names_the_engine() -> None:
    about = OCRAccuracy().about()
    assert "rapidocr 3." in about and "onnxruntime 1." in about and "PaddleOCR 2.9.1" in about
