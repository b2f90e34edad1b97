"""``seer`` and ``seer convert`` as a user runs them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gate_folders import write_own, write_own_of_both_phases

GOLDEN = Path(__file__).parents[1] / "golden" / "prefill_llama_hd32"
RUN = [sys.executable, "-c", "from seerattention.cli import main; main()"]


def seer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def published(tmp_path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copy(GOLDEN / "gate_config.json", folder / "config.json")
    shutil.copy(GOLDEN / "attn_gate_weights.pth", folder)
    return folder


def test_convert(published, tmp_path):
    done = seer("convert", str(published), str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gates"]["block_size"] == 64
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "gate_config.json",
        "gates.safetensors",
        "README.md",
    }


def test_convert_errors_are_one_line(seer_command, tmp_path):
    done = seer_command("convert", tmp_path / "nothing", tmp_path / "out")
    assert done.exit_code == 1
    assert "no folder of gates" in done.stderr
    assert "Traceback" not in done.stderr


def test_join(seer_command, tmp_path):
    write_own(tmp_path / "prompts")
    write_own_of_both_phases(tmp_path / "decoding")
    done = seer("join", str(tmp_path / "prompts"), str(tmp_path / "decoding"), str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    policy = {"kind": "token_budget", "tokens": 64, "last_blocks_dense": 0}
    assert json.loads(done.stdout)["policies"]["decode"] == policy
    failed = seer_command("join", tmp_path / "decoding", tmp_path / "prompts", tmp_path / "out")
    assert failed.exit_code == 1
    assert "no gates for 'decode'" in failed.stderr


def test_help_lists_commands_and_imports_no_torch():
    code = (
        "import sys; from seerattention.cli import main; sys.argv = ['seer', '--help']\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout


def test_unknown_commands_fail():
    done = seer("frobnicate")
    assert done.returncode == 2
    assert "frobnicate" in done.stderr
