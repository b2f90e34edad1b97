"""One prepared run folder for all tests of the recipe."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the recipe is a folder of the repository, not of the package

from .tiny import make_run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("prepared") / "run")


@pytest.fixture
def run_folder(prepared, tmp_path) -> Path:
    """A copy that the test may fill."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))
