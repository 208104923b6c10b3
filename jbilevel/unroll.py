"""Unrolled, truncated and one-step differentiation of the lower-level solver, on the solvers' own steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jbilevel import implicit
from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status, Warm, Work
from jbilevel._core.validate import trace_scalar
from jbilevel._oracle import base
from jbilevel._oracle.base import Sample
from jbilevel.solvers import AGD

if TYPE_CHECKING:
    from jbilevel.problems.base import Problem


@dataclass(frozen=True)
class Oracle(base.Oracle):
    """Gradient of loss(params, x_K) where x_K is ``steps`` steps of a solver, by reverse mode through the steps.

    It is the exact gradient of what K steps compute, not of the minimiser: with too few steps the two differ, and
    nothing here tells by how much, so ``error`` is inf. Costs K stored states, or about 2 sqrt(K) with ``checkpoint``.

    Args:
      problem, loss: as in `jbilevel.implicit.Oracle`.
      steps: K. truncate: differentiate through the last ``truncate`` steps only (all when None).
      checkpoint: store a state every sqrt(K) steps and recompute those between.
      solver: one whose steps are differentiable in reverse (`AGD`, `GradientDescent`); constants count as constants.
      in_axes, on_failure, chunk: see `jb.Oracle`.

    ``tol`` does not change the work here: it only decides the status, CONVERGED or MAX_STEPS after K steps.
    """

    problem: Problem
    loss: Callable
    steps: int = 100
    truncate: int | None = None
    checkpoint: bool = False
    solver: Any = AGD()
    in_axes: Any = 0
    on_failure: str = "nan"
    chunk: int | str | None = "auto"

    correct = False
    direct = True

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")
        if self.truncate is not None and not 1 <= self.truncate <= self.steps:
            raise ValueError(f"`truncate` must lie between 1 and steps={self.steps}, got {self.truncate}.")

    def missing(self, certified: bool) -> str | None:
        if certified:
            return "another oracle (an unrolled solver has no proven bounds)"
        return self.problem.lacks()

    def _start(self, params, data) -> Warm:
        return Warm(self.problem.start(params, data), None)

    def _value(self, params, data, warm: Warm, tol) -> Sample:
        return self._forward(params, data, warm, tol)[1]

    def _forward(self, params, data, warm: Warm, tol):
        self.problem.validate(params, data, warm.x)
        trace_scalar(self.loss, "loss", params, warm.x, data)
        state, view = self._iterate(params, data, jax.lax.stop_gradient(warm.x))
        value = self.loss(params, state.x, data)
        state, seen = jax.lax.stop_gradient((state, value))
        target = tol * view.tolerance_scale
        status = jnp.where(state.residual <= target, Status.CONVERGED, Status.MAX_STEPS)
        status = jnp.where(jnp.isfinite(state.residual), status, Status.NONFINITE).astype(jnp.int32)
        steps = jnp.asarray(self.steps, jnp.int32)
        error = view.error_bound(state.residual)
        lower = SolveInfo(status, steps, state.residual, error, state.evaluations)
        backward = Work.zero().plus(products=steps if self.truncate is None else self.truncate)
        adjoint = SolveInfo(jnp.zeros((), jnp.int32), steps, jnp.zeros_like(error), jnp.zeros_like(error), backward)
        unknown = jnp.full_like(seen, jnp.inf)
        slope = jax.grad(self.loss, 1)(params, state.x, data)
        estimate = jax.lax.stop_gradient(trees.norm(slope) * error)
        return value, Sample(
            seen, jnp.zeros_like(seen), estimate, unknown, unknown, jnp.zeros_like(seen), Warm(state.x, None),
            lower, adjoint,
        )  # fmt: skip

    def _iterate(self, params, data, x0):
        """Solver state after all steps; only the last ``truncate`` of them carry derivatives."""
        tail = self.steps if self.truncate is None else self.truncate
        frozen = self.problem.view(*jax.lax.stop_gradient((params, data)))
        view = self.problem.view(params, data)
        # the first gradient of an untruncated run depends on params too
        state = self.solver.init(view if tail == self.steps else frozen, x0, 0.0)
        state = self._scan(frozen, state, self.steps - tail, checkpoint=False)
        return self._scan(view, state, tail, checkpoint=self.checkpoint), view

    def _scan(self, view, state, count: int, checkpoint: bool):
        def several(state, length):
            return jax.lax.scan(lambda s, _: (self.solver.step(view, s, 0.0), None), state, length=length)[0]

        if not checkpoint or count < 4:
            return several(state, count)
        size = math.isqrt(count)
        block = jax.checkpoint(lambda s: several(s, size))
        state = jax.lax.scan(lambda s, _: (block(s), None), state, length=count // size)[0]
        return several(state, count % size)


@dataclass(frozen=True)
class OneStep(implicit.Oracle):
    """One-step (Jacobian-free) hypergradient: the solution differentiated through a single gradient step at it.

    q = step * grad_x loss in place of H^{-1} grad_x loss (Fung et al. 2022; Bolte, Pauwels & Vaiter 2023): no linear
    solve, a descent direction when the step contracts well, and biased by about 1 - step mu. ``error`` estimates that
    bias with the Newton correction of `implicit.Oracle`; ``correct=True`` removes most of it.

    Args: as `jbilevel.implicit.Oracle`; step: gradient step length, 1/L of the problem when None.
    """

    step: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.step is None and self.problem.smoothness is None:
            raise ValueError("OneStep needs `step`, or a problem with `smoothness`.")

    def _adjoint(self, view, x, product, slope, q, adjoint_tol):
        step = 1.0 / view.constants.smoothness if self.step is None else self.step
        q = trees.scale(step, slope)
        residual = trees.norm(trees.sub(product(q), slope))
        status = jnp.where(residual <= adjoint_tol, Status.CONVERGED, Status.MAX_STEPS)
        status = jnp.where(jnp.isfinite(residual), status, Status.NONFINITE).astype(jnp.int32)
        work = Work.zero().plus(products=1)
        return q, SolveInfo(status, jnp.ones((), jnp.int32), residual, jnp.full_like(residual, jnp.inf), work)
