"""`--dry_run` against what really happens: sizes of what is loaded, bytes that the allocator hands out in a step."""

import gc
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import dmdr
import parts
from dmdr.backends.lora import LoRARoles
from dmdr.backends.prompt_encoder import BATCH
from dmdr.cli import train
from dmdr.dry_run.estimate import (
    AVERAGE,
    ENCODERS,
    GATHERED,
    GRADIENTS,
    META,
    NETWORK,
    OPTIMIZER,
    Estimate,
    estimate,
)
from dmdr.dry_run.memory import Blockwise, GPUKernels, Meter, attention, autocast
from dmdr.dry_run.stand_ins import AnyReward, Bridge, MetaLatentReward, Process
from dmdr.errors import ConfigError
from dmdr.protocols import AddsRoles, GivesFeatures, GuidanceRule, LatentReward, Reward, SeveralSizes, with_options
from dmdr.rewards import Rewards
from dmdr.run.job import assemble
from dmdr.run.run import Run
from dmdr.settings import registry
from dmdr.settings.models import pipeline_class
from dmdr.settings.parse import parse, resolve
from dmdr.training.objectives import combined_needs
from dmdr_digits import Digits
from dmdr_dina import DiNa
from family import FAMILIES

BACKENDS = (GivesFeatures, AddsRoles, GuidanceRule, SeveralSizes)  # which parts of a step ask for

logging.set_verbosity_error()
logging.disable_progress_bar()
CASES = [(name, rl) for name, family in FAMILIES.items() for rl in family.objectives if name == "sd3" or rl == "refl"]
SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
SD3_MEDIUM = SD3 | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35_LARGE = SD3 | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm",
}  # fmt: skip
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    built = {name: tmp_path_factory.mktemp("pipelines") / name for name in FAMILIES}
    for name, folder in built.items():
        FAMILIES[name].build(folder)
    return built


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD3 pipeline of so many tokens that activations are most of what it needs."""
    folder, clip = tmp_path_factory.mktemp("pipelines") / "sd3", parts.clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=4,
        attention_head_dim=32, joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64,
        pos_embed_max_size=32,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=parts.clip_text_encoder(clip),
        tokenizer=clip,
        text_encoder_2=parts.clip_text_encoder(clip),
        tokenizer_2=clip,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


# --- What is built is what would be loaded ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_and_dtypes_are_those_of_the_loaded_model(folders: dict[str, Path], name: str) -> None:
    family, folder = FAMILIES[name], str(folders[name])
    cls = registry.load("backends", pipeline_class(folder))
    given = {"prompt_cache": "off", "lora_rank": 4, "fake_lora_rank": 2} | family.settings
    options = with_options(cls.Options(), **given)
    found = []
    for process in (Accelerator(cpu=True, mixed_precision="bf16"), Process(META, "bf16")):
        backend = cls(folder, options)
        backend.prepare(process, roles=("student", "fake_score"))
        modules = {"network": backend.roles.network, "vae": backend.vae, **backend.text.load_encoders()}
        tensors = {f"{part}.{key}": t for part, module in modules.items() for key, t in module.state_dict().items()}
        cond = backend.encode(family.prompts)
        found.append({key: (t.shape, t.dtype) for key, t in (tensors | dict(cond.tensors)).items()})
    loaded, built = found
    assert built == loaded


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_every_family_and_every_objective_can_be_estimated(
    folders: dict[str, Path], tmp_path: Path, name: str, objective: str
) -> None:
    family = FAMILIES[name]
    given = {"model": str(folders[name]), "rl": objective, **family.settings, **family.objectives[objective]}
    found = dry(given, tmp_path)
    encoders = ["prompts"] if pipeline_class(given["model"]) != "SiTPipeline" else []
    assert list(found.phases) == [*encoders, "stage 1", "stage 2", "image grid"]
    assert all(parts["activations"] > 0 for parts in found.phases.values())


@pytest.mark.parametrize(
    ("cls", "config", "count"),
    [
        (SD3Transformer2DModel, SD3_MEDIUM, 2_028_328_000),
        (SD3Transformer2DModel, SD35_LARGE, 8_056_627_520),
        (UNet2DConditionModel, SDXL, 2_567_463_684),
    ],
    ids=["SD3-Medium", "SD3.5-Large", "SDXL"],
)
def test_published_models_have_their_published_size(cls: Any, config: Mapping[str, Any], count: int) -> None:
    with torch.device("meta"):
        network = cls(**config)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


# --- A step -----------------------------------------------------------------------------------------------------------


def settings_of(given: Mapping[str, Any], tmp_path: Path) -> dict[str, Any]:
    few = {"num_inference_steps": 2, "lora_rank": 4, "lora_alpha": 8.0, "fake_lora_rank": 2, "fake_updates": 1}
    few |= {"mixed_precision": "no"}  # as on the CPU that the estimate is compared with
    where = {"output_dir": str(tmp_path / "run"), "report_to": "none"}
    if "sit" not in Path(str(given.get("model"))).name:  # which has no texts
        where["prompt_cache"] = str(tmp_path / "prompts")
    return few | where | {"reward": "none" if given.get("rl", "none") == "none" else "toy"} | dict(given)


def dry(given: Mapping[str, Any], tmp_path: Path) -> Estimate:
    return estimate(resolve(settings=settings_of(given, tmp_path) | {"dry_run": True}))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 3},
        {"full_finetune": True, "ema_decay": 0.9},
        {"fake_score": "full", "gradient_checkpointing": True},
        {"full_finetune": True, "fake_score": "full"},
        {"rl": "refl", "decode_chunk_size": 1, "gradient_checkpointing": True},
        {"rl": "grpo", "num_generations": 2},
        {"rl": "draft"},
        {"rl": "tdm_r1", "num_generations": 2, "surrogate_rank": 2},
    ],
    ids=lambda given: " ".join(given) or "plain",
)
def test_the_estimate_is_what_the_allocator_hands_out(middling: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    """A step in float32 on the CPU, where PyTorch's profiler sees every allocation: within 2 %."""
    length = {"stage1_steps": 0} if "rl" in given else {"stage2_steps": 0}
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    prompts = {"model": str(middling), "prompts": str(tmp_path / "prompts.txt"), "max_sequence_length": 5}
    given = given | length | prompts
    found = dry(given, tmp_path)
    phase = "stage 2" if "rl" in given else "stage 1"

    job = assemble(resolve(settings=settings_of(given, tmp_path)))
    job = replace(job, rewards=Rewards({"toy": (1.0, AnyReward())}) if job.rewards else None)
    backend: Any = job.backend
    run = Run(job, tmp_path / "run", None, None)
    backend.prepare(run.accelerator, roles=("student", "fake_score", *combined_needs(job.objectives).roles))
    trainer = run.trainers.of(job.plan.stages[0])
    trainer.train_step(noted=True)
    gc.collect()

    static = {name: size for name, size in found.phases[phase].items() if name not in ("gradients", "activations")}
    student, fake = (sum(p.nbytes for p in backend.parameters(r).values()) for r in ("student", "fake_score"))
    own = sum(
        p.nbytes for learners in run.trainers.own_learners.values() for own in learners for p in own.parameters.values()
    )
    assert static["optimizer states"] == 2 * (student + fake + own)  # two moments
    assert static.get("surrogate", 0) == own
    for role, name, size in (("student", "student", student), ("fake_score", "fake score", fake)):
        if role in backend.options.full_roles:
            assert static[f"{name}, full"] == size + sum(b.nbytes for b in backend.roles.copies[role].buffers())
        else:
            assert static[f"{name}, LoRA"] == size
    assert static.get("average of the student", 0) == ("ema_decay" in given) * student
    assert found.backbones == 1 + len(backend.options.full_roles)
    allocated = highest(lambda: trainer.train_step(noted=True))  # as in a step that is logged
    assert sum(found.phases[phase].values()) - sum(static.values()) == pytest.approx(allocated, rel=0.02)


def highest(function: Callable[[], object]) -> int:
    """Most bytes that were allocated at a time during a call, above what was at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_of_several_processes_one_is_estimated(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their batch is that of all, which an objective may need."""
    given = {"model": str(folders["sd3"]), "max_sequence_length": 5, "stage1_steps": 1, "rl": "rwr"}
    given |= {"per_device_train_batch_size": 1}
    with pytest.raises(ConfigError, match="of at least 2 in all processes together, not 1"):
        dry(given, tmp_path)
    alone = dry(given | {"per_device_train_batch_size": 2}, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert dry(given | {"per_device_train_batch_size": 2}, tmp_path).phases == alone.phases
    assert dry(given, tmp_path).phases["stage 2"]["activations"] < alone.phases["stage 2"]["activations"]


@pytest.mark.parametrize(("rl", "rollouts"), [("none", 5), ("refl", 2)])
def test_what_is_not_followed_is_added(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rollouts: int, rl: str
) -> None:
    """Micro-batches, rollouts and updates of the fake score, also where rollouts are the peak of the run."""
    given = {
        "model": str(folders["sd3"]), "max_sequence_length": 5, "fake_updates": 5, "rollouts": rollouts, "rl": rl,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 5, "gradient_checkpointing": True,
        "resolution": 32, "lora_rank": 1, "fake_lora_rank": 1, "stage1_steps": 1, "stage2_steps": int(rl != "none"),
    }  # fmt: skip
    found = dry(given, tmp_path)
    monkeypatch.setattr("dmdr.dry_run.estimate.FOLLOWED", 99)
    followed = dry(given, tmp_path)
    for phase, whole in followed.phases.items():
        assert sum(found.phases[phase].values()) == pytest.approx(sum(whole.values()), rel=0.04), phase


def test_of_several_sizes_the_largest_is_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    given = {"model": str(folders["sd3"]), "max_sequence_length": 5, "stage2_steps": 0, "fake_updates": 1}
    largest, several = (dry(given | {"resolution": sizes}, tmp_path) for sizes in ("16x24", "16,16x24,8x24"))
    assert several.phases == largest.phases and "16x24 px" in several.what
    assert several.overview["update"].endswith(", of one of the sizes 16, 16x24, 8x24")


def test_an_8_bit_optimizer_needs_its_states_and_nothing_else(folders: dict[str, Path], tmp_path: Path) -> None:
    """Neither it nor AdamW in one kernel takes a copy of the parameters while it steps."""
    given = {
        "model": str(folders["sd3"]), "max_sequence_length": 5, "full_finetune": True, "stage2_steps": 0,
        "resolution": 8, "per_device_train_batch_size": 1, "gradient_checkpointing": True,
    }  # fmt: skip
    plain, other = (dry(given | {"optim": optim}, tmp_path) for optim in ("adamw_torch", "adamw_bnb_8bit"))
    student = plain.phases["stage 1"]["student, full"]
    for found in (plain, other):
        assert all(phase["activations"] < student / 2 for name, phase in found.phases.items() if name != "prompts")
    # Most of these layers are too small for 8 bits.
    assert other.phases["stage 1"][OPTIMIZER] < 0.6 * plain.phases["stage 1"][OPTIMIZER]
    assert plain.backbones == 2 and plain.backbone == plain.phases["stage 1"][NETWORK]
    assert [plain.total(n) - plain.total() for n in (2, 3)] == [0, plain.backbone]


@pytest.mark.parametrize(("optim", "least", "most"), [
    ("lion_32bit", 1, 1), ("lion_8bit", 0.25, 1), ("paged_adamw_8bit", 0.5, 2), ("adafactor", 0.05, 0.3),
    pytest.param("prodigy", 4, 4, marks=pytest.mark.skipif(find_spec("prodigyopt") is None, reason="not installed")),
])  # fmt: skip
def test_states_of_each_optimizer(
    folders: dict[str, Path], tmp_path: Path, optim: str, least: float, most: float
) -> None:
    """In units of the trained parameters, which are float32."""
    given = {
        "model": str(folders["sd3"]), "max_sequence_length": 5, "stage2_steps": 0, "resolution": 8, "fake_updates": 1,
        "per_device_train_batch_size": 1, "optim": optim, "lora_rank": 16, "fake_lora_rank": 16,
    }  # fmt: skip
    found = dry(given, tmp_path).phases["stage 1"]
    trained = found["student, LoRA"] + found["fake score, LoRA"]
    assert least * trained <= found[OPTIMIZER] <= most * trained + 1000  # some numbers of a parameter each


@pytest.mark.parametrize("full", [[], ["student"], ["student", "fake score"]])
def test_what_processes_share_is_counted_in_shares(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: list[str]
) -> None:
    """Of a full copy, the gradients and the optimizer's states, too."""
    given = {
        "model": str(folders["sd3"]), "max_sequence_length": 5, "full_finetune": bool(full), "stage2_steps": 0,
        "resolution": 8, "per_device_train_batch_size": 1, "gradient_checkpointing": True, "ema_decay": 0.9,
    } | ({"fake_score": "full"} if "fake score" in full else {"fake_lora_rank": 1})  # fmt: skip
    alone = dry(given, tmp_path).phases["stage 1"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = dry(given | {"shard": "all"}, tmp_path)
    shared = found.phases["stage 1"]
    divided = [NETWORK, *(f"{role}, full" for role in full), *([AVERAGE, OPTIMIZER] if full else [])]
    for name in divided:
        assert alone[name] / 8 <= shared[name] < alone[name] / 4  # buffers and adapters are whole
    for name in alone.keys() - set(divided) - {GRADIENTS, "activations"}:
        assert shared[name] == alone[name]
    # Two blocks of 2, what is in none, and the gradients of one.
    network = alone["student, full" if full else NETWORK]
    assert network * 0.8 < shared[GATHERED] < network * (1.6 if full else 1.01)
    if full:
        assert shared.get(GRADIENTS, 0) < alone[GRADIENTS] / 4
    assert found.backbone == shared[NETWORK] and "network shared by 8" in found.what


def test_states_of_8_bits() -> None:
    large, small = (nn.Parameter(torch.empty(n, device="meta")) for n in (5000, 4000))
    optimizer = Blockwise([large, small], 2, 1)
    for parameter in (large, small):
        parameter.grad = torch.zeros_like(parameter)
    with Meter() as meter:
        meter.label("there", [large, small, large.grad, small.grad])
        for _ in range(2):
            optimizer.step()
        assert meter.now["activations"] == meter.peak["activations"] == 2 * (5000 + 4 * 20 + 4 * 4000)


@pytest.mark.parametrize("more", [{}, {"prompt_cache": "off"}, {"dataset_streaming": True}], ids=str)
def test_text_encoders_go_before_training_where_all_prompts_are_known(
    folders: dict[str, Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    given = {"model": str(folders["sd3"]), "prompts": str(tmp_path / "prompts.txt"), "max_sequence_length": 5}
    found = dry(given | {"stage2_steps": 0} | more, tmp_path)
    assert ("prompts" in found.phases) == (not more)
    assert more or list(found.phases["prompts"]) == [ENCODERS, "activations"]
    held = [phase.get(ENCODERS, 0) for phase in found.phases.values()]
    assert [size > 4 * found.parameters[ENCODERS] for size in held] == ([True, True] if more else [True, False, False])


def test_states_of_a_language_model_are_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    """The pipeline reads some layers', but has all of them at once, and keys, values and logits beside them."""
    found = dry({"model": str(folders["flux2-klein"]), **FAMILIES["flux2-klein"].settings}, tmp_path)
    config = json.loads((folders["flux2-klein"] / "text_encoder" / "config.json").read_text())
    layers, memory = config["num_hidden_layers"], 2 * config["num_key_value_heads"] * config["head_dim"]
    numbers = (layers + 1) * config["hidden_size"] + layers * memory + config["vocab_size"]
    tokens = BATCH * FAMILIES["flux2-klein"].settings["max_sequence_length"]
    assert found.phases["prompts"]["activations"] > numbers * tokens * 4


# --- As on a GPU ------------------------------------------------------------------------------------------------------


def tiny_sd3() -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    network = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=32, joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64,
        pos_embed_max_size=32, qk_norm="rms_norm",
    )  # fmt: skip
    return network, {
        "hidden_states": (2, 4, 16, 16), "encoder_hidden_states": (2, 20, 64), "pooled_projections": (2, 64),
    }  # fmt: skip


def tiny_unet() -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    network = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8,
    )  # fmt: skip
    return network, {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 20, 32)}


def saved_bytes(build: Callable[[], Any], device: str) -> int:
    """Of a bfloat16 network with a float32 adapter: what its forward pass keeps, without parameters."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            network, shapes = build()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device(device):
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        roles = LoRARoles(
            network, roles=("student",), rank={"student": 4}, alpha={"student": 8.0}, target_modules=targets
        )
        inputs = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        inputs["timestep"] = torch.empty(2)
    if device == "meta":
        network.to(device)
    own = {id(parameter.untyped_storage()) for parameter in network.parameters()}
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            seen[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = roles("student", **inputs, return_dict=False)[0]
    assert output.dtype == torch.bfloat16
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("build", [tiny_sd3, tiny_unet])
def test_autocast_is_that_of_cuda(build: Callable[[], Any]) -> None:
    """PyTorch's own autocast of CUDA, on its fake CUDA tensors, keeps as many bytes, to the byte."""
    with GPUKernels(), torch.autocast("cpu", torch.bfloat16):
        ours = saved_bytes(build, "meta")

    def fused(*tensors: Tensor, **options: Any) -> Tensor:  # what a GPU takes, and fake tensors do not
        named = {key: value.bfloat16() if isinstance(value, Tensor) else value for key, value in options.items()}
        return attention(*(tensor.bfloat16() for tensor in tensors), **named)

    try:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module),  # refused by fake tensors
            mock.patch.object(F, "scaled_dot_product_attention", fused),
        ):
            assert saved_bytes(build, "cuda") == ours
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("mode", ["no_grad", "checkpointed", "plain"])
def test_autocast_keeps_what_it_casts_of_trained_weights(mode: str) -> None:
    """Of all layers until it ends, also where no graph needs them: as PyTorch's own on the CPU, within 3 %."""

    def passes(device: str, context: AbstractContextManager[None]) -> Callable[[], None]:
        with torch.device(device):
            layers, x = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6))), torch.ones(4, 512)

        def run() -> None:
            y = x
            with torch.set_grad_enabled(mode != "no_grad"), context:
                for layer in layers:
                    y = checkpoint(layer, y, use_reentrant=False) if mode == "checkpointed" else layer(y)
            if mode != "no_grad":
                y.float().sum().backward()

        return run

    with Meter() as meter, GPUKernels():
        forward = passes("meta", autocast(torch.bfloat16))
        there = meter.now["activations"]
        meter.restart()
        forward()
    allocated = highest(passes("cpu", torch.autocast("cpu", torch.bfloat16)))
    assert meter.peak["activations"] - there == pytest.approx(allocated, rel=0.03)


@pytest.mark.parametrize(
    ("width", "dtype", "masked"),
    [(64, torch.bfloat16, False), (64, torch.float32, False), (512, torch.bfloat16, False), (64, torch.bfloat16, True)],
)
def test_attention_keeps_no_matrix_of_all_pairs(width: int, dtype: torch.dtype, masked: bool) -> None:
    length, pair = 1024, 1024 * 1024 * dtype.itemsize
    with Meter() as meter, GPUKernels():
        query = torch.empty(1, 1, length, width, device="meta", dtype=dtype, requires_grad=True)
        mask = torch.empty(1, 1, 1, length, device="meta", dtype=torch.bool) if masked else None
        out = F.scaled_dot_product_attention(query * 1, query * 1, value=query * 1, attn_mask=mask)
        assert sum(meter.now.values()) < 5.2 * query.nbytes
        (grad,) = torch.autograd.grad(out.sum(), query)
        assert grad.shape == query.shape
    assert sum(meter.peak.values()) < 12 * query.nbytes and (width > 64 or sum(meter.peak.values()) < pair + 2**20)


def test_the_meter_counts_storages_while_they_live() -> None:
    with Meter() as meter:
        a = torch.empty(1000, device="meta")
        b = a.view(10, 100)[2:4]
        assert meter.now == {"activations": 4000}
        meter.label("kept", [b])
        c = a + 1
        del c
        assert +meter.now == {"kept": 4000} and meter.peak == {"kept": 4000, "activations": 4000}
        assert a.sum().item() == 1 and bool((a > 0).any())


def test_the_meter_remembers_whole_numbers() -> None:
    with Meter():
        lengths = torch.tensor([3, 5, 7])
        meta = lengths.to("meta")
        lengths.zero_()
        assert meta[1:].tolist() == [5, 7] and meta[2].item() == 7
        assert torch.arange(10)[3:6].to("meta").tolist() == [3, 4, 5]
        assert torch.arange(6).view(2, 3).t().to("meta").tolist() == [[0, 3], [1, 4], [2, 5]]
        meta[0].add_(1)
        assert meta.tolist() == [0, 0, 0] and meta[0].item() == 1  # as if it had never had any


# --- The command ------------------------------------------------------------------------------------------------------


def test_a_recipe_is_tried_without_weights_or_prompts(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its `architecture` lies beside the YAML; nothing is written."""
    recipe, elsewhere = tmp_path / "recipe", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in folders["sd3"].rglob("*.json"):
        copy = recipe / "architecture" / file.relative_to(folders["sd3"])
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not file.name.endswith("index.json") or file.parent == folders["sd3"]:
            copy.write_text(file.read_text())
    values = {"architecture": "architecture", "lora_rank": 4, "mixed_precision": "bf16", "stage2_steps": 0}
    (recipe / "run.yaml").write_text(json.dumps(values))
    monkeypatch.chdir(elsewhere)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dmdr-train", "--config", str(recipe / "run.yaml"), *arguments])
        with pytest.raises(SystemExit) as end:
            train.main()
        return int(end.value.code or 0), *capsys.readouterr()

    code, out, err = call("--dry_run")
    assert code == 0, err
    lines = out.strip().splitlines()
    assert lines[0].startswith("model: ") and any(line.startswith("stage 1: ") for line in lines)
    assert any(line.endswith("16 px, batch 4, bfloat16, one process") for line in lines)
    assert lines[-1] == "nothing was loaded, nothing was written"
    totals = [float(re.findall(r"\d+\.\d\d", line)[0]) for line in lines if re.match("total|with . backbones", line)]
    assert len(totals) == 3 and totals == sorted(totals)
    assert call()[::2] == (2, "dmdr-train: --model is missing: this recipe does not name a model\n")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model": "digits", "rl": "none"},
            "--dry_run does not build --model digits: give a folder with --architecture",
        ),
        ({"architecture": "/no/where"}, r"--architecture /no/where is no pipeline folder \(no model_index.json\)"),
        ({"rl": "refl", "reward": "none"}, "--rl refl reads a reward: name one with --reward"),
        ({"lora_target_modules": ["nothing"]}, "--lora_target_modules: .* has no nothing"),
        ({"resolution": 64}, "--resolution|pos_embed_max_size"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    folders: dict[str, Path], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    own = {} if "model" in given or "architecture" in given else {"model": str(folders["sd3"])}
    with pytest.raises(ConfigError, match=message) as refused:
        dry(own | given, tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_rewards_share_the_decoder_if_they_are_told_to(folders: dict[str, Path], tmp_path: Path) -> None:
    """A recipe's small one stands in for --reward_vae, but for `none`."""
    copy = Path(shutil.copytree(folders["sd3"], tmp_path / "model"))
    layers = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    layers |= {"decoder_block_out_channels": (8, 8), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(latent_channels=4, **layers).save_pretrained(copy / "reward_vae")
    given = {"model": str(copy), "rl": "refl", "stage1_steps": 0}
    small, shared = (dry(given | {"reward_vae": name}, tmp_path) for name in ("hub/name", "none"))
    assert small.phases["stage 2"]["VAE of the rewards"] > 0
    assert "VAE of the rewards" not in shared.phases["stage 2"]


def test_the_toy_is_built_too() -> None:
    said = "--dry_run does not build --model toy: give a folder with --architecture"
    with pytest.raises(ConfigError, match=said):
        estimate(parse(settings={"model": "toy", "dry_run": True}))


def test_a_configuration_that_cannot_run_is_refused_in_a_line(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["sd3"], tmp_path / "model"))
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"caption_projection_dim": 7}))
    with pytest.raises(
        ConfigError, match="--dry_run cannot run these settings without weights: RuntimeError"
    ) as refused:
        dry({"model": str(copy)}, tmp_path)
    assert "\n" not in str(refused.value)


def test_files_that_options_name_are_looked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--teacher_lora gone\.safetensors: no such file or folder$"):
        dry({"model": str(folders["sd3"]), "teacher_lora": "gone.safetensors"}, tmp_path)


@pytest.mark.parametrize("recipe", ["sdxl/1step_stage1", "sdxl/1step_refl"])
def test_a_recipes_published_weights_need_not_be_there(recipe: str) -> None:
    root = Path(dmdr.__file__).parents[1]
    with mock.patch("dmdr.dry_run.estimate._simulated", lambda job, sizes: job.backend.options.student_weights):
        assert estimate(parse(["--config", str(root / f"examples/{recipe}.yaml"), "--dry_run"])) is None


def test_a_student_to_start_from_is_looked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--init_student .*/nowhere is no checkpoint"):
        dry({"model": str(folders["sd3"]), "init_student": str(tmp_path / "nowhere")}, tmp_path)


def test_from_python_there_is_no_run_to_return(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="works on the command line only"):
        dmdr.train(model=str(folders["sd3"]), dry_run=True)


def test_config_yaml_does_not_hold_it(folders: dict[str, Path]) -> None:
    place = str(folders["sd3"])
    settings = parse(settings={"model": place, "architecture": place, "dry_run": True})
    assert not {"dry_run", "architecture"} & set(settings.as_yaml().replace(":", " ").split())


def test_rewards_networks_are_counted(folders: dict[str, Path], digits: Digits, tmp_path: Path) -> None:
    """Their weights to the byte, beside one that cannot be built without weights."""
    checkpoint = str(digits.reward_checkpoint("pickscore"))
    given = {"model": str(folders["sd3"]), "max_sequence_length": 5, "rl": "refl", "reward": "pickscore+toy"}
    given |= {"eval_benchmark": "ocr", "num_eval_samples": 4}
    found = dry(given | {"pickscore_checkpoint": checkpoint, "reward_dtype": "bf16"}, tmp_path)
    reward = registry.load("rewards", "pickscore")(checkpoint=checkpoint)
    reward.prepare(torch.device("cpu"), torch.bfloat16)
    network = reward.towers._model
    loaded = sum(t.nbytes for t in {id(t): t for t in (*network.parameters(), *network.buffers())}.values())
    assert [peak["rewards"] for phase, peak in found.phases.items() if phase != "prompts"] == [loaded] * 3
    assert found.uncounted == ["reward toy", "benchmark ocr"] and "benchmark ocr" in str(found)


def test_torchs_own_attention_layer_keeps_no_weights_of_tokens() -> None:
    """Its inner functions are seen by no mode; open_clip's networks are made of it."""
    layer = nn.MultiheadAttention(32, 2, batch_first=True, device="meta")
    x = torch.empty(1, 1000, 32, device="meta", requires_grad=True)
    with Meter() as meter, GPUKernels():
        meter.restart()
        layer(x, x, x, need_weights=False)[0]
    assert sum(meter.peak.values()) < 1000 * 1000 * 4


def test_further_backbones_are_frozen_copies() -> None:
    found = Estimate({}, "", {}, {"prompts": {"a": 18}, "stage 1": {"network, frozen": 10, "activations": 5}}, 1, 10)
    assert [found.total(n) for n in (None, 1, 2, 3)] == [18, 18, 25, 35]


@pytest.mark.verify
def test_the_numbers_of_the_guide() -> None:
    """Of its recipe that takes least time to estimate."""
    root = Path(dmdr.__file__).parents[1]
    recipe = parse(["--config", str(root / "examples/sit/stage2.yaml"), "--dry_run"])
    found = estimate(recipe)
    guide = (root / "examples" / "guides" / "memory.md").read_text()
    row = next(line for line in guide.splitlines() if line.startswith("| `sit/stage2`"))
    assert [f"{found.total(n) / 2**30:.1f}" for n in (2, 3)] == [cell.strip() for cell in row.split("|")[5:7]]


@pytest.mark.parametrize(
    ("stand_in", "protocols"),
    [
        (Bridge(SimpleNamespace(feature_widths=(), sizes=(), latent_shapes=()), Meter()), BACKENDS),  # type: ignore[arg-type]
        (MetaLatentReward(DiNa()), (Reward, LatentReward)),
    ],
)
def test_stand_ins_are_what_they_stand_for_in_every_python(stand_in: object, protocols: tuple[type, ...]) -> None:
    """From Python 3.12 on, `isinstance` with a protocol looks at what is written, and not at `__getattr__`."""
    for protocol in protocols:
        members = {name for name in vars(protocol) if not name.startswith("_")} | protocol.__annotations__.keys()
        for name in members:
            inspect.getattr_static(stand_in, name)
