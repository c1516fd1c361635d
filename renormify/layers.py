"""Batch Renorm layers: BatchNorm's state, BatchNorm's evaluation, the paper's training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from renormify.errors import RenormifyWarning
from renormify.functional import STATS, batch_renorm, check_limits, evaluate, is_proxy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "AnyBatchRenorm",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "Limited",
    "Renormalised",
    "bears_limits",
    "is_batch_renorm",
    "kept_whole",
]


def kept_whole(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """One node for the module, whatever the tracer, so that train() and eval() keep their meaning."""
    tracer = next(value for value in (*args, *kwargs.values()) if is_proxy(value)).tracer
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, args, kwargs)  # type: ignore[no-any-return]


def _is_captured(tensor: Tensor) -> bool:
    """Whether a transform of torch.func forbids to write to a tensor, which it has not been given."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


class Limited(nn.Module):
    """A module with limits on r and d, which may be set at any time.

    They are floats to whoever reads them, and float32 scalars to a compiled graph, which reads them from
    memory, so that moving them does not recompile it. They stay out of the state dict.
    """

    calls_batch_renorm = True
    _r_max: Tensor
    _d_max: Tensor

    def init_limits(self, r_max: float, d_max: float, device: torch.device | None = None) -> None:
        """Sets the limits for the first time.

        Raises:
            ValueError: for one out of range.
        """
        check_limits(r_max, d_max)
        self._limits = {"r_max": float(r_max), "d_max": float(d_max)}
        for name, limit in self._limits.items():
            self.register_buffer(f"_{name}", torch.full((), limit, device=device), persistent=False)

    @property
    def r_max(self) -> float:
        """The largest r, and the inverse of the smallest; at least 1."""
        return self._limits["r_max"]

    @r_max.setter
    def r_max(self, value: float) -> None:
        check_limits(value, 0.0)
        self._set_limit("r_max", value)

    @property
    def d_max(self) -> float:
        """The largest absolute d; at least 0."""
        return self._limits["d_max"]

    @d_max.setter
    def d_max(self, value: float) -> None:
        check_limits(1.0, value)
        self._set_limit("d_max", value)

    def _set_limit(self, name: str, value: float) -> None:
        self._limits[name] = float(value)
        self._buffers[f"_{name}"].fill_(value)  # type: ignore[union-attr]

    def limits(self) -> dict[str, Any]:
        """The limits, as a step takes them."""
        compiling = torch.compiler.is_compiling()
        return {
            "r_max": self._r_max if compiling else self.r_max,
            "d_max": self._d_max if compiling else self.d_max,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Limited:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._settle_limits(self._r_max.device)
        return self

    def _settle_limits(self, device: torch.device) -> None:
        """Puts the limits where they belong, whatever a cast has made of them."""
        for name, limit in self._limits.items():
            moved = self._buffers[f"_{name}"]
            if moved is None or moved.dtype != torch.float32 or moved.device != device:
                moved = torch.empty((), device=device)
            self._buffers[f"_{name}"] = moved.fill_(limit)


class Renormalised(Limited):
    """What Batch Renorm adds to a module that holds running statistics; none of it enters the state dict.

    Its limits, the count of rejected batches, and the training step itself. The layers below derive from it,
    and so do the classes that a BatchNorm class of someone else's is given (see
    :mod:`renormify.counterparts`).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None
    eps: float
    momentum: float | None
    _rejected: Tensor

    def init_renorm(self, r_max: float, d_max: float, stat: str) -> None:
        """Sets what Batch Renorm has beyond BatchNorm's state; none of it enters the state dict.

        Raises:
            ValueError: for an unknown ``stat`` or limits out of range.
        """
        if stat not in STATS:
            raise ValueError(f"stat must be one of {STATS} (got {stat!r})")
        device = self.running_mean.device
        self.init_limits(r_max, d_max, device)
        self.stat = stat
        self._warned: frozenset[str] = frozenset()
        rejected = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("_rejected", rejected, persistent=False)

    def end_renorm(self) -> None:
        """Takes away what :meth:`init_renorm` added."""
        for name in ("_r_max", "_d_max", "_rejected"):
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        for name in ("stat", "_limits", "_warned"):
            del self.__dict__[name]

    @property
    def rejected_batches(self) -> Tensor:
        """How many batches held inf or NaN and so left the statistics alone: an int64 scalar."""
        return self._rejected

    def renormalise(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None = None,
        eps: float | None = None,
        num_batches_tracked: Tensor | None = None,
    ) -> Tensor:
        """A training step: normalises ``input`` by the corrected batch, and moves the running statistics.

        ``eps`` and ``num_batches_tracked`` are the layer's own unless given.
        """
        count = self._buffers.get("num_batches_tracked")
        self.keep_statistics_in_float32()
        self._warn_of_few_values(input)
        return batch_renorm(
            input,
            self.running_mean,
            self.running_var,
            weight,
            bias,
            True,
            self.momentum,
            self.eps if eps is None else eps,
            **self.limits(),
            stat=self.stat,
            mask=mask,
            num_batches_tracked=count if num_batches_tracked is None else num_batches_tracked,
            rejected=None if _is_captured(self._rejected) else self._rejected,
            process_group=self._process_group(),
        )

    def _process_group(self) -> ProcessGroup | None:
        return None

    def keep_statistics_in_float32(self) -> None:
        """In half precision they would stand still: a step of momentum 0.01 is below its rounding."""
        if self.running_mean.dtype.itemsize < 4:
            self.running_mean = self.running_mean.float()
            self.running_var = self.running_var.float()

    def _warn_of_few_values(self, input: Tensor) -> None:
        if not 0 < input.numel() <= 2 * len(self.running_mean) or torch.compiler.is_compiling():
            return
        if self._process_group() is not None:
            return  # the others' batches count too, and only the device knows them
        m = input.numel() // len(self.running_mean)
        effect = "its output does not depend on the input" if m == 1 else "the gradient all but vanishes"
        self._warn_once(
            "few values",
            f"{type(self).__name__} trains on {m} value{'s' * (m > 1)} per channel: {effect}. "
            "Use larger batches or inputs, or freeze this layer's statistics.",
        )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned |= {kind}
            warnings.warn(message, RenormifyWarning, stacklevel=3)

    def train(self, mode: bool = True) -> Renormalised:
        """Sets the mode; on leaving training, warns of rejected batches: here the host may look."""
        readable = type(self._rejected) is Tensor and not self._rejected.is_meta  # a fake tensor has no value
        if self.training and not mode and readable and int(self._rejected) > 0:
            self._warn_once(
                "rejected",
                f"{type(self).__name__} saw inf or NaN in {int(self._rejected)} batches; "
                "they left its running statistics as they were.",
            )
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Renormalised:
        """Moves and casts as any module, but statistics and limits stay in float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in ("running_mean", "running_var"):
            old, new = before[name], self._buffers[name]
            if old is not None and new is not None and new.dtype.itemsize < 4 <= old.dtype.itemsize:
                self._buffers[name] = old.to(new.device, torch.float32)
        self._settle(before["_rejected"])
        return self

    def _settle(self, rejected: Tensor | None) -> None:
        """Puts limits and count where the statistics are, whatever a cast has made of them."""
        device = self.running_mean.device
        self._settle_limits(device)
        count = torch.zeros((), dtype=torch.int64, device=device)
        self._rejected = count if rejected is None or rejected.is_meta else count.copy_(rejected)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._settle(self._rejected)  # with assign=True the statistics may have left the meta device


class _BatchRenorm(Renormalised, _NormBase):
    """What the layers share; a leaf says only which inputs it takes.

    Derived from ``_NormBase`` and not from ``_BatchNorm``: ``convert_sync_batchnorm`` turns every instance of
    the latter into a plain SyncBatchNorm without a word.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        stat: str = "sigma",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias)
        self.keep_statistics_in_float32()
        self.init_renorm(r_max, d_max, stat)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises ``input``; see :func:`renormify.functional.batch_renorm` for ``mask``."""
        if is_proxy(input):
            return kept_whole(self, *((input,) if mask is None else (input, mask)))
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if self.training:
            return self.renormalise(input, self.weight, self.bias, mask)
        return evaluate(input, self.running_mean, self.running_var, self.weight, self.bias, self.eps, mask)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, r_max={self.r_max}, d_max={self.d_max}, stat={self.stat!r}"
        )


_DOC = r"""Applies Batch Renormalization over a {dims} input.

    Method described in the paper `Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models <https://arxiv.org/abs/1702.03275>`__ (Ioffe, 2017), Algorithm 1.

    .. math::

        y = \gamma \left( \frac{{x - \mu_B}}{{\sigma_B}} r + d \right) + \beta, \quad
        r = \mathrm{{clip}}\left(\frac{{\sigma_B}}{{\sigma}}, \frac{{1}}{{r_{{max}}}}, r_{{max}}\right), \quad
        d = \mathrm{{clip}}\left(\frac{{\mu_B - \mu}}{{\sigma}}, -d_{{max}}, d_{{max}}\right)

    in training, with r and d held constant in the gradient; in evaluation it is BatchNorm,
    :func:`torch.nn.functional.batch_norm` on the running statistics. The state dict is BatchNorm's too:
    ``weight``, ``bias``, ``running_mean``, ``running_var`` (:math:`\sigma^2 - \epsilon`) and
    ``num_batches_tracked``, and loads strictly in both directions. ``r_max`` and ``d_max`` are attributes
    that may be set at any time.

    Args:
        num_features: number of channels :math:`C` of the input.
        eps: a value added to the variance inside the root. Default: 1e-5
        momentum: the share :math:`\alpha` of each batch in the running statistics, or None for a cumulative
            average. Default: 0.01, the paper's
        affine: whether the layer has a learnable ``weight`` and ``bias``. Default: True
        bias: with ``affine``, whether it has the ``bias``. Default: True
        r_max: at least 1; 1 with ``d_max=0`` is BatchNorm. Default: 3.0
        d_max: at least 0. Default: 5.0
        stat: ``"sigma"`` averages :math:`\sigma_B`, the paper's rule; ``"var"`` the unbiased variance, as
            torch's BatchNorm does, for training with very few values per channel. Default: ``"sigma"``
        device: where parameters and statistics live.
        dtype: of parameters and statistics.

    Shape:
        - Input: {shape}
        - Output: the input's shape and dtype

    Raises:
        ValueError: for limits out of range, an unknown ``stat``, or an input of other dimensions.

    Examples::

        >>> layer = {name}(100)
        >>> layer.r_max = 2.0
        >>> output = layer(torch.randn({example}))
    """


def _documented(dims: str, shape: str, example: str) -> Callable[[type], type]:
    def document(cls: type) -> type:
        cls.__doc__ = _DOC.format(dims=dims, shape=shape, example=example, name=cls.__name__)
        return cls

    return document


def bears_limits(module: nn.Module) -> TypeGuard[Renormalised]:
    """Whether ``r_max`` and ``d_max`` of a module are those of Batch Renorm: a layer's, or of its calls."""
    # Not asked of the instance: one that hands on what it lacks would answer for another.
    return "calls_batch_renorm" in vars(module) or hasattr(type(module), "calls_batch_renorm")


def is_batch_renorm(module: nn.Module) -> TypeGuard[Renormalised]:
    """Whether a module is a Batch Renorm layer, or one that was given its ways."""
    return isinstance(module, Renormalised)


class AnyBatchRenorm(_BatchRenorm):
    """Takes any input of two dimensions or more: for classes that check their input themselves."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")


@_documented("2D or 3D", ":math:`(N, C)` or :math:`(N, C, L)`", "20, 100")
class BatchRenorm1d(_BatchRenorm):  # noqa: D101
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3):
            raise ValueError(f"expected 2D or 3D input (got {input.dim()}D input)")


@_documented("4D", ":math:`(N, C, H, W)`", "20, 100, 35, 45")
class BatchRenorm2d(_BatchRenorm):  # noqa: D101
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")


@_documented("5D", ":math:`(N, C, D, H, W)`", "20, 100, 35, 45, 10")
class BatchRenorm3d(_BatchRenorm):  # noqa: D101
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 5:
            raise ValueError(f"expected 5D input (got {input.dim()}D input)")
