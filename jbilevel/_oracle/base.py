"""What every hypergradient oracle shares: batching, mean, sample weights, warm starts, statuses, values.

An oracle turns (params, batch, warm start, tolerances) into a value, and a hypergradient, with their errors. A kind of
oracle (implicit, unrolled, ...) supplies what is done for one sample; this file does the rest once for all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._core import trees
from jbilevel._core.contracts import Contract
from jbilevel._core.results import Hypergradient, SolveInfo, Status, Value, Warm
from jbilevel._core.validate import refuse_derivatives, require_hashable, validate_arrays
from jbilevel._oracle.bounds import remaining
from jbilevel.solvers import require_tolerance

FAILURES = ("nan", "drop")


class Sample(NamedTuple):
    """What a kind of oracle reports about one sample."""

    value: Any  # upper-level value at the computed x
    shift: Any  # its signed first-order error (value - shift is the corrected value)
    estimate: Any  # of |value - shift - exact|
    bound: Any  # proven bound on the error of the value that the batch mean uses, inf where unknown
    gradient_bound: Any  # proven bound on this sample's hypergradient error, inf where unknown
    residual_ratio: Any  # share of the residuals that a Newton correction left
    warm: Warm
    lower: SolveInfo
    adjoint: SolveInfo


class PullBackPoints(NamedTuple):
    """Where the pull-back takes place: as computed, and half-way and all the way through a Newton correction."""

    plain: Any
    halfway: Any = None
    corrected: Any = None


@dataclass(frozen=True)
class Axes:
    """A pytree of sample axes as a hashable value, so that oracles can be static arguments of jit."""

    leaves: tuple
    treedef: Any

    @classmethod
    def of(cls, in_axes):
        if isinstance(in_axes, Axes):
            return in_axes
        leaves, treedef = jax.tree.flatten(in_axes, is_leaf=lambda a: a is None)
        if not all(leaf is None or isinstance(leaf, int) for leaf in leaves):
            raise TypeError(f"`in_axes` must hold integers and None, as for jax.vmap, got {in_axes}.")
        return cls(tuple(leaves), treedef)

    def tree(self):
        return jax.tree.unflatten(self.treedef, self.leaves)


@dataclass(frozen=True, kw_only=True)
class Oracle(Contract, abstract=True):
    """Turns (params, batch, warm start, accuracies) into the value and the hypergradient of a batch, with their errors.

    An oracle is static configuration (a frozen dataclass). What is done for ONE sample is supplied by a kind of oracle:
    `PullBackOracle` solves and then pulls an adjoint back to the parameters, `ForwardOracle` differentiates its own
    forward pass. Batches, means, weights, warm starts and statuses are here.

    Args:
      in_axes: sample axes of the batch, as for `jax.vmap`.
      on_failure: "nan": one bad sample makes the mean NaN; "drop": it leaves the mean.
      chunk: samples solved at a time; None: all at once; "auto": one on a CPU, all elsewhere.
    """

    in_axes: Any = 0
    on_failure: str = "nan"
    chunk: int | str | None = "auto"

    exact: ClassVar[bool] = False  # whether results do not depend on the tolerances
    correct: ClassVar[bool] = False  # whether the Newton-corrected hypergradient is returned
    matmul_precision: ClassVar[str | None] = "highest"  # of float32 products; None: the caller's

    def __post_init__(self):
        object.__setattr__(self, "in_axes", Axes.of(self.in_axes))
        if self.on_failure not in FAILURES:
            raise ValueError(f"`on_failure` of an oracle must be one of {FAILURES}, got {self.on_failure!r}.")
        if self.chunk not in (None, "auto") and not (isinstance(self.chunk, int) and self.chunk >= 1):
            raise ValueError(f"`chunk` must be a positive number of samples, None or 'auto', got {self.chunk!r}.")
        require_hashable(self)

    @abstractmethod
    def start(self, params, data) -> Warm:
        """The cold start of one sample."""

    @abstractmethod
    def sample_value(self, params, data, warm: Warm, tol) -> Sample:
        """The value of one sample, without an adjoint solve."""

    @abstractmethod
    def gradients(self, params, chunk: Chunk, tol, adjoint_tol) -> tuple[PullBackPoints, Sample]:
        """Weighted sums of the hypergradients of some samples at each of their points, and what is told of each."""

    def without_estimate(self) -> Oracle:
        """The same without the error estimate of the hypergradient, for methods that do not read it."""
        return self

    @property
    def chunk_size(self) -> int | None:
        # in lockstep every sample takes the steps of the slowest: a gain only where one sample leaves the device idle
        if self.chunk == "auto":
            return 1 if jax.default_backend() == "cpu" else None
        return self.chunk

    @property
    def corrects(self) -> bool:
        """Whether a Newton correction is computed, to be returned or as an error estimate."""
        return False

    def missing(self, certified: bool) -> str | None:
        """What has to be passed (where) for values to come with estimated, or with proven errors; None if nothing."""
        return None

    def unknown_error(self, dtype):
        """The error reported where none is estimated."""
        return jnp.asarray(jnp.inf, dtype)

    def check(self, params) -> None:
        """Refuse params that the problem refuses, while their values are concrete."""

    def init(self, params, batch):
        """Cold warm start of every sample: fixed structure and shapes, so passing it never recompiles."""
        # before jit, whose own message would not say what to do
        _validate_params(params)
        validate_arrays(batch, "batch")
        return _init(self, params, batch)

    def value(self, params, batch, warm=None, *, tol=1e-6, sample_weight=None) -> Value:
        """Mean upper-level value, without any adjoint solve (for line searches).

        Args: as for `__call__`. The adjoint in ``warm``, where there is one, sharpens value and error for free.
        """
        params, batch = refuse_derivatives((params, batch), "of an oracle", "call the oracle and read `.grad`")
        warm, tol = self._canonical(params, batch, warm, sample_weight, tol=tol)
        return _value(self, params, batch, warm, tol, sample_weight)

    def __call__(self, params, batch, warm=None, *, tol=1e-6, adjoint_tol=None, sample_weight=None) -> Hypergradient:
        """Mean value and hypergradient over the batch.

        Args:
          params: pytree of arrays. batch: pytree with a leading sample axis where in_axes says so.
          warm: from ``init`` or a previous result (x and adjoint of each sample); cold when None.
          tol: bound asked for ``||x - x_hat||_2`` per sample (``||grad||`` without strong convexity).
          adjoint_tol: residual asked of the adjoint system per sample; tol when None. Both are traced.
          sample_weight: (n,) nonnegative weights of the mean; uniform when None.

        Raises:
          ValueError: negative tolerance or weight, or leaves of the batch with different numbers of samples.
          TypeError: a leaf of params or batch is not an array, or warm is not a `Warm`.
        """
        adjoint_tol = tol if adjoint_tol is None else adjoint_tol
        params, batch = refuse_derivatives((params, batch), "of an oracle", "read `.grad`, or use jb.implicit.argmin")
        warm, *tols = self._canonical(params, batch, warm, sample_weight, tol=tol, adjoint_tol=adjoint_tol)
        return _hypergradient(self, params, batch, warm, *tols, sample_weight)

    def _canonical(self, params, batch, warm, sample_weight, **tolerances):
        """(warm, *tolerances) in one form whatever the caller gave, so that only one program is ever compiled.

        What needs concrete values is checked here, before anything is traced.
        """
        _validate_params(params)
        self.check(params)
        validate_arrays(batch, "batch")
        warm = self.init(params, batch) if warm is None else warm
        if not isinstance(warm, Warm):
            raise TypeError(f"`warm` must come from init or from a previous result, got {type(warm).__name__}.")
        if sample_weight is not None and not isinstance(sample_weight, jax.core.Tracer):
            if not np.all(np.asarray(sample_weight) >= 0):
                raise ValueError("`sample_weight` must hold nonnegative numbers.")
        return warm, *(require_tolerance(tol, name, warm.x, stacklevel=4) for name, tol in tolerances.items())


def require_view(problem, view_type: type, name: str, wanted: str, instead: str) -> None:
    """TypeError unless ``problem`` is one whose view is of this kind, as that of a ``wanted`` is."""
    if not isinstance(problem, Contract) or not issubclass(problem.view_type, view_type):
        kind = type(problem).__name__
        raise TypeError(f"{name} needs a {wanted}, got {kind}; {instead}.")


class _Split(NamedTuple):
    """A batch as (mapped leaves with the sample axis in front, shared leaves) and the way back."""

    mapped: list
    shared: list
    is_mapped: tuple
    treedef: Any
    count: int

    def data(self, mapped):
        pools = {True: iter(mapped), False: iter(self.shared)}
        return jax.tree.unflatten(self.treedef, [next(pools[flag]) for flag in self.is_mapped])


def _split(batch, in_axes) -> _Split:
    validate_arrays(batch, "batch")
    leaves, treedef = jax.tree.flatten(batch)
    axes = []
    try:
        # None is a leaf of in_axes (a shared part) but not of the batch (an absent one)
        jax.tree.map(
            lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part))), in_axes, batch,
            is_leaf=lambda a: a is None,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"`in_axes` {in_axes} is not a prefix of the batch's structure {treedef}.") from error
    mapped, shared, counts = [], [], []
    for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(batch), axes, strict=True):
        if axis is None:
            shared.append(leaf)
            continue
        name = f"batch{jax.tree_util.keystr(path)}"
        if not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            raise ValueError(f"{name} has shape {jnp.shape(leaf)} and no sample axis {axis}; set in_axes=None for it.")
        mapped.append(jnp.moveaxis(jnp.asarray(leaf), axis, 0))
        counts.append((name, mapped[-1].shape[0]))
    if not counts:
        raise ValueError("no leaf of the batch has a sample axis; give at least one an integer in `in_axes`.")
    if len({count for _, count in counts}) > 1:
        raise ValueError(f"leaves of the batch disagree on the number of samples: {dict(counts)}.")
    if counts[0][1] == 0:
        raise ValueError("the batch holds no samples.")
    return _Split(mapped, shared, tuple(axis is not None for axis in axes), treedef, counts[0][1])


class Chunk(NamedTuple):
    """Samples that are solved together."""

    split: _Split
    mapped: list
    start: Warm
    weight: Any
    may_leave: bool  # whether some may have to leave the mean

    def kept(self, oracle: Oracle, samples: Sample):
        """Which samples count: not those of weight 0, nor, with on_failure="drop", bad ones."""
        kept = self.weight != 0
        return kept & _usable(samples) if oracle.on_failure == "drop" else kept


@partial(jax.jit, static_argnums=0)
def _init(oracle, params, batch):
    split = _split(batch, oracle.in_axes.tree())
    with _products(oracle):
        return jax.vmap(lambda mapped: oracle.start(params, split.data(mapped)))(split.mapped)


def _products(oracle):
    return jax.default_matmul_precision(oracle.matmul_precision or jax.config.jax_default_matmul_precision)


def _validate_params(params) -> None:
    validate_arrays(params, "params")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not trees.is_inexact(leaf):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}, which has no gradient; move it "
                "into the data or use jb.partition."
            )


def _prepare(oracle, params, batch, warm, sample_weight):
    _validate_params(params)
    split = _split(batch, oracle.in_axes.tree())
    for path, leaf in jax.tree_util.tree_leaves_with_path(warm):
        if jnp.shape(leaf)[:1] != (split.count,):
            raise ValueError(
                f"warm{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but the batch has {split.count} "
                "samples; a warm start belongs to the samples it came from."
            )
    dtype = jnp.result_type(trees.dtype(params), jnp.float32)
    if sample_weight is None:
        return split, jnp.full((split.count,), 1.0 / split.count, dtype)
    weight = jnp.asarray(sample_weight, dtype)
    if weight.shape != (split.count,):
        raise ValueError(f"`sample_weight` must have shape ({split.count},), got {weight.shape}.")
    # weights that say nothing (traced and negative, or all zero) make every mean NaN
    weight = jnp.where(weight >= 0, weight, jnp.nan)
    return split, weight / jnp.sum(weight)


def _in_chunks(evaluate, size, carry, inputs, weight):
    """``carry, outs = evaluate(carry, inputs, weight)`` over chunks of ``size`` samples, scanned.

    The last chunk is padded with copies of the last sample, of weight 0.
    """
    count = weight.shape[0]
    if size is None or size >= count:
        return evaluate(carry, (inputs, weight))
    pad = -count % size

    def fold(leaf):
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[-1:], pad, axis=0)]) if pad else leaf
        return leaf.reshape((count + pad) // size, size, *leaf.shape[1:])

    weights = jnp.concatenate([weight, jnp.zeros((pad,), weight.dtype)]).reshape(-1, size)
    carry, outs = jax.lax.scan(evaluate, carry, (jax.tree.map(fold, inputs), weights))
    return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], outs)


def over_samples(function):
    """vmap, but a single sample runs as itself: a batched loop copies its state at each step to freeze samples."""

    def run(*arguments):
        if jax.tree.leaves(arguments)[0].shape[0] > 1:
            return jax.vmap(function)(*arguments)
        single = jax.tree.map(lambda leaf: leaf[0], arguments)
        return jax.tree.map(lambda leaf: leaf[None], function(*single))

    return run


def _named(sample: Sample) -> Sample:
    """A loss that is not finite gets a status too: the solves of that sample never saw what only the loss reads."""
    status = jnp.maximum(sample.lower.status, jnp.where(jnp.isfinite(sample.value), 0, Status.NONFINITE)).astype(
        jnp.int32
    )
    return sample._replace(lower=sample.lower._replace(status=status))


def _usable(sample: Sample):
    """Whether a sample's numbers mean anything: not so after NaN, or with an indefinite Hessian in the adjoint."""
    return jnp.maximum(sample.lower.status, sample.adjoint.status) < Status.INDEFINITE


@partial(jax.jit, static_argnums=0)
def _value(oracle, params, batch, warm, tol, sample_weight) -> Value:
    split, weight = _prepare(oracle, params, batch, warm, sample_weight)

    def evaluate(carry, chunk):
        (mapped, start), _ = chunk
        with _products(oracle):
            samples = over_samples(lambda m, w: oracle.sample_value(params, split.data(m), w, tol))(mapped, start)
        return carry, _named(samples)

    _, samples = _in_chunks(evaluate, oracle.chunk_size, None, (split.mapped, warm), weight)
    samples, weight = _account(oracle, samples, weight)
    value, error, bound = _mean_value(oracle, samples, weight)
    return Value(value, error, bound, samples.value, samples.lower, samples.warm)


def _account(oracle, samples: Sample, weight):
    """Samples and weights of the mean: unusable samples are NaN, or (on_failure="drop") leave it."""
    usable = _usable(samples)
    samples = samples._replace(value=jnp.where(usable, samples.value, jnp.nan))
    if oracle.on_failure == "nan":
        return samples, weight
    weight = jnp.where(usable, weight, 0.0)
    return samples, weight / jnp.sum(weight)


def _mean(values, weight):
    """Weighted mean without the samples of weight 0, NaN where no sample is left (their weights are 0/0)."""
    mean = jnp.sum(jnp.where(weight > 0, weight * values, 0.0))
    return jnp.where(jnp.isnan(jnp.sum(weight)), jnp.nan, mean)


def _infinite_unless(finite, error):
    """Nothing is known about the error of a mean that is NaN."""
    return jnp.where(finite & ~jnp.isnan(error), error, jnp.inf)


def _mean_value(oracle, samples: Sample, weight):
    value, shift = _mean(samples.value, weight), _mean(samples.shift, weight)
    estimate, bound = _mean(samples.estimate, weight), _mean(samples.bound, weight)
    finite = jnp.isfinite(value)
    estimate, bound = _infinite_unless(finite, estimate), _infinite_unless(finite, bound)
    if oracle.correct:
        return value - shift, estimate, bound
    return value, _infinite_unless(finite, jnp.abs(shift) + estimate), bound


@partial(jax.jit, static_argnums=0)
def _hypergradient(oracle, params, batch, warm, tol, adjoint_tol, sample_weight) -> Hypergradient:
    split, weight = _prepare(oracle, params, batch, warm, sample_weight)

    def evaluate(total, chunk):
        (mapped, start), chunk_weight = chunk
        may_leave = sample_weight is not None or oracle.on_failure == "drop"
        with _products(oracle):
            some = Chunk(split, mapped, start, weight=chunk_weight, may_leave=may_leave)
            gradients, samples = oracle.gradients(params, some, tol, adjoint_tol)
        return jax.tree.map(jnp.add, total, gradients), samples

    zero = trees.zeros_like(params)
    total = PullBackPoints(zero, zero if oracle.correct else None, zero if oracle.corrects else None)
    total, samples = _in_chunks(evaluate, oracle.chunk_size, total, (split.mapped, warm), weight)
    kept = jnp.sum(jnp.where(_usable(samples), weight, 0.0)) if oracle.on_failure == "drop" else 1.0
    total = jax.tree.map(lambda leaf: (leaf / kept).astype(leaf.dtype), total)
    samples, weight = _account(oracle, samples, weight)
    value, value_error, value_bound = _mean_value(oracle, samples, weight)
    grad = total.corrected if oracle.correct else total.plain
    grad = trees.where(jnp.isfinite(value), grad, jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grad))
    finite = jnp.isfinite(value) & trees.all_finite(grad)
    samples = _blamed(samples, finite | ~jnp.isfinite(value))
    error = _infinite_unless(finite, _gradient_error(oracle, total, samples, weight))
    bound = _infinite_unless(finite, _mean(samples.gradient_bound, weight))
    values = samples.value - samples.shift if oracle.correct else samples.value
    return Hypergradient(
        value, values, value_error, value_bound, grad, error, jnp.isfinite(bound), bound,
        samples.warm, samples.lower, samples.adjoint,
    )  # fmt: skip


def _blamed(samples: Sample, fine) -> Sample:
    """A gradient that is not finite though every value is: nobody knows of which sample, so no adjoint is fine."""
    status = jnp.where(fine, samples.adjoint.status, Status.NONFINITE).astype(jnp.int32)
    return samples._replace(adjoint=samples.adjoint._replace(status=status))


def _without(kept, leaves, weight):
    """Other samples replaced by a kept one of weight 0 before anything is differentiated, because 0 * NaN is NaN."""
    chosen = jnp.where(kept, jnp.arange(kept.size), jnp.argmax(kept))
    return jax.tree.map(lambda leaf: leaf[chosen], leaves), jnp.where(kept, weight, 0.0)


def _zero_unless_any(kept, gradients: PullBackPoints) -> PullBackPoints:
    """A chunk without a kept sample adds nothing."""
    return jax.tree.map(lambda leaf: jnp.where(jnp.any(kept), leaf, 0.0), gradients)


@dataclass(frozen=True, kw_only=True)
class PullBackOracle(Oracle, abstract=True):
    """Oracle of a kind that solves for each sample, and then pulls what it found back to the parameters."""

    @abstractmethod
    def sample(self, params, data, warm: Warm, tol, adjoint_tol) -> tuple[Sample, PullBackPoints]:
        """Both solves of one sample, and where their pull-back takes place."""

    @abstractmethod
    def surrogate(self, params, data, point) -> Any:
        """A scalar whose gradient in params is the hypergradient of one sample, at a point of `sample`."""

    def gradients(self, params, chunk: Chunk, tol, adjoint_tol):
        solve = over_samples(lambda m, w: self.sample(params, chunk.split.data(m), w, tol, adjoint_tol))
        samples, points = solve(chunk.mapped, chunk.start)
        samples, mapped, weight = _named(samples), chunk.mapped, chunk.weight
        kept = chunk.kept(self, samples)
        if chunk.may_leave:
            (mapped, points), weight = _without(kept, (mapped, points), weight)

        def weighted(params, points):
            values = over_samples(lambda m, point: self.surrogate(params, chunk.split.data(m), point))(mapped, points)
            return jnp.sum(weight * values)

        found = PullBackPoints(*(None if point is None else jax.grad(weighted)(params, point) for point in points))
        return _zero_unless_any(kept, found) if chunk.may_leave else found, samples


@dataclass(frozen=True, kw_only=True)
class ForwardOracle(Oracle, abstract=True):
    """Oracle of a kind that differentiates its own forward pass."""

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
        samples = _named(samples)
        if not chunk.may_leave:
            return PullBackPoints(gradients), samples
        kept = chunk.kept(self, samples)

        def again(_):
            # only the forward pass tells which samples are bad, so they leave in a second pass
            (mapped, start), weight = _without(kept, (chunk.mapped, chunk.start), chunk.weight)
            return differentiate(params, mapped, start, weight)[0]

        bad = jnp.any(~kept & ~_usable(samples))
        gradients = jax.lax.cond(bad, again, lambda gradients: gradients, gradients)
        return _zero_unless_any(kept, PullBackPoints(gradients)), samples


def _gradient_error(oracle, total: PullBackPoints, samples: Sample, weight):
    if oracle.correct:
        moved_first = trees.norm(trees.sub(total.halfway, total.plain))
        moved_last = trees.norm(trees.sub(total.corrected, total.halfway))
        return remaining(moved_first, moved_last, jnp.max(jnp.where(weight > 0, samples.residual_ratio, 0.0)))
    if oracle.corrects:
        # a Newton step that met negative curvature tells nothing
        known = jnp.all(jnp.isfinite(samples.residual_ratio) | (weight == 0))
        return jnp.where(known, trees.norm(trees.sub(total.corrected, total.plain)), jnp.inf)
    return oracle.unknown_error(weight.dtype)
