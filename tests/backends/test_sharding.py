"""A network that two processes share, against the same network whole in one."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import sd3
from dmdr import train
from dmdr.backends.flow import FlowOptions
from dmdr.backends.loading import Source, load_network, open_network, weight_files
from dmdr.backends.sharding import fill
from dmdr.errors import ConfigError
from dmdr.run.device import mesh_of
from dmdr.run.job import assemble
from dmdr.settings import registry
from dmdr.settings.models import pipeline_class
from dmdr.settings.parse import parse
from dmdr_sd3 import SD3Backend
from family import FAMILIES

PROMPTS = ("a handwritten seven", "a handwritten two")


def backend(folder: Path, sharding: Any = None, **options: Any) -> SD3Backend:
    found = SD3Backend(str(folder), FlowOptions(lora_rank=4, fake_lora_rank=4, seed=3, prompt_cache="off", **options))
    found.prepare(Accelerator(cpu=True), roles=("student", "fake_score"), sharding=sharding)
    return found


def answers(folder: Path, rows: slice, sharding: Any = None, **options: Any) -> dict[str, Tensor]:
    """What each role says of some samples, and the gradient of the student."""
    network = backend(folder, sharding, **options)
    for role in ("student", "fake_score"):
        generator = torch.Generator().manual_seed(5)
        for parameter in network.parameters(role).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    x_t = torch.randn((2, *network.latent_shape), generator=torch.Generator().manual_seed(7))[rows]
    t, cond = torch.tensor([0.4, 0.9])[rows], network.encode(PROMPTS[rows])
    found = {role: getattr(network, role)(x_t, t, cond).value for role in ("teacher", "fake_score", "student")}
    for _ in range(2):
        network.student(x_t, t, cond).value.square().sum().backward()
    for name, parameter in network.parameters("student").items():
        assert parameter.grad is not None and not isinstance(parameter.grad, DTensor)
        found[name] = parameter.grad
    shards = [p for p in network.roles.network.parameters() if isinstance(p, DTensor)]
    found["local"] = torch.tensor(sum(p.to_local().numel() for p in shards))
    found["all"] = torch.tensor(sum(p.numel() for p in shards))
    return {name: tensor.detach() for name, tensor in found.items()}


CASES: dict[str, dict[str, Any]] = {"plain": {}, "checkpointed": {"gradient_checkpointing": True}}

# Images of the first prompt have no score: some processes then have no pair to learn from, and others have.
REWARD = """
import torch

def red(images, prompts):
    score = images[:, 0].mean((1, 2))
    return torch.where(torch.tensor([prompt == "seven" for prompt in prompts], device=score.device), torch.nan, score)
"""
RUN: dict[str, Any] = {
    "rl": "dpo+grpo", "num_generations": 2, "stage1_steps": 1, "stage2_steps": 2, "fake_updates": 1, "eta": 0.9,
    "resolution": 16, "learning_rate": 1e-3, "lora_rank": 4, "fake_lora_rank": 4, "gradient_checkpointing": True,
    "report_to": "none", "logging_steps": 1, "sample_images": 3, "num_eval_samples": 5, "eval_steps": 2,
    "save_steps": 2, "teacher_steps": 2, "mixed_precision": "no",
}  # fmt: skip


def run(folder: Path, name: str, **settings: Any) -> Path:
    given = {"model": str(folder / "sd3"), "prompts": str(folder / "prompts.txt"), "reward": f"{folder}/mine.py:red"}
    return train(**given | RUN | settings, output_dir=str(folder / name))


def work(rank: int, processes: int, port: int, folder: str, resumed: bool) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update({"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"})
    settings = {"shard": "node", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // processes}
    if resumed:
        step = Path(folder) / f"run-{processes}" / "checkpoints" / "step-000002"
        run(Path(folder), f"resumed-{processes}", **settings, resume_from_checkpoint=str(step))
        return
    mesh, own = mesh_of(2, Accelerator(cpu=True)), slice(rank % 2, rank % 2 + 1)
    found = {name: answers(Path(folder) / "sd3", own, mesh, **options) for name, options in CASES.items()}
    torch.save(found, Path(folder) / f"{processes}-{rank}.pt")
    run(Path(folder), f"run-{processes}", **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    sd3.build(folder / "sd3")
    (folder / "mine.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("seven\ntwo\nfour\n")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmdr.run.run.write_report", lambda folder: None)
        return run(folder, "alone", per_device_train_batch_size=4, gradient_accumulation_steps=2)


# Four processes are two copies of two shares.
@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.verify)])
def shared(folder: Path, request: pytest.FixtureRequest) -> int:
    """So many processes have done the same, two of them sharing a network."""
    for resumed in (False, True):  # a run ends the group of its processes
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(work, (request.param, port, str(folder), resumed), nprocs=request.param)
    return int(request.param)


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_a_network_answer_as_one_that_has_it_whole(folder: Path, shared: int, case: str) -> None:
    for rank in (0, 1):
        whole = answers(folder / "sd3", slice(rank, rank + 1), **CASES[case])
        found = torch.load(folder / f"{shared}-{rank}.pt")[case]
        assert found["local"] <= 0.51 * found["all"] and found["all"] > 10_000
        assert whole.keys() == found.keys()
        for name in found.keys() - {"local", "all"}:
            torch.testing.assert_close(found[name], whole[name], rtol=1e-6, atol=1e-7)


def test_a_run_whose_processes_share_a_network_trains_as_one_process(folder: Path, alone: Path, shared: int) -> None:
    other = folder / f"run-{shared}"
    for step in (1, 2, 3):
        one, two = (f / "checkpoints" / f"step-{step:06d}" / "student.safetensors" for f in (alone, other))
        weights = load_file(one)
        for name, tensor in load_file(two).items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=2e-5)  # AdamW divides by small moments
    columns, others = (json.loads((f / "evaluation.json").read_text())["columns"] for f in (alone, other))
    assert columns.keys() == others.keys() == {"stage 1", "stage 2", "teacher, 2 steps", "teacher, 4 steps"}
    for name, column in columns.items():
        assert others[name] == pytest.approx(column, rel=1e-4)
    for name in ("teacher.png", "step-000000.png", "step-000003.png"):
        pictures = [np.asarray(Image.open(f / "samples" / name), dtype=int) for f in (alone, other)]
        assert abs(pictures[0] - pictures[1]).max() <= 1


def test_it_goes_on_from_a_checkpoint_to_the_same_bits(folder: Path, shared: int) -> None:
    for name in ("student", "fake_score"):
        files = [folder / f"{run}-{shared}/checkpoints/step-000003/{name}.safetensors" for run in ("run", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_one_process_goes_on_with_what_several_have_trained(folder: Path, shared: int) -> None:
    """Up to rounding: the sums are another's."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    step = folder / f"run-{shared}" / "checkpoints" / "step-000002"
    alone = run(folder, f"alone-after-{shared}", **settings, resume_from_checkpoint=str(step))
    last = load_file(alone / "checkpoints" / "step-000003" / "student.safetensors")
    for name, tensor in load_file(step.with_name("step-000003") / "student.safetensors").items():
        torch.testing.assert_close(last[name], tensor, rtol=0, atol=2e-5)


# --- What cannot be shared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "toy", "shard": "all"}, "cannot share a model of ToyBackend"),
        ({"shard": "all", "full_finetune": True}, "--shard: --full_finetune does not work with it yet"),
        ({"shard": "3"}, "2 processes cannot be split into groups of 3"),
    ],
)
def test_what_cannot_be_shared_is_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    given = {"model": str(folder / "sd3"), "prompts": str(folder / "prompts.txt")} | settings
    with pytest.raises(ConfigError, match=message):
        assemble(parse(settings=given), processes=2)


@pytest.mark.parametrize("value", ["0", "-1", "some", "1.5", ""])
def test_a_shard_is_a_number_or_a_word(value: str) -> None:
    with pytest.raises(ConfigError, match="--shard must be a number of at least 1, 'node' or 'all'"):
        parse(settings={"model": "toy", "shard": value})


def test_another_engine_of_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"accelerate launch with FSDP: .* launch without it, with --shard all"):
        train(model="toy")


def test_weights_that_do_not_fit_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    file = next((folder / "sd3" / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    name = "proj_out.weight"
    network = sd3.transformer()
    for wrong, message in (
        ({**weights, name: torch.zeros(3)}, r"1 of another shape \(proj_out.weight \(3,\) for"),
        ({**weights, "odd": torch.zeros(3)}, r"1 unexpected \(odd\)"),
        ({other: tensor for other, tensor in weights.items() if other != name}, r"1 missing \(proj_out.weight\)"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ConfigError, match=message):
            fill(network, dict.fromkeys(wrong, tmp_path / "wrong.safetensors"), "the model")
    (tmp_path / "wrong.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"wrong\.safetensors cannot be read as safetensors"):
        fill(network, dict.fromkeys(weights, tmp_path / "wrong.safetensors"), "the model")


@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl", "z-image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_without_weights_is_otherwise_the_loaded_one(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    FAMILIES[name].build(tmp_path)
    family = registry.load("backends", pipeline_class(str(tmp_path)))
    place = (family.network_class, Source(str(tmp_path)), family.network_name, dtype)
    loaded, opened = load_network(*place), open_network(*place)
    own, other = ({key: (p.shape, p.dtype) for key, p in network.named_parameters()} for network in (loaded, opened))
    assert own == other
    buffers = dict(opened.named_buffers())
    for key, buffer in loaded.named_buffers():
        assert buffer.dtype == buffers[key].dtype and torch.equal(buffer, buffers.pop(key))
    assert not buffers
    assert all(parameter.untyped_storage().nbytes() <= 4 for parameter in opened.parameters())  # no memory of their own


def test_files_of_an_index(folder: Path, tmp_path: Path) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(folder / "sd3", subfolder="transformer")
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size="50KB")
    files = weight_files(Source(str(tmp_path)), "transformer")
    assert files.keys() == transformer.state_dict().keys() and len(set(files.values())) > 1
    network = sd3.transformer()
    fill(network, files, "the model")
    assert all(torch.equal(tensor, transformer.state_dict()[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ConfigError, match="transformer has no readable weights in safetensors files"):
        weight_files(Source(str(folder)), "transformer")
