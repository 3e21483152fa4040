"""The student's trajectories, as few and as short as a step needs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from dmdr.prompts import PromptStream, split_columns
from dmdr.protocols import Backend, SeveralSizes
from dmdr.sampling import FewStepSampler
from dmdr.training.context import StepContext
from dmdr.training.phases import phase
from dmdr.types import Draw, Rollout


class Wanted(NamedTuple):
    """A rollout that is to be made.

    Attributes:
        ctx: Whose random numbers it is made from.
        until: The last step that each sample is wanted for, [n] int64 on the CPU: of this process's samples, or of all.
        shared: Noises that the images of a group share (`SharesNoise`).
    """

    ctx: StepContext
    until: Tensor
    shared: Sequence[int] = ()


@dataclass
class Rollouts:
    """Makes the rollouts of each step, together and without gradient, by the student as it is.

    Attributes:
        prompts: Stream of prompt rows, this process's share.
        count: Rollouts of a step. The student and the last update of the fake score have one of their own, and the
            other updates share the others; at 1 all share it.
        batch_size: Samples of a pass through the network without gradient.
        always_finished: The matching looks at finished images.
        shards: Processes that share the network, and must call it equally often.
    """

    backend: Backend
    sampler: FewStepSampler
    prompts: PromptStream
    accelerator: Accelerator
    count: int
    batch_size: int
    always_finished: bool = False
    shards: int = 1

    @phase("rollout")
    def __call__(
        self,
        contexts: Sequence[StepContext],
        *,
        finish: bool,
        shared: Sequence[int] = (),
        log_prob: bool = False,
    ) -> list[Draw]:
        """A draw for each context: a stored state of each sample's trajectory, and the answer given there.

        Contexts that share a rollout see each sample at another step, as long as there are others. The last one sees a
        rollout of its own, unless there is but one: the fake score is asked about its images, and answers worse about
        those that it has been trained on.

        Args:
            contexts: One for each update of the fake score, or a single one.
            finish: The last rollout goes through all steps, which changes no bit of the draws. The others go as far as
                they are drawn from.
            shared: Noises of the last rollout that the images of a group share.
            log_prob: Keep the log-probabilities of its steps.
        """
        steps, last = self.sampler.num_inference_steps, contexts[-1]
        wanted: list[Wanted] = []
        picked: list[tuple[int, Tensor]] = []  # rollout and steps of each context
        for uses in shares(len(contexts), min(self.count, len(contexts))):
            ctx = contexts[uses[-1]]
            own = self.drawn(ctx)
            drawn = [(own + uses[-1] - k) % steps for k in uses]
            until = torch.stack(drawn).amax(0)
            if self.shards > 1 and (self.always_finished or (finish and ctx is last)):
                until = torch.full_like(until, steps - 1)  # in as few passes as can be: each gathers the whole network
            picked += [(len(wanted), index) for index in drawn]
            wanted.append(Wanted(ctx, until, shared if ctx is last else ()))
        finish = (finish or self.always_finished) and self.shards == 1
        rollouts = self.make(wanted, log_prob=log_prob, finish=finish)
        for ctx, (number, _) in zip(contexts, picked, strict=True):
            ctx.rollout = rollouts[number]
        return [rollouts[number].pick(self.own(index)) for number, index in picked]

    def whole(self, ctx: StepContext, shared: Sequence[int] = (), *, log_prob: bool = False) -> Rollout:
        """Complete trajectories of the next prompts."""
        last = torch.full_like(self.drawn(ctx), self.sampler.num_inference_steps - 1)
        (ctx.rollout,) = self.make([Wanted(ctx, last, shared)], log_prob=log_prob)
        return ctx.rollout

    def pick(self, rollout: Rollout, ctx: StepContext) -> Draw:
        """The drawn student step of each sample."""
        return rollout.pick(self.own(self.drawn(ctx)))

    def drawn(self, ctx: StepContext) -> Tensor:
        """Indices of uniformly drawn student steps, int64 on the CPU: [N] where processes share the network, or [B]."""
        samples = torch.arange(self.prompts.batch_size)
        samples = samples if self.shards > 1 else samples[self.mine]
        return ctx.random.integers("index", samples, self.sampler.num_inference_steps)

    @property
    def mine(self) -> slice:
        """This process's samples in the global batch."""
        size = self.prompts.batch_size // self.accelerator.num_processes
        return slice(self.accelerator.process_index * size, (self.accelerator.process_index + 1) * size)

    def own(self, values: Tensor) -> Tensor:
        """This process's part of what `drawn` returns."""
        return values[self.mine] if self.shards > 1 else values

    def make(self, wanted: Sequence[Wanted], *, log_prob: bool = False, finish: bool = False) -> list[Rollout]:
        """Trajectories of the next prompts; with `finish` through all steps, later ones in passes of their own."""
        prompts, columns = split_columns([row for _ in wanted for row in next(self.prompts)])
        cond = self.backend.encode(prompts, **columns)
        samples = torch.arange(self.mine.start, self.mine.stop)
        noise = torch.cat([self._noise(each, samples) for each in wanted])
        # The longest trajectories first, so that those that go on are always the first ones.
        own = torch.cat([self.own(each.until) for each in wanted])
        order = own.argsort(descending=True, stable=True)
        until = self._falling(wanted, len(samples)).tolist()
        found: dict[str, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            part = slice(start, start + self.batch_size)
            rows = order[part].to(noise.device, non_blocking=True)
            chunk = self.sampler.rollout(
                self.backend.student,
                noise[rows].transpose(0, 1),
                cond.ordered(order[part]),
                log_prob=log_prob,
                until=until[part],
                finish=finish,
            )
            for name in ("x_t", "x0", "log_prob"):
                made = getattr(chunk, name)
                if made is not None and name not in found:
                    found[name] = made.new_empty(len(made), len(order), *made.shape[2:])
                if made is not None:  # into its place: parts that are joined at the end would be there twice
                    found[name][:, rows] = made
        count, last = len(samples), self.sampler.num_inference_steps - 1
        samples = samples.to(noise.device, non_blocking=True)
        return [
            Rollout(
                cond=cond[i * count : (i + 1) * count],
                t=self.sampler.t,
                **{name: whole[:, i * count : (i + 1) * count] for name, whole in found.items()},
                sample=samples,
                group=samples // self.prompts.group_size,
                finished=finish or bool((each.until == last).all()),
            )
            for i, each in enumerate(wanted)
        ]

    def _noise(self, wanted: Wanted, samples: Tensor) -> Tensor:
        """Unit Gaussian of all steps, [B, K, *latent]."""
        random, shape = wanted.ctx.random, (self.sampler.num_inference_steps, *self.latent_shape(wanted.ctx))
        samples = samples.to(self.accelerator.device, non_blocking=True)
        noise = random.normal("noise", samples, shape)
        if wanted.shared:
            shared = list(wanted.shared)
            noise[:, shared] = random.normal("noise/group", samples // self.prompts.group_size, shape)[:, shared]
        return noise

    def latent_shape(self, ctx: StepContext) -> tuple[int, ...]:
        """Of this update's images, in all of its rollouts and all processes."""
        if not isinstance(self.backend, SeveralSizes) or len(self.backend.latent_shapes) == 1:
            return self.backend.latent_shape
        shapes = self.backend.latent_shapes
        of_update = replace(ctx.random, phase="update", iteration=0)
        return shapes[int(of_update.integers("size", torch.zeros(1, dtype=torch.int64), len(shapes)))]

    def _falling(self, wanted: Sequence[Wanted], own: int) -> Tensor:
        """Last steps of this process's samples, the longest first; at each place the longest of all processes."""
        until = torch.cat([each.until.view(-1, own) for each in wanted], 1)  # a row for each process
        return until.sort(1, descending=True).values.amax(0)


def shares(uses: int, rollouts: int) -> list[list[int]]:
    """Which uses share a rollout, in order: the last one has its own if there are several.

    Args:
        uses: At least 1.
        rollouts: 1 .. uses.
    """
    if rollouts == 1:
        return [list(range(uses))]
    earlier: list[list[int]] = [[] for _ in range(rollouts - 1)]
    for use in range(uses - 1):
        earlier[use * (rollouts - 1) // (uses - 1)].append(use)
    return [*earlier, [uses - 1]]
