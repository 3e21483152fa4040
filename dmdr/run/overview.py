"""What a run is about to do, in a few lines: for its log, its report and --dry_run."""

from collections.abc import Mapping, Sequence

from torch import nn

from dmdr.protocols import OwnLearner, sizes_of
from dmdr.run.job import Job
from dmdr.run.plan import Stage
from dmdr.run.real_images import Blank
from dmdr.sizes import Size

NOTHING_TO_MEASURE = "there is no reward, no judge, and no --reference_images to compare with"


def overview(
    job: Job,
    own: Mapping[str, Sequence[OwnLearner]],
    *,
    precision: str,
    device: str = "",
    sizes: Sequence[Size] = (),
) -> dict[str, str]:
    """Title -> text.

    Args:
        job: Its backend is prepared.
        own: What matching ("") and objectives train beside student and fake score, by objective.
        precision: Of the networks.
        device: Where the main process runs; "" of a dry run.
        sizes: Of images; the backend's by default.
    """
    config, plan, family, backend = job.config, job.plan, job.settings.family, job.backend
    trained = {"student": backend.parameters("student")}
    if plan.matches and "fake_score" in plan.roles:
        trained["fake score"] = backend.parameters("fake_score")
    active = {term.name for stage in plan.stages for term in stage.objectives} | ({""} if plan.matches else set())
    asks_teacher = "fake_score" in plan.roles or any(stage.objectives for stage in plan.stages)
    trained |= {each.name: dict(each.parameters) for owner in own if owner in active for each in own[owner]}
    sizes = sizes or sizes_of(backend)
    start = config.init_student or (config.model if job.teacher != config.model else "the teacher")
    low, high = plan.guidance
    learns = "the fake score" if "fake_score" in plan.roles else "its learners"
    guidance = f"{low:g}" if low == high else f"{low:g} to {high:g}, drawn for each sample"
    if plan.guidance_interval != (0.0, 1.0):
        guidance += ", at times from {:g} to {:g}".format(*plan.guidance_interval)
    lines = {
        "model": config.model,
        **({"teacher": job.teacher} if job.teacher != config.model else {}),
        "family": family.name,
        "trained parameters": ", ".join(f"{name} {_count(parameters):,}" for name, parameters in trained.items()),
        "update": str(plan.batch) + (f", of one of the sizes {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""),
        "student": f"{plan.num_inference_steps} steps, starts from {start}, trained at eta {job.sampler.eta:g}, used "
        f"at eta {job.user_sampler.eta:g}",
        "matching": f"{config.matching}, {plan.rounds} updates of {learns} and {plan.rollouts} rollouts for each "
        "of the student"
        if plan.matches
        else "none: RL only",
        **({"teacher's guidance": guidance} if asks_teacher else {}),
        "precision": precision,
    }
    shared = f", {plan.shards} of which share one copy of the network" if plan.shards > 1 else ""
    lines["processes"] = f"{plan.batch.processes}{shared}"
    if job.real_images and not isinstance(job.real_images.pictures, Blank):
        lines["real images"] = f"{len(job.real_images.rows):,} of {config.real_images or config.model}"
    if device:
        lines["device"] = device
    lines |= {f"stage {stage.number}": _stage(job, stage) for stage in plan.stages}
    return lines | {"evaluation": _evaluation(job)}


def _count(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _stage(job: Job, stage: Stage) -> str:
    weight = job.config.sample_weight if stage.sample_weight else ""
    return f"{stage}" + (f", samples weighted by {weight}" if weight else "")


def _evaluation(job: Job) -> str:
    config = job.config
    if not config.num_eval_samples:
        return "none; --num_eval_samples asks for it"
    what = [*(f"reward {name}" for name in (job.rewards.parts if job.rewards else ()))]
    what += [f"benchmark {plugin.title}" for plugin in job.settings.of("benchmarks")]
    what += [f"held-out reward {name}" for name in (job.eval_rewards.parts if job.eval_rewards else ())]
    if not what and not job.model:
        return f"none: {NOTHING_TO_MEASURE}"
    often = f", and every {config.eval_steps} updates" if config.eval_steps else ""
    judge = "; what the model's judge sees, if it has one" if job.model else ""
    return f"{config.num_eval_samples} samples after each stage{often}: {', '.join(what) or 'no reward'}{judge}"
