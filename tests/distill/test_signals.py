"""A signal loses nothing of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from seerattention.distillation import distill, run
from seerattention.distillation.data import PackedText
from seerattention.distillation.saved import load_state, save_state
from seerattention.hf.state import gates_of

from .stopping import CONFIG, HELD_OUT, assert_same_gates, resumed, short_batches, texts
from .tiny import attached_llama, gate_tensors


def interrupt_at(place, number, monkeypatch):
    """Batches and options of a run of CONFIG that gets the signal once, at a place of its third step."""
    batches, options, fired = short_batches(6), {}, []

    def fire():
        if not fired:
            fired.append(True)
            signal.raise_signal(number)

    if place == "first batch":

        class Batches:
            def __iter__(self):
                fire()
                return iter(batches)

        return Batches(), options
    if place == "batch":

        class Batches:
            def __iter__(self):
                for index, batch in enumerate(batches):
                    if index == 2:
                        fire()
                    yield batch

        return Batches(), options
    if place == "step":
        options["on_step"] = lambda report: fire() if report.step == 3 else None
    if place in ("update", "forward"):
        name = {"update": "update", "forward": "_accumulate"}[place]
        real = getattr(run.Trainer, name)

        def patched(trainer, *args):
            if trainer.step == 2:
                fire()
            return real(trainer, *args)

        monkeypatch.setattr(run.Trainer, name, patched)
    if place == "recall":
        measured, recalls = [], run.measure_recall

        def recall(*args, **options):
            measured.append(True)
            if len(measured) == 2:
                fire()
            return recalls(*args, **options)

        monkeypatch.setattr(run, "measure_recall", recall)
    if place == "save":
        options["save_every"] = 3

        def save(*args):
            fire()
            save_state(*args)

        monkeypatch.setattr(run, "save_state", save)
    return batches, options


PLACES = {"first batch": 0, "batch": 2, "forward": 2, "update": 3, "step": 3, "recall": 2, "save": 3}


@pytest.fixture(scope="module")
def unbroken():
    model = attached_llama()
    return model, distill(model, short_batches(6), CONFIG, eval_batches=HELD_OUT)


@pytest.mark.parametrize(
    ("number", "place"),
    [*((signal.SIGTERM, place) for place in PLACES), (signal.SIGINT, "batch"), (signal.SIGHUP, "update")],
)
def test_a_signal_loses_nothing(tmp_path, monkeypatch, request, number, place, unbroken):
    """Before the first timed save, wherever it comes: state and gates are kept, and the run goes on exactly."""
    calls: list[int] = []
    before = signal.signal(number, lambda *args: calls.append(args[0]))
    request.addfinalizer(lambda: signal.signal(number, before))
    handlers = {other: signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    path, model = tmp_path / "state", attached_llama()
    with monkeypatch.context() as patches:
        batches, options = interrupt_at(place, number, patches)
        with pytest.raises(KeyboardInterrupt):
            distill(model, batches, CONFIG, eval_batches=HELD_OUT, state_path=path, save_seconds=3600, **options)
    assert {other: signal.getsignal(other) for other in handlers} == handlers
    assert calls == ([] if number == signal.SIGINT else [number])  # SIGINT is an exception; others are sent again

    tensors, meta = load_state(path)
    assert meta["step"] == PLACES[place]
    for name, tensor in gate_tensors(model).items():
        assert torch.equal(tensor, tensors[f"gate/layers.{name}"])
    again, history = resumed(path, short_batches(6), eval_batches=HELD_OUT)
    assert history.loss == unbroken[1].loss
    assert history.recall == unbroken[1].recall
    assert history.recall_steps == unbroken[1].recall_steps == [0, 2, 4, 6]
    assert_same_gates(again, unbroken[0])


def test_a_signal_while_the_text_does_not_come(tmp_path, caplog):
    """The producer waits for I/O, here for ever: gates and state are written all the same."""
    release = threading.Event()

    def documents(skip):
        yield from texts()[skip:][:4]
        release.wait()

    path, model, fresh = tmp_path / "state", attached_llama(), attached_llama()
    batches = PackedText(documents, lambda text: [int(word) for word in text.split()], length=130, batch_size=1)

    def send(report):
        if report.step == 5:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            distill(model, batches, CONFIG, on_step=send, state_path=path)
    finally:
        release.set()
    assert time.monotonic() - start < 10
    assert load_state(path)[1]["step"] == 5
    assert f"stopped after 5 steps; the state is in {path}" in caplog.text
    assert not torch.equal(gates_of(model)[0].k_linear, gates_of(fresh)[0].k_linear)


def test_signals_that_are_ignored_stay_ignored(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        history = distill(attached_llama(), short_batches(3), on_step=lambda report: signal.raise_signal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(history.loss) == 3


def test_runs_in_other_threads_leave_the_handlers_alone():
    found, failed = [], []

    def work():
        try:
            report = lambda _: found.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
            distill(attached_llama(), short_batches(1), on_step=report)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert set(found) == {signal.getsignal(signal.SIGTERM)}


_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
from distill.tiny import attached_llama, random_batches
from seerattention.distillation import distill, DistillConfig
def on_step(report):
    if report.step == 2:
        print("two", flush=True)
distill(attached_llama(), random_batches(4), DistillConfig(steps=10**6), on_step=on_step, state_path=sys.argv[1])
"""


def test_a_process_ends_by_the_signal_that_it_got(tmp_path):
    """Launchers look at the exit status; the state is there although no save was due."""
    path, tests = tmp_path / "state", os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-c", _PROGRAM, str(path), tests]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "two\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, errors
    assert load_state(path)[1]["step"] >= 2
    assert "the state is in" in errors
