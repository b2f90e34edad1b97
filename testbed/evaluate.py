"""Scores of the dense model, straight from Hugging Face: the bar that every sparse method is held against."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seerattention.tasks import TASKS, TaskGenerator

from .data import load_books

#: Questions a sequence; a sequence of task "single" has only one.
QUESTIONS = 4


@torch.inference_mode()
def evaluate(folder: Path, books: list[Path], lengths: list[int], samples: int, batch_tokens: int, device: str) -> dict[str, Any]:
    """Exact match of each task at each length (with standard errors) and loss of book text by position."""
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder if (folder / "tokenizer.json").exists() else folder.parent)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    texts = load_books(books, shortest=min(lengths), bos=tokenizer.bos_token_id)
    results: dict[str, Any] = {"retrieval": {}, "samples": samples, "books": len(texts)}
    table = Table(title="dense model, greedy exact match")
    for column in ("task", *(f"{length:,}" for length in lengths)):
        table.add_column(column)
    for task in TASKS:
        row = {}
        for length in lengths:
            started = time.perf_counter()
            right, asked = _retrieval(model, tokenizer, texts, task, length, samples, max(1, batch_tokens // length), device)
            share = right / asked
            row[str(length)] = {"exact": share, "error": math.sqrt(share * (1 - share) / asked), "questions": asked, "seconds": time.perf_counter() - started}
        results["retrieval"][task] = row
        table.add_row(task, *(f"{100 * r['exact']:.1f} ± {100 * r['error']:.1f}" for r in row.values()))
    results["loss"] = _loss_by_position(model, tokenizer, texts, max(lengths[0], 1024), batch_tokens, device)
    Console().print(table, results["loss"])
    return results


def _retrieval(
    model: Any, tokenizer: Any, texts: list[np.ndarray], task: str, length: int, samples: int, rows: int, device: str
) -> tuple[int, int]:
    generator = TaskGenerator(tokenizer, texts, split="test", seed=length)
    per_sample = 1 if task == "single" else QUESTIONS
    right = asked = 0
    while asked < samples:
        batch = [generator.sample(task, length, per_sample) for _ in range(min(rows, -(-(samples - asked) // per_sample)))]
        ids = torch.from_numpy(np.stack([sample.input_ids for sample in batch])).to(device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for i, sample in enumerate(batch):
            for question in sample.questions:
                places = torch.tensor([p for a, b in question.answers for p in range(a, b)], device=device)
                predicted = model.lm_head(hidden[i, places - 1]).argmax(-1)
                right += int((predicted == ids[i, places]).all())
                asked += 1
    return right, asked


def _loss_by_position(model: Any, tokenizer: Any, texts: list[np.ndarray], length: int, batch_tokens: int, device: str, windows: int = 128) -> dict[str, Any]:
    """Mean loss of positions 1-2K, of the last half and of the last quarter of ``length`` tokens; errors over windows."""
    rng = np.random.default_rng(0)
    rows = max(1, batch_tokens // length)
    per_window: list[np.ndarray] = []
    while len(per_window) < windows:
        starts = [(t := texts[int(rng.integers(len(texts)))], int(rng.integers(0, len(t) - length + 1))) for _ in range(rows)]
        ids = np.stack([np.concatenate([[tokenizer.bos_token_id], t[s : s + length - 1]]) for t, s in starts]).astype(np.int64)
        tensor = torch.from_numpy(ids).to(device)
        hidden = model.model(input_ids=tensor, use_cache=False).last_hidden_state
        for h, row in zip(hidden, tensor, strict=True):
            parts = [
                torch.nn.functional.cross_entropy(model.lm_head(h[i : min(i + 4096, length - 1)]).float(), row[i + 1 : min(i + 4096, length - 1) + 1], reduction="none")
                for i in range(0, length - 1, 4096)
            ]
            per_window.append(torch.cat(parts).cpu().numpy())
    losses = np.stack(per_window)
    early, late = losses[:, 1024:2048].mean(1), losses[:, length // 2 :].mean(1)
    difference = early - late
    return {
        "length": length,
        "windows": len(losses),
        "mean_loss_1k_2k": float(early.mean()),
        "mean_loss_last_half": float(late.mean()),
        "difference": float(difference.mean()),
        "difference_error": float(difference.std(ddof=1) / math.sqrt(len(difference))),
        "perplexity": float(np.exp(losses.mean())),
        "perplexity_last_quarter": float(np.exp(losses[:, -length // 4 :].mean())),
    }


def draw_curves(log: Path, picture: Path) -> None:
    """Losses of answers, copies and text, and the context, over training time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    for name, colour in (("answers", "#D55E00"), ("copies", "#0072B2"), ("text", "#444444")):
        points = [(line["elapsed"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), ".", markersize=2, alpha=0.35, color=colour)
        smooth = np.convolve([y for _, y in points], np.ones(9) / 9, "valid")
        axis.plot([x for x, _ in points][4:-4], smooth, color=colour, label=f"loss of {name}")
    shown = None
    for line in lines:
        if line["context"] != shown:
            shown = line["context"]
            axis.axvline(line["elapsed"], color="#bbbbbb", linewidth=0.8)
            axis.text(line["elapsed"], axis.get_ylim()[1], f" {shown:,}", va="top", fontsize=8, color="#666666")
    axis.set(xlabel="seconds of training (grey lines: context grows)", ylabel="loss (nats a token)", ylim=(0, None))
    axis.legend(frameon=False)
    figure.savefig(picture, dpi=130)
