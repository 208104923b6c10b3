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

# A float32 solve is asked for no smaller relative residual; refinement goes on while it gains at least the factor GAIN.
FINEST = 1e-5
GAIN = 0.1


class Direction(NamedTuple):
    x: Any
    status: Any
    steps: Any
    curvature: Any  # largest met


class Curvature(NamedTuple):
    """A Hessian as conjugate gradients should apply it: in float32 where the problem allows it, else as given."""

    product: Callable
    full: Callable  # the product in the dtype of x
    rough: bool

    def start(self, b, steps, share) -> CGState:
        """CG from zero on H x = b/||b|| until the residual is at most ``share``; `lift` undoes the scaling."""
        size = trees.norm(b)
        b = trees.scale(1.0 / jnp.where(size > 0, size, 1.0), b)
        b = trees.to_single(b) if self.rough else b
        return iterate(self.product, b, trees.zeros_like(b), self._share(share, b), steps, zero_start=True)

    def resume(self, state: CGState, steps, share) -> CGState:
        return resume(self.product, state, self._share(share, state.x), steps)

    def lift(self, state: CGState, b):
        """The solution of H x = b from a state of CG started with b; NaN where products were."""
        factor = jnp.where(state.status == Status.NONFINITE, jnp.nan, trees.norm(b))
        return trees.scale(factor, trees.cast_like(state.x, b))

    def solve(self, b, steps, share) -> Direction:
        """`start` and `lift`, in the dtype of b after all where float32 overflowed."""
        state = self.start(b, steps, share)
        x = trees.scale(trees.norm(b), trees.cast_like(state.x, b))  # the last finite iterate
        curvature = state.curvature.astype(trees.dtype(b))
        if not self.rough:
            return Direction(x, state.status, state.steps, curvature)
        failed = state.status == Status.NONFINITE
        goal, steps = share * trees.norm(b), jnp.where(failed, steps, 0)
        again = iterate(self.full, b, trees.zeros_like(b), goal, steps, zero_start=True)
        first = Direction(x, state.status, state.steps, curvature)
        return trees.where(failed, Direction(again.x, again.status, again.steps + state.steps, again.curvature), first)

    def _share(self, share, b):
        share = jnp.asarray(share, trees.dtype(b))
        return jnp.maximum(share, FINEST) if self.rough else share


def curvature(view, x, product) -> Curvature:
    """The Hessian at x. ``product``: its product in the dtype of x, returned where float32 does not apply."""
    single = view.single(x)
    if single is None:
        return Curvature(product, product, False)
    return Curvature(single.linearize(trees.to_single(x))[2], product, True)


class Refined(NamedTuple):
    q: Any
    residual: Any  # b - H q
    products: Any


def refine(view, x, product, b, q, tol, max_products) -> Refined:
    """Iterative refinement of H(x) q = b in float32 from q, until tol or until float32 does not help any more."""
    rough = curvature(view, x, product)
    r = trees.sub(b, product(q))
    one = jnp.ones((), jnp.int32)

    class State(NamedTuple):
        q: Any
        r: Any
        size: Any
        products: Any
        good: Any

    def unfinished(s: State):
        return (s.size > tol) & s.good & (s.products < max_products)

    def step(s: State) -> State:
        inner = rough.start(s.r, max_products - s.products, 0.5 * tol / s.size)
        q = trees.add(s.q, rough.lift(inner, s.r))
        r = trees.sub(b, product(q))
        size = trees.norm(r)
        better = size < s.size
        good = (size <= GAIN * s.size) & (inner.status != Status.INDEFINITE)
        products = s.products + inner.steps + 1
        return State(
            q=trees.where(better, q, s.q),
            r=trees.where(better, r, s.r),
            size=jnp.where(better, size, s.size),
            products=products,
            good=good,
        )

    start = State(q=q, r=r, size=trees.norm(r), products=one, good=jnp.asarray(True))
    last = jax.lax.while_loop(unfinished, step, start)
    return Refined(last.q, last.r, last.products)
