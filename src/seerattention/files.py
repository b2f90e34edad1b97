"""Files that are either the old one or the new one, never half of one.

A file is written under a temporary name beside its place, flushed to the disk, and renamed over the old one: whatever
kills the process, at whatever moment, the name holds a complete file. The temporary name is always the same, so kills
leave at most one behind, and the next write replaces it.
"""

from __future__ import annotations

import os
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """Where a new version of ``path`` is written before :func:`replace_file`."""
    return path.with_name(f".{path.name}.partial")


def replace_file(path: Path) -> None:
    """Flush the finished temporary file of ``path`` to the disk and rename it to ``path``."""
    temporary = temporary_name(path)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere folders cannot be flushed
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file atomically, in a folder that is made where it is missing; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary_name(path).write_bytes(content.encode() if isinstance(content, str) else content)
        replace_file(path)
    except BaseException:
        temporary_name(path).unlink(missing_ok=True)
        raise
