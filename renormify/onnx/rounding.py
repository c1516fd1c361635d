"""A model with its weights rounded otherwise, which shows more of its float noise.

One forward shows one set of rounding errors, and a fortunate one says too little: inputs of few values, sums
that cancel, an activation that holds almost all elements at its limits. A file may hold weights that were
rounded once more, as folding does, and a runtime may sum in another order; by backward error analysis each is
as though weights had changed in their last place. So they are changed there, at random, and the forward shows
another set. Source: N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., sections 1.5 and
3.1; to draw the changes at random, D. S. Parker, "Monte Carlo Arithmetic", UCLA CSD-970002 (1997).
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from renormify.onnx.noise import comparable

__all__ = ["rounded_otherwise"]


def rounded_otherwise(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy whose parameters and buffers differ by at most a unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if comparable(tensor):
                places = torch.randint(-1, 2, tensor.shape, generator=generator, dtype=torch.int8)
                tensor.mul_(1.0 + places.to(tensor) * torch.finfo(tensor.dtype).eps)
    return other
