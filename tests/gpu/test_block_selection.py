"""block_selection on a GPU: the Triton kernels equal the reference bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from seerattention.ops import select_threshold, select_topk, select_topp
from seerattention.ops.block_selection import causal_softmax


def make_scores(num_rows, num_keys, dtype):
    """Random scores with many ties, NaN, infinities and both zeros."""
    scores = torch.randn(2, 3, num_rows, num_keys, device="cuda").to(dtype)
    scores[..., ::3] = scores[..., ::3].round()
    scores[0, 0] = 0.0
    scores[0, 0, :, ::2] = -0.0
    scores[0, 1, num_rows // 2] = float("nan")
    scores[1, 0, :, 0] = float("-inf")
    scores[1, 1, :, 1::4] = float("inf")
    return scores


def assert_identical(function, *args, **kwargs):
    actual, expected = (function(*args, implementation=name, **kwargs) for name in ("triton", "reference"))
    assert actual.indices.shape == expected.indices.shape
    assert torch.equal(actual.counts, expected.counts)
    listed = torch.arange(actual.indices.shape[-1], device="cuda") < actual.counts[..., None]
    assert torch.equal(actual.indices[listed], expected.indices[listed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (16, 16), (17, 17), (5, 64), (256, 256), (40, 1000), (8, 4096)])
def test_equals_reference(shape, dtype):
    num_rows, num_keys = shape
    scores = make_scores(*shape, dtype)
    probabilities = torch.randn(2, 3, *shape, device="cuda").mul(3).softmax(-1).to(dtype)
    lengths = torch.tensor([num_keys * 64, num_keys * 64 - 65 if num_keys > 1 else 1], device="cuda")
    # Every option is compiled for every width of a row, and that is what takes the time: all of them for two shapes.
    every = shape in ((17, 17), (40, 1000))
    for common in ({}, {"lengths": lengths, "last_blocks_dense": 2}) if every else ({},):
        for keep in (1, 2, max(1, num_keys // 10), num_keys):
            for diagonal_extra in (False, True) if every else (False,):
                assert_identical(select_topk, scores, [keep] * num_rows, diagonal_extra=diagonal_extra, **common)
        for threshold in (0.0, 1.0 / num_keys, 0.3):
            assert_identical(select_threshold, probabilities, threshold, **common)
        floors = {"min_blocks": 9, "first_blocks": 2, "dense_rows": 3} if every else {"min_blocks": 4}
        for factor in (0.0, 2.0, 100.0):
            assert_identical(select_threshold, probabilities, factor, relative=True, **floors, **common)
        for p in (1e-12, 1e-4, 0.5, 0.95, 1.0):
            assert_identical(select_topp, probabilities, p, **common)


@pytest.mark.parametrize("num_keys", [4096, 8192, 16384, 20000, 32768])
def test_widest_rows(num_keys):
    """From half a million tokens to two, in blocks of 64; no row of scores is copied or sorted on the way."""
    scores = make_scores(3, num_keys, torch.float32)
    assert_identical(select_topk, scores, [100, num_keys // 10, 5])
    assert_identical(select_topk, scores, [100] * 3, diagonal_extra=True, last_blocks_dense=1)
    probabilities = scores.nan_to_num(0.0, 1.0, 0.0).softmax(-1)
    for p in (0.5, 0.9999):
        assert_identical(select_topp, probabilities, p)
    assert_identical(select_threshold, probabilities, 2.0 / num_keys)
    for dtype, factor in itertools.product((torch.float32, torch.bfloat16), (0.0, 2.0, 100.0)):
        assert_identical(select_threshold, probabilities.to(dtype), factor, relative=True, min_blocks=4)
    lengths = torch.tensor([64 * num_keys - 100, 64 * num_keys], device="cuda")
    assert_identical(select_topk, scores, [50] * 3, lengths=lengths)


def test_memory_of_wide_rows():
    """16,384 blocks of 2 heads: lists and counts, and nothing of the size of the scores besides."""
    scores = torch.randn(1, 2, 1024, 16384, device="cuda")
    keep = torch.full((1024,), 64)
    select_topk(scores, keep)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    blocks = select_topk(scores, keep)
    assert torch.cuda.max_memory_allocated() - before < 2 * blocks.indices.nbytes + (1 << 20)


def test_more_than_2_to_the_31_scores():
    """Addresses past 2^31 elements: the last rows of the last head equal the same rows alone."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    scores = torch.empty(1, 5, 16384, 32768, device="cuda", dtype=torch.bfloat16).uniform_()
    assert scores.numel() > 2**31
    for function, bound in ((select_topk, torch.full((16384,), 16)), (select_threshold, 0.999)):
        extra = {"capacity": 16} if function is select_topk else {}
        rows = scores[:, -1:, -8:].clone()
        blocks = function(scores, bound, **extra)
        alone = function(rows, bound[-8:] if function is select_topk else bound, **extra)
        counts = alone.counts.flatten().tolist()
        assert blocks.counts[0, -1, -8:].tolist() == counts
        for row, count in enumerate(counts):
            assert torch.equal(blocks.indices[0, -1, row - 8, :count], alone.indices[0, 0, row, :count])
        del blocks


def test_keep_on_the_device():
    scores = make_scores(64, 64, torch.float32)
    keep = torch.randint(1, 64, (2, 64), device="cuda")
    assert_identical(select_topk, scores, keep)
    assert_identical(select_topk, scores, keep, capacity=20, diagonal_extra=True)


def test_longer_rows_are_refused():
    scores = torch.zeros(1, 1, 2, 32769, device="cuda")
    for implementation in (None, "triton"):
        with pytest.raises(ValueError, match="takes up to 32768 key blocks, got 32769"):
            select_topk(scores, [5, 5], implementation=implementation)
    assert select_topk(scores, [5, 5], implementation="reference").counts.tolist() == [[[5, 5]]]


KINDS = ["normal", "heavy_tails", "sink_and_neighbours", "few_values", "bfloat16", "infinite"]


def make_rows(kind, num_rows, num_keys, heads=4):
    """Scores ``[1, heads, num_rows, num_keys]`` of one shape of distribution."""
    torch.manual_seed(0)
    x = 2 * torch.randn(1, heads, num_rows, num_keys, device="cuda")
    if kind == "heavy_tails":
        x = x.sign() * x.square()
    elif kind == "sink_and_neighbours":
        x = x + 4 * torch.exp((torch.arange(num_keys, device="cuda") - num_keys) / 8)
        x[..., 0] = 15
    elif kind == "few_values":
        x = (3 * x).round()
    elif kind == "bfloat16":
        x = x.bfloat16()
    elif kind == "infinite":
        x[..., ::7], x[..., 3::11] = float("inf"), float("-inf")
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2048, 2048), (512, 512), (500, 2047), (100, 3000), (10, 8192)])
def test_equals_reference_at_real_sizes(shape, kind):
    num_rows, num_keys = shape
    scores = make_rows(kind, *shape)
    causal = torch.arange(num_keys - num_rows + 1, num_keys + 1)
    for keep in ((0.1 * causal).ceil().long(), torch.full((num_rows,), num_keys // 3)):
        assert_identical(select_topk, scores, keep)
    probabilities = causal_softmax(scores.nan_to_num(0.0, 20.0, -20.0))
    for p in (0.1, 0.9, 0.999):
        assert_identical(select_topp, probabilities, p)
        assert_identical(select_topp, scores.float().nan_to_num(0.0, 1.0, 0.0), p)  # sums far from 1
    assert_identical(select_threshold, probabilities, 1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (128, 128), (2048, 2048), (100, 3000), (10, 8192)])
def test_softmax_on_the_way(shape):
    """The same lists as from probabilities, save where these lie at the bound within rounding."""
    num_rows, num_keys = shape
    logits = make_rows("normal", *shape)
    future = torch.ones(shape, device="cuda", dtype=torch.bool).triu(1 + num_keys - num_rows)
    logits = logits.masked_fill(future, float("nan"))  # ignored, whatever it is
    probabilities = causal_softmax(logits)
    for threshold in (0.3 / num_keys, 5.0 / num_keys):
        actual = select_threshold(logits, threshold, softmax=True).to_mask()
        expected = select_threshold(probabilities, threshold).to_mask()
        assert ((actual == expected) | ((probabilities - threshold).abs() < 1e-5 * threshold)).all()
    for p in (0.1, 0.6, 0.95):
        actual, expected = select_topp(logits, p, softmax=True), select_topp(probabilities, p)
        different = (actual.to_mask() != expected.to_mask()).sum(-1)
        # float32 sums of a row may differ from torch's by this much of its mass.
        assert (different <= 1 + expected.counts // 500).all()
        assert (different > 0).float().mean() < 0.1


def test_rows_padded_in_memory():
    for num_keys in (17, 500, 2047):
        pitch = (num_keys + 15) // 16 * 16
        scores = torch.full((1, 2, num_keys, pitch), float("nan"), device="cuda")[..., :num_keys]
        scores.copy_(make_rows("normal", num_keys, num_keys, heads=2))
        assert_identical(select_topk, scores, [max(1, num_keys // 8)] * num_keys)
        assert_identical(select_topp, scores, 0.5, softmax=False)
