"""A batch on one process against the same batch on two: every number is keyed by sample, every statistic is global."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor

import processes
from dmdr.backends.toy import Redness
from dmdr.dry_run.memory import Meter
from dmdr.ema import EMA
from dmdr.protocols import Needs
from dmdr.testing.toy import real_points
from dmdr.training.learner import average
from dmdr.training.tilt import RewardTilt
from dmdr_ac_dmd import ACDMD
from dmdr_decoupled import Decoupled
from dmdr_decoupled.advantage import CAAdvantage
from dmdr_dpo import DPO
from dmdr_gan import DMD2, LADD
from dmdr_gdmd import GDMD
from dmdr_gndm import GNDM
from dmdr_grpo import GRPO
from dmdr_lcm import LCM
from dmdr_nft import DiffusionNFT
from dmdr_refl import ReFL
from dmdr_refl.draft import DRaFT
from dmdr_rwr import RWR
from dmdr_srpo import SRPO
from dmdr_tdm import TDM
from dmdr_tdm_r1 import TDMR1
from toy_trainer import Critic, Plain, Policy, prepared, state, trainer

BATCH, STEPS = 8, 2
WORDS: dict[str, Any] = {"positive": ["Red", ""], "negative": ["Green"]}
BROKEN = {"mode 1": math.nan}
CASES: dict[str, dict[str, Any]] = {
    "dmd": {"guidance": (2.0, 4.0), "fake_updates": 2},
    "groups": {"group_size": 2, "eta": 0.5},
    "tilt": {"rewards": Plain(), "sample_weight": RewardTilt(1.5)},
    "tilt_invalid": {"rewards": Plain(BROKEN), "sample_weight": RewardTilt(1.5)},
    "tilt_groups": {
        "rewards": Plain(),
        "sample_weight": RewardTilt(1.5, tilt_baseline="prompt_group"),
        "group_size": 2,
    },
    "tilt_ema": {"rewards": Plain(BROKEN), "sample_weight": RewardTilt(1.5, tilt_baseline="ema")},
    "refl": {"rewards": Plain(), "objectives": [ReFL()], "rl_weight": 2.0},
    "refl_invalid": {"rewards": Plain(BROKEN), "objectives": [ReFL()], "rl_weight": 2.0},
    "refl_last": {"rewards": Plain(BROKEN), "objectives": [ReFL(steps="last")], "rl_weight": 2.0, "dmd_weight": 0.0},
    "grpo": {
        "rewards": Plain(BROKEN),
        "objectives": [GRPO(policy_steps="random:2")],
        "group_size": 2,
        "rl_weight": 3.0,
    },
    "grpo_again": {
        "rewards": Plain(),
        "objectives": [GRPO(num_iterations=2, beta=0.1, scale_rewards="group"), (0.1, ReFL(steps="last"))],
        "group_size": 4,
    },
    "dpo": {"rewards": Plain(BROKEN), "objectives": [DPO(beta=1.0)], "group_size": 4},
    "dpo_diffusion": {
        "rewards": Plain(),
        "objectives": [DPO(beta=1.0, form="diffusion")],
        "group_size": 4,
        "rl_weight": 3.0,
    },
    "dpo_each": {"rewards": Plain(BROKEN), "objectives": [DPO(beta=1.0, each_transition=True)], "group_size": 4},
    "refl_kl": {"rewards": Plain(BROKEN), "objectives": [ReFL(kl_beta=0.5)], "rl_weight": 2.0},
    "draft": {"rewards": Plain(BROKEN), "objectives": [DRaFT()], "rl_weight": 2.0},
    "ca_advantage": {
        "rewards": Plain(BROKEN),
        "objectives": [CAAdvantage()],
        "group_size": 2,
        "guidance": (2.0, 4.0),
        "rl_weight": 0.5,
    },
    "srpo": {"rewards": Redness(), "objectives": [SRPO(**WORDS)], "rl_weight": 2.0},
    "srpo_aligned": {"rewards": Redness(), "objectives": [SRPO(direct_align=True, **WORDS)], "rl_weight": 4.0},
    "nft": {
        "rewards": Plain(BROKEN),
        "objectives": [DiffusionNFT(kl_beta=0.1, old_decay_ramp=0.4)],
        "group_size": 4,
        "rl_weight": 3.0,
    },
    "rwr": {"rewards": Plain(BROKEN), "objectives": [RWR(0.5)], "group_size": 2, "rl_weight": 3.0},
    "lcm": {"objectives": [LCM(8)], "real_images": real_points, "rl_weight": 3.0},
    "tdm_r1": {"rewards": Plain(BROKEN), "objectives": [TDMR1()], "group_size": 4, "rl_weight": 3.0},
    "rwr_singles": {"rewards": Plain(BROKEN), "objectives": [RWR()], "rl_weight": 3.0},
    "decoupled": {"matching": Decoupled(), "guidance": (2.0, 4.0)},
    "ac_dmd": {"matching": ACDMD(), "eta": 0.9},
    "tdm": {"matching": TDM(), "eta": 0.0, "guidance": (2.0, 4.0), "guidance_interval": (0.2, 0.7)},
    "gndm": {"matching": GNDM(), "group_size": 4},
    "gdmd": {"rewards": Plain(BROKEN), "sample_weight": GDMD()},
    "dmd2": {"matching": DMD2(gan_cls_weight=1.0, gan_weight=1.0), "real_images": real_points},
    "ladd": {"matching": LADD(), "real_images": real_points},
    "policy": {"rewards": Plain(), "objectives": [Policy(Needs(steps="stochastic"))], "rl_weight": 0.1},
    "critic": {"rewards": Plain(BROKEN), "objectives": [Critic()], "rl_weight": 2.0},
    "refl_balanced": {"rewards": Plain(), "objectives": [ReFL()], "rl_weight": 2.0, "balances": True},
}


def slowly(parameters: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def train(case: str, processes: int) -> dict[str, Any]:
    settings = deepcopy(CASES[case])  # some parts keep a state
    running = trainer(
        prepared(roles=("student", "fake_score", "reference")), batch=BATCH // processes, optimize=slowly, **settings
    )
    average = running.student.ema = EMA(running.student.parameters, 0.5)
    lines = [running.train_step(noted=step == STEPS - 1) for step in range(STEPS)]
    rewards = running.reward_metrics()
    assert running.last_context is not None
    assert running.last_context.rollout is not None
    own = {
        name: {key: p.detach().clone() for key, p in learner.parameters.items()}
        for name, learner in running.learners.items()
        if learner.owner
    }
    return {
        "parameters": {role: state(running, role) for role in ("student", "fake_score")} | {"ema": average.average},
        "own": own,
        "lines": lines,
        "rewards": rewards,
        "states": running.last_context.rollout.x_t,
        "sample": running.last_context.rollout.sample,
        "group": running.last_context.rollout.group,
    }


def work(rank: int, folder: str) -> None:
    """One of two processes; every case in turn, as starting them is what takes the time."""
    found = {case: train(case, 2) for case in CASES}
    torch.save(found, Path(folder) / f"{rank}.pt")
    PartialState().destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, by rank."""
    folder = tmp_path_factory.mktemp("distributed")
    processes.start(work, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def flat(found: dict[str, Any], role: str) -> Tensor:
    return torch.cat([value.flatten() for value in found["parameters"][role].values()])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(both: list[dict[str, Any]], case: str) -> None:
    alone, (first, second) = train(case, 1), (found[case] for found in both)
    start = {role: state(trainer(), role) for role in ("student", "fake_score")}
    start = {"parameters": start | {"ema": start["student"]}}
    for role in ("student", "fake_score", "ema"):
        assert torch.equal(flat(first, role), flat(second, role))
        torch.testing.assert_close(flat(first, role), flat(alone, role), rtol=0, atol=1e-6)
        moved = (flat(alone, role) - flat(start, role)).abs().max()
        idle = case == "ladd" or CASES[case].get("dmd_weight") == 0.0
        assert moved > 1e-3 or (role == "fake_score" and idle)
    for name, parameters in alone["own"].items():
        for key, value in parameters.items():
            assert torch.equal(first["own"][name][key], second["own"][name][key])
            torch.testing.assert_close(first["own"][name][key], value, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([first["sample"], second["sample"]]), alone["sample"])
    assert torch.equal(torch.cat([first["group"], second["group"]]), alone["group"])
    torch.testing.assert_close(torch.cat([first["states"], second["states"]], 1), alone["states"], rtol=0, atol=1e-5)


def test_gradients_are_averaged_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one bucket beside them; the other process has three times ours."""
    sent: list[int] = []

    def reduce(flat: Tensor) -> None:
        sent.append(flat.numel())
        flat *= 4

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    grads = [torch.full((n, 10), float(n)) for n in (3, 40, 2, 2, 5, 2)]
    places = [grad.data_ptr() for grad in grads]
    with Meter() as meter:
        meter.label("gradients", grads)
        average(grads, bucket=100 * 4)
        assert meter.peak["activations"] <= 100 * 4
    assert sent == [30, 400, 90, 20] and [grad.data_ptr() for grad in grads] == places
    assert all(torch.equal(grad, torch.full_like(grad, 2.0 * len(grad))) for grad in grads)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_as_one(both: list[dict[str, Any]], case: str) -> None:
    alone, (first, second) = train(case, 1), (found[case] for found in both)
    assert str(first["lines"]) == str(second["lines"])  # as text, NaN is itself
    assert first["rewards"] == second["rewards"]
    assert first["rewards"] == pytest.approx(alone["rewards"], rel=1e-5)
    for one, two in zip(alone["lines"], first["lines"], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
