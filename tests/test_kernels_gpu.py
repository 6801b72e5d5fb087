"""The GPU engine against the reference evaluation: on a GPU where there is one, else in Triton's interpreter."""

import math
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from condcomp_lib.errors import UsageError
from condcomp_lib.kernels import gpu
from condcomp_lib.kernels.gpu import GpuLazy, compile_for_gpu
from condcomp_lib.lazy import LazyNetwork, compensated, decided_by
from condcomp_lib.oracle import Oracle
from condcomp_lib.partitions import SCOPES, Partition, make_partition
from condcomp_lib.policies import Budget, Given, Policy, Pool, Sample, Shared, Threshold
from condcomp_lib.targets import MLP

DEVICE, INTERPRET = ("cuda", "0") if torch.cuda.is_available() else ("cpu", "1")
if DEVICE == "cpu" and "triton" in sys.modules:
    pytest.skip("Triton was imported without its interpreter before this file", allow_module_level=True)
with mock.patch.dict(os.environ, TRITON_INTERPRET=INTERPRET):  # Triton reads it once, when it is imported
    pytest.importorskip("triton", reason="Triton, which the GPU engine is written in, is not installed")

either_scope = pytest.mark.parametrize("scope", SCOPES)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", INTERPRET)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(count, width=37, seed=1):
    return torch.randn(count, width, generator=seeded(seed))


def lazy_network(scope="network", decision=None, width=37, hidden=(33, 24), activation="relu", pool=None,
                 rescale="none", always_on=False, filled=False, partition=None, groups=4):  # fmt: skip
    """An untrained network whose logits and scores vary much by example; a partition of uneven groups."""
    target = MLP(width, hidden, 5, activation, seeded(1))
    partition = partition or make_partition("random", hidden, groups, seeded(2), scope)
    policy = Policy(partition, width, pool, seeded(3), always_on)
    with torch.no_grad():
        for layer, factor in [(layer, 2) for layer in target.linears] + [(gate, 8) for gate in policy.gates]:
            layer.weight.mul_(factor)
    lazy = LazyNetwork(target, partition, policy, decision or Threshold((0.0,) * len(policy.gates)), rescale)
    return compensated(lazy, inputs(30, width, 7)) if filled else lazy


@torch.no_grad()
def assert_scores(lazy, x, mask, scores):
    """The scores are the reference's under the same mask, and the mask, where it is not given, what was decided."""
    expected = lazy.evaluate(x, None, Given(mask.cpu())).scores
    assert (scores.dtype, scores.shape, scores.device.type) == (torch.float32, expected.shape, DEVICE)
    assert (scores.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def assert_same(lazy, batch="per-example", counts=(1, 5)):
    """Scores and masks of batches of some sizes are the reference's."""
    fast = compile_for_gpu(lazy, batch, DEVICE)
    if batch == "shared" and not isinstance(lazy.decision, Shared):
        lazy = decided_by(lazy, Shared(lazy.decision))
    for count in counts:
        x = inputs(count, lazy.target.linears[0].in_features, seed=count)
        scores, mask = fast.evaluate(x)
        assert (mask.dtype, mask.device.type) == (torch.bool, DEVICE)
        assert torch.equal(mask.cpu(), lazy.evaluate(x).mask)  # no logit of these lies at an edge
        assert_scores(lazy, x, mask, scores)
    return fast


@either_scope
@pytest.mark.parametrize("budget", [False, True])
def test_scores_and_masks_are_the_references(scope, budget):
    activation = "tanh" if budget == (scope == "layer") else "relu"
    gates = 3 if scope == "layer" else 1
    decision = Budget((2, 1, 3)[:gates]) if budget else Threshold((0.0, -0.3, 0.2)[:gates])
    assert_same(lazy_network(scope, decision, 70, (33, 17, 24), activation), counts=(5, 40))


@either_scope
@pytest.mark.parametrize(("rescale", "filled"), [("activity", False), ("none", True), ("activity", True),
                                                 ("sigma", False)])  # fmt: skip
def test_rescaled_and_filled_networks(scope, rescale, filled):
    assert_same(lazy_network(scope, rescale=rescale, filled=filled, activation="tanh"), counts=(7,))


@either_scope
def test_pooled_policies_and_an_always_on_group(scope):
    pool = Pool((3, 4, 4), 2)
    assert_same(lazy_network(scope, None, 48, pool=pool, always_on=True), counts=(20,))
    assert_same(lazy_network(scope, Budget((2,) * (2 if scope == "layer" else 1)), 48, pool=pool, always_on=True,
                             filled=True), counts=(7,))  # fmt: skip


@either_scope
@pytest.mark.parametrize("marked", [False, True])
def test_shared_masks(scope, marked):
    decision = Budget((2, 1)[: 2 if scope == "layer" else 1])
    fast = assert_same(lazy_network(scope, Shared(decision) if marked else decision, rescale="activity"), "shared")
    assert (fast.evaluate(inputs(9))[1] == fast.evaluate(inputs(9))[1][:1]).all()


@either_scope
def test_empty_groups_and_single_neurons(scope):
    members = tuple(torch.randint(2, 5, (n,), generator=seeded(n)) for n in (20, 40))
    assert_same(lazy_network(scope, width=20, hidden=(20, 40), partition=Partition(members, 5, scope)), counts=(9,))
    alone = Partition((torch.arange(17), torch.arange(17)), 17, scope)
    assert_same(lazy_network(scope, hidden=(17, 17), partition=alone), counts=(1,))


def test_one_group_and_more_than_a_program_flags(monkeypatch):
    assert_same(lazy_network(groups=1), counts=(20,))
    monkeypatch.setattr(gpu, "FLAGS", 2)
    assert_same(lazy_network(groups=5), counts=(20,))


@either_scope
@pytest.mark.parametrize("level", [-math.inf, math.inf])
@pytest.mark.parametrize("filled", [False, True])
def test_everything_on_and_everything_off(scope, level, filled):
    lazy = lazy_network(scope, filled=filled, rescale="activity")
    decision = Threshold((level,) * len(lazy.policy.gates))
    fast = assert_same(decided_by(lazy, decision), counts=(5,))
    assert (fast.evaluate(inputs(5))[1] == (level < 0)).all()


@either_scope
@pytest.mark.parametrize("filled", [False, True])
def test_given_masks(scope, filled):
    lazy = lazy_network(scope, filled=filled, rescale="activity", hidden=(40, 17, 20))
    fast = compile_for_gpu(lazy, device=DEVICE)
    given = torch.rand(40, lazy.policy.bits, generator=seeded(5)) < 0.4
    for kind, count in ((given, 40), (given.float(), 1), (given.numpy(), 2)):
        scores, mask = fast.evaluate(inputs(count), kind[:count])
        assert torch.equal(mask.cpu(), given[:count])
        assert_scores(lazy, inputs(count), given[:count], scores)


def test_what_no_example_asks_for_is_not_read():
    lazy = lazy_network("layer")
    fast = compile_for_gpu(lazy, device=DEVICE)
    given = torch.rand(20, 8, generator=seeded(5)) < 0.6
    given[:, 4:] = True
    given[:, [2, 4 + 1]] = False  # group 2 of the first layer, group 1 of the second
    given[:, 3] = torch.arange(20) >= 16  # the first tile of examples skips what the second one needs
    first, second = fast._layers
    with torch.no_grad():
        first.weights[:, first.groups == 2] = math.nan  # its neurons
        second.weights[first.groups == 2] = math.nan  # what they would be multiplied with
        second.weights[:, second.groups == 1] = math.nan
    assert_scores(lazy, inputs(20), given, fast.evaluate(inputs(20), given)[0])


def test_large_batches_take_larger_tiles():
    lazy = lazy_network("layer", hidden=(17, 20))
    assert_same(lazy, counts=(129,))


@either_scope
def test_nothing_waits_for_a_number_of_the_device(scope):
    # What a CUDA graph needs. Tensors without numbers refuse whatever would read one, or have a shape that hangs on it.
    count, kernel = 20, mock.MagicMock()
    for decision in (Threshold((0.0, 0.0)), Budget((2, 1))):
        lazy = lazy_network(scope, decision, rescale="activity", always_on=True, filled=True)
        for shared, given in [(False, False), (True, False), (False, True)]:
            fast = GpuLazy(lazy, shared, torch.device("meta"), (kernel, kernel))
            mask = torch.zeros(count, lazy.policy.bits, dtype=torch.bool, device="meta") if given else None
            with torch.no_grad():
                scores, mask = fast._computed(torch.zeros(count, 64, device="meta"), mask)
            assert (scores.shape, mask.shape) == ((count, 5), (count, lazy.policy.bits))


COMPILED = """
import sys
import condcomp_lib.kernels
assert "condcomp_lib.kernels.gpu" not in sys.modules  # imported only where a GPU is asked for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from condcomp_lib.kernels import gpu
types = {"lists": "*i64", "counts": "*i64", "flags": "*u8", "below": "*u8", "starts": "*i32", "owners": "*i32",
         **dict.fromkeys(["x_row", "h_row", "list_row", "groups_below"], "i32")}
for kernel in gpu._kernels():
    fixed = dict(ROWS=64, TILE=32, STEP=32, FLAGS=32, SKIPS=True, TANH=True, RESCALED=True, FILLED=True)
    names = {name: place for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in names},
                       {(names[name],): value for name, value in fixed.items() if name in names})
    text = compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": True}).asm["ptx"]
    assert "tf32" not in text and ("fma.rn.f32" in text) == ("TILE" in names)
"""


def test_the_kernels_compile_for_a_gpu_in_full_precision(tmp_path):
    # The interpreter takes more of Python than the compiler does, which needs no GPU.
    own = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", COMPILED], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inputs_of_other_kinds_and_calls_in_turn():
    lazy = lazy_network()
    fast = compile_for_gpu(lazy, device=DEVICE)
    first = fast(inputs(5))
    kept = first.clone()
    second = fast(inputs(5, seed=2))
    assert torch.equal(first, kept)  # what was returned is not written again
    assert torch.equal(fast(inputs(5, seed=2).double().numpy()), second)
    assert torch.equal(fast.evaluate(inputs(5, seed=2).requires_grad_())[0], second)
    assert not second.requires_grad
    scores, mask = fast.evaluate(inputs(0))
    assert (scores.shape, mask.shape, mask.dtype) == ((0, 5), (0, 4), torch.bool)


def test_it_is_a_copy():
    lazy = lazy_network("layer", filled=True)
    fast, before = compile_for_gpu(lazy, device=DEVICE), lazy(inputs(5)).detach()
    with torch.no_grad():
        for parameter in lazy.parameters():
            parameter.zero_()
    assert (fast(inputs(5)).cpu() - before).abs().max() <= 1e-4 * before.abs().max()


def test_wrong_shapes_are_refused():
    fast = compile_for_gpu(lazy_network(), device=DEVICE)
    with pytest.raises(UsageError, match="inputs must be examples x 37 features, not 2 x 36"):
        fast(inputs(2, 36))
    with pytest.raises(UsageError, match="the mask of 2 examples must be 2 x 4, not 2 x 3"):
        fast.evaluate(inputs(2), np.ones((2, 3)))


def test_what_cannot_be_compiled_is_refused():
    lazy = lazy_network()
    with pytest.raises(UsageError, match="unknown batch 'one'; known: per-example, shared"):
        compile_for_gpu(lazy, "one", DEVICE)
    with pytest.raises(UsageError, match="decides by Threshold or Budget, not by Sample"):
        compile_for_gpu(decided_by(lazy, Sample(seeded())), device=DEVICE)
    with pytest.raises(UsageError, match='a Shared decision goes with batch="shared", not with "per-example"'):
        compile_for_gpu(decided_by(lazy, Shared(lazy.decision)), device=DEVICE)
    oracle = LazyNetwork(lazy.target, lazy.partition, Oracle(lazy.target, lazy.partition), lazy.decision)
    with pytest.raises(UsageError, match="only a Policy can be compiled, not a Oracle"):
        compile_for_gpu(oracle, device=DEVICE)


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UsageError, match="the GPU engine needs the package triton, which is not installed"):
        compile_for_gpu(lazy_network(), device=DEVICE)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = "no GPU is to be had: torch.cuda.is_available\\(\\) is false; compile for the CPU instead"
    with pytest.raises(UsageError, match=message):
        compile_for_gpu(lazy_network())
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UsageError, match=message):
        compile_for_gpu(lazy_network(), device="cpu")
