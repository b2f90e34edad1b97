"""Layer-local self-distillation: one forward of the frozen model, and inside each attention layer one gate's backward.

The base model runs under ``no_grad`` with dense attention. Inside each layer, ``hf.observe`` hands over the queries,
the keys and the log-sum-exp that the forward has just computed; there the gate's logits for some query-block rows are
compared with the pooled attention map, and the gradient is taken at once. So the memory of one layer's map and graph is
all that is ever held, and nothing flows between layers.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..blocks import BlockIndices, num_blocks
from ..gates import BlockGate
from ..hf.contexts import dense, observe
from ..hf.prompts import place_gates, run_prompt
from ..hf.state import gates_of
from ..selectors import LayerInputs
from .batches import Batch
from .config import DistillConfig
from .losses import kl_count
from .phases import TRAINED
from .processes import Processes

__all__ = ["DistillationError", "Trainer"]

_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Measured:
    """What one step's batches say, before the update.

    Attributes:
        losses: mean loss of each layer, by name.
        norms: norm of each layer's gradient, by name.
        tokens: prompt tokens read, all processes together.
    """

    losses: dict[str, float]
    norms: dict[str, float]
    tokens: int

    @property
    def no_gradient(self) -> list[str]:
        """Layers that these batches teach nothing."""
        return [name for name, norm in self.norms.items() if norm == 0]


class _Rows:
    """The rows of one batch that enter the loss, the same in all layers: query blocks, or query tokens for decoding.

    They are drawn from the padded width, which all processes share: a global batch draws the same rows however it is
    dealt out.
    """

    def __init__(self, inputs: LayerInputs, config: DistillConfig, block_size: int, draw: int):
        batch_size, _, width, _ = inputs.q.shape
        self.num_blocks = num_blocks(width, block_size)
        phase = TRAINED[config.phase]
        rows = phase.rows(width, block_size, config, draw)
        lengths = torch.full((batch_size,), width) if inputs.lengths is None else inputs.lengths.cpu()
        valid = rows * phase.unit(block_size) < lengths[:, None]
        self.num_valid = int(valid.sum())
        # One copy to each device, not one for each layer: copies of pageable memory wait for the device.
        self.on, self.valid_on = functools.cache(rows.to), functools.cache(valid.to)


class DistillationError(RuntimeError):
    """Training cannot go on; the message names the layers concerned."""


class Trainer:
    """Float32 master copies of a model's gates, their optimizer, and one training step.

    Args:
        model: a model with attached gates. Its gates are only written by :meth:`write_back`.
        config: the settings.
        total_steps: length of the run, for the learning rate; None: not known.
        processes: gradients are averaged over these.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DistillConfig,
        *,
        total_steps: int | None = None,
        processes: Processes | None = None,
    ):
        self.model, self.config, self.total_steps = model, config, total_steps
        self.phase = TRAINED[config.phase]
        place_gates(model)
        self.processes = processes or Processes()
        gates = {layer: gate for layer, gate in enumerate(gates_of(model, config.phase)) if gate is not None}
        if not gates:
            raise ValueError(
                f"no layer of this model has a gate for {config.phase}; attach gates first: seer.attach(model, "
                f"seer.{self.phase.fresh})"
            )
        self.names = {layer: f"layers.{layer}" for layer in gates}
        """Layer index -> what the layer is called in histories, messages and saved states."""
        self.gates: dict[str, BlockGate] = {self.names[layer]: gate for layer, gate in gates.items()}
        self.masters: dict[str, BlockGate] = {
            name: copy.deepcopy(gate).float().requires_grad_(True) for name, gate in self.gates.items()
        }
        for name, parameter in self._named_parameters():
            if parameter.numel() == 0:
                raise ValueError(f"gate parameter {name} is empty; gates must be whole on every process")
        self.device = _device(next(iter(self.masters.values())))
        """Where what concerns all layers is added up."""
        self.optimizer = torch.optim.AdamW(
            [parameter for master in self.masters.values() for parameter in master.parameters()],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.step = 0

    # ---- one step ------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch]) -> tuple[dict[str, float], int] | None:
        """:meth:`measure` and :meth:`update`.

        Returns:
            Loss of each layer before the update, and the tokens read; all processes together. None if no process had a
            batch: nothing happened.

        Raises:
            DistillationError: a loss or gradient is NaN or infinite. The gates are as they were before the step.
        """
        measured = self.measure(batches)
        if measured is None:
            return None
        self.update(measured)
        return measured.losses, measured.tokens

    def measure(self, batches: Sequence[Batch]) -> Measured | None:
        """Losses and gradients of some batches (none is allowed where other processes still have some).

        Nothing that a saved state holds is changed. Raises as :meth:`train_step`.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums = {
            name: torch.zeros((), dtype=torch.float32, device=_device(master)) for name, master in self.masters.items()
        }
        count = tokens = 0
        for index, batch in enumerate(batches):
            counted, read = self._accumulate(batch, self.step * self.config.accumulation + index, sums)
            count, tokens = count + counted, tokens + read
        measured = self._reduce(sums, count, tokens)
        if measured is not None:
            self._check_finite(measured.losses, measured.norms)
        return measured

    def _accumulate(self, batch: Batch, draw: int, sums: dict[str, Tensor]) -> tuple[int, int]:
        """Add one batch's loss sums and gradients; returns what they are to be divided by, and the tokens read."""
        block_size, heads = self._geometry()
        rows: _Rows | None = None
        seen: set[int] = set()

        def layer_loss(inputs: LayerInputs, blocks: BlockIndices | None) -> None:
            nonlocal rows
            if inputs.layer not in self.names:
                return
            seen.add(inputs.layer)
            if rows is None:  # from the first layer's view, which may have virtual tokens before the prompt
                rows = _Rows(inputs, self.config, block_size, draw)
            name, device = self.names[inputs.layer], inputs.q.device
            valid = None if inputs.lengths is None else rows.valid_on(device)
            with torch.enable_grad():
                master, target = self.masters[name], self.config.target
                loss = self.phase.objective(master, inputs, rows.on(device), valid, target)
                loss.backward()
            sums[name] += loss.detach()

        with torch.no_grad(), dense(self.model), observe(self.model, layer_loss):
            run_prompt(self.model, batch)
        missing = [name for layer, name in self.names.items() if layer not in seen]
        if missing or rows is None:
            raise DistillationError(
                f"these layers have gates but their attention was not seen: {', '.join(missing)}. Either the model "
                f"does not run them, or their sliding window is below {batch['input_ids'].shape[1]} tokens: use "
                "shorter sequences"
            )
        mask: Tensor | None = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int((mask != 0).sum())
        return kl_count(rows.num_valid, heads, rows.num_blocks, self.config.reduction), tokens

    def _geometry(self) -> tuple[int, int]:
        """Block size and number of heads that have rows of their own, which all layers share."""
        found = {(gate.block_size, self.phase.heads_of(gate)) for gate in self.gates.values()}
        if len(found) > 1:
            raise NotImplementedError(f"layers of different (block size, heads) are not supported: {sorted(found)}")
        return found.pop()

    def _reduce(self, sums: dict[str, Tensor], count: int, tokens: int) -> Measured | None:
        """Turn sums of losses and gradients into means over all processes; they come to the host in one transfer."""
        losses = torch.stack([value.to(self.device) for value in sums.values()])
        if self.processes.world_size > 1:
            losses, count, tokens = self._sum_over_processes(losses, count, tokens)
        if tokens == 0:
            return None
        count = max(count, 1)  # all rows that were drawn may be padding
        norms = []
        for master in self.masters.values():
            grads = [_gradient(parameter).div_(count) for parameter in master.parameters()]
            norms.append(torch.nn.utils.get_total_norm(grads).to(self.device))
        host = torch.cat([losses / count, torch.stack(norms)]).tolist()
        names = list(self.masters)
        return Measured(
            dict(zip(names, host[: len(names)], strict=True)), dict(zip(names, host[len(names) :], strict=True)), tokens
        )

    def _sum_over_processes(self, losses: Tensor, count: int, tokens: int) -> tuple[Tensor, int, int]:
        """Add up gradients (in place), losses and counts of all processes; one without a batch adds zeros."""
        parameters = [parameter for master in self.masters.values() for parameter in master.parameters()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        values = torch.cat([*(_gradient(p).to(self.device).flatten() for p in parameters), losses])
        counts = torch.tensor([count, tokens], device=self.device)
        self.processes.sum_(values)
        self.processes.sum_(counts)
        *pieces, losses = values.split([*(p.numel() for p in parameters), losses.numel()])
        for parameter, piece in zip(parameters, pieces, strict=True):
            _gradient(parameter).copy_(piece.view_as(parameter))
        count, tokens = counts.tolist()
        return losses, count, tokens

    def _check_finite(self, losses: Mapping[str, float], norms: Mapping[str, float]) -> None:
        bad = [name for name in losses if not (math.isfinite(losses[name]) and math.isfinite(norms[name]))]
        if not bad:
            return
        name = bad[0]
        raise DistillationError(
            f"step {self.step + 1}: {name} has loss {losses[name]:.4g} and gradient norm {norms[name]:.4g}"
            + (f" ({len(bad)} of {len(losses)} layers are not finite: {', '.join(bad)})" if len(bad) > 1 else "")
            + ". The gates are as they were before this step. If it is the first step, the model's own queries and "
            "keys are not finite on this text (try bfloat16 or float32 in place of float16); else lower learning_rate"
        )

    def update(self, measured: Measured) -> None:
        """One step of the optimizer along the gradients that :meth:`measure` has left."""
        norms = measured.norms
        rate = self.config.learning_rate_at(self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        limit = self.config.clip_norm
        for name, master in self.masters.items():
            if limit is not None and norms[name] > limit:
                for parameter in master.parameters():
                    _gradient(parameter).mul_(limit / norms[name])
        self.optimizer.step()
        self.step += 1

    # ---- gates in and out ----------------------------------------------------------------------------------------

    def write_back(self) -> None:
        """Copy the masters into the model's gates, in the gates' dtype."""
        with torch.no_grad():
            for name, gate in self.gates.items():
                for target, source in zip(gate.parameters(), self.masters[name].parameters(), strict=True):
                    target.copy_(source)

    def broadcast(self) -> None:
        """Give every process the first one's gates, so that gates drawn at random start out the same."""
        if self.processes.world_size == 1:
            return
        with torch.no_grad():
            for master in self.masters.values():
                for parameter in master.parameters():
                    if self.processes.rank != 0:
                        parameter.zero_()
                    self.processes.sum_(parameter)

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters, optimizer moments and torch's random state, under flat names."""
        tensors = {"rng/torch": torch.get_rng_state()}
        for name, parameter in self._named_parameters():
            tensors[f"gate/{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Inverse of :meth:`state_tensors`.

        Raises:
            ValueError: the tensors are not those of these gates.
        """
        named = dict(self._named_parameters())
        expected = {"rng/torch"} | {f"gate/{name}" for name in named}
        if step > 0:
            expected |= {f"optimizer/{key}/{name}" for key in _OPTIMIZER_STATE for name in named}
        if set(tensors) != expected:
            raise ValueError(
                f"the training state belongs to other gates: missing {sorted(expected - set(tensors))[:4]}, "
                f"unexpected {sorted(set(tensors) - expected)[:4]}"
            )
        with torch.no_grad():
            for name, parameter in named.items():
                saved = tensors[f"gate/{name}"]
                if saved.shape != parameter.shape:
                    raise ValueError(
                        f"the training state belongs to other gates: {name} is {tuple(saved.shape)} there, "
                        f"{tuple(parameter.shape)} here"
                    )
                parameter.copy_(saved)
                if step > 0:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"optimizer/{key}/{name}"].to("cpu" if key == "step" else parameter.device)
                        for key in _OPTIMIZER_STATE
                    }
        self.step = step
        torch.set_rng_state(tensors["rng/torch"])

    def _named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        for layer, master in self.masters.items():
            for key, parameter in master.named_parameters():
                yield f"{layer}.{key}", parameter


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
