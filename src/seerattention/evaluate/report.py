"""A self-contained HTML report: text, tables and figures in one file, readable on a phone, without a template engine.

    report = Report("Title", "one sentence under it")
    report.section("Retrieval")
    report.text("What the numbers below mean.")
    report.table(Table(["setting", "density"], [["dense", "1.00"]], caption="..."))
    report.figure(figure, caption="...", alt="...")
    report.save("report/index.html")

Everything that is passed in is escaped; nothing is loaded from the network.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import write_file
from .tables import Table

__all__ = ["Report"]

_STYLE = """
:root { color-scheme: light; --ink: #1d2329; --soft: #5b6670; --line: #dfe3e8; --accent: #0072b2; --paper: #fff;
  --wash: #f5f7f9; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .3rem; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; }
.subtitle { color: var(--soft); margin-bottom: 1.2rem; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.2rem;
  margin: 1rem 0; }
.scroll { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
table.names td:first-child { white-space: normal; min-width: 11rem; }
.viewer { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; }
.viewer canvas { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border: 1px solid var(--line); }
.viewer figure { margin: 0; }
.controls { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .4rem 1rem;
  margin: .6rem 0; }
.controls label { display: block; color: var(--soft); font-size: .87rem; }
.controls select, .controls input { width: 100%; display: block; font: inherit; }
tr.strong td { background: #eef5fa; font-weight: 600; }
.caption { color: var(--soft); font-size: .87rem; }
figure { margin: .9rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .87rem; margin-top: .3rem; max-width: 46rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 0 1.2rem; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.headline div { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.headline strong { display: block; font-size: 1.5rem; line-height: 1.2; color: var(--accent); }
.headline span { color: var(--soft); font-size: .87rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .5rem 0; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  section { padding: .9rem .8rem; } }
"""


class Report:
    """Builds one HTML page, top to bottom.

    Args:
        title, subtitle: plain text.
        dpi: points an inch of the pictures.
    """

    def __init__(self, title: str, subtitle: str = "", dpi: int = 150) -> None:
        self.title = title
        self.subtitle = subtitle
        self.dpi = dpi
        self._parts: list[str] = []
        self._open = False

    def headline(self, figures: Sequence[tuple[str, str]]) -> None:
        """A row of large numbers, each with a few words under it."""
        self._close()
        cells = (
            f"<div><strong>{_escape(value)}</strong><span>{_escape(label)}</span></div>" for value, label in figures
        )
        self._parts.append(f'<div class="headline">{"".join(cells)}</div>')

    def section(self, heading: str) -> None:
        """Start a new card; what follows goes into it."""
        self._close()
        self._parts.append(f"<section><h2>{_escape(heading)}</h2>")
        self._open = True

    def text(self, text: str) -> None:
        """One paragraph; plain text."""
        self._parts.append(f"<p>{_escape(text)}</p>")

    def definitions(self, items: Sequence[tuple[str, Any]]) -> None:
        """Terms and what they mean, or settings and their values."""
        rows = "".join(f"<dt>{_escape(term)}</dt><dd>{_escape(meaning)}</dd>" for term, meaning in items)
        self._parts.append(f"<dl>{rows}</dl>")

    def table(self, table: Table, strong: Sequence[int] = (), long_names: bool = False) -> None:
        """A table whose first column is left-aligned; rows numbered in ``strong`` are set off."""
        self._parts.append(table.html(strong, long_names))

    def figure(self, figure: Any, caption: str = "", alt: str = "") -> None:
        """A matplotlib figure as an inline PNG."""
        self._parts.append(_figure(figure, caption, alt, self.dpi))

    def figures(self, figures: Sequence[tuple[Any, str, str]]) -> None:
        """Several small figures (figure, caption, alt) side by side where the screen is wide enough."""
        self._parts.append(f'<div class="figures">{"".join(_figure(*item, self.dpi) for item in figures)}</div>')

    def element(self, content: str) -> None:
        """HTML as it is, made by this package: nothing in it is escaped, and it loads nothing."""
        self._parts.append(content)

    def html(self) -> str:
        """The whole page."""
        self._close()
        subtitle = f'<p class="subtitle">{_escape(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_escape(self.title)}</title><style>{_STYLE}</style></head>\n<body><main>"
            f"<h1>{_escape(self.title)}</h1>{subtitle}\n" + "\n".join(self._parts) + "\n</main></body></html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page (atomically; folders are made as needed) and return its path."""
        target = Path(path)
        write_file(target, self.html())
        return target

    def _close(self) -> None:
        if self._open:
            self._parts.append("</section>")
            self._open = False


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _figure(figure: Any, caption: str, alt: str, dpi: int) -> str:
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    # 256 colours do for lines, bars and maps, in a third of the room.
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        buffer, format="PNG", optimize=True
    )
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    note = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    width = round(96 * figure.get_figwidth())  # CSS pixels; the picture itself is finer
    image = f'<img width="{width}" alt="{_escape(alt or caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}{note}</figure>"
