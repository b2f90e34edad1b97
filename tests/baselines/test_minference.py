"""MInference: chosen columns and diagonals, every tile with a token pair of one of them, and the pairs themselves."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import baseline_cases as cases
import seerattention as seer
from seerattention.baselines import MInference, MInferenceExact, minference
from seerattention.baselines.prompt import Prompt
from tiny_models import logits_of, make_ids, make_model


def brute_patterns(vertical, slash, last):
    """Chosen keys and distances, by sums along explicit columns and diagonals."""

    def patterns(q, k, start):
        length, count = len(k), min(last, len(q))
        attention = torch.zeros(count, length, dtype=torch.float64)
        for row, t in enumerate(range(length - count, length)):
            attention[row, : t + 1] = (k[: t + 1] @ q[t - start]).softmax(0)
        columns = [float(attention[:, c].sum()) for c in range(length)]
        columns = [math.inf] * min(length, minference.FIRST_KEYS) + columns[minference.FIRST_KEYS :]
        diagonals = []
        for distance in range(length - count + 1):
            total = float(attention.diagonal(length - count - distance).sum())
            diagonals.append(math.inf if distance < minference.NEAREST_DIAGONALS else total)
        keys = sorted(range(length), key=lambda c: (-columns[c], c))[: max(vertical, minference.LEAST_VERTICAL)]
        nearest = sorted(range(len(diagonals)), key=lambda d: (-diagonals[d], d))
        return set(keys), set(nearest[: max(slash, minference.LEAST_SLASH)])

    return patterns


def brute(vertical, slash, last, block):
    def mask(q, k, start):
        keys, distances = brute_patterns(vertical, slash, last)(q, k, start)
        first, blocks = start // block, -(-len(k) // block)
        kept = torch.zeros(blocks - first, blocks, dtype=torch.bool)
        for i in range(first, blocks):
            end = (i + 1) * block
            for d in distances:  # the keys that the whole query block needs of a diagonal
                for c in {end - d - block, end - d - 1}:
                    if 0 <= c < len(k):
                        kept[i - first, c // block] = True
                if end - d > 0:
                    kept[i - first, max(0, end - d - block) // block] = True
            for c in keys:
                kept[i - first, c // block] = True
        return kept

    return mask


@pytest.fixture
def few(monkeypatch):
    """Smaller numbers in any case, so that little is chosen of short prompts."""
    for name, value in {"LEAST_VERTICAL": 1, "LEAST_SLASH": 1, "FIRST_KEYS": 2, "NEAREST_DIAGONALS": 3}.items():
        monkeypatch.setattr(minference, name, value)


@pytest.mark.parametrize(("vertical", "slash", "last", "block"), [(4, 6, 64, 32), (0, 9, 20, 32), (3, 5, 7, 64)])
def test_definition(few, vertical, slash, last, block):
    selector = MInference(vertical, slash, last_queries=last, block_size=block)
    cases.assert_every_case(selector, brute(vertical, slash, last, block), sharp=2.0)
    cases.assert_padded_chunks(selector)


def test_definition_with_the_published_minimum():
    selector = MInference(10, 20, block_size=32)
    cases.assert_every_case(selector, brute(10, 20, 64, 32))
    assert MInference().select(cases.make_inputs([1000])).density() == 1.0  # all of a short prompt


@pytest.mark.parametrize(("length", "start"), [(300, 0), (300, 77), (65, 0), (200, 190), (1, 0)])
def test_patterns(few, length, start):
    inputs = cases.make_inputs([length], start=start, sharp=2.0)
    keys, distances = MInference(8, 12).patterns(Prompt(0, inputs.q[0], inputs.k[0], cases.SCALE, 64))
    for _, h, (wanted_keys, wanted_distances) in cases.expected_of(inputs, 64, brute_patterns(8, 12, 64)):
        assert set(keys[h].nonzero().flatten().tolist()) == wanted_keys
        assert set(distances[h].nonzero().flatten().tolist()) == wanted_distances


def test_tiles_hold_every_pair_of_the_exact_form(few):
    """Each pair of tokens that a chosen key or distance means lies in a tile that is read, and no tile is without."""
    inputs = cases.make_inputs([320], sharp=2.0)
    selector = MInference(2, 4, block_size=32)
    keys, distances = selector.patterns(Prompt(0, inputs.q[0], inputs.k[0], cases.SCALE, 32))
    t, c = torch.arange(320)[:, None], torch.arange(320)
    exact = (keys[:, None] | distances[:, (t - c).clamp(min=0)]) & (c <= t)
    tiles = exact.unflatten(1, (10, 32)).unflatten(3, (10, 32)).any(4).any(2)
    assert torch.equal(selector.select(inputs).to_mask()[0], tiles)


def test_multiplier(few):
    inputs = cases.make_inputs([300])
    a, b = MInference(10, 20, 0.5).select(inputs), MInference(5, 10).select(inputs)
    assert torch.equal(a.to_mask(), b.to_mask())


def test_it_looks_at_the_end_of_the_prompt(few):
    cases.assert_rowwise(MInference(2, 4, block_size=32))


def test_names():
    cases.assert_goes_round("minference:vertical=100:slash=800:multiplier=0.5", MInference(100, 800, 0.5))


@pytest.mark.parametrize("options", [{"vertical": -1}, {"slash": 0.5}, {"last_queries": 0}, {"multiplier": -1}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"MInference: {next(iter(options))} must be"):
        MInference(**options)


# ---- the exact form ----------------------------------------------------------------------------------------------


def brute_pairs(vertical, slash, last, block):
    """Which keys each query reads, bool ``[T, L]``, one query block and key at a time."""

    def pairs(q, k, start):
        keys, distances = brute_patterns(vertical, slash, last)(q, k, start)
        read = torch.zeros(len(q), len(k), dtype=torch.bool)
        for t in range(start, len(k)):
            end = (t // block + 1) * block
            for c in range(t + 1):
                read[t - start, c] = c in keys or any(end - d - block <= c < end - d for d in distances)
        return read

    return pairs


def exact_inputs(lengths, **options):
    """Values that are not the keys; what is padding is NaN."""
    inputs = cases.make_inputs(lengths, sharp=2.0, **options)
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(inputs.k.shape, generator=generator)
    return dataclasses.replace(inputs, v=torch.where(inputs.k.isnan(), inputs.k, v))


@pytest.mark.parametrize(
    ("lengths", "start", "heads"),
    [
        ([1], None, (4, 2)),
        ([65], None, (2, 2)),
        ([150], None, (4, 1)),
        ([150], 77, (6, 2)),
        ([150, 37, 96], None, (4, 2)),
    ],
)
@pytest.mark.parametrize(("vertical", "slash", "last", "block"), [(4, 6, 64, 32), (3, 5, 7, 64)])
def test_exact_attention_and_density(few, monkeypatch, lengths, start, heads, vertical, slash, last, block):
    selector = MInferenceExact(vertical, slash, last_queries=last, block_size=block)
    inputs = exact_inputs(lengths, start=start, heads=heads[0], kv_heads=heads[1])
    blocks = selector.select(inputs)
    tiles = MInference(vertical, slash, last_queries=last, block_size=block)
    assert torch.equal(blocks.to_mask(), tiles.select(inputs).to_mask())
    out, read, causal = selector.attend(inputs, blocks), 0, 0
    assert out.shape == inputs.q.shape
    first = start or 0
    for b, h, pairs in cases.expected_of(inputs, block, brute_pairs(vertical, slash, last, block)):
        length = pairs.shape[1]
        k, v = (x[b, h // (heads[0] // heads[1]), :length].double() for x in (inputs.k, inputs.v))
        logits = inputs.q[b, h, : length - first].double() @ k.T * cases.SCALE
        expected = logits.masked_fill(~pairs, -math.inf).softmax(-1) @ v
        torch.testing.assert_close(out[b, h, : length - first].double(), expected, rtol=1e-4, atol=1e-5)
        read += int(pairs.sum())
        causal += sum(range(first + 1, length + 1))
    assert float(selector.share_read(inputs)) == pytest.approx(read / causal, abs=1e-12)
    assert read < causal or max(lengths) == 1
    monkeypatch.setattr("seerattention.baselines.prompt.MOST_SCORES", 1)
    torch.testing.assert_close(selector.attend(inputs, blocks).nan_to_num(), out.nan_to_num(), rtol=1e-5, atol=1e-6)
    assert float(selector.share_read(inputs)) == pytest.approx(read / causal, abs=1e-12)


def test_exact_form_reads_less_than_the_tiles_and_all_that_is_chosen(few):
    inputs = exact_inputs([320])
    exact, tiles = MInferenceExact(2, 4, block_size=32), MInference(2, 4, block_size=32).select(inputs)
    prompt = Prompt(0, inputs.q[0], inputs.k[0], cases.SCALE, 32)
    keys, distances = exact.patterns(prompt)
    t, c = torch.arange(320)[:, None], torch.arange(320)
    chosen = (keys[:, None] | distances[:, (t - c).clamp(min=0)]) & (c <= t)
    read = exact.reader(prompt)(range(10)).repeat_interleave(32, 1) & (c <= t)
    whole = tiles.to_mask()[0].repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert not (chosen & ~read).any()
    assert not (read & ~whole).any()
    assert chosen.sum() < read.sum() < (whole & (c <= t)).sum()


def test_exact_density_in_a_model(few):
    """What is recorded are pairs of tokens, and rows of a batch that would be dense by their length make it dense."""
    selector, ids = MInferenceExact(4, 6, block_size=32), make_ids(200, batch=2)
    model = seer.attach(make_model(), selector=selector, min_context=0)
    shares = []

    def look(inputs, blocks):
        shares.append(float(selector.share_read(inputs)))
        assert blocks.density() > shares[-1]

    with seer.record(model) as stats, seer.hf.observe(model, look):
        logits_of(model, ids)
    assert stats.dense_calls == 0
    assert stats.density == pytest.approx(sum(shares) / len(shares))
    assert 0 < stats.total_density < 1
    seer.detach(model)
    model, mask = seer.attach(make_model(), selector=selector, min_context=150), torch.ones_like(ids)
    mask[1, :100] = 0
    with seer.record(model) as stats, pytest.warns(UserWarning, match="reads single tokens"):
        logits_of(model, ids, attention_mask=mask)
    assert stats.sparse_calls == 0
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert stats.dense_calls == 0


def test_exact_names():
    cases.assert_goes_round("minference_exact:vertical=100:slash=800", MInferenceExact(100, 800))
    assert MInferenceExact().attention == "token by token"
    with pytest.raises(ValueError, match="MInferenceExact: slash must be"):
        MInferenceExact(slash=-1)
