"""What several test files share: inputs, block lists, the error criterion, NaN-filled memory."""

from __future__ import annotations

import importlib
import math
import threading

import torch
import torch.nn.functional as F

from seerattention.ops import block_sparse_attention, dispatch
from seerattention.ops.indices import BlockIndices, num_blocks
from seerattention.ops.span import Span

LIST_KINDS = ("random", "single", "all", "empty_rows", "shared")


def fill_empty_with_nan(monkeypatch) -> None:
    """Make torch.empty, empty_like and Tensor.new_empty of floating dtypes return NaN instead of whatever lay there."""

    def wrap(original):
        def empty(*args, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    monkeypatch.setattr(torch, "empty", wrap(torch.empty))
    monkeypatch.setattr(torch, "empty_like", wrap(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", wrap(torch.Tensor.new_empty))


def make_qkv(
    query_length, key_length, *, heads=4, kv_heads=2, head_dim=64, batch=1, dtype=torch.float32, device="cpu", seed=0
):
    """q, k, v as a model has them: ``[B, H, T, D]`` views of ``[B, T, H, D]`` memory (strided, last dim contiguous)."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(num_heads, length):
        x = torch.randn(batch, length, num_heads, head_dim, generator=generator, device=device)
        return x.to(dtype).transpose(1, 2)

    return draw(heads, query_length), draw(kv_heads, key_length), draw(kv_heads, key_length)


def make_blocks(kind, q, k, block_size=64, seed=0):
    """Lists of one of LIST_KINDS for q and k; entries past the counts hold garbage that must not be read."""
    batch, heads, query_length, _ = q.shape
    key_length = k.shape[2]
    first = Span(batch, query_length, key_length).first_row(block_size)
    num_keys = num_blocks(key_length, block_size)
    if kind == "shared":
        heads = k.shape[1]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, heads, num_keys - first, num_keys, generator=generator)
    rows = torch.arange(first, num_keys)[:, None]
    columns = torch.arange(num_keys)
    if kind == "all":
        mask = noise >= 0
    elif kind == "single":  # one causal block, not always the diagonal
        chosen = (noise[..., :1] * (rows + 1)).long()
        mask = columns == chosen
    else:
        mask = (noise < 0.4) | (columns == rows)
    if kind == "empty_rows":
        mask = mask & (noise[..., :1] < 0.5) & (noise < 0.4)
    blocks = BlockIndices.from_mask(mask, block_size)
    past = torch.arange(num_keys) >= blocks.counts[..., None]
    indices = blocks.indices.masked_fill(past, 1 << 20)
    return BlockIndices(indices.to(q.device), blocks.counts.to(q.device), num_keys, block_size)


def token_mask(blocks, query_length, key_length):
    """Bool ``[B, H, Tq, Tk]``: which key each query may read, written independently of the reference."""
    device = blocks.counts.device
    positions = torch.arange(key_length - query_length, key_length, device=device)
    keys = torch.arange(key_length, device=device)
    listed = torch.zeros(*blocks.counts.shape, blocks.num_key_blocks, dtype=torch.bool, device=device)
    for slot in range(blocks.indices.shape[-1]):
        index = blocks.indices[..., slot].long()
        valid = slot < blocks.counts
        listed |= valid[..., None] & (index[..., None] == torch.arange(blocks.num_key_blocks, device=device))
    by_token = listed[:, :, positions // blocks.block_size - blocks.first_row][..., keys // blocks.block_size]
    return by_token & (keys <= positions[:, None])


def masked_sdpa(q, k, v, blocks):
    """Dense attention with the lists as a mask, in the dtype of the inputs; queries without a key give 0."""
    mask = token_mask(blocks, q.shape[2], k.shape[2]).repeat_interleave(q.shape[1] // blocks.counts.shape[1], 1)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def sdpa_with_means(q, k, v, blocks):
    """What mean correction is, in the dtype of the inputs: the means of all blocks stand behind the keys, and a mask
    shows each query those of the whole blocks that it does not read."""
    size, (heads, queries), keys = blocks.block_size, q.shape[1:3], k.shape[2]
    num, group, both = keys // size, heads // k.shape[1], []
    for x in (k, v):
        means = x[:, :, : num * size].unflatten(2, (num, size)).double().mean(3).to(x.dtype)
        both.append(torch.cat([x, means], 2).repeat_interleave(group, 1))
    read = token_mask(blocks, queries, keys)
    read = read.repeat_interleave(heads // read.shape[1], 1)
    ends = torch.arange(keys - queries, keys, device=q.device)[:, None] + 1
    stands_in = (torch.arange(num, device=q.device) < ends // size) & ~read[..., : num * size : size]
    bias = torch.zeros(*read.shape[:3], keys + num, dtype=q.dtype, device=q.device)
    bias[..., keys:] = math.log(size)
    bias.masked_fill_(~torch.cat([read, stands_in], -1), -math.inf)
    return F.scaled_dot_product_attention(q, *both, attn_mask=bias)


def exact_attention(q, k, v, blocks, scale=None):
    """The definition, in float64: out ``[B, Hq, Tq, D]`` and natural-log lse ``[B, Hq, Tq]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = token_mask(blocks, q.shape[2], k.shape[2]).repeat_interleave(q.shape[1] // blocks.counts.shape[1], 1)
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = (q.double() @ k.mT * scale).masked_fill(~mask, float("-inf"))
    # softmax of a row of -inf is NaN; by contract its output is 0.
    return scores.softmax(-1).nan_to_num(nan=0.0) @ v, scores.logsumexp(-1)


def assert_as_accurate_as(out, baseline, exact):
    """Error of ``out`` against the exact result at most twice that of ``baseline``, plus one rounding step.

    The exact result is float64: a float32 one would share rounding errors with whichever candidate sums like it.
    """
    assert out.dtype == baseline.dtype
    assert out.shape == exact.shape
    assert not out.isnan().any(), "NaN in the output: memory that was never written, or an empty row"
    allowed = 2 * (baseline.double() - exact).abs().max() + torch.finfo(out.dtype).eps * exact.abs().max()
    error = (out.double() - exact).abs().max()
    assert error <= allowed, f"error {float(error):.3e}, allowed {float(allowed):.3e}"


def assert_lse_close(lse, reference, tolerance=2e-5):
    """Natural-log LSE: -inf at the same queries, and close elsewhere (float32 sums in another order)."""
    assert lse.dtype == torch.float32
    empty = reference == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    torch.testing.assert_close(lse[~empty], reference[~empty].float(), rtol=tolerance, atol=tolerance)


def check_attention(implementation, q, k, v, blocks):
    """Output and lse of an implementation against the exact ones, held to the error of masked SDPA in the same dtype.

    Returns the output.
    """
    exact, exact_lse = exact_attention(q, k, v, blocks)
    out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, implementation=implementation)
    assert_lse_close(lse, exact_lse)
    assert_as_accurate_as(out, masked_sdpa(q, k, v, blocks), exact)
    return out


def split_lists(monkeypatch, parts):
    """Block-sparse attention cuts every list that has so many entries into ``parts`` parts, whatever the grid."""
    module = importlib.import_module("seerattention.ops.block_sparse_attention.triton_parts")
    monkeypatch.setattr(module, "MIN_ENTRIES", 1)
    monkeypatch.setattr(module, "MAX_PARTS", parts)
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 1 << 30)


def in_threads(function, count=4):
    """What a function gives in so many threads that run at the same time."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(function())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
