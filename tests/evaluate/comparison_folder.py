"""A folder of results as ``seer compare`` writes them, made without a model."""

import hashlib

import numpy as np

from seerattention.evaluate import Journal, PerplexityResult, TimingResult
from seerattention.evaluate.comparison import RUN, RunResult
from seerattention.evaluate.map_measure import MapResult
from seerattention.evaluate.text_tasks import TextResult

LENGTHS = (2048, 4096)
DENSITIES = (0.1, 0.3)
BLOCKS = 24
METHODS = {
    "gates": ("own", False, 0.9), "oracle": ("own", False, 1.0), "<xattention>": ("project", True, 0.5)
}  # fmt: skip
MODEL = "a <b>tiny</b> model"


def write_folder(folder):
    """Three methods at two lengths and densities; the scores of a method follow from the last number of it."""
    journal = Journal(folder)
    told = {
        "model": MODEL, "parameters": 1, "gates": {"gates": str(folder / "gates")}, "seed": 0,
        "command": ["seer", "compare"],
        "environment": {"devices": [], "processor": "a processor", "versions": {"torch": "2.11", "triton": None}},
    }  # fmt: skip
    journal.add({"measure": RUN, "run": "r", "settings": [], "time": 1.0}, "run", [RunResult(told)])
    for length in LENGTHS:
        _add(journal, length, "dense", 1.0, 1.0, None)
        for name, (rule, whole, quality) in METHODS.items():
            for density in DENSITIES:
                contender = {
                    "label": name, "family": f"{name}, {rule} rule", "rule": rule, "protocol": "every_row_sparse",
                    "whole_prompt": whole, "reached": name != "oracle", "conceded": int(whole),
                }  # fmt: skip
                _add(journal, length, f"{name}, {rule} rule {density:g}", density, quality, contender)
    return folder


def _add(journal, length, name, density, quality, contender):
    rng = np.random.default_rng(len(name) + length)
    right = (np.arange(20) < 20 * quality).astype(np.float32)
    tasks = TextResult(name, length, density, {"niah_single_2": right, "copy": 0.2 * right}, {"qa_squad": 2 - right})
    base = np.random.default_rng(0).random((4, length - 1)).astype(np.float32)
    perplexity = PerplexityResult(name, density, base + np.float32(0.1 * (1 - quality)))
    timing = [
        TimingResult("dense", length, 1, 1.0, 0.1, [0.2, 0.2]),
        TimingResult(name, length, 1, density, 0.1, [0.1]),
    ]
    facts = {"run": "r", "target": density, "length": length, "seconds": 1.5, "peak_bytes": 1 << 30, "prompts": "p"}
    if contender is not None:
        facts["contender"] = contender
    found = {"tasks": [tasks], "perplexity": [perplexity], "timing": timing if contender else timing[:1]}
    if contender is not None and length == LENGTHS[0]:
        found["maps"] = [_maps(name, density, rng, not name.startswith("oracle"))]
    for measure, results in found.items():
        case = {"measure": measure, "settings": [result.setting for result in results], **facts}
        digest = hashlib.sha256(f"{measure} {length} {name}".encode()).hexdigest()
        journal.add(case, digest, results)


def _maps(name, density, rng, scored):
    shape = 2, 3, BLOCKS, BLOCKS
    target = rng.integers(0, 256, shape, dtype=np.uint8)
    shares = np.full((4, 3), density, dtype=np.float32)
    return MapResult(
        name, density, [0, 3], [0, 1, 2], 64, np.full((4, 3), 0.5, np.float32), shares, target,
        rng.integers(0, 256, shape, dtype=np.uint8) if scored else None, rng.random(shape) < density,
    )  # fmt: skip
