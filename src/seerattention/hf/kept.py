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

from ..gates import KeyState, QueryState

_ATTRIBUTE = "_seer_encoded_keys"


class Kept:
    """What a decode gate encoded of the tokens of one cache layer.

    Attributes:
        state: the encoded keys of all; None: none are kept.
        queries: the encoded queries of the last ones, where the gate has a window; None: none are kept.
    """

    def __init__(self, state: KeyState | None = None, queries: QueryState | None = None):
        self.state = state
        self.queries = queries
        self._keys: weakref.ref[Tensor] | None = None
        self._keys_version: int | None = None
        self._gate: weakref.ref[nn.Module] | None = None
        self._gate_version: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        """The copy is good for the copy of the keys, which the cache layer holds, and copies, before this."""
        keys = None if self._keys is None else self._keys()
        copied = memo.get(id(keys))
        if keys is None or copied is None or self._keys_version != _version(keys):
            return Kept()
        twin = Kept(copy.deepcopy(self.state, memo), copy.deepcopy(self.queries, memo))
        twin._keys, twin._keys_version = weakref.ref(copied), _version(copied)
        twin._gate, twin._gate_version = self._gate, self._gate_version
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()  # another process makes them anew

    def is_of(self, keys: Any, gate: nn.Module) -> bool:
        """Whether it was made of this very tensor, by this gate as it is; or of one of which this is what a crop left
        (rejected candidates), after which it is made to fit."""
        old = None if self._keys is None else self._keys()
        if old is None or self._keys_version != _version(old):
            return False
        if self._gate is None or self._gate() is not gate or self._gate_version != _parameters(gate):
            return False
        return old is keys or self._crop(old, keys, gate)

    def _crop(self, old: Tensor, keys: Any, gate: nn.Module) -> bool:
        if not isinstance(keys, Tensor) or keys._base is not (old if old._base is None else old._base):
            return False
        removed = old.shape[2] - keys.shape[2]
        same = keys.storage_offset() == old.storage_offset() and keys.stride() == old.stride()
        if not same or keys.shape[:2] != old.shape[:2] or removed < 0:
            return False
        if self.state is not None:
            lengths = [length - removed for length in self.state.lengths]
            if min(lengths) < 0 or self.state.crop_needs_keys(lengths):
                self.state = None  # blocks were opened whose tokens are gone
            else:
                self.state.crop(lengths)
        if self.queries is not None:
            self.queries.crop(removed)
        self.belong_to(keys, gate)
        return True

    def select(self, index: Tensor, keys: Tensor) -> None:
        """Keep the rows of an index ``[B']``, in its order, which are now in ``keys``."""
        gate = None if self._gate is None else self._gate()
        for part in (self.state, self.queries):
            if part is not None:
                part.select(index)
        if gate is not None:
            self.belong_to(keys, gate)

    def belong_to(self, keys: Tensor, gate: nn.Module) -> None:
        """Say what it was made of."""
        self._keys, self._keys_version = weakref.ref(keys), _version(keys)
        self._gate, self._gate_version = weakref.ref(gate), _parameters(gate)


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
        keys, gate = layer.keys, None if kept is None or kept._gate is None else kept._gate()
        follows = kept is not None and gate is not None and kept.is_of(keys, gate)
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
    kept.belong_to(cache_layer.keys, gate)
    cache_layer.__dict__[_ATTRIBUTE] = kept
    if queries is not None:
        for method in _MOVES:
            if hasattr(type(cache_layer), method) and type(cache_layer.__dict__.get(method)) is not _Follower:
                cache_layer.__dict__[method] = _Follower(cache_layer, method)


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
    return tuple([(p.data_ptr(), _version(p), p.dtype) for p in parameters if p is not None])
