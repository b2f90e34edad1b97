"""What Triton kernels of attention share to find the queries, keys and values of a :class:`~.span.Span`.

``TABLE``, ``PACKED`` and ``PAGE`` are constants of a kernel: what the default does not need is not compiled.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .span import Span

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def span_constants(span: Span) -> dict[str, Any]:
    """The constants of a kernel that takes a span: whether there is a table, whether rows are packed, tokens a page."""
    page = 0 if span.pages is None else span.pages.page_size
    return {"TABLE": span.table is not None, "PACKED": span.packed, "PAGE": page}


@triton.jit
def span_row(p_table, i_b, queries, keys, TABLE: tl.constexpr):
    """Slot of the first query of a row, its position, the number of queries, and the slot of position 0."""
    if TABLE:
        p_row = p_table + i_b * 4
        return tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2), tl.load(p_row + 3).to(tl.int64)
    else:
        return 0, keys - queries, queries, 0


@triton.jit
def page_of(p_pages, i_key, m_any, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """The page in which a key block lies, of the pages of a row; nothing is read unless ``m_any``."""
    return tl.load(p_pages + i_key * BLOCK // PAGE, mask=m_any, other=0).to(tl.int64)


@triton.jit
def key_offset(o_key, i_page, s_b, s_t, PAGE: tl.constexpr):
    """Where position ``o_key`` lies among keys or values, from position 0 of the row, or of the pages, of the head."""
    if PAGE:
        return i_page * s_b + o_key % PAGE * s_t
    else:
        return o_key * s_t
