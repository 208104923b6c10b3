"""Saddle-point problems: what is solved by primal-dual methods and differentiated by piggyback."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel import piggyback, prox
from jbilevel._core import trees
from jbilevel._core.constants import SaddleConstants
from jbilevel._core.validate import as_start, require_hashable, start_shapes, traced
from jbilevel._views.base import Problem
from jbilevel._views.saddle import POWER_SAFETY, SaddleView, power_norm, unfused
from jbilevel.solvers.pdhg import PDHG

Number = float | Callable[[Any, Any], Any]


@dataclass(frozen=True)
class SaddleProblem(Problem):
    """(x_hat, y_hat)(params) = saddle point of min_x max_y <K x, y> + g(x) - f*(y), K linear, g and f* convex.

    Args:
      linear: ``linear(params, x, data) -> K x`` for ONE sample, linear in x; params, x, y, data are any pytrees.
      prox_primal, prox_dual: ``prox(params, v, step, data)``, the proximal maps of step*g and step*f* at v (see
        `jbilevel.prox`); ``step`` is a number, or with ``scaling`` a pytree like v.
      init: ``init(params, data) -> (x0, y0)``, the cold start; it fixes the shapes and dtypes of both.
      mu_primal, mu_dual: moduli of strong convexity of g and f*, numbers or ``(params, data) -> number``, the Python
        number 0 where there is none. With both positive every solve carries a proven bound on ``||x - x_hat||``; a
        wrong one makes it wrong.
      norm: a bound on ||K||_2, number or function; None estimates it by a power iteration, and then no hypergradient is
        certified.
      constants: `SaddleConstants`, or a function of (params, data) that returns them, for certified hypergradients.
      transpose: ``transpose(params, y, data) -> K* y`` where that is faster than JAX's transpose of ``linear``. A solve
        that sees <K x, y> and <x, K* y> differ ends as ``Status.ADJOINT``.
      exact_adjoint: False says that ``transpose`` is rough; it is then not tested, and nothing is proven.
      scaling: ``(params, data) -> (t, s)``, pytrees like x and y of positive numbers or arrays: steps are tau*t and
        sigma*s (block or diagonal preconditioning; Pock & Chambolle 2011), and norm bounds ||s^(1/2) K t^(1/2)||.

      ridges: ``(params, data) -> jb.regularizers.RidgeSum`` (or None) of b with f* = b*, or f* = (quadratic of other
        parts of y) + b*, for a quadratic g, neither of which has params: certificates then need no ``constants``.

    The unknown of a saddle problem is the pair (x, y): losses take it as their x. Parameters may sit anywhere, in K and
    in the proxes.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> ridge = jb.SaddleProblem(  # 1/2 |x - d|^2 + p/2 |x|^2 with the second term dualised: x_hat = d/(1 + p)
    ...     lambda p, x, d: x, lambda p, v, step, d: jb.prox.squared_distance(v, step, d),
    ...     lambda p, v, step, d: jb.prox.squared_distance(v, step, 0.0, 1 / p),
    ...     lambda p, d: (jnp.zeros_like(d), jnp.zeros_like(d)), mu_primal=1.0, mu_dual=lambda p, d: 1 / p, norm=1.0)
    >>> (x, y), info = jb.solve(ridge, 1.0, jnp.array([2.0, 4.0]), tol=1e-6)
    >>> bool(jnp.allclose(x, jnp.array([1.0, 2.0]), atol=1e-5))
    True
    """

    linear: Callable
    prox_primal: Callable
    prox_dual: Callable
    init: Callable
    _: KW_ONLY
    mu_primal: Number = 0.0
    mu_dual: Number = 0.0
    norm: Number | None = None
    constants: SaddleConstants | Callable | None = None
    transpose: Callable | None = None
    exact_adjoint: bool = True
    scaling: Callable | None = None
    ridges: Callable | None = None

    view_type = SaddleView

    def __post_init__(self):
        for name in ("linear", "prox_primal", "prox_dual", "init", "transpose", "scaling", "ridges"):
            value = vars(self)[name]
            if not callable(value) and not (value is None and name in ("transpose", "scaling", "ridges")):
                raise TypeError(f"SaddleProblem `{name}` must be a function, got {type(value).__name__}.")
        for name in ("mu_primal", "mu_dual", "norm"):
            value = vars(self)[name]
            if callable(value) or (value is None and name == "norm"):
                continue
            if not isinstance(value, numbers.Real):
                raise TypeError(f"SaddleProblem `{name}` must be a number or a function, got {type(value).__name__}.")
            if not value >= 0:
                raise ValueError(f"SaddleProblem `{name}` must be nonnegative, got {value}.")
        if self.norm is None and self.constants is not None:
            raise ValueError(
                "SaddleProblem `constants` certify nothing with norm=None; pass a proven bound on the norm of `linear`."
            )
        require_hashable(self)

    def _constants(self, params, data) -> SaddleConstants:
        constants = self.constants(params, data) if callable(self.constants) else self.constants
        return SaddleConstants() if constants is None else jax.lax.stop_gradient(constants)

    def view(self, params, data) -> SaddleView:
        moduli = [mu(params, data) if callable(mu) else mu for mu in (self.mu_primal, self.mu_dual)]
        # numbers that are 0 are unknown moduli, which solvers have to see without tracing
        unknown = [not self.exact_adjoint or (isinstance(mu, numbers.Real) and mu == 0) for mu in moduli]
        moduli = [None if hidden else mu for hidden, mu in zip(unknown, moduli, strict=True)]
        scaling = (1.0, 1.0) if self.scaling is None else tuple(self.scaling(params, data))
        mu_primal, mu_dual = jax.lax.stop_gradient(moduli)
        view = SaddleView(
            linear=partial(unfused, lambda x: self.linear(params, x, data), params),
            transpose=partial(unfused, self._transposed(params, data), params),
            prox_primal=lambda v, step: self.prox_primal(params, v, step, data),
            prox_dual=lambda v, step: self.prox_dual(params, v, step, data),
            mu_primal=mu_primal,
            mu_dual=mu_dual,
            norm=None,
            proven_norm=self.norm is not None,
            scaling=jax.lax.stop_gradient(scaling),
            ridges=None if self.ridges is None else lambda: self.ridges(*jax.lax.stop_gradient((params, data))),
            exact_adjoint=self.exact_adjoint,
        )
        if self.norm is None:
            norm = POWER_SAFETY * power_norm(view, jax.eval_shape(self.start, params, data)[0])
        else:
            norm = self.norm(params, data) if callable(self.norm) else self.norm
        return replace(view, norm=jax.lax.stop_gradient(norm), constants=self._constants(params, data))

    def _transposed(self, params, data):
        if self.transpose is not None:
            return lambda y: self.transpose(params, y, data)
        x = jax.eval_shape(self.start, params, data)[0]
        pull = jax.linear_transpose(lambda x: self.linear(params, x, data), x)
        return lambda y: pull(y)[0]

    def start(self, params, data):
        """The cold start (x0, y0) as arrays."""
        x0 = self.init(params, data)
        if not isinstance(x0, (tuple, list)) or len(x0) != 2:
            raise TypeError(f"init(params, data) of a SaddleProblem must return a pair (x0, y0), got {x0}.")
        return as_start(tuple(x0))

    def validate(self, params, data, x0=None) -> None:
        """Check, at trace time and without computing, what would otherwise fail far from its cause."""
        x, y = start = start_shapes(self, params, data, x0)
        step = jax.ShapeDtypeStruct((), trees.dtype(start))
        t, s = (step, step) if self.scaling is None else jax.eval_shape(self.scaling, params, data)
        calls = {
            "linear": (self.linear, (params, x, data), y),
            "prox_primal": (self.prox_primal, (params, x, t, data), x),
            "prox_dual": (self.prox_dual, (params, y, s, data), y),
        }
        if self.transpose is not None:
            calls["transpose"] = (self.transpose, (params, y, data), x)
        for name, (function, arguments, like) in calls.items():
            prox.same_output(traced(f"`{name}`", function, *arguments), like, f"`{name}` of a SaddleProblem")
        for name in ("mu_primal", "mu_dual", "norm", "constants", "scaling"):
            if callable(vars(self)[name]):
                traced(f"`{name}`", vars(self)[name], params, data)
        self._require_transpose(params, data, y)

    def _require_transpose(self, params, data, y) -> None:
        try:
            jax.eval_shape(self._transposed(params, data), y)
        except (NotImplementedError, AssertionError) as error:
            raise TypeError(
                "`linear` of a SaddleProblem must be linear in x, and JAX must be able to transpose it; pass "
                "`transpose=` where it cannot."
            ) from error

    def verify(self, params, data, *, step=0.5, scale: float = 1.0, tol: float = 1e-5) -> None:
        """Check with numbers what `validate` cannot see; meant for tests, in float64 and outside jit.

        K is linear, K* its transpose, no vector met is stretched by more than ``norm``, and both proxes pass
        `jbilevel.prox.check_prox` around the start.

        Raises:
          ValueError, TypeError: a sentence that names what is wrong.
        """
        self.validate(params, data)
        view = self.view(params, data)
        x, y = self.start(params, data)
        x, y = trees.random_like(x, 0), trees.random_like(y, 1)
        image = view.linear(x)
        doubled = view.linear(trees.scale(2.0, x))
        if trees.norm(trees.sub(doubled, trees.scale(2.0, image))) > tol * trees.norm(image):
            raise ValueError("`linear` of a SaddleProblem is not linear in x.")
        mismatch = jnp.abs(trees.dot(image, y) - trees.dot(x, view.transpose(y)))
        if mismatch > tol * trees.norm(image) * trees.norm(y):
            raise ValueError("`transpose` of a SaddleProblem is not the transpose of `linear`.")
        stretched = power_norm(view, x)
        if stretched > (1 + tol) * view.norm:
            raise ValueError(
                f"`norm` of a SaddleProblem is {float(view.norm):.3g}, but a vector is stretched by "
                f"{float(stretched):.3g}: it is no bound on the norm of `linear`."
            )
        x0, y0 = self.start(params, data)
        t, s = view.step_trees(step, step)
        for name, apply, v, width in (("prox_primal", view.prox_primal, x0, t), ("prox_dual", view.prox_dual, y0, s)):
            try:
                prox.check_prox(apply, v, width, scale=scale, tol=tol)
            except (ValueError, TypeError) as error:
                raise type(error)(f"`{name}` of a SaddleProblem: {error}") from error

    def default_solver(self) -> PDHG:
        return PDHG()

    def oracle(self, loss, **options) -> piggyback.Oracle:
        return piggyback.Oracle(self, loss, **options)

    def image(self, x):
        return image_of(x)

    def lacks(self) -> str | None:
        if not self.exact_adjoint:
            return "an exact `transpose` to the problem (without one nothing is proven)"
        for name, modulus in (("mu_primal", self.mu_primal), ("mu_dual", self.mu_dual)):
            if not callable(modulus) and modulus == 0:
                return f"a positive `{name}` to the problem (without one nothing is proven)"
        return None


def image_of(x):
    """The picture inside the unknown of any problem: x itself, or that of a saddle point (x, y) or ((x, z), y).

    >>> image_of(("image", "dual")), image_of((("image", "auxiliary"), "dual"))
    ('image', 'image')
    """
    while isinstance(x, (tuple, list)):
        x = x[0]
    return x
