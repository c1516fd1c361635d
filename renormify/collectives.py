"""Batch Renorm over a batch that is spread over processes: one batch, whatever each of them holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from renormify.kernels import Record, per_channel, positions, scale_and_shift

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["join_statistics", "transform_joined"]


def join_statistics(
    mean: Tensor, var: Tensor, m: int | Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values of the joined batch, from those of each process.

    Every process of the group must call it, also one with an empty batch.
    """
    count = torch.as_tensor(m, device=mean.device).to(mean.dtype)
    mine = torch.cat([mean, var, count.view(1)])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group)
    means, variances, counts = torch.split(torch.stack(gathered), [len(mean), len(mean), 1], 1)
    total = counts.sum()
    share = counts / total.clamp(min=1)
    joined = (means * share).sum(0)
    return joined, ((variances + (means - joined).square()) * share).sum(0), total


def transform_joined(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    record: Record,
    eps: float,
    mask: Tensor | None,
    group: ProcessGroup,
) -> Tensor:
    """As :func:`renormify.kernels.transform`, with the record of the joined batch.

    The gradients of weight and bias are those of this process's share of the loss, as in
    :class:`torch.nn.SyncBatchNorm`.
    """
    return _JoinedTransform.apply(  # type: ignore[no-any-return]
        input, weight, bias, record, eps, mask, group
    )


class _JoinedTransform(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        record: Record,
        eps: float,
        mask: Tensor | None,
        group: ProcessGroup,
    ) -> Tensor:
        mean, var, invstd, r, d, m = record
        if mask is not None:
            input = input.masked_fill(~positions(mask, input), 0)
        ctx.save_for_backward(input, weight, mean, invstd, r, d, mask, m)
        ctx.group = group
        output = F.batch_norm(input, mean, var, *scale_and_shift(weight, bias, record), False, 0.0, eps)
        return output if mask is None else output.masked_fill(~positions(mask, input), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd, r, d, mask, m = ctx.saved_tensors
        dims = [0, *range(2, input.dim())]
        grad = grad_output.to(mean.dtype)
        centred = input.to(mean.dtype) - per_channel(mean, input)
        if mask is not None:
            grad = grad.masked_fill(~positions(mask, input), 0)
        grad_shift = grad.sum(dims)
        grad_scale = (grad * centred).sum(dims) * invstd
        # The batch's statistics depend on every process's input, so each needs the others' gradients.
        sums = torch.stack([grad_shift, grad_scale])
        dist.all_reduce(sums, group=ctx.group)
        mean_shift, mean_scale = sums / m.clamp(min=1)

        scale = (r if weight is None else weight * r) * invstd
        grad_input = grad - per_channel(mean_shift, input) - centred * per_channel(mean_scale * invstd, input)
        grad_input = grad_input * per_channel(scale, input)
        if mask is not None:
            grad_input = grad_input.masked_fill(~positions(mask, input), 0)
        _, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_weight = torch.addcmul(r * grad_scale, d, grad_shift) if needs_weight else None
        return grad_input.to(input.dtype), grad_weight, grad_shift if needs_bias else None, *(None,) * 4
