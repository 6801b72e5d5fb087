"""Compiled lazy networks: skipped groups become saved time (*faster-models*, section 2.2, on an ordinary processor)."""

import copy
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from condcomp_lib.errors import UsageError, unknown
from condcomp_lib.kernels import convolutions, cpu, pack
from condcomp_lib.kernels.pack import Packed
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.targets import ConvNet

BATCHES = ("one", "per-example", "shared")
_FLOAT = np.dtype(np.float32)


class FastLazy(nn.Module):
    """A lazy network that `compile` has made fast: the same scores, in the time of what its masks ask for.

    Called with inputs it returns their scores, as the lazy network does; `evaluate` returns the masks, too. `lazy` is
    the reference that it was compiled from, a copy: what is trained later reaches neither. Several threads may use it
    at a time; each has its own room to work in, kept from call to call, so that only results are allocated. Pickled or
    copied, it is the reference, compiled again. As a module it has no parameters, no state and no hooks: its numbers
    are packed, in float32 on the processor. Scores are float32, or in half precision as their inputs, on their device.
    """

    kernel = staticmethod(cpu.run)

    def __init__(self, packed: Packed, batch: str, threads: int, lazy: LazyNetwork, dtype: str) -> None:
        super().__init__()
        self.lazy: LazyNetwork
        self.report: dict[str, Any] | None = None  # where it was converted from a user's network, see `conversion`
        self.packed, self.batch, self.threads, self.dtype = packed, batch, threads, dtype
        self.__dict__["lazy"] = lazy  # no part of the module: what is loaded or cast there would not reach the kernel
        self.inputs, self.classes = int(packed.meta[pack.INPUTS]), int(packed.meta[pack.CLASSES])
        self._most = {"one": 1, "per-example": cpu.ROWS, "shared": None}[batch]  # examples at a time
        self._rooms = threading.local()
        self._others = ThreadPoolExecutor(threads - 1, "condcomp") if threads > 1 else None

    def __reduce__(self) -> tuple[Any, ...]:
        return compile, (self.lazy, self.batch, self.threads, self.dtype), {"report": self.report}

    def forward(self, x: Any) -> Any:
        """Scores, as by a call."""
        return self(x)

    def __call__(self, x: Any) -> Any:  # not by way of nn.Module, whose hooks would take a tenth of a small call
        """Scores (float32, examples x classes) of inputs `x` (examples x features): a tensor for a tensor, an array for
        an array, which saves the two conversions. Of inputs with more dimensions the last one holds the features
        (tokens), or else all but the first together (images)."""
        if x.ndim != 2:
            return self._shaped(x)
        rows = self._rows(x)
        scores = np.empty((len(rows), self.classes), np.float32)
        if self.threads == 1:
            self._run(rows, scores)
        else:
            self._divided(rows, scores, np.empty((len(rows), self.packed.bits), np.uint8), known=False)
        return scores if x.__class__ is np.ndarray else _like(x, scores)

    def _shaped(self, x: Any) -> Any:
        shape = tuple(x.shape)
        if len(shape) > 2 and shape[-1] == self.inputs:
            return self(x.reshape(-1, self.inputs)).reshape(*shape[:-1], self.classes)
        if len(shape) > 2 and math.prod(shape[1:]) == self.inputs:
            return self(x.reshape(-1, self.inputs))
        raise UsageError(f"inputs must be examples x {self.inputs} features, not {' x '.join(map(str, shape))}")

    def evaluate(self, x: Any, mask: Any = None) -> tuple[Any, Any]:
        """Scores, and the mask (bool, examples x bits) that was decided; with `mask` given, that one is evaluated and
        the policy, evaluated all the same, is not followed."""
        rows = self._rows(x)
        scores = np.empty((len(rows), self.classes), np.float32)
        bits = np.empty((len(rows), self.packed.bits), np.uint8)
        if mask is not None:
            given = np.asarray(mask)
            if given.shape != bits.shape:
                raise UsageError(f"the mask of {len(rows)} examples must be {bits.shape[0]} x {bits.shape[1]}, not "
                                 f"{' x '.join(map(str, given.shape))}")  # fmt: skip
            bits[:] = given != 0
            if self.packed.meta[pack.ALWAYS_ON]:
                bits[:, :: self.packed.meta[pack.GROUPS]] = 1
        self._divided(rows, scores, bits, known=mask is not None)
        return _like(x, scores), _like(x, bits.astype(bool))

    def _rows(self, x: Any) -> np.ndarray:
        """The inputs as the kernel is compiled for: one writable block of float32 numbers."""
        if x.__class__ is not np.ndarray:
            x = x.detach().float().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
        if x.ndim != 2 or x.shape[1] != self.inputs:
            raise UsageError(f"inputs must be examples x {self.inputs} features, not {' x '.join(map(str, x.shape))}")
        found: np.ndarray = x if x.dtype == _FLOAT and x.flags.carray else np.array(x, _FLOAT, order="C")
        return found

    def _divided(self, rows: np.ndarray, scores: np.ndarray, bits: np.ndarray, known: bool) -> None:
        """Evaluate the examples, by several threads where there are; a shared mask is one job."""
        threads = 1 if self.batch == "shared" else max(1, min(self.threads, len(rows)))
        ends = [len(rows) * share // threads for share in range(threads + 1)]
        jobs = [(rows[a:b], scores[a:b], bits[a:b], known) for a, b in itertools.pairwise(ends)]
        others = [self._others.submit(self._run, *job) for job in jobs[1:]] if self._others else []
        self._run(*jobs[0])
        for other in others:
            other.result()

    def _run(self, rows: np.ndarray, scores: np.ndarray, bits: np.ndarray | None = None, known: bool = False) -> None:
        n, packed = len(rows), self.packed
        room = getattr(self._rooms, "room", None)
        if room is None or room[0] < n:
            room = self._room(n)
        step, own = (n or 1, True) if self._most is None else (self._most, False)
        self.kernel(rows, packed.weights, packed.floats, packed.meta, scores, room[1], room[2],
                room[3][:n] if bits is None else bits, known, step, own)  # fmt: skip

    def _space(self, n: int) -> tuple[int, int]:
        """The float32 and int64 numbers that the kernel needs to work on `n` examples at a time."""
        return cpu.room(self.packed, n)

    def _room(self, n: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """This thread's room for calls of up to `n` examples."""
        space, lists = self._space(n if self._most is None else min(n, self._most))
        bits = np.empty((n, self.packed.bits), np.uint8)
        self._rooms.room = n, pack.aligned(space, np.float32), pack.aligned(lists, np.int64), bits
        return self._rooms.room


class FastFilters(FastLazy):
    """A lazy conv net made fast; examples are evaluated one after the other."""

    kernel = staticmethod(convolutions.run)

    def _space(self, n: int) -> tuple[int, int]:  # noqa: ARG002 (one after the other)
        return convolutions.room(self.packed)


def _like(x: Any, found: np.ndarray) -> Any:
    """What was found as the inputs came: an array, or a tensor on their device; scores in their half precision."""
    if not isinstance(x, Tensor):
        return found
    tensor = torch.from_numpy(found)
    half = tensor.is_floating_point() and x.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(x.device, x.dtype if half else tensor.dtype)


def compile(lazy: LazyNetwork, batch: str = "per-example", threads: int = 1, dtype: str = "float32") -> FastLazy:
    """The lazy network as one call that computes only what each example's mask asks for, policy and decision included.

    Neurons are put in the order of their groups, so that a group is one contiguous panel of weights (above the first
    layer in two copies, by rows and by neurons). Nothing of the lazy network is changed. Of a conv net the chosen
    filters are applied to the channels chosen below, example by example.

    Arguments: `batch` how examples that come together are evaluated: "one" after the other; "per-example" each with its
    own mask, groups of weights read once for all examples that want them; "shared" under one mask, decided from their
    mean logits (`policies.Shared`; *dropout-policies* shares one among 32). `threads` that divide the examples of a
    call. `dtype` of the target's weights: "float32", or "bfloat16" or "int8" (one scale a neuron), which round them;
    the policy is float32 always.

    The first compilation on a machine takes some seconds, which numba keeps. For a GPU see `gpu.compile_for_gpu`.

    Raises UsageError for a decision that draws its bits, or a policy that is none (an oracle); for conv nets also with
    a shared mask, rounded weights, or bits that switch more than one filter.

    >>> import torch
    >>> from condcomp_lib.lazy import LazyNetwork
    >>> from condcomp_lib.partitions import make_partition
    >>> from condcomp_lib.policies import Budget, Policy
    >>> from condcomp_lib.targets import MLP
    >>> target, partition = MLP(64, (32, 16), 10), make_partition("random", (32, 16), 4, torch.Generator())
    >>> lazy = LazyNetwork(target, partition, Policy(partition, 64), Budget((1,)))
    >>> compile(lazy)(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """
    if batch not in BATCHES:
        raise unknown("batch", batch, BATCHES)
    if not isinstance(threads, int) or threads < 1:
        raise UsageError(f"threads must be a whole number of at least 1, not {threads}")
    lazy = copy.deepcopy(pack.checked(lazy, batch)).requires_grad_(False)
    if isinstance(lazy.target, ConvNet):
        if (batch, dtype) not in (("one", "float32"), ("per-example", "float32")):
            raise UsageError('a conv net is compiled with batch "one" or "per-example" (the same) and dtype "float32", '
                             f'not with "{batch}" and "{dtype}"')  # fmt: skip
        fast: FastLazy = FastFilters(convolutions.pack_filters(lazy), batch, threads, lazy, dtype)
    else:
        fast = FastLazy(pack.pack(lazy, dtype), batch, threads, lazy, dtype)
    fast(np.zeros((1, fast.inputs), np.float32))  # numba compiles or loads now, not at the first real call
    return fast
