"""NBA: descent for upper levels with kinks, by a line search or a trust region on the value (Villacis 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Hypergradient, Status, StepInfo
from jbilevel._method import steps
from jbilevel._method.base import Method, MethodState, compiled

__all__ = ["NBA", "NBAState", "SEARCHES", "stationarity"]

SEARCHES = ("line", "trust-region")
# trust region: fraction of the predicted decrease that accepts a step, that shrinks the next radius, that lets it grow
ACCEPT, POOR, GOOD = 1e-2, 0.25, 0.75
ACCURACY_DOWN = 0.1  # factor on both tolerances when no step is found
SHORT = 3  # trials before a subgradient from nearby is taken in
NEAR = 1e-2  # of the norm of params: from further away, hypergradients that cancel show no minimum
SIMPLEX_STEPS = 1000


class NBAState(MethodState):
    step: Any  # length of the step to try first, or the radius of the trust region; 0 before the first step
    previous: Any  # params and direction of the last accepted step, for its curvature
    previous_grad: Any
    refinements: Any  # how often in a row the accuracy was raised because no step was found


class _Search(NamedTuple):
    """One step under way: a direction, and the trial at the current length or radius."""

    direction: Any
    trial: Any
    trial_warm: Any
    step: Any
    tries: Any
    stage: Any  # bundle steps so far; one more where the search ends with the first direction
    least_norm: Any  # smallest norm of a direction so far, of those from nearby
    near: Any  # whether all that the direction is made of are
    accepted: Any
    last_length: Any  # length of the last step tried
    status: Any
    work: Any


@dataclass(frozen=True)
class NBA(Method):
    """Nonsmooth bilevel approximation (Villacis 2025, Algorithm 2).

    params+ = params - alpha g, with a search for alpha on the value. g is the hypergradient at params, an element of a
    subdifferential where the value has kinks. "line": Armijo's rule
    value(params - alpha g) <= value(params) - armijo alpha ||g||^2, alpha from a Barzilai-Borwein length downwards.
    "trust-region": the step minimises -tau ||g||^2 + b tau^2 ||g||^2/2, b the last secant curvature, over
    tau ||g|| <= radius, and the radius follows the ratio of actual to predicted decrease.

    At a kink -g need not be a direction of descent, and near one it is one for tiny steps only, on which a search alone
    would jam. So where a few trials fail, the hypergradient g' at the last of them is taken in, in case it belongs to
    another piece: g becomes the point of least norm on the segment [g, g'], along the kink, and the search starts
    again, up to ``bundle_steps`` times (the two-point bundle of Wolfe 1975 and Mifflin 1977); only then the first g is
    followed down to the shortest steps. ``info.grad_norm`` is the least norm of all these g from within 1 % of the norm
    of params, an element of the convex hull of hypergradients nearby: it goes to zero at a minimum on a kink, where
    that of a single one does not; from afar it would between the walls of a smooth valley too. Where no step is found,
    both tolerances fall by ten, at most twice; then ``info.done``.

    Args:
      oracle: any hypergradient oracle.
      search: "line" or "trust-region".
      projection: ``params -> params`` onto a convex feasible set.
      tol, adjoint_tol: accuracies; None takes 1e-5 of the sizes at the cold start.
      step_size: first alpha (first radius); None moves params by a tenth of their norm.
      armijo: fraction of the linear decrease that is demanded. step_down: factor on alpha after a failed trial.
      tries: trials of the first direction. bundle_steps: see above.
      stationarity: done when the norm of the hypergradient is at most this, or no step is found and the least is.
      log_error: see `jb.Method`.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`. ValueError: an option is out of its range.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> oracle = jb.explicit.Oracle(lambda p, d: jnp.abs(p - d))  # a kink at the minimum
    >>> result = jb.fit(NBA(oracle), jnp.array(0.3), jnp.array([1.0]), steps=20)
    >>> round(float(result.params), 3)
    1.0
    """

    _: KW_ONLY
    search: str = "line"
    projection: Callable | None = None
    tol: float | None = None
    adjoint_tol: float | None = None
    step_size: float | None = None
    armijo: float = 1e-4
    step_down: float = 0.5
    tries: int = 10
    bundle_steps: int = 3
    stationarity: float = 0.0

    compares_values = True

    def __post_init__(self):
        super().__post_init__()
        if self.search not in SEARCHES:
            raise ValueError(f"`search` of NBA must be one of {SEARCHES}, got {self.search!r}.")
        for name, factor in (("armijo", self.armijo), ("step_down", self.step_down)):
            if not 0 < factor < 1:
                raise ValueError(f"`{name}` of NBA must lie between 0 and 1, got {factor}.")
        if self.tries < 1 or self.bundle_steps < 0:
            raise ValueError("`tries` of NBA must be at least 1, and `bundle_steps` at least 0.")
        if not self.stationarity >= 0:
            raise ValueError(f"`stationarity` of NBA must be nonnegative, got {self.stationarity}.")

    def init(self, params, batch) -> NBAState:
        params = steps.project(self.projection, params)
        first = steps.first_tolerances(self.asked, params, batch, 1e-5, self.tol, self.adjoint_tol)
        return NBAState(
            params=params,
            warm=self.oracle.init(params, batch),
            tol=first.tol,
            adjoint_tol=first.adjoint_tol,
            step=jnp.zeros_like(first.tol),
            previous=params,
            previous_grad=trees.zeros_like(params),
            refinements=jnp.zeros((), jnp.int32),
        )

    @compiled
    def step(self, state: NBAState, batch) -> tuple[NBAState, StepInfo]:
        hg = self.asked(state.params, batch, state.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
        first = self._first(state, hg.grad)
        zero = jnp.zeros((), jnp.int32)
        search = _Search(
            direction=hg.grad,
            trial=state.params,
            trial_warm=hg.warm,
            step=first,
            tries=zero,
            stage=zero,
            least_norm=trees.norm(hg.grad),
            near=jnp.asarray(True),
            accepted=jnp.asarray(False),
            last_length=jnp.zeros_like(first),
            status=hg.status,
            work=hg.work,
        )
        final = self.bundle_steps + 1 if self.bundle_steps else 0

        def may_try(s: _Search):
            short = (s.stage < final) & (trees.norm(s.direction) > 0)
            return s.tries < jnp.where(short, min(SHORT, self.tries), jnp.where(s.stage < final, 0, self.tries))

        def unfinished(s: _Search):
            steep = trees.norm(hg.grad) > self.stationarity
            return ~s.accepted & steep & (may_try(s) | (s.stage < final)) & jnp.isfinite(hg.value)

        def attempt(s: _Search) -> _Search:
            return self._try(state, hg, batch, s)

        def bundle(s: _Search) -> _Search:
            return self._bundle(state, first, batch, s)

        def first_again(s: _Search) -> _Search:
            step = self.step_down**SHORT * first
            return s._replace(direction=hg.grad, step=step, tries=zero, stage=s.stage + 1)

        def change_direction(s: _Search) -> _Search:
            return jax.lax.cond(s.stage < self.bundle_steps, bundle, first_again, s)

        def advance(s: _Search) -> _Search:
            return jax.lax.cond(may_try(s), attempt, change_direction, s)

        return self._finish(state, hg, jax.lax.while_loop(unfinished, advance, search))

    def _first(self, state: NBAState, grad):
        start = steps.first_step(state.params, grad) if self.step_size is None else jnp.asarray(self.step_size)
        if self.search == "trust-region":
            start = start * trees.norm(grad) if self.step_size is None else start
            return jnp.where(state.step > 0, state.step, start)
        length = jnp.where(state.step > 0, state.step, start)
        bb = steps.barzilai_borwein(state.params, grad, state.previous, state.previous_grad, 2 * length)
        return jnp.where(state.step > 0, jnp.clip(bb, 0.1 * length, 10 * length), length)

    def _curvature(self, state: NBAState, grad):
        """Secant curvature of the value along the last step, 0 where it is negative or unknown."""
        s, y = trees.sub(state.params, state.previous), trees.sub(grad, state.previous_grad)
        squared = trees.squared_norm(s)
        return jnp.where(squared > 0, jnp.maximum(trees.dot(s, y), 0.0) / jnp.where(squared > 0, squared, 1.0), 0.0)

    def _try(self, state: NBAState, hg: Hypergradient, batch, s: _Search) -> _Search:
        length, curvature = s.step, 0.0
        if self.search == "trust-region":
            size, curvature = trees.norm(s.direction), self._curvature(state, hg.grad)
            length = s.step / jnp.where(size > 0, size, 1.0)
            length = jnp.where(curvature * length > 1, 1 / jnp.where(curvature > 0, curvature, 1.0), length)
        trial, moved = steps.projected_step(self.projection, state.params, s.direction, length)
        result = self.asked.value(trial, batch, s.trial_warm, tol=state.tol)
        decrease = hg.value - result.value
        predicted = moved / length * (1 - 0.5 * curvature * length)
        demanded = self.armijo if self.search == "line" else ACCEPT
        accepted = (decrease >= demanded * predicted) & (moved > 0)
        step = jnp.where(accepted, s.step, self.step_down * s.step)
        if self.search == "trust-region":
            distance = jnp.sqrt(moved)
            long = distance >= 0.99 * s.step
            step = jnp.where((decrease >= GOOD * predicted) & long, 2 * s.step, s.step)
            # a value that is not finite is a poor one
            step = jnp.where(decrease >= POOR * predicted, step, self.step_down * jnp.minimum(distance, s.step))
        return s._replace(
            trial=trial,
            trial_warm=trees.where(accepted, result.warm, s.trial_warm),
            step=step,
            tries=s.tries + 1,
            accepted=accepted,
            last_length=length,
            status=jnp.maximum(s.status, jnp.where(accepted, result.status, Status.CONVERGED)),
            work=s.work + result.work,
        )

    def _bundle(self, state: NBAState, first, batch, s: _Search) -> _Search:
        """Take in the hypergradient at the last trial, and start again."""
        nearby = self.asked(s.trial, batch, s.trial_warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
        segment = trees.sub(nearby.grad, s.direction)
        squared = trees.squared_norm(segment)
        weight = -trees.dot(s.direction, segment) / jnp.where(squared > 0, squared, 1.0)
        shortest = trees.add_scaled(s.direction, jnp.clip(weight, 0.0, 1.0), segment)
        direction = trees.where(jnp.isfinite(squared), shortest, s.direction)
        # a direction of 0 is a minimum at this distance: only shorter steps can tell
        stage = jnp.where(trees.norm(direction) > 0, s.stage + 1, self.bundle_steps).astype(jnp.int32)
        near = s.near & (trees.norm(trees.sub(s.trial, state.params)) <= NEAR * trees.norm(state.params))
        return s._replace(
            direction=direction,
            step=first,
            tries=jnp.zeros_like(s.tries),
            stage=stage,
            near=near,
            least_norm=jnp.where(near, jnp.minimum(s.least_norm, trees.norm(direction)), s.least_norm),
            work=s.work + nearby.work,
        )

    def _finish(self, state: NBAState, hg: Hypergradient, s: _Search) -> tuple[NBAState, StepInfo]:
        accepted = s.accepted
        stationary = s.least_norm <= self.stationarity
        floored = jnp.all(hg.lower.status == Status.PRECISION)
        lost = ~jnp.isfinite(hg.value) | ~jnp.isfinite(trees.norm(hg.grad))
        done = ~accepted & (stationary | floored | (state.refinements >= 2) | lost)
        stationary = stationary | steps.stationary(hg.value, s.least_norm**2, state.step)
        factor = jnp.where(accepted | done, 1.0, ACCURACY_DOWN)
        following = NBAState(
            params=trees.where(accepted, s.trial, state.params),
            warm=trees.where(accepted, s.trial_warm, hg.warm),
            tol=factor * state.tol,
            adjoint_tol=factor * state.adjoint_tol,
            # a step that got nowhere says nothing about the next length
            step=jnp.where(accepted, s.step, state.step),
            previous=trees.where(accepted, state.params, state.previous),
            previous_grad=trees.where(accepted, hg.grad, state.previous_grad),
            refinements=jnp.where(accepted, 0, state.refinements + 1).astype(jnp.int32),
        )
        step = jnp.where(accepted, s.last_length, 0.0)
        info = self.report(hg, state, step=step, work=s.work, status=s.status, done=done, grad_norm=s.least_norm)
        return following, info._replace(stationary=done & stationary)


def stationarity(oracle, params, batch, *, radius, key, samples: int = 10, tol=None):
    """How far params are from stationary where the value may have kinks: Goldstein's measure, by sampling.

    The least norm in the convex hull of the hypergradients at params and at ``samples`` random points within ``radius``
    (Goldstein 1977; Burke, Lewis & Overton 2005). Zero at a minimum on a kink, where every single hypergradient is
    large. Meant for params of moderate size: it costs samples + 1 hypergradients.

    Args:
      radius: distance of the points from params, in the 2-norm, at most. key: of `jax.random`.
      tol: of all solves, lower level and adjoint.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> oracle = jb.explicit.Oracle(lambda p, d: jnp.abs(p - d))  # a kink at the minimum
    >>> least = stationarity(oracle, jnp.array(1.0), jnp.array([1.0]), radius=0.1, key=jax.random.key(3), samples=2)
    >>> round(float(least), 3)  # 1 and -1 are gradients nearby
    0.0
    """
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    leaves, treedef = jax.tree.flatten(params)

    def around(key):
        keys = jax.random.split(key, len(leaves) + 1)
        normal = [jax.random.normal(k, jnp.shape(v), jnp.result_type(v)) for k, v in zip(keys[1:], leaves, strict=True)]
        move = jax.tree.unflatten(treedef, normal)
        # uniform in the ball
        length = radius * jax.random.uniform(keys[0]) ** (1 / trees.size(params)) / trees.norm(move)
        return trees.add_scaled(params, length, move)

    points = [params, *(around(k) for k in jax.random.split(key, samples))]
    gradients = [oracle(point, batch, tol=tol, adjoint_tol=tol).grad for point in points]
    gram = jnp.stack([jnp.stack([trees.dot(a, b) for b in gradients]) for a in gradients])
    return jnp.sqrt(jnp.maximum(_least_on_simplex(gram), 0.0))


@jax.jit
def _least_on_simplex(gram):
    """min of w' gram w over w >= 0 with sum 1, by accelerated projected gradients."""
    count = gram.shape[0]
    bound = jnp.max(jnp.sum(jnp.abs(gram), 1))
    step = 1 / jnp.where(bound > 0, bound, 1.0)

    def project(w):
        ordered = jnp.sort(w)[::-1]
        excess = (jnp.cumsum(ordered) - 1) / jnp.arange(1, count + 1)
        last = jnp.sum(ordered > excess) - 1
        return jnp.maximum(w - excess[last], 0.0)

    def move(_, carry):
        w, y, t, best = carry
        following = project(y - step * (gram @ y))
        t_next = 0.5 * (1 + jnp.sqrt(1 + 4 * t**2))
        y = following + (t - 1) / t_next * (following - w)
        return following, y, t_next, jnp.minimum(best, following @ gram @ following)

    start = jnp.full((count,), 1.0 / count, gram.dtype)
    first = (start, start, jnp.ones((), gram.dtype), start @ gram @ start)
    return jax.lax.fori_loop(0, SIMPLEX_STEPS, move, first)[3]


def __dir__():
    return __all__
