"""Dense means the implementation that the model came with, and where attention is dense because it must be."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask

import seerattention as seer
from seerattention.hf import gates_of, is_attached
from tiny_models import attach, gradients_of, logits_of


def flash_like(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """As FlashAttention is called: the mask is the padding or None, and the name in the config says which kernel."""
    assert module.config._attn_implementation == "unpadded"
    assert attention_mask is None or attention_mask.dim() == 2
    module.calls = getattr(module, "calls", 0) + 1
    mask = None
    if attention_mask is not None:
        rows, columns = query.shape[2], key.shape[2]
        causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        mask = causal & attention_mask[:, None, None, :]
    out, weights = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    return 1.5 * out, weights  # nobody else computes that


def doubled(module, query, key, value, attention_mask, **kwargs):
    """One of the user's own, that is not what sdpa computes."""
    out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return 2 * out, weights


@pytest.fixture(params=["sdpa", "eager", "unpadded", "doubled"])
def implementation(request):
    AttentionInterface.register("unpadded", flash_like)
    AttentionMaskInterface.register("unpadded", flash_attention_mask)
    AttentionInterface.register("doubled", doubled)
    AttentionMaskInterface.register("doubled", sdpa_mask)
    return request.param


def padded(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return mask


@pytest.mark.parametrize("with_padding", [False, True])
def test_dense_is_what_the_model_came_with_bit_for_bit(model_of, ids_of, family, implementation, with_padding):
    model, ids = model_of(family, attn_implementation=implementation), ids_of(150, batch=2)
    inputs = {"attention_mask": padded(2, 150)} if with_padding else {}
    expected = logits_of(model, ids, **inputs)
    attach(model, seer.TokenBudget(32))
    with seer.dense(model):
        assert torch.equal(logits_of(model, ids, **inputs), expected)
        with seer.observe(model, lambda inputs, blocks: None), seer.record(model) as stats:
            got = logits_of(model, ids, **inputs)
    assert stats.dense_calls == model.config.num_hidden_layers
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    seer.set_policy(model, seer.TopK(1.0))
    with seer.record(model) as stats:
        full = logits_of(model, ids, **inputs)
    assert stats.sparse_calls == 2
    if implementation in ("sdpa", "eager"):  # the others are not imitated
        rows = slice(None) if not with_padding else inputs["attention_mask"].bool()
        torch.testing.assert_close(full[rows], expected[rows], rtol=1e-4, atol=1e-4)
    seer.detach(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits_of(model, ids, **inputs), expected)


@pytest.mark.parametrize("with_padding", [False, True])
def test_decoding_and_chunks_are_what_the_model_came_with(model_of, ids_of, implementation, with_padding):
    model, ids = model_of(attn_implementation=implementation), ids_of(100, batch=2)
    mask = padded(2, 100) if with_padding else torch.ones_like(ids)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options = {**options, "attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **options)
    attach(model, seer.TokenBudget(32))
    with seer.dense(model):
        got = model.generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))


def test_dense_under_autocast_is_the_untouched_model(model_of, ids_of, implementation):
    model, ids = model_of(attn_implementation=implementation), ids_of(100)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model, ids)
        attach(model, seer.TokenBudget(32))
        with seer.dense(model):
            assert torch.equal(logits_of(model, ids), expected)


def test_training_is_what_the_model_came_with(model_of, ids_of, implementation):
    model, ids = model_of(attn_implementation=implementation), ids_of(100)
    expected = gradients_of(model, ids)
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="gradients"):
        model(ids, labels=ids).loss.backward()
    assert all(torch.equal(value.grad, expected[name]) for name, value in model.named_parameters())


def test_attention_maps_of_an_eager_model(model_of, ids_of):
    model, ids = model_of(attn_implementation="eager"), ids_of(100)
    expected = model(ids, output_attentions=True).attentions
    attach(model, seer.TokenBudget(32))
    with torch.no_grad(), pytest.warns(UserWarning, match="output_attentions"):
        assert all(map(torch.equal, model(ids, output_attentions=True).attentions, expected))


def test_packed_sequences_of_a_flash_model(model_of, ids_of, implementation):
    """FlashAttention gets no mask for them, so that positions alone say that they are there."""
    model, ids = model_of(attn_implementation=implementation), ids_of(120)
    positions = torch.cat((torch.arange(70), torch.arange(50)))[None]
    expected = logits_of(model, ids, position_ids=positions, use_cache=False)
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="packed"):
        assert torch.equal(logits_of(model, ids, position_ids=positions, use_cache=False), expected)


def test_holes_in_the_padding_of_a_flash_model(model_of, ids_of, implementation):
    model, ids, mask = model_of(attn_implementation=implementation), ids_of(100, batch=2), padded(2, 100)
    mask[1, 40:50] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="padding between"):
        assert torch.equal(logits_of(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_gradients_of_any_projection_are_dense(model_of, ids_of, projection):
    """Adapters may train the values alone, which decides nothing about queries."""
    model, ids = model_of().requires_grad_(False), ids_of(100)
    weight = getattr(model.model.layers[0].self_attn, projection).weight.requires_grad_()
    model(ids, labels=ids).loss.backward()
    expected, weight.grad = weight.grad, None
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="gradients"):
        model(ids, labels=ids).loss.backward()
    assert torch.equal(weight.grad, expected)


def test_adapters_on_the_values_only(model_of, ids_of):
    peft = pytest.importorskip("peft")
    model, ids = peft.get_peft_model(model_of(), peft.LoraConfig(target_modules=["v_proj"])).eval(), ids_of(100)
    expected = model(input_ids=ids, labels=ids).loss
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="gradients"):
        loss = model(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, expected)
    loss.backward()


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_in_training_mode_is_dense(model_of, ids_of, gradients):
    """With gradients or without: the two are compared with each other (DPO)."""
    model, ids = model_of().train(), ids_of(100)
    expected = logits_of(model, ids)
    attach(model, seer.TokenBudget(32))
    with torch.set_grad_enabled(gradients), pytest.warns(UserWarning, match="training mode"):
        assert torch.equal(model(ids).logits, expected)
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
    model.eval()
    assert not torch.equal(logits_of(model, ids), expected)


def test_the_first_loss_of_dpo_is_that_of_equal_models(model_of, ids_of):
    model = attach(model_of().train(), seer.TokenBudget(32))

    def log_probability(ids):
        return model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()

    chosen, rejected = ids_of(200), ids_of(200, seed=1)
    with pytest.warns(UserWarning, match="training mode"), torch.no_grad():
        reference = log_probability(chosen) - log_probability(rejected)
    margin = log_probability(chosen) - log_probability(rejected) - reference
    assert -torch.nn.functional.logsigmoid(margin).item() == pytest.approx(0.6931472)


@pytest.mark.parametrize("sparse_first", [False, True])
@pytest.mark.filterwarnings("ignore:seerattention. this forward is attended densely")
def test_one_warning_where_a_model_is_sparse_and_trained(model_of, ids_of, sparse_first):
    model, ids = attach(model_of(), seer.TokenBudget(32)), ids_of(100)
    steps = [lambda: logits_of(model, ids), lambda: model(ids)]
    first, second = steps if sparse_first else steps[::-1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention. this model attended")
        first()
    with pytest.warns(UserWarning, match="sparsely without gradients and densely with them"):
        second()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first()


def test_float64_models_are_refused_in_one_sentence(model_of, ids_of):
    model, ids = model_of(dtype=torch.float64), ids_of(100)
    expected = logits_of(model, ids)
    for options in ({"gates": seer.GateConfig()}, {"selector": lambda *args, **kwargs: None}):
        with pytest.raises(ValueError, match=r"float64.*float32.*model.float"):
            seer.attach(model, **options)
        assert not is_attached(model)
        assert torch.equal(logits_of(model, ids), expected)
    attach(model.float(), seer.TokenBudget(32))
    model.double()
    with pytest.warns(UserWarning, match="float64"):
        assert logits_of(model, ids).dtype == torch.float64


def test_prompts_within_the_window_of_all_layers_are_sparse(model_of, ids_of):
    """Mistral, whose config may have no layer types, or types that its layers do not read."""
    for options in ({}, {"layer_types": ["full_attention", "sliding_attention"]}):
        model = attach(model_of("mistral", sliding_window=150, **options), seer.TokenBudget(32))
        expected = logits_of(model_of("mistral", sliding_window=150, **options), ids_of(151))
        with seer.record(model) as stats, warnings.catch_warnings():
            warnings.simplefilter("error")
            logits_of(model, ids_of(150))
        assert stats.sparse_calls == 2
        with pytest.warns(UserWarning, match=r"sliding window .*150 tokens") as caught:
            assert torch.equal(logits_of(model, ids_of(151)), expected)
        logits_of(model, ids_of(152))
        assert len(caught) == 1


def test_layers_with_a_window_beside_layers_without_are_silently_dense(model_of, ids_of):
    model = model_of("qwen2", use_sliding_window=True, sliding_window=48, max_window_layers=1)
    attach(model, seer.TokenBudget(32))
    assert [gate is None for gate in gates_of(model)] == [False, True]
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(model, ids_of(150))
    assert (stats.sparse_calls, stats.dense_calls) == (1, 1)
