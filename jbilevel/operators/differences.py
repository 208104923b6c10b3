"""Finite differences with Neumann or periodic boundary and hand-written transposes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from jbilevel.operators import linear
from jbilevel.operators.base import LinearOperator, check_tolerance, shape_of

BOUNDARIES = ("neumann", "periodic")


def _pad(x, before: int, after: int, axis: int):
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (before, after, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


@dataclass(frozen=True)
class _ForwardDifference:
    axis: int  # negative: leading axes are batch axes
    periodic: bool = False

    def forward(self, x):
        n, axis = x.shape[self.axis], x.ndim + self.axis
        part = lambda start, stop: lax.slice_in_dim(x, start, stop, axis=axis)  # noqa: E731
        if self.periodic:
            return lax.concatenate([part(1, n), part(0, 1)], axis) - x
        return _pad(part(1, n) - part(0, n - 1), 0, 1, axis)

    def transpose(self, y):
        n, axis = y.shape[self.axis], y.ndim + self.axis
        part = lambda start, stop: lax.slice_in_dim(y, start, stop, axis=axis)  # noqa: E731
        if self.periodic:
            return lax.concatenate([part(n - 1, n), part(0, n - 1)], axis) - y
        if n == 1:
            return jnp.zeros_like(y)
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


def backward_difference(y, axis: int):
    """The transpose of `forward_difference`: y[i-1] - y[i], where y[-1] and the last y[n-1] count as 0.

    >>> import jax.numpy as jnp
    >>> backward_difference(jnp.array([2.0, 3.0, 7.0]), 0).tolist()
    [-2.0, -1.0, 3.0]
    """
    axis = axis - y.ndim if axis >= 0 else axis
    return linear.apply(_ForwardDifference(axis), y, transpose=True)


@dataclass(frozen=True)
class Gradient(LinearOperator):
    """The forward differences of an image along each of its axes, stacked on a new first axis.

    (D x)_a = x[.., i_a + 1, ..] - x[.., i_a, ..]; beyond the last index the image stays constant ("neumann": the
    difference is 0) or starts again ("periodic"). D^T is minus the discrete divergence.

    ||D||^2 is the sum over the axes of the largest eigenvalues 4 cos^2(pi / (2 n)) of one-dimensional Laplacians (4 for
    periodic even n), because these have common eigenvectors; `norm` is this closed form, below sqrt(8) for images.

    Args:
      in_shape: (H, W), or any shape.
      boundary: "neumann" or "periodic".
      axes: those to differentiate along, by default all; (0, 1) for (H, W, C).

    Maps ``in_shape`` to (len(axes), *in_shape).

    Raises:
      ValueError: unknown boundary, or axes outside the shape or named twice.

    >>> import jax.numpy as jnp
    >>> D = Gradient((2, 2))
    >>> D(jnp.array([[1.0, 2.0], [4.0, 7.0]])).tolist()
    [[[3.0, 5.0], [0.0, 0.0]], [[1.0, 0.0], [3.0, 0.0]]]
    >>> round(D.norm(), 6)
    2.0
    """

    in_shape: tuple[int, ...]
    boundary: str = "neumann"
    axes: tuple[int, ...] | None = None

    norm_is_bound = True

    def __post_init__(self):
        shape = shape_of(self.in_shape, "in_shape")
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"`boundary` must be one of {BOUNDARIES}, got {self.boundary!r}.")
        axes = tuple(range(len(shape))) if self.axes is None else tuple(self.axes)
        if not axes or any(not -len(shape) <= a < len(shape) for a in axes):
            raise ValueError(f"`axes` must lie within the {len(shape)} axes of the image, got {axes}.")
        axes = tuple(a % len(shape) for a in axes)
        if len(set(axes)) < len(axes):
            raise ValueError(f"`axes` must be different, got {axes}.")
        object.__setattr__(self, "in_shape", shape)
        object.__setattr__(self, "axes", axes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return len(self.axes), *self.in_shape

    @property
    def _differences(self):
        return [_ForwardDifference(a - len(self.in_shape), self.boundary == "periodic") for a in self.axes]

    def forward(self, x):
        return jnp.stack([D.forward(x) for D in self._differences], -len(self.out_shape))

    def transpose(self, y):
        parts = jnp.moveaxis(y, -len(self.out_shape), 0)
        first, *others = [D.transpose(part) for D, part in zip(self._differences, parts, strict=True)]
        return sum(others, first)

    def norm(self, tol: float = 1e-3) -> float:
        """||D||_2 in closed form."""
        check_tolerance(tol)
        return math.sqrt(sum(self._largest(self.in_shape[a]) for a in self.axes))

    def _largest(self, n: int) -> float:
        if self.boundary == "periodic" and n % 2 == 0:
            return 4.0
        return 4 * math.cos(math.pi / (2 * n)) ** 2 if n > 1 else 0.0
