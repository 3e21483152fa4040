"""`dmdr-sample`: in batches, resumed, from a student, its teacher or a stock pipeline."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import dmdr.run.run
import flux
import sd3
from dmdr import train
from dmdr.cli import sample
from dmdr.errors import ConfigError
from dmdr.run import drawing
from dmdr.run.drawing import Artist, open_export, open_pipeline
from dmdr.run.export import read_export

ROWS = [{"prompt": f"mode {index % 4}"} for index in range(7)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmdr.run.run, "write_report", lambda folder: None)
        settings: dict[str, Any] = {"model": "toy", "rl": "none", "reward": "none", "guidance_scale": 1.5}
        settings |= {"stage1_steps": 3, "stage2_steps": 0, "fake_updates": 1, "sample_images": 2, "teacher_steps": 2}
        settings |= {"report_to": "none"}
        return train(**settings, output_dir=str(tmp_path_factory.mktemp("runs") / "toy"))


@pytest.fixture
def artist(run: Path) -> Artist:
    return open_export(run / "student", read_export(run / "student"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each batch that is drawn."""
    found: list[int] = []
    batch = Artist._batch

    def counted(self: Artist, rows: Any, noise: Any) -> Any:
        found.append(len(rows))
        return batch(self, rows, noise)

    monkeypatch.setattr(Artist, "_batch", counted)
    return found


def contents(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def test_batches_are_calls_one_after_the_other(artist: Artist, tmp_path: Path) -> None:
    paths = artist.draw(ROWS, 3, tmp_path / "all", batch_size=3)
    torch.manual_seed(3)
    for start in (0, 3, 6):
        rows = ROWS[start : start + 3]
        noise = [torch.randn(len(rows), 2) for _ in range(artist.sampler.num_inference_steps)]
        with torch.no_grad():
            cond = artist.family.encode([row["prompt"] for row in rows])
            expected = artist.family.decode(artist.sampler.rollout(artist.denoiser, noise, cond).final, exact=True)
        for path, picture in zip(paths[start:], expected, strict=False):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(np.asarray(Image.open(path)), pixels)
    lines = [json.loads(line) for line in (tmp_path / "all" / "metadata.jsonl").read_text().splitlines()]
    assert lines == [{"file_name": path.name} | row for path, row in zip(paths, ROWS, strict=True)]


def test_an_image_tells_what_it_was_drawn_from(artist: Artist, tmp_path: Path) -> None:
    with Image.open(artist.draw(ROWS, 3, tmp_path, batch_size=3)[4]) as image:
        text = image.text  # type: ignore[attr-defined]
    assert text["prompt"] == "mode 0"
    told = json.loads(text["dmdr"])
    place = {name: told[name] for name in ("seed", "batch", "row", "batch_size", "prompt_row")}
    assert place == {"seed": 3, "batch": 1, "row": 1, "batch_size": 3, "prompt_row": {"prompt": "mode 0"}}
    assert told["grid"] == artist.sampler.t.tolist() and "student.safetensors" in told["files"]


def test_what_is_there_is_kept(artist: Artist, tmp_path: Path, passes: list[int]) -> None:
    paths = artist.draw(ROWS, 3, tmp_path, batch_size=3)
    first = contents(paths)
    paths[4].unlink()
    (tmp_path / "metadata.jsonl").unlink()
    paths[0].write_bytes(first[0][:40])  # as a killed process of another program leaves it
    passes.clear()
    assert contents(artist.draw(ROWS, 3, tmp_path, batch_size=3)) == first and passes == [3, 3]
    passes.clear()
    assert contents(artist.draw(ROWS, 3, tmp_path, batch_size=3)) == first and passes == []
    assert contents(artist.draw(ROWS, 4, tmp_path, batch_size=3)) != first and passes == [3, 3, 1]
    passes.clear()
    other = [{"prompt": "mode 3"}, *ROWS[1:]]
    artist.draw(other, 4, tmp_path, batch_size=3)
    assert passes == [3]


def test_a_command_that_is_stopped_goes_on(artist: Artist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(artist.draw(ROWS, 3, tmp_path / "whole", batch_size=3))
    batch, called = Artist._batch, []

    def stopped(self: Artist, rows: Any, noise: Any) -> Any:
        called.append(len(rows))
        if len(called) == 2:
            raise KeyboardInterrupt
        return batch(self, rows, noise)

    monkeypatch.setattr(Artist, "_batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        artist.draw(ROWS, 3, tmp_path / "part", batch_size=3)
    assert len(list((tmp_path / "part").iterdir())) == 3
    assert contents(artist.draw(ROWS, 3, tmp_path / "part", batch_size=3)) == whole
    assert called == [3, 3, 3, 1]


def test_other_steps_and_the_teacher(run: Path, tmp_path: Path) -> None:
    student = run / "student"
    about = read_export(student)
    one = open_export(student, about, num_inference_steps=1)
    assert one.sampler.t.tolist() == one.family.grid(1).tolist()
    teacher = open_export(student, about, teacher=True, guidance_scale=2.0, num_inference_steps=5)
    assert teacher.sampler.num_inference_steps == 5 and teacher.sampler.eta == 0
    x_t, t = torch.randn(2, 2), torch.full((2,), 0.5, dtype=torch.float64)
    cond = teacher.family.encode(["mode 1", "mode 2"])
    guided = teacher.family.teacher(x_t, t, cond, guidance=2.0).value
    assert torch.equal(teacher.denoiser(x_t, t, cond).value, guided)


def test_a_pipeline_is_drawn_from_as_stock_diffusers_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sd3.build(tmp_path / "model")
    prompts = ["a handwritten seven", "a handwritten two"]
    asked: dict[str, Any] = {"max_sequence_length": 5, "resolution": "24x16"}
    artist = open_pipeline(str(tmp_path / "model"), num_inference_steps=4, guidance_scale=3.0, options=asked)
    paths = artist.draw([{"prompt": prompt} for prompt in prompts], 5, tmp_path / "ours")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    call: dict[str, Any] = {"sigmas": [1.0, 0.75, 0.5, 0.25], "guidance_scale": 3.0, "height": 16, "width": 24}
    for path, theirs in zip(paths, pipe(prompts, max_sequence_length=5, **call).images, strict=True):
        ours = np.asarray(Image.open(path)).astype(int)
        assert ours.shape == (16, 24, 3) and np.abs(ours - np.asarray(theirs)).max() <= 2


def test_guidance_reaches_a_network_that_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flux.dev(tmp_path / "model")
    asked: dict[str, Any] = {"max_sequence_length": 8, "resolution": "16"}
    told = {"num_inference_steps": 2, "options": asked}
    plain, guided = (open_pipeline(str(tmp_path / "model"), guidance_scale=w, **told) for w in (1.0, 3.5))
    paths = guided.draw([{"prompt": "a handwritten seven"}], 5, tmp_path / "ours")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    call = {"num_inference_steps": 2, "guidance_scale": 3.5, "height": 16, "width": 16, "max_sequence_length": 8}
    theirs = np.asarray(pipe(["a handwritten seven"], **call).images[0]).astype(int)
    assert np.abs(np.asarray(Image.open(paths[0])).astype(int) - theirs).max() <= 2
    other = plain.draw([{"prompt": "a handwritten seven"}], 5, tmp_path / "other")
    assert paths[0].read_bytes() != other[0].read_bytes()
    assert not np.array_equal(np.asarray(Image.open(other[0])), np.asarray(Image.open(paths[0])))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch_size", "0"], "--batch_size must be between 1 and 1000, not 0"),
        (["--num_inference_steps", "0"], "--num_inference_steps must be between 1 and 1000, not 0"),
        (["--guidance_scale", "2"], "--guidance_scale is read with --teacher alone"),
        (["--teacher", "--guidance_scale", "-1"], "--guidance_scale must be between 0 and 1000, not -1.0"),
        (["--lora", "x"], "--lora is read for a pipeline alone"),
    ],
)
def test_bad_flags(run: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sample.run([str(run), "--prompt", "mode 1", "--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_the_runs_own_guidance_is_the_teachers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[float] = []
    teacher = drawing._teacher

    def watched(family: Any, accelerator: Any, steps: Any, guidance: float, told: Any) -> Any:
        seen.append(guidance)
        return teacher(family, accelerator, steps, guidance, told)

    monkeypatch.setattr(drawing, "_teacher", watched)
    flags = ["--teacher", "--prompt", "mode 1", "--num_inference_steps", "2", "--output_dir", str(tmp_path)]
    sample.run([str(run), *flags])
    assert seen == [1.5] and capsys.readouterr().out.strip() == str(tmp_path / "0000.png")
    (tmp_path / "alone").mkdir()
    (run / "student").rename(tmp_path / "alone" / "student")
    try:
        with pytest.raises(ConfigError, match=r"--guidance_scale is missing: .* lies in no run folder that says it"):
            sample.run([str(tmp_path / "alone"), *flags])
    finally:
        (tmp_path / "alone" / "student").rename(run / "student")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--guidance_scale is missing: .* is a pipeline"),
        (["--guidance_scale", "2", "--teacher"], "--teacher is not read for a pipeline"),
        (["--guidance_scale", "2", "--model", "x"], "--model is not read for a pipeline"),
    ],
)
def test_bad_flags_for_a_pipeline(run: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    base = read_export(run / "student")["base_model"]
    with pytest.raises(ConfigError, match=said):
        sample.run([base, "--prompt", "mode 1", "--output_dir", str(tmp_path / "out"), *flags])
