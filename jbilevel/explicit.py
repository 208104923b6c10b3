"""Plain automatic differentiation as an oracle: for networks and other models without a lower level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp

from jbilevel._core.results import SolveInfo, Warm, Work
from jbilevel._core.validate import require_function, trace_scalar
from jbilevel._oracle.kinds import ForwardOracle
from jbilevel._oracle.samples import Sample

__all__ = ["Oracle"]


@dataclass(frozen=True)
class Oracle(ForwardOracle):
    """Mean of ``loss(params, data)`` over the batch and its gradient, exact up to rounding.

    The tolerances are accepted and ignored, so that every method and `fit` work on it unchanged.

    Args:
      loss: ``loss(params, data) -> scalar`` for one sample. in_axes, on_failure, chunk: see `jb.Oracle`.
      matmul_precision: of float32 products, as for `jax.default_matmul_precision`: "highest" computes them in full;
        "tensorfloat32", or None for the setting at the call (JAX's default on recent NVIDIA GPUs is TF32), trains
        networks several times faster there, to about three digits.

    >>> import jax.numpy as jnp
    >>> oracle = Oracle(lambda w, d: 0.5 * (w * d["a"] - d["b"]) ** 2)
    >>> hg = oracle(1.0, {"a": jnp.array([1.0, 2.0]), "b": jnp.array([0.0, 0.0])})
    >>> float(hg.value), float(hg.grad), float(hg.error)
    (1.25, 2.5, 0.0)
    """

    loss: Callable
    _: KW_ONLY
    chunk: int | str | None = None
    matmul_precision: str | None = "highest"

    exact = True

    def __post_init__(self):
        super().__post_init__()
        require_function(self.loss, "loss")
        with jax.default_matmul_precision(self.matmul_precision):  # raises for a name that JAX does not know
            pass

    def unknown_error(self, dtype):
        return jnp.zeros((), dtype)

    def start(self, params, data) -> Warm:
        return Warm(None, None)

    def forward(self, params, data, warm, tol):
        trace_scalar(self.loss, "loss", params, data)
        value = self.loss(params, data)
        seen = jax.lax.stop_gradient(value)
        lower = SolveInfo.exact(seen)
        adjoint = lower._replace(status=jnp.zeros_like(lower.status), evaluations=Work.zero())
        return value, Sample(value=seen, warm=warm, lower=lower, adjoint=adjoint)


def __dir__():
    return __all__
