"""One distillation step: tokens a second, memory, and whether it fits a 24 GB GPU.

    python -m benchmarks.distill --model llama-3.1-8b --lengths 8192 32768 65536 --rows 1.0 0.25
    python -m benchmarks.distill --model llama-3.1-8b --lengths 32768 --layers 4     # scaled to all layers
    python -m benchmarks.distill --form sub_block_shared --lengths 16384 32768 --memory-limit 22.5   # a 24 GB card
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision no -m benchmarks.distill --lengths 32768
    python -m benchmarks.distill --device cpu --tiny                                 # a rehearsal, in seconds

A step is what ``seer distill`` does with one prompt: a dense forward of the frozen model, and in every layer the pooled
attention map of some query-block rows, the gate's forward and backward, at the end AdamW on float32 masters. It is
timed beside the forward alone; the difference over the number of layers is what distilling one layer costs. With
``--layers N`` times are scaled as in ``benchmarks.e2e``, and memory by what each layer adds: weights, gates, masters,
gradients and optimizer state, all counted, not estimated. With ``--memory-limit`` no more than so many GiB of the GPU
are had, and what does not fit them is said and left out.

Under ``accelerate launch`` every process has a GPU, the whole model and prompts of its own, and gradients are averaged,
as ``seer distill`` does; tokens a second are those of all, memory is that of each, and the forward is one process's.

Before anything is timed, the losses of a step are compared with losses made from the reference implementation of the
target on the same tensors.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import seerattention as seer
from seerattention.cli.common import Terminal, resolve_device
from seerattention.distillation.losses import draw_rows, kl_sum
from seerattention.distillation.objectives import REDUCE_OF
from seerattention.distillation.processes import Processes
from seerattention.distillation.trainer import Trainer
from seerattention.evaluate.kernels import WrongResultError
from seerattention.evaluate.tables import Table
from seerattention.evaluate.timing import synchronize
from seerattention.hf import dense, find_decoder, observe
from seerattention.hf.prompts import run_prompt
from seerattention.ops.indices import num_blocks
from seerattention.ops.pooled_attention import pooled_attention

from .command import PROMPT, ModelBenchmark, case_of, fits, gib, hours, make_table, metric, model_parser, trained_gates
from .models import num_layers, random_tokens, without_layers
from .results import own_arguments

_LOSS_TOLERANCE = 1e-2
_CHECKED_ROWS = 0.5
# A 24 GB card has 24 GiB or a little less, of which the CUDA context, the display and fragments take about this much.
FITS_BYTES = int(22.5 * 2**30)
FORMS = {
    "paper": seer.PrefillGateConfig(),
    "sub_block": seer.SubBlockGateConfig(share_keys=False),
    "sub_block_shared": seer.SubBlockGateConfig(share_keys=True),
    "sub_block_mass": seer.SubBlockGateConfig(q_pitch=4, k_pitch=4, reduce="mass"),
}
_SKIP_ROWS = 0.0  # every row, so that "rows" is the share of all of them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    processes = Processes.join(cpu=options.device == "cpu")
    if processes.world_size > 1:
        if options.budget:
            raise ValueError("--budget ends a run by each process's own clock; leave it out with several processes")
        if options.device != "cpu":
            options.device = f"cuda:{processes.local_rank}"
    if options.memory_limit:
        limit_memory(options.memory_limit, torch.device(resolve_device(options.device)))
    benchmark = ModelBenchmark(
        name="distill",
        lengths=[8192, 32768, 65536],
        prepare=lambda model: seer.attach(model, seer.GateConfig(prefill=FORMS[options.form])),
        check=lambda model, name, length: _checked(check_losses(model, random_tokens(name, length), options.target)),
        cases=lambda options, lengths: [(length, rows) for length in lengths for rows in options.rows],
        measure=lambda name, model, case, options: measure_if_it_fits(name, model, case, options, processes),
        table=_table,
        silent=not processes.is_main,
    )
    status = benchmark.run(given, options, torch.float32 if options.tiny else getattr(torch, options.dtype))
    processes.finish()
    return status


def limit_memory(gib: float, device: torch.device) -> None:
    """Let this process have so much of the GPU's memory, as if it were a smaller one.

    Raises:
        ValueError: no GPU, or one that has less.
    """
    if device.type != "cuda":
        raise ValueError("--memory-limit is of a GPU's memory; leave it out on other devices")
    whole = torch.cuda.get_device_properties(device).total_memory
    if gib * 2**30 > whole:
        raise ValueError(f"--memory-limit {gib:g}: this GPU has {whole / 2**30:.1f} GiB")
    number = torch.cuda.current_device() if device.index is None else device.index  # a bare "cuda" is refused
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / whole, number)


def measure_if_it_fits(
    name: str, model: Any, case: tuple[Any, ...], options: argparse.Namespace, processes: Processes
) -> Iterator[dict[str, Any]]:
    """The result of a case, or none and a word where its memory does not suffice."""
    try:
        yield measure(name, model, case, options, processes)
    except torch.OutOfMemoryError:
        length, rows = case
        Terminal().say(f"{name}, {length} tokens, rows {rows:g}: does not fit the memory, left out")
        torch.cuda.empty_cache()


def _checked(loss_error: float) -> tuple[dict[str, Any], str]:
    return {"loss_error": loss_error}, f"losses agree with the reference to {loss_error:.1e}"


def measure(
    name: str, model: Any, asked: tuple[Any, ...], options: argparse.Namespace, processes: Processes
) -> dict[str, Any]:
    """Time steps and forwards in turns; the first of each is a warm-up. All processes begin a step together."""
    (length, rows), repeats, size = asked, options.repeats, options.batch_size
    device = model.device
    prompts = random_tokens(name, length, size * processes.world_size)
    batch = {"input_ids": prompts[processes.rank :: processes.world_size].to(device)}
    trainer = Trainer(model, _config(rows, options.target), processes=processes)
    trainer.broadcast()
    step_seconds, forward_seconds, peak = [], [], None
    for repeat in range(repeats + 1):
        with torch.no_grad(), dense(model):
            forward = _seconds(lambda: run_prompt(model, batch), device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        processes.wait()
        step = _seconds(lambda: trainer.train_step([batch]), device)
        if repeat:
            step_seconds.append(step)
            forward_seconds.append(forward)
            if device.type == "cuda":
                peak = max(peak or 0, torch.cuda.max_memory_allocated(device))
    with torch.no_grad(), without_layers(model):
        fixed = statistics.median(_seconds(lambda: run_prompt(model, batch), device) for _ in range(repeats + 1))
    layers, whole = model.config.num_hidden_layers, num_layers(name)
    step, forward = statistics.median(step_seconds), statistics.median(forward_seconds)
    whole_step = fixed + max(0.0, step - fixed) * whole / layers
    metrics: dict[str, Any] = {
        "tokens_per_s": size * processes.world_size * length / whole_step,
        "step_s": whole_step,
        "layer_extra_s": (step - forward) / layers,
        "step_over_forward": step / forward,
    }
    if peak is not None:
        metrics["peak_bytes"] = peak + (whole - layers) * _bytes_per_layer(model, trainer)
        metrics["fits_24gb"] = metrics["peak_bytes"] <= FITS_BYTES
    case = {
        "model": name,
        "length": length,
        "rows": rows,
        "form": options.form,
        "layers": layers,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    # Not in the cases of one prompt on one GPU, which earlier runs have measured.
    case |= {"gpus": processes.world_size} if processes.world_size > 1 else {}
    case |= {"batch_size": size} if size > 1 else {}
    case |= {"target": options.target} if options.target != "max" else {}
    return {
        "case": case,
        "metrics": metrics,
        "whole_layers": whole,
        "step_seconds": step_seconds,
        "forward_seconds": forward_seconds,
        "without_layers_s": fixed,
        "measured_peak_bytes": peak,
    }


def check_losses(model: Any, ids: torch.Tensor, target: str = "max") -> float:
    """Losses of one step against losses from the reference target: the largest difference over the largest loss.

    Raises:
        WrongResultError: a loss is off by more than one in a hundred.
    """
    trainer = Trainer(model, _config(_CHECKED_ROWS, target))
    rows = draw_rows(num_blocks(ids.shape[1], 64), _CHECKED_ROWS, _SKIP_ROWS, 0, 0).to(model.device)
    expected: dict[str, float] = {}

    def reference_loss(inputs: Any, blocks: Any) -> None:
        name = trainer.names[inputs.layer]
        common = {"scale": inputs.scale, "rows": rows, "reduce": REDUCE_OF[target]}
        true_map = pooled_attention(inputs.q, inputs.k, implementation="reference", **common)
        logits = trainer.masters[name](inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin, rows=rows)
        expected[name] = float(kl_sum(logits, true_map)) / (len(rows) * true_map.shape[1])

    batch = {"input_ids": ids.to(model.device)}
    with torch.no_grad(), dense(model), observe(model, reference_loss):
        run_prompt(model, batch)
    stepped = trainer.train_step([batch])
    assert stepped is not None
    losses = stepped[0]
    worst = max(abs(losses[name] - loss) for name, loss in expected.items()) / max(expected.values())
    if not worst <= _LOSS_TOLERANCE:
        raise WrongResultError(f"wrong results: a loss is {worst:.1e} (relative) from that with the reference target")
    return worst


def _config(rows: float, target: str) -> seer.DistillConfig:
    share = None if rows == 1 else rows
    return seer.DistillConfig(rows=share, skip_rows=_SKIP_ROWS, warmup=0, steps=1000, target=target)


def _bytes_per_layer(model: Any, trainer: Trainer) -> int:
    """What one more layer holds: its weights, its gate, and in float32 the master, its gradient and two moments."""
    decoder: Any = find_decoder(model)
    weights = sum(p.numel() * p.element_size() for p in decoder.layers[0].parameters())
    gate = next(iter(trainer.gates.values()))
    return weights + sum(p.numel() * (p.element_size() + 4 * 4) for p in gate.parameters())


def _seconds(function: Any, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = model_parser("benchmarks.distill", __doc__, check_length=2048)
    parser.add_argument("--form", choices=list(FORMS), default="paper", help="form of the gates")
    parser.add_argument("--target", choices=list(REDUCE_OF), default="max", help="what gates learn of a tile")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts a step, of each process")
    parser.add_argument("--memory-limit", type=float, help="GiB of the GPU that may be used: 22.5 for a 24 GB card")
    parser.add_argument("--rows", type=float, nargs="+", default=[1.0, 0.25], help="share of the query-block rows")
    return parser.parse_args(arguments)


def _table(results: Sequence[dict[str, Any]]) -> Table:
    columns = [
        *PROMPT,
        ("rows", case_of("rows", "g")),
        ("gates", trained_gates),
        ("GPUs x prompts", lambda r: f"{r['case'].get('gpus', 1)} x {r['case'].get('batch_size', 1)}"),
        ("step s", metric("step_s", ".3g")),
        ("tokens/s", metric("tokens_per_s", ".0f")),
        ("hours for 0.5 B", hours),
        ("step / forward", metric("step_over_forward", ".2f")),
        ("extra ms a layer", metric("layer_extra_s", ".3g", 1e3)),
        ("peak GiB", lambda result: gib(result["metrics"].get("peak_bytes"))),
        ("fits 24 GB", fits),
    ]
    return make_table(results, columns, "One step, scaled to all layers; memory of each GPU.")


if __name__ == "__main__":
    sys.exit(main())
