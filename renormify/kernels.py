"""Statistics of a batch, and its transform with a gradient: what Batch Renorm costs.

Each comes in two forms with the same results: by the kernels of torch's Batch Norm, and, where a device lacks
them or a transform of torch must see through, in public operations.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

__all__ = [
    "Record",
    "are_finite",
    "batch_statistics",
    "native_kernels_serve",
    "per_channel",
    "positions",
    "scale_and_shift",
    "transform",
]


class Record(NamedTuple):
    """What a forward made of its batch: statistics, and the r and d that followed; each :math:`(C)`."""

    mean: Tensor
    var: Tensor
    invstd: Tensor
    r: Tensor
    d: Tensor
    m: int | Tensor


# Sizes in elements, where the trade of one way of adding for the other was measured to turn.
_MANY = 1 << 17
_LONG = 1 << 12
_CACHED = 1 << 18


def positions(mask: Tensor, input: Tensor) -> Tensor:
    """The mask over :math:`(N, *)`, as one that broadcasts over :math:`(N, C, *)`."""
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be of dtype torch.bool, True where the input is valid (got {mask.dtype})"
        )
    try:
        return mask.expand(input.shape[0], *input.shape[2:]).unsqueeze(1)
    except RuntimeError:
        expected = (input.shape[0], *input.shape[2:])
        raise ValueError(f"mask must broadcast to {expected} (got {tuple(mask.shape)})") from None


def per_channel(value: Tensor, input: Tensor) -> Tensor:
    """A :math:`(C)` vector, as one that broadcasts over :math:`(N, C, *)`."""
    return value.view(1, -1, *(1,) * (input.dim() - 2))


def scale_and_shift(weight: Tensor | None, bias: Tensor | None, record: Record) -> tuple[Tensor, Tensor]:
    r"""Batch Norm's weight and bias for this batch: :math:`\gamma r` and :math:`\gamma d + \beta`."""
    r, d = record.r, record.d
    if weight is None:
        return r, d if bias is None else d + bias
    return weight * r, weight * d if bias is None else torch.addcmul(bias.to(d.dtype), weight, d)


def batch_statistics(
    input: Tensor, native: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean and biased variance of each channel, and the number of values in it.

    The first two are :math:`(C)`, float32 or, for a float64 input, float64; zero where there is no value. The
    number is a scalar tensor where a mask decides it.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    if mask is not None:
        dims = [0, *range(2, input.dim())]
        valid = positions(mask, input)
        m = valid.sum().to(dtype)
        share = valid.to(dtype) / m.clamp(min=1)
        values = input.to(dtype).masked_fill(~valid, 0)
        mean = (values * share).sum(dims)
        centred = (values - per_channel(mean, input)).masked_fill(~valid, 0)
        return mean, (centred.square() * share).sum(dims), m
    count = input.numel() // input.shape[1]
    if count == 0:
        nothing = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
        return nothing, nothing, count
    if native:
        if _rows_are_faster(input):
            return *_statistics_by_rows(input), count
        mean, var = torch.batch_norm_update_stats(input, *_scratch(input, dtype), 0.0)
        return mean, var, count
    # Word for word as a compiler writes out torch's batch_norm, so that it finds the two to be one.
    dims = [0, *range(2, input.dim())]
    var, mean = torch.var_mean(input.to(dtype), dims, correction=0, keepdim=True)
    return mean.squeeze(dims), var.squeeze(dims), count


def _rows_are_faster(input: Tensor) -> bool:
    return (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and input.dim() > 2
        and input.numel() >= _MANY
        and input.is_contiguous()
    )


def _statistics_by_rows(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by vectorised reductions over contiguous rows, in two passes.

    For this layout the kernel of Batch Norm adds numbers one by one and takes two to four times as long. Here
    the centred values of a few samples at a time go through a buffer that stays in the cache; rows are kept
    short, since each is added up in float32.
    """
    n, channels = input.shape[:2]
    split = input.shape[2] if input.dim() > 3 and input[0, 0].numel() > _LONG else 1
    rows = input.view(n, channels, split, -1)
    count = input.numel() // channels
    mean = rows.sum(3).sum((0, 2)).div_(count)
    samples = max(1, _CACHED // rows[0].numel())
    buffer = torch.empty((min(samples, n), *rows.shape[1:]), dtype=input.dtype, device=input.device)
    norms = torch.empty(rows.shape[:3], dtype=input.dtype, device=input.device)
    for start in range(0, n, samples):
        part = rows[start : start + samples]
        centred = torch.sub(part, mean.view(-1, 1, 1), out=buffer[: len(part)])
        torch.linalg.vector_norm(centred, dim=3, out=norms[start : start + samples])
    return mean, norms.square_().sum((0, 2)).div_(count)


def are_finite(mean: Tensor, var: Tensor) -> bool:
    """Whether all statistics of a batch are, on the host."""
    # A product with an inf or a NaN is one; so mostly one operation decides.
    return math.isfinite(torch.dot(mean, var).item()) or bool(torch.isfinite(mean + var).all())


def _scratch(input: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    # The kernel gives its result in the dtype of the running statistics, which it would also move.
    if input.dtype == dtype:
        return None, None
    scratch = torch.zeros(2, input.shape[1], dtype=dtype, device=input.device)
    return scratch[0], scratch[1]


def transform(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    record: Record,
    eps: float,
    native: bool,
    mask: Tensor | None,
) -> Tensor:
    """Batch Norm with this batch's weight and bias; r and d carry no gradient, the statistics do.

    Args:
        input: :math:`(N, C, *)`.
        weight: :math:`(C)`, or None.
        bias: :math:`(C)`, or None.
        record: the statistics of the input, with the r and d to apply.
        eps: added to the variance inside the root.
        native: whether :func:`native_kernels_serve`.
        mask: see :func:`renormify.functional.batch_renorm`.
    """
    if native and mask is None:
        return _Transform.apply(input, weight, bias, record, eps)  # type: ignore[no-any-return]
    scale, shift = scale_and_shift(weight, bias, record)
    if mask is None:
        return torch.batch_norm(input, scale, shift, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)
    valid = positions(mask, input)
    input = input.masked_fill(~valid, 0)  # on the output alone it would let a NaN into the gradient
    mean, var, _ = batch_statistics(input, native, mask)  # once more, for the gradient
    normalised = (input - per_channel(mean, input)) * per_channel((var + eps).rsqrt(), input)
    output = normalised * per_channel(scale, input) + per_channel(shift, input)
    return output.to(input.dtype).masked_fill(~valid, 0)


@functools.cache
def _has_native_kernels(device_type: str) -> bool:
    key = torch._C._dispatch_key_for_device(device_type)
    return all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)
        for name in ("batch_norm_update_stats", "native_batch_norm", "native_batch_norm_backward")
    )


def native_kernels_serve(input: Tensor) -> bool:
    """Whether the device has the kernels, and nothing must see through them."""
    return (
        type(input) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and _has_native_kernels(input.device.type)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


class _Transform(torch.autograd.Function):
    """The transform and its gradient (section 3 of the paper) by Batch Norm's kernels.

    The statistics given are those of the input, so the backward is that of training mode, which
    differentiates through them, and is itself differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, record: Record, eps: float
    ) -> Tensor:
        mean, var, invstd, r, d, _ = record
        scale, shift = scale_and_shift(weight, bias, record)
        output: Tensor = torch.native_batch_norm(input, scale, shift, mean, var, False, 0.0, eps)[0]
        ctx.save_for_backward(input, weight, mean, invstd, r, d, scale)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, r, d, scale = ctx.saved_tensors
        if torch.is_grad_enabled() and weight is not None:
            scale = weight * r  # the gradient is to be differentiated too
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward.default(
            grad_output,
            input,
            scale,
            None,
            None,
            mean,
            invstd,
            True,
            ctx.eps,
            [needs_input, needs_weight, needs_weight or needs_bias],
        )
        grad_weight = torch.addcmul(r * grad_scale, d, grad_shift) if needs_weight else None
        return grad_input, grad_weight, grad_shift if needs_bias else None, None, None
