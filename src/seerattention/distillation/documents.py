"""Text documents from files, folders and Hugging Face datasets, as one ordered stream that can start anywhere."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

SUFFIXES = (".jsonl", ".txt", ".jsonl.zst", ".txt.zst")

Documents = Callable[[int], Iterator[str]]
"""``documents(skip)`` iterates over the texts in a fixed order, without the first ``skip`` of them."""


def open_documents(source: str | Path, *, text_field: str = "text") -> Documents:
    """Find the documents that ``source`` names.

    Args:
        source: a ``.jsonl`` or ``.txt`` file, either also as ``.zst``; a folder of such files (searched recursively,
            in the order of their names); or the id of a Hugging Face dataset as ``owner/name``, ``owner/name:config``,
            with ``@split`` at the end for another split than "train". A ``.txt`` file is one document, a line of
            ``.jsonl`` is one.
        text_field: the key of the text in JSON lines and datasets.

    Raises:
        FileNotFoundError: a path-like source (it has a known suffix, more than one slash, or starts with "." or "/")
            does not exist, or a folder holds no such file.
        ModuleNotFoundError: a dataset is asked for and the ``datasets`` package is not installed.
    """
    name = str(source)
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise FileNotFoundError(f"no {', '.join(SUFFIXES)} file in folder {path}")
        return lambda skip: _read_files(files, text_field, skip)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"cannot read {path}: supported are {', '.join(SUFFIXES)} files, folders of them, and dataset ids"
            )
        return lambda skip: _read_files([path], text_field, skip)
    if name.startswith((".", "/", "~")) or name.endswith(SUFFIXES) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"no such file or folder: {name}")
    return _open_dataset(name, text_field)


def _read_files(files: list[Path], text_field: str, skip: int) -> Iterator[str]:
    for file in files:
        if ".txt" in file.suffixes[-2:]:
            if skip:
                skip -= 1
            else:
                yield _open_text(file).read()
            continue
        with _open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if skip:
                    skip -= 1
                    continue
                yield _text_of(line, text_field, f"{file}:{number}")


def _open_text(file: Path) -> io.TextIOBase:
    if file.suffix != ".zst":
        return open(file, encoding="utf-8")
    import zstandard

    return io.TextIOWrapper(
        zstandard.ZstdDecompressor().stream_reader(open(file, "rb"), closefd=True), encoding="utf-8"
    )


def _text_of(line: str, text_field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{place} has no text under {text_field!r} (found {found}); name the right key with --text-field"
        )
    return record[text_field]


def _open_dataset(name: str, text_field: str) -> Documents:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name!r} is no file or folder here, so it is taken for a Hugging Face dataset id, and those need the "
            'datasets package: pip install "seerattention[data]" (or: pip install datasets)'
        ) from error
    identifier, _, split = name.partition("@")
    identifier, _, config = identifier.partition(":")
    dataset = load_dataset(identifier, config or None, split=split or "train", streaming=True)

    def read(skip: int) -> Iterator[str]:
        for record in dataset.skip(skip) if skip else dataset:
            if not isinstance(record.get(text_field), str):
                raise ValueError(f"dataset {name} has no text under {text_field!r}; its fields are {sorted(record)}")
            yield record[text_field]

    return read
