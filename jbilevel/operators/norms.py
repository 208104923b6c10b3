"""Spectral norms: Lanczos for any operator, a proven bound for those with nonnegative entries; and the dot test."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._core import trees
from jbilevel.operators import linear


def lanczos(A, tol: float, max_steps: int = 300, key=None) -> float:
    """sqrt(t + r) for the largest Ritz value t of A^H A and its residual r <= tol t (Golub & Kahan 1965)."""

    @jax.jit
    def expand(before, v, beta):
        w = A.H(A(v))
        alpha = _dot(v, w)
        w = jax.tree.map(lambda w, v, b: w - alpha * v - beta * b, w, v, before)
        return w, alpha, jnp.sqrt(_dot(w, w))

    with jax.ensure_compile_time_eval():  # a number also when a solver asks inside jit
        v = random_like(_domain(A), jax.random.key(0) if key is None else key)
        v = jax.tree.map(lambda u: u / jnp.sqrt(_dot(v, v)), v)
        before, beta, diagonal, side = trees.zeros_like(v), 0.0, [], []
        for _ in range(max_steps):
            w, alpha, next_beta = expand(before, v, beta)
            diagonal.append(float(alpha))
            values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(side, 1) + np.diag(side, -1))
            beta = float(next_beta)
            residual = abs(beta * vectors[-1, -1])
            if not np.isfinite(residual):
                raise ValueError("the operator maps a finite array to one that is not finite, so it has no norm.")
            if residual <= tol * values[-1]:
                break
            side.append(beta)
            before, v = v, jax.tree.map(lambda u, b=beta: u / b, w)
    return float(np.sqrt(max(values[-1], 0.0) + residual))


def nonnegative(A, tol: float, max_steps: int = 100) -> float:
    """A proven upper bound on ||A|| for an A with nonnegative entries, rounding apart.

    For every positive p, ||A||^2 <= max_i (A^T A p)_i / p_i (Collatz 1942, Wielandt 1950). p follows the power method
    from a constant until the bound is within ``tol`` of the Rayleigh quotient, which bounds ||A|| from below.
    """

    @jax.jit
    def advance(p):
        z = A.T(A(p))
        return jnp.max(z / p), jnp.sqrt(_dot(z, z) / _dot(p, p)), jnp.maximum(z, 1e-3 * p) / jnp.max(z)

    with jax.ensure_compile_time_eval():
        p, best = jnp.ones(A.in_shape), np.inf
        for _ in range(max_steps):
            upper, lower, p = advance(p)
            best = min(best, float(upper))
            if not best > (1 + 2 * tol) * float(lower):
                break
        slack = 1 + 100 * float(jnp.finfo(p.dtype).eps)
    return float(np.sqrt(best)) * slack


class DotTest(NamedTuple):
    """What `dot_test` measured; both are 0 but for rounding when the adjoint is right.

    adjoint: |<A x, y> - <x, A^H y>| / (||A x|| ||y||) for random x and y.
    transpose: ||A^T y - B y|| / ||B y|| with B the transpose that JAX makes of the forward map alone; NaN where JAX
      cannot transpose it (a host callback). Sees errors that the random inner products of the first hide.

    >>> from jbilevel.operators import Gradient, dot_test
    >>> found = dot_test(Gradient((4, 4)))
    >>> found.adjoint < 1e-6 and found.transpose < 1e-6
    True
    """

    adjoint: float
    transpose: float


def dot_test(A, key=None) -> DotTest:
    """Compares the adjoint and transpose of an operator with its forward map, for random x and y.

    Run it in double precision (``jax.config.update("jax_enable_x64", True)``) to see 1e-14 instead of 1e-7.

    >>> from jbilevel.operators import dot_test, from_functions
    >>> wrong = from_functions(lambda x: 2 * x, lambda y: 3 * y, (4,), (4,), exact_adjoint=False)
    >>> round(dot_test(wrong).transpose, 3)
    0.5
    """
    key = jax.random.key(0) if key is None else key
    return DotTest(float(adjoint_gap(A, key)), _against_jax(A, *_random_pair(A, key)))


def adjoint_gap(A, key):
    """|<A x, y> - <x, A^H y>| / (||A x|| ||y||) for random x and y."""
    x, y = _random_pair(A, key)
    image, back = A(x), A.H(y)
    gap = _inner(y, image) - _inner(back, x)
    if "real" in (A.in_kind, A.out_kind):
        gap = jnp.real(gap)
    size = jnp.sqrt(_dot(image, image) * _dot(y, y))
    return jnp.abs(gap) / jnp.where(size > 0, size, 1.0)


def _random_pair(A, key):
    first, second = jax.random.split(key)
    return random_like(_domain(A), first), random_like(_domain(A.T), second)


def _against_jax(A, x, y) -> float:
    bare = lambda x: A.map(x, False, linear.plain)  # noqa: E731
    try:
        (expected,) = jax.jit(lambda y: jax.linear_transpose(bare, x)(y))(y)
    except (NotImplementedError, ValueError, TypeError):
        return float("nan")
    difference = trees.sub(A.T(y), expected)
    return float(jnp.sqrt(_dot(difference, difference) / _dot(expected, expected)))


def random_like(shapes, key):
    """Standard normal arrays; complex ones have independent real and imaginary parts."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree, [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    )


def _domain(A):
    return _struct(A.in_shape, jnp.result_type(complex if A.in_kind == "complex" else float))


def _struct(shape, dtype):
    if any(isinstance(s, tuple) for s in shape):
        return tuple(_struct(s, dtype) for s in shape)
    return jax.ShapeDtypeStruct(shape, dtype)


def _inner(a, b):
    """sum(conj(a) b) over all leaves."""
    return sum(jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _dot(a, b):
    return jnp.real(_inner(a, b))
