"""dense, observe and record belong to the thread or task that opened them, and to one model."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
from contextlib import ExitStack

import pytest
import torch

import seerattention as seer
from tiny_models import logits_of


@pytest.fixture
def model(model_of):
    torch.manual_seed(1)
    return seer.attach(model_of(), seer.GateConfig(block_size=32), prefill=seer.TokenBudget(32), min_context=0)


def in_a_thread(function):
    """What ``function`` returns in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


CONTEXTS = {
    "dense": lambda model, seen: seer.dense(model),
    "observe": lambda model, seen: seer.observe(model, lambda inputs, blocks: seen.append(blocks)),
    "record": lambda model, seen: seer.record(model),
}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_context_of_another_thread_is_not_ours(model, ids_of, kind):
    ids, seen, opened, close = ids_of(150), [], threading.Event(), threading.Event()
    alone, stats = logits_of(model, ids), []

    def other():
        with CONTEXTS[kind](model, seen) as opened_context:
            stats.append(opened_context)
            opened.set()
            close.wait()

    thread = threading.Thread(target=other)
    thread.start()
    opened.wait()
    assert torch.equal(logits_of(model, ids), alone)
    close.set()
    thread.join()
    assert not seen
    if kind == "record":
        assert (stats[0].sparse_calls, stats[0].dense_calls) == (0, 0)


def test_a_thread_does_not_inherit_a_context_unless_it_is_given_it(model, ids_of):
    ids, sparse = ids_of(150), logits_of(model, ids_of(150))
    with seer.dense(model):
        dense = logits_of(model, ids)
        assert torch.equal(in_a_thread(lambda: logits_of(model, ids)), sparse)
        context = contextvars.copy_context()
        assert torch.equal(in_a_thread(lambda: context.run(logits_of, model, ids)), dense)
    assert not torch.equal(dense, sparse)
    assert torch.equal(context.run(logits_of, model, ids), sparse)  # closed is closed, wherever it was copied to


def test_tasks_have_contexts_of_their_own(model, ids_of):
    ids, sparse = ids_of(150), logits_of(model, ids_of(150))

    async def densely(opened, close):
        with seer.dense(model):
            opened.set()
            await close.wait()
            return logits_of(model, ids)

    async def both():
        opened, close = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(densely(opened, close))
        await opened.wait()
        assert torch.equal(logits_of(model, ids), sparse)
        close.set()
        return await task

    assert not torch.equal(asyncio.run(both()), sparse)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_contexts_close_in_any_order(model, ids_of, order):
    ids, sparse = ids_of(150), logits_of(model, ids_of(150))
    contexts = [seer.dense(model) for _ in order]
    for context in contexts:
        context.__enter__()
    for closed, index in enumerate(order):
        assert torch.equal(logits_of(model, ids), sparse) == (closed == 3)
        contexts[index].__exit__(None, None, None)
    assert torch.equal(logits_of(model, ids), sparse)


def test_a_context_closed_in_another_thread_is_closed(model, ids_of):
    ids, sparse = ids_of(150), logits_of(model, ids_of(150))
    stack = ExitStack()
    stack.enter_context(seer.dense(model))
    assert not torch.equal(logits_of(model, ids), sparse)
    in_a_thread(stack.close)
    assert torch.equal(logits_of(model, ids), sparse)


def test_contexts_belong_to_one_model(model, model_of, ids_of):
    ids, twin = ids_of(150), copy.deepcopy(model)
    sparse = logits_of(model, ids)
    with seer.dense(model), seer.record(model) as stats:
        inside = copy.deepcopy(model)
        for other in (twin, inside):
            assert torch.equal(logits_of(other, ids), sparse)
        assert stats.dense_calls == 0
        logits_of(model, ids)
    assert stats.dense_calls == 2


def test_an_observer_may_run_the_model(model, ids_of):
    """A forward inside a forward has contexts of its own, and the outer one goes on as before."""
    ids, sparse, inner = ids_of(150), logits_of(model, ids_of(150)), []

    def observer(inputs, blocks):
        if inputs.q.shape[2] == 150:
            with seer.dense(model):
                inner.append(logits_of(model, ids[:, :100]))

    with seer.observe(model, observer), seer.record(model) as stats:
        assert torch.equal(logits_of(model, ids), sparse)
    assert (stats.sparse_calls, stats.dense_calls) == (2, 4)
    with seer.dense(model):
        assert all(torch.equal(got, logits_of(model, ids[:, :100])) for got in inner)


def test_records_of_decoding(model, ids_of):
    """One token at a time is counted only while somebody counts."""
    ids = ids_of(100)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids, do_sample=False, **options)
    with seer.record(model) as stats:
        model.generate(ids, do_sample=False, **options)
        in_a_thread(lambda: model.generate(ids, do_sample=False, **options))
    assert (stats.sparse_calls, stats.dense_calls) == (2, 4)
