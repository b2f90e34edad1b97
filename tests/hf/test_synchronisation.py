"""Prefill on a GPU waits for the GPU once per forward at most, not once per layer: shown on the device "meta".

A meta tensor has a device, a shape and no values: what asks for a value, or moves data between host and device, is
caught. Ops run as their fake implementations; what their kernels' launchers do is tested below, with kernels that do
nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

import seerattention as seer
from seerattention.ops import custom_op, dispatch
from seerattention.ops.block_pooling.reference import Grid
from seerattention.ops.block_selection.reference import Rule
from seerattention.ops.gate_scores.reference import Tiles
from seerattention.ops.indices import ordered_lists
from seerattention.ops.pooled_attention.arguments import Wanted
from seerattention.ops.span import Span

# Ops that wait for the device, or whose results have a shape that depends on values.
READS = ("_local_scalar_dense", "is_nonzero", "allclose", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")
POLICIES = [
    seer.Threshold(0.1),
    seer.Threshold(0.1, last_blocks_dense=2),
    seer.TopK(0.4),
    seer.TopK(0.4, uniform=True),
    seer.TopP(0.6),
    seer.TokenBudget(64),
    seer.RelativeThreshold(1.0),
    seer.RelativeThreshold(0.3, exponent=0.5),
    seer.Budget(0.2, (1, 4), (0.1, 1.0)),
]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait, by the function of this package that does it ("elsewhere": transformers)."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name == "nonzero" and args[0].device.type == "cpu":
            return func(*args, **(kwargs or {}))  # of integers of the host, which are there
        if name in READS:
            self.record(name)
            return True  # the answer to "all ones?", "consecutive?"; a test of anything else fails here
        if name in ("_to_copy", "copy_") and not (kwargs or {}).get("non_blocking"):
            devices = {torch.device(x).type for x in (kwargs.get("device"),) if x} if kwargs else set()
            devices |= {x.device.type for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                self.record("copy")
        return func(*args, **(kwargs or {}))

    def record(self, what):
        frames = [frame for frame in traceback.extract_stack() if "/seerattention/" in frame.filename]
        self.found[(frames[-1].name if frames else "elsewhere", what)] += 1


def waits_of(model, monkeypatch, **inputs):
    monkeypatch.setattr(custom_op, "tracing", lambda: True)  # ops as their fake implementations
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)  # which does not know "meta"
    with torch.no_grad(), Waits():
        model(**{**inputs, "input_ids": inputs["input_ids"].clone()})  # the first call moves the gates to the device
    with torch.no_grad(), Waits() as waits:
        output = model(**inputs)
    assert output.logits.device.type == "meta"
    return {key: count for key, count in waits.found.items() if key[0] != "elsewhere"}


@pytest.fixture
def model(model_of):
    model = model_of(num_hidden_layers=4).to("meta")
    return seer.attach(model, seer.GateConfig(block_size=32), prefill=seer.TopK(0.3), min_context=0)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_prefill_does_not_wait(model, monkeypatch, policy):
    """The decoder makes its positions itself, so that it is known what they are."""
    seer.set_policy(model, policy)
    ids = torch.ones(1, 333, dtype=torch.long, device="meta")
    with seer.record(model) as stats:
        found = waits_of(model, monkeypatch, input_ids=ids)
    assert (stats.sparse_calls, stats.dense_calls) == (8, 0)  # of two forwards
    assert found == {}


@pytest.mark.parametrize("policy", POLICIES[:1], ids=str)
def test_prefill_waits_once_per_forward_for_positions_that_it_is_given(model, monkeypatch, policy):
    """Packed sequences restart in them. They are ready before any layer has run."""
    seer.set_policy(model, policy)
    ids = torch.ones(1, 333, dtype=torch.long, device="meta")
    with seer.record(model) as stats:
        found = waits_of(model, monkeypatch, input_ids=ids, position_ids=torch.arange(333, device="meta")[None])
    assert (stats.sparse_calls, stats.dense_calls) == (8, 0)  # of two forwards
    assert found == {("positions_run_on", "_local_scalar_dense"): 1}


def test_a_mask_of_ones_costs_one_as_it_does_in_sdpa(model, monkeypatch):
    ids = torch.ones(1, 333, dtype=torch.long, device="meta")
    with seer.record(model) as stats:
        found = waits_of(model, monkeypatch, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert (stats.sparse_calls, stats.dense_calls) == (8, 0)  # of two forwards
    assert found == {("seer_mask", "_local_scalar_dense"): 1}


def test_the_oracle_does_not_wait(model_of, monkeypatch):
    model = seer.attach(model_of().to("meta"), selector=seer.baselines.Oracle(seer.TopK(0.3)), min_context=0)
    ids = torch.ones(1, 333, dtype=torch.long, device="meta")
    found = waits_of(model, monkeypatch, input_ids=ids)
    assert found == {}


@pytest.mark.parametrize("given", [False, True])
def test_chunks_wait_once_per_forward_for_what_they_are_given(model, monkeypatch, given):
    """Where the decoder counts, one forward looks at its rotary table, and others at nothing; never once a layer."""
    monkeypatch.setattr(custom_op, "tracing", lambda: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad(), Waits() as waits, seer.record(model) as stats:
        for start in range(0, 320, 80):
            ids = torch.ones(1, 80, dtype=torch.long, device="meta")
            positions = torch.arange(start, start + 80, device="meta")[None] if given else None
            model(ids, past_key_values=cache, position_ids=positions)
            # Early versions of transformers say by a tensor where the queries of a mask begin.
            ours = {key: count for key, count in waits.found.items() if key[0] not in ("elsewhere", "_first_query")}
            found.append(ours)
            waits.found.clear()
    assert (stats.sparse_calls, stats.dense_calls) == (16, 0)
    table = {("<genexpr>", "allclose"): 2}
    asked = {(name, "_local_scalar_dense"): 1 for name in ("positions_run_on", "positions_end_at")}
    own = {**asked, **table} if given else {}
    once = {("_turns_back", "_local_scalar_dense"): 1}
    assert found[1:] == [{**table, **own, **once}, own, own]  # in the first one gates move to the device


@pytest.mark.parametrize(
    "form",
    [{}, {"k_pitch": 8, "merge_heads": False}, {"query_window": 8}, {"merge_heads": False, "query_window": 8}],
    ids=["published", "fine", "window", "window, own heads"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_waits_for_nothing_but_padding(model_of, monkeypatch, padded, form):
    """Once encoded keys are kept. Where rows are padded, masks and lengths are read once a forward; that of sdpa is
    besides asked whether all is valid, and here would say so."""
    model = model_of(num_hidden_layers=4, attn_implementation="eager" if padded else "sdpa").to("meta")
    config = seer.GateConfig(block_size=32, prefill=None, decode=seer.DecodeGateConfig(**form))
    seer.attach(model, config, decode=seer.TokenBudget(64), min_context=0)
    monkeypatch.setattr(custom_op, "tracing", lambda: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)
    # Asked when the keys of the cache are encoded; the answer is made of values, which these tensors have not.
    monkeypatch.setattr("seerattention.hf.decoding.history_problem", lambda call, forward, key: None)
    if padded:  # what is read: two rows of so many tokens, and that all is well with them
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: Waits.record(waits, "tolist") or [*lengths, 1])
    cache = DynamicCache(config=model.config)

    def step(tokens, length):
        ids = torch.ones(2, tokens, dtype=torch.long, device="meta")
        mask = torch.ones(2, length, dtype=torch.long, device="meta") if padded else None
        model(ids, past_key_values=cache, attention_mask=mask)

    with torch.no_grad(), Waits() as waits, seer.record(model) as stats:
        lengths = [90, 70]
        step(99, 99)
        for length in (100, 101, 102):
            lengths = [x + 1 for x in lengths]
            waits.found.clear()
            step(1, length)
    assert (stats.sparse_calls, stats.dense_calls) == (12, 4)
    # Lengths of rows are integers of the host, of which ``_cut`` makes tensors of the host.
    found = {key: count for key, count in waits.found.items() if key[0] not in ("elsewhere", "_cut")}
    assert found == ({("_rows", "tolist"): 1, ("at_most_one_run_a_row", "_local_scalar_dense"): 1} if padded else {})


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x.all()),
        lambda x: x.sum().item(),
        lambda x: x.to("cpu"),
        lambda x: torch.full((2,), 3).to(x.device),
        lambda x: x.nonzero(),
    ],
)
def test_the_check_finds(wait):
    x = torch.ones(3, device="meta")
    # No values to copy or to find: having been seen, some calls fail.
    with Waits() as waits, contextlib.suppress(NotImplementedError, RuntimeError):
        wait(x)
    assert sum(waits.found.values()) == 1


class NoKernel:
    """Stands for a Triton kernel: takes a grid and arguments, launches nothing."""

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        self.launches += 1


@pytest.mark.parametrize("with_lengths", [False, True])
def test_launchers_do_not_wait(monkeypatch, with_lengths):
    attention, selection, pooling, target, decode_target = (
        importlib.import_module(f"seerattention.ops.{name}")
        for name in (
            "block_sparse_attention.triton",
            "block_selection.triton",
            "block_pooling.triton",
            "pooled_attention.triton",
            "pooled_attention.triton_decode",
        )
    )
    kernel = NoKernel()
    for module in (attention, selection, pooling, target, decode_target):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, kernel)
    for name in ("device", "device_of"):
        monkeypatch.setattr(torch.cuda, name, lambda x: contextlib.nullcontext())
    monkeypatch.setattr(dispatch, "shared_memory", lambda device: 1 << 17)
    q = torch.ones(1, 4, 333, 64, device="meta", dtype=torch.bfloat16)
    k = q[:, :2]
    scores = torch.ones(1, 4, 6, 6, device="meta")
    lengths = torch.full((1,), 300, device="meta") if with_lengths else None
    with Waits() as waits:
        table = Span.of_padded(1, 333, 333, lengths).table
        pooling.block_pooling(q, ("max", "avg"), 64, Grid(6, 0, 64, table))
        keep = torch.full((1, 6), 2, device="meta")
        span = Span.of_padded(1, 333, 333, lengths)
        for kind in ("threshold", "topp"):
            selection.select(scores, Rule(kind, 6, 64, span.table, 1, 0.5))
        lists = selection.select(scores, Rule("topk", 6, 64, span.table, 1, keep=keep))
        blocks = ordered_lists(*lists, 6, 64, span=span)
        attention.block_sparse_attention(q, k, k, blocks, 0.1, True)
        rows = torch.arange(6, device="meta")
        for reduce in ("max", "sum"):
            for lse in (None, torch.zeros(1, 4, 333, device="meta")):
                wanted = Wanted(64, 0.1, reduce, True, lse, span)
                target.pooled_attention(q, k, rows, wanted)
                decode_target.pooled_attention_decode(q, k, rows, wanted)
    assert kernel.launches == 15  # two for a target of prefill gates without lse
    assert not waits.found


@pytest.mark.parametrize("masked", [False, True])
def test_launchers_of_gate_scores_do_not_wait(monkeypatch, masked):
    kernel, kernels = NoKernel(), "seerattention.ops.gate_scores.triton"
    module, encode, at_once, mass = (
        importlib.import_module(kernels + part) for part in ("", "_encode", "_prompt", "_mass")
    )
    monkeypatch.setattr(module, "gate_scores_kernel", kernel)
    monkeypatch.setattr(encode, "project_rotate_kernel", kernel)
    monkeypatch.setattr(at_once, "pool_encode_kernel", kernel)
    for name in ("query_lse_kernel", "mass_scores_kernel"):
        monkeypatch.setattr(mass, name, kernel)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    q, scores = (torch.ones(1, 4, 6, width, device="meta") for width in (64, 6))
    linear, table = torch.ones(4, 64, 64, device="meta"), torch.ones(1, 333, 64, device="meta")
    with Waits() as waits:
        shape = at_once.shape_of(q, 64, 1)
        queries = encode.encode_blocks(q, None, table, table, 64)
        keys = encode.encode_blocks(q[:, :2], linear, table, table, 64)
        at_once.pool_encode(q, q, (linear, linear), (table, table), (("avg",), ("max",)), (8, 8), shape)
        for pitch, span_table in ((64, None), (8, torch.ones(1, 4, dtype=torch.int32, device="meta"))):
            tiles = Tiles(64, pitch, pitch, 0.1, "max", masked, None, 0, 0, 333, span_table)
            module.gate_scores(queries, keys, scores, tiles)
            mass.mass_scores(queries, keys, scores, tiles._replace(reduce="mass"))
    assert kernel.launches == 9
    assert not waits.found
