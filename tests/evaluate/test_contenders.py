"""What is compared: every score under its own rule and the project's, protocols, knobs."""

import dataclasses

import pytest

from seerattention.baselines import (
    RBS,
    FlashPrefill,
    FlashPrefillV2,
    FlexPrefill,
    MeanPool,
    Oracle,
    Streaming,
    XAttention,
)
from seerattention.evaluate.contenders import (
    KNOBS,
    PROJECT_RULE,
    PROTOCOLS,
    Contender,
    Knob,
    make_contenders,
    register_knob,
)
from seerattention.policies import Budget, Budgets, RelativeThreshold, Threshold, TopK
from seerattention.selectors import SELECTORS, GateSelector

ALL = (
    "xattention:stride=16,flexprefill,flashprefill,flashprefill_v2,flashprefill_v2:mean_correction=true,minference,"
    "minference_exact,mean_pool,sparge,sub_block,cosa,rbs,prism,streaming,random,oracle,oracle_cover"
)


def test_every_score_is_compared_under_both_rules():
    found = make_contenders({"gates": "folder"}, ALL)
    rules = {}
    for contender in found:
        rules.setdefault(contender.label, []).append(contender.rule)
        assert contender.protocol == PROTOCOLS[0]
    flash = ["flashprefill", "flashprefill_v2", "flashprefill_v2 (+ mean correction)"]
    scored = ["gates", "xattention:stride=16", *flash, "mean_pool", "sub_block", "cosa", "rbs", "prism", "oracle"]
    unscored = [
        "sparge",
        "flexprefill",
        "minference",
        "minference_exact (token by token)",
        "streaming",
        "random",
        "oracle_cover",
    ]
    assert rules == {**{name: ["own", "project"] for name in scored}, **{name: ["own"] for name in unscored}}
    by_name = {(c.label, c.rule): c.selector for c in found}
    assert by_name["gates", "own"] == GateSelector(Threshold(5e-3))
    assert by_name["gates", "project"] == GateSelector(PROJECT_RULE)
    assert by_name["xattention:stride=16", "own"] == XAttention(stride=16)
    assert by_name["xattention:stride=16", "project"] == XAttention(stride=16, policy=PROJECT_RULE)
    assert by_name["mean_pool", "own"] == MeanPool(TopK(0.1))
    assert by_name["flexprefill", "own"] == FlexPrefill(min_budget=128)


def test_a_rule_that_is_a_methods_own_is_there_once():
    both = make_contenders({}, "sub_block,xattention", ("own", "top_k"))
    assert [c.family for c in both] == ["sub_block, own rule", "xattention, own rule", "xattention, top_k rule"]
    alone = make_contenders({}, "sub_block,xattention", ("top_k",))
    assert [c.family for c in alone] == ["sub_block, top_k rule", "xattention, top_k rule"]


def test_every_selector_has_a_knob():
    kinds = set(SELECTORS) - {"gate"}
    assert {c.selector.kind for c in make_contenders({}, ALL)} == {k for k in kinds if k in ALL.replace(":", ",")}
    for contender in make_contenders({"gates": "folder"}, ALL, ("own", "project", "top_k", "top_p", "threshold")):
        knob = contender.knob
        ends = [contender.at(knob.value(place)) for place in (0.0, 0.5, 1.0)]
        assert len(set(ends)) == 3


def test_names():
    found = make_contenders({}, "oracle:policy=top_k(0.1),mean_pool:pool_queries=false:policy=top_p(0.5)", ("own",))
    assert [c.family for c in found] == ["oracle, own rule", "mean_pool:pool_queries=false, own rule"]
    both = make_contenders({}, "oracle:policy=top_k(0.1),oracle:policy=top_p(0.9)", ("own",))
    assert [c.label for c in both] == ["oracle:policy=top_k(0.1)", "oracle:policy=top_p(0.9)"]
    setting = found[0].setting(found[0].at(0.2), 0.2)
    assert setting.name == "oracle, own rule 0.2"
    assert setting.selector == Oracle(TopK(0.2))
    assert setting.min_context == 0


def test_as_published_adds_what_publications_keep():
    found = make_contenders(
        {"gates": "folder"}, "flashprefill,xattention,flashprefill:block_size=128,flashprefill_v2", protocols=PROTOCOLS
    )
    published = {c.label: c.selector for c in found if c.protocol == "as_published"}
    assert published == {
        "gates": GateSelector(Threshold(5e-3, last_blocks_dense=2)),
        "flashprefill": FlashPrefill(last_blocks_dense=4, sink_blocks=4, window_blocks=8),
        "flashprefill:block_size=128": FlashPrefill(last_blocks_dense=2, block_size=128),
        "flashprefill_v2": FlashPrefillV2(last_blocks_dense=4, sink_blocks=4, window_blocks=8, first_layers_dense=4),
    }
    assert all(c.conceding() == [c] for c in found if c.protocol == "as_published")
    assert not any(getattr(c.selector, "last_blocks_dense", 0) for c in found if c.protocol == PROTOCOLS[0])


def test_what_is_read_otherwise_is_marked():
    texts = "flashprefill_v2,flashprefill_v2:mean_correction=true:block_size=128"
    plain, corrected = make_contenders({}, texts, ("own",))
    assert corrected.label == "flashprefill_v2:block_size=128 (+ mean correction)"
    assert corrected.to_dict()["attention"] == "+ mean correction"
    assert plain.label == "flashprefill_v2"
    assert plain.to_dict()["attention"] == ""


def test_the_budget_rule_is_what_is_stored_with_gates():
    curve = (1.0, 64.0), (2.0, 1.0)
    budgets = Budgets((Budget(0.1, *curve), Budget(0.4, *curve)), 0.1, 4096, 64)
    gates = {"gates": "folder", "older": "another"}
    found = make_contenders(gates, "xattention", ("budget",), PROTOCOLS, {"gates": budgets, "older": None})
    assert [(c.family, c.gates) for c in found] == [("gates, budget rule", "folder")]
    contender = found[0]
    assert contender.stored(0.1) == GateSelector(budgets.policy(0.1))
    assert contender.stored(0.2) == GateSelector(budgets.policy(0.2))
    assert [contender.reaches(density) for density in (0.05, 0.1, 0.2, 0.4, 0.5)] == [False, True, True, True, False]
    assert contender.to_dict()["knob"] is None
    both = make_contenders(gates, "xattention", ("own", "budget"), budgets={"gates": budgets})
    assert [c.family for c in both] == [
        "gates, own rule",
        "gates, budget rule",
        "older, own rule",
        "xattention, own rule",
    ]
    assert all(c.stored(0.2) is None for c in both if c.rule == "own")
    with pytest.raises(ValueError, match="nothing to compare"):
        make_contenders(gates, "xattention", ("budget",))


def test_floors_are_conceded_one_after_the_other():
    project = Contender("x", XAttention(policy=RelativeThreshold(1.0)), "project")
    floors = [(c.policy.min_blocks, c.policy.dense_rows) for c in project.conceding()]
    assert floors == [(4, 16), (2, 4), (1, 0)]
    assert [c.selector for c in Contender("r", RBS(0.5)).conceding()] == [RBS(0.5), RBS(0.5, 1, 1)]
    assert len(Contender("s", Streaming()).conceding()) == 1


def test_knobs():
    assert KNOBS["xattention"].value(0.25) == 0.25
    assert KNOBS["threshold"].value(1.0) == pytest.approx(1e-8)
    assert KNOBS["streaming"].value(0.5) == 1024
    with pytest.raises(ValueError, match="already"):
        register_knob("xattention", Knob("tau", 0.0, 0.5))
    register_knob("xattention", KNOBS["xattention"])


def test_refused(monkeypatch):
    with pytest.raises(ValueError, match="nothing to compare"):
        make_contenders({}, "")
    with pytest.raises(ValueError, match="nothing to compare"):
        make_contenders({}, "streaming", ("project",))
    with pytest.raises(ValueError, match="rules"):
        make_contenders({}, "oracle", ("mine",))
    with pytest.raises(ValueError, match="protocols"):
        make_contenders({}, "oracle", protocols=("mine",))
    with pytest.raises(ValueError, match="naming their folders"):
        make_contenders({}, "gate:policy=top_k(0.1)")
    with pytest.raises(ValueError, match="selector kind must be one of"):
        make_contenders({}, "nothing")
    monkeypatch.delitem(KNOBS, "xattention")
    with pytest.raises(ValueError, match="register_knob"):
        make_contenders({}, "xattention")
    assert dataclasses.is_dataclass(Contender)
