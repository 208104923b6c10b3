"""Smooth problems: a twice differentiable energy of one sample."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from jbilevel import implicit
from jbilevel._core import trees
from jbilevel._core.constants import Constant, Constants
from jbilevel._core.validate import (
    as_start,
    require_hashable,
    start_shapes,
    trace_scalar,
    traced,
)
from jbilevel._views.base import Problem
from jbilevel._views.smooth import SmoothView
from jbilevel.solvers.newton import NewtonCG

# below, an image stays in the processor's cache and float32 gains little
MIXED_SIZE = 2**14


@dataclass(frozen=True)
class SmoothProblem(Problem):
    """x_hat(params) = argmin_x energy(params, x, data) with a twice differentiable energy.

    Args:
      energy: ``energy(params, x, data) -> scalar`` for ONE sample, written in JAX; params, x, data are any pytrees.
      init: ``init(params, data) -> x0``, the cold start; it fixes the shape and dtype of x.
      strong_convexity, smoothness: mu and L, numbers or ``(params, data) -> number``, or None where unknown. With mu
        the stop ``||grad||/mu <= tol`` is a true bound on ``||x - x_hat||``; a wrong mu makes that bound wrong.
      hessian_lipschitz, mixed_lipschitz, mixed_norm: used by certificates only, see `Constants`.
      ridges: ``(params, data) -> jb.regularizers.RidgeSum`` (or None) of all of the energy that is not a quadratic
        without params, for a plain array x: certificates then need no constants but ``strong_convexity``.
      linearize: ``(params, x, data) -> (energy, gradient, product)``, the energy with its derivatives in x written by
        hand, ``product(v)`` being the Hessian at x times v; or None, there or as a result, for those of JAX. It pays
        where few arrays hold the Hessian; `verify` compares it with JAX.
      mixed_precision: whether solves for a float64 x may take most of their steps in float32, with every residual that
        decides in float64; None: where x has at least 2^14 entries. Set False for an energy that float32 overflows.

    Two problems made from the same functions are equal, so jitted solvers compile once; make the functions once,
    outside the loop that uses them.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> ridge = jb.SmoothProblem(
    ...     energy=lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2) + 0.5 * jnp.exp(p) * jnp.sum(x**2),
    ...     init=lambda p, d: jnp.zeros_like(d), strong_convexity=1.0)
    >>> x, info = jb.solve(ridge, 0.0, jnp.array([2.0, 4.0]), tol=1e-6)
    >>> bool(jnp.allclose(x, jnp.array([1.0, 2.0]), atol=1e-5))
    True
    """

    energy: Callable
    init: Callable
    _: KW_ONLY
    strong_convexity: Constant = None
    smoothness: Constant = None
    hessian_lipschitz: Constant = None
    mixed_lipschitz: Constant = None
    mixed_norm: Constant = None
    mixed_precision: bool | None = None
    ridges: Callable | None = None
    linearize: Callable | None = None

    view_type = SmoothView

    def __post_init__(self):
        optional = [name for name in ("ridges", "linearize") if vars(self)[name] is not None]
        for name in ("energy", "init", *optional):
            if not callable(vars(self)[name]):
                raise TypeError(f"SmoothProblem `{name}` must be a function, got {type(vars(self)[name]).__name__}.")
        for name in Constants._fields:
            value = vars(self)[name]
            if value is None or callable(value):
                continue
            if not isinstance(value, numbers.Real):
                kind = type(value).__name__
                raise TypeError(f"SmoothProblem `{name}` must be a number, a function or None, got {kind}.")
            if not value >= 0:
                raise ValueError(f"SmoothProblem `{name}` must be nonnegative, got {value}; use None when unknown.")
        require_hashable(self)

    def constants(self, params, data) -> Constants:
        def evaluate(constant):
            return constant(params, data) if callable(constant) else constant

        return Constants(*(evaluate(vars(self)[name]) for name in Constants._fields))

    def view(self, params, data) -> SmoothView:
        constants = jax.lax.stop_gradient(self.constants(params, data))
        reduced = partial(self._single, params, data)
        return SmoothView(
            value=lambda x: self.energy(params, x, data),
            constants=constants,
            reduced=reduced,
            inputs=(params, data),
            by_hand=self._by_hand(params, data),
            ridges=None if self.ridges is None else lambda: self.ridges(*jax.lax.stop_gradient((params, data))),
        )

    def _by_hand(self, params, data) -> Callable | None:
        return None if self.linearize is None else lambda x: self.linearize(params, x, data)

    def _single(self, params, data, x):
        wanted = trees.size(x) >= MIXED_SIZE if self.mixed_precision is None else self.mixed_precision
        if not wanted or any(jnp.result_type(leaf) != jnp.float64 for leaf in jax.tree.leaves(x)):
            return None
        params, data = trees.to_single((params, data))

        def value(x):
            return jnp.asarray(self.energy(params, x, data), jnp.float32)

        try:
            jax.eval_shape(value, trees.to_single(x))
        except (TypeError, ValueError):  # constants of the energy that do not mix with float32
            return None
        constants = trees.to_single(jax.lax.stop_gradient(self.constants(params, data)))
        return SmoothView(value, constants, by_hand=self._by_hand(params, data))

    def start(self, params, data):
        """The cold start as arrays; real inexact leaves only."""
        return as_start(self.init(params, data))

    def validate(self, params, data, x0=None) -> None:
        """Check, at trace time and without computing, what would otherwise fail far from its cause."""
        start = start_shapes(self, params, data, x0)
        trace_scalar(self.energy, "energy", params, start, data)
        for name in Constants._fields:
            if callable(vars(self)[name]):
                traced(f"`{name}`", vars(self)[name], params, data)

    def verify(self, params, data, *, tol: float = 1e-5) -> None:
        """Check with numbers what `validate` cannot see; meant for tests, in float64 and outside jit.

        At a random point near the start, ``linearize`` gives the energy, its gradient and Hessian products, as JAX
        finds them.

        Raises:
          ValueError: a sentence that names what is wrong.
        """
        self.validate(params, data)
        start = self.start(params, data)
        x, v = trees.add(start, trees.random_like(start, 0)), trees.random_like(start, 1)
        view = self.view(params, data)
        value, gradient, product = view.linearize(x)
        expected = replace(view, by_hand=None).linearize(x)
        found = {"energy": (value, expected[0]), "gradient": (gradient, expected[1]),
                 "product": (product(v), expected[2](v))}  # fmt: skip
        for name, (ours, theirs) in found.items():
            if not trees.norm(trees.sub(ours, theirs)) <= tol * trees.norm(theirs):
                raise ValueError(f"`linearize` of a SmoothProblem gives another {name} than `energy` has.")

    def default_solver(self) -> NewtonCG:
        return NewtonCG()

    def oracle(self, loss, **options) -> implicit.Oracle:
        return implicit.Oracle(self, loss, **options)

    def lacks_smoothness(self) -> bool:
        return self.smoothness is None

    def lacks(self) -> str | None:
        return "`strong_convexity` to the problem" if self.strong_convexity is None else None
