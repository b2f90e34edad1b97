"""What ``seer distill`` trains on what: checked before a model is loaded, and known again when a run goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import one_line
from .gate_form import OPTION_OF
from .options import named

if TYPE_CHECKING:
    from ..config import GateConfig
    from ..distillation import DistillConfig
    from ..distillation.documents import Documents
    from ..distillation.processes import Processes
    from .common import Terminal

__all__ = [
    "AUTO",
    "DistillJob",
    "check_job",
    "learning_rate_of",
    "read_text",
    "repeats_of",
    "row_choice",
    "same_run",
    "target_of",
]

AUTO = "auto"
"""Of ``--target``: the model decides."""
# Held-out sequences that are read for that.
_TARGET_SEQUENCES = 2

# Where nothing is said of them. Prompts, text alone, 500 steps: a model that looks up in layer 1 keeps 97.7 / 78.4 % of
# its answers at a density of 0.1 / 0.05, and 92.0 / 65.5 % without passages at 1e-3; the embedded model 91.7 / 81.9 for
# 92.1 / 84.2 %, at +2.6 for +2.7 % of perplexity. For decoding nothing was measured.
_LEARNING_RATE = {"prefill": 2e-3}
_REPEATS = {"prefill": 1.0}

_TEXT = "digest of the text"  # of the whole of it: what no step has read yet decides the rest of the run


def row_choice(rows: float) -> float | int:
    """A share of the rows, or how many."""
    if rows > 1 and rows.is_integer():
        return int(rows)
    if not 0 < rows <= 1:  # NaN is no share either
        raise ValueError(
            f"--rows must be a share in (0, 1] of the query blocks or a whole number of them, got {rows:g}"
        )
    return rows


@dataclass(frozen=True)
class DistillJob:
    """What is trained on what; all of it must be the same for a run to be continued."""

    model: str
    data: str
    length: int
    batch_size: int
    text_field: str
    document_tokens: int
    repeats: float
    tasks: float
    eval_sequences: int
    dtype: str
    device: str
    gates: str | None
    gate: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What the run is known by. Of shares of 0 it says nothing, as runs of earlier versions do not."""
        added = (("repeats", 0.0), ("tasks", 0.0))
        return {name: value for name, value in asdict(self).items() if (name, value) not in added}

    def says_of_sequences(self) -> str:
        """What the sequences are besides text, in words that follow others; nothing where they are text alone."""
        woven = f", a share of {self.tasks:g} with tasks woven in" if self.tasks else ""
        others = " of the others" if self.tasks else ""
        again = f", a share of {self.repeats:g}{others} with passages said again" if self.repeats else ""
        return woven + again


def learning_rate_of(phase: str) -> float:
    """The peak learning rate where none is given."""
    return _LEARNING_RATE.get(phase, 1e-3)


def repeats_of(phase: str, length: int, terminal: Terminal) -> float:
    """The share of ``--repeats`` where none is given: what is not asked for breaks no run, it is said instead."""
    from ..distillation import Repeats

    share = _REPEATS.get(phase, 0.0)
    try:
        if share:
            Repeats(share).check_length(length)
    except ValueError as error:
        terminal.say(f"no passages are said again: {error}")
        return 0.0
    return share


def target_of(
    model: Any, held_out: list[Any], state: Path, block_size: int, processes: Processes, terminal: Terminal
) -> tuple[str, dict[str, Any]]:
    """The target where none is given: that of the run in ``state``, or what suits the model, and then why.

    Where the model cannot decide it is that of the papers, and it is said. Every process reads the same sequences; the
    word of the first one counts.

    Returns:
        The target, and for the history what decided; nothing of a run that goes on.
    """
    import torch

    from ..distillation import choose_target
    from ..distillation.config import TARGETS
    from ..distillation.saved import load_state

    if state.exists():
        return str(load_state(state)[1].get("settings", {}).get("target", TARGETS[0])), {}
    chosen, why = TARGETS[0], ""
    told: dict[str, Any] = {}
    try:
        if not held_out:
            raise ValueError("no sequences are held out")
        found = choose_target(model, held_out[:_TARGET_SEQUENCES], block_size=block_size)
    except (ValueError, NotImplementedError, RuntimeError) as error:  # the last: out of memory, too
        why = f"the model could not decide: {one_line(error)}"
        told = {"could not decide": one_line(error)}
    else:
        lost = " and ".join(f"{found.lost[target]:.3g} ({target})" for target in TARGETS)
        chosen, told = found.target, {"lost": dict(found.lost), "density": found.density}
        share = f"{found.density:.2f}"
        why = f"the best {share} of the blocks of true maps change the next token's distribution by {lost} nats"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    index = torch.tensor([TARGETS.index(chosen) if processes.is_main else 0], device=model.device)
    chosen = TARGETS[int(processes.sum_(index))]
    if processes.is_main:
        terminal.say(f"--target {chosen}: {why}")
    return chosen, told


def check_job(job: DistillJob, settings: dict[str, Any]) -> tuple[DistillConfig, GateConfig]:
    """Of the run and of fresh gates: what can be wrong with the options is found before a model is loaded."""
    from ..config import GateConfig
    from ..distillation import DistillConfig, Repeats, Woven

    with named({name: f"--{name.replace('_', '-')}" for name in settings}):
        config = DistillConfig(**settings)
    with named(OPTION_OF):
        gate_config = GateConfig.from_dict(job.gate)
    block_size = gate_config.block_size_of(config.phase)
    if job.gates is None and job.length <= block_size:
        raise ValueError(
            f"--length must be more than one block ({block_size} tokens), got {job.length}: with one block "
            "to choose from there is nothing to learn"
        )
    with named({"repeats": "--repeats", "tasks": "--tasks"}):
        for changed in (Repeats(job.repeats), Woven(None, job.tasks)):
            if changed.share:
                changed.check_length(job.length)
    return config, gate_config


def same_run(job: DistillJob, documents: Documents, state: Path) -> dict[str, Any]:
    """What must be the same for the run in ``state`` to go on. Runs of earlier versions do not know their text."""
    from ..distillation.saved import load_state

    if state.exists() and _TEXT not in load_state(state)[1].get("settings", {}):
        return job.to_dict()
    return {**job.to_dict(), _TEXT: documents.fingerprint()}


def read_text(
    job: DistillJob, documents: Documents, tokenizer: Any, processes: Processes, config: DistillConfig
) -> tuple[Any, list[Any]]:
    """Training batches, and the held-out ones: the first sequences of the text, which training leaves out.

    Those are plain text whatever ``job`` says of repeats and tasks: budgets are fitted on them, and runs compared by
    them.
    """
    from itertools import islice

    from ..distillation import Repeats, Woven
    from ..distillation.data import PackedText, Position, tokenize_with

    tokenize = tokenize_with(tokenizer)
    common: dict[str, Any] = {"length": job.length, "document_tokens": job.document_tokens or None}
    held_out, start = [], Position()
    if job.eval_sequences:
        first = PackedText(documents, tokenize, batch_size=1, prefetch=0, **common)
        held_out = list(islice(first, job.eval_sequences))
        start = first.position
    batches = PackedText(
        documents,
        tokenize,
        batch_size=job.batch_size,
        start=start,
        repeat=config.steps is not None,
        rank=processes.rank,
        world_size=processes.world_size,
        repeats=Repeats(job.repeats, seed=config.seed),
        tasks=Woven(tokenizer, job.tasks, seed=config.seed),
        **common,
    )
    return batches, held_out
