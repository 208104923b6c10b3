"""What descent methods share: automatic first tolerances and step lengths, projections and projected steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jbilevel._core import trees
from jbilevel._core.validate import arrays
from jbilevel._oracle.base import Scales
from jbilevel.solvers import require_tolerance

ROUNDING = 64.0  # of a value, in units of its last digit


class Tolerances(NamedTuple):
    tol: Any
    adjoint_tol: Any


def first_tolerances(oracle, params, batch, relative, tol=None, adjoint_tol=None) -> Tolerances:
    """As asked for, or ``relative`` times the scales at the cold start; 0 on an exact oracle, which has none."""
    for name, asked in (("tol", tol), ("adjoint_tol", adjoint_tol)):
        if asked is not None:
            require_tolerance(asked, name, params)
    if tol is not None and adjoint_tol is not None:
        return Tolerances(jnp.asarray(tol, float), jnp.asarray(adjoint_tol, float))
    nothing = jnp.zeros((), float)
    measured = Scales(nothing, nothing) if oracle.exact else oracle.scales(params, batch)
    # a start that already solves the problem has scale 0, which no solve could meet
    least = 0.0 if oracle.exact else relative

    def choose(asked, scale):
        return jnp.asarray(asked, float) if asked is not None else jnp.where(scale > 0, relative * scale, least)

    return Tolerances(choose(tol, measured.solution), choose(adjoint_tol, measured.adjoint))


def first_step(params, grad, relative=0.1):
    """Step length whose first step moves params by ``relative`` of their norm (by ``relative`` when they are zero)."""
    size, grad_norm = trees.norm(params), trees.norm(grad)
    return relative * jnp.where(size > 0, size, 1.0) / jnp.where(grad_norm > 0, grad_norm, 1.0)


def project(projection, params):
    """P(params), with strong types: a Python number would make the first steps compile again."""
    params = arrays(params, "params")
    params = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.result_type(leaf)), params)
    return params if projection is None else trees.cast_like(projection(params), params)


class Moved(NamedTuple):
    params: Any
    optimizer: Any  # optax state
    step: Any  # length of the update


def optax_step(optimizer, projection, params, memory, hg) -> Moved:
    """P(params + update) of an optimiser of optax, which sees gradient, params and, where it reads it, the value."""
    update = optax.with_extra_args_support(optimizer).update
    updates, memory = update(hg.grad, memory, params, value=hg.value)
    return Moved(project(projection, optax.apply_updates(params, updates)), memory, optax.tree.norm(updates))


def projected_step(projection, params, grad, step):
    """(P(params - step grad), squared length of the move)."""
    moved = project(projection, trees.add_scaled(params, -step, grad))
    return moved, trees.squared_norm(trees.sub(moved, params))


def reduced(projection, params, grad, step):
    """(params - P(params - step grad))/step: the gradient where nothing is projected, else what of it can move params.

    A part of the gradient that the projection takes away predicts no decrease, and may be far larger than the rest.
    """
    if projection is None:
        return grad
    moved, _ = projected_step(projection, params, grad, step)
    return trees.scale(1 / jnp.where(step > 0, step, 1.0), trees.sub(params, moved))


def no_hypergradient(oracle, params, batch, warm):
    """What a loop that computes hypergradients begins with: zeros in the form of one, and the warm start."""
    shapes = jax.eval_shape(lambda: oracle(params, batch, warm, tol=1.0, adjoint_tol=1.0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)._replace(warm=warm)


def rounding(value):
    """What a value may be off by in its dtype."""
    return ROUNDING * jnp.finfo(jnp.result_type(value, float)).eps * jnp.abs(value)


def stationary(value, squared_norm, step, error=0.0):
    """Whether a gradient of this squared norm is small: exactly zero, or a step of the length that worked last
    would lower the value by no more than its rounding and ``error``. Step 0: none ever worked, so nothing is known.
    """
    noise = rounding(value) + error
    return (squared_norm == 0) | ((step > 0) & (step * squared_norm <= noise))


def barzilai_borwein(params, grad, previous_params, previous_grad, fallback):
    """<s, y>/<y, y>, the shorter of the two steps of Barzilai & Borwein (1988): in a monotone search the longer one,
    <s, s>/<s, y>, wastes many trials. ``fallback`` where the curvature along s is not positive.
    """
    s, y = trees.sub(params, previous_params), trees.sub(grad, previous_grad)
    curvature = trees.dot(s, y)
    return jnp.where(curvature > 0, curvature / jnp.where(curvature > 0, trees.squared_norm(y), 1.0), fallback)
