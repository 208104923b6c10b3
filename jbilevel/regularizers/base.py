"""The contract of a regulariser."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import jax
import numpy as np

from jbilevel._core.constants import Constants
from jbilevel._core.contracts import Contract
from jbilevel.regularizers.ridge_sum import RidgeSum
from jbilevel.regularizers.saddle_blocks import SaddleBlocks


class Regularizer(Contract, abstract="jb.Regularizer"):
    """R(params, x) of one image, summed over its pixels, from which `jb.variational` builds problems.

    A regulariser is static (a frozen dataclass of settings); its parameters are a pytree that `init` makes. It must
    supply `init` and the energy, `__call__`; everything else has a default.

    Attributes:
      form: "smooth", or "saddle" for one that is not smooth: `variational` then builds a saddle point.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Ridge(jb.Regularizer):  # exp(params)/2 |x|^2
    ...     def init(self, key=None, *, weight=0.1):
    ...         return jnp.log(jnp.asarray(weight))
    ...     def __call__(self, params, x):
    ...         return 0.5 * jnp.exp(params) * jnp.sum(x**2)
    ...     def bounds(self, params, shape):
    ...         return jb.Constants(strong_convexity=jnp.exp(params), smoothness=jnp.exp(params))
    >>> x, info = jb.solve(jb.variational(None, Ridge()), Ridge().init(weight=1.0), jnp.array([2.0, 4.0]), tol=1e-6)
    >>> x.tolist()
    [1.0, 2.0]
    """

    form: ClassVar[str] = "smooth"

    @abstractmethod
    def init(self, key=None) -> Any:
        """Parameters to start from, at a reasonable strength for images in [0, 1].

        ``key`` is for what is drawn at random; None stands for `jax.random.key(0)`. Options are keyword-only.
        """

    @abstractmethod
    def __call__(self, params: Any, x: Any) -> Any:
        """The energy R(params, x), a scalar of the dtype of x, for one image x; other shapes are refused.

        x is (H, W), or (C, H, W) for a regulariser that was made with ``channels=C``.
        """

    def bounds(self, params: Any, shape: tuple[int, ...]) -> Constants:
        """Proven `Constants` of the energy at params, for images of this shape; None where nothing is known."""
        return Constants()

    def saddle(self, params: Any) -> SaddleBlocks:
        """R(x) = min_z max_q <L(x, z), q> + a(z) - b*(q), for primal-dual methods."""
        raise ValueError(f"{type(self).__name__} has no saddle form (no method `saddle`); use form='smooth'.")

    def ridges(self, params: Any, shape: tuple[int, ...]) -> RidgeSum | None:
        """The energy at params as a `RidgeSum`, for images of this shape; None where it is none.

        With it, hypergradients are certified where `bounds` knows no Lipschitz constants, and more sharply elsewhere.
        """
        return None

    def linearize(self, params: Any, x: Any) -> tuple | None:
        """(R, gradient in x, ``v -> Hessian v``) at x by hand, where that is faster than JAX's derivatives, or None."""
        return None

    def check(self, params: Any) -> None:
        """Refuse params of another structure or with wrong values, while these are concrete."""

    def project(self, params: Any) -> Any:
        """The nearest params that are feasible: for the ``projection`` of a method."""
        return params

    @property
    def bounded(self) -> bool:
        """Whether `bounds` knows anything."""
        return type(self).bounds is not Regularizer.bounds


def require_theta(name: str, params, shape: tuple[int, ...]) -> None:
    """params must be one array of that shape.

    Raises:
      ValueError: they are not; it names the regulariser.
    """
    found = type(params).__name__ if isinstance(params, dict) else np.shape(params)
    if found != shape:
        raise ValueError(f"params of {name} must have shape {shape}, got {found}; see its init.")


def given_key(key):
    """The key of a caller, `jax.random.key(0)` for None."""
    return jax.random.key(0) if key is None else key
