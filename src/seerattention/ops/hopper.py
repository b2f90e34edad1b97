"""What the Gluon kernels for Hopper GPUs share: tiles by the tensor copy engine (TMA), and an order to keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # triton 3.7 renamed it


def tile_descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """What TMA needs to know to copy tiles of shape ``block`` of ``x [B, H, T, D]``, wherever these lie.

    ``dispatch.hopper_refuses`` says which tensors it takes. Rows and columns outside of x arrive as zeros. A tile
    lies in shared memory as TMA writes and wgmma reads it.
    """
    return view_descriptor(x, x.shape, x.stride(), block)


def view_descriptor(x: Tensor, sizes: Sequence[int], strides: Sequence[int], block: list[int]) -> TensorDescriptor:
    """The same of what lies in the memory of x at ``strides``, the last of which is 1."""
    # The stride of a dimension of size 1 is arbitrary and never used, but TMA wants multiples of 16 bytes.
    steps = [step if size > 1 else block[-1] for size, step in zip(sizes[:-1], strides[:-1], strict=True)]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(sizes), [*steps, 1], block, layout)


@gluon.jit
def copy_tile(d_x, i_b, i_h, o_t, bar, smem, m_any):
    """Start the copy of one tile, if ``m_any``; ``bar`` completes when it has arrived."""
    mbarrier.expect(bar, d_x.block_type.nbytes, pred=m_any)
    tma.async_copy_global_to_shared(d_x, [i_b, i_h, o_t, 0], bar, smem, pred=m_any)


@gluon.jit
def key_place(p_pages, o_key, i_batch, key_slot, m_any, PAGE: gl.constexpr):
    """Coordinates of position ``o_key`` of a row among keys and values: batch row and slot, or page and place in it.

    Nothing is read unless ``m_any``.
    """
    if PAGE:
        return gl.load(p_pages + o_key // PAGE, mask=m_any, other=0), o_key % PAGE
    else:
        return i_batch, o_key + key_slot


@gluon.jit
def pin(bar_pin):
    """Keeps the assembler from moving arithmetic across this point.

    It would, for instance, compute most of a softmax between waiting for the scores and starting the next copy, and the
    copy would come that much later. A wait for a barrier is a branch, which it moves nothing across; this one, for the
    phase before the first of a barrier that is never used, is always over.
    """
    mbarrier.wait(bar_pin, 1)
