"""The kernels on a GPU: the full product of shapes, dtypes and lists, very long inputs, repeatability."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings

import helpers
from list_cases import check_lists, check_what_lists_say, list_cases
from seerattention.ops import dense_indices, dispatch, select_threshold, select_topk
from seerattention.ops.block_sparse_attention import block_sparse_attention
from seerattention.ops.indices import BlockIndices

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [(1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (1000, 1000), (37, 200), (300, 1000)]


@pytest.fixture(params=["triton", "hopper"])
def implementation(request):
    """Every kernel that this GPU can run."""
    if request.param == "hopper" and (reason := dispatch.hopper_unusable(torch.device("cuda", 0))):
        pytest.skip(reason)
    return request.param


def run_and_check(implementation, q, k, v, blocks):
    interface = importlib.import_module("seerattention.ops.block_sparse_attention.interface")
    if implementation == "hopper" and (reason := interface.hopper_usable(q, k, v, blocks)):
        pytest.skip(reason)
    helpers.check_attention(implementation, q, k, v, blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_full_product(head_dim, group, dtype, implementation, nan_filled_empty):
    """Head_dim x GQA x dtype as parameters, lengths x list kinds inside: one compile per head_dim and dtype."""
    for seed, lengths in enumerate(LENGTHS):
        q, k, v = helpers.make_qkv(
            *lengths,
            batch=1 + seed % 2,
            heads=2 * group,
            kv_heads=2,
            head_dim=head_dim,
            dtype=dtype,
            device="cuda",
            seed=seed,
        )
        for kind in helpers.LIST_KINDS:
            run_and_check(implementation, q, k, v, helpers.make_blocks(kind, q, k, seed=seed))


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype"),
    [
        (16, 64, torch.bfloat16),
        (32, 32, torch.bfloat16),
        (32, 128, torch.float32),
        (64, 128, torch.float16),
        (64, 32, torch.float16),
        (64, 128, torch.bfloat16),
        (80, 64, torch.bfloat16),
        (80, 32, torch.float32),
        (96, 64, torch.bfloat16),
        (96, 128, torch.float16),
        (120, 64, torch.float16),
        (128, 32, torch.bfloat16),
        (128, 128, torch.bfloat16),
        (128, 128, torch.float32),
        (256, 64, torch.bfloat16),
        (256, 128, torch.float32),
    ],
    ids=str,
)
def test_other_head_dims_and_block_sizes(head_dim, block_size, dtype, implementation, nan_filled_empty):
    for lengths in ((1, 1), (65, 65), (1000, 1000), (37, 200)):
        q, k, v = helpers.make_qkv(*lengths, batch=2, head_dim=head_dim, dtype=dtype, device="cuda")
        for kind in helpers.LIST_KINDS:
            run_and_check(implementation, q, k, v, helpers.make_blocks(kind, q, k, block_size))


@pytest.mark.parametrize("parts", [2, 5, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_lists_in_parts(head_dim, dtype, parts, implementation, monkeypatch, nan_filled_empty):
    helpers.split_lists(monkeypatch, parts)
    for lengths in ((1, 65), (37, 200), (300, 1000), (64, 4096)):
        q, k, v = helpers.make_qkv(*lengths, batch=2, heads=8, head_dim=head_dim, dtype=dtype, device="cuda")
        for kind in helpers.LIST_KINDS:
            run_and_check(implementation, q, k, v, helpers.make_blocks(kind, q, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [80, 128])
def test_in_halves(head_dim, dtype, monkeypatch, nan_filled_empty):
    """What the Triton kernel does on GPUs before Hopper, here by hand."""
    monkeypatch.setattr(
        importlib.import_module("seerattention.ops.block_sparse_attention.triton"), "_in_halves", lambda *_: True
    )
    for lengths in LENGTHS:
        q, k, v = helpers.make_qkv(*lengths, batch=2, heads=8, head_dim=head_dim, dtype=dtype, device="cuda")
        for kind in helpers.LIST_KINDS:
            run_and_check("triton", q, k, v, helpers.make_blocks(kind, q, k))


@pytest.mark.parametrize("queries", [1, 100, 512])
def test_few_queries_on_long_keys_are_shared_out(queries, implementation, nan_filled_empty):
    """As they come, without a hand on the number of parts; and bit-identical when repeated."""
    q, k, v = helpers.make_qkv(queries, 32768, heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda")
    blocks = helpers.make_blocks("random", q, k)
    module = importlib.import_module(f"seerattention.ops.block_sparse_attention.{implementation}")
    per = module.PROGRAMS_PER_MULTIPROCESSOR
    per = per if isinstance(per, int) else per[128]
    parts = importlib.import_module("seerattention.ops.block_sparse_attention.triton_parts")
    assert parts.num_parts(blocks.num_rows * 8, blocks.indices.shape[-1], q.device, per) > 1
    run_and_check(implementation, q, k, v, blocks)
    first = block_sparse_attention(q, k, v, blocks, implementation=implementation)
    for _ in range(10):
        assert torch.equal(block_sparse_attention(q, k, v, blocks, implementation=implementation), first)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_any_strides(head_dim, implementation, nan_filled_empty):
    """Contiguous, cut out of one tensor that holds q, k and v, and with garbage around: the same bits."""
    q, k, v = helpers.make_qkv(
        300, 300, batch=2, heads=4, kv_heads=4, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    blocks = helpers.make_blocks("random", q, k)
    expected = block_sparse_attention(q, k, v, blocks, implementation=implementation)
    packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
    # NaN on every side: what a kernel reads beyond the tensors shows.
    framed = [F.pad(x, (8, 8, 64, 64, 1, 1, 1, 1), value=float("nan"))[1:-1, 1:-1, 64:-64, 8:-8] for x in (q, k, v)]
    for inputs in ([x.contiguous() for x in (q, k, v)], [x.transpose(1, 2) for x in packed.unbind(2)], framed):
        assert torch.equal(block_sparse_attention(*inputs, blocks, implementation=implementation), expected)


def test_narrow_lists_and_lists_without_room(implementation, nan_filled_empty):
    q, k, v = helpers.make_qkv(300, 300, dtype=torch.bfloat16, device="cuda")
    single = helpers.make_blocks("single", q, k)
    narrow = BlockIndices(single.indices[..., :1].contiguous(), single.counts, single.num_key_blocks, 64)
    run_and_check(implementation, q, k, v, narrow)
    none = BlockIndices(single.indices[..., :0], torch.zeros_like(single.counts), single.num_key_blocks, 64)
    out, lse = block_sparse_attention(q, k, v, none, return_lse=True, implementation=implementation)
    assert not out.any()
    assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_blocks_equal_sdpa(dtype, implementation):
    if implementation == "hopper" and dtype == torch.float32:
        pytest.skip("16-bit dtypes only")
    q, k, v = helpers.make_qkv(1000, 1000, head_dim=128, dtype=dtype, device="cuda")
    blocks = helpers.make_blocks("all", q, k)
    out = block_sparse_attention(q, k, v, blocks, implementation=implementation)
    dense = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)
    helpers.assert_as_accurate_as(out, dense, helpers.exact_attention(q, k, v, blocks)[0])


def test_automatic_choice_and_optional_lse(implementation, monkeypatch, nan_filled_empty):
    monkeypatch.setenv(dispatch.HOPPER_VARIABLE, "1" if implementation == "hopper" else "0")
    module = importlib.import_module(f"seerattention.ops.block_sparse_attention.{implementation}")
    kernel, calls = getattr(module, f"block_sparse_attention_{implementation}"), []
    monkeypatch.setattr(
        module, f"block_sparse_attention_{implementation}", lambda *args: (calls.append(1), kernel(*args))[1]
    )
    q, k, v = helpers.make_qkv(300, 300, dtype=torch.bfloat16, device="cuda")
    blocks = helpers.make_blocks("random", q, k)
    with_lse, _ = block_sparse_attention(q, k, v, blocks, return_lse=True, implementation=implementation)
    assert torch.equal(block_sparse_attention(q, k, v, blocks), with_lse)
    assert len(calls) == 2


def _long_lists(heads, rows, per_row, generator):
    """Ascending lists of at most per_row blocks that hold block 0, the diagonal and random ones between."""
    diagonal = torch.arange(rows, device="cuda")
    draws = torch.rand(1, heads, rows, per_row, device="cuda", generator=generator) * (diagonal[:, None] + 1)
    draws = draws.long().clamp(max=diagonal[:, None])
    draws[..., 0] = 0
    draws[..., -1] = diagonal
    draws = draws.sort(-1).values
    repeated = torch.zeros_like(draws, dtype=torch.bool)
    repeated[..., 1:] = draws[..., 1:] == draws[..., :-1]
    packed = draws.masked_fill(repeated, rows).sort(-1).values  # repeats move to the end, past the counts
    counts = (~repeated).sum(-1, dtype=torch.int32)
    return BlockIndices(packed.int(), counts, rows, 64)


def _check_rows(q, k, v, blocks, out, rows):
    """Compare single query blocks with exact attention over the keys up to them."""
    for row in rows:
        end = (row + 1) * 64
        listed = BlockIndices(
            blocks.indices[:, :, row : row + 1, :].contiguous(), blocks.counts[:, :, row : row + 1], row + 1, 64
        )
        one = q[:, :, end - 64 : end]
        exact, _ = helpers.exact_attention(one, k[:, :, :end], v[:, :, :end], listed)
        baseline = helpers.masked_sdpa(one, k[:, :, :end], v[:, :, :end], listed)
        helpers.assert_as_accurate_as(out[:, :, end - 64 : end], baseline, exact)


def test_64k_tokens_sampled(implementation, nan_filled_empty):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = helpers.make_qkv(65536, 65536, heads=4, kv_heads=1, head_dim=128, dtype=torch.bfloat16, device="cuda")
    blocks = _long_lists(4, 1024, 52, generator)
    out = block_sparse_attention(q, k, v, blocks, implementation=implementation)
    assert not out.isnan().any()
    _check_rows(q, k, v, blocks, out, [0, 1, 17, 333, 512, 1000, 1023])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_repeats_are_bit_identical(head_dim, implementation):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = helpers.make_qkv(
        16384, 16384, heads=8, kv_heads=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    blocks = _long_lists(8, 256, 26, generator)
    first, first_lse = block_sparse_attention(q, k, v, blocks, return_lse=True, implementation=implementation)
    for _ in range(20):
        out, lse = block_sparse_attention(q, k, v, blocks, return_lse=True, implementation=implementation)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


def test_more_than_2_to_the_31_elements(implementation):
    """Addresses past 2^31 elements: the last head of a large input equals the same head alone."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    length, heads = 1 << 18, 66
    q = torch.randn(1, heads, length, 128, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, 1, 1, length, 128, dtype=torch.bfloat16, device="cuda").unbind(0)
    lists = _long_lists(1, length // 64, 2, torch.Generator("cuda").manual_seed(0))
    blocks = BlockIndices(
        lists.indices.expand(1, heads, -1, -1), lists.counts.expand(1, heads, -1), lists.num_key_blocks, 64
    )
    assert q.numel() > 2**31
    out = block_sparse_attention(q, k, v, blocks, implementation=implementation)
    alone = block_sparse_attention(q[:, -1:].clone(), k, v, lists, implementation=implementation)
    assert torch.equal(out[:, -1:], alone)


def test_another_current_device(implementation):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = helpers.make_qkv(100, 100, dtype=torch.bfloat16, device="cuda:1")
    run_and_check(implementation, q, k, v, helpers.make_blocks("random", q, k))


# -- lists from outside ------------------------------------------------------------------------------------------------

RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.mark.parametrize("parts", [1, 3])
@given(case=list_cases(block_sizes=(64, 128), most_keys=400))
@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
def test_arbitrary_lists(parts, implementation, monkeypatch, case):
    """Unsorted, repeated, future, empty: as brute force over the sets."""
    if parts > 1:
        helpers.split_lists(monkeypatch, parts)
    check_lists(implementation, case, head_dim=64, dtype=torch.bfloat16, device="cuda")


@given(case=list_cases(most_keys=1000))
@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
def test_what_lists_say_of_themselves(case):
    check_what_lists_say(case, "cuda")


@pytest.mark.parametrize(("value", "words"), [(-1, "is -1"), (5, "is 5, but the key blocks are 0 to 4")])
def test_entries_that_are_no_block(value, words, implementation):
    q, k, v = helpers.make_qkv(300, 300, dtype=torch.bfloat16, device="cuda")
    blocks = helpers.make_blocks("random", q, k)
    blocks.indices[0, 1, 2, 0] = value
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(q, k, v, blocks, implementation=implementation)
    blocks.indices[0, 1, 2, 0] = 0
    blocks.counts[0, 3, 1] = blocks.indices.shape[-1] + 1
    with pytest.raises(ValueError, match=r"counts\[0, 3, 1\] is 6"):
        block_sparse_attention(q, k, v, blocks, implementation=implementation)


@pytest.mark.parametrize("inference", [False, True])
def test_lists_of_the_package_wait_for_nothing(inference, implementation):
    """Also when somebody has looked at them; lists from outside have to be looked at."""
    q, k, v = helpers.make_qkv(300, 300, heads=4, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    scores, keep = torch.rand(1, 4, 5, 5, device="cuda"), torch.tensor([1, 2, 2, 3, 3], device="cuda")

    def run(blocks):
        return block_sparse_attention(q, k, v, blocks, implementation=implementation)

    def own():
        return [
            select_topk(scores, keep),
            select_threshold(scores, 0.5),
            dense_indices(1, 4, 5, 5, block_size=64, device="cuda"),
            BlockIndices.from_mask(scores < 0.5),
        ]

    with torch.inference_mode(inference):
        for blocks in own():  # compiles
            run(blocks)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for blocks in own():
                run(blocks)
                assert blocks.indices.shape[:3] == blocks.counts.shape
                run(blocks)
            outside = BlockIndices(blocks.indices, blocks.counts, 5)
            with pytest.raises(RuntimeError, match="synchronizing"):
                run(outside)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_lists_from_outside_in_a_cuda_graph(implementation):
    """They are cleaned on the device, whatever is written into them between replays; nothing is refused there."""
    q, k, v = helpers.make_qkv(300, 300, dtype=torch.bfloat16, device="cuda")
    indices = torch.zeros(1, 4, 5, 6, dtype=torch.int32, device="cuda")
    counts = torch.zeros(1, 4, 5, dtype=torch.int32, device="cuda")
    blocks = BlockIndices(indices, counts, 5)
    block_sparse_attention(q, k, v, blocks, implementation=implementation)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(q, k, v, blocks, implementation=implementation)
    for seed in (0, 1):
        torch.manual_seed(seed)
        indices.copy_(torch.randint(-2, 8, indices.shape))
        counts.copy_(torch.randint(-1, 8, counts.shape))
        graph.replay()
        listed = torch.arange(6, device="cuda") < counts[..., None]
        mask = (F.one_hot(indices.long().clamp(-1, 5) + 1, 7).bool() & listed[..., None]).any(-2)[..., 1:6]
        expected = block_sparse_attention(q, k, v, BlockIndices.from_mask(mask), implementation=implementation)
        torch.testing.assert_close(out, expected)


def test_cleaning_long_lists_takes_little_memory():
    """128K tokens of 32 heads: besides the lists that are made, a gigabyte."""
    generator = torch.Generator("cuda").manual_seed(0)
    indices = torch.randint(0, 2048, (1, 32, 2048, 256), dtype=torch.int32, device="cuda", generator=generator)
    counts = torch.full((1, 32, 2048), 256, dtype=torch.int32, device="cuda")
    blocks = BlockIndices(indices, counts, 2048)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    checked = blocks.checked()
    assert torch.cuda.max_memory_allocated() - before < checked.indices.nbytes + (1 << 30)
    row = indices[0, 5, 1000].unique()
    assert checked.indices[0, 5, 1000, : int(checked.counts[0, 5, 1000])].tolist() == row[row <= 1000].tolist()
