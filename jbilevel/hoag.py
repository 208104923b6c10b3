"""HOAG: gradient descent with hypergradients whose accuracy follows a schedule fixed in advance (Pedregosa 2016)."""

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

__all__ = ["HOAG", "RULES", "SCHEDULES", "HOAGState"]

RULES = ("safeguarded", "pedregosa")

# accuracy at step k = 1, 2, ... relative to the first
SCHEDULES = {
    "exponential": lambda k: 0.9 ** (k - 1),
    "quadratic": lambda k: 1.0 / k**2,
    "cubic": lambda k: 1.0 / k**3,
    "exact": lambda k: jnp.zeros_like(k),
}
FLOOR = 1e-12  # of the first tolerance's scale: nothing below it is asked for
RISE = 0.2  # share of a value by which it may rise at most
# of the rule "safeguarded":
PROBE = 0.1  # by which accuracies are refined to see whether the first hypergradient is accurate enough
CHANGE = 0.3  # relative change of z up to which it is
PROBES = 12
LONGER = 2.0  # factor on a step that brought this share of what the slope promises
SHARE = 0.6


class HOAGState(MethodState):
    first_tol: Any  # accuracies of the first step, which the schedule scales
    first_adjoint_tol: Any
    shrink: Any  # extra factor on the accuracies, halved at each rejection
    k: Any
    step: Any  # step length, 1/L; 0 before the first
    value: Any  # of the last accepted params
    previous: Any  # last accepted params, to go back to
    previous_grad: Any
    previous_tol: Any


class _Probe(NamedTuple):
    """Looking for the first accuracies."""

    hg: Hypergradient
    tol: Any
    adjoint_tol: Any
    change: Any  # of z by the last refinement, relative; inf before the first
    probes: Any
    work: Any


@dataclass(frozen=True)
class HOAG(Method):
    """Hyperparameter optimisation with approximate gradient (Pedregosa 2016, Algorithm 1).

    At step k the lower level and the adjoint are solved to eps_k = tol * schedule(k), warm, and params move by -z/L.
    L adapts (Pedregosa 2016, section 5): with d = ||last move||, C = 1/4, inexactness can feign a change of
    slack_k = C eps_k + (C + 1) eps_{k-1} d. A value f_k <= f_{k-1} + slack_k - L d^2 makes the step 1/L longer; one
    that is too high rejects the move (back to the last accepted params, L doubled, accuracies halved), and so does a
    value that is not finite, in place of which the last accepted one is reported; else L stays. Each move is made once.

    ``rule="pedregosa"`` is the author's code: steps grow by 1/0.95, a value is too high above 1.2 f_{k-1} (by more than
    0.2 |f_{k-1}|), and the first step moves params by the root of their number. It lets values rise by a fifth in every
    step, and its first accuracy may exceed x itself. The rule "safeguarded" is ours, and differs where that fails:

    - a value is too high above f_{k-1} + min(slack_k, 0.2 |f_{k-1}|): else steps that are a little too long oscillate
      with growing amplitude;
    - the first accuracies are refined tenfold until z changes by less than 30 %, within the first step;
    - the first step moves params by a tenth of their norm, and one that brings 60 % of what the slope promises doubles.

    Args:
      oracle: any hypergradient oracle.
      schedule: "exponential" (0.9^k), "quadratic" (1/k^2), "cubic" (1/k^3), "exact".
      rule: "safeguarded" or "pedregosa".
      adapt: whether L adapts; with False every step has length ``step_size`` = 1/L (Pedregosa 2016, Algorithm 1 as
        printed) and no move is rejected.
      tol, adjoint_tol: accuracies at the first step, which are then not refined; None takes 1e-2 of the sizes at the
        cold start.
      step_size: first step length; None as the rule says.
      projection: ``params -> params`` onto the feasible set.
      log_error: see `jb.Method`.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`. ValueError: there is no such schedule or rule, or ``adapt=False`` comes
        without ``step_size``.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    >>> oracle = problem.oracle(lambda p, x, d: 0.5 * (x - 3.0) ** 2, solver=jb.solvers.AGD())
    >>> method = HOAG(oracle, "cubic", tol=0.1, adjoint_tol=0.1, step_size=0.2)
    >>> result = jb.fit(method, jnp.array(1.0), jnp.array([2.0]), steps=8)  # x_hat = 2 p
    >>> round(float(result.params), 2), round(float(result.history["tol"][0] / result.history["tol"][3]))
    (1.5, 64)
    """

    schedule: str = "quadratic"
    _: KW_ONLY
    rule: str = "safeguarded"
    adapt: bool = True
    tol: float | None = None
    adjoint_tol: float | None = None
    step_size: float | None = None
    projection: Callable | None = None

    compares_values = True

    def __post_init__(self):
        super().__post_init__()
        for name, given, known in (("schedule", self.schedule, SCHEDULES), ("rule", self.rule, RULES)):
            if given not in known:
                raise ValueError(f"`{name}` must be one of {sorted(known)}, got {given!r}.")
        if not self.adapt and self.step_size is None:
            raise ValueError("`step_size` of HOAG must be given with `adapt=False`: the length 1/L of every step.")

    @property
    def probes(self) -> int:
        """How often the first accuracies may be refined."""
        given = self.tol is not None or self.adjoint_tol is not None
        return 0 if given or self.rule == "pedregosa" or self.oracle.exact else PROBES

    def _factor(self, shrink, k):
        """Accuracy of step k, relative to the first."""
        return jnp.maximum(shrink * SCHEDULES[self.schedule](k), FLOOR)

    def init(self, params, batch) -> HOAGState:
        params = steps.project(self.projection, params)
        first = steps.first_tolerances(self.asked, params, batch, 1e-2, self.tol, self.adjoint_tol)
        one = jnp.ones_like(first.tol)
        factor = self._factor(one, one)
        return HOAGState(
            params=params,
            warm=self.oracle.init(params, batch),
            tol=factor * first.tol,
            adjoint_tol=factor * first.adjoint_tol,
            first_tol=first.tol,
            first_adjoint_tol=first.adjoint_tol,
            shrink=one,
            k=one,
            step=jnp.zeros_like(one),
            value=jnp.full_like(one, jnp.inf),
            previous=params,
            previous_grad=trees.zeros_like(params),
            previous_tol=first.tol,
        )

    @compiled
    def step(self, state: HOAGState, batch) -> tuple[HOAGState, StepInfo]:
        first = state.k == 1
        probe = self._differentiate(state, batch)
        hg = probe.hg
        # what the probes found is what the schedule scales
        found = probe.tol / jnp.where(state.tol > 0, state.tol, 1.0)
        move = trees.norm(trees.sub(state.params, state.previous))
        length = jnp.where(first, self._first_length(state.params, hg.grad), state.step)
        rejected, longer = self._judge(state, hg.value, move, length)
        length = jnp.where(rejected, 0.5 * length, jnp.where(longer, self._growth * length, length))

        # a move to where the energy overflows is taken back like any other, and its NaN forgotten
        nonfinite = ~first & ~jnp.isfinite(hg.value)
        base = trees.where(rejected, state.previous, state.params)
        grad = trees.where(rejected, state.previous_grad, hg.grad)
        params, _ = steps.projected_step(self.projection, base, grad, length)
        shrink, k = jnp.where(rejected, 0.5, 1.0) * state.shrink, state.k + 1
        factor = self._factor(shrink, k)
        following = HOAGState(
            params=params,
            warm=trees.where(nonfinite, state.warm, hg.warm),
            tol=factor * found * state.first_tol,
            adjoint_tol=factor * found * state.first_adjoint_tol,
            first_tol=found * state.first_tol,
            first_adjoint_tol=found * state.first_adjoint_tol,
            shrink=shrink,
            k=k,
            step=length,
            value=jnp.where(rejected, state.value, hg.value),
            previous=base,
            previous_grad=grad,
            previous_tol=probe.tol,
        )
        grad_norm = trees.norm(trees.where(nonfinite, state.previous_grad, hg.grad))
        step = jnp.where(rejected, 0.0, length)
        info = self.report(hg, probe, step=step, work=probe.work, grad_norm=grad_norm)
        return following, info._replace(value=jnp.where(nonfinite, state.value, hg.value))

    def _differentiate(self, state: HOAGState, batch) -> _Probe:
        """The hypergradient; at the first step refined, both accuracies together, until it stops changing."""

        def refine(p: _Probe) -> _Probe:
            factor = jnp.where(p.probes > 0, PROBE, 1.0)
            tol, adjoint_tol = factor * p.tol, factor * p.adjoint_tol
            hg = self.asked(state.params, batch, p.hg.warm, tol=tol, adjoint_tol=adjoint_tol)
            size, change = trees.norm(hg.grad), trees.norm(trees.sub(hg.grad, p.hg.grad))
            change = jnp.where((size > 0) & (p.probes > 0), change / jnp.where(size > 0, size, 1.0), jnp.inf)
            return _Probe(hg, tol, adjoint_tol, change=change, probes=p.probes + 1, work=p.work + hg.work)

        def unsure(p: _Probe):
            probing = (state.k == 1) & (p.probes <= self.probes) & (p.change > CHANGE)
            better = ~(
                jnp.all(p.hg.lower.status == Status.PRECISION) & jnp.all(p.hg.adjoint.status == Status.PRECISION)
            )
            return (p.probes == 0) | probing & better & jnp.isfinite(p.hg.value)

        nothing = steps.no_hypergradient(self.asked, state.params, batch, state.warm)
        start = _Probe(
            hg=nothing,
            tol=state.tol,
            adjoint_tol=state.adjoint_tol,
            change=jnp.asarray(jnp.inf, trees.dtype(state.params)),
            probes=jnp.zeros((), jnp.int32),
            work=nothing.work,
        )
        return jax.lax.while_loop(unsure, refine, start)

    def _judge(self, state: HOAGState, value, move, length):
        """(whether the last move is taken back, whether the next one may be longer)."""
        if not self.adapt:
            return jnp.asarray(False), jnp.asarray(False)
        first = state.k == 1
        slack = 0.25 * state.tol + 1.25 * state.previous_tol * move
        rise = RISE * jnp.abs(state.value)
        high = value >= state.value + rise
        if self.rule == "safeguarded":
            high = high | (value > state.value + slack)
        rejected = ~first & (high | ~jnp.isfinite(value))
        # a step of half the best length brings half of what the slope promises; nothing convex brings all of it
        share = 1.0 if self.rule == "pedregosa" else SHARE
        return rejected, ~first & ~rejected & (value <= state.value + slack - share * move**2 / length)

    @property
    def _growth(self) -> float:
        return 1 / 0.95 if self.rule == "pedregosa" else LONGER

    def _first_length(self, params, grad):
        if self.step_size is not None:
            return jnp.asarray(self.step_size)
        if self.rule == "safeguarded":
            return steps.first_step(params, grad)
        grad_norm = trees.norm(grad)
        return trees.size(params) ** 0.5 / jnp.where(grad_norm > 0, grad_norm, 1.0)


def __dir__():
    return __all__
