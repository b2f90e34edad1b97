"""SIGINT, SIGTERM and SIGHUP while a run is on: it stops where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts"]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """A context in which the first of these signals raises KeyboardInterrupt, but never inside :meth:`held`.

    The handlers are installed in the main thread only (elsewhere Python has none), leave a signal alone that is ignored
    (``nohup``), and are put back at the end. Then a signal other than SIGINT is sent again, so that the process ends
    by it, or does what the handler before said. Signals after the first are let pass: the run is stopping already.

    Args:
        enabled: False: the context does nothing (processes of a run that keep no state).
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.received: int | None = None
        """The signal that came, or None."""
        self._before: dict[int, Any] = {}
        self._held = 0
        self._raised = False

    def __enter__(self) -> Interrupts:
        if self.enabled and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before is not None and before is not signal.SIG_IGN:  # None: installed by something not in Python
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self.received is None:
            return
        if self.received != signal.SIGINT:
            signal.raise_signal(self.received)
        if error is None:  # it came after the last moment at which the run could have stopped
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        if not self._held:
            self._raise_once()

    def _raise_once(self) -> None:
        if self.received is not None and not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is done here is done to the end; a signal that comes meanwhile counts afterwards."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._held:
            self._raise_once()

    def check(self) -> None:
        """Stop if a signal came and its exception got lost: Python drops those that are raised in a ``__del__``."""
        if self.received is not None:
            raise KeyboardInterrupt
