"""gate_scores: the Triton kernels against the float32 reference, which the gate's own tests hold to its definition."""

from __future__ import annotations

import pytest
import torch

import seerattention as seer
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.gate_scores import gate_scores
from seerattention.ops.gate_scores.interface import empty_scores

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


def in_float32(inputs):
    return [None if x is None else x.float() for x in inputs]


def assert_near(actual, inputs, masked=True, tolerance=1e-5):
    expected = gate_scores(
        *in_float32(inputs), block_size=BLOCK_SIZE, scale=0.25, implementation="reference"
    )  # fmt: skip
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
        scores = gate_scores(*inputs, block_size=BLOCK_SIZE, scale=0.25, masked=masked, implementation="triton")
        assert_near(scores, inputs, masked)


@needs_interpreter
@pytest.mark.parametrize("form", ["published", "wide"])
def test_triton_in_half_precision_over_several_tiles(form, nan_filled_empty):
    inputs = make_inputs(140, dtype=torch.float16, **FORMS[form])
    for masked in (True, False):
        scores = gate_scores(*inputs, block_size=BLOCK_SIZE, scale=0.25, masked=masked, implementation="triton")
        assert_near(scores, inputs, masked, tolerance=1e-3)


@needs_interpreter
def test_policies_ignore_what_is_not_written(nan_filled_empty):
    inputs = make_inputs(140, dtype=torch.float16)
    whole, causal = (
        gate_scores(*inputs, block_size=BLOCK_SIZE, masked=masked, implementation="triton") for masked in (True, False)
    )
    assert causal.isnan().any()
    for policy in (seer.TopK(0.2), seer.Threshold(0.01), seer.TopP(0.7), seer.TokenBudget(96)):
        a, b = (policy.select(scores, block_size=BLOCK_SIZE).to_mask() for scores in (whole, causal))
        assert torch.equal(a, b), policy


def test_rows_of_scores_begin_at_vectors():
    scores = empty_scores(torch.empty(1, 2, 17, 8, dtype=torch.bfloat16))
    assert scores.shape == (1, 2, 17, 17)
    assert scores.stride() == (2 * 17 * 32, 17 * 32, 32, 1)
    assert scores.dtype == torch.float32


def test_gradients_go_through_the_reference():
    inputs = make_inputs(5)
    inputs[2].requires_grad_()
    scores = gate_scores(*inputs, block_size=BLOCK_SIZE)
    scores.masked_fill(scores.isinf(), 0).square().sum().backward()
    assert (inputs[2].grad != 0).any()


@needs_interpreter
@pytest.mark.parametrize("form", ["published", "keys_per_kv_head", "odd_without_rotation"])
@pytest.mark.parametrize("num", [5, 16])
def test_is_a_proper_op(form, num):
    inputs = make_inputs(num, **FORMS[form])
    torch.library.opcheck(torch.ops.seerattention.gate_scores, (*inputs, BLOCK_SIZE, 0.25, True, "triton"))


def test_without_triton_the_op_is_the_reference():
    inputs = make_inputs(5)
    found = torch.ops.seerattention.gate_scores(*inputs, BLOCK_SIZE, 0.25, True, "reference")
    assert torch.equal(found, gate_scores(*inputs, block_size=BLOCK_SIZE, scale=0.25))
    torch.library.opcheck(torch.ops.seerattention.gate_scores, (*inputs, BLOCK_SIZE, 0.25, True, "reference"))


@needs_interpreter
def test_compiles():
    def call(*inputs):
        return gate_scores(*inputs, block_size=BLOCK_SIZE, implementation="triton")

    torch._dynamo.reset()
    function = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for num in (5, 6, 9):
            inputs = make_inputs(num)
            assert torch.equal(function(*inputs), call(*inputs))


def test_wrong_arguments():
    q, k, k_linear, _, cos, sin = make_inputs(6)
    options = {"block_size": BLOCK_SIZE}
    with pytest.raises(TypeError, match="k_linear is"):
        gate_scores(q, k, k_linear.double(), None, cos, sin, **options)
    with pytest.raises(ValueError, match="pooled_k must be"):
        gate_scores(q, k[:, :, :5], k_linear, None, cos, sin, **options)
    with pytest.raises(ValueError, match="k_linear must be"):
        gate_scores(q, k, k_linear[:3], None, cos, sin, **options)
    with pytest.raises(ValueError, match="need q_linear"):
        gate_scores(q[..., :8], k, k_linear, None, cos, sin, **options)
    with pytest.raises(ValueError, match="both cos and sin"):
        gate_scores(q, k, k_linear, None, cos, None, **options)
    with pytest.raises(ValueError, match="cos and sin must be"):
        gate_scores(q, k, k_linear, None, cos[:, :100], sin[:, :100], **options)
    with pytest.raises(ValueError, match="no implementation"):
        gate_scores(q, k, k_linear, None, cos, sin, implementation="cuda", **options)
    with pytest.raises(ValueError, match="fits no vectors"):
        gate_scores(q, k, k_linear, None, cos.repeat(1, 1, 2)[..., :20], sin.repeat(1, 1, 2)[..., :20], **options)
    if triton_interpreted() and triton_importable():
        with pytest.raises(ValueError, match="score all rows"):
            gate_scores(q, k, k_linear, None, cos, sin, rows=torch.tensor([1]), implementation="triton", **options)
