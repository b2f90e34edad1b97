"""block_selection against plain Python lists; the Triton kernels must equal the reference bit for bit."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seerattention.ops import dense_indices, select_threshold, select_topk, select_topp
from seerattention.ops.block_selection import causal_softmax
from seerattention.ops.block_selection.reference import PROBABILITY_UNITS, Rule
from seerattention.ops.dispatch import triton_importable, triton_interpreted

needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)
UNITS = PROBABILITY_UNITS


def make_scores(num_rows, num_keys, batch=2, heads=2, seed=0, special=True):
    """Random scores with many ties and, where asked, NaN, infinities and both zeros."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, num_rows, num_keys, generator=generator)
    scores[..., ::3] = scores[..., ::3].round()
    if special:
        scores[0, 0] = 0.0
        scores[0, 0, :, ::2] = -0.0
        scores[0, -1, num_rows // 2] = float("nan")
        scores[-1, 0, :, 0] = float("-inf")
        scores[-1, -1, :, 1::4] = float("inf")
        scores[-1, -1, -1, ::2] = float("nan")
    return scores


def lists(blocks):
    """The lists as nested Python lists, with a check that they are ascending."""
    out = [
        [[row[:count].tolist() for row, count in zip(*rows, strict=True)] for rows in zip(*heads, strict=True)]
        for heads in zip(blocks.indices, blocks.counts, strict=True)
    ]
    for row in (row for batch in out for head in batch for row in head):
        assert row == sorted(set(row))
    return out


def expected_lists(scores, choose, *, block_size=64, lengths=None, last_blocks_dense=0):
    """``choose(values, query, row)`` gives the wanted blocks out of the causal values of one row."""
    batch, heads, num_rows, num_keys = scores.shape
    out = []
    for b in range(batch):
        end = num_keys if lengths is None else math.ceil(int(lengths[b]) / block_size)
        out.append([])
        for h in range(heads):
            out[-1].append([])
            for row in range(num_rows):
                query = num_keys - num_rows + row
                values = [float("-inf") if math.isnan(x) else x for x in scores[b, h, row, : query + 1].tolist()]
                wanted = set(choose(values, query, row)) | {query}
                if query >= end - last_blocks_dense:
                    wanted = set(range(query + 1))
                out[-1][-1].append(sorted(wanted) if query < end else [])
    return out


def best(values, blocks, count):
    return sorted(blocks, key=lambda block: (-values[block], block))[:count]


def topk_lists(scores, keep, diagonal_extra, **common):
    def choose(values, query, row):
        if diagonal_extra:
            return best(values, range(query + 1), keep[row])
        return best(values, range(query), keep[row] - 1)

    return expected_lists(scores, choose, **common)


def topp_lists(probabilities, p, **common):
    def choose(values, query, row):
        units = [int(min(max(x, 0.0), 1.0) * UNITS) if x == x else 0 for x in values]
        taken, mass = [], units[query]
        for block in best([min(max(x, 0.0), 1.0) for x in values], range(query), query):
            if p < 1 and mass >= int(p * UNITS):
                break
            taken.append(block)
            mass += units[block]
        return taken

    return expected_lists(probabilities, choose, **common)


COMMON = [
    {},
    {"lengths": torch.tensor([640, 385]), "last_blocks_dense": 2},
    {"lengths": torch.tensor([1, 640])},
    {"last_blocks_dense": 1},
]


@pytest.mark.parametrize("common", COMMON)
@pytest.mark.parametrize(("num_rows", "num_keys"), [(10, 10), (3, 10)])
def test_reference(num_rows, num_keys, common):
    scores = make_scores(num_rows, num_keys)
    for keep in ([1] * num_rows, [3] * num_rows, [100] * num_rows, list(range(num_rows))):
        for diagonal_extra in (False, True):
            blocks = select_topk(scores, keep, diagonal_extra=diagonal_extra, **common)
            wanted = topk_lists(scores, [max(1, count) for count in keep], diagonal_extra, **common)
            assert lists(blocks) == wanted, (keep, diagonal_extra)
    probabilities = make_scores(num_rows, num_keys, special=False).softmax(-1)
    for threshold in (0.0, 0.05, 0.2, 1.0):
        limit = torch.tensor(threshold).item()
        wanted = expected_lists(
            probabilities, lambda values, *_, limit=limit: [i for i, x in enumerate(values) if x > limit], **common
        )
        assert lists(select_threshold(probabilities, threshold, **common)) == wanted
    for p in (1e-14, 0.1, 0.5, 0.9, 1.0):
        assert lists(select_topp(probabilities, p, **common)) == topp_lists(probabilities, p, **common)


def test_threshold_is_strict_in_float32():
    threshold = 0.1
    probabilities = torch.full((1, 1, 4, 4), torch.tensor(threshold).item())
    assert lists(select_threshold(probabilities, threshold))[0][0] == [[0], [1], [2], [3]]
    probabilities = torch.nextafter(probabilities, torch.tensor(1.0))
    assert select_threshold(probabilities, threshold).density() == 1.0


def test_topp_goes_by_exact_sums():
    probabilities = torch.tensor([0.25, 0.25, 0.25, 0.25]).expand(1, 1, 1, 4)
    assert lists(select_topp(probabilities, 0.5))[0][0] == [[0, 3]]
    assert lists(select_topp(probabilities, 0.5000001))[0][0] == [[0, 1, 3]]
    assert lists(select_topp(probabilities * 0.5, 0.9))[0][0] == [[0, 1, 2, 3]]  # never reached: all


def test_topk_capacity():
    scores = make_scores(10, 10)
    assert select_topk(scores, [3] * 10).indices.shape[-1] == 3
    assert select_topk(scores, [3] * 10, diagonal_extra=True).indices.shape[-1] == 4
    assert select_topk(scores, [3] * 10, last_blocks_dense=1).indices.shape[-1] == 10
    assert select_topk(scores, [30] * 10).indices.shape[-1] == 10
    cut = select_topk(scores, [5] * 10, capacity=2)
    assert cut.indices.shape[-1] == 2
    assert lists(cut) == topk_lists(scores, [2] * 10, False)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_a_capacity_too_small_for_the_diagonal_and_another_block(implementation):
    """No list is longer than its room, or one would be written over the next."""
    scores = make_scores(3, 10, special=False)
    blocks = select_topk(scores, [5] * 3, capacity=1, diagonal_extra=True, implementation=implementation)
    assert blocks.counts.max() <= blocks.indices.shape[-1] == 2
    assert lists(blocks) == topk_lists(scores, [1] * 3, True)
    assert lists(select_topk(scores, [5] * 3, capacity=1, implementation=implementation)) == topk_lists(
        scores, [1] * 3, False
    )


def test_keep_per_batch_row():
    scores = make_scores(6, 6, special=False)
    blocks = lists(select_topk(scores, torch.tensor([[1] * 6, [4] * 6])))
    assert blocks[0] == topk_lists(scores, [1] * 6, False)[0]
    assert blocks[1] == topk_lists(scores, [4] * 6, False)[1]


@given(
    num_keys=st.integers(1, 12),
    missing=st.integers(0, 11),
    keep=st.integers(1, 14),
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, float("nan"), float("inf"), -float("inf")]), min_size=1
    ),
    diagonal_extra=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_topk_property(num_keys, missing, keep, values, diagonal_extra):
    num_rows = max(1, num_keys - missing)
    total = num_rows * num_keys
    scores = torch.tensor((values * total)[:total]).view(1, 1, num_rows, num_keys)
    blocks = select_topk(scores, [keep] * num_rows, diagonal_extra=diagonal_extra)
    assert lists(blocks) == topk_lists(scores, [keep] * num_rows, diagonal_extra)


def test_dense_indices():
    lengths = torch.tensor([300, 100])
    blocks = dense_indices(2, 3, 4, 5, block_size=64, lengths=lengths)
    assert lists(blocks) == expected_lists(
        torch.zeros(2, 3, 4, 5), lambda _, query, __: range(query + 1), lengths=lengths
    )
    assert dense_indices(1, 1, 4, 5, block_size=64).density() == 1.0
    assert blocks.indices.untyped_storage().nbytes() == 5 * 4


def assert_identical(actual, expected):
    assert actual.indices.shape == expected.indices.shape
    assert torch.equal(actual.counts, expected.counts)
    assert lists(actual) == lists(expected)


# Few rows: the interpreter takes tens of milliseconds for one.
@needs_interpreter
@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (2, 17), (3, 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_triton_interpreted(num_rows, num_keys, padded):
    common = {"lengths": torch.tensor([num_keys * 64 - 64, num_keys * 64]), "last_blocks_dense": 1} if padded else {}
    scores = make_scores(num_rows, num_keys, heads=1)
    for keep, diagonal_extra in ((1, False), (3, False), (2, True)):
        arguments = {"diagonal_extra": diagonal_extra, **common}
        assert_identical(
            select_topk(scores, [keep] * num_rows, implementation="triton", **arguments),
            select_topk(scores, [keep] * num_rows, implementation="reference", **arguments),
        )
    probabilities = make_scores(num_rows, num_keys, heads=1, special=False).softmax(-1)
    probabilities[0, 0, 0] = float("nan")
    for function, values in ((select_threshold, (0.0, 0.1)), (select_topp, (0.5, 1.0))):
        for value in values:
            assert_identical(
                function(probabilities, value, implementation="triton", **common),
                function(probabilities, value, implementation="reference", **common),
            )


def test_wrong_arguments():
    scores = make_scores(4, 6)
    with pytest.raises(ValueError, match="4 query blocks but only 3"):
        select_threshold(scores[..., :3], 0.1)
    with pytest.raises(ValueError, match="scores must be"):
        select_threshold(scores[0], 0.1)
    with pytest.raises(ValueError, match="last_blocks_dense"):
        select_threshold(scores, 0.1, last_blocks_dense=-1)
    with pytest.raises(ValueError, match="lengths"):
        select_threshold(scores, 0.1, lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="keep must be"):
        select_topk(scores, [1, 2])
    with pytest.raises(TypeError, match="integers"):
        select_topk(scores, [1.0] * 4)
    with pytest.raises(ValueError, match="p must be positive"):
        select_topp(scores, 0.0)
    with pytest.raises(TypeError, match="scores"):
        select_topk(scores.long(), [1] * 4)


# -- the search for the boundary, on rows of several widths ------------------------------------------------------------


def make_rows(kind, num_rows, num_keys, seed=0):
    """Scores ``[1, 1, num_rows, num_keys]`` of one shape of distribution."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, num_rows, num_keys, generator=generator)
    if kind == "heavy_tails":
        x = 3 * x.sign() * x.square()
    elif kind == "sink_and_neighbours":
        x = x + 4 * torch.exp((torch.arange(num_keys) - num_keys) / 8)
        x[..., 0] = 15
    elif kind == "skewed":
        x = -torch.exp(2 * x)
    elif kind == "few_values":
        x = (3 * x).round()
    elif kind == "bfloat16":
        x = x.bfloat16()
    elif kind == "equal":
        x = torch.full_like(x, 0.25)
    elif kind == "huge":
        x = x * 3e38 * (x.abs() > 0.1)
    elif kind == "tiny":
        x = x * 1e-39
    elif kind == "infinite":
        x[..., ::7], x[..., 3::11] = float("inf"), float("-inf")
    return x


KINDS = [
    "normal",
    "heavy_tails",
    "sink_and_neighbours",
    "skewed",
    "few_values",
    "bfloat16",
    "equal",
    "huge",
    "tiny",
    "infinite",
]


@needs_interpreter
@pytest.mark.parametrize("num_keys", [129, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_topk_finds_every_boundary(kind, num_keys):
    scores = make_rows(kind, 3, num_keys)
    for keep in ([2, num_keys // 10, num_keys // 2], [num_keys - 1, num_keys, 7]):
        for diagonal_extra in (False, True):
            assert_identical(
                select_topk(scores, keep, diagonal_extra=diagonal_extra, implementation="triton"),
                select_topk(scores, keep, diagonal_extra=diagonal_extra, implementation="reference"),
            )


@needs_interpreter
@pytest.mark.parametrize("num_keys", [129, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_triton_topp_finds_every_boundary(kind, num_keys):
    scores = make_rows(kind, 2, num_keys).float()
    # Probabilities, and what none are: sums far from 1.
    for values in (scores.nan_to_num(0.0, 30.0, -30.0).clamp(-30, 30).softmax(-1), scores):
        for p in (1e-6, 0.3, 0.95, 1.0):
            assert_identical(
                select_topp(values, p, implementation="triton"), select_topp(values, p, implementation="reference")
            )


def test_topp_just_at_the_target():
    """Masses that are a unit apart: float32 sums cannot tell them, the integers do."""
    units = torch.tensor([[3, 2**20 + 1, 2**20, 2**20, 2**19]], dtype=torch.float64) * 2.0**-40
    probabilities = (units / units.sum() * 0.5).float().view(1, 1, 1, 5)
    exact = (probabilities.double() * UNITS).long().flatten()
    for mass in (exact[4] + exact[1], exact[4] + exact[1] + exact[2], exact.sum()):
        for offset in (-1, 0, 1):
            p = (int(mass) + offset) / UNITS
            expected = topp_lists(probabilities, p)
            assert lists(select_topp(probabilities, p, implementation="reference")) == expected
            if triton_importable() and triton_interpreted():
                assert lists(select_topp(probabilities, p, implementation="triton")) == expected


@needs_interpreter
@pytest.mark.parametrize("num_keys", [1, 17, 150])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_softmax_on_the_way(num_keys, implementation):
    """The same lists as from probabilities, save where these lie at the bound within rounding."""
    num_rows = min(num_keys, 3)
    logits = 2 * make_rows("normal", num_rows, num_keys)
    future = torch.ones(num_rows, num_keys).triu(1 + num_keys - num_rows).bool()
    logits = logits.masked_fill(future, float("nan"))  # ignored, whatever it is
    probabilities = causal_softmax(logits)
    threshold = 1.01 / num_keys
    actual = select_threshold(logits, threshold, softmax=True, implementation=implementation).to_mask()
    expected = select_threshold(probabilities, threshold).to_mask()
    assert ((actual == expected) | ((probabilities - threshold).abs() < 1e-6 * threshold)).all()
    actual = select_topp(logits, 0.6, softmax=True, implementation=implementation)
    expected = select_topp(probabilities, 0.6)
    assert ((actual.counts - expected.counts).abs() <= 1).all()
    assert (actual.to_mask() != expected.to_mask()).sum() <= num_rows
    if implementation == "reference":
        assert_identical(actual, expected)


@needs_interpreter
def test_softmax_of_what_has_none():
    logits = torch.randn(1, 1, 3, 20)
    logits[0, 0, 0], logits[0, 0, 1, 3], logits[0, 0, 2, 5] = float("-inf"), float("inf"), float("nan")
    for function, bound in ((select_threshold, 0.01), (select_topp, 0.5)):
        assert_identical(
            function(logits, bound, softmax=True, implementation="triton"),
            function(logits, bound, softmax=True, implementation="reference"),
        )


@needs_interpreter
def test_rows_padded_in_memory():
    """Whole vectors are read, past the end of a row where memory goes on, and never past the end of that."""
    triton = pytest.importorskip("seerattention.ops.block_selection.triton")
    memory = torch.full((1, 1, 3, 32), float("nan"))
    padded = memory[..., :17]
    padded.copy_(make_rows("normal", 3, 17))
    assert triton._whole_vectors(padded)
    assert not triton._whole_vectors(padded.contiguous())
    assert not triton._whole_vectors(padded.contiguous()[:, :, :1].expand(1, 1, 3, 17))
    assert triton._whole_vectors(torch.zeros(1, 1, 3, 16))
    assert not triton._whole_vectors(torch.zeros(1, 1, 3, 17)[..., 1:])
    for scores in (padded, padded.contiguous()):
        assert_identical(
            select_topk(scores, [4] * 3, implementation="triton"),
            select_topk(scores, [4] * 3, implementation="reference"),
        )


# -- rows of more than half a million tokens ---------------------------------------------------------------------------


@needs_interpreter
def test_rows_wider_than_one_warp_group_has_registers_for():
    """16,384 blocks, and as many as the kernels take; padded in memory or not, rows that read everything among them."""
    triton = pytest.importorskip("seerattention.ops.block_selection.triton")
    for num_keys in (16384, 32765):
        scores = make_rows("sink_and_neighbours", 2, num_keys)
        for common in ({}, {"last_blocks_dense": 1, "lengths": torch.tensor([64 * num_keys])}):
            assert_identical(
                select_topk(scores, [3, num_keys // 10], implementation="triton", **common),
                select_topk(scores, [3, num_keys // 10], implementation="reference", **common),
            )
        probabilities = scores.softmax(-1)
        for function, bound in ((select_threshold, 1e-5), (select_topp, 0.9)):
            assert_identical(
                function(probabilities, bound, implementation="triton"),
                function(probabilities, bound, implementation="reference"),
            )
        block = max(triton.MIN_WIDTH, 1 << (num_keys - 1).bit_length())
        assert block // triton.BLOCKS_PER_WARP * 64 <= 1024  # threads of a program, also where a warp has 64


def test_longer_rows_are_refused_and_never_computed_another_way(monkeypatch):
    """The automatic choice, pretending that the CPU is a GPU: the reference would take tens of gigabytes."""
    interface = importlib.import_module("seerattention.ops.block_selection.interface")
    monkeypatch.setattr(interface.dispatch, "choose_implementation", lambda *_: "triton")
    monkeypatch.setattr(interface.dispatch, "load", lambda *_: pytest.fail("computed"))
    scores = torch.zeros(1, 1, 2, interface.MAX_TRITON_BLOCKS + 1)
    for implementation in (None, "triton"):
        with pytest.raises(ValueError, match="takes up to 32768 key blocks, got 32769; use larger blocks, or pass"):
            select_topk(scores, [5, 5], implementation=implementation)
        with pytest.raises(ValueError, match="32768 key blocks, got 32769"):
            select_threshold(scores, 0.1, implementation=implementation)
        with pytest.raises(ValueError, match="32768 key blocks, got 32769"):
            select_topp(scores, 0.1, implementation=implementation)


def test_launches_fit_the_registers_of_a_multiprocessor(monkeypatch):
    """A program that asks for more is not started: the register limit of its threads falls with their number."""
    triton = pytest.importorskip("seerattention.ops.block_selection.triton")
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(options)

    monkeypatch.setattr(triton, "select_kernel", Kernel())
    monkeypatch.setattr(triton, "_limit", lambda registers: {"maxnreg": registers})
    for num_keys in (100, 4096, 8192, 8193, 16384, 32768):
        scores = torch.zeros(1, 1, 2, num_keys)
        launches.clear()
        keep = torch.ones(1, 2, dtype=torch.int64)
        for kind in ("threshold", "topk", "topp"):
            triton.select(scores, Rule(kind, num_keys, 64, None, 0, 0.5, keep))
        for options in launches:
            assert options["BLOCK"] >= num_keys
            assert options["maxnreg"] * 32 * options["num_warps"] <= 1 << 16
        assert {options["maxnreg"] for options in launches} == ({128} if num_keys > 16384 else {168, 216, 128})


@needs_interpreter
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("min_blocks", "first_blocks", "dense_rows"), [(0, 0, 0), (4, 1, 3), (9, 0, 0), (2, 5, 8)])
def test_relative_thresholds_interpreted(min_blocks, first_blocks, dense_rows, softmax):
    floors = {"min_blocks": min_blocks, "first_blocks": first_blocks, "dense_rows": dense_rows}
    for num_rows, num_keys in ((1, 1), (14, 14), (2, 150)):
        # Steps of 1/8: equal scores, and no product that rounds.
        scores = (torch.randn(1, 1, num_rows, num_keys, generator=torch.Generator().manual_seed(0)) * 8).round() / 8
        scores[0, 0, 0] = float("nan")
        for factor in (0.0, 2.0):
            common = {"relative": True, "softmax": softmax, "last_blocks_dense": 1, **floors}
            actual, expected = (
                select_threshold(scores, factor, implementation=name, **common).to_mask()
                for name in ("triton", "reference")
            )
            if softmax:  # whose last bits differ
                assert (actual != expected).sum() <= 1
            else:
                assert torch.equal(actual, expected)
