"""The names that users import, and that importing the package costs and changes nothing."""

from __future__ import annotations

import importlib
import json
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


# Each in an interpreter that has imported nothing of the package yet.
FIRSTS = {
    "room": "import seerattention.distillation as room\nassert room.documents.open_documents",
    "file": "from seerattention.distillation.config import DistillConfig",
    "package": "import seerattention",
}
CODES = {
    f"{name} first": f"{first}\nimport seerattention as seer\nassert callable(seer.distill)\n"
    "from seerattention.distillation import distill\nassert seer.distill is distill\n"
    "assert type(seer) is type(__import__('sys'))"
    for name, first in FIRSTS.items()
} | {
    "rooms": "import seerattention as seer; assert callable(seer.ops.block_sparse_attention)\n"
    f"first = {{room: getattr(seer, room) for room in {ROOMS!r}}}\n"
    "for name in seer.__all__:\n    getattr(seer, name)\n"
    "for room, module in first.items():\n"
    "    assert getattr(seer, room) is module and module.__name__ == f'seerattention.{room}'",
    "former place": "from seerattention.hf.recall import block_recall\nassert 'attention mass' in block_recall.__doc__",
}
# One process imports torch and transformers, which takes seconds, and forks before it knows the package.
FORKS = """
import json, os, sys, traceback
import torch, transformers
from transformers import LlamaForCausalLM
assert not any(name.partition(".")[0] == "seerattention" for name in sys.modules)
errors = {}
for name, code in json.load(sys.stdin).items():
    read, write = os.pipe()
    if not (child := os.fork()):
        error = ""
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
        os.write(write, error[-4000:].encode())
        os._exit(0)
    os.close(write)
    with open(read) as said:
        errors[name] = said.read() or ("ended by itself" if os.waitpid(child, 0)[1] else "")
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=json.dumps(CODES), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("first", FIRSTS)
def test_distill_is_the_function_whatever_was_imported_before(errors, first):
    assert not errors[f"{first} first"]


def test_rooms_are_attributes_without_an_import_of_their_own(errors):
    assert not errors["rooms"]


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


def test_the_former_place_of_block_recall_works_in_a_fresh_process(errors):
    assert not errors["former place"]
