"""Texts in, token files out, and the worker processes that turn them into weighted training batches."""

from __future__ import annotations

import multiprocessing as mp
import queue
import random
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seerattention.files import replacing
from seerattention.tasks.words import ADJECTIVES, NOUNS

BOS, PAD = "<|bos|>", "<|pad|>"
SHORTEST_BOOK = 20_000  # tokens; shorter ones leave no room for a long haystack


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path, characters: float = 30e6, seed: int = 7) -> Any:
    """A byte-level BPE whose numbers are groups of three digits, each group one token; saved for ``AutoTokenizer``.

    The words that needles are named after are one token each, too, whatever the texts. ``texts`` is sampled in pieces
    until about ``characters`` characters were read.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{3}|\d{1,2}"), "isolated"),
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    numbers, words = [f"{i:03d}" for i in range(1000)], [f" {word}" for word in (*ADJECTIVES, *NOUNS)]

    def sample() -> Iterator[str]:
        seen = 0
        # Often enough, against that much text, that every three-digit group and every word becomes one token.
        for _ in range(int(characters / 1e4)):
            yield " ".join(numbers)
            yield "".join(words)
        for text in texts:
            if seen >= characters:
                return
            if rng.random() < 0.35:
                seen += len(text)
                yield from (text[i : i + 20_000] for i in range(0, len(text), 20_000))

    bpe.train_from_iterator(
        sample(),
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[BOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    if missing := [text for text in (*numbers, *words) if len(bpe.encode(text).ids) != 1]:
        raise RuntimeError(
            f"{len(missing)} three-digit groups and words of needles are not single tokens ({missing[0]!r}); use a "
            f"larger vocabulary than {vocab_size}"
        )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def tokenise(texts: Iterable[str], tokenizer: Any, path: Path) -> int:
    """Write texts as one uint16 file in which every text begins with the BOS token; returns the number of tokens.

    Raises:
        ValueError: the vocabulary has more than 65,536 tokens.
    """
    backend = tokenizer.backend_tokenizer
    bos = tokenizer.bos_token_id
    if len(tokenizer) > 1 << 16:
        raise ValueError(
            f"token files hold ids below 65,536, got a vocabulary of {len(tokenizer):,}; use a smaller one"
        )
    total = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for group in _groups(texts, 64):
            # Long texts in pieces, so that every core has work; pieces end at line breaks.
            pieces, ends = [], []
            for text in group:
                pieces += _cut(text, 30_000)
                ends.append(len(pieces))
            encoded = backend.encode_batch(pieces, add_special_tokens=False)
            start = 0
            for end in ends:
                ids = np.array([bos, *(i for piece in encoded[start:end] for i in piece.ids)], dtype=np.uint16)
                ids.tofile(file)
                total, start = total + len(ids), end
    return total


def _groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _cut(text: str, size: int) -> list[str]:
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end
        pieces.append(text[start:end])
        start = end
    return pieces


def load_books(files: Iterable[Path], shortest: int = SHORTEST_BOOK, bos: int = 0) -> list[np.ndarray]:
    """Books of at least ``shortest`` tokens from token files, without their BOS; memory-mapped."""
    books = []
    for file in files:
        tokens = np.memmap(file, dtype=np.uint16, mode="r")
        starts = np.flatnonzero(tokens == bos)
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if end - start > shortest:
                books.append(tokens[start + 1 : end])
    if not books:
        raise ValueError(f"no book of at least {shortest} tokens found in {[str(f) for f in files]}")
    return books


def batch(mix: Any, context: int, tokens: int, tasks: float, drills: float) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Token ids int32 and weights float16, both ``[tokens // context, context + 1]``, and the kind of each row."""
    rows = [mix.sequence(context + 1, tasks=tasks, drills=drills) for _ in range(tokens // context)]
    ids, weights = (np.stack([getattr(row, name) for row in rows]) for name in ("input_ids", "weights"))
    return ids.astype(np.int32), weights.astype(np.float16), [row.task for row in rows]


class _Maker:
    """Makes batches from the token files in a folder, also from those that arrive while training runs."""

    def __init__(self, folder: str, number: int, seed: int, options: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        self.folder, self.number, self.seed, self.options = Path(folder), number, seed, options
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.files: list[Path] = []
        self.generator: Any = None

    def make(self, phase: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
        from seerattention.tasks import TaskGenerator, TrainingMix

        found = sorted(self.folder.glob("train*.u16"))
        if self.generator is None or found != self.files:
            self.files = found
            books = load_books(found, self.options["shortest_book"], self.tokenizer.bos_token_id)
            seed = self.seed * 1000 + self.number + 97 * len(found)
            self.generator = TaskGenerator(
                self.tokenizer, books, split="train", seed=seed, templates=self.options["templates"]
            )
        mix = TrainingMix(self.generator, phase.task_mix, phase.drill_mix, phase.key_mix)
        return batch(mix, phase.context, phase.tokens, phase.tasks, phase.drills)


def _worker(out: Any, phase: Any, phases: list, *arguments: Any) -> None:
    torch.set_num_threads(1)
    maker = _Maker(*arguments)
    while True:
        index = phase.value
        out.put((index, *maker.make(phases[index])))


class Batches:
    """Batches for the current phase, made by worker processes and pinned by a thread.

    Args:
        phases: the phases of the run.
        folder: where tokenizer and ``train*.u16`` files are.
        workers: 0 makes batches in this process, when they are asked for.
        seed: each worker's batches are a function of it, the worker's number and the token files.
        options: ``shortest_book`` and ``templates`` of ``TrainConfig``.
        pin: pin the memory, for copies to a GPU.
    """

    def __init__(
        self, phases: list, folder: Path, workers: int, seed: int, options: dict[str, Any], pin: bool = False
    ) -> None:
        self._phases, self._pin = phases, pin
        self._maker = None if workers else _Maker(str(folder), 0, seed, options)
        if not workers:
            return
        context = mp.get_context("spawn")
        self._phase = context.Value("i", 0)
        self._queue: Any = context.Queue(2 * workers)
        self._ready: queue.Queue = queue.Queue(3)
        shared = (self._queue, self._phase, phases, str(folder))
        self._processes = [
            context.Process(target=_worker, args=(*shared, i, seed, options), daemon=True) for i in range(workers)
        ]
        for process in self._processes:
            process.start()
        threading.Thread(target=self._feed, daemon=True).start()

    def _feed(self) -> None:
        while True:
            index, ids, weights, kinds = self._queue.get()
            tensors = [torch.from_numpy(ids), torch.from_numpy(weights)]
            self._ready.put((index, *(t.pin_memory() if self._pin else t for t in tensors), kinds))

    def get(self, phase: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """The next batch of this phase: ids int32 and weights float16 ``[rows, context + 1]``, the kind of each row.

        Raises:
            RuntimeError: all workers have died.
        """
        if self._maker is not None:
            ids, weights, kinds = self._maker.make(self._phases[phase])
            return torch.from_numpy(ids), torch.from_numpy(weights), kinds
        self._phase.value = phase
        while True:
            try:
                index, *rest = self._ready.get(timeout=5)
            except queue.Empty:
                if not any(process.is_alive() for process in self._processes):
                    raise RuntimeError("all data workers have died; see their error above") from None
                continue
            if index == phase:  # batches of the phase before are dropped
                return tuple(rest)  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the workers."""
        for process in [] if self._maker is not None else self._processes:
            process.terminate()
