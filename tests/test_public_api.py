"""The names that users import, and that importing the package costs and changes nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import seerattention

PACKAGE = Path(seerattention.__file__).parent


def is_room(path: Path) -> bool:
    """A public module or package of the package; not what is left of one that was renamed."""
    return not path.stem.startswith("_") and ((path / "__init__.py").exists() or path.suffix == ".py")


ROOMS = sorted(path.stem for path in PACKAGE.iterdir() if is_room(path))


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", seerattention.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(seerattention, name)
    assert name == "__version__" or value.__doc__


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        seerattention.no_such_name  # noqa: B018


def test_import_is_lazy():
    run("import sys, seerattention; assert not {'torch', 'transformers', 'triton'} & set(sys.modules)")


def test_nothing_is_registered_before_attach():
    run(
        "import seerattention.hf\n"
        "from transformers import AttentionInterface\n"
        "assert 'seer' not in AttentionInterface().valid_keys()"
    )


@pytest.mark.parametrize(
    "first",
    [
        "import seerattention.distillation as room\nassert room.documents.open_documents",
        "from seerattention.distillation.config import DistillConfig",
        "import seerattention",
    ],
)
def test_distill_is_the_function_whatever_was_imported_before(first):
    run(
        f"{first}\nimport seerattention as seer\nassert callable(seer.distill)\n"
        "from seerattention.distillation import distill\nassert seer.distill is distill\n"
        "assert type(seer) is type(__import__('sys'))"
    )


def test_rooms_are_attributes_without_an_import_of_their_own():
    run(
        "import seerattention as seer; assert callable(seer.ops.block_sparse_attention)\n"
        f"first = {{room: getattr(seer, room) for room in {ROOMS!r}}}\n"
        "for name in seer.__all__:\n    getattr(seer, name)\n"
        "for room, module in first.items():\n"
        "    assert getattr(seer, room) is module and module.__name__ == f'seerattention.{room}'"
    )


def test_every_room_is_offered():
    """Each of them is found when nothing has imported it before."""
    assert set(ROOMS) <= set(dir(seerattention))


def test_no_public_name_hides_a_room():
    """A name that is a function here and a module there depends on what was imported first."""
    functions = {name for name in seerattention.__all__ if not isinstance(getattr(seerattention, name), ModuleType)}
    assert not functions & set(ROOMS)


def test_the_former_name_of_the_room_says_that_it_is_gone():
    with pytest.raises(ModuleNotFoundError, match=r"seerattention\.distill"):
        importlib.import_module("seerattention.distill")


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("seerattention.hf.recall", "block_recall"),
        ("seerattention.hf.recall", "recall_sums"),
        ("seerattention.hf", "Statistics"),
        ("seerattention.hf", "calibrate"),
        ("seerattention.hf", "record"),
    ],
)
def test_what_measures_is_found_where_it_was(former, name):
    """With a warning that points at the line that asks for it."""
    module = importlib.import_module(former)
    with pytest.warns(DeprecationWarning, match=f"{former}.{name} has moved: .*seerattention.measure") as caught:
        assert getattr(module, name) is getattr(seerattention.measure, name)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def test_the_former_place_of_block_recall_works_in_a_fresh_process():
    run("from seerattention.hf.recall import block_recall\nassert 'attention mass' in block_recall.__doc__")
