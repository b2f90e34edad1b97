"""Lists of key blocks as plain tensors: reading them as sets, putting them in order, packing masks.

``last [B or 1, R]`` is the last key block that each row may see, -1 where it sees none: what lies behind it is on no
list. Entries past ``counts`` are never looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries that are looked at together when lists are cleaned: 2^24 take some 0.5 GiB of temporary memory.
CHUNK_ENTRIES = 1 << 24


@torch.no_grad()
def clean(indices: Tensor, counts: Tensor, num_key_blocks: int, last: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of the same visible blocks, ascending and each block once; those given, where they are so already.

    Args:
        indices, counts, num_key_blocks: as of ``BlockIndices``.
        last: the last key block that each row may see.

    Returns:
        int32 ``[B, H, R, capacity]``, the capacity at most Nk where lists had to be made, and int32 ``[B, H, R]``.

    Raises:
        ValueError: an entry that is no key block, or a count outside of the capacity; not under a CUDA graph capture
            or in a trace, where such entries are dropped and such counts cut.
    """
    if values_are_visible(indices) and examine(indices, counts, num_key_blocks, last):
        return indices, counts
    width = min(indices.shape[-1], num_key_blocks)
    cleaned = indices.new_empty(*counts.shape, width)
    cleaned_counts = counts.new_empty(counts.shape)
    for rows in _chunks(counts, max(num_key_blocks, indices.shape[-1])):
        mask = to_mask(indices[:, :, rows], counts[:, :, rows], num_key_blocks, last[:, rows])
        cleaned[:, :, rows], cleaned_counts[:, :, rows] = pack(mask, width)
    return cleaned, cleaned_counts


def values_are_visible(x: Tensor) -> bool:
    """Whether the host may look at values: not while a graph is traced or recorded."""
    if x.device.type == "meta" or torch.compiler.is_compiling():
        return False
    return x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _chunks(counts: Tensor, width: int) -> Iterator[slice]:
    """Rows to look at together, of ``width`` entries in each list."""
    batch, heads, rows = counts.shape
    step = max(1, CHUNK_ENTRIES // max(1, batch * heads * width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def examine(indices: Tensor, counts: Tensor, num_key_blocks: int, last: Tensor) -> bool:
    """Whether lists ascend and hold each block once, and visible ones only. Waits for the device.

    Raises:
        ValueError: an entry that is no key block, or a count outside of the capacity.
    """
    capacity = indices.shape[-1]
    slots = torch.arange(capacity, device=indices.device)
    found = torch.zeros(3, dtype=torch.bool, device=indices.device)
    found[0] = ((counts < 0) | (counts > capacity)).any()
    for rows in _chunks(counts, capacity):
        entries, listed = indices[:, :, rows], slots < counts[:, :, rows, None]
        future = entries > last[:, None, rows, None]
        unordered = (entries[..., 1:] <= entries[..., :-1]) & listed[..., 1:]
        found[1] |= (listed & _no_block(entries, num_key_blocks)).any()
        found[2] |= (listed & future).any() | unordered.any()
    count_is_wrong, entry_is_wrong, out_of_order = found.tolist()
    if count_is_wrong:
        b, h, row = ((counts < 0) | (counts > capacity)).nonzero()[0].tolist()
        raise ValueError(
            f"BlockIndices: counts[{b}, {h}, {row}] is {int(counts[b, h, row])}, but a list has room for 0 to "
            f"{capacity} entries (the last dimension of indices); correct counts, or give indices more room"
        )
    if entry_is_wrong:
        _raise_for_entry(indices, counts, num_key_blocks)
    return not out_of_order


def _no_block(entries: Tensor, num_key_blocks: int) -> Tensor:
    return (entries < 0) | (entries >= num_key_blocks)


def _raise_for_entry(indices: Tensor, counts: Tensor, num_key_blocks: int) -> None:
    slots = torch.arange(indices.shape[-1], device=indices.device)
    for rows in _chunks(counts, indices.shape[-1]):
        wrong = (slots < counts[:, :, rows, None]) & _no_block(indices[:, :, rows], num_key_blocks)
        if bool(wrong.any()):
            b, h, row, slot = wrong.nonzero()[0].tolist()
            row += rows.start
            raise ValueError(
                f"BlockIndices: indices[{b}, {h}, {row}, {slot}] is {int(indices[b, h, row, slot])}, but the key "
                f"blocks are 0 to {num_key_blocks - 1}; what is not to be read belongs past counts[{b}, {h}, {row}]"
            )


def to_mask(indices: Tensor, counts: Tensor, num_key_blocks: int, last: Tensor) -> Tensor:
    """Bool ``[B, H, R, Nk]``: the blocks on the lists that the rows may see."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    listed = (slots < counts[..., None]) & (indices >= 0) & (indices <= last[:, None, :, None])
    # What is not listed goes to one spare place, which is cut off.
    place = torch.where(listed, indices, num_key_blocks).long()
    mask = torch.zeros((*counts.shape, num_key_blocks + 1), dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, place, True)[..., :num_key_blocks]


def pack(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Lists of the blocks of a bool mask ``[B, H, R, Nk]``, none with more than ``capacity``, and their counts."""
    num_keys = mask.shape[-1]
    # Unselected entries all go to one spare slot, which is cut off.
    slot = torch.where(mask, mask.cumsum(-1) - 1, capacity)
    indices = torch.full((*mask.shape[:3], capacity + 1), -1, dtype=torch.int32, device=mask.device)
    blocks = torch.arange(num_keys, dtype=torch.int32, device=mask.device).expand(mask.shape)
    indices.scatter_(-1, slot, blocks)
    return indices[..., :capacity], mask.sum(-1, dtype=torch.int32)
