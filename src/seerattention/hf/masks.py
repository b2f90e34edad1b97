"""The mask function of the implementation named "seer", and the mask that it makes.

Sparse attention needs the padding ``[B, T]`` only; a mask ``[B, 1, T, T]`` of a prompt of 128K tokens would take 16 GiB
a row. But the mask also reaches layers that run another implementation: ones added later, ones that gates were taken
from in the middle of a forward. So it carries the padding, and is the mask of the untouched model to everybody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    eager_mask,
    flash_attention_mask,
    sdpa_mask,
)

from ..ops.replay import capturing
from .forward import Forward, current_forward
from .generation import single_tokens
from .implementation import decodes_sparsely, original_of
from .untraced import untraced

_DESCRIBED = "_seer_described"

# What reads memory without an op that could be answered for; and what chooses its kernel by the kind of mask.
_READS_MEMORY = (
    Tensor.numpy,
    Tensor.tolist,
    Tensor.data_ptr,
    Tensor.untyped_storage,
    Tensor.__array__,
    Tensor.__deepcopy__,
    Tensor.__dlpack__,
    Tensor.__reduce_ex__,
    torch.nn.functional.scaled_dot_product_attention,
)


class _Recipe:
    """How the mask of the untouched model is made, once per device."""

    def __init__(self, make: Callable[..., Tensor], arguments: dict[str, Any]):
        self.make = make
        self.arguments = arguments
        self.made: dict[torch.device, Tensor] = {}
        self.skipped: bool | None = None  # whether the untouched model does without; None: not asked yet

    def original(self, device: torch.device) -> Tensor | None:
        """What the untouched model would get: nothing, where its kernel needs to be told of causality only, as for a
        prompt in an empty static cache."""
        if self.skipped is None:
            mask = self.make(**self.arguments)
            self.skipped = mask is None
            if mask is not None:
                self.made[device] = mask.to(device)
        return None if self.skipped else self.on(device)

    def on(self, device: torch.device) -> Tensor:
        mask = self.made.get(device)
        if mask is None:
            mask = self.make(**{**self.arguments, "allow_is_causal_skip": False}).to(device)
            self.made[device] = mask
        return mask


class SeerMask(Tensor):
    """``[B, 1, Tq, Tk]`` without storage: causality and padding of whole prompts, or of chunks whose queries are the
    last slots that hold tokens (static caches have room behind them); at most one run of valid tokens a row.

    Any op, and any function of torch that gets it, sees the mask that the untouched model would have made.

    Attributes:
        padding: bool ``[B, S]``, True where there is a token; S are the slots up to that of the last query.
        queries, keys: Tq and Tk.
        full: whether there is no padding at all.
    """

    padding: Tensor
    full: bool
    recipe: _Recipe
    queries: int
    keys: int

    @staticmethod
    def __new__(
        cls, padding: Tensor, full: bool, dtype: torch.dtype, recipe: _Recipe, queries: int, keys: int
    ) -> SeerMask:
        shape = (padding.shape[0], 1, queries, keys)
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=padding.device)
        mask.padding, mask.full, mask.recipe, mask.queries, mask.keys = padding, full, recipe, queries, keys
        return mask

    def materialize(self) -> Tensor:
        """The mask as the untouched model makes it, where it makes one."""
        return self.recipe.on(self.padding.device)

    def original(self) -> Tensor | None:
        """What dense attention of the untouched model gets."""
        return self.recipe.original(self.padding.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SeerMask(padding={tuple(self.padding.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _READS_MEMORY:
            args, kwargs = tree_map_only(SeerMask, SeerMask.materialize, (args, kwargs))
        elif func is Tensor.to and isinstance(args[0], SeerMask):
            mask = args[0]
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and dtype in (None, mask.dtype):  # layers on several devices: still no storage
                padding = mask.padding.to(device, non_blocking=non_blocking)
                return cls(padding, mask.full, mask.dtype, mask.recipe, mask.queries, mask.keys)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = tree_map_only(SeerMask, SeerMask.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    # For torch.compile, which takes tensors like this apart and puts them together again.

    def __tensor_flatten__(self) -> tuple[list[str], tuple[bool, torch.dtype, _Recipe, int, int]]:
        return ["padding"], (self.full, self.dtype, self.recipe, self.queries, self.keys)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> SeerMask:
        return cls(inner["padding"], *context)

    @classmethod
    def __metadata_guard__(cls, first: Any, second: Any) -> bool:
        return first[:2] == second[:2]


def seer_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask that :func:`seer_attention` gets, made once per forward.

    Returns:
        The mask of the untouched model; as a :class:`SeerMask` where that is causality and padding of whole prompts,
        or of chunks whose queries are the last of the keys.
    """
    original = original_of(kwargs["config"])
    make: Any = None if original is None else AttentionMaskInterface._global_mapping.get(original)
    if make is flash_attention_mask:
        return make(*args, **kwargs)  # None, or the padding itself
    queries = _num_queries(kwargs)
    keys, window, padding = kwargs["kv_length"], kwargs.get("local_size"), kwargs.get("attention_mask")
    function = kwargs.get("mask_function", causal_mask_function)
    causal = function is causal_mask_function
    # A window that is not felt, unless the mask is more than that (packed sequences, mask overlays), which transformers
    # then refuses to skip; early versions refuse on static caches, too. What is more than causal by itself has a
    # function of its own.
    wide = window is not None and keys <= window
    wide = wide and (kwargs.get("allow_is_causal_skip", True) or _is_only_a_window(function))
    plain = (causal or wide) and not kwargs.get("kv_offset", 0)
    if queries == 1:
        return _mask_of_a_token(make, args, kwargs, plain)
    slots = keys  # that hold tokens
    if plain and queries != keys:
        first = _first_query(kwargs)
        slots, plain = first + queries, first >= 0 and first + queries <= keys
    if padding is not None and capturing(padding.device):
        plain = False  # its values are those of later replays
    if plain and padding is not None:
        padding = padding[:, :slots]
        if bool(padding.all()):
            padding = None
        else:
            padding = padding.bool()
            plain = padding.shape[-1] == slots and at_most_one_run_a_row(padding)
    if plain and make is sdpa_mask and padding is None and queries == keys:
        return None
    if plain and (make is sdpa_mask or make is eager_mask):
        return _without_storage(make, kwargs, padding, slots)
    mask = None if make is None else make(*args, **kwargs)
    if make is not sdpa_mask and make is not eager_mask:
        _describe(mask, plain, padding)
    return mask


def _is_only_a_window(function: Any) -> bool:
    """Whether a mask function of transformers is causality within a window and nothing else, so far as its parts tell:
    overlays are put around it."""
    parts = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if len(parts) != 1 or not isinstance(parts[0], tuple) or len(parts[0]) != 2:
        return False
    overlay, inner = parts[0]
    return inner is causal_mask_function and getattr(overlay, "__qualname__", "").startswith("sliding_window_overlay")


def _mask_of_a_token(make: Any, args: tuple[Any, ...], kwargs: dict[str, Any], plain: bool) -> Any:
    """The mask of the untouched model, which takes little memory; layers that may be sparse get told what it is.

    The token is the last of the keys, or in static caches of those that hold tokens. To ask for its position may wait
    for the device, so whoever needs it looks at the cache.
    """
    mask = None if make is None else make(*args, **kwargs)
    if mask is None or not (decodes_sparsely(kwargs["config"]) or single_tokens()):
        return mask
    keys, padding = kwargs["kv_length"], kwargs.get("attention_mask")
    plain = plain and (padding is None or not capturing(padding.device))
    if plain and padding is not None:
        padding = padding.bool()
        plain = padding.shape[-1] <= keys and at_most_one_run_a_row(padding)
    _describe(mask, plain, padding)
    return mask


def _num_queries(arguments: dict[str, Any]) -> int:
    return arguments["q_length"] if "q_length" in arguments else arguments["cache_position"].shape[0]


def _first_query(arguments: dict[str, Any]) -> int:
    """Position of the first query; -1 where a trace cannot know it. Where transformers gives a tensor it is read."""
    first = arguments["cache_position"][0] if "cache_position" in arguments else arguments.get("q_offset", 0)
    return -1 if isinstance(first, Tensor) and torch.compiler.is_compiling() else int(first)


@untraced("a tensor without storage is made")
def _without_storage(
    make: Callable[..., Any], arguments: dict[str, Any], padding: Tensor | None, slots: int
) -> SeerMask:
    dtype = torch.bool if make is sdpa_mask else arguments["dtype"]
    full = padding is None
    if padding is None:
        device = arguments["device"] if "device" in arguments else arguments["cache_position"].device
        padding = torch.ones(arguments["batch_size"], slots, dtype=torch.bool, device=device)
    if isinstance(arguments.get("q_offset"), Tensor):  # a static cache counts up in place before a layer asks
        arguments = {**arguments, "q_offset": arguments["q_offset"].clone()}
    return SeerMask(padding, full, dtype, _Recipe(make, arguments), _num_queries(arguments), arguments["kv_length"])


@untraced("what is known of a forward is kept by context")
def _describe(mask: Any, plain: bool, padding: Tensor | None) -> None:
    """Tell the forward under way what a mask of another kind (block masks, user's own) means. ``generate`` makes those
    of static caches before the forward begins: they carry it themselves."""
    forward = current_forward()
    if forward is not None:
        forward.masks.append((mask, plain, padding))
    elif isinstance(mask, Tensor):
        mask.__dict__[_DESCRIBED] = plain, padding


def read_mask(mask: Any, forward: Forward, original: str | None) -> tuple[bool, Tensor | None]:
    """Whether a mask is causality and padding of whole prompts, and the padding: bool ``[B, T]``, or None."""
    if isinstance(mask, SeerMask):
        return True, None if mask.full else mask.padding
    for known, plain, padding in forward.masks:
        if known is mask:
            return plain, padding
    if isinstance(mask, Tensor) and _DESCRIBED in mask.__dict__:
        return mask.__dict__[_DESCRIBED]
    if mask is None:
        return original != "eager", None  # which without a mask attends to everything
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return _read_copy(mask, forward)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        padding = mask.bool()
        plain = not capturing(mask.device) and at_most_one_run_a_row(padding)
        forward.masks.append((mask, plain, padding))
        return plain, padding
    return False, None


def _read_copy(mask: Tensor, forward: Forward) -> tuple[bool, Tensor | None]:
    """What a mask says that is a copy of one that was described, as layers on other devices get it; the copy of another
    mask is nothing known. To compare waits for the device, once a forward."""
    for known, plain, padding in forward.masks:
        same = isinstance(known, Tensor) and (known.shape, known.dtype) == (mask.shape, mask.dtype)
        if plain and same and not capturing(mask.device) and torch.equal(known.to(mask.device), mask):
            forward.masks.append((mask, plain, padding))
            return plain, padding
    return False, None


def at_most_one_run_a_row(padding: Tensor) -> bool:
    """Whether each row is one run of valid tokens, or has none yet: short rows of a batch in chunks begin later."""
    begins = padding[:, :1].int().sum(-1) + (padding[:, 1:] & ~padding[:, :-1]).sum(-1)
    return bool((begins <= 1).all())
