"""A network that two processes share, against the same network whole in one."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor

import sd3
from dmdr.backends.flow import FlowOptions
from dmdr.run.device import mesh_of
from dmdr_sd3 import SD3Backend

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


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    mesh = mesh_of(2, Accelerator(cpu=True))
    own = slice(rank, rank + 1)
    found = {name: answers(Path(folder) / "sd3", own, mesh, **options) for name, options in CASES.items()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    PartialState().destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    sd3.build(folder / "sd3")
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_a_network_answer_as_one_that_has_it_whole(
    folder: Path, both: list[dict[str, dict[str, Tensor]]], case: str
) -> None:
    for rank in (0, 1):
        alone, found = answers(folder / "sd3", slice(rank, rank + 1), **CASES[case]), both[rank][case]
        assert found["local"] <= 0.51 * found["all"] and found["all"] > 10_000
        assert alone.keys() == found.keys()
        for name in found.keys() - {"local", "all"}:
            torch.testing.assert_close(found[name], alone[name], rtol=1e-6, atol=1e-7)
