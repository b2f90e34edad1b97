"""The ops as torch.compile and other tracers see them: one opaque op each, without graph breaks."""

from __future__ import annotations

import pytest
import torch

import seerattention as seer
from helpers import make_blocks, make_qkv
from seerattention.ops import (
    block_pooling,
    block_sparse_attention,
    dense_indices,
    pooled_attention,
    select_threshold,
    select_topk,
    select_topp,
)
from seerattention.ops.block_pooling.reference import Grid
from seerattention.ops.block_selection.reference import Rule
from seerattention.ops.span import Span

OPS = torch.ops.seerattention
LENGTHS = (130, 200, 333)  # the second makes lengths dynamic; the third must not compile again


def compiled(function):
    """One graph for all lengths (dynamo makes sizes dynamic when they change), no break in it."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager", dynamic=True)


def scores_of(rows, keys, *, batch=2, heads=3, seed=0):
    scores = torch.randn(batch, heads, rows, keys, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(rows, keys).triu(1 + keys - rows).bool(), float("-inf"))


def assert_same_lists(a, b):
    assert (a.num_key_blocks, a.block_size, a.indices.shape) == (b.num_key_blocks, b.block_size, b.indices.shape)
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.to_mask(), b.to_mask())


# -- registrations: each check runs the op many times, so there are few heads ------------------------------------------


@pytest.mark.parametrize("implementation", [None, "reference", "triton"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([70, 130])])
@pytest.mark.parametrize("kinds", ["avg", "max,min,avg"])
def test_block_pooling_is_a_proper_op(kinds, lengths, implementation):
    q = make_qkv(130, 130, batch=2, head_dim=16)[0]
    grid = Grid(3, 0, 0, Span.of_padded(2, 130, 130, lengths).table)
    torch.library.opcheck(OPS.block_pooling, (q, kinds, 64, *grid, implementation))


@pytest.mark.parametrize("implementation", [None, "reference", "triton"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([70, 130])])
@pytest.mark.parametrize(("reduce", "normalize"), [("max", True), ("sum", False), ("row_sum", True)])
def test_pooled_attention_is_a_proper_op(reduce, normalize, lengths, implementation):
    q, k, _ = make_qkv(130, 130, batch=2, heads=2, kv_heads=1, head_dim=16)
    rows, span = torch.tensor([2, 0]), Span.of_padded(2, 130, 130, lengths)
    for lse in (None, torch.zeros(q.shape[:3])):
        arguments = (q, k, rows, 64, 0.25, reduce, normalize, lse, *span.arguments(), 0, implementation)
        torch.library.opcheck(OPS.pooled_attention, arguments)


@pytest.mark.parametrize("implementation", [None, "reference", "triton"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([70, 300])])
def test_selections_are_proper_ops(lengths, implementation):
    scores = scores_of(4, 5, heads=1)
    probabilities = scores.softmax(-1)
    # Triton leaves what follows the counts as it was in memory: two runs differ there, and one check compares them.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if implementation != "triton":
        checks += ("test_aot_dispatch_dynamic",)
    keep = torch.tensor([[1, 2, 2, 3]])
    table = None if lengths is None else Span.of_padded(2, 240, 320, lengths).table
    common = (5, 64, table, 1)
    for values, rule in (
        (probabilities, Rule("threshold", *common, 0.1)),
        (probabilities, Rule("threshold", *common, 1.0, relative=True, min_blocks=2, first_blocks=1)),
        (probabilities, Rule("topp", 5, 64, table, 0, 0.7)),
        (scores, Rule("topk", 3, 64, table, 0, keep=keep)),
        (scores, Rule("topk", 5, 64, table, 0, keep=keep)),
    ):
        torch.library.opcheck(OPS.block_selection, (values, *rule, implementation), test_utils=checks)


@pytest.mark.parametrize("implementation", [None, "reference", "cpu_gathered", "triton"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("lengths", [(130, 130), (70, 200), (0, 64)])
def test_block_sparse_attention_is_a_proper_op(lengths, return_lse, implementation):
    q, k, v = make_qkv(*lengths, heads=2, kv_heads=1, head_dim=16)
    blocks = make_blocks("random", q, k)
    plain, ragged = Span(1, *lengths), Span.of_padded(1, *lengths, torch.tensor([lengths[1] - 5]))
    mask = torch.ones(1, q.shape[1], ragged.num_rows(64), ragged.num_key_blocks(64), dtype=torch.bool)
    for lists, span in ((blocks, plain), (seer.BlockIndices.from_mask(mask, 64, span=ragged), ragged)):
        given = (lists.indices, lists.counts, lists.num_key_blocks, lists.block_size, False, True)
        torch.library.opcheck(
            OPS.block_sparse_attention, (q, k, v, *given, *span.arguments(), 0.25, return_lse, implementation)
        )


# -- the public functions in one graph ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_lengths", [False, True])
def test_block_pooling_compiles(with_lengths):
    function = compiled(lambda x, lengths: block_pooling(x, ("max", "avg"), lengths=lengths))
    for length in LENGTHS:
        x = make_qkv(length, length, batch=2)[0]
        lengths = torch.tensor([length - 90, length]) if with_lengths else None
        assert torch.equal(function(x, lengths), block_pooling(x, ("max", "avg"), lengths=lengths))


@pytest.mark.parametrize("given_rows", [False, True])
def test_pooled_attention_compiles(given_rows):
    function = compiled(lambda q, k, rows: pooled_attention(q, k, rows=rows))
    for length in LENGTHS:
        q, k, _ = make_qkv(length - 60, length)
        rows = torch.tensor([2, 1]) if given_rows else None
        assert torch.equal(function(q, k, rows), pooled_attention(q, k, rows=rows))
    if given_rows:  # the check of values is part of the op
        # torch: an error inside a traced no_grad leaves gradients off; the outer no_grad turns them on again.
        with torch.no_grad(), pytest.raises(ValueError, match="rows must lie in"):
            function(q, k, torch.tensor([2, 9]))


def test_selections_compile():
    keep = torch.tensor([1, 2, 2, 3, 3, 1, 4])
    for function in (
        lambda scores: select_threshold(scores.softmax(-1), 0.1, last_blocks_dense=1),
        lambda scores: select_topp(scores.softmax(-1), 0.6),
        lambda scores: select_topk(scores, keep[: scores.shape[2]], capacity=4, diagonal_extra=True),
        lambda scores: dense_indices(*scores.shape, block_size=64),
    ):
        traced = compiled(function)
        for keys in (3, 5, 7):
            scores = scores_of(keys, keys)
            assert_same_lists(traced(scores), function(scores))


def test_topk_without_values_takes_the_widest_lists():
    """In a trace the values of ``keep`` are not known: the lists are the same, their capacity is not bounded."""
    scores, keep = scores_of(4, 4), torch.tensor([1, 2, 2, 2])
    traced, eager = compiled(select_topk)(scores, keep), select_topk(scores, keep)
    assert (traced.indices.shape[-1], eager.indices.shape[-1]) == (4, 2)
    assert torch.equal(traced.to_mask(), eager.to_mask())


@pytest.mark.parametrize(
    "policy",
    [
        seer.Threshold(0.1),
        seer.TopK(0.4),
        seer.TopK(0.4, uniform=True),
        seer.TopP(0.6),
        seer.TokenBudget(128),
        seer.Dense(),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_lengths", [False, True])
def test_policies_compile(policy, with_lengths):
    function = compiled(lambda scores, lengths: policy.select(scores, block_size=64, lengths=lengths))
    for keys in (3, 5, 7):
        scores, lengths = scores_of(keys, keys), torch.tensor([64 * keys - 70, 64 * keys]) if with_lengths else None
        assert_same_lists(function(scores, lengths), policy.select(scores, block_size=64, lengths=lengths))


@pytest.mark.parametrize("return_lse", [False, True])
def test_block_sparse_attention_compiles(return_lse):
    def call(q, k, v, blocks):
        return block_sparse_attention(q, k, v, blocks, return_lse=return_lse)

    function = compiled(call)
    for length in LENGTHS:
        q, k, v = make_qkv(length - 60, length, batch=2)
        blocks = make_blocks("random", q, k)
        torch.testing.assert_close(function(q, k, v, blocks), call(q, k, v, blocks), rtol=0, atol=0)


def test_a_whole_sparse_layer_is_one_graph_that_compiles_twice_at_most():
    """Pooling, scores, selection and attention: the second length makes sizes dynamic, after which nothing compiles."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def layer(q, k, v):
        queries, keys = block_pooling(q, ("avg",)), block_pooling(k, ("max",)).repeat_interleave(2, 1)
        blocks = seer.TopK(0.4).select(queries @ keys.mT, block_size=64)
        return block_sparse_attention(q, k, v, blocks)

    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True, backend=backend)
    for length in (*LENGTHS, 400, 513):
        q, k, v = make_qkv(length, length)
        assert torch.equal(function(q, k, v), layer(q, k, v))
    assert len(graphs) <= 2
    called = [str(node.target) for node in graphs[-1].graph.nodes if "seerattention" in str(node.target)]
    assert [name.split(".")[1] for name in called] == [
        "block_pooling",
        "block_pooling",
        "block_selection",
        "block_sparse_attention",
    ]


def test_eager_calls_do_not_go_through_the_dispatcher():
    """Which would take about 30 us a call."""
    with torch.profiler.profile() as profile:
        block_pooling(torch.randn(1, 1, 64, 16), ("avg",))
    assert not any("seerattention" in event.key for event in profile.key_averages())


def test_triton_in_a_graph():
    """The kernels, interpreted: inside a compiled region they are opaque, too."""
    q, k, v = make_qkv(130, 130, head_dim=16)

    def call(q, k, v):
        scores = block_pooling(q, ("avg",), implementation="triton")
        scores = scores @ block_pooling(k, ("avg",), implementation="triton").repeat_interleave(2, 1).mT
        blocks = select_topp(scores.softmax(-1), 0.5, implementation="triton")
        target = pooled_attention(q, k, implementation="triton")
        return block_sparse_attention(q, k, v, blocks, implementation="triton"), target

    for a, b in zip(compiled(call)(q, k, v), call(q, k, v), strict=True):
        assert torch.equal(a, b)
