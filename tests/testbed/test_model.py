"""The fast trainer's model is Llama, and survives the way to Hugging Face and back."""

from __future__ import annotations

import pytest
import torch
from testbed.model import PIECE, FastLlama, ModelConfig, _near, export, read, spread
from transformers import AutoModelForCausalLM

SHAPE = ModelConfig(vocab_size=200, width=48, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_width=80, max_context=512)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = FastLlama(SHAPE, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # attention that is far from uniform
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(0, SHAPE.vocab_size, (2, 65))
    return ids[:, :-1], ids[:, 1:], torch.rand(2, 64)


@pytest.mark.parametrize("spread_out", [False, True])
def test_it_computes_what_llama_computes(model, batch, tmp_path, spread_out):
    ids, labels, weights = batch
    positions = spread(2, 64, 500, "cpu") if spread_out else None
    loss, each = model(ids, labels, weights, positions)
    export(model, tmp_path, torch.float32)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path)(ids, position_ids=positions).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)
    weighted = (expected * weights.flatten()).sum() / weights.sum()
    torch.testing.assert_close(loss.detach(), weighted, rtol=1e-4, atol=1e-4)


def test_compiled_parts_compute_the_same(model, batch):
    ids, labels, weights = batch
    expected = [model(ids, labels, weights, far=far)[1] for far in (None, (1,))]
    model._parts = tuple(torch.compile(part, backend="eager") for part in model._parts)
    for far, each in zip((None, (1,)), expected, strict=True):
        torch.testing.assert_close(model(ids, labels, weights, far=far)[1], each)


def test_layers_that_are_kept_near_see_two_pieces(model, batch, monkeypatch):
    """Against attention with a mask, and where no layer is."""
    ids, labels, weights = batch
    piece = torch.arange(64) // PIECE
    seen = (piece[:, None] - piece <= 1) & (torch.arange(64)[:, None] >= torch.arange(64))

    def masked(q, k, v, opens):
        assert opens.tolist() == [True, False, False, False] * 2
        q, k, v = (x.view(2, 64, -1, SHAPE.head_dim).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        return out.transpose(1, 2).reshape(128, -1)

    everywhere = model(ids, labels, weights)[1]
    for far in ((0,), (1,), (0, 1)):
        got = model(ids, labels, weights, far=far)[1]
        with monkeypatch.context() as patch:
            patch.setattr(model, "_parts", (model._parts[0], masked, *model._parts[2:]))
            torch.testing.assert_close(got, model(ids, labels, weights, far=far)[1])
        assert torch.equal(got, everywhere) == (far == (0, 1))
    assert model._parts[1] is _near


def test_a_model_read_back_is_the_model(model, batch, tmp_path):
    export(model, tmp_path, torch.float32)
    again = read(tmp_path, torch.float32)
    assert again.config == model.config
    for (name, ours), (other, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_positions_spread_by_jumps():
    torch.manual_seed(2)
    positions = spread(300, 128, 4096, "cpu")
    steps = positions.diff(dim=1)
    assert (positions[:, 0] == 0).all()
    assert (steps >= 1).all()
    assert 2048 < positions.max() < 4096
    jumps = (steps > 1).sum(1)
    assert jumps.max() <= 12
    assert 0.2 < (jumps == 0).float().mean() < 0.5
    assert torch.equal(spread(2, 64, 64, "cpu"), torch.arange(64).expand(2, -1))
