"""Methods at one density of the texts."""

import numpy as np
import pytest

from seerattention.evaluate.comparison import Comparison, DocumentLosses, Entry
from seerattention.evaluate.equal_density import equal_density_table, losses_at

DOCUMENTS = np.array([3.0, 3.2, 2.9, 3.4])


def entry(family, target, density, rise):
    contender = {"family": family, "label": family.partition(",")[0], "protocol": "every_row_sparse"}
    losses = DocumentLosses(DOCUMENTS + rise, {"density": density})
    return Entry(f"{family} {target:g}", 8192, target, contender, perplexity=losses)


def made(*entries):
    dense = Entry("dense", 8192, 1.0, perplexity=DocumentLosses(DOCUMENTS, {"density": 1.0}))
    return Comparison({}, {(e.length, e.name): e for e in (dense, *entries)})


def test_losses_are_linear_in_the_logarithm_of_the_density():
    found = [entry("x", 0.1, 0.1, 0.04), entry("x", 0.4, 0.4, 0.0), entry("x", 0.2, 0.2, 0.01)]
    np.testing.assert_allclose(losses_at(found, 0.2), DOCUMENTS + 0.01)
    np.testing.assert_allclose(losses_at(found, 0.02**0.5), DOCUMENTS + 0.025)  # half way from 0.1 to 0.2
    np.testing.assert_allclose(losses_at(found, 0.08**0.5), DOCUMENTS + 0.005)
    np.testing.assert_allclose(losses_at(found, 0.097), DOCUMENTS + 0.04 - 0.03 * np.log2(0.97), rtol=1e-9)
    assert losses_at(found, 0.09) is None
    assert losses_at(found, 0.43) is None
    assert losses_at(found[:1], 0.1) is None


def test_a_method_is_not_better_for_keeping_more():
    """Both are on one curve, and one has come out denser everywhere: equal at equal density."""

    def on_curve(family, stretch):
        return [
            entry(family, target, stretch * target, -0.02 * np.log2(stretch * target)) for target in (0.1, 0.15, 0.25)
        ]

    comparison = made(*on_curve("gates, project rule", 1.07), *on_curve("xattention, project rule", 0.98))
    gates, other = (comparison.entries[8192, f"{name}, project rule 0.15"] for name in ("gates", "xattention"))
    assert comparison.loss_change(gates).mean < comparison.loss_change(other).mean - 2e-3
    table = equal_density_table(comparison, 8192, [0.15])
    assert table.headers == ["method", "0.15: perplexity / dense", "0.15: / gates, project rule"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["gates, project rule"][0] == rows["xattention, project rule"][0]
    assert rows["gates, project rule"][1] == ""
    assert rows["xattention, project rule"][1] in ("+0.0 % [+0.0, +0.0]", "-0.0 % [-0.0, -0.0]")


def test_nothing_to_interpolate():
    assert equal_density_table(made(), 8192) is None
    assert equal_density_table(made(entry("x", 0.1, 0.1, 0.1)), 8192) is None
    assert equal_density_table(Comparison({}, {}), 8192) is None


@pytest.mark.parametrize("target", [0.1, 0.2])
def test_densities_asked_for_are_the_columns(target):
    table = equal_density_table(made(entry("x", 0.1, 0.101, 0.1), entry("x", 0.2, 0.197, 0.05)), 8192)
    assert f"{target:g}: perplexity / dense" in table.headers
    assert [len(row) for row in table.rows] == [5]
