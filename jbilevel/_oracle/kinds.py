"""The two kinds of oracle: those that pull an adjoint back, and those that differentiate their own forward pass."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel._core.results import Warm
from jbilevel._oracle.base import Chunk, Oracle
from jbilevel._oracle.batches import over_samples
from jbilevel._oracle.samples import PullBackPoints, Sample, named, usable


def _without(kept, leaves, weight):
    """Other samples replaced by a kept one of weight 0 before anything is differentiated, because 0 * NaN is NaN."""
    chosen = jnp.where(kept, jnp.arange(kept.size), jnp.argmax(kept))
    return jax.tree.map(lambda leaf: leaf[chosen], leaves), jnp.where(kept, weight, 0.0)


def _zero_unless_any(kept, gradients: PullBackPoints) -> PullBackPoints:
    """A chunk without a kept sample adds nothing."""
    return jax.tree.map(lambda leaf: jnp.where(jnp.any(kept), leaf, 0.0), gradients)


@dataclass(frozen=True, kw_only=True)
class PullBackOracle(Oracle, abstract="jb.PullBackOracle"):
    """Oracle of a kind that solves for each sample, and then pulls what it found back to the parameters.

    >>> import jbilevel as jb
    >>> class Shift(jb.PullBackOracle):  # x_hat = params + data, loss |x_hat|^2/2: params are pulled back by x_hat
    ...     def start(self, params, data):
    ...         return jb.Warm(None, None)
    ...     def sample_value(self, params, data, warm, tol):
    ...         info = jb.SolveInfo.exact(params + data)
    ...         return jb.Sample(0.5 * (params + data) ** 2, warm, lower=info, adjoint=info)
    ...     def sample(self, params, data, warm, tol, adjoint_tol):
    ...         return self.sample_value(params, data, warm, tol), PullBackPoints(params + data)
    ...     def surrogate(self, params, data, point):
    ...         return params * point
    >>> float(Shift()(jnp.array(1.0), jnp.array([1.0, 3.0])).grad)
    3.0
    """

    @abstractmethod
    def sample(self, params, data, warm: Warm, tol, adjoint_tol) -> tuple[Sample, PullBackPoints]:
        """Both solves of one sample, and where their pull-back takes place."""

    @abstractmethod
    def surrogate(self, params, data, point) -> Any:
        """A scalar whose gradient in params is the hypergradient of one sample, at a point of `sample`."""

    def gradients(self, params, chunk: Chunk, tol, adjoint_tol):
        def solve(mapped, warm, ask):
            return self.sample(params, chunk.split.data(mapped), warm, ask(tol), ask(adjoint_tol))

        samples, points = chunk.over(solve)
        samples, mapped, weight = named(self, samples), chunk.mapped, chunk.weight
        kept = chunk.kept(self, samples)
        if chunk.may_leave:
            (mapped, points), weight = _without(kept, (mapped, points), weight)

        def weighted(params, points):
            values = over_samples(lambda m, point: self.surrogate(params, chunk.split.data(m), point))(mapped, points)
            return jnp.sum(weight * values)

        found = PullBackPoints(*(None if point is None else jax.grad(weighted)(params, point) for point in points))
        return _zero_unless_any(kept, found) if chunk.may_leave else found, samples


@dataclass(frozen=True, kw_only=True)
class ForwardOracle(Oracle, abstract="jb.ForwardOracle"):
    """Oracle of a kind that differentiates its own forward pass.

    >>> import jbilevel as jb
    >>> class Shift(jb.ForwardOracle):  # x_hat = params + data, loss |x_hat|^2/2
    ...     def start(self, params, data):
    ...         return jb.Warm(None, None)
    ...     def forward(self, params, data, warm, tol):
    ...         value = 0.5 * (params + data) ** 2
    ...         info = jb.SolveInfo.exact(jax.lax.stop_gradient(value))
    ...         return value, jb.Sample(jax.lax.stop_gradient(value), warm, lower=info, adjoint=info)
    >>> float(Shift()(jnp.array(1.0), jnp.array([1.0, 3.0])).grad)
    3.0
    """

    @abstractmethod
    def forward(self, params, data, warm: Warm, tol) -> tuple[Any, Sample]:
        """The loss of one sample, which is differentiated as it is, and what is told of it."""

    def sample_value(self, params, data, warm: Warm, tol) -> Sample:
        return self.forward(params, data, warm, tol)[1]

    def gradients(self, params, chunk: Chunk, tol, adjoint_tol):
        def weighted(params, mapped, start, weight):
            each = over_samples(lambda m, w: self.forward(params, chunk.split.data(m), w, tol))
            values, samples = each(mapped, start)
            return jnp.sum(weight * values), samples

        differentiate = jax.grad(weighted, has_aux=True)
        gradients, samples = differentiate(params, chunk.mapped, chunk.start, chunk.weight)
        samples = named(self, samples)
        if not chunk.may_leave:
            return PullBackPoints(gradients), samples
        kept = chunk.kept(self, samples)

        def again(_):
            # only the forward pass tells which samples are bad, so they leave in a second pass
            (mapped, start), weight = _without(kept, (chunk.mapped, chunk.start), chunk.weight)
            return differentiate(params, mapped, start, weight)[0]

        bad = jnp.any(~kept & ~usable(samples))
        gradients = jax.lax.cond(bad, again, lambda gradients: gradients, gradients)
        return _zero_unless_any(kept, PullBackPoints(gradients)), samples
