"""docs/accuracy.md is that of the committed results."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("matplotlib")
from benchmarks import accuracy


@pytest.fixture(scope="module")
def results():
    return json.loads(accuracy.RESULTS.read_text())


def test_the_committed_page_is_that_of_the_committed_results(results):
    assert accuracy.DOCUMENT.read_text() == accuracy.document(results)
    for name in results["models"]:
        assert accuracy.picture_of(name).stat().st_size > 10_000


def test_every_setting_has_a_row(results):
    """None is lost for a name that the page does not know."""
    for model in results["models"].values():
        found = accuracy.table(model)
        assert len(found.rows) == len(model["rows"])
        densities = sorted(f"{row['density']:.3f}" for row in model["rows"])
        assert sorted(row[2] for row in found.rows) == densities


def test_curves_go_through_the_measured_points(results):
    model = results["models"]["testbed"]
    _, loss = accuracy.draw(model).axes
    dense = next(row["ppl"] for row in model["rows"] if row["setting"] == "dense")
    drawn = {(x, round(y, 6)) for line in loss.lines for x, y in zip(*line.get_data(), strict=True)}
    for row in model["rows"]:
        if row["setting"] != "dense":
            assert (row["density"], round(100 * (row["ppl"] / dense - 1), 6)) in drawn
