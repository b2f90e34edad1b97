"""Where weights lie and in which dtype: gates follow, and the model is what it is in memory and in one dtype."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

import seerattention as seer
from decode_models import BOTH, SPARSE, attach, feed, generate
from seerattention.hf import gates_of
from tiny_models import make_model

MAPS = {
    "cpu": {"": "cpu"},
    "disk": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"},
    "all on disk": {"": "disk"},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placed")
    make_model(tie_word_embeddings=False).save_pretrained(folder)
    return folder


def gated(model, **options):
    return attach(model, SPARSE, BOTH, prefill=seer.TopK(0.4), **options)


def check_as_in_memory(placed, saved, ids):
    expected = generate(gated(AutoModelForCausalLM.from_pretrained(saved).eval()), ids, 8)
    for options in ({}, {"prefill_chunk_size": 40}, {"use_cache": False}):
        with seer.record(placed) as stats:
            found = generate(placed, ids, 8, **options)
        assert stats.sparse_calls > 0
        if "prefill_chunk_size" not in options:
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", MAPS)
def test_device_maps_with_offloading(saved, tmp_path, ids_of, place):
    """Weights come from disk for a layer's forward and go again; gates stay where layers compute."""
    model = AutoModelForCausalLM.from_pretrained(
        saved, device_map=MAPS[place], offload_folder=str(tmp_path), offload_state_dict=False
    ).eval()
    if place != "cpu":
        assert next(model.model.layers[1].self_attn.parameters()).is_meta
    try:
        generate(model, ids_of(120), 1)
    except RuntimeError:  # transformers 5.3 cannot make rotary tables on meta, where all is on disk
        if place != "all on disk":
            raise
        with pytest.raises(RuntimeError, match="unknown device type for autocast"):
            generate(gated(model), ids_of(120), 1)
        return
    gated(model)
    check_as_in_memory(model, saved, ids_of(120))
    for phase in ("prefill", "decode"):
        assert {p.device.type for gate in gates_of(model, phase) for p in gate.parameters()} == {"cpu"}
    seer.save_gates(model, tmp_path / "gates")


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_hooks_of_accelerate(saved, tmp_path, ids_of, offload):
    import accelerate

    model = gated(AutoModelForCausalLM.from_pretrained(saved).eval())
    where = {"offload_dir": str(tmp_path)} if offload == "disk_offload" else {}
    getattr(accelerate, offload)(model, execution_device=torch.device("cpu"), **where)
    check_as_in_memory(model, saved, ids_of(120))


def test_models_on_meta_keep_their_gates_whole(model_of):
    """Attached to a model without values: gates have values, and wait for a layer with a place."""
    with torch.device("meta"):
        model = model_of()
    gated(model)
    assert all(p.device.type == "cpu" and p.isfinite().all() for gate in gates_of(model) for p in gate.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(model_of, ids_of, dtype):
    """Gates take the base's dtype. With every block the error is that of dense attention in this dtype."""
    ids = ids_of(150)
    exact = model_of()
    with torch.no_grad():
        reference = exact(ids).logits
        model = model_of(dtype=dtype)
        dense = model(ids).logits.float()
        attach(model, seer.TopK(1.0), BOTH, prefill=seer.TopK(1.0))
        assert {p.dtype for gate in gates_of(model) for p in gate.parameters()} == {dtype}
        found = model(ids).logits.float()
    assert (found - reference).norm() <= 2 * (dense - reference).norm()
    seer.set_policy(model, prefill=seer.TopK(0.4), decode=SPARSE)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 50}):
        with seer.record(model) as stats:
            assert generate(model, ids, 4, **options)[1].isfinite().all()
        assert stats.prompt_density < 0.8


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_no_dtype_of_weights_is_required(model_of, ids_of, dtype):
    """Stand-ins for the layers of quantized bases: integers that a forward of their own makes numbers of."""

    class Quantized(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            packed = (linear.weight.detach() * 50).round().clamp(-127, 127)
            stored = packed.to(dtype) if dtype != torch.uint8 else (packed + 128).to(dtype)
            self.weight = torch.nn.Parameter(stored, requires_grad=False)

        def forward(self, x):
            weight = self.weight.to(x.dtype) - (128 if dtype == torch.uint8 else 0)
            return torch.nn.functional.linear(x, weight / 50)

    model, ids = model_of("llama"), ids_of(150)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Quantized(getattr(layer.self_attn, name)))
    expected = generate(model, ids, 4)[1]
    attach(model, seer.TopK(1.0), BOTH, prefill=seer.TopK(1.0))
    assert all(p.is_floating_point() and p.dtype == torch.float32 for g in gates_of(model) for p in g.parameters())
    torch.testing.assert_close(generate(model, ids, 4)[1], expected, rtol=1e-3, atol=1e-3)
    seer.set_policy(model, prefill=seer.TopK(0.4), decode=SPARSE)
    with seer.record(model) as stats:
        generate(model, ids, 4)
    assert stats.sparse_calls == 8


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(saved, ids_of, bits):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, device_map="auto").eval()
    ids = ids_of(150).to(model.device)
    expected = generate(model, ids, 4)[1]
    attach(model, seer.TopK(1.0), BOTH, prefill=seer.TopK(1.0))
    found = generate(model, ids, 4)[1]
    assert (found - expected).norm() < 0.05 * expected.norm()
    seer.set_policy(model, prefill=seer.TopK(0.4), decode=SPARSE)
    with seer.record(model) as stats:
        assert generate(model, ids, 4)[1].isfinite().all()
    assert stats.sparse_calls == 8


# ---- caches that do not hold keys as they are ------------------------------------------------------------


def quantized_cache(config):
    """A quantized cache whose numbers are 16-bit integers: what a backend does, without one."""
    from transformers.cache_utils import QuantizedLayer

    class Layer(QuantizedLayer):
        def _quantize(self, tensor, axis):
            scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 32767
            return (tensor / scale).round().to(torch.int16), scale

        def _dequantize(self, packed):
            return packed[0].to(packed[1].dtype) * packed[1]

    cache = DynamicCache(config=config)
    cache.layers = [Layer(nbits=4, axis_key=0, axis_value=0, q_group_size=16, residual_length=32) for _ in range(2)]
    return cache


def test_quantized_caches(model_of, ids_of):
    """Prompts are sparse, also in chunks; decoding is dense, with one warning."""
    model, ids = gated(model_of("llama")), ids_of(192)
    with seer.record(model) as stats, torch.no_grad():
        expected = torch.cat([feed(model, part, DynamicCache()) for part in (ids[:, :64],)], 1)
        cache, plain = quantized_cache(model.config), DynamicCache()
        parts = [(feed(model, part, cache), feed(model, part, plain)) for part in ids.split(64, 1)]
    assert stats.dense_calls == 0
    torch.testing.assert_close(parts[0][0], expected)
    for found, wanted in parts:
        assert (found - wanted).norm() < 0.01 * wanted.norm()
    with pytest.warns(UserWarning, match="does not hold the keys of a layer as they are"), seer.record(model) as stats:
        feed(model, ids[:, :1], cache)
    assert stats.sparse_calls == 0


def test_offloaded_caches(model_of, ids_of):
    """Without a GPU nothing can be offloaded to the host: transformers refuses, with gates and without."""
    model, ids = model_of("llama"), ids_of(100)
    if torch.cuda.is_available():
        pytest.skip("see tests/gpu")
    for each in (model, gated(model)):
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            generate(each, ids, 4, cache_implementation="offloaded")
