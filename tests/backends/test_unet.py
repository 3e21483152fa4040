"""What only the UNet families must show: noise schedules, the one-step student, exact stock schedulers, decoders."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.utils import logging
from test_families import prepared, stock_steps, trained
from torch import Tensor

import parts
import sd1
import sdxl
from dmdr.errors import ConfigError
from dmdr.paths import Prediction, add_noise
from dmdr.run.drawing import open_export
from dmdr.run.job import assemble
from dmdr.run.run import Run
from dmdr.sampling import FewStepSampler
from dmdr.settings.parse import parse
from dmdr.types import Condition
from dmdr_sdxl import SD1Backend, SDXLBackend
from family import FAMILIES, Family, refuses_unread

PROMPTS = ["a handwritten seven", "a handwritten two"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
ZERO_SNR = {"rescale_betas_zero_snr": True}
ddim = partial(DDIMScheduler, clip_sample=False, steps_offset=1)  # the pipeline warns of anything else


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a pipeline of another kind once."""
    root = tmp_path_factory.mktemp("unets")
    folders: dict[str, Path] = {}

    def build(build: Callable[..., None] = sd1.build, **config: Any) -> Path:
        key = f"{build.__module__} {config}"
        if key not in folders:
            folders[key] = root / str(len(folders))
            with torch.random.fork_rng():
                torch.manual_seed(0)
                build(folders[key], **config)
        return folders[key]

    return build


# --- Schedule and grid ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        ddim(),
        PNDMScheduler(steps_offset=1, beta_schedule="scaled_linear", beta_end=0.012),
        ddim(beta_schedule="squaredcos_cap_v2"),
        ddim(trained_betas=torch.linspace(1e-4, 0.03, 1000).tolist()),
        ddim(prediction_type="v_prediction", **ZERO_SNR),
        EulerDiscreteScheduler(prediction_type="v_prediction", **ZERO_SNR),
        ddim(prediction_type="sample"),
    ],
)
def test_the_path_is_the_schedulers_own(built: Callable[..., Path], scheduler: Any) -> None:
    backend = SD1Backend(str(built(scheduler=scheduler)), SD1Backend.Options())
    # Euler has 2^-24 for a zero at the end.
    torch.testing.assert_close(backend.path.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=0, atol=1e-7)
    assert backend.kind == {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[scheduler.config.prediction_type]


def test_the_defaults_are_those_of_the_schedulers_class(built: Callable[..., Path], tmp_path: Path) -> None:
    """DDIM's betas differ from LCM's where the file names none."""
    folder = tmp_path / "copy"
    sd1.build(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    table = SD1Backend(str(folder), SD1Backend.Options()).path.alphas_cumprod
    torch.testing.assert_close(table.float(), DDIMScheduler().alphas_cumprod)


def test_grids(built: Callable[..., Path]) -> None:
    backend = SDXLBackend(str(built(sdxl.build)), SDXLBackend.Options())
    told = {k: backend.path.timestep(backend.grid(k)[:-1]).tolist() for k in (1, 2, 4)}
    assert told == {1: [399], 2: [999, 500], 4: [999, 750, 500, 250]}
    assert all(backend.grid(k)[-1] == 0 and len(backend.grid(k)) == k + 1 for k in told)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("timesteps", [[399], [999, 749, 500, 250], [50, 1]])
@pytest.mark.parametrize("schedule", [{}, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}])
def test_the_stock_scheduler_takes_our_steps(
    built: Callable[..., Path], schedule: dict[str, Any], timesteps: list[int], eta: float
) -> None:
    """In float32, fed unit noise at any first timestep; errors grow with 1 / alpha."""
    backend = SD1Backend(str(built(**schedule)), SD1Backend.Options())
    sampler = FewStepSampler(backend.path, torch.tensor([*(t / 1000 for t in timesteps), 0.0]).double(), eta)

    def output(x: Tensor) -> Tensor:
        return torch.tanh(1.1 * x + 0.2)

    def student(x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return Prediction(output(x_t), backend.kind, x_t, t, backend.path)

    torch.manual_seed(0)
    noise = [torch.randn(2, 4, 8, 8) for _ in range(len(timesteps))]
    ours = sampler.rollout(student, noise, Condition(("", ""), {}, {})).final

    torch.manual_seed(0)
    scheduler = backend.scheduler(sampler)
    scheduler.set_timesteps(timesteps=backend.call_arguments(sampler)["timesteps"])
    x = torch.randn(2, 4, 8, 8) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(output(scheduler.scale_model_input(x, t)), t, x).prev_sample
    assert scheduler.timesteps.tolist() == timesteps
    torch.testing.assert_close(x, ours, rtol=1e-5, atol=1e-5)


def test_zero_snr_in_training_and_export(built: Callable[..., Path]) -> None:
    """t = 1 is pure noise, and v answers there."""
    folder = built(prediction_type="v_prediction", **ZERO_SNR)
    backend = prepared(folder, Family(sd1.build))
    t = torch.ones(2, dtype=torch.float64)
    x_t = add_noise(backend.path, torch.ones(2, 4, 8, 8), torch.randn(2, 4, 8, 8), t).float()
    prediction = backend.student(x_t, t, backend.encode(PROMPTS))
    torch.testing.assert_close(prediction.x0, -prediction.value)
    assert prediction.eps.isfinite().all()
    assert backend.scheduler(FewStepSampler(backend.path, backend.grid(4), 1.0)).alphas_cumprod[-1] == 0


# --- Guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"force_zeros_for_empty_prompt": False}])
def test_the_empty_prompts_embeddings_in_place_of_zeros(built: Callable[..., Path], config: dict[str, Any]) -> None:
    """As zero_empty_prompt asks, or the pipeline itself; the stock pipeline takes a negative prompt for it."""
    folder = built(sdxl.build, **config)
    call = {} if config else {"negative_prompt": [""] * len(PROMPTS)}
    backend = prepared(folder, Family(sdxl.build), zero_empty_prompt=None if config else False)
    cond = backend.encode(PROMPTS)
    for output, timestep, x_t in stock_steps(folder, Family(sdxl.build, call=call), 4.0):
        found = backend.teacher(x_t, (timestep.double() / 1000).expand(len(PROMPTS)), cond, guidance=4.0)
        torch.testing.assert_close(found.value, output, rtol=1e-5, atol=4e-5)


# --- Weights and decoders ---------------------------------------------------------------------------------------------


def test_student_weights(built: Callable[..., Path], tmp_path: Path) -> None:
    """A bare state dict, as DMD2 published its ODE-pretrained SDXL, goes into the student alone."""
    folder, file = built(sdxl.build), tmp_path / "ode.bin"
    weights = sdxl.unet().state_dict()
    torch.save(weights, file)
    options = {"full_finetune": True, "fake_score": "full", "student_weights": str(file)}
    backend = prepared(folder, FAMILIES["sdxl"], **options)
    published = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    student, fake = (backend.roles.copies[role].state_dict() for role in ("student", "fake_score"))
    assert all(torch.equal(student[name], value) for name, value in weights.items())
    assert all(torch.equal(fake[name], value) for name, value in published.items())
    teacher = {name.replace("base_layer.", ""): value for name, value in backend.roles.network.state_dict().items()}
    assert all(torch.equal(teacher[name], value) for name, value in published.items())

    torch.save(dict(list(weights.items())[4:]), file)
    with pytest.raises(ConfigError, match=r"ode.bin .*4 missing \((\S+, ){2}\S+\)$"):
        prepared(folder, FAMILIES["sdxl"], **options)
    torch.save({"unet": sdxl.unet()}, file)  # a module: unpickling it would import and call what it names
    with pytest.raises(ConfigError, match="which DMDR does not load"):
        prepared(folder, FAMILIES["sdxl"], **options)


def test_an_export_is_sampled_without_what_only_training_needs(built: Callable[..., Path], tmp_path: Path) -> None:
    """The weights that the student began with, and the rewards' decoder, are gone."""
    folder, file, small = built(sd1.build), tmp_path / "ode.bin", tmp_path / "tiny"
    torch.save(diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict(), file)
    tiny_decoder().save_pretrained(small)
    settings = {"full_finetune": True, "student_weights": str(file), "reward_vae": str(small)}
    run = trained(folder, FAMILIES["sd1"], tmp_path, "none", stage1_steps=1, stage2_steps=0, **settings)
    file.unlink()
    shutil.rmtree(small)
    student = run.output / "student"
    about = json.loads((student / "sampling.json").read_text())
    assert all(path.is_file() for path in open_export(student, about).draw(ROWS, 0, tmp_path / "drawn"))


def tiny_decoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def test_the_small_decoder_is_for_rewards_only(built: Callable[..., Path], tmp_path: Path) -> None:
    tiny = tiny_decoder()
    tiny.save_pretrained(tmp_path)
    backend = prepared(built(sdxl.build), FAMILIES["sdxl"], reward_vae=str(tmp_path))
    latents = torch.randn(2, *backend.latent_shape, requires_grad=True)
    scaled = latents / backend.vae.config.scaling_factor
    for exact, raw in ((False, tiny.decode(latents).sample), (True, backend.vae.decode(scaled).sample)):
        images = backend.decode(latents, exact=exact)
        torch.testing.assert_close(images, (raw / 2 + 0.5).clamp(0, 1))
        (grad,) = torch.autograd.grad(images.sum(), latents)
        assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize(
    "statistics", [{}, {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 1.5, 1.0, 0.5]}]
)
def test_latents_are_scaled_as_in_the_stock_pipeline(built: Callable[..., Path], statistics: dict[str, Any]) -> None:
    folder = built(sdxl.build, vae=parts.vae(scaling_factor=0.7, **statistics))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    latents, images = (
        pipe(PROMPTS, num_inference_steps=1, output_type=kind, generator=torch.manual_seed(0)).images
        for kind in ("latent", "pt")
    )
    backend = prepared(folder, FAMILIES["sdxl"])
    torch.testing.assert_close(backend.decode(latents, exact=True), images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sdxl", "sd1"])
def test_bfloat16(built: Callable[..., Path], name: str) -> None:
    """Near float32, with whole-numbered timesteps."""
    folder, found = built(FAMILIES[name].build), []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        cls = SDXLBackend if name == "sdxl" else SD1Backend
        backend = cls(str(folder), cls.Options(lora_rank=4))
        backend.prepare(Accelerator(cpu=True, mixed_precision=precision), roles=("student", "fake_score"))
        x_t = torch.randn(2, *backend.latent_shape, generator=torch.manual_seed(0))
        t = torch.tensor([0.999, 0.399], dtype=torch.float64)
        prediction = backend.student(x_t, t, backend.encode(PROMPTS))
        prediction.value.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in backend.parameters("student").values() if p.grad is not None)
        found.append(prediction.value)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert found[1].dtype == torch.float32
    assert 0 < (found[1] - found[0]).norm() < 0.05 * found[0].norm()


def test_loads_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Stable Diffusion 1 brings a safety checker that training has no use for."""
    sd1.build(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    logging.set_verbosity_warning()
    capfd.readouterr()
    try:
        prepared(tmp_path, FAMILIES["sd1"]).encode(PROMPTS)
    finally:
        logging.set_verbosity_error()
    assert capfd.readouterr() == ("", "")


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shift", 3.0),
        ("max_sequence_length", 64),
        ("drop_text_encoders", ["text_encoder"]),
        ("drop_text_encoders", ["text_encoder_2"]),
    ],
)
def test_options_that_do_not_fit(built: Callable[..., Path], option: str, value: Any) -> None:
    refuses_unread(built(sdxl.build), option, value)
    refuses_unread(built(sd1.build), option, value)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (ddim(**ZERO_SNR), "rescale_betas_zero_snr"),
        (ddim(prediction_type="score"), 'prediction_type is "score"; expected "epsilon" or'),
        (ddim(num_train_timesteps=500), "500 noise levels; expected 1000"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler of 0 noise levels"),
    ],
)
def test_schedulers_of_another_path(built: Callable[..., Path], scheduler: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SD1Backend(str(built(scheduler=scheduler)), SD1Backend.Options())
    assert "\n" not in str(caught.value)


def test_models_that_are_no_teacher(built: Callable[..., Path]) -> None:
    refiner = built(sdxl.build, text_encoder=None, tokenizer=None)
    with pytest.raises(ConfigError, match="has no text_encoder, but a StableDiffusionXLPipeline needs it"):
        SDXLBackend(str(refiner), SDXLBackend.Options())
    distilled = built(sdxl.build, unet=sdxl.unet(time_cond_proj_dim=8))
    with pytest.raises(ConfigError, match="time_cond_proj_dim"):
        SDXLBackend(str(distilled), SDXLBackend.Options())


def test_a_kernel_that_diffusers_would_ignore(built: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="--attention_backend native"):
        prepared(built(sdxl.build), FAMILIES["sdxl"], attention_backend="native")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 3.0}, "unknown setting 'shift'"),
        ({"num_inference_steps": 1}, "--num_inference_steps of at least 2"),
        ({"sde_type": "flow_sde", "eta": 0.7}, "--sde_type flow_sde"),
        ({"sde_type": "ddim", "eta": 0.9, "sample_eta": 0.9}, "pass --timesteps 999 749 499 249"),
        (
            {"sde_type": "ddim", "eta": 0.9, "sample_eta": 0.9, "timesteps": [999, 666, 332]},
            "a number of steps that divides 1000, such as 2, 4, 5 or 8, not 3",
        ),
    ],
)
def test_runs_that_cannot_be(
    built: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = {
        "model": str(built(sdxl.build)), "prompts": str(tmp_path / "prompts.txt"), "rl": "grpo", "reward": "toy",
        "num_generations": 2, "per_device_train_batch_size": 2, "report_to": "none",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message) as caught:
        Run(assemble(parse(settings=given | settings)), tmp_path / "run", None, None)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
