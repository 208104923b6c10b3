"""A small learned primal-dual network against filtered backprojection with its best filter, at the size of a test."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbilevel as jb
from jbilevel.operators.fbp import WINDOWS

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import networks  # noqa: E402

VIEWS, SIZE, PIXEL = 24, 64, 360 / 64
LOSS = jb.losses.squared_error(mean=True)


def scans(rng, A, count):
    """Drawn abdomens and their analytic sinograms with photon noise."""
    phantoms = [jb.data.abdomen(rng).ellipses for _ in range(count)]
    images = np.stack([jb.data.raster(p, A.in_shape, pixel_size=PIXEL) for p in phantoms])
    exact = np.stack([jb.data.parallel_sinogram(p, A.angles, A.n_detectors, PIXEL) for p in phantoms])
    return {"x": jnp.asarray(images), "y": jnp.asarray(jb.data.poisson_transmission(rng, exact, 7e4))}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"layers": 6, "subsets": 2, "sketch": (2, 2, 2, 1, 1, 1)}])
def test_far_better_than_the_best_filter(settings):
    started, rng = time.process_time(), np.random.default_rng(0)
    A = jb.operators.ParallelBeam(
        (SIZE, SIZE), np.pi * np.arange(VIEWS) / VIEWS, 93, pixel_size=PIXEL, detector_size=PIXEL
    )
    train, test = scans(rng, A, 100), scans(rng, A, 16)
    quality = lambda x: float(jb.metrics.mean_psnr(x, test["x"], 2.0))  # noqa: E731
    best = max(quality(A.fbp(test["y"], name)) for name in WINDOWS)
    net = jb.nets.LPD(
        A, rngs=nnx.Rngs(0), initial="fbp", filter="cosine", zero_last=True, width=16,
        **({"layers": 5, "memory": (5, 5), "sketched": "residual"} | settings),
    )  # fmt: skip
    f, params = jb.nets.from_flax(net)
    oracle = jb.explicit.Oracle(lambda params, data: LOSS(None, f(params, data["y"]), data))
    steps = 150
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    def batches(step):
        chosen = np.random.default_rng(step).choice(100, 4, replace=False)
        return jax.tree.map(lambda v: v[chosen], train)

    result = jb.fit(jb.FirstOrder(oracle, optimizer), params, batches, steps=steps)
    found = quality(jax.jit(jax.vmap(f, (None, 0)))(result.params, test["y"]))
    assert quality(jax.vmap(f, (None, 0))(params, test["y"])) <= best + 1e-3  # it starts as FBP
    assert found >= best + 4, (found, best)  # measured: 6.3 and 4.8; the criterion is 2
    assert time.process_time() - started <= 120  # a minute on two cores


@pytest.mark.slow
def test_a_cone_beam_volume_from_thirty_views_is_far_better_than_feldkamp():
    args = SimpleNamespace(sizes=[16], views=30, train=12, validation=1, test=4)
    A, train, _, test = networks.volumes(args, 7e4, np.random.default_rng(0))
    quality = lambda x: float(jb.metrics.mean_psnr(x, test["x"], 2.0))  # noqa: E731
    feldkamp = {name: quality(jnp.stack([A.fbp(y, name) for y in test["y"]])) for name in WINDOWS}
    window = max(feldkamp, key=feldkamp.get)
    net = jb.nets.LPD(
        A, rngs=nnx.Rngs(0), layers=3, memory=(2, 2), width=8, initial="fbp", filter=window, zero_last=True
    )
    f, params = jb.nets.from_flax(net)
    oracle = jb.explicit.Oracle(lambda params, data: LOSS(None, f(params, data["y"]), data))
    steps = 200
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps), b2=0.99)
    )
    batches = lambda step: jax.tree.map(lambda v: v[step % 12][None], train)  # noqa: E731
    result = jb.fit(jb.FirstOrder(oracle, optimizer), params, batches, steps=steps)
    found = quality(jax.jit(jax.vmap(f, (None, 0)))(result.params, test["y"]))
    assert found >= feldkamp[window] + 2, (found, feldkamp)
