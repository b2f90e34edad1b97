"""pooled_attention_decode against a float64 map built from the definition, and against the official targets."""

from __future__ import annotations

import importlib
from collections import Counter
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pooled_cases import make
from seerattention.ops import Span, pooled_attention, pooled_attention_decode
from seerattention.ops.dense import dense_attention_with_lse
from seerattention.ops.dispatch import triton_importable, triton_interpreted
from seerattention.ops.indices import num_blocks
from seerattention.ops.pooled_attention.arguments import REDUCTIONS

GOLDEN = Path(__file__).parents[1] / "golden"
needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)
# Triton's interpreter takes logarithms with numpy, also those of sums of nothing, which are then not used.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
EVERY = ["reference", "cpu", pytest.param("triton", marks=needs_interpreter)]


def softmax_map(q, k, scale=None):
    """The whole causal map in float64, and its log-sum-exp as float32 in another memory order."""
    query_length, key_length = q.shape[2], k.shape[2]
    logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    logits = logits * (q.shape[3] ** -0.5 if scale is None else scale)
    positions = torch.arange(key_length - query_length, key_length)
    logits = logits.masked_fill(torch.arange(key_length) > positions[:, None], float("-inf"))
    lse = logits.logsumexp(-1).float()
    return logits.softmax(-1), lse.transpose(1, 2).contiguous().transpose(1, 2)


def definition(q, k, block_size, rows=None, lengths=None, reduce="max", normalize=True, scale=None):
    """One block of keys after the other."""
    batch, heads, query_length, _ = q.shape
    kv_heads, key_length = k.shape[1:3]
    probabilities = softmax_map(q, k, scale)[0]
    blocks = []
    for start in range(0, key_length, block_size):
        block = probabilities[..., start : start + block_size]
        by_head = block.amax(-1) if reduce == "max" else block.sum(-1)
        by_group = by_head.view(batch, kv_heads, heads // kv_heads, query_length)
        blocks.append(by_group.amax(2) if reduce != "sum" else by_group.mean(2) if normalize else by_group.sum(2))
    out = torch.stack(blocks, -1)
    if reduce != "sum" and normalize:
        out = out / out.sum(-1, keepdim=True)
    if lengths is not None:
        positions = torch.arange(key_length - query_length, key_length)
        out[(positions >= lengths[:, None])[:, None].expand(-1, kv_heads, -1)] = 0
    return out if rows is None else out[:, :, rows - (key_length - query_length)]


def some_rows(query_length, key_length):
    """About a third of the queries, in no order, one of them twice; the first and the last among them."""
    generator = torch.Generator().manual_seed(query_length)
    some = torch.randperm(query_length, generator=generator)[: query_length // 3]
    rows = torch.cat([torch.tensor([query_length - 1]), some, torch.tensor([0]), some[:1]])
    return rows + key_length - query_length


def check(q, k, implementation, *, block_size=64, given_lse=False, **arguments):
    expected = definition(q, k, block_size, **arguments)
    if given_lse:
        # It has an error of its own, half an ulp of numbers of about 10, which every value of the map inherits.
        arguments["lse"] = softmax_map(q, k, arguments.get("scale"))[1]
    actual = pooled_attention_decode(q, k, block_size=block_size, implementation=implementation, **arguments)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    scale = 1.0 if arguments.get("normalize", True) else max(1.0, float(expected.max()))
    assert (actual - expected).abs().max() <= (5e-6 if given_lse else 2e-6) * scale


def pairwise(**factors):
    """Few combinations, in which every pair of values of two factors occurs; always the same ones."""
    missing = dict.fromkeys(
        ((a, x), (b, y)) for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b]
    )
    used = Counter()

    def worth(case, name, value):
        pairs = [((name, value), other) for other in case.items()]
        return sum(pair in missing or pair[::-1] in missing for pair in pairs), -used[name, value]

    while missing:
        case = dict(next(iter(missing)))
        for name, values in factors.items():
            if name not in case:
                case[name] = max(values, key=partial(worth, case, name))
        case = {name: case[name] for name in factors}
        for pair in combinations(case.items(), 2):
            missing.pop(pair, None)
        used.update(case.items())
        yield case


CASES = list(
    pairwise(
        tokens=((1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (300, 300), (70, 150)),
        group=(1, 2, 4, 7, 8),
        head_dim=(64, 128, 80),
        block_size=(64, 16, 32, 128),
        dtype=(torch.float32, torch.float16),
        given_lse=(False, True),
        reduce=REDUCTIONS,
        normalize=(True, False),
        subset=(True, False),
        padded=(False, True),
    )
)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_equals_definition(implementation, case, nan_filled_empty):
    case = dict(case)
    (query_length, key_length), group, head_dim = case.pop("tokens"), case.pop("group"), case.pop("head_dim")
    # Two batch rows where one is padded, two KV heads where there is time for them.
    batch, kv_heads = (2 if case["padded"] else 1), (1 if query_length == 300 else 2)
    q, k = make(query_length, key_length, group * kv_heads, kv_heads, head_dim, batch, case.pop("dtype"))
    rows = some_rows(query_length, key_length) if case.pop("subset") else None
    lengths = torch.tensor([key_length, max(1, key_length - query_length // 2)]) if case.pop("padded") else None
    check(q, k, implementation, rows=rows, lengths=lengths, **case)


@pytest.mark.parametrize("implementation", EVERY)
def test_scale_and_many_heads(implementation, nan_filled_empty):
    """Groups beyond the 16 rows that lie with one warp, and head_dim up to the largest."""
    for heads, kv_heads, head_dim in ((20, 1, 16), (33, 1, 24), (2, 1, 256)):
        q, k = make(50, 90, heads, kv_heads, head_dim, batch=1, dtype=torch.float16)
        check(q, k, implementation, scale=0.3, rows=some_rows(50, 90), block_size=16)
        check(q, k, implementation, reduce="sum", given_lse=True)
        check(q, k, implementation, reduce="row_sum", given_lse=True, block_size=16)


@needs_interpreter
@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("query_rows", [64, 256])
def test_triton_shares_keys_between_tokens(group, query_rows, monkeypatch, nan_filled_empty):
    """Whatever fits a program: one token or many of them, whose keys are few and unlike."""
    module = importlib.import_module("seerattention.ops.pooled_attention.triton_decode")
    monkeypatch.setattr(module, "query_rows", lambda *_: query_rows)
    q, k = make(40, 150, group, 1, 16, batch=1, dtype=torch.float16)
    for block_size in (16, 128):
        for reduce in REDUCTIONS:
            check(q, k, "triton", block_size=block_size, given_lse=True, reduce=reduce)
        check(q, k, "triton", block_size=block_size, given_lse=True, rows=torch.tensor([149, 110, 111, 130]))


@pytest.mark.parametrize("implementation", EVERY)
def test_padding_and_its_lse_are_never_used(implementation, nan_filled_empty):
    """A padded row gives what it would give alone, even where the padding holds NaN."""
    q, k = make(90, 110, 4, 2, 16)
    lse, lengths = softmax_map(q, k)[1], torch.tensor([110, 71])
    for reduce in REDUCTIONS:
        expected = definition(q, k, 32, lengths=lengths, reduce=reduce)
        dirty = [x.clone() for x in (q, k, lse)]
        for x, first in zip(dirty, (51, 71, 51), strict=True):  # queries start at position 20
            x[1, :, first:] = float("nan")
        for given_lse in (None, dirty[2]):
            common = {"block_size": 32, "lengths": lengths, "reduce": reduce, "lse": given_lse}
            actual = pooled_attention_decode(*dirty[:2], implementation=implementation, **common)
            assert (actual - expected).abs().max() <= 5e-6
            assert (actual[1, :, 51:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    q, k = make(90, 190, 4, 2, 64, dtype=dtype)
    check(q, k, None)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_sum_to_one(data):
    """Rows of valid queries, whatever the shapes; rows of padding are 0, and so is what comes after the query."""
    key_length = data.draw(st.integers(1, 150))
    query_length = data.draw(st.integers(1, key_length))
    group, kv_heads, batch = (data.draw(st.integers(1, most)) for most in (4, 2, 2))
    block_size = data.draw(st.sampled_from([16, 32, 64, 128]))
    positions = st.integers(key_length - query_length, key_length - 1)
    rows = torch.tensor(data.draw(st.lists(positions, min_size=1, max_size=40)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, key_length), min_size=batch, max_size=batch)))
    q, k = make(query_length, key_length, group * kv_heads, kv_heads, 8, batch)
    for reduce in REDUCTIONS:
        out = pooled_attention_decode(q, k, block_size=block_size, rows=rows, lengths=lengths, reduce=reduce)
        valid = (rows < lengths[:, None])[:, None].expand(-1, kv_heads, -1).float()
        torch.testing.assert_close(out.sum(-1), valid, atol=1e-5, rtol=0)
        after = torch.arange(out.shape[-1]) > (rows // block_size)[:, None]
        assert (out.masked_select(after) == 0).all()


def test_agrees_with_the_two_dimensional_op():
    """With one query head a KV head, the maximum over the queries of a block is what pooled_attention gives."""
    q, k = make(130, 200, 3, 3, 32)
    for reduce in REDUCTIONS:
        common = {"block_size": 32, "reduce": reduce, "normalize": False}
        rows = pooled_attention_decode(q, k, **common)
        blocks = torch.arange(70, 200) // 32
        for slot, row in enumerate(range(2, 7)):
            ours = rows[:, :, blocks == row]
            ours = ours.sum(2) if reduce == "sum" else ours.amax(2)
            torch.testing.assert_close(ours, pooled_attention(q, k, **common)[:, :, slot], atol=1e-5, rtol=1e-5)


def test_the_dense_forward_gives_the_lse():
    q, k = make(200, 200, 4, 2, 32)
    lse = dense_attention_with_lse(q, k, torch.randn_like(k))[1]
    torch.testing.assert_close(pooled_attention_decode(q, k, lse=lse), pooled_attention_decode(q, k), atol=5e-6, rtol=0)


@pytest.mark.parametrize("case", ["L128/kv4/bs64", "L256/kv2/bs64", "L320/kv2/bs64", "L320/kv2/bs32"])
def test_official_targets(case):
    """Within the bf16 roundings of the official target (0.015 absolute, 2.5 % relative), which leaves out the query's
    own block."""
    official = load_file(GOLDEN / "distill_targets" / "decode_targets.safetensors")[f"decode/{case}/gt_normalised"]
    inputs, block_size = load_file(GOLDEN / "distill_targets.safetensors"), int(case.rsplit("bs", 1)[1])
    q, k = (inputs[f"prefill/{case.rsplit('/', 1)[0]}/{name}"] for name in "qk")
    target = pooled_attention_decode(q, k, block_size=block_size, scale=0.125)
    own = torch.arange(q.shape[2]) // block_size
    target = target.masked_fill(torch.arange(target.shape[-1]) >= own[:, None], 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-9)
    assert (target - official).abs().max() < 1.5e-2
    assert ((target - official).abs() <= 2.5e-2 * target).all()


@pytest.mark.parametrize("implementation", EVERY)
def test_no_rows(implementation):
    q, k = make(100, 200, 4, 2, 32)
    rows = torch.empty(0, dtype=torch.int64)
    assert pooled_attention_decode(q, k, rows=rows, implementation=implementation).shape == (
        2,
        2,
        0,
        num_blocks(200, 64),
    )


def test_no_gradient():
    q, k = make(70, 70, 2, 1, 32)
    assert not pooled_attention_decode(q.requires_grad_(), k).requires_grad


@pytest.mark.parametrize("implementation", [None, *EVERY])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_is_a_proper_op(reduce, implementation):
    q, k = make(20, 40, 2, 1, 16)
    for lengths, lse in ((None, torch.zeros(q.shape[:3])), (torch.tensor([30, 40]), None)):
        span = Span.of_padded(2, 20, 40, lengths).arguments()
        arguments = (q, k, torch.tensor([19, 0, 1]), 32, 0.25, reduce, True, lse, *span, 20, implementation)
        torch.library.opcheck(torch.ops.seerattention.pooled_attention_decode, arguments)


@pytest.mark.parametrize("given_rows", [False, True])
def test_compiles(given_rows):
    """One graph for all lengths, no break in it, and the op that the compiler sees checks values."""
    torch._dynamo.reset()
    function = torch.compile(
        lambda q, k, rows: pooled_attention_decode(q, k, rows=rows), fullgraph=True, backend="eager", dynamic=True
    )
    for length in (130, 200, 333):
        q, k = make(length - 60, length, 4, 2, 16)
        rows = torch.tensor([length - 1, 60]) if given_rows else None
        assert torch.equal(function(q, k, rows), pooled_attention_decode(q, k, rows=rows))
    if given_rows:
        # torch: an error inside a traced no_grad leaves gradients off; the outer no_grad turns them on again.
        with torch.no_grad(), pytest.raises(ValueError, match="rows must lie in"):
            function(q, k, torch.tensor([2, 333]))
