"""What the interfaces of all ops share: choosing an implementation, checking shapes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
# What every op takes for floating-point inputs, whatever torch's default dtype is; so does everything above the ops.
FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128)

# Whether kernels written in Gluon for Hopper GPUs run wherever they can, or only where they are asked for by name.
HOPPER_AUTOMATIC = True
# Environment variable that overrides HOPPER_AUTOMATIC, for tests and measurements: 1 chooses these kernels wherever
# they can run, 0 nowhere.
HOPPER_VARIABLE = "SEER_HOPPER"
# Gluon is experimental and moves with triton: the versions, major and minor, for which the kernels have been compiled.
GLUON_VERSIONS = ("3.6", "3.7")


def power_of_2(x: int) -> int:
    """The smallest power of two from x on; triton's own takes microseconds, and launchers ask in every call."""
    return 1 << (x - 1).bit_length()


@functools.cache
def triton_importable() -> bool:
    """Whether ``import triton`` works; nothing is imported before an op first asks."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def triton_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter (``TRITON_INTERPRET=1``), that is, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def hopper_automatic() -> bool:
    """Whether the automatic choice may take a Hopper kernel where it can run."""
    return {"0": False, "1": True}.get(os.environ.get(HOPPER_VARIABLE, ""), HOPPER_AUTOMATIC)


@functools.cache
def hopper_unusable(device: torch.device) -> str | None:
    """Why kernels written in Gluon for Hopper cannot run on a device, or None where they can."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device.type}"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU of compute capability 9.0, got one of AMD"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):  # wgmma is of this capability alone: neither older nor newer GPUs have it
        return f"it needs a GPU of compute capability 9.0 (Hopper), got {capability[0]}.{capability[1]}"
    if not triton_importable():
        return "it needs triton; `pip install 'seerattention[triton]'`"
    version = importlib.import_module("triton").__version__
    if ".".join(version.split(".")[:2]) not in GLUON_VERSIONS:
        return f"it is written for triton {' and '.join(GLUON_VERSIONS)}, got {version}"
    try:
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as error:
        return f"this triton has no Gluon for Hopper: {error}"
    return None


def hopper_refuses(**tensors: Tensor) -> str | None:
    """Why the Hopper kernels cannot run on these ``[B, H, T, D]``, or None where they can: what all of them need.

    That is a GPU and a triton as :func:`hopper_unusable` wants them, float16 or bfloat16, head_dim from 64 to 128
    (computed as 128 above 64), and addresses that the tensor copy engine takes: 16-byte aligned, strides multiples of
    16 bytes. The tensors share device, dtype and head_dim.
    """
    first = next(iter(tensors.values()))
    if reason := hopper_unusable(first.device):
        return reason
    if first.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, got {first.dtype}"
    if not 64 <= first.shape[-1] <= 128:
        return f"it needs head_dim from 64 to 128, got {first.shape[-1]}"
    for name, x in tensors.items():
        # The stride of a dimension of size 1 means nothing; a stride of 0 is an expanded tensor.
        steps = [step * x.element_size() for size, step in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
        if x.data_ptr() % 16 or any(step % 16 or not 0 < step < 1 << 40 for step in steps):
            return (
                f"it needs a 16-byte aligned {name} with strides that are multiples of 16 bytes, got strides of "
                f"{steps} bytes and an address {x.data_ptr() % 16} bytes past a multiple of 16"
            )
    return None


@functools.cache
def capability(device: torch.device) -> int:
    """Major compute capability of an NVIDIA GPU; 0 on a GPU of AMD and on the CPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one Triton program may use."""
    if device.type != "cuda":
        return 1 << 17
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 on the CPU, where kernels are interpreted one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time that it comes up in this process."""
    logger.warning(message)


def device_type(device: torch.device) -> str:
    """What implementations are chosen by; ROCm devices call themselves cuda too."""
    return device.type


class Implementation(NamedTuple):
    """One line of an op's table of implementations, which stand in the order of preference.

    Attributes:
        module: where its function, which has the op's name, is; imported when it is first needed.
        refuses: why it cannot run on the arguments that the op chooses by, or None where it can.
    """

    module: str
    refuses: Callable[..., str | None] = lambda *arguments: None


def choose_implementation(
    op: str, implementation: str | None, device: torch.device, table: Mapping[str, Implementation], *arguments: Any
) -> str:
    """Name of the implementation to run: the one asked for, or the first of the table that can run.

    By itself ``"triton"`` runs on CUDA and ROCm devices (where triton is not installed, or the kernel refuses, the
    reference runs, with one warning), ``"hopper"`` where :func:`hopper_automatic`, what begins with ``"cpu"`` on the
    CPU.

    Args:
        op: name of the op, for messages.
        implementation: what the caller asked for; None chooses.
        device: device of the inputs.
        table: implementations that the op has.
        arguments: for ``refuses``.

    Raises:
        ValueError: no such implementation, or one asked for that cannot run on the inputs.
    """
    if implementation is None:
        return next(name for name in table if _runs_by_itself(op, name, device, table[name].refuses, arguments))
    if implementation not in table:
        raise ValueError(
            f"{op} has no implementation {implementation!r}; choose one of {tuple(table)} or None (automatic)"
        )
    if implementation == "triton":
        if not triton_importable():
            raise ValueError(f"{op}: implementation='triton' needs triton; `pip install 'seerattention[triton]'`")
        if device.type != "cuda" and not triton_interpreted():
            raise ValueError(
                f"{op}: implementation='triton' needs CUDA tensors, got {device.type}; set TRITON_INTERPRET=1 before "
                "the first call to run it in Triton's interpreter, or pass implementation=None"
            )
    if implementation.startswith("cpu") and device.type != "cpu":
        raise ValueError(f"{op}: implementation={implementation!r} needs CPU tensors, got {device.type}")
    if reason := table[implementation].refuses(*arguments):
        raise ValueError(f"{op}: implementation={implementation!r} cannot run here: {reason}; pass implementation=None")
    return implementation


def _runs_by_itself(
    op: str, name: str, device: torch.device, refuses: Callable[..., str | None], arguments: Sequence[Any]
) -> bool:
    if name == "reference":
        return True
    if name.startswith("cpu"):
        return device_type(device) == "cpu" and refuses(*arguments) is None
    if device_type(device) != "cuda":
        return False
    if name == "hopper":
        return hopper_automatic() and refuses(*arguments) is None
    if not triton_importable():
        warn_once(
            f"{op}: triton cannot be imported, so the slow reference implementation runs on {device.type}; "
            "install it with `pip install 'seerattention[triton]'`"
        )
        return False
    if reason := refuses(*arguments):
        warn_once(f"{op}: the slow reference implementation runs, since of the Triton kernel {reason}")
        return False
    return True


def load(package: str | None, module: str, function: str) -> Callable[..., Any]:
    """A function of a module of an op's package. Kernels are imported late: triton is an optional dependency."""
    return getattr(_module(f"{package}.{module}"), function)


_module = functools.cache(importlib.import_module)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Autocast would round the float32 products inside the implementations."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def check_query_key(op: str, q: Tensor, k: Tensor, with_span: bool = False) -> None:
    """Check ``q [B, Hq, Tq, D]`` against ``k [B, Hkv, Tk, D]``: shapes, GQA, dtype, device, contiguous last dimension.

    Args:
        op: name of the op, for messages.
        q, k: the tensors.
        with_span: rows and slots are those of a span, which checks them.

    Raises:
        ValueError: shapes that do not fit each other, Tq > Tk, mixed devices, D above 256, a strided last dimension.
        TypeError: dtypes that differ or are not float32, float16 or bfloat16.
    """
    check_floating(op, q=q, k=k)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"{op}: q must be [B, Hq, Tq, D] and k [B, Hkv, Tk, D], got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[3] != k.shape[3] or (q.shape[0] != k.shape[0] and not with_span):
        raise ValueError(
            f"{op}: q and k must agree in batch size and head_dim, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op}: {q.shape[1]} query heads do not fit {k.shape[1]} KV heads, of which they must be a multiple"
        )
    if q.shape[2] > k.shape[2] and not with_span:
        raise ValueError(
            f"{op}: got {q.shape[2]} queries for {k.shape[2]} keys; queries are the last positions of the keys"
        )
    if not 0 < q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be between 1 and {MAX_HEAD_DIM}, got {q.shape[3]}")


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, with_span: bool = False) -> None:
    """Check what every attention without a backward needs of its tensors and its scale.

    Raises:
        ValueError, TypeError: as :func:`check_query_key`; k and v that differ in shape; a scale that is not positive.
        NotImplementedError: an input requires grad while grad mode is on.
    """
    check_query_key(op, q, k, with_span)
    check_floating(op, q=q, v=v)
    if v.shape != k.shape:
        raise ValueError(f"{op}: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise NotImplementedError(
            f"{op} has no backward; call it under torch.no_grad() or on detached tensors, or use dense attention"
        )
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{op}: scale must be positive and finite or None, got {scale}")


def check_floating(op: str, **tensors: Tensor) -> None:
    """Check that tensors share one device and one dtype out of float32, float16, bfloat16, last dimension contiguous.

    Raises:
        TypeError: another or a mixed dtype; :func:`check_dtype`.
        ValueError: mixed devices or a strided last dimension.
    """
    (first_name, first), *others = tensors.items()
    check_dtype(f"{op}: {first_name}", first.dtype)
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; convert one of them")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}")
    for name, tensor in tensors.items():
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{op}: the last dimension of {name} must be contiguous; call .contiguous() first")


def check_dtype(what: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless the dtype of ``what`` is one of :data:`FLOATING_DTYPES`."""
    if dtype not in FLOATING_DTYPES:
        *names, last = (str(supported).removeprefix("torch.") for supported in FLOATING_DTYPES)
        raise TypeError(f"{what} must be {', '.join(names)} or {last}, got {dtype}; convert it with .to()")


def check_block_size(op: str, block_size: int, sizes: Sequence[int] = BLOCK_SIZES) -> None:
    """Raise ValueError unless ``block_size`` is one of ``sizes``, by default 32, 64 and 128."""
    if block_size not in sizes:
        raise ValueError(f"{op}: block_size must be one of {tuple(sizes)}, got {block_size}")


def default_scale(head_dim: int, scale: float | None) -> float:
    """The softmax scale: the one given, or 1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
