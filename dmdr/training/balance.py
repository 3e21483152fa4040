"""How strong RL is beside distribution matching: the norms of their gradients in the student's parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmdr.states import whole
from dmdr.training.learner import Grads, Learner, average


@dataclass
class Balance:
    """The gradient of each RL objective, kept beside the student's, which is the sum of all.

    Attributes:
        student: The learner whose gradient it is about.
        weights: Weight of each objective in the sum of `--rl`.
        at_x0: Gradient of each objective at x0, [B, *latent], where it has one.
        grads: Gradient of each objective in the student's parameters.
    """

    student: Learner
    weights: Mapping[str, float]
    at_x0: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Grads] = field(default_factory=dict)

    def note(self, name: str) -> None:
        """Copy the student's gradient, to which only this objective has added so far."""
        self.grads[name] = [None if grad is None else grad.clone() for grad in self.student.grads]

    def carry(self, backward: Callable[[Tensor], None]) -> None:
        """Add to each objective's gradient in the parameters what it has at x0.

        Args:
            backward: Of a gradient at x0, [B, *latent], into the student's parameters.
        """
        for name, at_x0 in self.at_x0.items():
            with self.student.collecting(self.grads[name]):
                backward(at_x0)

    @torch.no_grad()
    def settle(self, ratio: float | None) -> dict[str, float]:
        """Compare with the gradient of matching, and scale the objectives' in the student's gradient.

        Args:
            ratio: The norm of the objectives' sum over matching's that is wanted; each objective then has the share of
                its weight, whatever the norm of its own gradient. None leaves the gradient as it is.

        Returns:
            The ratio of each objective, and of the sum of several under "total", as the student's gradient now has it.
        """
        parameters = list(self.student.parameters.values())
        names = list(self.grads)
        rows = [
            [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            for grads in (self.student.grads, *self.grads.values())
        ]
        if self.student.accelerator.num_processes > 1:
            self.student.note_own(rows[0])
            for row in rows:
                average(row)
        whole, parts = rows[0], list(zip(*rows[1:], strict=True))
        matching = _norm([grad - sum(of_all) for grad, of_all in zip(whole, parts, strict=True)])
        norms = torch.stack([_norm(row) for row in rows[1:]])
        factors = torch.ones_like(norms)
        if ratio is not None:
            shares = torch.tensor([abs(self.weights[name]) for name in names]).to(norms)
            factors = torch.where(norms > 0, shares / norms, 0.0)
            total = _norm([_weighted(factors, of_all) for of_all in parts])
            factors *= torch.where(total > 0, ratio * matching / total, 0.0)
            for grad, of_all in zip(whole, parts, strict=True):
                grad += _weighted(factors - 1, of_all)
        self.student.grads = [*whole]
        total = _norm([_weighted(factors, of_all) for of_all in parts])
        found = torch.cat([norms * factors, total[None]]) / matching
        ratios = dict(zip([*names, "total"], found.tolist(), strict=True))
        return ratios if len(names) > 1 else {names[0]: ratios[names[0]]}


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of a gradient, parameter by parameter."""
    return torch.stack([whole(tensor.norm()) for tensor in tensors]).norm()


def _weighted(factors: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape, each times its factor."""
    return torch.stack([factor * tensor for factor, tensor in zip(factors, tensors, strict=True)]).sum(0)
