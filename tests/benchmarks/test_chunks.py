"""``benchmarks.chunks``: its numbers by their definitions, and a whole run on the embedded model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from benchmarks.chunks import Read, document_losses, main, make_prompts, metrics_of
from transformers import AutoTokenizer

from seerattention import testbed
from seerattention.tasks import TaskGenerator


def test_numbers_of_a_case():
    def read(said, losses):
        answers = {"single": np.array(said), "multikey": np.array(said)}
        right = {task: (array == 1).all(-1) for task, array in answers.items()}
        return Read(answers, right, np.array(losses), (0.1, 0.2), 1.0)

    one_shot = read([[1, 1], [1, 2], [1, 1], [1, 1]], [3.0, 3.2])
    found = metrics_of(read([[1, 1], [1, 3], [1, 2], [1, 1]], [3.1, 3.0]), one_shot)
    assert found["single_accuracy"] == 0.5
    assert found["single_same_answers"] == found["same_answers"] == 0.5  # both wrong, and not the same
    assert found["loss_points"] == found["single_loss_points"] == 25
    assert found["loss_standard_error"] < found["single_loss_standard_error"]  # of twice as many
    assert found["perplexity"] == pytest.approx(np.exp(3.05))
    assert found["perplexity_ratio"] == pytest.approx(np.exp(-0.05))
    assert found["largest_difference_of_a_document"] == pytest.approx(0.2)
    assert (found["density"], found["density_documents"]) == (0.1, 0.2)


def test_prompts_have_one_length_and_hold_what_is_asked():
    tokenizer = AutoTokenizer.from_pretrained(testbed.model_path())
    book = np.array(tokenizer(testbed.book_texts("test")[0][:30_000], add_special_tokens=False)["input_ids"])
    for task in ("single", "keyvalue"):
        prompts, answers = make_prompts(TaskGenerator(tokenizer, [book], seed=1), book, task, 600, 6)
        assert prompts.shape[0] == answers.shape[0] == 6
        assert 500 < prompts.shape[1] < 600
        assert (prompts[:, 0] == tokenizer.bos_token_id).all()
        for prompt, answer in zip(prompts, answers, strict=True):
            assert (prompt.unfold(0, len(answer), 1) == answer).all(-1).any()


def test_losses_of_chunks_are_those_of_the_model():
    model, _ = testbed.load(device="cpu")
    documents = torch.randint(5, 8000, (3, 150), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = [float(model(document[None], labels=document[None]).loss) for document in documents]
    for chunk in (None, 64, 149, 70):
        assert document_losses(model, documents, 2, chunk) == pytest.approx(expected, abs=1e-4)


def test_a_whole_run(tmp_path, capsys):
    options = ["--lengths", "640", "--chunks", "128", "100", "--count", "2", "--documents", "2", "--density", "0.2"]
    assert main(["--device", "cpu", *options, "--output", str(tmp_path)]) == 0
    (run,) = json.loads((tmp_path / "chunks.json").read_text())["runs"]
    cases = [(result["case"]["attention"], result["case"]["chunk"]) for result in run["results"]]
    assert cases == [(way, chunk) for way in ("dense", "sparse") for chunk in (None, 128, 100)]
    for result in run["results"]:
        metrics, splits = result["metrics"], result["case"]["chunk"] == 100
        sparse = result["case"]["attention"] == "sparse"
        assert (metrics["density"] < 1) == sparse
        if not (sparse and splits):  # as one shot
            assert metrics["same_answers"] == 1
            assert metrics["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
        else:
            assert metrics["perplexity_ratio"] != pytest.approx(1, abs=1e-5)  # blocks are scored in parts
    assert "the same, %" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--count=0", "--chunks=0"])
def test_wrong_options(argument, capsys):
    with pytest.raises(SystemExit):
        main([argument])
    assert "must be at least 1" in capsys.readouterr().err
