"""The names that users import, and that importing the package costs and changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import seerattention


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
    ["import seerattention.distill", "from seerattention.distill.config import DistillConfig", "import seerattention"],
)
def test_distill_is_the_function_whatever_was_imported_before(first):
    run(
        f"{first}\nimport seerattention as seer\nassert callable(seer.distill)\n"
        "from seerattention.distill import distill\nassert seer.distill is distill"
    )
