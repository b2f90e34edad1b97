"""Questions on paragraphs among others, and on a long document; see :mod:`.text`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .drafts import Body, Draft, Kit
from .questions import Asked

__all__ = ["MAKERS"]

ROOM = 32  # tokens for an answer, as in RULER
PARAGRAPH = "\nParagraph: {text}\n"
OPENING = "Read the following paragraphs; a question on them comes last.\n"
QUESTION = "\nAnswer in a few words, as the text has them.\nQuestion: {question}"


def _answering(asked: Asked, opening: str, body: Callable[[int], Body]) -> Draft:
    gold = min(asked.answers, key=len)
    question = QUESTION.format(question=asked.question.strip())
    return Draft(opening, body, question, "\nAnswer:", asked.answers, "normalised", gold, ROOM)


def _draw(kit: Kit, asked: tuple[Asked, ...] | list[Asked], what: str) -> Asked:
    if not asked:
        raise ValueError(f"there are no questions of {what} in the question sets that were named")
    return asked[int(kit.rng.integers(len(asked)))]


def _shown(kit: Kit, text: str) -> list[int]:
    return kit.tokens(PARAGRAPH.format(text=text))


def _squad(kit: Kit, length: int) -> Draft:
    """The paragraph with the answer among paragraphs of other articles."""
    asked = _draw(kit, list(kit.questions.squad), "SQuAD")
    articles = kit.questions.articles
    wanted = [_shown(kit, articles[asked.article].paragraphs[asked.paragraph])]
    others = [text for i, article in enumerate(articles) if i != asked.article for text in article.paragraphs]
    return _answering(asked, OPENING, lambda size: kit.stacked(size, wanted, _others(kit, others, asked)))


def _hotpot(kit: Kit, length: int) -> Draft:
    """The ten paragraphs of a question among those of other questions."""
    asked = _draw(kit, list(kit.questions.hotpot), "HotpotQA")
    wanted = [_shown(kit, text) for text in asked.own]
    others = list(dict.fromkeys(text for other in kit.questions.hotpot if other is not asked for text in other.own))
    return _answering(asked, OPENING, lambda size: kit.stacked(size, wanted, _others(kit, others, asked)))


def _others(kit: Kit, texts: list[str], asked: Asked) -> Iterator[list[int]]:
    """Paragraphs in random order, but for those that the question comes with."""
    for index in kit.rng.permutation(len(texts)).tolist():
        if texts[index] not in asked.own:
            yield _shown(kit, texts[index])


def _long_qa(kit: Kit, length: int) -> Draft:
    """Whole articles one after the other; the one that is asked about stands anywhere among them."""
    asked = _draw(kit, list(kit.questions.squad), "SQuAD")
    articles = kit.questions.articles

    def told(index: int, first: int = 0) -> list[list[int]]:
        article = articles[index]
        heading = kit.tokens(f"\n\n{article.title.replace('_', ' ')}\n")
        return [heading, *(kit.tokens(f"\n{text}\n") for text in article.paragraphs[first:])]

    def body(size: int) -> Body:
        mine = told(asked.article)
        place = asked.paragraph + 1  # after the heading
        if sum(map(len, mine)) > size:  # as much of the article as there is room for, around the paragraph
            mine, place = _around(mine, place, size)
        left = size - sum(map(len, mine))
        before: list[list[int]] = []
        after: list[list[int]] = []
        rest: list[int] = []
        for index in kit.rng.permutation(len(articles)).tolist():
            if index == asked.article:
                continue
            parts = told(index)
            if sum(map(len, parts)) > left:
                whole = [token for part in parts for token in part]
                rest = whole[len(whole) - left :]  # the end of an article, at the very beginning
                break
            left -= sum(map(len, parts))
            if kit.rng.random() < 0.5:
                before += parts
            else:
                after += parts
        tokens = kit.book(left - len(rest)) + rest
        start = 0
        for number, part in enumerate(before + mine + after):
            if number == len(before) + place:
                start = len(tokens)
            tokens += part
        return Body(tokens, [(start, start + len(mine[place]))])

    opening = "Read the following articles; a question on one of them comes last.\n"
    return _answering(asked, opening, body)


def _around(parts: list[list[int]], place: int, size: int) -> tuple[list[list[int]], int]:
    """The longest run of parts around one that fits, and the place of that one in it.

    Raises:
        ValueError: it alone is longer.
    """
    left = size - len(parts[place])
    if left < 0:
        raise ValueError(f"{-left} tokens more are needed than the {max(size, 0)} that are left for the text")
    first = last = place
    while True:
        if first and len(parts[first - 1]) <= left:
            first -= 1
            left -= len(parts[first])
        elif last + 1 < len(parts) and len(parts[last + 1]) <= left:
            last += 1
            left -= len(parts[last])
        else:
            return parts[first : last + 1], place - first


MAKERS: dict[str, Callable[[Kit, int], Draft]] = {
    "qa_squad": _squad,
    "qa_hotpot": _hotpot,
    "long_qa": _long_qa,
}
