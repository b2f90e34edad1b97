"""What is verified of training states that are read."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import seerattention as seer
from checkpoint_files import header_of
from gate_folders import write_states
from seerattention.distillation.saved import check_same_run, load_state, save_state
from seerattention.files import DamagedFileError


@pytest.fixture
def state(tmp_path):
    write_states(tmp_path / "state")
    return tmp_path / "state" / "state.safetensors"


def test_changed_states_are_found(state):
    whole = state.read_bytes()
    _, start = header_of(state)
    for position in range(start, len(whole)):
        state.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with pytest.raises(DamagedFileError, match=r"state\.safetensors is damaged.*start over"):
            load_state(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("digest"),
        lambda header: header.update(digesu=header.pop("digest")),
        lambda header: header.update(format="seerattention-training-state-1"),
        lambda header: header.update(meta=header["meta"].replace("1.25", "1.26")),
        lambda header: header.update(meta="{"),
        lambda header: header.pop("meta"),
    ],
    ids=range(6),
)
def test_states_with_another_header_are_refused(state, change):
    header, _ = header_of(state)
    change(header)
    save_file(load_file(state), state, header)
    with pytest.raises(DamagedFileError, match=r"state\.safetensors.*start over"):
        load_state(state)


META = {"settings": {}, "step": 3, "data": {"taken": 3}, "history": {"loss": [1.0]}}


def write_earlier(path, meta=META, tensors=None):
    """As the first version did: without a digest."""
    tensors = tensors or {"gate/layers.0.k": torch.ones(2), "rng/torch": torch.arange(3).byte()}
    header = {"format": "seerattention-training-state-1", "meta": json.dumps(meta)}
    save_file(tensors, path, header)


def test_earlier_states_load_with_a_note(tmp_path, caplog):
    write_earlier(tmp_path / "state.safetensors")
    with caplog.at_level(logging.INFO):
        assert load_state(tmp_path / "state.safetensors")[1] == META
    assert "no digest" in caplog.text
    # Saved again, it has one.
    save_state(tmp_path / "state.safetensors", *load_state(tmp_path / "state.safetensors"))
    assert "digest" in header_of(tmp_path / "state.safetensors")[0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"step": "3"}, "step is '3'"),
        ({"step": True}, "step is True"),
        ({"history": None}, "history is None"),
        ({"history": {"losses": []}}, r"unknown entries \['losses'\]"),
        ({"history": {"loss": 3.0}}, "loss must be of type list"),
        ({"data": {}}, "data.taken is None"),
    ],
    ids=str,
)
def test_earlier_states_are_checked_as_far_as_can_be(tmp_path, entries, message):
    write_earlier(tmp_path / "state.safetensors", {**META, **entries})
    with pytest.raises(DamagedFileError, match=rf"state\.safetensors is damaged.*{message}.*start over"):
        load_state(tmp_path / "state.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gate/layers.0.k", torch.ones(2, dtype=torch.int32), "gate/layers.0.k is torch.int32"),
        ("gate/layers.0.k", torch.tensor([float("nan"), 1]), "gate/layers.0.k is not finite"),
        ("rng/torch", torch.ones(3), "rng/torch is torch.float32"),
    ],
    ids=range(3),
)
def test_tensors_of_earlier_states_are_checked(tmp_path, name, value, message):
    write_earlier(tmp_path / "state.safetensors", tensors={name: value})
    with pytest.raises(DamagedFileError, match=message):
        load_state(tmp_path / "state.safetensors")


def test_gates_that_had_no_form_are_the_same_run(tmp_path):
    """An earlier version's settings do not name it; other gates are another run all the same."""
    present = json.loads(json.dumps(seer.GateConfig(block_size=32).to_dict()))
    earlier = json.loads(json.dumps(present))
    del earlier["prefill"]["form"]
    check_same_run({"gates": earlier}, {"gates": present}, tmp_path)
    with pytest.raises(ValueError, match="gates: was"):
        check_same_run({"gates": {**earlier, "block_size": 64}}, {"gates": present}, tmp_path)
    with pytest.raises(DamagedFileError, match="describes no valid gates"):
        check_same_run({"gates": {**earlier, "block_size": "64"}}, {"gates": present}, tmp_path)
