"""The weighted sum of a run's rewards. Each score stays visible; rewards share work that they have in common."""

import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError, MissingFile, TrainingError
from dmdr.groups import scored
from dmdr.protocols import Backend, LatentReward, Reward, Submits
from dmdr.types import Condition


class RewardError(TrainingError):
    """A reward that failed, or broke its contract; one line that names it."""


_known: ContextVar[dict[Hashable, tuple[Tensor, Tensor]] | None] = ContextVar("_known", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, `once` remembers its results. Nested scopes are one scope, at the end of which all is forgotten."""
    if _known.get() is not None:
        yield
        return
    known: dict[Hashable, tuple[Tensor, Tensor]] = {}
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)
        known.clear()  # a task started within holds a copy of the context


def once(images: Tensor, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """What several rewards need of the same images, such as the features [B, F] of one network.

    Args:
        images: [B, 3, H, W], the very tensor that the rewards are given. After a change in place it is another one; of
            an inference tensor, such a change goes unnoticed.
        key: What is computed: the network, the size, and whatever else the result depends on.
        compute: Computes it.

    Returns:
        compute(), or within `sharing` its earlier result for the same images and key, graph included. A result without
        a graph is never passed off as one with.
    """
    known = _known.get()
    if known is None:
        return compute()
    version = None if images.is_inference() else images._version
    address = (id(images), version, images.requires_grad, torch.is_grad_enabled(), key)
    if address not in known:
        known[address] = compute(), images  # kept, so that no other tensor can get its id
    return known[address][0]


class Rewards:
    """total = sum_k weight_k * score_k, itself a `Reward`.

    Attributes:
        parts: name -> (weight, reward), in the order of the sum.
        differentiable: Whether every part is.
        there: Further columns of the prompt rows; None where they are not known.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[float, Reward]],
        flags: Mapping[str, Callable[[str], str]] = MappingProxyType({}),
        there: Sequence[str] | None = None,
    ) -> None:
        """Check and keep the parts.

        Args:
            parts: At least one; weights are finite.
            flags: By name of a part, what the flag for one of its options is called.
            there: Further columns of the prompt rows, where they are known.

        Raises:
            ConfigError: If there is none.
        """
        if not parts:
            raise ConfigError("a sum of rewards needs at least one reward")
        self.parts, self._flags, self.there = dict(parts), flags, there
        self.differentiable = all(reward.differentiable for _, reward in self.parts.values())

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each part in the sum, by name."""
        return {name: weight for name, (weight, _) in self.parts.items()}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights of every part, frozen.

        Raises:
            ConfigError: If a part refuses its settings or its checkpoint (a ValueError or OSError), or now knows of a
                column that it needs and the prompts lack; names the reward.
            RewardError: If it fails in another way.
        """
        for name, (_, reward) in self.parts.items():
            try:
                reward.prepare(device, dtype)
            except MissingFile as error:
                flag = f"--{self._flags[name](error.option)}" if name in self._flags else f"its option '{error.option}'"
                what = f"{error.what}; download it and give its local path with {flag}"
                raise ConfigError(f"reward '{name}': {what}") from error
            except (ValueError, OSError) as error:
                raise ConfigError(f"reward '{name}': {_line(error)}") from error
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a stranger's, who may exit, too
                failed = f"{_said(error)} ({_place(error)})"
                raise RewardError(f"reward '{name}' cannot be prepared: {failed}") from error
            if self.there is not None:
                require_columns(name, reward, self.there)

    def each(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Tensor]:
        """Raw scores, before their weights; rewards that wait for an answer wait side by side.

        Args:
            images: [B, 3, H, W] float32 in [0, 1]; gradients flow back where a part is differentiable.
            prompts: B strings.
            columns: Further columns of the prompt rows, each of length B; every reward is given all of them.

        Returns:
            name -> [B] float32, higher is better. NaN marks a sample that a reward could not score.

        Raises:
            RewardError: If a reward raises, or returns anything but [B] float32.
            ValueError: If prompts or a column are not as many as the images.
        """
        for name, column in {"prompts": prompts, **columns}.items():
            if len(column) != len(images):
                raise ValueError(f"{len(images)} images, but {len(column)} {name}")
        return self._seen(list(self.parts), images, prompts, columns)

    def each_of(
        self, latents: Tensor, cond: Condition, backend: Backend, images: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`each` of latents, which are decoded only if a reward looks at images.

        Args:
            latents: Clean ones of the family, [B, *latent] float32; gradients flow back where a part is differentiable.
            cond: Their condition, as the family encodes it.
            backend: The family.
            images: What they decode to, [B, 3, H, W] float32 in [0, 1], where it is known.

        Raises:
            RewardError: As in `each`.
        """
        readers = self.readers(backend)
        scores = {}
        for name, reader in readers.items():
            with _Named(name):
                scores[name] = _checked(name, reader.score_latents(latents, cond), len(latents))
        others = [name for name in self.parts if name not in readers]
        if others:
            seen = backend.decode(latents) if images is None else images
            scores |= self._seen(others, seen, cond.prompts, cond.columns)
        return {name: scores[name] for name in self.parts}

    def readers(self, backend: Backend) -> dict[str, LatentReward]:
        """The parts that look at the latents of a family, by name."""
        parts = {name: reward for name, (_, reward) in self.parts.items()}
        return {name: part for name, part in parts.items() if isinstance(part, LatentReward) and part.reads(backend)}

    @sharing()
    def _seen(
        self, names: Sequence[str], images: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, Tensor]:
        """Scores of the parts of these names."""
        waiting: dict[str, Future[Tensor]] = {}
        scores: dict[str, Tensor] = {}
        try:
            for name in names:
                reward = self.parts[name][1]
                if isinstance(reward, Submits):
                    with _Named(name):
                        answer = reward.submit(images, prompts, **columns)
                    if not isinstance(answer, Future):
                        what = f"{type(answer).__name__} from submit; expected a concurrent.futures.Future"
                        raise RewardError(f"reward '{name}' returned {what}")
                    waiting[name] = answer
            for name in [*(name for name in names if name not in waiting), *waiting]:
                with _Named(name):
                    local = self.parts[name][1]
                    score = waiting[name].result() if name in waiting else local(images, prompts, **columns)
                scores[name] = _checked(name, score, len(images))
        finally:
            for future in waiting.values():
                future.cancel()
        return {name: scores[name] for name in names}

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what `each` returned, [B] float32; NaN where any part is."""
        return torch.stack([weight * scores[name] for name, (weight, _) in self.parts.items()]).sum(0)

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        """`total(each(...))`, [B] float32."""
        return self.total(self.each(images, prompts, **columns))

    @staticmethod
    def require_finite(scores: Mapping[str, Tensor]) -> None:
        """Stop on rewards that have scored nothing.

        Args:
            scores: name -> scores [N] of the global batch: one process alone may well hold no finite one.

        Raises:
            RewardError: If a reward has no finite score, which it names, or no sample has one of every reward.
        """
        for name, score in scores.items():
            if not score.isfinite().any():
                raise RewardError(f"reward '{name}' has scored none of {score.numel()} images: no score is finite")
        if not scored(scores).any():
            raise RewardError(f"no image has a finite score of every reward: {', '.join(scores)}")


def require_columns(title: str, reward: Any, there: Sequence[str]) -> None:
    """Refuse a reward that needs a column which the prompt rows lack.

    Args:
        title: How users named it.
        reward: The reward, or its class.
        there: Further columns of the rows.

    Raises:
        ConfigError: Names the reward, the column and the columns that are there.
    """
    for name in getattr(reward, "columns", ()):
        if name not in there:
            has = ", ".join(there) or "none"
            raise ConfigError(f"reward '{title}' needs the prompts to have a column '{name}'; they have {has}")


def _checked(name: str, score: Any, count: int) -> Tensor:
    """A reward's answer about so many images, if it is one."""
    if not isinstance(score, Tensor) or score.shape != (count,) or score.dtype != torch.float32:
        got = f"{score.dtype} {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise RewardError(f"reward '{name}' returned {got}; expected torch.float32 [{count}]")
    return score


@dataclass
class _Named:
    """Around a reward's own code: whatever it raises, a RewardError names it. Only Ctrl-C is not its own.

    No generator, which would let a StopIteration pass.
    """

    name: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):  # SystemExit, too: nothing could be saved
            where = f" ({_place(error)})" if not isinstance(error, ConfigError | TrainingError) else ""
            raise RewardError(f"reward '{self.name}' failed: {_said(error)}{where}") from error


def _place(error: BaseException) -> str:
    """File and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _said(error: BaseException) -> str:
    return ": ".join(filter(None, (type(error).__name__, _line(error))))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
