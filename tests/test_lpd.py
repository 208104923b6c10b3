"""Learned primal-dual networks: against numpy, published sizes, subsets and sketches, derivatives, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbilevel as jb
from jbilevel._core import trees

ANGLES = np.pi * np.arange(7) / 7
A = jb.operators.ParallelBeam((8, 8), ANGLES, 11)
MATRIX = np.asarray(A(jnp.eye(64).reshape(64, 8, 8))).reshape(64, -1).T.reshape(7, 11, 8, 8)
COARSE = jb.operators.ParallelBeam((4, 4), ANGLES, 11, pixel_size=2.0)
COARSE_MATRIX = np.asarray(COARSE(jnp.eye(16).reshape(16, 4, 4))).reshape(16, -1).T.reshape(7, 11, 4, 4)
IMAGE = np.random.default_rng(0).random((8, 8))
Y = np.asarray(A(jnp.asarray(IMAGE)))
SMALL = {"width": 4, "param_dtype": jnp.float64}


def made(**settings):
    return jb.nets.LPD(A, rngs=nnx.Rngs(0), **({"layers": 3} | SMALL | settings))


def perturbed(net):
    """``(f, params)`` with parameters away from the symmetric start (zero biases, equal slopes and steps)."""
    f, params = jb.nets.from_flax(net)
    rng = np.random.default_rng(1)
    return f, jax.tree.map(lambda v: v + jnp.asarray(0.1 * rng.standard_normal(v.shape), v.dtype), params)


# ------------------------------------------------------------------------------------------------- the numpy reference


def convolve(v, kernel, bias):
    """Cross-correlation with zero padding, by loops over the taps."""
    half = kernel.shape[0] // 2
    padded = np.pad(v, ((half, half), (half, half), (0, 0)))
    out = np.zeros((*v.shape[:2], kernel.shape[-1])) + bias
    for a in range(kernel.shape[0]):
        for b in range(kernel.shape[1]):
            out += padded[a : a + v.shape[0], b : b + v.shape[1]] @ kernel[a, b]
    return out


def numpy_network(params, v):
    count = len(params["convs"])
    for n in range(count):
        v = convolve(v, params["convs"][n]["kernel"], params["convs"][n]["bias"])
        if n + 1 < count:
            v = np.where(v > 0, v, params["slopes"][n] * v)
    return v


def down(v):
    return v.reshape(4, 2, 4, 2, -1).mean((1, 3))


def up(v):
    def along(v):  # 3/4 of the pixel that holds the point, 1/4 of the one beside it
        before, after = np.concatenate([v[:1], v[:-1]]), np.concatenate([v[1:], v[-1:]])
        return np.stack([0.75 * v + 0.25 * before, 0.75 * v + 0.25 * after], 1).reshape(8, *v.shape[1:])

    return along(along(v).swapaxes(0, 1)).swapaxes(0, 1)


def numpy_lpd(
    params, y, scale, memory=(1, 1), read=(0, 0), write=0, m=1, dual="shared", sketch=None, mode="primal", x0=0
):
    params = nnx.to_pure_dict(params)["layers"]
    layers = params["primal"]["convs"][0]["bias"].shape[0]
    y = y / scale
    x = np.zeros((8, 8, memory[0])) + np.reshape(x0, (*np.shape(x0), 1))
    u = np.zeros((m, -(-7 // m), 11, memory[1]))
    for k in range(layers):
        own = jax.tree.map(lambda v, k=k: np.asarray(v[k], np.float64), params)
        i, tau, sigma = k % m, own.get("tau", 1.0), own.get("sigma", 1.0)
        rows, slot = len(y[i::m]), 0 if dual == "shared" else i
        coarse = sketch is not None and sketch[k] == 2
        matrix = (COARSE_MATRIX if coarse else MATRIX)[i::m] / scale
        shrunk = down(x) if coarse else x
        seen = np.tensordot(matrix, shrunk[..., read[0]], 2)
        old = u[slot, :rows]
        u[slot, :rows] = old + numpy_network(
            own["dual"], np.concatenate([old, (sigma * seen)[..., None], y[i::m][..., None]], -1)
        )
        g = m * tau * np.tensordot(u[slot, :rows, :, read[1]], matrix, 2)[..., None] / (4 if coarse else 1)
        if coarse and mode == "operator":
            x = x + numpy_network(own["primal"], np.concatenate([x, up(g)], -1))
        else:
            change = numpy_network(own["primal"], np.concatenate([shrunk, g], -1))
            if not coarse:
                x = x + change
            else:
                x = x + up(change) if mode == "residual" else up(shrunk + change)
    return x[..., write]


FBP = np.asarray(A.fbp(jnp.asarray(Y)))
CASES = {
    "plain": ({}, {}),
    "memory, channels": ({"memory": (3, 2), "read": (1, 1), "write": 2},) * 2,
    "steps, FBP, raw": ({"step": 0.3, "initial": "fbp", "normalise": False}, {"scale": 1.0, "x0": FBP}),
    "5 x 5, last 1 x 1": ({"kernel": 5, "last_kernel": 1}, {}),
    "subsets, shared": ({"layers": 6, "subsets": 3}, {"m": 3}),
    "subsets of their own": ({"layers": 6, "subsets": 3, "dual": "per-subset"}, {"m": 3, "dual": "per-subset"}),
    **{
        f"sketched {mode}": (
            {"sketch": (2, 2, 1), "sketched": mode, "subsets": 2, "memory": (2, 2)},
            {"sketch": (2, 2, 1), "mode": mode, "m": 2, "memory": (2, 2)},
        )
        for mode in ("operator", "primal", "residual")
    },
}


@pytest.mark.parametrize(
    "case",
    [case if case == "plain" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_equals_numpy(case):
    settings, reference = CASES[case]
    net = made(**settings)
    f, params = perturbed(net)
    expected = numpy_lpd(params, Y, **({"scale": net.scale} | reference))
    np.testing.assert_allclose(jax.jit(f)(params, jnp.asarray(Y)), expected, rtol=1e-9, atol=1e-9)
    assert np.ptp(expected) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("case", ["memory, channels", "sketched residual"])
def test_equals_numpy_in_single_precision(case):
    settings, reference = CASES[case]
    net = made(**settings, param_dtype=jnp.float32)
    f, params = perturbed(net)
    found = jax.jit(f)(params, jnp.asarray(Y, jnp.float32))
    assert found.dtype == jnp.float32
    assert np.max(np.abs(found - numpy_lpd(params, Y, **({"scale": net.scale} | reference)))) <= 1e-4


# ------------------------------------------------------------------------------------------------------ the family


@pytest.mark.parametrize(
    ("name", "count"), [("adler-oktem", 251_980), ("thesis", 683_232), ("thesis-mnist", 102_920), ("pdnet", 50_396)]
)
def test_published_sizes(name, count):
    net = nnx.eval_shape(lambda: jb.nets.LPD.named(name, operator=A, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))) == count


@pytest.mark.slow
def test_named_networks_are_what_the_papers_say():
    """PDNet with zero networks returns the FBP it starts from; Adler's reads and writes different channels."""
    pdnet = jb.nets.LPD.named("pdnet", operator=A, rngs=nnx.Rngs(0), zero_last=True, layers=2, **SMALL)
    np.testing.assert_array_equal(nnx.jit(pdnet)(jnp.asarray(Y)), FBP)
    adler = jb.nets.LPD.named("adler-oktem", operator=A, rngs=nnx.Rngs(0), zero_last=True, layers=2, **SMALL)
    np.testing.assert_array_equal(adler(jnp.asarray(Y)), np.zeros((8, 8)))
    assert (adler.read, adler.write, adler.memory) == ((1, 0), 0, (5, 5))
    start = jnp.asarray(IMAGE)
    np.testing.assert_array_equal(adler(jnp.asarray(Y), start), IMAGE)


def test_the_pseudo_inverse_sees_the_operator_that_the_networks_see():
    """PDNet, one layer: x <- x + P([x, B^+ u]) with B = A/c, so B^+ = c A^+."""
    net = jb.nets.LPD(A, rngs=nnx.Rngs(0), layers=1, back="fbp", depth=1, last_kernel=1, zero_last=True, **SMALL)
    f, params = jb.nets.from_flax(net)
    state = nnx.to_pure_dict(params)
    state["layers"]["dual"]["convs"][0]["kernel"] = jnp.asarray([0.0, 0.0, 1.0]).reshape(1, 1, 1, 3, 1)  # u = z
    state["layers"]["primal"]["convs"][0]["kernel"] = jnp.asarray([0.0, 1.0]).reshape(1, 1, 1, 2, 1)  # x = B^+ u
    nnx.replace_by_pure_dict(params, state)
    np.testing.assert_allclose(f(params, jnp.asarray(Y)), FBP, rtol=1e-12, atol=1e-12)


def test_one_subset_is_lpd_bit_for_bit():
    _, params = perturbed(made())
    f, g = (jb.nets.from_flax(made(subsets=1, dual=dual))[0] for dual in ("shared", "per-subset"))
    y = jnp.asarray(Y)
    expected = jax.jit(f)(params, y)
    np.testing.assert_array_equal(jax.jit(g)(params, y), expected)
    other, _ = jb.nets.from_flax(made(subsets=2))
    assert np.max(np.abs(jax.jit(other)(params, y) - expected)) > 1e-3


def test_nothing_sketched_is_lspd_bit_for_bit():
    y = jnp.asarray(Y)
    f, params = perturbed(made(subsets=2))
    g, _ = jb.nets.from_flax(made(subsets=2, sketch=(1, 1, 1), sketched="residual"))
    np.testing.assert_array_equal(jax.jit(f)(params, y), jax.jit(g)(params, y))


def test_subsets_add_up():
    x = jnp.asarray(IMAGE)
    total = sum(A.subset(i, 3).T(A.subset(i, 3)(x)) for i in range(3))
    np.testing.assert_allclose(total, A.T(A(x)), rtol=1e-12)


@pytest.mark.slow
def test_order_of_the_subsets_is_traced():
    net = made(subsets=3, layers=6)
    f, params = perturbed(net)
    y, cyclic = jnp.asarray(Y), jnp.arange(6) % 3
    compiled = jax.jit(lambda order: f(params, y, None, order))
    np.testing.assert_allclose(compiled(cyclic), jax.jit(f)(params, y), rtol=1e-12)
    other = compiled(jax.random.randint(jax.random.key(0), (6,), 0, 3))
    assert np.max(np.abs(other - compiled(cyclic))) > 1e-6 and compiled._cache_size() == 1


@pytest.mark.slow
def test_padding_of_short_subsets_reaches_nothing():
    """Seven angles by two: the measurement's eighth row does not exist, whatever the shared dual left in its place."""
    net = made(subsets=2, layers=4)
    f, params = perturbed(net)
    slope = jax.jit(jax.jacobian(lambda y: jnp.sum(f(params, y))))(jnp.asarray(Y))
    assert np.all(np.abs(slope) > 0)  # every angle counts
    np.testing.assert_array_equal(A.subset(1, 2).restrict(jnp.ones((7, 11)))[-1], np.zeros(11))


# ------------------------------------------------------------------------------------------- derivatives and transforms


@pytest.mark.slow
def test_scan_and_remat_equal_the_plain_loop():
    net = made(memory=(2, 2), subsets=2, sketch=(2, 1, 1), sketched="residual", step=0.5)
    _, params = perturbed(net)
    y = jnp.asarray(Y)

    @jax.value_and_grad
    def loop(params, y):
        fresh = nnx.merge(nnx.graphdef(net), params)
        x, u = fresh._start(y, None)
        graph, stacked = nnx.split(fresh.layers)
        for k, factor in enumerate(net.sketch):
            own = jax.tree.map(lambda v, k=k: v[k], stacked)
            coarse = COARSE if factor == 2 else A
            x, u = fresh._layer(graph, coarse, y / net.scale, (x, u), own, k % 2)
        return jnp.sum(x[..., 0] ** 2)

    value, slope = jax.jit(loop)(params, y)
    for remat, unroll in (("layers", False), ("networks", False), ("none", True), ("layers", None)):
        settings = {"memory": (2, 2), "subsets": 2, "sketch": (2, 1, 1), "sketched": "residual", "step": 0.5}
        f, _ = jb.nets.from_flax(made(**settings, remat=remat, unroll=unroll))
        found = jax.jit(jax.value_and_grad(lambda p, y, f=f: jnp.sum(f(p, y) ** 2)))(params, y)
        np.testing.assert_allclose(found[0], value, rtol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), found[1], slope)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["sketched residual", *(pytest.param(c, marks=pytest.mark.slow) for c in ("steps, FBP, raw", "sketched operator"))],
)
def test_gradient_against_finite_differences(case):
    f, params = perturbed(made(**CASES[case][0]))
    loss = jax.jit(lambda p, y: jnp.sum(jnp.sin(f(p, y))))
    own = params, jnp.asarray(Y)
    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(*own)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape)), own)
    up, down = (loss(*trees.add_scaled(own, s, direction)) for s in (1e-6, -1e-6))
    np.testing.assert_allclose(trees.dot(slopes, direction), (up - down) / 2e-6, rtol=1e-5)


def test_products_are_kept_across_remat_where_asked():
    """A host function is called 2K times forward, 2K backward, and 2K again where its results were thrown away."""
    calls, matrix = [], MATRIX.reshape(77, 64)

    def host(x):
        calls.append(0)
        return (matrix @ x.ravel()).reshape(7, 11)

    def back(y):
        calls.append(1)
        return (matrix.T @ y.ravel()).reshape(8, 8)

    bridge = jb.operators.from_callbacks(host, back, (8, 8), (7, 11), dtype="float64")
    counts, slopes = {}, {}
    for remat in ("layers", "networks"):
        net = jb.nets.LPD(
            bridge, rngs=nnx.Rngs(0), layers=3, remat=remat, unroll=False, normalise=made().scale, **SMALL
        )
        f, params = perturbed(net)
        slope = jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p, jnp.asarray(Y)) ** 2)))
        jax.block_until_ready(slope(params))
        calls.clear()
        slopes[remat] = jax.block_until_ready(slope(params))
        counts[remat] = len(calls)
    assert counts == {"layers": 18, "networks": 12}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), *slopes.values())


@pytest.mark.slow
def test_batches():
    f, params = perturbed(made(subsets=2, sketch=(2, 1, 1)))
    ys = jnp.stack([jnp.asarray(Y), 2 * jnp.asarray(Y)[::-1]])
    together = jax.jit(jax.vmap(f, (None, 0)))(params, ys)
    for y, x in zip(ys, together, strict=True):
        np.testing.assert_allclose(jax.jit(f)(params, y), x, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_half_precision_is_for_the_convolutions_only():
    net = made(dtype=jnp.bfloat16, param_dtype=jnp.float32, memory=(2, 2))
    f, params = perturbed(net)
    y = jnp.asarray(Y, jnp.float32)
    half = jax.jit(f)(params, y)
    full = jax.jit(jb.nets.from_flax(made(param_dtype=jnp.float32, memory=(2, 2)))[0])(params, y)
    slopes = jax.jit(jax.grad(lambda p: jnp.sum(f(p, y) ** 2)))(params)
    assert half.dtype == jnp.float32 and {v.dtype for v in jax.tree.leaves((params, slopes))} == {jnp.dtype("float32")}
    assert 1e-6 < np.linalg.norm(half - full) / np.linalg.norm(full) < 0.03


@pytest.mark.slow
def test_volumes():
    B = jb.operators.ParallelBeam3D((4, 4, 4), [0.0, 0.8, 1.6, 2.4], (4, 6))
    net = jb.nets.LPD(B, rngs=nnx.Rngs(0), layers=2, subsets=2, sketch=(2, 1), initial="fbp", zero_last=True, **SMALL)
    y = B(jnp.ones((4, 4, 4)))
    assert net(y).shape == (4, 4, 4)
    unsketched = jb.nets.LPD(B, rngs=nnx.Rngs(0), layers=2, subsets=2, initial="fbp", zero_last=True, **SMALL)
    np.testing.assert_array_equal(unsketched(y), B.fbp(y))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"subsets": 4}, "`subsets` must lie between 1 and `layers` = 3"),
        ({"subsets": 8, "layers": 9}, "`m` must be an integer between 1 and the number of angles 7"),
        ({"subsets": 2, "back": "fbp"}, "back='transpose'"),
        ({"sketch": (3, 1, 1)}, r"`sketch` 3 does not divide the image \(8, 8\)"),
        ({"sketch": (1, 2, 1)}, "coarse to fine"),
        ({"sketch": (2, 1)}, "`sketch` must give 3 factors"),
        ({"sketched": "both"}, "`sketched` must be one of"),
        ({"memory": (2, 1), "read": (2, 0)}, "must be channels of `memory`"),
        ({"activation": "prelux"}, "`activation` must be"),
        ({"weights": "zero"}, "`weights` must be one of"),
        ({"layers": 0}, "`layers` and `memory`"),
    ],
)
def test_settings_that_cannot_be_meant(settings, words):
    with pytest.raises(ValueError, match=words):
        made(**settings)


def test_operators_that_lack_something():
    bare = jb.operators.from_functions(lambda x: x, lambda y: y, (4, 4), (4, 4))
    build = lambda **settings: jb.nets.LPD(bare, rngs=nnx.Rngs(0), layers=2, **SMALL, **settings)  # noqa: E731
    assert build()(jnp.ones((4, 4))).shape == (4, 4)
    for settings, words in (
        ({"subsets": 2}, "subset"), ({"sketch": (2, 1)}, "pixel_size"), ({"initial": "fbp"}, "give x0 to the call"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            build(**settings)
    fourier = jb.operators.UndersampledFourier((4, 4), np.ones((4, 4), bool))
    with pytest.raises(ValueError, match="real and imaginary"):
        jb.nets.LPD(fourier, rngs=nnx.Rngs(0), **SMALL)


def test_inputs_of_a_wrong_shape():
    net, y = made(), jnp.asarray(Y)
    with pytest.raises(ValueError, match=r"`y` must have shape \(7, 11\), got \(2, 7, 11\); use jax.vmap"):
        net(jnp.stack([y, y]))
    with pytest.raises(ValueError, match="`x0` must have shape"):
        net(y, jnp.zeros((4, 4)))
    with pytest.raises(ValueError, match="`order` must be 3 integers"):
        net(y, None, jnp.zeros(3))
    with pytest.raises(ValueError, match="`name` must be one of adler-oktem"):
        jb.nets.LPD.named("resnet", operator=A, rngs=nnx.Rngs(0))


def test_a_file_of_another_architecture_is_refused(tmp_path):
    _, params = jb.nets.from_flax(made())
    jb.save(tmp_path / "lpd.npz", params)
    again, _ = jb.load(tmp_path / "lpd.npz", params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for other in (made(layers=4), made(width=5), made(step=0.1)):
        with pytest.raises(ValueError, match="lpd.npz"):
            jb.load(tmp_path / "lpd.npz", jb.nets.from_flax(other)[1])
