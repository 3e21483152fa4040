"""`dmdr-train init`: its file is read by dmdr-train, says what the run needs, and is never written over another."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import flux2
import sd3
from dmdr.cli import train
from dmdr.settings.parse import parse


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        sd3.build(folder / "sd3")
        flux2.build(folder / "klein")
    return folder


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/dmdr-train", "init", *arguments])
        with pytest.raises(SystemExit) as end:
            train.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return call


def test_a_file_to_begin_with(models: Path, init: Callable[..., Any], tmp_path: Path) -> None:
    asked = ["--model", str(models / "klein"), "--rl", "grpo", "--reward", "toy", "--grpo_beta", "0.02"]
    asked += ["--num_generations", "2"]
    code, out, err = init(*asked, "--max_sequence_length", "48", "--resolution", "16")
    assert code == 0, err
    assert out.endswith("written: run.yaml; go on with\n  dmdr-train --config run.yaml --prompts prompts.txt "
                        "--output_dir runs/first\n") and "GiB of a GPU" in out  # fmt: skip
    text = (tmp_path / "run.yaml").read_text()
    values = yaml.safe_load(text)
    assert values["guidance_scale"] == 4.0  # the default of klein's pipeline
    assert (values["mixed_precision"], values["grpo_beta"], values["prompts"]) == ("bf16", 0.02, None)
    assert "lora_alpha" not in values and "# scale of the teacher's classifier-free guidance; 1 is no guidance" in text
    (tmp_path / "prompts.txt").write_text("seven")
    found = parse(["--config", "run.yaml", "--prompts", "prompts.txt"])
    wanted = parse(
        [*asked, "--max_sequence_length=48", "--resolution=16", "--guidance_scale=4", "--mixed_precision=bf16"]
    )
    assert found.values() == wanted.values() | {"prompts": "prompts.txt"}
    code, _, err = init(*asked)
    assert (code, err.count("\n")) == (2, 1) and "--output run.yaml: there is such a file" in err


def test_a_distilled_model_is_not_guided(init: Callable[..., Any], tmp_path: Path) -> None:
    flux2.build(tmp_path / "klein", is_distilled=True)
    code, _, err = init("--model", "klein", "--max_sequence_length", "48", "--resolution", "16")
    assert code == 0, err
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["guidance_scale"] == 1.0


def test_what_makes_the_run_fit_is_in_the_file(models: Path, init: Callable[..., Any], tmp_path: Path) -> None:
    asked = ["--model", str(models / "sd3"), "--max_sequence_length", "5", "--guidance_scale", "3", "--stage2_steps=0"]
    asked += ["--decode_chunk_size=1", "--optim=adafactor", "--vae_tiling=true", "--quantize=int8"]  # leaves two to try
    code, out, err = init(*asked, "--gpu_memory", "1e-4", "--output=mine.yaml")
    assert code == 0, err
    values = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert values["gradient_checkpointing"] and values["guidance_scale"] == 3.0
    assert "does not fit in 0.0001 GiB" in out and "--gradient_checkpointing true" in out


def test_what_it_refuses(models: Path, init: Callable[..., Any], tmp_path: Path) -> None:
    for arguments, said in (
        (["--model", "digits"], "--dry_run does not build --model digits"),
        (["--model", str(models / "sd3"), "--output"], "--output needs the name of a file"),
        (["--model", str(models / "sd3"), "--output", "no/run.yaml"], "none can be written there"),
        (["--model", str(models / "sd3"), "--guidance", "3"], "unknown argument --guidance"),
    ):
        code, _, err = init(*arguments)
        assert (code, err.count("\n")) == (2, 1) and said in err
    assert init("--help")[0] == 0 and not list(tmp_path.iterdir())
