"""What the commands of this folder share: options, a budget of time, tables of results, and whole models in turn."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from seerattention.cli.common import Terminal, resolve_device
from seerattention.evaluate.kernels import WrongResultError
from seerattention.evaluate.tables import Table, format_length

from .models import MODELS, build_model, num_layers
from .results import start_run

T = TypeVar("T")
Result = dict[str, Any]
Column = tuple[str, Callable[[Result], str]]  # header, and the cell of a result


def make_parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """The options of every command that measures."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=float, help="start no case after so many seconds")
    parser.add_argument("--output", type=Path, help="folder of results; default: results/<device>")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny inputs")
    return parser


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The option of commands that measure one dtype at a time."""
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))


def model_parser(module: str, text: str | None, check_length: int) -> argparse.ArgumentParser:
    """The options that benchmarks of whole models share."""
    parser = make_parser(module, text)
    add_dtype(parser)
    parser.add_argument("--model", nargs="+", default=["llama-3.1-8b"], choices=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a prompt")
    parser.add_argument("--layers", type=int, help="build so many layers and scale; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check-length", type=int, default=check_length, help="tokens of the check before any time")
    return parser


def gated_parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """The options that benchmarks of trained models with trained gates share."""
    parser = make_parser(module, text)
    parser.add_argument("--model", default="testbed", help="testbed, smollm2, a folder or a hub id")
    parser.add_argument("--gates", help="default: those that come with the model")
    parser.add_argument("--data", help="texts; default for testbed and smollm2: the testbed's books")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    return parser


def gated_case(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What a case says of the options of :func:`gated_parser`."""
    gates = "its own" if options.gates is None else options.gates
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": options.model, "gates": gates, "dtype": dtype, "seed": options.seed}


class Budget:
    """Seconds from now on, after which no case is started; None: no end."""

    def __init__(self, seconds: float | None, terminal: Terminal) -> None:
        self.seconds, self.terminal, self.started = seconds, terminal, time.monotonic()

    def of(self, cases: Iterable[T], name: Callable[[T], str], prefix: str = "") -> Iterator[T]:
        """The cases until it is spent; then says which is the first that is left out."""
        for case in cases:
            if self.seconds and time.monotonic() - self.started > self.seconds:
                spent = f"the budget of {self.seconds:g} s is spent; left out: {name(case)}"
                self.terminal.say(prefix + spent)
                return
            yield case


def release(device: torch.device) -> None:
    """Give cached memory back between cases, whose sizes differ by factors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class ModelBenchmark:
    """A benchmark of whole models: each is built, checked, and measured case by case.

    Attributes:
        name: of the results file and the module.
        lengths: tokens, where none are asked for.
        prepare: from a model just built, the one that is measured.
        check: of a model, its name and tokens: what the results say of it, and what the terminal does; raises
            ``WrongResultError``.
        cases: from options and lengths; the length is the first element of each.
        measure: the results of a case.
        table: of all results.
        silent: write and show nothing: what the other processes of one run do.
    """

    name: str
    lengths: Sequence[int]
    prepare: Callable[[Any], Any]
    check: Callable[[Any, str, int], tuple[Result, str]]
    cases: Callable[[argparse.Namespace, Sequence[int]], Sequence[tuple[Any, ...]]]
    measure: Callable[[str, Any, tuple[Any, ...], argparse.Namespace], Iterable[Result]]
    table: Callable[[Sequence[Result]], Table]
    silent: bool = False

    def run(self, given: Sequence[str], options: argparse.Namespace, dtype: torch.dtype) -> int:
        """Run; returns the exit status: 1 where a check failed."""
        terminal, device = Terminal(), torch.device(resolve_device(options.device))
        terminal.err.quiet = terminal.out.quiet = self.silent
        run = start_run(self.name, f"benchmarks.{self.name}", given, device, options.output, options.tiny)
        budget = Budget(options.budget, terminal)
        for name in ["tiny"] if options.tiny else options.model:
            layers = min(options.layers or num_layers(name), num_layers(name))
            terminal.say(f"{name}: building {layers} of {num_layers(name)} layers on {device}")
            model = self.prepare(build_model(name, layers, device, dtype))
            lengths = sorted(options.lengths or ([256, 512] if options.tiny else self.lengths))
            try:
                found, said = self.check(model, name, min(options.check_length, lengths[-1]))
            except WrongResultError as error:
                terminal.say(f"{name}: {error}; nothing is timed")
                return 1
            terminal.say(f"{name}: {said}")
            cases = self.cases(options, lengths)
            with terminal.progress(name, len(cases)) as advance:
                for case in budget.of(cases, lambda case: f"{case[0]} tokens and more"):
                    for result in self.measure(name, model, case, options):
                        if not self.silent:
                            run.add({**result, **found})
                    advance(1)
            del model
            release(device)
        if run.results:
            terminal.table(self.table(run.results))
            terminal.say(f"written to {run.path}")
        return 0


def make_table(results: Sequence[Result], columns: Sequence[Column], caption: str = "") -> Table:
    """One row a result."""
    rows = [[cell(result) for _, cell in columns] for result in results]
    return Table([header for header, _ in columns], rows, caption)


def case_of(name: str, form: str = "") -> Callable[[Result], str]:
    """Cells of what was asked for."""
    return lambda result: format(result["case"][name], form)


def metric(name: str, form: str, times: float = 1) -> Callable[[Result], str]:
    """Cells of what was found."""
    return lambda result: format(times * result["metrics"][name], form)


def tokens(result: Result) -> str:
    """The length of a prompt."""
    return format_length(result["case"]["length"])


PROMPT: list[Column] = [("model", case_of("model")), ("tokens", tokens)]
"""Columns of every benchmark of whole models."""


def as_asked(result: Result) -> str:
    """Whether ``min_context`` was the default."""
    return "as shipped" if result["case"]["min_context"] == "default" else "sparse"


def form_of(result: Result) -> str:
    """The form of the gates; without a word about it the paper's."""
    return str(result["case"].get("form", "paper"))


def speedup(result: Result) -> str:
    """Times faster than dense."""
    return f"{result['metrics']['speedup']:.2f}x"


def gib(peak: float | None) -> str:
    """Bytes of memory, where they are known."""
    return "" if peak is None else f"{peak / 2**30:.1f}"


def trained_gates(result: Result) -> str:
    """Form of the gates, and the target where it is not that of the papers."""
    case = result["case"]
    return ", ".join([form_of(result), *([case["target"]] if "target" in case else [])])


def hours(result: Result) -> str:
    """Hours for the 0.5 billion tokens on which the paper's gates were distilled (arXiv 2410.13276)."""
    return f"{0.5e9 / result['metrics']['tokens_per_s'] / 3600:.1f}"


def fits(result: Result) -> str:
    """Whether a step fits a card of 24 GB, where that is known."""
    return {True: "yes", False: "no"}.get(result["metrics"].get("fits_24gb"), "")
