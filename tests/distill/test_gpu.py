"""Distillation on a GPU: the same losses as on the CPU, and bfloat16 models learn."""

from __future__ import annotations

import pytest
import torch

from seerattention.config import PrefillGateConfig, SubBlockGateConfig
from seerattention.distillation import DistillConfig, distill

from .tiny import attached_llama, forget, gate_tensors, random_batches, topic_batches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("spec", [PrefillGateConfig(), SubBlockGateConfig(), SubBlockGateConfig(share_keys=False)])
def test_losses_equal_those_of_the_cpu(spec):
    config = DistillConfig(steps=5, rows=0.5, warmup=1, eval_density=0.3)
    held_out = random_batches(1, seed=9)
    expected = distill(attached_llama(spec=spec), random_batches(5), config, eval_batches=held_out)
    history = distill(attached_llama(spec=spec).cuda(), random_batches(5), config, eval_batches=held_out)
    assert history.loss == pytest.approx(expected.loss, rel=2e-2)
    for layer, values in expected.recall.items():
        assert history.recall[layer] == pytest.approx(values, abs=1e-2)


def test_bfloat16_learns_and_resumes(tmp_path):
    config = DistillConfig(steps=60, learning_rate=5e-3, warmup=5, rows=0.5, eval_density=0.3)
    model = attached_llama(dtype=torch.bfloat16).cuda()
    forget(model)
    state = tmp_path / "state.safetensors"
    history = distill(model, topic_batches(16), config, eval_batches=topic_batches(2, seed=99), state_path=state)
    for losses in history.loss_per_layer.values():
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for values in history.recall.values():
        assert values[-1] > values[0] + 0.1
    again = attached_llama(dtype=torch.bfloat16).cuda()
    distill(again, topic_batches(16), config, eval_batches=topic_batches(2, seed=99), state_path=state)
    for name, tensor in gate_tensors(model).items():
        assert torch.equal(tensor, gate_tensors(again)[name])
