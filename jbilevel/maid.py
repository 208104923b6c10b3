"""MAID: descent that adapts step and accuracy together, with a line search on inexact values (Salehi et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Hypergradient, Status, StepInfo, Value, acceptable
from jbilevel._method import steps
from jbilevel._method.base import Method, MethodState, compiled

__all__ = ["MAID", "MAIDState"]

# largest share of a value that its error may be for a decrease below it to say anything
CREDIBLE = 1e-3


class MAIDState(MethodState):
    """tol, adjoint_tol: eps and delta of Salehi et al. (2024)."""

    step: Any  # alpha to try first; 0 before the first step
    reference: Any  # Zhang-Hager average of the values
    weight: Any  # its weight
    previous: Any  # params and hypergradient of the last step, for Barzilai-Borwein
    previous_grad: Any
    done: Any


class _Search(NamedTuple):
    """One step under way: the hypergradient at the current accuracy and the trial at the current step."""

    hg: Hypergradient
    tol: Any
    adjoint_tol: Any
    trial: Any
    trial_warm: Any
    step: Any
    tries: Any  # trials at this accuracy
    rounds: Any  # refinements of the accuracy
    accepted: Any
    value: Any  # trial's value
    status: Any
    work: Any


@dataclass(frozen=True)
class MAID(Method):
    """Method of adaptive inexact descent (Salehi et al. 2024; Bogensperger et al. 2024, Algorithm 3).

    A step computes z at accuracies (eps, delta) and accepts params+ = P(params - alpha z) when the decrease is larger
    than what inexactness can feign,

        U(params+) + armijo ||params+ - params||^2/alpha <= l(params),   U, l = value +- its error,

    so that the exact upper-level value decreases. A failed trial shortens alpha; when trials run out, or the errors
    alone exceed any decrease the step could bring, eps and delta are halved and z recomputed, warm. After success eps,
    delta and alpha grow. The errors come from the oracle: estimates by default, proven bounds with ``certified``.

    Args:
      oracle: any hypergradient oracle; with ``correct=True`` values and z have second-order errors, so that far looser
        accuracies suffice.
      projection: ``params -> params`` onto a convex feasible set.
      certified: use ``bound`` instead of ``error`` (needs the constants of the problem).
      tol, adjoint_tol: first eps, delta; None takes 1e-1 of the sizes at the cold start.
      step_size: first alpha; None moves params by a tenth of their norm.
      accuracy_down, accuracy_up: factors nu < 1 on failure and nu_bar >= 1 on success.
      step_down, step_up: factors rho < 1 on a failed trial and rho_bar >= 1 on success.
      armijo: lambda of the decrease test. descent: eta; refine until error(z) <= (1 - eta) ||z||, off when None.
      tries: trials per accuracy. rounds: refinements per step.
      window: weight of past values in a non-monotone reference (Zhang & Hager 2004; 0.85 is usual), 0 is monotone.
      barzilai_borwein: start each search at the Barzilai-Borwein length (within a decade of the last one) instead of
        rho_bar alpha.
      log_error: see `jb.Method`.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`. ValueError: an option is out of its range, or the oracle knows no error
        of its values (the message says what to pass).

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    >>> oracle = problem.oracle(lambda p, x, d: 0.5 * (x - 3.0) ** 2, solver=jb.solvers.AGD())
    >>> result = jb.fit(MAID(oracle), jnp.array(1.0), jnp.array([2.0]), steps=8)  # x_hat = 2 p
    >>> round(float(result.params), 2), bool(jnp.all(jnp.diff(result.history["value"]) < 0))
    (1.5, True)
    """

    _: KW_ONLY
    projection: Callable | None = None
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
    tries: int = 10
    rounds: int = 60
    window: float = 0.0
    barzilai_borwein: bool = True

    compares_values = True

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.accuracy_down < 1, "accuracy_down", "between 0 and 1")
        _require(0 < self.step_down < 1, "step_down", "between 0 and 1")
        _require(self.accuracy_up >= 1, "accuracy_up", "at least 1")
        _require(self.step_up >= 1, "step_up", "at least 1")
        _require(0 < self.armijo < 1, "armijo", "between 0 and 1")
        _require(self.descent is None or 0 < self.descent < 1, "descent", "between 0 and 1, or None")
        _require(0 <= self.window < 1, "window", "at least 0 and below 1")
        _require(self.tries >= 1 and self.rounds >= 1, "tries and rounds", "at least 1")
        missing = self.oracle.missing(self.certified)
        if missing is not None:
            kind = "proven" if self.certified else "estimated"
            raise ValueError(f"MAID needs {kind} errors of upper-level values; pass {missing}.")

    @property
    def reads_error(self) -> bool:
        return self.log_error or (self.descent is not None and not self.certified)

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
            reference=zero,
            weight=zero,
            previous=params,
            previous_grad=trees.zeros_like(params),
            done=jnp.asarray(False),
        )

    @compiled
    def step(self, state: MAIDState, batch) -> tuple[MAIDState, StepInfo]:
        hg = self.asked(state.params, batch, state.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
        zero = jnp.zeros((), jnp.int32)
        search = _Search(
            hg=hg,
            tol=state.tol,
            adjoint_tol=state.adjoint_tol,
            trial=state.params,
            trial_warm=hg.warm,
            step=self._first_length(state, hg.grad),
            tries=zero,
            rounds=zero,
            accepted=jnp.asarray(False),
            value=hg.value,
            status=hg.status,
            work=hg.work,
        )

        def unfinished(s: _Search):
            squared_norm = self._squared_norm(state, s)
            searching = ~s.accepted & (s.rounds <= self.rounds) & ~self._at_floor(state, s)
            return searching & jnp.isfinite(s.hg.value) & jnp.isfinite(squared_norm) & ~self._zero(s, squared_norm)

        def refine(s: _Search) -> _Search:
            return self._refine(state, batch, s)

        def attempt(s: _Search) -> _Search:
            return self._try(state, batch, s)

        def advance(s: _Search) -> _Search:
            return jax.lax.cond(self._needs_refinement(state, s), refine, attempt, s)

        return self._finish(state, jax.lax.while_loop(unfinished, advance, search))

    def _first_length(self, state: MAIDState, grad):
        length = jnp.where(state.step > 0, state.step, steps.first_step(state.params, grad))
        grad = steps.reduced(self.projection, state.params, grad, length)
        start = steps.first_step(state.params, grad) if self.step_size is None else self.step_size
        length = jnp.where(state.step > 0, state.step, start)
        if not self.barzilai_borwein:
            return length
        bb = steps.barzilai_borwein(state.params, grad, state.previous, state.previous_grad, length)
        # the secant of two inexact gradients can be anything: it may change the step by a decade, not by more
        return jnp.where(state.step > 0, jnp.clip(bb, 0.1 * length, 10 * length), length)

    def _errors(self, result: Hypergradient | Value):
        if isinstance(result, Hypergradient):
            return result.value_bound if self.certified else result.value_error
        return result.bound if self.certified else result.error

    def _level(self, state: MAIDState, s: _Search):
        """What the trial has to get below: l(params), or the average of past values where that is higher."""
        lower = s.hg.value - self._errors(s.hg)
        return jnp.maximum(lower, self._reference(state, s)) if self.window > 0 else lower

    def _reference(self, state: MAIDState, s: _Search):
        """Average of the values so far; before the first step the value at the start."""
        return jnp.where(state.weight > 0, state.reference, s.hg.value)

    def _needs_refinement(self, state: MAIDState, s: _Search):
        return (s.tries >= self.tries) | ~self._resolves_decrease(state, s)

    def _squared_norm(self, state: MAIDState, s: _Search):
        """Of what of the hypergradient can move params."""
        return trees.squared_norm(steps.reduced(self.projection, state.params, s.hg.grad, s.step))

    def _zero(self, s: _Search, squared_norm):
        """Whether the hypergradient is exactly zero; that of an inexact solution may be zero anywhere."""
        return (squared_norm == 0) & (self._errors(s.hg) == 0)

    def _stationary(self, state: MAIDState, s: _Search):
        error = 2 * self._errors(s.hg)
        shown = acceptable(s.hg.status) & (error <= CREDIBLE * jnp.abs(s.hg.value))
        squared_norm = self._squared_norm(state, s)
        small = steps.stationary(s.hg.value, squared_norm, state.step, jnp.where(shown, error, 0.0))
        return small & ((squared_norm > 0) | (error == 0) | shown)

    def _resolves_decrease(self, state: MAIDState, s: _Search):
        """Whether a step of this length could pass: its largest credible decrease against the errors."""
        squared_norm = self._squared_norm(state, s)
        decrease = (1 - self.armijo) * s.step * squared_norm
        credible = 2 * decrease > self._errors(s.hg)
        if self.window > 0:
            credible = credible | ((squared_norm > 0) & (self._reference(state, s) > s.hg.value))
        if self.descent is None:
            return credible
        error = s.hg.bound if self.certified else s.hg.error
        return credible & (error <= (1 - self.descent) * jnp.sqrt(squared_norm))

    def _try(self, state: MAIDState, batch, s: _Search) -> _Search:
        trial, moved = steps.projected_step(self.projection, state.params, s.hg.grad, s.step)
        value = self.asked.value(trial, batch, s.trial_warm, tol=s.tol)
        upper = value.value + self._errors(value)
        accepted = (upper + self.armijo * moved / s.step <= self._level(state, s)) & (moved > 0)
        return s._replace(
            trial=trial,
            trial_warm=jax.tree.map(lambda a, b: jnp.where(accepted, a, b), value.warm, s.trial_warm),
            step=jnp.where(accepted, s.step, self.step_down * s.step),
            tries=s.tries + 1,
            accepted=accepted,
            value=value.value,
            status=jnp.maximum(s.status, jnp.where(accepted, value.status, Status.CONVERGED)),
            work=s.work + value.work,
        )

    def _refine(self, state: MAIDState, batch, s: _Search) -> _Search:
        tol, adjoint_tol = self.accuracy_down * s.tol, self.accuracy_down * s.adjoint_tol
        hg = self.asked(state.params, batch, s.hg.warm, tol=tol, adjoint_tol=adjoint_tol)
        return s._replace(
            hg=hg,
            tol=tol,
            adjoint_tol=adjoint_tol,
            trial_warm=hg.warm,
            step=self._first_length(state, hg.grad),
            tries=jnp.zeros_like(s.tries),
            rounds=s.rounds + 1,
            status=hg.status,
            work=s.work + hg.work,
        )

    def _at_floor(self, state: MAIDState, s: _Search):
        """Trials failed and no better accuracy is to be had: converged to what is attainable."""
        floored = jnp.all(s.hg.lower.status == Status.PRECISION)
        floored = floored & ((s.tries >= self.tries) | jnp.all(s.hg.adjoint.status == Status.PRECISION))
        exact = (self._errors(s.hg) == 0) & (s.hg.error == 0)
        return (floored | exact) & self._needs_refinement(state, s)

    def _finish(self, state: MAIDState, s: _Search) -> tuple[MAIDState, StepInfo]:
        accepted = s.accepted
        # Zhang & Hager 2004, (1.6): the value at the start has weight 1
        before = self.window * jnp.where(state.weight > 0, state.weight, 1.0)
        weight = before + 1.0
        reference = (before * self._reference(state, s) + s.value) / weight
        following = MAIDState(
            params=trees.where(accepted, s.trial, state.params),
            warm=trees.where(accepted, s.trial_warm, s.hg.warm),
            tol=jnp.where(accepted, self.accuracy_up, 1.0) * s.tol,
            adjoint_tol=jnp.where(accepted, self.accuracy_up, 1.0) * s.adjoint_tol,
            step=jnp.where(accepted, self.step_up * s.step, state.step),
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


def _require(condition: bool, name: str, what: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` of MAID must be {what}.")


def __dir__():
    return __all__
