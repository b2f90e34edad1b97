"""Walks over the caller's batches, pass after pass, and knows how to come back to where it was."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


class BatchWalk:
    """Hands out batches a few at a time.

    A ``batches`` object with ``state_dict`` and ``load_state_dict`` (``PackedText``, a stateful data loader) resumes
    where it was; anything else is read again up to there, so it must give the same batches each time.

    Args:
        batches: iterable of ``{"input_ids": [B, T]}``, optionally with ``"attention_mask"``.
        passes: None: start over as often as asked for; 1: one pass.
    """

    def __init__(self, batches: Iterable[Batch], passes: int | None = None):
        self.batches = batches
        self.passes = passes
        self._stateful = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
        self._taken = 0
        self._iterator: Iterator[Batch] | None = None

    def take(self, count: int) -> list[Batch]:
        """The next ``count`` batches; fewer, or none, at the end."""
        taken: list[Batch] = []
        while len(taken) < count and (batch := self._next()) is not None:
            taken.append(_checked(batch))
            self._taken += 1
        return taken

    def _next(self) -> Batch | None:
        if self._iterator is None:
            self._iterator = iter(self.batches)
        batch = next(self._iterator, None)
        if batch is not None or self.passes == 1 or self._iterator is self.batches or not self._taken:
            return batch
        self._iterator = iter(self.batches)
        return next(self._iterator, None)

    def close(self) -> None:
        """Stop background work of the iterator."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"taken": self._taken}
        if self._stateful:
            state["source"] = self.batches.state_dict()  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: the batches end before that point: they are not the ones of the interrupted run.
        """
        if self._stateful and "source" in state:
            self.batches.load_state_dict(state["source"])  # type: ignore[attr-defined]
            self._taken = state["taken"]
            return
        while self._taken < state["taken"]:
            if self._next() is None:
                raise ValueError(
                    f"cannot resume after {state['taken']} batches: there are only {self._taken}; "
                    "pass the same batches again"
                )
            self._taken += 1


def _checked(batch: Batch) -> Batch:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError(f'a batch must be a mapping with "input_ids" [B, T], got {type(batch).__name__}')
    if batch["input_ids"].dim() != 2 or batch["input_ids"].numel() == 0:
        raise ValueError(f"input_ids must be [B, T] and not empty, got {tuple(batch['input_ids'].shape)}")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != batch["input_ids"].shape:
        raise ValueError(
            f"attention_mask must be {tuple(batch['input_ids'].shape)} like input_ids, got {tuple(mask.shape)}"
        )
    return batch
