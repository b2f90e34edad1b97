"""Measures run case by case; what was measured is not measured again, and nothing else is taken for it."""

import dataclasses
import json

import pytest

import seerattention as seer
from seerattention.baselines import Oracle
from seerattention.evaluate import MEASURES, Journal, Setting, Subject, register, run_measures
from seerattention.evaluate.cases import _plain
from seerattention.files import temporary_files
from seerattention.policies import TopK
from seerattention.selectors import GateSelector

from .toy import Toy

DENSE, SPARSE = Setting.dense(), Setting("oracle 0.5", selector=Oracle(TopK(0.5)))
IDENTITY = {"weights": "those of the test"}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(Toy, "runs", [])
    monkeypatch.setattr(Toy, "stop_at", [])
    return Toy


@pytest.fixture
def subject(model, tokenizer, books):
    return Subject(model, tokenizer, books)


TOY = Toy()


def run(subject, folder, measures=(TOY,), settings=(DENSE, SPARSE), lengths=(256,), identity=IDENTITY):
    return run_measures(subject, measures, settings, lengths, journal=Journal(folder), identity=identity)


def numbers_of(groups):
    return [(group.measure.name, group.length, [result.to_dict() for result in group.results]) for group in groups]


def test_a_stopped_run_goes_on_where_it_was(toy, subject, tmp_path):
    expected = numbers_of(run_measures(subject, [Toy()], [DENSE, SPARSE], [320, 256]))
    toy.runs.clear()
    toy.stop_at.append(SPARSE.name)
    with pytest.raises(KeyboardInterrupt):
        run(subject, tmp_path, lengths=(256, 320))
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["case"]["settings"] for line in lines] == [["dense"]]
    toy.stop_at.clear()
    groups = run(subject, tmp_path, lengths=(256, 320))
    assert toy.runs == [("dense", 256), (SPARSE.name, 256), ("dense", 320), (SPARSE.name, 320)]
    assert numbers_of(groups) == expected
    assert [group.kept for group in groups] == [1, 0]
    again = run(subject, tmp_path, lengths=(256, 320))
    assert len(toy.runs) == 4
    assert numbers_of(again) == expected
    assert [group.kept for group in again] == [2, 2]
    assert not temporary_files(tmp_path / "results.jsonl")


def other_weights(subject):
    return subject, {"identity": {"weights": "others"}}


def other_seed(subject):
    return dataclasses.replace(subject, seed=1), {}


def other_books(subject):
    book = subject.books[0].copy()
    book[300] += 1  # the second prompt
    return dataclasses.replace(subject, books=[book]), {}


def other_option(subject):
    return subject, {"measures": [Toy(samples=3)]}


def other_length(subject):
    return subject, {"lengths": [257]}


def other_policy(subject):
    return subject, {"settings": [DENSE, Setting(SPARSE.name, selector=Oracle(TopK(0.25)))]}


def other_batch_size(subject):
    return dataclasses.replace(subject, batch_size=2), {}


@pytest.mark.parametrize(
    "change", [other_weights, other_seed, other_books, other_option, other_length, other_policy, other_batch_size]
)
def test_nothing_else_is_taken_for_what_was_measured(toy, subject, tmp_path, change):
    run(subject, tmp_path)
    toy.runs.clear()
    changed, arguments = change(subject)
    run(changed, tmp_path, **arguments)
    assert SPARSE.name in [name for name, _ in toy.runs]
    assert ("dense" in [name for name, _ in toy.runs]) == (change is not other_policy)
    toy.runs.clear()
    run(subject, tmp_path)  # the first results are still there
    assert toy.runs == []


def test_other_gates_in_the_same_folder_are_measured(toy, subject, tmp_path):
    folder, settings = tmp_path / "gates", [Setting("gates", gates=tmp_path / "gates", policy=TopK(0.5))]

    def save(change):
        seer.attach(subject.model, seer.GateConfig())
        for gate in seer.hf.gates_of(subject.model):
            for parameter in gate.parameters():
                parameter.data.add_(change)
        seer.save_gates(subject.model, folder)
        seer.detach(subject.model)

    save(0.0)
    run(subject, tmp_path, settings=settings)
    run(subject, tmp_path, settings=settings)
    assert len(toy.runs) == 1
    save(0.5)
    run(subject, tmp_path, settings=settings)
    assert len(toy.runs) == 2


def test_what_does_not_say_what_it_is_is_measured_each_time(toy, subject, tmp_path):
    def selector(q, k, *, layer, scale, lengths):
        return Oracle(TopK(0.5))(q, k, layer=layer, scale=scale, lengths=lengths)

    settings = [Setting("mine", selector=selector)]
    for _ in range(2):
        run(subject, tmp_path, settings=settings)
    assert len(toy.runs) == 2
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2  # written all the same


@pytest.mark.parametrize("damage", ["number", "cut line", "arrays", "no arrays"])
def test_damaged_results_are_measured_again(toy, subject, tmp_path, caplog, damage):
    expected = numbers_of(run(subject, tmp_path))
    lines, arrays = tmp_path / "results.jsonl", sorted((tmp_path / "cases").iterdir())[0]
    if damage == "number":
        lines.write_text(lines.read_text().replace('"density": 1.0', '"density": 0.5', 1))
    elif damage == "cut line":
        lines.write_text(lines.read_text()[:-40])
    elif damage == "arrays":
        content = bytearray(arrays.read_bytes())
        content[len(content) // 2] ^= 1
        arrays.write_bytes(content)
    else:
        arrays.unlink()
    toy.runs.clear()
    assert numbers_of(run(subject, tmp_path)) == expected
    assert len(toy.runs) == 1
    assert "is measured again" in caplog.text
    toy.runs.clear()
    run(subject, tmp_path)
    assert toy.runs == []


def test_every_measure_is_the_same_when_it_was_kept(subject, tmp_path):
    options = {"samples": 2, "documents": 2, "repeats": 1, "tasks": ("single",), "method": "teacher_forcing"}
    kinds = [MEASURES[name] for name in ("retrieval", "perplexity", "timing")]
    measures = [
        kind(**{f.name: options[f.name] for f in dataclasses.fields(kind) if f.name in options}) for kind in kinds
    ]
    first = run(subject, tmp_path, measures, lengths=(640, 700))
    second = run(subject, tmp_path, measures, lengths=(640, 700))
    assert [(group.measure.name, group.length) for group in first] == [
        ("retrieval", 640), ("retrieval", 700), ("perplexity", 700), ("timing", 640), ("timing", 700),
    ]  # fmt: skip
    assert [group.kept for group in second] == [2, 2, 2, 1, 1]
    assert numbers_of(second) == numbers_of(first)
    assert [g.measure.table(g.results) for g in second] == [g.measure.table(g.results) for g in first]


def test_a_journal_wants_to_know_the_model(subject, tmp_path):
    with pytest.raises(ValueError, match="identity"):
        run(subject, tmp_path, identity={})


def test_prompts_are_made_before_anything_is_measured(toy, subject):
    with pytest.raises(ValueError, match="documents of 1024 tokens"):
        run_measures(subject, [Toy(), MEASURES["perplexity"](documents=1000)], [DENSE], [1024])
    assert toy.runs == []


def test_a_name_is_taken_once(monkeypatch):
    monkeypatch.delitem(MEASURES, "toy", raising=False)
    assert register(Toy) is Toy
    register(Toy)
    with pytest.raises(ValueError, match="already a measure called 'toy'"):
        register(type("Other", (Toy,), {}))
    monkeypatch.delitem(MEASURES, "toy")


def test_a_run_that_is_told_to_stop_ends_with_what_there_is_setting_by_setting(toy, subject, tmp_path):
    def stop():
        return len(toy.runs) >= 3

    shown, settings = [], [DENSE, SPARSE]
    common = {"journal": Journal(tmp_path), "identity": IDENTITY}
    groups = run_measures(subject, [TOY], settings, [256, 320], stop=stop, show=shown.append, **common)
    assert toy.runs == [("dense", 256), ("dense", 320), (SPARSE.name, 256)]
    assert [(group.length, len(group.results)) for group in groups] == [(256, 2), (320, 1)]
    assert sorted(group.length for group in shown) == [256, 320]
    rest = run_measures(subject, [TOY], settings, [256, 320], stop=lambda: False, **common)
    assert toy.runs[3:] == [(SPARSE.name, 320)]
    assert numbers_of(rest) == numbers_of(run_measures(subject, [TOY], settings, [256, 320]))
    toy.runs.clear()
    assert run_measures(subject, [TOY], settings, [256], stop=lambda: True) == []
    assert toy.runs == []


def test_what_is_on_disk_is_taken_after_the_time_is_up(toy, subject, tmp_path):
    expected = numbers_of(run(subject, tmp_path))
    journal = Journal(tmp_path)
    again = run_measures(subject, [TOY], [DENSE, SPARSE], [256], journal=journal, identity=IDENTITY, stop=lambda: True)
    assert numbers_of(again) == expected


def test_policies_with_many_numbers_are_told_apart():
    """A ``repr`` that leaves them out must not give the results of others."""
    budget = seer.Budget(0.1, blocks=(2.0, 9.0), factors=(0.5, 1.5))
    rule = seer.RelativeThreshold(0.6)
    for one, other in (
        (budget, dataclasses.replace(budget, factors=(0.5, 1.6))),
        (budget, dataclasses.replace(budget, layers=(0.5, 2.0))),
        (rule, dataclasses.replace(rule, layers=(0.5, 2.0))),
    ):
        assert _plain(one) != _plain(other)
        assert _plain(GateSelector(one)) != _plain(GateSelector(other))
    assert _plain(rule) == f"seerattention.policies.rules.{rule!r}"  # as in results of before
