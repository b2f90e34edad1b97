"""A toy op in one file shows what an op is made of: a table of implementations, values that tracers see through."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from seerattention.ops import Span, dispatch
from seerattention.ops.custom_op import custom_op

OP = "toy_block_sums"


class Wanted(NamedTuple):
    """What is asked of the toy."""

    block_size: int
    scale: float
    span: Span


def reference(x: Tensor, wanted: Wanted) -> Tensor:
    return wanted.span.gather_queries(x).unflatten(2, (-1, wanted.block_size)).sum(3) * wanted.scale


def needs_even_blocks(x: Tensor, wanted: Wanted) -> str | None:
    return "it needs blocks of an even size" if wanted.block_size % 2 else None


IMPLEMENTATIONS = {
    "cpu_pairs": dispatch.Implementation("pairs", needs_even_blocks),
    "reference": dispatch.Implementation("plain"),
}


def _fake(x: Tensor, wanted: Wanted) -> Tensor:
    return x.new_empty(wanted.span.batch, x.shape[1], x.shape[2] // wanted.block_size, x.shape[3])


@custom_op(_fake)
def _toy_block_sums(x: Tensor, wanted: Wanted, implementation: str | None) -> Tensor:
    name = dispatch.choose_implementation(OP, implementation, x.device, IMPLEMENTATIONS, x, wanted)
    return dispatch.load(__name__, IMPLEMENTATIONS[name].module, OP)(x, wanted)


def toy_block_sums(x, *, block_size=2, scale=1.0, span=None, implementation=None):
    span = Span(x.shape[0], x.shape[2], x.shape[2]) if span is None else span
    span.check(OP, q=x)
    return _toy_block_sums(x, Wanted(block_size, scale, span), implementation)


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """What would be the files of the op's directory. Returns the names of implementations that ran."""
    ran = []
    for name in ("pairs", "plain"):
        module = ModuleType(f"{__name__}.{name}")
        setattr(module, OP, lambda x, wanted, name=name: (ran.append(name), reference(x, wanted))[1])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, ModuleType(__name__)))
    dispatch._module.cache_clear()
    yield ran
    dispatch._module.cache_clear()


def test_the_table_decides(modules):
    x = torch.randn(1, 2, 12, 4)
    toy_block_sums(x)
    toy_block_sums(x, block_size=3)
    toy_block_sums(x, implementation="reference")
    assert modules == ["pairs", "plain", "plain"]
    with pytest.raises(ValueError, match="'cpu_pairs' cannot run here: it needs blocks of an even size; pass"):
        toy_block_sums(x, block_size=3, implementation="cpu_pairs")
    with pytest.raises(ValueError, match="has no implementation 'fast'"):
        toy_block_sums(x, implementation="fast")


def test_tracers_see_one_op_and_what_its_arguments_are_made_of():
    x = torch.randn(1, 2, 12, 4)
    op = torch.ops.seerattention.toy_block_sums
    names = [argument.name for argument in op.default._schema.arguments]
    assert names[:4] == ["x", "wanted_block_size", "wanted_scale", "wanted_span_batch"]
    torch.library.opcheck(op, (x, 2, 0.5, *Span(1, 12, 12).arguments(), None))
    torch._dynamo.reset()
    compiled = torch.compile(toy_block_sums, fullgraph=True, backend="eager", dynamic=True)
    for length in (12, 20):
        x = torch.randn(1, 2, length, 4)
        assert torch.equal(compiled(x), toy_block_sums(x))
    start = torch.tensor([4, 0])
    span = Span.of_rows(12, 20, start=start, length=torch.tensor([12, 12]))
    x = torch.randn(2, 2, 12, 4)
    assert torch.equal(compiled(x, span=span), toy_block_sums(x, span=span))
