"""Problems of every kind as users make them, with their solutions by dense NumPy, for `test_problem_matrix.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbilevel as jb

RNG = np.random.default_rng(0)
COUNT = 3


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A problem, and what is true of it by other means.

    Batches hold the measurement y, and x, the picture that the upper level wants, flat.
    """

    make: Callable[[], jb.Problem]  # again from the same parts
    other: Callable[[], jb.Problem]  # the same, but for one setting
    params: Any
    y: np.ndarray  # of all samples
    minimiser: Callable  # (params, y) -> the picture of the solution, flat
    residual: Callable | None = None  # (params, x, y) -> the least that a solve can report at x
    size: tuple[int, ...] = ()  # shape of the picture, where it is one array
    oracle: bool = True  # whether the problem knows one
    refused: tuple = ()  # (params, error, sentence)
    mistakes: tuple = ()  # (what makes a problem wrongly, error, sentence)

    @property
    def batch(self):
        count = len(self.minimiser(self.params, self.y[0]))
        target = np.random.default_rng(1).standard_normal((COUNT, count))
        return {"y": jnp.asarray(self.y), "x": jnp.asarray(target)}


# two ways to minimise with dense matrices


def newton(gradient, hessian, x):
    """The zero of a gradient, by Newton's method with halved steps."""
    for _ in range(100):
        slope = gradient(x)
        step = np.linalg.solve(hessian(x), slope)
        lengths = (0.5**k for k in range(40))
        better = (t for t in lengths if np.linalg.norm(gradient(x - t * step)) < np.linalg.norm(slope))
        length = next(better, None)
        if length is None:  # rounding
            assert np.linalg.norm(slope) <= 1e-12 * (1 + np.linalg.norm(x))
            return x
        x = x - length * step
    raise AssertionError("Newton's method does not end")


def splitting(Q, c, M, prox):
    """argmin_u 1/2 u'Qu - c'u + G(M u), by the alternating direction method of multipliers.

    M has shape (group, place, entry of u); prox(v, t) is that of t G.
    """
    inverse = np.linalg.inv(Q + np.einsum("gij,gik->jk", M, M))
    z = dual = np.zeros(M.shape[:2])
    for _ in range(20_000):
        u = inverse @ (c + np.einsum("gij,gi->j", M, z - dual))
        image = M @ u
        last, z = z, prox(image + dual, 1.0)
        dual = dual + image - z
        if max(np.abs(image - z).max(), np.abs(z - last).max()) < 1e-14:
            return u
    raise AssertionError("the splitting does not end")


def shrink(v, t):
    """Prox of t times the sum of the 2-norms along the first axis."""
    length = np.linalg.norm(v, axis=0)
    return v * np.maximum(1 - t / np.where(length > 0, length, 1.0), 0)


# vectors: a matrix, a measurement

A = RNG.standard_normal((6, 5))
MEASURED = RNG.standard_normal((COUNT, 6))
CONVEXITY = float(np.linalg.eigvalsh(A.T @ A)[0])


def misfit(z, y):
    return 0.5 * jnp.sum((jnp.asarray(A, z.dtype) @ z - y) ** 2)


def together(x):
    return jnp.concatenate([x["u"], x["v"]])


def whole_numbers(params, data):
    return jnp.zeros(5, int)


def two_parts(params, data):
    return {"u": jnp.zeros(2, data["y"].dtype), "v": jnp.zeros(3, data["y"].dtype)}


def quartic(params, x, data):
    z = together(x)
    ridge = 0.5 * jnp.exp(params["strength"]) * jnp.sum(z**2)
    return misfit(z, data["y"]) + ridge + 0.25 * jnp.sum(z**4) - params["tilt"] @ z


def quartic_slope(params, z, y):
    return A.T @ (A @ z - y) + np.exp(params["strength"]) * z + z**3 - params["tilt"]


def quartic_minimiser(params, y):
    curvature = lambda z: A.T @ A + np.exp(params["strength"]) * np.eye(5) + 3 * np.diag(z**2)  # noqa: E731
    return newton(lambda z: quartic_slope(params, z, y), curvature, np.zeros(5))


def quartic_convexity(params, data):
    return CONVEXITY + jnp.exp(params["strength"])


def quartic_problem(**options):
    return jb.SmoothProblem(quartic, two_parts, **{"strong_convexity": quartic_convexity} | options)


SMOOTH = Kind(
    make=quartic_problem,
    other=partial(quartic_problem, strong_convexity=None),
    params={"strength": jnp.asarray(-0.5), "tilt": jnp.asarray(RNG.standard_normal(5))},
    y=MEASURED,
    minimiser=quartic_minimiser,
    residual=lambda params, x, y: np.linalg.norm(quartic_slope(params, together(x), y)),
    mistakes=(
        (lambda: jb.SmoothProblem(None, two_parts), TypeError, "`energy` must be a function"),
        (lambda: quartic_problem(strong_convexity=-1.0), ValueError, "`strong_convexity` must be nonnegative"),
    ),
)


def tikhonov(params, x, data):
    return misfit(x, data["y"]) + 0.5 * jnp.sum(jnp.exp(params) * x**2)


def five(params, data):
    return jnp.zeros(5, data["y"].dtype)


def tikhonov_system(params):
    return A.T @ A + np.diag(np.exp(params))


NOTHING_TOLD = Kind(
    make=lambda: jb.SmoothProblem(tikhonov, five, mixed_precision=True),  # takes its first steps in float32
    other=lambda: jb.SmoothProblem(tikhonov, five),
    params=jnp.asarray(RNG.standard_normal(5)),
    y=MEASURED,
    minimiser=lambda params, y: np.linalg.solve(tikhonov_system(params), A.T @ y),
    residual=lambda params, x, y: np.linalg.norm(tikhonov_system(params) @ x - A.T @ y),
    size=(5,),
    mistakes=(
        (lambda: jb.SmoothProblem(tikhonov, None), TypeError, "`init` must be a function"),
        (lambda: jb.SmoothProblem(tikhonov, whole_numbers).start(None, None), TypeError, "return a float array"),
    ),
)


# min_x max_y <K x, y> + a/2 |x - measured|^2 - b/2 |y|^2


def bilinear(**options):
    return jb.SaddleProblem(
        apply_k, prox_distance, prox_square, zeros,
        **{"mu_primal": modulus_a, "mu_dual": modulus_b, "norm": norm_of_k} | options,
    )  # fmt: skip


def apply_k(params, x, data):
    return params["K"] @ x


def prox_distance(params, v, step, data):
    return (v + step * params["a"] * data["y"]) / (1 + step * params["a"])


def prox_square(params, v, step, data):
    return v / (1 + step * params["b"])


def zeros(params, data):
    return jnp.zeros(6, data["y"].dtype), jnp.zeros(4, data["y"].dtype)


def modulus_a(params, data):
    return params["a"]


def modulus_b(params, data):
    return params["b"]


def norm_of_k(params, data):
    return jnp.linalg.norm(params["K"])


def bilinear_minimiser(params, y):
    K, a, b = (np.asarray(params[name]) for name in "Kab")
    return np.linalg.solve(a * np.eye(6) + K.T @ K / b, a * y)


def bilinear_residual(params, pair, y):
    """mu_g times the proven bound on the distance of x, from the one element of the operator at a point."""
    (x, dual), (K, a, b) = pair, (np.asarray(params[name]) for name in "Kab")
    first = np.linalg.norm(a * (x - y) + K.T @ dual)
    second = np.linalg.norm(b * dual - K @ x)
    return 0.5 * (first + np.sqrt(first**2 + second**2 * a / b))


SADDLE = Kind(
    make=bilinear,
    other=partial(bilinear, norm=None),
    params={"K": jnp.asarray(RNG.standard_normal((4, 6))), "a": jnp.asarray(1.5), "b": jnp.asarray(0.7)},
    y=MEASURED,
    minimiser=bilinear_minimiser,
    residual=bilinear_residual,
    size=(6,),
    mistakes=(
        (lambda: jb.SaddleProblem(apply_k, None, prox_square, zeros), TypeError, "`prox_primal` must be a func"),
        (lambda: replace(bilinear(), init=whole_numbers).start(None, None), TypeError, r"return a pair \(x0, y0\)"),
        (lambda: bilinear(mu_dual="strong"), TypeError, "`mu_dual` must be a number or a function"),
    ),
)


# 1/2 |A x - y|^2 + ridge/2 |x|^2 + sum_i e^{params_i} |x_i|

RIDGE = 0.1


def net(params, x, data):
    return misfit(x, data["y"]) + 0.5 * RIDGE * jnp.sum(x**2)


def net_problem(**options):
    known = {"strong_convexity": RIDGE + CONVEXITY, "smoothness": RIDGE + float(np.linalg.norm(A, 2)) ** 2}
    return jb.WeightedL1Problem(net, five, **known | options)


def net_minimiser(params, y):
    soft = lambda v, t: np.sign(v) * np.maximum(np.abs(v) - t * np.exp(params), 0)  # noqa: E731
    return splitting(A.T @ A + RIDGE * np.eye(5), A.T @ y, np.eye(5)[None], soft)


def net_residual(params, x, y):
    """The least subgradient at x."""
    slope, weight = A.T @ (A @ x - y) + RIDGE * x, np.exp(params)
    at_zero = np.maximum(np.abs(slope) - weight, 0)
    return np.linalg.norm(np.where(x == 0, at_zero, slope + weight * np.sign(x)))


WEIGHTED_L1 = Kind(
    make=net_problem,
    other=partial(net_problem, weights=jnp.abs),
    params=jnp.asarray(np.log([0.2, 1.5, 0.3, 4.0, 0.5])),
    y=MEASURED,
    minimiser=net_minimiser,
    residual=net_residual,
    size=(5,),
    refused=((jnp.full(5, 800.0), ValueError, r"`weights\(params\)` holds inf; weights must be finite"),),
    mistakes=(
        (lambda: replace(net_problem(), init=whole_numbers).start(None, None), TypeError, "return a float array"),
        (lambda: net_problem(weights=2.0), TypeError, "`weights` must be a function"),
        (lambda: net_problem(smoothness=0.0), ValueError, "`smoothness` must be positive"),
    ),
)


# of third parties: one that is solved and differentiated as smooth, one with a view and a solver of its own


@dataclass(frozen=True)
class Ridge(jb.Problem):
    """min_x 1/2 |x - y|^2 + scale e^params/2 |x|^2."""

    view_type = jb.SmoothView
    scale: float = 1.0

    def view(self, params, data):
        weight = self.scale * jnp.exp(params)
        energy = lambda x: 0.5 * jnp.sum((x - data["y"]) ** 2) + 0.5 * weight * jnp.sum(x**2)  # noqa: E731
        return jb.SmoothView(energy, jb.Constants(strong_convexity=1 + jax.lax.stop_gradient(weight)))

    def start(self, params, data):
        return jnp.zeros_like(data["y"])

    def default_solver(self):
        return jb.solvers.NewtonCG()

    def oracle(self, loss, **options):
        return jb.implicit.Oracle(self, loss, **options)


THIRD_PARTY = Kind(
    make=Ridge,
    other=partial(Ridge, scale=2.0),
    params=jnp.asarray(0.3),
    y=MEASURED,
    minimiser=lambda params, y: y / (1 + np.exp(params)),
    residual=lambda params, x, y: np.linalg.norm(x - y + np.exp(params) * x),
    size=(6,),
)


@dataclass(frozen=True)
class BoundedView(jb.View):
    gradient: Callable
    mu: Any
    smoothness: Any
    least: float

    @property
    def tolerance_scale(self):
        return self.mu

    def error_bound(self, residual):
        return jnp.where(jnp.isnan(residual), jnp.inf, residual / self.mu)


class BoundedState(NamedTuple):
    x: Any
    gradient: Any
    residual: Any
    curvature: Any
    evaluations: jb.Work
    point: Any


@dataclass(frozen=True)
class ProjectedGradient(jb.Solver):
    """x+ = max(x - gradient/L, least); L |x - x+|/mu bounds the distance of x+."""

    def init(self, view, x0, target):
        return self._at(view, x0, jb.Work.zero())

    def step(self, view, state, target):
        return self._at(view, state.x, state.evaluations)

    def _at(self, view, point, work):
        x = jnp.maximum(point - view.gradient(point) / view.smoothness, view.least)
        gap = view.smoothness * (point - x)
        return BoundedState(x, gap, jnp.linalg.norm(gap), view.smoothness, work.plus(gradients=1), point)


@dataclass(frozen=True)
class Bounded(jb.Problem):
    """min 1/2 |A x - y|^2 + e^params/2 |x|^2 over x >= least."""

    view_type = BoundedView
    least: float = 0.0

    def view(self, params, data):
        ridge = jnp.exp(params)
        matrix = jnp.asarray(A, data["y"].dtype)
        gradient = lambda x: matrix.T @ (matrix @ x - data["y"]) + ridge * x  # noqa: E731
        return BoundedView(gradient, CONVEXITY + ridge, float(np.linalg.norm(A, 2)) ** 2 + ridge, self.least)

    def start(self, params, data):
        return jnp.zeros(5, data["y"].dtype)

    def default_solver(self):
        return ProjectedGradient()


def bounded_minimiser(params, y):
    return splitting(
        A.T @ A + np.exp(params) * np.eye(5), A.T @ y, np.eye(5)[None], lambda v, t: np.maximum(v, 0)
    )  # fmt: skip


OWN_VIEW = Kind(
    make=Bounded,
    other=partial(Bounded, least=-1.0),
    params=jnp.asarray(-0.5),
    y=MEASURED,
    minimiser=bounded_minimiser,
    size=(5,),
    oracle=False,
)
