"""Conjugate gradients for H q = b with warm start, true residual and negative-curvature detection."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import RUNNING, SolveInfo, Status, Work
from jbilevel.prox import same_output

PATIENCE = 50
SHIFTS = 32
EXCESS = 1e-3  # by which a modulus is too large before it is called wrong


class Spectrum(NamedTuple):
    """What conjugate gradients see of the smallest eigenvalue of H, by a few numbers per step.

    The steps factorise the Lanczos matrix T = R'R, R bidiagonal. The norm of R^-1 is estimated from below as R grows
    (incremental norm estimation, Duff & Voemel 2002; for CG Meurant & Tichy 2019): 1/||R^-1||^2 >= lambda_min(T)
    >= lambda_min(H).
    """

    inverse: Any  # ||R^-1||^2
    link: Any  # how the next column of R^-1 depends on the vector that attains it

    @classmethod
    def none(cls, like) -> Spectrum:
        return cls(inverse=jnp.zeros_like(like), link=jnp.zeros_like(like))

    @property
    def least(self):
        """An upper bound on the smallest eigenvalue of H, inf before the first step."""
        return jnp.where(self.inverse > 0, 1 / jnp.where(self.inverse > 0, self.inverse, 1.0), jnp.inf)

    def extended(self, alpha, beta) -> Spectrum:
        """After a step of length alpha, with the next direction r + beta p."""
        first, mixed, second = self.inverse + alpha * self.link**2, -alpha * self.link, alpha
        mean, half = 0.5 * (first + second), 0.5 * (first - second)
        radius = jnp.hypot(half, mixed)
        # the eigenvector of [[first, mixed], [mixed, second]], without cancellation
        s, c = jnp.where(half >= 0, half + radius, mixed), jnp.where(half >= 0, mixed, radius - half)
        size = jnp.hypot(s, c)
        s, c = jnp.where(size > 0, s / jnp.where(size > 0, size, 1.0), 1.0), c / jnp.where(size > 0, size, 1.0)
        return Spectrum(inverse=mean + radius, link=jnp.sqrt(beta) * (c - s * self.link))


class CGState(NamedTuple):
    x: Any
    residual: Any  # b - H x, by recurrence
    direction: Any
    rr: Any  # <r, r>, r the residual
    # by recurrences (Steihaug 1983), because a reduction costs as much as the rest of a step
    pp: Any  # <p, p>, p the direction
    dp: Any  # <d, p>, d = x - x0
    dd: Any  # <d, d>
    start_norm: Any  # ||x0||
    curvature: Any  # largest p'Hp/p'p met
    spectrum: Spectrum
    steps: Any
    best: Any  # rr when it last fell by 2 per cent
    stalled: Any  # steps since then
    status: Any
    rz: Any = None  # <r, M r> with a preconditioner M
    steps_taken: Any = None  # (alphas, betas) of the first steps, where they are kept

    @property
    def least_curvature(self):
        """An upper bound on the smallest eigenvalue of H."""
        return self.spectrum.least


def iterate(product, b, x0, tol, max_steps, *, zero_start: bool = False, inverse=None, kept: int = 0) -> CGState:
    """Hestenes-Stiefel conjugate gradients until ``||b - H x|| <= tol``.

    Stops with INDEFINITE at a direction of nonpositive curvature (Steihaug 1983): x is then the last iterate before
    it, or x0. ``zero_start`` saves the product H x0 when x0 is known to be zero. ``inverse``: r -> M r, see `cg`.
    ``kept``: of so many steps the coefficients are kept, for `distance_left`.
    """
    r = b if zero_start else trees.cast_like(trees.sub(b, product(x0)), b)
    rr = trees.squared_norm(r)
    zero = jnp.zeros((), jnp.int32)
    none, never = jnp.zeros_like(rr), jnp.full_like(rr, jnp.inf)
    start_norm = none if zero_start else trees.norm(x0)
    z, rz = (r, None) if inverse is None else _preconditioned(inverse, r, rr)
    start = CGState(
        x=x0,
        residual=r,
        direction=z,
        rr=rr,
        pp=rr if rz is None else trees.squared_norm(z),
        dp=none,
        dd=none,
        start_norm=start_norm,
        curvature=none,
        spectrum=Spectrum.none(rr),
        steps=zero,
        best=never,
        stalled=zero,
        status=zero,
        rz=rz,
        steps_taken=(jnp.zeros(kept, rr.dtype), jnp.zeros(kept, rr.dtype)) if kept else None,
    )
    return resume(product, start, tol, max_steps, inverse=inverse)


def _preconditioned(inverse, r, rr):
    """(M r, <r, M r>), which is 0 where it is not positive beyond rounding: M is then not positive definite."""
    z = inverse(r)
    rz, rounding = trees.dot(r, z), trees.eps(r) * jnp.sqrt(rr) * trees.norm(z)
    return z, jnp.where(rz <= jnp.where(jnp.isfinite(rounding), rounding, 0.0), 0.0, rz)


def resume(product, state: CGState, tol, max_steps, *, inverse=None) -> CGState:
    """Go on from a state of `iterate`, with another tolerance or step limit (counted from the first step)."""
    eps = trees.eps(state.x)

    def update_status(s: CGState) -> CGState:
        better = s.rr < 0.98 * s.best
        stalled = jnp.where(better, 0, s.stalled + 1)
        floor = 16 * eps * s.curvature * (s.start_norm + jnp.sqrt(jnp.maximum(s.dd, 0.0)))
        status = jnp.where(s.steps >= max_steps, Status.MAX_STEPS, s.status)
        stagnated = (stalled >= PATIENCE) & (jnp.sqrt(s.rr) <= 1e3 * floor)
        rounding = (s.steps > 0) & (jnp.sqrt(s.rr) <= floor)
        status = jnp.where(stagnated | rounding, Status.PRECISION, status)
        status = jnp.where(s.status == Status.INDEFINITE, Status.INDEFINITE, status)
        if s.rz is not None:
            status = jnp.where(s.rz == 0, Status.PRECONDITIONER, status)
            status = jnp.where(jnp.isfinite(s.rz), status, Status.NONFINITE)
        status = jnp.where(jnp.sqrt(s.rr) <= tol, Status.CONVERGED, status)
        status = jnp.where(jnp.isfinite(s.rr), status, Status.NONFINITE)
        best = jnp.where(better, s.rr, s.best)
        return s._replace(best=best, stalled=stalled, status=status.astype(jnp.int32))

    def step(s: CGState) -> CGState:
        hp = trees.cast_like(product(s.direction), s.direction)
        php = trees.dot(s.direction, hp)
        positive = php > 0
        alpha = jnp.where(positive, (s.rr if s.rz is None else s.rz) / jnp.where(positive, php, 1.0), 0.0)
        x = trees.add_scaled(s.x, alpha, s.direction)
        r = trees.add_scaled(s.residual, -alpha, hp)
        rr = trees.squared_norm(r)
        z, rz = (r, None) if inverse is None else _preconditioned(inverse, r, rr)
        beta = rr / s.rr if rz is None else rz / s.rz
        direction = trees.add_scaled(z, beta, s.direction)
        if rz is None:
            pp = rr + beta**2 * s.pp
            dp = beta * (s.dp + alpha * s.pp)
            dd = s.dd + 2 * alpha * s.dp + alpha**2 * s.pp
        else:  # the recurrences are those of the norm of M^-1; ||x|| <= start_norm + ||x|| will do
            pp, dp, dd = trees.squared_norm(direction), s.dp, trees.squared_norm(x)
        # a NaN product is NONFINITE, not a direction of negative curvature
        status = jnp.where(positive, RUNNING, Status.INDEFINITE).astype(jnp.int32)
        rr = jnp.where(jnp.isnan(php), jnp.nan, rr)
        quotient = php / s.pp
        if rz is None:
            spectrum = s.spectrum.extended(alpha, beta)
        else:  # T is that of M H: the quotients are what is known of H
            spectrum = s.spectrum._replace(inverse=jnp.maximum(s.spectrum.inverse, 1 / quotient))
        spectrum = trees.where(positive, spectrum, s.spectrum)
        taken = s.steps_taken
        if taken is not None:
            taken = tuple(a.at[s.steps].set(b, mode="drop") for a, b in zip(taken, (alpha, beta), strict=True))
        following = s._replace(
            x=x,
            residual=r,
            direction=direction,
            rr=rr,
            pp=pp,
            dp=dp,
            dd=dd,
            curvature=jnp.maximum(s.curvature, quotient),
            spectrum=spectrum,
            steps=s.steps + 1,
            status=status,
            rz=rz,
            steps_taken=taken,
        )
        return update_status(following)

    start = update_status(
        state._replace(status=jnp.full((), RUNNING, jnp.int32), best=jnp.full_like(state.best, jnp.inf))
    )
    return jax.lax.while_loop(lambda s: s.status == RUNNING, step, start)


def smallest_ritz_value(state: CGState):
    """Smallest eigenvalue of the Lanczos matrix of all steps, which were ``kept``, from below to 3 per cent: about that
    of H, or above. inf without steps.

    By the signs of the pivots of T - shift (Sturm's sequence), for shifts over twelve decades, and again between two.
    """
    alphas, betas = state.steps_taken
    index = jnp.arange(alphas.size)
    taken = index < state.steps
    lengths, ratios = jnp.where(taken, alphas, 1.0), jnp.where(taken, betas, 0.0)
    before = jnp.where(index > 0, jnp.roll(ratios / lengths, 1), 0.0)
    diagonal = 1 / lengths + before
    squares = jnp.where(index > 0, before / jnp.roll(lengths, 1), 0.0)  # of what stands beside it

    def below(shifts):
        """Whether each is below the smallest eigenvalue: all pivots are positive then."""

        def pivot(carry, row):
            last, positive = carry
            entry, square, used = row
            following = entry - shifts - square / last
            fine = following > 0
            return (jnp.where(used & fine, following, last), positive & (fine | ~used)), None

        first = jnp.ones_like(shifts), jnp.ones(shifts.shape, bool)
        return jax.lax.scan(pivot, first, (diagonal, squares, taken))[0][1]

    largest = jnp.min(jnp.where(taken, diagonal, jnp.inf))
    grid = jnp.linspace(0.0, 1.0, SHIFTS, dtype=lengths.dtype)
    shifts = largest * 10.0 ** (12 * (grid - 1))
    lowest, step = _last(shifts, below(shifts)), 12 / (SHIFTS - 1)
    shifts = lowest * 10.0 ** (step * grid)
    return jnp.where((state.steps > 0) & jnp.isfinite(largest), _last(shifts, below(shifts)), jnp.inf)


def _last(shifts, fine):
    """The last one up to which all are fine, 0 where none is: the matrix is singular, as far as one can see."""
    count = jnp.sum(jnp.cumprod(fine))
    return jnp.where(count > 0, shifts[jnp.maximum(count - 1, 0)], 0.0)


def distance_left(state: CGState, modulus):
    """||x - H^-1 b||/||x - x0|| after all steps were ``kept``, by a modulus > 0 that is below all eigenvalues of H.

    With it Gauss-Radau quadrature bounds the energy norm of the error from above at the last step (Golub & Meurant
    1994, by the recurrence of Meurant & Tichy 2013), in exact arithmetic, and so its 2-norm, which is that over
    sqrt(modulus) at most. inf where the modulus is not below what was seen.
    """
    alphas, betas = state.steps_taken
    modulus = jnp.asarray(modulus, alphas.dtype)  # the steps may be those of a float32 solve

    def extend(radau, step):
        index, alpha, beta = step
        above = radau - alpha
        following = jnp.where(above > 0, above / (modulus * above + beta), jnp.inf)
        return jnp.where(index < state.steps, following, radau), None

    steps = jnp.arange(alphas.size)
    first = jnp.asarray(1 / modulus, alphas.dtype)
    radau, _ = jax.lax.scan(extend, first, (steps, alphas, betas))
    left, moved = jnp.sqrt(radau * state.rr / modulus), jnp.sqrt(jnp.maximum(state.dd, 0.0))
    known = jnp.isfinite(modulus) & (modulus > 0) & ~jnp.isnan(left)
    return jnp.where(state.rr == 0, 0.0, jnp.where(known & (moved > 0), left / jnp.where(moved > 0, moved, 1), jnp.inf))


def disproves(state: CGState, modulus):
    """Whether an eigenvalue was seen below a modulus of convexity, by more than rounding."""
    noise = 64 * trees.eps(state.x) * state.curvature
    return state.least_curvature < (1 - EXCESS) * modulus - noise


def cg(product, b, x0=None, *, tol, max_steps=1000, inverse=None, modulus=None) -> tuple[Any, SolveInfo]:
    """Solve ``H x = b`` for a symmetric positive definite H given by its product, to ``||b - H x||_2 <= tol``.

    Args:
      product: ``v -> H v`` on pytrees like b.
      b: right-hand side. x0: warm start (zero when None).
      tol: absolute, may be traced. max_steps: may be traced.
      inverse: ``r -> M r`` on pytrees like b, a symmetric positive definite preconditioner M close to H^-1; None: the
        identity. What is stopped on and reported is the residual itself, not that of the preconditioned system.
      modulus: a lower bound on the eigenvalues of H that is to be watched; None: none.

    Returns:
      (x, info): info.residual is recomputed as ``||b - H x||``, not taken from the recurrence; info.error is inf
      (divide the residual by mu where it is known). INDEFINITE when a direction of nonpositive curvature was met,
      PRECONDITIONER when <r, M r> was not positive; x is then the last iterate before. CONVEXITY when an
      eigenvalue below ``modulus`` was seen.

    Raises:
      ValueError, TypeError: M r does not have the structure and the shapes, or the dtypes, of r.

    >>> import jax.numpy as jnp
    >>> x, info = cg(lambda v: jnp.array([2.0, 4.0]) * v, jnp.array([2.0, 4.0]), tol=1e-6)
    >>> bool(jnp.allclose(x, 1.0)), int(info.status)
    (True, 0)
    """
    return observed_cg(product, b, x0, tol=tol, max_steps=max_steps, inverse=inverse, modulus=modulus)[:2]


def observed_cg(product, b, x0=None, *, tol, max_steps=1000, inverse=None, modulus=None) -> tuple[Any, SolveInfo, Any]:
    """As `cg`, and an upper bound on the smallest eigenvalue of H."""
    if inverse is not None:
        same_output(jax.eval_shape(inverse, b), b, "a preconditioner")
    start = trees.zeros_like(b) if x0 is None else trees.cast_like(x0, b)
    last = iterate(product, b, start, tol, max_steps, zero_start=x0 is None, inverse=inverse)
    info = finish(product, b, last.x, last.status, last.steps, tol, products=last.steps + (x0 is not None))
    if modulus is not None:
        wrong = disproves(last, modulus) & (info.status <= Status.MAX_STEPS)
        info = info._replace(status=jnp.where(wrong, Status.CONVEXITY, info.status).astype(jnp.int32))
    return last.x, info, last.least_curvature


def finish(product, b, x, status, steps, tol, *, products) -> SolveInfo:
    """Report the true residual; a recurrence that drifted away from it has reached the dtype's precision."""
    residual = trees.norm(trees.sub(b, product(x)))
    drifted = (status == Status.CONVERGED) & (residual > 1.01 * tol + 1e-30)
    status = jnp.where(drifted, Status.PRECISION, status)
    # where eps cond(H) is about 1 even rounding leaves a residual like that of x = 0: no solution to accept
    status = jnp.where((status == Status.PRECISION) & (residual > 0.1 * trees.norm(b)), Status.STAGNATED, status)
    return SolveInfo(
        status=status.astype(jnp.int32),
        steps=steps,
        residual=residual,
        error=jnp.full_like(residual, jnp.inf),
        evaluations=Work.zero().plus(products=products + 1),
    )
