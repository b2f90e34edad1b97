"""Oracles: the true attention map, reduced by its maxima or its mass, or so that every query is served."""

from __future__ import annotations

import itertools

import pytest
import torch

import baseline_cases as cases
from seerattention import Threshold, TopK, TopP
from seerattention.baselines import Oracle, OracleCover
from seerattention.baselines.oracle_cover import block_masses
from seerattention.baselines.prompt import Prompt

BLOCK = 32


def attention(q, k, start):
    """The whole map, float64 ``[T, L]``."""
    shares = torch.zeros(len(q), len(k), dtype=torch.float64)
    for row, query in enumerate(q):
        shares[row, : start + row + 1] = (k[: start + row + 1] @ query).softmax(0)
    return shares


REDUCTIONS = {
    "max": lambda tile: tile.max(),
    "mass": lambda tile: tile.sum(),
    "row_mass": lambda tile: max(tile.sum(-1).tolist()),
}


def brute_map(reduce):
    def scores(q, k, start):
        shares, first, blocks = attention(q, k, start), start // BLOCK, -(-len(k) // BLOCK)
        found = torch.zeros(blocks - first, blocks, dtype=torch.float64)
        for i in range(first, blocks):
            for j in range(i + 1):
                tile = shares[max(0, i * BLOCK - start) : (i + 1) * BLOCK - start, j * BLOCK : (j + 1) * BLOCK]
                found[i - first, j] = REDUCTIONS[reduce](tile)
        return found.log()

    return scores


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("policy", [TopK(0.4), TopP(0.7), Threshold(0.1)], ids=repr)
def test_maxima_and_mass(reduce, policy):
    selector = Oracle(policy, BLOCK, reduce)
    cases.assert_every_case(selector, cases.brute_policy(brute_map(reduce), policy), chunks=False)
    cases.assert_rowwise(selector)


def test_maxima_and_masses_differ():
    inputs = cases.make_inputs([300])
    masks = [Oracle(TopK(0.4), BLOCK, reduce).select(inputs).to_mask() for reduce in REDUCTIONS]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(masks, 2))


@pytest.mark.parametrize("start", [128, 77])
def test_chunks_read_what_their_whole_prompt_does(start):
    chunk, whole = cases.make_inputs([300], start=start), cases.make_inputs([300])
    selector = Oracle(TopK(0.3), block_size=32)
    found, expected = (selector.select(inputs).to_mask() for inputs in (chunk, whole))
    first = -(-start // 32)  # a block that the chunk splits is pooled over what it holds
    assert torch.equal(found[:, :, first - start // 32 :], expected[:, :, first:])
    assert Oracle.takes_chunks


def brute_cover(p):
    """The worst query names its best block, until no query is short."""

    def mask(q, k, start):
        shares, first, blocks = attention(q, k, start), start // BLOCK, -(-len(k) // BLOCK)
        kept = torch.zeros(blocks - first, blocks, dtype=torch.bool)
        for i in range(first, blocks):
            rows = shares[max(0, i * BLOCK - start) : (i + 1) * BLOCK - start].tolist()
            masses = [[sum(row[j * BLOCK : (j + 1) * BLOCK]) for j in range(i + 1)] for row in rows]
            chosen = {i}
            while len(chosen) <= i:
                sums = [sum(mass[j] for j in chosen) for mass in masses]
                worst = min(range(len(sums)), key=lambda t: sums[t])
                if sums[worst] >= p:
                    break
                chosen.add(max(set(range(i + 1)) - chosen, key=lambda j: masses[worst][j]))
            kept[i - first, list(chosen)] = True
        return kept

    return mask


@pytest.mark.parametrize("p", [0, 0.3, 0.6, 0.9])
def test_cover(p):
    selector = OracleCover(p, block_size=BLOCK)
    cases.assert_every_case(selector, brute_cover(p), sharp=0.5, alike=2.5)
    cases.assert_padded_chunks(selector)
    cases.assert_rowwise(selector)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_every_query_keeps_its_share(p):
    inputs = cases.make_inputs([300], sharp=0.5, alike=2.5)
    lists = OracleCover(p, block_size=BLOCK).select(inputs)
    mask = lists.to_mask()[0]
    assert lists.density() < 0.85
    tokens = mask.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :300, :300]
    for _, h, shares in cases.expected_of(inputs, BLOCK, attention):
        assert float((shares * tokens[h]).sum(-1).min()) >= p - 1e-6


def test_cover_of_everything():
    assert OracleCover(1.0, block_size=BLOCK).select(cases.make_inputs([300])).density() == 1.0
    assert OracleCover(0.0, block_size=BLOCK).select(cases.make_inputs([300])).counts.unique().tolist() == [1]


def test_masses():
    inputs = cases.make_inputs([300], start=77)
    prompt = Prompt(0, inputs.q[0], inputs.k[0], cases.SCALE, BLOCK)
    together = block_masses(prompt, range(2, 10))
    for row in range(2, 10):
        masses = block_masses(prompt, range(row, row + 1))[:, 0]
        torch.testing.assert_close(together[:, row - 2], masses, rtol=0, atol=0)
        there = slice(max(0, 77 - row * BLOCK), min(BLOCK, 300 - row * BLOCK))
        assert masses[:, : there.start].isposinf().all()
        assert masses[:, there.stop :].isposinf().all()
        assert (masses[:, there, row + 1 :] == 0).all()
        for _, h, shares in cases.expected_of(inputs, BLOCK, attention):
            here = shares[max(0, row * BLOCK - 77) : (row + 1) * BLOCK - 77]
            wanted = torch.stack([tile.sum(-1) for tile in here.split(BLOCK, 1)], -1)[:, : row + 1]
            torch.testing.assert_close(masses[h, there, : row + 1].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most", [1, 40_000])
def test_rows_are_covered_in_groups(most, monkeypatch):
    """Whatever is held at once, the same is kept."""
    inputs = cases.make_inputs([300], start=77, sharp=0.5, alike=2.5)
    whole = OracleCover(0.6, block_size=BLOCK).select(inputs).to_mask()
    monkeypatch.setattr("seerattention.baselines.oracle_cover._MOST_MASSES", most)
    assert torch.equal(OracleCover(0.6, block_size=BLOCK).select(inputs).to_mask(), whole)


def test_names():
    cases.assert_goes_round("oracle:reduce=mass:policy=top_p(0.95)", Oracle(TopP(0.95), reduce="mass"))
    cases.assert_goes_round("oracle:reduce=row_mass:policy=top_k(0.1)", Oracle(TopK(0.1), reduce="row_mass"))
    cases.assert_goes_round("oracle_cover:p=0.8", OracleCover(0.8))


def test_bad_arguments():
    with pytest.raises(ValueError, match="Oracle: reduce must be one of"):
        Oracle(reduce="sum")
    with pytest.raises(ValueError, match="OracleCover: p must be a number from 0 to 1"):
        OracleCover(1.5)
    with pytest.raises(ValueError, match="OracleCover: block_size must be one of"):
        OracleCover(block_size=16)
