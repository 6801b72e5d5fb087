"""The register tiles that all time goes into, written as LLVM vectors because a compiler does not find them.

They keep sums in vector registers for the whole inner loop, take flat arrays and offsets (in numbers, not bytes),
check nothing, and run on any processor that LLVM knows; eight lanes fill one register of AVX2 and two of
NEON, sixteen one of AVX-512.
"""

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _lanes() -> int:
    """The float32 numbers of a vector register: 16 where numba compiles for AVX-512, else 8. NUMBA_CPU_NAME,
    NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX say what it compiles for where that is not this processor."""
    config: Any = numba.config
    if config.CPU_FEATURES is not None or config.CPU_NAME is not None:
        return 16 if "+avx512f" in (config.CPU_FEATURES or "") else 8
    return 16 if config.ENABLE_AVX and binding.get_host_cpu_features().get("avx512f", False) else 8


LANES = _lanes()
STEPS = 4  # numbers of a row that a turn of the inner loop takes
SUMS = 24 if LANES == 16 else 12  # vectors of sums that a tile keeps in registers
QUAD = 4  # rows of weights, one for a neuron, come in multiples of it
AHEAD = 32  # entries of a list whose weights are on their way into the cache
LINE = 64  # bytes of a cache line
INTO_L2, INTO_L1 = 2, 3  # caches that memory is called into, as LLVM names them
_FLOAT, _LONG, _INT = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_ZERO, _NOTHING = ir.Constant(_VECTOR, [0.0] * LANES), ir.Constant(_VECTOR, ir.Undefined)


def panel_tile(rows: int, vectors: int) -> Any:
    """h[r_i, j] += sum over k of x[r_i, k] w[k, j] over `size` numbers k, for `rows` listed rows r_i of x and h and
    `vectors` x LANES neurons j.

    Of the intrinsic's arguments, `listed` (int64) holds from `at` on the r_i, all different; `x`, `w` and `h`
    (float32; w also bfloat16 as uint16, or int8) start at `x_from`, `w_from` and `h_from` and have rows of `x_row`,
    `w_row` and `h_row` numbers. `size` is a multiple of STEPS, not zero.
    """
    # A sum waits some steps for its last addition: as many as registers hold keep the processor busy.
    sets = min(STEPS, SUMS // (rows * vectors))

    @intrinsic
    def tile(typing, x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from = _data(
                context, builder, signature, args
            )
            listed, multiply_add = builder.gep(listed, [at]), _multiply_add(builder)
            numbers = [builder.load(builder.gep(listed, [_LONG(i)])) for i in range(rows)]
            xs = [builder.gep(x, [builder.add(builder.mul(row, x_row), x_from)]) for row in numbers]
            hs = [builder.gep(h, [builder.add(builder.mul(row, h_row), h_from)]) for row in numbers]
            w = builder.gep(w, [w_from])

            def step(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                found = list(sums)
                for u in range(STEPS):
                    at = builder.add(k, _LONG(u))
                    row = builder.mul(at, w_row)
                    weights = [_weights(builder, w, builder.add(row, _LONG(LANES * j))) for j in range(vectors)]
                    for i in range(rows):
                        times = _everywhere(builder, builder.load(builder.gep(xs[i], [at])))
                        for j, vector in enumerate(weights, (u % sets * rows + i) * vectors):
                            found[j] = builder.call(multiply_add, [times, vector, found[j]])
                return found

            cells = [(hs[i], _LONG(LANES * j)) for i in range(rows) for j in range(vectors)]
            before = [_load(builder, *cell) for cell in cells] + [_ZERO] * ((sets - 1) * len(cells))
            sums = _loop(builder, size, STEPS, before, step)
            for number, cell in enumerate(cells):
                _store(builder, sums[number :: len(cells)], *cell)
            return context.get_dummy_value()

        return types.void(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from), codegen

    return tile


def dot_tile(rows: int, neurons: int, unroll: int) -> Any:
    """h[r_i, j] += sum over k of x[r_i, k] w[j, k] over `size` numbers k, for `rows` listed rows r_i of x and h and
    `neurons` (a power of two, at most LANES) rows j of w.

    The intrinsic's arguments are those of `panel_tile`; `size` is a multiple of `unroll` x LANES, not zero. Tiles of
    several rows call w from `ahead` on into the L2 cache meanwhile, `size` numbers: nothing is read there, so it may be
    anywhere.
    """

    @intrinsic
    def tile(typing, x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, ahead):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, ahead = _data(
                context, builder, signature, args
            )
            listed, multiply_add, cells = builder.gep(listed, [at]), _multiply_add(builder), rows * neurons
            numbers = [builder.load(builder.gep(listed, [_LONG(i)])) for i in range(rows)]
            xs = [builder.gep(x, [builder.add(builder.mul(row, x_row), x_from)]) for row in numbers]
            hs = [builder.gep(h, [builder.add(builder.mul(row, h_row), h_from)]) for row in numbers]
            ws = [builder.gep(w, [builder.add(w_from, builder.mul(w_row, _LONG(j)))]) for j in range(neurons)]
            ahead = builder.gep(w, [ahead])

            def step(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                found = list(sums)
                for u in range(unroll):
                    at = builder.add(k, _LONG(u * LANES))
                    weights = [_weights(builder, own, at) for own in ws]
                    if rows > 1:
                        _call(builder, ahead, at, INTO_L2)
                    for i in range(rows):
                        given = _load(builder, xs[i], at)
                        for j, vector in enumerate(weights, u * cells + i * neurons):
                            found[j] = builder.call(multiply_add, [given, vector, found[j]])
                return found

            sums = _loop(builder, size, unroll * LANES, [_ZERO] * (cells * unroll), step)
            kind = ir.VectorType(_FLOAT, neurons)
            for i, own in enumerate(hs):
                at = i * neurons
                total = _totals(builder, [_sum(builder, sums[at + j :: cells]) for j in range(neurons)])
                total = builder.fadd(_load(builder, own, _LONG(0), kind), total)
                builder.store(total, builder.bitcast(own, kind.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(x, x_row, x_from, listed, at, w, w_row, w_from, size, h, h_row, h_from, ahead), codegen

    return tile


def spread_tile(vectors: int, unroll: int) -> Any:
    """h[j] += sum over the list of value x w[index, j], for `vectors` x LANES neurons j.

    Of the intrinsic's arguments, `index` (int64) and `value` (float32) hold the list, `count` entries from `index_from`
    and `value_from` on: a number that `unroll` divides, not zero; `w` (as for `panel_tile`) and `h` (float32) start at
    `w_from` and `h_from`, and rows of w have `w_row` numbers. `index` is read AHEAD entries further, to call for
    the rows of w that they name: whatever stands there will do.
    """

    @intrinsic
    def tile(typing, index, index_from, value, value_from, count, w, w_row, w_from, h, h_from):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            index, index_from, value, value_from, count, w, w_row, w_from, h, h_from = _data(
                context, builder, signature, args
            )
            starts = ((index, index_from), (value, value_from), (w, w_from), (h, h_from))
            index, value, w, h = (builder.gep(base, [at]) for base, at in starts)
            multiply_add = _multiply_add(builder)

            def step(t: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                found = []
                for u in range(unroll):
                    at = builder.add(t, _LONG(u))
                    row = builder.mul(builder.load(builder.gep(index, [at])), w_row)
                    soon = builder.mul(builder.load(builder.gep(index, [builder.add(at, _LONG(AHEAD))])), w_row)
                    for j in range(0, vectors, 2):
                        _call(builder, w, builder.add(soon, _LONG(LANES * j)), INTO_L1)
                    weights, times = builder.gep(w, [row]), _everywhere(builder, builder.load(builder.gep(value, [at])))
                    for j in range(vectors):
                        vector = _weights(builder, weights, _LONG(LANES * j))
                        found.append(builder.call(multiply_add, [times, vector, sums[u * vectors + j]]))
                return found

            before = [_load(builder, h, _LONG(LANES * j)) for j in range(vectors)]
            sums = _loop(builder, count, unroll, before + [_ZERO] * (vectors * (unroll - 1)), step)
            for j in range(vectors):
                _store(builder, sums[j::vectors], h, _LONG(LANES * j))
            return context.get_dummy_value()

        return types.void(index, index_from, value, value_from, count, w, w_row, w_from, h, h_from), codegen

    return tile


def filter_tile(filters: int, vectors: int, parts: int = 1, apart: int = LANES) -> Any:
    """h[i, j] = sum over k of w[filter_i + weight_k] x[channel_k + j] for `filters` filters i and `vectors` x LANES
    neighbouring positions j.

    Of the intrinsic's arguments, `x` and `w` (float32) are numbers and weights; `channel` and `weight` (int64) hold
    `count` entries, at least one: where an input starts in x (from `x_from` on), and which weight of a filter it meets;
    `filter` (int64) holds from `at` on where each filter's weights start; `h` (float32), rows of `h_row` numbers from
    `h_from` on. A vector of x is read in `parts`, each `apart` numbers from the one before.
    """

    @intrinsic
    def tile(typing, x, x_from, channel, weight, count, w, filter, at, h, h_row, h_from):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            x, x_from, channel, weight, count, w, filter, at, h, h_row, h_from = _data(
                context, builder, signature, args
            )
            x, filter, multiply_add = builder.gep(x, [x_from]), builder.gep(filter, [at]), _multiply_add(builder)
            ws = [builder.gep(w, [builder.load(builder.gep(filter, [_LONG(i)]))]) for i in range(filters)]

            def step(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                source = builder.gep(x, [builder.load(builder.gep(channel, [k]))])
                met = builder.load(builder.gep(weight, [k]))
                piece = ir.VectorType(_FLOAT, LANES // parts)
                pieces = [_load(builder, source, _LONG(apart * j), piece) for j in range(vectors * parts)]
                numbers = [_joined(builder, pieces[j * parts : (j + 1) * parts]) for j in range(vectors)]
                found = []
                for i in range(filters):
                    times = _everywhere(builder, builder.load(builder.gep(ws[i], [met])))
                    for j, vector in enumerate(numbers, i * vectors):
                        found.append(builder.call(multiply_add, [times, vector, sums[j]]))
                return found

            sums = _loop(builder, count, 1, [_ZERO] * (filters * vectors), step)
            for i in range(filters):
                row = builder.add(builder.mul(_LONG(i), h_row), h_from)
                for j in range(vectors):
                    _store(builder, [sums[i * vectors + j]], h, builder.add(row, _LONG(LANES * j)))
            return context.get_dummy_value()

        return types.void(x, x_from, channel, weight, count, w, filter, at, h, h_row, h_from), codegen

    return tile


def row_tile(kind: str) -> Any:
    """to[j] = a[j] x factor ("scaled"), max(a[j] + b[j], 0) x factor ("rectified"), or 0 ("cleared").

    For `size` numbers, at least one, and those behind them that fill a vector. All are float32, from `to_from`,
    `a_from` and `b_from` on.
    """

    @intrinsic
    def tile(typing, to, to_from, a, a_from, b, b_from, factor, size):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            to, to_from, a, a_from, b, b_from, factor, size = _data(context, builder, signature, args)
            to, a, b = (builder.gep(base, [at]) for base, at in ((to, to_from), (a, a_from), (b, b_from)))
            factor = _everywhere(builder, factor)

            def step(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                found = _ZERO
                if kind == "scaled":
                    found = builder.fmul(_load(builder, a, k), factor)
                elif kind == "rectified":
                    total = builder.fadd(_load(builder, a, k), _load(builder, b, k))
                    kept = builder.select(
                        builder.fcmp_ordered("<", total, _ZERO), _ZERO, total
                    )  # what is no number stays
                    found = builder.fmul(kept, factor)
                _store(builder, [found], to, k)
                return sums

            _loop(builder, size, LANES, [], step)
            return context.get_dummy_value()

        return types.void(to, to_from, a, a_from, b, b_from, factor, size), codegen

    return tile


def _data(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> list[ir.Value]:
    """The arguments, arrays as pointers to their first number."""
    return [
        context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, args, strict=True)
    ]


def _loop(
    builder: ir.IRBuilder,
    last: ir.Value,
    stride: int,
    sums: list[ir.Value],
    step: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """`sums` after `step` at 0, stride, ... below `last`; at least once."""
    before, body = builder.block, builder.append_basic_block("tile")
    after = builder.append_basic_block("tile.end")
    builder.branch(body)
    builder.position_at_end(body)
    at, held = builder.phi(_LONG), [builder.phi(_VECTOR) for _ in sums]
    found = step(at, held)
    following = builder.add(at, _LONG(stride))
    for phi, start, end in zip([at, *held], [_LONG(0), *sums], [following, *found], strict=True):
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


def _joined(builder: ir.IRBuilder, pieces: list[ir.Value]) -> ir.Value:
    """One vector of one or two pieces."""
    if len(pieces) == 1:
        return pieces[0]
    order = ir.Constant(ir.VectorType(_INT, LANES), list(range(LANES)))
    return builder.shuffle_vector(*pieces, order)


def _everywhere(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """A vector with the number in every lane."""
    one = builder.insert_element(_NOTHING, number, _INT(0))
    return builder.shuffle_vector(one, _NOTHING, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))


def _sum(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """The total of vectors, lane by lane, in pairs, so that additions do not wait for one another."""
    while len(vectors) > 1:
        odd = [vectors[-1]] if len(vectors) % 2 else []
        vectors = [builder.fadd(a, b) for a, b in zip(vectors[:-1:2], vectors[1::2], strict=True)] + odd
    return vectors[0]


def _totals(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """A vector of each vector's total over its lanes, of a power of two vectors: neighbours are added until one lane of
    each is left."""

    def added(a: ir.Value, b: ir.Value, lanes: int) -> ir.Value:
        kind = ir.VectorType(_INT, lanes // 2)
        even, odd = (ir.Constant(kind, list(range(start, lanes, 2))) for start in (0, 1))
        return builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))

    count, width = len(vectors), LANES
    while len(vectors) > 1:
        vectors = [added(a, b, 2 * LANES) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    total = vectors[0]
    while width > count:
        total, width = added(total, total, width), width // 2
    return total


def _store(builder: ir.IRBuilder, sums: list[ir.Value], base: ir.Value, offset: ir.Value) -> None:
    """The total of vectors, written anywhere."""
    builder.store(_sum(builder, sums), builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer()), align=4)


def _call(builder: ir.IRBuilder, base: ir.Value, offset: ir.Value, cache: int) -> None:
    """Ask for a line of memory that will be read soon."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    to_read, of_data = _INT(0), _INT(1)
    builder.call(prefetch, [builder.bitcast(builder.gep(base, [offset]), byte), to_read, _INT(cache), of_data])
