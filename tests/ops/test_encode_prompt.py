"""Queries and keys that are encoded together are what they are apart."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers import fill_empty_with_nan
from seerattention.ops.block_pooling import block_pooling
from seerattention.ops.gate_scores import encode_blocks, prompt
from seerattention.ops.gate_scores.prompt import Encoding, encode_prompt

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted without a GPU")

AVG, ALL = ("avg",), ("max", "min", "avg")
# Heads of queries, of keys, of the projection of keys; head_dim, width; poolings; pitches; what is rotated.
CASES = {
    "published": (9, 3, 9, 16, 16, AVG, ALL, 64, 64, 16),
    "projected": (4, 2, 4, 16, 16, ALL, ALL, 32, 32, 16),
    "sub_block": (4, 2, 2, 16, 16, ("max", "avg"), AVG, 8, 8, 16),
    "pitches": (4, 4, 4, 16, 24, AVG, AVG, 16, 4, 8),
    "narrow": (2, 1, 2, 40, 20, ("min",), ALL, 64, 32, 40),
    "fine": (3, 1, 1, 16, 16, ("min", "max"), ("avg", "max"), 4, 4, 16),
    "padded_dim": (2, 2, 2, 80, 20, ALL, ALL, 8, 16, 80),
    "half": (4, 2, 2, 32, 16, ALL, ALL, 8, 4, 32),  # every second entry of the rotary table
    "half_own": (4, 2, 4, 32, 16, ALL, AVG, 64, 64, 32),
    "own_keys": (4, 2, 4, 32, 16, ALL, AVG, 8, 8, 16),
    "no_rope": (4, 2, 4, 16, 16, AVG, ("max", "min"), 32, 64, 0),
}


def make(case, length, dtype, batch=1):
    heads, kv_heads, k_heads, dim, width, q_kinds, k_kinds, q_pitch, k_pitch, rotary = CASES[case]
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k = (draw(batch, length, number, dim).transpose(1, 2) for number in (heads, kv_heads))
    straight = case in ("published", "no_rope")
    of_q = Encoding(None if straight else draw(heads, len(q_kinds) * dim, width), q_kinds, q_pitch)
    of_k = Encoding(draw(k_heads, len(k_kinds) * dim, width), k_kinds, k_pitch)
    angles = torch.rand(1, length, rotary // 2, generator=generator)
    table = torch.cat((angles, angles), -1)
    cos, sin = (table.cos().to(dtype), table.sin().to(dtype)) if rotary else (None, None)
    return q, k, cos, sin, (of_q, of_k)


def apart(q, k, cos, sin, encodings, implementation):
    for x, (linear, kinds, pitch) in zip((q, k), encodings, strict=True):
        pooled = block_pooling(x, kinds, block_size=pitch, implementation=implementation)
        yield encode_blocks(pooled, linear, cos, sin, pitch=pitch, implementation=implementation)


@needs_interpreter
@pytest.mark.parametrize(
    ("case", "length"),
    [*itertools.product(CASES, [1, 65]), ("published", 63), ("published", 64), ("published", 200), ("sub_block", 127)],
)
def test_together_is_apart(case, length, monkeypatch):
    inputs = make(case, length, torch.float16)
    expected = list(apart(*inputs, "triton"))
    launches = []
    launch = prompt._together
    monkeypatch.setattr(prompt, "_together", lambda *given: launches.append(launch(*given)) or launches[-1])
    fill_empty_with_nan(monkeypatch)
    found = encode_prompt(*inputs, implementation="triton")
    assert launches == [True]
    for x, y in zip(found, expected, strict=True):
        assert not x.isnan().any()
        assert x.dtype == torch.float16
        if prompt._shape_at_once(*inputs[:2], inputs[4]):  # products with the projection are added up in another order
            torch.testing.assert_close(x, y, rtol=2e-3, atol=4e-3)
        else:
            assert torch.equal(x, y)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("length", [1, 7, 33, 64, 131, 300])
@pytest.mark.parametrize("case", ["sub_block", "pitches", "fine", "padded_dim", "half"])
def test_sub_blocks_are_pooled_and_encoded_at_once(case, length, dtype, monkeypatch):
    """Beside the reference in float32, over lengths that end inside of sub-blocks and of programs; two rows."""
    inputs = make(case, length, dtype, batch=2)
    exact = [x.float() if isinstance(x, torch.Tensor) else x for x in inputs[:4]]
    encodings = [how._replace(linear=how.linear.float()) for how in inputs[4]]
    expected = encode_prompt(*exact, encodings, implementation="reference")
    monkeypatch.setattr(prompt, "encode_blocks", lambda *given, **options: pytest.fail("they were encoded apart"))
    monkeypatch.setattr(prompt, "block_pooling", lambda *given, **options: pytest.fail("they were pooled apart"))
    fill_empty_with_nan(monkeypatch)
    tolerance = 5e-3 if dtype == torch.float16 else 5e-5
    for x, y in zip(encode_prompt(*inputs, implementation="triton"), expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == dtype
        torch.testing.assert_close(x.float(), y, rtol=tolerance, atol=tolerance)


@needs_interpreter
@pytest.mark.parametrize(("batch", "dtype"), [(2, torch.float16), (1, torch.float32)])
def test_batches_and_float32(batch, dtype):
    inputs = make("published", 100, dtype, batch)
    for x, y in zip(encode_prompt(*inputs, implementation="triton"), apart(*inputs, "triton"), strict=True):
        assert torch.equal(x, y)


@needs_interpreter
def test_kernels_equal_the_reference():
    inputs = make("published", 200, torch.float16)
    exact = [x.float() if isinstance(x, torch.Tensor) else x for x in inputs[:4]]
    encodings = [how._replace(linear=None if how.linear is None else how.linear.float()) for how in inputs[4]]
    expected = encode_prompt(*exact, encodings, implementation="reference")
    for x, y in zip(encode_prompt(*inputs, implementation="triton"), expected, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("case", CASES)
def test_where_no_kernel_runs_both_are_apart(case):
    inputs = make(case, 100, torch.float32)
    for implementation in (None, "reference"):
        found = encode_prompt(*inputs, implementation=implementation)
        for x, y in zip(found, apart(*inputs, implementation), strict=True):
            assert torch.equal(x, y)


@needs_interpreter
def test_what_does_not_fit_together_is_apart(monkeypatch):
    """Strided channels, dtypes that differ, long prompts."""
    q, k, cos, _, encodings = make("published", 65, torch.float16)

    def together(q=q, k=k, encodings=encodings):
        return prompt._together(q, k, cos, encodings, "triton")

    assert together()
    assert not together(q=q.float())
    assert not together(q=q[:, :, :, :8])
    assert not together(k=k.transpose(2, 3).contiguous().transpose(2, 3))
    assert not together(encodings=(encodings[0], encodings[1]._replace(linear=None)))
    assert not together(q=q[:, :, :64])
    for most, launched in ((65, 0), (64, 2)):
        apart = []
        with monkeypatch.context() as changed:
            changed.setattr(prompt, "MOST_TOKENS", most)
            changed.setattr(prompt, "_encode", lambda *given, apart=apart: apart.append(given))
            encode_prompt(*make("published", 65, torch.float16), implementation="triton")
        assert len(apart) == launched
