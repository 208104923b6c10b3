"""Weighted l1 problems: a smooth convex function plus weighted absolute values, or weighted 2-norms of groups.

Near a solution only the unknowns off zero move, and there the problem is smooth: `Piece` is that smooth problem. The
semismooth Newton steps of the solver and the adjoint of the hypergradient are both solves on it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel import prox, trees
from jbilevel.constants import Constants
from jbilevel.problems import (
    Constant,
    SmoothView,
    as_start,
    no_closed_over_tracer,
    require_hashable,
    start_shapes,
    trace_scalar,
    validate_arrays,
)


class Penalty(NamedTuple):
    """G(x) = sum_i weights_i |x_i|, or sum_g weights_g |x_g|_2 over the groups that ``axis`` of each leaf runs through.

    weights: a pytree like x of arrays like its leaves, of size 1 along ``axis``.
    """

    weights: Any
    axis: int | None = None

    def sizes(self, x):
        """|x_i|, or the norms of the groups (their axis kept)."""
        if self.axis is None:
            return jax.tree.map(jnp.abs, x)
        return jax.tree.map(lambda leaf: jnp.sqrt(jnp.sum(leaf**2, self.axis, keepdims=True)), x)

    def value(self, x):
        # an infinite weight of a zero costs nothing
        cost = jax.tree.map(lambda w, s: jnp.sum(jnp.where(s > 0, w * s, 0.0)), self.weights, self.sizes(x))
        return sum(jax.tree.leaves(cost))

    def prox(self, v, step):
        if self.axis is None:
            return jax.tree.map(lambda leaf, w: prox.soft(leaf, step, w), v, self.weights)
        return jax.tree.map(lambda leaf, w: prox.group(leaf, step, w, axis=self.axis), v, self.weights)

    def direction(self, v):
        """sign(v), or v_g/|v_g|: the derivative of the absolute values off zero, 0 at zero."""
        return jax.tree.map(lambda leaf, s: leaf / jnp.where(s > 0, s, 1.0), v, self.sizes(v))

    def stay(self, z, base):
        """z, but 0 in penalised entries (groups) that left the half-space of ``base``, where G has kinks in between."""

        def clip(z, b, w):
            inner = z * b if self.axis is None else jnp.sum(z * b, self.axis, keepdims=True)
            return jnp.where((inner < 0) & (w > 0), 0.0, z)

        return jax.tree.map(clip, z, base, self.weights)

    def usable(self):
        """Whether all weights are finite and nonnegative."""
        good = [jnp.all(jnp.isfinite(w) & (w >= 0)) for w in jax.tree.leaves(self.weights)]
        return jnp.all(jnp.stack(good))


class IndexSets(NamedTuple):
    """Where the forward-backward map thresholds, by v = x - step grad F(x) against u = step weights.

    Booleans like the weights. active: |v| > u, but not within the tolerance, or a weight 0; biactive:
    ||v| - u| <= tol max(|v|, u), which depends on no scale; elsewhere x is 0. direction: of v, like x.
    """

    active: Any
    biactive: Any
    direction: Any


class SparseView(NamedTuple):
    """F + G at fixed params and data, as solvers use it."""

    smooth: SmoothView
    penalty: Penalty

    def single(self, x):
        """No mixed precision here."""
        return None

    @property
    def constants(self) -> Constants:
        return self.smooth.constants

    @property
    def tolerance_scale(self):
        return self.smooth.tolerance_scale

    def error_bound(self, residual):
        """||x - x_hat|| <= ||r||/mu for r in the subdifferential of F + G at x; inf without mu."""
        return self.smooth.error_bound(residual)

    def measure(self, size, smoothness):
        """What mu bounds ||x+ - x_hat|| by when divided by it, from the norm of a forward-backward residual
        L (y - x+); see `jbilevel.solvers.forward_backward`."""
        mu = self.constants.strong_convexity
        if self.constants.smoothness is not None or mu is None:
            return size
        total = smoothness + mu
        worst = 0.5 * (total + jnp.sqrt(total**2 + jnp.maximum(2 * mu * (smoothness - mu), 0.0))) / smoothness
        return (worst * size).astype(size.dtype)

    def value(self, x):
        return self.smooth.value(x) + self.penalty.value(x)

    def _refuse(self, *_):
        raise TypeError(
            "a jb.WeightedL1Problem has kinks, so nothing for smooth problems applies to it; solve it with "
            "solvers.ForwardBackward and differentiate it with jb.nonsmooth."
        )

    gradient = value_and_gradient = linearize = slope = _refuse

    def index_sets(self, x, gradient, step, tol) -> IndexSets:
        v = trees.add_scaled(x, -step, gradient)

        def near(size, weight):
            u = step * weight
            return (jnp.abs(size - u) <= tol * jnp.maximum(size, u)) & (u > 0)

        sizes = self.penalty.sizes(v)
        biactive = jax.tree.map(near, sizes, self.penalty.weights)
        above = lambda s, w, b: ((s > step * w) | (w == 0)) & ~b  # noqa: E731
        active = jax.tree.map(above, sizes, self.penalty.weights, biactive)
        return IndexSets(active, biactive, self.penalty.direction(v))


class Piece(NamedTuple):
    """The smooth problem for the unknowns that may move: F(P z) + G(P z) + 1/2 |z - P z|^2.

    P keeps the active entries (groups), of each entry (group) in ``extra`` the part along ``direction``, where it may
    leave zero, and nothing else. The last term fixes the rest at zero, so that the Hessian P (H + G'') P + (I - P) is
    as definite as H is on the support. Behaves like a `SmoothView`.
    """

    view: SparseView
    active: Any
    extra: Any
    direction: Any

    @property
    def constants(self) -> Constants:
        # mu holds on the support; what is fixed is known exactly
        return self.view.constants

    def single(self, x):
        return None

    def project(self, z):
        """P z."""
        if self.view.penalty.axis is None:
            keep = jax.tree.map(jnp.logical_or, self.active, self.extra)
            return jax.tree.map(lambda k, leaf: jnp.where(k, leaf, 0.0), keep, z)

        def along(active, extra, u, leaf):
            part = u * jnp.sum(u * leaf, self.view.penalty.axis, keepdims=True)
            return jnp.where(active, leaf, jnp.where(extra, part, 0.0))

        return jax.tree.map(along, self.active, self.extra, self.direction, z)

    def bend(self, x):
        """d -> G''(x) d on the active groups, weight/|x_g| (d - u <u, d>); None for absolute values: there is none."""
        penalty = self.view.penalty
        if penalty.axis is None:
            return None
        sizes, u = penalty.sizes(x), penalty.direction(x)
        stiffness = jax.tree.map(
            lambda a, s, w: jnp.where(a & (s > 0), w / jnp.where(s > 0, s, 1.0), 0.0), self.active, sizes,
            penalty.weights,
        )  # fmt: skip

        def apply(d):
            across = lambda k, u, d: k * (d - u * jnp.sum(u * d, penalty.axis, keepdims=True))  # noqa: E731
            return jax.tree.map(across, stiffness, u, d)

        return apply

    def product(self, x, hessian):
        """d -> (P (H + G'') P + I - P) d, for the Hessian product of F at x."""
        bend = self.bend(x)

        def apply(d):
            kept = self.project(d)
            mapped = hessian(kept)
            mapped = mapped if bend is None else trees.add(mapped, bend(kept))
            return trees.add(self.project(mapped), trees.sub(d, kept))

        return apply

    def assemble(self, z, value, gradient, hessian):
        """(value, gradient, product) at z from those of F at P z."""
        kept = self.project(z)
        penalty = self.view.penalty
        # off zero along the fixed direction absolute values are linear; norms of groups are not
        slopes = self.direction if penalty.axis is None else self._slopes(kept)
        weighted = jax.tree.map(lambda w, u: jnp.where(u != 0, w * u, 0.0), penalty.weights, slopes)
        fixed = trees.sub(z, kept)
        total = trees.add(self.project(trees.add(gradient, weighted)), fixed)
        value = value + trees.dot(weighted, kept) + 0.5 * trees.squared_norm(fixed)
        return value, total, self.product(kept, hessian)

    def _slopes(self, kept):
        moving = self.view.penalty.direction(kept)
        return jax.tree.map(lambda a, u, fixed: jnp.where(a & jnp.any(u != 0, self.view.penalty.axis, keepdims=True),
                                                          u, fixed), self.active, moving, self.direction)  # fmt: skip

    def linearize(self, z):
        return self.assemble(z, *self.view.smooth.linearize(self.project(z)))

    def value_and_gradient(self, z):
        value, gradient = self.view.smooth.value_and_gradient(self.project(z))
        return self.assemble(z, value, gradient, lambda d: d)[:2]


@dataclass(frozen=True)
class WeightedL1Problem:
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
    weights: Callable = jnp.exp
    strong_convexity: Constant = None
    smoothness: Constant = None
    groups: int | None = None

    def __post_init__(self):
        for name in ("smooth", "init", "weights"):
            value = getattr(self, name)
            if not callable(value):
                raise TypeError(f"WeightedL1Problem `{name}` must be a function, got {type(value).__name__}.")
        for name in ("strong_convexity", "smoothness"):
            value = getattr(self, name)
            if value is None or callable(value):
                continue
            if not isinstance(value, numbers.Real):
                kind = type(value).__name__
                raise TypeError(f"WeightedL1Problem `{name}` must be a number, a function or None, got {kind}.")
            if not 0 <= value < math.inf or (name == "smoothness" and value == 0):
                what = "nonnegative" if name == "strong_convexity" else "positive"
                raise ValueError(f"WeightedL1Problem `{name}` must be {what}, got {value}; use None when unknown.")
        if self.groups is not None and not isinstance(self.groups, int):
            raise TypeError(f"WeightedL1Problem `groups` must be an axis of x or None, got {self.groups!r}.")
        require_hashable(self)

    def at(self, params, data) -> SparseView:
        constants = (c(params, data) if callable(c) else c for c in (self.strong_convexity, self.smoothness))
        constants = jax.lax.stop_gradient(Constants(*constants))
        shape = jax.eval_shape(self.start, params, data)
        smooth = SmoothView(lambda x: self.smooth(params, x, data), constants)
        return SparseView(smooth, Penalty(self._like(shape, self._weights(params)), self.groups))

    def _weights(self, params):
        # the default reads params of any structure
        return jax.tree.map(jnp.exp, params) if self.weights is jnp.exp else self.weights(params)

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
        validate_arrays(params, "params")
        no_closed_over_tracer("weights", self._weights, params)
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
        no_closed_over_tracer("smooth", self.smooth, params, start, data)
        no_closed_over_tracer("weights", self._weights, params)
        trace_scalar(self.smooth, "smooth", params, start, data)
        jax.eval_shape(lambda: self._like(start, self._weights(params)))


_concrete = jax.jit(WeightedL1Problem._weights, static_argnums=0)
