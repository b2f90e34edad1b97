"""What the training-free selectors share: a rule of their own or a policy, checks of their numbers, chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..ops.indices import BlockIndices
from ..policies import Policy
from ..selectors import LayerInputs, Selector
from .checks import check_block_size, check_integer, check_number, check_policy
from .prompt import Prompt, masks_to_lists, rows_of_scores, scores_to_lists


@dataclass(frozen=True)
class TrainingFree(Selector, registered=False):
    """A frozen dataclass with a ``block_size``, which says one or both of

    * ``keep(prompt)``: the blocks to keep, bool ``[Hq or 1, R, N]``, a rule of its own;
    * ``score(prompt)``: scores, float32 ``[Hq or 1, R, N]``, from which its ``policy`` chooses if it has one.

    What lies behind the diagonal is ignored, and the diagonal is kept. With ``lists_per_kv_head`` both have Hkv for Hq.

    Attributes:
        block_size: tokens a block; publications have 64 or 128.
        limits: of its numbers, by name: the least value of an integer, or the least and the most of a number.
    """

    takes_chunks = True
    block_size: int = field(default=64, kw_only=True)
    policy_required: ClassVar[bool] = False
    lists_per_kv_head: ClassVar[bool] = False
    limits: ClassVar[dict[str, int | tuple[float, float]]]

    def __init_subclass__(
        cls, kind: str, limits: dict[str, int | tuple[float, float]] | None = None, **options: Any
    ) -> None:
        cls.kind, cls.limits = kind, limits or {}
        super().__init_subclass__(**options)

    def __post_init__(self) -> None:
        name = type(self).__name__
        for argument, limit in self.limits.items():
            value = getattr(self, argument)
            if isinstance(limit, tuple):
                check_number(name, argument, value, *limit)
            else:
                check_integer(name, argument, value, limit)
        check_block_size(name, self.block_size)
        check_policy(name, self._policy, optional=not self.policy_required)

    @property
    def _policy(self) -> Policy | None:
        """The field ``policy`` of those who have one."""
        return getattr(self, "policy", None)

    @property
    def rowwise(self) -> bool:
        if self._policy is not None:
            return self._policy.rowwise
        return not getattr(self, "last_blocks_dense", 0)

    def select(self, inputs: LayerInputs) -> BlockIndices:
        heads = self._lists(inputs)
        if self._policy is None:
            return masks_to_lists(inputs, self.block_size, self.keep, heads)
        return scores_to_lists(inputs, self.block_size, self._policy, self.score, heads)

    def _lists(self, inputs: LayerInputs) -> int | None:
        """How many lists each row of blocks has; None: one a query head."""
        return inputs.k.shape[1] if self.lists_per_kv_head else None

    def scores(self, inputs: LayerInputs) -> Tensor | None:
        if type(self).score is TrainingFree.score:
            return None
        return rows_of_scores(inputs, self.block_size, self.score, self._lists(inputs))

    def keep(self, prompt: Prompt) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no rule of its own; give it a policy")

    def score(self, prompt: Prompt) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no scores for a policy")
