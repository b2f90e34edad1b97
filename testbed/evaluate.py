"""Scores of the dense model: the bar that every sparse method is held against."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seerattention.cli.common import Terminal
from seerattention.evaluate import PerplexityResult, make_samples
from seerattention.evaluate.perplexity import document_losses
from seerattention.evaluate.retrieval import score_samples
from seerattention.evaluate.tables import Table, with_error
from seerattention.tasks import TASKS, TaskGenerator

from .data import load_books
from .look_up import best_heads, look_up, verdict

#: Questions a sequence; a sequence of task "single" has only one.
QUESTIONS = 4


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """The dense model in ``folder``, and the tokenizer in it or in the folder above."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder if (folder / "tokenizer.json").exists() else folder.parent)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval(), tokenizer


def where_it_looks_up(
    model: Any, tokenizer: Any, texts: list[np.ndarray], length: int, samples: int, templates: list | None = None
) -> dict[str, Any]:
    """What :func:`look_up` measures on needles in ``texts``; prints the best head of each layer and the verdict."""
    generator = TaskGenerator(tokenizer, texts, split="test", seed=length, templates=templates)
    found = look_up(model, generator, length, samples)
    best = zip(best_heads(found["mass"]), best_heads(found["wide"]), strict=True)
    rows = [
        [str(layer), str(head), f"{share:.3f}", f"{wide:.3f}"] for layer, ((head, share), (_, wide)) in enumerate(best)
    ]
    caption = (
        f"Attention of a question's last token; at most: of any of its tokens, on the needle and what is next to it. "
        f"{verdict(found['mass'], found['wide'])}"
    )
    Terminal().table(Table(["layer", "best head", "on the needle", "at most"], rows, caption))
    return found


def evaluate(
    folder: Path,
    books: list[Path],
    lengths: list[int],
    samples: int,
    batch_tokens: int,
    device: str,
    templates: list | None = None,
) -> dict[str, Any]:
    """Exact match of each task at each length (with standard errors), loss of book text by position, and ``look_up``.

    Args:
        folder: the model, with the tokenizer in it or in the folder above.
        books: token files.
        lengths: of the samples, in tokens; the loss by position is taken at the shortest, and where the model looks
            things up at 4,096 tokens or at the shortest, if that is less.
        samples: least number of questions for each task and length, and number of windows of book text.
        batch_tokens: tokens in one forward pass.
        device: "cuda" or "cpu".
        templates: the sentences of the needles, where training used others than the package's.
    """
    model, tokenizer = load(folder, device)
    texts = load_books(books, shortest=min(lengths), bos=tokenizer.bos_token_id)
    results: dict[str, Any] = {"retrieval": {}, "samples": samples, "books": len(texts)}
    rows = []
    for task in TASKS:
        row = {}
        for length in lengths:
            started = time.perf_counter()
            generator = TaskGenerator(tokenizer, texts, split="test", seed=length, templates=templates)
            right = _retrieval(model, generator, task, length, samples, max(1, batch_tokens // length))
            share, asked = float(right.mean()), right.size
            row[str(length)] = {
                "exact": share,
                "error": math.sqrt(share * (1 - share) / asked),
                "questions": asked,
                "seconds": time.perf_counter() - started,
            }
        results["retrieval"][task] = row
        rows.append([task, *(with_error(100 * cell["exact"], 100 * cell["error"], ".1f") for cell in row.values())])
    results["loss"] = _loss_by_position(
        model, tokenizer.bos_token_id, texts, min(lengths), batch_tokens, windows=max(2, samples)
    )
    told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in results["loss"].items())
    caption = f"Dense model, exact match in per cent by teacher forcing, which is greedy decoding there. Loss: {told}."
    Terminal().table(Table(["task", *(f"{length:,}" for length in lengths)], rows, caption))
    results["look_up"] = where_it_looks_up(model, tokenizer, texts, min(4096, *lengths), 16, templates)
    return results


LOOK_UPS = ("single", "multikey", "keyvalue")
"""The tasks without which a model is no test of sparse attention."""


def weak_tasks(results: Mapping[str, Any], least: float) -> str:
    """What a model with these results (:func:`evaluate`) does not do: a sentence, empty if it does everything.

    ``least`` is the share of right answers that counts as doing a task, at the shortest length.
    """
    shares = {}
    for task in LOOK_UPS:
        cells = results["retrieval"][task]
        length = min(cells, key=int)
        if cells[length]["exact"] < least:
            shares[task] = f"{task} {cells[length]['exact']:.1%}"
    if not shares:
        return ""
    return f"the dense model answers {', '.join(shares.values())} at {int(length):,} tokens, below {least:.0%}"


def _retrieval(
    model: Any, generator: TaskGenerator, task: str, length: int, samples: int, batch_size: int
) -> np.ndarray:
    """Which questions are answered, bool ``[sequences, questions]``: at least ``samples`` of them."""
    questions = 1 if task == "single" else QUESTIONS
    right = []
    for start in range(0, -(-samples // questions), batch_size):
        count = min(batch_size, -(-samples // questions) - start)
        batch = make_samples(generator, [task], length, count, questions)[task]
        right.append(score_samples(model, batch, batch_size, method="teacher_forcing"))
    return np.concatenate(right)


def _loss_by_position(
    model: Any, bos: int, texts: list[np.ndarray], length: int, batch_tokens: int, windows: int
) -> dict[str, Any]:
    """Mean loss of an early stretch (1K to 2K of 16K tokens), of the last half and quarter; errors are over windows."""
    rng = np.random.default_rng(0)
    ids = np.empty((windows, length), np.int64)
    ids[:, 0] = bos
    for row in ids:
        text = texts[int(rng.integers(len(texts)))]
        start = int(rng.integers(0, len(text) - length + 2))
        row[1:] = text[start : start + length - 1]
    losses = document_losses(model, torch.from_numpy(ids), max(1, batch_tokens // length))
    result = PerplexityResult("dense", 1.0, losses)
    # Index i holds the loss of token i + 1, predicted at position i; stretches are of predicting positions.
    early, late = losses[:, length // 16 : length // 8].mean(1), losses[:, length // 2 :].mean(1)
    difference = early - late
    return {
        "length": length,
        "windows": len(losses),
        "mean_loss_early": float(early.mean()),
        "mean_loss_last_half": float(late.mean()),
        "difference": float(difference.mean()),
        "difference_error": float(difference.std(ddof=1) / math.sqrt(len(difference))),
        "perplexity": result.perplexity()[0],
        "perplexity_last_quarter": float(np.exp(losses[:, -length // 4 :].mean())),
    }


CURVES = {
    "text": ("text", "#444444"),
    "copies": ("copies", "#0072B2"),
    "answers drill_keyvalue": ("answers: number keys", "#56B4E9"),
    "answers drill_wordvalue": ("answers: word keys", "#009E73"),
    "answers drill_needles": ("answers: needle drills", "#D55E00"),
    "answers drill_alike": ("answers: names that share a word", "#E69F00"),
    "answers multikey": ("answers: needles in books", "#CC79A7"),
}


def draw_curves(log: Path, picture: Path, limit: int = 100_000) -> None:
    """Losses by part over training time, of the last seed in ``log``: a PNG of at most ``limit`` bytes if possible."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if not lines:
        raise ValueError(f"{log} holds no line to draw; train longer than one report")
    lines = [line for line in lines if line.get("seed") == lines[-1].get("seed")]
    figure, axis = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    for name, (label, colour) in CURVES.items():
        points = [(line["elapsed"], max(line[name], 1e-3)) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=label)
    shown = None
    for line in lines:
        if line["context"] != shown:
            shown = line["context"]
            axis.axvline(line["elapsed"], color="#bbbbbb", linewidth=0.8)
            axis.text(line["elapsed"], 12, f" {shown:,}", va="bottom", fontsize=8, color="#666666")
    axis.set(yscale="log", ylim=(1e-3, 12), ylabel="loss (nats a token)")
    axis.set_xlabel("seconds of training; grey lines: the context grows")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    for dpi in (130, 100, 70, 50):
        figure.savefig(picture, dpi=dpi)
        if picture.stat().st_size <= limit:
            break
    plt.close(figure)
