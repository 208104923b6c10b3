"""DFO-LS: learning a few parameters without hypergradients, by a package that owns the loop (zero-order baseline).

Needs the extra ``dfols`` (GPL-3.0), which is imported when `minimise` is called, not before.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jbilevel._method.base import require_oracle
from jbilevel._training.interruption import Interruption
from jbilevel.training import FitResult, FitStatus

__all__ = ["minimise"]

LARGEST = 50  # parameters; a quadratic model of more needs more evaluations than anybody would wait for


class _Spent(Exception):
    """Leaves the package's loop when the budget is spent."""


def minimise(
    oracle,
    params,
    batch,
    *,
    budget: float,
    tol: float,
    finest: float | None = None,
    radius: float = 0.1,
    lower=None,
    upper=None,
    sample_weight=None,
    callback: Callable[[int, Any, Any], Any] | None = None,
    options: dict | None = None,
) -> FitResult:
    """min over params of the mean of the samples' losses by DFO-LS (Cartis, Fiala, Marteau & Roberts 2019).

    The residuals are the square roots of the (nonnegative) losses of the samples, ``oracle.value(...).values``, so the
    package sees the least-squares structure of the mean. Dynamic accuracy (Ehrhardt & Roberts 2021): trial points come
    closer as the trust region shrinks, and the lower level is solved to tol * (distance to the best point/radius)^2,
    warm-started from the best point so far.

    Args:
      oracle: any oracle with ``value``. params: pytree of at most 50 numbers. batch: the full batch.
      budget: gradient-equivalents; the run stops once they are spent.
      tol: accuracy of the lower level at distance ``radius``; finest: smallest accuracy, 1e-4 * tol when None.
      radius: of the first trust region, relative to max(1, largest parameter).
      lower, upper: bounds, pytrees like params (or numbers), None where there is none.
      sample_weight: as for oracles.
      callback: ``callback(evaluation, params, value)``; stops when it returns something true.
      options: more arguments of ``dfols.solve``.

    Ctrl-C and SIGTERM end a run as they end `jb.fit`.

    Returns `FitResult`: params: the best that was met; history: ``value``, ``tol``, ``work``, ``seconds`` of each
    evaluation; state: what the package itself returned, None where the budget ended it.

    Raises:
      ImportError: DFO-LS is not installed. TypeError: ``oracle`` is no `jb.Oracle`. ValueError: negative losses, too
        many parameters, an empty budget.

    >>> import jbilevel as jb
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> batch = jnp.array([1.0, 3.0])
    >>> result = jb.dfols.minimise(oracle, jnp.array(0.0), batch, budget=100, tol=1e-3)  # doctest: +SKIP
    >>> round(float(result.params), 3)  # doctest: +SKIP
    2.0
    """
    require_oracle(oracle, "jb.dfols.minimise")
    try:
        import dfols
    except ImportError as error:
        raise ImportError("jb.dfols needs the package DFO-LS (GPL-3.0): pip install 'jbilevel[dfols]'.") from error
    flat, assemble = ravel_pytree(params)
    start = np.asarray(flat, np.float64)
    _check(start, budget, tol, radius)
    accuracy = _Accuracy(
        tol=float(tol),
        finest=float(1e-4 * tol if finest is None else finest),
        radius=radius * max(1.0, np.max(np.abs(start))),
    )
    interruption = Interruption()
    run = _Run(
        oracle,
        batch,
        assemble=lambda point: assemble(jnp.asarray(point, flat.dtype)),
        sample_weight=sample_weight,
        budget=budget,
        accuracy=accuracy,
        callback=callback,
        check=interruption.check,
    )
    settings = {
        "rhobeg": accuracy.radius,
        "objfun_has_noise": True,
        "do_logging": False,
        "maxfun": 10**6,
        **(options or {}),
    }
    if lower is not None or upper is not None:
        settings["bounds"] = (_bound(lower, params, -1e20), _bound(upper, params, 1e20))
    state, status = None, FitStatus.CONVERGED
    try:
        with interruption, interruption.ends(), warnings.catch_warnings():
            interruption.check()
            warnings.simplefilter("ignore", RuntimeWarning)  # of the package's own linear algebra
            state = dfols.solve(run, start, **settings)
    except _Spent:
        status = FitStatus.FINISHED
    if interruption.came:
        status = FitStatus.INTERRUPTED
    if run.stopped:
        status = FitStatus.STOPPED
    if state is not None and state.flag != state.EXIT_SUCCESS:
        status = FitStatus.STALLED
    history = {name: np.asarray([row[name] for row in run.rows]) for name in ("value", "tol", "work", "seconds")}
    told = {FitStatus.FINISHED: "The budget was spent."}
    if state is not None:
        told |= dict.fromkeys((FitStatus.CONVERGED, FitStatus.STALLED), f"DFO-LS: {state.msg}.")
    message = told.get(status, status.message)
    found = run.assemble(start if run.best is None else run.best)
    return FitResult(
        params=found,
        best=found,
        state=state,
        history=history,
        status=status,
        steps=len(run.rows),
        work=run.work,
        message=message,
        compile_seconds=run.compile_seconds,
    )


@dataclass(frozen=True)
class _Accuracy:
    """The dynamic accuracy: tol at distance ``radius`` from the best point, finer closer to it, ``finest`` at least."""

    tol: float
    finest: float
    radius: float

    def at(self, point, best) -> float:
        if best is None:
            return self.tol
        closeness = min(1.0, float(np.linalg.norm(point - best)) / self.radius)
        return float(max(self.finest, self.tol * closeness**2))


class _Run:
    """The objective as the package calls it: point -> residuals, with warm start and books kept here."""

    def __init__(self, oracle, batch, *, assemble, sample_weight, budget, accuracy: _Accuracy, callback, check):
        self.oracle, self.batch, self.assemble, self.weight = oracle, batch, assemble, sample_weight
        self.budget, self.accuracy = budget, accuracy
        self.callback, self.check = callback, check
        self.best, self.best_value, self.warm = None, math.inf, None
        self.work, self.rows, self.stopped = 0.0, [], False
        self.compile_seconds = 0.0

    def __call__(self, point):
        self.check()
        if self.work >= self.budget:
            raise _Spent
        tol, began = self.accuracy.at(point, self.best), time.perf_counter()
        params = self.assemble(point)
        warm = self.oracle.init(params, self.batch) if self.warm is None else self.warm
        found = self.oracle.value(params, self.batch, warm, tol=tol, sample_weight=self.weight)
        jax.block_until_ready(found)
        seconds = time.perf_counter() - began
        if not self.rows:
            self.compile_seconds, seconds = seconds, 0.0
        values = np.asarray(found.values, np.float64)
        if np.any(values < 0):
            raise ValueError("DFO-LS needs nonnegative losses (it takes their square roots); add a constant to `loss`.")
        value = float(found.value)
        self.work += float(found.work)
        if value < self.best_value:  # never so for NaN, whose point and warm start nobody wants
            self.best, self.best_value, self.warm = np.array(point), value, found.warm
        self.rows.append({"value": value, "tol": tol, "work": self.work, "seconds": seconds})
        if self.callback is not None and self.callback(len(self.rows) - 1, params, value):
            self.stopped = True
            raise _Spent
        # a point where the lower level failed is very bad, not the end of the run
        return np.sqrt(np.where(np.isfinite(values), values, 1e20) * self._weights(values.size))

    def _weights(self, count: int):
        if self.weight is None:
            return np.full(count, 1.0 / count)
        weight = np.asarray(self.weight, np.float64)
        return weight / np.sum(weight)


def _bound(given, params, absent: float):
    """A bound per parameter as the package wants it, from a number or a pytree like params."""
    flat = ravel_pytree(params)[0]
    if given is None:
        return np.full(flat.shape, absent)
    if isinstance(given, (int, float)):
        return np.full(flat.shape, float(given))
    return np.asarray(ravel_pytree(given)[0], np.float64)


def _check(start, budget, tol, radius) -> None:
    if start.size > LARGEST:
        raise ValueError(f"DFO-LS is for at most {LARGEST} parameters, got {start.size}; use jb.MAID or jb.HOAG.")
    for name, value in (("budget", budget), ("tol", tol), ("radius", radius)):
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value!r}.")


def __dir__():
    return __all__
