"""The reward servers of the examples: HPSv3 in small against its authors' package, behind its address."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.remote.client import RemoteReward
from dmdr.remote.server import application
from serving import serving

CPU = torch.device("cpu")
SERVE = Path(__file__).parents[2] / "examples" / "reward_servers" / "hpsv3" / "serve.py"
PARITY = Path(__file__).parent / "hpsv3"


def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"of_hpsv3_{file.stem}", file)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


checkpoint = module(PARITY / "checkpoint.py")
GOLDEN = json.loads((PARITY / "golden.json").read_text())["mu and sigma"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    found: tuple[Path, Path] = checkpoint.write(tmp_path_factory.mktemp("hpsv3"))
    return found


@pytest.fixture(scope="module")
def hpsv3(files: tuple[Path, Path]) -> Any:
    base, weights = files
    return module(SERVE).HPSv3(str(weights), str(base), CPU, torch.float32)


def picture(number: int) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    height, width = checkpoint.SIZES[number]
    return torch.from_numpy(checkpoint.image(height, width, number)).permute(2, 0, 1)[None].float() / 255


def golden(number: int) -> Tensor:
    """mu and sigma of the image with each prompt, [P, 2]."""
    height, width = checkpoint.SIZES[number]
    return torch.tensor(GOLDEN[f"{height}x{width}"])


@pytest.mark.parametrize("number", range(len(checkpoint.SIZES)))
def test_mu_and_sigma_are_those_of_the_authors_package(hpsv3: Any, number: int) -> None:
    prompts = checkpoint.PROMPTS
    found = hpsv3.distribution(picture(number).expand(len(prompts), -1, -1, -1), prompts)
    assert found.dtype == torch.float32
    assert torch.allclose(found, golden(number), rtol=0, atol=1e-5)
    alone = hpsv3(picture(number), prompts[1:2])
    assert alone.shape == (1,)
    assert alone.item() == pytest.approx(golden(number)[1, 0].item(), abs=1e-5)


def test_the_token_of_the_score_may_stand_in_a_prompt(hpsv3: Any) -> None:
    prompt = checkpoint.PROMPTS[0]
    assert hpsv3(picture(1), [f"{prompt}<|Reward|>"]).item() == pytest.approx(hpsv3(picture(1), [prompt]).item())


def test_a_checkpoint_of_another_kind_is_refused(hpsv3: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    base, weights = files
    tensors = load_file(weights)
    cases = {"rm_head.3.bias": "1 missing", "model.norm.weight": "1 missing", "visual.merger.ln_q.bias": "1 missing"}
    for name, said in cases.items():
        save_file({other: tensors[other] for other in tensors.keys() - {name}}, tmp_path / "HPSv3.safetensors")
        with pytest.raises(ConfigError, match=f"does not fit its architecture: {said} .*{name.split('.', 1)[1]}"):
            type(hpsv3)(str(tmp_path), str(base), CPU, torch.float32)
    save_file(tensors | {"more": torch.zeros(1)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ConfigError, match=r"1 unexpected \(more\)"):
        type(hpsv3)(str(tmp_path), str(base), CPU, torch.float32)


def test_a_run_gets_them_through_an_address(hpsv3: Any) -> None:
    with serving(application(hpsv3, name="hpsv3", max_batch_size=2)) as address:
        health = requests.get(f"{address}/health", timeout=20).json()
        assert (health["service"], health["name"], health["columns"]) == ("dmdr-reward", "hpsv3", [])
        reward = RemoteReward.at(address)()
        reward.prepare(CPU, torch.float32)
        order = [2, 0, 1]  # three images, of which the server scores two at a time
        prompts = [checkpoint.PROMPTS[i] for i in order]
        found = reward(picture(1).expand(3, -1, -1, -1), prompts)
    assert torch.allclose(found, golden(1)[order, 0], rtol=0, atol=1e-5)


def test_a_server_without_its_files_ends_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--base", str(tmp_path), "--checkpoint", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        module(SERVE).main()
    assert end.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err.splitlines()[-1]
