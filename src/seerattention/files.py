"""Files that are either the old one or the new one, never half of one; and what is read of them, or a clear error.

A file is written under a temporary name beside its place, flushed to the disk, and renamed over the old one: whatever
kills the process, at whatever moment, the name holds a complete file. Temporary names are unique, so writers of one
file do not touch each other's; the next write removes what killed writers left behind.

A reader takes the bytes of a file once and works on them, so that a rename meanwhile cannot mix two versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["DamagedFileError", "read_bytes", "read_json", "replacing", "temporary_files", "write_file"]

# Of a writer on another machine, or one whose process number was given to another program, nobody knows whether it
# lives: what is older than this was left behind.
_LEFT_BEHIND_SECONDS = 24 * 3600
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


class DamagedFileError(ValueError):
    """A file does not hold what it should: it was cut off, changed, or is something else. The message names it."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a new version of ``path``: the block gets a temporary name to write to, which then replaces ``path``.

    If the block or the replacement fails, ``path`` is as before and nothing is left behind. The folder is made where it
    is missing.

    Raises:
        OSError: the disk is full, read-only, ...; the message names ``path``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path)
        temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write {path}: {reason}; what was there before is unchanged"
        raise (OSError(message) if error.errno is None else OSError(error.errno, message)) from error


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file atomically; text as UTF-8. See :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def temporary_files(path: Path) -> list[Path]:
    """New versions of ``path`` that are being written, or were left behind by writers that were killed."""
    return sorted(path.parent.glob(f".{_escaped(path.name)}*.partial"))


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _remove_left_behind(path: Path) -> None:
    for found in temporary_files(path):
        with contextlib.suppress(OSError):
            if not _may_be_in_use(found, path):
                found.unlink()


def _may_be_in_use(temporary: Path, path: Path) -> bool:
    """Whether a writer that lives may own a temporary file of ``path``."""
    owner = re.fullmatch(r"\.([^.]*)\.(\d+)\.[0-9a-f]{8}\.partial", temporary.name.removeprefix(f".{path.name}"))
    if time.time() - temporary.stat().st_mtime > _LEFT_BEHIND_SECONDS:
        return False
    if owner is None or owner[1] != _HOST:
        return True
    if int(owner[2]) == os.getpid():
        return True  # another thread
    try:
        os.kill(int(owner[2]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be flushed
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read_bytes(path: Path) -> bytes:
    """The content of a file, read once.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read; the message names it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot read {path}: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not valid JSON (NaN and infinities are not), or no object.
    """
    return parse_json(read_bytes(path), str(path))


def parse_json(content: bytes | str, source: str) -> dict[str, Any]:
    """The JSON object in ``content``; ``source`` is what messages call it. Errors as of :func:`read_json`."""
    try:
        data = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DamagedFileError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise DamagedFileError(f"{source} must hold a JSON object, got {type(data).__name__}")
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
