"""GNDM: the normaliser of a group, and the groups that it needs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dmdr.errors import ConfigError
from dmdr.matching import DMD
from dmdr.run.job import planned
from dmdr.settings.parse import parse
from dmdr.types import Draw
from dmdr_gndm import GNDM
from stubs import FLOW, VP, Network, context, draw_of, normal


def grouped(count: int, size: int) -> Draw:
    """Samples in groups of this size."""
    return replace(draw_of(normal(count, 3)), group=torch.arange(count) // size)


@pytest.mark.parametrize("path", [FLOW, VP])
def test_the_normaliser_is_the_mean_over_the_group(path: Any) -> None:
    kind: Any = "velocity" if path is FLOW else "eps"
    draw, teacher, fake = grouped(6, 3), Network(2, path, kind), Network(1, path, kind)
    ctx = context(path, guidance=(2.0, 6.0))
    direction = GNDM().direction(draw, teacher, fake, ctx)
    (r,) = GNDM().renoise(draw, ctx)
    w = ctx.random.uniform("guidance", draw.sample, 2.0, 6.0)[:, None]
    own, c, u = fake(r.x_t, r.t, draw.cond).x0, *(teacher(r.x_t, r.t, draw.cond, guidance=g).x0 for g in (1.0, 0.0))
    guided = u + w * (c - u)
    distance = (draw.x0 - guided).abs().mean(1).view(2, 3).mean(1).repeat_interleave(3)[:, None]
    torch.testing.assert_close(direction.total * distance, own - guided, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(direction.parts["dm"] * distance, own - c, rtol=1e-9, atol=1e-10)
    assert torch.equal(direction.parts["dm"] + direction.parts["ca"], direction.total)


def test_a_group_shares_its_time_and_not_its_noise() -> None:
    (renoised,) = GNDM().renoise(grouped(12, 3), context())
    assert renoised.t.view(4, 3).std(1).tolist() == [0.0] * 4
    assert len(renoised.t.unique()) == 4
    assert len(renoised.eps.unique(dim=0)) == 12


def test_groups_of_one_are_dmd() -> None:
    draw, networks, ctx = grouped(6, 1), (Network(2), Network(1)), context(guidance=(2.0, 6.0))
    found, expected = (matching.direction(draw, *networks, ctx).total for matching in (GNDM(), DMD()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_run_without_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="--matching gndm needs --num_generations"):
        planned(parse(settings={"model": "toy", "matching": "gndm"}))
    planned(parse(settings={"model": "toy", "matching": "gndm", "num_generations": 2}))
