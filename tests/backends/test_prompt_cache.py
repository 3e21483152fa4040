"""Prompt embeddings on disk, of a small Stable Diffusion 3 with three text encoders: right, whoever writes or dies."""

import gc
import json
import math
import multiprocessing
import os
import random
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dmdr.backends import prompt_encoder
from dmdr.backends.prompt_cache import OPEN, SHARD, PromptCache, _key
from dmdr.errors import ConfigError
from dmdr.run.run import train
from dmdr_sd3 import SD3Backend

PROMPTS = ["a handwritten seven", "a handwritten two", "a handwritten zero", "two, not seven"]
MANY = [f"number {i}" for i in range(1500)]
FORK = multiprocessing.get_context("fork")  # with the model loaded; a fresh interpreter takes seconds to get there
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    return model


def accelerator(precision: str = "no", index: int = 0, processes: int = 1, barrier: Any = lambda: None) -> Any:
    """As many of them as a test likes, where accelerate has one a process."""
    return SimpleNamespace(
        mixed_precision=precision,
        device=torch.device("cpu"),
        process_index=index,
        num_processes=processes,
        is_main_process=index == 0,
        wait_for_everyone=barrier,
    )


ALONE = accelerator()


def prepared(folder: Path, cache: Path | str, accelerator: Any = ALONE, **options: Any) -> SD3Backend:
    given = {"lora_rank": 4, "max_sequence_length": 5, "prompt_cache": str(cache)} | options
    backend = SD3Backend(str(folder), SD3Backend.Options(**given))
    backend.prepare(accelerator, roles=("student", "fake_score"))
    return backend


def embeddings(backend: SD3Backend, prompts: Sequence[str]) -> dict[str, Tensor]:
    return dict(backend.encode(prompts).tensors)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Calls(NamedTuple):
    """What text has cost: encoders that were loaded, how often each prompt was encoded, and how many at a time."""

    loads: list[str]
    encoded: Counter[str]
    sizes: list[int]

    def forget(self) -> None:
        self.loads.clear()
        self.encoded.clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls, load = Calls([], Counter(), []), prompt_encoder.load_text_encoder
    encode = StableDiffusion3Pipeline.encode_prompt

    def loading(cls: Any, source: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        calls.loads.append(name)
        return load(cls, source, name, *args, **kwargs)

    def encoding(self: Any, prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        calls.encoded.update(prompts)
        calls.sizes.append(len(prompts))
        return encode(self, prompts, *args, **kwargs)

    monkeypatch.setattr(prompt_encoder, "load_text_encoder", loading)
    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", encoding)
    return calls


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Any:
    """Train; the student's tensors."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(name: str, **settings: Any) -> dict[str, Tensor]:
        given = {
            "model": str(folder), "prompts": str(tmp_path / "prompts.txt"), "rl": "none", "reward": "none",
            "num_inference_steps": 2, "guidance_scale": 4.0, "fake_updates": 2, "learning_rate": 1e-3,
            "max_sequence_length": 5, "lora_rank": 4, "per_device_train_batch_size": 2, "stage1_steps": 3,
            "stage2_steps": 0, "sample_images": 1, "sample_steps": 0, "save_steps": 0, "teacher_steps": 2,
            "report_to": "none", "output_dir": str(tmp_path / name), "prompt_cache": str(tmp_path / "cache"),
        }  # fmt: skip
        output = train(**given | settings)
        return load_file(output / "student" / "pytorch_lora_weights.safetensors")

    return run


def test_a_second_run_encodes_nothing_and_loads_no_encoder(run: Any, calls: Calls) -> None:
    first = run("first")
    assert calls.loads == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert calls.encoded == Counter([*PROMPTS, ""])  # once each, with the empty prompt of guidance
    calls.forget()
    assert equal(run("second"), first)
    assert not calls.loads and not calls.encoded


def test_prompts_are_encoded_before_the_network_is_loaded(
    run: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders and network need not find room beside each other."""
    encoded, load = [], SD3Transformer2DModel.from_pretrained

    def loading(*args: Any, **kwargs: Any) -> Any:
        encoded.append(Counter(calls.encoded))
        return load(*args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "from_pretrained", loading)
    run("first", validation_prompts=["a handwritten nine"])
    assert encoded == [Counter([*PROMPTS, "a handwritten nine", ""])] and calls.encoded == encoded[0]


def test_without_a_cache_a_run_learns_the_same(run: Any, calls: Calls, tmp_path: Path) -> None:
    cached = run("cached")
    for name, tensor in run("off", prompt_cache="off").items():
        torch.testing.assert_close(tensor, cached[name], rtol=0, atol=1e-4)  # AdamW's first steps have unit size
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_streamed_run_caches_as_it_goes(run: Any, calls: Calls, tmp_path: Path) -> None:
    first = run("first", dataset_streaming=True)
    assert calls.loads == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert calls.encoded == Counter([*PROMPTS, ""])
    calls.forget()
    assert equal(run("second", dataset_streaming=True), first)
    assert not calls.loads and not calls.encoded


def test_prompts_of_pairs_are_encoded_with_the_others(run: Any, calls: Calls, tmp_path: Path) -> None:
    """Before the network is there: no encoder comes back in the middle of training."""
    for name in ("a", "b"):
        Image.new("RGB", (16, 16), {"a": "white", "b": "black"}[name]).save(tmp_path / f"{name}.png")
    pair = {"prompt": "of a pair", "chosen": "a.png", "rejected": "b.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    run("dpo", rl="dpo", dpo_pairs=str(tmp_path / "pairs.jsonl"), stage1_steps=1, stage2_steps=2)
    assert calls.loads == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert calls.encoded == Counter([*PROMPTS, "of a pair", ""])


# --- What is read is what was encoded ---------------------------------------------------------------------------------


def test_embeddings_are_those_without_a_cache(folder: Path, tmp_path: Path) -> None:
    plain, repeated = prepared(folder, "off"), [*PROMPTS[:2], *PROMPTS]
    expected = embeddings(plain, repeated)
    assert equal(embeddings(prepared(folder, tmp_path / "alike"), repeated), expected)  # encoded in the same batch
    other = prepared(folder, tmp_path / "other")
    other.cache_prompts(ALONE, [*MANY[:100], *reversed(PROMPTS)])
    for name, tensor in embeddings(other, repeated).items():
        assert tensor.dtype == expected[name].dtype
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected["sequence"][0], expected["sequence"][1])


def test_encoders_read_so_many_prompts_at_a_time(folder: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = prepared(folder, "off")
    whole = embeddings(backend, PROMPTS)
    monkeypatch.setattr(prompt_encoder, "BATCH", 3)
    calls.sizes.clear()
    for name, tensor in embeddings(backend, PROMPTS).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)
    assert calls.sizes == [3, 1]


def test_encoders_are_let_go(folder: Path, tmp_path: Path) -> None:
    """At once: nothing waits for the collector of cycles, or the memory would not be free when training begins."""
    backend = prepared(folder, tmp_path)
    parts = [backend.text.pipeline().components[name] for name in backend.text.components if "encoder" in name]
    references = [weakref.ref(part) for part in parts]
    del parts
    gc.collect()
    gc.disable()
    try:
        backend.cache_prompts(ALONE, PROMPTS)
        assert len(references) == 3 and not any(reference() for reference in references)
    finally:
        gc.enable()


def changed_file(folder: Path, file: str) -> None:
    """Other weights in a file of the same size."""
    state = load_file(folder / file)
    save_file({name: tensor + 0.1 for name, tensor in state.items()}, folder / file, {"format": "pt"})


def test_encoders_are_let_go_after_a_prompt_that_nobody_foresaw(folder: Path, tmp_path: Path, calls: Calls) -> None:
    """They stay only where prompts are not known beforehand."""
    backend = prepared(folder, tmp_path / "foreseen")
    backend.cache_prompts(ALONE, PROMPTS)
    embeddings(backend, PROMPTS)
    calls.forget()
    embeddings(backend, ["another"])
    assert len(calls.loads) == 3 and backend.text._pipeline is None
    for cache in (tmp_path / "streamed", "off"):
        backend = prepared(folder, cache)
        embeddings(backend, ["another"])
        assert backend.text._pipeline is not None


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_embeddings_of_other_libraries_are_not_reused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    prepared(folder, tmp_path).cache_prompts(ALONE, PROMPTS)
    monkeypatch.setattr(f"{library}.__version__", "99.0")
    assert prepared(folder, tmp_path).text.cache.missing(PROMPTS) == PROMPTS


def test_embeddings_of_other_text_are_not_reused(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepared(folder, cache).cache_prompts(ALONE, PROMPTS)

    def missing(folder: Path = folder, accelerator: Any = ALONE, **options: Any) -> list[str]:
        return prepared(folder, cache, accelerator, **options).text.cache.missing(PROMPTS)

    assert missing() == missing(seed=3, lora_rank=2, shift=7.0) == []
    assert missing(max_sequence_length=6) == PROMPTS
    assert missing(drop_text_encoders=("text_encoder_3",)) == PROMPTS
    assert missing(accelerator=accelerator("bf16")) == PROMPTS
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert missing(copy) == []
    changed_file(copy, "transformer/diffusion_pytorch_model.safetensors")
    assert missing(copy) == []
    file = copy / "text_encoder_2" / "model.safetensors"
    times = file.stat()
    changed_file(copy, "text_encoder_2/model.safetensors")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as images of containers, which set them all alike
    assert missing(copy) == PROMPTS
    assert not equal(embeddings(prepared(copy, cache), PROMPTS), embeddings(prepared(folder, cache), PROMPTS))


# --- Several writers, and their deaths --------------------------------------------------------------------------------


def right(folder: Path, cache: Path, prompts: Sequence[str]) -> None:
    """Assert that a reader finds every embedding without encoding, and that each is its own prompt's."""
    reader, plain = prepared(folder, cache), prepared(folder, "off")
    reader.text.cache._embed = None  # type: ignore[assignment, union-attr]
    assert reader.text.cache.missing(prompts) == []
    for start in range(0, len(prompts), 250):
        part = prompts[start : start + 250]
        expected = embeddings(plain, part)
        for name, tensor in embeddings(reader, part).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


def write(backend: Any, prompts: Sequence[str]) -> None:
    """Fill a cache in a process of its own.

    tqdm's lock is shared with forked processes: one that is killed while it holds it would stop every later progress
    bar of all others.
    """
    tqdm.set_lock(threading.RLock())
    backend.cache_prompts(ALONE, prompts)


def test_writers_that_are_killed_leave_a_usable_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = prepared(folder, tmp_path)
    backend.text.pipeline()
    stored, moments = [], random.Random(0)

    def files() -> int:
        return len(list(tmp_path.glob("*/*")))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: time.sleep(0.05))  # of a slow disk: half of the deaths meet a write
        for _ in range(10):
            writer = FORK.Process(target=write, args=(backend, MANY))
            before, since = files(), time.monotonic()
            writer.start()
            while files() == before and time.monotonic() - since < 60:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
            writer.kill()
            writer.join()
            stored.append(len(MANY) - len(prepared(folder, tmp_path).text.cache.missing(MANY)))
    torn = len(list(tmp_path.rglob("*.partial")))
    print(f"stored after each death: {stored} of {len(MANY)}, {torn} of them in the middle of a shard")
    assert stored == sorted(stored) and torn and stored[0] < len(MANY) and stored[-1] > 0
    backend.cache_prompts(ALONE, MANY)
    right(folder, tmp_path, MANY)


def test_two_that_fill_one_folder(folder: Path, tmp_path: Path) -> None:
    """Two runs that know nothing of each other."""
    prompts = MANY[:500]
    backend = prepared(folder, tmp_path)
    backend.text.pipeline()
    writers = [FORK.Process(target=write, args=(backend, order)) for order in (prompts, prompts[::-1])]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    right(folder, tmp_path, prompts)


@pytest.mark.parametrize("first", [0, 1])
def test_processes_of_a_run_share_the_work(folder: Path, tmp_path: Path, calls: Calls, first: int) -> None:
    """Each prompt is encoded once, even where one has stored its share before the other looks."""
    prompts, barrier = MANY[:200], threading.Barrier(2)
    backends = [prepared(folder, tmp_path, accelerator("no", rank, 2, barrier.wait)) for rank in (0, 1)]
    threads = [
        threading.Thread(target=backend.cache_prompts, args=(backend.accelerator, prompts)) for backend in backends
    ]
    threads[first].start()
    while not barrier.n_waiting:
        time.sleep(0.01)
    threads[1 - first].start()
    for thread in threads:
        thread.join()
    assert calls.encoded == Counter([*prompts, ""])
    assert all(backend.text._pipeline is None for backend in backends)
    right(folder, tmp_path, prompts)


def test_processes_with_disks_of_their_own(folder: Path, tmp_path: Path) -> None:
    """What the others have stored is not there: a process encodes it before it lets go of its encoders."""
    backend = prepared(folder, tmp_path, accelerator("no", 0, 2))
    backend.cache_prompts(backend.accelerator, MANY[:100])
    right(folder, tmp_path, [*MANY[:100], ""])


# --- Bad places -------------------------------------------------------------------------------------------------------


def refusal(folder: Path, cache: Path | str) -> str:
    with pytest.raises(ConfigError) as error:
        prepared(folder, cache).cache_prompts(ALONE, PROMPTS)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_disk_without_room(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    said = refusal(folder, tmp_path / "cache")
    assert said.startswith("the prompt embeddings take ") and "--prompt_cache" in said
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_fills_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a shard is written: no part of it takes room."""

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dmdr.backends.prompt_cache.save_file", full)
    assert "No space left on device" in refusal(folder, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path, damage: str) -> None:
    prepared(folder, tmp_path).cache_prompts(ALONE, PROMPTS)
    (shard,) = tmp_path.rglob("*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": b"\xff" * len(content)}[damage])
    assert refusal(folder, tmp_path) == f"--prompt_cache: {shard} is damaged; delete it"
    shard.unlink()
    prepared(folder, tmp_path).cache_prompts(ALONE, PROMPTS)
    right(folder, tmp_path, PROMPTS)


def test_a_file_in_the_place_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal(folder, tmp_path / "file") == f"--prompt_cache {tmp_path / 'file'} is no folder; give one, or 'off'"
    assert "file" in refusal(folder, tmp_path / "file" / "below")


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[Path]:
    """A folder that may be looked into but not written to, and the rights of a user who is not its owner."""
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    root = os.geteuid() == 0
    ours = takewhile(lambda parent: parent.name.startswith(("pytest", "popen")), tmp_path.parents)
    for parent in (tmp_path, *ours) if root else ():
        parent.chmod(0o755)
    if root:
        os.seteuid(65534)
    try:
        yield shut
    finally:
        if root:
            os.seteuid(0)
        shut.chmod(0o755)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_that_is_not_ours(nobody: Path, mode: int) -> None:
    uid = os.geteuid()
    os.seteuid(os.stat(nobody).st_uid)
    nobody.chmod(mode)
    os.seteuid(uid)
    cache = PromptCache(nobody / "cache", lambda prompts: {"x": torch.zeros(len(prompts), 2)})
    with pytest.raises(ConfigError, match=r"^--prompt_cache .*shut/cache cannot be .*Permission denied") as error:
        cache.fill(PROMPTS)
    assert "\n" not in str(error.value)


# --- Keys and size ----------------------------------------------------------------------------------------------------

ODD = [
    "",
    " ",
    "a",
    "a ",
    "A",
    "\ud800",
    "\udc00",
    "\ud800\udc00",
    "\U00010000",
    "é",
    "e\u0301",
    "🦊",
    "🦊\ufe0f",
    "\0",
]


def numbered(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Embeddings that say whose they are."""
    codes = [[float(int(_key(prompt)[start : start + 4], 16)) for start in range(0, 32, 4)] for prompt in prompts]
    return {"sequence": torch.tensor(codes), "pooled": torch.tensor(codes).neg().half()}


def test_odd_prompts_have_keys_of_their_own(tmp_path: Path) -> None:
    prompts = [*ODD, "long" * 10**5, "long" * 10**5 + "s", "two\nlines", "a/sequence", "../../up"]
    assert len(set(map(_key, prompts))) == len(prompts)
    PromptCache(tmp_path, numbered).fill(prompts)
    found = PromptCache(tmp_path, numbered)
    assert found.missing(prompts) == []
    assert equal(found(prompts), numbered(prompts))


def test_padding_is_not_stored(tmp_path: Path) -> None:
    def embed(prompts: Sequence[str]) -> dict[str, Tensor]:
        length = torch.tensor([len(prompt) for prompt in prompts])
        rows = torch.randn(len(prompts), 100, 3, generator=torch.manual_seed(0))
        return {"sequence": rows * (torch.arange(100) < length[:, None])[..., None], "length": length}

    PromptCache(tmp_path, embed, {"sequence": 100}).fill(prompts := ["one", "", "seventeen"])
    (file,) = tmp_path.iterdir()
    assert sorted(len(t) for name, t in load_file(file).items() if name.endswith("sequence")) == [0, 3, 9]
    assert equal(PromptCache(tmp_path, embed, {"sequence": 100})(prompts), embed(prompts))


def test_thousands_of_prompts(tmp_path: Path) -> None:
    count = 10_000
    prompts, handles = [f"prompt {i}" for i in range(count)], len(os.listdir("/proc/self/fd"))

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    started = time.perf_counter()
    PromptCache(tmp_path, numbered).fill(prompts)
    filled = time.perf_counter()
    cache = PromptCache(tmp_path, numbered)
    assert cache.missing(prompts) == []
    found = time.perf_counter()
    order = random.Random(0).sample(prompts, count)
    for start in range(0, count, 16):
        part = order[start : start + 16]
        assert equal(cache(part), numbered(part))
    read = time.perf_counter()
    assert len(list(tmp_path.iterdir())) == math.ceil(count / SHARD)
    assert len(os.listdir("/proc/self/fd")) - handles <= OPEN + 2 and mapped() <= OPEN
    print(
        json.dumps(
            {"files": math.ceil(count / SHARD), "fill": filled - started, "find": found - filled, "read": read - found}
        )
    )
