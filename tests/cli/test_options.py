"""Every option is checked before any work: one sentence that names it, nothing loaded, nothing written."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
import typer

from seerattention import testbed
from seerattention.cli import COMMANDS, build
from seerattention.cli.common import parse_list, resolve_device, token_count
from seerattention.cli.options import check_output

LENGTHS = ["0", "1", "-4K", "16k4", "1.5K", "K", "", "4 K", "٤", "1e3", "nan", "0K"]
NOT_COUNTS = ["0", "-1", "1.5", "nan", "many"]
NOT_OPTIONAL_COUNTS = ["-1", "1.5", "nan"]
SEEDS = ["-1", str(2**63), "0.5"]
DENSITIES = ["0", "2", "nan", "inf", "-0.1", "0.5,1.01", "half", ",", ""]
DTYPES = ["int8", "float64", "float8_e4m3fn", "fp16", ""]
DEVICES = ["cuda", "cuda:9", "quantum", "meta", ""]
PLACES = ["{file}", "{file}/deeper"]
MODELS = ["./nothing", "a/b/c", "{file}", "{folder}", ""]
GATES = ["./nothing", "a/b/c", "{file}", ""]
DATA = ["./nothing", "nothing.jsonl", "{folder}", "{file}", "{damaged}", ""]

COMMON = {
    "--model": MODELS,
    "--data": DATA,
    "--gates": GATES,
    "--output": PLACES,
    "--dtype": DTYPES,
    "--device": DEVICES,
    "--seed": SEEDS,
}
# Command -> option -> values that make no sense. A value in braces is one of the places of the fixture.
WRONG = {
    "demo": {
        "--model": [*MODELS, "llama", "owner/model"],
        "--minutes": ["0", "-1", "nan", "inf", "soon"],
        "--seed": SEEDS,
        "--output": PLACES,
        "--device": DEVICES,
    },
    "distill": {
        **COMMON,
        "--length": [*LENGTHS, "64"],
        "--batch-size": NOT_COUNTS,
        "--accumulation": NOT_COUNTS,
        "--steps": NOT_OPTIONAL_COUNTS,
        "--learning-rate": ["0", "-1", "nan", "inf"],
        "--warmup": ["-1", "0.5"],
        "--clip-norm": ["-1", "nan", "inf"],
        "--rows": ["0", "-1", "1.5", "2.7", "nan", "inf", "-inf"],
        "--skip-rows": ["-0.1", "1", "nan"],
        "--last-rows": NOT_OPTIONAL_COUNTS,
        "--reduction": ["mean", ""],
        "--target": ["mass", "row_sum", ""],
        "--phase": ["all", ""],
        "--block-size": ["0", "48", "-64", "256"],
        "--k-pooling": ["median", "", "max,max"],
        "--q-pooling": ["median", ""],
        "--form": ["fine", ""],
        "--q-pitch": ["0", "3", "24", "256", "8.5"],
        "--k-pitch": ["0", "3", "24", "256", "8.5"],
        "--query-window": ["0", "-1", "65", "8.5"],
        "--tile-score": ["mean", ""],
        "--gate-hidden-size": ["-2", "7", "1000000000"],
        "--document-tokens": NOT_OPTIONAL_COUNTS,
        "--repeats": ["-0.1", "1.1", "nan", "inf", "half"],
        "--tasks": ["-0.1", "1.1", "nan", "inf", "half"],
        "--eval-sequences": NOT_OPTIONAL_COUNTS,
        "--eval-every": NOT_OPTIONAL_COUNTS,
        "--eval-density": ["0", "2", "nan"],
        "--save-every": NOT_OPTIONAL_COUNTS,
        "--save-seconds": ["-1", "nan", "inf"],
    },
    "calibrate": {
        **{option: values for option, values in COMMON.items() if option != "--seed"},
        "--length": LENGTHS,
        "--sequences": NOT_COUNTS,
        "--densities": [*DENSITIES, "1"],
        "--shortest": [*LENGTHS, "2K", "64K"],
        "--relative-threshold": [*DENSITIES, "1", "0.1,0.2"],
    },
    "eval": {
        **COMMON,
        "--measure": ["speed", ","],
        "--tasks": ["haystack", ","],
        "--method": ["guess", ""],
        "--selectors": ["guess", "", "oracle,", "oracle:policy", "oracle:policy=top_k(2)", "oracle,oracle"],
        "--lengths": [*LENGTHS, "4K,0", ","],
        "--densities": DENSITIES,
        "--thresholds": ["1", "-0.1", "nan", "high", ",", ""],
        "--samples": NOT_COUNTS,
        "--questions": NOT_COUNTS,
        "--documents": NOT_COUNTS,
        "--repeats": NOT_COUNTS,
        "--batch-size": NOT_COUNTS,
        "--lm-eval-tasks": ["nothing.yaml", "{folder}/task.yaml", ",", ""],
        "--limit": NOT_COUNTS,
        "--num-fewshot": NOT_OPTIONAL_COUNTS,
        "--compare-gates": ["./nothing", "fine=./nothing", "={folder}", "fine=", ",", ""],
        "--seconds": ["-1", "nan", "inf", "soon"],
        "--rope-scaling": ["yarn", "yarn:1", "yarn:nan", "llama3:2", "2", ""],
    },
    "compare": {
        **COMMON,
        "--preset": ["slow", ""],
        "--tasks": ["haystack", ","],
        "--selectors": ["guess", "", "oracle,", "oracle:policy", "oracle,oracle", "gate:policy=top_k(0.1)"],
        "--lengths": [*LENGTHS, "4K,0", ","],
        "--densities": DENSITIES,
        "--rules": ["mine", ","],
        "--protocols": ["mine", ","],
        "--samples": NOT_COUNTS,
        "--documents": NOT_OPTIONAL_COUNTS,
        "--repeats": NOT_OPTIONAL_COUNTS,
        "--answers": ["guess", ""],
        "--qa-data": ["./nothing", "{folder}", "{file}"],
        "--batch-size": NOT_COUNTS,
    },
    "report": {"--output": PLACES, "--gates": ["./nothing", "{folder}", ""], "--selection": ["./nothing", "{file}"]},
    "inspect": {
        "--model": MODELS,
        "--data": DATA,
        "--gates": GATES,
        "--text": ["./nothing", "{folder}"],
        "--output": PLACES,
        "--dtype": DTYPES,
        "--device": DEVICES,
        "--length": LENGTHS,
        "--density": ["0", "2", "nan"],
        "--layers": ["-1", "1.5", "first", ",", "0-3"],
        "--heads": ["-1", "1.5", "first", ","],
    },
    "bench": {
        "--model": MODELS,
        "--dtype": DTYPES,
        "--device": DEVICES,
        "--lengths": [*LENGTHS, "64", ","],
        "--densities": DENSITIES,
        "--heads": [*NOT_COUNTS, "5"],
        "--kv-heads": [*NOT_COUNTS, "5"],
        "--head-dim": [*NOT_COUNTS, "512"],
        "--block-size": ["0", "48", "-64"],
        "--seconds": ["-1", "nan", "inf"],
    },
    "convert": {"DESTINATION": PLACES},
    "join": {"DESTINATION": PLACES},
    "env": {},
}
# Options that take any text, and positions: nothing can be wrong with them before they are used.
FREE = {"--text-field", "SOURCE", "PREFILL", "DECODE", "RESULTS"}
# Sentences about models and texts that are clear without the option's name; most texts are named by their file.
CLEAR = {
    "--model": ("no model folder at",),
    "--data": ("no such file or folder: ", "no text in folder ", "name of the texts is empty", "{file}", "{damaged}"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "file").write_text("not a folder")
    (folder / "empty").mkdir()
    (folder / "damaged.jsonl.zst").write_text('{"text": "not compressed"}\n')
    return {"file": folder / "file", "folder": folder / "empty", "damaged": folder / "damaged.jsonl.zst"}


class WorkBegan(BaseException):
    """Neither the command nor the runner catches it."""


@pytest.fixture
def nothing_works(monkeypatch):
    """Loading a model, downloading or measuring raises WorkBegan."""

    def work(*args, **kwargs):
        raise WorkBegan

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", work)
    monkeypatch.setattr(testbed, "load", work, raising=False)
    monkeypatch.setattr("seerattention.evaluate.bench.bench_attention", work)
    monkeypatch.setattr("huggingface_hub.snapshot_download", work)


@pytest.mark.parametrize("command", WRONG)
def test_wrong_options_get_a_sentence_before_any_work(
    command, seer_command, arguments, places, nothing_works, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for option, values in WRONG[command].items():
        for value in values:
            given = [value.format(**places)] if option.isupper() else [f"{option}={value.format(**places)}"]
            result = seer_command(command, *arguments[command], *given)
            said = " ".join(result.stderr.split())
            about = f"{command} {option}={value}: {said} {result.exception!r}"
            assert result.exit_code in (1, 2), about
            assert isinstance(result.exception, SystemExit), about
            clear = [text.format(**places) for text in CLEAR.get(option, ())]
            assert any(text in said for text in (option, *clear)), about
            assert len(said) < 600, about
            if result.exit_code == 1:
                last = result.stderr.strip().splitlines()[-1]
                assert last.startswith("error: "), about
            assert result.stdout == "", about
            assert not (tmp_path / "out").exists(), about


@pytest.mark.parametrize("command", WRONG)
def test_the_table_above_lacks_no_option(command):
    parameters = typer.main.get_command(build(command)).commands[command].params
    names = {
        parameter.opts[0] if parameter.opts[0].startswith("--") else parameter.name.upper()
        for parameter in parameters
        if not getattr(parameter, "is_flag", False)
    }
    assert names - FREE - {"--help"} == set(WRONG[command])


def test_the_table_above_lacks_no_command():
    assert {name for name, _, _ in COMMANDS} == set(WRONG)


@pytest.mark.parametrize("command", ["distill", "calibrate", "eval", "compare", "inspect", "bench", "demo"])
def test_right_options_pass_the_checks(command, seer_command, arguments, nothing_works):
    """Otherwise the table would prove nothing."""
    with pytest.raises(WorkBegan):
        seer_command(command, *arguments[command])


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("distill", "--phase", ["decode", "both"]),
        ("distill", "--rows", ["0.5", "1", "2", "8.0"]),
        ("distill", "--length", ["65", "4K", "4k"]),
        ("distill", "--eval-sequences", ["0"]),
        ("distill", "--steps", ["0"]),
        ("distill", "--clip-norm", ["0"]),
        ("distill", "--save-seconds", ["0"]),
        ("distill", "--k-pooling", ["max, min"]),
        ("eval", "--densities", ["1", "0.5, 0.5,1e-3"]),
        ("eval", "--thresholds", ["0", "0.001,0.5"]),
        ("compare", "--repeats", ["0"]),
        ("compare", "--selectors", ["none"]),
        ("inspect", "--length", ["2"]),
        ("inspect", "--layers", ["all", "0,1"]),
        ("bench", "--lengths", ["128"]),
        ("bench", "--seconds", ["0"]),
    ],
)
def test_the_least_that_makes_sense_is_taken(command, option, values, seer_command, arguments, nothing_works):
    for value in values:
        with pytest.raises(WorkBegan):
            seer_command(command, *arguments[command], f"{option}={value}")


def test_lengths_and_lists():
    assert token_count("16K") == 16384
    assert token_count("300", "--length") == 300
    with pytest.raises(ValueError, match=r"--length: a length must be .* got '16k4'"):
        token_count("16k4", "--length")
    assert parse_list("1K,1024, 2k", token_count, "lengths") == [1024, 2048]
    with pytest.raises(ValueError, match=r"--lengths: '0' is not valid \(a length must be"):
        parse_list("4K,0", token_count, "lengths")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="--output"):
        check_output(tmp_path / "a" / "b")
    tmp_path.chmod(0o700)


def test_folders_that_cannot_be_written_by_anybody(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(PermissionError, match=f"--output: {tmp_path} cannot be written"):
        check_output(tmp_path / "a" / "b")
    (tmp_path / "a").mkdir()
    assert check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"


def test_a_second_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda:0") == "cuda:0"
    with pytest.raises(ValueError, match="finds only 1 here"):
        resolve_device("cuda:1")


# ---- options that another option makes useless ---------------------------------------------------------------------


def test_gates_that_override_the_block_size_say_so(seer_command, folder, arguments, tmp_path):
    short = ["--steps", 1, "--length", 256, "--eval-sequences", 0, "--rows", 2]
    common = [*arguments["distill"], *short, "--gates", folder / "gates"]
    result = seer_command("distill", *common, "--block-size", 32, "--q-pooling", "max", "--k-pooling", "max,min,avg")
    assert result.exit_code == 0, result.stderr
    said = result.stderr
    assert f"--block-size 32 has no effect: --gates {folder / 'gates'} decides, and its block_size is 64" in said
    assert "--q-pooling max has no effect" in said
    assert "--k-pooling" not in said  # as asked for
    assert json.loads((tmp_path / "out" / "gate_config.json").read_text())["gates"]["block_size"] == 64
    assert "has no effect" not in seer_command("distill", *common, "--block-size", 64).stderr


@pytest.mark.parametrize(
    ("command", "given", "said"),
    [
        (
            "bench",
            ["--model", "{model}", "--heads", "4", "--head-dim=64"],
            "--heads, --head-dim have no effect: --model",
        ),
        ("inspect", ["--text", "{text}"], "--data has no effect: --text is the prompt"),
        ("demo", ["--fast", "--minutes", "3"], "--minutes has no effect: --fast"),
        ("distill", ["--eval-sequences", "0", "--eval-every", "5"], "--eval-every has no effect: no sequences"),
        ("distill", ["--eval-every", "5"], None),
        ("bench", ["--heads", "4", "--kv-heads", "4"], None),
    ],
)
def test_options_without_effect_are_said(command, given, said, arguments, folder, nothing_works, capsys):
    given = [text.format(model=folder / "model", text=folder / "text.txt") for text in given]
    with pytest.raises(WorkBegan):
        build(command)([str(text) for text in (command, *arguments[command], *given)])
    stderr = " ".join(capsys.readouterr().err.split())
    assert said in stderr if said else "no effect" not in stderr
