"""What learned computed tomography shares: slices, their geometry, noisy sinograms of them, and how networks train."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbilevel as jb
from jbilevel.data.ellipses import from_unit_disc
from jbilevel.operators.fbp import WINDOWS

WIDTH = 360.0  # of the drawn slices, in mm
LIVER, LESION = (jb.data.ABDOMEN_LABELS.index(name) for name in ("liver", "lesion"))
WINDOW = (0.84, 1.24)  # -160 to 240 HU, for soft tissue


def drawn(count: int, size: int, rng) -> tuple[np.ndarray, list, float]:
    """(densities (n, size, size) of drawn abdomens, their ellipses, pixel size in mm)."""
    pixel = WIDTH / size
    phantoms = [jb.data.abdomen(rng).ellipses for _ in range(count)]
    return np.stack([jb.data.raster(p, (size, size), pixel_size=pixel) for p in phantoms]), phantoms, pixel


def lesions(count: int, size: int, rng) -> tuple[np.ndarray, np.ndarray, list, float]:
    """(densities, masks of the lesions, ellipses, pixel size) of abdomens with lesions that a small image can show."""
    pixel, drawings = WIDTH / size, [with_lesions(jb.data.abdomen(rng, lesions=0), rng) for _ in range(count)]
    images = [jb.data.raster(p.ellipses, (size, size), pixel_size=pixel) for p in drawings]
    masks = [jb.data.label_mask(p.ellipses, p.labels, (size, size), pixel_size=pixel) == LESION for p in drawings]
    return np.stack(images), np.stack(masks), [p.ellipses for p in drawings], pixel


def with_lesions(phantom, rng):
    """One or two lesions on opposite sides of the liver's larger lobe, 80 to 160 HU below it: darker than most."""
    liver = phantom.ellipses[phantom.labels.index(LIVER)]
    first, added = rng.uniform(0, 2 * np.pi), []
    for n in range(rng.integers(1, 3)):
        phi, r = first + n * np.pi, 0.5
        x, y = from_unit_disc(liver, r * np.cos(phi), r * np.sin(phi))
        a = rng.uniform(0.38, 0.49) * min(liver.a, liver.b)
        b, angle, value = a * rng.uniform(0.8, 1), rng.uniform(0, np.pi), -rng.uniform(0.08, 0.16)
        added.append(jb.data.Ellipse(x, y, a, b, angle, value))
    return phantom._replace(ellipses=[*phantom.ellipses, *added], labels=[*phantom.labels, *[LESION] * len(added)])


def hounsfield(path, count: int = 1) -> dict[str, np.ndarray]:
    """An array (n, H, W) of slices in Hounsfield units (.npy), or an .npz with it under "hu" and more beside it."""
    stored = np.load(path, allow_pickle=False)
    entries = {name: stored[name] for name in stored.files} if hasattr(stored, "files") else {"hu": stored}
    hu = entries.get("hu", np.zeros(0))
    if hu.ndim != 3 or len(hu) < count:
        raise SystemExit(f"{path}: need an array of at least {count} slices (n, H, W), in an .npz under 'hu'.")
    return entries | {"hu": hu}


def geometry(shape, views: int, pixel: float) -> jb.operators.ParallelBeam:
    """``views`` angles in half a turn, with a detector that sees the whole image in bins as wide as its pixels."""
    detectors = int(np.ceil(np.hypot(*shape))) + 1
    angles = np.pi * np.arange(views) / views
    return jb.operators.ParallelBeam(shape, angles, detectors, pixel_size=pixel, detector_size=pixel)


def measured(A, images, phantoms, photons: float, rng) -> jax.Array:
    """Sinograms with photon noise: analytic for phantoms, else of the images themselves through A."""
    if phantoms is None:
        exact = np.asarray(A(jnp.asarray(images)))
    else:
        size = A.detector_size
        exact = np.stack([jb.data.parallel_sinogram(p, A.angles, A.n_detectors, size) for p in phantoms])
    return jnp.asarray(jb.data.poisson_transmission(rng, np.asarray(exact, np.float32), photons))


def coarser(stack, size: int):
    """Means of blocks of a stack of square images (n, N, N), n of ``size`` pixels a side."""
    times, rest = divmod(stack.shape[-1], size)
    if rest or stack.shape[1] != stack.shape[2]:
        raise SystemExit(f"--size {size} does not divide the sides of slices of {stack.shape[1:]} pixels.")
    return stack.reshape(len(stack), size, times, size, times).mean((2, 4))


def rescanned(densities, pixel: float, size: int, views: int, photons: float, rng):
    """(operator, images, sinograms) of slices that are measured on their own grid and reconstructed on a coarser."""
    images = coarser(densities, size)
    A = geometry(images.shape[1:], views, pixel * densities.shape[-1] / size)
    measuring = dataclasses.replace(A, in_shape=densities.shape[1:], pixel_size=pixel)
    parts = np.split(densities, range(8, len(densities), 8))
    return A, images, jnp.concatenate([measured(measuring, some, None, photons, rng) for some in parts])


def best_filter(A, data) -> str:
    """The window of filtered backprojection with the least error."""
    errors = {name: jnp.mean((A.fbp(data["y"], name) - data["x"]) ** 2) for name in WINDOWS}
    return min(errors, key=errors.get)


def train(loss, params, data, validation, *, steps, batch, rate=2e-3, seed=0, folder=None, **fit):
    """``(the average of the iterates that is best on the validation data, its step, what fit returned)``.

    Adam with a warm-up and a cosine decay of the rate; ``folder`` keeps the best parameters and a checkpoint; ``fit``:
    more options of `jb.fit`.
    """
    oracle = jb.explicit.Oracle(loss)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    method = jb.FirstOrder(oracle, optimizer, average=0.95)
    chosen = lambda step: np.random.default_rng([seed, step]).choice(len(data["x"]), batch)  # noqa: E731
    best = jb.Validation(
        oracle, validation, every=max(1, steps // 12), path=folder and folder / "best.npz",
        params=lambda state: state.average.params,
    )  # fmt: skip
    result = jb.fit(
        method, params, lambda step: jax.tree.map(lambda v: v[chosen(step)], data), steps=steps, callback=best,
        checkpoint=folder and folder / "run.npz", checkpoint_every=100, **fit,
    )  # fmt: skip
    return best.params, best.step, result
