"""One run of a method: where it stands, and its compiled start and step."""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import StepInfo
from jbilevel._method.base import Method, MethodState

REPORTED = ("value", "grad_norm", "error", "step", "tol", "adjoint_tol")  # fields of StepInfo that may be None


class Run(NamedTuple):
    """Everything that moves. One assignment replaces it, so that Ctrl-C finds either the old or the new one whole."""

    state: MethodState
    steps: int
    work: float
    done: bool
    store: dict[int, tuple]  # warm start of each sample seen: host arrays, one per leaf; never changed in place

    @classmethod
    def at(cls, state: MethodState) -> Run:
        return cls(state, steps=0, work=0.0, done=False, store={})


class Taken(NamedTuple):
    state: MethodState
    info: StepInfo  # on the host
    finite: bool  # whether the value and the new parameters are
    seconds: float  # without compilation


@partial(jax.jit, static_argnums=0)
def init(method: Method, params, batch) -> MethodState:
    """The method's first state, in strong types."""
    state = method.init(params, batch)
    if not isinstance(state, MethodState):
        kinds = type(method).__name__, type(state).__name__
        raise TypeError("`init` of {} must return a jb.MethodState, got {}; derive your state from it.".format(*kinds))
    return strong(state)


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
    return new, info, trees.all_finite(new.params) & jnp.isfinite(info.value)


class Stepper:
    """The steps of one method; what compiling them took is kept apart."""

    def __init__(self, method: Method):
        self.method, self.compile_seconds, self._compiled = method, 0.0, set()

    def __call__(self, state: MethodState, batch) -> Taken:
        self._compile(state, batch)
        began = time.perf_counter()
        state, *reported = _step(self.method, state, batch)
        info, finite = jax.device_get(reported)
        return Taken(state, info, bool(finite), time.perf_counter() - began)

    def _compile(self, state, batch) -> None:
        shapes = jax.tree.structure(batch), tuple(map(jax.typeof, jax.tree.leaves(batch)))
        if shapes not in self._compiled:
            began = time.perf_counter()
            _step.lower(self.method, state, batch).compile()  # kept by JAX for the call itself
            self.compile_seconds += time.perf_counter() - began
            self._compiled.add(shapes)


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
