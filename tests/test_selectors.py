"""Selectors as things: by name, as dicts, from functions; what they say of themselves is true."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

import seerattention as seer
from seerattention import Dense, Threshold, TokenBudget, TopK, TopP, selectors
from seerattention.baselines import Oracle, Selector, parse_selectors, selector_from_dict
from seerattention.selectors import FunctionSelector, GateSelector, LayerInputs, as_selector

BLOCK = 32


def inputs_of(q: torch.Tensor, k: torch.Tensor, gate: torch.nn.Module | None = None) -> LayerInputs:
    table = torch.ones(1, q.shape[2], q.shape[3])
    return LayerInputs(
        layer=0, q=q, k=k, v=k, q_pre=q, k_pre=k, cos=table, sin=0 * table, lengths=None, scale=0.3, gate=gate
    )


def make_inputs(length: int) -> LayerInputs:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, length, 16, generator=generator), torch.randn(1, 2, length, 16, generator=generator)
    torch.manual_seed(1)
    gate = seer.gates.build_gate(
        seer.PrefillGateConfig(rope=False), block_size=BLOCK, num_heads=4, num_kv_heads=2, head_dim=16
    )
    return inputs_of(q, k, gate)


def cut(inputs: LayerInputs, length: int) -> LayerInputs:
    return inputs_of(inputs.q[:, :, :length], inputs.k[:, :, :length], inputs.gate)


@pytest.fixture
def registry():
    """Selectors that a test defines are gone afterwards."""
    known = dict(selectors.SELECTORS)
    yield
    selectors.SELECTORS.clear()
    selectors.SELECTORS.update(known)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oracle", [Oracle()]),
        ("oracle:block_size=32", [Oracle(block_size=32)]),
        ("oracle:policy=top_k(0.1):block_size=32", [Oracle(TopK(0.1), 32)]),
        (" oracle : policy = top_k( density=0.1, uniform=true ) ", [Oracle(TopK(0.1, uniform=True))]),
        ("gate:policy=threshold(2e-3, last_blocks_dense=1)", [GateSelector(Threshold(2e-3, last_blocks_dense=1))]),
        (
            "gate:policy=token_budget(64),gate:policy=top_p(0.9)",
            [GateSelector(TokenBudget(64)), GateSelector(TopP(0.9))],
        ),
        ("oracle:policy=dense, gate:policy=dense()", [Oracle(Dense()), GateSelector(Dense())]),
    ],
)
def test_selectors_from_strings(text, expected):
    found = parse_selectors(text)
    assert list(found.values()) == expected
    assert "".join(found).replace(" ", "") == text.replace(" ", "").replace(",gate", "gate")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty description; selectors are .*gate, .*oracle, "),
        ("oracle,", "empty description"),
        ("oracle,oracle", "'oracle' twice"),
        ("orakel", r"'orakel': selector kind must be one of \[.*'gate', .*'oracle', .*\], got 'orakel'"),
        ("oracle:stride=8", r"takes \['policy', 'block_size', 'reduce'\]; unknown: \['stride'\]"),
        ("gate", r"missing: \['policy'\]"),
        ("oracle:block_size", "form name=value"),
        ("oracle:block_size=", "form name=value"),
        ("oracle:block_size=32:block_size=64", "each name once"),
        ("oracle:kind=gate", "form name=value"),
        ("oracle:policy=topk(0.1)", "policy kind must be one of"),
        ("oracle:policy=top_k(0.1, 2)", "only the first argument"),
        ("oracle:policy=top_k(0.1, density=0.2)", "density is given twice"),
        ("oracle:policy=top_k(7)", r"density .* must lie in \(0, 1\]"),
        ("oracle:policy=top_k(0.1", "form kind"),
        ("oracle:policy=dense(1)", "unknown"),
    ],
)
def test_bad_strings(text, message):
    with pytest.raises(ValueError, match=message):
        parse_selectors(text)


@pytest.mark.parametrize("selector", [Oracle(), Oracle(TopK(0.3, uniform=True), 32), GateSelector(TopP(0.5))])
def test_selectors_go_through_json(selector):
    assert selector_from_dict(json.loads(json.dumps(selector.to_dict()))) == selector


def test_bad_dicts():
    with pytest.raises(ValueError, match="a mapping with a kind, got str"):
        selector_from_dict("oracle")
    with pytest.raises(ValueError, match="kind must be one of"):
        selector_from_dict({"policy": Dense().to_dict()})
    with pytest.raises(ValueError, match="kind must be one of"):
        selector_from_dict({"kind": "function", "name": "f"})


@pytest.mark.parametrize("kind", [Oracle, GateSelector])
@pytest.mark.parametrize(
    "policy",
    [
        Threshold(0.1),
        TopK(0.3),
        TopP(0.6),
        TokenBudget(80),
        Dense(),
        Threshold(0.1, last_blocks_dense=1),
        TopP(0.6, last_blocks_dense=2),
        TokenBudget(80, last_blocks_dense=1),
        TopK(0.3, last_blocks_dense=1),
        TopK(0.5, uniform=True),
    ],
    ids=repr,
)
def test_rowwise_is_true_where_the_end_of_the_prompt_makes_no_difference(kind, policy):
    selector = Oracle(policy, block_size=BLOCK) if kind is Oracle else GateSelector(policy)
    whole = make_inputs(12 * BLOCK)
    mask = selector.select(whole).to_mask()
    same = [
        torch.equal(selector.select(cut(whole, rows * BLOCK)).to_mask(), mask[:, :, :rows, :rows])
        for rows in range(1, 12)
    ]
    assert selector.rowwise == all(same)


def test_functions_keep_their_signature():
    seen = []

    def sinks(q, k, *, layer, scale, lengths):
        seen.append((q, k, layer, scale, lengths))
        return seer.BlockIndices.from_mask(torch.ones(1, 4, 3, 3, dtype=torch.bool).tril(), BLOCK)

    selector, inputs = as_selector(sinks), make_inputs(3 * BLOCK)
    assert isinstance(selector, FunctionSelector)
    assert selector.select(inputs).density() == 1.0
    assert seen[0][0] is inputs.q
    assert seen[0][1] is inputs.k
    assert seen[0][2:] == (0, 0.3, None)
    assert not selector.rowwise
    assert selector.to_dict()["name"].endswith("sinks")
    assert as_selector(selector) is selector
    assert as_selector(oracle := Oracle()) is oracle


def test_what_is_no_selector():
    with pytest.raises(TypeError, match=r"callable as selector\(q, k, layer=, scale=, lengths=\), got int"):
        as_selector(3)
    with pytest.raises(TypeError, match="got the class Oracle"):
        as_selector(Oracle)  # the class is callable: Oracle(q, k, ...) would fail in the middle of a forward
    with pytest.raises(TypeError, match="abstract"):
        Selector()


def test_a_method_joins_by_being_defined(registry):
    """One class is all it takes: strings, dicts and models know it."""

    @dataclass(frozen=True)
    class Window(Selector):
        blocks: int = 2
        sink: bool = True

        kind = "window"
        rowwise = True

        def select(self, inputs):
            size = -(-inputs.q.shape[2] // BLOCK)
            rows, columns = torch.arange(size)[:, None], torch.arange(size)
            mask = ((rows - columns < self.blocks) | (columns == 0 if self.sink else columns < 0)) & (rows >= columns)
            return seer.BlockIndices.from_mask(mask.expand(*inputs.q.shape[:2], -1, -1), BLOCK)

    selector = parse_selectors("window:blocks=3:sink=false")["window:blocks=3:sink=false"]
    assert selector == Window(3, sink=False)
    assert selector_from_dict(selector.to_dict()) == selector
    assert selector.select(make_inputs(10 * BLOCK)).to_mask().sum(-1)[0, 0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="the kind 'window' is that of Window"):

        class Other(Selector):
            kind = "window"
