"""The plain loop: DMD, and ReFL beside it, as released training scripts write it; what DMDR is compared with.

Two backbones, one of them with the fake score's LoRA on the teacher; a whole rollout for each update of the fake score;
prompts encoded in every rollout, by text encoders that stay in memory; one graph of both losses; one pass for a batch.
As in DMD2 (arXiv 2405.14867) and DMDR (arXiv 2511.13649), but for three points in which it follows this package, so
that the losses of a first step agree: it trains on the states of its own trajectories, renoises within [0.02, 0.98],
and asks the fake score before it learns the last rollout.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from dmdr.backends.loading import quiet
from dmdr.prompts import PromptStream, Row
from dmdr.randomness import Random
from dmdr.run.job import assemble
from dmdr.settings.parse import Settings
from dmdr.times import T_MAX, T_MIN, Beta
from dmdr.training.phases import phase

from .stock import STOCK, Cond


class Draws:
    """Random numbers: in the first step those of DMDR, then torch's own.

    Attributes:
        keyed: DMDR's, or None.
    """

    def __init__(self, keyed: Random | None, count: int, device: torch.device) -> None:
        self.keyed, self.samples, self.device = keyed, torch.arange(count, device=device), device

    def normal(self, purpose: str, *shape: int) -> Tensor:
        if self.keyed:
            return self.keyed.normal(purpose, self.samples, shape)
        return torch.randn(len(self.samples), *shape, device=self.device)

    def uniform(self, purpose: str, low: float, high: float) -> Tensor:
        if self.keyed:
            return self.keyed.uniform(purpose, self.samples, low, high).float()
        return low + (high - low) * torch.rand(len(self.samples), device=self.device)

    def time(self, a: float, b: float) -> Tensor:
        if self.keyed:
            return self.keyed.beta("renoise/t", self.samples, a, b).clamp(T_MIN, T_MAX).float()
        times = torch.distributions.Beta(a, b).sample((len(self.samples),))
        return times.clamp(T_MIN, T_MAX).to(self.device)

    def index(self, high: int) -> Tensor:
        if self.keyed:
            return self.keyed.integers("index", self.samples, high)
        return torch.randint(high, (len(self.samples),), device=self.device)


class Plain:
    """The loop on the pipeline of a run's settings.

    Args:
        settings: Of the run; rl is none or refl.
        device: Where it runs.
        dtype: Of the frozen networks, and of the arithmetic where it is not float32.
    """

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype) -> None:
        job = assemble(settings)
        self.config, self.plan, self.sampler, self.batch = job.config, job.plan, job.sampler, job.plan.batch.whole
        self.device, self.dtype, self.rewards = device, dtype, job.rewards
        self.stage = job.plan.stages[0]
        options: Any = job.backend.options
        index = json.loads((Path(job.folder) / "model_index.json").read_text())
        stock = STOCK[index["_class_name"]]
        absent = {name: None for name, value in index.items() if value == [None, None]}
        with quiet():  # the code that a SiT's folder brings is ours
            pipe = stock.pipeline.from_pretrained(job.folder, dtype=dtype, trust_remote_code=True, **absent)
        self.pipe: Any = pipe.to(device)
        self.path, size = job.backend.path, job.backend.sizes[0]  # type: ignore[attr-defined]
        self.stock = stock(self.pipe, self.path, getattr(job.backend, "text_length", 0), size)
        self.teacher = self.stock.network.requires_grad_(False).eval()
        self.pipe.vae.requires_grad_(False)
        self.generator = deepcopy(self.teacher)
        targets = list(options.lora_target_modules or job.backend.lora_targets)  # type: ignore[attr-defined]
        torch.manual_seed(options.seed)
        if options.full_finetune:
            self.generator.float().requires_grad_(True)
        else:
            self._adapt(self.generator, options.lora_rank, options.lora_alpha, targets)
        self._adapt(self.teacher, options.fake_lora_rank, options.fake_lora_alpha, targets)
        if options.gradient_checkpointing:
            for each in (self.teacher, self.generator, self.pipe.vae):
                each.enable_gradient_checkpointing()
        self.student = [p for p in self.generator.parameters() if p.requires_grad]
        self.fake = [p for p in self.teacher.parameters() if p.requires_grad]
        betas = (self.config.adam_beta1, self.config.adam_beta2)
        rates = self.stage.learning_rate.value, self.stage.fake_learning_rate.value
        self.optimizer = torch.optim.AdamW(self.student, rates[0], betas, weight_decay=self.config.weight_decay)
        self.fake_optimizer = torch.optim.AdamW(self.fake, rates[1], betas, weight_decay=0.0)
        self.prompts = PromptStream(job.prompts, self.batch, group_size=1, seed=self.config.seed)
        self.latent, self.steps = job.backend.latent_shape, 0
        if self.rewards:
            self.rewards.prepare(device, torch.float32)

    def _adapt(self, network: Any, rank: int, alpha: float, targets: Sequence[str]) -> None:
        network.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")  # type: ignore[arg-type]
        )
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    # --- The networks ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, rows: Sequence[Row]) -> Cond:
        return self.stock.encode(rows)

    def answer(self, network: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.stock.call(network, x_t.to(self.dtype), t, cond, guidance).float()

    def clean(self, network: Any, x_t: Tensor, t: Tensor, cond: Cond, guidance: float = 1.0) -> Tensor:
        """x0 = x_t - t v, or (x_t - sigma eps) / alpha."""
        answer = self.answer(network, x_t, t, cond, guidance)
        alpha, sigma = self.scales(t)
        return (x_t - sigma * answer) / alpha if self.stock.eps else x_t - t[:, None, None, None] * answer

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of times [B], each [B, 1, 1, 1] float32."""
        alpha, sigma = (self.path.alpha(t), self.path.sigma(t))
        return alpha.float()[:, None, None, None], sigma.float()[:, None, None, None]

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The teacher without the fake score's LoRA."""
        self.teacher.disable_adapters()
        yield
        self.teacher.enable_adapters()

    # --- The loop ----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One update of the student, and those of the fake score before it."""
        for k in range(self.config.fake_updates):
            keyed = Random(self.config.seed, 0, f"rollout/{k}") if self.steps == 0 else None
            draws = Draws(keyed, self.batch, self.device)
            with phase("rollout"):
                rows = next(self.prompts)
                cond = self.encode(rows)
                states, answers = self.rollout(cond, draws)
            index = draws.index(len(answers))
            each = torch.arange(len(index), device=self.device)
            t = self.sampler.t.to(self.device, torch.float32)[index]
            x_t, x0 = torch.stack(states)[index, each], torch.stack(answers)[index, each]
            if k + 1 < self.config.fake_updates:
                self.learn_fake_score(x0, cond, draws)
        losses = self.learn(x_t, t, cond, rows, draws)
        losses["fake"] = self.learn_fake_score(x0, cond, draws)
        self.steps += 1
        return losses

    @torch.no_grad()
    def rollout(self, cond: Cond, draws: Draws) -> tuple[list[Tensor], list[Tensor]]:
        """All steps of the student: the states before them, and its answers."""
        noise = draws.normal("noise", self.sampler.num_inference_steps, *self.latent).transpose(0, 1)
        x, states, answers = noise[0], [], []
        for i in range(self.sampler.num_inference_steps):
            t, t_next = (time.float().expand(len(x)).to(self.device) for time in self.sampler.t[i : i + 2])
            states.append(x)
            answers.append(self.clean(self.generator, x, t, cond))
            if i + 1 < self.sampler.num_inference_steps:
                alpha, sigma = self.scales(t_next)
                x = alpha * answers[-1] + sigma * noise[i + 1]
        return states, answers

    def renoised(self, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        law = self.stage.renoise(self.steps)
        assert isinstance(law, Beta)  # of --renoise_times beta
        t, eps = draws.time(law.alpha, law.beta), draws.normal("renoise/eps", *self.latent)
        alpha, sigma = self.scales(t)
        return alpha * x0 + sigma * eps, t, eps

    @phase("fake")
    def learn_fake_score(self, x0: Tensor, cond: Cond, draws: Draws) -> float:
        x_t, t, eps = self.renoised(x0, draws)
        target = eps if self.stock.eps else eps - x0
        loss = (self.answer(self.teacher, x_t, t, cond) - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.fake, self.config.max_grad_norm)
        self.fake_optimizer.step()
        self.fake_optimizer.zero_grad()
        return loss.item()

    @phase("direction")
    @torch.no_grad()
    def direction(self, x0: Tensor, cond: Cond, draws: Draws) -> Tensor:
        x_t, t, _ = self.renoised(x0, draws)
        fake = self.clean(self.teacher, x_t, t, cond)
        with self.bare():
            low, high = self.plan.guidance
            real = self.clean(self.teacher, x_t, t, cond, low if self.stock.guided else 1.0)
            if not self.stock.guided and (low, high) != (1.0, 1.0):
                w = draws.uniform("guidance", low, high)[:, None, None, None]
                without = self.clean(self.teacher, x_t, t, self.stock.empty(len(x0)))
                real = without + w * (real - without)
        return (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)

    @phase("student")
    def learn(self, x_t: Tensor, t: Tensor, cond: Cond, rows: Sequence[Row], draws: Draws) -> dict[str, float]:
        x0 = self.clean(self.generator, x_t, t, cond)
        g = self.direction(x0.detach(), cond, draws)
        dmd = 0.5 * (x0 - (x0 - g).detach()).square().mean()
        losses, loss = {"dmd": dmd.item()}, self.config.dmd_weight * dmd
        if self.rewards and self.stage.objectives:
            with phase("reward"):
                refl = -self.rewards(self.decode(x0), [row["prompt"] for row in rows]).mean()
            loss = loss + self.config.rl_weight * refl
            losses["refl"] = refl.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def decode(self, x0: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1]."""
        config = self.pipe.vae.config
        latents = x0 / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return (self.pipe.vae.decode(latents.to(self.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
