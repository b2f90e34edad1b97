"""Tasks of lm-evaluation-harness on a tiny model, where the extra is installed."""

import json
import subprocess
import sys

import pytest
import torch

import seerattention as seer
from seerattention.evaluate import Setting, Subject, run_measures
from seerattention.evaluate.harness import (
    HarnessMeasure,
    HarnessResult,
    HarnessScore,
    HarnessTask,
    _roots,
    _scores,
    harness_table,
)
from seerattention.evaluate.harness_model import harness_model as make_harness_model

from .harness_tasks import CHOICES, make_documents, write_group, write_tasks
from .tiny import make_model, make_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

ALL, SOME = seer.TopK(1.0), seer.TopK(0.3)


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.eos_token = made.bos_token  # as the testbed's
    return made


@pytest.fixture
def model(tokenizer):
    return make_model(len(tokenizer))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def attach(model, policy):
    torch.manual_seed(1)
    return seer.attach(model, seer.GateConfig(block_size=32), prefill=policy, min_context=0)


def harness_model(model, tokenizer, batch_size, sparse=True):
    return make_harness_model(model, tokenizer, batch_size, sparse)


def choices():
    """Every choice of every document, as the requests of a multiple-choice task."""
    return [
        Instance("loglikelihood", document, (document["text"], " " + choice), index)
        for index, (document, choice) in enumerate((d, c) for d in make_documents() for c in CHOICES)
    ]


def generations(count=5):
    options = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    return [Instance("generate_until", d, (d["text"], options), i) for i, d in enumerate(make_documents(count))]


def rows(lengths, ending=None, seed=0):
    """``(key, context, continuation)`` of token ids; what is run of each has so many tokens, and this last one."""
    drawn = torch.Generator().manual_seed(seed)
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(2, 300, (length + 1,), generator=drawn).tolist()
        if ending is not None:
            ids[-2] = ending
        made.append(((str(i), ""), ids[:-3], ids[-3:]))
    return made


@pytest.mark.parametrize("attached", [False, True])
def test_dense_scores_are_those_of_hflm_on_the_untouched_model(model, tokenizer, paths, attached):
    stock = HFLM(pretrained=make_model(len(tokenizer)), tokenizer=make_tokenizer_like(tokenizer), batch_size=3)
    expected = lm_eval.simple_evaluate(model=stock, tasks=paths, limit=4, batch_size=3)["results"]
    if attached:
        attach(model, SOME)
    measure = HarnessMeasure(lm_eval_tasks=paths, limit=4)
    (group,) = run_measures(Subject(model, tokenizer, [], batch_size=3), [measure], [Setting.dense()], [4096])
    (result,) = group.results
    assert measure.restore(json.loads(json.dumps(result.to_dict())), result.arrays()) == result
    assert (result.options["lm_eval"], result.options["limit"]) == (lm_eval.__version__, 4)
    assert (result.setting, result.density) == ("dense", 1.0)
    assert [task.density for task in result.tasks] == [1.0, 1.0]
    found = {(s.task, f"{s.metric},{s.filter}"): s.value for task in result.tasks for s in task.scores}
    assert found == {
        ("toy_choice", "acc,none"): expected["toy_choice"]["acc,none"],
        ("toy_choice", "acc_norm,none"): expected["toy_choice"]["acc_norm,none"],
        ("toy_generate", "exact_match,none"): expected["toy_generate"]["exact_match,none"],
    }
    assert {score.samples for task in result.tasks for score in task.scores} == {4}
    mine = harness_model(model, tokenizer, 3, sparse=False)
    with Setting.dense().applied(model):
        assert mine.loglikelihood(choices()) == stock.loglikelihood(choices())  # the same floats
        assert mine.generate_until(generations()) == stock.generate_until(generations())


def make_tokenizer_like(tokenizer):
    made = make_tokenizer()
    made.eos_token = tokenizer.eos_token
    return made


def test_a_policy_that_keeps_all_blocks_gives_the_dense_scores(model, tokenizer, paths):
    settings = [Setting.dense(), Setting("all", policy=ALL), Setting("some", policy=SOME)]
    attach(model, SOME)
    measure = HarnessMeasure(lm_eval_tasks=paths, num_fewshot=1)
    (group,) = run_measures(Subject(model, tokenizer, [], batch_size=3), [measure], settings, [4096])
    dense, everything, some = group.results
    assert [[s.value for s in task.scores] for task in everything.tasks] == [
        [s.value for s in task.scores] for task in dense.tasks
    ]
    assert [task.density for task in everything.tasks] == [1.0, 1.0]
    for task in some.tasks:
        assert 0.3 < task.density < 0.6
    low, high = sorted(task.density for task in some.tasks)
    assert low <= some.density <= high
    table = measure.table(group.results)
    assert table.headers == [
        "setting", "choice density", "toy_choice acc", "toy_choice acc_norm",
        "generate density", "toy_generate exact_match",
    ]  # fmt: skip
    dense_scores = harness_model(model, tokenizer, 3, sparse=False)
    sparse_scores = harness_model(model, tokenizer, 3)
    with seer.dense(model):
        expected, written = dense_scores.loglikelihood(choices()), dense_scores.generate_until(generations())
    seer.set_policy(model, ALL)
    found = sparse_scores.loglikelihood(choices())
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert sparse_scores.generate_until(generations()) == written


@pytest.mark.parametrize("policy", [SOME, seer.TopP(0.6), seer.TokenBudget(64)])
@pytest.mark.parametrize("ending", [None, 0])
def test_scores_do_not_depend_on_what_else_is_in_the_batch(model, tokenizer, policy, ending):
    """Right padding without a cache, also of rows that end with the token that HFLM fills up with."""
    attach(model, policy)
    lengths = [5, 31, 32, 33, 100, 129, 200]
    requests = rows(lengths[::2], ending) + rows(lengths[1::2], seed=1)
    alone = harness_model(model, tokenizer, 1)
    expected = [alone._loglikelihood_tokens([request])[0] for request in requests]
    with seer.record(model) as stats:
        found = harness_model(model, tokenizer, 4)._loglikelihood_tokens(requests)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert stats.dense_calls == 0
    assert stats.prompt_density < 1


def test_hflm_itself_would_let_padding_choose(model, tokenizer):
    """Why there is a class of our own at all; if this fails one day, it may go."""
    attach(model, SOME)
    requests = rows([33, 70, 100, 129])
    expected = [harness_model(model, tokenizer, 1)._loglikelihood_tokens([request])[0][0] for request in requests]
    stock = HFLM(pretrained=model, tokenizer=make_tokenizer_like(tokenizer), batch_size=4)
    assert [score for score, _ in stock._loglikelihood_tokens(requests)] != pytest.approx(expected, abs=1e-3)


def test_model_call_gives_each_row_its_own_logits(model, tokenizer):
    attach(model, SOME)
    mine = harness_model(model, tokenizer, 4)
    ids = [torch.randint(2, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 64, 97, 150)]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    logits = mine._model_call(batch)
    for row, own in zip(logits, ids, strict=True):
        torch.testing.assert_close(row[: len(own)], mine._model_call(own[None])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", [SOME, seer.TopP(0.6), seer.TokenBudget(64)])
def test_generation_does_not_depend_on_what_else_is_in_the_batch(model, tokenizer, policy):
    """Left padding with a cache, as ``generate_until`` does it."""
    attach(model, policy)
    with seer.record(model) as stats:
        together = harness_model(model, tokenizer, 5).generate_until(generations())
    assert stats.sparse_calls == 2  # the prompts, in two layers
    assert together == harness_model(model, tokenizer, 1).generate_until(generations())
    texts = [document["text"] for document in make_documents()]
    mine = harness_model(model, tokenizer, 5)
    ids, mask = mine.tok_batch_encode(texts)
    assert (mask[:, 0] == 0).sum() == 4
    options = {"attention_mask": mask, "stop": ["\n"], "max_length": ids.shape[1] + 5, "do_sample": False}
    made = mine._model_generate(ids, **options)
    for text, row in zip(texts, made, strict=True):
        own, own_mask = mine.tok_batch_encode([text])
        options |= {"attention_mask": own_mask, "max_length": own.shape[1] + 5}
        assert mine._model_generate(own, **options)[0, own.shape[1] :].tolist() == row[ids.shape[1] :].tolist()


def test_the_tokenizer_and_the_model_stay_as_they_are(model, tokenizer):
    before = (tokenizer.pad_token, tokenizer.padding_side, {k: v.clone() for k, v in model.state_dict().items()})
    harness_model(attach(model, SOME), tokenizer, 4).generate_until(generations(2))
    seer.detach(model)
    assert before[:2] == (tokenizer.pad_token, tokenizer.padding_side)
    assert all(torch.equal(value, before[2][name]) for name, value in model.state_dict().items())


def test_scores_of_groups_come_first_and_lengths_that_were_not_asked_for_go():
    found = {
        "results": {
            "all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 7},
            "ruler": {"4096,none": -1, "4096_stderr,none": "N/A", "8192,strict": 0.25, "8192_stderr,strict": "N/A"},
        },
        "groups": {"all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": "N/A"}},
    }
    assert _scores(found) == [
        HarnessScore("all", True, "acc", "none", 0.5, None, None),
        HarnessScore("one", False, "acc", "none", 0.5, 0.1, 7),
        HarnessScore("ruler", False, "8192", "strict", 0.25, None, None),
    ]
    task = HarnessTask("all", 0.25, _scores(found))
    assert [score.label for score in task.shown()] == ["all acc"]
    table = harness_table([HarnessResult("gates", 0.25, [task])])
    assert (table.headers, table.rows) == (["setting", "density", "all acc"], [["gates", "0.25", "0.5000"]])
    nested = {
        "groups": {"outer": "o", "inner": "i"}, "group_map": {"outer": ["inner"], "inner": ["t"]}, "tasks": {"t": "t"}
    }  # fmt: skip
    assert _roots(nested) == ["o"]
    assert _roots({"groups": {}, "group_map": {}, "tasks": {"t": 1, "u": 2}}) == [1, 2]


def test_what_cannot_be_run_is_said(model, tokenizer, paths, tmp_path):
    (tmp_path / "toys.yaml").write_text("group: toys\ntask: [toy_a, toy_b]\n")
    with pytest.raises(ValueError, match=r"toys.yaml is a group; .* name the files of its tasks"):
        HarnessMeasure(lm_eval_tasks=[str(tmp_path / "toys.yaml")]).prepare(Subject(model, tokenizer, []), 0)
    for tasks, says in (([], "no task"), (["no_such_task"], "'no_such_task'; `lm_eval ls tasks` lists them")):
        with pytest.raises(ValueError, match=says):
            HarnessMeasure(lm_eval_tasks=tasks).prepare(Subject(model, tokenizer, []), 0)
    with pytest.raises(ValueError, match="end-of-text token"):
        HarnessMeasure(lm_eval_tasks=paths).prepare(Subject(model, make_tokenizer(), []), 0)


def test_a_group_shows_its_mean(model, tokenizer, tmp_path, monkeypatch):
    """As one of lm_eval's own, which it knows by its name."""
    write_group(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("seerattention.evaluate.harness._manager", lambda facts: manager)
    subject = Subject(attach(model, SOME), tokenizer, [], batch_size=4)
    measure = HarnessMeasure(lm_eval_tasks=["toys"], limit=2)
    (group,) = run_measures(subject, [measure], [Setting.dense(), Setting("some")], [4096])
    assert measure.table(group.results).headers == ["setting", "density", "toys acc"]
    for result in group.results:
        mean, *single = result.tasks[0].scores
        assert (mean.task, mean.group, mean.metric) == ("toys", True, "acc")
        assert {score.task for score in single} == {"toy_a", "toy_b"}
        assert mean.value == sum(score.value for score in single if score.metric == "acc") / 2
    assert 0.3 < group.results[1].density < 1


def test_chat_template(model, paths):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} the end {% endfor %}"
    subject = Subject(attach(model, SOME), tokenizer, [], batch_size=2)
    found = []
    for chat in (False, True):
        measure = HarnessMeasure(lm_eval_tasks=paths[:1], limit=2, num_fewshot=1, apply_chat_template=chat)
        prompts = measure.prepare(subject, 0)
        (result,) = measure.run(subject, prompts, [Setting("some")])
        found.append((result.density, prompts.decides["tasks"].tobytes()))
    assert found[0][0] != found[1][0]  # other prompts
    tokenizer.chat_template = tokenizer.chat_template.replace("the end", "and")
    assert measure.prepare(subject, 0).decides["tasks"].tobytes() != found[1][1]


def test_prompts_decide(model, tokenizer, paths):
    """Results are kept for the same requests only."""

    def decides(**options):
        made = HarnessMeasure(lm_eval_tasks=paths[:1], **options).prepare(Subject(model, tokenizer, []), 0)
        return {name: array.tobytes() for name, array in made.decides.items()}

    assert decides(limit=2) == decides(limit=2)
    assert decides(limit=2) != decides(limit=3)
    assert decides(limit=2) != decides(limit=2, num_fewshot=1)


def test_imports_lm_eval_late():
    assert "lm_eval" in sys.modules  # this file did it
    code = "import sys, seerattention.evaluate, seerattention.cli.eval; print('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
