"""Tiny models whose decoded tokens choose blocks with the tokens before them, and what tests of them share."""

from __future__ import annotations

import torch

import seerattention as seer
from decode_models import BLOCK, SPARSE, attach

WINDOW = 6
FORMS = {
    "published": seer.DecodeGateConfig(block_size=BLOCK, query_window=WINDOW),
    "fine": seer.DecodeGateConfig(block_size=BLOCK, k_pitch=4, merge_heads=False, query_window=WINDOW),
}
GATES = {
    "decode": (seer.GateConfig(block_size=32, prefill=None, decode=FORMS["published"]), {}),
    "both": (seer.GateConfig(block_size=32, decode=FORMS["published"]), {"prefill": seer.TopK(0.4)}),
    "both, fine": (seer.GateConfig(block_size=32, decode=FORMS["fine"]), {"prefill": seer.TopK(0.4)}),
}


def gated(model, gates="both, fine", decode=SPARSE, **options):
    config, policies = GATES[gates]
    return attach(model, decode, config, **policies, **options)


def prompt(ids_of, length=150):
    """With repetitions, in which prompt lookup finds candidates."""
    ids = ids_of(length)
    ids[:, length // 2 :] = ids[:, : length - length // 2]
    return ids


def same(found, expected):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
