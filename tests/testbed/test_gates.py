"""Gates of either phase by the recipe: what they are trained on, the commands, and what is written."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from testbed.__main__ import app
from testbed.distil import LIST_CUE, RECIPES, TaskBatches, read_books, recipe
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import seerattention as seer
from seerattention.cli import common
from seerattention.distillation.saved import STATE_FILE, load_state
from seerattention.gates.checkpoint import read_checkpoint
from seerattention.gates.sources import stored_budgets

LENGTH = 512


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return AutoTokenizer.from_pretrained(prepared)


@pytest.fixture(scope="module")
def books(prepared, tokenizer):
    return read_books([prepared / "train.u16"], tokenizer, LENGTH, "train", 10_000)


@pytest.fixture(scope="module")
def model(prepared, tokenizer, tmp_path_factory):
    """A random model with the words of the prepared run."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sequences(tokenizer, books, split="train", **options):
    batches = TaskBatches(tokenizer, books, LENGTH, 4, 30, split=split, seed=5, **options)
    return np.concatenate([batch["input_ids"].numpy() for batch in batches])


def ends_with_a_list(sequence):
    """Whether as many tokens as the shortest list has, with what asks for it, stood before."""
    tail = sequence[-(LIST_CUE + 24) :]
    seen = np.lib.stride_tricks.sliding_window_view(sequence[: -len(tail)], len(tail))
    return bool((seen == tail).all(-1).any())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_share_of_the_sequences_ends_with_a_list(tokenizer, books, split):
    ended = [ends_with_a_list(row) for row in sequences(tokenizer, books, split, lists=0.25)]
    assert len(ended) == 120
    assert 0.25 - 0.16 < np.mean(ended) < 0.25 + 0.2  # four standard errors, and copies of the training mix
    assert all(ends_with_a_list(row) for row in sequences(tokenizer, books, split, lists=1.0))
    plain = [ends_with_a_list(row) for row in sequences(tokenizer, books, split)]
    assert np.mean(plain) < 0.05
    again = TaskBatches(tokenizer, books, LENGTH, 4, 2, lists=0.25, split=split, seed=5)
    first, second = ([batch["input_ids"] for batch in again] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_of_lists(tokenizer, books, share):
    with pytest.raises(ValueError, match="lists must be a share from 0 to 1"):
        TaskBatches(tokenizer, books, LENGTH, 4, 2, lists=share, split="train", seed=5)
    with pytest.raises(ValueError, match="lists must be a share from 0 to 1"):
        recipe("decode", lists=share)


def test_books_are_token_files_texts_or_those_of_the_package(prepared, tokenizer, tmp_path):
    text = " ".join(seer.testbed.book_texts("train")[0][:4000].split())
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    both = read_books([tmp_path / "text.jsonl", prepared / "train.u16"], tokenizer, LENGTH, "train", 10_000)
    assert len(both) == 3
    assert tokenizer.decode(both[-1]) == text
    own = read_books(None, tokenizer, LENGTH, "test", 5000)
    assert tokenizer.decode(own[0][:50]) in seer.testbed.book_texts("test")[0]
    with pytest.raises(FileNotFoundError):
        read_books([tmp_path / "nothing.jsonl"], tokenizer, LENGTH, "train", 10_000)


def run_gates(*arguments):
    return CliRunner().invoke(app, ["gates", *map(str, arguments)])


@pytest.mark.parametrize(
    ("phase", "form", "config"),
    [
        (
            "decode",
            "sub_block",
            seer.GateConfig(prefill=None, decode=seer.DecodeGateConfig(k_pitch=8, merge_heads=False, query_window=8)),
        ),
        ("decode", "paper", seer.GateConfig(prefill=None, decode=seer.DecodeGateConfig())),
        ("prefill", "sub_block", seer.GateConfig(prefill=seer.SubBlockGateConfig())),
        (
            "prefill",
            "mass",
            seer.GateConfig(prefill=seer.SubBlockGateConfig(q_pitch=4, k_pitch=4, reduce="mass")),
        ),
    ],
)
def test_gates_of_a_phase(model, prepared, tmp_path, phase, form, config):
    result = run_gates(
        "--model", model, "--books", prepared / "train.u16", "--held-out", prepared / "train.u16", "--out",
        tmp_path / "gates", "--phase", phase, "--form", form, "--steps", 3, "--length", LENGTH, "--batch-size", 2,
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    history = json.loads((tmp_path / "gates" / "history.json").read_text())
    assert history["run"] == {
        **{name: getattr(RECIPES[phase], name) for name in ("rate", "rows", "lists", "phase", "templates", "seed")},
        "target": "max", "steps": 3, "length": LENGTH, "batch_size": 2, "device": "cpu", "form": form,
    }  # fmt: skip
    assert history["tokens"] == 3 * 2 * LENGTH
    assert len(history["loss"]) == 3
    assert history["recall_steps"] == [0, 3]
    saved = read_checkpoint(tmp_path / "gates")
    assert saved.gate_config == config
    assert stored_budgets(tmp_path / "gates") is None
    if phase == "decode":
        assert saved.decode_policy == seer.TokenBudget(1600)
    else:
        assert saved.policy == seer.TopK(0.1)
    loaded = LlamaForCausalLM.from_pretrained(model)
    loaded.config._name_or_path = seer.testbed.NAME
    seer.attach(loaded, tmp_path / "gates", min_context=0)


def test_gates_of_long_prompts_get_budgets(model, prepared, tmp_path):
    """As ``seer distill`` gives them; prompts below 4,096 tokens (the test above) are too short for any."""
    result = run_gates(
        "--model", model, "--books", prepared / "train.u16", "--held-out", prepared / "train.u16", "--out", tmp_path,
        "--steps", 1, "--length", 4096, "--batch-size", 1, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    budgets = stored_budgets(tmp_path)
    assert budgets is not None
    assert budgets.tokens == 4096
    assert 0.1 in budgets.densities


def test_a_stopped_run_goes_on_and_ends_with_the_same_gates(model, prepared, tmp_path):
    arguments = (
        "--model", model, "--books", prepared / "train.u16", "--held-out", prepared / "train.u16", "--phase", "decode",
        "--steps", 4, "--length", LENGTH, "--batch-size", 1, "--device", "cpu", "--out",
    )  # fmt: skip

    @contextmanager
    def pressing(terminal, what, total):
        """Ctrl-C after the second step."""
        done = []
        yield lambda count: (done.append(count), signal.raise_signal(signal.SIGINT) if sum(done) == 2 else None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Terminal, "progress", pressing)
        assert run_gates(*arguments, tmp_path / "stopped").exit_code != 0
    assert load_state(tmp_path / "stopped" / STATE_FILE)[1]["step"] == 2
    assert not (tmp_path / "stopped" / "gates.safetensors").exists()
    other = run_gates(*arguments, tmp_path / "stopped", "--lists", 0.5)
    assert "lists: was 0.25, now 0.5" in str(other.exception)
    for name in ("stopped", "whole"):
        result = run_gates(*arguments, tmp_path / name)
        assert result.exit_code == 0, result.output
    stopped, whole = (read_checkpoint(tmp_path / name).weights for name in ("stopped", "whole"))
    assert stopped.keys() == whole.keys()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_the_recipes():
    """The settings of the runs whose gates the package has."""
    found = RECIPES["decode"]
    assert (found.steps, found.length, found.batch_size, found.rows, found.rate) == (300, 16384, 4, 0.125, 3e-3)
    assert (found.lists, found.seed, found.form) == (0.25, 0, "sub_block")
    found = RECIPES["prefill"]
    assert (found.steps, found.length, found.batch_size, found.rows, found.rate) == (200, 16384, 8, 0.25, 8e-3)
    assert (found.lists, found.form) == (0.0, "mass")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--phase", "both"), "phase must be one of prefill, decode, got 'both'"),
        (("--phase", "decode", "--form", "fine"), "form must be one of sub_block, paper, got 'fine'"),
        (("--phase", "decode", "--lists", 2), "lists must be a share from 0 to 1, got 2.0"),
    ],
)
def test_wrong_options(tmp_path, arguments, sentence):
    result = run_gates("--out", tmp_path / "gates", *arguments)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert sentence in said
    assert arguments[-2] in said
    assert not (tmp_path / "gates").exists()
