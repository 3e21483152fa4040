"""What a model family promises."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.paths import add_noise, guided
from dmdr.protocols import AddsRoles, Backend, FeatureRole, GivesFeatures, GuidanceRule, Role, SeveralSizes
from dmdr.sampling import FewStepSampler
from dmdr.testing.common import spelt, taken_by_a_run, untouched_global_rng
from dmdr.types import Condition

ROLES: tuple[Role, ...] = ("student", "fake_score", "reference")


def check_backend(backend: Backend, prompts: Sequence[str]) -> None:
    """Check a model family; calls `prepare` of copies on the CPU with all roles.

    Args:
        backend: Not prepared yet.
        prompts: A few that it understands.

    Raises:
        AssertionError: With the broken promise.
    """
    taken_by_a_run("backends", backend)
    trial = BackendTrial(backend, prompts)
    for check in BACKEND_CHECKS:
        check(trial)


@dataclass
class BackendTrial:
    """A backend and what it is tried on.

    Attributes:
        backend: Not prepared yet.
        prompts: A few that it understands.
    """

    backend: Backend
    prompts: Sequence[str]

    @cached_property
    def prepared(self) -> Backend:
        """A copy, prepared with all roles."""
        return self.copy()

    def copy(self) -> Backend:
        """A fresh copy, prepared."""
        backend = deepcopy(self.backend)
        backend.prepare(Accelerator(cpu=True), roles=ROLES)
        return backend

    @cached_property
    def cond(self) -> Condition:
        """The condition of the prompts."""
        return self.prepared.encode(list(self.prompts))

    @cached_property
    def x0(self) -> Tensor:
        """Unit Gaussian latents, [B, *latent] float32."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(self.cond), *self.prepared.latent_shape, generator=generator)

    @cached_property
    def state(self) -> tuple[Tensor, Tensor, Condition]:
        """Noisy latents [B, *latent] float32, their times [B] float64, and the condition."""
        eps = torch.randn(self.x0.shape, generator=torch.Generator().manual_seed(1))
        t = torch.full((len(self.cond),), 0.6, dtype=torch.float64)
        return add_noise(self.prepared.path, self.x0, eps, t).float(), t, self.cond

    @torch.no_grad()
    def answer(self, role: str, *, of: Backend | None = None, **how: float) -> Tensor:
        """What a role makes of the state now, [B, *latent]."""
        found: Tensor = getattr(of or self.prepared, role)(*self.state, **how).value
        return found

    @contextmanager
    def trained(self, role: Role) -> Iterator[None]:
        """Inside, this role has moved as by training; afterwards it is what it was."""
        parameters = self.prepared.parameters(role)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in parameters.values():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.prepared.parameters(role).items():
                    p.copy_(before[name])


def _alike(a: Tensor, b: Tensor) -> bool:
    """But for rounding: two adapters of equal values may be summed in another order."""
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max())


def _starts_as(trial: BackendTrial, answer: Tensor, teachers: Tensor) -> bool:
    """To the bit, but for full copies: torch may multiply in another order where a weight takes gradients."""
    full = len(getattr(trial.backend.options, "full_roles", ())) > 0
    return torch.equal(answer, teachers) or (full and _alike(answer, teachers))


def the_grid_falls_from_noise_to_zero(trial: BackendTrial) -> None:
    """`grid(K)` is [K + 1] float64 and decreases from at most 1 to exactly 0."""
    for steps in (1, 4):
        t = trial.prepared.grid(steps)
        assert t.shape == (steps + 1,) and t.dtype == torch.float64, f"grid({steps}) is [{steps + 1}] float64"
        assert bool((t[:-1] > t[1:]).all()) and t[-1] == 0 and t[0] <= 1, "a grid decreases within [0, 1] to exactly 0"


def a_condition_has_a_row_per_prompt(trial: BackendTrial) -> None:
    """`encode` keeps prompts and columns, and its tensors are [B, ...]."""
    prompts, numbers = list(trial.prompts), list(range(len(trial.prompts)))
    found = trial.prepared.encode(prompts, number=numbers)
    assert list(found.prompts) == prompts, "encode returns a Condition with the prompts that it was given"
    assert list(found.columns.get("number", ())) == numbers, "encode keeps the other columns in Condition.columns"
    for name, tensor in found.tensors.items():
        assert len(tensor) == len(prompts), (
            f"Condition.tensors have a row per prompt, [B, ...], which the core slices; '{name}' is "
            f"{list(tensor.shape)} for {len(prompts)}"
        )


def parameters_have_one_owner(trial: BackendTrial) -> None:
    """Each role has parameters of its own, in the same order every time, that require gradients as the role does."""
    backend = trial.prepared
    owner: dict[int, Role] = {}
    for role in ROLES:
        parameters = backend.parameters(role)
        assert parameters, f"parameters('{role}') is empty, although `prepare` was asked for the {role}"
        assert list(parameters) == list(backend.parameters(role)), (
            f"the names of parameters('{role}') must come in the same order every time; checkpoints go by them"
        )
        for name, parameter in parameters.items():
            assert parameter.requires_grad == (role != "reference"), (
                f"{name} of the {role} must {'not ' if role == 'reference' else ''}require a gradient"
            )
            other = owner.setdefault(id(parameter), role)
            assert other == role, f"{name} of the {role} is also the {other}'s: training one would change the other"


def predictions_are_float32_of_the_latents_shape(trial: BackendTrial) -> None:
    """Predictions are [B, *latent] float32 and finite; those of student and fake score have a graph."""
    for role in ("teacher", *ROLES):
        prediction = getattr(trial.prepared, role)(*trial.state)
        assert prediction.value.requires_grad == (role in ("student", "fake_score")), (
            f"student and fake score must answer with a graph, teacher and reference without one; the {role} does not"
        )
        found = prediction.value
        assert found.shape == trial.x0.shape, f"the {role}'s prediction is [B, *latent], not {list(found.shape)}"
        assert found.dtype == torch.float32, f"the {role}'s prediction is float32, whatever the network's dtype"
        assert found.isfinite().all(), f"the {role}'s prediction of unit Gaussian latents must be finite"


def every_role_starts_as_the_teacher(trial: BackendTrial) -> None:
    """Before training all roles answer as the teacher does at guidance 1, to the bit; full copies, but for rounding."""
    teacher = trial.answer("teacher")
    for role in ROLES:
        same = _starts_as(trial, trial.answer(role), teacher)
        assert same, f"before training the {role} is the teacher at guidance 1, to the bit"


def training_a_role_moves_it_alone(trial: BackendTrial) -> None:
    """The reference is what the student was at the last snapshot."""
    names: tuple[str, ...] = ("teacher", *ROLES)
    for role in ("student", "fake_score"):
        before = {name: trial.answer(name) for name in names}
        with trial.trained(role):
            moved = [name for name in names if not _alike(trial.answer(name), before[name])]
        assert moved == [role], (
            f"training the {role} must change its answer alone; changed: {', '.join(moved) or 'none'}"
        )
    with trial.trained("student"):
        trial.prepared.snapshot()
        student = trial.answer("student")
        assert _alike(trial.answer("reference"), student), "after snapshot() the reference is the student"
    assert _alike(trial.answer("reference"), student), (
        "the reference must keep what snapshot() made it, however the student is trained afterwards"
    )
    trial.prepared.snapshot()


def fake_mix_leads_from_teacher_to_fake_score(trial: BackendTrial) -> None:
    """At `fake_mix` 0 the teacher is pure, at 1 it is the fake score, and between the two it is neither.

    Of a full fake score (`--fake_score full`) no run asks for a share.
    """
    shares = (0.0, 1.0) if getattr(trial.backend.options, "fake_score", "lora") == "full" else (0.0, 1.0, 0.5)
    teacher = trial.answer("teacher")
    with trial.trained("fake_score"):
        pure, mixed, *between = (trial.answer("teacher", fake_mix=share) for share in shares)
        fake = trial.answer("fake_score")
    assert _alike(pure, teacher), "at fake_mix 0 the teacher is pure"
    assert _alike(mixed, fake), "at fake_mix 1 the teacher is the fake score"
    for half, end in product(between, (pure, mixed)):
        assert not _alike(half, end), "fake_mix is a share: at 0.5 the teacher is neither pure nor the fake score"


@torch.no_grad()
def guidance_has_a_rule(trial: BackendTrial) -> None:
    """The teacher at guidance w is u + w (c - u), or what `guided` makes of its own two answers (`GuidanceRule`)."""
    backend, (x_t, t, cond) = trial.prepared, trial.state
    rule = backend if isinstance(backend, GuidanceRule) else None
    scales = (1.0, rule.other_guidance() if rule else 0.0, 3.0)
    c, other, found = (backend.teacher(x_t, t, cond, guidance=w) for w in scales)
    w = torch.full((len(cond),), 3.0, device=c.value.device)
    expected = (rule.guided if rule else guided)(c, other, w)
    said = "what `guided` makes of its answers" if rule else "u + w (c - u)"
    assert torch.allclose(found.value, expected.value, atol=1e-4), f"guidance w is {said}; 1 is conditional"


@torch.no_grad()
def rows_do_not_depend_on_the_batch(trial: BackendTrial) -> None:
    """A sample's prediction is the same alone and in a batch, up to 1e-4."""
    x_t, t, cond = trial.state
    whole = trial.prepared.teacher(x_t, t, cond).value
    last = slice(len(cond) - 1, len(cond))
    alone = trial.prepared.teacher(x_t[last], t[last], cond[last]).value
    assert torch.allclose(whole[last], alone, atol=1e-4), (
        "a sample's prediction must not depend on the rest of the batch"
    )


@torch.no_grad()
def a_prompt_does_not_depend_on_its_company(trial: BackendTrial) -> None:
    """What is predicted for a prompt is the same alone and beside a much longer one, up to 1e-4."""
    backend = trial.prepared
    prompts = ["", " ".join([*trial.prompts] * 4)]
    try:
        cond = backend.encode(prompts)
    except ConfigError:  # it reads no free text, such as names of classes alone
        prompts = list(trial.prompts)
        cond = backend.encode(prompts)
    x_t, t = torch.stack([trial.state[0][0]] * len(prompts)), trial.state[1][:1].expand(len(prompts))
    together = backend.student(x_t, t, cond).value
    for row, prompt in enumerate(prompts):
        alone = backend.student(x_t[:1], t[:1], backend.encode([prompt])).value[0]
        assert torch.allclose(together[row], alone, atol=1e-4), (
            "the prediction for a prompt depends on the other prompts that are encoded with it: mask the padding, or "
            "pad all prompts to one length"
        )


def gradients_reach_their_own_role(trial: BackendTrial) -> None:
    """The gradient of a role's prediction reaches its own parameters and no other's."""
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


def features_are_of_their_own_role(trial: BackendTrial) -> None:
    """Features (`GivesFeatures`) are [B, N, C] float32 of each layer; the fake score's are the teacher's at first.

    To the bit; those of a full copy, but for rounding.
    Their gradient reaches x_t and, of the fake score, its parameters, and nothing else; asking for them changes no
    prediction.
    """
    backend, (x_t, t, cond) = trial.prepared, trial.state
    if not isinstance(backend, GivesFeatures):
        return
    widths, layers = list(backend.feature_widths), range(len(backend.feature_widths))
    prediction, teachers = trial.answer("fake_score"), backend.features("teacher", x_t, t, cond, layers)
    for each, width in zip(teachers, widths, strict=True):
        shape = list(each.shape)
        assert len(shape) == 3 and [shape[0], shape[2]] == [len(cond), width] and each.dtype == torch.float32, (
            f"features are [B, N, C] float32 with the C of feature_widths, {width}, not {shape} {each.dtype}"
        )
    (last,) = backend.features("teacher", x_t[-1:], t[-1:], cond[-1:], [layers[-1]])
    assert torch.allclose(last[0], teachers[-1][-1], atol=1e-4), "a sample's features depend on the rest of the batch"
    for mine, theirs in zip(backend.features("fake_score", x_t, t, cond, layers), teachers, strict=True):
        same = _starts_as(trial, mine, theirs)
        assert same, "before training the fake score's features are the teacher's, to the bit"
    with trial.trained("fake_score"):
        moved = backend.features("fake_score", x_t, t, cond, layers)
        assert not _alike(moved[-1], teachers[-1]), "training the fake score must change its features"
        again = backend.features("teacher", x_t, t, cond, layers)
        assert _alike(again[-1], teachers[-1]), "training the fake score must not change the teacher's features"
    both: tuple[FeatureRole, ...] = ("teacher", "fake_score")
    for role in both:
        x = x_t.clone().requires_grad_()
        found = backend.features(role, x, t, cond, layers)[-1].square().mean()
        if found.requires_grad:
            found.backward()
        assert x.grad is not None and bool(x.grad.any()), f"the features of the {role} have no graph into x_t"
        reached = [other for other in ROLES if any(p.grad is not None for p in backend.parameters(other).values())]
        for parameter in [p for other in ROLES for p in backend.parameters(other).values()]:
            parameter.grad = None
        wanted = ["fake_score"] if role == "fake_score" else []
        assert reached == wanted, f"the features of the {role} reach {' and '.join(reached) or 'no parameters'}"
    assert torch.equal(trial.answer("fake_score"), prediction), "asking for features changes a later prediction"


def an_added_role_moves_alone(trial: BackendTrial) -> None:
    """A role of `AddsRoles` starts as the teacher, guided or not; its gradient and its training change nothing else."""
    backend = trial.copy()
    if not isinstance(backend, AddsRoles):
        return
    names: tuple[str, ...] = ("teacher", *ROLES)
    before = {name: trial.answer(name, of=backend) for name in names}
    others = [p for role in ROLES for p in backend.parameters(role).values()]
    trains = [p.requires_grad for p in others]
    added = backend.add_role("further", rank=2, alpha=4.0)
    again = backend.add_role("further", rank=2, alpha=4.0)
    assert added and all(again.get(name) is p for name, p in added.items()), (
        "add_role gives the parameters of the role of this name that is there already, where there is one"
    )
    assert all(p.requires_grad and p.dtype == torch.float32 for p in added.values()), (
        "an added role has float32 parameters that require gradients"
    )
    assert trains == [p.requires_grad for p in others], "add_role must not change what is trained of the other roles"

    def asked(guidance: float = 1.0) -> Tensor:
        return backend.ask_role(*trial.state, role="further", guidance=guidance).value

    for guidance in (1.0, 3.0):
        teacher = trial.answer("teacher", of=backend, guidance=guidance)
        assert _alike(asked(guidance).detach(), teacher), (
            f"before training an added role is the teacher, also at guidance {guidance:g}"
        )
    assert asked().requires_grad, "an added role answers with a graph"
    asked().square().mean().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in added.values()), "its gradient misses an added role"
    assert not any(p.grad is not None and bool(p.grad.any()) for p in others), "its gradient reaches another role"
    with torch.no_grad():
        for p in added.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        assert not _alike(asked(), before["teacher"]), "training an added role must change its answer"
    for name, answer in before.items():
        assert _alike(trial.answer(name, of=backend), answer), f"training an added role changed the {name}"


def decoded_images_are_differentiable(trial: BackendTrial) -> None:
    """`decode` makes [B, 3, H, W] float32 in [0, 1], with a finite gradient in the latents."""
    latents = trial.x0.clone().requires_grad_()
    images = trial.prepared.decode(latents)
    assert images.ndim == 4 and images.shape[:2] == (len(trial.cond), 3), "images are [B, 3, H, W]"
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1, "images are float32 in [0, 1]"
    if images.requires_grad:
        images.sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all(), "decode must be differentiable"


def images_are_encoded_to_latents(trial: BackendTrial) -> None:
    """`encode_images` makes finite [B, *latent] of what `decode` makes."""
    with torch.no_grad():
        images = trial.prepared.decode(trial.x0)
        latents = trial.prepared.encode_images(images)
    assert latents.shape == trial.x0.shape, (
        f"encode_images makes [B, *latent] of what decode makes, {list(trial.x0.shape)}, not {list(latents.shape)}"
    )
    assert latents.isfinite().all(), "encode_images must be finite"


@torch.no_grad()
def every_size_is_taken(trial: BackendTrial) -> None:
    """Latents of each of several sizes (`SeveralSizes`) are answered and decoded; `latent_shape` is the first size."""
    backend = trial.prepared
    if not isinstance(backend, SeveralSizes):
        return
    first, shapes = tuple(backend.latent_shape), [tuple(shape) for shape in backend.latent_shapes]
    assert shapes[:1] == [first], f"latent_shapes begins with latent_shape, {list(first)}, not {shapes[:1]}"
    _, t, cond = trial.state
    sides = []
    for shape in shapes:
        x_t = torch.randn(len(cond), *shape, generator=torch.Generator().manual_seed(3))
        found = backend.student(x_t, t, cond).value
        assert found.shape == x_t.shape, f"of latents {list(x_t.shape)} the student makes {list(found.shape)}"
        sides.append(tuple(backend.decode(x_t).shape[2:]))
    assert len(set(sides)) == len(set(shapes)), f"decode makes images of {sides} of latents of {shapes}"


def an_export_brings_back_the_student(trial: BackendTrial) -> None:
    """On another machine, that is, in another object, as --init_student and dmdr-sample load it."""
    backend, other = trial.prepared, trial.copy()
    with trial.trained("student"), TemporaryDirectory() as folder:
        exported = trial.answer("student")
        before = {role: trial.answer(role) for role in ("teacher", "fake_score", "reference")}
        sampler, arguments = _exported(backend, Path(folder))
        try:
            json.dumps(arguments)
        except TypeError as error:
            what = "export returns the arguments of the stock pipeline's call, for a JSON file"
            raise AssertionError(f"{what}: {error}") from error
        assert isinstance(backend.snippet("base", trial.prompts[0], sampler), str), "snippet returns Python code"
        other.load_export(Path(folder))
    assert _alike(trial.answer("student", of=other), exported), (
        "load_export(directory) must bring back the student that export(directory, sampler) wrote"
    )
    for role, answer in before.items():
        assert _alike(trial.answer(role, of=other), answer), (
            f"load_export must change the student only; the {role} changed"
        )


def _exported(backend: Backend, folder: Path) -> tuple[FewStepSampler, Mapping[str, Any]]:
    """Export with stochastic steps or, where the family's scheduler has none, without."""
    samplers = [FewStepSampler(backend.path, backend.grid(4), eta) for eta in (1.0, 0.0)]
    try:
        return samplers[0], backend.export(folder, samplers[0])
    except ConfigError:
        return samplers[1], backend.export(folder, samplers[1])


def no_random_numbers(trial: BackendTrial) -> None:
    """Nothing is drawn from a global generator."""
    backend: Any = trial.prepared
    with untouched_global_rng("backend", "noise is handed to it"), torch.no_grad():
        backend.encode(list(trial.prompts))
        backend.student(*trial.state)
        backend.decode(trial.x0)


def no_method_is_misspelt(trial: BackendTrial) -> None:
    """A run calls optional methods by their names in `dmdr.protocols`, and never one whose name is nearly that."""
    spelt("backends", trial.backend)


BACKEND_CHECKS: tuple[Callable[[BackendTrial], None], ...] = (
    the_grid_falls_from_noise_to_zero,
    a_condition_has_a_row_per_prompt,
    parameters_have_one_owner,
    predictions_are_float32_of_the_latents_shape,
    every_role_starts_as_the_teacher,
    training_a_role_moves_it_alone,
    fake_mix_leads_from_teacher_to_fake_score,
    guidance_has_a_rule,
    rows_do_not_depend_on_the_batch,
    a_prompt_does_not_depend_on_its_company,
    gradients_reach_their_own_role,
    features_are_of_their_own_role,
    an_added_role_moves_alone,
    decoded_images_are_differentiable,
    images_are_encoded_to_latents,
    every_size_is_taken,
    an_export_brings_back_the_student,
    no_random_numbers,
    no_method_is_misspelt,
)
