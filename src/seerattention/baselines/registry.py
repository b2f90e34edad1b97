"""Selectors by name: from dicts, and from strings as the command line takes them.

oracle:policy=top_k(0.1):block_size=32, gate:policy=threshold(0.002, last_blocks_dense=1)
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from ..policies import KINDS, Policy, policy_from_dict, read_kind
from ..selectors import SELECTORS, Selector

_POLICY = re.compile(r"(?P<kind>\w+)\s*(?:\((?P<arguments>.*)\))?")
_WORDS = {"true": True, "false": False, "none": None}


def selector_from_dict(data: Mapping[str, Any]) -> Selector:
    """The inverse of ``Selector.to_dict``.

    Raises:
        ValueError: an unknown or missing ``kind``, unknown or missing arguments, or values that the selector refuses.
    """
    selector, arguments = read_kind(data, SELECTORS, "selector")
    if isinstance(arguments.get("policy"), Mapping):
        arguments["policy"] = policy_from_dict(arguments["policy"])
    return selector(**arguments)


def parse_selectors(text: str) -> dict[str, Selector]:
    """Selectors from a string, by the part of the string that describes each.

    Args:
        text: descriptions separated by commas. Each is the selector's kind, followed by its arguments as
            ``:name=value``. A value is a number, true, false, none, or a word; a ``policy`` is the kind of a policy
            with its arguments, ``top_k(0.1)`` or ``top_k(density=0.1, last_blocks_dense=2)``.

    Raises:
        ValueError: a description that is empty, given twice, or not of this form; or as :func:`selector_from_dict`.
        TypeError: a value that the selector refuses.
    """
    found: dict[str, Selector] = {}
    for part in _split(text, ","):
        if not part:
            raise ValueError(f"{text!r} holds an empty description; selectors are {', '.join(sorted(SELECTORS))}")
        if part in found:
            raise ValueError(f"{text!r} holds {part!r} twice")
        kind, *pairs = _split(part, ":")
        arguments: dict[str, Any] = {}
        for pair in pairs:
            name, equals, value = (piece.strip() for piece in pair.partition("="))
            if not equals or not name or not value or name in arguments or name == "kind":
                raise ValueError(f"{part!r}: arguments have the form name=value, each name once, got {pair!r}")
            arguments[name] = _policy(value) if name == "policy" else _value(value)
        try:
            found[part] = selector_from_dict({"kind": kind, **arguments})
        except ValueError as error:
            raise ValueError(f"{part!r}: {error}") from error
    return found


def _split(text: str, separator: str) -> list[str]:
    """Pieces of a text, without the space around them; what is in parentheses stays together."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        number = json.loads(text)
    except ValueError:
        return text
    return number if isinstance(number, int | float) else text


def _policy(text: str) -> Policy:
    match = _POLICY.fullmatch(text)
    if match is None:
        raise ValueError(f"a policy has the form kind(arguments), for example top_k(0.1), got {text!r}")
    data: dict[str, Any] = {"kind": match["kind"]}
    for position, argument in enumerate(_split(match["arguments"], ",") if match["arguments"] else ()):
        name, equals, value = (piece.strip() for piece in argument.partition("="))
        if not equals:
            if position:
                raise ValueError(f"{text!r}: only the first argument of a policy may go without its name")
            name, value = _first_argument(match["kind"]), name
        if name in data:
            raise ValueError(f"{text!r}: {name} is given twice")
        data[name] = _value(value)
    return policy_from_dict(data)


def _first_argument(kind: str) -> str:
    policy = KINDS.get(kind)
    fields = () if policy is None else dataclasses.fields(policy)  # type: ignore[arg-type]
    return fields[0].name if fields else "argument"  # policy_from_dict says what is wrong
