"""Whether the parts of a run fit together: what objectives need, and which columns rewards read."""

from collections.abc import Sequence
from typing import Any

from dmdr.errors import ConfigError
from dmdr.prompts import Row
from dmdr.protocols import Needs
from dmdr.rewards import require_columns
from dmdr.settings.chosen import Chosen
from dmdr.settings.fields import Config


def needs_of(who: str, part: Any) -> Needs:
    """What an objective or a sample weight declares; `who` is how users named it.

    Raises:
        ConfigError: If it is no `Needs`, or holds what nobody could meet.
    """
    try:
        needs = part.needs
    except (TypeError, ValueError) as error:  # of Needs(...)
        raise ConfigError(f"{who}: {error}") from error
    if not isinstance(needs, Needs):
        raise ConfigError(f"{who}: needs must be dmdr.protocols.Needs; write `needs` as a @property that returns it")
    return needs


def check_no_objective(who: str, needs: Needs) -> None:
    """Refuse needs of a matching or a sample weight that a run meets for objectives alone.

    Raises:
        ConfigError: Names them.
    """
    usual = Needs()
    names = ("roles", "log_prob", "steps", "updates_per_rollout", "matching", "parts", "reward_grad", "text_features")
    if found := [name for name in names if getattr(needs, name) != getattr(usual, name)]:
        raise ConfigError(f"{who}: needs of {', '.join(found)} are for objectives; leave them out")


def check_needs(
    who: str,
    needs: Needs,
    config: Config,
    rewards: Sequence[Chosen],
    matching: Chosen,
    *,
    num_inference_steps: int,
    batch: int,
) -> None:
    """Refuse a part whose declared needs the run does not meet.

    Args:
        who: How users named it.
        num_inference_steps: Steps of the student.
        batch: Images of an update, of all processes.

    Raises:
        ConfigError: Names the flag that would meet them.
    """
    last = num_inference_steps - 1
    if needs.reward and not rewards:
        raise ConfigError(f"{who} reads a reward: name one with --reward")
    for reward in rewards:
        if needs.reward_grad and not getattr(reward.cls, "differentiable", False):
            raise ConfigError(f"{who} needs the gradient of the reward, and '{reward.title}' is not differentiable")
        if needs.text_features and not hasattr(reward.cls, "text_features"):
            raise ConfigError(f"{who} needs a reward with text features, and '{reward.title}' has none")
    if needs.matching and config.dmd_weight == 0:
        raise ConfigError(f"{who} reads the matching gradient: it needs --dmd_weight above 0")
    for part in needs.parts:
        if part not in getattr(matching.cls, "parts", ()):
            raise ConfigError(f"{who} reads the part '{part}' of directions, and --matching {matching.title} has none")
    if "ca" in needs.parts and config.guidance_scale == 1:
        raise ConfigError(f"{who} reads what guidance adds to the matching gradient: it needs --guidance_scale above 1")
    if batch < needs.batch_size:
        raise ConfigError(
            f"{who} compares the images of a batch: it needs --per_device_train_batch_size of at least "
            f"{needs.batch_size} in all processes together, not {batch}"
        )
    if config.num_generations < needs.group_size:
        raise ConfigError(f"{who} needs --num_generations of at least {needs.group_size}, not {config.num_generations}")
    if num_inference_steps < needs.student_steps:
        raise ConfigError(f"{who} needs --num_inference_steps of at least {needs.student_steps}")
    noisy = max(needs.stochastic_steps, int(needs.steps == "stochastic" or needs.log_prob))
    if noisy and (last < noisy or config.eta == 0):
        raise ConfigError(
            f"{who} acts on stochastic steps, and the last is deterministic: it needs --num_inference_steps of at "
            f"least {noisy + 1} and --eta above 0"
        )
    if isinstance(needs.steps, tuple) and not all(0 <= step <= last for step in needs.steps):
        raise ConfigError(f"{who} acts on step {max(needs.steps)}, but the student's last step is {last}")


def check_columns(chosen: Sequence[Chosen], rows: Sequence[Row]) -> None:
    """Refuse rewards that need a column which the prompt rows lack.

    Raises:
        ConfigError: Names the reward, the column and the columns that are there.
    """
    there = [name for name in rows[0] if name != "prompt"]
    for reward in chosen:
        require_columns(reward.title, reward.cls, there)
