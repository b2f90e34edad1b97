"""Results on disk as they come, so that a run that was stopped goes on where it was.

A folder holds ``results.jsonl``, one line for each case: what it was, a digest of all that decides it, its numbers.
What numbers alone do not hold (losses of all tokens) is in ``cases/``, a file for each case. Both are complete at
whatever moment the process ends: arrays are written first, and the file of lines is replaced as a whole.

Several processes may share a folder: each writes a file of lines of its own (``results-1.jsonl``) and reads all.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..files import DamagedFileError, parse_json, read_bytes, write_file
from .measure import Result

__all__ = ["Journal", "Kept", "read_lines"]

logger = logging.getLogger(__name__)

Kept = list[tuple[dict[str, Any], dict[str, np.ndarray]]]
"""The numbers and arrays of each result of a case."""


class Journal:
    """The results in a folder.

    Args:
        folder: is made when the first case is added. Lines of other cases that are there already are kept.
        process: which of several that share the folder; the first one is 0.
    """

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder = folder
        self.path = folder / (f"results-{process}.jsonl" if process else "results.jsonl")
        self._lines: list[dict[str, Any]] = read_lines(self.path) if self.path.exists() else []
        self._others: dict[Path, tuple[tuple[int, int], list[dict[str, Any]]]] = {}

    def lines(self) -> list[dict[str, Any]]:
        """Every case in the folder, those of other processes too, as they are on disk now; this process's come last."""
        found = []
        for path in sorted(self.folder.glob("results*.jsonl")):
            if path == self.path:
                continue
            state = path.stat()
            version = state.st_mtime_ns, state.st_size
            if self._others.get(path, (None, []))[0] != version:
                self._others[path] = version, read_lines(path)
            found += self._others[path][1]
        return found + self._lines

    def find(self, digest: str | None) -> Kept | None:
        """What was found in the case with this digest; None where it is not there or its files are damaged."""
        if digest is None:
            return None
        line = next((line for line in reversed(self.lines()) if line["digest"] == digest), None)
        return None if line is None else self.read(line)

    def read(self, line: Mapping[str, Any]) -> Kept | None:
        """Numbers and arrays of the results of a line; None where its files are damaged."""
        try:
            arrays = self._read_arrays(line["arrays"])
        except (OSError, DamagedFileError) as error:
            logger.warning("%s; that case is measured again", error)
            return None
        return [
            (numbers, {name.partition(" ")[2]: arrays[name] for name in arrays if name.startswith(f"{index} ")})
            for index, numbers in enumerate(line["results"])
        ]

    def add(self, case: Mapping[str, Any], digest: str | None, results: Sequence[Result]) -> None:
        """Write the results of a case; an older line of the same digest is replaced.

        Args:
            case: what it is, for readers: plain values.
            digest: None where not all that decides the case is known: it is written, and never found again.
        """
        named = {f"{i} {name}": array for i, result in enumerate(results) for name, array in result.arrays().items()}
        line = {
            "case": dict(case),
            "digest": digest,
            "results": [result.to_dict() for result in results],
            "arrays": self._write_arrays(case, digest, named) if named and digest is not None else None,
        }
        self._lines = [old for old in self._lines if digest is None or old["digest"] != digest]
        self._lines.append(line | {"checksum": _checksum(line)})
        write_file(self.path, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self._lines))

    def _write_arrays(
        self, case: Mapping[str, Any], digest: str | None, arrays: Mapping[str, np.ndarray]
    ) -> dict[str, str]:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        name = f"cases/{case['measure']}-{(digest or '')[:16]}.npz"
        write_file(self.folder / name, buffer.getvalue())
        return {"file": name, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}

    def _read_arrays(self, described: Mapping[str, str] | None) -> dict[str, np.ndarray]:
        if described is None:
            return {}
        path = self.folder / described["file"]
        content = read_bytes(path)
        if hashlib.sha256(content).hexdigest() != described["sha256"]:
            raise DamagedFileError(f"{path} is damaged: it is not what was written")
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as opened:
                return {name: opened[name] for name in opened.files}
        except (ValueError, BadZipFile, EOFError) as error:
            raise DamagedFileError(f"{path} is damaged: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are what was written; of others a warning tells."""
    found = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            found.append(_checked(parse_json(line, f"line {number} of {path}")))
        except DamagedFileError as error:
            logger.warning("%s; that case is measured again", error)
    return found


def _checksum(line: Mapping[str, Any]) -> str:
    content = {name: value for name, value in line.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checked(line: dict[str, Any]) -> dict[str, Any]:
    if line.get("checksum") != _checksum(line):
        raise DamagedFileError(f"the line of {line.get('case')} is not what was written")
    return line
