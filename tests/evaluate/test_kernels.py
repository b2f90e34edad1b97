"""Dense kernels, checks and clocks that times rest on."""

from __future__ import annotations

import pytest
import torch

from helpers import exact_attention
from seerattention.evaluate.kernels import (
    AttentionShape,
    WrongResultError,
    attention_error,
    check_attention,
    count_tiles,
    dense_kernels,
    dense_lists,
    make_inputs,
    random_lists,
    sample_rows,
)
from seerattention.evaluate.timing import Times, peak_memory, time_functions
from seerattention.ops.block_sparse_attention import block_sparse_attention

CPU = torch.device("cpu")
SHAPE = AttentionShape(4, 2, 32, 64, torch.float32)


@pytest.mark.parametrize("lengths", [(200, 200), (100, 300)])
def test_dense_kernels_are_causal_to_the_last_key(lengths):
    q, k, v = make_inputs(SHAPE, *lengths, CPU)
    assert q.transpose(1, 2).is_contiguous()
    lists = dense_lists(SHAPE, *lengths, CPU)
    exact = exact_attention(q, k, v, lists)[0].float()
    kernels = dense_kernels(q, k, v)
    assert len(kernels) == 2
    for kernel in kernels.values():
        torch.testing.assert_close(kernel(), exact, rtol=1e-4, atol=1e-5)
        assert check_attention(kernel, q, k, v, lists) < 1e-5


def test_random_lists_have_the_density_of_top_k():
    lists = random_lists(SHAPE, 640, 640, 0.5, CPU)
    assert lists.counts[0, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert count_tiles(lists, 4) == 4 * 30
    assert not torch.equal(lists.to_mask()[:, 0], lists.to_mask()[:, 1])


def test_errors_are_found_wherever_they_are_sampled():
    q, k, v = make_inputs(SHAPE, 300, 300, CPU)
    lists = random_lists(SHAPE, 300, 300, 0.5, CPU)
    out, lse = block_sparse_attention(q, k, v, lists, return_lse=True, implementation="cpu_gathered")
    rows = range(lists.num_rows)
    assert attention_error(out, q, k, v, lists, rows, lse=lse) < 1e-5
    assert attention_error(out, q, k, v, lists, rows, lse=lse + 0.1) == float("inf")
    assert attention_error(out.half(), q, k, v, lists, rows) == float("inf")
    for row in rows:
        wrong = out.clone()
        wrong[0, 3, row * 64] *= 1.1
        assert attention_error(wrong, q, k, v, lists, rows) > 1e-3
        assert attention_error(wrong, q, k, v, lists, [other for other in rows if other != row]) < 1e-5
        wrong[0, 3, row * 64, 5] = float("nan")
        assert attention_error(wrong, q, k, v, lists, [0]) == float("inf")
        with pytest.raises(WrongResultError, match="wrong results"):
            check_attention(lambda wrong=wrong: wrong, q, k, v, lists)


def test_sample_rows():
    assert sample_rows(1, 6) == [0]
    assert sample_rows(3, 6) == [0, 1, 2]
    rows = sample_rows(1000, 6)
    assert len(rows) == 6
    assert rows == sorted(set(rows))
    assert {0, 1, 999} <= set(rows)


def test_time_functions_take_turns():
    calls, warm = [], []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = time_functions(functions, CPU, seconds=0.0, min_repeats=3, advance=warm.append)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert warm == [1, 1, 1]
    assert [len(times[name].seconds) for name in "ab"] == [3, 3]
    few = time_functions({"a": lambda: None}, CPU, seconds=1e9, max_repeats=7)
    assert few["a"].to_dict()["repeats"] == 7
    assert time_functions({}, CPU) == {}
    with pytest.raises(ValueError, match="min_repeats"):
        time_functions(functions, CPU, min_repeats=0)
    assert peak_memory(lambda: None, CPU) is None


def test_times():
    assert Times([1.0, 2.0, 3.0, 4.0, 100.0]).to_dict() == {"median_s": 3.0, "p25_s": 2.0, "p75_s": 4.0, "repeats": 5}
    assert Times([2.0]).to_dict() == {"median_s": 2.0, "p25_s": 2.0, "p75_s": 2.0, "repeats": 1}


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of KV heads"):
        AttentionShape(5, 2)
