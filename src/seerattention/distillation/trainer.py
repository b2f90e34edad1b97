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

import torch
from torch import Tensor, nn

from ..blocks import BlockIndices, content_bounds, num_blocks
from ..gates import BlockGate
from ..hf.contexts import dense, observe
from ..hf.prompts import run_prompt
from ..hf.state import LayerInputs
from ..hf.state import gates as attached_gates
from ..ops import pooled_attention
from .batches import Batch
from .config import DistillConfig
from .losses import draw_rows, kl_count, kl_sum
from .processes import Processes

__all__ = ["DistillationError", "Trainer"]

_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


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
        self.processes = processes or Processes()
        gates = {layer: gate for layer, gate in enumerate(attached_gates(model)) if gate is not None}
        if not gates:
            raise ValueError(
                "no layer of this model has a gate; attach gates first: seer.attach(model, seer.GateConfig())"
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
        """One update from some batches (none is allowed where other processes still have some).

        Returns:
            Loss of each layer before the update, and the tokens read; all processes together. None if no process had a
            batch: nothing happened.

        Raises:
            DistillationError: a loss or gradient is NaN or infinite. The gates are as they were before the step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums = {name: torch.zeros((), device=_device(master)) for name, master in self.masters.items()}
        count = tokens = 0
        for index, batch in enumerate(batches):
            counted, read = self._accumulate(batch, self.step * self.config.accumulation + index, sums)
            count, tokens = count + counted, tokens + read
        measured = self._reduce(sums, count, tokens)
        if measured is None:
            return None
        losses, norms, tokens = measured
        self._check_finite(losses, norms)
        self._update(norms)
        return losses, tokens

    def _accumulate(self, batch: Batch, draw: int, sums: dict[str, Tensor]) -> tuple[int, int]:
        """Add one batch's loss sums and gradients; returns what they are to be divided by, and the tokens read."""
        config = self.config
        batch_size, width = batch["input_ids"].shape
        mask: Tensor | None = batch.get("attention_mask")
        lengths = torch.full((batch_size,), width) if mask is None else content_bounds(mask.cpu())[1]
        block_size, heads = self._geometry()
        # From the padded width, which all processes share: a global batch draws the same rows however it is dealt out.
        rows = draw_rows(num_blocks(width, block_size), config.rows, config.skip_rows, config.seed, draw)
        valid = rows * block_size < lengths[:, None]
        seen: set[int] = set()

        def layer_loss(inputs: LayerInputs, blocks: BlockIndices | None) -> None:
            if inputs.layer not in self.names:
                return
            seen.add(inputs.layer)
            name, device = self.names[inputs.layer], inputs.q.device
            target = pooled_attention(
                inputs.q,
                inputs.k,
                block_size=block_size,
                scale=inputs.scale,
                rows=rows_on(device),
                lengths=inputs.lengths,
                lse=inputs.lse,
            )
            with torch.enable_grad():
                logits = self.masters[name](
                    inputs.q_pre, inputs.k_pre, inputs.cos, inputs.sin, rows=rows_on(device), lengths=inputs.lengths
                )
                loss = kl_sum(logits, target, None if mask is None else valid_on(device))
                loss.backward()
            sums[name] += loss.detach()

        # One copy to each device, not one for each layer: copies of pageable memory wait for the device.
        rows_on, valid_on = functools.cache(rows.to), functools.cache(valid.to)
        with torch.no_grad(), dense(self.model), observe(self.model, layer_loss):
            run_prompt(self.model, {"input_ids": batch["input_ids"], "attention_mask": mask})
        missing = [name for layer, name in self.names.items() if layer not in seen]
        if missing:
            raise DistillationError(
                f"these layers have gates but their attention was not seen: {', '.join(missing)}. Either the model "
                f"does not run them, or their sliding window is below {width} tokens: use shorter sequences"
            )
        count = kl_count(int(valid.sum()), heads, num_blocks(width, block_size), config.reduction)
        return count, int(lengths.sum())

    def _geometry(self) -> tuple[int, int]:
        """Block size and number of query heads, which all layers share."""
        found = {(gate.block_size, gate.num_heads) for gate in self.gates.values()}
        if len(found) > 1:
            raise NotImplementedError(
                f"layers of different (block size, query heads) are not supported: {sorted(found)}"
            )
        return found.pop()

    def _reduce(
        self, sums: dict[str, Tensor], count: int, tokens: int
    ) -> tuple[dict[str, float], dict[str, float], int] | None:
        """Turn sums of losses and gradients into means over all processes.

        Returns:
            Losses and gradient norms by layer, which come to the host in one transfer, and the number of tokens.
        """
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
        return (
            dict(zip(names, host[: len(names)], strict=True)),
            dict(zip(names, host[len(names) :], strict=True)),
            tokens,
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

    def _update(self, norms: Mapping[str, float]) -> None:
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
