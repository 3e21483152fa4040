"""The SD3 backend on the digits' pipeline, against stock diffusers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import dmdr
from dmdr.errors import ConfigError
from dmdr.run.drawing import open_export
from dmdr.sampling import FewStepSampler, time_grid
from dmdr_digits import Digits
from dmdr_sd3 import SD3Backend

PROMPTS = ["a handwritten seven", "a handwritten two", "a handwritten zero"]
STOCK = """
import json, sys
sys.modules["dmdr"] = None  # importing it is an error from here on
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

base, student, output, prompts = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
pipe = StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)
if __import__("pathlib").Path(student, "transformer").exists():
    pipe.transformer = SD3Transformer2DModel.from_pretrained(student, subfolder="transformer")
else:
    pipe.load_lora_weights(student)
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(student, subfolder="scheduler")
torch.manual_seed(5)
call = json.load(open(student + "/sampling.json"))["call"]
for i, image in enumerate(pipe(prompts, **call).images):
    image.save(f"{output}/{i:04d}.png")
"""


def prepared(folder: Path, **options: object) -> SD3Backend:
    settings = {"lora_rank": 4, "lora_alpha": 8, "fake_lora_rank": 4, "fake_lora_alpha": 4, "max_sequence_length": 1}
    backend = SD3Backend(str(folder), SD3Backend.Options(**settings | options))  # type: ignore[arg-type]
    backend.prepare(Accelerator(cpu=True), roles=("student", "fake_score"))
    return backend


@pytest.fixture(scope="module")
def backend(digits: Digits) -> SD3Backend:
    return prepared(digits.folder())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_teacher_is_the_stock_pipeline(backend: SD3Backend, digits: Digits, guidance: float) -> None:
    """The noise prediction that the pipeline makes at its own latents and timesteps, seen through its callback."""
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(digits.folder(), torch_dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    step = pipe.scheduler.step

    def spy(output: torch.Tensor, t: torch.Tensor, latents: torch.Tensor, **kwargs: object) -> object:
        seen.append((output, t, latents))
        return step(output, t, latents, **kwargs)

    pipe.scheduler.step = spy
    torch.manual_seed(0)
    call = {"num_inference_steps": 6, "guidance_scale": guidance, "max_sequence_length": 1}
    stock = pipe(PROMPTS, output_type="pt", **call).images
    cond = backend.encode(PROMPTS)
    for output, t, latents in seen:
        times = (t / 1000).double().expand(len(PROMPTS))
        ours = backend.teacher(latents, times, cond, guidance=guidance).value
        torch.testing.assert_close(ours, output, rtol=1e-5, atol=1e-5 * guidance)
    # Our ODE sampler on the pipeline's own grid ends at the same images.
    sigmas = torch.tensor([*(t / 1000 for _, t, _ in seen), 0.0], dtype=torch.float64)
    sampler = FewStepSampler(backend.path, sigmas, 0.0)
    teacher = lambda x, t, c: backend.teacher(x, t, c, guidance=guidance)  # noqa: E731
    final = sampler.rollout(teacher, [seen[0][2]] * len(seen), cond).final
    assert (backend.decode(final) - stock).abs().max() < 1e-4


def test_encode_images_inverts_decode(backend: SD3Backend, digits: Digits) -> None:
    scans = digits.judge().reference()[:64]
    again = backend.decode(backend.encode_images(scans))
    correct = digits.judge()
    assert (again - scans).abs().mean() < 0.12
    assert torch.cosine_similarity(correct.features(again), correct.features(scans)).mean() > 0.9


def test_decode_is_differentiable_where_saturated(backend: SD3Backend) -> None:
    latents = (torch.randn(2, *backend.latent_shape) * 3).requires_grad_()
    images = backend.decode(latents)
    assert ((images == 0) | (images == 1)).any()
    (grad,) = torch.autograd.grad(images.sum(), latents)
    assert grad.isfinite().all() and (grad != 0).all()


@pytest.mark.parametrize("settings", [{"sample_eta": 0.0, "shift": 3.0}, {"sigmas": [1.0, 0.6]}])
def test_stock_diffusers_reproduces_dmdr_sample(digits: Digits, tmp_path: Path, settings: dict[str, object]) -> None:
    """Same seed, same images (under 2/255), in a process that cannot import dmdr."""
    run = dmdr.train(
        rl="none", reward="none", stage1_steps=3, stage2_steps=0, output_dir=str(tmp_path / "run"), save_steps=0,
        num_eval_samples=0, sample_images=2, per_device_train_batch_size=8, report_to="none", learning_rate=3e-3,
        **settings,
    )  # fmt: skip
    student = run / "student"
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    stock.mkdir()
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    open_export(student, json.loads((student / "sampling.json").read_text())).draw(rows, 5, ours)
    command = [sys.executable, "-c", STOCK, str(digits.folder()), str(student), str(stock), json.dumps(PROMPTS)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    for i in range(len(PROMPTS)):
        a, b = (np.asarray(Image.open(f / f"{i:04d}.png")).astype(int) for f in (ours, stock))
        assert np.abs(a - b).max() < 2
        assert a.std() > 10  # a picture, not a flat field


def test_an_eta_that_no_stock_scheduler_takes(backend: SD3Backend) -> None:
    with pytest.raises(ConfigError, match=r"^--sample_eta 0\.5: the scheduler of this model supports 0 and 1 only$"):
        backend.check_sampler(FewStepSampler.stock(backend.path, backend.grid(4), 0.5))


def test_exported_lora_is_the_student(backend: SD3Backend, tmp_path: Path) -> None:
    """A LoRA trained at alpha / rank = 2 acts in full after export, whoever loads it."""
    for name, parameter in backend.parameters("student").items():
        torch.nn.init.normal_(parameter, std=0.1 if "lora_B" in name else 0.3)
    sampler = FewStepSampler(backend.path, time_grid(4), 1.0)
    backend.export(tmp_path, sampler)
    cond, x = backend.encode(PROMPTS), torch.randn(3, *backend.latent_shape)
    t = torch.full((3,), 0.5)
    with torch.no_grad():
        trained, plain = backend.student(x, t, cond).value, backend.teacher(x, t, cond).value
    other = prepared(Path(backend.folder), lora_rank=4, lora_alpha=4.0)
    other.load_export(tmp_path)
    with torch.no_grad():
        loaded = other.student(x, t, cond).value
    assert (trained - plain).abs().max() > 0.1
    assert (trained - loaded).abs().max() < 1e-5


def test_bf16(digits: Digits) -> None:
    """Networks in bf16, adapters, predictions and gradients in float32."""
    AcceleratorState._reset_state()  # of other tests, in float32
    backend = SD3Backend(str(digits.folder()), SD3Backend.Options(lora_rank=4, fake_lora_rank=4, max_sequence_length=1))
    backend.prepare(Accelerator(cpu=True, mixed_precision="bf16"), roles=("student", "fake_score"))
    assert backend.pipeline.transformer.proj_out.weight.dtype == torch.bfloat16
    cond = backend.encode(PROMPTS)
    prediction = backend.student(torch.randn(3, *backend.latent_shape), torch.full((3,), 0.7), cond)
    assert prediction.x0.dtype == torch.float32
    prediction.x0.square().mean().backward()
    grads = {p.grad.dtype for p in backend.parameters("student").values() if p.grad is not None}
    assert grads == {torch.float32}
    AcceleratorState._reset_state()
