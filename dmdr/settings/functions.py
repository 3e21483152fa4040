"""Plugins from a file (`path/to/file.py:name`) or a module (`package.module:name`), and functions as rewards."""

import asyncio
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dmdr.errors import ConfigError

if TYPE_CHECKING:  # `--help` lists the flags of a function without torch
    from torch import Tensor

PLURAL, SINGULAR = ("images", "prompts"), ("image", "prompt")


def load_object(target: str) -> Any:
    """The object that `path/to/file.py:name` or `package.module:name` means; a file is executed anew each time.

    Raises:
        ConfigError: If there is no such file, module or name, or it cannot be imported.
    """
    module, _, name = target.rpartition(":")
    if "" not in sys.path:  # as `python -m` has it; a console script does not see the folder it is called in
        sys.path.insert(0, "")
    try:
        found = _execute(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = "; write a file as path/to/file.py:name"
        if module.endswith(".py"):
            hint = "; it is not installed, and not in the current folder"
        raise ConfigError(f"'{target}' cannot be imported: {error}{hint}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stranger's, who may exit, too
        raise ConfigError(f"'{target}' cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(found, name):
        raise ConfigError(f"'{target}': there is no '{name}' in {module}")
    return getattr(found, name)


def _execute(file: Path) -> Any:
    file = file.expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    name = f"dmdr_file_{file.stem}_{blake2b(bytes(file), digest_size=4).hexdigest()}"  # files may share a stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the types of dataclass fields are looked up
    spec.loader.exec_module(module)
    return module


def as_reward(function: Callable[..., Any], target: str) -> type:
    """A function as the class of a reward without gradient.

    The function scores all images at once, `score(images, prompts, ...)`, or one, `score(image, prompt, ...)`; it may
    do without the prompts. Every further parameter is the column of the prompt rows that has its name: one with a
    default need not exist, and `**columns` takes all others. Images are float32 tensors in [0, 1], [B, 3, H, W] or
    [3, H, W]; or PIL images of mode RGB where they are annotated so, as `list[Image.Image]` or `Image.Image`. The score
    of an image is a number; None is an image that it cannot score.

    Calls of an `async def` run concurrently, beside the other rewards; its class has the flag `max_concurrency`.

    Args:
        function: Anything that can be called by name.
        target: What users call it.

    Raises:
        ConfigError: If it cannot be called like that.
    """
    awaited = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
    found = _Function.of(function, target)
    base = _AsyncReward if awaited else _FunctionReward
    reads_prompts = found.open or found.own[1] in found.names
    about = {"function": found, "columns": found.required, "reads_prompts": reads_prompts}
    return type("FunctionReward", (base,), about)


@dataclass(frozen=True)
class _Function:
    """A function and how it wants to be called.

    Attributes:
        call: The function.
        target: What users call it.
        own: What it may call images and prompts, in the plural or in the singular.
        names: Its parameters.
        required: Columns that it cannot do without.
        open: It takes all other columns, too.
        pil: It is given PIL images.
    """

    call: Callable[..., Any]
    target: str
    own: tuple[str, str]
    names: frozenset[str]
    required: tuple[str, ...]
    open: bool
    pil: bool

    @property
    def single(self) -> bool:
        """It is given one image, not all."""
        return self.own == SINGULAR

    @classmethod
    def of(cls, function: Callable[..., Any], target: str) -> "_Function":
        """Read it off the signature."""
        try:
            parameters = _signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise _unfit(target, str(error)) from error
        for p in parameters:
            if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
                raise _unfit(target, f"'{p.name}' cannot be given by name")
        named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if len(named.keys() & {"images", "image"}) != 1:
            raise _unfit(target, "it must have an argument 'images' or 'image', and not both")
        own, other = (SINGULAR, PLURAL) if "image" in named else (PLURAL, SINGULAR)
        if other[1] in named:
            raise _unfit(target, f"it cannot have both '{own[0]}' and '{other[1]}'")
        required = tuple(name for name, p in named.items() if p.default is p.empty and name not in own)
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return cls(function, target, own, frozenset(named), required, takes_all, _is_pil(named[own[0]].annotation))

    def calls(
        self, images: "Tensor", prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """The keyword arguments of each call."""
        from dmdr.images import to_pil

        own = dict(zip(self.own, (to_pil(images) if self.pil else images.detach(), prompts), strict=True))
        given: dict[str, Any] = {
            name: values
            for name, values in {**columns, **own}.items()
            if name in self.names or (self.open and name not in own)
        }
        if not self.single:
            return [given]
        return [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]

    def scores(self, results: Sequence[Any], images: "Tensor") -> "Tensor":
        """What the calls returned, as [B] float32.

        Raises:
            ValueError: If it is not a number or None for each image.
        """
        import torch

        from dmdr.remote.wire import numbers_of

        try:
            numbers = numbers_of(results if self.single else results[0], len(images))
        except TypeError as error:
            raise ValueError(f"'{self.target}' {error}") from error
        return torch.tensor(numbers, dtype=torch.float32, device=images.device)


def _unfit(target: str, reason: str) -> ConfigError:
    forms = "score(images, prompts, **columns) or score(image, prompt, **columns)"
    return ConfigError(f"reward '{target}' must be callable as {forms}: {reason}")


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # an annotation with a name that only type checkers know
        return inspect.signature(function)


def _is_pil(annotation: Any) -> bool:
    """Whether it mentions PIL's Image, be it within a list, as text, or the module in place of the class."""
    image = r"\bImage\b" if isinstance(annotation, str) else r"\b(PIL|Image)\.Image\b|'Image'"
    return re.search(image, str(annotation)) is not None


@dataclass
class _FunctionReward:
    """A function as a reward."""

    differentiable: ClassVar[bool] = False
    function: ClassVar[_Function]
    columns: ClassVar[tuple[str, ...]]
    reads_prompts: ClassVar[bool]

    def prepare(self, device: Any, dtype: Any) -> None:
        pass

    def __call__(self, images: "Tensor", prompts: Sequence[str], **columns: Sequence[Any]) -> "Tensor":
        import torch

        with torch.no_grad():
            results = [self.function.call(**call) for call in self.function.calls(images, prompts, columns)]
        return self.function.scores(results, images)


@dataclass
class _AsyncReward(_FunctionReward):
    """A coroutine function as a reward.

    Attributes:
        max_concurrency: How many images are scored at a time, where they are scored one by one.
    """

    max_concurrency: int = 16

    def __post_init__(self) -> None:
        if self.max_concurrency < 1:
            raise ConfigError(f"reward '{self.function.target}': max_concurrency must be at least 1")

    def __call__(self, images: "Tensor", prompts: Sequence[str], **columns: Sequence[Any]) -> "Tensor":
        return self.submit(images, prompts, **columns).result()

    def submit(self, images: "Tensor", prompts: Sequence[str], **columns: Sequence[Any]) -> "Future[Tensor]":
        """The same, without waiting for it."""
        calls = self.function.calls(images, prompts, columns)
        return asyncio.run_coroutine_threadsafe(self._scores(calls, images), _loop())

    async def _scores(self, calls: Sequence[dict[str, Any]], images: "Tensor") -> "Tensor":
        room = asyncio.Semaphore(self.max_concurrency)

        async def result(call: dict[str, Any]) -> Any:
            async with room:
                return await self.function.call(**call)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(result(call)) for call in calls]
        except BaseExceptionGroup as failed:
            error = failed.exceptions[0]  # for which the others were cancelled
            raise error from error.__cause__
        return self.function.scores([task.result() for task in tasks], images)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process, without gradients: clients that a function keeps are bound to one."""
    import torch

    loop = asyncio.new_event_loop()

    @torch.no_grad()
    def run() -> None:
        while True:
            with suppress(SystemExit, KeyboardInterrupt):  # which end the loop, too, before the caller learns of them
                loop.run_forever()

    # A daemon: a run that is interrupted must not wait for an answer.
    threading.Thread(target=run, name="dmdr-async-rewards", daemon=True).start()
    return loop
