"""Shared by the checks."""

import io
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from dmdr.backends.toy import Redness
from dmdr.errors import ConfigError, TrainingError
from dmdr.paths import Prediction
from dmdr.protocols import Backend, Role
from dmdr.randomness import Random
from dmdr.settings.kinds import doubts, examine
from dmdr.states import check_storable
from dmdr.training.context import StepContext
from dmdr.training.trainer import Trainer
from dmdr.types import Condition, Direction, Draw, Rollout

LATE = 1000  # a step by which whatever is annealed, or sets in with time, has done so


class CannotRun(AssertionError):
    """A broken promise without which the plugin cannot be used at all: further checks would say the same."""


@contextmanager
def untouched_global_rng(who: str, instead: str) -> Iterator[None]:
    """Nothing inside may draw from a global generator, which no checkpoint holds."""
    before = _global_states()
    yield
    after = _global_states()
    for owner, state in before.items():
        assert after[owner] == state, (
            f"the {who} drew from {owner}'s global random generator, so that a resumed run would go on differently; "
            f"{instead}"
        )


def _global_states() -> dict[str, object]:
    """What tells whether somebody has drawn, by whose generator it is."""
    numpy = np.random.get_state(legacy=False)
    used = torch.cuda.is_initialized()  # asking would open every GPU
    return {
        "torch": torch.random.get_rng_state().tolist(),
        **({"torch.cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()]} if used else {}),
        "numpy": (bytes(numpy["state"]["key"]), numpy["state"]["pos"], numpy["has_gauss"]),
        "Python": random.getstate(),
    }


def taken_by_a_run(group: str, plugin: object) -> None:
    """A run reads flags and signatures off the class before it builds one, and refuses what does not fit.

    Raises:
        CannotRun: If a run would refuse it.
    """
    try:
        examine(group, type(plugin))
    except ConfigError as error:
        raise CannotRun(f"a run refuses it: {error}") from error


def spelt(group: str, plugin: object) -> None:
    """No method's name is nearly that of one that a run looks for, and no optional protocol is there by half.

    Raises:
        AssertionError: Names the method, and the one that may be meant.
    """
    found = doubts(group, type(plugin))
    assert not found, f"it {'; it '.join(found)} If not, give the method another name, or one that begins with _"


def networks(plugin: object) -> Iterator[tuple[str, nn.Module]]:
    """The networks that a plugin holds, by attribute."""
    for name, value in vars(plugin).items():
        if isinstance(value, nn.Module):
            yield name, value


@contextmanager
def only_read(who: str, draw: Draw, ctx: StepContext) -> Iterator[None]:
    """Nothing inside may change what a plugin is handed: others read it, too, and parameters are the optimizer's."""
    given = dict(_given(draw, ctx))
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    yield
    for name, tensor in given.items():
        unchanged = same(tensor.detach(), before[name])
        assert unchanged, f"the {who} changed {name} in place; it may only read it"


def _given(draw: Draw, ctx: StepContext) -> Iterator[tuple[str, Tensor]]:
    """All tensors that a plugin can lay hands on, by name."""
    yield from _tensors(draw)
    if ctx.scorer and draw.rollout.finished:
        scores, group = ctx.global_scores()
        yield from ((f"ctx.global_scores()[0]['{name}']", score) for name, score in scores.items())
        yield "ctx.global_scores()[1]", group
    for role in get_args(Role):
        for name, parameter in ctx.backend.parameters(role).items():
            yield f"the {role}'s {name}", parameter


def _tensors(part: Draw | Rollout | Condition | Direction, name: str = "draw") -> Iterator[tuple[str, Tensor]]:
    """Its tensors, and those of the rollout, the condition and the direction, by name."""
    for entry in fields(part):
        value, path = getattr(part, entry.name), f"{name}.{entry.name}"
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, Rollout | Condition | Direction):
            yield from _tensors(value, path)
        elif isinstance(value, Mapping):
            yield from ((f"{path}['{key}']", each) for key, each in value.items() if isinstance(each, Tensor))


class _OfRollout(Random):
    """Numbers that are meant to be the same in every use of a rollout."""


@contextmanager
def _names_drawn() -> Iterator[set[str]]:
    """Names (`Random.name`) of the numbers that are drawn inside, but for those of `Random.of_rollout`."""
    names: set[str] = set()
    generator = Random._generator

    def watched(self: Random, purpose: str, key: int) -> np.random.Generator:
        if not isinstance(self, _OfRollout):
            names.add(self.name(purpose, key))
        return generator(self, purpose, key)

    lasting = property(lambda self: _OfRollout(self.seed, self.step, self.phase))
    with patch.object(Random, "_generator", watched), patch.object(Random, "of_rollout", lasting):
        yield names


def numbers_are_new(uses: Callable[[int], object]) -> None:
    """The second use of a rollout draws numbers of its own, but for those of `Random.of_rollout`.

    Args:
        uses: Uses it, for the first time (0) or once more (1).
    """
    drawn_in: list[set[str]] = []
    for iteration in range(2):
        with _names_drawn() as names:
            uses(iteration)
        drawn_in.append(names)
    again = sorted(drawn_in[0] & drawn_in[1])
    assert not again, (
        f"the second use of a rollout repeats {len(again)} random numbers of the first, such as those of "
        f"'{again[0]}': draw from ctx.random, which is new in each use, or from ctx.random.of_rollout for numbers "
        "that all uses share"
    )


@dataclass
class Silent(Redness):
    """A reward that cannot score every third image, as functions and servers may.

    Attributes:
        unscored: How many it has not scored.
    """

    unscored: int = field(default=0, init=False)

    def image_features(self, images: Tensor) -> Tensor:
        silent = (images[:, 0, 0, 0] * 1e4).long() % 3 == 0
        self.unscored += int(silent.sum())
        return torch.where(silent[:, None], torch.nan, super().image_features(images))


class Mute(Redness):
    """A reward that cannot score any image."""

    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features(images) * torch.nan


@contextmanager
def passes_counted(backend: Backend) -> Iterator[Counter[str]]:
    """How often each network of a backend is asked inside, and how often a gradient comes back to it."""
    count: Counter[str] = Counter()

    def counted(role: str, call: Callable[..., Prediction]) -> Callable[..., Prediction]:
        def asked(*args: Any, **kwargs: Any) -> Prediction:
            found = call(*args, **kwargs)
            count[f"of the {role}"] += 1
            if found.value.requires_grad:
                found.value.register_hook(lambda grad: count.update([f"backward through the {role}"]))
            return found

        return asked

    with ExitStack() as stack:
        for role in ("student", "fake_score", "reference", "teacher"):
            stack.enter_context(patch.object(backend, role, counted(role, getattr(backend, role))))
        yield count


def trained_a_little(trainer: Trainer) -> Trainer:
    """The toy run, in which student and fake score have left reference and teacher."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for role in (trainer.student, *trainer.fake_learners):
            for parameter in () if role.owner else role.parameters.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


def answers_in_bfloat16(backend: Backend) -> None:
    """From now on the roles of this backend answer as coarsely as networks in bfloat16 do."""
    for role in ("student", "fake_score", "reference", "teacher"):
        setattr(backend, role, _coarse(getattr(backend, role)))


def _coarse(role: Callable[..., Prediction]) -> Callable[..., Prediction]:
    def call(*args: Any, **kwargs: Any) -> Prediction:
        found = role(*args, **kwargs)
        return replace(found, value=found.value.bfloat16().float())

    return call


def brings_back_its_state(plugin: Any, other: Any) -> None:
    """Give another plugin the state of one, as a checkpoint brings it back.

    Raises:
        AssertionError: If one of the two methods is missing, the state cannot be stored, or the other has another.
    """
    has = [hasattr(plugin, name) for name in ("state_dict", "load_state_dict")]
    assert has[0] == has[1], "a plugin with a state has both, state_dict() and load_state_dict(state)"
    if has[0]:
        state = _stored(plugin.state_dict())
        other.load_state_dict(state)
        assert same(other.state_dict(), state), "load_state_dict(state_dict()) must bring back the state"


def _stored(state: Any) -> Any:
    """A state as a checkpoint brings it back."""
    try:
        check_storable(state, "state_dict()")
    except TrainingError as error:
        raise AssertionError(str(error)) from error
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Whether tensors of any shape, numbers, text, or lists and dicts of them are equal; NaN is equal to NaN."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))
