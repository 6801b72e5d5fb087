"""The two register tiles that all time goes into, written as LLVM vectors because a compiler does not find them.

Both keep sums in vector registers for the whole inner loop. They take flat arrays and offsets (in numbers, not bytes),
check nothing, and run on any processor that LLVM knows; eight lanes fill one register of AVX2 and two of NEON.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
_FLOAT, _LONG, _INT = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_ZERO, _NOTHING = ir.Constant(_VECTOR, [0.0] * LANES), ir.Constant(_VECTOR, ir.Undefined)


def dot_tile(rows: int, columns: int) -> Any:
    """h[r_i, j] += x[r_i] . w[j] over `size` numbers, for `rows` listed rows of x and `columns` rows of w in turn.

    Of the intrinsic's arguments, `listed` (int64) holds from `at` on the rows r_i of x and h; `x`, `w` and `h`
    (float32; w also bfloat16 as uint16, or int8) start at `x_from`, `w_from` and `h_from` and have rows of `x_row`,
    `w_row` and `h_row` numbers. `size` is a multiple of LANES.
    """

    @intrinsic
    def tile(typing, x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from = _data(
                context, builder, signature, args
            )
            listed_at = builder.gep(listed, [at])
            numbers = [builder.load(builder.gep(listed_at, [_LONG(i)])) for i in range(rows)]
            xs = [builder.gep(x, [builder.add(builder.mul(row, x_row), x_from)]) for row in numbers]
            ws = [builder.gep(w, [builder.add(w_from, builder.mul(_LONG(j), w_row))]) for j in range(columns)]
            multiply_add = _multiply_add(builder)

            def step(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                weights = [_weights(builder, row, k) for row in ws]
                inputs = [_load(builder, row, k) for row in xs]
                pairs = [(a, b) for a in inputs for b in weights]
                return [builder.call(multiply_add, [a, b, total]) for (a, b), total in zip(pairs, sums, strict=True)]

            sums = _loop(builder, _LONG(0), size, LANES, [_ZERO] * (rows * columns), step)
            for i, row in enumerate(numbers):
                to = builder.gep(h, [builder.add(builder.mul(row, h_row), h_from)])
                for j in range(columns):
                    cell = builder.gep(to, [_LONG(j)])
                    builder.store(builder.fadd(builder.load(cell), _across(builder, sums[i * columns + j])), cell)
            return context.get_dummy_value()

        return types.void(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from), codegen

    return tile


def spread_tile(vectors: int, unroll: int) -> Any:
    """h[j] += sum over the list of value x w[index, j], for `vectors` x LANES neurons j.

    Of the intrinsic's arguments, `index` (int64) and `value` (float32) hold the list from `first` up to `last`, of a
    length that `unroll` divides, not zero; `w` (as for `dot_tile`) and `h` (float32) start at `w_from` and `h_from`,
    and rows of w have `w_row` numbers.
    """

    @intrinsic
    def tile(typing, index, value, first, last, w, w_row, w_from, h, h_from):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            index, value, first, last, w, w_row, w_from, h, h_from = _data(context, builder, signature, args)
            w, h, multiply_add = builder.gep(w, [w_from]), builder.gep(h, [h_from]), _multiply_add(builder)

            def step(t: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                found = []
                for u in range(unroll):
                    at = builder.add(t, _LONG(u))
                    row = builder.mul(builder.load(builder.gep(index, [at])), w_row)
                    weights, times = builder.gep(w, [row]), _everywhere(builder, builder.load(builder.gep(value, [at])))
                    for j in range(vectors):
                        vector = _weights(builder, weights, _LONG(LANES * j))
                        found.append(builder.call(multiply_add, [times, vector, sums[u * vectors + j]]))
                return found

            before = [_load(builder, h, _LONG(LANES * j)) for j in range(vectors)]
            sums = _loop(builder, first, last, unroll, before + [_ZERO] * (vectors * (unroll - 1)), step)
            for j in range(vectors):
                total = sums[j]
                for u in range(1, unroll):
                    total = builder.fadd(total, sums[u * vectors + j])
                cell = builder.bitcast(builder.gep(h, [_LONG(LANES * j)]), _VECTOR.as_pointer())
                builder.store(total, cell, align=4)
            return context.get_dummy_value()

        return types.void(index, value, first, last, w, w_row, w_from, h, h_from), codegen

    return tile


def _data(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> list[ir.Value]:
    """The arguments, arrays as pointers to their first number."""
    return [
        context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, args, strict=True)
    ]


def _loop(
    builder: ir.IRBuilder,
    first: ir.Value,
    last: ir.Value,
    stride: int,
    sums: list[ir.Value],
    step: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """`sums` after `step` at first, first + stride, ... below last; at least once."""
    before, body = builder.block, builder.append_basic_block("tile")
    after = builder.append_basic_block("tile.end")
    builder.branch(body)
    builder.position_at_end(body)
    at, held = builder.phi(_LONG), [builder.phi(_VECTOR) for _ in sums]
    found = step(at, held)
    following = builder.add(at, _LONG(stride))
    for phi, start, end in zip([at, *held], [first, *sums], [following, *found], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(end, body)
    builder.cbranch(builder.icmp_signed("<", following, last), body, after)
    builder.position_at_end(after)
    return found


def _multiply_add(builder: ir.IRBuilder) -> ir.Function:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")


def _load(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value, kind: ir.Type = _VECTOR) -> ir.Value:
    """A vector that starts anywhere."""
    place = builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())
    return builder.load(place, align=base.type.pointee.width // 8 if isinstance(base.type.pointee, ir.IntType) else 4)


def _weights(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """A vector of weights as float32: a bfloat16 is the upper half of one, an int8 a multiple of its row's scale."""
    stored = base.type.pointee
    if stored == _FLOAT:
        return _load(builder, base, offset)
    vector, whole = _load(builder, base, offset, ir.VectorType(stored, LANES)), ir.VectorType(_INT, LANES)
    if stored.width == 8:
        return builder.sitofp(builder.sext(vector, whole), _VECTOR)
    halves = ir.Constant(whole, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(vector, whole), halves), _VECTOR)


def _everywhere(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """A vector with the number in every lane."""
    one = builder.insert_element(_NOTHING, number, _INT(0))
    return builder.shuffle_vector(one, _NOTHING, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))


def _across(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of a vector's lanes, by halves."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        kind, nothing = ir.VectorType(_INT, lanes), ir.Constant(vector.type, ir.Undefined)
        low, high = (ir.Constant(kind, list(range(at, at + lanes))) for at in (0, lanes))
        vector = builder.fadd(*(builder.shuffle_vector(vector, nothing, half) for half in (low, high)))
    return builder.extract_element(vector, _INT(0))
