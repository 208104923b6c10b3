"""X-ray transforms: exact transposes, analytic ellipses, ASTRA's matrix, traced subsets, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb
from jbilevel.operators import FanBeam, ParallelBeam, dot_test

rng = np.random.default_rng(0)
ANYHOW = tuple(rng.uniform(-4, 8, 5))
GEOMETRIES = {
    "square": lambda: ParallelBeam(6, np.pi * np.arange(8) / 8, 9),
    "fine bins": lambda: ParallelBeam((5, 7), ANYHOW, 30, pixel_size=0.7, detector_size=0.3, detector_offset=0.2),
    "coarse bins": lambda: ParallelBeam((5, 7), ANYHOW, 5, pixel_size=1.0, detector_size=2.5, detector_offset=-1.0),
    "one side only": lambda: ParallelBeam((4, 3), [0.1, 0.2], 6),
    "fan": lambda: FanBeam(
        (5, 7),
        ANYHOW,
        12,
        source_origin=9.0,
        origin_detector=5.0,
        pixel_size=0.7,
        detector_size=1.1,
        detector_offset=0.3,
    ),
    "wide fan, fine bins": lambda: FanBeam(
        5, [0.785, 2.0], 25, source_origin=5.0, origin_detector=0.0, pixel_size=1.0, detector_size=0.4
    ),
}
every_geometry = pytest.mark.parametrize("make", GEOMETRIES.values(), ids=GEOMETRIES)


def matrix(A):
    count = int(np.prod(A.in_shape))
    columns = jax.jit(A)(jnp.eye(count).reshape(count, *A.in_shape))
    return np.asarray(columns).reshape(count, -1).T


def rays(A):
    """A point and the unit direction of every ray, (views, bins, 2) each, from the geometry's definition."""
    t = np.asarray(A.angles)[:, None]
    u = (np.arange(A.n_detectors) - (A.n_detectors - 1) / 2) * A.detector_size + A.detector_offset
    along, towards = np.stack([np.cos(t), np.sin(t)], -1), np.stack([-np.sin(t), np.cos(t)], -1)
    if isinstance(A, ParallelBeam):
        return u[None, :, None] * along, np.broadcast_to(towards, (len(t), len(u), 2))
    source = -A.source_origin * towards
    direction = A.origin_detector * towards + u[None, :, None] * along - source
    return np.broadcast_to(source, direction.shape), direction / np.linalg.norm(direction, axis=-1, keepdims=True)


def ellipse_sinogram(A, centre, axes, turn):
    """Chords of the ellipse: in the coordinates in which it is the unit disc, a chord is 2 sqrt(1 - distance^2)."""
    point, direction = rays(A)
    c, s = np.cos(turn), np.sin(turn)
    to_disc = np.array([[c, s], [-s, c]]) / np.asarray(axes)[:, None]
    p, d = (point - centre) @ to_disc.T, direction @ to_disc.T
    length = np.linalg.norm(d, axis=-1)
    distance = (p[..., 0] * d[..., 1] - p[..., 1] * d[..., 0]) / length
    return 2 * np.sqrt(np.maximum(1 - distance**2, 0)) / length


def ellipse_image(A, centre, axes, turn, fine=8):
    """The share of every pixel that lies inside, by fine x fine samples."""
    (h, w), p = A.in_shape, A.pixel_size
    x = (np.arange(w * fine) - (w * fine - 1) / 2) * p / fine
    y = -(np.arange(h * fine) - (h * fine - 1) / 2) * p / fine
    x, y = x[None] - centre[0], y[:, None] - centre[1]
    c, s = np.cos(turn), np.sin(turn)
    inside = ((c * x + s * y) / axes[0]) ** 2 + ((c * y - s * x) / axes[1]) ** 2 < 1
    return inside.reshape(h, fine, w, fine).mean((1, 3))


@every_geometry
def test_the_transpose_is_exact(make):
    A = make()
    forward, backward = matrix(A), matrix(A.T)
    np.testing.assert_allclose(backward.T, forward, atol=1e-12 * forward.max())
    assert forward.min() >= 0


@pytest.mark.slow
def test_norm_is_a_proven_bound_and_the_dot_test_agrees():
    A = GEOMETRIES["fan"]()
    exact = np.linalg.norm(matrix(A), 2)
    assert A.norm_is_bound and exact <= A.norm() <= exact * (1 + 1e-3)
    assert max(dot_test(A)) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("name", ["square", "fan"])
def test_subsets_with_a_traced_index(name):
    A, m = GEOMETRIES[name](), 3
    x, forward = jnp.asarray(rng.standard_normal(A.in_shape)), matrix(A)
    y = A(x)

    def body(total, i):
        S = A.subset(i, m)
        return total + S.T(S(x)), (S(x), S.restrict(y))

    total, (parts, rows) = jax.jit(lambda: jax.lax.scan(body, jnp.zeros_like(x), jnp.arange(m)))()
    np.testing.assert_allclose(total.ravel(), forward.T @ (forward @ np.asarray(x).ravel()), atol=1e-11)
    np.testing.assert_allclose(parts, rows, atol=1e-13)
    for i in range(m):
        own = y[i::m]
        np.testing.assert_allclose(parts[i, : len(own)], own, atol=1e-13)
        assert not np.any(parts[i, len(own) :])


@pytest.mark.slow
def test_subsets_under_vmap_and_derivatives():
    A, m = GEOMETRIES["square"](), 3
    x = jnp.asarray(rng.standard_normal((m, *A.in_shape)))
    each = jnp.stack([A.subset(i, m)(x[i]) for i in range(m)])
    mapped = jax.vmap(lambda i, x: A.subset(i, m)(x))
    np.testing.assert_allclose(mapped(jnp.arange(m), x), each, atol=1e-13)
    energy = lambda x: 0.5 * jnp.sum(mapped(jnp.arange(m), jnp.stack([x] * m)) ** 2)  # noqa: E731
    normal = lambda x: A.T(A(x))  # noqa: E731
    np.testing.assert_allclose(jax.grad(energy)(x[0]), normal(x[0]), atol=1e-11)
    product = jax.jit(lambda x, v: jax.jvp(jax.grad(energy), (x,), (v,))[1])(x[0], x[1])
    np.testing.assert_allclose(product, normal(x[1]), atol=1e-11)
    slope = jax.grad(lambda x, i: jnp.sum(A.subset(i, m)(x) ** 2), argnums=(0, 1), allow_int=True)(x[0], 1)[0]
    np.testing.assert_allclose(slope, 2 * A.subset(1, m).T(A.subset(1, m)(x[0])), atol=1e-12)
    fixed = lambda i: A.subset(i, m)(x[0])  # noqa: E731
    value, tangent = jax.jvp(fixed, (jnp.asarray(1),), (np.zeros((), jax.dtypes.float0),))  # no derivative in the index
    np.testing.assert_allclose(value, fixed(1), atol=1e-13)
    assert not np.any(tangent)
    stacks = jax.vmap(lambda i: A.subset(i, m)(x[:2]))(jnp.arange(m))  # a batch inside
    np.testing.assert_allclose(stacks[1], A.subset(1, m)(x[:2]), atol=1e-13)
    assert A.subset(1, m) == A.subset(1, m) and hash(A.subset(1, m)) == hash(A.subset(1, m))
    assert A.subset(jnp.asarray(1), m).norm() <= A.norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda n: ParallelBeam(
            (4 * n, 5 * n),
            np.pi * np.arange(20) / 20,
            7 * n,
            pixel_size=8 / n,
            detector_size=8 / n,
            detector_offset=0.4,
        ),
        lambda n: FanBeam(
            (4 * n, 5 * n),
            2 * np.pi * np.arange(20) / 20,
            7 * n,
            source_origin=60.0,
            origin_detector=30.0,
            pixel_size=8 / n,
            detector_size=12 / n,
            detector_offset=0.4,
        ),
    ],
    ids=["parallel", "fan"],
)
def test_analytic_ellipse(make):
    """Off centre and turned, so any error of sign, scale, offset or orientation is of order 1; edges converge."""
    ellipse, errors = ((3.0, -5.0), (9.0, 4.0), 0.5), []
    for A in (make(12), make(24)):
        exact = ellipse_sinogram(A, *ellipse)
        found = A(jnp.asarray(ellipse_image(A, *ellipse)))
        errors.append(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert errors[0] < 0.04 and errors[1] < 0.5 * errors[0], errors


@pytest.mark.parametrize("make", list(GEOMETRIES.values())[:4], ids=list(GEOMETRIES)[:4])
def test_equals_astra(make):
    astra = pytest.importorskip("astra")
    A = make()
    (h, w), p = A.in_shape, A.pixel_size
    volume = astra.create_vol_geom(h, w, -w * p / 2, w * p / 2, -h * p / 2, h * p / 2)
    beams = astra.create_proj_geom("parallel", A.detector_size, A.n_detectors, np.asarray(A.angles))
    if A.detector_offset:
        beams = astra.geom_postalignment(beams, A.detector_offset / A.detector_size)
    handle = astra.create_projector("linear", beams, volume)
    expected = astra.matrix.get(astra.projector.matrix(handle)).toarray()
    astra.projector.delete(handle)
    assert np.linalg.norm(matrix(A) - expected) <= 2e-4 * np.linalg.norm(expected)


def test_a_fan_from_far_away_is_parallel():
    x = jnp.asarray(rng.standard_normal((9, 8)))
    parallel, fan = (
        ParallelBeam((9, 8), ANYHOW, 14, pixel_size=1.0, detector_size=1.0, detector_offset=0.2),
        FanBeam(
            (9, 8),
            ANYHOW,
            14,
            source_origin=1e7,
            origin_detector=0.0,
            pixel_size=1.0,
            detector_size=1.0,
            detector_offset=0.2,
        ),
    )
    np.testing.assert_allclose(fan(x), parallel(x), atol=1e-5)


@pytest.mark.slow
def test_hypergradient_of_a_tv_weight_through_the_transform():
    A = ParallelBeam(12, np.pi * np.arange(10) / 10, 18)
    clean = jnp.asarray(ellipse_image(A, (0.5, -1.0), (4.0, 3.0), 0.3))
    y = A(clean) + 0.3 * jnp.asarray(rng.standard_normal(A.out_shape))
    problem = jb.variational(A, jb.regularizers.SmoothedTV(eps=0.05))
    oracle = jb.implicit.Oracle(problem, lambda params, x, data: 0.5 * jnp.sum((x - data[1]) ** 2))
    at = lambda t: oracle(jnp.array([t]), (y[None], clean[None]), tol=1e-9, adjoint_tol=1e-9)  # noqa: E731
    slope = (at(1e-4).value - at(-1e-4).value) / 2e-4
    np.testing.assert_allclose(at(0.0).grad[0], slope, rtol=1e-6)


def test_single_and_half_precision():
    A = GEOMETRIES["fan"]()
    x = np.random.default_rng(0).standard_normal(A.in_shape)
    exact = A(jnp.asarray(x))
    # positions are rounded in units of the detector's length, and with them the weights of two neighbours
    rounding = 2 * A.n_detectors * jnp.finfo(jnp.float32).eps
    assert jnp.linalg.norm(A(jnp.asarray(x, jnp.float32)) - exact) <= rounding * jnp.linalg.norm(exact)
    half = A(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert jnp.linalg.norm(half.astype(float) - exact) <= 1e-2 * jnp.linalg.norm(exact)


@pytest.mark.slow
def test_a_large_batch_and_memory_of_a_few_sinograms():
    A = ParallelBeam(64, np.pi * np.arange(50) / 50, 91)
    sinogram = 4 * 50 * 91
    for operator in (A, A.T):
        v = jax.ShapeDtypeStruct(operator.in_shape, jnp.float32)
        temporary = jax.jit(operator).lower(v).compile().memory_analysis().temp_size_in_bytes
        assert temporary <= 6 * sinogram
    x = jnp.asarray(rng.standard_normal((2, 3, 64, 64)))
    np.testing.assert_allclose(A(x)[1, 2], A(x[1, 2]), atol=1e-12)


parallel = lambda **options: ParallelBeam(**{"in_shape": (4, 4), "angles": [0.0, 1.0], "n_detectors": 6, **options})  # noqa: E731
fan = lambda **options: FanBeam(**{"in_shape": 4, "angles": [0.0], "n_detectors": 6, "source_origin": 9.0, **options})  # noqa: E731


@pytest.mark.parametrize("make", [parallel, fan])
@pytest.mark.parametrize(
    "options, words",
    [
        ({"angles": []}, "`angles`.*non-empty"),
        ({"angles": [0.0, np.nan]}, "`angles` must be finite"),
        ({"angles": np.zeros((2, 2))}, "`angles`"),
        ({"pixel_size": 0.0}, "`pixel_size` must be positive"),
        ({"detector_size": -1.0}, "`detector_size` must be positive"),
        ({"detector_offset": np.inf}, "`detector_offset` must be finite"),
        ({"detector_offset": 100.0}, "misses the image"),
        ({"n_detectors": 0}, "`n_detectors`"),
        ({"in_shape": (4, 4, 4)}, r"\(H, W\)"),
        ({"in_shape": (4, -1)}, "`shape`"),
    ],
)
def test_geometry_that_cannot_be_meant(make, options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_a_source_or_detector_inside_the_image():
    with pytest.raises(ValueError, match="inside the image"):
        fan(source_origin=2.0)
    with pytest.raises(ValueError, match="`origin_detector`"):
        fan(origin_detector=-1.0)


@pytest.mark.parametrize("i, m, words", [(0, 3, "`m`"), (0, 0, "`m`"), (0, 1.5, "`m`"), (2, 2, "`i`")])
def test_subsets_that_do_not_exist(i, m, words):
    with pytest.raises(ValueError, match=words):
        parallel().subset(i, m)


def test_wrong_data():
    A = parallel()
    with pytest.raises(ValueError, match=r"shape \(4, 4\)"):
        A(jnp.ones((5, 4)))
    with pytest.raises(TypeError, match="real and imaginary"):
        A(jnp.ones((4, 4), complex))
    with pytest.raises(TypeError, match="floating"):
        A.T(jnp.ones((2, 6), int))
    with pytest.raises(ValueError, match=r"shape \(2, 6\)"):
        A.fbp(jnp.ones((3, 6)))
