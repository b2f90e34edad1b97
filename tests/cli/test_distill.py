"""``seer distill`` that is interrupted keeps its state, and goes on only with the text that it was started with."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import seerattention as seer
from seerattention import distillation
from seerattention.cli.opening import count_parameters
from seerattention.distillation import TargetChoice, progress
from seerattention.distillation.saved import STATE_FILE, load_state, save_state

from ..evaluate.tiny import make_text

STEPS = 5


@pytest.fixture
def run(seer_command, folder, tmp_path):
    """``run(output)`` distils from ``text.jsonl``."""

    def run(output, *arguments):
        return seer_command(
            "distill", "--model", folder / "model", "--data", tmp_path / "text.jsonl", "--output", output, "--device",
            "cpu", "--length", 256, "--steps", STEPS, "--rows", 2, "--eval-sequences", 1, "--save-seconds", 3600,
            *arguments,
        )  # fmt: skip

    write(tmp_path / "text.jsonl")
    return run


def write(path, last_words=""):
    texts = [make_text(300, seed) for seed in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:-1], texts[-1] + last_words]))


@contextmanager
def interrupted_after(step):
    """The progress line presses Ctrl-C."""

    @contextmanager
    def pressing(console):
        yield lambda report: signal.raise_signal(signal.SIGINT) if report.step == step else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "distill_progress", pressing)
        yield


def gates(output):
    return load_file(output / "gates.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_run_keeps_its_state_and_goes_on(run, tmp_path):
    output = tmp_path / "out"
    with interrupted_after(2):
        stopped = run(output)
    assert stopped.exit_code == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "interrupted"
    assert f"the same command goes on from {output / STATE_FILE}" in stopped.stderr
    assert load_state(output / STATE_FILE)[1]["step"] == 2
    assert not (output / "gates.safetensors").exists()
    assert run(output).exit_code == 0
    assert run(tmp_path / "unbroken").exit_code == 0
    assert same(gates(output), gates(tmp_path / "unbroken"))


def test_a_changed_text_is_refused(run, tmp_path):
    output = tmp_path / "out"
    with interrupted_after(1):
        run(output)
    assert load_state(output / STATE_FILE)[1]["data"]["source"]["document"] < 5  # the end of the text is not read yet
    write(tmp_path / "text.jsonl", " changed")
    refused = run(output)
    assert refused.exit_code == 1
    last = refused.stderr.splitlines()[-1]
    assert last.startswith(
        f"error: {output / STATE_FILE} belongs to a run with other settings (digest of the text: was"
    )
    assert load_state(output / STATE_FILE)[1]["step"] == 1
    write(tmp_path / "text.jsonl")
    assert run(output).exit_code == 0


def test_a_run_of_an_earlier_version_goes_on(run, tmp_path):
    output = tmp_path / "out"
    with interrupted_after(1):
        run(output)
    tensors, meta = load_state(output / STATE_FILE)
    del meta["settings"]["digest of the text"]
    save_state(output / STATE_FILE, tensors, meta)
    done = run(output)
    assert done.exit_code == 0, done.stderr
    assert load_state(output / STATE_FILE)[1]["step"] == STEPS


def test_a_full_disk_is_one_sentence(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seerattention.files.os.replace", full)
    failed = run(tmp_path / "out", "--save-every", 1)
    assert failed.exit_code == 1
    assert failed.stderr.splitlines()[-1].startswith(
        f"error: cannot write {tmp_path / 'out' / STATE_FILE}: No space left"
    )


def test_sub_block_gates_are_distilled_and_go_on(run, tmp_path):
    output = tmp_path / "out"
    fine = ("--form", "sub_block", "--k-pitch", 4, "--own-keys", "--tile-score", "logsumexp")
    with interrupted_after(2):
        run(output, *fine)
    other = run(output, *fine, "--share-keys")
    assert other.exit_code == 1
    assert "belongs to a run with other settings" in other.stderr
    done = run(output, *fine)
    assert done.exit_code == 0, done.stderr
    config = json.loads((output / "gate_config.json").read_text())["gates"]["prefill"]
    assert config == {
        "form": "sub_block", "q_pitch": 8, "k_pitch": 4, "k_pooling": ["max", "min", "avg"],
        "q_pooling": ["max", "min", "avg"], "width": None, "reduce": "logsumexp", "share_keys": False, "rope": True,
    }  # fmt: skip
    again = run(tmp_path / "more", "--gates", output, "--k-pitch", 8, "--form", "sub_block")
    assert again.exit_code == 0, again.stderr
    said = again.stderr
    assert "form sub_block, block_size 64, k_pooling max,min,avg" in said
    assert f"--k-pitch 8 has no effect: --gates {output} decides, and its k_pitch is 4" in said
    assert "--form" not in said


def test_sub_blocks_follow_the_size_of_the_model(run, folder, tmp_path, monkeypatch):
    """Where nothing was said of them; a run knows them by what they are, so that it goes on whatever decided."""

    def form(output):
        spec = json.loads((output / "gate_config.json").read_text())["gates"]["prefill"]
        return spec["q_pitch"], spec["k_pitch"], spec["reduce"]

    small, said = tmp_path / "small", "M parameters: gates of {0} x {0} sub-blocks by {1}"
    with interrupted_after(2):
        assert said.format(4, "mass") in run(small).stderr
    done = run(small, "--q-pitch", 4, "--k-pitch", 4, "--tile-score", "mass")
    assert done.exit_code == 0, done.stderr
    assert form(small) == (4, 4, "mass")
    some = run(tmp_path / "some", "--k-pitch", 4)
    assert "M parameters" not in some.stderr
    assert form(tmp_path / "some") == (8, 4, "max")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    parameters = sum(p.numel() for p in model.parameters())
    assert count_parameters(str(folder / "model")) == parameters
    monkeypatch.setattr("seerattention.cli.gate_form.SMALL_MODEL", parameters)
    assert said.format(8, "max") in run(tmp_path / "large").stderr
    assert form(tmp_path / "large") == (8, 8, "max")
    paper = run(tmp_path / "paper", "--form", "paper")
    assert "M parameters" not in paper.stderr

    def refuses(config):
        raise TypeError("it wants more than a config")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", refuses)
    unknown = run(tmp_path / "unknown")
    assert unknown.exit_code == 0, unknown.stderr
    assert "no size that its config tells: gates of 8 x 8 sub-blocks by max" in unknown.stderr


def test_the_model_decides_about_the_target_once(run, tmp_path, monkeypatch):
    output, asked = tmp_path / "out", []

    def choose(model, batches, *, block_size):
        asked.append((len(batches), block_size))
        return TargetChoice("row_mass", {"max": 0.031, "row_mass": 0.0149}, 0.15)

    monkeypatch.setattr(distillation, "choose_target", choose)
    with interrupted_after(2):
        stopped = run(output)
    said = " ".join(stopped.stderr.split())
    assert "--target row_mass: the best 0.15 of the blocks of true maps change the next token's distribution by" in said
    assert "by 0.031 (max) and 0.0149 (row_mass) nats" in said
    assert asked == [(1, 64)]
    assert run(output).exit_code == 0  # goes on, and asks no more
    assert json.loads((output / "history.json").read_text())["settings"]["target"] == "row_mass"
    assert run(tmp_path / "whole").exit_code == 0
    settings = json.loads((tmp_path / "whole" / "history.json").read_text())["settings"]
    assert settings["target decided by"] == {"lost": {"max": 0.031, "row_mass": 0.0149}, "density": 0.15}
    assert run(tmp_path / "max", "--target", "max").exit_code == 0
    assert run(tmp_path / "decode", "--phase", "decode").exit_code == 0
    assert len(asked) == 2


@pytest.mark.parametrize("error", [NotImplementedError("no kernel"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_choice_that_fails_ends_no_run(run, tmp_path, monkeypatch, error):
    def fail(*given, **options):
        raise error

    monkeypatch.setattr(distillation, "choose_target", fail)
    done = run(tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert f"--target max: the model could not decide: {error}" in " ".join(done.stderr.split())
    settings = json.loads((tmp_path / "out" / "history.json").read_text())["settings"]
    assert settings["target decided by"] == {"could not decide": str(error)}


def test_the_target_is_chosen_for_the_blocks_of_the_gates(run, tmp_path, monkeypatch):
    asked = []

    def choose(model, batches, *, block_size):
        asked.append(block_size)
        return TargetChoice("max", {"max": 0.01, "row_mass": 0.01}, 0.15)

    monkeypatch.setattr(distillation, "choose_target", choose)
    assert run(tmp_path / "small", "--block-size", 32).exit_code == 0
    assert run(tmp_path / "again", "--gates", tmp_path / "small").exit_code == 0
    assert asked == [32, 32]


def test_where_the_model_cannot_decide_the_papers_target_is_taken(run, tmp_path):
    short = run(tmp_path / "short")
    assert "--target max: the model could not decide: prompts are too short to compare targets" in " ".join(
        short.stderr.split()
    )
    assert "target" not in json.loads((tmp_path / "short" / "history.json").read_text())["settings"]
    none = run(tmp_path / "none", "--eval-sequences", 0)
    assert "--target max: the model could not decide: no sequences are held out" in " ".join(none.stderr.split())


def test_the_target_is_part_of_a_run(run, tmp_path):
    """It trains other gates, is in the history, and an interrupted run goes on with its own only, named or not."""
    output, target = tmp_path / "out", ("--target", "row_mass")
    with interrupted_after(2):
        run(output, *target)
    other = run(output, "--target", "max")
    assert other.exit_code == 1
    assert "belongs to a run with other settings (target: was 'row_mass'" in other.stderr
    done = run(output)
    assert done.exit_code == 0, done.stderr
    assert json.loads((output / "history.json").read_text())["settings"]["target"] == "row_mass"
    assert run(tmp_path / "max", "--target", "max").exit_code == 0
    assert "target" not in json.loads((tmp_path / "max" / "history.json").read_text())["settings"]
    by_max = gates(tmp_path / "max")
    assert not all(torch.equal(weight, by_max[name]) for name, weight in gates(output).items())


def test_passages_said_again_go_on(run, tmp_path):
    """They are part of the run: an interrupted one ends like another, and goes on with no other share."""
    output, repeats = tmp_path / "out", ("--repeats", 0.5)
    with interrupted_after(2):
        run(output, *repeats)
    for other in ((), ("--repeats", 0.25)):
        refused = run(output, *other)
        assert refused.exit_code == 1
        assert "belongs to a run with other settings (repeats: was 0.5, now " in refused.stderr
    done = run(output, *repeats, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["repeats"] == 0.5
    assert "a share of 0.5 with passages said again" in done.stderr
    assert run(tmp_path / "unbroken", *repeats).exit_code == 0
    assert same(gates(output), gates(tmp_path / "unbroken"))
    assert run(tmp_path / "plain", "--repeats", 0).exit_code == 0
    assert not same(gates(output), gates(tmp_path / "plain"))
    recall = [
        json.loads((tmp_path / name / "history.json").read_text())["history"]["recall"] for name in ("out", "plain")
    ]
    for repeated, plain in zip(*(layers.values() for layers in recall), strict=True):
        assert repeated[0] == plain[0], "what is held out is plain text"


def test_runs_of_earlier_defaults_go_on_with_them_only(run, tmp_path):
    """No passages, at half the rate: what such a run differs by is named, and said it goes on."""
    output, earlier = tmp_path / "out", ("--repeats", 0, "--learning-rate", 1e-3)
    with interrupted_after(1):
        run(output, *earlier)
    meta = load_state(output / STATE_FILE)[1]
    assert "repeats" not in meta["settings"]
    assert "tasks" not in meta["settings"]
    refused = run(output)
    assert refused.exit_code == 1
    assert "(learning_rate: was 0.001, now 0.002; repeats: was None, now 1.0)" in refused.stderr
    assert run(output, *earlier).exit_code == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"prefill": (1.0, 2e-3)}),
        (("--phase", "decode"), {"decode": (0.0, 1e-3)}),
        (("--phase", "both"), {"prefill": (1.0, 2e-3), "decode": (0.0, 1e-3)}),
        (("--phase", "both", "--repeats", 0.5), {"prefill": (0.5, 2e-3), "decode": (0.5, 1e-3)}),
        (("--phase", "both", "--learning-rate", 4e-3), {"prefill": (1.0, 4e-3), "decode": (0.0, 4e-3)}),
    ],
)
def test_each_phase_has_its_own_defaults(run, tmp_path, options, expected):
    done = run(tmp_path / "out", "--json", "--steps", 1, *options)
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    found = {}
    for phase in expected:
        settings = (printed[phase] if len(expected) > 1 else printed)["settings"]
        found[phase] = settings.get("repeats", 0.0), settings["learning_rate"]
    assert found == expected


def test_sequences_too_short_for_repeats(run, folder, tmp_path):
    """Which only gates that are there allow. Asked for they are refused, and else left out, which is said."""
    short = ("--gates", folder / "gates", "--length", 31, "--steps", 1)
    result = run(tmp_path / "out", *short, "--repeats", 0.5)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --repeats: repeats need sequences of at least 32 tokens")
    assert not (tmp_path / "out").exists()
    result = run(tmp_path / "out", *short, "--json")
    assert result.exit_code == 0, result.stderr
    assert "no passages are said again: repeats need sequences of at least 32 tokens" in result.stderr
    assert "repeats" not in json.loads(result.stdout)["settings"]
    assert "no passages" not in run(tmp_path / "none", *short, "--repeats", 0).stderr


def test_tasks_go_on(run, tmp_path):
    """They are part of the run as passages are, and what is held out stays plain text."""
    output, tasks = tmp_path / "out", ("--tasks", 0.5, "--length", 512)
    with interrupted_after(2):
        run(output, *tasks)
    refused = run(output, "--length", 512)
    assert refused.exit_code == 1
    assert "belongs to a run with other settings (tasks: was 0.5, now None)" in refused.stderr
    done = run(output, *tasks, "--json")
    assert done.exit_code == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert (settings["tasks"], settings["repeats"]) == (0.5, 1.0)
    said = "a share of 0.5 with tasks woven in, a share of 1 of the others with passages said again"
    assert said in done.stderr
    assert run(tmp_path / "unbroken", *tasks).exit_code == 0
    assert same(gates(output), gates(tmp_path / "unbroken"))
    assert run(tmp_path / "plain", "--length", 512).exit_code == 0
    assert not same(gates(output), gates(tmp_path / "plain"))
    recall = [
        json.loads((tmp_path / name / "history.json").read_text())["history"]["recall"] for name in ("out", "plain")
    ]
    for woven, plain in zip(*(layers.values() for layers in recall), strict=True):
        assert woven[0] == plain[0]


def test_tasks_for_gates_of_decoding(run, tmp_path):
    result = run(tmp_path / "out", "--tasks", 1, "--length", 512, "--phase", "decode", "--steps", 2)
    assert result.exit_code == 0, result.stderr
    assert "a share of 1 with tasks woven in\n" in result.stderr


def test_sequences_too_short_for_tasks(run, tmp_path):
    result = run(tmp_path / "out", "--tasks", 0.5, "--length", 511)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --tasks: tasks need sequences of at least 512 tokens, got 511")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        (("--q-pitch", 8, "--k-pitch", 8, "--tile-score", "max"), seer.SubBlockGateConfig()),
        (("--form", "paper"), seer.PrefillGateConfig()),
    ],
    ids=["of sub-blocks", "of the paper"],
)
def test_forms_are_those_of_the_configs(run, tmp_path, options, spec):
    result = run(tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "out" / "gate_config.json").read_text())["gates"]["prefill"]
    assert config == json.loads(json.dumps(spec.to_dict()))


def test_decode_gates_are_distilled_and_go_on(run, tmp_path):
    """The published form by default; sub-blocks, heads that are apart and no norms where asked for."""
    done = run(tmp_path / "published", "--phase", "decode")
    assert done.exit_code == 0, done.stderr
    written = json.loads((tmp_path / "published" / "gate_config.json").read_text())["gates"]
    assert written["decode"] == {
        "form": "seerattention_r", "k_pooling": ["max", "min", "avg"], "width": None, "qk_norm": True, "rope": True,
    }  # fmt: skip
    output = tmp_path / "fine"
    fine = ("--phase", "decode", "--k-pitch", 8, "--own-heads", "--no-qk-norm")
    with interrupted_after(2):
        run(output, *fine)
    other = run(output, "--phase", "decode", "--k-pitch", 16, "--own-heads", "--no-qk-norm")
    assert "belongs to a run with other settings" in other.stderr
    done = run(output, *fine)
    assert done.exit_code == 0, done.stderr
    assert "has no effect" not in done.stderr
    config = json.loads((output / "gate_config.json").read_text())["gates"]
    assert seer.GateConfig.from_dict(config).decode == seer.DecodeGateConfig(
        k_pitch=8, merge_heads=False, qk_norm=False
    )
    again = run(tmp_path / "more", "--phase", "decode", "--gates", output, "--k-pitch", 16, "--own-heads")
    assert again.exit_code == 0, again.stderr
    assert f"--k-pitch 16 has no effect: --gates {output} decides, and its k_pitch is 8" in again.stderr
    assert "--own-heads" not in again.stderr
    assert "merge_heads False" in again.stderr
    window = run(tmp_path / "window", *fine, "--query-window", 8)
    assert window.exit_code == 0, window.stderr
    config = json.loads((tmp_path / "window" / "gate_config.json").read_text())["gates"]
    assert config["decode"]["query_window"] == 8
    assert same(gates(tmp_path / "window"), gates(output))  # it is not trained
    wrong = run(tmp_path / "wrong", "--phase", "decode", "--query-window", 65)
    assert (
        "--query-window: query_window must be a number of tokens from 1 (each token for itself) to 64" in wrong.stderr
    )
    useless = run(tmp_path / "prefill", "--own-heads", "--form", "paper", "--k-pitch", 8)
    assert "--merge-heads has no effect: only gates of --phase decode have it" in useless.stderr
    assert "--k-pitch has no effect: only --form sub_block" in useless.stderr


def test_gates_of_both_phases(run, folder, tmp_path):
    """One command trains both, goes on where it was, and leaves one folder that has what two runs would have."""
    output = tmp_path / "both"
    assert run(tmp_path / "prefill", "--k-pitch", 8).exit_code == 0
    assert run(tmp_path / "decode", "--phase", "decode", "--k-pitch", 8, "--own-heads").exit_code == 0
    options = ("--phase", "both", "--k-pitch", 8, "--own-heads")
    with interrupted_after(2):
        assert run(output, *options).exit_code == 130
    done = run(output, *options, "--json")
    assert done.exit_code == 0, done.stderr
    assert "has no effect" not in done.stderr
    printed = json.loads(done.stdout)
    assert printed["output"] == str(output)
    assert printed["prefill"]["output"] == str(output / "prefill")
    assert printed["decode"]["settings"]["phase"] == "decode"
    weights = gates(output)
    apart = {**gates(tmp_path / "prefill"), **gates(tmp_path / "decode")}
    assert same(weights, apart)
    from transformers import AutoModelForCausalLM

    model = seer.attach(AutoModelForCausalLM.from_pretrained(folder / "model"), output)
    decode = seer.hf.state.state_of(model).gate_config.decode
    assert (decode.k_pitch, decode.merge_heads) == (8, False)
    again = run(output, *options)  # nothing is left to train
    assert again.exit_code == 0, again.stderr
    assert same(gates(output), weights)
    refused = run(tmp_path / "more", "--phase", "both", "--gates", output)
    assert "--phase both trains fresh gates" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--phase", "neither"], "--phase: phase must be"),
        (["--form", "fine"], "--form must be one of paper, sub_block, got 'fine'"),
        (["--form", "sub_block", "--q-pitch", 3], "--q-pitch: q_pitch must be one of"),
        (["--form", "sub_block", "--k-pitch", 128], "--k-pitch: k_pitch must be one of"),
        (["--phase", "decode", "--k-pitch", 3], "--k-pitch: k_pitch must be one of"),
        (["--form", "sub_block", "--tile-score", "mean"], "--tile-score: reduce must be one of"),
    ],
)
def test_wrong_forms(run, tmp_path, arguments, sentence):
    result = run(tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert sentence in result.stderr.splitlines()[-1]


def test_options_of_sub_blocks_say_that_the_form_of_the_paper_has_none(run, tmp_path):
    result = run(tmp_path / "out", "--form", "paper", "--q-pitch", 16, "--share-keys")
    assert result.exit_code == 0, result.stderr
    assert "--q-pitch, --share-keys have no effect: only --form sub_block has sub-blocks" in result.stderr
