"""Gate configurations by phase: checked values, plain dicts, block sizes, forms that join."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from seerattention import DecodeGateConfig, GateConfig, PrefillGateConfig
from seerattention.config import FORMS, GateSpec
from seerattention.gates import PrefillGate, build_gate

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def test_the_published_decode_gate_is_the_default():
    config = DecodeGateConfig()
    assert (config.k_pooling, config.width, config.qk_norm, config.rope) == (("max", "min", "avg"), None, True, True)
    assert config.resolve(64).width == 64
    assert DecodeGateConfig(width=32).resolve(64).width == 32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 7}, ValueError, "width"),
        ({"width": 2.0}, TypeError, "width"),
        ({"k_pooling": ("mean",)}, ValueError, "k_pooling"),
        ({"k_pooling": "avg"}, TypeError, "k_pooling"),
        ({"qk_norm": 1}, TypeError, "qk_norm"),
        ({"rope": None}, TypeError, "rope"),
        ({"block_size": 48}, ValueError, "block_size"),
        ({"block_size": "64"}, TypeError, "block_size"),
        ({"k_pitch": 12}, ValueError, "k_pitch must be one of"),
        ({"k_pitch": 32, "block_size": 16}, ValueError, r"at most the block size \(16\), got 32"),
        ({"k_pitch": 8.0}, TypeError, "k_pitch"),
        ({"merge_heads": 0}, TypeError, "merge_heads"),
    ],
)
def test_bad_decode_gates(options, error, message):
    with pytest.raises(error, match=message):
        DecodeGateConfig(**options)


def test_each_phase_has_its_block_size():
    config = GateConfig(block_size=64, decode=DecodeGateConfig(block_size=16))
    assert (config.block_size_of("prefill"), config.block_size_of("decode")) == (64, 16)
    assert config.spec_of("prefill") == PrefillGateConfig(block_size=64)
    assert config.spec_of("decode") == config.decode
    own = GateConfig(block_size=64, prefill=PrefillGateConfig(block_size=128))
    assert (own.block_size_of("prefill"), own.block_size_of("decode")) == (128, 64)
    assert build_gate(own.spec_of("prefill"), **SHAPE).block_size == 128
    with pytest.raises(ValueError, match="no gate for 'decode', only for prefill"):
        own.spec_of("decode")
    with pytest.raises(ValueError, match="block_size must be one of"):
        PrefillGateConfig(block_size=16)
    with pytest.raises(ValueError, match="pass block_size"):
        build_gate(PrefillGateConfig(), **SHAPE)


@pytest.mark.parametrize(
    "config",
    [
        GateConfig(),
        GateConfig(block_size=32, prefill=PrefillGateConfig(width=8, block_size=64), decode=DecodeGateConfig()),
        GateConfig(prefill=None, decode=DecodeGateConfig(("avg",), 32, False, False, 16)),
        GateConfig(prefill=None, decode=DecodeGateConfig(k_pitch=8, merge_heads=False)),
    ],
)
def test_configs_go_through_json(config):
    data = json.loads(json.dumps(config.to_dict()))
    assert GateConfig.from_dict(data) == config
    for phase in config.phases:
        assert data[phase]["form"] == getattr(config, phase).form


def test_files_stay_as_they_were():
    """An older version reads them without a word, and a saved training state finds the gates that it was made with."""
    assert GateConfig().to_dict() == {
        "block_size": 64,
        "prefill": {
            "form": "paper",
            "k_pooling": ("max", "min", "avg"),
            "q_pooling": ("avg",),
            "width": None,
            "q_linear": None,
            "rope": True,
        },
        "decode": None,
    }
    assert DecodeGateConfig().to_dict() == {
        "form": "seerattention_r",
        "k_pooling": ("max", "min", "avg"),
        "width": None,
        "qk_norm": True,
        "rope": True,
    }
    assert GateConfig.from_dict({"block_size": 32, "prefill": {}, "decode": {}}) == GateConfig(
        32, decode=DecodeGateConfig()
    )


def test_a_spec_belongs_to_its_phase():
    with pytest.raises(TypeError, match=r"prefill must be a PrefillGateConfig .*got DecodeGateConfig"):
        GateConfig(prefill=DecodeGateConfig())
    with pytest.raises(TypeError, match=r"decode must be a DecodeGateConfig .*got PrefillGateConfig"):
        GateConfig(decode=PrefillGateConfig())
    with pytest.raises(ValueError, match=r"decode gate config: form must be one of \['seerattention_r'\], got 'paper'"):
        GateConfig.from_dict({"block_size": 64, "prefill": None, "decode": {"form": "paper"}})
    assert type(build_gate(DecodeGateConfig(), block_size=64, **SHAPE)).__name__ == "DecodeGate"


def test_a_form_of_gate_joins_by_being_defined(monkeypatch):
    """A spec and a module are all it takes: files, GateConfig and build_gate know it."""
    monkeypatch.setattr("seerattention.config.FORMS", forms := dict(FORMS))
    monkeypatch.setattr("seerattention.gates.FORMS", forms)

    @dataclass(frozen=True)
    class ToyGateConfig(GateSpec):
        form, phase, module = "toy", "prefill", f"{__name__}:ToyGate"
        slope: float = 1.0
        block_size: int | None = None

    config = GateConfig(block_size=32, prefill=ToyGateConfig(slope=2.0))
    assert GateConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    gate = build_gate(config.spec_of("prefill"), **SHAPE)
    assert isinstance(gate, ToyGate)
    assert (gate.block_size, gate.slope) == (32, 2.0)
    with pytest.raises(ValueError, match="the form 'toy' is that of ToyGateConfig"):

        class Other(GateSpec):
            form, phase, module = "toy", "prefill", None

    with pytest.raises(ValueError, match="phase must be one of"):

        class Third(GateSpec):
            form, phase, module = "third", "training", None


class ToyGate(PrefillGate):
    """Prefers near blocks by the slope of its config."""

    def __init__(self, config, **shape):
        super().__init__(PrefillGateConfig(), **shape)
        self.slope = config.slope
