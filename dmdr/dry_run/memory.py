"""Memory of a computation that does not happen: operations on the meta device, counted as a GPU would allocate them.

Meta tensors have a shape and a dtype and no values. Two things differ between their operations and those on a GPU, and
are set right by `GPUKernels`: autocast leaves them alone, and attention falls back to the kernel that keeps every
token's weight of every other. What no one can see from outside remains uncounted: workspaces of kernels and libraries,
and what the caching allocator loses to fragmentation.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
REST = "activations"
Note = Callable[[Tensor, Tensor], None]
PLAIN = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))

# Operations that autocast runs in the lower precision, and in float32: PyTorch's lists of CUDA, as far as networks go.
LOWER = """
    linear matmul __matmul__ __rmatmul__ mm bmm mv addmm addmv addbmm baddbmm einsum conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d prelu scaled_dot_product_attention
"""
FLOAT32 = """
    layer_norm group_norm rms_norm softmax log_softmax softplus exp expm1 log log2 log10 log1p rsqrt reciprocal
    __rdiv__ __rtruediv__ pow __pow__ __rpow__ sum prod cumsum cumprod norm vector_norm logsumexp cosine_similarity
    mse_loss l1_loss smooth_l1_loss huber_loss interpolate
"""
AUTOCAST = dict.fromkeys(LOWER.split(), True) | dict.fromkeys(FLOAT32.split(), False)  # name -> whether lower


class Meter(TorchDispatchMode):
    """Bytes of the storages that are alive, by label, and what they were when their sum was highest.

    It answers for the values that meta tensors do not have: what is copied to the CPU is 0.5 everywhere (0 if it is of
    whole numbers), a number that is asked for is 1. Whole numbers that were copied from the CPU, such as lengths, are
    remembered until they change, and so are rows that are taken of them.

    Attributes:
        now: Bytes by label; what was never labelled is REST.
        peak: The same at the highest sum since `restart`.
        shares: Processes among which new storages are divided.
        newest: What new storages are counted as.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.shares, self.newest = 1, REST
        self._labels: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, Any] = {}
        self._answers: dict[Any, Any] = {}  # of operations, by what they were asked
        self._values: dict[int, Tensor] = {}  # on the CPU, laid out as the storage on the meta device
        self._passes: dict[Any, tuple[Any, int, Counter[str]]] = {}  # answer, and bytes at the peak above the start
        self._sum = self._highest = 0

    def passed(self, key: Any, run: Callable[[], Tensor]) -> Tensor:
        """The answer of a pass without gradient.

        Args:
            key: What its memory depends on. Of passes with the same key the first is run, and counted for the others.
            run: The pass.
        """
        if key in self._passes:
            answer, more, parts = self._passes[key]
            if self._sum + more > self._highest:
                self._highest, self.peak = self._sum + more, self.now + parts
            out: Tensor = _made(answer)
            self._see(out)
            return out
        highest, peak, start, before = self._highest, self.peak, self._sum, self.now.copy()
        self._highest = start
        out = run()
        own, parts = self._highest, self.peak.copy()
        parts.subtract(before)
        if self._sum - start == out.untyped_storage().nbytes():  # else it has left something for later ones
            self._passes[key] = _like(out), own - start, parts
        if own < highest:
            self._highest, self.peak = highest, peak
        return out

    def restart(self) -> None:
        """Forget the peak."""
        self.peak, self._highest = self.now.copy(), self._sum

    def label(self, name: str, tensors: Iterable[Tensor], shares: int = 1) -> None:
        """Count these tensors' storages under a name from now on, of each a process's share of so many."""
        for tensor in tensors:
            self._see(tensor)
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes() // shares
            self.now[self._labels[key]] -= self._sizes[key]
            self.now[name] += size
            self._sum += size - self._sizes[key]
            self._labels[key], self._sizes[key] = name, size

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self._values.pop(key, None)
            counted = self._sizes.pop(key)
            self.now[self._labels.pop(key)] -= counted
            self._sum -= counted

        size = storage.nbytes() // self.shares
        self._alive[key], self._labels[key], self._sizes[key] = weakref.ref(storage, gone), self.newest, size
        self.now[self.newest] += size
        self._sum += size
        if self._sum > self._highest:
            self._highest, self.peak = self._sum, self.now.copy()

    def _value(self, tensor: Tensor, otherwise: float) -> Tensor:
        known = self._values.get(id(tensor.untyped_storage()))
        if known is None:
            return torch.full_like(tensor, otherwise, device="cpu")
        return known.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _computed(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The answer of an operation; what it makes anew is the same for the same shapes, and is found once.

        Many of torch's functions for the meta device are Python that takes ten times as long as a look into a table.
        """
        key = _signature(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if key not in self._answers:
            out = func(*args, **kwargs)
            self._answers[key] = _each(_like, out)
            return out
        return _each(_made, self._answers[key])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return self._value(args[0], 1).item()
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            out: Any = self._value(args[0], 0.5).to(kwargs.get("dtype") or args[0].dtype)
        else:
            out = self._computed(func, args, kwargs)
            if func is aten._to_copy.default and out.is_meta and not args[0].is_meta and not out.is_floating_point():
                value = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype).copy_(args[0])
                self._values[id(out.untyped_storage())] = value
            if func is aten.index.Tensor and out.is_meta and not out.is_floating_point():
                used = [tensor for tensor in (args[0], *args[1]) if tensor is not None]
                if all(id(tensor.untyped_storage()) in self._values for tensor in used):
                    found = func(*tree_map(lambda tensor: self._value(tensor, 0), (args[0], list(args[1]))))
                    self._values[id(out.untyped_storage())] = found
            for tensor in _written(func, args, kwargs):
                self._values.pop(id(tensor.untyped_storage()), None)
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and what would keep it from that takes as long as a look into a table."""
        return False


@dataclass(frozen=True)
class _Like:
    """A meta tensor that an operation answered with; no tuple, which would be taken for a row of answers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _like(answer: Any) -> Any:
    return _Like(answer.shape, answer.stride(), answer.dtype) if isinstance(answer, Tensor) else answer


def _made(answer: Any) -> Any:
    """Another one."""
    if not isinstance(answer, _Like):
        return answer
    return torch.empty_strided(answer.shape, answer.stride, dtype=answer.dtype, device="meta")


def _each(of: Callable[[Any], Any], answer: Any) -> Any:
    """Of an operation's answer, which is one value or a row of them; torch's trees take ten times as long."""
    return type(answer)(map(of, answer)) if isinstance(answer, list | tuple) else of(answer)


def _signature(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What an operation's answer depends on; None for one that changes or returns what it is given, or has values."""
    if not _makes(func):
        return None
    parts: list[Any] = [func]
    for value in (*args, *kwargs.items()):
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, Tensor):
                if not part.is_meta:
                    return None
                parts.append((part.shape, part.stride(), part.dtype))
            elif isinstance(part, PLAIN):
                parts.append((type(part), part))
            else:
                return None
        parts.append(None)
    made_from = any(isinstance(part, tuple) and isinstance(part[0], torch.Size) for part in parts)
    return tuple(parts) if made_from and "device" not in kwargs else None


@cache
def _makes(func: Any) -> bool:
    """Whether an operation changes nothing, and answers with nothing that it is given."""
    return not func._schema.is_mutable and not any(answer.alias_info for answer in func._schema.returns)


@cache
def _writes(func: Any) -> bool:
    return func._schema.is_mutable


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The arguments that an operation changes in place."""
    if _writes(func):
        names = [argument.name for argument in func._schema.arguments if argument.is_write]
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
        yield from (t for t in tree_leaves([given.get(name) for name in names]) if isinstance(t, Tensor))


@contextmanager
def autocast(dtype: torch.dtype, note: Note = lambda leaf, cast: None) -> Iterator[None]:
    """Autocast of meta tensors, where `GPUKernels` are on: of CUDA's lists, and with its cache.

    The cache keeps the casts of float32 leaves that require a gradient until autocast ends, whoever else needs them.

    Args:
        dtype: The lower precision.
        note: Is told of each such leaf and its cast.
    """
    token = _casts.set((WeakIdKeyDictionary(), note))
    try:
        with torch.autocast("cpu", dtype):  # means nothing to meta tensors; checkpointing enters it to recompute
            yield
    finally:
        _casts.reset(token)


_casts: ContextVar[Any] = ContextVar("casts", default=(None, None))  # leaf -> its cast, and whom to tell


class GPUKernels(TorchFunctionMode):
    """Autocast and attention of meta tensors as on a GPU, the former wherever `torch.autocast("cpu")` is on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in AUTOCAST and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu") if AUTOCAST[name] else torch.float32
            args = tuple(_casts_of(value, dtype) for value in args)
            kwargs = {key: _casts_of(value, dtype) for key, value in kwargs.items()}
        if name in KERNELS and all(t.is_meta for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            return KERNELS[name](*args, **kwargs)
        if func in BACKWARD:
            with self:  # off within this method, while backward may recompute what was checkpointed
                return BACKWARD[func](*args, **kwargs)
        return func(*args, **kwargs)


def backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """`Tensor.backward`, straight to the engine."""
    _engine((tensor,), (gradient,), bool(retain_graph), create_graph, tuple(inputs or ()), accumulate_grad=True)


def gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, straight to the engine."""
    given: Sequence[Tensor | None] = grad_outputs or [None] * len(outputs)
    return _engine(outputs, given, bool(retain_graph), create_graph, inputs, accumulate_grad=False)


def _engine(
    outputs: Sequence[Tensor],
    given: Sequence[Tensor | None],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor],
    accumulate_grad: bool,
) -> Any:
    grads = tuple(torch.ones_like(out) if grad is None else grad for out, grad in zip(outputs, given, strict=True))
    run = torch.autograd.Variable._execution_engine.run_backward
    retain_graph = retain_graph or create_graph
    return run(
        tuple(outputs),
        grads,
        retain_graph,
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=accumulate_grad,
    )


def _casts_of(value: Any, dtype: torch.dtype) -> Any:
    """Of a tensor, or of a row of them."""
    return type(value)(_cast(each, dtype) for each in value) if type(value) in (list, tuple) else _cast(value, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not (isinstance(value, Tensor) and value.is_meta and value.is_floating_point()) or value.dtype == torch.float64:
        return value
    casts, note = _casts.get()
    if casts is None or dtype == value.dtype or not (value.is_leaf and value.requires_grad):
        return value.to(dtype)
    if value not in casts:
        casts[value] = value.to(dtype)
        note(value, casts[value])
    return casts[value]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernels that PyTorch takes on CUDA: flash, or the memory-efficient one.

    Both keep query, key, value, output and one number per token for backward. Flash attention takes half precision, no
    mask, and heads of up to 256 channels.
    """
    if query.ndim == 3:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).squeeze(0)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(1) // t.size(1), 1) for t in (key, value))
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.size(-1) <= 256:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = attn_mask
    if bias is not None:
        bias = torch.empty_like(bias, dtype=query.dtype) if bias.dtype == torch.bool else bias
        bias = bias.expand(*query.shape[:-1], key.size(-2))
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, grad, dropout_p, is_causal, scale=scale
    )[0]


def multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """torch's own, whose inner functions no mode sees, with the attention of CUDA."""
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        return F.multi_head_attention_forward(*args, **kwargs)
    finally:
        F.scaled_dot_product_attention = own


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Layer norm in its place: one kernel, as RMS norm is on CUDA, that keeps the same for backward."""
    return F.layer_norm(input, normalized_shape, weight, None, eps or 1e-5)


class Blockwise(torch.optim.Optimizer):
    """What an optimizer of bitsandbytes keeps, paged or not; it moves nothing.

    Each moment takes some bytes a number: 4, or 1 and a float32 scale for each block of 256. Those of parameters of
    fewer than 4096 numbers are float32. Parameters are updated one by one and in place: beside the states, a step takes
    nothing.

    Source: `init_state` and `update_step` of bitsandbytes' `Optimizer1State` and `Optimizer2State`.

    Args:
        params: On the meta device.
        moments: 1 or 2.
        size: 1 or 4 bytes.
    """

    def __init__(self, params: Iterable[Tensor], moments: int, size: int) -> None:
        super().__init__(params, {"lr": 1.0})
        self.moments, self.size = moments, size

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            for moment in () if state else range(1, self.moments + 1):
                whole = self.size == 4 or parameter.numel() < 4096
                state[f"state{moment}"] = torch.zeros_like(parameter, dtype=torch.float32 if whole else torch.uint8)
                if not whole:
                    blocks = math.ceil(parameter.numel() / 256)
                    state[f"absmax{moment}"] = torch.zeros(blocks, device=parameter.device)


KERNELS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head_attention,
    "rms_norm": rms_norm,
}
BACKWARD: dict[Any, Callable[..., Any]] = {Tensor.backward: backward, torch.autograd.grad: gradients}
