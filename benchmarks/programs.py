"""The library's programs on tiny shapes, one of each kind, for what has to hold of all of them.

`CASES` maps a name to a `Case`, whose ``build(dtype)`` gives a function and its arguments. `benchmarks.exports` lowers
them for another platform, and the tests run them on a GPU against the CPU. Batches are solved at once and layers stay
in their loop (``chunk=None``, ``unroll=False``), as everywhere but on a CPU: such settings are chosen when a program is
traced, for the machine that traces it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbilevel as jb
from benchmarks.program_parts import (
    BRIDGES,
    NETWORKS,
    OPERATORS,
    SHAPE,
    Program,
    cast,
    drawn,
    network,
    products,
    traced_subset,
)

TOLERANCE = {"float32": 1e-5, "float64": 1e-11}  # of solves, where nothing else is said


class Case(NamedTuple):
    """One program, made anew for each dtype."""

    kind: str
    build: Callable[[str], Program]
    quick: bool = True  # whether the quick tests and ``--quick`` take it
    bridge: bool = False  # whether it calls a function of the host, as it should
    needs: str | None = None  # an optional package
    custom_calls: tuple[str, ...] = ()  # those that it is known to make on CUDA


# ------------------------------------------------------------------------------------------------------- lower levels


class Setting(NamedTuple):
    """A problem with an upper-level loss, parameters, and a batch."""

    problem: Any
    loss: Callable
    params: Any
    batch: Any

    @property
    def sample(self):
        return jax.tree.map(lambda leaf: leaf[0], self.batch)


def image_loss(params, x, data):
    return 0.5 * jnp.sum((x - data["x"]) ** 2)


def pair_loss(params, pair, data):
    """Of the image, the first part of the primal unknown of a saddle point."""
    return image_loss(params, jax.tree.leaves(pair[0])[0], data)


def images(count: int, dtype: str) -> dict:
    """Squares on a ramp, and the same with noise."""
    clean = np.tile(np.linspace(0, 0.5, SHAPE[1]), (count, SHAPE[0], 1))
    clean[:, 4:12, 5:11] += 0.5
    return {"x": jnp.asarray(clean, dtype), "y": jnp.asarray(clean, dtype) + 0.1 * drawn(clean.shape, dtype)}


def denoising(dtype: str, regularizer=None, form: str | None = None, count: int = 2) -> Setting:
    regularizer = jb.regularizers.SmoothedTV(eps=0.1) if regularizer is None else regularizer
    problem = jb.variational(None, regularizer, form=form)
    loss = pair_loss if isinstance(problem, jb.SaddleProblem) else image_loss
    params = cast(regularizer.init(jax.random.key(0), dtype=jnp.float32), dtype)  # the same draw in either
    return Setting(problem, loss, params, images(count, dtype))


def tomography(dtype: str, form: str | None = None) -> Setting:
    regularizer = jb.regularizers.SmoothedTV(eps=0.1)
    A = OPERATORS["parallel beam"]()
    problem = jb.variational(A, regularizer, form=form, ridge=0.1)
    batch = images(2, dtype)
    batch["y"] = A(batch["x"])
    loss = pair_loss if form == "saddle" else image_loss
    return Setting(problem, loss, cast(regularizer.init(), dtype), batch)


def sparse_regression(dtype: str, count: int = 2) -> Setting:
    """The elastic net with a weight per unknown."""
    problem = jb.WeightedL1Problem(
        lambda p, x, d: 0.5 * jnp.sum((d["A"] @ x - d["b"]) ** 2) + 0.05 * jnp.sum(x**2),
        lambda p, d: jnp.zeros_like(d["x"]), strong_convexity=0.1,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    matrix, truth = rng.standard_normal((count, 12, 8)), rng.standard_normal((count, 8)) * (np.arange(8) < 4)
    measured = np.einsum("nij,nj->ni", matrix, truth) + 0.1 * rng.standard_normal((count, 12))
    batch = cast({"A": matrix, "b": measured, "x": truth}, dtype)  # by numpy: no device decides how precisely
    return Setting(problem, image_loss, jnp.full((8,), -1.0, dtype), batch)


def learned(dtype: str) -> Setting:
    """A loss of parameters and data alone, with a convolution, in the place of ``problem`` too."""

    def loss(params, data):
        padded = jnp.pad(data["y"], 1)[None, None]
        hidden = jnp.tanh(jax.lax.conv(padded, params["filters"], (1, 1), "VALID")[0])
        return image_loss(params, jnp.tensordot(params["weights"], hidden, 1), data)

    params = {"filters": 0.3 * drawn((4, 1, 3, 3), dtype), "weights": 0.3 * drawn((4,), dtype, 1)}
    return Setting(loss, loss, params, images(2, dtype))


# ------------------------------------------------------------------------------------------------------------ oracles


class OracleCase(NamedTuple):
    """An oracle without its problem, and what it is tried on."""

    setting: Callable[..., Setting]
    make: Callable[[Any, Callable], Any]  # (problem, loss) -> oracle
    quick: bool = True
    weighted: bool = False


def oracle(kind, **options) -> Callable:
    return lambda problem, loss: kind(problem, loss, **{"chunk": None} | options)


saddle = partial(denoising, form="saddle")
one_image, one_pair = partial(denoising, count=1), partial(denoising, form="saddle", count=1)
learned_tv = partial(denoising, regularizer=jb.regularizers.LearnedTV(count=3, size=3, width=0.1))
AGD, LBFGS = jb.solvers.AGD(), jb.solvers.LBFGS()
Implicit, Piggyback, Nonsmooth = jb.implicit.Oracle, jb.piggyback.Oracle, jb.nonsmooth.Oracle
Unroll, OneStep = jb.unroll.Oracle, jb.unroll.OneStep

ORACLES = {
    "implicit": OracleCase(denoising, oracle(Implicit)),
    "implicit, one sample": OracleCase(one_image, oracle(Implicit), quick=False),
    "implicit, corrected": OracleCase(denoising, oracle(Implicit, solver=AGD, correct=True)),
    "implicit, AGD": OracleCase(denoising, oracle(Implicit, solver=AGD, estimate=False)),
    "implicit, L-BFGS": OracleCase(denoising, oracle(Implicit, solver=LBFGS, estimate=False), quick=False),
    "implicit, MINRES": OracleCase(
        denoising, oracle(Implicit, solver=AGD, linear_solver=jb.solvers.MINRES(), estimate=False), quick=False
    ),
    "implicit, tomography": OracleCase(tomography, oracle(Implicit), quick=False),
    "piggyback, sequential": OracleCase(saddle, oracle(Piggyback)),
    "piggyback, one sample": OracleCase(one_pair, oracle(Piggyback), quick=False),
    "piggyback, corrected": OracleCase(saddle, oracle(Piggyback, correct=True), quick=False),
    "piggyback, simultaneous": OracleCase(saddle, oracle(Piggyback, mode="simultaneous", estimate=False)),
    "piggyback, learned TV": OracleCase(learned_tv, oracle(Piggyback, estimate=False)),
    "piggyback, tomography": OracleCase(partial(tomography, form="saddle"), oracle(Piggyback), quick=False),
    "nonsmooth": OracleCase(sparse_regression, oracle(Nonsmooth)),
    "nonsmooth, one sample": OracleCase(partial(sparse_regression, count=1), oracle(Nonsmooth)),
    "unroll": OracleCase(denoising, oracle(Unroll, steps=20)),
    "unroll, checkpointed": OracleCase(denoising, oracle(Unroll, steps=20, checkpoint=True)),
    "unroll, PDHG": OracleCase(saddle, oracle(Unroll, steps=20, solver=jb.solvers.PDHG(stride=1))),
    "unroll, weighted samples": OracleCase(denoising, oracle(Unroll, steps=20), weighted=True),
    "one step": OracleCase(denoising, oracle(OneStep, solver=AGD)),
    "explicit": OracleCase(learned, lambda problem, loss: jb.explicit.Oracle(loss)),
    "explicit, weighted samples": OracleCase(learned, lambda problem, loss: jb.explicit.Oracle(loss), weighted=True),
}
VALUES = ("implicit", "piggyback, sequential", "nonsmooth", "nonsmooth, one sample", "unroll", "explicit")


def hypergradient(case: OracleCase, dtype: str) -> Program:
    setting = case.setting(dtype)
    ask = case.make(setting.problem, setting.loss)
    if not case.weighted:
        call = lambda params, batch, tol: ask(params, batch, tol=tol, adjoint_tol=tol)  # noqa: E731
        return Program(call, (setting.params, setting.batch, TOLERANCE[dtype]))
    call = lambda params, batch, weight: ask(params, batch, sample_weight=weight)  # noqa: E731
    return Program(call, (setting.params, setting.batch, jnp.asarray([1.0, 3.0], dtype)))


def value(case: OracleCase, dtype: str) -> Program:
    setting = case.setting(dtype)
    ask = case.make(setting.problem, setting.loss)
    call = lambda params, batch, tol: ask.value(params, batch, tol=tol)  # noqa: E731
    return Program(call, (setting.params, setting.batch, TOLERANCE[dtype]))


# ---------------------------------------------------------------------------------------------------------- solutions


def solved(setting: Callable[[str], Setting], dtype: str) -> Program:
    problem, _, params, _ = made = setting(dtype)
    call = lambda params, data, tol: jb.solve(problem, params, data, tol=tol)  # noqa: E731
    return Program(call, (params, made.sample, TOLERANCE[dtype]))


def differentiated(solution: Callable, setting: Callable[[str], Setting], dtype: str) -> Program:
    """The gradient of a loss through a differentiable solution, with its default on_failure="raise"."""
    problem, loss, params, _ = made = setting(dtype)
    point = solution(problem)
    gradient = jax.grad(lambda params, data, tol: loss(params, point(params, data, tol=tol), data))
    return Program(gradient, (params, made.sample, TOLERANCE[dtype]))


def differentiated_twice(dtype: str) -> Program:
    """The squared norm of a hypergradient, differentiated."""
    gradient, arguments = differentiated(jb.implicit.argmin, denoising, dtype)
    return Program(jax.grad(lambda *arguments: jnp.sum(gradient(*arguments) ** 2)), arguments)


SOLUTIONS = {
    "jb.solve, smooth": partial(solved, denoising),
    "jb.solve, saddle point": partial(solved, saddle),
    "jb.solve, weighted l1": partial(solved, sparse_regression),
    "implicit.argmin, gradient": partial(differentiated, jb.implicit.argmin, denoising),
    "implicit.argmin, second derivative": differentiated_twice,
    "piggyback.saddle_point, gradient": partial(differentiated, jb.piggyback.saddle_point, saddle),
    "nonsmooth.argmin, gradient": partial(differentiated, jb.nonsmooth.argmin, sparse_regression),
}

# ------------------------------------------------------------------------------------------------------------ methods


def stepped(method: Callable, dtype: str) -> Program:
    """A step of ``method(oracle)`` from any state."""
    setting = denoising(dtype)
    chosen = method(Implicit(setting.problem, setting.loss, chunk=None))
    state = jax.eval_shape(chosen.init, setting.params, setting.batch)
    return Program(chosen.step, (state, setting.batch))


@dataclass(frozen=True)
class Threshold(jb.alternating.Batches):
    """A task with two parameters on the reconstruction: which pixels are bright? Those at rest come with the data."""

    def __call__(self, params, x, data):
        task = jb.combine(params["task"], data["task"])
        return jb.losses.cross_entropy(task["slope"] * (x - task["bias"]), data["labels"])

    def on_pictures(self, task, data):
        still = jax.tree.map(lambda _: None, task)
        return self({"task": task}, data["x"], {"task": still, "labels": data["labels"]})

    def of_task(self, x, batch):
        return {"x": x, "labels": batch["labels"]}

    def of_reconstruction(self, task, batch):
        return batch | {"task": task}


@dataclass(frozen=True)
class OfRegularizer:
    """A function of all parameters from one of the regulariser's."""

    function: Callable

    def __call__(self, params, *others):
        return self.function(params["regularizer"], *others)


def alternated(dtype: str) -> Program:
    """A step of the regulariser and of the task network, in turn."""
    setting, task = denoising(dtype), Threshold()
    lower = setting.problem
    problem = jb.SmoothProblem(OfRegularizer(lower.energy), OfRegularizer(lower.init), strong_convexity=1.0)
    axes = {"x": 0, "y": 0, "labels": 0, "task": None}
    joint = Implicit(problem, task, in_axes=axes, chunk=None)
    network = jb.FirstOrder(jb.explicit.Oracle(task.on_pictures), optax.adam(1e-2))
    method = jb.alternating.Alternating(joint, jb.FirstOrder(joint, optax.adam(1e-2)), network, batches=task)
    parts = {"slope": jnp.ones((), dtype), "bias": jnp.zeros((), dtype)}
    params = {"regularizer": setting.params, "task": parts}
    batch = setting.batch | {
        "labels": (setting.batch["x"] > 0.5).astype(jnp.int32),
        "task": {"slope": None, "bias": None},
    }
    return Program(method.step, (jax.eval_shape(method.init, params, batch), batch))


METHODS = {
    "MAID": partial(stepped, jb.MAID),
    "HOAG": partial(stepped, jb.HOAG),
    "NBA": partial(stepped, jb.NBA),
    "FirstOrder": partial(stepped, lambda oracle: jb.FirstOrder(oracle, optax.adam(1e-2))),
    "Alternating": alternated,
}

# ------------------------------------------------------------------------------------------------------- regularisers

R = jb.regularizers
SMOOTH = {
    "SmoothedTV": R.SmoothedTV(),
    "SmoothedTV, anisotropic": R.SmoothedTV(kind="anisotropic"),
    "WeightedTV": R.WeightedTV(grid=(3, 2), eps=0.1),
    "FoE": R.FoE(count=3, size=3),
    "CRR": R.CRR(widths=(2, 3), sizes=(3, 3)),
    "WCRR": R.WCRR(widths=(2, 3), sizes=(3, 3)),
    "ICNN": R.ICNN(hidden=3, outputs=2, size=3, potential="smoothstep"),
}
SADDLES = {
    "SmoothedTV": R.SmoothedTV(),
    "TV": R.TV(),
    "TV, Huber": R.TV(width=0.1),
    "LearnedTV": R.LearnedTV(count=3, size=3),
    "TGV": R.TGV(),
    "FoE": R.FoE(count=3, size=3, potential="root"),
    "ICNN": R.ICNN(hidden=3, outputs=2, size=3),
}
LIBRARY = {"ICNN": ("cusolver_gesvdj_ffi",)}  # the 2-norm of a small matrix, by its singular values


def regularised(regularizer, form: str, dtype: str) -> Program:
    kind = Implicit if form == "smooth" else Piggyback
    solver = {"solver": AGD} if form == "smooth" else {}
    setting = partial(denoising, regularizer=regularizer, form=form)
    return hypergradient(OracleCase(setting, oracle(kind, estimate=False, **solver)), dtype)


CASES: dict[str, Case] = {
    **{name: Case("hypergradient", partial(hypergradient, case), case.quick) for name, case in ORACLES.items()},
    **{f"value of {name}": Case("value", partial(value, ORACLES[name]), quick=False) for name in VALUES},
    **{name: Case("solution", build) for name, build in SOLUTIONS.items()},
    **{name: Case("method, a step", build, name == "FirstOrder") for name, build in METHODS.items()},
    **{name: Case("operator", partial(products, make)) for name, make in OPERATORS.items()},
    "parallel beam, traced subset": Case("operator", traced_subset),
    "from_callbacks": Case("operator", partial(products, BRIDGES["from_callbacks"]), bridge=True),
    "ASTRA": Case("operator", partial(products, BRIDGES["ASTRA"]), bridge=True, needs="astra"),
    **{
        name: Case("network", partial(network, *made), name in ("LSPD", "ConvNet"), needs="flax")
        for name, made in NETWORKS.items()
    },
    **{
        f"{name}, {form}": Case(
            "regulariser", partial(regularised, regularizer, form), quick=False, custom_calls=LIBRARY.get(name, ())
        )
        for form, group in (("smooth", SMOOTH), ("saddle", SADDLES))
        for name, regularizer in group.items()
    },
}
