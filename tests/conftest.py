"""Set up before any test module is imported: Triton's interpreter where there is no GPU, and shared fixtures."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

# Kernels look at this variable when they are decorated, so it must be set before the first import of one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Shells start jobs in the background with Ctrl-C ignored, and tests send that signal.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).parent))  # for `import helpers` from any test directory

import helpers
import quick_interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    quick_interpreter.install()


# Files whose tests need one thing that takes long to make: each is run whole, and first, by one process.
TOGETHER = (
    "hf/test_tensor_parallel.py",
    "ops/test_offline_compile.py",
    "testbed/test_smollm2.py",
    "test_public_api.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """``--dist loadgroup``, by files: pytest 9.2 and xdist 3.8 together lose the group of a test."""
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    return ByFile(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_finish(session):
    """Collections of garbage pass over what was imported: a whole one takes 0.01 s then, and not half a second."""
    gc.freeze()


@pytest.fixture
def nan_filled_empty(monkeypatch):
    """Within the test, torch.empty and torch.empty_like give NaN: what a kernel forgets to write shows."""
    helpers.fill_empty_with_nan(monkeypatch)


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """A test that leaves gradients off, or inference mode on, would break others far away."""
    yield
    left_off = torch.is_inference_mode_enabled() or not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left_off, "the test left gradients off"
