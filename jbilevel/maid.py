"""MAID: descent that adapts step and accuracy together, with a line search on inexact values (Salehi et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Hypergradient, SolveInfo, Status, StepInfo, Value, acceptable
from jbilevel._method import steps
from jbilevel._method.base import Method, MethodState, compiled

__all__ = ["MAID", "RULES", "MAIDState"]

RULES = ("adaptive", "paper")
# largest share of a value that its error may be for a decrease below it to say anything
CREDIBLE = 1e-3
# of the rule "adaptive":
RESOLVED = 0.5  # share of a decrease that the errors may be, and still tell whether it is one
LEAST = 0.1  # factor on a step or an accuracy at a time
NEAR = 0.3  # share of the expected decrease by which a trial may rise and still be worth a better look
TURNED = 0.3  # relative change of z from which on its accuracy was at fault
PROBE = 1 / 3  # by which accuracies are refined to see that
SPREAD = 10.0  # largest factor between a step and the one before


class MAIDState(MethodState):
    """tol, adjoint_tol: eps and delta of Salehi et al. (2024)."""

    step: Any  # alpha to try first; 0 before the first step
    eager: Any  # whether the last step was the first length that was tried
    reference: Any  # Zhang-Hager average of the values
    weight: Any  # its weight
    previous: Any  # params and hypergradient of the last step, for Barzilai-Borwein
    previous_grad: Any
    done: Any


class _Search(NamedTuple):
    """One step under way: the hypergradient at the present accuracies, and the trial at the present length."""

    hg: Hypergradient
    way: Any  # what of its gradient can move params
    stale: Any  # whether the hypergradient has yet to be computed at these accuracies
    tol: Any
    adjoint_tol: Any
    trial_tol: Any
    kept_tol: Any  # accuracies to go on with after the step
    kept_adjoint_tol: Any
    first: Any  # length to try first with this hypergradient
    shrink: Any  # what failed trials have left of it
    failures: Any
    quota: Any  # failures after which the hypergradient comes under suspicion
    suspected: Any
    trial: Any
    trial_warm: Any
    accepted: Any
    ended: Any  # without a step
    rounds: Any  # refinements
    value: Any  # trial's value
    status: Any
    work: Any

    @property
    def step(self):
        return self.shrink * self.first

    def tighten(self, when, factor, adjoint_factor) -> _Search:
        """With better accuracies, ``when`` that is called for."""
        factor, adjoint_factor = jnp.where(when, factor, 1.0), jnp.where(when, adjoint_factor, 1.0)
        return self._replace(
            stale=self.stale | when,
            tol=factor * self.tol,
            adjoint_tol=adjoint_factor * self.adjoint_tol,
            kept_tol=factor * self.kept_tol,
            kept_adjoint_tol=adjoint_factor * self.kept_adjoint_tol,
            rounds=self.rounds + when,
        )


@dataclass(frozen=True)
class MAID(Method):
    """Method of adaptive inexact descent (Salehi et al. 2024; Bogensperger et al. 2024, Algorithm 3).

    A step computes z at accuracies (eps, delta) and accepts params+ = P(params - alpha z) when the decrease is larger
    than what inexactness can feign,

        U(params+) + armijo ||params+ - params||^2/alpha <= L(params),   U, L = value +- its error,

    so that the exact upper-level value decreases. The errors come from the oracle: estimates by default, proven bounds
    with ``certified``.

    ``rule="paper"`` is Algorithm 3 as printed: a failed trial shortens alpha by rho; after max_BT failures (10, one
    more after each refinement) eps and delta shrink by nu, z is computed again, warm, and alpha begins anew. After
    success eps, delta grow by nu_bar, alpha by rho_bar; the factors printed are the defaults. Deviations: with a
    projection ||params+ - params||^2/alpha stands for alpha ||z||^2; errors are those of the oracle; first accuracies
    and step are automatic; z = 0 is refined without trials; a step ends after 60 refinements.

    The default ``rule="adaptive"`` is ours. As printed, accuracy and step drive each other down: a short alpha promises
    a decrease that only better accuracies show, where the next alpha is short again. Hence

    - values are corrected by their first-order error (`jb.Value`; not with ``certified``);
    - whether errors hide the decrease is judged at the first alpha of a step, before any trial, and a shortened alpha
      is kept when z is refined, unless z turned;
    - errors that hide an outcome are made smaller where they arise, eps or delta at params (whichever term of the error
      binds) or the accuracy of the trial alone, by the factor that is needed in place of nu;
    - trials that fail though errors are small shorten alpha by a parabola; after 3, 6, ... of them eps and delta are
      refined threefold from what was attained: if z turns, the search begins anew, if not, accuracies are given back;
    - searches begin at the shorter step of Barzilai & Borwein (1988), within a decade of the last one, and not below
      that if it passed at once: at a kink the secant is too short.

    The run ends when z is not finite or exactly zero, or its decrease below rounding or hidden by errors that cannot be
    made smaller: `jb.fit` says CONVERGED only where z was shown to be small.

    Args:
      oracle: any hypergradient oracle; with ``correct=True`` z has second-order errors too.
      projection: ``params -> params`` onto a convex feasible set.
      rule: "adaptive" or "paper".
      certified: use ``bound`` instead of ``error`` (needs the constants of the problem).
      tol, adjoint_tol: first eps, delta; None takes 1e-1 of the sizes at the cold start.
      step_size: first alpha; None moves params by a tenth of their norm.
      accuracy_down, accuracy_up: factors nu < 1 (mildest one of "adaptive") and nu_bar >= 1.
      step_down, step_up: factors rho < 1 (mildest one of "adaptive") and rho_bar >= 1.
      armijo: lambda of the decrease test. descent: eta; refine until error(z) <= (1 - eta) ||z||, off when None.
      tries: first max_BT, or failures after which z is suspected; None: 10, or 3. rounds: refinements per step.
      window: weight of past values in a non-monotone reference (Zhang & Hager 2004; 0.85 is usual), 0 is monotone.
      log_error: see `jb.Method`.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`. ValueError: an option is out of its range, or the oracle knows no error
        of its values (the message says what to pass).

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    >>> oracle = problem.oracle(lambda p, x, d: 0.5 * (x - 3.0) ** 2, solver=jb.solvers.AGD())
    >>> result = jb.fit(MAID(oracle), jnp.array(1.0), jnp.array([2.0]), steps=8)  # x_hat = 2 p
    >>> round(float(result.params), 2), bool(result.history["value"][-1] < result.history["value"][0])
    (1.5, True)
    """

    _: KW_ONLY
    projection: Callable | None = None
    rule: str = "adaptive"
    certified: bool = False
    tol: float | None = None
    adjoint_tol: float | None = None
    step_size: float | None = None
    accuracy_down: float = 0.5
    accuracy_up: float = 1.05
    step_down: float = 0.5
    step_up: float = 10 / 9
    armijo: float = 0.01
    descent: float | None = None
    tries: int | None = None
    rounds: int = 60
    window: float = 0.0

    compares_values = True

    def __post_init__(self):
        super().__post_init__()
        _require(self.rule in RULES, "rule", f"one of {RULES}")
        _require(0 < self.accuracy_down < 1, "accuracy_down", "between 0 and 1")
        _require(0 < self.step_down < 1, "step_down", "between 0 and 1")
        _require(self.accuracy_up >= 1, "accuracy_up", "at least 1")
        _require(self.step_up >= 1, "step_up", "at least 1")
        _require(0 < self.armijo < 1, "armijo", "between 0 and 1")
        _require(self.descent is None or 0 < self.descent < 1, "descent", "between 0 and 1, or None")
        _require(0 <= self.window < 1, "window", "at least 0 and below 1")
        _require((self.tries is None or self.tries >= 1) and self.rounds >= 1, "tries and rounds", "at least 1")
        missing = self.oracle.missing(self.certified)
        if missing is not None:
            kind = "proven" if self.certified else "estimated"
            raise ValueError(f"MAID needs {kind} errors of upper-level values; pass {missing}.")

    @property
    def reads_error(self) -> bool:
        return self.log_error or (self.descent is not None and not self.certified)

    @property
    def adaptive(self) -> bool:
        return self.rule == "adaptive"

    @property
    def first_quota(self) -> int:
        return self.tries or (3 if self.adaptive else 10)

    def init(self, params, batch) -> MAIDState:
        params = steps.project(self.projection, params)
        first = steps.first_tolerances(self.asked, params, batch, 1e-1, self.tol, self.adjoint_tol)
        zero = jnp.zeros_like(first.tol)
        return MAIDState(
            params=params,
            warm=self.oracle.init(params, batch),
            tol=first.tol,
            adjoint_tol=first.adjoint_tol,
            step=zero,
            eager=jnp.asarray(False),
            reference=zero,
            weight=zero,
            previous=params,
            previous_grad=trees.zeros_like(params),
            done=jnp.asarray(False),
        )

    @compiled
    def step(self, state: MAIDState, batch) -> tuple[MAIDState, StepInfo]:
        def unfinished(s: _Search):
            return ~s.accepted & ~s.ended & (s.rounds <= self.rounds)

        def differentiate(s: _Search) -> _Search:
            return self._differentiate(state, batch, s)

        def attempt(s: _Search) -> _Search:
            return self._attempt(state, batch, s)

        def advance(s: _Search) -> _Search:
            return jax.lax.cond(s.stale, differentiate, attempt, s)

        return self._finish(state, jax.lax.while_loop(unfinished, advance, self._begin(state, batch)))

    def _begin(self, state: MAIDState, batch) -> _Search:
        """Before the hypergradient: the loop computes it, so that the program holds it once."""
        nothing = steps.no_hypergradient(self.asked, state.params, batch, state.warm)
        zero, one, no = jnp.zeros((), jnp.int32), jnp.ones_like(state.step), jnp.asarray(False)
        return _Search(
            hg=nothing,
            way=nothing.grad,
            stale=~no,
            tol=state.tol,
            adjoint_tol=state.adjoint_tol,
            trial_tol=state.tol,
            kept_tol=state.tol,
            kept_adjoint_tol=state.adjoint_tol,
            first=one,
            shrink=one,
            failures=zero,
            quota=zero + self.first_quota,
            suspected=no,
            trial=state.params,
            trial_warm=state.warm,
            accepted=no,
            ended=no,
            rounds=zero,
            value=nothing.value,
            status=nothing.status,
            work=nothing.work,
        )

    def _differentiate(self, state: MAIDState, batch, s: _Search) -> _Search:
        hg = self.asked(state.params, batch, s.hg.warm, tol=s.tol, adjoint_tol=s.adjoint_tol)
        first = self._first_length(state, hg.grad)
        way = steps.reduced(self.projection, state.params, hg.grad, first)
        squared_norm, error = trees.squared_norm(way), self._measured(hg)[1]
        s = self._after_suspicion(s, way) if self.adaptive else s
        s = s._replace(
            hg=hg,
            way=way,
            stale=jnp.asarray(False),
            trial_tol=s.tol,
            first=first,
            trial_warm=hg.warm,
            ended=self._no_way(hg, squared_norm),
            status=hg.status,
            work=s.work + hg.work,
        )
        if self.adaptive:
            # judged at the first length: a short one would ask for an accuracy that makes the next one shorter
            decrease = first * squared_norm
            hopeless = (error > RESOLVED * decrease) & (decrease > 0) & ~self._floor(hg.lower)
            s = s.tighten(hopeless & ~s.ended, *self._binding(s, self._need(decrease, error)))
        blind = squared_norm == 0  # z = 0 meets any tolerance that the cold start meets
        if self.descent is not None:
            of_grad = hg.bound if self.certified else hg.error
            blind = blind | (of_grad > (1 - self.descent) * jnp.sqrt(squared_norm))
        floor = self._floor(hg.lower) & self._floor(hg.adjoint)
        s = s._replace(ended=s.ended | blind & floor)
        factor = LEAST if self.adaptive else self.accuracy_down
        return s.tighten(blind & ~s.ended & ~s.stale, factor, factor)

    def _after_suspicion(self, s: _Search, way) -> _Search:
        """Refined because trials kept failing: if z turned, begin anew along it; if not, go on and give back."""
        turned = s.suspected & (trees.norm(trees.sub(way, s.way)) > TURNED * trees.norm(way))
        return s._replace(
            suspected=jnp.asarray(False),
            kept_tol=jnp.where(turned, s.tol, s.kept_tol),
            kept_adjoint_tol=jnp.where(turned, s.adjoint_tol, s.kept_adjoint_tol),
            shrink=jnp.where(turned, 1.0, s.shrink),
            failures=jnp.where(turned, 0, s.failures),
            quota=jnp.where(turned, self.first_quota, s.quota + jnp.where(s.suspected, self.first_quota, 0)),
        )

    def _no_way(self, hg: Hypergradient, squared_norm):
        """Not finite, or exactly zero: not so where x or q may only not have moved yet."""
        adjoint = hg.warm.adjoint
        known = self._measured(hg)[1] == 0
        if self.oracle.exact:
            known = jnp.asarray(True)
        elif adjoint is not None:
            known = known | (trees.squared_norm(adjoint) > 0) & (trees.squared_norm(hg.grad) == 0)
        finite = jnp.isfinite(hg.value) & jnp.isfinite(squared_norm)
        return ~finite | (squared_norm == 0) & known

    def _floor(self, info: SolveInfo):
        """Whether no better accuracy is to be had."""
        return jnp.asarray(True) if self.oracle.exact else jnp.all(info.status == Status.PRECISION)

    def _need(self, decrease, error):
        """Factor on an accuracy that makes ``error`` small against ``decrease``."""
        need = 0.5 * RESOLVED * decrease / jnp.where(error > 0, error, 1.0)
        return jnp.clip(need, LEAST, self.accuracy_down)

    def _binding(self, s: _Search, factor):
        """(factor on eps, factor on delta): the error of a corrected value is about delta eps + eps^2/2."""
        if self.certified:
            return factor, 1.0
        attained = _attained(s.hg.adjoint)
        # an adjoint that does not do what it is asked for, or is none, does not follow delta
        adjoint = (attained > _attained(s.hg.lower)) & (attained <= s.adjoint_tol)
        return jnp.where(adjoint, 1.0, factor), jnp.where(adjoint, factor, 1.0)

    def _first_length(self, state: MAIDState, grad):
        length = jnp.where(state.step > 0, state.step, steps.first_step(state.params, grad))
        grad = steps.reduced(self.projection, state.params, grad, length)
        start = steps.first_step(state.params, grad) if self.step_size is None else self.step_size
        length = jnp.where(state.step > 0, state.step, start)
        if not self.adaptive:
            return length
        bb = steps.barzilai_borwein(state.params, grad, state.previous, state.previous_grad, length)
        # never below a length that passed at once: at a kink the secant is short, and the next one shorter
        least = jnp.where(state.eager, 1.0, 1 / SPREAD)
        return jnp.where(state.step > 0, jnp.clip(bb, least * length, SPREAD * length), length)

    def _squared_norm(self, state: MAIDState, hg: Hypergradient, step):
        """Of what of the hypergradient can move params."""
        return trees.squared_norm(steps.reduced(self.projection, state.params, hg.grad, step))

    def _measured(self, result: Hypergradient | Value):
        """(value, error): corrected to first order where nothing has to be proven."""
        full = isinstance(result, Hypergradient)
        error, bound = (result.value_error, result.value_bound) if full else (result.error, result.bound)
        if self.certified:
            return result.value, bound
        if not self.adaptive:
            return result.value, error
        return result.value - result.shift, error - jnp.abs(result.shift)

    def _reference(self, state: MAIDState, value):
        """Average of the values so far; before the first step the value at the start."""
        return jnp.where(state.weight > 0, state.reference, value)

    def _attempt(self, state: MAIDState, batch, s: _Search) -> _Search:
        trial, moved = steps.projected_step(self.projection, state.params, s.hg.grad, s.step)
        found = self.asked.value(trial, batch, s.trial_warm, tol=s.trial_tol)
        (base, base_error), (value, error) = self._measured(s.hg), self._measured(found)
        expected = moved / s.step
        level = base - base_error
        if self.window > 0:
            level = jnp.maximum(level, self._reference(state, base))
        accepted = (value + error + self.armijo * expected <= level) & (moved > 0)
        s = s._replace(
            trial=trial,
            accepted=accepted,
            value=value,
            status=jnp.maximum(s.status, jnp.where(accepted, found.status, Status.CONVERGED)),
            work=s.work + found.work,
        )
        if not self.adaptive:
            s = s._replace(trial_warm=trees.where(accepted, found.warm, s.trial_warm))
            s = self._shorten(s, ~accepted, self.step_down)
            exhausted = ~accepted & (s.failures >= self.first_quota + s.rounds)
            floor = self._floor(s.hg.lower) & self._floor(s.hg.adjoint)
            refine = exhausted & ~floor  # one more trial after each time; else the length goes on to shrink
            s = s._replace(
                failures=jnp.where(refine, 0, s.failures),
                shrink=jnp.where(refine, 1.0, s.shrink),
                ended=s.ended | exhausted & floor & _unseen(s),
            )
            return s.tighten(refine, self.accuracy_down, self.accuracy_down)

        # errors that hide whether the trial is good enough are made smaller, where they arise; else it is too long
        change = value - base
        decrease = jnp.maximum(-change, RESOLVED * expected)
        near = (change < NEAR * expected) & jnp.isfinite(error)
        hidden = ~accepted & near & ((base_error + error > decrease) | (change + self.armijo * expected <= 0))
        at_trial = hidden & (error > base_error)
        # where they cannot be, a shorter step or a better z may still show a decrease
        hidden = hidden & ~jnp.where(at_trial, self._floor(found.lower), self._floor(s.hg.lower))
        at_trial, failed = at_trial & hidden, ~accepted & ~hidden
        s = s._replace(
            trial_tol=jnp.where(at_trial, self._need(decrease, error), 1.0) * s.trial_tol,
            trial_warm=trees.where(accepted | at_trial, found.warm, s.trial_warm),
            rounds=s.rounds + at_trial,
        )
        s = s.tighten(hidden & ~at_trial, *self._binding(s, self._need(decrease, base_error)))
        # minimiser of the parabola through both values that falls as expected
        bend = change + expected
        vertex = 0.5 * expected / jnp.where(bend > 0, bend, jnp.inf)
        vertex = jnp.where(jnp.isfinite(vertex), jnp.clip(vertex, LEAST, self.step_down), LEAST)
        s = self._shorten(s, failed, vertex)._replace(trial_tol=jnp.where(failed, s.tol, s.trial_tol))
        return self._suspect(s, failed & ((s.failures >= s.quota) | _unseen(s)))

    def _shorten(self, s: _Search, when, factor) -> _Search:
        return s._replace(shrink=jnp.where(when, factor, 1.0) * s.shrink, failures=s.failures + when)

    def _suspect(self, s: _Search, when) -> _Search:
        """See whether z is at fault, by better accuracies than were attained (warm solves may do nothing otherwise)."""
        floor = self._floor(s.hg.lower) & self._floor(s.hg.adjoint)
        lost = _unseen(s) | (self._measured(s.hg)[1] > 2 * s.first * trees.squared_norm(s.way))
        s = s._replace(
            quota=s.quota + jnp.where(when & floor, self.first_quota, 0), ended=s.ended | when & floor & lost
        )
        when = when & ~floor
        accuracies = (_attained(s.hg.lower), s.tol), (_attained(s.hg.adjoint), s.adjoint_tol)
        tight = s.tighten(when, *(PROBE * _share(attained, asked) for attained, asked in accuracies))
        return tight._replace(suspected=when, kept_tol=s.kept_tol, kept_adjoint_tol=s.kept_adjoint_tol)

    def _stationary(self, state: MAIDState, s: _Search):
        error = 2 * self._measured(s.hg)[1]
        shown = acceptable(s.hg.status) & (error <= CREDIBLE * jnp.abs(s.hg.value))
        squared_norm = self._squared_norm(state, s.hg, s.step)
        small = steps.stationary(s.hg.value, squared_norm, state.step, jnp.where(shown, error, 0.0))
        return small & ((squared_norm > 0) | (error == 0) | shown)

    def _finish(self, state: MAIDState, s: _Search) -> tuple[MAIDState, StepInfo]:
        accepted = s.accepted
        base = self._measured(s.hg)[0]
        # Zhang & Hager 2004, (1.6): the value at the start has weight 1
        before = self.window * jnp.where(state.weight > 0, state.weight, 1.0)
        weight = before + 1.0
        reference = (before * self._reference(state, base) + s.value) / weight
        up = jnp.where(accepted, self.accuracy_up, 1.0)
        following = MAIDState(
            params=trees.where(accepted, s.trial, state.params),
            warm=trees.where(accepted, s.trial_warm, s.hg.warm),
            tol=up * jnp.where(accepted, s.kept_tol, s.tol),
            adjoint_tol=up * jnp.where(accepted, s.kept_adjoint_tol, s.adjoint_tol),
            step=jnp.where(accepted, self.step_up * s.step, state.step),
            eager=accepted & (s.shrink == 1),
            reference=jnp.where(accepted, reference, state.reference),
            weight=jnp.where(accepted, weight, state.weight),
            previous=state.params,
            previous_grad=steps.reduced(self.projection, state.params, s.hg.grad, s.step),
            done=~accepted,
        )
        step = jnp.where(accepted, s.step, 0.0)
        stationary = ~accepted & self._stationary(state, s)
        report = self.report(s.hg, s, step=step, work=s.work, status=s.status, done=~accepted, stationary=stationary)
        return following, report


def _unseen(s: _Search):
    """Whether what a step of this length could bring is below the rounding of the value."""
    value = s.hg.value
    return s.step * trees.squared_norm(s.way) <= jnp.finfo(value.dtype).eps * jnp.abs(value)


def _attained(info: SolveInfo):
    """Accuracy of the worst sample."""
    return jnp.max(jnp.where(jnp.isfinite(info.error), info.error, info.residual))


def _share(attained, asked):
    """What was attained over what was asked for, at most 1."""
    share = attained / jnp.where(asked > 0, asked, 1.0)
    return jnp.clip(jnp.where(jnp.isfinite(share), share, 1.0), 1e-2, 1.0)


def _require(condition: bool, name: str, what: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` of MAID must be {what}.")


def __dir__():
    return __all__
