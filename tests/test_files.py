"""Files that are either the old one or the new one."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from seerattention import files
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


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "can be written to"), (errno.EACCES, "can be written to")],
)
def test_what_to_do_is_said_and_the_type_stays(tmp_path, monkeypatch, number, advice):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(type(OSError(number, "")), match=rf"a\.txt.*{advice}"):
        write_file(tmp_path / "a.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*a\.txt: .*choose a folder"):
        write_file(tmp_path / "file" / "a.txt", "new")


def test_a_folder_that_cannot_be_flushed_does_not_fail_a_write_that_is_done(tmp_path, monkeypatch):
    """Some network file systems cannot. The new version is in its place, and nothing else may be said."""
    flush = os.fsync

    def refuse(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(number)

    monkeypatch.setattr(os, "fsync", refuse)
    write_file(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def age(path, hours):
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


def test_only_what_was_left_behind_is_removed(tmp_path):
    """By dead writers, or so long ago that no writer can live; of safetensors, whose names earlier versions left."""
    path = tmp_path / "a.safetensors"
    content = struct.pack("<Q", 2) + b"{}"
    host, process = files._HOST, 2**22 + 1  # beyond what Linux gives
    kept = {
        "of another machine": f".{path.name}.elsewhere.7.0123abcd.partial",
        "of this process": f".{path.name}.{host}.{os.getpid()}.0123abcd.partial",
        "without an owner": f".{path.name}.partial",
        "of another file": f".{path.name}.bak.{host}.{process}.0123abcd.partial",
        "of safetensors, young": ".tmpYoung1",
        "of somebody else": ".tmpOther1",
        "longer": ".tmpOther12",
    }
    removed = {
        "dead": f".{path.name}.{host}.{process}.0123abcd.partial",
        "of another machine, old": f".{path.name}.elsewhere.8.0123abcd.partial",
        "of safetensors, old": ".tmpAbC123",
        "of safetensors, empty": ".tmpEmpty1",
    }
    for name in (*kept.values(), *removed.values()):
        (tmp_path / name).write_bytes(content)
    (tmp_path / kept["of somebody else"]).write_bytes(b"something else")
    (tmp_path / removed["of safetensors, empty"]).write_bytes(b"")
    for name in (kept["of somebody else"], kept["longer"], *list(removed.values())[1:]):
        age(tmp_path / name, hours=25)
    write_file(path, content)
    assert {found.name for found in tmp_path.iterdir()} == {path.name, *kept.values()}
    # Beside other files safetensors did not leave anything.
    (tmp_path / ".tmpAbC123").write_bytes(content)
    age(tmp_path / ".tmpAbC123", hours=25)
    write_file(tmp_path / "a.txt", "new")
    assert (tmp_path / ".tmpAbC123").exists()
