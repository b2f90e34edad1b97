"""Results files: one a benchmark and device, ``results/<device>/<benchmark>.json``, which holds runs.

A run is one command: ``{"started", "device", "command", "variables", "environment", "results": [{"case", "metrics",
...}]}``, where ``variables`` are the environment variables that choose implementations. Files grow by runs; of a case
that was measured several times the latest run counts.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from seerattention.evaluate.environment import environment
from seerattention.files import write_file

ROOT = Path(__file__).parent / "results"
REHEARSAL = Path("runs") / "rehearsal"
_VARIABLES = ("SEER_", "TRITON_", "OMP_NUM_THREADS")


def device_folder(device: torch.device, facts: dict[str, Any]) -> str:
    """Name of the folder for results of a device: ``cpu``, or the GPU's name without its maker (``h200``)."""
    if device.type != "cuda":
        return device.type
    name = str(facts["devices"][device.index or 0]["name"]).lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\b(nvidia|amd|geforce|instinct)\b", "", name)).strip("-")


@dataclass
class Run:
    """One command's results, on disk after every case, so that a run that is cut off loses one case at most.

    Attributes:
        benchmark: name of the results file.
        folder: where it goes.
        device: name of the folder where it belongs, see :func:`device_folder`.
    """

    benchmark: str
    folder: Path
    device: str
    command: str
    facts: dict[str, Any] = field(default_factory=environment)
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat())
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The results file."""
        return self.folder / f"{self.benchmark}.json"

    def add(self, result: dict[str, Any]) -> None:
        """Append one case's result and save."""
        self.results.append(result)
        merge_runs(self.path, self.benchmark, [self.to_dict()])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "started": self.started,
            "device": self.device,
            "command": self.command,
            "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
            "environment": self.facts,
            "results": self.results,
        }


def start_run(
    benchmark: str, module: str, arguments: Sequence[str], device: torch.device, output: Path | None, tiny: bool
) -> Run:
    """A run whose results go to ``output``, or to the folder of the device; a rehearsal's never go there."""
    facts = environment()
    own = device_folder(device, facts)
    folder = output or (REHEARSAL if tiny else ROOT) / own
    return Run(benchmark, folder, own, f"python -m {module} {shlex.join(arguments)}".strip(), facts)


def merge_runs(path: Path, benchmark: str, runs: list[dict[str, Any]]) -> None:
    """Add runs to a results file, which is made where there is none; a run that it holds already is replaced."""
    held = json.loads(path.read_text())["runs"] if path.exists() else []
    new = {run["started"] for run in runs}
    kept = [run for run in held if run["started"] not in new]
    data = {"benchmark": benchmark, "runs": sorted([*kept, *runs], key=lambda run: run["started"])}
    write_file(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def merge_folder(source: Path, root: Path = ROOT) -> list[Path]:
    """Add all runs of a folder's results files to those of their devices; returns the files that changed."""
    changed = []
    for path in sorted(source.rglob("*.json")):
        data = json.loads(path.read_text())
        if not {"benchmark", "runs"} <= set(data):
            continue
        for run in data["runs"]:
            target = root / run["device"] / f"{data['benchmark']}.json"
            merge_runs(target, data["benchmark"], [run])
            changed.append(target)
    return list(dict.fromkeys(changed))


def latest_results(folder: Path, benchmark: str) -> list[dict[str, Any]]:
    """The latest result of every case, in the order of their first appearance, each with its run's environment."""
    path = folder / f"{benchmark}.json"
    if not path.exists():
        return []
    found: dict[str, dict[str, Any]] = {}
    for run in json.loads(path.read_text())["runs"]:
        for result in run["results"]:
            found[json.dumps(result["case"], sort_keys=True)] = {**result, "environment": run["environment"]}
    return list(found.values())


def own_arguments() -> list[str]:
    """The arguments of this process."""
    return sys.argv[1:]
