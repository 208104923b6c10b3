"""What the benchmarks of learned reconstruction share: scans, the measurement of a row, and the means over seeds."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbilevel as jb
from benchmarks import common
from jbilevel._core import trees

sys.path.insert(0, str(common.ROOT / "examples"))
import scans

SMALL = {"memory": (5, 5), "width": 16, "initial": "fbp", "zero_last": True}  # starts as filtered backprojection
LOSS = jb.losses.squared_error(mean=True)


class Scans(NamedTuple):
    """An operator and three parts of the data, each with images "x", measurements "y" and perhaps "labels"."""

    operator: Any
    train: dict
    validation: dict
    test: dict


def drawn(args, photons: float, rng) -> Scans:
    """Drawn abdomens with closed-form line integrals."""
    counts = np.cumsum([args.train, args.validation])
    images, phantoms, pixel = scans.drawn(counts[-1] + args.test, args.sizes[0], rng)
    A = scans.geometry(images.shape[1:], args.views, pixel)
    return parted(
        A, images, scans.measured(A, images, phantoms, photons, rng), np.split(np.arange(len(images)), counts)
    )


def slices(args, photons: float, rng) -> Scans:
    """Real slices of an .npz with "hu", "patient" and "pixel_mm", measured on the finer grid that they have."""
    stored = scans.hounsfield(args.data, 3)
    densities = np.asarray(jb.data.hu_to_density(stored["hu"].astype(np.float32)))
    pixel = float(np.median(stored["pixel_mm"]))
    A, images, sinograms = scans.rescanned(densities, pixel, args.sizes[0], args.views, photons, rng)
    return parted(A, images, sinograms, jb.data.split_by_patient(stored["patient"].tolist(), (0.7, 0.1, 0.2), rng))


def volumes(args, photons: float, rng) -> Scans:
    """Balls in cylinders of water, drawn and measured on a grid twice as fine, in the cone beam of a full turn."""
    size, width = args.sizes[0], 200.0  # mm
    columns = math.ceil(1.75 * size)
    A = jb.operators.ConeBeam(
        size, 2 * np.pi * np.arange(args.views) / args.views, (math.ceil(1.5 * size), columns), source_origin=600.0,
        origin_detector=200.0, pixel_size=width / size, detector_size=1.8 * width / columns,
    )  # fmt: skip
    fine = dataclasses.replace(A, in_shape=tuple(2 * n for n in A.in_shape), pixel_size=A.pixel_size / 2)
    z, i, j = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in fine.in_shape), indexing="ij")
    cylinder = ((i**2 + j**2 < 0.7) & (abs(z) < 0.7)).astype(np.float32)
    counts = np.cumsum([args.train, args.validation])
    images, sinograms, project = [], [], jax.jit(fine)
    for _ in range(counts[-1] + args.test):
        drawn = cylinder.copy()
        for _ in range(6):
            at, r = rng.uniform(-0.45, 0.45, 3), rng.uniform(0.1, 0.3)
            drawn[(z - at[0]) ** 2 + (i - at[1]) ** 2 + (j - at[2]) ** 2 < r**2] += rng.uniform(-0.3, 0.3)
        drawn = np.maximum(drawn, 0) * cylinder  # nothing sticks out, nothing is emptier than air
        sinograms.append(jb.data.poisson_transmission(rng, np.asarray(project(drawn)), photons))
        images.append(drawn.reshape(size, 2, size, 2, size, 2).mean((1, 3, 5)))
    return parted(A, np.stack(images), np.stack(sinograms), np.split(np.arange(len(images)), counts))


def parted(A, images, sinograms, parts: Sequence, **more) -> Scans:
    arrays = {"x": jnp.asarray(images, jnp.float32), "y": jnp.asarray(sinograms, jnp.float32)}
    arrays |= {name: jnp.asarray(v) for name, v in more.items()}
    return Scans(A, *({name: v[np.asarray(part)] for name, v in arrays.items()} for part in parts))


def quality(found, clean, data_range: float) -> dict[str, float]:
    ssim = jax.vmap(partial(jb.metrics.ssim, data_range=data_range))
    ssim = ssim if clean.ndim == 3 else jax.vmap(ssim)  # of a volume: the mean over its slices
    return {
        "psnr": float(jb.metrics.mean_psnr(found, clean, data_range)),
        "psnr_of_mean_mse": float(jb.metrics.psnr_of_mean_mse(found, clean, data_range)),
        "ssim": float(jnp.mean(ssim(found, clean))),
    }


def trained(
    args, loss: Callable, params, data: Scans, seed: int, batch: int, *, steps: int | None = None, rate=None
) -> tuple[Any, dict]:
    """The trained parameters, and what the training cost: seconds of the clock and of all cores together."""
    cpu, steps = time.process_time(), steps or args.steps
    best, step, result = scans.train(
        loss, params, data.train, data.validation, steps=steps, batch=batch, rate=rate or args.rate, seed=seed
    )
    if best is None or result.steps < steps:
        raise SystemExit(f"training ended early: {result.message}")
    return best, {
        "parameters": trees.size(params), "best_step": step, "train_s": float(result.history["seconds"].sum()),
        "compile_s": result.compile_seconds, "train_cpu_s": time.process_time() - cpu,
    }  # fmt: skip


def inference(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds per call of each: of the clock, in turns, and of all cores together, which a busy machine keeps."""
    clock, found = common.interleave(calls, repeats), {}
    for name, call in calls.items():
        started = time.process_time()
        for _ in range(repeats):
            jax.block_until_ready(call())
        cpu = 1e3 * (time.process_time() - started) / repeats
        found[name] = {"ms": float(np.median(clock[name])) * 1e3, "cpu_ms": cpu}
    return found


def gathered(rows: Sequence[dict], keys: Sequence[str], leave_out: str = "seed") -> dict[tuple, dict[str, np.ndarray]]:
    """Figures of the rows that differ in the seed only: the values of the cases' ``keys`` -> {figure: all values}."""
    found: dict[tuple, dict[str, list]] = {}
    for row in rows:
        own = found.setdefault(tuple(row["case"].get(key) for key in keys), {})
        for name, value in row["figures"].items():
            own.setdefault(name, []).append(common.number(value))
    return {case: {name: np.array(v) for name, v in own.items()} for case, own in found.items()}


def spread(values, digits: int = 2) -> str:
    """mean ± standard deviation over the seeds, or the value of the only one."""
    if values is None or np.any(np.isnan(values)):
        return "–"
    text = f"{values.mean():.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {values.std(ddof=1):.{digits}f}"
