"""Time to first token of a whole model, dense and sparse: gate, selection and list building included.

    python -m benchmarks.e2e --model llama-3.1-8b --lengths 32768 131072 --densities 0.1 --layers 8
    python -m benchmarks.e2e --model llama-3.1-8b qwen3-4b --lengths 1024 2048 4096 8192
    python -m benchmarks.e2e --model llama-3.1-8b --lengths 32768 131072 --chunk 2048 --layers 8
    python -m benchmarks.e2e --model llama-3.1-8b --lengths 131072 --layers 8 --form paper sub_block_shared
    python -m benchmarks.e2e --device cpu --tiny                                     # a rehearsal, in seconds

One prompt in one forward, logits of the last token only, no cache kept; with ``--chunk``, in forwards of so many tokens
on a cache, and dense attention is then cuDNN's to the cached keys and to the chunk's own, merged by log-sum-exp:
transformers' ``sdpa`` makes a mask in memory there and is slower. Weights are random, gates are fresh: times
depend on shapes and densities, not on what a model has learned. ``--form`` names the gates, one after another, each in
turns with dense attention; ``over_paper`` is a form's time over that of the paper's. Dense is transformers' own
``sdpa`` on cuDNN. With ``--layers N`` only so many are built, and times are scaled: what the model takes without
layers, measured, plus the rest times all layers over N. Peak memory is that of the layers that were built.

Two sparse runs: "sparse", where every prompt is, and "as shipped", with the default ``min_context``, below which
prompts run dense. Before anything is timed ``TopK(1.0)``, every block through the sparse kernel, has to give what dense
attention gives, as closely as another dense kernel does; and density 0.1 has to give something else, or the check could
not fail.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import seerattention as seer
from seerattention.cli.common import resolve_device
from seerattention.evaluate.forward import decoder_states
from seerattention.evaluate.kernels import WrongResultError
from seerattention.evaluate.settings import Setting
from seerattention.evaluate.tables import Table
from seerattention.evaluate.timing import TimingResult, prefill_seconds, time_prefill
from seerattention.hf.min_context import Shape, default_min_context

from .command import PROMPT, ModelBenchmark, as_asked, case_of, form_of, gib, make_table, metric, model_parser, speedup
from .distill import FORMS
from .models import lower_right, num_layers, random_tokens, without_layers
from .results import own_arguments

# Rounding to this size is no difference, whatever another dense kernel happens to give.
_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    given = list(own_arguments() if arguments is None else arguments)
    options = _parse(given)
    # The rehearsal on the CPU is in float32; on a GPU, cuDNN's attention takes half precision only.
    on_cpu = resolve_device(options.device) == "cpu"
    dtype = torch.float32 if options.tiny and on_cpu else getattr(torch, options.dtype)
    benchmark = ModelBenchmark(
        name="e2e",
        lengths=[1024 << i for i in range(8)],
        prepare=lambda model: model,
        check=lambda model, name, length: _checked(check_model(model, random_tokens(name, length), dtype)),
        cases=lambda options, lengths: [(length,) for length in lengths],
        measure=lambda name, model, case, options: measure(name, model, case[0], options),
        table=_table,
    )
    return benchmark.run(given, options, dtype)


def _checked(check: dict[str, float]) -> tuple[dict[str, Any], str]:
    return {"check": check}, str(check)


def measure(name: str, model: Any, length: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One result a density, and for short prompts one more a density, as shipped."""
    densities, repeats, chunk = options.densities, options.repeats, options.chunk
    if chunk is not None:
        model.set_attn_implementation(lower_right())
    ids = random_tokens(name, length).to(model.device)
    layers, whole = model.config.num_hidden_layers, num_layers(name)
    with torch.inference_mode(), _dense_kernel(model.device), without_layers(model):
        fixed = sorted(prefill_seconds(model, ids, chunk) for _ in range(repeats + 1))[repeats // 2]

    def scaled(result: TimingResult) -> float:
        return result.median if layers == whole else fixed + max(0.0, result.median - fixed) * whole / layers

    results: list[dict[str, Any]] = []
    default = default_min_context(Shape.of(model.config), model.device)
    for min_context, form in itertools.product((0, default) if length <= 2 * default else (0,), options.form):
        seer.attach(model, seer.GateConfig(prefill=FORMS[form]), min_context=min_context)
        settings = [
            Setting(f"sparse {density:g}", policy=seer.TopK(density), min_context=None) for density in densities
        ]
        try:
            with _dense_kernel(model.device if chunk is None else torch.device("cpu")):
                settings = [Setting.dense(), *settings]
                dense, *sparse = time_prefill(model, ids, settings, repeats=repeats, chunk=chunk)
        finally:
            seer.detach(model)
        for density, result in zip(densities, sparse, strict=True):
            metrics = {
                "dense_s": scaled(dense),
                "sparse_s": scaled(result),
                "speedup": scaled(dense) / scaled(result),
                "slowdown": scaled(result) / scaled(dense),
                "density": result.density,
            }
            case = {
                "model": name,
                "length": length,
                "density": density,
                "min_context": "default" if min_context else "0",
                "layers": layers,
                "dtype": str(model.dtype).removeprefix("torch."),
                **({} if chunk is None else {"chunk": chunk}),
                **({} if form == "paper" else {"form": form}),
            }
            papers = [other for other in results if other["case"] == {k: v for k, v in case.items() if k != "form"}]
            if papers and form != "paper":
                metrics["over_paper"] = metrics["sparse_s"] / papers[0]["metrics"]["sparse_s"]
            timed = {"dense": dense.to_dict(), "sparse": result.to_dict(), "without_layers_s": fixed}
            results.append(
                {"case": case, "metrics": metrics, "whole_layers": whole, "min_context": min_context, **timed}
            )
    return results


@torch.inference_mode()
def check_model(model: Any, ids: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Hold ``TopK(1.0)`` to dense attention.

    Returns:
        Relative differences of the last hidden states from the dense ones: of ``TopK(1.0)``, of another dense kernel,
        and of density 0.1.

    Raises:
        WrongResultError: ``TopK(1.0)`` is further from dense than twice another dense kernel is, or density 0.1 is not
            much further.
    """
    ids = ids.to(model.device)
    with _dense_kernel(model.device):
        dense = decoder_states(model, ids).float()
    other_kernel = SDPBackend.FLASH_ATTENTION if model.device.type == "cuda" else SDPBackend.MATH
    with sdpa_kernel(other_kernel):
        other = _difference(decoder_states(model, ids), dense)
    seer.attach(model, seer.GateConfig(), prefill=seer.TopK(1.0), min_context=0)
    try:
        everything = _difference(decoder_states(model, ids), dense)
        seer.set_policy(model, seer.TopK(0.1))
        tenth = _difference(decoder_states(model, ids), dense)
    finally:
        seer.detach(model)
    found = {"all_blocks": everything, "other_dense_kernel": other, "density_0.1": tenth}
    allowed = max(2 * other, _FLOOR[dtype])
    if not everything <= allowed:
        raise WrongResultError(
            f"wrong results: TopK(1.0) is {everything:.1e} from dense attention (relative, last hidden states of "
            f"{ids.shape[1]} tokens); {allowed:.1e} is allowed, another dense kernel is {other:.1e} from it"
        )
    if not tenth > 2 * allowed:
        raise WrongResultError(
            f"the check is blind: density 0.1 is {tenth:.1e} from dense attention, no more than rounding "
            f"({allowed:.1e}); check with more tokens"
        )
    return found


def _difference(states: Tensor, dense: Tensor) -> float:
    return float((states.float() - dense).norm() / dense.norm())


@contextmanager
def _dense_kernel(device: torch.device) -> Iterator[None]:
    """cuDNN for dense attention where there is a GPU."""
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = model_parser("benchmarks.e2e", __doc__, check_length=4096)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1])
    parser.add_argument("--chunk", type=int, help="tokens a forward; default: the whole prompt in one")
    parser.add_argument("--form", nargs="+", default=["paper"], choices=list(FORMS), help="form of the gates")
    return parser.parse_args(arguments)


def _table(results: Sequence[dict[str, Any]]) -> Table:
    columns = [
        *PROMPT,
        ("gates", form_of),
        ("asked", case_of("density", "g")),
        ("run", as_asked),
        ("density", metric("density", ".3f")),
        ("dense ms", metric("dense_s", ".4g", 1e3)),
        ("sparse ms", metric("sparse_s", ".4g", 1e3)),
        ("speed-up", speedup),
        ("over paper", lambda result: f"{result['metrics'].get('over_paper', 1.0):.3f}"),
        ("peak GiB", lambda result: gib(result["sparse"]["peak_bytes"])),
    ]
    return make_table(results, columns, "Time to first token, one prompt in one forward; scaled to all layers.")


if __name__ == "__main__":
    sys.exit(main())
