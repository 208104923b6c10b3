"""Total variation for a segmentation network: weights that are best for the eye and weights that are best for the task.

A U-Net T learns to tell discs from bars on clean images. Then only noisy images are to be had,

    x_hat(theta) = argmin_x 1/2 |x - y|^2 + R(theta, x),      min over theta of mean loss(T(x_hat(theta)), labels),

and theta is learned for that loss (CE + Dice) by MAID, with R total variation of one weight, with its last layers
learning too (in turn, by Adam), and with R of ridge filters. Compared with T on noisy images and behind the total
variation with the best PSNR; the images are drawn with exact labels.

With --views 24 the images are measured by X-ray projections, and the problem is min_x 1/2 |A x - y|^2 + R(theta, x).

Writes a table and figures to --out; about two minutes on two cores, with --views five.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pictures
import scans
from flax import nnx

import jbilevel as jb
from jbilevel.task import Pipeline, reconstruct

CLASSES = ("background", "disc", "bar")
STRIPES = 0.15  # amplitude of what counts for the eye alone
COLOURS = ("#0072b2", "#e69f00")
LOSS = jb.losses.Segmentation(iou=0.0, log_cosh_dice=0.0)
TV = jb.regularizers.SmoothedTV(eps=1e-2)
CRR = jb.regularizers.CRR(widths=(4, 8), sizes=(3, 3))


def drawn(count: int, size: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of two to four shapes that do not touch, brighter or darker than stripes of a few pixels."""
    images, labels = np.zeros((count, size, size), np.float32), np.zeros((count, size, size), np.int32)
    rows, columns = np.mgrid[:size, :size]
    for image, label in zip(images, labels, strict=True):
        angle, taken = rng.uniform(0, 2 * np.pi), np.zeros((size, size), bool)
        across = np.cos(angle) * rows + np.sin(angle) * columns
        image += 0.5 + STRIPES * np.sin(2 * np.pi * across / rng.uniform(4, 6) + angle)
        for _ in range(rng.integers(2, 5)):
            r = rng.uniform(0.1, 0.17) * size
            i, j = rng.uniform(1.2 * r + 1, size - 1.2 * r - 1, 2)
            kind = rng.integers(1, 3)
            if kind == 1:
                inside = np.hypot(rows - i, columns - j) <= r
            else:
                long, short = rng.permutation([1.2 * r, 0.35 * r])
                inside = (abs(rows - i) <= long) & (abs(columns - j) <= short)
            around = np.hypot(rows - i, columns - j) <= 1.35 * r + 1
            if not np.any(taken & around):
                taken |= around
                image[inside] += rng.choice([-1, 1]) * rng.uniform(0.2, 0.35)
                label[inside] = kind
    return images, labels


class Setting(NamedTuple):
    """How images are measured: the operator (None: as they are), what shows its data as an image, and scales."""

    operator: Callable | None
    naive: Callable  # measurement -> image
    name: str  # of that image
    noise: float
    weights: np.ndarray  # of total variation
    tol: float


def setting(args) -> Setting:
    weights = np.geomspace(0.2, 4, 16)
    if args.views is None:
        sigma = 0.2 if args.sigma is None else args.sigma
        return Setting(None, lambda y: y, "noisy images", sigma, sigma * weights, 0.02)
    projector = scans.geometry((args.size, args.size), args.views, 1.0)
    norm = projector.norm()
    A = (1 / norm) * projector
    noise = (0.02 if args.sigma is None else args.sigma) * float(jnp.mean(A(jnp.full(A.in_shape, 0.5))))
    naive = lambda y: projector.fbp(norm * y, "hann")  # noqa: E731
    return Setting(A, naive, "filtered backprojection", noise, noise * weights / 10, 1e-3)


def noisy(images, labels, how: Setting, rng):
    exact = images if how.operator is None else np.asarray(how.operator(jnp.asarray(images)))
    y = jb.data.gaussian(rng, exact, how.noise).astype(np.float32)
    return {"x": jnp.asarray(images), "y": jnp.asarray(y), "labels": jnp.asarray(labels)}


def trained(args, rng):
    """(T, its parameters, the U-Net): on clean images."""
    net = jb.nets.UNet(1, len(CLASSES), widths=(8, 16, 32), rngs=nnx.Rngs(args.seed))
    unet, params = jb.nets.from_flax(net)
    T = lambda params, x: unet(params, 5 * (x - 0.5))  # noqa: E731
    images, labels = (jnp.asarray(v) for v in drawn(400, args.size, rng))
    parts = ({"x": images[a:b], "labels": labels[a:b]} for a, b in ((0, 360), (360, 400)))
    loss = lambda p, d: LOSS(T(p, d["x"]), d["labels"])  # noqa: E731
    params, *_ = scans.train(
        loss, params, *parts, steps=args.net_steps, batch=8, rate=5e-3, seed=args.seed, folder=args.out,
        resume=args.resume, progress=not args.quiet,
    )  # fmt: skip
    return T, params, net


def dice(logits, labels) -> float:
    """Of discs and bars, mean over images."""
    return float(jb.metrics.dice(jnp.argmax(logits, 1), labels, len(CLASSES), background=False))


def table(rows: dict, test) -> str:
    lines = ["| | training loss of the task | PSNR | Dice |", "|---|---|---|---|"]
    for name, (value, images, logits) in rows.items():
        psnr = "–" if images is test["x"] else f"{float(jb.metrics.mean_psnr(images, test['x'])):.2f} dB"
        lines.append(f"| {name} | {value:.3f} | {psnr} | {dice(logits, test['labels']):.3f} |")
    return "\n".join(lines)


def figure(path, rows: dict, test, shown) -> None:
    """What T sees, with the outlines of what it marks as disc (blue) and as bar (orange)."""
    plt = pictures.pyplot()
    fig, axes = plt.subplots(
        len(shown), len(rows), figsize=(2.1 * len(rows), 2.4 * len(shown)), squeeze=False, layout="constrained"
    )
    for line, index in zip(axes, shown, strict=True):
        for axis, (name, (_, images, logits)) in zip(line, rows.items(), strict=True):
            axis.imshow(images[index], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            found = np.argmax(logits[index], 0)
            for kind, colour in enumerate(COLOURS, 1):
                if np.any(found == kind):
                    axis.contour((found == kind).astype(float), levels=[0.5], colors=colour, linewidths=1.6)
            score = dice(logits[index : index + 1], test["labels"][index : index + 1])
            axis.set_title(f"{name}\nDice {score:.2f}" if index == shown[0] else f"Dice {score:.2f}", fontsize=8)
            axis.axis("off")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def curves(path, weights, psnr, losses, learned: float) -> None:
    """PSNR and task loss on the training images over the weight of total variation."""
    plt = pictures.pyplot()
    fig, left = plt.subplots(figsize=(5, 3.2), layout="constrained")
    right = left.twinx()
    left.semilogx(weights, losses, color=COLOURS[0])
    right.semilogx(weights, psnr, color=COLOURS[1])
    left.axvline(learned, color="0.4", linestyle="--", linewidth=1)
    ticks = [t for t in np.outer([1e-4, 1e-3, 1e-2, 1e-1, 1], [1, 2, 5]).ravel() if weights[0] <= t <= weights[-1]]
    left.set_xticks(ticks, [f"{t:g}" for t in ticks])
    left.minorticks_off()
    left.set_xlabel("weight of total variation (dashed: learned for the task)")
    left.set_ylabel("loss of the task", color=COLOURS[0])
    right.set_ylabel("PSNR in dB", color=COLOURS[1])
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv=None):
    parser = pictures.options(__doc__, "task_adapted_segmentation")
    parser.add_argument("--views", type=int, help="measure X-ray projections from so many angles, not the image")
    parser.add_argument("--sigma", type=float, help="noise (default 0.2; of projections 0.02 of their mean)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--train", type=int, default=40, help="noisy images to learn from")
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--net-steps", type=int, default=600, help="steps of the network on clean images")
    parser.add_argument("--steps", type=int, default=12, help="bilevel steps")
    args = pictures.parsed(parser, argv)

    rng = np.random.default_rng(args.seed)
    started = time.perf_counter()
    T, net_params, net = trained(args, rng)
    print(f"network on clean images: {time.perf_counter() - started:.0f} s")
    how = setting(args)
    batch, test = (noisy(*drawn(n, args.size, rng), how, rng) for n in (args.train, args.test))
    denoiser, ridge = (jb.variational(how.operator, R) for R in (TV, CRR))
    T_all = jax.jit(jax.vmap(T, (None, 0)))
    rows = {}

    def add(name: str, network, pictures_of):
        """``pictures_of(batch)``: what T sees."""
        images = pictures_of(batch)
        value = float(jnp.mean(jax.vmap(LOSS)(T_all(network, images), batch["labels"])))
        images = pictures_of(test)
        rows[name] = value, images, T_all(network, images)

    def denoised(problem, theta):
        return lambda data: reconstruct(Pipeline(problem, T, LOSS), theta, data, tol=how.tol)

    add("clean images", net_params, lambda data: data["x"])
    add(how.name, net_params, lambda data: jax.vmap(how.naive)(data["y"]))

    weights = how.weights
    seen = [denoised(denoiser, jnp.log(jnp.array([w], jnp.float32)))(batch) for w in weights]
    psnr = [float(jb.metrics.mean_psnr(x, batch["x"])) for x in seen]
    losses = [float(jnp.mean(jax.vmap(LOSS)(T_all(net_params, x), batch["labels"]))) for x in seen]
    best = jnp.log(jnp.array([weights[np.argmax(psnr)]], jnp.float32))
    add("TV, best PSNR", net_params, denoised(denoiser, best))

    learn = partial(jb.task_adapted, task=T, loss=LOSS, task_params=net_params, batches=batch)
    quick = {"estimate": False}

    def told(name, problem, found):
        fit = found.fit
        print(f"{name}: {fit.steps} steps, {np.sum(fit.history['seconds']):.0f} s and {fit.compile_seconds:.0f} s of "
              f"compiling, loss {fit.history['value'][0]:.3f} to {fit.history['value'][-1]:.3f}")  # fmt: skip
        add(name, found.task, denoised(problem, found.regularizer))

    adapted = learn(denoiser, regularizer=best, steps=args.steps, **pictures.saving(args, "tv"))
    told("TV for the task", denoiser, adapted)
    curves(args.out / "weights.png", weights, psnr, losses, float(jnp.exp(adapted.regularizer[0])))

    adam = partial(jb.FirstOrder, tol=2.5 * how.tol, adjoint_tol=2.5 * how.tol)
    tuned = learn(
        denoiser, regularizer=adapted.regularizer, steps=args.steps, finetune=net.last(2), oracle=quick,
        method=partial(adam, optimizer=optax.adam(0.03)), alternate=optax.adam(1e-3), task_steps=3,
        **pictures.saving(args, "tuned"),
    )  # fmt: skip
    told("TV, fine-tuned", denoiser, tuned)

    filters = learn(
        ridge, regularizer=CRR.init(jax.random.key(args.seed), dtype=jnp.float32), steps=6 * args.steps, oracle=quick,
        method=partial(adam, optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 6 * args.steps, 0.05))),
        **pictures.saving(args, "ridge"),
    )  # fmt: skip
    told("ridge filters", ridge, filters)

    summary = table(rows, test)
    print(summary)
    (args.out / "table.md").write_text(summary + "\n")
    figure(args.out / "task_adapted.png", rows, test, range(min(3, args.test)))
    print(f"table and figures are in {args.out}, {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
