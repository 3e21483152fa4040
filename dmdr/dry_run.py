"""`dmdr-train --dry_run`: a run's settings checked and its training memory estimated, without weights.

Network and decoder are built on the meta device from their configuration files, and the run's own trainer takes its
steps with them: adapters, autocast, checkpointing, losses and optimizers are those of training, and `dmdr.memory`
counts what is alive. What networks answer has no values. `Bridge` stands between: the trainer's own tensors, small
beside a network's, lie on the CPU and have values, so that whatever looks at them goes its usual way.
"""

import gc
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmdr.assemble import Job, assemble
from dmdr.backends.pipeline import PipelineBackend
from dmdr.config import Settings
from dmdr.errors import ConfigError, one_line
from dmdr.memory import REST, GPUKernels, Meter
from dmdr.paths import Prediction
from dmdr.plan import choose_folder, stages
from dmdr.protocols import Role
from dmdr.rewards import Rewards
from dmdr.run import Run, check_tracker
from dmdr.trainer import Trainer, combined_needs
from dmdr.types import Condition, dtype_of

GIB = 2**30
META, CPU = torch.device("meta"), torch.device("cpu")
NETWORK, AVERAGE, OPTIMIZER, GRADIENTS = "network, frozen", "average of the student", "optimizer states", "gradients"
RUNNING = (AVERAGE, OPTIMIZER, GRADIENTS, REST)


@dataclass(frozen=True)
class Estimate:
    """Training memory of one process, in bytes that are allocated at the same time; `str` is a table of it.

    Attributes:
        what: The run in a line.
        parameters: Number of parameters of each part that has any.
        phases: Bytes by part when each phase of the run needs most, by phase. Gradients and activations are those that
            are alive at that moment, not their own peaks.
        backbones: Full networks that the run keeps: one, or more with a full student.
        backbone: Bytes of one frozen network in the run's precision.
    """

    what: str
    parameters: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    backbones: int
    backbone: int

    @property
    def highest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    def total(self, backbones: int | None = None) -> int:
        """Bytes that the run needs, or would need with this many backbones.

        Further backbones are frozen copies of the network in the run's precision, and nothing else: what a run keeps
        that has a network for teacher and fake score each (two), and one more under the student (three).
        """
        more = 0 if backbones is None else backbones - self.backbones
        return sum(self.phases[self.highest].values()) + more * self.backbone

    def __str__(self) -> str:
        peak = self.phases[self.highest]
        rows = [("", "parameters", "GiB")]
        for name, size in peak.items():
            count = self.parameters.get(name)
            rows.append((name, "" if count is None else f"{count:,}", f"{size / GIB:.2f}"))
        rows.append(("rewards", "", "not counted"))
        for backbones in range(self.backbones, max(3, self.backbones) + 1):
            what = f"total with {backbones} backbone{'s' if backbones > 1 else ''}"
            rows.append((what, "", f"{self.total(backbones) / GIB:.2f}"))
        left, middle, right = (max(len(row[i]) for row in rows) for i in range(3))
        table = [f"{a:<{left}}  {b:>{middle}}  {c:>{right}}".rstrip() for a, b, c in rows]
        peaks = (f"{name} {sum(parts.values()) / GIB:.2f}" for name, parts in self.phases.items())
        return "\n".join([self.what, *table, f"peak in {self.highest}, of: {', '.join(peaks)} GiB"])


def estimate(settings: Settings) -> Estimate:
    """The training memory of a run; checks all that can be checked without weights, and writes nothing.

    Each stage takes one step, with the optimizers' states in place; then one batch of a sample grid is drawn.
    `<architecture>/reward_vae`, if it is there, stands in for --reward_vae. With --cpu_offload the VAE is counted all
    the same.

    Raises:
        ConfigError: For whatever a run would refuse, or a model that cannot be built without weights.
    """
    config = settings.config
    check_tracker(config)
    choose_folder(config)
    job = assemble(settings)
    backend = job.backend
    if not isinstance(backend, PipelineBackend):
        raise ConfigError(f"--dry_run: {type(backend).__name__} builds no model without its weights")
    # What touches weights or this machine. Merged, loaded or by another kernel, they take the same memory.
    own = Path(job.folder) / "reward_vae"
    backend.options = replace(
        backend.options,
        teacher_lora=None,
        student_weights=None,
        attention_backend=None,
        cpu_offload=False,
        prompt_cache="off",
        torch_compile=False,
        reward_vae=str(own) if backend.options.reward_vae and own.is_dir() else backend.options.reward_vae,
    )
    try:
        return _simulated(job, backend)
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"--dry_run cannot follow this run without weights: {one_line(error)}") from error


def _simulated(job: Job, backend: PipelineBackend) -> Estimate:
    config, precision = job.config, job.config.mixed_precision
    # More updates of the fake score, or more than two micro-batches, find the same tensors alive.
    micro_batches = min(config.gradient_accumulation_steps, 2)
    short = replace(
        config,
        fake_updates=1,
        gradient_accumulation_steps=micro_batches,
        mixed_precision="no",
        optim="adamw_torch",
    )
    rewards = (
        Rewards({name: (share, AnyReward()) for name, (share, _) in job.rewards.parts.items()}) if job.rewards else None
    )
    roles: tuple[Role, ...] = ("student", "fake_score", *combined_needs(job.objectives).roles)
    meter, phases = Meter(), {}
    with meter, GPUKernels():
        backend.prepare(Process(META, precision), roles=roles)
        parts = _parts(backend, roles)
        if config.prompt_cache == "off" and not config.cpu_offload:
            parts["text encoders"] = [t for encoder in backend.text.load_encoders().values() for t in _tensors(encoder)]
        for name, tensors in parts.items():
            meter.label(name, tensors)
        for role in roles:
            for parameter in backend.parameters(role).values():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(partial(_label_gradient, meter))
        seen = replace(job, settings=replace(job.settings, config=short), backend=Bridge(backend), rewards=rewards)
        run = Run(seen, Path(), None, None, Process(CPU))
        trainer: Trainer | None = None
        for stage in stages(config):
            trainer = None
            gc.collect()  # an optimizer and its schedule hold each other
            trainer = run.trainer(stage, None)
            _fill_optimizers(trainer, meter)
            meter.restart()
            trainer.train_step()
            phases[f"stage {stage.number}"] = meter.peak
        meter.restart()
        rows = run.shown[: config.per_device_train_batch_size]
        run.generate(run.job.backend.student, run.user_sampler, rows, "grid")
        phases["sample grid"] = meter.peak
    if config.optim == "adamw_bnb_8bit":
        for peak in phases.values():
            peak[OPTIMIZER] -= _saved_by_eight_bits(p for role in roles for p in backend.parameters(role).values())
    text = f"{config.model}: {backend.resolution} px, batch {config.per_device_train_batch_size}"
    return Estimate(
        f"{text}, {str(backend.dtype).removeprefix('torch.')}, one process",
        {name: sum(t.numel() for t in tensors if isinstance(t, nn.Parameter)) for name, tensors in parts.items()},
        {phase: {name: peak[name] for name in (*parts, *RUNNING) if peak[name]} for phase, peak in phases.items()},
        backbones=1 + len(backend.roles.copies),
        backbone=sum(t.nbytes for t in parts[NETWORK]),
    )


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


def _label_gradient(meter: Meter, parameter: Tensor) -> None:
    if parameter.grad is not None:
        meter.label(GRADIENTS, [parameter.grad])


def _fill_optimizers(trainer: Trainer, meter: Meter) -> None:
    """An update of nothing, after which all states are there. On CUDA, AdamW takes all parameters at once."""
    for learner in (trainer.student, trainer.fake_score):
        for group in learner.optimizer.param_groups:
            group["foreach"] = True
        learner.update()
        held = (value for state in learner.optimizer.state.values() for value in state.values())
        meter.label(OPTIMIZER, [value for value in held if isinstance(value, Tensor) and value.is_meta])
        if learner.ema:
            meter.label(AVERAGE, learner.ema.average.values())


def _saved_by_eight_bits(parameters: Iterable[Tensor]) -> int:
    """Bytes: two moments of a byte a number, and a float32 scale for each 256 of them, in the place of two float32.

    Source: bitsandbytes' block-wise AdamW8bit, which leaves parameters of fewer than 4096 numbers alone.
    """
    large = (p.numel() for p in parameters if p.requires_grad and p.numel() >= 4096)
    return sum(2 * (4 * n - (n + 4 * math.ceil(n / 256))) for n in large)


@dataclass(frozen=True)
class Process:
    """One process of a run, as far as backend and trainer ask accelerate for it."""

    device: torch.device
    mixed_precision: str = "no"
    num_processes = 1
    process_index = 0
    is_main_process = True

    def autocast(self) -> AbstractContextManager[Any]:
        """What `GPUKernels` takes for autocast."""
        dtype = dtype_of(self.mixed_precision)
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor


class Bridge:
    """A backend on the meta device, as a trainer on the CPU sees it; conditions stay on the meta device."""

    def __init__(self, backend: PipelineBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def _predict(self, role: str, x_t: Tensor, t: Tensor, cond: Condition, **options: float) -> Prediction:
        found = getattr(self._backend, role)(x_t.to(META), t.to(META), cond, **options)
        return replace(found, value=found.value.to(CPU), x_t=x_t, t=t)

    def student(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict("student", x_t, t, cond)

    def fake_score(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict("fake_score", x_t, t, cond)

    def reference(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        return self._predict("reference", x_t, t, cond)

    def teacher(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float = 1.0, fake_mix: float = 0.0
    ) -> Prediction:
        return self._predict("teacher", x_t, t, cond, guidance=guidance, fake_mix=fake_mix)

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        return self._backend.decode(latents.to(META), exact=exact).to(CPU)

    def encode_images(self, images: Tensor) -> Tensor:
        return self._backend.encode_images(images.to(META)).to(CPU)


class AnyReward:
    """A differentiable reward of no cost, in the place of one that has weights; no two of a batch score the same."""

    differentiable = True

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load."""

    def image_features(self, images: Tensor) -> Tensor:
        return images.flatten(2).mean(2)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.ones(len(prompts), 3)

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        return self.image_features(images).mean(1) + torch.arange(len(images))
