"""``seer env``: what is installed, what it runs on, what each op would use, what is supported. For bug reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from .common import Terminal, errors

SUPPORT = (
    ("model families", "{families}; full-attention layers (sliding-window layers stay dense)"),
    ("prefill", "one forward of the whole prompt, generate(); left and right padding; any length"),
    ("dense for now", "decoding; chunks of fewer tokens than a block, static caches (one warning says so)"),
    ("block size", "32, 64, 128"),
    ("head_dim", "32, 64, 128; others up to 256 through padding or the reference"),
    ("dtypes", "bfloat16, float16, float32"),
    ("policies", "{policies}"),
    ("gate checkpoints", "gate_config.json + gates.safetensors; published AttnGates folders"),
)


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Write everything to stdout as JSON.")] = False,
) -> None:
    """Show versions, devices, the compiler, the implementation that each op would use, and what is supported.

    Paste the output into bug reports.
    """
    with errors():
        terminal = Terminal(as_json)
        data = collect()
        if as_json:
            terminal.emit(data)
            return
        from ..evaluate.tables import Table

        facts = data["environment"]
        rows = [[name, version or "not installed"] for name, version in facts["versions"].items()]
        rows += [
            ["platform", facts["platform"]],
            [
                "processor",
                f"{facts['processor']}, {facts['cpus']} CPUs, {facts['threads']} torch threads, {facts['memory_gib']} "
                "GiB",
            ],
            *(
                ["GPU", f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"]
                for gpu in facts["devices"]
            ),
            ["CUDA of torch", facts["cuda"] or "none (CPU build)"],
            ["C++ compiler", facts["compiler"] or "none found (torch.compile needs one)"],
            ["git commit", facts["git_commit"] or "not a source checkout"],
        ]
        terminal.table(Table(["what", "found"], rows), numbers=False)
        devices = list(data["implementations"])
        rows = [[op, *(data["implementations"][device][op] for device in devices)] for op in ops()]
        terminal.table(
            Table(["op", *devices], rows, caption="Implementation that each op chooses on each device found here."),
            numbers=False,
        )
        terminal.table(Table(["supported", ""], [list(item) for item in data["support"].items()]), numbers=False)


def collect() -> dict[str, Any]:
    """Everything that the command shows."""
    import torch

    from ..evaluate.environment import environment
    from ..hf.architectures import FAMILIES
    from ..policies import KINDS

    policies = ", ".join(policy.__name__ for policy in KINDS.values())
    support = {name: text.format(families=", ".join(sorted(FAMILIES)), policies=policies) for name, text in SUPPORT}
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    facts = environment()
    implementations = {
        device: {op: _implementation(names, device) for op, names in ops().items()} for device in devices
    }
    return {"environment": facts, "implementations": implementations, "support": support}


def ops() -> dict[str, Iterable[str]]:
    """Every op of the package and the names of its implementations.

    Looked up, so that no new op is missing here: each has a folder in ``ops/`` with an ``interface.py``, and variants
    that a folder holds besides have an ``interface_<variant>.py``.
    """
    import importlib
    import pkgutil

    from .. import ops as package

    found = {}
    for folder in pkgutil.iter_modules(package.__path__):
        if not folder.ispkg:
            continue
        name = f"{package.__name__}.{folder.name}"
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__):
            if module.name.split("_")[0] == "interface":
                op = folder.name + module.name.removeprefix("interface")
                found[op] = importlib.import_module(f"{name}.{module.name}").IMPLEMENTATIONS
    return found


def _implementation(names: Iterable[str], device: str) -> str:
    """What an op with these implementations would choose on a device; see ``ops/dispatch.py``."""
    import torch

    from ..ops import dispatch

    if device == "cuda":
        if "triton" not in names or not dispatch.triton_importable():
            return "reference (triton cannot be imported)"
        if "hopper" in names and dispatch.hopper_automatic() and not dispatch.hopper_unusable(torch.device(device)):
            return "hopper where shapes and strides allow, else triton"
        return "triton"
    return next((name for name in names if name.startswith("cpu")), "reference")
