"""One run for each saved state: two would overwrite each other's steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

__all__ = ["lock_of", "locked"]


def lock_of(path: Path) -> Path:
    """The lock file of the state at ``path``. It stays behind, empty: only holding it means something."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the state at ``path``, in a folder that is made where it is missing.

    The operating system gives the lock back when the process that holds it ends, however it ends.

    Raises:
        ValueError: another run holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_of(path), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another run is writing to {path.parent} (it holds {lock_of(path).name}); wait for it, stop it, or choose "
            "another output directory"
        ) from None
    except NotImplementedError as error:
        logger.warning("%s cannot be locked (%s); see to it that no other run writes there", path.parent, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()
