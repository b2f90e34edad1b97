"""FlashPrefill V2: energies summed over the queries of a group, shared lists, and the correction in a model."""

from __future__ import annotations

import math

import pytest
import torch

import baseline_cases as cases
import seerattention as seer
from seerattention import TopK, TopP
from seerattention.baselines import FlashPrefill, FlashPrefillV2
from seerattention.baselines.prompt import Prompt
from seerattention.ops import mean_corrected_attention
from tiny_models import logits_of, make_ids, make_model

BLOCK = 32


def brute_energy(q, k, start):
    """Sums over all heads ``q [G, T, D]`` of a group, one query and block at a time."""
    length, blocks, first = len(k), -(-len(k) // BLOCK), start // BLOCK
    energy = torch.zeros(blocks - first, blocks, dtype=torch.float64)
    mean = torch.stack([block.mean(0) for block in k.split(BLOCK)])
    for row in range(first, blocks):
        last = min((row + 1) * BLOCK, length) - 1
        for j in range((last + 1) // BLOCK):  # complete by the last query of the row
            for t in range(max(start, row * BLOCK), last + 1):
                assert t >= j * BLOCK
                energy[row - first, j] += sum(math.exp(float(head[t - start] @ mean[j])) for head in q)
    return energy


def brute(alpha, sink, window, dense):
    def mask(q, k, start):
        energy, first = brute_energy(q, k, start), start // BLOCK
        kept = energy >= alpha * energy.max(-1, keepdim=True).values
        blocks = energy.shape[1]
        for i in range(first, blocks):
            for j in range(i + 1):
                kept[i - first, j] |= j < sink or i - j < window or i >= blocks - dense
        return kept

    return mask


@pytest.mark.parametrize(("alpha", "sink", "window", "dense"), [(0.1, 2, 4, 0), (0.6, 0, 0, 0), (0.9, 1, 2, 2)])
def test_definition(alpha, sink, window, dense):
    selector = FlashPrefillV2(alpha, sink, window, dense, block_size=BLOCK)
    cases.assert_every_case(selector, brute(alpha, sink, window, dense))
    cases.assert_padded_chunks(selector)
    cases.assert_rowwise(selector)


@pytest.mark.parametrize("sharp", [1.0, 3.0])
def test_energy(sharp):
    cases.assert_scores(FlashPrefillV2(block_size=BLOCK), lambda *a: brute_energy(*a).log(), sharp=sharp)


@pytest.mark.parametrize("policy", [TopK(0.4), TopP(0.8), TopK(0.4, last_blocks_dense=1)])
def test_policies(policy):
    selector = FlashPrefillV2(policy=policy, block_size=BLOCK)
    cases.assert_every_case(selector, cases.brute_policy(lambda *a: brute_energy(*a).log(), policy))
    cases.assert_rowwise(selector)


def test_with_one_head_a_group_whole_blocks_have_the_energies_of_the_first_version_but_for_the_diagonal():
    inputs = cases.make_inputs([320], heads=2, kv_heads=2)
    prompt = Prompt(0, inputs.q[0], inputs.k[0], cases.SCALE, BLOCK)
    first, second = FlashPrefill(block_size=BLOCK).score(prompt), FlashPrefillV2(block_size=BLOCK).score(prompt)
    before = torch.ones(10, 10, dtype=torch.bool).tril(-1)
    torch.testing.assert_close(second[:, before], first[:, before])
    # The first version has the last query alone on the diagonal.
    assert (second.diagonal(dim1=1, dim2=2) > first.diagonal(dim1=1, dim2=2)).all()


def test_few_scores_at_a_time(monkeypatch):
    inputs = cases.make_inputs([300, 170])
    selector = FlashPrefillV2(0.5, 0, 0, block_size=BLOCK)
    expected = selector.select(inputs).to_mask()
    monkeypatch.setattr("seerattention.baselines.prompt.MOST_SCORES", 1)
    assert torch.equal(selector.select(inputs).to_mask(), expected)


def test_large_logits_do_not_overflow():
    density = FlashPrefillV2(0.5, 0, 0, block_size=BLOCK).select(cases.make_inputs([300], sharp=1000.0)).density()
    assert 0 < density < 0.9


def test_first_layers_are_dense_and_count():
    selector = FlashPrefillV2(0.9, 1, 1, first_layers_dense=2, block_size=BLOCK)
    densities = [selector.select(cases.make_inputs([300], layer=layer)).density() for layer in range(4)]
    assert densities[:2] == [1.0, 1.0]
    assert max(densities[2:]) < 0.7
    whole = seer.attach(make_model(), selector=FlashPrefillV2(0.9, 1, 1, block_size=BLOCK), min_context=0)
    with seer.record(whole) as stats:
        logits_of(whole, make_ids(200))
    seer.detach(whole)
    seer.attach(whole, selector=FlashPrefillV2(0.9, 1, 1, first_layers_dense=1, block_size=BLOCK), min_context=0)
    with seer.record(whole) as rest:
        logits_of(whole, make_ids(200))
    assert rest.per_layer[0] == 1.0
    assert rest.total_density > stats.total_density


def test_correction_is_the_attention_of_the_model(monkeypatch):
    """Blocks are the same with it and without; the attention in models is the corrected one."""
    plain = FlashPrefillV2(0.9, 1, 1, block_size=BLOCK)
    corrected = FlashPrefillV2(0.9, 1, 1, mean_correction=True, block_size=BLOCK)
    assert (plain.attention, corrected.attention) == ("", "+ mean correction")
    inputs = cases.make_inputs([300, 170])
    blocks = corrected.select(inputs)
    assert torch.equal(blocks.to_mask(), plain.select(inputs).to_mask())
    assert plain.attend(inputs, blocks) is None
    v = inputs.v.nan_to_num(0.0)
    given = cases.LayerInputs(**dict(vars(inputs), v=v))
    expected = mean_corrected_attention(inputs.q, inputs.k, v, blocks, scale=cases.SCALE)
    assert torch.equal(corrected.attend(given, blocks)[:, :, :170], expected[:, :, :170])
    model, ids, logits = make_model(), make_ids(300), []
    for selector in (plain, corrected, plain):
        if len(logits) == 2:
            monkeypatch.setattr("seerattention.hf.attention.block_sparse_attention", mean_corrected_attention)
        seer.attach(model, selector=selector, min_context=0)
        with seer.record(model) as stats:
            logits.append(logits_of(model, ids))
        assert stats.dense_calls == 0
        assert 0 < stats.total_density < 0.7
        seer.detach(model)
    assert torch.equal(logits[1], logits[2])
    assert (logits[1] - logits[0]).abs().max() > 0.01


def test_names():
    text = "flashprefill_v2:alpha=0.2:last_blocks_dense=2:mean_correction=true:block_size=128"
    cases.assert_goes_round(text, FlashPrefillV2(0.2, last_blocks_dense=2, mean_correction=True, block_size=128))
    cases.assert_goes_round("flashprefill_v2:policy=top_k(0.1)", FlashPrefillV2(policy=TopK(0.1)))


@pytest.mark.parametrize("options", [{"alpha": 1.1}, {"sink_blocks": -1}, {"first_layers_dense": 1.5}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"FlashPrefillV2: {next(iter(options))} must be"):
        FlashPrefillV2(**options)
    with pytest.raises(TypeError, match="mean_correction must be True or False"):
        FlashPrefillV2(mean_correction="yes")
