"""What is true of an attached model, or is watched, while a ``with`` block is open: dense, observe, record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .state import Observer, state_of
from .stats import Statistics


@contextmanager
def dense(model: nn.Module) -> Iterator[nn.Module]:
    """Attend densely while the context is open, through transformers' own ``sdpa`` function: the A of every A/B.

    Raises:
        ValueError: nothing is attached.
    """
    state = state_of(model)
    state.dense_depth += 1
    try:
        yield model
    finally:
        state.dense_depth -= 1


@contextmanager
def observe(model: nn.Module, fn: Observer) -> Iterator[nn.Module]:
    """Call ``fn(inputs, blocks)`` in every attention layer, for every prompt read while the context is open.

    ``inputs`` is a :class:`LayerInputs`; ``blocks`` are the lists that attention is about to read, or None where the
    layer is dense. Decoding steps, and layers whose sliding window is shorter than the prompt, are not reported.

    Raises:
        ValueError: nothing is attached; or, inside a forward, the batch is not one whole prompt per row (chunked
            prefill, packed sequences, 4-D masks), which cannot be described.
    """
    state = state_of(model)
    state.observers.append(fn)
    try:
        yield model
    finally:
        state.observers.remove(fn)


@contextmanager
def record(model: nn.Module) -> Iterator[Statistics]:
    """Count what attention reads while the context is open::

        with seerattention.record(model) as stats:
            model.generate(...)
        stats.density, stats.total_density  # of the layers that ran sparsely, and of all

    Raises:
        ValueError: nothing is attached to ``model``.
    """
    state = state_of(model)
    statistics = Statistics()
    state.statistics.append(statistics)
    try:
        yield statistics
    finally:
        state.statistics = [other for other in state.statistics if other is not statistics]
