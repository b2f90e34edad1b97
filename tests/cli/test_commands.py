"""What holds for every command: listed, helped, imported only when run, mistakes in a sentence."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from seerattention import ops
from seerattention.cli import COMMANDS, env
from seerattention.cli.common import parse_list, token_count
from seerattention.cli.demo import DEMO_MINUTES
from seerattention.cli.demo_plan import DemoPlan

ROOT = Path(__file__).parents[2]
OPS = {
    path.parent.name + path.stem.removeprefix("interface")
    for path in ROOT.glob("src/seerattention/ops/*/interface*.py")
}
NAMES = [name for name, _, _ in COMMANDS]


def test_every_command_is_listed(seer_process):
    result = seer_process("--help")
    assert result.returncode == 0
    for name in NAMES:
        assert name in result.stdout


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_the_command(seer_command, name):
    result = seer_command(name, "--help")
    assert result.exit_code == 0
    assert f"Usage: seer {name}" in " ".join(result.stdout.split()).replace("root", "seer")
    assert "--" in result.stdout


def test_a_command_imports_no_other():
    code = (
        "import sys, seerattention.cli as cli\n"
        "cli.build('env')\n"
        "loaded = [m for m in sys.modules if m.startswith('seerattention.cli.')]\n"
        "assert sorted(loaded) == ['seerattention.cli.common', 'seerattention.cli.env'], loaded\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command"),
        (["eval", "--frobnicate"], "No such option"),
        (["eval", "--samples", "0"], "samples"),
        (["eval", "--tasks", "haystack"], "choose from single"),
        (["eval", "--gates", "none", "--measure", "speed"], "choose from retrieval"),
        (["eval", "--gates", "none", "--lengths", "long"], "'long' is not valid"),
        (["eval", "--gates", "none", "--densities", "0.5,2"], "in (0, 1]"),
        (["eval", "--gates", "none", "--model", "./no-such-model"], "no model folder"),
        (["eval", "--gates", "none", "--thresholds", "0.1"], "needs --gates"),
        (["eval", "--gates", "none", "--device", "quantum"], "no torch device"),
        (["inspect", "--model", "./x"], "--gates is needed"),
        (["inspect", "--gates", "./x", "--text", "./no-such-text"], "no such file"),
    ],
)
def test_mistakes_get_a_sentence_and_no_traceback(seer_command, arguments, message):
    result = seer_command(*arguments)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.stderr.split())
    assert len(result.stderr) < 1000
    assert result.stdout == ""


def test_a_mistake_in_a_process_of_its_own(seer_process):
    result = seer_process("eval", "--gates", "none", "--model", "./no-such-model")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: no model folder at ./no-such-model"
    assert "Traceback" not in result.stderr


def test_the_minutes_of_the_demo_agree(seer_command):
    told = re.findall(r"(\d+) minutes on 2 CPU cores", (ROOT / "README.md").read_text())
    help_text = " ".join(re.sub("[│\n]", " ", seer_command("demo", "--help").stdout).split())
    told += re.findall(r"about (\d+) minutes on 2 CPU cores", help_text)
    assert len(told) >= 2
    assert {float(minutes) for minutes in told} == {DEMO_MINUTES}
    assert DemoPlan().seconds == DemoPlan.choose("cpu").seconds == DemoPlan.choose("cuda").seconds == 60 * DEMO_MINUTES


def test_env_names_what_a_bug_report_needs(seer_command):
    result = seer_command("env", "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert set(data["environment"]["versions"]) >= {"python", "torch", "transformers", "triton", "seerattention"}
    assert set(data["implementations"]["cpu"]) == OPS
    assert "llama" in data["support"]["model families"]
    table = seer_command("env").stdout
    assert data["environment"]["versions"]["torch"] in table
    assert data["implementations"]["cpu"]["block_sparse_attention"] in table


def test_env_lacks_no_op():
    """Each public op of the package is one that is shown, or one of the functions of a folder that is."""
    shown = env.ops()
    assert set(shown) == OPS >= {"block_sparse_attention", "gate_scores", "pooled_attention_decode"}
    for name in ops.__all__:
        function = getattr(ops, name)
        room = function.__module__.split(".")[2]
        if not isinstance(function, type) and room != "indices" and name != "dense_indices":
            assert name in shown or room in shown, name
    for names in shown.values():
        assert "reference" in names


def test_env_says_when_there_is_no_compiler(seer_command, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    data = json.loads(seer_command("env", "--json").stdout)
    assert data["environment"]["compiler"] is None
    assert "torch.compile needs one" in seer_command("env").stdout.replace("\n", " ")


def test_lists_and_lengths():
    assert parse_list(" 4K, 512,", token_count, "lengths") == [4096, 512]
    with pytest.raises(ValueError, match="--lengths is empty"):
        parse_list(",", token_count, "lengths")


def test_float32_models_are_not_left_in_it_on_a_gpu():
    import torch

    from seerattention.cli.opening import in_fast_precision

    for dtype, device, expected in [
        (torch.float32, "cuda:0", torch.bfloat16),
        (torch.float32, "cpu", torch.float32),
        (torch.float16, "cuda", torch.float16),
    ]:
        model = torch.nn.Linear(2, 2, dtype=dtype)
        model.dtype = dtype
        assert in_fast_precision(model, device).weight.dtype == expected
