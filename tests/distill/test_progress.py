"""The progress line, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from seerattention.distillation import StepReport
from seerattention.distillation.progress import distill_progress
from seerattention.measure.kept import SHOWN


def _show(terminal: bool, total: int | None) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=160)
    with distill_progress(console, "training") as on_step:
        on_step(StepReport(0, total, None, 0.25, 0.0))
        for step in range(1, 41):
            on_step(StepReport(step, total, 1.0 / step, 0.5, 12_345.0))
    return file.getvalue()


def test_the_number_that_tells_more_stands_beside_block_recall():
    file = io.StringIO()
    with distill_progress(Console(file=file, width=160), "training") as on_step:
        on_step(StepReport(0, 2, None, 0.25, 0.0, {SHOWN: 0.125, "far": 0.75}))
        on_step(StepReport(2, 2, 0.5, 0.25, 0.0, {SHOWN: None, "far": 0.75}))
    first, last = file.getvalue().splitlines()
    assert first == "training: step 0/2 block recall 0.250, block recall times needle recall by head 0.125"
    assert "needle" not in last  # a text in which nothing is looked up
    assert "0.75" not in first + last


@pytest.mark.parametrize("total", [40, None])
def test_terminal(total):
    shown = _show(True, total)
    for part in ("training", "40", "loss 0.0250", "block recall 0.500", "12.3K tokens/s"):
        assert part in shown


def test_log_is_short_and_ends_with_the_last_step():
    lines = _show(False, 40).splitlines()
    assert lines[0] == "training: step 0/40 block recall 0.250"
    assert lines[-1].startswith("training: step 40/40 loss 0.0250, block recall 0.500, 12.3K tokens/s, 0 s left")
    assert 8 <= len(lines) <= 13
