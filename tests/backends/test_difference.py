"""A student that starts from other weights than its teacher's."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import processes
import sd3
from dmdr import train
from dmdr.backends.difference import low_rank_difference
from dmdr.errors import ConfigError
from dmdr.run.device import mesh_of, open_accelerator
from dmdr.run.drawing import open_export
from dmdr.run.export import read_export
from dmdr.settings import registry

LAYER, OTHER = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.ff.net.2.weight"
FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(folder)
    return folder


@contextmanager
def changed(base: Path, folder: Path) -> Iterator[dict[str, Tensor]]:
    """A pipeline with other weights."""
    StableDiffusion3Pipeline.from_pretrained(base).save_pretrained(folder)
    weights = load_file(folder / FILE)
    yield weights
    save_file(weights, folder / FILE, {"format": "pt"})


@pytest.fixture(scope="module")
def distilled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other in two layers: by a matrix of rank 2 in one that has an adapter, and in one that has none."""
    folder, generator = tmp_path_factory.mktemp("distilled"), torch.Generator().manual_seed(1)
    with changed(base, folder) as weights:
        rows, columns = weights[LAYER].shape
        weights[LAYER] += torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
        weights[OTHER] += torch.randn(weights[OTHER].shape, generator=generator)
    return folder


def backend(model: Path, sharding: Any = None, **options: Any) -> Any:
    cls = registry.load("backends", "StableDiffusion3Pipeline")
    given = {"lora_rank": 4, "lora_alpha": 12.0, "max_sequence_length": 5} | options
    found = cls(str(model), cls.Options(**given))
    found.prepare(open_accelerator("no", cpu=True), roles=("student", "fake_score"), sharding=sharding)
    found.start_student()
    return found


def answers(one: Any, *roles: str) -> list[Tensor]:
    x_t = torch.randn(1, *one.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cond = one.encode(["a handwritten seven"])
        return [getattr(one, role)(x_t, torch.tensor([0.6]), cond).value for role in roles]


@pytest.mark.parametrize("fake_score", ["lora", "full"])
def test_a_full_student_is_the_other_network(base: Path, distilled: Path, fake_score: str) -> None:
    found = backend(distilled, teacher=str(base), full_finetune=True, fake_score=fake_score)
    student, teacher, fake = answers(found, "student", "teacher", "fake_score")
    torch.testing.assert_close(student, answers(backend(distilled), "teacher")[0])
    torch.testing.assert_close(teacher, answers(backend(base), "teacher")[0])
    torch.testing.assert_close(fake, teacher)
    assert fake_score == "full" or torch.equal(fake, teacher)
    assert (student - teacher).abs().max() > 1e-2


def test_a_lora_is_the_largest_part_of_the_difference(
    base: Path, distilled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dmdr")
    found = backend(distilled, teacher=str(base))
    own, other = (load_file(folder / FILE) for folder in (base, distilled))
    lost = (other[OTHER] - own[OTHER]).norm() / torch.stack([(other[n] - own[n]).norm() for n in (LAYER, OTHER)]).norm()
    assert caplog.messages == [
        f"the student starts from {distilled}: a LoRA of rank 4, which lacks {100 * lost:.0f}% of the difference to "
        f"{base}"
    ]
    merged = found.roles.merged("student")
    torch.testing.assert_close(merged[LAYER], other[LAYER], rtol=0, atol=1e-5)
    assert torch.equal(merged[OTHER], own[OTHER])
    # Where there is no difference the adapter does nothing, and learns: A is not zero.
    for name, tensor in found.parameters("student").items():
        assert tensor.detach().any() == (".lora_A." in name or name.startswith(LAYER.removesuffix("weight")))
    both = backend(distilled, teacher=str(base), lora_target_modules=["to_q", "ff.net.2"], lora_rank=32)
    torch.testing.assert_close(answers(both, "student"), answers(backend(distilled), "teacher"), rtol=0, atol=1e-4)


def share(rank: int, base: Path, distilled: Path, place: Path) -> None:
    mesh = mesh_of(2, open_accelerator("no", cpu=True))
    found = {}
    for full in (True, False):
        one = backend(distilled, mesh, teacher=str(base), full_finetune=full)
        found[full] = answers(one, "student", "teacher")
    torch.save(found, place / f"{rank}.pt")


def test_processes_that_share_the_network_start_as_one(base: Path, distilled: Path, tmp_path: Path) -> None:
    processes.start(share, 2, base, distilled, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for full in (True, False):
            alone = answers(backend(distilled, teacher=str(base), full_finetune=full), "student", "teacher")
            torch.testing.assert_close(found[full], alone, rtol=1e-4, atol=1e-4)


def test_no_rank_does_better(tmp_path: Path) -> None:
    """The error is the closed form: the singular values that are left out."""
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(40, 30, generator=generator) for _ in range(2))
    for name, tensor in (("a", before), ("b", after)):
        save_file({"m.weight": tensor}, tmp_path / name)
    adapter = {"m.lora_A.weight": torch.randn(8, 30, generator=generator), "m.lora_B.weight": torch.zeros(40, 8)}
    files = ({"m.weight": tmp_path / name} for name in ("a", "b"))
    found, lost = low_rank_difference(*files, adapter, torch.device("cpu"), "b")
    singular = torch.linalg.svdvals((after - before).double())
    assert lost == pytest.approx(float(singular[8:].norm() / singular.norm()), rel=1e-2)
    rest = after - before - found["m.lora_B.weight"] @ found["m.lora_A.weight"]
    assert float(rest.norm() / (after - before).norm()) == pytest.approx(lost, rel=1e-5)
    save_file({"m.weight": torch.full((40, 30), torch.nan)}, tmp_path / "nan")
    (tmp_path / "torn").write_bytes((tmp_path / "b").read_bytes()[:100])
    for name, said in (("nan", r"m\.weight has numbers that are not finite"), ("torn", "torn cannot be read as safe")):
        both = ({"m.weight": tmp_path / each} for each in ("a", name))
        with pytest.raises(ConfigError, match=said):
            low_rank_difference(*both, adapter, torch.device("cpu"), name)
    with pytest.raises(ConfigError, match=r"1 missing \(m\.weight\)"):
        low_rank_difference({"m.weight": tmp_path / "a"}, {}, adapter, torch.device("cpu"), "b")


def test_a_run_and_its_export(base: Path, distilled: Path, tmp_path: Path) -> None:
    """The file of the export acts on the teacher, without the other model; a resumed run goes on to the same bits."""
    (tmp_path / "prompts.txt").write_text("seven\ntwo\n")
    given = {
        "model": str(distilled), "teacher": str(base), "prompts": str(tmp_path / "prompts.txt"), "rl": "refl",
        "reward": "toy", "stage1_steps": 1, "stage2_steps": 1, "fake_updates": 1, "num_inference_steps": 2,
        "lora_rank": 4, "max_sequence_length": 5, "per_device_train_batch_size": 2, "sample_images": 1,
        "teacher_steps": 2, "report_to": "none", "save_steps": 1,
    }  # fmt: skip
    run = train(**given, output_dir=str(tmp_path / "run"))
    student, about = run / "student", read_export(run / "student")
    card = (student / "README.md").read_text()
    assert about["base_model"] == str(base) and f'from_pretrained("{base}"' in card
    assert f"It inherits the licence of `{base}`, and that of `{distilled}`, from which the student started" in card
    artist = open_export(student, about)
    torch.testing.assert_close(answers(artist.family, "teacher"), answers(backend(base), "teacher"))
    name = LAYER.removesuffix(".weight")
    saved = load_file(student / "pytorch_lora_weights.safetensors")
    delta = saved[f"transformer.{name}.lora_B.weight"] @ saved[f"transformer.{name}.lora_A.weight"]
    own, other = (load_file(folder / FILE)[LAYER] for folder in (base, distilled))
    torch.testing.assert_close(delta, other - own, rtol=0, atol=1e-2)  # after two small updates
    assert json.loads((run / "overview.json").read_text())["teacher"] == str(base)
    step = run / "checkpoints" / "step-000001"
    again = train(**given, output_dir=str(tmp_path / "again"), resume_from_checkpoint=str(step))
    other_file = again / "student" / "pytorch_lora_weights.safetensors"
    assert all(torch.equal(tensor, saved[key]) for key, tensor in load_file(other_file).items())


def test_what_is_no_student_of_the_teacher_is_refused(base: Path, tmp_path: Path) -> None:
    with changed(base, tmp_path):
        pass
    file = tmp_path / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(
        ConfigError, match=r"--teacher .* is another architecture: num_layers is \d there and 3 in --model"
    ):
        backend(tmp_path, teacher=str(base))
    for option, value in (("teacher_lora", "a.safetensors"), ("student_weights", "b.safetensors")):
        with pytest.raises(ConfigError, match=f"--teacher and --{option}: .*, or leave one of them out"):
            backend(base, teacher=str(base), full_finetune=option == "student_weights", **{option: value})
    with pytest.raises(ConfigError, match="--teacher nowhere: no such file or folder"):
        backend(base, teacher="nowhere")
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    with pytest.raises(
        ConfigError, match=r"--teacher .* is a FluxPipeline, but --model .* is a StableDiffusion3Pipeline"
    ):
        backend(base, teacher=str(tmp_path))
