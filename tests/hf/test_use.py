"""Attached models in the hands of their users: autocast, pickling, edited configs, inference mode, mixed batches."""

from __future__ import annotations

import io

import pytest
import torch

import seerattention as seer
from seerattention.hf import gates_of


def attached(model, density=0.3, **options):
    torch.manual_seed(3)
    options = {"min_context": 0, **options}
    return seer.attach(model, seer.GateConfig(block_size=32), prefill=seer.TopK(density), **options)


@pytest.mark.parametrize("use_cache", [True, False])
def test_autocast_changes_the_attention_as_it_changes_sdpa(model_of, ids_of, family, use_cache):
    """Under autocast values are lower in precision than rotated queries and keys; scores stay float32."""
    model, ids = attached(model_of(family), density=0.999), ids_of(200)
    scores = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with seer.dense(model):
            dense = model(ids, use_cache=use_cache).logits
        with seer.observe(model, lambda inputs, blocks: scores.append((inputs, inputs.gate_logits()))):
            sparse = model(ids, use_cache=use_cache).logits
    for inputs, logits in scores:
        assert logits.dtype == torch.float32
        assert {inputs.q.dtype, inputs.k.dtype, inputs.v.dtype} == {torch.bfloat16}
    exact = model_of(family)(ids).logits
    assert (sparse - exact).abs().mean() < 1.5 * (dense - exact).abs().mean()


def test_pickled_models_work_on(model_of, ids_of):
    model, ids = attached(model_of()), ids_of(200)
    with torch.no_grad(), seer.record(model), seer.dense(model):
        model(ids)
        stream = io.BytesIO()
        torch.save(model, stream)
    with torch.no_grad():
        expected = model(ids).logits
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
        with seer.record(loaded) as stats:  # the contexts of the original do not come along
            assert torch.equal(loaded(ids).logits, expected)
    assert stats.sparse_calls == 2
    seer.detach(loaded)
    assert torch.equal(loaded(ids).logits, model_of()(ids).logits)


def test_config_edits_outlive_detach(model_of):
    model = model_of()
    config = model.config
    config.pad_token_id = None
    attached(model)
    model.resize_token_embeddings(120, mean_resizing=False)
    model.config.use_cache = False
    model.config.note = "new"
    seer.detach(model)
    assert model.config is config
    assert (config.vocab_size, config.use_cache, config.note) == (120, False, "new")
    assert config._attn_implementation == "sdpa"


def test_everything_in_inference_mode(model_of, ids_of):
    """Gates made, moved and trained there are ordinary tensors."""
    model, batches = model_of(), [{"input_ids": ids_of(200)}] * 2
    with torch.inference_mode():
        attached(model)
        model(ids_of(200))
        model.to(torch.bfloat16)
        model(ids_of(200))
        assert not any(parameter.is_inference() for parameter in gates_of(model)[0].parameters())
        inside = seer.distill(model, batches, seer.DistillConfig(steps=2))
    outside = seer.distill(model, batches, seer.DistillConfig(steps=2))
    assert outside.loss[0] < inside.loss[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_short_rows_of_a_batch_are_dense_as_they_would_be_alone(model_of, ids_of, side):
    model = attached(model_of(), density=0.1, min_context=256)
    ids, mask = ids_of(400, batch=3), torch.ones(3, 400, dtype=torch.long)
    lengths = (200, 256, 400)
    for row, length in enumerate(lengths):
        if side == "left":
            mask[row, : 400 - length] = 0
        else:
            mask[row, length:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, length in enumerate(lengths):
            with seer.record(model) as stats:
                alone = model(ids[row : row + 1, mask[row].bool()]).logits[0]
            assert (stats.sparse_calls > 0) == (length >= 256)
            torch.testing.assert_close(together[row][mask[row].bool()], alone, rtol=1e-4, atol=1e-4)


def test_gates_of_quantized_layers_keep_a_dtype_that_computes(model_of):
    model = model_of()
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        layer.self_attn.q_proj.weight = torch.nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    attached(model)
    assert gates_of(model)[0].k_linear.dtype == torch.float32


def test_trained_gates_draw_no_random_numbers(model_of, tmp_path):
    """The user's seed decides the same after attach as before, and the gates are whole."""
    model = attached(model_of())
    seer.save_gates(model, tmp_path)
    weights = [gate.state_dict() for gate in gates_of(model)]
    model = model_of()
    before = torch.get_rng_state()
    with torch.inference_mode():
        seer.attach(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    for gate, expected in zip(gates_of(model), weights, strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in gate.state_dict().items())
        assert all(value.requires_grad and not value.is_inference() for value in gate.parameters())


def test_attention_maps_asked_for_in_the_config(model_of, ids_of):
    model, ids = model_of(), ids_of(100)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    expected = model(ids).attentions
    attached(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="output_attentions"):
        maps = model(ids).attentions
    for got, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_calibrate_makes_no_logits_of_whole_prompts(model_of, ids_of):
    model = attached(model_of())
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    seer.calibrate(model, [{"input_ids": ids_of(400), "labels": ids_of(400)}], density=0.4)
    hook.remove()
    assert set(shapes) == {1}


def test_compiled_hooks_are_quiet(model_of, ids_of, recwarn):
    model, ids = attached(model_of()), ids_of(100)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids).logits, model(ids).logits)
    assert not [str(warning.message) for warning in recwarn if "Dynamo" in str(warning.message)]


def test_a_compiled_model_is_sparse_and_breaks_its_graph_where_we_say(model_of, ids_of):
    """The hooks look for the forward under way, and the attention function looks at values: both are left out of the
    graph."""
    model, ids = attached(model_of()), ids_of(200)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        expected = model(ids).logits
        with seer.record(model) as stats:
            assert torch.equal(torch.compile(model, backend="eager")(ids).logits, expected)
    assert (stats.sparse_calls, stats.dense_calls) == (2, 0)
    assert 0 < stats.density < 0.6
    breaks = {}
    for reason, count in torch._dynamo.utils.counters["graph_break"].items():
        function = reason.split("<function ")[1].split()[0].split(".")[-1]
        breaks[function] = breaks.get(function, 0) + count
    # Per compiled piece of a frame, so more than one for each place in the code.
    assert breaks == {"_open": 3, "_begin": 3, "_keep": 4, "_attend": 3, "_end": 1}


def test_a_compiled_model_without_a_cache_is_dense_and_says_so(model_of, ids_of):
    """transformers then makes a mask that may hide packed sequences, as it cannot look at the positions in a trace."""
    model, ids = attached(model_of()), ids_of(200)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), seer.record(model) as stats, pytest.warns(UserWarning, match="more than causal"):
        logits = compiled(ids, use_cache=False).logits
    assert (stats.sparse_calls, stats.dense_calls) == (0, 2)
    torch.testing.assert_close(logits, model_of()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.newest
def test_layers_that_are_compiled_each_for_itself(model_of, ids_of):
    """Regional compilation: one layer's code serves all, prompts of one length after the other."""
    model = attached(model_of())
    torch._dynamo.reset()
    with torch.no_grad():
        expected = [model(ids_of(length)).logits for length in (200, 200, 230)]
        for layer in model.model.layers:
            layer.compile(backend="eager")
        with seer.record(model) as stats:
            for length, logits in zip((200, 200, 230), expected, strict=True):
                torch.testing.assert_close(model(ids_of(length)).logits, logits, rtol=1e-5, atol=1e-5)
    assert (stats.sparse_calls, stats.dense_calls) == (6, 0)
