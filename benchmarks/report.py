"""docs/performance.md from the results files: every number beside its target, and plots. Nothing is measured here.

    python -m benchmarks.report                     # from benchmarks/results to docs/performance.md
    python -m benchmarks.report --add FOLDER        # first add the results files of a folder (of another machine)

A target without a result says "not measured yet". Remarks on what was missed and why go into
``benchmarks/results/<device>/notes.md``, which is taken over as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seerattention.cli.common import Terminal
from seerattention.evaluate.figures import line_figure
from seerattention.evaluate.tables import Table, format_length
from seerattention.files import write_file

from .command import as_asked, case_of, fits, form_of, gib, make_table, metric, speedup, tokens, trained_gates
from .registry import OPS
from .results import ROOT, latest_results, merge_folder, own_arguments
from .targets import TARGETS, Target

_DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
_STATED_FOR = "h200"  # the device of the targets
_NOT_MEASURED = "not measured yet"
_BENCHMARKS = (*OPS, "e2e", "distill")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT)
    parser.add_argument("--document", type=Path, default=_DOCUMENT, help="plots go into a folder of its name")
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="folders with results files to add first")
    options = parser.parse_args(own_arguments() if arguments is None else arguments)
    terminal = Terminal()
    for folder in options.add:
        for changed in merge_folder(folder, options.results):
            terminal.say(f"added to {changed}")
    write_file(options.document, build(options.results, options.document.with_suffix("")))
    terminal.say(f"written to {options.document}")
    return 0


def build(root: Path, plots: Path) -> str:
    """The document; plots are written into their folder."""
    parts = [
        "# Performance",
        "Made from `benchmarks/results/` by `python -m benchmarks.report`; do not edit. Every results file names the "
        "machine and the versions; `python -m benchmarks.run --help` says how times are taken. TFLOP/s count the tiles "
        "that are visited, the diagonal tile once.",
    ]
    gpus = [path.name for path in sorted(root.iterdir()) if path.is_dir() and path.name != "cpu" and _measured(path)]
    for device in sorted(gpus or [_STATED_FOR], key=lambda name: (name != _STATED_FOR, name)):
        parts += _gpu(root / device, plots)
    if gpus and _STATED_FOR not in gpus:
        parts += [f"## {_STATED_FOR.upper()}", f"The GPU that the targets were stated for: {_NOT_MEASURED}."]
        parts += _notes(root / _STATED_FOR)
    parts += _cpu(root / "cpu")
    return "\n\n".join(parts) + "\n"


def _measured(folder: Path) -> bool:
    return any((folder / f"{benchmark}.json").exists() for benchmark in _BENCHMARKS)


def _gpu(folder: Path, plots: Path) -> list[str]:
    results = {benchmark: latest_results(folder, benchmark) for benchmark in _BENCHMARKS}
    parts = [f"## {folder.name.upper()}"]
    facts = [result["environment"] for found in results.values() for result in found]
    if facts:
        parts.append(f"{_describe(facts[-1])}. Files: `benchmarks/results/{folder.name}/`.")
    rows = [_target_row(target, results[target.benchmark]) for target in TARGETS]
    caption = (
        "One run, bfloat16, batch 1, 32 query and 8 KV heads, head_dim 128 unless said, blocks of 64, a random list "
        "per query head. Targets were stated for an H200."
    )
    parts += _markdown(Table(["what", "target", "measured", ""], rows, caption))
    parts += _notes(folder)
    for name in ("block_sparse_attention", "chunk_attention"):
        if results[name]:
            parts += [f"### {name}", *_markdown(_attention_table(results[name]))]
    parts += _plots(folder.name, results, plots)
    if results["e2e"]:
        parts += ["### Time to first token", *_markdown(_e2e_table(results["e2e"]))]
    if results["distill"]:
        parts += ["### Distillation", *_markdown(_distill_table(results["distill"]))]
    return parts


def _target_row(target: Target, results: Sequence[dict[str, Any]]) -> list[str]:
    result = target.find(results)
    if result is None:
        return [target.text, target.wanted(), _NOT_MEASURED, ""]
    value = result["metrics"][target.metric]
    remarks = ["met" if target.met(value) else "**missed**"]
    if "dense_kernel" in result["metrics"] and "dense" in target.text and "cuDNN" not in target.text:
        remarks.append(f"against {result['metrics']['dense_kernel']}")
    layers, whole = result["case"].get("layers"), result.get("whole_layers")
    if layers != whole:
        remarks.append(f"scaled from {layers} of {whole} layers")
    return [target.text, target.wanted(), target.show(value), ", ".join(remarks)]


def _attention_table(results: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for result in results:
        case, found = result["case"], result["implementations"]
        ours = found.get("ours: automatic")
        dense = min(
            (key for key in found if key.startswith("dense: ")), key=lambda key: found[key]["median_s"], default=None
        )
        rivals = [found.get(f"rival: FlexAttention {size}") for size in (64, 128)]
        tokens = format_length(case["keys"])
        rows.append(
            [
                tokens if case["queries"] == case["keys"] else f"{format_length(case['queries'])} on {tokens}",
                f"{case['heads']}/{case['kv_heads']} x {case['head_dim']}, {case['dtype']}",
                case["lists"],
                "" if ours is None else f"{ours['density']:.3f}",
                *(["refused", ""] if ours is None else [_milliseconds(ours), f"{ours['tflops']:.4g}"]),
                "" if dense is None else f"{_milliseconds(found[dense])} ({dense.removeprefix('dense: ')})",
                "" if dense is None or ours is None else f"{found[dense]['median_s'] / ours['median_s']:.2f}x",
                *("" if rival is None else f"{rival['tflops']:.4g}" for rival in rivals),
            ]
        )
    headers = [
        "tokens", "heads x head_dim", "lists", "density", "ours, ms", "TFLOP/s", "fastest dense, ms", "speed-up",
        "FlexAttention 64, TFLOP/s", "FlexAttention 128, TFLOP/s",
    ]  # fmt: skip
    return Table(headers, rows)


def _e2e_table(results: Sequence[dict[str, Any]]) -> Table:
    columns = [
        ("model shape", _model_shape),
        ("tokens", tokens),
        ("gates", form_of),
        ("density", metric("density", ".3f")),
        ("run", as_asked),
        ("dense, ms", metric("dense_s", ".4g", 1e3)),
        ("sparse, ms", metric("sparse_s", ".4g", 1e3)),
        ("speed-up", speedup),
        ("peak GiB", lambda result: gib(result["sparse"]["peak_bytes"])),
    ]
    caption = "'As shipped' is with the default `min_context`, below which prompts run dense."
    return make_table(results, columns, caption)


def _distill_table(results: Sequence[dict[str, Any]]) -> Table:
    columns = [
        ("model shape", _model_shape),
        ("gates", trained_gates),
        ("tokens", tokens),
        ("rows", case_of("rows", "g")),
        ("GPUs", lambda result: str(result["case"].get("gpus", 1))),
        ("tokens/s", metric("tokens_per_s", ".0f")),
        ("extra ms a layer", metric("layer_extra_s", ".3g", 1e3)),
        ("step / forward", metric("step_over_forward", ".2f")),
        ("peak GiB", lambda result: gib(result["metrics"].get("peak_bytes"))),
        ("fits 24 GB", fits),
    ]
    caption = (
        "One step with one prompt on each GPU; memory is of each; 'rows' is the share of query-block rows in the loss."
    )
    return make_table(results, columns, caption)


def _model_shape(result: dict[str, Any]) -> str:
    case = result["case"]
    whole = case["layers"] == result["whole_layers"]
    return str(case["model"]) + ("" if whole else f", from {case['layers']} layers")


def _notes(folder: Path) -> list[str]:
    """What was written by hand about the results of a device."""
    notes = folder / "notes.md"
    return [notes.read_text(encoding="utf-8").strip()] if notes.exists() else []


def _cpu(folder: Path) -> list[str]:
    parts = ["## CPU", *_notes(folder)]
    results = latest_results(folder, "block_sparse_attention")
    if results:
        parts += [f"{_describe(results[-1]['environment'])}.", *_markdown(_attention_table(results))]
    first = folder / "attention.json"
    if first.exists():
        parts += _first_cpu_results(json.loads(first.read_text()))
    return parts if len(parts) > 1 else [*parts, f"{_NOT_MEASURED.capitalize()}."]


def _first_cpu_results(data: dict[str, Any]) -> list[str]:
    """``cpu/attention.json``, measured before results files had runs; the command in ``run.py`` measures it anew."""
    machine, shape = data["machine"], data["shape"]
    rows = []
    for result in data["results"]:
        dense = min(result["dense_s"].values())
        # Of the two dtypes the slower one counts: it must still win against the fastest dense one.
        slower = [max(result["sparse_s"][name].values()) for name in ("cpu_flex", "cpu_gathered")]
        cells = [f"{1e3 * seconds:.0f} ({dense / seconds:.1f}x)" for seconds in slower]
        rows.append(
            [format_length(result["tokens"]), result["lists"], f"{result['density']:.3f}", f"{1e3 * dense:.0f}", *cells]
        )
    caption = (
        f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}, "
        f"{shape['heads']}/{shape['kv_heads']} heads x {shape['head_dim']}; `benchmarks/results/cpu/attention.json`. "
        "Dense is the fastest SDPA of float32 and bfloat16, sparse the slower of the two dtypes."
    )
    headers = ["tokens", "lists", "density", "dense, ms", "FlexAttention, ms", "gathered, ms"]
    return _markdown(Table(headers, rows, caption))


def _plots(device: str, results: dict[str, list[dict[str, Any]]], plots: Path) -> list[str]:
    """Plots of what was measured at two lengths or more."""
    made = []
    rates: dict[str, dict[float, float]] = {}
    for result in results["block_sparse_attention"]:
        case = result["case"]
        if (case["head_dim"], case["lists"], case["density"]) != (128, "random", 0.1):
            continue
        for key, numbers in result["implementations"].items():
            rates.setdefault(key.removeprefix("rival: "), {})[case["keys"]] = numbers["tflops"]
    made += _plot(
        f"{device}-attention", "Rates at density 0.1, random lists.", rates, "TFLOP/s of visited tiles", plots
    )
    speeds: dict[str, dict[float, float]] = {}
    for result in results["e2e"]:
        case = result["case"]
        if case["min_context"] == "0":
            gates = f", {case['form']}" if "form" in case else ""
            name = f"{case['model']}, density {case['density']:g}{gates}"
            speeds.setdefault(name, {})[case["length"]] = result["metrics"]["speedup"]
    made += _plot(f"{device}-prefill", "Time to first token.", speeds, "times faster than dense", plots)
    return made


def _plot(name: str, text: str, series: dict[str, dict[float, float]], label: str, plots: Path) -> list[str]:
    lengths = sorted({length for points in series.values() for length in points})
    if len(lengths) < 2:
        return []
    lines = {
        key: (sorted(points), [points[length] for length in sorted(points)], None) for key, points in series.items()
    }
    ticks = {length: format_length(int(length)) for length in lengths}
    figure = line_figure(lines, x_label="tokens", y_label=label, log_x=True, x_ticks=ticks)
    plots.mkdir(parents=True, exist_ok=True)
    figure.savefig(plots / f"{name}.png", dpi=100)
    return [f"![{text}]({plots.name}/{name}.png)"]


def _describe(facts: dict[str, Any]) -> str:
    versions = facts["versions"]
    device = facts["devices"][0]["name"] if facts["devices"] else f"{facts['processor']}, {facts['threads']} threads"
    parts = [device, f"torch {versions['torch']}", f"triton {versions['triton']}"]
    if facts["driver"]:
        parts.append(f"driver {facts['driver']}")
    if facts["git_commit"]:
        parts.append(f"commit {facts['git_commit'][:12]}")
    return ", ".join(parts)


def _milliseconds(numbers: dict[str, Any]) -> str:
    return f"{1e3 * numbers['median_s']:.4g}"


def _markdown(table: Table) -> list[str]:
    """A table and its caption as paragraphs."""
    text = table.markdown(numbers=False).rstrip()
    return [text, table.caption] if table.caption else [text]


if __name__ == "__main__":
    sys.exit(main())
