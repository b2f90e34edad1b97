"""Numbers of what lists keep of the true map: against loops over small maps, and in a model against whole attention."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import seerattention as seer
from seerattention.baselines import Oracle, Random
from seerattention.gates.query_state import Recent
from seerattention.hf import dense, observe
from seerattention.hf.prompts import run_prompt
from seerattention.measure import RECALLS, Recall, block_recall, compare_recall, measure_recall, recall, recall_sums
from seerattention.measure.kept import LOOK_UP, PEAK, count_kept
from seerattention.ops import Span

from .distill.tiny import attached_llama, random_batches, tiny_llama

BATCH, HEADS, ROWS = 2, 5, 9
QUERIES = 5  # of a row
PAIRS = (
    "block", "far", "far_mass", "peaks", "high_peaks", "best_mass", "best", "look_up_mass", "look_up", "needles",
    "needle_look_up",
)  # fmt: skip


def random_map(seed: int, sharpness: float = 6.0):
    """Masses, peaks, a choice and the rows that hold a query; the second sequence ends two rows early."""
    generator = torch.Generator().manual_seed(seed)
    causal = torch.ones(ROWS, ROWS).tril().bool()
    masses = torch.randn(BATCH, HEADS, ROWS, ROWS, generator=generator) * sharpness
    masses = masses.masked_fill(~causal, -math.inf).softmax(-1)
    peaks = (masses * (1 + (QUERIES - 1) * torch.rand(masses.shape, generator=generator))).clamp(max=1)
    selected = (torch.rand(masses.shape, generator=generator) < 0.5) & causal
    valid = torch.ones(BATCH, ROWS, dtype=torch.bool)
    valid[1, -2:] = False
    masses[1, :, -2:] = 0
    peaks[1, :, -2:] = 0
    return masses, peaks, selected, valid


def known(measured):
    """Its numbers without those of which there was nothing."""
    return {name: value for name, value in measured.numbers().items() if value is not None}


def by_loops(masses, peaks, selected, valid, head):
    """Kept and whole of every share of one head, and the block recall of its rows."""
    found, rows = {name: [0.0, 0.0] for name in PAIRS}, []

    def add(name, kept, whole):
        found[name][0] += kept
        found[name][1] += whole

    for b, row in itertools.product(range(BATCH), range(ROWS)):
        if not valid[b, row]:
            continue
        mass, peak, chosen = (x[b, head, row].tolist() for x in (masses, peaks, selected))
        rows.append(sum(m for m, c in zip(mass, chosen, strict=True) if c))
        add("block", rows[-1], 1)
        far = range(1, row - 1)  # neither block 0, nor the row's own, nor the one before
        whole, kept = sum(mass[n] for n in far), sum(mass[n] for n in far if chosen[n])
        add("far_mass", kept, whole)
        if whole >= 0.01:
            add("far", kept / whole, 1)
        for name, least in (("peaks", PEAK), ("high_peaks", LOOK_UP)):
            high = [n for n in far if peak[n] > least]
            add(name, sum(chosen[n] for n in high), len(high))
        best = max(far, key=lambda n: peak[n], default=None)
        if best is not None and peak[best] > LOOK_UP:
            names = ["best"]
            if peak[best] == max(peak):
                names.append("look_up")
            for name in names:
                add(f"{name}_mass", mass[best] * chosen[best], mass[best])
                add(name, chosen[best], 1)
                if mass[best] * QUERIES <= 2:
                    add({"best": "needles", "look_up": "needle_look_up"}[name], chosen[best], 1)
    return found, rows


@pytest.mark.parametrize("seed", range(3))
def test_every_number_by_its_definition(seed):
    layers = [random_map(10 * seed + layer) for layer in range(2)]
    measured, loops, rows = Recall(), [], []
    for layer, (masses, peaks, selected, valid) in enumerate(layers):
        measured.add(layer, *count_kept(masses, peaks, selected, torch.arange(ROWS), valid, QUERIES))
        for head in range(HEADS):
            found, own = by_loops(masses, peaks, selected, valid, head)
            loops.append(found)
            rows += own
    numbers = measured.numbers()
    assert list(numbers) == list(RECALLS)
    for name in PAIRS:
        kept, whole = (sum(found[name][place] for found in loops) for place in (0, 1))
        assert whole > 0
        assert numbers[name] == pytest.approx(kept / whole, rel=1e-5), name
        mine = [sum(found[name][place] for found in loops[:HEADS]) for place in (0, 1)]
        assert measured.by_layer(name)[0] == pytest.approx(mine[0] / mine[1], rel=1e-5)
    worst = sorted(rows)[: math.ceil(0.1 * len(rows))]
    assert numbers["worst_rows"] == pytest.approx(sum(worst) / len(worst), abs=1e-3)
    assert numbers["worst_heads"] == pytest.approx(min(f["block"][0] / f["block"][1] for f in loops), rel=1e-5)
    for name, ratio in {"best_heads": "best", "look_up_heads": "look_up", "needle_heads": "needles"}.items():
        shares = [found[ratio][0] / found[ratio][1] for found in loops if found[ratio][1]]
        assert numbers[name] == pytest.approx(sum(shares) / len(shares))
    busy = sorted(loops, key=lambda found: -found["best"][1])
    shares = [found["best"][0] / found["best"][1] for found in busy[:4]]
    assert numbers["busy_heads"] == pytest.approx(sum(shares) / 4)
    assert numbers["worst_busy_head"] == pytest.approx(min(shares))
    assert numbers["block_needles"] == pytest.approx(numbers["block"] * numbers["needle_heads"])
    assert 0 < numbers["block_needles"] < numbers["block"]


def test_what_there_is_nothing_of_is_none():
    masses, peaks, _, valid = random_map(0, sharpness=0.01)  # nearly uniform: nothing stands out
    measured = Recall()
    measured.add(
        3, *count_kept(masses[..., :4, :4], peaks[..., :4, :4] * 0, None, torch.arange(4), valid[:, :4], QUERIES)
    )
    numbers = measured.numbers()
    assert numbers["block"] > 0
    for name in ("peaks", "best", "look_up", "needles", "best_heads", "busy_heads", "worst_busy_head", "block_needles"):
        assert numbers[name] is None
    assert measured.by_layer("look_up") == {3: None}
    assert Recall().numbers() == dict.fromkeys(RECALLS)
    with pytest.raises(ValueError, match="shares of a layer are block, far"):
        measured.by_layer("worst_rows")


def test_everything_is_kept_where_everything_is_read():
    masses, peaks, _, valid = random_map(1)
    measured = Recall()
    measured.add(0, *count_kept(masses, peaks, None, torch.arange(ROWS), valid, QUERIES))
    assert all(value == pytest.approx(1, abs=1e-3) for value in known(measured).values())


def test_sums_of_processes():
    """Two processes, of which one has seen a layer that the other has not."""
    one, two, both = Recall(), Recall(), Recall()
    for layer, mine in ((0, one), (0, two), (1, two)):
        masses, peaks, selected, valid = random_map(layer + 7)
        counted = count_kept(masses, peaks, selected, torch.arange(ROWS), valid, QUERIES)
        mine.add(layer, *counted)
        both.add(layer, *counted)
    sent: list[torch.Tensor] = []
    heads = {0: HEADS, 1: HEADS}
    one.joined(heads, lambda x: sent.append(x) or x, "cpu")
    assert all(x.dtype == torch.float32 for x in sent)
    others = iter(sent)
    joined = two.joined(heads, lambda x: x + next(others), "cpu")
    assert known(joined) == pytest.approx(known(both), rel=1e-5)


# ---- in a model ------------------------------------------------------------------------------------------------------


def whole_maps(model, batch, block):
    """Layer -> masses and peaks ``[B, H, N, N]`` from the whole attention map of a prompt."""
    found = {}

    def see(inputs, blocks):
        length = inputs.q.shape[2]
        scores = inputs.q.double() @ inputs.k.double().repeat_interleave(2, 1).mT * inputs.scale
        probabilities = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
        tiles = probabilities.unflatten(-1, (-1, block)).unflatten(2, (-1, block))
        found[inputs.layer] = tiles.sum((3, 5)).float() / block, tiles.amax((3, 5)).float()

    with dense(model), observe(model, see), torch.no_grad():
        run_prompt(model, batch)
    return found


@pytest.mark.parametrize("tiles", [1 << 24, 100])
def test_in_a_model(monkeypatch, tiles):
    """Also where rows are looked at some at a time."""
    monkeypatch.setattr(recall, "_SLICE", tiles)
    model, (batch,) = attached_llama(), random_batches(1)
    lists = {}

    def see(inputs, blocks):
        lists[inputs.layer] = seer.TopK(0.3).select(inputs.gate_logits(), block_size=32).to_mask()

    with dense(model), observe(model, see), torch.no_grad():
        run_prompt(model, batch)
    expected = Recall()
    for layer, (masses, peaks) in whole_maps(model, batch, 32).items():
        valid = torch.ones(masses.shape[0], 10, dtype=torch.bool)
        expected.add(layer, *count_kept(masses, peaks, lists[layer], torch.arange(10), valid, 32))
    found = measure_recall(model, [batch], seer.TopK(0.3))
    numbers = known(expected)
    assert 0 < numbers["look_up"] < 1
    assert known(found) == pytest.approx(numbers, rel=1e-4, abs=1e-3)
    assert found.by_layer() == pytest.approx(block_recall(model, [batch], seer.TopK(0.3)))
    sums = recall_sums(model, [batch], seer.TopK(0.3))
    assert float(sums[1][1]) == 2 * 4 * 10


def test_padding_changes_nothing():
    model = attached_llama()
    long, short = random_batches(2, batch=1)
    short = {"input_ids": short["input_ids"][:, :203]}
    ids = torch.cat([long["input_ids"], torch.nn.functional.pad(short["input_ids"], (117, 0))])
    mask = torch.ones_like(ids)
    mask[1, :117] = 0
    padded = measure_recall(model, [{"input_ids": ids, "attention_mask": mask}], seer.TopK(0.4))
    alone = measure_recall(model, [long, short], seer.TopK(0.4))
    assert known(padded) == pytest.approx(known(alone), rel=1e-4, abs=1e-3)


def test_several_choices_on_one_map():
    model, batches = attached_llama(), random_batches(2)
    choices = {
        "half": seer.TopK(0.5),
        "true": Oracle(seer.TopK(0.2), block_size=32),
        "drawn": Random(0.2, block_size=32),
        "all": seer.Dense(),
    }
    found = compare_recall(model, batches, choices)
    assert list(found) == list(choices)
    half = measure_recall(model, batches, seer.TopK(0.5))
    assert known(found["half"]) == pytest.approx(known(half), rel=1e-5)
    shown = {name: measured.numbers()["look_up"] for name, measured in found.items()}
    assert shown["drawn"] < shown["true"] < shown["all"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"one block size .* \[32, 64\]"):
        compare_recall(model, batches, {**choices, "other": Random(0.2)})
    with pytest.raises(ValueError, match="at least one policy or selector"):
        compare_recall(model, batches, {})


def test_layers_without_a_gate_are_left_out_of_policies_only():
    model = seer.attach(tiny_llama(), selector=Random(0.5, block_size=32), min_context=0)
    found = compare_recall(model, random_batches(1), {"gates": seer.TopK(0.5), "drawn": Random(0.5, block_size=32)})
    assert found["gates"].numbers()["block"] is None
    assert sorted(found["drawn"].heads) == [0, 1]


def test_decoding():
    """By KV head; a token's own block is its own, and far blocks are those before the one before it."""
    config = seer.GateConfig(prefill=None, decode=seer.DecodeGateConfig(block_size=16))
    model = seer.attach(tiny_llama(), config, min_context=0)
    batches = random_batches(1, length=200)
    found = measure_recall(model, batches, seer.TopK(0.3), phase="decode")
    assert found.heads[0].shape == (2, len(PAIRS), 2)
    assert float(found.heads[0][0, 0, 1]) == 2 * (200 - 16)
    assert {"block", "far", "peaks", "look_up", "needles"} <= known(found).keys()
    assert all(0 < value < 1 for value in known(found).values())
    everything = measure_recall(model, batches, seer.TopK(1.0), phase="decode").numbers()
    assert everything["look_up"] == pytest.approx(1)


@pytest.mark.parametrize("size", [2, 9])
def test_tokens_are_judged_by_what_decoding_reads_with_a_window(size):
    config = seer.GateConfig(prefill=None, decode=seer.DecodeGateConfig(block_size=16, query_window=size))
    model, seen = seer.attach(tiny_llama(), config, min_context=0), []
    with seer.observe(model, lambda inputs, blocks: seen.append(inputs)), torch.no_grad():
        model(**random_batches(1, length=90)[0])
    gate, inputs = seer.hf.gates_of(model, "decode")[0], seen[0]
    table, tokens = (inputs.cos, inputs.sin), torch.tensor([89, 3, 16, 40, 47])
    keys, whole = gate.encode_keys(inputs.k_pre, *table), Span(len(inputs.q), 90, 90)
    with torch.no_grad():
        expected = gate.score_window(Recent(gate.encode_queries(inputs.q_pre, *table)), keys, span=whole)
        found = recall._scores_of_tokens(inputs, gate, keys, tokens)
        alone = gate.score(gate.encode_queries(inputs.q_pre, *table), keys, span=whole).log_softmax(-1)
    torch.testing.assert_close(found, expected[:, :, tokens])
    assert not torch.allclose(found[:, :, -1, :2], alone[:, :, 47, :2])
    one = [measure_recall(model, random_batches(1, length=200), seer.TopK(0.3), phase="decode").numbers()["block"]]
    for layer in seer.hf.gates_of(model, "decode"):
        layer.set_query_window(1)
    one.append(measure_recall(model, random_batches(1, length=200), seer.TopK(0.3), phase="decode").numbers()["block"])
    assert one[0] != one[1]
