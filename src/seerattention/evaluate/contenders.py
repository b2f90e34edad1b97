"""What is compared: a way to score blocks, a rule that spends the budget, and a protocol, at a density.

Every score is compared under the rule of its own and under the project's, :data:`PROJECT_RULE`: how a budget is spent
matters as much as what the blocks are ranked by. *Every row sparse* is the protocol of headlines: sink and diagonal are
kept only where they are part of a rule. *As published* adds what publications keep besides, counted into the density.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..baselines import parse_selectors
from ..policies import Budgets, Policy, RelativeThreshold, Threshold, TopK, TopP
from ..selectors import GateSelector, Selector
from .settings import Setting

__all__ = [
    "BUDGET",
    "KNOBS",
    "PROJECT_RULE",
    "PROTOCOLS",
    "RULES",
    "RULE_NAMES",
    "BudgetContender",
    "Contender",
    "Knob",
    "make_contenders",
    "register_knob",
]

#: The rule that the package recommends for its gates; the knob is its factor.
PROJECT_RULE: Policy = RelativeThreshold(1.0)
#: Rules by name; "own" is the selector's.
RULES: Mapping[str, Policy | None] = {
    "own": None,
    "project": PROJECT_RULE,
    "top_k": TopK(0.1),
    "top_p": TopP(0.9),
    "threshold": Threshold(5e-3),
}
#: The rule that gates are shipped with: the budgets stored with them say how a density is spent; of gates only.
BUDGET = "budget"
RULE_NAMES = (*RULES, BUDGET)
PROTOCOLS = ("every_row_sparse", "as_published")
#: The rule of gates in the paper (SeerAttention, section 3.3).
_OWN_RULE_OF_GATES = Threshold(5e-3)


@dataclass(frozen=True)
class Knob:
    """The number of a rule that decides how much it keeps.

    Attributes:
        argument: its name.
        sparse, dense: where least, and where most is kept; between them more is kept the nearer to the second.
        log: whether steps are better taken in its logarithm.
        whole: whether it is an integer.
    """

    argument: str
    sparse: float
    dense: float
    log: bool = False
    whole: bool = False

    def value(self, place: float) -> float | int:
        """From 0 at ``sparse`` to 1 at ``dense``."""
        if self.log:
            found = self.sparse * (self.dense / self.sparse) ** place
        else:
            found = self.sparse + (self.dense - self.sparse) * place
        return round(found) if self.whole else found


#: Of selectors with a rule of their own, and of policies, by kind.
KNOBS: dict[str, Knob] = {
    "streaming": Knob("window", 1, 1 << 20, log=True, whole=True),
    "random": Knob("density", 1e-3, 1.0, log=True),
    "xattention": Knob("tau", 0.0, 1.0),
    "flexprefill": Knob("gamma", 0.0, 1.0),
    "minference": Knob("multiplier", 1e-3, 1e3, log=True),
    "minference_exact": Knob("multiplier", 1e-3, 1e3, log=True),
    "sparge": Knob("tau", 0.0, 1.0),
    "flashprefill": Knob("alpha", 1.0, 1e-9, log=True),
    "flashprefill_v2": Knob("alpha", 1.0, 1e-9, log=True),
    "cosa": Knob("tau", 0.0, 1.0),
    "rbs": Knob("alpha", 1.0, 1e-9, log=True),
    "prism": Knob("p", 0.0, 1.0),
    "oracle_cover": Knob("p", 0.0, 1.0),
    "top_k": Knob("density", 1e-3, 1.0, log=True),
    "top_p": Knob("p", 1e-4, 1.0),
    "threshold": Knob("threshold", 0.9999, 1e-8, log=True),
    "relative_threshold": Knob("factor", 1e4, 1e-4, log=True),
    "token_budget": Knob("tokens", 1, 1 << 20, log=True, whole=True),
}

# What is given up, in this order, where a rule always keeps more than is asked for; the first that does it is taken.
_CONCESSIONS: dict[str, Sequence[Mapping[str, Any]]] = {
    "relative_threshold": ({"min_blocks": 2, "dense_rows": 4}, {"min_blocks": 1, "dense_rows": 0}),
    "flashprefill": ({"sink_blocks": 1, "window_blocks": 1},),
    "flashprefill_v2": ({"sink_blocks": 1, "window_blocks": 1},),
    "rbs": ({"sink_blocks": 1, "window_blocks": 1},),
    "flexprefill": ({"min_budget": 1},),
    "sparge": ({"theta": 0.3}, {"theta": -1.0}),
}
# What the mark of a corrected attention says anyway.
_CORRECTED = ":mean_correction=true"
# In sweeps from the beginning: what is absolute in a publication and would fill a prompt of a few thousand tokens.
_ADAPTED: dict[str, Mapping[str, Any]] = {"flexprefill": {"min_budget": 128}}


def _published(selector: Selector) -> Selector | None:
    """The selector with what its publication keeps besides; None where that is nothing."""
    size = getattr(selector, "block_size", 64)
    if selector.kind in ("flashprefill", "flashprefill_v2"):
        # Two, two and four blocks of 128. The second version: the eight last row tiles of its recipe, which are 256
        # tokens where four heads share a KV head, and four layers.
        extras = {"last_blocks_dense": 256 // size, "sink_blocks": 256 // size, "window_blocks": 512 // size}
        if selector.kind == "flashprefill_v2":
            extras["first_layers_dense"] = 4
        return dataclasses.replace(selector, **extras)  # type: ignore[type-var]
    if isinstance(selector, GateSelector):
        return GateSelector(dataclasses.replace(selector.policy, last_blocks_dense=2))  # type: ignore[type-var]
    return None


def register_knob(kind: str, knob: Knob) -> None:
    """Say which number of a selector, or of a policy, of one's own decides how much it keeps.

    Raises:
        ValueError: the kind has another one already.
    """
    if KNOBS.setdefault(kind, knob) != knob:
        raise ValueError(f"the knob of {kind!r} is already {KNOBS[kind]}")


@dataclass(frozen=True)
class Contender:
    """A method under one rule and one protocol, at whatever density.

    Attributes:
        label: what the method is called.
        selector: with any value of its knob.
        rule, protocol: by name, of :data:`RULE_NAMES` and :data:`PROTOCOLS`.
        gates: a folder, for selectors that ask gates.
    """

    label: str
    selector: Selector
    rule: str = "own"
    protocol: str = PROTOCOLS[0]
    gates: str | os.PathLike[str] | None = None

    @property
    def family(self) -> str:
        """Method, rule and protocol in words."""
        published = ", as published" if self.protocol == PROTOCOLS[1] else ""
        return f"{self.label}, {self.rule} rule{published}"

    @property
    def policy(self) -> Policy | None:
        """The policy that chooses, if one does."""
        return getattr(self.selector, "policy", None)

    @property
    def knob(self) -> Knob:
        """What decides how much is kept.

        Raises:
            ValueError: nobody has said.
        """
        kind = self.selector.kind if self.policy is None else self.policy.kind
        if kind not in KNOBS:
            raise ValueError(
                f"{self.label}: nothing is known that decides how much {kind!r} keeps; it has to be one of "
                f"{', '.join(KNOBS)}, or told with register_knob"
            )
        return KNOBS[kind]

    def stored(self, density: float) -> Selector | None:
        """The selector of a density where that is stored and not searched for; None: the knob has to be found."""
        return None

    def reaches(self, density: float) -> bool:
        """Whether it can be asked for this density at all."""
        return True

    def at(self, value: float | int) -> Selector:
        """The selector with this value of its knob."""
        if self.policy is None:
            return dataclasses.replace(self.selector, **{self.knob.argument: value})  # type: ignore[type-var]
        policy = dataclasses.replace(self.policy, **{self.knob.argument: value})  # type: ignore[type-var]
        return dataclasses.replace(self.selector, policy=policy)  # type: ignore[type-var]

    @property
    def _knob_name(self) -> str | None:
        return self.knob.argument

    def setting(self, selector: Selector, density: float) -> Setting:
        """What is measured."""
        gates = self.gates if selector.needs_gate else None
        return Setting(f"{self.family} {density:g}", gates=gates, selector=selector)

    def conceding(self) -> list[Contender]:
        """This, and what to try next where it keeps more than is asked for. What is published stays as it is."""
        found = [self]
        if self.protocol == PROTOCOLS[0]:
            kind = self.selector.kind if self.policy is None else self.policy.kind
            for changes in _CONCESSIONS.get(kind, ()):
                if self.policy is None:
                    made = dataclasses.replace(self.selector, **changes)  # type: ignore[type-var]
                else:
                    policy = dataclasses.replace(self.policy, **changes)  # type: ignore[type-var]
                    made = dataclasses.replace(self.selector, policy=policy)  # type: ignore[type-var]
                found.append(dataclasses.replace(self, selector=made))
        return found

    def to_dict(self) -> dict[str, Any]:
        """For readers of results."""
        return {
            "label": self.label,
            "family": self.family,
            "rule": self.rule,
            "protocol": self.protocol,
            "attention": self.selector.attention,
            "knob": self._knob_name,
            "needs_gates": self.selector.needs_gate,
            "whole_prompt": not self.selector.rowwise,
        }


@dataclass(frozen=True)
class BudgetContender(Contender):
    """Gates under the rule that they are shipped with: as ``attach(density=)`` would run them, and no knob is searched.

    Attributes:
        budgets: those that are stored with the gates.
    """

    budgets: Budgets | None = None

    def stored(self, density: float) -> Selector:
        assert self.budgets is not None
        return GateSelector(self.budgets.policy(density))

    def reaches(self, density: float) -> bool:
        assert self.budgets is not None
        return self.budgets.densities[0] <= density <= self.budgets.densities[-1]

    @property
    def _knob_name(self) -> None:
        return None


def make_contenders(
    gates: Mapping[str, str | os.PathLike[str]],
    selectors: str,
    rules: Sequence[str] = ("own", "project"),
    protocols: Sequence[str] = PROTOCOLS[:1],
    budgets: Mapping[str, Budgets | None] | None = None,
) -> list[Contender]:
    """Every method under every rule that it can have and every protocol that changes something.

    Args:
        gates: folders by what they are called.
        selectors: as :func:`~seerattention.baselines.parse_selectors` takes them; "" for none.
        rules, protocols: by name.
        budgets: those that are stored with the gates, by what these are called; gates without are left out under the
            rule :data:`BUDGET`, which is for gates only.

    Raises:
        ValueError: unknown names, selectors that cannot be read or swept, or nothing to compare.
    """
    for given, known, what in ((rules, RULE_NAMES, "rules"), (protocols, PROTOCOLS, "protocols")):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise ValueError(f"{what} {unknown} are not known; choose from {', '.join(known)}")
    methods: list[tuple[str, Selector, Any]] = [
        (name, GateSelector(_OWN_RULE_OF_GATES), folder) for name, folder in gates.items()
    ]
    for name, selector in (parse_selectors(selectors) if selectors.strip() else {}).items():
        if selector.needs_gate:
            raise ValueError(f"{name}: gates are compared by naming their folders, under the rules that are asked for")
        adapted = {k: v for k, v in _ADAPTED.get(selector.kind, {}).items() if f"{k}=" not in name}
        methods.append((name, dataclasses.replace(selector, **adapted), None))  # type: ignore[type-var]
    methods = _short_names(methods)
    found: list[Contender] = []
    for name, selector, folder in methods:
        for rule in rules:
            if rule == BUDGET:
                stored = (budgets or {}).get(name) if selector.needs_gate else None
                if stored is not None and PROTOCOLS[0] in protocols:
                    spent = GateSelector(stored.policy())
                    found.append(BudgetContender(name, spent, rule, gates=folder, budgets=stored))
                continue
            made = _under(selector, RULES[rule], "own" in rules)
            if made is None:
                continue
            contender = Contender(name, made, rule, gates=folder)
            if not any(other.selector == made and other.label == name for other in found):
                contender.knob  # noqa: B018 (says what is wrong before any work)
                found += [contender] if PROTOCOLS[0] in protocols else []
            published = _published(made) if rule == "own" else None
            if PROTOCOLS[1] in protocols and published is not None:
                found.append(dataclasses.replace(contender, selector=published, protocol=PROTOCOLS[1]))
    if not found:
        raise ValueError("there is nothing to compare: no gates, and no selector under any of these rules")
    return found


def _short_names(methods: list[tuple[str, Selector, Any]]) -> list[tuple[str, Selector, Any]]:
    """Without the policies, whose numbers are only where a sweep begins, unless two would have one name. What is read
    by another attention than that of all others is marked."""
    methods = [
        (f"{name.replace(_CORRECTED, '')} ({selector.attention})" if selector.attention else name, selector, folder)
        for name, selector, folder in methods
    ]
    short = [re.sub(r":policy=\w+\s*(\([^)]*\))?", "", name) for name, *_ in methods]
    return [(new if short.count(new) == 1 else name, *rest) for new, (name, *rest) in zip(short, methods, strict=True)]  # type: ignore[misc]


def _under(selector: Selector, policy: Policy | None, with_own: bool) -> Selector | None:
    """The selector with this policy in place of its own rule; None where it has no scores, or where that is its own
    rule, under which it is compared anyway."""
    if policy is None:
        return selector
    if not any(field.name == "policy" for field in dataclasses.fields(selector)):  # type: ignore[arg-type]
        return None
    own = getattr(selector, "policy", None)
    if own is not None and own.kind == policy.kind:
        return None if with_own else selector
    return dataclasses.replace(selector, policy=policy)  # type: ignore[type-var]
