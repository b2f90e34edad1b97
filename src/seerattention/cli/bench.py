"""``seer bench``: dense beside sparse attention on this device, and from which length on sparse pays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Terminal, errors, parse_list, resolve_device, token_count
from .opening import load_config
from .options import check_dtype, check_model, named, parse_density, real, say_unused, whole
from .parameters import BlockSize, Device, Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..evaluate.bench import BenchResult
    from ..evaluate.kernels import AttentionShape
    from ..evaluate.tables import Table

_LENGTHS = {"cpu": "1K,2K,4K,8K", "cuda": "1K,2K,4K,8K,16K,32K,64K,128K"}


def command(
    context: typer.Context,
    lengths: Annotated[
        str | None,
        typer.Option(help="Prompt lengths in tokens (4096 or 4K). Default: 1K to 8K on the CPU, to 128K on a GPU."),
    ] = None,
    densities: Annotated[str, typer.Option(help="Densities of top-k selection.")] = "0.2,0.1,0.05",
    model: Annotated[
        str | None,
        typer.Option(
            help="Take heads and head_dim from the config of this Hugging Face model (also testbed, smollm2)."
        ),
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads; the default is the shape of an 8B Llama.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    block_size: BlockSize = 64,
    seconds: Annotated[float, typer.Option(help="Time to spend on each measurement.")] = 0.5,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16 on a GPU, float32 on the CPU), bfloat16, float16 or float32.")
    ] = "auto",
    device: Device = "auto",
    save: Annotated[
        bool,
        typer.Option(
            "--save",
            help="Keep the length from which on whole forwards of --model pay, for this machine and this shape: the "
            "default min_context from then on.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time one attention layer on this device, densely and sparsely, and say from which length on sparse pays.

    Sparse time is everything that replaces dense attention in prefill: the gate, the selection of blocks and the
    attention over them. Dense is the fastest kernel that torch has here. Inputs are random, batch size 1; what is timed
    is checked against a float32 reference first.

    Example: seer bench --lengths 4K,16K,64K --densities 0.2,0.1
    """
    with errors():
        terminal = Terminal(as_json)
        for option, value in (("--heads", heads), ("--kv-heads", kv_heads), ("--head-dim", head_dim)):
            whole(option, value)
        real("--seconds", seconds)
        check_dtype(dtype)
        if save and model is None:
            raise ValueError("--save is for models of one shape; say which with --model")
        if model is not None:
            check_model(model)
            say_unused(context, terminal, ("heads", "kv_heads", "head_dim"), f"--model {model} has its own")

        import torch

        from ..evaluate.bench import bench_attention, pays_from
        from ..evaluate.environment import environment

        chosen = torch.device(resolve_device(device))
        default = _LENGTHS.get(chosen.type, _LENGTHS["cuda"])
        asked_lengths = sorted(set(parse_list(default if lengths is None else lengths, token_count, "lengths")))
        asked_densities = sorted(set(parse_list(densities, parse_density, "densities")), reverse=True)
        if asked_lengths[0] < 2 * block_size:
            raise ValueError(f"--lengths must be at least two blocks, {2 * block_size} tokens, got {asked_lengths[0]}")
        shape = _shape(model, heads, kv_heads, head_dim, block_size, _dtype(dtype, chosen))
        facts = environment()
        terminal.say(f"{_device_name(chosen, facts)}, {_describe(shape)}")
        results: list[BenchResult] = []
        with terminal.progress("measuring", len(asked_lengths)) as advance:
            for length in asked_lengths:
                results += bench_attention(shape, length, asked_densities, chosen, seconds=seconds)
                advance(1)
        minimum = {density: pays_from(results, density) for density in asked_densities}
        terminal.table(_table(results, asked_lengths, asked_densities))
        for line in _advice(minimum, asked_lengths):
            terminal.out.print(line, markup=False, soft_wrap=True)
        saved = None
        if save:
            saved = _save(str(model), asked_lengths, asked_densities[0], chosen, shape.dtype, facts, terminal)
        terminal.emit(
            {
                **({} if saved is None else {"saved": saved}),
                "environment": facts,
                "device": str(chosen),
                "shape": {
                    "heads": shape.heads,
                    "kv_heads": shape.kv_heads,
                    "head_dim": shape.head_dim,
                    "block_size": shape.block_size,
                    "dtype": str(shape.dtype).removeprefix("torch."),
                },
                "results": [result.to_dict() for result in results],
                "min_context": {f"{density:g}": length for density, length in minimum.items()},
            }
        )


def _save(
    model: str,
    lengths: Sequence[int],
    density: float,
    device: Any,
    dtype: Any,
    facts: dict[str, Any],
    terminal: Terminal,
) -> dict[str, Any]:
    """Measure whole forwards of a few layers, and keep from which length on they pay."""
    from ..evaluate.crossing import LAYERS, measure_prompts, pays_from
    from ..hf import min_context

    config = load_config(model)
    with terminal.progress(f"{LAYERS} layers of the model", len(lengths)) as advance:
        speedups = measure_prompts(config, lengths, density, device, dtype, advance=advance)
    found = pays_from(speedups)
    versions = {name: facts["versions"][name] for name in ("seerattention", "torch", "triton")}
    how = {"density": density, "speedups": speedups, "dtype": str(dtype).removeprefix("torch."), "versions": versions}
    path = min_context.save(min_context.Shape.of(config), device, found, how)
    if found > lengths[-1]:
        terminal.say(f"sparse forwards do not pay up to {lengths[-1]} tokens here")
    terminal.say(f"from now on min_context is {found} by default for this shape on this machine; kept in {path}")
    return {"min_context": found, "speedups": speedups, "path": str(path)}


def _dtype(name: str, device: Any) -> Any:
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def _shape(model: str | None, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: Any) -> AttentionShape:
    from ..evaluate.kernels import AttentionShape
    from ..ops.dispatch import BLOCK_SIZES, MAX_HEAD_DIM

    if block_size not in BLOCK_SIZES:
        raise ValueError(f"--block-size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    if model is not None:
        from ..hf.architectures import Geometry

        config = load_config(model)
        if not getattr(config, "num_attention_heads", None):
            raise ValueError(f"--model: the config of {model} ({type(config).__name__}) names no attention heads")
        geometry = Geometry.of(config)
        heads, kv_heads, head_dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{'--model' if model else '--head-dim'}: head_dim can be at most {MAX_HEAD_DIM}, got {head_dim}"
        )
    with named("--model" if model else "--heads and --kv-heads"):
        return AttentionShape(heads, kv_heads, head_dim, block_size, dtype)


def _device_name(device: Any, facts: dict[str, Any]) -> str:
    if device.type == "cuda":
        return str(facts["devices"][device.index or 0]["name"])
    return f"{facts['processor']}, {facts['threads']} threads"


def _describe(shape: AttentionShape) -> str:
    return (
        f"{shape.heads} query heads, {shape.kv_heads} KV heads, head_dim {shape.head_dim}, blocks of "
        f"{shape.block_size}, {str(shape.dtype).removeprefix('torch.')}"
    )


def _table(results: Sequence[BenchResult], lengths: Sequence[int], densities: Sequence[float]) -> Table:
    from ..evaluate.tables import Table, format_length

    by_case = {(result.length, result.density): result for result in results}
    rows = []
    for length in lengths:
        first = by_case[length, densities[0]]
        cells = [
            f"{_milliseconds(item.sparse_seconds)} ({item.speedup:.2f}x)"
            for item in (by_case[length, density] for density in densities)
        ]
        select = max(by_case[length, density].select_seconds for density in densities)
        rows.append(
            [
                format_length(length),
                _milliseconds(first.dense_seconds),
                first.dense_kernel,
                *cells,
                _milliseconds(select),
            ]
        )
    caption = (
        "One attention layer, milliseconds (times as fast as dense). Sparse includes the gate and the selection, whose "
        "share is the last column."
    )
    headers = [
        "tokens",
        "dense",
        "dense kernel",
        *(f"density {density:g}" for density in densities),
        "gate + selection",
    ]
    return Table(headers, rows, caption)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _advice(minimum: dict[float, int | None], lengths: Sequence[int]) -> list[str]:
    """One sentence a density."""
    from ..evaluate.tables import format_length

    lines = []
    for density, length in minimum.items():
        if length is None:
            lines.append(f"density {density:g}: sparse does not pay up to {format_length(lengths[-1])} tokens here")
        else:
            lines.append(
                f"density {density:g}: sparse pays from {format_length(length)} tokens on: "
                f"seer.attach(model, gates, prefill=seer.TopK({density:g}), min_context={length})"
            )
    return lines
