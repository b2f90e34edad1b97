"""What an attached model computes: against dense, with padding, in generation, and where it must fall back."""

from __future__ import annotations

import warnings

import pytest
import torch

import seerattention as seer
from tiny_models import attach, gradients_of, logits_of

LENGTHS = (1, 5, 63, 64, 65, 200)


@pytest.mark.parametrize("length", LENGTHS)
def test_all_blocks_equal_dense(model_of, ids_of, family, length):
    model, ids = model_of(family), ids_of(length, batch=2)
    expected = logits_of(model, ids)
    attach(model, seer.TopK(1.0))
    with seer.record(model) as stats:
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert stats.sparse_calls == (0 if length == 1 else 2)
    with seer.dense(model), seer.record(model) as stats:
        assert torch.equal(logits_of(model, ids), expected)
    assert (stats.sparse_calls, stats.total_density) == (0, 1.0)


def test_sparse_differs_from_dense(model_of, ids_of, family):
    """Or else the other tests of this file would prove nothing."""
    model, ids = model_of(family), ids_of(200)
    expected = logits_of(model, ids)
    attach(model, seer.TokenBudget(32))
    assert (logits_of(model, ids) - expected).abs().max() > 0.1


def test_default_min_context_keeps_short_prompts_dense(model_of, ids_of):
    model, ids = model_of(), ids_of(200)
    expected = logits_of(model, ids)
    attach(model, seer.TokenBudget(32), min_context=None)
    assert torch.equal(logits_of(model, ids), expected)
    seer.detach(model)
    attach(model, seer.TokenBudget(32), min_context=200)
    assert not torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("policy", [seer.Threshold(0.1), seer.TopK(0.4), seer.TopP(0.6), seer.TokenBudget(64)])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_equal_the_row_alone(model_of, ids_of, family, side, policy):
    model = model_of(family)
    attach(model, policy)
    ids, mask = ids_of(200, batch=4), torch.zeros(4, 200, dtype=torch.long)
    spans = []
    for row, length in enumerate((200, 131, 64, 7)):
        start = {"left": 200 - length, "right": 0, "both": (200 - length) // 2}[side]
        mask[row, start : start + length] = 1
        spans.append(slice(start, start + length))
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    alone = [logits_of(model, ids[row : row + 1, span]) for row, span in enumerate(spans)]
    for with_positions in (True, False):
        extra = {"position_ids": positions} if with_positions else {}
        batched = logits_of(model, ids, attention_mask=mask, **extra)
        assert torch.isfinite(batched).all()
        for row, span in enumerate(spans):
            torch.testing.assert_close(batched[row : row + 1, span], alone[row], rtol=1e-3, atol=1e-3)


def test_padded_dense_equals_untouched(model_of, ids_of, family):
    model, ids, mask = model_of(family), ids_of(100, batch=2), torch.ones(2, 100, dtype=torch.long)
    mask[0, :37] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    attach(model, seer.TokenBudget(32))
    with seer.dense(model):
        assert torch.equal(logits_of(model, ids, attention_mask=mask)[mask.bool()], expected[mask.bool()])


def test_all_ones_mask_is_no_mask(model_of, ids_of):
    model, ids = model_of(), ids_of(150, batch=2)
    attach(model, seer.TopK(0.5))
    assert torch.equal(logits_of(model, ids), logits_of(model, ids, attention_mask=torch.ones_like(ids)))


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned": {"num_return_sequences": 2, "num_beams": 2},
    "prompt_lookup": {"prompt_lookup_num_tokens": 2},
    "no_cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:seerattention. this forward is attended densely")
def test_generate_with_all_blocks_equals_dense(model_of, ids_of, family, mode, padded):
    if mode == "prompt_lookup" and padded:
        pytest.skip("prompt lookup takes one row")
    model = model_of(family)
    ids, mask = ids_of(90, batch=2 if padded else 1), torch.ones(2 if padded else 1, 90, dtype=torch.long)
    if padded:
        mask[0, :40] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **GENERATION[mode]}
    expected = model.generate(ids, **options)
    attach(model, seer.TopK(1.0))
    with seer.record(model) as stats:
        assert torch.equal(model.generate(ids, **options), expected)
    assert stats.sparse_calls >= 2


def test_generate_prefills_sparsely_and_decodes_densely(model_of, ids_of):
    model, ids = model_of(), ids_of(200)
    attach(model, seer.TokenBudget(32))
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert (stats.sparse_calls, stats.dense_calls) == (2, 2 * 3)


def test_chunks_on_a_cache_with_every_block_are_dense(model_of, ids_of, family):
    model, ids = model_of(family), ids_of(150)
    expected = logits_of(model, ids)[:, 100:]
    attach(model, seer.TopK(1.0))
    with torch.inference_mode():
        cache = model(ids[:, :100], use_cache=True).past_key_values
        logits = model(ids[:, 100:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_prefill_chunk_size_with_every_block_is_dense(model_of, ids_of):
    model, ids = model_of(), ids_of(100)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    attach(model, seer.TopK(1.0))
    assert torch.equal(model.generate(ids, prefill_chunk_size=32, **options), expected)


WINDOWED = {
    "mistral": {"sliding_window": 48},
    "qwen2": {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_window_layers_stay_dense(model_of, ids_of, name, padded):
    model, ids, mask = model_of(name, **WINDOWED[name]), ids_of(150, batch=2), torch.ones(2, 150, dtype=torch.long)
    if padded:
        mask[1, :30] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    attach(model, seer.TokenBudget(32))
    seen = []
    with seer.record(model) as stats, seer.observe(model, lambda inputs, blocks: seen.append(inputs.layer)):
        sparse = logits_of(model, ids, attention_mask=mask)
    windowed = [0, 1] if name == "mistral" else [1]
    assert [layer for layer, density in stats.per_layer.items() if density == 1.0] == windowed
    assert seen == [layer for layer in (0, 1) if layer not in windowed]
    seer.set_policy(model, seer.TopK(1.0))
    full = logits_of(model, ids, attention_mask=mask)
    torch.testing.assert_close(full[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    if name == "mistral":
        torch.testing.assert_close(sparse[mask.bool()], expected[mask.bool()])
    else:
        assert (sparse - expected)[mask.bool()].abs().max() > 1e-2


def test_a_window_longer_than_the_prompt_is_no_window(model_of, ids_of):
    model = model_of("mistral", sliding_window=150)
    attach(model, seer.TokenBudget(32))
    with seer.record(model) as stats:
        logits_of(model, ids_of(150))
    assert stats.sparse_calls == 2
    with seer.record(model) as stats:
        logits_of(model, ids_of(151))
    assert stats.sparse_calls == 0


def test_backward_falls_back_to_dense(model_of, ids_of):
    model, ids = model_of(), ids_of(100)
    expected = gradients_of(model, ids)
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="gradients"):
        model(ids, labels=ids).loss.backward()
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        model(ids, labels=ids).loss.backward()
    for name, value in model.named_parameters():
        assert torch.equal(value.grad, expected[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_falls_back_to_dense(model_of, ids_of, reentrant):
    model, ids = model_of().train(), ids_of(100)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="gradients"):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name, value in model.named_parameters():
        assert torch.equal(value.grad, expected[name]), name


def test_dropout_falls_back_to_dense(model_of, ids_of):
    model = model_of(attention_dropout=0.5).train()
    attach(model, seer.TokenBudget(32))
    with seer.record(model) as stats, pytest.warns(UserWarning, match="dropout"):
        logits_of(model, ids_of(100))
    assert stats.sparse_calls == 0


def test_packed_sequences_are_dense_with_a_warning(model_of, ids_of):
    model, ids = model_of(), ids_of(120)
    positions = torch.cat((torch.arange(70), torch.arange(50)))[None]
    expected = logits_of(model, ids, position_ids=positions, use_cache=False)
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="packed"):
        assert torch.equal(logits_of(model, ids, position_ids=positions, use_cache=False), expected)
    # With a cache transformers itself does not notice: one causal sequence with positions that restart.
    seer.detach(model)
    expected = logits_of(model, ids, position_ids=positions, use_cache=True)
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="position_ids"):
        assert torch.equal(logits_of(model, ids, position_ids=positions, use_cache=True), expected)


def test_positions_changed_in_place_are_noticed(model_of, ids_of):
    model, ids, positions = model_of(), ids_of(100), torch.arange(100)[None]
    attach(model, seer.TokenBudget(32))
    logits_of(model, ids, position_ids=positions)
    positions[:, 60:] -= 60
    with pytest.warns(UserWarning, match="position_ids"):
        logits_of(model, ids, position_ids=positions)


def test_custom_masks_are_dense_with_a_warning(model_of, ids_of):
    model, ids = model_of(), ids_of(100)
    mask = torch.ones(100, 100, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 50:, 10:20] = False
    expected = logits_of(model, ids, attention_mask=mask)
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="4-D"):
        assert torch.equal(logits_of(model, ids, attention_mask=mask), expected)


def test_padding_with_holes_is_dense_with_a_warning(model_of, ids_of):
    model, ids, mask = model_of(), ids_of(100, batch=2), torch.ones(2, 100, dtype=torch.long)
    mask[1, 40:50] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="padding between"):
        assert torch.equal(logits_of(model, ids, attention_mask=mask), expected)


def test_output_attentions_is_dense_with_a_warning(model_of, ids_of):
    model, ids = model_of(attn_implementation="eager"), ids_of(100)
    expected = model(ids, output_attentions=True)
    attach(model, seer.TokenBudget(32))
    with torch.inference_mode(), pytest.warns(UserWarning, match="output_attentions"):
        ours = model(ids, output_attentions=True)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(ours.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_changing_the_implementation_warns_once_and_is_that_implementation(model_of, ids_of):
    model, ids = model_of(), ids_of(100)
    expected = logits_of(model, ids)
    attach(model, seer.TokenBudget(32))
    sparse = logits_of(model, ids)
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match="'sdpa'"):
        logits = logits_of(model, ids)
    assert torch.equal(logits, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(model, ids)
    model.set_attn_implementation("seer")
    assert torch.equal(logits_of(model, ids), sparse)


def test_observers_refuse_what_they_cannot_describe(model_of, ids_of):
    model, ids = model_of(), ids_of(100)
    attach(model)
    with torch.inference_mode(), seer.observe(model, lambda inputs, blocks: None):
        cache = model(ids[:, :50], use_cache=True).past_key_values
        with pytest.warns(UserWarning, match="chunk"), pytest.raises(ValueError, match="whole prompts only"):
            model(ids[:, 50:], past_key_values=cache)


def test_low_precision(model_of, ids_of, family):
    model, ids = model_of(family, dtype=torch.bfloat16), ids_of(150)
    expected = logits_of(model, ids)
    attach(model, seer.TopK(1.0))
    difference = (logits_of(model, ids) - expected).float()
    assert difference.norm() <= 0.03 * expected.float().norm()


def test_threads_do_not_mix(model_of, ids_of):
    """Two prompts of different lengths in two threads through one attached model."""
    from concurrent.futures import ThreadPoolExecutor

    model = model_of()
    attach(model, seer.TokenBudget(64))
    prompts = [ids_of(length, seed=length) for length in (90, 200, 130, 65) * 3]
    expected = [logits_of(model, ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        for ours, alone in zip(pool.map(lambda ids: logits_of(model, ids), prompts), expected, strict=True):
            torch.testing.assert_close(ours, alone)
