"""Hypergradients and differentiable minimisers of weighted l1 problems: implicit differentiation on the support.

Off its kinks x_hat moves smoothly on the set S of unknowns that the forward-backward map lets through, and the rest
stays zero. So with H = Hessian of F (plus that of group norms), H_SS q_S = (grad_x loss)_S and q = 0 elsewhere,

    d loss(x_hat) = d_params loss - d_params [<grad_x F, q> + sum_i weights_i sign(x_i) q_i]

(paper 4, Algorithm 1; the step of its Xi cancels, and its Upsilon is singular unless restricted to S). At a kink some
unknowns are biactive, |grad F_i| = weight_i with x_i = 0, and x_hat has several one-sided derivatives: a policy chooses
which of them count as moving. Each choice is a limit of the derivative formula on one side of the kink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel import implicit
from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status, Warm, acceptable, guard
from jbilevel._core.validate import trace_scalar
from jbilevel._oracle import correction
from jbilevel._oracle.base import Points, Sample, require_view
from jbilevel._views.weighted_l1 import SupportView, WeightedL1View
from jbilevel.implicit import after_correction, as_cotangents, leaf_gradients, solution_map
from jbilevel.solvers import ForwardBackward, cg
from jbilevel.solvers.loop import full_float32, run

if TYPE_CHECKING:
    from jbilevel.problems.weighted_l1 import WeightedL1Problem

BIACTIVE = ("none", "all", "sign", "self-consistent")


def residual(problem: WeightedL1Problem, params, x, data, *, step):
    """The forward-backward residual (x - prox_{step G}(x - step grad F(x)))/step: zero at x_hat and nowhere else.

    ``step`` should be less than 1/L (paper 4, section 3, where it is gamma).
    """
    view = problem.view(params, data)
    moved = trees.add_scaled(x, -step, view.smooth.gradient(x))
    return trees.scale(1 / step, trees.sub(x, view.penalty.prox(moved, step)))


class _Adjoint(NamedTuple):
    piece: SupportView
    q: Any
    info: SolveInfo


def _solve_adjoint(view: WeightedL1View, x, linearized, slope, q, step, options: _Options, adjoint_tol) -> _Adjoint:
    """The adjoint at x for the cotangent ``slope``, and the piece that the policy chose.

    linearized: (value, gradient, product) of F at x. step: of the forward-backward map that tells the indices.
    """
    _, gradient, hessian = linearized
    sets = view.index_sets(x, gradient, step, options.biactive_tol)

    def along(v, extra):
        """Its part along the direction in which each biactive unknown would leave zero, where ``extra``."""
        inner = jax.tree.map(jnp.multiply, sets.direction, v)
        if view.penalty.axis is not None:
            inner = jax.tree.map(lambda leaf: jnp.sum(leaf, view.penalty.axis, keepdims=True), inner)
        return jax.tree.map(lambda e, leaf: jnp.where(e, leaf, 0.0), extra, inner)

    def solve(extra, q):
        piece = SupportView(view, sets.active, extra, sets.direction)
        plain = piece.product(x, hessian)

        def system(d):
            mapped = trees.add_scaled(plain(d), options.damping, piece.project(d))
            # curvature that is rounding counts as none, so that dependent columns end CG before it divides by it
            return trees.where(trees.dot(d, mapped) > flat * trees.squared_norm(d), mapped, trees.zeros_like(mapped))

        q, info = cg(system, piece.project(slope), piece.project(q), tol=adjoint_tol, max_steps=options.max_products)
        singular = info.status == Status.INDEFINITE
        status = jnp.where(singular, Status.STAGNATED, info.status).astype(jnp.int32)
        return piece.project(q), info._replace(status=status)

    flat = 64 * trees.eps(x) / step
    none = jax.tree.map(jnp.zeros_like, sets.biactive)
    extra = {
        "none": lambda: none,
        "all": lambda: sets.biactive,
        "self-consistent": lambda: sets.biactive,
        # off zero in the direction that lowers the loss
        "sign": lambda: jax.tree.map(lambda part: part < 0, along(slope, sets.biactive)),
    }[options.biactive]()
    q, info = solve(extra, q)
    if options.biactive == "self-consistent":
        # those that the adjoint does not want off zero leave, until all agree
        disagree = lambda extra, q: jax.tree.map(lambda part: part > 0, along(q, extra))  # noqa: E731
        some = lambda extra, q: jnp.any(  # noqa: E731
            jnp.stack([jnp.any(leaf) for leaf in jax.tree.leaves(disagree(extra, q))])
        )

        def drop(carry):
            extra, q, info = carry
            extra = jax.tree.map(lambda e, off: e & ~off, extra, disagree(extra, q))
            q, again = solve(extra, q)
            evaluations = info.evaluations.join(again.evaluations)
            return extra, q, again._replace(steps=info.steps + again.steps, evaluations=evaluations)

        extra, q, info = jax.lax.while_loop(lambda carry: some(*carry[:2]), drop, (extra, q, info))
    return _Adjoint(SupportView(view, sets.active, extra, sets.direction), q, info)


def _pairing(view: WeightedL1View, x, q, direction):
    """<grad F(x) + weights direction, q>: of the parameters behind ``view``, all else held fixed."""
    weighted = jax.tree.map(lambda w, u, part: jnp.sum(w * u * part), view.penalty.weights, direction, q)
    return view.smooth.slope(x, q) + sum(jax.tree.leaves(weighted))


def _directions(piece: SupportView, x):
    """sign(x), and where x is zero the sign it would take."""
    kept = piece.project(x)
    moving = piece.view.penalty.direction(kept)
    return jax.tree.map(lambda u, fixed, s: jnp.where(s > 0, u, fixed), moving, piece.direction,
                        piece.view.penalty.sizes(kept))  # fmt: skip


@dataclass(frozen=True)
class _Options:
    """What chooses and solves the adjoint system."""

    biactive: str
    biactive_tol: float
    damping: float
    max_products: int

    def __post_init__(self):
        if self.biactive not in BIACTIVE:
            raise ValueError(f"`biactive` must be one of {BIACTIVE}, got {self.biactive!r}.")
        if not 0 <= self.biactive_tol < 1:
            raise ValueError(f"`biactive_tol` must be at least 0 and below 1, got {self.biactive_tol}.")
        if not self.damping >= 0:
            raise ValueError(f"`damping` must be nonnegative, got {self.damping}.")


def _require_sparse(problem, solver, name: str) -> None:
    require_view(problem, WeightedL1View, name, "jb.WeightedL1Problem", "smooth problems go to jb.implicit")
    if not isinstance(solver, ForwardBackward):
        raise TypeError(f"`solver` of {name} must be a ForwardBackward, got {type(solver).__name__}.")


@dataclass(frozen=True)
class Oracle(implicit.Oracle):
    """Hypergradient oracle of a weighted l1 lower level, by implicit differentiation on the support (paper 4).

    Args:
      problem: `WeightedL1Problem`. loss: ``loss(params, x, data) -> scalar`` for one sample.
      biactive: what counts as moving among unknowns at a kink, |grad F_i| = weight_i with x_i = 0: "none", "all";
        "sign": those that leaving zero would lower the loss for if they moved alone; "self-consistent": all, then
        without those whose adjoint says that leaving zero raises the loss, until none is left to drop.
      biactive_tol: with v = x - step grad F and u = step weight, an unknown is biactive if
        ``||v| - u| <= biactive_tol max(|v|, u)``, which depends on no scale.
      damping: added to the diagonal of the support system. Without it a support with dependent columns, where x_hat
        may have no derivative, ends as STAGNATED, with the hypergradient that conjugate gradients had until then.
      solver: `ForwardBackward`. correct, estimate, error_steps: as in `jbilevel.implicit.Oracle`, with the Newton step
        on the support; its estimate knows nothing of a support that is still wrong at ``tol``, except that it is inf
        where the step does not lower the forward-backward residual.
      loss_smoothness, in_axes, on_failure, chunk, max_steps, max_products: as in `jbilevel.implicit.Oracle`.

    ``hg.bound`` is never proven here; ``value_bound`` is, with strong_convexity and loss_smoothness.
    """

    solver: Any = ForwardBackward()
    biactive: str = "self-consistent"
    biactive_tol: float = 1e-8
    damping: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _require_sparse(self.problem, self.solver, "jb.nonsmooth.Oracle")
        if self.adjoint_solver != "cg":
            raise ValueError("`adjoint_solver` of jb.nonsmooth.Oracle must be 'cg': a convex F has no other Hessian.")
        self._options()

    def _options(self) -> _Options:
        return _Options(self.biactive, self.biactive_tol, self.damping, self.max_products)

    def _lower(self, params, data, warm: Warm, tol):
        self.problem.validate(params, data, warm.x)
        trace_scalar(self.loss, "loss", params, warm.x, data)
        view = self.problem.view(params, data)
        return view, run(self.solver, view, warm.x, tol, self.max_steps)

    def _value(self, params, data, warm: Warm, tol) -> Sample:
        view, solution = self._lower(params, data, warm, tol)
        x, step = solution.x, 1 / solution.state.smoothness
        value, slope = jax.value_and_grad(self.loss, 1)(params, x, data)
        linearized = view.smooth.linearize(x)
        sets = view.index_sets(x, linearized[1], step, 0.0)
        piece = SupportView(view, sets.active, jax.tree.map(jnp.zeros_like, sets.active), sets.direction)
        energy, gradient, product = piece.assemble(x, *linearized)
        q = piece.project(warm.adjoint)
        defect = trees.norm(trees.sub(product(q), piece.project(slope)))
        likely, spent = correction.distance(view.constants, product, gradient, solution.info.error, True)
        lower = solution.info._replace(evaluations=solution.info.evaluations.plus(gradients=1, products=1 + spent))
        pair = correction.Pair(x, q, energy, gradient, trees.norm(gradient), defect)
        sample = self._report(view, value, slope, pair, likely, lower, lower, jnp.inf, jnp.zeros_like(defect))
        return sample._replace(warm=Warm(x, warm.adjoint))

    def _sample(self, params, data, warm: Warm, tol, adjoint_tol):
        view, solution = self._lower(params, data, warm, tol)
        x, step = solution.x, 1 / solution.state.smoothness
        loss = lambda x: self.loss(params, x, data)  # noqa: E731
        slope = jax.grad(loss)(x)
        linearized = view.smooth.linearize(x)
        piece, q, adjoint = _solve_adjoint(
            view, x, linearized, slope, warm.adjoint, step, self._options(), adjoint_tol
        )  # fmt: skip
        energy, gradient, product = piece.assemble(x, *linearized)
        pair = correction.Pair(x, q, energy, gradient, trees.norm(gradient), adjoint.residual)
        lower = solution.info._replace(evaluations=solution.info.evaluations.plus(gradients=1))
        points, left = Points(_point(piece, x, q)), jnp.zeros_like(adjoint.residual)
        if self.corrects:
            restricted = lambda z: piece.project(jax.grad(loss)(piece.project(z)))  # noqa: E731
            newton = correction.newton_step(piece, restricted, pair, product, self.error_steps)
            moved = newton.pair._replace(x=piece.project(newton.pair.x), q=piece.project(newton.pair.q))
            # the step stays on one piece: where another begins it proves nothing
            after = _proven_residual(view, moved.x, step)
            crossed = ~(after <= jnp.maximum(solution.info.residual, trees.eps(x) * trees.norm(x) / step * 64))
            left = jnp.where(crossed | ~acceptable(adjoint.status), jnp.inf, newton.left)
            halfway = _point(piece, *(piece.project(part) for part in newton.halfway))
            points = Points(points.plain, halfway if self.correct else None, _point(piece, moved.x, moved.q))
            work = adjoint.evaluations.join(newton.evaluations).plus(gradients=1)
            adjoint = adjoint._replace(evaluations=work)
        if self.correct:
            pair = moved
            lower = after_correction(lower, after, tol * view.tolerance_scale)
            lower = lower._replace(error=view.error_bound(lower.residual))
            adjoint = after_correction(adjoint, pair.defect, adjoint_tol)
        likely, spent = correction.distance(view.constants, product, pair.gradient, lower.error, True)
        lower = lower._replace(evaluations=lower.evaluations.plus(products=spent))
        adjoint = adjoint._replace(error=view.error_bound(adjoint.residual))
        value, slope = jax.value_and_grad(loss)(pair.x)
        unknown = jnp.full_like(left, jnp.inf)
        return self._report(view, value, slope, pair, likely, lower, adjoint, unknown, left), points

    def _surrogate(self, params, data, point):
        x, q, direction = jax.lax.stop_gradient(point)
        return self.loss(params, x, data) - _pairing(self.problem.view(params, data), x, q, direction)


def _point(piece: SupportView, x, q):
    """Where the pull-back takes place: x, q, and the signs of x."""
    return x, q, _directions(piece, x)


def _proven_residual(view: WeightedL1View, x, step):
    """mu times a bound on ||x - x_hat|| (without mu the forward-backward residual), for any x.

    The residual bounds the distance of x+ = prox(x - step grad F(x)); x is step times its norm away from there.
    """
    moved = trees.add_scaled(x, -step, view.smooth.gradient(x))
    size = trees.norm(trees.sub(x, view.penalty.prox(moved, step))) / step
    mu = view.constants.strong_convexity
    return view.measure(size, 1 / step) + (0.0 if mu is None else mu * step * size)


@dataclass(frozen=True)
class _Spec:
    """Static part of a differentiable minimiser."""

    problem: WeightedL1Problem
    solver: ForwardBackward
    options: _Options
    on_failure: str
    max_steps: int


def argmin(
    problem: WeightedL1Problem,
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
    """The minimiser as a differentiable function ``(params, data, x0=None, *, tol, adjoint_tol) -> x_hat``.

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
    _require_sparse(problem, solver, "jb.nonsmooth.argmin")
    options = _Options(biactive, biactive_tol, damping, max_products)
    return solution_map(_argmin, _Spec(problem, solver, options, on_failure, max_steps), with_info)


@partial(jax.jit, static_argnums=0)
@full_float32
def _forward_solve(spec: _Spec, params, data, x0, tol):
    solution = run(spec.solver, spec.problem.view(params, data), x0, tol, spec.max_steps)
    return solution.x, 1 / solution.state.smoothness, solution.info


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _argmin(spec: _Spec, params, data, x0, tol, adjoint_tol):
    return _argmin_forward(spec, params, data, x0, tol, adjoint_tol)[0]


def _argmin_forward(spec: _Spec, params, data, x0, tol, adjoint_tol):
    x, step, info = _forward_solve(spec, params, data, x0, tol)
    x = guard(x, info, spec.on_failure, "the lower-level solve")
    return (x, info), (params, data, x, step, adjoint_tol)


def _argmin_backward(spec: _Spec, kept, cotangents):
    params, data, x, step, adjoint_tol = kept
    gradients, info = _pull_back(spec, params, data, x, step, cotangents[0], adjoint_tol)
    gradients = guard(gradients, info, spec.on_failure, "the adjoint solve")
    return *as_cotangents(gradients, params, data), None, None, None


@partial(jax.jit, static_argnums=0)
@full_float32
def _pull_back(spec: _Spec, params, data, x, step, cotangent, adjoint_tol):
    """Gradient of <cotangent, x_hat> in each leaf of (params, data), None for integer leaves."""
    view = spec.problem.view(params, data)
    linearized, start = view.smooth.linearize(x), trees.zeros_like(x)
    piece, q, info = _solve_adjoint(view, x, linearized, cotangent, start, step, spec.options, adjoint_tol)
    direction = _directions(piece, x)
    gradients = leaf_gradients(lambda *at: -_pairing(spec.problem.view(*at), x, q, direction), params, data)
    return gradients, info


_argmin.defvjp(_argmin_forward, _argmin_backward)
