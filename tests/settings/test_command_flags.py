"""Commands that only score: their flags and rewards."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dmdr.errors import ConfigError
from dmdr.run.job import build_rewards
from dmdr.settings.chosen import Chosen
from dmdr.settings.fields import REQUIRED, RewardFlags, flag
from dmdr.settings.parse import parse_command

MODULE = '''
from dataclasses import dataclass
from typing import Literal


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
    reward: str = flag(REQUIRED, "a sum")
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
