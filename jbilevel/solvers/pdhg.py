"""The primal-dual hybrid gradient method for saddle points, with the steps that each known modulus allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import RUNNING, Status, Work
from jbilevel._views.saddle import SaddleView, scaled_norms
from jbilevel.prox import divided, times
from jbilevel.solvers.base import Solver

# a ||K v||/||v|| this far above the bound is no rounding; an estimated bound is then raised with some margin
EXCESS, MARGIN = 1e-3, 1.05


class Point(NamedTuple):
    """Where the next iteration starts, with the images that it needs, kept up by linearity."""

    x: Any
    y: Any
    kx: Any  # K x
    kty: Any  # K* y
    tau: Any
    sigma: Any


class PDHGState(NamedTuple):
    x: Any  # (x, y) right after the two proxes
    gradient: Any  # an element of T(x, y), T = (dg + K*y, df* - K x)
    residual: Any
    curvature: Any
    evaluations: Work
    failure: Any
    point: Point
    norm: Any  # the bound on ||K|| in use


def expands(prox, v, step):
    """Whether a map is seen to be no proximal map: these are firmly nonexpansive in the metric of the step.

    Looked at once, between v and v plus a random vector.
    """
    w = trees.add(v, trees.random_like(v, 0))
    p, q = prox(v, step), prox(w, step)
    inside, outside = trees.sub(q, p), trees.sub(w, v)
    length = lambda u: jnp.sqrt(trees.dot(u, divided(u, step)))  # noqa: E731
    noise = 64 * trees.eps(v) * (length(w) + length(v) + length(p) + length(q))
    gap = trees.dot(inside, divided(trees.sub(outside, inside), step))
    return gap < -(EXCESS * length(inside) + noise) * length(inside)


@dataclass(frozen=True, kw_only=True)
class PDHG(Solver):
    """x+ = prox_{tau g}(x - tau K*y), y+ = prox_{sigma f*}(y + sigma K(x+ + theta (x+ - x))) (Chambolle & Pock 2011).

    Always tau sigma ||K||^2 <= 1, and:

    - both moduli known: linear convergence with nu = min(1, 2 sqrt(mu_g mu_f)/||K||), tau = nu/(2 mu_g),
      sigma = nu/(2 mu_f), theta = 1/(1 + nu) (their Algorithm 3);
    - else theta = 1, tau = ratio/||K||, sigma = 1/(ratio ||K||), over-relaxed: z + relaxation (z+ - z);
    - one modulus and ``accelerate``: O(1/k^2) by shrinking the step of that variable (Algorithm 2; for f* with roles
      exchanged). That is a worst-case rate: total variation needs ten times more of these iterations than of the above.

    One iteration costs one K and one K*, counted as one gradient. Each iteration also gives an element of T at
    (x+, y+): r_x = (x - x+)/tau + K*(y+ - y), r_y = (y - y+)/sigma + theta K(x+ - x). Where both moduli are known it
    proves ||x+ - x_hat||_2 <= (|r_x| + sqrt(|r_x|^2 + |r_y|^2 mu_g/mu_f))/(2 mu_g), which is ``info.error`` and what
    ``tol`` bounds (y+ is then within about sqrt(mu_g/mu_f) tol of y_hat); elsewhere ``tol`` bounds ||(r_x, r_y)||_2 and
    ``info.error`` is inf. ``info.residual`` is mu_g times that bound, or ||(r_x, r_y)||_2.

    Args:
      ratio: balance of the steps where not both moduli decide it; about ||x_hat - x0||/||y_hat - y0|| is good.
      relaxation: in (0, 2); None takes 1.8, or 1 where moduli choose the steps, the only value that is then allowed.
      accelerate: make use of a single modulus.
      stride: iterations between two looks at the residual (a step limit is rounded up to a multiple of it).

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> tv = jb.variational(None, jb.regularizers.TV())  # two pixels: each moves towards the other by exp(params)
    >>> (x, y), info = jb.solve(tv, jnp.log(jnp.array([0.25])), jnp.array([[0.0, 1.0]]), tol=1e-5, solver=PDHG())
    >>> bool(jnp.allclose(x, jnp.array([[0.25, 0.75]]), atol=1e-3)), jb.Status(int(info.status)).name
    (True, 'CONVERGED')
    """

    ratio: float = 1.0
    relaxation: float | None = None
    accelerate: bool = False
    stride: int = 10

    patience = 200

    def __post_init__(self):
        if not self.ratio > 0:
            raise ValueError(f"`ratio` of PDHG must be positive, got {self.ratio}.")
        if self.relaxation is not None and not 0 < self.relaxation < 2:
            raise ValueError(f"`relaxation` of PDHG must lie between 0 and 2, got {self.relaxation}.")
        if self.stride < 1:
            raise ValueError(f"`stride` of PDHG must be at least 1, got {self.stride}.")

    def init(self, view: SaddleView, x0, target) -> PDHGState:
        view, swap = self._order(view)
        x, y = swap(x0)
        dtype = trees.dtype(x0)
        norm = jnp.asarray(view.norm, dtype)
        tau, sigma = self.steps(view, norm)
        point = Point(x=x, y=y, kx=view.linear(x), kty=view.transpose(y), tau=tau, sigma=sigma)
        state = self._measured_iteration(view, swap, point, norm, Work.zero().plus(gradients=1))
        if view.linear_system:
            return state
        t, s = view.step_trees(tau, sigma)
        wrong = expands(view.prox_primal, x, t) | expands(view.prox_dual, y, s)
        return state._replace(failure=jnp.where(wrong, Status.PROX, state.failure).astype(jnp.int32))

    def step(self, view: SaddleView, state: PDHGState, target) -> PDHGState:
        view, swap = self._order(view)
        point = state.point
        if self.stride > 1:
            iteration = lambda _, point: self._iteration(view, point)[0]  # noqa: E731
            point = jax.lax.fori_loop(0, self.stride - 1, iteration, point)
        work = state.evaluations.plus(gradients=self.stride - 1)
        return self._measured_iteration(view, swap, point, state.norm, work)

    def iterate(self, view: SaddleView, x0, steps: int):
        """(x, y) after a fixed number of iterations, differentiable in reverse through all of them."""
        view, swap = self._order(view)
        x, y = swap(x0)
        tau, sigma = self.steps(view, jnp.asarray(view.norm, trees.dtype(x0)))
        point = Point(x=x, y=y, kx=view.linear(x), kty=view.transpose(y), tau=tau, sigma=sigma)
        point = jax.lax.scan(lambda p, _: (self._iteration(view, p)[0], None), point, length=steps)[0]
        return swap((point.x, point.y))

    def steps(self, view: SaddleView, norm):
        """(tau, sigma) of the first iteration, as numbers of the dtype of norm."""
        if view.steps is not None:
            return view.steps
        norm = jnp.where(norm > 0, norm, 1.0)
        tau, sigma = self.ratio / norm, 1.0 / (self.ratio * norm)
        if view.certified is not False:
            mu, nu = self._moduli(view)
            rate = jnp.minimum(1.0, 2 * jnp.sqrt(mu * nu) / norm)
            tau, sigma = (
                jnp.where(view.certified, rate / (2 * jnp.where(view.certified, m, 1.0)), step)
                for m, step in ((mu, tau), (nu, sigma))
            )
        return tau.astype(norm.dtype), sigma.astype(norm.dtype)

    def _order(self, view: SaddleView):
        """The view with the strongly convex variable first, and the swap of pairs that belongs to it."""
        if self.accelerate and view.steps is None and view.mu_primal is None and view.mu_dual is not None:
            return view.flip(), lambda pair: (pair[1], pair[0])
        return view, lambda pair: pair

    def _moduli(self, view: SaddleView):
        """Relative to the norms of the scaling."""
        return tuple(
            mu * jnp.min(jnp.stack([jnp.min(jnp.asarray(w)) for w in jax.tree.leaves(weights)]))
            for mu, weights in zip((view.mu_primal, view.mu_dual), view.scaling, strict=True)
        )

    def _extrapolation(self, view: SaddleView, tau):
        """(theta, factor of tau, and 1/factor of sigma)."""
        one = jnp.ones_like(tau)
        if view.mu_primal is None or (view.mu_dual is None and (not self.accelerate or view.steps is not None)):
            return one, one
        if view.mu_dual is None:
            mu = self._moduli(replace(view, mu_dual=0.0))[0]
            theta = 1 / jnp.sqrt(1 + 2 * jnp.maximum(mu, 0.0) * tau)
            return theta.astype(tau.dtype), theta.astype(tau.dtype)
        # nu = 2 mu tau
        theta = jnp.where(view.certified, 1 / (1 + 2 * self._moduli(view)[0] * tau), 1.0)
        return theta.astype(tau.dtype), one

    def _relaxation(self, view: SaddleView) -> float:
        accelerated = view.mu_primal is not None and self.accelerate and view.steps is None
        plain = view.mu_dual is None and not accelerated or view.mu_primal is None
        if plain:
            return 1.8 if self.relaxation is None else self.relaxation
        if self.relaxation not in (None, 1.0):
            raise ValueError("`relaxation` of PDHG must be 1 where a modulus of strong convexity is used.")
        return 1.0

    def _iteration(self, view: SaddleView, point: Point):
        """One iteration: (where the next one starts, the point right after the proxes, element of T there)."""
        theta, shrink = self._extrapolation(view, point.tau)
        sigma = point.sigma / shrink
        t, s = view.step_trees(point.tau, sigma)
        x = view.prox_primal(trees.sub(point.x, times(t, point.kty)), t)
        kx = view.linear(x)
        extrapolated = trees.add_scaled(kx, theta, trees.sub(kx, point.kx))
        y = view.prox_dual(trees.add(point.y, times(s, extrapolated)), s)
        kty = view.transpose(y)
        after = Point(x=x, y=y, kx=kx, kty=kty, tau=shrink * point.tau, sigma=sigma)
        first = trees.add(divided(trees.sub(point.x, x), t), trees.sub(kty, point.kty))
        second = trees.add_scaled(divided(trees.sub(point.y, y), s), theta, trees.sub(kx, point.kx))
        rho = self._relaxation(view)
        if rho == 1.0:
            return after, after, (first, second)
        x, y, kx, kty = trees.add_scaled(point[:4], rho, trees.sub(after[:4], point[:4]))
        return after._replace(x=x, y=y, kx=kx, kty=kty), after, (first, second)

    def _measured_iteration(self, view: SaddleView, swap, point: Point, norm, work: Work) -> PDHGState:
        """One iteration, and the residual after it."""
        following, after, element = self._iteration(view, point)
        residual = view.measure(*(trees.norm(part) for part in element))
        # of a sum of terms of these sizes
        rounding = view.measure(
            trees.norm(after.x) / after.tau + trees.norm(after.kty),
            trees.norm(after.y) / after.sigma + trees.norm(after.kx),
        )
        size = jnp.sqrt(trees.squared_norm(after.x) + trees.squared_norm(after.y))
        curvature = jnp.where(size > 0, rounding / jnp.where(size > 0, size, 1.0), 0.0)
        displacement, image = scaled_norms(view, trees.sub(after.x, point.x), trees.sub(after.kx, point.kx))
        noise = 64 * trees.eps(after.x) * sum(scaled_norms(view, trees.scale(norm, after.x), after.kx))
        norm_exceeded = image > (1 + EXCESS) * norm * displacement + noise
        failure = jnp.full((), RUNNING, jnp.int32)
        if view.proven_norm:
            failure = jnp.where(norm_exceeded, Status.NORM_BOUND, failure).astype(jnp.int32)
        elif view.steps is None:
            raised = jnp.where(norm_exceeded, MARGIN * image / jnp.where(displacement > 0, displacement, 1.0), norm)
            factor = norm / jnp.where(raised > 0, raised, 1.0)
            following = following._replace(tau=factor * following.tau, sigma=factor * following.sigma)
            norm = raised
        if view.exact_adjoint:
            # for nothing, because both products are at hand
            gap = jnp.abs(trees.dot(after.kx, after.y) - trees.dot(after.x, after.kty))
            sizes = trees.norm(after.kx) * trees.norm(after.y) + trees.norm(after.x) * trees.norm(after.kty)
            failure = jnp.where(gap > jnp.sqrt(trees.eps(after.x)) * sizes, Status.ADJOINT, failure).astype(jnp.int32)
        return PDHGState(
            x=swap((after.x, after.y)),
            gradient=swap(element),
            residual=residual,
            curvature=curvature,
            evaluations=work.plus(gradients=1),
            failure=failure,
            point=following,
            norm=norm,
        )

    def failure(self, state):
        return state.failure
