"""The parts of a run, built from its settings. Nothing heavy is loaded; what does not fit together is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from dmdr.errors import ConfigError
from dmdr.evaluation.captions import Captioned
from dmdr.prompt_files import is_prompt_file
from dmdr.prompts import Prompts, Row, Rows, read_prompts, split_columns, stream_prompts
from dmdr.protocols import Backend, BringsPrompts, ChecksPrompts, Matching, NamedModel, Shardable, with_options
from dmdr.rewards import Rewards
from dmdr.run.checkpoint import find_initial
from dmdr.run.initial import check_kind
from dmdr.run.plan import Plan
from dmdr.run.real_images import open_real_images
from dmdr.sampling import FewStepSampler
from dmdr.settings.chosen import Chosen, active_weight, compares_scores, declares
from dmdr.settings.fields import Config
from dmdr.settings.optimizers import OPTIMIZERS
from dmdr.settings.parse import Settings
from dmdr.settings.verify import check_columns, check_needs, check_no_objective, needs_of
from dmdr.training.objectives import WeightedObjective


@dataclass(frozen=True)
class Job:
    """What a run is made of; no weights are loaded yet.

    Attributes:
        settings: The resolved settings.
        plan: What the run does.
        folder: Pipeline folder or hub id of the teacher.
        model: The named model that it came from, if any.
        sampler: The student's in training; `user_sampler` as its users run it.
        eval_rewards: What evaluations measure beside the rewards that are trained on.
        validation: What image grids show in place of the run's first prompts, if the user says it.
        real_images: Where a part of the run reads some.
    """

    settings: Settings
    plan: Plan
    folder: str
    model: NamedModel | None
    backend: Backend
    sampler: FewStepSampler
    user_sampler: FewStepSampler
    matching: Matching
    objectives: tuple[WeightedObjective, ...]
    rewards: Rewards | None
    eval_rewards: Rewards | None
    prompts: Rows
    validation: Prompts | None
    real_images: Captioned | None = None

    @property
    def config(self) -> Config:
        return self.settings.config

    @property
    def teacher(self) -> str:
        """What users call the teacher."""
        return other_teacher(self.backend) or self.config.model


def assemble(settings: Settings, processes: int = 1) -> Job:
    """Build all parts of a run.

    Args:
        processes: Processes that will work side by side.

    Raises:
        ConfigError: If a part is unknown, unfit for another, or its input is missing.
    """
    config, named = settings.config, settings.model
    if config.architecture and config.model == config.architecture and not config.dry_run:
        raise ConfigError("--model is missing: this recipe does not name a model")
    bare = config.architecture if config.dry_run else None
    plan, objectives, matching = planned(settings, processes)
    if config.dry_run and named.cls and not bare:
        raise ConfigError(f"--dry_run does not build --model {config.model}: give a folder with --architecture")
    model = named.cls() if named.cls else None
    scorers = [*settings.of("rewards"), *settings.of("eval_rewards")]
    prompts = open_prompts(config, model, scorers)
    check_columns(scorers, prompts.first(1))
    folder = bare or (str(model.folder()) if model else config.model)
    options = settings.family_options()
    if bare:  # an architecture stands in for teacher and student
        options = with_options(options, teacher=None)
    backend: Backend = settings.open_backend(folder, options)
    if config.renoise_times == "shifted" and backend.shift == 1:
        raise ConfigError("--renoise_times shifted: the times of this model are not shifted; use beta")
    if plan.shards > 1:
        if not isinstance(backend, Shardable) or "sharding" not in signature(backend.prepare).parameters:
            raise ConfigError(f"--shard: the processes cannot share a model of {type(backend).__name__}; leave it out")
        backend.check_shardable()
        full = getattr(backend.options, "full_roles", ())
        if full and not OPTIMIZERS[config.optim].shares:
            what = full[0].replace("_", " ")
            raise ConfigError(f"--shard: --optim {config.optim} cannot train a shared full {what}; use adamw_torch")
    if isinstance(backend, ChecksPrompts):
        texts, columns = split_columns(prompts.first(prompts.size or 1))  # of a stream nobody has seen the rest
        backend.check_prompts(texts, **columns)
        backend.check_prompts(own_prompts(objectives))
    checkpoints = None if config.dry_run else model  # which builds them
    rewards, eval_rewards = (
        build_rewards(settings.of(group), checkpoints, rows=prompts.first(1)) if settings.of(group) else None
        for group in ("rewards", "eval_rewards")
    )
    return Job(
        settings,
        plan,
        folder if bare else other_teacher(backend) or folder,
        model,
        backend,
        *plan.samplers(backend, config),
        matching,
        objectives,
        rewards,
        eval_rewards,
        prompts,
        validation_prompts(config, backend),
        open_real_images(config, model, prompts, backend, readers(plan, config, matching)),
    )


def planned(settings: Settings, processes: int = 1) -> tuple[Plan, tuple[WeightedObjective, ...], Matching]:
    """What a run will do, its objectives and its matching, from settings alone.

    Raises:
        ConfigError: If an objective needs what the run has not.
    """
    objectives = tuple(WeightedObjective(p.label, p.weight, p.build()) for p in settings.of("objectives"))
    name, weight = active_weight(settings.plugins) or ("", None)
    matching = settings.of("matchings")[0].build()
    needs = {f"--rl {term.name}": needs_of(f"--rl {term.name}", term.objective) for term in objectives}
    if hasattr(weight, "needs"):
        needs[f"--sample_weight {name}"] = needs_of(f"--sample_weight {name}", weight)
    if settings.config.dmd_weight and hasattr(matching, "needs"):
        needs[f"--matching {settings.config.matching}"] = needs_of(f"--matching {settings.config.matching}", matching)
    kind = settings.family.options.get("fake_score", "lora") if compares_scores(matching) else None
    plan = Plan.of(settings.config, objectives, weight, processes, kind)
    for who, declared in needs.items():
        if not who.startswith("--rl"):
            check_no_objective(who, declared)
        check_needs(
            who,
            declared,
            settings.config,
            settings.of("rewards"),
            settings.of("matchings")[0],
            num_inference_steps=plan.num_inference_steps,
            batch=plan.batch.whole,
        )
    return plan, objectives, matching


def readers(plan: Plan, config: Config, matching: Matching) -> list[str]:
    """The parts of a run that read real images, as users name them."""
    parts: list[tuple[str, Any]] = [(f"--matching {config.matching}", matching)] if plan.matches else []
    for stage in plan.stages:
        parts += [(f"--rl {term.name}", term.objective) for term in stage.objectives]
        parts += [(f"--sample_weight {config.sample_weight}", stage.sample_weight)] if stage.sample_weight else []
    return [who for who, part in parts if declares(part, "real_images")]


def other_teacher(backend: Backend) -> str | None:
    """The teacher that is another than --model."""
    named: str | None = getattr(backend.options, "teacher", None)
    return named


def own_prompts(objectives: Sequence[WeightedObjective]) -> list[str]:
    """Prompts that objectives bring beside the run's."""
    parts = (term.objective for term in objectives)
    return [prompt for part in parts if isinstance(part, BringsPrompts) for prompt in part.prompts()]


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
    raise ConfigError(f"--prompts is missing: --model {config.model} has no prompts of its own")


def validation_prompts(config: Config, backend: Backend) -> Prompts | None:
    """The prompts of image grids that the user names.

    Raises:
        ConfigError: If a file cannot be read, or the model family cannot encode a prompt.
    """
    given = config.validation_prompts
    if given is None:
        return None
    try:
        if not any(map(is_prompt_file, given)):
            found = Prompts([{"prompt": prompt} for prompt in given])
        elif len(given) > 1:
            raise ConfigError("give one file alone, or prompts")
        else:
            found = read_prompts(given[0], column=config.prompt_column)
        if isinstance(backend, ChecksPrompts):
            texts, columns = split_columns(found.rows)
            backend.check_prompts(texts, **columns)
    except ConfigError as error:  # which may name the flag of the run's prompts
        raise ConfigError(f"--validation_prompts: {str(error).removeprefix('--prompts: ')}") from error
    return found


def build_rewards(
    chosen: Sequence[Chosen], model: NamedModel | None, rows: Sequence[Row] = (), **defaults: Any
) -> Rewards:
    """The weighted sum of the named rewards; a named model supplies their checkpoints unless a flag does.

    Rewards that only measure get checkpoints of its that were trained on other data.

    Args:
        chosen: At least one.
        model: The named model, if any.
        rows: Prompt rows; none where they are not known.
        defaults: Values of options that were left unset (None), for the rewards that have them.
    """
    parts: dict[str, tuple[float, Any]] = {}
    for plugin in chosen:
        own = {name: value for name, value in defaults.items() if name in plugin.options}
        if model is not None and plugin.options.get("checkpoint", "") is None:
            path = model.reward_checkpoint(plugin.name, held_out=plugin.group == "eval_rewards")
            own |= {"checkpoint": str(path)} if path else {}
        parts[plugin.label] = (plugin.weight, plugin.build(**own))
    there = list(split_columns(rows)[1]) if rows else None
    return Rewards(parts, {plugin.label: plugin.key for plugin in chosen}, there)


def find_start(settings: Settings, resume: Path | None, processes: int) -> Path | None:
    """The student that --init_student names; None for a run that is resumed, whose checkpoint is looked at instead.

    Raises:
        ConfigError: If there is none, or it or the checkpoint does not fit the settings.
    """
    start = settings.config.init_student
    if resume:
        planned(settings, processes)[0].check_resumable(resume)
    if resume or not start:
        return None
    initial, plan = find_initial(start), planned(settings, processes)[0]
    check_kind(initial, settings.family_options(), scores="fake_score" in plan.roles)
    return initial
