"""A list stands for the set of its causal blocks: every implementation, on arbitrary lists, against brute force."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from helpers import make_blocks, make_qkv, split_lists
from list_cases import ListCase, check_lists, check_what_lists_say, list_cases
from seerattention.ops import block_sparse_attention, dense_indices, select_threshold, select_topk, select_topp
from seerattention.ops.indices import BlockIndices, is_ordered
from seerattention.policies import TopK

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu covers it")

# Against the order; the diagonal in the middle and twice; future blocks; nothing but future blocks; no entry; no room.
BACKWARD = ListCase(64, 64, 1, 1, 32, 2, [[[[0], [1, 0]]]])
MIXED = ListCase(100, 100, 2, 1, 32, 5, [[[[0, 0], [3, 1, 0, 1], [2, 0, 2, 3, 0], []], [[1], [1], [0, 3], [3, 3, 3]]]])
CHUNK = ListCase(37, 100, 2, 1, 32, 6, [[[[3, 0, 1, 1, 0], [3, 1, 2, 0], [2, 2]]], [[[2], [], [0, 0, 3]]]])
NO_ROOM = ListCase(70, 70, 2, 2, 32, 0, [[[[], [], []], [[], [], []]]])
CASES = [BACKWARD, MIXED, CHUNK, NO_ROOM]


def arbitrary(examples, **options):
    """Decorator: the cases above, and so many that hypothesis finds."""

    def decorate(test):
        for case in CASES:
            if case.block_size in options.get("block_sizes", (32,)):
                test = example(case=case)(test)
        relaxed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        test = given(case=list_cases(**options))(test)
        return settings(max_examples=examples, deadline=None, suppress_health_check=relaxed)(test)

    return decorate


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@arbitrary(60)
def test_what_lists_say_of_themselves(chunk, monkeypatch, case):
    """Looked at row by row, as very large ones are in part, and all at once."""
    monkeypatch.setattr("seerattention.ops.lists.CHUNK_ENTRIES", chunk)
    check_what_lists_say(case)


@pytest.mark.parametrize("implementation", ["reference", "cpu_gathered", None])
@arbitrary(25)
def test_cpu(implementation, case):
    check_lists(implementation, case)


@interpreted
@pytest.mark.parametrize("parts", [1, 3])
@arbitrary(15, most_keys=120)
def test_triton_interpreted(parts, monkeypatch, case):
    pytest.importorskip("triton")
    if parts > 1:
        split_lists(monkeypatch, parts)
    check_lists("triton", case)


@interpreted
@pytest.mark.parametrize("parts", [1, 3])
@arbitrary(15, block_sizes=(64,))
def test_hopper_emulated(parts, emulated_attention, monkeypatch, case):
    if parts > 1:
        split_lists(monkeypatch, parts)
    check_lists("hopper", case, head_dim=64, dtype=torch.float16)


# -- the same, of lists that were the package's own --------------------------------------------------------------------


def backward(blocks):
    """In place: every list the other way round."""
    indices, counts = blocks.indices, blocks.counts
    places = (counts[..., None] - 1 - torch.arange(indices.shape[-1])).clamp(min=0)
    indices.copy_(indices.clone().gather(-1, places.long()))


def own_lists():
    mask = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    return {
        "from_mask": BlockIndices.from_mask(mask),
        "dense_indices": dense_indices(1, 2, 3, 4, block_size=64, lengths=torch.tensor([100])),
        "select_topk": select_topk(torch.randn(1, 2, 4, 4), [1, 2, 2, 1]),
        "reference": select_topk(torch.randn(1, 2, 4, 4), [1, 2, 2, 1], implementation="reference"),
        "select_topp": select_topp(torch.rand(1, 2, 4, 4), 0.5),
        "select_threshold": select_threshold(torch.rand(1, 2, 4, 4), 0.5),
        "policy": TopK(0.5).select(torch.randn(1, 2, 4, 4), block_size=64),
        "checked": MIXED.blocks().checked(),
    }


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("maker", list(own_lists()))
def test_lists_of_the_package_are_not_looked_at(maker, inference, looking_costs_little, monkeypatch):
    """Before they were seen outside, and on GPUs after that, in inference mode or not."""

    def fail(*args):
        raise AssertionError("looked at")

    with torch.inference_mode(inference):
        blocks, unseen = own_lists()[maker], own_lists()[maker]
        mask = blocks.to_mask()
        monkeypatch.setattr("seerattention.ops.lists.examine", fail)
        monkeypatch.setattr("seerattention.ops.lists.pack", fail)
        for _ in range(1 if looking_costs_little else 2):
            assert blocks.checked() is blocks
            assert torch.equal(blocks.to_mask(), mask)
            assert blocks.density() <= 1
            size = blocks.block_size
            q, k, v = make_qkv(size * blocks.num_rows, size * blocks.num_key_blocks, heads=2, kv_heads=1)
            block_sparse_attention(q, k, v, blocks)
            assert blocks.indices.shape[:3] == blocks.counts.shape  # seen
            assert str(blocks)
        assert is_ordered(blocks) is not looking_costs_little
        with monkeypatch.context() as patch:  # while a graph is recorded, which may be replayed on other values
            patch.setattr("seerattention.ops.lists.values_are_visible", lambda x: False)
            assert not is_ordered(blocks)
            assert is_ordered(unseen)


@pytest.mark.parametrize(
    "another",
    [
        dataclasses.replace,
        lambda blocks: dataclasses.replace(blocks, indices=blocks.indices.clone()),
        copy.copy,
        copy.deepcopy,
        lambda blocks: pickle.loads(pickle.dumps(blocks)),
        lambda blocks: BlockIndices(blocks.indices, blocks.counts, blocks.num_key_blocks, blocks.block_size),
    ],
)
def test_another_object_of_the_same_lists(another, looking_costs_little):
    """Nothing is known of it; and who writes into it writes into the tensors of the first, if it shares them."""
    blocks = BlockIndices.from_mask(torch.ones(1, 2, 3, 3, dtype=torch.bool))
    other = another(blocks)
    assert not is_ordered(other)
    assert torch.equal(other.counts, blocks.counts)
    shared = other.indices.data_ptr() == blocks.indices.data_ptr()
    backward(other)
    assert is_ordered(blocks) is (not shared and not looking_costs_little)
    assert blocks.to_mask().sum() == other.to_mask().sum() == 12


def test_checked_lists_are_a_copy():
    """Lists that are in order, too: their owner may write into them."""
    given = BlockIndices(torch.tensor([[[[0, 1]]]], dtype=torch.int32), torch.tensor([[[2]]], dtype=torch.int32), 2)
    checked = given.checked()
    given.indices.fill_(0)
    assert checked.to_mask().tolist() == [[[[True, True]]]]
    assert given.to_mask().tolist() == [[[[True, False]]]]


def test_lists_of_query_tokens():
    """Their rows do not say which blocks are of the future: what is left out is what occurs twice."""
    indices = torch.tensor([[[[3, 0, 3, 1], [2, 2, 0, 9], [9, 9, 9, 9]]]], dtype=torch.int32)
    blocks = BlockIndices(indices, torch.tensor([[[4, 2, 0]]], dtype=torch.int32), 4, by_token=True)
    checked = blocks.checked()
    assert checked.by_token
    assert checked.to_mask().tolist() == blocks.to_mask().tolist() == [[[[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]]]
    assert checked.density() == blocks.density() == 4 / 12
    assert checked.counts.tolist() == [[[3, 1, 0]]]
    q, k, v = make_qkv(3 * 64, 4 * 64, heads=1, kv_heads=1)
    with pytest.raises(ValueError, match="lists must be of query blocks, got lists of query tokens"):
        block_sparse_attention(q, k, v, blocks)


def test_no_lists_at_all():
    none = BlockIndices(torch.zeros(1, 2, 0, 3, dtype=torch.int32), torch.zeros(1, 2, 0, dtype=torch.int32), 4)
    assert none.density() == 1.0
    assert none.to_mask().shape == (1, 2, 0, 4)
    assert none.checked().num_rows == 0


@pytest.fixture(params=[True, False], ids=["as on the CPU", "as on a GPU"])
def looking_costs_little(request, monkeypatch):
    """Lists that were seen outside are looked at again, or it is their versions that tell."""
    monkeypatch.setattr("seerattention.ops.indices._looking_costs_little", lambda x: request.param)
    return request.param


@pytest.mark.parametrize("inference", [False, True])
def test_lists_edited_in_place(inference, looking_costs_little):
    """Also where tensors have no version, and where the lists are edited again after they were used."""
    with torch.inference_mode(inference):
        q, k, v = make_qkv(200, 200)
        blocks = select_topk(torch.randn(1, 4, 4, 4), [1, 2, 3, 3])
        expected = block_sparse_attention(q, k, v, blocks, implementation="reference")
        for _ in range(2):
            backward(blocks)
            assert not is_ordered(blocks)
            for implementation in ("cpu_gathered", "triton"):
                out = block_sparse_attention(q, k, v, blocks, implementation=implementation)
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        blocks.counts.fill_(1)
        blocks.indices[..., 0] = 0
        out = block_sparse_attention(q, k, v, blocks)
        first = BlockIndices.from_mask((torch.arange(4) == 0).expand(1, 4, 4, 4))
        torch.testing.assert_close(out, block_sparse_attention(q, k, v, first), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", [lambda x: x.data, lambda x: torch.from_numpy(x.numpy()), torch.Tensor.detach])
def test_lists_edited_behind_torchs_back(view):
    q, k, v = make_qkv(200, 200)
    blocks = BlockIndices.from_mask(torch.rand(1, 4, 4, 4) < 2)
    block_sparse_attention(q, k, v, blocks)
    view(blocks.indices)[:] = torch.tensor([3, 2, 1, 0])
    view(blocks.counts).fill_(4)
    out, everything = (block_sparse_attention(q, k, v, x) for x in (blocks, make_blocks("all", q, k)))
    torch.testing.assert_close(out, everything, rtol=1e-5, atol=1e-5)
    assert blocks.density() == 1.0


def test_in_a_compiled_function():
    """Lists from outside, and lists that the compiled function itself has written into."""
    q, k, v = make_qkv(100, 100, heads=2, kv_heads=1)
    outside = MIXED.blocks()
    scores = torch.randn(1, 2, 4, 4)

    def call(q, k, v, edit):
        blocks = outside
        if edit:
            blocks = select_topk(scores, [1, 2, 3, 4], block_size=32, capacity=4)
            blocks.indices.copy_(blocks.indices.flip(-1))
            blocks.counts.fill_(4)
            blocks.indices[:, :, :3] = blocks.indices[:, :, 3:]
        return block_sparse_attention(q, k, v, blocks)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for edit in (False, True):
        expected = call(q, k, v, edit)
        torch.testing.assert_close(compiled(q, k, v, edit), expected)
    everything = BlockIndices.from_mask(torch.ones(1, 2, 4, 4, dtype=torch.bool), 32)
    torch.testing.assert_close(expected, block_sparse_attention(q, k, v, everything), rtol=1e-5, atol=1e-5)


# -- lists that no set can be made of ----------------------------------------------------------------------------------


def wrong_lists(place, value):
    blocks = MIXED.blocks()
    tensor = blocks.indices if len(place) == 4 else blocks.counts
    tensor[place] = value
    return blocks


WRONG = [
    ((0, 1, 3, 2), -1, r"indices\[0, 1, 3, 2\] is -1, but the key blocks are 0 to 3"),
    ((0, 0, 1, 0), 4, r"indices\[0, 0, 1, 0\] is 4, but the key blocks are 0 to 3"),
    ((0, 0, 0, 1), 1 << 30, r"indices\[0, 0, 0, 1\] is 1073741824"),
    ((0, 1, 0), -2, r"counts\[0, 1, 0\] is -2, but a list has room for 0 to 5 entries"),
    ((0, 1, 2), 6, r"counts\[0, 1, 2\] is 6, but a list has room for 0 to 5 entries"),
]


@pytest.mark.parametrize(("place", "value", "words"), WRONG)
def test_what_is_refused(place, value, words):
    q, k, v = make_qkv(100, 100, heads=2, kv_heads=1)
    blocks = wrong_lists(place, value)
    for implementation in ("reference", "cpu_gathered", "triton", None):
        with pytest.raises(ValueError, match=words):
            block_sparse_attention(q, k, v, blocks, implementation=implementation)
    for use in (blocks.checked, blocks.to_mask, blocks.density):
        with pytest.raises(ValueError, match=words):
            use()


def test_an_entry_far_down_is_named_in_a_later_chunk(monkeypatch):
    monkeypatch.setattr("seerattention.ops.lists.CHUNK_ENTRIES", 1)
    with pytest.raises(ValueError, match=r"indices\[0, 1, 3, 2\] is -1"):
        wrong_lists((0, 1, 3, 2), -1).checked()


@pytest.mark.parametrize(("place", "value", "words"), WRONG)
def test_where_nothing_can_be_looked_at(place, value, words, monkeypatch):
    """While a graph is recorded: what is wrong is left out, nothing is read where it should not be."""
    monkeypatch.setattr("seerattention.ops.lists.values_are_visible", lambda x: False)
    q, k, v = make_qkv(100, 100, heads=2, kv_heads=1)
    blocks, sets = wrong_lists(place, value), MIXED.sets()[0]
    b, h, row = place[:3]
    if len(place) == 4:
        kept = [entry for i, entry in enumerate(MIXED.lists[b][h][row]) if i != place[3]]
        sets[h][row] = {entry for entry in kept if entry <= row}
    elif value < 0:
        sets[h][row] = set()
    mask = torch.tensor([[[[block in row for block in range(4)] for row in head] for head in sets]])
    assert torch.equal(blocks.to_mask(), mask)
    expected = block_sparse_attention(q, k, v, BlockIndices.from_mask(mask, 32), implementation="reference")
    for implementation in ("reference", "cpu_gathered", "triton"):
        out = block_sparse_attention(q, k, v, blocks, implementation=implementation)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
