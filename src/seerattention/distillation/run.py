"""A whole distillation run: steps, block recall, saved state, and the exact continuation of an interrupted run."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..gates.geometry import fingerprint
from ..hf.architectures import find_decoder
from ..hf.phases import PREFILL
from ..hf.prompts import check_batch, input_device
from ..hf.state import state_of
from ..measure.recall import measure_recall
from ..policies import TopK
from .batches import Batch, BatchWalk
from .config import DistillConfig
from .history import DistillHistory
from .identity import batches_digest, weights_digest
from .interrupts import Interrupts
from .lock import locked
from .processes import Processes
from .saved import check_same_run, load_state, save_state
from .trainer import Measured, Trainer

logger = logging.getLogger(__name__)

__all__ = ["StepReport", "distill"]

_WEIGHTS, _EVAL_BATCHES = "digest of the base model's weights", "digest of eval_batches"


@dataclass(frozen=True)
class StepReport:
    """What ``on_step`` gets after each step, and once before the first.

    Attributes:
        step: updates done so far.
        total: updates of the whole run; None: not known.
        loss: mean over the layers, measured before the latest update; None before the first.
        recall: mean block recall of the latest measurement; None: not measured.
        tokens_per_second: of this step, all processes together.
        numbers: what else the latest measurement found, by its name in :data:`seerattention.measure.RECALLS`; empty
            where nothing was measured.
    """

    step: int
    total: int | None
    loss: float | None
    recall: float | None
    tokens_per_second: float
    numbers: Mapping[str, float | None] = field(default_factory=dict)


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
    an interrupt ends the run early. SIGINT, SIGTERM and SIGHUP end it after the state has been written, at whatever
    step; their handlers are those of before when this returns or raises.

    With several processes (``accelerate launch``, torchrun) each one calls this with *its own share* of the batches,
    and gradients are averaged over all rows of all processes.

    Args:
        model: a model with attached gates (``seer.attach``).
        batches: iterable of ``{"input_ids": int64 [B, T]}``, optionally with ``"attention_mask"`` ``[B, T]`` and what
            else the model's forward takes; see :func:`~seerattention.hf.prompts.check_batch`.
        config: see :class:`DistillConfig`; None: the defaults.
        eval_batches: held-out batches, the same in all processes, on which block recall (and what else
            :func:`seerattention.measure.measure_recall` counts) is measured before, after and every
            ``config.eval_every`` steps.
        on_step: called in every process with a :class:`StepReport`.
        state_path: file that holds the state of the run, the same for all processes. If it exists, the run continues
            from it, exactly as if it had never stopped: pass the same model, gates, batches and config. Digests of the
            base model's weights, of the batches read so far and of ``eval_batches`` are in it, and another run is
            refused; batches with a ``state_dict`` of their own are trusted to come back to where they were. None:
            nothing is saved.
        save_every, save_seconds: write the state after so many steps, and once so many seconds have passed since the
            last time; it is always written at the end and when a signal ends the run.
        settings: anything else that must be the same for a run to be continued (JSON-able).

    Returns:
        The history; ``history.loss`` has one float per step, the first before any update.

    Raises:
        ValueError: no gates attached; no batch, or a wrong one; ``state_path`` belongs to another run, is damaged or is
            being written by another process.
        TypeError: a batch of the wrong type.
        KeyboardInterrupt: a signal (one other than SIGINT is sent again first, and usually ends the process).
        DistillationError: a loss or gradient of some layer, which is named, is NaN or infinite.
    """
    config = config or DistillConfig()
    processes = Processes.join(cpu=input_device(model).type == "cpu")
    path = None if state_path is None else Path(state_path)
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts(enabled=processes.is_main))
        stack.enter_context(torch.inference_mode(False))  # inside one that the caller has open nothing could be trained
        if path is not None and processes.is_main:
            stack.enter_context(locked(path))
        run = _Run(model, batches, config, processes, list(eval_batches or ()), on_step, settings or {}, interrupts)
        # By all processes of several, whatever path each was given: the digests are added up.
        run.walk.keep_digest(path is not None or processes.world_size > 1)
        if path is not None:
            run.keep_state(path, save_every, save_seconds)
        try:
            run.run()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or interrupts.received is not None:
                run.leave()
            raise
        finally:
            with interrupts.held():
                run.trainer.write_back()  # first of all: closing may have to wait for the batches
            run.walk.close()
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
        interrupts: Interrupts,
    ):
        self.config, self.processes, self.on_step = config, processes, on_step
        self.interrupts = interrupts
        total = config.steps
        if total is None and isinstance(batches, Sized):
            total = math.ceil(len(batches) / config.accumulation)
        check = partial(check_batch, model=model)
        self.walk = BatchWalk(batches, 1 if config.steps is None else None, check=check)
        self.trainer = Trainer(model, config, total_steps=total, processes=processes)
        self.trainer.broadcast()
        self.history = DistillHistory(recall_density=config.eval_density if eval_batches else None)
        self.eval_batches = [check(batch) for batch in eval_batches]
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
        self.resume_point: dict[str, Any] | None = None

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        trainer, history, config = self.trainer, self.history, self.config
        start = time.monotonic()
        self._mark(self._common_digest())
        if trainer.step == 0 or self._recall_is_due():  # an interrupt may have come between a step and its recall
            self._measure_recall()
        self._report(0.0)
        while config.steps is None or trainer.step < config.steps:
            self.interrupts.check()
            batches = self.walk.take(config.accumulation)
            if trainer.step == 0:
                self._warn_of_equal_shares(batches)
            measured = trainer.measure(batches)
            if measured is None:
                break
            digest = self._common_digest()
            self._warn_of_no_gradient(measured)
            with self.interrupts.held():
                self.resume_point = None
                trainer.update(measured)
                rate = trainer.optimizer.param_groups[0]["lr"]
                history.add_step(measured.losses, rate, measured.tokens, measured.no_gradient)
                self._mark(digest)
            if self._recall_is_due():
                self._measure_recall()
            now = time.monotonic()
            history.seconds += now - start
            self._report(measured.tokens / max(now - start, 1e-9))
            start = now
            self._save_if_due()
        if not history.loss:
            raise ValueError("there was no batch to distil from")
        if config.steps is not None and trainer.step < config.steps:
            logger.warning("the batches ended after %d of %d steps", trainer.step, config.steps)
        self._measure_recall()
        history.find_not_learning(config.min_improvement, config.warmup)
        if self.processes.is_main:
            self._say_what_was_not_learned()
        self._save()
        self.processes.wait()

    def _recall_is_due(self) -> bool:
        step, every = self.trainer.step, self.config.eval_every
        return bool(every and step and step % every == 0)

    def _warn_of_no_gradient(self, measured: Measured) -> None:
        """Once, at the first step that teaches some layer nothing; the end of the run says how many there were."""
        layers = measured.no_gradient
        if not layers or self.history.no_gradient or not self.processes.is_main:
            return
        block_size = next(iter(self.trainer.gates.values())).block_size
        which = "any layer" if len(layers) == len(measured.norms) else ", ".join(layers)
        logger.warning(
            "step %d does not teach %s anything: the gradient is zero. Rows of prompts of at most %d tokens (one "
            "block), and the first row of any prompt, have one block to choose from: use longer prompts or smaller "
            "blocks. Gates whose weights are all zero do not learn either",
            self.trainer.step + 1,
            which,
            block_size,
        )

    def _say_what_was_not_learned(self) -> None:
        history = self.history
        for layer, count in history.no_gradient.items():
            if layer not in history.not_learning:
                logger.warning("%d of %d steps taught %s nothing", count, len(history.loss), layer)
        for layer, reason in history.not_learning.items():
            logger.warning("%s does not seem to learn: %s", layer, reason)

    def _measure_recall(self) -> None:
        """Block recall of the gates as they would be saved now, unless that is known already."""
        step = self.trainer.step
        if not self.eval_batches or (self.history.recall_steps and self.history.recall_steps[-1] == step):
            return
        self.trainer.write_back()
        mine = self.eval_batches[self.processes.rank :: self.processes.world_size]
        phase, names, gates = self.config.phase, self.trainer.names, self.trainer.gates
        measured = measure_recall(self.trainer.model, mine, TopK(self.config.eval_density), phase=phase)
        heads = {
            layer: gates[name].num_heads if phase == PREFILL else gates[name].num_kv_heads
            for layer, name in names.items()
        }
        joined = measured.joined(heads, self.processes.sum_, self.trainer.device)
        recall = {names[layer]: share for layer, share in joined.block_recall().items()}
        if unread := [name for name in names.values() if name not in recall]:
            longest = max(batch["input_ids"].shape[1] for batch in self.eval_batches)
            raise ValueError(
                f"block recall cannot be measured on these eval_batches: {', '.join(unread)} read none of them as "
                f"whole prompts. They are up to {longest} tokens long; they must be longer than one token and not "
                "longer than the model's sliding window"
            )
        with self.interrupts.held():
            self.history.add_recall(step, recall, joined.numbers())

    def _report(self, tokens_per_second: float) -> None:
        if self.on_step is not None:
            loss = self.history.loss[-1] if self.history.loss else None
            step, total = self.trainer.step, self.trainer.total_steps
            history = self.history
            self.on_step(
                StepReport(step, total, loss, history.mean_recall(), tokens_per_second, history.latest_numbers())
            )

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
        self.settings[_WEIGHTS] = weights_digest(self.trainer.model)
        self.settings[_EVAL_BATCHES] = batches_digest(self.eval_batches)
        if not path.exists():
            return
        tensors, meta = load_state(path)
        self._check_same_run(meta["settings"], path)
        # Batches before tensors: shuffling draws from torch's generator, whose state is among the tensors.
        self._find_batches(meta, path)
        self.trainer.load_state_tensors(tensors, meta["step"])
        self.history = DistillHistory.from_dict(meta["history"])
        if self.processes.is_main:
            logger.info("continuing at step %d from %s", meta["step"], path)

    def _check_same_run(self, saved: Mapping[str, Any], path: Path) -> None:
        unknown = {_WEIGHTS, _EVAL_BATCHES} - saved.keys()  # an earlier version's state
        if unknown and self.processes.is_main:
            logger.info("%s does not say which weights and texts it belongs to; make sure that they are these", path)
        check_same_run(saved, {key: value for key, value in self.settings.items() if key not in unknown}, path)

    def _find_batches(self, meta: Mapping[str, Any], path: Path) -> None:
        """Come back to where the state was taken, with the batches that were read up to there."""
        self.walk.load_state_dict(meta["data"], all_of_them=self.processes.world_size == 1)
        expected, found = meta.get("digest"), self._common_digest()
        if expected is not None and found is not None and found != expected:
            raise ValueError(
                f"{path} was made with other batches than these: the first {meta['data']['taken']} differ. Pass the "
                "same ones in the same order (a DataLoader that shuffles needs "
                "generator=torch.Generator().manual_seed(...), or must have a state_dict, as StatefulDataLoader has), "
                "choose another output directory, or delete the file to start over"
            )

    def _common_digest(self) -> str | None:
        """Digest of the batches that all processes have taken; None where the batches keep their own account."""
        own = self.walk.digest
        if own is None or self.processes.world_size == 1:
            return own
        # 48 bits each, so that the sum of thousands of processes fits.
        number = torch.tensor([int(own[:12] or "0", 16)], dtype=torch.int64, device=self.trainer.device)
        return f"{int(self.processes.sum_(number)):x}"

    def _mark(self, digest: str | None) -> None:
        """Remember where a run that is left from now on, until the next mark, has to go on."""
        if self.state_path is not None:
            self.resume_point = {
                "data": self.walk.state_dict(),
                "digest": digest,
                "rng": torch.get_rng_state(),
            }

    def leave(self) -> None:
        """Write the state, because a signal ends the run; where a step was cut in half, the one before stays."""
        with self.interrupts.held():
            self._save()
        if not self.processes.is_main:
            return
        kept = "nothing but the gates is kept" if self.state_path is None else f"the state is in {self.state_path}"
        logger.warning("stopped after %d steps; %s", self.trainer.step, kept)

    def _save_if_due(self) -> None:
        by_step = self.save_every is not None and self.trainer.step % self.save_every == 0
        by_time = self.save_seconds is not None and time.monotonic() - self.last_save >= self.save_seconds
        if by_step or by_time:
            self._save()

    def _save(self) -> None:
        if self.state_path is None or self.resume_point is None or not self.processes.is_main:
            return
        meta = {
            "settings": self.settings,
            "step": self.trainer.step,
            "data": self.resume_point["data"],
            "digest": self.resume_point["digest"],
            "history": self.history.to_dict(),
        }
        tensors = {**self.trainer.state_tensors(), "rng/torch": self.resume_point["rng"]}
        with self.interrupts.held():
            save_state(self.state_path, tensors, meta)
        self.last_save = time.monotonic()
