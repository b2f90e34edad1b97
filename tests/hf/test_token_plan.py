"""Layers that repeat in a decoding step what the first of them found out, and what comes between them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

pytest.importorskip("triton")

import seerattention as seer
from decode_models import BLOCK, FINE_DECODE, SPARSE, attach, feed, generate
from plan_cases import attention_of, with_changed
from seerattention.gates import TokenStep, step
from seerattention.hf import attention as seer_attention
from seerattention.hf.forward import present_plan
from seerattention.hf.state import state_of
from seerattention.hf.token_plan import TokenPlan
from seerattention.ops import dispatch, replay, triton_launch
from seerattention.policies import REPLAYED
from tiny_models import make_ids, make_model

pytestmark = pytest.mark.usefixtures("launched")

LAYERS, PROMPT, TOKENS = 3, 93, 7  # over the end of a block
FORMS = {
    "published": seer.DecodeGateConfig(block_size=BLOCK),
    "fine": FINE_DECODE,
    "window": seer.DecodeGateConfig(block_size=BLOCK, k_pitch=4, merge_heads=False, query_window=4),
    "plain": seer.DecodeGateConfig(block_size=BLOCK, qk_norm=False, rope=False),
}


class Mixing:
    """In the place of the kernels of a step, which take seconds in the interpreter: one that mixes all that it reads
    into the lists and into the result, with the memory, shapes and strides that it is given."""

    def __getitem__(self, grid):
        return self.run

    @staticmethod
    def run(*args):
        *tensors, outputs, number, views = args
        tensors = [x.as_strided(*view) for x, view in zip(tensors, views, strict=True)]
        inputs, results = tensors[:-outputs], tensors[-outputs:]
        total = sum((0.3 + 0.1 * i) * x.float().cumsum(-1).mean() for i, x in enumerate(inputs))
        for x in results:
            x.copy_((100 * (total + number)).round() % 1000 if x.dtype == torch.int32 else total + number)
        if results[0].dtype != torch.int32:
            results[0].add_(inputs[0])


def mixed(inputs, results, number):
    views = [(x.shape, x.stride()) for x in (*inputs, *results)]
    triton_launch.launch(Mixing(), (1,), *inputs, *results, len(results), number, views)
    return tuple(results)


def mix_lists(asked):
    number = sum(map(ord, repr((asked.policy, asked.gate.config)))) / 1000
    batch, heads, device = len(asked.keys), asked.gate.num_kv_heads, asked.keys.device
    lists = [torch.empty(batch, heads, 1, *end, dtype=torch.int32, device=device) for end in ((3,), ())]
    return mixed(asked.asked, lists, number)


def mix_attention(asked, indices, counts):
    return mixed((*asked.attended, indices, counts), [torch.empty_like(asked.attended[0])], asked.scale)


@pytest.fixture
def launched(monkeypatch, request):
    """Steps are recorded and replayed as on a GPU."""
    for name in ("_LISTS", "_ATTENTION"):
        monkeypatch.setattr(step, name, replay.Replays(passing=True))
    if "on_a_gpu" in request.fixturenames:
        return
    monkeypatch.setattr(TokenStep, "takes", staticmethod(lambda policy, device: type(policy) in REPLAYED))
    monkeypatch.setattr(TokenStep, "_lists", mix_lists)
    monkeypatch.setattr(TokenStep, "_attend", mix_attention)
    monkeypatch.setattr(replay, "_launcher", lambda device: triton_launch)
    monkeypatch.setattr(triton_launch, "ready", lambda device: True)


@pytest.fixture
def repeats(monkeypatch):
    """Indices of the layers that repeated a plan, and of those that launched its recording."""
    repeated, replayed = [], []
    for name, found in (("attend", repeated), ("_replay", replayed)):
        original = getattr(TokenPlan, name)

        def noting(plan, first, *others, original=original, found=found):
            index = plan.forward.call.layer.index if not others else first.layer.index
            if (out := original(plan, first, *others)) is not None:
                found.append(index)
            return out

        monkeypatch.setattr(TokenPlan, name, noting)
    return repeated, replayed


@pytest.fixture
def without_plans(monkeypatch):
    """A function that calls another one without plans: the same kernels."""
    return with_changed(monkeypatch, seer_attention, "make_token_plan", lambda *given: None)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """A function that calls another one where no kernels run: the reference."""
    return with_changed(monkeypatch, dispatch, "device_type", lambda device: "cpu")


def make(form="published", family="llama", decode=SPARSE, **options):
    model = make_model(family, **({} if family == "gemma3_text" else {"num_hidden_layers": LAYERS}), **options)
    return attach(model, decode, seer.GateConfig(block_size=32, prefill=None, decode=FORMS[form]))


def decoded(model, ids=None, tokens=TOKENS, between=None, batch=1):
    """Logits of the tokens after a prompt, fed one by one."""
    ids = make_ids(PROMPT + tokens, batch=batch) if ids is None else ids
    cache, logits = DynamicCache(config=model.config), []
    feed(model, ids[:, :PROMPT], cache)
    for end in range(PROMPT, PROMPT + tokens):
        if between is not None:
            between(cache, end)
        logits.append(feed(model, ids[:, end : end + 1], cache))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_layers_repeat_what_the_first_one_did(form, batch, repeats, without_plans):
    model = make(form)
    found = decoded(model, batch=batch)
    repeated, replayed = repeats
    assert repeated == (TOKENS - 1) * [1, 2]  # in the first step nothing is kept yet
    # Not those steps in which a part of a block, or a block, is begun or completed.
    assert len(replayed) >= 2 * (2 if form in ("fine", "window") else TOKENS - 4)
    assert torch.equal(found, without_plans(lambda: decoded(model, batch=batch)))


@pytest.mark.newest
@pytest.mark.parametrize("form", ["published", "window"])
@pytest.mark.usefixtures("on_a_gpu", "real_kernels")
def test_with_the_kernels(form, repeats, on_the_cpu):
    """Interpreted, against the reference."""
    model = make(form)
    found = decoded(model, tokens=4)
    assert repeats[0] == 3 * [1, 2]
    assert repeats[1] != []
    torch.testing.assert_close(found, on_the_cpu(lambda: decoded(model, tokens=4)), rtol=1e-4, atol=1e-4)


def test_of_every_family(family, repeats, without_plans):
    model = make(family=family)
    found = decoded(model, tokens=6)
    assert torch.equal(found, without_plans(lambda: decoded(model, tokens=6)))
    repeated, replayed = repeats
    gated = [layer.index for layer in state_of(model).layers if layer.decode_gate is not None]
    assert repeated == 5 * gated[1:]
    assert bool(replayed) == (family != "glm4")  # its channels are put in another order, which is more than a view


@pytest.mark.parametrize("policy", [seer.RelativeThreshold(1.0), seer.TopK(0.4), seer.Threshold(0.1)], ids=str)
def test_other_policies(policy, repeats, without_plans):
    model = make(decode=policy)
    found = decoded(model)
    assert torch.equal(found, without_plans(lambda: decoded(model)))
    assert repeats[0] == (TOKENS - 1) * [1, 2]


@torch.inference_mode()
def test_generation_in_inference_mode(repeats, without_plans):
    model, ids = make("window"), make_ids(PROMPT)
    tokens, logits = generate(model, ids, tokens=8)
    assert len(repeats[0]) == 2 * 6  # the prompt gives the first token, and the first step keeps
    expected = without_plans(lambda: generate(model, ids, tokens=8))
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])


def test_what_is_kept_goes_on_in_another_mode(without_plans):
    def run():
        cache, ids = DynamicCache(config=model.config), make_ids(PROMPT + 8)
        with torch.inference_mode():
            for part in (ids[:, :PROMPT], *ids[:, PROMPT : PROMPT + 4].split(1, 1)):
                feed(model, part, cache)
        cache = copy.deepcopy(cache)
        return torch.cat([feed(model, part, cache) for part in ids[:, PROMPT + 4 :].split(1, 1)], 1)

    model = make()
    assert torch.equal(run(), without_plans(run))


CHANGES = {
    "crop": lambda cache, layer: cache.crop(-2),
    "keys_of_one_layer": lambda cache, layer: setattr(layer, "keys", layer.keys.clone()),
    "reorder": lambda cache, layer: cache.reorder_cache(torch.tensor([1, 0])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_cache_that_changes_between_steps(change, without_plans):
    def between(cache, end):
        if end % 5 == 4:
            change(cache, cache.layers[1])

    model = make("window")
    found = decoded(model, between=between, batch=2)
    expected = without_plans(lambda: decoded(model, between=between, batch=2))
    assert torch.equal(found, expected)


def test_layers_that_decide_otherwise(repeats, without_plans):
    """A policy of its own, another gate, dense, and other parameters."""
    model = make()
    state = state_of(model)
    seer.set_policy(model, layers={1: {"decode": seer.TokenBudget(3 * BLOCK)}})
    found = decoded(model)
    assert repeats[0] == []  # layer 1 leaves a plan in place of that of layer 0
    assert torch.equal(found, without_plans(lambda: decoded(model)))
    seer.set_policy(model, layers={0: {"decode": seer.Dense()}})
    with torch.no_grad():
        state.layers[2].decode_gate.q_linear.mul_(-1)
    repeats[0].clear()
    changed = decoded(model)
    assert torch.equal(changed, without_plans(lambda: decoded(model)))
    assert not torch.equal(found, changed)
    assert repeats[0] == []


def test_what_is_seen_is_counted(repeats):
    model, ids = make(), make_ids(PROMPT + 3)
    cache = DynamicCache(config=model.config)
    feed(model, ids[:, :PROMPT], cache)
    with seer.dense(model):
        feed(model, ids[:, PROMPT : PROMPT + 1], cache)
    with seer.record(model) as stats:
        feed(model, ids[:, PROMPT + 1 : PROMPT + 2], cache)
    assert stats.sparse_calls == LAYERS
    assert repeats[0] == []
    feed(model, ids[:, PROMPT + 2 :], cache)
    assert repeats[0] == [1, 2]


def test_a_policy_that_changes_while_a_step_is_under_way(repeats):
    model = make()
    hook = attention_of(model, 1).register_forward_pre_hook(
        lambda *_: seer.set_policy(model, decode=seer.TokenBudget(3 * BLOCK)) and None
    )
    decoded(model, tokens=2)
    hook.remove()
    assert repeats[0] == [2]  # the first layer's plan is over, and layer 1 left another one


def test_training_is_noticed(repeats):
    model, ids = make(), make_ids(PROMPT + 3)
    cache = DynamicCache(config=model.config)
    feed(model, ids[:, :PROMPT], cache)
    feed(model, ids[:, PROMPT : PROMPT + 1], cache)
    feed(model, ids[:, PROMPT + 1 : PROMPT + 2], cache)
    assert repeats[0] == [1, 2]
    attention_of(model, 1).train()
    with pytest.warns(UserWarning, match="training mode"):
        feed(model, ids[:, PROMPT + 2 :], cache)
    assert repeats[0] == [1, 2, 2]


def test_nothing_stays_behind():
    model = make()
    cache = DynamicCache(config=model.config)
    feed(model, make_ids(PROMPT), cache)
    feed(model, make_ids(1), cache)
    assert present_plan() is None
    keys = weakref.ref(cache.layers[0].keys)
    del cache
    gc.collect()
    assert keys() is None
