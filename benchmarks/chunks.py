"""Whether prompts that are read in chunks are read as well as in one shot: answers and perplexity, dense and sparse.

    python -m benchmarks.chunks                                           # the embedded model, its own gates
    python -m benchmarks.chunks --lengths 16384 --chunks 2048 8192 1000 --count 256
    python -m benchmarks.chunks --device cpu --tiny                       # a rehearsal, in seconds

Answers are generated greedily, each from a prompt of its own, by transformers' ``generate(prefill_chunk_size=...)``;
documents are read in forwards of so many tokens on a cache. Sparse prompts are sparse in every row, at the gates'
budget for ``--density``; answers are decoded as the gates ship. Of each length of chunks, against one shot of the same
attention on the same prompts: the share of the answers that are the same to the last token, what is lost in points of
right answers with the standard error of the paired difference, and the ratio of the perplexities. Dense attention, for
which chunks change nothing but rounding, shows what rounding does to these numbers.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import seerattention as seer
from seerattention import hf
from seerattention.cli.common import Terminal, book_tokens, default_gates, open_data, resolve_device, spending
from seerattention.cli.opening import load_model
from seerattention.evaluate.forward import prompt_device
from seerattention.evaluate.generation import decode_greedily
from seerattention.evaluate.perplexity import cut_documents
from seerattention.evaluate.retrieval import make_samples
from seerattention.policies import Policy
from seerattention.tasks import TaskGenerator

from .command import Budget, Result, case_of, gated_case, gated_parser, make_table, metric, tokens
from .decode_accuracy import paired_loss
from .results import own_arguments, start_run

TASKS = ("single", "multikey", "keyvalue")
WAYS = ("dense", "sparse")
_ONE_SHOT = None
_QUESTIONS = 4  # of a sample that can have several
_SLICE = 1024  # positions whose logits are looked at together


@dataclass(frozen=True)
class Read:
    """What came of the prompts of one length, read in one way.

    Attributes:
        answers: task -> the tokens that were generated, int64 ``[N, n]``.
        right: task -> bool ``[N]``, right to the last token.
        losses: float64 ``[documents]``, mean nats a token.
        density: of the prompts of tasks, and of documents, decoding apart.
    """

    answers: dict[str, np.ndarray]
    right: dict[str, np.ndarray]
    losses: np.ndarray
    density: tuple[float, float]
    seconds: float


def make_prompts(
    generator: TaskGenerator, filling: np.ndarray, task: str, length: int, count: int
) -> tuple[Tensor, Tensor]:
    """Prompts of one length, int64 ``[count, T]``, T a little below ``length``, and their right answers ``[count, n]``.

    Questions stand at different places: what a prompt lacks of the longest one is filled in behind its first token,
    from ``filling``.
    """
    questions = 1 if task == "single" else _QUESTIONS
    found = [
        (sample.input_ids, start, stop)
        for sample in make_samples(generator, [task], length, -(-count // questions), questions)[task]
        for question in sample.questions
        for start, stop in question.answers
    ][:count]
    longest = max(start for _, start, _ in found)
    prompts = [np.concatenate([ids[:1], filling[: longest - start], ids[1:start]]) for ids, start, _ in found]
    answers = [ids[start:stop] for ids, start, stop in found]
    return torch.from_numpy(np.stack(prompts)), torch.from_numpy(np.stack(answers))


@torch.inference_mode()
def answers_to(
    model: nn.Module, prompts: Tensor, answers: Tensor, batch_size: int, chunk: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """What is said to each prompt, int64 ``[N, n]``, and whether all of it is right, bool ``[N]``."""
    device = prompt_device(model)
    made = [
        decode_greedily(model, batch.to(device), answers.shape[1], chunk=chunk).cpu()
        for batch in prompts.split(batch_size)
    ]
    said = torch.cat(made)
    return said.numpy(), (said == answers).all(-1).numpy()


@torch.inference_mode()
def document_losses(model: nn.Module, documents: Tensor, batch_size: int, chunk: int | None) -> np.ndarray:
    """Mean nats a token of each document ``[N, T]``, read in forwards of ``chunk`` tokens on a cache."""
    config: Any = model.config
    sums = []
    for batch in documents.split(batch_size):
        ids, cache = batch.to(prompt_device(model)), DynamicCache(config=config.get_text_config())
        total = torch.zeros(len(batch), dtype=torch.float64, device=ids.device)
        place = 0
        for part in ids.split(chunk or ids.shape[1], dim=1):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits
            wanted = ids[:, place + 1 : place + 1 + part.shape[1]]
            for told, token in zip(logits[:, : wanted.shape[1]].split(_SLICE, 1), wanted.split(_SLICE, 1), strict=True):
                losses = nn.functional.cross_entropy(told.float().transpose(1, 2), token, reduction="none")
                total += losses.double().sum(1)
            place += part.shape[1]
        sums.append(total.cpu() / (ids.shape[1] - 1))
    return torch.cat(sums).numpy()


@contextmanager
def _reading(model: nn.Module, way: str, gates: Any, policy: Policy) -> Iterator[None]:
    """Densely, or with gates of which every prompt is sparse."""
    if way == "dense":
        yield
        return
    hf.attach(model, gates, prefill=policy, min_context=0)
    try:
        yield
    finally:
        hf.detach(model)


def read(
    model: nn.Module,
    prompts: dict[str, tuple[Tensor, Tensor]],
    documents: Tensor,
    batch_size: int,
    chunk: int | None,
) -> Read:
    """Everything of one length, with the model as it is."""
    started, density = time.monotonic(), []
    attached = hf.is_attached(model)

    def counted(work: Any) -> Any:
        if not attached:
            density.append(1.0)
            return work()
        with seer.record(model) as stats:
            found = work()
        if not stats.sparse_calls:
            raise ValueError(f"chunks of {chunk} were not read sparsely: {stats.dense_reasons}")
        density.append(float(stats.prompt_density))
        return found

    found = counted(lambda: {task: answers_to(model, *pair, batch_size, chunk) for task, pair in prompts.items()})
    losses = counted(lambda: document_losses(model, documents, max(1, batch_size // 4), chunk))
    answers, right = ({task: pair[place] for task, pair in found.items()} for place in (0, 1))
    return Read(answers, right, losses, (density[0], density[1]), time.monotonic() - started)


def metrics_of(found: Read, one_shot: Read) -> dict[str, Any]:
    """The numbers of a case."""
    metrics: dict[str, Any] = {"density": found.density[0], "density_documents": found.density[1]}
    same = {task: (said == one_shot.answers[task]).all(-1) for task, said in found.answers.items()}
    for task, right in found.right.items():
        loss, error = paired_loss(one_shot.right[task], right)
        metrics |= {
            f"{task}_accuracy": float(right.mean()),
            f"{task}_same_answers": float(same[task].mean()),
            f"{task}_loss_points": loss,
            f"{task}_loss_standard_error": error,
        }
    mine, theirs = (np.concatenate([each.right[task] for task in found.right]) for each in (found, one_shot))
    metrics["loss_points"], metrics["loss_standard_error"] = paired_loss(theirs, mine)
    metrics["same_answers"] = float(np.concatenate(list(same.values())).mean())
    difference = found.losses - one_shot.losses
    metrics["perplexity"] = math.exp(found.losses.mean())
    metrics["perplexity_ratio"] = math.exp(difference.mean())
    metrics["largest_difference_of_a_document"] = float(np.abs(difference).max())  # nats a token
    return metrics | {"seconds": found.seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    terminal, device = Terminal(), torch.device(resolve_device(options.device))
    gates = options.gates or default_gates(options.model)
    policy = spending(gates, [options.density], terminal)[options.density]
    data = open_data(options.data, options.model)
    model, tokenizer = load_model(options.model, str(device), options.dtype)
    books = book_tokens(data, options.model, tokenizer, limit=max(16, options.documents + 1) * max(options.lengths))
    run = start_run("chunks", "benchmarks.chunks", given, device, options.output, options.tiny)
    budget = Budget(options.budget, terminal)
    cases = [
        (length, way, chunk) for length in options.lengths for way in WAYS for chunk in (_ONE_SHOT, *options.chunks)
    ]
    prepared: dict[int, Any] = {}
    one_shot: dict[tuple[int, str], Read] = {}
    for length, way, chunk in budget.of(cases, str):
        if length not in prepared:
            prepared[length] = _prompts(tokenizer, books, length, options)
        prompts, documents = prepared[length]
        with _reading(model, way, gates, policy):
            found = read(model, prompts, documents, options.batch_size, chunk)
        reference = one_shot.setdefault((length, way), found)
        case = {
            **gated_case(options, model),
            "length": length,
            "attention": way,
            "chunk": chunk,
            "asked_density": options.density if way == "sparse" else None,
            "answers": {task: len(right) for task, right in found.right.items()},
            "documents": len(documents),
        }
        metrics = metrics_of(found, reference)
        exact = {task: "".join(map(str, right.astype(int))) for task, right in found.right.items()}
        run.add(
            {"case": case, "metrics": metrics, "policy": policy.to_dict() if way == "sparse" else None, "exact": exact}
        )
        accuracy = ", ".join(f"{task} {100 * metrics[f'{task}_accuracy']:.1f} %" for task in TASKS)
        terminal.say(
            f"{length} tokens, {way}, {'one shot' if chunk is None else f'chunks of {chunk}'}: {accuracy}, perplexity "
            f"{metrics['perplexity']:.3f}, density {metrics['density']:.3f}, {found.seconds:.0f} s"
        )
    terminal.table(_table(run.results))
    terminal.say(f"written to {run.path}")
    return 0


def _prompts(
    tokenizer: Any, books: Sequence[np.ndarray], length: int, options: argparse.Namespace
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Of every task, and documents."""
    generator = TaskGenerator(tokenizer, books, split="test", seed=options.seed)
    prompts = {task: make_prompts(generator, books[0], task, length, options.count) for task in TASKS}
    return prompts, cut_documents(books, length, options.documents, bos=tokenizer.bos_token_id)


def _table(results: Sequence[Result]) -> Any:
    def chunk(result: Result) -> str:
        return "one shot" if result["case"]["chunk"] is None else str(result["case"]["chunk"])

    def lost(result: Result) -> str:
        loss, error = result["metrics"]["loss_points"], result["metrics"]["loss_standard_error"]
        return f"{loss:.2f}" + ("" if error is None else f" ± {error:.2f}")

    columns = [
        ("tokens", tokens),
        ("attention", case_of("attention")),
        ("chunks", chunk),
        ("density", metric("density", ".3f")),
        *((f"{task}, %", metric(f"{task}_accuracy", ".1f", 100)) for task in TASKS),
        ("lost, points", lost),
        ("the same, %", metric("same_answers", ".1f", 100)),
        ("perplexity", metric("perplexity", ".3f")),
        ("over one shot", metric("perplexity_ratio", ".5f")),
        ("seconds", metric("seconds", ".0f")),
    ]
    case = results[0]["case"]
    answers = ", ".join(f"{task} {count}" for task, count in case["answers"].items())
    caption = (
        f"Answers generated greedily ({answers}), and perplexity of {case['documents']} documents. Lost: points of all "
        "answers against one shot of the same attention, ± standard error of the paired difference; the same: answers "
        "that are one shot's to the last token."
    )
    return make_table(results, columns, caption)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = gated_parser("benchmarks.chunks", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384], help="tokens a prompt")
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 8192, 1000], help="tokens a forward")
    parser.add_argument("--count", type=int, default=256, help="answers of each task")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.lengths, options.chunks, options.count, options.documents = [1024], [256, 100], 4, 2
    for name in ("count", "documents", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if min(options.chunks) < 1:
        parser.error(f"--chunks must be at least 1 token, got {min(options.chunks)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
