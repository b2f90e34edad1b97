"""The report must be one file that stands alone, with everything escaped."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from seerattention.evaluate.figures import bar_figure, line_figure
from seerattention.evaluate.perplexity import PerplexityResult, perplexity_table
from seerattention.evaluate.report import Report
from seerattention.evaluate.retrieval import RetrievalResult, retrieval_table
from seerattention.evaluate.tables import Table, format_length
from seerattention.evaluate.timing import TimingResult, timing_table


class Balanced(HTMLParser):
    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_self_contained_and_escaped(tmp_path):
    report = Report("A < B", "sub & title")
    report.headline([("0.1", "density <of> it")])
    report.section("One")
    report.text("<script>alert(1)</script>")
    report.definitions([("term", "meaning")])
    report.table(Table(["a", "b"], [["x", "1"], ["<y>", "2"]], caption="c"), strong=[1])
    report.section("Two")
    report.figure(
        line_figure({"l": ([1, 2], [3, 4], None)}, x_label="x", y_label="y", reference=("dense", 3.5)), alt="lines"
    )
    report.figures([(bar_figure(["a"], {"s": [1.0]}, x_label="x", y_label="y"), "caption", "bars")])
    page = report.save(tmp_path / "deep" / "index.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<title>A &lt; B</title>" in page
    assert page.count("<section>") == page.count("</section>") == 2
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", page)
    assert page == report.html()


def test_table_rows_must_fit():
    with pytest.raises(ValueError, match="2 headers"):
        Table(["a", "b"], [["x"]])


def test_a_table_is_the_same_in_every_medium():
    table = Table(["a|b", "n <2>"], [["[red]x[/red]", "1"], ["y", "22"]], caption="said [of] it")
    assert table.markdown() == "| a\\|b | n <2> |\n| --- | ---: |\n| [red]x[/red] | 1 |\n| y | 22 |\n"
    assert table.markdown(numbers=False).splitlines()[1] == "| --- | --- |"
    page = table.html(strong=[1])
    assert "<th>a|b</th><th>n &lt;2&gt;</th>" in page
    assert '<tr><td>[red]x[/red]</td><td>1</td></tr><tr class="strong"><td>y</td><td>22</td></tr>' in page
    stream = io.StringIO()
    table.print_to(Console(file=stream, width=200))
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "|" in line]
    assert cells == [["a|b", "n <2>"], ["[red]x[/red]", "1"], ["y", "22"]]
    assert lines[-1] == table.caption


def test_tables_show_density_beside_every_score():
    retrieval = [
        RetrievalResult("dense", 1024, 1.0, {"single": np.ones((3, 1), bool)}),
        RetrievalResult("gate", 1024, 0.12, {"single": np.array([[1], [0], [1]], bool)}),
    ]
    table = retrieval_table(retrieval)
    assert list(table.headers) == ["setting", "density", "single", "mean"]
    assert table.rows[0][:2] == ["dense", "1.00"]
    assert table.rows[1][1:] == ["0.12", "67 ± 33 %", "67 %"]
    losses = np.full((2, 4095), np.log(20), dtype=np.float32)
    table = perplexity_table(
        [
            PerplexityResult("dense", 1.0, losses),
            PerplexityResult("gate", 0.05, losses + np.log(1.1).astype(np.float32)),
        ]
    )
    assert list(table.headers) == ["setting", "density", "first 1K", "first 4K", "last quarter", "added loss"]
    assert table.rows[0] == ["dense", "1.00", "20.00", "20.00", "20.00 ± 0.00", ""]
    assert table.rows[1][:4] == ["gate", "0.050", "22.00", "22.00"]
    assert table.rows[1][5].startswith("+0.0953")
    table = timing_table(
        [
            TimingResult("dense", 8192, 1, 1.0, 9.0, [3.0, 2.0, 4.0]),
            TimingResult("gate", 8192, 1, 0.1, 20.0, [1.5, 1.4, 1.6]),
        ]
    )
    assert table.rows[1] == ["gate", "0.10", "1.50 s", "2.00x", "1.40 s - 1.60 s", "20.00 s"]


def test_lengths_in_words():
    assert [format_length(n) for n in (100, 1024, 8192, 12800)] == ["100", "1K", "8K", "12.5K"]
