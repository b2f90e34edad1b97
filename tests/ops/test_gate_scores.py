"""encode_blocks and gate_scores: the Triton kernels against the float32 reference, which the gate's own tests hold to
its definition. Scores of sub-blocks: ``test_sub_block_scores.py``."""

from __future__ import annotations

import functools

import pytest
import torch

import seerattention as seer
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.gate_scores import encode_blocks, gate_scores
from seerattention.ops.gate_scores.interface import empty_scores
from seerattention.ops.gate_scores.reference import Tiles
from seerattention.ops.span import Span

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


@needs_interpreter
def test_rows_by_number_and_by_index_are_rows_of_the_whole():
    """To the last bits of a sum: some CPUs multiply matrices of fewer rows in another order (AMD EPYC does)."""
    same = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=2e-6)
    inputs = make_inputs(40, dtype=torch.float16, batch=2)
    q, k = (encode_blocks(x, linear, implementation="triton") for x, linear in ((inputs[0], None), inputs[1:3]))
    for implementation in ("reference", "triton"):
        options = {"block_size": BLOCK_SIZE, "implementation": implementation}
        whole = gate_scores(q, k, **options)
        same(gate_scores(q[:, :, 7:20], k, rows=7, **options), whole[:, :, 7:20])
        same(gate_scores(q[:, :, 30:], k, **options), whole[:, :, 30:])
        rows = torch.tensor([33, 2, 17])
        same(gate_scores(q[:, :, rows], k, rows=rows, **options), whole[:, :, rows])
        each = torch.stack((rows, rows - 2))
        found = gate_scores(q[torch.arange(2)[:, None], :, each].transpose(1, 2), k, rows=each, **options)
        for batch in range(2):
            same(found[batch], whole[batch, :, each[batch]])
        strided = torch.stack((k, k), 3).flatten(2, 3)[:, :, ::2]  # keys of a state have room behind them
        same(gate_scores(q, strided, **options), whole)


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
