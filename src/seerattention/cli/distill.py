"""``seer distill``: train gates for a model from text. Killed and started again, it continues where it was."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import PHASES
from .common import Terminal, errors, resolve_device, token_count
from .distill_job import (
    AUTO,
    DistillJob,
    check_job,
    learning_rate_of,
    read_text,
    repeats_of,
    row_choice,
    same_run,
    target_of,
)
from .distill_results import fit_budgets, write_results
from .gate_form import (
    GateForm,
    KeyPitch,
    MergeHeads,
    Norms,
    QueryPitch,
    QueryWindow,
    ShareKeys,
    TileScore,
    say_what_gates_decide,
)
from .opening import count_parameters, load_model
from .options import (
    check_choice,
    check_dtype,
    check_gates,
    check_model,
    check_output,
    check_seed,
    is_given,
    real,
    say_unused,
    whole,
)
from .parameters import BlockSize, Dtype, ModelName, TextField

if TYPE_CHECKING:
    from ..config import GateConfig
    from ..distillation import DistillConfig

__all__ = ["command"]


PREFILL, DECODE = PHASES
BOTH = "both"


def command(
    context: typer.Context,
    model: ModelName,
    data: Annotated[
        str,
        typer.Option(
            help=".jsonl or .txt file (also .zst, .gz, .bz2, .xz), a folder of them, or a dataset id "
            "(owner/name:config@split)."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the gates, the history and the state of the run.")],
    length: Annotated[str, typer.Option(help="Tokens a sequence (4096, 16K).")] = "8K",
    batch_size: Annotated[int, typer.Option(help="Sequences a step, process and accumulation step.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0: one pass over the data.")] = 500,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default: 2e-3; for gates of decoding 1e-3.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 20,
    clip_norm: Annotated[float, typer.Option(help="Largest gradient norm of a layer; 0: no clipping.")] = 1.0,
    rows: Annotated[float, typer.Option(help="Query blocks a step: a share (at most 1) or a whole number.")] = 0.25,
    skip_rows: Annotated[float, typer.Option(help="Share of the first query blocks that is left out.")] = 0.25,
    last_rows: Annotated[int, typer.Option(help="How many of the last query blocks are in every step.")] = 0,
    phase: Annotated[
        str,
        typer.Option(
            help="prefill; decode: gates of decoding (their rows are query tokens); both: one after the other."
        ),
    ] = "prefill",
    reduction: Annotated[str, typer.Option(help="row, or official (the published code's mean).")] = "row",
    target: Annotated[
        str,
        typer.Option(
            help="What gates learn of a tile of the attention map: max, its largest probability (the papers; keeps "
            "look-ups), or row_mass, the most that one query gives to the whole tile (better perplexity of plain "
            "text). auto: what the true maps of this model lose less by, on two held-out sequences; of decoding max."
        ),
    ] = AUTO,
    block_size: BlockSize = 64,
    form: Annotated[
        str,
        typer.Option(
            help="Form of fresh gates: sub_block, which looks more finely than its mask, or paper, that of the "
            "published gates (and of GateConfig())."
        ),
    ] = "sub_block",
    k_pooling: Annotated[str, typer.Option(help="Key poolings, of max, min and avg.")] = "max,min,avg",
    q_pooling: Annotated[
        str | None,
        typer.Option(help="Query poolings, of max, min and avg. Default: all three; of --form paper avg."),
    ] = None,
    q_pitch: QueryPitch = None,
    k_pitch: KeyPitch = None,
    tile_score: TileScore = None,
    share_keys: ShareKeys = True,
    qk_norm: Norms = True,
    merge_heads: MergeHeads = True,
    query_window: QueryWindow = 1,
    gate_hidden_size: Annotated[int, typer.Option(help="Gate width; 0: the model's head_dim.")] = 0,
    gates: Annotated[
        str | None, typer.Option(help="Start from these gates instead of fresh ones; they decide block size and form.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Decides fresh gates, the rows drawn, what --repeats and --tasks draw.")
    ] = 0,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    text_field: TextField = "text",
    document_tokens: Annotated[int, typer.Option(help="Use at most so many tokens of each document; 0: all.")] = 0,
    repeats: Annotated[
        float | None,
        typer.Option(
            help="Share of the training sequences, from 0 to 1, whose last quarter is replaced by passages of 8 to "
            "128 tokens from random places before it: rows that look something up, of which plain text has few. "
            "Default: 1; for gates of decoding, where it is not measured, 0."
        ),
    ] = None,
    tasks: Annotated[
        float,
        typer.Option(
            help="Share of the training sequences, from 0 to 1, that have retrieval tasks woven in: sentences and "
            "dictionaries in the text, asked for near its end. For models that know such tasks, as those that follow "
            "instructions do; no passages are said again in these."
        ),
    ] = 0.0,
    eval_sequences: Annotated[int, typer.Option(help="First sequences, held out for block recall; 0: no recall.")] = 4,
    eval_every: Annotated[
        int, typer.Option(help="Measure block recall every so many steps; 0: only before and after.")
    ] = 100,
    eval_density: Annotated[float, typer.Option(help="Density at which block recall is measured.")] = 0.1,
    budgets: Annotated[
        bool, typer.Option(help="At the end, fit on the held-out sequences what spends a density (prefill gates).")
    ] = True,
    by_layer: Annotated[
        bool, typer.Option(help="Budgets spend more in layers in which a block is worth more, see seer calibrate.")
    ] = True,
    save_every: Annotated[int, typer.Option(help="Save the state every so many steps; 0: by time only.")] = 0,
    save_seconds: Annotated[float, typer.Option(help="Save the state every so many seconds.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train gates by self-distillation.

    The model stays as it is; small gates learn to predict its attention map. OUTPUT can then be given to
    seer eval --gates and to seerattention.attach (of --phase both: the gates of OUTPUT/prefill and OUTPUT/decode
    together). The same command, started again after an interruption, continues
    the run and ends with the same gates. Several GPUs: accelerate launch -m seerattention.cli.distill, same options.
    """
    with errors():
        from ..distillation.config import TARGETS

        terminal = Terminal(as_json)
        for option, number, least in (
            ("--batch-size", batch_size, 1),
            ("--steps", steps, 0),
            ("--gate-hidden-size", gate_hidden_size, 0),
            ("--document-tokens", document_tokens, 0),
            ("--eval-sequences", eval_sequences, 0),
            ("--eval-every", eval_every, 0),
            ("--save-every", save_every, 0),
        ):
            whole(option, number, least)
        if learning_rate is not None:
            real("--learning-rate", learning_rate, exclusive=True)
        real("--clip-norm", clip_norm)
        real("--save-seconds", save_seconds)
        check_seed(seed)
        check_dtype(dtype)
        check_output(output)
        if gates is not None:
            check_gates(gates)
        if not eval_sequences:
            unused = ("eval_every", "eval_density", "budgets", "by_layer")
            say_unused(context, terminal, unused, "no sequences are held out for block recall and budgets")
        if phase == BOTH and gates is not None:
            raise ValueError("--phase both trains fresh gates; to go on from --gates train one phase at a time")
        if phase == BOTH and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "--phase both runs in one process; on several train prefill and decode one after the other, and put "
                "them together by seer join"
            )
        check_choice([target], (AUTO, *TARGETS), "target")
        runs = {}
        for one in (PREFILL, DECODE) if phase == BOTH else (phase,):
            shape = GateForm(
                "seerattention_r" if one == DECODE else form,
                block_size=block_size,
                k_pooling=k_pooling,
                q_pooling=q_pooling,
                gate_hidden_size=gate_hidden_size,
                q_pitch=q_pitch,
                k_pitch=k_pitch,
                tile_score=tile_score,
                share_keys=share_keys,
                qk_norm=qk_norm,
                merge_heads=merge_heads,
                query_window=query_window,
            )
            if phase != BOTH:  # where the other phase may have it
                shape.say_unused(context, terminal)
            tokens = token_count(length, "--length")
            job = DistillJob(
                model=check_model(model),
                data=data,
                length=tokens,
                batch_size=batch_size,
                text_field=text_field,
                document_tokens=document_tokens,
                repeats=repeats_of(one, tokens, terminal) if repeats is None else repeats,
                tasks=tasks,
                eval_sequences=eval_sequences,
                dtype=dtype,
                device=device,
                gates=gates,
                gate=shape.config(),
            )
            settings = {
                "steps": steps or None,
                "learning_rate": learning_rate_of(one) if learning_rate is None else learning_rate,
                "warmup": warmup,
                "clip_norm": clip_norm or None,
                "rows": row_choice(rows),
                "skip_rows": skip_rows,
                "last_rows": last_rows,
                "reduction": reduction,
                "target": "max" if target == AUTO else target,
                "accumulation": accumulation,
                "seed": seed,
                "phase": one,
                "eval_every": eval_every or None,
                "eval_density": eval_density,
            }
            asked = {} if gates is None else {k: v for k, v in shape.options().items() if is_given(context, k)}
            by_size = shape if gates is None and shape.by_size else None
            by_model = _ByModel(by_size, target == AUTO and one == PREFILL)
            runs[one] = job, check_job(job, settings), asked, by_model  # of both phases before one is trained
        results = {}
        for one, (job, configs, asked, by_model) in runs.items():
            folder = output / one if phase == BOTH else output
            results[one] = _distill(
                job, configs, folder, save_every or None, save_seconds, terminal, asked, by_model, budgets, by_layer
            )
        if phase == BOTH:
            from ..gates.sources import join

            join(str(output / PREFILL), str(output / DECODE), output)
            terminal.say(f"gates of both phases are in {output}")
            terminal.emit({"output": str(output), **results})
        elif results[phase] is not None:
            terminal.emit(results[phase])


@dataclass(frozen=True)
class _ByModel:
    """What the model decides.

    Attributes:
        form: the form of gates, by its size; None: ``--gates`` or options have said all of it.
        target: whether it decides about the target.
    """

    form: GateForm | None
    target: bool


def _distill(
    job: DistillJob,
    configs: tuple[DistillConfig, GateConfig],
    output: Path,
    save_every: int | None,
    save_seconds: float,
    terminal: Terminal,
    asked: dict[str, Any],
    by_model: _ByModel,
    budgets: bool,
    by_layer: bool,
) -> dict[str, Any] | None:
    """What ``--json`` prints, of the first process.

    Args:
        asked: what was said of the form of gates although they come from ``job.gates``.
        by_model: what is left to the model, of which ``configs`` say nothing or anything.
        budgets, by_layer: whether they are to be fitted, and for layers apart.
    """
    import torch

    from .. import hf
    from ..config import GateConfig
    from ..distillation import DistillationError
    from ..distillation import distill as run_distillation
    from ..distillation.documents import open_documents
    from ..distillation.processes import Processes
    from ..distillation.progress import distill_progress
    from ..distillation.saved import STATE_FILE
    from ..gates.sources import load_gates
    from ..hf.architectures import find_decoder
    from ..hf.state import state_of

    config, gate_config = configs
    documents = open_documents(job.data, text_field=job.text_field)
    device = resolve_device(job.device)
    processes = Processes.join(cpu=device == "cpu")
    if processes.world_size > 1 and device == "cuda":
        device = f"cuda:{processes.local_rank}"
    if by_model.form is not None:
        by_size = replace(by_model.form, parameters=count_parameters(job.model))
        job = replace(job, gate=by_size.config())
        gate_config = GateConfig.from_dict(job.gate)
        if processes.is_main:
            by_size.say_sub_blocks(terminal)
    output.mkdir(parents=True, exist_ok=True)
    identity = same_run(job, documents, output / STATE_FILE)

    model, tokenizer = load_model(job.model, device, job.dtype)
    if job.gates is not None:  # before the text is read: gates of another model end the run here
        gate_config = load_gates(job.gates, find_decoder(model).config).gate_config
    batches, held_out = read_text(job, documents, tokenizer, processes, config)
    decided: dict[str, Any] = {}
    if by_model.target and PREFILL in gate_config.phases:
        size = gate_config.block_size_of(PREFILL)
        target, decided = target_of(model, held_out, output / STATE_FILE, size, processes, terminal)
        config = replace(config, target=target)
    torch.manual_seed(config.seed)
    hf.attach(model, gate_config if job.gates is None else job.gates, min_context=0)
    main, result = processes.is_main, None
    if main:
        terminal.say(
            f"distilling {config.phase} gates of {job.model} on {device}: {job.length} tokens a sequence, text from "
            f"{job.data}{job.says_of_sequences()}"
        )
        if job.gates is not None:
            say_what_gates_decide(terminal, job.gates, state_of(model).gate_config, config.phase, asked)
    try:
        with distill_progress(terminal.err) if main else nullcontext() as on_step:
            history = run_distillation(
                model,
                batches,
                config,
                eval_batches=held_out,
                on_step=on_step,
                state_path=output / STATE_FILE,
                save_every=save_every,
                save_seconds=save_seconds,
                settings=identity,
            )
    except KeyboardInterrupt:
        if main and (output / STATE_FILE).exists():
            terminal.say(f"the same command goes on from {output / STATE_FILE}")
        raise
    except DistillationError as error:
        raise ValueError(str(error)) from error
    processes.finish()  # the others do not wait: what follows may take longer than a collective operation may
    if main:
        if budgets and held_out and config.phase == "prefill":
            hf.save_gates(model, output)  # nothing is lost if that fails
            fit_budgets(model, held_out, terminal, by_layer=by_layer)
        told = {**job.to_dict(), **({"target decided by": decided} if decided else {})}
        result = write_results(model, history, config, output, terminal, told)
    return result


if __name__ == "__main__":
    typer.run(command)
