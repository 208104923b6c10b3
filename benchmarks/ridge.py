"""Learned regularisers for denoising, trained on crops and judged on whole photographs, against total variation.

Convex and weakly convex ridge regularisers, an input-convex network and fields of experts on random crops (noise
25.5/255): first denoising score matching, which needs no lower-level solve, and the best weight for it; then implicit
differentiation with Adam, the best on validation kept. Total variation gets the weight that is best ON THE TEST IMAGES,
and also the one learned from the training images.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common

NAME = "ridge"
TITLE = "Learned regularisers against total variation"
SIGMA = 25.5 / 255
TOL = 0.1  # of training, absolute 2-norms on one crop: 2e-3 per pixel of 40 x 40
JUDGED = 0.1  # of judging, on one photograph: far below the errors that PSNR shows
AVERAGED = 0.97  # decay of the averages of parameters, per step
WARMUP = 30  # steps in which the rate rises
HELD = 24  # training images that are kept for validation, their centres
WEIGHTS = tuple(1.25**k for k in range(-4, 8))  # factors on what score matching left
TV_WEIGHTS = tuple(0.05 * 1.08**k for k in range(10))
TV = jb.regularizers.SmoothedTV(eps=1e-3)
BASE = "TV, best on the test images"
TARGETS = {"CRR": 0.5, "WCRR": 0.9, "ICNN": 0.4}  # dB over the best total variation


def psnr_loss(params, x, data):
    """-PSNR in decibels, which is what models are judged by: every crop counts alike."""
    return -jb.metrics.psnr(x, data["x"])


LOSSES = {"squared": jb.losses.squared_error(), "psnr": psnr_loss}


class Model(NamedTuple):
    """A regulariser, its start, the learning rates of both stages, and what keeps its parameters feasible."""

    regularizer: Any
    start: Callable
    rate: float
    projection: Callable | None = None
    score_rate: float | None = None  # None: no score matching
    optimizer: Callable = optax.adam  # lamb where the sizes of parameters differ much


def models() -> dict[str, Model]:
    R = jb.regularizers
    crr, wcrr = R.CRR(), R.WCRR()
    icnn, foe = R.ICNN(hidden=64, outputs=2), R.FoE(count=48, size=7)
    return {
        "TV": Model(TV, lambda key: jnp.log(jnp.array([0.05], jnp.float32)), 2e-2),
        "FoE": Model(foe, partial(foe.init, dtype=jnp.float32), 1e-2, foe.project, 1e-2),
        "ICNN": Model(icnn, partial(icnn.init, dtype=jnp.float32), 2e-3, icnn.project, 3e-2, optax.lamb),
        "CRR": Model(crr, partial(crr.init, dtype=jnp.float32), 1e-2, None, 1e-2),
        "WCRR": Model(wcrr, partial(wcrr.init, dtype=jnp.float32), 1e-2, wcrr.project, 1e-2),
    }


# ---------------------------------------------------------------------------------------------------------------- data


class Photographs(NamedTuple):
    train: list
    validation: dict  # a batch
    test: list  # batches of equal shape


def noisy(images, rng) -> dict[str, jax.Array]:
    images = np.asarray(images, np.float32)
    return {"x": jnp.asarray(images), "y": jnp.asarray(jb.data.gaussian(rng, images, SIGMA).astype(np.float32))}


def load(args) -> Photographs:
    if args.data is None:
        train = list(jb.data.photographs(180, jb.data.TRAIN_PHOTOGRAPHS))
        test = list(jb.data.photographs(180, jb.data.TEST_PHOTOGRAPHS))
    else:
        train = list(jb.data.image_folder(args.data).images)
        test = list(jb.data.image_folder(args.test).images)
    rng = np.random.default_rng(1)  # noise of validation and test (its own), whatever the seed of training
    count = min(HELD, max(1, len(train) // 4))
    every = len(train) // count
    held = [jb.data.centre_crop(image, min(64, *image.shape)) for image in train[::every][:count]]
    train = [image for k, image in enumerate(train) if k % every or k // every >= count]
    if args.test_size:
        test = [jb.data.centre_crop(image, min(args.test_size, *image.shape)) for image in test]
    groups: dict[tuple, list] = {}
    for image in test:
        groups.setdefault(image.shape, []).append(image)
    judged = np.random.default_rng(2)
    return Photographs(train, noisy(np.stack(held), rng), [noisy(np.stack(g), judged) for g in groups.values()])


def batches(images: Sequence, crop: int, count: int, seed: int) -> Callable[[int], dict]:
    """step -> crops with fresh noise, mirrored and turned at random; the same for the same step and seed."""

    def batch(step: int) -> dict:
        rng = np.random.default_rng([seed, step])
        chosen = [images[i] for i in rng.integers(len(images), size=count)]
        cut = [np.rot90(jb.data.crops(image, crop, 1, rng)[0], rng.integers(4)) for image in chosen]
        cut = [image[:, ::-1] if rng.integers(2) else image for image in cut]
        return noisy(np.stack(cut), rng)

    return batch


# ----------------------------------------------------------------------------------------------------------- measuring


def reconstruct(problem, params, batch, tol=JUDGED):
    """PSNR of each image; a solve that did not converge ends the program."""
    found = []
    for k in range(batch["y"].shape[0]):
        x, info = jb.solve(problem, params, {"y": batch["y"][k]}, tol=tol)
        jb.check(info)
        found.append(float(jb.metrics.psnr(x, batch["x"][k])))
    return np.array(found)


def judge(problem, params, groups) -> np.ndarray:
    return np.concatenate([reconstruct(problem, params, group) for group in groups])


@jax.jit
def _towards(mean, params):
    return jax.tree.map(lambda m, p: m + (1 - AVERAGED) * (p - m), mean, params)


class Best:
    """Callback of `fit`: keeps the parameters with the best PSNR on validation, and stops when none came for long.

    Judged are moving averages of the parameters, which the noise of small batches moves less (Polyak & Juditsky 1992).
    """

    def __init__(self, problem, batch, every: int, patience: int):
        self.oracle = jb.implicit.Oracle(problem, psnr_loss, estimate=False)
        self.batch, self.every, self.patience = batch, every, patience
        self.value, self.params, self.since, self.curve, self.mean = -np.inf, None, 0, [], None

    def __call__(self, step, state, info) -> bool:
        self.mean = state.params if self.mean is None else _towards(self.mean, state.params)
        if (step + 1) % self.every:
            return False
        value = -float(self.oracle.value(self.mean, self.batch, tol=JUDGED).value)
        print(f"step {step + 1}: {value:.3f} dB on validation", flush=True)
        self.curve.append((step + 1, round(value, 4)))
        if value > self.value:
            self.value, self.params, self.since = value, self.mean, 0
        else:
            self.since += 1
        return self.since >= self.patience


def pretrain(problem, model: Model, photographs: Photographs, args, seed: int):
    """Score matching from the start, then the weight with the best reconstructions of the validation crops."""
    oracle = jb.explicit.Oracle(jb.losses.DenoisingScore(model.regularizer))
    optimizer = model.optimizer(optax.cosine_decay_schedule(model.score_rate, args.score_steps, alpha=0.05), b2=0.99)
    method = jb.FirstOrder(oracle, optimizer, projection=model.projection)
    drawn = batches(photographs.train, args.crop, args.batch[0], 1000 + seed)
    result = jb.fit(method, model.start(jax.random.key(seed)), drawn, steps=args.score_steps)
    if result.status == jb.FitStatus.FAILED:
        raise SystemExit(f"score matching of {type(model.regularizer).__name__} failed: {result.message}")
    keep = model.projection or (lambda params: params)
    found = [keep(result.params | {"log_weight": result.params["log_weight"] + np.log(w)}) for w in WEIGHTS]
    judge = jb.implicit.Oracle(problem, jb.losses.squared_error(), estimate=False)
    values = [float(judge.value(params, photographs.validation, tol=JUDGED).value) for params in found]
    return found[int(np.nanargmin(values))]


def train(model: Model, photographs: Photographs, args, seed: int):
    problem = jb.variational(None, model.regularizer)
    oracle = jb.implicit.Oracle(problem, LOSSES[args.loss], estimate=False)
    # the second moments of Adam need some steps before they are worth anything
    rate = optax.warmup_cosine_decay_schedule(
        0.0, model.rate, min(WARMUP, args.steps // 4), args.steps, 0.05 * model.rate
    )
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), model.optimizer(rate, b2=0.99))
    method = jb.FirstOrder(oracle, optimizer, tol=TOL, adjoint_tol=TOL, projection=model.projection)
    best = Best(problem, photographs.validation, args.every, args.patience)
    began = time.perf_counter()
    if args.score_steps and model.score_rate:
        start = pretrain(problem, model, photographs, args, seed)
    else:
        start = model.start(jax.random.key(seed))
    scored = time.perf_counter() - began
    best(-1, SimpleNamespace(params=start), None)
    result = jb.fit(
        method, start, batches(photographs.train, args.crop, args.batch[0], seed), steps=args.steps, callback=best
    )
    if result.status == jb.FitStatus.FAILED:
        raise SystemExit(f"training of {type(model.regularizer).__name__} failed: {result.message}")
    return problem, best, result, (scored, time.perf_counter() - began)


def measure(args, recorder, photographs: Photographs) -> None:
    problem = jb.variational(None, TV)
    grid = np.stack([judge(problem, jnp.log(jnp.array([w], jnp.float32)), photographs.test) for w in TV_WEIGHTS])
    k = int(np.argmax(grid.mean(1)))
    recorder.add({"model": BASE, "seed": 0}, {"psnr": grid[k], "weight": TV_WEIGHTS[k]})
    print(f"best TV: {grid[k].mean():.3f} dB at weight {TV_WEIGHTS[k]:.4f}", flush=True)
    validated = max(reconstruct(problem, jnp.log(jnp.array([w], jnp.float32)), photographs.validation).mean()
                    for w in TV_WEIGHTS)  # fmt: skip
    print(f"best TV on validation: {validated:.3f} dB", flush=True)
    chosen = models()
    for name in args.models:
        for seed in args.seeds:
            problem, best, result, seconds = train(chosen[name], photographs, args, seed)
            psnr = judge(problem, best.params, photographs.test)
            count = sum(leaf.size for leaf in jax.tree.leaves(best.params))
            figures = {
                "psnr": psnr, "validation": best.value, "curve": best.curve, "steps": result.steps, "parameters": count,
                "seconds": seconds[1], "score_seconds": seconds[0], "work": result.work,
            }  # fmt: skip
            recorder.add({"model": name, "seed": seed}, figures)
            recorder.write()
            print(f"{name}, seed {seed}: {psnr.mean():.3f} dB ({psnr.mean() - grid[k].mean():+.3f}), "
                  f"{result.steps} steps, {seconds[1]:.0f} s", flush=True)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- page


def render(rows: Sequence[dict]) -> str:
    by_model: dict[str, list[dict]] = {}
    gained: dict[str, list[np.ndarray]] = {}
    base = np.zeros(0)
    for row in rows:  # each after the total variation of its run, on the same noise
        name, psnr = row["case"]["model"], np.array(row["figures"]["psnr"])
        base = psnr if name == BASE else base
        by_model.setdefault(name, []).append(row)
        gained.setdefault(name, []).append(psnr - base)
    options = rows[0]["settings"]
    header = ["regulariser", "parameters", "PSNR", "over best TV", "of images", "of seeds", "least image", "steps", "s"]
    lines, verdicts = [], []
    for name, own in by_model.items():
        gains, figures = np.array(gained[name]), own[0]["figures"]
        several = name != BASE and len(own) > 1
        lines.append([
            name, figures.get("parameters", 1), f"{np.mean([row['figures']['psnr'] for row in own]):.3f}",
            f"{gains.mean():+.3f}", f"± {gains.mean(0).std(ddof=1):.2f}",
            f"± {gains.mean(1).std(ddof=1):.3f}" if several else "–", f"{gains.mean(0).min():+.2f}",
            common.whole(np.mean([r["figures"].get("steps", 0) for r in own])),
            common.whole(np.mean([r["figures"].get("seconds", 0) for r in own])),
        ])  # fmt: skip
        if name in TARGETS:
            met = "met" if gains.mean() >= TARGETS[name] else "NOT met"
            verdicts.append(f"- {name}: {gains.mean():+.2f} dB; criterion >= +{TARGETS[name]} dB: {met}.\n")
    intro = (
        f"{base.size} test images, training crops of {options['crop']} pixels, {options['batch'][0]} per step, "
        f"{len(options['seeds'])} seed(s); gains are paired by image.\n"
    )
    return "\n".join([intro, common.table(header, lines), "".join(verdicts)])


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "dtype": ["float32"], "batch": [8], "crop": 40, "steps": 400, "score_steps": 600, "seeds": [0],
            "every": 50, "patience": 12, "loss": "squared", "models": ["TV", "ICNN", "CRR", "WCRR"], "test_size": 0,
        },
        quick={
            "batch": [2], "crop": 20, "steps": 4, "score_steps": 3, "every": 2, "models": ["TV", "CRR"],
            "test_size": 32,
        },
    )  # fmt: skip
    options.add_argument("--data", metavar="DIR", help="folder of training images (default: scikit-image photographs)")
    options.add_argument("--test", metavar="DIR", help="folder of test images; needed with --data")
    options.add_argument("--test-size", type=int, help="centre crops of test images, 0: whole images")
    options.add_argument("--models", nargs="+", choices=list(models()), help="which regularisers")
    options.add_argument("--seeds", nargs="+", type=int, help="of initialisation and crops")
    options.add_argument("--crop", type=int, help="side of training crops in pixels")
    options.add_argument("--steps", type=int, help="Adam steps")
    options.add_argument("--loss", choices=list(LOSSES), help="of training")
    options.add_argument("--score-steps", type=int, help="Adam steps of score matching before that, 0: none")
    options.add_argument("--every", type=int, help="steps between validations")
    options.add_argument("--patience", type=int, help="validations without a better one before stopping")
    args = common.parse(options, argv)
    if (args.data is None) != (args.test is None):
        raise SystemExit("--data and --test go together: images to learn from, and others to be judged on")
    recorder = common.Recorder(NAME, args, script=f"benchmarks/{NAME}.py")
    recorder.options |= {key: Path(getattr(args, key) or "scikit-image").name for key in ("data", "test")}
    with common.precision("float32"):
        measure(args, recorder, load(args))
    recorder.write()
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
