"""When phases end, how the rate runs, and that a run which forms no look-up says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
from testbed.schedule import FIRST, WORDS, NotFormed, Phase, Schedule, TrainConfig

from seerattention.tasks import MIXES
from seerattention.tasks.training import SHORT_DRILLS

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
        ({"phases": (*[Phase(64, 0.1, 64, 1e-3, most=0.5)] * 2, *LONG)}, "leave time to the others, got 1 of it"),
        ({"drill_mix": {"likeness": 1.0}}, "drill_mix may hold .*, got likeness"),
        (
            {"phases": (Phase(64, 0.1, 64, 1e-3, most=0.2, until=("alike",), drill_mix={"copy": 1.0}), *LONG)},
            "waits for drills that it does not draw: alike",
        ),
    ],
)
def test_bad_settings_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**options)


def test_a_phase_waits_for_the_drills_that_it_names():
    phases = (Phase(256, 0.1, 4096, 3e-4, most=0.3, until=("alike",)), *LONG)
    plan = Schedule(TrainConfig(seconds=100, phases=phases))
    for _ in range(5):
        plan.report({"answers drill_needles": 0.01})
    assert plan.at(10) == 0, "alike was not seen yet"
    for _ in range(5):
        plan.report({"answers drill_alike": 0.01, "answers drill_multivalue": 6.9})
    assert plan.at(11) == 1


def test_mixes_of_a_phase_come_before_those_of_the_run():
    own = Phase(128, 0.5, 4096, 1e-3, drill_mix={"copy": 1.0})
    phases = TrainConfig(phases=(own, *LONG), drill_mix={"alike": 1.0}, task_mix={"few": 1.0}).phases
    assert [phase.drill_mix for phase in phases] == [{"copy": 1.0}, {"alike": 1.0}, {"alike": 1.0}]
    assert all(phase.task_mix == {"few": 1.0} and phase.key_mix == MIXES["key_mix"] for phase in phases)


def stretches(learnt_after, begin=0.0):
    """Seconds in each default phase, if each kind of drill is learnt so many seconds after it first came."""
    config = TrainConfig()
    plan, first, spent = Schedule(config, begin=begin), {}, [0] * len(config.phases)
    for second in range(int(begin), int(config.seconds)):
        phase = config.phases[plan.at(second)]
        spent[plan.phase] += 1
        kinds = [kind for kind in phase.drill_mix if phase.context >= 256 or kind in SHORT_DRILLS]
        seen = {kind: second - first.setdefault(kind, second) for kind in kinds if "copy" not in kind}
        losses = {f"answers drill_{kind}": 0.02 if age >= learnt_after(kind) else 1.5 for kind, age in seen.items()}
        plan.report(losses | {"text": 4.0})
    return spent


@pytest.mark.parametrize("begin", [0.0, 100.0])
@pytest.mark.parametrize("multivalue", [30, 10_000])
def test_the_default_phases_if_all_goes_well(multivalue, begin):
    spent = stretches(lambda kind: multivalue if kind == "multivalue" else 10, begin)
    total = 660 - begin
    assert sum(spent) == total
    expected = [0.06, 0.04, 0.07, 0.14, 0.46, 0.22]
    assert [seconds / total for seconds in spent] == pytest.approx(expected, abs=0.03)
    assert sum(spent[-2:]) > 0.6 * total


def test_the_default_phases_if_words_come_late():
    """The first drills end with numbers, the others take their longest; long texts keep the most of the time."""
    slow = stretches(lambda kind: 60 if kind == "keyvalue" else 10_000)
    # Numbers are learnt after 60 s, and a few reports later the running mean of their losses is low enough, too.
    assert slow[:2] == pytest.approx([65, 92], abs=2)
    assert sum(slow[-2:]) > 0.5 * 660


def test_the_first_drills_have_time_for_numbers():
    """They took up to 80 s on a GPU, beside other work."""
    late = stretches(lambda kind: 90 if kind == "keyvalue" else 10_000)
    assert 90 <= late[0] < 106


def test_numbers_that_are_not_looked_up_stop_the_default_run_early():
    with pytest.raises(NotFormed, match="drills of 512 tokens by 19"):
        stretches(lambda kind: 10_000)


def test_the_default_stages():
    """Layers are kept near in the drills alone, and every word of a name is asked for there."""
    config = TrainConfig()
    assert [phase.context for phase in config.phases] == [128, 512, 1024, 4096, 16_384, 32_768]
    assert [phase.steered for phase in config.phases] == [True] * 3 + [False] * 3
    assert config.phases[0].drill_mix == FIRST
    assert config.phases[1].drill_mix == config.phases[2].drill_mix == WORDS
    assert {"alike", "needles"} <= set(config.phases[1].until)
    for phase in config.phases[3:]:
        assert {name: getattr(phase, name) for name in MIXES} == MIXES


def test_layers_that_see_far_are_those_of_the_run_while_a_phase_is_steered():
    for look_up in ((1,), None):
        config = TrainConfig(
            seconds=100, phases=(replace(DRILLS, steered=True), *LONG, DRILLS, LONG[0]), look_up=look_up
        )
        assert [config.far(phase) for phase in config.phases] == [look_up, *[None] * 4]
    with pytest.raises(ValueError, match=r"at least one layer, .*got \(\)"):
        TrainConfig(look_up=())
