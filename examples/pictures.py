"""What the examples share: photographs, noise, reconstructions, a table and a figure."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jbilevel as jb
from jbilevel import image_of
from jbilevel.data.scikit_image import TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, crops, photographs


def options(description: str, name: str) -> argparse.ArgumentParser:
    """What every example can be asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs") / name, help="where results go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--resume", action="store_true", help="go on with the learning that was interrupted")
    return parser


def parser(description: str, name: str, **defaults) -> argparse.ArgumentParser:
    """The options of examples that learn from photographs; ``defaults`` replaces some of their values."""
    parser = options(description, name)
    parser.add_argument("--images", type=Path, help="folder of pictures to use instead of scikit-image's")
    parser.add_argument("--sigma", type=float, default=0.1, help="noise level for images in [0, 1]")
    parser.add_argument("--size", type=int, default=128, help="side of the test images")
    parser.add_argument("--crops", type=int, default=20, help="number of training crops")
    parser.add_argument("--crop-size", type=int, default=64, help="side of the training crops")
    parser.add_argument(
        "--work",
        type=float,
        default=100_000,
        help="stop learning once this many gradient-equivalents are spent, for each model",
    )
    parser.set_defaults(**defaults)
    return parser


def saving(args, name: str) -> dict:
    """Options of `jb.fit` that keep what is learned after every step, in the folder for results."""
    return {
        "checkpoint": args.out / f"{name}.run.npz",
        "resume": args.resume,
        "log": args.out / f"{name}.csv",
        "progress": not args.quiet,
    }


def parsed(parser: argparse.ArgumentParser, argv):
    """The arguments, with the folder for results made."""
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def load(args) -> tuple:
    """(training images, test images), all (n, size, size) in [0, 1]."""
    if args.images is None:
        return photographs(args.size, TRAIN_PHOTOGRAPHS), photographs(args.size, TEST_PHOTOGRAPHS)
    images = jb.data.image_folder(args.images, size=args.size).images
    if len(images) < 4:
        raise SystemExit(f"--images {args.images}: need at least 4 pictures, one of four is for testing.")
    keep = np.arange(len(images)) % 4 != 3
    return images[keep], images[~keep]


def noisy_pairs(images, sigma: float, rng) -> dict[str, jax.Array]:
    images = np.asarray(images, np.float32)
    return {"x": jnp.asarray(images), "y": jnp.asarray(jb.data.gaussian(rng, images, sigma).astype(np.float32))}


def training_crops(images, size: int, count: int, rng) -> np.ndarray:
    per_image = -(-count // len(images))
    return np.concatenate([crops(image, size, per_image, rng) for image in images])[:count]


def train_and_test(args, rng) -> tuple[dict, dict]:
    """Noisy crops to train on, and whole noisy test images."""
    train, test = load(args)
    cut = training_crops(train, args.crop_size, args.crops, rng)
    return noisy_pairs(cut, args.sigma, rng), noisy_pairs(test, args.sigma, rng)


def psnr_loss(params, x, data):
    """-PSNR in decibels, so that every photograph counts alike."""
    return 10 * jnp.log10(jnp.mean((x - data["x"]) ** 2))


def image_loss(params, pair, data):
    """`psnr_loss` of the image in a saddle point."""
    return psnr_loss(params, image_of(pair), data)


def best_tv(problem, batch, weights, tol: float = 1e-2):
    """log of the weight of total variation, as a smooth or a saddle problem, with the best mean PSNR on ``batch``."""
    if isinstance(problem, jb.SaddleProblem):
        oracle = jb.piggyback.Oracle(problem, image_loss, estimate=False)
    else:
        oracle = jb.implicit.Oracle(problem, psnr_loss)
    values = [float(oracle.value(jnp.log(jnp.array([w], jnp.float32)), batch, tol=tol).value) for w in weights]
    return jnp.log(jnp.array([weights[int(np.argmin(values))]], jnp.float32))


def reconstruct(problem, theta, batch, tol: float = 1e-2) -> np.ndarray:
    """Reconstructed images and their check: a solve that did not converge is an error, not a picture."""
    x, info = jax.vmap(lambda data: jb.solve(problem, theta, data, tol=tol))(batch)
    jb.check(info)
    return np.asarray(image_of(x) if isinstance(problem, jb.SaddleProblem) else x)


def learn_tv(problem, regularizer, start, batch, args, best):
    """Weight and smoothing of total variation by MAID, told beside the ``best`` weight of a grid."""
    result = jb.fit(
        jb.MAID(jb.implicit.Oracle(problem, psnr_loss), projection=regularizer.project), start, batch, steps=100,
        work_budget=args.work, **saving(args, "maid"),
    )  # fmt: skip
    weight, eps = np.exp(result.params)
    print(f"{result.steps} steps, {result.work:.0f} gradient-equivalents: {result.message}")
    print(f"learned weight {weight:.2e} and smoothing {eps:.2e}; grid search: weight {float(jnp.exp(best[0])):.2e}")
    return result.params


def report(args, clean, rows: dict, shown=range(3), name="denoised.png", **scale) -> None:
    """The table, printed and as a file, and the figure; ``scale``: ``window`` and ``data_range``."""
    clean = np.asarray(clean)
    summary = table(rows, clean, scale.get("data_range", 1.0))
    print(summary)
    (args.out / "table.md").write_text(summary + "\n")
    figure(args.out / name, clean, rows, [i for i in shown if i < len(clean)], **scale)
    print(f"table, figures and parameters are in {args.out}")


def table(rows: dict, clean, data_range: float = 1.0) -> str:
    lines = ["| | PSNR | SSIM |", "|---|---|---|"]
    similarity = jax.vmap(partial(jb.metrics.ssim, data_range=data_range))
    for name, images in rows.items():
        psnr = float(jb.metrics.mean_psnr(jnp.asarray(images), clean, data_range))
        ssim = float(jnp.mean(similarity(jnp.asarray(images), clean)))
        lines.append(f"| {name} | {psnr:.2f} dB | {ssim:.3f} |")
    return "\n".join(lines)


def figure(path: Path, clean, rows: dict, shown, window=(0.0, 1.0), data_range: float = 1.0) -> None:
    """The ``shown`` images, one line each: clean, then every row with its PSNR; grey values from black to white."""
    plt = pyplot()
    columns = {"clean": clean, **rows}
    fig, axes = plt.subplots(
        len(shown), len(columns), figsize=(2.2 * len(columns), 2.45 * len(shown)), squeeze=False, layout="constrained"
    )  # fmt: skip
    for line, index in zip(axes, shown, strict=True):
        for axis, (name, images) in zip(line, columns.items(), strict=True):
            axis.imshow(images[index], cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest")
            psnr = float(jb.metrics.psnr(images[index], clean[index], data_range))
            quality = "" if name == "clean" else f"{psnr:.2f} dB"
            axis.set_title(f"{name}\n{quality}" if index == shown[0] else quality, fontsize=9)
            axis.axis("off")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def filter_figure(path: Path, filters, weights, columns: int = 16) -> None:
    """Filters (n, k, k), each on its own grey scale, those with the largest weight first."""
    plt = pyplot()
    order = np.argsort(-np.asarray(weights))
    rows = -(-len(order) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(0.55 * columns, 0.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, order, strict=False):
        bound = np.abs(filters[i]).max()
        axis.imshow(filters[i], cmap="gray", vmin=-bound, vmax=bound, interpolation="nearest")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
