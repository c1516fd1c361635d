r"""The Batch Renorm layers of others: what their files hold, what their evaluation computes, where they fail.

Each of them evaluates an affine function of its input, one for each channel,

.. math:: y = w \frac{x - \mu}{\sigma} + b,

and so does BatchNorm, with :math:`\sigma^2` = ``running_var + eps``. A peer is a small class that says which
of its tensors are :math:`\mu`, :math:`\sigma`, w and b, and nothing of it needs the peer's package. Its
faults are in training, in the file, or in how :math:`\sigma` came about; what each has done to a layer is
told in numbers as far as the file tells them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from renormify.translation import Affine, Mend, Norm, Peer

__all__ = ["PEERS"]


class TorchRL(Peer):
    r"""``torchrl.modules.BatchRenorm1d``: BatchNorm's five names and, in evaluation, BatchNorm.

    .. math:: \sigma^2 = \mathrm{running\_var} + \epsilon

    Only torch's record of versions tells it from BatchNorm: 2 there, 1 here. ``running_var`` averages
    :math:`\frac{N}{N - 1} \sigma_B^2`, with N the samples and not the values of a channel; it is taken as it
    is, as evaluation takes it.
    """

    name = "torchrl"
    package = "torchrl"
    keys = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
    marks = ()
    eps = 1e-5
    counter = "num_batches_tracked"
    _WARMUP = 10_000  # the package's default; the file does not hold the layer's own

    def recognises(self, tensors: Mapping[str, Tensor], version: int | None) -> bool:
        return version == 1 and set(self.keys) <= set(tensors)

    def affine(self, norm: Norm) -> Affine:
        return Affine(
            norm.vector("running_mean"),
            norm.vector("running_var"),
            norm.eps,
            norm.vector("weight"),
            norm.vector("bias"),
            int(norm.tensors["num_batches_tracked"]),
        )

    def mends(self, norm: Norm) -> tuple[Mend, ...]:
        return (
            Mend(
                "training",
                "the warm-up factor grows to 2, 3, ... after 2, 3, ... times warmup_steps, so that r leaves "
                "its limits and can become negative",
                "r stays within 1/r_max and r_max, d within d_max",
                float(int(norm.tensors["num_batches_tracked"]) // self._WARMUP),
                f"the factor by now, for the default warmup_steps={self._WARMUP}",
            ),
            Mend(
                "training",
                "the variance is multiplied by N/(N - 1) for N samples, however many values each has; at "
                "N = 1 it becomes inf",
                "sigma of the batch is averaged, with the biased variance, and left alone at one value",
            ),
            Mend(
                "use",
                "float16 inputs give inf or NaN statistics; gradients change under activation checkpointing; "
                "symbolic tracing fails",
                "statistics are float32; the second forward is that of the first; the layer is one node",
            ),
        )

    def remedy(self, key: str) -> str:
        if key != "running_var":
            return super().remedy(key)
        return "a batch of one sample makes it so, as torchrl divides by N - 1: take an earlier checkpoint"


class SB3(Peer):
    r"""``sb3_contrib.common.torch_layers.BatchRenorm1d``, as CrossQ has it.

    .. math:: \sigma^2 = \mathrm{ra\_var} + \epsilon

    After warm-up, training divides by the root of :math:`\sigma_B'^2 / r^2 + \epsilon`, where r has eps
    already and :math:`\sigma_B'^2` has not: what should be :math:`v + \epsilon` for the running variance v is
    up to :math:`v + 2 \epsilon`.
    """

    name = "sb3"
    package = "sb3-contrib"
    keys = ("ra_mean", "ra_var", "steps", "scale", "bias")
    marks = ("ra_mean", "ra_var")
    eps = 1e-3
    counter = "steps"

    def affine(self, norm: Norm) -> Affine:
        return Affine(
            norm.vector("ra_mean"),
            norm.vector("ra_var"),
            norm.eps,
            norm.vector("scale"),
            norm.vector("bias"),
            int(norm.tensors["steps"]),
        )

    def mends(self, norm: Norm) -> tuple[Mend, ...]:
        variance = norm.vector("ra_var")
        twice = ((variance + 2 * norm.eps) / (variance + norm.eps)).sqrt() - 1
        return (
            Mend(
                "training",
                "eps is added twice after warm-up, to r and under the root",
                "once, inside the root of sigma",
                float(twice.max()),
                "by how much the output of a wide batch was too small",
            ),
            Mend(
                "training",
                "the batch is normalised by its unbiased variance",
                "by the biased variance, as in the paper",
            ),
            Mend(
                "settings",
                "r_max = 3 and d_max = 5 are fixed in code, and come into force at once after warm-up",
                "r_max and d_max are attributes of the layer",
            ),
            Mend(
                "use",
                "3D input raises; gradients change under activation checkpointing; fullgraph compiling fails",
                "BatchRenorm1d takes 2D and 3D input; the second forward is that of the first; it compiles",
            ),
        )


class Avalanche(Peer):
    r"""``avalanche.models.batch_renorm.BatchRenorm2D``: ``gamma`` and ``beta`` of shape (1, C, 1, 1).

    .. math:: \sigma = \mathrm{running\_avg\_std}

    with no eps in evaluation. The average itself is of :math:`\sqrt{\sigma_B^2 + \epsilon}`, from 0; but
    ``replace_bn_with_brn`` sets it to the root of ``running_var``, without BatchNorm's eps. The two
    statistics are plain attributes, which a state dict does not have: they must have been saved beside it.
    """

    name = "avalanche"
    package = "Avalanche"
    keys = ("running_avg_mean", "running_avg_std", "gamma", "beta")
    marks = ("running_avg_mean", "running_avg_std")
    eps = 1e-5

    def recognises(self, tensors: Mapping[str, Tensor], version: int | None) -> bool:
        if super().recognises(tensors, version):
            return True
        # Others call their parameters so too, but give them another shape.
        shapes = {tuple(tensors[key].shape) for key in ("gamma", "beta") if key in tensors}
        return "beta" in tensors and len(shapes) == 1 and _is_channels_of_images(*shapes)

    def affine(self, norm: Norm) -> Affine:
        return Affine(
            norm.vector("running_avg_mean"),
            norm.vector("running_avg_std").square(),
            0.0,
            norm.vector("gamma"),
            norm.vector("beta"),
            None,
        )

    def mends(self, norm: Norm) -> tuple[Mend, ...]:
        with_eps = (1 + norm.eps / norm.vector("running_avg_std").square()).sqrt() - 1
        return (
            Mend(
                "evaluation",
                "replace_bn_with_brn leaves BatchNorm's eps out of sigma, which changes the outputs",
                "sigma is kept as it is, so that evaluation is as in Avalanche; a BatchNorm given to "
                "renormify convert stays what it was",
                float(with_eps.max()),
                "by how much that made the output too large, if the layer was replaced and not trained since",
            ),
            Mend(
                "file",
                "running_avg_mean and running_avg_std are no buffers, and a state dict loses them",
                "running_mean and running_var are buffers",
            ),
            Mend(
                "use",
                "gradients change under activation checkpointing; there is no layer for 1D",
                "the second forward is that of the first; BatchRenorm1d, 2d and 3d",
            ),
        )

    def remedy(self, key: str) -> str:
        if key not in self.marks:
            return super().remedy(key)
        return (
            "Avalanche keeps its statistics out of the state dict, where a file has lost them. Where the "
            "model still is (loaded, or in a file that you trust), save: model.state_dict() | "
            "{f'{n}.{k}': v for n, m in model.named_modules() for k, v in vars(m).items() "
            "if k.startswith('running_avg')}"
        )


class Ludvb(Peer):
    r"""``batchrenorm.BatchRenorm1d/2d/3d`` of ludvb/batchrenorm.

    .. math:: \sigma = \mathrm{running\_std}

    the average of :math:`\mathrm{std}_B + \epsilon`: eps stands outside the root, and so a dead channel has
    :math:`\sigma^2 = \epsilon^2`, far below the eps of others. The best eps for a layer of ours is therefore
    theirs squared.
    """

    name = "ludvb"
    package = "ludvb/batchrenorm"
    keys = ("running_mean", "running_std", "num_batches_tracked", "weight", "bias")
    marks = ("running_std",)
    eps = 1e-3
    counter = "num_batches_tracked"

    def best_eps(self, norm: Norm) -> float:
        return norm.eps**2

    def affine(self, norm: Norm) -> Affine:
        return Affine(
            norm.vector("running_mean"),
            norm.vector("running_std").square(),
            0.0,
            norm.vector("weight"),
            norm.vector("bias"),
            int(norm.tensors["num_batches_tracked"]),
        )

    def mends(self, norm: Norm) -> tuple[Mend, ...]:
        sigma = norm.vector("running_std")
        inside = ((sigma - norm.eps).clamp(min=0).square() + self.best_eps(norm)).sqrt()
        return (
            Mend(
                "training",
                "eps is added to the standard deviation",
                "inside the root; sigma is kept as it is, so that evaluation is as theirs, and moves on",
                float((sigma / inside - 1).abs().max()),
                f"by how much their sigma of the same batch is the larger, for eps={norm.eps:g}",
            ),
            Mend(
                "file",
                "running_std is a name of its own, and BatchNorm's files do not load",
                "running_var = running_std^2 - eps, BatchNorm's name and meaning",
            ),
            Mend(
                "use",
                "pickling, fullgraph compilation and symbolic tracing fail",
                "the layer pickles and compiles, and is one node of a trace",
            ),
        )


class Keras(Peer):
    r"""``keras.layers.BatchNormalization(renorm=True)``.

    .. math:: \sigma^2 = \mathrm{moving\_variance} + \epsilon

    with ``moving_variance`` = ``moving_stddev``\ :sup:`2` - eps, not below 0. Training has statistics of its
    own, ``renorm_mean`` and ``renorm_stddev``, with another momentum, and its r and d are relative to those.
    """

    name = "keras"
    package = "Keras"
    keys = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
    marks = ("moving_stddev", "renorm_mean", "renorm_stddev")
    eps = 1e-3

    def affine(self, norm: Norm) -> Affine:
        return Affine(
            norm.vector("moving_mean"),
            norm.vector("moving_variance"),
            norm.eps,
            norm.optional("gamma"),
            norm.optional("beta"),
            None,
        )

    def mends(self, norm: Norm) -> tuple[Mend, ...]:
        sigma = self.affine(norm).sigma
        apart = torch.maximum(
            (norm.vector("renorm_mean") - norm.vector("moving_mean")).abs() / sigma,
            (norm.vector("renorm_stddev") / sigma - 1).abs(),
        )
        clipping = dict(norm.settings.get("renorm_clipping") or {})
        limits = ", ".join(f"{key}={value:.4g}" for key, value in clipping.items() if _is_number(value))
        return (
            Mend(
                "training",
                "r and d are relative to renorm_mean and renorm_stddev, and evaluation to other averages",
                "both to running_mean and running_var; renorm_mean and renorm_stddev are left out",
                float(apart.max()),
                "how far apart the two were, in sigma",
            ),
            Mend(
                "settings",
                f"r and d are limited by {limits}"
                if limits
                else "r and d have no limits that the file tells",
                "r_max and d_max are attributes of the layer: 3 and 5 unless set",
            ),
        )


def _is_channels_of_images(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[0] == shape[2] == shape[3] == 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


PEERS: Mapping[str, Peer] = {peer.name: peer for peer in (TorchRL(), SB3(), Avalanche(), Ludvb(), Keras())}
