"""The model card that lies beside saved gates: Markdown for people, which nothing reads."""

from __future__ import annotations

import json
from typing import Any

from ..config import PHASES, GateConfig

_WHAT = {
    "prefill": """Learned gates (arXiv 2410.13276) that choose which {size}x{size} blocks of the
attention map a long prompt reads.""",
    "decode": """Learned gates (arXiv 2506.08889) that choose which blocks of {size} cached keys
each new token reads.""",
}


def card_notes(card: str) -> str:
    """What people wrote at the end of a card: everything from its first second-level heading on, of which
    :func:`model_card` itself makes none; empty if there is nothing."""
    _, heading, notes = card.partition("\n## ")
    return f"## {notes.strip()}\n" if heading else ""


def model_card(description: dict[str, Any], notes: str = "") -> str:
    """The README.md of gates, from their description as ``gate_config.json`` has it, with ``notes`` at its end."""
    base, gates = description["base_model"], description["gates"]
    config = GateConfig.from_dict(gates)
    name = base["name"] or f"a {base['model_type']} model of {base['num_hidden_layers']} layers"
    header = ["---", "library_name: seerattention", "tags: [sparse-attention, seerattention]"]
    if base["name"] and base["name"].count("/") == 1 and not base["name"].startswith((".", "/", "~")):
        header.append(f"base_model: {base['name']}")
    header.append("---")
    what = "\n".join(_WHAT[phase].format(size=config.block_size_of(phase)) for phase in config.phases)
    table = "\n".join(f"| {key} | {value} |" for key, value in base.items() if value is not None)
    rows = "\n".join(_rows(phase, description) for phase in PHASES if phase in config.phases)
    return (
        "\n".join(header)
        + f"""

# SeerAttention gates for {name}

{what} The base model is not part of this folder and stays unchanged.

```python
import seerattention as seer
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base["name"] or "<base model>"!r}, dtype="bfloat16")
seer.attach(model, "<this folder>")
```

| base model | |
|---|---|
{table}

| gates | |
|---|---|
{rows}
| written by | seerattention {description["package_version"]} |
"""
        + (f"\n{notes}" if notes else "")
    )


def _rows(phase: str, description: dict[str, Any]) -> str:
    """The rows of the table that say what gates and policy of a phase are."""
    policy = description["policies"].get(phase)
    rows = [f"| {phase} | `{json.dumps(description['gates'][phase])}` |"]
    if policy is not None:
        numbers = {name: value for name, value in policy.items() if not isinstance(value, list | tuple)}  # of budgets
        rows.append(f"| {phase} policy | `{json.dumps(numbers)}` |")
        if policy.get("layers"):
            by_layer = ", ".join(f"{times:.2f}" for times in policy["layers"])
            rows.append(f"| factors of its layers | {by_layer} |")
    return "\n".join(rows)
