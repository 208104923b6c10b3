"""Pictures classified behind a denoiser that is learned for the classification, as in Kadagala's report, Table 2.

T* is a small ResNet trained on clean mirrored images, its batch statistics set once and then frozen; the loss is the
cross-entropy, the score top-1. The lower level sees the noisy image alone. The default data are scikit-learn's digits;
--data takes an .npz with "x" and "y" (CIFAR-10, pets), --dogs the folder of Stanford Dogs, --weights a local file of
torchvision's weights without their classifier.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import tasks
from jbilevel.data.scikit_image import centre_crop

NAME = "kadagala_report_classification"
TITLE = "Kadagala (report): classification behind a learned denoiser"
SCORES = {"top1": "top-1", "top5": "top-5"}
GREY = np.array([0.299, 0.587, 0.114], np.float32)


def labelled(args) -> tuple[str, np.ndarray, np.ndarray]:
    """(name, grey images in [0, 1], labels)."""
    if args.dogs:
        samples = [jb.data.stanford_dogs(args.dogs, split, limit=args.limit) for split in ("train", "test")]
        pairs = [(shrunk(s.image, args.sizes[0]), s.label) for part in samples for s in part]
        return "Stanford Dogs", np.stack([x for x, _ in pairs]), np.array([y for _, y in pairs], np.int32)
    if args.data:
        with np.load(args.data, allow_pickle=False) as entries:
            images, labels = entries["x"].astype(np.float32) / 255 @ GREY, entries["y"].astype(np.int32)
        return Path(args.data).stem, images, labels
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.kron(digits.images / 16, np.ones((1, 2, 2))).astype(np.float32)
    return "digits", images, digits.target.astype(np.int32)


def shrunk(image, size: int):
    """The grey centre square as means of blocks."""
    grey = np.tensordot(GREY, image, 1) if image.ndim == 3 else image
    times = min(grey.shape) // size
    return centre_crop(grey, times * size).reshape(size, times, size, times).mean((1, 3))


def make(args, seed: int):
    rng = np.random.default_rng(seed)
    name, images, labels = labelled(args)
    order, classes = rng.permutation(len(images)), int(labels.max()) + 1
    test, known = order[: args.test], order[args.test :]
    kept, learning = known[: max(1, len(known) // 10)], known[max(1, len(known) // 10) :]

    def batch(rng):
        chosen = rng.choice(learning, args.batch[0])
        x, s = images[chosen], labels[chosen]
        return dict(zip(("x", "labels"), (x, s) if name == "digits" else tasks.mirrored(x, s, rng), strict=True))

    net = jb.nets.ResNet(args.depth, classes, channels=1, width=args.width, stem=args.stem, rngs=nnx.Rngs(seed))
    if args.weights:
        jb.nets.load_torch(net, args.weights, skip=("fc.", "conv1."))  # which are for other classes and for colours
    else:
        net.calibrate(images[learning[:64]])
    network, params = jb.nets.from_flax(net)
    loss = jb.losses.cross_entropy
    part = lambda chosen: {"x": images[chosen], "labels": labels[chosen]}  # noqa: E731
    params = tasks.trained(args, network, params, loss, batch, part(kept), seed)

    def score(logits, labels):
        return {f"top{k}": float(jb.metrics.top_k(logits, labels, min(k, classes))) for k in (1, 5)}

    train = part(learning[: args.train])
    return f"{name}, {images.shape[1]}²", tasks.Task(network, params, net.last(1), loss, score, train, part(test))


def render(rows) -> str:
    return tasks.render(rows, SCORES)


def options(parser) -> None:
    parser.add_argument("--data", help=".npz with 'x' (n, H, W, 3) of bytes and 'y'")
    parser.add_argument("--dogs", help="folder of Stanford Dogs")
    parser.add_argument("--limit", type=int, help="pictures read of each part of Stanford Dogs")
    parser.add_argument("--weights", help=".pth or .safetensors of torchvision for this depth and width")
    parser.add_argument("--depth", type=int, help="of the ResNet")
    parser.add_argument("--width", type=int, help="of the ResNet, 64 in torchvision's")
    parser.add_argument("--stem", choices=("imagenet", "small"), help="of the ResNet")


def main(argv=None) -> None:
    tasks.main(
        NAME, __doc__, make, SCORES, options=options, argv=argv,
        defaults={
            "sizes": [64], "batch": [32], "net_steps": 600, "rate": 3e-3, "depth": 18, "width": 16, "stem": "small",
            "limit": 4000,
        },
        quick={"width": 2, "batch": [4]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
