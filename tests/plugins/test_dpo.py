"""DPO: the pairs it finds, both forms of its log-ratio against their formulas, and where it moves the student."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import logsigmoid

from dmdr.backends.toy import CENTRES, PROMPTS, ToyBackend
from dmdr.errors import ConfigError
from dmdr.images import to_pil
from dmdr.paths import Prediction, expand
from dmdr.testing import check_objective
from dmdr.training.context import StepContext
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Term
from dmdr_dpo import DPO
from dmdr_dpo.pairs import best_and_worst
from toy_trainer import Constant, DoubleToy, EpsToy, Meter, Plain, flat, prepared, state, steadily, step_of, trainer

ROLES = ("student", "fake_score", "reference")
LN2 = math.log(2)
FORMS = [("transition", 4), ("transition", 2), ("diffusion", 4), ("diffusion", 1)]  # and student steps


def at_start(cls: type[ToyBackend] = DoubleToy) -> Any:
    """A backend whose reference is the student."""
    backend = prepared(cls, roles=ROLES)
    backend.snapshot()
    return backend


def first_draw(running: Trainer) -> tuple[StepContext, Draw]:
    ctx = running.context(0)
    return ctx, running.rollouts.pick(running.rollouts.whole(ctx), ctx)


def ask(objective: DPO, backend: Any, **settings: Any) -> tuple[Term, Draw, StepContext]:
    """The objective's answer to the first draw of four groups of four."""
    settings = {"batch": 16, "group_size": 4, "rewards": Plain()} | settings
    ctx, draw = first_draw(trainer(backend, objectives=[objective], **settings))
    objective.setup(ctx)
    return objective(draw, ctx), draw, ctx


def grad_norm(loss: Tensor, backend: ToyBackend) -> float:
    grads = torch.autograd.grad(loss.sum(), list(backend.parameters("student").values()), retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads]).norm().item()


class Watched(DoubleToy):
    """Notes what the student is asked with a graph, and adds `nudge` to its answer."""

    nudge: Tensor | None = None
    asked: Prediction | None = None

    def student(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        prediction = super().student(x_t, t, cond)
        if torch.is_grad_enabled():
            self.asked = prediction
            if self.nudge is not None:
                return Prediction(prediction.value + self.nudge, prediction.kind, x_t, t, self.path)
        return prediction


class WatchedEps(EpsToy):
    asked: Prediction | None = None

    def student(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        prediction = super().student(x_t, t, cond)
        self.asked = prediction if torch.is_grad_enabled() else None
        return prediction


@dataclass
class Listed:
    """Given scores, row by row."""

    scores: Sequence[float]
    differentiable: ClassVar[bool] = False

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def __call__(self, images: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        return torch.tensor(self.scores)


# --- Pairs ------------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("rewards", "margin", "pairs"),
    [
        ([0.2, 0.9, 0.1, 0.5], 0.0, [(1, 2)]),
        ([NAN, 0.3, INF, 0.1], 0.0, [(1, 3)]),
        ([NAN, 0.3, NAN, -INF], 0.0, []),  # one finite reward
        ([NAN] * 4, 0.0, []),
        ([0.3] * 4, 0.0, []),
        ([0.3, 0.3 + 1e-7, 0.3, 0.3], 0.0, []),  # equal up to rounding
        ([0.25, 0.75, 0.5, 0.5], 0.5, []),
        ([0.25, 0.75, 0.5, 0.5], 0.49, [(1, 0)]),
    ],
)
def test_a_pair_is_the_best_and_the_worst_of_a_group(
    rewards: list[float], margin: float, pairs: list[tuple[int, int]]
) -> None:
    before = [0.1, 0.2]  # another group, with a pair unless the margin is large
    found = best_and_worst(torch.tensor(before + rewards), torch.tensor([7, 7, 3, 3, 3, 3]), margin)
    others = [(1, 0)] if margin < 0.1 else []
    expected = [*others, *((winner + 2, loser + 2) for winner, loser in pairs)]
    assert sorted(zip(*(rows.tolist() for rows in found), strict=True)) == expected


@pytest.mark.parametrize(("form", "steps"), FORMS)
def test_only_pairs_have_a_loss_and_reach_the_network(form: Any, steps: int) -> None:
    rewards = Listed([NAN, 0.1, 0.9, 0.2, 0.5, NAN, NAN, NAN, 0.3, 0.3, 0.3, 0.3, 0.4, 0.3, 0.6, 0.5])
    backend = at_start(Watched)
    term, draw, _ = ask(DPO(form=form), backend, rewards=rewards, steps=steps)
    assert term.valid is not None and term.valid.nonzero().flatten().tolist() == [2, 14]
    assert torch.equal(term.loss != 0, term.valid)
    assert term.metrics["gap"][term.valid].tolist() == pytest.approx([0.8, 0.3])  # type: ignore[index]
    assert len(backend.asked.x_t) == 4
    assert 0 < grad_norm(term.loss, backend) < INF
    if form == "transition":
        assert torch.equal(backend.asked.x_t, draw.rollout.x_t[-3][[2, 14, 1, 13]])


def test_without_a_pair_a_step_is_that_of_matching_alone() -> None:
    settings: dict[str, Any] = {"group_size": 4, "batch": 8}
    alone = step_of(trainer(prepared(DoubleToy), **settings))
    running = trainer(at_start(), objectives=[DPO()], rewards=Constant(), **settings)
    before = flat(state(running))
    line = running.train_step()
    assert torch.equal(flat(state(running)) - before, alone)
    assert (line["dpo/coverage"], line["loss/dpo"]) == (0, 0)
    assert "dpo/accuracy" not in line


@pytest.mark.parametrize(("form", "steps"), FORMS)
def test_a_step_does_not_depend_on_the_micro_batches(form: Any, steps: int) -> None:
    whole, parts = (
        step_of(
            trainer(
                prepared(DoubleToy, roles=ROLES),
                objectives=[DPO(beta=2.0, form=form)],
                rewards=Plain({"mode 1": NAN}),  # so that one micro-batch has no pair
                batch=16,
                micro_batch=size,
                group_size=4,
                steps=steps,
                dmd_weight=0.0,
            )
        )
        for size in (16, 4)
    )
    assert whole.norm() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


# --- Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "steps"), FORMS)
def test_the_loss_starts_at_log_two(form: Any, steps: int) -> None:
    backend = at_start()
    backend.residuals["reference"].requires_grad_(True)
    term, _, _ = ask(DPO(form=form), backend, steps=steps)
    assert term.valid is not None and term.valid.sum() == 4
    torch.testing.assert_close(term.loss[term.valid], torch.full((4,), LN2, dtype=torch.float64), rtol=0, atol=1e-15)
    for name in ("logit", "accuracy"):
        assert torch.as_tensor(term.metrics[name]).abs().max() == 0
    assert grad_norm(term.loss, backend) > 1e-3
    term.loss.sum().backward()
    assert all(p.grad is None for p in backend.parameters("reference").values())


def image_errors(asked: Prediction, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output minus target, and the noise that x_t is made of if x is its image."""
    alpha, sigma = (expand(of(asked.t), x) for of in (asked.path.alpha, asked.path.sigma))
    noise = (asked.x_t - alpha * x) / sigma
    return asked.value - (noise - x if asked.kind == "velocity" else noise), noise


def test_gradient_of_the_initial_loss_with_respect_to_the_errors() -> None:
    """beta D / 4 for the winner's mean error, minus that for the loser's; beta / 2 (output - target) for an output."""
    backend, beta = at_start(Watched), 3.0
    backend.nudge = torch.zeros(8, 2, dtype=torch.float64, requires_grad=True)
    term, draw, _ = ask(DPO(beta=beta, form="diffusion"), backend)
    (grad,) = torch.autograd.grad(term.loss.sum(), backend.nudge)
    assert term.valid is not None
    winners = term.valid.nonzero().flatten()
    losers = torch.as_tensor(Plain()(backend.decode(draw.rollout.final), PROMPTS * 4)).view(4, 4).argmin(1)
    losers = losers + 4 * torch.arange(4)
    error, _ = image_errors(backend.asked, draw.rollout.final[torch.cat([winners, losers])])
    size = 2
    of_mean_error = torch.tensor([1.0] * 4 + [-1.0] * 4).double()[:, None] * beta * size / 4
    torch.testing.assert_close(grad, of_mean_error * 2 * error / size, rtol=0, atol=1e-6)  # noise is float32

    better = 0.1 * torch.cat([error[:4], torch.zeros_like(error[4:])]).detach()
    for nudge, below in ((-better, True), (better, False)):
        backend.nudge = nudge
        loss = ask(DPO(beta=beta, form="diffusion"), backend)[0].loss[winners]
        assert bool((loss < LN2).all()) == below
        assert bool((loss > LN2).all()) != below


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("steps", [2, 4])
def test_transition_is_diffusion_dpo_of_the_transitions_errors(steps: int, eta: float) -> None:
    """The loss of eq. 14 with e = |x' - mu|^2 / std^2 in the mean over elements: their sum over the steps, or each."""
    backend, beta = prepared(DoubleToy, roles=ROLES), 0.3
    apart: Any = ask(DPO(beta=beta, each_transition=True), backend, steps=steps, eta=eta)[0]
    term, draw, ctx = ask(DPO(beta=beta), backend, steps=steps, eta=eta)
    assert term.valid is not None
    reward = ctx.rewards.total(ctx.scores(draw.rollout)).view(4, 4)  # type: ignore[union-attr]
    winners, losers = (of(1) + 4 * torch.arange(4) for of in (reward.argmax, reward.argmin))
    rollout, errors = draw.rollout, {}
    for role, network in (("student", backend.student), ("reference", backend.reference)):
        errors[role] = torch.zeros(steps - 1, 16, dtype=torch.float64)
        for i in range(steps - 1):
            prediction = network(rollout.x_t[i], rollout.t[i].expand(16), draw.cond)
            mean, std = ctx.sampler.moments(i, prediction)
            errors[role][i] = ((rollout.x_t[i + 1] - mean) ** 2 / std**2).mean(1).detach()
    worse = errors["student"] - errors["reference"]
    z = -0.5 * 2 * (worse[:, winners] - worse[:, losers])
    expected = -logsigmoid(beta * z.sum(0))
    assert term.valid.nonzero().flatten().tolist() == winners.tolist()
    assert (expected - LN2).abs().min() > 1e-3
    torch.testing.assert_close(term.loss[winners], expected, rtol=0, atol=1e-6)
    terms = [each.loss[winners] for each in apart]
    torch.testing.assert_close(torch.stack(terms), -logsigmoid(beta * z) / (steps - 1), rtol=0, atol=1e-6)


def test_transitions_that_are_compared_apart_have_a_graph_each() -> None:
    peaks = []
    for objective in (DPO(), DPO(each_transition=True)):
        running = trainer(at_start(), objectives=[objective], batch=16, group_size=4, rewards=Plain())
        ctx, draw = first_draw(running)
        (term,) = running.objectives.terms
        with Meter(running.backend) as meter:
            running.objectives.gradient_of(term, draw, ctx)
        peaks.append(meter.peak)
    assert peaks[1] < 0.4 * peaks[0]  # of three transitions


@pytest.mark.parametrize("steps", [4, 1])
@pytest.mark.parametrize("cls", [Watched, WatchedEps])
def test_diffusion_is_equation_14_at_the_students_own_times(cls: Any, steps: int) -> None:
    backend, beta = prepared(cls, roles=ROLES), 0.7
    term, draw, ctx = ask(DPO(beta=beta, form="diffusion"), backend, steps=steps, batch=64)
    assert term.valid is not None
    winners, asked = term.valid.nonzero().flatten(), backend.asked
    reward = ctx.rewards.total(ctx.scores(draw.rollout)).view(16, 4)  # type: ignore[union-attr]
    rows = torch.cat([winners, reward.argmin(1) + 4 * torch.arange(16)])
    x = draw.rollout.final[rows]

    assert torch.equal(asked.t[:16], asked.t[16:])
    assert torch.equal(asked.t.unique(), ctx.sampler.t[:-1].flip(0))
    start = asked.t == 1
    _, noise = image_errors(asked, x)
    torch.testing.assert_close(noise[:16][~start[:16]], noise[16:][~start[16:]], rtol=0, atol=1e-4)
    own = draw.rollout.x_t[0, rows] if steps > 1 else ctx.random.normal("dpo/eps", draw.sample[winners.repeat(2)], (2,))
    torch.testing.assert_close(asked.x_t[start].float(), own[start].float(), rtol=0, atol=0)

    with torch.no_grad():
        cond = backend.encode([draw.cond.prompts[i] for i in winners] * 2)
        reference = backend.reference(asked.x_t, asked.t, cond)
    errors = [(p.x0 - x if steps == 1 else image_errors(p, x)[0]).square().mean(1) for p in (asked, reference)]
    worse = (errors[0] - errors[1]).detach()
    z = -0.5 * 2 * (worse[:16] - worse[16:])
    assert z.abs().min() > 0  # also from pure noise, and for an epsilon model
    torch.testing.assert_close(term.loss[winners].detach(), -logsigmoid(beta * z), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(term.metrics["logit"][winners], (beta * z).abs(), rtol=1e-3, atol=1e-5)  # type: ignore[index]
    assert torch.equal(term.metrics["accuracy"][winners], (z > 0).float())  # type: ignore[index]


def test_each_update_on_a_rollout_draws_its_own_noise() -> None:
    backend = at_start(Watched)
    objective = DPO(form="diffusion")
    _, draw, ctx = ask(objective, backend)
    first = backend.asked.x_t
    objective(draw, ctx)
    assert torch.equal(backend.asked.x_t, first)
    ctx.iteration = 1
    before = backend.asked.t
    objective(replace(draw, iteration=1), ctx)
    both_start = (before == 1) & (backend.asked.t == 1)  # from their own noise each time
    assert not torch.isclose(backend.asked.x_t, first)[~both_start].any()


def test_losses_are_those_of_trl() -> None:
    z, beta = torch.tensor([-30.0, -2.0, 0.0, 0.5, 7.0], dtype=torch.float64), 0.4

    def sigmoid(u: Tensor) -> Tensor:
        return 1 / (1 + (-u).exp())

    expected = [
        (DPO(beta), -sigmoid(beta * z).log()),
        (DPO(beta, label_smoothing=0.2), -0.8 * sigmoid(beta * z).log() - 0.2 * sigmoid(-beta * z).log()),
        (DPO(beta, "hinge"), torch.tensor([13.0, 1.8, 1.0, 0.8, 0.0], dtype=torch.float64)),
        (DPO(beta, "ipo"), (z - 1.25) ** 2),
    ]
    for objective, wanted in expected:
        torch.testing.assert_close(objective.loss(z), wanted, rtol=1e-9, atol=1e-9)


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": 0.0}, "dpo: beta must be above 0, not 0.0"),
        ({"beta": -1.0}, "beta must be above 0"),
        ({"beta": NAN}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing works only with loss_type sigmoid"),
        ({"margin": -0.1}, "margin must be at least 0"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be at least 1"),
        ({"ref_model_sync_steps": 8}, "ref_model_sync_steps is not read without sync_ref_model"),
        ({"pairs": "x.jsonl", "margin": 0.1}, "margin is that of rewards"),
        ({"each_transition": True, "form": "diffusion"}, "each_transition is of the form transition, without pairs"),
        ({"each_transition": True, "pairs": "x.jsonl"}, "each_transition is of the form transition, without pairs"),
    ],
)
def test_refuses_settings(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DPO(**options)


@pytest.mark.parametrize("sampler", [{"steps": 1}, {"eta": 0.0}])
def test_form_follows_the_sampler(sampler: dict[str, Any]) -> None:
    assert DPO(form="transition").needs.stochastic_steps == 1  # so that the command line refuses it at once
    ctx, _ = first_draw(trainer(at_start(), **sampler))
    assert DPO().form_in(ctx) == "diffusion"
    ctx, _ = first_draw(trainer(at_start(), steps=2))
    assert DPO().form_in(ctx) == "transition"
    assert DPO(form="diffusion").form_in(ctx) == "diffusion"


@pytest.mark.parametrize("form", [None, "diffusion"])
def test_keeps_the_contract_of_objectives(form: Any) -> None:
    check_objective(lambda: DPO(form=form))


def test_the_reference_follows_where_asked() -> None:
    def equal(objective: DPO) -> list[bool]:
        running = trainer(at_start(), batch=4, group_size=2, objectives=[objective], rewards=Plain())
        found = []
        for _ in range(4):
            running.train_step()
            found.append(torch.equal(flat(state(running)), flat(state(running, "reference"))))
        return found

    assert equal(DPO(sync_ref_model=True, ref_model_sync_steps=2)) == [False, True, False, True]
    assert equal(DPO()) == [False] * 4


# --- Learning ---------------------------------------------------------------------------------------------------------


def rewards_of(cls: type[ToyBackend], steps: int, objectives: Sequence[DPO]) -> Tensor:
    """Mean reward of each of 60 joint updates."""
    running = trainer(
        at_start(cls),
        batch=32,
        group_size=4,
        steps=steps,
        objectives=objectives,
        rewards=Plain(),
        rl_weight=3.0,
        optimize=steadily,
    )
    found = []
    for _ in range(60):
        running.train_step(noted=True)
        found.append(running.reward_metrics()["reward/total"])
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("cls", "form", "steps", "beta"),
    [
        (ToyBackend, "transition", 4, 1.0),
        (ToyBackend, "diffusion", 4, 1.0),
        (ToyBackend, "diffusion", 1, 1.0),
        (EpsToy, "transition", 4, 1.0),
        (EpsToy, "diffusion", 4, 30.0),  # the errors of an epsilon model hardly depend on the image where noise is high
        (EpsToy, "diffusion", 1, 1.0),
    ],
)
def test_raises_the_reward_along_with_matching(cls: type[ToyBackend], form: Any, steps: int, beta: float) -> None:
    found, alone = rewards_of(cls, steps, [DPO(beta, form=form)]), rewards_of(cls, steps, [])
    assert found[-10:].mean() > found[:3].mean() + 0.01
    assert found[-10:].mean() > alone[-10:].mean() + 0.03


# --- Pairs from a file ------------------------------------------------------------------------------------------------


def write_pairs(folder: Path, gap: float = 1.0) -> str:
    """A file with one pair for each prompt: points on the right are chosen, on the left rejected."""
    lines = []
    for name, sign in (("chosen", 1), ("rejected", -1)):
        images = to_pil(ToyBackend.decode(None, CENTRES + torch.tensor([sign * gap, 0.0])))  # type: ignore[arg-type]
        for image, prompt in zip(images, PROMPTS, strict=True):
            (folder / name).mkdir(exist_ok=True)
            image.save(folder / name / f"{prompt}.png")
    for prompt in PROMPTS:
        lines.append({"prompt": prompt, "chosen": f"chosen/{prompt}.png", "rejected": f"rejected/{prompt}.png"})
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return str(file)


def test_pairs_move_the_student_towards_the_chosen_images(tmp_path: Path) -> None:
    objective = DPO(beta=1.0, pairs=write_pairs(tmp_path))
    assert objective.needs.group_size == 1 and not objective.needs.reward

    def right(objectives: Sequence[DPO]) -> float:
        running = trainer(at_start(ToyBackend), batch=16, objectives=objectives, optimize=steadily)
        for _ in range(60):
            line = running.train_step()
        if objectives:
            assert line["dpo/coverage"] == 0.5
            assert line["dpo/accuracy"] > 0.5
        return running.rollouts.whole(running.context(1)).final[:, 0].mean().item()

    assert right([objective]) > right([]) + 0.1


def test_a_stored_pair_belongs_to_every_second_image_of_the_global_batch(tmp_path: Path) -> None:
    objective = DPO(beta=1.0, pairs=write_pairs(tmp_path, gap=0.5))
    backend = prepared(Watched, roles=ROLES)
    ctx, draw = first_draw(trainer(backend, batch=8, objectives=[objective]))
    whole = objective(draw, ctx)
    assert whole.valid is not None and whole.valid.tolist() == [True, False] * 4
    index = ctx.random.integers("dpo/pair", draw.sample[::2], 4).tolist()
    shift = torch.tensor([0.5, 0.0])
    _, noise = image_errors(backend.asked, torch.cat([CENTRES[index] + shift, CENTRES[index] - shift]))
    start = backend.asked.t == 1
    torch.testing.assert_close(noise[:4][~start[:4]], noise[4:][~start[4:]], rtol=0, atol=0.2)  # pixels of 8 bits
    for size in (1, 3):
        terms = [objective(part, ctx) for part in draw.split(size)]
        torch.testing.assert_close(torch.cat([term.loss for term in terms]), whole.loss)
        assert torch.equal(torch.cat([term.valid for term in terms if term.valid is not None]), whole.valid)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "mode 0", "chosen": "a.png", "rejected": "b.png"}', "no such image: .*b.png"),
        ('{"prompt": "mode 0", "chosen": "a.png"}', "'rejected' is missing"),
        ('{"prompt": " ", "chosen": "a.png", "rejected": "a.png"}', "'prompt' is missing, empty or no string"),
        ('{"prompt": 3, "chosen": "a.png", "rejected": "a.png"}', "'prompt' is missing, empty or no string"),
        ('{"prompt": "mode 0", ', r"no JSON: .* \(at character"),
        ('["mode 0", "a.png", "a.png"]', "not an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    good = '{"prompt": "mode 0", "chosen": "a.png", "rejected": "a.png"}'
    (tmp_path / "a.png").touch()
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(ConfigError, match=rf"^dpo: {file} line 3: {says}[^\n]*$"):
        DPO(pairs=str(file))


def test_a_file_of_pairs_is_refused_before_training(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    with pytest.raises(ConfigError, match="no such file of pairs: "):
        DPO(pairs=str(file))
    file.write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no pair"):
        DPO(pairs=str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        DPO(pairs=str(file))
    with pytest.raises(ConfigError, match="form transition cannot use pairs"):
        DPO(pairs=write_pairs(tmp_path), form="transition")


class Finer(ToyBackend):
    """A latent as wide as the image."""

    def encode_images(self, images: Tensor) -> Tensor:
        return images[:, 0, 0]


def test_images_of_another_size_or_none_at_all_are_named(tmp_path: Path) -> None:
    objective = DPO(pairs=write_pairs(tmp_path))
    with pytest.raises(ConfigError, match=r"chosen/mode \d.png becomes a latent of \[4\], .* \[2\].* resolution"):
        trainer(at_start(Finer), objectives=[objective]).train_step()
    for file in (tmp_path / "chosen").iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"chosen/mode \d.png cannot be read: "):
        trainer(at_start(ToyBackend), objectives=[objective]).train_step()


def test_images_are_looked_at_before_the_first_update(tmp_path: Path) -> None:
    objective = DPO(pairs=write_pairs(tmp_path))
    for content, said in ((np.zeros((4, 4), np.uint16), "has more than 8 bits per channel"), (None, "is no image")):
        file = tmp_path / "rejected" / "mode 3.png"
        file.write_bytes(b"") if content is None else Image.fromarray(content).save(file)
        with pytest.raises(ConfigError, match=f"rejected/mode 3.png {said}"):
            objective.setup(trainer(at_start(), objectives=[]).context(0))
