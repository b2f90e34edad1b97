"""Text documents from files, folders and Hugging Face datasets, as one ordered stream that can start anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from .text_files import COMPRESSIONS, FORMATS, check_start, read_texts, text_format, text_of_record

__all__ = ["Documents", "open_documents"]

_SUPPORTED = f"{' and '.join(FORMATS)} files, plain or compressed ({', '.join(COMPRESSIONS)})"

# Up to so many bytes are read whole for a fingerprint, in about a second; of more, evenly spaced samples.
_HASHED_WHOLE = 1 << 30
_SAMPLE = 1 << 16


class Documents(Protocol):
    """Texts in a fixed order."""

    def __call__(self, skip: int) -> Iterator[str]:
        """Iterate over the texts without the first ``skip`` of them."""

    def fingerprint(self) -> str:
        """A digest of what the texts are read from: equal for equal content, whatever its name, place and date.

        Files of up to 1 GiB altogether are hashed whole. Of more, each file's size and samples that are spread evenly
        over it enter, its first and last bytes among them: a change of a few bytes in between can then go unseen, a
        file that was shortened, extended or written anew cannot. Of a dataset its name, what the hub says of its
        version and sizes, and its first text enter.
        """


def open_documents(source: str | Path, *, text_field: str = "text") -> Documents:
    """Find the documents that ``source`` names.

    Args:
        source: a ``.jsonl`` or ``.txt`` file, either also as ``.zst``, ``.gz``, ``.bz2`` or ``.xz``; a folder of such
            files (searched recursively, in the order of their names); or the id of a Hugging Face dataset as
            ``owner/name``, ``owner/name:config``, with ``@split`` at the end for another split than "train". A
            ``.txt`` file is one document, a line of ``.jsonl`` is one; the last suffix decides
            (``wiki.txt.jsonl.zst`` is compressed JSON lines).
        text_field: the key of the text in JSON lines and datasets.

    Returns:
        ``documents(skip)`` iterates over the texts, ``documents.fingerprint()`` tells them from others. Iterating
        raises ValueError, with the file and where possible the line, for content that cannot be read as texts to its
        end; see :func:`~seerattention.distillation.text_files.read_texts`.

    Raises:
        FileNotFoundError: a path-like source (it has a known suffix, more than one slash, or starts with "." or "/")
            does not exist, or a folder holds no such file.
        ValueError: a file whose name ends in no supported format, or that begins as no file of this name does.
        ModuleNotFoundError: a dataset is asked for and the ``datasets`` package is not installed.
    """
    name = str(source)
    if not name.strip():
        raise ValueError("the name of the texts is empty; give a file, a folder, or a dataset id")
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if text_format(file.name) and file.is_file())
        if not files:
            raise FileNotFoundError(f"no text in folder {path}: supported are {_SUPPORTED}")
        return _Files(files, text_field)
    if path.exists():
        if not text_format(path.name):
            raise ValueError(
                f"cannot read {path}: its name does not end in a format; supported are {_SUPPORTED}, folders of them, "
                "and dataset ids"
            )
        if not path.is_file():
            raise ValueError(f"cannot read {path}: it is neither a file nor a folder, and texts are read several times")
        return _Files([path], text_field)
    if name.startswith((".", "/", "~")) or text_format(name) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"no such file or folder: {name}")
    return _Dataset(name, text_field)


class _Files:
    def __init__(self, files: Sequence[Path], text_field: str):
        self._files, self._text_field = files, text_field
        for file in files:  # what is wrong at a glance is said before any work, not after hours of it
            check_start(file)

    def __call__(self, skip: int) -> Iterator[str]:
        for file in self._files:
            if skip and text_format(file.name)[0] == ".txt":  # type: ignore[index]
                skip -= 1  # one document, which need not be read to be left out
                continue
            for text in read_texts(file, self._text_field):
                if skip:
                    skip -= 1
                else:
                    yield text

    def fingerprint(self) -> str:
        sizes = [file.stat().st_size for file in self._files]
        share = min(1.0, _HASHED_WHOLE / max(1, sum(sizes)))
        digest = hashlib.sha256(self._text_field.encode())
        for file, size in zip(self._files, sizes, strict=True):
            digest.update(f"{text_format(file.name)} {size} ".encode())
            _update(digest, file, size, share)
        return digest.hexdigest()


def _update(digest: Any, file: Path, size: int, share: float) -> None:
    """Add about ``share`` of a file to a digest: all of it, or samples that include both ends."""
    count = max(2, int(size * share) // _SAMPLE)
    whole = share == 1.0 or count * _SAMPLE >= size
    starts = range(0, size, _SAMPLE) if whole else [(size - _SAMPLE) * i // (count - 1) for i in range(count)]
    with open(file, "rb") as opened:
        for start in starts:
            if not whole:
                opened.seek(start)
            digest.update(opened.read(_SAMPLE))


class _Dataset:
    def __init__(self, name: str, text_field: str):
        try:
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{name!r} is no file or folder here, so it is taken for a Hugging Face dataset id, and those need the "
                'datasets package: pip install "seerattention[data]" (or: pip install datasets)'
            ) from error
        identifier, _, split = name.partition("@")
        identifier, _, config = identifier.partition(":")
        self._name, self._text_field = name, text_field
        self._dataset = load_dataset(identifier, config or None, split=split or "train", streaming=True)

    def __call__(self, skip: int) -> Iterator[str]:
        records = self._dataset.skip(skip) if skip else self._dataset
        for number, record in enumerate(records, skip + 1):
            yield text_of_record(record, self._text_field, f"record {number} of dataset {self._name}")

    def fingerprint(self) -> str:
        info = getattr(self._dataset, "info", None)
        facts = [str(getattr(info, name, None)) for name in ("version", "splits", "download_checksums")]
        digest = hashlib.sha256("\n".join([self._name, self._text_field, *facts]).encode())
        digest.update(next(self(0), "").encode())
        return digest.hexdigest()
