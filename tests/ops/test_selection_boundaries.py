"""Selection finds every boundary, on rows of several widths, also those of more than half a million tokens."""

from __future__ import annotations

import importlib

import pytest
import torch

from seerattention.ops import select_threshold, select_topk, select_topp
from seerattention.ops.block_selection import causal_softmax
from seerattention.ops.block_selection.reference import Rule
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from selection_cases import (
    UNITS,
    assert_identical,
    lists,
    needs_interpreter,
    topp_lists,
)


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
