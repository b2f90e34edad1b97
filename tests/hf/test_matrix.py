"""Every family through every way in which a prompt may come: the promises of README.md and docs/architecture.md.

Of each way: with ``Dense()`` the model is the untouched one, bit for bit; with every block it is so to rounding; with
fewer blocks it reads the blocks and gives the logits of a reference, or gives what the definition says of its chunks;
detached, it is the untouched model again. What is dense, and what transformers refuses, is listed with the reason.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import seerattention as seer
from chunk_definition import by_definition
from seerattention.selectors import GateSelector
from tiny_models import CONFIGS, Watched, make_ids, make_model

BLOCK, LENGTH = 32, 200
PADS = (0, 69, 136, 180)  # of left-padded rows: none, inside of a block, a short row, a row shorter than a block
BLOCK_PADS = (0, 64, 32)  # of rows in which chunks end with blocks; one begins in the second chunk
LATE_PADS = (0, 96, 160)  # and in later ones
GENERATION = {
    "do_sample": False,
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "output_logits": True,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
}

Run = Callable[[nn.Module, Tensor], Tensor]


# ---- ways in which a prompt comes: a model and ids give logits [tokens, vocabulary] ---------------------------------


def one_shot(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits.flatten(0, 1)


def without_cache(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits.flatten(0, 1)


def in_chunks(model: nn.Module, ids: Tensor, cuts, cache=None) -> Tensor:
    """Chunks end at the cuts, and at the end."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    ends = [*cuts, ids.shape[1]]
    parts = [
        model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in zip([0, *ends], ends, strict=False)
    ]
    return torch.cat(parts, 1).flatten(0, 1)


def of_size(size: int) -> Run:
    return lambda model, ids: in_chunks(model, ids, range(size, ids.shape[1], size))


def on_blocks(model: nn.Module, ids: Tensor) -> Tensor:
    return in_chunks(model, ids, [64, 96, 160])


def left_padded(pads, cuts=()) -> Run:
    """The content's logits of a batch whose rows are the ends of the prompt; in chunks, where there are cuts."""

    def run(model: nn.Module, ids: Tensor) -> Tensor:
        length, cache, parts = ids.shape[1], DynamicCache(config=model.config), []
        mask = torch.stack([(torch.arange(length) >= pad).long() for pad in pads])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        batch = ids.expand(len(pads), -1).where(mask.bool(), 0)
        ends = [*cuts, length]
        for start, end in zip([0, *ends], ends, strict=False):
            places = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            parts.append(model(batch[:, start:end], past_key_values=cache, use_cache=True, **places).logits)
        return torch.cat(parts, 1)[mask.bool()]

    return run


def alone(pads) -> Run:
    return lambda model, ids: torch.cat([one_shot(model, ids[:, pad:]) for pad in pads])


def in_turns(model: nn.Module, ids: Tensor) -> Tensor:
    """A prompt, a turn that is decoded, and a further prompt, on one cache."""
    return in_chunks(model, ids, [120, *range(121, 129)])


def with_a_turn_taken_back(model: nn.Module, ids: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    first = in_chunks(model, ids[:, :96], [], cache)
    in_chunks(model, ids[:, 20:60], [], cache)
    cache.crop(-40)
    return torch.cat((first, in_chunks(model, ids[:, 96:], [], cache)))


def generated(**options) -> Run:
    """The logits of each new token."""
    return lambda model, ids: torch.cat(say(model, ids, **options).logits)


def say(model: nn.Module, ids: Tensor, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATION, **options)


def padded_generate(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of the first new token of left-padded rows, whose prompts come in chunks."""
    batch = ids.expand(len(LATE_PADS), -1).clone()
    mask = torch.stack([(torch.arange(ids.shape[1]) >= pad).long() for pad in LATE_PADS])
    options = {"attention_mask": mask, "prefill_chunk_size": 64}
    return model.generate(batch, **options, **GENERATION).logits[0]


def ends_alone(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.stack([one_shot(model, ids[:, pad:])[-1] for pad in LATE_PADS])


def generated_in_turns(model: nn.Module, ids: Tensor) -> Tensor:
    cache, logits = DynamicCache(config=model.config), []
    said = ids[:, :96]
    for more in (ids[:, 96:160], ids[:, 160:], ids[:, :0]):
        turn = say(model, said, past_key_values=cache)
        said, logits = torch.cat((turn.sequences, more), 1), [*logits, *turn.logits]
    return torch.cat(logits)


def on_a_static_cache(cuts, room: int = 50) -> Run:
    def run(model: nn.Module, ids: Tensor) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + room)
        return in_chunks(model, ids, cuts, cache)

    return run


def after_a_dense_chunk(size: int = LENGTH - 64, valid: int = LENGTH) -> Run:
    """The logits of what follows on 64 tokens in chunks of ``size``, up to the tokens that are ``valid``."""

    def run(model: nn.Module, ids: Tensor) -> Tensor:
        cache, parts = DynamicCache(config=model.config), []
        padding = [{}, {"attention_mask": (torch.arange(LENGTH) < valid).long()[None]}][valid < LENGTH]
        with seer.dense(model) if seer.hf.is_attached(model) else nullcontext():
            model(ids[:, :64], past_key_values=cache, use_cache=True)
        for part in ids[:, 64:].split(size, 1):
            parts.append(model(part, past_key_values=cache, use_cache=True, **padding).logits)
        return torch.cat(parts, 1)[0, : valid - 64]

    return run


# ---- the matrix ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a prompt comes.

    Attributes:
        run: gives the logits.
        reference: a run whose logits this one has with fewer blocks; None: none is promised.
        lists: whether the blocks read are those of the reference, too.
        part: what of the two runs' logits is compared.
        length: tokens of the prompt.
        sparse: whether fewer blocks make it sparse, which nothing does to chunks of which nobody says what they are.
        pieces: of the prompt, first and last token of each that is one to sparse attention, where the last token's
            logits are those that these give by definition.
    """

    run: Run
    reference: Run | None = None
    lists: bool = True
    part: tuple[slice, slice] = (slice(None), slice(None))
    length: int = LENGTH
    sparse: bool = True
    pieces: tuple[tuple[int, int], ...] = ()


def pieces(size: int, length: int = LENGTH) -> tuple[tuple[int, int], ...]:
    return tuple((a, min(a + size, length)) for a in range(0, length, size))


FIRST_IS_LAST = (slice(0, 1), slice(-1, None))
WAYS = {
    "one shot": Way(one_shot, one_shot),
    "without a cache": Way(without_cache, one_shot),
    "chunks that end with blocks": Way(on_blocks, one_shot),
    "chunks of 1": Way(of_size(1), length=40, sparse=False),
    "chunks of 63": Way(of_size(63)),
    "chunks of 65": Way(of_size(65)),
    "chunks of 1000": Way(of_size(1000), length=1040),
    "left-padded": Way(left_padded(PADS), alone(PADS)),
    "left-padded, in chunks": Way(left_padded(BLOCK_PADS, [64, 160]), alone(BLOCK_PADS)),
    "turns": Way(in_turns),
    "a turn taken back": Way(with_a_turn_taken_back, one_shot, lists=False),
    "turns of generate": Way(generated_in_turns),
    "beam search": Way(generated(num_beams=3), one_shot, lists=False, part=FIRST_IS_LAST),
    "prefill_chunk_size": Way(generated(prefill_chunk_size=64), generated(), length=192),
    "prefill_chunk_size, left-padded": Way(padded_generate, ends_alone, length=192),
    # A forward for each token: few, of which the last choose between blocks.
    "prefill_chunk_size of 1": Way(generated(prefill_chunk_size=1), length=72, pieces=pieces(1, 72)),
    "prefill_chunk_size of 63": Way(generated(prefill_chunk_size=63), pieces=pieces(63)),
    "prefill_chunk_size of 65": Way(generated(prefill_chunk_size=65), pieces=pieces(65)),
    "prefill_chunk_size of 1000": Way(generated(prefill_chunk_size=1000), pieces=pieces(1000)),
    "generate": Way(generated(), one_shot, part=FIRST_IS_LAST),
    "generate without a cache": Way(generated(use_cache=False), generated(), lists=False),
    "a static cache": Way(on_a_static_cache([]), one_shot),
    "a static cache that is full": Way(on_a_static_cache([], 0), one_shot),
    "a static cache, in chunks": Way(on_a_static_cache([64, 96, 160]), one_shot),
    "a static cache that is full, in chunks": Way(on_a_static_cache([64, 160], 0), one_shot),
    "generate on a static cache": Way(generated(cache_implementation="static"), generated()),
    "generate on a static cache, in chunks": Way(
        generated(cache_implementation="static", prefill_chunk_size=63), pieces=pieces(63)
    ),
    "prompt lookup": Way(generated(prompt_lookup_num_tokens=3), generated()),
}
# Forwards that are dense in this version: the way, and the reason that the one warning gives (None: expected, silent).
DENSE = {
    "chunks shorter than a block": (after_a_dense_chunk(size=BLOCK - 1), "fewer tokens than a block"),
    "chunks padded on the right": (after_a_dense_chunk(valid=150), "padded on the right"),
}
# What transformers refuses, with gates and without.
REFUSED = {
    ("gemma3_text", "a turn taken back"): "caches of sliding-window layers cannot be cropped once the window is full",
}


# With an older transformers two families come in all ways, one of them with windows, and the others in these, which go
# through all that a family's code does: whole prompts, chunks, padding, generation, both kinds of cache.
OLDER_FAMILIES = ("gemma3_text", "llama")
OLDER_WAYS = (
    "one shot",
    "chunks of 63",
    "left-padded, in chunks",
    "turns of generate",
    "beam search",
    "generate on a static cache, in chunks",
)
# Another form of gate than the paper's goes through every way in these families: half-split and neighbouring RoPE.
SUB_BLOCKS = seer.GateConfig(block_size=BLOCK, prefill=seer.SubBlockGateConfig(q_pitch=8, k_pitch=4))
SUB_BLOCK_FAMILIES = ("glm4", "llama")
MASS = seer.GateConfig(block_size=BLOCK, prefill=seer.SubBlockGateConfig(q_pitch=4, k_pitch=8, reduce="mass"))


def cases(families, older_families):
    """Every family in every way."""
    for name in families:
        for way in WAYS:
            older = name in older_families or way in OLDER_WAYS
            yield pytest.param(name, way, marks=() if older else pytest.mark.newest)


@torch.inference_mode()
def blocks_read(
    model: nn.Module, run: Run, ids: Tensor, config: seer.GateConfig | None = None
) -> tuple[Tensor, dict[int, Tensor], float]:
    """Logits with half of the blocks; how many rows read each block ``[H, N, N]``, by layer; and the total density."""
    seen: list = []
    attach(model, None, config, selector=Watched(GateSelector(seer.TopK(0.5)), seen))
    with seer.record(model) as stats:
        logits = run(model, ids)
    seer.detach(model)
    size, counts = -(-ids.shape[1] // BLOCK), {}
    for inputs, blocks in seen:
        mask, place = blocks.to_mask(), blocks.last_blocks()
        total = counts.setdefault(inputs.layer, torch.zeros(mask.shape[1], size, size, dtype=torch.int64))
        for row, places in zip(mask.long(), place.expand(len(mask), -1), strict=True):
            held = row.any(0).any(-1)
            total[:, places[held], : row.shape[-1]] += row[:, held]
    return logits, counts, stats.total_density


def attach(model: nn.Module, policy, config: seer.GateConfig | None = None, **options) -> nn.Module:
    torch.manual_seed(1)
    config = config or seer.GateConfig(block_size=BLOCK)
    return seer.attach(model, config, prefill=policy, min_context=0, **options)


@torch.inference_mode()
def with_policy(model: nn.Module, policy, run: Run, ids: Tensor, config: seer.GateConfig | None = None) -> Tensor:
    attach(model, policy, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "seerattention")
        # The last of some chunks has fewer tokens than a block, and does not say what it is.
        warnings.filterwarnings("ignore", "seerattention.*fewer tokens than a block")
        logits = run(model, ids)
    seer.detach(model)
    return logits


@pytest.mark.filterwarnings("ignore:seerattention.*fewer tokens than a block")
@pytest.mark.parametrize(("name", "way"), list(cases(sorted(CONFIGS), OLDER_FAMILIES)))
def test_what_is_promised(name, way):
    check_promise(name, way)


@pytest.mark.filterwarnings("ignore:seerattention.*fewer tokens than a block")
@pytest.mark.parametrize(("name", "way"), list(cases(SUB_BLOCK_FAMILIES, ())))
def test_what_is_promised_of_sub_block_gates(name, way):
    check_promise(name, way, SUB_BLOCKS)


@pytest.mark.filterwarnings("ignore:seerattention.*fewer tokens than a block")
@pytest.mark.parametrize("way", OLDER_WAYS)
def test_what_is_promised_of_gates_that_add_up_a_mass(way):
    check_promise("llama", way, MASS)


@torch.inference_mode()
def check_promise(name: str, way: str, config: seer.GateConfig | None = None) -> None:
    model, case = make_model(name), WAYS[way]
    ids = make_ids(case.length)
    if (name, way) in REFUSED:
        for each in (model, attach(model, seer.TopK(0.5), config)):
            with pytest.raises((RuntimeError, ValueError), match=r"crop"):
                case.run(each, ids)
        return
    untouched = case.run(model, ids)
    assert torch.equal(with_policy(model, seer.Dense(), case.run, ids, config), untouched)
    every = with_policy(model, seer.TopK(1.0), case.run, ids, config)
    torch.testing.assert_close(every, untouched, rtol=1e-4, atol=1e-4)
    logits, read, density = blocks_read(model, case.run, ids, config)
    assert torch.isfinite(logits).all()
    if case.sparse:
        assert density < 1
        assert not torch.allclose(logits, untouched, rtol=1e-3, atol=1e-3)
    if case.reference is not None:
        expected, expected_read, _ = blocks_read(model, case.reference, ids, config)
        mine, its = case.part
        torch.testing.assert_close(logits[mine], expected[its], rtol=1e-4, atol=1e-4)
        if case.lists:
            assert read.keys() == expected_read.keys()
            assert all(torch.equal(read[layer], expected_read[layer]) for layer in read)
    if case.pieces:
        attached = functools.partial(attach, config=config)
        expected, density = by_definition(attached, model, ids, seer.TopK(0.5), case.pieces)
        assert density < 0.8
        torch.testing.assert_close(logits[0], expected[0, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(case.run(model, ids), untouched)


@torch.inference_mode()
@pytest.mark.parametrize("way", DENSE)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_is_dense(name, way):
    model, ids, (run, reason) = make_model(name), make_ids(LENGTH), DENSE[way]
    untouched = run(model, ids)
    attach(model, seer.TopK(0.2))
    with seer.record(model) as stats, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(run(model, ids), untouched)
    assert stats.sparse_calls == 0
    said = [str(warning.message) for warning in caught if "seerattention" in str(warning.message)]
    assert len(said) == (reason is not None), said
    assert all(reason in each for each in said)
    seer.detach(model)
    assert torch.equal(run(model, ids), untouched)
