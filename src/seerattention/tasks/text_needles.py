"""Needle tasks and variable tracking as text; see :mod:`.text`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from .drafts import Body, Draft, Kit
from .pieces import MULTIVALUE_QUESTION

__all__ = ["MAKERS"]

NOISE = "The lamp is lit and the door is shut. The kettle sings while the cat sleeps. Nobody is here yet.\n"
OPENING = "Some numbers are hidden in the following text. Remember them, you will be asked about them.\n"
CODE = ("\nThe code of {key} is {value}.\n", "\nWhat is the code of {key}? The code of {key} is")
SLACK = 8  # tokens of room beside those of the answer
VALUES = 4
HOPS = 4


def _number(kit: Kit) -> str:
    return f"{int(kit.rng.integers(0, 1_000_000)):06d}"


def _number_room(kit: Kit) -> int:
    """Tokens that any number takes, about: some tokenizers have pieces of digits of any length."""
    return max(kit.count(number) for number in ("907153", "048226", "000000", "771739"))


def _code(kit: Kit) -> str:
    """128 random bits as the groups of hexadecimal digits of a UUID."""
    digits = kit.rng.bytes(16).hex()
    return "-".join(digits[a:b] for a, b in itertools.pairwise((0, 8, 12, 16, 20, 32)))


def _numbers(kit: Kit, count: int) -> list[str]:
    """Different numbers."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_number(kit)] = None
    return list(found)


def _keys(kit: Kit, count: int) -> list[str]:
    """Names, each beginning with a space as sentences want it."""
    return [f" {adjective} {noun}" for adjective, noun in kit.pieces.key_words(count)]


def _sentences(kit: Kit) -> tuple[str, str]:
    """A statement, and a question without its answer; both have ``{key}``, the statement ``{value}``."""
    statement, question = kit.pieces.templates[int(kit.rng.integers(len(kit.pieces.templates)))]
    return statement, question.partition("{value}")[0].rstrip()


def _split(question: str) -> tuple[str, str]:
    """What a question says, and how its answer begins: the part behind its last question mark or comma."""
    cut = max(question.rfind("?"), question.rfind(",")) + 1
    return question[:cut], question[cut:]


def _book(kit: Kit) -> Callable[[int], list[int]]:
    return kit.book


def _noise(kit: Kit) -> Callable[[int], list[int]]:
    return lambda size: kit.repeated(NOISE, size)


def _needles(kit: Kit, filler: Callable[[int], list[int]], count: int) -> Draft:
    """``count`` needles with numbers, one of which is asked for."""
    statement, question = _sentences(kit)
    keys, values = _keys(kit, count), _numbers(kit, count)
    asked = int(kit.rng.integers(count))
    events = [kit.tokens(statement.format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
    return _asking(kit, question.format(key=keys[asked]), values[asked], _one_of(kit, events, filler, asked))


def _one_of(kit: Kit, events: list[list[int]], filler: Callable[[int], list[int]], asked: int) -> Callable[[int], Body]:
    def body(size: int) -> Body:
        made = kit.woven(size, events, filler)
        return Body(made.tokens, [made.places[asked]])

    return body


def _asking(kit: Kit, question: str, value: str, body: Callable[[int], Body]) -> Draft:
    asked, lead = _split(question)
    return Draft(OPENING, body, asked, lead, (value,), "exact", value, _number_room(kit) + SLACK)


def _single_code(kit: Kit, length: int) -> Draft:
    (key,), value = _keys(kit, 1), _code(kit)
    event = kit.tokens(CODE[0].format(key=f"the{key}", value=value))
    body = _one_of(kit, [event], kit.book, 0)
    draft = _asking(kit, CODE[1].format(key=f"the{key}"), value, body)
    return _with_room(kit, draft)


def _with_room(kit: Kit, draft: Draft) -> Draft:
    """Codes take a number of tokens of their own; the room must not differ from sample to sample."""
    room = max(kit.count("-".join(["0a1b2c3d", "4e5f", "6a7b", "8c9d", "0e1f2a3b4c5d"])) + 2 * SLACK, 40)
    return Draft(**{**vars(draft), "room": room})


def _haystack_of_numbers(kit: Kit, length: int) -> Draft:
    statement, question = _sentences(kit)
    key, *others = _keys(kit, min(1 + length // 8, len(kit.pieces._keys)))
    value = _number(kit)
    wanted = [kit.tokens(statement.format(key=key, value=value))]

    def more() -> Iterator[list[int]]:
        for other in others:
            yield kit.tokens(statement.format(key=other, value=_number(kit)))

    return _asking(kit, question.format(key=key), value, lambda size: kit.stacked(size, wanted, more()))


def _haystack_of_codes(kit: Kit, length: int) -> Draft:
    key, value = _code(kit), _code(kit)
    wanted = [kit.tokens(CODE[0].format(key=key, value=value))]

    def more() -> Iterator[list[int]]:
        while True:
            yield kit.tokens(CODE[0].format(key=_code(kit), value=_code(kit)))

    draft = _asking(kit, CODE[1].format(key=key), value, lambda size: kit.stacked(size, wanted, more()))
    return _with_room(kit, draft)


def _listing(kit: Kit, opening: str, body: Callable[[int], Body], question: str, lead: str, wanted: list[str]) -> Draft:
    room = len(wanted) * (_number_room(kit) + 2) + SLACK
    return Draft(opening, body, question, lead, tuple(wanted), "listed", ", ".join(wanted), room)


def _multivalue(kit: Kit, length: int) -> Draft:
    statement, _ = _sentences(kit)
    (key,), values = _keys(kit, 1), _numbers(kit, VALUES)
    events = [kit.tokens(statement.format(key=key, value=value)) for value in values]
    lead = MULTIVALUE_QUESTION[0].format(key=key)
    return _listing(kit, OPENING, lambda size: kit.woven(size, events, kit.book), "", lead, values)


def _multiquery(kit: Kit, length: int) -> Draft:
    statement, _ = _sentences(kit)
    keys, values = _keys(kit, VALUES), _numbers(kit, VALUES)
    events = [kit.tokens(statement.format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
    names = ", ".join(f"the{key}" for key in keys[:-1]) + f" and the{keys[-1]}"
    question = f"\nQuestion: What are the numbers of {names}?"
    lead = " Answer: The numbers, in this order, are"
    return _listing(kit, OPENING, lambda size: kit.woven(size, events, kit.book), question, lead, values)


def _variable_tracking(kit: Kit, length: int) -> Draft:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(chr(65 + int(i)) for i in kit.rng.integers(0, 26, 5))] = None
    value, chain = f"{int(kit.rng.integers(10_000, 100_000))}", list(names)
    lines = [f"\nlet {chain[0]} = {value}\n", *(f"\nlet {b} = {a}\n" for a, b in itertools.pairwise(chain))]
    events = [kit.tokens(line) for line in lines]
    opening = "Variables are set in the following text. Remember which of them have the same value.\n"
    question = f"\nQuestion: Which variables have the value {value}, directly or through others? There are {HOPS + 1}."
    draft = _listing(
        kit, opening, lambda size: kit.woven(size, events, _noise(kit)), question, " Answer: They are", chain
    )
    return Draft(**{**vars(draft), "room": (HOPS + 1) * max(kit.count("QXZWK,") + 1, 5) + SLACK})


MAKERS: dict[str, Callable[[Kit, int], Draft]] = {
    "niah_single_1": lambda kit, length: _needles(kit, _noise(kit), 1),
    "niah_single_2": lambda kit, length: _needles(kit, _book(kit), 1),
    "niah_single_3": _single_code,
    "niah_multikey_1": lambda kit, length: _needles(kit, _book(kit), 4),
    "niah_multikey_2": _haystack_of_numbers,
    "niah_multikey_3": _haystack_of_codes,
    "niah_multivalue": _multivalue,
    "niah_multiquery": _multiquery,
    "variable_tracking": _variable_tracking,
}
