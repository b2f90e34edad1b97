"""Phases under one time budget, in two stages; the drill phases last until the model has learnt what they teach.

1. Short texts, nearly all drills, while all layers but a few are kept near (``TrainConfig.look_up``): look-up of
   numbers forms, then that of single words and of pairs of words, in the layers that see far. With every layer free,
   words were learnt in some runs and not in others, and look-up formed in layers 1 to 3, as it happened
   (``docs/experiments.md``).
2. Long texts, every layer free: look-up among 1K keys has to be sharp among 16K.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from seerattention.tasks import MIXES, checked_mix

log = logging.getLogger(__name__)


class NotFormed(RuntimeError):
    """The look-up circuits did not form within the time that the drills may take."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        context: tokens a sequence.
        share: share of the time budget; of a phase with ``most``, the least. The phases without ``most`` divide what
            the others leave in proportion to their shares; what a phase with ``most`` does not need goes to those
            after it.
        tokens: tokens a step.
        rate: AdamW learning rate; the rate glides from one phase's to the next's.
        tasks: share of sequences with a task, among those that are not drills.
        drills: share of sequences that are drills (no book text).
        most: the phase ends before this share of the budget as soon as the kinds of drills in ``until`` are below
            ``TrainConfig.formed_below``; 0: it always takes its share.
        until: the kinds of drills that a phase with ``most`` waits for; none: all that it draws.
        stop_above: give up if the drill ``FIRST_TO_FORM`` is still above this when ``most`` is reached; kinds that form
            later may go on forming in the next phases.
        reach: positions are spread by random jumps to less than this many tokens (0: they are not), see ``spread``.
        task_mix, drill_mix, key_mix: what ``TrainingMix`` draws in this phase (None: as the run says, see
            ``TrainConfig``).
        steered: the phase keeps layers near that ``TrainConfig.look_up`` does not name.
    """

    context: int
    share: float
    tokens: int
    rate: float
    tasks: float = 0.6
    drills: float = 0.0
    most: float = 0.0
    until: Sequence[str] = ()
    stop_above: float = math.inf
    reach: int = 0
    task_mix: dict[str, float] | None = None
    drill_mix: dict[str, float] | None = None
    key_mix: dict[str, float] | None = None
    steered: bool = False


#: Dictionaries of numbers: where look-up forms at all, they are learnt first.
FIRST_TO_FORM = "answers drill_keyvalue"

#: From copies to look-up, of numbers, which forms first, and of words.
FIRST: dict[str, float] = {
    "copy": 2.0,
    "wordcopy": 1.0,
    "keyvalue": 3.0,
    "wordvalue": 1.0,
    "steps": 1.0,
    "needles": 3.0,
}
#: Pairs of words, with what leads up to them, and pairs of which one word alone tells.
WORDS: dict[str, float] = {
    "wordcopy": 0.5,
    "keyvalue": 1.0,
    "wordvalue": 1.5,
    "steps": 2.0,
    "needles": 3.0,
    "alike": 1.5,
    "multivalue": 1.0,
    "variable": 0.5,
}

# Losses that bound the drill phases: blind guesses cost 6.9; guesses among the two to four needles of 128 tokens about
# 0.5, among the up to nineteen of 512 tokens 0.8 to 1.4; look-up costs less than 0.05. Several values for one name come
# last, so no drill phase waits for those. The first phase took 40 to 80 s on a GPU, the second 10 to 20.
PHASES = (
    Phase(
        128,
        0.06,
        16_384,
        3e-4,
        drills=1.0,
        most=0.16,
        until=("keyvalue",),
        stop_above=2.0,
        drill_mix=FIRST,
        steered=True,
    ),
    Phase(
        512,
        0.04,
        32_768,
        5e-4,
        tasks=0.75,
        drills=0.95,
        most=0.14,
        until=("keyvalue", "needles", "alike"),
        stop_above=0.4,
        drill_mix=WORDS,
        steered=True,
    ),
    Phase(1024, 0.07, 65_536, 8e-4, tasks=0.75, drills=0.4, drill_mix=WORDS, steered=True),
    Phase(4096, 0.14, 131_072, 1e-3, tasks=0.7, drills=0.2),
    Phase(16_384, 0.45, 131_072, 1e-3, tasks=0.6, drills=0.15),
    Phase(32_768, 0.2, 131_072, 6e-4, tasks=0.6, drills=0.1),
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        seconds: length of the training loop (compilation and start-up come before it).
        phases: each gets its mixes when the settings are made: its own, else ``task_mix``, ``drill_mix`` and
            ``key_mix`` of the run, else the package's.
        optimizer: "adamw", or "muon": Muon for the matrices from the first phase on that always takes its share, AdamW
            else.
        rate_scale: multiplies the learning rates of the phases that always take their share.
        muon_ratio: Muon's learning rate over AdamW's (Muon's update has 0.2 of AdamW's size).
        decay_from: share of the time after which the rate falls linearly to 3 %.
        formed_below: loss of answers below which a kind of drill counts as learnt.
        retries: how often to begin again with the next seed, in what is left of ``seconds``, if look-up did not form.
        workers: processes that make batches; 0 makes them in the training process.
        checkpoint_every: seconds between checkpoints.
        shortest_book: tokens; shorter books are left out.
        report_every: steps between two lines of the log.
        task_mix, drill_mix, key_mix: relative frequencies of the forms of tasks, drills and keys in the phases that do
            not say their own (None: the package's).
        templates: sentences of the needles (None: the package's).
        look_up: the layers that see all tokens before while a phase is steered; the others see those near by alone, so
            look-up can form in these only. The default is easy on gates, and layer 1 hard (``testbed/README.md``);
            None: all layers do.
    """

    seconds: float = 660.0
    phases: tuple[Phase, ...] = PHASES
    optimizer: str = "adamw"
    rate_scale: float = 1.0
    muon_ratio: float = 5.0
    weight_decay: float = 0.05
    decay_from: float = 0.68
    warmup_steps: int = 100
    formed_below: float = 0.15
    retries: int = 1
    seed: int = 11
    workers: int = 14
    checkpoint_every: float = 60.0
    report_every: int = 50
    shortest_book: int = 20_000
    task_mix: dict[str, float] | None = None
    drill_mix: dict[str, float] | None = None
    key_mix: dict[str, float] | None = None
    templates: list[tuple[str, str]] | None = None
    look_up: tuple[int, ...] | None = (2, 3)

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', got {self.optimizer!r}")
        if not self.phases or self.phases[-1].most:
            raise ValueError("phases must end with one that has no 'most', which takes the time that is left")
        for phase in self.phases:
            if phase.most and not 0 <= phase.share <= phase.most < 1:
                raise ValueError(f"a phase needs 0 <= share <= most < 1, got share={phase.share}, most={phase.most}")
        if (longest := sum(phase.most for phase in self.phases)) >= 1:
            raise ValueError(f"the phases with 'most' must leave time to the others, got {longest:g} of it for them")
        object.__setattr__(self, "phases", tuple(self._with_mixes(phase) for phase in self.phases))
        if self.look_up is not None and (not self.look_up or min(self.look_up) < 0):
            raise ValueError(f"look_up must name at least one layer, by numbers from 0 on, got {self.look_up}")

    def far(self, phase: Phase) -> tuple[int, ...] | None:
        """The layers that see all tokens before in a phase (None: all layers do)."""
        return self.look_up if phase.steered else None

    def _with_mixes(self, phase: Phase) -> Phase:
        mixes: dict[str, Any] = {}
        for name in MIXES:
            own = getattr(phase, name)
            mixes[name] = checked_mix(name, getattr(self, name) if own is None else own)
        if unknown := sorted(set(phase.until) - mixes["drill_mix"].keys()):
            raise ValueError(f"a phase waits for drills that it does not draw: {', '.join(unknown)}")
        return replace(phase, **mixes)


@dataclass
class Schedule:
    """Which phase a run is in, and its learning rate; ``state()`` goes into the checkpoint.

    Attributes:
        config: the settings of the run.
        begin: seconds at which this attempt began (0 but for a later attempt).
        phase: index of the current phase.
        started: seconds at which that phase began.
        smooth: running mean loss of answers of each kind of drill in this phase.
    """

    config: TrainConfig
    begin: float = 0.0
    phase: int = 0
    started: float = 0.0
    smooth: dict[str, float] = field(default_factory=dict)
    reports: int = 0

    def __post_init__(self) -> None:
        self.started = max(self.started, self.begin)

    def state(self) -> dict[str, Any]:
        names = ("begin", "phase", "started", "smooth", "reports")
        return {name: getattr(self, name) for name in names}

    def report(self, losses: dict[str, float]) -> None:
        """Take in the mean losses since the last report, with the names that ``Losses.report`` gives them."""
        for name, value in losses.items():
            if name.startswith("answers drill_"):
                self.smooth[name] = 0.6 * self.smooth.get(name, value) + 0.4 * value
        self.reports += 1

    @property
    def formed(self) -> bool:
        """Whether the drills that this phase waits for are learnt."""
        until = [f"answers drill_{kind}" for kind in self.config.phases[self.phase].until]
        losses = [self.smooth.get(name, math.inf) for name in until or self.smooth]
        return self.reports > 1 and all(loss < self.config.formed_below for loss in losses)

    def at(self, elapsed: float) -> int:
        """Index of the phase after ``elapsed`` seconds; moves on to the next one where this one is over.

        Raises:
            NotFormed: a drill phase is over and the model cannot do the drills.
        """
        while self.phase < len(self.config.phases) - 1 and elapsed >= self._end():
            self._check(elapsed)
            log.info(
                "%.0f s: context %d is over, drills %s", elapsed, self.config.phases[self.phase].context, self.smooth
            )
            self.phase, self.started, self.smooth, self.reports = self.phase + 1, elapsed, {}, 0
        return self.phase

    def factor(self, elapsed: float, step: int) -> float:
        """Warm-up and decay of the learning rate."""
        c = self.config
        done = (elapsed - self.begin) / (c.seconds - self.begin)
        decay = 1.0 if done < c.decay_from else max(0.03, (1 - done) / (1 - c.decay_from))
        return min(1.0, (step + 1) / c.warmup_steps) * decay

    def _end(self) -> float:
        phases, phase = self.config.phases[self.phase :], self.config.phases[self.phase]
        total = self.config.seconds - self.begin
        if phase.most:
            return self.started + (phase.share if self.formed else phase.most) * total
        # Drill phases to come are counted at their longest: what they leave should go to the long texts at the end.
        left = self.config.seconds - self.started - sum(p.most for p in phases) * total
        return self.started + left * phase.share / sum(p.share for p in phases if not p.most)

    def _check(self, elapsed: float) -> None:
        phase = self.config.phases[self.phase]
        if phase.most and self.smooth.get(FIRST_TO_FORM, 0.0) > phase.stop_above:
            losses = {name: round(value, 3) for name, value in self.smooth.items()}
            raise NotFormed(
                f"look-up did not form in the drills of {phase.context} tokens by {elapsed:.0f} s: losses {losses}; "
                f"{FIRST_TO_FORM} is not below {phase.stop_above}; try another seed, more time for the drills (most), "
                "or a lower learning rate"
            )
