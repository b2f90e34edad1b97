"""gate_scores on a GPU: the kernels against the reference in float32, and the whole path of a gate."""

from __future__ import annotations

import pytest
import torch

import seerattention as seer
from seerattention.evaluate.kernels import AttentionShape, make_gate, make_inputs
from seerattention.ops.gate_scores import gate_scores
from seerattention.ops.gate_scores.interface import MAX_TRITON_WIDTH

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def draw(num, dtype, *, heads, kv_heads, width, per_head=True, channels=None, rotary=None, batch=1):
    def randn(*shape):
        return torch.randn(*shape, device="cuda")

    q, k = randn(batch, num, heads, channels or width).transpose(1, 2), randn(batch, kv_heads, num, 3 * 64)
    k_linear = randn(heads if per_head else kv_heads, 3 * 64, width) * (3 * 64) ** -0.5
    q_linear = randn(heads, channels, width) * channels**-0.5 if channels else None
    rotary = width if rotary is None else rotary
    angles = 6 * torch.rand(batch, num * 64 - 5, rotary, device="cuda")
    tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotary else (None, None)
    return [None if x is None else x.to(dtype) for x in (q, k, k_linear, q_linear)] + list(tables)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num", [1, 16, 63, 65, 128, 500])
@pytest.mark.parametrize(
    "form",
    [
        {"heads": 8, "kv_heads": 2, "width": 128},
        {"heads": 8, "kv_heads": 2, "width": 64, "batch": 2},
        {"heads": 7, "kv_heads": 1, "width": 96},
        {"heads": 4, "kv_heads": 2, "width": 32, "channels": 64, "rotary": 64, "per_head": False},
        {"heads": 4, "kv_heads": 2, "width": 80, "channels": 64, "rotary": 64, "per_head": False},
        {"heads": 4, "kv_heads": 4, "width": 64, "rotary": 0},
        {"heads": 4, "kv_heads": 2, "width": MAX_TRITON_WIDTH},
    ],
    ids=str,
)
def test_equals_reference(form, num, dtype):
    torch.manual_seed(num)
    inputs = draw(num, dtype, **form)
    exact = [None if x is None else x.float() for x in inputs]
    expected = gate_scores(*exact, scale=0.1, implementation="reference")
    causal = expected > float("-inf")
    for masked in (True, False):
        actual = gate_scores(*inputs, scale=0.1, masked=masked, implementation="triton")
        assert actual.shape == expected.shape
        assert (actual - expected)[causal].norm() <= TOLERANCE[dtype] * expected[causal].norm()
        if masked:
            assert (actual[~causal] == float("-inf")).all()


@pytest.mark.parametrize("length", [8192, 32768 + 17, 131072])
def test_whole_path_at_real_sizes(length):
    """Logits of a Llama-8B layer's gate, and the lists of every policy, beside those of the plain path in float32."""
    shape = AttentionShape(32, 8, 128)
    q, k, _ = make_inputs(shape, length, length, torch.device("cuda"))
    gate = make_gate(shape, length, torch.device("cuda"))
    with torch.inference_mode():
        logits = gate.logits(q, k)
        masked = gate.gate(q, k, gate.cos, gate.sin)
        rows = torch.tensor(sorted({0, 1, 63, 64, 100, masked.shape[2] - 1}), device="cuda")
        gate.gate.float()
        exact = gate.gate(q.float(), k.float(), gate.cos.float(), gate.sin.float(), rows=rows)
        causal = exact > float("-inf")
        for found in (logits, masked):
            assert (found[:, :, rows] - exact)[causal].norm() <= 2e-2 * exact[causal].norm()
        assert (masked[:, :, rows][~causal] == float("-inf")).all()
        for policy in (seer.TopK(0.1), seer.TokenBudget(4096), seer.Threshold(1e-3), seer.TopP(0.3)):
            blocks, same = (policy.select(x, block_size=64) for x in (logits, masked))
            assert torch.equal(blocks.counts, same.counts)
            diagonal = blocks.indices.gather(-1, blocks.counts[..., None].long() - 1)[..., 0]
            assert (diagonal == torch.arange(logits.shape[2], device="cuda")).all()
