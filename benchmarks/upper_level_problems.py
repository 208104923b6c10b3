"""The problems of `upper_level.py`: each is a lower level with its oracle, its data, a start, and an exact judge."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbilevel as jb
from benchmarks import common
from jbilevel.task import FROZEN, Pipeline


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method is given, and what judges it.

    goal: the least value, where it is known. order: seed of the order of samples, for methods that draw them. parts:
    makes what scales Adam's updates of the parts of params. tight, max_steps: of the solves that judge.
    """

    name: str
    oracle: Any
    batch: Any
    start: Any
    projection: Callable | None = None
    goal: float | None = None
    order: int = 0
    parts: Callable | None = None
    tight: float = 1e-8
    max_steps: int = 20_000

    @property
    def count(self) -> int:
        """Samples, by which work is divided."""
        return next(part for name, part in self.batch.items() if name != FROZEN).shape[0]

    def judge(self) -> Judge:
        return Judge(replace(self.oracle, estimate=False, correct=False, max_steps=self.max_steps), self)


class Judge:
    """Values by tight solves, each from the last solution; they are not counted as work."""

    def __init__(self, oracle, setting: Setting):
        self.oracle, self.setting = oracle, setting
        self.warm = oracle.init(setting.start, setting.batch)

    def __call__(self, params) -> float:
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params)):
            return float("inf")
        found = self.oracle.value(params, self.setting.batch, self.warm, tol=self.setting.tight)
        value = float(found.value)
        if np.isfinite(value):
            self.warm = found.warm
        return value


# ------------------------------------------------------------------------------------------------- P1: two parameters

TV_STARTS = ((-5.0, -5.0), (-2.5, -4.0), (-1.0, -2.0), (-4.0, -1.0), (0.0, 0.0), (-2.0, -7.0))
TV_BEST = 3.16810134713  # by BFGS on hypergradients solved to 1e-10


TV_HELD_OUT_BEST = 2.73313164857  # the same of astronaut() with noise 0.05


def tv(start=TV_STARTS[0], photograph: int = 0, noise: float = 0.1) -> Setting:
    """Weight and smoothing of isotropic smoothed TV, camera() at 64 x 64 pixels with noise 0.1 (Ehrhardt 2025).

    ``photograph`` 1 is astronaut(); its least value is known for noise 0.05.
    """
    pair = common.images(64, photograph + 1)
    clean, white = pair.clean[photograph:], (pair.noisy - pair.clean)[photograph:] / common.NOISE
    batch = {"x": jnp.asarray(clean), "y": jnp.asarray(clean + noise * white)}
    problem = jb.variational(None, jb.regularizers.SmoothedTV())
    oracle = jb.implicit.Oracle(problem, jb.losses.squared_error(), loss_smoothness=1.0)
    goal = {(0, 0.1): TV_BEST, (1, 0.05): TV_HELD_OUT_BEST}.get((photograph, noise))
    return Setting(f"TV from {start}", oracle, batch, jnp.array(start), goal=goal)


# --------------------------------------------------------------------------------------------- P2: Fields of Experts


def foe(filters: int = 16, size: int = 5, seed: int = 0) -> Setting:
    """8 crops of 64 x 64 pixels with noise 0.1; ``seed`` of the filters (and 1000 + seed: of other crops)."""
    rng = np.random.default_rng(seed // 1000)
    clean = jb.data.photographs(128, jb.data.TRAIN_PHOTOGRAPHS)
    clean = np.concatenate([jb.data.crops(clean[i % len(clean)], 64, 1, rng) for i in range(8)])
    batch = {"x": jnp.asarray(clean, jnp.float32), "y": jnp.asarray(jb.data.gaussian(rng, clean, 0.1), jnp.float32)}
    R = jb.regularizers.FoE(count=filters, size=size)
    oracle = jb.implicit.Oracle(jb.variational(None, R), jb.losses.squared_error(), loss_smoothness=1.0)
    start = R.init(jax.random.key(seed % 1000), dtype=jnp.float32)
    name = f"FoE {filters} {size}x{size}, seed {seed}"
    return Setting(name, oracle, batch, start, R.project, tight=1e-2, max_steps=5000)


# --------------------------------------------------------------------------------------------------- P3: learned TV


def learned_tv(
    kind: str = "exact", seed: int = 0, size: int = 16, count: int = 2, filters: int = 3, folder: str | None = None
) -> Setting:
    """Filters of a learned TV discretisation (Bogensperger et al. 2024), as published ("exact") or with curvature.

    ``seed`` of the filters and of the crops, which are of photographs (or of the pictures in ``folder``), noise 0.1.
    """
    rng = np.random.default_rng(seed)
    if folder is None:
        whole = list(jb.data.photographs(128, jb.data.TRAIN_PHOTOGRAPHS, dtype=np.float64))
    else:
        whole = list(jb.data.image_folder(folder, limit=count).images)
    clean = np.concatenate([jb.data.crops(whole[i % len(whole)], size, 1, rng) for i in range(count)])
    clean = clean.astype(np.float64)
    batch = {"x": jnp.asarray(clean), "y": jnp.asarray(clean + 0.1 * rng.standard_normal(clean.shape))}
    curved = {} if kind == "exact" else {"dual_curvature": 1e-2, "auxiliary_curvature": 1e-2, "width": 1e-3}
    R = jb.regularizers.LearnedTV(count=filters, size=3, **curved)
    smoothness = {} if kind == "exact" else {"loss_smoothness": 1.0}
    oracle = jb.piggyback.Oracle(jb.variational(None, R), jb.losses.squared_error(part=(0, 0)), **smoothness)
    start = R.init(jax.random.key(seed), dtype=jnp.float64)
    tight = 1e-3 if kind == "exact" else 2e-3
    return Setting(f"learned TV, {kind}, seed {seed}", oracle, batch, start, R.project, tight=tight)


# ---------------------------------------------------------------------------------------------- P4: logistic regression


def _logistic_energy(a, w, d):
    return jnp.sum(jax.nn.softplus(-d["yt"] * (d["Xt"] @ w))) + 0.5 * jnp.exp(a) * w @ w


def _logistic_init(a, d):
    return jnp.zeros(d["Xt"].shape[1])


def _logistic_convexity(a, d):
    return jnp.exp(a)


def _logistic_loss(a, w, d):
    return jnp.sum(jax.nn.softplus(-d["yv"] * (d["Xv"] @ w)))


LOGISTIC = jb.SmoothProblem(_logistic_energy, init=_logistic_init, strong_convexity=_logistic_convexity)
LOGISTIC_STARTS = (0.0, 3.0, -3.0)


@cache
def _table(table: str) -> Setting:
    """The data from the middle of the weights that are searched, and the least loss over these."""
    from sklearn import datasets
    from sklearn.preprocessing import StandardScaler

    X, y = getattr(datasets, f"load_{table}")(return_X_y=True)
    if table != "breast_cancer":
        y = y == np.unique(y)[1]
    X, y = StandardScaler().fit_transform(X), 2.0 * (y > 0) - 1
    order = np.random.default_rng(0).permutation(len(y))
    train, rest = np.split(order, [300 if table == "breast_cancer" else len(y) // 2])
    batch = {"Xt": X[train], "yt": y[train], "Xv": X[rest], "yv": y[rest]}
    batch = {name: jnp.asarray(part)[None] for name, part in batch.items()}
    setting = Setting(table, LOGISTIC.oracle(_logistic_loss), batch, jnp.array(0.0))
    judge = setting.judge()
    return replace(setting, goal=min(judge(jnp.array(a)) for a in np.linspace(-6, 6, 241)))


def logistic(start: float = 0.0, table: str = "breast_cancer") -> Setting:
    """The weight of l2-regularised logistic regression by its loss on held-out samples (Pedregosa 2016)."""
    return replace(_table(table), name=f"logistic regression, {table}, from {start:g}", start=jnp.array(start))


# ----------------------------------------------------------------------------------------------- P5: many small crops


def crops(count: int = 400, size: int = 40, seed: int = 0, dtype=np.float64) -> dict:
    """Crops of photographs, turned, with noise 0.1."""
    whole = jb.data.photographs(191, jb.data.TRAIN_PHOTOGRAPHS, dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = []
    for i in range(count):
        image = whole[i % len(whole)]
        a, b = rng.integers(0, 191 - size, 2)
        drawn.append(np.rot90(image[a : a + size, b : b + size], rng.integers(4)))
    clean = np.stack(drawn)
    noisy = clean + 0.1 * rng.standard_normal(clean.shape)
    return {"x": jnp.asarray(clean, dtype), "y": jnp.asarray(noisy, dtype)}


def _ordered(batch: dict, order: int) -> dict:
    """The samples in an order of their own, which those methods see that draw them."""
    index = np.random.default_rng(order).permutation(next(iter(batch.values())).shape[0])
    return {name: part[index] for name, part in batch.items()}


def foe_crops(order: int = 0, seed: int = 0, count: int = 400) -> Setting:
    """Fields of Experts with 8 filters of 3 x 3 on 400 crops of 40 x 40."""
    R = jb.regularizers.FoE(count=8, size=3)
    oracle = jb.implicit.Oracle(jb.variational(None, R), jb.losses.squared_error(), loss_smoothness=1.0)
    batch, start = _ordered(crops(count, seed=seed), order), R.init(jax.random.key(seed))
    return Setting(
        f"FoE on {count} crops, order {order}", oracle, batch, start, R.project, order=order, tight=1e-2,
        max_steps=5000,
    )  # fmt: skip


def crr_crops(order: int = 0, count: int = 400) -> Setting:
    """A convex ridge regulariser from random filters, on crops of 40 x 40."""
    R = jb.regularizers.CRR(widths=(4, 8), sizes=(3, 3))
    oracle = jb.implicit.Oracle(jb.variational(None, R), jb.losses.squared_error(), loss_smoothness=1.0)
    start = R.init(jax.random.key(0))
    return Setting(
        f"CRR on {count} crops, order {order}", oracle, _ordered(crops(count), order), start, order=order, tight=1e-2,
        max_steps=5000,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- what else the library has


def icnn_ct(seed: int = 0, size: int = 16) -> Setting:
    """An input-convex network as regulariser of few-view tomography, by piggyback, as in examples/ct_icnn.py."""
    ct_icnn = _example("ct_icnn")
    asked = SimpleNamespace(size=size, train=3, test=0, views=8, noise=2.0)
    A, norm, batch = ct_icnn.scans(asked, np.random.default_rng(seed))
    network = jb.regularizers.ICNN(hidden=4, outputs=2, boundary="zero")
    problem = jb.variational((1 / norm) * A, network, form="saddle")
    oracle = jb.piggyback.Oracle(problem, jb.losses.squared_error(part=(0, 0)), solver=ct_icnn.SOLVER)
    start = network.init(jax.random.key(seed), weight=1e-3, dtype=jnp.float32)
    return Setting(f"ICNN for CT, seed {seed}", oracle, batch, start, network.project, tight=1e-2)


@cache
def _segmenter(size: int) -> tuple:
    """A U-Net that tells discs from bars on clean drawn images, its params, and which leaves learn."""
    from flax import nnx

    example = _example("task_adapted_segmentation")
    net = jb.nets.UNet(1, len(example.CLASSES), widths=(4, 8), rngs=nnx.Rngs(0))
    unet, params = jb.nets.from_flax(net)
    network = lambda params, x: unet(params, 5 * (x - 0.5))  # noqa: E731
    images, labels = example.drawn(160, size, np.random.default_rng(0))
    oracle = jb.explicit.Oracle(lambda p, d: example.LOSS(network(p, d["x"]), d["labels"]))
    batches = lambda k: {"x": images[k % 20 * 8 :][:8], "labels": labels[k % 20 * 8 :][:8]}  # noqa: E731
    method = jb.FirstOrder(oracle, optax.adam(1e-2))
    return network, jb.fit(method, params, batches, steps=200, progress=False).params, net.last(1), example.LOSS


def task_parts() -> optax.GradientTransformation:
    """Layers of a network learn a hundred times slower than the weight of a regulariser, see `jb.task.rates`."""
    return jb.task.rates(regularizer=optax.identity(), task=optax.scale(0.01))


def task_adapted(seed: int = 0, size: int = 32, count: int = 8) -> Setting:
    """Total variation and the last layers of a small U-Net, learned together for segmentation of noisy images."""
    network, params, last, loss = _segmenter(size)
    rng = np.random.default_rng(seed + 1)
    images, labels = _example("task_adapted_segmentation").drawn(count, size, rng)
    noisy = jb.data.gaussian(rng, images, 0.2).astype(np.float32)
    R = jb.regularizers.SmoothedTV(eps=1e-2)
    pipeline = Pipeline(jb.variational(None, R), network, loss)
    start, frozen = pipeline.split(jnp.log(jnp.array([0.1], jnp.float32)), params, last)
    batch = {"y": jnp.asarray(noisy), "labels": jnp.asarray(labels), FROZEN: frozen}
    return Setting(
        f"TV and last layers, seed {seed}", pipeline.oracle(batch), batch, start, parts=task_parts, tight=1e-2,
        max_steps=5000,
    )  # fmt: skip


def wavelets(seed: int = 0, size: int = 64, levels: int = 3) -> Setting:
    """A weight for each subband of wavelet coefficients, by the mean PSNR of noisy photographs (Villacis 2025)."""
    from benchmarks.papers import villacis_2025_wavelets as paper

    images = jb.data.photographs(size, jb.data.TRAIN_PHOTOGRAPHS[:4], dtype=np.float64)
    batch, start = paper.damaged(images, "noise", levels, seed), jnp.full(3 * levels + 1, np.log(0.05))
    oracle = paper.oracle("noise", "subbands", size, levels)
    return Setting(f"wavelets, noise {seed}", oracle, batch, start, tight=1e-6)


def _example(name: str):
    """A module of examples/."""
    if str(common.ROOT / "examples") not in sys.path:
        sys.path.insert(0, str(common.ROOT / "examples"))
    return importlib.import_module(name)
