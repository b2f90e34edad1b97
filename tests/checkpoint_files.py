"""Files of gates and of training states, changed in ways that only a digest tells."""

from __future__ import annotations

import json
import struct

from safetensors.torch import load_file, save_file


def header_of(path):
    """Metadata and end of the header of a safetensors file."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size])["__metadata__"], 8 + size


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def resave(path, change):
    """Other tensors under the old header."""
    metadata, _ = header_of(path)
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata)
