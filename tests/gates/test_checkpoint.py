"""What is verified of gates and training states that are read, in whatever way they differ from what was saved."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import seerattention as seer
from checkpoint_files import edit, header_of, resave
from gate_folders import CONFIG, load_checkpoint, write_own, write_published
from seerattention.files import DamagedFileError, pack
from seerattention.gates import tensors
from seerattention.gates.checkpoint import read_checkpoint, write_checkpoint
from seerattention.gates.sources import convert, load_gates

TESTBED = Path(seer.__file__).parent / "testbed" / "gates"
KEY = "model.layers.{}.self_attn.attn_gate.mask_linear_k.weight"


@pytest.fixture
def own(tmp_path):
    write_own(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def published(tmp_path):
    write_published(tmp_path / "published")
    return tmp_path / "published"


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_of_any_number_is_found(own):
    """By the reader, so that nobody gets at such weights, whatever is done with them."""
    path = own / "gates.safetensors"
    whole = path.read_bytes()
    _, start = header_of(path)
    for position in range(start, len(whole), 101):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DamagedFileError, match=r"gates\.safetensors is damaged: its weights or their description"):
            read_checkpoint(own)


def swap(weights):
    first, second = "layers.0.prefill.k_linear", "layers.1.prefill.k_linear"
    weights[first], weights[second] = weights[second], weights[first]


CHANGES = {
    "swapped": (swap, "not those that were saved; copy"),
    "missing": (lambda w: w.pop("layers.1.prefill.k_linear"), r"\(missing: layers\.1\.prefill\.k_linear\)"),
    "dtype": (
        lambda w: w.update({"layers.0.prefill.k_linear": w["layers.0.prefill.k_linear"].double()}),
        "not those that were saved",
    ),
    "integers": (
        lambda w: w.update({"layers.0.prefill.k_linear": torch.ones(4, 48, 16).int()}),
        "k_linear is torch.int32",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("header", [True, False])
def test_other_weights_are_found(own, case, header):
    """Also where a tool dropped the header: the description beside it has the digest, too."""
    change, message = CHANGES[case]
    path = own / "gates.safetensors"
    resave(path, change)
    if not header:
        save_file(load_file(path), path)
    with pytest.raises(DamagedFileError, match=message):
        read_checkpoint(own)


def test_a_dropped_header_alone_is_no_damage(own):
    expected = load_checkpoint(own)
    save_file(load_file(own / "gates.safetensors"), own / "gates.safetensors", {"format": "pt"})
    assert load_checkpoint(own)[:2] == expected[:2]


def test_a_header_without_a_digest_is_damaged(own):
    path = own / "gates.safetensors"
    metadata, _ = header_of(path)
    described = json.loads(metadata["gate_config"])
    save_id = described.pop("save_id")
    for changed in (
        {"gate_config": json.dumps(described)},
        {"gate_config": json.dumps({**described, "save_jd": save_id})},
        {"gate_config": json.dumps({**described, "save_id": 7})},
        {"gate_confih": metadata["gate_config"]},
    ):
        save_file(load_file(path), path, changed)
        with pytest.raises(DamagedFileError, match=r"gates\.safetensors is damaged"):
            read_checkpoint(own)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["gates"].update(block_size=64),
        lambda data: data["gates"]["prefill"].update(rope=False),
        lambda data: data["gates"]["prefill"].update(k_pooling=["min", "max", "avg"]),
        lambda data: data["base_model"].update(rope_theta=5e5),
        lambda data: data["base_model"].update(num_hidden_layers=3),
    ],
    ids=range(5),
)
def test_descriptions_that_were_changed_are_found(own, change):
    edit(own / "gate_config.json", change)
    with pytest.raises(DamagedFileError, match=r"gate_config\.json is damaged or was edited.*only the policies"):
        read_checkpoint(own)


def test_a_policy_edited_by_hand_is_said(own, caplog):
    edit(own / "gate_config.json", lambda data: data["policies"]["prefill"].update(density=0.75))
    assert read_checkpoint(own).policy == seer.TopK(0.75)
    assert "edited by hand" in caplog.text


def test_earlier_gates_are_verified(own):
    """Their digest was taken of the bytes of safetensors."""
    weights = load_file(own / "gates.safetensors")
    description = json.loads((own / "gate_config.json").read_text())
    of_today = description.pop("save_id")
    description["save_id"] = hashlib.sha256(json.dumps(description).encode() + save(weights)).hexdigest()[:16]
    assert description["save_id"] != of_today
    save_file(weights, own / "gates.safetensors", metadata={"gate_config": json.dumps(description)})
    (own / "gate_config.json").write_text(json.dumps(description))
    assert read_checkpoint(own).weights.keys() == weights.keys()
    content = bytearray((own / "gates.safetensors").read_bytes())
    content[-1] ^= 1
    (own / "gates.safetensors").write_bytes(content)
    with pytest.raises(DamagedFileError, match="not those that were saved"):
        read_checkpoint(own)


def test_the_testbeds_gates_are_verified(tmp_path):
    assert read_checkpoint(TESTBED).gate_config.block_size == 64
    write_checkpoint(tmp_path, read_checkpoint(TESTBED))  # they come packed
    content = bytearray((tmp_path / "gates.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "gates.safetensors").write_bytes(content)
    with pytest.raises(DamagedFileError, match="not those that were saved"):
        read_checkpoint(tmp_path)


def test_the_models_gates_have_their_form():
    testbed, smollm2 = (read_checkpoint(seer.testbed.gates_path(name)) for name in seer.testbed.MODELS)
    for checkpoint, factor in ((testbed, 1.0), (smollm2, 0.6)):
        assert checkpoint.gate_config.prefill == seer.SubBlockGateConfig(q_pitch=4, k_pitch=4, reduce="mass")
        assert checkpoint.policy == seer.RelativeThreshold(factor)
        assert checkpoint.budgets.densities[0] <= 0.1
    # Those gates are there to be asked for: decoding is dense unless a policy is given.
    assert testbed.gate_config.decode == seer.DecodeGateConfig(k_pitch=8, merge_heads=False, query_window=8)
    assert testbed.decode_policy == seer.Dense()
    assert testbed.base_model["name"] == seer.testbed.NAME
    assert smollm2.base_model["name"] == seer.testbed.smollm2.HUB_ID


def test_gates_of_the_first_version_load_with_a_note(own, caplog):
    """Without header and digest."""
    expected = load_checkpoint(own)
    save_file(load_file(own / "gates.safetensors"), own / "gates.safetensors")
    edit(own / "gate_config.json", lambda data: [data.pop(name) for name in ("save_id", "tensors")])
    with caplog.at_level(logging.INFO):
        found = load_checkpoint(own)
    assert "no digest" in caplog.text
    assert found[:2] == expected[:2]


def test_a_digest_does_not_depend_on_how_a_library_lays_out_files(own, monkeypatch):
    """Gates stay readable when safetensors sorts or pads otherwise one day."""
    monkeypatch.setattr(tensors, "save", lambda *args: b"another layout")
    assert read_checkpoint(own).policy == seer.TopK(0.25)
    weights = {"b": torch.randn(3), "a": torch.randn(2, 2).T}
    assert tensors.digest({}, weights) == tensors.digest({}, dict(sorted(weights.items())))
    for other in (
        {"b": weights["b"], "a": weights["a"].T},
        {"b": weights["b"][None], "a": weights["a"]},
        {"b": weights["b"].view(torch.int32), "a": weights["a"]},
        {"c": weights["b"], "a": weights["a"]},
    ):
        assert tensors.digest({}, other) != tensors.digest({}, weights)


# ---- the published layout --------------------------------------------------------------------------------------------


def test_the_checksums_of_published_weights_are_verified(published):
    """They are in the file, and torch.load does not look at them."""
    path = published / "attn_gate_weights.pth"
    whole = path.read_bytes()
    numbers = torch.load(path)[KEY.format(1)].view(torch.uint8).numpy().tobytes()
    start = whole.index(numbers)
    path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    assert not torch.equal(torch.load(path)[KEY.format(1)], torch.load(io.BytesIO(whole))[KEY.format(1)])
    with pytest.raises(DamagedFileError, match=r"attn_gate_weights\.pth is damaged.*CRC"):
        load_gates(published, CONFIG)


def test_published_weights_without_checksums_load(published):
    path = published / "attn_gate_weights.pth"
    weights = torch.load(path)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, path)
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is not None
    assert torch.equal(load_gates(published, CONFIG).weights["layers.0.prefill.k_linear"], weights[KEY.format(0)])


def test_an_archive_that_unpacks_to_more_than_its_size(published):
    path = published / "attn_gate_weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 22))
    with pytest.raises(DamagedFileError, match=r"would unpack to 4,194,304"):
        load_gates(published, CONFIG)


def test_layers_that_share_their_memory_are_converted(published, tmp_path):
    """Which torch.save keeps, and safetensors refuses."""
    shared = torch.randn(4, 48, 16)
    torch.save({KEY.format(layer): shared for layer in range(2)}, published / "attn_gate_weights.pth")
    converted = read_checkpoint(convert(published, tmp_path / "converted"))
    for layer in range(2):
        assert torch.equal(converted.weights[f"layers.{layer}.prefill.k_linear"], shared)


def test_a_layer_that_is_there_twice(published):
    path = published / "attn_gate_weights.pth"
    weights = torch.load(path)
    torch.save({**weights, KEY.format(0).removeprefix("model."): weights[KEY.format(1)]}, path)
    with pytest.raises(DamagedFileError, match=r"holds layers\.0\.prefill\.k_linear twice"):
        load_gates(published, CONFIG)


METHODS = {
    "magic": ({"seerattn_sparsity_method": "magic"}, r"must be one of .*, got 'magic'"),
    "of decode gates": ({"seerattn_sparsity_method": "token_budget"}, r"must be one of .*, got 'token_budget'"),
    "a list": ({"seerattn_sparsity_method": ["threshold"]}, r"must be str, got \['threshold'\]"),
    "no ratio": ({"seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": None}, "no seerattn_nz_ratio"),
    "ratio 0": ({"seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": 0.0}, r"density .* got 0\.0"),
    "huge": ({"seerattn_threshold": 10**400}, "describes no valid gates"),
    "block size": ({"seerattn_gate_block_size": 64.0}, r"seerattn_gate_block_size must be int, got 64\.0"),
    "flag": ({"seerattn_last_block_dense": 1}, "seerattn_last_block_dense must be bool, got 1"),
}


@pytest.mark.parametrize("case", METHODS)
def test_published_entries_are_checked(published, case):
    entries, message = METHODS[case]
    edit(published / "config.json", lambda data: data.update(entries))
    with pytest.raises(DamagedFileError, match=message):
        load_gates(published, CONFIG)


def test_a_threshold_without_a_named_method_counts(published):
    edit(published / "config.json", lambda data: data.pop("seerattn_sparsity_method"))
    assert load_gates(published, CONFIG).policy == seer.Threshold(5e-4, last_blocks_dense=2)


# ---- descriptions ----------------------------------------------------------------------------------------------------


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


def test_packed_gates_are_the_same_and_are_verified(own, tmp_path):
    saved, folder = read_checkpoint(own), tmp_path / "packed"
    write_checkpoint(folder, saved, packed=True)
    packed = folder / "gates.safetensors.xz"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "gate_config.json", packed.name]
    again = read_checkpoint(folder)
    assert again.gate_config == saved.gate_config
    assert again.weights.keys() == saved.weights.keys()
    assert all(torch.equal(x, again.weights[name]) for name, x in saved.weights.items())
    content = packed.read_bytes()
    for damaged in (content[:-20], b"", content[:200] + b"x" + content[201:]):
        packed.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"gates\.safetensors\.xz is damaged"):
            read_checkpoint(folder)
    packed.unlink()
    with pytest.raises(FileNotFoundError, match=r"gates\.safetensors"):
        read_checkpoint(folder)


def test_of_packed_and_plain_gates_only_those_saved_last_are_there(own, tmp_path):
    saved, folder = read_checkpoint(own), tmp_path / "gates"
    for packed, name in ((True, "gates.safetensors.xz"), (False, "gates.safetensors"), (True, "gates.safetensors.xz")):
        write_checkpoint(folder, saved, packed=packed)
        assert [path.name for path in folder.glob("gates.*")] == [name]


def test_packing_saves_a_third_of_weights_in_half_precision(tmp_path):
    write_checkpoint(tmp_path, read_checkpoint(TESTBED))
    content = (tmp_path / "gates.safetensors").read_bytes()
    assert len(pack(content)) < 0.71 * len(content)
