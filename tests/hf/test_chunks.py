"""Chunks of a prompt on a cache, and later turns: attended sparsely against all that came before."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from plan_cases import in_chunks
from seerattention.gates import PrefillGate
from seerattention.hf import FAMILIES
from seerattention.hf.state import state_of
from seerattention.ops import inverse_rope
from seerattention.ops.span import Span
from seerattention.selectors import GateSelector
from tiny_models import Watched

BLOCK = 32
LENGTH = 192
# Of the family "mistral" in tiny_models the window is shorter than these prompts.
SPARSE = ("llama", "phi3", "qwen2", "qwen3")


def attach(model, policy, **options):
    torch.manual_seed(0)
    return seer.attach(model, seer.GateConfig(block_size=BLOCK), prefill=policy, min_context=0, **options)


@torch.inference_mode()
def one_shot(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("cuts", [[64], [32, 96, 128], [128, 160]])
@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_that_end_with_blocks_equal_one_shot(model_of, ids_of, name, cuts, batch):
    model, ids = attach(model_of(name), seer.TopK(0.5)), ids_of(LENGTH, batch=batch)
    with seer.record(model) as whole:
        expected = one_shot(model, ids)
    with seer.record(model) as chunked, warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = in_chunks(model, ids, cuts)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert chunked.total_density == pytest.approx(whole.total_density)
    assert chunked.total_density < 0.75
    assert chunked.dense_calls == 0
    with seer.dense(model):
        assert not torch.allclose(one_shot(model, ids), expected, atol=1e-3)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("size", [1, 31, 33, 63, 65, 100])
def test_with_every_block_any_chunking_equals_dense(model_of, ids_of, name, size):
    model, ids = model_of(name), ids_of(LENGTH)
    expected = one_shot(model, ids)
    attach(model, seer.Threshold(0.0))
    logits = in_chunks(model, ids, range(size, LENGTH, size))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("cut", [70, 97, 128])
def test_a_chunk_that_splits_a_block_scores_the_tokens_that_it_holds(model_of, ids_of, cut):
    """The documented definition, from the tensors of one shot: pooled over the chunk's own tokens of the block, against
    the encoded keys of all tokens so far."""
    policy, seen = seer.TopK(0.4), []
    model, ids = model_of("llama"), ids_of(LENGTH)
    attach(model, None, selector=Watched(GateSelector(policy), seen))
    one_shot(model, ids)
    (whole, _), seen[:] = seen[0], []
    in_chunks(model, ids, [cut])
    gate: PrefillGate = whole.gate
    for (inputs, blocks), (start, end) in zip((seen[0], seen[len(seen) // 2]), ((0, cut), (cut, LENGTH)), strict=True):
        assert (inputs.layer, inputs.q.shape[2], inputs.k.shape[2]) == (0, end - start, end)
        torch.testing.assert_close(inputs.k_pre, whole.k_pre[:, :, :end], rtol=1e-5, atol=1e-5)
        table = whole.cos[:, :end], whole.sin[:, :end]
        keys = gate.encode_keys(whole.k_pre[:, :, :end], *table)
        span = Span(1, end - start, end)
        own = table[0][:, start:], table[1][:, start:]
        logits = gate.score(gate.encode_queries(whole.q_pre[:, :, start:end], *own, span=span), keys, span=span)
        expected = policy.select(logits, block_size=BLOCK)
        assert torch.equal(blocks.to_mask(), expected.to_mask())
        assert blocks.density() < 1


def test_the_cache_may_be_cropped_copied_and_reordered(model_of, ids_of):
    """Turns with decoded, taken back and repeated tokens in between: only the present content of the cache counts."""
    model, ids = attach(model_of("qwen3"), seer.TopK(0.5)), ids_of(LENGTH, batch=2)
    straight = in_chunks(model, ids, [96, 97, 98, 99, 128])

    cache = DynamicCache(config=model.config)
    in_chunks(model, ids[:, :100], [96, 97, 98, 99], cache)
    noise = ids_of(40, batch=2, seed=5)
    in_chunks(model, noise, [33], cache)
    cache.crop(-41)
    cache.reorder_cache(torch.tensor([1, 0]))
    copied = copy.deepcopy(cache)
    in_chunks(model, noise, [], cache)
    with seer.record(model) as stats:
        logits = in_chunks(model, ids[[1, 0], 99:], [29], copied)[[1, 0]]
    torch.testing.assert_close(logits[:, 29:], straight[:, 128:], rtol=1e-4, atol=1e-4)
    assert stats.sparse_calls == model.config.num_hidden_layers
    copied.crop(128 - LENGTH)
    copied.batch_repeat_interleave(2)
    again = in_chunks(model, ids[[1, 1, 0, 0], 128:], [], copied)
    torch.testing.assert_close(again[[2, 0]], straight[:, 128:], rtol=1e-4, atol=1e-4)


def test_generate_with_prefill_chunk_size(model_of, ids_of):
    model, ids = attach(model_of("llama"), seer.TopK(0.5)), ids_of(LENGTH)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    with seer.record(model) as stats:
        assert torch.equal(model.generate(ids, prefill_chunk_size=64, **options), expected)
    assert stats.sparse_calls == 3 * model.config.num_hidden_layers
    assert stats.prompt_density < 0.75


def test_few_tokens_on_a_cache_are_dense(model_of, ids_of):
    """Where nobody says what they are; as decoding one by one is. Of the reason a warning tells."""
    model, ids = attach(model_of("llama"), seer.TopK(0.2)), ids_of(LENGTH)
    expected = in_chunks(model, ids, [160, *range(161, LENGTH)])
    with seer.record(model) as stats, pytest.warns(UserWarning, match="fewer tokens than a block"):
        logits = in_chunks(model, ids, [160, 160 + BLOCK - 1])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert stats.sparse_calls == model.config.num_hidden_layers


@pytest.mark.parametrize("policy", [seer.TopK(0.5), seer.Threshold(0.0), seer.TopP(0.8)])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("min_context", [0, 100])
def test_left_padded_rows_in_chunks_equal_the_row_alone(model_of, ids_of, name, policy, min_context):
    """Content that begins with the batch, inside of a block, and with a block; and inside of the second chunk."""
    pads, cuts = [0, 10, 64, 100], [96, 160]
    model = model_of(name)
    torch.manual_seed(0)
    seer.attach(model, seer.GateConfig(block_size=BLOCK), prefill=policy, min_context=min_context)
    ids, mask = ids_of(LENGTH, batch=4), torch.ones(4, LENGTH, dtype=torch.int64)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    @torch.inference_mode()
    def run(rows, pad, keep):
        cache, parts = DynamicCache(config=model.config), []
        for start, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
            start, end = max(start, pad), max(end, pad)
            if start < end:
                inputs = {"position_ids": positions[rows, start:end]} | (
                    {"attention_mask": mask[rows, :end]} if keep else {}
                )
                parts.append(model(ids[rows, start:end], past_key_values=cache, use_cache=True, **inputs).logits)
        return torch.cat(parts, 1)

    with seer.record(model) as stats:
        logits = run(slice(None), 0, True)
    assert stats.sparse_calls > 0
    for row, pad in enumerate(pads):
        expected = run(slice(row, row + 1), pad, False)
        torch.testing.assert_close(logits[row : row + 1, pad:], expected, rtol=1e-4, atol=1e-4)
    if min_context == 0 and isinstance(policy, seer.TopK):
        assert stats.total_density < 0.75


def test_generate_with_left_padding_in_chunks(model_of, ids_of):
    model, ids = attach(model_of("llama"), seer.TopK(0.5)), ids_of(LENGTH, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :32] = 0  # whole blocks, so that the chunks end with blocks in both rows
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = model.generate(ids, **options)
    with seer.record(model) as stats:
        assert torch.equal(model.generate(ids, prefill_chunk_size=64, **options), expected)
    assert stats.sparse_calls == 3 * model.config.num_hidden_layers


@pytest.mark.parametrize("what", ["padded", "positions", "selector", "table"])
def test_chunks_that_are_dense_say_why(model_of, ids_of, what):
    model, ids = model_of("llama"), ids_of(128, batch=2)
    options, mask = {}, torch.ones_like(ids)
    if what == "padded":
        mask[0, 60:70], words = 0, "more than causal"
    elif what == "selector":
        # A plain function: nobody knows what it would say of a chunk.
        oracle = seer.baselines.Oracle(seer.TopK(0.5), block_size=BLOCK)
        options["selector"], words = lambda q, k, **how: oracle(q, k, **how), "chooses for whole prompts"
    elif what == "positions":
        words = "do not count the tokens of its cache"
    else:
        model.model.rotary_emb.rope_type, words = "dynamic", "rotary table changes"
    plain = copy.deepcopy(model)
    attach(model, None if options else seer.TopK(0.5), **options)

    @torch.inference_mode()
    def second_chunk(model, first):
        inputs = {"past_key_values": DynamicCache(), "use_cache": True}
        with seer.dense(model) if first else warnings.catch_warnings():
            model(ids[:, :64], attention_mask=mask[:, :64], **inputs)
        if what == "positions":
            inputs["position_ids"] = torch.arange(74, 138)[None].expand(2, -1)
        return model(ids[:, 64:], attention_mask=mask, **inputs).logits

    expected = second_chunk(plain, False)
    with pytest.warns(UserWarning, match=words):
        logits = second_chunk(model, True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_table_that_changes_between_forwards_is_noticed(model_of, ids_of):
    """Once it was seen to be the decoder's it is looked at again where what it is made of is another."""
    model, ids = attach(model_of("llama"), seer.TopK(0.5)), ids_of(LENGTH)
    in_chunks(model, ids, [64, 128])
    state, rotary = state_of(model), model.model.rotary_emb
    seen = dict(state.tables)
    assert list(seen) == [None]
    in_chunks(model, ids, [64, 128])
    assert state.tables == seen
    rotary.inv_freq.mul_(0.5)  # for queries, keys and the table of what is cached alike
    in_chunks(model, ids, [64, 128])
    assert state.tables[None][1:] != seen[None][1:]
    turned = []

    def turn(module, args, output):
        turned.append(1)
        return output if len(turned) % 2 else (output[1], output[0])

    rotary.register_forward_hook(turn)
    with pytest.warns(UserWarning, match="is not the one that the decoder makes"):
        in_chunks(model, ids, [64, 128])


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_keys_are_turned_back(scaling):
    """Partial tables, and tables that scale."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 3, 40, 16, generator=generator)
    angles = torch.arange(40)[:, None] / 100 ** (torch.arange(6) / 6)
    table = torch.cat((angles, angles), -1)[None]
    cos, sin = table.cos() * scaling, table.sin() * scaling
    part = key[..., :12]
    turned = part * cos[:, None] + torch.cat((-part[..., 6:], part[..., :6]), -1) * sin[:, None]
    turned = torch.cat((turned, key[..., 12:]), -1)
    back = inverse_rope(turned, cos, sin, recent=key[:, :, 30:])
    torch.testing.assert_close(back, key, rtol=1e-5, atol=1e-5)
    assert torch.equal(back[:, :, 30:], key[:, :, 30:])


def test_a_rotation_that_the_family_does_not_know_is_found(model_of, ids_of, monkeypatch):
    """GLM-4 taken for a model whose RoPE turns channels half a head apart: its chunks are dense, and it says so."""
    monkeypatch.setitem(FAMILIES, "glm4", replace(FAMILIES["glm4"], interleaved=False))
    model, ids = model_of("glm4"), ids_of(LENGTH)
    expected = in_chunks(model, ids, [96])
    attach(model, seer.TopK(0.5))
    cache = DynamicCache(config=model.config)
    with seer.dense(model), torch.inference_mode():
        model(ids[:, :96], past_key_values=cache, use_cache=True)
    with pytest.warns(UserWarning, match="turning keys back by the rotary table does not give"):
        logits = in_chunks(model, ids[:, 96:], [], cache)
    assert torch.equal(logits, expected[:, 96:])
