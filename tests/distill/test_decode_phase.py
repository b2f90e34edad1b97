"""Distillation of decode gates: their loss against its definition, and a run."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import seerattention as seer
from seerattention.distillation import DistillConfig, distill
from seerattention.distillation.objectives import decode_loss
from seerattention.hf import gates_of
from seerattention.measure import block_recall

from .tiny import random_batches, tiny_llama, topic_batches

BLOCK = 32


FORMS = {
    "published": {},
    "fine": {"k_pitch": 8},
    "fine, own heads": {"k_pitch": 4, "merge_heads": False, "qk_norm": False},
}


def attached(config=None, form=None):
    model = tiny_llama()
    torch.manual_seed(1)
    decode = seer.DecodeGateConfig(**FORMS[form or "published"])
    config = config or seer.GateConfig(block_size=BLOCK, prefill=None, decode=decode)
    return seer.attach(model, config, min_context=0)


def inputs_of(model, batch):
    seen = []
    with torch.no_grad(), seer.dense(model), seer.observe(model, lambda inputs, blocks: seen.append(inputs)):
        model(**batch)
    return seen


def block_logits(gate, queries, keys, kv, blocks):
    """The largest product of any vector of a token ``[heads, W]`` with any of each of the first blocks."""
    per_head, parts = queries.shape[0] // gate.num_kv_heads, BLOCK // (gate.config.k_pitch or BLOCK)
    mine = queries[kv * per_head : (kv + 1) * per_head].double()
    products = mine @ keys[kv, : blocks * parts].double().T * gate.scale
    return products.amax(0).unflatten(0, (blocks, parts)).amax(1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("target", ["max", "row_mass"])
def test_loss_by_its_definition(target, padded, form):
    model = attached(form=form)
    (batch,) = random_batches(1, batch=2, length=120)
    if padded:
        batch["attention_mask"] = torch.ones(2, 120, dtype=torch.long)
        batch["attention_mask"][0, 100:] = 0
    inputs = inputs_of(model, batch)[1]
    gate = gates_of(model, "decode")[1].float()
    rows = torch.tensor([32, 63, 64, 99, 119])
    valid = torch.tensor([[True] * 4 + [not padded], [True] * 5])
    found = decode_loss(gate, inputs, rows, valid, target)
    scores = inputs.q.double() @ inputs.k.double().repeat_interleave(2, 1).mT * inputs.scale
    probabilities = scores.masked_fill(torch.ones(120, 120).triu(1).bool(), float("-inf")).softmax(-1)
    q, k, cos, sin = (x.float() for x in (inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin))
    cos, sin = cos.expand(2, -1, -1), sin.expand(2, -1, -1)
    total = 0.0
    for b in range(2):
        for kv in range(2):
            for i, row in enumerate(rows.tolist()):
                if not valid[b, i]:
                    continue
                own = row // BLOCK
                tiles = probabilities[b, 2 * kv : 2 * kv + 2, row, : own * BLOCK].unflatten(-1, (own, BLOCK))
                mass = (tiles.amax(-1) if target == "max" else tiles.sum(-1)).amax(0)  # of the group's heads
                mass /= mass.sum()
                here = (x[b : b + 1, ..., row : row + 1, :] for x in (q, cos, sin))
                query = gate.encode_queries(*here)[0, :, 0]
                keys = gate.encode_keys(k[b : b + 1], cos[b : b + 1], sin[b : b + 1])[0]
                logits = block_logits(gate, query, keys, kv, own).log_softmax(-1)
                total += float((mass * (mass.log() - logits)).sum())
    assert float(found) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_learns_and_leaves_the_gates_of_prompts_alone(tmp_path, form):
    model = attached(seer.GateConfig(block_size=BLOCK, decode=seer.DecodeGateConfig(**FORMS[form])))
    before = [parameter.clone() for gate in gates_of(model) for parameter in gate.parameters()]
    config = DistillConfig(phase="decode", steps=60, rows=0.25, learning_rate=3e-3, warmup=2)
    history = distill(model, topic_batches(4) * 15, config, state_path=tmp_path / "state.safetensors")
    assert sum(history.loss[-5:]) < 0.5 * sum(history.loss[:5])
    after = [parameter for gate in gates_of(model) for parameter in gate.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    seer.save_gates(model, tmp_path / "gates")
    again = seer.attach(tiny_llama(), tmp_path / "gates", min_context=0)
    assert gates_of(again, "decode")[0].config == gates_of(model, "decode")[0].config
    for mine, saved in zip(gates_of(model, "decode"), gates_of(again, "decode"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize(
    ("padded", "form"), [(False, "published"), (True, "published"), (False, "fine"), (True, "fine, own heads")]
)
def test_block_recall_by_its_definition(padded, form):
    """The mass in the chosen blocks and the token's own, mean over heads and tokens behind the first block."""
    model = attached(form=form)
    (batch,) = random_batches(1, batch=2, length=120)
    ends = [120, 120]
    if padded:
        batch["attention_mask"] = torch.ones(2, 120, dtype=torch.long)
        batch["attention_mask"][0, 100:], ends[0] = 0, 100
    found = block_recall(model, [batch], seer.TopK(0.5), phase="decode")
    for inputs in inputs_of(model, batch):
        gate = gates_of(model, "decode")[inputs.layer]
        scores = inputs.q.double() @ inputs.k.double().repeat_interleave(2, 1).mT * inputs.scale
        probabilities = scores.masked_fill(torch.ones(120, 120).triu(1).bool(), float("-inf")).softmax(-1)
        table = inputs.cos, inputs.sin
        queries, keys = gate.encode_queries(inputs.q_pre, *table), gate.encode_keys(inputs.k_pre, *table)
        mass, pairs = 0.0, 0
        for b, kv, t in itertools.product(range(2), range(2), range(BLOCK, 120)):
            if t >= ends[b]:
                continue
            own, complete = t // BLOCK, (t + 1) // BLOCK
            keep = math.ceil(0.5 * (own + 1))
            logits = block_logits(gate, queries[b, :, t], keys[b], kv, complete)[:own]
            chosen = [own, *logits.argsort(descending=True)[: keep - 1].tolist()]
            mine = probabilities[b, 2 * kv : 2 * kv + 2, t]
            mass += sum(float(mine[:, n * BLOCK : (n + 1) * BLOCK].sum(-1).mean()) for n in chosen)
            pairs += 1
        assert found[inputs.layer] == pytest.approx(mass / pairs, rel=1e-4)


def test_recall_is_measured_as_gates_learn():
    model = attached(seer.GateConfig(prefill=None, decode=seer.DecodeGateConfig(block_size=16)))
    config = DistillConfig(phase="decode", rows=0.25, learning_rate=3e-3, warmup=2, eval_density=0.3)
    history = distill(model, topic_batches(4) * 15, config, eval_batches=topic_batches(1))
    assert history.recall_steps == [0, 60]
    assert all(values[1] > values[0] for values in history.recall.values())
    # Without a policy it is that of the model, whose budget holds everything here.
    assert all(value == pytest.approx(1) for value in block_recall(model, topic_batches(1), phase="decode").values())


def test_errors():
    with pytest.raises(ValueError, match=r"a gate for decode; attach gates first: .*GateConfig\(decode="):
        distill(seer.attach(tiny_llama(), seer.GateConfig()), topic_batches(1), DistillConfig(phase="decode"))
    with pytest.raises(ValueError, match=r"no gates for decoding to measure.*GateConfig\(decode="):
        block_recall(seer.attach(tiny_llama(), seer.GateConfig()), topic_batches(1), seer.TopK(0.5), phase="decode")
    with pytest.raises(ValueError, match="phase must be one of"):
        DistillConfig(phase="both")
    assert "phase" not in DistillConfig().to_dict()
    assert DistillConfig.from_dict(DistillConfig(phase="decode").to_dict()).phase == "decode"
