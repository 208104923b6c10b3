"""Reconstruction and segmentation of scans, trained one for the other or apart, against a ceiling on clean images.

R is a learned primal-dual network and T a U-Net that marks lesions (a soft Dice loss plus the cross-entropy). T learns
on clean images first (*ceiling*); all other rows start from that T and an R that is filtered backprojection, and take
the same steps of Adam. *Ceiling's T on R*: that T, never retrained, on sequential
reconstructions. *Sequential*: C = 1, no gradient of the task reaches R. *Joint*: C MSE/a + (1 - C) task/b; normalised
means that a and b are what both are after sequential training, raw that they are 1. *Frozen T*: the ceiling's T judges
R and is not trained. The default data are drawn abdomens with lesions in the liver, exact masks and closed-form line
integrals; --data takes real slices with masks, split by patient. Dice is that of the label 1 by the sign of the logit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common, networks
from benchmarks.networks import scans

NAME = "kadagala_2025_joint"
TITLE = "Kadagala 2025: reconstruction and segmentation, sequential and joint"
MASKS = {"mask": lambda v, label: v == 1, "label": lambda v, label: v == label}  # entries of an .npz


class Pair(NamedTuple):
    """Functions of parameters: R of a measurement, T of an image; and where both start."""

    reconstruct: Callable
    segment: Callable
    params: dict


def task(logits, labels):
    return jb.losses.dice(logits, labels) + jb.losses.cross_entropy(logits, labels)


# ---------------------------------------------------------------------------------------------------------------- data


def drawn(args, rng) -> networks.Scans:
    counts = np.cumsum([args.train, args.validation])
    images, masks, phantoms, pixel = scans.lesions(counts[-1] + args.test, args.sizes[0], rng)
    A = scans.geometry(images.shape[1:], args.views, pixel)
    sinograms = scans.measured(A, images, phantoms, args.photons, rng)
    return networks.parted(A, images, sinograms, np.split(np.arange(len(images)), counts), labels=masks)


def labelled(args, rng) -> networks.Scans:
    """Slices under "hu", or 8-bit pictures under "image" (255: density 1.2), with "mask" or "label", of "case" or
    "patient". Slices of one patient only are split as they lie, which says little about others."""
    with np.load(args.data, allow_pickle=False) as stored:
        entries = {name: stored[name] for name in stored.files}
    if "lung_mask_by_threshold" in entries:
        usable = entries.pop("lung_mask_usable")
        entries = {name: v[usable] for name, v in entries.items() if len(v) == len(usable)}
        entries["mask"] = entries["lung_mask_by_threshold"]
    kind = next((name for name in MASKS if name in entries), None)
    if kind is None or not {"hu", "image"} & set(entries):
        raise SystemExit(f"--data {args.data}: no masks ('mask' or 'label') or no images ('hu' or 'image') in it.")
    mask = MASKS[kind](entries[kind], args.label)
    densities = (
        jb.data.hu_to_density(entries["hu"].astype(np.float32)) if "hu" in entries else 1.2 / 255 * entries["image"]
    )
    densities = np.asarray(densities, np.float32)
    pixel = float(np.median(entries.get("pixel_mm", scans.WIDTH / densities.shape[-1])))
    A, images, sinograms = scans.rescanned(densities, pixel, args.sizes[0], args.views, args.photons, rng)
    masks = scans.coarser(mask.astype(np.float32), args.sizes[0]) >= 0.5
    owner = entries.get("case", entries.get("patient", np.zeros(len(mask), int))).tolist()
    several = len(set(owner)) >= 3
    parts = (
        jb.data.split_by_patient(owner, (0.6, 0.15, 0.25), rng)
        if several
        else np.split(np.arange(len(mask)), np.cumsum([round(0.6 * len(mask)), round(0.15 * len(mask))]))
    )
    return networks.parted(A, images, sinograms, parts, labels=masks)


# ------------------------------------------------------------------------------------------------------------ training


def pair(args, A, window: str, seed: int, subsets: int = 1) -> Pair:
    rngs = nnx.Rngs(seed)
    settings = {"memory": (3, 3), "width": args.width, "initial": "fbp", "zero_last": True, "filter": window}
    R, first = jb.nets.from_flax(jb.nets.LPD(A, rngs=rngs, layers=args.layers, subsets=subsets, **settings))
    unet, second = jb.nets.from_flax(jb.nets.UNet(1, 1, widths=(8, 16, 32), rngs=rngs))
    # soft tissue is within a tenth of 1
    return Pair(R, lambda params, x: unet(params, 10 * (x - 1)), {"reconstruction": first, "task": second})


def pipelines(args, data: networks.Scans, seed: int):
    """Yields (row, weight C, scaling, (logits and images on the test data), what the training cost)."""
    window = "hann"  # where every R starts; the same for all seeds, which then share their compiled steps
    lpd = pair(args, data.operator, window, seed)
    R, T, first = lpd

    def learn(loss, params, **settings):
        return networks.trained(args, loss, params, data, seed, args.batch[0], **settings)

    def seen(pair_, params, test=data.test):
        def one(params, y):
            x = pair_.reconstruct(params["reconstruction"], y)
            return x, pair_.segment(params["task"], x)

        return jax.jit(jax.vmap(one, (None, 0)))(params, test["y"])

    ceiling, cost = learn(
        lambda params, d: task(T(params, d["x"]), d["labels"]), first["task"],
        steps=args.task_steps, rate=args.task_rate,
    )  # fmt: skip
    first = first | {"task": ceiling}
    clean = data.test["x"]
    yield "ceiling: T on clean images", None, None, (clean, jax.vmap(T, (None, 0))(ceiling, clean)), cost

    alone = jb.nets.JointLoss(R, T, task, 1.0)
    params, cost = learn(alone, first)
    yield "sequential", 1.0, "raw", seen(lpd, params), cost
    yield "ceiling's T on R", 1.0, "raw", seen(lpd, params | {"task": ceiling}), {}
    terms = jax.jit(jax.vmap(alone.terms, (None, 0)))(params, data.validation)
    scales = float(jnp.mean(terms.mse)), float(jnp.mean(terms.task))

    def joint(pair_, weight, scaling):
        return jb.nets.JointLoss(
            pair_.reconstruct, pair_.segment, task, weight, scales=scales if scaling == "normalised" else (1.0, 1.0)
        )  # fmt: skip

    middle = args.weights[len(args.weights) // 2]
    runs = [(weight, "normalised") for weight in args.weights] + [(weight, "raw") for weight in args.raw_weights]
    for weight, scaling in runs:
        params, cost = learn(joint(lpd, weight, scaling), first)
        yield "joint", weight, scaling, seen(lpd, params), cost

    lspd = pair(args, data.operator, window, seed, subsets=args.subsets)
    params, cost = learn(joint(lspd, middle, "normalised"), lspd.params | {"task": ceiling})
    yield f"joint, LSPD m = {args.subsets}", middle, "normalised", seen(lspd, params), cost

    trainable, frozen = jb.partition(first, {"reconstruction": True, "task": False})
    loss = joint(lpd, middle, "normalised")
    params, cost = learn(lambda params, d: loss(jb.combine(params, frozen), d), trainable)
    yield "joint, frozen T", middle, "normalised", seen(lpd, jb.combine(params, frozen)), cost


def scores(found, test) -> dict[str, Any]:
    images, logits = found
    marked, labels = (logits > 0).astype(jnp.int32), test["labels"].astype(jnp.int32)
    exact = bool(jnp.all(images == test["x"]))
    quality = {} if exact else networks.quality(images, test["x"], 2.0)
    dice, pooled = (float(jb.metrics.dice(marked, labels, 2, background=False, pooled=p)) for p in (False, True))
    return quality | {"dice": dice, "pooled_dice": pooled, "task": float(jnp.mean(jax.vmap(task)(logits, labels)))}


# -------------------------------------------------------------------------------------------------------------- report


def render(rows: Sequence[dict]) -> str:
    text = "Mean ± standard deviation over seeds.\n"
    means = networks.gathered(rows, ("data", "row", "weight", "scaling"))
    for data in dict.fromkeys(key[0] for key in means):
        own = {key[1:]: v for key, v in means.items() if key[0] == data}
        settings = next(row["settings"] for row in rows if row["case"]["data"] == data)
        text += (
            f"\n**{data}**: {settings['sizes'][0]}², {settings['views']} views, {settings['photons']:g} photons per "
            f"ray; {settings['steps']} steps of {settings['batch'][0]} images\n\n"
        )
        lines = [
            [
                row, "–" if weight is None else f"{weight:g}", scaling or "–", networks.spread(v["dice"], 3),
                networks.spread(v["pooled_dice"], 3), networks.spread(v["task"], 3), networks.spread(v.get("psnr")),
                networks.spread(v.get("train_cpu_s"), 0), len(v["dice"]),
            ]
            for (row, weight, scaling), v in own.items()
        ]  # fmt: skip
        header = ["", "C", "scaling", "Dice", "pooled Dice", "task loss", "PSNR", "training CPU s", "seeds"]
        text += common.table(header, lines) + "\n" + order(own)
    return text


def order(own: dict) -> str:
    """Whether ceiling >= joint >= sequential, seed by seed, for the middle weight and for the best of the sweep."""
    first = {row: v["pooled_dice"] for (row, _, _), v in reversed(own.items())}
    ceiling, sequential = first["ceiling: T on clean images"], first["sequential"]
    text = ""
    for (row, weight, scaling), v in own.items():
        found = v["pooled_dice"]
        if not row.startswith("joint") or len(found) != len(sequential):
            continue
        gain, gap = found - sequential, ceiling - found
        holds = gap.mean() >= 0 and gain.mean() >= 0
        text += (
            f"- {row}, C = {weight:g} {scaling}: pooled Dice {networks.spread(gain, 3)} over sequential "
            f"(above for {int(np.sum(gain > 0))} of {len(gain)} seeds), {networks.spread(gap, 3)} under the ceiling; "
            f"ceiling ≥ joint ≥ sequential {'holds' if holds else 'does NOT hold'} on average.\n"
        )
    return text


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [64], "batch": [4], "dtype": ["float32"], "views": 20, "photons": 7e4, "layers": 4, "width": 12,
            "subsets": 2, "steps": 200, "rate": 3e-3, "task_steps": 1500, "task_rate": 1e-2, "train": 150,
            "validation": 16, "test": 48, "seeds": [0, 1, 2], "weights": [0.1, 0.5, 0.9], "raw_weights": [0.5],
            "label": 5,
        },
        quick={
            "sizes": [16], "batch": [2], "views": 6, "layers": 2, "width": 3, "steps": 2, "task_steps": 2,
            "train": 4, "validation": 2, "test": 4, "seeds": [0], "weights": [0.5], "raw_weights": [],
        },
    )  # fmt: skip
    options.add_argument("--data", help=".npz of slices with masks")
    options.add_argument("--label", type=int, help="which number under 'label' is segmented (5: liver)")
    options.add_argument("--seeds", type=int, nargs="+", help="of data, noise, first parameters and order")
    options.add_argument("--weights", type=float, nargs="+", help="C of the normalised joint loss; the middle for LSPD")
    options.add_argument("--raw-weights", type=float, nargs="*", help="C of the raw joint loss")
    options.add_argument("--photons", type=float, help="per ray before the patient")
    options.add_argument("--rate", type=float, help="greatest learning rate")
    options.add_argument("--task-rate", type=float, help="the same of T on clean images")
    for name, what in {
        "views": "angles in half a turn", "layers": "of R", "width": "of R", "subsets": "of the angles for LSPD",
        "steps": "of training", "task-steps": "of T on clean images", "train": "drawn images to learn from",
        "validation": "images to choose the best by", "test": "drawn images to judge on",
    }.items():  # fmt: skip
        options.add_argument(f"--{name}", type=int, help=what)
    args = common.parse(options, argv)
    recorder = common.Recorder(NAME, args, f"benchmarks/papers/{NAME}.py")
    name = "drawn abdomens with lesions" if args.data is None else f"slices of {Path(args.data).stem}"
    for seed in args.seeds:
        data = (drawn if args.data is None else labelled)(args, np.random.default_rng(seed))
        for row, weight, scaling, found, cost in pipelines(args, data, seed):
            case = {"data": name, "row": row, "weight": weight, "scaling": scaling, "seed": seed}
            measured = recorder.add(case, cost | scores(found, data.test))["figures"]
            print(seed, row, weight, scaling, {k: measured.get(k) for k in ("pooled_dice", "psnr")}, flush=True)
            recorder.write()
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
