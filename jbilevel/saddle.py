"""Saddle-point problems: what is solved by primal-dual methods and differentiated by piggyback."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel import prox, trees
from jbilevel.constants import SaddleConstants
from jbilevel.problems import as_start, no_closed_over_tracer, require_hashable, start_shapes, validate_arrays

# a power iteration bounds a norm from below: so many steps from a random vector, then this factor
POWER_STEPS, POWER_SAFETY = 30, 1.05

Number = float | Callable[[Any, Any], Any]


class SaddleView(NamedTuple):
    """A saddle problem at fixed params and data, as solvers use it. A modulus is None where it is not known."""

    linear: Callable  # x -> K x
    transpose: Callable  # y -> K* y
    prox_primal: Callable  # (v, step)
    prox_dual: Callable
    mu_primal: Any
    mu_dual: Any
    norm: Any  # bound on ||K|| (on ||s^(1/2) K t^(1/2)|| with ``scaling`` (t, s))
    proven_norm: bool  # given, not estimated
    scaling: Any = (1.0, 1.0)
    steps: Any = None  # (tau, sigma) that a solver has to use, where the proxes only hold for these
    linear_system: bool = False  # stop on the residual itself, as linear solves do, not on the error bound

    def single(self, x):
        """No mixed precision here."""
        return None

    @property
    def certified(self):
        """Whether both moduli are positive, so that residuals prove distances; False, or a traced truth value."""
        if self.mu_primal is None or self.mu_dual is None:
            return False
        return (jnp.asarray(self.mu_primal) > 0) & (jnp.asarray(self.mu_dual) > 0)

    def measure(self, first, second):
        """The residual that a solve reports, from the 2-norms (a, b) of an element of the operator T at (x, y).

        T(x, y) = (dg(x) + K*y, df*(y) - K x) is strongly monotone where both moduli are positive, so that
        mu_g |dx|^2 + mu_f |dy|^2 <= a |dx| + b |dy| and hence mu_g |dx| <= (a + sqrt(a^2 + b^2 mu_g/mu_f))/2: that. It
        is sqrt(a^2 + b^2) where a modulus is missing.
        """
        plain = jnp.hypot(first, second)
        if self.certified is False:
            return plain
        ratio = self.mu_primal / jnp.where(self.certified, self.mu_dual, 1.0)
        proven = 0.5 * (first + jnp.sqrt(first**2 + ratio * second**2))
        return jnp.where(self.certified, proven, plain).astype(plain.dtype)

    def bounds(self, first, second):
        """Proven (||x - x_hat||, ||y - y_hat||) from the same norms; inf where a modulus is missing."""
        unknown = jnp.full_like(first, jnp.inf)
        if self.certified is False:
            return unknown, unknown
        swapped = self._replace(mu_primal=self.mu_dual, mu_dual=self.mu_primal)
        mu, nu = (jnp.where(self.certified, m, 1.0) for m in (self.mu_primal, self.mu_dual))
        bounds = self.measure(first, second) / mu, swapped.measure(second, first) / nu
        return tuple(jnp.where(self.certified & ~jnp.isnan(b), b, jnp.inf).astype(first.dtype) for b in bounds)

    @property
    def tolerance_scale(self):
        if self.certified is False or self.linear_system:
            return 1.0
        return jnp.where(self.certified, self.mu_primal, 1.0)

    def error_bound(self, residual):
        """||x - x_hat||_2 of the primal unknown, from `measure`; inf where a modulus is missing."""
        if self.certified is False:
            return jnp.full_like(residual, jnp.inf)
        bound = residual / jnp.where(self.certified, self.mu_primal, 1.0)
        return jnp.where(self.certified & ~jnp.isnan(residual), bound, jnp.inf).astype(residual.dtype)

    def step_trees(self, tau, sigma):
        """(tau t, sigma s)."""
        return tuple(
            jax.tree.map(lambda w, step=step: step * w, weights)
            for step, weights in zip((tau, sigma), self.scaling, strict=True)
        )

    def flip(self):
        """The same problem as min over y, max over x: <-K*y, x> + f*(y) - g(x)."""
        return self._replace(
            linear=lambda y: trees.neg(self.transpose(y)), transpose=lambda x: trees.neg(self.linear(x)),
            prox_primal=self.prox_dual, prox_dual=self.prox_primal, mu_primal=self.mu_dual, mu_dual=self.mu_primal,
            scaling=self.scaling[::-1], steps=None if self.steps is None else self.steps[::-1],
        )  # fmt: skip


@dataclass(frozen=True)
class SaddleProblem:
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
      transpose: ``transpose(params, y, data) -> K* y`` where that is faster than JAX's transpose of ``linear``.
      scaling: ``(params, data) -> (t, s)``, pytrees like x and y of positive numbers or arrays: steps are tau*t and
        sigma*s (block or diagonal preconditioning; Pock & Chambolle 2011), and norm bounds ||s^(1/2) K t^(1/2)||.

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
    mu_primal: Number = 0.0
    mu_dual: Number = 0.0
    norm: Number | None = None
    constants: SaddleConstants | Callable | None = None
    transpose: Callable | None = None
    scaling: Callable | None = None

    def __post_init__(self):
        for name in ("linear", "prox_primal", "prox_dual", "init", "transpose", "scaling"):
            value = getattr(self, name)
            if not callable(value) and not (value is None and name in ("transpose", "scaling")):
                raise TypeError(f"SaddleProblem `{name}` must be a function, got {type(value).__name__}.")
        for name in ("mu_primal", "mu_dual", "norm"):
            value = getattr(self, name)
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

    def known_constants(self, params, data) -> SaddleConstants:
        constants = self.constants(params, data) if callable(self.constants) else self.constants
        return SaddleConstants() if constants is None else jax.lax.stop_gradient(constants)

    def at(self, params, data) -> SaddleView:
        moduli = [mu(params, data) if callable(mu) else mu for mu in (self.mu_primal, self.mu_dual)]
        # numbers that are 0 are unknown moduli, which solvers have to see without tracing
        moduli = [None if isinstance(mu, numbers.Real) and mu == 0 else mu for mu in moduli]
        scaling = (1.0, 1.0) if self.scaling is None else tuple(self.scaling(params, data))
        view = SaddleView(
            partial(_apart, lambda x: self.linear(params, x, data), params),
            partial(_apart, self._transposed(params, data), params),
            lambda v, step: self.prox_primal(params, v, step, data),
            lambda v, step: self.prox_dual(params, v, step, data),
            *jax.lax.stop_gradient(moduli), None, self.norm is not None, jax.lax.stop_gradient(scaling),
        )  # fmt: skip
        if self.norm is None:
            norm = POWER_SAFETY * power_norm(view, jax.eval_shape(self.start, params, data)[0])
        else:
            norm = self.norm(params, data) if callable(self.norm) else self.norm
        return view._replace(norm=jax.lax.stop_gradient(norm))

    def _transposed(self, params, data):
        if self.transpose is not None:
            return lambda y: self.transpose(params, y, data)
        x = jax.eval_shape(self.start, params, data)[0]
        pull = jax.linear_transpose(lambda x: self.linear(params, x, data), x)
        return lambda y: pull(y)[0]

    def check(self, params) -> None:
        """Refuse params that ``linear`` knows to be wrong (its ``check(params)``), while their values are concrete."""
        validate_arrays(params, "params")
        getattr(self.linear, "check", lambda params: None)(params)

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
            no_closed_over_tracer(f"`{name}`", function, *arguments)
            prox.same_output(jax.eval_shape(function, *arguments), like, f"`{name}` of a SaddleProblem")
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
        view = self.at(params, data)
        x, y = self.start(params, data)
        x, y = _random_like(x, 0), _random_like(y, 1)
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


def _random_like(tree, seed: int):
    """A fixed normal vector shaped like a pytree."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, normal)


def power_norm(view: SaddleView, x, steps: int = POWER_STEPS):
    """A lower bound of ||s^(1/2) K t^(1/2)||, within a few per cent, by power iteration from a fixed random vector."""
    t, s = view.scaling

    def normalised(v):
        size = trees.norm(v)
        return trees.scale(1 / jnp.where(size > 0, size, 1.0), v)

    def step(_, v):
        return normalised(prox.times(t, view.transpose(prox.times(s, view.linear(v)))))

    v = jax.lax.fori_loop(0, steps, step, normalised(_random_like(x, 0)))
    length, image = lengths(view, v, view.linear(v))
    return jnp.where(length > 0, image / jnp.where(length > 0, length, 1.0), 0.0)


def lengths(view: SaddleView, v, image):
    """Of v and of K v in the norms of the scaling, in which ``norm`` bounds their ratio."""
    t, s = view.scaling
    return jnp.sqrt(trees.dot(v, prox.divided(v, t))), jnp.sqrt(trees.dot(image, prox.times(s, image)))


def _apart(function, params, v):
    """function(v), computed once and stored: K and K* inside the loops of solvers.

    XLA on a CPU fuses a convolution into all that consumes its result, and so computes it several times (13 times
    slower where measured); a branch whose condition it cannot know keeps them apart. The condition reads params, not v,
    so that it stays one branch where v is one of a batch. Numbers that large are lost. On a GPU a branch would ask the
    host at each product, and nothing is fused into a convolution: there is none.
    """

    def branch(v):
        inexact = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
        first = jnp.ravel(jnp.asarray((inexact or jax.tree.leaves(v))[0]))[0]
        lost = jnp.real(first) > 0.5 * jnp.finfo(first.dtype).max
        nothing = lambda v: jax.tree.map(  # noqa: E731
            lambda o: jnp.full(o.shape, jnp.nan, o.dtype), jax.eval_shape(function, v)
        )
        return jax.lax.cond(jax.lax.stop_gradient(lost), nothing, function, v)

    return jax.lax.platform_dependent(v, cpu=branch, default=function)
