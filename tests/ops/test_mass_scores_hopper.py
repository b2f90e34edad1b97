"""The Hopper kernel of scores by mass without a GPU: its logic in an emulator, and when it is used."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from seerattention.ops import dispatch
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.gate_scores import gate_scores, reference
from seerattention.ops.gate_scores.interface import empty_scores
from seerattention.ops.gate_scores.reference import Tiles
from seerattention.ops.span import Span, num_blocks

interface = importlib.import_module("seerattention.ops.gate_scores.interface")
needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)


@pytest.fixture
def emulated(emulated_mass_scores):
    return emulated_mass_scores


def draw(num_q, num_k, heads=2, kv_heads=1, width=64, batch=1, dtype=torch.float16, seed=0):
    """Encoded queries and keys, with the strides of encodings that lie token by token."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, num_q, heads, width), (batch, num_k, kv_heads, width)
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def check(q, k, pitch, first=None, span=None, scale=0.25):
    """Against the reference in float32, masked and not. Powers of 2 are exact in the emulator."""
    options = {"q_pitch": pitch, "k_pitch": pitch, "scale": scale, "rows": first, "span": span, "reduce": "mass"}
    expected = gate_scores(q.float(), k.float(), implementation="reference", **options)
    found, loose = (gate_scores(q, k, implementation="hopper", masked=masked, **options) for masked in (True, False))
    causal = expected > -math.inf
    assert torch.equal(found == -math.inf, ~causal)
    torch.testing.assert_close(found[causal], expected[causal], rtol=1e-4, atol=1e-4)
    assert torch.equal(loose[causal], found[causal])
    assert (loose[~causal].isnan() | (loose[~causal] == -math.inf)).all()
    return found


@pytest.mark.parametrize("pitch", [4, 8])
@pytest.mark.parametrize("rows", [1, 5, 31, 33, 66])
def test_whole_prompts(emulated, rows, pitch):
    """Of one chunk of keys and of more, and units that are the last of their program."""
    check(*draw(64 // pitch * rows, 64 // pitch * rows), pitch)
    assert [constants["MASKED"] for *_, constants in emulated] == [True, False]


@pytest.mark.parametrize("pitch", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "first"), [(1, 40, 39), (5, 12, 7), (3, 40, 2), (9, 70, 61)])
def test_rows_from_some_block_on(emulated, rows, columns, first, pitch):
    """Units begin at multiples of 64 query sub-blocks of the sequence, rows need not."""
    check(*draw(64 // pitch * rows, 64 // pitch * columns, seed=rows), pitch, first=first)


@pytest.mark.parametrize("group", [2, 4, 6, 8])
def test_groups_and_batches(emulated, group):
    check(*draw(16 * 3, 16 * 5, heads=2 * group, kv_heads=2, batch=2), 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_vectors_and_any_strides(emulated, dtype):
    q, k = draw(16 * 9, 16 * 9, heads=4, kv_heads=2, width=128, dtype=dtype)
    expected = check(q, k, 4)
    roomy = torch.full((1, 2, 16 * 9, 3, 128), math.nan, dtype=q.dtype)
    roomy[:, :, :, 1] = k
    assert torch.equal(check(q.contiguous(), roomy[:, :, :, 1], 4), expected)


@pytest.mark.parametrize("pitch", [4, 8])
def test_rows_whose_reference_is_too_small(emulated, pitch):
    """Their largest products are far from the diagonal and beyond it by more than a number of float32 holds: the unit
    is done again with exact maxima. Rows beside it, whose products are small, keep theirs."""
    rows = 40
    q, k = draw(64 // pitch * rows, 64 // pitch * rows, seed=3)
    k[:, :, : k.shape[2] // 3] *= 8
    q[:, :, q.shape[2] // 2 :] *= 10
    found = check(q, k, pitch, scale=0.5)
    assert found[found > -math.inf].min() == pytest.approx(-100 * math.log(2))


def test_products_that_are_no_numbers(emulated):
    """Only rows with them have no score, and the kernel ends."""
    q, k = draw(32, 32)
    q[:, 1, 17] = math.nan
    options = {"q_pitch": 4, "k_pitch": 4, "reduce": "mass"}
    found = gate_scores(q, k, implementation="hopper", **options)
    expected = gate_scores(q[:, :1], k, implementation="reference", **options)
    torch.testing.assert_close(found[:, :1], expected, rtol=1e-4, atol=1e-4)
    assert not found[:, 1, 1, :2].isfinite().any()


def test_keys_of_the_future_may_be_anything(emulated):
    q, k = draw(16 * 3, 16 * 40)
    expected = check(q, k, 4, first=33)
    k[:, :, 16 * 36 :] = math.nan
    options = {"q_pitch": 4, "k_pitch": 4, "scale": 0.25, "reduce": "mass", "rows": 33}
    assert torch.equal(gate_scores(q, k, implementation="hopper", **options), expected)


@needs_interpreter
@pytest.mark.parametrize("pitch", [4, 8])
@pytest.mark.parametrize("length", [65, 64 * 5 - 7, 64 * 34 - 9])
def test_rows_that_lack_sub_blocks(emulated, length, pitch):
    """They are left to Triton; keys that the last whole row does not see may be incomplete, too."""
    num = num_blocks(length, pitch)
    q, k = draw(num, num, seed=length)
    check(q, k, pitch)
    check(q, k, pitch, span=Span(1, length, length))
    assert len(emulated) == 4


def test_squares_are_not_for_one_row(emulated, monkeypatch):
    """Of a prompt's last row; where more rows lack something, squares are taken."""
    module, rows, squares = importlib.import_module("seerattention.ops.gate_scores.hopper_mass"), [], []
    for name, noted in (("mass_row_scores", rows), ("triton_mass_scores", squares)):

        def note(q, k, scores, tiles, noted=noted):
            noted.append((q.shape[2], scores.shape[2], tiles.first_row))

        monkeypatch.setattr(module, name, note)
    for num in (48, 55):
        gate_scores(*draw(num, num), q_pitch=4, k_pitch=4, reduce="mass", implementation="hopper")
    assert (rows, squares) == ([(7, 1, 3)], [])
    q, k = draw(64, 64)
    module.mass_scores(q, k, empty_scores(q, 4, 4), Tiles(64, 4, 4, 0.25, "mass", True, end=64 * 2 + 5))
    assert (len(rows), squares) == (1, [(32, 2, 2)])


def check_row(tiles, num_q, group, width, dtype=torch.float16, num_k=None, larger=1):
    """The kernels of one row against the reference; nothing else is written. Keys behind the row are not read.

    larger: factor of the first third of the keys; float32 holds their products that much less exactly.
    """
    row_scores = importlib.import_module("seerattention.ops.gate_scores.triton_mass_row").mass_row_scores
    row, behind = tiles.first_row, (tiles.first_row + 1) * (64 // tiles.k_pitch)
    num_k = num_k or num_blocks(tiles.end, tiles.k_pitch)
    q, k = draw(num_q, num_k, heads=2 * group, kv_heads=2, batch=2, width=width, dtype=dtype, seed=group)
    k[:, :, : k.shape[2] // 3] *= larger
    expected = reference.gate_scores(q.float(), k.float(), tiles)
    k[:, :, behind:] = math.nan
    room = empty_scores(q, 2, max(row + 1, expected.shape[3]))
    row_scores(q, k, room[:, :, 1:, : expected.shape[3]], tiles)
    assert room[:, :, 0].isnan().all()
    torch.testing.assert_close(room[:, :, 1:, : expected.shape[3]], expected, rtol=1e-5, atol=1e-5 * larger)
    return expected


@needs_interpreter
@pytest.mark.parametrize(("q_pitch", "k_pitch"), [(4, 4), (8, 8), (8, 4)])
@pytest.mark.parametrize(
    ("group", "width", "dtype"), [(1, 64, torch.float16), (4, 128, torch.float32), (9, 64, torch.float16)]
)
def test_a_last_row_that_lacks_sub_blocks(group, width, dtype, q_pitch, k_pitch, nan_filled_empty):
    """Of several lengths, of keys that fill no whole number of chunks, and of heads that fill no program."""
    for row, missing in ((0, 37), (11, 1), (17, 22), (17, 63)):
        end = 64 * (row + 1) - missing
        tiles = Tiles(64, q_pitch, k_pitch, 0.25, "mass", True, first_row=row, end=end)
        check_row(tiles, num_blocks(end - 64 * row, q_pitch), group, width, dtype)


@needs_interpreter
def test_a_last_row_of_many_chunks(monkeypatch, nan_filled_empty):
    """Read in several rounds, with shares of far chunks that nobody sees; more keys are there than the row sees, or
    fewer, and more queries than hold tokens."""
    module = importlib.import_module("seerattention.ops.gate_scores.triton_mass_row")
    monkeypatch.setattr(module, "CHUNKS", 2)
    monkeypatch.setattr(module, "COLUMNS", 16)
    row = 40
    tiles = Tiles(64, 4, 4, 0.25, "mass", False, first_row=row, end=64 * row + 33)
    check_row(tiles, 9, 2, 64, num_k=16 * 45 - 3)
    check_row(tiles, 14, 2, 64)
    check_row(tiles._replace(end=1 << 30), 16, 2, 64, num_k=16 * row + 5)
    found = check_row(tiles, 9, 2, 64, larger=30)
    assert found[found > -math.inf].min() == pytest.approx(-100 * math.log(2))
    # Sub-blocks without a token have no scores.
    assert (check_row(tiles._replace(end=64 * row), 5, 2, 64, num_k=16 * (row + 1)) == -math.inf).all()


@needs_interpreter
@pytest.mark.parametrize(("start", "length"), [(128, 64 * 6), (128, 64 * 6 - 3), (64 * 3 + 1, 64 * 6 - 30)])
def test_chunks(emulated, start, length):
    span = Span(1, length - start, length)
    check(*draw(span.num_rows(64) * 16, num_blocks(length, 4)), 4, span=span)
    assert len(emulated) == 2


def test_where_it_is_usable(emulated):
    q, k = draw(48, 48)

    def reason(q=q, k=k, tiles=(64, 4, 4)):
        return interface.hopper_usable(q, k, Tiles(*tiles, 0.25, "mass", True))

    assert reason() is None
    assert reason(tiles=(64, 8, 8)) is None
    for tiles in ((64, 8, 4), (32, 4, 4), (64, 16, 16)):
        assert "sub-blocks of 8 (reduce='max'), or of 4 or 8 (reduce='mass') on both sides" in reason(tiles=tiles)
    assert "even number of query heads for each key head, got 3 for 1" in reason(*draw(48, 48, heads=3))
    assert "64 or 128 channels, got 96" in reason(*draw(48, 48, width=96))


@pytest.mark.parametrize("setting", ["1", "0"])
def test_who_chooses_it(emulated, monkeypatch, setting):
    """By itself where it can run and is not turned off; elsewhere Triton."""
    module, portable = importlib.import_module("seerattention.ops.gate_scores.triton_mass"), []
    monkeypatch.setattr(module, "mass_scores", lambda q, k, scores, tiles: portable.append(tiles))
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    monkeypatch.setenv(dispatch.HOPPER_VARIABLE, setting)
    q, k = draw(32, 32)
    for fits, (queries, keys, pitches) in [
        (True, (q, k, (4, 4))),
        (False, (q[:, :, :16], k, (8, 4))),
        (False, (q[:, :1], k, (4, 4))),
    ]:
        emulated.clear()
        portable.clear()
        gate_scores(queries, keys, q_pitch=pitches[0], k_pitch=pitches[1], reduce="mass")
        chosen = fits and setting == "1"
        assert (len(emulated), len(portable)) == ((1, 0) if chosen else (0, 1))


def test_nothing_to_write(emulated):
    q, k = draw(32, 32)
    options = {"q_pitch": 4, "k_pitch": 4, "reduce": "mass", "implementation": "hopper"}
    assert gate_scores(q[:0], k[:0], **options).shape == (0, 2, 2, 2)
    assert not emulated


def test_gradients_are_those_of_the_reference(emulated, monkeypatch):
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    q, k = draw(32, 32)
    scores = gate_scores(q.requires_grad_(), k, q_pitch=4, k_pitch=4, reduce="mass")
    scores.tril().nan_to_num(neginf=0).sum().backward()
    assert q.grad.isfinite().all()
    assert not emulated
