"""Batch Renorm across processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from renormify.layers import AnyBatchRenorm, Renormalised

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SyncBatchRenorm", "Synchronised"]


class Synchronised(Renormalised):
    """Joins the batches of a group of processes, where one is initialised."""

    process_group: ProcessGroup | None

    def _process_group(self) -> ProcessGroup | None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        return self.process_group or torch.distributed.group.WORLD


class SyncBatchRenorm(Synchronised, AnyBatchRenorm):
    """Batch Renormalization over the joined batches of all processes of a group, on any backend and device.

    Outputs, gradients and statistics are those of one process with the joined batch; the processes' batches
    may be unequal, or empty. Without an initialised process group it normalises its own batch. In evaluation
    nothing is exchanged.

    Args:
        num_features: see :class:`BatchRenorm2d`, and so for what is not named here.
        eps: a value added to the variance inside the root. Default: 1e-5
        momentum: the share of each batch in the running statistics. Default: 0.01
        affine: whether the layer has a learnable ``weight`` and ``bias``. Default: True
        process_group: the processes to join. Default: all

    Shape:
        - Input: :math:`(N, C, *)`, of at least two dimensions
        - Output: the input's shape and dtype

    Raises:
        ValueError: as :class:`BatchRenorm2d`.
    """

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
        process_group: ProcessGroup | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            bias=bias,
            r_max=r_max,
            d_max=d_max,
            stat=stat,
            device=device,
            dtype=dtype,
        )
        self.process_group = process_group
