"""What `make test-gpu` deals out to several processes is every test, once."""

from __future__ import annotations

import importlib
import types

from tests.gpu import run

conftest = importlib.import_module("tests.gpu.conftest")


def test_shares_are_all_tests(monkeypatch):
    tests = [types.SimpleNamespace(path=f"test_{i}") for i in range(11)]
    path = run.HERE / "test_block_selection.py"
    assert len(run.shares(path)) > 1
    dealt = []
    for share in run.shares(path):
        monkeypatch.setenv(conftest.SHARE_VARIABLE, share)
        items, left_out = list(tests), []
        hook = types.SimpleNamespace(pytest_deselected=lambda items, out=left_out: out.extend(items))
        conftest.pytest_collection_modifyitems(types.SimpleNamespace(hook=hook), items)
        assert sorted(item.path for item in [*items, *left_out]) == sorted(item.path for item in tests)
        dealt += items
    assert sorted(item.path for item in dealt) == sorted(item.path for item in tests)


def test_files_that_are_shared_out_exist():
    assert all((run.HERE / name).is_file() for name in run.SHARES)
    assert run.shares(run.HERE / "test_hf.py") == ["1/1"]


def test_log_is_written_as_it_grows(tmp_path):
    path = tmp_path / "results" / "log.txt"
    log = run.Log(path)
    log.add("one")
    assert path.read_text() == "one\n"
    log.add("two")
    assert path.read_text() == "one\ntwo\n"


def test_a_signal_is_a_failure(monkeypatch):
    """A process that crashed has a negative status, which is less than that of one that passed."""
    monkeypatch.setattr(run.sys, "argv", ["run", "--processes", "1", "passes.py", "crashes.py"])
    monkeypatch.setattr(run, "run_job", lambda path, *rest: -11 if path.name == "crashes.py" else 0)
    assert run.main() == 1
    monkeypatch.setattr(run, "run_job", lambda *rest: 0)
    assert run.main() == 0
