"""Hypergradients by their relative error: solves go on until the estimate of what a Newton correction left is met.

The first round asks both solves for a share of their sizes at the cold start; from a good warm start it is one Newton
step, and no more. Every later one asks for what the last one attained, times the factor by which the estimate is too
large; what the correction will remove by itself, as the last one did, need not be solved for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Hypergradient, SolveInfo, Status, Work
from jbilevel._oracle.batches import finite_mean

FIRST, POWER = 0.5, 0.9  # share of the cold start's residuals that the first round asks for: FIRST rtol^POWER
AIM = 0.5  # of the error that is asked for
LEAST = 1e-4  # factor on tolerances in one round
UNKNOWN = 0.03  # that where no error could be told
BETTER = 0.5  # of the error before: what is no such progress, so often in a row, ends it
STALLED = 3
ROUNDS = 30


class Round(NamedTuple):
    """What one round gave: the corrected hypergradient, and how far its correction moved it."""

    hypergradient: Hypergradient
    removed: Any


class Search(NamedTuple):
    tol: Any
    adjoint_tol: Any
    best: Hypergradient
    warm: Any
    lower: tuple[Any, Work, Any]  # steps and evaluations so far, and how the last solve ended
    adjoint: tuple[Any, Work, Any]
    rounds: Any
    stalled: Any
    ended: Any


def refined(compute: Callable, warm, sizes, rtol, counts) -> Hypergradient:
    """``compute(warm, tol, adjoint_tol) -> Round`` again and again, traced once.

    sizes: what tolerances of both solves are met by the cold start of each sample. counts: which have weight.
    """
    rtol = jnp.asarray(rtol, trees.dtype(warm.x))
    infinite = jnp.full_like(rtol, jnp.inf)
    empty = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(compute, warm, infinite, infinite)
    ).hypergradient
    nothing = empty.lower.steps, empty.lower.evaluations, empty.lower.status
    none = jnp.zeros((), jnp.int32)
    tol, adjoint_tol = ((FIRST * rtol**POWER * _mean(size, counts)).astype(rtol.dtype) for size in sizes)
    start = Search(
        tol=tol,
        adjoint_tol=adjoint_tol,
        best=empty._replace(error=jnp.full_like(empty.error, jnp.inf)),
        warm=warm,
        lower=nothing,
        adjoint=nothing,
        rounds=none,
        stalled=none,
        ended=jnp.asarray(False),
    )

    def again(search: Search) -> Search:
        return _next(search, compute(search.warm, search.tol, search.adjoint_tol), rtol, counts)

    last = jax.lax.while_loop(lambda search: ~search.ended, again, start)
    return _told(last, rtol, counts)


def _next(search: Search, made: Round, rtol, counts) -> Search:
    hg = made.hypergradient
    asked = rtol.astype(hg.error.dtype) * trees.norm(hg.grad)
    met = hg.error <= asked
    progress = (hg.error <= BETTER * search.best.error) | (search.rounds == 0)
    stalled = jnp.where(progress, 0, search.stalled + 1)
    status = jnp.maximum(*(jnp.max(jnp.where(counts, info.status, 0)) for info in (hg.lower, hg.adjoint)))
    missing = hg.error / jnp.where(asked > 0, AIM * asked, 1.0)
    left = jnp.clip(hg.error / jnp.where(made.removed > 0, made.removed, 1.0), LEAST, 1.0)
    factor = jnp.clip(1 / (missing * left), LEAST, 1.0)
    factor = jnp.where(jnp.isfinite(missing) & (asked > 0), factor, UNKNOWN).astype(rtol.dtype)
    rounds = search.rounds + 1
    lower = jnp.where(jnp.isfinite(hg.lower.error), hg.lower.error, hg.lower.residual)  # as tolerances count
    attained = (_mean(size, counts) for size in (lower, hg.adjoint.residual))
    tol, adjoint_tol = (
        (factor * jnp.minimum(before, size)).astype(rtol.dtype)
        for before, size in zip((search.tol, search.adjoint_tol), attained, strict=True)
    )
    return Search(
        tol=tol,
        adjoint_tol=adjoint_tol,
        best=trees.where((hg.error <= search.best.error) | ~jnp.isfinite(search.best.error), hg, search.best),
        warm=hg.warm,
        lower=_joined(search.lower, hg.lower),
        adjoint=_joined(search.adjoint, hg.adjoint),
        rounds=rounds,
        stalled=stalled.astype(jnp.int32),
        ended=met | (status > Status.CONVERGED) | (stalled >= STALLED) | (rounds >= ROUNDS),
    )


def _mean(sizes, counts):
    return finite_mean(jnp.where(counts, sizes, jnp.nan))


def _joined(before, info: SolveInfo):
    steps, evaluations, _ = before
    return steps + info.steps, evaluations.join(info.evaluations), info.status


def _told(search: Search, rtol, counts) -> Hypergradient:
    """The best round with the work of all. Where it does not do, statuses say what ended the last one: PRECISION if its
    solves were fine.
    """
    hg = search.best
    met = hg.error <= rtol.astype(hg.error.dtype) * trees.norm(hg.grad)

    def told(info: SolveInfo, spent, least) -> SolveInfo:
        steps, evaluations, last = spent
        # a solve that went as far as it can went far enough
        enough = jnp.where(info.status <= Status.STAGNATED, Status.CONVERGED, info.status)
        missed = jnp.maximum(jnp.maximum(info.status, last), jnp.where(counts, least, Status.CONVERGED))
        status = jnp.where(met, enough, missed).astype(jnp.int32)
        return info._replace(status=status, steps=steps, evaluations=evaluations)

    return hg._replace(
        lower=told(hg.lower, search.lower, Status.CONVERGED),
        adjoint=told(hg.adjoint, search.adjoint, Status.PRECISION),
    )
