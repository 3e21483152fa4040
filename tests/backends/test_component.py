"""What a model's configuration files say: each value is honoured, or refused by file and name before anything loads."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, CogVideoXDDIMScheduler, DDIMScheduler, EulerDiscreteScheduler

from dmdr.errors import ConfigError
from dmdr.settings import registry

EXAMPLES = Path(__file__).parents[2] / "examples"
VAE = {"latent_channels": 16, "block_out_channels": [8] * 4, "scaling_factor": 0.3611, "shift_factor": 0.1159}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
# The published ones in examples/, and files of the classes' own defaults.
PUBLISHED = {
    "StableDiffusion3Pipeline": EXAMPLES / "sd3" / "architecture",
    "StableDiffusionXLPipeline": EXAMPLES / "sdxl" / "architecture",
    "SiTPipeline": EXAMPLES / "sit" / "architecture",
}
WRITTEN = {
    "FluxPipeline": {"transformer": {}, "vae": VAE, "scheduler": FLOW},
    "ZImagePipeline": {"transformer": {}, "vae": VAE, "scheduler": FLOW},
    "StableDiffusionPipeline": {"unet": {}, "vae": {"block_out_channels": [8] * 4}, "scheduler": None},
}
NAMES = [*PUBLISHED, *WRITTEN]
NETWORK = {"StableDiffusionXLPipeline": "unet", "StableDiffusionPipeline": "unet"}
FLOWS = [name for name in NAMES if name not in NETWORK]


def folder_of(name: str, folder: Path) -> Path:
    """A pipeline's configuration files, to be changed."""
    if name in PUBLISHED:
        return Path(shutil.copytree(PUBLISHED[name], folder))
    text = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    for part, config in WRITTEN[name].items():
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(config))
    if name == "StableDiffusionPipeline":
        DDIMScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name} | text))
    return folder


def changed(folder: Path, part: str, **values: Any) -> Path:
    """The folder with other values in one of its files."""
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def made(folder: Path, **options: Any) -> Any:
    cls = registry.load("backends", json.loads((folder / "model_index.json").read_text())["_class_name"])
    return cls(str(folder), cls.Options(**options))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        made(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{folder}/", "")


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name: str, tmp_path: Path) -> None:
    """As published, or by the classes' defaults; what no VAE or network could mean is refused."""
    folder = folder_of(name, tmp_path / "model")
    backend = made(folder)
    assert backend.latent_shape[0] == (4 if name in ("SiTPipeline", *NETWORK) else 16)
    side = {"StableDiffusionPipeline": 512, "SiTPipeline": 256}.get(name, 1024)
    assert backend.sizes == ((side, side),)
    network = NETWORK.get(name, "transformer")
    channels = 4 * backend.latent_shape[0] if name == "FluxPipeline" else backend.latent_shape[0]
    cases: list[tuple[str, str, Any, str]] = [
        ("vae", "scaling_factor", None, "is null; expected a number above 0"),
        ("vae", "scaling_factor", "0.18", 'is "0.18"; expected a number above 0'),
        ("vae", "scaling_factor", 0, "is 0; expected a number above 0"),
        ("vae", "latent_channels", None, "is null; expected a whole number above 0"),
        ("vae", "block_out_channels", 128, "is 128; expected a list of whole numbers above 0"),
        ("vae", "_class_name", "AutoencoderTiny", 'is "AutoencoderTiny"; expected "AutoencoderKL"'),
        (network, "in_channels", 9, f"is 9; expected {channels}, of latents with {backend.latent_shape[0]} channels"),
    ]
    if name not in ("SiTPipeline", "StableDiffusion3Pipeline"):
        assert made(changed(folder, network, sample_size=None)).sizes == backend.sizes
    else:
        cases.append((network, "sample_size", None, "is null; expected a whole number above 0"))
    for part, key, value, said in cases:
        before = json.loads((folder / part / "config.json").read_text())
        assert refusal(changed(folder, part, **{key: value})) == f"{part}/config.json: {key} {said}"
        (folder / part / "config.json").write_text(json.dumps(before))


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("StableDiffusion3Pipeline", {"shift_factor": None}, "shift_factor is null; expected a number"),
        ("FluxPipeline", {"shift_factor": None}, "shift_factor is null; expected a number"),
        ("StableDiffusionXLPipeline", {"latents_mean": [0.0] * 4}, "latents_std is null; expected a list of 4 numbers"),
        (
            "StableDiffusionXLPipeline",
            {"latents_mean": [0.0] * 4, "latents_std": [1, 1, 1, 0]},
            "latents_std is [1, 1, 1, 0]; expected numbers above 0",
        ),
        ("SiTPipeline", {"shift_factor": 0.1}, "0.1; expected null, because a SiTPipeline does not read it"),
        ("StableDiffusionPipeline", {"shift_factor": 0.1}, "because a StableDiffusionPipeline does not read it"),
        ("ZImagePipeline", {"latents_std": [1] * 16}, "because a ZImagePipeline does not read it"),
    ],
)
def test_a_vae_is_scaled_as_its_pipeline_does(name: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    """The student's users decode with the pipeline."""
    assert said in refusal(changed(folder_of(name, tmp_path / "model"), "vae", **values))


def test_a_reward_decoder_without_a_scale(tmp_path: Path) -> None:
    layers = {f"{part}_block_out_channels": (8,) * 4 for part in ("encoder", "decoder")}
    blocks = {f"num_{part}_blocks": (1,) * 4 for part in ("encoder", "decoder")}
    AutoencoderTiny(latent_channels=4, **layers, **blocks).save_pretrained(tmp_path / "tiny")
    changed(tmp_path, "tiny", scaling_factor=None)
    backend = made(folder_of("SiTPipeline", tmp_path / "model"), reward_vae=str(tmp_path / "tiny"))
    with pytest.raises(ConfigError, match=r"tiny/config\.json: scaling_factor is null; expected a number above 0$"):
        backend.connect(SimpleNamespace(device=torch.device("meta"), mixed_precision="no"))


@pytest.mark.parametrize("name", FLOWS)
def test_schedulers_of_flow_matching(name: str, tmp_path: Path) -> None:
    """The network is told 1000 t, of a straight path from noise; the shift is a number."""
    folder = folder_of(name, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    published = file.read_text()
    dynamic = {"use_dynamic_shifting": True}
    for values, said in (
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500; expected 1000"),
        ({"invert_sigmas": True}, "invert_sigmas is true; expected false"),
        ({"shift": None}, "shift is null; expected a number above 0"),
        ({"shift": -1}, "shift is -1; expected a number above 0"),
        (dynamic | {"base_shift": None}, "base_shift is null; expected a number"),
        (dynamic | {"max_image_seq_len": 256}, "is 256; expected another number than base_image_seq_len"),
        (dynamic | {"time_shift_type": "cubic"}, 'is "cubic"; expected "exponential" or "linear"'),
    ):
        file.write_text(json.dumps(json.loads(published) | values))
        assert refusal(folder).startswith("scheduler/scheduler_config.json: ") and refusal(folder).endswith(said)
    DDIMScheduler().save_pretrained(folder / "scheduler")
    said = 'scheduler/scheduler_config.json: prediction_type is "epsilon"; expected "flow_prediction"'
    assert refusal(folder, shift=3.0) == said


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (EulerDiscreteScheduler(timestep_type="continuous"), 'timestep_type is "continuous"; expected "discrete"'),
        (CogVideoXDDIMScheduler(snr_shift_scale=3.0), "the noise levels of this CogVideoX"),
    ],
)
def test_schedulers_of_other_noise_levels(scheduler: Any, said: str, tmp_path: Path) -> None:
    folder = folder_of("StableDiffusionPipeline", tmp_path / "model")
    scheduler.save_pretrained(folder / "scheduler")
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("StableDiffusion3Pipeline", {"pos_embed_max_size": None}, "pos_embed_max_size is null; expected a whole num"),
        ("StableDiffusion3Pipeline", {"patch_size": "2"}, 'patch_size is "2"; expected a whole number above 0'),
        ("StableDiffusion3Pipeline", {"out_channels": 32}, "out_channels is 32; expected 16"),
        ("StableDiffusionXLPipeline", {"sample_size": [128, 64]}, "give the image size with --resolution"),
        ("StableDiffusionXLPipeline", {"addition_embed_type": None}, 'is null; expected "text_time"'),
        ("FluxPipeline", {"patch_size": 2}, "patch_size is 2; expected 1"),
        ("FluxPipeline", {"guidance_embeds": None}, "guidance_embeds is null; expected true or false"),
        ("ZImagePipeline", {"all_patch_size": [4]}, "all_patch_size is [4]; expected a list with 2"),
        ("ZImagePipeline", {"axes_lens": 1024}, "axes_lens is 1024; expected a list of whole numbers above 0"),
        ("SiTPipeline", {"num_classes": 0}, "num_classes is 0; expected a whole number above 0"),
    ],
)
def test_networks_that_are_called_otherwise(name: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(changed(folder_of(name, tmp_path / "model"), NETWORK.get(name, "transformer"), **values))


def test_another_square_is_named_with_the_resolution(tmp_path: Path) -> None:
    folder = changed(folder_of("StableDiffusionXLPipeline", tmp_path / "model"), "unet", sample_size=[128, 64])
    assert made(folder, resolution=512).latent_shape == (4, 64, 64)


def test_the_empty_prompt_of_a_pipeline_that_says_nothing_of_it(tmp_path: Path) -> None:
    """The default of its class holds: zeros for SDXL."""
    folder = folder_of("StableDiffusionXLPipeline", tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert made(folder).zero_empty_prompt
