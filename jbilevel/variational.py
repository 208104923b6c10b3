"""Operator + data term + regulariser -> lower-level problem, with the constants taken from the parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel.constants import Constants
from jbilevel.problems import SmoothProblem


def measurement_of(data):
    """The measurement inside ``data``: ``data["y"]`` of a mapping, the first entry of a sequence, or data itself."""
    if isinstance(data, Mapping):
        if "y" not in data:
            raise ValueError(f"data has no key 'y' for the measurement, only {sorted(data)}; pass `measurement=`.")
        return data["y"]
    return data[0] if isinstance(data, (tuple, list)) else data


@dataclass(frozen=True)
class Variational:
    """1/2 ||A x - y||^2 + R(params, x): the energy of a variational reconstruction and what is known about it.

    The data term sees only the measurement y inside ``data``, never a ground truth.
    """

    operator: Callable | None
    regularizer: Callable
    measurement: Callable
    in_shape: tuple | None
    operator_norm: float | None
    data_convexity: float | None

    def __call__(self, params, x, data):
        y = self.measurement(data)
        mapped = x if self.operator is None else self.operator(x)
        if _shapes(mapped) != _shapes(y):
            raise ValueError(
                f"the operator maps x of shape {jnp.shape(x)} to {_shapes(mapped)}, but the measurement has shape "
                f"{_shapes(y)}."
            )
        return 0.5 * _squared_norm(jax.tree.map(jnp.subtract, mapped, y)) + self.regularizer(params, x)

    def check(self, params) -> None:
        """The regulariser's own checks of its params: negative weights of a convex network, filters that are all 0."""
        getattr(self.regularizer, "check", lambda params: None)(params)

    def start(self, params, data):
        """x0 = y for the identity, else the multiple of A' y that fits y best."""
        y = jax.tree.map(jnp.asarray, self.measurement(data))
        if self.operator is None:
            return y
        back = self.adjoint(y)
        energy = _squared_norm(self.operator(back))
        length = _squared_norm(back) / jnp.where(energy > 0, energy, 1.0)
        return length.astype(back.dtype) * back

    def adjoint(self, y):
        if hasattr(self.operator, "H"):
            return jnp.real(self.operator.H(y))
        shape = self._domain()
        dtype = jnp.zeros((), jnp.asarray(y).dtype).real.dtype
        x = jax.ShapeDtypeStruct(shape, dtype)
        mapped = jax.eval_shape(self.operator, x).shape
        if mapped != jnp.shape(y):
            raise ValueError(
                f"the operator maps x of shape {shape} to {mapped}, but the measurement has shape {jnp.shape(y)}."
            )
        return jax.linear_transpose(self.operator, x)(jnp.conj(y))[0]

    def _domain(self):
        shape = self.in_shape if self.in_shape is not None else getattr(self.operator, "in_shape", None)
        if shape is None:
            raise ValueError("pass `in_shape`, the shape of x: a plain function does not tell it.")
        return tuple(shape)

    def constants(self, params, data) -> Constants:
        bounds = self._bounds(params, data)
        mu = self._sum(self._data_convexity(), bounds.strong_convexity)
        smoothness = self._sum(self._norm_squared(), bounds.smoothness)
        return bounds._replace(strong_convexity=mu, smoothness=smoothness)

    def _bounds(self, params, data) -> Constants:
        if not hasattr(self.regularizer, "bounds"):
            return Constants()
        shape = jnp.shape(self.measurement(data)) if self.operator is None else self._domain()
        return self.regularizer.bounds(params, shape)

    def _data_convexity(self):
        if not getattr(self.operator, "exact_adjoint", True):
            return None  # the gradient is not that of the energy: its norm bounds no distance
        if self.data_convexity is not None:
            return self.data_convexity
        return 1.0 if self.operator is None else None

    def _norm_squared(self):
        if self.operator is None:
            return 1.0
        return None if self.operator_norm is None else self.operator_norm**2

    @staticmethod
    def _sum(a, b):
        return None if a is None or b is None else a + b


def variational(
    operator: Callable | None,
    regularizer: Callable,
    data_term: str = "l2",
    *,
    measurement: Callable[[Any], Any] = measurement_of,
    in_shape: tuple[int, ...] | None = None,
    operator_norm: float | None = None,
    data_convexity: float | None = None,
) -> SmoothProblem:
    """The lower-level problem min_x 1/2 ||A x - y||_2^2 + R(params, x) for one measurement y.

    Args:
      operator: A, None for the identity (denoising), any `LinearOperator` (measurements may be complex, or tuples, of
        a `stack`), or any linear JAX function of x; its adjoint is ``operator.H`` where it has one, else JAX's
        transpose. For a complex operator x is the real image. Nothing is proven where ``exact_adjoint`` is False.
      regularizer: ``R(params, x) -> scalar``; ``R.bounds(params, shape)`` supplies constants where it exists.
      data_term: "l2".
      measurement: ``data -> y``; by default data["y"], the first entry of a tuple, or data itself.
      in_shape: shape of x, needed for a plain function without ``in_shape``.
      operator_norm: a proven bound on ||A||_2, for the smoothness constant; ``operator.norm()``, computed once here,
        where it exists.
      data_convexity: a proven mu_A with ||A x||^2 >= mu_A ||x||^2 (1 for the identity, 0 where the convexity of the
        regulariser is enough); without one the problem has no strong convexity constant, stops on the gradient norm,
        and reports ``error = inf``. MAID then works with the estimated error of `errors.distance`.

    Raises:
      ValueError: unknown data term, or an operator whose domain is not known.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.variational(None, jb.regularizers.SmoothedTV(eps=0.01))
    >>> x, info = jb.solve(problem, jnp.array([-2.0]), jnp.eye(8), tol=1e-6)
    >>> int(info.status)
    0
    """
    if data_term != "l2":
        raise ValueError(f"`data_term` must be 'l2', got {data_term!r}.")
    if operator is not None and not callable(operator):
        raise TypeError(f"`operator` must be a linear function or None, got {type(operator).__name__}.")
    if operator_norm is None and hasattr(regularizer, "bounds") and callable(getattr(operator, "norm", None)):
        operator_norm = operator.norm()
    model = Variational(operator, regularizer, measurement, in_shape, operator_norm, data_convexity)
    if operator is not None and not hasattr(operator, "H"):
        model._domain()  # say now, not inside a trace, that in_shape is missing
    known = model._data_convexity() is not None and hasattr(regularizer, "bounds")
    smooth = model._norm_squared() is not None and hasattr(regularizer, "bounds")

    return SmoothProblem(
        model,
        _Start(model),
        strong_convexity=_Constant(model, "strong_convexity") if known else None,
        smoothness=_Constant(model, "smoothness") if smooth else None,
        **{
            name: _Constant(model, name) if hasattr(regularizer, "bounds") else None
            for name in ("hessian_lipschitz", "mixed_lipschitz", "mixed_norm")
        },
    )


def _shapes(tree):
    """The shape of one array, or the list of those of a tuple."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    return shapes[0] if jax.tree.structure(tree).num_leaves == 1 else shapes


def _squared_norm(tree):
    return sum(jnp.sum(jnp.real(v * jnp.conj(v))) for v in jax.tree.leaves(tree))


# functions of (params, data) as comparable objects, so that equal models make equal problems and jit caches are hit


@dataclass(frozen=True)
class _Start:
    model: Variational

    def __call__(self, params, data):
        return self.model.start(params, data)


@dataclass(frozen=True)
class _Constant:
    model: Variational
    name: str

    def __call__(self, params, data):
        return getattr(self.model.constants(params, data), self.name)
