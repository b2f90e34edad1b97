"""Walks over the caller's batches, pass after pass, and knows how to come back to where it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..hf.prompts import check_batch
from .identity import batch_digest

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


class BatchWalk:
    """Hands out batches a few at a time.

    A ``batches`` object with ``state_dict`` and ``load_state_dict`` (``PackedText``, a stateful data loader) resumes
    where it was; anything else is read again up to there, so it must give the same batches each time.

    Args:
        batches: iterable of mappings as in :func:`~seerattention.hf.prompts.check_batch`.
        passes: None: start over as often as asked for; 1: one pass.
        check: what each batch is put through; raises where a batch is wrong.

    Attributes:
        digest: of all batches taken, in order; None where it is not kept (:meth:`keep_digest`).
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        passes: int | None = None,
        *,
        check: Callable[[Batch], Batch] = check_batch,
    ):
        self.batches = batches
        self.passes = passes
        self.check = check
        self._stateful = hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")
        self._taken = 0
        self._iterator: Iterator[Batch] | None = None
        self.digest: str | None = None

    def keep_digest(self, wanted: bool) -> None:
        """Keep :attr:`digest` from the first batch on, which reads every number of every batch.

        Batches with a ``state_dict`` keep their own account of what they have given, and get none.
        """
        self.digest = "" if wanted and not self._stateful else None

    def take(self, count: int) -> list[Batch]:
        """The next ``count`` batches; fewer, or none, at the end."""
        taken: list[Batch] = []
        while len(taken) < count and (batch := self._next()) is not None:
            taken.append(self._count(batch))
        return taken

    def _count(self, batch: Batch) -> Batch:
        checked = self.check(batch)
        self._taken += 1
        if self.digest is not None:
            self.digest = batch_digest(self.digest, checked)
        return checked

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

    def load_state_dict(self, state: Mapping[str, Any], *, all_of_them: bool = True) -> None:
        """Continue where ``state`` was taken.

        Args:
            all_of_them: False: the batches may end before that point, as the share of another process did.

        Raises:
            ValueError: the batches end before that point, or know themselves that they are others: they are not the
                ones of the interrupted run.
        """
        if self._stateful and "source" in state:
            self.batches.load_state_dict(state["source"])  # type: ignore[attr-defined]
            self._taken = state["taken"]
            return
        while self._taken < state["taken"]:
            batch = self._next()
            if batch is None:
                if not all_of_them:
                    return
                raise ValueError(
                    f"cannot resume after {state['taken']} batches: there are only {self._taken}; "
                    "pass the same batches again"
                )
            self._count(batch)
