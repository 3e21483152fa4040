"""Each reward server of the examples in an environment of its own, made as its README says, and a run against it."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import torch

from dmdr.remote.client import RemoteReward
from dmdr.run.run import train
from dmdr_rewards.imagereward import ImageReward

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

pytestmark = pytest.mark.verify


@contextmanager
def serving(name: str, folder: Path, *options: str, first: tuple[str, ...] = (), **variables: str) -> Iterator[str]:
    """The address of a server of the examples, on the CPU.

    Args:
        name: Its folder.
        folder: Where its environment is made.
        options: Of its `serve.py`.
        first: Packages that are installed before its others.
        variables: Of its process.
    """
    place, own = ROOT / "examples" / "reward_servers" / name, folder / "venv"
    venv.create(own, with_pip=True)
    for what in (*((each,) for each in first), ("-r", str(place / "requirements.txt")), ("--no-deps", str(ROOT))):
        subprocess.run([str(own / "bin" / "pip"), "install", "--quiet", *what], check=True)
    command = [str(own / "bin" / "python"), str(place / "serve.py"), "--port", "0", *options]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | hidden | variables) as server:
        assert server.stdout is not None
        try:
            said = (line for line in iter(server.stdout.readline, "") if line.startswith("reward server at "))
            yield next(said).split()[-1]
        finally:
            server.kill()
            shutil.rmtree(own)  # of 6 GB


def trained_on(url: str, folder: Path) -> float:
    """The last mean reward of a short run."""
    given = {"model": "toy", "rl": "grpo", "num_generations": 2, "per_device_train_batch_size": 4}
    short = {"stage1_steps": 1, "stage2_steps": 1, "report_to": "none"}
    run = train(reward=f"{url} as judge", output_dir=str(folder / "run"), **given, **short)
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["reward/judge"])


def test_hpsv3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> None:
    parity = ROOT / "tests" / "examples" / "hpsv3"
    monkeypatch.syspath_prepend(parity)
    import checkpoint

    base, weights = checkpoint.write(tmp_path)
    options = ("--base", str(base), "--checkpoint", str(weights), "--dtype", "float32")
    with serving("hpsv3", tmp_path, *options) as url:
        assert requests.get(f"{url}/health", timeout=20).json()["name"] == "hpsv3"
        reward = RemoteReward.at(url)()
        reward.prepare(CPU, torch.float32)
        height, width = checkpoint.SIZES[1]
        image = torch.from_numpy(checkpoint.image(height, width, 1)).permute(2, 0, 1)[None].float() / 255
        scores = reward(image.expand(3, -1, -1, -1), checkpoint.PROMPTS)
        golden = json.loads((parity / "golden.json").read_text())["mu and sigma"][f"{height}x{width}"]
        assert torch.allclose(scores, torch.tensor(golden)[:, 0], rtol=0, atol=1e-5)
        print(f"\nhpsv3: a run has the mean reward {trained_on(url, tmp_path):.3f}")
    del sys.modules["checkpoint"]


def test_image_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_report: None) -> None:
    """Of the published size, 2 GB, which the package demands; it looks for BERT's vocabulary in the hub's cache."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "plugins" / "parity" / "image_reward")
    import checkpoint

    folder, cache = tmp_path / "checkpoint", tmp_path / "hub" / "models--bert-base-uncased"
    checkpoint.write(folder, checkpoint.FULL)
    words = cache / "snapshots" / ("0" * 40)
    words.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (words / name).write_bytes((folder / name).read_bytes())
    options = ("--checkpoint", str(folder / checkpoint.WEIGHTS), "--med-config", str(folder / "med_config.json"))
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    with serving("image_reward", tmp_path, *options, first=("setuptools==80.10.2",), **hub) as url:
        assert requests.get(f"{url}/health", timeout=20).json()["name"] == "image-reward"
        reward = RemoteReward.at(url)()
        reward.prepare(CPU, torch.float32)
        image = torch.from_numpy(checkpoint.images(checkpoint.FULL.image)["300x200"]).permute(2, 0, 1)[None].float()
        prompts = checkpoint.PROMPTS[:2]
        scores = reward(image.expand(2, -1, -1, -1) / 255, prompts)
        ours = ImageReward(str(folder), resize="exact")
        ours.prepare(CPU, torch.float32)
        assert torch.allclose(scores, ours(image.expand(2, -1, -1, -1) / 255, prompts), rtol=0, atol=1e-4)
        print(f"\nimage_reward: a run has the mean reward {trained_on(url, tmp_path):.3f}")
    del sys.modules["checkpoint"]
