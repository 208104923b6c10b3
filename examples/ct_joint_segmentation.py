"""Computed tomography for a task: reconstruction and segmentation of lesions, trained apart and together.

Sequential:   R: min mean ||R(y) - x*||^2, then T: min mean task(T(R(y)), mask)                 (C = 1 in `JointLoss`)
Joint:        R, T: min mean C ||R(y) - x*||^2/a + (1 - C) task(T(R(y)), mask)/b

R is a learned primal-dual network around the projector, T a U-Net, the task a soft Dice loss plus the cross-entropy; a
and b are what both terms are after sequential training. T learns on clean images first, the ceiling, and both other
rows start from that T. The data are sections through drawn abdomens with one or two lesions in the liver, exact masks,
analytic line integrals and photon noise.

Writes a table and a figure to --out; about two minutes on two cores. `benchmarks/papers/kadagala_2025_joint.py`
measures the same with several seeds and weights: one run of one seed says little about which is better.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import scans
from flax import nnx

import jbilevel as jb


def task(logits, labels):
    return jb.losses.dice(logits, labels) + jb.losses.cross_entropy(logits, labels)


def networks(args, A):
    """(R, T, parameters of both)."""
    rngs = nnx.Rngs(args.seed)
    start = {"initial": "fbp", "filter": "hann", "zero_last": True}
    R, first = jb.nets.from_flax(jb.nets.LPD(A, rngs=rngs, layers=3, memory=(3, 3), width=8, **start))
    unet, second = jb.nets.from_flax(jb.nets.UNet(1, 1, widths=(8, 16, 32), rngs=rngs))
    # soft tissue is within a tenth of 1
    return R, lambda params, x: unet(params, 10 * (x - 1)), {"reconstruction": first, "task": second}


def learn(args, name: str, loss, params, parts, *, steps: int, rate: float):
    started = time.perf_counter()
    best, step, result = scans.train(
        loss, params, *parts, steps=steps, batch=args.batch, rate=rate, seed=args.seed, folder=args.out / name,
        resume=args.resume, progress=not args.quiet,
    )  # fmt: skip
    print(f"{name}: {result.message} Best on validation data after step {step}, {time.perf_counter() - started:.0f} s.")
    return best


def dice(logits, masks) -> float:
    """Of all lesions together."""
    found, masks = (jnp.asarray(v, jnp.int32) for v in (logits > 0, masks))
    return float(jb.metrics.dice(found, masks, 2, background=False, pooled=True))


def table(rows: dict, test) -> str:
    lines = ["| | PSNR | Dice of lesions |", "|---|---|---|"]
    for name, (images, logits) in rows.items():
        same = images is test["x"]
        psnr = "–" if same else f"{float(jb.metrics.mean_psnr(images, test['x'], 2.0)):.2f} dB"
        lines.append(f"| {name} | {psnr} | {dice(logits, test['labels']):.3f} |")
    return "\n".join(lines)


def figure(path, rows: dict, test, shown) -> None:
    """The images with the true outline of the lesions (white) and what T marks (orange)."""
    plt = pictures.pyplot()
    fig, axes = plt.subplots(
        len(shown), len(rows), figsize=(2.6 * len(rows), 2.8 * len(shown)), squeeze=False, layout="constrained"
    )
    for line, index in zip(axes, shown, strict=True):
        for axis, (name, (images, logits)) in zip(line, rows.items(), strict=True):
            axis.imshow(images[index], cmap="gray", vmin=scans.WINDOW[0], vmax=scans.WINDOW[1])
            for marked, colour, width in ((test["labels"][index], "white", 0.8), (logits[index] > 0, "#e69f00", 1.6)):
                if np.any(marked):
                    axis.contour(np.asarray(marked, float), levels=[0.5], colors=colour, linewidths=width)
            score = dice(logits[index : index + 1], test["labels"][index : index + 1])
            axis.set_title(f"{name}\nDice {score:.2f}" if index == shown[0] else f"Dice {score:.2f}", fontsize=9)
            axis.axis("off")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv=None):
    parser = pictures.options(__doc__, "ct_joint_segmentation")
    parser.add_argument("--size", type=int, default=48, help="side of the images in pixels")
    parser.add_argument("--views", type=int, default=20, help="angles in half a turn")
    parser.add_argument("--photons", type=float, default=7e4, help="photons per ray before the patient")
    parser.add_argument("--weight", type=float, default=0.5, help="C of the joint loss")
    parser.add_argument("--train", type=int, default=150, help="drawn images to learn from")
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=3e-3, help="greatest learning rate")
    parser.add_argument("--task-steps", type=int, default=600, help="of T on clean images")
    parser.add_argument("--task-rate", type=float, default=1e-2, help="the same of T on clean images")
    args = pictures.parsed(parser, argv)

    rng, validation = np.random.default_rng(args.seed), 16
    images, masks, phantoms, pixel = scans.lesions(args.train + validation + args.test, args.size, rng)
    A = scans.geometry(images.shape[1:], args.views, pixel)
    data = {"x": jnp.asarray(images), "y": scans.measured(A, images, phantoms, args.photons, rng), "labels": masks}
    ends = (0, args.train, args.train + validation, len(images))
    *parts, test = ({k: jnp.asarray(v[a:b]) for k, v in data.items()} for a, b in zip(ends, ends[1:], strict=False))

    R, T, params = networks(args, A)
    T_all = jax.jit(jax.vmap(T, (None, 0)))
    clean = learn(
        args, "ceiling", lambda p, d: task(T(p, d["x"]), d["labels"]), params["task"], parts,
        steps=args.task_steps, rate=args.task_rate,
    )  # fmt: skip
    start, both = params | {"task": clean}, {"steps": args.steps, "rate": args.rate}
    rows = {"clean images": (test["x"], T_all(clean, test["x"]))}

    sequential = jb.nets.JointLoss(R, T, task, weight=1.0)
    apart = learn(args, "sequential", sequential, start, parts, **both)
    terms = jax.vmap(sequential.terms, (None, 0))(apart, parts[1])
    scales = float(jnp.mean(terms.mse)), float(jnp.mean(terms.task))
    print(f"after sequential training: mean squared error {scales[0]:.2e}, task loss {scales[1]:.3f}")
    joint = jb.nets.JointLoss(R, T, task, args.weight, scales=scales)
    together = learn(args, "joint", joint, start, parts, **both)

    for name, found in {"sequential": apart, f"joint, C = {args.weight:g}": together}.items():
        x = jax.vmap(R, (None, 0))(found["reconstruction"], test["y"])
        rows[name] = x, T_all(found["task"], x)
    summary = table(rows, test)
    print(summary)
    (args.out / "table.md").write_text(summary + "\n")
    figure(args.out / "ct_joint.png", rows, test, range(min(3, args.test)))
    print(f"table and figure are in {args.out}")


if __name__ == "__main__":
    main()
