"""block_selection against plain Python lists; the Triton kernels must equal the reference bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seerattention.ops import dense_indices, select_threshold, select_topk, select_topp
from selection_cases import (
    assert_identical,
    expected_lists,
    lists,
    make_scores,
    needs_interpreter,
    topk_lists,
    topp_lists,
)

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
