"""The state of a gate against one that is computed from scratch, after any sequence of operations."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from row_operations import move_rows
from seerattention.gates import KeyState

HEADS, DIM, ROTARY = 2, 3, 4


def encode(keys, cos, sin, lengths, pitch):
    """Sum and maximum of each block, and the table at its first token: integers, so that equal means equal."""
    batch, heads, width, _ = keys.shape
    count = -(-width // pitch)
    valid = torch.arange(width) < (torch.full((batch,), width) if lengths is None else lengths)[:, None]
    assert lengths is None or not valid.all()  # rows that are all alike need no lengths
    keys = torch.nn.functional.pad(keys.masked_fill(~valid[:, None, :, None], 0), (0, 0, 0, count * pitch - width))
    blocks = keys.unflatten(2, (count, pitch))
    parts = [blocks.sum(3), blocks.amax(3)]
    if cos is not None:
        assert cos.shape[1] == sin.shape[1] == count
        parts += [table[:, None].expand(batch, heads, -1, -1) for table in (cos, sin)]
    return torch.cat(parts, -1)


class Rows:
    """Every token of every row, and the state beside it."""

    def __init__(self, batch, pitch, history, rotary, shared=False):
        self.pitch, self.rotary, self.shared = pitch, rotary, shared
        self.generator = torch.Generator().manual_seed(pitch + 10 * history)
        self.rows = [torch.zeros(0, HEADS, DIM) for _ in range(batch)]
        self.tables = [torch.zeros(0, 2, ROTARY) for _ in range(batch)]
        self.state = KeyState(pitch, history)

    def draw(self, *shape):
        return torch.randint(1, 100, shape, generator=self.generator).float()

    def append(self, width, lengths=None, only_complete=False):
        batch = len(self.rows)
        keys, table = self.draw(batch, width, HEADS, DIM), self.draw(1 if self.shared else batch, width, 2, ROTARY)
        counts = [width] * batch if lengths is None else lengths
        for row, count in enumerate(counts):
            self.rows[row] = torch.cat((self.rows[row], keys[row, :count]))
            self.tables[row] = torch.cat((self.tables[row], table[row % len(table), :count]))
        tables = (table[:, :, 0], table[:, :, 1]) if self.rotary else (None, None)
        self.state.append(
            keys.transpose(1, 2),
            *tables,
            encode=lambda *args: encode(*args, self.pitch),
            lengths=lengths,
            only_complete=only_complete,
        )

    def crop(self, lengths):
        if self.state.crop_needs_keys(lengths):
            with pytest.raises(ValueError, match="no longer has the tokens"):
                self.state.crop(lengths)
            size = self.pitch - 1
            keys, tables = torch.zeros(len(lengths), size, HEADS, DIM), torch.zeros(len(lengths), size, 2, ROTARY)
            for row, length in enumerate(lengths):
                begin = length // self.pitch * self.pitch
                keys[row, : length - begin] = self.rows[row][begin:length]
                tables[row, : length - begin] = self.tables[row][begin:length]
            self.state.crop(lengths, keys=keys.transpose(1, 2), cos=tables[:, :, 0], sin=tables[:, :, 1])
        else:
            self.state.crop(lengths)
        self.take(range(len(self.rows)), lengths)

    def take(self, index, lengths=None):
        lengths = [None] * len(index) if lengths is None else lengths
        self.rows = [self.rows[row][:length] for row, length in zip(index, lengths, strict=True)]
        self.tables = [self.tables[row][:length] for row, length in zip(index, lengths, strict=True)]

    def check(self):
        """Open blocks are encoded anew where they have changed, by an append of nothing."""
        lengths = [len(row) for row in self.rows]
        assert self.state.lengths in ([], lengths)
        if any(length >= self.pitch for length in lengths):
            self.compare(self.state.complete, complete=True)
        if any(lengths):
            with contextlib.suppress(ValueError):
                self.compare(self.state.encoded)
            self.append(0)
            self.compare(self.state.encoded)

    def compare(self, found, complete=False):
        for row, (keys, table) in enumerate(zip(self.rows, self.tables, strict=True)):
            length = len(keys) // self.pitch * self.pitch if complete else len(keys)
            if not length:
                continue
            tables = table[: length : self.pitch]
            cos, sin = (tables[None, :, 0], tables[None, :, 1]) if self.rotary else (None, None)
            expected = encode(keys[None, :length].transpose(1, 2), cos, sin, None, self.pitch)[0]
            assert torch.equal(found[row, :, : expected.shape[1]], expected)


OPERATIONS = ["append", "ragged", "complete", "crop", "crop_all", "reorder", "repeat", "select", "copy", "reset"]
SEQUENCES = st.lists(
    st.tuples(
        st.sampled_from(OPERATIONS),
        st.integers(0, 13),
        st.lists(st.integers(0, 10**6), min_size=6, max_size=6),
    ),
    min_size=1,
    max_size=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.sampled_from([1, 3, 4, 8]), st.sampled_from([0, 2, 8]), st.booleans(), SEQUENCES)
def test_any_sequence_of_operations_equals_a_recomputation(batch, pitch, history, rotary, operations):
    model = Rows(batch, pitch, history, rotary)
    for kind, number, numbers in operations:
        lengths, batch = model.state.lengths, len(model.rows)
        if kind == "append" or not lengths:
            model.append(number)
        elif kind == "ragged":
            model.append(number, [x % (number + 1) for x in numbers[:batch]])
        elif kind == "complete":
            model.append(number, only_complete=True)
        elif kind == "crop":
            model.crop([x % (length + 1) for x, length in zip(numbers, lengths, strict=False)])
        elif kind == "crop_all":
            model.crop([max(0, min(lengths) - number)] * batch)
        elif move_rows(model, kind, number, numbers):
            pass
        elif kind == "reset":
            model.state.reset()
            assert model.state.lengths == []
            fresh = Rows(batch, pitch, history, rotary)
            model.rows, model.tables = fresh.rows, fresh.tables
            assert model.state.nbytes == 0
        if number % 3 == 0:
            model.check()
    model.check()


@pytest.mark.parametrize("rotary", [False, True])
def test_one_table_for_all_rows(rotary):
    model = Rows(3, 4, 8, rotary, shared=True)
    for width in (9, 1, 1, 6):
        model.append(width)
        model.check()
    model.state.reorder([2, 0, 0])
    model.take([2, 0, 0])
    model.append(5, [5, 0, 3])
    model.check()


def test_memory_is_that_of_the_vectors_and_the_last_tokens():
    model = Rows(2, 8, 16, True)
    model.append(4096)
    state = model.state
    for x in (state._blocks, state._tokens, state._starts):
        assert x.untyped_storage().nbytes() == x.nbytes
    vectors = 2 * HEADS * 512 * (2 * DIM + 2 * ROTARY) * 4
    assert vectors < state.nbytes < 1.05 * vectors
    for _ in range(40):
        model.append(1, only_complete=True)
    assert state._tokens.shape[2] <= 16 + 2 * 8
    assert state.nbytes < 1.6 * vectors


def test_a_step_of_decoding_encodes_complete_blocks_only():
    state, calls = KeyState(4, 8), []

    def count(keys, cos, sin, lengths):
        calls.append(keys.shape[2])
        return encode(keys, cos, sin, lengths, 4)

    for _ in range(9):
        state.append(torch.ones(1, HEADS, 1, DIM), None, None, encode=count, only_complete=True)
    assert calls == [4, 4]
    assert state.complete.shape[2] == 2
    with pytest.raises(ValueError, match="not encoded"):
        _ = state.encoded


def test_the_state_does_not_follow_the_callers_keys():
    keys, state = torch.ones(1, HEADS, 3, DIM), KeyState(4, 8)
    for _ in range(2):
        state.append(keys, None, None, encode=lambda *args: encode(*args, 4))
        keys.zero_()
    assert (state.encoded[..., :DIM] == torch.tensor([3.0, 0.0])[:, None]).all()


def test_history_is_what_a_crop_takes_back():
    model = Rows(1, 8, 20, True)
    model.append(100)
    assert not any(model.state.crop_needs_keys(length) for length in (*range(80, 101), 72, 8, 0))
    assert model.state.crop_needs_keys(71)
    model.crop([83])
    model.check()
    model.append(30)
    model.check()


def test_errors():
    state = KeyState(4)
    with pytest.raises(ValueError, match="no encoded block"):
        _ = state.encoded
    model = Rows(2, 4, 0, True)
    model.append(10)
    with pytest.raises(ValueError, match="2 rows, got keys of 3"):
        model.state.append(torch.ones(3, HEADS, 1, DIM), None, None, encode=encode)
    for lengths in ([1], [1, 3], [-1, 0]):
        with pytest.raises(ValueError, match="lengths must be"):
            model.append(2, lengths)
    for lengths in (11, -1, [10, 11], [10]):
        with pytest.raises(ValueError, match="cropped"):
            model.state.crop(lengths)
    with pytest.raises(ValueError, match="open blocks of 2 rows"):
        model.state.crop(6, keys=torch.ones(2, HEADS, 1, DIM))
    with pytest.raises(ValueError, match="see select"):
        model.state.reorder([0])
    for pitch, history in ((0, 1), (4, -1)):
        with pytest.raises(ValueError, match="pitch must be"):
            KeyState(pitch, history)
