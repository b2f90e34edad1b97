"""Compiles the kernels to binaries for GPUs that are not there and prints what the compilers say about each, as JSON.

Every op is called through its own launcher on CPU tensors, with a driver that only names a GPU: each kernel gets the
arguments, constants and options of a real launch, is compiled, and is not run. This must be a process of its own with
TRITON_INTERPRET unset, as in `tests/ops/test_offline_compile.py`. By hand, with another triton than the installed:

    env -u TRITON_INTERPRET PYTHONPATH=/somewhere/triton-3.6 python tests/offline_compile.py [name of an op]
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import itertools
import json
import math
import os
import sys
import tempfile

os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # the log is part of the result, and a cache would have none
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # which takes a tenth of the time and changes no instruction

import torch
import triton
from triton.backends.compiler import GPUTarget

from offline_driver import Compiling, Driver, describe
from offline_gates import (
    encode_blocks,
    gate_scores,
    gate_scores_hopper,
    mass_row_scores,
    mass_scores,
    mass_scores_hopper,
    pool_encode,
    row_scores,
    token_scores,
)
from seerattention.ops import dispatch
from seerattention.ops.block_pooling.reference import Grid
from seerattention.ops.block_selection.reference import Rule
from seerattention.ops.indices import BlockIndices
from seerattention.ops.inverse_rope.interface import MOST_POOLED
from seerattention.ops.pooled_attention.arguments import REDUCTIONS, Wanted
from seerattention.ops.span import Pages, Span

OPS = "seerattention.ops"
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),  # bytes of shared memory that a program may use
    "sm_86": (GPUTarget("cuda", 86, 32), 101376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}


def tensors(head_dim, dtype):
    q = torch.zeros(1, 128, 4, head_dim, dtype=dtype).transpose(1, 2)
    return q, q[:, :2], q[:, :2]


def lists(block_size):
    rows = 128 // block_size
    return BlockIndices.from_mask(torch.ones(1, 4, rows, rows, dtype=torch.bool), block_size)


def span_cases(head_dim, dtype):
    """q, k and lists of padded, packed and paged rows."""
    ones = torch.ones(1, dtype=torch.int32)
    q = torch.zeros(1, 128, 4, head_dim, dtype=dtype).transpose(1, 2)
    pages = Pages(torch.zeros(1, 2, dtype=torch.int32), 64)
    for name, span, slots in (
        ("padded", Span.of_rows(128, 128, start=ones, length=ones), 128),
        ("packed", Span.of_packed(torch.tensor([0, 128], dtype=torch.int32)), 128),
        ("pages", Span.of_rows(128, 128, start=ones, length=ones, pages=pages), 64),
    ):
        rows = span.num_rows(64)
        mask = torch.ones(1, 4, rows, 2, dtype=torch.bool)
        yield name, q, q[:, :2, :slots], BlockIndices.from_mask(mask, 64, span=span)


@contextlib.contextmanager
def in_parts():
    """Launchers of attention cut lists in two, and leave out what puts the results together."""
    module = importlib.import_module(f"{OPS}.block_sparse_attention.triton_parts")
    kept = module.num_parts, module.merge_parts
    module.num_parts, module.merge_parts = lambda *_: 2, lambda *_: None
    yield
    module.num_parts, module.merge_parts = kept


def block_sparse_attention(module, target):
    cases = [(64, 64, torch.bfloat16, False), (128, 64, torch.bfloat16, True)]
    if target == "sm_90":
        cases += [(128, 128, torch.float16, False), (64, 64, torch.float32, True)]
    for head_dim, block_size, dtype, lse in cases:
        yield (
            f"{head_dim} {block_size} {dtype} lse={lse}",
            lambda d=head_dim, b=block_size, t=dtype, lse=lse: module.block_sparse_attention(
                *tensors(d, t), lists(b), 0.1, lse
            ),
        )
    with in_parts():
        yield (
            "128 64 in parts",
            lambda: module.block_sparse_attention(*tensors(128, torch.bfloat16), lists(64), 0.1, False),
        )
    for name, q, k, blocks in span_cases(128, torch.bfloat16):
        call = functools.partial(module.block_sparse_attention, q, k, k, blocks, 0.1, True)
        yield f"128 64 {name}", call


def block_sparse_decode(module, target):
    """A step on padded rows and one on pages, in parts and whole; then what puts parts together."""
    kept = module.num_parts, module.merge_decode_parts_kernel
    module.merge_decode_parts_kernel = collections.defaultdict(lambda: lambda *args, **options: None)
    cases = [(128, 4, torch.bfloat16, 1, 0), (64, 8, torch.float16, 2, 128)]
    if target == "sm_90":
        cases += [(256, 1, torch.bfloat16, 2, 0), (64, 7, torch.float32, 1, 64), (128, 4, torch.bfloat16, 2, 64)]
    ones = torch.ones(1, dtype=torch.int32)
    for head_dim, group, dtype, parts, page in cases:
        q = torch.zeros(1, group * 2, 1, head_dim, dtype=dtype)
        k = torch.zeros(1, 2, page or 128, head_dim, dtype=dtype)
        pages = Pages(torch.zeros(1, 4, dtype=torch.int32), page) if page else None
        span = Span.of_rows(1, 128, start=ones, length=ones, pages=pages) if page else Span(1, 1, 128)
        lists = BlockIndices.from_mask(torch.ones(1, 2, 1, 2, dtype=torch.bool), 64, by_token=True, span=span)
        module.num_parts = lambda *_, parts=parts: parts
        yield (
            f"{head_dim} {group} {dtype} parts={parts} page={page}",
            functools.partial(module.block_sparse_decode, q, k, k, lists, 0.1, True),
        )
    module.num_parts, module.merge_decode_parts_kernel = kept


def merge_parts(module, target):
    for head_dim, dtype, lse in [(128, torch.bfloat16, True), (80, torch.float16, False)]:
        parts, out = torch.zeros(2, 1, 4, 100, head_dim), tensors(head_dim, dtype)[0][:, :, :100]
        yield (
            f"{head_dim} {dtype} lse={lse}",
            functools.partial(module.merge_parts, parts, parts[..., 0], out, parts[0, ..., 0] if lse else None),
        )


def hopper(module, target):
    for head_dim, block_size, dtype, lse in [
        *((d, 64, t, lse) for d in (64, 128) for t in (torch.bfloat16, torch.float16) for lse in (False, True)),
        (96, 64, torch.bfloat16, True),
        (64, 128, torch.float16, True),
        (128, 128, torch.bfloat16, True),
    ]:
        yield (
            f"{head_dim} {block_size} {dtype} lse={lse}",
            lambda d=head_dim, b=block_size, t=dtype, lse=lse: module.block_sparse_attention(
                *tensors(d, t), lists(b), 0.1, lse
            ),
        )
    with in_parts():
        for head_dim in (64, 96, 128):
            yield (
                f"{head_dim} 64 in parts",
                lambda d=head_dim: module.block_sparse_attention(*tensors(d, torch.bfloat16), lists(64), 0.1, False),
            )


def hopper_span(module, target):
    for head_dim in (64, 128):
        for name, q, k, blocks in span_cases(head_dim, torch.bfloat16):
            call = functools.partial(module.block_sparse_attention, q, k, k, blocks, 0.1, True)
            yield f"{head_dim} {name}", call
            with in_parts():
                yield f"{head_dim} {name} in parts", call


def pooled_attention(module, target):
    cases = [(128, 64, torch.bfloat16)]
    if target == "sm_90":
        cases += [(64, 64, torch.float16), (80, 32, torch.bfloat16), (128, 128, torch.bfloat16)]
        cases += [(256, 64, torch.bfloat16), (64, 64, torch.float32)]
    rows = torch.arange(1)
    for head_dim, block_size, dtype in cases:
        q = torch.zeros(1, 128, 4, head_dim, dtype=dtype).transpose(1, 2)
        k, lse = q[:, :1], torch.zeros(1, 4, 128)
        shape = f"{head_dim} {block_size} {dtype}"
        wanted = Wanted(block_size, 0.1, "max", True, lse, Span(1, 128, 128))
        yield f"lse {shape}", functools.partial(module.query_lse, q, k, rows, wanted)
        # The row mass does all that "sum" does, and more: both are compiled where most models are.
        for reduce in REDUCTIONS if head_dim == 128 and block_size == 64 else ("max", "row_sum"):
            given = wanted._replace(reduce=reduce)
            yield f"{reduce} {shape}", functools.partial(module.pooled_attention, q, k, rows, given)
    padded = wanted._replace(span=Span.of_padded(1, 128, 128, torch.tensor([100])))
    yield "max padded", functools.partial(module.pooled_attention, q, k, rows, padded)


def pooled_attention_wide(module, target):
    q = torch.zeros(1, 128, 4, 256, dtype=torch.float16).transpose(1, 2)
    for block_size in (64, 128):
        wanted = Wanted(block_size, 0.1, "max", True, torch.zeros(1, 4, 128), Span(1, 128, 128))
        yield (
            f"256 {block_size}",
            functools.partial(module.pooled_attention, q, q[:, :1], torch.arange(1), wanted),
        )


def pooled_attention_decode(module, target):
    cases = [(128, 4, 64, torch.bfloat16, "max", given) for given in (False, True)]
    cases += [(128, 4, 64, torch.bfloat16, reduce, True) for reduce in ("sum", "row_sum")]
    if target == "sm_90":
        for shape in [
            (64, 4, 64, torch.float16),
            (80, 7, 16, torch.bfloat16),
            (128, 1, 128, torch.bfloat16),
            (256, 2, 64, torch.bfloat16),
            (64, 4, 64, torch.float32),
        ]:
            cases += [(*shape, "max", False), (*shape, "row_sum", True)]  # which does all that "sum" does, and more
    for head_dim, group, block_size, dtype, reduce, given in cases:
        q = torch.zeros(1, 128, group, head_dim, dtype=dtype).transpose(1, 2)
        lse = torch.zeros(1, group, 128) if given else None
        wanted = Wanted(block_size, 0.1, reduce, True, lse, Span(1, 128, 128))
        yield (
            f"{reduce} {head_dim} {group} {block_size} {dtype} lse={given}",
            functools.partial(module.pooled_attention_decode, q, q[:, :1], torch.arange(128), wanted),
        )


def pooled_attention_hopper(module, target):
    rows = torch.arange(2)
    for head_dim, dtype, normalize, reduce in [
        (128, torch.bfloat16, True, "max"),
        (64, torch.float16, True, "max"),
        (96, torch.bfloat16, False, "max"),
        (128, torch.bfloat16, True, "row_sum"),
        (96, torch.float16, False, "row_sum"),
    ]:
        q = torch.zeros(1, 128, 4, head_dim, dtype=dtype).transpose(1, 2)
        span = Span.of_padded(1, 128, 128, None if normalize else torch.tensor([100]))
        wanted = Wanted(64, 0.1, reduce, normalize, torch.zeros(1, 4, 128), span)
        yield (
            f"{head_dim} {dtype} normalize={normalize} {reduce}",
            functools.partial(module.pooled_attention, q, q[:, :1], rows, wanted),
        )


def block_pooling(module, target):
    x = tensors(128, torch.bfloat16)[0]
    for block_size in (64, 8, 4):
        table, kinds = Span.of_padded(1, 128, 128, torch.tensor([100])).table, ("max", "min", "avg")
        for name, align in (("padded", 0), ("chunk", block_size)):
            grid = Grid(128 // block_size, 0, align, table)
            yield f"{name} {block_size}", functools.partial(module.block_pooling, x, kinds, block_size, grid)
        if block_size != 4:
            both = functools.partial(module.pool_both, x, x[:, :1], (("avg",), kinds), (block_size, block_size))
            yield f"both {block_size}", both


def inverse_rope(module, target):
    x = tensors(128, torch.bfloat16)[0]
    for width in (128, 64):
        table = torch.zeros(1, x.shape[2], width)
        for name, recent in (("", None), (" recent", x[:, :, 64:])):
            yield f"128 {width}{name}", functools.partial(module.inverse_rope, x, table, table, recent, x.clone())
    sizes = itertools.product((128, 64, 256), (64, 8, 128))
    for head_dim, block_size in (each for each in sizes if math.prod(each) <= MOST_POOLED):
        x = tensors(head_dim, torch.bfloat16)[0]
        cos = sin = torch.zeros(1, x.shape[2], head_dim, dtype=x.dtype)
        given = x, cos, sin, x[:, :, 64:], ("max", "min", "avg"), block_size
        yield f"pooled {head_dim} {block_size}", functools.partial(module.pooled_inverse_rope, *given)


def block_selection(module, target):
    module._limit = (lambda registers: {}) if target == "gfx942" else (lambda registers: {"maxnreg": registers})
    for num in (512, 2048) if target == "sm_90" else (512,):
        scores, keep = torch.zeros(1, 2, num, num), torch.ones(1, num, dtype=torch.int64)
        rules = [Rule(kind, num, 64, None, 1, 0.1, softmax=s) for kind in ("threshold", "topp") for s in (False, True)]
        rules += [Rule("topk", num, 64, None, 1, keep=keep)]
        rules += [rules[1]._replace(relative=True, min_blocks=4, first_blocks=1)]
        rules += [rules[-1]._replace(bounds=torch.zeros(2, num))]
        for rule in rules:
            name = f"{rule.kind} {num} {rule.softmax} {rule.relative} {rule.bounds is not None}"
            yield name, functools.partial(module.select, scores, rule)
    for num in (16384, 32768) if target == "sm_90" else ():  # 8 and 16 warps share the registers
        scores, keep = torch.zeros(1, 1, 1, num), torch.ones(1, 1, dtype=torch.int64)
        rule = Rule("topp", num, 64, None, 0, 0.5, softmax=True)
        yield f"topp {num} True", functools.partial(module.select, scores, rule)
        rule = Rule("topk", num, 64, None, 0, keep=keep, diagonal_extra=True)
        yield f"topk {num}", functools.partial(module.select, scores, rule)
    if target == "sm_90":  # a compiler short of registers gave wrong lists of these
        rule = Rule("threshold", 4096, 64, None, 0, 0.0, relative=True, min_blocks=4)
        for dtype in (torch.float32, torch.bfloat16):
            yield f"floor 4096 {dtype}", functools.partial(module.select, torch.zeros(1, 2, 8, 4096, dtype=dtype), rule)


# Calls, module, targets; consumers' GPUs (sm_86) differ from sm_80 in their shared memory only, which wide heads fill.
EVERYWHERE = ["sm_80", "sm_90", "gfx942"]
JOBS = {
    "hopper": (hopper, "block_sparse_attention.hopper", ["sm_90"]),
    "hopper_span": (hopper_span, "block_sparse_attention.hopper", ["sm_90"]),
    "block_sparse_attention": (block_sparse_attention, "block_sparse_attention.triton", EVERYWHERE),
    "block_sparse_decode": (block_sparse_decode, "block_sparse_decode.triton", EVERYWHERE),
    "merge_parts": (merge_parts, "block_sparse_attention.triton_parts", EVERYWHERE),
    "pooled_attention": (pooled_attention, "pooled_attention.triton", EVERYWHERE),
    "pooled_attention_decode": (pooled_attention_decode, "pooled_attention.triton_decode", EVERYWHERE),
    "pooled_attention_wide": (pooled_attention_wide, "pooled_attention.triton", ["sm_86", "gfx942"]),
    "pooled_attention_hopper": (pooled_attention_hopper, "pooled_attention.hopper", ["sm_90"]),
    "block_pooling": (block_pooling, "block_pooling.triton", EVERYWHERE),
    "inverse_rope": (inverse_rope, "inverse_rope.triton", EVERYWHERE),
    "encode_blocks": (encode_blocks, "gate_scores.triton_encode", EVERYWHERE),
    "pool_encode": (pool_encode, "gate_scores.triton_prompt", EVERYWHERE),
    "gate_scores": (gate_scores, "gate_scores.triton", EVERYWHERE),
    "gate_scores_hopper": (gate_scores_hopper, "gate_scores.hopper", ["sm_90"]),
    "row_scores": (row_scores, "gate_scores.triton_row", ["sm_90"]),
    "mass_scores": (mass_scores, "gate_scores.triton_mass", EVERYWHERE),
    "mass_row_scores": (mass_row_scores, "gate_scores.triton_mass_row", ["sm_90"]),
    "mass_scores_hopper": (mass_scores_hopper, "gate_scores.hopper_mass", ["sm_90"]),
    "block_selection": (block_selection, "block_selection.triton", EVERYWHERE),
    "token_scores": (token_scores, "token_scores.triton", EVERYWHERE),
}


def main(names):
    try:
        triton.knobs.nvidia.ptxas.path  # noqa: B018
    except Exception as error:
        print(json.dumps({"skip": f"this triton has no ptxas: {error}"}))
        return
    report = []
    # Wherever the launchers make sure of the device of their tensors.
    torch.cuda.device = torch.cuda.device_of = lambda device: contextlib.nullcontext()
    for op in names or JOBS:
        calls, path, targets = JOBS[op]
        module = importlib.import_module(f"{OPS}.{path}")
        kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
        for target in targets:
            gpu, shared_memory = TARGETS[target]
            triton.runtime.driver.set_active(Driver(gpu))
            results = []
            for name, kernel in kernels.items():
                kernel.device_caches.clear()
                setattr(module, name, Compiling(kernel, results))
            dispatch.shared_memory = lambda device, size=shared_memory: size
            major = gpu.arch // 10 if gpu.backend == "cuda" else 0
            dispatch.capability = lambda device, major=major: major
            for variant, call in calls(module, target):
                call()
                compiled = results.pop()
                assert not results
                report.append({"op": op, "target": target, "variant": variant, **describe(*compiled)})
        for name, kernel in kernels.items():  # as they were, for another job with this module
            setattr(module, name, kernel)
    print(json.dumps({"triton": triton.__version__, "kernels": report}, indent=1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main(sys.argv[1:])
