"""Launches of compiled kernels on a GPU that is not there: what the JIT would launch, what is bound, what is replayed.

A driver that only names a GPU compiles every kernel for it and keeps a note of each launch instead of doing it. This
must be a process of its own with TRITON_INTERPRET unset, as in `tests/ops/test_launch.py`:

    env -u TRITON_INTERPRET python tests/unlaunched.py [launcher | c]

``launcher``: notes are taken in the place of triton's launcher in Python; ``c``: below it, of what it gives to the
function in C, tensor maps included.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
import types

import torch
import triton
import triton.backends.nvidia.driver as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import LazyDict
from triton.knobs import HookChain

import seerattention as seer
from seerattention.gates import build_gate
from seerattention.ops import Span, block_sparse_attention, dispatch, triton_launch
from seerattention.policies import REPLAYED
from seerattention.selectors import GateSelector, LayerInputs

noted, held, encoded = [], [], []
loaded = itertools.count(1)


class Launcher:
    """What triton calls to launch: takes a note."""

    def __init__(self, src, metadata):
        self.name, self.signature = metadata.name, list(src.signature.values())
        self.variant = str((metadata.hash, metadata.num_warps, metadata.num_stages))

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        values = []
        held.append(args)  # so that no address is given twice
        for kind, value in zip(self.signature, args, strict=True):
            if kind.startswith("*"):
                address = value if isinstance(value, int) else value.data_ptr()
                values.append(("address", address))
            elif kind.startswith("tensordesc"):
                values.append(("address", value.base.data_ptr(), tuple(value.shape), tuple(value.strides)))
            elif kind != "constexpr":
                values.append(value)
        noted.append((self.name, self.variant, (x, y, z), values))


class TensorMap:
    def __init__(self, *fields):
        self.fields = fields


def launch_in_c(*given):
    """What the launcher in Python calls in the end: takes a note."""
    whole = given[:-1] + tuple(given[-1]) if isinstance(given[-1], tuple | list) else given
    held.append(whole)
    values = []
    for value in whole[5:]:
        if isinstance(value, TensorMap):
            values.append(("address", *value.fields))
        elif isinstance(value, torch.Tensor):
            values.append(("address", value.data_ptr()))
        elif isinstance(value, int) and value > 1 << 40:  # no stride of these tensors is
            values.append(("address", value))
        elif isinstance(value, LazyDict | HookChain):  # for listeners, of whom there are none
            values.append(None)
        else:
            values.append(value if value is None or isinstance(value, int | float | str) else type(value))
    noted.append((names[whole[4]], whole[4], whole[:3], values))


names = {}


class Utils:
    launch = staticmethod(launch_in_c)
    build_signature_metadata = list

    def fill_tma_descriptor(self, *fields):
        encoded.append(fields)
        return TensorMap(*(tuple(field) if isinstance(field, list) else field for field in fields))

    fill_tma_descriptor_tiled = fill_tma_descriptor

    def load_binary(self, name, *given):
        function = next(loaded)
        names[function] = name
        return 1, function, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


IN_C = sys.argv[1:] == ["c"]
nvidia.compile_module_from_src = lambda *args, **options: types.SimpleNamespace(launch=launch_in_c)
nvidia.library_dirs = list
nvidia.PyKernelArg = lambda **fields: tuple(fields.items())


class Driver:
    utils, launcher_cls = Utils(), nvidia.CudaLauncher if IN_C else Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


triton.runtime.driver.set_active(Driver())
dispatch.device_type = lambda device: "cuda"
dispatch.hopper_unusable = functools.cache(lambda device: None)
dispatch.multiprocessors = lambda device: 132
dispatch.shared_memory = lambda device: 232448
dispatch.capability = lambda device: 9


def launches_of(function):
    """The launches of a call, addresses by where they first occur."""
    noted.clear()
    function()
    held.clear()
    places: dict[int, int] = {}
    return [
        (name, variant, grid, [
            (places.setdefault(value[1], len(places)), *value[2:]) if isinstance(value, tuple) else value
            for value in values
        ])
        for name, variant, grid, values in noted
    ]  # fmt: skip


def layer(gate, length, policy, dtype=torch.bfloat16):
    def make(heads):
        return torch.randn(1, length, heads, 64).to(dtype).transpose(1, 2)

    table = torch.randn(1, length, 64).to(dtype)
    inputs = LayerInputs(0, make(4), make(2), make(2), make(4), make(2), table, table.neg(), None, 0.125, gate)
    blocks = GateSelector(policy).select(inputs)
    return block_sparse_attention(inputs.q, inputs.k, inputs.v, blocks, scale=inputs.scale)


@torch.inference_mode()
def check_layers():
    spec = seer.GateConfig().spec_of("prefill")
    gate = build_gate(spec, num_heads=4, num_kv_heads=2, head_dim=64, block_size=64).bfloat16().requires_grad_(False)
    for length, policy in itertools.product((200, 1024), (seer.TopK(0.2), seer.Threshold(0.1), seer.TokenBudget(128))):
        torch.manual_seed(0)
        triton_launch.KNOWN = False
        expected = launches_of(lambda length=length, policy=policy: layer(gate, length, policy))
        triton_launch.KNOWN = True
        assert len(expected) in (5, 6), [name for name, *_ in expected]  # lists in parts are merged
        for _ in range(4):  # ordinary, bound and recorded, replayed, replayed
            torch.manual_seed(0)
            found = launches_of(lambda length=length, policy=policy: layer(gate, length, policy))
            assert found == expected, (found, expected)
    from seerattention.ops.block_sparse_attention import interface  # noqa: F401
    from seerattention.selectors import _LISTS

    assert sum(type(known).__name__ == "Recording" for known in _LISTS._known.values()) == 6


def chunk(gate, queries, keys, policy, at_once=True, dtype=torch.bfloat16):
    def make(heads, length):
        return torch.randn(1, length, heads, 64).to(dtype).transpose(1, 2)

    table, span = torch.randn(1, keys, 64).to(dtype), Span(1, queries, keys)
    tensors = make(4, queries), make(2, keys), make(2, keys), make(4, queries), make(2, queries)
    inputs = LayerInputs(0, *tensors, table, table.neg(), None, 0.125, gate, span=span)
    selector = GateSelector(policy)
    if at_once:
        return selector.attend_at_once(inputs)
    return block_sparse_attention(inputs.q, inputs.k, inputs.v, selector._select(inputs), scale=inputs.scale)


CHUNKS = [(128, 512), (128, 640), (100, 740), (128, 2048)]  # that begin with a block, and inside of one
POLICIES = [
    seer.TopK(0.2), seer.TopK(0.2, uniform=True), seer.TopK(0.3, last_blocks_dense=1), seer.Threshold(0.1),
    seer.RelativeThreshold(1.0), seer.RelativeThreshold(0.4, exponent=0.5), seer.TopP(0.7), seer.TokenBudget(128),
    seer.Budget(0.3, blocks=(2.0, 9.0), factors=(0.5, 1.5)),
]  # fmt: skip


@torch.inference_mode()
def check_chunks():
    """A chunk is nothing but launches, with every policy and form of gate, and a new number of keys is recorded when it
    is first seen."""
    from seerattention.selectors import _CHUNKS

    assert {type(policy) for policy in POLICIES} == REPLAYED
    forms = seer.GateConfig(), seer.GateConfig(prefill=seer.SubBlockGateConfig())
    for config, policy in itertools.product(forms, POLICIES):
        gate = build_gate(config.spec_of("prefill"), num_heads=4, num_kv_heads=2, head_dim=64, block_size=64)
        gate.bfloat16().requires_grad_(False)
        _CHUNKS._known.clear()
        for number, (queries, keys) in enumerate(CHUNKS):
            torch.manual_seed(0)
            triton_launch.KNOWN = False
            expected = launches_of(lambda *given: chunk(gate, queries, keys, policy, at_once=False))  # noqa: B023
            triton_launch.KNOWN = True
            assert 7 <= len(expected) <= 8, [name for name, *_ in expected]  # lists in parts are merged
            for _ in range(4):
                torch.manual_seed(0)
                found = launches_of(lambda *given: chunk(gate, queries, keys, policy))  # noqa: B023
                assert found == expected, (found, expected)
                kinds = [type(known).__name__ for known in _CHUNKS._known.values()]
                assert len(kinds) == number + 1
                assert kinds.count("Recording") >= number, kinds
            assert kinds.count("Recording") == number + 1, (config, policy, kinds)


def check_variants():
    """Wherever the JIT tells two calls apart, so does the key; of random arguments of every kernel's parameters."""
    from triton.runtime.jit import native_specialize_impl

    from seerattention.ops.block_pooling.triton import block_pooling_fwd_kernel
    from seerattention.ops.gate_scores.triton_encode import project_rotate_kernel

    backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
    numbers = [
        0,
        1,
        2,
        15,
        16,
        17,
        32,
        -1,
        -16,
        2**31 - 1,
        2**31,
        2**31 + 16,
        -(2**31),
        -(2**31) - 16,
        2**40,
        2**40 + 1,
    ]
    memory = [torch.zeros(64, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int32)]
    values = [*numbers, None, 0.5, 1.0, *[x[i:] for x in memory for i in (0, 1, 4, 8)]]
    choose = random.Random(0)
    for kernel in (block_pooling_fwd_kernel, project_rotate_kernel):
        free = [parameter for parameter in kernel.params if not parameter.is_constexpr]
        seen = {}
        for _ in range(20000):
            args = tuple(choose.choice(values) for _ in range(3)) + (16,) * (len(free) - 3)
            order = choose.sample(range(len(free)), len(free))
            args = tuple(args[i] for i in order)
            special = tuple(
                native_specialize_impl(backend, value, False, not parameter.do_not_specialize, True)
                for value, parameter in zip(args, free, strict=True)
            )
            key = triton_launch._variant(kernel, args, {})
            assert key is not None
            assert seen.setdefault(key, special) == special, (args, special, seen[key])


def check_below():
    """Replays call the function in C themselves, and encode a tensor map once for each address."""
    from seerattention.ops.block_sparse_attention import interface

    recordings = [known for known in interface._ATTENTION._known.values() if type(known).__name__ == "Recording"]
    maps = [value for known in recordings for step in known.steps for value in step[2]]
    maps = [value for value in maps if isinstance(value, triton_launch.TensorMaps)]
    assert maps
    for one in maps:
        address = torch.zeros(64).data_ptr()
        encoded.clear()
        first = one[address]
        assert one[address] is first
        assert one[address + 64] is not first
        assert [fields[0] for fields in encoded] == [address, address + 64]
    before = triton_launch.MOST_MAPS
    triton_launch.MOST_MAPS = 4
    for offset in range(0, 160, 16):
        maps[0][address + offset]
    assert len(maps[0]) <= 4
    triton_launch.MOST_MAPS = before


check_layers()
check_chunks()
if IN_C:
    check_below()
else:
    check_variants()
print("same")
