"""Sequences of odd lengths in padded batches and chunks, and the comparison with definitions written naively.

A definition here is a function of one head of one sequence, ``brute(q, k, start)``: float64 ``q [T, D]`` (multiplied
by the softmax scale) at positions ``start`` and on, and ``k [L, D]``. It returns a bool mask ``[R, N]``, whose rows are
the query blocks from ``start // block`` on. Of a selector whose query heads share a list with their KV head, it is a
function of all of them, ``q [G, T, D]``.
"""

from __future__ import annotations

import json

import torch

from seerattention.baselines import parse_selectors, selector_from_dict
from seerattention.baselines.prompt import Prompt
from seerattention.ops.span import Span
from seerattention.selectors import LayerInputs

SCALE = 0.37

# Lengths of the rows of a batch, and tokens of each that are in the cache already (None: whole prompts).
WHOLE = [[1], [31], [64], [65], [129], [300], [200, 37, 161], [64, 1, 300]]
CHUNKS = [(300, 128), (300, 77), (129, 128), (65, 64), (200, 199)]
HEADS = [(2, 2), (4, 2), (4, 1), (6, 2)]


def make_inputs(lengths, *, heads=4, kv_heads=2, dim=16, start=None, seed=0, sharp=1.0, alike=0.0, layer=0):
    """Inputs of right-padded rows; what is padding is NaN. ``start``: queries begin there (one length only).

    ``sharp`` is the size of what is each query's own, ``alike`` that of what 32 neighbours have in common.
    """
    generator = torch.Generator().manual_seed(seed)
    total = max(lengths)
    q = torch.randn(len(lengths), heads, total, dim, generator=generator) * sharp
    k = torch.randn(len(lengths), kv_heads, total, dim, generator=generator)
    k = k + torch.randn(1, kv_heads, 1, dim, generator=generator)  # as real keys have, a mean that is not 0
    if alike:
        common = torch.randn(len(lengths), heads, -(-total // 32), dim, generator=generator) * alike
        q += common.repeat_interleave(32, 2)[:, :, :total]
    for b, length in enumerate(lengths):
        q[b, :, length:], k[b, :, length:] = float("nan"), float("nan")
    span = None
    if start is not None:
        q, span = q[:, :, start:], Span(len(lengths), total - start, total)
    table = torch.ones(1, total, dim)
    return LayerInputs(
        layer=layer,
        q=q,
        k=k,
        v=k,
        q_pre=q,
        k_pre=k,
        cos=table,
        sin=0 * table,
        lengths=torch.tensor(lengths) if len(lengths) > 1 else None,
        scale=SCALE,
        gate=None,
        span=span,
    )


def causal(rows, columns, first):
    """Bool ``[rows, columns]``: key blocks up to the row's own."""
    return torch.arange(columns) <= torch.arange(first, first + rows)[:, None]


def expected_of(inputs, block, brute, shared=False):
    """``brute`` of every row and head: a list of (batch row, head, what it said); KV heads where lists are shared."""
    heads, kv_heads = inputs.q.shape[1], inputs.k.shape[1]
    group = heads // kv_heads
    found = []
    for b in range(inputs.q.shape[0]):
        length = inputs.k.shape[2] if inputs.lengths is None else int(inputs.lengths[b])
        start = inputs.k.shape[2] - inputs.q.shape[2]
        queries = inputs.q[b, :, : length - start].double() * SCALE
        keys = inputs.k[b, :, :length].double()
        if shared:
            found += [(b, h, brute(queries[h * group : (h + 1) * group], keys[h], start)) for h in range(kv_heads)]
        else:
            found += [(b, h, brute(queries[h], keys[h // group], start)) for h in range(heads)]
    return found


def assert_lists(selector, inputs, brute):
    """The blocks that a selector keeps are those of the definition with the diagonal; rows of padding keep none."""
    block = selector.block_size
    lists = selector.select(inputs)
    lists.checked()
    mask = lists.to_mask()
    shared = getattr(selector, "lists_per_kv_head", False)
    assert mask.shape[1] == (inputs.k if shared else inputs.q).shape[1]
    for b, h, wanted in expected_of(inputs, block, brute, shared):
        rows, columns = wanted.shape
        own = torch.arange(columns) == torch.arange(columns - rows, columns)[:, None]
        wanted = (wanted | own) & causal(rows, columns, columns - rows)
        assert torch.equal(mask[b, h, :rows, :columns], wanted), f"row {b}, head {h}"
        assert not mask[b, h, rows:].any()


def assert_every_case(selector, brute, *, chunks=True, **options):
    """:func:`assert_lists` over lengths, padded batches, groups of heads, and chunks."""
    for seed, lengths in enumerate(WHOLE):
        for heads, kv_heads in HEADS:
            inputs = make_inputs(lengths, heads=heads, kv_heads=kv_heads, seed=seed, **options)
            assert_lists(selector, inputs, brute)
    for seed, (length, start) in enumerate(CHUNKS if chunks else ()):
        assert_lists(selector, make_inputs([length], start=start, seed=seed, **options), brute)


def assert_padded_chunks(selector):
    """Rows of a batch that begin at different positions choose what each chooses alone."""
    lengths, starts, queries = torch.tensor([300, 171, 64]), torch.tensor([172, 43, 0]), 128
    whole = make_inputs(lengths.tolist())
    count = lengths - starts
    q = torch.full((3, 4, queries, 16), float("nan"))
    for b in range(3):
        q[b, :, : count[b]] = whole.q[b, :, starts[b] : lengths[b]]
    span = Span.of_rows(queries, 300, start=starts, length=count)
    options = dict(vars(whole), q=q, q_pre=q, span=span)
    mask = selector.select(LayerInputs(**options)).to_mask()
    for b in range(3):
        length, start = int(lengths[b]), int(starts[b])
        row, keys = whole.q[b : b + 1, :, start:length], whole.k[b : b + 1, :, :length]
        alone = dict(vars(whole), q=row, k=keys, v=keys, q_pre=row, k_pre=keys, lengths=None)
        alone["span"] = Span(1, length - start, length)
        wanted = selector.select(LayerInputs(**alone)).to_mask()[0]
        rows, columns = wanted.shape[1:]
        assert torch.equal(mask[b, :, :rows, :columns], wanted)
        assert not mask[b, :, rows:].any()


def assert_definition(selector, brute, **options):
    """A rule of its own: :func:`assert_every_case`, chunks in padded batches, and what ``rowwise`` says."""
    assert_every_case(selector, brute, **options)
    assert_padded_chunks(selector)
    assert_rowwise(selector)


def assert_few_at_a_time(monkeypatch, selector):
    """However little is looked at at once, the choice is the same."""
    inputs = make_inputs([300, 170])
    expected = selector.select(inputs).to_mask()
    monkeypatch.setattr("seerattention.baselines.prompt.MOST_SCORES", 1)
    assert torch.equal(selector.select(inputs).to_mask(), expected)


def assert_goes_round(text, selector):
    """A description of the command line gives the selector, and so does its dict after JSON."""
    assert parse_selectors(text)[text] == selector
    assert selector_from_dict(json.loads(json.dumps(selector.to_dict()))) == selector


def assert_rowwise(selector, **options):
    """``rowwise`` is true exactly where the end of the prompt makes no difference to the rows before it."""
    block, blocks = selector.block_size, 12
    whole = make_inputs([blocks * block], **options)
    mask = selector.select(whole).to_mask()
    same = []
    for rows in range(1, blocks):
        cut = {name: getattr(whole, name)[:, :, : rows * block] for name in ("q", "k", "v", "q_pre", "k_pre")}
        short = LayerInputs(**dict(vars(whole), **cut))
        same.append(torch.equal(selector.select(short).to_mask(), mask[:, :, :rows, :rows]))
    assert selector.rowwise == all(same)


def assert_scores(selector, brute, tolerance=1e-4, **options):
    """The scores that a policy gets are those of the definition, wherever a block is visible."""
    for seed, (length, start) in enumerate([(300, 0), (65, 0), (1, 0), *CHUNKS]):
        inputs = make_inputs([length], start=start, seed=seed, **options)
        shared = getattr(selector, "lists_per_kv_head", False)
        for _, h, wanted in expected_of(inputs, selector.block_size, brute, shared):
            k = inputs.k[0]
            prompt = Prompt(inputs.layer, inputs.q[0], k, SCALE, selector.block_size)
            found = selector.score(prompt)[h].double()
            visible = causal(*wanted.shape, wanted.shape[1] - wanted.shape[0])
            torch.testing.assert_close(found[visible], wanted[visible], rtol=tolerance, atol=tolerance)


def brute_policy(scores, policy):
    """The mask that a policy makes of scores of a definition (the policies have tests of their own)."""

    def mask(q, k, start):
        logits = scores(q, k, start)
        logits = logits.masked_fill(~causal(*logits.shape, logits.shape[1] - logits.shape[0]), float("-inf"))
        return policy.select(logits.float()[None, None], block_size=64).to_mask()[0, 0]

    return mask
