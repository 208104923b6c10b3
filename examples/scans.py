"""What the examples of computed tomography share: slices, their geometry, and noisy sinograms of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jbilevel as jb

WIDTH = 360.0  # of the drawn slices, in mm
WINDOW = (0.84, 1.24)  # -160 to 240 HU, for soft tissue


def drawn(count: int, size: int, rng) -> tuple[np.ndarray, list, float]:
    """(densities (n, size, size) of drawn abdomens, their ellipses, pixel size in mm)."""
    pixel = WIDTH / size
    phantoms = [jb.data.abdomen(rng).ellipses for _ in range(count)]
    return np.stack([jb.data.raster(p, (size, size), pixel_size=pixel) for p in phantoms]), phantoms, pixel


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
