"""Mixed precision for float64 unknowns: the many conjugate gradient steps in float32, what decides accuracy in float64.

A step of conjugate gradients on a large image is bound by memory traffic, which float32 halves (and on most GPUs it is
many times faster). Iterative refinement (Moler 1967) makes up for its rounding: every residual is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Status
from jbilevel.solvers.cg import CGState, iterate, resume

# A float32 solve is asked for no smaller relative residual; refinement goes on while each one achieves REDUCTION.
SINGLE_TOL = 1e-5
REDUCTION = 0.1


class InexactSolution(NamedTuple):
    x: Any
    status: Any
    steps: Any
    curvature: Any  # largest met
    least_curvature: Any


class Hessian(NamedTuple):
    """A Hessian as conjugate gradients should apply it: in float32 where the problem allows it, else as given."""

    product: Callable
    full: Callable  # the product in the dtype of x
    in_single: bool

    def start(self, b, steps, rtol, kept: int = 0) -> CGState:
        """CG from zero on H x = b/||b|| until the residual is at most ``rtol``; `solution` undoes the scaling."""
        size = trees.norm(b)
        b = trees.scale(1.0 / jnp.where(size > 0, size, 1.0), b)
        b = trees.to_single(b) if self.in_single else b
        return iterate(
            self.product, b, trees.zeros_like(b), self._attainable(rtol, b), steps, zero_start=True, kept=kept
        )

    def resume(self, state: CGState, steps, rtol) -> CGState:
        return resume(self.product, state, self._attainable(rtol, state.x), steps)

    def solution(self, state: CGState, b):
        """The solution of H x = b from a state of CG started with b; NaN where products were."""
        factor = jnp.where(state.status == Status.NONFINITE, jnp.nan, trees.norm(b))
        return trees.scale(factor, trees.cast_like(state.x, b))

    def solve(self, b, steps, rtol) -> InexactSolution:
        """`start` and `solution`, in the dtype of b after all where float32 overflowed."""
        state = self.start(b, steps, rtol)
        x = trees.scale(trees.norm(b), trees.cast_like(state.x, b))  # the last finite iterate
        first = InexactSolution(
            x=x,
            status=state.status,
            steps=state.steps,
            curvature=state.curvature.astype(trees.dtype(b)),
            least_curvature=state.least_curvature.astype(trees.dtype(b)),
        )
        if not self.in_single:
            return first
        failed = state.status == Status.NONFINITE
        tol, steps = rtol * trees.norm(b), jnp.where(failed, steps, 0)
        retried = iterate(self.full, b, trees.zeros_like(b), tol, steps, zero_start=True)
        second = InexactSolution(
            x=retried.x,
            status=retried.status,
            steps=retried.steps + state.steps,
            curvature=retried.curvature,
            least_curvature=retried.least_curvature,
        )
        return trees.where(failed, second, first)

    def _attainable(self, rtol, b):
        rtol = jnp.asarray(rtol, trees.dtype(b))
        return jnp.maximum(rtol, SINGLE_TOL) if self.in_single else rtol


def hessian_at(view, x, product) -> Hessian:
    """The Hessian at x. ``product``: its product in the dtype of x, returned where float32 does not apply."""
    single = view.single(x)
    if single is None:
        return Hessian(product, product, False)
    return Hessian(single.linearize(trees.to_single(x))[2], product, True)


class Refined(NamedTuple):
    q: Any
    residual: Any  # b - H q
    products: Any
    least_curvature: Any  # an upper bound on the smallest eigenvalue of H


def refine(view, x, product, b, q, tol, max_products) -> Refined:
    """Iterative refinement of H(x) q = b in float32 from q, until tol or until float32 does not help any more."""
    hessian = hessian_at(view, x, product)
    r = trees.sub(b, product(q))
    one = jnp.ones((), jnp.int32)

    class State(NamedTuple):
        q: Any
        r: Any
        residual_norm: Any
        products: Any
        improving: Any
        least_curvature: Any

    def unfinished(s: State):
        return (s.residual_norm > tol) & s.improving & (s.products < max_products)

    def step(s: State) -> State:
        inner = hessian.start(s.r, max_products - s.products, 0.5 * tol / s.residual_norm)
        q = trees.add(s.q, hessian.solution(inner, s.r))
        r = trees.sub(b, product(q))
        residual_norm = trees.norm(r)
        better = residual_norm < s.residual_norm
        improving = (residual_norm <= REDUCTION * s.residual_norm) & (inner.status != Status.INDEFINITE)
        products = s.products + inner.steps + 1
        return State(
            q=trees.where(better, q, s.q),
            r=trees.where(better, r, s.r),
            residual_norm=jnp.where(better, residual_norm, s.residual_norm),
            products=products,
            improving=improving,
            least_curvature=jnp.minimum(s.least_curvature, inner.least_curvature.astype(s.least_curvature.dtype)),
        )

    size = trees.norm(r)
    start = State(
        q=q,
        r=r,
        residual_norm=size,
        products=one,
        improving=jnp.asarray(True),
        least_curvature=jnp.full_like(size, jnp.inf),
    )
    last = jax.lax.while_loop(unfinished, step, start)
    return Refined(last.q, last.r, last.products, last.least_curvature)
