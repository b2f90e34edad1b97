"""Tensors in files, read from bytes that were read once: safetensors, and the pickles of the published layout."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..files import DamagedFileError, packed_path, parse_json, read_bytes, unpack

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What weights of gates may be; anything else was not written by this package nor by the published code."""

_DIGITS = 16


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; where it is not there, of the one compressed beside it.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is none, or damaged.
        ModuleNotFoundError: as :func:`unpack`.
    """
    packed = packed_path(path)
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        if not packed.is_file():
            raise
        path, content = packed, unpack(packed)
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
        DamagedFileError: it is damaged (checksums are verified where it has them), holds more than a dict of tensors,
            or would unpack to more than its size.
    """
    content = read_bytes(path)
    damaged = f"{path} is damaged, truncated or holds more than tensors"
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            _check_archive(content, damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols: what cannot be read raises
            data = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except DamagedFileError:
        raise
    except pickle.UnpicklingError as error:
        raise DamagedFileError(f"{damaged}{_asked_for(error)}") from error
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


def _check_archive(content: bytes, damaged: str) -> None:
    """Verify the checksums of a zip archive, which torch does not; those that it was told not to write are 0.

    Raises:
        DamagedFileError: the archive would unpack to more than its size, or holds an entry twice.
        zipfile.BadZipFile: a checksum differs.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > len(content):
            raise DamagedFileError(f"{damaged}: {len(content):,} bytes would unpack to {unpacked:,}")
        if len({entry.filename for entry in entries}) < len(entries):
            raise DamagedFileError(f"{damaged}: an entry is in it twice")
        for entry in entries:
            if entry.CRC:
                archive.read(entry)


def _asked_for(error: pickle.UnpicklingError) -> str:
    """The object that a pickle asks for. torch's own message goes on to advise loading it nevertheless."""
    found = re.search(r"GLOBAL ([\w.]*\w)", str(error))
    return f": it asks for {found[1]}, which is not loaded" if found else ""


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
    """16 hexadecimal digits of the SHA-256 of a description and tensors: equal content, equal digest.

    Names, dtypes, shapes and every bit of the tensors count; how a library lays them out in a file does not.
    """
    found = hashlib.sha256(json.dumps(description).encode())
    for name, x in sorted(tensors.items()):
        found.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:_DIGITS]


def is_digest_of(found: Any, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether ``found`` is the :func:`digest` of a description and tensors, or what earlier versions took for it."""
    if not isinstance(found, str):
        return False
    return found == digest(description, tensors) or found == _earlier_digest(description, tensors)


def _earlier_digest(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of the bytes that safetensors makes of the tensors."""
    return hashlib.sha256(json.dumps(description).encode() + save(own_memory(tensors))).hexdigest()[:_DIGITS]


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory, as views of one buffer do."""
    return {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


def read_described(metadata: Mapping[str, str], key: str, source: str) -> dict[str, Any]:
    """The JSON object under ``key`` of a safetensors file's metadata.

    Raises:
        DamagedFileError: there is none.
    """
    if not isinstance(metadata.get(key), str):
        raise DamagedFileError(f"{source} has no description {key!r} in its header; it was not written by this package")
    return parse_json(metadata[key], f"the header of {source}")
