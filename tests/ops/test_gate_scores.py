"""encode_blocks and gate_scores: the Triton kernels against the float32 reference, which the gate's own tests hold to
its definition, and scores of sub-blocks against a loop over their pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import seerattention as seer
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.gate_scores import encode_blocks, gate_scores, reference
from seerattention.ops.gate_scores.interface import REDUCTIONS, empty_scores
from seerattention.ops.gate_scores.reference import Tiles
from seerattention.ops.pooled_attention import pooled_attention
from seerattention.ops.span import Span, num_blocks

needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)
BLOCK_SIZE = 32


def make_inputs(
    num, *, heads=4, kv_heads=2, width=16, channels=None, keys_per_head=True, rotary=None, batch=1, tables=1,
    dtype=torch.float32, seed=0,
):  # fmt: skip
    """Arguments of gate_scores: ``channels`` of the queries asks for a projection, ``rotary=0`` for no rotation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    q = draw(batch, num, heads, channels or width).transpose(1, 2)  # any strides with a contiguous last dimension
    k = draw(batch, kv_heads, num, 24)
    k_linear = draw(heads if keys_per_head else kv_heads, 24, width) * 24**-0.5
    q_linear = draw(heads, channels, width) * channels**-0.5 if channels else None
    tensors = [None if x is None else x.to(dtype) for x in (q, k, k_linear, q_linear)]
    rotary = width if rotary is None else rotary
    angles = 6 * torch.rand(tables, num * BLOCK_SIZE - 5, rotary, generator=generator)
    return (*tensors, angles.cos(), angles.sin()) if rotary else (*tensors, None, None)


def whole_gate(q, k, k_linear, q_linear, cos, sin, *, scale=0.25, masked=True, implementation=None):
    """Both ops, as a gate calls them."""
    common = {"pitch": BLOCK_SIZE, "implementation": implementation}
    queries, keys = (encode_blocks(x, linear, cos, sin, **common) for x, linear in ((q, q_linear), (k, k_linear)))
    return gate_scores(
        queries, keys, block_size=BLOCK_SIZE, scale=scale, masked=masked, implementation=implementation
    )  # fmt: skip


def in_float32(inputs):
    return [None if x is None else x.float() for x in inputs]


def assert_near(actual, inputs, masked=True, tolerance=1e-5):
    expected = whole_gate(*in_float32(inputs), implementation="reference")
    causal = expected > float("-inf")
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert actual[causal].isfinite().all()
    assert (actual - expected)[causal].norm() <= tolerance * expected[causal].norm()
    if masked:
        assert (actual[~causal] == float("-inf")).all()


FORMS = {
    "published": {},
    "keys_per_kv_head": {"keys_per_head": False, "channels": 32},
    "wide": {"width": 40, "channels": 16, "rotary": 16},
    "narrow": {"width": 8, "channels": 16, "rotary": 16},
    "no_power_of_two": {"width": 20, "channels": 12},
    "odd_without_rotation": {"width": 7, "channels": 12, "rotary": 0},
    "not_rotated_and_not_projected": {"rotary": 0},
    "batch": {"batch": 2, "tables": 2},
    "shared_table": {"batch": 2},
    "one_kv_head": {"heads": 3, "kv_heads": 1},
    "no_groups": {"heads": 2, "kv_heads": 2},
}


@needs_interpreter
@pytest.mark.parametrize("num", [1, 2, 17, 33])
@pytest.mark.parametrize("form", FORMS)
def test_triton_interpreted(form, num, nan_filled_empty):
    inputs = make_inputs(num, **FORMS[form])
    for masked in (True, False):
        scores = whole_gate(*inputs, masked=masked, implementation="triton")
        assert_near(scores, inputs, masked)


@needs_interpreter
@pytest.mark.parametrize("form", ["published", "wide"])
def test_triton_in_half_precision_over_several_tiles(form, nan_filled_empty):
    inputs = make_inputs(140, dtype=torch.float16, **FORMS[form])
    for masked in (True, False):
        scores = whole_gate(*inputs, masked=masked, implementation="triton")
        assert_near(scores, inputs, masked, tolerance=1e-3)


@needs_interpreter
def test_policies_ignore_what_is_not_written(nan_filled_empty):
    inputs = make_inputs(140, dtype=torch.float16)
    whole, causal = (whole_gate(*inputs, scale=1.0, masked=masked, implementation="triton") for masked in (True, False))
    assert causal.isnan().any()
    for policy in (seer.TopK(0.2), seer.Threshold(0.01), seer.TopP(0.7), seer.TokenBudget(96)):
        a, b = (policy.select(scores, block_size=BLOCK_SIZE).to_mask() for scores in (whole, causal))
        assert torch.equal(a, b), policy


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("form", ["published", "narrow", "batch", "not_rotated_and_not_projected"])
@pytest.mark.parametrize("offset", [1, 5, 31, 40])
def test_tables_may_begin_inside_a_block(form, offset, implementation, nan_filled_empty):
    """As of entries that are looked up one by one: the nearest ones of blocks whose own are not there."""
    pooled, _, _, linear, cos, sin = make_inputs(9, **FORMS[form])
    if cos is None:
        cos = sin = torch.randn(1, 29, 16)
    cos, sin = (x[:, :29] for x in (cos, sin))
    places = (torch.arange(9) * 8 - offset).clamp(0, 28)
    expected = encode_blocks(pooled, linear, cos[:, places], sin[:, places], implementation=implementation)
    found = encode_blocks(pooled, linear, cos, sin, pitch=8, offset=offset, implementation=implementation)
    assert torch.equal(found, expected)


def test_rows_of_scores_begin_at_vectors():
    scores = empty_scores(torch.empty(1, 2, 17, 8, dtype=torch.bfloat16), 17, 17)
    assert scores.shape == (1, 2, 17, 17)
    assert scores.stride() == (2 * 17 * 32, 17 * 32, 32, 1)
    assert scores.dtype == torch.float32


def test_gradients_go_through_the_reference():
    inputs = make_inputs(5)
    inputs[2].requires_grad_()
    scores = whole_gate(*inputs)
    scores.masked_fill(scores.isinf(), 0).square().sum().backward()
    assert (inputs[2].grad != 0).any()


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_are_proper_ops(implementation):
    q, k, k_linear, q_linear, cos, sin = make_inputs(5, heads=2, kv_heads=1, width=8)
    encode = torch.ops.seerattention.encode_blocks
    for x, linear in ((q, q_linear), (k, k_linear)):
        if linear is not None or cos is not None:
            arguments = (x, linear, cos, sin, BLOCK_SIZE, 0, implementation)
            torch.library.opcheck(encode, arguments)
            expected = encode_blocks(x, linear, cos, sin, pitch=BLOCK_SIZE, implementation=implementation)
            assert torch.equal(encode(*arguments), expected)
    table = torch.tensor([[0, 3, 60, 0]], dtype=torch.int32)
    for rows, spans, pitch, reduce in (
        (None, None, 32, "max"), (torch.arange(2)[None], table, 16, "logsumexp"), (None, table, 16, "mass"),
    ):  # fmt: skip
        q, k = torch.randn(1, 2, 2 * BLOCK_SIZE // pitch, 8), torch.randn(1, 1, 4, 8)
        tiles = Tiles(BLOCK_SIZE, pitch, 16, 0.25, reduce, True, rows, table=spans)
        arguments = (q, k, *tiles, implementation)
        torch.library.opcheck(torch.ops.seerattention.gate_scores, arguments)


@needs_interpreter
def test_compiles():
    def call(*inputs):
        return whole_gate(*inputs, implementation="triton")

    torch._dynamo.reset()
    function = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for num in (5, 6, 9):
            inputs = make_inputs(num)
            assert torch.equal(function(*inputs), call(*inputs))


# -- sub-blocks --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_interpreter)])
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


@needs_interpreter
def test_rows_by_number_and_by_index_are_rows_of_the_whole():
    inputs = make_inputs(40, dtype=torch.float16, batch=2)
    q, k = (encode_blocks(x, linear, implementation="triton") for x, linear in ((inputs[0], None), inputs[1:3]))
    for implementation in ("reference", "triton"):
        options = {"block_size": BLOCK_SIZE, "implementation": implementation}
        whole = gate_scores(q, k, **options)
        assert torch.equal(gate_scores(q[:, :, 7:20], k, rows=7, **options), whole[:, :, 7:20])
        assert torch.equal(gate_scores(q[:, :, 30:], k, **options), whole[:, :, 30:])
        rows = torch.tensor([33, 2, 17])
        assert torch.equal(gate_scores(q[:, :, rows], k, rows=rows, **options), whole[:, :, rows])
        each = torch.stack((rows, rows - 2))
        found = gate_scores(q[torch.arange(2)[:, None], :, each].transpose(1, 2), k, rows=each, **options)
        for batch in range(2):
            assert torch.equal(found[batch], whole[batch, :, each[batch]])
        strided = torch.stack((k, k), 3).flatten(2, 3)[:, :, ::2]  # keys of a state have room behind them
        assert torch.equal(gate_scores(q, strided, **options), whole)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_interpreter)])
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


def test_wrong_arguments():
    q, k, k_linear, _, cos, sin = make_inputs(6)
    with pytest.raises(TypeError, match="linear is"):
        encode_blocks(k, k_linear.double())
    with pytest.raises(ValueError, match="linear must be"):
        encode_blocks(k, k_linear[:3])
    with pytest.raises(ValueError, match="pooled must be"):
        encode_blocks(k, k_linear[0])
    with pytest.raises(ValueError, match="both cos and sin"):
        encode_blocks(k, k_linear, cos)
    with pytest.raises(ValueError, match="cos and sin must be"):
        encode_blocks(k, k_linear, cos[:, :100], sin[:, :100], pitch=BLOCK_SIZE)
    for offset in (-1, BLOCK_SIZE):  # of which the second leaves more tokens than there are blocks
        with pytest.raises(ValueError, match="cos and sin must be"):
            encode_blocks(k, k_linear, cos, sin, pitch=BLOCK_SIZE, offset=offset)
    with pytest.raises(ValueError, match="no implementation"):
        encode_blocks(k, k_linear, implementation="cuda")
    with pytest.raises(ValueError, match="fits no vectors"):
        encode_blocks(k, k_linear, *(x.repeat(1, 1, 2)[..., :20] for x in (cos, sin)), pitch=BLOCK_SIZE)
    wide = torch.zeros(1, 1, 2, 272)
    for op in (
        lambda: encode_blocks(wide, implementation="triton"),
        lambda: gate_scores(wide, wide, implementation="triton"),
    ):
        with pytest.raises(ValueError, match="width up to 256"):
            op()
    q, k = q[:, :, :4], q[:, :2]
    with pytest.raises(TypeError, match="k is"):
        gate_scores(q, k.double())
    with pytest.raises(ValueError, match="q must be"):
        gate_scores(q, k[..., :8])
    with pytest.raises(ValueError, match="not a multiple"):
        gate_scores(q[:, :3], k)
    for pitches in ((48, 64), (64, 128), (-8, 8)):
        with pytest.raises(ValueError, match="divide block_size"):
            gate_scores(q, k, q_pitch=pitches[0], k_pitch=pitches[1])
    with pytest.raises(ValueError, match="positive"):
        gate_scores(q, k, scale=0.0)
    with pytest.raises(ValueError, match="reduce"):
        gate_scores(q, k, reduce="mean")
    with pytest.raises(ValueError, match="no implementation"):
        gate_scores(q, k, implementation="cuda")
    for rows in (3, -1):
        with pytest.raises(ValueError, match="from query block"):
            gate_scores(q, k, rows=rows)
    for rows in (torch.zeros(3, dtype=torch.int64), torch.zeros(4)):
        with pytest.raises(ValueError, match="rows must be"):
            gate_scores(q, k, rows=rows)
    with pytest.raises(ValueError, match="the span has 1 rows of 300 keys"):
        gate_scores(q, k, span=Span(1, 256, 300))
    with pytest.raises(ValueError, match="5 rows of tiles"):
        gate_scores(q, k, span=Span(1, 257, 384))
    ragged = Span.of_rows(256, 384, start=torch.tensor([1]), length=torch.tensor([256]))
    with pytest.raises(ValueError, match="different blocks"):
        gate_scores(k.repeat(1, 2, 1, 1)[:, :, :4], k, span=ragged, rows=0)
