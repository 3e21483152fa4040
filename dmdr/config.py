"""Settings: one dataclass with Hugging Face's names; flags over YAML over the model's recipe over the defaults."""

import argparse
import dataclasses
import inspect
import logging
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from trl import TrlParser

from dmdr import registry
from dmdr.errors import ConfigError
from dmdr.expression import parse_sum

logger = logging.getLogger(__name__)
SUMS = {"objectives": "rl", "rewards": "reward", "eval_rewards": "eval_reward", "matchings": "matching"}
REQUIRED = dataclasses.MISSING
F = TypeVar("F", bound="Flags")


def flag(default: Any, help: str) -> Any:
    """A field with its help text; REQUIRED is no default."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Flags:
    """A dataclass of a command's own flags."""

    def validate(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ConfigError: Names the flag, its value and what it may be.
        """
        check_types(self)

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ConfigError(f"--{name} must be {what}, not {getattr(self, name)}")


@dataclass
class Config(Flags):
    """Every setting of a run; each field is the flag `--<name>` and the YAML key `<name>`."""

    # What is trained, on what, towards what
    model: str = flag("digits", "registered name (some with a file: sit-xl-2:PATH), local pipeline folder, or hub id")
    prompts: str | None = flag(
        None,
        "file (text with one a line, .jsonl, .csv, .parquet), or folder or hub id of a dataset; the columns beside the "
        "prompt are given to rewards by name; a named model brings its own",
    )
    prompt_column: str = flag("prompt", "column of --prompts that holds them")
    dataset_config: str | None = flag(None, "configuration of the dataset that --prompts names")
    dataset_train_split: str = flag("train", "split of the dataset that --prompts names")
    dataset_streaming: bool = flag(
        False,
        "read --prompts as the run goes, for sets that do not fit: shuffled among 10,000, with duplicates; embeddings "
        "are made and cached on the way, so that the text encoders stay in memory",
    )
    rl: str = flag("none", "sum of objectives by name and weight, e.g. '0.5*refl'; 'none' for distillation only")
    reward: str = flag("none", "sum of rewards, e.g. '0.3*hps+0.3*clip'; 'none' for no reward")
    eval_reward: str = flag(
        "none", "sum of rewards that every evaluation measures and none trains on; their flags begin with eval_"
    )
    matching: str = flag("dmd", "how student and teacher are compared")
    dmd_weight: float = flag(1.0, "weight of the matching loss; 0 is RL only")
    rl_weight: float = flag(0.3, "lambda of L = L_DMD + lambda L_RL in stage 2")
    stage1_steps: int = flag(2000, "student updates of stage 1 (RT-DM, DynaDG, DynaRS); 0 skips it")
    stage2_steps: int = flag(1000, "student updates of stage 2 (joint DMD and RL); 0 skips it")
    init_student: str | None = flag(
        None, "start from this student: a run folder (its stage 1), a checkpoint or an export; implies no stage 1"
    )
    # Distillation
    num_inference_steps: int = flag(4, "steps of the student")
    sigmas: list[float] | None = flag(None, "the student's grid itself, decreasing from 1; overrides steps and shift")
    timesteps: list[int] | None = flag(
        None, "the same in the network's unit, decreasing within 1000 .. 1, e.g. 999 749 500 250"
    )
    shift: float | None = flag(None, "timestep shift of the student's grid; by default that of the model's scheduler")
    eta: float = flag(1.0, "training sampler: 0 ODE, 1 renoise, between them an SDE")
    sde_type: Literal["cps", "ddim", "flow_sde", "dance_sde"] = flag(
        "cps", "how the noise enters between eta 0 and 1: coefficients-preserving, DDIM, Flow-GRPO, DanceGRPO"
    )
    sample_eta: float | None = flag(
        None, "sampler of grids, evaluation, export: 0 or 1; by default 1 for cps with eta of at least 0.5"
    )
    guidance_scale: float = flag(7.0, "the teacher's guidance; 1 is none")
    guidance_jitter: float = flag(0.5, "guidance is drawn per sample from guidance_scale +- this (if above 1)")
    fake_updates: int = flag(5, "fake-score updates per student update")
    dyna_steps: int | None = flag(
        None, "student updates that anneal DynaDG and DynaRS; all of stage 1 by default and at most"
    )
    dyna_guidance: float = flag(0.25, "DynaDG: share of the fake score's adapter in the teacher at first; 0 is off")
    dyna_renoise: list[float] = flag([4.0, 1.5], "DynaRS: Beta parameters of the renoise time at first; 1 1 is uniform")
    reward_tilt: float = flag(1.5, "RT-DM in stage 1: temperature in standard deviations of the reward; 0 is off")
    tilt_weight: Literal["exp", "linear", "rank"] = flag(
        "exp",
        "RT-DM's weight: exp(z / tau), 1 + z / tau, or exp by rank; z is the standardised reward, tau reward_tilt",
    )
    tilt_divergence: Literal[
        "forward_kl", "js", "softened_reverse_kl", "hellinger", "jeffreys", "neyman", "reverse_kl"
    ] = flag("forward_kl", "f-distill's weight h of the density ratio exp(z / tau); RT-DM itself is forward_kl")
    tilt_baseline: Literal["batch", "prompt_group", "ema"] | None = flag(
        None,
        "what z compares a reward with: by default the other images of its prompt (prompt_group) if num_generations is "
        "above 1, earlier updates (ema) in a global batch of one, or else the global batch",
    )
    # Student and fake score
    full_finetune: bool = flag(False, "train a full copy of the network as the student instead of a LoRA")
    lora_rank: int = flag(64, "rank of the student's LoRA")
    lora_alpha: float = flag(128.0, "alpha of the student's LoRA; its strength is alpha / rank")
    fake_lora_rank: int = flag(32, "rank of the fake score's LoRA")
    fake_lora_alpha: float = flag(64.0, "alpha of the fake score's LoRA")
    lora_target_modules: list[str] | None = flag(None, "modules that get a LoRA; the family's own choice by default")
    # Optimisation
    learning_rate: float = flag(1e-5, "of the student in stage 1")
    stage2_learning_rate: float | None = flag(None, "of the student in stage 2; learning_rate / 2 by default")
    fake_learning_rate: float = flag(2e-5, "of the fake score")
    stage2_fake_learning_rate: float | None = flag(None, "of the fake score in stage 2; fake_learning_rate by default")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = flag("constant", "schedule of the student, per stage")
    warmup_steps: int = flag(0, "of the student, per stage")
    optim: Literal["adamw_torch", "adamw_bnb_8bit"] = flag(
        "adamw_torch", "of both roles; adamw_bnb_8bit keeps moments in 8 bits (bitsandbytes)"
    )
    adam_beta1: float = flag(0.9, "of both optimizers")
    adam_beta2: float = flag(0.999, "of both optimizers")
    adam_epsilon: float = flag(1e-8, "of both optimizers")
    weight_decay: float = flag(0.01, "of the student; the fake score has none")
    ema_decay: float = flag(0.0, "of the student's average, which is then sampled, evaluated and exported; 0 is none")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    per_device_train_batch_size: int = flag(4, "images per process and micro-batch; divisible by num_generations")
    gradient_accumulation_steps: int = flag(1, "micro-batches per update")
    num_generations: int = flag(1, "images per prompt")
    gradient_checkpointing: bool = flag(False, "recompute activations in backward")
    mixed_precision: Literal["no", "bf16", "fp16"] = flag("no", "precision of the networks")
    torch_compile: bool = flag(False, "compile the network's blocks: minutes at the start, faster steps")
    attention_backend: str | None = flag(
        None, "attention kernel by diffusers' name, e.g. flash, of families that choose one"
    )
    cpu_offload: bool = flag(
        False,
        "keep text encoders and VAE on the CPU while they are idle; after a reward's gradient the VAE goes back "
        "with its next use without one",
    )
    vae_tiling: bool = flag(False, "decode by tiles")
    decode_chunk_size: int | None = flag(None, "images that are decoded at a time for the rewards; all by default")
    # The model
    backend: str | None = flag(
        None, "model family, e.g. package:NAME or my_file.py:NAME; by default the one for the pipeline's class"
    )
    revision: str | None = flag(None, "branch, tag or commit of --model on the hub")
    variant: str | None = flag(None, "weights files of --model that are meant, such as fp16")
    resolution: int | None = flag(None, "image size in pixels; the model's own by default")
    max_sequence_length: int | None = flag(None, "tokens of the longest text encoder; the model's own by default")
    drop_text_encoders: list[str] | None = flag(None, "text encoders to do without, e.g. text_encoder_3 (T5) of SD3")
    zero_empty_prompt: bool | None = flag(
        None, "guidance leads away from zeros (true) or the empty prompt (false); as the model says by default"
    )
    teacher_lora: str | None = flag(
        None, "LoRA that is merged into the teacher's network first: a file, folder or hub id"
    )
    student_weights: str | None = flag(None, "weights file that a full student (--full_finetune) starts from")
    reward_vae: str | None = flag(
        None, "tiny decoder for the rewards (AutoencoderTiny), a folder or hub id; 'none' for the model's own"
    )
    prompt_cache: str | None = flag(
        None, "folder of prompt embeddings; 'off' keeps the text encoders in memory; ~/.cache/dmdr/prompts by default"
    )
    seed: int = flag(0, "of everything")
    # What is written
    dry_run: bool = flag(False, "check the settings, print the estimated training memory, and write nothing")
    architecture: str | None = flag(
        None, "folder of the model's configuration files, no weights, that --dry_run reads in place of the model's own"
    )
    output_dir: str | None = flag(None, "run folder; runs/<model>-<rl>, numbered, by default")
    overwrite_output_dir: bool = flag(False, "delete the run that the folder holds")
    resume_from_checkpoint: str | None = flag(None, "'latest' or a checkpoint folder; with the run's own settings")
    save_steps: int = flag(500, "a checkpoint every so many updates; stages always end with one; 0 is only then")
    save_total_limit: int | None = flag(2, "checkpoints kept beside those that end a stage")
    logging_steps: int = flag(10, "a log line every so many updates")
    report_to: str = flag("tensorboard", "accelerate's tracker, or 'none'")
    sample_steps: int = flag(100, "a sample grid every so many updates; 0 is only at the end of a stage")
    sample_images: int = flag(8, "images of a sample grid")
    num_eval_samples: int = flag(0, "samples of the evaluation at the end of each stage; 0 is none")
    eval_steps: int = flag(0, "also evaluate the student every so many updates; 0 is not")
    teacher_steps: int = flag(28, "steps of the teacher in grids and evaluation")

    def validate(self) -> None:
        super().validate()
        at_least_one = """num_inference_steps fake_updates lora_rank fake_lora_rank num_generations sample_images
            per_device_train_batch_size gradient_accumulation_steps logging_steps teacher_steps"""
        for name in at_least_one.split():
            self._require(getattr(self, name) >= 1, name, "at least 1")
        not_negative = """stage1_steps stage2_steps warmup_steps save_steps sample_steps eval_steps num_eval_samples
            dmd_weight rl_weight guidance_scale guidance_jitter reward_tilt weight_decay seed"""
        for name in not_negative.split():
            self._require(getattr(self, name) >= 0, name, "at least 0")
        positive = """learning_rate stage2_learning_rate fake_learning_rate stage2_fake_learning_rate max_grad_norm
            lora_alpha fake_lora_alpha shift resolution adam_epsilon max_sequence_length decode_chunk_size"""
        for name in positive.split():
            self._require(getattr(self, name) is None or getattr(self, name) > 0, name, "above 0")
        for name in ("eta", "dyna_guidance"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        self._require(self.sample_eta in (None, 0, 1), "sample_eta", "0 or 1: stock pipelines know no other")
        self._require(
            len(self.dyna_renoise) == 2 and min(self.dyna_renoise) >= 1, "dyna_renoise", "two numbers of at least 1"
        )
        self._require(self.dyna_steps is None or self.dyna_steps >= 0, "dyna_steps", "at least 0")
        self._require(
            self.per_device_train_batch_size % self.num_generations == 0,
            "per_device_train_batch_size",
            f"divisible by num_generations, {self.num_generations}",
        )
        self._require(self.save_total_limit is None or self.save_total_limit >= 1, "save_total_limit", "at least 1")
        if self.tilt_baseline == "prompt_group":
            self._require(self.num_generations >= 2, "num_generations", "at least 2 for --tilt_baseline prompt_group")
        if self.tilt_divergence != "forward_kl":
            what = f"exp, a density ratio, for --tilt_divergence {self.tilt_divergence}"
            self._require(self.tilt_weight == "exp", "tilt_weight", what)
        if self.sigmas is not None:
            bounds = [*self.sigmas, 0.0]
            falling = len(bounds) > 1 and all(a > b for a, b in pairwise(bounds))
            self._require(falling and bounds[0] <= 1, "sigmas", "decreasing within (0, 1]")
        if self.timesteps is not None:
            bounds = [1001, *self.timesteps, 0]
            falling = len(bounds) > 2 and all(a > b for a, b in pairwise(bounds))
            self._require(falling, "timesteps", "decreasing within 1000 .. 1")
            self._require(self.sigmas is None, "timesteps", "left out where --sigmas are given")
        if self.stage2_steps == 0 and (self.stage1_steps == 0 or self.init_student):
            raise ConfigError("nothing to train: --stage2_steps is 0, and so is stage 1 (--init_student skips it)")
        if self.dmd_weight == 0 and not self.init_student and self.stage1_steps:
            raise ConfigError("--dmd_weight 0 is RL only: give it a distilled student with --init_student")
        if self.eval_reward != "none":
            self._require(self.num_eval_samples > 0, "num_eval_samples", "above 0 for --eval_reward")
        if self.prompts is None:
            own = {"prompt_column": "prompt", "dataset_config": None, "dataset_train_split": "train"}
            for name, default in (own | {"dataset_streaming": False}).items():
                self._require(getattr(self, name) == default, name, "left out where no --prompts are named")
        if self.dmd_weight == 0 and (self.rl == "none" or self.rl_weight == 0):
            raise ConfigError("--dmd_weight 0 without --rl and --rl_weight leaves nothing to train")


@dataclass(kw_only=True)
class RewardFlags(Flags):
    """The flags of every command that only scores."""

    reward: str = flag(REQUIRED, "sum of rewards, e.g. 'hps+0.5*clip'")
    model: str | None = flag(None, "registered model that brings the checkpoints of its rewards, e.g. digits")
    device: str = flag("auto", "where the rewards run, e.g. cpu or cuda:1; auto is the accelerator, if there is one")
    dtype: Literal["fp32", "bf16", "fp16"] = flag("fp32", "precision of the rewards' networks")


def check_types(config: Any) -> None:
    """Values from YAML or Python keep the types that flags would have.

    Raises:
        ConfigError: For a value of another type, or a number that is not finite.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if hint in (str, str | None) and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
            setattr(config, name, value)
        if not _fits(value, hint):
            raise ConfigError(f"--{name} must be {_wanted(hint)}, not {value!r}{_norway(value, hint)}")
        if isinstance(value, int) and not isinstance(value, bool) and hint in (float, float | None):
            setattr(config, name, float(value))


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _wanted(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list, each item {_wanted(arguments[0])}"
    if arguments:
        return " or ".join(map(_wanted, arguments))
    words = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, str(hint))


def _norway(value: Any, hint: Any) -> str:
    quoted = value is False and "no" in typing.get_args(hint)
    return " (YAML reads an unquoted no as false: write 'no')" if quoted else ""


# --- Plugins and their flags ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """A plugin that the run names: `weight * name`, its class, and the values of its own flags.

    Attributes:
        group: That of the registry, or "eval_rewards": rewards that only measure.
    """

    group: str
    name: str
    weight: float
    cls: type
    options: dict[str, Any] = field(default_factory=dict)

    def key(self, option: str) -> str:
        """The full name of one of its flags."""
        key = f"{re.sub(r'[^0-9a-zA-Z]', '_', self.name)}_{option}"
        if self.group == "eval_rewards":
            return f"eval_{key}"
        return f"_{key}" if key[0].isdigit() else key

    def build(self, **defaults: Any) -> Any:
        """The plugin, from its flags; `defaults` fill those left unset (None).

        Raises:
            ConfigError: If it refuses their values (a ValueError).
        """
        unset = {key: value for key, value in defaults.items() if self.options.get(key) is None}
        try:
            return self.cls(**(self.options | unset))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{self.group[:-1]} '{self.name}': {error}") from error


@dataclass(frozen=True)
class Settings:
    """A resolved run: the core's settings and the plugins that it names."""

    config: Config
    plugins: tuple[Chosen, ...]

    def of(self, group: str) -> list[Chosen]:
        return [plugin for plugin in self.plugins if plugin.group == group]

    def values(self) -> dict[str, Any]:
        """Every setting by its full name, but for where the run is written to."""
        values = dataclasses.asdict(self.config)
        for name in ("dry_run", "architecture", "output_dir", "overwrite_output_dir", "resume_from_checkpoint"):
            del values[name]
        for plugin in self.plugins:
            values |= {plugin.key(name): value for name, value in plugin.options.items()}
        return values

    def as_yaml(self) -> str:
        """What `--config` reads to repeat the run, wherever it is written to."""
        return yaml.safe_dump(self.values(), sort_keys=False)


def _named(group: str, expression: str) -> list[tuple[str, float, str]]:
    if expression == "none":
        return []
    try:
        return [(group, weight, name) for weight, name in parse_sum(expression, what=group[:-1])]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _load(parts: Sequence[tuple[str, float, str]], own: Mapping[str, str]) -> list[Chosen]:
    """The plugins that are named; `own` is the distribution of those that nobody typed, by group."""
    return [
        Chosen(group, name, weight, registry.load(group.removeprefix("eval_"), name, own.get(group)))
        for group, weight, name in parts
    ]


def _help_of(cls: type) -> dict[str, str]:
    """Field descriptions from the `Attributes:` sections of a class and its bases; a subclass's text wins."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:")
        found |= re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("%", "%%") for name, text in found.items()}


def _plugin_options(command: type, chosen: Sequence[Chosen]) -> tuple[type, dict[str, str]]:
    """A dataclass of the plugins' fields under their prefixed names, and the short names that are unambiguous.

    Rewards that only measure have no short names, and take none from the others.
    """
    taken = {f.name for f in dataclasses.fields(command)}
    count: dict[str, int] = {}
    for plugin in chosen:
        for f in dataclasses.fields(plugin.cls):
            if f.init and plugin.group != "eval_rewards":
                count[f.name] = count.get(f.name, 0) + 1
    fields: list[tuple[str, Any, Any]] = []
    short: dict[str, str] = {}
    for plugin in chosen:
        hints, help_texts = typing.get_type_hints(plugin.cls), _help_of(plugin.cls)
        for f in dataclasses.fields(plugin.cls):
            if not f.init:
                continue
            key = plugin.key(f.name)
            if key in (name for name, _, _ in fields):
                raise ConfigError(f"two of the chosen plugins are too much alike in name: both have a flag --{key}")
            metadata = {"help": help_texts.get(f.name, "")}
            if plugin.group != "eval_rewards" and count[f.name] == 1 and f.name not in taken:
                short[f.name] = key
                metadata["aliases"] = [f"--{f.name}"]  # type: ignore[assignment]
            copy = field(default=f.default, default_factory=f.default_factory, metadata=metadata, kw_only=True)
            fields.append((key, hints[f.name], copy))
    options = dataclasses.make_dataclass("PluginOptions", fields)
    options._argument_group_name = "flags of the chosen plugins"  # type: ignore[attr-defined]
    return options, short


class Parser(TrlParser):
    """TRL's parser (flags and YAML into dataclasses) whose errors are ours and which guesses no abbreviations."""

    def __init__(self, *types: Any, prog: str, description: str, epilog: str) -> None:
        super().__init__(types, prog=prog, description=description, epilog=epilog, allow_abbrev=False)
        self.add_argument_group("settings").add_argument(
            "--config", metavar="YAML", help="settings; flags override them"
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def read_yaml(path: str) -> dict[str, Any]:
    """A mapping of settings.

    Raises:
        ConfigError: If the file is missing or holds no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is no YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {path} must hold a mapping of settings")
    return values


def parse(arguments: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Settings:
    """Settings of a run from flags, over those given as a mapping, over `--config`, over the model's recipe.

    A run that is resumed takes its own `config.yaml` where no other is named.

    Args:
        arguments: Command-line flags.
        settings: Settings by name, as Python calls give them.

    Raises:
        ConfigError: For anything unknown, malformed or contradictory.
        SystemExit: After printing `--help`.
    """
    arguments = _joined(arguments)
    names = ("model", "rl", "reward", "eval_reward", "matching")
    first = _first_look(arguments, *names, "architecture", "resume_from_checkpoint", "output_dir")
    settings = dict(settings or {})
    resume, output = (settings.get(k) or getattr(first, k) for k in ("resume_from_checkpoint", "output_dir"))
    file = first.config or (resume and _config_of(resume, output))
    given = read_yaml(file) if file else {}
    if file and isinstance(given.get("architecture"), str):  # a recipe's, beside its YAML
        given["architecture"] = str(Path(file).parent / given["architecture"])
    in_file = dict(given)
    given |= settings
    if first.model is None and (bare := first.architecture or given.get("architecture")):
        given.setdefault("model", bare)  # of which there is no recipe; only --dry_run can do with it
    look = {key: _first_given(getattr(first, key), given.get(key)) for key in names}
    hints = "A registered model's recipe replaces these defaults. --rl NAME --help adds the flags of NAME."
    about = {"prog": "dmdr-train", "description": DESCRIPTION, "epilog": f"{hints} {installed(*registry.GROUPS)}"}
    if first.help and all(value is None for value in look.values()):
        Parser(Config, **about).parse_args(["--help"])

    default = {f.name: f.default for f in dataclasses.fields(Config)}
    recipe = dict(model_recipe(str(_first_given(look["model"], default["model"]))))
    per_objective = recipe.pop("objectives", {})
    named = {key: str(_first_given(look[key], recipe.get(key), default[key])) for key in names}
    model = registry.registered("models", named["model"])
    home = registry.find("models", model).distribution if model else ""
    untyped = {group: key for group, key in SUMS.items() if look[key] is None}
    chosen = _load(_parts(named), {group: home if key in recipe else "dmdr" for group, key in untyped.items()})
    for plugin in reversed(chosen):  # of several objectives, the first named has the last word
        if plugin.group == "objectives":
            recipe |= per_objective.get(plugin.name, {})
    there = {(plugin.group, plugin.name) for plugin in chosen}
    replaced = [Chosen(group, name, weight, object) for group, weight, name in _parts(in_file)]
    stale = tuple(plugin.key("") for plugin in replaced if (plugin.group, plugin.name) not in there)
    given = {key: value for key, value in given.items() if not _is_stale(key, stale, chosen)}
    return Settings(*_parse(Config, chosen, arguments, given, recipe, **about))


def _parts(named: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Group, weight and name of all plugins that settings name."""
    return [part for group, key in SUMS.items() for part in _named(group, str(named.get(key, "none")))]


def _is_stale(key: str, prefixes: tuple[str, ...], chosen: Sequence[Chosen]) -> bool:
    """Whether a file's setting is of a plugin that flags have replaced, and of none that is chosen; says so."""
    own = tuple(plugin.key("") for plugin in chosen)
    stale = str(key).startswith(prefixes) and not str(key).startswith(own)
    if stale:
        logger.warning("%s is left out: the run does not use what it is a setting of", key)
    return stale


def parse_command(
    command: type[F], arguments: Sequence[str], *, prog: str, description: str
) -> tuple[F, tuple[Chosen, ...]]:
    """The flags of a command that only scores, over `--config`, and the rewards that it names.

    Args:
        command: The command's own flags, a dataclass.
        arguments: Command-line flags.
        prog, description: What `--help` says of the command.

    Raises:
        ConfigError: For anything unknown, malformed or missing.
        SystemExit: After printing `--help`.
    """
    arguments = _joined(arguments)
    first = _first_look(arguments, "reward")
    given = read_yaml(first.config) if first.config else {}
    reward = _first_given(first.reward, given.get("reward"))
    chosen = _load(_named("rewards", str(reward)), {}) if reward is not None else []
    epilog = f"--reward NAME --help adds the flags of NAME. {installed('rewards', 'models')}"
    options, rewards = _parse(command, chosen, arguments, given, {}, prog=prog, description=description, epilog=epilog)
    if not rewards:
        raise ConfigError(f"--reward {options.reward} leaves nothing to score with")
    return options, rewards


def _parse(
    command: type[Any],
    chosen: Sequence[Chosen],
    arguments: Sequence[str],
    given: Mapping[str, Any],
    recipe: Mapping[str, Any],
    **about: str,
) -> tuple[Any, tuple[Chosen, ...]]:
    """The values of a command's flags and of those of its plugins: `arguments` over `given` over `recipe`."""
    options, short = _plugin_options(command, chosen)
    given = {short.get(key, key): value for key, value in given.items()}
    parser = Parser(command, options, **about)
    known = [f.name for kind in (command, options) for f in dataclasses.fields(kind)] + list(short)
    parser.set_defaults_with_config(**recipe)
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown setting '{key}'{registry.suggest(str(key), known)}")
    parser.set_defaults_with_config(**given)
    config, values, _, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        hint = registry.suggest(unknown[0].lstrip("-").split("=")[0], known) if unknown[0].startswith("-") else ""
        raise ConfigError(f"unknown argument {unknown[0]}{hint}")
    check_types(values)
    config.validate()
    plugins = tuple(
        dataclasses.replace(
            plugin,
            options={f.name: getattr(values, plugin.key(f.name)) for f in dataclasses.fields(plugin.cls) if f.init},
        )
        for plugin in chosen
    )
    return config, plugins


def model_recipe(name: str) -> Mapping[str, Any]:
    """The recipe of a registered model; empty for folders and hub ids."""
    return registry.load("models", name).recipe if registry.registered("models", name) else {}


DESCRIPTION = "Distil a diffusion model to a few steps and align it with a reward, in the same run."


def installed(*groups: str) -> str:
    """A sentence of the installed names by group; imports no plugin."""
    names = "; ".join(f"{group}: {', '.join(registry.plugins(group))}" for group in groups)
    return f"Installed {names}."


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--reward -1*hps` as `--reward=-1*hps`: argparse takes such a value for a flag."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--reward", "--eval_reward", "--rl") and re.match(r"-[\d.]", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _config_of(resume: str, output: str | None) -> str | None:
    """The settings of the run that is resumed, where they can be found."""
    folder = Path(resume).resolve().parent.parent if resume != "latest" else Path(output) if output else None
    return str(folder / "config.yaml") if folder and (folder / "config.yaml").is_file() else None


class _FirstLook(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _first_look(arguments: Sequence[str], *names: str) -> argparse.Namespace:
    """The few flags that decide which others there are."""
    parser = _FirstLook(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    for name in ("config", *names):
        parser.add_argument(f"--{name}")
    return parser.parse_known_args(arguments)[0]
