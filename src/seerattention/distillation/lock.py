"""One run for each saved state: two would overwrite each other's steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import held

__all__ = ["lock_of", "locked"]


def lock_of(path: Path) -> Path:
    """The lock file of the state at ``path``, see :func:`~seerattention.files.held`."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the state at ``path``, in a folder that is made where it is missing.

    Raises:
        ValueError: another run holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(lock_of(path), wait=False) as mine:
        if mine is False:
            raise ValueError(
                f"another run is writing to {path.parent} (it holds {lock_of(path).name}); wait for it, stop it, or "
                "choose another output directory"
            )
        yield
