"""Training: it learns, leaves the base model alone, resumes exactly, and says which layer is broken."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
import transformers

from seerattention.config import GateConfig, PrefillGateConfig
from seerattention.distillation import DistillationError, DistillConfig, distill
from seerattention.distillation.saved import load_state, save_state
from seerattention.distillation.trainer import Trainer
from seerattention.evaluate.maps import inspect_attention
from seerattention.files import temporary_files
from seerattention.hf import attach, dense, observe
from seerattention.measure import block_recall, calibrate, measure_recall
from seerattention.ops import pooled_attention
from seerattention.policies import Dense, TopK

from .tiny import assert_same, attached_llama, forget, gate_tensors, random_batches, tiny_llama, topic_batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learns_and_leaves_the_base_model_alone(dtype):
    model = attached_llama(dtype=dtype)
    forget(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = gate_tensors(model)
    reports = []
    config = DistillConfig(steps=60, learning_rate=5e-3, warmup=5, rows=0.5, eval_every=30, eval_density=0.3)
    held_out = topic_batches(2, seed=99)
    history = distill(model, topic_batches(16), config, eval_batches=held_out, on_step=reports.append)

    assert_same(dict(model.state_dict()), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(tensor.dtype == dtype for tensor in gate_tensors(model).values())
    assert any(not torch.equal(tensor, fresh[name]) for name, tensor in gate_tensors(model).items())

    assert len(history.loss) == 60
    assert list(history.loss_per_layer) == ["layers.0", "layers.1"]
    for losses in history.loss_per_layer.values():
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert history.recall_steps == [0, 30, 60]
    for values in history.recall.values():
        assert values[-1] > values[0] + 0.1
    assert history.not_learning == {}
    assert history.tokens == 60 * 2 * 320
    assert [report.step for report in reports] == list(range(61))
    assert reports[-1].loss == history.loss[-1]
    assert reports[0].loss is None
    # The last recall belongs to the gates that the model now carries.
    expected = block_recall(model, held_out, TopK(0.3))
    assert history.recall["layers.1"][-1] == pytest.approx(expected[1], rel=1e-5)
    numbers = {k: v for k, v in measure_recall(model, held_out, TopK(0.3)).numbers().items() if v is not None}
    latest = {name: values[-1] for name, values in history.numbers.items() if values[-1] is not None}
    assert latest == pytest.approx(numbers, rel=1e-5, abs=1e-3)
    assert all(len(values) == 3 for values in history.numbers.values())
    assert history.numbers["peaks"][-1] > history.numbers["peaks"][0]


def test_first_loss_is_the_kl_of_the_gates_as_they_came():
    model = attached_llama()
    (batch,) = random_batches(1)
    expected = []

    def measure(inputs, blocks):
        assert blocks is None
        target = pooled_attention(inputs.q, inputs.k, block_size=32, scale=inputs.scale)
        log_q = inputs.gate_logits().log_softmax(-1)
        kl = torch.where(target > 0, target * (target.clamp(min=1e-30).log() - log_q), torch.zeros(())).sum(-1)
        expected.append(kl[:, :, 2:].mean().item())  # 10 blocks, the first quarter left out

    with torch.no_grad(), dense(model), observe(model, measure):
        model(**batch)
    history = distill(model, [batch], DistillConfig())
    assert [losses[0] for losses in history.loss_per_layer.values()] == pytest.approx(expected, rel=1e-5)
    assert history.loss == pytest.approx([sum(expected) / 2], rel=1e-5)


def test_one_pass_takes_every_batch_once():
    model = attached_llama()
    history = distill(model, random_batches(5), DistillConfig(accumulation=2))
    assert len(history.loss) == 3
    assert history.tokens == 5 * 2 * 320
    history = distill(model, iter(random_batches(3)), DistillConfig())
    assert len(history.loss) == 3


def test_batches_that_end_early(caplog):
    model = attached_llama()
    with caplog.at_level(logging.WARNING):
        history = distill(model, iter(random_batches(3)), DistillConfig(steps=5))
    assert len(history.loss) == 3
    assert "ended after 3 of 5 steps" in caplog.text
    with pytest.raises(ValueError, match="no batch"):
        distill(model, [], DistillConfig(steps=5))


def test_accumulated_gradients_equal_one_large_batch():
    batches = random_batches(1, batch=4)
    halves = [{"input_ids": half} for half in batches[0]["input_ids"].chunk(2)]
    one, two = Trainer(attached_llama(), DistillConfig()), Trainer(attached_llama(), DistillConfig(accumulation=2))
    losses, tokens = one.train_step(batches)
    other_losses, other_tokens = two.train_step(halves)
    assert tokens == other_tokens
    assert list(losses.values()) == pytest.approx(list(other_losses.values()), rel=1e-5)
    for name, master in one.masters.items():
        for a, b in zip(master.parameters(), two.masters[name].parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    """A padded row gives the gradient that it gives alone; rows of shorter sequences count as often as they exist."""
    config = DistillConfig(skip_rows=0.0, clip_norm=None)
    long, short = random_batches(2, batch=1, length=200)
    short = {"input_ids": short["input_ids"][:, :75]}
    alone = Trainer(attached_llama(), DistillConfig(skip_rows=0.0, clip_norm=None, accumulation=2))
    expected, expected_tokens = alone.train_step([long, short])

    padding = torch.zeros(1, 125, dtype=torch.long)
    parts = [short["input_ids"], padding] if side == "right" else [padding, short["input_ids"]]
    ids = torch.cat([long["input_ids"], torch.cat(parts, 1)])
    mask = torch.ones_like(ids)
    mask[1, 75:] = 0
    if side == "left":
        mask[1] = mask[1].flip(0)
    padded = Trainer(attached_llama(), config)
    losses, tokens = padded.train_step([{"input_ids": ids, "attention_mask": mask}])
    assert tokens == expected_tokens == 275
    assert list(losses.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    for name, master in alone.masters.items():
        for a, b in zip(master.parameters(), padded.masters[name].parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6)


def test_clipping_is_by_layer():
    norms = {}
    for limit in (None, 1e-3):
        trainer = Trainer(attached_llama(), DistillConfig(clip_norm=limit))
        trainer.train_step(random_batches(1))
        norms[limit] = [
            torch.nn.utils.get_total_norm([p.grad for p in master.parameters()]).item()
            for master in trainer.masters.values()
        ]
    assert min(norms[None]) > 1e-3
    assert norms[1e-3] == pytest.approx([1e-3, 1e-3], rel=1e-4)


def test_nan_names_the_layer_and_spares_the_gates():
    model = attached_llama()
    before = gate_tensors(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 3] = float("nan")
    with pytest.raises(DistillationError, match=r"step 1: layers\.1 has loss nan"):
        distill(model, random_batches(1), DistillConfig())
    assert_same(gate_tensors(model), before)

    model = attached_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3, 3] = float("nan")
    with pytest.raises(
        DistillationError, match=r"layers\.0 has loss nan.*2 of 2 layers are not finite: layers\.0, layers\.1"
    ):
        distill(model, random_batches(1), DistillConfig())


def test_a_layer_that_does_not_learn_is_named(caplog):
    model = attached_llama()
    config = DistillConfig(steps=14, learning_rate=1e-12, warmup=2)
    with caplog.at_level(logging.WARNING):
        history = distill(model, random_batches(1), config, eval_batches=random_batches(1, seed=9))
    assert set(history.not_learning) == {"layers.0", "layers.1"}
    assert "layers.1 does not seem to learn: loss" in caplog.text


def test_needs_gates():
    with pytest.raises(ValueError, match="attach"):
        distill(tiny_llama(), random_batches(1))
    model = attach(tiny_llama(), selector=lambda q, k, **_: None)
    with pytest.raises(ValueError, match="no layer of this model has a gate"):
        distill(model, random_batches(1))


def test_training_mode_is_restored():
    model = attached_llama().train()
    distill(model, random_batches(1), DistillConfig())
    assert model.training


# ---- saved state -----------------------------------------------------------------------------------------------------

_CONFIG = DistillConfig(steps=9, rows=0.5, warmup=2, accumulation=2, eval_every=4)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 4, 5, 9])
def test_resume_is_exact(tmp_path, stop):
    batches, held_out = random_batches(5), random_batches(1, seed=9)
    whole = attached_llama()
    expected = distill(whole, batches, _CONFIG, eval_batches=held_out)

    def interrupt(report):
        if report.step == stop + 1 or (stop == 9 and report.step == 9):
            raise _Stop

    path = tmp_path / "state.safetensors"
    options = {"eval_batches": held_out, "state_path": path, "save_every": 1}
    with pytest.raises(_Stop):
        distill(attached_llama(), batches, _CONFIG, on_step=interrupt, **options)
    assert load_state(path)[1]["step"] == min(stop, 8)
    torch.manual_seed(777)  # whatever the new process did before
    resumed = attached_llama()
    history = distill(resumed, batches, _CONFIG, **options)
    assert_same(gate_tensors(resumed), gate_tensors(whole))
    assert history.loss == expected.loss
    assert history.recall == expected.recall
    assert history.recall_steps == expected.recall_steps == [0, 4, 8, 9]
    # Once more: nothing is left to do, and the result is the same.
    again = attached_llama()
    assert distill(again, batches, _CONFIG, **options).loss == expected.loss
    assert_same(gate_tensors(again), gate_tensors(whole))


def test_resuming_another_run_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    config = DistillConfig(steps=1)
    distill(attached_llama(), random_batches(1), config, state_path=path, settings={"data": "a.jsonl"})
    other = DistillConfig(steps=1, learning_rate=2e-3)
    with pytest.raises(ValueError, match=r"learning_rate: was 0\.001, now 0\.002.*another output directory"):
        distill(attached_llama(), random_batches(1), other, state_path=path, settings={"data": "a.jsonl"})
    with pytest.raises(ValueError, match=r"data: was 'a\.jsonl', now 'b\.jsonl'"):
        distill(attached_llama(), random_batches(1), config, state_path=path, settings={"data": "b.jsonl"})
    torch.manual_seed(0)
    other_gates = attach(tiny_llama(layers=1), GateConfig(block_size=32))
    with pytest.raises(ValueError, match="base_model: was"):
        distill(other_gates, random_batches(1), config, state_path=path, settings={"data": "a.jsonl"})


def test_resuming_with_other_gates_of_the_same_shapes_is_refused(tmp_path):
    config, state = DistillConfig(steps=1), tmp_path / "state.safetensors"
    distill(tiny_llama_with(GateConfig(block_size=32)), random_batches(1), config, state_path=state)
    for other in (
        GateConfig(block_size=64),
        GateConfig(block_size=32, prefill=PrefillGateConfig(k_pooling=("avg", "max", "min"))),
    ):
        with pytest.raises(ValueError, match="gates: was"):
            distill(tiny_llama_with(other), random_batches(1), config, state_path=state)


def tiny_llama_with(gate_config):
    model = tiny_llama()
    attach(model, gate_config, min_context=0)
    return model


def test_damaged_state_is_reported(tmp_path):
    path = tmp_path / "state.safetensors"
    config = DistillConfig(steps=1)
    distill(attached_llama(), random_batches(1), config, state_path=path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        distill(attached_llama(), random_batches(1), config, state_path=path)


def test_a_failed_write_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.arange(3)}, {"step": 1})

    def fail(temporary, content):
        with open(temporary, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state(path, {"a": torch.arange(4)}, {"step": 2})
    assert not temporary_files(path)
    tensors, meta = load_state(path)
    assert meta == {"step": 1}
    assert tensors["a"].tolist() == [0, 1, 2]


def test_empty_tensors_are_never_written(tmp_path):
    with pytest.raises(ValueError, match=r"empty tensors: \['gate/b'\]"):
        save_state(tmp_path / "s.safetensors", {"gate/a": torch.ones(1), "gate/b": torch.empty(0, 3)}, {})
    assert list(tmp_path.iterdir()) == []
    model = attached_llama()
    from seerattention.hf.state import gates_of

    gates_of(model)[1].k_linear = torch.nn.Parameter(torch.empty(0, 96, 32))
    with pytest.raises(ValueError, match=r"layers\.1\.k_linear is empty"):
        distill(model, random_batches(1))


# ---- block recall ----------------------------------------------------------------------------------------------------


def test_block_recall():
    model = attached_llama()
    batches = random_batches(2)
    assert block_recall(model, batches, Dense()) == pytest.approx({0: 1.0, 1: 1.0}, abs=1e-5)
    values = [block_recall(model, batches, TopK(density)) for density in (0.1, 0.5, 0.9)]
    for layer in (0, 1):
        assert 0 < values[0][layer] < values[1][layer] < values[2][layer] < 1
    # Without a policy the model runs sparsely with its own; the first layer sees the same either way.
    sparse = copy.deepcopy(model)
    from seerattention.hf import set_policy

    set_policy(sparse, TopK(0.5))
    assert block_recall(sparse, batches)[0] == pytest.approx(values[1][0], rel=1e-5)
    with pytest.raises(ValueError, match="no batch"):
        block_recall(model, [], TopK(0.5))


def test_block_recall_of_padded_batches():
    model = attached_llama()
    long, short = random_batches(2, batch=1, length=200)
    short = {"input_ids": short["input_ids"][:, :75]}
    ids = torch.cat([long["input_ids"], torch.nn.functional.pad(short["input_ids"], (125, 0))])
    mask = torch.ones_like(ids)
    mask[1, :125] = 0
    padded = block_recall(model, [{"input_ids": ids, "attention_mask": mask}], TopK(0.4))
    assert padded == pytest.approx(block_recall(model, [long, short], TopK(0.4)), rel=1e-4)


# ---- batches that teach nothing --------------------------------------------------------------------------------------


def test_prompts_of_one_block_teach_nothing_and_every_layer_is_named(caplog):
    """Their loss is zero, which must not pass for a layer that has learned; however short the run."""
    for steps in (2, 14):
        caplog.clear()
        model = attached_llama()
        history = distill(model, random_batches(2, length=32), DistillConfig(steps=steps, warmup=1))
        assert history.loss == [0.0] * steps
        assert history.no_gradient == {"layers.0": steps, "layers.1": steps}
        assert set(history.not_learning) == {"layers.0", "layers.1"}
        assert caplog.text.count("step 1 does not teach any layer anything") == 1
        assert "32 tokens (one block)" in caplog.text
        assert "layers.1 does not seem to learn: its gradient was zero in every step" in caplog.text


def test_steps_that_teach_nothing_are_counted_and_left_out_of_the_verdict(caplog):
    """One-block prompts at the end: without them this run does not learn, and their zero losses must not hide it."""
    batches = [*random_batches(1) * 12, *random_batches(6, length=20)]
    history = distill(attached_llama(), batches, DistillConfig(learning_rate=1e-12, warmup=2))
    assert history.no_gradient == {"layers.0": 6, "layers.1": 6}
    assert set(history.not_learning) == {"layers.0", "layers.1"}
    assert "step 13 does not teach any layer anything" in caplog.text

    learning = attached_llama()
    forget(learning)
    config = DistillConfig(steps=60, learning_rate=5e-3, warmup=5)
    history = distill(learning, [*topic_batches(8), *random_batches(2, length=20)], config)
    assert history.not_learning == {}
    assert "12 of 60 steps taught layers.1 nothing" in caplog.text


def test_a_gate_without_any_gradient_is_named(caplog):
    model = tiny_llama_with(GateConfig(block_size=32, prefill=PrefillGateConfig(q_linear=True)))
    from seerattention.hf.state import gates_of

    with torch.no_grad():
        for parameter in gates_of(model)[1].parameters():
            parameter.zero_()
    history = distill(model, random_batches(3), DistillConfig())
    assert history.not_learning == {"layers.1": "its gradient was zero in every step"}
    assert "step 1 does not teach layers.1 anything" in caplog.text


def test_held_out_batches_beyond_the_window_get_a_sentence():
    """Every layer of the model has a window of 128 tokens; nothing can be said about longer prompts."""
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=128,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    short, long = ({"input_ids": torch.randint(3, 97, (1, length))} for length in (120, 300))
    attach(model, GateConfig(block_size=32), min_context=0)
    with pytest.raises(ValueError, match=r"cannot be measured on these eval_batches: layers\.0, .*sliding window"):
        distill(model, [short], DistillConfig(steps=1), eval_batches=[long])
    for refused in (
        lambda: block_recall(model, [long], TopK(0.5)),
        lambda: calibrate(model, [long], density=0.5),
        lambda: inspect_attention(model, long["input_ids"]),
    ):
        with pytest.raises(ValueError, match="sliding window"):
            refused()
