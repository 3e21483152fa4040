"""Commands that only score: their flags and rewards, and folders of images that stream through."""

import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.evaluation import image_folder, scoring
from dmdr.prompts import Row
from dmdr.rewards import RewardError, Rewards
from dmdr.run.job import build_rewards
from dmdr.settings.chosen import Chosen
from dmdr.settings.fields import REQUIRED, RewardFlags, flag
from dmdr.settings.parse import parse_command

MODULE = '''
from dataclasses import dataclass
from typing import Literal

import torch

class Base:
    """What rewards share; no dataclass itself."""

@dataclass
class Common(Base):
    """What rewards share.

    Attributes:
        checkpoint: A file,
            or a folder.
        chunk: Images at a time.
    """

    differentiable = False
    checkpoint: str | None = None
    chunk: int = 8

    def prepare(self, device, dtype): ...

    def __call__(self, images, prompts, **columns):
        return images.mean((1, 2, 3))

@dataclass
class Bright(Common):
    """How bright it is.

    Attributes:
        chunk: Images at a time, as bright ones take more; 5 % more.
        gain: Of it.
    """

    gain: float = 1.0
    resize: Literal["float", "exact"] | None = None

@dataclass
class Dark(Common):
    device: str = "lamp"
'''

HELPFUL = "A file, or a folder."


@dataclass(kw_only=True)
class Options(RewardFlags):
    folder: str = flag(REQUIRED, "a folder")
    size: int = flag(3, "a size")

    def validate(self) -> None:
        super().validate()
        self._require(self.size >= 1, "size", "at least 1")


@pytest.fixture(scope="module", autouse=True)
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package of somebody else with the rewards `bright` and `dark`."""
    site = tmp_path_factory.mktemp("site")
    info = site / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dmdr.rewards]\nbright = stranger_scoring:Bright\ndark = stranger_scoring:Dark\n"
    )
    (site / "stranger_scoring.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield
    sys.modules.pop("stranger_scoring", None)


def parse(*arguments: str) -> tuple[Options, tuple[Chosen, ...]]:
    return parse_command(Options, ["--folder", "f", *arguments], prog="dmdr-score", description="Score.")


def refusal(*arguments: str) -> str:
    """The one line with which flags are refused."""
    with pytest.raises(ConfigError) as error:
        parse(*arguments)
    line = str(error.value)
    assert "\n" not in line
    return line


# --- Flags ---------------------------------------------------------------------------------------------------------


def test_flags_of_the_command_and_of_its_rewards() -> None:
    options, (bright, dark) = parse(
        *("--reward", "0.3*bright+dark", "--size", "4", "--device", "cpu", "--dtype", "bf16", "--gain", "2"),
        *("--bright_checkpoint", "b", "--dark_device", "torch"),
    )
    assert (options.reward, options.size, options.device, options.dtype) == ("0.3*bright+dark", 4, "cpu", "bf16")
    assert (bright.name, bright.weight, dark.name, dark.weight) == ("bright", 0.3, "dark", 1.0)
    assert bright.options == {"checkpoint": "b", "chunk": 8, "gain": 2.0, "resize": None}
    assert dark.options == {"checkpoint": None, "chunk": 8, "device": "torch"}


def test_a_name_is_short_where_it_is_unambiguous() -> None:
    assert parse("--reward", "dark", "--checkpoint", "d")[1][0].options["checkpoint"] == "d"
    assert parse("--reward", "dark", "--device", "cpu")[1][0].options["device"] == "lamp"  # the command's own
    assert refusal("--reward", "bright+dark", "--checkpoint", "d").startswith("unknown argument --checkpoint")


def test_flags_over_yaml(tmp_path: Path) -> None:
    file = tmp_path / "score.yaml"
    file.write_text("folder: g\nreward: dark\nsize: 5\ncheckpoint: from yaml\n")
    call: dict[str, Any] = {"prog": "dmdr-score", "description": "Score."}
    options, (dark,) = parse_command(Options, ["--config", str(file), "--size", "6"], **call)
    assert (options.folder, options.size, dark.options["checkpoint"]) == ("g", 6, "from yaml")
    assert parse("--config", str(file), "--reward", "bright")[1][0].name == "bright"
    file.write_text("reward: dark\nchekpoint: x\n")
    assert "unknown setting 'chekpoint' (did you mean 'checkpoint'?)" in refusal("--config", str(file))


def test_help_adds_the_flags_of_the_reward_and_of_its_bases(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for arguments in ((), ("--reward", "bright+dark")):
        with pytest.raises(SystemExit) as end:
            parse(*arguments, "--help")
        assert end.value.code == 0
        texts.append(" ".join(capsys.readouterr().out.split()))
    for text in texts:
        assert text.startswith("usage: dmdr-score")
        assert "--dtype {fp32,bf16,fp16}" in text
        assert "bright" in text.partition("Installed rewards: ")[2].split(", ")
    assert "--gain" not in texts[0]
    for name in ("--bright_gain, --gain FLOAT ", "--bright_checkpoint TEXT ", "--dark_chunk INT "):
        assert name in texts[1]
    assert "reward bright: " in texts[1] and "reward dark: " in texts[1]
    assert "Images at a time, as bright ones take more; 5 % more." in texts[1]  # a subclass's own words
    assert "Images at a time. (default: 8)" in texts[1]
    assert texts[1].count(HELPFUL) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "the following arguments are required: --reward"),
        (("--reward", "none"), "--reward none names no reward"),
        (("--reward", "brigth"), "unknown reward 'brigth' (did you mean 'bright'?)"),
        (("--reward", "-1*bright"), "the weight -1"),
        (("--reward", "bright", "--gian", "2"), "unknown argument --gian (did you mean 'gain'?)"),
        (("--reward", "bright", "--gain", "much"), "'much'"),
        (("--reward", "bright", "--gain", "nan"), "--bright_gain must be a finite number"),
        (("--reward", "bright", "--size", "0"), "--size must be at least 1, not 0"),
        (("--reward", "bright", "--dtype", "fp8"), "'fp8'"),
        (("--reward", "bright", "--config", "none.yaml"), "cannot read none.yaml"),
        (("--reward", "bright", "stray"), "unknown argument stray"),
    ],
)
def test_bad_flags(arguments: tuple[str, ...], said: str) -> None:
    assert said in refusal(*arguments)


# --- Rewards -------------------------------------------------------------------------------------------------------


class Model:
    """A named model with a checkpoint for `bright` alone."""

    def reward_checkpoint(self, reward: str, *, held_out: bool = False) -> Path | None:
        return Path("small") if reward == "bright" else None


def built(*arguments: str, model: Any = None, **defaults: Any) -> dict[str, Any]:
    _, chosen = parse("--reward", "0.3*bright+dark", *arguments)
    parts = build_rewards(chosen, model, **defaults).parts
    assert [weight for weight, _ in parts.values()] == [0.3, 1.0]
    return {name: reward for name, (_, reward) in parts.items()}


def test_defaults_fill_what_a_reward_has_and_nobody_set() -> None:
    assert built()["bright"].resize is None
    assert built(resize="exact")["bright"].resize == "exact"
    assert not hasattr(built(resize="exact")["dark"], "resize")
    assert built("--resize", "float", resize="exact")["bright"].resize == "float"
    assert built(gain=7.0)["bright"].gain == 1.0  # which is no None


def test_a_named_model_brings_checkpoints() -> None:
    rewards = built(model=Model(), resize="exact")
    assert (rewards["bright"].checkpoint, rewards["bright"].resize) == ("small", "exact")
    assert rewards["dark"].checkpoint is None
    assert built("--bright_checkpoint", "own", model=Model())["bright"].checkpoint == "own"


# --- A folder of images --------------------------------------------------------------------------------------------


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
        with pytest.raises(ConfigError, match=r"--images: no such folder: .*(none|notes\.txt)"):
            image_folder.find_images(str(path))


@pytest.mark.parametrize("content", [b"", b"a text file\n", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_found_by_its_header(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r"--images: .*2\.png (is no image|cannot be read)"):
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
    with pytest.raises(ConfigError, match=rf"--images: .*1\{suffix} cannot be read"):
        image_folder.read_image(*image_folder.find_images(str(tmp_path)))


def test_every_mode_is_converted_to_rgb(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)
    coloured = Image.fromarray(noise)
    pictures = {"rgba.png": coloured, "cmyk.jpg": Image.fromarray(noise, "CMYK")}
    pictures |= {f"{mode}.png": coloured.convert("RGB").convert(mode) for mode in ("RGB", "L", "LA", "P", "1")}
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn, which no published evaluation makes
    for name, picture in pictures.items():
        picture.save(tmp_path / name, exif=turned)
        found = image_folder.read_image(tmp_path / name)
        assert (found.dtype, list(found.shape)) == (torch.uint8, [3, 5, 3])
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(found.permute(1, 2, 0), np.asarray(image.convert("RGB")))
    assert np.array_equal(image_folder.read_image(tmp_path / "rgba.png").permute(1, 2, 0), noise[..., :3])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.full((4, 4), 300, dtype)).save(tmp_path / "1.tiff")  # RGB of it would be all white
    with pytest.raises(ConfigError, match=r"1\.tiff has more than 8 bits per channel"):
        image_folder.find_images(str(tmp_path))


# --- The stream ----------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """A reward that keeps weak references only, to what it was given."""

    differentiable = False

    def __post_init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.alive: list[int] = []
        self._images: list[weakref.ref[Tensor]] = []

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None: ...

    def __call__(self, images: Tensor, prompts: Any, **columns: Any) -> Tensor:
        assert (images.dtype, images.requires_grad, torch.is_grad_enabled()) == (torch.float32, False, False)
        self._images.append(weakref.ref(images))
        self.alive.append(sum(image() is not None for image in self._images))
        self.seen.append(tuple(images.shape))
        return images.mean((1, 2, 3)) + torch.tensor([float(prompt) for prompt in prompts])


def rows_of(count: int) -> list[Row]:
    return [{"prompt": str(i)} for i in range(count)]


def score(reward: Any, paths: list[Path], rows: list[Row], batch_size: int) -> dict[str, Tensor]:
    rewards = Rewards({"reward": (1.0, reward)})
    own, device = range(len(paths)), torch.device("cpu")
    parts = list(scoring.score_images(rewards, paths, rows, own, batch_size=batch_size, device=device))
    indices, scores = scoring.joined(parts[::-1])
    assert indices == list(own)
    return scores


def test_neighbours_of_one_size_make_a_batch(tmp_path: Path) -> None:
    sizes = [(4, 4)] * 5 + [(6, 4)] * 2 + [(4, 6)] + [(4, 4)] * 2
    paths = [save(tmp_path / f"{i}.png", size, (i, i, i)) for i, size in enumerate(sizes)]
    probe = Probe()
    scores = score(probe, paths, rows_of(10), batch_size=3)
    assert probe.seen == [(3, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 6), (1, 3, 6, 4), (2, 3, 4, 4)]
    expected = torch.arange(10) + torch.arange(10) / 255  # the prompt, and the picture's grey
    torch.testing.assert_close(scores, {"reward": expected})


def test_a_thousand_images_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "1.png", (2, 2), "white")
    decoded: list[weakref.ref[Tensor]] = []
    read_image = image_folder.read_image

    def watched(path: Path) -> Tensor:
        image = read_image(path)
        decoded.append(weakref.ref(image))
        return image

    monkeypatch.setattr(scoring, "read_image", watched)
    most = 0

    class Watching(Probe):
        def __call__(self, images: Tensor, prompts: Any, **columns: Any) -> Tensor:
            nonlocal most
            most = max(most, sum(image() is not None for image in decoded))
            return super().__call__(images, prompts)

    probe = Watching()
    scores = score(probe, [path] * 1000, rows_of(1000), batch_size=8)
    assert torch.equal(scores["reward"], torch.arange(1000) + 1.0)
    assert len(decoded) == 1000
    assert max(probe.alive) == 1
    assert most <= 4 * 8


def test_what_no_reward_can_judge_is_nan(tmp_path: Path) -> None:
    class Picky(Probe):
        def __call__(self, images: Tensor, prompts: Any, **columns: Any) -> Tensor:
            return torch.tensor([label if label else float("nan") for label in columns["label"]])

    rows = [{"prompt": "a", "label": label} for label in (0.0, 2.0, 3.0)]
    scores = score(Picky(), [save(tmp_path / "1.png")] * 3, rows, batch_size=2)["reward"]
    assert scores.isnan().tolist() == [True, False, False]


def test_a_reward_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="reward 'reward' failed: ValueError: could not convert"):
        score(Probe(), [save(tmp_path / "1.png")], [{"prompt": "no number"}], batch_size=2)


# --- What is written -----------------------------------------------------------------------------------------------


def test_csv_holds_every_bit_and_leaves_out_what_was_not_scored() -> None:
    values = torch.tensor([0.1, float("nan"), 1 / 3e20])
    prompts = ['a "red", fox', "café\nat sea", ""]
    rows: list[Row] = [{"prompt": prompt, "label": 1} for prompt in prompts]
    paths = [Path("in") / name for name in ("1.png", "ü.png", "\udcff.png")]
    lines = scoring.as_csv(paths, rows, {"hps": values, "total": 2 * values}).decode().splitlines()
    assert lines[0] == "image,prompt,hps,total"
    assert lines[1] == '1.png,"a ""red"", fox",0.100000001,0.200000003'
    assert lines[2:4] == ['ü.png,"café', 'at sea",,']
    assert lines[4].startswith("\\udcff.png,,")
    assert np.float32(lines[4].split(",")[2]) == values[2].numpy()


def test_table_of_means_and_standard_errors(recwarn: pytest.WarningsRecorder) -> None:
    nan = float("nan")
    scores = {"hps": torch.tensor([1.0, 2.0, 6.0, nan]), "one": torch.tensor([nan, nan, nan, 4.0])}
    scores["total"] = torch.full((4,), nan)
    assert scoring.table(scores).splitlines() == [
        "reward  mean  standard error  images",
        "hps        3          1.5275       3",  # sqrt((4 + 1 + 9) / 2 / 3)
        "one        4               -       1",
        "total      -               -       0",
    ]
    assert not recwarn.list


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to("pipe")
    for output in (tmp_path, *(tmp_path / name for name in ("file/scores.csv", "pipe", "to pipe"))):
        with pytest.raises(ConfigError, match=f"--output {output}"):
            scoring.require_writable(output)
    for output in (tmp_path / "file", tmp_path / "new" / "folder" / "scores.csv", Path("scores.csv")):
        scoring.require_writable(output)
