"""What is true of an attached model, or is watched, while a ``with`` block is open: dense, observe, record.

The blocks belong to the context (``contextvars``) that opens them: forwards in other threads are not touched, and
neither are copies of the model. A thread that is started inside a block (``torch.nn.DataParallel`` starts one a
device) does not inherit it: open the block in that thread, or run the thread in ``contextvars.copy_context()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .forward import DENSE, OBSERVE, RECORD, watch
from .state import Observer, state_of
from .stats import Statistics


@contextmanager
def dense(model: nn.Module) -> Iterator[nn.Module]:
    """Attend densely while the context is open, through the implementation that the model came with (``sdpa``,
    ``eager``, FlashAttention, one of the user's own): the A of every A/B.

    Raises:
        ValueError: nothing is attached.
    """
    with watch(DENSE, state_of(model)):
        yield model


@contextmanager
def observe(model: nn.Module, fn: Observer) -> Iterator[nn.Module]:
    """Call ``fn(inputs, blocks)`` in every attention layer, for every prompt read while the context is open.

    ``inputs`` is a :class:`LayerInputs`; ``blocks`` are the lists that attention is about to read, or None where the
    layer is dense. Decoding steps, and layers whose sliding window is shorter than the prompt, are not reported.

    Raises:
        ValueError: nothing is attached; or, inside a forward, the batch is not one whole prompt per row (chunked
            prefill, packed sequences, 4-D masks), which cannot be described.
    """
    with watch(OBSERVE, state_of(model), fn):
        yield model


@contextmanager
def record(model: nn.Module) -> Iterator[Statistics]:
    """Count what attention reads while the context is open::

        with seerattention.record(model) as stats:
            model.generate(...)
        stats.density, stats.total_density  # of the layers that ran sparsely, and of all

    Raises:
        ValueError: nothing is attached to ``model``.
    """
    statistics = Statistics()
    with watch(RECORD, state_of(model), statistics):
        yield statistics
