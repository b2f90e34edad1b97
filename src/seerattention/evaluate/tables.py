"""Tables of text, and the one writer of each medium: Markdown, HTML, terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "finite", "format_density", "format_length", "format_percent", "format_seconds", "with_error"]


@dataclass(frozen=True)
class Table:
    """Headers, rows of as many cells, and a caption that says what the numbers mean.

    The first column holds names and is left-aligned; the others hold numbers, where a writer is not told otherwise.

    Raises:
        ValueError: a row has another number of cells than there are headers.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(
                    f"a table row has {len(row)} cells but there are {len(self.headers)} headers: {list(row)}"
                )

    def markdown(self, numbers: bool = True) -> str:
        """The table in Markdown, without its caption; ends with a line break.

        Args:
            numbers: all columns but the first are right-aligned.
        """
        lines = [self.headers, ["---"] + ["---:" if numbers else "---"] * (len(self.headers) - 1), *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

    def html(self, strong: Sequence[int] = (), long_names: bool = False) -> str:
        """The table and its caption in HTML, everything escaped.

        Args:
            strong: numbers of rows that are set off.
            long_names: the first column may break into lines.
        """
        head = "".join(f"<th>{html.escape(header)}</th>" for header in self.headers)
        body = "".join(_html_row(row, i in strong) for i, row in enumerate(self.rows))
        # The caption stays outside of what scrolls sideways on a phone.
        note = f'<p class="caption">{html.escape(self.caption)}</p>' if self.caption else ""
        kind = ' class="names"' if long_names else ""
        return (
            f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'
        )

    def print_to(self, console: Any, numbers: bool = True) -> None:
        """Print the table and its caption to a :class:`rich.console.Console`; plain lines where it is no terminal.

        Args:
            numbers: all columns but the first are right-aligned.
        """
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        rich = RichTable(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2)
        for i, header in enumerate(self.headers):
            rich.add_column(
                escape(header), justify="right" if i and numbers else "left", no_wrap=not console.is_terminal
            )
        for row in self.rows:
            rich.add_row(*map(escape, row))
        console.print(rich)
        if self.caption:
            console.print(self.caption, markup=False, style="dim", soft_wrap=True)


def _html_row(cells: Sequence[str], strong: bool) -> str:
    opening = '<tr class="strong">' if strong else "<tr>"
    return opening + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def format_length(tokens: int) -> str:
    """Tokens in words: 512, 8K, 12.5K."""
    return str(tokens) if tokens < 1024 else f"{tokens / 1024:.1f}".removesuffix(".0") + "K"


def format_density(density: float) -> str:
    """Density with as many digits as are of use."""
    return f"{density:.3f}" if density < 0.1 else f"{density:.2f}"


def format_percent(share: float, error: float = math.nan) -> str:
    """A share in per cent, with its standard error where there is one."""
    return f"{100 * share:.0f} %" if math.isnan(error) else f"{100 * share:.0f} ± {100 * error:.0f} %"


def format_seconds(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def with_error(value: float, error: float, spec: str = ".2f") -> str:
    """A number, with its standard error where there is one."""
    return f"{value:{spec}}" if math.isnan(error) else f"{value:{spec}} ± {error:{spec.removeprefix('+')}}"


def finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None
