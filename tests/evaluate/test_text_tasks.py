"""Text tasks in a model: batches padded on the left, scores, perplexity of answers, results that come back."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import seerattention as seer
from seerattention.baselines import Oracle, XAttention
from seerattention.evaluate import Setting, Subject
from seerattention.evaluate.generation import answer_losses, decode_greedily, generate_answers, left_padded
from seerattention.evaluate.text_tasks import LEAST_PARAMETERS, TextMeasure, TextResult, solved_tasks, text_table
from seerattention.policies import TopK
from seerattention.tasks import TEXT_TASKS

LENGTH = 2048
DENSE = Setting.dense()


@pytest.fixture
def subject(model, tokenizer, books):
    return Subject(model, tokenizer, books, batch_size=2)


def test_left_padding():
    ids, mask = left_padded([np.array([5, 6]), np.array([7, 8, 9])])
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_a_batch_says_what_each_prompt_says(model, books):
    prompts = [books[0][:300], books[1][:257], books[0][400:700]]
    alone = [generate_answers(model, [prompt], 12)[0] for prompt in prompts]
    assert generate_answers(model, prompts, 12) == alone
    assert all(len(answer) == 12 for answer in alone)
    stop = alone[0][4]
    first = alone[0].index(stop)
    stopped = generate_answers(model, prompts, 12, [stop])
    assert stopped[0] == alone[0][:first]
    assert all(stop not in answer for answer in stopped)


def test_decoding_on_a_cache_of_ones_own(model, books):
    prompt = torch.from_numpy(books[0][:300])[None]
    cache = DynamicCache(config=model.config)
    made = decode_greedily(model, prompt, 5, cache=cache)
    assert torch.equal(made, decode_greedily(model, prompt, 5))
    assert cache.get_seq_length() == 300 + 5 - 1


def test_losses_of_answers_are_those_of_one_forward(model, books):
    prompts, answers = [books[0][:300], books[1][:257]], [books[0][300:305], books[1][257:258]]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        expected.append(float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])))
    np.testing.assert_allclose(answer_losses(model, prompts, answers), expected, rtol=1e-4)


def test_answers_take_no_part_in_the_density_of_prompts(model, books):
    seer.attach(model, selector=Oracle(TopK(0.25)), min_context=0)
    with seer.record(model) as short:
        answer_losses(model, [books[0][:512]], [books[0][512:514]])
    with seer.record(model) as long:
        answer_losses(model, [books[0][:512]], [books[0][512:530]])
    assert short.prompt_density == long.prompt_density < 0.4


class Knowing(torch.nn.Module):
    """Says what is right to every prompt of the samples."""

    def __init__(self, model, samples):
        super().__init__()
        self.inner, self.known = model, {s.prompt.tobytes(): s.gold for group in samples.values() for s in group}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def generate(self, prompt, attention_mask, **options):
        rows = []
        for ids, mask in zip(prompt, attention_mask, strict=True):
            gold = self.known[ids[mask.bool()].numpy().tobytes()]
            answer = torch.full((options["max_new_tokens"],), 5)
            answer[: len(gold)] = torch.from_numpy(gold)
            rows.append(torch.cat([ids, answer]))
        return torch.stack(rows)


def test_right_answers_get_full_marks(subject):
    measure = TextMeasure(samples=3, answers="generate")
    prompts = measure.prepare(subject, 10_000)
    knowing = dataclasses.replace(subject, model=Knowing(subject.model, prompts.content))
    (result,) = measure.run(knowing, prompts, [DENSE])
    assert list(result.scores) == list(TEXT_TASKS)
    assert result.losses == {}
    assert {task: values.tolist() for task, values in result.scores.items()} == dict.fromkeys(TEXT_TASKS, [1.0] * 3)
    assert result.length == 10_000


def test_end_to_end_on_a_tiny_model(subject):
    tasks = ("niah_single_2", "niah_multikey_1", "many_shot", "copy", "qa_squad")
    measure = TextMeasure(text_tasks=tasks, samples=2)
    prompts = measure.prepare(subject, LENGTH)
    told = []
    settings = [DENSE, Setting("xattention 0.5", selector=XAttention(tau=0.5))]
    dense, sparse = measure.run(subject, prompts, settings, told.append)
    assert sum(told) == 2 * prompts.tokens
    assert sum(p.numel() for p in subject.model.parameters()) < LEAST_PARAMETERS
    for result in (dense, sparse):
        assert list(result.scores) == list(tasks[:-1])
        assert list(result.losses) == ["qa_squad"]
        assert all(((values >= 0) & (values <= 1)).all() for values in result.scores.values())
        back = measure.restore(json.loads(json.dumps(result.to_dict())), result.arrays())
        assert back.to_dict() == result.to_dict()
    assert dense.density == 1 > sparse.density > 0
    assert not np.array_equal(dense.losses["qa_squad"], sparse.losses["qa_squad"])
    table = text_table([dense, sparse])
    assert table.headers == ["setting", "density", *tasks[:-1], "mean of solved", "qa_squad (ppl)"]
    assert "too small to answer questions on paragraphs freely" in table.caption


def test_a_task_has_the_same_samples_whatever_others_run(subject):
    one = TextMeasure(text_tasks=("copy",), samples=2).prepare(subject, LENGTH)
    two = TextMeasure(text_tasks=("niah_single_1", "copy"), samples=2).prepare(subject, LENGTH)
    assert np.array_equal(one.decides["copy"], two.decides["copy"])
    other = TextMeasure(text_tasks=("copy",), samples=2).prepare(dataclasses.replace(subject, seed=1), LENGTH)
    assert not np.array_equal(one.decides["copy"], other.decides["copy"])


def test_means_count_what_dense_solves():
    def result(name, a, b):
        return TextResult(name, 64, 1.0, {"copy": np.float32(a), "many_shot": np.float32(b)})

    dense, sparse = result("dense", [1, 0.5], [0, 0.5]), result("sparse", [0.5, 0.5], [1, 1])
    assert solved_tasks(dense) == ["copy"]
    table = text_table([dense, sparse])
    assert [row[-1] for row in table.rows] == ["75 %", "50 %"]
    assert np.isnan(dense.score([]))


def test_refused(subject):
    with pytest.raises(ValueError, match="unknown tasks"):
        TextMeasure(text_tasks=("nothing",))
    with pytest.raises(ValueError, match="answers must be one of"):
        TextMeasure(answers="maybe")
    with pytest.raises(ValueError, match="does not fit into 100 tokens"):
        TextMeasure(text_tasks=("copy",)).prepare(subject, 100)
