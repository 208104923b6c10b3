"""One run of a method: where it stands, and its compiled start and step."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Status, StepInfo
from jbilevel._method.base import Method, MethodState

REPORTED = ("value", "grad_norm", "error", "step", "tol", "adjoint_tol")  # fields of StepInfo that may be None
IDEMPOTENT = 1e-2  # share of params by which projecting again may move them, after an iteration that was cut short
PARTS = ("value", "gradient", "parameters")  # of a step that have to be finite


class Best(NamedTuple):
    """The parameters at which the least value was seen."""

    params: Any
    value: float


class Run(NamedTuple):
    """Everything that moves. One assignment replaces it, so that Ctrl-C finds either the old or the new one whole."""

    state: MethodState
    steps: int
    work: float
    done: bool
    stationary: bool  # whether a method that is done showed its gradient to be small
    store: dict[int, tuple]  # warm start of each sample seen: host arrays, one per leaf; never changed in place
    best: Best | None  # None: no value yet, or none that could be compared

    @classmethod
    def at(cls, state: MethodState) -> Run:
        return cls(state, steps=0, work=0.0, done=False, stationary=False, store={}, best=None)

    def after(self, taken: Taken, store: dict[int, tuple], compared: bool) -> Run:
        """The run with one more step; ``compared``: whether values of different steps can be, as on a full batch."""
        return Run(
            taken.state,
            steps=self.steps + 1,
            work=self.work + float(taken.info.work),
            done=bool(taken.info.done),
            stationary=bool(taken.info.stationary),
            store=store,
            best=better(self.best, self.state.params, taken.info) if compared else None,
        )


class Taken(NamedTuple):
    state: MethodState
    info: StepInfo  # on the host
    broken: str | None  # what is not finite: "value", "gradient" or "parameters"
    seconds: float  # without compilation


@partial(jax.jit, static_argnums=0)
def init(method: Method, params, batch) -> MethodState:
    """The method's first state, in strong types."""
    state = method.init(params, batch)
    if not isinstance(state, MethodState):
        kinds = type(method).__name__, type(state).__name__
        raise TypeError("`init` of {} must return a jb.MethodState, got {}; derive your state from it.".format(*kinds))
    return strong(state)


def require_projection(method: Method, params, begun: MethodState, batch) -> None:
    """ValueError where ``init`` moved params, and moves again what it made of them: feasible ones have to stay."""
    if not _moved(begun.params, params) > 0:  # NaN is not for a projection to answer for
        return
    again = _start(method, begun.params, batch)
    apart, size = _moved(again, begun.params), float(trees.norm(begun.params))
    if not apart <= IDEMPOTENT * size:
        raise ValueError(
            f"`projection` of {type(method).__name__} is none: applied twice it moves params once more, by {apart:.3g} "
            f"at norm {size:.3g}; it has to leave feasible params as they are, as jb.prox.box does."
        )


@partial(jax.jit, static_argnums=0)
def _start(method: Method, params, batch):
    return method.init(params, batch).params


def _moved(after, before) -> float:
    return float(trees.norm(trees.sub(after, before)))


@partial(jax.jit, static_argnums=0)
def cold(method: Method, params, batch):
    """A cold start of every sample of the batch."""
    return strong(method.oracle.init(params, batch))


@partial(jax.jit, static_argnums=0)
def _step(method: Method, state: MethodState, batch):
    new, info = method.step(state, batch)
    numbers = info._asdict()
    new, info = strong(new), info._replace(**{name: jnp.nan for name in REPORTED if numbers[name] is None})
    _same_types(state, new)
    slope = 0.0 if numbers["grad_norm"] is None else info.grad_norm
    finite = jnp.isfinite(info.value), jnp.isfinite(slope), trees.all_finite(new.params)
    return new, info, dict(zip(PARTS, finite, strict=True))


def compile_apart(function, *arguments, check: Callable[[], None]) -> None:
    """Compile a jitted function, which JAX keeps for the call itself; ``check`` may raise between trace and code."""
    lowered = function.lower(*arguments)
    check()
    lowered.compile()
    check()


class Stepper:
    """The steps of one method; what compiling them took is kept apart."""

    def __init__(self, method: Method):
        self.method, self.compile_seconds, self._compiled = method, 0.0, set()

    def __call__(self, state: MethodState, batch, check: Callable[[], None] = lambda: None) -> Taken:
        """One step; ``check`` may raise where it is interrupted while it is compiled."""
        shapes = jax.tree.structure(batch), tuple(map(jax.typeof, jax.tree.leaves(batch)))
        if shapes not in self._compiled:
            began = time.perf_counter()
            compile_apart(_step, self.method, state, batch, check=check)
            self.compile_seconds += time.perf_counter() - began
            self._compiled.add(shapes)
        began = time.perf_counter()
        state, *reported = _step(self.method, state, batch)
        info, finite = jax.device_get(reported)
        seconds = time.perf_counter() - began
        return Taken(state, info, next((what for what in PARTS if not finite[what]), None), seconds)


def better(best: Best | None, params, info: StepInfo) -> Best | None:
    """``best``, or the parameters that a step began with, where their value is less and comes from sound solves."""
    value = float(info.value)
    if info.status > Status.PRECISION or (best is not None and best.value <= value):
        return best
    return Best(params, value)


def strong(tree):
    """Without JAX's weak types, which would compile a second time when a later step loses them."""

    def convert(leaf):
        leaf = jnp.asarray(leaf)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key else jax.lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(convert, tree)


def _same_types(old, new) -> None:
    before, after = (
        {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (old, new))
    )
    for place in [*before, *after]:
        a, b = before.get(place), after.get(place)
        if a != b:
            raise TypeError(f"method.step turned state{place} from {a} into {b}; let init and step agree.")
