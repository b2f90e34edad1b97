"""Long-context tasks as a user would put them: a text of an exact length in tokens, a question, and room for an answer.

| task | in the text | asked, and how it is scored |
|---|---|---|
| niah_single_1, 2, 3 | a number in one repeated sentence, a number in a book, a long code in a book | it; exact |
| niah_multikey_1 | four needles with different names in a book | one of them; exact |
| niah_multikey_2, 3 | needles all over: numbers of names, codes of codes | one of them; exact |
| niah_multivalue, niah_multiquery | four numbers of one name; four names with a number each | all; share |
| variable_tracking | a chain of five variables that take each other's value | their names; share |
| common_words, frequent_words | a list of words; made-up words by a power law | the ten, or three, commonest; share |
| qa_squad, qa_hotpot | one paragraph, or two, with the answer among others | a question; normalised match |
| long_qa | one article after the other, in order | a question on a paragraph of any; normalised match |
| many_shot | labelled examples | the label of a new one; exact |
| copy | a passage somewhere in a book | the passage, from its beginning; share before the first mistake |

The first thirteen are in the style of RULER (arXiv 2404.06654, section 3), in words of this package: names, numbers and
sentences are those of :mod:`.pieces`, which the embedded testbed knows. A sample is a function of the tokenizer, the
books, the seed and the order of calls. Prompts are put together from pieces that are tokenised by themselves, so that
prompt and room for the answer are exactly as long as asked, with any tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import text_lists, text_needles, text_questions
from .drafts import Draft, Kit
from .generator import TaskGenerator
from .questions import load_questions

__all__ = ["RULER_TASKS", "TEXT_TASKS", "TextSample", "TextTasks"]

RULER_TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "variable_tracking", "common_words", "frequent_words", "qa_squad",
    "qa_hotpot",
)  # fmt: skip
TEXT_TASKS = (*RULER_TASKS, "long_qa", "many_shot", "copy")

_MAKERS = {**text_needles.MAKERS, **text_lists.MAKERS, **text_questions.MAKERS}
_CONTENT = "\x02content\x03"  # what a chat template is asked to wrap, to see what it puts around


@dataclass(frozen=True)
class TextSample:
    """One prompt and what its answer should be.

    Attributes:
        task: one of :data:`TEXT_TASKS`.
        prompt: int64 ``[T]``; what is to be read.
        room: tokens that the answer may have; T + room is the length that was asked for.
        answers: right answers, see ``score``.
        score: how an answer is scored, one of :data:`~seerattention.tasks.scoring.SCORES`.
        gold: int64 ``[n]``, the tokens of a right answer as they would follow the prompt; the first one is no mere
            space. Of "copied" what counts.
        places: ``prompt[start:stop]`` of each (start, stop) holds what the answer is to be found in.
    """

    task: str
    prompt: np.ndarray
    room: int
    answers: tuple[str, ...]
    score: str
    gold: np.ndarray
    places: tuple[tuple[int, int], ...]


class TextTasks:
    """Makes samples of the text tasks.

    Args:
        tokenizer: a Hugging Face tokenizer. If it has a ``bos_token_id``, prompts without a chat template begin with
            that token.
        books: token ids of texts, 1-D integer arrays: where needles are hidden.
        seed: samples are a function of the arguments, the seed and the order of calls.
        questions: a folder with question sets, see :func:`~seerattention.tasks.questions.load_questions`; None: the
            subsets that come with the package.
        chat: put opening, text and question into the tokenizer's chat template as the user's words; the answer of the
            model begins with the lead.

    Raises:
        ValueError: no book, or ``chat`` for a tokenizer without a chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        books: Sequence[np.ndarray],
        *,
        seed: int = 0,
        questions: str | None = None,
        chat: bool = False,
    ) -> None:
        self.kit = Kit(TaskGenerator(tokenizer, books, split="test", seed=seed), load_questions(questions))
        self._before, self._after = self._template(tokenizer) if chat else ([], [])
        bos = getattr(tokenizer, "bos_token_id", None)
        if not chat and bos is not None:
            self._before = [bos]

    def sample(self, task: str, length: int) -> TextSample:
        """A sample whose prompt and room for the answer are ``length`` tokens together.

        Raises:
            ValueError: an unknown task, a length that is too short for it, or a task without question sets.
        """
        if task not in _MAKERS:
            raise ValueError(f"task must be one of {', '.join(TEXT_TASKS)}, got {task!r}")
        kit = self.kit
        draft = _MAKERS[task](kit, length)
        lead, gold = self._lead_and_gold(draft)
        head = self._before + kit.tokens(draft.opening)
        tail = kit.tokens(draft.question) + self._after + lead
        try:
            body = draft.body(length - draft.room - len(head) - len(tail))
        except ValueError as error:
            raise ValueError(f"{task} does not fit into {length} tokens: {error}") from error
        prompt = np.asarray(head + body.tokens + tail, dtype=np.int64)
        assert len(prompt) == length - draft.room
        return TextSample(
            task, prompt, draft.room, draft.answers, draft.score, np.asarray(gold, dtype=np.int64),
            tuple((start + len(head), stop + len(head)) for start, stop in body.places),
        )  # fmt: skip

    def _lead_and_gold(self, draft: Draft) -> tuple[list[int], list[int]]:
        """The last tokens of the prompt and those of the answer.

        A space between them that is a token of its own is the prompt's: the token that has to be looked up first is
        then the next one, and the prompt's last row has to find it. Left to the answer, everything that is looked up
        would be looked up while decoding, and nothing would test the rows of the prompt.
        """
        lead, gold = self._as_written(draft)
        silent = 0
        while silent < len(gold) - 1 and not self.kit.pieces.tokenizer.decode(gold[silent : silent + 1]).strip():
            silent += 1
        return lead + gold[:silent], gold[silent:]

    def _as_written(self, draft: Draft) -> tuple[list[int], list[int]]:
        """The tokens of the lead, and those of the answer behind them."""
        if draft.gold_tokens:
            return list(draft.lead_tokens), list(draft.gold_tokens)
        words = draft.lead.lstrip() if self._after else draft.lead  # behind a template nothing comes before it
        lead = self.kit.tokens(words)
        both = self.kit.tokens(f"{words} {draft.gold}")
        if both[: len(lead)] == lead:
            return lead, both[len(lead) :]
        return lead, self.kit.tokens(f" {draft.gold}")

    def _template(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """What the chat template has before and after the words of the user."""
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; leave the template out for a base model")
        said = [{"role": "user", "content": _CONTENT}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(_CONTENT)
        if not found:
            raise ValueError("the tokenizer's chat template changes what the user says, which these tasks cannot use")
        return tuple(list(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after))  # type: ignore[return-value]
