"""Second-order total generalised variation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jbilevel import prox
from jbilevel.operators.differences import Gradient, forward_difference
from jbilevel.regularizers.base import Regularizer, require_theta
from jbilevel.regularizers.images import require_image
from jbilevel.regularizers.saddle_blocks import SaddleBlocks

_ROOT = math.sqrt(2.0)


@dataclass(frozen=True)
class TGV(Regularizer):
    """R(theta, x) = min_w e^{theta_0} sum |D x - w|_2 + e^{theta_1} sum |E w|_F, sums over pixels.

    Second-order total generalised variation (Bredies, Kunisch & Pock 2010, bredies_tgv_2010): piecewise affine images
    instead of piecewise constant ones; R = 0 for affine ones. D takes forward differences, so w_1 and w_2 live on the
    edges between pixels. E w = (D w + (D w)^T)/2 differentiates them once more, the diagonal at pixels and the mixed
    entry, which |.|_F counts twice, at corners between them; only where all edges exist. Not smooth:
    `jbilevel.variational` makes a `SaddleProblem` of it.

    theta has shape (2,); x has shape (H, W), any float dtype; ValueError otherwise.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> ramp = jnp.tile(jnp.arange(8.0), (8, 1)) / 8
    >>> slope = jnp.stack([jnp.zeros((8, 8)), jnp.full((8, 8), 1 / 8)])
    >>> blocks = TGV().saddle(TGV().init())
    >>> [float(jnp.max(jnp.abs(part))) for part in blocks.linear(ramp, slope)]  # D x - w and E w: a ramp costs nothing
    [0.0, 0.0]
    >>> problem = jb.variational(None, TGV())  # a SaddleProblem
    """

    form: ClassVar[str] = "saddle"

    def init(self, key=None, *, weight: float = 0.075, ratio: float = 2.0, dtype=None):
        """Weights weight and ratio*weight; deterministic (key is ignored)."""
        return jnp.log(jnp.asarray([weight, ratio * weight], dtype or jnp.result_type(float)))

    def __call__(self, params, x):
        raise TypeError("TGV is itself a minimum over other unknowns: `variational` solves for them with x.")

    def check(self, params) -> None:
        require_theta("TGV", params, (2,))

    def saddle(self, params) -> SaddleBlocks:
        """z = w of shape (2, H, W); q = (p, r), (2, H, W) and (3, H, W), with L(x, w) = (D x - w, E w)."""
        self.check(params)
        first, second = jnp.exp(params[0]), jnp.exp(params[1])

        def linear(x, w):
            require_image("TGV", x.shape)
            return Gradient(x.shape)(x) - _edges(x.shape) * w, _symmetrised(w)

        def transpose(q):
            p, r = q
            shape = p.shape[1:]
            return Gradient(shape).T(p), _symmetrised_transposed(r) - _edges(shape) * p

        def prox_dual(v, step):
            return prox.ball(v[0], first, axis=0), prox.ball(v[1], second, axis=0)

        def start(x):
            zero = lambda n: jnp.zeros((n, *x.shape), x.dtype)  # noqa: E731
            return zero(2), (zero(2), zero(3))

        def scaling():
            """|D|^2, |E|^2 <= 8, and half of the bound for each of p and r, which share w."""
            t = 0.1
            return (t, t), (1 / (18 * t), 1 / (16 * t))

        return SaddleBlocks(linear=linear, transpose=transpose, prox_dual=prox_dual, start=start, scaling=scaling)


def _edges(shape):
    """1 at the edges below pixels, and to their right, that exist."""
    row, column = np.indices(shape)
    return np.stack([row < shape[0] - 1, column < shape[1] - 1])


def _places(shape):
    """1 where both diagonal entries of E w, and the mixed one, exist."""
    below, right = _edges(shape)
    row, column = np.indices(shape)
    return np.stack([below & (row > 0), right & (column > 0), below & right])


def _symmetrised(w):
    """(3, H, W): both diagonal entries of E w, and sqrt(2) times the mixed one."""
    shape = w.shape[1:]
    diagonal = [-Gradient(shape, axes=(axis,)).T(w[axis][None]) for axis in (0, 1)]
    mixed = forward_difference(w[0], 1) + forward_difference(w[1], 0)
    return _places(shape) * jnp.stack([*diagonal, mixed / _ROOT])


def _symmetrised_transposed(r):
    shape = r.shape[1:]
    r = _places(shape) * r
    parts = [-forward_difference(r[axis], axis) for axis in (0, 1)]
    return jnp.stack([parts[a] + Gradient(shape, axes=(1 - a,)).T(r[2][None]) / _ROOT for a in (0, 1)])
