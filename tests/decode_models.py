"""Tiny models that decode through gates, and what tests of them share."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import seerattention as seer

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


@contextmanager
def nothing_kept():
    """Every step makes its encoded keys anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seerattention.hf.layer.kept_keys", lambda cache_layer, gate, **_: None)
        yield
