"""Replays: what was launched for one geometry is launched again for other tensors, and never where that may be wrong.

Kernels run in Triton's interpreter, as if the CPU were a GPU; ``test_launch.py`` looks at launches of compiled ones.
"""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

import seerattention as seer
from seerattention.gates import build_gate
from seerattention.ops import block_sparse_attention, dispatch, replay
from seerattention.ops.indices import BlockIndices, read_lists
from seerattention.ops.span import Span
from seerattention.selectors import GateSelector, LayerInputs

pytest.importorskip("triton")
launch = pytest.importorskip("seerattention.ops.triton_launch")

HEADS, KV_HEADS, DIM = 4, 2, 32
LENGTH = 136  # five blocks of 32, the last one not full: the interpreter takes a second for a layer
POLICIES = [
    seer.TopK(0.4),
    seer.TopK(0.4, last_blocks_dense=1),
    seer.TokenBudget(64),
    seer.Threshold(0.2),
    seer.RelativeThreshold(1.0, dense_rows=1),
    seer.RelativeThreshold(0.3, dense_rows=1, exponent=0.5),
    seer.TopP(0.7),
    seer.Budget(0.3, blocks=(2.0, 5.0), factors=(0.5, 1.5)),
]
FORMS = {"paper": seer.PrefillGateConfig(), "sub_block": seer.SubBlockGateConfig(q_pitch=8, k_pitch=16)}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """The CPU passes for a GPU, on which kernels are interpreted."""
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU")
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    monkeypatch.setattr(launch, "ready", lambda device: True)


@pytest.fixture
def gate():
    return make_gate("paper")


def make_gate(form):
    torch.manual_seed(0)
    spec = seer.GateConfig(block_size=32, prefill=FORMS[form]).spec_of("prefill")
    gate = build_gate(spec, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, block_size=32)
    return gate.half().requires_grad_(False)


def inputs_of(gate, length, seed, dtype=torch.float16, **changes):
    generator = torch.Generator().manual_seed(seed)

    def make(heads):
        return torch.randn(1, length, heads, DIM, generator=generator).to(dtype).transpose(1, 2)

    q, k, v, q_pre, k_pre = make(HEADS), make(KV_HEADS), make(KV_HEADS), make(HEADS), make(KV_HEADS)
    angles = torch.arange(length)[:, None] * 10.0 ** -torch.arange(0, 4, 4 / DIM * 2)[None]
    table = torch.cat((angles, angles), -1)[None]
    made = LayerInputs(0, q, k, v, q_pre, k_pre, table.cos().to(dtype), table.sin().to(dtype), None, 0.2, gate)
    return LayerInputs(**{**vars(made), **changes})


def count_recordings(replays):
    return sum(isinstance(known, replay.Recording) for known in replays._known.values())


@pytest.fixture
def lists(monkeypatch):
    replays = replay.Replays()
    monkeypatch.setattr("seerattention.selectors._LISTS", replays)
    return replays


@pytest.fixture
def attention(monkeypatch):
    replays = replay.Replays()
    module = importlib.import_module("seerattention.ops.block_sparse_attention.interface")
    monkeypatch.setattr(module, "_ATTENTION", replays)
    return replays


def same_lists(found, expected):
    assert torch.equal(found.to_mask(), expected.to_mask())
    assert (found.num_key_blocks, found.block_size, found.by_token) == (
        expected.num_key_blocks,
        expected.block_size,
        False,
    )
    assert read_lists(found)[0].shape == read_lists(expected)[0].shape


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_replay_selects_what_a_call_does(gate, lists, policy):
    selector = GateSelector(policy)
    for seed in range(3):  # the second call is recorded, the third is replayed
        inputs = inputs_of(gate, LENGTH, seed)
        expected = selector._select(inputs)
        same_lists(selector.select(inputs), expected)
    assert count_recordings(lists) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("policy", "form"),
    [*((policy, "paper") for policy in POLICIES), (POLICIES[0], "sub_block"), (POLICIES[-1], "sub_block")],
)
def test_a_layer_is_one_replay(policy, form, monkeypatch):
    """Of lists that nobody sees; another gate, policy or prompt of the geometry makes no difference."""
    layers = replay.Replays()
    monkeypatch.setattr("seerattention.selectors._LAYERS", layers)
    gates, selector = (make_gate(form), make_gate(form).apply(lambda gate: gate.k_linear.neg_())), GateSelector(policy)
    for seed in range(4):  # the second call is recorded, and replayed with the other gate and with its own
        x = inputs_of(gates[seed % 2], LENGTH, seed)
        blocks = selector._select(x)
        found = selector.attend_at_once(x)
        expected = block_sparse_attention(x.q, x.k, x.v, blocks, scale=x.scale)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    assert count_recordings(layers) == 1


def chunk_of(x, queries):
    """The last queries of a prompt, on a cache that holds what was before them; of keys before RoPE their own only."""
    tensors = {name: getattr(x, name)[:, :, -queries:] for name in ("q", "q_pre", "k_pre")}
    return dataclasses.replace(x, **tensors, span=Span(x.q.shape[0], queries, x.k.shape[2]))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[-1]], ids=str)
def test_a_layer_of_a_chunk_is_one_replay(policy, form, monkeypatch):
    """Whether it begins with a block or inside of one; a number of keys is recorded when it is first seen."""
    chunks = replay.Replays(passing=True)
    monkeypatch.setattr("seerattention.selectors._CHUNKS", chunks)
    gate, selector = make_gate(form), GateSelector(policy)
    for number, (queries, keys) in enumerate([(32, 96), (32, 96), (40, 104), (40, 104), (33, 99)]):
        x = chunk_of(inputs_of(gate, keys, number), queries)
        whole = x.turned_back()
        assert torch.equal(whole.k_pre[:, :, -queries:], x.k_pre)
        assert whole.k_pre.shape == x.k.shape
        expected = block_sparse_attention(x.q, x.k, x.v, selector._select(x), scale=x.scale)
        found = selector.attend_at_once(x)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    assert count_recordings(chunks) == 3


@torch.no_grad()
def test_lists_of_chunks_are_replayed_and_know_their_span(gate, lists, attention):
    selector = GateSelector(seer.TopK(0.4))
    for seed in range(4):
        x = chunk_of(inputs_of(gate, 104, seed), 40)
        expected, found = selector._select(x), selector.select(x)
        same_lists(found, expected)
        same_lists(selector.select(x.turned_back()), selector._select(x.turned_back()))
        assert found.span == x.span
        given = x.q, x.k, x.v
        out = block_sparse_attention(*given, found, scale=x.scale)
        assert torch.equal(out, block_sparse_attention(*given, expected, scale=x.scale, implementation="triton"))
    assert count_recordings(lists) == 2
    assert count_recordings(attention) > 0
    other = dataclasses.replace(x, span=Span(1, 39, 104))  # it is not that of the tensors
    with pytest.raises(ValueError, match="the span has 1 rows of 39 slots"):
        selector.select(other)


@torch.no_grad()
def test_what_is_no_whole_short_prompt_takes_two_steps(gate, monkeypatch):
    selector = GateSelector(seer.TopK(0.4))
    padded = inputs_of(gate, LENGTH, 0, lengths=torch.tensor([100]))
    assert selector.attend_at_once(padded) is None
    assert selector.attend_at_once(inputs_of(None, LENGTH, 0)) is None
    monkeypatch.setattr("seerattention.selectors.MOST_PAIRS_AT_ONCE", LENGTH * LENGTH - 1)
    assert selector.attend_at_once(inputs_of(gate, LENGTH, 0)) is None


@torch.no_grad()
def test_sub_block_gates_are_replayed(lists):
    gate, selector = make_gate("sub_block"), GateSelector(seer.TopK(0.4))
    for seed in range(4):
        inputs = inputs_of(gate, LENGTH, seed)
        same_lists(selector.select(inputs), selector._select(inputs))
    assert count_recordings(lists) == 1


@torch.no_grad()
def test_gates_of_somebody_else_are_not(lists):
    """A subclass may do more than launch."""
    gate = make_gate("paper")
    gate.__class__ = type("Mine", (type(gate),), {})
    for seed in range(4):
        GateSelector(seer.TopK(0.4)).select(inputs_of(gate, LENGTH, seed))
    assert count_recordings(lists) == 0


@torch.no_grad()
def test_other_geometries_have_recordings_of_their_own(gate, lists):
    selector = GateSelector(seer.TopK(0.4))
    for _ in range(3):
        for length, policy in ((136, seer.TopK(0.4)), (153, seer.TopK(0.4)), (136, seer.TopK(0.6))):
            inputs = inputs_of(gate, length, length)
            same_lists(GateSelector(policy).select(inputs), GateSelector(policy)._select(inputs))
    assert count_recordings(lists) == 3
    shifted = inputs_of(gate, 137, 5)  # another alignment, and other strides
    shifted = LayerInputs(**{**vars(shifted), "q_pre": torch.cat((shifted.q_pre, shifted.q_pre), 2)[:, :, 1:138]})
    for _ in range(3):
        same_lists(selector.select(shifted), selector._select(shifted))


@torch.no_grad()
def test_a_replay_reads_parameters_as_they_are(gate, lists):
    selector = GateSelector(seer.TopK(0.4))
    for seed in range(3):
        selector.select(inputs_of(gate, LENGTH, seed))
    gate.k_linear.data = torch.randn_like(gate.k_linear).half()
    gate.q_linear.data.neg_() if gate.q_linear is not None else None
    inputs = inputs_of(gate, LENGTH, 7)
    same_lists(selector.select(inputs), selector._select(inputs))


@torch.no_grad()
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_replay_attends_as_a_call_does(gate, attention, return_lse):
    mask = torch.rand(1, HEADS, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    blocks = BlockIndices.from_mask(mask | torch.eye(5, dtype=torch.bool), 32)
    for seed in range(4):
        x = inputs_of(gate, LENGTH, seed)
        found = block_sparse_attention(x.q, x.k, x.v, blocks, return_lse=return_lse)
        expected = block_sparse_attention(
            x.q.float(), x.k.float(), x.v.float(), blocks, return_lse=return_lse, implementation="reference"
        )
        for a, b in zip(found, expected, strict=True) if return_lse else [(found, expected)]:
            torch.testing.assert_close(a.float(), b, rtol=5e-3, atol=5e-3)
        assert (found[0] if return_lse else found).stride() == x.q.stride()
    assert count_recordings(attention) == 1  # of lists in float32 and of the reference nothing is launched


@torch.no_grad()
def test_memory_of_a_replay_is_not_that_of_the_one_before(gate, lists):
    selector = GateSelector(seer.TopK(0.4))
    made = [selector.select(inputs_of(gate, LENGTH, seed)) for seed in range(4)]
    expected = [selector._select(inputs_of(gate, LENGTH, seed)) for seed in range(4)]
    for found, wanted in zip(made, expected, strict=True):
        same_lists(found, wanted)
    assert len({read_lists(x)[0].data_ptr() for x in made}) == 4


def reads(x):
    return (torch.empty(3) if bool(x[0] > 1e9) else torch.empty(4),)


@pytest.mark.parametrize(
    "function",
    [lambda x: (x + 1,), lambda x: (torch.zeros(3),), lambda x: (torch.empty(3).copy_(x[:3]),), reads],
    ids=["computes", "fills", "copies", "reads"],
)
def test_what_is_more_than_launches_is_not_replayed(function):
    x, calls, replays = torch.randn(64), [], replay.Replays()

    def counted():
        calls.append(1)
        return function(x)

    for _ in range(4):
        replays.call(counted, (x,))
    assert len(calls) == 4
    assert not count_recordings(replays)


@torch.no_grad()
def test_policies_and_gates_of_others_are_asked_every_time(gate, lists):
    class Mine(seer.TopK):
        kind = "mine_of_test_replay"

        def _select(self, logits, how):
            seen.append(logits.shape)
            return super()._select(logits, how)

    seen = []
    for seed in range(4):
        GateSelector(Mine(0.4)).select(inputs_of(gate, LENGTH, seed))
    assert len(seen) == 4
    hooked = []
    gate.register_forward_hook(lambda *args: hooked.append(1))
    for seed in range(4):
        GateSelector(seer.TopK(0.4)).select(inputs_of(gate, LENGTH, seed))
    assert len(hooked) == 4
    assert not count_recordings(lists)


def test_few_geometries_are_kept(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 4)
    replays = replay.Replays()
    for number in range(20):
        replays.call(lambda: (torch.empty(1),), (torch.empty(number + 1),))
        assert len(replays._known) <= 4


@torch.no_grad()
def test_nothing_is_replayed_while_a_graph_is_captured(gate, lists, monkeypatch):
    selector = GateSelector(seer.TopK(0.4))
    for seed in range(3):
        selector.select(inputs_of(gate, LENGTH, seed))
    monkeypatch.setattr(replay, "may_keep", lambda device: False)
    monkeypatch.setattr(replay.Recording, "replay", lambda *_: pytest.fail("replayed"))
    inputs = inputs_of(gate, LENGTH, 3)
    same_lists(selector.select(inputs), selector._select(inputs))
