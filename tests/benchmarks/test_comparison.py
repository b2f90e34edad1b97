"""docs/comparison.md: its measured part comes from results, the rest stays as it is written."""

import json
import re

import pytest
from benchmarks.comparison import AGAINST, BEGIN, DOCUMENT, END, OVERVIEW, against_gates, main
from benchmarks.comparison_picture import FAMILIES, MODELS, draw
from benchmarks.comparison_picture import main as draw_main

from seerattention.evaluate.comparison_file import load_comparison
from seerattention.evaluate.comparison_report import build_comparison_report
from seerattention.evaluate.equal_density import REFERENCE, equal_density_table

from ..evaluate.comparison_folder import METHODS, MODEL, write_folder

COMMITTED = DOCUMENT.parents[1] / "benchmarks" / "results" / "h200" / "comparison"
PAGE = DOCUMENT.parent / "comparison" / "report.html"


def test_results_go_between_the_marks(tmp_path):
    folder = write_folder(tmp_path / "results")
    document = tmp_path / "page.md"
    document.write_text(f"before\n{OVERVIEW[0]}{OVERVIEW[1]}\n{BEGIN}\nold\n{END}\nafter\n")
    page = tmp_path / "page.html"
    arguments = ["--document", str(document), "--save", str(tmp_path / "saved"), "--page", "results", str(page)]
    assert main([f"results={folder}", *arguments]) == 0
    saved = json.loads((tmp_path / "saved" / "results.json").read_text())
    assert saved["benchmark"] == "comparison"
    assert {item["setting"] for item in saved["settings"]} >= {
        f"{name}, {rule} rule 0.1" for name, (rule, *_) in METHODS.items()
    }
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "#### 2K tokens" in text
    for name, (rule, *_) in METHODS.items():
        assert f"| {name}, {rule} rule 0.1 | 0.10 |" in text
    overview = text.partition(OVERVIEW[0])[2].partition(OVERVIEW[1])[0]
    assert "`results`\n\n|  | 2K, 0.1 | 2K, 0.3 | 4K, 0.1 |" in overview
    assert "| **gates, own rule** | 90 %, +1.0 % |" in overview
    assert MODEL.partition("<")[0] in page.read_text()
    first = text
    assert main([str(tmp_path / "saved" / "results.json"), "--document", str(document)]) == 0
    assert document.read_text() == first
    # The folder in two parts is one model too.
    assert main([f"results={folder},{folder}", "--document", str(document)]) == 0
    assert document.read_text() == first
    with pytest.raises(SystemExit):
        main([f"results={folder}", "--document", str(document), "--page", "other", str(page)])
    document.write_text("no marks")
    with pytest.raises(ValueError, match="must hold"):
        main([f"results={folder}", "--document", str(document)])


def test_the_document_has_the_marks():
    text = DOCUMENT.read_text()
    assert 0 < text.index(OVERVIEW[0]) < text.index(OVERVIEW[1]) < text.index(BEGIN) < text.index(END)
    assert 0 < text.index(AGAINST[0]) < text.index(AGAINST[1]) < text.index(BEGIN)


@pytest.fixture(scope="module")
def committed():
    """What is committed, as far as it holds single questions."""
    files = [path for path in sorted(COMMITTED.glob("*.json")) if '"document_losses":' in path.read_text()]
    if not files:
        pytest.skip("the committed comparisons are of a version that kept no single questions")
    return files


def test_the_document_is_what_the_committed_results_make(committed, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(DOCUMENT.read_text())
    order = re.findall(r"^### (\S+), ", DOCUMENT.read_text().partition(BEGIN)[2], re.MULTILINE)
    assert sorted(order) == sorted(path.stem for path in committed)
    assert main([*(str(COMMITTED / f"{name}.json") for name in order), "--document", str(document)]) == 0
    assert document.read_text() == DOCUMENT.read_text()


def test_the_committed_page_holds_the_committed_results(committed):
    """Words and tables are what the code makes of them; pictures differ by the version of what draws them."""
    page = PAGE.read_text()
    assert len(page) < 3 << 20
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    made = build_comparison_report(load_comparison(COMMITTED / "testbed.json"), small=True).html()

    def words(text):
        return re.sub(r'(src="|\\?")data:image/png;base64,[^"\\]*', "", text)

    assert words(page) == words(made)


def test_comparisons_of_texts_are_held_against_the_gates(committed):
    """Cells are those of the table at equal density: over dense for the gates, over the gates for all others."""
    texts = [path for path in committed if path.stem.endswith("-texts")]
    assert texts
    for path in committed:
        comparison = load_comparison(path)
        parts = against_gates(path.stem, comparison)
        assert bool(parts) == (path in texts)
        if not parts:
            continue
        title, table = parts
        head, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        rows = {cells[0]: dict(zip(head, cells, strict=True)) for cells in lines}
        made = equal_density_table(comparison, 8192)
        assert made is not None
        assert title == f"`{path.stem}`"
        for row in made.rows:
            for i in range(1, len(row), 2):
                column = made.headers[i].partition(":")[0]
                if row[0] == REFERENCE:
                    assert rows[f"**{REFERENCE}, over dense**"][column] == row[i]
                else:
                    assert rows[row[0]][column] == row[i + 1]


def test_the_picture_shows_what_was_measured(committed, tmp_path):
    """Every line is of points that the tables hold; every method is in the legend; the committed picture is there."""
    pairs = {
        title: tuple(load_comparison(COMMITTED / f"{name}.json") for name in names) for title, names in MODELS.items()
    }
    figure = draw(pairs)
    above, below = figure.axes[:3], figure.axes[3:]
    assert [axis.get_title() for axis in above] == list(MODELS)
    for axis, (answers, _) in zip(above, pairs.values(), strict=True):
        _, *lines = axis.lines  # the first is dense
        for line, family in zip(lines, FAMILIES, strict=True):
            entries = [e for e in answers.at(8192) if e.family == family and e.tasks is not None]
            shown = sorted((float(x), float(y)) for x, y in zip(*line.get_data(), strict=True))
            assert shown == sorted((e.tasks.density, 100 * answers.score(e)) for e in entries)
    for axis, (_, texts) in zip(below, pairs.values(), strict=True):
        gates = axis.lines[1]
        entries = sorted(
            (e for e in texts.at(8192) if e.family == "gates, project rule"), key=lambda e: e.perplexity.density
        )
        dense = texts.dense(8192).perplexity.perplexity
        assert gates.get_ydata() == pytest.approx(
            [100 * (e.perplexity.perplexity / dense - 1) for e in entries], rel=1e-5
        )
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "dense",
        *(line.called for line in FAMILIES.values()),
    }
    assert draw_main([str(tmp_path / "models.png")]) == 0
    assert (tmp_path / "models.png").read_bytes()[:4] == (PAGE.parent / "models.png").read_bytes()[:4] == b"\x89PNG"
