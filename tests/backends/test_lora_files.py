"""LoRA files of all origins: each tensor acts as it was trained, or the file is refused in one line."""

import json
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    QwenImagePipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import logging
from hypothesis import given, settings
from hypothesis.strategies import randoms
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flux
import flux2
import krea2
import qwen_image
import sd1
import sd3
import sdxl
import sit
import z_image
from dmdr import hub
from dmdr.backends.lora import deltas
from dmdr.backends.lora_files import read_lora
from dmdr.errors import ConfigError
from dmdr_sd3 import SD3Backend
from dmdr_sit.pipeline import SiTPipeline

NETWORKS: dict[str, tuple[Callable[[], Any], Any]] = {
    "sd1": (sd1.unet, StableDiffusionPipeline),
    "sdxl": (sdxl.unet, StableDiffusionXLPipeline),
    "sd3": (sd3.transformer, StableDiffusion3Pipeline),
    "flux": (flux.transformer, FluxPipeline),
    "z-image": (z_image.transformer, ZImagePipeline),
    "flux2-klein": (flux2.transformer, Flux2KleinPipeline),
    "qwen-image": (qwen_image.transformer, QwenImagePipeline),
    "krea2": (krea2.transformer, Krea2Pipeline),
    "sit": (sit.network, SiTPipeline),
}
# Names of a layer, of its two factors, and where its alpha may be.
LAYOUTS = {
    "diffusers": ("{part}.{module}", "lora_A", "lora_B", ("tensors", "settings", "nowhere")),
    "diffusers, network alone": ("{module}", "lora_A", "lora_B", ("tensors", "settings", "nowhere")),
    "diffusers, older": ("{part}.{module}", "lora.down", "lora.up", ("tensors", "nowhere")),
    "peft": ("base_model.model.{module}", "lora_A", "lora_B", ("tensors", "settings")),
    "peft, unsaved": ("{module}", "lora_A.default", "lora_B.default", ("tensors", "nowhere")),
    "kohya": ("lora_unet_{flat}", "lora_down", "lora_up", ("tensors", "header", "nowhere")),
    "onetrainer": ("lora_transformer_{flat}", "lora_down", "lora_up", ("tensors", "nowhere")),
    "lycoris": ("lycoris_{flat}", "lora_down", "lora_up", ("tensors", "nowhere")),
    "comfyui": ("diffusion_model.{module}", "lora_down", "lora_up", ("tensors", "header", "nowhere")),
    "comfyui, newer": ("diffusion_model.{module}", "lora_A", "lora_B", ("tensors", "nowhere")),
}
logging.set_verbosity_error()


@cache
def network(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name][0]().requires_grad_(False)


def weights(name: str) -> dict[str, Tensor]:
    """Of the modules that a LoRA may adapt."""
    modules = network(name).named_modules()
    return {module: m.weight for module, m in modules if isinstance(m, nn.Linear | nn.Conv2d)}


def factors(weight: Tensor, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, *weight.shape[1:], generator=generator)
    return a, torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)


def changed(path: Path, name: str) -> dict[str, Tensor]:
    """The modules that a file changes, with their new weights."""
    own = network(name).state_dict()
    adapter = read_lora(str(path), network(name), NETWORKS[name][1])
    return {key.removesuffix(".weight"): own[key] + delta for key, delta in deltas(adapter, own)}


def refusal(path: Path, name: str = "sd3") -> str:
    with pytest.raises(ConfigError) as error:
        changed(path, name)
    assert str(path.name) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# --- Any layout, any place of alpha, any gap --------------------------------------------------------------------------


def layer(layout: str, name: str, module: str) -> str:
    """A module's name in a file."""
    pipeline = NETWORKS[name][1]
    part = getattr(pipeline, "unet_name", None) or pipeline.transformer_name
    return LAYOUTS[layout][0].format(part=part, module=module, flat=module.replace(".", "_"))


def written(draw: random.Random, folder: Path, name: str) -> tuple[Path, dict[str, Tensor], dict[str, list[str]]]:
    """A LoRA file, its modules by the definition W + alpha / rank B A in float64, and the keys of each."""
    layout = draw.choice(list(LAYOUTS))
    _, down, up, places = LAYOUTS[layout]
    place, own = draw.choice(places), weights(name)
    rank, alpha, rooted = draw.randint(1, 4), draw.choice([0.5, 3.0, 16.0]), draw.random() < 0.3
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
    settings |= {"use_rslora": rooted, "target_modules": ["to_q"], "bias": "none", "peft_type": "LORA"}
    tensors, expected, keys = {}, {}, {}
    for module in draw.sample(sorted(own), draw.randint(1, 6)):
        r, strength = (rank, alpha) if place == "header" else (draw.choice([rank, 5]), draw.choice([alpha, 2.0]))
        settings["rank_pattern"][f"^{module}"], settings["alpha_pattern"][f"^{module}"] = r, strength
        a, b = (x.to(draw.choice([torch.float32, torch.bfloat16])) for x in factors(own[module], r, len(tensors)))
        scale = 1.0 if place == "nowhere" else strength / (r**0.5 if rooted and place == "settings" else r)
        delta = scale * b.double().flatten(1) @ a.double().flatten(1)
        expected[module] = own[module].double() + delta.view_as(own[module])
        if own[module][0].numel() == own[module].shape[1] and draw.random() < 0.3:
            a, b = a.flatten(1), b.flatten(1)  # a convolution of one pixel as a linear layer
        within = layer(layout, name, module)
        stored = {f"{within}.{down}.weight": a, f"{within}.{up}.weight": b}
        if place == "tensors":
            stored[f"{within}.alpha"] = torch.tensor(strength)
        keys[module] = list(stored)
        tensors |= stored
    header = {"ss_network_dim": f"{rank}", "ss_network_alpha": f"{alpha}"} if place == "header" else {}
    if place == "settings" and layout == "peft":
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    elif place == "settings":
        prefix = layer(layout, name, "")
        header["lora_adapter_metadata"] = json.dumps({f"{prefix}{key}": value for key, value in settings.items()})
    save_file(tensors, folder / "adapter_model.safetensors", header)
    return folder / "adapter_model.safetensors", expected, keys


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(draw=randoms(use_true_random=False))
def test_a_file_acts_in_full_or_is_refused(name: str, draw: random.Random) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        file, expected, keys = written(draw, folder, name)
        found = changed(file, name)
        assert found.keys() == expected.keys()
        for module, weight in found.items():
            assert (weight - expected[module]).abs().max() <= 1e-6 * expected[module].abs().max()
        with safe_open(file, "pt") as content:
            header = content.metadata()
        tensors = load_file(file)
        of_one = keys[draw.choice(list(keys))]
        gone = draw.choice(of_one)
        other = of_one[0].rpartition(".lora")[0]
        renamed = {key.replace(f"{other}.", f"{other}0."): tensor for key, tensor in tensors.items()}
        for damaged in ({key: tensor for key, tensor in tensors.items() if key != gone}, renamed):
            if len(damaged) > 2 or not gone.endswith("alpha"):  # the only alpha that is gone was never there
                save_file(damaged, file, header)
                refusal(file, name)


# --- Where alpha is ---------------------------------------------------------------------------------------------------


def saved(
    folder: Path, keys: Callable[[str], tuple[str, str]], name: str = "sd3", count: int = 8, **header: str
) -> Path:
    """A file of rank 4 without an alpha for the first modules of a network, with these names of the two factors."""
    tensors: dict[str, Tensor] = {}
    for module, weight in list(weights(name).items())[:count]:
        tensors |= dict(zip(keys(module), factors(weight, 4), strict=True))
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "lora.safetensors", header)
    return folder / "lora.safetensors"


def of_diffusers(module: str) -> tuple[str, str]:
    return f"transformer.{module}.lora_A.weight", f"transformer.{module}.lora_B.weight"


def of_kohya(module: str) -> tuple[str, str]:
    flat = module.replace(".", "_")
    return f"lora_unet_{flat}.lora_down.weight", f"lora_unet_{flat}.lora_up.weight"


@pytest.mark.parametrize("keys", [of_diffusers, of_kohya])
def test_alpha_in_a_trainers_header(keys: Any, tmp_path: Path) -> None:
    whole = changed(saved(tmp_path, keys), "sd3")
    fourth = changed(saved(tmp_path, keys, ss_network_alpha="1", ss_network_dim="4"), "sd3")
    for module, weight in fourth.items():
        base = weights("sd3")[module]
        torch.testing.assert_close(weight - base, (whole[module] - base) / 4)


@pytest.mark.parametrize(
    ("keys", "header", "said"),
    [
        (of_kohya, {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, "ss_network_alpha = Dynamic"),
        (of_kohya, {"ss_network_alpha": "1", "ss_network_dim": "8"}, "ss_network_dim = 8"),
        (
            of_kohya,
            {"ss_network_alpha": "1", "ss_network_dim": "4", "ss_network_args": '{"conv_alpha": "2"}'},
            '"conv_alpha"',
        ),
        (  # what Kohya's own converter leaves: alpha is in the header and in the factors
            of_diffusers,
            {"ss_network_alpha": "1", "ss_network_dim": "4", "ss_network_module": "networks.lora_flux"},
            "was converted from a file of Kohya's scripts",
        ),
        (of_diffusers, {"alpha": "8"}, "has alpha = 8 in its header"),
    ],
)
def test_a_header_that_leaves_the_strength_open(keys: Any, header: dict[str, str], said: str, tmp_path: Path) -> None:
    assert said in refusal(saved(tmp_path, keys, **header))


@pytest.mark.parametrize("whole", [True, False])
def test_settings_that_diffusers_writes(whole: bool, tmp_path: Path) -> None:
    """Of a pipeline, or of the network alone; with another rank and alpha in some layers."""
    net = deepcopy(network("sd3"))
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 6},
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    net.add_adapter(config)
    if whole:
        StableDiffusion3Pipeline.save_lora_weights(
            tmp_path, get_peft_model_state_dict(net), **_collate_lora_metadata({"transformer": net})
        )
    else:
        net.save_lora_adapter(tmp_path, "default")
    found = changed(tmp_path, "sd3")
    net.fuse_lora()
    assert len(found) == 4
    for module, weight in found.items():
        torch.testing.assert_close(weight, net.get_submodule(module).base_layer.weight)


# --- PEFT's folders ---------------------------------------------------------------------------------------------------


def peft_folder(folder: Path, config: Any) -> tuple[Any, Path]:
    """A Stable Diffusion 3 adapted by PEFT, and the folder that it saves."""
    adapted = get_peft_model(deepcopy(network("sd3")), config)
    adapted.save_pretrained(folder)
    return adapted, folder


def test_a_folder_of_peft(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "proj_out"], rank_pattern={"to_k": 2},
        alpha_pattern={"proj_out": 1}, use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    adapted, folder = peft_folder(tmp_path, config)
    whole = adapted.merge_and_unload().state_dict()
    for path in (folder, folder / "adapter_model.safetensors"):
        found = changed(path, "sd3")
        assert len(found) == 5
        for module, weight in found.items():
            torch.testing.assert_close(weight, whole[f"{module}.weight"])
    (folder / "adapter_config.json").unlink()
    assert refusal(folder).endswith(
        "was saved by PEFT, which keeps alpha in adapter_config.json: put that file into the same folder"
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(target_modules=["to_q"], use_dora=True), "use_dora: True"),
        (LoraConfig(target_modules=["to_q"], bias="lora_only"), "bias: lora_only"),
        (LoraConfig(target_modules=["to_q"], lora_bias=True), "lora_bias: True"),
        (LoraConfig(target_modules=["to_q"], modules_to_save=["proj_out"]), "modules_to_save: ['proj_out']"),
        (LoraConfig(target_modules=["to_q"], init_lora_weights="pissa"), "init_lora_weights: pissa"),
        (LoHaConfig(target_modules=["to_q"]), "is a LOHA"),
        (IA3Config(target_modules=["to_q"], feedforward_modules=[]), "is a IA3"),
    ],
)
def test_a_folder_of_peft_with_more_than_a_lora(config: Any, said: str, tmp_path: Path) -> None:
    line = refusal(peft_folder(tmp_path, config)[1])
    assert said in line and line.endswith(": merge it into the model first")


def test_settings_of_another_file(tmp_path: Path) -> None:
    _, folder = peft_folder(tmp_path, LoraConfig(r=4, target_modules=["to_q"]))
    given = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(given | {"r": 8}))
    assert "has rank 4 in base_model.model.transformer_blocks.0.attn.to_q, but its settings say rank 8" in refusal(
        folder
    )
    (folder / "adapter_config.json").write_text("{")
    assert "has settings (adapter_config.json) that cannot be read" in refusal(folder)


# --- What is damaged, of another model, or no LoRA --------------------------------------------------------------------


def test_layers_that_no_module_has(tmp_path: Path) -> None:
    file = saved(tmp_path, lambda module: of_diffusers(module.replace("blocks.1", "blocks.7")), count=40)
    lost = [module for module in weights("sd3") if "blocks.1" in module]
    first = min(lost).replace("blocks.1", "blocks.7")
    line = refusal(file)
    assert (
        "is damaged, is for another model, or must first be converted" in line
        and f" has no transformer.{first}, " in line
    )
    assert f"({len(lost)} of its {len(weights('sd3'))} layers)" in line


@pytest.mark.parametrize(
    ("key", "tensor", "said"),
    [
        ("{0}.lora_magnitude_vector", [1.0], "is a DoRA ({key}): merge it into the model first"),
        ("{0}.dora_scale", [[1.0]], "is a DoRA ({key}): merge it into the model first"),
        ("{0}.hada_w1_a", [[1.0]], "is a LoHa ({key}): merge it into the model first"),
        ("{0}.lokr_w1", [[1.0]], "is a LoKr ({key}): merge it into the model first"),
        (
            "{0}.lora_mid.weight",
            [[1.0]],
            "is a LoRA with a third factor (Tucker) ({key}): merge it into the model first",
        ),
        ("{0}.lora_B.bias", [1.0], "is a LoRA with biases ({key}): merge it into the model first"),
        ("{0}.diff_b", [1.0], "is a LoRA with biases ({key}): merge it into the model first"),
        ("{0}.diff", [1.0], "is more than a LoRA ({key}): merge it into the model first"),
        (
            "text_encoder.x.lora_A.weight",
            [[1.0]],
            "also adapts a text encoder ({key}), which DMDR does not change: remove",
        ),
        (
            "lora_te1_x.lora_down.weight",
            [[1.0]],
            "also adapts a text encoder ({key}), which DMDR does not change: remove",
        ),
        (
            "{0}.lora_A.other.weight",
            [[1.0]],
            "holds two adapters ({key}, {0}.lora_A.weight): remove one of them from the file",
        ),
        ("x.alpha", [1.0], "is damaged: {key} has no matching lora_A or lora_down"),
        ("{0}.alpha", [[0.0]], "is damaged: {key} is no number above 0"),
        ("{0}.alpha", [1.0, 2.0], "is damaged: {key} is no number above 0"),
        ("{0}.alpha", [4.0], "has an alpha for 1 of its 2 layers, but none for transformer."),
        ("{0}.lora_A.weight", [[float("nan")] * 32] * 4, "is damaged: {key} is no matrix of finite numbers"),
        ("{0}.lora_A.weight", [1.0, 2.0], "is damaged: {key} is no matrix of finite numbers"),
        ("{0}.lora_A.weight", [[1.0] * 16] * 4, "is for another model ({0} has factors (4, 16) and (32, 4), but "),
        ("{0}.lora_A.weight", [[1.0] * 32] * 8, "is for another model ({0} has factors (8, 32) and (32, 4), but "),
    ],
)
def test_a_tensor_that_no_lora_has(key: str, tensor: Any, said: str, tmp_path: Path) -> None:
    layers = [f"transformer.transformer_blocks.0.attn.{end}" for end in ("to_q", "to_k")]
    state = {
        f"{layer}.lora_{part}.weight": torch.ones((4, 32)[:: 1 if part == "A" else -1])
        for layer in layers
        for part in "AB"
    }
    key = key.format(layers[0])
    save_file(state | {key: torch.tensor(tensor)}, tmp_path / "lora.safetensors")
    assert said.format(layers[0], key=key) in refusal(tmp_path / "lora.safetensors")


def test_a_factor_without_its_other(tmp_path: Path) -> None:
    file = saved(tmp_path, lambda module: of_diffusers(module)[:1] * 2, count=1)
    key = next(iter(load_file(file)))
    assert f"is damaged: {key} has no matching lora_B or lora_up; get a new copy" in refusal(file)


def test_two_layers_of_one_module(tmp_path: Path) -> None:
    state = load_file(saved(tmp_path, of_diffusers, count=1)) | load_file(saved(tmp_path, of_kohya, count=1))
    save_file(state, tmp_path / "lora.safetensors")
    assert "adapts pos_embed.proj twice, as lora_unet_pos_embed_proj and as transformer.pos_embed.proj" in refusal(
        tmp_path / "lora.safetensors"
    )


# --- Names of the original models -------------------------------------------------------------------------------------

SDXL = {
    "input_blocks.0.0": "conv_in",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.1.0.emb_layers.1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.3.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.3.1.proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks.3.1.transformer_blocks.0.attn2.to_out.0": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    ),
    "middle_block.1.transformer_blocks.0.ff.net.0.proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.1.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.3.0.skip_connection": "up_blocks.1.resnets.1.conv_shortcut",
    "out.2": "conv_out",
}
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
FLUX = {
    "double_blocks.0.img_attn.qkv": [f"{DOUBLE}.attn.to_{part}" for part in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"{DOUBLE}.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.0.img_attn.proj": f"{DOUBLE}.attn.to_out.0",
    "double_blocks.0.txt_attn.proj": f"{DOUBLE}.attn.to_add_out",
    "double_blocks.0.img_mlp.0": f"{DOUBLE}.ff.net.0.proj",
    "double_blocks.0.txt_mlp.2": f"{DOUBLE}.ff_context.net.2",
    "double_blocks.0.txt_mod.lin": f"{DOUBLE}.norm1_context.linear",
    "single_blocks.0.linear1": [*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp"],
    "single_blocks.0.linear2": f"{SINGLE}.proj_out",
    "single_blocks.0.modulation.lin": f"{SINGLE}.norm.linear",
    # diffusers finds names for these, and then leaves them out.
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
Z_IMAGE = {
    "layers.0.attention.qkv": [f"layers.0.attention.to_{part}" for part in "qkv"],
    "context_refiner.0.attention.out": "context_refiner.0.attention.to_out.0",
    "layers.0.feed_forward.w1": "layers.0.feed_forward.w1",
}
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
PROCESSORS = {  # XLabs' names, and diffusers' of 2023
    "flux": {
        "double_blocks.0.processor.qkv_lora1": FLUX["double_blocks.0.img_attn.qkv"],
        "double_blocks.0.processor.proj_lora2": [f"{DOUBLE}.attn.to_add_out"],
    },
    "sd1": {f"unet.{ATTENTION}.processor.to_out_lora": [f"{ATTENTION}.to_out.0"]},
}


@pytest.mark.parametrize("name", ["sdxl", "flux", "z-image"])
@pytest.mark.parametrize(
    "keys",
    [
        lambda layer: (f"diffusion_model.{layer}.lora_A.weight", f"diffusion_model.{layer}.lora_B.weight"),
        of_kohya,
    ],
)
def test_names_of_the_original_model(name: str, keys: Any, tmp_path: Path) -> None:
    """With an alpha of half the rank; a fused layer is the modules one above the other."""
    with torch.device("meta"):  # one block of full width, which diffusers counts on
        net = (
            FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
            if name == "flux"
            else network(name)
        )
    own = {module: m.weight for module, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    state, expected = {}, {}
    for layer, modules in {"sdxl": SDXL, "flux": FLUX, "z-image": Z_IMAGE}[name].items():
        modules = [modules] if isinstance(modules, str) else modules
        a, b = factors(torch.empty(sum(len(own[m]) for m in modules), *own[modules[0]].shape[1:]))
        down, up = keys(layer)
        state |= {
            down: a,
            up: b,
            down.replace(".lora_A.weight", ".alpha").replace(".lora_down.weight", ".alpha"): torch.tensor(1.0),
        }
        if layer == "final_layer.adaLN_modulation.1":
            b = torch.cat(b.chunk(2)[::-1])  # shift and scale change places
        expected |= {m: (a, part / 2) for m, part in zip(modules, b.split([len(own[m]) for m in modules]), strict=True)}
    save_file(state, tmp_path / "lora.safetensors")
    found = read_lora(str(tmp_path / "lora.safetensors"), net, NETWORKS[name][1])
    assert found.keys() == {f"{m}.lora_{part}.weight" for m in expected for part in "AB"}
    for module, (a, b) in expected.items():
        assert torch.equal(found[f"{module}.lora_A.weight"], a), module
        assert torch.equal(found[f"{module}.lora_B.weight"], b), module


@pytest.mark.parametrize(("name", "layers"), PROCESSORS.items())
def test_names_of_attention_processors(name: str, layers: dict[str, list[str]], tmp_path: Path) -> None:
    own, state = weights(name), {}
    for layer, modules in layers.items():
        whole = torch.cat([own[module] for module in modules])
        state |= dict(zip((f"{layer}.down.weight", f"{layer}.up.weight"), factors(whole), strict=True))
    save_file(state, tmp_path / "lora.safetensors")
    found = changed(tmp_path / "lora.safetensors", name)
    assert sorted(found) == sorted(module for modules in layers.values() for module in modules)


# --- Files, folders, precision ----------------------------------------------------------------------------------------


def test_the_file_in_a_folder(tmp_path: Path) -> None:
    assert "holds no weights file: give the file of one LoRA" in refusal(tmp_path)
    first = saved(tmp_path, of_diffusers)
    found = changed(tmp_path, "sd3")
    torch.save(load_file(first), tmp_path / "lora.bin")
    assert changed(tmp_path, "sd3").keys() == found.keys() == changed(tmp_path / "lora.bin", "sd3").keys()
    first.rename(tmp_path / "b.safetensors")
    saved(tmp_path, of_kohya)
    assert "holds 2 weights files (b.safetensors, lora.safetensors): give the file of one LoRA" in refusal(tmp_path)


def test_a_folder_of_peft_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = peft_folder(tmp_path / "hub", LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"]))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    names = ["README.md", *sorted(f.name for f in folder.iterdir())]
    monkeypatch.setattr(hub, "files", lambda repo: names)
    monkeypatch.setattr(hub, "fetch", lambda repo, name: shutil.copy(folder / name, snapshot / name))
    args = network("sd3"), StableDiffusion3Pipeline
    online, local = read_lora("owner/name", *args), read_lora(str(folder), *args)
    assert online.keys() == local.keys()
    assert all(torch.equal(tensor, local[key]) for key, tensor in online.items())


@pytest.mark.parametrize(("size", "lost"), [(1.0, False), (0.01, True)])
def test_weights_are_rounded_once(
    model: Path, size: float, lost: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A LoRA so small that bfloat16 takes much of it away is said to be."""
    file = saved(tmp_path, of_diffusers)
    save_file({key: size * tensor for key, tensor in load_file(file).items()}, file)
    options = SD3Backend.Options(teacher_lora=str(file), prompt_cache="off", lora_target_modules=["proj_out"])
    backend = SD3Backend(str(model), options)
    backend.prepare(
        SimpleNamespace(mixed_precision="bf16", device=torch.device("cpu")), roles=("student", "fake_score")
    )
    found = backend.roles.network.state_dict()
    own = SD3Transformer2DModel.from_pretrained(model / "transformer", dtype=torch.bfloat16).state_dict()
    for name, delta in deltas(read_lora(str(file), network("sd3"), StableDiffusion3Pipeline), own):
        once = (own[name].double() + delta.double()).bfloat16()
        assert (found[name] != once).float().mean() < 0.005  # float32 may fall on the other side of a tie
    assert ("rounding the sum of it and the weights changes it by" in caplog.text) == lost


def test_a_bad_file_is_refused_before_weights_are_loaded(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "text_encoder" / "model.safetensors").unlink()
    file = saved(tmp_path, lambda module: of_diffusers(f"x.{module}"))
    backend = SD3Backend(str(copy), SD3Backend.Options(teacher_lora=str(file), prompt_cache="off"))
    with pytest.raises(ConfigError, match="is damaged, is for another model"):
        backend.cache_prompts(SimpleNamespace(mixed_precision="no", device=torch.device("cpu")), ["a"])
