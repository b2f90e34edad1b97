"""From which prompt length on sparse prefill pays, as measured: written by ``python -m benchmarks.crossings``.

By kind of device (:func:`~seerattention.hf.min_context.device_kind`): a model's name, its work and its width
(:class:`~seerattention.hf.min_context.Shape`), and the shortest measured length from which on it was no slower than
dense at any measured length.
"""

from __future__ import annotations

CROSSINGS: dict[str, list[tuple[str, int, int, int]]] = {
    "h200": [
        ("smollm2-135m", 3538944, 576, 12288),
        ("qwen2.5-0.5b", 14909440, 896, 12288),
        ("qwen2.5-1.5b", 46792704, 1536, 8192),
        ("qwen3-4b", 100925440, 4096, 8192),
        ("llama-3.1-8b", 218103808, 4096, 4096),
    ],
}
