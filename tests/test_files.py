"""Files that are either the old one or the new one."""

from __future__ import annotations

import os

import pytest

from seerattention.files import temporary_name, write_file


def test_writes_replace_and_leave_no_temporary_file(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    write_file(path, "one")
    write_file(path, b"two")
    assert [found.name for found in path.parent.iterdir()] == ["a.txt"]
    assert path.read_text() == "two"


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_file(path, "old")

    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert not temporary_name(path).exists()
