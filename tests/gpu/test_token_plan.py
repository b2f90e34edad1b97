"""Decoding steps whose launches are found out by one layer and repeated by the others, on a GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from seerattention.hf import attention
from seerattention.hf.token_plan import TokenPlan
from seerattention.ops import triton_launch
from seerattention.ops.token_scores import encode_tokens, token_scores
from tiny_models import make_ids, make_model

PROMPT, TOKENS = 500, 16  # over the end of a block of 64
FORMS = {
    "published": seer.DecodeGateConfig(),
    "fine": seer.DecodeGateConfig(k_pitch=8, merge_heads=False),
    "window": seer.DecodeGateConfig(k_pitch=8, merge_heads=False, query_window=8),
    "plain": seer.DecodeGateConfig(qk_norm=False, rope=False),
}
POLICIES = [seer.TokenBudget(192), seer.RelativeThreshold(1.0), seer.TopK(0.3), seer.TopP(0.7), seer.Threshold(0.05)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(form="published", policy=POLICIES[0], family="llama", **options):
    torch.manual_seed(0)
    options = {} if family == "gemma3_text" else {"num_hidden_layers": 3, **options}
    model = make_model(family, dtype=torch.bfloat16, **options).cuda()
    config = seer.GateConfig(prefill=None, decode=FORMS[form])
    return seer.attach(model, config, decode=policy, min_context=0)


@torch.inference_mode()
def decoded(model, batch=1, watched=False):
    ids = make_ids(PROMPT + TOKENS, batch=batch).cuda()
    cache, logits = DynamicCache(config=model.config), []
    model(ids[:, :PROMPT], past_key_values=cache)
    for end in range(PROMPT, PROMPT + TOKENS):
        if watched and end >= PROMPT + 3:  # what is compiled waits for the device
            torch.cuda.set_sync_debug_mode("error")
        try:
            logits.append(model(ids[:, end : end + 1], past_key_values=cache).logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return torch.cat(logits, 1)


@pytest.fixture
def replayed(monkeypatch):
    """Indices of the layers that launched what the first one recorded."""
    found, replay = [], TokenPlan._replay

    def noting(plan, call, *others):
        out = replay(plan, call, *others)
        if out is not None:
            found.append(call.layer.index)
        return out

    monkeypatch.setattr(TokenPlan, "_replay", noting)
    return found


def one_by_one(monkeypatch, function):
    """With every launch through the JIT, and no plans."""
    with monkeypatch.context() as changed:
        changed.setattr(triton_launch, "KNOWN", False)
        changed.setattr(attention, "make_token_plan", lambda *given: None)
        return function()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_steps_equal_launches_one_by_one(form, batch, replayed, monkeypatch):
    model = make(form)
    for _ in range(2):
        replayed.clear()
        found = decoded(model, batch)
        assert len(replayed) >= 2 * (TOKENS // 2)
        assert torch.equal(found, one_by_one(monkeypatch, lambda: decoded(model, batch)))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_policy(policy, replayed, monkeypatch):
    model = make("window", policy)
    found = decoded(model)
    assert len(replayed) >= 2 * (TOKENS // 2)
    assert torch.equal(found, one_by_one(monkeypatch, lambda: decoded(model)))


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma3_text", "glm4", "olmo2"])
def test_every_kind_of_family(family, replayed, monkeypatch):
    model = make(family=family)
    found = decoded(model)
    assert bool(replayed) == (family != "glm4")
    assert torch.equal(found, one_by_one(monkeypatch, lambda: decoded(model)))


@pytest.mark.parametrize("form", FORMS)
def test_a_step_does_not_wait_for_the_device(form):
    decoded(make(form), watched=True)


def test_on_another_stream(replayed):
    model = make()
    expected = decoded(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = decoded(model)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "shape", [(4, 2, 128, 128, 128), (7, 1, 64, 96, 64), (8, 8, 80, 64, 32), (2, 1, 256, 256, 256)]
)
@torch.inference_mode()
def test_encoding(shape, dtype):
    heads, kv_heads, head_dim, width, rotary = shape
    torch.manual_seed(0)
    q = torch.randn(2, 5, heads, head_dim).transpose(1, 2)
    linear = torch.randn(kv_heads, heads // kv_heads * head_dim, width) * (heads // kv_heads * head_dim) ** -0.5
    angles = 6 * torch.rand(1, 5, rotary)
    inputs = [x.to(dtype) for x in (q, linear, 1 + torch.rand(width))]
    expected = encode_tokens(*(x.float() for x in inputs), angles.cos(), angles.sin(), implementation="reference")
    found = encode_tokens(*(x.cuda() for x in inputs), angles.cos().cuda(), angles.sin().cuda())
    torch.testing.assert_close(found.cpu().float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("group", "parts", "width"), [(1, 1, 128), (4, 8, 64), (7, 2, 96), (8, 16, 256)])
@pytest.mark.parametrize("blocks", [0, 63, 1000])
@torch.inference_mode()
def test_scores(blocks, group, parts, width, together, dtype):
    torch.manual_seed(0)
    queries = torch.randn(2, 2 * group, 64 if together and parts == 2 else 5 if together else 1, width).to(dtype)
    keys = torch.randn(2, 2, blocks * parts + parts // 2, width).to(dtype)
    how = {"columns": blocks + 1, "parts": parts, "scale": width**-0.5, "together": together}
    expected = token_scores(queries.float(), keys.float(), **how, implementation="reference")
    found = token_scores(queries.cuda(), keys.cuda(), **how).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # of exact 16-bit numbers
