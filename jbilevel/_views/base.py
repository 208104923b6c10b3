"""The contracts of a lower-level problem, and of what solvers see of it at fixed params and data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp

from jbilevel._core import trees, validate
from jbilevel._core.contracts import Contract
from jbilevel._core.results import RUNNING

# roundings of size eps that a computed sum may hold, relative to the 2-norms of what is added: measured are at most 3
# (rows of 2,000 entries; programs add in blocks, whose errors are random)
UNITS = 8.0


class View(Contract, abstract="jb.View"):
    """A problem at fixed params and data, as solvers use it.

    What else a view offers belongs to its kind: `SmoothView` an energy with its gradient, Hessian products and
    constants, `SaddleView` a linear operator and two proximal maps, `WeightedL1View` a smooth part and a penalty.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> class Root(jb.View):  # of an increasing function of slope at least 2: |x - x_hat| <= |f(x)|/2
    ...     def error_bound(self, residual):
    ...         return residual / 2
    >>> float(Root().error_bound(jnp.array(0.5)))
    0.25
    """

    @property
    def tolerance_scale(self) -> Any:
        """Residual per unit of ``||x - x_hat||``: solves stop at tol times it. 1 where no bound is known."""
        return 1.0

    @abstractmethod
    def error_bound(self, residual) -> Any:
        """Proven bound on ``||x - x_hat||_2`` from the residual that the solver reports, inf where there is none."""

    def unrounded(self, residual, x, curvature, energy=None) -> Any:
        """Bound on what a computed residual would be without rounding, to be passed to `error_bound`.

        (1 + u) residual + u (L ||x|| + sqrt(2 L |energy|)) with u = `UNITS` eps. A gradient is a sum in which terms
        cancel: those that are linear in x have norms up to L ||x||, and those of an energy like ||A x - b||^2/2 norms
        up to ||A|| ||A x - b|| <= sqrt(2 L energy). Energies whose terms are far larger (by an offset that cancels, by
        a product of factors that do) need an x of higher precision.

        Args:
          curvature: the largest that a solver met, for L. energy: at x, None where it is not at hand.
        """
        terms = curvature * trees.norm(x)
        if energy is not None:
            terms = terms + jnp.sqrt(2 * curvature * jnp.abs(energy))
        unit = UNITS * trees.eps(x)
        return ((1 + unit) * residual + unit * terms).astype(residual.dtype)

    def concave_at(self) -> Callable | None:
        """``x -> whether the energy is seen to curve down at x``, which is no minimum then; None: nobody looks."""
        return None

    def contradiction(self, start, end, least_curvature) -> Any:
        """The `Status` of a constant that two iterates, with their gradients, and the smallest curvature that was seen
        disprove; RUNNING where none is."""
        return RUNNING

    def single(self, x) -> View | None:
        """The same problem in float32, for solves that start in it; None where there is none for this x."""
        return None


class Problem(Contract, abstract="jb.Problem"):
    """A lower-level problem: what is solved for x_hat(params, data), for ONE sample.

    A problem is static (a frozen dataclass of functions: it hashes, and compares by value, so that solvers compile
    once). It must supply `view` and `start`; everything else has a default. params, x and data are any pytrees.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Ridge(jb.Problem):  # min_x 1/2 |x - data|^2 + params/2 |x|^2, solved and differentiated as smooth
    ...     view_type = jb.SmoothView
    ...     def view(self, params, data):
    ...         energy = lambda x: 0.5 * jnp.sum((x - data) ** 2) + 0.5 * params * jnp.sum(x**2)
    ...         return jb.SmoothView(energy, jb.Constants(strong_convexity=1.0))
    ...     def start(self, params, data):
    ...         return jnp.zeros_like(data)
    ...     def default_solver(self):
    ...         return jb.solvers.NewtonCG()
    >>> x, info = jb.solve(Ridge(), 1.0, jnp.array([2.0, 4.0]), tol=1e-6)
    >>> x.tolist()
    [1.0, 2.0]
    """

    view_type: ClassVar[type[View]] = View  # of what `view` returns: oracles that need one kind look here

    @abstractmethod
    def view(self, params: Any, data: Any) -> View:
        """The problem at fixed params and data, as solvers and oracles use it."""

    @abstractmethod
    def start(self, params: Any, data: Any) -> Any:
        """The cold start x0 as real floating arrays; it fixes the structure, shapes and dtypes of x."""

    def check(self, params: Any) -> None:
        """Refuse params that are wrong, with a sentence, while their values are concrete. Called outside jit."""
        validate.arrays(params, "params")

    def validate(self, params: Any, data: Any, x0: Any = None) -> None:
        """Check, at trace time and without computing, what would otherwise fail far from its cause."""
        validate.start_shapes(self, params, data, x0)

    def default_solver(self) -> Any:
        """The `jb.Solver` for ``solver=None``."""
        raise TypeError(f"no default solver for {type(self).__name__}; pass `solver`.")

    def oracle(self, loss, **options) -> Any:
        """The `jb.Oracle` that differentiates this kind of problem; ``options`` are its own."""
        raise TypeError(f"no oracle is known for {type(self).__name__}; make one and pass it.")

    def image(self, x: Any) -> Any:
        """The picture inside the unknown."""
        return x

    def lacks(self) -> str | None:
        """What would have to be passed for solves to bound ``||x - x_hat||``, None where they do."""
        return None

    def lacks_smoothness(self) -> bool:
        """Whether no bound L on the Hessian is known, so that nothing can take steps of 1/L."""
        return False
