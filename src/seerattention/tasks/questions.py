"""Questions with the paragraphs that answer them, from SQuAD and HotpotQA in the layout of their publishers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..files import DamagedFileError, parse_json, read_bytes

__all__ = ["Article", "Asked", "QuestionSets", "load_questions"]

_SUBSETS = Path(__file__).parent / "data"
_LAYOUTS = (
    "SQuAD ({'data': [{'title', 'paragraphs': [{'context', 'qas'}]}]}) or HotpotQA ([{'question', 'answer', "
    "'context': [[title, sentences]]}])"
)


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        question: as it is asked.
        answers: any of them is right.
        article, paragraph: which paragraph of which article answers it (SQuAD); -1: its own ones do.
        own: paragraphs that come with the question (HotpotQA).
    """

    question: str
    answers: tuple[str, ...]
    article: int = -1
    paragraph: int = -1
    own: tuple[str, ...] = ()


@dataclass(frozen=True)
class Article:
    """A title and its paragraphs in order."""

    title: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSets:
    """What the question tasks draw from.

    Attributes:
        articles, squad: of SQuAD: articles, and questions on one paragraph each.
        hotpot: of HotpotQA: questions that need two of the paragraphs that come with them.
    """

    articles: Sequence[Article] = field(default_factory=tuple)
    squad: Sequence[Asked] = field(default_factory=tuple)
    hotpot: Sequence[Asked] = field(default_factory=tuple)


@cache
def load_questions(folder: str | None = None) -> QuestionSets:
    """The subsets that come with the package, or all sets in a folder of JSON files, plain or ``.zst``.

    Raises:
        FileNotFoundError: no such folder, or no JSON file in it.
        DamagedFileError: a file that is no JSON.
        ValueError: JSON of another layout, or sets without an answerable question.
    """
    place = _SUBSETS if folder is None else Path(folder).expanduser()
    files = [path for path in sorted(place.glob("*.json*")) if path.name.endswith((".json", ".json.zst"))]
    if not files:
        raise FileNotFoundError(f"no question sets (.json or .json.zst) in {place}")
    articles: list[Article] = []
    squad: list[Asked] = []
    hotpot: list[Asked] = []
    for path in files:
        content = _read(path)
        if isinstance(content, Mapping) and isinstance(content.get("data"), list):
            _add_squad(content["data"], articles, squad, path)
        elif isinstance(content, list) and content and isinstance(content[0], Mapping) and "context" in content[0]:
            hotpot += [_hotpot(item, path) for item in content if item.get("answer") not in ("yes", "no")]
        else:
            raise ValueError(f"{path} has another layout than {_LAYOUTS}")
    if not squad and not hotpot:
        raise ValueError(f"the question sets in {place} hold no answerable question")
    return QuestionSets(tuple(articles), tuple(squad), tuple(hotpot))


def _read(path: Path) -> Any:
    data = read_bytes(path)
    if path.suffix == ".zst":
        import zstandard  # decoders load when a packed set is read, as the ones that come with the package are

        try:
            data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
        except zstandard.ZstdError as error:
            raise DamagedFileError(f"{path} is damaged: {error}") from error
    if isinstance(data, bytes) and data.lstrip()[:1] == b"[":
        try:
            return json.loads(data)
        except ValueError as error:
            raise DamagedFileError(f"{path} holds no JSON: {error}") from error
    return parse_json(data, str(path))


def _add_squad(data: Sequence[Any], articles: list[Article], asked: list[Asked], path: Path) -> None:
    try:
        for entry in data:
            index = len(articles)
            articles.append(Article(entry["title"], tuple(each["context"] for each in entry["paragraphs"])))
            for number, paragraph in enumerate(entry["paragraphs"]):
                for item in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in item["answers"]))
                    if answers and not item.get("is_impossible", False):
                        asked.append(Asked(item["question"], answers, index, number))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has another layout than {_LAYOUTS}: {error!r}") from error


def _hotpot(item: Any, path: Path) -> Asked:
    try:
        own = tuple(f"{title}: {''.join(sentences).strip()}" for title, sentences in item["context"])
        return Asked(item["question"], (item["answer"],), own=own)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has another layout than {_LAYOUTS}: {error!r}") from error
