"""The recipes in `examples/`: each parses, fits its model's true size, and trains a small pipeline of its family."""

import json
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
import yaml
from diffusers import AutoencoderTiny
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dmdr.backends.toy import Redness
from dmdr.run.run import run
from dmdr.settings import registry
from dmdr.settings.parse import Settings, parse
from dmdr_digits import Digits
from family import FAMILIES
from pictures import Pictures
from toy_trainer import prepared, trainer

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(file for file in EXAMPLES.glob("*/*.yaml") if (file.parent / "architecture").is_dir())
FAMILY = {  # by folder
    "flux": "flux",
    "flux2_klein": "flux2-klein",
    "krea2": "krea2",
    "qwen_image": "qwen-image",
    "sd3": "sd3",
    "sd35l": "sd3",
    "sd35m": "sd3",
    "sdxl": "sdxl",
    "sit": "sit",
    "z_image": "z-image",
}
PUBLISHED = {  # parameters
    "sd3": {
        "transformer": 2_028_328_000,
        "vae": 83_819_683,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    },
    "sd35l": {"transformer": 8_056_627_520, "vae": 83_819_683},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "sit": {"transformer": 674_816_272, "vae": 83_653_863},
    "flux": {"transformer": 11_901_408_320, "vae": 83_819_683, "text_encoder_2": 4_762_310_656},
    "flux2_klein": {"transformer": 3_875_544_576, "vae": 84_046_115, "text_encoder": 4_022_468_096},
    "krea2": {"transformer": 12_820_073_036, "vae": 126_892_531, "text_encoder": 4_437_815_808},
    "qwen_image": {"transformer": 20_430_401_088, "vae": 126_892_531, "text_encoder": 8_292_166_656},
    "sd35m": {"transformer": 2_243_171_520, "vae": 83_819_683},
    "z_image": {"transformer": 6_154_908_736, "vae": 83_819_683, "text_encoder": 4_022_468_096},
}
PIXELS = {"flux2_klein": 16}  # a side for one latent; 8 of the others
TWO_RUNS = [
    ("sd3/stage1", "sd3/refl"),
    ("sdxl/1step_stage1", "sdxl/1step_refl"),
    ("sit/stage1", "sit/stage2"),
    ("flux2_klein/rtdmd_stage1", "flux2_klein/rtdmd_stage2"),
]
WORDS = ("zero", "one", "two", "three")
pytestmark = pytest.mark.usefixtures("no_report")
logging.set_verbosity_error()
logging.disable_progress_bar()


def settings_of(recipe: Path, **settings: Any) -> Settings:
    """As `dmdr-train --config RECIPE` reads it, under `settings`."""
    return parse(["--config", str(recipe)], settings)


@pytest.fixture(params=RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def recipe(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small pipelines, built once."""
    built: dict[str, Path] = {}
    for name in sorted(set(FAMILY.values()) & FAMILIES.keys()):
        built[name] = tmp_path_factory.mktemp("pipelines") / name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            FAMILIES[name].build(built[name])
    return built


def test_every_value_says_where_it_comes_from(recipe: Path) -> None:
    """In a comment on its line or directly above; and the file says how it is run."""
    before = ""
    for line in recipe.read_text().splitlines():
        if re.match(r"\w", line):
            assert " # " in line or (before.startswith("# ") and not before.startswith("# ---")), line
        before = line
    assert f"dmdr-train --config examples/{recipe.parent.name}/{recipe.name} --model " in recipe.read_text()


def test_rl_stands_beside_matching_at_the_recipes_own_size(recipe: Path) -> None:
    """At the first update, of a small network with latents of the recipe's shape; or the recipe says why not."""
    settings = settings_of(recipe, model=str(recipe.parent / "architecture"))
    config, chosen = settings.config, settings.of("objectives")
    if not chosen or config.rl_balance == "none":
        assert not chosen or "rl_ratio" in recipe.read_text()
        return

    class Sized(Pictures):
        shape = settings.open_backend(config.model).latent_shape

    images = config.num_generations
    toy = trainer(
        prepared(Sized, roles=("student", "fake_score", "reference")),
        objectives=[(plugin.weight, plugin.build()) for plugin in chosen],
        rewards=Redness(),
        batch=images,
        micro_batch=4,
        group_size=images,
        eta=config.eta,
        rl_weight=config.rl_weight,
        balances=True,
    )
    (ratio,) = (value for key, value in toy.train_step().items() if key.startswith("rl_ratio/"))
    assert 0.2 < ratio < 3


def test_fits_the_published_model(recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its settings are all read, and accepted by the family at its true size, of which no weights are loaded."""
    settings = settings_of(recipe, model=str(recipe.parent / "architecture"))
    backend = settings.open_backend(settings.config.model)
    assert not caplog.records
    side = int(settings.family.options["resolution"]) // PIXELS.get(recipe.parent.name, 8)
    assert backend.latent_shape[1:] == (side, side)


@pytest.mark.parametrize("model", PUBLISHED)
def test_architecture_has_the_published_size(model: str) -> None:
    folder = EXAMPLES / model / "architecture"
    index = json.loads((folder / "model_index.json").read_text())
    for name, count in PUBLISHED[model].items():
        library, cls = index[name]
        if library == "pipeline":  # code of the family's own
            kind = registry.load("backends", index["_class_name"]).network_class
        else:
            kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)
        with torch.device("meta"):
            if library == "transformers":
                network = kind(kind.config_class.from_pretrained(folder / name))
            else:
                network = kind.from_config(kind.load_config(folder / name))
        assert sum(p.numel() for p in network.parameters()) == count, name


def test_trains_a_small_pipeline(recipe: Path, folders: dict[str, Path], digits: Digits, tmp_path: Path) -> None:
    """A step of each of its stages, with its own objective, rewards, grid, roles and learning rates."""
    lines = trained(recipe, folders, digits, tmp_path)
    given = yaml.safe_load(recipe.read_text())
    assert [line["stage"] for line in lines] == [stage for stage in (1, 2) if given[f"stage{stage}_steps"]]
    objectives = re.findall(r"[a-z]\w*", given["rl"]) if given["rl"] != "none" else []
    assert all(abs(lines[-1][f"loss/{name}"]) < 1e6 for name in ("dmd", "fake", *objectives))


@pytest.mark.parametrize(("first", "second"), TWO_RUNS)
def test_goes_on_from_a_stage_1_of_its_own(
    folders: dict[str, Path], digits: Digits, tmp_path: Path, first: str, second: str
) -> None:
    trained(EXAMPLES / f"{first}.yaml", folders, digits, tmp_path / "first")
    start = str(tmp_path / "first" / "run")
    lines = trained(EXAMPLES / f"{second}.yaml", folders, digits, tmp_path / "second", init_student=start)
    assert [line["stage"] for line in lines] == [2]


def trained(
    recipe: Path, folders: dict[str, Path], digits: Digits, tmp_path: Path, **more: Any
) -> list[dict[str, Any]]:
    """Log lines of a short run on the family's small pipeline, with everything else as the recipe says."""
    family, given = FAMILY[recipe.parent.name], yaml.safe_load(recipe.read_text())
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"a handwritten {word}", "label": i}) + "\n" for i, word in enumerate(WORDS))
    )
    group, passes = (given.get(name, 1) for name in ("num_generations", "gradient_accumulation_steps"))
    small = {
        "model": str(folders[family]), "prompts": str(tmp_path / "prompts.jsonl"), "output_dir": str(tmp_path / "run"),
        "resolution": 16, "mixed_precision": "no", "optim": "adamw_torch", "num_generations": min(group, 4),
        "per_device_train_batch_size": max(min(group, 4), 2), "gradient_accumulation_steps": min(passes, 2),
        "stage1_steps": min(given["stage1_steps"], 1), "stage2_steps": min(given["stage2_steps"], 1),
        "logging_steps": 1, "fake_updates": 1, "rollouts": 1, "sample_images": 1, "sample_steps": 0, "teacher_steps": 1,
        "report_to": "none",
    }  # fmt: skip
    if given.get("quantize") == "nf4" and find_spec("bitsandbytes") is None:
        small["quantize"] = "fp8"  # which needs torchao
    if "max_sequence_length" in given:
        small["max_sequence_length"] = FAMILIES[family].settings["max_sequence_length"]
    if "init_student" in more:
        del small["stage1_steps"]
    files = small_files(given, folders[family], digits, tmp_path)
    run(settings_of(recipe, **(small | files | more)))
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def small_files(given: Mapping[str, Any], folder: Path, digits: Digits, tmp_path: Path) -> dict[str, Any]:
    """Small ones in place of the published files that a recipe names."""
    rewards = re.findall(r"[a-z]\w*", given["reward"]) if given["reward"] != "none" else []
    files: dict[str, Any] = {f"{name}_checkpoint": str(digits.reward_checkpoint(name)) for name in rewards}
    if "student_weights" in given:
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        save_file(unet.state_dict(), tmp_path / "student.safetensors")
        files["student_weights"] = str(tmp_path / "student.safetensors")
    if "reward_vae" in given:
        tiny_decoder().save_pretrained(tmp_path / "tiny")
        files["reward_vae"] = str(tmp_path / "tiny")
    if given.get("matching") == "dmd2":
        files["real_images"] = str(photos(tmp_path / "photos"))
    return files


def photos(folder: Path) -> Path:
    """Real images: of the first class in a folder of its own, so that prompts with labels say what they show."""
    (folder / "0").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (20, 16), (90 * number, 40, 200)).save(folder / "0" / f"{number}.png")
    return folder


def tiny_decoder() -> nn.Module:
    """Of two pixels a side for each latent one."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
