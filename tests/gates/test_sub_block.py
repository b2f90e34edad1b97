"""The sub-block gate against its definition in float64: every token pair's sub-blocks, written out one by one."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seerattention as seer
from seerattention.gates import PrefillGate, SubBlockGate, build_gate
from seerattention.ops.gate_scores import reference
from seerattention.ops.span import Span

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 16, 32
POOLS = {"max": lambda x: x.amax(0), "min": lambda x: x.amin(0), "avg": lambda x: x.mean(0)}


def make_gate(block_size=BLOCK, heads=HEADS, kv_heads=KV_HEADS, **options) -> SubBlockGate:
    torch.manual_seed(0)
    gate = build_gate(
        seer.SubBlockGateConfig(**options),
        block_size=block_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
    )
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert isinstance(gate, SubBlockGate)
    return gate


def make_inputs(length, *, batch=1, heads=HEADS, kv_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(batch, n, length, HEAD_DIM, generator=generator) for n in (heads, kv_heads))
    angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.cat((angles, angles), -1)[None]
    return q, k, angles.cos(), angles.sin()


def reduced(products, column, kind):
    """The score of a tile, from what each query sub-block of its row has with each key, by the column of tiles."""
    if kind != "mass":
        found = torch.stack([x for of_query in products[column].values() for x in of_query])
        return found.amax() if kind == "max" else found.logsumexp(0)
    shares = []
    for query, found in products[column].items():
        everything = [x for tile in products for x in tile.get(query, ())]
        shares.append(torch.stack(found).logsumexp(0) - torch.stack(everything).logsumexp(0))
    return torch.stack(shares).amax()


def definition(gate, q, k, cos, sin):
    """Scores ``[Hq, N, N]`` of one prompt. A pair of sub-blocks counts where a query of one sees a key of the other."""
    config, length, group = gate.config, q.shape[1], gate.num_heads // gate.num_kv_heads
    num = math.ceil(length / gate.block_size)
    products = [[[defaultdict(list) for _ in range(num)] for _ in range(num)] for _ in range(gate.num_heads)]

    def vectors(x, kinds, weight, pitch):
        for begin in range(0, length, pitch):
            tokens = x[begin : begin + pitch].double()
            vector = torch.cat([POOLS[kind](tokens) for kind in kinds]) @ weight.double()
            if config.rope:
                step = max(1, HEAD_DIM // gate.width)
                c, s = (table[begin, ::step].double() for table in (cos, sin))
                turned = vector[: len(c)]
                first, second = turned.chunk(2)
                vector = torch.cat((turned * c + torch.cat((-second, first)) * s, vector[len(c) :]))
            yield begin, vector

    for head in range(gate.num_heads):
        k_weight = gate.k_linear[head // group if config.share_keys else head]
        keys = list(vectors(k[head // group], config.k_pooling, k_weight, config.k_pitch))
        for q_begin, query in vectors(q[head], config.q_pooling, gate.q_linear[head], config.q_pitch):
            for k_begin, key in keys:
                if k_begin < min(q_begin + config.q_pitch, length):
                    place = products[head][q_begin // gate.block_size][k_begin // gate.block_size]
                    place[q_begin].append(query @ key / math.sqrt(gate.width))
    scores = torch.full((gate.num_heads, num, num), -math.inf, dtype=torch.float64)
    for head in range(gate.num_heads):
        for row in range(num):
            for column in range(row + 1):
                scores[head, row, column] = reduced(products[head][row], column, config.reduce)
    return scores


FORMS = {
    "default": {},
    "own keys": {"share_keys": False},
    "logsumexp": {"reduce": "logsumexp", "share_keys": False},
    "mass": {"reduce": "mass", "q_pitch": 4, "k_pitch": 4},
    "wide": {"width": 32, "q_pitch": 16},
    "narrow": {"width": 8, "k_pitch": 4, "share_keys": False},
    "no rope": {"rope": False, "q_pitch": 32},
    "one pooling": {"k_pooling": ("avg",), "q_pooling": ("max",), "k_pitch": 32},
}


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 33, 100])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_definition(form, length):
    gate = make_gate(**FORMS[form])
    q, k, cos, sin = make_inputs(length)
    logits = gate(q, k, cos, sin)
    assert logits.dtype == torch.float32
    expected = definition(gate, q[0], k[0], cos[0], sin[0])
    torch.testing.assert_close(logits[0].double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 90),
    group=st.sampled_from([(2, 1), (3, 3), (6, 2)]),
    q_pitch=st.sampled_from([4, 8, 16, 32]),
    k_pitch=st.sampled_from([4, 8, 16, 32]),
    block_size=st.sampled_from([32, 64]),
    share_keys=st.booleans(),
    reduce=st.sampled_from(["max", "logsumexp", "mass"]),
)
@torch.no_grad()
def test_any_gate_is_its_definition_and_rows_are_rows_of_it(length, group, block_size, **options):
    gate = make_gate(block_size, *group, **options)
    q, k, cos, sin = make_inputs(length, heads=group[0], kv_heads=group[1])
    whole = gate(q, k, cos, sin)
    expected = definition(gate, q[0], k[0], cos[0], sin[0])
    torch.testing.assert_close(whole[0].double(), expected, rtol=1e-4, atol=1e-4)
    rows = torch.randperm(whole.shape[2])[: 1 + whole.shape[2] // 2]
    torch.testing.assert_close(gate(q, k, cos, sin, rows=rows), whole[:, :, rows])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_padded_rows_score_as_they_would_alone(form):
    gate, lengths = make_gate(**FORMS[form]), torch.tensor([100, 33, 5])
    q, k, cos, sin = make_inputs(100, batch=3)
    for row, length in enumerate(lengths.tolist()):
        q[row, :, length:] = k[row, :, length:] = math.nan
    batched = gate(q, k, cos, sin, lengths=lengths)
    assert not batched.isnan().any()
    for row, length in enumerate(lengths.tolist()):
        part = slice(row, row + 1)
        alone = gate(q[part, :, :length], k[part, :, :length], cos[:, :length], sin[:, :length])
        blocks = alone.shape[-1]
        torch.testing.assert_close(batched[part, :, :blocks, :blocks], alone)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_chunks_that_end_with_blocks_give_the_scores_of_one_shot(form):
    gate = make_gate(**FORMS[form])
    q, k, cos, sin = make_inputs(150)
    whole, state, begin = gate(q, k, cos, sin), gate.new_state(), 0
    for end in (64, 96, 150):
        part, span = slice(begin, end), Span(1, end - begin, end)
        keys = gate.encode_keys(k[:, :, part], cos[:, part], sin[:, part], state=state)
        queries = gate.encode_queries(q[:, :, part], cos[:, part], sin[:, part], span=span)
        logits = gate.score(queries, keys, span=span)
        first = begin // BLOCK
        torch.testing.assert_close(logits, whole[:, :, first : first + logits.shape[2], : logits.shape[3]])
        begin = end


def test_pitches_of_whole_blocks_are_the_form_of_the_paper():
    """With one sub-block a block and shared keys it is the paper's gate with a query projection, weight by weight."""
    fine = make_gate(q_pitch=BLOCK, k_pitch=BLOCK, share_keys=True)
    coarse = build_gate(
        seer.PrefillGateConfig(q_pooling=("max", "min", "avg")),
        block_size=BLOCK,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    assert isinstance(coarse, PrefillGate)
    coarse.load_state_dict(fine.state_dict())
    inputs = make_inputs(100)
    torch.testing.assert_close(fine(*inputs), coarse(*inputs))


def test_gradients_are_those_of_the_definition():
    for options in ({}, {"reduce": "logsumexp"}, {"reduce": "mass", "k_pitch": 4}, {"share_keys": False}):
        gate = make_gate(**options).double()
        q, k, cos, sin = make_inputs(70)
        rows = torch.tensor([2, 1])
        weights = torch.randn(HEADS, 2, 3, dtype=torch.float64)
        gradients = []
        for logits in (gate(q, k, cos, sin, rows=rows)[0], definition(gate, q[0], k[0], cos[0], sin[0])[:, rows]):
            gate.zero_grad()
            (logits.masked_fill(logits == -math.inf, 0) * weights).sum().backward()
            gradients.append([parameter.grad.clone() for parameter in gate.parameters()])
        for mine, expected in zip(*gradients, strict=True):
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share_keys", [True, False])
def test_gradients_of_rows_in_parts_are_those_of_all_at_once(monkeypatch, share_keys):
    gate, inputs = make_gate(share_keys=share_keys), make_inputs(200)
    found = []
    for most in (1 << 30, 1):
        monkeypatch.setattr(reference, "MAX_PRODUCTS", most)
        gate.zero_grad()
        logits = gate(*inputs)
        (logits.masked_fill(logits == -math.inf, 0) ** 2).sum().backward()
        found.append([parameter.grad.clone() for parameter in gate.parameters()])
    for whole, parts in zip(*found, strict=True):
        # Sums in another order differ by last bits of their largest terms: gradients are up to 900 here.
        atol = max(1e-5, 2**-22 * float(whole.abs().max()))
        torch.testing.assert_close(parts, whole, rtol=1.3e-6, atol=atol)


def test_training_keeps_no_products():
    """What autograd keeps of a layer grows with the tokens and with the scores, not with the products."""
    gate, inputs = make_gate(block_size=64, share_keys=True, width=4), make_inputs(4096)
    kept = {}  # by storage: views of one tensor are kept once

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = gate(*inputs)
    assert logits.requires_grad
    products = 4 * logits.numel() * (64 // 8) ** 2
    assert sum(kept.values()) < products / 2
    logits.nan_to_num(neginf=0).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in gate.parameters())


def test_shapes_of_parameters_and_encodings():
    for share, heads in ((False, HEADS), (True, KV_HEADS)):
        gate = make_gate(share_keys=share, width=8)
        assert gate.k_linear.shape == (heads, 3 * HEAD_DIM, 8)
        assert gate.q_linear.shape == (HEADS, 3 * HEAD_DIM, 8)
        q, k, cos, sin = make_inputs(50)
        assert gate.encode_keys(k, cos, sin).shape == (1, heads, 7, 8)
        assert gate.encode_queries(q, cos, sin).shape == (1, HEADS, 7, 8)
        assert "q_pitch=8, k_pitch=8, reduce='max'" in repr(gate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_pitch": 2}, "q_pitch must be one of"),
        ({"k_pitch": 24}, "k_pitch must be one of"),
        ({"k_pitch": 64, "block_size": 32}, "at most the block size"),
        ({"reduce": "sum"}, "reduce must be one of"),
        ({"width": 3}, "width must be"),
        ({"q_pooling": ("mean",)}, "q_pooling must be"),
        ({"block_size": 16}, "block_size must be one of"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        seer.SubBlockGateConfig(**options)


def test_wrong_types_and_pitches_longer_than_the_block():
    for options in ({"q_pitch": 8.0}, {"share_keys": 1}, {"rope": None}, {"k_pooling": "avg"}):
        with pytest.raises(TypeError):
            seer.SubBlockGateConfig(**options)
    with pytest.raises(ValueError, match="at most the block size"):
        seer.GateConfig(block_size=32, prefill=seer.SubBlockGateConfig(q_pitch=64))
    with pytest.raises(ValueError, match="at most the block size"):
        make_gate(k_pitch=64)


def test_configs_go_through_files():
    spec = seer.SubBlockGateConfig(q_pitch=16, share_keys=False, width=32, reduce="mass")
    config = seer.GateConfig(prefill=spec)
    data = config.to_dict()
    assert data["prefill"]["form"] == "sub_block"
    assert seer.GateConfig.from_dict(data) == config
    assert seer.SubBlockGateConfig().share_keys
    assert seer.GateConfig().prefill == seer.PrefillGateConfig()  # the form of the paper stays the default
