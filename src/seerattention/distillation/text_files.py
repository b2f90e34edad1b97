"""Texts from files: ``.txt`` and ``.jsonl``, plain or compressed, each read to its proven end or refused by name.

What a file holds follows from its name: the last suffix is a compression or a format, and a format stands before a
compression (``wiki.txt.jsonl.zst`` is compressed JSON lines). Content that does not fit the name is an error, and so is
a compressed stream that stops before its end: what a broken download left is no shorter text.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["COMPRESSIONS", "FORMATS", "check_start", "read_text", "read_texts", "text_format", "text_of_record"]

FORMATS = (".jsonl", ".txt")
COMPRESSIONS = (".zst", ".gz", ".bz2", ".xz")

_CHUNK = 1 << 16  # compressed bytes that are decompressed at a time
_ZSTD_WINDOW = 1 << 31  # as `zstd --long=31` writes; taken only by frames that ask for it
_START = 16  # bytes that tell what a file is

_COMPRESSED = (
    (b"\x28\xb5\x2f\xfd", "zstandard", ".zst"),
    (b"\x1f\x8b", "gzip", ".gz"),
    (b"\xfd7zXZ\x00", "xz", ".xz"),
    *((b"BZh%d1AY&SY" % level, "bzip2", ".bz2") for level in range(1, 10)),
)
# First bytes -> what the file is, how to get at the text. Longer ones first where one begins with another.
_SIGNATURES = (
    *((start, f"{name} data", f"end its name in {suffix}") for start, name, suffix in _COMPRESSED),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"PAR1", "a Parquet table", "write its texts as JSON lines"),
    (b"ARROW1", "an Arrow table", "write its texts as JSON lines"),
    (b"%PDF-", "a PDF document", "extract its text"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "convert it to UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "convert it to UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
)
# A zstandard file may also begin with a frame to skip, which has one of 16 magic numbers.
_BEGINS = {
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))),
    ".gz": (b"\x1f\x8b",),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\x00",),
}


def text_format(name: str) -> tuple[str, str] | None:
    """Format and compression ("" for none) that a file's name ends in, in any case; None where it names no format."""
    lower = name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if lower.endswith(suffix)), "")
    stem = lower.removesuffix(compression)
    return next(((suffix, compression) for suffix in FORMATS if stem.endswith(suffix)), None)


def check_start(file: Path) -> None:
    """Look at the first bytes of a file: whether it is what its name says.

    Raises:
        ValueError: an empty file, a compressed file under an uncompressed name or the reverse, a known binary format,
            UTF-16 or UTF-32.
        OSError: the file cannot be opened.
    """
    with open(file, "rb") as opened:
        start = opened.read(_START)
    _check_start(file, start, _compression(file))


def read_texts(file: Path, text_field: str) -> Iterator[str]:
    """The texts of a file in order: a ``.txt`` file is one, a line of ``.jsonl`` that is not blank is one.

    Raises:
        ValueError: naming the file, and the line where there is one: see :func:`check_start`; a compressed stream that
            is damaged or ends early; bytes that are not UTF-8, or NUL; a line that is no JSON object with a string
            under ``text_field``; half of a surrogate pair; no text at all.
    """
    found = text_format(file.name)
    if found is None:
        raise ValueError(f"{file} names no format; supported are {', '.join(FORMATS)}, also {', '.join(COMPRESSIONS)}")
    if found[0] == ".txt":
        yield read_text(file)
        return
    empty = True
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            _check_characters(line, file, number)
            if line.strip():
                empty = False
                yield _text_of_line(line, text_field, file, number)
    if empty:
        raise ValueError(f"{file} holds no text: all its lines are blank")


def read_text(file: Path) -> str:
    """A whole file as one text, whatever its name; compressed where the name says so. Raises as :func:`read_texts`."""
    with _open(file) as opened:
        text = opened.read()
    if not text:
        raise ValueError(f"{file} is empty")
    _check_characters(text, file, 1)
    return text


def text_of_record(record: Any, text_field: str, place: str) -> str:
    """The text of a record of JSON lines or of a dataset.

    Args:
        record: what was read; should be a dict.
        text_field: the key of the text.
        place: where the record was found, for messages.

    Raises:
        ValueError: no dict, no string under the key, or a string that cannot be written as UTF-8.
    """
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        if not isinstance(record, dict):
            found = f"found {_json_type(record)}, not an object"
        elif text_field in record:
            found = f"found {_json_type(text)} there"
        else:
            found = f"its fields are {_shortened(sorted(map(str, record)))}"
        raise ValueError(f"{place} has no text under {text_field!r} ({found}); name the right key with --text-field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} has a text with half of a surrogate pair (\\u{ord(text[error.start]):04x}, character "
            f"{error.start + 1}), which is no character; write the texts anew without it"
        ) from error
    return text


def _compression(file: Path) -> str:
    return next((suffix for suffix in COMPRESSIONS if file.name.lower().endswith(suffix)), "")


def _check_start(file: Path, start: bytes, compression: str, inside: bool = False) -> None:
    if not start:
        raise ValueError(f"{file} is empty: no byte in it; remove it or fetch it again")
    known = next(((what, advice) for magic, what, advice in _SIGNATURES if start.startswith(magic)), None)
    if compression:
        if not start.startswith(_BEGINS[compression]):
            what = known[0] if known else "something else (uncompressed text?)"
            raise ValueError(f"{file} is named {compression} but holds {what}; give it the name of what it holds")
    elif known:
        where, advice = ("decompressed, ", "unpack it first") if inside else ("", known[1])
        raise ValueError(f"{file} holds {where}{known[0]}, not plain text; {advice}")


def _open(file: Path) -> io.TextIOWrapper:
    """A text stream in which bytes that are no UTF-8 are lone surrogates; :func:`_check_characters` finds them."""
    compression = _compression(file)
    check_start(file)
    raw: Any = open(file, "rb", buffering=0 if compression else -1)  # noqa: SIM115 (the text stream closes it)
    try:
        if compression:
            raw = io.BufferedReader(_Decompressed(raw, file, compression), _CHUNK)
            if start := raw.peek(_START)[:_START]:
                _check_start(file, start, "", inside=True)
        # utf-8-sig: a byte order mark of UTF-8 is no part of the text.
        return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape")
    except BaseException:
        raw.close()
        raise


def _check_characters(text: str, file: Path, line: int) -> None:
    """Refuse bytes that were no UTF-8, and NUL; ``line`` is that of the first character."""
    if (at := text.find("\0")) >= 0:
        line += text.count("\n", 0, at)
        raise ValueError(f"{file}:{line} holds a NUL byte: this is binary data or UTF-16, and texts are read as UTF-8")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        line += text.count("\n", 0, error.start)
        column = error.start - text.rfind("\n", 0, error.start)
        raise ValueError(
            f"{file}:{line} is not UTF-8: byte 0x{ord(text[error.start]) - 0xDC00:02x} at character {column} of the "
            "line; convert the file, for example with iconv -f latin1 -t UTF-8"
        ) from error


def _text_of_line(line: str, text_field: str, file: Path, number: int) -> str:
    place = f"{file}:{number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON; absurdly long numbers; nested too deeply
        advice = ""
        if number == 1 and line.lstrip().startswith("["):
            advice = "; one JSON array is not JSON lines, write one object a line: jq -c '.[]'"
        raise ValueError(f"{place} is not JSON: {error}{advice}") from error
    return text_of_record(record, text_field, place)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shortened(names: list[str]) -> str:
    return str(names) if len(names) <= 10 else f"{names[:10]} and {len(names) - 10} more"


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, all its frames (members, streams) one after the other.

    The readers of the standard library and of zstandard differ in what they do at the end: some stop after the first
    frame, some drop what follows the last, some take a cut frame for a whole one. All four compressions have a
    decompressor of one frame with the same attributes, so one loop serves them.
    """

    def __init__(self, raw: BinaryIO | io.RawIOBase, file: Path, compression: str):
        self._raw, self._file, self._compression = raw, file, compression
        self._new, self._errors = _decompressors(compression)
        self._frame = self._new()
        self._begun = False  # whether the frame has got a byte
        self._waiting = b""  # compressed, behind the end of a frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._waiting or self._raw.read(_CHUNK)
            if not compressed:
                if self._begun:
                    raise ValueError(
                        f"{self._file} ends in the middle of its {self._compression} data: it was cut off, by a broken "
                        "download or copy; fetch it again"
                    )
                return 0
            self._ready = memoryview(self._decompress(compressed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, compressed: bytes) -> bytes:
        self._waiting = b""
        if not self._begun and self._compression in (".gz", ".xz"):
            compressed = compressed.lstrip(b"\0")  # both formats allow zeros behind a frame
        if not compressed:
            return b""
        self._begun = True
        try:
            text = self._frame.decompress(compressed)
        except self._errors as error:
            raise ValueError(f"{self._file} has damaged {self._compression} data ({error}); fetch it again") from error
        if self._frame.eof:
            self._waiting = self._frame.unused_data
            self._frame, self._begun = self._new(), False
        return text


def _decompressors(compression: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What makes a decompressor of one frame, and the errors that it raises; imported only where it is needed."""
    if compression == ".zst":
        zstandard = importlib.import_module("zstandard")
        context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        return context.decompressobj, (zstandard.ZstdError,)
    if compression == ".gz":
        zlib = importlib.import_module("zlib")
        return lambda: zlib.decompressobj(wbits=31), (zlib.error,)
    if compression == ".bz2":
        return importlib.import_module("bz2").BZ2Decompressor, (OSError, ValueError)
    lzma = importlib.import_module("lzma")
    return lzma.LZMADecompressor, (lzma.LZMAError,)
