"""Problems that `jb.variational` makes, in each form, with solutions by dense NumPy, for `test_problem_matrix.py`."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from kinds_for_tests import COUNT, RNG, Kind, newton, shrink, splitting

import jbilevel as jb

SHAPE = (4, 3)
PIXELS = 12
IMAGES = RNG.standard_normal((COUNT, *SHAPE))


def gradient_matrix():
    """(2, pixel, pixel): forward differences downwards and to the right, 0 at the border."""
    pixel = np.arange(PIXELS).reshape(SHAPE)
    D = np.zeros((2, PIXELS, PIXELS))
    for part, here, there in ((D[0], pixel[:-1], pixel[1:]), (D[1], pixel[:, :-1], pixel[:, 1:])):
        part[here.ravel(), there.ravel()] = 1
        part[here.ravel(), here.ravel()] = -1
    return D


D = gradient_matrix()


def smoothed_slope(Q, c, weight, eps, x):
    roots = np.sqrt(np.sum((D @ x) ** 2, axis=0) + eps**2)
    return Q @ x - c + weight * np.einsum("gij,gi->j", D, D @ x / roots)


def smoothed_curvature(Q, weight, eps, x):
    roots = np.sqrt(np.sum((D @ x) ** 2, axis=0) + eps**2)
    across = np.einsum("gij,gi->ij", D, D @ x)
    straight = np.einsum("gij,gik,i->jk", D, D, 1 / roots)
    return Q + weight * (straight - np.einsum("ij,ik,i->jk", across, across, 1 / roots**3))


def smoothed_minimiser(B, ridge, theta, y):
    """Of 1/2 |B x - y|^2 + ridge/2 |x|^2 + e^theta_0 sum sqrt(|D x|^2 + e^{2 theta_1})."""
    Q = np.real(B.conj().T @ B) + ridge * np.eye(PIXELS)
    c = np.real(B.conj().T @ np.ravel(y))
    weight, eps = np.exp(theta)
    return newton(
        partial(smoothed_slope, Q, c, weight, eps), partial(smoothed_curvature, Q, weight, eps), np.zeros(PIXELS)
    )


def columns(operator):
    return np.stack([np.ravel(operator(unit.reshape(SHAPE))) for unit in np.eye(PIXELS)], axis=1)


def blur(x):
    """A plain linear function."""
    return 0.5 * x + 0.25 * jnp.roll(x, 1, 0) + 0.25 * jnp.roll(x, -1, 1)


def blur_in_numpy(x):
    return 0.5 * x + 0.25 * np.roll(x, 1, 0) + 0.25 * np.roll(x, -1, 1)


def fourier(x):
    """Half of the orthonormal Fourier coefficients: a complex measurement of a real image."""
    return jnp.fft.fft2(x, norm="ortho")[::2]


IDENTITY = np.eye(PIXELS)
BLUR = columns(blur_in_numpy)
FOURIER = columns(lambda x: np.fft.fft2(x, norm="ortho")[::2])
SPECTRA = RNG.standard_normal((COUNT, 2, 3)) + 1j * RNG.standard_normal((COUNT, 2, 3))
THETA = jnp.asarray([-1.0, -1.5])
WRONG_THETA = (jnp.zeros(3), ValueError, r"params of SmoothedTV must have shape \(2,\), got \(3,\)")


def smoothed(operator=None, **options):
    return jb.variational(operator, jb.regularizers.SmoothedTV(), **options)


def blurred(**options):
    return smoothed(blur, in_shape=SHAPE, operator_norm=1.0, **{"ridge": 0.1} | options)


def transformed(**options):
    known = {"form": "saddle", "in_shape": SHAPE, "operator_norm": 1.0, "ridge": 0.2}
    return smoothed(fourier, **known | options)


DENOISING = Kind(
    make=smoothed,
    other=lambda: jb.variational(None, jb.regularizers.SmoothedTV(kind="anisotropic")),
    params=THETA,
    y=IMAGES,
    minimiser=partial(smoothed_minimiser, IDENTITY, 0.0),
    residual=lambda theta, x, y: np.linalg.norm(smoothed_slope(IDENTITY, y.ravel(), *np.exp(theta), x.ravel())),
    size=SHAPE,
    refused=(WRONG_THETA,),
    mistakes=((lambda: smoothed(form="third"), ValueError, "`form` must be one of"),),
)

DEBLURRING = Kind(
    make=blurred,
    other=partial(blurred, ridge=0.2),
    params=THETA,
    y=IMAGES,
    minimiser=partial(smoothed_minimiser, BLUR, 0.1),
    size=SHAPE,
    refused=(WRONG_THETA,),
    mistakes=(
        (lambda: smoothed(blur), ValueError, "pass `in_shape`"),
        (lambda: smoothed(np.eye(4)), TypeError, "`operator` must be a linear function or None"),
    ),
)


def squares(params, x):
    """A regulariser that is a plain function: nothing is known of it."""
    return 0.5 * jnp.exp(params) * jnp.sum(x**2)


FUNCTION = Kind(
    make=lambda: jb.variational(None, squares),
    other=lambda: jb.variational(None, squares, ridge=0.1),
    params=jnp.asarray(-0.3),
    y=IMAGES,
    minimiser=lambda params, y: y.ravel() / (1 + np.exp(params)),
    residual=lambda params, x, y: np.linalg.norm(x - y + np.exp(params) * x),
    size=SHAPE,
    mistakes=((lambda: jb.variational(None, squares, ridge=-1.0), ValueError, "`ridge` must be nonnegative"),),
)

COMPLEX_SADDLE = Kind(
    make=transformed,
    other=partial(transformed, ridge=0.3),
    params=THETA,
    y=SPECTRA,
    minimiser=partial(smoothed_minimiser, FOURIER, 0.2),
    size=SHAPE,
    refused=(WRONG_THETA,),
    mistakes=(
        (partial(transformed, operator_norm=None), ValueError, "needs `operator_norm`"),
        (lambda: jb.variational(None, squares, form="saddle"), ValueError, "has no saddle form"),
    ),
)


def nonnegative_minimiser(theta, y):
    M = np.concatenate([D, IDENTITY[None]])
    prox = lambda v, t: np.concatenate([shrink(v[:2], t * np.exp(theta[0])), np.maximum(v[2:], 0)])  # noqa: E731
    return splitting(IDENTITY, y.ravel(), M, prox)


def total_variation(**options):
    return jb.variational(None, jb.regularizers.TV(), **{"nonnegative": True} | options)


CONSTRAINED_SADDLE = Kind(
    make=total_variation,
    other=partial(total_variation, nonnegative=False),
    params=jnp.asarray([-1.2]),
    y=IMAGES + 0.3,
    minimiser=nonnegative_minimiser,
    size=SHAPE,
    refused=((jnp.zeros(2), ValueError, r"params of TV must have shape \(1,\)"),),
    mistakes=((partial(total_variation, form="smooth"), ValueError, "TV is not smooth"),),
)


def affine_minimiser(theta, y):
    """Of 1/2 |x - y|^2 + e^theta_0 sum |D x - w| + e^theta_1 sum |E w|, in u = (x, w_down, w_right).

    w lives where edges do. E w has the second differences of each w along its own direction, and the mixed one over
    sqrt(2), each where all the edges it reads exist.
    """
    row, column = np.indices(SHAPE).reshape(2, PIXELS)
    edges = np.stack([row < SHAPE[0] - 1, column < SHAPE[1] - 1])
    nothing = np.zeros((PIXELS, PIXELS))
    first = [np.hstack([D[0], -np.diag(1.0 * edges[0]), nothing]), np.hstack([D[1], nothing, -np.diag(1.0 * edges[1])])]
    second = [
        (edges[0] & (row > 0))[:, None] * np.hstack([nothing, -D[0].T, nothing]),
        (edges[1] & (column > 0))[:, None] * np.hstack([nothing, nothing, -D[1].T]),
        (edges[0] & edges[1])[:, None] * np.hstack([nothing, D[1], D[0]]) / np.sqrt(2),
    ]
    absent = np.concatenate([np.zeros(PIXELS), ~edges.ravel()])
    Q = np.diag(np.concatenate([np.ones(PIXELS), np.zeros(2 * PIXELS)]) + absent)
    c = np.concatenate([y.ravel(), np.zeros(2 * PIXELS)])
    weights = np.exp(theta)
    prox = lambda v, t: np.concatenate([shrink(v[:2], t * weights[0]), shrink(v[2:], t * weights[1])])  # noqa: E731
    return splitting(Q, c, np.stack([*first, *second]), prox)[:PIXELS]


def generalised(**options):
    return jb.variational(None, jb.regularizers.TGV(), **options)


AUXILIARY_SADDLE = Kind(
    make=generalised,
    other=partial(generalised, ridge=0.1),
    params=jnp.asarray([-1.2, -0.8]),
    y=IMAGES,
    minimiser=affine_minimiser,
    size=SHAPE,
    refused=((jnp.zeros(1), ValueError, r"params of TGV must have shape \(2,\)"),),
    mistakes=((partial(generalised, nonnegative=True, form="smooth"), ValueError, "TGV is not smooth"),),
)
