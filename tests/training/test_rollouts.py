"""How few steps of the student an update is made of, and that nobody sees the difference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dmdr.errors import TrainingError
from dmdr.matching import DMD
from dmdr.protocols import Needs
from dmdr.sizes import parse_sizes
from dmdr.training.rollouts import Rollouts, Wanted, shares
from dmdr.training.trainer import Trainer
from dmdr.types import Draw
from dmdr_refl import ReFL
from toy_trainer import Plain, prepared, trainer


@pytest.mark.parametrize(
    ("uses", "rollouts", "expected"),
    [
        (1, 1, [[0]]),
        (5, 1, [[0, 1, 2, 3, 4]]),
        (5, 2, [[0, 1, 2, 3], [4]]),
        (5, 3, [[0, 1], [2, 3], [4]]),
        (6, 3, [[0, 1, 2], [3, 4], [5]]),
        (3, 3, [[0], [1], [2]]),
    ],
)
def test_who_shares_a_rollout(uses: int, rollouts: int, expected: list[list[int]]) -> None:
    assert shares(uses, rollouts) == expected


def passes_of(running: Trainer, **options: Any) -> list[int]:
    """Samples of each pass of the student, without gradient, that the draws of a step take."""
    sizes, student = [], running.backend.student

    def counting(x_t: Tensor, *args: Any) -> Any:
        sizes.append(len(x_t))
        return student(x_t, *args)

    running.backend.student = counting  # type: ignore[method-assign]
    running.draws(**options)
    return sizes


def test_updates_that_share_a_rollout_see_each_step_once() -> None:
    running = trainer(fake_updates=5, rollouts=2)
    *earlier, (_, draw) = running.draws(noted=False)
    steps = torch.stack([each.index for _, each in earlier])
    assert steps.sort(0).values.T.tolist() == [[0, 1, 2, 3]] * 8
    assert len({id(each.rollout) for _, each in earlier}) == 1
    assert draw.rollout is not earlier[0][1].rollout
    assert running.prompts.consumed == 2
    assert [ctx.random.phase for ctx, _ in running.draws(noted=False)] == [f"rollout/{k}" for k in range(5)]


def test_with_as_many_rollouts_each_update_has_its_own() -> None:
    running = trainer(fake_updates=3)
    by_hand = trainer(fake_updates=3)
    for k, (_, draw) in enumerate(running.draws(noted=False)):
        ctx = by_hand.context(k)
        expected = by_hand.rollouts.pick(by_hand.rollouts.whole(ctx), ctx)
        assert torch.equal(draw.index, expected.index)
        assert draw.cond.prompts == expected.cond.prompts
        for name in ("x_t", "x0", "x_next"):
            torch.testing.assert_close(getattr(draw, name), getattr(expected, name), rtol=0, atol=1e-5)


def test_a_rollout_ends_at_the_drawn_step() -> None:
    sizes = passes_of(trainer(batch=16), noted=False)
    ((_, draw),) = trainer(batch=16).draws(noted=False)
    assert sizes[0] == 16 and sizes == sorted(sizes, reverse=True)
    for row, index in enumerate(draw.index.tolist()):
        states, answers = draw.rollout.x_t[:, row, 0], draw.rollout.x0[:, row, 0]
        assert states.isfinite().tolist() == [step <= index + 1 for step in range(5)]
        assert answers.isfinite().tolist() == [step <= index for step in range(4)]
    assert draw.x_t.isfinite().all() and draw.x0.isfinite().all() and draw.x_next.isfinite().all()
    with pytest.raises(TrainingError, match=r"ends at the drawn steps: .* must declare needs\.finished"):
        _ = draw.rollout.final
    assert sum(sizes) == int((draw.index + 1).sum())


def test_to_finish_it_changes_no_bit_of_the_draws() -> None:
    short, long = (trainer(batch=16, micro_batch=5, fake_updates=3, rollouts=2) for _ in range(2))
    for (_, cut), (_, finished) in zip(short.draws(noted=False), long.draws(noted=True), strict=True):
        for name in ("x_t", "x0", "index", "x_next"):
            assert torch.equal(getattr(cut, name), getattr(finished, name))
    assert finished.rollout.final.isfinite().all()
    assert not cut.rollout.finished


class Late(DMD):
    needs = Needs(reward=False)


@pytest.mark.parametrize(
    ("settings", "finished"),
    [
        ({}, False),
        ({"matching": Late()}, True),
        ({"objectives": [ReFL()], "rewards": Plain()}, False),
        ({"sample_weight": lambda draw, direction, ctx: torch.ones(len(draw))}, True),
    ],
)
def test_who_looks_at_finished_images_gets_them(settings: dict[str, Any], finished: bool) -> None:
    running = trainer(**settings)
    assert running.draws(noted=False)[-1][1].rollout.finished == finished
    assert running.draws(noted=True)[-1][1].rollout.finished


def drawn_by(rank: int, processes: int, sizes: list[list[int]]) -> tuple[Draw, list[int]]:
    """The draw of one of several processes that share a network, and its passes."""
    running = trainer(prepared(), batch=16 // processes)
    rollouts = running.rollouts
    rollouts.prompts.batch_size, rollouts.prompts.num_processes, rollouts.prompts.process_index = 16, processes, rank
    rollouts.shards = processes

    class Process:
        num_processes, process_index, device = processes, rank, torch.device("cpu")

    rollouts.accelerator = Process()  # type: ignore[assignment]
    found = passes_of(running, noted=False)
    sizes.append(found)
    return running.draws(noted=False)[0][1], found


def test_processes_that_share_the_network_call_it_equally_often() -> None:
    """Each knows how far the samples of the others go; the numbers are those of one process."""
    sizes: list[list[int]] = []
    draws = [drawn_by(rank, 4, sizes)[0] for rank in range(4)]
    assert sizes == [sizes[0]] * 4
    alone = trainer(prepared(), batch=16)
    alone.draws(noted=False)
    ((_, whole),) = alone.draws(noted=False)
    assert torch.cat([draw.index for draw in draws]).tolist() == whole.index.tolist()
    torch.testing.assert_close(torch.cat([draw.x0 for draw in draws]), whole.x0, rtol=0, atol=1e-5)


def test_a_rollout_that_is_asked_for_alone_is_whole() -> None:
    running = trainer()
    rollouts: Rollouts = running.rollouts
    (found,) = rollouts.make([Wanted(running.context(0), torch.tensor([3, 0, 2, 1, 3, 0, 0, 3]))])
    assert not found.finished
    assert [int(found.x0[:, row, 0].isfinite().sum()) for row in range(8)] == [4, 1, 3, 2, 4, 1, 1, 4]
    assert rollouts.whole(running.context(0)).finished


def test_an_update_has_images_of_one_size() -> None:
    """The same in all rollouts and processes; over the updates each size is drawn as often as another."""
    running = trainer(fake_updates=3, rollouts=2)
    backend: Any = running.backend
    backend.sizes, backend.latent_shapes = parse_sizes("8,9,10"), [(2,), (3,), (4,)]
    drawn = []
    for _ in range(300):
        shapes = {running.rollouts.latent_shape(ctx) for ctx in map(running.context, range(3))}
        assert len(shapes) == 1
        drawn.append(shapes.pop())
        running.step += 1
    assert all(70 < drawn.count(shape) < 130 for shape in [(2,), (3,), (4,)])
    again = replace(running.context(0), first_random=replace(running.context(0).first_random, step=299), iteration=1)
    assert running.rollouts.latent_shape(again) == drawn[-1]
