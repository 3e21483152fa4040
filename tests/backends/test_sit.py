"""What is SiT's own: the network against the papers' equations, published checkpoints, labels, and named models."""

import json
import math
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import parts
import sit
from dmdr import train
from dmdr.cli import sample
from dmdr.errors import ConfigError
from dmdr.run.job import assemble
from dmdr.settings import registry
from dmdr.settings.models import pipeline_class
from dmdr.settings.parse import parse
from dmdr_digits import Digits
from dmdr_sit import SiTBackend
from dmdr_sit.checkpoint import SIZES, convert, pipeline_folder, published_layout
from dmdr_sit.pipeline import SiTPipeline, SiTTransformer2DModel, class_index, sincos_2d
from family import refuses_unread

# Parameters of the authors' release as it counts them: with its eight output channels and the position embeddings.
PARAMETERS = {"sit-s-2": 32_963_360, "sit-b-2": 130_512_416, "sit-l-2": 458_102_816, "sit-xl-2": 675_129_632}


# --- The network ------------------------------------------------------------------------------------------------------


def reference(weights: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor, heads: int) -> Tensor:
    """A DiT with adaLN-Zero blocks (Peebles & Xie 2022, figure 3), patches of 2 x 2, one sample and head at a time."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normal(value: Tensor) -> Tensor:
        mean, variance = value.mean(-1, keepdim=True), value.var(-1, keepdim=True, correction=0)
        return (value - mean) / (variance + 1e-6).sqrt()

    def silu(value: Tensor) -> Tensor:
        return value / (1 + (-value).exp())

    def gelu(value: Tensor) -> Tensor:  # the approximation of Hendrycks & Gimpel 2016
        return value / 2 * (1 + (math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)).tanh())

    def attention(name: str, value: Tensor) -> Tensor:
        width = value.shape[-1]
        size, qkv = width // heads, linear(f"{name}.qkv", value)
        out = []
        for head in range(heads):
            q, k, v = (qkv[:, i * width + head * size : i * width + (head + 1) * size] for i in range(3))
            out.append((q @ k.T / math.sqrt(size)).softmax(-1) @ v)
        return linear(f"{name}.proj", torch.cat(out, -1))

    outputs = []
    for latents, time, y in zip(x, t, label, strict=True):
        side = latents.shape[-1]
        cells = [(i, j) for i in range(0, side, 2) for j in range(0, side, 2)]
        kernel = weights["x_embedder.proj.weight"].flatten(1)
        patches = torch.stack([latents[:, i : i + 2, j : j + 2].flatten() for i, j in cells])
        tokens = patches @ kernel.T + weights["x_embedder.proj.bias"] + weights["pos_embed"][0]
        angles = time * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        c = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
        c = linear("t_embedder.mlp.2", silu(c)) + weights["y_embedder.embedding_table.weight"][y]
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        for i in range(depth):
            block = f"blocks.{i}"
            b1, g1, a1, b2, g2, a2 = linear(f"{block}.adaLN_modulation.1", silu(c)).chunk(6)
            tokens = tokens + a1 * attention(f"{block}.attn", (1 + g1) * normal(tokens) + b1)
            hidden = gelu(linear(f"{block}.mlp.fc1", (1 + g2) * normal(tokens) + b2))
            tokens = tokens + a2 * linear(f"{block}.mlp.fc2", hidden)
        shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).chunk(2)
        tokens = linear("final_layer.linear", (1 + scale) * normal(tokens) + shift)
        output = torch.zeros(tokens.shape[-1] // 4, side, side, dtype=torch.float64)
        for (i, j), token in zip(cells, tokens, strict=True):
            output[:, i : i + 2, j : j + 2] = token.view(2, 2, -1).permute(2, 0, 1)
        outputs.append(output)
    return torch.stack(outputs)


def test_the_network_is_the_papers() -> None:
    torch.manual_seed(0)
    x, t = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    label = torch.tensor([3, 10, 0])  # the second is the null label
    repa = sit.network(num_layers=3).double()
    weights = repa.state_dict()
    torch.testing.assert_close(repa(x, t, label).sample, reference(weights, x, t, label, 2), rtol=0, atol=1e-10)
    authors = sit.network(learn_sigma=True, noise_at_zero=True).double()
    expected = -reference(authors.state_dict(), x, 1 - t, label, 2)[:, :4]
    torch.testing.assert_close(authors(x, t, label).sample, expected, rtol=0, atol=1e-10)


def test_positions_are_those_of_a_grid() -> None:
    """Columns in the first half, rows in the second; each sin, then cos, at frequencies 10000^(-k / (D / 4))."""
    found = sincos_2d(3, 16)
    for cell, vector in enumerate(found):
        row, column = divmod(cell, 3)
        expected = [
            turn(place * 10000 ** (-k / 4))
            for place in (column, row)
            for turn in (math.sin, math.cos)
            for k in range(4)
        ]
        torch.testing.assert_close(vector, torch.tensor(expected))


@pytest.mark.parametrize("size", SIZES)
def test_names_and_numbers_of_parameters(size: str) -> None:
    with torch.device("meta"):
        network = SiTTransformer2DModel(**SIZES[size], learn_sigma=True, noise_at_zero=True)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == PARAMETERS[size]
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += ["final_layer.adaLN_modulation.1"]
    for i in range(SIZES[size]["num_layers"]):
        layers += [f"blocks.{i}.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]
    names = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert network.state_dict().keys() == names | {"pos_embed", "y_embedder.embedding_table.weight"}
    width = SIZES[size]["num_attention_heads"] * SIZES[size]["attention_head_dim"]
    assert network.pos_embed.shape == (1, 256, width)
    assert network.y_embedder.embedding_table.weight.shape == (1001, width)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def hollow(size: str, **config: Any) -> dict[str, Tensor]:
    """A state of this size whose tensors are one number each, so that its file is small."""
    with torch.device("meta"):
        network = SiTTransformer2DModel(**SIZES[size], **config)
    return {
        name: torch.tensor(i + 1.0).expand(tensor.shape)
        for i, (name, tensor) in enumerate(network.state_dict().items())
    }


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def same(network: nn.Module, state: dict[str, Tensor]) -> bool:
    own = network.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], tensor) for name, tensor in state.items())


def test_checkpoints_of_repa_and_of_the_authors(tmp_path: Path) -> None:
    state = hollow("sit-s-2")
    projectors = {"projectors.0.0.weight": torch.zeros(2, 2), "projectors.0.0.bias": torch.zeros(2)}
    other = {name: -tensor for name, tensor in state.items()}
    training = {"model": other, "ema": state | projectors, "opt": {"step": 1}, "args": Namespace(lr=1e-4), "steps": 7}
    for content in (training, state, state | projectors):
        network = convert("sit-s-2", saved(tmp_path / "last.pt", content))
        assert same(network, state) and not network.config.learn_sigma and not network.config.noise_at_zero
    first = {}
    for name, tensor in state.items():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        first[name.replace(f"blocks.{block}", f"decoder_blocks.{block - 8}", 1) if block >= 8 else name] = tensor
    assert "decoder_blocks.3.attn.qkv.weight" in first
    assert {name: float(t.flatten()[0]) for name, t in published_layout(first).items()} == {
        name: float(t.flatten()[0]) for name, t in state.items()
    }
    authors = hollow("sit-s-2", learn_sigma=True)
    network = convert("sit-s-2", saved(tmp_path / "authors.pt", authors))
    assert same(network, authors) and network.config.learn_sigma and network.config.noise_at_zero


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    state = hollow("sit-s-2")
    file = tmp_path / "last.pt"
    lacking = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.11.mlp")}
    saved(file, lacking | {"blocks.0.attn.q_norm.weight": torch.ones(64)})
    with pytest.raises(ConfigError, match=r"last\.pt as sit-s-2 does not fit.*4 missing \(blocks\.11\.mlp\.fc1") as e:
        convert("sit-s-2", file)
    assert "1 unexpected (blocks.0.attn.q_norm.weight)" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="of another shape"):
        convert("sit-b-2", saved(file, state))
    for content in ({"ema": {}}, {"steps": 3}, [1, 2]):
        with pytest.raises(ConfigError, match="holds no state dict"):
            convert("sit-s-2", saved(file, content))
    file.write_bytes(b"PK nothing")
    with pytest.raises(ConfigError, match="is damaged"):
        convert("sit-s-2", file)


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('code of a pickle was run')",)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    for content in ({"ema": Harmful()}, {"ema": hollow("sit-s-2"), "args": Namespace(lr=Harmful())}):
        with pytest.raises(ConfigError, match="holds more than tensors, which DMDR does not load"):
            convert("sit-s-2", saved(tmp_path / "last.pt", content))


def test_a_named_model_needs_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.registered("models", "sit-xl-2:some/file.pt") == "sit-xl-2"
    assert registry.registered("models", "some/sit-xl-2") is None
    with pytest.raises(ConfigError, match="needs a checkpoint: --model sit-xl-2:PATH"):
        parse(settings={"model": "sit-xl-2"})
    settings = parse(settings={"model": f"sit-xl-2:{tmp_path / 'none.pt'}", "rl": "refl", "reward": "toy"})
    assert settings.family.options["full_finetune"] and settings.config.rl_weight == 0.05
    with pytest.raises(ConfigError, match=r"none\.pt is no file"):
        assemble(settings)
    monkeypatch.setenv("DMDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dmdr_sit.checkpoint.PUBLISHED_VAE", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"or put the VAE beside last\.pt, as .*vae"):
        pipeline_folder("sit-s-2", saved(tmp_path / "last.pt", hollow("sit-s-2")))


def test_a_checkpoint_is_trained_sampled_and_taken_for_a_model_again(
    tmp_path: Path, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SiT-S/2 at its full size, towards the DINOv2 reward of its labels."""
    classifier = str(digits.reward_checkpoint("dinov2"))
    monkeypatch.setenv("DMDR_CACHE", str(tmp_path / "cache"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = SiTTransformer2DModel(**SIZES["sit-s-2"])
        parts.vae(scaling_factor=0.18215).save_pretrained(tmp_path / "vae")
    save_file(teacher.state_dict(), tmp_path / "repa.safetensors")
    rows = [{"prompt": f"digit {label}", "label": label} for label in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = f"sit-s-2:{tmp_path / 'repa.safetensors'}"
    output = train(
        model=model, prompts=str(tmp_path / "prompts.jsonl"), rl="refl", reward="dinov2", dinov2_checkpoint=classifier,
        full_finetune=False, stage1_steps=1, stage2_steps=1, dyna_steps=1, fake_updates=1, lora_rank=4,
        fake_lora_rank=4, per_device_train_batch_size=2, sample_images=1, sample_steps=0, teacher_steps=1,
        report_to="none", output_dir=str(tmp_path / "run"), logging_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(math.isfinite(line["loss/dmd"]) for line in lines)
    assert lines[1]["reward/dinov2"] < 0 and math.isfinite(lines[1]["loss/refl"])

    sample.run([str(output), "--prompt", "class 207", "--prompt", "class 3", "--output_dir", str(tmp_path / "images")])
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    weights = output / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
    again, student = convert("sit-s-2", weights), load_file(weights)
    assert same(again, student)
    moved = {name for name, tensor in teacher.state_dict().items() if not torch.equal(tensor, student[name])}
    assert moved == {f"blocks.{i}.attn.{layer}.weight" for i in range(12) for layer in ("qkv", "proj")}
    assert pipeline_class(str(output / "student")) == "SiTPipeline"  # the export is a teacher's folder, too
    shutil.rmtree(tmp_path)


# --- Labels -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sit.build(path)
    return path


@pytest.fixture(scope="module")
def backend(folder: Path) -> SiTBackend:
    backend = SiTBackend(str(folder), SiTBackend.Options())
    backend.prepare(Accelerator(cpu=True), roles=("student", "fake_score"))
    return backend


def test_labels_come_from_their_column_or_from_the_prompt(backend: SiTBackend) -> None:
    assert backend.encode(["class 7", "3"]).tensors["label"].tolist() == [7, 3]
    assert backend.encode(["a goose", "class 3"], label=[9, None]).tensors["label"].tolist() == [9, 3]
    with pytest.raises(
        ConfigError, match="there is no column 'label', so each prompt must be a class: 'a goose' is no class"
    ):
        backend.encode(["class 7", "a goose"])
    for label in (10, -1, "ten", 1.5):
        with pytest.raises(ConfigError, match=r"column 'label': .* is no class; give one of 0 \.\. 9"):
            backend.encode(["class 7"], label=[label])
    assert class_index(torch.tensor(5).item(), 10) == 5
    assert backend.text.cache is None
    backend.cache_prompts(backend.accelerator, ["class 7"])


def test_prompts_without_labels_are_refused_before_weights_are_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a goose\na swan")
    given = {"model": str(folder), "prompts": str(tmp_path / "prompts.txt"), "report_to": "none"}
    with pytest.raises(ConfigError, match="no column 'label', so each prompt must be a class: 'a goose' is no class"):
        assemble(parse(settings=given))
    (tmp_path / "prompts.txt").write_text("class 7")
    with pytest.raises(ConfigError, match=r"^--validation_prompts: there is no column .*: 'a goose' is no class"):
        assemble(parse(settings=given | {"validation_prompts": ["a goose"]}))


def test_guidance_leads_away_from_the_null_label(backend: SiTBackend) -> None:
    x_t, t = torch.randn(2, *backend.latent_shape), torch.tensor([0.3, 0.9], dtype=torch.float64)
    cond = backend.encode(["class 7", "class 2"])
    with torch.no_grad():
        c, u = (backend.roles.network(x_t, t, torch.tensor(y), return_dict=False)[0] for y in ([7, 2], [10, 10]))
    torch.testing.assert_close(backend.teacher(x_t, t, cond, guidance=0.0).value, u)
    torch.testing.assert_close(backend.teacher(x_t, t, cond, guidance=1.5).value, u + 1.5 * (c - u))
    assert not F.mse_loss(c, u).isclose(torch.tensor(0.0))


def test_a_merged_network_is_the_student(folder: Path) -> None:
    """Adapters of linear layers and of the convolution, at alpha / rank = 2."""
    targets = ("attn.qkv", "fc2", "x_embedder.proj", "final_layer.linear")
    backend = SiTBackend(str(folder), SiTBackend.Options(lora_rank=4, lora_alpha=8.0, lora_target_modules=targets))
    backend.prepare(Accelerator(cpu=True), roles=("student", "fake_score"))
    for parameter in backend.parameters("student").values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    network = sit.network()
    network.load_state_dict(backend.roles.merged("student"))
    x_t, t = torch.randn(2, *backend.latent_shape), torch.tensor([0.3, 0.9])
    cond = backend.encode(["class 7", "class 2"])
    with torch.no_grad():
        found, student = network(x_t, t, cond.tensors["label"]).sample, backend.student(x_t, t, cond).value
    torch.testing.assert_close(found, student, rtol=0, atol=1e-5)
    assert not torch.allclose(student, backend.teacher(x_t, t, cond).value, atol=1e-2)


def test_a_full_student_sums_up_in_float32(folder: Path) -> None:
    """As the published recipe does under autocast: position embeddings in bfloat16 would round the whole stream."""
    backend = SiTBackend(str(folder), SiTBackend.Options(full_finetune=True))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16", autocast=autocast)
    backend.prepare(accelerator, roles=("student", "fake_score"))
    student, streams = backend.roles.copies["student"], []
    student.blocks[-1].register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0].dtype))
    backend.student(torch.randn(2, *backend.latent_shape), torch.tensor([0.3, 0.9]), backend.encode(["3", "7"]))
    assert streams == [torch.float32]
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float32}


def test_options_that_do_not_fit_are_refused(folder: Path) -> None:
    for option, message in (
        ({"resolution": 32}, "--resolution 32 does not work with .*: give 16"),
        ({"resolution": 8}, "--resolution 8 does not work with .*: give 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            SiTBackend(str(folder), SiTBackend.Options(**option))
    refuses_unread(folder, "zero_empty_prompt", True)
    refuses_unread(folder, "max_sequence_length", 77)
    refuses_unread(folder, "drop_text_encoders", ["text_encoder"])
    refuses_unread(folder, "prompt_cache", "off")
    for option, message in (
        ({"attention_backend": "flash"}, "--attention_backend flash: diffusers ignores it"),
        ({"lora_target_modules": ("to_q",)}, "--lora_target_modules: a SiTTransformer2DModel has no to_q"),
    ):
        with pytest.raises(ConfigError, match=message):
            SiTBackend(str(folder), SiTBackend.Options(**option)).prepare(Accelerator(cpu=True), roles=("student",))


def test_the_stock_pipeline_knows_its_classes(folder: Path) -> None:
    pipe: SiTPipeline = sit.stock(folder)
    pipe.set_progress_bar_config(disable=True)
    drawn = [pipe(y, 2, generator=torch.Generator().manual_seed(0), output_type="pt").images for y in (7, "class 7")]
    assert torch.equal(drawn[0], drawn[1]) and drawn[0].shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="'class 10' is no class"):
        pipe("class 10")
