"""Runs the Python of a Gluon kernel on CPU tensors, one program after the other, to test its logic without a GPU.

Covers what the Hopper kernels use: pointers with bounds, TMA tiles with zero fill, barriers with phases, asynchronous
products. Layouts are ignored, and so is how threads share the work. What a GPU would do at some unknown time happens as
late as allowed, and until then shows: a buffer that is being filled holds NaN until its barrier is waited for, and a
product is no tensor until it is waited for.
"""

from __future__ import annotations

import functools
import itertools
import types

import torch


class Pointer:
    """An address inside the memory of a tensor, or a tensor of addresses."""

    def __init__(self, tensor, offset=0):
        self.memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self.offset = offset if isinstance(offset, torch.Tensor) else torch.tensor(offset)
        self.start = tensor.storage_offset()

    def __add__(self, step):
        other = object.__new__(Pointer)
        other.memory, other.start, other.offset = self.memory, self.start, self.offset + step
        return other

    def index(self):
        return self.start + self.offset.long()


class Shared:
    """A buffer in shared memory."""

    def __init__(self, tensor):
        self.tensor = tensor

    @property
    def shape(self):
        return self.tensor.shape

    def reshape(self, shape):
        return Shared(self.tensor.view(shape))

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def index(self, i):
        return Shared(self.tensor[int(i)])

    def store(self, value):
        assert value.dtype == self.tensor.dtype
        self.tensor.copy_(value)

    def load(self, layout):
        return self.tensor.clone()


class Barrier:
    """An mbarrier that is completed by one expected number of bytes at a time."""

    def __init__(self):
        self.phase, self.expected, self.copies = 0, 0, []


class Barriers(list):
    """A row of mbarriers."""

    def index(self, i):
        return self[int(i)]


class Pending:
    """The result of an asynchronous product before it is waited for."""

    started = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Pending.started += 1
        self.number = Pending.started

    def finish(self, outstanding):
        """The tensor, which is there where no more than ``outstanding`` products may still be under way."""
        assert outstanding <= Pending.started - self.number, "waits for an earlier product only"
        return self.tensor


class Descriptor:
    """A host-side tensor descriptor as the kernel sees it."""

    def __init__(self, host):
        self.view = host.base.as_strided(host.shape, host.strides)
        self.block_shape, self.layout, self.dtype = host.block_shape, host.layout, host.base.dtype
        numel = torch.Size(host.block_shape).numel()
        self.block_type = types.SimpleNamespace(nbytes=numel * host.base.element_size())

    def tile(self, coordinates):
        """The tile at these coordinates; zero outside of the tensor. A tile far outside is a wrong coordinate."""
        tile = torch.zeros(self.block_shape, dtype=self.dtype)
        source, target = [], []
        for start, size, length in zip(map(int, coordinates), self.block_shape, self.view.shape, strict=True):
            # A block of 64 tokens may be copied in parts, some of which lie outside.
            margin = max(size, 64) if size > 1 else 1
            assert -margin < start < length + margin, f"tile at {start} of a dimension of {length}"
            low, high = min(max(start, 0), length), min(start + size, length)
            high = max(low, high)
            source.append(slice(low, high))
            target.append(slice(low - start, high - start) if high > low else slice(0, 0))
        tile[tuple(target)] = self.view[tuple(source)]
        return tile


def _allocate(dtype, shape, layout):
    if dtype == torch.int64 and len(shape) == 2:
        return Barriers(Barrier() for _ in range(shape[0]))
    return Barrier() if dtype == torch.int64 else Shared(torch.full(shape, float("nan"), dtype=dtype))


def _load(pointer, mask=None, other=0):
    return pointer.memory[pointer.index()] if mask is None or mask is True else _masked_load(pointer, mask, other)


def _masked_load(pointer, mask, other):
    mask = torch.as_tensor(mask)
    return torch.where(mask, pointer.memory[torch.where(mask, pointer.index(), 0)], other)


def _store(pointer, value, mask=True):
    index, mask, value = torch.broadcast_tensors(pointer.index(), torch.as_tensor(mask), value)
    index = index[mask]
    assert bool((index >= 0).all()), "store before the memory"
    pointer.memory[index] = value[mask].to(pointer.memory.dtype)


def _expect(barrier, nbytes, pred=True):
    if pred:
        assert not barrier.expected, "a barrier can be armed only once a phase"
        barrier.expected = nbytes


def _copy(descriptor, coordinates, barrier, shared, pred=True):
    if pred:
        tile = descriptor.tile(coordinates)
        assert tile.shape == shared.tensor.shape
        shared.tensor.fill_(float("nan"))
        barrier.copies.append((shared, tile))


def _wait(barrier, phase, pred=True):
    if not pred:
        return
    if int(phase) != barrier.phase:  # the phase before: it is over, and nothing may be under way
        assert not barrier.expected, "waits for the wrong phase"
        return
    assert barrier.expected == sum(tile.nbytes for _, tile in barrier.copies) > 0, "would wait for ever"
    for shared, tile in barrier.copies:
        shared.tensor.copy_(tile)
    barrier.phase, barrier.expected, barrier.copies = barrier.phase ^ 1, 0, []


def _copy_back(descriptor, coordinates, shared):
    """TMA store; tiles are clipped to the tensor."""
    target, source = [], []
    for start, size, length in zip(map(int, coordinates), descriptor.block_shape, descriptor.view.shape, strict=True):
        assert -size < start < length + size, f"tile at {start} of a dimension of {length}"
        low = max(start, 0)
        high = max(low, min(start + size, length))
        target.append(slice(low, high))
        source.append(slice(low - start, high - start))
    descriptor.view[tuple(target)] = shared.tensor[tuple(source)]


def _range(*bounds):
    return (torch.tensor(i, dtype=torch.int32) for i in range(*map(int, bounds)))


def _product(a, b, acc, *, use_acc=True, is_async=False):
    a, b = (x.tensor if isinstance(x, Shared) else x for x in (a, b))
    assert a.dtype == b.dtype
    assert a.dtype.itemsize == 2
    product = a.float() @ b.float()
    return Pending(acc + product if use_acc else product)


def _wait_for_products(outstanding, deps):
    """The first of ``deps`` is a product; other tensors only go through."""
    done = deps[0].finish(outstanding)
    return done if len(deps) == 1 else (done, *deps[1:])


def _of_tensors(function, *values):
    return function(*map(torch.as_tensor, values))


def run(kernel, grid, args, constants):
    """Run a Gluon kernel for every program of a grid of up to three dimensions. Tensors become pointers."""
    grid = (*grid, 1, 1)[:3]
    program, barriers = [0, 0, 0], []

    def allocate(*arguments):
        buffer = _allocate(*arguments)
        barriers.extend(buffer if isinstance(buffer, Barriers) else [buffer] if isinstance(buffer, Barrier) else [])
        return buffer

    ignored = {
        name: lambda *args, **kwargs: None
        for name in (
            "NVMMADistributedLayout",
            "DotOperandLayout",
            "SliceLayout",
            "BlockedLayout",
            "DistributedLinearLayout",
        )
    }
    gl = types.SimpleNamespace(
        **ignored,
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        constexpr=None,
        program_id=lambda axis: torch.tensor(program[axis], dtype=torch.int32),
        num_programs=lambda axis: torch.tensor(grid[axis], dtype=torch.int32),
        allocate_shared_memory=allocate,
        load=_load,
        store=_store,
        arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        convert_layout=lambda value, layout, assert_trivial=False: value,
        split=lambda value: value.unbind(-1),
        fma=lambda a, b, c: a * b + c,
        where=functools.partial(_of_tensors, torch.where),
        static_range=range,
        exp2=torch.exp2,
        log2=torch.log2,
        sqrt=torch.sqrt,
        max=torch.amax,
        sum=torch.sum,
        maximum=functools.partial(_of_tensors, torch.maximum),
        minimum=functools.partial(_of_tensors, torch.minimum),
    )
    names = {
        **vars(__import__(kernel.fn.__module__, fromlist=["_"])),
        "gl": gl,
        "mbarrier": types.SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda barrier, count: None, expect=_expect, wait=_wait
        ),
        "tma": types.SimpleNamespace(
            async_copy_global_to_shared=_copy,
            async_copy_shared_to_global=_copy_back,
            store_wait=lambda pending: None,
        ),
        "fence_async_shared": lambda: None,
        "_barrier": lambda: None,
        "thread_barrier": lambda: None,
        "range": _range,
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": _wait_for_products,
    }
    for name, value in list(names.items()):
        if type(value).__name__ == "GluonJITFunction":
            names[name] = types.FunctionType(value.fn.__code__, names, name)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value

    def convert(value):
        if isinstance(value, torch.Tensor):
            return Pointer(value)
        return Descriptor(value) if hasattr(value, "block_shape") else value

    function = types.FunctionType(kernel.fn.__code__, names, kernel.fn.__name__)
    for program[:] in itertools.product(*map(range, grid)):
        function(*map(convert, args), **constants)
        assert not any(barrier.copies for barrier in barriers), "ends with a copy under way"
        barriers.clear()
