"""Contract checks for plugin authors: `check_objective`, `check_reward`, `check_backend`.

Each raises an AssertionError that says which promise is broken and how to keep it. They need no GPU and no network; the
objective's run on the toy Gaussian mixture, whose latents are points of the plane and whose images are 4 x 4.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dmdr.backends.toy import PROMPTS, Redness, ToyBackend
from dmdr.learner import Learner
from dmdr.matching import DMD
from dmdr.paths import add_noise
from dmdr.prompts import Prompts, PromptStream
from dmdr.protocols import Backend, BackendOptions, Reward, RewardObjective, SampleWeight
from dmdr.rewards import Rewards
from dmdr.sampling import FewStepSampler, time_grid
from dmdr.schedules import DynaDG, DynaRS
from dmdr.trainer import Trainer, WeightedObjective
from dmdr.types import terms_of


def toy_trainer(
    *objectives: WeightedObjective,
    reward: Reward | None = None,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    num_inference_steps: int = 4,
    dmd_weight: float = 1.0,
    rl_weight: float = 1.0,
    sample_weight: SampleWeight | None = None,
    learning_rate: float = 1e-3,
    scaler: torch.amp.GradScaler | None = None,
    seed: int = 0,
) -> Trainer:
    """A complete trainer on the toy backend: four prompts, an exact teacher, the reward `Redness` unless given.

    Args:
        objectives: The RL half, e.g. `WeightedObjective("mine", 1.0, Mine())`.
        batch_size: Images of the global batch; `micro_batch_size` of one pass, the whole local batch by default.
    """
    climbed: Any = Redness() if reward is None else reward
    accelerator = Accelerator(cpu=True)
    backend = ToyBackend("", BackendOptions(seed=seed))
    roles = [role for term in objectives for role in term.objective.needs.roles]
    backend.prepare(accelerator, roles=("student", "fake_score", *dict.fromkeys(roles)))
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def learner(role: Any) -> Learner:
        parameters = backend.parameters(role)
        optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        return Learner(role, parameters, optimizer, schedule, accelerator, scaler, max_grad_norm=1e9)

    return Trainer(
        backend=backend,
        sampler=FewStepSampler(backend.path, time_grid(num_inference_steps), 1.0),
        prompts=PromptStream(
            Prompts([{"prompt": prompt, "label": label} for label, prompt in enumerate(PROMPTS)]),
            batch_size,
            group_size=max((term.objective.needs.group_size for term in objectives), default=1),
            seed=seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        ),
        student=learner("student"),
        fake_score=learner("fake_score"),
        matching=DMD(),
        accelerator=accelerator,
        scaler=scaler,
        seed=seed,
        micro_batch_size=micro_batch_size or batch_size // accelerator.num_processes,
        fake_updates=2,
        fake_mix=DynaDG(0.0, 0),
        renoise=DynaRS(1.0, 1.0, 0),
        dmd_weight=dmd_weight,
        rl_weight=rl_weight,
        objectives=objectives,
        rewards=Rewards({"toy": (1.0, climbed)}),
        sample_weight=sample_weight,
    )


def check_objective(build: Callable[[], RewardObjective], reward: Reward | None = None) -> None:
    """Check an RL objective.

    Args:
        build: Makes a fresh objective; called several times.
        reward: What it climbs; `Redness` by default.

    Raises:
        AssertionError: With the broken promise.
    """
    term = WeightedObjective("checked", 1.0, build())
    needs = term.objective.needs
    batch = 4 * max(needs.group_size, 4)
    trainer = toy_trainer(term, reward=reward, batch_size=batch)
    ctx = trainer.context(0)
    draw = trainer.pick(trainer.rollout(ctx), ctx)
    draw = replace(draw, direction=trainer.direction(draw, ctx))
    if hasattr(term.objective, "setup"):
        term.objective.setup(ctx)

    reached = False
    with _untouched_global_rng("objective"):
        leaf = draw.x0.detach().requires_grad_()
        for answer in terms_of(term.objective(replace(draw, leaf=leaf), ctx)):
            loss = answer.loss
            assert loss.shape == (batch,), f"Term.loss must be one loss per sample, [{batch}], not {list(loss.shape)}"
            valid = torch.ones_like(draw.mask) if answer.valid is None else answer.valid
            assert valid.shape == (batch,) and valid.dtype == torch.bool, "Term.valid must be [B] bool, or None"
            assert loss[valid].isfinite().all(), "Term.loss must be finite for every valid sample"
            if answer.grad is None and loss.requires_grad:
                loss[valid].sum().backward()
            reached = reached or leaf.grad is not None or answer.grad is not None
    student = [p.grad for p in trainer.backend.parameters("student").values()]
    assert reached or any(g is not None for g in student), "the loss reaches neither draw.leaf nor the student"
    for role in ("fake_score", "reference"):
        grads = [p.grad for p in trainer.backend.parameters(role).values()]
        assert not any(g is not None for g in grads), f"the loss must not reach the {role}; detach its prediction"

    _check_micro_batches(build, reward, batch, max(needs.group_size, 1))
    line = toy_trainer(WeightedObjective("checked", 1.0, build()), reward=reward, batch_size=batch).train_step()
    assert all(value == value for key, value in line.items() if key.startswith(("loss/", "grad_norm/"))), (
        f"a whole training step logged NaN: {line}"
    )
    assert needs.reward_grad or leaf.grad is None, "the loss reaches draw.leaf: declare needs.reward_grad"


def _check_micro_batches(build: Callable[[], RewardObjective], reward: Reward | None, batch: int, group: int) -> None:
    """A sample's loss must be the same in a smaller micro-batch."""
    trainer = toy_trainer(WeightedObjective("checked", 1.0, build()), reward=reward, batch_size=batch)
    ctx = trainer.context(0)
    whole = trainer.pick(trainer.rollout(ctx), ctx)
    whole = replace(whole, direction=trainer.direction(whole, ctx))

    def losses(size: int) -> Tensor:
        objective = build()
        if hasattr(objective, "setup"):
            objective.setup(ctx)
        parts = [replace(part, leaf=part.x0.detach().requires_grad_()) for part in whole.split(size)]
        answers = [[term.loss.detach() for term in terms_of(objective(part, ctx))] for part in parts]
        return torch.cat([torch.stack(losses).sum(0) for losses in answers])

    together, apart = losses(batch), losses(group * max(batch // group // 2, 1))
    assert torch.allclose(together, apart, atol=1e-5, equal_nan=True), (
        "a sample's loss must not depend on which other groups share its micro-batch; take statistics over "
        "ctx.gather, or within a group"
    )


def check_reward(reward: Reward, *, size: int = 32, columns: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Check a reward; calls `prepare` on the CPU.

    Args:
        size: Side of the test images in pixels.
        columns: Further columns that it needs, each of length 4.

    Raises:
        AssertionError: With the broken promise.
    """
    reward.prepare(torch.device("cpu"), torch.float32)
    given = dict(columns or {})
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    prompts = ["a red square", "a handwritten seven", "", "a very long prompt " * 40]
    with _untouched_global_rng("reward"), torch.no_grad():
        scores = reward(images, prompts, **given)
    assert scores.shape == (4,) and scores.dtype == torch.float32, (
        f"a reward returns [B] float32; this one {list(scores.shape)} {scores.dtype}"
    )
    assert scores.isfinite().all(), "scores of ordinary images must be finite"
    order = [2, 0, 3, 1]
    shuffled = {name: [column[i] for i in order] for name, column in given.items()}
    with torch.no_grad():
        again = reward(images[order], [prompts[i] for i in order], **shuffled)
    assert torch.allclose(again, scores[order], atol=1e-4), "a score must not depend on the rest of the batch"
    leaf = images.clone().requires_grad_()
    answer = reward(leaf, prompts, **given)
    if reward.differentiable:
        assert answer.requires_grad, "differentiable = True, but the score has no graph; is there a no_grad inside?"
        answer.sum().backward()
        grad = leaf.grad
        assert grad is not None and grad.isfinite().all() and grad.any(), "no finite gradient reaches the images"
    else:
        assert not answer.requires_grad, "differentiable = False, but the score has a graph; detach it"


def check_backend(backend: Backend, prompts: Sequence[str]) -> None:
    """Check a model family; calls `prepare` on the CPU with all roles.

    Args:
        prompts: A few that it understands.

    Raises:
        AssertionError: With the broken promise.
    """
    backend.prepare(Accelerator(cpu=True), roles=("student", "fake_score", "reference"))
    cond = backend.encode(list(prompts))
    count = len(cond)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(count, *backend.latent_shape, generator=generator)
    eps = torch.randn(count, *backend.latent_shape, generator=generator)
    t = torch.full((count,), 0.6, dtype=torch.float64)
    x_t = add_noise(backend.path, x0, eps, t).float()
    with torch.no_grad():
        teacher = backend.teacher(x_t, t, cond)
        assert teacher.x0.shape == x0.shape, "predictions are [B, *latent]"
        assert teacher.x0.dtype == torch.float32, "predictions are float32, whatever the network's dtype"
        for role in (backend.student, backend.fake_score, backend.reference):
            assert torch.equal(role(x_t, t, cond).value, teacher.value), "every role starts as the teacher"
        u, c = (backend.teacher(x_t, t, cond, guidance=w).value for w in (0.0, 1.0))
        guided = backend.teacher(x_t, t, cond, guidance=3.0).value
        assert torch.allclose(guided, u + 3 * (c - u), atol=1e-4), "guidance w is u + w (c - u); 1 is conditional"
    for role_name, role in (("student", backend.student), ("fake_score", backend.fake_score)):
        role(x_t, t, cond).value.square().mean().backward()
        for other in ("student", "fake_score", "reference"):
            grads = [p.grad for p in backend.parameters(other).values()]
            reached = any(g is not None and bool(g.any()) for g in grads)
            verb = "reaches" if reached else "misses"
            assert reached == (other == role_name), f"the gradient of the {role_name} {verb} the {other}"
            for parameter in backend.parameters(other).values():
                parameter.grad = None
    latents = x0.clone().requires_grad_()
    images = backend.decode(latents)
    assert images.ndim == 4 and images.shape[:2] == (count, 3), "images are [B, 3, H, W]"
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1, "images are float32 in [0, 1]"
    images.sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all(), "decode must be differentiable"


@contextmanager
def _untouched_global_rng(who: str) -> Any:
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), (
        f"the {who} drew from the global random generator; use ctx.random, keyed by sample"
    )
