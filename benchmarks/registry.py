"""What there is to measure: ops, shapes, lengths, densities, and which targets each op answers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seerattention.config import PrefillGateConfig, SubBlockGateConfig
from seerattention.evaluate.kernels import AttentionShape

SHAPES = {
    "8b": AttentionShape(32, 8, 128),  # Llama-3.1-8B; Qwen3-4B and Qwen3-8B have the same attention
    "head64": AttentionShape(32, 8, 64),  # Llama-3.2-1B
    "testbed": AttentionShape(8, 2, 64),
    "tiny": AttentionShape(4, 2, 32),  # to rehearse
}
TINY_LENGTHS = (256, 512)
CHUNK_QUERIES = (64, 256, 512, 1024, 2048)
TINY_CHUNK_QUERIES = (128,)


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        op: name in :data:`OPS`.
        shape: heads, head_dim, block size, dtype.
        queries, keys: tokens; queries are the last ones of the keys.
        density: of the lists.
        lists: what kind of lists, see ``lists.py``.
    """

    op: str
    shape: AttentionShape
    queries: int
    keys: int
    density: float
    lists: str

    def with_block_size(self, block_size: int) -> Case:
        """The same case in other blocks."""
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, block_size=block_size))

    def to_dict(self) -> dict[str, Any]:
        """Flat and plain, for JSON."""
        return {
            "op": self.op,
            "heads": self.shape.heads,
            "kv_heads": self.shape.kv_heads,
            "head_dim": self.shape.head_dim,
            "block_size": self.shape.block_size,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "queries": self.queries,
            "keys": self.keys,
            "density": self.density,
            "lists": self.lists,
        }


@dataclass(frozen=True)
class Op:
    """One op, or a use of one, with what it is measured on by default.

    Attributes:
        text: one line of help.
        lengths, densities, lists: defaults; lists "none": it takes none.
        queries: tokens of chunks; none: as many as keys.
        targets: keys of the targets in ``targets.py`` that its results answer.
    """

    text: str
    lengths: Sequence[int]
    densities: Sequence[float]
    lists: Sequence[str] = ("none",)
    targets: Sequence[str] = ()
    queries: Sequence[int] = ()


OPS = {
    "block_sparse_attention": Op(
        "prefill of whole prompts, against dense kernels and FlexAttention",
        lengths=(8192, 32768, 131072),
        densities=(0.05, 0.1, 0.2),
        lists=("random",),
        targets=("forward", "forward-over-dense", "head64"),
    ),
    "chunk_attention": Op(
        "the same op on a chunk or a question: the last queries of a longer context",
        lengths=(131072,),
        densities=(0.1,),
        lists=("random",),
        targets=("chunk",),
        queries=CHUNK_QUERIES,
    ),
    "pooled_attention": Op(
        "the distillation target: extra time over a dense forward, all rows and a quarter, and memory",
        lengths=(8192, 32768, 131072),
        densities=(1.0,),
        targets=("target-all", "target-quarter", "target-memory"),
    ),
    "pooled_attention_decode": Op(
        "the distillation target of decode gates: single query tokens, as many as there are blocks and 8 times as many",
        lengths=(8192, 32768, 131072),
        densities=(1.0,),
    ),
    "gate_path": Op(
        "from q and k to block lists: pooling, gate, selection by every policy",
        lengths=(8192, 32768, 131072),
        densities=(0.1,),
        targets=("gate-path",),
    ),
    "sub_block_gate_path": Op(
        "the same of a gate finer than its mask: sub-blocks of 8 queries and 8 keys",
        lengths=(8192, 32768, 131072),
        densities=(0.1,),
    ),
}
GATE_SPECS = {"gate_path": PrefillGateConfig(), "sub_block_gate_path": SubBlockGateConfig()}


def make_cases(
    name: str,
    *,
    shapes: Sequence[str] = ("8b",),
    lengths: Sequence[int] | None = None,
    densities: Sequence[float] | None = None,
    lists: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    queries: Sequence[int] | None = None,
    block_size: int = 64,
) -> list[Case]:
    """Every combination, the longest last; None is the op's default.

    Raises:
        ValueError: an unknown op or shape, or fewer keys than queries.
    """
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}; choose from {', '.join(OPS)}")
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown:
        raise ValueError(f"unknown shapes {unknown}; choose from {', '.join(SHAPES)}")
    op = OPS[name]
    # What takes no lists takes no choice of lists, nor a density but its own.
    kinds = op.lists if lists is None or op.lists == ("none",) else lists
    cases = []
    for length in sorted(lengths or op.lengths):
        chunks = (queries or op.queries) if op.queries else [length]
        if max(chunks) > length:
            raise ValueError(f"{name}: a chunk of {max(chunks)} queries needs at least as many keys, got {length}")
        for asked, shape, dtype in itertools.product(chunks, shapes, dtypes):
            made = dataclasses.replace(SHAPES[shape], dtype=dtype, block_size=block_size)
            cases += [
                Case(name, made, asked, length, density, kind)
                for kind in kinds
                for density in (op.densities if densities is None or op.densities == (1.0,) else densities)
            ]
    return cases
