"""What pooled attention refuses: of query blocks and of query tokens alike, and where they differ."""

from __future__ import annotations

import pytest
import torch

from pooled_cases import make
from seerattention.ops import pooled_attention, pooled_attention_decode

BOTH = [
    ({"block_size": 48}, "block_size must be one of"),
    ({"reduce": "mean"}, "reduce"),
    ({"rows": torch.tensor([200])}, "rows must lie in"),
    ({"rows": torch.tensor([[100]])}, "rows must be int64"),
    ({"rows": torch.tensor([3], dtype=torch.int32)}, "rows must be int64"),
    ({"lengths": torch.tensor([100])}, "lengths"),
    ({"scale": 0.0}, "scale"),
    ({"lse": torch.zeros(2, 4, 200)}, "lse must be float32"),
    ({"lse": torch.zeros(2, 4, 100).double()}, "lse must be float32"),
    ({"implementation": "fast"}, "implementation"),
]
ONE = [
    (pooled_attention, {"rows": torch.tensor([0])}, "rows must lie in \\[1, 4\\)"),
    (pooled_attention, {"rows": torch.tensor([4])}, "rows must lie in \\[1, 4\\)"),
    (pooled_attention_decode, {"rows": torch.tensor([99])}, "rows must lie in \\[100, 200\\)"),
    (pooled_attention_decode, {"implementation": "hopper"}, "implementation"),
]


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [*((op, *case) for op in (pooled_attention, pooled_attention_decode) for case in BOTH), *ONE],
)
def test_wrong_arguments(op, arguments, message):
    q, k = make(100, 200, 4, 2, 32)
    with pytest.raises(ValueError, match=message):
        op(q, k, **arguments)


@pytest.mark.parametrize("op", [pooled_attention, pooled_attention_decode])
def test_wrong_tensors(op):
    q, k = make(100, 200, 4, 2, 32)
    with pytest.raises(ValueError, match="queries for 100 keys"):
        op(k, q[:, :2])
    with pytest.raises(ValueError, match="multiple"):
        op(q[:, :3], k)
    with pytest.raises(TypeError, match="convert"):
        op(q, k.half())
