"""The Hopper kernel without a GPU: its logic in an emulator, when it may be used, and who chooses it."""

from __future__ import annotations

import importlib

import pytest
import torch

from helpers import (
    LIST_KINDS,
    check_attention,
    make_blocks,
    make_qkv,
    split_lists,
)
from seerattention.ops import dispatch
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.indices import BlockIndices

interface = importlib.import_module("seerattention.ops.block_sparse_attention.interface")
LENGTHS = [(1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (1, 65), (37, 200), (130, 333), (64, 192)]


@pytest.fixture
def emulated(emulated_attention, nan_filled_empty):
    """implementation="hopper" in the emulator, and memory that is NaN until it is written."""
    return emulated_attention


def run_and_check(q, k, v, blocks):
    out = check_attention("hopper", q, k, v, blocks)
    assert torch.equal(block_sparse_attention(q, k, v, blocks, implementation="hopper"), out)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", LIST_KINDS)
def test_lists_and_lengths(kind, lengths, emulated):
    q, k, v = make_qkv(*lengths, batch=2, heads=2, kv_heads=1, dtype=torch.float16)
    run_and_check(q, k, v, make_blocks(kind, q, k))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "dtype"),
    [
        (1, 1, 128, 64, torch.bfloat16),
        (4, 2, 96, 64, torch.float16),
        (4, 1, 80, 128, torch.bfloat16),
        (7, 1, 64, 128, torch.float16),
        (8, 1, 128, 128, torch.bfloat16),
    ],
    ids=str,
)
def test_heads_dims_and_blocks(heads, kv_heads, head_dim, block_size, dtype, emulated):
    for seed, lengths in enumerate([(65, 65), (100, 260), (193, 200), (1, 129)]):
        q, k, v = make_qkv(*lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, seed=seed)
        for kind in LIST_KINDS:
            run_and_check(q, k, v, make_blocks(kind, q, k, block_size, seed=seed))


def test_longer(emulated):
    q, k, v = make_qkv(1000, 1000, heads=1, kv_heads=1, dtype=torch.bfloat16)
    run_and_check(q, k, v, make_blocks("random", q, k))


def test_any_strides(emulated):
    """Contiguous, and cut out of one tensor that holds q, k and v: no copies are made."""
    q, k, v = make_qkv(100, 100, heads=2, kv_heads=2, batch=2, dtype=torch.float16)
    blocks = make_blocks("random", q, k)
    expected = block_sparse_attention(q, k, v, blocks, implementation="hopper")
    packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
    for inputs in ([x.contiguous() for x in (q, k, v)], [x.transpose(1, 2) for x in packed.unbind(2)]):
        assert torch.equal(block_sparse_attention(*inputs, blocks, implementation="hopper"), expected)


def test_capacities_and_strided_lists(emulated):
    q, k, v = make_qkv(200, 200, dtype=torch.float16)
    blocks = make_blocks("empty_rows", q, k)
    wide = torch.full((*blocks.indices.shape[:3], 9), 1 << 20, dtype=torch.int32)
    wide[..., : blocks.indices.shape[-1]] = blocks.indices
    counts = blocks.counts.transpose(1, 2).contiguous().transpose(1, 2)
    run_and_check(q, k, v, BlockIndices(wide.transpose(1, 2).contiguous().transpose(1, 2), counts, 4, 64))
    single = make_blocks("single", q, k)  # without the diagonal: no slot past the last entry is memory of the list
    run_and_check(q, k, v, BlockIndices(single.indices[..., :1].contiguous(), single.counts, 4, 64))
    none = BlockIndices(wide[..., :0], torch.zeros_like(counts), 4, 64)
    out, lse = block_sparse_attention(q, k, v, none, return_lse=True, implementation="hopper")
    assert not out.any()
    assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("kind", LIST_KINDS)
def test_lists_in_parts(kind, head_dim, emulated, monkeypatch):
    split_lists(monkeypatch, 3)
    for lengths in ((1, 65), (37, 200), (64, 192), (130, 333)):
        q, k, v = make_qkv(*lengths, batch=2, heads=2, kv_heads=1, head_dim=head_dim, dtype=torch.float16)
        blocks = make_blocks(kind, q, k)
        run_and_check(q, k, v, blocks)
        assert emulated[-1][2]["IN_PARTS"] == (blocks.indices.shape[-1] > 1)


# -- when it may be used -----------------------------------------------------------------------------------------------


def usable(head_dim=64, dtype=torch.float16, block_size=64, change=lambda x: x):
    q, k, v = make_qkv(100, 100, head_dim=head_dim, dtype=dtype)
    return interface.hopper_usable(q, change(k), v, make_blocks("all", q, k, block_size))


def test_what_is_not_supported_has_a_reason(monkeypatch):
    assert "got cpu" in usable()
    monkeypatch.setattr(dispatch, "hopper_unusable", lambda device: None)
    for head_dim in (64, 80, 96, 128):
        assert usable(head_dim) is None
    assert usable(block_size=128) is None
    assert "head_dim" in usable(32)
    assert "head_dim" in usable(256)
    assert "float32" in usable(dtype=torch.float32)
    assert "blocks of 64 or 128" in usable(block_size=32)
    # K at an odd address, with rows of 65 elements, and expanded from one head
    assert "aligned k" in usable(change=lambda k: torch.cat([k.flatten(), k.flatten()])[1 : k.numel() + 1].view_as(k))
    assert "strides of [13000" in usable(change=lambda k: torch.nn.functional.pad(k, (0, 1))[..., :64])
    assert "strides" in usable(change=lambda k: k[:, :1].expand(-1, 2, -1, -1))
    assert usable(change=lambda k: k[:, :1].expand(-1, 1, -1, -1)) is None


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((9, 0), "3.6.0", None),
        ((9, 0), "3.7.1", None),
        ((9, 0), "3.5.1", "written for triton 3.6 and 3.7, got 3.5.1"),
        ((9, 0), "4.0.0", "got 4.0.0"),
        ((8, 0), "3.7.1", "got 8.0"),
        ((10, 0), "3.7.1", "got 10.0"),
    ],
)
def test_devices_and_versions(capability, version, reason, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton, "__version__", version)
    found = dispatch.hopper_unusable.__wrapped__(torch.device("cuda"))
    assert found is None if reason is None else reason in found


def test_asked_for_where_it_cannot_run():
    q, k, v = make_qkv(100, 100, dtype=torch.float16)
    with pytest.raises(ValueError, match="'hopper' cannot run here: it needs CUDA tensors, got cpu"):
        block_sparse_attention(q, k, v, make_blocks("all", q, k), implementation="hopper")


def test_who_chooses_it(emulated, monkeypatch):
    """Automatic choice, pretending that the CPU is a GPU: only with the environment variable, and never for float32."""
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    triton = importlib.import_module("seerattention.ops.block_sparse_attention.triton")
    portable = []
    monkeypatch.setattr(
        triton, "block_sparse_attention", lambda q, *args: (portable.append(1), (torch.zeros_like(q), None))[1]
    )
    monkeypatch.delenv(dispatch.HOPPER_VARIABLE, raising=False)
    for value, automatic, dtype, chosen in [
        (None, False, torch.float16, False),
        (None, True, torch.float16, True),
        ("1", False, torch.float16, True),
        ("1", False, torch.float32, False),
        ("0", True, torch.float16, False),
    ]:
        monkeypatch.setattr(dispatch, "HOPPER_AUTOMATIC", automatic)
        if value is not None:
            monkeypatch.setenv(dispatch.HOPPER_VARIABLE, value)
        emulated.clear()
        portable.clear()
        q, k, v = make_qkv(64, 64, heads=1, kv_heads=1, dtype=dtype)
        block_sparse_attention(q, k, v, make_blocks("all", q, k))
        assert (len(emulated), len(portable)) == ((1, 0) if chosen else (0, 1))
