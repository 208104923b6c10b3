"""Hypergradients and differentiable minimisers of weighted l1 problems: implicit differentiation on the support.

    d loss(x_hat) = d_params loss - d_params [<grad_x F, q> + sum_i weights_i sign(x_i) q_i]

with the adjoint q of the unknowns that move (`jbilevel._oracle.support_system`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jbilevel._core import trees
from jbilevel._oracle.base import Scales, require_view
from jbilevel._oracle.pipeline import AdjointOracle
from jbilevel._oracle.solution import SolutionMap, Spec
from jbilevel._oracle.support_system import BIACTIVE, Policy, SupportLower
from jbilevel._views.base import Problem
from jbilevel._views.weighted_l1 import WeightedL1View
from jbilevel.solvers.forward_backward import ForwardBackward

__all__ = ["BIACTIVE", "Oracle", "argmin", "residual"]

SUPPORT = 1e-3  # first accuracy of x where a relative error is asked for, against that of smooth problems


def residual(problem: Problem, params, x, data, *, step):
    """The forward-backward residual (x - prox_{step G}(x - step grad F(x)))/step: zero at x_hat and nowhere else.

    ``step`` should be less than 1/L (Villacís 2025, where it is gamma).

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> lasso = jb.WeightedL1Problem(lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2), lambda p, d: jnp.zeros_like(d))
    >>> params, d = jnp.array(0.0), jnp.array([3.0, 0.5])  # soft thresholding by exp(0) solves it
    >>> points = jnp.array([2.0, 0.0]), jnp.array([2.0, 1.0])
    >>> [residual(lasso, params, x, d, step=0.5).tolist() for x in points]
    [[0.0, 0.0], [0.0, 1.5]]
    """
    view = problem.view(params, data)
    moved = trees.add_scaled(x, -step, view.smooth.gradient(x))
    return trees.scale(1 / step, trees.sub(x, view.penalty.prox(moved, step)))


def _require(problem, solver, name: str) -> None:
    require_view(problem, WeightedL1View, name, "jb.WeightedL1Problem", "smooth problems go to jb.implicit")
    if not isinstance(solver, ForwardBackward):
        raise TypeError(f"`solver` of {name} must be a ForwardBackward, got {type(solver).__name__}.")


@dataclass(frozen=True)
class Oracle(AdjointOracle):
    """Hypergradient oracle of a weighted l1 lower level, by implicit differentiation on the support
    (Villacís 2025).

    Args:
      problem: `WeightedL1Problem`. loss: ``loss(params, x, data) -> scalar`` for one sample.
      biactive: what counts as moving among unknowns at a kink, |grad F_i| = weight_i with x_i = 0: "none", "all";
        "sign": those that leaving zero would lower the loss for if they moved alone; "self-consistent": all, then
        without those whose adjoint says that leaving zero raises the loss, until none is left to drop.
      biactive_tol: with v = x - step grad F and u = step weight, an unknown is biactive if
        ``||v| - u| <= biactive_tol max(|v|, u)``, which depends on no scale.
      damping: added to the diagonal of the support system. Without it a support with dependent columns, where x_hat
        may have no derivative, ends as STAGNATED, with the hypergradient that conjugate gradients had until then.
      solver: `ForwardBackward`. correct, estimate, error_steps, error_rtol: as in `jbilevel.implicit.Oracle`, with the
        Newton step on the support; its estimate knows nothing of a support that is still wrong at ``tol``, except that
        it is inf where the step does not lower the forward-backward residual.
      loss_smoothness, in_axes, on_failure, chunk, max_steps, max_products: as in `jbilevel.implicit.Oracle`.

    ``hg.bound`` is never proven here; ``value_bound`` is, with strong_convexity and loss_smoothness.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> lasso = jb.WeightedL1Problem(
    ...     lambda p, x, d: 0.5 * jnp.sum((x - d["y"]) ** 2), lambda p, d: jnp.zeros_like(d["y"]), strong_convexity=1.0)
    >>> oracle = jb.nonsmooth.Oracle(lasso, jb.losses.squared_error(), estimate=False)
    >>> hg = oracle(jnp.array(0.0), {"y": jnp.array([[3.0, 0.5]]), "x": jnp.array([[1.0, 0.0]])}, tol=1e-4)
    >>> round(float(hg.value), 3), round(float(hg.grad), 3)  # of (3 - exp(p) - 1)^2/2, the other entry stays 0
    (0.5, -1.0)
    """

    solver: ForwardBackward = ForwardBackward()
    biactive: str = "self-consistent"
    biactive_tol: float = 1e-8
    damping: float = 0.0
    max_products: int = 2000

    def __post_init__(self):
        super().__post_init__()
        _require(self.problem, self.solver, "jb.nonsmooth.Oracle")
        Policy(self.biactive, self.biactive_tol, self.damping)  # says what is wrong

    def sizes(self, params, data) -> Scales:
        # no error can be told before the support is right
        found = super().sizes(params, data)
        return found._replace(solution=SUPPORT * found.solution)

    @property
    def lower(self) -> SupportLower:
        policy = Policy(self.biactive, self.biactive_tol, self.damping)
        return SupportLower(self.problem, self.solver, self.max_steps, policy, self.max_products)


def argmin(
    problem: Problem,
    *,
    solver: ForwardBackward | None = None,
    on_failure: str = "raise",
    with_info: bool = False,
    biactive: str = "none",
    biactive_tol: float = 1e-8,
    damping: float = 0.0,
    max_steps: int = 5000,
    max_products: int = 2000,
) -> Callable:
    """The minimiser as a differentiable function ``(params, data, x0=None, *, rtol, tol, adjoint_tol) -> x_hat``.

    x_hat(params, data) = argmin_x F(params, x, data) + sum_i weights(params)_i |x_i|, differentiable wherever no
    unknown is biactive. Reverse mode (once: no second derivatives, no forward mode) solves a system on the support;
    gradients flow to params and to the inexact leaves of data, not to x0 or the tolerances.

    Args:
      problem: `WeightedL1Problem`. solver: `ForwardBackward`.
      on_failure: what a failed solve does, forward or backward: "raise" (`ConvergenceError` outside jit; under jit,
        where nothing can be raised, NaN), "nan", or "ignore".
      with_info: return ``(x, info)`` with the `SolveInfo` of the forward solve, so that a caller under jit sees its
        status (`jbilevel.check` it outside).
      biactive, biactive_tol, damping: as in `Oracle`; "none" makes the backward pass linear in its cotangent.
      max_steps, max_products: limits of the two solves.

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> lasso = jb.WeightedL1Problem(
    ...     lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2), lambda p, d: jnp.zeros_like(d), strong_convexity=1.0)
    >>> x_hat = jb.nonsmooth.argmin(lasso)
    >>> gradient = jax.grad(lambda p: jnp.sum(x_hat(p, jnp.array([3.0, 0.5]), tol=1e-6)))(0.0)  # of 3 - exp(p)
    >>> bool(jnp.isclose(gradient, -1.0))
    True
    """
    solver = ForwardBackward() if solver is None else solver
    _require(problem, solver, "jb.nonsmooth.argmin")
    lower = SupportLower(problem, solver, max_steps, Policy(biactive, biactive_tol, damping), max_products)
    return SolutionMap(Spec(lower, on_failure), with_info)


def __dir__():
    return __all__
