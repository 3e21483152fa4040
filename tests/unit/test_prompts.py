"""Prompt files, and the stream of batches that they become."""

from itertools import chain
from pathlib import Path

import pytest
import torch

from dmdr.errors import ConfigError
from dmdr.prompts import Prompts, PromptStream, Row, read_prompts, split_columns


def write(folder: Path, content: bytes, name: str = "prompts.txt") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def refusal(path: str) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ConfigError) as error:
        read_prompts(path)
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
        ('"a fox"', "line 3 is no object with a text under the key 'prompt'"),
        ('["prompt"]', "line 3 is no object with a text under the key 'prompt'"),
        ('{"text": "a fox", "label": 1}', "line 3 is no object with a text under the key 'prompt'"),
        ('{"prompt": 3, "label": 1}', "line 3 is no object with a text under the key 'prompt'"),
        ('{"prompt": "a fox"}', "line 3 has the keys prompt, but the first has label, prompt"),
        (
            '{"prompt": "a", "label": 1, "x": 1}',
            "line 3 has the keys label, prompt, x, but the first has label, prompt",
        ),
        ('{"prompt": "a", "images": 1}', "line 3: 'images' cannot name a column; it is an argument of every reward"),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: str, message: str) -> None:
    text = f'{{"prompt": "a fox", "label": 3}}\n\n{line}\n'
    assert message in refusal(write(tmp_path, text.encode(), "prompts.jsonl"))


def test_rows_need_a_prompt_file_that_holds_some(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, b"\n\n", "prompts.jsonl")).endswith("holds no prompt")


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
