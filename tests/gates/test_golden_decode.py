"""Decoding step by step against the official implementation of SeerAttention-R; see tests/golden/README.md.

The fixture in the tree has the first layer, on which no choice of blocks has an effect yet. One of all layers, which
``make_decode_qwen3.py`` makes, is taken from the folder that GOLDEN_DECODE_QWEN3 names: there every layer sees what the
blocks that earlier ones read have led to.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import seerattention as seer
from seerattention.gates import build_gate, select_by_token
from seerattention.gates.sources import load_gates
from seerattention.ops import block_sparse_decode
from seerattention.ops.span import Span
from seerattention.policies import PublishedDecode
from token_policies import naive

SOURCE = Path(os.environ.get("GOLDEN_DECODE_QWEN3") or Path(__file__).parents[1] / "golden" / "decode_qwen3")
META = json.loads((SOURCE / "meta.json").read_text())
TOLERANCE = 1e-4
KV_HEADS = 2
OWN_POLICIES = (
    seer.TokenBudget(128),
    seer.TokenBudget(96),
    seer.Threshold(4e-3),
    seer.Threshold(0.2),
    seer.TopP(0.9),
    seer.TopK(0.5),
)


class Golden:
    """The base model, whose attention is replaced by gates that choose for single tokens, and what is expected."""

    def __init__(self, folder: Path):
        self.outputs = load(lzma.decompress((SOURCE / "outputs.safetensors.xz").read_bytes()))
        planes = load(lzma.decompress((SOURCE / "weights.safetensors.xz").read_bytes()))
        names = [name.removeprefix("low/") for name in planes if name.startswith("low/")]
        weights = {
            name: torch.stack((planes[f"low/{name}"], planes[f"high/{name}"]), -1).flatten(-2).view(torch.bfloat16)
            for name in names
        }
        gate = {name.removeprefix("gate:"): x for name, x in weights.items() if name.startswith("gate:")}
        self.gate_folders = {size: self._gate_folder(folder / f"bs{size}", gate, size) for size in META["block_sizes"]}
        shutil.copy(SOURCE / "base_config.json", folder / "config.json")
        config = AutoConfig.from_pretrained(folder, attn_implementation=NAME)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, value in self.model.named_parameters():  # what nothing depends on is not in the fixture
                value.copy_(weights[name]) if name in weights else value.zero_()
        self.layers = META["layers"]

    @staticmethod
    def _gate_folder(folder: Path, weights: dict[str, torch.Tensor], block_size: int) -> Path:
        folder.mkdir()
        config = json.loads((SOURCE / "gate_config.json").read_text()) | {"seerattn_gate_block_size": block_size}
        (folder / "config.json").write_text(json.dumps(config))
        torch.save(weights, folder / "attn_gate_weights.pth")
        return folder

    def gates(self, block_size: int) -> dict[int, torch.nn.Module]:
        config = self.model.config
        checkpoint = load_gates(self.gate_folders[block_size], config)
        shape = {
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
        }
        built = {layer: build_gate(checkpoint.gate_config.spec_of("decode"), **shape) for layer in range(self.layers)}
        checkpoint.load_into(built, "decode")
        return built

    def pre(self, run: str) -> torch.Tensor:
        """Official scores ``[steps, layers, Hkv, blocks]``; the first layer's are stored once for all methods."""
        stored = next(name for name in META["runs"] if name.rsplit("/", 2)[0] == run.rsplit("/", 2)[0])
        first, own = self.outputs[f"{stored}/pre"], self.outputs.get(f"{run}/pre")
        if run == stored:
            return first
        return first if own is None else torch.cat([first[:, :1], own], 1)

    def mask(self, run: str) -> torch.Tensor:
        shape = self.pre(run).shape
        bits = np.unpackbits(self.outputs[f"{run}/mask"].numpy())[: math.prod(shape)]
        return torch.from_numpy(bits.astype(bool)).view(shape)


NAME = "golden_decode"


class Decoder:
    """What the model's attention does while it is open: dense prompts, then tokens that read what a policy says.

    Attributes:
        scores, blocks: of the latest step, by layer: the gate's logits and the lists that attention has read.
        keys: encoded keys, by layer.
    """

    def __init__(self, golden: Golden, block_size: int, policy: seer.Policy):
        self.model, self.policy, self.gates = golden.model, policy, golden.gates(block_size)
        self.states = {layer: gate.new_state() for layer, gate in self.gates.items()}
        self.scores, self.blocks, self.keys, self.seen = {}, {}, {}, {}
        self.handles = [self.model.model.rotary_emb.register_forward_hook(self._watch("rotary"))]
        for layer, module in enumerate(self.model.model.layers):
            for name in ("q", "k"):
                norm = getattr(module.self_attn, f"{name}_norm")
                self.handles.append(norm.register_forward_hook(self._watch((name, layer))))

    def __enter__(self):
        AttentionInterface.register(NAME, self._attend)
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _watch(self, name):
        return lambda module, arguments, output: self.seen.__setitem__(name, output)

    def _attend(self, module, query, key, value, attention_mask, scaling=None, **_):
        layer, (cos, sin) = module.layer_idx, self.seen["rotary"]
        q, k = (self.seen[name, layer].transpose(1, 2) for name in ("q", "k"))  # before RoPE
        gate = self.gates[layer]
        self.keys[layer] = gate.encode_keys(k, cos, sin, state=self.states[layer])
        if query.shape[2] > 1:
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2), None
        span = Span(1, 1, key.shape[2])
        self.scores[layer] = gate.score(gate.encode_queries(q, cos, sin, span=span), self.keys[layer], span=span)
        self.blocks[layer] = select_by_token(self.policy, self.scores[layer], block_size=gate.block_size, span=span)
        out = block_sparse_decode(query, key, value, self.blocks[layer], scale=scaling)
        return out.transpose(1, 2), None


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Golden:
    AttentionInterface.register(NAME, torch.nn.functional.scaled_dot_product_attention)  # so that configs may name it
    return Golden(tmp_path_factory.mktemp("decode_qwen3"))


def policy_of(run: str, **options) -> PublishedDecode:
    method = next(x for x in META["methods"] if x["name"] == run.split("/")[2])
    return PublishedDecode(**{"threshold" if method["method"] == "threshold" else "tokens": method["value"]}, **options)


def parts_of(run: str) -> tuple[int, int, int]:
    """Length of the prompt, block size, and how many steps of a run are comparable.

    The official variant encodes the first block that decoding completes at another position.
    """
    prompt, size = (int(part.removeprefix(what)) for part, what in zip(run.split("/"), ("P", "bs"), strict=False))
    steps = META["steps"] if not run.endswith("/official") else size - prompt % size - 1
    return prompt, size, min(steps, META["steps"])


def as_published(scores: torch.Tensor) -> torch.Tensor:
    """Our logits with the published score of the open block, which is 0."""
    return scores.masked_fill(scores == -math.inf, 0.0)


@pytest.mark.parametrize("run", META["runs"])
@torch.inference_mode()
def test_step_by_step(golden, run):
    """Scores within the tolerance, and the same blocks, in each layer of each step of a whole run."""
    prompt, size, steps = parts_of(run)
    pre, mask = golden.pre(run), golden.mask(run)
    forced = golden.outputs[f"forced_{prompt}"].long()
    published_mask = policy_of(run, first_block=False)
    assert 1 <= steps <= len(forced)
    with Decoder(golden, size, policy_of(run)) as decoder:
        past = golden.model(golden.outputs[f"prompt_{prompt}"].long()[None], use_cache=True).past_key_values
        for layer in range(golden.layers):
            expected = golden.outputs[f"P{prompt}/bs{size}/kcomp_after_prefill/layer{layer}"].transpose(0, 1)
            complete = prompt // size
            assert (decoder.keys[layer][0] - expected[:, :complete]).abs().max() <= TOLERANCE
            assert (expected[:, complete:] == 0).all()  # D1: the open block is a zero vector
        for step in range(steps):
            golden.model(forced[None, step : step + 1], past_key_values=past, use_cache=True)
            span = Span(1, 1, prompt + step + 1)
            blocks = span.num_key_blocks(size)
            for layer in range(golden.layers):
                scores, where = decoder.scores[layer], (run, step, layer)
                ours, theirs = as_published(scores)[0, :, 0], pre[step, layer, :, :blocks]
                assert scores.shape == (1, KV_HEADS, 1, blocks)
                assert (ours - theirs).abs().max() <= TOLERANCE, where
                assert (ours.softmax(-1) - theirs.softmax(-1)).abs().max() <= TOLERANCE, where
                expected = mask[step, layer, :, :blocks]
                chosen = select_by_token(published_mask, scores, block_size=size, span=span)
                assert torch.equal(chosen.to_mask()[0, :, 0], expected), where
                expected[:, 0] = True  # D3: the published kernel reads the first block besides
                assert torch.equal(decoder.blocks[layer].to_mask()[0, :, 0], expected), where


@pytest.mark.parametrize("run", META["runs"])
def test_our_policies_on_these_scores(golden, run):
    """By default the open block has no score, and it is read besides what is chosen of the others."""
    prompt, size, steps = parts_of(run)
    pre = golden.pre(run)
    for step in range(steps):
        end = prompt + step + 1
        span = Span(golden.layers, 1, end)
        scores = pre[step, :, :, None, : span.num_key_blocks(size)].clone()
        scores[..., end // size :] = -math.inf
        for policy in OWN_POLICIES:
            mask = select_by_token(policy, scores, block_size=size, span=span).to_mask()
            for found, row in zip(mask.flatten(0, 2), scores.flatten(0, 2), strict=True):
                assert set(found.nonzero().flatten().tolist()) == naive(policy, row.tolist(), size)
                assert found[-1]


def test_all_kinds_of_runs_are_there():
    """Otherwise the tests above would pass without comparing anything."""
    assert len(META["runs"]) == len(META["prompts"]) * len(META["block_sizes"]) * len(META["methods"])
    assert sum(parts_of(run)[2] for run in META["runs"]) > 12 * META["steps"]
    for prompt in META["prompts"]:  # blocks are completed in decoding
        assert all(prompt // size < (prompt + META["steps"]) // size for size in META["block_sizes"])
