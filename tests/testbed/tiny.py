"""Book text and a run folder small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path

from testbed.data import tokenise, train_tokenizer

from seerattention import testbed


def write_books(folder: Path) -> tuple[Path, Path]:
    """Two files of a few passages each, for training and for evaluation."""
    paths = []
    for split, name in (("train", "train.jsonl"), ("test", "held_out.jsonl")):
        path = folder / name
        passages = [text[:90_000] for text in testbed.book_texts(split)[:2]]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
        paths.append(path)
    return paths[0], paths[1]


def make_run(folder: Path) -> Path:
    """A run folder with a tokenizer and training tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text[:90_000] for text in testbed.book_texts("train")[:2]]
    tokenizer = train_tokenizer(iter(texts * 4), 2048, folder, characters=5e6)
    tokenise(iter(texts), tokenizer, folder / "train.u16")
    return folder
