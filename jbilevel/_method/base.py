"""The contract of a method: what moves the parameters, and what its state tells to whoever runs it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, FrozenInstanceError, dataclass, fields
from functools import wraps
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp

from jbilevel._core import brief, trees
from jbilevel._core.contracts import Contract
from jbilevel._core.results import Hypergradient, StepInfo
from jbilevel._core.settings import own_settings
from jbilevel._core.validate import arrays
from jbilevel._oracle.base import Oracle


@dataclass_transform(frozen_default=True, kw_only_default=True)
class _State:
    """Makes every subclass a frozen dataclass, filled by keyword, and a pytree whose children are its fields."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, eq=False, repr=False, kw_only=True)(cls)
        # frozen by this class: a decorator dataclass(frozen=True) of the author's own must find nothing in its way
        for name in ("__setattr__", "__delattr__"):
            delattr(cls, name)
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])

    def __setattr__(self, name, value):
        raise FrozenInstanceError(f"cannot assign to `{name}` of a state; use dataclasses.replace")

    def __delattr__(self, name):
        raise FrozenInstanceError(f"cannot delete `{name}` of a state")

    __repr__ = brief.record


class MethodState(_State):
    """Where a method stands. A subclass adds fields; it becomes a frozen dataclass and a pytree without being told to.

    States are made by keyword and changed with `dataclasses.replace`. A field holds a pytree of arrays, or None.

    Attributes:
      params: the parameters after the last step, a pytree of arrays.
      warm: where the solves of the next step start, as ``oracle.init`` and hypergradients give it, for the samples of
        that step's batch; `jb.fit` puts another one in its place where batches change.
      tol, adjoint_tol: floating scalars, the accuracies of the lower level and of the adjoint with which the NEXT step
        begins; 0 on an exact oracle that was not asked for others.

    >>> import dataclasses, jax, jbilevel as jb
    >>> class Heavy(jb.MethodState):
    ...     momentum: jax.Array
    >>> state = Heavy(params=1.0, warm=None, tol=0.1, adjoint_tol=0.1, momentum=0.0)
    >>> dataclasses.replace(state, momentum=0.5)
    Heavy(params=1.0, warm=None, tol=0.1, adjoint_tol=0.1, momentum=0.5)
    >>> jax.tree.leaves(state)
    [1.0, 0.1, 0.1, 0.0]
    """

    params: Any
    warm: Any
    tol: Any
    adjoint_tol: Any


@dataclass(frozen=True)
class Method(Contract, abstract="jb.Method"):
    """What moves params, step by step, by what an oracle tells it; `jb.fit` runs it.

    A method is static configuration, a frozen dataclass: it hashes and compares by value, so that its step compiles
    once. It must supply `init` and `step`; everything else has a default. Of its oracle it knows the contract
    `jb.Oracle` and nothing else.

    Attributes:
      oracle: the `jb.Oracle` that is asked, through `asked`; the first argument of every method.
      log_error: whether the history is to hold the errors of the hypergradients where nothing else reads them; else
        they are not computed, and reported as inf.
      compares_values: of the class: whether values of one step are compared with values of another; `jb.fit` then
        refuses batches that change from step to step, because a new batch has another value at the same parameters.
      looks_ahead: of the class: whether a step may ask for the hypergradient elsewhere than at ``state.params``, in
        which case nothing else may move a part of the parameters in between.
      grows_batch: of the class: whether values are those of growing parts of the batch; `jb.fit` then takes none
        of them for the best.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`; a subclass lacks `init` or `step`.

    >>> import dataclasses, jax, jax.numpy as jnp, jbilevel as jb
    >>> @dataclasses.dataclass(frozen=True)
    ... class Descent(jb.Method):
    ...     rate: float = 0.5
    ...     def init(self, params, batch):
    ...         return jb.MethodState(params=params, warm=self.oracle.init(params, batch), tol=1e-3, adjoint_tol=1e-3)
    ...     def step(self, state, batch):
    ...         hg = self.asked(state.params, batch, state.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
    ...         params = jax.tree.map(lambda p, g: p - self.rate * g, state.params, hg.grad)
    ...         return dataclasses.replace(state, params=params, warm=hg.warm), self.report(hg, state, step=self.rate)
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> round(float(jb.fit(Descent(oracle), jnp.array(0.0), jnp.array([1.0, 3.0]), steps=20).params), 3)
    2.0
    """

    oracle: Oracle
    _: KW_ONLY
    log_error: bool = False

    compares_values: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    grows_batch: ClassVar[bool] = False

    def __post_init__(self):
        require_oracle(self.oracle, type(self).__name__)

    @abstractmethod
    def init(self, params: Any, batch: Any) -> MethodState:
        """The state before the first step, for params, a pytree of arrays, and a batch as the oracle's. Traceable."""

    @abstractmethod
    def step(self, state: MethodState, batch: Any) -> tuple[MethodState, StepInfo]:
        """(the next state, with the same shapes and dtypes in it, and what `report` makes of the step). Traceable."""

    @property
    def reads_error(self) -> bool:
        """Whether ``error`` of a hypergradient is read: only then is it computed where that costs anything."""
        return self.log_error

    @property
    def asked(self) -> Oracle:
        """The oracle as steps ask it: without the estimate of an error that nobody reads."""
        return self.oracle if self.reads_error else self.oracle.without_estimate()

    def report(
        self,
        hg: Hypergradient,
        state: Any,
        *,
        step,
        work=None,
        status=None,
        done=False,
        grad_norm=None,
        stationary=False,
    ) -> StepInfo:
        """What a step tells: ``hg``, the hypergradient used, at the accuracies of ``state`` (anything that has them).

        step: length of the step taken, 0 where params stay. work, status, grad_norm: those of ``hg`` unless given.
        done, stationary: see `jb.StepInfo`; a method that ends without being stationary is stuck.
        """
        return StepInfo(
            value=hg.value,
            grad_norm=trees.norm(hg.grad) if grad_norm is None else grad_norm,
            error=hg.error,
            step=jnp.asarray(step, float),
            tol=state.tol,
            adjoint_tol=state.adjoint_tol,
            work=hg.work if work is None else work,
            status=hg.status if status is None else status,
            done=jnp.asarray(done),
            stationary=jnp.asarray(stationary),
        )


def compiled(step: Callable) -> Callable:
    """The ``step`` of a method, compiled once per method and shape; a batch of NumPy arrays is looked at first."""
    jitted = jax.jit(step, static_argnums=0)

    @own_settings
    @wraps(step)
    def take(self, state, batch):
        return jitted(self, state, arrays(batch, "batch"))

    return take


def require_oracle(oracle: Any, name: str) -> None:
    """TypeError unless ``oracle``, handed to ``name``, is a `jb.Oracle`."""
    if not isinstance(oracle, Oracle):
        what = oracle.__name__ if isinstance(oracle, type) else type(oracle).__name__
        raise TypeError(
            f"`oracle` of {name} must be a hypergradient oracle, got {what}; make one of a problem and a loss, e.g. "
            "jb.implicit.Oracle(problem, loss), or jb.explicit.Oracle(loss) where there is no lower level."
        )
