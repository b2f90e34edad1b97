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
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import seerattention as seer
from seerattention.distillation.checkpoint import load_state, save_state
from seerattention.files import DamagedFileError
from seerattention.gates import build_gate
from seerattention.gates.checkpoint import GateCheckpoint, write_checkpoint
from seerattention.gates.sources import load_gates

MUTATIONS = int(os.environ.get("SEER_FUZZ", "300"))
SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "rope_theta": 10000.0,
}
# What a user of the loaders has to expect, and nothing else.
CLEAR = (DamagedFileError, FileNotFoundError, NotImplementedError, ValueError)
VALUES = [None, True, False, 0, -1, 1, 64.0, 10**12, 10**400, 0.5, "", "false", "64", "max"]
VALUES += [[], ["max"], {}, {"a": 1}, [[[]]]]
executed = []


def make_gates(config: seer.GateConfig) -> dict[int, torch.nn.Module]:
    return {layer: build_gate(config.prefill, block_size=config.block_size, **SHAPE) for layer in range(2)}


def write_own(folder: Path) -> None:
    torch.manual_seed(0)
    config = seer.GateConfig(block_size=32)
    weights = {
        f"layers.{layer}.prefill.{name}": value.detach()
        for layer, gate in make_gates(config).items()
        for name, value in gate.named_parameters()
    }
    base = {"name": "base", "revision": None, **{k: v for k, v in CONFIG.items() if k != "hidden_size"}}
    write_checkpoint(folder, GateCheckpoint(config, seer.TopK(0.25), base, weights, str(folder)))


def write_published(folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir()
    config = {
        **CONFIG,
        "base_model": "owner/base",
        "seerattn_gate_block_size": 64,
        "seerattn_gate_hidden_size": 16,
        "seerattn_gate_type": "Qavg_Kmaxminavg",
        "seerattn_gate_force_double": False,
        "seerattn_sparsity_method": "threshold",
        "seerattn_threshold": 5e-4,
        "seerattn_nz_ratio": 0.5,
        "seerattn_last_block_dense": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    key = "model.layers.{}.self_attn.attn_gate.mask_linear_k.weight"
    torch.save({key.format(i): torch.randn(4, 48, 16).bfloat16() for i in range(2)}, folder / "attn_gate_weights.pth")


def write_states(folder: Path) -> None:
    folder.mkdir()
    tensors = {"gate/layers.0.k": torch.randn(4, 8), "rng/torch": torch.arange(9).byte()}
    meta = {"settings": {"lr": 1e-3, "rows": None}, "step": 3, "history": [1.5, 1.25]}
    save_state(folder / "state.safetensors", tensors | {"optimizer/step/a": torch.tensor(3.0)}, meta)


def load_checkpoint(folder: Path):
    """Everything that decides what the gates compute."""
    checkpoint = load_gates(folder, CONFIG)
    gates = make_gates(checkpoint.gate_config)
    checkpoint.load_into(gates)
    weights = {(i, name): value.detach() for i, gate in gates.items() for name, value in gate.named_parameters()}
    return checkpoint.gate_config, checkpoint.policy, weights


def load_training(folder: Path):
    tensors, meta = load_state(folder / "state.safetensors")
    return json.dumps(meta), None, tensors


LAYOUTS = {
    "own": (write_own, load_checkpoint, ["gate_config.json", "gates.safetensors"]),
    "published": (write_published, load_checkpoint, ["config.json", "attn_gate_weights.pth"]),
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
        huge = tensors[first][:1, :1, :1].expand(1 << 20, 48, 1 << 20)
        tensors[first] = rng.choice([huge, 3, Evil(), torch.empty(4, device="meta")])
    if published:
        torch.save(tensors, path)
    else:
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)


class Evil:
    """Loading this would run code."""

    def __reduce__(self):
        return executed.append, (1,)


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
        mutations += [lie_about_the_header] if path.suffix == ".safetensors" else []
        mutate = rng.choice(mutations)
        mutate(path, rng)
        what = f"mutation {number}, {mutate.__name__} of {path.name}"
        caplog.clear()
        found, error = outcome(load, folder)
        if error is None:
            accepted += 1
            check_accepted(layout, what, expected, found, caplog.text)
        else:
            assert type(error) in CLEAR, f"{what}: {type(error).__name__}: {error}"
            assert str(folder) in str(error), f"{what}: the message does not name the file: {error}"
    assert not executed, "a mutated file ran code"
    assert accepted < MUTATIONS // 3


def check_accepted(layout, what, expected, found, logged) -> None:
    """Whatever loads computes what was saved; where no digest can tell, what the file says is legible."""
    same_config, same_policy = found[0] == expected[0], found[1] == expected[1]
    assert found[2].keys() == expected[2].keys(), what
    same_weights = all(torch.equal(found[2][name], value) for name, value in expected[2].items())
    if layout == "published":  # the published layout has no digest
        return
    assert same_config, f"{what}: other gates were accepted"
    assert same_weights, f"{what}: changed numbers were accepted"
    # Policies may be edited by hand; that is said.
    assert same_policy or "edited by hand" in logged, f"{what}: another policy was accepted without a word"


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
            config, policy, weights = load_checkpoint(folder)
            size = config.block_size
            assert policy == {32: seer.TopK(0.25), 64: seer.TopP(0.5)}[size]
            assert all(bool((value == size).all()) for value in weights.values())
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize(
    "spec",
    [
        {"rope": "false"},
        {"block_size": 64.0},
        {"block_size": True},
        {"hidden_size": 10**12},
        {"hidden_size": "16"},
        {"k_pooling": "max"},
        {"form": "magic"},
        {"form": None},
        {"q_linear": 1},
    ],
    ids=str,
)
def test_entries_of_a_wrong_type_or_size(spec):
    data = seer.GateConfig().to_dict()
    (data if "block_size" in spec else data["prefill"]).update(spec)
    with pytest.raises((TypeError, ValueError), match=next(iter(spec))):
        seer.GateConfig.from_dict(data)


def test_the_form_of_a_gate_has_a_name_and_old_files_have_the_papers():
    data = seer.GateConfig(block_size=128).to_dict()
    assert data["prefill"].pop("form") == "paper"
    assert seer.GateConfig.from_dict(data) == seer.GateConfig(block_size=128)


def test_an_unknown_sparsity_method_is_refused(tmp_path):
    write_published(tmp_path / "gate")
    path = tmp_path / "gate" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seerattn_sparsity_method": "magic"}))
    with pytest.raises(DamagedFileError, match=r"seerattn_sparsity_method must be one of .*, got 'magic'"):
        load_gates(tmp_path / "gate", CONFIG)
