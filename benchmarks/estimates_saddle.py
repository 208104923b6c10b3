"""Hypergradients of saddle points next to exact ones, for the matrix of estimated errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import jbilevel as jb
from benchmarks import common
from benchmarks import saddle_problems as problems
from jbilevel._core import trees
from jbilevel.prox import divided, times

SIZE = 8  # pixels a side: references are dense
TOLERANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # relative to what there is to solve at the cold start
# singular values of the derivative of the normal map below this part of the largest count as 0
RANK = 1e-9
LIMITS = {"max_steps": 20000, "max_adjoint_steps": 20000}
PDHG_STEPS, ROUNDS, NEWTON_STEPS = 2000, 15, 12


class Exact(NamedTuple):
    """A hypergradient and a value by dense linear algebra, and how well they are determined."""

    gradient: np.ndarray
    value: float
    condition: float  # of the derivative of the normal map, on the complement of its null space
    residual: float  # of the normal map, relative
    seen: float  # part of the loss's gradient that lies in the null space: not differentiable where > 0


class Dense:
    """The saddle point as a zero of the normal map, with its derivative as a matrix: float64."""

    def __init__(self, problem, loss, params, data):
        self.problem, self.loss = problem, loss
        solver = jb.solvers.PDHG()

        def arguments(params, data, pair):
            """((p, r), steps) of one iteration from a pair."""
            view, (x, y) = problem.view(params, data), pair
            t, s = view.step_trees(*solver.steps(view, jnp.asarray(view.norm, trees.dtype(pair))))
            p = trees.sub(x, times(t, view.transpose(y)))
            after = view.prox_primal(p, t)
            ahead = trees.add_scaled(after, 1.0, trees.sub(after, x))
            return (p, trees.add(y, times(s, view.linear(ahead)))), (t, s)

        shapes = jax.eval_shape(arguments, params, data, problem.start(params, data))[0]
        self.unravel = ravel_pytree(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))[1]

        def of(params, data, steps, flat):
            """(normal map, (x, y))."""
            view, (t, s), (p, r) = problem.view(params, data), steps, self.unravel(flat)
            x, y = view.prox_primal(p, t), view.prox_dual(r, s)
            first = trees.add(divided(trees.sub(p, x), t), view.transpose(y))
            second = trees.sub(divided(trees.sub(r, y), s), view.linear(x))
            return ravel_pytree((first, second))[0], (x, y)

        def loss_at(params, data, steps, flat):
            return loss(params, of(params, data, steps, flat)[1], data)

        self.arguments = jax.jit(lambda *a: (ravel_pytree(arguments(*a)[0])[0], arguments(*a)[1]))
        self.at = jax.jit(of)
        self.jacobian = jax.jit(jax.jacrev(lambda *a: of(*a)[0], argnums=3))
        self.losses = jax.jit(jax.value_and_grad(loss_at, argnums=(0, 3)))
        self.pull = jax.jit(lambda w, *a: jax.vjp(lambda params: of(params, *a[1:])[0], a[0])[1](w)[0])
        self.closer = jax.jit(lambda params, data, pair: solver.iterate(problem.view(params, data), pair, PDHG_STEPS))

    def newton(self, params, data, steps, z):
        """Semismooth Newton steps by least squares, halved until the normal map shrinks."""
        value = np.asarray(self.at(params, data, steps, z)[0])
        for _ in range(NEWTON_STEPS):
            jacobian = np.asarray(self.jacobian(params, data, steps, z))
            move = np.linalg.lstsq(jacobian, -value, rcond=RANK)[0]
            for length in (1.0, 0.5, 0.25, 0.1):
                trial = z + length * move
                new = np.asarray(self.at(params, data, steps, trial)[0])
                if np.linalg.norm(new) < 0.9 * np.linalg.norm(value):
                    break
            else:
                return z, value
            z, value = trial, new
        return z, value

    def exact(self, params, data) -> Exact:
        pair = self.problem.start(params, data)
        for _ in range(ROUNDS):
            pair = self.closer(params, data, pair)
            z, steps = self.arguments(params, data, pair)
            z, value = self.newton(params, data, steps, z)
            if np.linalg.norm(value) <= 1e-12 * np.linalg.norm(z):
                break
        found, (direct, in_z) = self.losses(params, data, steps, z)
        u, s, vt = np.linalg.svd(np.asarray(self.jacobian(params, data, steps, z)))
        rank = int(np.sum(s > RANK * s[0]))
        w = u[:, :rank] @ ((vt[:rank] @ np.asarray(in_z)) / s[:rank])
        indirect = self.pull(w, params, data, steps, z)
        return Exact(
            gradient=np.asarray(ravel_pytree(direct)[0] - ravel_pytree(indirect)[0]),
            value=float(found),
            condition=s[0] / s[rank - 1],
            residual=np.linalg.norm(value) / np.linalg.norm(z),
            seen=float(np.linalg.norm(vt[rank:] @ in_z) / np.linalg.norm(in_z)),
        )


class Case(NamedTuple):
    """One hypergradient with its tolerances, and the exact one."""

    oracle: jb.piggyback.Oracle
    params: Any
    batch: Any
    tol: float
    adjoint_tol: float
    exact: np.ndarray  # the hypergradient, as one vector
    value: float
    condition: float


def _total_variation(size: int) -> problems.Setup:
    setup = problems.total_variation(size)
    return setup._replace(params=lambda seed: jnp.asarray(np.random.default_rng([7, seed]).uniform(-3.5, -1.5)))


KINDS = {"Huber-TV": problems.huber_tv, "TV, x >= 0": _total_variation, "learned TV": problems.learned_tv}


def cases(kind: str, dtype: str, count: int, seed: int = 0) -> Iterator[Case]:
    """At least ``count`` cases: images and parameters from ``seed`` on, each at all of `TOLERANCES`."""
    setup, dense = KINDS[kind](SIZE), None
    oracle = jb.piggyback.Oracle(setup.problem, problems.image_loss, **LIMITS)
    for number in range(seed, seed - (-count // len(TOLERANCES))):
        with common.precision("float64"):
            double = lambda leaf: jnp.asarray(np.asarray(leaf, dtype), "float64")  # noqa: E731
            params, data = jax.tree.map(double, (setup.params(number), setup.sample(number)))
            dense = dense or Dense(setup.problem, problems.image_loss, params, data)
            exact = dense.exact(params, data)
        with common.precision(dtype):
            params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
            batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype)[None], data)
            scales = oracle.scales(params, batch)
        # under the precision of ``dtype`` again: see `rows`
        for tol in TOLERANCES:
            yield Case(
                oracle=oracle,
                params=params,
                batch=batch,
                tol=tol * float(scales.solution),
                adjoint_tol=tol * float(scales.adjoint),
                exact=exact.gradient,
                value=exact.value,
                condition=exact.condition,
            )
