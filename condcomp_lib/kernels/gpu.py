"""Compiled lazy networks for a GPU: grouped products over the examples that want a group, in Triton.

Imported only where a GPU is asked for; Triton is imported when the first network is compiled.
"""

import copy
import functools
import importlib
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.kernels.pack import checked
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.policies import Policy, Shared

BATCHES = ("per-example", "shared")
TILES = (32, 16)  # neurons of a group that one program computes, where groups are large and where they are small
FLAGS = 32  # groups below whose flags one program sets

tl: Any = None  # triton.language, once a network is compiled: the kernels find it here


class _Layer(NamedTuple):
    """A hidden layer on the device: neurons in the order of their groups, each group padded to whole tiles with neurons
    whose numbers are all zero.

    `tile` neurons of a tile; `neurons` without padding, and by group `sizes` (float32, groups); `groups` (int64,
    padded) of the neurons; `starts` (int32, groups + 1) of the groups; `owners` (int32, tiles) their groups; `weights`
    (float32, padded below x padded), `bias` with all below filled in, and `fill` (float32, padded).
    """

    tile: int
    neurons: int
    sizes: Tensor
    groups: Tensor
    starts: Tensor
    owners: Tensor
    weights: Tensor
    bias: Tensor
    fill: Tensor


class _Captured(NamedTuple):
    """The evaluation of a batch of one size: `x` (float32, examples x padded inputs) and `given` (bool, examples x
    bits, or None) are written before `graph` is replayed, `scores` and `mask` read after."""

    x: Tensor
    given: Tensor | None
    graph: torch.cuda.CUDAGraph
    scores: Tensor
    mask: Tensor


@functools.cache
def _flag_groups(triton: Any) -> Any:
    """The kernel that finds, for a tile of listed examples, whether any evaluates each of FLAGS groups below (`below`
    uint8, examples x groups below). Program: (tile of the list, block of groups below, group)."""

    @triton.jit
    def flag_groups(  # type: ignore[no-untyped-def]
        lists, counts, below, flags, list_row, groups_below, ROWS: tl.constexpr, FLAGS: tl.constexpr
    ):
        part, block, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        slots = part * ROWS + tl.arange(0, ROWS)
        listed = slots < tl.load(counts + group)
        rows = tl.load(lists + group * list_row + slots, mask=listed, other=0)
        groups = block * FLAGS + tl.arange(0, FLAGS)
        known = groups < groups_below
        places = below + rows[:, None] * groups_below + groups[None, :]
        found = tl.max(tl.load(places, mask=listed[:, None] & known[None, :], other=0).to(tl.int32), axis=0)
        tl.store(flags + (group * tl.num_programs(0) + part) * groups_below + groups, found.to(tl.uint8), mask=known)

    return flag_groups


@functools.cache
def _hidden_units(triton: Any) -> Any:
    """The kernel that computes TILE neurons of one group for ROWS of the examples that want it. Program: (tile of the
    list, tile of neurons). Groups below that none of these examples evaluates are skipped (`flags`); the numbers of
    those that only others of them evaluate are zero in `x`. Rows of `h` that are not listed stay as they are."""

    @triton.jit
    def hidden_units(  # type: ignore[no-untyped-def]
        x, weights, bias, fill, factors, lists, counts, flags, starts, owners, h, x_row, h_row, list_row, groups_below,
        ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, SKIPS: tl.constexpr, TANH: tl.constexpr,
        RESCALED: tl.constexpr, FILLED: tl.constexpr,
    ):  # fmt: skip
        part, tile = tl.program_id(0), tl.program_id(1)
        group = tl.load(owners + tile)
        count = tl.load(counts + group)
        if part * ROWS >= count:
            return
        slots, neurons, steps = part * ROWS + tl.arange(0, ROWS), tile * TILE + tl.arange(0, TILE), tl.arange(0, STEP)
        rows = tl.load(lists + group * list_row + slots, mask=slots < count, other=0)
        total = tl.zeros((ROWS, TILE), tl.float32)
        for below in range(groups_below):
            first, last = tl.load(starts + below), tl.load(starts + below + 1)
            if SKIPS:
                wanted = tl.load(flags + (group * tl.num_programs(0) + part) * groups_below + below)
                last = tl.where(wanted != 0, last, first)
            for k in range(first, last, STEP):
                values = tl.load(x + rows[:, None] * x_row + (k + steps)[None, :])
                block = tl.load(weights + (k + steps)[:, None] * h_row + neurons[None, :])
                total = tl.dot(values, block, total, input_precision="ieee")
        total += tl.load(bias + neurons)[None, :]
        active = 2 * tl.sigmoid(2 * total) - 1 if TANH else tl.maximum(total, 0.0)
        if RESCALED:
            active *= tl.load(factors + rows)[:, None]
        if FILLED:
            active -= tl.load(fill + neurons)[None, :]
        tl.store(h + rows[:, None] * h_row + neurons[None, :], active, mask=(slots < count)[:, None])

    return hidden_units


class GpuLazy:
    """A lazy network that `compile_for_gpu` has put on a GPU: the same scores, computed only where its masks ask.

    Called with inputs it returns their scores on the device; `evaluate` returns the masks, too. It is a copy: what is
    trained later does not reach it. Each size of a batch is captured in a CUDA graph at its first call, which is kept
    together with the memory it works in: call it with few sizes. One thread at a time may use it.
    """

    def __init__(self, lazy: LazyNetwork, shared: bool, device: torch.device, kernels: tuple[Any, Any]) -> None:
        self.device, self.inputs, self._groups = device, lazy.mlp.linears[0].in_features, lazy.partition.groups
        self._flag_groups, self._hidden_units = kernels
        self._tanh, self._rescaled = isinstance(lazy.target.activation, nn.Tanh), lazy.rescale == "activity"
        self._filled = lazy.fill is not None
        self._decision = Shared(lazy.decision) if shared else lazy.decision
        self._padded = -(-self.inputs // TILES[0]) * TILES[0]
        self._input = torch.tensor([0, self._padded], dtype=torch.int32, device=device)
        self._layers, self._policy, self._weights, self._bias = _placed(lazy, self._padded, device)
        self._captured: dict[tuple[int, bool], _Captured] = {}

    def __call__(self, x: Any) -> Tensor:
        """Scores (float32, examples x classes, on the device) of inputs `x` (examples x features; a tensor on any
        device, or an array)."""
        return self.evaluate(x)[0]

    @torch.no_grad()
    def evaluate(self, x: Any, mask: Any = None) -> tuple[Tensor, Tensor]:
        """Scores, and the mask (bool, examples x bits, on the device) that was decided; with `mask` given, that one is
        evaluated and the policy, evaluated all the same, is not followed.

        Raises UsageError where shapes do not fit.
        """
        x, bits = x if isinstance(x, Tensor) else torch.tensor(x), self._policy.bits
        if x.ndim != 2 or x.shape[1] != self.inputs:
            raise UsageError(f"inputs must be examples x {self.inputs} features, not {' x '.join(map(str, x.shape))}")
        if mask is not None and tuple(mask.shape) != (len(x), bits):
            raise UsageError(f"the mask of {len(x)} examples must be {len(x)} x {bits}, not "
                             f"{' x '.join(map(str, mask.shape))}")  # fmt: skip
        given = None if mask is None else (mask if isinstance(mask, Tensor) else torch.tensor(mask)) != 0
        if given is not None and self._policy.always_on:
            given[:, :: self._groups] = True
        if not len(x):
            return torch.empty(0, len(self._bias), device=self.device), torch.empty(0, bits, device=self.device).bool()
        if self.device.type != "cuda" or _interpreted():
            padded = nn.functional.pad(x.to(self.device, torch.float32), (0, self._padded - self.inputs))
            return self._computed(padded, None if given is None else given.to(self.device))
        with torch.cuda.device(self.device):
            key = len(x), given is not None
            held = self._captured[key] = self._captured.get(key) or self._capture(*key)
            held.x[:, : self.inputs].copy_(x)
            if held.given is not None and given is not None:
                held.given.copy_(given)
            held.graph.replay()
            return held.scores.clone(), held.mask.clone()

    def _capture(self, n: int, known: bool) -> _Captured:
        """The evaluation of `n` examples, with or without a given mask, as a CUDA graph."""
        x = torch.zeros(n, self._padded, device=self.device)
        given = torch.zeros(n, self._policy.bits, dtype=torch.bool, device=self.device) if known else None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and libraries take their memory before the capture
            self._computed(x, given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scores, mask = self._computed(x, given)
        return _Captured(x, given, graph, scores, mask)

    def _computed(self, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores and mask of padded inputs. The host never waits for a number of the device, nor do shapes depend on
        one: that is what a CUDA graph asks for."""
        rows = 16 if len(x) <= 32 else 32 if len(x) <= 128 else 64
        gates, groups, h, masks = len(self._policy.gates), self._groups, x, list[Tensor]()
        for index in range(len(self._layers)):
            if index < gates:
                bits = self._decided(index, h, masks)
                masks.append(bits if given is None else given[:, index * groups : (index + 1) * groups].contiguous())
                lists, counts = _listed(masks[-1])
            if index == 0:
                flags = counts  # not read
            elif index == 1 or index < gates:  # with one mask for all layers, the flags of the second serve all above
                flags = self._flagged(lists, counts, masks[min(index, gates) - 1], rows)
            h = self._activations(index, h, masks[-1], lists, counts, flags, rows)
        return torch.addmm(self._bias, h, self._weights), torch.cat(masks, 1)

    def _decided(self, index: int, h: Tensor, masks: list[Tensor]) -> Tensor:
        """The bits (bool, examples x groups) of a gate, which reads the padded inputs or the stored activations of the
        layer below, with the fill that they lack where they were evaluated (the last of `masks`)."""
        if index == 0:
            h = h[:, : self.inputs]
        elif self._filled:
            h = h + self._layers[index - 1].fill * masks[-1][:, self._layers[index - 1].groups]
        bits = self._decision(self._policy.logits(index, h), index)
        if self._policy.always_on:
            bits = torch.cat([torch.ones_like(bits[:, :1]), bits[:, 1:]], 1)
        return bits.contiguous()

    def _flagged(self, lists: Tensor, counts: Tensor, below: Tensor, rows: int) -> Tensor:
        """For each tile of `rows` listed examples, whether any evaluates a group below (uint8, groups x tiles x groups
        below); `below` (bool, examples x groups below)."""
        n, groups = below.shape
        flags = torch.empty(groups, -(-n // rows), groups, dtype=torch.uint8, device=self.device)
        self._flag_groups[flags.shape[1], -(-groups // FLAGS), groups](
            lists, counts, below.view(torch.uint8), flags, n + 1, groups, rows, FLAGS, enable_fp_fusion=True
        )
        return flags

    def _activations(
        self, index: int, h: Tensor, bits: Tensor, lists: Tensor, counts: Tensor, flags: Tensor, rows: int
    ) -> Tensor:
        """What the layer above reads (float32, examples x padded): activations as rescaled, less their fill, and zero
        where they are not evaluated."""
        layer, below = self._layers[index], self._layers[index - 1] if index else None
        out, factors = torch.zeros(len(h), len(layer.bias), device=self.device), layer.bias  # the latter is not read
        if self._rescaled:
            factors = 1 / (bits.float() @ layer.sizes / layer.neurons).clamp(min=1 / layer.neurons)
        starts, step = (below.starts, below.tile) if below else (self._input, TILES[0])
        self._hidden_units[-(-len(h) // rows), len(layer.owners)](
            h, layer.weights, layer.bias, layer.fill, factors, lists, counts, flags, starts, layer.owners, out,
            h.shape[1], out.shape[1], len(h) + 1, len(starts) - 1, rows, layer.tile, step,
            index > 0, self._tanh, self._rescaled, self._filled, enable_fp_fusion=True,
        )  # fmt: skip
        return out


def _listed(bits: Tensor) -> tuple[Tensor, Tensor]:
    """For bits (bool, examples x groups) the examples that want each group (int64, groups x (examples + 1)), of which
    the first so many count (int64, groups)."""
    n, groups = bits.shape
    places = bits.T.cumsum(1)
    slots = torch.where(bits.T, places - 1, n)  # who does not want the group is written behind its list
    lists = torch.zeros(groups, n + 1, dtype=torch.int64, device=bits.device)
    lists.scatter_(1, slots, torch.arange(n, device=bits.device).expand(groups, n))
    return lists, places[:, -1].contiguous()


def _inward(lazy: LazyNetwork, index: int) -> tuple[Tensor, Tensor]:
    """A weight layer's matrix (float32, below x neurons) and its bias, into which all below is filled."""
    linear = lazy.target.linears[index]
    if lazy.fill is None or index == 0:
        return linear.weight.T, linear.bias
    return linear.weight.T, linear.bias + linear.weight @ lazy.fill[index - 1]


def _spread(numbers: Tensor, places: Tensor, width: int) -> Tensor:
    """Numbers of a layer's neurons (neurons, or neurons x any) at their places among `width`, zeros between."""
    return numbers.new_zeros(width, *numbers.shape[1:]).index_copy_(0, places, numbers)


def _layer(
    lazy: LazyNetwork, index: int, below: tuple[Tensor, int], device: torch.device
) -> tuple[_Layer, tuple[Tensor, int]]:
    """A hidden layer, and where its neurons stand in it: their places (int64, on the CPU) and how many places there
    are; `below` is that of what it reads."""
    membership, groups = lazy.partition.membership[index], lazy.partition.groups
    sizes = torch.bincount(membership, minlength=groups)
    tile = TILES[0] if len(membership) >= TILES[0] * int((sizes > 0).sum()) else TILES[1]
    tiles = -(-sizes // tile)
    starts = nn.functional.pad((tiles * tile).cumsum(0), (1, 0))
    order, owners = torch.argsort(membership, stable=True), torch.arange(groups).repeat_interleave(tiles)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order)) + (starts[:-1] - sizes.cumsum(0) + sizes)[membership[order]]
    own, (weights, bias) = (places, int(starts[-1])), _inward(lazy, index)
    fill = torch.zeros_like(bias) if lazy.fill is None else lazy.fill[index]
    weights = _spread(_spread(weights, *below).T, *own).T.contiguous()
    parts = (sizes.float(), owners.repeat_interleave(tile), starts.int(), owners.int(), weights,
             _spread(bias, *own), _spread(fill, *own))  # fmt: skip
    return _Layer(tile, len(membership), *(part.to(device) for part in parts)), own


@torch.no_grad()
def _placed(lazy: LazyNetwork, padded: int, device: torch.device) -> tuple[list[_Layer], Policy, Tensor, Tensor]:
    """Copies on the device: the hidden layers, the first of which reads `padded` inputs, the policy as it reads them,
    and the weights and bias of the output layer."""
    layers: list[_Layer] = []
    policy, below = copy.deepcopy(lazy.policy), (torch.arange(lazy.target.linears[0].in_features), padded)
    for index in range(len(lazy.partition.membership)):
        if 0 < index < len(policy.gates):
            gate = policy.gates[index]
            gate.weight = nn.Parameter(_spread(gate.weight.T, *below).T.contiguous())
        layer, below = _layer(lazy, index, below, device)
        layers.append(layer)
    weights, bias = _inward(lazy, len(layers))
    return layers, policy.to(device), _spread(weights, *below).to(device), bias.clone().to(device)


def _interpreted() -> bool:
    """Whether Triton interprets its kernels, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> tuple[Any, Any]:
    """The two kernels, compiled where they are first called."""
    global tl
    try:
        triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    except ImportError as error:
        raise UsageError("the GPU engine needs the package triton, which is not installed") from error
    return _flag_groups(triton), _hidden_units(triton)


def compile_for_gpu(lazy: LazyNetwork, batch: str = "per-example", device: str = "cuda") -> GpuLazy:
    """The lazy network as one call on a GPU that computes only what each example's mask asks for, policy and decision
    included. Everything is float32. Nothing of the lazy network is changed. A group takes whole tiles of 16 or 32
    neurons a layer, so groups of a few neurons gain little.

    Arguments: `batch` "per-example", or "shared" under one mask for all examples of a call, decided from their mean
    logits; `device` a CUDA device of torch, or "cpu" where the environment says TRITON_INTERPRET=1 since before
    Triton's import, which is slow and meant for tests.

    Raises UsageError where there is no GPU, where Triton is not installed, for a decision that draws its bits, or for a
    policy that is none (an oracle).
    """
    if batch not in BATCHES:
        raise unknown("batch", batch, BATCHES)
    lazy = checked(lazy, batch)
    place = torch.device(device)
    if not (torch.cuda.is_available() if place.type == "cuda" else place.type == "cpu" and _interpreted()):
        raise UsageError("no GPU is to be had: torch.cuda.is_available() is false; compile for the CPU instead")
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())  # where a later call finds it, too
    return GpuLazy(lazy, batch == "shared", place, _kernels())
