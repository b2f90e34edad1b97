"""Training sequences from the same tasks: many questions each, random sizes, and drills that teach look-up itself.

*Drills* contain no book text at all: copies of random numbers, key-value look-ups, statements with questions. A model that
begins with short drills forms its look-up circuits within minutes; one that begins with long texts may never do.
"""

from __future__ import annotations

import math

import numpy as np

from .generator import Sample, TaskGenerator
from .pieces import COPY_WEIGHT, NEEDLE_TEMPLATES, NOISE_WEIGHT, VARIABLE_TEMPLATES, Event

#: How often each form of training sequence is drawn, among sequences that are not plain book text.
TASK_MIX = {"multikey": 3.0, "keyvalue": 2.0, "multivalue": 1.5, "variable": 1.5, "few": 1.0, "copy": 1.0}
DRILL_MIX = {"copy": 2.0, "keyvalue": 2.5, "needles": 4.0, "multivalue": 1.0, "variable": 1.0}
#: Drills that fit into any length; the others join from ``LONG_DRILL`` tokens on.
SHORT_DRILLS = ("copy", "keyvalue", "needles")
LONG_DRILL = 256
#: Share of task sequences whose keys are arbitrary vocabulary words rather than listed ones.
LOOSE_KEYS = 0.15


class TrainingMix:
    """Draws weighted training sequences.

    Args:
        generator: a :class:`TaskGenerator` of the train split.
        task_mix, drill_mix: relative frequencies, see ``TASK_MIX`` and ``DRILL_MIX``.
    """

    def __init__(
        self,
        generator: TaskGenerator,
        task_mix: dict[str, float] | None = None,
        drill_mix: dict[str, float] | None = None,
    ) -> None:
        self.generator = generator
        self.pieces = generator.pieces
        self.rng = generator.rng
        self.task_mix = dict(TASK_MIX if task_mix is None else task_mix)
        self.drill_mix = dict(DRILL_MIX if drill_mix is None else drill_mix)

    def sequence(self, length: int, *, tasks: float = 0.6, drills: float = 0.0) -> Sample:
        """A training sequence: a drill with probability ``drills``, else a task in book text with ``tasks``, else book text."""
        if self.rng.random() < drills:
            return self._drill(length)
        if self.rng.random() >= tasks:
            return self._woven("text", length, [])
        kind = self._draw(self.task_mix)
        return self._woven(kind, length, getattr(self, f"_{kind}")(length))

    def _draw(self, mix: dict[str, float]) -> str:
        names = list(mix)
        shares = np.array([mix[name] for name in names])
        return names[int(self.rng.choice(len(names), p=shares / shares.sum()))]

    def _count(self, low: int, high: int) -> int:
        """Between low and high: every order of magnitude as likely, or every number, so that few and many both occur."""
        high = max(low, high)
        if self.rng.random() < 0.5:
            return int(self.rng.integers(low, high + 1))
        return int(math.exp(self.rng.uniform(math.log(low), math.log(high + 1))))

    def _keys(self, count: int) -> list[list[int]]:
        return self.pieces.loose_keys(count) if self.rng.random() < LOOSE_KEYS else self.pieces.keys(count)

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
        template = int(self.rng.integers(len(NEEDLE_TEMPLATES)))
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
        template = int(self.rng.integers(len(NEEDLE_TEMPLATES)))
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
        template, needle = int(self.rng.integers(len(VARIABLE_TEMPLATES))), int(self.rng.integers(len(NEEDLE_TEMPLATES)))
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
        most = min(1500, length // 20)
        count = int(self.rng.integers(6, max(7, most))) if length <= 1024 else self._count(4, most)
        pairs = [(key, self.pieces.value()) for key in self.pieces.dictionary_keys(count)]
        dictionary = self.pieces.dictionary(pairs)
        dictionary.position = float(self.rng.uniform(0, 0.9))
        asked = self.rng.choice(count, min(count, max(1, length // 34)), replace=False)
        questions = [
            self._ask(self.pieces.dictionary_question(*pairs[i]), dictionary.position, group) for group, i in enumerate(asked)
        ]
        return [dictionary, *questions]

    def _copy(self, length: int) -> list[Event]:
        """Passages of book text or random numbers that come again."""
        events = []
        for group in range(int(self.rng.integers(1, 4))):
            count = int(self.rng.integers(8, min(400, max(16, length // 8))))
            random_numbers = self.rng.random() < 0.5
            body = self._numbers(count) if random_numbers else [int(t) for t in self.generator.book_text(count)]
            first = Event(list(body), [NOISE_WEIGHT if random_numbers else 1.0] * len(body), [], float(self.rng.uniform(0, 0.9)), group)
            events.append(first)
            for _ in range(int(self.rng.integers(1, 3))):
                again = Event(list(body), _copied(len(body)), [], float(self.rng.uniform(first.position, 1.0)), group)
                events.append(again)
        return events

    def _numbers(self, count: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < count:
            tokens += self.pieces.value()
        return tokens[:count]

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
        count = int(self.rng.integers(12, max(13, room // 2)))
        body = self._numbers(count)
        again = [Event(list(body), _copied(count)) for _ in range(room // count + 1)]
        return [Event(list(body), [NOISE_WEIGHT] * count), *again]

    def _drill_keyvalue(self, room: int) -> list[Event]:
        count = int(self.rng.integers(4, max(6, room // 17)))
        pairs = [(key, self.pieces.value()) for key in self.pieces.dictionary_keys(count)]
        return [self.pieces.dictionary(pairs), *self._repeat(room, [lambda p=p: self.pieces.dictionary_question(*p) for p in pairs])]

    def _drill_needles(self, room: int) -> list[Event]:
        count = int(self.rng.integers(2, max(4, room // 30)))
        template = int(self.rng.integers(len(NEEDLE_TEMPLATES)))
        needles = [(key, self.pieces.value()) for key in self.pieces.keys(count)]
        statements = [self.pieces.statement(template, key, value) for key, value in needles]
        return statements + self._repeat(room, [lambda n=n: self.pieces.question(template, *n) for n in needles])

    def _drill_multivalue(self, room: int) -> list[Event]:
        template = int(self.rng.integers(len(NEEDLE_TEMPLATES)))
        keys = self.pieces.keys(int(self.rng.integers(1, max(2, room // 90))))
        values = [[self.pieces.value() for _ in range(int(self.rng.integers(2, 5)))] for _ in keys]
        order = [i for i, own in enumerate(values) for _ in own]
        self.rng.shuffle(order)
        said = [iter(own) for own in values]
        statements = [self.pieces.statement(template, keys[i], next(said[i])) for i in order]
        asked = [lambda k=k, v=v: self.pieces.multivalue_question(k, v) for k, v in zip(keys, values, strict=True)]
        return statements + self._repeat(room, asked)

    def _drill_variable(self, room: int) -> list[Event]:
        template, needle = int(self.rng.integers(len(VARIABLE_TEMPLATES))), int(self.rng.integers(len(NEEDLE_TEMPLATES)))
        keys = self.pieces.keys(2 * int(self.rng.integers(1, max(2, room // 55))))
        chains = [(alias, source, self.pieces.value()) for source, alias in zip(keys[::2], keys[1::2], strict=True)]
        statements = [self.pieces.statement(needle, source, value) for _, source, value in chains]
        aliases = [self.pieces.alias(template, alias, source) for alias, source, _ in chains]
        self.rng.shuffle(aliases)
        return statements + aliases + self._repeat(room, [lambda c=c: self.pieces.alias_question(template, *c) for c in chains])

    def _repeat(self, room: int, makers: list) -> list[Event]:
        """Questions in random order, round after round, until ``room`` tokens are surely filled."""
        events, used = [], 0
        while used < room:
            for i in self.rng.permutation(len(makers)):
                events.append(makers[i]())
                used += len(events[-1].tokens)
                if used >= room:
                    break
        return events


def _copied(count: int) -> list[float]:
    return [NOISE_WEIGHT] * min(2, count) + [COPY_WEIGHT] * max(0, count - 2)
