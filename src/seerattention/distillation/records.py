"""Look-ups among look-alikes for plain text: records of one form in a sequence, and some of them again at its end.

Prose asks for little that has look-alikes. Tables, logs and dictionaries do: their entries share every word but the few
that matter. A record is made of the sequence's own tokens, of no language and no task: what opens every record, a key,
what joins, and a value. Where a record comes again, a language model that has read its key finds the one record of
hundreds, and copies the value.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["LONGEST", "say_records"]

# Tokens of the parts of a record, from and to: opening, key, joint, value.
_PARTS = ((1, 8), (1, 4), (1, 4), (1, 8))
#: Most tokens of one record.
LONGEST = sum(most for _, most in _PARTS)
# What of the first part of a sequence its records take.
_FILL = (0.02, 0.5)


def say_records(ids: Tensor, place: int, rng: np.random.Generator) -> Tensor:
    """A copy of token ids ``[T]`` with records in its first part, which come again from ``place`` on in another order.

    All records of a sequence have the same opening and joint, passages of its text, and parts of the same sizes; keys
    and values are tokens from anywhere in the first part, each key once. Together they take a share of the first part
    that is uniform in the logarithm, from 2 to 50 %. In half of the sequences they stand one after the other, in the
    others each at a place of its own; what stood there is overwritten, but for the first token, which may be one that
    begins texts. The last part says each of them at most once: where they end earlier, the text goes on.

    Args:
        ids: of any integer dtype; ``place`` is at least ``2 * LONGEST``.
        place: the first token of the last part.
        rng: where everything that is chance is drawn from.
    """
    opening, key, joint, value = (int(rng.integers(least, most + 1)) for least, most in _PARTS)
    size, first = opening + key + joint + value, ids[:place].numpy()
    slots = (place - 1) // size
    count = max(1, int(slots * np.exp(rng.uniform(*np.log(_FILL)))))
    keys = np.unique(_drawn(rng, first, count, key), axis=0)
    rng.shuffle(keys)
    count = len(keys)
    parts = (_passage(rng, first, opening, count), keys, _passage(rng, first, joint, count))
    records = np.concatenate([*parts, _drawn(rng, first, count, value)], axis=1)

    made = ids.clone()
    if rng.random() < 0.5:
        start = int(rng.integers(1, place - count * size + 1))
        made[start : start + count * size] = _as(ids, records.reshape(-1))
    else:
        offset = int(rng.integers(1, place - slots * size + 1))
        for record, slot in zip(records, rng.permutation(slots)[:count], strict=True):
            made[offset + slot * size : offset + (slot + 1) * size] = _as(ids, record)
    again = records[rng.permutation(count)].reshape(-1)[: len(ids) - place]
    made[place : place + len(again)] = _as(ids, again)
    return made


def _drawn(rng: np.random.Generator, tokens: np.ndarray, count: int, size: int) -> np.ndarray:
    """``[count, size]`` of the tokens: passages, or, as often, each token from a place of its own."""
    if rng.random() < 0.5:
        return tokens[rng.integers(len(tokens), size=(count, size))]
    return tokens[rng.integers(len(tokens) - size + 1, size=(count, 1)) + np.arange(size)]


def _passage(rng: np.random.Generator, tokens: np.ndarray, size: int, count: int) -> np.ndarray:
    """One passage of the tokens, ``count`` times: ``[count, size]``."""
    start = int(rng.integers(len(tokens) - size + 1))
    return np.broadcast_to(tokens[start : start + size], (count, size))


def _as(ids: Tensor, tokens: np.ndarray) -> Tensor:
    return ids.new_tensor(tokens.tolist())
