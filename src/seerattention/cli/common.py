"""What the commands share: short errors, consoles and progress that also read well in a log, devices and text."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .. import testbed
from ..testbed import MODELS

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from ..distillation.documents import Documents
    from ..evaluate.tables import Table
    from ..policies import Policy

__all__ = [
    "Terminal",
    "book_tokens",
    "errors",
    "log_level",
    "parse_list",
    "resolve_device",
    "run_identity",
    "spending",
    "token_count",
]

_LOG_WIDTH = 200  # tables in a log or a pipe are not folded to 80 columns


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
        table.print_to(self.out, numbers)

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
        from rich.progress import Progress, TimeElapsedColumn

        columns = list(Progress.get_default_columns())  # what, bar, share, time left
        columns.insert(-1, TimeElapsedColumn())
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
    """Turn mistakes of the user and failures of the machine into one sentence on stderr and exit status 1.

    A sentence is what somebody wrote: OSErrors, missing modules, memory that ran out, and each ValueError, TypeError or
    NotImplementedError that a ``raise`` statement made. The same errors out of the interpreter or of compiled code (an
    operand of the wrong type, shapes that do not fit) are bugs, as all others are, and keep their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # `seer env | head`: nobody reads on, and typer ends quietly
        raise
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        typer.echo(f"error: {sentence}", err=True)
        raise typer.Exit(1) from error


def _sentence(error: Exception) -> str | None:
    """What to tell the user about an error; None for a bug."""
    if is_out_of_memory(error):
        return f"out of memory ({one_line(error)}); use shorter prompts, a smaller batch or model, or another device"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, OSError | ModuleNotFoundError):
        return one_line(error)
    if isinstance(error, ValueError | TypeError | NotImplementedError) and _was_raised(error):
        return one_line(error)
    return None


def one_line(error: Exception) -> str:
    """The message without line breaks; of a long one, as transformers writes about a missing model, the first line."""
    text = str(error)
    return " ".join((text.split("\n")[0] if len(text) > 500 else text).split()) or type(error).__name__


def _was_raised(error: Exception) -> bool:
    """Whether a ``raise`` statement made the error; true where there is no source to look at."""
    frames = traceback.extract_tb(error.__traceback__)
    return not frames or not frames[-1].line or re.search(r"\braise\b", frames[-1].line) is not None


def is_out_of_memory(error: Exception) -> bool:
    # torch is not imported for this: where it is not loaded it has raised nothing. Its CPU allocator has no type.
    kind = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return isinstance(error, MemoryError | kind) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def parse_list(text: str, kind: Callable[[str], Any], what: str) -> list[Any]:
    """Split ``"a,b,c"``; every item goes through ``kind``. What is named twice is there once.

    Raises:
        ValueError: an item that ``kind`` refuses, with what it says; or no item.
    """
    items = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            items.append(kind(item))
        except ValueError as error:
            reason = "" if kind in (int, float) else f" ({error})"
            raise ValueError(f"--{what}: {item!r} is not valid{reason}; give a list separated by commas") from None
    if not items:
        raise ValueError(f"--{what} is empty; give a list separated by commas")
    return list(dict.fromkeys(items))


def token_count(text: str, option: str | None = None, minimum: int = 2) -> int:
    """A length in tokens: ``4096`` or ``4K``.

    Args:
        text: what was given.
        option: its name, for the message of an option that takes one length.
        minimum: the least length that makes sense; a prompt has two tokens at least.
    """
    found = re.fullmatch(r"([0-9]{1,12})([kK]?)", text.strip())
    length = int(found[1]) * (1024 if found[2] else 1) if found else -1
    if length < minimum:
        wanted = f"a length must be a whole number of at least {minimum} tokens, like 4096 or 4K"
        raise ValueError(f"{option}: {wanted}, got {text!r}" if option else wanted)
    return length


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
        ValueError: no device name, or a device that is not there.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device!r} is no torch device; try auto, cpu or cuda") from None
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"--device {device} was asked for but torch finds no CUDA device here; use --device cpu")
        if (chosen.index or 0) >= count:
            raise ValueError(
                f"--device {device} was asked for but torch finds only {count} here, cuda:0 to {count - 1}"
            )
    elif chosen.type != "cpu":
        try:
            torch.empty(1, device=chosen).item()
        except Exception as error:  # whatever a backend says that is not there, or holds no numbers (meta)
            raise ValueError(f"--device {device} cannot be used here; try auto, cpu or cuda") from error
    return device


def default_gates(model: str) -> Path | None:
    """The gates that come with a model of the testbed; None for any other model.

    Raises:
        FileNotFoundError: none come with it yet.
    """
    return Path(testbed.gates_path(model)) if model in MODELS else None


def spending(gates: Any, densities: Sequence[float], terminal: Terminal) -> dict[float, Policy]:
    """What gates are asked for each density: their budgets, or top-k selection where they have none, which is said.

    Args:
        gates: a folder or hub id; None: no gates.
    """
    from ..gates.sources import stored_budgets
    from ..policies import TopK

    budgets = None if gates is None else stored_budgets(gates)
    found: dict[float, Policy] = {density: TopK(density) for density in densities}
    if budgets is None:
        if gates is not None and any(density != 1 for density in densities):
            terminal.say(
                f"no budgets are stored with {gates}: top-k selection, which loses more at the same density; "
                "seer calibrate fits budgets"
            )
        return found
    low, high = budgets.densities[0], budgets.densities[-1]
    spent = [density for density in densities if low <= density <= high]
    found |= {density: budgets.policy(density) for density in spent}
    if rest := [f"{density:g}" for density in densities if density not in spent and density != 1]:
        terminal.say(
            f"budgets are stored for densities from {low:g} to {high:g}; top-k selection for {', '.join(rest)}"
        )
    return found


def open_data(data: str | None, model: str, text_field: str = "text") -> Documents | None:
    """What ``--data`` names, opened before a model is loaded; None for the books that come with the testbed's models.

    Raises:
        ValueError: no data named for a model that is not the testbed's, or data that cannot be texts.
        FileNotFoundError: no such file or folder, or no text in it.
    """
    if data is not None:
        from ..distillation.documents import open_documents

        return open_documents(data, text_field=text_field)
    if model not in MODELS:
        raise ValueError(
            "--data is needed for this model: a .txt or .jsonl file, also compressed, a folder of them, or a dataset id"
        )
    return None


def book_tokens(
    data: str | Documents | None,
    model: str,
    tokenizer: Any,
    *,
    limit: int,
    text_field: str = "text",
    split: str = "test",
) -> list[np.ndarray]:
    """Token ids of the texts in ``data``, or of the embedded books of ``split``; about ``limit``
    tokens.

    Raises:
        ValueError: no text, or as :func:`open_data`, which takes what is not opened yet.
    """
    import numpy as np

    documents = open_data(data, model, text_field) if data is None or isinstance(data, str) else data
    texts: Iterator[str] | Sequence[str]
    if documents is not None:
        texts = documents(0)
    else:
        texts = testbed.book_texts(split)
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
        raise ValueError("--data: there is no text in it, all documents are empty")
    return arrays


def run_identity(model: Any, device: str) -> dict[str, Any]:
    """What decides results beside settings, prompts and options: results of anything else are not taken for these."""
    from ..distillation.identity import weights_digest
    from ..evaluate.environment import environment

    facts = environment()
    return {
        "weights": weights_digest(model),
        "config": {
            k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
        },
        "dtype": str(model.dtype),
        "device": device,
        **{name: facts[name] for name in ("versions", "git_commit", "devices", "processor", "threads")},
    }
