"""The processes of a run: one, or those that ``accelerate launch`` (or torchrun) has started."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's rank among ``world_size`` processes; all methods are no-ops for a single one."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def join(cls, *, cpu: bool | None = None) -> Processes:
        """The process group that exists, or the one that the launcher's environment variables ask for.

        Args:
            cpu: make a gloo group for CPU tensors (True), or an NCCL one (False); None: NCCL where CUDA is available.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available() if cpu is None else cpu)
            return cls(state.process_index, state.num_processes)
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this machine, which is the index of this process's GPU."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def finish(self) -> None:
        """Wait for all processes and dissolve the group, at the end of a program."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each process; all must have one shape."""
        if self.world_size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return gathered

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.world_size > 1:
            dist.barrier()
