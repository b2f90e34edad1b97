"""Tasks on the whole of a text: counting words, classification by many examples, copying; see :mod:`.text`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from .drafts import Body, Draft, Kit
from .words import ADJECTIVES, NOUNS

__all__ = ["MAKERS"]

COMMON, TIMES_COMMON, TIMES_OTHERS = 10, 30, 3
SHORT = 4096  # below, words come a third as often, as in RULER
FREQUENT, POWER = 3, 2.0
CLASSES, EXAMPLES_A_NOUN = 4, 3
COPIED, SHOWN = 32, 16  # tokens to copy, and those of the passage that are given again
SLACK = 8


def _common_words(kit: Kit, length: int) -> Draft:
    """Ten words come often, many others a few times; numbered, in random order."""
    often, seldom = (TIMES_COMMON, TIMES_OTHERS) if length > SHORT else (TIMES_COMMON // 3, 1)
    pairs = (f"{a}-{n}" for a, n in kit.rng.permutation([(a, n) for a in ADJECTIVES for n in NOUNS]).tolist())
    common = [next(pairs) for _ in range(COMMON)]

    def number(words: list[str], order: list[int]) -> list[list[int]]:
        return [kit.tokens(f"\n{n}. {words[i]}") for n, i in enumerate(order, 1)]

    def body(size: int) -> Body:
        words = [word for word in common for _ in range(often)]
        left = size - sum(map(len, number(words, list(range(len(words))))))
        for word in pairs:
            left -= seldom * len(kit.tokens(f"\n100. {word}"))
            if left < 0:
                break
            words += [word] * seldom
        while True:  # numbers of more or fewer digits may take another number of tokens than was thought
            order = kit.rng.permutation(len(words)).tolist()
            listed = number(words, order)
            left = size - sum(map(len, listed))
            if left >= 0:
                break
            if len(words) == often * COMMON:
                raise ValueError(f"{-left} tokens more are needed than the {max(size, 0)} that are left for the text")
            surplus = 1 + -left // (seldom * len(listed[0]))
            del words[max(often * COMMON, len(words) - surplus * seldom) :]
        tokens, places = kit.book(left), []
        for index, item in zip(order, listed, strict=True):
            if index < often * COMMON:
                places.append((len(tokens), len(tokens) + len(item)))
            tokens += item
        return Body(tokens, places)

    gold = ", ".join(common)
    room = COMMON * (max(kit.count(f"{a}-{n},") for a, n in zip(ADJECTIVES, NOUNS, strict=False)) + 1)
    return Draft(
        "The following is a numbered list of words. Some of them come far more often than others.\n", body,
        f"\nQuestion: Which {COMMON} words come most often in the list?", " Answer: They are", tuple(common), "listed",
        gold, room + SLACK,
    )  # fmt: skip


def _made_up_words(kit: Kit) -> Iterator[str]:
    """Different words of three syllables that no language has."""
    seen = set()
    while True:
        letters = [("bdfgklmnprstvz", "aeiou")[i % 2] for i in range(6)]
        word = "".join(choice[int(kit.rng.integers(len(choice)))] for choice in letters)
        if word not in seen:
            seen.add(word)
            yield word


def _frequent_words(kit: Kit, length: int) -> Draft:
    """Made-up words in random order, the k-th as often as ``k ** -2`` says; the first three are asked for."""
    words = list(itertools.islice(_made_up_words(kit), max(8, int(length**0.5))))

    def body(size: int) -> Body:
        items = [kit.tokens(f" {word}") for word in words]
        shares = [(k + 1.0) ** -POWER for k in range(len(words))]
        scale = size / sum(share * len(item) for share, item in zip(shares, items, strict=True))
        counts = [int(scale * share) for share in shares]
        if counts[FREQUENT - 1] <= counts[FREQUENT]:
            raise ValueError(f"{max(size, 0)} tokens are too few for some words to come more often than others")
        drawn = [k for k, count in enumerate(counts) for _ in range(count)]
        tokens, places = kit.book(size - sum(len(items[k]) for k in drawn)), []
        for k in kit.rng.permutation(drawn).tolist():
            if k < FREQUENT:
                places.append((len(tokens), len(tokens) + len(items[k])))
            tokens += items[k]
        return Body(tokens, places)

    wanted = tuple(words[:FREQUENT])
    return Draft(
        "The following is a text in an unknown language. Watch how often each word comes.\n", body,
        f"\nQuestion: Which {FREQUENT} words come most often in the text?", " Answer: They are", wanted, "listed",
        ", ".join(wanted), FREQUENT * 7 + SLACK,
    )  # fmt: skip


def _many_shot(kit: Kit, length: int) -> Draft:
    """Pairs of an adjective and a noun with a made-up label that depends on the noun alone."""
    labels = list(itertools.islice(_made_up_words(kit), CLASSES))
    nouns = kit.rng.permutation(NOUNS).tolist()
    line, question = "\nItem: {phrase}. Class: {label}.", "\nItem: {phrase}. Class:"
    example = len(kit.tokens(line.format(phrase="golden castle", label=labels[0])))
    # So many nouns that each comes a few times, as far as there are that many.
    used = nouns[: max(CLASSES, min(len(nouns), length // (example * EXAMPLES_A_NOUN)))]
    label_of = {noun: labels[i % CLASSES] for i, noun in enumerate(used)}
    asked = used[int(kit.rng.integers(len(used)))]
    adjectives = kit.rng.permutation(ADJECTIVES).tolist()
    new, known = adjectives[0], adjectives[1:]

    def show(noun: str) -> list[int]:
        adjective = known[int(kit.rng.integers(len(known)))]
        return kit.tokens(line.format(phrase=f"{adjective} {noun}", label=label_of[noun]))

    def others() -> Iterator[list[int]]:
        rest = [noun for noun in used if noun != asked]
        while True:
            for noun in kit.rng.permutation(rest).tolist():
                yield show(noun)

    wanted = [show(asked) for _ in range(EXAMPLES_A_NOUN)]
    label = label_of[asked]
    return Draft(
        "Items belong to classes. The examples show which.\n", lambda size: kit.stacked(size, wanted, others()), "",
        question.format(phrase=f"{new} {asked}"), (label,), "exact", label, 7 + SLACK,
    )  # fmt: skip


def _copy(kit: Kit, length: int) -> Draft:
    """A passage of one book inside another text; its first tokens come again at the end."""
    passage = kit.book(SHOWN + COPIED)

    return Draft(
        "One passage of the following text is repeated behind it.\n",
        lambda size: kit.woven(size, [passage], kit.book), "", "", ("",), "copied", "", COPIED, tuple(passage[:SHOWN]),
        tuple(passage[SHOWN:]),
    )  # fmt: skip


MAKERS: dict[str, Callable[[Kit, int], Draft]] = {
    "common_words": _common_words,
    "frequent_words": _frequent_words,
    "many_shot": _many_shot,
    "copy": _copy,
}
