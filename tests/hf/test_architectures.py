"""Probe of each family: the captured tensors, rotated, are what attention receives; and where decoders are found."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import seerattention as seer
from seerattention.hf import FAMILIES, find_decoder
from tiny_models import CONFIGS

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
PHI3_SCALINGS = {
    "default": SCALINGS["default"],
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        "long_factor": [float(factor) for factor in range(1, 9)],
        "original_max_position_embeddings": 64,
    },
    "partial": PARTIAL,
}
OWN_SCALINGS = {
    "phi3": PHI3_SCALINGS,
    "glm4": {**SCALINGS, "partial": PARTIAL},
    # Its layer types have rotary parameters of their own, of which transformers 5.3 cannot read YaRN's.
    "gemma3_text": {
        "default": SCALINGS["default"],
        "llama3": SCALINGS["llama3"],
        "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    },
}
SCALED = [
    (family, scaling, parameters)
    for family in CONFIGS
    for scaling, parameters in OWN_SCALINGS.get(family, SCALINGS).items()
]


def probe(model: nn.Module, ids: torch.Tensor, **inputs: torch.Tensor) -> list[seer.LayerInputs]:
    seen: list[seer.LayerInputs] = []
    with torch.inference_mode(), seer.observe(model, lambda layer_inputs, blocks: seen.append(layer_inputs)):
        model(ids, **inputs)
    return seen


def rotate(model: nn.Module, inputs: seer.LayerInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """As the model's own modelling file does it."""
    attention = model.model.layers[inputs.layer].self_attn
    rotation = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    q, k = inputs.q_pre, inputs.k_pre
    if FAMILIES[model.config.model_type].interleaved:
        q, k = (neighbours(x, inputs.cos.shape[-1]) for x in (q, k))
    return rotation(q, k, inputs.cos, inputs.sin)


def neighbours(x: torch.Tensor, width: int) -> torch.Tensor:
    """Channels that are half of ``width`` apart, side by side."""
    pairs = torch.stack((x[..., : width // 2], x[..., width // 2 : width]), -1).flatten(-2)
    return torch.cat((pairs, x[..., width:]), -1)


def for_family(family: str, parameters: dict) -> dict:
    """Rotary parameters as the config of a family takes them."""
    parameters = copy.deepcopy(parameters)  # some configs edit theirs
    sliding = {"sliding_attention": dict(SCALINGS["default"]), "full_attention": parameters}
    return sliding if family == "gemma3_text" else parameters


@pytest.mark.parametrize(("family", "scaling", "parameters"), SCALED, ids=[f"{f}-{s}" for f, s, _ in SCALED])
def test_captured_tensors_rotated_are_the_attention_inputs(model_of, ids_of, family, scaling, parameters):
    model = model_of(family, rope_parameters=for_family(family, parameters))
    seer.attach(model, seer.GateConfig(), min_context=0)
    seen = probe(model, ids_of(130, batch=2))
    assert [inputs.layer for inputs in seen] == ([1, 2] if family == "gemma3_text" else [0, 1])
    for inputs in seen:
        q, k = rotate(model, inputs)
        assert torch.equal(q, inputs.q)
        assert torch.equal(k, inputs.k)
        assert inputs.lengths is None
        scale = {"gemma3_text": 40**-0.5, "granite": 0.4}.get(family, inputs.q.shape[-1] ** -0.5)
        assert inputs.scale == pytest.approx(scale)
    if scaling in ("yarn", "longrope"):  # which scale the rotary table itself
        assert seen[0].cos.max() > 1.0


def test_captured_tensors_of_a_left_padded_batch_begin_with_the_content(model_of, ids_of, family):
    model = model_of(family)
    seer.attach(model, seer.GateConfig(), min_context=0)
    ids, mask = ids_of(130, batch=2), torch.ones(2, 130, dtype=torch.long)
    mask[0, :51] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = probe(model, ids, attention_mask=mask, position_ids=positions)[0]
    alone = probe(model, ids[:1, 51:])[0]
    assert padded.lengths is not None
    assert padded.lengths.tolist() == [79, 130]
    for name in ("q", "k", "v", "q_pre", "k_pre"):
        torch.testing.assert_close(getattr(padded, name)[:1, :, :79], getattr(alone, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.cos[:1, :79], alone.cos)


def test_unsupported_family_is_named_with_the_supported_ones():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=10))
    with pytest.raises(ValueError, match=r"'gpt2'.*llama.*mistral.*phi3.*qwen2.*qwen3"):
        seer.attach(model, seer.GateConfig())


def test_no_model_is_a_type_error():
    with pytest.raises(TypeError, match="Module"):
        seer.attach("meta-llama/Llama-3.1-8B", seer.GateConfig())  # type: ignore[arg-type]


def test_decoder_is_found_through_wrappers(model_of):
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

    model = model_of()
    assert find_decoder(model) is model.model
    assert find_decoder(Wrapper(Wrapper(model))) is model.model
    assert find_decoder(torch.compile(model)) is model.model


def test_two_decoders_are_refused(model_of):
    with pytest.raises(ValueError, match="2 decoders"):
        find_decoder(nn.ModuleList([model_of(), model_of()]))


def test_adapters_that_come_after_attach_are_followed(model_of, ids_of):
    """An adapter replaces q_proj by a module that adds to it: gates must see the sum."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base = base
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    model = model_of()
    seer.attach(model, seer.GateConfig(), min_context=0)
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    inputs = probe(model, ids_of(100))[1]
    q, _ = apply_rotary_pos_emb(inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin)
    assert torch.equal(q, inputs.q)
