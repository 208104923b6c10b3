"""What is told of each sample, and what it makes of the batch: values, errors, statuses."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import brief, trees
from jbilevel._core.results import SolveInfo, Status, Warm, names
from jbilevel._oracle import batches
from jbilevel._oracle.bounds import remaining, removed_and_left

ROUNDING = 4.0  # of a loss, in units of that of its value


class Sample(NamedTuple):
    """What a kind of oracle reports about one sample. What is left out is not known, or zero for one that is exact.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> info = jb.SolveInfo.exact(1.0)
    >>> jb.Sample(value=jnp.array(0.5), warm=jb.Warm(None, None), lower=info, adjoint=info)
    Sample(value=0.5, warm=Warm(x=None, adjoint=None), lower=CONVERGED, adjoint=CONVERGED)
    """

    value: Any  # upper-level value at the computed x
    warm: Warm
    lower: SolveInfo
    adjoint: SolveInfo
    shift: Any = None  # signed first-order error of the value (value - shift is the corrected value); 0
    estimate: Any = None  # of |value - shift - exact|; inf
    bound: Any = None  # proven bound on the error of the value that the batch mean uses; inf
    gradient_bound: Any = None  # proven bound on this sample's hypergradient error; inf
    corrected_bound: Any = None  # the same after a correction that is not returned; inf
    left: Any = None  # error that a Newton correction left, against the one that it removed; 0

    def __repr__(self) -> str:
        return brief.record(self, lower=names(self.lower.status), adjoint=names(self.adjoint.status))

    def filled(self, exact: bool) -> Sample:
        """With arrays in place of what was left out."""
        zero = jnp.zeros_like(self.value)
        unknown = zero if exact else jnp.full_like(self.value, jnp.inf)
        defaults = {
            "shift": zero,
            "left": zero,
            "estimate": unknown,
            "bound": unknown,
            "gradient_bound": unknown,
            "corrected_bound": unknown,
        }
        given = self._asdict()
        return self._replace(**{name: v for name, v in defaults.items() if given[name] is None})


class PullBackPoints(NamedTuple):
    """Where the pull-back takes place: as computed, and half-way and all the way through a Newton correction."""

    plain: Any
    halfway: Any = None
    corrected: Any = None

    def returned(self, oracle):
        """What is there of the point whose hypergradient the oracle returns."""
        return self.corrected if oracle.correct else self.plain


def named(oracle, sample: Sample) -> Sample:
    """A loss that is not finite gets a status too: the solves of that sample never saw what only the loss reads."""
    sample = sample.filled(oracle.exact)
    status = jnp.maximum(sample.lower.status, jnp.where(jnp.isfinite(sample.value), 0, Status.NONFINITE)).astype(
        jnp.int32
    )
    return sample._replace(lower=sample.lower._replace(status=status))


def usable(sample: Sample):
    """Whether a sample's numbers mean anything: not so after NaN, or with an indefinite Hessian in the adjoint."""
    return jnp.maximum(sample.lower.status, sample.adjoint.status) < Status.INDEFINITE


def without_padding(samples: Sample, start: Warm, weight) -> Sample:
    """Of a sample of weight 0 nothing is told, whether it was solved beside others or not at all; work stays."""
    padding = weight == 0

    def told(info: SolveInfo) -> SolveInfo:
        return info._replace(
            steps=jnp.where(padding, 0, info.steps),
            residual=jnp.where(padding, jnp.nan, info.residual),
            error=jnp.where(padding, jnp.inf, info.error),
        )

    def kept(start, leaf):
        return jnp.where(jnp.reshape(padding, (-1,) + (1,) * (leaf.ndim - 1)), start, leaf)

    return samples._replace(
        value=jnp.where(padding, jnp.nan, samples.value),
        warm=jax.tree.map(kept, start, samples.warm),
        lower=told(samples.lower),
        adjoint=told(samples.adjoint),
    )


def account(oracle, samples: Sample, weight):
    """Samples and weights of the mean: unusable samples are NaN, or (on_failure="drop") leave it.

    The status of padding does not count; weights that say nothing are NONFINITE for every sample.
    """
    good = usable(samples)
    status = jnp.where(weight == 0, Status.CONVERGED, samples.lower.status)
    status = jnp.where(jnp.isnan(weight), Status.NONFINITE, status).astype(jnp.int32)
    adjoint = jnp.where(weight == 0, Status.CONVERGED, samples.adjoint.status).astype(jnp.int32)
    samples = samples._replace(
        value=jnp.where(good, samples.value, jnp.nan),
        lower=samples.lower._replace(status=status),
        adjoint=samples.adjoint._replace(status=adjoint),
    )
    if oracle.on_failure == "nan":
        return samples, weight
    weight = jnp.where(good, weight, 0.0)
    return samples, weight / jnp.sum(weight)


class MeanValue(NamedTuple):
    value: Any
    error: Any
    bound: Any
    shift: Any  # what the value is too large by, to first order


def mean_value(oracle, samples: Sample, weight) -> MeanValue:
    value, shift = batches.mean(samples.value, weight), batches.mean(samples.shift, weight)
    estimate, bound = batches.mean(samples.estimate, weight), batches.mean(samples.bound, weight)
    finite = jnp.isfinite(value)
    rounding = ROUNDING * jnp.finfo(value.dtype).eps * jnp.abs(value)
    estimate, bound = batches.infinite_unless(finite, estimate), batches.infinite_unless(finite, bound)
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    if oracle.correct:
        return MeanValue(value - shift, estimate + rounding, bound, jnp.zeros_like(shift))
    error = batches.infinite_unless(finite, jnp.abs(shift) + estimate + rounding)
    return MeanValue(value, error, bound, shift)


def gradient_bound(oracle, total: PullBackPoints, samples: Sample, weight):
    """A correction that is not returned proves more than the plain bound: how far it is, and how far it may be off."""
    bound = batches.mean(samples.gradient_bound, weight)
    if not oracle.corrects or oracle.correct:
        return bound
    moved = trees.norm(trees.sub(total.corrected, total.plain))
    return jnp.fmin(bound, moved.astype(bound.dtype) + batches.mean(samples.corrected_bound, weight))


def blamed(samples: Sample, fine) -> Sample:
    """A gradient that is not finite though every value is: nobody knows of which sample, so no adjoint is fine."""
    status = jnp.where(fine, samples.adjoint.status, Status.NONFINITE).astype(jnp.int32)
    return samples._replace(adjoint=samples.adjoint._replace(status=status))


def gradient_error(oracle, total: PullBackPoints, samples: Sample, weight):
    if not oracle.corrects:
        return oracle.unknown_error(weight.dtype)
    moved = [trees.norm(trees.sub(a, b)) for a, b in itertools.pairwise((total.plain, total.halfway, total.corrected))]
    left = jnp.max(jnp.where(weight > 0, samples.left, 0.0))
    if oracle.correct:
        return remaining(*moved, left)
    return removed_and_left(trees.norm(trees.sub(total.corrected, total.plain)), *moved, left)
