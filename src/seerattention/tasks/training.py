"""Training sequences from the same tasks: many questions each, random sizes, and drills that teach look-up itself.

*Drills* contain no book text at all: copies, look-ups, statements with questions. A model that begins with short drills
forms its look-up circuits within minutes; one that begins with long texts may never do.

Matching is learned token by token: a model that looks numbers up perfectly can be at chance with words, because nothing
has taught it that two occurrences of a word are the same. So there are drills between what forms at once and what does
not: copies of random words beside copies of numbers, dictionaries keyed by words, sentences keyed by numbers or single
words, needles whose keys differ in one of their two words only, and needles whose number of candidates grows within
each sequence (a guess among few is soon no worse than a look-up, and so teaches nothing).

Which drills come when decides in which layer look-up forms. The mixes here are for a model that can look things up
already; what it learns from first is in the recipe (``testbed/schedule.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from .generator import TASKS, Sample, TaskGenerator
from .pieces import COPY_WEIGHT, NOISE_WEIGHT, VARIABLE_TEMPLATES, Event
from .words import NOUNS

#: How often each form of training sequence is drawn, among sequences that are not plain book text.
TASK_MIX = {"multikey": 3.0, "keyvalue": 2.0, "multivalue": 3.0, "variable": 1.5, "few": 1.0, "copy": 1.0}
DRILL_MIX = {
    "copy": 0.5,
    "wordcopy": 0.5,
    "keyvalue": 1.0,
    "wordvalue": 0.5,
    "steps": 0.5,
    "alike": 3.0,
    "needles": 4.0,
    "multivalue": 3.0,
    "variable": 1.0,
}
#: Drills that fit into any length; the others join from ``LONG_DRILL`` tokens on.
SHORT_DRILLS = ("copy", "wordcopy", "keyvalue", "wordvalue", "steps", "alike", "needles")
LONG_DRILL = 256
#: How often each kind of key names needles: listed pairs of words, listed pairs that share words, listed pairs that all
#: share one word, pairs of arbitrary words.
PAIR_KEYS = {"listed": 0.45, "close": 0.25, "alike": 0.15, "loose": 0.15}
#: More keys than this rarely share a word.
MOST_ALIKE = 60
#: Keys of drills that lead up to pairs of words.
STEP_KEYS = {"single": 0.5, "number": 0.5}
WORD_KEYS = {"listed": 0.4, "close": 0.2, "loose": 0.1, "single": 0.3}
#: Share of drill questions that are put in the words of another template than the statement.
OTHER_TEMPLATE = 0.25

#: Mixes by their names, as they are where nothing else is asked for, and the kinds that each may hold.
MIXES = {"task_mix": TASK_MIX, "drill_mix": DRILL_MIX, "key_mix": PAIR_KEYS}
KINDS = {"task_mix": set(TASK_MIX), "drill_mix": set(DRILL_MIX), "key_mix": {*PAIR_KEYS, *STEP_KEYS, *WORD_KEYS}}


def checked_mix(name: str, mix: Mapping[str, float] | None) -> dict[str, float]:
    """``mix`` (None: the package's one called ``name``, see ``MIXES``), once it is known that it can be drawn from.

    Raises:
        ValueError: a kind that does not exist, or shares that are not all 0 or more with one above 0.
    """
    mix = dict(MIXES[name] if mix is None else mix)
    if unknown := sorted(mix.keys() - KINDS[name]):
        raise ValueError(f"{name} may hold {', '.join(sorted(KINDS[name]))}, got {', '.join(unknown)}")
    if min(mix.values(), default=0.0) < 0 or not sum(mix.values()) > 0:
        raise ValueError(f"{name} needs shares of 0 or more, at least one of them above 0, got {mix}")
    return mix


def like_evaluation(generator: TaskGenerator, length: int) -> Sample:
    """A sample of any task, as in evaluation: one question to eight near its end, as many as have room."""
    rng = generator.rng
    task = TASKS[int(rng.integers(len(TASKS)))]
    most = 1 if task == "single" else max(1, min(8, length // 512))  # a question with its answers needs that much room
    return generator.sample(task, length, int(rng.integers(1, most + 1)))


class TrainingMix:
    """Draws weighted training sequences.

    Args:
        generator: a :class:`TaskGenerator` of the train split.
        task_mix, drill_mix, key_mix: relative frequencies of tasks in book text, of drills, and of the kinds of keys
            that name their needles; None: ``TASK_MIX``, ``DRILL_MIX``, ``PAIR_KEYS``. Drills with a say of their own
            in their keys (``alike``, ``wordvalue``, ``steps``) keep it.

    Raises:
        ValueError: a mix cannot be drawn from, see :func:`checked_mix`.
    """

    def __init__(
        self,
        generator: TaskGenerator,
        task_mix: Mapping[str, float] | None = None,
        drill_mix: Mapping[str, float] | None = None,
        key_mix: Mapping[str, float] | None = None,
    ) -> None:
        self.generator = generator
        self.pieces = generator.pieces
        self.rng = generator.rng
        self.task_mix = checked_mix("task_mix", task_mix)
        self.drill_mix = checked_mix("drill_mix", drill_mix)
        self.key_mix = checked_mix("key_mix", key_mix)

    def sequence(self, length: int, *, tasks: float = 0.6, drills: float = 0.0) -> Sample:
        """A drill with probability ``drills``, else a task in book text with probability ``tasks``, else book text."""
        if self.rng.random() < drills:
            return self._drill(length)
        if self.rng.random() >= tasks:
            return self._woven("text", length, [])
        kind = self._draw(self.task_mix)
        return self._woven(kind, length, getattr(self, f"_{kind}")(length))

    def distilling(self, length: int) -> Sample:
        """A sequence that gates are trained on: as often one of this mix as one that evaluation could ask.

        A gate must find the few rows that ask among many that do not, so a mix that is all questions is not enough.
        """
        if self.rng.random() < 0.5:
            return self.sequence(length, tasks=0.7)
        return like_evaluation(self.generator, length)

    def _draw(self, mix: dict[str, float]) -> str:
        names = list(mix)
        shares = np.array([mix[name] for name in names])
        return names[int(self.rng.choice(len(names), p=shares / shares.sum()))]

    def _count(self, low: int, high: int) -> int:
        """Between low and high: all magnitudes as likely, or all numbers, so that few and many both occur."""
        high = max(low, high)
        if self.rng.random() < 0.5:
            return int(self.rng.integers(low, high + 1))
        return int(math.exp(self.rng.uniform(math.log(low), math.log(high + 1))))

    def _keys(self, count: int, kinds: dict[str, float] | None = None) -> list[list[int]]:
        kind = self._draw(self.key_mix if kinds is None else kinds)
        if kind in ("listed", "close"):
            return self.pieces.keys(count, close=kind == "close")
        if (kind == "single" and count > len(NOUNS)) or (kind == "alike" and count > MOST_ALIKE):
            return self.pieces.keys(count)
        if kind == "alike":
            return self.pieces.alike_keys(count)
        return {"loose": self.pieces.loose_keys, "single": self.pieces.single_keys, "number": self.pieces.number_keys}[
            kind
        ](count)

    def _ask(self, question: Event, after: float, group: int) -> Event:
        """Place a question: most often at the end, else anywhere after its statement."""
        question.position = 1.0 if self.rng.random() < 0.6 else float(self.rng.uniform(after, 1.0))
        question.group = group
        return question

    # ---------------------------------------------------------------- tasks in book text
    def _multikey(self, length: int, most: int | None = None) -> list[Event]:
        most = length // 36 if most is None else most
        count = int(self.rng.integers(2, 29)) if length <= 1024 else self._count(2, min(600, most))
        count = min(count, max(1, most))
        template = int(self.rng.integers(len(self.pieces.templates)))
        events = []
        for group, key in enumerate(self._keys(count)):
            value = self.pieces.value()
            statement = self.pieces.statement(template, key, value)
            statement.position, statement.group = float(self.rng.uniform(0, 0.95)), group
            events += [statement, self._ask(self.pieces.question(template, key, value), statement.position, group)]
        return events

    def _few(self, length: int) -> list[Event]:
        """A handful of needles, each asked once or twice, among much text."""
        return self._multikey(length, most=min(8, max(1, length // 64)))

    def _multivalue(self, length: int) -> list[Event]:
        template = int(self.rng.integers(len(self.pieces.templates)))
        events = []
        for group, key in enumerate(self._keys(self._count(1, max(1, min(100, length // 130))))):
            positions = np.sort(self.rng.uniform(0, 0.95, int(self.rng.integers(2, 5))))
            values = [self.pieces.value() for _ in positions]
            for position, value in zip(positions, values, strict=True):
                statement = self.pieces.statement(template, key, value)
                statement.position, statement.group = float(position), group
                events.append(statement)
            events.append(self._ask(self.pieces.multivalue_question(key, values), float(positions[-1]), group))
        return events

    def _variable(self, length: int) -> list[Event]:
        chains = self._count(1, max(1, min(200, length // 80)))
        keys = self._keys(2 * chains)
        template, needle = (
            int(self.rng.integers(len(VARIABLE_TEMPLATES))),
            int(self.rng.integers(len(self.pieces.templates))),
        )
        events = []
        for group in range(chains):
            source, alias, value = keys[2 * group], keys[2 * group + 1], self.pieces.value()
            first, second = np.sort(self.rng.uniform(0, 0.95, 2))
            statement, share = self.pieces.statement(needle, source, value), self.pieces.alias(template, alias, source)
            statement.position, share.position = float(first), float(second)
            statement.group = share.group = group
            events += [statement, share]
            events.append(self._ask(self.pieces.alias_question(template, alias, source, value), share.position, group))
        return events

    def _keyvalue(self, length: int) -> list[Event]:
        # 20 tokens for each entry leave room for questions; where characters are tokens, an entry alone takes more.
        entry = len(self.pieces.entry(self.pieces.number(0), self.pieces.number(0)).tokens)
        most = min(1500, length // max(20, math.ceil(entry / 0.9)))
        count = int(self.rng.integers(6, max(7, most))) if length <= 1024 else self._count(4, most)
        pairs = [(key, self.pieces.value()) for key in self.pieces.dictionary_keys(count)]
        dictionary = self.pieces.dictionary(pairs)
        dictionary.position = float(self.rng.uniform(0, 0.9))
        asked = self.rng.choice(count, min(count, max(1, length // 34)), replace=False)
        questions = [
            self._ask(self.pieces.dictionary_question(*pairs[i]), dictionary.position, group)
            for group, i in enumerate(asked)
        ]
        return [dictionary, *questions]

    def _copy(self, length: int) -> list[Event]:
        """Passages of book text or random numbers that come again."""
        events = []
        for group in range(int(self.rng.integers(1, 4))):
            count = int(self.rng.integers(8, min(400, max(16, length // 8))))
            chance = self.rng.random()
            if chance < 0.5:
                body, weight = [int(t) for t in self.generator.book_text(count)], 1.0
            else:
                body, weight = (
                    self.pieces.numbers(count) if chance < 0.75 else self.pieces.random_words(count),
                    NOISE_WEIGHT,
                )
            first = Event(list(body), [weight] * len(body), [], float(self.rng.uniform(0, 0.9)), group)
            events.append(first)
            for _ in range(int(self.rng.integers(1, 3))):
                again = Event(list(body), _copied(len(body)), [], float(self.rng.uniform(first.position, 1.0)), group)
                events.append(again)
        return events

    def _woven(self, kind: str, length: int, events: list[Event]) -> Sample:
        room = length - (self.generator.bos is not None)
        used = sum(len(event.tokens) for event in events)
        limit = int(room * 0.97)
        while used > limit:  # drop whole groups: a question without its statement would teach guessing
            groups = [event.group for event in events if event.group >= 0]
            drop = groups[int(self.rng.integers(len(groups)))]
            events = [event for event in events if event.group != drop]
            used = sum(len(event.tokens) for event in events)
        body = self.generator.book_text(room - used)
        # Shuffle first: questions that share the last position come in random order. The sort by place is stable.
        order = self.rng.permutation(len(events))
        events = sorted((events[i] for i in order), key=lambda event: (event.position, bool(event.answers)))
        return self.generator.weave(kind, body, [(int(event.position * len(body)), event) for event in events])

    # ---------------------------------------------------------------- drills
    def _drill(self, length: int) -> Sample:
        kinds = self.drill_mix
        if length < LONG_DRILL:
            kinds = {kind: share for kind, share in kinds.items() if kind in SHORT_DRILLS}
        kind = self._draw(kinds)
        bos = self.generator.bos
        opening = [] if bos is None else [bos]
        room = length - len(opening)
        events = getattr(self, f"_drill_{kind}")(room)
        tokens, weights = list(opening), [1.0] * len(opening)
        for event in events:
            tokens += event.tokens
            weights += event.weights
        return Sample(f"drill_{kind}", np.array(tokens[:length], np.int64), (), np.array(weights[:length], np.float32))

    def _drill_copy(self, room: int) -> list[Event]:
        """Random numbers, again and again: teaches that a token matches its own earlier occurrence."""
        return self._copies(room, self.pieces.numbers)

    def _drill_wordcopy(self, room: int) -> list[Event]:
        return self._copies(room, self.pieces.random_words)

    def _copies(self, room: int, draw: Callable[[int], list[int]]) -> list[Event]:
        count = int(self.rng.integers(12, max(13, room // 2)))
        body = draw(count)
        again = [Event(list(body), _copied(count)) for _ in range(room // count + 1)]
        return [Event(list(body), [NOISE_WEIGHT] * count), *again]

    def _drill_keyvalue(self, room: int) -> list[Event]:
        return self._dictionary_drill(room, self.pieces.dictionary_keys(int(self.rng.integers(4, max(6, room // 17)))))

    def _drill_wordvalue(self, room: int) -> list[Event]:
        """A dictionary whose keys are words: as dense in look-ups as numbers are, with the keys of sentences."""
        return self._dictionary_drill(
            room, self._keys(int(self.rng.integers(3, max(5, min(80, room // 17)))), WORD_KEYS)
        )

    def _dictionary_drill(self, room: int, keys: list[list[int]]) -> list[Event]:
        pairs = [(key, self.pieces.value()) for key in keys]
        return [
            self.pieces.dictionary(pairs),
            *self._repeat(room, [lambda p=p: self.pieces.dictionary_question(*p) for p in pairs]),
        ]

    def _drill_needles(self, room: int) -> list[Event]:
        return self._needles_drill(room)

    def _drill_alike(self, room: int) -> list[Event]:
        """Needles whose keys share one of their two words.

        Among random pairs a model that looks at one word only is nearly always right, and may never look at the other.
        """
        return self._needles_drill(room, {"alike": 1.0})

    def _drill_steps(self, room: int) -> list[Event]:
        """Needles keyed by a number or a single word, on the way to pairs of words."""
        return self._needles_drill(room, STEP_KEYS)

    def _needles_drill(self, room: int, kinds: dict[str, float] | None = None) -> list[Event]:
        """Statements and questions; half of the time in turn, so that the candidates grow from one to many."""
        in_turn = self.rng.random() < 0.5
        template = int(self.rng.integers(len(self.pieces.templates)))
        needles = [
            (key, self.pieces.value()) for key in self._keys(int(self.rng.integers(2, max(5, room // 26))), kinds)
        ]
        statements = [self.pieces.statement(template, key, value) for key, value in needles]
        askers = [lambda n=n: self.pieces.question(self._template(template), *n) for n in needles]
        events: list[Event] = []
        for number, statement in enumerate(statements, 1):
            events.append(statement)
            if in_turn:
                events.append(askers[int(self.rng.integers(number))]())
        return events + self._repeat(room, askers)

    def _template(self, stated: int) -> int:
        return stated if self.rng.random() >= OTHER_TEMPLATE else int(self.rng.integers(len(self.pieces.templates)))

    def _drill_multivalue(self, room: int) -> list[Event]:
        template = int(self.rng.integers(len(self.pieces.templates)))
        keys = self._keys(int(self.rng.integers(1, max(2, room // 90))))
        values = [[self.pieces.value() for _ in range(int(self.rng.integers(2, 5)))] for _ in keys]
        order = [i for i, own in enumerate(values) for _ in own]
        self.rng.shuffle(order)
        said = [iter(own) for own in values]
        statements = [self.pieces.statement(template, keys[i], next(said[i])) for i in order]
        asked = [lambda k=k, v=v: self.pieces.multivalue_question(k, v) for k, v in zip(keys, values, strict=True)]
        return statements + self._repeat(room, asked)

    def _drill_variable(self, room: int) -> list[Event]:
        template, needle = (
            int(self.rng.integers(len(VARIABLE_TEMPLATES))),
            int(self.rng.integers(len(self.pieces.templates))),
        )
        keys = self._keys(2 * int(self.rng.integers(1, max(2, min(50, room // 55)))))
        chains = [(alias, source, self.pieces.value()) for source, alias in zip(keys[::2], keys[1::2], strict=True)]
        statements = [self.pieces.statement(needle, source, value) for _, source, value in chains]
        aliases = [self.pieces.alias(template, alias, source) for alias, source, _ in chains]
        self.rng.shuffle(aliases)
        return (
            statements
            + aliases
            + self._repeat(room, [lambda c=c: self.pieces.alias_question(template, *c) for c in chains])
        )

    def _repeat(self, room: int, makers: list) -> list[Event]:
        """Questions drawn at random until ``room`` tokens are surely filled.

        Each draw is independent: in rounds, the last question of a round could be answered by elimination.
        """
        events, used = [], 0
        while used < room:
            events.append(makers[int(self.rng.integers(len(makers)))]())
            used += len(events[-1].tokens)
        return events


def _copied(count: int) -> list[float]:
    return [NOISE_WEIGHT] * min(2, count) + [COPY_WEIGHT] * max(0, count - 2)
