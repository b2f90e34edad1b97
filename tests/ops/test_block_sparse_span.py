"""Block-sparse attention of rows that begin anywhere and lie anywhere: each is what it is alone, in one shot."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import split_lists
from layouts import LAYOUTS, check_attention_layout, draw_prompts, lay_out, lists_of
from seerattention.ops import BlockIndices, Pages, Span, block_sparse_attention
from seerattention.policies import Threshold, TopK

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers it")

IMPLEMENTATIONS = ("reference", "cpu_gathered", "triton")
# Queries and keys of each row: a later chunk, one token, a whole prompt, a chunk that begins with a block.
SIZES = [(40, 101), (1, 33), (70, 70), (31, 95)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_any_layout_equal_the_whole_prompt(implementation, layout, nan_filled_empty):
    check_attention_layout(implementation, layout, SIZES, shared=layout == "packed", head_dim=24, heads=2, kv_heads=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_in_parts(layout, nan_filled_empty, monkeypatch):
    split_lists(monkeypatch, 2)
    sizes = [(5, 101), (34, 70)]
    check_attention_layout("triton", layout, sizes, heads=2, kv_heads=1, head_dim=16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", [1, 2])
def test_hopper_emulated(parts, layout, emulated_attention, nan_filled_empty, monkeypatch):
    split_lists(monkeypatch, parts)
    sizes = [(70, 200), (1, 65), (130, 130), (33, 97)]
    common = {"head_dim": 64, "block_size": 64, "dtype": torch.float16, "shared": layout == "pages"}
    check_attention_layout("hopper", layout, sizes, **common)
    wide = {"heads": 2, "kv_heads": 1, "head_dim": 72, "block_size": 128, "dtype": torch.bfloat16}
    check_attention_layout("hopper", layout, sizes[:2], **wide)
    assert all(constants["TABLE"] for *_, constants in emulated_attention)


@settings(deadline=None, max_examples=25)
@example(
    sizes=[(1, 0), (1, 14), (1, 39)], layout="left", implementation="reference", block_size=32, shared=False, seed=0
)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 80)), min_size=1, max_size=3),
    layout=st.sampled_from(LAYOUTS),
    implementation=st.sampled_from(["reference", "cpu_gathered"]),
    block_size=st.sampled_from([32, 64]),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_spans(sizes, layout, implementation, block_size, shared, seed):
    sizes = [(length, start + length) for length, start in sizes]
    common = {"shared": shared, "seed": seed, "head_dim": 8, "block_size": block_size}
    check_attention_layout(implementation, layout, sizes, **common)


@settings(deadline=None, max_examples=6)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=2),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_random_spans_in_triton(sizes, layout, seed):
    sizes = [(length, start + length) for length, start in sizes]
    check_attention_layout("triton", layout, sizes, seed=seed, head_dim=16, heads=2, kv_heads=1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_of_a_ragged_batch_equal_one_shot(implementation):
    """Prompts of several lengths, each cut at its own odd places; rows that have ended hold nothing."""
    lengths, cuts = [90, 41], [[0, 37, 71, 90], [0, 33, 41, 41]]
    prompts = draw_prompts([(n, n) for n in lengths], heads=2, kv_heads=1, head_dim=16)
    for start, end in ((0, 1), (1, 2), (2, 3)):
        bounds = [(cut[start], cut[end]) for cut in cuts]
        rows = [(q[:, a:b], k[:, :b], v[:, :b]) for (q, k, v, _), (a, b) in zip(prompts, bounds, strict=True)]
        call = lay_out(rows, "right")
        out = block_sparse_attention(*call[:3], lists_of(prompts, call.span, 32), implementation=implementation)
        for mine, (q, k, v, mask), (a, b) in zip(call.take(out), prompts, bounds, strict=True):
            lists = BlockIndices.from_mask(mask[None], 32)
            whole = block_sparse_attention(q[None], k[None], v[None], lists, implementation="reference")
            torch.testing.assert_close(mine, whole[0, :, a:b], rtol=1e-5, atol=1e-5)
        assert (call.rest(out) == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lists_from_outside_lose_what_their_row_does_not_see(implementation):
    """Every row lists everything, backwards and twice; so do rows that hold no query."""
    prompts = [(*prompt[:3], torch.ones_like(prompt[3]).tril()) for prompt in draw_prompts([(40, 101), (5, 33)])]
    call = lay_out([(q[:, -n:], k, v) for (q, k, v, _), n in zip(prompts, (40, 5), strict=True)], "left")
    good = lists_of(prompts, call.span, 32)
    shape, number = good.counts.shape, good.num_key_blocks
    entries = torch.arange(number, dtype=torch.int32).flip(0).repeat(2).expand(*shape, -1).contiguous()
    counts = torch.full(shape, 2 * number, dtype=torch.int32)
    bad = BlockIndices(entries, counts, number, 32, span=call.span)
    assert torch.equal(bad.to_mask(), good.to_mask())
    out = block_sparse_attention(*call[:3], bad, implementation=implementation)
    assert torch.equal(out, block_sparse_attention(*call[:3], good, implementation=implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_span_that_says_the_default_gives_the_default(implementation):
    q, k, v, mask = (x[None] for x in draw_prompts([(90, 90)], heads=2, kv_heads=1, head_dim=16)[0])
    q, mask = q[:, :, 40:], mask[:, :, 1:]
    expected = block_sparse_attention(q, k, v, BlockIndices.from_mask(mask, 32), implementation=implementation)
    plain = BlockIndices.from_mask(mask, 32, span=Span(1, 50, 90))
    assert torch.equal(block_sparse_attention(q, k, v, plain, implementation=implementation), expected)


@pytest.mark.parametrize("policy", [TopK(0.4), TopK(0.4, uniform=True), Threshold(0.1)], ids=repr)
def test_selection_and_attention_of_a_span_are_one_graph(policy):
    """What a span says is not looked at in a trace, so another table runs in the same graph."""

    def attend(q, k, v, logits, table):
        span = Span(2, 40, 100, table)
        return block_sparse_attention(q, k, v, policy.select(logits, block_size=32, span=span))

    torch.compiler.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(attend, fullgraph=True, backend=count)
    q, k, v, logits = (
        torch.randn(2, h, *shape) for h, shape in ((2, (40, 16)), (1, (100, 16)), (1, (100, 16)), (2, (3, 4)))
    )
    for start, length in (([60, 5], [40, 7]), ([0, 33], [11, 40])):
        table = Span.of_rows(40, 100, start=torch.tensor(start), length=torch.tensor(length)).table
        assert torch.equal(compiled(q, k, v, logits, table), attend(q, k, v, logits, table))
    assert len(graphs) == 1


def test_what_does_not_fit_a_span_is_said():
    prompts = draw_prompts([(10, 50)], heads=2, kv_heads=1)
    q, k, v = (x[None] for x in prompts[0][:3])
    q = q[:, :, :10]
    span = Span.of_rows(10, 50, start=torch.tensor([40]), length=torch.tensor([10]))
    blocks = lists_of(prompts, span, 32)
    with pytest.raises(ValueError, match="1 rows of 10 slots, but q is"):
        block_sparse_attention(q[:, :, :9], k, v, blocks)
    with pytest.raises(ValueError, match="begin at different blocks"):
        blocks.first_row  # noqa: B018
    with pytest.raises(ValueError, match="1 batch rows with 2 rows of lists over 2 key blocks of 32"):
        BlockIndices(blocks.indices[:, :, :1], blocks.counts[:, :, :1], 2, 32, span=span)
    with pytest.raises(ValueError, match="over 2 key blocks of 32 tokens"):
        BlockIndices.from_mask(torch.ones(1, 2, 2, 3, dtype=torch.bool), 32, span=span)
    pages = Pages(torch.zeros(1, 1, dtype=torch.int32), 16)
    small = Span.of_rows(10, 50, start=torch.tensor([40]), length=torch.tensor([10]), pages=pages)
    paged = BlockIndices.from_mask(torch.ones(1, 2, 2, 2, dtype=torch.bool), 32, span=small)
    k = torch.zeros(4, 1, 16, 32)
    with pytest.raises(ValueError, match="do not hold whole blocks of 32"):
        block_sparse_attention(q, k, k, paged)


def test_page_tables_are_checked():
    columns = {"start": torch.tensor([40]), "length": torch.tensor([10])}
    for table, words in (
        (torch.zeros(1, 2, dtype=torch.int64), "page table must be int32"),
        (torch.zeros(1, 1, dtype=torch.int32), "1 pages of 32 tokens a row do not hold 50 keys"),
    ):
        span = Span.of_rows(10, 50, **columns, pages=Pages(table, 32))
        with pytest.raises(ValueError, match=words):
            span.check("op", k=torch.zeros(4, 1, 32, 8))


def test_masks_and_densities_follow_the_span():
    """Rows of tokens and of blocks; the density counts what each row may see."""
    start, length = torch.tensor([30, 64, 5]), torch.tensor([10, 3, 0])
    span = Span.of_rows(10, 96, start=start, length=length)
    for by_token, rows in ((False, 2), (True, 10)):
        full = BlockIndices.from_mask(torch.ones(3, 1, rows, 3, dtype=torch.bool), 32, by_token=by_token, span=span)
        mask = full.to_mask()
        for b in range(3):
            for row in range(rows):
                if by_token:
                    own = (int(start[b]) + row) // 32 if row < length[b] else -1
                else:
                    own = int(start[b]) // 32 + row
                    held = length[b] > 0 and own * 32 < start[b] + length[b]
                    own = own if held else -1
                assert mask[b, 0, row].tolist() == [block <= own for block in range(3)]
                assert int(full.counts[b, 0, row]) == own + 1
        assert full.density() == 1.0
        half = BlockIndices.from_mask((torch.arange(3) == 0).expand(3, 1, rows, 3), 32, by_token=by_token, span=span)
        seen = full.to_mask().sum()
        assert half.density() == pytest.approx(float(half.to_mask().sum() / seen))
        assert half.checked() is half or by_token is None
        again = BlockIndices(half.indices.clone(), half.counts.clone(), 3, 32, by_token, span)
        assert again.checked().span is span
        assert torch.equal(again.checked().to_mask(), half.to_mask())


def test_decoding_takes_the_span_of_the_lists():
    decode = importlib.import_module("seerattention.ops").block_sparse_decode
    q, k, v = torch.randn(2, 2, 1, 16), torch.randn(2, 1, 64, 16), torch.randn(2, 1, 64, 16)
    span = Span.of_rows(1, 64, start=torch.tensor([20, 63]), length=torch.tensor([1, 1]))
    mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    bare = BlockIndices.from_mask(mask, 16, by_token=True)
    lists = BlockIndices.from_mask(mask, 16, by_token=True, span=span)
    assert lists.counts.flatten().tolist() == [2, 4]
    torch.testing.assert_close(decode(q, k, v, lists), decode(q, k, v, bare, span=span))
    with pytest.raises(ValueError, match="have a span of their own"):
        decode(q, k, v, lists, span=span.to("cpu").__class__(2, 1, 64, span.table))
