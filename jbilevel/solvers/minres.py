"""MINRES for H q = b with a symmetric, possibly indefinite or singular H: warm start, true residual, refinement."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import RUNNING, SolveInfo, Status, Work

FLOOR_FACTOR = 256.0  # a residual below this many eps ||H|| ||x|| that does not fall any more is rounding
PATIENCE, GROWTH = 10, 100.0  # x that grows this much in so many steps without effect grows in the null space of H


class MinresState(NamedTuple):
    """A point with its true residual, and what the Lanczos vectors told about H."""

    x: Any
    residual: Any  # b - H x, evaluated
    size: Any  # ||residual||
    norm: Any  # largest ||H v|| of a unit vector met: a lower bound of ||H||
    lowest: Any  # smallest Rayleigh quotient of H met, an upper bound of its smallest eigenvalue: < 0 is indefinite
    steps: Any
    products: Any
    status: Any


class _Lanczos(NamedTuple):
    """One run of the recurrence; the rotations [c s; s -c] turn the tridiagonal matrix into an upper triangle."""

    x: Any
    v: Any
    v_last: Any
    d: Any
    d_last: Any
    beta: Any
    delta_bar: Any
    epsilon: Any
    c: Any
    s: Any
    phi: Any  # residual norm, by recurrence
    norm: Any
    lowest: Any
    steps: Any
    best: Any  # phi when it last fell by 2 per cent,
    scale: Any  # ||x|| then,
    stalled: Any  # steps since then
    running: Any


def _safe(denominator):
    return jnp.where(denominator == 0, 1.0, denominator)


def _advance(product, s: _Lanczos, tol, max_steps) -> _Lanczos:
    """One step of the recurrence; x stays where it is when the residual is orthogonal to the range of H already."""
    eps = trees.eps(s.x)
    hv = trees.cast_like(product(s.v), s.v)
    alpha = trees.dot(s.v, hv)
    v_next = trees.add_scaled(trees.add_scaled(hv, -alpha, s.v), -s.beta, s.v_last)
    beta = trees.norm(v_next)
    norm = jnp.maximum(s.norm, jnp.sqrt(s.beta**2 + alpha**2 + beta**2))
    delta = s.c * s.delta_bar + s.s * alpha
    gamma_bar = s.s * s.delta_bar - s.c * alpha
    # r'Hr/r'r (Liu & Roosta 2022) and ||H r||/||r|| of the residual before this step
    lowest = jnp.minimum(s.lowest, -s.c * gamma_bar)
    optimal = jnp.hypot(gamma_bar, s.c * beta) <= eps * norm

    gamma = jnp.hypot(gamma_bar, beta)
    c, sine = gamma_bar / _safe(gamma), beta / _safe(gamma)
    d = trees.scale(1 / _safe(gamma), trees.add_scaled(trees.add_scaled(s.v, -delta, s.d), -s.epsilon, s.d_last))
    x = trees.add_scaled(s.x, jnp.where(optimal, 0.0, c * s.phi), d)
    phi = jnp.where(optimal, s.phi, sine * s.phi)
    decreased, size = phi < 0.98 * s.best, trees.norm(x)
    stalled = jnp.where(decreased, 0, s.stalled + 1)
    scale = jnp.where(decreased, size, s.scale)
    stagnated = optimal | ((stalled >= PATIENCE) & (scale > 0) & (size > GROWTH * scale))
    running = ~stagnated & (phi > tol) & (phi > eps * norm * scale) & (s.steps + 1 < max_steps) & jnp.isfinite(phi)
    return _Lanczos(
        x=x,
        v=trees.scale(1 / _safe(beta), v_next),
        v_last=s.v,
        d=d,
        d_last=s.d,
        beta=beta,
        delta_bar=-s.c * beta,
        epsilon=s.s * beta,
        c=c,
        s=sine,
        phi=phi,
        norm=norm,
        lowest=lowest,
        steps=s.steps + 1,
        best=jnp.where(decreased, phi, s.best),
        scale=scale,
        stalled=stalled,
        running=running,
    )


def _cycle(product, b, m: MinresState, tol, max_steps) -> MinresState:
    """Run the recurrence from m.x until it claims tol, then evaluate the residual and judge."""
    zero, none = jnp.zeros_like(m.size), trees.zeros_like(m.x)
    start = _Lanczos(
        x=m.x,
        v=trees.scale(1 / _safe(m.size), m.residual),
        v_last=none,
        d=none,
        d_last=none,
        beta=zero,
        delta_bar=zero,
        epsilon=zero,
        c=zero - 1,
        s=zero,
        phi=m.size,
        norm=m.norm,
        lowest=m.lowest,
        steps=m.steps,
        best=m.size,
        scale=trees.norm(m.x),
        stalled=jnp.zeros((), jnp.int32),
        running=m.status == RUNNING,
    )
    # aiming a little lower saves a second run for a residual that rounding put just above tol
    last = jax.lax.while_loop(lambda s: s.running, lambda s: _advance(product, s, 0.99 * tol, max_steps), start)
    residual = trees.cast_like(trees.sub(b, product(last.x)), b)
    size = trees.norm(residual)
    worse, halved = size > m.size, size <= 0.5 * m.size
    status = jnp.where(halved, RUNNING, Status.STAGNATED)
    status = jnp.where(last.steps >= max_steps, Status.MAX_STEPS, status)
    floor = jnp.minimum(FLOOR_FACTOR * trees.eps(b) * last.norm * last.scale, 0.1 * trees.norm(b))
    status = jnp.where(~halved & (jnp.minimum(size, m.size) <= floor), Status.PRECISION, status)
    status = _final_status(size, tol, status)
    x, residual = trees.where(worse, (m.x, m.residual), (last.x, residual))
    products = m.products + last.steps - m.steps + 1
    return MinresState(
        x=x,
        residual=residual,
        size=jnp.where(worse, m.size, size),
        norm=last.norm,
        lowest=last.lowest,
        steps=last.steps,
        products=products,
        status=status,
    )


def _final_status(size, tol, status):
    status = jnp.where(size <= tol, Status.CONVERGED, status)
    return jnp.where(jnp.isfinite(size), status, Status.NONFINITE).astype(jnp.int32)


def iterate(product, b, x0, tol, max_steps, *, zero_start: bool = False) -> MinresState:
    """MINRES (Paige & Saunders 1975, section 6) until ``||b - H x|| <= tol``; see `minres`.

    The state that it returns also tells about H: ``state.lowest < 0`` (beyond rounding, some eps * ``state.norm``)
    proves that H is not positive semidefinite. The recurrence lets its residual drift from the true one, by up to
    eps cond(H)^2 (Sleijpen, van der Vorst & Modersitzki 2000), so the true one is evaluated when it claims the
    tolerance, and the recurrence started afresh from there as long as that at least halves the residual.
    ``zero_start`` saves the product H x0 when x0 is known to be zero.
    """
    residual = b if zero_start else trees.cast_like(trees.sub(b, product(x0)), b)
    size = trees.norm(residual)
    zero = jnp.zeros((), jnp.int32)
    status = _final_status(size, tol, jnp.where(zero >= max_steps, Status.MAX_STEPS, RUNNING))
    start = MinresState(
        x=x0,
        residual=residual,
        size=size,
        norm=jnp.zeros_like(size),
        lowest=jnp.full_like(size, jnp.inf),
        steps=zero,
        products=zero + (not zero_start),
        status=status,
    )
    return jax.lax.while_loop(lambda m: m.status == RUNNING, lambda m: _cycle(product, b, m, tol, max_steps), start)


def minres(product, b, x0=None, *, tol, max_steps=1000) -> tuple[Any, SolveInfo]:
    """Solve ``H x = b`` for a symmetric H given by its product, to ``||b - H x||_2 <= tol``.

    H may be indefinite, or singular when b lies in its range. x_k minimises ``||b - H x||`` over
    x0 + span{r0, H r0, ..., H^(k-1) r0} (Paige & Saunders 1975, section 6); one product per step, one more for each
    evaluation of the true residual.

    Args:
      product: ``v -> H v`` on pytrees like b.
      b: right-hand side. x0: warm start (zero when None).
      tol: absolute, may be traced. max_steps: may be traced.

    Returns:
      (x, info): info.residual is the true ``||b - H x||``; info.error is inf. CONVERGED for an indefinite H too:
      `iterate` also returns the smallest Rayleigh quotient met. STAGNATED when the residual cannot be made smaller
      (b has a part outside the range of H, or H is not symmetric); x is then a least-squares solution.

    >>> import jax.numpy as jnp
    >>> x, info = minres(lambda v: jnp.array([2.0, -4.0]) * v, jnp.array([2.0, 4.0]), tol=1e-5)
    >>> bool(jnp.allclose(x, jnp.array([1.0, -1.0]), atol=1e-4)), int(info.status)
    (True, 0)
    """
    start = trees.zeros_like(b) if x0 is None else trees.cast_like(x0, b)
    last = iterate(product, b, start, tol, max_steps, zero_start=x0 is None)
    info = SolveInfo(
        status=last.status,
        steps=last.steps,
        residual=last.size,
        error=jnp.full_like(last.size, jnp.inf),
        evaluations=Work.zero().plus(products=last.products),
    )
    return last.x, info
