"""LoRA files of any origin: every tensor of a file acts as its trainer meant it, or the file is refused in one line.

Read are the layouts of diffusers, PEFT, Kohya's scripts and ComfyUI. Each names the two factors and the layers in its
own way, and has its own place for alpha:

    transformer.<module>.lora_A.weight, lora_B      diffusers (UNets: unet.); alpha in the header, or equal to the rank
    base_model.model.<module>.lora_A.weight         PEFT; alpha in adapter_config.json
    lora_unet_<module>.lora_down.weight, lora_up    Kohya; <module>.alpha beside it, or ss_network_alpha in the header
    diffusion_model.<module>.lora_A.weight          ComfyUI; mostly with the original model's names of the modules

A layer whose name the network does not know is renamed by diffusers' converters, and split where it is a fused one.
They are given one layer at a time: of a whole file, they drop without a word what they do not know.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from dmdr import hub
from dmdr.backends.loading import quiet, read_weights, refusing
from dmdr.errors import ConfigError, one_line
from dmdr.protocols import LORA_FILE

PEFT_FILE, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
PREFIX = re.compile(r"((base_model\.model|transformer|unet|diffusion_model)\.|(lora_unet|lora_transformer|lycoris)_)*")
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoder|lora_te|te\d?[._])")
TENSOR = re.compile(  # with PEFT's name of the adapter, if there is one, before ".weight"; a layer may be called "down"
    r"(?P<layer>.+?)\.(?:lora[_.])?"
    r"(?:(?:(?P<A>A|down)|(?P<B>B|up))(?:\.(?!lora_(?:A|B|down|up)\.)\w+)?\.weight|(?P<alpha>alpha))"
)
# What is no LoRA, or more than one, by a key of it.
OTHERS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr",
    r"\.lora_mid\.": "a LoRA with a third factor (Tucker)",
    r"bias$|\.diff_b$": "a LoRA with biases",
}
# PEFT's settings of how a LoRA acts, and of how it was trained; any other makes it more than a LoRA.
ACTING = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
TRAINING = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "eva_config"),
    *("megatron_core", "qalora_group_size"),
}
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights: the network stays as it is
ADD_ALPHA = "add the alpha to the file, as <layer>.alpha"

Factors = tuple[Tensor, Tensor]  # A [r, ...] and B [out, r, ...]


def read_lora(path: str, network: Any, pipeline_class: Any) -> dict[str, Tensor]:
    """The adapter that a LoRA file holds.

    Args:
        path: The file, a folder with one, or a hub id.
        network: The network of diffusers that it is for; may be on the meta device.
        pipeline_class: The network's pipeline, whose `lora_state_dict` knows other names of the modules.

    Returns:
        At full strength, float32: `<module>.lora_A.weight` [r, ...] and `<module>.lora_B.weight` [out, r, ...].

    Raises:
        ConfigError: If it cannot be read, a tensor of it is no part of a LoRA of this network, or its strength is not
            known; names the file, the tensor and what to do.
    """
    file = LoRAFile.open(path)
    layers = file.layers()
    weights = {name: m.weight for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    adapter: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    foreign = []
    for name, factors in layers.items():
        placed = _placed(name, factors, weights, network.config, pipeline_class)
        if not placed:
            foreign.append(name)
        for module, (a, b) in placed.items():
            if module in origin:
                file.refuse(
                    f"adapts {module} twice, as {origin[module]} and as {name}: remove one of them from the file"
                )
            origin[module] = name
            shape = weights[module].shape
            own_a, own_b = (len(a), *shape[1:]), (shape[0], len(a), *[1] * len(shape[2:]))
            if (_squeezed(a.shape), _squeezed(b.shape)) != (_squeezed(own_a), _squeezed(own_b)):
                sizes = f"{name} has factors {tuple(a.shape)} and {tuple(b.shape)}, but {module} is {tuple(shape)}"
                file.refuse(f"is for another model ({sizes}): give a LoRA for this model")
            adapter |= {f"{module}.lora_A.weight": a.reshape(own_a), f"{module}.lora_B.weight": b.reshape(own_b)}
    if foreign:
        some = f"{', '.join(foreign[:3])} ({len(foreign)} of its {len(layers)} layers)"
        what = f"a {type(network).__name__} has no {some}, under any name that diffusers knows"
        file.refuse(f"is damaged, is for another model, or must first be converted to diffusers' names: {what}")
    return adapter


def _squeezed(shape: Sequence[int]) -> list[int]:
    """Without sizes of 1: a convolution of one pixel is a linear layer, and is written as either."""
    return [size for size in shape if size != 1]


def _bare(name: str) -> str:
    """A layer's or setting's name without that of the network."""
    return PREFIX.sub("", name, count=1)


def _placed(
    name: str, factors: Factors, weights: Mapping[str, Tensor], config: Any, pipeline_class: Any
) -> dict[str, Factors]:
    """The modules of a network that a layer of a file adapts, each with its factors; none if it is no layer of it."""
    flat = _bare(name).replace(".", "_")
    own = next((module for module in weights if module.replace(".", "_") == flat), None)
    if own:
        return {own: factors}
    for layer, ends in ((f"lora_unet_{flat}", ("lora_down", "lora_up")), (name, ("down", "up"))):
        state = {f"{layer}.{end}.weight": factor for end, factor in zip(ends, factors, strict=True)}
        try:
            with quiet():
                found = pipeline_class.lora_state_dict(state, unet_config=config)
        except Exception:  # each converter has its own for a name that it does not know
            continue
        found = convert_unet_state_dict_to_peft(found[0] if isinstance(found, tuple) else found)
        parts = {(_bare(m["layer"]), m.lastgroup): found[key] for key in found if (m := TENSOR.fullmatch(key))}
        modules = dict.fromkeys(module for module, _ in parts)  # in their order
        if modules.keys() <= weights.keys() and len(parts) == len(found) == 2 * len(modules):
            placed = {module: (parts[module, "A"], parts[module, "B"]) for module in modules}
            if sum(len(b) for _, b in placed.values()) == len(factors[1]):  # all rows of a fused layer
                return placed
    return {}


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file as it was read.

    Attributes:
        place: Flag and file, for messages.
        tensors: By key.
        header: Metadata of a safetensors file.
        settings: PEFT's of the adapter, from beside the file or its header; None where there are none.
    """

    place: str
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]
    settings: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: str) -> "LoRAFile":
        """Read it.

        Raises:
            ConfigError: If it is missing, damaged, one of several, or has settings of more than a LoRA.
        """
        file = _weights_file(path)
        tensors = read_weights(str(file))
        header: Mapping[str, str] = {}
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as content:
                header = content.metadata() or {}
        found = cls(f"--teacher_lora {file}", tensors, header)
        beside = file.with_name(PEFT_CONFIG)
        of_peft = file.stem == Path(PEFT_FILE).stem or any(key.startswith(PEFT_PREFIX) for key in tensors)
        text = beside.read_bytes() if of_peft and beside.is_file() else header.get(LORA_ADAPTER_METADATA_KEY)
        return replace(found, settings=found._parsed(text)) if text else found

    def refuse(self, what: str) -> NoReturn:
        """Say what is wrong with it.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.place} {what}")

    def _parsed(self, text: str | bytes) -> dict[str, Any]:
        """Settings of a LoRA, with PEFT's defaults."""
        defaults = LoraConfig().to_dict()
        try:
            given = {_bare(name): value for name, value in json.loads(text).items() if not TEXT_ENCODER.match(name)}
        except (ValueError, AttributeError) as error:
            self.refuse(f"has settings ({PEFT_CONFIG}) that cannot be read: {one_line(error)}")
        if (kind := given.get("peft_type") or "LORA") != "LORA":
            self.refuse(f"is a {kind} ({PEFT_CONFIG} names this type): merge it into the model first")
        for name, value in given.items():
            plain = not value or value == defaults.get(name) or name in ACTING | TRAINING
            if not (value in INITIAL if name == "init_lora_weights" else plain):
                self.refuse(f"is more than a LoRA (its settings have {name}: {value}): merge it into the model first")
        return defaults | given

    def layers(self) -> dict[str, Factors]:
        """The factors of each layer, by its name in the file: float32, the second times the layer's strength.

        Raises:
            ConfigError: If a tensor is no part of a LoRA, or lacks its counterpart, or a strength is not known.
        """
        keys: dict[str, dict[str, str]] = {}
        for key in sorted(self.tensors):
            if TEXT_ENCODER.match(key):
                self.refuse(
                    f"also adapts a text encoder ({key}), which DMDR does not change: remove such keys from the file"
                )
            match = TENSOR.fullmatch(key)
            if not match:
                kind = next((kind for pattern, kind in OTHERS.items() if re.search(pattern, key)), "more than a LoRA")
                self.refuse(f"is {kind} ({key}): merge it into the model first")
            parts, part = keys.setdefault(match["layer"], {}), str(match.lastgroup)
            if part in parts:
                self.refuse(f"holds two adapters ({parts[part]}, {key}): remove one of them from the file")
            parts[part] = key
        factors: dict[str, Factors] = {}
        for name, parts in keys.items():
            for part, called in (("A", "lora_A or lora_down"), ("B", "lora_B or lora_up")):
                if part not in parts:
                    self.refuse(f"is damaged: {next(iter(parts.values()))} has no matching {called}; get a new copy")
            factors[name] = (self._factor(parts["A"]), self._factor(parts["B"]))
        alphas = {name: self._alpha(parts["alpha"]) for name, parts in keys.items() if "alpha" in parts}
        strengths = self._strengths({name: len(a) for name, (a, _) in factors.items()}, alphas)
        return {name: (a, b * strengths[name]) for name, (a, b) in factors.items()}

    def _factor(self, key: str) -> Tensor:
        tensor = self.tensors[key]
        if tensor.ndim < 2 or not tensor.is_floating_point() or not tensor.float().isfinite().all():
            self.refuse(f"is damaged: {key} is no matrix of finite numbers; get a new copy")
        return tensor.float()

    def _alpha(self, key: str) -> float:
        tensor = self.tensors[key]
        value = tensor.item() if tensor.numel() == 1 else math.nan
        if not 0 < value < math.inf:
            self.refuse(f"is damaged: {key} is no number above 0; get a new copy")
        return value

    def _strengths(self, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, float]:
        """What the factors of each layer are multiplied with, by the first place that holds alpha."""
        if alphas:
            if absent := ranks.keys() - alphas.keys():
                what = f"has an alpha for {len(alphas)} of its {len(ranks)} layers, but none for {min(absent)}"
                self.refuse(f"{what}: programs do not agree on its strength then; add the missing alpha")
            return {name: alphas[name] / rank for name, rank in ranks.items()}
        if self.settings:
            return {name: self._by_settings(name, rank, self.settings) for name, rank in ranks.items()}
        if "ss_network_alpha" in self.header:
            return self._by_header(ranks)
        if unknown := [f"{key} = {value}" for key, value in self.header.items() if "alpha" in key]:
            self.refuse(f"has {unknown[0]} in its header, which DMDR does not understand: {ADD_ALPHA}")
        if any(name.startswith(PEFT_PREFIX) for name in ranks):
            self.refuse(f"was saved by PEFT, which keeps alpha in {PEFT_CONFIG}: put that file into the same folder")
        return dict.fromkeys(ranks, 1.0)

    def _by_settings(self, layer: str, rank: int, settings: Mapping[str, Any]) -> float:
        """By PEFT's settings, which may differ between modules."""
        name, ranks, alphas = _bare(layer), settings["rank_pattern"] or {}, settings["alpha_pattern"] or {}
        try:
            r = float(ranks.get(get_pattern_key([*ranks], name), settings["r"]))
            alpha = float(alphas.get(get_pattern_key([*alphas], name), settings["lora_alpha"]))
        except (AttributeError, TypeError, ValueError, re.error) as error:
            self.refuse(f"has settings ({PEFT_CONFIG}) that cannot be read: {one_line(error)}")
        if r != rank or not 0 < alpha < math.inf:
            self.refuse(f"has rank {rank} in {layer}, but its settings say rank {r:g}, alpha {alpha:g}: get both again")
        return alpha / (math.sqrt(r) if settings["use_rslora"] else r)

    def _by_header(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """By what Kohya's scripts and others with their header say, which holds for all layers of one rank."""
        said = {key: self.header.get(key, "") for key in ("ss_network_alpha", "ss_network_dim", "ss_network_args")}
        what = ", ".join(f"{key} = {value}" for key, value in said.items() if value)
        try:
            alpha, dim = float(said["ss_network_alpha"]), float(said["ss_network_dim"])
        except ValueError:
            alpha = dim = math.nan
        others = [name for name, rank in ranks.items() if rank != dim]
        if others or not 0 < alpha < math.inf or re.search("alpha|rs_?lora", said["ss_network_args"]):
            self.refuse(f"has no alpha for its layers, and its header gives no clear one ({what}): {ADD_ALPHA}")
        # These scripts write lora_down. Their converter to lora_A keeps the header, and folds alpha into the factors.
        kohya = self.header.get("ss_network_module", "").startswith("networks.")
        if kohya and alpha != dim and not any(".lora_down." in key for key in self.tensors):
            self.refuse(f"was converted from a file of Kohya's scripts ({what}): give the original, which has alpha")
        return dict.fromkeys(ranks, alpha / dim)


def _weights_file(path: str) -> Path:
    """The one file that is meant by a file, a folder or a hub id.

    Raises:
        ConfigError: If it is not there, or there are several.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    with refusing(f"--teacher_lora {path} cannot be loaded"):
        names = [file.name for file in given.iterdir()] if given.is_dir() else hub.files(path)
    known = [name for name in names if name in (LORA_FILE, PEFT_FILE)]
    safe, pickled = (
        [n for n in names if n.endswith(ends) and "/" not in n] for ends in (".safetensors", (".bin", ".pt"))
    )
    found = sorted(known or safe or pickled)
    if len(found) != 1:
        there = f"{len(found)} weights files ({', '.join(found[:3])})" if found else "no weights file"
        raise ConfigError(f"--teacher_lora {path} holds {there}: give the file of one LoRA")
    if given.is_dir():
        return given / found[0]
    with refusing(f"--teacher_lora {path} cannot be loaded"):
        if PEFT_CONFIG in names:
            hub.fetch(path, PEFT_CONFIG)
        return hub.fetch(path, found[0])
