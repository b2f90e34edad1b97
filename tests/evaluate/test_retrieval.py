"""Scoring by generation is what greedy decoding gives; teacher forcing equals it for dense attention."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import seerattention as seer
from seerattention import TopK, baselines
from seerattention.evaluate.perplexity import cut_documents, evaluate_perplexity
from seerattention.evaluate.retrieval import METHODS, RetrievalResult, evaluate_retrieval, make_samples, score_samples
from seerattention.evaluate.settings import Setting
from seerattention.hf.state import state_of


@dataclass
class FakeQuestion:
    answers: tuple


@dataclass
class FakeSample:
    input_ids: np.ndarray
    questions: tuple


def greedy(model, prompt, count):
    ids = torch.tensor(prompt)[None]
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=1)
    return out[0, len(prompt) :].numpy()


def sample_with_right_and_wrong_answers(model, length=200):
    """Random text; spans at 60, 100, 150 hold what the model itself would say, and the last one is then spoilt."""
    ids = np.random.default_rng(0).integers(2, 300, length)
    spans = [(60, 64), (100, 103), (150, 155)]
    for start, stop in spans:
        ids[start:stop] = greedy(model, ids[:start], stop - start)
    ids[153] = (ids[153] + 1) % 300
    return FakeSample(ids, (FakeQuestion((spans[0],)), FakeQuestion((spans[1], spans[2])), FakeQuestion((spans[1],))))


def test_score_equals_greedy_generation(model):
    sample = sample_with_right_and_wrong_answers(model)
    expected = [
        all((greedy(model, sample.input_ids[:a], b - a) == sample.input_ids[a:b]).all() for a, b in question.answers)
        for question in sample.questions
    ]
    assert expected == [True, False, True]
    for method in METHODS:
        assert score_samples(model, [sample], method=method).tolist() == [expected]


@pytest.mark.parametrize("method", METHODS)
def test_score_does_not_depend_on_the_batch(model, generator, method):
    spoilt = sample_with_right_and_wrong_answers(model)
    other = FakeSample(np.roll(spoilt.input_ids, 1), spoilt.questions)
    alone = [score_samples(model, [sample], method=method)[0] for sample in (spoilt, other, spoilt)]
    together = score_samples(model, [spoilt, other, spoilt], batch_size=2, method=method)
    assert np.array_equal(together, np.stack(alone))


def test_every_setting_sees_the_same_samples(model, generator):
    samples = make_samples(generator, ["multikey", "multivalue"], length=768, count=2, questions=2)
    advanced = []
    results = evaluate_retrieval(
        model,
        samples,
        [
            Setting.dense(),
            Setting("all", selector=baselines.Oracle(TopK(1.0))),
            Setting("oracle", selector=baselines.Oracle(TopK(0.5))),
        ],
        batch_size=2,
        advance=advanced.append,
        method="teacher_forcing",
    )
    dense, everything, oracle = results
    assert dense.density == everything.density == 1.0
    # 12 block rows, ceil(i / 2) blocks each
    assert oracle.density == pytest.approx(sum(-(-i // 2) for i in range(1, 13)) / sum(range(1, 13)))
    for task in samples:
        assert np.array_equal(dense.correct[task], everything.correct[task])
    assert advanced == [2 * 768] * 6


def test_standard_error_counts_samples_not_questions():
    result = RetrievalResult("x", 100, 1.0, {"a": np.array([[1, 1], [0, 0], [1, 0]], dtype=bool)})
    assert result.accuracy() == 0.5
    assert result.standard_error("a") == pytest.approx(np.std([1, 0, 0.5], ddof=1) / 3**0.5)
    assert result.to_dict()["tasks"]["a"] == {
        "accuracy": 0.5,
        "standard_error": pytest.approx(result.standard_error("a")),
        "samples": 3,
        "questions": 6,
    }
    single = RetrievalResult("x", 100, 1.0, {"a": np.array([[True]])})
    assert single.to_dict()["tasks"]["a"]["standard_error"] is None


def test_mistakes_are_named(model, generator):
    with pytest.raises(ValueError, match="unknown tasks"):
        make_samples(generator, ["haystack"])
    short, long = (make_samples(generator, ["multikey"], length, 1, questions=1)["multikey"] for length in (768, 832))
    mixed = {"short": short, "long": long}
    with pytest.raises(ValueError, match="one length"):
        evaluate_retrieval(model, mixed, [Setting.dense()])


def test_what_a_user_gets_is_measured(model, generator):
    """Sparse prefill of the prompt up to the answer, then decoding: a spoilt selection of the answer's own rows does
    not help. The density is that of the prompts."""
    sample = sample_with_right_and_wrong_answers(model)
    seer.attach(model, seer.GateConfig(block_size=32), prefill=TopK(0.3), min_context=0)
    expected = [
        all((greedy(model, sample.input_ids[:a], b - a) == sample.input_ids[a:b]).all() for a, b in question.answers)
        for question in sample.questions
    ]
    assert score_samples(model, [sample]).tolist() == [expected]
    advanced = []
    (result,) = evaluate_retrieval(model, {"x": [sample]}, [Setting("gates")], advance=advanced.append)
    assert result.correct["x"].tolist() == [expected]
    assert result.method == result.to_dict()["method"] == "generate"
    assert sum(advanced) == len(sample.input_ids)
    kept, causal = 0, 0
    for start in (60, 100, 150):
        rows = range(1, -(-start // 32) + 1)
        kept, causal = kept + sum(max(1, math.ceil(0.3 * row - 1e-9)) for row in rows), causal + sum(rows)
    assert result.density == pytest.approx(kept / causal)


def test_an_unknown_method_is_named(model):
    with pytest.raises(ValueError, match="method must be one of"):
        score_samples(model, [], method="guess")


def test_a_setting_is_sparse_at_any_length_and_gives_back_what_was_there(model, books):
    """Prompts far below the default ``min_context`` of an attached model."""
    seer.attach(model, seer.GateConfig(block_size=32), prefill=TopK(0.9))
    documents = cut_documents(books, 320, 1)
    for policy in (None, TopK(0.2)):
        (result,) = evaluate_perplexity(model, documents, [Setting("gates", policy=policy)])
        share = 0.9 if policy is None else 0.2
        expected = sum(max(1, math.ceil(share * row - 1e-9)) for row in range(1, 11)) / sum(range(1, 11))
        assert result.density == pytest.approx(expected)
    state = state_of(model)
    assert (state.min_context, state.policy) == (None, TopK(0.9))
    with seer.record(model) as stats:
        model(documents, use_cache=False)
    assert stats.density == 1.0


def test_the_models_own_way_to_generate_does_not_matter(model):
    """Published models come with tokens to stop at and penalties; an answer may hold such a token, and says its words
    again."""
    sample = sample_with_right_and_wrong_answers(model)
    expected = score_samples(model, [sample]).tolist()
    assert expected == [[True, False, True]]
    config = model.generation_config
    config.eos_token_id = int(sample.input_ids[61])
    config.repetition_penalty, config.no_repeat_ngram_size = 50.0, 1
    config.suppress_tokens, config.bad_words_ids = [int(sample.input_ids[60])], [[int(sample.input_ids[100])]]
    config.do_sample, config.num_beams, config.min_new_tokens, config.max_new_tokens = True, 2, 1, 1
    before = config.to_dict()
    assert score_samples(model, [sample]).tolist() == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_a_batch_has_a_prompt_at_least(model, books, generator, batch_size):
    samples = make_samples(generator, ["single"], 600, 1)
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        evaluate_retrieval(model, samples, [Setting.dense()], batch_size=batch_size)
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        evaluate_perplexity(model, cut_documents(books, 100, 1), [Setting.dense()], batch_size=batch_size)
