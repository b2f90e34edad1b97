"""Launches every kernel, on small inputs with awkward lengths, for a memory checker:

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.memory_check
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.gpu.memory_check

Values are the tests' business; here it is addresses and races. Without a GPU it is a rehearsal in Triton's interpreter.
"""

from __future__ import annotations

import itertools

import torch

import seerattention as seer
from seerattention import ops
from seerattention.gates import PrefillGate, build_gate
from seerattention.ops import dispatch
from seerattention.ops.gate_scores import gate_scores
from seerattention.ops.gate_scores.interface import REDUCTIONS, empty_scores
from seerattention.ops.gate_scores.reference import Tiles
from seerattention.ops.gate_scores.triton_mass_row import mass_row_scores
from seerattention.ops.indices import BlockIndices
from seerattention.ops.inverse_rope import pooled_inverse_rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    (128, 300, 300, torch.float16),
    (64, 130, 333, torch.float16),
    (96, 65, 200, torch.bfloat16),
    (64, 65, 65, torch.float32),  # tiles smaller than a block, the last of which lies past the last key
    (256, 65, 65, torch.float32),
]
POLICIES = [seer.TopK(0.3), seer.Threshold(0.1), seer.TopP(0.8), seer.TokenBudget(128)]


def main() -> None:
    torch.manual_seed(0)
    for (head_dim, queries, keys, dtype), implementation in itertools.product(SHAPES, ("hopper", "triton")):
        unfit = dtype == torch.float32 or dispatch.hopper_unusable(torch.device(DEVICE))
        if implementation == "hopper" and unfit:
            continue
        launch_attention(head_dim, queries, keys, dtype, implementation)
        synchronize()
        print(f"attention and targets: {implementation}, head_dim {head_dim}, {queries} queries on {keys} keys")
    for implementation in ("hopper", "triton"):
        if implementation == "hopper" and dispatch.hopper_unusable(torch.device(DEVICE)):
            continue
        launch_gate_scores(implementation)
        synchronize()
        print(f"scores of sub-blocks: {implementation}")
    launch_mass_of_rows()
    synchronize()
    print("scores of one row by mass")
    for dtype in (torch.float16, torch.float32):
        launch_gate_path(dtype)
        synchronize()
        print(f"gate path: {dtype}")
    for num_keys in (4096, 8192) if DEVICE == "cuda" else (256,):  # rows of two warps and of four
        launch_selection(num_keys)
        synchronize()
        print(f"selection: rows of {num_keys} blocks")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def draw(heads: int, length: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, length, heads, head_dim, device=DEVICE, dtype=dtype).transpose(1, 2)


def launch_attention(head_dim: int, queries: int, keys: int, dtype: torch.dtype, implementation: str) -> None:
    q = draw(8, queries, head_dim, dtype)
    k, v = draw(2, keys, head_dim, dtype), draw(2, keys, head_dim, dtype)
    blocks, first = -(-keys // 64), (keys - queries) // 64
    causal = torch.ones(blocks - first, blocks, dtype=torch.bool, device=DEVICE).tril(first)
    lists = BlockIndices.from_mask((torch.rand(2, 8, blocks - first, blocks, device=DEVICE) < 0.5) & causal, 64)
    lengths = torch.tensor([keys, keys - 40], device=DEVICE)
    ops.block_sparse_attention(q, k, v, lists, return_lse=True, implementation=implementation)
    # One query block on long keys: its lists are shared out.
    far = draw(2, 4096, head_dim, dtype)
    everything = BlockIndices.from_mask(torch.ones(2, 8, 1, 64, dtype=torch.bool, device=DEVICE), 64)
    ops.block_sparse_attention(q[:, :, -64:], far, far, everything, return_lse=True, implementation=implementation)
    for reduce in ("max", "row_sum"):
        ops.pooled_attention(q, k, lengths=lengths, reduce=reduce, implementation=implementation)
    table = torch.rand(1, keys, head_dim // 2, device=DEVICE)
    ops.inverse_rope(k, table, table + 0.1)
    ops.inverse_rope(k, table, table + 0.1, recent=k[:, :, k.shape[2] // 3 :])
    pooled_inverse_rope(k, table, table + 0.1, ("max", "avg"), block_size=8, recent=k[:, :, k.shape[2] // 3 :])
    tokens = BlockIndices.from_mask(torch.ones(2, 2, 1, blocks, dtype=torch.bool, device=DEVICE), 64)
    tokens = BlockIndices(tokens.indices, tokens.counts, blocks, 64, by_token=True)
    ops.block_sparse_decode(q[:, :, -1:], k, v, tokens, return_lse=True)
    if implementation == "triton":
        lse = torch.zeros(2, 8, queries, device=DEVICE)
        for reduce, given in itertools.product(("max", "sum", "row_sum"), (None, lse)):
            common = {"lengths": lengths, "reduce": reduce, "lse": given, "implementation": "triton"}
            ops.pooled_attention(q, k, **common)
            ops.pooled_attention_decode(q, k, **common)


def launch_gate_path(dtype: torch.dtype) -> None:
    length, config = 333, seer.PrefillGateConfig(q_pooling=("max", "min", "avg"))
    gate = PrefillGate(config, block_size=64, num_heads=8, num_kv_heads=2, head_dim=64).to(DEVICE, dtype)
    angles = torch.rand(1, length, 64, device=DEVICE, dtype=dtype)
    lengths = torch.tensor([length, length - 100], device=DEVICE)
    with torch.inference_mode():
        logits = gate(
            draw(8, length, 64, dtype), draw(2, length, 64, dtype), angles.cos(), angles.sin(), lengths=lengths
        )
        for policy in POLICIES:
            policy.select(logits, block_size=64, lengths=lengths)
        fine = [seer.SubBlockGateConfig(q_pitch=16, k_pitch=4, reduce=reduce) for reduce in REDUCTIONS]
        for form in (gate.config, seer.PrefillGateConfig(), *fine):
            whole = build_gate(form, block_size=64, num_heads=8, num_kv_heads=2, head_dim=64).to(DEVICE, dtype)
            whole(draw(8, length, 64, dtype), draw(2, length, 64, dtype), angles.cos(), angles.sin())


def launch_gate_scores(implementation: str) -> None:
    """Keys and queries end where their memory does; the last row of tiles may lack sub-blocks."""
    for width, num, first, masked in ((64, 8, 0, True), (128, 40, 2, True), (128, 8 * 66 - 3, 0, False)):
        q, k = (draw(heads, num, width, torch.float16).contiguous() for heads in (4, 2))
        for pitch, reduce in ((8, "max"), (8, "mass"), (4, "mass")):  # with 4 they are half as many tiles
            rows = q[:, :, 64 // pitch * first :]
            options = {"q_pitch": pitch, "k_pitch": pitch, "reduce": reduce, "masked": masked}
            if rows.shape[2] >= 64 // pitch:
                gate_scores(rows, k, implementation=implementation, **options)


def launch_mass_of_rows() -> None:
    """As above, of one row, in whatever chunks the keys are shared out; heads that fill no program."""
    for width, num, group, pitch in ((64, 3, 1, 4), (128, 525, 7, 4), (64, 131, 9, 8)):
        row = (num - 1) * pitch // 64
        missing = -num % (64 // pitch)
        shapes = (2 * group, 64 // pitch - missing), (2, num)
        q, k = (draw(*shape, width, torch.float16).contiguous() for shape in shapes)
        tiles = Tiles(64, pitch, pitch, 0.1, "mass", True, first_row=row, end=num * pitch - 1)
        mass_row_scores(q, k, empty_scores(q, 1, row + 1), tiles)


def launch_selection(num_keys: int) -> None:
    logits = torch.randn(1, 2, 3, num_keys, device=DEVICE)
    for policy in (*POLICIES, seer.RelativeThreshold(0.0), seer.RelativeThreshold(2.0), seer.TopK(1 - 1e-6)):
        policy.select(logits, block_size=64)


if __name__ == "__main__":
    main()
