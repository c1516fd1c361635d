r"""The mathematics of Batch Renormalization, without state.

Source: S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
https://arxiv.org/abs/1702.03275, Algorithm 1 and section 3.

Batch Renorm is Batch Norm with a weight and a bias of its own for each batch,

.. math:: y = \hat x \, (\gamma r) + (\gamma d + \beta), \qquad \hat x = (x - \mu_B) / \sigma_B,

so torch's own kernels do the work: one pass for the statistics, one for the transform, and Batch Norm's own
backward with the weight :math:`\gamma r`. With :math:`g_w, g_b` what that returns for weight and bias,
:math:`\partial\gamma = r g_w + d g_b` and :math:`\partial\beta = g_b`. Where a device lacks those kernels, or
a transform of torch (compile, export, func, forward-mode AD) must see through the function, the same formula
is written in public operations.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from renormify.collectives import join_statistics, transform_joined
from renormify.kernels import all_finite, batch_statistics, positions, transform
from renormify.replay import (
    Record,
    find_record,
    kept_minimum,
    may_be_replayed,
    remember,
    unseen_by_policies,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["STATS", "batch_renorm"]

STATS = ("sigma", "var")
"""What is averaged over the batches: the paper's sigma, or the unbiased variance of torch's BatchNorm."""


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    *,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    stat: str = "sigma",
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    rejected: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Applies Batch Renormalization over each channel of a batch.

    In training, with :math:`\sigma = \sqrt{\text{running\_var} + \epsilon}` (Algorithm 1 of the paper):

    .. math::
        r = \mathrm{clip}(\sigma_B / \sigma,\ 1 / r_{max},\ r_{max}), \quad
        d = \mathrm{clip}((\mu_B - \mu) / \sigma,\ -d_{max},\ d_{max}), \quad
        y = \gamma \left(\frac{x - \mu_B}{\sigma_B} r + d\right) + \beta

    with r and d held constant in the gradient. Then the running statistics move **in place**, as in
    :func:`torch.nn.functional.batch_norm`. In evaluation it *is* :func:`torch.nn.functional.batch_norm`.

    Args:
        input: :math:`(N, C, *)`, floating point.
        running_mean: :math:`(C)`, float32 (float64 for a float64 input); moved in place.
        running_var: :math:`(C)`, likewise; :math:`\sigma^2 - \epsilon`.
        weight: :math:`\gamma`, :math:`(C)`, or None for one.
        bias: :math:`\beta`, :math:`(C)`, or None for zero.
        training: whether to normalise by the batch, corrected, or by the running statistics.
        momentum: :math:`\alpha`, the share of the batch in the running statistics; None for their
            cumulative average, which needs ``num_batches_tracked``.
        eps: added to a variance inside the root.
        r_max: at least 1; a float or a float32 scalar tensor.
        d_max: at least 0; a float or a float32 scalar tensor.
        stat: ``"sigma"`` averages :math:`\sigma` as in the paper, ``"var"`` the unbiased variance.
        mask: bool, :math:`(N, *)` or broadcastable to it, True where the input is valid. Statistics are those
            of the valid positions; the others come out as zero and pass no gradient.
        num_batches_tracked: an int64 scalar tensor, increased in place by each batch that moves the
            statistics.
        rejected: an int64 scalar tensor, increased in place when the batch holds inf or NaN and therefore
            leaves the running statistics as they were.
        process_group: processes whose batches are one batch; every one of them must call, also with no input.

    Returns:
        A tensor of the shape and dtype of ``input``.

    Where activation checkpointing runs the forward again, r and d are those of the first run, and nothing
    moves. A batch with one value per channel leaves ``running_var`` alone (its spread says nothing), an empty
    batch leaves both statistics alone.

    Raises:
        ValueError: for an input of fewer than two dimensions, missing running statistics, an unknown
            ``stat``, or limits or eps out of range.
        RuntimeError: for statistics, weight or bias whose size is not the number of channels.
    """
    _check(input, running_mean, running_var, weight, bias, r_max, d_max, stat, eps)
    group = _group_to_join(process_group) if training else None
    if not training or (input.numel() == 0 and group is None):
        return evaluate(input, running_mean, running_var, weight, bias, eps, mask)

    compiling = torch.compiler.is_compiling()
    record = None if compiling else find_record(running_mean)
    if record is None:
        replayable = not compiling and may_be_replayed()
        with torch.no_grad(), unseen_by_policies() if replayable else nullcontext():
            mean, var, m = batch_statistics(input.detach(), mask)
            if group is not None:
                mean, var, m = join_statistics(mean, var, m, group)
            learns = finite = all_finite(input, mean, var)
            if isinstance(m, Tensor):
                learns = finite & (m > 0)
            if num_batches_tracked is not None:
                num_batches_tracked.add_(learns)
            if rejected is not None and finite is not True:
                rejected.add_(not finite if isinstance(finite, bool) else ~finite)
            alpha = _share_of_batch(momentum, num_batches_tracked, mean.dtype)
            r, d = _correct_and_move(
                running_mean, running_var, mean, var, m, alpha, eps, r_max, d_max, stat, learns
            )
        record = Record(mean, var, r, d, m)
        if replayable:
            remember(running_mean, record)

    mean, var, r, d, m = record
    if isinstance(m, Tensor) and group is not None:
        return transform_joined(input, weight, bias, mean, var, r, d, eps, mask, m, group)
    return transform(input, weight, bias, mean, var, r, d, eps, mask)


def _correct_and_move(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    m: int | Tensor,
    alpha: float | Tensor,
    eps: float,
    r_max: float | Tensor,
    d_max: float | Tensor,
    stat: str,
    learns: bool | Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes r and d, then moves the running statistics, in place where their dtype allows.

    For the sigma-average, (sigma + step)^2 - eps is written as running_var + step * (2 sigma + step): the
    same number, without losing the digits of a running_var far below eps.
    """
    mu, old = running_mean.to(mean.dtype), running_var.to(mean.dtype)
    sigma, sigma_b = (old + eps).sqrt_(), (var + eps).sqrt_()
    if isinstance(learns, Tensor):
        mean, sigma_b = torch.where(learns, mean, mu), torch.where(learns, sigma_b, sigma)
    if isinstance(r_max, Tensor):
        r_max = r_max.to(mean.dtype)  # before it is inverted: 1 / 3 is not the same in float32
    r, d = sigma_b / sigma, (mean - mu).div_(sigma)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        r = kept_minimum(torch.clamp(r, min=1 / r_max), r_max)
        d = kept_minimum(torch.clamp(d, min=-d_max), d_max)
    else:
        r.clamp_(1 / r_max, r_max)  # type: ignore[arg-type]
        d.clamp_(-d_max, d_max)  # type: ignore[arg-type]
    if learns is False or (not isinstance(alpha, Tensor) and alpha == 0):
        return r, d  # nothing is to be learnt, and not a bit to be changed

    mu.lerp_(mean, alpha)
    if isinstance(m, Tensor):  # else the spread of a single value is ruled out below
        sigma_b, var = torch.where(m > 1, sigma_b, sigma), torch.where(m > 1, var * (m / (m - 1)), old)
    elif m > 1 and stat == "var":
        var = var * (m / (m - 1))
    if isinstance(m, Tensor) or m > 1:
        if stat == "var":
            old.lerp_(var if isinstance(learns, bool) else torch.where(learns, var, old), alpha)
        else:
            step = (sigma_b - sigma).mul_(alpha)
            old.addcmul_(step, torch.add(step, sigma, alpha=2)).clamp_(min=0)
    if mu is not running_mean:
        running_mean.copy_(mu)
        running_var.copy_(old)
    return r, d


def evaluate(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalises by the running statistics: :func:`torch.nn.functional.batch_norm` itself."""
    # The kernels want weight and bias in the dtype of the statistics; .half() leaves those in float32.
    if weight is not None and weight.dtype != running_mean.dtype:
        weight, bias = weight.to(running_mean.dtype), None if bias is None else bias.to(running_mean.dtype)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    return output if mask is None else output.masked_fill(~positions(mask, input), 0)


def _group_to_join(process_group: ProcessGroup | None) -> ProcessGroup | None:
    """The group, where there is anything to join; None otherwise."""
    if process_group is None or torch.distributed.get_world_size(process_group) == 1:
        return None
    return process_group


def _share_of_batch(
    momentum: float | None, num_batches_tracked: Tensor | None, dtype: torch.dtype
) -> float | Tensor:
    if momentum is not None:
        return momentum
    if num_batches_tracked is None:
        raise ValueError("momentum=None, a cumulative average, needs num_batches_tracked")
    return num_batches_tracked.clamp(min=1).to(dtype).reciprocal()


def _check(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    r_max: float | Tensor,
    d_max: float | Tensor,
    stat: str,
    eps: float,
) -> None:
    if input.dim() < 2:
        raise ValueError(f"expected an input of at least 2 dimensions (got {input.dim()}D input)")
    if running_mean is None or running_var is None:
        raise ValueError("batch_renorm needs running_mean and running_var: r and d are relative to them")
    if stat not in STATS:
        raise ValueError(f"stat must be one of {STATS} (got {stat!r})")
    if not eps > 0:
        raise ValueError(f"eps must be positive (got {eps})")
    check_limits(r_max, d_max)
    if torch._C._get_tracing_state():
        return  # sizes are tensors there
    channels = input.shape[1]
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, value in named.items():
        if value is not None and value.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {value.numel()}")


def check_limits(r_max: float | Tensor, d_max: float | Tensor) -> None:
    """Raises ValueError where a limit given as a number is out of range; tensors are not read."""
    if not isinstance(r_max, Tensor) and not r_max >= 1:
        raise ValueError(f"r_max must be at least 1 (got {r_max})")
    if not isinstance(d_max, Tensor) and not d_max >= 0:
        raise ValueError(f"d_max must be at least 0 (got {d_max})")
