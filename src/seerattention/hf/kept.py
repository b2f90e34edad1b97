"""Encoded keys that stay with a cache layer of transformers from one decoding step to the next.

They lie on the cache layer itself, so that whoever copies or drops a cache copies or drops them. What happens to a
cache in between (crop, reorder, repeat, select, reset, offloading, prompts in chunks, dense steps) is not followed:
every one of these puts another tensor in the place of the keys, or, in static caches, writes into the one that is
there, which torch counts. So encoded keys are good for exactly one tensor, the one that the step left behind as it was
then, and whoever finds another one there makes them anew from it; but for a crop, which leaves a view of it.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import Tensor, nn

from ..gates.state import KeyState

_ATTRIBUTE = "_seer_encoded_keys"


class KeptKeys:
    """What a decode gate encoded of the keys of one cache layer.

    Attributes:
        state: the encoded keys; None: nothing is kept.
    """

    def __init__(self, state: KeyState | None = None):
        self.state = state
        self._keys: weakref.ref[Tensor] | None = None
        self._keys_version: int | None = None
        self._gate: weakref.ref[nn.Module] | None = None
        self._gate_version: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptKeys:
        """The copy is good for the copy of the keys, which the cache layer holds, and copies, before this."""
        keys = None if self._keys is None else self._keys()
        copied = memo.get(id(keys))
        if keys is None or copied is None or self._keys_version != _version(keys):
            return KeptKeys()
        twin = KeptKeys(copy.deepcopy(self.state, memo))
        twin._keys, twin._keys_version = weakref.ref(copied), _version(copied)
        twin._gate, twin._gate_version = self._gate, self._gate_version
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptKeys, ()  # another process makes them anew

    def is_of(self, keys: Any, gate: nn.Module) -> bool:
        """Whether they were made of this very tensor, by this gate as it is."""
        return (
            self.state is not None
            and self._keys is not None
            and isinstance(keys, Tensor)
            and self._keys() is keys
            and self._keys_version == _version(keys)
            and self._gate is not None
            and self._gate() is gate
            and self._gate_version == _parameters(gate)
        )

    def after_crop(self, keys: Any, gate: nn.Module) -> KeyState | None:
        """What is left where ``keys`` are the first ones of the tensor that they were made of, as ``crop`` leaves them
        after rejected candidates; None: they are not, or blocks were opened whose tokens are gone."""
        old = None if self._keys is None else self._keys()
        if old is None or self.state is None or not isinstance(keys, Tensor) or keys._base is not old:
            return None
        if not self.is_of(old, gate):
            return None
        removed = old.shape[2] - keys.shape[2]
        same = keys.storage_offset() == old.storage_offset() and keys.stride() == old.stride()
        lengths = [length - removed for length in self.state.lengths]
        if not same or keys.shape[:2] != old.shape[:2] or min(lengths) < 0 or self.state.crop_needs_keys(lengths):
            return None
        self.state.crop(lengths)
        self._keys = None  # they are good for this once
        return self.state

    def belong_to(self, keys: Tensor, gate: nn.Module) -> None:
        """Say what they were made of."""
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
    kept, keys = cache_layer.__dict__.get(_ATTRIBUTE), getattr(cache_layer, "keys", None)
    if kept is None or (in_place and isinstance(keys, Tensor) and _version(keys) is None):
        return None
    return kept.state if kept.is_of(keys, gate) else kept.after_crop(keys, gate)


def take_kept(cache_layer: Any) -> None:
    """Take the encoded keys away, before they are changed: whatever ends a step, none are left that are half new."""
    cache_layer.__dict__.pop(_ATTRIBUTE, None)


def keep(cache_layer: Any, state: KeyState, gate: nn.Module) -> None:
    """Leave the encoded keys of all present tokens with a cache layer."""
    kept = KeptKeys(state)
    kept.belong_to(cache_layer.keys, gate)
    cache_layer.__dict__[_ATTRIBUTE] = kept


def kept_bytes(cache_layer: Any) -> int:
    """Memory of the encoded keys that lie with a cache layer, good or stale."""
    kept = cache_layer.__dict__.get(_ATTRIBUTE)
    return 0 if kept is None or kept.state is None else kept.state.nbytes


def _version(x: Tensor) -> int | None:
    """Counts changes in place, which static caches make at every step, and others in ``reset`` at most; tensors of
    inference mode do not count."""
    return None if x.is_inference() else x._version


def _parameters(gate: nn.Module) -> tuple[Any, ...]:
    # Walking through the modules takes longer than all else; most gates have parameters of their own only.
    parameters = gate.parameters() if gate._modules else gate._parameters.values()
    return tuple([(p.data_ptr(), _version(p), p.dtype) for p in parameters if p is not None])
