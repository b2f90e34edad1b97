"""Functions that Dynamo must not look into, which cost nothing where nothing is compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch._dynamo.decorators import skip

P = ParamSpec("P")
T = TypeVar("T")


def _always() -> bool:
    return True


# What Dynamo does with the frames of this thread; None: nothing. Not public: without it every call is a guarded one.
_callback: Callable[[], Any] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None), "get_eval_frame_callback", _always
)


def in_compiled_code() -> bool:
    """Whether Dynamo looks at the frames of this thread."""
    return _callback() is not None


def untraced(reason: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: as ``torch.compiler.disable(reason=...)``, whose wrapper takes 5 us of every call, eager ones too.

    Here a function is called as it is where no frame of the thread is compiled, and through that wrapper elsewhere: in
    a trace, and below a frame that Dynamo has passed over, where it would look into the next one.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        guarded = torch.compiler.disable(function, reason=reason)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return function(*args, **kwargs) if _callback() is None else guarded(*args, **kwargs)

        # Dynamo passes over the frame of the choice itself, not over what it calls: hence the guard.
        call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return skip(call)

    return decorate
