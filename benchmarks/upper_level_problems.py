"""The problems of `upper_level.py`: each is a lower level with its oracle, its data, a start, and an exact judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbilevel as jb
from benchmarks import common


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method is given, and what judges it.

    goal: the least value, where it is known. exact: options of the oracle that judges, with its ``tol``.
    """

    name: str
    oracle: Any
    batch: Any
    start: Any
    projection: Callable | None = None
    goal: float | None = None
    tight: float = 1e-8
    max_steps: int = 20_000

    @property
    def count(self) -> int:
        """Samples, by which work is divided."""
        return jax.tree.leaves(self.batch)[0].shape[0]

    def judge(self) -> Judge:
        return Judge(replace(self.oracle, estimate=False, correct=False, max_steps=self.max_steps), self)


class Judge:
    """Values by tight solves, each from the last solution; they are not counted as work."""

    def __init__(self, oracle, setting: Setting):
        self.setting, self.warm = setting, oracle.init(setting.start, setting.batch)
        self._value = jax.jit(lambda params, warm: oracle.value(params, setting.batch, warm, tol=setting.tight))

    def __call__(self, params) -> float:
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params)):
            return float("inf")
        found = self._value(params, self.warm)
        value = float(found.value)
        if np.isfinite(value):
            self.warm = found.warm
        return value


# ------------------------------------------------------------------------------------------------- P1: two parameters

TV_STARTS = ((-5.0, -5.0), (-2.5, -4.0), (-1.0, -2.0), (-4.0, -1.0), (0.0, 0.0), (-2.0, -7.0))
TV_BEST = 3.16810134713  # by BFGS on hypergradients solved to 1e-10


def tv(start=TV_STARTS[0]) -> Setting:
    """Weight and smoothing of isotropic smoothed TV, camera() at 64 x 64 pixels with noise 0.1 (Ehrhardt 2025)."""
    pair = common.images(64, 1)
    batch = {"x": jnp.asarray(pair.clean), "y": jnp.asarray(pair.noisy)}
    problem = jb.variational(None, jb.regularizers.SmoothedTV())
    oracle = jb.implicit.Oracle(problem, jb.losses.squared_error(), loss_smoothness=1.0)
    return Setting(f"TV from {start}", oracle, batch, jnp.array(start), goal=TV_BEST)


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


def _logistic_loss(a, w, d):
    return jnp.sum(jax.nn.softplus(-d["yv"] * (d["Xv"] @ w)))


LOGISTIC_STARTS = (0.0, 3.0, -3.0)


def logistic(start: float = 0.0, table: str = "breast_cancer") -> Setting:
    """The weight of l2-regularised logistic regression by its loss on held-out samples (Pedregosa 2016)."""
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
    problem = jb.SmoothProblem(
        _logistic_energy,
        init=lambda a, d: jnp.zeros(d["Xt"].shape[1]),
        strong_convexity=lambda a, d: jnp.exp(a),
    )
    setting = Setting(f"logistic regression from {start:g}", problem.oracle(_logistic_loss), batch, jnp.array(start))
    judge = setting.judge()
    goal = min(judge(jnp.array(a)) for a in np.linspace(-6, 6, 241))
    return replace(setting, goal=goal)


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


def foe_crops(seed: int = 0) -> Setting:
    """Fields of Experts with 8 filters of 3 x 3 on 400 crops of 40 x 40."""
    batch = crops(seed=seed // 1000)
    R = jb.regularizers.FoE(count=8, size=3)
    oracle = jb.implicit.Oracle(jb.variational(None, R), jb.losses.squared_error(), loss_smoothness=1.0)
    start = R.init(jax.random.key(seed % 1000))
    return Setting(f"FoE on 400 crops, seed {seed}", oracle, batch, start, R.project, tight=1e-2, max_steps=5000)


SETTINGS: dict[str, Callable[..., Setting]] = {
    "tv": tv,
    "foe": foe,
    "foe large": partial(foe, 48, 7),
    "learned TV exact": partial(learned_tv, "exact"),
    "learned TV curved": partial(learned_tv, "curved"),
    "logistic": logistic,
    "foe crops": foe_crops,
}
