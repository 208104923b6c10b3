"""Preconditioners of conjugate gradients as objects, for the adjoint systems of oracles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.contracts import Contract


class Preconditioner(Contract, abstract="jb.solvers.Preconditioner"):
    """A symmetric positive definite M that is cheap to apply and close to the inverse of the Hessian H, for `CG`.

    It is static configuration (a frozen dataclass: it hashes, and compares by value); what changes comes with params, x
    and data. The solution does not depend on it, nor does any derivative: gradients do not flow into it.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> class Power(jb.solvers.Preconditioner):  # of an energy whose Hessian is about exp(params)
    ...     def inverse(self, params, x, data):
    ...         return lambda r: jnp.exp(-params) * r
    >>> jb.solvers.CG(preconditioner=Power()).preconditioner.inverse(0.0, None, None)(jnp.ones(2)).tolist()
    [1.0, 1.0]
    """

    @abstractmethod
    def inverse(self, params, x, data) -> Callable:
        """The function ``r -> M r`` for ONE sample at x; r and M r have the structure, shapes and dtypes of x.

        Traceable. What is computed before the function is returned is computed once per solve.
        """


@dataclass(frozen=True)
class Diagonal(Preconditioner):
    """Division by the diagonal of the Hessian, or by something positive that is like it (Jacobi's preconditioner).

    Args:
      diagonal: ``diagonal(params, x, data)``, a pytree like x of positive arrays, which broadcast against its leaves. A
        solve with an entry that is not positive ends as ``Status.PRECONDITIONER``.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> problem = jb.SmoothProblem(  # x_hat = p / d
    ...     lambda p, x, d: jnp.sum(0.5 * d * x**2 - p * x), lambda p, d: 0.0 * d, strong_convexity=1.0)
    >>> scales, loss = jnp.array([[1.0, 10.0, 100.0]]), lambda p, x, d: jnp.sum(x**2)
    >>> by_scales = jb.solvers.CG(preconditioner=jb.solvers.Diagonal(lambda p, x, d: d))
    >>> oracles = [problem.oracle(loss, linear_solver=s, estimate=False) for s in (jb.solvers.CG(), by_scales)]
    >>> [oracle(1.0, scales).adjoint.steps.item() for oracle in oracles]
    [3, 1]
    """

    diagonal: Callable

    def inverse(self, params, x, data):
        diagonal = self.diagonal(params, x, data)
        positive = jnp.all(jnp.stack([jnp.all(d > 0) for d in jax.tree.leaves(diagonal)]))
        return lambda r: trees.where(positive, jax.tree.map(jnp.divide, r, diagonal), trees.zeros_like(r))
