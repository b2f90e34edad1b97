"""Chunks on a cache are attended by one replay, and their layers repeat what another one did."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

import seerattention as seer
from plan_cases import BY_LAYER, LAYERS, LENGTH, in_chunks, make, same
from seerattention import selectors
from seerattention.hf import gates_of
from seerattention.hf.forward import present_plan
from seerattention.hf.state import state_of
from seerattention.ops import block_sparse_attention, replay
from seerattention.selectors import GateSelector
from tiny_models import attach, logits_of, make_ids, make_model

pytestmark = pytest.mark.usefixtures("on_a_gpu")

CUTS = [[64], [70], [64, 128], [33, 97], [100, 132]]  # of blocks of 32
REPEATING = [1, 2]


def warm(model, ids, cuts):
    for _ in range(3):
        in_chunks(model, ids, cuts)


@pytest.mark.parametrize("policy", [None, BY_LAYER], ids=["alike", "by layer"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_layers_repeat_what_the_first_one_did(cuts, policy, repeated, ordinary):
    model = make(policy=policy)
    warm(model, make_ids(170), cuts)
    for seed in (3, 4):
        ids = make_ids(170, seed=seed)
        repeated.clear()
        same(in_chunks(model, ids, cuts), ordinary(lambda ids=ids: in_chunks(model, ids, cuts)))
        assert repeated == (len(cuts) + 1) * REPEATING


def test_every_family(family, repeated, ordinary):
    model, cuts = make(family), [64, 101]
    warm(model, make_ids(140), cuts)
    repeated.clear()
    found = in_chunks(model, make_ids(140, seed=3), cuts)
    same(found, ordinary(lambda: in_chunks(model, make_ids(140, seed=3), cuts)))
    gated = [index for index, gate in enumerate(gates_of(model)) if gate is not None]
    if family == "glm4":  # whose queries and keys are put in another order, which is more than a view
        assert repeated == []
    elif family == "mistral":  # of which later chunks reach behind the window
        assert set(repeated) <= set(gated[1:])
    else:
        assert repeated == 3 * gated[1:]


@pytest.mark.parametrize("cut", [32, 40])
def test_kernels_of_the_package_are_repeated(cut, repeated, real_kernels, monkeypatch):
    """As blocks are selected and attended in two steps, layer by layer, without any replay."""
    model, ids = (
        attach(make_model("llama", dtype=torch.float16, num_hidden_layers=LAYERS), seer.TopK(0.4)),
        make_ids(96),
    )
    for _ in range(3):
        repeated.clear()
        found = in_chunks(model, ids, [cut])
    assert repeated == 2 * REPEATING
    monkeypatch.setattr(GateSelector, "_replayed", lambda selector, inputs: None)
    same(found, in_chunks(model, ids, [cut]))
    assert repeated == 2 * REPEATING
    with seer.dense(model):
        assert not torch.equal(found, in_chunks(model, ids, [cut]))


def test_a_new_number_of_keys_is_recorded_when_it_is_first_seen(repeated):
    model, ids = make(), make_ids(LENGTH + 8 * 34)
    in_chunks(model, ids[:, :138], [LENGTH, 104])
    repeated.clear()
    in_chunks(model, ids, range(LENGTH, ids.shape[1], 34))
    assert repeated == 9 * REPEATING


def change_policy(model):
    seer.set_policy(model, seer.TopK(0.8))


def change_gate(model):
    gates_of(model)[2].k_linear.data.neg_()


def change_min_context(model):
    state_of(model).min_context = 1000


@pytest.mark.parametrize("change", [change_policy, change_gate, change_min_context], ids=lambda x: x.__name__)
def test_what_changes_between_chunks_is_noticed(change, repeated, ordinary):
    ids, cuts = make_ids(136), [LENGTH, 102]

    def run():
        model, cache = make(), DynamicCache()
        warm(model, ids, cuts)
        parts = [logits_of(model, ids[:, :LENGTH], past_key_values=cache)]
        parts.append(logits_of(model, ids[:, LENGTH:102], past_key_values=cache))
        change(model)
        repeated.clear()
        parts.append(logits_of(model, ids[:, 102:], past_key_values=cache))
        return torch.cat(parts, 1), model

    found, model = run()
    again = list(repeated)
    expected, _ = ordinary(run)
    same(found, expected)
    assert not torch.equal(found, in_chunks(make(), ids, cuts))
    # Under a policy that was not called before kernels are compiled in the first layer, and recorded in the second.
    assert again == {change_gate: [1, 2], change_policy: [2], change_min_context: []}[change]
    assert state_of(model).ran_sparse


def test_a_cache_may_be_cropped_copied_and_repeated(repeated, ordinary):
    """Keys lie elsewhere in memory then, and with other strides."""
    model, ids = make(), make_ids(150)

    def run():
        cache = DynamicCache(config=model.config)
        in_chunks(model, ids[:, :110], [64], cache)
        cache.crop(-10)
        copied = copy.deepcopy(cache)
        parts = [in_chunks(model, ids[:, 100:], [], cache), in_chunks(model, ids[:, 100:], [], copied)]
        copied.batch_repeat_interleave(2)
        parts.append(in_chunks(model, ids[:, :40].repeat(2, 1), [], copied))
        return parts

    for _ in range(3):
        repeated.clear()
        found = run()
    assert repeated == 5 * REPEATING
    for x, expected in zip(found, ordinary(run), strict=True):
        same(x, expected)
    same(found[0], found[1])


def test_generate_in_chunks_repeats(repeated, ordinary):
    model, ids = make(), make_ids(160)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    for mask in (None, torch.ones_like(ids)):
        options["attention_mask"] = mask
        for _ in range(3):
            repeated.clear()
            found = model.generate(ids, prefill_chunk_size=60, **options)
        assert repeated == 3 * REPEATING  # the last chunk is shorter than two blocks
        expected = ordinary(lambda: model.generate(ids, prefill_chunk_size=60, **options))
        assert torch.equal(found, expected)


def test_what_everybody_sees_is_repeated_by_nobody(repeated):
    model, ids, cuts = make(), make_ids(138), [LENGTH, 104]
    warm(model, ids, cuts)
    repeated.clear()
    with seer.record(model) as stats:
        in_chunks(model, ids, cuts)
    assert stats.sparse_calls == 3 * LAYERS
    with seer.dense(model):
        in_chunks(model, ids, cuts)
    assert repeated == []
    in_chunks(model, ids, cuts)
    assert repeated == 3 * REPEATING


def test_padded_rows_and_static_caches_take_the_ordinary_way(repeated):
    model, ids = make(), make_ids(138, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(3):
        repeated.clear()
        cache = DynamicCache(config=model.config)
        for part in (slice(LENGTH), slice(LENGTH, None)):
            inputs = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            logits_of(model, ids[:, part], past_key_values=cache, **inputs)
        cache = StaticCache(config=model.config, max_cache_len=160)
        in_chunks(model, ids, [LENGTH], cache)
    with seer.record(model) as stats:
        in_chunks(model, ids, [LENGTH], StaticCache(config=model.config, max_cache_len=160))
    assert (stats.sparse_calls, stats.dense_calls) == (2 * LAYERS, 0)
    assert repeated == []


def test_many_pairs_take_two_steps(monkeypatch):
    model, ids = make(), make_ids(104)
    chunks = selectors._CHUNKS
    monkeypatch.setattr(selectors, "MOST_PAIRS_AT_ONCE", 34 * 104 - 1)
    warm(model, ids, [LENGTH])
    assert not chunks._known
    monkeypatch.setattr(selectors, "MOST_PAIRS_AT_ONCE", 34 * 104)
    warm(model, ids, [LENGTH])
    assert [type(known) for known in chunks._known.values()] == [replay.Recording]


def test_nothing_is_kept_after_a_forward(repeated):
    """No keys of a cache, no table of its positions."""
    model, ids, cuts = make(), make_ids(104), [LENGTH]
    warm(model, ids, cuts)
    plans, tables, keys = [], [], []

    def look(module, args, kwargs):
        plan = present_plan()
        plans.append(weakref.ref(plan))
        if plan.key_tables is not plan.table and len(plans) == 2:
            tables.extend(map(weakref.ref, plan.key_tables))

    state_of(model).layers[2].attention.register_forward_pre_hook(look, with_kwargs=True)
    state_of(model).layers[2].attention.k_proj.register_forward_hook(
        lambda module, args, out: keys.append(weakref.ref(out))
    )
    repeated.clear()
    gc.collect()
    gc.disable()
    try:
        cache = DynamicCache(config=model.config)
        logits_of(model, ids[:, :LENGTH], past_key_values=cache)
        logits_of(model, ids[:, LENGTH:], past_key_values=cache)
        assert (len(plans), len(tables), len(keys)) == (2, 2, 2)
        assert all(ref() is None for ref in (*plans, *tables, *keys))  # without a collection
    finally:
        gc.enable()
    assert repeated == 2 * REPEATING


def test_lists_of_a_chunk_and_attention_at_once_are_the_same(real_kernels):
    """What is attended at once is what the lists say that ``record`` and selectors of one's own see."""
    model, ids = attach(make_model("llama", dtype=torch.float16, num_hidden_layers=1), seer.TopK(0.4)), make_ids(96)
    seen = []
    select = GateSelector._select

    def watch(selector, inputs):
        blocks = select(selector, inputs)
        seen.append((inputs, blocks))
        return blocks

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(GateSelector, "_select", watch)
        in_chunks(model, ids, [32])
    inputs, blocks = seen[1]
    assert inputs.k_pre.shape[2] == inputs.q.shape[2] == 64
    assert blocks.span == inputs.span
    out = block_sparse_attention(inputs.q, inputs.k, inputs.v, blocks, scale=inputs.scale, implementation="reference")
    attended = GateSelector(seer.TopK(0.4)).attend_at_once(inputs)
    torch.testing.assert_close(attended, out, rtol=1e-2, atol=1e-2)
