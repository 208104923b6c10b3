"""Noisy, blurred and incomplete photographs restored with learned weights of wavelet coefficients (Villacís 2025).

Lower level: 1/2 ||R W'x - y||^2 + alpha/2 ||x||^2 + sum_i w_i |x_i| with an orthogonal wavelet transform W; upper
level: mean PSNR loss of W'x. Weights: one for all, one for each subband, one for each coefficient; learned on some
photographs and judged on others. The oracle learns on those it is judged on: weights of its kind cannot do much better.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common
from jbilevel.operators import Mask, Wavelet, gaussian_blur

NAME = "villacis_2025_wavelets"
TITLE = "Villacís 2025: wavelet restoration of photographs"
RIDGE = 1e-3  # alpha: with it every solve carries a proven error
TARGET = 0.8  # share of the oracle's gain that learned subband weights should reach
GRID = tuple(np.geomspace(0.4, 2e-3, 24))  # downwards, each solve from the last one
FREE = -20.0  # log weight of a low-pass band that is not penalised


class Damage(NamedTuple):
    """How photographs were damaged; ``at(size)`` is the operator, None the identity."""

    at: Any
    sigma: float
    tol: float  # of lower-level solutions, absolute on photographs of 128 pixels; adjoints to RIDGE of it
    shown: str


@cache
def mask(size: int) -> Mask:
    """Half of the pixels, at random, the same for all photographs of a size."""
    return Mask(np.random.default_rng(4).random((size, size)) < 0.5)


DAMAGES = {
    "noise": Damage(lambda size: None, 0.1, 1e-2, "noise 0.1"),
    "blur": Damage(lambda size: gaussian_blur((size, size), 1.5), 0.02, 3.0, "blur of 1.5 pixels, noise 0.02"),
    "mask": Damage(mask, 0.05, 1.0, "half of the pixels lost, noise 0.05"),
}


@cache
def subbands(size: int, levels: int) -> np.ndarray:
    """The subband of each coefficient: 0 low-pass, then three for each level from coarse to fine."""
    index = np.zeros((size, size), int)
    for level in range(levels, 0, -1):
        half, first = size >> level, 3 * (levels - level) + 1
        index[:half, half : 2 * half] = first
        index[half : 2 * half, :half] = first + 1
        index[half : 2 * half, half : 2 * half] = first + 2
    return index


def wavelet(size: int, levels: int) -> Wavelet:
    return Wavelet((size, size), "db2", levels)


def weights(kind: str, size: int, levels: int):
    """params -> weights of all coefficients."""
    index = subbands(size, levels)
    return jnp.exp if kind == "coefficients" else lambda params: jnp.exp(params)[index]


@cache
def problem(damage: str, kind: str, size: int, levels: int) -> jb.WeightedL1Problem:
    """For data as `damaged` makes them; L = 1 + alpha, as no operator here has a norm above 1."""
    operator, transform = DAMAGES[damage].at(size), wavelet(size, levels)

    def smooth(params, x, data):
        # ||W'x - y|| = ||x - W y||
        misfit = x - data["y"] if operator is None else operator(transform.T(x)) - data["y"]
        return 0.5 * jnp.sum(misfit**2) + 0.5 * RIDGE * jnp.sum(x**2)

    return jb.WeightedL1Problem(
        smooth, lambda params, data: jnp.zeros_like(data["x"]), weights=weights(kind, size, levels),
        strong_convexity=RIDGE if operator is not None else 1 + RIDGE, smoothness=1.001 + RIDGE,
    )  # fmt: skip


@cache
def oracle(damage: str, kind: str, size: int, levels: int) -> jb.nonsmooth.Oracle:
    def loss(params, x, data):
        """-PSNR, so that every photograph counts alike; W keeps distances."""
        return 10 * jnp.log10(jnp.mean((x - data["x"]) ** 2))

    return jb.nonsmooth.Oracle(problem(damage, kind, size, levels), loss, estimate=False, chunk="auto")


def damaged(images, damage: str, levels: int, seed: int) -> dict[str, jax.Array]:
    """Wavelet coefficients x of the photographs, and what was seen of them (coefficients too, without an operator)."""
    images, how = jnp.asarray(images), DAMAGES[damage]
    size = images.shape[-1]
    operator, transform = how.at(size), wavelet(size, levels)
    noise = how.sigma * np.random.default_rng(seed).standard_normal(images.shape)
    noisy = (images if operator is None else operator(images)) + jnp.asarray(noise, images.dtype)
    # what is lost carries no noise either
    seen = operator(noisy) if damage == "mask" else noisy
    return {"x": transform(images), "y": transform(seen) if operator is None else seen}


def load(args) -> tuple[np.ndarray, np.ndarray]:
    """Photographs to learn from and others to be judged on."""
    size, dtype = args.sizes[0], args.dtype[0]
    if args.images is None:
        names = jb.data.TRAIN_PHOTOGRAPHS[: args.train], jb.data.TEST_PHOTOGRAPHS[: args.test]
        return tuple(jb.data.photographs(size, chosen, dtype=dtype) for chosen in names)
    images = jb.data.image_folder(args.images, limit=args.train + args.test, dtype=dtype).images
    cut = np.stack([jb.data.centre_crop(image, size) for image in images])
    if len(cut) < args.train + args.test:
        raise SystemExit(f"--images: {args.train + args.test} pictures are needed, there are {len(cut)}")
    return cut[: args.train], cut[args.train :]


# ----------------------------------------------------------------------------------------------------------- measuring


class Bench(NamedTuple):
    """One damage at one size, its options, and tolerances."""

    damage: str
    args: Any

    @property
    def tol(self) -> float:
        return DAMAGES[self.damage].tol * self.args.sizes[0] / 128

    def oracle(self, kind: str):
        return oracle(self.damage, kind, self.args.sizes[0], self.args.levels)

    def psnr(self, kind: str, params, batch) -> np.ndarray:
        """PSNR of each photograph; a solve that did not converge ends the program."""
        value = self.oracle(kind).value(params, batch, tol=self.tol)
        jb.check(value.lower)
        return -np.asarray(value.values)

    def grid(self, batch, free: bool):
        """Subband weights that are all equal, but for the low-pass band where it is ``free``: the best of GRID."""
        bands = 3 * self.args.levels + 1
        tried = [jnp.full(bands, np.log(weight), batch["y"].dtype) for weight in GRID]
        tried = [params.at[0].set(FREE) if free else params for params in tried]
        warm, found = None, []
        for params in tried:
            value = self.oracle("subbands").value(params, batch, warm, tol=self.tol)
            jb.check(value.lower)
            warm = value.warm
            found.append(float(value.value))
        return tried[int(np.argmin(found))]

    def learn(self, kind: str, start, batch, steps: int) -> jb.FitResult:
        # the size of an adjoint right-hand side at 26 dB
        slope = 10 / np.log(10) * 2 / (0.05 * self.args.sizes[0])
        method = jb.NBA(self.oracle(kind), tol=self.tol, adjoint_tol=1e-3 * slope)
        result = jb.fit(method, start, batch, steps=steps, progress=False)
        if result.status == jb.FitStatus.FAILED:
            raise SystemExit(f"NBA failed: {result.message}")
        return result


def measure(args, recorder: common.Recorder) -> None:
    training, testing = load(args)
    # as many images as for training, with fresh noise: one program for both
    testing = np.concatenate([testing] * -(-len(training) // len(testing)))[: len(training)]
    for damage in args.damages:
        bench = Bench(damage, args)
        batches = {"train": damaged(training, damage, args.levels, args.seed),
                   "test": damaged(testing, damage, args.levels, args.seed + 1)}  # fmt: skip

        def row(shown, learned_on, params, began, steps=0, bench=bench, batches=batches):
            kind = shown if shown == "coefficients" else "subbands"
            psnr = {name: bench.psnr(kind, params, batch) for name, batch in batches.items()}
            figures = psnr | {"seconds": time.perf_counter() - began, "steps": steps}
            if kind == "subbands":
                figures["weights"] = np.exp(np.asarray(params))
            recorder.add({"damage": bench.damage, "weights": shown, "learned_on": learned_on}, figures)
            recorder.write()
            print(bench.damage, shown, learned_on, {k: round(float(v.mean()), 3) for k, v in psnr.items()},
                  f"{figures['seconds']:.0f} s", flush=True)  # fmt: skip

        for learned_on, batch in (("others", batches["train"]), ("oracle", batches["test"])):
            for shown in ("one", "one of the details"):
                began = time.perf_counter()
                params = bench.grid(batch, free=shown != "one")
                row(shown, learned_on, params, began)
            began = time.perf_counter()
            # the low-pass band hardly needs a penalty
            found = bench.learn("subbands", params.at[0].set(params[1] - 5), batch, args.steps)
            row("subbands", learned_on, found.params, began, found.steps)
            if learned_on == "others" and args.coefficient_steps:
                began = time.perf_counter()
                start = found.params[subbands(args.sizes[0], args.levels)]
                found = bench.learn("coefficients", start, batch, args.coefficient_steps)
                row("coefficients", learned_on, found.params, began, found.steps)


# ---------------------------------------------------------------------------------------------------------------- page


def complete(rows: Sequence[dict]) -> list[str]:
    """The damages whose rows are all there; an interrupted run leaves some out."""
    return [row["case"]["damage"] for row in rows
            if row["case"]["weights"] == "subbands" and row["case"]["learned_on"] == "oracle"]  # fmt: skip


def render(rows: Sequence[dict]) -> str:
    options = rows[0]["settings"]
    parts = [
        f"{options['train']} photographs to learn from, {options['test']} others to be judged on, "
        f"{options['sizes'][0]} x {options['sizes'][0]} pixels, db2 wavelets of {options['levels']} levels, "
        f"alpha = {RIDGE:g}, {options['dtype'][0]}. Mean PSNR; gains are over the one weight of all coefficients "
        "that is best on the test photographs; one weight of the details leaves the low-pass band free. Scalar "
        f"weights are the best of a grid from {GRID[-1]:g} to {GRID[0]:g}; test photographs occur with as many "
        "draws of noise as give the number of training photographs.\n"
    ]
    for damage in complete(rows):
        own = {(r["case"]["weights"], r["case"]["learned_on"]): r["figures"] for r in rows
               if r["case"]["damage"] == damage}  # fmt: skip
        base = np.array(own["one", "oracle"]["test"])
        lines = []
        for (kind, learned_on), figures in own.items():
            gain = np.array(figures["test"]) - base
            lines.append([
                f"{kind}{' (oracle)' if learned_on == 'oracle' else ''}", f"{np.mean(figures['train']):.2f}",
                f"{np.mean(figures['test']):.2f}", f"{gain.mean():+.2f}", f"{gain.min():+.2f}", figures["steps"],
                common.whole(figures["seconds"]),
            ])  # fmt: skip
        header = ["weights", "training PSNR", "test PSNR", "gain", "least image", "steps", "s"]
        parts += [f"### {DAMAGES[damage].shown.capitalize()}\n", common.table(header, lines), _verdict(own)]
    parts.append("![restored photographs](figures/villacis_2025_wavelets.png)\n")
    return "\n".join(parts)


def _verdict(own: dict) -> str:
    mean = {key: np.mean(figures["test"]) for key, figures in own.items()}
    lines = []
    for base, name in (("one", "one weight"), ("one of the details", "one weight of the details")):
        possible = mean["subbands", "oracle"] - mean[base, "oracle"]
        share = (mean["subbands", "others"] - mean[base, "oracle"]) / possible
        met = "met" if share >= TARGET else "NOT met"
        lines.append(f"- over the best {name}: oracle {possible:+.2f} dB, learned {share:.0%} of it; "
                     f"criterion >= {TARGET:.0%}: {met}.\n")  # fmt: skip
    return "".join(lines)


def figures(rows: Sequence[dict], folder: Path) -> None:
    """One test photograph of each damage, restored again with the recorded weights (embedded photographs only)."""
    from matplotlib.figure import Figure

    options = rows[0]["settings"]
    size, levels = options["sizes"][0], options["levels"]
    if options["images"] is not None or size < 64 or not complete(rows):
        return
    damages = complete(rows)
    kinds = {"one": "one weight", "subbands": "subband weights"}
    figure = Figure(figsize=(8.4, 2.4 * len(damages) + 0.2), layout="constrained")
    panels = figure.subplots(len(damages), 4, squeeze=False)
    with common.precision("float32"):
        for line, damage in zip(panels, damages, strict=True):
            clean = jb.data.photographs(size, jb.data.TEST_PHOTOGRAPHS[:1])
            data = jax.tree.map(lambda leaf: leaf[0], damaged(clean, damage, levels, rows[0]["seed"] + 1))
            back = wavelet(size, levels).T
            shown = {"clean": clean[0], DAMAGES[damage].shown: data["y"] if damage != "noise" else back(data["y"])}
            for kind, name in kinds.items():
                found = next(r["figures"]["weights"] for r in rows if r["case"]["weights"] == kind
                             and r["case"]["damage"] == damage and r["case"]["learned_on"] == "others")  # fmt: skip
                params = jnp.log(jnp.asarray(found, jnp.float32))
                lower = problem(damage, "subbands", size, levels)
                x, info = jb.solve(lower, params, data, tol=DAMAGES[damage].tol * size / 128)
                jb.check(info)
                shown[name] = back(x)
            for axes, (name, image) in zip(line, shown.items(), strict=True):
                quality = "" if name == "clean" else f", {float(jb.metrics.psnr(image, clean[0])):.2f} dB"
                axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set_title(name + quality, fontsize=7)
                axes.axis("off")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "villacis_2025_wavelets.png", dpi=90)


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [128], "dtype": ["float32"], "train": 10, "test": 5, "levels": 4, "damages": list(DAMAGES),
            "steps": 40, "coefficient_steps": 20,
        },
        quick={"sizes": [16], "levels": 2, "train": 2, "test": 2, "steps": 2, "coefficient_steps": 2,
               "damages": ["noise", "mask"]},
    )  # fmt: skip
    options.add_argument("--damages", nargs="+", choices=list(DAMAGES), help="which kinds of damage")
    options.add_argument("--train", type=int, help="photographs to learn from")
    options.add_argument("--test", type=int, help="photographs to be judged on")
    options.add_argument("--levels", type=int, help="of the wavelet transform")
    options.add_argument("--steps", type=int, help="outer steps of subband weights")
    options.add_argument("--coefficient-steps", type=int, help="outer steps of weights of all coefficients")
    common.run(f"papers/{NAME}", options, measure, render, figures, argv)


if __name__ == "__main__":
    main()
