"""Reconstruction for a task: the lower level reconstructs, the upper level is the loss of what a network makes of it.

min over theta (and leaves of T) of mean_i loss(T(x_hat_i(theta)), s_i), x_hat_i(theta) the solution of any lower-level
problem for the measurement y_i alone; s_i are labels (Adler et al. 2022; Kadagala 2025).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbilevel import explicit
from jbilevel._core import brief
from jbilevel._core.partition import combine, partition
from jbilevel._core.results import check
from jbilevel._core.validate import arrays, require_hashable, trace_scalar
from jbilevel._oracle.base import Oracle
from jbilevel._training.batches import is_changing, mapped
from jbilevel._views.base import Problem
from jbilevel.alternating import Alternating, Batches
from jbilevel.first_order import FirstOrder
from jbilevel.maid import MAID
from jbilevel.quasi_newton import QuasiNewton
from jbilevel.solvers import solve
from jbilevel.stochastic import Stochastic, tells_noise
from jbilevel.training import FitResult, fit

__all__ = ["FROZEN", "Pipeline", "TaskAdapted", "rates", "reconstruct", "task_adapted"]

FROZEN = "frozen"  # where the leaves of the network that do not learn are in a batch


@dataclass(frozen=True)
class Pipeline:
    """loss(T(x_hat(theta)), labels) of one sample, as the parts from which `task_adapted` is made.

    ``params = {"regularizer": theta, "task": the leaves of T that learn, None elsewhere}``; the other leaves travel in
    ``data["frozen"]``, unseen by methods. A pipeline is itself the upper-level loss ``(params, x, data) -> scalar``.

    Args: as for `task_adapted`.

    Attributes:
      lower: the problem with ``params["regularizer"]`` as its parameters, and of the data only what is ``measured``, so
        that neither labels nor clean images can reach it.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.variational(None, jb.regularizers.SmoothedTV(eps=0.01))
    >>> pipeline = Pipeline(problem, lambda scale, x: scale * jnp.sum(x), lambda output, label: (output - label) ** 2)
    >>> params, frozen = pipeline.split(jnp.zeros(1), jnp.array(2.0))
    >>> float(pipeline(params, jnp.ones((2, 2)), {"labels": 5.0, "frozen": frozen}))  # (2 * 4 - 5)^2
    9.0
    """

    problem: Any
    task: Callable
    loss: Callable
    image: Callable | None = None
    measured: str | tuple[str, ...] = ("y",)
    labels: str = "labels"

    __repr__ = brief.settings

    def __post_init__(self):
        for name, function in (("task", self.task), ("loss", self.loss)):
            if not callable(function):
                raise TypeError(f"`{name}` must be a function, got {type(function).__name__}.")
        if not isinstance(self.problem, Problem):
            kind = type(self.problem).__name__
            raise TypeError(f"`problem` must be a problem such as jb.SmoothProblem, got {kind}.")
        if self.labels in self._keys():
            raise ValueError(f"`measured` {self.measured!r} must not hold the labels {self.labels!r}.")
        require_hashable(self)

    def _keys(self) -> tuple[str, ...]:
        return (self.measured,) if isinstance(self.measured, str) else tuple(self.measured)

    @property
    def lower(self):
        return _Lower(self.problem, self.measured)

    def picture(self, x):
        """What the task sees of a lower-level solution."""
        if self.image is not None:
            return self.image(x)
        return self.problem.image(x)

    def output(self, task_params, x, data):
        """T of a picture, with ``task_params`` the leaves that learn."""
        return self.task(combine(task_params, data[FROZEN]), x)

    def __call__(self, params, x, data):
        return self.loss(self.output(params["task"], self.picture(x), data), data[self.labels])

    def split(self, regularizer, task_params, finetune=None):
        """(params, frozen leaves) from theta and all parameters of T; ``finetune`` as for `partition`, None: nothing.

        Raises: ValueError: ``finetune`` selects nothing.
        """
        if finetune is None:
            return {"regularizer": regularizer, "task": jax.tree.map(lambda _: None, task_params)}, task_params
        try:
            trainable, frozen = partition(task_params, finetune)
        except ValueError as error:
            raise ValueError(f"`finetune` does not fit the task network: {error}") from error
        return {"regularizer": regularizer, "task": trainable}, frozen

    def oracle(self, names, **settings):
        """The oracle that suits the problem, for batches with the entries ``names``; ``settings`` are its own.

        `implicit.Oracle` of smooth problems, `piggyback.Oracle` of saddle points, `nonsmooth.Oracle` of weighted l1.
        Without ``chunk`` it takes all samples at once: on a CPU, XLA's derivatives of convolutions are some eight times
        slower inside a loop.
        """
        axes = {name: None if name == FROZEN else 0 for name in names}
        return self.lower.oracle(self, in_axes=axes, **({"chunk": None} | settings))

    def inspect(self, params, batch) -> None:
        """Say at once what would otherwise end in NaN or in a hypergradient of zero.

        Raises:
          ValueError: an entry is missing; the loss of a sample is not finite at its cold start, such as for labels that
            are no class.
          TypeError: the task does not trace, returns no floats, or has no derivative.

        Warns where the loss does not depend on the reconstruction.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batches must be mappings with entries such as 'y' and 'labels', got {type(batch).__name__}."
            )
        for name in (*self._keys(), self.labels):
            if name not in batch:
                there = sorted(_samples(batch))
                raise ValueError(
                    f"the batch has no entry {name!r}, only {there}; name yours in `measured` and `labels`."
                )
        batch = arrays(batch, "batch")
        x = self.oracle(batch).init(params, batch).x
        one, first = jax.tree.map(lambda v: v[0], (_samples(batch), x))
        logits = self._traced(params, first, one | {FROZEN: batch[FROZEN]})
        values, slopes = jax.device_get(_first(self, params, x, batch))
        if not np.isfinite(values).all():
            raise ValueError(self._why_not_finite(int(np.argmin(np.isfinite(values))), values, logits, batch))
        if not np.any(slopes):
            warnings.warn(
                "the loss does not change with the reconstruction, where solves start, so the hypergradient of the "
                "regulariser is zero: `loss` ignores the output of `task`, or `task` rounds, takes an argmax or stops "
                "gradients.",
                UserWarning,
                stacklevel=3,
            )

    def _traced(self, params, x, sample):
        """Shapes of T(x) for one sample, after making sure that it and the loss can be differentiated."""
        picture = jax.eval_shape(self.picture, x)
        try:
            logits = jax.eval_shape(self.output, params["task"], picture, sample)
        except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
            raise TypeError(f"`task` cannot be differentiated, write it in JAX: {_first_line(error)}") from error
        for leaf in jax.tree.leaves(logits):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise TypeError(f"`task` returns {leaf.dtype}, which has no derivative: return logits, not classes.")
        trace_scalar(self, "the loss of the task", params, x, sample)
        try:
            jax.eval_shape(jax.grad(lambda x: self(params, x, sample)), x)
        except Exception as error:
            raise TypeError(f"`task` or `loss` cannot be differentiated: {_first_line(error)}") from error
        return logits

    def _why_not_finite(self, i: int, values, logits, batch) -> str:
        labels = np.asarray(batch[self.labels])[i] if hasattr(batch[self.labels], "shape") else None
        shape = getattr(logits, "shape", None)
        if labels is not None and shape is not None and np.issubdtype(labels.dtype, np.integer):
            classes = shape[-1] if shape[:-1] == labels.shape else 2
            strange = np.unique(labels[(labels < 0) | (labels >= classes)])
            if strange.size and (shape == labels.shape or shape[:-1] == labels.shape):
                return (
                    f"{self.labels!r} of sample {i} hold {strange[:5].tolist()}, but the task knows the classes 0 "
                    f"to {classes - 1}; give the loss `ignore=` for pixels that do not count."
                )
        return f"the loss of sample {i} is {values[i]} before anything is learned; look at its measurement and labels."


@dataclass(frozen=True)
class _Lower(Problem):
    """The lower level on the params and data of the whole pipeline."""

    problem: Problem
    measured: str | tuple[str, ...]

    @property
    def view_type(self):
        return self.problem.view_type

    def _seen(self, data):
        return data[self.measured] if isinstance(self.measured, str) else {name: data[name] for name in self.measured}

    def view(self, params, data):
        return self.problem.view(params["regularizer"], self._seen(data))

    def start(self, params, data):
        return self.problem.start(params["regularizer"], self._seen(data))

    def check(self, params) -> None:
        self.problem.check(params["regularizer"])

    def validate(self, params, data, x0=None) -> None:
        self.problem.validate(params["regularizer"], self._seen(data), x0)

    def default_solver(self):
        return self.problem.default_solver()

    def oracle(self, loss, **options):
        return replace(self.problem.oracle(loss, **options), problem=self)

    def image(self, x):
        return self.problem.image(x)

    def lacks(self) -> str | None:
        return self.problem.lacks()

    def lacks_smoothness(self) -> bool:
        return self.problem.lacks_smoothness()


@dataclass(frozen=True)
class _OnRegularizer:
    projection: Callable

    def __call__(self, params):
        return params | {"regularizer": self.projection(params["regularizer"])}


def _samples(batch) -> dict:
    return {name: part for name, part in batch.items() if name != FROZEN}


def _first_line(error) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@partial(jax.jit, static_argnums=0)
def _first(pipeline: Pipeline, params, x, batch):
    """Loss and largest derivative in x of every sample at its cold start, one sample after the other."""

    def one(sample):
        x, data = sample
        value, slope = jax.value_and_grad(lambda x: pipeline(params, x, data | {FROZEN: batch[FROZEN]}))(x)
        return value, jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(slope)]))

    return jax.lax.map(one, (x, _samples(batch)))


@dataclass(frozen=True, eq=False)
class TaskAdapted:
    """What `task_adapted` returns: parameters of the ``regularizer``, all parameters of the ``task``, and the `fit`.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.variational(None, jnp.vdot)  # R = <params, x>, so x_hat = y - params
    >>> pipeline = Pipeline(problem, lambda scale, x: scale * x, lambda output, label: jnp.sum((output - label) ** 2))
    >>> found = TaskAdapted(regularizer=jnp.array([1.0, 2.0]), task=jnp.array(3.0), fit=None, pipeline=pipeline)
    >>> batch = {"y": jnp.array([[5.0, 5.0], [7.0, 7.0]])}
    >>> found.reconstruct(batch).tolist(), found(batch).tolist()  # pictures, and what the task makes of them
    ([[4.0, 3.0], [6.0, 5.0]], [[12.0, 9.0], [18.0, 15.0]])
    """

    regularizer: Any = field(repr=False)
    task: Any = field(repr=False)
    fit: FitResult
    pipeline: Pipeline = field(repr=False)

    def reconstruct(self, batch, *, tol=None):
        """Pictures of a batch of measurements; `ConvergenceError` where a solve fails. Labels are not needed."""
        return reconstruct(self.pipeline, self.regularizer, batch, tol=tol)

    def __call__(self, batch, *, tol=None):
        """What the task makes of them, such as logits."""
        return jax.vmap(self.pipeline.task, (None, 0))(self.task, self.reconstruct(batch, tol=tol))


def reconstruct(pipeline: Pipeline, regularizer, batch, *, tol=None):
    """Pictures of a batch of measurements at ``regularizer``; `ConvergenceError` where a solve fails.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.variational(None, jnp.vdot)  # R = <params, x>, so x_hat = y - params
    >>> pipeline = Pipeline(problem, lambda scale, x: scale * x, lambda output, label: jnp.sum((output - label) ** 2))
    >>> reconstruct(pipeline, jnp.array([1.0, 2.0]), {"y": jnp.array([[5.0, 5.0], [7.0, 7.0]])}).tolist()
    [[4.0, 3.0], [6.0, 5.0]]
    """
    names = pipeline.measured
    seen = batch[names] if isinstance(names, str) else {name: batch[name] for name in names}
    x, info = jax.vmap(lambda data: solve(pipeline.problem, regularizer, data, tol=tol))(seen)
    check(info)
    return jax.vmap(pipeline.picture)(x)


def rates(**optimizers) -> optax.GradientTransformation:
    """One optax optimiser for each part of params.

    >>> params = {"regularizer": jnp.array(1.0), "task": jnp.array(1.0)}
    >>> optimizer = rates(regularizer=optax.sgd(0.5), task=optax.sgd(0.25))
    >>> updates, _ = optimizer.update(params, optimizer.init(params))
    >>> float(updates["regularizer"]), float(updates["task"])
    (-0.5, -0.25)
    """
    transforms: dict[Hashable, optax.GradientTransformation] = {**optimizers}
    return optax.multi_transform(transforms, {name: name for name in optimizers})


def default_rates() -> optax.GradientTransformation:
    """Adam with the rate 0.1 of theta and 1e-3 of T."""
    return rates(regularizer=optax.adam(1e-1), task=optax.adam(1e-3))


def _default_method(oracle: Oracle, batch: Mapping, changing: bool, alternating: bool) -> Callable:
    """``oracle -> method``: one that compares values only where they can be compared."""
    if changing:
        accuracy = "sampling" if oracle.exact or tells_noise(oracle, batch) else "decay"
        return partial(Stochastic, optimizer=default_rates, accuracy=accuracy)
    return MAID if alternating else QuasiNewton


def task_adapted(
    problem,
    task: Callable,
    loss: Callable,
    *,
    regularizer,
    task_params,
    batches,
    steps: int,
    finetune=None,
    method: Callable | None = None,
    projection: Callable | None = None,
    alternate: optax.GradientTransformation | None = None,
    task_steps: int = 1,
    image: Callable | None = None,
    measured: str | tuple[str, ...] = ("y",),
    labels: str = "labels",
    oracle: Mapping | None = None,
    **settings,
) -> TaskAdapted:
    """Learn a regulariser, and leaves of a task network, for the task: only the loss of the task has to be given.

    min over theta (and leaves of T) of mean_i loss(T(x_hat_i(theta)), labels_i), x_hat_i the solution of ``problem``
    for the measurement of sample i. The gradient in theta goes through it (an adjoint solve), that of T is direct.

    Args:
      problem: any lower level: smooth, saddle point or weighted l1, e.g. from `variational`. It sees of the data only
        the entries ``measured``: a mapping of these (what `variational` expects), or for one name its entry itself.
      task: T, ``f(params, x) -> output`` of one sample, e.g. from `nets.from_flax`; modules with statistics of batches
        or random numbers in evaluation mode.
      loss: ``(output, labels) -> scalar`` of one sample, e.g. `losses.Segmentation`.
      regularizer: theta to start from. task_params: all parameters of T.
      batches: as for `fit`: a mapping of arrays with a leading sample axis, a function ``step -> mapping``, or an
        iterator; with the measurements, the labels and whatever else (clean images are not read).
      finetune: which leaves of T learn too, as for `partition`: ``(path, leaf) -> bool``, a tree of bools, or
        ``UNet.last(2)``. None: T stays as it is.
      method: ``(oracle) -> method``: `QuasiNewton`, `MAID`, ``partial(FirstOrder, optimizer=optax.adam(0.1))``. With
        optax, fine-tuning wants learning rates of its own for T: `task.rates`, or ``alternate``. None: `QuasiNewton` on
        a full batch (`MAID` with ``alternate``); where batches change, `Stochastic` with Adam at the rates 0.1 of theta
        and 1e-3 of T.
      projection: of theta onto a feasible set, e.g. ``R.project`` or a box, `prox.box`.
      alternate: an optax optimiser of T. Each step then takes ``task_steps`` of its steps on the reconstructions as
        they are, without any further lower-level solve, and one step of ``method`` in theta alone. None: ``method``
        moves theta and T together.
      image: ``x -> picture`` that the task sees, for unknowns that are not pictures; the image of a saddle point is
        found by itself where `variational` made the problem.
      oracle: settings of the oracle, such as ``{"correct": True, "solver": ...}``; ``{"chunk": 8}`` holds 8 samples
        of a batch in memory at a time.
      settings: of `fit`: callback, checkpoint, log, progress, ...

    The first batch is looked at before anything is learned (see `Pipeline.inspect`).

    Raises:
      ValueError: ``finetune`` selects nothing; a batch lacks an entry; labels are no classes. TypeError: the task has
        no derivative. Warns where the loss does not depend on the reconstruction.

    Reference: Adler, Lunz, Verdier, Schönlieb & Öktem, Task adapted reconstruction for inverse problems, 2022.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> R = jb.regularizers.SmoothedTV(eps=0.1)
    >>> found = jb.task_adapted(  # which pixels are bright?
    ...     jb.variational(None, R), lambda net, x: net["slope"] * (x - 0.5), jb.losses.cross_entropy,
    ...     regularizer=R.init(weight=0.01), task_params={"slope": jnp.array(8.0)},
    ...     batches={"y": jnp.array([[[0.1, 0.9], [0.7, 0.6]]]), "labels": jnp.array([[[0, 1], [0, 1]]])}, steps=5)
    >>> bool(found.fit.history["value"][-1] < found.fit.history["value"][0]), found.regularizer.shape
    (True, (1,))
    """
    pipeline = Pipeline(problem, task, loss, image=image, measured=measured, labels=labels)
    params, frozen = pipeline.split(regularizer, task_params, finetune)
    if alternate is not None and finetune is None:
        raise ValueError("`alternate` moves leaves of the task network: say which in `finetune`.")
    first, batches = mapped(batches, partial(_with_frozen, frozen=frozen))
    pipeline.inspect(params, first)
    joint = pipeline.oracle(first, **(oracle or {}))
    feasible = {} if projection is None else {"projection": _OnRegularizer(projection)}
    make = method or _default_method(joint, first, is_changing(batches), alternate is not None)
    chosen = make(joint, **feasible)
    if alternate is not None:
        parts = {"x": 0, "labels": 0, FROZEN: None}
        network = FirstOrder(explicit.Oracle(_OnPictures(pipeline), in_axes=parts), alternate)
        chosen = Alternating(joint, chosen, network, batches=_Turns(pipeline), task_steps=task_steps)
    result = fit(chosen, params, batches, steps=steps, **settings)
    return TaskAdapted(result.params["regularizer"], combine(result.params["task"], frozen), result, pipeline)


@dataclass(frozen=True)
class _OnPictures:
    """The loss of T on pictures that are there."""

    pipeline: Pipeline

    def __call__(self, task_params, data):
        return self.pipeline.loss(self.pipeline.output(task_params, data["x"], data), data["labels"])


@dataclass(frozen=True)
class _Turns(Batches):
    """The batch of the network, with pictures in it, and the batch with T at rest."""

    pipeline: Pipeline

    def of_task(self, x, batch):
        pictures = jax.vmap(self.pipeline.picture)(x)
        return {"x": pictures, "labels": batch[self.pipeline.labels], FROZEN: batch[FROZEN]}

    def of_reconstruction(self, task_params, batch):
        return batch | {FROZEN: combine(task_params, batch[FROZEN])}


def _with_frozen(batch, frozen):
    """The batch with the frozen leaves beside the samples."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batches must be mappings with entries such as 'y' and 'labels', got {type(batch).__name__}.")
    if FROZEN in batch:
        raise ValueError(f"the entry {FROZEN!r} of a batch is kept for the task network; give yours another name.")
    return dict(batch) | {FROZEN: frozen}


def __dir__():
    return __all__
