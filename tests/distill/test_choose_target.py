"""Which target a model gets where none is asked for: what is compared, how it is decided, and where it cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import seerattention as seer
from seerattention.baselines import Oracle
from seerattention.distillation import choose_target, targets
from seerattention.measure.output import DenseOutput
from seerattention.policies import RelativeThreshold
from tiny_models import logits_of, make_ids, make_model

LENGTH = 4096


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def test_what_is_compared_are_true_maps_of_one_density(model):
    ids = make_ids(LENGTH)
    found = choose_target(model, [{"input_ids": ids}])
    assert found.target == ("row_mass" if found.lost["max"] > 1.4 * found.lost["row_mass"] else "max")
    assert 0.15 <= found.density <= 0.25
    seen = targets._Seen(64, range(2))
    seer.attach(model, selector=Oracle(), min_context=0)
    with seer.observe(model, seen), seer.dense(model):
        dense = logits_of(model, ids).float().log_softmax(-1)
    seer.detach(model)
    for target in ("max", "row_mass"):
        policy = RelativeThreshold(seen.kept[target].factor(found.density))
        seer.attach(model, selector=Oracle(policy, reduce=target), min_context=0)
        with seer.record(model) as stats:
            said = logits_of(model, ids).float().log_softmax(-1)
        seer.detach(model)
        assert float(stats.total_density) == pytest.approx(found.density, rel=0.03)
        places = torch.linspace(0, LENGTH - 1, 512).round().long()
        lost = (dense.exp() * (dense - said)).sum(-1)[0, places].mean()
        assert found.lost[target] == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize(
    ("family", "options", "block_size", "gated"),
    [
        ("llama", {"initializer_range": 0.6}, 64, {0, 1}),
        ("llama", {}, 32, {0, 1}),
        ("gemma3_text", {"sliding_window": LENGTH}, 64, {1, 2}),  # layer 0 sees as far as that, and gets no gate
        ("gemma3_text", {"sliding_window": 512}, 64, {1, 2}),
    ],
)
def test_both_maps_have_the_density_in_the_layers_that_get_gates(monkeypatch, family, options, block_size, gated):
    model, reads = make_model(family, **options), []
    changed = DenseOutput.changed

    def keep(self):
        found = changed(self)
        reads.append(found[1].per_layer)
        return found

    monkeypatch.setattr(DenseOutput, "changed", keep)
    found = choose_target(model, [{"input_ids": make_ids(LENGTH, seed=seed)} for seed in (0, 1)], block_size=block_size)
    assert 2 <= len(reads) <= 6
    read = reads[-1]
    assert sum(read[layer] for layer in gated) / len(gated) == pytest.approx(found.density, rel=0.1)
    assert all(density == pytest.approx(1, abs=1e-3) for layer, density in read.items() if layer not in gated)


@pytest.mark.parametrize(("lost", "target"), [((0.031, 0.015), "row_mass"), ((0.015, 0.014), "max"), ((1, 2), "max")])
def test_the_papers_target_is_left_only_where_it_loses_plainly_more(model, monkeypatch, lost, target):
    values = iter(lost)
    read = SimpleNamespace(per_layer={0: 0.15, 1: 0.15})
    monkeypatch.setattr(DenseOutput, "changed", lambda self: (next(values), read))
    monkeypatch.setattr(targets, "_compared_at", lambda least, block_size: 0.15)
    found = choose_target(model, [{"input_ids": make_ids(LENGTH)}])
    assert (found.target, found.density, found.lost) == (
        target,
        0.15,
        dict(zip(("max", "row_mass"), lost, strict=True)),
    )


def test_padding_counts_for_nothing(model):
    ids = make_ids(LENGTH)
    padded = torch.cat([ids, torch.zeros(1, 900, dtype=ids.dtype)], 1)
    mask = (torch.arange(padded.shape[1]) < LENGTH).long()[None]
    alone, beside = targets._Seen(64, range(2)), targets._Seen(64, range(2))
    for seen, batch in ((alone, {"input_ids": ids}), (beside, {"input_ids": padded, "attention_mask": mask})):
        seer.attach(model, selector=Oracle(), min_context=0)
        with seer.observe(model, seen), seer.dense(model), torch.no_grad():
            model(**batch)
        seer.detach(model)
    for target, one in alone.kept.items():
        assert one.causal == beside.kept[target].causal
        assert torch.equal(one.kept, beside.kept[target].kept)


def test_what_it_cannot_be_chosen_on(model):
    with pytest.raises(ValueError, match="chosen on prompts, got none"):
        choose_target(model, [])
    with pytest.raises(ValueError, match=r"too short to compare targets.*use about 4,096 tokens or more"):
        choose_target(model, [{"input_ids": make_ids(900)}])
    with pytest.raises(ValueError, match="has no LM head"):
        choose_target(model.model, [{"input_ids": make_ids(LENGTH)}])
    seer.attach(model, selector=Oracle())  # nothing was left on it
    with pytest.raises(ValueError, match="attached already"):
        choose_target(model, [{"input_ids": make_ids(LENGTH)}])
    seer.detach(model)
