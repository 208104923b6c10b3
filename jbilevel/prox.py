"""Proximal maps prox_{s f}(v) = argmin_x f(x) + |x - v|^2/(2 s), with exact derivatives under every JAX transformation.

All act on one array, elementwise or over groups, in its dtype; ``step`` s, weights and radii may be numbers or arrays
that broadcast against v without a new axis, and may be traced. Maps named after a set are projections and take no step.

Derivatives exist almost everywhere; at a kink they are those of one side: of the flat one (0 where a threshold is just
reached), and of the identity on the boundary of a set. No derivative is NaN at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._core import trees

__all__ = [
    "ball",
    "box",
    "check_prox",
    "conjugate",
    "divided",
    "group",
    "huber",
    "huber_conjugate",
    "root",
    "root_conjugate",
    "same_output",
    "smoothed_relu",
    "smoothed_relu_conjugate",
    "smoothed_relu_epigraph",
    "soft",
    "squared_distance",
    "squared_distance_conjugate",
    "times",
]

FEW = 4  # members of a group that are split: XLA is slow at short reductions and their transposes on a CPU
HALLEY_STEPS = 3
NEWTON_STEPS = 6  # to rounding, from the right of the root of a convex increasing cubic


def _radial(v, axis, factor):
    """v * factor(|v|), |v| the 2-norm over ``axis`` (kept), with derivative 0 where it is 0."""
    few = isinstance(axis, int) and v.shape[axis] <= FEW
    parts = jax.lax.split(v, [1] * v.shape[axis], axis % v.ndim) if few else [v]
    squared = sum(p * p for p in parts) if few else jnp.sum(v * v, axis=axis, keepdims=True)
    positive = squared > 0
    scale = factor(jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0))
    parts = [p * scale for p in parts]
    return jax.lax.concatenate(parts, axis % v.ndim) if few else parts[0]


def soft(v, step=1.0, weight=1.0):
    """Prox of weight |x|_1: soft thresholding; derivative 0 where |v| <= step weight.

    >>> import jax.numpy as jnp
    >>> soft(jnp.array([-3.0, 0.5, 2.0])).tolist()
    [-2.0, 0.0, 1.0]
    """
    threshold = step * weight
    return jnp.where(jnp.abs(v) > threshold, v - threshold * jnp.sign(v), 0.0)


def group(v, step=1.0, weight=1.0, *, axis):
    """Prox of weight sum |x|_2, the 2-norm taken over ``axis``: isotropic shrinkage; derivative 0 inside.

    >>> import jax.numpy as jnp
    >>> group(jnp.array([[3.0, 0.3], [4.0, 0.4]]), 2.5, axis=0).tolist()  # columns of lengths 5 and 1/2, less 2.5
    [[1.5, 0.0], [2.0, 0.0]]
    """
    threshold = step * weight

    def factor(length):
        outside = length > threshold
        return jnp.where(outside, 1.0 - threshold / jnp.where(outside, length, 1.0), 0.0)

    return _radial(v, axis, factor)


def box(v, lower=None, upper=None):
    """Projection onto lower <= x <= upper (None: no bound).

    >>> import jax.numpy as jnp
    >>> box(jnp.array([-1.0, 0.5, 3.0]), 0.0, 1.0).tolist(), box(jnp.array([-1.0, 3.0]), lower=0.0).tolist()
    ([0.0, 0.5, 1.0], [0.0, 3.0])
    """
    v = v if lower is None else jnp.where(v < lower, lower, v)
    return v if upper is None else jnp.where(v > upper, upper, v)


def ball(v, radius=1.0, *, axis=None):
    """Projection onto |x|_2 <= radius, the 2-norm taken over ``axis`` (None: over the whole array).

    >>> import jax.numpy as jnp
    >>> ball(jnp.array([3.0, 4.0]), 2.5).tolist(), ball(jnp.array([3.0, 4.0]), 10.0).tolist()
    ([1.5, 2.0], [3.0, 4.0])
    """

    def factor(length):
        outside = length > radius
        return jnp.where(outside, radius / jnp.where(outside, length, 1.0), 1.0)

    return _radial(v, axis, factor)


def squared_distance(v, step, center=0.0, weight=1.0):
    """Prox of weight/2 |x - center|^2: the data term of denoising, or of any measurement with a diagonal weight.

    >>> import jax.numpy as jnp
    >>> squared_distance(jnp.array([0.0, 4.0]), 1.0, center=2.0).tolist()  # with step and weight 1: half-way
    [1.0, 3.0]
    """
    return (v + step * weight * center) / (1.0 + step * weight)


def squared_distance_conjugate(v, step, center=0.0, weight=1.0):
    """Prox of the conjugate |y|^2/(2 weight) + <center, y> of weight/2 |x - center|^2: a dualised data term.

    >>> import jax.numpy as jnp
    >>> v, step = jnp.array([1.0, 4.0]), 0.5
    >>> squared_distance_conjugate(v, step, 2.0).tolist(), conjugate(squared_distance)(v, step, 2.0).tolist()
    ([0.0, 2.0], [0.0, 2.0])
    """
    return (v - step * center) / (1.0 + step / weight)


def huber(v, step, weight=1.0, width=1.0, *, axis=None):
    """Prox of weight sum h(|x|), h(t) = t^2/(2 width) up to width, t - width/2 beyond.

    |x| is the absolute value, or with ``axis`` the 2-norm over it.

    >>> import jax.numpy as jnp
    >>> huber(jnp.array([1.0, 4.0]), 1.0).tolist()  # halved where h is a parabola, moved by step weight beyond
    [0.5, 3.0]
    """
    threshold = step * weight

    def factor(length):
        far = length > width + threshold
        return jnp.where(far, 1.0 - threshold / jnp.where(far, length, 1.0), 1.0 / (1.0 + threshold / width))

    return v * factor(jnp.abs(v)) if axis is None else _radial(v, axis, factor)


def huber_conjugate(v, step, weight=1.0, width=1.0, *, axis=None):
    """Prox of the conjugate of `huber`'s function: width/(2 weight) |y|^2 where |y| <= weight, else infinite.

    >>> import jax.numpy as jnp
    >>> huber_conjugate(jnp.array([1.0, 4.0]), 1.0).tolist()  # halved, and projected onto [-1, 1]
    [0.5, 1.0]
    """
    shrunk = v / (1.0 + step * width / weight)
    return box(shrunk, -weight, weight) if axis is None else ball(shrunk, weight, axis=axis)


def root(v, step, weight=1.0, width=1.0, *, axis=None):
    """Prox of weight sum sqrt(|x|^2 + width^2), |x| as in `huber`: smoothed total variation and its relatives.

    |x| = width u with step weight u/sqrt(1 + u^2) + width u = |v|.

    >>> import jax.numpy as jnp
    >>> v, step = jnp.array([0.1, 5.0]), 1.0
    >>> x = root(v, step)
    >>> bool(jnp.allclose(x + step * x / jnp.sqrt(x**2 + 1), v, atol=1e-6))  # the condition that defines it
    True
    """

    def factor(length):
        bent, linear = _root_split(step * weight, width, length)
        return linear / (bent + linear)

    return v * factor(jnp.abs(v)) if axis is None else _radial(v, axis, factor)


def root_conjugate(v, step, weight=1.0, width=1.0, *, axis=None):
    """Prox of the conjugate of `root`'s function: -width sqrt(weight^2 - |y|^2) where |y| <= weight, else infinite.

    |y| = weight u/sqrt(1 + u^2) with weight u/sqrt(1 + u^2) + step width u = |v|.

    >>> import jax.numpy as jnp
    >>> v = jnp.array([0.1, 5.0])
    >>> bool(jnp.allclose(root_conjugate(v, 0.5), conjugate(root)(v, 0.5), atol=1e-6))  # and never beyond the weight
    True
    """

    def factor(length):
        bent, linear = _root_split(weight, step * width, length)
        return bent / (bent + linear)

    return v * factor(jnp.abs(v)) if axis is None else _radial(v, axis, factor)


def _root_split(a, b, c):
    """(a/sqrt(1 + u^2), b) over a + b, for the u >= 0 with a u/sqrt(1 + u^2) + b u = c.

    Concave in u: solved to rounding by a fixed number of Halley's steps from a start that is right within 40 %.
    """
    a, b, c = a / (a + b), b / (a + b), c / (a + b)
    b = jnp.maximum(b, jnp.finfo(c.dtype).eps ** 1.5)  # what lies below matters to nobody, and powers of u overflow

    def derivatives(u):
        """The equation's residual with its first and second derivative."""
        inverse = jax.lax.rsqrt(1.0 + u * u)
        return (a * inverse + b) * u - c, a * inverse**3 + b, -3.0 * a * u * inverse**5

    def halley(u):
        value, first, second = derivatives(u)
        return u - 2.0 * value * first / (2.0 * first**2 - value * second)

    def newton(u):
        value, first, _ = derivatives(u)
        return u - value / first

    # bounds from below, and half of what holds where one of both terms matters little
    inside = c < a
    c_over_a = jnp.where(inside, c / jnp.where(inside, a, 1.0), 0.0)
    without_b = jnp.where(inside, c_over_a * jax.lax.rsqrt((1.0 - c_over_a) * (1.0 + c_over_a)), jnp.inf)
    knee = (a / (2.0 * b)) ** (1.0 / 3.0)
    u = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(c, (c - a) / b), 0.5 * jnp.minimum(without_b, knee)))
    for _ in range(HALLEY_STEPS):
        u = jax.lax.stop_gradient(halley(u))
    # two more steps from a point that counts as fixed carry first and second derivatives exactly
    u = newton(newton(u))
    return a * jax.lax.rsqrt(1.0 + u * u), b


def smoothed_relu(v, step, weight=1.0, width=0.01):
    """Prox of weight sum psi(x), psi(t) = 0, t^2/(2 width), t - width/2 for t <= 0, < width, beyond.

    Bogensperger et al. 2024 (bogensperger_piggyback_maid_2024), (31).

    >>> import jax.numpy as jnp
    >>> smoothed_relu(jnp.array([-1.0, 1.0, 4.0]), 1.0, width=1.0).tolist()
    [-1.0, 0.5, 3.0]
    """
    threshold = step * weight
    middle = v / (1.0 + threshold / width)
    return jnp.where(v <= 0, v, jnp.where(v > width + threshold, v - threshold, middle))


def smoothed_relu_conjugate(v, step, weight=1.0, width=0.01):
    """Prox of the conjugate of `smoothed_relu`'s function: width/(2 weight) y^2 on [0, weight], else infinite.

    >>> import jax.numpy as jnp
    >>> smoothed_relu_conjugate(jnp.array([-1.0, 1.0, 4.0]), 1.0, width=1.0).tolist()
    [0.0, 0.5, 1.0]
    """
    return box(v / (1.0 + step * width / weight), 0.0, weight)


def smoothed_relu_epigraph(s, t, width=0.01):
    """Nearest (p, q) to (s, t) with psi(p) <= q, psi as in `smoothed_relu`; elementwise, s and t of one shape.

    Closed form but for the curved part of the boundary, where p is the root in (0, width) of
    p^3/(2 width^2) + (1 - t/width) p - s, found by Newton's method from its right, where the cubic is convex: it needs
    no safeguard (Bogensperger et al. 2024, bogensperger_piggyback_maid_2024, (32); Wong, Ehrhardt & Mukherjee 2024).

    >>> import jax.numpy as jnp
    >>> p, q = smoothed_relu_epigraph(jnp.array([-1.0, 3.0]), jnp.array([-1.0, 0.0]), 1.0)
    >>> p.tolist(), q.tolist()
    ([-1.0, 1.75], [0.0, 1.25])
    """
    clipped = box(s, 0.0, width)
    inside = t >= clipped**2 / (2 * width) + box(s - width, 0.0)
    negative = s <= 0
    linear = s + t >= 1.5 * width
    quadratic = ~(inside | negative | linear)
    root = _cubic_root(jnp.where(quadratic, s, 0.5 * width), jnp.where(quadratic, t, 0.0), width)
    half = 0.5 * (s + t) + 0.25 * width
    p = jnp.where(inside | negative, s, jnp.where(linear, half, root))
    q = jnp.where(negative, 0.0, jnp.where(linear, half - 0.5 * width, root**2 / (2 * width)))
    return p, jnp.where(inside, t, q)


def _cubic_root(s, t, width):
    linear_term = 1.0 - t / width  # > 1/2 on the quadratic part

    def newton(p):
        return p - (p**3 / (2 * width**2) + linear_term * p - s) / (1.5 * p**2 / width**2 + linear_term)

    p = jax.lax.stop_gradient(jnp.minimum(s / linear_term, width))
    p = jax.lax.fori_loop(0, NEWTON_STEPS, lambda _, p: jax.lax.stop_gradient(newton(p)), p)
    # two more steps from a point that counts as fixed carry first and second derivatives exactly
    return newton(newton(p))


def conjugate(prox: Callable) -> Callable:
    """Prox of the convex conjugate, by Moreau's identity: prox_{s f*}(v) = v - s prox_{f/s}(v/s).

    ``prox(v, step, ...)`` and the result take arrays, with ``step`` a number or an array.

    >>> import jax.numpy as jnp
    >>> conjugate(soft)(jnp.array([-3.0, 0.5]), 2.0).tolist()  # the box [-1, 1]
    [-1.0, 0.5]
    """
    return partial(_conjugated, prox)


def _conjugated(prox, v, step, *arguments, **options):
    return v - step * prox(v / step, 1.0 / step, *arguments, **options)


def times(step, v):
    """step * v for a step that is one number, or a pytree like v of numbers and arrays.

    >>> import jax.numpy as jnp
    >>> v = {"image": jnp.array([1.0, 2.0]), "dual": jnp.array(3.0)}
    >>> times(2.0, v)["image"].tolist(), times({"image": 0.5, "dual": 1.0}, v)["image"].tolist()
    ([2.0, 4.0], [0.5, 1.0])
    """
    if jax.tree.structure(step) == jax.tree.structure(0) and jnp.ndim(step) == 0:
        return trees.scale(step, v)
    return jax.tree.map(lambda s, leaf: (s * leaf).astype(leaf.dtype), step, v)


def divided(v, step):
    """v / step, as in `times`.

    >>> import jax.numpy as jnp
    >>> divided(jnp.array([1.0, 2.0]), 4.0).tolist()
    [0.25, 0.5]
    """
    return times(jax.tree.map(lambda s: 1.0 / s, step), v)


def check_prox(prox: Callable, v, step=0.5, *, pairs: int = 20, scale: float = 1.0, tol: float = 1e-5, seed: int = 0):
    """Raise ValueError unless ``prox(v, step)`` behaves like the prox of a convex function near v.

    At ``pairs`` random points around v (a pytree; ``scale``: standard deviation): same structure, shapes and dtypes as
    v, firmly nonexpansive, |Pu - Pv|^2 <= <Pu - Pv, u - v>, with a derivative that is symmetric and agrees with
    differences. Both inner products are weighted with 1/step. Use float64: differences are worth little in float32.
    Kinks are forgiven: the worst tenth of the comparisons with differences does not count.

    >>> import jax, jax.numpy as jnp
    >>> with jax.enable_x64(True):
    ...     check_prox(soft, jnp.zeros(3))
    ...     check_prox(lambda v, step: v**2, jnp.zeros(3))
    Traceback (most recent call last):
    ValueError: the prox is not firmly nonexpansive, so it is the prox of no convex function.
    """
    apply = lambda v: prox(v, step)  # noqa: E731
    same_output(jax.eval_shape(apply, v), v, "the prox")
    weighted = lambda a, b: trees.dot(a, divided(b, step))  # noqa: E731

    def measure(point, gap, direction, other):
        """Excess of |Pu - Pv|^2, mismatch of VJP and JVP, asymmetry, mismatch of JVP and differences."""
        moved = trees.sub(apply(trees.add(point, gap)), apply(point))
        change, pull = jax.jvp(apply, (point,), (direction,))[1], jax.vjp(apply, point)[1]
        other_change = jax.jvp(apply, (point,), (other,))[1]
        transposed = times(step, pull(divided(other, step))[0])
        h = 1e-6 * scale
        ahead, behind = (apply(trees.add_scaled(point, sign * h, direction)) for sign in (1, -1))
        difference = trees.scale(0.5 / h, trees.sub(ahead, behind))
        size = jnp.sqrt(weighted(direction, direction) * weighted(other, other))
        return jnp.stack(
            [
                (weighted(moved, moved) - weighted(moved, gap)) / weighted(gap, gap),
                jnp.abs(weighted(change, other) - weighted(direction, transposed)) / size,
                jnp.abs(weighted(change, other) - weighted(direction, other_change)) / size,
                trees.norm(trees.sub(difference, change)) / trees.norm(direction),
            ]
        )

    rng = np.random.default_rng(seed)
    noise = lambda size: jax.tree.map(  # noqa: E731
        lambda leaf: jnp.asarray(size * rng.standard_normal((pairs, *jnp.shape(leaf))), leaf.dtype), v
    )
    points = jax.tree.map(lambda leaf, e: leaf[None] + e, v, noise(scale))
    found = jax.jit(jax.vmap(measure))(points, noise(scale), noise(1.0), noise(1.0))
    excess, transpose, asymmetry, misfit = np.asarray(found).T
    if excess.max() > tol:
        raise ValueError("the prox is not firmly nonexpansive, so it is the prox of no convex function.")
    if transpose.max() > tol:
        raise ValueError("the VJP of the prox is not the transpose of its JVP; check its custom derivative.")
    if asymmetry.max() > tol:
        raise ValueError("the derivative of the prox is not symmetric, so it is the prox of no function.")
    if np.quantile(misfit, 0.9, method="lower") > max(tol, 1e-4):
        raise ValueError(
            f"the derivative of the prox differs from its differences by {misfit.max():.1e}; check its derivative."
        )


def same_output(out, v, name: str) -> None:
    """ValueError/TypeError unless ``out`` (shapes) has the structure, the shapes and the dtypes of v.

    >>> import jax, jax.numpy as jnp
    >>> v = jnp.zeros(3)
    >>> same_output(jax.eval_shape(soft, v), v, "my prox")
    >>> same_output(jax.eval_shape(jnp.sum, v), v, "my prox")
    Traceback (most recent call last):
    ValueError: my prox must return the shape (3,), got ().
    """
    if jax.tree.structure(out) != jax.tree.structure(v):
        raise ValueError(f"{name} must return the structure {jax.tree.structure(v)}, got {jax.tree.structure(out)}.")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(v), strict=True):
        where = jax.tree_util.keystr(path)
        if a.shape != jnp.shape(b):
            raise ValueError(f"{name} must return the shape {jnp.shape(b)}{where and f' at {where}'}, got {a.shape}.")
        if a.dtype != jnp.result_type(b):
            raise TypeError(
                f"{name} must return the dtype {jnp.result_type(b)}{where and f' at {where}'}, got {a.dtype}."
            )


def __dir__():
    return __all__
