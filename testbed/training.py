"""The training run: optimisers, progress, curves, checkpoints, and another seed where look-up does not form."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seerattention.files import replacing, write_file

from .data import Batches
from .model import FastLlama, ModelConfig, export, spread
from .schedule import NotFormed, Phase, Schedule, TrainConfig

log = logging.getLogger(__name__)


class NoSuchLayer(ValueError):
    """Look-up is to form in layers that the model does not have."""


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
            [
                {"params": self.rest, "weight_decay": 0.0},
                {"params": self.matrices, "weight_decay": config.weight_decay},
            ],
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


def train(
    folder: Path,
    model: ModelConfig | FastLlama,
    config: TrainConfig,
    device: str = "cuda",
    earlier: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Train in ``folder`` (tokenizer and ``train*.u16`` files lie there); resumes from its checkpoint if there is one.

    ``model`` is the shape of a new model, or a model that is trained on (``model.read``); ``earlier`` are then the
    stages that made it (``card.stages``), which go into the summary.

    Writes ``log.jsonl`` (curves), ``checkpoint.pt`` and at the end ``model/`` in Hugging Face format and
    ``summary.json``. Returns the summary: seconds, steps, tokens, last losses, settings.

    Raises:
        NotFormed: the look-up circuits did not form in the drills, with the last seed that ``config.retries`` allows.
        RuntimeError: the loss is not finite.
        ValueError: the checkpoint in ``folder`` is of a model of another shape.
        NoSuchLayer: ``config.look_up`` names layers that the model does not have.
    """
    torch.set_float32_matmul_precision("high")
    run = _Run(folder, model, config, device)
    on_gpu = device.startswith("cuda")
    attention = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]) if on_gpu else nullcontext()
    try:
        with attention:
            if on_gpu:
                run.model.compile_parts()
                _compile(run.model, config, device)
            return run.go(earlier)
    finally:
        run.batches.close()


def _compile(model: FastLlama, config: TrainConfig, device: str) -> None:
    """Run every shape once before the clock starts."""
    for context, tokens, far in sorted({(p.context, p.tokens, config.far(p) or ()) for p in config.phases}):
        ids = torch.randint(0, model.config.vocab_size, (tokens // context, context), device=device)
        model(ids, ids, torch.ones_like(ids, dtype=torch.float32), far=far or None)[0].backward()
        model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()


class _Run:
    """All that changes while a run goes on."""

    def __init__(self, folder: Path, model: ModelConfig | FastLlama, config: TrainConfig, device: str) -> None:
        self.folder, self.config, self.device = folder, config, device
        shape = model.config if isinstance(model, FastLlama) else model
        if any(p.steered for p in config.phases) and max(config.look_up or (0,)) >= shape.layers:
            raise NoSuchLayer(
                f"the model has {shape.layers} layers, numbered from 0, so look-up cannot form in layers "
                f"{', '.join(map(str, config.look_up or ()))}; name others, or leave it to chance"
            )
        self.settings = {"model": asdict(shape), "train": asdict(config)}
        self.state: dict[str, Any] = {
            "seed": config.seed,
            "elapsed": 0.0,
            "step": 0,
            "tokens": 0,
            "rate": config.phases[0].rate,
            "resumed": 0,
            "given_up": [],
        }
        on_gpu = device.startswith("cuda")
        torch.manual_seed(config.seed)
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.model = (FastLlama(model, dtype) if isinstance(model, ModelConfig) else model).to(device)
        self.model.dtype = dtype
        # Where another attempt begins: a new model's is drawn from the next seed.
        self.first = None if isinstance(model, ModelConfig) else copy.deepcopy(model.state_dict())
        self.optimizers = _Optimizers(self.model, config)
        self.schedule = Schedule(config)
        self.losses = Losses(device)
        self.parts: dict[str, float] = {}
        if (folder / "checkpoint.pt").exists():
            self._resume(folder / "checkpoint.pt")
        options = {name: getattr(config, name) for name in ("shortest_book", "templates")}
        seed = config.seed + 7919 * self.state["resumed"]
        self.batches = Batches(list(config.phases), folder, config.workers, seed, options, pin=on_gpu)

    def _resume(self, path: Path) -> None:
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if saved["settings"]["model"] != self.settings["model"]:
            raise ValueError(
                f"{path} is of another model {saved['settings']['model']}; use another folder or remove it"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizers.load(saved["optimizers"])
        self.schedule = Schedule(self.config, **saved["schedule"])
        self.state = saved["state"] | {"resumed": saved["state"]["resumed"] + 1}
        log.info("resuming at %.0f s, step %d", self.state["elapsed"], self.state["step"])

    def _save(self) -> None:
        path = self.folder / "checkpoint.pt"
        contents = {"model": self.model.state_dict(), "optimizers": self.optimizers.state()}
        contents |= {"settings": self.settings, "schedule": self.schedule.state(), "state": self.state}
        with replacing(path) as temporary:
            torch.save(contents, temporary)

    def _begin_again(self, error: NotFormed) -> None:
        """From the start with the next seed, in the time that is left; the data workers go on."""
        given_up = [
            *self.state["given_up"],
            {"seed": self.state["seed"], "seconds": self.state["elapsed"], "why": str(error)},
        ]
        if len(given_up) > self.config.retries:
            raise error
        seed = self.state["seed"] + 1
        log.warning("%s; trying again with seed %d", error, seed)
        torch.manual_seed(seed)
        self.model.load_state_dict(self.first or FastLlama(self.model.config, self.model.dtype).state_dict())
        self.optimizers = _Optimizers(self.model, self.config)
        self.schedule = Schedule(self.config, begin=self.state["elapsed"])
        self.state |= {"seed": seed, "step": 0, "tokens": 0, "rate": self.config.phases[0].rate, "given_up": given_up}
        self._save()

    def go(self, earlier: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from transformers import AutoTokenizer

        config, state = self.config, self.state
        start, before = time.perf_counter(), state["elapsed"]
        next_save = before + config.checkpoint_every
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with (
            open(self.folder / "log.jsonl", "a") as curve,
            Progress(*columns, console=Console(stderr=True)) as progress,
        ):
            bar = progress.add_task("training", total=config.seconds, completed=before)
            while (elapsed := before + time.perf_counter() - start) < config.seconds:
                state["elapsed"] = elapsed
                try:
                    phase = config.phases[self.schedule.at(elapsed)]
                except NotFormed as error:
                    self._begin_again(error)
                    continue
                rate = self._step(phase)
                if state["step"] % config.report_every == 0:
                    self._report(curve, phase, rate)
                    text = ", ".join(f"{name} {value:.3f}" for name, value in self.parts.items() if " " not in name)
                    progress.update(bar, completed=elapsed, description=f"context {phase.context}: {text}")
                if elapsed > next_save:
                    next_save = elapsed + config.checkpoint_every
                    self._save()
        export(self.model, self.folder / "model")
        AutoTokenizer.from_pretrained(self.folder).save_pretrained(self.folder / "model")
        summary = {**state, **self.parts, "settings": self.settings, "earlier": list(earlier)}
        write_file(self.folder / "summary.json", json.dumps(summary, indent=1))
        return summary

    def _step(self, phase: Phase) -> float:
        """One optimisation step; returns its learning rate."""
        config, state = self.config, self.state
        long = not phase.most
        if config.optimizer == "muon" and long and self.optimizers.muon is None:
            self.optimizers.start_muon()
        ids, weights, kinds = self.batches.get(self.schedule.phase)
        ids = ids.to(self.device, non_blocking=True).long()
        weights = weights.to(self.device, non_blocking=True).float()
        state["rate"] += (phase.rate * (config.rate_scale if long else 1.0) - state["rate"]) * 0.02
        rate = state["rate"] * self.schedule.factor(state["elapsed"], state["step"])
        positions = spread(len(ids), ids.shape[1] - 1, phase.reach, self.device) if phase.reach else None
        loss, each = self.model(ids[:, :-1], ids[:, 1:], weights[:, 1:], positions, config.far(phase))
        loss.backward()
        self.optimizers.step(rate)
        self.model.zero_grad(set_to_none=True)
        state["step"] += 1
        state["tokens"] += ids[:, 1:].numel()
        self.losses.add(each.view(len(ids), -1), weights[:, 1:], kinds)
        return rate

    def _report(self, curve: IO[str], phase: Phase, rate: float) -> None:
        self.parts = self.losses.report()
        line = {k: v for k, v in self.state.items() if k != "given_up"} | {"context": phase.context, "rate": rate}
        curve.write(json.dumps(line | self.parts) + "\n")
        curve.flush()
        self.schedule.report(self.parts)
        if not all(math.isfinite(value) for value in self.parts.values()):
            raise RuntimeError(
                f"the loss is not finite after {self.state['elapsed']:.0f} s: {self.parts}; lower the learning rate"
            )


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
        chosen = (
            ("answers", weights > 4),
            ("copies", (weights > 1.5) & (weights < 4)),
            ("text", (weights > 0.5) & (weights < 1.5)),
        )
        for part, mask in chosen:
            rows = [
                self.names.setdefault(part if part != "answers" else f"answers {kind}", len(self.names))
                for kind in kinds
            ]
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
