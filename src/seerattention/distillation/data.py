"""Packs a stream of documents into batches of fixed-length token sequences, with a position that can be resumed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .documents import Documents

__all__ = ["PackedText", "Position", "tokenize_with"]


@dataclass(frozen=True)
class Position:
    """Where in the documents the next sequence begins: pass, document of the pass, token of the document."""

    epoch: int = 0
    document: int = 0
    token: int = 0


def tokenize_with(tokenizer: Any) -> Callable[[str], list[int]]:
    """Token ids of a document between the tokenizer's bos and eos tokens (each only where the tokenizer has one)."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return before + ids + after

    return tokenize


class PackedText:
    """Batches ``{"input_ids": int64 [batch_size, length]}`` cut from the documents one after the other, without gaps.

    Every process reads the whole stream and keeps its own part of each global batch of ``batch_size * world_size``
    sequences, so the position means the same in all of them. A background thread prepares ``prefetch`` batches ahead.
    What is left at the end of a pass, less than a global batch, is dropped.

    Args:
        documents: see :func:`~seerattention.distillation.documents.open_documents`.
        tokenize: text -> token ids, see :func:`tokenize_with`.
        length: tokens a sequence.
        batch_size: sequences a batch and process.
        start: where each pass begins (what lies before is held out for evaluation, say).
        document_tokens: use at most so many tokens of each document, for more variety in a batch; None: all.
        repeat: start over at the end instead of ending.
        rank, world_size: this process and how many there are.
    """

    def __init__(
        self,
        documents: Documents,
        tokenize: Callable[[str], list[int]],
        *,
        length: int,
        batch_size: int,
        start: Position | None = None,
        document_tokens: int | None = None,
        repeat: bool = False,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ):
        if length < 1 or batch_size < 1:
            raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
        if document_tokens is not None and document_tokens < 1:
            raise ValueError(f"document_tokens must be at least 1 or None, got {document_tokens}")
        self.documents, self.tokenize = documents, tokenize
        self.length, self.batch_size = length, batch_size
        self.start = start or Position()
        self.document_tokens, self.repeat = document_tokens, repeat
        self.rank, self.world_size, self.prefetch = rank, world_size, prefetch
        self.position = self.start

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch that was handed out; JSON-able."""
        return asdict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position; it holds for the next iterator."""
        self.position = Position(**state)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch, position in _in_background(self._batches(self.position), self.prefetch):
            self.position = position
            yield {"input_ids": batch}

    def _batches(self, position: Position) -> Iterator[tuple[Tensor, Position]]:
        global_batch = self.batch_size * self.world_size
        while True:
            rows: list[list[int]] = []
            made = 0
            for row, after in self._sequences(position):
                rows.append(row)
                if len(rows) == global_batch:
                    mine = rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                    yield torch.tensor(mine, dtype=torch.long), after
                    rows, made = [], made + 1
            whole_pass = (position.document, position.token) == (self.start.document, self.start.token)
            if whole_pass and not made:
                raise ValueError(
                    f"the text gives {len(rows)} sequences of {self.length} tokens, a batch over all processes takes "
                    f"{global_batch}; give more text, or a smaller length or batch size"
                )
            if not self.repeat:
                return
            position = Position(position.epoch + 1, self.start.document, self.start.token)

    def _sequences(self, position: Position) -> Iterator[tuple[list[int], Position]]:
        """Sequences of one pass, from ``position`` on, each with the position that follows it."""
        pending: list[int] = []
        skip = position.token
        for index, text in enumerate(self.documents(position.document), position.document):
            ids = self._token_ids(text)
            taken = min(skip, len(ids))
            skip = 0
            while len(pending) + len(ids) - taken >= self.length:
                end = taken + self.length - len(pending)
                row, taken, pending = pending + ids[taken:end], end, []
                yield row, Position(position.epoch, index, taken)
            pending += ids[taken:]

    def _token_ids(self, text: str) -> list[int]:
        if self.document_tokens is None:
            return self.tokenize(text)
        # No need to tokenise a whole book for its first tokens; 16 characters a token is far more than text needs.
        return self.tokenize(text[: 16 * self.document_tokens])[: self.document_tokens]


def _in_background(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """Iterate in a thread that runs up to ``depth`` items ahead; errors surface at the consumer."""
    if depth < 1:
        yield from items
        return
    ready: queue.Queue[tuple[Any, BaseException | None, bool]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[Any, BaseException | None, bool]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put((item, None, False))
                if stopped.is_set():
                    return
            put((None, None, True))
        except BaseException as error:
            put((None, error, True))

    thread = threading.Thread(target=produce, name="seer-data", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = ready.get()
            if error is not None:
                raise error
            if last:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
