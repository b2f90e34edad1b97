"""Being one op to ``torch.compile`` and ``torch.export``, and an ordinary function everywhere else."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_PLAIN = inspect.Parameter.POSITIONAL_OR_KEYWORD
# Of the names under which torch knows the ops: that of the package which they are part of.
NAMESPACE = __name__.split(".")[0]


def tracing() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing: only then do ops go through torch's dispatcher."""
    return torch.compiler.is_compiling()


def custom_op(fake: Callable[..., T]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator that makes a function one opaque op to tracers: ``torch.ops.<package>.<name of the function>``.

    ``torch.compile`` traces the public function, its checks included, down to this op and no further. Outside of a
    trace the function is called as it is: going through torch's dispatcher takes about 30 us a call.

    Args:
        fake: takes those of the function's arguments that it needs, by their names; gives empty tensors of the shapes,
            dtypes and strides of the results.

    The function is called with positional arguments: tensors, numbers, strings, None, and values made of them, which
    are NamedTuples or have ``OP_FIELDS`` (names and types of what they are made of), ``arguments`` and
    ``from_arguments``. Tracers see what such values are made of. The function writes into no argument and returns fresh
    tensors. What depends on values, addresses or the environment belongs into it.
    """
    needed = list(inspect.signature(fake).parameters)

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        hints = typing.get_type_hints(function)
        returned = hints.pop("return")

        def rebuilt(flat: Sequence[Any]) -> list[Any]:
            left = list(flat)
            return [_take(hint, left) for hint in hints.values()]

        def flat_function(*flat: Any) -> T:
            return function(*rebuilt(flat))  # type: ignore[call-arg]

        def empty_results(*flat: Any) -> T:
            given = dict(zip(hints, rebuilt(flat), strict=True))
            return fake(**{name: given[name] for name in needed})

        fields = [field for name, hint in hints.items() for field in _fields(name, hint)]
        parameters = [inspect.Parameter(name, _PLAIN, annotation=hint) for name, hint in fields]
        signature = inspect.Signature(parameters, return_annotation=returned)
        flat_function.__signature__ = signature  # type: ignore[attr-defined]
        name = function.__name__.lstrip("_")
        op = torch.library.custom_op(f"{NAMESPACE}::{name}", flat_function, mutates_args=())
        op.register_fake(empty_results)

        taken_apart = [_parts(hint) for hint in hints.values()]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if tracing():
                return op(*[part for parts, value in zip(taken_apart, args, strict=True) for part in parts(value)])
            return function(*args, **kwargs)

        return call

    return decorate


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _fields(name: str, hint: Any) -> list[tuple[str, Any]]:
    """Names and types of what an argument is made of."""
    if hasattr(hint, "OP_FIELDS"):
        return [(f"{name}_{field}", kind) for field, kind in hint.OP_FIELDS.items()]
    if _is_named_tuple(hint):
        parts = typing.get_type_hints(hint).items()
        return [field for part, kind in parts for field in _fields(f"{name}_{part}", kind)]
    return [(name, hint)]


def _parts(hint: Any) -> Callable[[Any], Sequence[Any]]:
    """What takes an argument apart. It is traced, so it must not ask what the argument is."""
    if hasattr(hint, "OP_FIELDS"):
        return lambda value: value.arguments()
    if _is_named_tuple(hint):
        fields = [_parts(kind) for kind in typing.get_type_hints(hint).values()]
        return lambda value: [part for parts, item in zip(fields, value, strict=True) for part in parts(item)]
    return lambda value: (value,)


def _take(hint: Any, flat: list[Any]) -> Any:
    """An argument from the first of these values, which are taken off the list."""
    if hasattr(hint, "OP_FIELDS"):
        number = len(hint.OP_FIELDS)
        taken, flat[:] = flat[:number], flat[number:]
        return hint.from_arguments(*taken)
    if _is_named_tuple(hint):
        return hint(*[_take(kind, flat) for kind in typing.get_type_hints(hint).values()])
    return flat.pop(0)
