"""Thresholds by head and row: each row goes by what stands for its own block, wherever in the scores it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seerattention.ops import Span, select_threshold
from seerattention.ops.block_selection.interface import _block_selection
from seerattention.ops.block_selection.reference import Rule
from seerattention.ops.dispatch import triton_importable, triton_interpreted

needs_interpreter = pytest.mark.skipif(
    not (triton_importable() and triton_interpreted()), reason="needs triton and TRITON_INTERPRET=1"
)
IMPLEMENTATIONS = ["reference", pytest.param("triton", marks=needs_interpreter)]
FLOORS = {"min_blocks": 3, "first_blocks": 1, "dense_rows": 2}


def make(num_rows, num_keys, heads=3, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, heads, num_rows, num_keys, generator=generator)
    bounds = 0.2 + 2 * torch.rand(heads, num_keys + 5, generator=generator)
    return logits, bounds


def by_hand(logits, bounds, relative, floors):
    """Mask ``[B, H, Nq, Nk]`` of plain loops."""
    batch, heads, num_rows, num_keys = logits.shape
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for row in range(num_rows):
                own = num_keys - num_rows + row
                bound = bounds[h if bounds.shape[0] > 1 else 0, own if bounds.shape[1] > 1 else 0]
                shares = logits[b, h, row, : own + 1].softmax(-1) * (own + 1 if relative else 1)
                wanted = {own} | {i for i in range(own) if shares[i] > bound}
                if len(wanted) < floors.get("min_blocks", 0):
                    best = sorted(range(own), key=lambda i: (-float(shares[i]), i))
                    wanted |= set(best[: floors["min_blocks"] - 1])
                wanted |= set(range(min(floors.get("first_blocks", 0), own)))
                if own < floors.get("dense_rows", 0):
                    wanted = set(range(own + 1))
                mask[b, h, row, list(wanted)] = True
    return mask


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("floors", [{}, FLOORS])
@pytest.mark.parametrize("kind", ["head and row", "head", "row", "one"])
def test_thresholds_by_head_and_row(kind, floors, implementation):
    for num_rows, num_keys in ((7, 7), (3, 8)):
        logits, bounds = make(num_rows, num_keys)
        bounds = {"head and row": bounds, "head": bounds[:, 3:4], "row": bounds[1:2], "one": bounds[:1, :1]}[kind]
        for relative in (True, False):
            limits = bounds if relative else bounds / 10
            found = select_threshold(
                logits, limits, softmax=True, relative=relative, implementation=implementation, **floors
            )
            assert torch.equal(found.to_mask(), by_hand(logits, limits, relative, floors))


@given(
    num_keys=st.integers(1, 40), missing=st.integers(0, 39), block_size=st.sampled_from([8, 16]),
    floors=st.sampled_from([{}, FLOORS]), heads=st.booleans(), rows=st.booleans(), last=st.integers(0, 2),
    seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
@needs_interpreter
def test_triton_equals_the_reference(num_keys, missing, block_size, floors, heads, rows, last, seed, data):
    """Bit for bit, of probabilities: softmax is that of each implementation."""
    num_rows = max(1, num_keys - missing)
    logits, bounds = make(num_rows, num_keys, seed=seed)
    bounds = bounds[: None if heads else 1, : None if rows else 1]
    probabilities = logits.softmax(-1)
    probabilities[0, 0, num_rows // 2] = float("nan")
    lengths = torch.tensor([data.draw(st.integers(1, num_keys * block_size)), num_keys * block_size])
    common = {"block_size": block_size, "lengths": lengths, "last_blocks_dense": last, "relative": True, **floors}
    one, other = (
        select_threshold(probabilities, bounds, implementation=name, **common) for name in ("reference", "triton")
    )
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.to_mask(), other.to_mask())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_span_goes_by_positions(implementation):
    """Rows that begin at different blocks select what each would alone, and a chunk what one shot would."""
    num_keys, block_size = 12, 16
    logits, bounds = make(num_keys, num_keys, batch=3)
    whole = select_threshold(logits, bounds, softmax=True, relative=True, block_size=block_size, **FLOORS).to_mask()
    starts, count = torch.tensor([3, 0, 7]), 4
    chunk = torch.full((3, 3, count + 1, num_keys), float("nan"))  # a row more than the queries fill
    for b, start in enumerate(starts.tolist()):
        chunk[b, :, :count] = logits[b, :, start : start + count]
    span = Span.of_rows(
        count * block_size, num_keys * block_size, start=starts * block_size, length=torch.tensor([64, 40, 64])
    )
    found = select_threshold(
        chunk, bounds, softmax=True, relative=True, block_size=block_size, span=span, implementation=implementation,
        **FLOORS,
    ).to_mask()  # fmt: skip
    for b, (start, rows) in enumerate(zip(starts.tolist(), (4, 3, 4), strict=True)):
        assert torch.equal(found[b, :, :rows], whole[b, :, start : start + rows])
        assert not found[b, :, rows:].any()


@needs_interpreter
def test_strides_of_thresholds():
    """Views are read as they lie: transposed, expanded and cut ones."""
    logits, bounds = make(9, 9)
    views = [bounds.T.contiguous().T, bounds[:1].expand(3, -1), bounds[:, ::2].repeat_interleave(2, 1)[:, :11]]
    for view in views:
        fast = select_threshold(logits, view, softmax=True, relative=True, implementation="triton")
        plain = select_threshold(logits, view.clone(), softmax=True, relative=True, implementation="reference")
        assert torch.equal(fast.to_mask(), plain.to_mask())


def test_a_number_in_a_tensor_is_a_number():
    logits, _ = make(5, 5)
    number = select_threshold(logits, 0.3, softmax=True)
    assert torch.equal(select_threshold(logits, torch.tensor(0.3), softmax=True).to_mask(), number.to_mask())


def test_nan_keeps_nothing_for_its_probability():
    logits, bounds = make(5, 5)
    found = select_threshold(logits, torch.full_like(bounds, float("nan")), softmax=True).to_mask()
    assert torch.equal(found, torch.eye(5, dtype=torch.bool).expand_as(found))


def test_what_does_not_fit_is_said():
    logits, bounds = make(6, 6)
    for wrong in (bounds[:, :5], bounds[:2], bounds[0], bounds[None]):
        with pytest.raises(ValueError, match=r"must be \[3 or 1 heads, at least 6 \(or 1\) rows\], got"):
            select_threshold(logits, wrong, softmax=True)
    with pytest.raises(TypeError, match="must be float32, got"):
        select_threshold(logits, bounds.double(), softmax=True)
    with pytest.raises(ValueError, match="the scores are on cpu but the thresholds on meta"):
        select_threshold(logits, bounds.to("meta"), softmax=True)


def test_compiled_and_traced():
    """What a tracer takes apart includes the thresholds."""
    logits, bounds = make(6, 6)

    @torch.compile(backend="eager", fullgraph=True)
    def select(x, limits):
        rule = Rule("threshold", 6, 64, None, 0, softmax=True, relative=True, bounds=limits)
        return _block_selection(x, rule, "reference")

    indices, counts = select(logits, bounds)
    plain = select_threshold(logits, bounds, softmax=True, relative=True)
    assert torch.equal(counts, plain.counts)
    assert torch.equal(indices.sort(-1).values, plain.indices.sort(-1).values)
