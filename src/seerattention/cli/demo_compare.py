"""The demo's small comparison: gates beside training-free methods, at one density, on the same few prompts.

``seer compare`` does it in earnest: more prompts, every rule, knobs searched on held-out prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluate.calibration import search
from ..evaluate.contenders import Contender, make_contenders
from ..evaluate.perplexity import PerplexityResult, evaluate_perplexity
from ..evaluate.retrieval import RetrievalResult, evaluate_retrieval
from ..evaluate.settings import Setting
from ..evaluate.tables import Table, format_density, format_length, format_percent
from ..gates.sources import stored_budgets
from ..selectors import LayerInputs

__all__ = ["Compared", "compare", "compared_table"]

#: What the gates are compared with, under one rule; and what has no scores for it.
SCORED = "xattention,flashprefill_v2,sub_block:query_parts=8:key_parts=8,oracle"
UNSCORED = "streaming"
RULES = ("top_k", "budget")

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Compared:
    """What was found.

    Attributes:
        length, density: of the prompts for perplexity, and what every method was asked for.
        retrieval, perplexity: one result a setting, dense first.
        whole_prompt: by setting, whether the method looks at the whole prompt before it chooses.
    """

    length: int
    density: float
    retrieval: Sequence[RetrievalResult]
    perplexity: Sequence[PerplexityResult]
    whole_prompt: Mapping[str, bool]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "length": self.length,
            "density": self.density,
            "retrieval": [item.to_dict() for item in self.retrieval],
            "perplexity": [item.to_dict() for item in self.perplexity],
        }


def compare(
    model: nn.Module,
    gates: tuple[str, Path],
    samples: Mapping[str, Sequence[Any]],
    documents: Tensor,
    *,
    density: float,
    progress: Progress,
) -> Compared:
    """Run the methods.

    Args:
        model: without gates.
        gates: what tables call them, and their folder.
        samples: retrieval tasks, by name.
        documents: int64 ``[n, length]``, for perplexity.
        density: what every method keeps: a share of each row's blocks (rule "top_k"); the gates also by the budgets
            stored with them; and as much of the latest tokens.
        progress: ``progress(what, total)`` is a context manager that gives ``advance(tokens)``.
    """
    name, folder = gates
    length = documents.shape[1]
    contenders = make_contenders({name: folder}, SCORED, RULES, budgets={name: stored_budgets(folder)})
    contenders += make_contenders({}, UNSCORED, ("own",))
    settings, whole = [Setting.dense()], {}
    for contender in contenders:
        if not contender.reaches(density):
            continue
        selector = contender.stored(density) or contender.at(_value(contender, density, length))
        setting = contender.setting(selector, density)
        settings.append(setting)
        whole[setting.name] = not selector.rowwise
    tokens = documents.numel() + sum(len(sample.input_ids) for made in samples.values() for sample in made)
    with progress(f"comparing {len(whole)} methods", tokens * len(settings)) as advance:
        retrieval = evaluate_retrieval(model, samples, settings, advance=advance, method="teacher_forcing")
        perplexity = evaluate_perplexity(model, documents, settings, advance=advance)
    return Compared(length, density, retrieval, perplexity, whole)


def _value(contender: Contender, density: float, length: int) -> float | int:
    """Of the knob. A share of blocks is the density; of a window it follows from the length, whatever is read."""
    if contender.policy is not None:
        return density
    x = torch.zeros(1, 1, length, 1)
    inputs = LayerInputs(0, x, x, x, x, x, x, x, None, 1.0, None)
    return search(contender.knob, density, lambda value: contender.at(value).select(inputs).density())[0]


def compared_table(compared: Compared) -> Table:
    """One row a method."""
    tasks = list(compared.retrieval[0].correct)
    rows = [
        [
            retrieval.setting,
            format_density(perplexity.density),
            f"{perplexity.last_quarter()[0]:.2f}",
            *(format_percent(retrieval.accuracy([task])) for task in tasks),
            {None: "", False: "row by row", True: "whole prompt"}[compared.whole_prompt.get(retrieval.setting)],
        ]
        for retrieval, perplexity in zip(compared.retrieval, compared.perplexity, strict=True)
    ]
    questions = sum(compared.retrieval[0].correct[task].size for task in tasks)
    caption = (
        f"Against training-free methods, one document of {format_length(compared.length)} tokens and {questions} "
        "questions, the same for all: too few to rank methods that are close, seer compare takes as many as you like. "
        f"Rule top_k: each row reads the same share of its blocks, {compared.density:g}, by the scores of the method. "
        "Rule budget: as gates are shipped; short prompts come out denser. Streaming reads the first block and the "
        "latest tokens. The oracle looks at the true attention map and saves nothing. Methods choose in plain torch: "
        "no times."
    )
    return Table(["method", "density", "perplexity", *tasks, "decides"], rows, caption)
