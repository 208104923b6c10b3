"""What every hypergradient oracle shares: batching, mean, sample weights, warm starts, statuses, values.

An oracle turns (params, batch, warm start, tolerances) into a value, and a hypergradient, with their errors. A kind of
oracle (implicit, unrolled, ...) supplies what is done for one sample; this file does the rest once for all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.contracts import Contract
from jbilevel._core.recompilation import note_compilation
from jbilevel._core.results import Hypergradient, Value, Warm, say_if_unsolved
from jbilevel._core.settings import own_settings
from jbilevel._core.validate import arrays, refuse_derivatives, require_hashable
from jbilevel._oracle import batches, relative
from jbilevel._oracle.batches import Axes, Split, in_chunks, inputs, over_samples, weights
from jbilevel._oracle.batches import split as split_batch
from jbilevel._oracle.relative import Round
from jbilevel._oracle.samples import (
    PullBackPoints,
    Sample,
    account,
    blamed,
    gradient_bound,
    gradient_error,
    mean_value,
    named,
    usable,
    without_padding,
)
from jbilevel._oracle.spread import Scatter
from jbilevel._views.base import Problem
from jbilevel.solvers import require_rtol, require_tolerance
from jbilevel.solvers.loop import RELATIVE

FAILURES = ("nan", "drop")


class Scales(NamedTuple):
    """Sizes at the cold start, against which tolerances are relative (absolute ones do not transfer)."""

    solution: Any  # mean over samples of ||grad_x energy(x0)||/mu (of ||grad_x energy(x0)|| without mu)
    adjoint: Any  # mean over samples of ||grad_x loss(x0)||


@dataclass(frozen=True, kw_only=True)
class Oracle(Contract, abstract="jb.Oracle"):
    """Turns (params, batch, warm start, accuracies) into the value and the hypergradient of a batch, with their errors.

    An oracle is static configuration (a frozen dataclass). What is done for ONE sample is supplied by a kind of oracle:
    `PullBackOracle` solves and then pulls an adjoint back to the parameters, `ForwardOracle` differentiates its own
    forward pass. Batches, means, weights, warm starts and statuses are here.

    Args:
      in_axes: sample axes of the batch, as for `jax.vmap`.
      on_failure: "nan": one bad sample makes the mean NaN; "drop": it leaves the mean.
      chunk: samples solved at a time; None: all at once; "auto": one on a CPU, all elsewhere.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> oracle = jb.explicit.Oracle(lambda p, d: 0.5 * (p - d) ** 2, on_failure="drop")
    >>> params, batch = jnp.array(0.0), jnp.array([1.0, 3.0, jnp.nan])
    >>> hg = oracle(params, batch, oracle.init(params, batch))
    >>> float(hg.value), float(hg.grad), hg.values.tolist(), hg.lower.status.tolist()
    (2.5, -2.0, [0.5, 4.5, nan], [0, 0, 5])
    """

    in_axes: Any = Axes.of(0)
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

    def corrected(self) -> Oracle:
        """The same that returns Newton-corrected hypergradients with their errors, as ``rtol`` needs."""
        if not self.exact:
            raise ValueError(
                f"`rtol` needs an oracle that estimates the error of its hypergradients, which {type(self).__name__} "
                "does not; use `tol`, or the oracle of the problem: problem.oracle(loss)."
            )
        return self

    def sizes(self, params, data) -> Scales:
        """Tolerances of both solves that the cold start of one sample meets; 0 where tolerances have no say."""
        return Scales(jnp.zeros(()), jnp.zeros(()))

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

    @own_settings
    def init(self, params, batch):
        """Cold warm start of every sample: fixed structure and shapes, so passing it never recompiles."""
        # before jit, whose own message would not say what to do
        params, batch = inputs(params, batch)
        return _init(self, params, batch)

    @own_settings
    def scales(self, params, batch, sample_weight=None) -> Scales:
        """Ask for nothing: infinite tolerances return the cold start with its residuals. Padding has no say."""
        first = self(params, batch, tol=jnp.inf, adjoint_tol=jnp.inf, sample_weight=sample_weight)
        solution = jnp.where(jnp.isfinite(first.lower.error), first.lower.error, first.lower.residual)
        weight = weights(batch, sample_weight)
        counts = True if weight is None else weight > 0
        return Scales(
            *(batches.finite_mean(jnp.where(counts, size, jnp.nan)) for size in (solution, first.adjoint.residual))
        )

    def cold_scales(self, params, batch, sample_weight=None) -> Scales:
        """The same from `sizes`, without a program that solves."""
        params, batch = inputs(params, batch)
        return _cold_scales(self, params, batch, weights(batch, sample_weight))

    @own_settings
    def value(self, params, batch, warm=None, *, tol=None, sample_weight=None) -> Value:
        """Mean upper-level value, without any adjoint solve (for line searches).

        Args: as for `__call__`. The adjoint in ``warm``, where there is one, sharpens value and error for free.
        """
        params, batch = refuse_derivatives((params, batch), "of an oracle", "call the oracle and read `.grad`")
        call = self._canonical(params, batch, warm, sample_weight, tol=tol)
        result = _value(self, *call)
        if warm is None and not self.exact:
            say_if_unsolved("tol", tol, result.lower)
        return result

    @own_settings
    def __call__(
        self, params, batch, warm=None, *, rtol=None, tol=None, adjoint_tol=None, sample_weight=None
    ) -> Hypergradient:
        """Mean value and hypergradient over the batch.

        Args:
          rtol: relative error of ``grad`` that is asked for, by its own estimate: ``error <= rtol ||grad||_2``. Both
            solves are then refined, warm, as far as the estimate needs, and what is returned is the Newton-corrected
            hypergradient (as with ``correct=True``). Where it cannot be met a status says why, PRECISION at the floor
            of the dtype, and ``error`` is what was reached. In place of ``tol`` and ``adjoint_tol``; traced.
          params: pytree of arrays. batch: pytree with a leading sample axis where in_axes says so. A mapping may hold
            the weights of its samples, shape (n,), under "sample_weight".
          warm: from ``init`` or a previous result (x and adjoint of each sample); cold when None. What of it is not
            finite is replaced by the cold start, and dtypes are those of the cold start.
          tol: bound asked for ``||x - x_hat||_2`` per sample (``||grad||`` without strong convexity); None: 1e-6 of
            what it is at the cold start, in the mean over the samples.
          adjoint_tol: residual asked of the adjoint system per sample. None: tol where that is given, else 1e-6 of
            what it is at the cold start. Both are traced.
          sample_weight: (n,) nonnegative weights of the mean; uniform when None. A sample of weight 0 is padding: it is
            not solved, its value and residuals are NaN, its warm start stays, and its status does not count. A chunk
            of them costs nothing: with ``chunk=1`` a batch costs what its samples with weight cost.

        Raises:
          ValueError: negative tolerance or weight, weights without a finite positive sum or given twice, leaves of
            the batch with different numbers of samples, ``rtol`` beside another tolerance or to an oracle that
            estimates no errors.
          TypeError: a leaf of params or batch is not an array, or warm is not a `Warm`.

        Warns where no sample takes a step from its cold start because the tolerance is larger than what there is to
        solve.
        """
        params, batch = refuse_derivatives((params, batch), "of an oracle", "read `.grad`, or use jb.implicit.argmin")
        if rtol is not None:
            return self._by_error(params, batch, warm, sample_weight, rtol, (tol, adjoint_tol))
        asked = tol if adjoint_tol is None else adjoint_tol
        call = self._canonical(params, batch, warm, sample_weight, tol=tol, adjoint_tol=asked)
        result = _hypergradient(self, *call)
        if warm is None and not self.exact:
            say_if_unsolved("tol", tol, result.lower)
            say_if_unsolved("adjoint_tol", asked, result.adjoint)
        return result

    def _by_error(self, params, batch, warm, sample_weight, rtol, others) -> Hypergradient:
        if any(tol is not None for tol in others):
            raise ValueError("`rtol` of an oracle stands in place of `tol` and `adjoint_tol`; leave those out.")
        require_rtol(rtol)
        oracle = self.corrected()
        params, batch, warm, rtol, weight = oracle._canonical(params, batch, warm, sample_weight, rtol=rtol)
        if self.exact:
            return _hypergradient(self, params, batch, warm, rtol, rtol, weight)
        return _relative(oracle, params, batch, warm, rtol, weight)

    def _canonical(self, params, batch, warm, sample_weight, **tolerances):
        """(params, batch, warm, *tolerances, weights) in one form whatever the caller gave, so that only one program is
        ever compiled.

        What needs concrete values is checked here, before anything is traced.
        """
        params, batch = inputs(params, batch)
        self.check(params)
        weight = weights(batch, sample_weight)
        warm = self.init(params, batch) if warm is None else warm
        if not isinstance(warm, Warm):
            raise TypeError(f"`warm` must come from init or from a previous result, got {type(warm).__name__}.")
        warm = _like(arrays(warm, "warm"), jax.eval_shape(partial(_init, self), params, batch))
        given = {name: tol for name, tol in tolerances.items() if tol is not None}
        given = {name: require_tolerance(tol, name, warm.x, stacklevel=5) for name, tol in given.items()}
        if len(given) < len(tolerances):
            scales = Scales(0.0, 0.0) if self.exact else self.scales(params, batch, sample_weight)
            default = {"tol": RELATIVE * scales.solution, "adjoint_tol": RELATIVE * scales.adjoint}
            given = {name: jnp.asarray(default[name], trees.dtype(warm.x)) for name in tolerances} | given
        return params, batch, warm, *(given[name] for name in tolerances), weight


def require_view(problem, view_type: type, name: str, wanted: str, instead: str) -> None:
    """TypeError unless ``problem`` is one whose view is of this kind, as that of a ``wanted`` is."""
    if not isinstance(problem, Problem) or not issubclass(problem.view_type, view_type):
        kind = type(problem).__name__
        raise TypeError(f"{name} needs a {wanted}, got {kind}; {instead}.")


class Chunk(NamedTuple):
    """Samples that are solved together."""

    split: Split
    mapped: list
    start: Warm
    weight: Any
    may_leave: bool  # whether some may have to leave the mean

    def over(self, solve: Callable):
        """``solve(mapped, warm, ask)`` over the samples; ``ask`` of a tolerance: infinite for one of weight 0."""
        if not self.may_leave:
            return over_samples(lambda m, w: solve(m, w, lambda tol: tol))(self.mapped, self.start)

        def one(mapped, warm, weight):
            return solve(mapped, warm, lambda tol: jnp.where(weight == 0, jnp.inf, tol))

        return over_samples(one)(self.mapped, self.start, self.weight)

    def kept(self, oracle: Oracle, samples: Sample):
        """Which samples count: not those of weight 0, nor, with on_failure="drop", bad ones."""
        kept = self.weight != 0
        return kept & usable(samples) if oracle.on_failure == "drop" else kept


@partial(jax.jit, static_argnums=0)
def _init(oracle, params, batch):
    split = split_batch(batch, oracle.in_axes.tree())
    with _products(oracle):
        return _cold(oracle, params, split, split.mapped)


def _cold(oracle, params, split: Split, mapped) -> Warm:
    return jax.vmap(lambda one: oracle.start(params, split.data(one)))(mapped)


def _alive(oracle, params, split: Split, mapped, warm: Warm) -> Warm:
    """The warm starts, with the cold one where x, or the adjoint, of a sample is not finite; else it stays bad."""

    def finite(part):
        each = [jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(part)]
        return reduce(jnp.logical_and, each, jnp.asarray(True))

    fine = [finite(part) for part in warm]

    def replaced(_):
        cold = _cold(oracle, params, split, mapped)
        return Warm(
            *(
                jax.tree.map(
                    lambda w, c, ok=ok: jnp.where(jnp.reshape(ok, (-1,) + (1,) * (w.ndim - 1)), w, c), part, start
                )
                for ok, part, start in zip(fine, warm, cold, strict=True)
            )
        )

    def where_needed(_):
        # a cold start may cost as much as some steps
        return jax.lax.cond(jnp.all(fine[0]) & jnp.all(fine[1]), lambda _: warm, replaced, None)

    # on a GPU a branch would ask the host
    return jax.lax.platform_dependent(None, cpu=where_needed, default=replaced)


def _products(oracle):
    return jax.default_matmul_precision(oracle.matmul_precision or jax.config.jax_default_matmul_precision)


def _like(warm, cold):
    """The warm start in the dtypes of the cold one: another would pull the whole solve with it."""
    if jax.tree.structure(warm) != jax.tree.structure(cold):
        raise ValueError(
            f"`warm` has the structure {jax.tree.structure(warm)}, this oracle starts from {jax.tree.structure(cold)}."
        )
    same = all(w.dtype == c.dtype for w, c in zip(jax.tree.leaves(warm), jax.tree.leaves(cold), strict=True))
    return warm if same else trees.cast_like(warm, cold)


def _prepare(oracle, params, batch, warm, sample_weight):
    split = split_batch(batch, oracle.in_axes.tree())
    for path, leaf in jax.tree_util.tree_leaves_with_path(warm):
        if jnp.shape(leaf)[:1] != (split.count,):
            raise ValueError(
                f"warm{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but the batch has {split.count} "
                "samples; a warm start belongs to the samples it came from."
            )
    return split, _mean_weights(split, sample_weight, jnp.result_type(trees.dtype(params), jnp.float32))


def _mean_weights(split: Split, sample_weight, dtype):
    """Of the samples in the mean, with sum 1."""
    if sample_weight is None:
        return jnp.full((split.count,), 1.0 / split.count, dtype)
    weight = jnp.asarray(sample_weight)
    if weight.shape != (split.count,):
        raise ValueError(f"`sample_weight` must have shape ({split.count},), got {weight.shape}.")
    usable_weights = jnp.all(jnp.isfinite(weight) & (weight >= 0))
    if jnp.issubdtype(weight.dtype, jnp.floating):  # traced ones, as in `weights`
        weight = jnp.ldexp(weight, -jnp.frexp(jnp.max(weight))[1])
    # weights that say nothing (traced and negative, infinite, or all zero) make every mean NaN
    weight = jnp.where(usable_weights, weight, jnp.nan).astype(dtype)
    return weight / jnp.sum(weight)


@partial(jax.jit, static_argnums=0)
def _value(oracle, params, batch, warm, tol, sample_weight) -> Value:
    note_compilation(oracle)
    split, weight = _prepare(oracle, params, batch, warm, sample_weight)

    def evaluate(carry, chunk):
        (mapped, start), chunk_weight = chunk
        with _products(oracle):
            start = _alive(oracle, params, split, mapped, start)
            some = Chunk(split, mapped, start, weight=chunk_weight, may_leave=sample_weight is not None)
            samples = some.over(lambda m, w, ask: oracle.sample_value(params, split.data(m), w, ask(tol)))
        return carry, named(oracle, samples)

    weighted = sample_weight is not None
    _, samples = in_chunks(evaluate, oracle.chunk_size, None, (split.mapped, warm), weight, may_skip=weighted)
    samples = without_padding(samples, warm, weight) if weighted else samples
    samples, weight = account(oracle, samples, weight)
    value = mean_value(oracle, samples, weight)
    return Value(
        value=value.value,
        error=value.error,
        bound=value.bound,
        shift=value.shift,
        values=samples.value,
        lower=samples.lower,
        warm=samples.warm,
    )


@partial(jax.jit, static_argnums=0)
def _hypergradient(oracle, params, batch, warm, tol, adjoint_tol, sample_weight) -> Hypergradient:
    note_compilation(oracle)
    return _round(oracle, params, batch, warm, tol, adjoint_tol, sample_weight).hypergradient


def _sizes(oracle, params, split: Split, weight) -> Scales:
    def evaluate(carry, chunk):
        with _products(oracle):
            return carry, over_samples(lambda one: oracle.sizes(params, split.data(one)))(chunk[0])

    return in_chunks(evaluate, oracle.chunk_size, None, split.mapped, weight, may_skip=False)[1]


@partial(jax.jit, static_argnums=0)
def _cold_scales(oracle, params, batch, sample_weight) -> Scales:
    split = split_batch(batch, oracle.in_axes.tree())
    weight = _mean_weights(split, sample_weight, jnp.result_type(trees.dtype(params), jnp.float32))
    sizes = _sizes(oracle, params, split, weight)
    return Scales(*(batches.finite_mean(jnp.where(weight > 0, size, jnp.nan)) for size in sizes))


@partial(jax.jit, static_argnums=0)
def _relative(oracle, params, batch, warm, rtol, sample_weight) -> Hypergradient:
    note_compilation(oracle)
    split, weight = _prepare(oracle, params, batch, warm, sample_weight)
    counts = weight > 0
    sizes = _sizes(oracle, params, split, weight)

    def compute(warm, tol, adjoint_tol):
        return _round(oracle, params, batch, warm, tol, adjoint_tol, sample_weight)

    return relative.refined(compute, warm, sizes, rtol, counts)


def _round(oracle, params, batch, warm, tol, adjoint_tol, sample_weight) -> Round:
    split, weight = _prepare(oracle, params, batch, warm, sample_weight)

    def evaluate(carry, chunk):
        total, scatter = carry
        (mapped, start), chunk_weight = chunk
        may_leave = sample_weight is not None or oracle.on_failure == "drop"
        with _products(oracle):
            start = _alive(oracle, params, split, mapped, start)
            some = Chunk(split, mapped, start, weight=chunk_weight, may_leave=may_leave)
            gradients, samples = oracle.gradients(params, some, tol, adjoint_tol)
        if oracle.on_failure == "drop":
            chunk_weight = jnp.where(usable(samples), chunk_weight, 0.0)
        scatter = scatter.add(total.returned(oracle), gradients.returned(oracle), chunk_weight)
        return (jax.tree.map(jnp.add, total, gradients), scatter), samples

    zero = trees.zeros_like(params)
    total = PullBackPoints(zero, *((zero if oracle.corrects else None,) * 2))
    weighted = sample_weight is not None
    carry = total, Scatter.zero(weight.dtype)
    carry, samples = in_chunks(evaluate, oracle.chunk_size, carry, (split.mapped, warm), weight, may_skip=weighted)
    total, scatter = carry
    samples = without_padding(samples, warm, weight) if weighted else samples
    kept = jnp.sum(jnp.where(usable(samples), weight, 0.0)) if oracle.on_failure == "drop" else 1.0
    total = jax.tree.map(lambda leaf: (leaf / kept).astype(leaf.dtype), total)
    samples, weight = account(oracle, samples, weight)
    value, value_error, value_bound, shift = mean_value(oracle, samples, weight)
    grad = total.returned(oracle)
    grad = trees.where(jnp.isfinite(value), grad, jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grad))
    finite = jnp.isfinite(value) & trees.all_finite(grad)
    samples = blamed(samples, finite | ~jnp.isfinite(value))
    error = batches.infinite_unless(finite, gradient_error(oracle, total, samples, weight))
    bound = batches.infinite_unless(finite, gradient_bound(oracle, total, samples, weight))
    removed = trees.norm(trees.sub(total.corrected, total.plain)) if oracle.corrects else jnp.zeros_like(error)
    made = Hypergradient(
        value=value,
        values=samples.value - samples.shift if oracle.correct else samples.value,
        value_error=value_error,
        value_bound=value_bound,
        shift=shift,
        grad=grad,
        spread=batches.infinite_unless(finite, scatter.standard_error()),
        error=error,
        certified=jnp.isfinite(bound),
        bound=bound,
        warm=samples.warm,
        lower=samples.lower,
        adjoint=samples.adjoint,
    )
    return Round(made, removed)
