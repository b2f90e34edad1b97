"""An attached model on a GPU: the same contracts as on the CPU, through the Triton kernels."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from seerattention.hf import gates_of
from seerattention.selectors import GateSelector
from tiny_models import Watched, make_ids, make_model


@torch.inference_mode()
def logits_of(model, ids, **inputs):
    return model(ids, **inputs).logits


def attached(family="llama", dtype=torch.bfloat16, policy=None, **options):
    # head_dim 64, as real models have
    model = make_model(family, dtype=dtype, hidden_size=256).cuda() if family == "qwen2" else None
    model = model or make_model(family, dtype=dtype, head_dim=64).cuda()
    torch.manual_seed(1)
    return seer.attach(model, seer.GateConfig(), prefill=policy, **{"min_context": 0, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("length", [5, 64, 65, 1000])
def test_all_blocks_are_as_near_to_float32_as_dense(family, dtype, length):
    ids = make_ids(length, batch=2).cuda()
    model = attached(family, dtype, seer.TopK(1.0))
    exact = attached(family, torch.float32, seer.TopK(1.0)).float()
    with seer.dense(model), seer.dense(exact):
        dense, reference = logits_of(model, ids).float(), logits_of(exact, ids)
    sparse = logits_of(model, ids).float()
    error = (sparse - reference).norm() / reference.norm()
    baseline = (dense - reference).norm() / reference.norm()
    assert error <= 2 * baseline + 1e-5


@torch.inference_mode()
def in_chunks(model, ids, size):
    cache = DynamicCache(config=model.config)
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(size, 1)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["glm4", "llama", "olmo2", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("size", [64, 100, 512])
def test_chunks_on_a_cache(family, dtype, size):
    """With every block as near to float32 as dense; with some, whole blocks a chunk read what one shot reads."""
    ids = make_ids(1000, batch=2).cuda()
    model, exact = (attached(family, kind, seer.Threshold(0.0)).to(kind) for kind in (dtype, torch.float32))
    with seer.dense(model), seer.dense(exact):
        dense, reference = logits_of(model, ids).float(), logits_of(exact, ids)
    with seer.record(model) as stats:
        chunked = in_chunks(model, ids, size).float()
    assert (stats.total_density, stats.dense_calls > 0) == (
        1.0,
        size == 64,
    )
    error = (chunked - reference).norm() / reference.norm()
    assert error <= 2 * (dense - reference).norm() / reference.norm() + (1e-4 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["glm4", "llama", "olmo2", "phi3", "qwen2", "qwen3"])
def test_chunks_of_whole_blocks_read_what_one_shot_reads(family, dtype):
    """In the first layer, which sees the same; keys that were rounded after RoPE decide near ties otherwise."""
    ids, seen = make_ids(1024, batch=2).cuda(), []
    model = attached(family, dtype, None, selector=Watched(GateSelector(seer.TopK(0.4)), seen))
    whole_logits, (_, whole) = logits_of(model, ids).float(), seen[0]
    seen.clear()
    logits = in_chunks(model, ids, 256).float()
    chunks = [blocks.to_mask() for inputs, blocks in seen if inputs.layer == 0]
    width = whole.num_key_blocks
    got = torch.cat([torch.nn.functional.pad(mask, (0, width - mask.shape[-1])) for mask in chunks], 2)
    differ = (got != whole.to_mask()).sum() / whole.to_mask().sum()
    if dtype == torch.float32:
        assert not differ
        assert (logits - whole_logits).norm() <= 1e-3 * whole_logits.norm()
    else:
        assert differ <= 0.02
    assert whole.density() < 0.6


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_left_padded_chunks_equal_the_row_alone(family, dtype):
    """With every block, so that near ties decide nothing; in float32 with some, too."""
    ids, pads, length = make_ids(1000, batch=3).cuda(), [0, 70, 300], 1000
    mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long().cuda()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model = attached(family, dtype, seer.Threshold(0.0))

    def run(rows, pad, **inputs):
        cache, parts = DynamicCache(config=model.config), []
        for start, end in ((pad, 400), (400, 700), (700, length)):
            given = {"position_ids": positions[rows, start:end]}
            given |= {name: x[rows, :end] for name, x in inputs.items()}
            parts.append(model(ids[rows, start:end], past_key_values=cache, use_cache=True, **given).logits.float())
        return torch.cat(parts, 1)

    for policy in (seer.Threshold(0.0), *((seer.TopK(0.4),) if dtype == torch.float32 else ())):
        seer.set_policy(model, policy)
        with seer.record(model) as stats:
            logits = run(slice(0, 3), 0, attention_mask=mask)
        assert stats.dense_calls == 0
        assert stats.total_density < 0.7 or isinstance(policy, seer.Threshold)
        for row, pad in enumerate(pads):
            alone = run(slice(row, row + 1), pad)
            error = (logits[row : row + 1, pad:] - alone).norm() / alone.norm()
            assert error <= (1e-3 if dtype == torch.float32 else 2e-2)


def test_gates_follow_the_model_to_the_gpu():
    model = make_model(dtype=torch.bfloat16)
    seer.attach(model, seer.GateConfig())
    assert gates_of(model)[0].k_linear.device.type == "cpu"
    model.cuda()
    assert gates_of(model)[0].k_linear.device.type == "cuda"
    assert gates_of(model)[0].k_linear.dtype == torch.bfloat16


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_row_alone(side):
    model = attached(dtype=torch.float32, policy=seer.TopK(0.4))
    ids, mask = make_ids(700, batch=3).cuda(), torch.zeros(3, 700, dtype=torch.long, device="cuda")
    spans = []
    for row, length in enumerate((700, 333, 64)):
        start = 700 - length if side == "left" else 0
        mask[row, start : start + length] = 1
        spans.append(slice(start, start + length))
    batched = logits_of(model, ids, attention_mask=mask)
    assert torch.isfinite(batched).all()
    for row, span in enumerate(spans):
        alone = logits_of(model, ids[row : row + 1, span])
        torch.testing.assert_close(batched[row : row + 1, span], alone, rtol=1e-2, atol=1e-2)


def test_default_min_context(monkeypatch, tmp_path):
    """Of a device and a shape of which nothing is known."""
    monkeypatch.setattr("seerattention.hf.min_context.CROSSINGS", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = attached(policy=seer.TokenBudget(256), min_context=None)
    with seer.record(model) as stats:
        logits_of(model, make_ids(4095).cuda())
        assert stats.sparse_calls == 0
        logits_of(model, make_ids(4096).cuda())
    assert stats.sparse_calls == 2


def test_generate():
    model, ids = attached(dtype=torch.float32, policy=seer.TopK(1.0)), make_ids(300, batch=2).cuda()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ours = model.generate(ids, **options)
    with seer.dense(model):
        assert torch.equal(model.generate(ids, **options), ours)


def test_counting_does_not_wait_for_the_device():
    """Statistics are read at the end only; a forward with them must not synchronise more than one without."""
    model, ids = attached(policy=seer.TopK(0.5)), make_ids(512).cuda()

    def waits() -> int:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            logits_of(model, ids)
        names = ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize")
        return sum(event.count for event in profile.key_averages() if event.key in names)

    waits()
    without = waits()
    with seer.record(model):
        assert waits() == without
