"""Nonmonotone accelerated gradient method for energies that need not be convex."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Work
from jbilevel.solvers.agd import first_iterate
from jbilevel.solvers.base import Solver
from jbilevel.solvers.loop import secant


class APGState(NamedTuple):
    x: Any
    gradient: Any
    residual: Any
    curvature: Any
    evaluations: Work
    value: Any
    previous: Any  # x of the step before
    z: Any  # last accelerated point
    t: Any
    t_previous: Any
    reference: Any  # c_k, weighted mean of the values so far
    weight: Any  # q_k
    step: Any  # step length to start the next search from


class _Trial(NamedTuple):
    point: Any
    value: Any
    gradient: Any
    step: Any
    trials: Any
    accepted: Any


@dataclass(frozen=True, kw_only=True)
class NonmonotoneAPG(Solver):
    """Nonmonotone accelerated gradient method (nmAPG of Li & Lin 2015, supplement, Algorithm 4, without a prox).

    With c_k a weighted mean of the values so far (Zhang & Hager 2004), one step is

        y = x_k + t_(k-1)/t_k (z_k - x_k) + (t_(k-1) - 1)/t_k (x_k - x_(k-1)),    z = y - a grad(y),
        x_(k+1) = z if energy(z) <= c_k - delta a ||grad(y)||^2, else the lower one of z and v = x_k - a grad(x_k),

    where a starts from the Barzilai-Borwein length and shrinks by rho until z decreases energy(y) or c_k, and v
    decreases c_k, by delta a ||gradient||^2. So energy(x_k) <= c_k <= energy(x0) whatever the sign of the curvature,
    and limit points are critical (their theorem 4). Two things differ from the paper: the decrease is measured in
    units of 1/a, which frees delta from the energy's scale, and t falls back to 1 when <grad(y), x_(k+1) - x_k> > 0
    (gradient restart, O'Donoghue & Candes 2015), which saves most of the work near a minimum and leaves the decrease
    of c_k as it is. Two gradients per step, one more for each refused trial. For weakly convex energies; where mu and
    L are known `AGD` is faster.

    Args:
      eta: memory of c_k in [0, 1); 0 is monotone.
      delta: sufficient decrease. rho: shrinking factor. trials: limit of trials of one search.
      restart: False for the paper's momentum.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SmoothProblem(
    ...     lambda p, x, d: 0.5 * (x - d) ** 2 + 0.5 * p * x**2, lambda p, d: 0.0 * d,
    ...     strong_convexity=1.0, smoothness=2.0)
    >>> x, info = jb.solve(ridge, 1.0, 2.0, tol=1e-4, solver=NonmonotoneAPG())
    >>> bool(abs(x - 1.0) < 1e-3), jb.Status(int(info.status)).name
    (True, 'CONVERGED')
    """

    eta: float = 0.8
    delta: float = 1e-4
    rho: float = 0.5
    trials: int = 50
    restart: bool = True

    patience = 500

    def init(self, view, x0, target) -> APGState:
        first = first_iterate(view, x0)
        one = jnp.ones_like(first.residual)
        return APGState(
            **first._asdict(),
            previous=x0,
            z=x0,
            t=one,
            t_previous=jnp.zeros_like(one),
            reference=first.value,
            weight=one,
            step=1 / first.curvature,
        )

    def step(self, view, state: APGState, target) -> APGState:
        toward_z, momentum = state.t_previous / state.t, (state.t_previous - 1) / state.t
        y = trees.add_scaled(state.x, toward_z, trees.sub(state.z, state.x))
        y = trees.add_scaled(y, momentum, trees.sub(state.x, state.previous))
        value, gradient = view.value_and_gradient(y)
        rounding = 10 * trees.eps(y) * jnp.abs(state.reference)
        reference = state.reference + rounding
        z = self._search(view, y, gradient, state.step, jnp.maximum(value, reference), True)
        sufficient = z.value <= reference - self.delta * z.step * trees.squared_norm(gradient)
        v = self._search(view, state.x, state.gradient, state.step, reference, ~sufficient)
        # neither decreases: x stays, and the next search starts from shorter steps
        unchanged = _Trial(
            point=state.x, value=state.value, gradient=state.gradient, step=v.step, trials=v.trials, accepted=True
        )
        better = trees.where(v.accepted, v, unchanged)
        new = trees.where(sufficient | (z.accepted & (z.value <= better.value)), z, better)

        weight = self.eta * state.weight + 1
        mean = (self.eta * state.weight * state.reference + new.value) / weight
        restart = self.restart & (trees.dot(gradient, trees.sub(new.point, state.x)) > 0)
        t = jnp.where(restart, 1.0, 0.5 * (1 + jnp.sqrt(1 + 4 * state.t**2)))
        t_previous = jnp.where(restart, 0.0, state.t)  # then the next y is the next x
        length = self._barzilai_borwein(y, gradient, new)
        curvature = secant(y, gradient, new.point, new.gradient)
        return APGState(
            x=new.point,
            gradient=new.gradient,
            residual=trees.norm(new.gradient),
            curvature=jnp.maximum(state.curvature, curvature),
            evaluations=state.evaluations.plus(gradients=1 + z.trials + v.trials),
            value=new.value,
            previous=trees.where(restart, new.point, state.x),
            z=z.point,
            t=t,
            t_previous=t_previous,
            reference=mean,
            weight=weight,
            step=length,
        )

    def _search(self, view, point, gradient, step, reference, wanted) -> _Trial:
        """Shrink the step until energy(point - step gradient) <= reference - delta step ||gradient||^2."""
        squared = trees.squared_norm(gradient)

        def attempt(trial: _Trial) -> _Trial:
            step = jnp.where(trial.trials > 0, self.rho * trial.step, trial.step)
            candidate = trees.add_scaled(point, -step, gradient)
            value, candidate_gradient = view.value_and_gradient(candidate)
            decreased = value <= reference - self.delta * step * squared
            accepted = decreased & jnp.isfinite(trees.squared_norm(candidate_gradient))
            return _Trial(
                point=candidate,
                value=value,
                gradient=candidate_gradient,
                step=step,
                trials=trial.trials + 1,
                accepted=accepted,
            )

        start = _Trial(
            point=point,
            value=jnp.full_like(reference, jnp.inf),
            gradient=gradient,
            step=step,
            trials=jnp.zeros((), jnp.int32),
            accepted=jnp.asarray(False),
        )
        return jax.lax.while_loop(lambda t: wanted & ~t.accepted & (t.trials < self.trials), attempt, start)

    def _barzilai_borwein(self, y, gradient, new: _Trial):
        """<s, r>/<r, r> with s = x_(k+1) - y and r the change of gradient; where <s, r> <= 0 the last step, lengthened.

        The shorter one of Barzilai & Borwein's (1988) two lengths, which suits momentum better.
        """
        s, r = trees.sub(new.point, y), trees.sub(new.gradient, gradient)
        sr, rr = trees.dot(s, r), trees.squared_norm(r)
        informative = trees.norm(s) > 4 * trees.eps(y) * trees.norm(y)  # not only rounding
        positive = informative & (sr > 0)
        return jnp.where(positive, sr / jnp.where(positive, rr, 1.0), new.step / self.rho)

    def value(self, state):
        return state.value
