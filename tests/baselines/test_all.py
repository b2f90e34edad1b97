"""What is true of every training-free selector: names, precision, models, padding and chunks in models."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from transformers import DynamicCache

import baseline_cases as cases
import seerattention as seer
from seerattention import baselines
from seerattention.baselines import Selector, parse_selectors, selector_from_dict
from seerattention.baselines.oracle_cover import block_masses
from seerattention.baselines.prompt import Prompt
from seerattention.ops.indices import BlockIndices
from seerattention.ops.span import Pages, Span, cumulative
from seerattention.selectors import SELECTORS
from tiny_models import logits_of, make_ids, make_model

BLOCK = 32
TEXTS = [
    "streaming:sink=32:window=64:block_size=32",
    "random:density=0.5:block_size=32",
    "mean_pool:policy=top_k(0.5):block_size=32",
    "mean_pool:policy=top_k(0.5):pool_queries=false:block_size=32",
    "xattention:stride=8:tau=0.6:block_size=32",
    "xattention:stride=16:policy=top_k(0.5):block_size=32",
    "flexprefill:gamma=0.6:min_budget=32:block_size=32",
    "flexprefill:gamma=0.6:tau=10:min_budget=32:block_size=32",
    "minference:multiplier=0:last_queries=16:block_size=32",
    "minference_exact:multiplier=0:last_queries=16:block_size=32",
    "flashprefill:alpha=0.5:sink_blocks=1:window_blocks=1:block_size=32",
    "flashprefill:policy=top_k(0.5):block_size=32",
    "flashprefill_v2:alpha=0.6:sink_blocks=1:window_blocks=1:block_size=32",
    "flashprefill_v2:policy=top_k(0.5):mean_correction=true:block_size=32",
    "sparge:tau=0.5:theta=-1:block_size=32",
    "cosa:tau=0.6:block_size=32",
    "cosa:policy=top_k(0.5):block_size=32",
    "rbs:alpha=0.8:sink_blocks=1:window_blocks=1:block_size=32",
    "rbs:policy=top_k(0.5):block_size=32",
    "prism:p=0.3:block_size=32",
    "prism:policy=top_k(0.5):block_size=32",
    "sub_block:policy=top_k(0.5):block_size=32",
    "sub_block:policy=top_k(0.5):reduce=max:block_size=32",
    "oracle:policy=top_k(0.5):block_size=32",
    "oracle:policy=top_k(0.5):reduce=mass:block_size=32",
    "oracle_cover:p=0.3:block_size=32",
]
EVERYTHING = [
    "streaming:window=4096:block_size=32",
    "random:density=1:block_size=32",
    "mean_pool:policy=dense:block_size=32",
    "xattention:tau=1:block_size=32",
    "flexprefill:block_size=32",
    "minference:block_size=32",
    "minference_exact:block_size=32",
    "flashprefill:alpha=0:block_size=32",
    "flashprefill_v2:alpha=0:mean_correction=true:block_size=32",
    "sparge:theta=1:block_size=32",
    "cosa:tau=1:block_size=32",
    "rbs:alpha=0:block_size=32",
    "prism:p=1:block_size=32",
    "sub_block:policy=dense:block_size=32",
    "oracle:reduce=mass:policy=dense:block_size=32",
    "oracle_cover:p=1:block_size=32",
]


def selector_of(text: str) -> Selector:
    return parse_selectors(text)[text]


def attach(model, selector):
    return seer.attach(model, selector=selector, min_context=0)


def test_all_are_known():
    """By name and as exports; each of them is in the lists above."""
    exported = {name for name in baselines.__all__ if isinstance(getattr(baselines, name), type)} - {"Selector"}
    known = {cls.__name__ for cls in SELECTORS.values() if cls.__module__.startswith("seerattention.baselines")}
    assert exported == known
    for texts in (TEXTS, EVERYTHING):
        assert {type(selector_of(text)).__name__ for text in texts} == known


@pytest.mark.parametrize("text", TEXTS)
def test_dicts(text):
    selector = selector_of(text)
    assert next(iter(parse_selectors(f"{text},gate:policy=dense").values())) == selector
    assert selector_from_dict(json.loads(json.dumps(selector.to_dict()))) == selector
    assert set(selector.to_dict()) == {"kind"} | {field.name for field in dataclasses.fields(selector)}
    assert selector_from_dict({"kind": selector.kind}) == type(selector)()  # every argument has a default


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(text, dtype):
    inputs = cases.make_inputs([300, 161], sharp=0.5, alike=1.0)
    low = {name: getattr(inputs, name).to(dtype) for name in ("q", "k", "v", "q_pre", "k_pre")}
    same = {name: x.float() for name, x in low.items()}
    selector = selector_of(text)
    lists = selector.select(dataclasses.replace(inputs, **low))
    assert isinstance(lists, BlockIndices)
    assert lists.block_size == BLOCK
    expected = selector.select(dataclasses.replace(inputs, **same))
    assert torch.equal(lists.to_mask(), expected.to_mask())
    assert 0.1 < expected.density() < 1


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("oracle:")])
def test_packed_rows_and_pages_choose_what_each_chooses_alone(text):
    selector, lengths = selector_of(text), [150, 33, 96]
    alone = [cases.make_inputs([length], seed=seed) for seed, length in enumerate(lengths)]
    q, k = (torch.cat([getattr(inputs, name) for inputs in alone], 2) for name in ("q", "k"))
    packed = dataclasses.replace(alone[0], q=q, k=k, span=Span.of_packed(cumulative(lengths)))
    # Pages of 64 tokens in a mixed order, queries in rows of their own.
    table = torch.tensor([[5, 0, 3], [1, 1, 1], [4, 2, 2]], dtype=torch.int32)
    pages, rows = torch.full((6, 2, 64, 16), float("nan")), torch.full((3, 4, 150, 16), float("nan"))
    for b, (inputs, length) in enumerate(zip(alone, lengths, strict=True)):
        rows[b, :, :length] = inputs.q[0]
        for page, tokens in zip(table[b].tolist(), inputs.k[0].split(64, 1), strict=False):
            pages[page, :, : tokens.shape[1]] = tokens
    of_rows = Span.of_rows(
        150, 150, start=torch.zeros(3, dtype=torch.int64), length=torch.tensor(lengths), pages=Pages(table, 64)
    )
    paged = dataclasses.replace(alone[0], q=rows, k=pages, span=of_rows)
    for inputs in (packed, paged):
        mask = selector.select(inputs).to_mask()
        for b, single in enumerate(alone):
            wanted = selector.select(single).to_mask()[0]
            size = wanted.shape[1]
            assert torch.equal(mask[b, :, :size, :size], wanted)
            assert not mask[b, :, size:].any()


@pytest.mark.parametrize("start", [0, 77])
@pytest.mark.parametrize("text", TEXTS)
def test_scores_are_made_where_the_tensors_are(text, start):
    """On the device "meta", which refuses tensors of another one."""
    selector = selector_of(text)
    q, k = torch.empty(4, 300 - start, 16, device="meta"), torch.empty(2, 300, 16, device="meta")
    prompt = Prompt(0, q, k, 0.3, BLOCK)
    if isinstance(selector, baselines.FlexPrefill):  # which looks at values for the rest
        found = selector._places(prompt, selector.probe(prompt), 1)
    elif isinstance(selector, baselines.OracleCover):
        assert block_masses(prompt, range(7, 10)).is_meta
        return
    elif isinstance(selector, baselines.Oracle):
        return  # an op with tests of its own
    else:
        has_rule = type(selector).keep is not baselines.base.TrainingFree.keep
        found = selector.keep(prompt) if has_rule else selector.score(prompt)
    assert found.is_meta
    assert found.shape[1:] == (10 - start // BLOCK, 10)


@pytest.mark.parametrize("text", EVERYTHING)
def test_everything_is_dense(text):
    model, ids = make_model(), make_ids(200)
    expected = logits_of(model, ids)
    attach(model, selector_of(text))
    with seer.record(model) as stats:
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert stats.density == 1.0
    assert stats.sparse_calls or "dense" in text


@pytest.mark.parametrize("text", TEXTS)
def test_padded_rows_in_models(text):
    """On the left, too: a row of a batch has the logits that it has alone."""
    model, ids = attach(make_model(), selector_of(text)), make_ids(200, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :63], mask[2, 170:] = 0, 0
    with seer.record(model) as stats:
        logits = logits_of(model, ids, attention_mask=mask)
    assert stats.dense_calls == 0
    assert 0 < stats.total_density < 1
    torch.testing.assert_close(logits[:1], logits_of(model, ids[:1]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[1:2, 63:], logits_of(model, ids[1:2, 63:]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[2:, :170], logits_of(model, ids[2:, :170]), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def in_chunks(model, ids, cuts):
    cache, start, parts = DynamicCache(config=model.config), 0, []
    for end in (*cuts, ids.shape[1]):
        parts.append(model(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
        start = end
    return torch.cat(parts, 1)


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_in_models(text):
    """Chunks that end with blocks equal the whole prompt, if each query block is on its own."""
    selector = selector_of(text)
    model, ids = attach(make_model(), selector), make_ids(200)
    whole = logits_of(model, ids)
    if not selector.takes_chunks:
        with pytest.warns(UserWarning, match="chooses for whole prompts"):
            in_chunks(model, ids, [64, 128])
        return
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = in_chunks(model, ids, [64, 128])
        in_chunks(model, ids, [70, 135])
    assert stats.dense_calls == 0
    assert 0 < stats.total_density < 1
    if selector.rowwise:
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
