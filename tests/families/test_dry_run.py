"""`--dry_run` on small pipelines without their weights, against what training really keeps."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dmdr.cli import train
from dmdr.config import parse
from dmdr.dry_run import NETWORK, OPTIMIZER, Estimate, Process, estimate
from dmdr.memory import REST, GPUKernels, Meter
from dmdr.protocols import BackendOptions
from dmdr_sd3 import SD3Backend
from family import FAMILIES
from test_families import prepared, states


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family's pipeline folder without weights and tokenizers, and `sd3-whole` with them."""
    root, found = tmp_path_factory.mktemp("bare"), {}
    for name, family in FAMILIES.items():
        found[name] = root / name
        family.build(found[name])
        if name == "sd3":
            found["sd3-whole"] = Path(shutil.copytree(found[name], root / "sd3-whole"))
        for file in found[name].rglob("*"):
            if file.suffix in (".safetensors", ".bin") or "tokenizer" in file.parent.name:
                file.unlink()
    return found


def estimated(folder: Path, name: str, **settings: Any) -> Estimate:
    small = {
        "lora_rank": 4, "lora_alpha": 8.0, "fake_lora_rank": 2, "num_inference_steps": 2, "report_to": "none",
        "guidance_scale": FAMILIES[name].guidance, "sample_images": 2,
    }  # fmt: skip
    own = dict(FAMILIES[name].settings)
    return estimate(parse(settings=small | own | {"model": str(folder), "dry_run": True} | settings))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_built_without_weights(bare: dict[str, Path], name: str, tmp_path: Path) -> None:
    found = estimated(bare[name], name)
    built = tmp_path / name
    FAMILIES[name].build(built)
    real = prepared(built, FAMILIES[name], fake_lora_rank=2)
    for part, role in (("student, LoRA", "student"), ("fake score, LoRA", "fake_score")):
        parameters = real.parameters(role).values()
        assert found.parameters[part] == sum(p.numel() for p in parameters)
        assert found.phases[found.highest][part] == sum(p.nbytes for p in parameters)
    adapters = {id(p) for role in ("student", "fake_score") for p in real.parameters(role).values()}
    network = sum(p.nbytes for p in real.roles.network.parameters() if id(p) not in adapters)
    buffers = sum(b.nbytes for b in real.roles.network.buffers())
    assert found.phases[found.highest][NETWORK] == network + buffers
    assert found.phases[found.highest][REST] > 0
    assert set(found.phases) == {"stage 1", "stage 2", "sample grid"}


def test_activations_are_those_of_a_real_forward_pass(bare: dict[str, Path]) -> None:
    """The student's graph on the CPU and on the meta device, both in float32, counted by one meter."""
    kept = []
    for folder, device in ((bare["sd3-whole"], "cpu"), (bare["sd3"], "meta")):
        if device == "cpu":
            backend = prepared(folder, FAMILIES["sd3"], prompt_cache="off")
            cond = backend.encode(FAMILIES["sd3"].prompts)
        else:
            options = BackendOptions(
                lora_rank=4, fake_lora_rank=2, max_sequence_length=5, prompt_cache="off", guidance_scale=4.0
            )
            backend = SD3Backend(str(folder), options)
            backend.prepare(Process(torch.device("meta")), roles=("student", "fake_score"))
            cond = replace(cond, tensors={name: tensor.to("meta") for name, tensor in cond.tensors.items()})
        x_t, t = (tensor.to(device) for tensor in states(backend))
        with Meter() as meter, GPUKernels() if device == "meta" else nullcontext():
            meter.label("weights", [*backend.roles.network.parameters(), *backend.roles.network.buffers()])
            meter.restart()
            prediction = backend.student(x_t, t, cond)
            kept.append((meter.now[REST], meter.peak[REST]))
        assert prediction.value.shape == (2, *backend.latent_shape)
    for real, without_values in zip(*kept, strict=True):
        assert abs(without_values - real) < 0.05 * real


def test_what_saves_memory_is_seen(bare: dict[str, Path]) -> None:
    plain = estimated(bare["sd3"], "sd3", rl="refl", reward="hps", per_device_train_batch_size=8)
    peak = {name: max(parts[name] for parts in plain.phases.values()) for name in (REST, OPTIMIZER)}
    trained = sum(plain.parameters[f"{role}, LoRA"] for role in ("student", "fake score"))
    assert peak[OPTIMIZER] == pytest.approx(2 * 4 * trained, rel=0.01)  # two float32 moments
    checkpointed = estimated(bare["sd3"], "sd3", per_device_train_batch_size=8, gradient_checkpointing=True)
    assert checkpointed.phases["stage 1"][REST] < plain.phases["stage 1"][REST]
    full = estimated(bare["sd3"], "sd3", full_finetune=True)
    eight_bit = estimated(bare["sd3"], "sd3", full_finetune=True, optim="adamw_bnb_8bit")
    # Most of these layers are too small for 8 bits.
    assert eight_bit.phases["stage 1"][OPTIMIZER] < 0.6 * full.phases["stage 1"][OPTIMIZER]
    assert (plain.backbones, full.backbones) == (1, 2)
    assert plain.total(3) - plain.total(1) == 2 * plain.backbone == 2 * plain.phases["stage 1"][NETWORK]
    half = estimated(bare["sd3"], "sd3", mixed_precision="bf16")
    assert half.backbone < 0.6 * plain.backbone


def test_the_command(
    bare: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe names no prompts and no model, and its architecture lies beside it; nothing is written."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipes" / "it.yaml"
    recipe.parent.mkdir()
    recipe.write_text(f"architecture: ../{bare['sd3'].name}\nrl: grpo\nreward: dinov2\nnum_generations: 2\n")
    shutil.copytree(bare["sd3"], tmp_path / bare["sd3"].name)
    before = sorted(tmp_path.rglob("*"))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dmdr-train", *arguments])
        with pytest.raises(SystemExit) as end:
            train.main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    small = ["--lora_rank=2", "--fake_lora_rank=2", "--max_sequence_length=5", f"--config={recipe}"]
    code, out, err = call("--dry_run", *small)
    assert code == 0, err
    assert "total with 1 backbone " in out and out.endswith("nothing was loaded, nothing was written\n")
    assert call(*small)[::2] == (2, "dmdr-train: --model is missing: this recipe names none\n")
    for arguments, message in (
        (["--model=toy"], "--model toy is built: it needs --architecture"),
        (["--architecture=nowhere"], "nowhere is neither a diffusers pipeline folder"),
        ([f"--architecture={bare['sd3'].name}", "--rl=nonsense"], "unknown objective 'nonsense'"),
    ):
        code, out, err = call("--dry_run", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_prompts_and_text_encoders_that_stay_are_counted(bare: dict[str, Path]) -> None:
    cached, kept = (estimated(bare["sd3"], "sd3", prompt_cache=where) for where in (None, "off"))
    assert "text encoders" not in cached.parameters
    assert kept.parameters["text encoders"] > 0
