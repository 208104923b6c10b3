"""How far a transpose is from the exact one, in the spectral norm."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel.operators import linear, norms
from jbilevel.operators.base import LinearOperator, check_tolerance
from jbilevel.operators.functions import from_functions

_MOST_ENTRIES = 2**25  # of an explicit matrix
_MOST_STEPS = 60


def adjoint_mismatch(A: LinearOperator, key=None, *, tol: float = 1e-2) -> float:
    """||A^T - B|| / ||A|| in spectral norms, where B y is what ``A.T(y)`` computes; 0 but for rounding if they match.

    Random inner products, as in `dot_test`, average a mismatch away: one of 9 % may show as 0.2 %. What bilevel
    learning suffers is the norm: it bounds how far lower-level solutions and adjoint states are from stationary.

    Where JAX can transpose the forward map, both norms come from Lanczos with products only. A host function has no
    transpose to compare with, therefore both explicit matrices are formed: do it with a small geometry of the same kind
    (32 x 32, say) and write the number down; it changes little with the size.

    Args:
      A: a real operator between single arrays.
      key: for the random start of Lanczos' method.
      tol: relative accuracy of both norms.

    Raises:
      ValueError: a complex operator or a stack, or a host operator whose matrix has more than 2^25 entries.

    >>> from jbilevel.operators import adjoint_mismatch, from_functions
    >>> rough = from_functions(lambda x: 2 * x, lambda y: 2.1 * y, (4,), (4,), exact_adjoint=False)
    >>> round(adjoint_mismatch(rough), 3)
    0.05
    """
    check_tolerance(tol)
    if "complex" in (A.in_kind, A.out_kind) or any(isinstance(n, tuple) for n in (*A.in_shape, *A.out_shape)):
        raise ValueError("the mismatch is measured for real operators between single arrays: measure the parts.")
    backward, forward = _transposed(A), _transposed(A.T)
    if backward is None or forward is None:
        return _of_matrices(A)
    exact = from_functions(A, backward, A.in_shape, A.out_shape)
    # its entries may be rounding, of which a dot test says nothing
    shapes, options = (A.out_shape, A.in_shape), {"exact_adjoint": False}
    gap = from_functions(lambda y: backward(y) - A.T(y), lambda x: A(x) - forward(x), *shapes, **options)
    # rounding errors alone have no leading singular vector to find: do not look for it long
    return _share(norms.lanczos(gap, tol, _MOST_STEPS, key), norms.lanczos(exact, tol, key=key))


def _transposed(A):
    """JAX's own transpose of the map A, None where it has none."""
    bare = lambda x: A.map(x, False, linear.plain)  # noqa: E731
    x = jax.ShapeDtypeStruct(A.in_shape, jnp.result_type(float))
    back = lambda y: jax.linear_transpose(bare, x)(y)[0]  # noqa: E731
    try:
        jax.eval_shape(back, jax.ShapeDtypeStruct(A.out_shape, x.dtype))
    except (NotImplementedError, ValueError, TypeError):
        return None
    return back


def _of_matrices(A) -> float:
    n, m = math.prod(A.in_shape), math.prod(A.out_shape)
    if n * m > _MOST_ENTRIES:
        raise ValueError(
            f"the matrix of this operator has {n} x {m} entries, more than 2^25: measure with a small geometry of the "
            f"same kind."
        )
    forward, backward = _matrix(A, n, m), _matrix(A.T, m, n)
    return _share(_spectral_norm(forward.T - backward), _spectral_norm(forward))


def _share(gap: float, norm: float) -> float:
    if norm == 0:
        raise ValueError("the operator is zero: there is nothing to compare its transpose with.")
    return gap / norm


def _spectral_norm(M: np.ndarray) -> float:
    """By the smaller Gram matrix, which is far cheaper than singular values and accurate to half the digits."""
    gram = M @ M.T if M.shape[0] < M.shape[1] else M.T @ M
    return math.sqrt(max(float(np.linalg.eigvalsh(gram)[-1]), 0.0))


def _matrix(A, columns: int, rows: int) -> np.ndarray:
    out = np.zeros((rows, columns))
    for start in range(0, columns, 256):
        units = np.eye(min(256, columns - start), columns, start).reshape(-1, *A.in_shape)
        out[:, start : start + 256] = np.asarray(A(jnp.asarray(units))).reshape(-1, rows).T
    return out
