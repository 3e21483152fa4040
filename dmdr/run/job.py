"""From settings to objects: every name is looked up and every requirement checked before anything heavy happens."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from dmdr.errors import ConfigError
from dmdr.prompts import Prompts, Row, Rows, read_prompts, split_columns, stream_prompts
from dmdr.protocols import Backend, BackendOptions, Matching, NamedModel, Needs
from dmdr.rewards import Rewards
from dmdr.settings import registry
from dmdr.settings.fields import Config
from dmdr.settings.parse import Chosen, Settings
from dmdr.training.trainer import WeightedObjective


@dataclass(frozen=True)
class Job:
    """What a run is made of; no weights are loaded yet.

    Attributes:
        settings: The resolved settings.
        folder: Pipeline folder or hub id of the teacher.
        model: The named model that it came from, if any.
        eval_rewards: What evaluations measure beside the rewards that are trained on.
    """

    settings: Settings
    folder: str
    model: NamedModel | None
    backend: Backend
    matching: Matching
    objectives: tuple[WeightedObjective, ...]
    rewards: Rewards | None
    eval_rewards: Rewards | None
    prompts: Rows

    @property
    def config(self) -> Config:
        return self.settings.config


def assemble(settings: Settings) -> Job:
    """Build all parts of a run.

    Raises:
        ConfigError: If a part is unknown, unfit for another, or its input is missing.
    """
    config = settings.config
    if config.architecture and config.model == config.architecture and not config.dry_run:
        raise ConfigError("--model is missing: this recipe names none")
    named = registry.registered("models", config.model)
    bare = config.architecture if config.dry_run else None
    if bare or not named:
        pipeline_class(bare or config.model, config.revision)  # refuse a wrong folder before anything else
    objectives = tuple(WeightedObjective(p.name, p.weight, p.build()) for p in settings.of("objectives"))
    check_needs(config, objectives, settings)
    matching = settings.of("matchings")[0].build()
    if config.dry_run and named and not bare:
        raise ConfigError(f"--dry_run builds nothing, and --model {config.model} is built: it needs --architecture")
    model = registry.load("models", config.model)() if named else None
    scorers = [*settings.of("rewards"), *settings.of("eval_rewards")]
    prompts = open_prompts(config, model, scorers)
    check_columns(scorers, prompts.first(1))
    folder = bare or (str(model.folder()) if model else config.model)
    backend = open_backend(folder, config, registry.find("models", named).distribution if model and named else None)
    if hasattr(backend, "check_prompts"):
        texts, columns = split_columns(prompts.first(prompts.size or 1))  # of a stream nobody has seen the rest
        backend.check_prompts(texts, **columns)
        backend.check_prompts(own_prompts(objectives))
    checkpoints = None if config.dry_run else model  # which builds them
    rewards, eval_rewards = (
        build_rewards(settings.of(group), checkpoints) if settings.of(group) else None
        for group in ("rewards", "eval_rewards")
    )
    return Job(settings, folder, model, backend, matching, objectives, rewards, eval_rewards, prompts)


def own_prompts(objectives: Sequence[WeightedObjective]) -> list[str]:
    """Prompts that objectives bring beside the run's."""
    parts = (term.objective for term in objectives)
    return [prompt for part in parts if hasattr(part, "prompts") for prompt in part.prompts()]


def open_prompts(config: Config, model: NamedModel | None, rewards: Sequence[Chosen]) -> Rows:
    """The prompts that the user names, or else the model's own; a dry run can do with none."""
    if config.prompts:
        read: Callable[..., Rows] = stream_prompts if config.dataset_streaming else read_prompts
        return read(
            config.prompts,
            column=config.prompt_column,
            config=config.dataset_config,
            split=config.dataset_train_split,
        )
    if model is not None:
        return Prompts(model.prompts())
    if config.dry_run:  # a row that any family can encode, with all that a reward could ask for
        columns = [name for reward in rewards for name in getattr(reward.cls, "columns", ())]
        return Prompts([{"prompt": "class 0", **dict.fromkeys(columns, 0)}])
    raise ConfigError(f"--prompts is missing: --model {config.model} brings none of its own")


def check_needs(config: Config, objectives: tuple[WeightedObjective, ...], settings: Settings) -> None:
    """Refuse objectives whose declared needs the run does not meet."""
    last = len(config.sigmas or config.timesteps or range(config.num_inference_steps)) - 1
    for term in objectives:
        who = f"--rl {term.name}"
        try:
            needs = term.objective.needs
        except (TypeError, ValueError) as error:  # of Needs(...)
            raise ConfigError(f"{who}: {error}") from error
        if not isinstance(needs, Needs):
            raise ConfigError(
                f"{who}: its needs are no dmdr.protocols.Needs; is `needs` a @property that returns them?"
            )
        if needs.reward and not settings.of("rewards"):
            raise ConfigError(f"{who} climbs a reward: name one with --reward")
        for reward in settings.of("rewards"):
            if needs.reward_grad and not getattr(reward.cls, "differentiable", False):
                raise ConfigError(f"{who} needs the gradient of the reward, and '{reward.name}' is not differentiable")
            if needs.text_features and not hasattr(reward.cls, "text_features"):
                raise ConfigError(f"{who} needs a reward with text features, and '{reward.name}' has none")
        if needs.matching and config.dmd_weight == 0:
            raise ConfigError(f"{who} reads the matching gradient: it needs --dmd_weight above 0")
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        batch *= int(os.environ.get("WORLD_SIZE", 1))  # as launchers say it, before there is an accelerator
        if batch < needs.batch_size:
            raise ConfigError(
                f"{who} compares the images of a batch: it needs --per_device_train_batch_size of at least "
                f"{needs.batch_size} in all processes together, not {batch}"
            )
        if config.num_generations < needs.group_size:
            raise ConfigError(
                f"{who} needs --num_generations of at least {needs.group_size}, not {config.num_generations}"
            )
        noisy = max(needs.stochastic_steps, int(needs.steps == "stochastic" or needs.log_prob))
        if noisy and (last < noisy or config.eta == 0):
            raise ConfigError(
                f"{who} acts on stochastic steps, and the last is deterministic: it needs --num_inference_steps of at "
                f"least {noisy + 1} and --eta above 0"
            )
        if isinstance(needs.steps, tuple) and not all(0 <= step <= last for step in needs.steps):
            raise ConfigError(f"{who} acts on step {max(needs.steps)}, but the student's last step is {last}")


def check_columns(chosen: Sequence[Chosen], rows: Sequence[Row]) -> None:
    """Refuse rewards that need a column which the prompt rows lack."""
    there = [name for name in rows[0] if name != "prompt"]
    for reward in chosen:
        for name in getattr(reward.cls, "columns", ()):
            if name not in there:
                raise ConfigError(
                    f"reward '{reward.name}' needs the prompts to have a column '{name}'; they have "
                    f"{', '.join(there) or 'none'}"
                )


def build_rewards(chosen: Sequence[Chosen], model: NamedModel | None, **defaults: Any) -> Rewards:
    """The weighted sum of the named rewards; a named model supplies their checkpoints unless a flag does.

    Rewards that only measure get checkpoints of its that were trained on other data.

    Args:
        chosen: At least one.
        model: The named model, if any.
        defaults: Values of options that were left unset (None), for the rewards that have them.
    """
    parts: dict[str, tuple[float, Any]] = {}
    for plugin in chosen:
        own = {name: value for name, value in defaults.items() if name in plugin.options}
        if model is not None and plugin.options.get("checkpoint", "") is None:
            path = model.reward_checkpoint(plugin.name, held_out=plugin.group == "eval_rewards")
            own |= {"checkpoint": str(path)} if path else {}
        parts[plugin.name] = (plugin.weight, plugin.build(**own))
    return Rewards(parts)


def pipeline_class(folder: str, revision: str | None = None) -> str:
    """Class name of the pipeline in a folder, or of a hub id at some revision.

    Raises:
        ConfigError: If it is no diffusers pipeline.
    """
    path = Path(folder)
    if path.exists() or folder.count("/") != 1:
        index = path / "model_index.json"
        if not index.is_file():
            known = ", ".join(registry.plugins("models"))
            raise ConfigError(
                f"--model {folder} is neither a diffusers pipeline folder (no model_index.json), nor a hub id, nor a "
                f"registered model{registry.suggest(folder, list(registry.plugins('models')))}; registered: {known}"
            )
        try:
            return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--model {folder}: model_index.json is damaged: {error}") from error
    try:
        index = Path(hf_hub_download(folder, "model_index.json", revision=revision))
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except Exception as error:  # every hub and network failure; the first line says which
        raise ConfigError(
            f"--model {folder}: no such folder, and the hub says: {str(error).splitlines()[0]}"
        ) from error


def open_backend(folder: str, config: Config, own: str | None = None) -> Backend:
    """The backend that the user names, or else that of the folder's pipeline class.

    Args:
        own: The distribution of the named model, whose backend is meant where several offer one.
    """
    name = pipeline_class(folder, config.revision)
    if not config.backend and not registry.registered("backends", name):
        known = ", ".join(registry.plugins("backends"))
        raise ConfigError(
            f"--model {folder} is a {name}, which no backend trains; there are backends for {known} "
            "(name another with --backend; a package adds one under the entry-point group 'dmdr.backends')"
        )
    given = {option.name: getattr(config, option.name) for option in fields(BackendOptions)}
    lists = {name: tuple(given[name] or ()) for name in ("lora_target_modules", "drop_text_encoders")}
    given["reward_vae"] = None if config.reward_vae == "none" else config.reward_vae
    options = BackendOptions(**(given | lists))
    backend: Backend = registry.load("backends", config.backend or name, None if config.backend else own)(
        folder, options
    )
    return backend
