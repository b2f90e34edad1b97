"""Block lists to time attention on: random ones, structured ones, and those of the testbed model's trained gates."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import seerattention as seer
from seerattention.evaluate.kernels import AttentionShape, random_lists
from seerattention.hf import dense, observe
from seerattention.hf.prompts import run_prompt
from seerattention.ops.indices import BlockIndices, num_blocks, num_query_blocks

KINDS = ("random", "structured", "testbed")


def make_lists(
    kind: str, shape: AttentionShape, queries: int, keys: int, density: float, device: torch.device
) -> BlockIndices:
    """Lists for every query head and query block, each as long as ``TopK(density)`` makes it.

    ``random``: uniform, the worst case for caches. ``structured``: vertical stripes per head, a local band, and noise.
    ``testbed``: what the committed gates of the embedded model select in a book.

    Raises:
        ValueError: an unknown kind, or testbed lists of a block size that its gates do not have.
    """
    if kind == "random":
        return random_lists(shape, queries, keys, density, device)
    rows = num_query_blocks(queries, keys, shape.block_size)
    if kind == "structured":
        scores = _structured_scores(shape, keys, device)
    elif kind == "testbed":
        scores = _testbed_scores(shape, keys, device)
    else:
        raise ValueError(f"lists must be one of {', '.join(KINDS)}, got {kind!r}")
    return seer.TopK(density).select(scores[:, :, scores.shape[2] - rows :], block_size=shape.block_size)


def _structured_scores(shape: AttentionShape, keys: int, device: torch.device) -> Tensor:
    blocks = num_blocks(keys, shape.block_size)
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.rand(1, shape.heads, blocks, blocks, generator=generator, device=device)
    stripes = torch.rand(1, shape.heads, 1, blocks, generator=generator, device=device)
    positions = torch.arange(blocks, device=device)
    return stripes + 0.5 * (positions[:, None] - positions < 4) + 0.3 * noise


def _testbed_scores(shape: AttentionShape, keys: int, device: torch.device) -> Tensor:
    by_layer = _testbed_logits(keys, device)
    heads, found = by_layer[0].shape[1:3]
    if found != num_blocks(keys, shape.block_size):
        raise ValueError(f"the testbed's gates do not have blocks of {shape.block_size} tokens, only of 64")
    wanted = -(-shape.heads // heads)
    if wanted > len(by_layer):
        raise ValueError(f"the testbed's gates have {heads * len(by_layer)} heads in all, not {shape.heads}")
    # Layers spread evenly, first and last among them, give the heads that one layer lacks.
    last = len(by_layer) - 1
    layers = [last // 2] if wanted == 1 else [round(i * last / (wanted - 1)) for i in range(wanted)]
    return torch.cat([by_layer[layer] for layer in layers], 1)[:, : shape.heads]


@functools.lru_cache(maxsize=1)
def _testbed_logits(length: int, device: torch.device) -> list[Tensor]:
    """Gate logits ``[1, 8, N, N]`` of each layer over the first ``length`` tokens of books (repeated where they end).

    Beyond the 16K tokens that the model was trained for its gates extrapolate: lists, not quality, are wanted here.
    """
    from seerattention import testbed

    model, tokenizer = testbed.load(device)
    seer.attach(model, testbed.gates_path(), min_context=0)
    text = "\n".join([*testbed.book_texts("test"), *testbed.book_texts("train")])
    ids = torch.tensor(tokenizer.encode(text[: 8 * length])[:length])
    ids = ids.repeat(-(-length // len(ids)))[None, :length]
    found: dict[int, Tensor] = {}

    def keep(inputs: seer.LayerInputs, blocks: BlockIndices | None) -> None:
        found[inputs.layer] = inputs.gate_logits()

    with torch.inference_mode(), dense(model), observe(model, keep):
        run_prompt(model, {"input_ids": ids})
    return [found[layer] for layer in sorted(found)]
