"""Solutions of lower levels as differentiable functions of params and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._core import trees
from jbilevel._core.recompilation import note_compilation
from jbilevel._core.results import guard, say_if_unsolved
from jbilevel._core.settings import own_settings
from jbilevel._core.validate import arrays
from jbilevel._oracle.share import Share, solved
from jbilevel._oracle.systems import Lower
from jbilevel.solvers import require_rtol, require_tolerance
from jbilevel.solvers.loop import RELATIVE, default_tolerance, full_float32, start_jitted

DIGITS = 1e-3
LOWER, ADJOINT = "the lower-level solve", "the adjoint solve"


@dataclass(frozen=True)
class Spec:
    """Static part of a differentiable solution."""

    lower: Lower
    on_failure: str

    def __post_init__(self):
        if self.on_failure not in ("raise", "nan", "ignore"):
            raise ValueError(f"`on_failure` must be 'raise', 'nan' or 'ignore', got {self.on_failure!r}.")

    def view(self, params, data):
        return self.lower.problem.view(params, data)


@dataclass(frozen=True)
class SolutionMap:
    """``(params, data, x0=None, *, rtol, tol, adjoint_tol) -> x``: a differentiable solve, its checks and its start."""

    spec: Spec
    with_info: bool

    @own_settings
    def __call__(self, params, data, x0=None, *, rtol=None, tol=None, adjoint_tol=None):
        if rtol is not None and (tol is not None or adjoint_tol is not None):
            raise ValueError("`rtol` of a solution stands in place of `tol` and `adjoint_tol`; leave those out.")
        problem = self.spec.lower.problem
        params, data, x0 = arrays(params, "params"), arrays(data, "data"), arrays(x0, "x0")
        problem.check(params)
        problem.validate(params, data, x0)
        start = start_jitted(problem, params, data)
        cold = x0 is None
        x0 = start if cold else trees.where(trees.all_finite(x0), trees.cast_like(x0, start), start)
        if rtol is not None:
            asked = Share(require_rtol(rtol, x0))
        elif tol is None:
            asked = default_tolerance(problem, self.spec.lower.solver, *jax.lax.stop_gradient((params, data)))
        else:
            asked = require_tolerance(tol, "tol", x0)
        bound = _bound(rtol, tol, adjoint_tol, x0)
        try:
            x, info = self.solve(params, data, jax.lax.stop_gradient(x0), asked, bound)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "a solution has no forward-mode derivative, but reverse mode: use jax.grad, jax.jacrev or jax.vjp; "
                "jax.jvp of a gradient, and jax.hessian by jax.jacfwd(jax.grad(...)), work for jb.implicit.argmin."
            ) from error
        if cold:
            say_if_unsolved("tol", tol, info)
        return (x, jax.lax.stop_gradient(info)) if self.with_info else x

    def solve(self, params, data, x0, tol, bound: Bound) -> Any:
        """(x, info), differentiable in params and data; here once, in reverse mode."""
        return once(self.spec, params, data, x0, tol, bound)


class Bound(NamedTuple):
    """What is asked of the residual of an adjoint system with right-hand side b: min(absolute, relative ||b||)."""

    absolute: Any
    relative: Any

    def of(self, b):
        return jnp.minimum(self.absolute, self.relative * trees.norm(b))


def _bound(rtol, tol, adjoint_tol, x0) -> Bound:
    """As `rtol` or `adjoint_tol` says; else ``tol``, but three digits in any unit; else relative."""
    dtype = trees.dtype(x0)
    if rtol is not None:
        return Bound(jnp.asarray(jnp.inf, dtype), jnp.asarray(rtol, dtype))
    if adjoint_tol is not None:
        return Bound(require_tolerance(adjoint_tol, "adjoint_tol", x0), jnp.asarray(jnp.finfo(dtype).max, dtype))
    if tol is not None:
        return Bound(jnp.asarray(tol, dtype), jnp.asarray(DIGITS, dtype))
    return Bound(jnp.asarray(jnp.inf, dtype), jnp.asarray(RELATIVE, dtype))


@partial(jax.jit, static_argnums=0)
@full_float32
def _solve(spec: Spec, params, data, x0, tol):
    note_compilation(spec)
    if isinstance(tol, Share):
        found = solved(spec.lower, spec.view(params, data), x0, tol)
        return found.x, found.kept, found.info
    system, info = spec.lower.solve(spec.view(params, data), x0, tol)
    return system.x, system.kept(), info


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def once(spec: Spec, params, data, x0, tol, bound: Bound):
    """(x, info), differentiable once, in reverse mode, by the adjoint of the lower level's system."""
    return _forward(spec, params, data, x0, tol, bound)[0]


def _forward(spec: Spec, params, data, x0, tol, bound):
    x, kept, info = _solve(spec, params, data, x0, tol)
    x = guard(x, info, spec.on_failure, LOWER)
    return (x, info), (params, data, x, kept, bound)


@own_settings
def _backward(spec: Spec, residuals, cotangents):
    params, data, *rest = residuals
    gradients, info = _pull_back(spec, params, data, *rest, cotangents[0])
    say_if_unsolved("adjoint_tol", rest[-1].absolute, info)
    gradients = guard(gradients, info, spec.on_failure, ADJOINT)
    return *as_cotangents(gradients, params, data), None, None, None


@partial(jax.jit, static_argnums=0)
@full_float32
def _pull_back(spec: Spec, params, data, x, kept, bound: Bound, cotangent):
    """Gradient of <cotangent, x> in each leaf of (params, data), None for integer leaves."""
    system = spec.lower.restore(spec.view(params, data), x, kept)
    adjoint = system.adjoint(cotangent, trees.zeros_like(x), bound.of(cotangent))
    point = system.at_adjoint(adjoint).point(adjoint)
    return leaf_gradients(lambda *at: -spec.lower.pairing(spec.view(*at), *point), params, data), adjoint.info


once.defvjp(_forward, _backward)


def leaf_gradients(function: Callable, params, data) -> list:
    """Gradient of ``function(params, data)`` in each leaf of both, None for integer leaves."""
    leaves, treedef = jax.tree.flatten((params, data))

    def of(inexact):
        mixed = [leaf if i is None else i for i, leaf in zip(inexact, leaves, strict=True)]
        return function(*jax.tree.unflatten(treedef, mixed))

    return jax.grad(of)([leaf if trees.is_inexact(leaf) else None for leaf in leaves])


def constant(leaf):
    """The tangent of what is not differentiated."""
    return jnp.zeros_like(leaf) if trees.is_inexact(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def as_cotangents(gradients: list, params, data):
    """(params, data) with what `leaf_gradients` returned, and JAX's empty cotangents for integer leaves."""
    leaves, treedef = jax.tree.flatten((params, data))
    filled = [constant(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]
    return jax.tree.unflatten(treedef, filled)
