"""What tests of states do with their rows, beside appends and crops: the same to the state and to a model of it."""

from __future__ import annotations

import copy

import torch


def move_rows(model, kind, number, numbers) -> bool:
    """Reorder, repeat, select or copy; False: ``kind`` is none of these.

    Args:
        model: has the ``state``, and ``rows`` that are taken by ``take(index)``.
        number, numbers: whatever was drawn.
    """
    batch = len(model.rows)
    if kind == "reorder":
        index = [x % batch for x in numbers[:batch]]
        model.state.reorder(torch.tensor(index))
        model.take(index)
    elif kind == "repeat":
        if batch * 2 <= 6:
            model.state.repeat(2)
            model.take([row for row in range(batch) for _ in range(2)])
    elif kind == "select":
        index = [x % batch for x in numbers[: 1 + number % 3]]
        model.state.select(index)
        model.take(index)
    elif kind == "copy":
        model.state = copy.deepcopy(model.state)
    else:
        return False
    return True
