"""When a run ends: rules that are looked at before each step, and what they say."""

from __future__ import annotations

import math
from typing import NamedTuple

from jbilevel._core.results import Status
from jbilevel._training.log import COLUMNS, History
from jbilevel._training.stepping import Run, Taken

SMALL = 1e-6  # a gradient norm, relative to the largest


class Rules(NamedTuple):
    """The limits of a run; those of value and gradient norm are compared with the last step's report."""

    value_below: float
    grad_norm_below: float
    work_budget: float

    def met(self, run: Run, history: History) -> tuple[str, str] | None:
        """(name of a `FitStatus`, sentence) of the first rule that is met, None where none is."""
        value, slope = (history.last(name, math.inf) for name in ("value", "grad_norm"))
        rules = (
            (run.done, *_done(run, history)),
            (value < self.value_below, "CONVERGED", f"The value {value:.6g} is below {self.value_below:.6g}"),
            (
                slope < self.grad_norm_below,
                "CONVERGED",
                f"The gradient norm {slope:.6g} is below {self.grad_norm_below:.6g}",
            ),
            (
                run.work >= self.work_budget,
                "FINISHED",
                f"The work budget of {self.work_budget:.6g} gradient-equivalents is spent",
            ),
        )
        found = next(((name, reason) for met, name, reason in rules if met), None)
        return found and (found[0], f"{found[1]} after {run.steps} steps (work {run.work:.6g}).")


def _done(run: Run, history: History) -> tuple[str, str]:
    """Converged only where the gradient was shown to be small: by the method, or against the largest one met."""
    norms = [row[COLUMNS.index("grad_norm")] for row in history.rows]
    slope = norms[-1] if norms else math.nan
    if run.stationary or (norms and slope <= SMALL * max(norms)):
        return "CONVERGED", "The method cannot improve any further"
    return "STALLED", (
        f"The method cannot go on though its gradient, of norm {slope:.3g}, was not shown to be small (its first step "
        "is too long, solves fail, or the gradient is wrong): stalled"
    )


def failure(step: int, taken: Taken) -> str:
    """What was not finite after a step, and its worst solve."""
    value, code = float(taken.info.value), int(taken.info.status)
    what = {"value": f"the value {value}", "gradient": "a gradient that is not finite"}.get(
        taken.broken or "", "new parameters that are not finite"
    )
    cause = f" Worst solve, {Status(code).name}: {Status(code).message}" if code in list(Status) else ""
    return f"Step {step} gave {what}; the state is the one before it.{cause}"


def still(history: History) -> str:
    """A sentence where every hypergradient was exactly zero."""
    norms = [row[COLUMNS.index("grad_norm")] for row in history.rows]
    if not norms or any(norm != 0 for norm in norms):
        return ""
    return (
        "But the hypergradient was exactly zero from the start: unless that is optimal, nothing that the loss sees "
        "depends on params there (a unit that is off, a weight that is zero, an energy that leaves them out); start "
        "elsewhere."
    )


def rise(history: History, one_objective: bool) -> str:
    """A sentence where the last value is above the first."""
    values = [row[COLUMNS.index("value")] for row in history.rows]
    if not values or not values[-1] > values[0]:
        return ""
    apart = "" if one_objective else ", each that of its own batch"
    return f"But the value rose from {values[0]:.6g} to {values[-1]:.6g}{apart}."
