"""Unrolled, truncated and one-step differentiation of the lower-level solver, on the solvers' own steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status, Warm, Work
from jbilevel._core.validate import require_function, trace_scalar
from jbilevel._oracle.base import require_view
from jbilevel._oracle.kinds import ForwardOracle
from jbilevel._oracle.pipeline import AdjointOracle
from jbilevel._oracle.samples import Sample
from jbilevel._oracle.smooth_system import SmoothLower
from jbilevel._views.base import Problem
from jbilevel._views.smooth import SmoothView
from jbilevel.solvers.agd import AGD
from jbilevel.solvers.base import Solver
from jbilevel.solvers.linear import LinearSolver

__all__ = ["OneStep", "Oracle"]


@dataclass(frozen=True)
class Oracle(ForwardOracle):
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

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, smoothness=2.0)
    >>> loss = lambda p, x, d: x
    >>> oracle = jb.unroll.Oracle(problem, loss, steps=3, solver=jb.solvers.GradientDescent)  # each goes half the way
    >>> hg = oracle(jnp.array(1.0), jnp.array([8.0]))
    >>> float(hg.value), float(hg.grad), hg.lower.status.tolist() == [jb.Status.MAX_STEPS]
    (7.0, 7.0, True)
    """

    problem: Problem
    loss: Callable
    _: KW_ONLY
    steps: int = 100
    truncate: int | None = None
    checkpoint: bool = False
    solver: Solver = AGD()

    def __post_init__(self):
        super().__post_init__()
        require_function(self.loss, "loss")
        if not isinstance(self.problem, Problem):
            raise TypeError(f"`problem` must be a problem such as jb.SmoothProblem, got {type(self.problem).__name__}.")
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")
        if self.truncate is not None and not 1 <= self.truncate <= self.steps:
            raise ValueError(f"`truncate` must lie between 1 and steps={self.steps}, got {self.truncate}.")

    def check(self, params) -> None:
        self.problem.check(params)

    def missing(self, certified: bool) -> str | None:
        if certified:
            return "another oracle (an unrolled solver has no proven bounds)"
        return self.problem.lacks()

    def start(self, params, data) -> Warm:
        return Warm(self.problem.start(params, data), None)

    def forward(self, params, data, warm: Warm, tol):
        self.problem.validate(params, data, warm.x)
        trace_scalar(self.loss, "loss", params, warm.x, data)
        state, view = self._iterate(params, data, jax.lax.stop_gradient(warm.x))
        value = self.loss(params, state.x, data)
        state, seen = jax.lax.stop_gradient((state, value))
        target = tol * view.tolerance_scale
        status = jnp.where(state.residual <= target, Status.CONVERGED, Status.MAX_STEPS)
        status = jnp.where(jnp.isfinite(state.residual), status, Status.NONFINITE).astype(jnp.int32)
        steps = jnp.asarray(self.steps, jnp.int32)
        error = view.error_bound(self.solver.unrounded(view, state))
        lower = SolveInfo(
            status=status, steps=steps, residual=state.residual, error=error, evaluations=state.evaluations
        )
        adjoint = SolveInfo(
            status=jnp.zeros((), jnp.int32),
            steps=steps,
            residual=jnp.zeros_like(error),
            error=jnp.zeros_like(error),
            evaluations=Work.zero().plus(products=steps if self.truncate is None else self.truncate),
        )
        slope = jax.grad(self.loss, 1)(params, state.x, data)
        estimate = jax.lax.stop_gradient(trees.norm(slope) * error)
        return value, Sample(value=seen, warm=Warm(state.x, None), lower=lower, adjoint=adjoint, estimate=estimate)

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
class _GradientStep(LinearSolver):
    """q = step * b in place of a solve."""

    step: float | None

    def solve(self, product, b, q, *, tol, max_steps):
        q = trees.scale(self.step, b)
        residual = trees.norm(trees.sub(product(q), b))
        status = jnp.where(residual <= tol, Status.CONVERGED, Status.MAX_STEPS)
        status = jnp.where(jnp.isfinite(residual), status, Status.NONFINITE).astype(jnp.int32)
        info = SolveInfo(
            status=status,
            steps=jnp.ones((), jnp.int32),
            residual=residual,
            error=jnp.full_like(residual, jnp.inf),
            evaluations=Work.zero().plus(products=1),
        )
        return q, info


@dataclass(frozen=True)
class _OneStepLower(SmoothLower):
    """The step is 1/L where none is given."""

    def solve(self, view, x0, tol):
        system, info = super().solve(view, x0, tol)
        if self.linear_solver.step is None:
            system = replace(system, linear_solver=_GradientStep(1.0 / view.constants.smoothness))
        return system, info


@dataclass(frozen=True)
class OneStep(AdjointOracle):
    """One-step (Jacobian-free) hypergradient: the solution differentiated through a single gradient step at it.

    q = step * grad_x loss in place of H^{-1} grad_x loss (Fung et al. 2022; Bolte, Pauwels & Vaiter 2023): no linear
    solve, a descent direction when the step contracts well, and biased by about 1 - step mu. ``error`` estimates that
    bias with the Newton correction of `implicit.Oracle`; ``correct=True`` removes most of it.

    Args: as `jbilevel.implicit.Oracle`; step: gradient step length, 1/L of the problem when None.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> problem = jb.SmoothProblem(
    ...     lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0, smoothness=2.0)
    >>> oracle = jb.unroll.OneStep(problem, lambda p, x, d: x, solver=jb.solvers.AGD(), estimate=False)
    >>> hg = oracle(jnp.array(1.0), jnp.array([8.0]), tol=1e-5)  # x_hat = 8 p; the step 1/2 halves its derivative
    >>> round(float(hg.value), 3), float(hg.grad)
    (8.0, 4.0)
    """

    step: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require_view(self.problem, SmoothView, "jb.unroll.OneStep", "smooth problem", "see jb.piggyback")
        if self.step is None and self.problem.lacks_smoothness():
            raise ValueError("OneStep needs `step`, or a problem with `smoothness`.")

    def corrected(self) -> AdjointOracle:
        raise ValueError(
            "`rtol` needs an adjoint that can be refined, which OneStep lacks; use `tol`, or jb.implicit.Oracle."
        )

    @property
    def lower(self) -> SmoothLower:
        solver = self.problem.default_solver() if self.solver is None else self.solver
        return _OneStepLower(self.problem, solver, self.max_steps, _GradientStep(self.step), 1)


def __dir__():
    return __all__
