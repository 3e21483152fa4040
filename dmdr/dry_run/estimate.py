"""`dmdr-train --dry_run`: a run's settings checked and its training memory estimated, without weights.

Network and decoder are built on the meta device from their configuration files, and the run's own trainer takes its
steps with them: adapters, autocast, checkpointing, losses and optimizers are those of training, and `memory` counts
what is alive. `stand_ins` holds what joins the two.
"""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmdr.backends.kernels import blocks_of
from dmdr.backends.pipeline import PipelineBackend
from dmdr.backends.prompt_encoder import BATCH
from dmdr.dry_run.memory import REST, GPUKernels, Meter
from dmdr.dry_run.stand_ins import CPU, META, AnyReward, Bridge, DryRollouts, DryTrainers, Process, on_meta
from dmdr.errors import ConfigError, one_line
from dmdr.hub import is_hub_id
from dmdr.protocols import Role, with_options
from dmdr.run.device import chosen_precision
from dmdr.run.folder import choose_folder
from dmdr.run.job import Job, assemble, find_start
from dmdr.run.observer import Observer
from dmdr.run.overview import overview
from dmdr.run.pace import GIB
from dmdr.run.upload import open_upload
from dmdr.settings.parse import Settings
from dmdr.sizes import Size
from dmdr.training.trainer import Trainer
from dmdr.types import dtype_of

NETWORK, AVERAGE, OPTIMIZER, GRADIENTS = "network, frozen", "average of the student", "optimizer states", "gradients"
ENCODERS, GATHERED, REWARDS = "text encoders", "blocks gathered from other processes", "rewards"
WHAT = {
    NETWORK: "the teacher; fake score and student are adapters on it, unless they are full",
    REWARDS: "their frozen networks",
    "VAE": "decodes latents for rewards and image grids",
    OPTIMIZER: "what the optimizer keeps of every trained parameter",
    REST: "what networks keep for a backward pass, and what passes through them",
    GATHERED: "whole for as long as they compute",
}
FOLLOWED = 2  # micro-batches, rollouts and updates of the fake score; what more of them add is computed
RUNNING = (AVERAGE, OPTIMIZER, GRADIENTS, REST)


@dataclass(frozen=True)
class Estimate:
    """Training memory of one process, in bytes that are allocated at the same time; `str` is a table of it.

    Attributes:
        overview: What the run would do, by title.
        what: The run in a line.
        parameters: Number of parameters of each part that has any.
        phases: Bytes by part when each phase of the run needs most, by phase. Gradients and activations are those that
            are alive at that moment, not their own peaks.
        backbones: Full networks that the run keeps: one, or more with a full student or fake score.
        backbone: Bytes of one frozen network in the run's precision, or of a process's share of it.
        uncounted: Rewards and benchmarks whose networks are not part of it.
    """

    overview: Mapping[str, str]
    what: str
    parameters: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    backbones: int
    backbone: int
    uncounted: Sequence[str] = ()

    @property
    def highest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    def total(self, backbones: int | None = None) -> int:
        """Bytes that the run needs, or would need with this many backbones.

        Further backbones are frozen copies of the network in the run's precision, and nothing else: what a run keeps
        that has a network for teacher and fake score each (two), and one more under the student (three).
        """
        more = 0 if backbones is None else (backbones - self.backbones) * self.backbone
        return max(sum(parts.values()) + (more if NETWORK in parts else 0) for parts in self.phases.values())

    def __str__(self) -> str:
        peak = self.phases[self.highest]
        rows = [("", "parameters", "GiB", "")]
        for name, size in peak.items():
            count = self.parameters.get(name)
            rows.append((name, "" if count is None else f"{count:,}", f"{size / GIB:.2f}", WHAT.get(name, "")))
        for name in self.uncounted:
            rows.append((name, "", "not counted", "since it cannot be built without weights"))
        rows.append(("total", "", f"{self.total() / GIB:.2f}", "at once, when the run needs most"))
        for backbones in range(self.backbones + 1, 4):
            whose = "the fake score" if backbones == 2 else "fake score and student each"
            what = f"if {whose} had a frozen network of {'its' if backbones == 2 else 'their'} own"
            rows.append((f"with {backbones} backbones", "", f"{self.total(backbones) / GIB:.2f}", what))
        left, middle, right = (max(len(row[i]) for row in rows) for i in range(3))
        table = [f"{a:<{left}}  {b:>{middle}}  {c:>{right}}  {d}".rstrip() for a, b, c, d in rows]
        peaks = (f"{name} {sum(parts.values()) / GIB:.2f}" for name, parts in self.phases.items())
        plan = [f"{title}: {text}" for title, text in self.overview.items()]
        return "\n".join([*plan, "", self.what, *table, f"peak in {self.highest}, of: {', '.join(peaks)} GiB"])


def estimate(settings: Settings) -> Estimate:
    """The training memory of a run; checks all that can be checked without weights, and writes nothing.

    Text encoders encode one batch of a prompt cache that is empty yet. Each stage takes one step, with the optimizers'
    states in place; then one batch of an image grid is drawn. `<architecture>/reward_vae`, if it is there, stands in
    for --reward_vae. With --cpu_offload the VAE is counted all the same.

    Raises:
        ConfigError: For whatever a run would refuse, or a model that cannot be built without weights.
    """
    output, resume = choose_folder(settings.config)
    open_upload(settings.config, output)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as launchers say it; one of them is followed
    find_start(settings, resume, processes)
    real = assemble(settings, processes)
    job = _weightless(real)
    try:
        return _simulated(job, real.backend.sizes)  # type: ignore[attr-defined]
    except ConfigError:
        raise
    except (NotImplementedError, RuntimeError, ValueError, LookupError) as error:
        raise ConfigError(f"--dry_run cannot run these settings without weights: {one_line(error)}") from error


def _weightless(job: Job) -> Job:
    """The job without what touches weights or this machine: merged, loaded or by another kernel they take the same."""
    if not isinstance(job.backend, PipelineBackend):
        raise ConfigError(f"--dry_run: {type(job.backend).__name__} cannot build its model without weights")
    lora = job.backend.options.teacher_lora
    if lora and (Path(lora).expanduser().exists() or not is_hub_id(lora)):  # nothing is downloaded
        job.backend.read_teacher_lora()
    options, own = job.backend.options, Path(job.folder) / "reward_vae"
    options = with_options(
        options,
        teacher=None,
        revision=None if options.teacher else options.revision,  # which is that of the student's start
        teacher_lora=None,
        student_weights=None,
        attention_backend=None,
        cpu_offload=False,
        prompt_cache="off",
        torch_compile=False,
        resolution=str(max(job.backend.sizes, key=prod)),
        reward_vae=str(own) if job.backend.reward_decoder and own.is_dir() else options.reward_vae,
    )
    rewards, eval_rewards = (each and on_meta(each) for each in (job.rewards, job.eval_rewards))
    backend = type(job.backend)(job.folder, options)
    return replace(job, backend=backend, rewards=rewards, eval_rewards=eval_rewards)


def _simulated(job: Job, sizes: Sequence[Size]) -> Estimate:
    config, backend = job.config, job.backend
    assert isinstance(backend, PipelineBackend)
    roles = job.plan.roles
    precision = chosen_precision(config.mixed_precision, gpu=True)
    phases = {}
    with Meter() as meter, GPUKernels():
        shares = Shares(backend, job.plan.shards, meter)
        process = Process(META, precision, shares.note)
        backend.connect(process)
        encoders = [*backend.text.load_encoders().values()]
        held = {ENCODERS: [tensor for encoder in encoders for tensor in _tensors(encoder)]}
        parameters = _count(held)
        asked = job.settings.family.options  # `job.backend` has been given others
        if encoders and asked.get("prompt_cache") != "off" and not config.dataset_streaming:
            meter.label(ENCODERS, held.pop(ENCODERS))
            phases["prompts"] = _encode(backend, encoders, meter)
        elif asked.get("cpu_offload"):
            held.clear()
        del encoders
        meter.newest = REWARDS
        sums = [rewards for rewards in (job.rewards, job.eval_rewards) if rewards]
        for rewards in sums:
            rewards.prepare(META, dtype_of(config.reward_dtype))
        meter.newest = REST
        backend.prepare(process, roles=roles)
        parts = _parts(backend, roles) | held
        parameters |= _count(parts)
        shares.begin()
        if shares.count > 1:
            parts[GATHERED] = [torch.empty(shares.gathered(), dtype=torch.uint8, device=META)]
        for name, tensors in parts.items():
            for tensor in tensors:
                meter.label(name, [tensor], shares.of(tensor))
        for role in roles:
            for parameter in backend.parameters(role).values():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(_label_gradient, meter, shares))
        # Further updates of the fake score and further micro-batches find the same tensors alive, but for trajectories
        # and prompts, whose bytes are added.
        few, passes = min(FOLLOWED, job.plan.rollouts), min(FOLLOWED, job.plan.batch.accumulated)
        batch = replace(job.plan.batch, processes=1, accumulated=passes)
        plan = replace(job.plan, rounds=few, rollouts=few, batch=batch)
        dry = replace(job, plan=plan, backend=Bridge(backend, meter))
        trainers = DryTrainers(dry, Process(CPU), torch.amp.GradScaler("cpu", enabled=False), job.plan)
        for own in chain(*trainers.own_learners.values()):
            parts[own.name] = [each for each in own.parameters.values() if each.is_meta]
            meter.label(own.name, parts[own.name])
            for each in parts[own.name]:
                each.register_post_accumulate_grad_hook(partial(_label_gradient, meter, shares))
        parameters |= _count(parts)
        trainer: Trainer | None = None
        for stage in job.plan.stages:
            trainer = None
            gc.collect()  # an optimizer and its schedule hold each other
            trainer = trainers.of(stage)
            with closing(trainer.prompts):
                phases[f"stage {stage.number}"] = _train(trainer, meter, shares)
        phases["image grid"] = _draw(Observer(dry, Process(CPU), Path()), meter)  # while the last stage goes on
        del trainer
    text = f"{config.model}: {backend.sizes[0]} px, batch {config.per_device_train_batch_size}"
    if shares.count > 1:
        text += f", network shared by {shares.count}"
    names = (ENCODERS, REWARDS, *parts, *RUNNING)
    scorers = [part for rewards in sums for part in rewards.parts.items()]
    uncounted = [f"reward {name}" for name, (_, reward) in scorers if isinstance(reward, AnyReward)]
    uncounted += [f"benchmark {benchmark.title}" for benchmark in job.settings.of("benchmarks")]
    return Estimate(
        overview(job, trainers.own_learners, precision=precision, sizes=sizes),
        f"{text}, {str(backend.dtype).removeprefix('torch.')}, one process",
        {name: number for name, number in parameters.items() if number},
        {phase: {name: peak[name] for name in dict.fromkeys(names) if peak[name]} for phase, peak in phases.items()},
        backbones=1 + len(backend.roles.copies),
        backbone=sum(tensor.nbytes // shares.of(tensor) for tensor in parts[NETWORK]),
        uncounted=uncounted,
    )


class Shares:
    """What several processes share (--shard): the frozen network, and its full copies like it.

    Attributes:
        count: Processes that share a copy; 1 if each has its own.
    """

    def __init__(self, backend: PipelineBackend, count: int, meter: Meter) -> None:
        self.count, self._backend, self._meter = count, backend, meter
        self._shared: set[int] = set()

    def begin(self) -> None:
        """The networks are there."""
        if self.count > 1:
            named = (pair for network in self._backend.roles.networks for pair in network.named_parameters())
            self._shared = {id(parameter) for name, parameter in named if ".lora_" not in name}

    def note(self, leaf: Tensor, cast: Tensor) -> None:
        """Of what is gathered in half precision, autocast makes no copy."""
        if id(leaf) in self._shared:
            self._meter.label(GATHERED, [cast], sys.maxsize)

    def of(self, tensor: Tensor) -> int:
        """Processes among which a parameter, with its gradient and moments, is divided."""
        return self.count if id(tensor) in self._shared else 1

    def gathered(self) -> int:
        """Bytes that are whole at a time: what is in no block, two blocks, and the gradients of one that is trained."""
        return max(map(self._gathered, self._backend.roles.networks))

    def _gathered(self, network: nn.Module) -> int:
        size = self._backend.dtype.itemsize
        sizes = {p: p.numel() * size for p in network.parameters() if id(p) in self._shared}
        blocks = [{p for p in block.parameters() if p in sizes} for block in blocks_of(network)]
        largest = sorted(sum(sizes[p] for p in block) for block in blocks)[-2:]
        trained = any(p.requires_grad for p in sizes)
        return sum(largest) + trained * largest[-1] + sum(sizes[p] for p in sizes.keys() - set().union(*blocks))


@torch.no_grad()
def _encode(backend: PipelineBackend, encoders: Iterable[Any], meter: Meter) -> Counter[str]:
    """The peak of a batch of prompts."""
    meter.restart()
    for encoder in encoders:
        kind = encoder.config.model_type
        length = encoder.config.max_position_embeddings if kind == "clip_text_model" else backend.text_length
        tokens = torch.zeros(BATCH, length, dtype=torch.int64, device=META)
        encoder(tokens, output_hidden_states=kind != "t5")  # of which the pipelines read the last state alone
    return meter.peak


def _train(trainer: Trainer, meter: Meter, shares: Shares) -> Counter[str]:
    """The peak of a step."""
    for learner in trainer.learners.values():
        count = max(map(shares.of, learner.parameters.values()))
        learner.optimizer.register_step_pre_hook(lambda *_, count=count: setattr(meter, "shares", count))
        learner.optimizer.register_step_post_hook(lambda *_: setattr(meter, "shares", 1))
        for parameter in learner.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        learner.update()  # of nothing, after which all states are there
        held = (value for state in learner.optimizer.state.values() for value in state.values())
        meter.label(OPTIMIZER, [value for value in held if isinstance(value, Tensor) and value.is_meta], count)
        if learner.ema:
            meter.label(AVERAGE, learner.ema.average.values(), count)
    meter.restart()
    trainer.train_step(noted=True)  # as in a step that is logged
    peak = meter.peak
    assert isinstance(trainer.rollouts, DryRollouts)
    trainer.rollouts.end_step()
    return peak


def _draw(observer: Observer, meter: Meter) -> Counter[str]:
    """The peak of a batch of an image grid."""
    meter.restart()
    rows = observer.rows[: observer.config.per_device_train_batch_size]
    observer.generate(observer.job.backend.student, observer.sampler, rows, "grid")
    return meter.peak


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _parts(backend: PipelineBackend, roles: Sequence[Role]) -> dict[str, list[Tensor]]:
    """What lies in memory from the start to the end of a run, by name."""
    trained: dict[str, list[Tensor]] = {}
    for role in roles:
        full = backend.roles.copies.get(role)
        name = f"{role.replace('_', ' ')}, {'LoRA' if full is None else 'full'}"
        trained[name] = _tensors(full) if full is not None else list(backend.parameters(role).values())
    own = {id(tensor) for tensors in trained.values() for tensor in tensors}
    parts = {NETWORK: [t for t in _tensors(backend.roles.network) if id(t) not in own], "VAE": _tensors(backend.vae)}
    if backend.reward_vae is not backend.vae:
        parts["VAE of the rewards"] = _tensors(backend.reward_vae)
    return parts | trained


def _count(parts: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    parameters = {name: [t for t in tensors if isinstance(t, nn.Parameter)] for name, tensors in parts.items()}
    return {name: sum(getattr(t, "numbers", t.numel()) for t in found) for name, found in parameters.items()}


def _label_gradient(meter: Meter, shares: Shares, parameter: Tensor) -> None:
    if parameter.grad is not None:
        meter.label(GRADIENTS, [parameter.grad], shares.of(parameter))
