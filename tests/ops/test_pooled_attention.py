"""pooled_attention against a float64 map built from the definition, and against the official targets."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pooled_cases import make
from seerattention.ops import dispatch, pooled_attention
from seerattention.ops.dense import dense_attention_with_lse
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.indices import first_query_block, num_blocks
from seerattention.ops.pooled_attention.arguments import REDUCTIONS

GOLDEN = Path(__file__).parents[1] / "golden" / "distill_targets.safetensors"
needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)


def definition(q, k, block_size, rows, lengths=None, reduce="max", normalize=True, scale=None, lse=None):
    """The whole map in float64, then one tile after the other."""
    batch, heads, query_length, head_dim = q.shape
    key_length = k.shape[2]
    k = k.double().repeat_interleave(heads // k.shape[1], 1)
    scores = q.double() @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    positions = torch.arange(key_length - query_length, key_length)
    probabilities = scores.masked_fill(torch.arange(key_length) > positions[:, None], float("-inf")).softmax(-1)
    out = torch.zeros(batch, heads, len(rows), num_blocks(key_length, block_size), dtype=torch.float64)
    for b in range(batch):
        end = key_length if lengths is None else int(lengths[b])
        for slot, row in enumerate(rows):
            queries = (positions // block_size == row) & (positions < end)
            if not queries.any():
                continue
            for key in range(row + 1):
                tile = probabilities[b, :, queries, key * block_size : (key + 1) * block_size]
                if reduce == "max":
                    out[b, :, slot, key] = tile.amax((1, 2))
                elif reduce == "row_sum":
                    out[b, :, slot, key] = torch.stack([query.sum(-1) for query in tile.unbind(1)]).amax(0)
                else:
                    out[b, :, slot, key] = tile.sum((1, 2)) / (int(queries.sum()) if normalize else 1)
    if reduce != "sum" and normalize:
        out = torch.nan_to_num(out / out.sum(-1, keepdim=True))
    return out


def all_rows(query_length, key_length, block_size):
    return list(range(first_query_block(query_length, key_length, block_size), num_blocks(key_length, block_size)))


def check(q, k, block_size, implementation, rows=None, tolerance=2e-6, **arguments):
    wanted = all_rows(q.shape[2], k.shape[2], block_size) if rows is None else rows
    expected = definition(q, k, block_size, wanted, **arguments)
    rows = None if rows is None else torch.tensor(rows)
    actual = pooled_attention(q, k, block_size=block_size, rows=rows, implementation=implementation, **arguments)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    scale = 1.0 if arguments.get("normalize", True) else max(1.0, float(expected.max()))
    assert (actual - expected).abs().max() <= tolerance * scale


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 1000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(4, 4, 64, 64), (4, 2, 32, 32), (7, 1, 80, 64), (8, 2, 128, 128)]
)
def test_equals_definition(implementation, length, heads, kv_heads, head_dim, block_size):
    q, k = make(length, length, heads, kv_heads, head_dim)
    for reduce in REDUCTIONS:
        check(q, k, block_size, implementation, reduce=reduce)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
def test_rows_lengths_and_chunks(implementation, reduce, normalize):
    kinds = {"reduce": reduce, "normalize": normalize}
    q, k = make(200, 330, 4, 2, 32)
    check(q, k, 64, implementation, rows=[5, 2, 4], **kinds)
    check(q, k, 32, implementation, lengths=torch.tensor([330, 201]), **kinds)
    check(q, k, 64, implementation, lengths=torch.tensor([131, 257]), rows=[2, 5], scale=0.3, **kinds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    q, k = make(190, 190, 4, 2, 64, dtype=dtype)
    for reduce in REDUCTIONS:
        check(q, k, 64, None, reduce=reduce)


@pytest.mark.parametrize("implementation", ["reference", "cpu", pytest.param("triton", marks=needs_interpreter)])
def test_what_the_reductions_tell_apart(implementation):
    """A query that looks at one key of a block, one that looks at all keys of it alike, and all queries a little."""
    probabilities = torch.zeros(32, 128)
    probabilities[:, 96] = 0.4  # the rest of every row: its own block
    probabilities[0, 5], probabilities[1, 32:64] = 0.5, 0.6 / 32
    probabilities[2:, 64:96] = 0.2 / 32
    probabilities[:, 96] += 1 - probabilities.sum(-1)
    # Queries and keys whose products are the logarithms of these: scores of what is not seen are far below.
    q = probabilities.clamp(min=1e-12).log()[None, None]
    k = torch.eye(128)[None, None]
    common = {"block_size": 32, "scale": 1.0, "normalize": False, "implementation": implementation}
    row = {reduce: pooled_attention(q, k, reduce=reduce, **common)[0, 0, 0].tolist() for reduce in REDUCTIONS}
    assert row["max"] == pytest.approx([0.5, 0.6 / 32, 0.2 / 32, 0.8], abs=1e-5)
    assert row["sum"] == pytest.approx([0.5, 0.6, 6.0, 32 - 7.1], abs=1e-4)
    assert row["row_sum"] == pytest.approx([0.5, 0.6, 0.2, 0.8], abs=1e-5)


def test_rows_sum_to_one_and_padding_gives_zero_rows():
    q, k = make(300, 300, 4, 2, 32)
    lengths = torch.tensor([300, 100])
    for reduce in REDUCTIONS:
        sums = pooled_attention(q, k, block_size=32, lengths=lengths, reduce=reduce).sum(-1)
        torch.testing.assert_close(sums[0], torch.ones_like(sums[0]))
        torch.testing.assert_close(sums[1, :, :4], torch.ones_like(sums[1, :, :4]))
        assert (sums[1, :, 4:] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_padding_changes_nothing(implementation):
    """A padded row gives what it would give alone, even where the padding holds NaN."""
    q, k = make(200, 200, 4, 2, 32)
    alone = pooled_attention(q[1:, :, :100], k[1:, :, :100], block_size=32, implementation=implementation)
    q[1, :, 100:] = float("nan")
    k[1, :, 100:] = float("nan")
    padded = pooled_attention(q, k, block_size=32, lengths=torch.tensor([200, 100]), implementation=implementation)
    torch.testing.assert_close(padded[1:, :, :4, :4], alone, atol=1e-6, rtol=0)
    assert (padded[1, :, 4:] == 0).all()


@needs_interpreter
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim", "block_size", "dtype"),
    [
        ((1, 1), 2, 2, 64, 64, torch.float32),
        ((63, 63), 2, 1, 32, 32, torch.float16),
        ((65, 65), 4, 1, 128, 64, torch.float16),
        ((127, 200), 2, 1, 64, 32, torch.float32),
        ((130, 130), 3, 3, 80, 128, torch.float16),
        ((70, 260), 1, 1, 256, 128, torch.float16),
    ],
)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_triton_interpreted(lengths, heads, kv_heads, head_dim, block_size, dtype, reduce):
    q, k = make(*lengths, heads, kv_heads, head_dim, batch=1, dtype=dtype)
    check(q, k, block_size, "triton", reduce=reduce)


@needs_interpreter
def test_triton_interpreted_rows_and_padding():
    q, k = make(150, 200, 2, 1, 32)
    lengths = torch.tensor([200, 101])
    for reduce in REDUCTIONS:
        check(q, k, 32, "triton", rows=[5, 1, 3], lengths=lengths, reduce=reduce, normalize=reduce == "max")
    q[1, :, 51:] = float("nan")  # queries start at position 50, so these are the padded ones
    k[1, :, 101:] = float("nan")
    assert not pooled_attention(q, k, block_size=32, lengths=lengths, implementation="triton").isnan().any()


@pytest.mark.parametrize("case", ["L128/kv4/bs64", "L256/kv2/bs64", "L320/kv2/bs64", "L320/kv2/bs32"])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_official_targets(case, implementation):
    """The exact target to 1e-5; the official one within its bf16 rounding (0.0084 absolute, 2.3 % relative)."""
    golden = load_file(GOLDEN)
    inputs, block_size = f"prefill/{case.rsplit('/', 1)[0]}", int(case.rsplit("bs", 1)[1])
    q, k = golden[f"{inputs}/q"], golden[f"{inputs}/k"]
    target = pooled_attention(q, k, block_size=block_size, scale=0.125, implementation=implementation)
    assert (target - golden[f"prefill/{case}/pooled_gt_exact"]).abs().max() < 1e-5
    official = golden[f"prefill/{case}/pooled_gt"].float()
    assert (target - official).abs().max() < 8.4e-3
    assert ((target - official).abs() <= 2.3e-2 * target).all()


def lse_of(q, k, scale=None):
    """Log-sum-exp of the scaled causal logits, in float64, as float32 in another memory order."""
    query_length, key_length = q.shape[2], k.shape[2]
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
    positions = torch.arange(key_length - query_length, key_length)
    lse = scores.masked_fill(torch.arange(key_length) > positions[:, None], float("-inf")).logsumexp(-1)
    return lse.float().transpose(1, 2).contiguous().transpose(1, 2)


# (Tq, Tk), query heads, KV heads, head_dim, block size: every ratio of heads, chunks that begin inside a block.
GIVEN = [
    ((1, 1), 2, 2, 16, 64),
    ((63, 130), 4, 2, 16, 32),
    ((65, 65), 4, 1, 32, 64),
    ((70, 150), 7, 1, 16, 64),
    ((100, 200), 8, 1, 24, 64),
    ((140, 140), 6, 2, 16, 128),
    ((127, 127), 5, 1, 16, 32),
]


@pytest.mark.parametrize("implementation", ["reference", "cpu", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim", "block_size"), GIVEN)
def test_given_the_lse_of_the_forward(
    implementation, tokens, heads, kv_heads, head_dim, block_size, monkeypatch, nan_filled_empty
):
    """lse has an error of its own, half an ulp of numbers of about 10, which every value of the map inherits."""
    q, k = make(*tokens, heads, kv_heads, head_dim)
    lse = lse_of(q, k)
    if implementation == "triton":  # as many query heads a program as on a Hopper GPU
        monkeypatch.setattr(kernels(), "query_rows", lambda *_: 256)
        monkeypatch.setattr(kernels(), "query_lse", None)  # not asked
    last = all_rows(*tokens, block_size)[-1]
    lengths = torch.tensor([tokens[1], max(1, tokens[1] - tokens[0] // 2)])
    for reduce, normalize in itertools.product(REDUCTIONS, (True, False)):
        common = {"reduce": reduce, "normalize": normalize, "lse": lse, "tolerance": 5e-6}
        check(q, k, block_size, implementation, **common)
        check(q, k, block_size, implementation, rows=[last], lengths=lengths, **common)


def kernels():
    return importlib.import_module("seerattention.ops.pooled_attention.triton")


@needs_interpreter
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 1), (8, 1)])
@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_triton_shares_keys_between_heads(heads, kv_heads, tokens, monkeypatch, nan_filled_empty):
    monkeypatch.setattr(kernels(), "query_rows", lambda *_: tokens)
    q, k = make(50, 90, heads, kv_heads, 16, batch=1)
    for block_size in (32, 64):
        for reduce in ("max", "row_sum"):
            check(q, k, block_size, "triton", rows=[2, 1] if block_size == 32 else None, reduce=reduce)


@needs_interpreter
@pytest.mark.parametrize("block_size", [64, 128])
def test_wide_heads_on_a_gpu_of_little_shared_memory(block_size, monkeypatch, caplog, nan_filled_empty):
    monkeypatch.setattr(dispatch, "shared_memory", lambda device: 101376)
    dispatch.warn_once.cache_clear()
    q, k = make(50, 150, 2, 1, 256, batch=1, dtype=torch.float16)
    check(q, k, block_size, "triton")
    check(q, k, block_size, "triton", reduce="row_sum")
    q, k = q.float(), k.float()
    if block_size == 64:
        check(q, k, block_size, "triton")
        return
    with pytest.raises(ValueError, match="does not fit this GPU's shared memory; pass implementation=None"):
        pooled_attention(q, k, block_size=128, implementation="triton")
    # As on such a GPU, where Triton is the automatic choice: the reference runs, and says so.
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    check(q, k, block_size, None)
    assert "the slow reference implementation runs" in caplog.text


@needs_interpreter
def test_padding_and_its_lse_are_never_used(nan_filled_empty):
    q, k = make(150, 200, 4, 1, 16)
    lse, lengths = lse_of(q, k), torch.tensor([200, 101])
    expected = {reduce: pooled_attention(q, k, block_size=32, lengths=lengths, reduce=reduce) for reduce in REDUCTIONS}
    q[1, :, 51:] = float("nan")  # queries start at position 50, so these are the padded ones
    k[1, :, 101:] = float("nan")
    lse[1, :, 51:] = float("nan")
    for implementation in ("reference", "cpu", "triton"):
        for reduce in REDUCTIONS:
            common = {"block_size": 32, "lengths": lengths, "lse": lse, "reduce": reduce}
            actual = pooled_attention(q, k, implementation=implementation, **common)
            torch.testing.assert_close(actual, expected[reduce], atol=5e-6, rtol=0)


def test_dense_attention_with_lse():
    for heads, kv_heads, length, head_dim, scale in [(4, 2, 200, 32, None), (4, 4, 65, 80, 0.3), (6, 2, 1, 16, None)]:
        q, k = make(length, length, heads, kv_heads, head_dim)
        v = torch.randn_like(k)
        out, lse = dense_attention_with_lse(q, k, v, scale=scale)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        assert torch.equal(out, sdpa(q, k, v, is_causal=True, enable_gqa=True, scale=scale))
        torch.testing.assert_close(lse, lse_of(q, k, scale), atol=1e-5, rtol=1e-6)
    assert dense_attention_with_lse(q[:, :, :1], k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)) is None  # a chunk


def test_no_gradient():
    q, k = make(70, 70, 2, 1, 32)
    assert not pooled_attention(q.requires_grad_(), k).requires_grad
