"""The embedded default model: its data, its cache, its files as stock libraries read them."""

import json
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmdr.errors import ConfigError
from dmdr.protocols import Judge, NamedModel
from dmdr_digits import REWARDS, Digits
from dmdr_digits.cache import PACKAGED, budget, cached, isolated, root
from dmdr_digits.data import (
    PROMPTS,
    WORDS,
    Scans,
    held_out_scans,
    label_of,
    nearest_neighbour_distances,
    scans,
    train_scans,
)
from dmdr_digits.fit import fit

ABSENT = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers asks for them, as with any SD3 without T5


# ---- data


def test_split_is_fixed_disjoint_and_complete() -> None:
    train, held_out = train_scans(), held_out_scans()
    assert (len(train), len(held_out), len(scans())) == (1200, 597, 1797)
    assert train.images.shape[1:] == (3, 8, 8)
    assert train.images.min() == 0
    assert train.images.max() == 1
    assert nearest_neighbour_distances(held_out.images, train.images).min() > 0  # no scan in both
    assert train.labels[:10].tolist() == [6, 5, 5, 7, 9, 9, 8, 4, 6, 8]
    assert train.labels.bincount().min() > 100


def test_prompts() -> None:
    rows = Digits().prompts()
    assert rows[7] == {"prompt": "a handwritten seven", "label": 7}
    assert [label_of(row["prompt"]) for row in rows] == [row["label"] for row in rows] == list(range(10))
    assert label_of("a cat") == -1


def test_import_and_construction_load_nothing_heavy() -> None:
    code = "import sys, dmdr_digits; dmdr_digits.Digits().prompts; print({'torch', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmdr_digits.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dmdr\[digits\]'"):
        Digits()


# ---- cache


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DMDR_CACHE", str(tmp_path))
    return tmp_path


def test_cache_is_keyed_by_budget_and_builds_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    first = cached("x", built.append)
    assert cached("x", built.append) == first
    monkeypatch.setenv("DMDR_DIGITS_BUDGET", "0.01")
    assert cached("x", built.append) != first
    assert len(built) == 2
    assert first.is_relative_to(empty_cache)
    monkeypatch.setenv("DMDR_DIGITS_BUDGET", "much")
    with pytest.raises(ConfigError, match="DMDR_DIGITS_BUDGET=much"):
        budget()


BUILDER = """
import os, sys, time
from dmdr_digits.cache import cached
def build(folder):
    open(sys.argv[1], "a").write("built\\n")
    (folder / "half").touch()
    eval(sys.argv[2])
    (folder / "whole").touch()
print(cached("x", build))
"""


def test_killed_build_leaves_nothing_usable(empty_cache: Path) -> None:
    log = empty_cache / "log"
    command = [sys.executable, "-c", BUILDER, str(log), "os.kill(os.getpid(), 9)"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not (root() / "x").exists()
    folder = cached("x", lambda folder: (folder / "whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert not list(root().glob("*.partial"))


def test_the_package_holds_what_the_default_run_needs(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    """The full training's; another training is asked for by its budget."""
    digits = Digits()
    assert digits.judge().correct(held_out_scans().images, [PROMPTS[i] for i in held_out_scans().labels]).mean() > 0.97
    folders = [digits.folder(), *(digits.reward_checkpoint(reward) for reward in REWARDS)]
    assert all(folder.parent == PACKAGED for folder in folders)
    assert not list(empty_cache.iterdir())
    size = sum(len(zlib.compress(file.read_bytes())) for file in PACKAGED.rglob("*") if file.is_file())
    assert size < 5e6
    monkeypatch.setenv("DMDR_DIGITS_BUDGET", "1")
    assert cached("judge", lambda folder: None).is_relative_to(empty_cache)


def test_concurrent_builders_build_once(empty_cache: Path) -> None:
    log = empty_cache / "log"
    command = [sys.executable, "-c", BUILDER, str(log), "time.sleep(0.5)"]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {job.communicate()[0] for job in jobs}
    assert len(folders) == 1
    assert log.read_text() == "built\n"


def test_build_is_deterministic_and_leaves_the_caller_alone(empty_cache: Path) -> None:
    def build(folder: Path) -> None:
        model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout()), torch.randn(32, 4)
        fit(model, lambda rows: (model(x[rows]) - x[rows]).square().mean(), "test", examples=32, steps=20, average=0.9)
        assert not any(p.requires_grad for p in model.parameters())
        torch.save(model.state_dict(), folder / "x.pt")

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        first = cached("a", build)
        torch.rand(7)
        second = cached("b", build)
        assert not torch.is_grad_enabled()
    torch.set_rng_state(state)
    cached("c", build)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    one, two = (torch.load(folder / "x.pt") for folder in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- text


def test_tokenizer_knows_its_words_and_survives_any_other(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from dmdr_digits.text import LENGTH, build_tokenizer

    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == LENGTH
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        assert len(ids) == 5
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    for text in ("Un café, 3 ü!", "日本", "zeros", ""):
        ids = tokenizer(text).input_ids
        assert ids.count(tokenizer.eos_token_id) == 1  # it is the unknown token, too
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")
    padded = tokenizer("seven", padding="max_length").input_ids
    assert len(padded) == LENGTH
    assert padded[-1] == tokenizer.pad_token_id
    assert len(tokenizer("a handwritten unknown word", truncation=True).input_ids) == LENGTH


def test_prompt_encodings_differ() -> None:
    from dmdr_digits.text import build_text_encoder, build_tokenizer

    tokenizer = build_tokenizer()
    with isolated():
        encoder = build_text_encoder(tokenizer)
        ids = tokenizer([*PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids
        pooled = encoder(ids).text_embeds
    apart = torch.cdist(pooled, pooled) + torch.eye(11) * 1e3
    assert apart.min() > 0.1 * pooled.norm(dim=1).mean()
    assert (encoder.config.bos_token_id, encoder.config.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


# ---- the pipeline


def test_a_training_of_its_own_is_a_pipeline_of_the_same_layout(
    digits: Digits, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shapes(folder: Path) -> dict[str, dict[str, torch.Size]]:
        files = folder.rglob("*.safetensors")
        return {str(f.relative_to(folder)): {n: t.shape for n, t in load_file(f).items()} for f in files}

    packaged = shapes(digits.folder())
    monkeypatch.setenv("DMDR_DIGITS_BUDGET", "0.002")
    assert Digits().folder().is_relative_to(empty_cache)
    assert shapes(Digits().folder()) == packaged and len(packaged) == 4


def test_folder_is_a_stock_pipeline(digits: Digits) -> None:
    from diffusers import StableDiffusion3Pipeline

    assert isinstance(digits, NamedModel)
    pipeline = StableDiffusion3Pipeline.from_pretrained(digits.folder(), torch_dtype=torch.float32, **ABSENT)
    pipeline.set_progress_bar_config(disable=True)
    call = {"max_sequence_length": digits.recipe["max_sequence_length"]}
    prompts = [row["prompt"] for row in digits.prompts()] * 4
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        prompts, num_inference_steps=8, guidance_scale=1.5, output_type="pt", generator=generator, **call
    ).images
    assert images.shape == (40, 3, 8, 8)
    assert digits.judge().correct(images, prompts).mean() > 0.9


def test_vae_keeps_the_digit_and_standardises_its_latents(digits: Digits) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(digits.folder(), subfolder="vae")
    held_out = held_out_scans()
    prompts = [PROMPTS[label] for label in held_out.labels]
    with torch.no_grad():
        latents = vae.encode(held_out.images * 2 - 1).latent_dist.mode()
        images = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert latents.shape[1:] == (4, 4, 4)
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1
    assert abs(scaled.std() - 1) < 0.1
    judge = digits.judge()
    assert judge.correct(images, prompts).mean() > 0.95 * judge.correct(held_out.images, prompts).mean()


# ---- rewards


@pytest.fixture(params=[False, True], ids=["packaged", "held_out"])
def held_out(request: pytest.FixtureRequest) -> bool:
    """Whether a reward is one that only measures, which the package does not hold: it is trained, shortly."""
    if request.param:
        request.getfixturevalue("short_digits")
    return bool(request.param)


def unseen(held_out: bool) -> Scans:
    """Those that a reward was not trained on."""
    return train_scans() if held_out else held_out_scans()


@pytest.mark.parametrize(("name", "activation"), [("clip", "QuickGELU"), ("hps", "GELU")])
def test_clip_layouts_load_strictly(digits: Digits, name: str, activation: str, held_out: bool) -> None:
    open_clip = pytest.importorskip("open_clip")
    folder = digits.reward_checkpoint(name, held_out=held_out)
    assert folder is not None
    if name == "clip":
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    else:
        model = open_clip.CLIP(**json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
        state = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
        assert {value.dtype for value in state.values()} == {torch.float16}
        model.load_state_dict(state, strict=True)
    for tower in (model.visual.transformer, model.transformer):
        assert type(tower.resblocks[0].mlp.gelu).__name__ == activation
    # a short training; chance is 0.1
    assert clip_accuracy(model, unseen(held_out)) > 0.4


def clip_accuracy(model: torch.nn.Module, scans: Scans) -> float:
    from dmdr_digits.lessons import CLIP_NORM, preprocess
    from dmdr_digits.rewards import prompt_tokens, similarity

    with torch.no_grad():
        found = similarity(model.eval(), preprocess(scans.images, CLIP_NORM), prompt_tokens(model)).argmax(1)
    return (found == scans.labels).float().mean().item()


def test_dinov2_layout_loads(digits: Digits, held_out: bool) -> None:
    from transformers import Dinov2ForImageClassification

    from dmdr_digits.lessons import IMAGENET_NORM, preprocess

    folder = digits.reward_checkpoint("dinov2", held_out=held_out)
    model, report = Dinov2ForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(WORDS))
    with torch.no_grad():
        logits = model.eval()(preprocess(unseen(held_out).images, IMAGENET_NORM)).logits
    assert (logits.argmax(1) == unseen(held_out).labels).float().mean() > 0.4  # a short training; chance is 0.1


@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "imagereward"])
def test_other_rewards_tell_scans_from_degraded_ones(digits: Digits, name: str, held_out: bool) -> None:
    from dmdr.settings import registry
    from dmdr_digits.lessons import degrade, rated

    scans = unseen(held_out)
    rows = torch.arange(len(scans))
    with isolated():
        worse = rated(scans, rows)[0] if name == "aesthetic" else degrade(scans, rows)
    reward = registry.load("rewards", name)(checkpoint=str(digits.reward_checkpoint(name, held_out=held_out)))
    reward.prepare(torch.device("cpu"), torch.float32)
    prompts, others = ([PROMPTS[(label + shift) % 10] for label in scans.labels] for shift in (0, 3))
    with torch.no_grad():
        scores = reward(scans.images, prompts)
        assert (scores > reward(worse, prompts)).float().mean() > 0.6  # a short training; chance is 0.5
        mistaken = (scores > reward(scans.images, others)).float().mean()
    if name == "aesthetic":
        assert mistaken == 0
    elif not (held_out and name == "imagereward"):  # it learns quality first, and so short on half the scans no more
        assert mistaken > 0.6


def test_unknown_rewards_have_no_checkpoint(digits: Digits) -> None:
    assert digits.reward_checkpoint("toy") is None


def test_held_out_rewards_share_no_scan_and_no_first_weight(digits: Digits, short_digits: None) -> None:
    open_clip = pytest.importorskip("open_clip")
    seen, other = (digits.reward_checkpoint("clip", held_out=flag) for flag in (False, True))
    assert seen != other
    models = [open_clip.create_model(f"local-dir:{folder}", require_pretrained=True) for folder in (seen, other)]
    first, second = (model.token_embedding.weight for model in models)  # which the training leaves alone
    assert 0.49 < (first == second).float().mean() < 0.51  # signs


def test_degraded_scans_are_worse_in_four_ways() -> None:
    from dmdr_digits.lessons import degrade

    rows = torch.arange(200)
    with isolated():
        worse = degrade(train_scans(), rows)
    assert worse.shape == (200, 3, 8, 8)
    assert 0 <= worse.min() <= worse.max() <= 1
    changed = (worse - train_scans().images[rows]).abs().amax((1, 2, 3)) > 0
    assert changed.float().mean() > 0.95


# ---- judge


def test_judge(digits: Digits) -> None:
    judge: Judge = digits.judge()
    images = held_out_scans().images
    prompts = [PROMPTS[label] for label in held_out_scans().labels]
    assert judge.reference().shape == (1797, 3, 8, 8)
    assert judge.features(images).shape == (597, 64)
    embedded = judge.embed(images)
    assert embedded.shape == (597, 32)
    pixels = images.mean(1).flatten(1)
    assert embedded.var(0).sum() > 0.9 * pixels.var(0).sum()  # what 32 of 64 components hold
    assert judge.correct(images, prompts).mean() > 0.98
    assert judge.correct(images[:2], ["a cat", "a dog"]).tolist() == [0, 0]
    probabilities = judge.probabilities(images)
    assert torch.allclose(probabilities.sum(1), torch.ones(597))
    asked = torch.tensor([label_of(prompt) for prompt in prompts])
    assert torch.equal((probabilities.argmax(1) == asked).float(), judge.correct(images, prompts))
    assert not judge.features(images.requires_grad_()).requires_grad
    wide = torch.nn.functional.interpolate(images.detach(), (16, 24), mode="nearest")
    assert judge.correct(wide, prompts).mean() > 0.95 and judge.embed(wide).shape == (597, 32)
    assert judge.features(wide).shape == (597, 64) and judge.probabilities(wide).shape == (597, 10)
