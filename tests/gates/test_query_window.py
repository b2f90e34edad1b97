"""Scores of the last tokens together, against their definition; and the state that keeps these tokens' queries."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from row_operations import move_rows
from seerattention import DecodeGateConfig
from seerattention.gates import DecodeGate, QueryState, build_gate, window
from seerattention.gates.query_state import Recent
from seerattention.gates.window import choose_together
from seerattention.ops.span import Span

BLOCK, KV_HEADS, HEAD_DIM = 16, 2, 16
SHAPE = {"block_size": BLOCK, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FORMS = {"published": {}, "fine": {"k_pitch": 4, "merge_heads": False}, "no_rope": {"rope": False}}


def make_gate(group=2, **options) -> DecodeGate:
    torch.manual_seed(0)
    gate = build_gate(DecodeGateConfig(**options), num_heads=group * KV_HEADS, **SHAPE)
    assert isinstance(gate, DecodeGate)
    return gate


def make_inputs(length, batch=1, group=2):
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(batch, heads, length, HEAD_DIM, generator=generator) for heads in (group * KV_HEADS, KV_HEADS))
    angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.cat((angles, angles), -1)[None].expand(batch, -1, -1)
    return 2 * q, k, angles.cos(), angles.sin()


def definition(single, position, size):
    """Of one row: float64 ``[H, N]`` of the token at ``position``, from every token's scores ``single [H, T, N]`` of
    all blocks, those of the future too."""
    blocks = (position + 1) // BLOCK
    out = torch.full((single.shape[0], single.shape[2]), -math.inf, dtype=torch.float64)
    for head in range(single.shape[0]):
        for token in range(max(0, position - size + 1), position + 1):
            scores = [float(x) for x in single[head, token, :blocks]]
            total = math.log(sum(math.exp(x) for x in scores)) if scores else 0.0
            for block, score in enumerate(scores):
                out[head, block] = max(float(out[head, block]), score - total)
    return out


def every_score(gate, q, k, cos, sin):
    """``[B, Hkv, T, N]``: of all tokens and whole blocks, of the future too."""
    keys, queries = gate.encode_keys(k, cos, sin).double(), gate.encode_queries(q, cos, sin).double()
    blocks = keys.shape[2] * gate.k_pitch // BLOCK
    keys = keys[:, :, : blocks * BLOCK // gate.k_pitch].unflatten(2, (blocks, BLOCK // gate.k_pitch))
    keys = keys.repeat_interleave(queries.shape[1] // gate.num_kv_heads, 1)
    scores = torch.einsum("bhtw,bhnpw->bhtnp", queries, keys).amax(-1) * gate.scale
    return scores.unflatten(1, (gate.num_kv_heads, -1)).amax(2)


def parts_of(inputs, begin, end):
    return [x[:, :, begin:end] for x in inputs[:2]] + [x[:, begin:end] for x in inputs[2:]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 5, 40])
@pytest.mark.parametrize("chunks", [(50, 1, 1, 1, 12, 1), (1,) * 40, (33, 3, 16, 1), (2, 1, 1)])
@torch.no_grad()
def test_a_sequence_that_grows(form, size, chunks):
    """A prompt, single tokens and candidates of several: each scores with the tokens before it, by the definition."""
    gate, inputs = make_gate(query_window=size, **FORMS[form]), make_inputs(sum(chunks), batch=2)
    whole = every_score(gate, *inputs)
    keys, queries, begin = gate.new_state(), gate.new_query_state(), 0
    for chunk in chunks:
        q, k, cos, sin = parts_of(inputs, begin, begin + chunk)
        encoded = gate.encode_keys(k, cos, sin, state=keys)
        recent = queries.append(gate.encode_queries(q, cos, sin))
        span = Span(2, chunk, begin + chunk)
        scores = gate.score_window(recent, encoded, span=span)
        assert scores.dtype == torch.float32
        assert scores.shape == (2, KV_HEADS, chunk, span.num_key_blocks(BLOCK))
        for row in range(2):
            for token in range(chunk):
                expected = definition(whole[row], begin + token, size)[:, : scores.shape[-1]]
                found = scores[row, :, token].double()
                assert (found[:, expected.shape[1] :] == -math.inf).all()
                torch.testing.assert_close(found[:, : expected.shape[1]], expected, **CLOSE)
        begin += chunk


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_rows_that_are_shorter_than_the_window(form):
    """Left-padded: the slots in front of a row's first token are no tokens of it."""
    gate, inputs = make_gate(query_window=8, **FORMS[form]), make_inputs(70, batch=3)
    for queries in (1, 4):
        for lengths in ([70, 36, 34], [70, 5, 4]):
            starts = torch.tensor(lengths) - queries
            span = Span.of_rows(queries, 70, start=starts, length=torch.full((3,), queries))
            # Each row's own tokens end with the last slot; what is in front is of nobody.
            rows = [[x[row : row + 1] for x in parts_of(inputs, 0, length)] for row, length in enumerate(lengths)]
            encoded = [gate.encode_queries(q, cos, sin) for q, _, cos, sin in rows]
            recent = torch.full((3, *encoded[0].shape[1:2], 7 + queries, HEAD_DIM), 1e4)
            for row, mine in enumerate(encoded):
                some = mine[0, :, -7 - queries :]
                recent[row, :, recent.shape[2] - some.shape[1] :] = some
            keys = gate.encode_keys(inputs[1], *inputs[2:])
            scores = gate.score_window(Recent(recent), keys, span=span)
            for row, mine in enumerate(rows):
                whole = every_score(gate, *mine)[0]
                for token in range(queries):
                    expected = definition(whole, lengths[row] - queries + token, 8)
                    found = scores[row, :, token].double()
                    torch.testing.assert_close(found[:, : expected.shape[1]], expected, **CLOSE)
                    assert (found[:, expected.shape[1] :] == -math.inf).all()


@torch.no_grad()
def test_a_window_of_one_is_the_score_itself():
    gate, inputs = make_gate(), make_inputs(70)
    keys, queries = gate.encode_keys(*inputs[1:]), gate.encode_queries(inputs[0], *inputs[2:])
    span = Span(1, 3, 70)
    expected = gate.score(queries[:, :, -3:], keys, span=span)
    assert torch.equal(gate.score_window(Recent(queries[:, :, -3:]), keys, span=span), expected)
    assert torch.equal(gate.score_window(Recent(queries[:, :, -9:]), keys, span=span), expected)


def test_many_tokens_are_taken_in_parts(monkeypatch):
    scores, complete = torch.randn(2, 3, 40, 9), torch.arange(1, 34)[None, None, :, None] // 4
    known = torch.tensor([7, 2])
    expected = choose_together(scores, 8, complete=complete, known=known)
    monkeypatch.setattr(window, "_AT_ONCE", 2 * 3 * 8 * 9 * 5)
    assert torch.equal(choose_together(scores, 8, complete=complete, known=known), expected)


def test_a_block_that_an_earlier_token_asks_for_is_kept_whatever_the_scale_of_its_scores():
    """Every token of a window has the same say."""
    scores = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 300.0, 0.0, 0.0]])[None, None]
    found = choose_together(scores, 2, complete=torch.tensor([[[[4]]]]))[0, 0, 0]
    assert set(found.topk(2).indices.tolist()) == {0, 1}


@torch.no_grad()
def test_errors():
    gate, inputs = make_gate(query_window=4), make_inputs(40)
    keys, queries = gate.encode_keys(*inputs[1:]), gate.encode_queries(inputs[0], *inputs[2:])
    for recent, span in (
        (queries[:, :, -1:], Span(1, 2, 40)),
        (queries[:, :, -1:], Span(2, 1, 40)),
        (queries[:, :1, -1:], Span(1, 1, 40)),
        (queries[:, :, -1:], Span(1, 1, 16)),
    ):
        with pytest.raises(ValueError, match="those before them"):
            gate.score_window(Recent(recent), keys, span=span)
    for value, error in ((0, ValueError), (65, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="query_window must be"):
            DecodeGateConfig(query_window=value)
    assert DecodeGateConfig(query_window=64).query_window == 64
    assert "query_window=4" in repr(gate)


# ---- the state -------------------------------------------------------------------------------------------------------

HEADS, DIM = 3, 2


class Rows:
    """Every query of every row, and how many of the last ones a state of this history must hold."""

    def __init__(self, batch, size, history):
        self.size, self.history = size, history
        self.generator = torch.Generator().manual_seed(size + 100 * history)
        self.rows, self.least = [torch.zeros(0, HEADS, DIM) for _ in range(batch)], [0] * batch
        self.state = QueryState(size, history)

    def append(self, width, lengths=None):
        new = torch.randint(1, 1000, (len(self.rows), width, HEADS, DIM), generator=self.generator).float()
        counts = [width] * len(self.rows) if lengths is None else lengths
        before, given_ = list(self.rows), new.transpose(1, 2).clone()
        recent = self.state.append(given_, lengths=lengths)
        given_.zero_()  # the state does not follow the caller's tensor
        self.check_recent(recent, before, width, new)
        for row, count in enumerate(counts):
            self.rows[row] = torch.cat((self.rows[row], new[row, :count]))
            self.least[row] = min(self.least[row] + count, self.size - 1 + self.history)

    def check_recent(self, recent, before, width, new):
        queries, held = recent
        earlier = queries.shape[2] - width
        assert earlier <= self.size - 1
        assert torch.equal(queries[:, :, earlier:], new.transpose(1, 2))
        for row, mine in enumerate(before):
            count = earlier if held is None else held[row]
            assert count >= min(self.size - 1, self.least[row])
            expected = mine[len(mine) - count :].transpose(0, 1)
            assert expected.shape[1] == count
            assert torch.equal(queries[row, :, earlier - count : earlier], expected)

    def crop(self, gone):
        gone = [min(x, len(row)) for x, row in zip(gone, self.rows, strict=True)]
        self.state.crop(gone)
        self.rows = [row[: len(row) - x] for row, x in zip(self.rows, gone, strict=True)]
        self.least = [max(0, x - y) for x, y in zip(self.least, gone, strict=True)]

    def take(self, index):
        self.rows, self.least = [self.rows[row] for row in index], [self.least[row] for row in index]

    def check(self):
        if self.state.held:
            assert all(x >= y for x, y in zip(self.state.held, self.least, strict=True))
            assert max(self.state.held) <= self.state.capacity
            with contextlib.suppress(ValueError):
                self.check_recent(self.state.last, self.rows, 0, torch.zeros(len(self.rows), 0, HEADS, DIM))
            assert self.state.nbytes <= len(self.rows) * (self.state.capacity + 1) * HEADS * DIM * 4
        self.append(0)


OPERATIONS = ["append", "one", "ragged", "crop", "crop_all", "reorder", "repeat", "select", "copy", "reset"]
SEQUENCES = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 13), st.lists(st.integers(0, 10**6), min_size=6, max_size=6)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.sampled_from([1, 2, 5, 9]), st.sampled_from([0, 2, 8]), SEQUENCES)
def test_any_sequence_of_operations_gives_the_last_tokens(batch, size, history, operations):
    model = Rows(batch, size, history)
    for kind, number, numbers in operations:
        batch, known = len(model.rows), bool(model.state.held)
        if kind == "append" or not known:
            model.append(number)
        elif kind == "one":
            model.append(1)
        elif kind == "ragged":
            model.append(number, [x % (number + 1) for x in numbers[:batch]])
        elif kind == "crop":
            model.crop([x % 12 for x in numbers[:batch]])
        elif kind == "crop_all":
            shortest = min(len(row) for row in model.rows)
            model.state.crop(min(number, shortest))
            model.rows = [row[: len(row) - min(number, shortest)] for row in model.rows]
            model.least = [max(0, x - min(number, shortest)) for x in model.least]
        elif move_rows(model, kind, number, numbers):
            pass
        elif kind == "reset":
            model.state.reset()
            assert (model.state.held, model.state.nbytes) == ([], 0)
            fresh = Rows(batch, size, history)
            model.rows, model.least = fresh.rows, fresh.least
        if number % 3 == 0:
            model.check()
    model.check()


def test_a_crop_within_the_history_leaves_windows_whole():
    state = QueryState(8, 64)
    state.append(torch.arange(300.0)[None, None, :, None])
    state.crop(64)
    recent = state.append(torch.tensor([[[[-1.0]]]]))
    assert recent.queries.flatten().tolist() == [*range(229, 236), -1.0]
    state.crop(1)
    state.crop(3)
    assert state.last.queries.flatten().tolist() == [*range(229, 233)]  # further back the window is shorter


def test_errors_of_the_state():
    state = QueryState(4, 2)
    with pytest.raises(ValueError, match="no encoded query"):
        _ = state.last
    state.append(torch.zeros(2, HEADS, 3, DIM))
    with pytest.raises(ValueError, match="2 rows, got queries of 3"):
        state.append(torch.zeros(3, HEADS, 1, DIM))
    for lengths in ([1], [1, 3], [-1, 0]):
        with pytest.raises(ValueError, match="lengths must be"):
            state.append(torch.zeros(2, HEADS, 2, DIM), lengths=lengths)
    for gone in (-1, [1], [0, -1]):
        with pytest.raises(ValueError, match="takes back"):
            state.crop(gone)
    with pytest.raises(ValueError, match="see select"):
        state.reorder([0])
    for arguments in ((0, 1), (4, -1)):
        with pytest.raises(ValueError, match="window must be"):
            QueryState(*arguments)
