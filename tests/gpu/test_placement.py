"""Models over two GPUs, caches in host memory, and static caches on a GPU."""

from __future__ import annotations

import pytest
import torch

import seerattention as seer
from decode_models import BOTH, SPARSE, attach, generate
from seerattention.hf import gates_of
from tiny_models import make_ids, make_model

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
POLICY = seer.TopK(0.4)


def gated(model):
    return attach(model, SPARSE, BOTH, prefill=POLICY)


def spread(folder, **options):
    """Layers 0 and 1 on the first GPU, 2 and 3 on the second."""
    from transformers import AutoModelForCausalLM

    places = {f"model.layers.{i}": i // 2 for i in range(4)}
    places |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, **options).eval()


@two_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_over_two_gpus(tmp_path, dtype, padded):
    make_model(num_hidden_layers=4, head_dim=64, dtype=dtype, tie_word_embeddings=False).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    one = gated(AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0}).eval())
    two = gated(spread(tmp_path))
    ids = make_ids(300, batch=2).cuda(0)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :70] = 0
    for options in ({}, {"prefill_chunk_size": 64}, {"use_cache": False}):
        expected = generate(one, ids, 12, attention_mask=mask, **options)
        with seer.record(two) as stats:
            found = generate(two, ids, 12, attention_mask=mask, **options)
        assert stats.prompt_density < 0.8
        assert stats.sparse_calls >= 4 * 12
        assert torch.equal(found[0].cpu(), expected[0].cpu())
        torch.testing.assert_close(found[1].cpu(), expected[1].cpu(), rtol=1e-3, atol=1e-3)
    assert [next(gate.parameters()).device.index for gate in gates_of(two)] == [0, 0, 1, 1]
    assert [next(gate.parameters()).device.index for gate in gates_of(two, "decode")] == [0, 0, 1, 1]


@two_gpus
def test_device_map_auto(tmp_path):
    from transformers import AutoModelForCausalLM

    make_model(num_hidden_layers=4, head_dim=64, tie_word_embeddings=False).save_pretrained(tmp_path)
    limits = {0: "150KB", 1: "10GB"}  # so that it does not fit on one
    model = gated(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory=limits).eval())
    plain = gated(AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0}).eval())
    ids = make_ids(300)
    expected, found = (generate(each, ids.to(each.device), 8) for each in (plain, model))
    assert torch.equal(found[0].cpu(), expected[0].cpu())


def test_weights_in_host_memory(tmp_path):
    """Layers 2 and 3 are brought to the GPU for their forward; their gates stay there."""
    from transformers import AutoModelForCausalLM

    make_model(num_hidden_layers=4, head_dim=64, tie_word_embeddings=False).save_pretrained(tmp_path)
    places = {f"model.layers.{i}": 0 if i < 2 else "cpu" for i in range(4)}
    places |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    model = gated(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places).eval())
    plain = gated(AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0}).eval())
    ids = make_ids(300).cuda()
    expected, found = generate(plain, ids, 8), generate(model, ids, 8)
    assert torch.equal(found[0], expected[0])
    assert {p.device.type for gate in gates_of(model) for p in gate.parameters()} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 64}], ids=str)
def test_static_caches(dtype, options):
    """``generate`` compiles decoding on them: with gates for it, the graph breaks at the layers that look at values."""
    model, ids = gated(make_model(head_dim=64, dtype=dtype).cuda()), make_ids(300).cuda()
    expected = generate(model, ids, 8, **options)
    with seer.record(model) as stats:
        found = generate(model, ids, 8, cache_implementation="static", disable_compile=True, **options)
    assert stats.dense_calls == 0
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=2e-2, atol=2e-2)
    compiled = generate(model, ids, 8, cache_implementation="static", **options)
    assert torch.equal(compiled[0], expected[0])


def test_compiled_decoding_without_gates_for_it():
    model, ids = make_model(head_dim=64).cuda(), make_ids(300).cuda()
    torch.manual_seed(1)
    seer.attach(model, seer.GateConfig(), prefill=POLICY, min_context=0)
    expected = generate(model, ids, 8)
    found = generate(model, ids, 8, cache_implementation="static")
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_steps_that_look_like_prompts(options):
    model, ids = gated(make_model(head_dim=64).cuda()), make_ids(150).repeat(1, 2).cuda()
    expected, found = generate(model, ids, 16), generate(model, ids, 16, **options)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-3)


def test_caches_in_host_memory():
    """Prompts are sparse; decoding is dense, with one warning."""
    model, ids = gated(make_model(head_dim=64).cuda()), make_ids(300).cuda()
    with pytest.warns(UserWarning, match="does not hold the keys"), seer.record(model) as stats:
        generate(model, ids, 4, cache_implementation="offloaded")
    assert (stats.sparse_calls, stats.prompt_density < 1) == (2, True)
