"""Saving and loading gates: bit-exact, strict, atomic; and the published layout's reader and converter."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import seerattention as seer
from seerattention.hf import convert, gates_of, save
from seerattention.hf.state import state_of

FILES = {"gate_config.json", "gates.safetensors", "README.md"}


def attached(model, policy=None, **options):
    torch.manual_seed(3)
    return seer.attach(model, seer.GateConfig(block_size=32, **options), prefill=policy)


@pytest.fixture
def saved(model_of, tmp_path):
    """A folder of gates of the default tiny llama."""
    seer.save_gates(attached(model_of(), seer.TopK(0.25)), tmp_path / "gates")
    return tmp_path / "gates"


def edit_json(path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "gates.safetensors")
    change(weights)
    save_file(weights, folder / "gates.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", [{}, {"hidden_size": 32}, {"q_linear": True, "k_pooling": ("avg",), "rope": False}])
def test_round_trip_is_exact(model_of, tmp_path, family, dtype, form):
    model = model_of(family, dtype=dtype)
    if form.get("hidden_size") == 32:
        form = {"hidden_size": 2 * state_geometry(model)}
    config = seer.PrefillGateConfig(**form)
    attached(model, seer.TopP(0.9, last_blocks_dense=1), prefill=config)
    assert seer.save_gates(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == FILES
    again = seer.attach(model_of(family, dtype=dtype), tmp_path / "a" / "b")
    assert state_of(again).policy == seer.TopP(0.9, last_blocks_dense=1)
    assert state_of(again).gate_config == state_of(model).gate_config
    assert [gate is None for gate in gates_of(again)] == [gate is None for gate in gates_of(model)]
    for before, after in zip(*(filter(None, gates_of(each)) for each in (model, again)), strict=True):
        assert after.k_linear.dtype == dtype
        assert before.state_dict().keys() == after.state_dict().keys()
        for name, value in before.state_dict().items():
            assert torch.equal(value, after.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", [{}, {"share_keys": False, "k_pitch": 4, "reduce": "mass", "rope": False}])
def test_round_trip_of_sub_block_gates_is_exact(model_of, tmp_path, dtype, form):
    model = attached(model_of(dtype=dtype), prefill=seer.SubBlockGateConfig(**form))
    seer.save_gates(model, tmp_path)
    again = seer.attach(model_of(dtype=dtype), tmp_path)
    assert state_of(again).gate_config == state_of(model).gate_config
    for before, after in zip(gates_of(model), gates_of(again), strict=True):
        assert type(after) is type(before)
        assert (after.q_pitch, after.k_pitch, after.reduce) == (before.q_pitch, before.k_pitch, before.reduce)
        assert all(torch.equal(x, after.state_dict()[name]) for name, x in before.state_dict().items())
    ids = torch.arange(130)[None] % 90
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def state_geometry(model) -> int:
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads


def test_a_given_policy_wins_over_the_stored_one(model_of, saved):
    model = seer.attach(model_of(), str(saved), prefill=seer.TopK(0.5))
    assert state_of(model).policy == seer.TopK(0.5)


def test_an_existing_folder_is_replaced(model_of, saved):
    (saved / "notes.txt").write_text("mine")
    model = model_of()
    torch.manual_seed(99)
    seer.attach(model, seer.GateConfig())
    seer.save_gates(model, saved)
    assert {path.name for path in saved.iterdir()} == FILES | {"notes.txt"}
    assert torch.equal(gates_of(seer.attach(model_of(), saved))[1].k_linear, gates_of(model)[1].k_linear)


def test_files_describe_themselves(saved):
    data = json.loads((saved / "gate_config.json").read_text())
    assert data["format_version"] == 1
    assert data["base_model"]["model_type"] == "llama"
    assert data["base_model"]["rope_theta"] == 10000.0
    assert data["policies"] == {"prefill": {"kind": "top_k", "density": 0.25, "last_blocks_dense": 0, "uniform": False}}
    assert "seer.attach" in (saved / "README.md").read_text()
    assert (saved / "gates.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


OTHER_MODELS = {
    "heads": ("num_attention_heads", {"num_attention_heads": 8}),
    "kv_heads": ("num_key_value_heads", {"num_key_value_heads": 4}),
    "head_dim": ("head_dim", {"head_dim": 32}),
    "layers": ("num_hidden_layers", {"num_hidden_layers": 3}),
    "theta": ("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_another_base_model_is_refused(model_of, saved, case):
    field, options = OTHER_MODELS[case]
    with pytest.raises(ValueError, match=rf"different base model.*{field}"):
        seer.attach(model_of(**options), saved)


def test_another_family_is_refused(model_of, saved):
    with pytest.raises(ValueError, match=r"model_type: the gates are for llama, the model has qwen2"):
        seer.attach(model_of("qwen2"), saved)


DAMAGE = {
    "missing": (lambda w: w.pop("layers.1.prefill.k_linear"), r"missing: layers\.1\.prefill\.k_linear"),
    "unexpected": (lambda w: w.update(extra=torch.ones(2)), r"unexpected: extra"),
    "shape": (
        lambda w: w.update({"layers.0.prefill.k_linear": torch.ones(4, 48, 8)}),
        r"layers\.0\.prefill\.k_linear: \(4, 48, 8\) in the file, \(4, 48, 16\) expected",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_weights_that_do_not_fit_are_listed(model_of, saved, case):
    change, message = DAMAGE[case]
    edit_weights(saved, change)
    with pytest.raises(ValueError, match=message):
        seer.attach(model_of(), saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(model_of, saved, keep):
    path = saved / "gates.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"gates\.safetensors is damaged"):
        seer.attach(model_of(), saved)


def test_damaged_descriptions(model_of, saved):
    path = saved / "gate_config.json"
    original = path.read_text()
    cases = [
        (lambda data: data.pop("gates"), "lacks"),
        (lambda data: data.update(format_version=3), "format_version 3"),
        (lambda data: data["gates"].update(block_size=48), "block_size"),
        (lambda data: data["gates"].pop("prefill"), "prefill"),
        (lambda data: data["policies"]["prefill"].update(kind="magic"), "magic"),
        (lambda data: data["policies"].pop("prefill"), "no valid gates"),
    ]
    for change, message in cases:
        path.write_text(original)
        edit_json(path, change)
        with pytest.raises(ValueError, match=message):
            seer.attach(model_of(), saved)
    path.write_text(original[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        seer.attach(model_of(), saved)
    path.write_text(original)
    edit_json(path, lambda data: data["gates"].update(colour="red"))
    with pytest.warns(UserWarning, match="colour"):
        seer.attach(model_of(), saved)


def test_missing_files(model_of, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no gates"):
        seer.attach(model_of(), tmp_path / "empty")
    (saved / "gates.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"gates\.safetensors"):
        seer.attach(model_of(), saved)


def test_a_crash_while_writing_leaves_the_old_file(model_of, saved, monkeypatch):
    before = (saved / "gates.safetensors").read_bytes()
    model = attached(model_of())
    with torch.no_grad():
        gates_of(model)[0].k_linear.zero_()

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(save.os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        seer.save_gates(model, saved)
    assert (saved / "gates.safetensors").read_bytes() == before
    assert {path.name for path in saved.iterdir()} == FILES


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_two_files_never_mixes_two_saves(model_of, saved, monkeypatch, renames, caplog):
    """Same shapes, another block size and policy: nothing but the order of the renames tells old from new."""
    model = model_of()
    torch.manual_seed(4)
    seer.attach(model, seer.GateConfig(block_size=64), prefill=seer.TopK(0.5))
    done, replace = [], os.replace

    def killed(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            seer.save_gates(model, saved)

    loaded = seer.attach(model_of(), saved)
    state = state_of(loaded)
    assert torch.equal(gates_of(loaded)[0].k_linear, gates_of(model)[0].k_linear)
    assert (state.block_size, state.policy) == (64, seer.TopK(0.5))
    assert ("not of the same save" in caplog.text) == (renames == 1)
    seer.save_gates(loaded, saved)
    assert {path.name for path in saved.iterdir()} == FILES


def test_a_hand_edited_policy_counts(model_of, saved):
    edit_json(saved / "gate_config.json", lambda data: data["policies"].update(prefill={"kind": "dense"}))
    assert state_of(seer.attach(model_of(), saved)).policy == seer.Dense()


def test_equal_gates_give_equal_files(model_of, saved, tmp_path):
    seer.save_gates(seer.attach(model_of(), saved), tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_gates_that_are_not_finite_are_neither_saved_nor_loaded(model_of, saved, tmp_path):
    model = attached(model_of())
    with torch.no_grad():
        gates_of(model)[1].k_linear[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite: layers\.1\.prefill\.k_linear"):
        seer.save_gates(model, tmp_path / "gates")
    edit_weights(saved, lambda weights: weights["layers.0.prefill.k_linear"].fill_(float("inf")))
    with pytest.raises(ValueError, match=r"not finite: layers\.0\.prefill\.k_linear"):
        seer.attach(model_of(), saved)


def test_saving_needs_no_installed_package(model_of, tmp_path, monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    seer.save_gates(attached(model_of()), tmp_path / "gates")
    data = json.loads((tmp_path / "gates" / "gate_config.json").read_text())
    assert data["package_version"] == seer.__version__


def test_gates_that_are_not_in_memory_are_not_saved(model_of, tmp_path):
    model = attached(model_of())
    gates_of(model)[1].to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.prefill\.k_linear"):
        seer.save_gates(model, tmp_path / "gates")
    assert not (tmp_path / "gates").exists()


def test_a_selector_alone_has_nothing_to_save(model_of, tmp_path):
    model = seer.attach(model_of(), selector=lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="no gates"):
        seer.save_gates(model, tmp_path)


def published(model, folder, *, weights=None, **fields):
    """A folder of the published layout for this model."""
    folder.mkdir()
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.update(
        base_model="owner/base",
        seerattn_gate_block_size=64,
        seerattn_gate_hidden_size=16,
        seerattn_gate_type="Qavg_Kmaxminavg",
        seerattn_sparsity_method="threshold",
        seerattn_threshold=5e-4,
        seerattn_last_block_dense=True,
    )
    config.update(fields)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if weights is None:
        torch.manual_seed(0)
        key = "model.layers.{}.self_attn.attn_gate.mask_linear_k.weight"
        weights = {key.format(layer): torch.randn(4, 48, 16, dtype=torch.bfloat16) for layer in range(2)}
    torch.save(weights, folder / "attn_gate_weights.pth")
    return weights


POLICIES = {
    "threshold": ({}, seer.Threshold(5e-4, last_blocks_dense=2)),
    "placeholder": ({"seerattn_threshold": 0.0}, seer.Threshold(2e-3, last_blocks_dense=2)),
    "nz_ratio": (
        {"seerattn_sparsity_method": "nz_ratio", "seerattn_nz_ratio": 0.3, "seerattn_last_block_dense": False},
        seer.TopK(0.3, uniform=True),
    ),
    "nothing": (
        {"seerattn_sparsity_method": None, "seerattn_threshold": None, "seerattn_last_block_dense": None},
        seer.Threshold(2e-3),
    ),
}


@pytest.mark.parametrize("case", POLICIES)
def test_published_policies(model_of, tmp_path, case):
    fields, policy = POLICIES[case]
    published(model_of(), tmp_path / "gate", **fields)
    assert state_of(seer.attach(model_of(), tmp_path / "gate")).policy == policy


def test_published_weights_and_conversion_keep_their_bits(model_of, tmp_path):
    model = model_of(dtype=torch.bfloat16)
    weights = published(model, tmp_path / "gate")
    convert(tmp_path / "gate", tmp_path / "converted")
    for folder in ("gate", "converted"):
        twin = seer.attach(model_of(dtype=torch.bfloat16), tmp_path / folder)
        for gate, expected in zip(gates_of(twin), weights.values(), strict=True):
            assert torch.equal(gate.k_linear, expected)
    description = json.loads((tmp_path / "converted" / "gate_config.json").read_text())
    assert description["base_model"]["name"] == "owner/base"


def test_published_folders_that_cannot_be_read(model_of, tmp_path):
    model = model_of()
    decode = {"model.layers.0.self_attn.attn_gate.attngate_linear_q.weight": torch.ones(2, 2, 16, 16)}
    published(model, tmp_path / "decode", weights=decode, seerattn_gate_type=None)
    with pytest.raises(ValueError, match=r"missing: layers\.0\.decode\.k_linear"):
        seer.attach(model, tmp_path / "decode")
    published(model, tmp_path / "both", seerattn_q_head_pooling_type="Qproj")
    with pytest.raises(ValueError, match="unexpected keys"):
        seer.attach(model, tmp_path / "both")
    published(model, tmp_path / "stray", weights={"lm_head.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"unexpected keys: lm_head\.weight"):
        seer.attach(model, tmp_path / "stray")
    published(model, tmp_path / "type", seerattn_gate_type="Qsum_Kavg")
    with pytest.raises(ValueError, match="Qsum_Kavg"):
        seer.attach(model, tmp_path / "type")
    published(model, tmp_path / "cut")
    path = tmp_path / "cut" / "attn_gate_weights.pth"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"attn_gate_weights\.pth is damaged"):
        seer.attach(model, tmp_path / "cut")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="attn_gate_weights"):
        seer.attach(model, tmp_path / "cut")
    published(model_of(num_key_value_heads=4), tmp_path / "other")
    with pytest.raises(ValueError, match="num_key_value_heads"):
        seer.attach(model, tmp_path / "other")


def test_a_pickle_with_code_is_refused(model_of, tmp_path):
    model = model_of()
    published(model, tmp_path / "gate", weights={"x": os.system})
    with pytest.raises(ValueError, match="more than tensors"):
        seer.attach(model, tmp_path / "gate")


def test_only_the_published_layout_is_converted(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no published"):
        convert(saved, tmp_path / "out")
