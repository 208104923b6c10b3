"""A user's own solver as the lower-level solver, judged by our residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Work
from jbilevel.solvers.base import Solver
from jbilevel.solvers.loop import Iterate


@dataclass(frozen=True)
class External(Solver):
    """Any function that minimises an energy, as a solver: ``run(energy, x0, tol, max_steps) -> x``.

    ``run`` is called once per sample, with ``energy: x -> scalar`` at fixed params and data, the warm start x0, and the
    tolerance on ``||grad energy||_2`` (traced, like max_steps). Its result is not believed: one gradient is evaluated
    there, and status, residual and error are ours. CONVERGED when the residual meets the tolerance; PRECISION when the
    residual is rounding (only where the problem's ``smoothness`` is known); NONFINITE; else STAGNATED, since the call
    has ended and a repetition would end alike. ``info.steps`` is 1, the call.

    Args:
      run: traceable by JAX (jit, vmap); another solver enters through ``jax.pure_callback``. Differentiation never
        goes through it. It may return ``(x, gradients)`` to report its own evaluations; otherwise info.work counts
        our one gradient only. Make it once: another function object compiles again.

    With jaxopt; and with optimistix, which needs a static step limit and stops on the length of its steps, not on the
    gradient, hence the factor:

        External(lambda energy, x0, tol, max_steps: jaxopt.LBFGS(energy, tol=tol, maxiter=max_steps).run(x0).params)
        External(lambda energy, x0, tol, max_steps: optimistix.minimise(lambda x, _: energy(x),
                 optimistix.BFGS(rtol=0.0, atol=0.01 * tol), x0, max_steps=1000, throw=False).value)

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> def descend(energy, x0, tol, max_steps):
    ...     return jax.lax.fori_loop(0, 100, lambda _, x: x - 0.5 * jax.grad(energy)(x), x0)
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    >>> x, info = jb.solve(problem, (), 2.0, solver=External(descend))
    >>> float(x), info.status == jb.Status.CONVERGED
    (2.0, Array(True, dtype=bool))
    """

    run: Callable

    patience = 0
    one_shot = True

    def init(self, view, x0, target, max_steps) -> Iterate:
        x, gradients = self._result(self.run(view.value, x0, target, max_steps), x0)
        value, gradient = view.value_and_gradient(x)
        residual = trees.norm(gradient)
        residual = jnp.where(jnp.isfinite(residual), residual, jnp.nan)  # the driver takes inf for "not yet known"
        smoothness = view.constants.smoothness
        curvature = jnp.asarray(0.0 if smoothness is None else smoothness, residual.dtype)
        work = Work.zero().plus(gradients=gradients + 1)
        return Iterate(x=x, gradient=gradient, residual=residual, curvature=curvature, evaluations=work, value=value)

    def first_residual(self, view, x0):
        return trees.norm(view.gradient(x0))

    def step(self, view, state: Iterate, target) -> Iterate:
        return state

    def _result(self, result, x0) -> tuple[Any, Any]:
        """(x, gradients), with x in the structure and dtypes of x0."""
        wanted = jax.tree.structure(x0)
        gradients = 0
        if jax.tree.structure(result) != wanted and isinstance(result, tuple) and len(result) == 2:
            result, gradients = result
        shapes = jax.tree.map(jnp.shape, x0)
        if jax.tree.structure(result) != wanted or jax.tree.map(jnp.shape, result) != shapes:
            raise TypeError(
                f"External `run` must return x shaped like x0, {shapes} in {wanted}, or (x, gradients); "
                f"got {jax.tree.map(jnp.shape, result)} in {jax.tree.structure(result)}."
            )
        return trees.cast_like(result, x0), gradients

    def value(self, state):
        return state.value
