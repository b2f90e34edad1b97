"""A whole distillation run: steps, block recall, saved state, and the exact continuation of an interrupted run."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..gates.geometry import fingerprint
from ..hf.architectures import find_decoder
from ..hf.recall import recall_sums
from ..hf.state import state_of
from ..policies import TopK
from .batches import Batch, BatchWalk
from .checkpoint import check_same_run, load_state, save_state
from .config import DistillConfig
from .history import DistillHistory
from .processes import Processes
from .trainer import Trainer

logger = logging.getLogger(__name__)

__all__ = ["StepReport", "distill"]


@dataclass(frozen=True)
class StepReport:
    """What ``on_step`` gets after each step, and once before the first.

    Attributes:
        step: updates done so far.
        total: updates of the whole run; None: not known.
        loss: mean over the layers, measured before the latest update; None before the first.
        recall: mean block recall of the latest measurement; None: not measured.
        tokens_per_second: of this step, all processes together.
    """

    step: int
    total: int | None
    loss: float | None
    recall: float | None
    tokens_per_second: float


def distill(
    model: nn.Module,
    batches: Iterable[Batch],
    config: DistillConfig | None = None,
    *,
    eval_batches: Sequence[Batch] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    state_path: str | Path | None = None,
    save_every: int | None = None,
    save_seconds: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> DistillHistory:
    """Train the attached gates of a model to predict its own attention (SeerAttention, arXiv 2410.13276, section 3.2).

    The base model is only read: frozen, in its own dtype, with dense attention. Gates are trained as float32 copies
    and written back in their own dtype for every measurement of block recall and at the end, also when an error or
    an interrupt ends the run early.

    With several processes (``accelerate launch``, torchrun) each one calls this with *its own share* of the batches,
    and gradients are averaged over all rows of all processes.

    Args:
        model: a model with attached gates (``seer.attach``).
        batches: iterable of ``{"input_ids": int64 [B, T]}``, optionally with ``"attention_mask"`` ``[B, T]``.
        config: see :class:`DistillConfig`; None: the defaults.
        eval_batches: held-out batches, the same in all processes, on which block recall is measured before, after and
            every ``config.eval_every`` steps.
        on_step: called in every process with a :class:`StepReport`.
        state_path: file that holds the state of the run. If it exists, the run continues from it, exactly as if it had
            never stopped: pass the same model, gates, batches and config. None: nothing is saved.
        save_every, save_seconds: write the state after so many steps, and once so many seconds have passed since the
            last time; it is always written at the end.
        settings: anything else that must be the same for a run to be continued (JSON-able).

    Returns:
        The history; ``history.loss`` has one float per step, the first before any update.

    Raises:
        ValueError: no gates attached; no batch; ``state_path`` belongs to another run or is damaged.
        DistillationError: a loss or gradient of some layer, which is named, is NaN or infinite.
    """
    config = config or DistillConfig()
    with torch.inference_mode(False):  # inside one that the caller has open nothing could be trained
        processes = Processes.join(cpu=next(model.parameters()).device.type == "cpu")
        run = _Run(model, batches, config, processes, list(eval_batches or ()), on_step, settings or {})
        if state_path is not None:
            run.keep_state(Path(state_path), save_every, save_seconds)
        try:
            run.run()
        finally:
            run.walk.close()
            run.trainer.write_back()
        return run.history


class _Run:
    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        config: DistillConfig,
        processes: Processes,
        eval_batches: list[Batch],
        on_step: Callable[[StepReport], None] | None,
        settings: Mapping[str, Any],
    ):
        self.config, self.processes, self.on_step = config, processes, on_step
        total = config.steps
        if total is None and isinstance(batches, Sized):
            total = math.ceil(len(batches) / config.accumulation)
        self.walk = BatchWalk(batches, passes=1 if config.steps is None else None)
        self.trainer = Trainer(model, config, total_steps=total, processes=processes)
        self.trainer.broadcast()
        self.history = DistillHistory(recall_density=config.eval_density if eval_batches else None)
        self.eval_batches = eval_batches
        # Gates and models that differ in more than the shapes of tensors (block size, poolings) are other runs, too.
        # Through JSON, as a saved state has been.
        gate_config = state_of(model).gate_config
        self.settings: dict[str, Any] = json.loads(
            json.dumps(
                {
                    **config.to_dict(),
                    **settings,
                    "world_size": processes.world_size,
                    "gates": gate_config.to_dict() if gate_config is not None else None,
                    "base_model": fingerprint(find_decoder(model).config),
                }
            )
        )
        self.state_path: Path | None = None
        self.save_every: int | None = None
        self.save_seconds: float | None = None
        self.last_save = time.monotonic()

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        trainer, history, config = self.trainer, self.history, self.config
        start = time.monotonic()
        if trainer.step == 0:
            self._measure_recall()
        self._report(0.0)
        while config.steps is None or trainer.step < config.steps:
            batches = self.walk.take(config.accumulation)
            if trainer.step == 0:
                self._warn_of_equal_shares(batches)
            measured = trainer.train_step(batches)
            if measured is None:
                break
            losses, tokens = measured
            history.add_step(losses, trainer.optimizer.param_groups[0]["lr"], tokens)
            if config.eval_every and trainer.step % config.eval_every == 0:
                self._measure_recall()
            now = time.monotonic()
            history.seconds += now - start
            self._report(tokens / max(now - start, 1e-9))
            start = now
            self._save_if_due()
        if not history.loss:
            raise ValueError("there was no batch to distil from")
        if config.steps is not None and trainer.step < config.steps:
            logger.warning("the batches ended after %d of %d steps", trainer.step, config.steps)
        self._measure_recall()
        history.find_not_learning(config.min_improvement, config.warmup)
        if self.processes.is_main:
            for layer, reason in history.not_learning.items():
                logger.warning("%s does not seem to learn: %s", layer, reason)
        self._save()
        self.processes.wait()

    def _measure_recall(self) -> None:
        """Block recall of the gates as they would be saved now, unless that is known already."""
        step = self.trainer.step
        if not self.eval_batches or (self.history.recall_steps and self.history.recall_steps[-1] == step):
            return
        self.trainer.write_back()
        mine = self.eval_batches[self.processes.rank :: self.processes.world_size]
        sums = recall_sums(self.trainer.model, mine, TopK(self.config.eval_density))
        # In float32, as not every device adds up float64; a process without a batch of its own adds zeros.
        device = self.trainer.device
        table = torch.zeros(len(self.trainer.names), 2, device=device)
        for slot, layer in enumerate(self.trainer.names):
            if layer in sums:
                table[slot] = sums[layer].to(device, torch.float32)
        host = self.processes.sum_(table).tolist()
        names = self.trainer.names.values()
        self.history.add_recall(step, {name: mass / pairs for name, (mass, pairs) in zip(names, host, strict=True)})

    def _report(self, tokens_per_second: float) -> None:
        if self.on_step is not None:
            loss = self.history.loss[-1] if self.history.loss else None
            step, total = self.trainer.step, self.trainer.total_steps
            self.on_step(StepReport(step, total, loss, self.history.mean_recall(), tokens_per_second))

    def _warn_of_equal_shares(self, batches: Sequence[Batch]) -> None:
        """Every process training on the same text is the classical mistake, and silently wastes all but one."""
        if self.processes.world_size == 1:
            return
        digest = torch.zeros(1, dtype=torch.int64, device=self.trainer.device)
        if batches:
            ids = batches[0]["input_ids"].cpu().long().flatten()
            weights = torch.arange(1, ids.numel() + 1)
            digest += int(((ids + 1) * weights % 1_000_003).sum())
        digests = [int(value) for value in self.processes.gather(digest)]
        if self.processes.is_main and len(set(digests)) == 1:
            logger.warning("all %d processes got the same first batch; give each process its own share", len(digests))

    # ---- saved state ---------------------------------------------------------------------------------------------

    def keep_state(self, path: Path, every: int | None, seconds: float | None) -> None:
        """Continue from the state at ``path`` if there is one, and save to it from now on."""
        if every is not None and every < 1:
            raise ValueError(f"save_every must be at least 1 or None, got {every}")
        self.state_path, self.save_every, self.save_seconds = path, every, seconds
        if not path.exists():
            return
        tensors, meta = load_state(path)
        check_same_run(meta["settings"], self.settings, path)
        self.trainer.load_state_tensors(tensors, meta["step"])
        self.walk.load_state_dict(meta["data"])
        self.history = DistillHistory.from_dict(meta["history"])
        if self.processes.is_main:
            logger.info("continuing at step %d from %s", meta["step"], path)

    def _save_if_due(self) -> None:
        by_step = self.save_every is not None and self.trainer.step % self.save_every == 0
        by_time = self.save_seconds is not None and time.monotonic() - self.last_save >= self.save_seconds
        if by_step or by_time:
            self._save()

    def _save(self) -> None:
        if self.state_path is None or not self.processes.is_main:
            return
        meta = {
            "settings": self.settings,
            "step": self.trainer.step,
            "data": self.walk.state_dict(),
            "history": self.history.to_dict(),
        }
        save_state(self.state_path, self.trainer.state_tensors(), meta)
        self.last_save = time.monotonic()
