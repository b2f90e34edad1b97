"""The Hopper kernel of pooled attention without a GPU: its logic in an emulator, and when it is used."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch

from helpers import make_qkv
from seerattention.ops import dispatch, pooled_attention
from seerattention.ops.pooled_attention.arguments import Wanted

interface = importlib.import_module("seerattention.ops.pooled_attention.interface")


@pytest.fixture
def emulated(emulated_pooled_attention):
    return emulated_pooled_attention


def inputs(tokens, heads, kv_heads, head_dim, dtype=torch.bfloat16):
    """q and k, and the log-sum-exp of their scaled causal logits."""
    q, k, _ = make_qkv(*tokens, batch=2, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    scores = q.double() @ k.double().repeat_interleave(heads // kv_heads, 1).mT * head_dim**-0.5
    hidden = torch.ones(tokens, dtype=torch.bool).triu(1 + tokens[1] - tokens[0])
    return q, k, scores.masked_fill(hidden, float("-inf")).logsumexp(-1).float()


def check(q, k, lse, **arguments):
    actual = pooled_attention(q, k, lse=lse, implementation="hopper", **arguments)
    expected = pooled_attention(q, k, implementation="reference", **arguments)
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("tokens", [(1, 1), (64, 64), (65, 65), (127, 127), (1, 65), (37, 200), (130, 333), (300, 300)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (7, 1), (8, 2), (8, 1)])
def test_equals_reference(emulated, tokens, heads, kv_heads):
    q, k, lse = inputs(tokens, heads, kv_heads, 64)
    lengths = torch.tensor([tokens[1], tokens[1] - tokens[0] // 2])
    for reduce in ("max", "row_sum"):
        check(q, k, lse, reduce=reduce)
        check(q, k, lse, reduce=reduce, normalize=False, lengths=lengths)
    assert all(launch[:2] == (4, 248) for launch in emulated)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float16), (80, torch.bfloat16), (128, torch.float16)])
def test_rows_and_head_dims(emulated, head_dim, dtype):
    q, k, lse = inputs((400, 450), 4, 1, head_dim, dtype)
    check(q, k, lse, rows=torch.tensor([6, 1, 3]), scale=None)
    check(q, k, lse, rows=torch.tensor([6, 1, 3]), reduce="row_sum")
    check(q, k, lse, rows=torch.tensor([7]))
    check(q, k, lse, rows=torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("reduce", ["max", "row_sum"])
def test_padding_and_its_lse_are_never_used(emulated, reduce):
    q, k, lse = inputs((150, 200), 4, 1, 64)
    common = {"lengths": torch.tensor([200, 101]), "reduce": reduce}
    expected = pooled_attention(q, k, implementation="reference", **common)
    q[1, :, 51:] = float("nan")  # queries start at position 50, so these are the padded ones
    k[1, :, 101:] = float("nan")
    lse[1, :, 51:] = float("nan")
    actual = pooled_attention(q, k, lse=lse, implementation="hopper", **common)
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


@pytest.mark.skipif(not dispatch.triton_interpreted(), reason="needs TRITON_INTERPRET=1")
def test_without_lse_it_is_computed_first(emulated):
    q, k, _ = inputs((100, 100), 4, 1, 64, torch.float16)
    check(q, k, None)
    assert len(emulated) == 1


def test_where_it_is_usable(emulated):
    q, k, _ = inputs((70, 70), 4, 1, 64)
    wanted = Wanted(64, 0.1, "max", True, None)
    assert interface.hopper_usable(q, k, wanted) is None
    assert interface.hopper_usable(q, k, wanted._replace(reduce="row_sum")) is None
    assert "float16 or bfloat16" in interface.hopper_usable(q.float(), k.float(), wanted)
    assert "reduce='max' or 'row_sum'" in interface.hopper_usable(q, k, wanted._replace(reduce="sum"))
    assert "blocks of 64" in interface.hopper_usable(q, k, wanted._replace(block_size=32))
    assert "head_dim" in interface.hopper_usable(q[..., :32], k[..., :32], wanted)
    assert "four query heads" in interface.hopper_usable(q[:, :2], k, wanted)
    assert "aligned k" in interface.hopper_usable(q, torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view_as(k), wanted)


def test_automatic_choice(emulated, monkeypatch):
    q, k, lse = inputs((70, 70), 4, 1, 64)
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    monkeypatch.setattr(dispatch, "HOPPER_AUTOMATIC", True)
    pooled_attention(q, k, lse=lse)
    assert len(emulated) == 1
    monkeypatch.setenv(dispatch.HOPPER_VARIABLE, "0")
    with contextlib.suppress(Exception):  # the Triton kernel, which may not run here
        pooled_attention(q, k, lse=lse)
    assert len(emulated) == 1


def test_asked_for_where_it_cannot_run():
    q, k, lse = inputs((70, 70), 4, 1, 64)
    with pytest.raises(ValueError, match="implementation='hopper' cannot run here: it needs CUDA tensors"):
        pooled_attention(q, k, lse=lse, implementation="hopper")
