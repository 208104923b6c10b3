"""Parallel and cone beam for volumes: exact transposes, agreement with the planar transforms, balls, and FDK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_xray import ellipse_sinogram

from jbilevel.operators import ConeBeam, FanBeam, ParallelBeam, ParallelBeam3D, dot_test
from jbilevel.operators.cone import FDK

rng = np.random.default_rng(0)
ANGLES = (0.3, 0.8, 3.5)
GEOMETRIES = {
    "parallel": lambda: ParallelBeam3D((3, 4, 5), ANGLES, (5, 7), pixel_size=1.0, detector_size=0.7),
    "cone": lambda: ConeBeam(
        (3, 4, 5),
        ANGLES,
        (4, 7),
        source_origin=6.0,
        origin_detector=3.0,
        pixel_size=1.0,
        detector_size=1.5,
        detector_offset=0.2,
    ),
}
every_geometry = pytest.mark.parametrize("make", GEOMETRIES.values(), ids=GEOMETRIES)


def matrix(operator):
    """Column by column, so that it compiles once and for one sample."""
    count = int(np.prod(operator.in_shape))
    apply = jax.jit(operator)
    return np.stack([np.ravel(apply(unit.reshape(operator.in_shape))) for unit in np.eye(count)], axis=1)


def ball_data(A, centre, radius):
    """Line integrals of a ball: 2 sqrt(radius^2 - distance^2) for every ray from the source to a panel pixel."""
    t = np.asarray(A.angles)[None, :, None]
    v, u = ((np.arange(n) - (n - 1) / 2) * A.detector_size for n in A.n_detectors)
    u, v = u[None, None] + A.detector_offset, v[:, None, None]
    source = np.stack([A.source_origin * np.sin(t), -A.source_origin * np.cos(t), 0 * t], -1)
    away = -A.origin_detector * np.sin(t) + u * np.cos(t), A.origin_detector * np.cos(t) + u * np.sin(t)
    pixel = np.stack(np.broadcast_arrays(*away, v), -1)
    direction = (pixel - source) / np.linalg.norm(pixel - source, axis=-1, keepdims=True)
    distance = np.linalg.norm(np.cross(np.asarray(centre) - source, direction), axis=-1)
    return 2 * np.sqrt(np.maximum(radius**2 - distance**2, 0))


def ball(A, centre, radius, fine=4):
    p, (z, h, w) = A.pixel_size / fine, A.in_shape
    z, y, x = ((np.arange(n * fine) - (n * fine - 1) / 2) * p for n in (z, h, w))
    squares = (
        (x[None, None] - centre[0]) ** 2,
        (-y[None, :, None] - centre[1]) ** 2,
        (z[:, None, None] - centre[2]) ** 2,
    )
    inside = sum(squares) < radius**2
    return inside.reshape(*(m for n in A.in_shape for m in (n, fine))).mean((1, 3, 5))


@every_geometry
def test_the_transpose_is_exact(make):
    A = make()
    forward, backward = matrix(A), matrix(A.T)
    np.testing.assert_allclose(backward.T, forward, atol=1e-12 * forward.max())


@pytest.mark.slow
@every_geometry
def test_subsets_and_batches(make):
    A = make()
    x = jnp.asarray(rng.standard_normal((2, *A.in_shape)))
    y = A(x)
    each = jax.jit(lambda i: A.subset(i, 2)(x))
    for i in range(2):
        np.testing.assert_allclose(each(i), A.subset(i, 2).restrict(y), atol=1e-13)
    np.testing.assert_allclose(y[1], A(x[1]), atol=1e-13)


@pytest.mark.slow
@every_geometry
def test_dot_test_and_norm(make):
    A = make()
    assert max(dot_test(A)) < 1e-13
    exact = np.linalg.norm(matrix(A), 2)
    assert exact <= A.norm() <= exact * (1 + 1e-3)


def test_slices_of_a_parallel_beam_are_planar():
    A, plane = ParallelBeam3D((3, 4, 5), ANGLES, (3, 7)), ParallelBeam((4, 5), ANGLES, 7)
    x = jnp.asarray(rng.standard_normal(A.in_shape))
    np.testing.assert_array_equal(A(x).swapaxes(0, 1), plane(x).swapaxes(0, 1))


@pytest.mark.parametrize("rows, size", [(3, 1.0), (5, 0.5), (2, 2.0)])
def test_a_cylinder_through_all_slices(rows, size):
    """From its analytic line integrals (a pixelated disc would alias by more than a per cent)."""
    A = ParallelBeam3D((3, 24, 24), np.pi * np.arange(60) / 60, (rows, 50), pixel_size=1.0, detector_size=size)
    y = ellipse_sinogram(A._slice, (1.0, -2.0), (8.0, 8.0), 0.0)
    reconstruction = A.fbp(jnp.asarray(np.stack([y] * rows)))
    np.testing.assert_allclose(reconstruction[1, 11:17, 10:16], 1, atol=0.02)
    np.testing.assert_allclose(reconstruction[1, 11:17, 10:16].mean(), 1, atol=0.005)


def test_central_plane_of_a_cone_is_the_fan():
    cone = ConeBeam(
        (3, 8, 9),
        ANGLES,
        (5, 12),
        source_origin=9.0,
        origin_detector=4.0,
        pixel_size=1.0,
        detector_size=1.2,
        detector_offset=0.3,
    )
    fan = FanBeam(
        (8, 9),
        ANGLES,
        12,
        source_origin=9.0,
        origin_detector=4.0,
        pixel_size=1.0,
        detector_size=1.2,
        detector_offset=0.3,
    )
    x = jnp.asarray(rng.standard_normal(cone.in_shape))
    np.testing.assert_allclose(cone(x)[2], fan(x[1]), atol=1e-13)


def test_analytic_ball_and_its_reconstruction():
    """Off centre in all three directions; seen from a source that is close enough for rays to climb."""
    A = ConeBeam(
        (24, 32, 32),
        2 * np.pi * np.arange(72) / 72,
        (40, 52),
        source_origin=60.0,
        origin_detector=30.0,
        pixel_size=1.0,
        detector_size=1.3,
        detector_offset=0.4,
    )
    centre, radius = (2.0, -3.0, 1.5), 8.0
    exact, volume = ball_data(A, centre, radius), ball(A, centre, radius)
    found = A(jnp.asarray(volume))
    assert np.linalg.norm(found - exact) <= 0.06 * np.linalg.norm(exact)
    assert abs(found.sum() / exact.sum() - 1) < 2e-3
    reconstruction = A.fbp(jnp.asarray(exact))
    inside = ball(A, centre, 0.7 * radius, fine=1) > 0
    assert abs(reconstruction[inside].mean() - 1) < 0.01
    assert abs(reconstruction[inside] - 1).max() < 0.03  # off the central plane FDK is not exact


def test_fdk_is_linear_and_checks_its_input():
    A = ConeBeam((2, 4, 4), 2 * np.pi * np.arange(6) / 6, (3, 6), source_origin=9.0)
    y = jnp.asarray(rng.standard_normal(A.out_shape))
    energy = lambda y: 0.5 * jnp.sum(A.fbp(y, "hann") ** 2)  # noqa: E731
    F = FDK(A, "hann")
    np.testing.assert_allclose(jax.grad(energy)(y), F.T(F(y)), atol=1e-12)
    with pytest.raises(ValueError, match="`filter`"):
        A.fbp(y, "sharp")
    with pytest.raises(ValueError, match="full turn"):
        ConeBeam((2, 4, 4), np.arange(30) / 10, (3, 6), source_origin=9.0).fbp(jnp.ones((3, 30, 6)), strict=True)


@pytest.mark.parametrize("make", [ParallelBeam3D, lambda *a, **k: ConeBeam(*a, source_origin=20.0, **k)])
@pytest.mark.parametrize(
    "arguments, options, words",
    [
        (((4, 4), [0.0], (3, 3)), {}, r"\(Z, H, W\)"),
        ((4, [0.0], 3), {}, r"\(rows, columns\)"),
        ((4, [], (3, 3)), {}, "`angles`"),
        ((4, [0.0], (3, 3)), {"pixel_size": -1.0}, "`pixel_size`"),
        ((4, [0.0], (3, 3)), {"detector_offset": 50.0}, "misses"),
    ],
)
def test_geometry_that_cannot_be_meant(make, arguments, options, words):
    with pytest.raises(ValueError, match=words):
        make(*arguments, **options)
