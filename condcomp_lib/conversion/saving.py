"""Converted networks on disk: one safetensors file with a JSON header, no pickle; and as an ONNX graph."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from condcomp_lib import kernels
from condcomp_lib.errors import CondcompError, UsageError
from condcomp_lib.files import write_atomically
from condcomp_lib.kernels import FastLazy
from condcomp_lib.lazy import LazyNetwork
from condcomp_lib.partitions import Partition
from condcomp_lib.policies import Budget, Policy, Pool, Threshold
from condcomp_lib.targets import MLP

FORMAT = "condcomp lazy network"
VERSION = 2
LARGEST = 2**20  # number that a header may hold


class LoadError(CondcompError):
    """A file that is no converted network, or not a whole one."""


def save(fast: FastLazy, path: str | Path) -> Path:
    """Write a converted network to one file: weights and partition as safetensors, everything else as JSON in its
    header. The file appears whole or not at all. Returns its path."""
    lazy = fast.lazy
    plain = isinstance(lazy.target, MLP) and lazy.rescale == "none" and lazy.fill is None
    if not plain or lazy.policy.always_on or lazy.policy.limits:
        raise UsageError("only networks as `lazify` makes them are saved: fully connected, not rescaled, nothing "
                         "filled in, no group always on, no limits")  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for owner, layers in (("target", lazy.target.linears), ("policy", lazy.policy.gates)):
        for index, layer in enumerate(layers):
            tensors[f"{owner}.{index}.weight"] = layer.weight.detach().contiguous()
            tensors[f"{owner}.{index}.bias"] = layer.bias.detach().contiguous()
    for index, groups in enumerate(lazy.partition.membership):
        tensors[f"partition.{index}"] = groups.contiguous()
    head = {"format": FORMAT, "version": VERSION, "report": fast.report, **_settings(fast)}
    path = Path(path)
    write_atomically(path, to_bytes(tensors, {"condcomp": json.dumps(head)}))
    return path


def _settings(fast: FastLazy) -> dict[str, Any]:
    lazy, decision = fast.lazy, fast.lazy.decision
    own = {"levels": [_written(level) for level in decision.levels]} if isinstance(decision, Threshold) else {}
    if isinstance(decision, Budget):
        own["counts"] = list(decision.counts)
    pool = lazy.policy.pool
    return {
        "activation": "tanh" if isinstance(lazy.mlp.activation, nn.Tanh) else "relu",
        "groups": list(lazy.partition.groups_by_layer),
        "scope": lazy.partition.scope,
        "pool": {"shape": list(pool.shape), "size": pool.size} if pool else None,
        "decision": own,
        "compiled": {"batch": fast.batch, "threads": fast.threads, "dtype": fast.dtype},
    }


def _written(level: float) -> float | str:
    """JSON knows no infinity."""
    return level if math.isfinite(level) else str(level)


def load(path: str | Path) -> FastLazy:
    """What `save` has written, compiled again: on the same machine its outputs are the same to the bit.

    Raises LoadError with one line that says what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {}).get("condcomp", "{}"))
            if head.get("format") != FORMAT:
                raise LoadError(f"{path}: no converted network of this library")
            if head.get("version") != VERSION:
                raise LoadError(f"{path}: written in version {head.get('version')} of its format; this library reads "
                                f"{VERSION}")  # fmt: skip
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        lazy = _built(head, tensors)
        own, found = head["compiled"], head["report"]
        fast = kernels.compile(lazy, own["batch"], own["threads"], own["dtype"])
    except LoadError:
        raise
    except UsageError as error:
        raise LoadError(f"{path}: its parts do not fit one another ({error})") from error
    except Exception as error:  # whatever a file that somebody else wrote makes of it
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise LoadError(f"{path}: damaged, or no converted network ({told})") from error
    fast.report = found
    return fast


def _check(head: Any) -> None:
    """Raise ValueError where the header is not as `save` writes it."""
    whole = {**{f"groups {i}": count for i, count in enumerate(head["groups"])}, "threads": head["compiled"]["threads"]}
    whole |= {f"count {i}": count for i, count in enumerate(head["decision"].get("counts", []))}
    if head["pool"]:
        whole |= {f"side {i}": side for i, side in enumerate([*head["pool"]["shape"], head["pool"]["size"]])}
    for name, value in whole.items():
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(f"{name} is {value!r}")
    if any(math.isnan(float(level)) for level in head["decision"].get("levels", [])):
        raise ValueError("a level is no number")
    if not isinstance(head["report"], dict | None):
        raise ValueError("the report is no table")


@torch.no_grad()
def _built(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LazyNetwork:
    _check(head)
    layers = sum(name.startswith("target.") and name.endswith(".weight") for name in tensors)
    weights = [tensors[f"target.{index}.weight"] for index in range(layers)]
    hidden = [len(weight) for weight in weights[:-1]]
    target = MLP(weights[0].shape[1], hidden, len(weights[-1]), head["activation"], torch.Generator())
    counts, members = head["groups"], tuple(tensors[f"partition.{index}"] for index in range(len(hidden)))
    if len(counts) != len(hidden):
        raise ValueError(f"{len(counts)} numbers of groups for {len(hidden)} layers")
    partition = Partition(members, max(counts), head["scope"], tuple(counts) if head["scope"] == "layer" else None)
    pool = Pool(tuple(head["pool"]["shape"]), head["pool"]["size"]) if head["pool"] else None
    policy = Policy(partition, target.inputs, pool, torch.Generator())
    for owner, own in (("target", target.linears), ("policy", policy.gates)):
        for index, layer in enumerate(own):
            for name, parameter in layer.named_parameters():
                given = tensors[f"{owner}.{index}.{name}"]
                if given.shape != parameter.shape:
                    raise ValueError(f"{owner} {index}: {name} of shape {list(given.shape)}")
                parameter.copy_(given)
    decision = head["decision"]
    how = (
        Budget(tuple(decision["counts"])) if "counts" in decision else Threshold(tuple(map(float, decision["levels"])))
    )
    return LazyNetwork(target.requires_grad_(False), partition, policy.requires_grad_(False), how)


def export(fast: FastLazy, path: str | Path) -> Path:
    """Write the reference evaluation of a converted network (everything computed, then masked) as an ONNX graph from
    "x" (float32, n x features) to "scores" (float32, n x classes): for other runtimes, not for speed.

    Raises UsageError where the package onnx is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as error:
        raise UsageError("export needs the package onnx; install it with: pip install onnx") from error
    graph = _Graph(fast.lazy)
    scores = graph.scores()
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
            for name, width in (("x", fast.inputs), (scores, fast.classes))]  # fmt: skip
    made = helper.make_graph(graph.nodes, "lazy network", ends[:1], ends[1:], graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    path = Path(path)
    write_atomically(path, model.SerializeToString())
    return path


class _Graph:
    """Nodes of a lazy network's reference evaluation."""

    def __init__(self, lazy: LazyNetwork) -> None:
        self.lazy = lazy
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def then(self, kind: str, inputs: list[str], name: str, **more: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], **more))
        return name

    def constant(self, name: str, numbers: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(numbers), name))
        return name

    def linear(self, layer: nn.Linear, x: str, name: str) -> str:
        weight = self.constant(f"{name}.weight", layer.weight.detach().numpy())
        return self.then(
            "Gemm", [x, weight, self.constant(f"{name}.bias", layer.bias.detach().numpy())], name, transB=1
        )

    def scores(self) -> str:
        lazy, h = self.lazy, "x"
        activation = "Tanh" if isinstance(lazy.mlp.activation, nn.Tanh) else "Relu"
        bits: list[str] = []
        for index, layer in enumerate(lazy.mlp.linears[:-1]):
            if index < len(lazy.policy.gates):
                bits.append(self.bits(index, self.pooled() if lazy.policy.pool and not index else h))
            own = self.then(activation, [self.linear(layer, h, f"z{index}")], f"h{index}")
            members = self.constant(f"groups{index}", lazy.partition.membership[index].numpy())
            mask = self.then("Gather", [bits[min(index, len(bits) - 1)], members], f"mask{index}", axis=1)
            h = self.then("Mul", [own, mask], f"kept{index}")
        return self.linear(lazy.mlp.linears[-1], h, "scores")

    def pooled(self) -> str:
        pool = self.lazy.policy.pool
        assert pool is not None
        picture = self.then("Reshape", ["x", self.constant("picture", np.array([-1, *pool.shape]))], "pictures")
        sides = [pool.size, pool.size]
        return self.then("Flatten", [self.then("AveragePool", [picture], "means", kernel_shape=sides, strides=sides)],
                         "pooled")  # fmt: skip

    def bits(self, gate: int, x: str) -> str:
        """The decided bits of a gate as float32."""
        from onnx import TensorProto

        logits, decision = self.linear(self.lazy.policy.gates[gate], x, f"logits{gate}"), self.lazy.decision
        if isinstance(decision, Threshold):
            level = self.constant(f"level{gate}", np.float32(decision.levels[gate]))
            over = self.then("Greater", [logits, level], f"over{gate}")
            return self.then("Cast", [over], f"bits{gate}", to=TensorProto.FLOAT)
        assert isinstance(decision, Budget)
        count = self.constant(f"count{gate}", np.array([decision.counts[gate]], np.int64))
        self.nodes.append(_topk(logits, count, gate))
        depth = self.constant(f"depth{gate}", np.int64(self.lazy.partition.groups_by_gate[gate]))
        ends = self.constant(f"ends{gate}", np.array([0, 1], np.float32))
        hot = self.then("OneHot", [f"chosen{gate}", depth, ends], f"hot{gate}", axis=-1)
        axes = self.constant(f"axes{gate}", np.array([1], np.int64))
        return self.then("ReduceSum", [hot, axes], f"bits{gate}", keepdims=0)


def _topk(logits: str, count: str, gate: int) -> Any:
    from onnx import helper

    return helper.make_node("TopK", [logits, count], [f"highest{gate}", f"chosen{gate}"], axis=1)
