"""What every model family must show, on a small random pipeline of its real classes, against stock diffusers."""

import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dmdr import train
from dmdr.ema import EMA
from dmdr.errors import ConfigError
from dmdr.paths import add_noise
from dmdr.protocols import with_options
from dmdr.run.drawing import open_export
from dmdr.run.export import export
from dmdr.run.job import assemble
from dmdr.run.run import Run
from dmdr.sampling import FewStepSampler
from dmdr.settings import registry
from dmdr.settings.models import pipeline_class
from dmdr.settings.parse import resolve
from dmdr.testing import check_backend
from family import FAMILIES, Family, Stock
from old_files import SAMPLING_OPTIONS
from steps import frozen, question, settings_of, trainer_of
from steps import prepared as trainers_of
from steps import shaken as moved

ROLES = ("student", "fake_score")
CASES = [(name, objective) for name, family in FAMILIES.items() for objective in family.objectives]
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pipelines, built once."""
    built: dict[str, Path] = {}
    for name, family in FAMILIES.items():
        built[name] = tmp_path_factory.mktemp("pipelines") / name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            family.build(built[name])
    return built


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prepared(folder: Path, family: Family, *, roles: Any = ROLES, accelerator: Any = None, **options: Any) -> Any:
    """The family's backend on the CPU, in float32 unless the accelerator says otherwise."""
    small = {"lora_rank": 4, "lora_alpha": 8.0, "fake_lora_rank": 2, "fake_lora_alpha": 3.0}
    cls = registry.load("backends", pipeline_class(str(folder)))
    given = small | family.settings | {"guidance_scale": family.guidance} | options
    backend = cls(str(folder), with_options(cls.Options(), **given))
    backend.prepare(accelerator or Accelerator(cpu=True), roles=roles)
    return backend


def shaken(backend: Any, roles: Any = ROLES) -> Any:
    """With adapters (or a full student) far from their initial values."""
    for number, role in enumerate(roles):
        generator = torch.Generator().manual_seed(number)
        for parameter in backend.parameters(role).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backend


def states(backend: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy latents and their times."""
    x_t = torch.randn(2, *backend.latent_shape, generator=torch.Generator().manual_seed(seed))
    return x_t, torch.tensor([0.35, 0.8], dtype=torch.float64)


@pytest.mark.parametrize("full", [False, True])
def test_contract(folders: dict[str, Path], name: str, full: bool) -> None:
    """With LoRAs, and with a full student and a full fake score."""
    folder, family = folders[name], FAMILIES[name]
    cls = registry.load("backends", pipeline_class(str(folder)))
    given = {"lora_rank": 4, "fake_lora_rank": 4, "guidance_scale": family.guidance} | family.settings
    given |= {"full_finetune": True, "fake_score": "full"} if full else {}
    check_backend(cls(str(folder), with_options(cls.Options(), **given)), family.prompts[:2])


@pytest.mark.parametrize("full_finetune", [False, True])
@pytest.mark.parametrize("name", ["flux", "z-image", "flux2-klein", "qwen-image", "krea2"])
def test_a_chosen_attention_kernel_gets_half_precision(
    folders: dict[str, Path], name: str, full_finetune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most take nothing else, and the norms of queries and keys have float32 weights in a full student."""
    kernel, seen = AttentionBackendName._NATIVE_FLASH, set()
    attend = _AttentionBackendRegistry._backends[kernel]

    def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.update((query.dtype, key.dtype, value.dtype))
        return attend(query, key, value, *args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, kernel, watched)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), mixed_precision="bf16", autocast=partial(torch.autocast, "cpu", torch.bfloat16)
    )
    options = {"attention_backend": kernel.value, "full_finetune": full_finetune}
    backend = prepared(folders[name], FAMILIES[name], accelerator=accelerator, **options)
    cond = backend.encode(FAMILIES[name].prompts)
    for role in ("teacher", *ROLES):
        getattr(backend, role)(*states(backend), cond)
    assert seen == {torch.bfloat16}
    assert _AttentionBackendRegistry.get_active_backend()[0] != kernel  # what networks take that name none


# --- Against the stock pipeline ---------------------------------------------------------------------------------------


def test_teacher_is_the_stock_pipeline(folders: dict[str, Path], name: str) -> None:
    """Its own noise prediction, at its own latents and times, with and without guidance."""
    family, backend = FAMILIES[name], prepared(folders[name], FAMILIES[name])
    cond = backend.encode(family.prompts)
    width, height = backend.sizes[-1]
    last = replace(family, call={**family.call, "width": width, "height": height})  # another size than the first
    given = [(family, 1.0, backend.latent_shape), (family, family.guidance, backend.latent_shape)]
    given += [(last, 1.0, backend.latent_shapes[-1])] if len(backend.sizes) > 1 else []
    for called, guidance, shape in given:
        for output, timestep, latents in stock_steps(folders[name], called, guidance):
            x_t = family.unpacked(latents, shape)
            t = family.timestep(timestep).expand(2)
            found = backend.teacher(x_t, t, cond, guidance=guidance).value
            expected = family.unpacked(output, shape)
            # Stock pipelines run both branches of guidance in one batch, whose last bits differ.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(guidance, 1.0))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.negative])
def test_guidance_leads_away_from_the_negative_prompt(folders: dict[str, Path], name: str) -> None:
    family, text = FAMILIES[name], "a handwritten nine"
    backend = prepared(folders[name], family, negative_prompt=text)
    cond = backend.encode(family.prompts)
    told = {"negative_prompt": [text] * 2}
    asked = replace(family, guided=lambda scale: {**family.guided(scale), **told})
    output, timestep, latents = stock_steps(folders[name], asked, family.guidance)[0]
    found, plain = (
        one.teacher(
            family.unpacked(latents, one.latent_shape),
            family.timestep(timestep).expand(2),
            cond,
            guidance=family.guidance,
        ).value
        for one in (backend, prepared(folders[name], family))
    )
    expected = family.unpacked(output, backend.latent_shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * family.guidance)
    assert (found - plain).abs().max() > 1e-3


def stock_steps(folder: Path, family: Family, guidance: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Prediction, timestep and the network's latents of each step of the stock pipeline."""
    pipe = family.stock(folder)
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step = pipe.scheduler.step
    scaled = getattr(pipe.scheduler, "scale_model_input", lambda latents, t: latents)

    def spy(output: Tensor, t: Tensor, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((output.clone(), torch.as_tensor(t), scaled(latents, t).clone()))
        return step(output, t, latents, *args, **kwargs)

    pipe.scheduler.step = spy
    torch.manual_seed(0)
    call = {**family.guided(guidance), **family.call}
    pipe(**{family.argument: list(family.prompts)}, num_inference_steps=3, output_type="latent", **call)
    assert len(seen) == 3
    return seen


def test_the_model_card_reproduces_dmdr_sample(
    folders: dict[str, Path], tmp_path: Path, name: str, stock: Stock
) -> None:
    """The card's own snippet, in a process that cannot import dmdr: same seed, same images (under 2/255)."""
    family = FAMILIES[name]
    for i, variant in enumerate(family.variants):
        folder = tmp_path / str(i)
        folder.mkdir()
        run = trained(folders[name], family, folder, "none", stage1_steps=2, stage2_steps=0, **variant)
        student = run.output / "student"
        about = json.loads((student / "sampling.json").read_text())
        open_export(student, about).draw(family.rows, 0, folder / "ours")
        stock(student, family.prompts, folder / "stock")
        for k in range(2):
            a, b = (np.asarray(Image.open(folder / f / f"{k:04d}.png")).astype(int) for f in ("ours", "stock"))
            assert np.abs(a - b).max() < 2, variant
            assert a.std() > 2  # a picture, not a flat field


def test_an_older_versions_export_is_drawn_from_as_before(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Its sampling.json holds the options of all families."""
    family = FAMILIES[name]
    backend = shaken(prepared(folders[name], family))
    sampler = FewStepSampler(backend.path, backend.grid(2), 1.0)
    about = {"base": str(folders[name]), "family": None, "name": name, "prompt": "", "mixed_precision": "no"}
    student = export(tmp_path / "student", backend, sampler, **about, objectives="", rewards="")
    told = json.loads((student / "sampling.json").read_text())
    own = {option: value for option, value in told["options"].items() if value is not None}
    old = told | {"options": SAMPLING_OPTIONS | {n: value for n, value in own.items() if n in SAMPLING_OPTIONS}}
    assert len(old["options"]) == 25
    places = {"a": told, "b": old}.items()
    drawn = [open_export(student, each).draw(family.rows, 0, tmp_path / place) for place, each in places]
    for a, b in zip(*drawn, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_stock_diffusers_loads_the_lora_in_full(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A student of all layers at alpha / rank = 2, one by one; keys have the form that loaders look for."""
    family = FAMILIES[name]
    pipe = family.stock(folders[name])
    network = getattr(pipe, "unet", None) or pipe.transformer
    layers = [module for module, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    backend = shaken(prepared(folders[name], family, lora_target_modules=layers))
    backend.export(tmp_path, FewStepSampler(backend.path, backend.grid(2), 1.0))
    file = tmp_path / "pytorch_lora_weights.safetensors"
    keys = load_file(file).keys()
    assert keys and all(re.fullmatch(family.lora_keys, key) for key in keys)
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    merged = dict(getattr(pipe, backend.network_name).named_parameters())
    checked = 0
    for module, layer in backend.roles.layers.items():
        delta = layer.get_delta_weight("student")
        theirs = merged.get(f"{module}.base_layer.weight", merged.get(f"{module}.weight"))
        assert theirs is not None
        torch.testing.assert_close(theirs, layer.base_layer.weight + delta, rtol=0, atol=1e-5)
        checked += bool(delta.abs().max() > 1e-3)
    assert checked == len(keys) // 2 == len(layers)
    other = prepared(folders[name], family, lora_alpha=4.0, lora_target_modules=layers)
    other.load_export(tmp_path)
    x_t, t = states(backend)
    cond = backend.encode(family.prompts)
    with torch.no_grad():
        torch.testing.assert_close(other.student(x_t, t, cond).value, backend.student(x_t, t, cond).value)


def test_a_teachers_lora_is_merged_and_exported_with_the_students(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The one exported file acts on the published model; loaded beside the merged teacher it is the student again."""
    family = FAMILIES[name]
    author = shaken(prepared(folders[name], family, lora_rank=3, lora_alpha=6.0), ("student",))
    grid = FewStepSampler(author.path, author.grid(2), 1.0)
    author.export(tmp_path / "teacher", grid)
    merged = {"teacher_lora": str(tmp_path / "teacher")}
    backend = prepared(folders[name], family, **merged)
    x_t, t = states(backend)
    cond = backend.encode(family.prompts)
    with torch.no_grad():
        torch.testing.assert_close(
            backend.teacher(x_t, t, cond).value, author.student(x_t, t, cond).value, rtol=0, atol=1e-4
        )
    shaken(backend)
    backend.export(tmp_path / "both", grid)
    again, on_published = prepared(folders[name], family, **merged), prepared(folders[name], family, lora_rank=7)
    again.load_export(tmp_path / "both")
    on_published.load_export(tmp_path / "both")
    with torch.no_grad():
        expected = backend.student(x_t, t, cond).value
        torch.testing.assert_close(again.student(x_t, t, cond).value, expected)
        torch.testing.assert_close(on_published.student(x_t, t, cond).value, expected, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"safetensors was not trained with the --teacher_lora of this run: give the"):
        again.load_export(tmp_path / "teacher")


# --- Training ---------------------------------------------------------------------------------------------------------


def trained(folder: Path, family: Family, tmp_path: Path, rl: str, **settings: Any) -> Run:
    """A finished run."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(family.prompts))
    given = {
        "model": str(folder), "prompts": str(prompts), "rl": rl, "reward": "none" if rl == "none" else "toy",
        "num_inference_steps": 2, "guidance_scale": family.guidance, "guidance_jitter": 0.0, "fake_updates": 2,
        "learning_rate": 1e-3, "fake_learning_rate": 1e-3, "lora_rank": 4, "lora_alpha": 8.0, "fake_lora_rank": 2,
        "per_device_train_batch_size": 4, "sample_images": 1, "sample_steps": 0, "save_steps": 0, "teacher_steps": 2,
        "logging_steps": 1, "report_to": "none", "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    job = assemble(resolve(settings=given | dict(family.settings) | settings))
    run = Run(job, tmp_path / "run", None, None)
    run()
    return run


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_ten_steps_move_student_and_fake_score_only(
    folders: dict[str, Path], tmp_path: Path, name: str, objective: str
) -> None:
    family = FAMILIES[name]
    stages = {"stage1_steps": 10, "stage2_steps": 0} if objective == "none" else {"stage1_steps": 1, "stage2_steps": 9}
    run = trained(folders[name], family, tmp_path, objective, **stages, **family.objectives[objective])
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    for line in lines:
        values = {key: value for key, value in line.items() if key.startswith(("loss/", "grad_norm/"))}
        assert {"loss/dmd", "loss/fake", "grad_norm/student", "grad_norm/fake_score"} <= values.keys()
        assert all(value is not None and abs(value) < 1e6 for value in values.values()), values
    if objective != "none":
        assert all(f"loss/{objective}" in line for line in lines[1:])

    after, before = run.job.backend, prepared(folders[name], family, lora_rank=4)
    for role in ROLES:
        initial = before.parameters(role)
        moved = [not torch.equal(value, initial[key]) for key, value in after.parameters(role).items()]
        assert sum(moved) > len(moved) / 2  # the last block's text stream reaches nothing
    own = {key.replace("base_layer.", ""): value for key, value in after.roles.network.state_dict().items()}
    published = getattr(family.stock(folders[name]), after.network_name).state_dict()
    assert all(torch.equal(own[key], value) for key, value in published.items())
    x_t, t = states(after)
    cond = before.encode(family.prompts)
    for guidance in (1.0, family.guidance):
        ours, fresh = (b.teacher(x_t, t, cond, guidance=guidance).value for b in (after, before))
        assert torch.equal(ours, fresh)


@pytest.mark.parametrize("name", ["flux2-klein", "qwen-image", "krea2"])
def test_a_rewards_gradient_is_the_finite_difference(folders: dict[str, Path], name: str) -> None:
    """Of a brightness, through the student's last step and the family's own decoder, along a random direction."""
    family = FAMILIES[name]
    backend = shaken(prepared(folders[name], family))
    (x_t, t), cond = states(backend), backend.encode(family.prompts)

    def brightness() -> Tensor:
        weights = torch.linspace(-1, 1, 3).view(3, 1, 1)
        decoded = backend.latents.decode(backend.vae, backend.student(x_t, t, cond).x0)  # before it is clamped
        return (decoded * weights).double().sum()

    parameters = list(backend.parameters("student").values())
    brightness().backward()
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator) for p in parameters]
    slope = sum((p.grad * d).double().sum() for p, d in zip(parameters, direction, strict=True) if p.grad is not None)

    @torch.no_grad()
    def central(step: float) -> float:
        ends = []
        for sign in (1, -2, 1):
            for parameter, along in zip(parameters, direction, strict=True):
                parameter += sign * step * along
            ends.append(float(brightness()))
        return (ends[0] - ends[1]) / (2 * step)

    assert float(slope) == pytest.approx((4 * central(5e-4) - central(1e-3)) / 3, rel=2e-2)


@pytest.mark.verify
@pytest.mark.parametrize("name", ["flux2-klein", "qwen-image", "krea2"])
def test_matching_leads_back_to_what_the_teacher_draws(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A teacher that was trained to draw one latent, a student that was moved away from it, one prompt, 50 updates."""
    torch.manual_seed(0)
    family = replace(FAMILIES[name], prompts=FAMILIES[name].prompts[:1])
    learner = prepared(folders[name], family, full_finetune=True, roles=("student",))
    wanted, cond = torch.randn(1, *learner.latent_shape), learner.encode(list(family.prompts) * 8)
    optimizer = torch.optim.AdamW(learner.parameters("student").values(), 3e-3)
    for _ in range(300):
        t, eps = torch.rand(8), torch.randn(8, *learner.latent_shape)
        x_t = add_noise(learner.path, wanted, eps, t)
        (learner.student(x_t, t, cond).value - (eps - wanted)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    shutil.copytree(folders[name], tmp_path / "model")
    learner._whole_network().save_pretrained(tmp_path / "model" / "transformer")

    given = {"guidance_scale": 1.0, "fake_updates": 5, "fake_lora_rank": 8}
    trainers = trainers_of(settings_of(name, tmp_path / "model", tmp_path, "none", **given))
    trainer, backend = trainer_of(trainers), moved(trainers)
    noise = torch.randn(trainers.job.sampler.num_inference_steps, 8, *backend.latent_shape)

    def distance() -> float:
        with torch.no_grad():
            drawn = trainers.job.sampler.rollout(backend.student, noise, cond).final
        return float((drawn - wanted).square().mean())

    before = distance()
    for _ in range(50):  # whose loss is normalised by this very distance
        trainer.train_step()
    print(f"\n{name}: distance {before:.3f} -> {distance():.3f}")
    assert distance() < 0.5 * before


@pytest.mark.verify
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["flux2-klein", "qwen-image", "krea2"])
def test_a_run_goes_on_to_the_same_bits(folders: dict[str, Path], tmp_path: Path, name: str, steps: int) -> None:
    """Joint DMD and ReFL of students of one and of four steps."""
    given = {"stage1_steps": 1, "stage2_steps": 2, "num_inference_steps": steps, "save_steps": 1}
    (tmp_path / "whole").mkdir()
    whole = trained(folders[name], FAMILIES[name], tmp_path / "whole", "refl", **given)
    shutil.copytree(whole.output, tmp_path / "copy")
    step = tmp_path / "copy" / "checkpoints" / "step-000002"
    settings = yaml.safe_load((whole.output / "config.yaml").read_text()) | {"report_to": "none"}
    again = train(**settings, output_dir=str(tmp_path / "again"), resume_from_checkpoint=str(step))
    found, wanted = (load_file(run / "student" / "pytorch_lora_weights.safetensors") for run in (again, whole.output))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
@pytest.mark.parametrize("full_finetune", [False, True])
def test_an_old_policy_answers_on_the_students_own_network(
    folders: dict[str, Path], name: str, full_finetune: bool
) -> None:
    backend = prepared(folders[name], FAMILIES[name], full_finetune=full_finetune)
    (x_t, t), cond = states(backend), backend.encode(FAMILIES[name].prompts)

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return backend.student(x_t, t, cond).x0

    old, before = EMA(backend.parameters("student"), 0.5), answer()
    with torch.no_grad():
        for parameter in backend.parameters("student").values():
            parameter.add_(0.1)
    now = answer()
    with old.applied():
        assert torch.equal(answer(), before)
    assert torch.equal(answer(), now)
    assert not torch.equal(now, before)


@pytest.mark.parametrize("role", ["student", "fake_score"])
@pytest.mark.parametrize("full", [False, True])
def test_gradients_with_checkpointing_are_those_without(
    folders: dict[str, Path], name: str, role: str, full: bool
) -> None:
    """While another role is active at another strength when the recomputation runs."""
    family, found = FAMILIES[name], []
    for gradient_checkpointing in (False, True):
        options: dict[str, Any] = {"gradient_checkpointing": gradient_checkpointing}
        if full:
            options |= {"full_finetune": True} if role == "student" else {"fake_score": "full"}
        backend = shaken(prepared(folders[name], family, **options))
        x_t, t = states(backend)
        cond = backend.encode(family.prompts)
        loss = getattr(backend, role)(x_t, t, cond).x0.square().mean()
        backend.teacher(x_t, t, cond, fake_mix=0.0 if full and role == "fake_score" else 0.5)
        with backend.roles._as(("fake_score" if role == "student" else "student", 0.3)):
            loss.backward()
        found.append({key: p.grad for key, p in backend.parameters(role).items() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and sum(bool(g.any()) for g in plain.values()) > len(plain) / 2
    for key, grad in plain.items():
        assert (recomputed[key] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, key


@pytest.mark.parametrize("name", ["sd3"])
def test_compiled_blocks_are_the_same_in_every_role(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where gradient checkpointing runs them again under another role, and at shares that anneal."""
    compiled: list[str] = []
    compile_module = torch.nn.Module.compile

    def without_code(module: torch.nn.Module, **kwargs: Any) -> None:  # the graphs are traced, which is what may fail
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", without_code)
    found = []
    for torch_compile in (False, True):
        backend = shaken(
            prepared(folders[name], FAMILIES[name], gradient_checkpointing=True, torch_compile=torch_compile)
        )
        x_t, t = states(backend)
        cond = backend.encode(FAMILIES[name].prompts)
        values = [backend.teacher(x_t, t, cond, fake_mix=share).value for share in (0.0, 0.25, 0.2, 0.1)]
        for role in (backend.student, backend.fake_score):
            values.append(role(x_t, t, cond).value)
            values[-1].square().mean().backward()
        values += backend.features("fake_score", x_t, t, cond, [0, 1])
        (values[-1] + values[-2]).square().mean().backward()
        grads = [p.grad for role in ROLES for p in backend.parameters(role).values() if p.grad is not None]
        found.append([*values, *grads])
    assert compiled
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_features_are_what_the_prediction_is_made_of(folders: dict[str, Path], name: str) -> None:
    """Of the places of the image, and of nothing else, in what the last block answers."""
    family = FAMILIES[name]
    backend = shaken(prepared(folders[name], family))
    (x_t, t), cond = states(backend), backend.encode(family.prompts)
    blocks = [module for part in backend.feature_blocks for module in [getattr(backend.roles.network, part)]]
    last = blocks[-1][-1] if isinstance(blocks[-1], torch.nn.ModuleList) else blocks[-1]
    seen: list[Any] = []
    handle = last.register_forward_hook(lambda module, given, answer: seen.append(answer))
    prediction = backend.fake_score(x_t, t, cond).value
    handle.remove()
    whole = seen[0][-1] if isinstance(seen[0], tuple) else seen[0]
    (reached,) = torch.autograd.grad(prediction.square().sum(), whole)
    if whole.ndim == 4:  # a UNet's, [B, C, h, w]
        whole, reached = whole.flatten(2).mT, reached.flatten(2).mT
    layers = range(len(backend.feature_widths))
    found = backend.features("fake_score", x_t, t, cond, layers)
    assert [each.shape[2] for each in found] == list(backend.feature_widths)
    assert found[-1].shape[1] in (x_t[0, 0].numel(), x_t[0, 0].numel() // 4)
    places = reached.abs().sum(2) > 0
    assert (places.sum(1) == found[-1].shape[1]).all()
    torch.testing.assert_close(found[-1], whole[places].view(found[-1].shape), rtol=0, atol=0)


def test_features_with_checkpointing_have_the_same_gradients(folders: dict[str, Path], name: str) -> None:
    """At x_t and in the fake score, while another role is active when the recomputation runs."""
    family, found = FAMILIES[name], []
    for gradient_checkpointing in (False, True):
        backend = shaken(prepared(folders[name], family, gradient_checkpointing=gradient_checkpointing))
        x_t, t = states(backend)
        x_t.requires_grad_()
        cond = backend.encode(family.prompts)
        layers = backend.features("fake_score", x_t, t, cond, range(len(backend.feature_widths)))
        loss = torch.stack([each.square().mean() for each in layers]).sum()
        with backend.roles._as(("student", 0.3)):
            loss.backward()
        grads = {name: p.grad for name, p in backend.parameters("fake_score").items() if p.grad is not None}
        found.append([loss.detach(), x_t.grad, *grads.values()])
        assert x_t.grad is not None and x_t.grad.any() and any(grad.any() for grad in grads.values())
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()) + 1e-9)


def test_half_precision_stays_within_the_networks(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """What losses are made of is float32, and so is what is trained; the teacher is bfloat16."""
    trainers = trainers_of(settings_of(name, folders[name], tmp_path, "refl", mixed_precision="bf16"))
    trainer, backend = trainer_of(trainers), trainers.job.backend
    x_t, t, cond = question(trainers)
    answers = [getattr(backend, role)(x_t, t, cond).value for role in ("teacher", *ROLES)]
    images = backend.decode(answers[1])
    loss = images.square().mean() + answers[2].square().mean()
    loss.backward()
    trained = [p for role in ROLES for p in backend.parameters(role).values()]
    grads = [p.grad for p in trained if p.grad is not None]
    assert {tensor.dtype for tensor in (*answers, images, loss, *trained, *grads)} == {torch.float32} and grads
    kept = set(backend.network_class._keep_in_fp32_modules or ())  # as stock diffusers loads them
    for key, tensor in frozen(backend).items():
        assert tensor.dtype == (torch.float32 if kept & set(key.split(".")) else torch.bfloat16), key
    line = trainer.train_step(noted=True)
    assert all(math.isfinite(value) for key, value in line.items() if key.startswith(("loss/", "grad_norm/")))
