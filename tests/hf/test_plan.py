"""Layers that repeat what another one did: what they may repeat, what they notice, and what it costs.

Kernels run in Triton's interpreter, as if the CPU were a GPU; ``tests/gpu/test_replay.py`` does it on one.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import seerattention as seer
from seerattention import selectors
from seerattention.gates import build_gate
from seerattention.hf import attention as seer_attention
from seerattention.hf import gates_of
from seerattention.hf.forward import present_plan
from seerattention.hf.plan import Plan
from seerattention.hf.state import state_of
from seerattention.ops import block_sparse_attention, dispatch, replay
from seerattention.ops.indices import BlockIndices
from tiny_models import attach, logits_of, make_ids, make_model

pytest.importorskip("triton")
launch = pytest.importorskip("seerattention.ops.triton_launch")

LAYERS, LENGTH = 3, 70
ODD = 2  # the layer in which something differs


class Mixing:
    """In the place of the kernels of a layer, which take seconds in the interpreter: one that mixes all that they read.

    It gets memory, shapes and strides, as kernels do."""

    def __getitem__(self, grid):
        return self.run

    @staticmethod
    def run(*args):
        *inputs, out, number, views = args
        *inputs, out = (x.as_strided(*view) for x, view in zip((*inputs, out), views, strict=True))
        q, k, v, q_pre, k_pre, cos, sin, *parameters = (x.float() for x in inputs)
        group = q.shape[1] // k.shape[1]
        k, v, k_pre = (x.repeat_interleave(group, 1).cumsum(2) / x.shape[2] for x in (k, v, k_pre))
        turn = (cos - 2 * sin)[:, None].mean(-1, keepdim=True)
        weight = sum(x[0].mean(0).sum() for x in parameters)
        out.copy_(q + 2 * k + 3 * v + (q_pre + 2 * k_pre) * turn + weight + number)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch, request):
    """The CPU passes for a GPU, on which kernels are interpreted."""
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU")
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    monkeypatch.setattr(launch, "ready", lambda device: True)
    monkeypatch.setattr(selectors, "_LAYERS", replay.Replays())
    if "real_kernels" in request.fixturenames:
        return

    def mix(q, k, v, chosen, scale):
        inputs, policy = chosen
        tensors = [q, k, v, inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin, *inputs.gate.replayed()[0]]
        tensors.append(torch.empty_like(q))
        number = scale * sum(map(ord, repr(policy))) / 1000
        views = [(x.shape, x.stride()) for x in tensors]
        launch.launch(Mixing(), (1,), *tensors, number, views)
        return tensors[-1]

    def select(selector, inputs):
        rows = -(-inputs.q.shape[2] // 32)
        return BlockIndices.from_mask(torch.ones(1, inputs.q.shape[1], rows, rows, dtype=torch.bool), 32)

    def attend(*tensors, scale):
        return block_sparse_attention(*tensors, scale=scale, implementation="reference")

    monkeypatch.setattr(selectors.GateSelector, "_select", lambda selector, inputs: (inputs, selector.policy))
    monkeypatch.setattr(selectors, "block_sparse_attention", mix)
    monkeypatch.setattr(selectors.GateSelector, "select", select)
    monkeypatch.setattr(seer_attention, "block_sparse_attention", attend)


@pytest.fixture
def real_kernels():
    """Asks for the package's own."""


@pytest.fixture
def repeated(monkeypatch):
    """Indices of the layers that repeated a plan."""
    found, attend = [], Plan.attend

    def noting(plan, arguments):
        call = plan.forward.call
        out = attend(plan, arguments)
        if out is not None:
            found.append(call.layer.index)
        return out

    monkeypatch.setattr(Plan, "attend", noting)
    return found


@pytest.fixture
def ordinary(monkeypatch):
    """A function that calls another one without plans."""

    def run(function):
        with monkeypatch.context() as changed:
            changed.setattr(seer_attention, "make_plan", lambda *given: None)
            return function()

    return run


def make(family="llama", policy=None, **options):
    """An attached model whose kernels are compiled and recorded: from the next forward on all are replays."""
    if family != "gemma3_text":
        options = {"num_hidden_layers": LAYERS, **options}
    model = attach(make_model(family, dtype=torch.float16, **options), policy or seer.TopK(0.4))
    for seed in range(2):
        logits_of(model, make_ids(LENGTH, seed=seed))
    return model


def attention_of(model, index=ODD) -> nn.Module:
    return state_of(model).layers[index].attention


def same(found, expected):
    assert not expected.isnan().any()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("use_cache", [False, True])
def test_layers_repeat_what_the_first_one_did(family, use_cache, repeated, ordinary):
    model = make(family)
    logits_of(model, make_ids(LENGTH), use_cache=use_cache)  # of a cache keys have other strides
    repeated.clear()
    for seed in (3, 4):
        ids = make_ids(LENGTH, seed=seed)
        found = logits_of(model, ids, use_cache=use_cache)
        same(found, ordinary(lambda ids=ids: logits_of(model, ids, use_cache=use_cache)))
    gated = [index for index, gate in enumerate(gates_of(model)) if gate is not None]
    # GLM-4's queries and keys are put in another order, which is more than a view.
    assert repeated == ([] if family == "glm4" else 2 * gated[1:])


@pytest.mark.parametrize("policy", [seer.TopK(0.4), seer.RelativeThreshold(1.0)], ids=str)
def test_kernels_of_the_package_are_repeated(policy, repeated, ordinary, real_kernels):
    model = make(policy=policy)
    repeated.clear()
    same(logits_of(model, make_ids(LENGTH)), ordinary(lambda: logits_of(model, make_ids(LENGTH))))
    assert repeated == [1, 2]


def test_another_length_begins_anew(repeated, ordinary):
    model = make()
    for length in (71, 71, LENGTH, 140, 140, 71):
        ids = make_ids(length, seed=length)
        repeated.clear()
        found = logits_of(model, ids)
        same(found, ordinary(lambda ids=ids: logits_of(model, ids)))
    assert repeated == [1, 2]


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


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:seerattention. this forward is attended densely")
def test_what_differs_in_a_layer_is_noticed(change, repeated, ordinary):
    model, ids = make(), make_ids(LENGTH, seed=7)
    before = logits_of(model, ids)
    change(model)
    expected = ordinary(lambda: logits_of(model, ids))
    assert torch.equal(expected, before) is (change in SAME_RESULT)
    for _ in range(3):  # in the last one what the layer launches is a recording of its own
        repeated.clear()
        same(logits_of(model, ids), expected)
    assert ODD not in repeated
    assert 1 in repeated


def test_gradients_are_noticed(repeated):
    """Of values alone, as an adapter may train them, and from one layer on only."""
    model, ids = make(), make_ids(LENGTH, seed=7)
    state, attention = state_of(model), attention_of(model)
    model.requires_grad_(False)
    with torch.no_grad():
        model(ids)
    state.layers[ODD].decoder_layer.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None)
    attention.v_proj.weight.requires_grad_(True)
    repeated.clear()
    with torch.no_grad(), pytest.warns(UserWarning, match="gradients are recorded"):
        out = model(ids).logits
    assert out.requires_grad
    assert repeated == [1]


def test_what_everybody_sees_is_repeated_by_nobody(repeated):
    model, ids = make(), make_ids(LENGTH)
    repeated.clear()
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert stats.sparse_calls == LAYERS
    with seer.dense(model):
        logits_of(model, ids)
    logits_of(model, ids, attention_mask=(torch.arange(LENGTH) >= 5)[None].long())
    logits_of(model, ids)
    assert repeated == [1, 2]  # of the last forward


def test_chunks_and_decoding_are_not(repeated, ordinary):
    model, ids = make(), make_ids(100)
    repeated.clear()

    @torch.inference_mode()
    def run():
        cache = model(ids[:, :LENGTH], use_cache=True).past_key_values
        model(ids[:, LENGTH:99], past_key_values=cache)
        return model(ids[:, 99:], past_key_values=cache).logits

    found = run()
    assert repeated == [1, 2]
    same(found, ordinary(run))


def test_a_change_while_a_forward_is_under_way(repeated):
    """``set_policy`` and ``min_context`` from elsewhere, another implementation, and detach."""
    model, ids = make(), make_ids(LENGTH)
    state = state_of(model)
    repeated.clear()
    hook = state.layers[1].decoder_layer.register_forward_hook(lambda *_: setattr(state, "min_context", 1000) or None)
    logits_of(model, ids)
    assert repeated == [1]
    hook.remove()
    state.min_context = 0
    hook = state.layers[1].decoder_layer.register_forward_hook(lambda *_: seer.set_policy(model, seer.TopK(0.8)))
    repeated.clear()
    logits_of(model, ids)
    assert repeated == [1]
    hook.remove()
    hook = state.layers[1].decoder_layer.register_forward_hook(
        lambda *_: model.set_attn_implementation("sdpa") and None
    )
    with pytest.raises(RuntimeError, match="was changed to 'sdpa'"):
        logits_of(model, ids)
    hook.remove()
    model.set_attn_implementation("seer")
    state.layers[1].decoder_layer.register_forward_hook(lambda *_: seer.detach(model) and None)
    with pytest.raises(RuntimeError, match="gates were detached"):
        logits_of(model, ids)


def test_attention_that_does_not_come_to_the_attention_function_is_missed(repeated):
    model, ids = make(), make_ids(LENGTH)
    attention = attention_of(model)
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.warns(UserWarning, match="layers 2 are not attended"):
        logits_of(model, ids)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["k_proj", "v_proj", "o_proj"])
def test_an_exception_pins_no_tensors(where, error):
    model, kept = make(), []
    attention = attention_of(model)

    def fail(*args):
        raise error("here")

    def keep(module, args, kwargs):
        kept.extend(map(weakref.ref, kwargs["position_embeddings"]))

    attention.q_proj.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    attention.register_forward_pre_hook(keep, with_kwargs=True)
    getattr(attention, where).register_forward_pre_hook(fail)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(error, match="here"):
            logits_of(model, make_ids(LENGTH))
    finally:
        gc.enable()
    gc.collect()
    assert len(kept) == 3
    assert all(ref() is None for ref in kept)


def test_nothing_is_kept_after_a_forward(repeated):
    model, kept, inputs = make(), [], []
    for layer in state_of(model).layers:
        layer.attention.q_proj.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
        layer.attention.q_proj.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    plans = []
    repeated.clear()
    hooked = state_of(model).layers[1].attention
    hooked.register_forward_pre_hook(lambda *_: plans.append(weakref.ref(present_plan())))
    gc.collect()
    gc.disable()
    try:
        logits_of(model, make_ids(LENGTH))
        assert len(kept) == LAYERS
        assert all(ref() is None for ref in (*kept, *plans))  # without a collection
    finally:
        gc.enable()
    assert len(plans) == 1
    assert repeated == [1, 2]
    assert not any(x.__dict__ for x in inputs)


def test_threads_have_plans_of_their_own(repeated):
    model = make()
    ids = [make_ids(LENGTH, seed=seed) for seed in range(3)]
    expected = [logits_of(model, x) for x in ids]
    found, failed = {}, []

    def run(index):
        try:
            for _ in range(3):
                found[index] = logits_of(model, ids[index])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for index in range(3):
        same(found[index], expected[index])


# What it costs -------------------------------------------------------------------------------------------------------

# Calls of Python and C that a layer makes more than a dense one; 296 before there were plans.
MOST_CALLS = 70


class Unlaunched(launch.Ordinary):
    """A launch that does nothing, with addresses in its arguments as compiled kernels have them."""

    def forgotten(self, value):
        return None, False

    def bind(self, args, places, stream):
        return launch._step(lambda *args: None, (), args, places)


def count_calls(function) -> int:
    number = 0

    def note(frame, event, argument):
        nonlocal number
        number += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return number


def test_calls_that_a_layer_adds_are_few(monkeypatch, real_kernels):
    monkeypatch.setattr(launch, "Ordinary", Unlaunched)
    ids = make_ids(LENGTH)
    counts = {}
    for attached in (False, True):
        for layers in (3, 8):
            model = make_model("llama", dtype=torch.float16, num_hidden_layers=layers)
            if attached:
                attach(model, seer.TopK(0.2))
            for _ in range(3):
                logits_of(model, ids, logits_to_keep=1, use_cache=False)
            counts[attached, layers] = count_calls(
                lambda model=model: logits_of(model, ids, logits_to_keep=1, use_cache=False)
            )
    dense, sparse = ((counts[attached, 8] - counts[attached, 3]) / 5 for attached in (False, True))
    assert sparse - dense <= MOST_CALLS, f"{sparse:.1f} calls a layer, {dense:.1f} of a dense one"
    assert sparse > dense
