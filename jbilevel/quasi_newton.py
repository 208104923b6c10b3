"""Quasi-Newton descent with probed accuracy: no tolerance, rate or schedule has to be chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jbilevel._core import trees
from jbilevel._core.results import StepInfo, acceptable
from jbilevel._method import lbfgs, steps
from jbilevel._method.base import Method, MethodState, compiled

__all__ = ["QuasiNewton", "QuasiNewtonState"]

# what the next hypergradient is for
FIRST, START, TRIAL, CLOSER, PROBE, WANDER = range(6)
EPS, DELTA, BOTH = range(3)  # what a probe refines

import os
def C(name, default): return float(os.environ.get(name, default))
STALE=C('STALE',1)
JAM=C('JAM',.4); JAMD=C('JAMD',.8); BETA=C('BETA',.3); B1=C('B1',.9); B2=C('B2',.99); WR=C("WR",.3); BACK=C('BACK',1e9); JAMR=C('JAMR',.1); IDLE=C('IDLE',15); GIVEUP=C('GIVEUP',.5); GIVER=C('GIVER',.3); CLEAR=C('CLEAR',0); RR=C('RR',1)
GF=C('GF',1.5); GFR=C('GFR',.7); GFM=C('GFM',.1); PROP=C('PROP',0)
STALE_SET=C('STALE_SET',0)
FIRST_ACCURACY = 0.1  # of the scales at the cold start
FIRST_RADIUS = 0.1  # of the norm of params
START_FACTOR = C('START_FACTOR', 10.0)  # by which accuracies are refined until the gradient stays
START_CAP = C('START_CAP', 3.0)  # cost of a refinement at the start, against all work before, that ends it
STARTS = 12
MOVED, STAYED = C('MOVED',0.3), C('STAYED',0.1)  # share by which a probe moves the gradient: tighten above, loosen below
FACTOR = C('FACTOR', 3.0)  # of a probe
ARMIJO = 1e-3
GROW = C('GROW', 1.5)  # of the radius
GAP, LONGEST_GAP, SHORT_GAP = int(C('GAP',10)), 40, 2  # accepted steps between probes
RECENT = 4  # values, the largest of which a trial has to get below
TRAIL = 20  # points from which secants are taken
FORGET = C('FORGET', 0.97)  # of the length of secants, at each step
TRAPEZOID = C('TRAPEZOID', 0.5)  # mismatch of value and slopes that calls for a probe
NOISY = C('NOISY', 2.0)  # changes of the value in the last probe that a trial may hide in, until it is looked at closer
FAILURES = 30


class Point(NamedTuple):
    """What is known at one point: the value without its first-order error, and what of the gradient can move it."""

    at: Any  # flat params
    value: Any
    slope: Any  # flat reduced gradient
    raw: Any  # value as the oracle gives it
    grad_norm: Any
    error: Any
    bound: Any  # proven, of the raw value
    lower: Any  # accuracies that were attained
    adjoint: Any
    moves: Any  # mean steps of the two solves
    adjoint_moves: Any
    status: Any
    work: Any  # spent on it


class QuasiNewtonState(MethodState):
    phase: Any  # what the next hypergradient is for
    kind: Any  # what a probe refines: eps, delta or both
    target: Any  # flat params where it is taken
    eps: Any  # accuracies in force
    delta: Any
    point: Point  # the current one
    kept: Any  # its warm start
    other: Point  # a trial that is looked at closer
    radius: Any
    length: Any  # of the step to the target, as a share of the direction, times its norm
    limited: Any  # whether the radius bounds it
    noise: Any  # change of the value in the last probe
    memory: lbfgs.Memory
    trail: Any  # (TRAIL, p) points, newest first
    slopes: Any  # and their gradients
    behind: Any  # how many there are
    recent: Any  # last values
    secant: Any  # length of secants
    taken: Any  # accepted steps
    failures: Any  # rejected trials since the last one
    need: Any  # noise that a probe must not exceed
    next_probe: Any
    last_probe: Any
    gap: Any
    turn: Any  # which accuracy is probed next
    starts: Any
    work: Any
    probed_at: Any  # work spent until the last probe
    cost: Any  # of the last probe of each kind
    wander: Any
    jam: Any
    momentum: Any
    squares: Any
    beats: Any
    best: Point
    longest: Any
    free: Any
    free_eps: Any
    free_delta: Any
    highest: Any
    steepest: Any
    idle: Any
    done: Any
    stationary: Any


@dataclass(frozen=True)
class QuasiNewton(Method):
    """Limited-memory BFGS whose accuracies are set by probing how far the hypergradient moves."""

    _: KW_ONLY
    projection: Callable | None = None
    certified: bool = False
    pairs: int = 10

    compares_values = True

    def init(self, params, batch) -> QuasiNewtonState:
        params = steps.project(self.projection, params)
        first = steps.first_tolerances(self.asked, params, batch, FIRST_ACCURACY)
        flat = ravel_pytree(params)[0]
        zero, none = jnp.zeros((), flat.dtype), jnp.zeros((), jnp.int32)
        infinite, no = jnp.full_like(zero, jnp.inf), jnp.asarray(False)
        size = jnp.linalg.norm(flat)
        point = Point(
            at=flat, value=infinite, slope=jnp.zeros_like(flat), raw=infinite, grad_norm=infinite, error=infinite,
            bound=infinite, lower=zero, adjoint=zero, moves=zero, adjoint_moves=zero,
            status=none, work=zero,
        )  # fmt: skip
        trail = jnp.zeros((TRAIL, flat.size), flat.dtype)
        warm = self.oracle.init(params, batch)
        return QuasiNewtonState(
            params=params, warm=warm, tol=first.tol, adjoint_tol=first.adjoint_tol, phase=none, kind=none, target=flat,
            eps=first.tol, delta=first.adjoint_tol, point=point, kept=warm, other=point,
            radius=FIRST_RADIUS * jnp.where(size > 0, size, 1.0), length=zero, limited=no, noise=zero,
            memory=lbfgs.empty(flat, self.pairs), trail=trail, slopes=trail, behind=none,
            recent=jnp.full((RECENT,), -jnp.inf, flat.dtype), secant=zero, taken=none, failures=none, need=infinite,
            next_probe=none + GAP, last_probe=none - 9, gap=none + GAP, turn=none + EPS, starts=none, work=zero,
            probed_at=zero, cost=jnp.zeros((2,), flat.dtype), done=no, stationary=no,
            wander=no, jam=zero, momentum=jnp.zeros_like(flat), squares=jnp.zeros_like(flat), beats=none, best=point, longest=zero, free=zero, free_eps=zero, free_delta=zero, highest=zero, steepest=zero, idle=none,
        )  # fmt: skip

    @compiled
    def step(self, state: QuasiNewtonState, batch) -> tuple[QuasiNewtonState, StepInfo]:
        seen, warm = self._look(state, batch)
        before = state
        state = replace(state, work=state.work + seen.work, warm=warm)
        branches = (self._first, self._start, self._trial, self._closer, self._probe, self._wander)
        state = jax.lax.switch(before.phase, branches, state, seen)
        state = self._jammed(before, state)
        state = jax.lax.cond(state.phase == TRIAL, self._propose, lambda state: state, state)
        at = state.point
        better = at.value < state.best.value - jnp.where(state.wander, state.noise, 0.)
        best = _where(better | ~state.wander, at, state.best)
        idle = jnp.where(better | ~state.wander, 0, state.idle + 1)
        state = replace(state, best=best, idle=idle, params=ravel_pytree(state.params)[1](best.at))
        return state, self._told(before, state, seen)

    def _look(self, state: QuasiNewtonState, batch):
        unravel = ravel_pytree(state.params)[1]
        hg = self.asked(unravel(state.target), batch, state.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
        gradient = ravel_pytree(hg.grad)[0]
        size = jnp.linalg.norm(gradient)
        if self.projection is None:
            slope = gradient
        else:
            h = 1e-2 * state.radius / jnp.where(size > 0, size, 1.0)
            slope = (state.target - self._project(state, state.target - h * gradient)) / h
        lower = jnp.where(jnp.isfinite(hg.lower.error), hg.lower.error, hg.lower.residual)
        fits = lambda v: jnp.asarray(v, state.radius.dtype)  # noqa: E731
        point = Point(
            at=state.target, value=fits(hg.value - hg.shift), slope=slope, raw=fits(hg.value), grad_norm=fits(size),
            error=fits(hg.error), bound=fits(hg.value_bound), lower=fits(jnp.mean(lower)),
            adjoint=fits(jnp.mean(hg.adjoint.residual)), moves=fits(jnp.mean(hg.lower.steps)),
            adjoint_moves=fits(jnp.mean(hg.adjoint.steps)), status=hg.status, work=fits(hg.work),
        )  # fmt: skip
        return point, hg.warm

    def _project(self, state, flat):
        if self.projection is None:
            return flat
        return ravel_pytree(steps.project(self.projection, ravel_pytree(state.params)[1](flat)))[0]

    # ------------------------------------------------------------------------------------------- the start

    def _first(self, state, seen: Point):
        state = replace(state, point=seen, kept=state.warm)
        return self._starting(state, EPS)

    def _starting(self, state, kind):
        """The next hypergradient refines one accuracy tenfold; both where nothing is seen yet."""
        unseen = jnp.linalg.norm(state.point.slope) == 0
        kind = jnp.where(unseen, BOTH, kind)
        eps = jnp.where(kind == DELTA, state.eps, state.eps / START_FACTOR)
        delta = jnp.where(kind == EPS, state.delta, state.delta / START_FACTOR)
        return self._refined(state, START, kind, eps, delta)

    def _start(self, state, seen: Point):
        """Finer accuracies until a ten times better one changes the gradient little, or costs too much."""
        size = jnp.linalg.norm(seen.slope)
        moved = jnp.linalg.norm(seen.slope - state.point.slope)
        spent = state.work - seen.work
        kind = state.kind
        enough = ((moved <= MOVED * size) | (seen.work > START_CAP * spent)) & (size > 0)
        noise = jnp.where(kind == DELTA, state.noise, jnp.abs(seen.value - state.point.value))
        starts = state.starts + 1
        state = replace(state, point=seen, kept=state.warm, noise=noise, starts=starts,
            eps=jnp.where(enough | (kind == DELTA), state.eps, state.eps / START_FACTOR),
            delta=jnp.where(enough | (kind == EPS), state.delta, state.delta / START_FACTOR))
        again = self._starting(state, jnp.where(enough & (kind == EPS), DELTA, kind))
        enough = (enough & (kind != EPS)) | (starts >= STARTS)
        begun = replace(
            state,
            phase=jnp.full_like(state.phase, TRIAL),
            recent=state.recent.at[0].set(seen.value),
            trail=state.trail.at[0].set(seen.at),
            slopes=state.slopes.at[0].set(seen.slope),
            behind=jnp.ones_like(state.behind),
            probed_at=state.work, free_eps=state.eps, free_delta=state.delta, highest=seen.value,
        )
        return _where(enough, begun, again)

    def _refined(self, state, phase, kind, eps, delta):
        """The state whose next hypergradient is taken at the current point, at other accuracies."""
        return replace(
            state,
            phase=jnp.full_like(state.phase, phase),
            kind=jnp.full_like(state.kind, kind),
            target=state.point.at,
            warm=state.kept,
            tol=eps,
            adjoint_tol=delta,
        )

    # ------------------------------------------------------------------------------------------ trials

    def _propose(self, state):
        return jax.lax.cond(state.wander, self._free, self._modelled, state)

    def _modelled(self, state):
        """The next trial: along the direction of the model, as far as the radius allows."""
        slope = state.point.slope
        memory = jax.lax.cond(
            state.failures == 0, lambda memory: lbfgs.saw(memory, slope), lambda memory: memory, state.memory
        )
        d = lbfgs.direction(memory, slope)
        d = jnp.where(slope @ d < 0, d, -slope)
        size = jnp.linalg.norm(d)
        share = state.radius / jnp.where(size > 0, size, 1.0)
        free = memory.count == 0
        share = jnp.where(free, share, jnp.minimum(1.0, share))
        target = self._project(state, state.point.at + share * d)
        return replace(
            state,
            memory=memory,
            target=target,
            length=share * size,
            limited=free | (state.radius < size),
            tol=state.eps,
            adjoint_tol=state.delta,
            warm=state.kept,
            done=~(size > 0),
        )

    def _jammed(self, before, state):
        tried = (before.phase == TRIAL) & (state.phase != CLOSER) | (before.phase == CLOSER)
        rejected = state.failures > before.failures
        over = rejected | (state.radius < before.radius)
        jam = jnp.where(tried, JAMD * state.jam + (1 - JAMD) * over, state.jam)
        longest = jnp.maximum(state.longest, jnp.where(tried & ~rejected, before.length, 0.0))
        size = jnp.linalg.norm(state.point.slope)
        steepest = jnp.maximum(state.steepest, size)
        state = replace(state, steepest=steepest)
        start = (jam > JAM) & ~state.wander & (state.radius * steepest < JAMR * longest * size)
        radius = jnp.where(start, WR * longest, state.radius)
        lost = state.point.value - state.best.value > GIVEUP * (state.highest - state.best.value)
        stop = state.wander & ((state.idle > IDLE) | lost) & (state.phase == TRIAL)
        none = jnp.full_like(state.recent, -jnp.inf)
        home = replace(state, wander=jnp.zeros_like(state.wander), point=state.best, jam=jnp.zeros_like(jam), free=jnp.where(lost, GIVER, 1.0) * state.radius, free_eps=state.eps, free_delta=state.delta, longest=jnp.zeros_like(longest), steepest=jnp.zeros_like(longest), failures=jnp.zeros_like(state.failures),
            recent=none.at[0].set(state.best.value), trail=state.trail.at[0].set(state.best.at), slopes=state.slopes.at[0].set(state.best.slope), behind=jnp.ones_like(state.behind),
            secant=jnp.zeros_like(state.secant), radius=jnp.where(lost, GIVER, RR)*state.radius, next_probe=state.taken + GAP, gap=jnp.full_like(state.gap, GAP))
        if CLEAR: home = replace(home, memory=home.memory._replace(count=jnp.zeros_like(home.memory.count)))
        state = replace(state, jam=jam, longest=longest)
        radius = jnp.where(start & (state.free > 0), state.free, radius)
        return _where(stop, home, replace(state, wander=state.wander | start, radius=radius, eps=jnp.where(start, jnp.maximum(state.eps, state.free_eps), state.eps), delta=jnp.where(start, jnp.maximum(state.delta, state.free_delta), state.delta),
            momentum=jnp.where(start, 0.0, state.momentum), squares=jnp.where(start, 0.0, state.squares), beats=jnp.where(start, 0, state.beats)))

    def _free(self, state):
        z = state.point.slope
        m, v = B1 * state.momentum + (1 - B1) * z, B2 * state.squares + (1 - B2) * z**2
        beats = state.beats + 1
        k = beats.astype(z.dtype)
        d = -(m / (1 - B1**k)) / (jnp.sqrt(v / (1 - B2**k)) + 1e-12)
        d = jnp.where(z @ d < 0, d, -z)
        d = d / jnp.linalg.norm(d)
        return replace(state, momentum=m, squares=v, beats=beats, phase=jnp.full_like(state.phase, WANDER),
            target=self._project(state, state.point.at + state.radius * d), tol=state.eps, adjoint_tol=state.delta, warm=state.kept)

    def _wander(self, state, seen: Point):
        step = seen.at - state.point.at
        c = -(seen.slope @ step) / (jnp.linalg.norm(seen.slope) * jnp.linalg.norm(step) + 1e-300)
        fine = _finite(seen)
        grow = jnp.where(fine, jnp.exp(BETA * c * jnp.where(c > 0, 1.0, 2.0)), 0.25)
        state = replace(state, radius=state.radius * grow, point=_where(fine, seen, state.point), kept=_where(fine, state.warm, state.kept),
            taken=state.taken + 1, phase=jnp.full_like(state.phase, TRIAL), recent=jnp.roll(state.recent, 1).at[0].set(seen.value))
        due = state.taken >= state.next_probe
        return _where(due, self._probing(state, state.turn, jnp.inf), state)

    def _trial(self, state, seen: Point):
        slope, level = self._expected(state, seen)
        noisy = NOISY * state.noise
        passes = _finite(seen) & (seen.value <= level + noisy)
        stale = (seen.moves < STALE) & (seen.lower > 0)
        doubtful = passes & (seen.value > level) | stale & _finite(seen)
        eps=jnp.minimum(state.eps, jnp.where(stale, seen.lower, jnp.inf))
        delta=jnp.minimum(state.delta, jnp.where(stale, seen.adjoint, jnp.inf))
        closer = replace(
            state,
            phase=jnp.full_like(state.phase, CLOSER),
            other=seen,
            tol=eps / FACTOR,
            adjoint_tol=delta/FACTOR,
            eps=eps if STALE_SET else state.eps,
            delta=delta if STALE_SET>1 else state.delta,
        )
        judged = lambda _: self._judged(state, seen, passes)  # noqa: E731
        return jax.lax.cond(doubtful, lambda _: closer, judged, None)

    def _expected(self, state, seen: Point):
        """(slope along the step, value to get below)."""
        slope = state.point.slope @ (seen.at - state.point.at)
        return slope, jnp.max(state.recent) + ARMIJO * slope

    def _closer(self, state, seen: Point):
        """A trial that only noise would let pass, again at a better accuracy."""
        slope, level = self._expected(state, seen)
        first = state.other
        noise = jnp.abs(seen.value - first.value)
        moved = jnp.linalg.norm(seen.slope - first.slope) > MOVED * jnp.linalg.norm(seen.slope)
        tighten = moved | (noise > 0.3 * jnp.abs(slope))
        state = replace(
            state,
            eps=jnp.where(tighten, state.eps / FACTOR, state.eps),
            delta=jnp.where(tighten, state.delta / FACTOR, state.delta),
            next_probe=jnp.where(tighten, state.taken + SHORT_GAP, state.next_probe),
            noise=jnp.minimum(state.noise, noise),
        )
        passes = _finite(seen) & (seen.value <= level + NOISY * noise)
        return self._judged(state, seen, passes)

    def _judged(self, state, seen: Point, passes):
        return jax.lax.cond(passes, self._accepted, self._rejected, state, seen)

    def _rejected(self, state, seen: Point):
        finite, step = _finite(seen), seen.at - state.point.at
        slope = state.point.slope @ step
        failures = state.failures + 1
        learned = lbfgs.learn(state.memory, step, seen.slope - state.point.slope)
        rise = seen.value - state.point.value - slope
        share = jnp.clip(-slope / (2 * jnp.where(rise > 0, rise, jnp.inf)), 0.1, 0.5)
        share = jnp.where(rise > 0, share, 0.5)
        state = replace(
            state,
            memory=_where(finite, learned, state.memory),
            radius=jnp.where(finite, share, 0.25) * state.length,
            failures=failures,
            phase=jnp.full_like(state.phase, TRIAL),
            done=failures > FAILURES,
        )
        probe = self._probing(state, BOTH, 0.3 * jnp.abs(slope))
        return _where((failures == 3) | (failures % 6 == 0), probe, state)

    def _accepted(self, state, seen: Point):
        step = seen.at - state.point.at
        size, slope = jnp.linalg.norm(step), state.point.slope @ step
        ahead = seen.slope @ step
        ratio = ahead / jnp.where(slope < 0, slope, -1.0)
        ratio = jnp.where(slope < 0, ratio, -9.0)
        mismatch = jnp.abs((seen.value - state.point.value) / jnp.where(slope < 0, slope, -1.0) - 0.5 * (1 + ratio))
        mismatch = jnp.where(slope < 0, mismatch, 0.0)
        secant = jnp.maximum(size, FORGET * state.secant)
        apart = jnp.linalg.norm(state.trail - seen.at, axis=1)
        there = jnp.arange(TRAIL) < state.behind
        far = there & (apart >= 0.5 * secant)
        back = jnp.where(jnp.any(far), jnp.argmax(far), state.behind - 1)
        memory = lbfgs.learn(state.memory, seen.at - state.trail[back], seen.slope - state.slopes[back])
        grown = jnp.where((ratio>GFR)&(mismatch<GFM), GF, GROW) * state.radius
        shrunk = jnp.maximum(0.5 * state.length, 0.25 * state.radius)
        radius = jnp.where((ratio > 0.5) & state.limited, grown, jnp.where(ratio < -0.9, shrunk, state.radius))
        taken = state.taken + 1
        state = replace(
            state,
            point=seen,
            kept=state.warm,
            memory=memory,
            radius=radius,
            secant=secant,
            taken=taken,
            failures=jnp.zeros_like(state.failures),
            recent=jnp.roll(state.recent, 1).at[0].set(seen.value),
            trail=jnp.roll(state.trail, 1, 0).at[0].set(seen.at),
            slopes=jnp.roll(state.slopes, 1, 0).at[0].set(seen.slope),
            behind=jnp.minimum(state.behind + 1, TRAIL),
            phase=jnp.full_like(state.phase, TRIAL),
        )
        bad = (mismatch > TRAPEZOID * jnp.maximum(1.0, jnp.abs(ratio))) & (taken - state.last_probe > 2)
        due = taken >= state.next_probe
        both = self._probing(state, BOTH, jnp.inf)
        turn = self._probing(state, state.turn, jnp.inf)
        return _where(bad, both, _where(due, turn, state))

    # ------------------------------------------------------------------------------------------ probes

    def _probing(self, state, kind, need):
        kind = jnp.full_like(state.kind, kind)
        finer = lambda asked, attained: jnp.where(attained > 0, jnp.minimum(asked, attained), asked) / FACTOR  # noqa: E731
        eps = jnp.where(kind == DELTA, state.eps, finer(state.eps, state.point.lower))
        delta = jnp.where(kind == EPS, state.delta, finer(state.delta, state.point.adjoint))
        state = replace(state, need=jnp.full_like(state.need, need), last_probe=state.taken)
        return self._refined(state, PROBE, kind, eps, delta)

    def _probe(self, state, seen: Point):
        """How far the gradient moves when an accuracy is refined says what that accuracy has to be."""
        both = state.kind == BOTH
        of_eps, of_delta = state.kind != DELTA, state.kind != EPS
        point = state.point
        size = jnp.linalg.norm(seen.slope)
        moved = jnp.linalg.norm(seen.slope - point.slope) / jnp.where(size > 0, size, 1e-30)
        noise = jnp.where(of_eps, jnp.abs(seen.value - point.value), state.noise)
        loose = (~of_eps | (point.lower >= state.eps / FACTOR)) & (~of_delta | (point.adjoint >= state.delta / FACTOR))
        tighten = (moved > MOVED) | (both & (noise > state.need))
        loosen = (moved < STAYED) & ~both & loose
        factor = jnp.where(tighten, 1 / FACTOR, jnp.where(loosen, jnp.where(moved<PROP*STAYED,FACTOR**2,FACTOR), 1.0))
        by_turn = state.failures == 0
        gap = jnp.where(tighten, SHORT_GAP, jnp.where(loosen, GAP, jnp.minimum(2 * state.gap, LONGEST_GAP)))
        change = seen.value - point.value
        return replace(
            state,
            point=seen,
            kept=state.warm,
            noise=noise,
            eps=jnp.where(of_eps, factor, 1.0) * state.eps,
            delta=jnp.where(of_delta, factor, 1.0) * state.delta,
            turn=jnp.where(both, state.turn, 1 - state.turn),
            gap=jnp.where(by_turn, gap, state.gap).astype(state.gap.dtype),
            next_probe=jnp.where(by_turn, state.taken + gap, state.next_probe).astype(state.gap.dtype),
            recent=state.recent.at[0].add(change),
            slopes=state.slopes.at[0].set(seen.slope),
            phase=jnp.full_like(state.phase, TRIAL),
        )

    # ------------------------------------------------------------------------------------------ report

    def _told(self, before, after, seen: Point) -> StepInfo:
        at = jax.tree.map(lambda a, b: jnp.where(before.phase <= START, a, b), seen, before.best)
        accepted = after.taken > before.taken
        done = after.done | before.done
        small = jnp.linalg.norm(at.slope) * after.radius
        stationary = done & (steps.stationary(at.raw, small, 1.0) | (small == 0))
        return StepInfo(
            value=at.raw, grad_norm=at.grad_norm, error=at.error,
            step=jnp.where(accepted, jnp.linalg.norm(after.best.at - before.best.at), 0.0),
            tol=before.tol, adjoint_tol=before.adjoint_tol, work=seen.work,
            status=jnp.where(accepted, jnp.maximum(at.status, seen.status), at.status), done=done,
            stationary=stationary & acceptable(at.status),
        )  # fmt: skip


def _finite(point: Point):
    return jnp.isfinite(point.value) & jnp.all(jnp.isfinite(point.slope))


def _where(condition, a, b):
    return jax.tree.map(lambda u, v: jnp.where(condition, u, v), a, b)


def __dir__():
    return __all__
