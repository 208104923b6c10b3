"""variational: energies, constants and cold starts from the parts, for every kind of operator."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb
from jbilevel.regularizers import SmoothedTV

rng = np.random.default_rng(0)
THETA = jnp.array([-2.0, -2.0])
TV = SmoothedTV()
IMAGE = jnp.asarray(rng.standard_normal((6, 5)))


def tikhonov(params, x):
    """A regulariser without bounds."""
    return 0.5 * jnp.exp(params) * jnp.sum(x**2)


@dataclass(frozen=True)
class Scaling:
    """An operator object: 3 x on the left half of the image and 1 x on the right."""

    in_shape: tuple

    def weights(self):
        return jnp.where(jnp.arange(self.in_shape[1]) < self.in_shape[1] // 2, 3.0, 1.0)[None, :]

    def __call__(self, x):
        return self.weights() * x

    def H(self, y):
        return self.weights() * y

    def norm(self):
        return 3.0


def blur(x):
    """A user's plain linear function."""
    return 0.5 * x + 0.25 * jnp.roll(x, 1, 0) + 0.25 * jnp.roll(x, -1, 1)


def fourier(x):
    """Half of the orthonormal Fourier coefficients of a real image: a complex measurement."""
    return jnp.fft.fft2(x, norm="ortho")[::2]


def hessian(problem, params, data):
    x = problem.start(params, data)
    flat = lambda v: problem.energy(params, v.reshape(x.shape), data)  # noqa: E731
    return np.asarray(jax.hessian(flat)(x.ravel()))


def check_bounds(problem, params, data):
    constants = problem.constants(params, data)
    spectrum = np.linalg.eigvalsh(hessian(problem, params, data))
    if constants.strong_convexity is not None:
        assert float(constants.strong_convexity) <= spectrum[0] + 1e-10
    assert spectrum[-1] <= float(constants.smoothness) + 1e-10
    return constants


def test_identity():
    problem = jb.variational(None, TV)
    expected = 0.5 * jnp.sum((2 * IMAGE - IMAGE) ** 2) + TV(THETA, 2 * IMAGE)
    assert float(problem.energy(THETA, 2 * IMAGE, IMAGE)) == pytest.approx(float(expected))
    np.testing.assert_array_equal(problem.start(THETA, IMAGE), IMAGE)
    constants, own = check_bounds(problem, THETA, IMAGE), TV.bounds(THETA, IMAGE.shape)
    assert float(constants.strong_convexity) == 1.0
    assert float(constants.smoothness) == pytest.approx(1 + float(own.smoothness))
    for name in ("hessian_lipschitz", "mixed_lipschitz", "mixed_norm"):
        assert float(getattr(constants, name)) == pytest.approx(float(getattr(own, name)))
    x, info = jb.solve(problem, THETA, IMAGE, tol=1e-8)
    assert int(info.status) == jb.Status.CONVERGED and float(info.error) <= 1e-8
    assert float(jnp.linalg.norm(problem.view(THETA, IMAGE).gradient(x))) <= 1e-8


def test_measurement_inside_the_data():
    truth = jnp.zeros_like(IMAGE)
    problem = jb.variational(None, TV)
    expected = float(problem.energy(THETA, truth, IMAGE))
    for data in ({"y": IMAGE, "x": truth}, (IMAGE, truth), [IMAGE]):
        assert float(problem.energy(THETA, truth, data)) == expected
    mine = jb.variational(None, TV, measurement=lambda d: d["sinogram"])
    assert float(mine.energy(THETA, truth, {"sinogram": IMAGE})) == expected


def test_plain_function():
    problem = jb.variational(blur, TV, in_shape=(6, 5), operator_norm=1.0)
    y = blur(IMAGE)
    constants = check_bounds(problem, THETA, y)
    assert constants.strong_convexity is None
    assert float(constants.smoothness) == pytest.approx(1 + float(TV.bounds(THETA, IMAGE.shape).smoothness))
    # the multiple of A'y that fits y best
    start = problem.start(THETA, y)
    (back,) = jax.linear_transpose(blur, IMAGE)(y)
    length = jnp.vdot(blur(back), y) / jnp.vdot(blur(back), blur(back))
    np.testing.assert_allclose(start, length * back, atol=1e-12)
    x, info = jb.solve(problem, THETA, y, tol=1e-7)
    assert int(info.status) == jb.Status.CONVERGED and np.isinf(info.error)
    convex = jb.variational(blur, TV, in_shape=(6, 5), operator_norm=1.0, data_convexity=1e-3)
    assert float(convex.constants(THETA, y).strong_convexity) == 1e-3


def test_operator_object():
    A = Scaling((6, 5))
    problem = jb.variational(A, TV, data_convexity=1.0)
    y = A(IMAGE)
    constants = check_bounds(problem, THETA, y)
    assert float(constants.smoothness) == pytest.approx(9 + float(TV.bounds(THETA, IMAGE.shape).smoothness))
    assert float(constants.strong_convexity) == 1.0
    back = A.H(y)
    length = jnp.vdot(A(back), y) / jnp.vdot(A(back), A(back))
    np.testing.assert_allclose(problem.start(THETA, y), length * back, atol=1e-12)
    x, info = jb.solve(problem, THETA, y, tol=1e-8)
    assert int(info.status) == jb.Status.CONVERGED and float(info.error) <= 1e-8


@pytest.mark.slow
def test_complex_measurement_of_a_real_image():
    problem = jb.variational(fourier, TV, in_shape=(6, 5), operator_norm=1.0)
    noise = rng.standard_normal((3, 5)) + 1j * rng.standard_normal((3, 5))
    y = fourier(IMAGE) + 0.1 * jnp.asarray(noise)
    x = jnp.asarray(rng.standard_normal((6, 5)))
    expected = 0.5 * np.sum(np.abs(np.asarray(fourier(x) - y)) ** 2) + float(TV(THETA, x))
    assert float(problem.energy(THETA, x, y)) == pytest.approx(expected)
    check_bounds(problem, THETA, y)
    start = problem.start(THETA, y)
    assert start.dtype == jnp.float64 and start.shape == (6, 5)
    columns = np.array([np.asarray(fourier(jnp.asarray(e.reshape(6, 5)))).ravel() for e in np.eye(30)]).T
    back = np.real(columns.conj().T @ np.asarray(y).ravel())
    image = columns @ back
    best = np.real(np.vdot(image, np.asarray(y).ravel())) / np.real(np.vdot(image, image))
    np.testing.assert_allclose(start.ravel(), best * back, atol=1e-10)
    x, info = jb.solve(problem, THETA, y, tol=1e-7)
    assert int(info.status) == jb.Status.CONVERGED
    hg = jb.implicit.Oracle(problem, lambda p, x, d: 0.5 * jnp.sum(x**2))(THETA, y[None], tol=1e-8)
    h = 1e-4
    for k, unit in enumerate(np.eye(2)):
        ends = [jb.solve(problem, THETA + s * h * unit, y, tol=1e-10)[0] for s in (1, -1)]
        slope = 0.5 * float(jnp.sum(ends[0] ** 2) - jnp.sum(ends[1] ** 2)) / (2 * h)
        assert float(hg.grad[k]) == pytest.approx(slope, rel=1e-4)


def test_regulariser_without_bounds_leaves_the_constants_unknown():
    constants = jb.variational(None, tikhonov).constants(jnp.array(0.0), IMAGE)
    assert all(value is None for value in constants)
    x, info = jb.solve(jb.variational(None, tikhonov), jnp.array(0.0), IMAGE, tol=1e-8)
    np.testing.assert_allclose(x, IMAGE / 2, atol=1e-7)
    assert np.isinf(info.error)


def test_equal_models_are_equal_problems():
    assert jb.variational(None, SmoothedTV()) == jb.variational(None, SmoothedTV())
    assert hash(jb.variational(Scaling((6, 5)), TV)) == hash(jb.variational(Scaling((6, 5)), TV))
    assert jb.variational(None, SmoothedTV()) != jb.variational(None, SmoothedTV(eps=0.1))


def test_errors_say_what_is_missing():
    with pytest.raises(ValueError, match="data_term"):
        jb.variational(None, TV, "l1")
    with pytest.raises(TypeError, match="operator"):
        jb.variational(np.eye(3), TV)
    with pytest.raises(ValueError, match="in_shape"):
        jb.variational(blur, TV)
    with pytest.raises(ValueError, match="'y'"):
        jb.variational(None, TV).energy(THETA, IMAGE, {"x": IMAGE})
    with pytest.raises(ValueError, match="measurement has shape"):
        jb.variational(blur, TV, in_shape=(6, 5)).energy(THETA, IMAGE, jnp.zeros((3, 3)))


def check_solution(problem, y):
    """The cold start fits, and the solution is stationary for the dense problem's gradient."""
    x, info = jb.solve(problem, THETA, y, tol=1e-7)
    assert int(info.status) == jb.Status.CONVERGED and np.isinf(info.error)
    assert float(jnp.linalg.norm(jax.grad(problem.energy, 1)(THETA, x, y))) <= 1e-7
    return x


@pytest.mark.slow
@pytest.mark.parametrize(
    "A",
    [
        jb.operators.Blur((6, 5), rng.random((3, 2)), "symmetric"),
        jb.operators.Mask(rng.random((6, 5)) < 0.5),
        jb.operators.UndersampledFourier((6, 5), rng.random((6, 5)) < 0.5, coils=rng.standard_normal((2, 6, 5))),
        jb.operators.stack([jb.operators.DownSample((6, 5), 1), jb.operators.Gradient((6, 5))]),
    ],
    ids=lambda A: type(A).__name__,
)
def test_every_operator(A):
    problem = jb.variational(A, TV)
    y = {"y": jax.tree.map(lambda v: v + 0.1, A(IMAGE))}  # a tuple of measurements has to be named
    constants = check_bounds(problem, THETA, y)
    assert constants.strong_convexity is None
    assert float(constants.smoothness) == pytest.approx(A.norm() ** 2 + float(TV.bounds(THETA, IMAGE.shape).smoothness))
    check_solution(problem, y)
    with pytest.raises(ValueError, match="measurement has shape"):
        problem.energy(THETA, IMAGE, jnp.zeros((3, 3)))


def test_the_norm_is_computed_once():
    calls = []

    @dataclass(frozen=True)
    class Counted(Scaling):
        def norm(self):
            calls.append(1)
            return 3.0

    problem = jb.variational(Counted((6, 5)), TV)
    for _ in range(3):
        problem.constants(THETA, IMAGE)
    assert len(calls) == 1


def test_nothing_is_proven_through_an_inexact_adjoint():
    rough = jb.operators.from_functions(lambda x: x, lambda y: 1.01 * y, (6, 5), (6, 5), exact_adjoint=False)
    problem = jb.variational(rough, TV, data_convexity=1.0)
    assert problem.strong_convexity is None
    x, info = jb.solve(problem, THETA, IMAGE, tol=1e-6)
    assert np.isinf(info.error)


def squared_error(params, x, data):
    return 0.5 * jnp.sum((x - 1.0) ** 2)


@pytest.mark.slow
def test_a_bridge_has_the_hypergradient_of_its_operator():
    """A host code with the matrix of a JAX operator."""
    A = jb.operators.ParallelBeam((6, 5), np.linspace(0.1, 3.0, 12), 9)
    matrix = np.asarray(A(jnp.eye(30).reshape(30, 6, 5))).reshape(30, -1)
    bridge = jb.operators.from_callbacks(
        lambda x: (x.reshape(-1, 30) @ matrix).reshape(-1, *A.out_shape),
        lambda y: (y.reshape(-1, len(matrix.T)) @ matrix.T).reshape(-1, 6, 5),
        A.in_shape, A.out_shape, dtype="float64", batched=True,
    )  # fmt: skip
    y = A(IMAGE[None]) + 0.1
    bridged, embedded = (
        jb.implicit.Oracle(jb.variational(K, TV), squared_error, estimate=False)(THETA, y, tol=1e-9, adjoint_tol=1e-9)
        for K in (bridge, A)
    )  # fmt: skip
    assert np.all(np.isfinite(embedded.grad))
    np.testing.assert_allclose(bridged.grad, embedded.grad, rtol=1e-6)
