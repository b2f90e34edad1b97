"""Tests of this folder need a CUDA device and are skipped without one."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


# "2/4": of every file's tests only each fourth, from the second on. Set by run.py, which runs the shares side by side.
SHARE_VARIABLE = "SEER_GPU_TESTS_SHARE"


def pytest_collection_modifyitems(config, items):
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if share := os.environ.get(SHARE_VARIABLE):
        first, count = map(int, share.split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != first - 1])
        items[:] = items[first - 1 :: count]
