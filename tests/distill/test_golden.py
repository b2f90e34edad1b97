"""Losses and gradients of the published training code on a whole model (its reduction, its ground-truth rounding)."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoConfig, AutoModelForCausalLM

from seerattention.distillation import DistillConfig
from seerattention.distillation.losses import kl_count, kl_sum
from seerattention.distillation.trainer import Trainer
from seerattention.hf import attach, dense, observe

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LAYERS = 3


@pytest.fixture(scope="module")
def data():
    return load_file(GOLDEN / "distill_targets" / "training_losses.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The fixture's base model with its gates, from the published layout; see tests/golden/README.md."""
    source, folder = GOLDEN / "prefill_llama", tmp_path_factory.mktemp("gate")
    planes = load(lzma.decompress((source / "weights.safetensors.xz").read_bytes()))
    names = [name.removeprefix("high/") for name in planes if name.startswith("high/")]
    weights = {
        name: torch.stack((planes[f"low/{name}"], planes[f"high/{name}"]), -1).view(torch.bfloat16).squeeze(-1)
        for name in names
    }
    torch.save(
        {n.removeprefix("gate:"): w for n, w in weights.items() if n.startswith("gate:")},
        folder / "attn_gate_weights.pth",
    )
    shutil.copy(source / "gate_config.json", folder / "config.json")
    shutil.copy(source / "base_config.json", folder / "base.json")
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "base.json"), dtype=torch.float32)
    # Only four rows of the LM head are in the fixture, and losses do not need it.
    decoder = {name: weight.float() for name, weight in weights.items() if name.startswith("model.")}
    missing, unexpected = base.load_state_dict(decoder, strict=False)
    assert not unexpected
    assert missing == ["lm_head.weight"]
    return attach(base.eval(), folder, min_context=0)


@pytest.mark.parametrize("length", [320, 512])
def test_loss_and_gradients_from_the_stored_targets(model, data, length):
    """With the official maps as targets, only our logits and our reduction are at work: they must agree closely."""
    run = f"prefill_llama/L{length}"
    blocks = length // 64
    rows = torch.arange(blocks // 4, blocks)
    losses = {}

    def measure(inputs, _):
        layer = f"{run}/layer{inputs.layer}"
        weight = inputs.gate.k_linear
        with torch.enable_grad():
            logits = inputs.gate_logits(rows=rows)
            count = kl_count(len(rows), logits.shape[1], blocks, "official")
            loss = kl_sum(logits, data[f"{layer}/gt"]) / count
            (grad,) = torch.autograd.grad(loss, weight)
        losses[inputs.layer] = loss.item()
        log_p, expected = logits.log_softmax(-1), data[f"{layer}/log_softmax_pred"]
        causal = log_p > float("-inf")
        torch.testing.assert_close(log_p[causal], expected[causal], rtol=0, atol=1e-4)
        norm = data[f"{layer}/grad_mask_linear_k_fro"].item()
        assert grad.norm().item() == pytest.approx(norm, rel=1e-4)
        sample = data[f"{layer}/grad_mask_linear_k_head0_rows0_8"]
        torch.testing.assert_close(grad[0, :8], sample, rtol=1e-3, atol=1e-6)

    with torch.no_grad(), dense(model), observe(model, measure):
        model(input_ids=data[f"{run}/ids"][None], use_cache=False)
    assert list(losses) == list(range(LAYERS))
    assert sum(losses.values()) == pytest.approx(data[f"{run}/mask_loss"].item(), abs=2e-6)


@pytest.mark.parametrize("length", [320, 512])
def test_trainer_reproduces_the_official_loss(model, data, length):
    """With our exact targets; rounding theirs to bfloat16 moved the official loss by up to 1.5e-3 (meta.json there)."""
    run = f"prefill_llama/L{length}"
    trainer = Trainer(model, DistillConfig(reduction="official", clip_norm=None))
    losses, _ = trainer.train_step([{"input_ids": data[f"{run}/ids"][None]}])
    assert sum(losses.values()) == pytest.approx(data[f"{run}/mask_loss"].item(), abs=2e-3)
    for layer in range(LAYERS):
        grad = trainer.masters[f"layers.{layer}"].k_linear.grad
        norm = data[f"{run}/layer{layer}/grad_mask_linear_k_fro"].item()
        assert grad.norm().item() == pytest.approx(norm, rel=0.02)
