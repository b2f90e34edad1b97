"""The embedded model's weights are packed in the package, and unpacked into the cache once, by whoever asks first."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save

import seerattention as seer
from helpers import in_threads
from seerattention import files
from seerattention.distillation.identity import weights_digest
from seerattention.files import DamagedFileError, pack
from seerattention.testbed import cache
from seerattention.testbed.cache import unpacked
from testbed import card

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = Path(seer.__file__).parent / "testbed" / "model"
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "comparison" / "testbed.json"
#: Of the embedded model's weights before they were packed; a model that replaces it has another.
WEIGHTS_SHA256 = "55fd43eb901dd31d6d215926396566fc4d208a1902d66a3d637ce417b79de056"
WEIGHTS, OTHER_WEIGHTS = (save({"weight": torch.arange(n, dtype=torch.float32).bfloat16()}) for n in (5000, 7000))


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """The assets folder of the Hugging Face cache."""
    real = huggingface_hub.cached_assets_path
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", functools.partial(real, assets_dir=tmp_path / "assets"))
    monkeypatch.setattr(cache, "_own_folders", {})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "assets"


@pytest.fixture
def source(tmp_path):
    """A folder as the package embeds one, with tiny weights."""
    folder = tmp_path / "package" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.xz").write_bytes(pack(WEIGHTS))
    return folder


@pytest.fixture
def unpackings(monkeypatch):
    """The files that were unpacked."""
    done, real = [], files.unpack
    monkeypatch.setattr(cache, "unpack", lambda path: done.append(path.name) or real(path))
    return done


@pytest.fixture
def no_cache(assets):
    """A cache that cannot be written to, by anyone: permissions do not keep root out."""
    assets.write_text("a file where the folder would be")
    return assets


def tiny(source):
    return unpacked(source, "tiny")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_the_embedded_weights_are_the_ones_that_were_packed(assets):
    assert names_in(PACKAGED) == [
        "README.md", "config.json", "curves.png", "generation_config.json", "model.safetensors.xz", "tokenizer.json",
        "tokenizer_config.json", "training.json",
    ]  # fmt: skip
    folder = seer.testbed.model_path()
    assert folder.is_relative_to(assets)
    assert folder.name == seer.testbed.NAME  # by which gates know it
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256
    for path in PACKAGED.iterdir():
        if path.suffix != ".xz":
            assert (folder / path.name).read_bytes() == path.read_bytes()


def test_results_on_record_are_of_these_weights(assets):
    model, tokenizer = seer.testbed.load("cpu", torch.bfloat16)
    recorded = json.dumps(json.loads(RESULTS.read_text()))
    assert f'"weights": "{weights_digest(model)}"' in recorded
    assert len(tokenizer) == model.config.vocab_size


def test_it_is_unpacked_once_and_then_found(assets, source, unpackings):
    folder = tiny(source)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert names_in(folder) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    cache._sha256_of_state.cache_clear()  # as a new process
    assert tiny(source) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert unpackings == ["model.safetensors.xz"]


def test_another_version_has_another_folder(assets, source, unpackings):
    first = tiny(source)
    (source / "config.json").write_text('{"rope_theta": 1}')
    second = tiny(source)
    (source / "model.safetensors.xz").write_bytes(pack(OTHER_WEIGHTS))
    third = tiny(source)
    assert len({first, second, third}) == 3
    assert (second / "config.json").read_text() == '{"rope_theta": 1}'
    assert (third / "model.safetensors").read_bytes() == OTHER_WEIGHTS
    assert (first / "model.safetensors").read_bytes() == WEIGHTS  # an older version may be in use beside this one
    assert len(unpackings) == 3


def spoil_weights(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def replace_by_a_file(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("no folder")


@pytest.mark.parametrize(
    "damage",
    [
        spoil_weights,
        replace_by_a_file,
        lambda folder: (folder / "model.safetensors").write_bytes(WEIGHTS[:100]),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text('{"of": "another"}'),
        lambda folder: (folder / ".unpacked.json").unlink(),
        lambda folder: (folder / ".unpacked.json").write_text("{"),
    ],
    ids=["a bit", "a file in its place", "truncated", "no weights", "config", "no digests", "digests"],
)
@pytest.mark.parametrize("new_process", [True, False])
def test_a_damaged_folder_is_replaced(damage, new_process, assets, source, unpackings):
    folder = tiny(source)
    damage(folder)
    if new_process:
        cache._sha256_of_state.cache_clear()
    assert tiny(source) == folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "config.json").read_text() == "{}"
    assert len(unpackings) == 2
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]


def test_two_threads_unpack_once(assets, source, unpackings):
    found = in_threads(lambda: tiny(source))
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(unpackings) == 1


def test_processes_at_the_same_time_unpack_once(tmp_path):
    """The real model, which takes long enough for all of them to come while it is unpacked."""
    code = """
import sys
from seerattention import testbed
from seerattention.testbed import cache
real = cache.unpack
cache.unpack = lambda path: print("unpacks", flush=True) or real(path)
print("ready", flush=True)
sys.stdin.readline()
print(testbed.model_path(), flush=True)
"""
    environment = os.environ | {"HF_ASSETS_CACHE": str(tmp_path)}
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdin=pipe, stdout=pipe)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(len(words) for words in said) == [1, 1, 2]
    folder = Path(said[0][-1])
    assert all(words[-1] == str(folder) for words in said)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256


def test_where_there_are_no_locks_the_faster_process_wins(assets, source, monkeypatch, caplog):
    real = cache._unpack

    def unpack(found, target):
        real(found, target)
        if len(list(target.parent.glob(".*.partial"))) == 2:  # the other process, in the meantime
            (target.parent / "tiny").mkdir()
            real(found, target.parent / "tiny")
            monkeypatch.setattr(os, "replace", taken)

    def taken(source, target):
        raise OSError(39, "Directory not empty")

    def no_locks(self, *arguments, **options):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    monkeypatch.setattr(cache, "_unpack", unpack)
    folder = tiny(source)
    assert folder.is_relative_to(assets)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "cannot be locked" in caplog.text
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_cache_that_takes_nothing_gives_a_temporary_folder(no_cache, source, unpackings, caplog):
    with caplog.at_level(logging.WARNING):
        folder = tiny(source)
        assert tiny(source) == folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.name == "tiny"
    assert len(unpackings) == 1
    assert len(caplog.records) == 1
    assert "tiny cannot be unpacked into the Hugging Face cache (Corrupted assets folder" in caplog.text
    assert "Let HF_HOME name a folder that can be written to" in caplog.text
    (source / "config.json").write_text('{"new": 1}')
    assert (tiny(source) / "config.json").read_text() == '{"new": 1}'
    cache._remove(folder.parent, os.getpid() + 1)  # a forked process that ends
    assert folder.is_dir()
    cache._remove(folder.parent, os.getpid())
    assert not folder.parent.exists()
    assert tiny(source).is_dir()


def test_a_full_disk_gives_a_temporary_folder(assets, source, monkeypatch):
    real = cache._unpack

    def full(found, target):
        real(found, target)
        if target.is_relative_to(assets):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_unpack", full)
    folder = tiny(source)
    assert not folder.is_relative_to(assets)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not list(assets.rglob("*.partial"))
    cache._remove(folder.parent, os.getpid())


def test_the_temporary_folder_goes_with_its_process(tmp_path):
    (tmp_path / "assets").write_text("a file where the folder would be")
    (tmp_path / "temporary").mkdir()
    code = """
import os
from seerattention import testbed
folder = testbed.model_path()
child = os.fork()
if not child:
    raise SystemExit  # with all that is done at the end of a process
os.waitpid(child, 0)
assert (folder / "model.safetensors").stat().st_size > 30e6
print(folder)
"""
    environment = {"HF_ASSETS_CACHE": str(tmp_path / "assets"), "TMPDIR": str(tmp_path / "temporary")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert Path(run.stdout.strip()).is_relative_to(tmp_path / "temporary")
    assert not list((tmp_path / "temporary").iterdir())


def test_no_place_at_all_is_one_sentence(no_cache, source, monkeypatch):
    def nowhere(**options):
        raise PermissionError(13, "Permission denied", "/tmp")

    monkeypatch.setattr(cache.tempfile, "mkdtemp", nowhere)
    with pytest.raises(OSError, match=r"neither into the Hugging Face cache \(.*\) nor .*HF_HOME or TMPDIR"):
        tiny(source)


def test_a_read_only_cache_that_has_the_folder_is_enough(assets, source, unpackings, monkeypatch):
    def read_only(*arguments):
        raise OSError(30, "Read-only file system")

    folder = tiny(source)
    monkeypatch.setattr(cache, "write_folder", read_only)
    cache._sha256_of_state.cache_clear()
    assert tiny(source) == folder
    assert len(unpackings) == 1
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match="Read-only file system"):
        tiny(source)


def test_a_packed_file_that_is_damaged_is_named(assets, source):
    content = (source / "model.safetensors.xz").read_bytes()
    for damaged in (content[:-20], b"", content[:200] + b"x" + content[201:]):
        (source / "model.safetensors.xz").write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"model\.safetensors\.xz is damaged or truncated"):
            tiny(source)
    assert not list(assets.rglob("model.safetensors"))
    assert not list(assets.rglob("*.partial"))


def test_a_python_without_lzma_says_what_to_do(assets, source, monkeypatch):
    packed = source / "model.safetensors.xz"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lzma", None)
        with pytest.raises(ModuleNotFoundError, match="without the module lzma") as caught:
            tiny(source)
        assert f"xz --decompress --keep {packed}" in str(caught.value)
        (source / "model.safetensors").write_bytes(WEIGHTS)  # that was done
        assert (tiny(source) / "model.safetensors").read_bytes() == WEIGHTS
        packed.unlink()
        assert tiny(source) == source
    (source / "model.safetensors").unlink()
    packed.write_bytes(pack(WEIGHTS))
    folder = tiny(source)
    monkeypatch.setitem(sys.modules, "lzma", None)
    assert tiny(source) == folder  # what is unpacked needs it no more


@pytest.mark.parametrize("packed", [True, False])
def test_a_run_is_packaged_packed_for_the_package_only(packed, assets, tmp_path, monkeypatch):
    out, target = tmp_path / "run", tmp_path / "target"
    for name in (
        *(f"model/{name}" for name in card.CONFIGS),
        *card.TOKENIZER,
        *(f"gates/{name}" for name in card.GATES),
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    for name in ("summary.json", "dense.json", "log.jsonl"):
        (out / name).write_text("{}")
    (out / "model" / "model.safetensors").write_bytes(WEIGHTS)
    for name in ("read_checkpoint", "write_checkpoint", "draw_curves", "notes_of"):
        monkeypatch.setattr(card, name, lambda *arguments, **options: "")
    monkeypatch.setattr(card, "model_card", lambda *arguments: "card")
    monkeypatch.setattr(card, "stages", lambda summary: [])
    for now in (not packed, packed):  # what was there in the other form goes
        card.package(out, target, packed=now)
    there = {"model.safetensors", "model.safetensors.xz"} & set(names_in(target / "model"))
    assert there == {"model.safetensors.xz" if packed else "model.safetensors"}
    folder = unpacked(target / "model", "tiny")
    assert (folder == target / "model") is not packed
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
