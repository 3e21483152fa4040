"""The settings of a run in one dataclass, with Hugging Face's names, and which values are allowed."""

import dataclasses
import reprlib
import typing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from dmdr.errors import ConfigError

REQUIRED = dataclasses.MISSING
LARGEST = 1e30  # of numbers that a float32 holds, with room for products
HEAVIEST = 10**6  # of a loss or a reward
MOST_IMAGES = 2**20  # of an update, an evaluation or a grid
LIMITS = {  # what is above is a slip, which torch would answer with a traceback or the machine with silence
    "num_inference_steps teacher_steps fake_updates": 1000,
    "per_device_train_batch_size num_generations gradient_accumulation_steps": MOST_IMAGES,
    "sample_images num_eval_samples": MOST_IMAGES,
    "learning_rate stage2_learning_rate fake_learning_rate stage2_fake_learning_rate weight_decay": 1000,
    "guidance_scale guidance_jitter": 1000,
    "logit_mean logit_std": 100,
    "dmd_weight rl_weight": HEAVIEST,
}
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 80


def flag(default: Any, help: str) -> Any:
    """A field with its help text; REQUIRED is no default."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Flags:
    """A dataclass of a command's own flags."""

    def validate(self) -> None:
        """Refuse invalid values.

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
    model: str = flag(
        "digits",
        "the teacher, and what the student starts from: a registered name (some with a file, sit-xl-2:PATH), a "
        "pipeline folder, or a hub id",
    )
    prompts: str | None = flag(
        None,
        "file of prompts (.txt with one a line, .jsonl, .json, .csv, .tsv, .parquet, .arrow), or folder or hub id of a "
        "dataset; rewards get the other columns by name; a registered model has prompts of its own",
    )
    prompt_column: str = flag("prompt", "column of --prompts that holds the prompts")
    dataset_config: str | None = flag(None, "configuration of the dataset that --prompts names")
    dataset_train_split: str = flag("train", "split of the dataset that --prompts names")
    dataset_streaming: bool = flag(
        False,
        "read --prompts while the run goes on, for sets that do not fit into memory: rows are shuffled among 10,000, "
        "duplicates stay, and the text encoders stay in memory",
    )
    real_images: str | None = flag(
        None,
        "real images with captions for the parts that read them, cut to --resolution: a folder (captions in "
        "metadata.jsonl, metadata.csv or NAME.txt, or a folder for each class) or a dataset (NAME, or NAME:SPLIT); a "
        "registered model may have images of its own",
    )
    caption_column: str | None = flag(
        None,
        "column of the captions of --real_images; by default the first of prompt, caption, prompts, captions and text",
    )
    rl: str = flag("none", "sum of objectives by name and weight, e.g. '0.5*refl'; 'none' for distillation only")
    reward: str = flag(
        "none",
        "sum of rewards, e.g. '0.3*hps+0.3*clip', where 'hps as LABEL' names flags and curves; 'none' for no reward",
    )
    eval_reward: str = flag(
        "none", "sum of rewards that evaluations measure and that nothing is trained on; their flags begin with eval_"
    )
    matching: str = flag("dmd", "method that compares the student's distribution with the teacher's")
    dmd_weight: float = flag(1.0, "weight of the matching loss; 0 trains by RL only")
    rl_weight: float = flag(0.3, "weight of the RL loss in stage 2")
    rl_balance: Literal["none", "grad_norm"] = flag(
        "none",
        "'none' adds the losses as they are; 'grad_norm' scales the RL gradient in every update, so that rl_weight is "
        "the ratio of its norm to that of the matching gradient, in the student's parameters",
    )
    rl_weight_schedule: Literal["constant", "linear", "cosine"] = flag(
        "constant", "after its warm-up rl_weight stays constant, or falls to 0 until the end of stage 2"
    )
    rl_warmup_steps: int = flag(0, "student updates in which rl_weight grows from 0 to its value")
    stage1_steps: int = flag(2000, "student updates of stage 1 (RT-DM, DynaDG, DynaRS); 0 skips it")
    stage2_steps: int = flag(1000, "student updates of stage 2 (joint DMD and RL); 0 skips it")
    init_student: str | None = flag(
        None, "start from this student and skip stage 1: a run folder (its stage 1), a checkpoint or an export"
    )
    # Distillation
    num_inference_steps: int = flag(4, "sampling steps of the student")
    sigmas: list[float] | None = flag(
        None, "times of the student's steps, decreasing from 1; they replace num_inference_steps and shift"
    )
    timesteps: list[int] | None = flag(
        None, "the same as timesteps of the network, decreasing, from 1000 to 1, e.g. 999 749 500 250"
    )
    eta: float = flag(
        1.0,
        "share of fresh noise in the training sampler: 0 is an ODE step, 1 a renoise step, between them an SDE step",
    )
    sde_type: Literal["cps", "ddim", "flow_sde", "dance_sde"] = flag(
        "cps", "SDE step between eta 0 and 1: coefficients-preserving, DDIM, Flow-GRPO's or DanceGRPO's"
    )
    sample_eta: float | None = flag(
        None,
        "eta in image grids, evaluation and export: 0 or 1, or between with sde_type ddim at the times of diffusers' "
        "DDIMScheduler (Stable Diffusion 1, 2 and XL); by default 1 if sde_type is cps and eta at least 0.5, else 0",
    )
    guidance_scale: float = flag(7.0, "scale of the teacher's classifier-free guidance; 1 is no guidance")
    guidance_jitter: float = flag(
        0.5, "each sample gets a guidance scale within guidance_scale +- this value, if guidance_scale is above 1"
    )
    guidance_interval: list[float] = flag(
        [0.0, 1.0],
        "the least and the greatest time, of 0 (data) to 1 (noise), at which the teacher is guided in training; at "
        "others its conditional answer is taken",
    )
    fake_updates: int = flag(5, "updates of the fake score for each update of the student")
    rollouts: int | None = flag(
        None,
        "rollouts for each update of the student, at most fake_updates; by default 2: one for the student, one that "
        "the fake score's other updates share; where the student has one step, fake_updates",
    )
    dyna_steps: int | None = flag(
        None, "student updates until DynaDG and DynaRS have faded out; all of stage 1 by default and at most"
    )
    dyna_guidance: float = flag(0.25, "DynaDG: share of the fake score's adapter in the teacher at the start; 0 is off")
    dyna_renoise: list[float] = flag(
        [4.0, 1.5], "DynaRS: the two parameters of the renoise time's Beta distribution at the start; 1 1 is uniform"
    )
    renoise_times: Literal["beta", "shifted", "logit_normal", "uniform"] = flag(
        "beta",
        "law of the times at which student and teacher are compared: DynaRS's Beta distribution, as it is or shifted "
        "as the model's times are; or, without DynaRS, logit-normal as for SD3, or uniform from 0.02 to 0.98",
    )
    logit_mean: float = flag(0.0, "mean of --renoise_times logit_normal; above 0 towards noise, below 0 towards data")
    logit_std: float = flag(1.0, "standard deviation of --renoise_times logit_normal")
    sample_weight: str = flag(
        "rt_dm", "method that weighs samples by their reward in stage 1; 'none' weighs all equally"
    )
    # Optimisation
    learning_rate: float = flag(1e-5, "learning rate of the student in stage 1")
    stage2_learning_rate: float | None = flag(
        None, "learning rate of the student in stage 2; learning_rate / 2 by default"
    )
    fake_learning_rate: float = flag(2e-5, "learning rate of the fake score")
    stage2_fake_learning_rate: float | None = flag(
        None, "learning rate of the fake score in stage 2; fake_learning_rate by default"
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = flag(
        "constant", "schedule of the student's learning rate in each stage"
    )
    warmup_steps: int = flag(0, "updates at the start of each stage in which the student's learning rate grows from 0")
    optim: Literal[
        "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit", "adafactor", "prodigy"
    ] = flag(
        "adamw_torch",
        "optimizer; those with 8bit in their names keep their states in 8 bits, they and lion need bitsandbytes; "
        "prodigy needs prodigyopt and finds the learning rate, so that --learning_rate and --fake_learning_rate are 1",
    )
    adam_beta1: float = flag(0.9, "beta1 of AdamW, Lion and Prodigy")
    adam_beta2: float = flag(0.999, "beta2 of AdamW, Lion and Prodigy")
    adam_epsilon: float = flag(1e-8, "epsilon of AdamW and Prodigy")
    weight_decay: float = flag(0.01, "weight decay of the student; the fake score has none")
    ema_decay: float = flag(
        0.0,
        "decay of an average of the student, which is then sampled, evaluated and exported; smaller during the first "
        "updates of a stage; 0 keeps none",
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    max_bad_steps: int = flag(
        10,
        "an update whose loss or gradient is not finite is skipped; the run stops at the next one after so many steps "
        "in a row with such an update; 0 stops at the first",
    )
    per_device_train_batch_size: int = flag(4, "images of a process in one pass; divisible by num_generations")
    gradient_accumulation_steps: int = flag(1, "passes of a process before an update")
    num_generations: int = flag(1, "images per prompt")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = flag(
        None, "precision of the networks; by default that of `accelerate launch`, else bf16 on a GPU and no on a CPU"
    )
    reward_dtype: Literal["fp32", "bf16", "fp16"] = flag(
        "fp32", "precision of the rewards' networks; fp32 is that of the published scorers"
    )
    # Several processes
    shard: str = flag(
        "1",
        "how many processes share one copy of the frozen network: a number, 'node' for those of a machine, or 'all'",
    )
    ddp_timeout: int = flag(1800, "seconds that a process waits for the others before the run fails")
    # The model
    backend: str | None = flag(
        None, "model family, e.g. package:NAME or my_file.py:NAME; by default that of the pipeline's class"
    )
    revision: str | None = flag(None, "branch, tag or commit of --model on the hub")
    seed: int = flag(0, "seed of all random numbers")
    # What is written
    dry_run: bool = flag(False, "check the settings, print the plan and the estimated memory, and write nothing")
    gpu_memory: float | None = flag(None, "GiB of a GPU: --dry_run says which switches make the run fit in it")
    architecture: str | None = flag(
        None, "folder of configuration files without weights that --dry_run reads instead of the model"
    )
    output_dir: str | None = flag(None, "run folder; by default runs/<model>-<rl>, with a number if that exists")
    overwrite_output_dir: bool = flag(False, "delete the run in the folder first")
    resume_from_checkpoint: str | None = flag(
        None, "go on from 'latest' or from a checkpoint folder, with the run's own settings"
    )
    save_steps: int = flag(500, "updates between checkpoints; 0 saves only at the end of a stage")
    save_total_limit: int | None = flag(2, "how many checkpoints are kept beside those at the end of a stage")
    logging_steps: int = flag(10, "updates between log lines")
    report_to: str = flag(
        "tensorboard", "trackers of accelerate, e.g. tensorboard,wandb; 'all' for those that are installed, or 'none'"
    )
    run_name: str | None = flag(None, "what wandb and other trackers call the run; by default they choose")
    tracker_project_name: str = flag("dmdr", "project in which wandb and other trackers keep the run")
    sample_steps: int = flag(100, "updates between image grids; 0 draws only at the end of a stage")
    sample_images: int = flag(8, "images of an image grid, at least one of each of --validation_prompts")
    validation_prompts: list[str] | None = flag(
        None, "what image grids show: a file of prompts as of --prompts, or one or more prompts; by default the run's"
    )
    num_eval_samples: int = flag(0, "samples of the evaluation at the end of each stage; 0 evaluates nothing")
    eval_benchmark: str = flag(
        "none", "benchmark that evaluations ask as well, about images of the run's prompts; with its flags"
    )
    reference_images: str | None = flag(
        None,
        "images that evaluations compare the student's with, in the features of DINOv2: a folder, an .npz file, "
        "a dataset (NAME, or NAME:SPLIT), or 'teacher' for the teacher's own, which are drawn once and kept",
    )
    eval_steps: int = flag(0, "updates between further evaluations of the student; 0 makes none")
    eval_images_per_prompt: int = flag(2, "images of each prompt in an evaluation")
    on_hacking: Literal["warn", "stop"] = flag(
        "warn", "what a run does where its evaluations speak for a hacked reward: say so, or save and stop"
    )
    teacher_steps: int = flag(28, "sampling steps of the teacher in image grids and evaluation")
    push_to_hub: bool = flag(
        False, "upload the student with its model card to the hub at the end; log in with `hf auth login` first"
    )
    hub_model_id: str | None = flag(None, "repository, NAME or OWNER/NAME; by default the name of the run folder")
    hub_private_repo: bool | None = flag(
        None, "whether a new repository is private; by default as its owner has set it"
    )

    def validate(self) -> None:
        super().validate()
        at_least_one = """num_inference_steps fake_updates num_generations sample_images per_device_train_batch_size
            gradient_accumulation_steps logging_steps teacher_steps eval_images_per_prompt ddp_timeout"""
        for name in at_least_one.split():
            self._require(getattr(self, name) >= 1, name, "at least 1")
        not_negative = """stage1_steps stage2_steps warmup_steps rl_warmup_steps save_steps sample_steps eval_steps
            max_bad_steps num_eval_samples dmd_weight rl_weight guidance_scale guidance_jitter weight_decay seed"""
        for name in not_negative.split():
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for names, most in LIMITS.items():
            for name in names.split():
                value = getattr(self, name)
                self._require(value is None or value <= most, name, f"at most {most}")
        update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        what = f"so small that an update has at most {MOST_IMAGES} images"
        self._require(update <= MOST_IMAGES, "gradient_accumulation_steps", what)
        positive = """learning_rate stage2_learning_rate fake_learning_rate stage2_fake_learning_rate max_grad_norm
            adam_epsilon logit_std gpu_memory"""
        for name in positive.split():
            self._require(getattr(self, name) is None or getattr(self, name) > 0, name, "above 0")
        number = self.shard.isdecimal() and int(self.shard) >= 1
        self._require(number or self.shard in ("node", "all"), "shard", "a number of at least 1, 'node' or 'all'")
        for name in ("eta", "dyna_guidance"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        between = self.sde_type == "ddim" and 0 <= (self.sample_eta or 0) <= 1
        how = "0 or 1 (with --sde_type ddim also any number between them)"
        self._require(self.sample_eta in (None, 0, 1) or between, "sample_eta", how)
        self._require(
            len(self.dyna_renoise) == 2 and min(self.dyna_renoise) >= 1, "dyna_renoise", "two numbers of at least 1"
        )
        low_high = self.guidance_interval
        within = len(low_high) == 2 and 0 <= low_high[0] < low_high[1] <= 1
        self._require(within, "guidance_interval", "two numbers between 0 and 1, the first below the second")
        self._require(self.dyna_steps is None or self.dyna_steps >= 0, "dyna_steps", "at least 0")
        self._require(
            self.per_device_train_batch_size % self.num_generations == 0,
            "per_device_train_batch_size",
            f"divisible by --num_generations ({self.num_generations})",
        )
        what = f"at least 1 and at most --fake_updates ({self.fake_updates})"
        self._require(self.rollouts is None or 1 <= self.rollouts <= self.fake_updates, "rollouts", what)
        texts = self.validation_prompts
        filled = texts is None or (bool(texts) and all(map(str.strip, texts)))
        self._require(filled, "validation_prompts", "prompts with text in them")
        self._require(self.save_total_limit is None or self.save_total_limit >= 1, "save_total_limit", "at least 1")
        if self.sigmas is not None:
            bounds = [*self.sigmas, 0.0]
            falling = len(bounds) > 1 and all(a > b for a, b in pairwise(bounds))
            self._require(falling and bounds[0] <= 1, "sigmas", "decreasing numbers, above 0 and at most 1")
        if self.timesteps is not None:
            bounds = [1001, *self.timesteps, 0]
            falling = len(bounds) > 2 and all(a > b for a, b in pairwise(bounds))
            self._require(falling, "timesteps", "decreasing numbers, at most 1000 and at least 1")
            self._require(self.sigmas is None, "timesteps", "left out if --sigmas is given")
        self._require(self.seed < 2**32, "seed", "below 2**32")
        if self.stage2_steps == 0 and (self.stage1_steps == 0 or self.init_student):
            raise ConfigError(
                "nothing to train: --stage2_steps is 0, and stage 1 has no steps (--init_student skips it)"
            )
        if self.dmd_weight == 0 and not self.init_student and self.stage1_steps:
            raise ConfigError("--dmd_weight 0 trains by RL only: give a distilled student with --init_student")
        if self.dmd_weight == 0 and (self.rl == "none" or self.rl_weight == 0):
            raise ConfigError("--dmd_weight 0 without --rl and --rl_weight leaves nothing to train")


def _topics() -> dict[str, str]:
    """What each setting is about, by name."""
    begins = {
        "model": "what is trained, on what, towards what",
        "num_inference_steps": "distillation",
        "learning_rate": "optimisation",
        "backend": "the model",
        "dry_run": "what is written",
    }
    found, topic = {}, ""
    for f in dataclasses.fields(Config):
        topic = begins.get(f.name, topic)
        found[f.name] = topic
    return found


TOPICS = _topics()
_COMMON = """model prompts rl reward rl_weight matching stage1_steps stage2_steps init_student num_inference_steps
    guidance_scale fake_updates learning_rate fake_learning_rate per_device_train_batch_size
    gradient_accumulation_steps num_generations ema_decay mixed_precision seed dry_run output_dir
    resume_from_checkpoint save_steps num_eval_samples eval_reward"""
COMMON = frozenset(_COMMON.split())  # what `--help` shows; `--help all` shows the rest, too


@dataclass(kw_only=True)
class RewardFlags(Flags):
    """The flags of every command that only scores; it has one for the rewards beside."""

    model: str | None = flag(None, "registered model that brings the checkpoints of its rewards, e.g. digits")
    device: str = flag("auto", "where the rewards run, e.g. cpu or cuda:1; auto is the accelerator, if there is one")
    dtype: Literal["fp32", "bf16", "fp16"] = flag("fp32", "precision of the rewards' networks")


def check_types(config: Any) -> None:
    """Values from YAML or Python keep the types that flags would have.

    Raises:
        ConfigError: For a value of another type, or one that no run could use.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        setattr(config, name, typed(f"--{name}", getattr(config, name), hint))


def typed(name: str, value: Any, hint: Any) -> Any:
    """A value of this type, as its flag would give it.

    Raises:
        ConfigError: If it is of another type, or one that no run could use; names it by `name`.
    """
    if hint in (str, str | None) and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value) if abs(value) <= LARGEST else value
    if not _fits(value, hint):
        raise ConfigError(f"{name} must be {_wanted(hint)}, not {shown(value)}{_why(value, hint)}")
    return _plain(value, hint)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if hint is str:
        return isinstance(value, str) and "\0" not in value  # which no path may hold
    return isinstance(value, hint)


def _plain(value: Any, hint: Any) -> Any:
    """A value that fits, of Python's own types: subclasses, such as numpy's, are none that YAML could keep."""
    arguments = typing.get_args(hint)
    if isinstance(value, list):
        item = next((typing.get_args(kind)[0] for kind in (hint, *arguments) if typing.get_origin(kind) is list), Any)
        return [_plain(each, item) for each in value]
    if float in (hint, *arguments) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    return value if kind is None else kind(value)


def shown(value: Any) -> str:
    """A value in a message: in short, however large it is."""
    try:
        return SHORT.repr(value)
    except Exception:  # a number with more digits than Python writes; the code of a stranger's type
        return f"a value of type {type(value).__name__}"


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


def _why(value: Any, hint: Any) -> str:
    """What else to say of a value that does not fit, in brackets; "" if it speaks for itself."""
    if value is False and "no" in typing.get_args(hint):
        return " (YAML reads an unquoted no as false: write 'no')"
    items = value if isinstance(value, list) else [value]
    large = [isinstance(item, int | float) and not -(2**63) <= item < 2**63 for item in items]
    return f" (whole numbers must fit into 64 bits, others must be at most {LARGEST:g})" if any(large) else ""
