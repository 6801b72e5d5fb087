"""Coactivation: which hidden neurons fire together (*partitions*, section 5.4)."""

import torch
from torch import Tensor

from condcomp_lib.errors import UsageError
from condcomp_lib.targets import MLP


@torch.inference_mode()
def firing_patterns(target: MLP, x: Tensor, batch: int = 2048) -> Tensor:
    """On which examples each hidden neuron is above zero (bool, examples x neurons of all hidden layers, first first).

    >>> firing_patterns(MLP(5, (4, 3), 2), torch.zeros(6, 5)).shape
    torch.Size([6, 7])
    """
    if not len(x):
        raise UsageError("there are no examples to look at")
    parts = []
    for h in x.split(batch):
        layers = []
        for layer in target.linears[:-1]:
            h = target.activation(layer(h))
            layers.append(h > 0)
        parts.append(torch.cat(layers, 1))
    return torch.cat(parts)


def coactivation(patterns: Tensor) -> Tensor:
    """c_ij = E[ 1(h_i > 0) 1(h_j > 0) ] (float32, neurons x neurons) of `patterns` (bool, examples x neurons).

    >>> coactivation(torch.tensor([[True, True], [True, False]]))
    tensor([[1.0000, 0.5000],
            [0.5000, 0.5000]])
    """
    fired = patterns.float()
    return fired.T @ fired / len(patterns)
