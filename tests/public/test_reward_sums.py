"""What the rewards of a sum do for each other: work that they share, and waiting side by side."""

import asyncio
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr.rewards import RewardError, Rewards, once, sharing
from dmdr.settings.functions import as_reward

PROMPTS = ["a", "b", "c"]
PATIENCE = 30.0  # s; only reached by a test that fails


class Counter:
    """Computes the mean of images, and counts."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.count = images, 0

    def __call__(self) -> Tensor:
        self.count += 1
        return self.images.square().mean((1, 2, 3))


class Sharing:
    """A reward whose features others have, too."""

    differentiable = True

    def __init__(self, factor: float, counts: list[int]) -> None:
        self.factor, self.counts = factor, counts

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None: ...

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        def features() -> Tensor:
            self.counts.append(len(images))
            return images.square().mean((1, 2, 3))

        return self.factor * once(images, "features", features)


# --- Shared work ------------------------------------------------------------------------------------------------------


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_computed_once_within_a_scope_and_anew_outside(images: Tensor) -> None:
    mean = Counter(images)
    with sharing():
        first = once(images, "mean", mean)
        with sharing():
            assert once(images, "mean", mean) is first
        assert once(images, "mean", mean) is first  # the inner scope was the outer one
        assert mean.count == 1
    assert once(images, "mean", mean) is not once(images, "mean", mean)
    assert mean.count == 3
    with sharing():
        assert once(images, "mean", mean) is not first


def test_another_key_tensor_or_content_is_another_result(images: Tensor) -> None:
    mean = Counter(images)
    with sharing():
        first = once(images, ("mean", 1), mean)
        assert once(images, ("mean", 2), mean) is not first
        assert once(images[:], ("mean", 1), mean) is not first
        images.mul_(0.5)
        torch.testing.assert_close(once(images, ("mean", 1), mean), first / 4)
        assert mean.count == 4


def test_a_result_without_a_graph_is_not_passed_off_as_one_with(images: Tensor) -> None:
    mean = Counter(images.requires_grad_())
    with sharing():
        with torch.no_grad():
            assert not once(images, "mean", mean).requires_grad
        assert once(images, "mean", mean).requires_grad


def test_inference_tensors_are_shared(images: Tensor) -> None:
    with torch.inference_mode(), sharing():
        fresh = images + 0
        mean = Counter(fresh)
        assert once(fresh, "mean", mean) is once(fresh, "mean", mean)


def test_nothing_outlives_the_scope(images: Tensor) -> None:
    refs: list[weakref.ref[Tensor]] = []
    with suppress(KeyError), sharing():
        held = images.clone()
        refs += [weakref.ref(held), weakref.ref(once(held, "mean", lambda: torch.ones(3)))]
        del held
        assert refs[0]() is not None  # its id must not become another's
        raise KeyError
    assert [ref() for ref in refs] == [None, None]


def test_a_task_that_was_started_within_keeps_nothing(images: Tensor) -> None:
    with sharing():
        ref = weakref.ref(once(images, "mean", lambda: torch.ones(3)))
        context = copy_context()  # as every task of an event loop has
    assert context is not None and ref() is None


def test_another_thread_has_a_scope_of_its_own(images: Tensor) -> None:
    mean = Counter(images)
    with sharing():
        once(images, "mean", mean)
        thread = threading.Thread(target=lambda: once(images, "mean", mean))
        thread.start()
        thread.join()
    assert mean.count == 2


def test_rewards_of_a_sum_share_and_their_gradients_add(images: Tensor) -> None:
    counts: list[int] = []
    rewards = Rewards({"one": (1.0, Sharing(2.0, counts)), "other": (0.5, Sharing(-3.0, counts))})
    total = rewards(images.requires_grad_(), PROMPTS)
    assert counts == [3]
    (grad,) = torch.autograd.grad(total.sum(), images)
    torch.testing.assert_close(grad, (2.0 - 1.5) * 2 * images.detach() / images[0].numel())
    rewards(images, PROMPTS)
    assert counts == [3, 3]


# --- Waiting side by side ---------------------------------------------------------------------------------------------


class Local:
    """A reward that is computed here, after what it is told to wait for."""

    differentiable = True

    def __init__(self, result: Any = None, after: threading.Event | None = None) -> None:
        self.result, self.after, self.done = result, after, threading.Event()

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None: ...

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        assert self.after is None or self.after.wait(PATIENCE)
        self.done.set()
        if isinstance(self.result, Exception):
            raise self.result
        return images.mean((1, 2, 3)) if self.result is None else self.result


class Waiting(Local):
    """A reward whose answer is a future."""

    def __init__(self, result: Any = None) -> None:
        super().__init__(result)
        self.future: Future[Any] = Future()

    def submit(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Future[Tensor]:
        if isinstance(self.result, Exception):
            raise self.result
        if self.result is not None:
            self.future.set_result(self.result)
        return self.future

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Sequence[Any]) -> Tensor:
        raise AssertionError("it is to be submitted")


def test_rewards_that_wait_do_so_beside_each_other_and_the_local_ones(images: Tensor) -> None:
    together, here = asyncio.Barrier(2), threading.Event()
    local = Local(after=here)

    async def one(images: Tensor) -> list[float]:
        async with asyncio.timeout(PATIENCE):
            await together.wait()
        here.set()
        assert await asyncio.to_thread(local.done.wait, PATIENCE)
        return [1.0, 2.0, 3.0]

    async def other(image: Tensor, prompt: str, label: int) -> float:
        if label == 0:
            async with asyncio.timeout(PATIENCE):
                await together.wait()
        return float(label)

    parts = {"one": (1.0, as_reward(one, "one")()), "local": (1.0, local), "other": (1.0, as_reward(other, "other")())}
    scores = Rewards(parts).each(images, PROMPTS, label=[0, 1, 2])
    assert list(scores) == ["one", "local", "other"]
    assert scores["one"].tolist() == [1, 2, 3]
    assert scores["other"].tolist() == [0, 1, 2]
    torch.testing.assert_close(scores["local"], images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("kind", "result", "message"),
    [
        (Local, OSError("a\n b"), "reward 'odd' failed: OSError: a b"),
        (Local, 0.5, "reward 'odd' returned float; expected torch.float32 [3]"),
        (Waiting, OSError("a\n b"), "reward 'odd' failed: OSError: a b"),
        (Waiting, torch.zeros(2), "reward 'odd' returned torch.float32 [2]; expected torch.float32 [3]"),
    ],
)
def test_a_reward_that_breaks_is_named_and_what_waits_is_cancelled(
    kind: type[Local], result: Any, message: str, images: Tensor
) -> None:
    odd, slow = kind(result), Waiting()
    order = {"slow": slow, "odd": odd} if isinstance(result, Exception) else {"odd": odd, "slow": slow}
    with pytest.raises(RewardError) as caught:
        Rewards({name: (1.0, reward) for name, reward in order.items()}).each(images, PROMPTS)
    assert str(caught.value).partition(" (")[0] == message
    assert slow.future.cancelled()


def test_a_coroutine_is_cancelled_with_the_sum(images: Tensor) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def never(images: Tensor) -> list[float]:
        started.set()
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [0.0] * 3

    parts = {"never": (1.0, as_reward(never, "never")()), "odd": (1.0, Local(KeyError("x"), after=started))}
    with pytest.raises(RewardError, match="reward 'odd' failed: KeyError: 'x'"):
        Rewards(parts).each(images, PROMPTS)
    assert cancelled.wait(PATIENCE)


def test_a_coroutine_that_fails_is_named(images: Tensor) -> None:
    async def fails(image: Tensor) -> float:
        raise KeyError("x\ny")

    with pytest.raises(
        RewardError, match=r"^reward 'later' failed: KeyError: 'x\\ny' \(.*test_reward_sums.py, line \d+\)$"
    ):
        Rewards({"local": (1.0, Local()), "later": (1.0, as_reward(fails, "f")())}).each(images, PROMPTS)
