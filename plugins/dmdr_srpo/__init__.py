"""SRPO: a reward relative to itself, between two texts that differ in a control word only.

Shen et al. 2025 (arXiv 2509.06942): what a reward model says of "Realistic. a cat" less what it says of "Oil. a cat" is
a direction of style; its biases, which both texts share, cancel. For few-step students as in DMDR (arXiv 2511.13649),
where every student step answers with a clean image that can be scored as it is.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmdr.errors import ConfigError
from dmdr.paths import Prediction, add_noise, expand
from dmdr.protocols import Context, FeatureReward, Needs
from dmdr.rewards import sharing
from dmdr.types import Draw, Term

Texts = tuple[list[str], list[str]]  # positive and negative, B each


@dataclass
class SRPO:
    """Loss per sample: -sum_k w_k s_k, or with a hinge sum_k w_k relu(hinge - s_k), with

        s = <f_image, (1 + k) f_text(positive) - f_text(negative)>

    in the features of each reward, of the image decoded from x0. Both words are drawn anew for each sample.
    Its strength beside matching depends on the reward's own scale, and little on the latent size.

    Attributes:
        k: Share of the plain reward of the positive text, at least 0; the rest of s is the difference of both.
        positive: Control words of what is wanted. An empty word means the prompt alone.
        negative: Control words of what is not.
        template: How a word and the prompt make a text, with {word} and {prompt}.
        steps: Student step that is trained: "any" (the drawn one), "last" (what users see), or an index.
        hinge: Margin above which a score is good enough and has no gradient; unset means no hinge. Scores are near 0,
            so that the published margin 0.7 is out of reach: with it the loss is the plain negative score.
        direct_align: Score a short ODE step of the noised image, with the known noise taken away again, instead of the
            student's answer (Direct-Align). Most of these times are off the student's steps and foreign to a few-step
            student, and gradients are smaller: an option, not the default.
        span: Length of that step as a share of its time, above 0 and below 1.
    """

    k: float = 0.1
    positive: list[str] = field(default_factory=lambda: ["Natural-lighting", "Detailed", "Realistic"])
    negative: list[str] = field(default_factory=lambda: ["Painting", "CG Render", "Oil"])
    template: str = "{word}. {prompt}"
    steps: str = "any"
    hinge: float | None = None
    direct_align: bool = False
    span: float = 0.1

    def __post_init__(self) -> None:
        if not self.k >= 0:
            raise ConfigError(f"srpo: k must be at least 0, not {self.k}")
        for name in ("positive", "negative"):
            if not getattr(self, name):
                raise ConfigError(f'srpo: {name} must name at least one word; "" means the prompt alone')
        if set(re.findall(r"{.*?}", self.template)) != {"{word}", "{prompt}"}:
            raise ConfigError(f"srpo: template must hold {{word}} and {{prompt}} and no other, not '{self.template}'")
        if self.steps not in ("any", "last") and not self.steps.isdecimal():
            raise ConfigError(f"srpo: steps must be 'any', 'last' or a step index, not '{self.steps}'")
        if not 0 < self.span < 1:
            raise ConfigError(f"srpo: span must be above 0 and below 1, not {self.span}")

    @property
    def needs(self) -> Needs:
        steps: Any = (int(self.steps),) if self.steps.isdecimal() else self.steps
        return Needs(reward_grad=True, text_features=True, steps=steps, finished=self.direct_align)

    def __call__(self, draw: Draw, ctx: Context) -> Term | Iterator[Term]:
        positive = self._texts(self.positive, "srpo/positive", draw, ctx)
        negative = self._texts(self.negative, "srpo/negative", draw, ctx)
        if self.direct_align:
            eps = ctx.random.normal("srpo/eps", draw.sample, tuple(draw.x0.shape[1:]))
            return self._aligned(draw, ctx, eps, (positive, negative))
        return self._scored(draw.leaf, ctx, (positive, negative))

    def _texts(self, words: Sequence[str], purpose: str, draw: Draw, ctx: Context) -> list[str]:
        """The prompts, each with a word of its own."""
        drawn = [words[i] for i in ctx.random.integers(purpose, draw.sample, len(words)).tolist()]
        texts = [self.template.replace("{word}", word) if word else "{prompt}" for word in drawn]
        return [text.replace("{prompt}", prompt) for text, prompt in zip(texts, draw.cond.prompts, strict=True)]

    @sharing()
    def _scored(self, x0: Tensor, ctx: Context, texts: Texts) -> Term:
        """How much latents [B, *latent] look like the one text and unlike the other."""
        images = ctx.backend.decode(x0)
        losses, scores, preferences = [], [], []
        for weight, reward in ctx.rewards.parts.values():
            assert isinstance(reward, FeatureReward)  # needs.text_features
            image, positive, negative = reward.image_features(images), *map(reward.text_features, texts)
            score = (image * ((1 + self.k) * positive - negative)).sum(-1)
            losses.append(weight * (-score if self.hinge is None else (self.hinge - score).relu()))
            scores.append(weight * score.detach())
            preferences.append(weight * (image.detach() * (positive - negative)).sum(-1))
        total = torch.stack(scores).sum(0)
        metrics = {"score": total, "preference": torch.stack(preferences).sum(0)}
        return Term(torch.stack(losses).sum(0), total.isfinite(), metrics=metrics)

    def _aligned(self, draw: Draw, ctx: Context, eps: Tensor, texts: Texts) -> Iterator[Term]:
        """Direct-Align: two short ODE steps of the finished latents under known noise, half a loss each.

        With end = t (1 - span), one denoises from t down to `end`, the other inverts from end (1 - span) up to `end`.
        The inversion answers to the student's error with the opposite sign (see `recovered`) and is scored by swapped
        texts: both push the student the same way. Both end below t, where alpha is above 0 even for t = 1 (at least
        `span` on rectified flow).
        """
        end = draw.t * (1 - self.span)
        denoised = self._stepped(draw, ctx, eps, draw.t, end, texts)
        yield denoised
        inverted = self._stepped(draw, ctx, eps, end * (1 - self.span), end, texts[::-1])
        assert denoised.valid is not None and inverted.valid is not None
        # Under swapped texts the metrics mean the opposite: only the first pass logs them.
        yield replace(inverted, valid=denoised.valid & inverted.valid, metrics={})

    def _stepped(self, draw: Draw, ctx: Context, eps: Tensor, start: Tensor, end: Tensor, texts: Texts) -> Term:
        """Half the loss of the latents that the student's step from time `start` to `end`, each [B], recovers.

        The gradient is taken at the recovered latents first, for the price of one more prediction: the graphs of reward
        and student are never alive together, and what is not finite ends there, before it can reach a parameter.
        """
        x_t = add_noise(ctx.backend.path, draw.rollout.final, eps, start)
        with torch.no_grad():
            x0 = recovered(ctx.backend.student(x_t, start, draw.cond), eps, end)
        term = self._scored(x0.requires_grad_(), ctx, texts)
        assert term.valid is not None
        grad = ctx.grad(term.loss.sum(), x0)
        grad = torch.where(term.valid.view(-1, *[1] * (grad.ndim - 1)), grad, 0.0)
        pull = (recovered(ctx.backend.student(x_t, start, draw.cond), eps, end) * grad).flatten(1).sum(1)
        return replace(term, loss=(term.loss.detach() + pull - pull.detach()) / 2)  # its value, with pull's gradient


def recovered(prediction: Prediction, eps: Tensor, end: Tensor) -> Tensor:
    """x0 after the prediction's ODE step to time `end` [B], by the known noise `eps` of its x_t = alpha x0 + sigma eps:

        (alpha x0_hat + sigma eps_hat - sigma eps) / alpha,    alpha and sigma at `end`

    That is x0 + (1 - r) (x0_hat - x0), with r the ratio of sigma / alpha at `end` to that at t: exact for an exact
    prediction however noisy x_t is, and of the opposite sign in its error where `end` is noisier than t. On rectified
    flow d x0 / d velocity = (end - t) / (1 - end).
    """
    noise = expand(prediction.path.sigma(end) / prediction.path.alpha(end), prediction.x_t)
    return prediction.x0 + noise * (prediction.eps - eps)
