"""``benchmarks.predictors``: its statistics by their definitions, and a whole run on a tiny random model."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from benchmarks.predictors import (
    correlations,
    in_order,
    main,
    permutation,
    ranks,
    repeated,
    spearman,
    spearman_interval,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from seerattention import testbed
from seerattention.measure import RECALLS


def test_ranks_and_their_correlation():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    y = np.array([2.0, 1.0, 4.0, 3.0, 5.0])  # without ties: 1 - 6 sum of squares / (n (n^2 - 1))
    assert spearman(x, y) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman(x, np.ones(5)) == 0
    low, high = spearman_interval(x, np.exp(x))
    assert low == high == pytest.approx(1)


def test_permutation_against_all_orders():
    x, y = np.arange(6.0), np.array([1.0, 0.0, 3.0, 2.0, 4.0, 5.0])
    found = abs(spearman(x, y))
    every = [abs(spearman(x, np.array(order))) >= found - 1e-12 for order in itertools.permutations(y)]
    assert permutation(x, y) == pytest.approx(np.mean(every), abs=0.01)
    assert permutation(x, np.array([3.0, 1.0, 2.0, 2.0, 1.0, 3.0])) > 0.9


def test_pairs_of_like_density():
    density = np.array([0.1, 0.11, 0.2, 0.1])
    score = np.array([0.5, 0.8, 0.1, 0.52])  # the last is too near to the first to tell
    assert in_order(np.array([1.0, 2.0, 9.0, 3.0]), score, density) == (1.0, 2)
    assert in_order(np.array([1.0, 1.0, 9.0, 0.0]), score, density) == (1.5, 2)


def test_what_predicts_stands_first():
    rng = np.random.default_rng(0)
    cells = []
    for place in range(12):
        score = place / 12
        numbers = {"good": score**2, "noise": float(rng.random()), "unknown": None}
        metrics = {"density": 0.1 + 0.001 * (place % 2), "score": score, "tasks": {"one": score}}
        cells.append({"metrics": metrics, "numbers": numbers})
    table = correlations(cells)
    assert table.rows[0][0] == "good"
    assert "unknown" not in {row[0] for row in table.rows}
    assert table.rows[0][-1] == "100 %"
    assert table.rows[0][2] == "1.000"


def test_documents_that_repeat():
    documents = torch.arange(2 * 2048).view(2, 2048)
    made = repeated(documents)
    assert torch.equal(made[:, :1024], documents[:, :1024])
    for document, source in zip(made, documents, strict=True):
        assert set(document[1024:].tolist()) <= set(source[1:1024].tolist())
        for start in range(1024, 2048, 192):
            passage = document[start : start + 192]
            assert torch.equal(passage.diff(), torch.ones_like(passage[1:]))
    assert len({int(made[0, start]) for start in range(1024, 2048, 192)}) > 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the testbed's words."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = "".join(json.dumps({"text": text[:60_000]}) + "\n" for text in testbed.book_texts("test")[:3])
    (folder / "books.jsonl").write_text(texts)
    return folder


def test_a_whole_run(folder, tmp_path, capsys):
    options = ["--device", "cpu", "--tiny", "--model", str(folder), "--data", str(folder / "books.jsonl")]
    options += ["--label", "random", "--tasks", "multikey", "niah_single_2", "--fresh", "sub_block_shared"]
    options += ["--rules", "top-k 0.1", "0.2"]
    assert main([*options, "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    (run,) = json.loads((tmp_path / "predictors.json").read_text())["runs"]
    cells = run["results"]
    named = {(cell["case"]["scores"], cell["case"]["rule"]) for cell in cells}
    assert {("sub_block_shared, fresh", "top-k 0.1"), ("paper, 2 steps", "top-k 0.1"), ("random", "0.2")} <= named
    wanted = {f"{kind}/{name}" for kind in ("books", "repeated", "tasks") for name in RECALLS}
    for cell in cells:
        assert cell["case"]["model"] == "random"
        assert set(cell["numbers"]) == wanted | {"repeated/copied", "books/minus loss"}
        assert set(cell["metrics"]["tasks"]) == {"multikey", "niah_single_2"}
        assert 0 < cell["metrics"]["density"] <= 1
    by_name = {(cell["case"]["scores"], cell["case"]["rule"]): cell["numbers"] for cell in cells}
    drawn, true = by_name["random", "0.2"], by_name["true map", "top-k 0.1"]
    assert drawn["books/best"] < true["books/best"]

    assert main(["--read", str(tmp_path / "predictors.json")]) == 0
    shown = capsys.readouterr()
    assert f"random: {len(cells)} cells" in shown.err
    assert "books/look_up" in shown.out


@pytest.mark.parametrize("wrong", [["--train", "paper"], ["--train", "other:3"], ["--gates", "folder"]])
def test_options(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu", *wrong])
    assert "takes" in capsys.readouterr().err
