"""block_selection on a GPU: the Triton kernels equal the reference bit for bit."""

from __future__ import annotations

import pytest
import torch

from seerattention.ops import select_threshold, select_topk, select_topp


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
    for common in ({}, {"lengths": lengths, "last_blocks_dense": 2}):
        for keep in (1, 2, max(1, num_keys // 10), num_keys):
            for diagonal_extra in (False, True):
                assert_identical(select_topk, scores, [keep] * num_rows, diagonal_extra=diagonal_extra, **common)
        for threshold in (0.0, 1.0 / num_keys, 0.3):
            assert_identical(select_threshold, probabilities, threshold, **common)
        for p in (1e-12, 1e-4, 0.5, 0.95, 1.0):
            assert_identical(select_topp, probabilities, p, **common)


def test_widest_row():
    """Half a million tokens in blocks of 64."""
    scores = make_scores(3, 8192, torch.float32)
    assert_identical(select_topk, scores, [100] * 3)
    assert_identical(select_topp, scores.nan_to_num(0.0, 1.0, 0.0).softmax(-1), 0.5)


def test_keep_on_the_device():
    scores = make_scores(64, 64, torch.float32)
    keep = torch.randint(1, 64, (2, 64), device="cuda")
    assert_identical(select_topk, scores, keep)
    assert_identical(select_topk, scores, keep, capacity=20, diagonal_extra=True)


def test_too_long_rows_go_to_the_reference():
    scores = torch.randn(1, 1, 2, 20000, device="cuda")
    assert select_topk(scores, [5, 5]).counts.tolist() == [[[5, 5]]]
    with pytest.raises(ValueError, match="Triton kernel takes up to"):
        select_topk(scores, [5, 5], implementation="triton")
