"""Tiny models that decode through gates, and what tests of them share."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from seerattention.gates import select_by_token
from seerattention.hf import gates_of
from seerattention.hf.state import state_of
from seerattention.ops.span import Span

BLOCK = 16
EVERYTHING = seer.Threshold(0.0)
SPARSE = seer.TokenBudget(2 * BLOCK)
DECODE = seer.DecodeGateConfig(block_size=BLOCK)
ONLY_DECODE = seer.GateConfig(block_size=32, prefill=None, decode=DECODE)
BOTH = seer.GateConfig(block_size=32, decode=DECODE)
FINE_DECODE = seer.DecodeGateConfig(block_size=BLOCK, k_pitch=4, merge_heads=False)
FINE = seer.GateConfig(block_size=32, decode=FINE_DECODE)
ONLY_FINE_DECODE = seer.GateConfig(block_size=32, prefill=None, decode=FINE_DECODE)
GREEDY = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}


def attach(model, decode=SPARSE, config=ONLY_DECODE, **options):
    torch.manual_seed(3)
    return seer.attach(model, config, decode=decode, **{"min_context": 0, **options})


def generate(model, ids, tokens=24, **options):
    found = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **{**GREEDY, **options})
    return found.sequences, torch.stack(found.logits, 1)


@torch.no_grad()
def feed(model, ids, cache, **inputs):
    return model(ids, past_key_values=cache, use_cache=True, **inputs).logits


def attend_naively(logits, policy, block_size, post, scale):
    """Output ``[B, Hq, D]`` of the last token, and its mask: policy and masked softmax over everything, in float32.

    Args:
        logits: ``[B, Hkv, 1, N]`` of the last token.
        post: q, k and v, all tokens, after RoPE.
    """
    q, k, v = post
    batch, heads, length, _ = q.shape
    mask = select_by_token(policy, logits, block_size=block_size, span=Span(batch, 1, length)).to_mask()
    group = heads // k.shape[1]
    mask = mask.repeat_interleave(block_size, -1)[..., :length].repeat_interleave(group, 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q[:, :, -1:] @ k.mT * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v)[:, :, 0], mask


def watched_steps(model, ids, form, policy):
    """Decode ``ids`` from token 50 on, and give of each step what goes into the first layer, whose inputs do not depend
    on what was read before: gate, queries and keys before RoPE with their tables, and after it with values, scale, and
    what its attention gave."""
    attach(model, None, seer.GateConfig(block_size=32, decode=form), prefill=seer.Dense())
    seen, given = [], []
    with seer.observe(model, lambda inputs, blocks: seen.append(inputs)), torch.no_grad():
        model(ids)
    whole = seen[0]
    gate, layer = gates_of(model, "decode")[0], state_of(model).layers[0]
    seer.set_policy(model, decode=policy)
    attend = seer.hf.attention.attend_tokens

    def watched(arguments, *others):
        decoded = attend(arguments, *others)
        if arguments.module is layer.attention:
            given.append(decoded.out[:, 0])
        return decoded

    cache = DynamicCache(config=model.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seer.hf.attention, "attend_tokens", watched)
        feed(model, ids[:, :50], cache)
        for end in range(51, ids.shape[1] + 1):
            feed(model, ids[:, end - 1 : end], cache)
            pre = [whole.q_pre[:, :, :end], whole.k_pre[:, :, :end], whole.cos[:, :end], whole.sin[:, :end]]
            yield gate, pre, [x[:, :, :end] for x in (whole.q, whole.k, whole.v)], whole.scale, given[-1]
    assert len(given) == ids.shape[1] - 50


@contextmanager
def nothing_kept():
    """Every step makes its encoded keys anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seerattention.hf.layer.kept_keys", lambda cache_layer, gate, **_: None)
        yield
