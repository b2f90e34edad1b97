"""The model card, and the folder that the package embeds: every number comes from the files of the run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seerattention.evaluate.tables import Table, with_error
from seerattention.files import pack, packed_path, write_file
from seerattention.gates.checkpoint import read_checkpoint, write_checkpoint
from seerattention.gates.sources import notes_of
from seerattention.tasks import MIXES

from .evaluate import draw_curves
from .look_up import best_heads, verdict

#: Greedy exact match at ``HARD_LENGTH`` tokens that a testbed model has to reach.
HARD_LINE = {"single": 0.97, "multikey": 0.97, "keyvalue": 0.95}
HARD_LENGTH = "16384"
WEIGHTS = "model.safetensors"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
GATES = ("README.md", "gate_config.json", "gates.safetensors")
_PHASE = ("context", "share", "most", "until", "tokens", "rate", "tasks", "drills", "reach", "steered", *MIXES)
#: How answers were got; results of earlier versions do not say it.
_HOW = {
    "generate": "answers are generated greedily from the prompt before them",
    "teacher_forcing": "the right answers are part of the prompt (teacher forcing)",
}
#: Beside the weights: the stages of training that made them, for a run that trains the model on.
STAGES = "training.json"

HEADER = """---
license: mit
library_name: transformers
tags: [llama, long-context, testbed]
---

# seerattention-testbed

A small Llama, trained from scratch in minutes, that looks things up in long texts: a real attention map to test sparse
attention on. It has no other use. Load it with `seerattention.testbed.load()`, or with `AutoModelForCausalLM` from
`seerattention.testbed.model_path()`: in the package the weights are compressed without loss (`model.safetensors.xz`).
The recipe is the folder `testbed/` of the repository: `python -m testbed all --help`.

![Losses over training time](curves.png)
"""


def package(out: Path, target: Path, sparse: Iterable[Path] = (), *, packed: bool = False) -> None:
    """Copy model, tokenizer and gates of the run ``out`` into ``target/model`` and ``target/gates``, with the card.

    Weights of gates are compressed without loss on the way.

    Args:
        out: folder of a run that was trained, evaluated and whose gates were distilled.
        target: the embedded folder; what it held of the same names is replaced.
        sparse: ``results.json`` files of ``seer eval``, for the card.
        packed: compress the model's weights, too, as the package has them. Only its loader unpacks them.

    Raises:
        FileNotFoundError: a step of the run is missing.
    """
    sources = [(out / "model" / name, target / "model" / name) for name in CONFIGS]
    sources += [(out / name, target / "model" / name) for name in TOKENIZER]
    weights, plain = out / "model" / WEIGHTS, target / "model" / WEIGHTS
    needed = [weights, *(source for source, _ in sources), *(out / "gates" / name for name in GATES)]
    needed += [out / "summary.json", out / "dense.json", out / "log.jsonl"]
    missing = [str(path.relative_to(out)) for path in needed if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{out} lacks {', '.join(missing)}; train, evaluate and distil the gates first")
    for source, copy in sources:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    if packed:
        write_file(packed_path(plain), pack(weights.read_bytes()))
        plain.unlink(missing_ok=True)  # it would be taken instead
    else:
        shutil.copyfile(weights, plain)
        packed_path(plain).unlink(missing_ok=True)
    write_checkpoint(target / "gates", read_checkpoint(out / "gates"), packed=True, notes=notes_of(out / "gates"))
    draw_curves(out / "log.jsonl", target / "model" / "curves.png")
    results = [json.loads(path.read_text()) for path in sparse]
    read = {name: _read(out / f"{name}.json") for name in ("summary", "dense", "data", "gates/history")}
    card = model_card(read["summary"], read["dense"], read["data"], read["gates/history"], results)
    (target / "model" / "README.md").write_text(card, encoding="utf-8")
    (target / "model" / STAGES).write_text(json.dumps(stages(read["summary"]), indent=1) + "\n", encoding="utf-8")


def stages(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that made a model, the last one last: seconds, steps, tokens and what of the settings a card tells."""
    train = summary["settings"]["train"]
    last = {name: summary[name] for name in ("elapsed", "step", "tokens")} | {"seed": _seed(summary)}
    last |= {name: train[name] for name in ("optimizer", "rate_scale", "decay_from", "look_up")}
    last["phases"] = [{name: phase[name] for name in _PHASE} for phase in train["phases"]]
    return [*summary.get("earlier", ()), last]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def model_card(
    summary: Mapping[str, Any],
    dense: Mapping[str, Any],
    data: Mapping[str, Any],
    history: Mapping[str, Any],
    sparse: Iterable[Mapping[str, Any]] = (),
) -> str:
    """The card's text, from ``summary.json``, ``dense.json``, ``data.json``, the gates' history and ``seer eval``."""
    parts = [HEADER, _training(summary, data), _dense(dense), _look_up(dense), _position(dense), _losses(summary)]
    parts += [_gates(history), _sparse(list(sparse))]
    return "\n".join(part for part in parts if part)


def _training(summary: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    model, train = summary["settings"]["model"], summary["settings"]["train"]
    rows = [
        ("layers, width, MLP width", f"{model['layers']}, {model['width']}, {model['mlp_width']}"),
        ("query heads, KV heads, head_dim", f"{model['heads']}, {model['kv_heads']}, {model['head_dim']}"),
        ("vocabulary", f"{model['vocab_size']:,} (byte-level BPE, numbers in groups of three digits)"),
        ("RoPE base, longest context", f"{model['rope_theta']:g}, {model['max_context']:,}"),
        ("training time, steps, tokens", f"{summary['elapsed']:.0f} s, {summary['step']:,}, {summary['tokens']:,}"),
        (
            "seed, optimiser, scale of long phases' rates",
            f"{_seed(summary)}, {train['optimizer']}, {train['rate_scale']}",
        ),
    ]
    for attempt in summary.get("given_up", ()):
        rows.append((f"given up: seed {attempt['seed']}", f"after {attempt['seconds']:.0f} s: {attempt['why']}"))
    for name, entry in data.items():
        rows.append((f"texts for {name}", f"{', '.join(entry['sources'])}; {entry['tokens'] / 1e6:.1f} M tokens"))
    text = "## Training\n\n" + Table(("setting", "value"), rows).markdown()
    made = stages(summary)
    if len(made) == 1:
        return text + "\n" + _phases(made[0])
    text += f"\nThe weights come from {len(made)} runs, each of which trained on those of the one before:\n"
    for number, stage in enumerate(made, 1):
        told = [f"{stage['elapsed']:.0f} s"]
        told += [f"{stage[name]:,} {word}" for name, word in (("step", "steps"), ("tokens", "tokens")) if name in stage]
        text += f"\nRun {number}: {', '.join(told)}. {stage.get('note', '')}\n\n{_phases(stage)}"
    return text


def _phases(stage: Mapping[str, Any]) -> str:
    mixes = [_mix(phase, stage) for phase in stage["phases"]]
    numbers = {mix: str(number) for number, mix in enumerate(dict.fromkeys(mixes), 1)}
    columns = ("context", "share of time", "at most", "tokens a step", "AdamW rate", "tasks", "drills", "mix")
    rows = [
        (
            f"{p['context']:,}",
            f"{p['share']}",
            f"{p.get('most') or ''}",
            f"{p['tokens']:,}",
            f"{p['rate']:g}",
            f"{p['tasks']}",
            f"{p['drills']}",
            numbers[mix],
        )
        for p, mix in zip(stage["phases"], mixes, strict=True)
    ]
    told = "".join(f"\nMix {number}: {mix}\n" for mix, number in numbers.items() if mix)
    steered = ", ".join(f"{p['context']:,}" for p in stage["phases"] if p.get("steered"))
    if steered and stage.get("look_up"):
        layers = ", ".join(map(str, stage["look_up"]))
        told += f"\nWhich layers see far in the phases of {steered} tokens: {layers}.\n"
    return Table(columns, rows).markdown() + told


def _mix(phase: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    """What a phase drew, as far as it is on record; older stages have one mix for all of their phases."""
    told = []
    for name in MIXES:
        mix = phase.get(name) or stage.get(name)
        if mix:
            told.append(f"{name.removesuffix('_mix')}s {', '.join(f'{kind} {share:g}' for kind, share in mix.items())}")
    return "; ".join(told) + "." if told else ""


def _seed(summary: Mapping[str, Any]) -> int:
    return summary.get("seed", summary["settings"]["train"]["seed"])


def _percent(entry: Mapping[str, float]) -> str:
    return f"{100 * entry['exact']:.1f} ± {100 * entry['error']:.1f}"


def _dense(dense: Mapping[str, Any]) -> str:
    retrieval: Mapping[str, Mapping[str, Any]] = dense.get("retrieval", {})
    lengths = sorted({length for row in retrieval.values() for length in row}, key=int)
    rows, misses = [], []
    unknown = [task for task in HARD_LINE if HARD_LENGTH not in retrieval.get(task, {})]
    for task, row in retrieval.items():
        bar = HARD_LINE.get(task)
        rows.append((task, *(_percent(row[n]) if n in row else "" for n in lengths), f"{100 * bar:.0f}" if bar else ""))
        if bar and HARD_LENGTH in row and row[HARD_LENGTH]["exact"] < bar:
            misses.append(f"{task} {100 * row[HARD_LENGTH]['exact']:.1f} % < {100 * bar:.0f} %")
    columns = ("task", *(f"{int(length):,} tokens" for length in lengths), "hard line at 16,384")
    verdict = f"**The model misses its hard line: {'; '.join(misses)}.**" if misses else "The hard line is met."
    if unknown:
        verdict = f"Whether the hard line is met is not known: not measured there: {', '.join(unknown)}."
    return (
        "## Retrieval, dense attention\n\nGreedy exact match in per cent, ± standard error, "
        f"at least {dense.get('samples')} questions a cell; keys and books were not used in training.\n\n"
        + Table(columns, rows).markdown()
        + f"\n{verdict}\n"
    )


def _look_up(dense: Mapping[str, Any]) -> str:
    found = dense.get("look_up")
    if not found:
        return ""
    rows = [(f"{layer}", f"{head}", f"{share:.3f}") for layer, (head, share) in enumerate(best_heads(found["mass"]))]
    said = verdict(found["mass"], found.get("wide"))
    return (
        "## Where it looks up\n\nShare of the attention of a question's last token that lies on the needle, in the "
        f"best head of each layer; mean of {found['samples']} samples of {found['length']:,} tokens, one needle.\n\n"
        + Table(("layer", "best head", "on the needle"), rows).markdown()
        + f"\n{f'**{said}**' if said.startswith('Warning') else said}\n"
    )


def _position(dense: Mapping[str, Any]) -> str:
    loss = dense.get("loss")
    if not loss:
        return "## Book text\n\nPerplexity at 16K and loss by position were not measured for this model.\n"
    better = loss["difference"] > loss["difference_error"]
    early = f"{loss['length'] // 16:,} to {loss['length'] // 8:,}"
    return (
        f"## Book text\n\nOver {loss['windows']} windows of {loss['length']:,} tokens of unseen books: perplexity "
        f"{loss['perplexity']:.2f}, in the last quarter {loss['perplexity_last_quarter']:.2f}. Mean loss of positions "
        f"{early} {loss['mean_loss_early']:.4f}, of the last half {loss['mean_loss_last_half']:.4f}: "
        f"{loss['difference']:.4f} ± {loss['difference_error']:.4f} lower"
        f"{'' if better else ', **which is not more than its standard error (hard line missed)**'}.\n"
    )


def _losses(summary: Mapping[str, Any]) -> str:
    chosen = ("answers", "copies", "text")
    rows = [(name, f"{value:.4f}") for name, value in summary.items() if name.split(" ")[0] in chosen]
    return "## Last training losses (nats a token)\n\n" + Table(("part", "loss"), rows).markdown()


def _gates(history: Mapping[str, Any]) -> str:
    if not history:
        return ""
    loss, learning = history["loss"], history.get("not_learning") or {}
    last = loss[-20:]
    text = (
        f"## Gates\n\nDistilled from the model in {len(loss)} steps, {history['tokens'] / 1e6:.1f} M tokens, "
        f"{history['seconds']:.0f} s; loss {loss[0]:.3f} at first, {sum(last) / len(last):.3f} at last (mean "
        f"of {len(last)} steps). Block recall at density {history['recall_density']} on unseen text and keys:\n\n"
    )
    rows = [(name, *(f"{value:.3f}" for value in (row[0], row[-1]))) for name, row in history["recall"].items()]
    text += Table(("layer", "before", "after"), rows).markdown()
    return text + (f"\nReported as not learning: {', '.join(learning)}.\n" if learning else "")


def _sparse(results: list[Mapping[str, Any]]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for entry in (entry for result in results for entry in result.get("retrieval", ())):
        row = cells.setdefault(f"{entry['setting']} at {entry['length']:,}", {"density": f"{entry['density']:.3f}"})
        for task, score in entry["tasks"].items():
            error = score["standard_error"]
            row[task] = with_error(100 * score["accuracy"], math.nan if error is None else 100 * error, ".1f")
    if not cells:
        return ""
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    rows = [(setting, *(row.get(name, "") for name in columns)) for setting, row in cells.items()]
    methods = {entry.get("method", "teacher_forcing") for result in results for entry in result.get("retrieval", ())}
    how = " and ".join(_HOW[method] for method in sorted(methods))
    heading = f"## Retrieval, sparse prefill\n\nEvery row of the prompts is sparse; {how} (`seer eval`).\n\n"
    return heading + Table(("setting", *columns), rows).markdown()
