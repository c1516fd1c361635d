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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from renormify.collectives import join_statistics, transform_joined
from renormify.kernels import Record, are_finite, batch_statistics, native_kernels_serve, positions, transform
from renormify.replay import find_record, kept_minimum, may_be_replayed, remember, unseen_by_policies

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["STATS", "batch_renorm"]

STATS = ("sigma", "var")
"""What is averaged over the batches: the paper's sigma, or the unbiased variance of torch's BatchNorm."""


def is_proxy(*inputs: object) -> bool:
    """Whether an FX tracer is asking."""
    return any(isinstance(input, torch.fx.Proxy) for input in inputs)


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
    if is_proxy(input):
        return _recorded(input, dict(locals()))
    _check(input, running_mean, running_var, weight, bias, r_max, d_max, stat, eps)
    group = _group_to_join(process_group) if training and process_group is not None else None
    if not training or (input.numel() == 0 and group is None):
        return evaluate(input, running_mean, running_var, weight, bias, eps, mask)

    native = native_kernels_serve(input)
    compiling = not native and torch.compiler.is_compiling()
    record = None if compiling else find_record(running_mean)
    if record is None:
        statistics = _Statistics(
            running_mean, running_var, num_batches_tracked, rejected, momentum, eps, r_max, d_max, stat
        )
        replayable = not compiling and may_be_replayed()
        with unseen_by_policies() if replayable else _NOTHING:
            if native and mask is None and group is None and _host_serves(input, statistics):
                record = _step_on_host(input.detach(), statistics)
            else:
                # Forward-mode AD looks through no_grad; a compiler does not need to be told twice.
                source = input if compiling else input.detach()
                record = _step(source, statistics, native, mask, group)
        if replayable:
            remember(running_mean, record)
    if group is not None:
        return transform_joined(input, weight, bias, record, eps, mask, group)
    return transform(input, weight, bias, record, eps, native, mask)


_NOTHING = nullcontext()


def _recorded(input: Any, arguments: dict[str, Any]) -> Tensor:
    """One node for the function, with all its arguments."""
    return input.tracer.create_proxy("call_function", batch_renorm, (), arguments)  # type: ignore[no-any-return]


class _Statistics(NamedTuple):
    """The running statistics, and how a batch is corrected by them and moves them."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    rejected: Tensor | None
    momentum: float | None
    eps: float
    r_max: float | Tensor
    d_max: float | Tensor
    stat: str


def _host_serves(input: Tensor, running: _Statistics) -> bool:
    """Whether looking at a number costs nothing, and the statistics are as the kernels compute them."""
    return (
        input.is_cpu
        and torch._C._len_torch_dispatch_stack() == 0  # else something records, or there are no numbers
        and not torch._C._get_tracing_state()
        and running.momentum is not None
        and running.mean.dtype == running.var.dtype == torch.promote_types(input.dtype, torch.float32)
        and not isinstance(running.r_max, Tensor)
        and not isinstance(running.d_max, Tensor)
    )


def _step_on_host(input: Tensor, running: _Statistics) -> Record:
    """:func:`_step` with as few operations as it takes, for the case that nearly every batch is.

    On small inputs they, and not the passes over the input, are what Batch Renorm costs.
    """
    mean, var, m = batch_statistics(input, native=True)
    eps, alpha = running.eps, running.momentum
    assert alpha is not None, "else _host_serves() does not let it pass"
    sigma, sigma_b = (running.var + eps).sqrt_(), (var + eps).sqrt_()
    if not are_finite(mean, var):
        if running.rejected is not None:
            running.rejected.add_(1)
        return Record(mean, var, sigma_b.reciprocal_(), torch.ones_like(mean), torch.zeros_like(mean), m)

    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)
    r_max, d_max = float(running.r_max), float(running.d_max)
    r = (sigma_b / sigma).clamp_(1 / r_max, r_max)
    d = (mean - running.mean).div_(sigma).clamp_(-d_max, d_max)
    if alpha != 0:  # else not a bit is to be changed
        running.mean.lerp_(mean, alpha)
    if alpha != 0 and m > 1:  # the spread of a single value says nothing
        if running.stat == "var":
            running.var.lerp_(var * (m / (m - 1)), alpha)
        elif alpha <= 0.5:
            step = sigma_b - sigma
            running.var.addcmul_(step, sigma.add_(step, alpha=alpha / 2), value=2 * alpha).clamp_(min=0)
        else:
            running.var.copy_(_moved_variance(running.var, var, sigma, sigma_b, alpha))
    return Record(mean, var, sigma_b.reciprocal_(), r, d, m)


@torch.no_grad()
def _step(
    input: Tensor, running: _Statistics, native: bool, mask: Tensor | None, group: ProcessGroup | None
) -> Record:
    """Computes r and d of a batch, then moves the running statistics in place; nothing waits for a device."""
    mean, var, m = batch_statistics(input, native, mask)
    if group is not None:
        mean, var, m = join_statistics(mean, var, m, group)
    finite = torch.isfinite(mean + var).all()
    learns = finite & (m > 0)
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(learns)
    if running.rejected is not None:
        running.rejected.add_(~finite)

    eps, r_max, d_max = running.eps, running.r_max, running.d_max
    mu, old = running.mean.to(mean.dtype), running.var.to(mean.dtype)
    sigma = (old + eps).sqrt()
    sigma_b = torch.where(learns, (var + eps).sqrt(), sigma)
    if isinstance(r_max, Tensor):
        r_max = r_max.to(mean.dtype)  # before it is inverted: 1 / 3 is not the same in float32
    r, d = sigma_b / sigma, (torch.where(learns, mean, mu) - mu) / sigma
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        r = kept_minimum(torch.clamp(r, min=1 / r_max), r_max)
        d = kept_minimum(torch.clamp(d, min=-d_max), d_max)
    else:
        r, d = r.clamp(1 / r_max, r_max), d.clamp(-d_max, d_max)  # type: ignore[arg-type]

    alpha = _share_of_batch(running, mean.dtype)
    if isinstance(alpha, Tensor) or alpha != 0:  # else not a bit is to be changed
        alone = not isinstance(m, Tensor) and m == 1  # then neither average is kept, and one would fail
        if running.stat == "sigma" or alone:
            moved = _moved_variance(old, var, sigma, sigma_b, alpha)
        else:
            moved = old.lerp(var * (m / (m - 1)), alpha)
        running.mean.copy_(torch.where(learns, mu.lerp(mean, alpha), mu))
        running.var.copy_(torch.where(learns & (m > 1), moved, old))
    return Record(mean, var, (var + eps).rsqrt(), r, d, m)


def _moved_variance(
    old: Tensor, var: Tensor, sigma: Tensor, sigma_b: Tensor, alpha: float | Tensor
) -> Tensor:
    """The square of the averaged sigma, less eps, without losing the digits of a variance far below eps.

    (sigma + step)^2 - eps is old + step * (2 sigma + step), and likewise from the batch's side; the nearer of
    the two is taken, since the difference of what is far apart has no digits left.
    """
    forth, back = (sigma_b - sigma) * alpha, (sigma - sigma_b) * (1 - alpha)
    from_old, from_batch = old + forth * (2 * sigma + forth), var + back * (2 * sigma_b + back)
    if isinstance(alpha, Tensor):
        return torch.where(alpha > 0.5, from_batch, from_old).clamp(min=0)
    return (from_batch if alpha > 0.5 else from_old).clamp(min=0)


def _group_to_join(process_group: ProcessGroup) -> ProcessGroup | None:
    """The group, where there is anything to join; None otherwise."""
    return None if torch.distributed.get_world_size(process_group) == 1 else process_group


def _share_of_batch(running: _Statistics, dtype: torch.dtype) -> float | Tensor:
    if running.momentum is not None:
        return running.momentum
    if running.num_batches_tracked is None:
        raise ValueError("momentum=None, a cumulative average, needs num_batches_tracked")
    return running.num_batches_tracked.clamp(min=1).to(dtype).reciprocal()


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
    for value in (running_mean, running_var, weight, bias):
        if value is not None and value.numel() != channels:
            named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
            name = next(name for name, other in named.items() if other is value)
            raise RuntimeError(f"{name} should contain {channels} elements not {value.numel()}")


def check_limits(r_max: float | Tensor, d_max: float | Tensor) -> None:
    """Raises ValueError where a limit given as a number is out of range; tensors are not read."""
    if not isinstance(r_max, Tensor) and not r_max >= 1:
        raise ValueError(f"r_max must be at least 1 (got {r_max})")
    if not isinstance(d_max, Tensor) and not d_max >= 0:
        raise ValueError(f"d_max must be at least 0 (got {d_max})")
