"""Distils the testbed model's gates on its own training texts and tasks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import seerattention as seer
from seerattention.distillation import StepReport
from seerattention.distillation.data import in_background
from seerattention.tasks import TaskGenerator, TrainingMix, like_evaluation

from .data import load_books

LIST_CUE, LIST_TOKENS = 8, (24, 400)
"""Tokens of a list that ask for the rest, and how many that rest has, the last number left out."""

TRAINING_TOKENS, HELD_OUT_TOKENS = 3_000_000, 400_000
"""Of each source of texts that is read; token files are read whole."""


class TaskBatches:
    """Batches ``{"input_ids": [batch_size, length]}`` of tasks in books, the same ones each time it is iterated.

    Half of the training sequences are the training mix, half look like evaluation samples (a few questions near the
    end, text between them), because a gate must find the few rows that ask among many that do not. Gates of decoding
    see too few such rows even so: of their sequences a share ends with a long list that was in the text before, which
    is a look-up for each token of it.

    Args:
        tokenizer, books: as for ``TaskGenerator``.
        length, batch_size, count: tokens a sequence, sequences a batch, batches.
        lists: share of the sequences that end with a list, as ``TaskGenerator.list_copy`` makes them: 8 tokens as the
            question, and 24 to 399 more (at most a quarter of the sequence).
        options: ``seed``, ``split``, ``templates`` of ``TaskGenerator``.

    Raises:
        ValueError: a share out of [0, 1].
    """

    def __init__(
        self,
        tokenizer: Any,
        books: list[np.ndarray],
        length: int,
        batch_size: int,
        count: int,
        lists: float = 0.0,
        **options: Any,
    ) -> None:
        self.arguments, self.lists = (tokenizer, books), _share("lists", lists)
        self.length, self.batch_size, self.count, self.options = length, batch_size, count, options

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return in_background(self._make(), 4)

    def _make(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = TaskGenerator(*self.arguments, **self.options)
        mix = TrainingMix(generator) if self.options["split"] == "train" else None
        for _ in range(self.count):
            rows = [self._sequence(generator, mix) for _ in range(self.batch_size)]
            yield {"input_ids": torch.from_numpy(np.stack(rows))}

    def _sequence(self, generator: TaskGenerator, mix: TrainingMix | None) -> np.ndarray:
        rng = generator.rng
        if self.lists and rng.random() < self.lists:  # asked first: without lists the draws are those of before
            count = min(int(rng.integers(*LIST_TOKENS)), self.length // 4)
            return generator.list_copy(self.length, LIST_CUE, count).input_ids
        made = like_evaluation(generator, self.length) if mix is None else mix.distilling(self.length)
        return made.input_ids


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:  # NaN is no share either
        raise ValueError(f"{name} must be a share from 0 to 1, got {value!r}")
    return value


FORMS = {
    "prefill": {
        # Loses least, and takes several times as long to choose blocks as the next (docs/performance.md).
        "mass": seer.testbed.GATE_CONFIG,
        "sub_block": seer.GateConfig(prefill=seer.SubBlockGateConfig()),
        # Queries by all three poolings: the average alone loses what a single question among 64 tokens asks for.
        "paper": seer.GateConfig(prefill=seer.PrefillGateConfig(q_pooling=("max", "min", "avg"))),
    },
    "decode": {
        "sub_block": seer.GateConfig(
            prefill=None, decode=seer.DecodeGateConfig(k_pitch=8, merge_heads=False, query_window=8)
        ),
        "paper": seer.GateConfig(prefill=None, decode=seer.DecodeGateConfig()),
    },
}
"""Forms of gates by phase and name, the default first: of prompts sub-blocks of 4 tokens whose tiles are scored by
their mass, sub-blocks of 8 tokens, and what the papers publish."""

POLICIES = {"prefill": seer.TopK(0.1), "decode": seer.TokenBudget(1600)}
"""What is stored with the gates; a tenth of 16K tokens both."""


@dataclass(frozen=True)
class GateRun:
    """How gates are trained.

    Attributes:
        steps, length, batch_size: of the run, in tokens a sequence and sequences a step.
        rate: most learning rate.
        rows: share of the rows whose targets are computed: of query blocks, or in decoding of query tokens.
        phase: one of :data:`FORMS`: gates of prompts or of decoding.
        lists: share of the sequences that end with a list, see :class:`TaskBatches`.
        seed: of the gates and batches.
        device: where.
        templates: other needle sentences, [statement, question].
        form: one of those of the phase.
        target: what gates learn of a tile, as of ``DistillConfig``.

    Raises:
        ValueError: a form that the phase does not have, a share of lists out of [0, 1], or an unknown target.
    """

    steps: int
    length: int
    batch_size: int
    rate: float
    rows: float
    phase: str = "prefill"
    lists: float = 0.0
    seed: int = 0
    device: str = "cuda"
    templates: list | None = None
    form: str = "sub_block"
    target: str = "max"

    def __post_init__(self) -> None:
        if self.form not in FORMS[self.phase]:
            raise ValueError(f"form must be one of {', '.join(FORMS[self.phase])}, got {self.form!r}")
        _share("lists", self.lists)
        seer.DistillConfig(target=self.target)


RECIPES = {
    "prefill": GateRun(steps=200, length=16_384, batch_size=8, rate=8e-3, rows=0.25, form="mass"),
    # A row is a query token: an eighth of them is eight times as many rows as there are query blocks.
    "decode": GateRun(steps=300, length=16_384, batch_size=4, rate=3e-3, rows=0.125, phase="decode", lists=0.25),
}
"""What is trained unless told otherwise, by phase."""


def recipe(phase: str, **changed: Any) -> GateRun:
    """The recipe of a phase, but for what is told otherwise: fields of :class:`GateRun`.

    Raises:
        ValueError: as :class:`GateRun`.
    """
    if phase not in RECIPES:
        raise ValueError(f"phase must be one of {', '.join(RECIPES)}, got {phase!r}")
    return dataclasses.replace(RECIPES[phase], **changed)


def read_books(sources: Sequence[Path] | None, tokenizer: Any, length: int, split: str, limit: int) -> list[np.ndarray]:
    """Token ids of books: whole token files (.u16), about ``limit`` tokens of each source of texts, or of the passages
    that come with the package (None).

    Raises:
        ValueError: no book of ``length`` tokens in the token files, or no text.
        FileNotFoundError: no such file.
    """
    from seerattention.cli.common import book_tokens

    if sources is None:
        return book_tokens(None, "testbed", tokenizer, limit=limit, split=split)
    files = [source for source in sources if source.suffix == ".u16"]
    books = load_books(files, length, tokenizer.bos_token_id) if files else []
    for source in sources:
        if source.suffix != ".u16":
            books += book_tokens(str(source), "testbed", tokenizer, limit=limit)
    return books


def distil(
    model_folder: Path, books: Sequence[Path] | None, held_out: Sequence[Path] | None, out: Path, run: GateRun
) -> dict[str, Any]:
    """Train fresh gates, save them in ``out`` with their history; returns a summary. Books: see :func:`read_books`.

    Gates of prompts get budgets, fitted on the held-out sequences, if these are long enough (4,096 tokens).

    The state of the run is kept in ``out``, too: the same call goes on after an interruption, and ends with the same
    gates.

    Raises:
        ValueError: ``out`` holds the state of another run; or as :func:`read_books`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from seerattention.cli.common import Terminal
    from seerattention.cli.distill_results import fit_budgets
    from seerattention.distillation import distill
    from seerattention.distillation.saved import STATE_FILE

    torch.manual_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    dtype = torch.bfloat16 if run.device.startswith("cuda") else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    model.to(run.device).eval()
    # Gates remember the model that they were trained for by name, and that of a folder would say nothing.
    model.config._name_or_path = seer.testbed.NAME
    shared: dict[str, Any] = {"seed": run.seed, "templates": run.templates}

    def batches(texts: Sequence[Path] | None, steps: int, split: str, limit: int, lists: float) -> TaskBatches:
        tokens = read_books(texts, tokenizer, run.length, split, limit)
        return TaskBatches(tokenizer, tokens, run.length, run.batch_size, steps, lists, split=split, **shared)

    train = batches(books, run.steps, "train", TRAINING_TOKENS, run.lists)
    # Half of the held-out sequences end with lists: of a few sequences a smaller share may be none.
    test = list(batches(held_out, 1, "test", HELD_OUT_TOKENS, 0.5 if run.lists else 0.0))
    policies: dict[str, Any] = {run.phase: POLICIES[run.phase]}
    seer.attach(model, FORMS[run.phase][run.form], **policies)
    config = seer.DistillConfig(
        learning_rate=run.rate,
        steps=run.steps,
        rows=run.rows,
        seed=run.seed,
        skip_rows=0.0,
        phase=run.phase,
        target=run.target,
    )
    out.mkdir(parents=True, exist_ok=True)
    told = {name: getattr(run, name) for name in ("length", "batch_size", "lists", "templates", "form")}
    done, terminal = 0, Terminal(False)
    with terminal.progress("distilling", run.steps) as advance:

        def on_step(report: StepReport) -> None:
            nonlocal done
            advance(report.step - done)  # the first report of a run that goes on comes with all that was done
            done = report.step

        history = distill(
            model,
            train,
            config,
            eval_batches=test,
            on_step=on_step,
            state_path=out / STATE_FILE,
            save_seconds=60.0,
            settings=told,
        )
    if run.phase == "prefill":
        fit_budgets(model, test, terminal, by_layer=True)
    seer.save_gates(model, out)
    summary = history.to_dict()
    (out / "history.json").write_text(json.dumps({**summary, "run": dataclasses.asdict(run)}))
    return summary
