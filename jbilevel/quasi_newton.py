"""Quasi-Newton descent with probed accuracies: no tolerance, step length or schedule has to be chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jbilevel._core import trees
from jbilevel._core.results import StepInfo, acceptable
from jbilevel._method import excursion, lbfgs, probing, steps
from jbilevel._method.base import Method, MethodState, compiled
from jbilevel._method.excursion import Excursion, Jam
from jbilevel._method.point import Point, agreement
from jbilevel._method.probing import BOTH, DELTA, EPS, FACTOR, Accuracy

__all__ = ["QuasiNewton", "QuasiNewtonState"]

# what the next hypergradient is for
FIRST, START, TRIAL, CLOSER, PROBE, EXCURSION = range(6)

FIRST_RADIUS = 0.1  # of the norm of params
GROW = 1.5  # of the radius, where the slope ahead is still this share of the one before
STEEP = 0.5
TURNED = -0.9  # share below which the step went too far
ARMIJO = 1e-3
RECENT = 4  # values, the largest of which a trial has to get below
NOISY = 2.0  # changes of the value in the last probe that a trial may hide in, until it is looked at closer
NOISE = 0.3  # of the decrease that a slope promises, which a look closer leaves
SMOOTH = 0.03  # mismatch of values and slopes up to which a step met no kink, so that its curvature is believed
TRAPEZOID = 0.5  # mismatch of values and slopes that calls for a probe
APART = 2  # accepted steps between such probes
STALE = 1.0  # mean steps of a solve below which its solution is still that of the point before
ONE_STEP = 1.05  # by which accuracies are refined then: the next solve takes a step, and no more than it has to
SUSPECT, FAILURES = 3, 30  # rejected trials in a row: after so many, and every 6, accuracies are probed; the end
WRONG = 5  # trials whose values contradict the slopes at both ends, without a step between whose values agree
SMALL = 1e-6  # gradient, against the largest one, that ends the descent once its steps promise less than rounding
REDUCED = 1e-2  # of the radius: the length by which a reduced gradient is measured


class QuasiNewtonState(MethodState):
    """params: the best point so far, from which the next trial starts unless an excursion is under way."""

    phase: Any  # what the next hypergradient is for
    target: Any  # flat params where it is taken
    accuracy: Accuracy
    point: Point  # where the next trial starts
    kept: Any  # its warm start
    other: Point  # a trial that is looked at closer
    best: Point
    radius: Any
    length: Any  # of the way to the target, before its projection
    limited: Any  # whether the radius bounds it
    memory: lbfgs.Memory
    trail: lbfgs.Trail
    recent: Any  # last values, the newest first
    highest: Any  # value at the start
    jam: Jam
    excursion: Excursion
    taken: Any  # accepted steps
    failures: Any  # rejected trials since the last one
    contradictions: Any  # such trials whose values contradict their slopes, since a step whose values agreed
    starts: Any  # refinements before the first step
    spent: Any  # work
    largest: Any  # reduced gradient so far
    flat: Any  # whether no step promises more than the rounding of values
    done: Any


@dataclass(frozen=True)
class QuasiNewton(Method):
    """Limited-memory BFGS on hypergradients whose accuracies are set by probing. Nothing has to be tuned.

    Each step asks for ONE hypergradient: of a trial, of a trial again (closer), or of the current params (a probe).

    - Accuracy: before the first step eps and delta are refined tenfold until the hypergradient stays. Later, now
      and then, one of them is refined threefold from what was attained: above a move of 50 % it is tightened, below
      20 % loosened. It never follows from the decrease that a step is expected to bring.
    - Direction: L-BFGS with H0 = gamma/RMS of past gradients, pairs over long secants, and Powell's damping, stronger
      where values and slopes disagree. A radius bounds it that follows the ratio of the slopes at both ends of a step.
    - Values, without their first-order error, only veto: a trial has to get below the largest of the last four. One
      that passes within the noise only, or whose solve found nothing to do, is looked at closer. Where values and
      slopes disagree (trapezoidal rule), accuracies are probed.
    - Excursions: where steps overshoot again and again though the gradient stays, as at kinks, long steps are taken
      along averaged gradients, whatever the values are; params stay the best point.

    Args:
      oracle: any hypergradient oracle.
      projection: ``params -> params`` onto a convex feasible set.
      certified: accept a step only where proven bounds on the values show that the exact value decreases (Armijo), and
        refine until they do; no excursions. Needs the constants of the problem.
      pairs: of L-BFGS. The state holds 2 pairs + 50 vectors of the size of params, and two warm starts of the batch.
      log_error: see `jb.Method`.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`. ValueError: ``pairs`` is not positive, or with ``certified`` the oracle
        proves no error of its values (the message says what to pass).

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    >>> oracle = problem.oracle(lambda p, x, d: 0.5 * (x - 3.0) ** 2)
    >>> result = jb.fit(QuasiNewton(oracle), jnp.array(1.0), jnp.array([2.0]), steps=40)  # x_hat = 2 p
    >>> round(float(result.params), 2)
    1.5

    Reference: the rule is ours; L-BFGS is that of Nocedal & Wright (2006), chapter 7.
    """

    _: KW_ONLY
    projection: Callable | None = None
    certified: bool = False
    pairs: int = 10

    compares_values = True
    looks_ahead = True

    def __post_init__(self):
        super().__post_init__()
        if not self.pairs >= 1:
            raise ValueError(f"`pairs` of QuasiNewton must be at least 1, got {self.pairs}.")
        if self.certified and (missing := self.oracle.missing(True)) is not None:
            raise ValueError(f"QuasiNewton needs proven errors of upper-level values; pass {missing}.")

    def init(self, params, batch) -> QuasiNewtonState:
        params = steps.project(self.projection, params)
        first = steps.first_tolerances(self.asked, params, batch, probing.FIRST)
        flat = ravel_pytree(params)[0]
        zero, none, no = jnp.zeros((), flat.dtype), jnp.zeros((), jnp.int32), jnp.asarray(False)
        size = jnp.linalg.norm(flat)
        nowhere = Point.unknown(flat)
        warm = self.oracle.init(params, batch)
        fits = lambda tol: tol.astype(flat.dtype)  # noqa: E731
        return QuasiNewtonState(
            params=params, warm=warm, tol=fits(first.tol), adjoint_tol=fits(first.adjoint_tol), phase=none + FIRST,
            target=flat, accuracy=Accuracy.first(fits(first.tol), fits(first.adjoint_tol)), point=nowhere, kept=warm,
            other=nowhere, best=nowhere, radius=FIRST_RADIUS * jnp.where(size > 0, size, 1.0), length=zero, limited=no,
            memory=lbfgs.empty(flat, self.pairs), trail=lbfgs.Trail.at(flat, nowhere.slope),
            recent=jnp.full((RECENT,), -jnp.inf, flat.dtype), highest=nowhere.value, jam=Jam.none(zero),
            excursion=Excursion.none(flat), taken=none, failures=none, contradictions=none, starts=none, spent=zero,
            largest=zero, flat=no, done=no,
        )  # fmt: skip

    @compiled
    def step(self, state: QuasiNewtonState, batch) -> tuple[QuasiNewtonState, StepInfo]:
        seen, warm = self._look(state, batch)
        branches = (self._first, self._start, self._trial, self._closer, self._probe, self._away)
        largest = jnp.where(seen.finite, jnp.maximum(state.largest, seen.size), state.largest)
        following = replace(state, spent=state.spent + seen.work, warm=warm, largest=largest)
        following = jax.lax.switch(state.phase, branches, following, seen)
        following = following if self.certified else self._around_jams(state, following)
        following = jax.lax.cond(following.phase == TRIAL, self._next, lambda state: state, following)
        following = self._with_best(following)
        return following, self._told(state, following, seen)

    def _look(self, state: QuasiNewtonState, batch) -> tuple[Point, Any]:
        hg = self._ask(state, batch)
        slope = ravel_pytree(hg.grad)[0]
        size = jnp.linalg.norm(slope)
        if self.projection is not None:
            h = REDUCED * state.radius / jnp.where(size > 0, size, 1.0)
            slope = (state.target - self._project(state, state.target - h * slope)) / h
        return Point.of(hg, state.target, slope, size), hg.warm

    def _ask(self, state: QuasiNewtonState, batch, weight=None):
        params, tols = ravel_pytree(state.params)[1](state.target), {"tol": state.tol, "adjoint_tol": state.adjoint_tol}
        return self.asked(params, batch, state.warm, **tols, sample_weight=weight)

    def _project(self, state, flat):
        if self.projection is None:
            return flat
        return ravel_pytree(steps.project(self.projection, ravel_pytree(state.params)[1](flat)))[0]

    # --------------------------------------------------------------------------------------------------- the start

    def _first(self, state, seen: Point):
        state = replace(state, point=seen, kept=state.warm)
        begun = self._begun(state)  # again, where accuracies are known already
        return begun if self.oracle.exact else trees.where(state.starts > 0, begun, self._starting(state))

    def _starting(self, state):
        """The next hypergradient refines both accuracies tenfold."""
        refined = state.tol / probing.START_FACTOR, state.adjoint_tol / probing.START_FACTOR
        return self._here(state, START, state.accuracy, *refined)

    def _start(self, state, seen: Point):
        """Accuracies are good enough once tenfold better ones change the gradient little, or cost too much."""
        accuracy, starts, size = state.accuracy, state.starts + 1, seen.size
        moved = jnp.linalg.norm(seen.slope - state.point.slope)
        dear = seen.work > probing.START_CAP * (state.spent - seen.work)
        enough = ((moved <= probing.MOVED * size) | dear) & (size > 0)
        accuracy = accuracy._replace(
            eps=jnp.where(enough, accuracy.eps, state.tol),
            delta=jnp.where(enough, accuracy.delta, state.adjoint_tol),
            noise=jnp.abs(seen.value - state.point.value),
        )
        state = replace(state, point=seen, kept=state.warm, starts=starts, accuracy=accuracy)
        over = enough | (starts >= probing.STARTS) | ~seen.finite
        return trees.where(over, self._begun(state), self._starting(state))

    def _begun(self, state):
        point = state.point
        return replace(
            self._trying(state),
            recent=jnp.full_like(state.recent, -jnp.inf).at[0].set(point.value),
            trail=lbfgs.Trail.at(point.at, point.slope)._replace(length=state.trail.length),
            highest=point.value,
            best=point,
        )

    def _here(self, state, phase, accuracy: Accuracy, eps, delta):
        """The next hypergradient is taken at the current point, with other accuracies."""
        return replace(
            state,
            phase=jnp.full_like(state.phase, phase),
            accuracy=accuracy,
            target=state.point.at,
            warm=state.kept,
            tol=eps,
            adjoint_tol=delta,
        )

    def _trying(self, state):
        return replace(state, phase=jnp.full_like(state.phase, TRIAL))

    # ----------------------------------------------------------------------------------------------------- trials

    def _next(self, state):
        """The next trial, or step of an excursion."""
        if self.certified:
            state = self._modelled(state)
        else:
            state = jax.lax.cond(state.excursion.on, self._averaged, self._modelled, state)
        accuracy = state.accuracy
        return replace(state, tol=accuracy.eps, adjoint_tol=accuracy.delta, warm=state.kept)

    def _modelled(self, state):
        """Along the direction of the model, as far as the radius allows."""
        slope = state.point.slope
        memory = trees.where(state.failures == 0, lbfgs.saw(state.memory, slope), state.memory)
        d = lbfgs.direction(memory, slope)
        free = (memory.count == 0) | (slope @ d >= 0)
        d = jnp.where(slope @ d < 0, d, -slope)

        def along(d, free, radius=state.radius):
            """(where it leads, how far, whether the radius bounds it)."""
            size = jnp.linalg.norm(d)
            share = radius / jnp.where(size > 0, size, 1.0)
            share = jnp.where(free, share, jnp.minimum(1.0, share))
            target = self._project(state, state.point.at + share * d)
            return target, share * size, free | (radius < size)

        promises = lambda way: -(slope @ (way[0] - state.point.at)) > steps.rounding(state.point.raw)  # noqa: E731
        way, steepest = along(d, free), along(-slope, True)
        model = promises(way)
        # a model that promises nothing may be wrong, unless the gradient itself has become small
        small = state.point.size <= SMALL * state.largest
        target, length, limited = trees.where(model, way, steepest)
        ends = ~model & (small | ~promises(steepest))
        # a radius that failures made small shows nothing
        flat = ends & (small | ~promises(along(-slope, True, jnp.maximum(state.radius, state.jam.longest))))
        state = replace(state, memory=memory, target=target, length=length, limited=limited)
        return replace(state, flat=flat, done=state.done | ends)

    def _averaged(self, state):
        trip, d = state.excursion.next(state.point.slope)
        target = self._project(state, state.point.at + state.radius * d)
        return replace(state, phase=jnp.full_like(state.phase, EXCURSION), excursion=trip, target=target)

    def _trial(self, state, seen: Point):
        slope, level = self._expected(state, seen)
        passes = seen.finite & (seen.value <= level + NOISY * state.accuracy.noise)
        if self.oracle.exact:
            return self._judged(state, seen, passes)
        stale = (seen.steps < STALE) & (seen.lower > 0) & seen.finite
        attained = jnp.minimum(state.accuracy.eps, jnp.where(stale, seen.lower, jnp.inf))
        delta = jnp.minimum(state.accuracy.delta, jnp.where(stale, seen.adjoint, jnp.inf))
        factor = jnp.where(stale, ONE_STEP, FACTOR)
        closer = replace(
            state,
            phase=jnp.full_like(state.phase, CLOSER),
            other=seen,
            tol=attained / factor,
            adjoint_tol=delta / factor,
            accuracy=state.accuracy._replace(eps=attained),
        )
        doubtful = (passes & (seen.value > level)) | stale
        return jax.lax.cond(doubtful, lambda _: closer, lambda _: self._judged(state, seen, passes), None)

    def _expected(self, state, seen: Point):
        """(slope along the step, value to get below)."""
        slope = state.point.slope @ (seen.at - state.point.at)
        return slope, jnp.max(state.recent) + ARMIJO * slope

    def _closer(self, state, seen: Point):
        """A trial that told too little, with better accuracies."""
        slope, level = self._expected(state, seen)
        first, accuracy = state.other, state.accuracy
        noise = jnp.abs(seen.value - first.value)
        moved = jnp.linalg.norm(seen.slope - first.slope) > probing.MOVED * seen.size
        tighten = moved | (noise > NOISE * jnp.abs(slope))
        factor = jnp.where(tighten, 1 / FACTOR, 1.0)
        accuracy = accuracy._replace(
            eps=factor * accuracy.eps,
            delta=factor * accuracy.delta,
            next=jnp.where(tighten, state.taken + probing.GAPS[0], accuracy.next).astype(jnp.int32),
            noise=jnp.minimum(accuracy.noise, noise),
        )
        passes = seen.finite & (seen.value <= level + NOISY * noise)
        return self._judged(replace(state, accuracy=accuracy), seen, passes)

    def _judged(self, state, seen: Point, passes):
        if not self.certified:
            return jax.lax.cond(passes, self._accepted, self._rejected, state, seen)
        slope, point = state.point.slope @ (seen.at - state.point.at), state.point
        proven = seen.finite & (seen.raw + seen.bound <= point.raw - point.bound + ARMIJO * slope)
        outcome = jnp.where(proven, 0, jnp.where(passes, 1, 2))
        return jax.lax.switch(outcome, (self._accepted, self._unproven, self._rejected), state, seen)

    def _unproven(self, state, seen: Point):
        """The values say yes, their bounds do not yet: better accuracies at both ends."""
        failures = state.failures + 1
        state = replace(state, failures=failures, done=state.done | (failures > FAILURES))
        return self._probing(state, BOTH, 0.0)

    def _accepted(self, state, seen: Point):
        step = seen.at - state.point.at
        size, slope = jnp.linalg.norm(step), state.point.slope @ step
        ratio, mismatch = agreement(state.point, seen)
        trail, s, y = state.trail.secant(seen.at, seen.slope, size)
        shrunk = jnp.maximum(0.5 * state.length, 0.25 * state.radius)
        grown = jnp.where((ratio > STEEP) & state.limited, GROW * state.radius, state.radius)
        taken, accuracy = state.taken + 1, state.accuracy
        state = replace(
            self._trying(state),
            point=seen,
            kept=state.warm,
            memory=lbfgs.learn(state.memory, s, y, mismatch < SMOOTH),
            trail=trail,
            radius=jnp.where(ratio < TURNED, shrunk, grown),
            recent=jnp.roll(state.recent, 1).at[0].set(seen.value),
            taken=taken,
            failures=jnp.zeros_like(state.failures),
            contradictions=jnp.where(mismatch < TRAPEZOID, 0, state.contradictions),
        )
        if self.oracle.exact:
            return state
        wrong = (mismatch > TRAPEZOID * jnp.maximum(1.0, jnp.abs(ratio))) & (slope < 0)
        wrong = wrong & (taken - accuracy.last > APART)
        probe = self._probing(state, jnp.where(wrong, BOTH, accuracy.turn), jnp.inf)
        return trees.where(wrong | (taken >= accuracy.next), probe, state)

    def _rejected(self, state, seen: Point):
        finite, step = seen.finite, seen.at - state.point.at
        slope = state.point.slope @ step
        ratio, mismatch = agreement(state.point, seen)
        failures = state.failures + 1
        wrong = finite & (ratio > STEEP) & (mismatch > 1)
        contradictions = state.contradictions + wrong
        rise = seen.value - state.point.value - slope
        share = jnp.where(rise > 0, jnp.clip(-slope / (2 * jnp.where(rise > 0, rise, 1.0)), 0.1, 0.5), 0.5)
        learned = lbfgs.learn(state.memory, step, seen.slope - state.point.slope, mismatch < SMOOTH)
        state = replace(
            self._trying(state),
            memory=trees.where(finite, learned, state.memory),
            radius=jnp.where(finite, share, 0.25) * state.length,
            failures=failures,
            contradictions=contradictions,
            done=state.done | (failures > FAILURES) | (contradictions > WRONG),
        )
        if self.oracle.exact:
            return state
        probe = self._probing(state, BOTH, NOISE * jnp.abs(slope))
        return trees.where((failures == SUSPECT) | (failures % (2 * SUSPECT) == 0), probe, state)

    # ----------------------------------------------------------------------------------------------------- probes

    def _probing(self, state, kind, need):
        accuracy, point = state.accuracy, state.point
        accuracy = accuracy._replace(
            kind=jnp.full_like(accuracy.kind, kind), need=jnp.full_like(accuracy.need, need), last=state.taken
        )
        eps, delta = accuracy.finer(point.lower, point.adjoint)
        eps = jnp.where(accuracy.kind == DELTA, accuracy.eps, eps)
        delta = jnp.where(accuracy.kind == EPS, accuracy.delta, delta)
        return self._here(state, PROBE, accuracy, eps, delta)

    def _probe(self, state, seen: Point):
        point, size, change = state.point, seen.size, seen.value - state.point.value
        moved = jnp.linalg.norm(seen.slope - point.slope) / jnp.where(size > 0, size, 1.0)
        accuracy = state.accuracy.judged(
            moved, change, point.lower, point.adjoint, taken=state.taken, failing=state.failures > 0
        )
        return replace(
            self._trying(state),
            point=seen,
            kept=state.warm,
            accuracy=accuracy,
            recent=state.recent.at[0].add(change),
            trail=state.trail.again(seen.slope),
        )

    # ------------------------------------------------------------------------------------------------- excursions

    def _around_jams(self, before, state):
        """Begins an excursion in a jam, and ends it where it leads nowhere."""
        tried = ((before.phase == TRIAL) & (state.phase != CLOSER)) | (before.phase == CLOSER)
        rejected = state.failures > before.failures
        overshot = rejected | (state.radius < before.radius)
        size = state.point.size
        jam = state.jam.tried(overshot, jnp.where(rejected, 0.0, before.length), size)
        jam = trees.where(tried, jam, state.jam._replace(steepest=jnp.maximum(state.jam.steepest, size)))
        work = state.spent - before.spent
        state = replace(state, jam=jam, excursion=state.excursion.used(work))
        trip, point, best = state.excursion, state.point, state.best
        lost = point.value - best.value > excursion.LOST * (state.highest - best.value)
        lost = lost | (work > excursion.DEAR * trip.usual)
        ends = trip.on & ((trip.idle > excursion.IDLE) | lost) & (state.phase == TRIAL)
        begins = ~trip.on & jam.is_one(state.radius, size) & (state.phase == TRIAL) & ~state.done
        choice = jnp.where(ends, 1, jnp.where(begins, 2, 0))
        return jax.lax.switch(choice, (lambda state, _: state, self._home, self._leaving), state, lost)

    def _leaving(self, state, _):
        trip, accuracy = state.excursion, state.accuracy
        looser = accuracy._replace(
            eps=jnp.maximum(accuracy.eps, trip.eps), delta=jnp.maximum(accuracy.delta, trip.delta)
        )
        return replace(state, radius=trip.longer(state.jam.longest), excursion=trip.begun(), accuracy=looser)

    def _home(self, state, lost):
        """Back at the best point, with the radius of the excursion."""
        best, accuracy, none = state.best, state.accuracy, jnp.zeros_like(state.failures)
        radius = jnp.where(lost, excursion.RETREAT, 1.0) * state.radius
        trip = state.excursion._replace(
            on=jnp.zeros_like(state.excursion.on), radius=radius, eps=accuracy.eps, delta=accuracy.delta
        )
        gap = jnp.full_like(accuracy.gap, probing.GAPS[1])
        return replace(
            state,
            excursion=trip,
            point=best,
            radius=radius,
            jam=state.jam._replace(overshoots=jnp.zeros_like(radius)),
            recent=jnp.full_like(state.recent, -jnp.inf).at[0].set(best.value),
            trail=lbfgs.Trail.at(best.at, best.slope),
            accuracy=accuracy._replace(gap=gap, next=(state.taken + gap).astype(jnp.int32)),
            failures=none,
        )

    def _away(self, state, seen: Point):
        """One step of an excursion, whatever its value."""
        step = seen.at - state.point.at
        length = seen.size * jnp.linalg.norm(step)
        cosine = -(seen.slope @ step) / jnp.where(length > 0, length, 1.0)
        finite, taken = seen.finite, state.taken + 1
        better = seen.value < state.best.value - state.accuracy.noise
        state = replace(
            self._trying(state),
            excursion=state.excursion.saw(jnp.where(finite, seen.value, state.highest), better),
            point=trees.where(finite, seen, state.point),
            kept=trees.where(finite, state.warm, state.kept),
            radius=excursion.grown(state.radius, cosine, finite),
            taken=taken,
            recent=jnp.roll(state.recent, 1).at[0].set(seen.value),
        )
        return trees.where(taken >= state.accuracy.next, self._probing(state, state.accuracy.turn, jnp.inf), state)

    # ----------------------------------------------------------------------------------------------------- report

    def _with_best(self, state):
        """params follow the current point, but on an excursion only where the value is better beyond its noise."""
        trip, point, started = state.excursion, state.point, state.phase > START
        better = point.value < state.best.value - jnp.where(trip.on, state.accuracy.noise, 0.0)
        best = trees.where(started & (~trip.on | better), point, state.best)
        params = ravel_pytree(state.params)[1](jnp.where(started, best.at, ravel_pytree(state.params)[0]))
        return replace(state, best=best, params=params)

    def _told(self, before, after, seen: Point) -> StepInfo:
        at = trees.where(before.phase <= START, seen, before.best)
        moved = jnp.linalg.norm(after.best.at - before.best.at)
        return StepInfo(
            value=at.raw,
            grad_norm=at.grad_norm,
            error=at.error,
            step=jnp.where(before.phase <= START, 0.0, moved),
            tol=before.tol,
            adjoint_tol=before.adjoint_tol,
            work=seen.work,
            status=jnp.where(moved > 0, jnp.maximum(at.status, seen.status), at.status),
            done=after.done | before.done,
            stationary=after.flat & acceptable(at.status),
        )


def __dir__():
    return __all__
