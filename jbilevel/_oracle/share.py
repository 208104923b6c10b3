"""Solutions by their relative error: solves go on, warm, until the distance that the system tells is small enough."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status
from jbilevel._oracle.systems import Lower

AIM = 0.5  # of the distance that is asked for
LEAST, MOST = 1e-4, 0.3  # factor on the tolerance in one round
UNKNOWN = 0.03  # that where no distance could be told
ROUNDS = 20


class Share(NamedTuple):
    """``||x - x_hat|| <= relative ||x||`` in place of an absolute tolerance."""

    relative: Any


class Attempt(NamedTuple):
    x: Any
    kept: Any  # what `Lower.restore` needs
    info: SolveInfo
    tol: Any  # of the next attempt
    met: Any
    rounds: Any

    @property
    def ended(self):
        return self.met | (self.info.status > Status.CONVERGED) | (self.rounds >= ROUNDS)


def solved(lower: Lower, view, x0, asked: Share) -> Attempt:
    """Proven where the distance is (`View.error_bound`), else by its estimate (`System.distance`)."""
    rtol = asked.relative
    size = lower.solver.first_residual(view, x0) / view.tolerance_scale

    def attempt(last: Attempt) -> Attempt:
        system, info = lower.solve(view, last.x, last.tol)
        distances, products = system.distance(info.error, False)
        away, reach = jnp.sqrt(sum(distance**2 for distance in distances)), rtol * trees.norm(system.x)
        factor = jnp.clip(AIM * reach / jnp.where(away > 0, away, 1.0), LEAST, MOST)
        attained = jnp.where(jnp.isfinite(info.error), info.error, info.residual)
        tol = jnp.where(jnp.isfinite(away), factor, UNKNOWN) * jnp.minimum(last.tol, attained)
        work = last.info.evaluations.join(info.evaluations).plus(products=products)
        return Attempt(
            x=system.x,
            kept=system.kept(),
            info=info._replace(steps=last.info.steps + info.steps, evaluations=work),
            tol=tol.astype(last.tol.dtype),
            met=away <= reach,
            rounds=last.rounds + 1,
        )

    def empty() -> Attempt:
        tol = jnp.asarray(rtol * size, rtol.dtype)
        system, info = lower.solve(view, x0, tol)
        return Attempt(x0, system.kept(), info, tol, jnp.asarray(False), jnp.zeros((), jnp.int32))

    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(empty))
    start = start._replace(x=x0, tol=jnp.asarray(rtol * size, rtol.dtype))
    last = jax.lax.while_loop(lambda state: ~state.ended, attempt, start)
    status = jnp.where(last.met, last.info.status, jnp.maximum(last.info.status, Status.PRECISION))
    return last._replace(info=last.info._replace(status=status.astype(jnp.int32)))
