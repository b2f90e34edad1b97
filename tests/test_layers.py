"""The rooms of docs/architecture.md: imports run downward only, and importing the package does nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "seerattention"

# Highest first. A room may import any room of a lower level.
LEVELS = (
    {"cli"},
    {"evaluate", "distillation", "testbed"},
    {"measure"},
    {"tasks", "hf"},
    {"baselines"},
    {"selectors"},
    {"gates", "policies"},
    {"blocks", "config", "files"},
    {"_config_checks"},
    {"ops"},
)
# The only import inside one level: a policy is stored with gates.
PEERS = {("gates", "policies")}
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(source: str, package: list[str]) -> list[tuple[int, str]]:
    """Every absolute module or name that ``source`` imports, with its line: at the top, in functions, for type checks.

    ``package`` is the package the file belongs to, as a list of names; relative imports are resolved against it.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = [node.module] if node.module else []
            if node.level:
                module = package[: len(package) - node.level + 1] + module
            found += [(node.lineno, ".".join([*module, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and _calls_import(node):
            found.append((node.lineno, _dynamic_name(node, package)))
    return found


def _calls_import(node: ast.Call) -> bool:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__") and bool(node.args) and isinstance(node.args[0], ast.Constant)


def _dynamic_name(node: ast.Call, package: list[str]) -> str:
    name = str(node.args[0].value)
    dots = len(name) - len(name.lstrip("."))
    return ".".join([*package[: len(package) - dots + 1], name.lstrip(".")]) if dots else name


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def check_rooms(room: str, imports: list[tuple[int, str]]) -> list[str]:
    """What is wrong with these imports of a file of ``room``."""
    wrong = []
    for line, name in imports:
        parts = name.split(".")
        if parts[0] != "seerattention":
            continue
        target = parts[1] if len(parts) > 1 else ""
        if target in ("", "__version__"):
            continue  # the package itself: its names are imported lazily and its version is a string
        if target not in LEVEL_OF:
            wrong.append(f"line {line}: {name} goes through the public API; import it from its room")
        elif target != room and LEVEL_OF[target] <= LEVEL_OF[room] and (room, target) not in PEERS:
            wrong.append(f"line {line}: {room} imports {name}, which is not below it")
    return wrong


def package_of(path: Path) -> list[str]:
    return list(path.relative_to(PACKAGE.parent).parent.parts)


def test_every_room_has_a_level():
    rooms = {room_of(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms == set(LEVEL_OF)


@pytest.mark.parametrize("room", sorted(LEVEL_OF))
def test_imports_run_downward(room):
    wrong = {}
    for path in FILES:
        if room_of(path) == room and (bad := check_rooms(room, imported_modules(path.read_text(), package_of(path)))):
            wrong[str(path.relative_to(ROOT))] = bad
    assert not wrong


def test_peers_that_are_listed_exist():
    """The list of exceptions stays honest: an entry that no file needs has to go."""
    used = {
        (room_of(path), name.split(".")[1])
        for path in FILES
        for _, name in imported_modules(path.read_text(), package_of(path))
        if name.startswith("seerattention.")
    }
    assert used >= PEERS


def test_ops_can_be_lifted_out():
    """ops needs torch, triton and the standard library, and reaches its own files by relative imports only."""
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (PACKAGE / "ops").rglob("*.py"):
        for line, name in imported_modules(path.read_text(), package_of(path)):
            inside = name.split(".")[:2] == ["seerattention", "ops"]
            assert inside or name.split(".")[0] in allowed, f"{path.name}, line {line}: {name}"
        absolute = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("seerattention")
        ]
        assert not absolute, f"{path.name}: absolute imports of the package"


@pytest.mark.parametrize("room", ["ops", "gates", "policies", "selectors", "baselines", "blocks", "config", "tasks"])
def test_no_hugging_face_below_hf(room):
    for path in FILES:
        if room_of(path) == room:
            names = {name.split(".")[0] for _, name in imported_modules(path.read_text(), package_of(path))}
            # Gates are files of safetensors, and may be asked for from the hub.
            allowed = {"gates": {"safetensors", "huggingface_hub"}}.get(room, set())
            forbidden = {"transformers", "accelerate", "huggingface_hub", "datasets", "safetensors"} - allowed
            assert not names & forbidden, path.name


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("ops", "from ..policies import Dense"),
        ("hf", "from ..measure import record"),
        ("hf", "def f():\n    from ..distillation import distill"),
        ("gates", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import seerattention.hf.attach"),
        ("policies", "from . import gates"),
        ("tasks", "import importlib\nimportlib.import_module('seerattention.cli')"),
        ("evaluate", "from seerattention import attach"),
    ],
)
def test_the_check_finds(room, source):
    package = ["seerattention"] if room == "policies" else ["seerattention", room]
    assert check_rooms(room, imported_modules(source, package))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_gates_on_disk_need_no_hugging_face():
    """What a serving engine does: ops, gates and trained weights, with torch and safetensors alone."""
    code = """
import sys
import seerattention as seer
import seerattention.ops, seerattention.gates
from seerattention.gates.checkpoint import read_checkpoint
from seerattention.gates import build_gate
checkpoint = read_checkpoint(seer.testbed.gates_path())
shape = checkpoint.base_model
gates = {
    layer: build_gate(
        checkpoint.gate_config.prefill, block_size=checkpoint.gate_config.block_size,
        num_heads=shape["num_attention_heads"], num_kv_heads=shape["num_key_value_heads"], head_dim=shape["head_dim"],
    )
    for layer in range(shape["num_hidden_layers"])
}
checkpoint.load_into(gates)
loaded = {"transformers", "accelerate", "huggingface_hub", "tokenizers"} & set(sys.modules)
assert not loaded, loaded
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_import_does_nothing():
    """Neither output, nor heavy imports, nor CUDA, nor a change of the environment or of torch's settings."""
    code = """
import os, sys
environment = dict(os.environ)
import torch
settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().sum())
import seerattention
heavy = {"triton", "transformers", "accelerate", "datasets", "matplotlib", "numba"} & set(sys.modules)
assert not heavy, heavy
for name in seerattention.__all__:
    getattr(seerattention, name)
assert not torch.cuda.is_initialized()
assert settings == (
    torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().sum()
)
changed = {k for k in os.environ.keys() | environment.keys() if os.environ.get(k) != environment.get(k)}
assert not {name for name in changed if "TORCH" not in name}, changed
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_works_without_triton():
    """The package imports and its ops run where triton is not installed (macOS, Windows, CPU machines)."""
    code = """
import sys
sys.modules["triton"] = None
import importlib, pkgutil
import torch
import seerattention
for module in pkgutil.walk_packages(seerattention.__path__, "seerattention."):
    if not module.name.rpartition(".")[2].startswith(("triton", "hopper")):
        importlib.import_module(module.name)
from seerattention import BlockIndices
from seerattention.ops import block_sparse_attention, pooled_attention
q, k, v = torch.randn(3, 1, 2, 130, 16)
target = pooled_attention(q, k)
blocks = BlockIndices.from_mask(torch.ones(1, 2, 3, 3, dtype=torch.bool).tril(), block_size=64)
dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(block_sparse_attention(q, k, v, blocks), dense)
assert not any(name.startswith("triton.") for name in sys.modules)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_tracked_tree_is_small():
    """What git tracks stays under 50 MiB, weights included, so that a clone is quick."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, or no git")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    size = sum(path.stat().st_size for path in files if path.is_file())
    assert size < 50 * 2**20, f"{size / 2**20:.1f} MiB are tracked"
