"""Where block recall was before measuring got a room of its own; it is in :mod:`seerattention.measure` now."""

from __future__ import annotations

import warnings
from typing import Any


def moved(old: str, name: str) -> Any:
    """The object ``name`` of ``seerattention.measure``, with a warning to the caller of the caller about ``old``."""
    # By way of the package, which imports its rooms when they are asked for: nothing here depends on what lies above.
    import seerattention

    warnings.warn(f"{old} has moved: import it from seerattention.measure", DeprecationWarning, stacklevel=3)
    return getattr(seerattention.measure, name)


def __getattr__(name: str) -> Any:
    if name not in ("block_recall", "recall_sums"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return moved(f"{__name__}.{name}", name)
