"""Scores, masks and logits of the official implementation, from its checkpoint layout; see tests/golden/README.md."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import seerattention as seer
from seerattention.hf import convert
from seerattention.hf.state import state_of
from seerattention.policies import causal_softmax

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("prefill_llama", "prefill_llama_hd32")
LENGTHS = (64, 65, 127, 200, 512, 1000)
LAYERS, HEADS = 3, 8
TOLERANCE = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore:Some weights of")


class Golden:
    """One fixture folder, unpacked into a base model and a gate folder of the published layout."""

    def __init__(self, name: str, folder: Path):
        source = GOLDEN / name
        self.meta = json.loads((source / "meta.json").read_text())
        self.outputs = load(lzma.decompress((source / "outputs.safetensors.xz").read_bytes()))
        planes = load(lzma.decompress((source / "weights.safetensors.xz").read_bytes()))
        weights = {}
        for key, high in planes.items():
            if key.startswith("high/"):
                low = planes["low/" + key.removeprefix("high/")]
                weights[key.removeprefix("high/")] = torch.stack((low, high), -1).view(torch.bfloat16).squeeze(-1)
        gate = {key.removeprefix("gate:"): value for key, value in weights.items() if key.startswith("gate:")}
        base = {key: value for key, value in weights.items() if not key.startswith("gate:")}
        self.gate_folder = folder / "gate"
        self.gate_folder.mkdir(parents=True)
        shutil.copy(source / "gate_config.json", self.gate_folder / "config.json")
        if gate:
            torch.save(gate, self.gate_folder / "attn_gate_weights.pth")
        else:
            shutil.copy(source / "attn_gate_weights.pth", self.gate_folder)
        base_folder = folder / "base"
        base_folder.mkdir()
        shutil.copy(source / "base_config.json", base_folder / "config.json")
        self.model = self._base_model(base, base_folder)

    @staticmethod
    def _base_model(weights: dict[str, torch.Tensor], folder: Path) -> torch.nn.Module:
        """Weights that no stored output depends on are not in the fixture; zeros take their place."""
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            shapes = {
                name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()
            }
        full = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        assert set(weights) <= set(full)
        for name, value in weights.items():
            full[name][: len(value)] = value
        save_file(full, folder / "model.safetensors", metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, length: int) -> torch.Tensor:
        return self.outputs[f"L{length}/ids"].long()[None]

    def pre(self, length: int, run: str, layer: int) -> torch.Tensor:
        return self.outputs[f"L{length}/{'dense' if layer == 0 else run}/layer{layer}/pre"]

    def mask(self, length: int, run: str, layer: int) -> torch.Tensor:
        """The official mask, bool ``[1, 8, n, n]``."""
        rows, columns = tril(length)
        bits = np.unpackbits(self.outputs[f"L{length}/{run}/layer{layer}/mask"].numpy())[: HEADS * len(rows)]
        blocks = -(-length // 64)
        mask = torch.zeros(1, HEADS, blocks, blocks, dtype=torch.bool)
        mask[0, :, rows, columns] = torch.from_numpy(bits.astype(bool)).view(HEADS, -1)
        return mask

    def diag_kept(self, length: int, run: str) -> list[float]:
        return self.meta["diag_kept"].get(f"L{length}/{run}", [1.0] * LAYERS)

    def policy(self, run: str) -> seer.Policy:
        spec = next(spec for spec in self.meta["runs"] if spec["name"] == run)
        last = 2 if spec["last_block_dense"] else 0
        if run == "dense":
            return seer.TopK(1.0)
        if spec["method"] == "threshold":
            return seer.Threshold(spec["value"], last_blocks_dense=last)
        return seer.TopK(spec["value"], last_blocks_dense=last, uniform=True)


def tril(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = -(-length // 64)
    rows, columns = torch.tril_indices(blocks, blocks)
    return rows, columns


@pytest.fixture(scope="module", params=MODELS)
def golden(request, tmp_path_factory) -> Golden:
    return Golden(request.param, tmp_path_factory.mktemp(request.param))


def run_forward(golden: Golden, length: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Gate logits and block masks by layer, and the model's logits, of one forward of the attached model."""
    scores, masks = [], []

    def watch(inputs: seer.LayerInputs, blocks: seer.BlockIndices | None) -> None:
        assert blocks is not None
        scores.append(inputs.gate_logits())
        masks.append(blocks.to_mask())

    with torch.inference_mode(), seer.observe(golden.model, watch):
        logits = golden.model(golden.ids(length), use_cache=False).logits
    assert len(scores) == LAYERS
    return scores, masks, logits


def assert_scores_equal(golden: Golden, scores: torch.Tensor, length: int, run: str, layer: int) -> None:
    rows, columns = tril(length)
    ours = scores[0][:, rows, columns]
    assert (ours - golden.pre(length, run, layer)).abs().max() <= TOLERANCE, (length, run, layer)
    post = golden.outputs.get(f"L{length}/{run}/layer{layer}/post")
    if post is not None:
        assert (causal_softmax(scores)[0][:, rows, columns] - post).abs().max() <= TOLERANCE, (length, run, layer)


def with_diagonal(mask: torch.Tensor) -> torch.Tensor:
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool)


@pytest.fixture
def attached(golden):
    """The model with its gates."""
    yield seer.attach(golden.model, golden.gate_folder, min_context=0)
    seer.detach(golden.model)


@pytest.mark.parametrize("length", LENGTHS)
def test_end_to_end(golden, attached, length):
    """Every layer of every run whose earlier layers kept all their diagonal blocks: scores, then masks."""
    compared = 0
    for spec in golden.meta["runs"]:
        run = spec["name"]
        kept = golden.diag_kept(length, run)
        seer.set_policy(attached, golden.policy(run))
        scores, masks, _ = run_forward(golden, length)
        for layer in range(LAYERS):
            if min(kept[:layer], default=1.0) < 1.0:
                break
            assert_scores_equal(golden, scores[layer], length, run, layer)
            assert torch.equal(masks[layer], with_diagonal(golden.mask(length, run, layer))), (length, run, layer)
            compared += 1
    # Layer 0 of each run at least; a run without lost diagonals counts in full.
    assert compared >= len(golden.meta["runs"]) + LAYERS - 1


@pytest.mark.parametrize("length", LENGTHS)
def test_layer_by_layer(golden, length):
    """Runs that lost a diagonal block: official masks go to attention; scores and policy must agree in every layer."""
    for spec in golden.meta["runs"]:
        run = spec["name"]
        if min(golden.diag_kept(length, run)) == 1.0:
            continue
        policy = golden.policy(run)

        def official(q, k, *, layer, scale, lengths, run=run):
            return seer.BlockIndices.from_mask(golden.mask(length, run, layer), 64)

        seer.attach(golden.model, golden.gate_folder, selector=official, min_context=0)
        try:
            scores, _, _ = run_forward(golden, length)
        finally:
            seer.detach(golden.model)
        for layer in range(LAYERS):
            assert_scores_equal(golden, scores[layer], length, run, layer)
            ours = policy.select(scores[layer], block_size=64).to_mask()
            assert torch.equal(ours, with_diagonal(golden.mask(length, run, layer))), (length, run, layer)


def test_some_runs_lost_diagonals():
    """Otherwise test_layer_by_layer would pass without comparing anything."""
    for name in MODELS:
        lost = json.loads((GOLDEN / name / "meta.json").read_text())["diag_kept"]
        assert len(lost) > 10


@pytest.mark.parametrize("length", LENGTHS)
def test_dense_logits(golden, length):
    expected = golden.outputs.get(f"L{length}/dense/logits")
    if expected is None:
        pytest.skip("this fixture has no logits")
    seer.attach(golden.model, golden.gate_folder, prefill=seer.TopK(1.0), min_context=0)
    try:
        _, _, sparse = run_forward(golden, length)
        with torch.inference_mode(), seer.dense(golden.model):
            dense = golden.model(golden.ids(length)).logits
    finally:
        seer.detach(golden.model)
    for logits in (sparse, dense):
        assert (logits[0, :, :4] - expected).abs().max() <= TOLERANCE


def test_published_layout_is_read_as_it_is(golden):
    """The placeholder threshold of 0 becomes the default; the dense last rows are kept."""
    seer.attach(golden.model, str(golden.gate_folder))
    try:
        assert state_of(golden.model).policy == seer.Threshold(2e-3, last_blocks_dense=2)
        assert state_of(golden.model).gate_config.block_size == 64
    finally:
        seer.detach(golden.model)


def test_converted_gates_select_the_same(golden, tmp_path):
    converted = convert(golden.gate_folder, tmp_path / "converted")
    results = []
    for folder in (golden.gate_folder, converted):
        seer.attach(golden.model, folder, prefill=seer.Threshold(2e-3), min_context=0)
        try:
            results.append(run_forward(golden, 200))
        finally:
            seer.detach(golden.model)
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(ours, theirs)
