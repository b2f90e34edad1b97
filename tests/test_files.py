"""Files that are either the old one or the new one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from subprocess import PIPE

import pytest

from seerattention.files import DamagedFileError, read_json, temporary_files, write_file


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
    assert not temporary_files(path)


def test_what_a_killed_writer_left_is_removed_and_a_living_one_kept(tmp_path):
    path = tmp_path / "a.txt"
    code = "import os, sys; from pathlib import Path; from seerattention.files import replacing\n"
    code += f"with replacing(Path({str(path)!r})) as t:\n    t.write_text('half'); {{}}"
    run = [sys.executable, "-c"]
    killed = subprocess.run([*run, code.format("os.kill(os.getpid(), 9)")], check=False)
    assert killed.returncode == -9
    assert len(temporary_files(path)) == 1
    living = subprocess.Popen([*run, code.format("print(flush=True); sys.stdin.read()")], stdin=PIPE, stdout=PIPE)
    living.stdout.readline()
    assert len(temporary_files(path)) == 1  # its own: what was left behind has gone
    write_file(path, "new")
    assert path.read_text() == "new"
    living.communicate()
    assert living.returncode == 0
    assert path.read_text() == "half"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_two_writers_do_not_tear_each_others_files(tmp_path):
    path = tmp_path / "a.bin"
    contents = [bytes([i]) * 200_000 for i in range(8)]

    def write(content):
        for _ in range(20):
            write_file(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_bytes() in contents
    assert path.read_bytes() in contents
    assert not temporary_files(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_named(tmp_path, monkeypatch, number):
    path = tmp_path / "a.txt"
    write_file(path, "old")

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match=r"cannot write .*a\.txt: .*; what was there before is unchanged") as raised:
        write_file(path, "new")
    assert raised.value.errno == number
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe{}",
        b'{"a": NaN}',
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b"null",
    ],
    ids=range(8),
)
def test_json_that_is_none_names_the_file(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a\.json"):
        read_json(path)
