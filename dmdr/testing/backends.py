"""What a model family promises."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dmdr.paths import add_noise
from dmdr.protocols import Backend, Role
from dmdr.testing.common import untouched_global_rng
from dmdr.types import Condition

ROLES: tuple[Role, ...] = ("student", "fake_score", "reference")


def check_backend(backend: Backend, prompts: Sequence[str]) -> None:
    """Check a model family; calls `prepare` on the CPU with all roles.

    Args:
        backend: Not prepared yet.
        prompts: A few that it understands.

    Raises:
        AssertionError: With the broken promise.
    """
    trial = BackendTrial(backend, prompts)
    for check in BACKEND_CHECKS:
        check(trial)


@dataclass
class BackendTrial:
    """A backend that is not prepared yet, and a few prompts that it understands."""

    backend: Backend
    prompts: Sequence[str]

    @cached_property
    def prepared(self) -> Backend:
        self.backend.prepare(Accelerator(cpu=True), roles=ROLES)
        return self.backend

    @cached_property
    def cond(self) -> Condition:
        return self.prepared.encode(list(self.prompts))

    @cached_property
    def x0(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(self.cond), *self.prepared.latent_shape, generator=generator)

    @cached_property
    def state(self) -> tuple[Tensor, Tensor, Condition]:
        """Noisy latents, their times, and the condition."""
        eps = torch.randn(self.x0.shape, generator=torch.Generator().manual_seed(1))
        t = torch.full((len(self.cond),), 0.6, dtype=torch.float64)
        return add_noise(self.prepared.path, self.x0, eps, t).float(), t, self.cond


def the_grid_falls_from_noise_to_zero(trial: BackendTrial) -> None:
    for steps in (1, 4):
        t = trial.prepared.grid(steps)
        assert t.shape == (steps + 1,) and t.dtype == torch.float64, f"grid({steps}) is [{steps + 1}] float64"
        assert bool((t[:-1] > t[1:]).all()) and t[-1] == 0 and t[0] <= 1, "a grid decreases within [0, 1] to exactly 0"


@torch.no_grad()
def predictions_are_float32_of_the_latents_shape(trial: BackendTrial) -> None:
    for role in ("teacher", *ROLES):
        found = getattr(trial.prepared, role)(*trial.state).x0
        assert found.shape == trial.x0.shape, f"the {role}'s prediction is [B, *latent], not {list(found.shape)}"
        assert found.dtype == torch.float32, f"the {role}'s prediction is float32, whatever the network's dtype"
        assert found.isfinite().all(), f"the {role}'s prediction of unit Gaussian latents must be finite"


@torch.no_grad()
def every_role_starts_as_the_teacher(trial: BackendTrial) -> None:
    teacher = trial.prepared.teacher(*trial.state).value
    for role in ROLES:
        same = torch.equal(getattr(trial.prepared, role)(*trial.state).value, teacher)
        assert same, f"before training the {role} is the teacher at guidance 1, to the bit"


@torch.no_grad()
def guidance_is_linear(trial: BackendTrial) -> None:
    u, c, guided = (trial.prepared.teacher(*trial.state, guidance=w).value for w in (0.0, 1.0, 3.0))
    assert torch.allclose(guided, u + 3 * (c - u), atol=1e-4), "guidance w is u + w (c - u); 1 is conditional"


@torch.no_grad()
def rows_do_not_depend_on_the_batch(trial: BackendTrial) -> None:
    x_t, t, cond = trial.state
    whole = trial.prepared.teacher(x_t, t, cond).value
    last = slice(len(cond) - 1, len(cond))
    alone = trial.prepared.teacher(x_t[last], t[last], cond[last]).value
    assert torch.allclose(whole[last], alone, atol=1e-4), (
        "a sample's prediction must not depend on the rest of the batch"
    )


def gradients_reach_their_own_role(trial: BackendTrial) -> None:
    backend = trial.prepared
    for name in ("student", "fake_score"):
        getattr(backend, name)(*trial.state).value.square().mean().backward()
        for other in ROLES:
            grads = [p.grad for p in backend.parameters(other).values()]
            reached = any(g is not None and bool(g.any()) for g in grads)
            verb = "reaches" if reached else "misses"
            assert reached == (other == name), f"the gradient of the {name} {verb} the {other}"
            for parameter in backend.parameters(other).values():
                parameter.grad = None


def decoded_images_are_differentiable(trial: BackendTrial) -> None:
    latents = trial.x0.clone().requires_grad_()
    images = trial.prepared.decode(latents)
    assert images.ndim == 4 and images.shape[:2] == (len(trial.cond), 3), "images are [B, 3, H, W]"
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1, "images are float32 in [0, 1]"
    images.sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all(), "decode must be differentiable"


def no_random_numbers(trial: BackendTrial) -> None:
    backend: Any = trial.prepared
    with untouched_global_rng("backend", "noise is handed to it"), torch.no_grad():
        backend.encode(list(trial.prompts))
        backend.student(*trial.state)
        backend.decode(trial.x0)


BACKEND_CHECKS: tuple[Callable[[BackendTrial], None], ...] = (
    the_grid_falls_from_noise_to_zero,
    predictions_are_float32_of_the_latents_shape,
    every_role_starts_as_the_teacher,
    guidance_is_linear,
    rows_do_not_depend_on_the_batch,
    gradients_reach_their_own_role,
    decoded_images_are_differentiable,
    no_random_numbers,
)
