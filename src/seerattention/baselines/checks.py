"""Checks of what selectors are told. Strings of the command line end here, so the messages name the argument."""

from __future__ import annotations

import math
from typing import Any

from ..ops.dispatch import BLOCK_SIZES
from ..policies import Policy


def check_integer(selector: str, name: str, value: Any, least: int = 0) -> None:
    """Raise ValueError unless a value is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{selector}: {name} must be an integer of at least {least}, got {value!r}")


def check_number(selector: str, name: str, value: Any, least: float, most: float) -> None:
    """Raise ValueError unless a value is a number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        bounds = f"from {least} to {most}" if math.isfinite(most) else f"of at least {least}"
        raise ValueError(f"{selector}: {name} must be a number {bounds}, got {value!r}")


def check_block_size(selector: str, value: Any) -> None:
    """Raise ValueError unless the sparse attention has blocks of this size."""
    if isinstance(value, bool) or value not in BLOCK_SIZES:
        raise ValueError(f"{selector}: block_size must be one of {BLOCK_SIZES}, got {value!r}")


def check_choice(selector: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a value is one of the words."""
    if value not in choices:
        raise ValueError(f"{selector}: {name} must be one of {choices}, got {value!r}")


def check_policy(selector: str, value: Any, optional: bool = False) -> None:
    """Raise TypeError unless a value is a policy (or None)."""
    if not isinstance(value, Policy) and not (optional and value is None):
        raise TypeError(f"{selector}: policy must be a policy such as TopK(0.1), got {value!r}")
