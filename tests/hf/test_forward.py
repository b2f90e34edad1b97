"""One forward: what is decided about it by the values of its tensors, what it keeps, and what it finds missing."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch

import seerattention as seer
from seerattention.hf import gates_of
from seerattention.hf.forward import current_forward
from tiny_models import attach, logits_of


def halves(positions):
    """Two packed documents, written over the positions of one."""
    positions[..., positions.shape[-1] // 2 :] -= positions.shape[-1] // 2


EDITS = {
    "in place": halves,
    "through data": lambda positions: halves(positions.data),
    "through a view": lambda positions: halves(positions.view(-1)),
    "through numpy": lambda positions: halves(positions.numpy()),
    "storage": lambda positions: positions.set_(torch.cat((torch.arange(100), torch.arange(100)))[None]),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.filterwarnings("ignore:seerattention. this forward is attended densely")
def test_positions_are_looked_at_in_every_forward(model_of, ids_of, edit, mode):
    if edit == "storage" and mode is torch.inference_mode:
        pytest.skip("inference tensors keep their storage")
    model, ids = attach(model_of(), seer.TokenBudget(32)), ids_of(200)
    with mode():
        buffer = torch.arange(200)[None].clone()
        with seer.record(model) as stats:
            model(ids, position_ids=buffer)
            EDITS[edit](buffer)
            logits = model(ids, position_ids=buffer).logits
        assert (stats.sparse_calls, stats.dense_calls) == (2, 2)
        assert torch.equal(logits, model(ids, position_ids=buffer.clone()).logits)
        buffer.copy_(torch.arange(200)[None])
        with seer.record(model) as stats:
            model(ids, position_ids=buffer)
        assert stats.sparse_calls == 2


@pytest.mark.filterwarnings("ignore:seerattention. this forward is attended densely")
def test_masks_are_looked_at_in_every_forward(model_of, ids_of):
    model, ids, mask = attach(model_of(), seer.TokenBudget(32)), ids_of(200), torch.ones(1, 200, dtype=torch.bool)
    with torch.inference_mode():
        mask = mask.clone()
        for start, calls in ((0, (2, 0)), (50, (2, 0)), (None, (0, 2))):
            mask.fill_(True)
            if start is None:
                mask[:, 50:60] = False
            mask[:, : start or 0] = False
            with seer.record(model) as stats:
                logits = model(ids, attention_mask=mask).logits
            assert (stats.sparse_calls, stats.dense_calls) == calls
            assert torch.equal(logits, model(ids, attention_mask=mask.clone()).logits)


@pytest.mark.parametrize("where", ["k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_pins_no_tensors(model_of, ids_of, where, error):
    model, ids, kept = attach(model_of(), seer.TokenBudget(32)), ids_of(200), []
    attention = model.model.layers[0].self_attn

    def fail(*args):
        raise error("here")

    attention.q_proj.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    hook = getattr(attention, where).register_forward_pre_hook(fail)
    with pytest.raises(error, match="here"):
        logits_of(model, ids)
    hook.remove()
    gc.collect()
    assert kept[0]() is None


def test_nothing_is_kept_after_a_forward(model_of, ids_of):
    model, kept = attach(model_of(), seer.TokenBudget(32)), []
    positions, mask = torch.arange(200)[None], torch.ones(1, 200, dtype=torch.long)
    mask[:, :20] = 0
    for x in (positions, mask):
        kept.append(weakref.ref(x))
    inputs = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    logits_of(model, ids_of(200), position_ids=positions, attention_mask=mask)
    assert current_forward() is None
    del positions, mask, x
    gc.collect()
    assert len(kept) == 4
    assert all(ref() is None for ref in kept)
    assert not any(x.__dict__ for x in inputs)


def test_after_an_exception_the_next_forward_is_as_ever(model_of, ids_of):
    model, ids = attach(model_of(), seer.TokenBudget(32)), ids_of(200)
    expected = logits_of(model, ids)
    for error in (ValueError, KeyboardInterrupt):
        hook = model.model.layers[1].register_forward_hook(lambda *_, error=error: (_ for _ in ()).throw(error()))
        with pytest.raises(error), seer.dense(model):
            logits_of(model, ids)
        hook.remove()
        assert torch.equal(logits_of(model, ids), expected)
        assert current_forward() is None


def narrow(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, position_ids=None,
           use_cache=None, cache_position=None):  # fmt: skip
    """As research code writes it: its own arguments, and no attention function."""
    return hidden_states, None


def wide(self, hidden_states, **kwargs):
    return hidden_states, None


@pytest.mark.parametrize("patch", [narrow, wide])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("patched", [(0,), (0, 1)])
def test_attention_that_does_not_call_the_attention_function_is_named(model_of, ids_of, patch, before, patched):
    model, ids = model_of(), ids_of(150)
    if not before:
        attach(model, seer.TokenBudget(32))
        logits_of(model, ids)
    for index in patched:
        attention = model.model.layers[index].self_attn
        attention.forward = patch.__get__(attention)
    if before:
        attach(model, seer.TokenBudget(32))
    names = ", ".join(map(str, patched))
    with seer.record(model) as stats:
        with pytest.warns(UserWarning, match=f"layers {names} are not attended"):
            logits_of(model, ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            logits_of(model, ids)
    assert stats.sparse_calls == 2 * (2 - len(patched))


def test_patched_attention_that_calls_the_attention_function_is_sparse(model_of, ids_of):
    """Without taking keywords that it does not know."""
    model, ids = attach(model_of(), seer.TokenBudget(32)), ids_of(150)
    expected = logits_of(model, ids)
    for layer in model.model.layers:
        attention = layer.self_attn
        own = type(attention).forward

        def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None,
                    position_ids=None, use_cache=None, cache_position=None, own=own):  # fmt: skip
            return own(self, hidden_states, position_embeddings, attention_mask, past_key_values)

        attention.forward = forward.__get__(attention)
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits_of(model, ids), expected)
    assert stats.sparse_calls == 2
    # What such a forward does not hand on is known from its own arguments.
    with pytest.warns(UserWarning, match="position_ids"):
        logits_of(model, ids, position_ids=torch.cat((torch.arange(100), torch.arange(50)))[None], use_cache=True)


def test_attention_modules_that_are_replaced_after_attach_are_followed(model_of, ids_of):
    model, ids = attach(model_of(), seer.TokenBudget(32)), ids_of(150)
    expected = logits_of(model, ids)
    layers = model.model.layers
    for index, layer in enumerate(layers):
        attention = type(layer.self_attn)(model.config, index).eval()
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits_of(model, ids), expected)
    assert stats.sparse_calls == 2
    seer.detach(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attention_modules_replaced_by_something_else_are_named(model_of, ids_of):
    class Nothing(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return torch.zeros_like(hidden_states), None

    model, ids = attach(model_of(), seer.TokenBudget(32)), ids_of(150)
    model.model.layers[1].self_attn = Nothing()
    with pytest.warns(UserWarning, match="layers 1 are not attended"):
        logits_of(model, ids)
    assert len(gates_of(model)) == 2
    model = model_of()
    model.model.layers[1].self_attn = Nothing()
    with pytest.raises(AttributeError, match="Nothing has no q_proj and k_proj"):
        attach(model)
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_do_not_run_are_not_missed(model_of, ids_of):
    """Models leave early where the config says so."""
    model = attach(model_of(num_hidden_layers=3), seer.TokenBudget(32))
    model.model.layers[2].forward = lambda hidden, *args, **kwargs: hidden
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(model, ids_of(150))


def test_a_layer_outside_of_a_forward_is_dense_and_says_so(model_of, ids_of):
    model, states = model_of(), torch.randn(1, 150, 64)
    table = model.model.rotary_emb(states, torch.arange(150)[None])
    layer = model.model.layers[0]
    expected = layer(states, position_embeddings=table)
    attach(model, seer.TokenBudget(32))
    with pytest.warns(UserWarning, match="outside of a forward"):
        assert torch.equal(layer(states, position_embeddings=table), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        layer(states, position_embeddings=table)


@pytest.mark.parametrize("before", [False, True])
def test_adaption_prompts_wrap_the_attention_module(model_of, ids_of, before):
    peft = pytest.importorskip("peft")
    ids = ids_of(150)
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")

    def wrap(model):
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config).eval()
        for name, parameter in model.named_parameters():
            if "adaption_gate" in name:
                torch.nn.init.constant_(parameter, 0.5)
        return model

    expected = logits_of(wrap(model_of()), ids)
    model = model_of()
    if before:
        model = wrap(model)
    attach(model, seer.TopK(1.0))
    if not before:
        model = wrap(model)
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert stats.sparse_calls == 2
    seer.detach(model)
    assert torch.equal(logits_of(model, ids), expected)


# What one forward does not show: where the prompt ends. ``generate`` knows.


def test_chunks_of_generate_are_those_of_forwards(model_of, ids_of):
    model, ids = attach(model_of(), seer.TokenBudget(32)), ids_of(256)
    with torch.no_grad():
        cache = model(ids[:, :128], use_cache=True).past_key_values
        expected = model(ids[:, 128:], past_key_values=cache).logits[:, -1]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False, "output_logits": True}
    with seer.record(model) as stats:
        got = model.generate(ids, prefill_chunk_size=128, return_dict_in_generate=True, **options)
    assert (stats.sparse_calls, stats.dense_calls) == (4, 0)
    torch.testing.assert_close(got.logits[0], expected, rtol=1e-5, atol=1e-5)


def test_without_a_cache_every_step_reads_the_prompt_as_the_first_did(model_of, ids_of):
    model, ids = attach(model_of(), seer.TokenBudget(32)), ids_of(128)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, eos_token_id=None, **options)
    with seer.record(model) as stats:
        got = model.generate(ids, use_cache=False, eos_token_id=None, **options)
    assert (stats.sparse_calls, stats.dense_calls) == (2 * 4, 2 * 3)  # what was decoded comes again in three steps
    assert torch.equal(got, expected)
    assert got[0, 128] == logits_of(model, ids)[0, -1].argmax()


def test_speculative_decoding_tells_prompt_and_first_candidates_apart(model_of, ids_of):
    model = attach(model_of(), seer.TokenBudget(32))
    ids = ids_of(60).repeat(1, 3)  # the end of the prompt stands in it before, so there are candidates
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    forwards = []
    model.model.register_forward_hook(lambda module, args, output: forwards.append(output.last_hidden_state.shape[1]))
    with seer.record(model) as stats, warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        got = model.generate(ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=4, **options)
    assert forwards[0] == 180 + 4
    assert (stats.sparse_calls, stats.dense_calls) == (2, 2 * len(forwards))
    assert torch.equal(got, expected)
