"""Prompt files and datasets, and the stream of batches that they become."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import randoms
from pyarrow import parquet

from dmdr import prompts
from dmdr.errors import ConfigError
from dmdr.prompts import Prompts, PromptStream, Row, Rows, read_prompts, split_columns, stream_prompts


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def write(folder: Path, content: bytes, name: str = "prompts.txt") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def refusal(path: str, read: Callable[..., Rows] = read_prompts, **where: Any) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ConfigError) as error:
        read(path, **where)
    line = str(error.value)
    assert line.startswith("--prompts: ")
    assert path in line
    assert "\n" not in line
    return line


def test_one_prompt_a_line(tmp_path: Path) -> None:
    text = "a red fox\n\n  a boat, at sea \r\na red fox\n\ncafé \u201cx\u201d\nlast"
    rows = read_prompts(write(tmp_path, text.encode())).rows
    assert rows == [{"prompt": p} for p in ("a red fox", "a boat, at sea", "café \u201cx\u201d", "last")]


def test_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, b"\xef\xbb\xbfa red fox\na boat\n")).rows[0] == {"prompt": "a red fox"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n  \n\t\n", "holds no prompt"),
        (b"a fox\n\xff\xfe\n", "is not UTF-8 text: invalid start byte in line 2"),
    ],
)
def test_unfit_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    assert refusal(write(tmp_path, content)).endswith(message)


def test_text_is_read_and_shuffled_without_large_libraries(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"prompt": "a red fox"}\n{"prompt": "a boat"}\n', "prompts.jsonl")
    code = (
        "import sys; from dmdr.prompts import read_prompts; rows = read_prompts(sys.argv[1])\n"
        "assert 'torch' not in sys.modules and next(rows.shuffled(0)) in rows.rows\n"
        "print([name for name in ('datasets', 'pandas', 'transformers', 'trl') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "absent.txt")).startswith("--prompts: no such file")
    assert "doesn't contain any data files" in refusal(str(tmp_path))


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    text = "a red\u2028fox\r\na\x0cboat\ra\x85day"
    assert [row["prompt"] for row in read_prompts(write(tmp_path, text.encode())).rows] == [
        "a red\u2028fox",
        "a\x0cboat",
        "a\x85day",
    ]


@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", "b\n\na\nb\n"), ("p.JSONL", '{"prompt": "b"}\n\n{"prompt": "a"}\n{"prompt": "b"}')]
)
def test_repeated_rows_stay_where_they_are_wanted(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path, text.encode(), name)
    assert [row["prompt"] for row in read_prompts(path).rows] == ["b", "a"]
    assert [row["prompt"] for row in read_prompts(path, repeated=True).rows] == ["b", "a", "b"]


# --- With further columns ---------------------------------------------------------------------------------------------


def test_one_object_a_line(tmp_path: Path) -> None:
    lines = [
        '\ufeff{"prompt": "a fox", "label": 3, "tags": ["red", null]}',
        "",
        '  {"tags": [], "label": 3, "prompt": "a fox"}  ',
        '{"prompt": "a fox", "tags": ["red", null], "label": 3}',
        '{"prompt": "", "tags": {}, "label": 3.5}',
    ]
    rows = read_prompts(write(tmp_path, "\r\n".join(lines).encode(), "prompts.jsonl")).rows
    assert rows == [
        {"prompt": "a fox", "label": 3, "tags": ["red", None]},
        {"prompt": "a fox", "label": 3, "tags": []},  # once each by the whole row
        {"prompt": "", "label": 3.5, "tags": {}},
    ]
    assert split_columns(rows) == (["a fox", "a fox", ""], {"label": [3, 3, 3.5], "tags": [["red", None], [], {}]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a fox", "line 3 is no JSON: Expecting value"),
        ('{"prompt": "a fox"', "line 3 is no JSON: Expecting ',' delimiter"),
        ("[" * 100_000, "line 3 is no JSON: "),
        ('"a fox"', "line 3 must be an object with text under the key 'prompt'"),
        ('["prompt"]', "line 3 must be an object with text under the key 'prompt'"),
        ('{"text": "a fox", "label": 1}', "line 3 must be an object with text under the key 'prompt'"),
        ('{"prompt": 3, "label": 1}', "line 3 must be an object with text under the key 'prompt'"),
        (r'{"prompt": "a \ud83e", "label": 1}', "line 3: the prompt holds half a surrogate pair; remove it"),
        ('{"prompt": "a", "x": 1, "x": 2}', "line 3 is no JSON: 'x' is there twice"),
        ('{"prompt": "a", "images": 1}', "line 3: rename the column 'images'; rewards use this name for an argument"),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: str, message: str) -> None:
    text = f'{{"prompt": "a fox", "label": 3}}\n\n{line}\n'
    assert message in refusal(write(tmp_path, text.encode(), "prompts.jsonl"))


def test_a_key_that_a_row_lacks_is_null(tmp_path: Path) -> None:
    lines = ['{"prompt": "a"}', '{"prompt": "b", "label": 1}', '{"label": null, "prompt": "a"}']
    lines.append('{"prompt": "b", "x": ""}')
    read = read_prompts(write(tmp_path, "\n".join(lines).encode(), "rows.jsonl"))
    assert read.rows == [
        {"prompt": "a", "label": None, "x": None},
        {"prompt": "b", "label": 1, "x": None},
        {"prompt": "b", "label": None, "x": ""},
    ]
    assert str(read) == "3 (1 duplicate left out, 4 rows filled up with null)"
    path = write(tmp_path, "\n".join(reversed(lines[:2])).encode(), "falling.jsonl")
    assert stream_prompts(path).first(2) == [{"prompt": "b", "label": 1}, {"prompt": "a", "label": None}]
    with pytest.raises(ConfigError, match=r"rows\.jsonl line 2 has the key 'label', but the first row does not: in a "):
        stream_prompts(str(tmp_path / "rows.jsonl")).first(2)


def test_objects_in_a_list(tmp_path: Path) -> None:
    rows = [{"prompt": "a [b]", "label": 1}, {"prompt": "c"}]
    for text in (json.dumps(rows), "\ufeff\n " + json.dumps(rows, indent=1) + "\n"):
        read = read_prompts(write(tmp_path, text.encode(), "a.json"))
        assert read.rows == [rows[0], {"prompt": "c", "label": None}]
    path = write(tmp_path, b'[\n{"prompt":\n"a"}\n{}]', "b.json")
    assert "line 4 is no JSON: Expecting ',' delimiter" in refusal(path)
    assert "row 2 must be an object with text" in refusal(write(tmp_path, b'[\n{"prompt": "a"}, "b"]', "c.json"))


def test_rows_need_a_prompt_file_that_holds_some(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, b"\n\n", "prompts.jsonl")).endswith("holds no prompt")


# --- Tables and datasets ----------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": prompt, "label": i, "tag": f"t{i % 2}"}
    for i, prompt in enumerate(["a fox, red", 'a "boat"', "NA", "null"])
]


def as_json(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: Sequence[Row], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_arrow(rows: Sequence[Row], file: Path) -> str:
    table = pyarrow.Table.from_pylist(list(rows))
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return str(file)


def as_parquet(rows: Sequence[Row], file: Path) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file, row_group_size=2)
    return str(file)


def everywhere(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """The rows in all formats that hold columns."""
    (folder / "files").mkdir()
    datasets.Dataset.from_list(list(rows)).save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(list(rows))}).save_to_disk(folder / "splits")
    as_parquet(rows, folder / "files" / "train.parquet")
    return {
        "jsonl": write(folder, as_json(rows), "rows.jsonl"),
        "json": write(folder, json.dumps(list(rows)).encode(), "rows.json"),
        "csv": write(folder, as_csv(rows), "rows.csv"),
        "tsv": write(folder, as_csv(rows, "\t"), "rows.TSV"),
        "arrow": as_arrow(rows, folder / "rows.arrow"),
        "gz": write(folder, gzip.compress(as_csv(rows)), "rows.csv.gz"),
        "parquet": as_parquet(rows, folder / "a[0] *.PARQUET"),
        "folder": str(folder / "files"),
        "saved": str(folder / "saved"),
        "splits": str(folder / "splits"),
    }


FORMATS = ["jsonl", "json", "csv", "tsv", "gz", "arrow", "parquet", "folder", "saved", "splits"]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_rows_from_all_formats(tmp_path: Path, kind: str) -> None:
    twice = [*ROWS, ROWS[1], ROWS[1]]
    path = everywhere(twice, tmp_path)[kind]
    read = read_prompts(path)
    assert read.rows == ROWS
    assert str(read) == "4 (2 duplicates left out)"
    assert read_prompts(path, repeated=True).rows == twice
    streamed = stream_prompts(path)
    assert streamed.first(8) == [*twice, *twice[:2]]
    assert streamed.size is None and str(streamed) == f"streamed from {path}"
    assert sorted(row["label"] for row in islice(streamed.shuffled(0), 6)) == [0, 1, 1, 1, 2, 3]


@pytest.mark.parametrize("kind", FORMATS)
def test_prompts_under_another_name(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "not this", "caption": f"c{i}", "label": i} for i in range(3)]
    path = everywhere(rows, tmp_path)[kind]
    for read in (read_prompts(path, column="caption"), stream_prompts(path, column="caption")):
        assert read.first(3) == [{"prompt": f"c{i}", "label": i} for i in range(3)]
    said = refusal(path, column="text")
    if kind.startswith("json"):
        assert said.endswith("1 must be an object with text under the key 'text'")
    else:
        assert said.endswith(
            "has no column 'text'; give the column of the prompts with --prompt_column: prompt, caption, label"
        )
    if kind not in ("json", "jsonl", "csv", "tsv", "gz"):  # whose prompts are text, whatever they look like
        assert "the column 'label' of" in refusal(path, column="label")


def test_text_has_one_column(tmp_path: Path) -> None:
    said = refusal(write(tmp_path, b"a\n"), column="text")
    assert said.endswith("has no column 'text'; give the column of the prompts with --prompt_column: prompt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\n\nb\na\n \n", "2 (1 duplicate left out, 2 empty lines left out)"),
        (b"a\nb", "2"),
        ("\n".join(map(str, range(1024))).encode(), "1,024"),
    ],
)
def test_counts_of_text(tmp_path: Path, content: bytes, said: str) -> None:
    assert str(read_prompts(write(tmp_path, content))) == said


def test_empty_prompts_are_kept_and_said(tmp_path: Path) -> None:
    """Of labels alone the prompts are empty; a missing text is an empty one."""
    rows: list[Row] = [{"prompt": prompt, "label": i} for i, prompt in enumerate(["a", "", " ", None])]
    read = read_prompts(as_parquet(rows, tmp_path / "a.parquet"))
    assert [row["prompt"] for row in read.rows] == ["a", "", " ", ""]
    assert str(read) == "4 (3 empty prompts kept)"
    assert str(read_prompts(write(tmp_path, b'prompt,label\na,1\n"",2\n,3\n', "a.csv"))) == "3 (2 empty prompts kept)"


def test_columns_without_text_or_numbers_are_left_out_and_said(tmp_path: Path) -> None:
    from PIL import Image

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "prompt": datasets.Value("string"),
            "day": datasets.Value("date32"),
            "pixels": datasets.Array2D((2, 2), "float32"),
            "kind": datasets.ClassLabel(names=["fox", "boat"]),
            "tags": datasets.List(datasets.Value("string")),
            "more": {"size": datasets.Value("float32"), "on": datasets.Value("bool")},
            "raw": {"bytes": datasets.Value("binary")},
        }
    )
    row = {
        "image": Image.new("RGB", (2, 2)),
        "prompt": "a",
        "day": date(2020, 1, 1),
        "pixels": np.zeros((2, 2)),
        "kind": 1,
        "tags": ["x"],
        "more": {"size": 0.5, "on": True},
        "raw": {"bytes": b""},
    }
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "saved")
    expected = [{"prompt": "a", "kind": 1, "tags": ["x"], "more": {"size": 0.5, "on": True}}]
    read = read_prompts(str(tmp_path / "saved"))
    assert read.rows == expected
    assert str(read) == "1 (columns image, day, pixels, raw left out)"
    streamed = stream_prompts(str(tmp_path / "saved"))
    assert streamed.first(1) == expected
    assert str(streamed).endswith("saved; columns image, day, pixels, raw left out")


def test_numbers_of_csv(tmp_path: Path) -> None:
    """By column: whole, with a point, with a gap; a prompt is text even if all of them are digits."""
    text = "\ufeffprompt,label,weight,gap\n1,2,0.5,1\n\n2,3,1,\n"
    assert read_prompts(write(tmp_path, text.encode(), "a.csv")).rows == [
        {"prompt": "1", "label": 2, "weight": 0.5, "gap": 1},
        {"prompt": "2", "label": 3, "weight": 1.0, "gap": None},
    ]
    lines = read_prompts(write(tmp_path, b'prompt\n"one\ntwo"\n', "b.csv")).rows
    assert lines == [{"prompt": "one\ntwo"}]
    text = "prompt,id,on,big,huge,plus,empty,tag\na,007,True,99999999999999999999,1e999,+49,,NA\nb,1,,3,2,1,,2020-01-01"
    first, second = ([*row.values()] for row in read_prompts(write(tmp_path, text.encode(), "c.csv")).rows)
    assert first == ["007", True, 99999999999999999999, "1e999", "+49", None, "NA", "a"]
    assert second == ["1", None, 3, "2", "1", None, "2020-01-01", "b"]


def test_the_start_of_a_streamed_table_says_what_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmdr.prompt_files.TYPED", 2)
    path = write(tmp_path, b"prompt,x\na,1\nb,2\nc,2.5\nd,e\n", "a.csv")
    assert [row["x"] for row in read_prompts(path).rows] == ["1", "2", "2.5", "e"]
    streamed = stream_prompts(path)
    assert [row["x"] for row in streamed.first(3)] == [1, 2, 2.5]
    with pytest.raises(ConfigError, match=r"a\.csv line 5: 'e' is no number, but the first 2 rows of its column are$"):
        streamed.first(4)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "holds no prompt"),
        ("a.csv", b"prompt,x\n", "holds no prompt"),
        ("a.csv", b"prompt\n\na, b\n", "a.csv line 3 has 2 cells, but its header has 1"),
        ("a.csv", b"prompt,x\na,1\n\xff,1\n", "is not UTF-8 text: invalid start byte in line 3"),
        ("a.csv", b'prompt,x\na,1\nb,"2\nc,3\n', "a.csv line 3: unexpected end of data"),
        ("a.csv", b"prompt,x,prompt\na,1,b\n", "a.csv line 1 has two columns called 'prompt'"),
        ("a.csv", b'prompt,x\na,1\n"boat" at sea,2\n', "a.csv line 3: ',' expected after '\"'"),
        (
            "a.tsv",
            b"prompt,x\na,1\n",
            "has no column 'prompt'; give the column of the prompts with --prompt_column: prompt,",
        ),
        ("a.csv.gz", b"prompt,x\na,1\n", "cannot be read: Not a gzipped file"),
        ("a.txt.bz2", bz2.compress(b"a\nb\n")[:20], "cannot be read: Compressed file ended before"),
        ("a.arrow", b"nothing of the kind", "cannot be read: "),
        (
            "a.parquet.gz",
            gzip.compress(b"PAR1", mtime=0),
            "the name must end with .txt, .jsonl, .ndjson, ",
        ),
        ("prompts.xlsx", b"a\n", "(each also with .gz, .bz2, .xz after it), .parquet or .arrow"),
        ("prompts", b"a\n", "prompts: the name must end with .txt, "),
        (
            "a.csv",
            b"text,x\na,1\n",
            "give the column of the prompts with --prompt_column: text, x; most likely it is text",
        ),
        ("a.csv", b"prompt,images\na,b\n", "rename the column 'images'; rewards use this name for an argument"),
        ("a.parquet", b"", "cannot be read: Parquet file size is 0 bytes"),
        ("a.parquet", b"nothing of the kind", "cannot be read: Parquet magic bytes not found in footer."),
        ("a.jsonl", b'[\n{"prompt": "a"}\n]', "line 1 is no JSON: Expecting value"),
    ],
)
def test_unfit_tables_are_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, said: str
) -> None:
    path = write(tmp_path, content, name)
    for read in (read_prompts, stream_prompts):
        assert said in refusal(path, read)
    assert capfd.readouterr() == ("", "")


# --- Published sets, in their layouts ---------------------------------------------------------------------------------

PARTI = """Prompt\tCategory\tChallenge\tNote
"BE KIND" painted on a wall of brick\tIllustrations\tWriting & Symbols\t
a sign with "DEEP" on it\tArtifacts\tWriting & Symbols\t\r
"a fox, and\ta boat"\tAnimals\tBasic\tDALL-E
"""
GENEVAL = [
    {"tag": "counting", "include": [{"class": "fork", "count": 3}], "exclude": [{"class": "fork", "count": 4}]},
    {"tag": "position", "include": [{"class": "cup", "count": 1}, {"class": "cat", "position": ["left of", 0]}]},
]


def pickapic(path: Path) -> None:
    """The columns of pickapic_v2_no_images that matter here: text, numbers and a time."""
    times = pyarrow.array([datetime(2023, 2, 1)] * 3, pyarrow.timestamp("ns"))
    table = {"are_different": [True] * 3, "best_image_uid": [*"xyz"], "caption": [*"aab"], "created_at": times}
    parquet.write_table(pyarrow.table(table | {"label_0": [1.0, 0.5, 0.0]}), path)


def test_partiprompts(tmp_path: Path) -> None:
    """Lines that begin with a quoted word are not quoted; others may be."""
    path = write(tmp_path, PARTI.encode(), "PartiPrompts.tsv")
    said = "--prompt_column: Prompt, Category, Challenge, Note; most likely it is Prompt"
    for read in (read_prompts, stream_prompts):
        assert said in refusal(path, read)
        rows = read(path, column="Prompt").first(3)
        assert [row["prompt"] for row in rows] == [
            '"BE KIND" painted on a wall of brick',
            'a sign with "DEEP" on it',
            "a fox, and\ta boat",
        ]
        assert rows[2] == {
            "prompt": "a fox, and\ta boat",
            "Category": "Animals",
            "Challenge": "Basic",
            "Note": "DALL-E",
        }


def test_pick_a_pic(tmp_path: Path) -> None:
    path = tmp_path / "validation_unique.parquet"
    pickapic(path)
    assert refusal(str(path)).endswith("label_0; most likely it is caption")
    found = read_prompts(str(path), column="caption")
    assert [row["prompt"] for row in found.rows] == ["a", "a", "b"]  # once for each comparison
    assert found.rows[0].keys() == {"prompt", "are_different", "best_image_uid", "label_0"}
    assert str(found) == "3 (column created_at left out)"


def test_lists_of_texts_as_hpsv2_has_them(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(["a fox", "b", "a fox", '"c"']).encode(), "anime.json")
    assert [row["prompt"] for row in read_prompts(path).rows] == ["a fox", "b", '"c"']
    assert stream_prompts(path).first(4)[3] == {"prompt": '"c"'}
    assert read_prompts(path, repeated=True).size == 4
    for mixed in (["a", 3], ["a", ["b"]], [{"prompt": "a"}, "b"]):
        path = write(tmp_path, json.dumps(mixed).encode(), "mixed.json")
        assert "row 2 must be an object with text under the key 'prompt'" in refusal(path)


def test_geneval_keeps_what_its_judge_reads(tmp_path: Path) -> None:
    rows = [row | {"prompt": row["tag"]} for row in GENEVAL]
    path = write(tmp_path, "\n".join(map(json.dumps, rows)).encode(), "evaluation_metadata.jsonl")
    first, second = read_prompts(path).rows
    assert first == rows[0] and second == rows[1] | {"exclude": None}
    captions = write(tmp_path, b'{"caption": "a", "tag": "b"}', "a.jsonl")
    assert refusal(captions).endswith("its prompt seems to be under 'caption': give --prompt_column caption")


LETTERS = [*"ab,\t\n\r \"'\\é\u2028\x0c#;{}[]01.-", "NA", "null", "\r\n", '""', "x"]


def any_rows(chance: random.Random) -> list[Row]:
    """Up to eight rows of texts that parsers stumble over, and of numbers and truth values with gaps."""

    def text() -> str:
        return "".join(chance.choices(LETTERS, k=chance.randrange(6)))

    def one_of(*values: Any) -> Callable[[], Any]:
        return lambda: chance.choice(values)

    kinds = [text, one_of(None, 0, -5, 10**15), one_of(0.5, -1e-9, None), one_of(True, False, None)]
    columns = {f"c {i}": chance.choice(kinds) for i in range(chance.randrange(4))}
    count = 1 + chance.randrange(8)
    rows = [{"prompt": text()} | {name: kind() for name, kind in columns.items()} for _ in range(count)]
    if not any(row["prompt"] for row in rows):
        rows[0]["prompt"] = "x"
    for name, kind in columns.items():
        if kind is text:
            rows[0][name] += "x"  # or it could be a column of numbers
    return rows


@settings(max_examples=25, deadline=None, derandomize=True)
@given(chance=randoms(use_true_random=False))
def test_rows_come_back_from_all_formats(chance: random.Random) -> None:
    """Any rows, as common writers write them; what is damaged anywhere is read or refused in one line."""
    packs = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}
    rows = any_rows(chance)
    with TemporaryDirectory() as place:
        folder = Path(place)
        objects = [row if chance.random() < 0.5 else {k: v for k, v in row.items() if v is not None} for row in rows]
        filled = [dict.fromkeys({name for each in objects for name in each}) | row for row in objects]
        texts = [" ".join(row["prompt"].split()) for row in rows]
        written = {
            ".jsonl": (as_json(objects), filled),
            ".json": (json.dumps(objects, indent=chance.choice([None, 1]), ensure_ascii=False).encode(), filled),
            ".csv": (as_csv(rows), rows),
            ".tsv": (as_csv(rows, "\t"), rows),
            ".txt": ("\n".join(texts).encode(), [{"prompt": text} for text in texts if text]),
        }
        for suffix, (content, expected) in written.items():
            packing = chance.choice(list(packs))
            path = write(folder, packs[packing](content), f"rows{suffix}{packing}")
            if expected:
                assert read_prompts(path, repeated=True).rows == expected
            at, new = chance.randrange(len(content) + 1), chance.choice([b'"', b"{", b"\n", b"a", b"\xff"])
            damaged = packs[packing](content[:at] + new + content[at:])
            Path(path).write_bytes(damaged[: -1 - chance.randrange(20)] if chance.random() < 0.2 else damaged)
            said = f"--prompts: {path}"
            try:
                read_prompts(path)
            except ConfigError as error:
                said = str(error)
            assert said.startswith(f"--prompts: {path}") and "\n" not in said
        for writer in (as_parquet, as_arrow):
            suffix = writer.__name__.removeprefix("as_")
            assert read_prompts(writer(rows, folder / f"rows.{suffix}"), repeated=True).rows == rows


@pytest.mark.parametrize("read", [read_prompts, stream_prompts])
def test_damage_in_the_middle_of_a_parquet_file(tmp_path: Path, read: Callable[..., Rows]) -> None:
    path = Path(as_parquet([{"prompt": f"p{i}", "n": i} for i in range(1000)], tmp_path / "a.parquet"))
    raw = bytearray(path.read_bytes())
    raw[10_000:12_000] = b"\xff" * 2000
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"^--prompts: .*a\.parquet: cannot be read: [^\n]+$"):
        list(islice(read(str(path)).shuffled(0), 1000))


def test_folders_with_splits(tmp_path: Path) -> None:
    for folder in ("files", "saved"):
        (tmp_path / folder).mkdir()
    for split in ("train", "test"):
        as_parquet([{"prompt": split}], tmp_path / "files" / f"{split}.parquet")
    both = {split: datasets.Dataset.from_list([{"prompt": split}]) for split in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    both["train"].save_to_disk(tmp_path / "one")
    for folder in ("files", "saved"):
        assert read_prompts(str(tmp_path / folder)).rows == [{"prompt": "train"}]
        for read in (read_prompts, stream_prompts):
            assert read(str(tmp_path / folder), split="test").first(1) == [{"prompt": "test"}]
            said = refusal(str(tmp_path / folder), read, split="dev")
            assert all(split in said for split in ("dev", "train", "test"))
    assert "has no configurations or splits" in refusal(str(tmp_path / "one"), split="test")
    assert "has no configurations or splits" in refusal(as_parquet(ROWS, tmp_path / "a.parquet"), split="test")
    assert "has no configurations or splits" in refusal(as_parquet(ROWS, tmp_path / "a.parquet"), config="de")
    assert "BuilderConfig 'de' not found" in refusal(str(tmp_path / "files"), config="de")


@pytest.mark.parametrize("read", [read_prompts, stream_prompts])
def test_an_id_that_the_hub_does_not_give(read: Callable[..., Rows]) -> None:
    assert "no/such: no such file, and the hub says: Couldn't reach 'no/such' on the Hub" in refusal("no/such", read)
    for path in ("nosuch", "no/such.csv", "a/b/c"):
        assert refusal(path, read) == f"--prompts: no such file: {path}"


# --- Stream -----------------------------------------------------------------------------------------------------------


def prompts_of(count: int) -> Prompts:
    return Prompts(rows_of(count))


def rows_of(count: int) -> list[Row]:
    return [{"prompt": f"p{i}", "label": i} for i in range(count)]


def labels(stream: PromptStream, batches: int) -> list[list[int]]:
    return [[row["label"] for row in next(stream)] for _ in range(batches)]


def test_each_epoch_holds_each_prompt_once_in_a_new_order() -> None:
    read = list(chain(*labels(PromptStream(prompts_of(8), 4, seed=3), 8)))
    epochs = [read[start : start + 8] for start in range(0, 32, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_that_of_trl() -> None:
    from trl.trainer.utils import RepeatSampler

    prompts, sampler = Prompts([{"prompt": str(i)} for i in range(7)]), RepeatSampler(range(7), 1, seed=5)
    epochs = [{"prompt": str(i)} for _ in range(3) for i in sampler]
    assert list(islice(prompts.shuffled(5), 21)) == epochs


def test_batches_run_on_across_epochs() -> None:
    batches = labels(PromptStream(prompts_of(5), 4), 5)
    assert all(len(batch) == 4 for batch in batches)
    read = list(chain(*batches))
    assert [sorted(read[start : start + 5]) for start in range(0, 20, 5)] == [list(range(5))] * 4


def test_fewer_prompts_than_a_batch() -> None:
    (batch,) = labels(PromptStream(prompts_of(1), 4), 1)
    assert batch == [0] * 4


def test_groups_stay_together() -> None:
    for batch in labels(PromptStream(prompts_of(5), 12, group_size=3, seed=1), 10):
        groups = [batch[start : start + 3] for start in range(0, 12, 3)]
        assert all(len(set(group)) == 1 for group in groups)
    read = list(chain(*labels(PromptStream(prompts_of(5), 12, group_size=3, seed=1), 5)))
    assert [sorted(set(read[start : start + 15])) for start in range(0, 60, 15)] == [list(range(5))] * 4


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes: int) -> None:
    whole = PromptStream(prompts_of(7), 16, group_size=4, seed=5)
    shares = [
        PromptStream(prompts_of(7), 16, group_size=4, seed=5, process_index=rank, num_processes=processes)
        for rank in range(processes)
    ]
    for _ in range(6):
        assert list(chain(*(next(share) for share in shares))) == next(whole)


def test_order_is_the_seed_alone() -> None:
    first = labels(PromptStream(prompts_of(20), 10, seed=1), 4)
    assert labels(PromptStream(prompts_of(20), 10, seed=1), 4) == first
    assert labels(PromptStream(prompts_of(20), 10, seed=2), 4) != first


@pytest.mark.parametrize("consumed", [0, 1, 3, 11])
def test_skipping_equals_reading(consumed: int) -> None:
    kwargs = {"group_size": 2, "seed": 4, "process_index": 1, "num_processes": 2}
    read = PromptStream(prompts_of(5), 8, **kwargs)
    labels(read, consumed)
    skipped = PromptStream(prompts_of(5), 8, **kwargs)
    labels(skipped, 2)  # wherever it stood before
    skipped.skip_to(consumed)
    assert skipped.consumed == read.consumed == consumed
    assert labels(skipped, 5) == labels(read, 5)
    assert skipped.consumed == consumed + 5


def test_stream_leaves_global_generators_alone() -> None:
    before = torch.get_rng_state().tolist()
    labels(PromptStream(prompts_of(5), 8), 3)
    assert torch.get_rng_state().tolist() == before


def test_a_dataset_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not after half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("dmdr.hub._silence", lambda: "the hub does not answer: it is closed")
    said = "--prompts: no/such: no such file, and the hub does not answer: it is closed; set HF_HUB_OFFLINE=1 to "
    assert refusal("no/such").startswith(said)


# --- Streamed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["parquet", "jsonl", "gz", "saved", "shards"])
def streamed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Thirty rows, shuffled among ten."""
    monkeypatch.setattr(prompts, "BUFFER", 10)
    paths = everywhere(rows_of(30), tmp_path)
    (tmp_path / "shards").mkdir()
    for i in range(3):
        as_parquet(rows_of(30)[10 * i : 10 * i + 10], tmp_path / "shards" / f"train-{i}.parquet")
    return stream_prompts((paths | {"shards": str(tmp_path / "shards")})[request.param])


def test_each_epoch_of_a_stream_holds_each_prompt_once(streamed: Rows) -> None:
    read = list(chain(*labels(PromptStream(streamed, 4, seed=3), 30)))
    epochs = [read[start : start + 30] for start in range(0, 120, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(30)) not in epochs


def test_a_stream_that_holds_no_prompt_any_more_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\n")
    rows = stream_prompts(str(file)).shuffled(0)
    assert next(rows)["prompt"] in "ab"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        list(rows)


def test_order_of_a_stream_is_the_seed_alone(streamed: Rows) -> None:
    first = labels(PromptStream(streamed, 10, seed=1), 7)
    assert labels(PromptStream(streamed, 10, seed=1), 7) == first
    assert labels(PromptStream(streamed, 10, seed=2), 7) != first


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_a_stream(streamed: Rows, processes: int) -> None:
    whole = PromptStream(streamed, 16, group_size=4, seed=5)
    shares = [
        PromptStream(streamed, 16, group_size=4, seed=5, process_index=rank, num_processes=processes)
        for rank in range(processes)
    ]
    for _ in range(20):  # side by side: nobody's epoch is another's
        assert list(chain(*(next(share) for share in shares))) == next(whole)


@pytest.mark.parametrize("consumed", [0, 1, 7, 16, 41])
def test_skipping_a_stream_equals_reading_it(streamed: Rows, consumed: int) -> None:
    kwargs = {"group_size": 2, "seed": 4, "process_index": 1, "num_processes": 2}
    read = PromptStream(streamed, 8, **kwargs)
    labels(read, consumed)
    skipped = PromptStream(streamed, 8, **kwargs)
    labels(skipped, 2)
    skipped.skip_to(consumed)
    assert skipped.consumed == read.consumed == consumed
    assert labels(skipped, 12) == labels(read, 12)


def test_a_stream_starts_no_thread_and_never_sleeps(
    streamed: Rows, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` reads several files in a pool of threads each, and sleeps five seconds where one ends."""

    def refuse(*given: Any, **options: Any) -> None:
        raise AssertionError("a thread, or a sleep")

    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.ThreadPoolExecutor.__init__", refuse)
        patch.setattr("time.sleep", refuse)
        stream = PromptStream(streamed, 10, seed=1)
        labels(stream, 7)
        stream.skip_to(2)
        stream.first(2)
        stream.close()


CLOSED: list[int] = []  # by which threads


def numbered() -> Iterator[Row]:
    try:
        yield from ({"prompt": str(i)} for i in range(8))
    finally:
        CLOSED.append(threading.get_ident())


def test_who_reads_a_stream_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the garbage collector, in whatever thread it comes by."""
    examples = datasets.IterableDataset.from_generator(numbered)
    monkeypatch.setattr(prompts, "_open", lambda *where: examples)
    monkeypatch.setattr(prompts, "BUFFER", 2)
    streamed = stream_prompts("a file")
    CLOSED.clear()
    streamed.first(3)
    assert len(CLOSED) == 1
    stream = PromptStream(streamed, 2)
    next(stream)
    left = stream._rows  # that a forgotten stream lives on is what a reference shows
    stream.skip_to(1)
    assert len(CLOSED) == 2 and next(left, None) is None
    next(stream)
    left = stream._rows
    stream.close()
    assert len(CLOSED) == 3 and next(left, None) is None
    assert set(CLOSED) == {threading.get_ident()}


def test_a_stream_passes_over_empty_lines(tmp_path: Path) -> None:
    streamed = stream_prompts(write(tmp_path, b"\n\na\n\nb\n\n"))
    assert [row["prompt"] for row in streamed.first(5)] == ["a", "b", "a", "b", "a"]
    assert "holds no prompt" in refusal(write(tmp_path, b"\n\n"), stream_prompts)


def test_a_stream_finds_what_is_wrong_when_it_gets_there(tmp_path: Path) -> None:
    streamed = stream_prompts(write(tmp_path, b'{"prompt": "a"}\n{"text": "b"}\n', "rows.jsonl"))
    assert streamed.first(1) == [{"prompt": "a"}]
    with pytest.raises(ConfigError, match="line 2 must be an object"):
        streamed.first(2)
