"""A network spread over processes block by block, by torch's FSDP2, and filled from safetensors files.

Adapters stay whole and plain in every process: their gradients, averages, checkpoints and exports are those of a
network that is not sharded. What is trained of a sharded network itself, a full copy, gets its gradients averaged
over all processes as they arrive. Every pass through the network gathers its blocks, so all processes of a mesh must
make the same passes, forward and backward, in the same order.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dmdr.backends.kernels import blocks_of
from dmdr.errors import ConfigError, one_line
from dmdr.states import own_rows, refuse_misfits, rows_of


def shard(
    network: Any, mesh: DeviceMesh, adapters: Collection[nn.Parameter] = (), dtype: torch.dtype | None = None
) -> None:
    """Spread the parameters of a network over processes, in place; `fill` or `copy` gives them values.

    Args:
        network: As `open_network` gives one; adapters and buffers have values.
        mesh: Of one dimension, the processes that share a copy; or of two, copies and the processes that share each.
        adapters: Parameters that stay whole.
        dtype: That blocks are gathered in, None for their own: autocast would keep a copy in half precision of each
            until the end of a pass. Gradients are averaged in float32.
    """
    ours = set(adapters)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for adapter in ours:
        adapter.data = adapter.data.to(mesh.device_type)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in ours:
                setattr(module, name, nn.Parameter(parameter.to("meta"), parameter.requires_grad))
    kept = {name: tensor.detach().clone() for name, tensor in _tensors(network).items() if not tensor.is_meta}
    # What its class keeps in float32 is gathered so: a sum with it would lose digits.
    exact = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype else set()
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in exact and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, mp_policy=replace(policy, param_dtype=None), ignored_params=ours)
    for module in (*reversed(blocks_of(network)), network):
        # The root, too, is gathered anew in each pass: what is written to it in between would be ignored otherwise.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=ours)
    network.to_empty(device=mesh.device_type)
    own = _tensors(network)
    with torch.no_grad():
        for name, tensor in kept.items():
            own[name].copy_(tensor)


def gather_in_backward(network: nn.Module, answers: Iterable[Tensor]) -> None:
    """Let a backward pass that begins at blocks of a sharded network gather what is in no block.

    The network itself does so where the gradient of its own answer arrives.

    Args:
        answers: Of the blocks, [B, ...] each.
    """
    if isinstance(network, FSDPModule):
        for answer in answers:
            if answer.requires_grad:
                answer.register_hook(lambda gradient: network.unshard())


def fill(network: nn.Module, files: Mapping[str, Path], what: str) -> None:
    """Read each process's rows of a sharded network, and nothing else, from safetensors.

    Args:
        files: File of each tensor, by the network's own names.
        what: Where they come from, for messages.

    Raises:
        ConfigError: If a tensor is missing, unexpected or of another shape, or a file is damaged.
    """
    own = stored(network)
    refuse_misfits(what, own.keys() - files.keys(), files.keys() - own.keys())
    misshapen = []
    with ExitStack() as stack, torch.no_grad():
        opened: dict[Path, Any] = {}
        for name, tensor in own.items():
            file = files[name]
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                rows = opened[file].get_slice(name)
                if list(tensor.shape) == rows.get_shape():
                    own_rows(tensor).copy_(rows_of(tensor, rows))
                else:
                    misshapen.append(f"{name} {tuple(rows.get_shape())} for {tuple(tensor.shape)}")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{file} cannot be read as safetensors: {one_line(error)}") from error
    refuse_misfits(what, (), (), misshapen)


@torch.no_grad()
def copy(network: nn.Module, into: nn.Module) -> None:
    """Give a copy of a network, of any dtype, its values.

    Args:
        network: May have adapters, which are left out.
        into: Without adapters, over the same mesh.
    """
    given = stored(network)
    for name, tensor in stored(into).items():
        own_rows(tensor).copy_(own_rows(given[name]))


def stored(network: nn.Module) -> dict[str, Tensor]:
    """What the files of a network hold, by the names that it has without adapters: tensors of any shape."""
    kept = network.state_dict().keys()
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in _tensors(network).items()
        if name in kept and ".lora_" not in name
    }


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())
