"""The inverse rotation: reference and kernel against the rotation that it undoes."""

from __future__ import annotations

import pytest
import torch

from seerattention.ops import block_pooling, inverse_rope
from seerattention.ops.inverse_rope import pooled_inverse_rope

DTYPES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def rotated(x, cos, sin):
    """As transformers does it, in the precision of x."""
    width = cos.shape[-1]
    part = x[..., :width]
    turned = torch.cat((-part[..., width // 2 :], part[..., : width // 2]), -1)
    return torch.cat((part * cos[:, None] + turned * sin[:, None], x[..., width:]), -1)


def table_of(batch, length, width, scaling=1.0, dtype=torch.float32):
    positions = torch.arange(length) + 7 * torch.arange(batch)[:, None]
    angles = positions[..., None] / 1000 ** (torch.arange(width // 2) / (width // 2))
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def check(implementation, dtype, batch, length, head_dim, width, scaling, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, 3, head_dim, generator=generator).transpose(1, 2)
    cos, sin = table_of(1 if batch == 2 else batch, length, width, scaling)
    after = rotated(x, cos, sin).to(dtype).to(device)
    cos, sin = cos.to(dtype).to(device), sin.to(dtype).to(device)
    back = inverse_rope(after, cos, sin, implementation=implementation)
    assert back.dtype == dtype
    torch.testing.assert_close(back.float().cpu(), x, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    memory = torch.full((batch, 3, length + 9, head_dim), float("nan"), dtype=dtype, device=device)
    assert inverse_rope(after, cos, sin, out=memory[:, :, 4:-5], implementation=implementation) is not None
    assert torch.equal(memory[:, :, 4:-5], back)
    assert memory[:, :, :4].isnan().all()
    assert memory[:, :, -5:].isnan().all()
    for count in {0, min(1, length), length // 2, length}:
        check_recent(implementation, after, back, cos, sin, count)


def check_recent(implementation, after, back, cos, sin, count):
    """The last ``count`` tokens are those that are given, bit for bit; what stands in x in their place is not read."""
    old = after.shape[2] - count
    # As the projections of a model lie in memory: heads side by side.
    recent = torch.randn(after.shape[0], count, 3, after.shape[3] + 8, generator=torch.Generator().manual_seed(1))
    recent = recent.to(after.device, after.dtype)[..., 8:].transpose(1, 2)
    given = after.clone()
    given[:, :, old:] = float("nan")
    found = torch.full_like(back, float("nan"))
    inverse_rope(given, cos, sin, recent=recent, out=found, implementation=implementation)
    assert torch.equal(found[:, :, :old], back[:, :, :old])
    assert torch.equal(found[:, :, old:], recent)


CASES = [(1, 33, 16, 16, 1.0), (2, 70, 24, 12, 1.3), (3, 1, 8, 2, 0.5), (1, 0, 8, 8, 1.0), (1, 64, 80, 20, 1.0)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_undoes_the_rotation(implementation, case):
    if torch.cuda.is_available() and implementation == "triton":
        pytest.skip("tests/gpu covers it")
    for dtype in (torch.float32, torch.float16):
        check(implementation, dtype, *case)
    if implementation == "reference":
        check(implementation, torch.bfloat16, *case)


def check_pooled(implementation, dtype, batch, length, head_dim, width, block_size, device="cpu"):
    """Blocks of what is turned back, whose averages may be rounded the other way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, 3, head_dim, generator=generator).transpose(1, 2).to(device, dtype)
    cos, sin = (table.to(device, dtype) for table in table_of(1, length, width, 1.3))
    for count in {0, length // 2, length}:
        recent = torch.randn(batch, 3, count, head_dim, generator=generator).to(device, dtype)
        given = x.clone()
        given[:, :, length - count :] = float("nan")
        for kinds in (("max", "min", "avg"), ("avg",), ("min", "max")):
            options = {"recent": recent, "implementation": implementation}
            found = pooled_inverse_rope(given, cos, sin, kinds, block_size=block_size, **options)
            back = inverse_rope(given, cos, sin, **options)
            expected = block_pooling(back, kinds, block_size=block_size, implementation="reference")
            assert found.shape == expected.shape
            assert found.dtype == dtype
            for kind, mine, theirs in zip(
                kinds, found.chunk(len(kinds), -1), expected.chunk(len(kinds), -1), strict=True
            ):
                error = 2 * torch.finfo(dtype).eps if kind == "avg" else 0
                torch.testing.assert_close(mine, theirs, rtol=error, atol=error)


POOLED_CASES = [(1, 33, 16, 16, 8), (2, 70, 24, 12, 32), (1, 130, 80, 20, 64), (1, 200, 8, 8, 128), (1, 40, 8, 8, 12)]


@pytest.mark.parametrize("case", POOLED_CASES)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_pooled_blocks_are_those_of_what_is_turned_back(implementation, case, nan_filled_empty):
    if torch.cuda.is_available() and implementation == "triton":
        pytest.skip("tests/gpu covers it")
    for dtype in (torch.float32, torch.float16):
        check_pooled(implementation, dtype, *case)


def test_long_inputs_in_pieces(monkeypatch):
    import importlib

    monkeypatch.setattr(importlib.import_module("seerattention.ops.inverse_rope.reference"), "PIECE", 16)
    check("reference", torch.float32, 2, 70, 24, 12, 1.3)


def test_what_does_not_fit_is_said():
    x, (cos, sin) = torch.zeros(2, 1, 4, 8), table_of(1, 4, 8)
    with pytest.raises(ValueError, match=r"even rotary_dim up to 8, got \(1, 5, 8\)"):
        inverse_rope(x, *table_of(1, 5, 8))
    with pytest.raises(ValueError, match="even rotary_dim"):
        inverse_rope(x, cos[..., :3], sin[..., :3])
    for recent in (x[:, :, :2, :4], x[:1], torch.zeros(2, 1, 5, 8), x.half()):
        with pytest.raises(ValueError, match=r"recent must be torch.float32 \[2, 1, up to 4, 8\]"):
            inverse_rope(x, cos, sin, recent=recent)
    with pytest.raises(ValueError, match="x must be"):
        inverse_rope(x[0], cos, sin)
    with pytest.raises(ValueError, match=r"out must be torch.float32 \(2, 1, 4, 8\)"):
        inverse_rope(x, cos, sin, out=x[:1])
    with pytest.raises(ValueError, match="kinds must be"):
        pooled_inverse_rope(x, cos, sin, ("sum",))
    with pytest.raises(ValueError, match="recent must be"):
        pooled_inverse_rope(x, cos, sin, ("max",), recent=x[:1])
    with pytest.raises(TypeError):
        inverse_rope(x.int(), cos, sin)
