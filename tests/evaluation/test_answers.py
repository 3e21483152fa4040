"""Folders and archives of images, and the answers about them: streamed, kept in shards, asked for once."""

import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor

from dmdr import images
from dmdr.benchmarks import Figure
from dmdr.errors import ConfigError, TrainingError
from dmdr.evaluation import answers, image_folder, layouts
from dmdr.evaluation.answers import Store, ask
from dmdr.evaluation.pictures import Archive, Files, Pictures, Quarters, pictures_in
from dmdr.evaluation.tables import Measured, Table, as_csv
from dmdr.prompts import Row

SETTINGS = {"benchmark": "probe"}


def save(path: Path, size: tuple[int, int] = (4, 4), colour: Any = "black", mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def test_images_come_in_natural_order(tmp_path: Path) -> None:
    names = ["1.png", "2.PNG", "10.png", "a1b2.jpg", "a1b10.jpg", "a2.webp", "b.bmp", "b01.png", "b1.png"]
    for name in reversed(names):
        save(tmp_path / name)
    (tmp_path / "scores.csv").write_text("no image")
    (tmp_path / "no suffix").write_text("no image")
    (tmp_path / "._1.png").write_text("what a Mac leaves beside 1.png")
    save(tmp_path / "folder.png" / "3.png")
    assert [path.name for path in image_folder.find_images(str(tmp_path))] == names


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="holds no image"):
        image_folder.find_images(str(tmp_path))
    for path in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(ConfigError, match=r"no such folder: .*(none|notes\.txt)"):
            image_folder.find_images(str(path))


@pytest.mark.parametrize("content", [b"", b"a text file\n", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_found_by_its_header(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r".*2\.png (is no image|cannot be read)"):
        image_folder.find_images(str(tmp_path))


def test_an_image_that_is_too_large_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ConfigError, match=r"1\.png cannot be read: Image size \(16 pixels\)"):
        image_folder.find_images(str(tmp_path))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"] if features.check("webp") else [".png", ".jpg"])
def test_a_truncated_image_fails_when_it_is_read(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"1{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=rf".*1\{suffix} cannot be read"):
        images.read_image(*image_folder.find_images(str(tmp_path)))


def test_every_mode_is_converted_to_rgb(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)
    coloured = Image.fromarray(noise)
    pictures = {"rgba.png": coloured, "cmyk.jpg": Image.fromarray(noise, "CMYK")}
    pictures |= {f"{mode}.png": coloured.convert("RGB").convert(mode) for mode in ("RGB", "L", "LA", "P", "1")}
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn, which no published evaluation makes
    for name, picture in pictures.items():
        picture.save(tmp_path / name, exif=turned)
        found = images.read_image(tmp_path / name)
        assert (found.dtype, list(found.shape)) == (torch.uint8, [3, 5, 3])
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(found.permute(1, 2, 0), np.asarray(image.convert("RGB")))
    assert np.array_equal(images.read_image(tmp_path / "rgba.png").permute(1, 2, 0), noise[..., :3])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.full((4, 4), 300, dtype)).save(tmp_path / "1.tiff")  # RGB of it would be all white
    with pytest.raises(ConfigError, match=r"1\.tiff has more than 8 bits per channel"):
        image_folder.find_images(str(tmp_path))


# --- The stream ------------------------------------------------------------------------------------------------------


class Probe:
    """A benchmark that keeps weak references only, to what it was given."""

    images_per_prompt = 1
    layout = "flat"

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.alive: list[int] = []
        self._images: list[weakref.ref[Tensor]] = []

    def answers(self, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor | Sequence[str]]:
        assert (images.dtype, images.requires_grad, torch.is_grad_enabled()) == (torch.float32, False, False)
        self._images.append(weakref.ref(images))
        self.alive.append(sum(image() is not None for image in self._images))
        self.seen.append(tuple(images.shape))
        number = images.mean((1, 2, 3)) + torch.tensor([float(row["prompt"]) for row in rows])
        return {"number": number, "pair": torch.stack([number, -number], 1), "said": [row["prompt"] for row in rows]}


def rows_of(count: int) -> list[Row]:
    return [{"prompt": str(i)} for i in range(count)]


def asked(folder: Path, benchmark: Any, pictures: Pictures, rows: Sequence[Row], **how: Any) -> Store:
    """Ask about all that is due."""
    store = Store.of(folder, pictures, rows, how.pop("settings", SETTINGS))
    given: dict[str, Any] = {"batch_size": 8, "device": torch.device("cpu")} | how
    list(ask(benchmark, "probe", store, pictures, rows, store.due(), **given))
    return store


def test_neighbours_of_one_size_make_a_batch(tmp_path: Path) -> None:
    sizes = [(4, 4)] * 5 + [(6, 4)] * 2 + [(4, 6)] + [(4, 4)] * 2
    paths = [save(tmp_path / f"{i}.png", size, (i, i, i)) for i, size in enumerate(sizes)]
    probe = Probe()
    store = asked(tmp_path / "answers", probe, Files(tmp_path, paths), rows_of(10), batch_size=3)
    assert probe.seen == [(3, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 6), (1, 3, 6, 4), (2, 3, 4, 4)]
    expected = torch.arange(10) + torch.arange(10) / 255  # the prompt, and the picture's grey
    torch.testing.assert_close(store.tensor("number").whole(), expected)


def test_a_thousand_images_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "1.png", (2, 2), "white")
    decoded: list[weakref.ref[Tensor]] = []
    read_image, most = images.read_image, 0

    def watched(path: Path) -> Tensor:
        image = read_image(path)
        decoded.append(weakref.ref(image))
        return image

    monkeypatch.setattr("dmdr.evaluation.pictures.read_image", watched)

    class Watching(Probe):
        def answers(self, images: Tensor, rows: Any) -> Any:
            nonlocal most
            most = max(most, sum(image() is not None for image in decoded))
            return super().answers(images, rows)

    probe = Watching()
    store = asked(tmp_path / "answers", probe, Files(tmp_path, [path] * 1000), rows_of(1000))
    expected = torch.arange(1000) + 1.0
    assert torch.equal(store.tensor("number").whole(), expected)
    assert store.texts("said") == [str(i) for i in range(1000)]
    assert len(decoded) == 1000 and max(probe.alive) == 1 and most <= 4 * 8
    pair = store.tensor("pair")
    assert [tuple(part.shape) for part in pair] == [(64, 2)] * 15 + [(40, 2)]
    index = torch.tensor([999, 0, 64, 63, 500, 64])
    assert torch.equal(pair[index], torch.stack([expected[index], -expected[index]], 1))
    assert store.names() == (["number"], ["said"])


def test_nothing_is_asked_twice_unless_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SHARD", 4)
    paths = [save(tmp_path / f"{i}.png") for i in range(10)]
    pictures, rows, folder, probe = Files(tmp_path, paths), rows_of(10), tmp_path / "answers", Probe()

    class Stops(Probe):
        def answers(self, images: Tensor, rows: Any) -> Any:
            if len(self.seen) == 3:
                raise TrainingError("out of order")
            return super().answers(images, rows)

    with pytest.raises(TrainingError, match="out of order"):
        asked(folder, Stops(), pictures, rows, batch_size=3)
    assert Store.of(folder, pictures, rows, SETTINGS).due() == [2]  # 9 answers: two whole shards

    def again(rows: Sequence[Row] = rows, settings: Mapping[str, Any] = SETTINGS) -> int:
        probe.seen.clear()
        asked(folder, probe, pictures, rows, settings=settings)
        return sum(shape[0] for shape in probe.seen)

    assert (again(), again()) == (2, 0)
    save(paths[5], colour="white")
    assert again() == 4
    assert again([*rows[:9], {"prompt": "11"}]) == 2
    assert again(settings={"benchmark": "probe", "k": 5}) == 10
    file = folder / "000001.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert again(settings={"benchmark": "probe", "k": 5}) == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "benchmark 'probe' gives no answer"),
        (
            {"number": torch.tensor(1.0)},
            "benchmark 'probe': 'number' is a Tensor; expected a tensor [B, ...], or a text",
        ),
        ({"said": "ab"}, "benchmark 'probe': 'said' is a str; expected a tensor [B, ...], or a text for each image"),
        ({"image": ["a", "b"]}, "benchmark 'probe': an answer is called 'image', as a column of the CSV file is"),
        ({"number": torch.zeros(3)}, "benchmark 'probe': 3 answers 'number' about 2 images"),
        (
            {"number": [1.0, 2.0]},
            "benchmark 'probe': 'number' is a list; expected a tensor [B, ...], or a text for each image",
        ),
    ],
)
def test_answers_that_break_the_contract(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    class Broken(Probe):
        def answers(self, images: Tensor, rows: Any) -> Any:
            return given

    with pytest.raises(TrainingError) as error:
        asked(tmp_path / "answers", Broken(), Files(tmp_path, [save(tmp_path / "1.png")] * 2), rows_of(2))
    assert str(error.value).startswith(said)


def test_no_answer_is_computed_in_tf32(tmp_path: Path) -> None:
    class Watching(Probe):
        def answers(self, images: Tensor, rows: Any) -> Any:
            precise.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().answers(images, rows)

    precise: list[tuple[str, bool]] = []
    torch.set_float32_matmul_precision("high")
    try:
        asked(tmp_path / "answers", Watching(), Files(tmp_path, [save(tmp_path / "1.png")]), rows_of(1))
        assert precise == [("highest", False)] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_answers_have_one_form(tmp_path: Path) -> None:
    class Grows(Probe):
        def answers(self, images: Tensor, rows: Any) -> Any:
            return {"number": torch.zeros(len(images), 1 + int(rows[0]["prompt"]))}

    with pytest.raises(
        TrainingError, match=r"'probe' answers in another form than before: \{'number': .*\[B, 3\]'\}, not"
    ):
        asked(tmp_path / "a", Grows(), Files(tmp_path, [save(tmp_path / "1.png")] * 4), rows_of(4), batch_size=2)


# --- Other places of images ------------------------------------------------------------------------------------------


def test_an_archive_of_samples_is_read_image_by_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    file = tmp_path / "samples.npz"
    np.savez(file, pixels, np.arange(7))  # arr_0, and labels as ADM's sampler writes them
    archive = Archive(file)
    assert len(archive) == 7 and archive.name(3) == "samples.npz#3"
    for i in (6, 0, 3):
        assert np.array_equal(archive.read(i).permute(1, 2, 0), pixels[i])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"images": pixels}, "holds no array 'arr_0' of images"),
        ({"arr_0": pixels / 255}, r"'arr_0' must be uint8 \[N, height, width, 3\], not float64 \[7, 5, 4, 3\]"),
        ({"arr_0": pixels[..., :2]}, r"not uint8 \[7, 5, 4, 2\]"),
    ]
    for arrays, said in wrong:
        np.savez(file, **arrays)
        with pytest.raises(ConfigError, match=said):
            len(Archive(file))
    np.savez_compressed(file, pixels)
    with pytest.raises(ConfigError, match=r"samples\.npz is compressed: write it with numpy\.savez"):
        len(Archive(file))
    file.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"samples\.npz is no \.npz file"):
        len(Archive(file))
    with pytest.raises(ConfigError, match=r"none\.npz is not there"):
        len(Archive(tmp_path / "none.npz"))


def test_the_images_of_a_dataset_are_those_of_its_files(tmp_path: Path) -> None:
    files = [
        save(tmp_path / "files" / f"{i}.png", (4, 5), (40 * i, i, 9), mode="RGBA" if i else "RGB") for i in range(6)
    ]
    columns = {"image": [str(path) for path in files], "label": list(range(6))}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    (tmp_path / "hub" / "data").mkdir(parents=True)  # as repositories of the hub have it, pixels in the tables
    dataset.select(range(4)).to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    dataset.select(range(4, 6)).to_parquet(tmp_path / "hub/data/validation-00000-of-00001.parquet")
    dataset.save_to_disk(str(tmp_path / "saved"))
    expected = [images.read_image(path) for path in files]
    for place, own in (
        ("hub", [0, 1, 2, 3]),
        ("hub:validation", [4, 5]),
        ("hub:validation[1:]", [5]),
        ("saved", range(6)),
    ):
        found = pictures_in(f"{tmp_path}/{place}")
        assert len(found) == len(own) and len({found.stamp(i) for i in range(len(own))}) == len(own)
        assert all(torch.equal(found.read(i), expected[j]) for i, j in enumerate(own))
        assert (
            pickle.loads(pickle.dumps(found)).name(0) == f"{tmp_path}/{place if ':' in place else place + ':train'}#0"
        )
    with pytest.raises(ConfigError, match=r'--reference_images: .*hub: cannot be read: .*Unknown split "test"'):
        len(pictures_in(f"{tmp_path}/hub:test"))
    dataset.remove_columns("image").to_parquet(tmp_path / "bare" / "train.parquet")
    with pytest.raises(ConfigError, match="bare has no columns of images; it must have one: label"):
        len(pictures_in(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="--reference_images: nobody/nothing: no such f"):
        len(pictures_in("nobody/nothing"))


def test_quarters_of_a_grid(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    quarters = Quarters([tmp_path / "a.png"])
    found = [quarters.read(i).permute(1, 2, 0).numpy() for i in range(4)]
    expected = [pixels[:3, :4], pixels[:3, 4:], pixels[3:, :4], pixels[3:, 4:]]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    save(tmp_path / "b.png", (5, 4))
    with pytest.raises(ConfigError, match=r"b\.png is no grid of 2 x 2 images: it has 5 x 4 pixels"):
        Quarters([tmp_path / "b.png"]).read(0)


def read_rows(where: str) -> list[Row]:
    return [json.loads(line) for line in Path(where).read_text().splitlines()]


def find(place: Path, layout: Any, prompts: Path | None = None, unread: bool = False) -> tuple[list[str], list[str]]:
    """Names of the images, and the prompt of each."""
    given = None if prompts is None else str(prompts)
    kept = place.parent / "kept.jsonl"
    found, rows = layouts.find(place, layout, given, read_rows, column="prompt", unread=unread, kept=kept)
    assert len(found) == len(rows)
    return [found.name(i) for i in range(len(found))], [row["prompt"] for row in rows]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": "a cat", "item_id": "one", "tag": "t"}, {"prompt": "a dog", "item_id": "two", "tag": "u"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_layout_of_geneval_is_written_and_read(tmp_path: Path, prompts: Path) -> None:
    folder, rows = tmp_path / "images", read_rows(str(prompts))
    names = layouts.files("samples", 2, 3)
    for i, name in enumerate(names):
        save(folder / name, colour=(i, 0, 0))
    layouts.complete("samples", folder, rows, 3)
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text()) == rows[1]
    expected = names, ["a cat"] * 3 + ["a dog"] * 3
    assert find(folder, "samples", prompts) == expected
    assert find(folder, "samples") == expected  # the prompts lie beside the images
    prompts.write_text(prompts.read_text().replace("a dog", "a fox"))
    with pytest.raises(ConfigError, match=r'00001 is an image of "a dog", but --prompts .* has "a fox" there'):
        find(folder, "samples", prompts)
    prompts.write_text(prompts.read_text().splitlines()[0])
    with pytest.raises(ConfigError, match=r"images of 2 prompts, but --prompts .* has 1"):
        find(folder, "samples", prompts)
    (folder / "00000" / "metadata.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"00000/metadata\.jsonl cannot be read"):
        find(folder, "samples")


def test_the_grids_of_dpg_are_written_and_read(tmp_path: Path, prompts: Path) -> None:
    folder, rows = tmp_path / "images", read_rows(str(prompts))
    names = layouts.files("grids", 2, 4)
    for i, name in enumerate(names):
        save(folder / name, (3, 2), colour=(i, 0, 0))
    layouts.complete("grids", folder, rows, 4)
    grids = folder / "grids"
    assert find(grids, "grids", prompts)[0] == [f"{name}.png#{k}" for name in ("one", "two") for k in range(4)]
    quarters = Quarters([grids / "one.png", grids / "two.png"])
    for i, name in enumerate(names):
        assert torch.equal(quarters.read(i), images.read_image(folder / name))
    assert find(folder, "grids", prompts)[0] == names  # the single images, which are as good
    with pytest.raises(ConfigError, match=r"--prompts is missing: .*grids holds grids of images and no prompts"):
        find(grids, "grids")
    save(grids / "three.png", (6, 4))
    with pytest.raises(ConfigError, match=r"three\.png: --prompts .* names no such prompt"):
        find(grids, "grids", prompts)
    (grids / "three.png").unlink()
    (grids / "two.png").unlink()
    with pytest.raises(ConfigError, match="has no grid of two, which --prompts"):
        find(grids, "grids", prompts)


def test_images_that_lie_flat(tmp_path: Path, prompts: Path) -> None:
    folder = tmp_path / "images"
    for i in range(4):
        save(folder / f"{i}.png")
    cat, dog = ["a cat"] * 2, ["a dog"] * 2
    names = [f"{i}.png" for i in range(4)]
    assert find(folder, "flat", prompts) == (names, cat + dog)
    assert find(folder, "flat", unread=True) == (names, [""] * 4)
    with pytest.raises(ConfigError, match=r"--prompts is missing: .* holds images and no prompts"):
        find(folder, "flat")
    lines = [{"file_name": name, "prompt": prompt} for name, prompt in zip(names, cat + dog, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert find(folder, "flat") == find(folder, "flat", prompts) == (names, cat + dog)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    assert find(folder, "flat") == (names[::-1], dog + cat)
    with pytest.raises(ConfigError, match=r'3\.png is an image of "a dog", but --prompts .* has "a cat" there'):
        find(folder, "flat", prompts)
    (folder / "metadata.jsonl").unlink()
    (folder / "3.png").unlink()
    with pytest.raises(ConfigError, match=r"holds 3 images, but --prompts .* has 2 prompts"):
        find(folder, "flat", prompts)


# --- What is written -------------------------------------------------------------------------------------------------


def test_csv_holds_every_bit_and_leaves_out_what_has_no_answer(tmp_path: Path) -> None:
    class Given(Probe):
        def answers(self, images: Tensor, rows: Any) -> Any:
            values = torch.tensor([0.1, float("nan"), 1 / 3e20])
            return {"hps": values, "said": ["one", "two, three", ""], "pair": torch.zeros(3, 2)}

    prompts = ['a "red", fox', "café\nat sea", ""]
    rows: list[Row] = [{"prompt": prompt, "label": 1} for prompt in prompts]
    pictures = Files(tmp_path, [save(tmp_path / name) for name in ("1.png", "ü.png", "\udcff.png")])
    store = asked(tmp_path / "answers", Given(), pictures, rows)
    lines = as_csv(pictures, rows, store).decode().splitlines()
    assert lines[0] == "image,prompt,hps,said"
    assert lines[1] == '1.png,"a ""red"", fox",0.100000001,one'
    assert lines[2:4] == ['ü.png,"café', 'at sea",,"two, three"']
    assert lines[4].startswith("\\udcff.png,,")
    assert np.float32(lines[4].split(",")[2]) == np.float32(1 / 3e20)


def model(name: str, values: Sequence[float], prompts: Sequence[str], distance: float = 3.0) -> Measured:
    rows = [{"prompt": prompt} for prompt in prompts]
    return Measured(
        name, {"score": Figure.mean(torch.tensor(values), rows), "FID": Figure(distance, decimals=1)}, prompts
    )


def test_the_table_in_all_its_forms() -> None:
    prompts = ["a", "a", "b", "c", "d"]
    base = model("base_1", [1, 3, 2, 6, float("nan")], prompts)  # means 2, 2, 6 and none
    other = model("other|x", [2, 4, 3, 7, 9], prompts, float("nan"))
    elsewhere = model("elsewhere", [2, 4], ["x", "y"])
    table = Table("About it.", [base, other, elsewhere], base)
    text = table.as_text().splitlines()
    assert text[:5] == [
        "About it.",
        "model                score  FID  images",
        "base_1     3.3333 ± 1.3333  3.0       5",  # of 2, 2 and 6
        "other|x    5.5000 ± 1.5000    -       5",  # of 3, 3, 7 and 9
        "elsewhere  3.0000 ± 1.0000  3.0       2",
    ]
    assert text[6].startswith("Difference to base_1 on the same prompts")
    assert text[7:] == ["model                           score", "other|x  +1.0000 (+1.0000 to +1.0000)"]
    assert "| other\\|x | 5.5000 ± 1.5000 | - | 5 |" in table.as_markdown()
    slashed = Table("About it.", [model(r"a\b~c", [1.0, 2.0], ["x", "y"])])
    assert r"a\textbackslash{}b\textasciitilde{}c & 1.5000" in slashed.as_latex()
    assert r"base\_1 & 3.3333 $\pm$ 1.3333 & 3.0 & 5 \\" in table.as_latex()
    found = json.loads(table.as_json())
    assert found["models"]["other|x"][0]["figures"] == {
        "score": {"value": 5.5, "standard_error": pytest.approx(1.5)},
        "FID": {"value": None, "standard_error": None},
    }
    assert found["models"]["base_1"][0]["prompts"] == 4
    difference = found["differences"]["other|x"]["score"]
    assert (difference["mean"], difference["prompts"], difference["left_out"]) == (pytest.approx(1), 3, 1)
    assert "differences" not in json.loads(Table("About it.", [base]).as_json())
    assert len(Table("About it.", [base, other]).parts()) == 1


def test_differences_are_of_the_prompts_that_both_have() -> None:
    base = model("base", [1.0, 2.0, 4.0], ["a", "b", "c"])
    base.figures["only"] = Figure.mean(torch.tensor([1.0, 2.0, 4.0]), [{"prompt": p} for p in "abc"], 1)  # type: ignore[index]
    other = model("other", [3.0, 3.0, 9.0, 9.0], ["b", "b", "c", "x"])
    other.figures["only"] = Figure.mean(torch.tensor([3.0, 3.0, 9.0, 9.0]), [{"prompt": p} for p in "bbcx"], 1)  # type: ignore[index]
    first = model("first", [1.0], ["q"])  # which lacks a column
    table = Table("About it.", [first, base, other], base)
    found = table.differences
    assert found.keys() == {"other"} and found["other"]["score"].count == 2
    assert found["other"]["score"].mean == pytest.approx((1 + 5) / 2)
    assert table.as_text().splitlines()[-1].startswith("other  +3.0000 (+1.0000 to +5.0000)  +3.0 (+1.0 to +5.0)")
    alone = Table("About it.", [first, base], base)
    said = "No difference to base: no column is a mean over prompts of which both have images."
    assert alone.as_text().splitlines()[0] == f"About it. {said}" and len(alone.parts()) == 1
    without = Measured("w", {"score": Figure.mean(torch.ones(2), [{"prompt": ""}] * 2)}, [0, 1])
    assert not Table("About it.", [without, Measured("v", without.figures, [0, 1])], without).differences


def test_repetitions_share_a_line() -> None:
    seeds = [model("joint", values, ["a", "b"], distance) for values, distance in (([1, 2], 3.0), ([2, 5], 4.0))]
    table = Table("About it.", [*seeds, model("one", [1, 2], ["a", "b"])])
    text = table.as_text().splitlines()
    assert text[0] == "About it. Where a model has repetitions, such as seeds: their mean, and half their range."
    assert [line.split("  ")[0] for line in text[2:]] == ["joint", "one"]
    assert "2.5000 ± 1.0000" in text[2] and "3.5 ± 0.5" in text[2] and text[2].endswith(" 4")
    found = json.loads(table.as_json())["models"]["joint"]
    assert [one["figures"]["score"]["value"] for one in found] == [1.5, 3.5]


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from dmdr.evaluation.answers import Store
from dmdr.metrics import Moments, frechet_distance_of_moments, inception_score, kernel_distance, neighbours
import dmdr.metrics

dmdr.metrics.BLOCK = 256
dmdr.metrics.DISTANCES = 2**16
count, folder = int(sys.argv[1]), Path(sys.argv[2])
store = Store(folder, count, ["x"] * ((count + 63) // 64))
generator = torch.Generator().manual_seed(0)
for shard in store.due():
    rows = torch.randn(len(store.indices(shard)), 256, generator=generator)
    store.write(shard, {"pool": rows, "probabilities": rows.softmax(1)})
pool = store.tensor("pool")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moments = Moments.of(pool)
frechet_distance_of_moments(moments, moments)
inception_score(store.tensor("probabilities"), 5000)
kernel_distance(pool, pool, subsets=2, subset_size=500)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_the_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 20_000):
        command = [sys.executable, "-c", MEMORY, str(count), str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[1]))
    assert peaks[1] < 1.1 * peaks[0]
