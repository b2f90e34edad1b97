"""When phases end, how the rate runs, and that a run which forms no look-up says so."""

from __future__ import annotations

import pytest
from testbed.schedule import NotFormed, Phase, Schedule, TrainConfig

DRILLS = Phase(128, 0.1, 4096, 3e-4, drills=1.0, most=0.3, stop_above=2.0)
LONG = (Phase(512, 0.3, 4096, 1e-3), Phase(1024, 0.5, 4096, 1e-3))


def schedule(**options):
    return Schedule(TrainConfig(seconds=100, phases=(DRILLS, *LONG), **options))


def test_drills_last_until_look_up_has_formed():
    learnt, slow = schedule(), schedule()
    for _ in range(20):
        learnt.report({"answers drill_copy": 0.01, "answers drill_needles": 0.02, "text": 5.0})
        slow.report({"answers drill_copy": 0.01, "answers drill_needles": 1.5})
    assert (learnt.at(9.9), learnt.at(10.0)) == (0, 1)
    assert (slow.at(29.9), slow.at(30.0)) == (0, 1)


def test_the_long_phases_divide_what_is_left():
    plan = schedule()
    plan.report({"answers drill_copy": 0.01})
    plan.report({"answers drill_copy": 0.01})
    changes = [plan.at(second) for second in range(10, 100)]
    assert changes[0] == 1
    assert changes.index(2) == pytest.approx(90 * 0.3 / 0.8, abs=1)


def test_look_up_that_does_not_form_stops_the_run():
    plan = schedule()
    for _ in range(20):
        plan.report({"answers drill_keyvalue": 6.9, "answers drill_needles": 0.1})
    plan.at(29)
    with pytest.raises(NotFormed, match=r"128 tokens by 30 s: losses .*answers drill_keyvalue is not below 2.0"):
        plan.at(30)


def test_kinds_that_form_later_only_prolong_the_drills():
    plan = schedule()
    for _ in range(20):
        plan.report({"answers drill_keyvalue": 0.01, "answers drill_alike": 6.9})
    assert (plan.at(29), plan.at(30)) == (0, 1)


def test_warm_up_and_decay():
    plan = schedule(warmup_steps=10, decay_from=0.5)
    assert plan.factor(0, 0) == pytest.approx(0.1)
    assert plan.factor(40, 50) == 1.0
    assert plan.factor(75, 90) == pytest.approx(0.5)
    assert plan.factor(100, 120) == pytest.approx(0.03)


def test_state_goes_on():
    plan = schedule()
    plan.report({"answers drill_copy": 0.01})
    plan.report({"answers drill_copy": 0.01})
    plan.at(12)
    again = Schedule(plan.config, **plan.state())
    assert again.state() == plan.state()
    assert again.at(50) == plan.at(50)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "sgd"}, "'adamw' or 'muon', got 'sgd'"),
        ({"phases": ()}, "must end with one that has no 'most'"),
        ({"phases": (DRILLS,)}, "must end with one that has no 'most'"),
        ({"phases": (Phase(64, 0.5, 64, 1e-3, most=0.2), *LONG)}, "share=0.5, most=0.2"),
    ],
)
def test_bad_settings_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**options)
