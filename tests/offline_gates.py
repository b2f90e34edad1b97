"""Calls of the kernels of gates for ``offline_compile.py``: their launchers, with arguments of real launches.

Each generator takes the module of the launchers and the name of a GPU, and yields the name of a variant and its call.
"""

from __future__ import annotations

import functools

import torch

from seerattention.ops.gate_scores.reference import Tiles
from seerattention.ops.token_scores.reference import Row


def encode_blocks(module, target):
    for x, k, linear, table, shape in encodings(target):
        yield f"project {shape}", functools.partial(module.encode_blocks, k, linear, table, table, 64)
        yield f"rotate {shape}", functools.partial(module.encode_blocks, x, None, table, table, 64)
        yield f"both {shape}", functools.partial(module.encode_both, (x, k), (None, linear), (table, table), (64, 64))


def pool_encode(module, target):
    """What the launcher leaves to other kernels, as GPUs with little shared memory do, has no variant here."""
    kinds = ("max", "min", "avg"), ("max", "avg")
    for width, head_dim, pitches, dtype in [
        (64, 128, (8, 8), torch.bfloat16),
        (64, 64, (4, 4), torch.bfloat16),
        *([(128, 128, (8, 8), torch.bfloat16), (48, 96, (16, 4), torch.float16)] if target == "sm_90" else ()),
    ]:
        x, table = torch.zeros(1, 4, 4096, head_dim, dtype=dtype), torch.zeros(1, 4096, head_dim, dtype=dtype)
        linears = (torch.zeros(4, 3 * head_dim, width, dtype=dtype), torch.zeros(2, 2 * head_dim, width, dtype=dtype))
        shape = module.shape_of(x, width, 3)
        if shape is not None:
            call = functools.partial(module.pool_encode, x, x[:, :2], linears, (table, table), kinds, pitches, shape)
            yield f"{head_dim} {width} {pitches} {dtype}", call


def gate_scores(module, target):
    for x, _, _, _, shape in encodings(target):
        num, width = x.shape[2:]
        scores, tiles = torch.zeros(1, 4, num, num), Tiles(64, 64, 64, 0.1, "max", width == 128, None, 0, 0, 64 * num)
        yield f"multiply {shape}", functools.partial(module.gate_scores, x, x[:, :2], scores, tiles)
    for reduce in ("max", "logsumexp"):
        for name, q, k, scores, tiles in tile_scores(target, reduce):
            yield name, functools.partial(module.gate_scores, q, k, scores, tiles)
    if target == "sm_90":
        x, scores = torch.zeros(1, 2, 512, 128, dtype=torch.bfloat16), torch.zeros(1, 2, 64, 64)
        tiles, many = Tiles(64, 8, 8, 0.1, "max", True, None, 0, 0, 4096), module.MANY_COLUMNS
        module.MANY_COLUMNS = 1
        yield "max 128 8x8, many columns", functools.partial(module.gate_scores, x, x, scores, tiles)
        module.MANY_COLUMNS = many


def gate_scores_hopper(module, target):
    for width, dtype, masked in [
        (128, torch.bfloat16, False),
        (128, torch.float16, True),
        (64, torch.bfloat16, False),
    ]:
        q, scores = torch.zeros(1, 4, 512, width, dtype=dtype), torch.zeros(1, 4, 64, 64)
        tiles = Tiles(64, 8, 8, 0.1, "max", masked)
        yield (
            f"{width} {dtype} masked={masked}",
            functools.partial(module.gate_scores, q, q[:, :2], scores, tiles),
        )


def mass_scores_hopper(module, target):
    for width, pitch, dtype, masked in [
        (128, 4, torch.bfloat16, False),
        (64, 4, torch.float16, False),
        (128, 8, torch.bfloat16, True),
    ]:
        q, scores = torch.zeros(1, 4, 64 * (64 // pitch), width, dtype=dtype), torch.zeros(1, 4, 64, 64)
        tiles = Tiles(64, pitch, pitch, 0.1, "mass", masked)
        yield (
            f"{width} {pitch}x{pitch} {dtype} masked={masked}",
            functools.partial(module.mass_scores, q, q[:, :2], scores, tiles),
        )


def row_scores(module, target):
    for width, dtype, group in [(128, torch.bfloat16, 4), (64, torch.float16, 1), (128, torch.bfloat16, 16)]:
        q, scores = torch.zeros(1, group, 5, width, dtype=dtype), torch.zeros(1, group, 1, 64)
        tiles = Tiles(64, 8, 8, 0.1, "max", True)._replace(first_row=63, end=64 * 64 - 21)
        k = torch.zeros(1, 1, 512 - 3, width, dtype=dtype)
        yield f"{width} {dtype} {group} heads", functools.partial(module.row_scores, q, k, scores, tiles)


def mass_row_scores(module, target):
    tiles = Tiles(64, 4, 4, 0.1, "mass", True)._replace(first_row=63, end=64 * 64 - 21)
    for width, q_pitch, k_pitch, dtype, group in [
        (128, 4, 4, torch.bfloat16, 4),
        (64, 4, 4, torch.float16, 7),
        (128, 8, 8, torch.bfloat16, 2),
        (64, 8, 4, torch.bfloat16, 8),
    ]:
        q, k = (torch.zeros(1, *shape, width, dtype=dtype) for shape in ((group, 5), (1, 4096 // k_pitch)))
        given = tiles._replace(q_pitch=q_pitch, k_pitch=k_pitch)
        yield f"sums {width} {q_pitch}x{k_pitch} {dtype} {group} heads", functools.partial(module.row_sums, q, k, given)
    for places in (8, 16):  # of queries and of keys
        sums = torch.zeros(1, 4, places, 64), torch.zeros(1, 4, places, 64 * places // module.KEYS)
        call = functools.partial(module.write_row_shares, *sums, torch.zeros(1, 4, 1, 64), tiles)
        yield f"shares {places} places", call


def encodings(target):
    num, more = 64, [(64, torch.float16), (64, torch.float32), (256, torch.bfloat16)]
    for width, dtype in [(128, torch.bfloat16), *(more if target == "sm_90" else ())]:
        x = torch.zeros(1, 4, num, width, dtype=dtype)
        k, linear = x[:, :2].repeat(1, 1, 1, 3), torch.zeros(4, 3 * width, width, dtype=dtype)
        yield x, k, linear, torch.zeros(1, 64 * num, width, dtype=dtype), f"{width} {dtype}"


def mass_scores(module, target):
    for name, q, k, scores, tiles in tile_scores(target, "mass"):
        yield f"lse {name}", functools.partial(module.query_lse, q, k, tiles)
        yield name, functools.partial(module.write_shares, q, k, q.new_zeros(1, 2, q.shape[2]).float(), scores, tiles)


def tile_scores(target, reduce):
    num, cases = 64, [(64, 8, 8, torch.bfloat16, None)]
    if target == "sm_90":
        shapes = [(64, 8, 8), (32, 4, 4), (128, 64, 16), (256, 8, 8), (128, 64, 8)]  # the last one of decode gates
        rows, cases = torch.zeros(1, 4, dtype=torch.int32), [(*shape, torch.bfloat16, None) for shape in shapes]
        cases += [(64, 8, 4, torch.float16, None), (64, 8, 8, torch.float32, None), (64, 8, 8, torch.bfloat16, rows)]
    for width, q_pitch, k_pitch, dtype, table in cases:
        q, k = (torch.zeros(1, 2, 64 // pitch * num, width, dtype=dtype) for pitch in (q_pitch, k_pitch))
        tiles = Tiles(64, q_pitch, k_pitch, 0.1, reduce, True, None, 0, 0, 64 * num, table)
        shape = f"{reduce} {width} {q_pitch}x{k_pitch} {dtype} table={table is not None}"
        yield shape, q, k, torch.zeros(1, 2, num, num), tiles


def token_scores(module, target):
    cases = [(4, 128, 1, torch.bfloat16), (4, 64, 8, torch.bfloat16)]
    if target == "sm_90":
        cases += [(7, 96, 1, torch.float16), (8, 256, 16, torch.bfloat16), (1, 128, 1, torch.float32)]
    for group, width, parts, dtype in cases:
        shape = f"{group} {width} {parts} {dtype}"
        q, linear = torch.zeros(1, 2 * group, 1, 128, dtype=dtype), torch.zeros(2, group * 128, width, dtype=dtype)
        table = torch.zeros(1, 1, width, dtype=dtype)
        encode = functools.partial(module.encode_tokens, q, linear, linear[0, 0], table, table, 1e-6)
        yield f"encode {shape}", encode
        keys = torch.zeros(1, 2, 64 * parts, width, dtype=dtype)
        for tokens in (1, 8, 64):
            queries, out = q.new_zeros(1, 2 * group, tokens, width), torch.zeros(1, 2, tokens, 64)
            row = Row(64, parts, 0.1, tokens > 1)
            yield f"multiply {tokens} {shape}", functools.partial(module.multiply, queries, keys, row, out)
    for tokens in (1, 8, 64):
        products = torch.zeros(1, 2, tokens, 64)
        yield f"share {tokens}", functools.partial(module.largest_share, products, 60, torch.zeros(1, 2, 1, 64))
