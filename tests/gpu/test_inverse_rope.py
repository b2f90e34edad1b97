"""The inverse rotation on a GPU."""

from __future__ import annotations

import pytest

from ops.test_inverse_rope import CASES, DTYPES, check


@pytest.mark.parametrize("case", [*CASES, (2, 5000, 128, 128, 1.0), (1, 1000, 64, 64, 1.2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_undoes_the_rotation(dtype, case):
    check("triton", dtype, *case, device="cuda")
