"""The decode gate against its definition, token by token; and policies by token against naive ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seerattention import DecodeGateConfig
from seerattention.gates import DecodeGate, build_gate, decode
from seerattention.ops.span import Span

KV_HEADS, HEAD_DIM = 2, 16
FORMS = {
    "published": {},
    "no_norm": {"qk_norm": False},
    "no_rope": {"rope": False},
    "narrow": {"width": 8, "k_pooling": ("avg",)},
    "wide": {"width": 24, "k_pooling": ("min", "max")},
    "fine": {"k_pitch": 8},
    "own_heads": {"merge_heads": False, "qk_norm": False},
    "finest": {"k_pitch": 4, "merge_heads": False, "width": 8},
}


def make_gate(block_size=16, group=2, dtype=torch.float32, **options) -> DecodeGate:
    torch.manual_seed(0)
    gate = build_gate(
        DecodeGateConfig(**options),
        block_size=block_size,
        num_heads=group * KV_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    assert isinstance(gate, DecodeGate)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return gate.to(dtype)


def make_inputs(length, batch=1, group=2, dtype=torch.float32):
    """q, k and the tables of ``length`` tokens; the tables differ by row, as those of left-padded batches do."""
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(batch, heads, length, HEAD_DIM, generator=generator) for heads in (group * KV_HEADS, KV_HEADS))
    frequencies = 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = (torch.arange(length) + 3 * torch.arange(batch)[:, None])[..., None] * frequencies
    angles = torch.cat((angles, angles), -1)
    return q.to(dtype), k.to(dtype), angles.cos(), angles.sin()


def rotated(gate, x, cos, sin):
    """The first channels of ``x [W]``; a gate narrower than the table takes every n-th frequency."""
    if not gate.config.rope:
        return x
    step = max(1, len(cos) // len(x))
    cos, sin = cos[::step].double(), sin[::step].double()
    turned, rest = x[: len(cos)], x[len(cos) :]
    first, second = turned.chunk(2)
    return torch.cat((turned * cos + torch.cat((-second, first)) * sin, rest))


def normed(x, weight):
    return x if weight is None else x / (x.square().mean() + 1e-6).sqrt() * weight.double()


def definition(gate, q, k, cos, sin, position, columns):
    """Scores ``[Hkv, columns]`` of one query token, from tensors of one row of the batch, in float64: the largest
    product of any of the token's vectors and any of a block's."""
    pools = {"max": lambda x: x.amax(0), "min": lambda x: x.amin(0), "avg": lambda x: x.mean(0)}
    size, group, pitch = gate.block_size, gate.group, gate.config.k_pitch or gate.block_size
    scores = torch.full((gate.num_kv_heads, columns), -math.inf, dtype=torch.float64)
    for head in range(gate.num_kv_heads):
        vectors = [
            q[head * group + member, position].double() @ gate.q_linear[head, member].double()
            for member in range(group)
        ]
        vectors = [sum(vectors)] if gate.config.merge_heads else vectors
        queries = [rotated(gate, normed(vector, gate.q_norm), cos[position], sin[position]) for vector in vectors]
        for begin in range(0, (position + 1) // size * size, pitch):
            tokens = k[head, begin : begin + pitch].double()
            pooled = torch.cat([pools[kind](tokens) for kind in gate.config.k_pooling])
            projected = normed(pooled @ gate.k_linear[head].double(), gate.k_norm)
            key = rotated(gate, projected, cos[begin], sin[begin])
            best = max(float(query @ key) for query in queries) / math.sqrt(gate.width)
            scores[head, begin // size] = max(float(scores[head, begin // size]), best)
    return scores


def check(gate, scores, inputs, positions, *, batch=0, tolerance=1e-4):
    """``scores [B, Hkv, R, N]`` of a row of the batch whose queries are at these positions."""
    assert scores.dtype == torch.float32
    for row, position in enumerate(positions):
        only = [x[min(batch, len(x) - 1)] for x in inputs]
        expected = definition(gate, *only, position, scores.shape[-1])
        torch.testing.assert_close(scores[batch, :, row].double(), expected, rtol=tolerance, atol=tolerance)


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_whole_prompts(form, group, block_size):
    gate = make_gate(block_size, group, **FORMS[form])
    for length in (1, block_size - 1, block_size, 2 * block_size + 7):
        inputs = make_inputs(length, batch=2, group=group)
        scores = gate(*inputs)
        assert scores.shape == (2, KV_HEADS, length, -(-length // block_size))
        some = sorted(
            {0, block_size - 2, block_size - 1, block_size, 2 * block_size - 1, length - 1} & set(range(length))
        )
        for batch in range(2):
            check(gate, scores[:, :, some], inputs, some, batch=batch)
        rows = torch.tensor(some[::-1])
        torch.testing.assert_close(gate(*inputs, rows=rows), scores[:, :, rows])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
@torch.no_grad()
def test_half_precision(dtype, tolerance):
    for form in ("published", "no_norm", "fine", "own_heads", "finest"):
        gate, inputs = make_gate(dtype=dtype, **FORMS[form]), make_inputs(39, dtype=dtype)
        check(gate, gate(*inputs), inputs, range(39), tolerance=tolerance)


@pytest.mark.parametrize("form", ["published", "fine", "finest"])
@torch.no_grad()
def test_padded_rows_score_what_they_would_alone(form):
    gate, inputs = make_gate(**FORMS[form]), make_inputs(50, batch=3)
    lengths = torch.tensor([50, 16, 33])
    scores = gate(*inputs, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = [x[row : row + 1, :, :length] for x in inputs[:2]] + [x[row : row + 1, :length] for x in inputs[2:]]
        expected = gate(*alone)
        torch.testing.assert_close(scores[row : row + 1, :, :length, : expected.shape[-1]], expected)
        assert (scores[row, :, length:] == -math.inf).all()
    rows = torch.tensor([40, 3])
    torch.testing.assert_close(gate(*inputs, lengths=lengths, rows=rows), scores[:, :, rows])


@pytest.mark.parametrize("form", ["published", "no_rope", "fine", "own_heads", "finest"])
@pytest.mark.parametrize("chunks", [(20, 1, 1, 1, 12, 1), (1,) * 40, (32, 1, 3, 16, 1), (5, 1, 1)])
@torch.no_grad()
def test_decoding_on_a_state(form, chunks):
    """A prompt, single tokens, and candidates of several tokens: each scores what the whole sequence says of it."""
    gate = make_gate(**FORMS[form])
    inputs = make_inputs(sum(chunks), batch=2)
    whole, state, end = gate(*inputs), gate.new_state(), 0
    for chunk in chunks:
        part = [x[:, :, end : end + chunk] for x in inputs[:2]] + [x[:, end : end + chunk] for x in inputs[2:]]
        span = Span(2, chunk, end + chunk)
        keys = gate.encode_keys(*part[1:], state=state)
        assert keys.shape[2] == (end + chunk) // gate.k_pitch
        scores = gate.score(gate.encode_queries(part[0], *part[2:], span=span), keys, span=span)
        torch.testing.assert_close(scores, whole[:, :, end : end + chunk, : scores.shape[-1]])
        rows = torch.tensor([end + chunk - 1])
        queries = gate.encode_queries(part[0], *part[2:], span=span, rows=rows)
        torch.testing.assert_close(gate.score(queries, keys, span=span, rows=rows), scores[:, :, -1:])
        end += chunk
    torch.testing.assert_close(state.complete if end >= 16 else keys, gate.encode_keys(*inputs[1:]))


@pytest.mark.parametrize("pitch", [None, 8])
@torch.no_grad()
def test_a_block_is_encoded_once(monkeypatch, pitch):
    """Between the last tokens of two sub-blocks a step pools and projects nothing."""
    gate, (_, k, cos, sin), pooled = make_gate(k_pitch=pitch), make_inputs(40), []
    pool = decode.block_pooling
    monkeypatch.setattr(decode, "block_pooling", lambda x, *args, **kw: (pooled.append(x), pool(x, *args, **kw))[1])
    state = gate.new_state()
    for place in range(40):
        now = slice(place, place + 1)
        gate.encode_keys(k[:, :, now], cos[:, now], sin[:, now], state=state)
    assert [x.shape[2] for x in pooled] == ([16, 16] if pitch is None else [8] * 5)


@pytest.mark.parametrize("form", ["published", "fine"])
@torch.no_grad()
def test_rejected_tokens_leave_no_trace(form):
    gate, inputs = make_gate(**FORMS[form]), make_inputs(40)
    state, (_, k, cos, sin) = gate.new_state(), inputs
    gate.encode_keys(k[:, :, :30], cos[:, :30], sin[:, :30], state=state)
    gate.encode_keys(9 * k[:, :, 30:36], cos[:, 30:36], sin[:, 30:36], state=state)
    state.crop(30)
    keys = gate.encode_keys(k[:, :, 30:], cos[:, 30:], sin[:, 30:], state=state)
    torch.testing.assert_close(keys, gate.encode_keys(k, cos, sin))


@pytest.mark.parametrize("form", ["published", "fine", "finest"])
@torch.no_grad()
def test_rows_of_different_lengths_decode_together(form):
    gate, inputs = make_gate(**FORMS[form]), make_inputs(50, batch=3)
    totals, state, prompt = [31, 16, 3], gate.new_state(), 31
    gate.encode_keys(inputs[1][:, :, :prompt], *(x[:, :prompt] for x in inputs[2:]), state=state, lengths=totals)
    for _ in range(18):
        place = torch.tensor(totals)[:, None]
        q, k = (x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, HEAD_DIM)) for x in inputs[:2])
        cos, sin = (x.gather(1, place[..., None].expand(-1, -1, HEAD_DIM)) for x in inputs[2:])
        span = Span.of_rows(1, max(totals) + 1, start=place[:, 0], length=torch.ones(3, dtype=torch.int64))
        keys = gate.encode_keys(k, cos, sin, state=state)
        scores = gate.score(gate.encode_queries(q, cos, sin, span=span), keys, span=span)
        for row, position in enumerate(totals):
            check(gate, scores, inputs, [position], batch=row)
        totals = [total + 1 for total in totals]


STEPS = st.tuples(st.sampled_from(["append"] * 3 + ["crop", "reorder", "repeat", "select"]), st.integers(0, 10**6))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["published", "fine", "finest"]), st.lists(STEPS, min_size=2, max_size=10))
@torch.no_grad()
def test_any_sequence_of_operations_scores_what_whole_rows_do(form, steps):
    """Rows grow, shrink and change places; a next token scores the blocks of its row as if all came at once."""
    gate, state, random_ = make_gate(**FORMS[form]), None, torch.Generator().manual_seed(0)
    q, k, cos, sin = make_inputs(600)
    lengths, rows = [40, 23], [torch.randint(0, 300, (n,), generator=random_) for n in (40, 23)]

    def append(new):
        width = max(len(x) for x in new)
        padded = torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in new])
        places = torch.stack([torch.arange(n, n + width) for n in lengths]).clamp(max=599)
        keys = gate.encode_keys(k[0][:, padded].transpose(0, 1), cos[0, places], sin[0, places],
                                state=state, lengths=[len(x) for x in new])  # fmt: skip
        lengths[:] = [n + len(x) for n, x in zip(lengths, new, strict=True)]
        return keys

    state, start = gate.new_state(history=600), rows
    lengths = [0, 0]
    append(start)
    for kind, number in steps:
        index = None
        if kind == "append":
            new = [torch.randint(0, 300, ((number + row) % 21,), generator=random_) for row in range(len(rows))]
            append(new)
            rows = [torch.cat(both) for both in zip(rows, new, strict=True)]
        elif kind == "crop":
            lengths = [max(0, n - (number + row) % 30) for row, n in enumerate(lengths)]
            state.crop(lengths)
            rows = [x[:n] for x, n in zip(rows, lengths, strict=True)]
        elif kind == "repeat" and len(rows) < 4:
            state.repeat(2)
            index = [row for row in range(len(rows)) for _ in range(2)]
        elif kind in ("reorder", "select"):
            index = [(number + row) % len(rows) for row in range(len(rows) if kind == "reorder" else 1 + number % 2)]
            getattr(state, kind)(index)
        if index is not None:
            rows, lengths = [rows[row] for row in index], [lengths[row] for row in index]
    new = [torch.tensor([300 + row]) for row in range(len(rows))]
    keys, rows = append(new), [torch.cat(both) for both in zip(rows, new, strict=True)]
    ends = torch.tensor([n - 1 for n in lengths])
    span = Span.of_rows(1, max(lengths), start=ends, length=torch.ones_like(ends))
    now = torch.cat(new)
    query = gate.encode_queries(q[0][:, now].transpose(0, 1)[:, :, None], cos[0, ends][:, None], sin[0, ends][:, None],
                                span=span)  # fmt: skip
    scores = gate.score(query, keys, span=span)
    for row, tokens in enumerate(rows):
        n = len(tokens)
        whole = gate(q[:, :, tokens], k[:, :, tokens], cos[:, :n], sin[:, :n])[0, :, -1]
        torch.testing.assert_close(scores[row, :, 0, : whole.shape[-1]], whole)
        assert (scores[row, :, 0, whole.shape[-1] :] == -math.inf).all()


@torch.no_grad()
def test_packed_prompts():
    gate, inputs = make_gate(), make_inputs(60)
    cu = torch.tensor([0, 25, 41, 60], dtype=torch.int32)
    span = Span.of_packed(cu)
    queries = gate.encode_queries(inputs[0], *inputs[2:], span=span)
    for row, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        expected = gate.encode_queries(inputs[0][:, :, begin:end], *(x[:, begin:end] for x in inputs[2:]))
        torch.testing.assert_close(queries[row, :, : end - begin], expected[0])


def test_fresh_gates_prefer_blocks_that_are_like_the_query():
    torch.manual_seed(0)
    gate = build_gate(DecodeGateConfig(rope=False), block_size=16, num_heads=4, num_kv_heads=2, head_dim=16)
    q, k, cos, sin = make_inputs(64)
    k[:, :, 16:32] = q.unflatten(1, (2, 2)).mean(2)[:, :, -1:]
    with torch.no_grad():
        assert (gate(q, k, cos, sin)[0, :, -1].argmax(-1) == 1).all()


def test_fine_gates_see_one_token_that_a_mean_of_the_block_hides():
    q, k, cos, sin = make_inputs(129)
    query = q.unflatten(1, (2, 2)).mean(2)[:, :, -1:]
    k[:, :, :64], k[:, :, 64:128] = 0, query / 4  # the second block holds more in its mean
    k[:, :, 19:20] = 3 * query
    found = {}
    for pitch in (None, 4):
        torch.manual_seed(0)
        config = DecodeGateConfig(rope=False, qk_norm=False, k_pitch=pitch)
        gate = build_gate(config, block_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
        with torch.no_grad():
            scores = gate(q, k, cos, sin)[0, :, -1]
        found[pitch] = (scores[:, 0] - scores[:, 1]).min()
    assert found[4] > 0 > found[None]


@pytest.mark.parametrize("merge_heads", [True, False])
def test_fresh_heads_that_are_apart_begin_at_their_own_similarity(merge_heads):
    """What one head of the group looks for is a quarter of the mean, and all of its own vector."""
    torch.manual_seed(0)
    config = DecodeGateConfig(rope=False, qk_norm=False, k_pooling=("avg",), merge_heads=merge_heads)
    gate = build_gate(config, block_size=16, num_heads=8, num_kv_heads=2, head_dim=16)
    q, k, cos, sin = make_inputs(33, group=4)
    k[:, :, :16] = q[:, 1::4, -1:]
    with torch.no_grad():
        score = gate(q, k, cos, sin)[0, :, -1, 0]
    own = q[0, 1::4, -1]
    query = q[0, :, -1].unflatten(0, (2, 4)).mean(1) if merge_heads else own
    expected = (query * own).sum(-1) / 16**0.5
    assert ((score - expected).abs() < 0.5 * (own * own).sum(-1) / 16**0.5).all()


@pytest.mark.parametrize("form", ["published", "fine", "own_heads", "finest"])
def test_gradients_reach_the_parameters(form):
    gate, inputs = make_gate(**FORMS[form]), make_inputs(40)
    for rows in (None, torch.tensor([39, 17])):
        gate.zero_grad()
        scores = gate(*inputs, rows=rows)
        scores.masked_fill(scores == -math.inf, 0).square().sum().backward()
        assert len(list(gate.parameters())) == (4 if gate.config.qk_norm else 2)
        for parameter in gate.parameters():
            assert parameter.grad.isfinite().all()
            assert (parameter.grad != 0).any()


def test_a_state_takes_no_gradients():
    gate, inputs = make_gate(), make_inputs(40)
    assert not gate.encode_keys(*inputs[1:], state=gate.new_state()).requires_grad


def test_errors():
    gate, (q, k, cos, sin) = make_gate(), make_inputs(40)
    queries, keys = gate.encode_queries(q, cos, sin), gate.encode_keys(k, cos, sin)
    with pytest.raises(ValueError, match="need a span"):
        gate.score(queries, keys)
    with pytest.raises(ValueError, match="queries must be"):
        gate.score(queries, keys, span=Span(1, 39, 40))
    with pytest.raises(ValueError, match="up to 1"):
        gate.score(queries[:, :, :16], keys, span=Span(1, 16, 16))
    with pytest.raises(ValueError, match=r"takes q \[B, 4"):
        gate.encode_queries(k, cos, sin)
    with pytest.raises(ValueError, match="cos and sin"):
        gate.encode_keys(k, cos[:, :3], sin[:, :3])
    fine = make_gate(k_pitch=8)
    queries, keys = fine.encode_queries(q, cos, sin), fine.encode_keys(k, cos, sin)
    with pytest.raises(ValueError, match="up to 2"):
        fine.score(queries[:, :, :16], keys, span=Span(1, 16, 16))
    with pytest.raises(ValueError, match="at most the block size"):
        make_gate(k_pitch=32)
    with pytest.raises(ValueError, match="rotary"):
        make_gate(width=12).encode_keys(k, cos, sin)
    span = Span.of_rows(40, 40, start=torch.tensor([0]), length=torch.tensor([40]))
    with pytest.raises(ValueError, match="pass rows=None"):
        gate.encode_queries(q, cos, sin, span=span, rows=torch.tensor([0]))
