"""What real images show: every layout of captions gives the same rows, and what is missing is said in one line."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from dmdr.errors import ConfigError
from dmdr.evaluation.captions import captioned

NAMES = ("1.png", "2.png", "10.png")
TEXTS = ("a fox", "", "two owls, asleep")
LABELS = {label: [{"prompt": f"class {label}", "label": label}] for label in (0, 1)}


def pictures(folder: Path, *names: str) -> list[Path]:
    """One of each colour, 4 pixels wide."""
    paths = [folder / name for name in names]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 2), (number, 0, 0)).save(path)
    return paths


def rows_of(folder: Path, names: tuple[str, ...] = NAMES, **columns: Any) -> list[dict[str, Any]]:
    pictures(folder, *names)
    return [{"file_name": name} | {c: values[i] for c, values in columns.items()} for i, name in enumerate(names)]


def jsonl(folder: Path) -> str:
    """An index whose images lie in a folder of their own."""
    rows = rows_of(folder, tuple(f"all/{name}" for name in NAMES), text=TEXTS, source=("x", "y", "z"))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def csv(folder: Path) -> str:
    pictures(folder, *NAMES)
    lines = [f'{name},"{text}",{source}\n' for name, text, source in zip(NAMES, TEXTS, "xyz", strict=True)]
    (folder / "metadata.csv").write_text("file_name,caption,source\n" + "".join(lines))
    return str(folder)


def beside(folder: Path) -> str:
    for path, text in zip(pictures(folder, *NAMES), TEXTS, strict=True):
        path.with_suffix(".txt").write_text(f"{text}\n")
    return str(folder)


def saved(folder: Path, **columns: Any) -> str:
    paths = list(map(str, pictures(folder / "images", *NAMES)))
    told = columns or {"text": TEXTS, "source": ("x", "y", "z")}
    table = datasets.Dataset.from_dict({"image": paths, **told}).cast_column("image", datasets.Image())
    table.save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.mark.parametrize("layout", [jsonl, csv, beside, saved])
def test_each_layout_tells_the_same(tmp_path: Path, layout: Any) -> None:
    found = captioned(layout(tmp_path), None, {})
    further = {} if layout is beside else {"source": ("x", "y", "z")}
    assert found.rows == [
        {"prompt": text} | {name: values[i] for name, values in further.items()} for i, text in enumerate(TEXTS)
    ]
    assert [found.pictures.read(i)[0, 0, 0].item() for i in range(len(found.pictures))] == [0, 1, 2]


def test_the_column_may_be_named(tmp_path: Path) -> None:
    place = saved(tmp_path, text=("a", "b", "c"), long=("aa", "bb", "cc"))
    assert [row["prompt"] for row in captioned(place, "long", {}).rows] == ["aa", "bb", "cc"]
    assert [row["long"] for row in captioned(place, None, {}).rows] == ["aa", "bb", "cc"]


def test_labels_stand_for_the_prompts_of_the_run(tmp_path: Path) -> None:
    pictures(tmp_path / "classes", "n02/a.png", "n01/b.png", "n01/c.png")
    place, (a, *_), (b, *_) = str(tmp_path / "classes"), *LABELS.values()
    assert captioned(place, None, LABELS).rows == [a, a, b]
    assert captioned(saved(tmp_path, label=(1, 0, 1)), None, LABELS).rows == [b, a, b]
    with pytest.raises(ConfigError, match="has labels, whose prompts are those of --prompts: do not stream these"):
        captioned(place, None, None)


def test_a_label_with_several_prompts_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path, "a/1.png", "b/1.png")
    several = {0: [{"prompt": "one", "label": 0}, {"prompt": "two", "label": 0}], 1: LABELS[1]}
    assert captioned(str(tmp_path), None, several).rows == [several[0][0], *LABELS[1]]
    assert caplog.messages == ["--real_images: images get the first of the prompts of their label: [0]"]


@pytest.mark.parametrize("layout", [csv, beside])
def test_headers_are_read_unless_nobody_asks(tmp_path: Path, layout: Any) -> None:
    place = layout(tmp_path)
    (tmp_path / "2.png").write_text("no image")
    assert len(captioned(place, None, {}, checked=False).rows) == 3
    with pytest.raises(ConfigError, match=r"2\.png is no image"):
        captioned(place, None, {})


def broken(name: str) -> Any:
    """Writes what is refused."""

    def write(folder: Path) -> str:
        if name == "nothing":
            folder.mkdir(exist_ok=True)
        elif name == "bare":
            pictures(folder, *NAMES)
        elif name == "one text less":
            beside(folder)
            (folder / "2.txt").unlink()
        elif name == "no file":
            jsonl(folder)
            (folder / "all" / "2.png").unlink()
        elif name == "no file_name":
            (folder / "metadata.csv").write_text("name,text\na,b\n")
        elif name == "no JSON":
            (folder / "metadata.jsonl").write_text("{\n")
        elif name == "classes":
            pictures(folder, "a/1.png", "b/1.png", "c/1.png")
        elif name == "number":
            (folder / "metadata.csv").write_text("file_name,text\n1.png,7\n")
            pictures(folder, "1.png")
        elif name == "other columns":
            return saved(folder, tags=(1, 2, 3))
        elif name == "argument":
            return saved(folder, text=TEXTS, prompts=TEXTS)
        elif name == "npz":
            return str(folder / "x.npz")
        return str(folder)

    return write


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("nothing", None, "holds no image"),
        ("bare", None, "have no captions; write them into metadata.jsonl, or into NAME.txt beside NAME.png"),
        ("bare", "text", "--caption_column is not read: .* has neither a metadata.jsonl nor a metadata.csv"),
        ("one text less", None, r"the caption .*2\.txt is not there, though other images have one"),
        ("no file", None, r"metadata\.jsonl names .*2\.png, which is not there"),
        ("no file_name", None, "must have rows with a 'file_name' each"),
        ("no JSON", None, r"--real_images: .*metadata\.jsonl line 1 is no JSON"),
        ("classes", None, "no captions, and image 3 has the label 2, of which --prompts has no row"),
        ("number", None, r"the column 'text' of .*metadata\.csv is no text for image 1: 7"),
        ("other columns", None, r"has no captions; has tags: name the column with --caption_column"),
        ("other columns", "text", r"--caption_column text: .*saved has tags"),
        ("argument", None, "rename the column 'prompts'"),
        ("npz", None, r"an \.npz file has no captions"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, name: str, column: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        captioned(broken(name)(tmp_path), column, LABELS)
    assert "\n" not in str(error.value)
