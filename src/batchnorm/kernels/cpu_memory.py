"""Raw memory for numba kernels: scalars at addresses, and the block of arguments a kernel is given.

A kernel takes one address, that of a block of 64-bit fields (`FIELDS`), because that is what a
thread pool can hand to a function. Tensors are read by `load`, which promises the compiler that
no kernel writes them: so loops become vector code without a check for overlap. Whatever is
written (results, scratch) goes through `store` and is read back by `fetch`.

A result that no cache can hold is written around the caches: by way of a `stage` on the stack,
whose full lines `stream` sends to memory, which then need not be read before they are written.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from batchnorm.kernels.cpu_threads import DOUBLES, FIELDS

_READ, _WRITTEN = "read", "written"

LINE, STAGE = 64, 4096
"""Bytes of a cache line, and of a `stage`."""


def _annotate(builder: Any, instruction: Any, own: str, others: str) -> Any:
    module = builder.module
    domain = module.add_metadata([ir.MetaDataString(module, "batchnorm")])
    for kind, scope in (("alias.scope", own), ("noalias", others)):
        name = module.add_metadata([ir.MetaDataString(module, scope), domain])
        instruction.set_metadata(kind, module.add_metadata([name]))
    return instruction


def _element(context: Any, builder: Any, address: Any, index: Any, kind: Any) -> Any:
    pointer = builder.inttoptr(address, context.get_data_type(kind).as_pointer())
    return builder.gep(pointer, [index])


@intrinsic
def load(typing_context, address, index, kind):
    """``load(address, index, kind)``: a scalar of memory that no kernel writes."""

    def lower(context, builder, signature, args):
        element = _element(context, builder, args[0], args[1], kind.dtype)
        return _annotate(builder, builder.load(element), _READ, _WRITTEN)

    return kind.dtype(types.int64, types.int64, kind), lower


@intrinsic
def fetch(typing_context, address, index, kind):
    """``fetch(address, index, kind)``: a scalar that this kernel, or an earlier phase of it, stored."""

    def lower(context, builder, signature, args):
        element = _element(context, builder, args[0], args[1], kind.dtype)
        return _annotate(builder, builder.load(element), _WRITTEN, _READ)

    return kind.dtype(types.int64, types.int64, kind), lower


@intrinsic
def store(typing_context, address, index, value):
    """``store(address, index, value)``: write a scalar of the value's own type."""

    def lower(context, builder, signature, args):
        element = _element(context, builder, args[0], args[1], value)
        _annotate(builder, builder.store(args[2], element), _WRITTEN, _READ)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), lower


@intrinsic
def stage(typing_context):
    """``stage()``: the address of `STAGE` bytes on this thread's stack, other ones in every place."""

    def lower(context, builder, signature, args):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(ir.IntType(8), STAGE))
        room.align = LINE
        return builder.ptrtoint(room, cgutils.intp_t)

    return types.int64(), lower


@intrinsic
def _stream_line(typing_context, target, source):
    def lower(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(32), LINE // 4)
        there, here = (builder.inttoptr(a, line.as_pointer()) for a in args)
        sent = builder.store(builder.load(here, align=LINE), there, align=LINE)
        sent.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), lower


@intrinsic
def _settle(typing_context):
    def lower(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), lower


@register_jitable(error_model="numpy")
def stream(target, source, size):
    """Copy ``size`` bytes, whole lines from line to line, past the caches."""
    for at in range(0, size, LINE):
        _stream_line(target + at, source + at)


@register_jitable(error_model="numpy")
def settle(block):
    """Wait until what this thread has streamed can be seen by all."""
    if argument(block, "streams") != 0:
        _settle()


@intrinsic(prefer_literal=True)
def argument(typing_context, block, name):
    """``argument(block, "x")``: the field of that name."""
    kind = types.float64 if name.literal_value in DOUBLES else types.int64
    place = FIELDS.index(name.literal_value)

    def lower(context, builder, signature, args):
        element = _element(context, builder, args[0], ir.IntType(64)(place), kind)
        return _annotate(builder, builder.load(element), _READ, _WRITTEN)

    return kind(types.int64, name), lower


@intrinsic
def _call(typing_context, address):
    def lower(context, builder, signature, args):
        function = ir.FunctionType(ir.IntType(32), [])
        found = builder.call(builder.inttoptr(args[0], function.as_pointer()), [])
        return builder.sext(found, cgutils.intp_t)

    return types.int64(types.int64), lower


@register_jitable(error_model="numpy")
def share(block, units):
    """This thread's units, from the first up to the end: a static partition, so that results repeat."""
    thread, threads = argument(block, "thread"), argument(block, "threads")
    thread_of, threads_of = argument(block, "thread_of"), argument(block, "threads_of")
    if thread_of != 0:
        # The pool may run fewer threads than it was asked for.
        thread, threads = _call(thread_of), _call(threads_of)
    return units * thread // threads, units * (thread + 1) // threads


@intrinsic
def widen(typing_context, value):
    """A stored scalar as what is computed with: float32 for bfloat16 (held as uint16 bits), else itself."""
    wide = types.float32 if value == types.uint16 else value

    def lower(context, builder, signature, args):
        if value != types.uint16:
            return args[0]
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(bits, ir.FloatType())

    return wide(value), lower


@intrinsic
def narrow(typing_context, value, kind):
    """A computed scalar as it is stored; to bfloat16 by rounding to nearest, ties to even."""
    stored = kind.dtype

    def lower(context, builder, signature, args):
        if stored != types.uint16:
            return args[0]
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
        # Rounding up could turn a NaN into a number.
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        kept = builder.select(is_nan, word(0x7FC00000), rounded)
        return builder.trunc(builder.lshr(kept, word(16)), ir.IntType(16))

    return stored(value, kind), lower


@intrinsic
def as_bits(typing_context, value):
    """The bits of a float32 as int32, or of an int32 as float32."""
    other = types.int32 if value == types.float32 else types.float32

    def lower(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_data_type(other))

    return other(value), lower
