"""Street scenes segmented behind a denoiser that is learned for the segmentation, as in Kadagala's report, Table 1.

T* is a U-Net trained on clean images with mirrored crops; its loss, and that of the upper level, is CE + Dice + IoU +
log-cosh Dice. The lower level sees the noisy image alone: with an honest data term no row can reach the Dice that the
report prints for σ = 0.4 and 0.8, which is that of clean images. The default data are drawn shapes with exact labels;
--data and --held-out take CamVid frames as .npz, --cityscapes the folder of Cityscapes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import tasks
from benchmarks.tasks import task_adapted_segmentation

NAME = "kadagala_report_segmentation"
TITLE = "Kadagala (report): segmentation behind a learned denoiser"
SCORES = {"dice": "Dice", "pooled_dice": "pooled Dice", "iou": "IoU"}
GREY = np.array([0.299, 0.587, 0.114], np.float32)
VOID = 255


def stored(path, void: int) -> tuple[np.ndarray, np.ndarray]:
    """(grey images in [0, 1], labels with 255 for void) of an .npz with "image" (n, H, W, 3) of bytes and "label"."""
    with np.load(path, allow_pickle=False) as entries:
        images, labels = entries["image"], entries["label"]
    return images.astype(np.float32) / 255 @ GREY, np.where(labels == void, VOID, labels).astype(np.int32)


def street_scenes(samples, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey means of blocks, and the label of a pixel of each block, of pictures ``height`` pixels high."""
    images, labels = [], []
    for sample in samples:
        times = sample.image.shape[1] // height
        shape = (height, times, sample.image.shape[2] // times, times)
        images.append(np.tensordot(GREY, sample.image, 1).reshape(shape).mean((1, 3)))
        labels.append(np.asarray(sample.labels, np.int32)[times // 2 :: times, times // 2 :: times])
    return np.stack(images).astype(np.float32), np.stack(labels)


def crops(images, labels, count: int, size: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Square parts of images chosen evenly."""
    cut = []
    for n in range(count):
        i, j = (rng.integers(side - size + 1) for side in images.shape[1:])
        at = (n % len(images), slice(i, i + size), slice(j, j + size))
        cut.append((images[at], labels[at]))
    return tuple(np.stack(part) for part in zip(*cut, strict=True))


def make(args, seed: int):
    rng, size = np.random.default_rng(seed), args.sizes[0]
    if args.cityscapes:
        name, classes = "Cityscapes", len(jb.data.CITYSCAPES_CLASSES)
        known, unknown = (
            street_scenes(jb.data.cityscapes(args.cityscapes, split, limit=args.limit), size)
            for split in ("train", "val")
        )
    elif args.data:
        name, classes = Path(args.data).stem, 11
        known, unknown = (stored(path, classes) for path in (args.data, args.held_out))
    else:
        name, classes = "drawn shapes", 3
        known, unknown = (task_adapted_segmentation.drawn(n, size, rng) for n in (max(4 * args.train, 8), args.test))
    order = rng.permutation(len(known[0]))
    known = tuple(v[order] for v in known)
    kept = max(1, len(order) // 10)

    def batch(rng):
        chosen = rng.integers(kept, len(order), args.batch[0])
        images, labels = crops(*(v[chosen] for v in known), args.batch[0], size, rng)
        return dict(zip(("x", "labels"), tasks.mirrored(images, labels, rng), strict=True))

    net = jb.nets.UNet(1, classes, widths=args.widths, rngs=nnx.Rngs(seed))
    unet, params = jb.nets.from_flax(net)
    network = lambda params, x: unet(params, 5 * (x - 0.5))  # noqa: E731
    loss = jb.losses.Segmentation(ignore=VOID)
    pairs = [
        crops(*part, count, size, rng)
        for part, count in ((tuple(v[:kept] for v in known), 2 * kept), (known, args.train), (unknown, args.test))
    ]
    validation, train, test = ({"x": x, "labels": s} for x, s in pairs)
    params = tasks.trained(args, network, params, loss, batch, validation, seed)

    def score(logits, labels):
        found = jnp.argmax(logits, 1)
        dice, pooled = (float(jb.metrics.dice(found, labels, classes, ignore=VOID, pooled=p)) for p in (False, True))
        return {"dice": dice, "pooled_dice": pooled, "iou": float(jb.metrics.iou(found, labels, classes, ignore=VOID))}

    return f"{name}, {size}²", tasks.Task(network, params, net.last(2), loss, score, train, test)


def render(rows) -> str:
    return tasks.render(rows, SCORES)


def options(parser) -> None:
    parser.add_argument("--data", help=".npz of frames to learn from, with 'image' and 'label' (11: void)")
    parser.add_argument("--held-out", help=".npz of frames to judge on")
    parser.add_argument("--cityscapes", help="folder of leftImg8bit and gtFine")
    parser.add_argument("--limit", type=int, help="pictures read of each part of Cityscapes")
    parser.add_argument("--widths", type=int, nargs="+", help="of the U-Net")


def main(argv=None) -> None:
    tasks.main(
        NAME, __doc__, make, SCORES, options=options, argv=argv,
        defaults={"sizes": [64], "net_steps": 1500, "rate": 5e-3, "widths": [16, 32, 64], "limit": 300},
        quick={"sizes": [16], "widths": [3, 4], "batch": [2]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
