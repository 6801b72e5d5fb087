"""Timing side by side: the dense engines to beat, interleaved repeats, and what the machine can do at best."""

import copy
import importlib.util
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from condcomp_lib.kernels.pack import aligned
from condcomp_lib.kernels.tiles import LANES, panel_tile
from condcomp_lib.targets import MLP, ConvNet

Engine = Callable[[np.ndarray], Any]
TURN_SECONDS = 0.02  # an engine's turn within a repeat, at least one call


def dense_engines(
    model: MLP | ConvNet, threads: int, names: Sequence[str] = ("eager", "compiled", "onnxruntime")
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Ways to evaluate a dense network, each a function of inputs (float32, examples x features) as an array, with so
    many threads; and those that are not to be had here, with the reason.

    "eager" is PyTorch as it is, "compiled" `torch.compile`, "onnxruntime" ONNX Runtime's session on the processor.
    The weights of a conv net are copied into the memory layout that PyTorch is fastest with.
    """
    torch.set_num_threads(threads)
    if isinstance(model, ConvNet):
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[str, Engine] = {"eager": _eager(model)} if "eager" in names else {}
    skipped: dict[str, str] = {}
    if "compiled" in names:
        if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
            found["compiled"] = _eager(torch.compile(model))
        else:
            skipped["compiled"] = "torch.compile needs a C++ compiler, and there is none"
    if "onnxruntime" in names:
        if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
            found["onnxruntime"] = _onnxruntime(model, threads)
        else:
            skipped["onnxruntime"] = "the packages onnx and onnxruntime are not installed"
    return found, skipped


def _eager(model: Callable[[torch.Tensor], torch.Tensor]) -> Engine:
    def evaluate(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    return evaluate


def _onnxruntime(model: MLP | ConvNet, threads: int) -> Engine:
    """The network as an ONNX graph in a session of so many threads."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    nodes, weights, last = _nodes(model)
    ends = (("x", model.inputs), (last, model.linears[-1].out_features))
    x, scores = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in ends)
    graph = helper.make_graph(nodes, "network", [x], [scores], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    text = onnx.load_model_from_string(made.SerializeToString()).SerializeToString()
    session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run([last], {"x": x})[0]


def _nodes(model: MLP | ConvNet) -> tuple[list[Any], list[Any], str]:
    """Gemm, or Reshape, Conv and GlobalAveragePool, and Relu (or Tanh) nodes; their weights; the name of the scores."""
    from onnx import helper, numpy_helper

    nodes: list[Any] = []
    weights: list[Any] = []
    activation = "Tanh" if isinstance(model.activation, torch.nn.Tanh) else "Relu"

    def then(kind: str, before: Sequence[str], name: str, **more: Any) -> str:
        nodes.append(helper.make_node(kind, before, [name], **more))
        return name

    last = "x"
    if isinstance(model, ConvNet):
        weights.append(numpy_helper.from_array(np.array([-1, *model.shape]), "shape"))
        last = then("Reshape", ["x", "shape"], "pictures")
    for number, layer in enumerate(model.linears):
        for name, tensor in (("w", layer.weight), ("b", layer.bias)):
            weights.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), f"{name}{number}"))
        filters = isinstance(layer, torch.nn.Conv2d)
        if isinstance(model, ConvNet) and not filters:
            last = then("Flatten", [then("GlobalAveragePool", [last], "means")], "read")
        how = {"pads": [1] * 4, "strides": list(layer.stride)} if filters else {"transB": 1}
        last = then("Conv" if filters else "Gemm", [last, f"w{number}", f"b{number}"], f"z{number}", **how)
        if number < len(model.hidden):
            last = then(activation, [last], f"h{number}")
    return nodes, weights, last


def interleaved(
    calls: Mapping[str, Callable[[np.ndarray], object]], inputs: Sequence[np.ndarray], repeats: int
) -> dict[str, np.ndarray]:
    """Microseconds a call (float64, repeats) of each function, measured in turn, `repeats` times, on all the inputs.

    In every repeat each function goes through the inputs, as many of them as its turn allows, from where it stopped;
    warmed up before. What disturbs the machine meets all of them, so take ratios within a repeat.
    """
    turns, at = {}, dict.fromkeys(calls, 0)
    for name, call in calls.items():
        call(inputs[0])
        started = time.perf_counter()
        call(inputs[-1])
        turns[name] = max(1, int(TURN_SECONDS / max(time.perf_counter() - started, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            chosen = [inputs[(at[name] + i) % len(inputs)] for i in range(turns[name])]
            at[name] += turns[name]
            call(chosen[0])  # what the one before left in the caches is not its own
            started = time.perf_counter()
            for x in chosen:
                call(x)
            found[name].append(1e6 * (time.perf_counter() - started) / len(chosen))
    return {name: np.array(times) for name, times in found.items()}


def fastest(times: Mapping[str, np.ndarray], names: Iterable[str]) -> str:
    """The function of `names` with the least median time (`times` as from `interleaved`)."""
    return min(names, key=lambda name: float(np.median(times[name])))


@dataclass(frozen=True)
class Machine:
    """What one core does at best, as measured: multiply-adds a second of float32 numbers in registers, and bytes a
    second read from a buffer of `buffer` bytes."""

    multiply_adds: float
    bandwidth: float
    buffer: int


def best(measured: Sequence[Machine]) -> Machine:
    """The most of what was measured of one machine with the same buffer: something else ran while there was less."""
    return Machine(max(m.multiply_adds for m in measured), max(m.bandwidth for m in measured), measured[0].buffer)


_tile = panel_tile(4, 3)


@numba.njit(nogil=True)
def _busy(x, listed, w, size, h, times):  # type: ignore[no-untyped-def]
    for _ in range(times):
        _tile(x, 0, 0, listed, 0, w, 3 * LANES, 0, size, h, 3 * LANES, 0)  # the same row of x four times


@numba.njit(nogil=True, fastmath=True)
def _read(numbers):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(numbers)):
        total += numbers[i]
    return total


def machine(buffer: int, repeats: int = 20) -> Machine:
    """Measure this machine, the best of `repeats`; `buffer` bytes, as many as the weights that are to be read."""
    size, times = 128, 2000  # 12 or 24 KiB of weights stay in the L1 cache
    x, w, h = (aligned(numbers, np.float32) for numbers in (size, 3 * LANES * size, 4 * 3 * LANES))
    x[:], w[:] = 1e-3, 1e-3
    listed, numbers = np.arange(4), aligned(max(buffer, 4096) // 4, np.float32)
    numbers[:] = 1
    work = {
        "multiply-adds": (lambda: _busy(x, listed, w, size, h, times), 12 * LANES * size * times),
        "bytes": (lambda: _read(numbers), 4 * len(numbers)),
    }
    rates = {}
    for name, (call, amount) in work.items():
        call()
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        rates[name] = amount / min(seconds)
    return Machine(rates["multiply-adds"], rates["bytes"], buffer)
