"""What gates are trained for: the loss of the row mass by its definition, and a run that lowers it."""

from __future__ import annotations

import pytest
import torch

from seerattention.distillation import DistillConfig, distill
from seerattention.hf import dense, observe

from .tiny import attached_llama, random_batches, topic_batches


def row_masses(q, k, scale, block_size=32):
    """Of one sequence and head: the most that one query of a block gives to each block of keys, rows of sum 1."""
    shares = (q @ k.T * scale).masked_fill(torch.ones(len(q), len(k)).triu(1).bool(), float("-inf")).softmax(-1)
    blocks = -(-len(q) // block_size)
    found = torch.zeros(blocks, blocks, dtype=q.dtype)
    for row in range(blocks):
        for query in shares[row * block_size : (row + 1) * block_size]:
            masses = torch.stack([part.sum() for part in query.split(block_size)])
            found[row] = torch.maximum(found[row], masses)
    return found / found.sum(-1, keepdim=True)


def test_first_loss_of_the_row_mass_by_its_definition():
    """Of a batch whose second row is shorter, with a partial block; of all rows behind the first quarter."""
    model = attached_llama()
    (batch,) = random_batches(1, length=210)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 150:] = 0
    expected = []

    def measure(inputs, blocks):
        logits = inputs.gate_logits().double()
        k = inputs.k.repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], 1).double()
        losses = []
        for row, length in enumerate((210, 150)):
            for head in range(inputs.q.shape[1]):
                target = row_masses(inputs.q[row, head, :length].double(), k[row, head, :length], inputs.scale)
                for block in range(1, len(target)):  # of 7 rows one is left out
                    mine, seen = target[block, : block + 1], logits[row, head, block, : block + 1]
                    losses.append(float((mine * (mine.log() - seen.log_softmax(-1))).sum()))
        expected.append(sum(losses) / len(losses))

    with torch.no_grad(), dense(model), observe(model, measure):
        model(**batch)
    history = distill(model, [batch], DistillConfig(target="row_mass"))
    assert [losses[0] for losses in history.loss_per_layer.values()] == pytest.approx(expected, rel=1e-4)
    other = distill(attached_llama(), [batch], DistillConfig())
    assert other.loss[0] != pytest.approx(history.loss[0], rel=1e-2)


def test_gates_learn_the_row_mass():
    model = attached_llama()
    config = DistillConfig(steps=60, learning_rate=5e-3, warmup=5, rows=0.5, target="row_mass")
    history = distill(model, topic_batches(16), config)
    for losses in history.loss_per_layer.values():
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
