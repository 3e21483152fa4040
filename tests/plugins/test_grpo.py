"""GRPO against REINFORCE, its published numbers, and itself on the analytic mixture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dmdr.backends.toy import Redness, ToyBackend
from dmdr.errors import ConfigError, TrainingError
from dmdr.paths import Prediction
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Term
from dmdr_grpo import GRPO
from dmdr_refl import ReFL
from toy_trainer import Constant, DoubleToy, EpsToy, Meter, Plain, adam, flat, prepared, state, step_of, trainer

ROLES = ("student", "fake_score", "reference")


def running(grpo: GRPO, backend: ToyBackend | None = None, **settings: Any) -> Trainer:
    """A trainer of groups of four images."""
    settings = {"batch": 16, "group_size": 4, "rewards": Plain(), "dmd_weight": 0.0} | settings
    return trainer(backend or prepared(), objectives=[grpo], **settings)


def drawn(trainer: Trainer) -> tuple[Draw, Any]:
    ctx = trainer.context(0)
    return trainer.rollouts.pick(trainer.rollouts.whole(ctx, trainer.objectives.shared_noise(ctx)), ctx), ctx


def terms(grpo: GRPO, trainer: Trainer, iteration: int = 0, draw: Draw | None = None, ctx: Any = None) -> list[Term]:
    if draw is None:
        draw, ctx = drawn(trainer)
    return list(grpo(replace(draw, iteration=iteration), ctx))


def student_gradient(trainer: Trainer, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, list(trainer.student.parameters.values()))
    return torch.cat([grad.flatten() for grad in grads])


# --- Advantages -------------------------------------------------------------------------------------------------------


def advantages(scores: dict[str, list[float]], group: list[int] | None = None, **settings: Any) -> Tensor:
    values = {name: torch.tensor(score) for name, score in scores.items()}
    number = len(next(iter(scores.values())))
    weights = dict.fromkeys(scores, 1.0)
    found, _ = GRPO(**settings).advantages(values, weights, torch.tensor(group or [0] * number))
    return found


@pytest.mark.parametrize("how", ["group", "batch"])
def test_advantages_of_one_group(how: Any) -> None:
    rewards = {"a": [0.28, 0.30, 0.26, 0.29]}
    found = advantages(rewards, scale_rewards=how, multi_objective_aggregation="sum_then_normalize")
    expected = torch.tensor([-0.168, 1.175, -1.511, 0.504], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert abs(found.mean().item()) < 1e-12


def test_advantages_without_a_scale_are_deviations() -> None:
    found = advantages({"a": [1.0, 3.0, 10.0, 20.0]}, [0, 0, 1, 1], scale_rewards="none")
    assert found.tolist() == pytest.approx([-1.0, 1.0, -5.0, 5.0])


def test_a_reward_of_large_variance_silences_a_small_one_unless_each_is_normalised_first() -> None:
    scores = {"large": [1.0, 0.0, 0.0, 1.0], "small": [0.01, 0.02, 0.03, 0.04]}
    summed = advantages(scores, scale_rewards="group", multi_objective_aggregation="sum_then_normalize")
    assert summed.tolist() == pytest.approx([0.970, -1.010, -0.990, 1.030], abs=1e-3)
    apart = advantages(scores, scale_rewards="group")
    assert apart.tolist() == pytest.approx([-0.242, -1.023, -0.391, 1.656], abs=1e-2)  # without a floor of the std


@pytest.mark.parametrize("how", ["group", "batch", "none"])
def test_groups_are_compared_with_nothing_else(how: Any) -> None:
    near = advantages({"a": [0.1, 0.2, 0.5, 0.9]}, [3, 3, 8, 8], scale_rewards=how)
    far = advantages({"a": [0.1, 0.2, 100.5, 100.9]}, [3, 3, 8, 8], scale_rewards=how)
    assert (near.sign() == far.sign()).all()
    if how != "batch":  # whose unit is the spread of all prompts
        torch.testing.assert_close(near, far, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["normalize_then_sum", "sum_then_normalize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("number", "value"), [(8, 0.3), (12, 0.1), (16, 22.3), (24, 0.1)])
def test_equal_rewards_have_no_advantage(
    how: Any, aggregation: Any, dtype: torch.dtype, number: int, value: float
) -> None:
    scores = {"a": torch.full((number,), value, dtype=dtype), "b": torch.full((number,), -value, dtype=dtype)}
    grpo = GRPO(scale_rewards=how, multi_objective_aggregation=aggregation)
    found, valid = grpo.advantages(scores, {"a": 0.3, "b": 1.7}, torch.arange(number) // (number // 2))
    assert torch.equal(found, torch.zeros(number, dtype=torch.float64))
    assert valid.all()


def test_what_a_reward_cannot_judge_leaves_its_group_alone() -> None:
    nan = math.nan
    grpo = GRPO(scale_rewards="group")
    scores = {"a": torch.tensor([0.1, nan, 0.3, 0.2, nan, 0.5, nan, nan]), "b": torch.full((8,), 1.0)}
    found, valid = grpo.advantages(scores, {"a": 1.0, "b": 1.0}, torch.arange(8) // 4)
    assert valid.tolist() == [True, False, True, True, False, False, False, False]  # one alone is compared with nothing
    without = grpo.advantages({n: s[[0, 2, 3]] for n, s in scores.items()}, {"a": 1.0, "b": 1.0}, torch.zeros(3).long())
    torch.testing.assert_close(found[[0, 2, 3]], without[0])
    assert torch.equal(found[~valid], torch.zeros(5, dtype=torch.float64))


def test_advantages_are_limited() -> None:
    assert advantages({"a": [0.0] * 99 + [1.0]}, scale_rewards="group").max().item() == 5.0


# --- Ratios -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("sde_type", ["cps", "ddim", "flow_sde", "dance_sde"])
def test_the_first_update_is_reinforce(eta: float, sde_type: str) -> None:
    """rho is exactly 1, the loss minus the mean advantage, and the gradient that of -A log p."""
    grpo = GRPO(ratio="plain")
    toy = running(grpo, prepared(DoubleToy), eta=eta, sde_type=sde_type)
    draw, ctx = drawn(toy)
    found = terms(grpo, toy, draw=draw, ctx=ctx)
    advantage, _ = grpo.advantages(*_inputs(ctx))
    torch.testing.assert_close(sum(t.loss for t in found).double(), -advantage, rtol=0, atol=1e-6)  # type: ignore[union-attr]
    assert not any(t.metrics["clip_fraction"].any() or t.metrics["log_ratio"].any() for t in found)  # type: ignore[union-attr]
    reinforce = torch.zeros(())
    for i in range(3):
        prediction = toy.backend.student(draw.rollout.x_t[i], draw.rollout.t[i].expand(16), draw.cond)
        reinforce = reinforce - (advantage * toy.sampler.log_prob(i, prediction, draw.rollout.x_t[i + 1])).sum() / 3
    loss = sum(t.loss.sum() for t in found)
    assert isinstance(loss, Tensor)
    expected = student_gradient(toy, reinforce)
    assert expected.norm() > 1e-4
    torch.testing.assert_close(student_gradient(toy, loss), expected, rtol=1e-5, atol=1e-8)


def _inputs(ctx: Any) -> tuple[Any, Any, Any]:
    scores, group = ctx.global_scores()
    return scores, {name: weight for name, (weight, _) in ctx.rewards.parts.items()}, group


def test_reinforce_climbs_a_gaussian() -> None:
    """Policy N(mu, sigma^2), reward a x: the expectation of advantage times score is a, here within 4 errors."""
    count, a, mu, sigma = 400_000, 1.7, 0.4, 0.6
    x = mu + sigma * torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantage, _ = GRPO(scale_rewards="none").advantages({"r": a * x}, {"r": 1.0}, torch.arange(count) // 8)
    slope = (advantage * (x - mu) / sigma**2).mean().item() * 8 / 7  # the group's own mean takes one of eight shares
    assert slope == pytest.approx(a, abs=4 * 2.5 * a / count**0.5)


def test_normalised_ratio_is_the_published_one() -> None:
    """(log-ratio + its bias) std = mean(noise (mean - old mean)), GRPO-Guard; divided by the length of the step."""
    guard, plain = GRPO(ratio="guard"), GRPO(ratio="plain")
    toy = running(guard, prepared(DoubleToy), eta=0.8, batch=8)
    draw, ctx = drawn(toy)
    with torch.no_grad():
        for parameter in toy.student.parameters.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
    normalised, ordinary = (terms(g, toy, iteration=1, draw=draw, ctx=ctx) for g in (guard, plain))
    advantage, _ = guard.advantages(*_inputs(ctx))
    for i in range(3):
        x_t, t = draw.rollout.x_t[i], draw.rollout.t[i].expand(8)
        mean, std = toy.sampler.moments(i, toy.backend.student(x_t, t, draw.cond))
        from_rollout = draw.rollout.x0[i] * (1 - draw.rollout.t[i + 1])
        eps = (x_t - (1 - t[:, None]) * draw.rollout.x0[i]) / t[:, None]
        old = from_rollout + draw.rollout.t[i + 1] * math.cos(0.4 * math.pi) * eps
        bias = ((mean - old) ** 2).mean(1) / (2 * std.squeeze() ** 2)
        log_ratio = ordinary[i].metrics["log_ratio"] / 2  # type: ignore[operator]
        expected = (log_ratio + bias) * std.squeeze()
        torch.testing.assert_close(normalised[i].metrics["log_ratio"] / 2, expected, rtol=1e-6, atol=1e-9)  # type: ignore[operator]
        rho = expected.exp()
        clipped = rho.clamp(1 - 0.1, 1 + 0.1)
        loss = torch.maximum(-advantage * rho, -advantage * clipped) / 0.25 / 3
        torch.testing.assert_close(normalised[i].loss.double(), loss, rtol=1e-5, atol=1e-7)


def test_bias_and_spread_of_the_plain_ratio() -> None:
    """D = 65536, means moved by 0.01 standard deviations: log-ratios of -5e-5 +- 3.9e-5: clipping is one-sided."""
    size, d = 65536, 0.01
    noise = torch.randn(200, size, generator=torch.Generator().manual_seed(0))
    move = d * torch.randn(200, size, generator=torch.Generator().manual_seed(1))
    log_ratio = ((noise**2 - (noise - move) ** 2) / 2).mean(1).double()
    assert log_ratio.mean().item() == pytest.approx(-5e-5, abs=1e-5)
    assert log_ratio.std().item() == pytest.approx(3.9e-5, abs=6e-6)
    assert (noise * move).mean(1).mean().item() == pytest.approx(0, abs=1e-5)  # what the normalised one is made of


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_clipping_takes_the_gradient(ratio: Any) -> None:
    """Far beyond the range, samples whose ratio already went the wanted way stop; the others do not."""
    grpo = GRPO(ratio=ratio, epsilon=1e-6)
    toy = running(grpo)
    draw, ctx = drawn(toy)
    with torch.no_grad():
        for parameter in toy.student.parameters.values():
            parameter.mul_(1.2)
    advantage, _ = grpo.advantages(*_inputs(ctx))
    for term in terms(grpo, toy, iteration=1, draw=draw, ctx=ctx):
        done = (term.metrics["log_ratio"] * advantage > 0).bool()  # type: ignore[operator]
        assert 0 < done.sum() < len(done)
        assert term.metrics["clip_fraction"].all()  # type: ignore[union-attr]
        assert not student_gradient(toy, term.loss[done].sum()).any()
        break
    term = next(iter(grpo(replace(draw, iteration=1), ctx)))
    assert student_gradient(toy, term.loss[~done].sum()).any()


def test_upper_clip_range_is_its_own() -> None:
    low, both = GRPO(epsilon=0.2), GRPO(epsilon=0.2, epsilon_high=1e3)
    toy = running(low)
    draw, ctx = drawn(toy)
    with torch.no_grad():
        for parameter in toy.student.parameters.values():
            parameter.mul_(1.5)
    first = [t.metrics["clip_fraction"].mean() for t in terms(low, toy, 1, draw, ctx)]  # type: ignore[union-attr]
    second = [t.metrics["clip_fraction"].mean() for t in terms(both, toy, 1, draw, ctx)]  # type: ignore[union-attr]
    assert sum(second) < sum(first)


class OtherKernel(ToyBackend):
    """Rounds otherwise where a gradient is wanted, as a compiled graph or another attention kernel may."""

    def student(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        found = super().student(x_t, t, cond)
        return replace(found, value=found.value * (1 + 3e-3 * torch.is_grad_enabled()))


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_another_kernel_with_gradient_clips_nothing(ratio: Any) -> None:
    """Of ratios to the rollout's own means, half would be outside of the range before anything has moved."""
    grpo = GRPO(ratio=ratio, num_iterations=2, epsilon=1e-4)
    toy = running(grpo, prepared(OtherKernel))
    draw, ctx = drawn(toy)
    for iteration in (0, 1):
        for term in terms(grpo, toy, iteration, draw, ctx):
            assert not term.metrics["clip_fraction"].any()  # type: ignore[union-attr]
            assert not term.metrics["log_ratio"].any()  # type: ignore[union-attr]


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_a_weight_that_moved_between_rollout_and_update_is_found(ratio: Any) -> None:
    grpo = GRPO(ratio=ratio)
    toy = running(grpo)
    draw, ctx = drawn(toy)
    terms(grpo, toy, draw=draw, ctx=ctx)
    with torch.no_grad():
        for parameter in toy.student.parameters.values():
            parameter += 0.5
    with pytest.raises(TrainingError, match=r"before the first update the mean of step 0 is .* from the rollout's"):
        terms(grpo, toy, draw=draw, ctx=ctx)
    terms(grpo, toy, iteration=1, draw=draw, ctx=ctx)  # later it is supposed to


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_kl_is_that_of_the_gaussians() -> None:
    grpo = GRPO(beta=0.5)
    toy = running(grpo, prepared(DoubleToy, roles=ROLES), eta=0.8)
    draw, ctx = drawn(toy)
    for i, term in enumerate(terms(grpo, toy, draw=draw, ctx=ctx)):
        t = draw.rollout.t[i].expand(16)
        moments = [
            toy.sampler.moments(i, who(draw.rollout.x_t[i], t, draw.cond))
            for who in (toy.backend.student, toy.backend.reference)
        ]
        (mean, std), (other, _) = moments
        normals = [torch.distributions.Normal(m, std.expand_as(m)) for m in (mean, other)]
        expected = torch.distributions.kl_divergence(*normals).mean(1)
        assert (expected > 1e-5).all()
        torch.testing.assert_close(term.metrics["kl"], expected, rtol=1e-6, atol=0)


def test_kl_to_itself_is_zero_and_has_no_gradient() -> None:
    grpo = GRPO(beta=0.5)
    backend = prepared(roles=ROLES)
    backend.snapshot()
    toy = running(grpo, backend, rewards=Constant())
    assert not step_of(toy).any()


def test_kl_holds_the_student_back() -> None:
    def distance(beta: float) -> float:
        backend = prepared(roles=ROLES)
        backend.snapshot()
        toy = running(GRPO(beta=beta), backend, optimize=adam, rl_weight=1.0, batch=32)
        before = flat(state(toy))
        for _ in range(20):
            line = toy.train_step()
        assert ("grpo/kl" in line) == (beta > 0)
        return float((flat(state(toy)) - before).norm())

    assert distance(30.0) < 0.7 * distance(0.0)


# --- Which steps, and whose noise -------------------------------------------------------------------------------------


def own_noise(rollout: Any, i: int) -> Tensor:
    """How far apart the noises of step i (-1: the initial state) lie in each group of four, [groups]."""
    noise = rollout.x_t[0] if i < 0 else rollout.x_t[i + 1] - (1 - rollout.t[i + 1]) * rollout.x0[i]
    return noise.view(-1, 4, 2).double().std(1).max(1).values


@pytest.mark.parametrize(
    ("policy_steps", "count"), [("all", 3), ("early:1", 1), ("early:2", 2), ("random:2", 2), ("random:3", 3)]
)
@pytest.mark.parametrize("init_same_noise", [True, False])
def test_a_group_differs_by_the_noise_of_trained_steps_only(
    policy_steps: str, count: int, init_same_noise: bool
) -> None:
    grpo = GRPO(policy_steps=policy_steps, init_same_noise=init_same_noise)
    toy = running(grpo)
    draw, ctx = drawn(toy)
    trained = grpo.trained_steps(ctx)
    assert len(trained) == count == len(terms(grpo, toy, draw=draw, ctx=ctx))
    if policy_steps.startswith("early"):
        assert trained == list(range(count))
    assert (own_noise(draw.rollout, -1) > 0.1).all() != init_same_noise
    for i in range(3):
        apart = own_noise(draw.rollout, i)
        assert (apart > 0.1).all() if i in trained else (apart < 1e-5).all()
    between = draw.rollout.x_t[0].view(4, 4, 2)[:, 0]
    assert (between - between[0]).abs()[1:].sum(1).min() > 0.1  # groups do not share


def test_random_steps_are_drawn_anew_and_equally_often() -> None:
    grpo = GRPO(policy_steps="random:2")
    toy = running(grpo)
    counts = torch.zeros(3)
    for step in range(300):
        toy.step = step
        counts[grpo.trained_steps(toy.context(0))] += 1
    assert counts.sum() == 600
    assert (counts - 200).abs().max() < 4 * (300 * 2 / 9) ** 0.5


def test_noise_is_shared_in_the_rollout_that_is_climbed_only() -> None:
    """The fake score's other batches stay as varied as ever."""
    toy = running(GRPO(), dmd_weight=1.0, fake_updates=2)
    first, last = (draw.rollout for _, draw in toy.draws(noted=True))
    assert (own_noise(first, -1) > 0.1).all()
    assert (own_noise(last, -1) == 0).all()


def test_two_objectives_share_what_both_name() -> None:
    toy = trainer(
        prepared(),
        batch=8,
        group_size=4,
        rewards=Plain(),
        objectives=[GRPO(policy_steps="early:1"), GRPO(policy_steps="early:2", init_same_noise=False)],
    )
    assert toy.objectives.shared_noise(toy.context(0)) == [3]


def test_one_graph_at_a_time() -> None:
    """Each policy step's graph is freed before the next is built: three steps save as many bytes as one."""

    def peak(policy_steps: str) -> int:
        toy = running(GRPO(policy_steps=policy_steps))
        draw, ctx = drawn(toy)
        ctx.global_scores()
        with Meter(toy.backend) as meter:  # type: ignore[arg-type]
            toy.objectives.gradient_of(toy.objectives.terms[0], draw, ctx)
        assert meter.alive == 0
        return meter.peak

    assert peak("all") <= 1.02 * peak("early:1")


# --- Whole steps ------------------------------------------------------------------------------------------------------


@dataclass
class Blind:
    """Judges without a gradient."""

    differentiable: ClassVar[bool] = False

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        assert not images.requires_grad
        return Redness()(images, prompts)


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("number", [2, 8])
def test_equal_rewards_move_nothing(ratio: Any, number: int) -> None:
    toy = running(GRPO(ratio=ratio, num_iterations=2), batch=16, group_size=number, rewards=Constant(22.3))
    assert torch.equal(step_of(toy), torch.zeros_like(step_of(toy)))


def test_equal_rewards_are_plain_matching() -> None:
    moved = step_of(running(GRPO(init_same_noise=False), rewards=Constant(), dmd_weight=1.0))
    plain = step_of(trainer(prepared(), batch=16, group_size=4))
    assert plain.any()
    assert torch.equal(moved, plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_dropped_and_counted(value: float) -> None:
    toy = running(GRPO(), rewards=Plain({"mode 1": value}))
    line = toy.train_step()
    assert line["grpo/invalid"] == 4
    assert line["grpo/coverage"] == 0.75
    assert flat(state(toy)).isfinite().all()
    assert line["grad_norm/student"] > 0


def test_a_rollout_is_used_again_while_the_fake_score_rests() -> None:
    grpo = GRPO(num_iterations=3, epsilon=100.0)
    toy = running(grpo, dmd_weight=1.0, optimize=lambda p: torch.optim.SGD(p, lr=0.05))
    calls, fakes, iterations = [], [], []
    draws, again, ask = toy.draws, toy.answer_again, toy.objectives.gradient_of

    def spy(term: Any, draw: Draw, ctx: Any, *balance: Any) -> Tensor:
        iterations.append(draw.iteration)
        fakes.append(flat(state(toy, "fake_score")))
        return ask(term, draw, ctx, *balance)

    toy.draws = lambda *args: calls.append("draws") or draws(*args)  # type: ignore[method-assign,func-returns-value]
    toy.answer_again = lambda *args: calls.append("again") or again(*args)  # type: ignore[method-assign,func-returns-value]
    toy.objectives.gradient_of = spy  # type: ignore[method-assign]
    line = toy.train_step()
    assert calls == ["draws", "again", "again"]
    assert iterations == [0, 1, 2]
    assert torch.equal(fakes[0], fakes[2])
    assert line["grpo/log_ratio"] != 0
    assert toy.step == 1


def test_learning_rate_follows_steps_not_updates() -> None:
    toy = running(GRPO(num_iterations=2))
    toy.student.scheduler = torch.optim.lr_scheduler.LambdaLR(toy.student.optimizer, lambda step: 0.5**step)
    assert [toy.train_step()["learning_rate/student"] for _ in range(3)] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("cls", [ToyBackend, EpsToy])
@pytest.mark.parametrize("settings", [{}, {"ratio": "plain"}, {"policy_steps": "random:2"}, {"num_iterations": 2}])
def test_climbs_a_reward_without_gradient_jointly(cls: type[ToyBackend], settings: dict[str, Any]) -> None:
    def reward(weight: float) -> float:
        toy = running(
            GRPO(**settings),
            prepared(cls),
            rewards=Blind(),
            dmd_weight=1.0,
            rl_weight=weight,
            batch=64,
            group_size=8,
            optimize=adam,
        )
        found = [toy.train_step(noted=True) | toy.reward_metrics() for _ in range(40)]
        return sum(line["reward/total"] for line in found[-5:]) / 5

    assert reward(3.0) > reward(0.0) + 0.01


@pytest.mark.parametrize("sde_type", ["ddim", "flow_sde", "dance_sde"])
def test_climbs_with_other_policies(sde_type: str) -> None:
    toy = running(GRPO(), rewards=Blind(), batch=64, group_size=8, optimize=adam, sde_type=sde_type, eta=0.7)
    found = [toy.train_step(noted=True) | toy.reward_metrics() for _ in range(40)]
    assert found[-1]["reward/total"] > found[0]["reward/total"] + 0.02


def test_a_second_objective_adds_to_the_first_and_averages_nothing() -> None:
    def moved(*objectives: Any) -> Tensor:
        return step_of(
            trainer(prepared(DoubleToy), batch=16, group_size=4, rewards=Plain(), dmd_weight=0.0, objectives=objectives)
        )

    grpo, refl = GRPO(init_same_noise=False), ReFL(steps="last")
    together, apart = moved((1.0, grpo), (0.1, refl)), (moved((1.0, grpo)), moved((0.1, refl)))
    assert all(part.norm() > 1e-4 for part in apart)
    torch.testing.assert_close(together, apart[0] + apart[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.0}, "epsilon and epsilon_high must be above 0"),
        ({"epsilon_high": -1.0}, "epsilon and epsilon_high must be above 0"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, not 0"),
        ({"beta": -0.1}, "beta must be at least 0, not -0.1"),
        ({"policy_steps": "last"}, "policy_steps must be all, early:N or random:N, not 'last'"),
        ({"policy_steps": "random:0"}, "policy_steps must be"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPO(**settings)
