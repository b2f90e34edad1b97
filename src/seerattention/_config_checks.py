"""What may stand in gate configurations, and clear errors for what may not."""

from __future__ import annotations

from typing import Any

BLOCK_SIZES = (32, 64, 128)
DECODE_BLOCK_SIZES = (16, *BLOCK_SIZES)
POOLING_KINDS = ("max", "min", "avg")
PITCHES = (4, 8, 16, 32, 64, 128)
REDUCTIONS = ("max", "logsumexp", "mass")
# Wider gates than any model has heads: a number that was meant for something else.
MAX_WIDTH = 1024
MAX_QUERY_WINDOW = 64
"""Tokens that may choose for each other in decoding: as many as the queries of a block of prompts."""


def check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_block_size(value: Any, known: tuple[int, ...] = BLOCK_SIZES) -> None:
    check_integer("block_size", value)
    if value not in known:
        raise ValueError(f"block_size must be one of {known}, got {value}")


def check_pitch(name: str, pitch: Any, most: int) -> None:
    check_integer(name, pitch)
    if pitch not in PITCHES or pitch > most:
        raise ValueError(f"{name} must be one of {PITCHES} and at most the block size ({most}), got {pitch}")


def check_width(name: str, value: Any) -> None:
    check_integer(name, value)
    if not 0 < value <= MAX_WIDTH or value % 2:
        raise ValueError(
            f"{name} must be a positive even number of at most {MAX_WIDTH}, or None (the model's head_dim), got {value}"
        )


def kinds_of(name: str, kinds: Any) -> tuple[str, ...]:
    if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) for kind in kinds):
        raise TypeError(f"{name} must be a tuple of {POOLING_KINDS}, got {kinds!r}")
    kinds = tuple(kinds)
    unknown = [kind for kind in kinds if kind not in POOLING_KINDS]
    if not kinds or unknown or len(set(kinds)) != len(kinds):
        raise ValueError(f"{name} must be a non-empty set of {POOLING_KINDS} without repeats, got {kinds}")
    return kinds


def check_query_window(value: Any) -> None:
    check_integer("query_window", value)
    if not 1 <= value <= MAX_QUERY_WINDOW:
        raise ValueError(
            f"query_window must be a number of tokens from 1 (each token for itself) to {MAX_QUERY_WINDOW}, got {value}"
        )
