"""Two processes under ``accelerate launch`` give what one gives with the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seerattention.distillation import DistillConfig
from seerattention.distillation.processes import Processes
from seerattention.distillation.run import distill
from seerattention.distillation.trainer import Trainer

from .tiny import attached_llama, gate_tensors, random_batches

CONFIG = DistillConfig(steps=4, rows=0.5, warmup=1, eval_density=0.3)
_TESTS = Path(__file__).resolve().parents[1]


def global_batches():
    """Four global batches of four sequences; in the last one two sequences are padded."""
    batches = random_batches(4, batch=4)
    mask = torch.ones_like(batches[3]["input_ids"])
    mask[2:, :130] = 0
    batches[3]["attention_mask"] = mask
    return batches


def share(batch, rank):
    return {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch.items()}


def launch(*arguments, processes=2, env=None):
    """Run this file's ``main`` (or a module) under accelerate launch; returns stderr."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    # --multi_gpu also starts processes where there is no GPU; --cpu needs MPI for more than one.
    command += [
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    paths = [str(_TESTS), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **(env or {}),
    }
    done = subprocess.run([*command, *arguments], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def main(output: str) -> None:
    """What each of the two processes runs."""
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    # Gates drawn differently on each process must still start out the same: the first one's are used.
    model = attached_llama()
    if rank == 1:
        from seerattention.hf.state import gates_of

        with torch.no_grad():
            for gate in gates_of(model):
                gate.k_linear.add_(1.0)
    shares = [share(batch, rank) for batch in global_batches()]
    held_out = random_batches(3, seed=9)
    state = Path(output) / "state.safetensors"
    history = distill(model, shares, CONFIG, eval_batches=held_out, state_path=state)
    loss = torch.tensor(history.loss)
    recall = torch.tensor(list(history.recall.values()))
    save_file({**gate_tensors(model), "loss": loss, "recall": recall}, f"{output}/rank{rank}.safetensors")
    # One process runs out of batches before the other: nobody hangs, nothing is lost.
    model = attached_llama()
    history = distill(model, shares[: 3 - rank], DistillConfig())
    save_file({"loss": torch.tensor(history.loss)}, f"{output}/uneven{rank}.safetensors")
    # Stopped after two steps and continued, with those uneven shares: the second process's are at an end by then.
    state = Path(output) / "stopped.safetensors"

    def stop(report):
        if report.step == 3:
            raise InterruptedError

    with suppress(InterruptedError):
        distill(attached_llama(), shares[: 3 - rank], DistillConfig(), on_step=stop, state_path=state, save_every=2)
    changed = shares[: 3 - rank]
    changed[0] = {"input_ids": changed[0]["input_ids"] + (changed[0]["input_ids"] == 0) * rank}  # of one process only
    with suppress(ValueError):
        distill(attached_llama(), changed, DistillConfig(), state_path=state)
        print("other batches were accepted")
    PartialState().wait_for_everyone()
    for _ in range(2):  # the second time there is nothing left to do, and one process has read less than the other
        history = distill(attached_llama(), shares[: 3 - rank], DistillConfig(), state_path=state)
    save_file({"loss": torch.tensor(history.loss)}, f"{output}/continued{rank}.safetensors")
    Processes.join(cpu=True).finish()  # gloo's threads may end a process with an error that leaves them running


def test_two_processes_equal_one(tmp_path):
    output = launch("-m", "distill.test_processes", str(tmp_path))
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name

    model = attached_llama()
    history = distill(model, global_batches(), CONFIG, eval_batches=random_batches(3, seed=9))
    torch.testing.assert_close(ranks[0].pop("loss"), torch.tensor(history.loss), rtol=1e-5, atol=0)
    expected_recall = torch.tensor(list(history.recall.values()))
    torch.testing.assert_close(ranks[0].pop("recall"), expected_recall, rtol=1e-4, atol=0)
    fresh = gate_tensors(attached_llama())
    for name, expected in gate_tensors(model).items():
        moved = (expected - fresh[name]).abs().max().item()
        assert (ranks[0][name] - expected).abs().max().item() < 0.02 * moved, name
    assert (tmp_path / "state.safetensors").exists()

    losses = [load_file(tmp_path / f"uneven{rank}.safetensors")["loss"] for rank in (0, 1)]
    assert torch.equal(*losses)
    assert len(losses[0]) == 3
    assert "same first batch" not in output
    for rank in (0, 1):
        assert torch.equal(load_file(tmp_path / f"continued{rank}.safetensors")["loss"], losses[0])
    assert "were accepted" not in output


@pytest.mark.slow
def test_the_command_of_the_recipes_runs_in_two_processes(tmp_path):
    """The other one, of the benchmark: tests/benchmarks/test_models.py."""
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the moon. " * 2000)
    options = {"--model": "testbed", "--data": text, "--output": tmp_path / "gates", "--length": 512, "--steps": 2}
    options |= {"--accumulation": 2, "--eval-sequences": 2, "--device": "cpu"}
    said = launch(
        "-m", "seerattention.cli.distill", "--no-budgets", *(str(x) for pair in options.items() for x in pair)
    )
    assert f"2 steps, {2 * 2 * 2 * 512:,} tokens" in said  # steps, processes, batches a step
    assert (tmp_path / "gates" / "gates.safetensors").is_file()


def test_gradients_are_averaged_over_all_rows(tmp_path):
    """The same comparison before AdamW blurs it: gradients themselves, without processes' start-up."""

    class Pair:
        """Stands in for the group: adds what the other trainer has put down."""

        rank, world_size, is_main = 0, 2, True

        def __init__(self):
            self.others: list[torch.Tensor] = []
            self.seen: list[torch.Tensor] = []

        def sum_(self, tensor):
            self.seen.append(tensor.clone())
            if self.others:
                tensor += self.others.pop(0)
            return tensor

    batch = global_batches()[3]
    config = DistillConfig(skip_rows=0.0, clip_norm=None)
    one = Trainer(attached_llama(), config)
    expected, tokens = one.train_step([batch])
    pair = Pair()
    Trainer(attached_llama(), config, processes=pair).train_step([share(batch, 1)])
    pair.others, pair.seen = pair.seen, []
    two = Trainer(attached_llama(), config, processes=pair)
    losses, both_tokens = two.train_step([share(batch, 0)])
    assert both_tokens == tokens
    for name in expected:
        assert abs(losses[name] - expected[name]) < 1e-5 * expected[name]
        for a, b in zip(one.masters[name].parameters(), two.masters[name].parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-7)


if __name__ == "__main__":
    main(sys.argv[1])
