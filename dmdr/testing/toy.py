"""A complete trainer on the toy Gaussian mixture, in which plugins are tried."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dmdr.backends.toy import CENTRES, PROMPTS, STD, Redness, ToyBackend, ToyOptions
from dmdr.matching import DMD
from dmdr.prompts import Prompts, PromptStream
from dmdr.protocols import BringsLearners, Matching, OwnLearner, Reward, Role, SampleWeight, matching_needs
from dmdr.randomness import Random
from dmdr.rewards import Rewards
from dmdr.sampling import FewStepSampler, time_grid
from dmdr.settings.chosen import compares_scores
from dmdr.training.learner import Learner
from dmdr.training.objectives import Objectives, WeightedObjective
from dmdr.training.rollouts import Rollouts
from dmdr.training.schedules import DynaDG, DynaRS, Schedule
from dmdr.training.scorer import RolloutScorer
from dmdr.training.trainer import Trainer
from dmdr.types import Draw, Real


def real_points(draw: Draw, random: Random) -> Real:
    """Points of the mixture itself, of the draw's own prompts."""
    centre = CENTRES.to(draw.x0.device)[draw.cond.tensors["label"]]
    return Real(centre + STD * random.normal("real", draw.sample, (2,)), draw.cond)


def toy_trainer(
    *objectives: WeightedObjective,
    reward: Reward | None = None,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    num_inference_steps: int = 4,
    dmd_weight: float = 1.0,
    rl_weight: float = 1.0,
    group_size: int = 1,
    matching: Matching | None = None,
    guidance: tuple[float, float] = (1.0, 1.0),
    sample_weight: SampleWeight | None = None,
    learning_rate: float = 1e-3,
    scaler: torch.amp.GradScaler | None = None,
    seed: int = 0,
) -> Trainer:
    """A complete trainer on the toy backend: four prompts, an exact teacher, the reward `Redness` unless given.

    Its real images are points of the same mixture.

    Args:
        objectives: The RL half, e.g. `WeightedObjective("mine", 1.0, Mine())`.
        reward: Scores the images [B, 3, 4, 4].
        batch_size: Images of the global batch; `micro_batch_size` of one pass, the whole local batch by default.
        num_inference_steps: Steps of the student.
        dmd_weight: Weight of distribution matching; 0 leaves it out, and updates the fake score once a step.
        rl_weight: Weight of the sum of the objectives.
        group_size: Images of a prompt; more where an objective needs more.
        matching: How distributions are compared; `DMD` by default.
        guidance: Range of the teacher's guidance.
        sample_weight: Weight of each sample's direction; none by default.
        learning_rate: Of student and fake score, constant.
        scaler: Of the loss, as for float16; none by default.
        seed: Of the initial values, the prompts' order and all random numbers.
    """
    climbed: Any = Redness() if reward is None else reward
    accelerator = Accelerator(cpu=True)
    backend = ToyBackend("", ToyOptions(seed=seed))
    roles: list[Role] = [role for term in objectives for role in term.objective.needs.roles]
    matching = matching or DMD()
    compares: list[Role] = ["fake_score"] if compares_scores(matching) else []
    backend.prepare(accelerator, roles=tuple(dict.fromkeys(["student", *compares, *roles])))
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def learner(name: str, parameters: Mapping[str, nn.Parameter], rate: float, owner: str = "") -> Learner:
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        return Learner(name, parameters, optimizer, schedule, accelerator, scaler, max_grad_norm=1e9, owner=owner)

    def own_of(part: Any, owner: str) -> list[Learner]:
        brought: Sequence[OwnLearner] = ()
        if isinstance(part, BringsLearners):
            brought = part.learners(backend, accelerator.device)
        return [learner(each.name, each.parameters, each.learning_rate, owner) for each in brought]

    student = learner("student", backend.parameters("student"), learning_rate)
    fake_learners = [learner(role, backend.parameters(role), learning_rate) for role in compares]
    fake_learners += own_of(matching, "the matching")
    own = {term.name: own_of(term.objective, f"objective '{term.name}'") for term in objectives}
    micro = micro_batch_size or batch_size // accelerator.num_processes
    return Trainer(
        backend=backend,
        rollouts=Rollouts(
            backend,
            FewStepSampler(backend.path, time_grid(num_inference_steps), 1.0),
            PromptStream(
                Prompts([{"prompt": prompt, "label": label} for label, prompt in enumerate(PROMPTS)]),
                batch_size,
                group_size=max(group_size, *(term.objective.needs.group_size for term in objectives), 1),
                seed=seed,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
            ),
            accelerator,
            count=2 if dmd_weight else 1,
            batch_size=micro,
            always_finished=matching_needs(matching).finished,
        ),
        student=student,
        fake_learners=fake_learners,
        matching=matching,
        objectives=Objectives(objectives, Schedule(rl_weight), student, fake_learners, micro, own),
        accelerator=accelerator,
        scaler=scaler,
        seed=seed,
        micro_batch_size=micro,
        matches=dmd_weight > 0,
        rounds=2 if dmd_weight else 1,
        dmd_weight=Schedule(dmd_weight),
        fake_mix=DynaDG(0.0, 0),
        renoise=DynaRS(1.0, 1.0, 0),
        guidance=guidance,
        scorer=RolloutScorer(Rewards({"toy": (1.0, climbed)}), backend, accelerator, micro),
        sample_weight=sample_weight,
        real_images=real_points,
    )
