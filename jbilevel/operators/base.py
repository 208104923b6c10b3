"""The contract of all linear operators: application, transpose, adjoint, shapes, kinds, norm, and how they combine.

A **primitive** operator is a frozen dataclass of numbers and tuples with two methods, ``forward(x)`` and
``transpose(y)``, that accept any leading batch axes; `LinearOperator` puts them under every JAX transformation. A
`Composite` is made of other operators by its method ``map``.
"""

from __future__ import annotations

import math
import numbers
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel._core.contracts import Contract
from jbilevel._core.settings import own_settings
from jbilevel._core.validate import native
from jbilevel.operators import linear, norms


class LinearOperator(Contract, abstract="jb.operators.LinearOperator"):
    """A linear map A between spaces of real or complex arrays of fixed shapes, with its exact transpose.

    ``A(x)`` and ``A.T(y)`` take arrays whose *last* axes are ``in_shape`` or ``out_shape``; axes before those are batch
    axes. The shapes are tuples of integers, or for `stack` tuples of such tuples. A subclass supplies the shapes and
    the methods `forward` and `transpose`; one that forgets a method is refused when it is made.

    ``A.T`` is the transpose, <A x, y> = <x, A.T y> with the bilinear product sum(u v). ``A.H`` = conj o A.T o conj is
    the adjoint for the inner product sum(u conj(v)). Between real arrays and complex ones, real and imaginary parts
    count as coordinates: A.H y is the real part of the complex adjoint.

    Operators compare and hash by their geometry, so that equal operators share compiled code. ``A @ B``, ``A + B``,
    ``A - B``, ``-A``, ``2.0 * A``, `stack` and ``A.batched(n)`` are operators again.

    Attributes:
      in_shape, out_shape: what is mapped to what.
      in_kind, out_kind: "real" or "complex"; a complex operator takes real input too.
      exact_adjoint: False where ``A.T`` only approximates the transpose (some external codes); combinations carry it
        on, and nothing is certified through it.
      norm_is_bound: whether `norm` is a proven upper bound instead of an estimate from above.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Flip(jb.operators.LinearOperator):
    ...     in_shape: tuple[int, ...]
    ...     out_shape = property(lambda self: self.in_shape)
    ...     def forward(self, x):
    ...         return x[..., ::-1]
    ...     def transpose(self, y):
    ...         return y[..., ::-1]
    >>> A = Flip((3,))
    >>> A(jnp.array([1.0, 2.0, 3.0])).tolist(), A.T == A, round(A.norm(), 2)
    ([3.0, 2.0, 1.0], False, 1.0)
    """

    in_shape: Any
    out_shape: Any
    in_kind: Any = "real"  # Any, since combinations derive these in properties
    out_kind: Any = "real"
    exact_adjoint: Any = True
    norm_is_bound: Any = False
    __array_ufunc__ = None  # numpy scalars leave `scalar * A` to us

    @abstractmethod
    def forward(self, x):
        """A x for an x with any leading axes; without the checks of ``A(x)``."""

    @abstractmethod
    def transpose(self, y):
        """A^T y for a y with any leading axes; without the checks of ``A.T(y)``."""

    def map(self, x, transpose: bool, bind):
        """A x or A^T x, each primitive part through ``bind``: `linear.apply`, or `linear.plain` to look below it."""
        return bind(self, x, transpose=transpose)

    @own_settings
    def __call__(self, x):
        """A x.

        Raises:
          TypeError: x is not floating, or complex where A is real.
          ValueError: the last axes of x are not ``in_shape``.
        """
        return self.map(checked(x, self.in_shape, self.in_kind, type(self).__name__), False, linear.apply)

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return Transpose(self)

    @property
    def H(self) -> LinearOperator:
        """The adjoint: the transpose where all is real."""
        return self.T if self.in_kind == self.out_kind == "real" else Conjugate(self.T)

    def norm(self, tol: float = 1e-3) -> float:
        """The spectral norm ||A||_2, estimated from above to the relative accuracy ``tol``.

        A number, also inside ``jit``. Lanczos on A^H A (Golub & Kahan 1965) until the Ritz residual r and value t have
        r <= tol t, at most 300 products; returned is sqrt(t + r), which lies in [||A||, (1 + tol) ||A||] unless the
        random start is orthogonal to the leading singular vector. Operators that know better override this;
        ``norm_is_bound`` says whether the result is proven. Nothing is cached: keep the number.
        """
        check_tolerance(tol)
        return norms.lanczos(self, tol)

    def fbp(self, y, filter: str = "ram-lak", *, strict: bool = False):
        """Filtered backprojection of a measurement, of the operators that have one (X-ray transforms).

        Raises:
          ValueError: this one has none; with ``strict``, lines are not measured, of which else a warning tells.
        """
        raise ValueError(f"{type(self).__name__} has no filtered backprojection.")

    def subset(self, i, m: int) -> LinearOperator:
        """The i-th of m interleaved parts of the measurement, of the operators that have parts (X-ray transforms).

        Raises:
          ValueError: this one has none.
        """
        raise ValueError(f"{type(self).__name__} has no subsets.")

    def batched(self, n: int) -> LinearOperator:
        """A for each of n items: maps (n, *in_shape) to (n, *out_shape)."""
        return Batched(self, n)

    def __matmul__(self, other):
        return Composition(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __add__(self, other):
        return Sum((self, other)) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other):
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self):
        return Scaled(self, -1.0)

    def __mul__(self, factor):
        return Scaled(self, _factor(factor))

    __rmul__ = __mul__


class Composite(LinearOperator, abstract="Composite"):
    """An operator made of others: it supplies `map` in place of `forward` and `transpose`."""

    @abstractmethod
    def map(self, x, transpose: bool, bind):
        """A x or A^T x, each primitive part through ``bind``."""

    def forward(self, x):
        return self.map(x, False, linear.plain)

    def transpose(self, y):
        return self.map(y, True, linear.plain)


# ------------------------------------------------------------------------------------------------------------- checks


def checked(x, shape, kind: str, owner: str):
    """x as arrays that an operator with this input shape and kind takes, or an error that says what is wrong."""
    if _is_tree(shape):
        if not isinstance(x, (tuple, list)) or len(x) != len(shape):
            raise ValueError(f"x of {owner} must be a tuple of {len(shape)} arrays of shapes {shape}.")
        return tuple(checked(v, s, kind, owner) for v, s in zip(x, shape, strict=True))
    x = jnp.asarray(native(x))
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"x of {owner} must be floating, got {x.dtype}: convert it with x.astype(float).")
    if kind == "real" and jnp.iscomplexobj(x):
        raise TypeError(f"x of {owner} must be real, got {x.dtype}: apply it to real and imaginary part separately.")
    if x.ndim < len(shape) or x.shape[x.ndim - len(shape) :] != tuple(shape):
        raise ValueError(f"x of {owner} must have shape {tuple(shape)} after any batch axes, got {x.shape}.")
    return as_kind(x, kind)


def as_kind(x, kind: str):
    """x as real (its real part) or complex arrays."""

    def one(v):
        if kind == "complex":
            return v if jnp.iscomplexobj(v) else v.astype(jnp.result_type(v.dtype, jnp.complex64))
        return jnp.real(v)

    return jax.tree.map(one, x)


def shape_of(value, name: str) -> tuple[int, ...]:
    """A shape given as an integer or a sequence of integers, as a tuple."""
    values = (value,) if isinstance(value, numbers.Integral) else tuple(value)
    if not all(isinstance(n, numbers.Integral) and int(n) > 0 for n in values):
        raise ValueError(f"`{name}` must be a tuple of positive integers, got {value!r}.")
    return tuple(int(n) for n in values)


def zeros(shape, kind: str):
    """Arrays of an operator's input or output shape in the default precision."""
    if _is_tree(shape):
        return tuple(zeros(s, kind) for s in shape)
    return jnp.zeros(shape, complex if kind == "complex" else float)


def _is_tree(shape) -> bool:
    return any(isinstance(s, tuple) for s in shape)


def check_tolerance(tol) -> None:
    if not 0 < tol < 1:
        raise ValueError(f"`tol` must lie between 0 and 1, got {tol}.")


def _factor(factor):
    try:
        value = complex(factor)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "an operator can be multiplied by a number only: multiply the result instead, s * A(x), where s is traced "
            "or an array."
        ) from error
    if not (math.isfinite(value.real) and math.isfinite(value.imag)):
        raise ValueError(f"the factor of an operator must be finite, got {factor}.")
    return value if isinstance(factor, complex) or value.imag else value.real


# ------------------------------------------------------------------------------------------------------- combinations


@dataclass(frozen=True)
class Transpose(Composite):
    """A.T"""

    operator: LinearOperator

    in_shape = property(lambda self: self.operator.out_shape)
    out_shape = property(lambda self: self.operator.in_shape)
    in_kind = property(lambda self: self.operator.out_kind)
    out_kind = property(lambda self: self.operator.in_kind)
    exact_adjoint = property(lambda self: self.operator.exact_adjoint)
    norm_is_bound = property(lambda self: self.operator.norm_is_bound)
    T = property(lambda self: self.operator)

    def map(self, x, transpose, bind):
        return self.operator.map(x, not transpose, bind)

    def norm(self, tol=1e-3):
        return self.operator.norm(tol)


class _Like(Composite, abstract="_Like"):
    """An operator with the shapes, kinds and exactness of another one."""

    operator: LinearOperator

    in_shape = property(lambda self: self.operator.in_shape)
    out_shape = property(lambda self: self.operator.out_shape)
    in_kind = property(lambda self: self.operator.in_kind)
    out_kind = property(lambda self: self.operator.out_kind)
    exact_adjoint = property(lambda self: self.operator.exact_adjoint)
    norm_is_bound = property(lambda self: self.operator.norm_is_bound)

    def norm(self, tol=1e-3):
        return self.operator.norm(tol)


@dataclass(frozen=True)
class Conjugate(_Like):
    """conj o A o conj"""

    operator: LinearOperator

    T = property(lambda self: Conjugate(self.operator.T))
    H = property(lambda self: self.operator.T)

    def map(self, x, transpose, bind):
        return jax.tree.map(jnp.conj, self.operator.map(jax.tree.map(jnp.conj, x), transpose, bind))


@dataclass(frozen=True)
class Scaled(_Like):
    """s A with a fixed number s; complex only where A is."""

    operator: LinearOperator
    factor: float | complex

    def __post_init__(self):
        if isinstance(self.factor, complex) and not self.in_kind == self.out_kind == "complex":
            raise ValueError(f"the factor of a real operator must be real, got {self.factor}.")

    def map(self, x, transpose, bind):
        return jax.tree.map(lambda v: self.factor * v, self.operator.map(x, transpose, bind))

    def norm(self, tol=1e-3):
        return abs(self.factor) * self.operator.norm(tol)


@dataclass(frozen=True)
class Batched(_Like):
    """A for each of n items, on one more leading axis."""

    operator: LinearOperator
    n: int

    in_shape = property(lambda self: _prepend(self.n, self.operator.in_shape))
    out_shape = property(lambda self: _prepend(self.n, self.operator.out_shape))

    def __post_init__(self):
        shape_of(self.n, "n")

    def map(self, x, transpose, bind):
        return self.operator.map(x, transpose, bind)


def _prepend(n, shape):
    return tuple(_prepend(n, s) for s in shape) if _is_tree(shape) else (n, *shape)


@dataclass(frozen=True)
class Composition(Composite):
    """outer o inner"""

    outer: LinearOperator
    inner: LinearOperator

    def __post_init__(self):
        if self.outer.in_shape != self.inner.out_shape:
            raise ValueError(
                f"A @ B needs A.in_shape == B.out_shape, got {self.outer.in_shape} and {self.inner.out_shape}."
            )
        if (self.inner.out_kind, self.outer.in_kind) == ("complex", "real"):
            raise ValueError("A @ B of a real A and a B with complex values is not linear: take a real B.")

    in_shape = property(lambda self: self.inner.in_shape)
    out_shape = property(lambda self: self.outer.out_shape)
    in_kind = property(lambda self: self.inner.in_kind)
    out_kind = property(lambda self: self.outer.out_kind)
    exact_adjoint = property(lambda self: self.outer.exact_adjoint and self.inner.exact_adjoint)

    def map(self, x, transpose, bind):
        if transpose:
            return self.inner.map(as_kind(self.outer.map(x, True, bind), self.inner.out_kind), True, bind)
        return self.outer.map(as_kind(self.inner.map(x, False, bind), self.outer.in_kind), False, bind)


@dataclass(frozen=True)
class Sum(Composite):
    """The sum of operators between the same spaces."""

    terms: tuple[LinearOperator, ...]

    def __post_init__(self):
        who = "the terms of a sum of operators"
        _require_one(who, "in_shape", [term.in_shape for term in self.terms])
        _require_one(who, "out_shape", [term.out_shape for term in self.terms])
        _require_one(who, "in_kind", [term.in_kind for term in self.terms])

    in_shape = property(lambda self: self.terms[0].in_shape)
    out_shape = property(lambda self: self.terms[0].out_shape)
    in_kind = property(lambda self: self.terms[0].in_kind)
    out_kind = property(lambda self: _widest(self.terms))
    exact_adjoint = property(lambda self: all(term.exact_adjoint for term in self.terms))

    def map(self, x, transpose, bind):
        if transpose:
            parts = [term.map(as_kind(x, term.out_kind), True, bind) for term in self.terms]
        else:
            parts = [as_kind(term.map(x, False, bind), self.out_kind) for term in self.terms]
        return _total(parts)


@dataclass(frozen=True)
class Stack(Composite):
    """x -> (A_1 x, ..., A_n x), see `stack`."""

    parts: tuple[LinearOperator, ...]

    def __post_init__(self):
        if not self.parts:
            raise ValueError("`operators` must not be empty: stack at least one operator.")
        _require_one("stacked operators", "in_shape", [part.in_shape for part in self.parts])
        _require_one("stacked operators", "in_kind", [part.in_kind for part in self.parts])

    in_shape = property(lambda self: self.parts[0].in_shape)
    out_shape = property(lambda self: tuple(part.out_shape for part in self.parts))
    in_kind = property(lambda self: self.parts[0].in_kind)
    out_kind = property(lambda self: _widest(self.parts))
    exact_adjoint = property(lambda self: all(part.exact_adjoint for part in self.parts))

    def map(self, x, transpose, bind):
        if not transpose:
            return tuple(as_kind(part.map(x, False, bind), self.out_kind) for part in self.parts)
        pairs = zip(self.parts, x, strict=True)
        return _total([part.map(as_kind(y, part.out_kind), True, bind) for part, y in pairs])


def stack(operators) -> LinearOperator:
    """x -> (A_1 x, ..., A_n x): a tuple, so that outputs of different shapes need no padding; the transpose sums.

    >>> import jax.numpy as jnp
    >>> from jbilevel.operators import from_functions, stack
    >>> double = from_functions(lambda x: 2 * x, lambda y: 2 * y, (3,), (3,))
    >>> A = stack([double, 3.0 * double])
    >>> [y.tolist() for y in A(jnp.ones(3))]
    [[2.0, 2.0, 2.0], [6.0, 6.0, 6.0]]
    >>> A.T(A(jnp.ones(3))).tolist(), A.out_shape
    ([40.0, 40.0, 40.0], ((3,), (3,)))
    """
    return Stack(tuple(operators))


def _require_one(who: str, name: str, found: Sequence) -> None:
    if any(value != found[0] for value in found):
        raise ValueError(f"{who} must have the same {name}, got {found}.")


def _widest(operators) -> str:
    return "complex" if any(operator.out_kind == "complex" for operator in operators) else "real"


def _total(parts):
    first, *others = parts
    for other in others:
        first = jax.tree.map(jnp.add, first, other)
    return first
