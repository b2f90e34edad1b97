"""docs/comparison.md: its measured part comes from results, the rest stays as it is written."""

import json

import pytest
from benchmarks.comparison import BEGIN, DOCUMENT, END, main

from ..evaluate.comparison_folder import METHODS, write_folder


def test_results_go_between_the_marks(tmp_path):
    folder = write_folder(tmp_path / "results")
    document = tmp_path / "page.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
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
    first = text
    assert main([str(folder), "--document", str(document)]) == 0
    assert document.read_text() == first
    document.write_text("no marks")
    with pytest.raises(ValueError, match="must hold"):
        main([str(folder), "--document", str(document)])


def test_the_document_has_the_marks():
    text = DOCUMENT.read_text()
    assert 0 < text.index(BEGIN) < text.index(END)
