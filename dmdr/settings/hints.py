"""What was probably meant by a flag that the run does not have."""

from collections.abc import Sequence

from dmdr.settings import kinds, registry
from dmdr.settings.chosen import Chosen, flags_of_all
from dmdr.settings.fields import Config

UPDATES = "--stage1_steps and --stage2_steps, which count updates"
# What other trainers call a setting, and what it is called here.
ELSEWHERE = {
    "pretrained_model_name_or_path": "--model",
    "pretrained_model": "--model",
    "model_name_or_path": "--model",
    "model_id": "--model",
    "base_model": "--model",
    "instance_data_dir": "--prompts",
    "train_data_dir": "--prompts",
    "data_dir": "--prompts",
    "dataset": "--prompts",
    "dataset_name": "--prompts",
    "prompt_file": "--prompts",
    "dataset_config_name": "--dataset_config",
    "dataset_split": "--dataset_train_split",
    "reward_model": "--reward",
    "reward_fn": "--reward",
    "num_train_epochs": UPDATES,
    "epochs": UPDATES,
    "max_train_steps": UPDATES,
    "max_steps": UPDATES,
    "train_steps": UPDATES,
    "steps": f"{UPDATES}, or --num_inference_steps, which counts the student's sampling steps",
    "num_steps": "--num_inference_steps",
    "sampling_steps": "--num_inference_steps",
    "cfg": "--guidance_scale",
    "cfg_scale": "--guidance_scale",
    "guidance": "--guidance_scale",
    "lr": "--learning_rate",
    "lr_scheduler": "--lr_scheduler_type",
    "lr_warmup_steps": "--warmup_steps",
    "optimizer": "--optim",
    "use_8bit_adam": "--optim adamw_bnb_8bit",
    "optimizer_type": "--optim",
    "adafactor": "--optim adafactor",
    "adam_weight_decay": "--weight_decay",
    "use_ema": "--ema_decay 0.999",
    "refl_balance": "--rl_balance",
    "batch_size": "--per_device_train_batch_size",
    "train_batch_size": "--per_device_train_batch_size",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "grad_accum": "--gradient_accumulation_steps",
    "group_size": "--num_generations",
    "num_images_per_prompt": "--num_generations",
    "bf16": "--mixed_precision bf16",
    "fp16": "--mixed_precision fp16",
    "fp32": "--mixed_precision no",
    "precision": "--mixed_precision",
    "rank": "--lora_rank",
    "lora_r": "--lora_rank",
    "network_dim": "--lora_rank",
    "network_alpha": "--lora_alpha",
    "target_modules": "--lora_target_modules",
    "full_training": "--full_finetune",
    "image_size": "--resolution",
    "height": "--resolution",
    "width": "--resolution",
    "compile": "--torch_compile",
    "use_gradient_checkpointing": "--gradient_checkpointing",
    "enable_xformers_memory_efficient_attention": "--attention_backend xformers",
    "output": "--output_dir",
    "resume": "--resume_from_checkpoint latest",
    "checkpointing_steps": "--save_steps",
    "checkpoints_total_limit": "--save_total_limit",
    "validation_steps": "--sample_steps",
    "validation_epochs": "--sample_steps, which counts updates",
    "validation_prompt": "--validation_prompts",
    "num_validation_images": "--sample_images, which counts those of all prompts",
    "log_steps": "--logging_steps",
    "wandb": "--report_to wandb",
    "push_to_hub_model_id": "--hub_model_id",
    "hub_token": "nothing in its place: the token is that of `hf auth login`, or HF_TOKEN",
    "hub_strategy": "nothing in its place: the student is uploaded at the end",
    "log_with": "--report_to",
    "wandb_project": "--tracker_project_name",
    "project": "--tracker_project_name",
    "project_name": "--tracker_project_name",
    "wandb_run_name": "--run_name",
    "wandb_name": "--run_name",
    "logging_dir": "--output_dir, in which the log is",
}


def hint(flag: str, known: Sequence[str], chosen: Sequence[Chosen], command: type) -> str:
    """What to write in its place, or who has it, in brackets; "" if nobody could say.

    Args:
        flag: Its name, without dashes.
        known: The flags that there are.
        chosen: The plugins of the run.
        command: The dataclass of the command's own flags.
    """
    if full := [f"--{plugin.key(flag)}" for plugin in chosen for f in plugin.own_flags if f.name == flag]:
        return f" (write {' or '.join(full)})"
    said = [f"write {ELSEWHERE[flag]}"] if command is Config and flag in ELSEWHERE else []
    said += _owners(flag, chosen)
    return f" ({'; '.join(said)})" if said else registry.suggest(flag, list(known))


def _owners(flag: str, chosen: Sequence[Chosen]) -> list[str]:
    """Which other model families, matchings and so on have a flag of this name."""
    names, said = {part.group: part.name for part in chosen}, []
    for group in kinds.WITH_FLAGS:
        who = [name for name, flags in flags_of_all(group).items() if any(f.name == flag for f in flags)]
        if who:
            cure = ", so leave it out" if group == "backends" else ""
            noun, here = kinds.NOUNS[group], names.get(group, "none")
            said.append(f"{noun} with this flag: {', '.join(who)}; this run uses {here}{cure}")
    return said
