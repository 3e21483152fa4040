"""Roles as LoRA adapters of one frozen network: teacher (adapters off), fake score, student, reference.

Student and fake score may each be a full copy of the network instead.

PEFT's own `set_adapter` flips `requires_grad` of every adapter, so that switching the role between a forward and its
backward loses gradients without a word. Here every adapter keeps its `requires_grad` for good, and a role is only the
choice of adapter and scale that the LoRA layers apply. With gradient checkpointing the recomputation happens during
backward, when another role may be active; the checkpoint function therefore re-enters the role of its forward.
"""

import logging
import warnings
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dmdr.errors import ConfigError, TrainingError
from dmdr.protocols import Role
from dmdr.states import load_strict, own_rows, rows_of

MUCH_LOST = 0.25  # share of a merged adapter, in the root mean square
logger = logging.getLogger("dmdr")

Active = tuple[str | None, float]  # adapter and share of its strength; None is the bare network


class Choice:
    """The adapter that a network's linear layers apply, None for none, and the factor of its B A."""

    adapter: str | None = None
    factor: float = 0.0


class ChosenLinear(lora.Linear):
    """PEFT's linear layer with adapters, of which it applies the one that `choice` names.

    x W + factor x A B in three kernels, where PEFT takes five, and in autocast's precision: PEFT casts the input to
    float32, which autocast then takes back.
    """

    choice: Choice

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; PEFT would give it the shape of a process's rows where the network is shared."""
        base: Any = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features
        super().update_layer(*args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Inputs x [B, ..., in] to outputs [B, ..., out]."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        if self.choice.adapter is None:
            return out
        a: Any = self.lora_A[self.choice.adapter].weight
        b: Any = self.lora_B[self.choice.adapter].weight
        low = F.linear(x, a).flatten(0, -2) * self.choice.factor  # addmm's alpha would be a constant of compiled code
        return torch.addmm(out.flatten(0, -2), low, b.T).view(out.shape)


class LoRARoles:
    """One network and its adapters.

    Args:
        network: The teacher's network; frozen in place.
        roles: Roles to create; "reference" is a frozen copy of the student, refreshed by `snapshot`.
        rank, alpha: LoRA rank and alpha per role; the adapter's strength is alpha / rank.
        target_modules: Module names that get an adapter, as PEFT matches them.
        full: Trained roles that are full copies of the network instead of adapters; the reference is as the student.
        seed: Seed of the adapters' initial values.

    Raises:
        ConfigError: If `target_modules` match nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        roles: Sequence[Role],
        rank: dict[Role, int],
        alpha: dict[Role, float],
        target_modules: Sequence[str],
        full: Collection[Role] = (),
        seed: int = 0,
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.roles: tuple[str, ...] = tuple(roles)
        self._active: Active = (None, 0.0)
        self._choice = Choice()
        self._targets, self._seed = list(target_modules), seed
        copied = [role for role in roles if ("student" if role == "reference" else role) in full]
        self.copies: dict[str, Any] = {role: _full_copy(network) for role in copied}
        self._strength: dict[str, float] = {}
        self._inject({role: (rank[role], alpha[role]) for role in roles if role not in self.copies})

    def add(self, role: str, rank: int, alpha: float) -> None:
        """A further adapter, which is trained as the fake score's is; nothing if there is such a role."""
        if role not in self.roles:
            self.roles = (*self.roles, role)
            self._inject({role: (rank, alpha)})

    def _inject(self, adapters: Mapping[str, tuple[int, float]]) -> None:
        """Create adapters of a rank and an alpha each."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            for role, (rank, alpha) in adapters.items():
                self._inject_one(role, rank, alpha)
                self._strength[role] = alpha / rank
        self.layers = {name: m for name, m in self.network.named_modules() if isinstance(m, LoraLayer)}
        self._others = []  # layers of PEFT's own, which each have to be told
        for layer in self.layers.values():
            if isinstance(layer, ChosenLinear):
                layer.choice = self._choice
            else:
                self._others.append(layer)
        for role in self.roles:  # of all: PEFT changes who takes gradients
            for parameter in self.parameters(role).values():
                if role in adapters:
                    parameter.data = parameter.data.float()  # they train in float32
                parameter.requires_grad_(role != "reference")
        self._switch((None, 0.0))

    def _inject_one(self, role: str, rank: int, alpha: float) -> None:
        # PEFT accepts a fractional alpha, though it is annotated as an integer.
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=self._targets,
            init_lora_weights="gaussian",
        )
        config._register_custom_module({nn.Linear: ChosenLinear})
        try:
            with warnings.catch_warnings():  # PEFT warns of a second adapter; several are the point here
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                # On the meta device adapters need no values either, whose drawing takes most of the time.
                blank = any(parameter.is_meta for parameter in self.network.parameters())
                inject_adapter_in_model(config, self.network, adapter_name=role, low_cpu_mem_usage=blank)
        except ValueError as error:
            raise ConfigError(f"--lora_target_modules {' '.join(self._targets)}: {error}") from error

    def _switch(self, active: Active) -> None:
        adapter, share = active
        factor = 0.0 if adapter is None else share * self._strength[adapter]
        self._choice.adapter, self._choice.factor = adapter, factor
        for layer in self._others:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
                layer.scaling[adapter] = factor
        self._active = active

    @contextmanager
    def _as(self, active: Active) -> Iterator[None]:
        before = self._active
        if before == active:
            yield
            return
        self._switch(active)
        try:
            yield
        finally:
            self._switch(before)

    def __call__(self, role: str | None, *args: Any, share: float = 1.0, **kwargs: Any) -> Any:
        """Forward pass of a role; None, or share 0, is the teacher. `share` scales the role's adapter.

        Raises:
            TrainingError: For a share of a full copy.
        """
        if role in self.copies:
            if share != 1:
                raise TrainingError(f"the {role} is a full network, and no adapter that could be scaled by {share:g}")
            return self.copies[role](*args, **kwargs)
        with self._as((role, share) if role is not None and share != 0 else (None, 0.0)):
            return self.network(*args, **kwargs)

    def network_of(self, role: Role | None) -> Any:
        """The network whose forward pass is that of a role; None is the teacher."""
        return self.network if role is None else self.copies.get(role, self.network)

    @property
    def networks(self) -> list[Any]:
        """The shared network, and the full copies if there are any."""
        return [self.network, *self.copies.values()]

    def checkpoint_function(self) -> Callable[..., Any]:
        """A drop-in for the network's gradient-checkpointing function that recomputes under the forward's role."""

        def function(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            active = self._active

            def run(*args: Any, **kwargs: Any) -> Any:
                with self._as(active):
                    return module(*args, **kwargs)

            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # nothing is random

        return function

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Named parameters of a role: an adapter's `<module>.lora_A.weight`, or the full copy's own names."""
        if role in self.copies:
            return dict(self.copies[role].named_parameters())
        return {
            f"{name}.{part}.weight": getattr(layer, part)[role].weight
            for name, layer in self.network.named_modules()
            if isinstance(layer, LoraLayer)
            for part in ("lora_A", "lora_B")
            if role in getattr(layer, part)
        }

    def folded(self, role: Role) -> dict[str, Tensor]:
        """The adapter with its strength folded into lora_B, so that it acts in full for loaders that ignore alpha.

        By name: `<module>.lora_A.weight` [r, ...] and `<module>.lora_B.weight` [out, r, ...], float32.
        """
        strength = self._strength[role]
        return {
            name: (parameter.detach() * (strength if ".lora_B." in name else 1.0)).contiguous()
            for name, parameter in self.parameters(role).items()
        }

    def merged(self, role: Role) -> dict[str, Tensor]:
        """The whole network as a role: its adapter merged, or its full copy.

        By the network's own names, float32, each of the same shape as there.
        """
        if role in self.copies:
            return {name: tensor.float() for name, tensor in self.copies[role].state_dict().items()}
        state = {
            name.replace(".base_layer.", "."): tensor.float()
            for name, tensor in self.network.state_dict().items()
            if ".lora_" not in name
        }
        return state | {name: state[name] + delta for name, delta in deltas(self.folded(role), state)}

    def unfold(self, role: Role, tensors: Mapping[str, Tensor], what: str) -> None:
        """Load what `folded` gave, `<module>.lora_A.weight` [r, ...] and so on; `what` names its origin in errors.

        Raises:
            ConfigError: If the names or shapes are not this role's, as with another rank or other target modules.
        """
        strength = self._strength[role]
        unfolded = {name: tensor / strength if ".lora_B." in name else tensor for name, tensor in tensors.items()}
        load_strict(self.parameters(role), unfolded, what)

    @torch.no_grad()
    def snapshot(self) -> None:
        """Make the reference what the student is now."""
        student = self.parameters("student")
        for name, parameter in self.parameters("reference").items():
            parameter.copy_(student[name])


def _full_copy(network: nn.Module) -> Any:
    """In float32, buffers such as position embeddings, too: what is added to them is then summed up in float32.

    Parameters that take no memory (`open_network`) take none in the copy.
    """
    copies = {}
    for parameter in network.parameters():
        empty = parameter.untyped_storage().nbytes() < parameter.nbytes
        value = torch.zeros(()).expand(parameter.shape) if empty else parameter.detach().to(torch.float32, copy=True)
        copies[id(parameter)] = nn.Parameter(value, requires_grad=False)
    return deepcopy(network, copies).float()


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Refuse module names of a user that no module of the network has; PEFT is content if one of them matches.

    Raises:
        ConfigError: Names them.
    """
    modules = [f".{name}" for name, _ in network.named_modules()]
    absent = [target for target in targets if not any(name.endswith(f".{target}") for name in modules)]
    if absent:
        raise ConfigError(f"--lora_target_modules: a {type(network).__name__} has no {', '.join(absent)}")


def deltas(adapter: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What an adapter adds to weights, one after the other: B A.

    Args:
        adapter: `<module>.lora_A.weight` [r, ...] and `<module>.lora_B.weight` [out, r, ...] at full strength, float32.
        weights: `<module>.weight` [out, ...] of at least the adapter's modules.

    Yields:
        `<module>.weight`, and its change in float32 and the weight's shape.
    """
    for name, b in adapter.items():
        module, _, end = name.partition(".lora_B.")
        if end:
            delta = b.flatten(1) @ adapter[f"{module}.lora_A.weight"].flatten(1)
            yield f"{module}.weight", delta.view(weights[f"{module}.weight"].shape)


@torch.no_grad()
def merge(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], what: str) -> None:
    """Add an adapter to weights in float32, rounded once to their dtype; warn if that takes much of it.

    Args:
        weights: `<module>.weight` [out, ...] of at least the adapter's modules; processes may share them.
        adapter: `<module>.lora_A.weight` [r, ...] and `<module>.lora_B.weight` [out, r, ...] at full strength, float32.
        what: Where it comes from, for the warning.
    """
    all_of_it = lost = 0.0
    for name, delta in deltas(adapter, weights):
        rows, added = own_rows(weights[name]), rows_of(weights[name], delta)
        exact = rows.float() + added
        rows.copy_(exact)
        all_of_it += float(added.square().sum())
        lost += float((rows.float() - exact).square().sum())
    if lost > MUCH_LOST**2 * all_of_it:
        share = (lost / all_of_it) ** 0.5
        said = "%s: rounding the sum of it and the weights changes it by %.0f%%; --mixed_precision no avoids this"
        logger.warning(said, what, 100 * share)


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two adapters of one network as one that adds both: B1 A1 + B2 A2 = [B1 B2] [A1; A2].

    Args:
        first, second: `<module>.lora_A.weight` [r, ...] and `<module>.lora_B.weight` [out, r, ...] at full strength;
            all of the first have one rank. Modules may be missing from either.

    Returns:
        The same names for the modules of both, all of one rank: loaders assume the rank of one module of all.
    """
    if not second:
        return dict(first)
    ours, theirs = (max(a.shape[0] for name, a in part.items() if ".lora_A." in name) for part in (first, second))
    result = {}
    for name in sorted(first.keys() | second.keys()):
        rank_dim = 0 if ".lora_A." in name else 1
        like = first.get(name, second.get(name))
        assert like is not None
        parts = []
        for part, rank in ((first, ours), (second, theirs)):
            padded = like.new_zeros([rank if dim == rank_dim else size for dim, size in enumerate(like.shape)])
            if name in part:
                padded.narrow(rank_dim, 0, part[name].shape[rank_dim]).copy_(part[name])
            parts.append(padded)
        result[name] = torch.cat(parts, rank_dim).contiguous()
    return result


def parted(
    both: Mapping[str, Tensor], second: Mapping[str, Tensor], own: Container[str], what: str
) -> dict[str, Tensor]:
    """The first of two adapters that were `joined`.

    Args:
        both: What `joined` returned.
        second: The second of the two, `<module>.lora_A.weight` [r, ...] and `<module>.lora_B.weight` [out, r, ...].
        own: Names of the first.
        what: Where `both` comes from, for the message.

    Raises:
        ConfigError: If the second is not in it.
    """
    if not second:
        return dict(both)
    theirs = max(a.shape[0] for name, a in second.items() if ".lora_A." in name)
    result = {}
    for name, tensor in both.items():
        rank_dim = 0 if ".lora_A." in name else 1
        rank = tensor.shape[rank_dim] - theirs
        if rank > 0 and (name in own or name not in second):
            result[name] = tensor.narrow(rank_dim, 0, rank).contiguous()
    again = joined(result, second) if result else {}
    if again.keys() != both.keys() or not all(torch.allclose(again[name], tensor) for name, tensor in both.items()):
        raise ConfigError(
            f"{what} was not trained with the --teacher_lora of this run: give the one of its own run, or leave it out"
        )
    return result
