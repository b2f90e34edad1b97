"""gate_scores on a GPU: the kernels against the reference in float32, and the whole path of a gate."""

from __future__ import annotations

import math

import pytest
import torch

import seerattention as seer
from seerattention.evaluate.kernels import AttentionShape, make_gate, make_inputs
from seerattention.gates import build_gate
from seerattention.ops import dispatch
from seerattention.ops.gate_scores import encode_blocks, gate_scores, prompt, reference
from seerattention.ops.gate_scores import triton as triton_scores
from seerattention.ops.gate_scores.interface import MAX_TRITON_WIDTH, REDUCTIONS, empty_scores
from seerattention.ops.gate_scores.reference import Tiles
from seerattention.ops.gate_scores.triton_mass_row import mass_row_scores
from seerattention.ops.span import Span, num_blocks

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def draw(num, dtype, *, heads, kv_heads, width, per_head=True, channels=None, rotary=None, batch=1):
    def randn(*shape):
        return torch.randn(*shape, device="cuda")

    q, k = randn(batch, num, heads, channels or width).transpose(1, 2), randn(batch, kv_heads, num, 3 * 64)
    k_linear = randn(heads if per_head else kv_heads, 3 * 64, width) * (3 * 64) ** -0.5
    q_linear = randn(heads, channels, width) * channels**-0.5 if channels else None
    rotary = width if rotary is None else rotary
    angles = 6 * torch.rand(batch, num * 64 - 5, rotary, device="cuda")
    tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotary else (None, None)
    return [None if x is None else x.to(dtype) for x in (q, k, k_linear, q_linear)] + list(tables)


def whole_gate(q, k, k_linear, q_linear, cos, sin, *, masked=True, implementation=None):
    """Both ops, as a gate calls them."""
    common = {"pitch": 64, "implementation": implementation}
    queries, keys = (encode_blocks(x, linear, cos, sin, **common) for x, linear in ((q, q_linear), (k, k_linear)))
    return gate_scores(queries, keys, scale=0.1, masked=masked, implementation=implementation)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num", [1, 16, 63, 65, 128, 500])
@pytest.mark.parametrize(
    "form",
    [
        {"heads": 8, "kv_heads": 2, "width": 128},
        {"heads": 8, "kv_heads": 2, "width": 64, "batch": 2},
        {"heads": 7, "kv_heads": 1, "width": 96},
        {"heads": 4, "kv_heads": 2, "width": 32, "channels": 64, "rotary": 64, "per_head": False},
        {"heads": 4, "kv_heads": 2, "width": 80, "channels": 64, "rotary": 64, "per_head": False},
        {"heads": 4, "kv_heads": 4, "width": 64, "rotary": 0},
        {"heads": 4, "kv_heads": 2, "width": MAX_TRITON_WIDTH},
    ],
    ids=str,
)
def test_equals_reference(form, num, dtype):
    torch.manual_seed(num)
    inputs = draw(num, dtype, **form)
    exact = [None if x is None else x.float() for x in inputs]
    expected = whole_gate(*exact, implementation="reference")
    causal = expected > float("-inf")
    for masked in (True, False):
        actual = whole_gate(*inputs, masked=masked, implementation="triton")
        assert actual.shape == expected.shape
        assert (actual - expected)[causal].norm() <= TOLERANCE[dtype] * expected[causal].norm()
        if masked:
            assert (actual[~causal] == float("-inf")).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(
    ("q_pitch", "k_pitch", "width"), [(8, 8, 64), (8, 4, 32), (64, 16, 128), (16, 64, 96), (32, 8, MAX_TRITON_WIDTH)]
)
def test_sub_blocks_equal_reference(q_pitch, k_pitch, width, reduce, dtype, nan_filled_empty):
    torch.manual_seed(width)
    length, queries = 64 * 90 - 21, 64 * 70 - 30
    keys = torch.randn(2, 2, num_blocks(length, k_pitch), width, device="cuda").to(dtype)
    start, count = torch.tensor([length - queries, 5], device="cuda"), torch.tensor([queries, 300], device="cuda")
    spans = [
        Span(2, length, length),
        Span(2, queries, length),
        Span.of_rows(queries, length, start=start, length=count),
    ]
    for span in spans:
        options = {"q_pitch": q_pitch, "k_pitch": k_pitch, "scale": width**-0.5, "reduce": reduce, "span": span}
        q = torch.randn(2, 4, span.num_rows(64) * (64 // q_pitch), width, device="cuda").to(dtype)
        expected = gate_scores(q.float(), keys.float(), implementation="reference", **options)
        actual = gate_scores(q, keys, implementation="triton", **options)
        assert torch.equal(actual == float("-inf"), expected == float("-inf"))
        finite = expected > float("-inf")
        # The same values are multiplied: 16-bit products are exact in float32.
        torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-4)
        rows = torch.tensor([40, 3, 77], device="cuda")
        if span is spans[0]:
            some = q.unflatten(2, (-1, 64 // q_pitch))[:, :, rows].flatten(2, 3)
            found = gate_scores(some, keys, implementation="triton", rows=rows, **options)
            if reduce == "max":
                assert torch.equal(found, actual[:, :, rows])
            else:  # sums of exponentials, which two variants of a kernel may add in another order
                torch.testing.assert_close(found, actual[:, :, rows], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "width"), [(64 * 2048 + 40, 128), (64 * 2500, 64)])
def test_many_columns_equal_few(length, width, dtype, nan_filled_empty, monkeypatch):
    """The wider tiles of Triton on Hopper GPUs, bit for bit."""
    q, k = (torch.randn(1, heads, num_blocks(length, 8), width, device="cuda").to(dtype) for heads in (2, 1))
    options = {"q_pitch": 8, "k_pitch": 8, "scale": width**-0.5, "span": Span(1, length, length)}
    options["implementation"] = "triton"
    found = gate_scores(q, k, **options)
    monkeypatch.setattr(triton_scores, "MANY_COLUMNS", 1 << 30)
    assert torch.equal(found, gate_scores(q, k, **options))


@pytest.fixture
def needs_hopper():
    if reason := dispatch.hopper_unusable(torch.device("cuda", 0)):
        pytest.skip(reason)


def check_hopper(q, k, **options):
    """Against the reference in float32, and bit for bit against Triton. Scores masked and not."""
    options |= {"q_pitch": 8, "k_pitch": 8, "scale": q.shape[3] ** -0.5}
    found, loose = (gate_scores(q, k, implementation="hopper", masked=masked, **options) for masked in (True, False))
    expected = gate_scores(q.float(), k.float(), implementation="reference", **options)
    causal = expected > float("-inf")
    assert torch.equal(found == float("-inf"), ~causal)
    torch.testing.assert_close(found[causal], expected[causal], rtol=1e-4, atol=1e-4)
    assert torch.equal(loose[causal], found[causal])
    # Above the diagonal is what was there before, or -inf.
    assert (loose[~causal].isnan() | (loose[~causal] == float("-inf"))).all()
    assert torch.equal(found, gate_scores(q, k, implementation="triton", **options))
    return found, loose


def draw_encoded(num_q, num_k, heads, kv_heads, width, dtype, batch=1):
    """With the strides of encodings that lie token by token."""
    torch.manual_seed(num_q + heads)
    shapes = (batch, num_q, heads, width), (batch, num_k, kv_heads, width)
    return [torch.randn(shape, device="cuda").to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("rows", [1, 5, 63, 64, 65, 77, 130, 500])
def test_hopper_on_prompts(rows, width, dtype, needs_hopper, nan_filled_empty):
    """Whole rows, and some whose last row lacks tokens, or sub-blocks (that one is Triton's)."""
    q, k = draw_encoded(8 * rows, 8 * rows, 8, 2, width, dtype, batch=2 if rows < 100 else 1)
    _, loose = check_hopper(q, k)
    assert loose.isnan().any() == (rows > 64)
    for missing in (1, 5, 8, 37, 63):
        length = 64 * rows - missing
        span, num = Span(q.shape[0], length, length), num_blocks(length, 8)
        if rows > 1 or num == 8:
            check_hopper(q[:, :, :num], k[:, :, :num], span=span)
            check_hopper(q, k[:, :, :num], span=span)  # sub-blocks behind the last token do not count


@pytest.mark.parametrize("group", range(1, 9))
def test_hopper_on_groups(group, needs_hopper, nan_filled_empty):
    check_hopper(*draw_encoded(8 * 70, 8 * 70, 3 * group, 3, 128, torch.bfloat16, batch=2))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("start", "length"),
    [(64, 128), (64 * 61, 64 * 64), (64 * 64, 64 * 130), (64 * 80, 64 * 150 - 1), (64 * 129 + 7, 64 * 200 - 20)],
)
def test_hopper_on_chunks(start, length, width, needs_hopper, nan_filled_empty):
    span = Span(1, length - start, length)
    q, k = draw_encoded(8 * span.num_rows(64), num_blocks(length, 8), 8, 2, width, torch.bfloat16)
    check_hopper(q, k, span=span)
    check_hopper(q.contiguous(), torch.stack((k, k), 2)[:, :, 0], span=span)


def test_hopper_on_rows_that_see_some_columns(needs_hopper, nan_filled_empty):
    q, k = draw_encoded(8 * 66, 8 * 300, 4, 2, 128, torch.float16)
    for first in (0, 3, 64, 100, 234):
        check_hopper(q, k, rows=first)


@pytest.mark.parametrize("width", [64, 128])
def test_hopper_at_real_sizes(width, needs_hopper, nan_filled_empty):
    """All squares of 128K tokens, beside Triton, and some again: nothing depends on what runs beside it."""
    q, k = draw_encoded(16384, 16384, 8, 2, width, torch.bfloat16)
    options = {"q_pitch": 8, "k_pitch": 8, "scale": width**-0.5}
    expected = gate_scores(q, k, implementation="triton", **options)
    for _ in range(5):
        assert torch.equal(gate_scores(q, k, implementation="hopper", **options), expected)
        assert torch.equal(gate_scores(q, k, **options), expected)


def check_mass(q, k, pitch, scale=None, **options):
    """Of the Hopper kernel against the reference in float32, and near Triton's, which takes products twice."""
    options |= {"q_pitch": pitch, "k_pitch": pitch, "scale": scale or q.shape[3] ** -0.5, "reduce": "mass"}
    found, loose = (gate_scores(q, k, implementation="hopper", masked=masked, **options) for masked in (True, False))
    expected = gate_scores(q.float(), k.float(), implementation="reference", **options)
    causal = expected > float("-inf")
    assert torch.equal(found == float("-inf"), ~causal)
    # Powers of 2 are approximate (2 units in the last place each), products are in float32: of an exponent of 1000 an
    # unit in the last place is 6e-5.
    torch.testing.assert_close(found[causal], expected[causal], rtol=1e-4, atol=1e-3)
    assert torch.equal(loose[causal], found[causal])
    assert (loose[~causal].isnan() | (loose[~causal] == float("-inf"))).all()
    portable = gate_scores(q, k, implementation="triton", **options)
    torch.testing.assert_close(found[causal], portable[causal], rtol=1e-4, atol=1e-3)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("pitch", [4, 8])
@pytest.mark.parametrize("rows", [1, 5, 31, 33, 77, 300])
def test_hopper_mass_on_prompts(rows, pitch, width, dtype, needs_hopper, nan_filled_empty):
    """Whole rows, and some whose last row lacks tokens, or sub-blocks (that one is Triton's)."""
    places = 64 // pitch
    q, k = draw_encoded(places * rows, places * rows, 8, 2, width, dtype, batch=2 if rows < 100 else 1)
    check_mass(q, k, pitch)
    for missing in (1, 5, 37, 63):
        length = 64 * rows - missing
        span, num = Span(q.shape[0], length, length), num_blocks(length, pitch)
        if rows > 1 or num == places:
            check_mass(q[:, :, :num], k[:, :, :num], pitch, span=span)
            check_mass(q, k[:, :, :num], pitch, span=span)  # sub-blocks behind the last token do not count


@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
@pytest.mark.parametrize(("q_pitch", "k_pitch"), [(4, 4), (8, 8), (8, 4)])
@pytest.mark.parametrize("group", [1, 4, 9])
def test_mass_of_one_row(group, q_pitch, k_pitch, width, dtype, nan_filled_empty):
    """The kernels of a last row alone, beside the reference in float32, from short prompts to 128K tokens; nothing else
    is written, and they give the same again."""
    heads, kv_heads = 2 * group, 2
    for length in (37, 64 * 17 + 1, 64 * 90 - 21, 32759, 131072 - 37):
        row = (length - 1) // 64
        tiles = Tiles(64, q_pitch, k_pitch, width**-0.5, "mass", False, first_row=row, end=length)
        num_q, num_k = num_blocks(length - 64 * row, q_pitch), num_blocks(length, k_pitch)
        q, k = draw_encoded(num_q, num_k, heads, kv_heads, width, dtype, batch=2 if length < 8192 else 1)
        for larger in (1, 100):  # a key beside whose products those of others are nothing
            k[:, :, k.shape[2] // 2] *= larger
            expected = reference.gate_scores(q.float(), k.float(), tiles)
            room = empty_scores(q, 2, row + 1)
            mass_row_scores(q, k, room[:, :, 1:], tiles)
            assert room[:, :, 0].isnan().all()
            torch.testing.assert_close(room[:, :, 1:], expected, rtol=1e-4, atol=1e-3)
            again = empty_scores(q, 1, row + 1)
            mass_row_scores(q, k, again, tiles)
            assert torch.equal(again, room[:, :, 1:])


@pytest.mark.parametrize("group", [2, 4, 6, 8])
def test_hopper_mass_on_groups(group, needs_hopper, nan_filled_empty):
    check_mass(*draw_encoded(16 * 70, 16 * 70, 3 * group, 3, 128, torch.bfloat16, batch=2), 4)


@pytest.mark.parametrize("pitch", [4, 8])
@pytest.mark.parametrize(
    ("start", "length"),
    [(64, 128), (64 * 61, 64 * 64), (64 * 64, 64 * 130), (64 * 80, 64 * 150 - 1), (64 * 129 + 1, 64 * 200 - 20)],
)
def test_hopper_mass_on_chunks(start, length, pitch, needs_hopper, nan_filled_empty):
    span = Span(1, length - start, length)
    places = 64 // pitch
    q, k = draw_encoded(places * span.num_rows(64), num_blocks(length, pitch), 8, 2, 64, torch.bfloat16)
    check_mass(q, k, pitch, span=span)
    check_mass(q.contiguous(), torch.stack((k, k), 2)[:, :, 0], pitch, span=span)


@pytest.mark.parametrize("pitch", [4, 8])
@pytest.mark.parametrize(("width", "rows"), [(64, 40), (128, 130)])
def test_hopper_mass_where_references_are_too_small(width, rows, pitch, needs_hopper, nan_filled_empty):
    """Large products far from the diagonal: units are done again with exact maxima, other ones are not."""
    q, k = draw_encoded(64 // pitch * rows, 64 // pitch * rows, 8, 2, width, torch.bfloat16)
    k[:, :, : k.shape[2] // 3] *= 8
    q[:, :, q.shape[2] // 2 :] *= 10
    found = check_mass(q, k, pitch)
    assert found[found > -math.inf].min().item() == pytest.approx(-100 * math.log(2))  # shares that nobody sees


def test_hopper_mass_at_real_sizes(needs_hopper, nan_filled_empty):
    """32K and 128K tokens beside Triton, and again: nothing depends on what runs beside it. Of two prompts the last row
    lacks sub-blocks."""
    for length, width, pitch in ((32768, 128, 4), (32759, 128, 4), (131072, 64, 8), (131072 - 37, 64, 8)):
        q, k = draw_encoded(*[num_blocks(length, pitch)] * 2, 8, 2, width, torch.bfloat16)
        options = {"q_pitch": pitch, "k_pitch": pitch, "scale": width**-0.5, "reduce": "mass"}
        expected = gate_scores(q, k, implementation="triton", **options)
        found = gate_scores(q, k, implementation="hopper", **options)
        assert torch.equal(found == -math.inf, expected == -math.inf)
        torch.testing.assert_close(found.clamp(min=-1e9), expected.clamp(min=-1e9), rtol=1e-4, atol=1e-3)
        for _ in range(3):
            assert torch.equal(gate_scores(q, k, **options), found)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_products_of_sub_blocks_are_not_written(reduce):
    """8x4 sub-blocks of 32K tokens: 8 GiB of products, which the card need not hold."""
    q, k = (torch.randn(1, 16, 32768 // pitch, 64, device="cuda", dtype=torch.bfloat16) for pitch in (8, 4))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scores = gate_scores(q, k, q_pitch=8, k_pitch=4, scale=0.125, reduce=reduce, masked=False)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * scores.nbytes + 2**20


SPECS = {
    "paper": seer.PrefillGateConfig(),
    "sub_block": seer.SubBlockGateConfig(share_keys=False),
    "sub_block, shared keys": seer.SubBlockGateConfig(k_pitch=4, width=64),
    "mass": seer.SubBlockGateConfig(width=64, reduce="mass"),
}


@pytest.mark.parametrize("length", [8192, 32768 + 17, 131072])
@pytest.mark.parametrize("form", SPECS)
def test_whole_path_at_real_sizes(form, length):
    """Logits of a Llama-8B layer's gate, and the lists of every policy, beside those of the plain path in float32."""
    shape = AttentionShape(32, 8, 128)
    q, k, _ = make_inputs(shape, length, length, torch.device("cuda"))
    gate = make_gate(shape, length, torch.device("cuda"), spec=SPECS[form])
    with torch.inference_mode():
        logits = gate.logits(q, k)
        masked = gate.gate(q, k, gate.cos, gate.sin)
        rows = torch.tensor(sorted({0, 1, 63, 64, 100, masked.shape[2] - 1}), device="cuda")
        gate.gate.float()
        exact = gate.gate(q.float(), k.float(), gate.cos.float(), gate.sin.float(), rows=rows)
        causal = exact > float("-inf")
        for found in (logits, masked):
            assert (found[:, :, rows] - exact)[causal].norm() <= 2e-2 * exact[causal].norm()
        assert (masked[:, :, rows][~causal] == float("-inf")).all()
        for policy in (seer.TopK(0.1), seer.TokenBudget(4096), seer.Threshold(1e-3), seer.TopP(0.3)):
            blocks, same = (policy.select(x, block_size=64) for x in (logits, masked))
            assert torch.equal(blocks.counts, same.counts)
            diagonal = blocks.indices.gather(-1, blocks.counts[..., None].long() - 1)[..., 0]
            assert (diagonal == torch.arange(logits.shape[2], device="cuda")).all()


@pytest.mark.parametrize("form", [form for form in SPECS if form != "paper"])
def test_sub_block_gates_write_no_products_at_128k(form):
    """64 products a tile would be 32 GiB for this layer; what is held is the logits and less than the queries."""
    shape, length = AttentionShape(32, 8, 128), 131072
    q, k, _ = make_inputs(shape, length, length, torch.device("cuda"))
    gate = make_gate(shape, length, torch.device("cuda"), spec=SPECS[form])
    with torch.inference_mode():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logits = gate.logits(q, k)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes + q.nbytes


@pytest.mark.parametrize("form", [form for form in SPECS if form != "paper"])
def test_training_of_sub_block_gates_keeps_no_products(form):
    """All rows of 64K tokens of a Llama-8B layer: at least 8 GiB of products, and their gradients as much."""
    shape, length = AttentionShape(32, 8, 128), 65536
    q, k, _ = make_inputs(shape, length, length, torch.device("cuda"))
    gate = make_gate(shape, length, torch.device("cuda"), spec=SPECS[form])
    gate.gate.float().requires_grad_(True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits = gate.gate(q, k, gate.cos, gate.sin)
    logits.masked_fill(logits == float("-inf"), 0).sum().backward()
    torch.cuda.synchronize()
    assert all(parameter.grad.isfinite().all() for parameter in gate.gate.parameters())
    assert torch.cuda.max_memory_allocated() - before < 6 * 2**30


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 63, 65, 1000, 8192])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (14, 2, 64), (4, 4, 96)])
@pytest.mark.parametrize(
    "config",
    [
        seer.PrefillGateConfig(),
        seer.PrefillGateConfig(q_pooling=("max", "min", "avg"), width=64),
        seer.SubBlockGateConfig(),
        seer.SubBlockGateConfig(q_pitch=16, k_pitch=4, share_keys=False),
    ],
    ids=["paper", "projected", "sub_block", "pitches"],
)
def test_a_prompt_is_encoded_together_as_apart(config, heads, kv_heads, head_dim, length, dtype, monkeypatch):
    """In two launches. Sums may be taken in another order, as other threads share a block."""
    if head_dim % (config.width or head_dim) and config.rope:
        pytest.skip("no rotary table fits")
    torch.manual_seed(0)
    gate = build_gate(config, block_size=64, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    gate = gate.to("cuda", dtype)
    q, k = (torch.randn(1, length, n, head_dim, device="cuda").to(dtype).transpose(1, 2) for n in (heads, kv_heads))
    angles = 6 * torch.rand(1, length, head_dim, device="cuda")
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    found = gate.encode_prompt(q, k, cos, sin)
    expected = gate.encode_queries(q, cos, sin), gate.encode_keys(k, cos, sin)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    monkeypatch.setattr(prompt, "encode_blocks", lambda *given, **options: pytest.fail("they were encoded apart"))
    gate.encode_prompt(q, k, cos, sin)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [5, 257, 20_001])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "width"),
    [(6, 2, 256, 64), (6, 2, 64, 64), (8, 2, 128, 64), (8, 2, 128, 128), (5, 1, 80, 16)],
)
@pytest.mark.parametrize("pitches", [(8, 8), (4, 4), (16, 4), (4, 16)])
def test_sub_blocks_are_pooled_and_encoded_at_once(
    pitches, heads, kv_heads, head_dim, width, length, dtype, monkeypatch
):
    """Beside the reference in float32; of long prompts, too; what is not written is NaN."""
    torch.manual_seed(0)
    config = seer.SubBlockGateConfig(q_pitch=pitches[0], k_pitch=pitches[1], width=width)
    gate = build_gate(config, block_size=64, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    gate = gate.to("cuda", dtype)
    q, k = (torch.randn(2, length, n, head_dim, device="cuda").to(dtype).transpose(1, 2) for n in (heads, kv_heads))
    angles = 6 * torch.rand(1, length, head_dim, device="cuda")
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    encodings = [
        prompt.Encoding(linear, kinds, pitch)
        for linear, kinds, pitch in zip(
            (gate.q_linear, gate.k_linear), (config.q_pooling, config.k_pooling), pitches, strict=True
        )
    ]
    exact = [how._replace(linear=how.linear.float()) for how in encodings]
    expected = prompt.encode_prompt(
        q.float(), k.float(), cos.float(), sin.float(), tuple(exact), implementation="reference"
    )
    at_once = prompt._shape_at_once(q, k, encodings)
    if head_dim <= 128:  # wider heads, and wide gates of GPUs with less shared memory, are pooled first
        assert at_once is not None or (width == 128 and dispatch.capability(q.device) < 9)
    if at_once is not None:
        monkeypatch.setattr(prompt, "encode_blocks", lambda *given, **options: pytest.fail("they were encoded apart"))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *given, **options: empty(*given, **options).fill_(float("nan")))
    for x, y in zip(gate.encode_prompt(q, k, cos, sin), expected, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
