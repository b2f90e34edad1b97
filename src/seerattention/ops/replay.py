"""Replays: what a function launches for tensors of one geometry is found out once, and then launched again.

Of a layer's prefill most of the host's time goes into what is the same in every layer and every forward: checks, the
choice of implementations and of launch shapes, a dozen small allocations. All of it follows from the *geometry* of the
tensors (shapes, strides, dtypes, device, alignment) and from numbers. So the launches of a call are recorded: which
kernel, on which grid, with which arguments, and where each pointer comes from. The next call with the same geometry
takes new addresses and launches.

That is only right for functions that do nothing but allocate, take views and launch kernels, and whose decisions rest
on no values. A recording sees every other operation of torch (also one that reads a value, or waits for the device),
and such a function is called as it is from then on. A recording keeps no memory but constants, tensors that the
function takes from elsewhere (tables that are cached). While CUDA records a graph, or something is traced, nothing is
replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import dispatch

__all__ = [
    "Replays",
    "capturing",
    "current_stream",
    "facts_of_capture",
    "is_current",
    "may_keep",
    "of_capture",
    "recorder",
    "unrecorded",
]

# Geometries that are kept at a time.
MOST = 256
# Bytes: as the allocators of torch align what they give.
ALIGNMENT = 256

_ALLOCATIONS = ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like")
_local = threading.local()


def recorder() -> Recorder | None:
    """What takes note of the launches of this thread, if anything does."""
    return getattr(_local, "recorder", None)


def unrecorded() -> AbstractContextManager[Any]:
    """What is done in here is no part of a recording: for tensors that are kept, which to a recording are constants."""
    return nullcontext() if recorder() is None else _disable_current_modes()


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a CUDA graph, and no value can be looked at."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def may_keep(device: torch.device) -> bool:
    """Whether a tensor that is made on a device now is this process's to keep: nothing is traced or captured."""
    return not torch.compiler.is_compiling() and not capturing(device)


def of_capture(facts: dict[Any, Any] | None) -> None:
    """Say where what this thread computes while a CUDA graph is captured may be kept: until the next call of this."""
    _local.facts = facts


def facts_of_capture() -> dict[Any, Any] | None:
    """What :func:`of_capture` was given last."""
    return getattr(_local, "facts", None)


def current_stream(device: torch.device) -> int:
    """A number for the stream on which the work of a CUDA device is queued now; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


def is_current(index: int, stream: int) -> bool:
    """Whether a CUDA device, by its number, is the present one, and work for it queues on a stream now."""
    return torch._C._cuda_getDevice() == index and torch._C._cuda_getCurrentRawStream(index) == stream


class Recorder(TorchDispatchMode):
    """Takes note of what a function launches and allocates.

    Attributes:
        problem: the first operation that cannot be replayed, or None.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.problem: str | None = None
        self.inputs = inputs
        self.steps: list[tuple[Any, list[Any]]] = []
        self.allocated: dict[int, Tensor] = {}  # by address; alive, so that no address is given twice

    def __enter__(self) -> Recorder:
        super().__enter__()
        _local.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        _local.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in _ALLOCATIONS:
            self.allocated[result.untyped_storage().data_ptr()] = result
        elif not _is_view(func):
            self.problem = self.problem or f"it calls {func}"
        return result

    def add(self, step: Any, args: Sequence[Any]) -> None:
        """A launch; ``step.bind`` gives what does it again, see ``triton_launch.py``."""
        self.steps.append((step, list(args)))

    def finish(self, results: Sequence[Tensor], stream: int = 0) -> Recording | None:
        """What to replay; None: it cannot be, or not be sure to be right."""
        if self.problem is None and self.steps:
            try:
                return Recording(self, results, stream)
            except _Unknown as error:
                self.problem = str(error)
        return None


class _Unknown(Exception):
    """An address of which it is not known where it comes from."""


def _is_view(func: Any) -> bool:
    """Whether an operation of torch gives other views of its arguments only."""
    returned = func._schema.returns
    return bool(returned) and all(x.alias_info is not None and not x.alias_info.is_write for x in returned)


class Recording:
    """The launches of one geometry: kernels, arguments, and in their places what is new in each call.

    Addresses are counted from *bases*: the input tensors, then the results, then one piece of memory for everything
    in between.
    """

    def __init__(self, recorder: Recorder, results: Sequence[Tensor], stream: int) -> None:
        self.inputs = len(recorder.inputs)
        self.device = recorder.inputs[0].device
        storages: dict[int, list[int]] = {}  # of the bases
        for index, x in enumerate(recorder.inputs):
            storages.setdefault(x.untyped_storage().data_ptr(), []).append(index)
        self.results = []
        starts = [x.data_ptr() for x in recorder.inputs]
        for index, x in enumerate(results):
            storage = x.untyped_storage().data_ptr()
            whole = x.numel() * x.element_size() == x.untyped_storage().nbytes() and x.storage_offset() == 0
            if storage not in recorder.allocated or storage in storages or not whole:
                raise _Unknown("a result is not memory of its own")
            storages[storage] = [self.inputs + index]
            starts.append(x.data_ptr())
            self.results.append((tuple(x.shape), x.stride(), x.dtype))
        self.workspace = 0
        between: dict[int, int] = {}
        for storage, x in recorder.allocated.items():
            if storage not in storages:
                between[storage] = self.workspace
                self.workspace += -(-x.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        last = self.inputs + len(results)

        def place(x: Tensor) -> tuple[int, int] | None:
            """Number of the base, and bytes from there on; None: a constant."""
            storage, address = x.untyped_storage().data_ptr(), x.data_ptr()
            if storage in between:
                return last, between[storage] + address - storage
            known = storages.get(storage)
            if known is None:
                return None
            for index in known:
                if address == starts[index]:
                    return index, 0
            if len(known) > 1:
                raise _Unknown("an address lies in memory that inputs share")
            return known[0], address - starts[known[0]]

        self.steps = []
        for step, args in recorder.steps:
            places = []
            for position, value in enumerate(args):
                tensor = step.tensor_of(value)
                found = None if tensor is None else place(tensor)
                if found is not None:
                    args[position], mapped = step.forgotten(value)
                    places.append((position, *found, mapped))
            self.steps.append(step.bind(args, places, stream))

    def replay(self, addresses: list[int]) -> tuple[Tensor, ...]:
        """Launch everything again; the results.

        Args:
            addresses: of the input tensors; those of the results are put behind them.
        """
        results = self.new_results()
        addresses += [x.data_ptr() for x in results]
        between = self.new_workspace()
        if between is not None:
            addresses.append(between.data_ptr())
        self.launch(addresses)
        return tuple(results)

    def new_results(self) -> list[Tensor]:
        """Memory for the results."""
        device = self.device
        return [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in self.results]

    def new_workspace(self) -> Tensor | None:
        """Memory for everything in between; None: there is nothing."""
        return torch.empty(self.workspace, dtype=torch.uint8, device=self.device) if self.workspace else None

    def launch(self, addresses: Sequence[int]) -> None:
        """Launch everything again, given the addresses of all bases."""
        for launch, before, template, places, mapped in self.steps:
            args = [*template]
            for position, base, offset in places:
                args[position] = addresses[base] + offset
            for position, base, offset in mapped:
                args[position] = args[position][addresses[base] + offset]
            if before:
                launch(*before, args)
            else:
                launch(*args)


class Replays:
    """Calls functions that launch kernels, and replays them where their geometry has been seen before.

    A geometry is recorded in its second call: the first one compiles kernels and fills caches. With ``passing``, of
    functions whose geometry is another one in every step of decoding and the same in its layers, that is so for the
    first call with some settings only.
    """

    def __init__(self, passing: bool = False) -> None:
        # 0: called once, which compiles its kernels; None: it cannot be replayed.
        self._known: dict[Hashable, Recording | int | None] = {}
        self._warm: set[Hashable] | None = set() if passing else None  # settings that have been called

    def call(
        self,
        function: Callable[[], tuple[Tensor, ...]],
        tensors: Sequence[Tensor],
        *settings: Hashable,
    ) -> tuple[Tensor, ...]:
        """``function()``, or what it launched the last time, on ``tensors`` as they are now.

        Args:
            function: computes from ``tensors``, of which it may look at the geometry only, and gives fresh tensors.
            tensors: everything that changes from call to call, parameters of modules too; all on one device.
            settings: what else the function depends on.
        """
        if torch.compiler.is_compiling():
            return function()
        device = tensors[0].device
        if not _may_replay(device):
            return function()
        stream = current_stream(device)
        addresses = [x.data_ptr() for x in tensors]
        key = _name(tensors, addresses, settings, stream)
        known = self._known.get(key, 1)
        if known.__class__ is Recording:
            return known.replay(addresses)  # type: ignore[union-attr]
        if known is None:
            return function()
        if known == 1:
            if len(self._known) >= MOST:
                self._known.clear()
            if self._warm is None or settings not in self._warm:
                if self._warm is not None:
                    self._warm.add(settings)
                self._known[key] = 0
                return function()
        # Views, and the memory that the function allocates, are to be seen one by one: inference mode hides steps.
        with torch.inference_mode(False), torch.no_grad(), Recorder(tensors) as noting:
            results = function()
        self._known[key] = noting.finish(results, stream)
        return results

    def recorded(self, tensors: Sequence[Tensor], *settings: Hashable) -> Recording | None:
        """What :meth:`call` replays for such arguments; None: it does not."""
        device = tensors[0].device
        if torch.compiler.is_compiling() or not _may_replay(device):
            return None
        addresses = [x.data_ptr() for x in tensors]
        known = self._known.get(_name(tensors, addresses, settings, current_stream(device)))
        return known if isinstance(known, Recording) else None


def _may_replay(device: torch.device) -> bool:
    """Whether launches on a device are replayed now. Where another recording is under way, they are a part of it."""
    launcher = _launcher(device)
    return launcher is not None and recorder() is None and may_keep(device) and bool(launcher.ready(device))


def _name(tensors: Sequence[Tensor], addresses: Sequence[int], settings: Hashable, stream: int) -> tuple[Any, ...]:
    """All that launches follow from."""
    geometry = [(x.shape, x.stride(), x.dtype, address & 15) for x, address in zip(tensors, addresses, strict=True)]
    return settings, stream, tensors[0].device, *geometry


def _launcher(device: torch.device) -> Any:
    """What knows how kernels are launched on a device; None: there are none."""
    if dispatch.device_type(device) != "cuda" or not dispatch.triton_importable():
        return None
    from . import triton_launch  # imported late: triton is an optional dependency

    return triton_launch
