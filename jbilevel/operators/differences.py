"""Finite differences with Neumann boundary and hand-written transpose."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from jbilevel.operators import linear


def _pad(x, before: int, after: int, axis: int):
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (before, after, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


@dataclass(frozen=True)
class _ForwardDifference:
    axis: int  # negative: leading axes are batch axes

    def forward(self, x):
        n, axis = x.shape[self.axis], x.ndim + self.axis
        step = lax.slice_in_dim(x, 1, n, axis=axis) - lax.slice_in_dim(x, 0, n - 1, axis=axis)
        return _pad(step, 0, 1, axis)

    def transpose(self, y):
        n, axis = y.shape[self.axis], y.ndim + self.axis
        if n == 1:
            return jnp.zeros_like(y)
        part = lambda start, stop: lax.slice_in_dim(y, start, stop, axis=axis)  # noqa: E731
        # concatenated, not padded: XLA's loops over padded arrays branch at every element
        return lax.concatenate([-part(0, 1), part(0, n - 2) - part(1, n - 1), part(n - 2, n - 1)], axis)


def forward_difference(x, axis: int):
    """x[i+1] - x[i] along ``axis``, and 0 at the last index (Neumann boundary). Linear in x, same shape as x.

    Its derivative and transpose are the difference and its hand-written adjoint, about a third of the cost of
    differentiating a padded difference.

    >>> import jax.numpy as jnp
    >>> forward_difference(jnp.array([1.0, 3.0, 6.0]), 0).tolist()
    [2.0, 3.0, 0.0]
    """
    axis = axis - x.ndim if axis >= 0 else axis
    if not -x.ndim <= axis < 0:
        raise ValueError(f"`axis` must lie within the {x.ndim} axes of x, got {axis + x.ndim}.")
    return linear.apply(_ForwardDifference(axis), x)
