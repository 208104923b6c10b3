"""What the two benchmarks of learned discretisations of total variation share: crops, problems, solves, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jbilevel as jb
from jbilevel import image_of

SIGMA = 25.5 / 255
RESIDUAL = 3e-5  # of reconstructions that are compared, per pixel (root mean square); PSNR is then right to 5e-4 dB
LIMIT = 20000  # iterations that such a solve may take
TEST_SIDE = 300  # squares of the photographs that crops are taken from
TRAIN_SIDE = 190
WINDOW = (slice(40, 80), slice(40, 80))  # of the photograph, shown enlarged
LOSS = jb.losses.squared_error(part=(0, 0))


@dataclass(frozen=True)
class Experts(jb.Regularizer):
    """Fields of Experts in Huber's form, of which the filters alone are learned (Bogensperger et al. 2024 have 400).

    Weights and widths are equal and fixed: the norms of the filters do what weights would.
    """

    foe: jb.regularizers.FoE = jb.regularizers.FoE(count=16, size=5, potential="huber")
    weight: float = 0.1
    width: float = 0.015

    def init(self, key=None) -> dict:
        """The cosines of lowest frequency, without the constant, of norm 1."""
        size = self.foe.size
        waves = np.cos(np.pi * np.outer(np.arange(size), np.arange(size) + 0.5) / size)
        pairs = sorted(((i, j) for i in range(size) for j in range(size)), key=lambda ij: (sum(ij), ij))
        filters = np.stack([np.outer(waves[i], waves[j]) for i, j in pairs[1 : self.foe.count + 1]])
        filters /= np.linalg.norm(filters, axis=(1, 2), keepdims=True)
        return {"filters": jnp.asarray(filters, jnp.float32)}

    def full(self, params: dict) -> dict:
        """Filters are read without their means, whose derivatives would drown all others in Adam's second moments."""
        filters = params["filters"] - jnp.mean(params["filters"], axis=(1, 2), keepdims=True)
        fixed = {"log_weights": np.log(self.weight / self.foe.count), "log_smoothing": np.log(self.width)}
        vectors = {name: jnp.full((self.foe.count,), value, filters.dtype) for name, value in fixed.items()}
        return {"log_weight": jnp.zeros((), filters.dtype), "filters": filters, **vectors}

    def __call__(self, params: dict, x):
        return self.foe(self.full(params), x)

    def saddle(self, params: dict):
        return self.foe.saddle(self.full(params))


def problem(regularizer):
    return jb.variational(None, regularizer, form="saddle")


def negative_psnr(params, pair, data):
    """-PSNR / 10 of the image in a saddle point: what is judged is a mean of decibels, to which smooth images, whose
    squared errors are small, give as much as others."""
    return jnp.log10(jnp.mean((image_of(pair) - data["x"]) ** 2))


def piggyback(regularizer, loss=None, **options) -> jb.piggyback.Oracle:
    """The loss is half the squared error unless it is given."""
    part = (0, 0) if isinstance(regularizer, jb.regularizers.LearnedTV) else 0
    squared = LOSS if part == (0, 0) else jb.losses.squared_error(part=part)
    return jb.piggyback.Oracle(problem(regularizer), loss or squared, **options)


def pictures(folder: str | None) -> tuple:
    """(training images, test images), two halves of a folder or photographs of two disjoint lists."""
    if folder is None:
        train = jb.data.photographs(TRAIN_SIDE, jb.data.TRAIN_PHOTOGRAPHS)
        return train, jb.data.photographs(TEST_SIDE, jb.data.TEST_PHOTOGRAPHS)
    images = jb.data.image_folder(folder).images
    return images[1::2], images[::2]


def noisy_crops(images, size: int, count: int, seed) -> dict[str, jax.Array]:
    """One random crop of each image in turn, and the same with noise."""
    rng = np.random.default_rng(seed)
    clean = np.concatenate([jb.data.crops(images[i % len(images)], size, 1, rng) for i in range(count)])
    return {"x": jnp.asarray(clean, jnp.float32), "y": jnp.asarray(jb.data.gaussian(rng, clean, SIGMA), jnp.float32)}


def denoised(regularizer, params, noisy, residual: float = RESIDUAL) -> np.ndarray:
    """Reconstructions, each solved until its residual is ``residual`` per pixel; one that is not is an error."""
    tol = residual * np.sqrt(noisy[0].size)
    solve = partial(jb.solve, problem(regularizer), params, tol=tol, max_steps=LIMIT)
    found = []
    for y in noisy:
        pair, info = solve({"y": y})
        jb.check(info)
        found.append(image_of(pair))
    return np.stack(found)


def psnr(images, batch) -> np.ndarray:
    return np.asarray(jax.vmap(jb.metrics.psnr)(jnp.asarray(images), batch["x"]))


def quality(regularizer, params, batch, **options) -> np.ndarray:
    """PSNR of each reconstruction of a batch."""
    return psnr(denoised(regularizer, params, batch["y"], **options), batch)


def photograph(size: int = 128) -> tuple[np.ndarray, jax.Array]:
    """(clean, noisy) of the test photograph that figures show."""
    clean = jb.data.photographs(2 * size, ("camera",))[0][size // 4 : size // 4 + size, size // 2 : size // 2 + size]
    return clean, jnp.asarray(jb.data.gaussian(np.random.default_rng(0), clean, SIGMA), jnp.float32)


def save(figure, folder: Path, name: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / name, dpi=110)


def show_filters(figure, filters: np.ndarray, title: str) -> None:
    """Filters (2, count, size, size): a line for each component of the dual field, on one scale of greys."""
    bound = np.abs(filters).max()
    axes = figure.subplots(*filters.shape[:2], squeeze=False)
    for line, bank, label in zip(axes, filters, ("$y_1$", "$y_2$"), strict=True):
        for axis, kernel in zip(line, bank, strict=True):
            axis.imshow(kernel, cmap="gray", vmin=-bound, vmax=bound, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label)
    figure.suptitle(title, fontsize=10)


def show_reconstructions(figure, clean, shown: dict[str, np.ndarray], window: tuple[slice, slice]) -> None:
    """A line of images with their PSNR, and below the part ``window`` of each."""
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, (name, image) in zip(axes.T, shown.items(), strict=True):
        for axis, part in zip(column, (image, image[window]), strict=True):
            axis.imshow(part, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        ratio = float(jb.metrics.psnr(image, clean))
        column[0].set_title(name if np.isinf(ratio) else f"{name}\n{ratio:.2f} dB", fontsize=9)
        rows, columns = window
        box = (columns.start, rows.start), columns.stop - columns.start, rows.stop - rows.start
        from matplotlib.patches import Rectangle

        column[0].add_patch(Rectangle(*box, fill=False, ec="#d55e00", lw=1))
