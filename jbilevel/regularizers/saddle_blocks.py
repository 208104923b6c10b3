"""What a regulariser supplies for primal-dual methods, as data: `R.saddle(params)` of those that have a saddle form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jbilevel._core import brief


def unchanged(v, step):
    """The prox of 0: of the function a where there is no z, or where it costs nothing."""
    return v


@dataclass(frozen=True, kw_only=True)
class SaddleBlocks:
    """R(x) = min_z max_q <L(x, z), q> + a(z) - b*(q) at fixed params; z and q are pytrees, z = () where there is none.

    Attributes:
      linear: (x, z) -> L(x, z), of the structure of q.
      transpose: q -> L' q = (x, z).
      prox_dual: (v, step) -> the prox of step b*.
      prox_auxiliary: (v, step) -> the prox of step a.
      start: x -> (z0, q0), which also fixes their shapes.
      scaling: () -> ((t_x, t_z), s), steps as pytrees like (x, z) and q of numbers, with
        ||s^(1/2) L t^(1/2)||_2 <= 1, balanced for images in [0, 1].
      mu_auxiliary, mu_dual: moduli of strong convexity of a and b*, 0 where there is none.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> blocks = jb.regularizers.TV().saddle(jnp.log(jnp.array([0.5])))
    >>> image = blocks.linear(jnp.array([[0.0, 1.0]]), ())
    >>> image.tolist(), blocks.prox_dual(image, 1.0).tolist()  # differences, and their projection onto |q| <= 0.5
    ([[[0.0, 0.0]], [[1.0, 0.0]]], [[[0.0, 0.0]], [[0.5, 0.0]]])
    """

    linear: Callable[[Any, Any], Any]
    transpose: Callable[[Any], tuple[Any, Any]]
    prox_dual: Callable[[Any, Any], Any]
    start: Callable[[Any], tuple[Any, Any]]
    scaling: Callable[[], tuple[tuple[Any, Any], Any]]
    prox_auxiliary: Callable[[Any, Any], Any] = unchanged
    mu_auxiliary: Any = 0.0
    mu_dual: Any = 0.0

    __repr__ = brief.settings
