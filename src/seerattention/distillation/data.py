"""Packs a stream of documents into batches of fixed-length token sequences, with a position that can be resumed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .documents import Documents
from .identity import text_digest
from .repeats import Repeats
from .woven import Woven

__all__ = ["PackedText", "Position", "in_background", "tokenize_with"]


_PATIENCE = 1.0  # seconds


@dataclass(frozen=True)
class Position:
    """Where in the documents the next sequence begins: pass, document of the pass, token of the document."""

    epoch: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class _Read:
    """What the first pass has read: the index of the document that follows, and the digest of all before it."""

    documents: int
    digest: str = ""


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
    What is left at the end of a pass, less than a global batch, is dropped. The state holds a digest of the texts read
    so far: where they have changed, nothing continues from it.

    Args:
        documents: see :func:`~seerattention.distillation.documents.open_documents`.
        tokenize: text -> token ids, see :func:`tokenize_with`.
        length: tokens a sequence.
        batch_size: sequences a batch and process.
        start: where each pass begins (what lies before is held out for evaluation, say).
        document_tokens: use at most so many tokens of each document, for more variety in a batch; None: all.
        repeat: start over at the end instead of ending.
        rank, world_size: this process and how many there are.
        repeats: makes a share of the sequences say passages of their first part again in their last; None: text as it
            is. What it draws follows from its seed and from where the sequence ends in the documents (pass, document,
            token), so it is the same for any number of processes and after an interruption, and another one in every
            pass. The state holds it: nothing continues with others.
        tasks: weaves retrieval tasks into a share of the sequences; None: into none. Drawn as ``repeats`` are, and held
            by the state in the same way. A sequence that was chosen for it says no passages again.

    Raises:
        ValueError: a length or count below 1, or sequences too short for ``repeats`` or ``tasks``.
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
        repeats: Repeats | None = None,
        tasks: Woven | None = None,
    ):
        if length < 1 or batch_size < 1:
            raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
        if document_tokens is not None and document_tokens < 1:
            raise ValueError(f"document_tokens must be at least 1 or None, got {document_tokens}")
        self.repeats = repeats if repeats is not None and repeats.share else None
        self.tasks = tasks if tasks is not None and tasks.share else None
        for changed in (self.repeats, self.tasks):
            if changed is not None:
                changed.check_length(length)
        self.documents, self.tokenize = documents, tokenize
        self.length, self.batch_size = length, batch_size
        self.start = start or Position()
        self.document_tokens, self.repeat = document_tokens, repeat
        self.rank, self.world_size, self.prefetch = rank, world_size, prefetch
        self.position = self.start
        self._read = _Read(self.start.document)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, and what it was read from; JSON-able."""
        return {**asdict(self.position), "read": asdict(self._read), "settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position; it holds for the next iterator. The texts up to it are read once more.

        Raises:
            ValueError: the texts, their tokens or the settings are not those with which the state was made.
        """
        settings = self._settings()
        before = state.get("settings", settings)
        differing = [
            f"{key} was {before.get(key)!r}, now {settings[key]!r}"
            for key in settings
            if before.get(key) != settings[key]
        ]
        if differing:
            raise ValueError(f"cannot continue with text that is packed in another way: {', '.join(differing)}")
        position = Position(**{key: state[key] for key in asdict(Position())})
        read = _Read(self.start.document)
        if "read" in state:  # states of earlier versions have no digest
            expected = _Read(**state["read"])
            for text in islice(self.documents(read.documents), expected.documents - read.documents):
                read = self._and(read, text)
            if read != expected:
                raise ValueError(
                    "the text, or its tokenizer, is not the one that was read before the interruption: one of the "
                    f"first {expected.documents} documents has changed. Bring back the text as it was, choose another "
                    "output directory, or delete the saved state to start over"
                )
        self.position, self._read = position, read

    def _settings(self) -> dict[str, Any]:
        """What decides, besides the texts, which tokens a position names."""
        return {
            "length": self.length,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "document_tokens": self.document_tokens,
            "start": [self.start.document, self.start.token],
            "repeats": None if self.repeats is None else self.repeats.to_dict(),
            "tasks": None if self.tasks is None else self.tasks.to_dict(),
        }

    def _and(self, read: _Read, text: str) -> _Read:
        """What has been read after one more document. Of the first, its tokens count too: tokenizers may change."""
        digest = text_digest(read.digest, text)
        if read.documents == self.start.document:
            digest = text_digest(digest, str(self._token_ids(text)))
        return _Read(read.documents + 1, digest)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch, position, read in in_background(self._batches(self.position, self._read), self.prefetch):
            self.position, self._read = position, read
            yield {"input_ids": batch}

    def _batches(self, position: Position, read: _Read) -> Iterator[tuple[Tensor, Position, _Read]]:
        global_batch = self.batch_size * self.world_size
        while True:
            rows: list[tuple[list[int], Position]] = []
            made = 0
            for row, after, so_far in self._sequences(position, read):
                rows.append((row, after))
                if len(rows) == global_batch:
                    mine = rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                    yield torch.stack([self._as_trained_on(*one) for one in mine]), after, so_far
                    rows, made, read = [], made + 1, so_far
            whole_pass = (position.document, position.token) == (self.start.document, self.start.token)
            if whole_pass and not made:
                raise ValueError(
                    f"the text gives {len(rows)} sequences of {self.length} tokens, a batch over all processes takes "
                    f"{global_batch}; give more text, or a smaller length or batch size"
                )
            if not self.repeat:
                return
            position = Position(position.epoch + 1, self.start.document, self.start.token)

    def _as_trained_on(self, row: list[int], after: Position) -> Tensor:
        ids, place = torch.tensor(row, dtype=torch.long), (after.epoch, after.document, after.token)
        made = ids if self.tasks is None else self.tasks.apply(ids, *place)
        return made if self.repeats is None or made is not ids else self.repeats.apply(ids, *place)

    def _sequences(self, position: Position, read: _Read) -> Iterator[tuple[list[int], Position, _Read]]:
        """Sequences of one pass, from ``position`` on, each with the position that follows it and what was read."""
        pending: list[int] = []
        skip = position.token
        for index, text in enumerate(self.documents(position.document), position.document):
            if index == read.documents:
                read = self._and(read, text)
            ids = self._token_ids(text)
            taken = min(skip, len(ids))
            skip = 0
            while len(pending) + len(ids) - taken >= self.length:
                end = taken + self.length - len(pending)
                row, taken, pending = pending + ids[taken:end], end, []
                yield row, Position(position.epoch, index, taken), read
            pending += ids[taken:]

    def _token_ids(self, text: str) -> list[int]:
        if self.document_tokens is None:
            return self.tokenize(text)
        # No need to tokenise a whole book for its first tokens; 16 characters a token is far more than text needs.
        return self.tokenize(text[: 16 * self.document_tokens])[: self.document_tokens]


def in_background(items: Iterator[Any], depth: int) -> Iterator[Any]:
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
        # Not for ever: it may be waiting for a disk or a network that does not answer, and it is a daemon.
        thread.join(timeout=_PATIENCE)
