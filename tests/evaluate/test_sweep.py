"""Calibration to a density, sweeps that stop and go on, processes that share a folder, and what is read from it."""

import json
import multiprocessing
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import seerattention as seer
from seerattention.evaluate import Journal, Setting, Subject
from seerattention.evaluate.calibration import TOLERANCE, CalibrationMeasure, search
from seerattention.evaluate.comparison import RUN, Comparison, Entry, RunResult
from seerattention.evaluate.comparison_tables import NOTES, summary_table, task_table
from seerattention.evaluate.contenders import KNOBS, Knob, make_contenders
from seerattention.evaluate.perplexity import PerplexityMeasure
from seerattention.evaluate.statistics import bootstrap, paired_bootstrap
from seerattention.evaluate.sweep import Plan, Sweep, run_sweep, units_of
from seerattention.evaluate.text_tasks import TextMeasure
from seerattention.evaluate.timing import TimingMeasure

LENGTH = 1024
IDENTITY = {"weights": "those of the test"}
TASKS = TextMeasure(text_tasks=("niah_single_2", "copy"), samples=2)


@pytest.fixture
def subject(model, tokenizer, books):
    return Subject(model, tokenizer, books, batch_size=2)


def plan_of(selectors="xattention,streaming", densities=(0.3,), gates=None, **options):
    contenders = make_contenders(gates or {}, selectors)
    return Plan(contenders, [LENGTH], list(densities), TASKS, PerplexityMeasure(1), **options)


@contextmanager
def quiet(what, total):
    yield lambda amount: None


def sweep_of(subject, plan, folder, process=0):
    journal = Journal(folder, process)
    journal.add(
        {"measure": RUN, "run": "r", "settings": [], "time": 1.0}, "digest of r", [RunResult({"model": "tiny"})]
    )
    return Sweep(subject, plan, journal, IDENTITY, "r")


# ---- the search --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0.05, 0.1, 0.3, 0.8])
@pytest.mark.parametrize("power", [0.5, 1.0, 6.0])
def test_the_search_finds_a_density(wanted, power):
    asked = []

    def density(value):
        asked.append(value)
        return 0.02 + 0.98 * value**power

    value, found, runs = search(Knob("p", 0.0, 1.0), wanted, density)
    assert abs(found / wanted - 1) <= TOLERANCE
    assert density(value) == found
    assert runs == len(asked) - 1 <= 17


def test_the_search_ends_where_it_must():
    steps = Knob("window", 1, 64, log=True, whole=True)
    value, found, _ = search(steps, 0.27, lambda value: value / 10)
    assert (value, found) == (3, 0.3)
    value, found, _ = search(steps, 0.24, lambda value: value / 10)
    assert (value, found) == (2, 0.2)
    value, found, runs = search(KNOBS["threshold"], 0.05, lambda value: 0.2)  # what is always kept is more
    assert (found, runs) == (0.2, 1)
    assert value == KNOBS["threshold"].sparse
    value, found, runs = search(KNOBS["top_p"], 0.5, lambda value: 0.1 if value < 0.4 else 0.9)  # a jump
    assert found in (0.1, 0.9)
    assert runs <= 17


@pytest.mark.parametrize("name", ["xattention", "flashprefill", "flexprefill", "mean_pool", "random", "oracle_cover"])
def test_selectors_are_brought_to_a_density(subject, name):
    for contender in make_contenders({}, name):
        measure = CalibrationMeasure(contender, 0.3, TASKS)
        prompts = measure.prepare(subject, LENGTH)
        (found,) = measure.run(subject, prompts, [contender.setting(contender.selector, 0.3)])
        assert found.reached == (abs(found.density / 0.3 - 1) <= TOLERANCE)
        assert abs(found.density / 0.3 - 1) < 0.2
        setting = Setting("x", selector=found.made())
        with setting.applied(subject.model) as cost, torch.no_grad():
            for prompt in prompts.content:
                subject.model(torch.from_numpy(prompt)[None])
        assert cost.prompt_density == pytest.approx(found.density)
        assert measure.restore(json.loads(json.dumps(found.to_dict())), {}) == found


def test_floors_give_way_where_they_are_in_the_way(subject):
    (contender,) = make_contenders({}, "xattention", ("project",))
    measure = CalibrationMeasure(contender, 0.3, TASKS)  # rows of up to 16 blocks are all of this prompt
    (found,) = measure.run(subject, measure.prepare(subject, LENGTH), [contender.setting(contender.selector, 0.3)])
    assert found.conceded == 2
    assert found.reached
    assert found.selector["policy"]["dense_rows"] == 0


def test_held_out_prompts_are_others(subject):
    (contender, *_) = make_contenders({}, "xattention")
    held_out = CalibrationMeasure(contender, 0.3, TASKS, documents=1, skip=1).prepare(subject, LENGTH).content
    measured = [s.prompt for samples in TASKS.prepare(subject, LENGTH).content.values() for s in samples]
    measured += list(PerplexityMeasure(1).prepare(subject, LENGTH).content.numpy())
    assert len(held_out) == 3
    assert not any(np.array_equal(a, b) for a in held_out for b in measured)


# ---- sweeps ------------------------------------------------------------------------------------------------------


def test_a_sweep_stops_and_goes_on(subject, tmp_path, monkeypatch):
    plan = plan_of(timing=TimingMeasure(1), maps=LENGTH)
    names = [unit.name for unit in units_of(plan)]
    assert names == ["dense", "xattention, own rule 0.3", "xattention, project rule 0.3", "streaming, own rule 0.3"]
    ran = []
    run = TextMeasure.run

    def stopping(self, subject, prompts, settings, advance=None):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(settings[0].name)
        return run(self, subject, prompts, settings, advance)

    monkeypatch.setattr(TextMeasure, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep_of(subject, plan, tmp_path), progress=quiet)
    assert ran == names[:2]
    half = Comparison.read(tmp_path)
    assert [entry.name for entry in half.at(LENGTH)] == names[:2]
    before = (tmp_path / "results.jsonl").read_text().splitlines()

    monkeypatch.setattr(TextMeasure, "run", lambda *arguments: ran.append(arguments[3][0].name) or run(*arguments))
    told = []

    @contextmanager
    def counting(what, total):
        yield told.append
        assert sum(told) == total

    run_sweep(sweep_of(subject, plan, tmp_path), progress=counting)
    assert ran == names
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [line for line in lines if line in before] == before[1:] or set(before) <= set(lines)
    run_sweep(sweep_of(subject, plan, tmp_path), progress=quiet)
    assert ran == names

    found = Comparison.read(tmp_path)
    assert found.facts == {"model": "tiny"}
    assert sorted(entry.name for entry in found.at(LENGTH)) == sorted(names)
    for entry in found.at(LENGTH):
        assert entry.tasks.scores.keys() == {"niah_single_2", "copy"}
        assert entry.perplexity is not None
        assert entry.prefill > 0
        assert entry.seconds > 0
        assert (entry.maps is None) == entry.is_dense
        assert (entry.tasks.density == 1) == entry.is_dense
    sparse = next(entry for entry in found.at(LENGTH) if entry.name == names[1])
    assert sparse.contender["selector"]["kind"] == "xattention"
    assert abs(sparse.contender["calibrated_density"] / 0.3 - 1) <= TOLERANCE
    assert sparse.contender["whole_prompt"] is False
    assert sparse.maps.selected.shape == sparse.maps.target.shape == (2, 4, 16, 16)
    assert sparse.maps.prediction is not None
    assert np.allclose(sparse.maps.densities.mean(), sparse.maps.density)
    assert found.loss_change(sparse).low <= found.loss_change(sparse).mean <= found.loss_change(sparse).high
    table = summary_table(found, LENGTH)
    assert [row[0] for row in table.rows] == [entry.name for entry in found.at(LENGTH)]
    assert "row by row" in [row[-1] for row in table.rows]
    assert len(task_table(found, LENGTH).rows) == 4
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(told["settings"]) == 4


def test_what_runs_out_of_memory_is_named_and_left_out(subject, tmp_path, monkeypatch):
    run, said = TextMeasure.run, []

    def run_out(self, subject, prompts, settings, advance=None):
        if settings[0].name.startswith("xattention, own"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, subject, prompts, settings, advance)

    monkeypatch.setattr(TextMeasure, "run", run_out)
    run_sweep(sweep_of(subject, plan_of(), tmp_path), progress=quiet, say=said.append)
    assert said == ["out of memory, and left out: xattention, own rule 0.3 at 1K; a smaller --batch-size may do"]
    names = {entry.name for entry in Comparison.read(tmp_path).at(LENGTH)}
    assert names == {"dense", "xattention, project rule 0.3", "streaming, own rule 0.3"}


def test_gates_are_compared_too(subject, tmp_path):
    seer.attach(subject.model, seer.GateConfig())
    seer.save_gates(subject.model, tmp_path / "gates")
    seer.detach(subject.model)
    plan = plan_of("streaming", gates={"gates": tmp_path / "gates"}, maps=LENGTH)
    run_sweep(sweep_of(subject, plan, tmp_path / "out"), progress=quiet)
    found = {entry.name: entry for entry in Comparison.read(tmp_path / "out").at(LENGTH)}
    for name in ("gates, own rule 0.3", "gates, project rule 0.3"):
        assert abs(found[name].contender["calibrated_density"] / 0.3 - 1) <= TOLERANCE
        assert found[name].contender["needs_gates"]
        assert found[name].maps.prediction is not None
    assert found["streaming, own rule 0.3"].maps.prediction is None


def test_stored_budgets_are_run_as_they_are(subject, tmp_path, monkeypatch):
    """No knob is searched, what was not fitted is left out and said, and tables say what the rule is."""
    curve = (1.0, 64.0), (0.5, 0.5)
    budgets = seer.Budgets((seer.Budget(0.2, *curve), seer.Budget(0.4, *curve)), 0.2, 4096, 64)
    seer.attach(subject.model, seer.GateConfig())
    seer.save_gates(subject.model, tmp_path / "gates")
    seer.detach(subject.model)
    contenders = make_contenders({"gates": tmp_path / "gates"}, "", ("budget",), budgets={"gates": budgets})
    plan = Plan(contenders, [LENGTH], [0.1, 0.2], TASKS, PerplexityMeasure(1))
    assert [unit.name for unit in units_of(plan)] == ["dense", "gates, budget rule 0.2"]
    monkeypatch.setattr(CalibrationMeasure, "run", None)
    said = []
    run_sweep(sweep_of(subject, plan, tmp_path / "out"), progress=quiet, say=said.append)
    assert said == ["gates, budget rule: no budgets for 0.1 are stored; seer calibrate fits them"]
    found = Comparison.read(tmp_path / "out")
    entry = next(entry for entry in found.at(LENGTH) if not entry.is_dense)
    assert entry.contender["selector"]["policy"]["kind"] == "budget"
    setting = Setting("x", gates=tmp_path / "gates", selector=contenders[0].stored(0.2))
    document = PerplexityMeasure(1).prepare(subject, LENGTH).content
    with setting.applied(subject.model) as cost, torch.no_grad():
        subject.model(document[:1])
    assert entry.perplexity.density == pytest.approx(cost.prompt_density)
    assert 0 < entry.perplexity.density < 1
    caption = summary_table(found, LENGTH).caption
    assert "Budget rule: by the factors stored with the gates" in caption
    assert "out of reach" not in caption


def test_attentions_of_their_own_are_explained():
    facts = {"rule": "own", "protocol": "every_row_sparse", "whole_prompt": False}
    for mark, note in {**NOTES, "": ""}.items():
        entry = Entry("x", 64, 0.1, {**facts, "attention": mark})
        caption = summary_table(Comparison({}, {(64, "x"): entry}), 64).caption
        assert [other in caption for other in NOTES.values()] == [other == note for other in NOTES.values()]


def _process(number, folder, tokenizer, books, started):
    from .tiny import make_model

    torch.set_num_threads(1)
    subject = Subject(make_model(len(tokenizer)), tokenizer, books, batch_size=2)
    sweep = sweep_of(subject, plan_of(), folder, number)
    started.wait(120)
    run_sweep(sweep, progress=quiet, last=number == 0)


def test_processes_share_a_sweep(tokenizer, books, tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Barrier(2)
    processes = [
        context.Process(target=_process, args=(number, tmp_path, tokenizer, books, started)) for number in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["results-1.jsonl", "results.jsonl"]
    lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    done = [(line["case"]["measure"], *line["case"]["settings"]) for line in lines if line["case"]["measure"] != RUN]
    assert len(done) == len(set(done)) == 4 * 2 + 3  # two measures of four settings, three calibrations: none twice
    assert len(Comparison.read(tmp_path).entries) == 4


def test_results_of_other_prompts_are_left_out(subject, tmp_path):
    run_sweep(sweep_of(subject, plan_of("streaming"), tmp_path), progress=quiet)
    more = Plan(plan_of("xattention").contenders, [LENGTH], [0.3], TextMeasure(("copy",), 3), None)
    run_sweep(sweep_of(subject, more, tmp_path), progress=quiet)
    found = Comparison.read(tmp_path)
    scores = {entry.name: entry.tasks for entry in found.at(LENGTH)}
    assert found.left_out == 2  # of dense and of streaming
    assert scores["streaming, own rule 0.3"] is None
    assert len(scores["dense"].scores["copy"]) == len(scores["xattention, own rule 0.3"].scores["copy"]) == 3


def test_folders_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no results"):
        Comparison.read(tmp_path)
    Journal(tmp_path).add({"measure": "perplexity"}, None, [])
    with pytest.raises(ValueError, match="not those of seer compare"):
        Comparison.read(tmp_path)


# ---- intervals ---------------------------------------------------------------------------------------------------


def test_intervals_hold_what_they_should():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        found = bootstrap([rng.normal(1.0, 1.0, 40)], 400, seed)
        hits += found.low <= 1.0 <= found.high
    assert 175 <= hits <= 200
    values = rng.random(50)
    error = values.std() / np.sqrt(50)
    found = bootstrap([values])
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert bootstrap([values]) == found


def test_pairs_take_the_difference_of_the_same_questions():
    rng = np.random.default_rng(1)
    hard = rng.random(100)
    found = paired_bootstrap([hard + 0.1, hard], [hard, hard])
    assert found.mean == pytest.approx(0.05)
    assert found.high - found.low < 1e-9  # though single scores spread widely
    with pytest.raises(ValueError, match="same samples"):
        paired_bootstrap([hard], [hard[:50]])
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap([])
