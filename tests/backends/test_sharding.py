"""A network that two processes share, against the same network whole in one."""

import json
import os
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import processes
import sd3
from dmdr import train
from dmdr.backends.loading import Source, load_network, open_network, weight_files
from dmdr.backends.sharding import fill
from dmdr.errors import ConfigError
from dmdr.protocols import with_options
from dmdr.run.device import mesh_of, open_accelerator
from dmdr.run.job import assemble
from dmdr.settings import registry
from dmdr.settings.models import pipeline_class
from dmdr.settings.parse import parse
from dmdr.states import is_shared, own_rows, whole
from family import FAMILIES

PROMPTS = ("a handwritten seven", "a handwritten two")


def backend(folder: Path, sharding: Any = None, precision: str = "no", **options: Any) -> Any:
    cls = registry.load("backends", pipeline_class(str(folder)))
    given = {"lora_rank": 4, "fake_lora_rank": 4, "seed": 3, "prompt_cache": "off"} | options
    found = cls(str(folder), with_options(cls.Options, **given))
    found.prepare(open_accelerator(precision, cpu=True), roles=("student", "fake_score"), sharding=sharding)
    return found


def answers(
    folder: Path, rows: slice, sharding: Any = None, *, family: str = "sd3", **options: Any
) -> dict[str, Tensor]:
    """What each role says of some samples, and the gradients of those that are trained, one of them added later."""
    network = backend(folder / family, sharding, **options)
    trained = {role: network.parameters(role) for role in ("student", "fake_score")}
    trained["further"] = network.add_role("further", rank=2, alpha=4.0)
    asked = {role: getattr(network, role, partial(network.ask_role, role=role)) for role in ("teacher", *trained)}
    for parameters in trained.values():
        generator = torch.Generator().manual_seed(5)
        for name, parameter in parameters.items():
            if ".lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    exact: set[torch.dtype] = set()  # of modules that their class keeps in float32
    for each in network.roles.networks:
        for name, module in each.named_modules():
            if name.rpartition(".")[2] in (each._keep_in_fp32_modules or ()) and hasattr(module, "weight"):
                module.register_forward_hook(lambda module, given, answer: exact.add(module.weight.dtype))
    x_t = torch.randn((2, *network.latent_shape), generator=torch.Generator().manual_seed(7))[rows]
    t, cond = torch.tensor([0.4, 0.9])[rows], network.encode(PROMPTS[rows])
    found = {role: ask(x_t, t, cond).value for role, ask in asked.items()}
    assert exact <= {torch.float32}
    layers = range(len(network.feature_widths) - 1)  # the blocks after the last of them get no gradient
    y = x_t.clone().requires_grad_()
    for x in (y, x_t):  # as the student learns from them, and as the fake score does
        found["features"] = torch.cat([f.flatten() for f in network.features("fake_score", x, t, cond, layers)])
        if x is y:
            (found["gradient of features"],) = torch.autograd.grad(found["features"].square().mean(), y)
    found["features"].square().mean().backward()
    grads = [whole(p.grad).flatten() for p in network.parameters("fake_score").values() if p.grad is not None]
    found["fake_score.gradients of features"] = torch.cat(grads)
    for parameter in network.parameters("fake_score").values():
        parameter.grad = None
    for role, parameters in trained.items():
        for _ in range(2):
            asked[role](x_t, t, cond).value.square().sum().backward()
        for name, parameter in parameters.items():
            if parameter.grad is None:  # the last block's text stream reaches nothing
                continue
            assert is_shared(parameter.grad) == (sharding is not None and role in network.options.full_roles)
            found[f"{role}.{name}"] = whole(parameter.grad)
    shards = [p for each in network.roles.networks for p in each.parameters() if is_shared(p)]
    found["local"] = torch.tensor(sum(own_rows(p).numel() for p in shards))
    found["all"] = torch.tensor(sum(p.numel() for p in shards))
    return {name: tensor.detach() for name, tensor in found.items()}


CASES: dict[str, dict[str, Any]] = {
    "checkpointed": {"gradient_checkpointing": True},
    "full": {"full_finetune": True, "gradient_checkpointing": True},
    "full fake score": {"fake_score": "full", "gradient_checkpointing": True},
    "half": {"full_finetune": True, "fake_score": "full", "gradient_checkpointing": True, "precision": "bf16"},
    "merged": {"teacher_lora": "lora.safetensors"},
    "compiled": {"torch_compile": True},
    "flux2-klein": {"family": "flux2-klein", "resolution": "16", "max_sequence_length": 48},
    "qwen-image": {"family": "qwen-image", "resolution": "16", "max_sequence_length": 232},
    # Some of its modules stay in float32.
    "krea2, full": {
        "family": "krea2",
        "resolution": "16",
        "max_sequence_length": 232,
        "precision": "bf16",
        "full_finetune": True,
    },
    "krea2": {"family": "krea2", "resolution": "16", "max_sequence_length": 232, "precision": "bf16"},
}

# Images of the first prompt have no score: some processes then have no pair to learn from, and others have.
REWARD = """
import torch

def red(images, prompts):
    score = images[:, 0].mean((1, 2))
    return torch.where(torch.tensor([prompt == "seven" for prompt in prompts], device=score.device), torch.nan, score)
"""
RUN: dict[str, Any] = {
    "num_generations": 2, "stage1_steps": 1, "stage2_steps": 2, "fake_updates": 1, "eta": 0.9, "resolution": 16,
    "learning_rate": 1e-3, "gradient_checkpointing": True, "report_to": "none",
    "logging_steps": 1, "sample_images": 3, "save_steps": 2, "teacher_steps": 2, "mixed_precision": "no",
    "adam_epsilon": 1e-3,  # well above what is left by rounding where a gradient is zero
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"rl": "dpo+grpo", "lora_rank": 4, "fake_lora_rank": 4, "num_eval_samples": 5, "eval_steps": 2},
    "full": {"rl": "grpo+nft", "full_finetune": True, "fake_score": "full", "ema_decay": 0.5, "num_eval_samples": 0},
}
ONE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # the batch of one process, and of several
SEVERAL = {"shard": "node", "per_device_train_batch_size": 2}


def run(folder: Path, name: str, kind: str, **settings: Any) -> Path:
    given = {"model": str(folder / "sd3"), "prompts": str(folder / "prompts.txt"), "reward": f"{folder}/mine.py:red"}
    return train(**given | RUN | KINDS[kind] | settings, output_dir=str(folder / name))


def answer(rank: int, folder: Path) -> None:
    os.chdir(folder)
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module: compile_module(module, backend="eager")  # type: ignore[method-assign]
    mesh, own = mesh_of(2, Accelerator(cpu=True)), slice(rank, rank + 1)
    torch.save({name: answers(folder, own, mesh, **given) for name, given in CASES.items()}, f"{rank}.pt")


def train_together(rank: int, folder: Path, name: str, kind: str, settings: dict[str, Any]) -> None:
    accumulated = 4 // int(os.environ["WORLD_SIZE"])
    run(folder, name, kind, **SEVERAL, gradient_accumulation_steps=accumulated, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("sd3", "flux2-klein", "qwen-image", "krea2"):
            FAMILIES[name].build(folder / name)
        lora = 0.3 * torch.randn(2, 32)
    (folder / "mine.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("seven\ntwo\nfour\n")
    module = "transformer.transformer_blocks.0.attn.to_q.lora_"
    save_file({f"{module}A.weight": lora, f"{module}B.weight": lora.T.contiguous()}, folder / "lora.safetensors")
    return folder


@pytest.fixture(scope="module")
def answered(folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes found."""
    processes.start(answer, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_a_network_answer_as_one_that_has_it_whole(
    folder: Path, answered: list[dict[str, dict[str, Tensor]]], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    given = {name: value for name, value in CASES[case].items() if name != "torch_compile"}
    alone = [answers(folder, slice(rank, rank + 1), **given) for rank in (0, 1)]
    for rank, found in enumerate(each[case] for each in answered):
        assert found["local"] <= 0.51 * found["all"] and found["all"] > 10_000
        assert alone[rank].keys() == found.keys()
        for name in found.keys() - {"local", "all"}:
            wanted = alone[rank][name]
            full = {"student": given.get("full_finetune"), "fake_score": given.get("fake_score")}
            if full.get(name.partition(".")[0]) and "." in name:  # a gradient, averaged as it arrived
                wanted = (alone[0][name] + alone[1][name]) / 2
            # The last bits differ with the kind of processor, and a gradient through softmax loses two digits more.
            limit = 2e-2 if given.get("precision") == "bf16" else 2e-5 if "." in name or "of" in name else 5e-6
            assert (found[name] - wanted).norm() <= limit * wanted.norm(), name


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(folder: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The run of one process, of a kind."""

    @cache
    def made(kind: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmdr.run.run.write_report", lambda folder: None)
            return run(folder, f"alone-{kind}", kind, **ONE)

    return made


@pytest.fixture(scope="module")
def shared(folder: Path, request: pytest.FixtureRequest) -> tuple[int, str, Path]:
    """So many processes, of which two share a network, have made a run of a kind; four are two copies of two shares."""
    count, kind = request.param
    processes.start(train_together, count, folder, f"{kind}-{count}", kind, {}, machine=2)
    return count, kind, folder / f"{kind}-{count}"


EACH = [(2, "LoRA"), (2, "full"), *(pytest.param((4, kind), marks=pytest.mark.verify) for kind in KINDS)]


def weights(run: Path, step: int, role: str) -> dict[str, Tensor]:
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    shares = checkpoint / role
    found = whole_of(shares) if shares.is_dir() else load_file(checkpoint / f"{role}.safetensors")
    return {name.removeprefix("weights."): tensor for name, tensor in found.items()}


def whole_of(shares: Path) -> dict[str, Tensor]:
    """All tensors of a folder of shares, by their own names."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for file in shares.iterdir():
        with safe_open(file, framework="pt") as opened:
            places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in opened.keys():  # noqa: SIM118
                parts.setdefault(name, []).append((places[name]["saved_offsets"][0], opened.get_tensor(name)))
    return {name: torch.cat([rows for _, rows in sorted(of, key=lambda part: part[0])]) for name, of in parts.items()}


@pytest.mark.parametrize("shared", EACH, indirect=True)
def test_a_run_whose_processes_share_a_network_trains_as_one_process(
    shared: tuple[int, str, Path], alone: Callable[[str], Path]
) -> None:
    _, kind, other = shared
    one = alone(kind)
    roles = ("student", "fake_score", *(("ema",) if kind == "full" else ()))
    for step, role in product((1, 2, 3), roles):
        found, wanted = weights(other, step, role), weights(one, step, role)
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)
    if kind == "full":
        files = [load_file(next((run / "student").rglob("*.safetensors"))) for run in (one, other)]
        config = [json.loads((run / "student/transformer/config.json").read_text()) for run in (one, other)]
        assert config[0] == config[1] and files[0].keys() == files[1].keys()
        for name, tensor in weights(other, 3, "ema").items():
            assert torch.equal(files[1][name], tensor)
        return
    columns, others = (json.loads((f / "evaluation.json").read_text())["columns"] for f in (one, other))
    assert columns.keys() == others.keys() == {"stage 1", "stage 2", "teacher, 2 steps", "teacher, 4 steps"}
    for name, column in columns.items():
        assert others[name] == pytest.approx(column, rel=1e-4)
    for name in ("teacher.png", "step-000000.png", "step-000003.png"):
        pictures = [np.asarray(Image.open(f / "samples" / name), dtype=int) for f in (one, other)]
        assert abs(pictures[0] - pictures[1]).max() <= 1


AGAIN = [
    (2, "full"),
    *(pytest.param(case, marks=pytest.mark.verify) for case in ((2, "LoRA"), (4, "LoRA"), (4, "full"))),
]


@pytest.mark.parametrize("shared", AGAIN, indirect=True)
def test_it_goes_on_from_a_checkpoint_to_the_same_bits(folder: Path, shared: tuple[int, str, Path]) -> None:
    count, kind, before = shared
    again = {"resume_from_checkpoint": str(before / "checkpoints" / "step-000002")}
    processes.start(train_together, count, folder, f"{kind}-{count}-resumed", kind, again, machine=2)
    for role in ("student", "fake_score", *(("ema",) if kind == "full" else ())):
        found = weights(folder / f"{kind}-{count}-resumed", 3, role)
        assert all(torch.equal(found[name], tensor) for name, tensor in weights(before, 3, role).items())


@pytest.mark.parametrize("shared", AGAIN, indirect=True)
def test_another_number_of_processes_goes_on_with_it(
    folder: Path, shared: tuple[int, str, Path], alone: Callable[[str], Path]
) -> None:
    """Up to rounding: the sums are another's. Several go on with what one has trained, and one with theirs."""
    count, kind, before = shared
    step = "checkpoints/step-000002"
    one = run(folder, f"{kind}-{count}-one", kind, **ONE, resume_from_checkpoint=str(before / step))
    again = {"resume_from_checkpoint": str(alone(kind) / step)}
    processes.start(train_together, count, folder, f"{kind}-{count}-several", kind, again, machine=2)
    wanted = weights(before, 3, "student")
    for other in (one, folder / f"{kind}-{count}-several"):
        for name, tensor in weights(other, 3, "student").items():
            if name in wanted:
                torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-6)


# --- What cannot be shared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "toy", "shard": "all"}, "cannot share a model of ToyBackend"),
        (
            {"shard": "all", "full_finetune": True, "optim": "adamw_bnb_8bit"},
            "--optim adamw_bnb_8bit cannot train a shared full student",
        ),
        (
            {"shard": "all", "fake_score": "full", "optim": "adamw_bnb_8bit"},
            "--optim adamw_bnb_8bit cannot train a shared full fake score",
        ),
        ({"shard": "3"}, "2 processes cannot be split into groups of 3"),
    ],
)
def test_what_cannot_be_shared_is_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    given = {"model": str(folder / "sd3"), "prompts": str(folder / "prompts.txt")} | settings
    with pytest.raises(ConfigError, match=message):
        assemble(parse(settings=given), processes=2)


@pytest.mark.parametrize("value", ["0", "-1", "some", "1.5", ""])
def test_a_shard_is_a_number_or_a_word(value: str) -> None:
    with pytest.raises(ConfigError, match="--shard must be a number of at least 1, 'node' or 'all'"):
        parse(settings={"model": "toy", "shard": value})


def test_another_engine_of_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"accelerate launch with FSDP .* launch without it, and add --shard all"):
        train(model="toy")


def test_weights_that_do_not_fit_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    file = next((folder / "sd3" / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    name = "proj_out.weight"
    network = sd3.transformer()
    for wrong, message in (
        ({**weights, name: torch.zeros(3)}, r"1 of another shape \(proj_out.weight \(3,\) for"),
        ({**weights, "odd": torch.zeros(3)}, r"1 unexpected \(odd\)"),
        ({other: tensor for other, tensor in weights.items() if other != name}, r"1 missing \(proj_out.weight\)"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(ConfigError, match=message):
            fill(network, dict.fromkeys(wrong, tmp_path / "wrong.safetensors"), "the model")
    (tmp_path / "wrong.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"wrong\.safetensors cannot be read as safetensors"):
        fill(network, dict.fromkeys(weights, tmp_path / "wrong.safetensors"), "the model")


@pytest.mark.parametrize("name", ["sd3", "flux", "sdxl", "z-image", "flux2-klein", "qwen-image", "krea2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_without_weights_is_otherwise_the_loaded_one(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    FAMILIES[name].build(tmp_path)
    family = registry.load("backends", pipeline_class(str(tmp_path)))
    place = (family.network_class, Source(str(tmp_path)), family.network_name, dtype)
    loaded, opened = load_network(*place), open_network(*place)
    own, other = ({key: (p.shape, p.dtype) for key, p in network.named_parameters()} for network in (loaded, opened))
    assert own == other
    buffers = dict(opened.named_buffers())
    for key, buffer in loaded.named_buffers():
        assert buffer.dtype == buffers[key].dtype and torch.equal(buffer, buffers.pop(key))
    assert not buffers
    assert all(parameter.untyped_storage().nbytes() <= 4 for parameter in opened.parameters())  # no memory of their own


def test_files_of_an_index(folder: Path, tmp_path: Path) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(folder / "sd3", subfolder="transformer")
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size="50KB")
    files = weight_files(Source(str(tmp_path)), "transformer")
    assert files.keys() == transformer.state_dict().keys() and len(set(files.values())) > 1
    network = sd3.transformer()
    fill(network, files, "the model")
    assert all(torch.equal(tensor, transformer.state_dict()[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ConfigError, match="transformer has no readable weights in safetensors files"):
        weight_files(Source(str(folder)), "transformer")
