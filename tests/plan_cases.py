"""Models whose layers repeat what one of them did (``hf/plan.py``), with kernels that take no time.

Kernels run in Triton's interpreter, as if the CPU were a GPU; ``tests/gpu/test_replay.py`` does it on one.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import seerattention as seer
from seerattention import selectors
from seerattention.hf import attention as seer_attention
from seerattention.hf import history
from seerattention.hf.plan import PromptPlan
from seerattention.hf.state import state_of
from seerattention.ops import block_sparse_attention, dispatch, inverse_rope, replay
from seerattention.ops.indices import BlockIndices, num_blocks
from seerattention.ops.span import Span
from tiny_models import attach, logits_of, make_ids, make_model

LAYERS, LENGTH = 3, 70
BY_LAYER = seer.RelativeThreshold(1.0, min_blocks=1, first_blocks=0, dense_rows=0, layers=(0.3, 1.0, 3.0))
ODD = 2  # the layer in which something differs


class Mixing:
    """In the place of the kernels of a layer, which take seconds in the interpreter: one that mixes all that they read.

    It gets memory, shapes and strides, as kernels do."""

    def __getitem__(self, grid):
        return self.run

    @staticmethod
    def run(*args):
        *inputs, out, number, views = args
        *inputs, out = (x.as_strided(*view) for x, view in zip((*inputs, out), views, strict=True))
        q, k, v, q_pre, k_pre, cos, sin, *parameters = (x.float() for x in inputs)
        group = q.shape[1] // k.shape[1]
        k, v, k_pre = (x.repeat_interleave(group, 1).cumsum(2) / x.shape[2] for x in (k, v, k_pre))
        turn = (cos - 2 * sin)[:, None].mean(-1, keepdim=True)
        k, v, k_pre, turn = (x[:, :, -q.shape[2] :] for x in (k, v, k_pre, turn))  # of a chunk on a cache
        weight = sum(x[0].mean(0).sum() for x in parameters)
        out.copy_(q + 2 * k + 3 * v + (q_pre + 2 * k_pre) * turn + weight + number)


@pytest.fixture
def on_a_gpu(monkeypatch, request):
    """The CPU passes for a GPU, on which kernels are interpreted."""
    pytest.importorskip("triton")
    launch = pytest.importorskip("seerattention.ops.triton_launch")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU")
    monkeypatch.setattr(dispatch, "device_type", lambda device: "cuda")
    monkeypatch.setattr(launch, "ready", lambda device: True)
    monkeypatch.setattr(selectors, "_LAYERS", replay.Replays())
    monkeypatch.setattr(selectors, "_CHUNKS", replay.Replays(passing=True))
    if "real_kernels" in request.fixturenames:
        return

    def mix(q, k, v, chosen, scale):
        inputs, policy = chosen
        tensors = [q, k, v, inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin, *inputs.gate.replayed()[0]]
        tensors += policy.tensors(inputs.layer, num_blocks(k.shape[2], inputs.gate.block_size), q.device)
        tensors.append(torch.empty_like(q))
        number = scale * sum(map(ord, repr(policy))) / 1000
        views = [(x.shape, x.stride()) for x in tensors]
        launch.launch(Mixing(), (1,), *tensors, number, views)
        return tensors[-1]

    def select(selector, inputs):
        span = inputs.span or Span(*inputs.q.shape[:3:2], inputs.k.shape[2])
        shape = span.batch, inputs.q.shape[1], span.num_rows(32), span.num_key_blocks(32)
        return BlockIndices.from_mask(torch.ones(shape, dtype=torch.bool), 32, span=inputs.span)

    def attend(*tensors, scale):
        return block_sparse_attention(*tensors, scale=scale, implementation="reference")

    monkeypatch.setattr(selectors.GateSelector, "_select", lambda selector, inputs: (inputs, selector.policy))
    monkeypatch.setattr(selectors, "block_sparse_attention", mix)
    monkeypatch.setattr(history, "inverse_rope", functools.partial(inverse_rope, implementation="reference"))
    monkeypatch.setattr(selectors.GateSelector, "select", select)
    monkeypatch.setattr(seer_attention, "block_sparse_attention", attend)


@pytest.fixture
def real_kernels():
    """Asks for the package's own."""


def with_changed(monkeypatch, target, name, value):
    """A function that calls another one while an attribute has another value."""

    def run(function):
        with monkeypatch.context() as changed:
            changed.setattr(target, name, value)
            return function()

    return run


def note_repeats(monkeypatch):
    """Indices of the layers that repeat a plan from now on."""
    found, attend = [], PromptPlan.attend

    def noting(plan, arguments):
        call = plan.forward.call
        out = attend(plan, arguments)
        if out is not None:
            found.append(call.layer.index)
        return out

    monkeypatch.setattr(PromptPlan, "attend", noting)
    return found


@pytest.fixture
def repeated(monkeypatch):
    """Indices of the layers that repeated a plan."""
    return note_repeats(monkeypatch)


@pytest.fixture
def ordinary(monkeypatch):
    """A function that calls another one without plans."""
    return with_changed(monkeypatch, seer_attention, "make_plan", lambda *given: None)


def make(family="llama", policy=None, **options):
    """An attached model whose kernels are compiled and recorded: from the next forward on all are replays."""
    if family != "gemma3_text":
        options = {"num_hidden_layers": LAYERS, **options}
    model = attach(make_model(family, dtype=torch.float16, **options), policy or seer.TopK(0.4))
    for seed in range(2):
        logits_of(model, make_ids(LENGTH, seed=seed))
    return model


@torch.inference_mode()
def in_chunks(model, ids, cuts, cache=None, **inputs) -> torch.Tensor:
    """Logits of all tokens; chunks end at the cuts, and at the end."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    start, parts = 0, []
    for end in (*cuts, ids.shape[1]):
        parts.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **inputs).logits)
        start = end
    return torch.cat(parts, 1)


def attention_of(model, index=ODD) -> nn.Module:
    return state_of(model).layers[index].attention


def same(found, expected):
    assert not expected.isnan().any()
    assert torch.equal(found, expected)
