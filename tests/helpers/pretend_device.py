"""A device that a CPU pretends to be: its tensors say that they lie on it, and compute on the CPU.

What a GPU refuses is refused, which is an operation on tensors of two devices. What makes the host wait for a GPU is
counted: reading a value (`item`, `tolist`, `.cpu()`, `if tensor`), sizes that depend on values (`nonzero`, boolean
masks, `unique`), and copies to it that block (`torch.tensor(..., device=...)`, `.to(device)` without `non_blocking`).

The device calls itself "lazy", a type that PyTorch knows and has no kernels for here, so that nothing can reach a
kernel unseen; the backward pass of such tensors runs in the thread that asks for it, like that of the CPU.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
OURS = (str(ROOT / "dmdr"), str(ROOT / "plugins"))
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
BY_VALUE = {  # the host needs a value, or the size of the result depends on one
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
}


class OnDevice(Tensor):
    """A tensor on the device; `inner` has its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "OnDevice") -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended device outlived `pretended()`")


class PretendedDevice(TorchDispatchMode):
    """Sees all operations, those of the backward pass included.

    Attributes:
        waits: How often the host waits for the device, by kind and place in our code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def wait(self, kind: str) -> None:
        self.waits[f"{kind} at {_place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        here: list[OnDevice] = []
        elsewhere: list[Tensor] = []

        def inner(tensor: Tensor) -> Tensor:
            if isinstance(tensor, OnDevice):
                here.append(tensor)
                return tensor.inner
            elsewhere.append(tensor)
            return tensor

        inner_args, inner_kwargs = _each(inner, args), {name: _each(inner, value) for name, value in kwargs.items()}
        wanted = kwargs.get("device")
        stays = bool(here) if wanted is None else _is_ours(wanted)
        if func is aten._to_copy.default:
            if here and not stays:
                self.wait("read")
            elif elsewhere and stays and not kwargs.get("non_blocking"):
                self.wait("copy")
        elif func is aten.copy_.default:
            stays = isinstance(args[0], OnDevice)
            if here and elsewhere:
                self.wait("copy" if stays else "read")
        elif here and elsewhere:
            self._mixed(func, args, elsewhere)
        if here and (func in BY_VALUE or (func in INDEXING and _has_mask(args[1]))):
            self.wait("read")
        if _is_ours(wanted):
            inner_kwargs["device"] = CPU
        given = {id(tensor.inner): tensor for tensor in here}

        def outer(tensor: Tensor) -> Tensor:
            return given[id(tensor)] if id(tensor) in given else OnDevice(tensor) if stays else tensor

        return _each(outer, func(*inner_args, **inner_kwargs))

    def _mixed(self, func: Any, args: Any, elsewhere: list[Tensor]) -> None:
        """Refuse tensors of two devices but for numbers in pointwise operations, and indices, as CUDA does."""
        if func in INDEXING and isinstance(args[0], OnDevice):
            self.wait("copy")
            return
        numbers = all(tensor.ndim == 0 for tensor in elsewhere) and torch.Tag.pointwise in func.tags
        if not numbers or (func._schema.is_mutable and not isinstance(args[0], OnDevice)):
            shapes = [list(tensor.shape) for tensor in elsewhere]
            raise RuntimeError(f"{func} at {_place()}: expected all tensors on one device, found CPU tensors {shapes}")


class _FromPython(TorchFunctionMode):
    """Between Python values and tensors of the device, where PyTorch would look for a kernel of it at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor) and _is_ours(kwargs.get("device")):
            return func(*args, **(kwargs | {"device": CPU})).to(DEVICE)
        if isinstance(first, OnDevice):
            if func is Tensor.new_tensor:
                return torch.tensor(*args[1:], **({"dtype": first.dtype} | kwargs)).to(kwargs.get("device") or DEVICE)
            if func is Tensor.tolist:
                return first.cpu().tolist()
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                index = args[1] if isinstance(args[1], tuple) else (args[1],)
                args = (first, tuple(torch.tensor(i) if isinstance(i, list) else i for i in index), *args[2:])
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[PretendedDevice]:
    """Inside, `DEVICE` can be used; what lies on it cannot be used afterwards."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module's `.to(DEVICE)` makes new parameters
    try:
        with PretendedDevice() as device, _FromPython():
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class Process:
    """The one process of a run on the device, as far as backend and trainer ask accelerate for it."""

    device = DEVICE
    mixed_precision = "no"
    num_processes = 1
    process_index = 0
    is_main_process = True

    @contextmanager
    def autocast(self) -> Iterator[None]:
        yield

    def wait_for_everyone(self) -> None:
        pass

    def gather(self, tensor: Tensor) -> Tensor:
        """Refuses what NCCL would."""
        if not isinstance(tensor, OnDevice):
            raise RuntimeError(f"gather at {_place()}: found a CPU tensor {list(tensor.shape)}")
        return tensor


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same with other tensors, which may lie in lists; several times as fast as PyTorch's own trees."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_each(change, each) for each in value) if type(value) in (list, tuple) else value


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _place() -> str:
    """The line of our code that is running."""
    frame = sys._getframe(1)
    while frame.f_back and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
