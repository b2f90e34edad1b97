"""The three parts of a gate: keys that come in chunks, queries of given rows, rectangular scores; whole and in
sub-blocks."""

from __future__ import annotations

import math

import pytest
import torch

from seerattention import GateConfig, PrefillGateConfig
from seerattention.gates import PrefillGate, build_gate, prefill
from seerattention.ops.gate_scores import prompt
from seerattention.ops.span import Span

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 8, 16
FORMS = {
    "published": {},
    "keys_per_kv_head": {"q_linear": True, "q_pooling": ("max", "avg")},
    "no_rope": {"rope": False},
}
PITCHES = [(16, 16), (8, 4), (4, 8), (16, 4)]


def make_gate(pitches=(BLOCK, BLOCK), **options) -> PrefillGate:
    torch.manual_seed(0)
    gate = build_gate(
        PrefillGateConfig(**options), block_size=BLOCK, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM
    )
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    gate.q_pitch, gate.k_pitch = pitches
    return gate


def make_inputs(length, batch=1):
    """q, k and tables of their own for each row, as left-padded batches have them."""
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(batch, heads, length, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS))
    frequencies = 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = (torch.arange(length) + 3 * torch.arange(batch)[:, None])[..., None] * frequencies
    angles = torch.cat((angles, angles), -1)
    return q, k, angles.cos(), angles.sin()


def definition(gate, q, k, cos, sin, row, start, end):
    """Scores ``[Hq, N]`` of the queries ``start .. end`` that lie in block ``row``, of one prompt of ``end`` tokens.

    The diagonal: a pair of sub-blocks counts where the key's begins not behind the last token of the query's.
    """
    size, pitch, group = gate.block_size, gate.q_pitch, gate.num_heads // gate.num_kv_heads
    pools = {"max": lambda x: x.amax(0), "min": lambda x: x.amin(0), "avg": lambda x: x.mean(0)}

    def vector(x, kinds, weight, begin, behind):
        pooled = torch.cat([pools[kind](x[begin:behind].double()) for kind in kinds])
        encoded = pooled if weight is None else pooled @ weight.double()
        first, second = encoded.chunk(2)
        turned = encoded * cos[begin].double() + torch.cat((-second, first)) * sin[begin].double()
        return turned if gate.config.rope else encoded

    scores = torch.full((gate.num_heads, row + 1), -math.inf, dtype=torch.float64)
    for head in range(gate.num_heads):
        k_weight = gate.k_linear[head if len(gate.k_linear) == gate.num_heads else head // group]
        q_weight = None if gate.q_linear is None else gate.q_linear[head]
        queries = [
            (
                begin + pitch,
                vector(q[head], gate.config.q_pooling, q_weight, max(begin, start), min(begin + pitch, end)),
            )
            for begin in range(row * size, (row + 1) * size, pitch)
            if begin + pitch > start and begin < end
        ]  # fmt: skip
        for begin in range(0, min((row + 1) * size, end), gate.k_pitch):
            key = vector(k[head // group], gate.config.k_pooling, k_weight, begin, min(begin + gate.k_pitch, end))
            for behind, query in queries:
                if begin < behind:
                    place = head, begin // size
                    scores[place] = scores[place].maximum(query @ key / math.sqrt(gate.width))
    return scores


def check(gate, logits, inputs, span):
    """Every row of every batch row; ``inputs`` are those of whole prompts."""
    q, k, cos, sin = inputs
    start, ends = span.column(1), span.ends()
    assert logits.dtype == torch.float32
    for batch, (row_blocks, valid) in enumerate(zip(*expanded(span), strict=True)):
        for row, (block, holds) in enumerate(zip(row_blocks.tolist(), valid.tolist(), strict=True)):
            if not holds:
                continue
            only = [x[min(batch, len(x) - 1)] for x in (q, k, cos, sin)]
            expected = definition(gate, *only, block, int(start[batch]), int(ends[batch]))
            found = logits[batch, :, row].double()
            torch.testing.assert_close(found[:, : block + 1], expected, rtol=1e-4, atol=1e-4)
            assert (found[:, block + 1 :] == -math.inf).all()


def expanded(span):
    blocks, valid = span.row_blocks(BLOCK), span.valid_rows(BLOCK)
    return blocks.expand(span.batch, -1), valid.expand(span.batch, -1)


@pytest.mark.parametrize("pitches", PITCHES)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_whole_prompts(form, pitches):
    gate = make_gate(pitches, **FORMS[form])
    for length in (1, 16, 39):
        inputs = make_inputs(length, batch=2)
        check(gate, gate(*inputs), inputs, Span(2, length, length))
        lengths = torch.tensor([length, length // 3 + 1])
        padded = gate(*inputs, lengths=lengths)
        check(gate, padded, inputs, Span.of_padded(2, length, length, lengths))
        rows = torch.tensor([(length - 1) // BLOCK, 0])
        torch.testing.assert_close(gate(*inputs, rows=rows), gate(*inputs)[:, :, rows])


@pytest.mark.parametrize("pitches", PITCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunks", [(16, 32, 16), (1, 1, 30, 9, 23), (39, 1, 24)])
@torch.no_grad()
def test_chunks(form, pitches, chunks):
    """Each part of a query block is scored from the tokens it holds; on boundaries that is the one-shot score."""
    gate = make_gate(pitches, **FORMS[form])
    inputs = make_inputs(sum(chunks), batch=2)
    whole, state, end = gate(*inputs), gate.new_state(), 0
    for chunk in chunks:
        span = Span(2, chunk, end + chunk)
        q, k = (x[:, :, end : end + chunk] for x in inputs[:2])
        cos, sin = (x[:, end : end + chunk] for x in inputs[2:])
        keys = gate.encode_keys(k, cos, sin, state=state)
        logits = gate.score(gate.encode_queries(q, cos, sin, span=span), keys, span=span)
        check(gate, logits, inputs, span)
        last = torch.tensor([span.num_key_blocks(BLOCK) - 1])
        some = gate.score(gate.encode_queries(q, cos, sin, span=span, rows=last), keys, span=span, rows=last)
        torch.testing.assert_close(some, logits[:, :, -1:])
        if end % BLOCK == 0 and span.keys % BLOCK == 0:
            first, columns = span.first_row(BLOCK), logits.shape[-1]
            torch.testing.assert_close(logits, whole[:, :, first : first + logits.shape[2], :columns])
        end += chunk
    torch.testing.assert_close(state.encoded, gate.encode_keys(*inputs[1:]))


@pytest.mark.parametrize("pitches", PITCHES)
@torch.no_grad()
def test_ragged_chunks(pitches):
    """Rows that are padded on the right of every chunk: each is what it is alone."""
    gate, totals = make_gate(pitches, q_linear=True), [45, 20, 33]
    inputs = make_inputs(max(totals), batch=3)
    state, starts = gate.new_state(), [0, 0, 0]
    for counts in ([16, 7, 20], [13, 0, 13], [16, 13, 0]):
        width = max(counts)
        slots = (torch.tensor(starts)[:, None] + torch.arange(width)).clamp(max=max(totals) - 1)
        rows = torch.arange(3)[:, None]
        q, k = (x.transpose(1, 2)[rows, slots].transpose(1, 2).clone() for x in inputs[:2])
        cos, sin = (x[rows, slots] for x in inputs[2:])
        for row, count in enumerate(counts):
            q[row, :, count:] = k[row, :, count:] = math.nan
        keys = gate.encode_keys(k, cos, sin, state=state, lengths=counts)
        starts_, lengths = torch.tensor(starts), torch.tensor(counts)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
        span = Span.of_rows(width, max(starts), start=starts_, length=lengths)
        logits = gate.score(gate.encode_queries(q, cos, sin, span=span), keys, span=span)
        check(gate, logits, inputs, span)
        assert not logits.isnan().any()
        assert (logits.transpose(1, 2)[~span.valid_rows(BLOCK)] == -math.inf).all()
    assert state.lengths == totals
    torch.testing.assert_close(
        state.complete[0, :, : 45 // gate.k_pitch],
        gate.encode_keys(*(x[:1] for x in inputs[1:]))[0, :, : 45 // gate.k_pitch],
    )


@torch.no_grad()
def test_packed_prompts():
    gate, inputs = make_gate((8, 4)), make_inputs(60)
    cu = torch.tensor([0, 25, 41, 60], dtype=torch.int32)
    span = Span.of_packed(cu)
    queries = gate.encode_queries(inputs[0], *inputs[2:], span=span)
    for row, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        alone = [x[:, :, begin:end] for x in inputs[:2]] + [x[:, begin:end] for x in inputs[2:]]
        expected = gate.encode_queries(alone[0], *alone[2:])
        torch.testing.assert_close(queries[row, :, : expected.shape[2]], expected[0])


@torch.no_grad()
def test_the_state_is_cropped_and_shared_like_a_cache():
    gate, inputs = make_gate((8, 4)), make_inputs(50)
    state = gate.new_state(history=8)
    gate.encode_keys(*inputs[1:], state=state)
    state.crop(45)
    state.repeat(2)
    tail = [torch.cat((x, 2 * x)) for x in (inputs[1][:, :, 45:50], inputs[2][:, 45:50], inputs[3][:, 45:50])]
    keys = gate.encode_keys(*tail, state=state)
    torch.testing.assert_close(keys[:1], gate.encode_keys(*inputs[1:]))
    other = torch.cat((inputs[1][:, :, :45], 2 * inputs[1][:, :, 45:]), 2)
    tables = [torch.cat((x[:, :45], 2 * x[:, 45:]), 1) for x in inputs[2:]]
    torch.testing.assert_close(keys[1:], gate.encode_keys(other, *tables))


class Own(PrefillGate):
    """A form that encodes keys in its own way."""

    def encode_keys(self, k, *tables, **options):
        return super().encode_keys(k.flip(3), *tables, **options)


@pytest.mark.parametrize("form", [*FORMS, "own"])
@pytest.mark.parametrize("pitches", [(16, 16), (8, 4)])
@pytest.mark.parametrize("start", [16, 21])
def test_keys_of_a_cache_are_turned_back(form, pitches, start):
    """Those after RoPE and the queries' own before it are as good as all of them before it."""
    gate, (q, k, cos, sin) = make_gate(pitches, **FORMS.get(form, {})), make_inputs(50)
    if form == "own":
        gate.__class__ = Own
    half = HEAD_DIM // 2
    after = k * cos[:, None] + torch.cat((-k[..., half:], k[..., :half]), -1) * sin[:, None]
    after[:, :, start:] = float("nan")  # which are not read
    span = Span(1, 50 - start, 50)
    found = gate(q[:, :, start:], k[:, :, start:], cos, sin, span=span, cached=after)
    torch.testing.assert_close(found, gate(q[:, :, start:], k, cos, sin, span=span), rtol=1e-4, atol=1e-4)
    other = gate(q[:, :, start:], 2 * k[:, :, start:], cos, sin, span=span, cached=after)
    assert not torch.allclose(found, other)


def test_gradients_reach_the_parameters_through_sub_blocks():
    gate, inputs = make_gate((8, 4), q_linear=True), make_inputs(40)
    for rows in (None, torch.tensor([2, 1])):
        gate.zero_grad()
        logits = gate(*inputs, rows=rows)
        logits.masked_fill(logits == -math.inf, 0).square().sum().backward()
        for parameter in gate.parameters():
            assert parameter.grad.isfinite().all()
            assert (parameter.grad != 0).any()


def test_a_state_takes_no_gradients_and_a_whole_prompt_is_encoded_once(monkeypatch):
    gate, inputs = make_gate(q_linear=True), make_inputs(40)
    assert not gate.encode_keys(*inputs[1:], state=gate.new_state()).requires_grad
    calls = []
    for module, name in ((prompt, "block_pooling"), (prompt, "encode_blocks"), (prefill, "gate_scores")):
        op = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, op=op, name=name, **kwargs: (calls.append(name), op(*args, **kwargs))[1]
        )
    gate(*inputs)
    assert sorted(calls) == ["block_pooling"] * 2 + ["encode_blocks"] * 2 + ["gate_scores"]


def test_errors():
    gate, (q, k, cos, sin) = make_gate(), make_inputs(40)
    span = Span.of_rows(40, 60, start=torch.tensor([20]), length=torch.tensor([40]))
    with pytest.raises(ValueError, match="pass rows=None"):
        gate.encode_queries(q, cos, sin, span=span, rows=torch.tensor([0]))
    with pytest.raises(ValueError, match="chunk"):
        gate.encode_keys(q, cos, sin)
    with pytest.raises(ValueError, match="cos and sin"):
        gate.encode_queries(q, cos[:, :3], sin[:, :3])
    with pytest.raises(ValueError, match="encode_keys"):
        gate(q[:, :, :20], k, cos, sin)


def test_the_width_of_a_gate_has_one_name_and_its_old_one_is_read():
    config = PrefillGateConfig(width=32)
    assert config == PrefillGateConfig(hidden_size=32)
    assert config.resolve(HEAD_DIM).width == PrefillGateConfig(hidden_size=32).resolve(HEAD_DIM).width == 32
    with pytest.raises(ValueError, match="one thing"):
        PrefillGateConfig(width=32, hidden_size=16)


def test_gate_configs_of_earlier_versions_are_read():
    new = GateConfig(prefill=PrefillGateConfig(width=32))
    data = new.to_dict()
    assert "hidden_size" not in data["prefill"]
    old = {**data, "prefill": {**data["prefill"], "hidden_size": data["prefill"].pop("width")}}
    assert old["prefill"]["hidden_size"] == 32
    assert GateConfig.from_dict(old) == new
