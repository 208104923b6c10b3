"""Accuracies that are set by probing: how far the hypergradient moves when one of them alone is refined.

A probe asks at the same params for an accuracy three times finer than what was asked for and attained. Accuracies are
never derived from the decrease that a step is expected to bring: a short step would then ask for an accuracy that makes
the next one shorter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

EPS, DELTA, BOTH = range(3)  # what a probe refines

FIRST = 0.1  # of the scales at the cold start
START_FACTOR = 10.0  # by which accuracies are refined before the first step, until the gradient stays
START_CAP = 2.0  # cost of such a refinement, against all work before, that ends them
STARTS = 10
MOVED, STAYED = 0.5, 0.2  # share by which a probe moves the gradient: tighten above, loosen below
FACTOR = 3.0  # of a probe, and of a change
GAPS = (2, 10, 40)  # accepted steps to the next probe: after tightening, after loosening or at first, and at most


class Accuracy(NamedTuple):
    eps: Any  # of the lower level
    delta: Any  # of the adjoint
    noise: Any  # change of the value in the last probe of eps
    need: Any  # the largest one that a probe of both leaves as it is
    kind: Any  # what the probe under way refines
    turn: Any  # which is probed next
    gap: Any
    next: Any  # in accepted steps
    last: Any

    @classmethod
    def first(cls, tol, adjoint_tol) -> Accuracy:
        zero, infinite = jnp.zeros_like(tol), jnp.full_like(tol, jnp.inf)
        none = jnp.zeros((), jnp.int32)
        return cls(
            eps=tol, delta=adjoint_tol, noise=zero, need=infinite, kind=none + EPS, turn=none + EPS,
            gap=none + GAPS[1], next=none + GAPS[1], last=none - GAPS[1],
        )  # fmt: skip

    def finer(self, lower, adjoint):
        """(eps, delta) a factor finer than asked for and attained: a warm solve would else find nothing to do."""
        better = lambda asked, attained: jnp.where(attained > 0, jnp.minimum(asked, attained), asked) / FACTOR  # noqa: E731
        return better(self.eps, lower), better(self.delta, adjoint)

    def judged(self, moved, change, lower, adjoint, *, taken, failing) -> Accuracy:
        """After a probe that moved the gradient by this share, and the value by ``change``, from the attained errors.

        taken: accepted steps so far. failing: whether it was due to failures, and says nothing of when to probe next.
        """
        both, of_eps, of_delta = self.kind == BOTH, self.kind != DELTA, self.kind != EPS
        noise = jnp.where(of_eps, jnp.abs(change), self.noise)
        felt = (~of_eps | (lower >= self.eps / FACTOR)) & (~of_delta | (adjoint >= self.delta / FACTOR))
        tighten = (moved > MOVED) | (both & (noise > self.need))
        loosen = (moved < STAYED) & ~both & felt
        factor = jnp.where(tighten, 1 / FACTOR, jnp.where(loosen, FACTOR, 1.0))
        gap = jnp.where(tighten, GAPS[0], jnp.where(loosen, GAPS[1], jnp.minimum(2 * self.gap, GAPS[2])))
        gap = jnp.where(failing, self.gap, gap).astype(jnp.int32)
        return self._replace(
            eps=jnp.where(of_eps, factor, 1.0) * self.eps,
            delta=jnp.where(of_delta, factor, 1.0) * self.delta,
            noise=noise,
            turn=jnp.where(both, self.turn, 1 - self.turn).astype(jnp.int32),
            gap=gap,
            next=jnp.where(failing, self.next, taken + gap).astype(jnp.int32),
        )
