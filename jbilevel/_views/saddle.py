"""A saddle problem at fixed parameters and data, as solvers and oracles see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel import prox
from jbilevel._core import brief, trees
from jbilevel._core.constants import SaddleConstants
from jbilevel._views.base import View

# a power iteration bounds a norm from below: so many steps from a random vector, then this factor
POWER_STEPS, POWER_SAFETY = 30, 1.05


@dataclass(frozen=True)
class SaddleView(View):
    """A saddle problem at fixed params and data, as solvers use it. A modulus is None where it is not known.

    >>> import jbilevel as jb
    >>> problem = jb.variational(None, jb.regularizers.TV())
    >>> view = problem.view(jnp.array([0.0]), jnp.array([[0.0, 1.0]]))
    >>> view.linear(jnp.array([[0.0, 1.0]])).tolist()  # differences down and to the right
    [[[0.0, 0.0]], [[1.0, 0.0]]]
    >>> float(view.mu_primal), view.mu_dual, view.certified  # the data term is strongly convex, the dual is not
    (1.0, None, False)
    """

    linear: Callable  # x -> K x
    transpose: Callable  # y -> K* y
    prox_primal: Callable  # (v, step)
    prox_dual: Callable
    mu_primal: Any
    mu_dual: Any
    norm: Any  # bound on ||K|| (on ||s^(1/2) K t^(1/2)|| with ``scaling`` (t, s))
    proven_norm: bool  # given, not estimated
    scaling: Any = (1.0, 1.0)
    steps: Any = None  # (tau, sigma) that a solver has to use, where the proxes only hold for these
    constants: SaddleConstants = SaddleConstants()
    ridges: Callable | None = None  # () -> `RidgeSum` of what is not quadratic, for certificates
    exact_adjoint: bool = True  # False: ``transpose`` is known to be rough, and is not tested
    linear_system: bool = False  # stop on the residual itself, as linear solves do, not on the error bound

    __repr__ = brief.record

    @property
    def certified(self):
        """Whether both moduli are positive, so that residuals prove distances; False, or a traced truth value."""
        if self.mu_primal is None or self.mu_dual is None:
            return False
        return (jnp.asarray(self.mu_primal) > 0) & (jnp.asarray(self.mu_dual) > 0)

    def known_ridges(self):
        return None if self.ridges is None else self.ridges()

    def measure(self, first, second):
        """The residual that a solve reports, from the 2-norms (a, b) of an element of the operator T at (x, y).

        T(x, y) = (dg(x) + K*y, df*(y) - K x) is strongly monotone where both moduli are positive, so that
        mu_g |dx|^2 + mu_f |dy|^2 <= a |dx| + b |dy| and hence mu_g |dx| <= (a + sqrt(a^2 + b^2 mu_g/mu_f))/2: that. It
        is sqrt(a^2 + b^2) where a modulus is missing.
        """
        plain = jnp.hypot(first, second)
        if self.certified is False:
            return plain
        ratio = self.mu_primal / jnp.where(self.certified, self.mu_dual, 1.0)
        proven = 0.5 * (first + jnp.sqrt(first**2 + ratio * second**2))
        return jnp.where(self.certified, proven, plain).astype(plain.dtype)

    def bounds(self, first, second):
        """Proven (||x - x_hat||, ||y - y_hat||) from the same norms; inf where a modulus is missing."""
        unknown = jnp.full_like(first, jnp.inf)
        if self.certified is False:
            return unknown, unknown
        swapped = replace(self, mu_primal=self.mu_dual, mu_dual=self.mu_primal)
        mu, nu = (jnp.where(self.certified, m, 1.0) for m in (self.mu_primal, self.mu_dual))
        bounds = self.measure(first, second) / mu, swapped.measure(second, first) / nu
        return tuple(jnp.where(self.certified & ~jnp.isnan(b), b, jnp.inf).astype(first.dtype) for b in bounds)

    @property
    def tolerance_scale(self):
        if self.certified is False or self.linear_system:
            return 1.0
        return jnp.where(self.certified, self.mu_primal, 1.0)

    def error_bound(self, residual):
        """||x - x_hat||_2 of the primal unknown, from `measure`; inf where a modulus is missing."""
        if self.certified is False:
            return jnp.full_like(residual, jnp.inf)
        bound = residual / jnp.where(self.certified, self.mu_primal, 1.0)
        return jnp.where(self.certified & ~jnp.isnan(residual), bound, jnp.inf).astype(residual.dtype)

    def step_trees(self, tau, sigma):
        """(tau t, sigma s)."""
        return tuple(
            jax.tree.map(lambda w, step=step: step * w, weights)
            for step, weights in zip((tau, sigma), self.scaling, strict=True)
        )

    def flip(self):
        """The same problem as min over y, max over x: <-K*y, x> + f*(y) - g(x)."""
        return replace(
            self,
            linear=lambda y: trees.neg(self.transpose(y)),
            transpose=lambda x: trees.neg(self.linear(x)),
            prox_primal=self.prox_dual,
            prox_dual=self.prox_primal,
            mu_primal=self.mu_dual,
            mu_dual=self.mu_primal,
            scaling=self.scaling[::-1],
            steps=None if self.steps is None else self.steps[::-1],
        )


def power_norm(view: SaddleView, x, steps: int = POWER_STEPS):
    """A lower bound of ||s^(1/2) K t^(1/2)||, within a few per cent, by power iteration from a fixed random vector."""
    t, s = view.scaling

    def normalised(v):
        size = trees.norm(v)
        return trees.scale(1 / jnp.where(size > 0, size, 1.0), v)

    def step(_, v):
        return normalised(prox.times(t, view.transpose(prox.times(s, view.linear(v)))))

    v = jax.lax.fori_loop(0, steps, step, normalised(trees.random_like(x, 0)))
    length, image = scaled_norms(view, v, view.linear(v))
    return jnp.where(length > 0, image / jnp.where(length > 0, length, 1.0), 0.0)


def scaled_norms(view: SaddleView, v, image):
    """Of v and of K v in the norms of the scaling, in which ``norm`` bounds their ratio."""
    t, s = view.scaling
    return jnp.sqrt(trees.dot(v, prox.divided(v, t))), jnp.sqrt(trees.dot(image, prox.times(s, image)))


def unfused(function, params, v):
    """function(v), computed once and stored: K and K* inside the loops of solvers.

    XLA on a CPU fuses a convolution into all that consumes its result, and so computes it several times (13 times
    slower where measured); a branch whose condition it cannot know keeps them apart. The condition reads params, not v,
    so that it stays one branch where v is one of a batch. Numbers that large are lost. On a GPU a branch would ask the
    host at each product, and nothing is fused into a convolution: there is none.
    """

    def branch(v):
        inexact = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
        first = jnp.ravel(jnp.asarray((inexact or jax.tree.leaves(v))[0]))[0]
        overflow = jnp.real(first) > 0.5 * jnp.finfo(first.dtype).max
        nans = lambda v: jax.tree.map(  # noqa: E731
            lambda o: jnp.full(o.shape, jnp.nan, o.dtype), jax.eval_shape(function, v)
        )
        return jax.lax.cond(jax.lax.stop_gradient(overflow), nans, function, v)

    return jax.lax.platform_dependent(v, cpu=branch, default=function)
