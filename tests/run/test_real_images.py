"""Real images in training: which are drawn, how they become latents, and what a run says of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

import sd3
from dmdr.backends.toy import Toy
from dmdr.dry_run.estimate import estimate
from dmdr.errors import ConfigError
from dmdr.evaluation.captions import Captioned, captioned
from dmdr.images import read_image
from dmdr.run.real_images import RealLatents, captions, covering
from dmdr.run.run import train
from dmdr.settings.parse import parse
from dmdr.sizes import Size
from dmdr.training.context import StepContext, rollout_random
from dmdr.types import Draw
from dmdr_sd3 import SD3Backend
from toy_trainer import at_rest, trainer

pytestmark = pytest.mark.usefixtures("no_report")

FAST: dict[str, Any] = {
    "model": "toy", "reward": "none", "stage1_steps": 1, "stage2_steps": 2, "fake_updates": 1, "sample_steps": 0,
    "per_device_train_batch_size": 4, "sample_images": 1, "teacher_steps": 1, "report_to": "none",
}  # fmt: skip
MATCHING = """
from dataclasses import dataclass
from dmdr.matching import DMD
from dmdr.protocols import Needs

@dataclass(frozen=True)
class Pulled(DMD):
    pull: float = 0.1

    @property
    def needs(self):
        return Needs(reward=False, finished=False, real_images=self.pull > 0)

    def fake_loss(self, draw, fake, ctx):
        if self.pull:
            ctx.real(draw)
        return super().fake_loss(draw, fake, ctx)
"""


@pytest.fixture(scope="module")
def points() -> Captioned:
    return captioned(str(Toy().real_images()), None, {})


def drawn_by(toy: Any, k: int = 0) -> tuple[Draw, StepContext]:
    ctx = toy.context(k)
    return toy.rollouts.pick(toy.rollouts.whole(ctx), ctx), ctx


# --- Which images -----------------------------------------------------------------------------------------------------


def test_an_image_belongs_to_its_sample(points: Captioned) -> None:
    """However a draw is split; the same when asked again, others in another rollout, use and step."""
    toy = trainer(at_rest(), batch=16)
    toy.real_images = RealLatents(points, toy.backend, torch.device("cpu"))
    draw, ctx = drawn_by(toy)
    whole = ctx.real(draw)
    assert len(set(whole.cond.prompts)) > 1 and len(whole.x0.unique(dim=0)) > 10
    parts = [ctx.real(part) for part in draw.split(3)]
    assert torch.equal(torch.cat([part.x0 for part in parts]), whole.x0)
    assert [prompt for part in parts for prompt in part.cond.prompts] == list(whole.cond.prompts)
    assert torch.equal(torch.cat([part.cond.tensors["label"] for part in parts]), whole.cond.tensors["label"])
    other = toy.context(1).real(draw)
    ctx.iteration = 1
    again = ctx.real(draw)
    toy.step = 1
    later = toy.context(0).real(draw)
    for found in (other, again, later):
        assert not torch.equal(found.x0, whole.x0)


def test_latents_are_of_the_files_and_captions(points: Captioned) -> None:
    backend = at_rest()
    source = RealLatents(points, backend, torch.device("cpu"))
    draw, ctx = drawn_by(trainer(backend, batch=8))
    real = source(draw, ctx.random)
    rows = ctx.random.integers("real", draw.sample, len(points.rows)).tolist()
    files = [Path(Toy().real_images()) / points.pictures.name(row) for row in rows]
    pixels = torch.stack([read_image(file) for file in files]).float() / 255
    torch.testing.assert_close(real.x0, backend.encode_images(pixels))
    assert [f"mode {file.name[0]}" for file in files] == list(real.cond.prompts)


@pytest.mark.parametrize("uses", [1, 2])
def test_captions_are_those_that_will_be_drawn(uses: int) -> None:
    many = Captioned(None, [{"prompt": f"number {i}"} for i in range(1000)])  # type: ignore[arg-type]
    steps = {"seed": 3, "updates": 4, "rounds": 2, "uses": uses, "batch": 8}
    wanted = {
        f"number {row}"
        for step in range(4)
        for k in range(2)
        for use in range(uses)
        for row in rollout_random(3, step, k, use).integers("real", torch.arange(8), 1000).tolist()
    }
    assert set(captions(many, **steps)) == wanted and len(wanted) < 200
    assert len(captions(many, **steps | {"updates": 1000})) == 1000


# --- Latents ----------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_changes_nothing(points: Captioned, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = at_rest()
    encoded: list[int] = []
    encode = backend.encode_images
    monkeypatch.setattr(backend, "encode_images", lambda images: encoded.append(len(images)) or encode(images))
    all_kept, three = (RealLatents(points, backend, torch.device("cpu"), kept) for kept in (2**20, 3 * 8))
    rows = [5, 9, 5, 100, 7, 9]
    wanted = torch.stack(all_kept.latents(rows, (2,)))
    assert torch.equal(torch.stack(three.latents(rows, (2,))), wanted)
    assert encoded == [1] * 8, "each image once, and alone"
    all_kept.latents(rows, (2,))
    assert len(encoded) == 8
    assert torch.equal(torch.stack(three.latents([9, 5], (2,))), wanted[[1, 0]])
    assert len(encoded) == 9 and len(three._kept) == 3, "5 had gone, 9 had not"


def coloured(width: int, height: int) -> Tensor:
    """Columns from 0 to 1, [3, height, width]."""
    return torch.linspace(0, 1, width).expand(3, height, width).clone()


def test_an_image_covers_the_size() -> None:
    image = coloured(24, 16)
    assert covering(image, Size(24, 16)) is image
    middle = covering(image, Size(16, 16))
    assert torch.equal(middle, image[:, :, 4:20])
    half = covering(coloured(96, 32), Size(16, 16))  # shorter side 32 -> 16, then the middle third
    assert half.shape == (3, 16, 16)
    torch.testing.assert_close(half[0, 0].mean().item(), 0.5, rtol=0, atol=1e-3)
    assert 0.3 < half.min() < 0.37 and 0.63 < half.max() < 0.7
    assert covering(coloured(7, 5), Size(32, 16)).shape == (3, 16, 32)
    edge = torch.zeros(3, 64, 64)
    edge[:, :, 32:] = 1
    assert covering(edge, Size(16, 16)).min() >= 0 and covering(edge, Size(16, 16)).max() <= 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD3 pipeline, and photos of several shapes with captions."""
    folder = tmp_path_factory.mktemp("real")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(folder / "sd3")
    (folder / "photos").mkdir()
    generator = torch.Generator().manual_seed(1)
    for number, (width, height) in enumerate([(24, 16), (40, 30), (16, 16)]):
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{number}.png")
        (folder / "photos" / f"{number}.txt").write_text(f"photo {number}")
    (folder / "prompts.txt").write_text("a handwritten seven\n")
    return folder


def test_each_size_of_a_run_has_latents_of_its_own(place: Path) -> None:
    options: Any = SD3Backend.Options(lora_rank=4, fake_lora_rank=4, max_sequence_length=5, resolution="24x16,16")
    backend = SD3Backend(str(place / "sd3"), options)
    backend.prepare(Accelerator(cpu=True), roles=("student", "fake_score"))
    photos = captioned(str(place / "photos"), None, {})
    source = RealLatents(photos, backend, torch.device("cpu"))
    first = read_image(place / "photos" / "0.png").float()[None] / 255
    wide, square = (torch.stack(source.latents([0, 1, 2], shape)) for shape in backend.latent_shapes)
    assert wide.shape[1:] == backend.latent_shapes[0] and square.shape[1:] == backend.latent_shapes[1]
    assert torch.equal(wide[:1], backend.encode_images(first))
    assert torch.equal(square[:1], backend.encode_images(first[..., 4:20]))
    assert wide.dtype == torch.float32


def test_a_run_encodes_the_captions_before_it_begins(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "pulled.py").write_text(MATCHING)
    settings = FAST | {
        "model": str(place / "sd3"), "prompts": str(place / "prompts.txt"), "real_images": str(place / "photos"),
        "matching": f"{place}/pulled.py:Pulled", "resolution": "24x16,16", "stage2_steps": 0, "lora_rank": 4,
        "fake_lora_rank": 4, "max_sequence_length": 5, "prompt_cache": str(place / "cache"), "guidance_scale": 1.0,
    }  # fmt: skip
    told: list[str] = []
    cache = SD3Backend.cache_prompts
    monkeypatch.setattr(
        SD3Backend,
        "cache_prompts",
        lambda self, process, prompts: told.extend(prompts) or cache(self, process, prompts),
    )
    run = train(**settings, output_dir=str(place / "run"))
    assert {"photo 0", "photo 1", "photo 2", "a handwritten seven"} == set(told)
    assert json.loads((run / "overview.json").read_text())["real images"] == f"3 of {place}/photos"
    found = estimate(parse(settings=settings | {"dry_run": True, "output_dir": str(place / "dry")}))
    assert found.overview["real images"] == f"3 of {place}/photos"
    settings["real_images"] = "somebody/images"  # on the hub, which a dry run does not ask
    found = estimate(parse(settings=settings | {"dry_run": True, "output_dir": str(place / "dry")}))
    assert found.total() and "real images" not in found.overview


# --- What a run refuses -----------------------------------------------------------------------------------------------


def refused(*, match: str, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        train(**FAST | settings)
    assert "\n" not in str(error.value)


def test_who_reads_none_is_given_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pulled.py").write_text(MATCHING)
    pulled = {"matching": "pulled.py:Pulled"}
    nobody = "--real_images is not read by any part of the run"
    refused(real_images="photos", match=nobody)
    refused(real_images="photos", pull=0.0, **pulled, match=nobody)
    refused(real_images="photos", rl="lcm", stage2_steps=0, match="--rl is not read with --stage2_steps 0")
    refused(caption_column="text", rl="lcm", match="--caption_column is not read without --real_images")
    refused(real_images="photos", **pulled, match="--real_images: no such folder: photos")
    monkeypatch.delattr(Toy, "real_images")
    refused(**pulled, match="--matching pulled.py:Pulled reads real images: give a folder or a dataset")
    refused(rl="lcm", match="--rl lcm reads real images: give a folder or a dataset")


def test_a_model_may_have_its_own(tmp_path: Path) -> None:
    run = train(**FAST | {"rl": "lcm"}, output_dir=str(tmp_path / "run"))
    assert json.loads((run / "overview.json").read_text())["real images"] == "256 of toy"


def test_a_damaged_image_ends_a_run_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    data = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(data[:-30])  # the header is whole
    (folder / "a.txt").write_text("mode 1")
    refused(real_images=str(folder), rl="lcm", output_dir=str(tmp_path / "run"), match=r"a\.png cannot be read")


def test_an_image_of_another_size_is_refused_where_the_family_says_none(points: Captioned) -> None:
    source = RealLatents(points, at_rest(), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"0-00\.png becomes a latent of \[2\], not \[4, 2, 2\]"):
        source.latents([0], (4, 2, 2))


def test_the_digits_offer_their_scans(digits: Any) -> None:
    found = captioned(str(digits.real_images()), None, {})
    assert len(found.pictures) == len(found.rows) == 1200
    from dmdr_digits.data import PROMPTS, train_scans

    scans: Sequence[Any] = train_scans()
    for row in (0, 17, 1199):
        assert found.rows[row] == {"prompt": PROMPTS[scans.labels[row]], "label": int(scans.labels[row])}
        torch.testing.assert_close(found.pictures.read(row) / 255, scans.images[row], rtol=0, atol=1 / 500)
