"""What a run measures, and how it is called and shown."""

import re
from dataclasses import dataclass
from typing import Any

from dmdr.settings.parse import Settings


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        label: In words.
        higher: Whether higher is better; None where neither is.
    """

    label: str
    higher: bool | None = True
    digits: int = 3


METRICS = {
    "reward/total": Metric("trained reward"),
    "eval_reward/total": Metric("held-out reward"),
    "reward_gap": Metric("trained minus held-out reward", None),
    "frechet_distance": Metric("Frechet distance", False, 1),
    "accuracy": Metric("class accuracy"),
    "precision": Metric("precision"),
    "recall": Metric("recall"),
    "inception_score": Metric("inception score", digits=2),
}
KINDS = {"reward": "trained", "eval_reward": "held-out"}


def metric(name: str) -> Metric:
    """How a metric is shown; rewards have the names that the run gave them.

    Raises:
        KeyError: No run measures it.
    """
    kind, _, reward = name.partition("/")
    if name not in METRICS and reward:
        return Metric(f"{KINDS[kind]} {short(reward)}")
    return METRICS[name]


def measured(settings: Settings) -> list[str]:
    """The metrics of a run: its rewards, and what a model's judge may say."""
    rewards = {kind: [chosen.label for chosen in settings.of(f"{kind}s")] for kind in KINDS}
    names = [f"{kind}/{name}" for kind, found in rewards.items() if found for name in ("total", *found)]
    gap = ["reward_gap"] if all(rewards.values()) else []
    return names + gap + [name for name in METRICS if "reward" not in name]


def short(value: Any) -> str:
    """A setting's value as text, of a plugin's file its stem alone: `0.5*/home/me/best.py:Best` is `0.5*best:Best`."""
    return re.sub(r"""(?:[^'"+*]*[/\\])?([^'"+*/\\]+)\.py:""", r"\1:", str(value))
