"""Tensors in files, read from bytes that were read once: safetensors, and the pickles of the published layout."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..files import DamagedFileError, parse_json, read_bytes

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What weights of gates may be; anything else was not written by this package nor by the published code."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is none, or damaged.
    """
    content = read_bytes(path)
    try:
        tensors = load(content)
        metadata = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).get("__metadata__") or {}
    except Exception as error:  # whatever the parser makes of bytes that are anything
        raise DamagedFileError(f"{path} is damaged or truncated: {_said(error)}") from error
    return tensors, metadata


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The dict of tensors that ``torch.save`` wrote; no code in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is damaged, holds more than a dict of tensors, or would unpack to more than its size.
    """
    content = read_bytes(path)
    damaged = f"{path} is damaged, truncated or holds more than tensors"
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > len(content):
                raise DamagedFileError(f"{damaged}: {len(content):,} bytes would unpack to {unpacked:,}")
        data = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except DamagedFileError:
        raise
    except Exception as error:  # whatever the unpickler makes of bytes that are anything
        raise DamagedFileError(f"{damaged}: {_said(error)}") from error
    if not isinstance(data, dict):
        raise DamagedFileError(f"{path} must hold a dict of tensors, got {type(data).__name__}")
    for key, value in data.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise DamagedFileError(f"{path} must hold tensors by name, got {key!r}: {type(value).__name__}")
        if not _is_plain(value):
            raise DamagedFileError(f"{path}: {key} is no plain tensor that lies in the file as a whole")
    return data


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is strided, in memory, and not larger than what it is a view of."""
    if x.layout != torch.strided or x.device.type != "cpu" or x.is_quantized:
        return False
    return x.numel() * x.element_size() <= x.untyped_storage().nbytes()


def _said(error: Exception) -> str:
    """The first line of a message; the type where there is none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def check_dtypes(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise :class:`DamagedFileError` unless all are of :data:`WEIGHT_DTYPES`."""
    wrong = [f"{name} is {x.dtype}" for name, x in sorted(tensors.items()) if x.dtype not in WEIGHT_DTYPES]
    if wrong:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise DamagedFileError(f"{source}: gate weights must be {known}, but {'; '.join(wrong)}")


def digest(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 of a description and tensors: equal content, equal digest."""
    content = json.dumps(description).encode() + save({name: x.contiguous() for name, x in tensors.items()})
    return hashlib.sha256(content).hexdigest()[:16]


def read_described(metadata: Mapping[str, str], key: str, source: str) -> dict[str, Any]:
    """The JSON object under ``key`` of a safetensors file's metadata.

    Raises:
        DamagedFileError: there is none.
    """
    if not isinstance(metadata.get(key), str):
        raise DamagedFileError(f"{source} has no description {key!r} in its header; it was not written by this package")
    return parse_json(metadata[key], f"the header of {source}")
