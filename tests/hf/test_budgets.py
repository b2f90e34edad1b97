"""Budgets of a model: fitted on its prompts, good for others, stored with the gates, in chunks as in one shot."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache

import seerattention as seer
from seerattention.files import DamagedFileError
from seerattention.gates.sources import stored_budgets
from seerattention.hf.state import state_of
from seerattention.measure.budgets import Seen
from seerattention.policies import Budget, RelativeThreshold, causal_softmax
from tiny_models import attach, logits_of

LENGTH = 4096  # 128 blocks of 32: the least that budgets are fitted on
# The same numbers in another order of additions; these random weights make 7e-4 of a rounding in two layers.
CLOSE = {"rtol": 1e-3, "atol": 5e-3}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A model whose gates tell blocks apart, and its gates on disk."""
    from tiny_models import make_ids, make_model

    model = attach(make_model("llama"))
    for layer in state_of(model).layers:
        for parameter in layer.gate.parameters():
            parameter.data.mul_(6)
    batches = [make_ids(LENGTH, seed=7), {"input_ids": make_ids(LENGTH, seed=8)}]
    budgets = seer.calibrate(model, batches, densities=(0.1, 0.2, 0.4))
    folder = tmp_path_factory.mktemp("gates")
    seer.save_gates(model, folder)
    return model, budgets, folder


def density_of(model, ids, **options):
    with seer.record(model) as stats:
        logits_of(model, ids, **options)
    return float(stats.total_density)


def test_a_density_is_kept_on_other_prompts(calibrated, ids_of):
    model, budgets, _ = calibrated
    assert budgets.densities == (0.1, 0.2, 0.4)
    assert (budgets.default, budgets.tokens, budgets.block_size) == (0.4, LENGTH, 32)  # the nearest to 0.3
    assert state_of(model).budgets is budgets
    assert state_of(model).policy == budgets.policy(0.4)
    for density in (0.1, 0.15, 0.2, 0.3, 0.4):
        seer.set_policy(model, density=density)
        assert 0.88 * density < density_of(model, ids_of(LENGTH, seed=1)) < 1.05 * density
    seer.set_policy(model, density=1)
    assert density_of(model, ids_of(300)) == 1
    seer.set_policy(model, density=0.2)


def test_budgets_for_long_prompts_leave_more_to_short_ones(calibrated, model_of, ids_of):
    """Held to 8,192 tokens and not to fewer, with the same gates."""
    _, _, folder = calibrated
    model = seer.attach(model_of("llama"), folder, min_context=0)
    budgets = seer.calibrate(model, [ids_of(8192, seed=7)], densities=(0.1, 0.2), shortest=8192)
    assert (budgets.shortest, budgets.holds_from(0.1)) == (8192, 8192)
    assert budgets.curves[0].blocks == (1, 256)
    assert budgets.curves[0].min_blocks == 4
    seer.set_policy(model, density=0.1)
    assert 0.88 * 0.1 < density_of(model, ids_of(8192, seed=1)) < 1.05 * 0.1
    assert density_of(model, ids_of(4096, seed=1)) > 1.1 * 0.1


def test_chunks_and_padding_change_nothing(calibrated, ids_of):
    model, _, _ = calibrated
    ids = ids_of(1536, seed=3)
    whole = logits_of(model, ids)
    cache, parts = DynamicCache(config=model.config), []
    with seer.record(model) as stats, torch.inference_mode():
        for start, end in ((0, 640), (640, 1056), (1056, 1536)):
            parts.append(model(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    assert float(stats.total_density) == pytest.approx(density_of(model, ids))
    assert stats.dense_calls == 0
    with seer.dense(model):
        assert not torch.allclose(logits_of(model, ids), whole, atol=0.1)
    short = 1024
    mask = torch.ones(2, 1536, dtype=torch.int64)
    mask[1, : 1536 - short] = 0
    padded = torch.cat([ids, ids])
    padded[1, 1536 - short :] = ids[0, :short]
    left = logits_of(model, padded, attention_mask=mask)
    torch.testing.assert_close(left[:1], whole, **CLOSE)
    torch.testing.assert_close(left[1:, 1536 - short :], whole[:, :short], **CLOSE)
    right = logits_of(model, torch.cat([ids, ids]), attention_mask=mask.flip(1))
    torch.testing.assert_close(right[1:, :short], whole[:, :short], **CLOSE)


def test_gates_with_budgets_on_disk(calibrated, model_of, caplog):
    _, budgets, folder = calibrated
    assert stored_budgets(folder) == budgets
    description = json.loads((folder / "gate_config.json").read_text())
    assert description["format_version"] == 2  # which readers of version 1 refuse by that number
    with safe_open(folder / "gates.safetensors", "pt") as file:
        assert json.loads(file.metadata()["gate_config"])["budgets"] == description["budgets"]
    assert state_of(seer.attach(model_of(), folder)).policy == budgets.policy()
    other = seer.attach(model_of(), folder, density=0.3)
    assert state_of(other).policy == budgets.policy(0.3)
    seer.set_policy(other, density=0.1)
    assert state_of(other).policy == budgets.policy(0.1)
    assert not caplog.records


def test_budgets_may_be_edited_by_hand_and_damage_is_seen(calibrated, model_of, tmp_path, caplog):
    _, _, folder = calibrated
    path = tmp_path / "gate_config.json"
    (tmp_path / "gates.safetensors").write_bytes((folder / "gates.safetensors").read_bytes())
    data = json.loads((folder / "gate_config.json").read_text())
    data["budgets"]["default"] = 0.1
    path.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        assert stored_budgets(tmp_path).default == 0.1
    assert "budgets" in caplog.text
    for change in ({"curves": []}, {"curves": "x"}, {"default": 0.9}, {"tokens": -1}, {"block_size": 64}):
        path.write_text(json.dumps({**data, "budgets": {**data["budgets"], **change}}))
        with pytest.raises(DamagedFileError, match="describes no valid gates"):
            seer.attach(model_of(), tmp_path)
    path.write_text(json.dumps({**data, "format_version": 3}))
    with pytest.raises(DamagedFileError, match="format_version 3, this version of seerattention reads 1 to 2; upgrade"):
        seer.attach(model_of(), tmp_path)


def test_gates_without_budgets_are_as_before(model_of, tmp_path):
    seer.save_gates(attach(model_of(), seer.TopK(0.5)), tmp_path)
    assert json.loads((tmp_path / "gate_config.json").read_text())["format_version"] == 1
    assert stored_budgets(tmp_path) is None
    with pytest.raises(ValueError, match=r"no budgets were fitted .*seerattention\.calibrate\(model, batches\)"):
        seer.attach(model_of(), tmp_path, density=0.1)


def test_a_density_is_all_that_is_said(calibrated, model_of, ids_of):
    model, _, folder = calibrated
    for other in ({"prefill": seer.TopK(0.1)}, {"selector": lambda q, k, **_: None}):
        with pytest.raises(ValueError, match=r"got density=0\.1 and .*give one of them"):
            seer.attach(model_of(), folder, density=0.1, **other)
    with pytest.raises(ValueError, match="give one of them"):
        seer.set_policy(model, seer.TopK(0.1), density=0.1)
    for density in (0.01, 0.6):
        with pytest.raises(ValueError, match="budgets for densities from 0.1 to 0.4"):  # noqa: RUF043
            seer.attach(model_of(), folder, density=density)
    with pytest.raises(ValueError, match="must be a finite number"):
        seer.attach(model_of(), folder, density="much")
    fresh = model_of()
    with pytest.raises(ValueError, match="no budgets were fitted"):
        seer.attach(fresh, seer.GateConfig(), density=0.1)
    assert not seer.hf.is_attached(fresh)
    attach(fresh)
    with pytest.raises(ValueError, match="no budgets were fitted"):
        seer.set_policy(fresh, density=0.1)
    with pytest.raises(ValueError, match="got both"):
        seer.calibrate(fresh, [ids_of(64)], densities=(0.1,), density=0.1)
    for wrong in (2048, 5000.5):
        with pytest.raises(ValueError, match="shortest must be a whole number of tokens, 4096 or more"):
            seer.calibrate(fresh, [ids_of(64)], shortest=wrong)
    with pytest.raises(ValueError, match="shortest is for budgets"):
        seer.calibrate(fresh, [ids_of(64)], density=0.1, shortest=8192)
    with pytest.raises(ValueError, match="for a single density"):
        seer.calibrate(fresh, [ids_of(64)], policy=RelativeThreshold(1.0))
    with pytest.raises(ValueError, match=r"too short to fit budgets of density 0\.2 \(needs 4096 tokens\)"):
        seer.calibrate(fresh, [ids_of(640)], densities=(0.2,))
    assert state_of(fresh).budgets is None


def test_fresh_gates_have_the_relative_threshold(model_of):
    assert state_of(seer.attach(model_of(), seer.GateConfig())).policy == RelativeThreshold(1.0)


@pytest.mark.parametrize("layers", [(), (0.5, 2.0)])
@pytest.mark.parametrize("lengths", [None, torch.tensor([20 * 32, 11 * 32 - 5])])
def test_histograms_count_what_a_threshold_would_keep(lengths, layers, monkeypatch):
    """Of two layers, in slices of rows; exact at the edges of bins."""
    monkeypatch.setattr("seerattention.measure.budgets._SLICE", 1000)
    seen, kept, causal = Seen(layers), {}, 0
    for seed in (0, 1):
        logits = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(seed)) * 2
        inputs = SimpleNamespace(
            gate=SimpleNamespace(block_size=32), lengths=lengths, q=torch.zeros(2, 3, 640, 8), layer=seed,
            gate_logits=lambda masked=True, logits=logits: logits,
        )  # fmt: skip
        seen(inputs, None)
        for floor in (1, 2, 4):
            for edge in (0.25, 1.0, 4.0):
                policy = RelativeThreshold(edge, min_blocks=floor, first_blocks=1, dense_rows=0, layers=layers)
                policy = policy.of_layer(seed)
                counts = policy.select(logits, block_size=32, lengths=lengths).counts
                kept[floor, edge] = kept.get((floor, edge), 0) + counts.sum((0, 1)).double()
        causal = causal + policy.select(logits, block_size=32, lengths=lengths).counts.ge(1).sum((0, 1))
    assert seen.block_size == 32
    for (floor, edge), counts in kept.items():
        above = seen.above(floor)
        place = round((torch.tensor(edge).log2().item() + 16) * 32)
        assert torch.equal(above[:, place], counts)
    assert torch.equal(above[:, 0], causal.double() * torch.arange(1, 21))
    assert causal_softmax(logits).shape == (2, 3, 20, 20)


@pytest.mark.parametrize("growth", [0.25, 0.5])
def test_one_curve_by_itself(growth):
    """Fitted on what a synthetic map says, the budget has its density at every length of it."""
    from seerattention.measure.budgets import _Curve

    seen = Seen()
    num = 300
    logits = torch.randn(1, 2, num, num, generator=torch.Generator().manual_seed(5)) * 2.5
    inputs = SimpleNamespace(
        gate=SimpleNamespace(block_size=64), lengths=None, q=torch.zeros(1, 2, num * 64, 8), layer=0,
        gate_logits=lambda masked=True: logits,
    )  # fmt: skip
    seen(inputs, None)
    curve = _Curve(seen.above(2), 0.1, 64, growth)
    assert curve.fit()
    budget = curve.budget(0.1, min_blocks=2)
    assert isinstance(budget, Budget)
    mask = budget.select(logits, block_size=64).to_mask()[0].double()
    for blocks in (64, 80, 100, 128, 200, 300):
        found = mask[:, :blocks].sum() / (blocks * (blocks + 1))
        assert 0.095 < found < 0.105, blocks
    assert budget.factors[1] == pytest.approx(budget.factors[0] * 64**growth)
    assert budget.factor(4 * num) == budget.factor(num) == budget.factors[-1]
    assert not _Curve(seen.above(4), 0.05, 32, growth).fit()  # four blocks in each of 32 rows are more than that
