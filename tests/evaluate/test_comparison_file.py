"""Comparisons of several folders, and as one file: nothing that is shown changes."""

import json

import numpy as np
import pytest

from seerattention.evaluate.comparison import _MEASURES, RUN, Comparison, RunResult
from seerattention.evaluate.comparison_file import load_comparison, open_comparison, save_comparison, shrunk
from seerattention.evaluate.comparison_tables import summary_table, task_table
from seerattention.evaluate.equal_density import equal_density_table
from seerattention.evaluate.journal import Journal
from seerattention.files import DamagedFileError

from .comparison_folder import LENGTHS, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("results"))


def shown(comparison):
    tables = [make(comparison, n) for n in comparison.lengths for make in (summary_table, task_table)]
    tables += [equal_density_table(comparison, n) for n in comparison.lengths]
    return [(table.headers, table.rows, table.caption) for table in tables]


def part_of(folder, target, keep, prompts="p", **facts):
    """A folder with some of the cases of another, as a process with other options would have left it."""
    whole, found = Journal(folder), Journal(target)
    for line in whole.lines():
        case = line["case"]
        if case["measure"] == RUN:
            told = {**line["results"][0], "command": ["seer", "compare", target.name], **facts}
            found.add(case, "run", [RunResult(told)])
        elif keep(case):
            results = [_MEASURES[case["measure"]].restore(*each) for each in whole.read(line)]
            found.add(case | {"prompts": prompts}, line["digest"], results)
    return target


def test_folders_of_one_model_are_joined(folder, tmp_path):
    whole = Comparison.read(folder)
    gates = part_of(folder, tmp_path / "a", lambda case: case["settings"][-1].startswith(("dense", "gates")))
    others = part_of(folder, tmp_path / "b", lambda case: not case["settings"][-1].startswith(("dense", "gates")))
    joined = Comparison.read(gates, others)
    assert shown(joined) == shown(whole)
    assert joined.facts["commands"] == [["seer", "compare", "a"], ["seer", "compare", "b"]]
    assert joined.score_change(joined.entries[LENGTHS[0], "<xattention>, project rule 0.1"]) is not None
    alone = Comparison.read(others)
    assert all(alone.score_change(entry) is None for entry in alone.entries.values())  # nothing to be held against


def test_other_prompts_are_left_out_when_folders_are_joined(folder, tmp_path):
    other = part_of(folder, tmp_path / "a", lambda case: case["settings"][-1].startswith("<x"), prompts="others")
    dense = part_of(folder, tmp_path / "b", lambda case: case["settings"][-1].startswith(("dense", "gates")))
    joined = Comparison.read(other, dense)
    assert not any(entry.name.startswith("<x") and entry.tasks is not None for entry in joined.entries.values())
    assert joined.left_out == 12  # tasks, perplexity and times at two lengths and densities


def test_folders_of_other_models_are_refused(folder, tmp_path):
    other = part_of(folder, tmp_path / "b", lambda case: True, weights="other")
    with pytest.raises(ValueError, match="are not one comparison: weights differs"):
        Comparison.read(folder, other)


def test_a_file_gives_everything_back_that_is_shown(folder, tmp_path):
    whole = Comparison.read(folder)
    names = ["gates, own rule 0.1", "oracle, own rule 0.1"]
    path = tmp_path / "saved" / "model.json"
    save_comparison(path, whole, names, benchmark="comparison")
    found = open_comparison([path])
    assert shown(found) == shown(whole)
    assert found.facts["model"] == whole.facts["model"]
    assert json.loads(path.read_text())["benchmark"] == "comparison"
    assert [e.name for e in found.entries.values() if e.maps is not None] == names
    for name in names:
        mine, theirs = found.entries[LENGTHS[0], name].maps, shrunk(whole.entries[LENGTHS[0], name].maps)
        np.testing.assert_array_equal(mine.target, theirs.target)
        np.testing.assert_array_equal(mine.selected, theirs.selected)
        np.testing.assert_array_equal(mine.densities, theirs.densities)
        assert (mine.prediction is None) == (theirs.prediction is None)
    path.with_suffix(".npz").unlink()
    assert not any(entry.maps for entry in load_comparison(path).entries.values())
    path.write_text("{}")
    with pytest.raises(DamagedFileError, match="not a comparison"):
        load_comparison(path)


def test_files_and_folders_are_joined_where_they_are_of_the_same_prompts(folder, tmp_path):
    whole = Comparison.read(folder)
    some, path = Comparison.read(folder), tmp_path / "some.json"
    some.entries = {key: entry for key, entry in some.entries.items() if entry.is_dense or "gates" in entry.name}
    assert 2 < len(some.entries) < len(whole.entries)
    save_comparison(path, some)
    assert shown(open_comparison([path, folder])) == shown(open_comparison([folder, path])) == shown(whole)
    numbers = json.loads(path.read_text())
    dense = next(each for each in numbers["settings"] if not each["contender"])
    dense["perplexity"]["document_losses"][0] += 0.5
    path.write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match="not of the same prompts of"):
        open_comparison([path, folder])
    path.write_text(json.dumps({**numbers, "weights": "other"}))
    with pytest.raises(ValueError, match="weights differs"):
        open_comparison([path, folder])


def test_maps_are_shrunk_by_the_largest_of_neighbours(folder):
    maps = next(entry.maps for entry in Comparison.read(folder).entries.values() if entry.maps is not None)
    big = np.zeros((9, 2, 130, 130), dtype=np.uint8)
    big[8, 1, 129, 3] = 7
    wide = type(maps)(
        "x", 0.1, list(range(0, 18, 2)), [0, 5], 64, maps.recall, maps.densities, big, None, big.astype(bool)
    )
    found = shrunk(wide)
    assert found.layers == [0, 6, 10, 16]
    assert found.heads == [0, 5]
    assert found.block_size == 192
    assert found.target.shape == (4, 2, 44, 44)
    assert found.target[3, 1, 43, 1] == 7
    assert found.target.sum() == 7
    assert found.selected.sum() == 1
