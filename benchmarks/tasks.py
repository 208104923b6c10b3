"""What the benchmarks of task-adapted denoising share: a network on clean images, and a table's rows at a noise level.

Rows: T* on clean images, on noisy ones, behind the total variation with the best PSNR on the training images, behind
total variation learned for the task by HOAG, the same with the last layers of T* learning too, behind ridge filters
learned for the task by MAID, and behind total variation with a weight for each pixel, from a small network that reads
the noisy image and learns for the task by Adam.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jbilevel as jb
from benchmarks import common, networks
from jbilevel.task import Pipeline, reconstruct

sys.path.insert(0, str(common.ROOT / "examples"))
import pictures
import task_adapted_segmentation as task_adapted_segmentation  # its drawn shapes, for kadagala_report_segmentation

TV = jb.regularizers.SmoothedTV(eps=1e-2)
RIDGE = jb.regularizers.CRR(widths=(8,), sizes=(5,))
STEPS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (1, 2), (2, 1))  # which differences the filters start as
WEIGHTS = np.geomspace(0.2, 8, 16)  # of total variation, in units of sigma
LEARNED = ("HOAG, TV", "HOAG, TV and last layers", "MAID, ridge filters", "Adam, TV with a map of weights")


class Task(NamedTuple):
    """T* with its data; ``score(logits, labels)`` names figures of quality."""

    network: Callable
    params: Any
    last: Callable  # which leaves are fine-tuned
    loss: Callable
    score: Callable
    train: dict  # "x" and "labels"
    test: dict


@dataclass(frozen=True)
class MappedTV:
    """1/2 ||x - y||^2 + total variation whose logarithmic weights are a constant and what a network makes of y."""

    network: Callable

    @staticmethod
    def init(weight, seed: int):
        net = jb.nets.ConvNet(1, 1, dims=2, width=8, depth=3, kernel=5, zero_last=True, rngs=nnx.Rngs(seed))
        network, params = jb.nets.from_flax(net)
        return MappedTV(network), {"log_weight": weight, "network": params}

    def _of(self, params, y):
        change = self.network(params["network"], 5 * (y[..., None] - 0.5))[..., 0]
        return jb.regularizers.WeightedTV(grid=y.shape, eps=TV.eps), params["log_weight"] + change

    def energy(self, params, x, data):
        R, weights = self._of(params, data["y"])
        return 0.5 * jnp.sum((x - data["y"]) ** 2) + R(weights, x)

    def smoothness(self, params, data):
        R, weights = self._of(params, data["y"])
        return 1 + R.bounds(weights, data["y"].shape).smoothness

    def problem(self):
        return jb.SmoothProblem(
            self.energy, lambda params, data: data["y"], strong_convexity=1.0, smoothness=self.smoothness
        )  # fmt: skip


def ridge_start(problem, train: dict, sigma: float, seed: int, tol: float):
    """Differences of neighbours with some noise, at the weight with the best PSNR on the training images."""
    params = RIDGE.init(jax.random.key(seed), noise=sigma, dtype=jnp.float32)
    kernels, centre = 0.02 * np.array(params["kernels"][0]), RIDGE.sizes[0] // 2
    for kernel, (i, j) in zip(kernels[:, 0], STEPS, strict=True):
        kernel[centre, centre] -= 1
        kernel[centre + i, centre + j] += 1
    params |= {"kernels": (jnp.asarray(kernels),)}
    oracle = jb.implicit.Oracle(problem, pictures.psnr_loss, estimate=False)
    starts = [params | {"log_weight": jnp.float32(k * math.log(2))} for k in range(-3, 5)]
    values = [float(oracle.value(start, train, tol=max(tol, 1e-2)).value) for start in starts]
    return starts[int(np.argmin(values))]


def trained(args, network, params, loss, batch: Callable, validation: dict, seed: int):
    """T* on clean images: Adam with a cosine over ``batch(rng)`` of augmented images, the best on ``validation``."""
    oracle = jb.explicit.Oracle(lambda p, d: loss(network(p, d["x"]), d["labels"]))
    rate = optax.warmup_cosine_decay_schedule(0.0, args.rate, args.net_steps // 20, args.net_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    best = jb.Validation(oracle, validation, every=max(1, args.net_steps // 10))
    jb.fit(
        jb.FirstOrder(oracle, optimizer), params, lambda step: batch(np.random.default_rng([seed, step])),
        steps=args.net_steps, callback=best,
    )  # fmt: skip
    return best.params


class Lowest:
    """Callback of `fit`: keeps the parameters with the lowest training loss, as some methods may let it rise."""

    def __init__(self, regularizer):
        self.value, self.params, self.before = np.inf, None, regularizer

    def __call__(self, step, state, info) -> None:
        if info.value < self.value:  # at the regulariser before the step; the task moves first, if at all
            self.value, self.params = info.value, {"regularizer": self.before, "task": state.params["task"]}
        self.before = state.params["regularizer"]


def mirrored(images, labels, rng):
    """Half of the images (and of their labels, where these are images too) from right to left."""
    turn = rng.random(len(images)) < 0.5
    turned = lambda v: np.where(turn.reshape(-1, *[1] * (v.ndim - 1)), v[:, :, ::-1], v)  # noqa: E731
    return turned(images), turned(labels) if labels.ndim == images.ndim else labels


def noisy(data: dict, sigma: float, rng) -> dict:
    x = np.asarray(data["x"], np.float32)
    y = jb.data.gaussian(rng, x, sigma).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(y), "labels": jnp.asarray(data["labels"])}


def rows(args, task: Task, sigma: float, tol: float, seed: int):
    """Yields (row, figures)."""
    rng = np.random.default_rng([seed, round(1000 * sigma)])
    train, test = noisy(task.train, sigma, rng), noisy(task.test, sigma, rng)
    denoiser, ridge = jb.variational(None, TV), jb.variational(None, RIDGE)
    outputs = jax.jit(jax.vmap(task.network, (None, 0)))

    def judged(params, seen: Callable) -> dict:
        """``seen``: what T sees of a batch."""
        logits = outputs(params, seen(train)), outputs(params, seen(test))
        losses = [
            float(jnp.mean(jax.vmap(task.loss)(v, d["labels"]))) for v, d in zip(logits, (train, test), strict=True)
        ]
        quality = {} if seen is clean else networks.quality(seen(test), test["x"], 1.0)
        return {"train_loss": losses[0], "test_loss": losses[1]} | task.score(logits[1], test["labels"]) | quality

    def behind(problem, theta):
        return lambda data: reconstruct(Pipeline(problem, task.network, task.loss), theta, data, tol=tol)

    clean = lambda data: data["x"]  # noqa: E731
    yield "T* on clean images", judged(task.params, clean)
    yield "T* on noisy images", judged(task.params, lambda data: data["y"])
    best = pictures.best_tv(denoiser, train, sigma * WEIGHTS, tol=max(tol, 1e-3))
    yield "TV with the best PSNR", {"weight": float(jnp.exp(best[0]))} | judged(task.params, behind(denoiser, best))

    # its own first step, one unit of the logarithm, overshoots from a start this good
    hoag = partial(jb.HOAG, schedule="exponential", tol=tol, adjoint_tol=tol, step_size=0.3)

    def learn(problem, *, regularizer, steps=args.steps, chunk=None, **settings):
        lowest = Lowest(regularizer)
        found = jb.task_adapted(
            problem, task.network, task.loss, regularizer=regularizer, task_params=task.params, batches=train,
            steps=steps, oracle={"estimate": False, "chunk": chunk}, callback=lowest, **settings,
        )  # fmt: skip
        best = jax.tree.map(
            lambda new, old: old if new is None else new, lowest.params["task"], task.params,
            is_leaf=lambda leaf: leaf is None,
        )  # fmt: skip
        return replace(found, regularizer=lowest.params["regularizer"], task=best)

    mapped, start = MappedTV.init(best[0], seed)
    box = partial(_box, low=np.log(0.02 * sigma), high=np.log(20 * sigma))
    runs = {
        LEARNED[0]: partial(learn, denoiser, regularizer=best, method=hoag, projection=box),
        LEARNED[1]: partial(
            learn, denoiser, regularizer=best, method=hoag, projection=box, finetune=task.last,
            alternate=optax.adam(args.tune_rate), task_steps=args.tune_steps,
        ),
        LEARNED[2]: lambda: learn(
            ridge, regularizer=ridge_start(ridge, train, sigma, seed, tol), method=jb.MAID,
            chunk="auto",  # solves with filters suffer more from lockstep than T* does from a loop
        ),
        LEARNED[3]: partial(
            learn, mapped.problem(), regularizer=start, steps=3 * args.steps,
            method=partial(jb.FirstOrder, optimizer=optax.adam(3e-3), tol=tol, adjoint_tol=tol),
        ),
    }  # fmt: skip
    for name, run in ((name, run) for name, run in runs.items() if name in args.rows):
        cpu = time.process_time()
        found = run()
        history = found.fit.history
        cost = {
            "train_cpu_s": time.process_time() - cpu, "train_s": float(history["seconds"].sum()),
            "compile_s": found.fit.compile_seconds, "work": found.fit.work, "steps": found.fit.steps,
            "largest_rise": float(np.max(np.diff(history["value"]), initial=-np.inf)), "status": int(found.fit.status),
        }  # fmt: skip
        problem = found.pipeline.problem
        extra = {"weight": float(jnp.exp(found.regularizer[0]))} if problem is denoiser else {}
        yield name, extra | cost | split(found, train, tol) | judged(found.task, behind(problem, found.regularizer))


def _box(theta, low: float, high: float):
    return jb.prox.box(theta, low, high)


def split(found: jb.TaskAdapted, train: dict, tol: float) -> dict[str, float]:
    """Where the time of one cold hypergradient goes, in seconds: an infinite tolerance asks for nothing."""
    params, frozen = found.pipeline.split(found.regularizer, found.task)
    batch = train | {"frozen": frozen}
    oracle = found.pipeline.oracle(batch, estimate=False)
    warm = oracle.init(params, batch)

    def seconds(tol, adjoint_tol) -> float:
        ask = lambda: jax.block_until_ready(oracle(params, batch, warm, tol=tol, adjoint_tol=adjoint_tol).grad)  # noqa: E731
        ask()
        started = time.perf_counter()
        ask()
        return time.perf_counter() - started

    nothing, lower, both = seconds(jnp.inf, jnp.inf), seconds(tol, jnp.inf), seconds(tol, tol)
    return {"network_s": nothing, "lower_s": max(lower - nothing, 0.0), "adjoint_s": max(both - lower, 0.0)}


# -------------------------------------------------------------------------------------------------------------- report


def render(rows: Sequence[dict], scores: dict[str, str]) -> str:
    """``scores``: figure -> heading."""
    text = "Grey images; mean ± standard deviation over seeds. Tolerances bound ‖x − x̂‖ of every image.\n"
    for data in dict.fromkeys(row["case"]["data"] for row in rows):
        own = [row for row in rows if row["case"]["data"] == data]
        settings = own[0]["settings"]
        text += f"\n**{data}**: {settings['train']} images to learn from, {settings['test']} to judge on\n\n"
        means = networks.gathered(own, ("row", "sigma", "tol"))
        header = ["", "σ", "tolerance", "training loss", "test loss", *scores.values(), "PSNR", "CPU s",
                  "lower / adjoint / network s", "seeds"]  # fmt: skip
        lines = [
            [
                row, f"{sigma:g}", f"{tol:g}", networks.spread(v["train_loss"], 3), networks.spread(v["test_loss"], 3),
                *(networks.spread(v[name], 3) for name in scores), networks.spread(v.get("psnr")),
                networks.spread(v.get("train_cpu_s"), 0), parts_of(v), len(v["train_loss"]),
            ]
            for (row, sigma, tol), v in means.items()
        ]  # fmt: skip
        text += common.table(header, lines) + "\n" + order(means, next(iter(scores)))
    return text


def parts_of(v: dict) -> str:
    names = ("lower_s", "adjoint_s", "network_s")
    return " / ".join(f"{v[name].mean():.2g}" for name in names) if names[0] in v else "–"


def order(means: dict, score: str) -> str:
    """For each noise: is the training loss below that of the best PSNR for every seed, and what does it bring in tests;
    did MAID's loss ever rise; is the result below that on clean images."""
    text = ""
    for sigma, tol in dict.fromkeys(key[1:] for key in means):
        own = {row: v for (row, *at), v in means.items() if tuple(at) == (sigma, tol)}
        base, clean = own["TV with the best PSNR"], own["T* on clean images"]
        for name in (n for n in LEARNED if n in own):
            count = len(own[name][score])  # a row may have fewer seeds, the first ones
            fall, gain = (own[name][k] - base[k][:count] for k in ("train_loss", score))
            below = int(np.sum(fall < 0))
            text += (
                f"- σ = {sigma:g}, tolerance {tol:g}, {name}: training loss {networks.spread(fall, 3)} against the "
                f"best PSNR (below it for {below} of {count} seeds), {score} {networks.spread(gain, 3)}, "
                f"{networks.spread(clean[score][:count] - own[name][score], 3)} under clean images"
            )
            rise = own[name]["largest_rise"].max()
            text += f"; largest rise of the loss in a step {rise:.1e}.\n" if "MAID" in name else ".\n"
    return text


def main(name: str, description: str, make: Callable, scores: dict[str, str], *, defaults: dict, quick: dict, options,
         argv=None) -> None:  # fmt: skip
    """``make(args, seed) -> (name of the data, Task)``; ``options(parser)`` adds those of the data."""
    settings = {
        "dtype": ["float32"], "batch": [8], "train": 100, "test": 500, "sigmas": [0.1, 0.4, 0.8], "tols": [1e-5, 1e-3],
        "seeds": [0, 1, 2], "steps": 20, "rows": LEARNED, "tune_rate": 1e-3, "tune_steps": 3,
    }  # fmt: skip
    small = {"train": 3, "test": 4, "sigmas": [0.4], "tols": [1e-3], "seeds": [0], "steps": 2, "net_steps": 4}
    parser = common.parser(description, defaults=settings | defaults, quick=small | quick)
    parser.add_argument("--sigmas", type=float, nargs="+", help="noise levels for images in [0, 1]")
    parser.add_argument("--tols", type=float, nargs="+", help="of the lower level and of the adjoint")
    parser.add_argument("--seeds", type=int, nargs="+", help="of data, noise, network and order")
    parser.add_argument("--rows", nargs="+", choices=LEARNED, help="of what is learned for the task")
    for option, what in {
        "train": "images to learn from", "test": "images to judge on", "steps": "bilevel steps",
        "net-steps": "of T* on clean images", "tune-steps": "of the last layers at each bilevel step",
    }.items():  # fmt: skip
        parser.add_argument(f"--{option}", type=int, help=what)
    parser.add_argument("--rate", type=float, help="greatest learning rate of T*")
    parser.add_argument("--tune-rate", type=float, help="learning rate of the last layers")
    options(parser)
    args = common.parse(parser, argv)
    recorder = common.Recorder(name, args, f"benchmarks/papers/{name}.py")
    for seed in args.seeds:
        data, task = make(args, seed)
        for sigma in args.sigmas:
            for tol in args.tols:
                for row, figures in rows(args, task, sigma, tol, seed):
                    case = {"data": data, "row": row, "sigma": sigma, "tol": tol, "seed": seed}
                    measured = recorder.add(case, figures)["figures"]
                    print(seed, sigma, tol, row, {k: measured.get(k) for k in ("train_loss", *scores)}, flush=True)
                    recorder.write()
    print(render(recorder.rows, scores))
