"""Layers that repeat what another one did notice where they differ from it, and what repeating saves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from call_counts import count_calls
from plan_cases import LENGTH, ODD, attention_of, in_chunks, make, same
from seerattention.gates import build_gate
from seerattention.hf import gates_of
from seerattention.hf.state import state_of
from tiny_models import attach, logits_of, make_ids, make_model

pytestmark = pytest.mark.usefixtures("on_a_gpu")
launch = pytest.importorskip("seerattention.ops.triton_launch")

# What differs in one layer: that layer does what it would do by itself, and the others repeat. ------------------------


def another_policy(model):
    state_of(model).layers[ODD].set_phase("prefill", policy=seer.TopK(0.9))


def another_form(model):
    layer, spec = (
        state_of(model).layers[ODD],
        seer.GateConfig(block_size=32, prefill=seer.PrefillGateConfig(q_pooling=("max", "avg"))).spec_of("prefill"),
    )
    gate = build_gate(spec, num_heads=4, num_kv_heads=2, head_dim=16, block_size=32)
    layer.set_phase("prefill", gate=gate.half())


def no_gate(model):
    state_of(model).layers[ODD].set_phase("prefill", gate=None)


def a_dense_policy(model):
    state_of(model).layers[ODD].set_phase("prefill", policy=seer.Dense())


def a_hook_on_the_gate(model):
    gates_of(model)[ODD].register_forward_hook(lambda gate, args, out: -out)


def a_gate_in_float32(model):
    gates_of(model)[ODD].float()


def parameters_of_other_strides(model):
    parameter = gates_of(model)[ODD].k_linear
    parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)


def another_scale(model):
    attention_of(model).scaling *= 2


def not_causal(model):
    attention_of(model).is_causal = False


def a_window(model):
    layer = state_of(model).layers[ODD]
    layer.geometry = dataclasses.replace(layer.geometry, window=32)


def training(model):
    attention_of(model).train()


def another_table(model):
    def turn(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (sin, cos)}

    attention_of(model).register_forward_pre_hook(turn, with_kwargs=True, prepend=True)


def another_mask(model):
    def put(module, args, kwargs):
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        mask[40:, 3] = False
        return args, {**kwargs, "attention_mask": mask[None, None]}

    attention_of(model).register_forward_pre_hook(put, with_kwargs=True, prepend=True)


def other_positions(model):
    def put(module, args, kwargs):
        positions = torch.cat((torch.arange(40), torch.arange(LENGTH - 40)))[None]
        return args, {**kwargs, "position_ids": positions}

    attention_of(model).register_forward_pre_hook(put, with_kwargs=True, prepend=True)


def autocast(model):
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    layer = state_of(model).layers[ODD].decoder_layer
    layer.register_forward_pre_hook(lambda *_: context.__enter__() and None)
    layer.register_forward_hook(lambda module, args, out: context.__exit__(None, None, None) or out.half())


def other_strides(model):
    def hook(module, args, output):
        wide = output.new_zeros(*output.shape[:-1], output.shape[-1] + 16)
        wide[..., : output.shape[-1]] = output
        return wide[..., : output.shape[-1]]

    attention_of(model).q_proj.register_forward_hook(hook, prepend=True)


def another_alignment(model):
    def hook(module, args, output):
        flat = output.new_empty(output.numel() + 1)[1:]
        return flat.view(output.shape).copy_(output)

    attention_of(model).q_proj.register_forward_hook(hook, prepend=True)


CHANGES = [
    another_policy, another_form, no_gate, a_dense_policy, a_hook_on_the_gate, a_gate_in_float32,
    parameters_of_other_strides, another_scale, not_causal, a_window, training, another_table, another_mask,
    other_positions, autocast, other_strides, another_alignment,
]  # fmt: skip

SAME_RESULT = (other_positions, a_gate_in_float32, parameters_of_other_strides, other_strides, another_alignment)


OF_WHOLE_PROMPTS = (another_mask, other_positions)  # which they make
CASES = [(change, False) for change in CHANGES]
CASES += [(change, True) for change in CHANGES if change not in OF_WHOLE_PROMPTS]


@pytest.mark.parametrize(("change", "chunked"), CASES, ids=lambda x: x if isinstance(x, bool) else x.__name__)
@pytest.mark.filterwarnings("ignore:seerattention. this forward is attended densely")
def test_what_differs_in_a_layer_is_noticed(change, chunked, repeated, ordinary):
    model, ids = make(), make_ids(LENGTH, seed=7)

    def run():
        return in_chunks(model, ids, [34])[:, 34:] if chunked else logits_of(model, ids)

    for _ in range(2):
        before = run()
    change(model)
    expected = ordinary(run)
    assert torch.equal(expected, before) is (change in SAME_RESULT)
    for _ in range(3):  # in the last one what the layer launches is a recording of its own
        repeated.clear()
        same(run(), expected)
    assert ODD not in repeated
    assert repeated.count(1) == 1 + chunked


# What it costs -------------------------------------------------------------------------------------------------------

# Calls of Python and C that a layer makes more than a dense one; 296 before there were plans.
MOST_CALLS = 70


class Unlaunched(launch.Ordinary):
    """A launch that does nothing, with addresses in its arguments as compiled kernels have them."""

    def forgotten(self, value):
        return None, False

    def bind(self, args, places, stream):
        return launch._step(lambda *args: None, (), args, places)


@pytest.mark.parametrize("held", [0, 40, 64])
def test_calls_that_a_layer_adds_are_few(held, monkeypatch, real_kernels):
    """Of a whole prompt, and of chunks that begin inside of a block, or with one."""
    monkeypatch.setattr(launch, "Ordinary", Unlaunched)
    ids = make_ids(held + LENGTH)
    counts = {}
    for attached in (False, True):
        for layers in (3, 8):
            model = make_model("llama", dtype=torch.float16, num_hidden_layers=layers)
            if attached:
                attach(model, seer.TopK(0.2))
            for _ in range(4):
                options: dict = {"use_cache": False}
                if held:
                    options = {"past_key_values": DynamicCache(config=model.config)}
                    logits_of(model, ids[:, :held], **options)
                counts[attached, layers] = count_calls(
                    lambda: logits_of(model, ids[:, held:], logits_to_keep=1, **options)  # noqa: B023
                )
    dense, sparse = ((counts[attached, 8] - counts[attached, 3]) / 5 for attached in (False, True))
    assert sparse - dense <= MOST_CALLS, f"{sparse:.1f} calls a layer, {dense:.1f} of a dense one"
    assert sparse > dense
