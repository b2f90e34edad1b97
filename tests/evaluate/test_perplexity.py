"""Chunked losses must equal plain cross entropy, and the summaries plain averages."""

import math

import accelerate
import numpy as np
import peft
import pytest
import torch
import transformers

from seerattention import TopK, baselines
from seerattention.evaluate import forward
from seerattention.evaluate.perplexity import PerplexityResult, cut_documents, document_losses, evaluate_perplexity
from seerattention.evaluate.settings import Setting


@pytest.fixture
def documents(books):
    return cut_documents(books, 300, 4)


def test_losses_equal_cross_entropy(model, documents, monkeypatch):
    monkeypatch.setattr(
        forward, "_CHUNK_ELEMENTS", 2 * 7 * model.config.vocab_size
    )  # chunks of 7 positions, the last one partial
    losses = document_losses(model, documents, batch_size=2)
    with torch.no_grad():
        logits = model(documents).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), documents[:, 1:], reduction="none")
    assert losses.shape == (4, 299)
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_prefix_costs_what_the_shorter_prompt_costs(model, documents):
    setting = Setting("oracle", selector=baselines.Oracle(TopK(0.4)))
    (long,) = evaluate_perplexity(model, documents, [setting])
    (short,) = evaluate_perplexity(model, documents[:, :192], [setting])
    assert long.density < 0.8
    np.testing.assert_allclose(long.losses[:, :191], short.losses, rtol=1e-3, atol=1e-4)
    assert long.perplexity(0, 192)[0] == pytest.approx(short.perplexity()[0], rel=1e-4)


def test_summaries():
    losses = np.arange(2 * 7, dtype=np.float32).reshape(2, 7)  # tokens 1..7 of documents of 8
    result = PerplexityResult("x", 1.0, losses)
    assert result.loss(0, 4) == (pytest.approx((1 + 8) / 2), pytest.approx(3.5))  # tokens 1, 2, 3
    assert result.loss(4, 6)[0] == pytest.approx((3.5 + 10.5) / 2)
    mean, error = result.perplexity(6)
    assert (mean, error) == (pytest.approx(math.exp(9)), pytest.approx(math.exp(9) * 3.5))
    assert result.last_quarter() == result.perplexity(6)
    other = PerplexityResult("y", 0.5, losses + np.array([[1.0], [3.0]], dtype=np.float32))
    assert other.loss_increase(result) == (pytest.approx(2.0), pytest.approx(1.0))
    with pytest.raises(ValueError, match="no predicted token"):
        result.loss(8)


def test_buckets_cover_every_position_once():
    result = PerplexityResult("x", 1.0, np.zeros((1, 1499), dtype=np.float32))
    assert result.buckets() == [(0, 256), (256, 512), (512, 1024), (1024, 1500)]
    assert [entry["length"] for entry in result.to_dict()["by_length"]] == [256, 512, 1024, 1500]


def test_documents_are_disjoint_pieces():
    documents = cut_documents([np.arange(10), np.arange(100, 125)], 5, 6)
    assert documents[:, 0].tolist() == [0, 100, 5, 105, 110, 115]
    with pytest.raises(ValueError, match="only 7 documents"):
        cut_documents([np.arange(10), np.arange(100, 125)], 5, 8)


def test_a_head_that_would_be_wrong_is_refused(model, documents):
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(NotImplementedError, match="final_logit_softcapping"):
        document_losses(model, documents)


def test_documents_begin_with_the_token_that_retrieval_samples_have(books, generator, tokenizer):
    documents = cut_documents(books, 100, 3, bos=tokenizer.bos_token_id)
    assert documents.shape == (3, 100)
    assert (documents[:, 0] == generator.sample("single", 600).input_ids[0]).all()
    assert torch.equal(documents[0, 1:], torch.from_numpy(books[0][:99]))
    assert torch.equal(documents[2, 1:], torch.from_numpy(books[0][99:198]))


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([[1, 2, 3]], TypeError, "must be a tensor"),
        (np.ones((1, 5), dtype=int), TypeError, "must be a tensor"),
        (torch.ones(5, dtype=torch.int64), ValueError, r"got \(5,\)"),
        (torch.ones(1, 5), TypeError, "int64 or int32"),
        (torch.ones(1, 1, dtype=torch.int64), ValueError, "T >= 2"),
        (torch.ones(0, 5, dtype=torch.int64), ValueError, r"got \(0, 5\)"),
    ],
    ids=["list", "numpy", "row", "float", "one token", "none"],
)
def test_what_is_no_documents_gets_a_sentence(model, documents, error, message):
    with pytest.raises(error, match=message):
        evaluate_perplexity(model, documents, [Setting.dense()])


def test_prompt_tuning_is_part_of_the_model(model, documents):
    """The virtual tokens of a PEFT model change its perplexity; a shortcut to the decoder would not see them."""
    plain = document_losses(model, documents[:1])
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned = peft.get_peft_model(model, config).eval()
    torch.nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight)
    ids = documents[:1]
    with torch.no_grad():
        logits = tuned(input_ids=ids).logits[:, -ids.shape[1] :]
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    found = document_losses(tuned, ids)
    assert np.allclose(found[0], expected.numpy(), atol=1e-5)
    assert not np.allclose(found, plain, atol=1e-2)


def tiny_llava(text):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(text_config=text.config, vision_config=vision, image_token_index=5)
    made = transformers.LlavaForConditionalGeneration(config).eval()
    made.model.language_model.load_state_dict(text.model.state_dict())
    made.lm_head.load_state_dict(text.lm_head.state_dict())
    return made


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, tiny_llava])
def test_a_wrapped_model_is_run_whole(model, documents, wrap):
    expected = document_losses(model, documents[:1])
    wrapped, calls = wrap(model), []
    inner = getattr(wrapped, "_orig_mod", wrapped)
    inner.register_forward_hook(lambda *arguments: calls.append(1))
    np.testing.assert_allclose(document_losses(wrapped, documents[:1]), expected, atol=1e-5)
    assert calls == [1]


def test_offloaded_models_are_measured(model, documents):
    expected = document_losses(model, documents[:1])
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    assert np.array_equal(document_losses(offloaded, documents[:1]), expected)


def test_models_in_training_mode_are_measured_as_they_answer(model, documents):
    expected = document_losses(model, documents[:1])
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    assert np.array_equal(document_losses(model, documents[:1]), expected)
    assert model.training
