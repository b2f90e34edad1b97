"""Launches of Triton kernels, bound once: what the JIT looks up in every call is looked up for the first one only.

``kernel[grid](...)`` takes 20 to 60 us of the host: it binds the arguments, specialises each of them, makes strings of
the options, and asks the driver about every pointer. A kernel's variant follows from less: dtypes, constants, and of
each integer whether it is 1, a multiple of 16, or wide. Here that is the key of a table of compiled kernels, which are
what the JIT gave for the first such call; so a variant can never be another one than the JIT's own. Where this triton
is not one whose launchers are known (``VERSIONS``), kernels are interpreted, or somebody listens to launches, all goes
the ordinary way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .replay import recorder

__all__ = ["VERSIONS", "launch", "ready"]

# Major and minor versions of triton whose compiled kernels take what ``Bound.run`` gives them.
VERSIONS = ("3.6", "3.7")
KNOWN = ".".join(triton.__version__.split(".")[:2]) in VERSIONS and torch.version.hip is None
# Variants that are kept, of all kernels together.
MOST = 4096

_LOWEST, _HIGHEST = -(1 << 31), (1 << 31) - 1
_bound: dict[tuple[Any, ...], Bound] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the device of the tensors.

    Args:
        kernel: of ``triton.jit`` or ``gluon.jit``.
        grid: up to three numbers of programs.
        args: the parameters that are no constants, in order: tensors, None, numbers, tensor descriptors.
        constants: parameters that are constants, and options of the launch.
    """
    index = _device_index(args)
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            _launch(kernel, grid, args, constants)
    else:
        _launch(kernel, grid, args, constants)


def _launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    noting = recorder()
    if noting is not None:
        with _disable_current_modes():  # an interpreted kernel is many operations of torch
            bound = _run(kernel, grid, args, constants)
        noting.add(Ordinary(kernel, grid, constants) if bound is None else Launch(bound, grid), args)
    else:
        _run(kernel, grid, args, constants)


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Bound | None:
    """Launch; what it is bound to, or None."""
    key = _variant(kernel, args, constants)
    bound = None if key is None else _bound.get(key)
    if bound is None or _somebody_listens():
        compiled = kernel[grid](*args, **constants)
        return None if key is None else _bind(key, kernel, compiled, args, constants)
    active = driver.active
    bound.run(grid, args, active.get_current_stream(active.get_current_device()))
    return bound


def _device_index(args: tuple[Any, ...]) -> int:
    """Of the GPU of the first tensor; -1 elsewhere, where kernels are interpreted."""
    for value in args:
        if isinstance(value, Tensor):
            return value.get_device()
        if hasattr(value, "block_shape"):
            return int(value.base.get_device())
    return -1


def _somebody_listens() -> bool:
    """Whether profilers want to know of every launch, which only the ordinary way tells them."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


def _variant(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the variant of a kernel follows from, at least as finely as the JIT sees it; None: not known."""
    if not KNOWN or not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:
        return None
    # The device by its number: a variant is loaded for each.
    key: list[Any] = [id(kernel), driver.active.get_current_device(), len(args)]
    for value, parameter in zip(args, kernel.params, strict=False):
        kind = value.__class__
        if kind is int:
            fits = _LOWEST <= value <= _HIGHEST
            if parameter.do_not_specialize:
                key.append(fits)
            else:
                key.append(1 if value == 1 else (fits, value & 15 == 0))
        elif kind is float or value is None:
            key.append(kind)
        elif isinstance(value, Tensor):
            key.append(value.dtype)
            key.append(value.data_ptr() & 15 == 0)
        elif hasattr(value, "block_shape"):
            key += (value.base.dtype, tuple(value.block_shape), value.layout, value.padding)
        else:
            return None
    key += constants.items()
    return tuple(key)


class Bound:
    """One variant of a kernel, compiled and loaded, with its constants."""

    def __init__(self, kernel: Any, compiled: Any, constants: tuple[Any, ...]) -> None:
        self.kernel = kernel  # whose address is part of the key
        self.constants = constants
        self.launcher = compiled.run
        self.fixed = (compiled.function, compiled.packed_metadata, None, None, None)

    def run(self, grid: tuple[int, ...], args: Any, stream: int) -> None:
        """Launch it; pointers may be tensors or addresses."""
        x, y, z = (*grid, 1, 1)[:3]
        self.launcher(x, y, z, stream, *self.fixed, *args, *self.constants)


def _bind(
    key: tuple[Any, ...], kernel: Any, compiled: Any, args: tuple[Any, ...], constants: dict[str, Any]
) -> Bound | None:
    """Keep what the JIT has just launched; None: it is not what is known."""
    names = kernel.arg_names[len(args) :]
    if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
        return None
    if compiled.function is None or not all(name in constants for name in names):
        return None
    if len(_bound) >= MOST:
        _bound.clear()
    bound = Bound(kernel, compiled, tuple(constants[name] for name in names))
    _bound[key] = bound
    return bound


# ---- replays ---------------------------------------------------------------------------------------------------------


def ready(device: torch.device) -> bool:
    """Whether launches on a device may be replayed now: it is the present one, and nobody listens."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return False
    return KNOWN and not _somebody_listens()


class _Step:
    """A launch that was noted down, see ``replay.Recorder``."""

    def tensor_of(self, value: Any) -> Tensor | None:
        """The tensor whose address an argument is."""
        if isinstance(value, Tensor):
            return value
        return value.base if hasattr(value, "block_shape") else None


class Launch(_Step):
    """Of a compiled kernel, which takes addresses."""

    def __init__(self, bound: Bound, grid: tuple[int, ...]) -> None:
        self.bound, self.grid = bound, grid

    def run(self, args: Any, stream: int) -> None:
        self.bound.run(self.grid, args, stream)

    def forgotten(self, value: Any) -> Any:
        """An argument without its address, which is another one in each call."""
        return None if isinstance(value, Tensor) else _moved(value, None)

    def mover(self, value: Any) -> Any:
        """What puts an argument to another address; None: it is the address."""
        return None if isinstance(value, Tensor) else _move_descriptor


class Ordinary(_Step):
    """Of an interpreted kernel, which takes tensors."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.kernel, self.grid, self.constants = kernel, grid, constants

    def run(self, args: Any, stream: int) -> None:
        self.kernel[self.grid](*args, **self.constants)

    def forgotten(self, value: Any) -> Any:
        return value.dtype

    def mover(self, value: Any) -> Any:
        return _tensor_at


class _Address:
    """In place of a tensor, where only its address is asked for."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _moved(descriptor: Any, base: Any) -> Any:
    moved = object.__new__(descriptor.__class__)
    moved.__dict__.update(descriptor.__dict__)
    moved.base = base
    return moved


def _move_descriptor(descriptor: Any, base: Tensor, offset: int) -> Any:
    return _moved(descriptor, _Address(base.data_ptr() + offset) if offset else base)


def _tensor_at(dtype: torch.dtype, base: Tensor, offset: int) -> Tensor:
    first = (base.storage_offset() * base.element_size() + offset) // dtype.itemsize
    storage = base.untyped_storage()
    size = storage.nbytes() // dtype.itemsize - first
    return torch.empty(0, dtype=dtype, device=base.device).set_(storage, first, (size,), (1,))  # type: ignore
