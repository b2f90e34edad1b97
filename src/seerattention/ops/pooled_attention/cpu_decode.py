"""1-D pooled attention on the CPU: a few query tokens and one KV head at a time, against the keys that they see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..indices import num_blocks
from .arguments import Wanted
from .reference_decode import finish

# Tokens at a time. They share a product with the keys that the last of them sees: ascending rows waste little of it.
TOKENS = 32


def pooled_attention_decode(q: Tensor, k: Tensor, rows: Tensor, wanted: Wanted) -> Tensor:
    block_size, scale, lengths, reduce, _, lse = wanted
    batch, heads, query_length, head_dim = q.shape
    kv_heads, key_length = k.shape[1:3]
    group, num_keys = heads // kv_heads, num_blocks(key_length, block_size)
    offset = key_length - query_length
    content = [key_length] * batch if lengths is None else lengths.tolist()
    # Keys are padded to whole blocks; the causal mask hides the padding as it hides later keys.
    keys = torch.nn.functional.pad(k.float(), (0, 0, 0, num_keys * block_size - key_length))
    key_positions = torch.arange(keys.shape[2])
    out = torch.zeros(batch, kv_heads, rows.numel(), num_keys, dtype=torch.float32)
    # Fresh memory for every step would cost more in page faults than the multiplication itself.
    buffers = torch.empty(
        2 if lse is None else 1, group * min(TOKENS, rows.numel()) * keys.shape[2], dtype=torch.float32
    )

    for chunk in torch.arange(rows.numel()).split(TOKENS):
        for b in range(batch):
            slots = chunk[rows[chunk] < content[b]]
            if not slots.numel():
                continue  # nothing but padding
            positions = rows[slots]
            blocks = num_blocks(int(positions.max()) + 1, block_size)
            visible = blocks * block_size
            first_hidden = int(positions.min()) + 1
            hidden = key_positions[first_hidden:visible] > positions[:, None]
            queries = (q[b, :, positions - offset].float() * scale).unflatten(0, (kv_heads, group))
            for head in range(kv_heads):
                flat = queries[head].reshape(-1, head_dim)
                scores, probabilities = (buffers[i][: flat.shape[0] * visible].view(-1, visible) for i in (0, -1))
                torch.mm(flat, keys[b, head, :visible].T, out=scores)
                scores.view(group, -1, visible)[..., first_hidden:].masked_fill_(hidden, float("-inf"))
                if lse is None:
                    torch.softmax(scores, -1, out=probabilities)
                else:
                    lse_here = lse[b, head * group : (head + 1) * group, positions - offset]
                    scores.sub_(lse_here.reshape(-1, 1))
                    if reduce == "sum":
                        scores.exp_()
                probabilities = probabilities.view(group, -1, visible)
                # Heads first: this reduction runs over contiguous rows of keys.
                if reduce == "max":
                    pooled = probabilities.amax(0).unflatten(-1, (blocks, block_size)).amax(-1)
                    if lse is not None:  # so far logarithms: the exponential of the maximum is the maximum
                        pooled.exp_()
                else:
                    pooled = probabilities.sum(0).unflatten(-1, (blocks, block_size)).sum(-1)
                out[b, head, slots, :blocks] = pooled
    return finish(out, group, wanted)
