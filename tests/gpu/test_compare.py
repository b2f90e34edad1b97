"""A comparison on the GPU: the testbed answers densely, densities are reached in half precision, costs are counted."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from seerattention import testbed
from seerattention.evaluate import Journal, Subject
from seerattention.evaluate.comparison import RUN, Comparison, RunResult
from seerattention.evaluate.contenders import make_contenders
from seerattention.evaluate.perplexity import PerplexityMeasure
from seerattention.evaluate.sweep import Plan, Sweep, run_sweep
from seerattention.evaluate.text_tasks import TextMeasure
from seerattention.evaluate.timing import TimingMeasure

pytestmark = pytest.mark.gpu
LENGTH = 4096


@contextmanager
def quiet(what, total):
    yield lambda amount: None


def test_a_comparison(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, tokenizer = testbed.load(device="cuda")
    books = [np.array(tokenizer.encode(text, add_special_tokens=False)) for text in testbed.book_texts("test")[:3]]
    subject = Subject(model, tokenizer, books, batch_size=4)
    plan = Plan(
        make_contenders({"gates": str(testbed.gates_path())}, "xattention,streaming"), [LENGTH], [0.2],
        TextMeasure(("niah_single_2", "niah_multikey_1"), 4), PerplexityMeasure(1), TimingMeasure(2), LENGTH,
    )  # fmt: skip
    journal = Journal(tmp_path)
    journal.add({"measure": RUN, "run": "r", "settings": [], "time": 1.0}, "run", [RunResult({"model": "testbed"})])
    run_sweep(Sweep(subject, plan, journal, {"weights": "testbed"}, "r"), progress=quiet)
    found = Comparison.read(tmp_path)
    dense, *others = found.at(LENGTH)
    assert found.score(dense) >= 0.75
    assert len(others) == 5
    for entry in others:
        reached = abs(entry.contender["calibrated_density"] / 0.2 - 1)
        assert reached <= (0.2 if entry.name.startswith("streaming") else 0.05), entry.name  # a window is whole blocks
        assert abs(entry.tasks.density / 0.2 - 1) < 0.25, entry.name
        assert entry.peak_bytes > 0
        assert entry.prefill > 0
        assert np.isfinite(entry.perplexity.losses).all()
        assert entry.maps.selected.any()
    gates = next(entry for entry in others if entry.name == "gates, own rule 0.2")
    assert found.score(gates) >= 0.5
