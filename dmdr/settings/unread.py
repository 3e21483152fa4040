"""Settings that a run does not read because of others, and settings that undo each other.

What somebody typed, as a flag or from Python, is refused. A file gets a warning: a run writes every setting into its
own. Of a default or a recipe, which suits several runs, nothing is said.
"""

import logging
from collections.abc import Iterator, Sequence

from dmdr.errors import ConfigError
from dmdr.settings.chosen import Chosen, active_weight, compares_scores, declares
from dmdr.settings.fields import TOPICS, Config
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.settings.parser import Told
from dmdr.settings.trackers import trackers_of

logger = logging.getLogger("dmdr")

USUAL_FACTOR = 0.1  # of a learning rate that the optimizer finds, at least
OFF = (0, "none", None)  # values of the core's settings that agree with what is off anyway; False is 0
DATASET = "prompt_column dataset_config dataset_train_split dataset_streaming"
STAGE1 = "dyna_steps dyna_guidance dyna_renoise sample_weight sample_weights"
STAGE2 = """rl objectives rl_weight rl_balance rl_weight_schedule rl_warmup_steps stage2_learning_rate
    stage2_fake_learning_rate"""
NOBODY = "by any part of the run"
EVALUATION = """eval_reward eval_rewards eval_benchmark benchmarks reference_images eval_steps eval_images_per_prompt
    on_hacking"""
SCORES = """fake_score fake_learning_rate stage2_fake_learning_rate fake_lora_rank fake_lora_alpha
    dyna_steps dyna_guidance dyna_renoise"""
MATCHING = """matching matchings fake_score fake_updates rollouts fake_learning_rate stage2_fake_learning_rate
    fake_lora_rank fake_lora_alpha rl_balance"""


def check_read(config: Config, plugins: Sequence[Chosen], told: Told) -> None:
    """Refuse settings that the run does not read, or warn of them, and warn of those that undo each other.

    Args:
        plugins: All that the run names, its model family among them.
        told: Which settings differ from the defaults and the recipe, and by whose will.

    Raises:
        ConfigError: Names settings that were typed, and says why they are not read; or a tracker that is not there.
    """
    seen = {name for name in TOPICS if getattr(config, name) in OFF}
    seen |= {plugin.key(name) for plugin in plugins for name, value in plugin.options.items() if value == "none"}
    for holds, names, why in _unread(config, plugins):
        found = {name for word in names.split() for name in _named_by(word, plugins)} - seen if holds else set()
        if typed := found & told.typed:
            flags = " and ".join(f"--{name}" for name in sorted(typed))
            verb, them = ("is", "it") if len(typed) == 1 else ("are", "them")
            raise ConfigError(f"{flags} {verb} not read {why}; leave {them} out")
        if in_file := found & told.in_file:
            logger.warning("the file sets %s: not read %s", ", ".join(sorted(in_file)), why)
        seen |= in_file
    for sentence in _undone(config):
        logger.warning(sentence)


def _named_by(word: str, plugins: Sequence[Chosen]) -> set[str]:
    """The setting of this name, or all flags of the run's plugins in the group of this name."""
    return {plugin.key(name) for plugin in plugins if plugin.group == word for name in plugin.options} or {word}


def _unread(c: Config, plugins: Sequence[Chosen]) -> list[tuple[object, str, str]]:
    """The table: if the first holds, these settings are not read, and why."""
    from dmdr.protocols import RoleOptions  # which imports torch

    family = next(plugin for plugin in plugins if plugin.group == "backends")
    roles = family.options if issubclass(family.flags, RoleOptions) else {}
    full_fake = roles.get("fake_score") == "full"
    trackers = trackers_of(c.report_to).values()
    alone = not c.stage1_steps or c.init_student  # stage 2
    has_rl = c.rl != "none" and c.rl_weight and c.stage2_steps
    rewarded = has_rl or (not alone and active_weight(plugins))
    times = len(c.sigmas or c.timesteps or ())
    scores = all(compares_scores(plugin.cls) for plugin in plugins if plugin.group == "matchings")
    compared = c.dmd_weight and scores
    anneals = c.renoise_times in ("beta", "shifted")
    mixes = c.dyna_guidance and not full_fake  # DynaDG
    moves = anneals and c.dyna_renoise != [1, 1]  # DynaRS
    return [
        # What is trained
        (not c.prompts, DATASET, "without --prompts"),
        (c.rl == "none", "rl_weight rl_balance rl_weight_schedule rl_warmup_steps", "with --rl none"),
        (not c.rl_weight, "rl objectives rl_balance rl_weight_schedule rl_warmup_steps", "with --rl_weight 0"),
        (not c.dmd_weight, MATCHING, "with --dmd_weight 0"),
        (not scores, SCORES, f"by --matching {c.matching}, which has no fake score"),
        (c.reward == c.eval_reward == "none", "reward_dtype", "without a reward"),
        (not rewarded and not c.num_eval_samples, "reward rewards", "without RL, sample weights and evaluation"),
        (roles and not rewarded, "reward_vae", "without a reward that is trained on"),
        (roles.get("full_finetune"), "lora_rank lora_alpha", "with --full_finetune"),
        (full_fake, "fake_lora_rank fake_lora_alpha", "with --fake_score full"),
        (full_fake, "dyna_guidance", "with --fake_score full, which has no adapter to mix into the teacher"),
        (
            full_fake and roles["full_finetune"] and not _brings_learners(c, plugins),
            "lora_target_modules",
            "with --full_finetune and --fake_score full: nothing is a LoRA",
        ),
        # Stages
        (not c.stage1_steps, STAGE1, "with --stage1_steps 0"),
        (c.init_student, f"stage1_steps {STAGE1}", "with --init_student, which skips stage 1"),
        (not c.stage2_steps, STAGE2, "with --stage2_steps 0"),
        (alone and c.stage2_learning_rate, "learning_rate", "without stage 1 and with --stage2_learning_rate"),
        (
            alone and c.stage2_fake_learning_rate,
            "fake_learning_rate",
            "without stage 1 and with --stage2_fake_learning_rate",
        ),
        (c.dyna_steps == 0, "dyna_guidance dyna_renoise", "with --dyna_steps 0"),
        (not anneals, "dyna_renoise", f"with --renoise_times {c.renoise_times}"),
        (not mixes and not moves, "dyna_steps", "where neither DynaDG nor DynaRS acts"),
        (c.real_images and not _declared(c, plugins, "real_images"), "real_images caption_column", NOBODY),
        (not c.real_images, "caption_column", "without --real_images (that of --prompts is --prompt_column)"),
        # Renoise times, and what else a comparison of scores asks for
        (not compared and not _declared(c, plugins, "times"), "renoise_times logit_mean logit_std", NOBODY),
        (not compared and not _declared(c, plugins, "guided"), "guidance_jitter guidance_interval", NOBODY),
        (c.renoise_times != "logit_normal", "logit_mean logit_std", f"with --renoise_times {c.renoise_times}"),
        # Steps of the student, and guidance of the teacher
        (times and times != c.num_inference_steps, "num_inference_steps", "with --sigmas or --timesteps"),
        (not c.eta and c.sample_eta in (None, 0, 1), "sde_type", "with --eta 0"),
        (c.guidance_scale <= 1, "guidance_jitter", "with --guidance_scale of at most 1"),
        (c.guidance_scale == 1, "guidance_interval negative_prompt zero_empty_prompt", "with --guidance_scale 1"),
        (OPTIMIZERS[c.optim].unread, " ".join(OPTIMIZERS[c.optim].unread), f"by --optim {c.optim}"),
        # What is written
        (not c.num_eval_samples, EVALUATION, "without --num_eval_samples"),
        (
            not any(hasattr(plugin.cls, "compared_with") for plugin in plugins if plugin.group == "benchmarks"),
            "reference_images",
            f"by --eval_benchmark {c.eval_benchmark}",
        ),
        (not any(each.run_name for each in trackers), "run_name", f"by --report_to {c.report_to}"),
        (not any(each.project for each in trackers), "tracker_project_name", f"by --report_to {c.report_to}"),
        (not c.push_to_hub, "hub_model_id hub_private_repo", "without --push_to_hub"),
        (not c.dry_run, "architecture gpu_memory", "without --dry_run"),
        (not c.output_dir, "overwrite_output_dir", "without --output_dir, because the folder is new then"),
        (c.resume_from_checkpoint, "overwrite_output_dir", "with --resume_from_checkpoint"),
    ]


def _declared(c: Config, plugins: Sequence[Chosen], need: str) -> bool:
    """Whether a part of the run has a need of this name."""
    off = {
        "matchings": not c.dmd_weight,
        "objectives": not c.rl_weight or not c.stage2_steps,
        "sample_weights": not c.stage1_steps or bool(c.init_student),
    }
    return any(not off.get(plugin.group, True) and declares(plugin.build(), need) for plugin in plugins)


def _brings_learners(c: Config, plugins: Sequence[Chosen]) -> bool:
    """Whether an objective of the run does, which may be a LoRA (`AddsRoles`)."""
    return c.rl != "none" and any(hasattr(each.cls, "learners") for each in plugins if each.group == "objectives")


def _undone(c: Config) -> Iterator[str]:
    """What settings do to each other, a sentence each."""
    for name in ("learning_rate", "fake_learning_rate") if OPTIMIZERS[c.optim].finds_rate else ():
        if (rate := getattr(c, name)) < USUAL_FACTOR:
            yield f"--optim {c.optim} finds the learning rate and multiplies it by --{name}: 1 is usual, not {rate:g}"
    for stage, steps in {1: 0 if c.init_student else c.stage1_steps, 2: c.stage2_steps}.items():
        end = f"stage {stage} ends after {steps} update{'s' * (steps > 1)}"
        if 0 < steps <= c.warmup_steps:
            yield f"{end}, before --warmup_steps {c.warmup_steps} are over"
        if stage == 2 and c.rl != "none" and 0 < steps <= c.rl_warmup_steps:
            yield f"{end}, before --rl_warmup_steps {c.rl_warmup_steps} are over"
