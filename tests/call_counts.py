"""How many functions a function calls: what the host does, whatever else the machine does meanwhile."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable


def count_calls(function: Callable[[], object]) -> int:
    """Calls of functions of Python and C, without those of the garbage collector: what earlier tests have left behind
    may have hundreds to make when it goes."""
    number = 0

    def note(frame, event, argument):
        nonlocal number
        number += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return number
