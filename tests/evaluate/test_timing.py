import pytest
import torch

from seerattention import TopK, baselines
from seerattention.evaluate.settings import Setting
from seerattention.evaluate.timing import TimingResult, time_prefill


def test_times_every_setting(model):
    ids = torch.randint(2, 300, (2, 256))
    settings = [Setting.dense(), Setting("oracle", selector=baselines.Oracle(TopK(0.5)))]
    dense, oracle = time_prefill(model, ids, settings, repeats=3)
    for result in (dense, oracle):
        assert (result.batch, result.length, len(result.seconds)) == (2, 256, 3)
        assert result.first_seconds > 0
        assert min(result.seconds) <= result.median <= max(result.seconds)
    assert dense.density == 1.0
    assert oracle.density == pytest.approx((1 + 1 + 2 + 2) / 10)
    (short,) = time_prefill(model, ids, settings[1:], repeats=1, warmup_length=64)
    assert short.density == oracle.density  # not that of the warm-up, which is one block
    with pytest.raises(ValueError, match="repeats"):
        time_prefill(model, ids, settings, repeats=0)


def test_the_first_call_is_kept_apart():
    assert TimingResult("x", 1, 1, first_seconds=100.0, seconds=[1.0, 3.0, 2.0]).median == 2.0
