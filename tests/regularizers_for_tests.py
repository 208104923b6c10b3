"""Every regulariser as the shared tests take it, and the numbers that they judge, by one compiled program for each."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jbilevel as jb
from jbilevel.regularizers import CRR, ICNN, TGV, TV, WCRR, FoE, LearnedTV, SmoothedTV, WeightedTV


class Entry(NamedTuple):
    regularizer: jb.Regularizer
    shape: tuple = (6, 5)  # of one x
    scale: float = 0.3  # of random x at which the energy is curved
    nudge: float = 0.1  # of random params around their start
    smoothing: float = 0.0  # added to log_smoothing, where differences would otherwise see kinks


REGULARIZERS = {
    "SmoothedTV": Entry(SmoothedTV()),
    "SmoothedTV, fixed eps": Entry(SmoothedTV(eps=0.1)),
    "SmoothedTV, anisotropic": Entry(SmoothedTV(kind="anisotropic")),
    "SmoothedTV, colour": Entry(SmoothedTV(channels=3), (3, 4, 4)),
    "SmoothedTV, separate channels": Entry(SmoothedTV(channels=2, coupling="separate"), (2, 4, 4)),
    "SmoothedTV, anisotropic colour": Entry(SmoothedTV(kind="anisotropic", channels=2), (2, 4, 4)),
    "TV": Entry(TV()),
    "TV, Huber": Entry(TV(width=0.05)),
    "WeightedTV": Entry(WeightedTV(grid=(3, 2), eps=0.1)),
    "TGV": Entry(TGV()),
    "LearnedTV": Entry(LearnedTV(count=3, size=3)),
    "LearnedTV, curved": Entry(
        LearnedTV(3, 3, sums="free", dual_curvature=0.1, auxiliary_curvature=0.1, width=0.05), nudge=0.02
    ),
    "FoE": Entry(FoE(count=3, size=3), scale=0.03),
    "FoE, huber": Entry(FoE(count=2, size=3, potential="huber", boundary="zero"), scale=0.03, smoothing=2.0),
    "FoE, psi": Entry(FoE(count=2, size=3, potential="psi"), scale=0.03, smoothing=2.0),
    "FoE, spline": Entry(FoE(2, 2, potential="spline", boundary="valid", overall_weight=False), scale=0.03),
    "CRR": Entry(CRR((2, 3), (3, 2)), scale=0.1),
    "CRR, root": Entry(CRR((1,), (2,), potential="root", boundary="valid"), scale=0.1),
    "WCRR": Entry(WCRR((2, 3), (3, 2)), scale=0.1),
    # nudged, their second layers would be negative
    "ICNN": Entry(ICNN(3, 2, size=3, width=0.1), scale=0.1, nudge=0.0),
    "ICNN, smoothstep": Entry(
        ICNN(3, 2, size=3, width=0.1, potential="smoothstep", boundary="zero"), scale=0.1, nudge=0.0
    ),
    "ICNN, bias": Entry(ICNN(1, 1, size=2, width=0.1, bias=True, boundary="valid"), scale=0.1, nudge=0.0),
}
WITHOUT_ENERGY = (TGV, LearnedTV)  # themselves minima over other unknowns
every_entry = pytest.mark.parametrize("name", REGULARIZERS)


def names(condition):
    return pytest.mark.parametrize(
        "name", [name for name, entry in REGULARIZERS.items() if condition(entry.regularizer)]
    )


def has_energy(R):
    return not isinstance(R, WITHOUT_ENERGY)


def has_saddle(R):
    """Whether it says so, and not another potential than the saddle form is written for."""
    return type(R).saddle is not jb.Regularizer.saddle and not (
        isinstance(R, (FoE, ICNN)) and R.potential in ("spline", "smoothstep")
    )


def points(entry, count=1, dtype=jnp.float64):
    draws = entry.scale * np.random.default_rng(0).standard_normal((count, *entry.shape))
    return jnp.asarray(draws, dtype)


def start(entry, dtype=jnp.float64, nudge=None):
    """Parameters a little off their start, so that nothing is zero by accident."""
    leaves, treedef = jax.tree.flatten(entry.regularizer.init(dtype=jnp.float64))
    rng, nudge = np.random.default_rng(1), entry.nudge if nudge is None else nudge
    params = jax.tree.unflatten(
        treedef, [jnp.asarray(leaf + nudge * rng.standard_normal(leaf.shape), dtype) for leaf in leaves]
    )
    if entry.smoothing:
        params["log_smoothing"] = params["log_smoothing"] + entry.smoothing
    return params


# ---- the numbers of one entry, by one compiled program ---------------------------------------------------------------

STEP = 1e-6
TINY = 1e-2


class Measured(NamedTuple):
    values: Any  # at the points of `places_of`
    slopes: Any
    in_params: Any
    hessians: Any
    mixed: Any  # d/dparams grad_x R
    bounds: jb.Constants


SCALES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)


def places_of(entry):
    """Pairs of points: far apart, near a flat image, and apart in one pixel only; then steps for differences."""
    x, y = points(entry, 2)
    pixel = jnp.zeros(x.size).at[x.size // 2].set(1e-4 * entry.scale).reshape(x.shape)
    near = [v for scale in SCALES for v in (scale * y, scale * y + pixel)]
    return jnp.stack([x, y, 0 * x, TINY * x, 1e-4 * x, 2e-4 * x, *near, x + STEP * y, x - STEP * y])


PAIRS = [(n, n + 1) for n in range(0, 6 + 2 * len(SCALES), 2)]
AHEAD, BEHIND = -2, -1  # of x = place 0, along y = place 1


@cache
def measured(name) -> Measured:
    entry = REGULARIZERS[name]
    R, params = entry.regularizer, start(entry)
    flat, assemble = ravel_pytree(params)

    @jax.jit
    def everything(flat, places):
        energy = lambda t, x: R(assemble(t), x)  # noqa: E731
        slope = jax.grad(energy, 1)

        def at(x):
            value, (in_params, in_x) = jax.value_and_grad(energy, (0, 1))(flat, x)
            push = lambda v: jax.jvp(lambda z: slope(flat, z), (x,), (v,))[1]  # noqa: E731
            hessian = jax.vmap(push)(jnp.eye(x.size).reshape(x.size, *x.shape)).reshape(x.size, x.size)
            turn = lambda v: jax.jvp(lambda t: slope(t, x), (flat,), (v,))[1]  # noqa: E731
            mixed = jax.vmap(turn)(jnp.eye(flat.size)).reshape(flat.size, x.size)
            return value, in_x, in_params, hessian, mixed

        return jax.vmap(at)(places), R.bounds(assemble(flat), entry.shape)

    found, bounds = jax.tree.map(np.asarray, everything(flat, places_of(entry)))
    return Measured(*found, bounds)
