"""Where the models are made: folders in the Hugging Face cache, and the embedded model unpacked into one of them."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path

from ..files import PACKED, DamagedFileError, read_json, sha256_of, unpack, write_folder

__all__ = ["models_cache", "unpacked"]

logger = logging.getLogger(__name__)

# Beside the unpacked files: the SHA-256 of each. What is not as it says is unpacked again.
_DIGESTS = ".unpacked.json"
_DIGITS = 16
# Of this process: folders that it unpacked because the cache could not be written to, by the digest of what is in them.
_own_folders: dict[str, Path] = {}
_own_folders_lock = threading.Lock()


def models_cache() -> Path:
    """The folder of models in the assets of the Hugging Face cache, which ``HF_HOME`` and ``HF_ASSETS_CACHE`` move.

    Raises:
        OSError: it is not there and cannot be made.
    """
    from huggingface_hub import cached_assets_path

    try:
        return cached_assets_path("seerattention", namespace="testbed", subfolder="models")
    except ValueError as error:  # a file is in its way
        raise NotADirectoryError(str(error)) from error


def unpacked(source: Path, name: str) -> Path:
    """A folder with the files of ``source``, the packed ones unpacked.

    It is made in the cache when it is first asked for; its path has a digest of all files of ``source``, so that no
    version of them is taken for another, and what was damaged since is made anew. Processes that ask at the same time
    wait for one of them. Where the cache cannot be written to, each process makes a temporary folder, removed when it
    ends, and says so once. A file that was unpacked beside its packed form is taken as it is, as it is of gates; if
    none is left to unpack, the folder is ``source`` itself.

    Args:
        source: files only are looked at.
        name: last part of the path.

    Raises:
        DamagedFileError: a packed file is damaged. ModuleNotFoundError: this Python cannot unpack it; says what to do.
        OSError: ``source`` cannot be read, or neither the cache nor a temporary folder can be written to.
    """
    files = _files(source)
    if not any(path.suffix == PACKED for path in files.values()):
        return source
    content = "".join(f"{path.name} {_sha256(path)}\n" for _, path in sorted(files.items()))
    digest = hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]
    try:
        folder = models_cache() / f"embedded-{digest}" / name
        if not _is_whole(folder, files):
            write_folder(folder, lambda: _is_whole(folder, files), lambda target: _unpack(files, target))
    except OSError as error:
        return _own_folder(digest, name, files, error)
    return folder


def _files(source: Path) -> dict[str, Path]:
    """The files of a folder, by their names when they are unpacked."""
    found = [path for path in source.iterdir() if path.is_file() and not path.name.startswith(".")]
    packed = {path.name.removesuffix(PACKED): path for path in found if path.suffix == PACKED}
    return packed | {path.name: path for path in found if path.suffix != PACKED}


def _unpack(files: dict[str, Path], folder: Path) -> None:
    for name, path in files.items():
        if path.suffix == PACKED:
            (folder / name).write_bytes(unpack(path))
        else:
            shutil.copyfile(path, folder / name)
    (folder / _DIGESTS).write_text(json.dumps({name: sha256_of(folder / name) for name in sorted(files)}, indent=1))


def _is_whole(folder: Path, files: dict[str, Path]) -> bool:
    try:
        digests = read_json(folder / _DIGESTS)
        return digests.keys() == files.keys() and all(_sha256(folder / name) == digests[name] for name in files)
    except (OSError, DamagedFileError):
        return False


def _sha256(path: Path) -> str:
    """The digest of a file, which is read again only when it has changed since."""
    found = path.stat()
    return _sha256_of_state(path, (found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _sha256_of_state(path: Path, state: tuple[int, ...]) -> str:
    return sha256_of(path)


def _own_folder(digest: str, name: str, files: dict[str, Path], reason: OSError) -> Path:
    """The folder where this process has the files because the cache takes none."""
    with _own_folders_lock:
        folder = _own_folders.get(digest)
        if folder is not None and _is_whole(folder, files):  # not the one of a parent process that has ended
            return folder
        try:
            root = Path(tempfile.mkdtemp(prefix=f"{name}-"))
            atexit.register(_remove, root, os.getpid())
            folder = root / name
            write_folder(folder, lambda: False, lambda target: _unpack(files, target))
        except OSError as error:
            raise OSError(
                f"{name} can be unpacked neither into the Hugging Face cache ({reason}) nor into a temporary folder "
                f"({error}); let HF_HOME or TMPDIR name a folder that can be written to"
            ) from error
        logger.warning(
            "%s cannot be unpacked into the Hugging Face cache (%s); this process does it in %s, which goes when it "
            "ends. Let HF_HOME name a folder that can be written to",
            name,
            reason,
            root,
        )
        _own_folders[digest] = folder
        return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked one may still read there, and is not to remove it when it ends
        shutil.rmtree(folder, ignore_errors=True)
