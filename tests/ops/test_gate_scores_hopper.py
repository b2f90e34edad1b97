"""The Hopper kernel of gate scores without a GPU: its logic in an emulator, and when it is used."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from seerattention.ops import dispatch
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.gate_scores import encode_blocks, gate_scores
from seerattention.ops.gate_scores.interface import empty_scores
from seerattention.ops.gate_scores.reference import Tiles
from seerattention.ops.gate_scores.triton_row import row_scores
from seerattention.ops.span import Span, num_blocks

interface = importlib.import_module("seerattention.ops.gate_scores.interface")
needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)
TILES = Tiles(64, 8, 8, 0.25, "max", True)
PITCHES = {"q_pitch": 8, "k_pitch": 8}


@pytest.fixture
def emulated(emulated_gate_scores):
    return emulated_gate_scores


def draw(num_q, num_k, heads=1, kv_heads=1, width=64, batch=1, dtype=torch.float16, seed=0):
    """Encoded queries and keys, with the strides of encodings that lie token by token.

    In float16 where Triton kernels run as well: their interpreter has no products of bfloat16.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, num_q, heads, width), (batch, num_k, kv_heads, width)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def check(q, k, first=None, span=None):
    """Against the reference, masked and not; the squares that are not needed are left as they were."""
    options = {**PITCHES, "scale": 0.25, "rows": first, "span": span}
    expected = gate_scores(q, k, implementation="reference", **options)
    found, loose = (gate_scores(q, k, implementation="hopper", masked=masked, **options) for masked in (True, False))
    causal = expected > -math.inf
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(loose[causal], found[causal])
    unwritten = loose.isnan()
    assert torch.equal(loose == -math.inf, ~causal & ~unwritten)
    return found, unwritten


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 5), (63, 63), (64, 64), (65, 65), (77, 77), (130, 130)])
def test_whole_prompts(emulated, rows, columns):
    q, k = draw(8 * rows, 8 * columns)
    _, unwritten = check(q, k)
    # Squares above the diagonal, and no others.
    squares = [x // 64 for x in (rows - 1, columns - 1)]
    assert bool(unwritten.any()) == (squares[0] > 0)
    assert [constants for *_, constants in emulated] == [{"MASKED": True}, {"MASKED": False}]


@pytest.mark.parametrize(
    ("rows", "columns", "first"), [(1, 130, 129), (5, 12, 7), (3, 77, 61), (66, 130, 64), (70, 150, 80), (2, 130, 3)]
)
def test_rows_from_some_block_on(emulated, rows, columns, first):
    check(*draw(8 * rows, 8 * columns, seed=rows), first=first)
    assert len(emulated) == 2


@pytest.mark.parametrize("group", range(1, 9))
def test_groups_and_batches(emulated, group):
    check(*draw(8 * 3, 8 * 5, heads=2 * group, kv_heads=2, batch=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_vectors(emulated, dtype):
    check(*draw(8 * 66, 8 * 66, heads=2, width=128, dtype=dtype))


def test_any_strides(emulated):
    q, k = draw(8 * 20, 8 * 20, heads=2, batch=2)
    expected, _ = check(q, k)
    roomy = torch.full((2, 1, 8 * 20, 3, 64), math.nan, dtype=q.dtype)
    roomy[:, :, :, 1] = k
    assert torch.equal(check(q.contiguous(), roomy[:, :, :, 1])[0], expected)
    grown = torch.cat((k, torch.full_like(k, math.nan)), 2)[:, :, : 8 * 20]  # a state has room to grow
    assert torch.equal(check(q, grown)[0], expected)


@needs_interpreter
@pytest.mark.parametrize("length", [65, 127, 64 * 5 - 7, 64 * 66 - 9])
def test_rows_that_lack_sub_blocks(emulated, length):
    """They are left to the Triton kernel; keys that the last whole row does not see may be incomplete, too."""
    num = num_blocks(length, 8)
    q, k = draw(num, num, heads=2, batch=2 if length < 200 else 1)
    check(q, k)
    check(q, k, span=Span(q.shape[0], length, length))
    # Sub-blocks behind the last token are given as well, and do not count.
    q = torch.cat((q, q[:, :, : -num % 8]), 2)
    check(q, k, span=Span(q.shape[0], length, length))
    assert len(emulated) == 6


def test_squares_are_not_for_one_row(emulated, monkeypatch):
    """Of a prompt's last row; where more rows lack something, squares are taken."""
    module, rows, squares = importlib.import_module("seerattention.ops.gate_scores.hopper"), [], []
    monkeypatch.setattr(module, "row_scores", lambda q, k, scores, tiles: rows.append((q.shape[2], tiles.first_row)))
    monkeypatch.setattr(module, "triton_scores", lambda *_: squares.append(1))
    for given in (24, 30):
        gate_scores(*draw(given, given), **PITCHES, implementation="hopper")
    assert (rows, squares) == ([(6, 3)], [])
    q, k = draw(32, 32)
    module.gate_scores(q, k, empty_scores(q, 4, 4), TILES._replace(end=64 * 2 + 5))
    assert (len(rows), len(squares)) == (1, 1)


@needs_interpreter
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 8, 9])
def test_a_last_row_that_lacks_sub_blocks(group, width, nan_filled_empty):
    """Of every length, and of keys that fill no whole number of programs; nothing else is written."""
    for missing in range(1, 64, 9):
        end = 64 * 18 - missing
        q, k = draw(num_blocks(end, 8) - 8 * 17, num_blocks(end, 8), heads=2 * group, kv_heads=2, batch=2, width=width)
        tiles = TILES._replace(first_row=17, start=0, end=end)
        room = empty_scores(q, 2, 18)
        row_scores(q, k, room[:, :, 1:], tiles)
        assert room[:, :, 0].isnan().all()
        options = {**PITCHES, "scale": 0.25, "rows": 17, "span": Span(2, end - 64 * 17, end)}
        expected = gate_scores(q, k, implementation="reference", **options)
        torch.testing.assert_close(room[:, :, 1:], expected, rtol=1e-6, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize(("start", "length"), [(128, 64 * 6), (128, 64 * 6 - 3), (64 * 3 + 5, 64 * 6 - 30)])
def test_chunks(emulated, start, length):
    span = Span(1, length - start, length)
    q, k = draw(span.num_rows(64) * 8, num_blocks(length, 8))
    check(q, k, span=span)
    assert len(emulated) == 2


def test_the_last_query_sub_block_of_a_whole_row_may_hold_one_token(emulated):
    for end in range(64 * 3 - 7, 64 * 3 + 1):
        q, k = draw(24, 24)
        check(q, k, span=Span(1, end, end))
    tiles = TILES._replace(end=64 * 3 - 8)
    assert (tiles.whole_rows(q, k), TILES.whole_rows(q, k)) == (2, 3)
    assert TILES.whole_rows(q, k[:, :, :-1]) == 2
    assert TILES.whole_rows(q[:, :, :15], k) == TILES._replace(first_row=2).whole_rows(q, k) == 1
    assert tiles._replace(first_row=4).whole_rows(q, k) == 0


def test_where_it_is_usable(emulated):
    q, k = draw(24, 24)

    def reason(q=q, k=k, **changes):
        return interface.hopper_usable(q, k, TILES._replace(**changes))

    assert reason() is None
    assert reason(q.bfloat16(), k.bfloat16(), first_row=1, start=71, end=200) is None
    assert "float16 or bfloat16" in reason(q.float(), k.float())
    assert "head_dim from 64 to 128" in reason(*draw(24, 24, width=32))
    assert "64 or 128 channels, got 96" in reason(*draw(24, 24, width=96))
    doubled = torch.stack((q, q), -1)
    assert "contiguous vectors" in reason(doubled[..., 0])
    assert "aligned k" in reason(k=torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view_as(k))
    assert "strides that are multiples of 16 bytes" in reason(q=torch.zeros(1, 1, 24, 68).bfloat16()[..., :64])
    for changes in ({"reduce": "logsumexp"}, {"block_size": 32}, {"q_pitch": 4}, {"k_pitch": 16}):
        assert "blocks of 64 tokens in sub-blocks of 8 (reduce='max')" in reason(**changes)
    assert "consecutive rows" in reason(rows=torch.arange(3)[None])
    assert "consecutive rows" in reason(table=torch.zeros(1, 4, dtype=torch.int32))
    assert "queries from the first sub-block on" in reason(first_row=1, start=72)
    for gone in ({"q": q[:, :, :7]}, {"k": k[:, :, :7]}, {"end": 56}):
        assert "sub-blocks are all there" in reason(**gone)


def test_nothing_to_write(emulated):
    q, k = draw(16, 16)
    assert gate_scores(q[:0], k[:0], **PITCHES, implementation="hopper").shape == (0, 1, 2, 2)
    assert not emulated


@pytest.mark.parametrize("setting", ["1", "0"])
def test_who_chooses_it(emulated, monkeypatch, setting):
    """By itself where it can run and is not turned off; elsewhere Triton."""
    module, portable = importlib.import_module("seerattention.ops.gate_scores.triton"), []
    monkeypatch.setattr(module, "gate_scores", lambda q, k, scores, tiles: portable.append(tiles))
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    monkeypatch.setenv(dispatch.HOPPER_VARIABLE, setting)
    q, k = draw(16, 16)
    for fits, arguments in [
        (True, (q, k, {})),
        (False, (q, k, {"reduce": "logsumexp"})),
        (False, (q, k, {"rows": torch.tensor([1, 0])})),
        (False, (q[:, :, :2], k, {"q_pitch": 64})),
    ]:
        emulated.clear()
        portable.clear()
        gate_scores(*arguments[:2], **{**PITCHES, **arguments[2]})
        chosen = fits and setting == "1"
        assert (len(emulated), len(portable)) == ((1, 0) if chosen else (0, 1))


def test_gradients_are_those_of_the_reference(emulated, monkeypatch):
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    q, k = draw(16, 16)
    gate_scores(q.requires_grad_(), k, **PITCHES).tril().nan_to_num(neginf=0).sum().backward()
    assert q.grad.isfinite().all()
    assert not emulated


def test_asked_for_where_it_cannot_run():
    q, k = draw(16, 16)
    with pytest.raises(ValueError, match="gate_scores: implementation='hopper' cannot run here: it needs CUDA tensors"):
        gate_scores(q, k, **PITCHES, implementation="hopper")
    with pytest.raises(ValueError, match=r"encode_blocks has no implementation 'hopper'; choose one of \('triton', "):
        encode_blocks(q, torch.zeros(1, 64, 64, dtype=q.dtype), implementation="hopper")


@needs_interpreter
@pytest.mark.parametrize("reduce", interface.REDUCTIONS)
def test_triton_writes_the_last_rows_of_scores(reduce, nan_filled_empty):
    """Into rows of others' memory, which it leaves alone."""
    modules = {"mass": ("triton_mass", "mass_scores")}
    load = dispatch.load("seerattention.ops.gate_scores", *modules.get(reduce, ("triton", "gate_scores")))
    q, k = draw(8 * 5, 8 * 5, heads=2, batch=2)
    tiles = TILES._replace(reduce=reduce)
    whole, last = empty_scores(q, 5, 5), empty_scores(q, 5, 5)
    load(q, k, whole, tiles)
    load(q[:, :, 24:], k, last[:, :, 3:], tiles._replace(first_row=3))
    assert torch.equal(last[:, :, 3:], whole[:, :, 3:])
    assert last[:, :, :3].isnan().all()
