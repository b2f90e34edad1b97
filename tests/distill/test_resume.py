"""A run is continued with what it was started with, or not at all; signals and second runs lose nothing."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from seerattention.distillation import DistillConfig, distill
from seerattention.distillation.data import PackedText, Position
from seerattention.distillation.identity import weights_digest
from seerattention.distillation.lock import lock_of, locked
from seerattention.distillation.saved import load_state, save_state

from .stopping import CONFIG, HELD_OUT, assert_same_gates, resumed, short_batches, stopped, texts
from .tiny import attached_llama, random_batches

# ---- other inputs are refused ----------------------------------------------------------------------------------------


def test_other_batches_are_refused(tmp_path):
    path = tmp_path / "state"
    stopped(path, short_batches(6))
    changed = short_batches(6)
    changed[1]["input_ids"][0, 5] += 1
    masked = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in short_batches(6)]
    for others in (changed, short_batches(6)[::-1], masked):
        with pytest.raises(ValueError, match=r"made with other batches.*first 2 differ.*manual_seed"):
            resumed(path, others)
    changed = short_batches(6)
    changed[2]["input_ids"][0, 5] += 1  # not read before the interruption
    resumed(path, changed)


def test_a_shuffled_loader_is_refused_unless_it_shuffles_the_same_way(tmp_path):
    batches = short_batches(8)
    config = DistillConfig(steps=12, warmup=2)  # more than one pass: the second is shuffled anew

    def loader(generator):
        return DataLoader([batch["input_ids"][0] for batch in batches], shuffle=True, generator=generator)

    def prompts(generator=None):
        class Prompts:
            def __iter__(self):
                return ({"input_ids": ids} for ids in data)

        data = loader(generator)
        return Prompts()

    first, second = attached_llama(), attached_llama()
    torch.manual_seed(1)
    stopped(tmp_path / "a", prompts(), at=4, config=config, model=first)
    torch.manual_seed(2)
    with pytest.raises(ValueError, match="made with other batches"):
        resumed(tmp_path / "a", prompts(), config=config, model=second)

    for seed in (lambda: torch.Generator().manual_seed(3), lambda: None):
        path = tmp_path / f"state {seed() is None}"
        whole, interrupted, after = attached_llama(), attached_llama(), attached_llama()
        torch.manual_seed(4)
        expected = distill(whole, prompts(seed()), config)
        torch.manual_seed(4)
        stopped(path, prompts(seed()), at=10, config=config, model=interrupted)
        torch.manual_seed(4)
        _, history = resumed(path, prompts(seed()), config=config, model=after)
        assert history.loss == expected.loss
        assert_same_gates(after, whole)


def test_other_weights_and_other_held_out_batches_are_refused(tmp_path):
    path, batches = tmp_path / "state", short_batches(6)
    stopped(path, batches, eval_batches=HELD_OUT)
    model = attached_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.01
    with pytest.raises(ValueError, match="digest of the base model's weights: was"):
        resumed(path, batches, model=model, eval_batches=HELD_OUT)
    with pytest.raises(ValueError, match="digest of eval_batches: was"):
        resumed(path, batches, eval_batches=random_batches(1, length=130, seed=10))
    resumed(path, batches, eval_batches=HELD_OUT)


def test_another_target_is_refused(tmp_path):
    """Also where the state was made before there was another one, and says nothing of it."""
    batches, other = short_batches(6), dataclasses.replace(CONFIG, target="row_mass")
    path = tmp_path / "state"
    stopped(path, batches)
    with pytest.raises(ValueError, match=r"other settings \(target: was None, now 'row_mass'\)"):
        resumed(path, batches, config=other)
    path = tmp_path / "other"
    stopped(path, batches, config=other)
    with pytest.raises(ValueError, match=r"other settings \(target: was 'row_mass', now None\)"):
        resumed(path, batches)
    whole = attached_llama()
    expected = distill(whole, batches, other)
    model, history = resumed(path, batches, config=other)
    assert history.loss == expected.loss
    assert_same_gates(model, whole)


def test_weights_are_digested_wherever_they_are():
    import accelerate

    from .tiny import tiny_llama

    expected = weights_digest(tiny_llama())
    assert weights_digest(torch.compile(tiny_llama())) == expected
    assert weights_digest(accelerate.cpu_offload(tiny_llama(), execution_device="cpu")) == expected
    swapped = tiny_llama()
    with torch.no_grad():
        weight = swapped.model.layers[0].self_attn.q_proj.weight
        weight[[0, 1]] = weight[[1, 0]].clone()
    half = tiny_llama(dtype=torch.bfloat16)
    assert len({expected, weights_digest(swapped), weights_digest(half)}) == 3


def test_states_of_earlier_versions_are_continued_with_a_note(tmp_path, caplog):
    """They hold no digests: 0.1.0's were these files without them."""
    path, batches = tmp_path / "state", short_batches(6)
    expected, _ = resumed(tmp_path / "other", batches)
    stopped(path, batches)
    tensors, meta = load_state(path)
    del meta["digest"]
    del meta["history"]["no_gradient"]
    del meta["settings"]["gates"]["prefill"]["form"]
    meta["settings"] = {key: value for key, value in meta["settings"].items() if not key.startswith("digest of")}
    save_state(path, tensors, meta)
    with caplog.at_level(logging.INFO):
        model, _ = resumed(path, batches)
    assert "does not say which weights and texts" in caplog.text
    assert_same_gates(model, expected)


# ---- packed text -----------------------------------------------------------------------------------------------------


def packed(documents, tokenize=lambda text: [int(word) for word in text.split()], **options):
    options = {"length": 130, "batch_size": 1, "start": Position(0, 1, 20), **options}
    return PackedText(lambda skip: iter(documents[skip:]), tokenize, **options)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("stop", [2, 10, 12])
def test_packed_text_with_more_steps_than_one_pass(tmp_path, repeat, stop):
    """A pass has 10 batches; repeated or not, a run that was stopped ends like one that was not."""
    config = DistillConfig(steps=14, warmup=2)
    whole = attached_llama()
    expected = distill(whole, packed(texts(), repeat=repeat), config)
    assert len(expected.loss) == (14 if repeat else 10)
    path = tmp_path / "state"
    if stop <= len(expected.loss):
        stopped(path, packed(texts(), repeat=repeat), at=stop, config=config)
    for _ in range(2):  # the second finds nothing left to do
        model, history = resumed(path, packed(texts(), repeat=repeat), config=config)
        assert history.loss == expected.loss
        assert_same_gates(model, whole)


@pytest.mark.parametrize("repeat", [False, True])
def test_changed_text_is_refused(tmp_path, repeat):
    """Read so far are the documents 1 to 3; in the second pass, all but the one before the start."""
    config = DistillConfig(steps=14, warmup=2)
    path, last = tmp_path / "state", 3 if not repeat else 9
    stopped(path, packed(texts(), repeat=repeat), at=4 if not repeat else 12, config=config)
    for index in {1, last - 1}:
        changed = texts()
        changed[index] = changed[index][:-1] + "7" if changed[index][-1] != "7" else changed[index][:-1] + "8"
        with pytest.raises(ValueError, match=r"text, or its tokenizer.*documents has changed"):
            resumed(path, packed(changed, repeat=repeat), config=config)
    with pytest.raises(ValueError, match="text, or its tokenizer"):
        resumed(path, packed(texts()[:2], repeat=repeat), config=config)
    other_tokenizer = packed(texts(), lambda text: [249 - int(word) for word in text.split()], repeat=repeat)
    with pytest.raises(ValueError, match="text, or its tokenizer"):
        resumed(path, other_tokenizer, config=config)
    with pytest.raises(ValueError, match="length was 130, now 131"):
        resumed(path, packed(texts(), repeat=repeat, length=131), config=config)
    resumed(path, packed(texts(), repeat=repeat), config=config)


def test_text_that_was_not_read_yet_may_grow(tmp_path):
    path = tmp_path / "state"
    stopped(path, packed(texts()), at=4)
    resumed(path, packed([*texts(), "1 2 3"]))


# ---- two runs in one folder ------------------------------------------------------------------------------------------


def test_two_runs_cannot_share_a_state(tmp_path):
    path = tmp_path / "new folder" / "state"
    with (
        locked(path),
        pytest.raises(ValueError, match=r"another run is writing to .*new folder.*another output directory"),
    ):
        resumed(path, short_batches(6))
    assert not path.exists()
    resumed(path, short_batches(6))


def test_the_lock_of_a_dead_process_is_nobodys(tmp_path):
    path = tmp_path / "state"
    program = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]).acquire(); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock_of(path))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="another run"):
            resumed(path, short_batches(6))
        process.kill()
    assert lock_of(path).exists()
    resumed(path, short_batches(6))
