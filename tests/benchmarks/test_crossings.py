"""The committed table of lengths from which on sparse prefill pays is what the committed results say."""

from __future__ import annotations

import benchmarks.crossings

from seerattention.evaluate.crossing import pays_from
from seerattention.hf.min_context import Shape


def result(length, speedup, density=0.2, **case):
    return {
        "case": {"model": "smollm2-135m", "length": length, "density": density, **case},
        "metrics": {"model_speedup": speedup},
    }


def test_the_table_is_written_from_results():
    shape = Shape.of(benchmarks.crossings.MODELS["smollm2-135m"].config())
    measured = [(2048, 0.7), (4096, 1.1), (8192, 0.99), (16384, 1.2), (32768, 1.6)]
    others = [result(2048, 5.0, way="graphs"), result(2048, 5.0, density=0.1)]
    found = benchmarks.crossings.rows([*(result(*pair) for pair in measured), *others])
    assert found == [("smollm2-135m", *shape, 16384)]
    whole = [result(length, 1.5, layers=30) for length in (8192, 16384)]
    assert benchmarks.crossings.rows([*whole, result(8192, 0.9, layers=4)])[0][3] == 8192
    assert pays_from({2048: 2.0, 4096: 0.9}) == 8192  # not where it was measured
    assert benchmarks.crossings.rows([]) == []


def test_the_committed_table_is_that_of_the_committed_results():
    assert benchmarks.crossings.main(["--check"]) == 0
