"""From which prompt length on sparse prefill pays, as measured: written by ``python -m benchmarks.crossings``.

By kind of device (:func:`~seerattention.hf.min_context.device_kind`): a model's name, its work and its width
(:class:`~seerattention.hf.min_context.Shape`), and the shortest measured length from which on it was no slower than
dense at any measured length.
"""

from __future__ import annotations

CROSSINGS: dict[str, list[tuple[str, int, int, int]]] = {}
