"""What solvers, oracles and methods return: statuses with sentences, infos, values and hypergradients."""

from __future__ import annotations

import enum
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._core import brief

RUNNING = -1  # internal: a loop that has not stopped yet


class Status(enum.IntEnum):
    """How a solve ended; larger is worse, so the status of a batch is the maximum over its samples.

    >>> import jbilevel as jb
    >>> jb.Status(3).name, jb.Status.MAX_STEPS > jb.Status.CONVERGED
    ('MAX_STEPS', True)
    >>> jb.Status.MAX_STEPS.message
    'The step limit was reached before the tolerance; raise `max_steps`, loosen `tol` or warm-start.'
    """

    CONVERGED = 0
    PRECISION = 1
    STAGNATED = 2
    MAX_STEPS = 3
    INDEFINITE = 4
    NONFINITE = 5
    NORM_BOUND = 6
    SMOOTHNESS = 7
    PRECONDITIONER = 8
    CONVEXITY = 9
    ADJOINT = 10
    PROX = 11

    @property
    def message(self) -> str:
        """A full sentence that says what happened and what to do."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "The tolerance was met.",
    Status.PRECISION: (
        "The solve attained the precision of its dtype before the tolerance; ask for a looser `tol` or use float64."
    ),
    Status.STAGNATED: (
        "The residual stopped decreasing above the tolerance; check that `smoothness` is not too small and that "
        "the energy is differentiable, or try another solver."
    ),
    Status.MAX_STEPS: "The step limit was reached before the tolerance; raise `max_steps`, loosen `tol` or warm-start.",
    Status.INDEFINITE: (
        "The Hessian is not positive definite here, so conjugate gradients do not apply; use "
        "`linear_solver=jb.solvers.MINRES()` or make the energy strongly convex."
    ),
    Status.NONFINITE: (
        "NaN or infinity appeared; check the data and the parameters of this sample, and that no step or "
        "`smoothness` constant is too optimistic."
    ),
    Status.NORM_BOUND: (
        "The linear operator stretched a vector by more than `norm` says, so the steps are too long; pass a true bound "
        "on its norm, or `norm=None`."
    ),
    Status.SMOOTHNESS: (
        "The gradient changed faster than `smoothness` says, so the steps are too long; pass a true bound on the "
        "Hessian's norm, or `smoothness=None`."
    ),
    Status.PRECONDITIONER: (
        "The preconditioner M is not positive definite, <r, M r> <= 0 for a residual r; pass one that is, or "
        "`linear_solver=jb.solvers.CG()`."
    ),
    Status.CONVEXITY: (
        "The energy curves less than `strong_convexity` says, so no error bound holds; pass a modulus that is smaller, "
        "or `strong_convexity=None`."
    ),
    Status.ADJOINT: (
        "`transpose` is not the transpose of `linear`: <K x, y> and <x, K* y> differ; mend it, leave it out for that "
        "of JAX, or say `exact_adjoint=False`, and nothing is proven."
    ),
    Status.PROX: (
        "`prox_primal` or `prox_dual` is no proximal map, <p - q, v - w> < ||p - q||^2 for its values p, q at v, w; "
        "`problem.verify(params, data)` says which."
    ),
}


def names(status) -> str:
    """The names of status codes, with the number of samples that have each where there are several.

    >>> names(np.array([0, 3, 0]))
    '2 CONVERGED and 1 MAX_STEPS'
    """
    if status is None or not brief.known(status):
        return brief.brief(status)
    codes, counts = np.unique(np.asarray(status), return_counts=True)
    found = [Status(code).name if code in set(Status) else f"{code}" for code in codes.tolist()]
    if np.ndim(status):
        found = [f"{count} {name}" for count, name in zip(counts, found, strict=True)]
    return " and ".join(found)


class ConvergenceError(RuntimeError):
    """A solve did not reach its tolerance; the message names the sample, the status and the residual.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> info = jb.SolveInfo.exact(jnp.nan)
    >>> try:
    ...     jb.check(info)
    ... except jb.ConvergenceError as error:
    ...     print(error)
    the lower-level solve ended NONFINITE with residual 0.00e+00: NaN or infinity appeared; check the data ...
    """


class Work(NamedTuple):
    """Evaluations of the lower-level energy: values, gradients, Hessian-vector products (one each).

    >>> import jbilevel as jb
    >>> spent = jb.Work.zero().plus(gradients=3, products=4)
    >>> spent.join(spent), int(spent.total)
    (Work(values=0, gradients=6, products=8), 7)
    """

    values: Any
    gradients: Any
    products: Any

    def __repr__(self) -> str:
        return brief.record(self, **{name: brief.span(count) for name, count in self._asdict().items()})

    @classmethod
    def zero(cls) -> Work:
        return cls(*(jnp.zeros((), jnp.int32) for _ in range(3)))

    def plus(self, values=0, gradients=0, products=0) -> Work:
        counts = (self.values + values, self.gradients + gradients, self.products + products)
        return Work(*(jnp.asarray(c, jnp.int32) for c in counts))

    def join(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def total(self):
        """Gradient-equivalents: every value, gradient and product counts one (values and products cost less)."""
        return self.values + self.gradients + self.products


class SolveInfo(NamedTuple):
    """How one solve ended. Every field has a leading batch axis when the solve was batched.

    status: int32 code of `Status`; steps: int32; residual: final residual norm;
    error: proven bound on ||x - x_hat||_2 for the unrounded x_hat of the problem as it is stored, inf where none is
    known (by rounding, `jb.View.unrounded`, it may exceed a tolerance that was met); evaluations: `Work`.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> info = jb.SolveInfo.exact(jnp.ones(2))
    >>> info
    SolveInfo(status=2 CONVERGED, steps=0, residual=0, error=0, evaluations=Work(values=0, gradients=1, products=0))
    >>> bool(jnp.all(info.status == jb.Status.CONVERGED)), int(info.work)
    (True, 1)
    """

    status: Any
    steps: Any
    residual: Any
    error: Any
    evaluations: Work

    def __repr__(self) -> str:
        spans = {name: brief.span(number) for name, number in self._asdict().items()}
        return brief.record(self, **spans | {"status": names(self.status), "evaluations": repr(self.evaluations)})

    @property
    def work(self):
        """Gradient-equivalents spent (see `Work.total`)."""
        return self.evaluations.total

    @classmethod
    def exact(cls, like) -> SolveInfo:
        """Of a solve that is exact up to rounding, in the dtype of a number: NONFINITE where that is not finite."""
        zero, like = jnp.zeros((), jnp.int32), jnp.asarray(like)
        status = jnp.where(jnp.isfinite(like), Status.CONVERGED, Status.NONFINITE).astype(jnp.int32)
        none = jnp.zeros_like(like)
        return cls(status, zero, residual=none, error=none, evaluations=Work.zero().plus(gradients=1))


class Warm(NamedTuple):
    """Where the next solves start: the lower-level unknown and the adjoint (``None`` for oracles without one).

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.variational(None, jb.regularizers.SmoothedTV(eps=0.01))
    >>> oracle = problem.oracle(jb.losses.squared_error())
    >>> oracle.init(jnp.zeros(1, "float32"), jnp.zeros((8, 4, 4), "float32"))  # of eight images
    Warm(x=float32[8,4,4], adjoint=float32[8,4,4])
    """

    x: Any
    adjoint: Any

    __repr__ = brief.record


class Value(NamedTuple):
    """Upper-level value of a batch, without any adjoint solve.

    value: weighted mean; error: estimate of |value - exact|; bound: proven bound (inf where none is known);
    shift: what the value is too large by, to first order, with its sign: value - shift is better (0 where that is
    already taken away, with correct=True, or nothing is known; ``error`` counts it); values: per sample; lower:
    per-sample `SolveInfo`; warm: next warm start.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> found = oracle.value(jnp.array(0.0), jnp.array([1.0, 3.0]))
    >>> float(found.value), found.values.tolist(), int(found.status), int(found.work)
    (2.5, [0.5, 4.5], 0, 2)
    """

    value: Any
    error: Any
    bound: Any
    shift: Any
    values: Any
    lower: SolveInfo
    warm: Warm

    def __repr__(self) -> str:
        return brief.record(self, lower=names(self.lower.status))

    @property
    def status(self):
        """Worst status of the batch."""
        return jnp.max(self.lower.status)

    @property
    def work(self):
        """Gradient-equivalents over the batch."""
        return jnp.sum(self.lower.work)


class Hypergradient(NamedTuple):
    """Value and hypergradient of a batch, with their errors.

    value, values: weighted mean and per-sample upper-level values; value_error, value_bound, shift: as in `Value`;
    grad: pytree like params, direct plus indirect part; spread: estimate of the standard error (2-norm) of ``grad`` as
    that of the mean over the population that the samples were drawn from, from how the oracle's chunks differ (single
    samples with ``chunk=1``); inf where fewer than two of them have weight; error: estimate of the 2-norm error of the
    `grad` returned (with correct=True: of what remains); certified, bound: a proven bound on that error when certified,
    else inf; warm: next warm start; lower, adjoint: per-sample `SolveInfo`.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> hg = oracle(jnp.array(0.0), jnp.array([1.0, 3.0]))
    >>> float(hg.value), float(hg.grad), float(hg.error), bool(hg.certified)
    (2.5, -2.0, 0.0, True)
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2, chunk=1)  # gradients -1 and -3
    >>> float(oracle(jnp.array(0.0), jnp.array([1.0, 3.0])).spread)
    1.0
    """

    value: Any
    values: Any
    value_error: Any
    value_bound: Any
    shift: Any
    grad: Any
    spread: Any
    error: Any
    certified: Any
    bound: Any
    warm: Warm
    lower: SolveInfo
    adjoint: SolveInfo

    def __repr__(self) -> str:
        return brief.record(self, lower=names(self.lower.status), adjoint=names(self.adjoint.status))

    @property
    def status(self):
        """Worst status over samples and over both solves."""
        return jnp.maximum(jnp.max(self.lower.status), jnp.max(self.adjoint.status))

    @property
    def work(self):
        """Gradient-equivalents over the batch, both solves."""
        return jnp.sum(self.lower.work) + jnp.sum(self.adjoint.work)


class StepInfo(NamedTuple):
    """What one step of a method reports (`fit` collects these in its history).

    value: upper-level value at the parameters the step started from; grad_norm: 2-norm of the hypergradient used;
    error: estimate of that hypergradient's error (inf where none was computed); step: step length taken (0 when the
    parameters did not move); tol, adjoint_tol: accuracies used; work: gradient-equivalents spent by this step;
    status: worst `Status` among its solves; done: True when the method cannot improve any further; stationary: whether
    the gradient was shown to be small there, against the errors and the rounding of values (else it is stuck).

    >>> import jbilevel as jb, jax.numpy as jnp, optax
    >>> method = jb.FirstOrder(jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2), optax.sgd(0.25))
    >>> batch = jnp.array([1.0, 3.0])
    >>> state, info = method.step(method.init(jnp.array(0.0), batch), batch)
    >>> float(info.value), float(info.grad_norm), float(info.step), bool(info.done)
    (2.5, 2.0, 0.5, False)
    """

    value: Any
    grad_norm: Any
    error: Any
    step: Any
    tol: Any
    adjoint_tol: Any
    work: Any
    status: Any
    done: Any
    stationary: Any = False

    def __repr__(self) -> str:
        return brief.record(self, status=names(self.status))


def acceptable(status):
    """Converged, or as close as the dtype allows."""
    return status <= Status.PRECISION


def check(info, *, strict: bool = False) -> None:
    """Raise `ConvergenceError` if a solve failed, naming the sample, the status and the residual. Outside jit only.

    Args:
      info: `SolveInfo`, `Value` or `Hypergradient` (single or batched).
      strict: also raise for `Status.PRECISION` (tolerance below what the dtype can reach).

    Raises:
      ConvergenceError: a status is worse than accepted.
      TypeError: called under jit, where statuses are not yet known.

    >>> import jbilevel as jb
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - d) ** 2, lambda p, d: d, strong_convexity=1.0)
    >>> x, info = jb.solve(problem, (), 2.0)
    >>> jb.check(info)
    """
    if isinstance(info, Hypergradient):
        check(info.lower, strict=strict)
        return _check(info.adjoint, strict, "the adjoint solve")
    if isinstance(info, Value):
        return check(info.lower, strict=strict)
    return _check(info, strict, "the lower-level solve")


def _check(info: SolveInfo, strict: bool, what: str) -> None:
    if isinstance(info.status, jax.core.Tracer):
        raise TypeError("check(info) needs concrete statuses: call it outside jit, on what the function returned.")
    codes = np.ravel(np.asarray(info.status))
    bad = np.flatnonzero(codes > (Status.CONVERGED if strict else Status.PRECISION))
    if bad.size:
        raise ConvergenceError(_failure(info, int(bad[np.argmax(codes[bad])]), bad.size, codes.size, what))


def _failure(info: SolveInfo, worst: int, failed: int, total: int, what: str) -> str:
    status = Status(int(np.ravel(np.asarray(info.status))[worst]))
    residual = float(np.ravel(np.asarray(info.residual))[worst])
    where = f" of sample {worst} ({failed} of {total} samples failed)" if total > 1 else ""
    return f"{what}{where} ended {status.name} with residual {residual:.2e}: {status.message}"


def say_if_unsolved(name: str, tol, info: SolveInfo, *, stacklevel: int = 4) -> None:
    """Warn where a tolerance that was given let every solve end where it began, cold, though not at a solution."""
    if tol is None or any(isinstance(leaf, jax.core.Tracer) for leaf in (tol, info.steps, info.residual)):
        return
    residual, met = np.asarray(info.residual), np.asarray(info.status) == Status.CONVERGED
    unsolved = met & ~(residual <= 0)  # NaN: padding
    if np.isfinite(tol) and np.all(unsolved) and not np.any(np.asarray(info.steps)):
        warnings.warn(
            f"`{name}`={float(tol):.1e} is larger than what there is to solve, so nothing was: every solve ended at "
            f"its cold start, with residual {np.nanmax(residual):.1e}; make it smaller, or leave it out for one that "
            "is relative to the problem.",
            UserWarning,
            stacklevel=stacklevel,
        )


def guard(tree, info: SolveInfo, on_failure: str, what: str):
    """Pass ``tree`` on, but never silently when ``info`` reports a failure.

    "raise": `ConvergenceError` outside jit (inside jax.vmap and jax.grad too), NaN under jit, where nothing can be
    raised without a call back to the host; "nan": NaN; "ignore": as is.
    """
    if on_failure == "ignore":
        return tree
    if on_failure == "raise":
        raise_if_known(info, what)
        if not isinstance(info.status, jax.core.Tracer):
            return tree
    return jax.tree.map(lambda v: jnp.where(acceptable(info.status), v, jnp.nan), tree)


def raise_if_known(info: SolveInfo, what: str) -> None:
    """`ConvergenceError` if statuses are concrete and report a failure, also where only jax.vmap hides them."""

    def look(status, residual):
        if not isinstance(status, jax.core.Tracer):
            info = SolveInfo(status=status, steps=None, residual=residual, error=None, evaluations=Work(0, 0, 0))
            _check(info, False, what)
            return status
        seen = jax.custom_batching.custom_vmap(lambda status, residual: status)
        seen.def_vmap(lambda size, batched, status, residual: (look(status, residual), batched[0]))
        return seen(status, residual)

    look(*jax.lax.stop_gradient((info.status, info.residual)))
