"""Compiled lazy networks against the reference evaluation, their tiles against plain loops, and their timing."""

import copy
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condcomp_lib.errors import UsageError
from condcomp_lib.kernels import BATCHES, compile, cpu, layers, products, tiles, timing
from condcomp_lib.kernels.pack import DTYPES
from condcomp_lib.kernels.tiles import AHEAD, LANES, dot_tile, panel_tile, row_tile, spread_tile
from condcomp_lib.lazy import LazyNetwork, compensated, decided_by
from condcomp_lib.oracle import Oracle
from condcomp_lib.partitions import SCOPES, Partition, cut_into_blocks, make_partition
from condcomp_lib.policies import Budget, Given, Policy, Pool, Sample, Shared, Threshold
from condcomp_lib.targets import ACTIVATIONS, MLP

either_scope = pytest.mark.parametrize("scope", SCOPES)
every_batch = pytest.mark.parametrize("batch", BATCHES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(count, width=16, seed=1):
    return torch.randn(count, width, generator=seeded(seed))


def lazy_network(scope="network", decision=None, width=16, hidden=(9, 7, 8), classes=5, activation="relu", pool=None,
                 rescale="none", always_on=False, partition=None):  # fmt: skip
    """An untrained network whose logits and scores vary much by example; a partition of four uneven groups."""
    target = MLP(width, hidden, classes, activation, seeded(1))
    partition = partition or make_partition("random", hidden, 4, seeded(2), scope)
    policy = Policy(partition, width, pool, seeded(3), always_on)
    with torch.no_grad():
        for layer, factor in [(layer, 2) for layer in target.linears] + [(gate, 8) for gate in policy.gates]:
            layer.weight.mul_(factor)
    return LazyNetwork(target, partition, policy, decision or Threshold((0.0,) * len(policy.gates)), rescale)


@torch.no_grad()
def under(lazy, x, mask):
    return lazy.evaluate(x, None, Given(mask))


def assert_close(scores, expected, share=1e-4):
    assert (scores.dtype, scores.shape) == (torch.float32, expected.shape)
    if len(scores):
        assert (scores - expected).abs().max() <= share * expected.abs().max() + 1e-6


def assert_decided(lazy, shared, mask, logits):
    """The mask is what the decision makes of the reference's logits, but where one lies at its edge."""
    decision, groups = lazy.decision, lazy.partition.groups
    for gate, found in enumerate(logits.split(groups, dim=1)):
        bits = mask[:, gate * groups : (gate + 1) * groups]
        if shared:
            found = found.mean(0, keepdim=True).expand(len(found), -1)
            assert (bits == bits[:1]).all()
        if isinstance(decision, Budget):
            assert (bits.sum(1) == decision.counts[gate]).all()
            edge = found.sort(1).values[:, groups - decision.counts[gate], None]
        else:
            edge = torch.tensor(decision.levels[gate])
        assert (
            (bits == lazy._decided(decision(found, gate))) | ((found - edge).abs() <= 1e-4 * (1 + 0.01 * found.abs()))
        ).all()


def rounded(lazy, dtype):
    """The lazy network with the target's weights as `dtype` holds them."""
    lazy = copy.deepcopy(lazy)
    for weight in [layer.weight.data for layer in lazy.target.linears]:
        if dtype == "bfloat16":
            weight.copy_(weight.bfloat16())
        elif dtype == "int8":
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_((weight / scale).round() * scale)
    return lazy


# the reference's scores and masks


@st.composite
def networks(draw):
    """Lazy networks of all shapes, with unequal groups (some empty) and decisions of both kinds."""
    scope, size = draw(st.sampled_from(SCOPES)), draw(st.sampled_from([0, 0, 1, 2]))
    sides = draw(st.tuples(*[st.integers(1, 4)] * 2))
    pool = Pool((draw(st.integers(1, 3)), *(side * size for side in sides)), size) if size else None
    width = pool.inputs if pool else draw(st.integers(1, 70))
    hidden = tuple(draw(st.lists(st.integers(1, 60), min_size=1, max_size=4)))
    groups = draw(st.integers(1, min(12, sum(hidden) if scope == "network" else min(hidden))))
    seed, empty = draw(st.integers(0, 1000)), draw(st.integers(0, groups - 1))  # so many have no neuron at all
    members = tuple(
        torch.randint(empty, groups, (n,), generator=seeded(seed + layer)) for layer, n in enumerate(hidden)
    )
    levels, counts = st.sampled_from([0.0, 0.0, -0.5, 0.5, -math.inf, math.inf]), st.integers(1, groups)
    kind, number = draw(st.sampled_from([(Threshold, levels), (Budget, counts)]))
    decision = kind(draw(st.tuples(*[number] * (len(hidden) if scope == "layer" else 1))))
    more = [draw(st.sampled_from(kinds)) for kinds in (range(1, 21), list(ACTIVATIONS), [pool],
            ["none", "activity", "sigma"], [False, True])]  # fmt: skip
    lazy = lazy_network(scope, decision, width, hidden, *more, Partition(members, groups, scope))
    for gate in lazy.policy.gates:
        gate.bias.data.mul_(draw(st.integers(0, 1)))  # without a bias, logits of nothing are equal
    return compensated(lazy, inputs(20, width, 7)) if draw(st.booleans()) else lazy


@settings(max_examples=200)
@given(networks(), st.sampled_from([0, 1, 2, 3, 4, 5, 7, 130]), st.sampled_from(BATCHES), st.integers(1, 2),
       st.sampled_from(["float32", *DTYPES]), st.sampled_from([1, 1, 30]), st.booleans())  # fmt: skip
def test_scores_and_masks_are_the_references(lazy, count, batch, threads, dtype, scale, marked):
    x, shared = scale * inputs(count, lazy.target.linears[0].in_features), batch == "shared"
    x[::3] = 0
    dtype = "float32" if lazy.fill else dtype  # what fills is rounded in another way
    decision = Shared(lazy.decision) if shared and marked else lazy.decision
    fast, nearest = compile(decided_by(lazy, decision), batch, threads, dtype), rounded(lazy, dtype)
    share = 1e-4 if dtype == "float32" else 1e-3
    scores, mask = fast.evaluate(x)
    expected = under(nearest, x, mask)
    assert (mask.dtype, mask.shape) == (torch.bool, expected.logits.shape)
    assert_close(scores, expected.scores, share)
    assert_decided(nearest, shared, mask, expected.logits)
    assert torch.equal(fast(x), scores)
    other = torch.rand(mask.shape, generator=seeded(5)) < 0.4
    other[:, :: lazy.partition.groups] |= lazy.policy.always_on
    scores, mask = fast.evaluate(x, other)
    assert torch.equal(mask, other)
    assert_close(scores, under(nearest, x, other).scores, share)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))  # many zeros, or none
@pytest.mark.parametrize(("width", "hidden"), [(256, (300, 230)), (1025, (64, 73, 512)), (2304, (30,))])
def test_wide_layers_are_evaluated_as_narrow_ones(width, hidden, activation, dtype):
    """Rows in several blocks, rows a power of two apart, groups of more vectors than there are registers."""
    lazy = lazy_network("network", Budget((3,)), width, hidden, activation=activation)
    fast, nearest = compile(lazy, dtype=dtype), rounded(lazy, dtype)
    for count in (1, 5, 128, 129):
        x = inputs(count, width)
        scores, mask = fast.evaluate(x)
        assert_close(scores, under(nearest, x, mask).scores, 1e-4 if dtype == "float32" else 1e-3)
    filled = compensated(lazy, x)
    scores, mask = compile(filled, dtype=dtype).evaluate(x)
    assert_close(scores, under(filled, x, mask).scores, {"float32": 1e-4, "bfloat16": 0.02, "int8": 0.05}[dtype])


WAYS = [(1, 0.3, layers.LISTS), (128, 0.25, layers.PAIRS), (40, 0.9, layers.DOTS), (128, 1.0, layers.DOTS)]


@pytest.mark.parametrize("more", [{}, {"activation": "tanh"}, {"rescale": "activity", "scope": "layer"}])
@pytest.mark.parametrize(("count", "share", "way"), WAYS)
def test_every_way_to_add_up_a_layer_gives_the_references_scores(count, share, way, more):
    """Each is the cheapest somewhere, with weights of every type and with skipped neurons filled in."""
    lazy, x = lazy_network(width=40, hidden=(203, 190, 201), partition=None, **more), inputs(count, 40)
    mask = torch.rand(count, lazy.policy.bits, generator=seeded(4)) < share
    spans = np.zeros((lazy.partition.groups + 1, 9), np.int64)
    bits = np.ascontiguousarray(mask[:, : lazy.partition.groups].numpy()).astype(np.uint8).ravel()
    assert layers.cheapest(count, spans, 0, bits, lazy.partition.groups, 200) == way
    for dtype in DTYPES:
        scores = compile(lazy, dtype=dtype).evaluate(x, mask)[0]
        assert_close(scores, under(rounded(lazy, dtype), x, mask).scores, 1e-4 if dtype == "float32" else 1e-3)
    filled = compensated(lazy, inputs(20, 40, 7))
    assert_close(compile(filled).evaluate(x, mask)[0], under(filled, x, mask).scores)


@every_batch
def test_levels_are_exact(batch):
    lazy, x = lazy_network(), inputs(5)
    logits = lazy.policy.logits(0, x)
    if batch == "shared":
        logits = logits.mean(0, keepdim=True).expand(5, -1)
    for level in [logit + side for logit in logits[0].tolist() for side in (-5e-4, 5e-4)]:
        mask = compile(decided_by(lazy, Threshold((level,))), batch).evaluate(x)[1]
        assert torch.equal(mask, logits > level)


# inputs, copies, threads, memory


@every_batch
def test_every_kind_of_array_gives_the_same_scores(batch):
    fast, x, mask = compile(lazy_network(), batch), inputs(5), torch.rand(5, 4, generator=seeded(5)) < 0.4
    plain, locked, apart = x.numpy(), x.numpy().copy(), np.zeros((10, 32), np.float32)
    odd = np.zeros(321, np.uint8)[1:].view(np.float32).reshape(5, 16)  # not aligned
    locked.flags.writeable, apart[::2, ::2], odd[:] = False, plain, plain
    arrays = [locked, apart[::2, ::2], odd, np.asfortranarray(plain), plain.astype(float), plain.astype(">f4")]
    expected = fast(plain)
    for own in (plain, *arrays, x, x.double(), x.T.contiguous().T, x.clone().requires_grad_()):
        scores, bits = fast.evaluate(own)
        assert type(fast(own)) is type(scores) is type(bits) is type(own)
        assert all(np.array_equal(found, expected) for found in (fast(own), scores))
        assert (scores.dtype, bits.dtype) in ((np.float32, bool), (torch.float32, torch.bool))
    assert np.array_equal(plain, locked)
    expected = fast.evaluate(x, mask)[0]
    for own in (mask.float(), mask.numpy(), mask.numpy().astype(int)):
        assert torch.equal(fast.evaluate(x, own)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@either_scope
def test_a_compiled_network_is_a_copy_and_leaves_the_other_alone(scope, dtype):
    lazy, x = compensated(lazy_network(scope), inputs(20)), inputs(8)
    held, parts = [*lazy.parameters(), *lazy.fill], (lazy.target, lazy.policy, lazy.decision)
    before, state = [value.detach().clone() for value in held], torch.get_rng_state()
    fast = compile(lazy, dtype=dtype)
    expected = fast(x)
    assert all(torch.equal(one, other) for one, other in zip(held, before, strict=True))
    assert all(one is other for one, other in zip(held, [*lazy.parameters(), *lazy.fill], strict=True))
    assert all(weight.requires_grad for weight in lazy.parameters())
    assert parts == (lazy.target, lazy.policy, lazy.decision)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for value in held:
            value.add_(1)
    assert torch.equal(fast(x), expected)
    assert not torch.allclose(compile(lazy, dtype=dtype)(x), expected)


@pytest.mark.parametrize("threads", [1, 2])
@every_batch
def test_two_threads_that_share_one_network_disturb_nothing(batch, threads):
    fast = compile(lazy_network("layer", width=300, hidden=(200, 150)), batch, threads)
    jobs = [[inputs(count, 300, seed) for count in (1, 64, 7)] * 40 for seed in (1, 2)]
    expected = [[fast(x) for x in job] for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: [fast(x) for x in job], jobs))
    assert all(map(torch.equal, itertools.chain(*found), itertools.chain(*expected)))


def test_ten_thousand_calls_keep_nothing():
    fast, x, held = compile(lazy_network("layer")), inputs(1).numpy(), []
    tracemalloc.start()
    try:
        for calls in (100, 10_000):
            for _ in range(calls // 2):
                fast(x)
                fast.evaluate(x)
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[1] - held[0] < 10_000


# the width of vectors


@pytest.mark.parametrize(
    ("name", "features", "lanes"),
    [("haswell", "+avx2,+fma", 8), (None, "+avx2,+avx512f", 16), ("generic", "", 8), ("generic", None, 8)],
)
def test_vectors_are_as_wide_as_the_processor_that_is_compiled_for(monkeypatch, name, features, lanes):
    monkeypatch.setattr(numba.config, "CPU_NAME", name)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    assert tiles._lanes() == lanes


def test_vectors_are_narrow_where_wide_ones_are_switched_off(monkeypatch):
    monkeypatch.setattr(numba.config, "ENABLE_AVX", 0)
    assert tiles._lanes() == 8


NARROW = """
import torch
from condcomp_lib.kernels import compile, tiles
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.partitions import make_partition
from condcomp_lib.policies import Budget, Given, Policy
from condcomp_lib.targets import MLP

draws = torch.Generator().manual_seed(0)
target = MLP(300, (203, 90), 5, generator=draws).requires_grad_(False)
partition = make_partition("random", target.hidden, 7, draws)
policy = Policy(partition, 300, generator=draws).requires_grad_(False)
lazy = LazyNetwork(target, partition, policy, Budget((3,)))
for count in (1, 9, 130):
    x = torch.randn(count, 300, generator=draws)
    scores, mask = compile(lazy).evaluate(x)
    expected = lazy.evaluate(x, None, Given(mask)).scores
    assert (scores - expected).abs().max() <= 1e-4 * expected.abs().max()
print(tiles.LANES)
"""


@pytest.mark.skipif(LANES == 8, reason="this processor's vectors are the narrow ones: all other tests are about them")
def test_narrower_vectors_than_the_processors_give_the_references_scores():
    narrow = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse4.2,+bmi,+bmi2"}
    found = subprocess.run([sys.executable, "-c", NARROW], env=os.environ | narrow, capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "8"), found.stderr


# the tiles against plain loops


def numbers(count, seed):
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def called(tile, *args):
    numba.njit(lambda *args: tile(*args))(*args)


@pytest.mark.parametrize(("rows", "vectors"), [(4, 3), (1, 1), (2, 2)])
def test_panel_tiles_equal_plain_loops(rows, vectors):
    width = vectors * LANES
    x, w, h, listed = numbers(400, 0), numbers(40 * width, 1), numbers(11 * width, 2), np.array([9, 5, 0, 3, 2])
    expected = h.astype(float)
    for row in listed[1 : 1 + rows]:
        for j in range(width):
            products = (float(x[row * 33 + 5 + k]) * float(w[3 + k * (width + 5) + j]) for k in range(24))
            expected[row * (width + 3) + 2 + j] += sum(products)
    called(panel_tile(rows, vectors), x, 33, 5, listed, 1, w, width + 5, 3, 24, h, width + 3, 2)
    np.testing.assert_allclose(h, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "neurons", "unroll"), [(3, 4, 1), (1, 1, 2), (2, 2, 1), (1, 8, 1)])
def test_dot_tiles_equal_plain_loops(rows, neurons, unroll):
    size = 2 * unroll * LANES
    x, w, h, listed = numbers(10 * size + 90, 0), numbers(12 * size + 90, 1), numbers(120, 2), np.array([9, 5, 0, 3, 2])
    expected = h.astype(float)
    for row in listed[1 : 1 + rows]:
        for j in range(neurons):
            given, weights = x[row * (size + 3) + 5 :][:size], w[3 + j * (size + 4) :][:size]
            expected[row * 11 + 2 + j] += given.astype(float) @ weights.astype(float)
    called(dot_tile(rows, neurons, unroll), x, size + 3, 5, listed, 1, w, size + 4, 3, size, h, 11, 2, 10**6)
    np.testing.assert_allclose(h, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("vectors", "unroll"), [(2, 4), (7, 1)])
def test_spread_tiles_equal_plain_loops(vectors, unroll):
    w, h, value, width = numbers(1000, 0), numbers(140, 1), numbers(14, 2), vectors * LANES
    index, expected = np.array([9, 0, 3, 3, 1, 5, 2, 4, 0, 6, 1, 7]), h.astype(float)
    index = np.concatenate([index, np.zeros(AHEAD, int)])
    for t in range(8):
        for j in range(width):
            expected[5 + j] += float(value[4 + t]) * float(w[3 + index[2 + t] * 59 + j])
    called(spread_tile(vectors, unroll), index, 2, value, 4, 8, w, 59, 3, h, 5)
    np.testing.assert_allclose(h, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["scaled", "rectified", "cleared"])
def test_row_tiles_equal_plain_expressions(kind):
    to, a, b, size = numbers(50, 0), numbers(50, 1), numbers(50, 2), LANES + 3
    before, own = to.copy(), slice(3, 3 + 2 * LANES)  # so many numbers take two vectors
    given, added = a[5 : 5 + 2 * LANES], b[7 : 7 + 2 * LANES]
    wanted = {"scaled": given * 2, "rectified": np.maximum(given + added, 0) * 2, "cleared": given * 0}[kind]
    called(row_tile(kind), to, 3, a, 5, b, 7, np.float32(2), size)
    np.testing.assert_array_equal(to[own], wanted)
    to[own] = before[own]
    np.testing.assert_array_equal(to, before)


def test_a_rectified_row_keeps_what_is_no_number():
    to, a, b = np.zeros(LANES, np.float32), np.full(LANES, np.nan, np.float32), np.zeros(LANES, np.float32)
    called(row_tile("rectified"), to, 0, a, 0, b, 0, np.float32(1), LANES)
    assert np.isnan(to).all()


# timing


def test_every_call_is_timed_in_every_repeat_on_the_inputs_in_turn():
    seen = {"one": set(), "other": set()}
    calls = {name: lambda x, own=own: own.add(x[0, 0]) for name, own in seen.items()}
    found = timing.interleaved(calls, [np.full((1, 2), number) for number in range(3)], 4)
    assert list(found) == list(calls)
    assert all((times.dtype, times.shape) == (float, (4,)) and (times > 0).all() for times in found.values())
    assert all(own == {0, 1, 2} for own in seen.values())


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_dense_engines_give_the_models_scores(activation):
    model, x = MLP(16, (9, 7), 5, activation, seeded()), inputs(6)
    names = ["eager", *(["onnxruntime"] if importlib.util.find_spec("onnxruntime") else [])]
    found, skipped = timing.dense_engines(model, 1, names)
    assert (list(found), skipped) == (names, {})
    for engine in found.values():
        for count in (6, 1):
            assert_close(torch.from_numpy(engine(x[:count].numpy())), model(x[:count]).detach())


def test_engines_that_are_not_to_be_had_are_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found, skipped = timing.dense_engines(MLP(16, (9,), 5), 1)
    assert list(found) == ["eager"]
    assert skipped == {
        "compiled": "torch.compile needs a C++ compiler, and there is none",
        "onnxruntime": "the packages onnx and onnxruntime are not installed",
    }


def test_a_machine_has_positive_figures():
    found = dataclasses.asdict(timing.machine(1 << 16, repeats=2))
    assert all(math.isfinite(figure) and figure > 0 for figure in found.values())


# bad input, and no cache


def refused(said, call, *args):
    with pytest.raises(UsageError, match=f"^{re.escape(said)}") as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def test_inputs_and_masks_of_other_shapes_are_refused():
    fast, x = compile(lazy_network()), inputs(3)
    refused("inputs must be examples x 16 features, not 3 x 15", fast, x[:, 1:])
    refused("inputs must be examples x 16 features, not 16", fast, x[0])
    refused("inputs must be examples x 16 features, not 1 x 3 x 16", fast.evaluate, x[None].numpy())
    refused("the mask of 3 examples must be 3 x 4, not 3 x 5", fast.evaluate, x, np.ones((3, 5), bool))
    refused("the mask of 3 examples must be 3 x 4, not 1 x 4", fast.evaluate, x, torch.ones(1, 4))


def test_what_cannot_be_compiled_is_refused():
    lazy, drawn = lazy_network(), Sample(seeded())
    oracle = LazyNetwork(lazy.target, lazy.partition, Oracle(lazy.target, lazy.partition), lazy.decision)
    refused("unknown batch 'all'; known: one, per-example, shared", compile, lazy, "all")
    refused("unknown dtype 'float16'; known: bfloat16, float32, int8", compile, lazy, "one", 1, "float16")
    for threads in (0, 1.5, -1):
        refused(f"threads must be a whole number of at least 1, not {threads}", compile, lazy, "one", threads)
    for batch, decision in (("one", drawn), ("shared", Shared(drawn))):
        said = "a compiled network decides by Threshold or Budget, not by Sample"
        refused(said, compile, decided_by(lazy, decision), batch)
    said = 'a Shared decision goes with batch="shared", not with "one"'
    refused(said, compile, decided_by(lazy, Shared(lazy.decision)), "one")
    refused("only a Policy can be compiled, not a", compile, oracle)


def test_where_numba_cannot_write_its_cache_kernels_are_compiled_all_the_same(monkeypatch):
    plain = numba.njit

    def njit(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function")
        return plain(**options)

    monkeypatch.setattr(numba, "njit", njit)
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        assert products.kept(cpu._run, "run").py_func is cpu._run


# where deciding by itself would differ from the reference


@every_batch
def test_an_always_on_group_is_evaluated_whatever_mask_is_given(batch):
    lazy, x, mask = lazy_network(always_on=True), inputs(6), torch.zeros(6, 4, dtype=torch.bool)
    scores, found = compile(lazy, batch).evaluate(x, mask)
    expected = under(lazy, x, mask)
    assert_close(scores, expected.scores)
    assert torch.equal(found, expected.mask)


@pytest.mark.parametrize(
    "decision",
    [Threshold((0.0,)), Budget((2,)), Threshold((-math.inf, 0.0, 0.0)), Budget((4, 1, 1))],
    ids=["threshold", "budget", "everything first", "everything first by budget"],
)
def test_an_input_that_is_no_number_gives_scores_that_are_none(decision):
    own = decision.levels if isinstance(decision, Threshold) else decision.counts
    lazy, x = lazy_network("layer" if len(own) > 1 else "network", decision), inputs(6)
    x[0, 3] = math.nan
    assert torch.equal(compile(lazy)(x).isnan(), lazy(x).isnan())


@pytest.mark.parametrize("always_on", [False, True])
@either_scope
def test_limits_of_the_probabilities_hold_for_compiled_policies(scope, always_on):
    lazy, x = lazy_network(scope, always_on=always_on), inputs(30)
    lazy.policy.limits = (-0.5, 0.7)
    gates = len(lazy.policy.gates)
    for level in lazy.policy.limits:  # none is above the most, and those that were below the least are not above it
        limited = decided_by(lazy, Threshold((level,) * gates))
        assert torch.equal(compile(limited).evaluate(x)[1], limited.evaluate(x).mask)
    shared = decided_by(lazy, Shared(Threshold((0.0,) * gates)))
    assert torch.equal(compile(shared, "shared").evaluate(x)[1], shared.evaluate(x).mask)


def test_a_budget_of_all_its_groups_sets_no_bit_that_a_gate_does_not_need():
    partition = cut_into_blocks((12, 4), 2)
    lazy = lazy_network("layer", Budget((3, 2)), hidden=(12, 4), partition=partition)
    assert torch.equal(compile(lazy).evaluate(inputs(6))[1], lazy.evaluate(inputs(6)).mask)


@pytest.mark.parametrize("count", [0, 5])
def test_a_budget_that_the_reference_refuses_is_refused(count):
    lazy = lazy_network(decision=Budget((count,)))
    for call in (lazy, lambda x: compile(lazy)(x)):
        with pytest.raises(UsageError, match=f"1 to 4 groups, not .*{count}"):
            call(inputs(1))
