"""Files that are either the old one or the new one, never half of one; and what is read of them, or a clear error.

A file is written under a temporary name beside its place, flushed to the disk, and renamed over the old one: whatever
kills the process, at whatever moment, the name holds a complete file. Temporary names are unique, so writers of one
file do not touch each other's; the next write removes what killed writers left behind.

A reader takes the bytes of a file once and works on them, so that a rename meanwhile cannot mix two versions. Weights
that are shipped may be packed: compressed without loss, under the same name with an ending more.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "PACKED",
    "DamagedFileError",
    "held",
    "pack",
    "packed_path",
    "parse_json",
    "read_bytes",
    "read_json",
    "replacing",
    "sha256_of",
    "temporary_files",
    "unpack",
    "write_file",
    "write_folder",
]

logger = logging.getLogger(__name__)


# Of a writer on another machine, or one whose process number was given to another program, nobody knows whether it
# lives: what is older than this was left behind.
_LEFT_BEHIND_SECONDS = 24 * 3600
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
_OWNED = re.compile(r"(?P<host>[A-Za-z0-9-]*)\.(?P<process>\d+)\.[0-9a-f]{8}")
# What safetensors names files before it renames them; earlier versions of this package wrote with it.
_OF_SAFETENSORS = ".tmp??????"

_ADVICE = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some space, or choose another folder",
    errno.EFBIG: "choose a file system that takes files of this size",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that can be written to",
    errno.EPERM: "choose a folder that can be written to",
    errno.ENOTDIR: "choose a folder that can be written to",
    errno.EEXIST: "choose a folder that can be written to",
}


class DamagedFileError(ValueError):
    """A file does not hold what it should: it was cut off, changed, or is something else. The message names it."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a new version of ``path``: the block gets a temporary name to write to, which then replaces ``path``.

    If the block or the replacement fails, ``path`` is as before and nothing is left behind. The folder is made where it
    is missing.

    Raises:
        OSError: the disk is full, read-only, ...; of the same type as the one that occurred, and the message names
            ``path`` and says what to do.
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
        if error.errno in _ADVICE:
            message = f"{message}; {_ADVICE[error.errno]}"
        raise (OSError(message) if error.errno is None else OSError(error.errno, message)) from error


@contextlib.contextmanager
def held(path: Path, wait: bool) -> Iterator[bool | None]:
    """Hold a lock file, which stays behind, empty: only holding it means something. The operating system gives it back
    when the process that holds it ends, however it ends.

    Args:
        path: in a folder that is there.
        wait: for another process that holds it.

    Yields:
        True; False where another process holds it; None, with a warning, on a file system that has no locks.
    """
    from filelock import FileLock, Timeout  # whoever only reads gates needs no lock

    lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False)
    found: bool | None = True
    try:
        lock.acquire()
    except Timeout:
        found = False
    except NotImplementedError as error:
        logger.warning("%s cannot be locked (%s); see to it that no other process writes there", path.parent, error)
        found = None
    try:
        yield found
    finally:
        if found:
            lock.release()


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file atomically; text as UTF-8. See :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_folder(folder: Path, is_there: Callable[[], bool], write: Callable[[Path], None]) -> None:
    """Make a folder of files once: it is there complete or not at all. Processes that ask at once wait for one of them.

    Args:
        folder: its parents are made. What lies under this name, but is not what is wanted, is replaced.
        is_there: whether ``folder`` is what is wanted; asked while no other process writes it.
        write: fills the empty folder that it is given, with files only.

    Raises:
        OSError: the disk is full or read-only, for example. That, and what the functions raise, leaves nothing behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder.parent / f".{folder.name}.lock", wait=True) as alone:
        if is_there():
            return
        if alone:
            for left_behind in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
                shutil.rmtree(left_behind, ignore_errors=True)
        temporary, discarded = (
            Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent)) for _ in range(2)
        )
        try:
            write(temporary)
            for path in temporary.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            # What makes temporary folders, and some writers of files, let nobody else read them; a cache may be shared.
            for path in temporary.iterdir():
                path.chmod(0o666 & ~_umask())
            temporary.chmod(0o777 & ~_umask())
            if os.path.lexists(folder):  # not every system renames over a folder, be it empty
                os.replace(folder, discarded / folder.name)
            os.replace(temporary, folder)
        except OSError:
            if alone is not None or not is_there():  # without locks another process may have been faster
                raise
        finally:
            for path in (temporary, discarded):
                shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def temporary_files(path: Path) -> list[Path]:
    """New versions of ``path`` that are being written, or were left behind by writers that were killed."""
    found = path.parent.glob(f".{glob.escape(path.name)}.*partial")
    return sorted(one for one in found if one.name == f".{path.name}.partial" or _owner(one, path) is not None)


def _owner(temporary: Path, path: Path) -> re.Match[str] | None:
    """Host and process in the name of a temporary file of ``path``; files of earlier versions have none."""
    return _OWNED.fullmatch(temporary.name.removeprefix(f".{path.name}.").removesuffix(".partial"))


def _remove_left_behind(path: Path) -> None:
    for found in temporary_files(path):
        with contextlib.suppress(OSError):
            if not _may_be_in_use(found, path):
                found.unlink()
    if path.suffix == ".safetensors":
        for found in path.parent.glob(_OF_SAFETENSORS):
            with contextlib.suppress(OSError):
                if _is_old(found) and _is_of_safetensors(found):
                    found.unlink()


def _may_be_in_use(temporary: Path, path: Path) -> bool:
    """Whether a writer that lives may own a temporary file of ``path``."""
    if _is_old(temporary):
        return False
    owner = _owner(temporary, path)
    if owner is None or owner["host"] != _HOST or os.name != "posix":  # elsewhere signal 0 is not a question
        return True
    if int(owner["process"]) == os.getpid():
        return True  # another thread
    try:
        os.kill(int(owner["process"]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _LEFT_BEHIND_SECONDS


def _is_of_safetensors(path: Path) -> bool:
    """Whether a file begins like one of safetensors (a size, then JSON), as far as it was written; others stay."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] in (b"{", b"\0", b"")


def _flush_folder(folder: Path) -> None:
    """Make a renaming last. The file itself is on the disk already, so what cannot do this is nothing to fail on."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
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


PACKED = ".xz"
"""What the name of a packed file ends with."""


def packed_path(path: Path) -> Path:
    """Where the compressed form of a file lies."""
    return path.with_name(path.name + PACKED)


def pack(content: bytes) -> bytes:
    """Weights compressed without loss, in the format of xz; of those in half precision about a third is saved."""
    import lzma

    # Of two bytes that make a number, one is nearly random and the other is not.
    return lzma.compress(content, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}])


def unpack(path: Path) -> bytes:
    """The content of a file that :func:`pack` compressed; its checksum is verified.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is none, or damaged.
        ModuleNotFoundError: this Python was built without the module ``lzma``; says what to do.
    """
    content = read_bytes(path)
    try:
        import lzma  # some builds of Python lack it, and most files are not packed
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{path} is compressed, and this Python was built without the module lzma: unpack the file where it lies "
            f"(xz --decompress --keep {path}), or use a Python that has the module"
        ) from error
    try:
        return lzma.decompress(content)
    except Exception as error:  # whatever it makes of bytes that are anything
        raise DamagedFileError(f"{path} is damaged or truncated: {str(error) or type(error).__name__}") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal digits; of a large file no more than a part is in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


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
