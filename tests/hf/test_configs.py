"""Config objects have other owners than an attached model: they stay the same objects, and get back what they said."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import seerattention as seer
from seerattention.hf.implementation import StandIn, configs_of
from tiny_models import attach, logits_of, make_vlm


@pytest.fixture
def vlm():
    return make_vlm()


@pytest.fixture
def picture(ids_of):
    """A prompt with a picture in it."""
    torch.manual_seed(2)
    ids = torch.cat((torch.full((1, 4), 96), ids_of(120).clamp(max=90)), dim=1)
    return {"ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}


def implementations(model):
    return {config._attn_implementation for config in configs_of(model)}


def test_every_part_keeps_its_config_object(vlm):
    before = [module.__dict__.get("config") for module in vlm.modules()]
    attach(vlm)
    assert all(now is was for now, was in zip((m.__dict__.get("config") for m in vlm.modules()), before, strict=True))
    assert vlm.config.text_config is vlm.model.language_model.config
    seer.detach(vlm)
    assert all(now is was for now, was in zip((m.__dict__.get("config") for m in vlm.modules()), before, strict=True))
    assert implementations(vlm) == {"sdpa"}


def test_edits_of_a_part_are_obeyed(vlm, ids_of):
    attach(vlm)
    vlm.config.text_config.use_cache = False
    with torch.no_grad():
        assert vlm(ids_of(100).clamp(max=90)).past_key_values is None
    seer.detach(vlm)
    assert vlm.config.text_config.use_cache is False


@pytest.mark.parametrize("whole", [False, True])
def test_what_the_warning_advises_works_and_leaves_nothing(vlm, picture, whole):
    """For one part and for the whole model; the picture tower then goes on with what it came with."""
    expected = logits_of(vlm, **picture)
    attach(vlm, seer.TokenBudget(32))
    sparse = logits_of(vlm, **picture)
    vlm.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match=r"'eager'.*set_attn_implementation\('seer'\)"):
        torch.testing.assert_close(logits_of(vlm, **picture), expected, rtol=1e-4, atol=1e-4)
    vlm.set_attn_implementation("seer" if whole else {"text_config": "seer"})
    for _ in range(2):
        torch.testing.assert_close(logits_of(vlm, **picture), sparse, rtol=1e-4, atol=1e-4)
    vlm.set_attn_implementation("seer")
    seer.detach(vlm)
    assert "seer" not in implementations(vlm)
    vlm.set_attn_implementation("sdpa")
    assert torch.equal(logits_of(vlm, **picture), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_made_from_the_config_of_an_attached_one(model_of, ids_of, implementation):
    """From the object, a copy, and as transformers does it; with padding, where the mask counts."""
    model, ids, mask = model_of(attn_implementation=implementation), ids_of(150, batch=2), torch.ones(2, 150)
    mask[0, :50] = 0
    second = model_of(attn_implementation=implementation, seed=1)
    expected = logits_of(second, ids), logits_of(second, ids, attention_mask=mask)
    weights = second.state_dict()
    attach(model, seer.TokenBudget(32))
    for config in (model.config, copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        for make in (type(model), AutoModelForCausalLM.from_config):
            other = make(config).eval()
            other.load_state_dict(weights)
            assert torch.equal(logits_of(other, ids), expected[0])
            assert torch.equal(logits_of(other, ids, attention_mask=mask), expected[1])
    with seer.record(model) as stats:
        logits_of(model, ids)
    assert stats.sparse_calls == 2


@pytest.mark.parametrize("first_goes_first", [False, True])
def test_a_config_says_seer_as_long_as_one_model_needs_it(model_of, ids_of, first_goes_first):
    first, ids = model_of(), ids_of(150)
    second = type(first)(first.config).eval()
    expected = logits_of(first, ids), logits_of(second, ids)
    attach(first, seer.TokenBudget(32))
    attach(second, seer.TokenBudget(32))
    sparse = logits_of(first, ids), logits_of(second, ids)
    models, order = (first, second), (0, 1) if first_goes_first else (1, 0)
    gone, left = order
    seer.detach(models[gone])
    assert torch.equal(logits_of(models[gone], ids), expected[gone])
    assert torch.equal(logits_of(models[left], ids), sparse[left])
    seer.detach(models[left])
    assert first.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(models[left], ids), expected[left])


def test_a_copy_of_a_model_has_a_config_of_its_own(model_of, ids_of):
    model, ids = attach(model_of(), seer.TokenBudget(32)), ids_of(150)
    sparse = logits_of(model, ids)
    twin = copy.deepcopy(model)
    seer.detach(twin)
    assert (twin.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "seer")
    assert torch.equal(logits_of(model, ids), sparse)
    twin = copy.deepcopy(model)
    seer.detach(model)
    assert (twin.config._attn_implementation, model.config._attn_implementation) == ("seer", "sdpa")
    assert torch.equal(logits_of(twin, ids), sparse)


def test_seer_without_gates_is_an_error(model_of, ids_of):
    model = attach(model_of())
    seer.detach(model)
    model.set_attn_implementation("seer")
    for length in (1, 100):
        with pytest.raises(ValueError, match="no gates are attached"):
            logits_of(model, ids_of(length))
    with pytest.raises(ValueError, match="no gates are attached"):
        attach(model)
    model.set_attn_implementation("sdpa")
    logits_of(model, ids_of(100))


def test_an_attach_that_fails_gives_the_config_back(model_of, monkeypatch):
    model = model_of()
    monkeypatch.setattr(type(model.model), "register_forward_hook", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach(model)
    monkeypatch.undo()
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_name_is_not_written_to_disk(model_of, tmp_path):
    model = attach(model_of())
    model.save_pretrained(tmp_path)
    assert "seer" not in (tmp_path / "config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transformers_sees_the_kind_of_implementation_that_is_stood_in_for():
    """It asks for parts of the name, for example whether static caches need their mask."""
    assert "flash" in StandIn("flash_attention_2")
    assert "flash" not in StandIn("sdpa")
    assert StandIn("sdpa") == "seer"
