"""Batch Renormalization in float64 NumPy, line by line from the paper (arXiv 1702.03275).

Algorithm 1 for the forward and the averages, section 3 for the gradients. It shares no code and no algebra
with the package: the state is (mu, sigma) itself, not a running variance, and the formulas stand as printed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Step:
    """What one training step gives, and which channels were clipped in it."""

    y: Array
    dx: Array
    dgamma: Array
    dbeta: Array
    r: Array
    d: Array
    clipped_r: NDArray[np.bool_]
    clipped_d: NDArray[np.bool_]


@dataclass
class Oracle:
    """The state of one layer; ``stat`` says what is averaged, sigma or the unbiased variance."""

    mu: Array
    sigma: Array
    alpha: float
    eps: float = 1e-5
    r_max: float = 3.0
    d_max: float = 5.0
    stat: str = "sigma"

    def train(
        self,
        x: Array,
        dy: Array,
        gamma: Array | None = None,
        beta: Array | None = None,
        mask: NDArray[np.bool_] | None = None,
    ) -> Step:
        """One step on x of shape (N, C, *), with dy the gradient at y; mask is over (N, *)."""
        channels = x.shape[1]
        gamma = np.ones(channels) if gamma is None else gamma
        beta = np.zeros(channels) if beta is None else beta
        everywhere = np.moveaxis(x, 1, -1).reshape(-1, channels)
        gradient = np.moveaxis(dy, 1, -1).reshape(-1, channels)
        valid = np.ones(len(everywhere), bool) if mask is None else mask.reshape(-1)
        v, g = everywhere[valid], gradient[valid]
        m = len(v)
        if m == 0:
            zero = np.zeros(channels)
            return Step(
                np.zeros_like(x), np.zeros_like(x), zero, zero, zero + 1, zero, zero > 0, zero > 0
            )  # fmt: skip

        mu_b = v.mean(0)
        sigma_b = np.sqrt(self.eps + ((v - mu_b) ** 2).mean(0))
        r = np.clip(sigma_b / self.sigma, 1 / self.r_max, self.r_max)
        d = np.clip((mu_b - self.mu) / self.sigma, -self.d_max, self.d_max)
        x_hat = (v - mu_b) / sigma_b * r + d
        y = gamma * x_hat + beta

        dx_hat = g * gamma
        dsigma_b = (dx_hat * (v - mu_b) * (-r / sigma_b**2)).sum(0)
        dmu_b = (dx_hat * (-r / sigma_b)).sum(0)
        dx = dx_hat * r / sigma_b + dsigma_b * (v - mu_b) / (m * sigma_b) + dmu_b / m
        dgamma = (g * x_hat).sum(0)
        dbeta = g.sum(0)

        clipped_r = (sigma_b / self.sigma > self.r_max) | (sigma_b / self.sigma < 1 / self.r_max)
        clipped_d = np.abs(mu_b - self.mu) / self.sigma > self.d_max
        self.mu = self.mu + self.alpha * (mu_b - self.mu)
        if m > 1:
            self.sigma = self._moved(v, sigma_b, m)
        return Step(
            self._in_place(y, valid, x.shape),
            self._in_place(dx, valid, x.shape),
            dgamma,
            dbeta,
            r,
            d,
            clipped_r,
            clipped_d,
        )

    def _moved(self, v: Array, sigma_b: Array, m: int) -> Array:
        if self.stat == "sigma":
            return self.sigma + self.alpha * (sigma_b - self.sigma)
        variance = self.sigma**2 - self.eps
        unbiased = ((v - v.mean(0)) ** 2).sum(0) / (m - 1)
        return np.sqrt(variance + self.alpha * (unbiased - variance) + self.eps)

    @staticmethod
    def _in_place(values: Array, valid: NDArray[np.bool_], shape: tuple[int, ...]) -> Array:
        """The (m, C) values back at their positions in (N, C, *), zero elsewhere."""
        flat = np.zeros((len(valid), values.shape[1]))
        flat[valid] = values
        return np.moveaxis(flat.reshape(shape[0], *shape[2:], shape[1]), -1, 1)

    def infer(self, x: Array, gamma: Array | None = None, beta: Array | None = None) -> Array:
        """Inference: gamma * (x - mu) / sigma + beta."""
        shape = (1, -1, *(1,) * (x.ndim - 2))
        y = (x - self.mu.reshape(shape)) / self.sigma.reshape(shape)
        if gamma is not None:
            y = y * gamma.reshape(shape)
        return y if beta is None else y + beta.reshape(shape)
