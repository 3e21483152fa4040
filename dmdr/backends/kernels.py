"""Other kernels for a network: diffusers' attention backends, and compiled blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor, nn

from dmdr.backends.loading import quiet
from dmdr.errors import ConfigError, one_line

QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")  # diffusers' names in attention modules


def set_attention_backend(network: Any, name: str, blank: Callable[..., Tensor]) -> None:
    """Let diffusers compute attention with another kernel.

    Args:
        blank: Makes a tensor [B, N, H, D] of the device and the dtype of the network.

    Raises:
        ConfigError: If diffusers does not know it, or this machine, network or dtype cannot be trained with it.
    """
    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in network.modules()):
        raise ConfigError(
            f"--attention_backend {name}: diffusers ignores it for a {type(network).__name__}; leave it out"
        )
    probe = blank(1, 128, 1, 64).zero_().requires_grad_()
    try:
        with quiet(), attention_backend():  # which keeps diffusers from making it every other network's kernel, too
            network.set_attention_backend(name)
            found = dispatch_attention_fn(probe, probe, probe, backend=AttentionBackendName(name.lower()))
    except Exception as error:
        raise ConfigError(f"--attention_backend {name} in {str(probe.dtype)[6:]}: {one_line(error)}") from error
    if not found.requires_grad:
        raise ConfigError(f"--attention_backend {name} has no gradient: the student cannot be trained with it")
    # Most kernels take half precision alone. Values have it under autocast; normed queries and keys would have that of
    # the norm's weight, float32 in a full student, which is a copy of this network.
    for norm in [getattr(module, norm, None) for module in network.modules() for norm in QK_NORMS]:
        if norm is not None:
            norm.register_forward_hook(lambda norm, given, answer: answer.to(given[0].dtype))


def blocks_of(network: Any) -> list[nn.Module]:
    """The blocks that a network repeats, as diffusers names them; the outer ones first."""
    names = network._repeated_blocks or network._no_split_modules or ()
    return [module for module in network.modules() if type(module).__name__ in names]


def compile_blocks(network: Any) -> None:
    """Compile the blocks that a network repeats, one graph for all of a kind and a role.

    Raises:
        ConfigError: If the network does not say which they are.
    """
    if not (blocks := blocks_of(network)):
        raise ConfigError(
            f"--torch_compile: a {type(network).__name__} does not name its repeated blocks; leave it out"
        )
    # Every role, with and without gradient, is a graph of its own; beyond this limit torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks:
        block.compile()


@contextmanager
def answers_of(blocks: Sequence[nn.Module]) -> Iterator[list[list[Any]]]:
    """What each of these blocks answers inside, in the order of its calls, with its graph.

    A forward hook would not do: torch leaves those that come later out of a compiled block.
    """
    answers: list[list[Any]] = [[] for _ in blocks]
    before = [block._compiled_call_impl for block in blocks]

    def kept(call: Callable[..., Any], answered: list[Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            answered.append(call(*args, **kwargs))
            return answered[-1]

        return called

    try:
        for block, compiled, answered in zip(blocks, before, answers, strict=True):
            block._compiled_call_impl = kept(compiled or block._call_impl, answered)
        yield answers
    finally:
        for block, compiled in zip(blocks, before, strict=True):
            block._compiled_call_impl = compiled
