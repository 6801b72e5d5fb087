"""Reading a user's network: a chain of layers as a target that can be made lazy, the network itself left as it is."""

import copy
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from condcomp_lib.errors import UsageError
from condcomp_lib.targets import ACTIVATIONS, MLP

SUPPORTED = "Linear, ReLU or Tanh, BatchNorm1d, Dropout, Flatten and Identity, one after the other"
KEPT_AS_IT_IS = (nn.Dropout, nn.AlphaDropout, nn.Identity, nn.Flatten)  # nothing to do in evaluation
CALLS: dict[Any, str] = {
    functional.relu: "relu", functional.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", torch.tanh: "tanh",
    functional.tanh: "tanh", functional.dropout: "", torch.flatten: "", "relu": "relu", "relu_": "relu", "tanh": "tanh",
    "flatten": "", "view": "", "reshape": "", "size": "", getattr: "",
}  # fmt: skip
CLAMPS = (torch.clamp, torch.clamp_min, torch.clip, "clamp", "clamp_", "clamp_min", "clip")  # a ReLU where from zero
PROBABILITY_LAYERS = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid)
PROBABILITIES = (functional.softmax, functional.log_softmax, torch.softmax, torch.log_softmax, torch.sigmoid, "softmax",
                 "log_softmax", "sigmoid")  # fmt: skip
SCORES = "convert the network up to its scores, and apply it to what the lazy network gives"


@dataclass(frozen=True, eq=False)
class Block:
    """What is made lazy: `target`, a copy of its layers in float32 on the processor, `path` to where they lie in the
    model ("" for the model itself), and the module there (`place`, not changed)."""

    target: MLP
    path: str
    place: nn.Module


def read(model: nn.Module, path: str = "") -> Block:
    """The chain of layers that a model is, or that lies at a path in it ("encoder.layers.0": a chain there, or the
    feed-forward part of a TransformerEncoderLayer).

    Normalisation is folded into the layers beside it, with the statistics of evaluation; dropout is left out.

    Raises UsageError that names the first layer that is not supported, and what is.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"a network is a torch.nn.Module, not a {type(model).__name__}")
    try:
        place = model.get_submodule(path)
    except AttributeError as error:
        known = ", ".join(name for name, _ in model.named_children()) or "none"
        raise UsageError(f"the model has no layer {path!r}; at its top there are: {known}") from error
    layers = _feed_forward(place) if isinstance(place, nn.TransformerEncoderLayer) else _chain(place)
    return Block(_joined(layers), path, place)


def _feed_forward(layer: nn.TransformerEncoderLayer) -> list[tuple[str, Any]]:
    """The feed-forward part of a transformer's layer, as it is called there."""
    activation = layer.activation
    named = "relu" if activation in (functional.relu, torch.relu) or isinstance(activation, nn.ReLU) else None
    if named is None:
        told = getattr(activation, "__name__", type(activation).__name__)
        raise UsageError(f"the feed-forward part's activation is {told}; supported: ReLU, under which a neuron can be "
                         "left out")  # fmt: skip
    return [("linear1", layer.linear1), ("activation", named), ("linear2", layer.linear2)]


def _chain(place: nn.Module) -> list[tuple[str, Any]]:
    """Names and layers (activations by name) in the order in which they are called."""
    steps: list[tuple[str, Any]] = list(_flat(place)) if isinstance(place, nn.Sequential) else _traced(place)
    found: list[tuple[str, Any]] = []
    for index, (name, layer) in enumerate(steps):
        if isinstance(layer, str | nn.Linear | nn.BatchNorm1d):
            found.append((name, layer))
        elif isinstance(layer, nn.ReLU | nn.Tanh):
            found.append((name, "relu" if isinstance(layer, nn.ReLU) else "tanh"))
        elif not isinstance(layer, KEPT_AS_IT_IS):
            last = index == len(steps) - 1
            after = SCORES if last and isinstance(layer, PROBABILITY_LAYERS) else f"supported are {SUPPORTED}"
            raise UsageError(f"layer {name!r} is {layer}, which is not supported; {after}")
    return found


def _flat(place: nn.Sequential, before: str = "") -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, layer in place.named_children():
        found += _flat(layer, f"{before}{name}.") if isinstance(layer, nn.Sequential) else [(f"{before}{name}", layer)]
    return found


def _traced(place: nn.Module) -> list[tuple[str, Any]]:
    """The layers that a module's forward calls, if it is a chain: each takes what the one before gives."""
    told = f"{type(place).__name__}'s forward is no chain of layers"
    try:
        graph = fx.symbolic_trace(place).graph
    except Exception as error:  # whatever a user's forward does
        raise UsageError(f"{told} ({error}); supported are {SUPPORTED}") from error
    layers, last = dict(place.named_modules()), None
    found: list[tuple[str, Any]] = []
    for node in graph.nodes:
        called = node.op in ("call_function", "call_method") and node.args[:1] == (last,)
        if node.op == "placeholder" and last is None:
            last = node
        elif node.op == "output" and node.args[0] is last:
            return found
        elif node.op == "call_module" and list(node.args) == [last]:
            name, layer = str(node.target), layers[str(node.target)]
            found += _flat(layer, f"{name}.") if isinstance(layer, nn.Sequential) else [(name, layer)]
            last = node
        elif called and node.target in CALLS:
            if node.target in ("size", getattr):
                continue  # asked for the sake of a view
            found += [(node.name, CALLS[node.target])] if CALLS[node.target] else []
            last = node
        elif called and node.target in CLAMPS and _from_zero(node):
            found += [(node.name, "relu")]
            last = node
        elif node.target is operator.getitem and getattr(node.args[0], "target", None) in ("size", getattr):
            continue
        else:
            ends = node.next.op == "output" and node.target in PROBABILITIES
            after = SCORES if ends else f"supported are {SUPPORTED}"
            raise UsageError(f"{told}: {node.name} ({node.target}) is not supported; {after}")
    raise UsageError(f"{told}: it returns something else than its last layer; supported are {SUPPORTED}")


def _from_zero(node: fx.Node) -> bool:
    """Whether a clamp lets everything above zero through, and nothing below."""
    given = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
    return bool(given.get("min") == 0) and given.get("max") is None


@torch.no_grad()
def _joined(layers: list[tuple[str, Any]]) -> MLP:
    """Linear layers and activations in turn as an `MLP`, what lies between them folded in."""
    linears: list[tuple[Tensor, Tensor]] = []
    activations: list[str] = []
    scale, shift = None, None  # of a normalisation after an activation, which goes into the next linear layer
    for name, layer in layers:
        after = len(linears) > len(activations)  # whether the last thing was a linear layer
        if isinstance(layer, nn.Linear):
            if after:
                raise UsageError(f"layer {name!r} follows a Linear directly; between two there must be ReLU or Tanh")
            weight, bias = _numbers(name, layer.weight), _numbers(name, layer.bias)
            assert weight is not None
            bias = torch.zeros(len(weight)) if bias is None else bias
            if scale is not None and shift is not None:
                bias, weight = bias + weight @ shift, weight * scale
            linears.append((weight, bias))
            scale, shift = None, None
        elif isinstance(layer, nn.BatchNorm1d):
            own = _affine(name, layer)
            if linears and layer.num_features != len(linears[-1][0]):
                raise UsageError(f"layer {name!r} normalises {layer.num_features} features, the layer before has "
                                 f"{len(linears[-1][0])}")  # fmt: skip
            if after:
                weight, bias = linears[-1]
                linears[-1] = own[0][:, None] * weight, own[0] * bias + own[1]
            else:
                scale, shift = own if scale is None or shift is None else (own[0] * scale, own[0] * shift + own[1])
        elif not after:
            raise UsageError(f"activation {name!r} does not follow a Linear; supported are {SUPPORTED}")
        else:
            activations.append(layer)
    if len(linears) < 2 or len(activations) != len(linears) - 1:
        raise UsageError("a network needs at least one hidden layer, and a Linear as its last one, which gives the "
                         f"scores; this one has {len(linears)} Linear and {len(activations)} activations")  # fmt: skip
    if len(set(activations)) > 1:
        raise UsageError(f"all activations must be the same, not {', '.join(activations)}")
    return _filled(linears, activations[0])


def _filled(linears: list[tuple[Tensor, Tensor]], activation: str) -> MLP:
    widths = [len(weight) for weight, _ in linears]
    for (below, _), (weight, _) in itertools.pairwise(linears):
        if weight.shape[1] != len(below):
            raise UsageError(f"a Linear reads {weight.shape[1]} features where {len(below)} lie below it")
    assert activation in ACTIVATIONS
    target = MLP(linears[0][0].shape[1], widths[:-1], widths[-1], activation, torch.Generator())
    for layer, (weight, bias) in zip(target.linears, linears, strict=True):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        if not (layer.weight.isfinite().all() and layer.bias.isfinite().all()):
            raise UsageError("the network's weights hold a number that is not finite; train it again")
    return target.eval()


def _numbers(name: str, tensor: Tensor | None) -> Tensor | None:
    """A copy in float32 on the processor."""
    if tensor is None:
        return None
    if tensor.is_meta:
        raise UsageError(f"layer {name!r} has no numbers (device meta); load the model's weights first")
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _affine(name: str, layer: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """What a normalisation does in evaluation: scale and shift of each feature."""
    if layer.running_mean is None or layer.running_var is None:
        raise UsageError(f"layer {name!r} keeps no running statistics, so what it does depends on the minibatch")
    mean, variance = _numbers(name, layer.running_mean), _numbers(name, layer.running_var)
    assert mean is not None
    assert variance is not None
    weight, bias = _numbers(name, layer.weight), _numbers(name, layer.bias)
    scale = (variance + layer.eps).rsqrt() * (torch.ones_like(mean) if weight is None else weight)
    return scale, (torch.zeros_like(mean) if bias is None else bias) - mean * scale


def install(model: nn.Module, path: str, fast: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode with `fast` in place of what `read` took at `path`.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> install(model, "", nn.Identity())
    Identity()
    """
    found = copy.deepcopy(model).eval()
    place = found.get_submodule(path)
    new = LazyEncoderLayer(place, fast) if isinstance(place, nn.TransformerEncoderLayer) else fast
    if not path:
        return new
    parent, _, name = path.rpartition(".")
    setattr(found.get_submodule(parent), name, new)
    return found


class LazyEncoderLayer(nn.Module):
    """A transformer's encoder layer in evaluation, with another feed-forward part (one call for all tokens)."""

    def __init__(self, layer: nn.TransformerEncoderLayer, feed_forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.self_attn, self.norm1, self.norm2 = layer.self_attn, layer.norm1, layer.norm2
        self.norm_first, self.feed_forward = layer.norm_first, feed_forward

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """As the layer that it was made from."""

        def attended(x: Tensor) -> Tensor:
            found: Tensor = self.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal,
                need_weights=False,
            )[0]  # fmt: skip
            return found

        if self.norm_first:
            x = src + attended(self.norm1(src))
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(src + attended(src))
        found: Tensor = self.norm2(x + self.feed_forward(x))
        return found
