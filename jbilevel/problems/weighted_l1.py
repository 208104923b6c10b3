"""Weighted l1 problems: a smooth convex function plus weighted absolute values, or weighted 2-norms of groups."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel import nonsmooth
from jbilevel._core.constants import Constant, Constants
from jbilevel._core.validate import (
    arrays,
    as_start,
    require_hashable,
    start_shapes,
    trace_scalar,
    traced,
)
from jbilevel._views.base import Problem
from jbilevel._views.smooth import SmoothView
from jbilevel._views.weighted_l1 import Penalty, WeightedL1View
from jbilevel.solvers.forward_backward import ForwardBackward


def exponential(params):
    """exp of all of params, whatever their structure."""
    return jax.tree.map(jnp.exp, params)


@dataclass(frozen=True)
class WeightedL1Problem(Problem):
    """x_hat(params) = argmin_x smooth(params, x, data) + sum_i weights(params)_i |x_i|.

    Args:
      smooth: ``smooth(params, x, data) -> scalar`` for ONE sample, convex and twice differentiable in x; params (which
        it may read too), x, data are any pytrees.
      init: ``init(params, data) -> x0``, the cold start; it fixes the shape and dtype of x.
      weights: ``weights(params)``, nonnegative: one number, an array that broadcasts against x, or a pytree like x of
        such. The default is the exponential of all of params.
      strong_convexity, smoothness: mu and L of ``smooth``, numbers or ``(params, data) -> number``, None where unknown.
        With mu every solve carries a proven bound on ``||x - x_hat||``; a wrong mu makes it wrong. Without L steps are
        found by backtracking; an L that is seen to be too small ends a solve as ``Status.SMOOTHNESS``.
      groups: None, or the axis of each leaf of x that runs through a group: sum_g weights_g |x_g|_2. Weights then have
        size 1 along this axis, or leave it out.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> lasso = jb.WeightedL1Problem(
    ...     lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2), lambda p, d: jnp.zeros_like(d), strong_convexity=1.0,
    ...     smoothness=1.0)
    >>> x, info = jb.solve(lasso, jnp.array(0.0), jnp.array([-3.0, 0.5, 2.0]))  # weight exp(0)
    >>> x.tolist()
    [-2.0, 0.0, 1.0]
    """

    smooth: Callable
    init: Callable
    _: KW_ONLY
    weights: Callable = exponential
    strong_convexity: Constant = None
    smoothness: Constant = None
    groups: int | None = None

    view_type = WeightedL1View

    def __post_init__(self):
        for name in ("smooth", "init", "weights"):
            value = vars(self)[name]
            if not callable(value):
                raise TypeError(f"WeightedL1Problem `{name}` must be a function, got {type(value).__name__}.")
        for name in ("strong_convexity", "smoothness"):
            value = vars(self)[name]
            if value is None or callable(value):
                continue
            if not isinstance(value, numbers.Real):
                kind = type(value).__name__
                raise TypeError(f"WeightedL1Problem `{name}` must be a number, a function or None, got {kind}.")
            if not 0 <= value < math.inf or (name == "smoothness" and value == 0):
                what = "nonnegative" if name == "strong_convexity" else "positive"
                raise ValueError(f"WeightedL1Problem `{name}` must be {what}, got {value}; use None when unknown.")
        if self.weights is jnp.exp:  # which reads one array, and cannot be pickled
            object.__setattr__(self, "weights", exponential)
        if self.groups is not None and not isinstance(self.groups, int):
            raise TypeError(f"WeightedL1Problem `groups` must be an axis of x or None, got {self.groups!r}.")
        require_hashable(self)

    def view(self, params, data) -> WeightedL1View:
        constants = (c(params, data) if callable(c) else c for c in (self.strong_convexity, self.smoothness))
        constants = jax.lax.stop_gradient(Constants(*constants))
        shape = jax.eval_shape(self.start, params, data)
        smooth = SmoothView(lambda x: self.smooth(params, x, data), constants)
        return WeightedL1View(smooth, Penalty(self._like(shape, self._weights(params)), self.groups))

    def _weights(self, params):
        return self.weights(params)

    def _like(self, shape, weights):
        """The weights as a pytree like x of arrays like its leaves, of size 1 along the axis of groups."""
        if jax.tree.structure(weights) != jax.tree.structure(shape):
            if jax.tree.structure(weights) != jax.tree.structure(0):
                raise ValueError(
                    f"`weights` must return one array or the structure of x, {jax.tree.structure(shape)}, "
                    f"got {jax.tree.structure(weights)}."
                )
            weights = jax.tree.map(lambda _: weights, shape)

        def fit(leaf, weight):
            weight, wanted = jnp.asarray(weight), leaf.shape
            if self.groups is not None:
                if not -len(wanted) <= self.groups < len(wanted):
                    raise ValueError(f"`groups` is axis {self.groups}, but a leaf of x has shape {leaf.shape}.")
                axis = self.groups % len(wanted)
                weight = jnp.expand_dims(weight, axis) if weight.ndim == len(wanted) - 1 > 0 else weight
                wanted = (*wanted[:axis], 1, *wanted[axis + 1 :])
            try:
                return jnp.broadcast_to(weight, wanted).astype(leaf.dtype)
            except ValueError:
                raise ValueError(
                    f"`weights` have shape {weight.shape}, which does not broadcast to {wanted}."
                ) from None

        return jax.tree.map(fit, shape, weights)

    def check(self, params) -> None:
        """Refuse params with weights that are negative or not finite, while their values are concrete."""
        params = arrays(params, "params")
        traced("weights", self._weights, params)
        for weight in jax.tree.leaves(_concrete(self, params)):
            if isinstance(weight, jax.core.Tracer):  # under jit all values are
                return
            weight = np.asarray(weight)
            if not np.all(np.isfinite(weight) & (weight >= 0)):
                worst = weight[~(np.isfinite(weight) & (weight >= 0))].ravel()[0]
                raise ValueError(
                    f"`weights(params)` holds {worst}; weights must be finite and nonnegative, so bound params, e.g. "
                    "with the `projection` of a method."
                )

    def start(self, params, data):
        """The cold start as arrays; real inexact leaves only."""
        return as_start(self.init(params, data))

    def validate(self, params, data, x0=None) -> None:
        """Check, at trace time and without computing, what would otherwise fail far from its cause."""
        start = start_shapes(self, params, data, x0)
        trace_scalar(self.smooth, "smooth", params, start, data)
        traced("weights", self._weights, params)
        for name in ("strong_convexity", "smoothness"):
            if callable(vars(self)[name]):
                traced(f"`{name}`", vars(self)[name], params, data)
        jax.eval_shape(lambda: self._like(start, self._weights(params)))

    def default_solver(self) -> ForwardBackward:
        return ForwardBackward()

    def oracle(self, loss, **options) -> nonsmooth.Oracle:
        return nonsmooth.Oracle(self, loss, **options)

    def lacks(self) -> str | None:
        return "`strong_convexity` to the problem" if self.strong_convexity is None else None


_concrete = jax.jit(WeightedL1Problem._weights, static_argnums=0)
