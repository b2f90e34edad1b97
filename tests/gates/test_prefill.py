"""The prefill gate against its definition, written out per block in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from seerattention import PrefillGateConfig
from seerattention.gates import PrefillGate, build_gate

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def rotary_table(length: int, rotary_dim: int, *, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[1, length, rotary_dim]`` as Hugging Face lays them out."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    angles = (torch.arange(length) + offset)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[None]
    return angles.cos(), angles.sin()


def make_gate(block_size: int = 32, heads: int = HEADS, kv_heads: int = KV_HEADS, **options) -> PrefillGate:
    torch.manual_seed(0)
    gate = build_gate(
        PrefillGateConfig(**options), block_size=block_size, num_heads=heads, num_kv_heads=kv_heads, head_dim=HEAD_DIM
    )
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return gate


def make_inputs(length: int, *, batch: int = 1, heads: int = HEADS, kv_heads: int = KV_HEADS):
    torch.manual_seed(length)
    q, k = torch.randn(batch, heads, length, HEAD_DIM), torch.randn(batch, kv_heads, length, HEAD_DIM)
    return q, k, *rotary_table(length, HEAD_DIM)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, width: int) -> torch.Tensor:
    """RoPE of one vector channel pair by channel pair: (i, i + r / 2) turn by angle i; r is what fits into the gate."""
    rotary = cos.shape[-1]
    step = max(1, rotary // width)
    half = rotary // step // 2
    out = x.clone()
    for i in range(half):
        c, s = cos[i * step].double(), sin[i * step].double()
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def definition(gate: PrefillGate, q, k, cos, sin, length: int) -> torch.Tensor:
    """Scores ``[Hq, N, N]`` of the first ``length`` tokens of one row."""
    size, group = gate.block_size, gate.num_heads // gate.num_kv_heads
    pools = {"max": lambda x: x.amax(0), "min": lambda x: x.amin(0), "avg": lambda x: x.mean(0)}
    count = math.ceil(length / size)
    scores = torch.full((gate.num_heads, count, count), -math.inf, dtype=torch.float64)

    def vector(x, kinds, weight, block):
        tokens = x[block * size : min((block + 1) * size, length)].double()
        pooled = torch.cat([pools[kind](tokens) for kind in kinds])
        projected = pooled if weight is None else pooled @ weight.double()
        start = block * size
        return rotate_pairs(projected, cos[start], sin[start], gate.width) if gate.config.rope else projected

    for head in range(gate.num_heads):
        k_weight = gate.k_linear[head if len(gate.k_linear) == gate.num_heads else head // group]
        q_weight = None if gate.q_linear is None else gate.q_linear[head]
        keys = [vector(k[head // group], gate.config.k_pooling, k_weight, block) for block in range(count)]
        for row in range(count):
            query = vector(q[head], gate.config.q_pooling, q_weight, row)
            for column in range(row + 1):
                scores[head, row, column] = query @ keys[column] / math.sqrt(gate.width)
    return scores


FORMS = {
    "published": {},
    "q_linear": {"q_linear": True},
    "wide": {"hidden_size": 32},
    "narrow": {"hidden_size": 8},
    "no_rope": {"rope": False},
    "two_query_poolings": {"q_pooling": ("max", "avg")},
    "one_key_pooling": {"k_pooling": ("max",)},
    "other_order": {"k_pooling": ("avg", "max"), "q_pooling": ("min", "avg", "max"), "hidden_size": 20},
}


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 129])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_definition(form, length):
    gate = make_gate(**FORMS[form])
    q, k, cos, sin = make_inputs(length)
    expected = definition(gate, q[0], k[0], cos[0], sin[0], length)
    logits = gate(q, k, cos, sin)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("block_size", "heads", "kv_heads"),
    [(32, 4, 4), (64, 7, 1), (128, 4, 1), (64, 8, 2)],
)
@torch.no_grad()
def test_block_sizes_and_groups(block_size, heads, kv_heads):
    for options in ({}, {"q_linear": True}):
        gate = make_gate(block_size, heads, kv_heads, **options)
        q, k, cos, sin = make_inputs(200, heads=heads, kv_heads=kv_heads)
        expected = definition(gate, q[0], k[0], cos[0], sin[0], 200)
        torch.testing.assert_close(gate(q, k, cos, sin)[0].double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_partial_rotary_leaves_the_other_channels():
    gate = make_gate()
    q, k, _, _ = make_inputs(100)
    cos, sin = rotary_table(100, 8)
    expected = definition(gate, q[0], k[0], cos[0], sin[0], 100)
    torch.testing.assert_close(gate(q, k, cos, sin)[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["published", "wide", "two_query_poolings"])
@torch.no_grad()
def test_padded_rows_score_as_they_would_alone(form):
    gate, lengths = make_gate(**FORMS[form]), torch.tensor([100, 33, 1])
    q, k, cos, sin = make_inputs(100, batch=3)
    cos = torch.cat([rotary_table(100, HEAD_DIM, offset=offset)[0] for offset in (0, 5, 9)])
    sin = torch.cat([rotary_table(100, HEAD_DIM, offset=offset)[1] for offset in (0, 5, 9)])
    batched = gate(q, k, cos, sin, lengths=lengths)
    assert not batched.isnan().any()
    for row, length in enumerate(lengths.tolist()):
        part = slice(row, row + 1)
        alone = gate(q[part, :, :length], k[part, :, :length], cos[part, :length], sin[part, :length])
        blocks = alone.shape[-1]
        torch.testing.assert_close(batched[part, :, :blocks, :blocks], alone)


@pytest.mark.parametrize("rows", [[0], [3, 1], [0, 1, 2, 3]])
@torch.no_grad()
def test_rows(rows):
    gate, index = make_gate(q_linear=True), torch.tensor(rows)
    inputs = make_inputs(100, batch=2)
    some = gate(*inputs, rows=index)
    assert some.shape == (2, HEADS, len(rows), 4)
    torch.testing.assert_close(some, gate(*inputs)[:, :, index])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_parameters_only(form):
    gate = make_gate(**FORMS[form])
    q, k, cos, sin = make_inputs(100)
    q.requires_grad_(), k.requires_grad_()
    gate(q, k, cos, sin).masked_fill(torch.ones(4, 4).triu(1).bool(), 0).square().sum().backward()
    assert q.grad is None
    assert k.grad is None
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(-1).all(), name


def test_gradients_are_right():
    gate = make_gate(q_linear=True, hidden_size=8)
    q, k, cos, sin = make_inputs(70)
    causal = torch.ones(3, 3).tril().bool()
    weights = torch.randn(4, 3, 3).masked_fill(~causal, 0)

    def loss() -> torch.Tensor:
        return (gate(q, k, cos, sin)[0].masked_fill(~causal, 0) * weights).sum()

    loss().backward()
    for parameter in gate.parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-2 * direction
            above = loss()
            parameter -= 2e-2 * direction
            below = loss()
            parameter += 1e-2 * direction
        slope = (above - below) / 2e-2
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_is_near_and_float32(dtype):
    gate = make_gate()
    inputs = make_inputs(130)
    exact = gate(*inputs)
    rounded = gate.to(dtype)(*(x.to(dtype) for x in inputs))
    assert rounded.dtype == torch.float32
    finite = exact.isfinite()
    assert (rounded - exact)[finite].norm() <= 0.02 * exact[finite].norm()


@torch.no_grad()
def test_a_float32_gate_takes_bfloat16_inputs():
    gate, inputs = make_gate(), [x.bfloat16() for x in make_inputs(130)]
    assert gate(*inputs).dtype == torch.float32
    assert gate.k_linear.dtype == torch.float32


@pytest.mark.parametrize("form", ["published", "q_linear", "wide", "narrow"])
@torch.no_grad()
def test_fresh_gates_begin_near_the_similarity_of_means(form):
    torch.manual_seed(0)
    gate = build_gate(
        PrefillGateConfig(**FORMS[form]), block_size=32, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM
    )
    q, k, cos, sin = make_inputs(320)
    mean_q = q.unflatten(2, (-1, 32)).mean(3)
    mean_k = k.unflatten(2, (-1, 32)).mean(3).repeat_interleave(2, 1)
    if form == "narrow":  # every other channel, with its frequency
        mean_q, mean_k = mean_q[..., ::2], mean_k[..., ::2]
        cos, sin = cos[..., ::2], sin[..., ::2]

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, ::32] + torch.cat((-second, first), -1) * sin[:, ::32]

    similarity = rotate(mean_q) @ rotate(mean_k).transpose(-1, -2)
    logits = gate(
        q,
        k,
        cos if form != "narrow" else rotary_table(320, HEAD_DIM)[0],
        sin if form != "narrow" else rotary_table(320, HEAD_DIM)[1],
    )
    causal = torch.ones(10, 10).tril().bool().expand_as(logits)
    pair = torch.stack((similarity[causal], logits[causal]))
    assert torch.corrcoef(pair)[0, 1] > 0.5


def test_parameter_shapes():
    shapes = {name: tuple(value.shape) for name, value in make_gate().named_parameters()}
    assert shapes == {"k_linear": (HEADS, 3 * HEAD_DIM, HEAD_DIM)}
    shapes = {name: tuple(value.shape) for name, value in make_gate(hidden_size=32).named_parameters()}
    assert shapes == {"k_linear": (KV_HEADS, 3 * HEAD_DIM, 32), "q_linear": (HEADS, HEAD_DIM, 32)}


def test_pooling_kinds_of_every_set():
    kinds = ("max", "min", "avg")
    for size in (1, 2, 3):
        for k_pooling in itertools.combinations(kinds, size):
            gate = make_gate(k_pooling=k_pooling)
            assert gate.k_linear.shape == (HEADS, size * HEAD_DIM, HEAD_DIM)
            assert gate(*make_inputs(70)).shape == (1, HEADS, 3, 3)


def test_errors():
    gate = make_gate(hidden_size=12)
    q, k, cos, sin = make_inputs(70)
    with pytest.raises(ValueError, match="rotary"):
        gate(q, k, cos, sin)
    gate = make_gate()
    with pytest.raises(ValueError, match=r"whole prompt"):
        gate(q[:, :2], k, cos, sin)
    with pytest.raises(ValueError, match=r"whole prompt"):
        gate(q[:, :, :50], k, cos, sin)
    with pytest.raises(ValueError, match="cos and sin"):
        gate(q, k, cos[:, :50], sin[:, :50])
    with pytest.raises(ValueError, match="multiple"):
        make_gate(heads=3, kv_heads=2)
    with pytest.raises(TypeError, match="PrefillGateConfig"):
        build_gate({}, block_size=64, num_heads=1, num_kv_heads=1, head_dim=16)
