"""What the commands share: short errors, consoles and progress that also read well in a log, loading models and
text.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from ..evaluate.tables import Table

__all__ = ["Terminal", "book_tokens", "errors", "load_model", "log_level", "parse_list", "resolve_device"]

_LOG_WIDTH = 200  # tables in a log or a pipe are not folded to 80 columns
_TESTBED = "testbed"


class Terminal:
    """Where a command writes: results to stdout, progress and remarks to stderr. With ``json`` stdout is JSON alone."""

    def __init__(self, json: bool = False) -> None:
        from rich.console import Console

        def console(stderr: bool) -> Console:
            made = Console(stderr=stderr, highlight=False)
            return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_LOG_WIDTH)

        self.json = json
        self.err = console(True)
        self.out = self.err if json else console(False)

    def say(self, text: str) -> None:
        """A remark on what happens."""
        self.err.print(text, markup=False, soft_wrap=True)

    def table(self, table: Table, numbers: bool = True) -> None:
        """A table with its caption; ``numbers``: columns but the first are right-aligned."""
        from rich import box
        from rich.table import Table as RichTable

        rich = RichTable(box=box.SIMPLE_HEAD if self.out.is_terminal else box.ASCII2)
        for i, header in enumerate(table.headers):
            rich.add_column(header, justify="right" if i and numbers else "left", no_wrap=not self.out.is_terminal)
        for row in table.rows:
            rich.add_row(*row)
        self.out.print(rich)
        if table.caption:
            self.out.print(table.caption, markup=False, style="dim", soft_wrap=True)

    def emit(self, data: Any) -> None:
        """The result as JSON on stdout, if asked for."""
        if self.json:
            sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar (a few plain lines where there is no terminal); yields ``advance(amount)``."""
        if not self.err.is_terminal:
            yield self._plain_progress(what, total)
            return
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err) as bar:
            task = bar.add_task(what, total=total)
            yield lambda amount: bar.advance(task, amount)

    def _plain_progress(self, what: str, total: int) -> Callable[[int], None]:
        done, shown = 0, 0
        self.say(f"{what} ...")

        def advance(amount: int) -> None:
            nonlocal done, shown
            done += amount
            quarter = 4 * done // total
            if quarter > shown and done < total:
                shown = quarter
                self.say(f"{what}: {25 * quarter} %")

        return advance


@contextmanager
def errors() -> Iterator[None]:
    """Turn mistakes of the user into one sentence on stderr and exit status 1; bugs keep their traceback."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError, ModuleNotFoundError) as error:
        lines = str(error).split("\n")
        # transformers explains a missing model over many lines; the first says it.
        message = " ".join((lines[0] if len(str(error)) > 500 else str(error)).split()) or type(error).__name__
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None


def parse_list(text: str, kind: Callable[[str], Any], what: str) -> list[Any]:
    """Split ``"a,b,c"``; every item goes through ``kind``.

    Raises:
        ValueError: an item that ``kind`` refuses, or no item.
    """
    items = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            items.append(kind(item))
        except ValueError:
            raise ValueError(f"--{what}: {item!r} is not valid; give a list separated by commas") from None
    if not items:
        raise ValueError(f"--{what} is empty; give a list separated by commas")
    return items


def token_count(text: str) -> int:
    """A length in tokens: ``4096`` or ``4K``."""
    return int(text[:-1]) * 1024 if text[-1:] in "kK" else int(text)


@contextmanager
def log_level(name: str, level: int) -> Iterator[None]:
    """Let through only messages of at least ``level`` of the logger ``name`` for a while."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def resolve_device(device: str) -> str:
    """``auto`` is the first CUDA device, else the CPU.

    Raises:
        ValueError: a CUDA device that is not there, or no device name at all.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device {device!r} is no torch device; try auto, cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device} was asked for but torch finds no CUDA device here; use --device cpu")
    return device


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """The embedded testbed model (``"testbed"``), or any Hugging Face causal language model, and its tokenizer."""
    import torch

    chosen = resolve_device(device)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype!r} is not a torch dtype; try auto, bfloat16, float16 or float32")
    from transformers.utils import logging as transformers_logging

    if name == _TESTBED or not sys.stderr.isatty():  # loading is quick, or its bar would fill a log
        transformers_logging.disable_progress_bar()
    if name == _TESTBED:
        from .. import testbed

        return testbed.load(device=chosen, dtype=None if dtype == "auto" else getattr(torch, dtype))
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"no model folder at {name}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(Path(name).expanduser()) if name.startswith("~") else name
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return model.to(chosen).eval(), tokenizer  # type: ignore[arg-type]


def default_gates(model: str) -> Path | None:
    """The gates that come with the embedded model; None for any other."""
    if model != _TESTBED:
        return None
    from .. import testbed

    return Path(testbed.gates_path())


def book_tokens(
    data: str | None, model: str, tokenizer: Any, *, limit: int, text_field: str = "text", split: str = "test"
) -> list[np.ndarray]:
    """Token ids of the texts in ``data``, or of the embedded books of ``split`` for the testbed; about ``limit``
    tokens.

    Raises:
        ValueError: no data named for a model other than the testbed.
    """
    import numpy as np

    texts: Iterator[str] | Sequence[str]
    if data is not None:
        from ..distillation.documents import open_documents

        texts = open_documents(data, text_field=text_field)(0)
    elif model == _TESTBED:
        from .. import testbed

        texts = testbed.book_texts(split)
    else:
        raise ValueError(
            "--data is needed for this model: a .txt or .jsonl file (also .zst), a folder of them, or a dataset id"
        )
    arrays, found = [], 0
    for text in texts:
        # Long books are cut before they are tokenised: no tokenizer needs 32 characters a token on average.
        ids = tokenizer(text[: 32 * limit], add_special_tokens=False, verbose=False)["input_ids"]
        if ids:
            arrays.append(np.asarray(ids, dtype=np.int64))
            found += len(ids)
        if found >= limit:
            break
    if not arrays:
        raise ValueError("the data holds no text")
    return arrays
