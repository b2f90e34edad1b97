"""gate_scores of sub-blocks: every reduction against a loop over the pairs of each tile, and what follows from it."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch

from seerattention.ops import dispatch
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.gate_scores import gate_scores, reference
from seerattention.ops.gate_scores.interface import REDUCTIONS
from seerattention.ops.pooled_attention import pooled_attention
from seerattention.ops.span import Span, num_blocks

needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=needs_interpreter)]


def reduced(pairs, totals, kind):
    """The score of a tile, from the products of each query sub-block with the keys of the tile, and with all keys."""
    if kind == "mass":
        both = [(torch.stack(x), torch.stack(y)) for x, y in zip(pairs, totals, strict=True) if x]
        return torch.stack([x.logsumexp(0) - y.logsumexp(0) for x, y in both]).amax(0)
    together = torch.stack([product for of_query in pairs for product in of_query])
    return together.amax(0) if kind == "max" else together.logsumexp(0)


def definition(q, k, tiles, rows, start, end):
    """Scores in float64 by a loop over the pairs of every tile; ``rows [B][R]`` and limits ``[B]``."""
    size, q_pitch, k_pitch = tiles["block_size"], tiles["q_pitch"], tiles["k_pitch"]
    per_q, per_k, group = size // q_pitch, size // k_pitch, q.shape[1] // k.shape[1]
    shape = *q.shape[:2], num_blocks(q.shape[2], per_q), num_blocks(k.shape[2], per_k)
    scores = torch.full(shape, -math.inf, dtype=torch.float64)
    products = tiles["scale"] * (q.double() @ k.double().repeat_interleave(group, 1).mT)
    for b, r, n in itertools.product(range(shape[0]), range(shape[2]), range(shape[3])):
        pairs = [[] for _ in range(per_q)]  # products of each query sub-block with keys of the tile
        totals = [[] for _ in range(per_q)]  # and with all its keys
        for i, key in itertools.product(range(per_q), range(k.shape[2])):
            query, key_begin = r * per_q + i, key * k_pitch
            begin = rows[b][r] * size + i * q_pitch
            holds_query = begin < end[b] and begin + q_pitch > start[b] and start[b] < end[b]
            if query < q.shape[2] and holds_query and key_begin < min(end[b], begin + q_pitch):
                totals[i].append(products[b, :, query, key])
                if key // per_k == n:
                    pairs[i].append(products[b, :, query, key])
        if any(pairs) and n <= rows[b][r]:
            scores[b, :, r, n] = reduced(pairs, totals, tiles["reduce"])
    return scores


def cases(length, size, q_pitch):
    """Name, arguments, sub-blocks of q, and what the definition takes: rows, start and end."""
    tiles = num_blocks(length, size)
    everything = [list(range(tiles))] * 2
    yield "whole", {}, num_blocks(length, q_pitch), everything, [0, 0], [1 << 30] * 2
    yield "first rows", {"rows": 0}, size // q_pitch, [[0], [0]], [0, 0], [1 << 30] * 2
    span = Span(2, length, length)
    yield "prompt", {"span": span}, num_blocks(length, q_pitch), everything, [0, 0], [length] * 2
    rows = torch.tensor([tiles - 1, 0])
    chosen = {"span": span, "rows": rows}
    yield "rows", chosen, 2 * size // q_pitch, [rows.tolist()] * 2, [0, 0], [length] * 2
    rows = torch.tensor([[tiles - 1], [0]])
    yield "rows of each", {"span": span, "rows": rows}, size // q_pitch, rows.tolist(), [0, 0], [length] * 2
    queries = max(1, length // 3)
    start = length - queries
    span, last = Span(2, queries, length), list(range(start // size, tiles))
    yield "chunk", {"span": span}, len(last) * (size // q_pitch), [last] * 2, [start] * 2, [length] * 2
    starts, lengths = torch.tensor([start, max(0, start - 7)]), torch.tensor([queries, max(0, queries - 2)])
    span = Span.of_rows(queries, length, start=starts, length=lengths)
    rows = span.row_blocks(size).tolist()
    ends = (starts + lengths).tolist()
    yield "ragged", {"span": span}, span.num_rows(size) * (size // q_pitch), rows, starts.tolist(), ends


SHAPES = [(32, 8, 4), (32, 32, 8), (16, 8, 16), (24, 12, 4), (32, 32, 32)]


def check_sub_blocks(size, q_pitch, k_pitch, reduce, length, implementation, dtype=torch.float32, width=16):
    generator = torch.Generator().manual_seed(length)
    tiles = {"block_size": size, "q_pitch": q_pitch, "k_pitch": k_pitch, "scale": 0.3, "reduce": reduce}
    k = torch.randn(2, 2, num_blocks(length, k_pitch), width, generator=generator).to(dtype)
    for name, options, count, rows, start, end in cases(length, size, q_pitch):
        q = torch.randn(2, 4, count, width, generator=generator).to(dtype)
        expected = definition(q, k, tiles, rows, start, end)
        scores = gate_scores(q, k, implementation=implementation, **tiles, **options)
        assert scores.shape == expected.shape, name
        assert torch.equal(scores == -math.inf, expected == -math.inf), name
        finite = expected > -math.inf
        torch.testing.assert_close(scores[finite].double(), expected[finite], rtol=3e-5, atol=3e-5, msg=name)
        # A row that holds a query always has its diagonal.
        for b, row in enumerate(rows):
            for r, block in enumerate(row):
                holds = max(start[b], block * size) < min(end[b], (block + 1) * size) and start[b] < end[b]
                assert not holds or finite[b, :, r, block].all(), name


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("length", [5, 32, 70])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sub_blocks_equal_the_definition(shape, length, reduce, monkeypatch):
    check_sub_blocks(*shape, reduce, length, None)
    monkeypatch.setattr(reference, "MAX_PRODUCTS", 1)  # row by row
    check_sub_blocks(*shape, reduce, length, "reference")


@needs_interpreter
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("shape", "length"), [((16, 8, 16), 37), ((16, 16, 8), 20), ((24, 8, 24), 50)], ids=str)
def test_triton_interpreted_sub_blocks(shape, length, reduce, nan_filled_empty):
    check_sub_blocks(*shape, reduce, length, "triton")


@needs_interpreter
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 40), (torch.float16, 40), (torch.float16, 136)])
def test_triton_interpreted_sub_blocks_over_several_tiles(dtype, width, nan_filled_empty):
    """More rows and columns than one program takes, tiles before the diagonal, vectors in several parts."""
    generator = torch.Generator().manual_seed(width)
    length = 8 * 70 - 3
    q, k = (torch.randn(1, 2, num_blocks(length, pitch), width, generator=generator).to(dtype) for pitch in (4, 8))
    for reduce in REDUCTIONS:
        options = {"block_size": 8, "q_pitch": 4, "scale": 0.2, "reduce": reduce, "span": Span(1, length, length)}
        found, expected = (gate_scores(q, k, implementation=name, **options) for name in ("triton", "reference"))
        torch.testing.assert_close(found, expected, rtol=3e-5, atol=3e-5)
        loose = gate_scores(q, k, implementation="triton", masked=False, **options)
        causal = expected > -math.inf
        assert torch.equal(loose[causal], found[causal])


@needs_interpreter
@pytest.mark.parametrize("length", [8 * 70 - 3, 8 * 129])
def test_triton_interpreted_sub_blocks_of_many_columns(length, nan_filled_empty, monkeypatch):
    """Wider tiles, which Hopper GPUs take from 128K tokens on, give what the others do.

    To the last bits of a sum: some CPUs multiply tiles of other widths in another order (AMD EPYC does).
    """
    module = importlib.import_module("seerattention.ops.gate_scores.triton")
    monkeypatch.setattr(dispatch, "capability", lambda device: 9)
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(1, 2, num_blocks(length, pitch), 16, generator=generator).half() for pitch in (4, 8))
    options = {"block_size": 8, "q_pitch": 4, "scale": 0.2, "reduce": "max", "span": Span(1, length, length)}
    expected = gate_scores(q, k, implementation="triton", **options)
    tiles, launch = [], module.launch
    monkeypatch.setattr(
        module, "launch", lambda *given, **named: tiles.append(named["BLOCK_N"]) or launch(*given, **named)
    )
    monkeypatch.setattr(module, "MANY_COLUMNS", 2)
    found = gate_scores(q, k, implementation="triton", **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    assert tiles == [128]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_behind_a_row_are_not_read_into_its_scores(implementation, reduce):
    """A state has room to grow: what is there means nothing, not even no number."""
    q, k = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 8, 16)
    span = Span.of_rows(32, 32, start=torch.tensor([0, 0]), length=torch.tensor([32, 13]))
    options = {"block_size": 16, "q_pitch": 8, "k_pitch": 4, "span": span, "implementation": implementation}
    options["reduce"] = reduce
    clean = gate_scores(q, k, **options)
    k[1, :, 4:] = q[1, :, 2:] = math.nan
    assert torch.equal(gate_scores(q, k, **options), clean)
    assert (clean[1, :, 1] == -math.inf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_of_single_tokens_is_the_row_mass_of_attention(implementation):
    """What gates of this form are made to say, and what they are trained for, are the same map."""
    q, k = torch.randn(1, 4, 75, 16), torch.randn(1, 2, 75, 16)
    found = gate_scores(
        q, k, block_size=32, q_pitch=1, k_pitch=1, scale=0.25, reduce="mass", implementation=implementation
    )
    expected = pooled_attention(q, k, block_size=32, scale=0.25, reduce="row_sum", normalize=False)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-5, atol=1e-6)


def test_shares_too_small_for_a_float_are_the_least_mass():
    q = torch.full((1, 1, 2, 4), 30.0)
    k = torch.cat((-q, q), 2)
    scores = gate_scores(q, k, block_size=16, q_pitch=8, k_pitch=8, reduce="mass", rows=1)
    torch.testing.assert_close(scores, torch.tensor([[[[-100 * math.log(2), 0.0]]]]))


@pytest.mark.parametrize("k_pitch", [4, 8, 32])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_rows_of_single_vectors_that_see_every_block(k_pitch, num_rows, nan_filled_empty):
    """As decode gates ask: one vector a row, at the last block, and query heads of which some share keys."""
    generator = torch.Generator().manual_seed(num_rows)
    q = torch.randn(2, 4, num_rows, 16, generator=generator).half()
    k = torch.randn(2, 2, 70 * 32 // k_pitch, 16, generator=generator).half()
    rows = 69 if num_rows == 1 else torch.full((num_rows,), 69)
    expected = (q.float() @ k.float().repeat_interleave(2, 1).mT).unflatten(-1, (70, 32 // k_pitch)).amax(-1) / 4
    for implementation in ("reference", "triton"):
        found = gate_scores(
            q, k, block_size=32, q_pitch=32, k_pitch=k_pitch, scale=0.25, rows=rows, implementation=implementation
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_sub_blocks():
    torch.manual_seed(0)  # of some draws two sub-blocks change places within the step: a maximum has a kink there
    q, k = torch.randn(1, 2, 10, 4, requires_grad=True), torch.randn(1, 1, 20, 4, requires_grad=True)
    span = Span(1, 39, 39)  # the last sub-blocks hold no token
    for reduce in REDUCTIONS:

        def loss(q, k, reduce=reduce):
            scores = gate_scores(q, k, block_size=16, q_pitch=4, k_pitch=2, scale=0.5, reduce=reduce, span=span)
            return scores.masked_fill(scores == -math.inf, 0).sin().sum()

        directions = torch.randn_like(q), torch.randn_like(k)
        slopes = torch.autograd.grad(loss(q, k), (q, k))
        assert all(slope.isfinite().all() for slope in slopes)
        with torch.no_grad():
            above, below = (loss(q + h * directions[0], k + h * directions[1]) for h in (1e-3, -1e-3))
        expected = sum((slope * direction).sum() for slope, direction in zip(slopes, directions, strict=True))
        torch.testing.assert_close((above - below) / 2e-3, expected, rtol=3e-2, atol=3e-2)
