"""What a run trains beside the roles of its backend."""

from collections.abc import Iterator

import torch
from accelerate.utils import broadcast

from dmdr.errors import ConfigError
from dmdr.protocols import Backend, BringsLearners, OwnLearner
from dmdr.run.job import Job
from dmdr.settings.optimizers import OPTIMIZERS

TAKEN = ("student", "fake_score", "reference", "ema", "training")  # names of files in checkpoints


def own_learners(job: Job, backend: Backend, device: torch.device) -> dict[str, list[OwnLearner]]:
    """What matching and objectives train themselves, by the name of the objective; "" is the matching's.

    All processes begin with the parameters of the first.

    Raises:
        ConfigError: If a name is taken, there is nothing to train, or the optimizer has no use for a learning rate.
    """
    optim = job.config.optim
    found: dict[str, list[OwnLearner]] = {}
    taken = set(TAKEN)
    for owner, part in _parts(job):
        found[owner] = list(part.learners(backend, device))
        for own in found[owner]:
            where = f"learner '{own.name}' of {described(owner)}"
            if OPTIMIZERS[optim].finds_rate:
                raise ConfigError(f"{where} has a learning rate of its own, and --optim {optim} finds one; use another")
            if own.name in taken:
                raise ConfigError(f"{where}: the name is taken; choose another")
            if not own.name.isidentifier():
                raise ConfigError(f"{where}: a name has letters, digits and _; choose another")
            if not own.parameters or not all(p.requires_grad for p in own.parameters.values()):
                raise ConfigError(f"{where}: it has no parameters, or some that require no gradient")
            if not own.learning_rate > 0:
                raise ConfigError(f"{where}: its learning rate must be above 0, not {own.learning_rate}")
            taken.add(own.name)
            for parameter in own.parameters.values():
                broadcast(parameter.data)
    return found


def described(owner: str) -> str:
    """The part in words."""
    return f"objective '{owner}'" if owner else "the matching"


def _parts(job: Job) -> Iterator[tuple[str, BringsLearners]]:
    if job.plan.matches and isinstance(job.matching, BringsLearners):
        yield "", job.matching
    for term in job.objectives:
        if isinstance(term.objective, BringsLearners):
            yield term.name, term.objective
