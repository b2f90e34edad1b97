"""Launches of Triton kernels, bound once: what the JIT looks up in every call is looked up for the first one only.

``kernel[grid](...)`` takes 20 to 60 us of the host: it binds the arguments, specialises each of them, makes strings of
the options, and asks the driver about every pointer. A kernel's variant follows from less: dtypes, constants, and of
each integer whether it is 1, a multiple of 16, or wide. Here that is the key of a table of compiled kernels, which are
what the JIT gave for the first such call; so a variant can never be another one than the JIT's own. Where this triton
is not one whose launchers are known (``VERSIONS``), kernels are interpreted, or somebody listens to launches, all goes
the ordinary way.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
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
# Addresses of which a launch keeps the tensor map: allocators give the same few again and again.
MOST_MAPS = 256

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
        if _is_descriptor(value):
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
        elif _is_descriptor(value):
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
        self.below = _below(compiled)
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


def _is_descriptor(value: Any) -> bool:
    return hasattr(value, "block_shape")


# ---- below the launcher in Python ------------------------------------------------------------------------------------


class Below:
    """The function in C that a launcher of triton calls in the end, for variants that need no scratch memory.

    The launcher asks about scratch memory, and encodes the tensor maps of descriptors, in every launch.

    Attributes:
        launch: the function.
        maps: what triton knows of the tensor map of each descriptor.
        decompose: the arguments that stand for a descriptor, its tensor map first.
    """

    def __init__(self, compiled: Any) -> None:
        from triton.backends.nvidia import driver as nvidia

        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            raise AttributeError("scratch memory")
        self.launch: Callable[..., Any] = launcher.launch
        self.maps: tuple[dict[str, Any] | None, ...] = ()
        if inspect.isfunction(launcher.launch) and launcher.launch.__name__ == "inner":
            known = inspect.getclosurevars(launcher.launch).nonlocals
            self.launch, self.maps = known["launcher"], tuple(known["tensordesc_meta"])
        self.encode = nvidia.make_tensordesc_arg
        function, packed = compiled.function, compiled.packed_metadata
        modes = launcher.launch_cooperative_grid, launcher.launch_pdl
        # No scratch memory, and nobody who listens: see ``_somebody_listens``.
        if triton.__version__.startswith("3.6."):
            self.fixed, self.in_one = (function, *modes, None, None, packed, None, None, None), None
        else:
            self.fixed = function, *modes, packed, None, None, None, None, None
            self.in_one = launcher.arg_annotations, launcher.kernel_signature

    def takes(self, args: list[Any]) -> bool:
        """Whether it is known how every argument is given to it."""
        described = sum(map(_is_descriptor, args))
        return described == len(self.maps) and all(known and not known["fp4_padded"] for known in self.maps)

    def decompose(self, descriptor: Any, known: Any) -> list[Any]:
        maps = TensorMaps(descriptor, lambda moved: self.encode(moved, known)[0])
        return [maps, *descriptor.shape, *descriptor.strides]

    def bind(self, grid: tuple[int, ...], stream: int) -> tuple[tuple[Any, ...], bool]:
        """What :attr:`launch` is called with before the arguments of the kernel, and whether it takes these in one."""
        return (*grid, stream, *self.fixed, *(self.in_one or ())), self.in_one is not None


class TensorMaps(dict[int, Any]):
    """The tensor maps of one descriptor by the address of its memory, which are slow to encode; those of addresses
    where it has not been are encoded when they are asked for."""

    def __init__(self, descriptor: Any, encode: Callable[[Any], Any]) -> None:
        self.descriptor, self.encode = descriptor, encode

    def __missing__(self, address: int) -> Any:
        if len(self) >= MOST_MAPS:
            self.clear()
        found = self[address] = self.encode(_moved(self.descriptor, _Address(address)))
        return found


def _below(compiled: Any) -> Below | None:
    """None: a launcher that is not built as those that are known, which is then called itself."""
    try:
        return Below(compiled)
    except (AttributeError, ImportError, KeyError, TypeError):
        return None


# ---- replays ---------------------------------------------------------------------------------------------------------


def ready(device: torch.device) -> bool:
    """Whether launches on a device may be replayed now: it is the present one, and nobody listens."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return False
    return KNOWN and not _somebody_listens()


# Position among the arguments, number of the base, bytes from there on, and whether what stands in the place gives the
# argument by the address.
Place = tuple[int, int, int, bool]
# What is called; with what before a list of arguments (nothing: with the arguments one by one); the arguments; where
# addresses belong in them; and where what stands in a place is asked for its entry of the address.
Step = tuple[Callable[..., Any], tuple[Any, ...], list[Any], list[tuple[int, ...]], list[tuple[int, ...]]]


def _step(launch: Callable[..., Any], before: tuple[Any, ...], args: list[Any], places: list[Place]) -> Step:
    plain, mapped = ([tuple(place) for *place, kind in places if kind is wanted] for wanted in (False, True))
    return launch, before, args, plain, mapped


class Launch:
    """A launch of a compiled kernel that was noted down, see ``replay.Recorder``: it takes addresses."""

    def __init__(self, bound: Bound, grid: tuple[int, ...]) -> None:
        self.bound, self.grid = bound, grid

    def tensor_of(self, value: Any) -> Tensor | None:
        """The tensor whose address an argument is."""
        return _tensor_of(value)

    def forgotten(self, value: Any) -> tuple[Any, bool]:
        """What stands in the place of an argument whose address is another one in each call, and whether that gives
        the argument by the address."""
        return (None, False) if isinstance(value, Tensor) else (_Moving(value), True)

    def bind(self, args: list[Any], places: list[Place], stream: int) -> Step:
        below = self.bound.below
        descriptors = [value.descriptor if isinstance(value, _Moving) else value for value in args]
        if below is None or not below.takes(descriptors):
            bound, grid = self.bound, self.grid
            return _step(lambda *args: bound.run(grid, args, stream), (), args, places)
        flat: list[Any] = []
        starts, maps = [], iter(below.maps)
        for value in descriptors:
            starts.append(len(flat))
            flat += below.decompose(value, next(maps)) if _is_descriptor(value) else [value]
        flat += self.bound.constants
        before, in_one = below.bind((*self.grid, 1, 1)[:3], stream)
        skipped = 0 if in_one else len(before)
        moved = [(skipped + starts[position], *rest) for position, *rest in places]
        return _step(below.launch, before if in_one else (), flat if in_one else [*before, *flat], moved)  # type: ignore


class Ordinary:
    """A launch of an interpreted kernel, which takes tensors."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.kernel, self.grid, self.constants = kernel, grid, constants

    def tensor_of(self, value: Any) -> Tensor | None:
        return _tensor_of(value)

    def forgotten(self, value: Any) -> tuple[Any, bool]:
        return _Memory(value), True

    def bind(self, args: list[Any], places: list[Place], stream: int) -> Step:
        kernel, grid, constants = self.kernel, self.grid, self.constants
        return _step(lambda *args: kernel[grid](*args, **constants), (), args, places)


def _tensor_of(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    return value.base if _is_descriptor(value) else None


class _Address:
    """In place of a tensor, where only its address is asked for."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Moving:
    """A descriptor at whatever address is asked for."""

    def __init__(self, descriptor: Any) -> None:
        self.descriptor = _moved(descriptor, None)

    def __getitem__(self, address: int) -> Any:
        return _moved(self.descriptor, _Address(address))


def _moved(descriptor: Any, base: Any) -> Any:
    moved = object.__new__(descriptor.__class__)
    moved.__dict__.update(descriptor.__dict__)
    moved.base = base
    return moved


class _Memory:
    """Tensors over as much memory of the host as a tensor spans, at whatever address is asked for."""

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype
        self.count = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))

    def __getitem__(self, address: int) -> Tensor:
        buffer = (ctypes.c_char * (self.count * self.dtype.itemsize)).from_address(address)
        return torch.frombuffer(buffer, dtype=self.dtype)
