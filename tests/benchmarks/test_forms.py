"""``benchmarks.forms``: training side by side against the trainer, forms and losses by definition, a rehearsal."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from benchmarks.form_gates import HIDDEN, Variant, by_gates, in_two_stages, loss_of
from benchmarks.forms import VARIANTS, main, rise_at
from benchmarks.side_by_side import fit, for_inference, fresh, train
from transformers import LlamaConfig, LlamaForCausalLM

import seerattention as seer
from benchmarks import forms
from seerattention import hf, testbed
from seerattention.baselines import Streaming
from seerattention.distillation.losses import kl_sum
from seerattention.distillation.trainer import Trainer
from seerattention.hf.state import gates_of

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def tiny_model(length: int = 4096, vocabulary: int = 97) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": length}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes, **HEADS)).eval()


def documents(count: int, length: int) -> torch.Tensor:
    return torch.randint(97, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", ["max", "row_mass"])
def test_training_side_by_side_is_training_alone(target):
    model, texts = tiny_model(), documents(3, 700)
    config = seer.DistillConfig(steps=3, rows=0.5, skip_rows=0.0, learning_rate=1e-2, clip_norm=0.05, target=target)
    variants = [
        dataclasses.replace(VARIANTS[name], target=target) for name in ("8x8", "8x8-mass", "8x8-rank", "8x8-absmax")
    ]
    hf.attach(model, selector=Streaming(), min_context=0)
    gates = fresh(model, variants)
    losses = train(model, variants, gates, [{"input_ids": text[None]} for text in texts], config)
    hf.detach(model)

    torch.manual_seed(0)
    hf.attach(model, seer.GateConfig(prefill=seer.SubBlockGateConfig()), min_context=0)
    alone = Trainer(model, config, total_steps=3)
    with torch.no_grad():
        for master, start in zip(alone.masters.values(), fresh(model, variants[:1])["8x8"], strict=True):
            master.load_state_dict(start.state_dict())
    for step, text in enumerate(texts):
        found, _ = alone.train_step([{"input_ids": text[None]}])
        assert losses["8x8"][step] == pytest.approx(sum(found.values()) / 2, rel=1e-4)
    for gate, master in zip(gates["8x8"], alone.masters.values(), strict=True):
        torch.testing.assert_close(gate.q_linear, master.q_linear, rtol=1e-3, atol=1e-4)
    assert all(math.isfinite(loss) for column in losses.values() for loss in column)


@pytest.mark.parametrize("pitches", [(8, 8), (8, 4), (16, 8)])
@pytest.mark.parametrize("reduce", ["mass", "max_lse"])
@pytest.mark.parametrize("rows", [None, [0, 3, 5]])
def test_trial_reductions_by_their_definition(pitches, reduce, rows):
    torch.manual_seed(0)
    (q_pitch, k_pitch), length = pitches, 333
    variant = Variant("x", seer.SubBlockGateConfig(q_pitch=q_pitch, k_pitch=k_pitch), reduce=reduce)
    gate = variant.build(tiny_model().config, 16)
    q, k = torch.randn(2, 4, length, 16), torch.randn(2, 2, length, 16)
    cos, sin = torch.randn(1, length, 16), torch.randn(1, length, 16)
    chosen = None if rows is None else torch.tensor(rows)
    with torch.no_grad():
        found = gate(q, k, cos, sin, rows=chosen)
        queries, keys = gate.encode_queries(q, cos, sin), gate.encode_keys(k, cos, sin)
    assert found.shape == (2, 4, 6 if rows is None else len(rows), 6)
    for place, row in enumerate(range(6) if rows is None else rows):
        for head in range(4):
            of_query = []
            for i in range(row * 64 // q_pitch, min((row + 1) * 64 // q_pitch, queries.shape[2])):
                seen = [j for j in range(keys.shape[2]) if j * k_pitch < (i + 1) * q_pitch]
                products = keys[1, head // 2, seen] @ queries[1, head, i] * 16**-0.5
                if reduce == "mass":
                    products = products.log_softmax(-1)
                tiles = torch.full((6,), float("-inf"))
                for tile in range(row + 1):
                    of_tile = [p for j, p in zip(seen, products, strict=True) if j * k_pitch // 64 == tile]
                    if of_tile:
                        tiles[tile] = torch.stack(of_tile).logsumexp(0)
                of_query.append(tiles)
            expected = torch.stack(of_query).amax(0)
            torch.testing.assert_close(found[1, head, place], expected, rtol=1e-4, atol=1e-4)


def test_absmax_takes_the_value_farthest_from_zero():
    torch.manual_seed(0)
    gate = VARIANTS["8x8-absmax"].build(tiny_model().config, 16)
    q, k = torch.randn(1, 4, 128, 16), torch.randn(1, 2, 128, 16)
    parts = q.unflatten(2, (16, 8))
    farthest = parts.gather(3, parts.abs().argmax(3, keepdim=True))[..., 0, :]
    expected = torch.cat((farthest, parts.mean(3)), -1) @ gate.q_linear
    ones, zeros = torch.ones(1, 128, 16), torch.zeros(1, 128, 16)  # no rotation
    torch.testing.assert_close(gate.encode_queries(q, ones, zeros), expected)
    assert gate(q, k, ones, zeros).isfinite().sum() == 4 * 3


def some_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    rows = torch.tensor([0, 1, 4, 7])
    future = torch.arange(8) > rows[:, None]
    logits = torch.randn(1, 2, 4, 8).masked_fill(future, float("-inf")).requires_grad_()
    return logits, torch.randn(1, 2, 4, 8).mul(2).masked_fill(future, float("-inf")).softmax(-1), rows


@pytest.mark.parametrize("name", ["8x8", "8x8-membership", "8x8-rank", "8x8-not_local", "8x8-outside"])
def test_losses_and_their_gradients_are_finite(name):
    logits, target, rows = some_rows()
    loss = loss_of(VARIANTS[name], logits, target, rows, 0)
    loss.backward()
    assert loss > 0
    assert logits.grad.isfinite().all()
    if name == "8x8":
        torch.testing.assert_close(loss, kl_sum(logits, target))
    if name in ("8x8-membership", "8x8-rank"):
        assert loss > kl_sum(logits, target)


def test_outside_is_the_divergence_of_what_is_neither_sink_nor_diagonal():
    logits, target, rows = some_rows()
    expected = 0.0
    for head in range(2):
        for place, row in ((2, 4), (3, 7)):
            inner = target[0, head, place, 1:row]
            log = logits.detach()[0, head, place, 1:row].log_softmax(-1)
            expected += float(((inner / inner.sum()) * ((inner / inner.sum()).log() - log)).sum())
    found = loss_of(VARIANTS["8x8-outside"], logits, target, rows, 0)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_thresholds_are_fitted_and_stages_narrow():
    model, texts = tiny_model(length=8192), documents(1, 4096)
    hf.attach(model, selector=Streaming(), min_context=0)
    gates = {
        name: for_inference(layers, torch.float32)
        for name, layers in fresh(model, [VARIANTS["paper"], VARIANTS["8x8"]]).items()
    }
    fine = by_gates(gates["8x8"])

    def scorer(inputs):
        return 300 * fine(inputs)  # fresh gates of random weights say nearly the same of all blocks

    policy = fit(model, texts, {"8x8": scorer}, [0.5])["8x8", 1.0][0.5]
    stages = in_two_stages(gates["paper"], gates["8x8"], seer.TopK(0.3))
    kept, total = 0, 0

    def count(inputs, _):
        nonlocal kept, total
        kept += int(policy.select(scorer(inputs), block_size=64).counts.sum())
        total += 4 * 64 * 65 // 2
        scores = stages(inputs)
        mask = seer.TopK(0.3).select(by_gates(gates["paper"])(inputs), block_size=64).to_mask()
        assert ((scores == HIDDEN) == ~mask).all()

    with torch.no_grad(), hf.dense(model), hf.observe(model, count):
        model(texts)
    assert kept / total == pytest.approx(0.5, rel=0.1)
    assert len(gates_of(model, "prefill")) == 2
    assert not any(gates_of(model, "prefill"))


def test_rises_are_read_between_measured_densities():
    points = [(0.2, 0.01), (0.1, 0.03)]
    assert rise_at(points, 0.1) == pytest.approx(0.03)
    assert rise_at(points, math.sqrt(0.02)) == pytest.approx(0.02)
    assert rise_at(points, 0.097) == pytest.approx(0.03, rel=0.05)
    assert rise_at(points, 0.05) is None
    assert rise_at(points[:1], 0.2) is None


def test_a_rehearsal(tmp_path, monkeypatch):
    tokenizer = testbed.load()[1]
    monkeypatch.setattr(forms, "load_model", lambda *_: (tiny_model(vocabulary=len(tokenizer)), tokenizer))
    names = ["paper", "8x8", "8x8-mass", "8x8-outside"]
    assert main(["--device", "cpu", "--tiny", "--output", str(tmp_path), "--woven", "--variants", *names]) == 0
    (run,) = json.loads((tmp_path / "forms.json").read_text())["runs"]
    found = {(result["case"]["variant"], result["case"]["asked"]) for result in run["results"]}
    choosers = [*names, "paper+8x8, top-k", "paper+8x8, relative"]
    assert found == {("dense", 1.0)} | {(name, density) for name in choosers for density in (0.45, 0.5)}
    for result in run["results"][1:]:
        assert result["recalls"]["block"] > 0
        assert result["metrics"]["rise_error"] >= 0
        assert ("tasks" in result["metrics"]) == (result["case"]["asked"] == 0.5)
    (eight,) = [r for r in run["results"] if r["case"]["variant"] == "8x8" and r["case"]["asked"] == 0.5]
    assert eight["parameters"] == 2 * (4 + 2) * 48 * 16
    assert eight["products_per_pair"] == 2 * 4 * 16 / 64
    assert main(["--read", str(tmp_path / "forms.json")]) == 0
