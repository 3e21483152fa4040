"""SRPO against its formulas, against open_clip, and on the analytic mixture."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dmdr.backends.toy import PROMPTS, ToyBackend
from dmdr.paths import NoisePath, Prediction, RectifiedFlow, VariancePreserving, add_noise, expand
from dmdr.protocols import FeatureReward, Needs
from dmdr.randomness import Random
from dmdr.rewards import Rewards
from dmdr.run.job import planned
from dmdr.sampling import FewStepSampler
from dmdr.settings.parse import parse
from dmdr.training.trainer import Trainer
from dmdr.types import Condition, Draw, Rollout, Term, terms_of
from dmdr_digits import Digits
from dmdr_refl import ReFL
from dmdr_rewards.clip import CLIP
from dmdr_rewards.hps import HPS
from dmdr_srpo import SRPO, recovered
from toy_trainer import DoubleToy, EpsToy, Meter, adam, flat, prepared, state, step_of, trainer

RED, GREEN, DARK, PLAIN = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (-0.5, -0.5, 0.0), (0.2, 0.3, 0.0)
FEATURES = {"Red": RED, "Green": GREEN, "Dark": DARK, "": PLAIN}
RED_NOT_GREEN: dict[str, Any] = {"positive": ["Red"], "negative": ["Green"]}


@dataclass
class Colour:
    """The mean colour of the image along the colour that the text's first word names; broken for some prompts."""

    differentiable: ClassVar[bool] = True
    features: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: FEATURES)
    broken: Mapping[str, float] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def image_features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        self.texts += prompts
        parts = [prompt.rpartition(". ") for prompt in prompts]
        rows = torch.tensor([self.features[word] for word, _, _ in parts])
        return rows * torch.tensor([[self.broken.get(prompt, 1.0)] for _, _, prompt in parts])

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)


class DoubleEps(EpsToy, DoubleToy):
    """The epsilon toy in float64."""


def vp() -> NoisePath:
    return prepared(EpsToy).path


def draw_of(x0: Tensor, prompts: Sequence[str], *, iteration: int = 0) -> Draw:
    """The last of two steps of trajectories that ended at `x0`."""
    states = torch.stack([torch.zeros_like(x0)] * 2 + [x0])
    index = torch.arange(len(x0))
    t = torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64)
    draw = Rollout(Condition(tuple(prompts)), t, states, states[1:], index, index).pick(torch.ones_like(index))
    return replace(draw, leaf=x0.detach().clone().requires_grad_(), iteration=iteration)


def context(rewards: Rewards, **backend: Any) -> Any:
    """What SRPO asks of a step; latents are images unless told otherwise."""
    given = SimpleNamespace(**{"decode": lambda x: x, "path": RectifiedFlow(), **backend})
    return SimpleNamespace(rewards=rewards, random=Random(0, 0, "rollout/0"), backend=given)


def step(objective: SRPO, reward: Any, **settings: Any) -> tuple[Trainer, Any, Draw]:
    """A trainer, its context, and a draw with its leaf."""
    running = trainer(objectives=[objective], rewards=reward, **settings)
    ctx = running.context(0)
    draw = running.rollouts.pick(running.rollouts.whole(ctx), ctx)
    return running, ctx, replace(draw, leaf=draw.x0.detach().requires_grad_())


def only(answer: Any) -> Term:
    (term,) = terms_of(answer)
    return term


# --- The score ----------------------------------------------------------------------------------------------------


def score_of(positive: float, negative: float, **settings: Any) -> Term:
    """Of an image whose cosines with the two texts are given."""
    features = {"Red": (positive, 1.0, 0.0), "Green": (negative, 1.0, 0.0)}
    images = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(2, 3, 4, 4)
    rewards = Rewards({"colour": (1.0, Colour(features))})
    return only(SRPO(**{**RED_NOT_GREEN, **settings})(draw_of(images, ["a", "b"]), context(rewards)))


def test_score_of_the_worked_example() -> None:
    term = score_of(0.30, 0.28)
    torch.testing.assert_close(term.loss, torch.full((2,), -0.05))
    torch.testing.assert_close(term.metrics["score"], torch.full((2,), 0.05))
    torch.testing.assert_close(term.metrics["preference"], torch.full((2,), 0.02))
    torch.testing.assert_close(score_of(0.30, 0.28, hinge=0.7).loss, torch.full((2,), 0.65))
    assert torch.equal(score_of(0.30, 0.28, hinge=0.01).loss, torch.zeros(2))


def test_score_is_linear_in_k() -> None:
    at = {k: score_of(0.30, 0.28, k=k).loss for k in (0.0, 0.5, 2.0)}
    torch.testing.assert_close(at[0.5], 0.75 * at[0.0] + 0.25 * at[2.0])
    torch.testing.assert_close(at[0.0] - at[2.0], torch.full((2,), 2 * 0.30))


def test_the_same_words_at_k_0_have_no_score_and_no_gradient() -> None:
    reward = Colour()
    for direct_align in (False, True):
        objective = SRPO(k=0.0, positive=["Red"], negative=["Red"], direct_align=direct_align)
        _, ctx, draw = step(objective, reward)
        for term in terms_of(objective(draw, ctx)):
            assert torch.equal(term.loss, torch.zeros(8))
            leaves = [draw.leaf, *ctx.backend.parameters("student").values()]
            grads = torch.autograd.grad(term.loss.sum(), leaves, allow_unused=True)
            assert not any(grad.any() for grad in grads if grad is not None)
            assert sum(grad is not None for grad in grads) >= 1


def test_gradient_is_that_of_the_weighted_sum_and_hinges_act_on_each_reward() -> None:
    other = Colour({"Red": (0.5, -1.0, 0.0), "Green": (0.0, 0.5, 0.0)})
    rewards = Rewards({"colour": (2.0, Colour()), "other": (-0.5, other)})
    objective = SRPO(k=0.5, **RED_NOT_GREEN)
    _, ctx, draw = step(objective, rewards, backend=prepared(DoubleToy))
    term = only(objective(draw, ctx))
    # d s / d latent = ((1 + k) positive - negative) / 8, as the toy shows the point / 8 + 0.5 as its colour.
    text = 2.0 * torch.tensor([1.5, -1.0]) - 0.5 * torch.tensor([0.75, -2.0])
    (grad,) = torch.autograd.grad(term.loss.sum(), draw.leaf)
    torch.testing.assert_close(grad, (-text / 8).double().expand(8, 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(term.loss, -(draw.x0.float() / 8 + 0.5) @ text)
    torch.testing.assert_close(term.metrics["score"], -term.loss.detach())

    objective = SRPO(k=0.5, hinge=0.3, **RED_NOT_GREEN)
    first, second = (
        only(objective(draw, replace(ctx, scorer=replace(ctx.scorer, rewards=Rewards({"one": (w, r)})))))
        for w, r in ctx.rewards.parts.values()  # of each alone
    )
    hinged = only(objective(draw, ctx))
    torch.testing.assert_close(hinged.loss, first.loss + second.loss)
    silent = (first.loss == 0) & (second.loss == 0)
    (grad,) = torch.autograd.grad(hinged.loss.sum(), draw.leaf)
    assert (first.loss == 0).any() and (first.loss > 0).any()
    assert torch.equal(grad.any(1), ~silent)


@pytest.mark.parametrize("name", ["hps", "clip"])
def test_score_is_open_clips(digits: Digits, name: str) -> None:
    folder = Path(str(digits.reward_checkpoint(name)))
    config = json.loads((folder / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"])
    if name == "hps":
        reward: Any = HPS(str(folder), prompt_prefix="Photo:")
        weights = torch.load(folder / "HPS_v2.1_compressed.pt")["state_dict"]
    else:
        reward, weights = CLIP(str(folder)), load_file(folder / "open_clip_model.safetensors")
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)
    reward.prepare(torch.device("cpu"), torch.float32)
    assert isinstance(reward, FeatureReward)

    torch.manual_seed(0)
    prompts = [row["prompt"] for row in digits.prompts()[:6]]
    draw = draw_of(torch.rand(6, 3, 32, 32), prompts)  # of the tower's own size: nothing is resized
    objective = SRPO()
    term = only(objective(draw, context(Rewards({name: (3.0, reward)}))))

    random = Random(0, 0, "rollout/0")
    tokenize = open_clip.SimpleTokenizer(context_length=model.context_length)
    leaf = draw.x0.clone().requires_grad_()
    mean, std = (torch.tensor(config["preprocess_cfg"][key])[:, None, None] for key in ("mean", "std"))
    image = model.encode_image((leaf - mean) / std, normalize=True)
    cosines = []
    for which, words in (("positive", objective.positive), ("negative", objective.negative)):
        drawn = [words[i] for i in random.integers(f"srpo/{which}", torch.arange(6), 3).tolist()]
        texts = [f"{word}. {prompt}" for word, prompt in zip(drawn, prompts, strict=True)]
        texts = [f"Photo: {text}" for text in texts] if name == "hps" else texts
        cosines.append((image * model.encode_text(tokenize(texts), normalize=True)).sum(-1))
    expected = 1.1 * cosines[0] - cosines[1]
    torch.testing.assert_close(term.loss, -3 * expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(term.metrics["preference"], 3 * (cosines[0] - cosines[1]), rtol=0, atol=1e-5)
    (found,) = torch.autograd.grad(term.loss.sum(), draw.leaf)
    (grad,) = torch.autograd.grad(-3 * expected.sum(), leaf)
    assert grad.abs().max() > 1e-5
    assert (found - grad).norm() < 1e-4 * grad.norm()


# --- The words ----------------------------------------------------------------------------------------------------


def texts_of(objective: SRPO, count: int, **draw: Any) -> tuple[list[str], list[str]]:
    """The positive and negative texts of `count` samples."""
    reward = Colour(dict.fromkeys([*objective.positive, *objective.negative, ""], RED))
    images = torch.rand(count, 3, 2, 2)
    ctx = context(Rewards({"c": (1.0, reward)}))
    ctx.random = replace(ctx.random, iteration=draw.get("iteration", 0))
    only(objective(draw_of(images, [f"p{i}" for i in range(count)], **draw), ctx))
    return reward.texts[:count], reward.texts[count:]


def test_every_sample_has_words_of_its_own_and_every_word_occurs() -> None:
    for texts, words in zip(texts_of(SRPO(), 300), (SRPO().positive, SRPO().negative), strict=True):
        assert [text.rpartition(". ")[2] for text in texts] == [f"p{i}" for i in range(300)]
        counts = Counter(text.rpartition(". ")[0] for text in texts)
        assert set(counts) == set(words)
        assert min(counts.values()) > 75  # 100 each, 3 standard deviations are 24.5
    positive, negative = texts_of(SRPO(negative=SRPO().positive), 300)
    assert 60 < sum(a == b for a, b in zip(positive, negative, strict=True)) < 140  # drawn independently


def test_words_are_drawn_anew_for_each_use_of_a_rollout() -> None:
    assert texts_of(SRPO(), 40) == texts_of(SRPO(), 40)
    first, second, third = (texts_of(SRPO(), 40, iteration=i)[0] for i in (0, 1, 2))
    assert first != second != third != first


def test_template_and_the_empty_word() -> None:
    objective = SRPO(positive=[""], negative=["Oil", ""], template="{prompt}, {word} ({word})")
    positive, negative = texts_of(objective, 20)
    assert positive == [f"p{i}" for i in range(20)]
    assert set(negative[:8]) <= {f"p{i}{after}" for i in range(8) for after in ("", ", Oil (Oil)")}
    assert len({"Oil" in text for text in negative}) == 2
    braces = SRPO(positive=["a {b}"], negative=["{word}"])
    assert texts_of(braces, 1) == (["a {b}. p0"], ["{word}. p0"])


def test_steps_and_needs() -> None:
    assert SRPO().needs == Needs(reward_grad=True, text_features=True, finished=False)
    assert SRPO(direct_align=True).needs.finished
    assert SRPO(steps="last", direct_align=True).needs.steps == "last"
    assert SRPO(steps="2").needs.steps == (2,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": -0.1}, "k must be at least 0, not -0.1"),
        ({"k": math.nan}, "k must be at least 0, not nan"),
        ({"positive": []}, "positive must name at least one word"),
        ({"negative": []}, "negative must name at least one word"),
        ({"template": "{prompt}"}, "template must hold {word} and {prompt} and no other, not '{prompt}'"),
        ({"template": "{word}"}, "template must hold"),
        ({"template": "{word} {prompt} {style}"}, "template must hold"),
        ({"template": "{word!r} {prompt}"}, "template must hold"),
        ({"template": "{} {word} {prompt}"}, "template must hold"),
        ({"steps": "first"}, "steps must be 'any', 'last' or a step index, not 'first'"),
        ({"steps": "-1"}, "steps must be"),
        ({"span": 0.0}, "span must be above 0 and below 1, not 0.0"),
        ({"span": 1.0}, "span must be"),
        ({"span": math.nan}, "span must be"),
    ],
)
def test_bad_flags_are_one_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^srpo: ") as caught:
        SRPO(**flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_and_a_reward_without_text_features() -> None:
    flags = ["--model", "toy", "--rl", "srpo", "--positive", "Fine", "CG Render", "--direct_align", "true"]
    settings = parse([*flags, "--reward", "hps"])
    (chosen,) = settings.of("objectives")
    objective = chosen.build()
    assert objective == SRPO(positive=["Fine", "CG Render"], direct_align=True)
    planned(settings)
    settings = parse([*flags, "--reward", "hps+dinov2"])
    with pytest.raises(ValueError, match="--rl srpo needs a reward with text features, and 'dinov2' has none"):
        planned(settings)


# --- Direct-Align -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["velocity", "eps", "x0", "v"])
@pytest.mark.parametrize(("start", "end"), [(0.9, 0.81), (0.6, 0.58), (0.2, 0.18), (0.58, 0.6), (0.729, 0.81)])
def test_an_exact_step_recovers_x0_exactly(kind: Any, start: float, end: float) -> None:
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, to = torch.full((4,), start, dtype=torch.float64), torch.full((4,), end, dtype=torch.float64)
    for path in (RectifiedFlow(), vp()):
        if kind == "velocity" and isinstance(path, VariancePreserving):
            continue
        x_t = add_noise(path, x0, eps, t)
        value = Prediction(x0, kind, x_t, t, path).target(x0, eps)
        assert (recovered(Prediction(value, kind, x_t, t, path), eps, to) - x0).abs().max() < 1e-12


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.58), (0.58, 0.6), (1.0, 0.9)])
def test_sensitivity_of_the_recovered_latents(start: float, end: float) -> None:
    x0, eps, v = torch.randn(3, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, to = torch.full((1,), start, dtype=torch.float64), torch.full((1,), end, dtype=torch.float64)
    path = RectifiedFlow()
    x_t = add_noise(path, x0, eps, t)

    def recover(value: Tensor) -> Tensor:
        return recovered(Prediction(value, "velocity", x_t, t, path), eps, to)

    slope = torch.autograd.functional.jacobian(recover, v).squeeze()
    torch.testing.assert_close(slope, (end - start) / (1 - end) * torch.eye(2, dtype=torch.float64))
    # As published: one Euler step, then the known noise is taken away.
    torch.testing.assert_close(recover(v), (x_t + (end - start) * v - end * eps) / (1 - end))
    # Any path: a multiple of the student's error, which is all of it from pure noise.
    shrunk = 1 - (end / (1 - end)) * ((1 - start) / start)
    torch.testing.assert_close(recover(v), x0 + shrunk * (x_t - start * v - x0))


def aligned_by_hand(objective: SRPO, running: Trainer) -> tuple[Tensor, Tensor]:
    """Losses [B] and the gradient at the student's parameters, in one graph."""
    ctx = running.context(0)
    draw = running.rollouts.pick(running.rollouts.whole(ctx), ctx)
    path, final = running.backend.path, draw.rollout.final
    eps = ctx.random.normal("srpo/eps", draw.sample, (2,)).double()
    up, down = torch.tensor(RED)[:2].double(), torch.tensor(GREEN)[:2].double()
    losses = 0.0
    upper, middle, lower = draw.t, draw.t * (1 - objective.span), draw.t * (1 - objective.span) ** 2
    for start, positive, negative in ((upper, up, down), (lower, down, up)):
        x_t = add_noise(path, final, eps, start)
        prediction = running.backend.student(x_t, start, draw.cond)
        alpha, sigma = expand(path.alpha(middle), eps), expand(path.sigma(middle), eps)
        stepped = alpha * prediction.x0 + sigma * prediction.eps
        colour = (stepped - sigma * eps) / alpha / 8 + 0.5
        losses = losses - 0.5 * (colour * ((1 + objective.k) * positive - negative)).sum(1)
    grads = torch.autograd.grad(losses.mean(), list(running.student.parameters.values()))
    return losses.detach(), torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("cls", [DoubleToy, DoubleEps])
@pytest.mark.parametrize("micro_batch", [8, 3])
def test_aligned_step_takes_the_gradient_of_the_whole_graph(cls: type[ToyBackend], micro_batch: int) -> None:
    objective = SRPO(direct_align=True, span=0.2, **RED_NOT_GREEN)
    settings: dict[str, Any] = {"objectives": [objective], "rewards": Colour(), "dmd_weight": 0.0}
    losses, expected = aligned_by_hand(objective, trainer(prepared(cls), **settings))
    running = trainer(prepared(cls), micro_batch=micro_batch, **settings)
    found = -step_of(running)
    assert expected.norm() > 1e-3
    assert (found - expected).norm() < 1e-5 * expected.norm()  # images are float32
    assert running.last_context is not None
    assert running.last_context.metrics["loss/srpo"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_both_passes_push_the_same_way_and_log_the_first() -> None:
    objective = SRPO(direct_align=True, k=0.0, **RED_NOT_GREEN)
    _, ctx, draw = step(objective, Colour(), backend=prepared(DoubleToy))
    terms = list(terms_of(objective(draw, ctx)))
    parameters = list(ctx.backend.parameters("student").values())
    first, second = (
        torch.cat([grad.flatten() for grad in torch.autograd.grad(term.loss.sum(), parameters)]) for term in terms
    )
    assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.5
    assert set(terms[0].metrics) == {"score", "preference"}
    assert not terms[1].metrics
    torch.testing.assert_close(terms[0].loss, -terms[0].metrics["score"] / 2, check_dtype=False)


def test_random_numbers_are_keyed_by_sample_and_use() -> None:
    objective = SRPO(direct_align=True, positive=["Red", "Dark"], negative=["Green", ""])
    _, ctx, draw = step(objective, Colour())

    def losses(part: Draw) -> Tensor:
        return torch.stack([term.loss.detach() for term in terms_of(objective(part, ctx))])

    parts = torch.cat([losses(part) for part in draw.split(3)], 1)
    torch.testing.assert_close(parts, losses(draw))
    ctx.iteration = 1
    again = losses(replace(draw, iteration=1))
    assert ((again - parts).abs() > 1e-6).all()


class Bulky(ToyBackend):
    """A decoder that keeps about as much as the student."""

    def decode(self, latents: Tensor) -> Tensor:
        wide = latents.repeat(1, 60)
        return super().decode(latents + 1e-3 * (wide.sin() * wide.cos()).mean(1, keepdim=True))


def test_one_graph_is_alive_at_a_time() -> None:
    objective = SRPO(direct_align=True, **RED_NOT_GREEN)
    running, ctx, draw = step(objective, Colour(), batch=32, backend=prepared(Bulky))
    with Meter(running.backend) as student:
        prediction = ctx.backend.student(draw.x_t, draw.t, draw.cond)
    with Meter(running.backend) as reward:
        images = ctx.backend.decode(draw.leaf)
    assert prediction.x0.requires_grad and images.requires_grad
    larger, smaller = sorted([student.peak, reward.peak], reverse=True)
    assert smaller > larger / 2 > 0
    with Meter(running.backend) as whole:
        terms: Iterator[Term] = iter(terms_of(objective(draw, ctx)))
        assert whole.peak == 0  # nothing is computed before it is asked for
        for term in terms:
            assert whole.alive > 0
            term.loss.sum().backward()
            assert whole.alive == 0
    assert larger <= whole.peak <= 1.25 * larger
    with Meter(running.backend) as whole:
        running.train_step()
    assert whole.peak <= 1.25 * larger
    assert whole.alive == 0


# --- In training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("hinge", [None, 0.7])
@pytest.mark.parametrize("direct_align", [False, True])
def test_what_cannot_be_scored_is_left_out_and_counted(direct_align: bool, hinge: float | None, value: float) -> None:
    """The rest is the mean over those that remain: as from a batch of the prompts that can be scored, by hand."""
    objective = SRPO(direct_align=direct_align, hinge=hinge, **RED_NOT_GREEN)
    broken = {"mode 1": value, "mode 2": value}
    running = trainer(prepared(DoubleToy), objectives=[objective], rewards=Colour(broken=broken), dmd_weight=0.0)
    before = flat(state(running))
    line = running.train_step()
    found = before - flat(state(running))
    assert (line["srpo/invalid"], line["srpo/coverage"]) == (4, 0.5)
    assert all(math.isfinite(line[f"srpo/{name}"]) for name in ("score", "preference"))

    whole = trainer(prepared(DoubleToy), objectives=[objective], rewards=Colour(), dmd_weight=0.0)
    ctx = whole.context(0)
    draw = whole.rollouts.pick(whole.rollouts.whole(ctx), ctx)
    kept = torch.tensor([prompt not in broken for prompt in draw.cond.prompts])
    student = list(whole.student.parameters.values())
    expected, loss = torch.zeros_like(found), 0.0
    for term in terms_of(objective(replace(draw, leaf=draw.x0.detach().requires_grad_()), ctx)):
        value_kept = term.loss[kept].mean()
        loss += value_kept.item()
        if not direct_align:  # the trainer carries the leaf's gradient on to the student
            leaf = ctx.backend.student(draw.x_t, draw.t, draw.cond).x0
            value_kept = only(objective(replace(draw, leaf=leaf), ctx)).loss[kept].mean()
        expected += torch.cat([grad.flatten() for grad in torch.autograd.grad(value_kept, student)])
    assert expected.norm() > 1e-3
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert line["loss/srpo"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("direct_align", "torn", "invalid"), [(False, {1}, 1), (True, {1, 2}, 1), (True, {1}, 1), (True, {2}, 0)]
)
def test_images_that_are_not_finite_leave_the_student_whole(direct_align: bool, torn: set[int], invalid: int) -> None:
    """A sample whose first pass is lost does not count; one whose second is lost has half a loss."""

    class Torn(ToyBackend):
        calls = 0

        def decode(self, latents: Tensor) -> Tensor:
            self.calls += 1
            images = super().decode(latents)
            hit = (torch.arange(len(images)) == 3) & (self.calls in torn)
            return images * torch.where(hit, math.nan, 1.0)[:, None, None, None]

    objective = SRPO(direct_align=direct_align, **RED_NOT_GREEN)
    running = trainer(prepared(Torn), objectives=[objective], rewards=Colour())
    line = running.train_step()
    assert line["srpo/invalid"] == invalid
    assert all(math.isfinite(value) for value in line.values())
    assert flat(state(running)).isfinite().all()


class HalfDecoder(ToyBackend):
    """Decodes in real float16, which holds no gradient below 6e-8."""

    def decode(self, latents: Tensor, *, exact: bool = False) -> Tensor:
        return super().decode(latents.half(), exact=exact).float()


class Faint(Colour):
    """The gradient of each pixel is about 1e-9."""

    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features(images) * 1e-7


@pytest.mark.parametrize("direct_align", [False, True])
def test_the_loss_scale_keeps_gradients_that_float16_would_lose(direct_align: bool) -> None:
    objective = SRPO(direct_align=direct_align, **RED_NOT_GREEN)
    settings: dict[str, Any] = {"objectives": [objective], "rewards": Faint(), "dmd_weight": 0.0, "rl_weight": 1e6}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=10**6)
    whole = step_of(trainer(prepared(), **settings))
    half = step_of(trainer(prepared(HalfDecoder), scaler=scaler, **settings))
    assert whole.norm() > 0
    assert (half - whole).norm() < 0.02 * whole.norm()


def test_steps_that_are_not_asked_for_have_no_gradient() -> None:
    for direct_align in (False, True):
        objective = SRPO(steps="last", direct_align=direct_align, **RED_NOT_GREEN)
        running = trainer(batch=32, objectives=[objective], rewards=Colour(), dmd_weight=0.0)
        line = running.train_step()
        assert 0 < line["srpo/coverage"] < 0.6
        assert line["srpo/invalid"] == 0
        assert line["grad_norm/student"] > 0


@pytest.mark.parametrize("direct_align", [False, True])
@pytest.mark.parametrize("cls", [ToyBackend, EpsToy])
def test_joint_training_raises_the_preference(cls: type[ToyBackend], direct_align: bool) -> None:
    """Of red over green: the finished points move right and down, with distribution matching pulling them back."""

    def preference(running: Trainer) -> float:
        sampler = FewStepSampler(running.backend.path, running.sampler.t, 1.0)
        noise = torch.randn(4, 400, 2, generator=torch.Generator().manual_seed(7))
        cond = running.backend.encode([PROMPTS[i % 4] for i in range(400)])
        final = sampler.rollout(running.backend.student, noise, cond).final
        return ((final[:, 0] - final[:, 1]) / 8).mean().item()

    objective = SRPO(direct_align=direct_align, **RED_NOT_GREEN)
    weight = 30.0 if direct_align else 5.0  # what a short step recovers moves little
    running = trainer(
        prepared(cls), batch=32, objectives=[objective], rewards=Colour(), rl_weight=weight, optimize=adam
    )
    before = preference(running)
    lines = [running.train_step() for _ in range(60)]
    assert preference(running) > before + 0.05
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_it_adds_up_with_another_objective() -> None:
    objectives = [SRPO(**RED_NOT_GREEN), (0.5, SRPO(direct_align=True, **RED_NOT_GREEN))]
    line = trainer(objectives=[objectives[0], ReFL()], rewards=Colour()).train_step()
    assert {"loss/srpo", "srpo/score", "srpo/preference", "loss/refl"} <= set(line)
    apart = [
        step_of(trainer(prepared(DoubleToy), objectives=[o], rewards=Colour(), dmd_weight=0.0)) for o in objectives
    ]
    both = step_of(trainer(prepared(DoubleToy), objectives=objectives, rewards=Colour(), dmd_weight=0.0))
    torch.testing.assert_close(both, sum(apart), rtol=1e-6, atol=1e-9)
