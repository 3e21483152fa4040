"""What the backends of all pipelines read, refuse and write, on a small Stable Diffusion 3 and XL."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging
from PIL import Image
from test_families import trained
from torch import nn

from dmdr.backends.loading import digest, on_device, read_weights
from dmdr.errors import ConfigError
from dmdr.run.checkpoint import Progress
from dmdr.run.drawing import open_export
from dmdr.run.export import export, read_export
from dmdr.run.run import train
from dmdr.sampling import FewStepSampler, time_grid
from dmdr.settings.parse import parse
from dmdr_sd3 import SD3Backend
from family import FAMILIES, Stock

PROMPTS = ["a handwritten seven", "a handwritten two"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
OFFLOAD = {"cpu_offload": True}
COMMIT = "0123abcd" * 5
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A Stable Diffusion 3 to be changed."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def made(folder: Path, **options: Any) -> Any:
    return SD3Backend(str(folder), SD3Backend.Options(**{"lora_rank": 2, "prompt_cache": "off"} | options))


def prepared(folder: Path, precision: str = "no", **options: Any) -> Any:
    backend = made(folder, **options)
    accelerator = SimpleNamespace(mixed_precision=precision, device=torch.device("cpu"))
    backend.prepare(accelerator, roles=("student", "fake_score"))
    return backend


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as error:
        prepared(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Schedulers and sizes ---------------------------------------------------------------------------------------------


def test_another_scheduler_needs_a_shift(copy: Path) -> None:
    """Its own shift, here `flow_shift`, has another name in each class."""
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0).save_pretrained(
        copy / "scheduler"
    )
    said = "scheduler is a UniPCMultistepScheduler, not a FlowMatchEulerDiscreteScheduler: give its timestep shift with"
    assert f"{said} --shift" in refusal(copy)
    backend = made(copy, shift=3.0)
    assert backend.grid(2).tolist() == time_grid(2, 3.0).tolist()
    assert backend.scheduler(FewStepSampler(backend.path, backend.grid(2), 1.0)).config.shift == 3


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_a_dynamic_shift_is_the_stock_schedulers(copy: Path, kind: str) -> None:
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    stock.save_pretrained(copy / "scheduler")
    tokens = 4 * 4
    mu = diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3.calculate_shift(tokens)
    stock.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    torch.testing.assert_close(made(copy).grid(4).float(), stock.sigmas, rtol=0, atol=1e-6)


def test_no_larger_than_the_position_embeddings(model: Path) -> None:
    assert made(model, resolution=32).latent_shape == (4, 16, 16)
    said = refusal(model, resolution=36)
    assert said == f"--resolution 36 is too large for {model}: give 32 or less"


@pytest.mark.parametrize(("channels", "blocks"), [(16, 2), (4, 3)])
def test_a_small_decoder_of_other_latents(model: Path, tmp_path: Path, channels: int, blocks: int) -> None:
    tiny = {f"{part}_block_out_channels": (8,) * blocks for part in ("encoder", "decoder")}
    layers = {f"num_{part}_blocks": (1,) * blocks for part in ("encoder", "decoder")}
    AutoencoderTiny(latent_channels=channels, **tiny, **layers).save_pretrained(tmp_path)
    said = f"--reward_vae {tmp_path} takes {channels} channels and enlarges by {2 ** (blocks - 1)}; the latents of "
    assert refusal(model, reward_vae=str(tmp_path)) == f"{said}{model} have 4 channels and need 2"


def test_targets_that_are_not_there(model: Path) -> None:
    given = ("to_q", "to_kk", "transformer_blocks.0.ff.net.2", "ff.nett.2")
    said = refusal(model, lora_target_modules=given)
    assert said == "--lora_target_modules: a SD3Transformer2DModel has no to_kk, ff.nett.2"
    assert prepared(model, lora_target_modules=given[::2]).parameters("student")


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights of the variant fp16 only."""
    folder = tmp_path_factory.mktemp("variant") / "sd3"
    StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_component_falls_back_to_the_weights_that_it_has(
    model: Path, half: Path, tmp_path: Path, variant: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A transformer of fp16 beside plain files of all others, as one who downloads the least has it."""
    mixed = Path(shutil.copytree(model, tmp_path / "mixed"))
    shutil.rmtree(mixed / "transformer")
    shutil.copytree(half / "transformer", mixed / "transformer")
    backend, plain = prepared(mixed, variant=variant), prepared(model)
    tensors = backend.encode(PROMPTS).tensors
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in plain.encode(PROMPTS).tensors.items())
    others = [f"{mixed}/{name}" for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")]
    assert caplog.messages == (
        [f"{name} has no weights of --variant fp16; DMDR loads the weights without a variant" for name in others]
        if variant
        else [f"{mixed}/transformer has no weights without a variant; DMDR loads the weights of variant fp16"]
    )
    card = backend.snippet(str(mixed), "seven", FewStepSampler(backend.path, backend.grid(2), 1.0))
    code = next(line for line in card.splitlines() if "from_pretrained" in line).removeprefix("pipe = ")
    stock = eval(code, {"StableDiffusion3Pipeline": StableDiffusion3Pipeline, "torch": torch})
    weights = {key.replace(".base_layer", ""): value for key, value in backend.roles.network.state_dict().items()}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stock.transformer.state_dict().items())


def test_a_variant_that_cannot_be_meant(model: Path, half: Path, tmp_path: Path) -> None:
    said = refusal(model, variant="fp16")
    assert said == f"--variant fp16: {model} only has weights without a variant"
    two = Path(shutil.copytree(half, tmp_path / "two"))
    weights = two / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.ema-00001-of-00001.safetensors"))
    said = f"{two}/transformer cannot be loaded as SD3Transformer2DModel; use --variant ema or "
    assert refusal(two).startswith(f"{said}--variant fp16: ")


def test_embeddings_on_disk_are_of_one_variant(model: Path, half: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(model, tmp_path / "both"))
    shutil.copy(half / "text_encoder" / "model.fp16.safetensors", both / "text_encoder")
    for variant in (None, "fp16"):
        backend = made(both, variant=variant, prompt_cache=str(tmp_path / "cache"))
        backend.connect(SimpleNamespace(mixed_precision="no", device=torch.device("cpu")))
        assert backend.text.cache.missing(PROMPTS) == PROMPTS
        backend.text.cache.fill(PROMPTS)


def test_a_revision_of_the_hub(model: Path, tmp_path: Path) -> None:
    """From a cache of the hub, in a process that is offline: the branch `other` is there, and no `main`."""
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "other").write_text(COMMIT)
    code = f"""
import sys
import torch
from types import SimpleNamespace
from dmdr.settings.parse import parse
from dmdr.errors import ConfigError
from dmdr.sampling import FewStepSampler
given = {{"model": "org/name", "prompt_cache": {str(tmp_path / "cache")!r}, "reward": "none"}}
try:
    parse(settings=given)
except ConfigError:
    print("no main")
backend = parse(settings=given | {{"revision": "other"}}).open_backend("org/name")
accelerator = SimpleNamespace(mixed_precision="no", device=torch.device("cpu"))
backend.prepare(accelerator, roles=("student",))
print(tuple(backend.encode(["seven"]).tensors["sequence"].shape))
print(backend.snippet("org/name", "seven", FewStepSampler(backend.path, backend.grid(2), 1.0)))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, second, *snippet = done.stdout.splitlines()
    assert (first, second) == ("no main", "(1, 262, 64)")  # six tokens of CLIP, 256 of T5
    assert (
        'pipe = StableDiffusion3Pipeline.from_pretrained("org/name", revision="other", torch_dtype=torch.float32)'
        in snippet
    )


def test_weights_of_an_old_torch(tmp_path: Path) -> None:
    """Before 1.6 they were no archive, which cannot be mapped into memory."""
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(str(tmp_path / "old.bin"))["a"], state["a"])
    (tmp_path / "bad.bin").write_bytes(b"what")
    with pytest.raises(
        ConfigError, match=r"bad\.bin is damaged, or holds more than tensors, which DMDR does not load: \w+: ."
    ):
        read_weights(str(tmp_path / "bad.bin"))


def test_a_digest_sees_what_a_training_changes(tmp_path: Path) -> None:
    """A span of any 20 MiB of ten GiB, at the scale of a hundredth and of single bytes."""
    found = set()
    for name, size in (("small", 5000), ("large", 5 * 2**20)):
        content = bytearray(size)
        for start in (None, 0, size // 2, size - 1):
            changed = content.copy()
            if start is not None:
                end = start + (1 if name == "small" else 2**14)
                changed[start:end] = b"x" * (min(end, size) - start)
            (tmp_path / name).write_bytes(changed)
            found.add((name, start, digest(tmp_path / name)))
    digests = {name: {d for n, _, d in found if n == name} for name in ("small", "large")}
    assert len(digests["small"]) == 4
    assert len(digests["large"]) == 3  # of a single last byte nothing is seen


# --- Precision and place ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("says", "expected"), [(None, torch.float16), (True, torch.float32), (False, torch.float16)])
def test_a_decoder_that_overflows_in_half_precision(
    copy: Path, says: bool | None, expected: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    """As its configuration says; all without a word."""
    file = copy / "vae" / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "force_upcast"}
    file.write_text(json.dumps(config if says is None else config | {"force_upcast": says}))
    logging.set_verbosity_warning()
    capfd.readouterr()
    try:
        assert prepared(copy, precision="fp16").vae.dtype == expected
        assert prepared(copy, precision="bf16").vae.dtype == torch.bfloat16
    finally:
        logging.set_verbosity_error()
    assert capfd.readouterr() == ("", "")


def test_offloaded_modules_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure, too; what a graph needs stays."""
    module, places = nn.Linear(1, 1), []
    monkeypatch.setattr(module, "to", lambda place: places.append(str(place)))
    with torch.no_grad(), on_device(torch.device("cpu:0"), module, offload=True):
        pass
    with torch.no_grad(), pytest.raises(ZeroDivisionError), on_device(torch.device("cpu:0"), module, offload=True):
        1 / 0  # noqa: B018
    with on_device(torch.device("cpu:0"), module, offload=True):
        pass
    assert places == ["cpu:0", "cpu", "cpu:0", "cpu", "cpu:0"]


def test_an_export_is_sampled_in_the_precision_of_its_run(half: Path, tmp_path: Path, stock: Stock) -> None:
    """By its card, in stock diffusers, to the same images but for rounding."""
    settings = {"mixed_precision": "bf16", "variant": "fp16", "stage1_steps": 2, "stage2_steps": 0}
    student = trained(half, FAMILIES["sd3"], tmp_path, "none", **settings).output / "student"
    card, about = (student / "README.md").read_text(), json.loads((student / "sampling.json").read_text())
    assert f'from_pretrained("{half}", variant="fp16", torch_dtype=torch.bfloat16)' in card
    assert about["mixed_precision"] == "bf16"
    open_export(student, about).draw(ROWS, 0, tmp_path / "ours")
    open_export(student, about, mixed_precision="no", options=OFFLOAD).draw(ROWS, 0, tmp_path / "exact")
    stock(student, PROMPTS, tmp_path / "stock")
    for i in range(len(PROMPTS)):
        ours, theirs, exact = (
            np.asarray(Image.open(tmp_path / place / f"{i:04d}.png")).astype(float)
            for place in ("ours", "stock", "exact")
        )
        assert np.abs(ours - theirs).mean() < 2 and ours.std() > 2
        assert np.abs(ours - exact).mean() > 0


def test_an_export_is_drawn_at_the_resolution_of_its_run(model: Path, copy: Path, tmp_path: Path) -> None:
    """Also where the model that it is drawn with has another one of its own."""
    backend = prepared(model, max_sequence_length=5)
    about = {"base": str(model), "family": None, "name": "", "prompt": "", "objectives": "", "rewards": ""}
    sampler = FewStepSampler(backend.path, backend.grid(2), 1.0)
    student = export(tmp_path / "student", backend, sampler, mixed_precision="no", **about)
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 4}))
    (picture,) = open_export(student, read_export(student), model=str(copy)).draw(ROWS[:1], 0, tmp_path / "drawn")
    assert Image.open(picture).size == (16, 16)
    asked = {"options": {"resolution": "24x16"}}
    (picture,) = open_export(student, read_export(student), **asked).draw(ROWS[:1], 0, tmp_path / "wide")
    assert Image.open(picture).size == (24, 16)


@pytest.mark.parametrize(("flag", "name"), [("teacher_lora", "gone.safetensors"), ("student_weights", "a/b/c")])
def test_a_file_that_is_not_there_is_refused_before_anything_is_loaded(model: Path, flag: str, name: str) -> None:
    options = SD3Backend.Options(full_finetune=flag == "student_weights", **{flag: name})
    backend = SD3Backend(str(model), options)
    with pytest.raises(ConfigError, match=f"^--{flag} {name}: no such file or folder$"):
        backend.connect(SimpleNamespace(device=torch.device("cpu"), mixed_precision="no"))


@pytest.mark.parametrize(
    ("full", "said"), [(True, "a full network, but this run trains a LoRA"), (False, "a LoRA, but")]
)
@pytest.mark.parametrize("place", ["student", "checkpoints/step-000003", ""])
def test_a_student_of_the_other_kind_is_refused_before_anything_is_loaded(
    copy: Path, tmp_path: Path, place: str, full: bool, said: str
) -> None:
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    run = tmp_path / "run"
    for folder in ("student", "checkpoints/step-000003"):
        (run / folder).mkdir(parents=True)
    (run / "config.yaml").write_text(f"full_finetune: {str(full).lower()}")
    about = {"base_model": "", "backend": None, "sample_eta": 1.0, "grid": [1.0, 0.0], "mixed_precision": "no"}
    about |= {"call": {}, "options": {"full_finetune": full}}
    (run / "student" / "sampling.json").write_text(json.dumps(about))
    (run / "checkpoints" / "step-000003" / "progress.json").write_text(json.dumps(asdict(Progress(1, 3, 3, 3))))
    for name in ("student.safetensors", "training.pt"):  # nobody has opened them by then
        (run / "checkpoints" / "step-000003" / name).touch()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = {"prompts": str(tmp_path / "prompts.txt"), "rl": "none", "reward": "none", "report_to": "none"}
    with pytest.raises(ConfigError) as error:
        train(
            model=str(copy), init_student=str(run / place), full_finetune=not full, output_dir=str(tmp_path / "next"),
            **settings,
        )  # fmt: skip
    start = run / (place or "checkpoints/step-000003")
    assert str(error.value).startswith(f"--init_student {start} is {said}")
    assert str(error.value).endswith(f": set --full_finetune {str(full).lower()}")


@pytest.mark.parametrize("name", ["a'b", 'a"b', "a'\"b", "a\\b", "a\nb", "`a`", "{a}", "\u202ea", "\ud83da"])
def test_the_snippet_is_python_whatever_the_names(model: Path, name: str) -> None:
    backend = prepared(model, max_sequence_length=5)
    backend.index = {**backend.index, "text_encoder; import os": ["a", "b"], "text_encoder_9": ["a", "b"]}
    snippet = backend.snippet(name, name, FewStepSampler(backend.path, backend.grid(2), 1.0))
    found = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
    assert found.count(name) == 2
    assert "import os" not in snippet and "text_encoder_9=None" in snippet


def test_checkpointing_the_decoder_keeps_less_and_changes_no_gradient(model: Path) -> None:
    latents, grads, kept = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), [], []
    for gradient_checkpointing in (False, True):
        backend = prepared(model, gradient_checkpointing=gradient_checkpointing)
        given, saved = latents.clone().requires_grad_(), dict[int, int]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.untyped_storage().data_ptr(), t.nbytes) and t, lambda t: t
        ):
            images = backend.decode(given)
        images.square().sum().backward()
        grads.append(given.grad)
        kept.append(sum(saved.values()))
    assert torch.equal(*grads)
    assert kept[1] < 0.6 * kept[0]


def test_what_guidance_leads_away_from_is_refused_without_guidance(model: Path) -> None:
    for name, value in (("negative_prompt", "blurry"), ("zero_empty_prompt", True)):
        settings = {"model": str(model), "prompts": "prompts.txt", "guidance_scale": 1.0, name: value}
        with pytest.raises(ConfigError, match=f"--{name} is not read with --guidance_scale 1; leave it out"):
            parse(settings=settings)
