"""A user's functions as operators: JAX functions, and functions of the host (numpy) through batched callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel.operators import norms
from jbilevel.operators.base import LinearOperator, shape_of

TESTS = 2  # random pairs
MISMATCH = 1e-4  # of which this much may be rounding, in float32 sums over a scan


def from_functions(
    forward: Callable,
    transpose: Callable | None,
    in_shape,
    out_shape,
    *,
    in_kind: str = "real",
    out_kind: str | None = None,
    exact_adjoint: bool = True,
) -> LinearOperator:
    """An operator from two linear JAX functions of ONE sample.

    Args:
      forward: x -> A x, for x of ``in_shape``.
      transpose: y -> A^T y, the transpose and not the conjugate one; None takes JAX's transpose of ``forward``.
      in_shape, out_shape: shapes of x and A x.
      in_kind, out_kind: "real" or "complex"; ``out_kind`` is ``in_kind`` by default.
      exact_adjoint: False if ``transpose`` only approximates A^T.

    Raises:
      ValueError: ``transpose`` does not pass dot tests, and ``exact_adjoint`` does not say so. Random vectors average
        a small mismatch away, so passing them proves little; see `adjoint_mismatch`.

    Two operators made of the same function objects are equal: define the functions once. `dot_test` compares the pair.

    >>> import jax.numpy as jnp
    >>> A = from_functions(lambda x: x[1:] - x[:-1], None, (3,), (2,))
    >>> A(jnp.array([0.0, 1.0, 3.0])).tolist(), A.T(jnp.array([1.0, 0.0])).tolist()
    ([1.0, 2.0], [-1.0, 1.0, 0.0])
    """
    _check_callable(forward, "forward")
    if transpose is not None:
        _check_callable(transpose, "transpose")
    kinds = _kinds(in_kind, out_kind)
    shapes = shape_of(in_shape, "in_shape"), shape_of(out_shape, "out_shape")
    return _checked(
        FromFunctions(
            function=forward,
            transposed=transpose,
            in_shape=shapes[0],
            out_shape=shapes[1],
            in_kind=kinds[0],
            out_kind=kinds[1],
            exact_adjoint=exact_adjoint,
        )
    )


def _checked(operator: FromFunctions | FromCallbacks):
    """The operator; ValueError where it says that its adjoint is exact and dot tests show that it is not."""
    if operator.transposed is None or not operator.exact_adjoint:
        return operator
    try:
        with jax.ensure_compile_time_eval():
            gap = max(float(norms.adjoint_gap(operator, jax.random.key(k))) for k in range(TESTS))
    except (jax.errors.UnexpectedTracerError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(
            "`forward` or `transpose` of an operator closes over a traced value, but operators are static; write what "
            "depends on `params` with plain JAX functions, in the energy or in `linear`."
        ) from error
    except jax.errors.JaxRuntimeError:  # of a host function: it is raised where the operator is used
        return operator
    if gap > MISMATCH:
        raise ValueError(
            f"`transpose` is not the transpose of `forward`: <A x, y> and <x, A^T y> differ by {gap:.1e} of "
            "||A x|| ||y||; mend it, or say `exact_adjoint=False`, and nothing is certified."
        )
    return operator


@dataclass(frozen=True)
class FromFunctions(LinearOperator):
    """See `from_functions`."""

    function: Callable
    transposed: Callable | None
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_kind: str
    out_kind: str
    exact_adjoint: bool

    def forward(self, x):
        return _each(self.function, x, self.in_shape, self.out_shape, "forward")

    def transpose(self, y):
        transposed = self.transposed
        if transposed is None:
            real = jnp.finfo(y.dtype).dtype
            dtype = jnp.result_type(real, jnp.complex64) if self.in_kind == "complex" else real
            x = jax.ShapeDtypeStruct(self.in_shape, dtype)
            transposed = lambda y: jax.linear_transpose(self.function, x)(y)[0]  # noqa: E731
        return _each(transposed, y, self.out_shape, self.in_shape, "transpose")


def _each(function, x, shape, expected, name):
    lead = x.shape[: x.ndim - len(shape)]
    out = jax.vmap(function)(x.reshape(-1, *shape)) if lead else function(x)
    if jnp.shape(out)[bool(lead) :] != expected:
        raise ValueError(f"`{name}` must return shape {expected}, it returned {jnp.shape(out)[bool(lead) :]}.")
    return out.reshape(*lead, *expected) if lead else out


def from_callbacks(
    forward: Callable,
    transpose: Callable,
    in_shape,
    out_shape,
    *,
    dtype="float32",
    batched: bool = False,
    in_kind: str = "real",
    out_kind: str | None = None,
    exact_adjoint: bool = True,
) -> LinearOperator:
    """An operator from two numpy functions that run on the host (external codes), one call for a whole batch.

    Args:
      forward, transpose: numpy arrays to numpy arrays; they must not use JAX, which hangs inside a callback.
      in_shape, out_shape: shapes of one x and one A x.
      dtype: "float32" or "float64", the precision that both functions compute in (its complex counterpart for complex
        kinds). Input is converted to it and the result back to the dtype of the input. "float64" needs the setting
        ``jax_enable_x64`` for the process: JAX runs callbacks in threads that do not see ``with jax.enable_x64(True)``.
      batched: the functions take (n, *in_shape) and (n, *out_shape) at once, instead of one sample at a time.
      in_kind, out_kind: "real" or "complex"; ``out_kind`` is ``in_kind`` by default.
      exact_adjoint: say False if ``transpose`` is not the exact transpose; `adjoint_mismatch` measures it.

    Raises:
      ValueError: ``transpose`` does not pass dot tests, and ``exact_adjoint`` does not say so.

    A host function that returns another shape, a kind that was not declared, or NaN for a finite sample raises from the
    callback, as an error of the JAX runtime whose last line says what was wrong.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> A = from_callbacks(lambda x: np.cumsum(x), lambda y: np.cumsum(y[::-1])[::-1], (3,), (3,))
    >>> jax.grad(lambda x: A(x)[2])(jnp.zeros(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    _check_callable(forward, "forward")
    _check_callable(transpose, "transpose")
    if np.dtype(dtype) not in (np.dtype("float32"), np.dtype("float64")):
        raise ValueError(f"`dtype` must be 'float32' or 'float64', got {dtype!r}.")
    shapes = shape_of(in_shape, "in_shape"), shape_of(out_shape, "out_shape")
    kinds = _kinds(in_kind, out_kind)
    return _checked(
        FromCallbacks(
            function=forward,
            transposed=transpose,
            in_shape=shapes[0],
            out_shape=shapes[1],
            dtype=np.dtype(dtype).name,
            takes_batch=bool(batched),
            in_kind=kinds[0],
            out_kind=kinds[1],
            exact_adjoint=exact_adjoint,
        )
    )


@dataclass(frozen=True)
class FromCallbacks(LinearOperator):
    """See `from_callbacks`."""

    function: Callable
    transposed: Callable
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str
    takes_batch: bool
    in_kind: str
    out_kind: str
    exact_adjoint: bool

    def forward(self, x):
        return self._call(self.function, x, self.in_shape, self.out_shape, self.in_kind, self.out_kind)

    def transpose(self, y):
        return self._call(self.transposed, y, self.out_shape, self.in_shape, self.out_kind, self.in_kind)

    def _call(self, function, x, shape, out_shape, kind, out_kind):
        lead = x.shape[: x.ndim - len(shape)]
        result = jax.ShapeDtypeStruct((*lead, *out_shape), self._dtype(out_kind))
        host = partial(_on_host, function, self.takes_batch, shape, out_shape, result.dtype)
        out = jax.pure_callback(host, result, x.astype(self._dtype(kind)), vmap_method="expand_dims")
        real = jnp.finfo(x.dtype).dtype
        return out.astype(jnp.result_type(real, jnp.complex64) if out_kind == "complex" else real)

    def _dtype(self, kind):
        return jax.dtypes.canonicalize_dtype(np.result_type(self.dtype, np.complex64 if kind == "complex" else "f4"))


def _on_host(function, takes_batch, shape, out_shape, dtype, x):
    """Runs in the callback: numpy only, whatever the leading axes."""
    x = np.asarray(x)
    lead = x.shape[: x.ndim - len(shape)]
    samples = x.reshape(-1, *shape)
    out = np.asarray(function(samples) if takes_batch else [function(sample) for sample in samples])
    if out.shape != (len(samples), *out_shape):
        raise ValueError(f"a host function returned shape {out.shape[1:]} for one sample, declared is {out_shape}.")
    if not np.can_cast(out.dtype, dtype, "same_kind"):
        raise TypeError(f"a host function returned {out.dtype}, which is not {dtype.name}: say so by `out_kind`.")
    out = out.astype(dtype, copy=False)
    for sample, image in zip(samples, out, strict=True):  # NaN passes through, so that a bad sample gets its status
        if not np.all(np.isfinite(image)) and np.all(np.isfinite(sample)):
            raise FloatingPointError("a host function returned NaN or infinity for a sample that is finite.")
    return out.reshape(*lead, *out_shape)


def _kinds(in_kind, out_kind):
    kinds = in_kind, in_kind if out_kind is None else out_kind
    for name, kind in zip(("in_kind", "out_kind"), kinds, strict=True):
        if kind not in ("real", "complex"):
            raise ValueError(f"`{name}` must be 'real' or 'complex', got {kind!r}.")
    return kinds


def _check_callable(function, name):
    if not callable(function):
        raise TypeError(f"`{name}` must be a function, got {type(function).__name__}.")
