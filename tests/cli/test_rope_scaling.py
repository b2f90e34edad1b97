"""``--rope-scaling``: a model beyond the length that it was made for, dense and with its gates."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import seerattention as seer
from seerattention.cli.opening import load_model, scaled_config
from seerattention.cli.options import parse_rope_scaling


@pytest.mark.parametrize("text", ["yarn", "yarn:", "yarn:1", "yarn:nan", "yarn:inf", "llama3:2", "2", "", "yarn:2:3"])
def test_what_is_no_scaling(text):
    with pytest.raises(ValueError, match=r"--rope-scaling is one of yarn, linear, dynamic .*, got "):
        parse_rope_scaling(text)


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_the_table_is_that_of_a_model_whose_config_says_so(kind, folder, tmp_path):
    model, _ = load_model(str(folder / "model"), "cpu", "float32", parse_rope_scaling(f"{kind}:2"))
    config = AutoConfig.from_pretrained(folder / "model")
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": kind,
        "factor": 2.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }
    length = 2 * config.max_position_embeddings
    if kind != "dynamic":
        config.max_position_embeddings = length
    wanted = AutoModelForCausalLM.from_pretrained(folder / "model", config=config, dtype=torch.float32).eval()
    position_ids, x = torch.arange(length)[None], torch.zeros(1, 1, 1)
    plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    found, expected, other = (m.model.rotary_emb(x, position_ids) for m in (model, wanted, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], other[0])
    assert model.config.max_position_embeddings == config.max_position_embeddings


def test_gates_decide_by_the_stretched_table():
    """All blocks: what dense attention gives; and what is chosen follows the table."""
    config = scaled_config("testbed", "yarn", 2.0)
    model, tokenizer = seer.testbed.load("cpu", torch.float32, config=config)
    assert config.max_position_embeddings == 2 * 32768
    ids = tokenizer(seer.testbed.book_texts("test")[0], return_tensors="pt").input_ids[:, :1024]
    with torch.inference_mode():
        dense = model(ids).logits
        seer.attach(model, seer.testbed.gates_path(), prefill=seer.TopK(1.0), min_context=0)
        everything = model(ids).logits
        seer.set_policy(model, seer.TopK(0.3))
        sparse = model(ids).logits
        seer.detach(model)
        plain, _ = seer.testbed.load("cpu", torch.float32)
        unscaled = plain(ids).logits
    assert (everything - dense).norm() < 1e-4 * dense.norm()
    assert (sparse - dense).norm() > 1e-3 * dense.norm()
    assert (unscaled - dense).norm() > 1e-3 * dense.norm()


def test_eval_says_what_was_scaled_and_measures_beyond_the_length(seer_command, folder, tmp_path):
    options = [
        "eval", "--model", folder / "model", "--gates", folder / "gates", "--data", folder / "text.txt", "--device",
        "cpu", "--measure", "perplexity", "--lengths", "768", "--densities", "0.5", "--documents", 1, "--json",
    ]  # fmt: skip
    plain = seer_command(*options, "--output", tmp_path)
    scaled = seer_command(*options, "--output", tmp_path, "--rope-scaling", "yarn:4")
    assert (plain.exit_code, scaled.exit_code) == (0, 0), plain.stderr + scaled.stderr
    before, after = json.loads(plain.stdout), json.loads(scaled.stdout)
    assert "rope scaling" not in before
    assert after["rope scaling"] == ["yarn", 4.0]
    # The same folder: results of the other model are not taken for this one's.
    assert before["perplexity"][0]["last_quarter"] != after["perplexity"][0]["last_quarter"]
    assert [item["length"] for item in after["perplexity"]] == [768, 768]


def test_models_that_cannot_be_scaled(seer_command, folder, tmp_path):
    config = AutoConfig.from_pretrained(folder / "model")
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}
    config.save_pretrained(tmp_path / "scaled")
    with pytest.raises(ValueError, match=r"is scaled already \(linear\)"):
        scaled_config(str(tmp_path / "scaled"), "yarn", 2.0)
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="needs a model with one rotary embedding"):
        scaled_config(str(tmp_path / "layers"), "yarn", 2.0)
    result = seer_command("eval", "--model", folder / "model", "--rope-scaling", "ntk:2")
    assert result.exit_code != 0
    assert "--rope-scaling is one of yarn" in result.stderr
