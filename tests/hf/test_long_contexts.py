"""Rotary tables for long contexts, and positions far out: gates follow the model's own table, and nothing overflows."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import seerattention as seer
from decode_models import BOTH, SPARSE, attach, feed, generate, nothing_kept
from seerattention.gates import select_by_token
from seerattention.hf import gates_of
from seerattention.ops.span import Span
from seerattention.selectors import GateSelector
from tiny_models import Watched, logits_of

_ROOM = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
TABLES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ROOM},
    "yarn": {"rope_type": "yarn", **_ROOM},
}
# Depends on how long the sequence is, so that keys in a cache were turned by another table than that of later tokens.
CHANGING = {"dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}


def scaled(model_of, kind, **options):
    return model_of("llama", rope_parameters={**TABLES, **CHANGING}[kind], max_position_embeddings=64, **options)


def gated(model, policy=None, **options):
    return attach(model, SPARSE, BOTH, prefill=policy or seer.TopK(0.4), **options)


@pytest.mark.parametrize("kind", [*TABLES, *CHANGING])
def test_lists_are_those_of_the_models_own_table(model_of, ids_of, kind):
    """Beyond the positions that the model was made for; the table of default RoPE chooses otherwise."""
    model, ids, seen = scaled(model_of, kind), ids_of(250), []
    gated(model, selector=Watched(GateSelector(seer.TopK(0.4)), seen))
    logits_of(model, ids)
    plain = model_of("llama").model.rotary_emb(torch.zeros(1), torch.arange(250)[None])
    differ = 0
    for inputs, blocks in seen:
        table = model.model.rotary_emb(inputs.q, torch.arange(250)[None])
        assert torch.equal(inputs.cos, table[0])
        assert torch.equal(inputs.sin, table[1])
        chosen, otherwise = (
            seer.TopK(0.4).select(inputs.gate(inputs.q_pre, inputs.k_pre, *each), block_size=32).to_mask()
            for each in (table, plain)
        )
        assert torch.equal(blocks.to_mask(), chosen)
        differ += int((chosen != otherwise).sum())
    assert differ > 0


@pytest.mark.parametrize("kind", TABLES)
def test_chunks_and_tokens_on_a_cache_follow_the_table(model_of, ids_of, kind):
    model, ids = gated(scaled(model_of, kind)), ids_of(192)
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        expected = generate(model, ids, 12)
        found = generate(model, ids, 12, prefill_chunk_size=64)
        uncached = generate(model, ids, 12, use_cache=False)
    assert stats.dense_calls == 0
    for each in (found, uncached):
        assert torch.equal(each[0], expected[0])
        torch.testing.assert_close(each[1], expected[1], rtol=1e-4, atol=1e-4)
    with nothing_kept():
        torch.testing.assert_close(generate(model, ids, 12)[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CHANGING)
def test_on_a_cache_tables_that_change_are_dense_and_say_so(model_of, ids_of, kind):
    model, ids = gated(scaled(model_of, kind)), ids_of(192)
    with seer.record(model) as stats, pytest.warns(UserWarning, match="rotary table changes with the length"):
        generate(model, ids, 6)
    assert (stats.sparse_calls, stats.dense_calls) == (2, 10)  # one shot is sparse
    fresh = [scaled(model_of, kind), gated(scaled(model_of, kind))]  # the table remembers the longest sequence
    with seer.dense(fresh[1]):
        assert torch.equal(*(generate(each, ids, 6)[1] for each in fresh))


# ---- far out ----------------------------------------------------------------------------------------------------


LAST = 36  # tokens of a chunk that begins inside of a block and ends with one


def far_out(model_of, length):
    """A model of one layer, a cache of all but the ``LAST`` of ``length`` tokens, and its keys before RoPE."""
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    table = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": length // 16}
    model = model_of("llama", rope_parameters=table, max_position_embeddings=length, **shape)
    generator, past = torch.Generator().manual_seed(0), length - LAST
    keys, values = (torch.randn(1, 1, past, 16, generator=generator) for _ in range(2))
    cos, sin = model.model.rotary_emb(keys, torch.arange(past)[None])
    cache = DynamicCache()
    cache.update(apply_rotary_pos_emb(keys, keys, cos, sin)[1], values, 0)
    return model, cache, keys


def turned_back(x, cos, sin):
    """Before RoPE, by a table whose squares add up to its scale."""
    return (x * cos - torch.cat((-x[..., 8:], x[..., :8]), -1) * sin) / (cos[0, 0, 0] ** 2 + sin[0, 0, 0] ** 2)


def attended(q, k, v, mask, scale):
    k, v = (x.repeat_interleave(q.shape[1], 1) for x in (k, v))
    return (q @ k.mT * scale).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@torch.inference_mode()
@pytest.mark.parametrize("length", [1 << 17, 1 << 19])
def test_positions_of_long_caches(model_of, ids_of, length):
    """A chunk and two tokens at the end, against gate, policy and masked softmax written out on the keys as they were
    before RoPE."""
    model, cache, raw = far_out(model_of, length)
    seen, outputs, tokens, past = [], [], [], length - LAST
    gated(model, selector=Watched(GateSelector(seer.TopK(0.05)), seen))
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with pytest.MonkeyPatch.context() as patch:
        attend = seer.hf.attention.attend_tokens

        def watched(arguments, *others):
            if (decoded := attend(arguments, *others)) is not None:
                tokens.append((arguments, decoded.blocks))
            return decoded

        patch.setattr(seer.hf.attention, "attend_tokens", watched)
        with seer.record(model) as stats:
            for ids in (ids_of(LAST), ids_of(1), ids_of(1, seed=1)):
                feed(model, ids, cache)
    assert (stats.sparse_calls, stats.dense_calls) == (3, 0)

    ((inputs, blocks),) = seen
    positions = torch.arange(length)
    cos, sin = model.model.rotary_emb(raw, positions[None])
    assert torch.equal(inputs.cos, cos)
    torch.testing.assert_close(inputs.k_pre[:, :, :past], raw, rtol=1e-4, atol=1e-4)
    span = Span(1, LAST, length)
    keys = torch.cat((raw, inputs.k_pre[:, :, past:]), 2)
    gate = gates_of(model)[0]
    encoded = (
        gate.encode_keys(keys, cos, sin),
        gate.encode_queries(inputs.q_pre, cos[:, past:], sin[:, past:], span=span),
    )
    expected = seer.TopK(0.05).select(gate.score(*encoded[::-1], span=span), block_size=32, span=span).to_mask()
    mask = blocks.to_mask()
    assert (mask != expected).sum() <= 2e-4 * mask.sum()  # near ties: keys of the cache are turned back
    assert mask[0, :, -1, -1].all()  # the diagonal of the last rows: blocks of 32 up to the last of all
    assert mask.shape[-1] == length // 32
    rows = torch.arange(past, length) // 32 - past // 32
    seen_by = mask[:, :, rows].repeat_interleave(32, -1) & (positions <= positions[past:, None])
    wanted = attended(inputs.q, inputs.k, inputs.v, seen_by, inputs.scale)
    torch.testing.assert_close(outputs[0], wanted.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)

    for step, (arguments, blocks) in enumerate(tokens):
        position = length + step
        assert arguments.key.shape[2] == position + 1
        mask = blocks.to_mask()
        assert mask[..., position // 16].all()
        assert mask.sum(-1).max() == 2  # a budget of 32 tokens
        cos, sin = model.model.rotary_emb(raw, torch.arange(position + 1)[None])
        gate = gates_of(model, "decode")[0]
        q = turned_back(arguments.query, cos[:, -1:], sin[:, -1:])
        back = turned_back(arguments.key, cos, sin)
        span = Span(1, 1, position + 1)
        scores = gate.score(
            gate.encode_queries(q, cos[:, -1:], sin[:, -1:]), gate.encode_keys(back, cos, sin), span=span
        )
        chosen = select_by_token(SPARSE, scores, block_size=16, span=span).to_mask()
        assert torch.equal(mask, chosen)
        seen_by = mask.repeat_interleave(16, -1)[..., : position + 1]
        wanted = attended(arguments.query, arguments.key, arguments.value, seen_by, arguments.scale)
        torch.testing.assert_close(outputs[1 + step], wanted.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)
