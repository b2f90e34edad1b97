"""Encoded keys, and queries, that stay with a cache layer of transformers from one decoding step to the next.

They lie on the cache layer itself, so that whoever copies or drops a cache copies or drops them. What happens to a
cache in between (crop, reorder, repeat, select, reset, offloading, prompts in chunks, dense steps) is not followed:
every one of these puts another tensor in the place of the keys, or, in static caches, writes into the one that is
there, which torch counts. So what is kept is good for exactly one tensor, the one that the step left behind as it was
then, and whoever finds another one there makes the encoded keys anew from it; but for a crop, which leaves a view of
it. Queries of gates with a window are in no cache and cannot be made anew: without them windows begin again. So where
rows of a cache are moved (beams, ``num_return_sequences`` of a kept cache), what is kept with such queries moves along.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.cache_utils import DynamicLayer

from ..gates import KeyState, QueryState

_ATTRIBUTE = "_seer_encoded_keys"


class _Memory:
    """Where a tensor ``[B, H, T, D]`` lies, so that what a crop leaves of it is known: first tokens at the same place.

    Tensors of inference mode do not know of which other one they are a view: of them it is the storage.
    """

    def __init__(self, keys: Tensor):
        self.whole: StorageWeakRef | weakref.ref[Tensor]
        if keys.is_inference():
            self.version, self.whole = None, StorageWeakRef(keys.untyped_storage())
        else:
            self.version, self.whole = keys._version, weakref.ref(_whole(keys))
        self.shape, self.stride, self.offset = keys.shape, keys.stride(), keys.storage_offset()

    def removed(self, keys: Tensor) -> int | None:
        """How many of the last tokens are not in ``keys``; None: it is another tensor."""
        if isinstance(self.whole, StorageWeakRef):
            same = keys.is_inference() and StorageWeakRef(keys.untyped_storage()) == self.whole
        else:
            same = not keys.is_inference() and self.whole() is _whole(keys)
        same = same and (self.stride, self.offset) == (keys.stride(), keys.storage_offset())
        if not same or keys.dim() != 4 or keys.shape[:2] != self.shape[:2] or keys.shape[2] > self.shape[2]:
            return None
        return self.shape[2] - keys.shape[2]


def _whole(x: Tensor) -> Tensor:
    """The tensor that ``x`` is a view of, or itself."""
    return x if x._base is None else x._base


class Kept:
    """What a decode gate encoded of the tokens of one cache layer.

    Attributes:
        state: the encoded keys of all; None: none are kept.
        queries: the encoded queries of the last ones, where the gate has a window; None: none are kept.
        noted: what somebody noted of the gate, whose parameters it is good for.
    """

    def __init__(self, state: KeyState | None = None, queries: QueryState | None = None):
        self.state = state
        self.queries = queries
        self.noted: Any = None
        self._layer: weakref.ref[Any] | None = None
        self._keys: weakref.ref[Tensor] | None = None
        self._memory: _Memory | None = None
        self._gate: weakref.ref[nn.Module] | None = None
        self._gate_version: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        """The copy is good for the copy of the keys, which the cache layer holds, and copies, before this."""
        layer = None if self._layer is None else self._layer()
        twin_layer, keys = memo.get(id(layer)), getattr(layer, "keys", None)
        copied = memo.get(id(keys))
        if twin_layer is None or not isinstance(copied, Tensor) or not self.is_current:
            return Kept()
        twin = Kept(copy.deepcopy(self.state, memo), copy.deepcopy(self.queries, memo))
        twin._layer, twin._gate, twin._gate_version = weakref.ref(twin_layer), self._gate, self._gate_version
        twin._made_of(copied)
        return twin

    @property
    def is_current(self) -> bool:
        """Whether it is of what its cache layer holds now, by its gate as it is now."""
        layer = None if self._layer is None else self._layer()
        gate = None if self._gate is None else self._gate()
        return layer is not None and gate is not None and self.is_of(layer.keys, gate)

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()  # another process makes them anew

    def is_of(self, keys: Any, gate: nn.Module) -> bool:
        """Whether it was made of this very tensor, by this gate as it is; or of one of which this is what a crop left
        (rejected candidates), after which it is made to fit."""
        if self._keys is None or self._memory is None or not isinstance(keys, Tensor):
            return False
        if self._memory.version != _version(keys):
            return False
        if self._gate is None or self._gate() is not gate or self._gate_version != _parameters(gate):
            return False
        return self._keys() is keys or self._crop(keys)

    def _crop(self, keys: Tensor) -> bool:
        assert self._memory is not None
        layer = None if self._layer is None else self._layer()
        if keys.is_inference() and getattr(type(layer), "update", None) is not DynamicLayer.update:
            return False  # who knows what was written into it
        removed = self._memory.removed(keys)
        if removed is None:
            return False
        if self.state is not None:
            lengths = [length - removed for length in self.state.lengths]
            if min(lengths) < 0 or self.state.crop_needs_keys(lengths):
                self.state = None  # blocks were opened whose tokens are gone
            else:
                self.state.crop(lengths)
        if self.queries is not None:
            self.queries.crop(removed)
        self._made_of(keys)
        return True

    def select(self, index: Tensor, keys: Tensor) -> None:
        """Keep the rows of an index ``[B']``, in its order, which are now in ``keys``."""
        for part in (self.state, self.queries):
            if part is not None:
                part.select(index)
        self._made_of(keys)

    def belong_to(self, cache_layer: Any, gate: nn.Module) -> None:
        """Say what it was made of."""
        self._layer = weakref.ref(cache_layer)
        self._gate, self._gate_version = weakref.ref(gate), _parameters(gate)
        self._made_of(cache_layer.keys)

    def _made_of(self, keys: Tensor) -> None:
        self._keys, self._memory = weakref.ref(keys), _Memory(keys)


def kept_keys(cache_layer: Any, gate: nn.Module, in_place: bool = False) -> KeyState | None:
    """The encoded keys of a cache layer as it is now; None: there are none, or they are of other keys.

    Args:
        cache_layer: of transformers.
        gate: of decoding.
        in_place: the cache is static, and writes into the tensor that it has: where torch does not count such changes
            (in inference mode), nothing can be kept.
    """
    kept = _kept(cache_layer, gate, in_place)
    return None if kept is None else kept.state


def kept_queries(cache_layer: Any, gate: nn.Module, in_place: bool = False) -> QueryState | None:
    """The encoded queries of the last tokens of a cache layer as it is now, as :func:`kept_keys`."""
    kept = _kept(cache_layer, gate, in_place)
    return None if kept is None else kept.queries


def _kept(cache_layer: Any, gate: nn.Module, in_place: bool) -> Kept | None:
    kept, keys = cache_layer.__dict__.get(_ATTRIBUTE), getattr(cache_layer, "keys", None)
    if kept is None or (in_place and isinstance(keys, Tensor) and _version(keys) is None):
        return None
    return kept if kept.is_of(keys, gate) else None


def kept_with(cache_layer: Any, gate: nn.Module) -> Kept | None:
    """All that is kept with a cache layer that is not static, if it is of what this holds now, by its gate as it is."""
    return _kept(cache_layer, gate, in_place=False)


def take_kept(cache_layer: Any) -> None:
    """Take what is kept away, before it is changed: whatever ends a step, nothing is left that is half new."""
    cache_layer.__dict__.pop(_ATTRIBUTE, None)


class _Follower:
    """Stands in the place of a method of a cache layer that moves its rows: what is kept with it is moved along."""

    def __init__(self, cache_layer: Any, method: str):
        self.layer = weakref.ref(cache_layer)  # which holds this: memory of caches must not wait for a collection
        self.method = method

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        layer: Any = self.layer()
        kept: Kept | None = layer.__dict__.get(_ATTRIBUTE)
        keys, follows = layer.keys, kept is not None and kept.is_current
        getattr(type(layer), self.method)(layer, *args, **kwargs)
        if kept is not None and follows and layer.keys is not keys:
            (argument,) = (*args, *kwargs.values())
            kept.select(_MOVES[self.method](torch.arange(len(keys), device=keys.device), argument), layer.keys)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Follower:
        layer = self.layer()
        return _Follower(memo.get(id(layer), layer), self.method)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.layer(), self.method)  # nothing is kept in another process: the layer's own method


_MOVES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda rows, index: rows[index.to(rows.device)],
    "batch_repeat_interleave": lambda rows, times: rows.repeat_interleave(times),
    "batch_select_indices": lambda rows, indices: rows[indices],
}
"""Methods of cache layers that move rows, and where the rows then are from; as transformers moves the keys."""


def keep(cache_layer: Any, gate: nn.Module, state: KeyState | None, queries: QueryState | None = None) -> None:
    """Leave the encoded keys of all present tokens, and queries of the last ones, with a cache layer."""
    kept = Kept(state, queries)
    kept.belong_to(cache_layer, gate)
    cache_layer.__dict__[_ATTRIBUTE] = kept
    if queries is not None:
        for method in _MOVES:
            if hasattr(type(cache_layer), method) and type(cache_layer.__dict__.get(method)) is not _Follower:
                cache_layer.__dict__[method] = _Follower(cache_layer, method)


def keep_again(cache_layer: Any, kept: Kept) -> None:
    """Leave what was taken from a cache layer, and has grown with it, there again."""
    kept._made_of(cache_layer.keys)
    cache_layer.__dict__[_ATTRIBUTE] = kept


def kept_bytes(cache_layer: Any) -> int:
    """Memory of what lies encoded with a cache layer, good or stale."""
    kept = cache_layer.__dict__.get(_ATTRIBUTE)
    return 0 if kept is None else sum(part.nbytes for part in (kept.state, kept.queries) if part is not None)


def _version(x: Tensor) -> int | None:
    """Counts changes in place, which static caches make at every step, and others in ``reset`` at most; tensors of
    inference mode do not count."""
    return None if x.is_inference() else x._version


def _parameters(gate: nn.Module) -> tuple[Any, ...]:
    # Walking through the modules takes longer than all else; most gates have parameters of their own only.
    parameters = gate.parameters() if gate._modules else gate._parameters.values()
    present = [p for p in parameters if p is not None]
    try:
        return tuple([(p.data_ptr(), p._version, p.dtype) for p in present])
    except RuntimeError:  # made in inference mode: changes in place are not counted
        return tuple([(p.data_ptr(), _version(p), p.dtype) for p in present])
