"""What the demo measured, as one table and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluate.environment import environment, machine_name
from ..evaluate.figures import bar_figure, line_figure
from ..evaluate.maps import draw_maps, draw_recall
from ..evaluate.report import Report
from ..evaluate.retrieval import retrieval_table
from ..evaluate.tables import Table, format_density, format_length, format_percent, with_error
from ..measure.kept import RECALLS, SHOWN, SHOWN_SAYS
from .demo import NO_COMMITTED
from .demo_compare import compared_table
from .demo_job import RECALL_DENSITY, DemoResult
from .demo_plan import DemoPlan

__all__ = ["build_report", "demo_to_dict", "recall_table", "result_table"]

_TASK_TEXTS = {
    "single": "a named number hidden in a book is asked for.",
    "multikey": "one of many named numbers hidden in a book is asked for; names were never used in training.",
    "keyvalue": "the value of one key of a long JSON dictionary is asked for.",
}


def result_table(result: DemoResult, plan: DemoPlan) -> Table:
    """The one table: density, time, quality, one row a setting."""
    dense = result.timing[0]
    rows = []
    for timing, retrieval, perplexity in zip(result.timing, result.retrieval, result.perplexity, strict=True):
        rows.append(
            [
                timing.setting,
                format_density(perplexity.density),
                f"{timing.median:.2f} s",
                f"{dense.median / timing.median:.2f}x",
                with_error(*perplexity.last_quarter()),
                *(format_percent(retrieval.accuracy([task]), retrieval.standard_error(task)) for task in plan.tasks),
            ]
        )
    questions = {task: retrieval.correct[task].size for task in plan.tasks}
    caption = (
        f"Prompts of {format_length(plan.length)} tokens{_of_tasks(plan)}. Prefill: median of "
        f"{len(dense.seconds)}, whole model. Perplexity: last quarter of "
        f"{result.rounds} {_plural('document', result.rounds)}, lower is better. Retrieval: share of "
        + ", ".join(f"{count} {task}" for task, count in questions.items())
        + " questions answered exactly (teacher forcing). Every row of attention is sparse. ± is a standard error over "
        + f"{result.samples} {_plural('sample', result.samples)}, or as many documents as there are"
        + (" (none from a single one)." if result.rounds == 1 else "; few make it rough.")
    )
    headers = ["setting", "density", "prefill", "speed", "perplexity", *plan.tasks]
    return Table(headers, rows, caption)


def recall_table(result: DemoResult) -> Table:
    """Block recall of every kind of gates, averaged over the layers."""
    before, after = result.fresh_recall()
    recall = {"fresh gates, before distillation": before, f"fresh gates, after {len(result.history.loss)} steps": after}
    if result.committed_recall:
        recall["committed gates"] = list(result.committed_recall.values())
    recall["true block maxima (oracle)"] = list(result.oracle_recall.values())
    history = result.history.numbers.get(SHOWN) or [None]
    shown = [history[0], history[-1], *([result.shown.get("committed")] if result.committed_recall else [])]
    shown.append(result.shown.get("oracle"))
    rows = [
        [name, _mean(values), f"{min(values):.3f}", "-" if number is None else f"{number:.3f}"]
        for (name, values), number in zip(recall.items(), shown, strict=True)
    ]
    caption = (
        f"Block recall at density {RECALL_DENSITY:g}: share of the true attention mass inside the selected blocks, on "
        "held-out text, half of it a retrieval task. Gates learn to predict the block maxima that the oracle knows: it "
        "shows what can be reached, not 1 (a maximum is not a sum, so it may be passed a little). Most of the mass is "
        "in the first block and in neighbours, which untrained gates find, too: what they learn shows in retrieval. "
        f"{RECALLS[SHOWN].capitalize()}: {SHOWN_SAYS}."
    )
    return Table(["gates", "mean recall", "worst layer", RECALLS[SHOWN]], rows, caption)


def demo_to_dict(result: DemoResult, plan: DemoPlan, seed: int) -> dict[str, Any]:
    """Every number, for JSON."""
    before, after = result.fresh_recall()
    return {
        "model": plan.model,
        "length": plan.length,
        "task_length": plan.task_length,
        "seed": seed,
        "rounds": result.rounds,
        "samples": result.samples,
        "seconds": result.seconds,
        "distillation": {
            "steps": len(result.history.loss),
            "tokens": result.history.tokens,
            "seconds": result.history.seconds,
            "loss": result.history.loss,
            "recall_density": RECALL_DENSITY,
            "recall_before": before,
            "recall_after": after,
            "recall_committed": list(result.committed_recall.values()),
            "recall_oracle": list(result.oracle_recall.values()),
            "numbers": result.history.numbers,
            SHOWN: result.shown,
        },
        "timing": [item.to_dict() for item in result.timing],
        "retrieval": [item.to_dict() for item in result.retrieval],
        "perplexity": [item.to_dict() for item in result.perplexity],
        "comparison": result.compared.to_dict(),
        "environment": environment(),
    }


def build_report(result: DemoResult, plan: DemoPlan, *, seed: int, device: str, fast: bool) -> Report:
    """The whole page."""
    length = format_length(plan.length)
    report = Report(
        "SeerAttention at work",
        f"Learned block-sparse attention on a small language model ({plan.model}), measured on this machine with "
        f"prompts of {length} tokens{_of_tasks(plan)}.",
    )
    _headline(report, result, plan)
    if fast:
        report.section("A smoke test")
        report.text(
            "This report was made with --fast: a few steps, short prompts, a question or two. Its numbers mean "
            "little; run seer demo."
        )

    report.section("What was saved, and what it cost")
    report.text(
        "Attention compares every token with every earlier one. Here small gates predict which 64 x 64 blocks of that "
        "comparison matter, and only "
        "those are computed. The model itself is frozen. 'Fresh' gates were distilled a moment ago on this machine, in "
        f"{len(result.history.loss)} steps on {format_length(result.history.tokens)} tokens; "
        + (
            "'committed' gates come with the package and were trained for far longer, so expect the fresh ones to be "
            "weaker; "
            if result.committed_recall
            else NO_COMMITTED.format(model=plan.model) + " "
        )
        + "'untrained' gates are the fresh ones before distillation. 'Default' is the rule that is stored "
        "with the gates, or the one that fresh gates get; a number is the density that was asked for (spent by "
        "budgets where gates have them, else by top-k selection), that after top-p the share of the predicted "
        "attention that is kept."
    )
    table = result_table(result, plan)
    report.table(table, strong=[0])
    report.definitions(
        [
            (
                "density",
                "selected blocks / all causal blocks, over every layer, head and row; 1 is dense. Rounding up on "
                "short rows puts it a little above the one asked for.",
            ),
            (
                "prefill",
                "wall time from the prompt's tokens to the logits of the next token, through the whole model; "
                "settings interleaved, compilation kept out.",
            ),
            (
                "perplexity",
                "of held-out books in the last quarter of the prompt, where most context lies behind; lower is better.",
            ),
            *((task, _TASK_TEXTS[task]) for task in plan.tasks),
        ]
    )
    report.figures(_result_figures(result, plan))

    report.section("Distilling fresh gates")
    report.text(
        "The gates learn from the model's own attention map, max-pooled per block; no labels, no gradient through the "
        "model. Block recall says how much "
        "of the true attention the selected blocks hold."
    )
    report.table(recall_table(result), strong=[2 if result.committed_recall else 1])
    report.figures(_distillation_figures(result))

    report.section("What a few heads look at")
    report.text(
        "The three heads that look farthest, in a prompt with many keys. Left: the true map, max-pooled per block. "
        f"Middle: what the {_main_kind(result)} gate "
        f"predicts from pooled queries and keys. Right: the blocks that are read at density {RECALL_DENSITY:g}, "
        "coloured by the true map."
    )
    block_size = result.inspection.block_size
    report.figure(
        draw_maps(result.maps, block_size), alt="true attention map, gate prediction and selected blocks of three heads"
    )
    report.figure(
        draw_recall(result.inspection.recall),
        caption="Block recall in per cent of every head in the same prompt; each layer sees what the sparse layers "
        "before it produced.",
        alt="block recall of each layer and head",
    )

    report.section("Against training-free methods")
    report.table(compared_table(result.compared))

    report.section("How it was measured")
    report.text(
        f"Retrieval: {result.samples} {_plural('sample', result.samples)} of each task with {plan.questions} questions "
        "each, exact match by teacher forcing (one forward of a sample serves all its questions; seer eval generates "
        "the answers instead), the same samples for every row. "
        f"Perplexity: {result.rounds} {_plural('document', result.rounds)} from books held out from training. The "
        "number of samples is what the time allowed; seer eval measures "
        "with as many as you like. Question and answer rows are as sparse as all others: no last blocks are kept dense."
    )
    report.table(retrieval_table(result.retrieval))
    report.definitions(
        [
            *_facts(device, seed),
            *((f"seconds for {name}", f"{seconds:.0f}") for name, seconds in result.seconds.items()),
        ]
    )
    return report


def _headline(report: Report, result: DemoResult, plan: DemoPlan) -> None:
    chosen = 1 + plan.headline
    dense, timing = result.timing[0], result.timing[chosen]
    perplexity = result.perplexity
    report.headline(
        [
            (
                format_density(result.perplexity[chosen].density),
                f"of attention computed ({timing.setting})",
            ),
            (f"{dense.median / timing.median:.2f}x", f"prefill speed: {dense.median:.2f} s to {timing.median:.2f} s"),
            (f"{perplexity[chosen].last_quarter()[0]:.2f}", f"perplexity, dense {perplexity[0].last_quarter()[0]:.2f}"),
            (
                format_percent(result.retrieval[chosen].accuracy()),
                f"retrieval, dense {format_percent(result.retrieval[0].accuracy())}",
            ),
        ]
    )


def _result_figures(result: DemoResult, plan: DemoPlan) -> list[tuple[Any, str, str]]:
    committed = slice(1, 1 + (len(plan.committed) if result.committed_recall else 0))
    fresh = slice(committed.stop, committed.stop + len(plan.fresh))
    groups = {"committed gates": committed, "fresh gates": fresh, "untrained gates": slice(fresh.stop, None)}

    def series(results: Sequence[Any], values: list[float]) -> dict[str, tuple[list[float], list[float], None]]:
        return {
            name: ([item.density for item in results[part]], values[part], None)
            for name, part in groups.items()
            if values[part]
        }

    accuracy = [100 * item.accuracy() for item in result.retrieval]
    added = [item.loss_increase(result.perplexity[0], plan.length * 3 // 4)[0] for item in result.perplexity]
    buckets = result.perplexity[0].buckets()
    smallest = max(committed.stop - 1, 0)
    by_position = {
        result.perplexity[i].setting: (
            [float(stop) for _, stop in buckets],
            [result.perplexity[i].loss(*bucket)[0] for bucket in buckets],
            None,
        )
        for i in dict.fromkeys((0, smallest, fresh.stop - 1))
    }
    return [
        (
            bar_figure(
                [_short(item.setting) for item in result.timing],
                {"prefill": [item.median for item in result.timing]},
                x_label="",
                y_label="seconds",
            ),
            "Prefill time (median).",
            "prefill time of each setting",
        ),
        (
            line_figure(
                series(result.retrieval, accuracy),
                x_label="density",
                y_label="retrieval, %",
                reference=("dense", accuracy[0]),
                y_limits=(-3, 103),
            ),
            "Retrieval accuracy, mean of the tasks.",
            "retrieval accuracy over density",
        ),
        (
            line_figure(
                series(result.perplexity, added),
                x_label="density",
                y_label="added loss, nats",
                reference=("dense", 0.0),
            ),
            "Loss added in the last quarter of the prompt.",
            "added loss over density",
        ),
        (
            line_figure(
                by_position,
                x_label="position in the prompt",
                y_label="loss, nats",
                log_x=True,
                x_ticks={float(stop): format_length(stop) for _, stop in buckets},
            ),
            "Loss by position: it should keep falling as context grows.",
            "loss by position",
        ),
    ]


def _distillation_figures(result: DemoResult) -> list[tuple[Any, str, str]]:
    loss = result.history.loss
    before, after = result.fresh_recall()
    layers = [float(layer) for layer in result.oracle_recall]
    recall = {"committed": list(result.committed_recall.values())} if result.committed_recall else {}
    recall |= {"fresh, after": after, "fresh, before": before}
    recall["oracle"] = list(result.oracle_recall.values())
    return [
        (
            line_figure(
                {"loss": ([float(i + 1) for i in range(len(loss))], loss, None)},
                x_label="step",
                y_label="KL to the pooled map",
            ),
            "Distillation loss, mean over layers.",
            "distillation loss",
        ),
        (
            line_figure(
                {name: (layers, values, None) for name, values in recall.items()},
                x_label="layer",
                y_label=f"block recall at {RECALL_DENSITY:g}",
            ),
            "Block recall by layer.",
            "block recall by layer",
        ),
    ]


def _of_tasks(plan: DemoPlan) -> str:
    """What to say where retrieval has prompts of another length."""
    return "" if plan.task_length == plan.length else f" ({format_length(plan.task_length)} for retrieval)"


def _main_kind(result: DemoResult) -> str:
    return "committed" if result.committed_recall else "fresh"


def _facts(device: str, seed: int) -> list[tuple[str, str]]:
    facts = environment()
    machine = machine_name(facts) if device.startswith("cuda") else facts["processor"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return [
        ("device", f"{device} ({machine}, {facts['threads']} threads)"),
        ("versions", versions),
        ("git commit", facts["git_commit"] or "not a source checkout"),
        ("seed", str(seed)),
    ]


def _short(setting: str) -> str:
    return setting.replace(" gates, ", "\n")


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
