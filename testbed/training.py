"""The training run: phases of growing context under one time budget, with progress, curves, checkpoints and a watchdog."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .data import Batches
from .model import FastLlama, ModelConfig, export

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        context: tokens a sequence.
        share: share of the time budget.
        tokens: tokens a step.
        rate: AdamW learning rate; the rate glides from one phase's to the next's.
        tasks: share of sequences with a task, among those that are not drills.
        drills: share of sequences that are drills (no book text).
    """

    context: int
    share: float
    tokens: int
    rate: float
    tasks: float = 0.6
    drills: float = 0.0


PHASES = (
    Phase(128, 0.08, 16_384, 3e-4, drills=1.0),
    Phase(512, 0.10, 32_768, 5e-4, tasks=0.75, drills=0.95),
    Phase(1024, 0.15, 65_536, 8e-4, tasks=0.75, drills=0.4),
    Phase(4096, 0.23, 131_072, 1e-3, tasks=0.7, drills=0.2),
    Phase(16_384, 0.31, 131_072, 1e-3, tasks=0.65, drills=0.1),
    Phase(32_768, 0.13, 131_072, 1e-3, tasks=0.65, drills=0.05),
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        seconds: length of the training loop (compilation and start-up come before it).
        optimizer: "adamw", or "muon": Muon for the matrices from the third phase on, AdamW for the rest.
        rate_scale: multiplies the learning rates of the long phases (from the third on).
        muon_ratio: Muon's learning rate over AdamW's (Muon's update has 0.2 of AdamW's size).
        decay_from: share of the time after which the rate falls linearly to 3 %.
        workers: processes that make batches.
        checkpoint_every: seconds between checkpoints.
        stop_above: stop if the loss of answers is still above this a while after the drills (a blind guess is 6.9).
    """

    seconds: float = 600.0
    phases: tuple[Phase, ...] = PHASES
    optimizer: str = "adamw"
    rate_scale: float = 1.0
    muon_ratio: float = 5.0
    weight_decay: float = 0.05
    decay_from: float = 0.68
    warmup_steps: int = 100
    seed: int = 11
    workers: int = 14
    checkpoint_every: float = 60.0
    stop_above: float = 5.5
    shortest_book: int = 20_000
    task_mix: dict[str, float] | None = None
    drill_mix: dict[str, float] | None = None


class _Optimizers:
    """AdamW for everything, or for everything but the matrices once Muon has taken those over."""

    def __init__(self, model: FastLlama, config: TrainConfig) -> None:
        self.config = config
        self.matrices = [p for layer in model.layers for p in layer.parameters() if p.ndim == 2]
        chosen = {id(p) for p in self.matrices}
        self.rest = [p for p in model.parameters() if id(p) not in chosen]
        self.muon: torch.optim.Optimizer | None = None
        fused = self.rest[0].is_cuda
        self.adamw = torch.optim.AdamW(
            [{"params": self.rest, "weight_decay": 0.0}, {"params": self.matrices, "weight_decay": config.weight_decay}],
            lr=1e-3,
            betas=(0.9, 0.95),
            fused=fused,
        )

    def start_muon(self) -> None:
        self.muon = torch.optim.Muon(
            self.matrices, lr=1e-3, weight_decay=self.config.weight_decay / 5, adjust_lr_fn="match_rms_adamw"
        )
        del self.adamw.param_groups[1]
        for p in self.matrices:
            self.adamw.state.pop(p, None)

    def step(self, rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.rest + self.matrices, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        if self.muon is not None:
            for group in self.muon.param_groups:
                group["lr"] = rate * self.config.muon_ratio
            self.muon.step()

    def state(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "muon": None if self.muon is None else self.muon.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        if state["muon"] is not None:
            self.start_muon()
            assert self.muon is not None
            self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def schedule(config: TrainConfig, elapsed: float, step: int) -> tuple[int, float]:
    """Phase index, and the factor of warm-up and decay on the learning rate, after ``elapsed`` seconds."""
    ends = np.cumsum([phase.share for phase in config.phases]) * config.seconds
    index = min(int(np.searchsorted(ends, elapsed, side="right")), len(config.phases) - 1)
    done = elapsed / config.seconds
    decay = 1.0 if done < config.decay_from else max(0.03, (1 - done) / (1 - config.decay_from))
    return index, min(1.0, (step + 1) / config.warmup_steps) * decay


def train(folder: Path, model_config: ModelConfig, config: TrainConfig, device: str = "cuda") -> dict[str, Any]:
    """Train in ``folder`` (tokenizer and ``train*.u16`` files lie there); resumes from its checkpoint if there is one.

    Writes ``log.jsonl`` (curves), ``checkpoint.pt`` and at the end ``model/`` in Hugging Face format.
    Returns a summary: seconds, steps, tokens, last losses.

    Raises:
        RuntimeError: the look-up circuits did not form in the drills (see ``stop_above``), or the loss is not finite.
    """
    on_gpu = device.startswith("cuda")
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    model = FastLlama(model_config, torch.bfloat16 if on_gpu else torch.float32).to(device)
    optimizers = _Optimizers(model, config)
    state = {"elapsed": 0.0, "step": 0, "tokens": 0, "rate": config.phases[0].rate, "resumed": 0}
    saved = folder / "checkpoint.pt"
    settings = {"model": asdict(model_config), "train": asdict(config)}
    if saved.exists():
        checkpoint = torch.load(saved, map_location=device, weights_only=True)
        if checkpoint["settings"]["model"] != settings["model"]:
            raise ValueError(f"{saved} is of another model {checkpoint['settings']['model']}; use another folder or remove it")
        model.load_state_dict(checkpoint["model"])
        optimizers.load(checkpoint["optimizers"])
        state = checkpoint["state"] | {"resumed": checkpoint["state"]["resumed"] + 1}
        log.info("resuming at %.0f s, step %d", state["elapsed"], state["step"])
    options = {"shortest": config.shortest_book, "task_mix": config.task_mix, "drill_mix": config.drill_mix}
    batches = Batches(list(config.phases), folder, config.workers, config.seed + 7919 * state["resumed"], options, pin=on_gpu)
    attention = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]) if on_gpu else nullcontext()
    try:
        with attention:
            if on_gpu:
                model.compile_parts()
                _compile(model, config.phases, device)
            return _loop(folder, model, optimizers, batches, state, settings, config, device)
    finally:
        batches.close()


def _compile(model: FastLlama, phases: tuple[Phase, ...], device: str) -> None:
    """Run every shape once before the clock starts."""
    for context, tokens in sorted({(p.context, p.tokens) for p in phases}):
        ids = torch.randint(0, model.config.vocab_size, (tokens // context, context), device=device)
        model(ids, ids, torch.ones_like(ids, dtype=torch.float32))[0].backward()
        model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()


def _loop(
    folder: Path,
    model: FastLlama,
    optimizers: _Optimizers,
    batches: Batches,
    state: dict[str, Any],
    settings: dict[str, Any],
    config: TrainConfig,
    device: str,
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    start, before = time.perf_counter(), state["elapsed"]
    next_save, parts, losses = before + config.checkpoint_every, {}, Losses(device)
    drills_end = sum(p.share for p in config.phases[:2]) * config.seconds
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with open(folder / "log.jsonl", "a") as curve, Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=config.seconds, completed=before)
        while (elapsed := before + time.perf_counter() - start) < config.seconds:
            index, factor = schedule(config, elapsed, state["step"])
            phase = config.phases[index]
            if config.optimizer == "muon" and index >= 2 and optimizers.muon is None:
                optimizers.start_muon()
            ids, weights, kinds = batches.get(index)
            ids, weights = ids.to(device, non_blocking=True).long(), weights.to(device, non_blocking=True).float()
            rate = phase.rate * (config.rate_scale if index >= 2 else 1.0)
            state["rate"] += (rate - state["rate"]) * 0.02
            loss, each = model(ids[:, :-1], ids[:, 1:], weights[:, 1:])
            loss.backward()
            optimizers.step(state["rate"] * factor)
            model.zero_grad(set_to_none=True)
            state |= {"elapsed": elapsed, "step": state["step"] + 1, "tokens": state["tokens"] + ids[:, 1:].numel()}
            losses.add(each.view(len(ids), -1), weights[:, 1:], kinds)
            if state["step"] % 50 == 0:
                parts = losses.report()
                curve.write(json.dumps({**state, "context": phase.context, "rate": state["rate"] * factor, **parts}) + "\n")
                curve.flush()
                text = ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if " " not in name)
                progress.update(bar, completed=elapsed, description=f"context {phase.context}: {text}")
                _watch(parts, elapsed, drills_end, config)
            if elapsed > next_save:
                next_save = elapsed + config.checkpoint_every
                _save(folder / "checkpoint.pt", {"settings": settings, "model": model.state_dict(), "optimizers": optimizers.state(), "state": state})
    export(model, folder / "model")
    summary = {**state, **parts, "settings": settings}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


class Losses:
    """Mean losses between two reports, of answers by kind of task, of copies and of ordinary text apart.

    A healthy text loss hides look-ups that never form. Sums stay on the device: one synchronisation a report.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.names: dict[str, int] = {}
        self.sums = torch.zeros(2, 64, device=device)

    def add(self, each: Tensor, weights: Tensor, kinds: list[str]) -> None:
        """``each`` and ``weights`` ``[B, T]``, ``kinds`` one name a row."""
        chosen = (("answers", weights > 4), ("copies", (weights > 1.5) & (weights < 4)), ("text", (weights > 0.5) & (weights < 1.5)))
        for part, mask in chosen:
            rows = [self.names.setdefault(part if part != "answers" else f"answers {kind}", len(self.names)) for kind in kinds]
            index = torch.tensor(rows, device=self.device)
            self.sums[0].index_add_(0, index, (each * mask).sum(1))
            self.sums[1].index_add_(0, index, mask.sum(1, dtype=torch.float32))

    def report(self) -> dict[str, float]:
        """Means since the last report; "answers" is the mean over all kinds."""
        sums, counts = self.sums.tolist()
        self.sums.zero_()
        means = {name: sums[i] / counts[i] for name, i in self.names.items() if counts[i]}
        asked = [i for name, i in self.names.items() if name.startswith("answers ") and counts[i]]
        if asked:
            means["answers"] = sum(sums[i] for i in asked) / sum(counts[i] for i in asked)
        return dict(sorted(means.items()))


def _watch(parts: dict[str, float], elapsed: float, drills_end: float, config: TrainConfig) -> None:
    if not all(np.isfinite(value) for value in parts.values()):
        raise RuntimeError(f"the loss is not finite after {elapsed:.0f} s: {parts}; lower the learning rate")
    if drills_end < elapsed < 1.2 * drills_end and parts.get("answers", 0.0) > config.stop_above:
        raise RuntimeError(
            f"the look-up circuits did not form: the loss of answers is {parts['answers']:.2f} after the drills (a blind guess "
            "is about 6.9); lower the drills' learning rate, give them more time, or change the seed"
        )


def _save(path: Path, checkpoint: dict[str, Any]) -> None:
    partial = path.with_suffix(".part")
    torch.save(checkpoint, partial)
    os.replace(partial, path)
