"""Operator + data term + regulariser -> lower-level problem, with the constants taken from the parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel import prox
from jbilevel._core import brief
from jbilevel._core.constants import Constants
from jbilevel._views.smooth import SmoothView
from jbilevel.problems.saddle import SaddleProblem
from jbilevel.problems.smooth import SmoothProblem
from jbilevel.regularizers.base import Regularizer
from jbilevel.regularizers.ridge_sum import RidgeSum
from jbilevel.regularizers.saddle_blocks import SaddleBlocks

FORMS = ("smooth", "saddle")


def measurement_of(data):
    """The measurement inside ``data``: ``data["y"]`` of a mapping, the first entry of a sequence, or data itself."""
    if isinstance(data, Mapping):
        if "y" not in data:
            raise ValueError(f"data has no key 'y' for the measurement, only {sorted(data)}; pass `measurement=`.")
        return data["y"]
    return data[0] if isinstance(data, (tuple, list)) else data


@dataclass(frozen=True)
class Variational:
    """1/2 ||A x - y||^2 + ridge/2 ||x||^2 + R(params, x): the energy of a reconstruction and what is known about it.

    The data term sees only the measurement y inside ``data``, never a ground truth.
    """

    operator: Callable | None
    regularizer: Callable
    measurement: Callable = measurement_of
    in_shape: tuple | None = None
    operator_norm: float | None = None
    data_convexity: float | None = None
    ridge: float = 0.0

    __repr__ = brief.settings

    def __call__(self, params, x, data):
        return self._fidelity(x, data) + self.regularizer(params, x)

    def _fidelity(self, x, data):
        y = self.measurement(data)
        misfit = _squared_norm(jax.tree.map(jnp.subtract, self.map(x, y), y))
        if self.ridge:
            misfit = misfit + self.ridge * _squared_norm(x)
        return 0.5 * misfit

    def linearize(self, params, x, data):
        """By hand as far as the regulariser is, see `SmoothProblem`; the rest is quadratic."""
        if (found := self.regularizer.linearize(params, x)) is None:
            return None
        rest = SmoothView(lambda x: self._fidelity(x, data), Constants())
        parts = rest.linearize(x), found
        value, gradient = (parts[0][i] + parts[1][i] for i in (0, 1))
        return value, gradient, lambda v: parts[0][2](v) + parts[1][2](v)

    def map(self, x, y):
        """A x, which must have the shapes of the measurement y."""
        mapped = x if self.operator is None else self.operator(x)
        if _shapes(mapped) != _shapes(y):
            raise ValueError(
                f"the operator maps x of shape {jnp.shape(x)} to {_shapes(mapped)}, but the measurement has shape "
                f"{_shapes(y)}."
            )
        return mapped

    def check(self, params) -> None:
        """The regulariser's own checks of its params: negative weights of a convex network, filters that are all 0."""
        self.regularizer.check(params)

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
        if (adjoint := _told(self.operator, "H")) is not None:
            return jnp.real(adjoint(y))
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
        shape = _told(self.operator, "in_shape") if self.in_shape is None else self.in_shape
        if shape is None:
            raise ValueError("pass `in_shape`, the shape of x: a plain function does not tell it.")
        return tuple(shape)

    def constants(self, params, data) -> Constants:
        bounds = self._bounds(params, data)
        mu = self._sum(self.convexity(), bounds.strong_convexity)
        smoothness = self._sum(self._norm_squared(), bounds.smoothness)
        return bounds._replace(strong_convexity=mu, smoothness=smoothness)

    def _bounds(self, params, data) -> Constants:
        if not self.regularizer.bounded:
            return Constants()
        shape = jnp.shape(self.measurement(data)) if self.operator is None else self._domain()
        return self.regularizer.bounds(params, shape)

    def ridges(self, params, data) -> RidgeSum | None:
        """What of the energy is not quadratic."""
        shape = jnp.shape(self.measurement(data)) if self.operator is None else self._domain()
        return self.regularizer.ridges(params, shape)

    def convexity(self):
        """Modulus of all but R, None where it is not known."""
        if _told(self.operator, "exact_adjoint") is False:
            return None  # the gradient is not that of the energy: its norm bounds no distance
        data = self.data_convexity
        if data is None:
            data = 1.0 if self.operator is None else 0.0
        return data + self.ridge if data + self.ridge > 0 or self.data_convexity is not None else None

    def _norm_squared(self):
        if self.operator is None:
            return 1.0 + self.ridge
        return None if self.operator_norm is None else self.operator_norm**2 + self.ridge

    @staticmethod
    def _sum(a, b):
        return None if a is None or b is None else a + b


def variational(
    operator: Callable | None,
    regularizer: Callable,
    data_term: str = "l2",
    *,
    form: str | None = None,
    ridge: float = 0.0,
    nonnegative: bool = False,
    measurement: Callable[[Any], Any] = measurement_of,
    in_shape: tuple[int, ...] | None = None,
    operator_norm: float | None = None,
    data_convexity: float | None = None,
) -> SmoothProblem | SaddleProblem:
    """The lower-level problem min_x 1/2 ||A x - y||_2^2 + ridge/2 ||x||_2^2 + R(params, x) for one measurement y.

    Args:
      operator: A, None for the identity (denoising), any `LinearOperator` (measurements may be complex, or tuples, of
        a `stack`), or any linear JAX function of x; its adjoint is ``operator.H`` where it has one, else JAX's
        transpose. For a complex operator x is the real image. Nothing is proven where ``exact_adjoint`` is False.
      regularizer: ``R(params, x) -> scalar``; ``R.bounds(params, shape)`` supplies constants where it exists, and
        ``R.saddle(params)`` the saddle form.
      data_term: "l2".
      form: "smooth" for a `SmoothProblem`, "saddle" for a `SaddleProblem` (see below); None takes the smooth one unless
        R has only the other (`TV`, `LearnedTV`, `TGV`).
      ridge: the weight of ||x||^2, which makes ill-posed data terms strongly convex.
      nonnegative: constrains x >= 0, in the saddle form only.
      measurement: ``data -> y``; by default data["y"], the first entry of a tuple, or data itself.
      in_shape: shape of x, needed for a plain function without ``in_shape``.
      operator_norm: a proven bound on ||A||_2, for the smoothness constant and the steps of primal-dual methods;
        ``operator.norm()``, computed once here, where it exists.
      data_convexity: a proven mu_A with ||A x||^2 >= mu_A ||x||^2 (1 for the identity, 0 where the convexity of the
        regulariser is enough); without one (and ridge = 0) the problem has no strong convexity constant, stops on the
        gradient norm, and reports ``error = inf``. MAID then works with estimated errors.

    The saddle form, with R(x) = min_z max_q <L(x, z), q> + a(z) - b*(q) (`SaddleBlocks`), has the primal unknown
    (x, z), or just x where there is no z, and the dual unknown q; an operator is dualised too (Bogensperger et al.
    2024, (33) and (35), with the signs of a maximum of <A x - y, p> - |p|^2/2), and the dual unknown is then (p, q), p
    as real arrays (..., 2) of real and imaginary parts where measurements are complex. Losses take the pair:
    ``pair[0]`` is x or (x, z); `image_of` reads x from it, and ``jb.losses`` take ``part=0`` or ``part=(0, 0)``.

    Raises:
      ValueError: unknown data term or form, a form that R does not have, or an operator whose domain is not known.

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
    if not isinstance(regularizer, Regularizer):
        regularizer = _Function(regularizer)
    if form is None:
        form = regularizer.form
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {FORMS} or None, got {form!r}.")
    if form == "smooth" and regularizer.form == "saddle":
        raise ValueError(f"{type(regularizer).__name__} is not smooth; `form` must be 'saddle' or None.")
    if not ridge >= 0:
        raise ValueError(f"`ridge` must be nonnegative, got {ridge}.")
    bounded = regularizer.bounded
    if operator_norm is None and (bounded or form == "saddle"):
        norm = _told(operator, "norm")
        operator_norm = None if norm is None else norm()
    model = Variational(operator, regularizer, measurement, in_shape, operator_norm, data_convexity, ridge)
    if operator is not None and _told(operator, "H") is None:
        model._domain()  # say now, not inside a trace, that in_shape is missing
    if form == "saddle":
        return _saddle_problem(SaddleForm(model, nonnegative))
    if nonnegative:
        raise ValueError("`nonnegative` needs `form='saddle'`: smooth problems have no constraints.")
    known = model.convexity() is not None and bounded
    smooth = model._norm_squared() is not None and bounded

    return VariationalProblem(
        model,
        _Part(model.start),
        strong_convexity=_Constant(model, "strong_convexity") if known else None,
        smoothness=_Constant(model, "smoothness") if smooth else None,
        **{
            name: _Constant(model, name) if bounded else None
            for name in ("hessian_lipschitz", "mixed_lipschitz", "mixed_norm")
        },
        ridges=_Part(model.ridges),
        linearize=_Part(model.linearize),
    )


@dataclass(frozen=True)
class SaddleForm:
    """The functions of the `SaddleProblem` of a reconstruction."""

    model: Variational
    nonnegative: bool

    @property
    def dualised(self) -> bool:
        return self.model.operator is not None

    def check(self, params) -> None:
        self.model.check(params)

    def blocks(self, params) -> SaddleBlocks:
        return self.model.regularizer.saddle(params)

    def linear(self, params, primal, data):
        x, z = _split(primal)
        image = self.blocks(params).linear(x, z)
        if not self.dualised:
            return image
        return _as_real(self.model.map(x, self.model.measurement(data))), image

    def transpose(self, params, dual, data):
        blocks = self.blocks(params)
        if not self.dualised:
            return _join(*blocks.transpose(dual))
        y, q = dual
        x, z = blocks.transpose(q)
        back = self.model.adjoint(_as_complex(y, self.model.measurement(data)))
        return _join(x + back, z)

    def ridges(self, params, data) -> RidgeSum | None:
        """What of the problem is not quadratic; None with a constraint, which is a kink, and where there is a z."""
        if self.nonnegative or jax.tree.leaves(self.blocks(params).scaling()[0][1]):
            return None
        ridges = self.model.ridges(params, data)
        return ridges.for_dual(lambda dual: dual[1]) if ridges is not None and self.dualised else ridges

    def prox_primal(self, params, v, step, data):
        """Of the ridge, the data term where it is not dualised, the constraint, and a(z)."""
        (v, w), (t, u) = _split(v), _split(step)
        if self.dualised:
            x = v / (1 + t * self.model.ridge) if self.model.ridge else v
        else:
            y = self.model.measurement(data)
            x = (v + t * y) / (1 + t * (1 + self.model.ridge))
        x = prox.box(x, 0.0) if self.nonnegative else x
        return _join(x, self.blocks(params).prox_auxiliary(w, u))

    def prox_dual(self, params, v, step, data):
        if not self.dualised:
            return self.blocks(params).prox_dual(v, step)
        y = _as_real(self.model.measurement(data))
        misfit = jax.tree.map(lambda v, y: prox.squared_distance_conjugate(v, step[0], y), v[0], y)
        return misfit, self.blocks(params).prox_dual(v[1], step[1])

    def start(self, params, data):
        """(x0, z0) and zeros: x0 as in `Variational.start`."""
        x = self.model.start(params, data)
        z, q = self.blocks(params).start(x)
        dual = (jax.tree.map(jnp.zeros_like, _as_real(self.model.measurement(data))), q) if self.dualised else q
        return _join(x, z), dual

    def scaling(self, params, data):
        """Steps of the blocks, with shares c and 1 - c of the bound for A and L.

        The shares equalise the products of step and modulus of both duals, where both have one, and the steps of x and
        of the dualised data term become c/||A||^2 and 1.
        """
        blocks = self.blocks(params)
        (t, u), s = blocks.scaling()
        if not self.dualised:
            return _join(t, u), s
        norm_squared = self.model.operator_norm**2
        share = 0.5
        if _strong(blocks.mu_dual):
            product = blocks.mu_dual * _smallest(s) * t * norm_squared
            share = jnp.clip(product / (1 + product), 0.1, 0.9)
        shift = share / (t * norm_squared)
        t, u = shift * t, jax.tree.map(lambda u: shift * u, u)
        s = jax.tree.map(lambda s: (1 - share) / shift * s, s)
        return _join(t, u), (1.0, s)

    def mu_primal(self, params, data):
        modulus, blocks = self.model.convexity() or 0.0, self.blocks(params)
        if not jax.tree.leaves(blocks.scaling()[0][1]):  # no z
            return modulus
        return jnp.minimum(modulus, blocks.mu_auxiliary) if modulus and _strong(blocks.mu_auxiliary) else 0.0

    def mu_dual(self, params, data):
        modulus = self.blocks(params).mu_dual
        return jnp.minimum(1.0, modulus) if self.dualised and _strong(modulus) else modulus


def _saddle_problem(form: SaddleForm) -> SaddleProblem:
    operator, regularizer = form.model.operator, form.model.regularizer
    if type(regularizer).saddle is Regularizer.saddle:
        regularizer.saddle(None)  # which raises
    if operator is not None and form.model.operator_norm is None:
        raise ValueError("the saddle form of a plain function needs `operator_norm`, a bound on its norm.")
    mu_primal, mu_dual = _moduli(form)
    return VariationalSaddle(
        _Part(form.linear),
        _Part(form.prox_primal),
        _Part(form.prox_dual),
        _Part(form.start),
        mu_primal=mu_primal,
        mu_dual=mu_dual,
        norm=1.0,
        transpose=_Part(form.transpose),
        scaling=_Part(form.scaling),
        ridges=_Part(form.ridges),
        exact_adjoint=_told(operator, "exact_adjoint") is not False,
    )


def _moduli(form: SaddleForm) -> list:
    """Both moduli as functions of (params, data), or the number 0 where there is none whatever the params are."""
    methods, known = (form.mu_primal, form.mu_dual), []

    def look():
        params = form.model.regularizer.init()
        known.extend(_strong(method(params, None)) for method in methods)

    jax.eval_shape(look)
    return [_Part(method) if there else 0.0 for method, there in zip(methods, known, strict=True)]


@dataclass(frozen=True)
class VariationalProblem(SmoothProblem):
    """What `variational` makes: it also knows which params its regulariser refuses."""

    def __repr__(self) -> str:
        return brief.call(type(self).__name__, brief.parts(self.energy))

    def check(self, params) -> None:
        super().check(params)
        self.energy.check(params)


@dataclass(frozen=True)
class VariationalSaddle(SaddleProblem):
    """The same in the saddle form."""

    @property
    def form(self) -> SaddleForm:
        return self.linear.method.__self__

    def __repr__(self) -> str:
        constraint = ["nonnegative=True"] if self.form.nonnegative else []
        return brief.call(type(self).__name__, brief.parts(self.form.model) + constraint)

    def check(self, params) -> None:
        super().check(params)
        self.form.check(params)


@dataclass(frozen=True)
class _Function(Regularizer):
    """A plain function R(params, x) as a regulariser of which no constants are known."""

    function: Callable

    def __repr__(self) -> str:
        return brief.brief(self.function)

    def init(self, key=None):
        raise TypeError("a plain function as regulariser has no parameters of its own to start from.")

    def __call__(self, params, x):
        return self.function(params, x)


def _told(operator, name: str):
    """What an operator says of itself; it may be a `LinearOperator`, another package's, or a plain function."""
    return getattr(operator, name, None)


def _split(primal):
    """(x, z) of a primal unknown, of its steps, and so on; x is always one array."""
    return primal if isinstance(primal, tuple) else (primal, ())


def _join(x, z):
    return (x, z) if jax.tree.leaves(z) else x


def _strong(modulus) -> bool:
    """Whether a modulus is known: anything but the number 0."""
    return not (isinstance(modulus, (int, float)) and modulus == 0)


def _smallest(steps):
    # of plain numbers a weak type: a strong float64 would make the steps of float32 images float64
    return reduce(jnp.minimum, (jnp.min(s) if jnp.ndim(s) else s for s in jax.tree.leaves(steps)))


def _as_real(y):
    """Complex arrays as real ones of shape (..., 2)."""
    split = lambda v: jnp.stack([v.real, v.imag], -1) if jnp.iscomplexobj(v) else jnp.asarray(v)  # noqa: E731
    return jax.tree.map(split, y)


def _as_complex(y, like):
    """The inverse of `_as_real` for measurements ``like`` these."""
    merge = lambda v, like: jax.lax.complex(v[..., 0], v[..., 1]) if jnp.iscomplexobj(like) else v  # noqa: E731
    return jax.tree.map(merge, y, like)


def _shapes(tree):
    """The shape of one array, or the list of those of a tuple."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    return shapes[0] if jax.tree.structure(tree).num_leaves == 1 else shapes


def _squared_norm(tree):
    return sum(jnp.sum(jnp.real(v * jnp.conj(v))) for v in jax.tree.leaves(tree))


# functions of (params, data) as comparable objects, so that equal models make equal problems and jit caches are hit


@dataclass(frozen=True)
class _Part:
    """A method of a model; bound methods compare by identity of their object, this by its value."""

    method: Callable

    def __call__(self, *arguments):
        return self.method(*arguments)

    def __eq__(self, other):
        return isinstance(other, _Part) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def _key(self):
        return self.method.__func__, self.method.__self__


@dataclass(frozen=True)
class _Constant:
    model: Variational
    name: str

    def __call__(self, params, data):
        return self.model.constants(params, data)._asdict()[self.name]
