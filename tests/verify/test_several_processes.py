"""Two processes of B images against one of 2B, for each objective, matching and weight, on a small real network.

Plain and with shares of the network (`--shard all`), LoRAs and full copies, with checkpointing and without.
"""

import math
from copy import deepcopy
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

import processes
import sd3
from dmdr.backends.toy import Redness
from dmdr.ema import EMA
from dmdr.randomness import Random
from dmdr.run.device import mesh_of
from dmdr.states import is_shared, whole
from dmdr.training.tilt import RewardTilt
from dmdr.types import Draw, Real
from dmdr_ac_dmd import ACDMD
from dmdr_decoupled import Decoupled
from dmdr_decoupled.advantage import CAAdvantage
from dmdr_dpo import DPO
from dmdr_gan import DMD2, LADD
from dmdr_gdmd import GDMD
from dmdr_gndm import GNDM
from dmdr_grpo import GRPO
from dmdr_nft import DiffusionNFT
from dmdr_refl import ReFL
from dmdr_refl.draft import DRaFT
from dmdr_rwr import RWR
from dmdr_sd3 import SD3Backend
from dmdr_srpo import SRPO
from dmdr_tdm import TDM
from dmdr_tdm_r1 import TDMR1
from toy_trainer import Plain, trainer

pytestmark = pytest.mark.verify

STEPS, BATCH = 2, 8
ROWS = [{"prompt": prompt} for prompt in ("seven", "two", "four")]
BROKEN = {"two": math.nan}  # so that one process has fewer scores than the other
WORDS: dict[str, Any] = {"positive": ["Red", ""], "negative": ["Green"]}


def noises(draw: Draw, random: Random) -> Real:
    """In the place of real images."""
    return Real(random.normal("real", draw.sample, tuple(draw.x0.shape[1:])), draw.cond)


CASES: dict[str, dict[str, Any]] = {
    "dmd": {"guidance": (2.0, 4.0), "fake_updates": 2},
    "decoupled": {"matching": Decoupled(), "guidance": (2.0, 4.0)},
    "ac_dmd": {"matching": ACDMD(), "eta": 0.9},
    "tdm": {"matching": TDM(), "eta": 0.0},
    "gndm": {"matching": GNDM(), "group_size": 2, "guidance": (2.0, 4.0)},
    "dmd2": {"matching": DMD2(gan_r1_weight=1.0), "real_images": noises, "guidance": (2.0, 4.0)},
    "ladd": {"matching": LADD(), "real_images": noises},
    "gdmd": {"rewards": Plain(BROKEN), "sample_weight": GDMD()},
    "rt_dm": {"rewards": Plain(BROKEN), "sample_weight": RewardTilt(1.5)},
    "refl": {"rewards": Plain(BROKEN), "objectives": [ReFL()]},
    "refl_balanced": {"rewards": Plain(), "objectives": [ReFL()], "balances": True},
    "draft": {"rewards": Plain(BROKEN), "objectives": [DRaFT()]},
    "ca_advantage": {
        "rewards": Plain(BROKEN),
        "objectives": [CAAdvantage()],
        "group_size": 2,
        "guidance": (2.0, 4.0),
    },
    "grpo": {"rewards": Plain(BROKEN), "objectives": [GRPO()], "group_size": 2},
    "dpo": {"rewards": Plain(BROKEN), "objectives": [DPO(beta=1.0)], "group_size": 4},
    "srpo": {"rewards": Redness(), "objectives": [SRPO(**WORDS)]},
    "nft": {"rewards": Plain(BROKEN), "objectives": [DiffusionNFT(kl_beta=0.1)], "group_size": 4},
    "rwr": {"rewards": Plain(BROKEN), "objectives": [RWR(0.5)], "group_size": 2},
    "tdm_r1": {"rewards": Plain(BROKEN), "objectives": [TDMR1()], "group_size": 4},
    "grpo + refl": {
        "rewards": Plain(),
        "objectives": [GRPO(num_iterations=2, beta=0.1), (0.1, ReFL(steps="last"))],
        "group_size": 4,
    },
}
KINDS = {
    f"{'full' if full else 'LoRA'}, {'checkpointed' if saving else 'not'}": {
        "full_finetune": full,
        "fake_score": "full" if full else "lora",
        "gradient_checkpointing": saving,
    }
    for full, saving in product((False, True), (False, True))
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(tmp_path / "sd3")
    return tmp_path


def slowly(parameters: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2)


def train(folder: Path, case: str, kind: str, shards: int, accumulated: int = 1) -> dict[str, Any]:
    """What two updates make of all parameters, and their log lines."""
    accelerator = Accelerator(cpu=True)
    options = SD3Backend.Options(
        lora_rank=4, fake_lora_rank=4, seed=3, prompt_cache="off", resolution=16, **KINDS[kind]
    )
    backend = SD3Backend(str(folder), options)
    mesh = mesh_of(shards, accelerator) if shards > 1 else None
    backend.prepare(accelerator, roles=("student", "fake_score", "reference"), sharding=mesh)
    # A LoRA at its start adds nothing. A large one makes attention a hard maximum, whose gradient tells apart weights
    # that differ by rounding.
    for role in ("student", "fake_score"):
        generator = torch.Generator().manual_seed(5)
        for name, parameter in backend.parameters(role).items():
            if "lora_B" in name:
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    batch = BATCH // accelerator.num_processes
    running = trainer(
        backend,
        batch=batch,
        micro_batch=batch // accumulated,
        rows=ROWS,
        optimize=slowly,
        max_grad_norm=1.0,
        shards=shards,
        **{"eta": 0.9, **deepcopy(CASES[case])},
    )
    running.student.ema = EMA(running.student.parameters, 0.5)
    for learner in (running.student, *running.fake_learners):
        role = learner.name in ("student", "fake_score")
        assert any(map(is_shared, learner.parameters.values())) == (shards > 1 and "full" in kind and role)
    lines = [running.train_step(noted=True) for _ in range(STEPS)]
    learners = (running.student, *running.fake_learners, *chain(*running.objectives.own.values()))
    roles = {learner.name: learner.parameters for learner in learners}
    roles["ema"] = running.student.ema.average
    found = {
        f"{role}.{name}": whole(tensor.detach()).clone()
        for role, tensors in roles.items()
        for name, tensor in tensors.items()
    }
    return {"parameters": found, "lines": lines}


def work(rank: int, folder: str, cases: list[tuple[str, str, int]]) -> None:
    found = {case: train(Path(folder) / "sd3", *case) for case in cases}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    PartialState().destroy_process_group()


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between the parameters of a role, relative to their norm."""
    assert one.keys() == other.keys()
    roles = {name.partition(".")[0] for name in one}
    both = [
        [
            torch.cat([tensors[name].flatten() for name in one if name.startswith(f"{role}.")])
            for tensors in (one, other)
        ]
        for role in roles
    ]
    return max(float((first - second).norm() / first.norm()) for first, second in both)


@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, [(case, kind, shards) for case in CASES for kind in KINDS for shards in (1, 2)]),
        (4, [(case, kind, 2) for case in ("dmd", "grpo + refl") for kind in KINDS]),
    ],
)
def test_several_processes_train_as_one(folder: Path, count: int, cases: list[tuple[str, str, int]]) -> None:
    processes.start(work, count, str(folder), cases)
    found = torch.load(folder / "found.pt", weights_only=False)
    alone = {(case, kind): train(folder / "sd3", case, kind, 1) for case, kind, _ in cases}
    wrong = []
    for case, kind, shards in cases:
        one, other = alone[case, kind], found[case, kind, shards]
        far = apart(one["parameters"], other["parameters"])
        print(f"{count} processes, {case}, {kind}, shares of {shards}: {far:.1e}")
        if far > 1e-6:
            wrong.append((case, kind, shards, far))
        for line, same in zip(one["lines"], other["lines"], strict=True):
            # At first a full fake score is the teacher: a ratio to their difference divides by 0, or by its rounding.
            same = {name: math.inf if math.isinf(line[name]) and value > 1e5 else value for name, value in same.items()}
            assert same == pytest.approx(line, rel=1e-4, abs=1e-5, nan_ok=True)
    assert not wrong


@pytest.mark.parametrize("case", CASES)
def test_accumulation_trains_as_one_batch(folder: Path, case: str) -> None:
    at_once, in_two = (train(folder / "sd3", case, "LoRA, not", 1, accumulated) for accumulated in (1, 2))
    assert apart(at_once["parameters"], in_two["parameters"]) <= 1e-6
