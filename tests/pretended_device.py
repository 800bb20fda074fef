"""A device that this machine does not have: its tensors are tensors of the processor which refuse to be taken for some.

`FakeTensorMode` with tensors "on CUDA" checks devices too, but has no values, and metarec's loops read values: whether
a user diverged, which rows a cache lacks. Nor can it move a tensor to CUDA in a torch that was built without. The
``meta`` device has no values either, and its indices may pick rows of the processor's tensors.

Here a tensor of the device is a wrapper around the processor's one, on a device that torch knows as a backend from
outside (``PrivateUse1``). Every operation on it, in gradients too, passes `_run`, which computes on the processor what
an accelerator would compute, and raises where an accelerator raises: tensors of two devices in one operation, a
generator of another device; torch itself refuses to hand the tensor to NumPy. As on CUDA, a tensor without dimensions
may come from the processor, but to operations element by element alone, and so may an index into the device's tensors.
As Apple's MPS it has no float64.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
# torch's thread of gradients ends the process where an operation raises; what is wrong there is raised after it.
_IN_GRADIENTS: list[str] = []
_HELD: list[AbstractContextManager[str]] = []
_MOVES = {"aten::_to_copy", "aten::copy_", "aten::_foreach_copy_"}
_INDEXES = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
# They take a tensor without dimensions from another device, as operations that are marked as element by element do.
_ELEMENTWISE = {"aten::where", "aten::masked_fill", "aten::masked_fill_", "aten::fill", "aten::fill_"}


class DeviceMismatchError(RuntimeError):
    """What an accelerator refuses to do."""


class PretendedTensor(Tensor):
    """A tensor of the device; its values are the processor's."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> PretendedTensor:
        if values.dtype == torch.float64:
            _refuse(f"'{NAME}' has no float64, for a tensor of shape {tuple(values.shape)}")
        made: PretendedTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        made.values = values
        return made

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Makes tensors of the device out of the processor's, and has every operation checked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does outside operations: tensors from Python's numbers, and numbers from tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_there(given.get("device")):
            del given["device"]
            return func(*args, **given).to(NAME)
        if func is Tensor.new_tensor and isinstance(args[0], PretendedTensor):
            return torch.tensor(args[1], dtype=args[0].dtype).to(NAME)
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        if func is Tensor.tolist and isinstance(args[0], PretendedTensor):
            return args[0].cpu().tolist()
        found = func(*args, **given)
        if _IN_GRADIENTS:
            raise DeviceMismatchError(_IN_GRADIENTS.pop())
        return found


def _is_there(device: object) -> bool:
    return device is not None and torch.device(device).type == NAME  # type: ignore[call-overload,no-any-return]


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Computes an operation on the processor; returns tensors of the device where an accelerator would."""
    tensors = list(_tensors((args, kwargs)))
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
    _check_devices(func, args, tensors, ours)
    given = dict(kwargs)
    there = bool(ours)
    if given.get("device") is not None:
        there = _is_there(given["device"])
        given["device"] = torch.device("cpu") if there else given["device"]
    generator = given.get("generator")
    if there and generator is not None and generator.device.type != NAME:
        raise DeviceMismatchError(f"{func}: expected a '{NAME}' generator but found '{generator.device}'")
    plain_args, plain_given = _changed((args, given), _values)
    found = func(*plain_args, **plain_given)
    if func._schema.name == "aten::copy_":
        return args[0]
    if not there:
        return found
    # An operation in place returns the tensor that it was given.
    same = {id(tensor.values): tensor for tensor in ours}
    return _changed(found, lambda tensor: same[id(tensor)] if id(tensor) in same else PretendedTensor(tensor))


def _values(tensor: Tensor) -> Tensor:
    return tensor.values if isinstance(tensor, PretendedTensor) else tensor


# What operations take and return is nested in these alone; torch's own trees take longer than the operation.
def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (list, tuple, dict)):
        for part in nested.values() if isinstance(nested, dict) else nested:
            yield from _tensors(part)


def _changed(nested: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(nested, Tensor):
        return change(nested)
    if isinstance(nested, dict):
        return {name: _changed(part, change) for name, part in nested.items()}
    return type(nested)([_changed(part, change) for part in nested]) if isinstance(nested, (list, tuple)) else nested


def _check_devices(func: Any, args: tuple[Any, ...], tensors: list[Tensor], ours: list[PretendedTensor]) -> None:
    name = func._schema.name
    if not ours or len(ours) == len(tensors) or name in _MOVES:
        return
    elementwise = torch.Tag.pointwise in func.tags or name in _ELEMENTWISE
    strangers = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)]
    if name in _INDEXES and isinstance(args[0], PretendedTensor):
        indices = {id(index) for index in args[1] if index is not None}
        strangers = [tensor for tensor in strangers if id(tensor) not in indices]
        elementwise = True
    if any(tensor.ndim or not elementwise for tensor in strangers):
        shapes = [(tuple(tensor.shape), tensor.device.type) for tensor in tensors]
        _refuse(f"{name}: tensors on {NAME} and on the processor: {shapes}")


def _refuse(message: str) -> None:
    if torch._C._current_graph_task_id() == -1:
        raise DeviceMismatchError(message)
    _IN_GRADIENTS[:] = [f"in a gradient, {message}"]


@functools.cache
def _register() -> None:
    # The first gradient of a process starts a thread for every device that torch knows; ours is to have none.
    torch.ones((), requires_grad=True).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _setup_privateuseone_for_python_backend(NAME)


@contextmanager
def pretended_device() -> Iterator[str]:
    """Gives the device's name; inside, this thread can move tensors to it."""
    _register()
    # Otherwise a thread of its own, of which our modes know nothing, computes the gradients on a device.
    with torch.autograd.set_multithreading_enabled(False), _Functions(), _Operations():
        yield NAME


def pretend_in_this_thread() -> None:
    """Does what `pretended_device` does until the thread ends: for the initializer of a pool."""
    _HELD.append(pretended_device())
    _HELD[-1].__enter__()


def brought_back(values: Any) -> Any:
    """Returns values in any nesting with their tensors on the processor."""
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, values)
