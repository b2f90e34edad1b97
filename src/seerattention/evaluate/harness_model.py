"""A model as lm-evaluation-harness runs it. ``lm_eval`` is imported when one is made."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM as Base
else:
    Base = object  # HFLM comes in behind it, see `harness_model`

__all__ = ["harness_model"]

_PADDING = 0  # what HFLM fills rows up with on the right, whatever the tokenizer's padding token is


def harness_model(
    model: nn.Module, tokenizer: Any, batch_size: int, sparse: bool, done: Callable[[int], None] | None = None
) -> Any:
    """An ``lm_eval`` model around a Hugging Face model as it is at the moment, dense or sparse.

    Args:
        model: a causal language model; what is attached to it stays.
        tokenizer: is copied, since HFLM sets its padding.
        batch_size: requests a forward.
        sparse: whether padding has to be masked, see :class:`Masked`.
        done: called with numbers of requests that are through.
    """
    made = _kind()
    with _without_warnings("lm_eval.models.huggingface"):  # about options that come with a name, not with a model
        return made(model, copy.deepcopy(tokenizer), batch_size, sparse, done)


@functools.cache
def _kind() -> Any:
    from lm_eval.models.huggingface import HFLM

    return type("HarnessModel", (Masked, HFLM), {})


class Masked(Base):
    """What is put before ``HFLM``.

    HFLM scores continuations in batches that are padded on the right, and passes no mask: causality is enough for dense
    attention. Blocks are chosen for several rows at once, padding would be chosen for too, and a score would depend on
    what else is in its batch. So a sparse model is given the mask. A dense one runs as HFLM runs it, bit for bit.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, batch_size: int, sparse: bool, done: Callable[[int], None] | None
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._sparse = sparse
        self._done = done or (lambda requests: None)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Scores of ``(key, context tokens, continuation tokens)``.

        The batches that HFLM makes of them do not say how long their rows are. A row that ends with what is filled up
        with would seem shorter than it is; such requests are run by themselves, those of one row together.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            row = (context + continuation)[-(self.max_length + 1) :][:-1]
            groups.setdefault(tuple(row) if self._sparse and row[-1] == _PADDING else (), []).append(index)
        scores: dict[int, tuple[float, bool]] = {}
        for indices in groups.values():
            found = super()._loglikelihood_tokens([requests[i] for i in indices], True, override_bs)
            scores.update(zip(indices, found, strict=True))
        return [scores[index] for index in range(len(requests))]

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, vocabulary]`` of rows ``[B, T]`` that are padded on the right."""
        self._done(inps.shape[0])
        if self._sparse and inps.shape[0] > 1:
            mask = (inps != _PADDING).long().flip(1).cummax(1).values.flip(1)  # 1 up to the last token that is none
            if not mask.all():
                with torch.no_grad():
                    return self.model(inps, attention_mask=mask).logits
        return super()._model_call(inps, attn_mask, labels)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """HFLM's, without its progress bar."""
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """What is generated after rows ``[B, T]``, which are padded on the left and come with their mask."""
        made = super()._model_generate(context, *arguments, **options)
        self._done(context.shape[0])
        return made


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
