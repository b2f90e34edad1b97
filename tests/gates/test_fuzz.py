"""Mutated files: gates of both layouts and training states are refused with an error that names them, or unharmed.

SEER_FUZZ=2000 python -m pytest tests/gates/test_fuzz.py        # more mutations than the 300 of every run
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
import tempfile
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import seerattention as seer
from gate_folders import (
    CONFIG,
    load_checkpoint,
    load_training,
    write_own,
    write_own_of_both_phases,
    write_published,
    write_published_decode,
    write_states,
)
from seerattention.files import DamagedFileError
from seerattention.gates.checkpoint import GateCheckpoint, write_checkpoint
from seerattention.gates.sources import load_gates

MUTATIONS = int(os.environ.get("SEER_FUZZ", "300"))
# What a user of the loaders has to expect, and nothing else.
CLEAR = (DamagedFileError, FileNotFoundError, NotImplementedError, ValueError)
VALUES = [None, True, False, 0, -1, 1, 64.0, 10**12, 10**400, 0.5, "", "false", "64", "max"]
VALUES += [[], ["max"], {}, {"a": 1}, [[[]]]]
PAYLOAD = Path(tempfile.gettempdir()) / f"seer-fuzz-{os.getpid()}"  # made by a pickle that is executed


LAYOUTS = {
    "own": (write_own, load_checkpoint, ["gate_config.json", "gates.safetensors"]),
    "published": (write_published, load_checkpoint, ["config.json", "attn_gate_weights.pth"]),
    "own, both phases": (write_own_of_both_phases, load_checkpoint, ["gate_config.json", "gates.safetensors"]),
    "published decode": (write_published_decode, load_checkpoint, ["config.json", "attn_gate_weights.pth"]),
    "state": (write_states, load_training, ["state.safetensors"]),
}


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 3])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, 1, 7, 8, rng.randrange(len(content)), len(content) - 1])])


def grow(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    extra = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 64])))
    path.write_bytes(content + extra if rng.random() < 0.5 else extra + content)


def lie_about_the_header(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", rng.choice([0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])) + content[8:])


def edit_json(path: Path, rng: random.Random) -> None:
    """Another value, key or nesting somewhere in a JSON file, or in the JSON of a safetensors header."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data, rng)
        path.write_text(json.dumps(data))
        return
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    inner = next((name for name in ("gate_config", "meta") if name in metadata), None)
    if inner is not None and rng.random() < 0.7:
        data = json.loads(metadata[inner])
        change(data, rng)
        metadata[inner] = json.dumps(data)
    else:
        change(header, rng)
    made = json.dumps(header).encode()
    made += b" " * (-len(made) % 8)
    path.write_bytes(struct.pack("<Q", len(made)) + made + content[8 + size :])


def change(data, rng: random.Random) -> None:
    holder = data
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
            holder = holder[key]
            continue
        break
    action = rng.randrange(4)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[str(key) + "x"] = holder.pop(key)
    elif action == 2:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))


def edit_tensors(path: Path, rng: random.Random) -> None:
    published = path.suffix == ".pth"
    tensors = torch.load(path) if published else load_file(path)
    names = sorted(tensors)
    first, second = rng.choice(names), rng.choice(names)
    action = rng.randrange(6)
    if action == 0:
        tensors[first], tensors[second] = tensors[second], tensors[first]
    elif action == 1:
        others = [torch.int32, torch.bool, torch.float16, torch.float64, torch.complex64]
        tensors[first] = tensors[first].to(rng.choice(others))
    elif action == 2:
        tensors[first] = tensors[first].flatten()[:-1].clone()
    elif action == 3:
        tensors[first + "x"] = tensors.pop(first)
    elif action == 4:
        tensors[first] = torch.full_like(tensors[first].float(), float("nan"))
    elif published:
        huge = tensors[first].flatten()[:1].expand(1 << 20, 48, 1 << 20)
        tensors[first] = rng.choice([huge, 3, Evil(), torch.empty(4, device="meta")])
    if published:
        torch.save(tensors, path)
    else:
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)


class Evil:
    """Loading this would run code."""

    def __reduce__(self):
        return os.mkdir, (str(PAYLOAD),)


def strip_the_digest(path: Path, rng: random.Random) -> None:
    """Other numbers, and no digest in the header that could tell."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    metadata = header["__metadata__"]
    if "digest" in metadata:
        del metadata["digest"]
    else:
        data = json.loads(metadata["gate_config"])
        del data["save_id"]
        metadata["gate_config"] = json.dumps(data)
    made = json.dumps(header).encode()
    made += b" " * (-len(made) % 8)
    numbers = bytearray(content[8 + size :])
    numbers[rng.randrange(len(numbers))] ^= 1 << rng.randrange(8)
    path.write_bytes(struct.pack("<Q", len(made)) + made + numbers)


def swap_files(path: Path, rng: random.Random) -> None:
    others = [other for other in path.parent.iterdir() if other != path]
    if others and rng.random() < 0.5:
        shutil.copy(rng.choice(others), path)
    else:
        path.unlink()


def outcome(load, folder: Path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load(folder), None
    except Exception as error:
        return None, error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mutated_files(layout, tmp_path, caplog):
    write, load, files = LAYOUTS[layout]
    write(tmp_path / "whole")
    expected = load(tmp_path / "whole")
    rng = random.Random(layout)
    accepted = 0
    for number in range(MUTATIONS // 3):
        folder = tmp_path / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        path = folder / rng.choice(files)
        mutations = [flip, flip, cut, grow, swap_files]
        mutations += [edit_json] * 4 if path.suffix != ".pth" else []
        mutations += [edit_tensors] * 2 if path.suffix != ".json" else []
        mutations += [lie_about_the_header, strip_the_digest] if path.suffix == ".safetensors" else []
        mutate = rng.choice(mutations)
        mutate(path, rng)
        what = f"mutation {number}, {mutate.__name__} of {path.name}"
        caplog.clear()
        found, error = outcome(load, folder)
        if error is None:
            accepted += 1
            resaved = mutate is edit_tensors  # a checksum of its own
            check_accepted(layout, what, expected, found, caplog.text, resaved=resaved or path.name == "config.json")
        else:
            assert type(error) in CLEAR, f"{what}: {type(error).__name__}: {error}"
            assert type(error) is not ValueError or "different base model" in str(error), f"{what}: {error}"
            assert str(folder) in str(error), f"{what}: the message does not name the file: {error}"
    assert not PAYLOAD.exists(), "a mutated file ran code"
    assert accepted < MUTATIONS // 3


def check_accepted(layout, what, expected, found, logged, *, resaved) -> None:
    """Whatever loads computes what was saved; what the published layout says is only known by its zip's checksums."""
    same_config, same_policy = found[0] == expected[0], found[1] == expected[1]
    if layout.startswith("published") and resaved:
        return
    assert found[2].keys() == expected[2].keys(), what
    same_weights = all(torch.equal(found[2][name], value) for name, value in expected[2].items())
    assert same_config, f"{what}: other gates were accepted"
    assert same_weights, f"{what}: changed numbers were accepted"
    # Policies may be edited by hand; that is said.
    assert same_policy or "edited by hand" in logged, f"{what}: another policy was accepted without a word"


def test_the_payload_of_the_fuzz_test_would_work(tmp_path):
    write_published(tmp_path / "gate")
    path = tmp_path / "gate" / "attn_gate_weights.pth"
    torch.save({"x": Evil()}, path)
    with pytest.raises(
        DamagedFileError, match=r"holds more than tensors: it asks for [a-z]+\.mkdir, which is not"
    ) as e:
        load_gates(tmp_path / "gate", CONFIG)
    assert "weights_only" not in str(e.value), "torch's advice to load it nevertheless"
    assert not PAYLOAD.exists()
    torch.load(path, weights_only=False)
    assert PAYLOAD.is_dir()
    PAYLOAD.rmdir()


def test_a_reader_never_mixes_two_saves(tmp_path):
    """One thread saves two sets of gates in turn; every read gives one of them, whole."""
    sets = []
    for block_size, policy in ((32, seer.TopK(0.25)), (64, seer.TopP(0.5))):
        write_own(tmp_path / str(block_size))
        made = load_gates(tmp_path / str(block_size), CONFIG)
        weights = {name: torch.full_like(value, block_size) for name, value in made.weights.items()}
        sets.append(GateCheckpoint(seer.GateConfig(block_size), policy, made.base_model, weights, ""))
    folder, stop = tmp_path / "gates", threading.Event()
    write_checkpoint(folder, sets[0])

    def save() -> None:
        while not stop.is_set():
            for one in sets:
                write_checkpoint(folder, one)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        for _ in range(300):
            config, (policy, _), weights = load_checkpoint(folder)
            size = config.block_size
            assert policy == {32: seer.TopK(0.25), 64: seer.TopP(0.5)}[size]
            assert all(bool((value == size).all()) for value in weights.values())
    finally:
        stop.set()
        writer.join()
