"""A weighted l1 problem at fixed parameters and data, as solvers and oracles see it.

Near a solution only the unknowns off zero move, and there the problem is smooth: `SupportView` is that problem. The
semismooth Newton steps of the solver and the adjoint of the hypergradient are both solves on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel import prox
from jbilevel._core import trees
from jbilevel._core.constants import Constants
from jbilevel._views.base import View
from jbilevel._views.smooth import SmoothView


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

    def project_orthant(self, z, base):
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


@dataclass(frozen=True)
class WeightedL1View(View):
    """F + G at fixed params and data, as solvers use it.

    >>> import jbilevel as jb
    >>> lasso = jb.WeightedL1Problem(lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2), lambda p, d: jnp.zeros_like(d))
    >>> view = lasso.view(jnp.array(0.0), jnp.array([3.0, 0.5]))
    >>> x = jnp.array([2.0, 0.0])
    >>> float(view.value(x)), view.smooth.gradient(x).tolist(), view.penalty.prox(jnp.array([3.0, 0.5]), 1.0).tolist()
    (2.625, [-1.0, -0.5], [2.0, 0.0])
    """

    smooth: SmoothView
    penalty: Penalty

    @property
    def constants(self) -> Constants:
        return self.smooth.constants

    @property
    def tolerance_scale(self):
        return self.smooth.tolerance_scale

    def error_bound(self, residual):
        """||x - x_hat|| <= ||r||/mu for r in the subdifferential of F + G at x; inf without mu."""
        return self.smooth.error_bound(residual)

    def unrounded(self, residual, x, curvature, energy=None):
        return self.smooth.unrounded(residual, x, curvature, energy)

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

    gradient = value_and_gradient = linearize = directional = _refuse

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


@dataclass(frozen=True)
class SupportView(View):
    """The smooth problem for the unknowns that may move: F(P z) + G(P z) + 1/2 |z - P z|^2.

    P keeps the active entries (groups), of each entry (group) in ``one_sided`` the part along ``direction``, where it
    may leave zero, and nothing else. The last term fixes the rest at zero, so that the Hessian P (H + G'') P + (I - P)
    is as definite as H is on the support. Behaves like a `SmoothView`.
    """

    view: WeightedL1View
    active: Any
    one_sided: Any
    direction: Any

    @property
    def constants(self) -> Constants:
        # mu holds on the support; what is fixed is known exactly
        return self.view.constants

    def error_bound(self, residual):
        return self.view.error_bound(residual)

    def unrounded(self, residual, x, curvature, energy=None):
        return self.view.unrounded(residual, x, curvature, energy)

    def project(self, z):
        """P z."""
        if self.view.penalty.axis is None:
            keep = jax.tree.map(jnp.logical_or, self.active, self.one_sided)
            return jax.tree.map(lambda k, leaf: jnp.where(k, leaf, 0.0), keep, z)

        def along(active, one_sided, u, leaf):
            part = u * jnp.sum(u * leaf, self.view.penalty.axis, keepdims=True)
            return jnp.where(active, leaf, jnp.where(one_sided, part, 0.0))

        return jax.tree.map(along, self.active, self.one_sided, self.direction, z)

    def penalty_hessian(self, x):
        """d -> G''(x) d on the active groups, weight/|x_g| (d - u <u, d>); None for absolute values: there is none."""
        penalty = self.view.penalty
        if penalty.axis is None:
            return None
        sizes, u = penalty.sizes(x), penalty.direction(x)

        def curvature(active, size, weight):
            return jnp.where(active & (size > 0), weight / jnp.where(size > 0, size, 1.0), 0.0)

        curvatures = jax.tree.map(curvature, self.active, sizes, penalty.weights)

        def apply(d):
            across = lambda k, u, d: k * (d - u * jnp.sum(u * d, penalty.axis, keepdims=True))  # noqa: E731
            return jax.tree.map(across, curvatures, u, d)

        return apply

    def product(self, x, hessian):
        """d -> (P (H + G'') P + I - P) d, for the Hessian product of F at x."""
        penalty = self.penalty_hessian(x)

        def apply(d):
            kept = self.project(d)
            mapped = hessian(kept)
            mapped = mapped if penalty is None else trees.add(mapped, penalty(kept))
            return trees.add(self.project(mapped), trees.sub(d, kept))

        return apply

    def assemble(self, z, value, gradient, hessian):
        """(value, gradient, product) at z from those of F at P z."""
        kept = self.project(z)
        penalty = self.view.penalty
        # off zero along the fixed direction absolute values are linear; norms of groups are not
        size_gradient = self.direction if penalty.axis is None else self._group_size_gradient(kept)
        weighted = jax.tree.map(lambda w, u: jnp.where(u != 0, w * u, 0.0), penalty.weights, size_gradient)
        fixed = trees.sub(z, kept)
        total = trees.add(self.project(trees.add(gradient, weighted)), fixed)
        value = value + trees.dot(weighted, kept) + 0.5 * trees.squared_norm(fixed)
        return value, total, self.product(kept, hessian)

    def _group_size_gradient(self, kept):
        def choose(active, moving, fixed):
            off_zero = jnp.any(moving != 0, self.view.penalty.axis, keepdims=True)
            return jnp.where(active & off_zero, moving, fixed)

        return jax.tree.map(choose, self.active, self.view.penalty.direction(kept), self.direction)

    def linearize(self, z):
        return self.assemble(z, *self.view.smooth.linearize(self.project(z)))

    def value_and_gradient(self, z):
        value, gradient = self.view.smooth.value_and_gradient(self.project(z))
        return self.assemble(z, value, gradient, lambda d: d)[:2]
