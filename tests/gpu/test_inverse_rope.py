"""The inverse rotation on a GPU."""

from __future__ import annotations

import pytest

from ops.test_inverse_rope import CASES, DTYPES, POOLED_CASES, check, check_pooled


@pytest.mark.parametrize("case", [*CASES, (2, 5000, 128, 128, 1.0), (1, 1000, 64, 64, 1.2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_undoes_the_rotation(dtype, case):
    check("triton", dtype, *case, device="cuda")


@pytest.mark.parametrize(
    "case", [*POOLED_CASES, (2, 5000, 128, 128, 64), (1, 3001, 128, 64, 8), (1, 1000, 256, 256, 128)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_blocks_are_those_of_what_is_turned_back(dtype, case, nan_filled_empty):
    check_pooled("triton", dtype, *case, device="cuda")
