"""Names of metrics: what each means, which way is better, and how it is called in the log."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric, or a group of them that begin alike.

    Attributes:
        title: For people.
        meaning: In a sentence or two.
        better: "higher", "lower", or "" where neither is.
    """

    title: str
    meaning: str
    better: str = ""


# By name, or by what comes before the slash.
METRICS = {
    "accuracy": Metric(
        "Accuracy", "Share of images in which an independent judge sees what the prompt asks for.", "higher"
    ),
    "frechet_distance": Metric(
        "Frechet distance",
        "Distance between Gaussians fitted to the judge's features of real images and of samples. Its noise depends on "
        "the number of samples; compare columns of the same number only.",
        "lower",
    ),
    "precision": Metric(
        "Precision",
        "Share of samples that lie among real images, by balls that reach to the third nearest neighbour.",
        "higher",
    ),
    "recall": Metric(
        "Recall",
        "Share of real images that lie among samples, by balls that reach to the third nearest neighbour.",
        "higher",
    ),
    "inception_score": Metric(
        "Inception score",
        "Of the judge, from 1 to the number of classes. It is high if the judge is sure of each image and sees all "
        "classes equally often.",
        "higher",
    ),
    "reward": Metric(
        "Rewards",
        "Mean of each reward as its model returns it; total is the weighted sum that was trained on.",
        "higher",
    ),
    "eval_reward": Metric(
        "Held-out rewards", "Rewards that only measure: the student was not trained on them.", "higher"
    ),
    "guard": Metric(
        "Beside stage 1",
        "Beside images of the same prompts and noise at the end of stage 1: the gain of the trained "
        "and of the held-out rewards (reward_gain, held_out_gain), how much images of one prompt differ, over how much "
        "they did (variety), and the share of the earlier images that lie among the present ones (recall).",
    ),
    "loss": Metric("Losses", "Of the fake score, of distribution matching and of each objective."),
    "grad_norm": Metric("Gradient norms", "Of each trained role, before clipping."),
    "rl_ratio": Metric(
        "RL beside matching",
        "Norm of each objective's gradient, with its weight, over that of the matching gradient, in the student's "
        "parameters. Far below 0.1 RL does next to nothing; far above 1 nothing holds it back.",
    ),
    "reward_weighted": Metric("Weighted rewards", "Each reward times its weight in the sum."),
    "tilt": Metric("RT-DM", "Effective sample size, greatest weight and clipped share of the samples' weights."),
    "dyna": Metric("DynaDG", "Share of the fake score's adapter in the teacher."),
    "unscored": Metric(
        "Images without a score",
        "How many images each reward left without a finite score in the updates since the line before, of all that it "
        "was asked about.",
    ),
    "bad_steps": Metric(
        "Bad steps",
        "Updates in a row of which a part was skipped, since a loss or a gradient was not finite. Each has a line; the "
        "run's messages say why.",
    ),
    "loss_scale": Metric("Loss scale", "Of float16; it falls with each update that is skipped for an overflow."),
    "learning_rate": Metric("Learning rates", "Of each trained role, for the next update."),
    "time": Metric(
        "Shares of time",
        "What the time since the line before went into, of the main process: rollout, fake (score), direction (of "
        "matching), reward, student, communication, evaluation and other. From 0 to 1; they add up to 1.",
    ),
    "seconds": Metric("Seconds", "Of a training step; the mean since the line before."),
    "samples_per_second": Metric(
        "Samples per second",
        "Images that all processes rolled out, those for the fake score alone included, over the seconds of the steps.",
    ),
    "seconds_left": Metric("Seconds left", "Until the last update, if all go on as those of this stage so far."),
    "peak_memory_gib": Metric(
        "Peak memory",
        "Of the main process so far, in GiB: of tensors on a GPU, of its resident set on a CPU.",
    ),
}
TIMES = {  # what follows "time/", in words
    "rollout": "the student's trajectories",
    "fake": "updates of the fake score",
    "direction": "the direction of distribution matching",
    "reward": "decoding and scoring images",
    "student": "the student's update and the gradient of RL",
    "communication": "communication between processes",
    "evaluation": "evaluations and image grids",
    "other": "the log and checkpoints",
}
CURVES = ("loss", "reward", "eval_reward", "rl_ratio", "grad_norm")  # groups that a report shows open, in this order


def metric(name: str) -> Metric | None:
    """The metric of this name, or the group that it belongs to."""
    return METRICS.get(name) or METRICS.get(name.partition("/")[0])


def meanings(names: Iterable[str]) -> list[Metric]:
    """Each metric that the names speak of, once, in the order of the table."""
    there = {id(found) for name in names if (found := metric(name))}
    return [each for each in METRICS.values() if id(each) in there]


def logged(name: str) -> str:
    """How an evaluation's metric is called in the log, where `reward/...` is of the training batch."""
    return name if name.startswith("eval_reward/") else f"eval/{name.removeprefix('reward/')}"
