"""Guidance that is weighted by the reward: Decoupled DMD's other half as a policy gradient."""

from dataclasses import dataclass

from dmdr.groups import Aggregation, ScaleRewards, advantages
from dmdr.paths import Prediction, expand
from dmdr.protocols import Context, Needs
from dmdr.types import Draw, Term


@dataclass
class CAAdvantage:
    """The guidance's part of the matching gradient, `ca`, times the advantage A of each image within its group:

        gradient at the matching's anchor = A ca

    Decoupled DMD (arXiv 2511.22677) splits the direction into `dm`, which keeps the student's distribution near the
    teacher's, and `ca`, which sharpens it. With the matching beside it, dm + ca becomes dm + (1 + weight A) ca: good
    images get more guidance and bad ones less, or the opposite. No reward's gradient, no likelihood, and any number of
    steps. weight is --rl_weight over --dmd_weight, times the weight in --rl.

    To first order the mean reward changes by weight times the covariance of A with what guidance adds to the reward: it
    falls where guidance helps bad images more than good ones.

    The authors of DMDR describe it in words (issues of vvvvvjdy/dmdr): the DM part as regulariser, the CA part times
    the advantage, no separate GRPO loss. Whether A replaces the factor 1 or joins it is not said. It joins it here, so
    that images of equal reward are matched as ever. As every objective it is a mean over the samples that could be
    scored.

    Like the direction it is normalised, so its strength beside matching does not depend on the size of the latent, and
    `--rl_balance grad_norm` is not needed. With it, weight is such that the gradient of weight A ca is rl_weight times
    that of dm + ca, whatever the guidance.

    Attributes:
        scale_rewards: What an advantage, reward minus mean of the group, is divided by: the standard deviation of its
            "group", of the whole "batch", or nothing ("none").
        multi_objective_aggregation: "normalize_then_sum" scales each reward before the weighted sum, and the sum;
            "sum_then_normalize" scales the sum alone.
    """

    scale_rewards: ScaleRewards = "batch"
    multi_objective_aggregation: Aggregation = "normalize_then_sum"

    @property
    def needs(self) -> Needs:
        return Needs(group_size=2, matching=True, parts=("ca",))

    def __call__(self, draw: Draw, ctx: Context) -> Term:
        scores, group = ctx.global_scores()
        advantage, valid = advantages(
            scores, ctx.rewards.weights, group, self.scale_rewards, self.multi_objective_aggregation
        )
        advantage, valid = advantage[draw.sample], valid[draw.sample]
        assert draw.direction is not None
        ca = draw.direction.parts["ca"]
        answer = Prediction(draw.leaf, "x0", draw.x_t, draw.t, ctx.backend.path)
        moved = expand(advantage, ca) * ca * ctx.matching.anchor(answer, draw, ctx)
        # A linear loss, whose value says nothing: its gradient is what counts, in the unit of the matching's.
        return Term(moved.flatten(1).mean(1), valid, metrics={"advantage": advantage.abs()})
