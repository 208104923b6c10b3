"""Mini-batches and growing batches, with an accuracy that follows their noise or a schedule (Salehi et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import brief, trees
from jbilevel._core.optimizers import Optimizer, WithOptimizer
from jbilevel._core.results import Hypergradient, SolveInfo, Status, StepInfo
from jbilevel._method import steps, subsets
from jbilevel._method.base import Method, MethodState, compiled
from jbilevel._method.steps import Tolerances
from jbilevel._method.subsets import Subset
from jbilevel._oracle import batches
from jbilevel.quasi_newton import FIRST, QuasiNewton, QuasiNewtonState

__all__ = ["GrowingState", "Probes", "Stochastic", "StochasticState"]

SAMPLING = "sampling"
# of epochs, or steps, 0, 1, ...
SCHEDULES = {"decay": lambda k: (1.0 + k) ** -0.5}
START = 0.1  # of the scales at the cold start: the first accuracies

NOISE = 0.3  # share of the spread that an accuracy may move the gradient by
LEAST = 1e-3  # and of the gradient itself, where samples are all alike
LOOSE = 1 / 3  # of that: it may be looser
FACTOR = 3.0  # of a change of accuracy; of a probe
BINDING = 1e-3  # of a tolerance, attained: a solve that ends below does not feel it
FIRST_FACTOR = 10.0  # of the probes before the first step
FIRST_PROBES = 12
FIRST_COST = 3.0  # of such a probe, in the work of all before: no more of them once anything was solved
GAPS = (2, 40)  # least and most steps from probe to probe
MORE = "more samples to a batch, or a schedule here"  # cure of a batch that tells no noise
SPENT = 2.0  # least work from probe to probe, in that of the last one


class StochasticState(MethodState):
    optimizer: Any  # optax state
    count: Any  # steps taken
    first_tol: Any  # accuracies that a schedule scales
    first_adjoint_tol: Any
    probes: Probes


class GrowingState(QuasiNewtonState):
    subset: Subset


class Probes(NamedTuple):
    """When an accuracy was probed last, and when the next one is.

    >>> Probes.none(float).due()
    Array(True, dtype=bool)
    """

    turn: (
        Any  # of the accuracy that is probed next: 0 the lower level's, 1 the adjoint's; -1 both, before the first step
    )
    gap: Any  # steps from probe to probe
    steps: Any  # since the last one
    work: Any  # since the last one
    cost: Any  # work of the last one

    __repr__ = brief.record

    @classmethod
    def none(cls, dtype) -> Probes:
        zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), dtype)
        return cls(turn=zero - 1, gap=zero + GAPS[0], steps=zero, work=nothing, cost=nothing)

    def due(self):
        return (self.turn < 0) | ((self.steps >= self.gap) & (self.work >= SPENT * self.cost))

    def after(self, call: _Call, work) -> Probes:
        """``call``: the last one of a step, which spent ``work``."""
        rest = self._replace(steps=self.steps + 1, work=self.work + work)
        gap = jnp.where(call.changed | (self.turn < 0), GAPS[0], jnp.minimum(2 * self.gap, GAPS[1]))
        cost = call.hg.work.astype(work.dtype)
        turn = jnp.where(self.turn == 0, 1, 0).astype(jnp.int32)
        following = Probes(turn, gap.astype(jnp.int32), jnp.zeros_like(self.steps), jnp.zeros_like(work), cost)
        return trees.where(call.count > 1, following, rest)


class _Call(NamedTuple):
    """Of the oracle on one batch: the first, or a probe, which asks for the same with more accuracy."""

    count: Any
    hg: Hypergradient
    asked: Tolerances  # of this call
    next: Tolerances  # of the next one
    again: Any  # whether there is to be a next one
    held: Tolerances  # with which the next step begins
    changed: Any  # whether the last call changed them
    work: Any  # of all calls
    status: Any  # the worst of theirs

    def then(self, hg: Hypergradient, turn, due) -> _Call:
        """After the next call, which gave ``hg``: what it says of the accuracy before, and whether to ask again.

        turn: as of `Probes`. due: whether there is to be a probe after the first call.
        """
        first, starting = self.count == 0, turn < 0
        known, floor = jnp.isfinite(hg.spread), LEAST * trees.norm(hg.grad)
        limit = jnp.where(known, jnp.maximum(NOISE * hg.spread, floor), floor)
        move = trees.norm(trees.sub(hg.grad, self.hg.grad))
        # before the first step a zero says nothing: it may be that nothing was solved
        dear = (hg.work > FIRST_COST * self.work) & jnp.any(self.hg.lower.steps > 0)
        settled = (((move <= limit) | dear) & (limit > 0)) | (self.count >= FIRST_PROBES)
        tighten = (hg.status == Status.CONVERGED) & jnp.where(starting, ~settled, known & (move > limit))
        loosen = ~starting & known & (move < LOOSE * limit)
        held, following = [], []
        for part, (before, now) in enumerate(((self.hg.lower, hg.lower), (self.hg.adjoint, hg.adjoint))):
            judged = ~first & (starting | (turn == part))
            last, new, old = self.asked[part], self.next[part], self.held[part]
            changed = jnp.where(loosen & _binds(last, before), FACTOR * last, old)
            held.append(jnp.where(judged, jnp.where(tighten, new, changed), old))
            better = _better(new, _attained(now)) / jnp.where(starting, FIRST_FACTOR, FACTOR)
            following.append(jnp.where(starting | (turn == part), better, new))
        fine = jnp.isfinite(hg.value) & trees.all_finite(hg.grad)
        return _Call(
            count=self.count + 1,
            hg=hg,
            asked=self.next,
            next=Tolerances(*following),
            again=fine & jnp.where(first, due, starting & tighten),
            held=Tolerances(*held),
            changed=jnp.any(jnp.stack(held) != jnp.stack(self.held)),
            work=self.work + hg.work,
            status=jnp.maximum(self.status, hg.status),
        )


@dataclass(frozen=True)
class _Growing(QuasiNewton):
    """Quasi-Newton descent on nested subsets of the batch that grow as the noise of their hypergradients asks for.

    Whatever would end it ends it on the whole batch only.
    """

    seed: int = 0

    def init(self, params, batch) -> GrowingState:
        count, chunk = batches.split(batch, self.oracle.in_axes.tree()).count, self.oracle.chunk_size
        if count > subsets.FIRST:
            _require_chunks(self.oracle, batch, "take jb.QuasiNewton")
        chunk = count if chunk is None else min(chunk, count)
        subset = Subset.first(jax.random.key(self.seed), self._weights(batch, count), chunk)
        return GrowingState(**vars(super().init(params, batch)), subset=subset)

    @compiled
    def step(self, state: GrowingState, batch) -> tuple[GrowingState, StepInfo]:
        following, info = super().step(state, batch)
        point, subset = following.point, state.subset
        subset = trees.where(following.taken > state.taken, subset.saw(point.spread, point.size), subset)
        grow = ~subset.whole & (following.done | subset.noisy)
        following = replace(following, subset=subset)
        following = trees.where(grow, self._grown(following), following)
        return following, info._replace(done=info.done & ~grow, stationary=info.stationary & ~grow)

    def _ask(self, state: GrowingState, batch, weight=None):
        weight = state.subset.weigh(self._weights(batch, state.subset.place.size))
        return super()._ask(state, *batches.weighed(batch, weight))

    def _weights(self, batch, count):
        own = batches.weights(batch, None)
        return jnp.ones((count,)) if own is None else jnp.asarray(own, float)

    def _grown(self, state: GrowingState) -> GrowingState:
        """Next comes a first look at the best point with more samples; memory, radius and accuracies stay."""
        none, no = jnp.zeros_like(state.failures), jnp.zeros_like(state.done)
        # a descent that came to its end may have made its steps as short as the rounding of values
        radius = jnp.where(state.done, jnp.maximum(state.radius, state.jam.longest), state.radius)
        state = replace(
            state, subset=state.subset.grown(), point=state.best, excursion=state.excursion._replace(on=no),
            radius=radius, failures=none, contradictions=none, flat=no, done=no,
        )  # fmt: skip
        return self._here(state, FIRST, state.accuracy, state.accuracy.eps, state.accuracy.delta)


@dataclass(frozen=True)
class Stochastic(WithOptimizer, Method):
    """Stochastic hypergradients: batches that change, moved by an optimiser, or one that is used more and more.

    Without an ``optimizer`` nothing has to be tuned. It is the rule of `jb.QuasiNewton` on nested subsets of ONE full
    batch. Samples (whole chunks of the oracle) join in a random order, first 16 of them. Once the standard error of the
    hypergradient (its `spread` times sqrt(1 - n/N), for n of N samples) is more than three times its norm, in a running
    mean over accepted steps, n doubles: model, radius and accuracies stay, values begin anew. Until n = N all values
    and gradients that are told are those of the subset, and the method never ends; then it is `jb.QuasiNewton`. Samples
    that have not joined cost nothing. A ``"sample_weight"`` of the batch multiplies; samples of weight 0 never join.

    With an ``optimizer``, params+ = P(params + optax update(hypergradient of a batch)).
    Batches may change from step to step; with an entry ``"index"``, `jb.fit` gives each sample its own warm start.
    The accuracies follow ``accuracy``:

    - "sampling": no finer than the noise of the batch. From time to time the same batch is solved again with one of
      the two accuracies three times better than what was attained, in turn. Where that moves the hypergradient by more
      than 0.3 of its `spread`, the accuracy is tightened by three, where by less than 0.1 loosened. Probes are at least
      2 and, while nothing changes, at most 40 steps apart, and cost at most a third of the work. Before the first
      step the accuracies are improved tenfold until that is within the noise, or costs three times all before.
    - "decay" or a function: the first accuracies times (1 + k)^(-1/2), or times function(k), where k = 0, 1, ... counts
      the epochs, of ``epoch`` steps each.

    Constant accuracies are those of `jb.FirstOrder`.

    Args:
      oracle: any hypergradient oracle. For "sampling" with at least two chunks in a batch, the more the better: on a
        CPU, where samples are solved one by one, it has them; elsewhere give it ``chunk=1`` or a few samples.
      optimizer: an optax ``GradientTransformation``, also one that reads the ``value``, such as
        `optax.contrib.momo_adam`; or a function without arguments that makes one, which a method needs to be pickled.
        None: quasi-Newton descent on a growing batch.
      accuracy: "sampling", "decay", or a traceable function from k to a positive number.
      tol, adjoint_tol: first accuracies; None takes 0.1 of the sizes at the cold start, measured by ``init``.
      epoch: steps, of a schedule.
      projection: ``params -> params``, applied after each update; without an optimizer onto a convex set.
      seed: of the order in which samples join.
      log_error: see `jb.Method`.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`, or ``optimizer`` is none of optax.
      ValueError: no such accuracy, one that is not positive at 0, or an ``epoch`` that is no positive number; in
        ``init`` and ``step``: "sampling" on batches that the oracle solves as a single chunk, which tells no noise
        (without an optimizer: on more than 16 samples). An accuracy, tolerance or epoch without an optimizer.

    >>> import jbilevel as jb, jax.numpy as jnp, numpy as np, optax
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    >>> oracle = problem.oracle(lambda p, x, d: 0.5 * (x - 3.0) ** 2, in_axes=0, chunk=1)  # x_hat = p d
    >>> data = 2.0 + 0.1 * np.random.default_rng(0).standard_normal((100, 5))  # batches of five
    >>> result = jb.fit(Stochastic(oracle, optax.adam(0.1)), jnp.array(1.0), lambda k: data[k % 100], steps=100)
    >>> round(float(result.params), 1)
    1.5
    >>> result = jb.fit(Stochastic(oracle), jnp.array(1.0), data.ravel(), steps=20)  # 16 of 500 samples, then more
    >>> round(float(result.params), 1), result.work < 500 * 20
    (1.5, True)

    Reference: Salehi, Mukherjee, Roberts & Ehrhardt, Bilevel Learning via Inexact Stochastic Gradient Descent (2025),
    for the descent and its schedules; "sampling" is ours.
    """

    optimizer: Optimizer | None = None
    _: KW_ONLY
    accuracy: str | Callable = SAMPLING
    tol: float | None = None
    adjoint_tol: float | None = None
    epoch: int = 1
    projection: Callable | None = None
    seed: int = 0

    def __post_init__(self):
        Method.__post_init__(self)
        if self.optimizer is not None:
            WithOptimizer.__post_init__(self)
        if not callable(self.accuracy) and self.accuracy not in (SAMPLING, *SCHEDULES):
            known = ", ".join(repr(name) for name in (SAMPLING, *SCHEDULES))
            raise ValueError(f"`accuracy` must be {known} or a function of the epoch, got {self.accuracy!r}.")
        if callable(self.accuracy) and not 0 < float(factor := self.accuracy(0)) < jnp.inf:
            raise ValueError(f"`accuracy` must give a positive number, but gives {float(factor)} at 0.")
        if not self.epoch >= 1:
            raise ValueError(f"`epoch` must be a positive number of steps, got {self.epoch}.")
        if self.optimizer is None:
            self._require_defaults()

    def _require_defaults(self) -> None:
        defaults = {"accuracy": SAMPLING, "tol": None, "adjoint_tol": None, "epoch": 1}
        for name, default in defaults.items():
            if (given := vars(self)[name]) != default:
                raise ValueError(
                    f"`{name}`={given!r} of Stochastic is for descents with an `optimizer`, such as optax.adam(1e-2); "
                    "give one, or leave it out: accuracies are then set by probing."
                )

    @property
    def compares_values(self) -> bool:
        return self.optimizer is None

    @property
    def looks_ahead(self) -> bool:
        return self.optimizer is None

    @property
    def grows_batch(self) -> bool:
        return self.optimizer is None

    @property
    def _growing(self) -> _Growing:
        return _Growing(self.oracle, projection=self.projection, seed=self.seed, log_error=self.log_error)

    def init(self, params, batch) -> StochasticState | GrowingState:
        if self.optimizer is None:
            return self._growing.init(params, batch)
        if self._probing:
            _require_chunks(self.oracle, batch, MORE)
        params = steps.project(self.projection, params)
        first = steps.first_tolerances(self.asked, params, batch, START, self.tol, self.adjoint_tol)
        count = jnp.zeros((), jnp.int32)
        now = self._scheduled(first, count)
        return StochasticState(
            params=params,
            warm=self.oracle.init(params, batch),
            tol=now.tol,
            adjoint_tol=now.adjoint_tol,
            optimizer=self.transformation().init(params),
            count=count,
            first_tol=first.tol,
            first_adjoint_tol=first.adjoint_tol,
            probes=Probes.none(first.tol.dtype),
        )

    @compiled
    def step(self, state, batch) -> tuple[StochasticState | GrowingState, StepInfo]:
        if self.optimizer is None:
            return self._growing.step(state, batch)
        call = self._probed(state, batch) if self._probing else self._plain(state, batch)
        moved = steps.optax_step(self.transformation(), self.projection, state.params, state.optimizer, call.hg)
        following = replace(
            state,
            params=moved.params,
            warm=call.hg.warm,
            tol=call.held.tol,
            adjoint_tol=call.held.adjoint_tol,
            optimizer=moved.optimizer,
            count=state.count + 1,
            probes=state.probes.after(call, call.work.astype(state.probes.work.dtype)),
        )
        return following, self.report(call.hg, call.asked, step=moved.step, work=call.work, status=call.status)

    @property
    def _probing(self) -> bool:
        return self.accuracy == SAMPLING and not self.oracle.exact

    def _scheduled(self, first: Tolerances, count) -> Tolerances:
        if self.accuracy == SAMPLING:
            return first
        schedule = self.accuracy if callable(self.accuracy) else SCHEDULES[self.accuracy]
        factor = schedule(count // self.epoch)
        return Tolerances(*(jnp.asarray(factor * tol, tol.dtype) for tol in first))

    def _plain(self, state: StochasticState, batch) -> _Call:
        asked = Tolerances(state.tol, state.adjoint_tol)
        hg = self.asked(state.params, batch, state.warm, tol=asked.tol, adjoint_tol=asked.adjoint_tol)
        held = self._scheduled(Tolerances(state.first_tol, state.first_adjoint_tol), state.count + 1)
        return _Call(
            count=jnp.ones((), jnp.int32),
            hg=hg,
            asked=asked,
            next=asked,
            again=jnp.asarray(False),
            held=held,
            changed=jnp.asarray(False),
            work=hg.work,
            status=hg.status,
        )

    def _probed(self, state: StochasticState, batch) -> _Call:
        """The last call on this batch, after the probes that are due. A loop, so that the oracle is compiled once."""
        _require_chunks(self.oracle, batch, MORE)
        turn, due = state.probes.turn, state.probes.due()
        begin = Tolerances(state.tol, state.adjoint_tol)

        def ask(call: _Call) -> _Call:
            tol, adjoint_tol = call.next
            return call.then(self.asked(state.params, batch, call.hg.warm, tol=tol, adjoint_tol=adjoint_tol), turn, due)

        nothing = steps.no_hypergradient(self.asked, state.params, batch, state.warm)
        none = _Call(
            count=jnp.zeros((), jnp.int32),
            hg=nothing,
            asked=begin,
            next=begin,
            again=jnp.asarray(True),
            held=begin,
            changed=jnp.asarray(False),
            work=nothing.work,
            status=nothing.status,
        )
        return jax.lax.while_loop(lambda call: call.again, ask, none)


def tells_noise(oracle, batch) -> bool:
    """Whether the oracle solves the batch in several chunks, whose hypergradients differ by their noise."""
    size = oracle.chunk_size
    return size is not None and size < batches.split(batch, oracle.in_axes.tree()).count


def _require_chunks(oracle, batch, otherwise: str) -> None:
    if not tells_noise(oracle, batch):
        count = batches.split(batch, oracle.in_axes.tree()).count
        raise ValueError(
            f"`accuracy`='sampling' compares the chunks of a batch, and the oracle solves all {count} samples of this "
            f"one in a single chunk; give the oracle `chunk=1`, {otherwise}."
        )


def _attained(info: SolveInfo):
    """Mean over the samples of what a tolerance is compared with."""
    return batches.finite_mean(jnp.where(jnp.isfinite(info.error), info.error, info.residual))


def _better(tol, attained):
    return jnp.where(attained > 0, jnp.minimum(tol, attained), tol).astype(tol.dtype)


def _binds(tol, info: SolveInfo):
    """Whether a looser tolerance would change a solve; without steps, or far below, it would only grow for ever."""
    return jnp.any(info.steps > 0) & (_attained(info) >= BINDING * tol)


def __dir__():
    return __all__
