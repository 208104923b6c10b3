"""Learned convex regularisers for sparse-view computed tomography (Bogensperger et al. 2024, Table 1 and Figure 4).

Slices in [0, 1] on a square of 256 mm, parallel beam, noise of standard deviation 2 on the line integrals as in the
paper, and as many views per pixel across as its 200 at 512 x 512. Fields of experts and an input-convex network learn
by Adam on hypergradients of their smooth energies, which piggyback gives too but takes longer for on a CPU; the experts
also by MAID on piggyback, the network also as an adversarial regulariser. Learned primal-dual networks, which minimise
no energy, are the paper's and one of six layers that starts as filtered backprojection. Weights of grids, the window of
filtered backprojection, scales at the start and the best parameters of each run are chosen on training and validation
slices; every learned energy is minimised to the same accuracy on the test slices. Full size, on a GPU: --device gpu
--data FILE --sizes 256 --views 200 --seconds 3600.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common, networks
from benchmarks.papers import bogensperger_2024_ct_page as page
from jbilevel import image_of
from jbilevel.operators.fbp import WINDOWS

NAME = "bogensperger_2024_ct"
TITLE = "Bogensperger et al. 2024: computed tomography with learned convex regularisers"
PARTS = ("classical", "maid", "experts", "network", "adversarial", "primal-dual", "compared")
WIDTH = 256.0  # of a slice, so that line integrals are those of the paper
TV = jb.regularizers.TV()
# responses of 0 beyond the border, which is air; psi_w with the paper's w
WIDTH_PSI = 0.01


@dataclass(frozen=True)
class Centred(jb.Regularizer):
    """A regulariser that reads its filters without their means, and without learning the widths of its potentials.

    As a projection after each step, the same would leave in the hypergradient the derivative in the means, which is
    far larger than all others and drowns them in the second moments of Adam.
    """

    inner: Any

    def centred(self, params):
        params = {key: v - jnp.mean(v, (1, 2), keepdims=True) if key in ("filters", "first") else v
                  for key, v in params.items()}  # fmt: skip
        if "log_smoothing" in params:
            params["log_smoothing"] = jnp.full_like(params["log_smoothing"], math.log(WIDTH_PSI))
        return params

    def init(self, key=None):
        return self.inner.init(key)

    def check(self, params):
        self.inner.check(params)

    def __call__(self, params, x):
        return self.inner(self.centred(params), x)

    def saddle(self, params):
        return self.inner.saddle(self.centred(params))


FOE = Centred(jb.regularizers.FoE(count=16, size=5, potential="psi", boundary="zero"))
ICNN = Centred(jb.regularizers.ICNN(width=WIDTH_PSI, boundary="zero"))
SOLVER = jb.solvers.PDHG(ratio=10.0)  # x moves by its size, the dual by that of the noise: see the scan in the rows
LOOSE = 2e-2  # of solves while learning, gradient and adjoint residual per slice
TIGHT = 1e-4  # of what is judged: residual of TV's saddle point, gradient norm of smooth energies
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (1, 2), (2, 1))
GRID = tuple(1.3**k for k in range(-3, 4))
TV_WEIGHT, FOE_WEIGHT = 1e-3, 3e-3  # middles of the grids


# ---------------------------------------------------------------------------------------------------------------- data


class Scans(NamedTuple):
    operator: Any  # of norm 1
    norm: float
    train: dict
    validation: dict
    test: dict
    shown: dict  # one drawn slice, for the figure


def phantoms(count: int, size: int, rng) -> np.ndarray:
    pixel = 360.0 / size
    drawn = [jb.data.abdomen(rng) for _ in range(count)]
    return np.stack([jb.data.raster(p.ellipses, (size, size), pixel_size=pixel) for p in drawn])


def slices(args, rng) -> tuple[list[np.ndarray], np.ndarray]:
    """Training, validation and test slices, no patient in two of them, and a drawn slice; each scaled to [0, 1]."""
    size, counts = args.sizes[0], (args.batch[0], args.validation, args.test)
    scaled = lambda x: (x / x.max((1, 2), keepdims=True)).astype(np.float32)  # noqa: E731
    if args.data is None:
        parts = np.split(phantoms(sum(counts), size, rng), np.cumsum(counts)[:-1])
    else:
        stored = np.load(args.data, allow_pickle=False)
        densities = jb.data.hu_to_density(stored["hu"].astype(np.float32))
        factor = densities.shape[1] // size
        densities = densities.reshape(len(densities), size, factor, size, factor).mean((2, 4))
        shares = np.array(counts) / sum(counts)
        found = jb.data.split_by_patient(stored["patient"].tolist(), shares, args.seed)
        parts = [densities[part[:count]] for part, count in zip(found, counts, strict=True)]
        if any(len(part) < count for part, count in zip(parts, counts, strict=True)):
            raise SystemExit(f"--data: {[len(p) for p in parts]} slices where {counts} are asked for: ask for fewer.")
    return [scaled(part) for part in parts], scaled(phantoms(1, size, np.random.default_rng(100)))


def load(args) -> Scans:
    size, rng = args.sizes[0], np.random.default_rng(args.seed)
    pixel, bins = WIDTH / size, math.ceil(math.sqrt(2) * size) + 1
    angles = np.pi * np.arange(args.views) / args.views
    A = jb.operators.ParallelBeam((size, size), angles, bins, pixel_size=pixel, detector_size=pixel)
    norm = A.norm()

    def scan(images):
        noisy = jb.data.gaussian(rng, np.asarray(A(jnp.asarray(images))), args.noise)
        return {"x": jnp.asarray(images), "y": jnp.asarray(noisy / norm, jnp.float32)}

    parts, shown = slices(args, rng)
    return Scans((1 / norm) * A, norm, *(scan(part) for part in parts), scan(shown))


# ----------------------------------------------------------------------------------------------------------- measuring


class Judge:
    """Reconstructions by one problem, with everything compiled once per number of slices."""

    def __init__(self, problem, solver=None, max_steps: int = 10000):
        solve = partial(jb.solve, problem, solver=solver, max_steps=max_steps)
        self._solve = jax.jit(lambda params, y: jax.vmap(lambda y: solve(params, {"y": y}, tol=TIGHT))(y))

    def __call__(self, params, scan) -> np.ndarray:
        x, info = self._solve(params, scan["y"])
        jb.check(info)
        return np.asarray(image_of(x) if isinstance(x, tuple) else x)


def quality(images, scan) -> dict[str, np.ndarray]:
    images = jnp.asarray(images)
    return {name: np.asarray(jax.vmap(measure)(images, scan["x"]), float)
            for name, measure in (("psnr", jb.metrics.psnr), ("ssim", jb.metrics.ssim))}  # fmt: skip


def score(judge: Judge, params, scan) -> float:
    return float(quality(judge(params, scan), scan)["psnr"].mean())


def best_weight(judge: Judge, params_of: Callable, weights: Sequence[float], scan) -> tuple[float, list[float]]:
    found = [score(judge, params_of(w), scan) for w in weights]
    return float(weights[int(np.argmax(found))]), found


class Best:
    """Callback of `fit`: keeps the parameters that are best on the validation slices, and stops the clock."""

    def __init__(self, judge: Judge, scan, seconds: float, every: int, patience: int, scaled: Callable | None = None):
        self.judge, self.scan, self.until, self.every, self.patience = judge, scan, seconds, every, patience
        self.scaled = scaled or (lambda params: params)
        self.value, self.params, self.since, self.curve, self.spent = -np.inf, None, 0, [], 0.0
        self.resumed = time.perf_counter()

    def look(self, step: int, params) -> None:
        self.spent += time.perf_counter() - self.resumed
        params = self.scaled(params)
        value = score(self.judge, params, self.scan)
        self.curve.append((step, round(self.spent, 1), round(value, 3)))
        print(f"  step {step}, {self.spent:.0f} s: {value:.3f} dB on validation", flush=True)
        self.since += 1
        if value > self.value:
            self.value, self.params, self.since = value, params, 0
        self.resumed = time.perf_counter()  # validation is not training

    def __call__(self, step, state, info) -> bool:
        if step == 0:
            self.resumed = time.perf_counter()  # nor are compilation and the first step
        late = self.spent + time.perf_counter() - self.resumed > self.until
        if late or bool(info.done) or (step + 1) % self.every == 0:
            self.look(step + 1, state.params)
        return late or self.since >= self.patience


def nonnegative(params):
    """The weights that convexity asks for."""
    return params | {"second": jnp.maximum(params["second"], 0.0)}


def foe_start(key, weight: float):
    """Differences of the centre and a neighbour, near a total variation, and noise, which lets their gradients differ.

    In pairs of opposite filters, as psi is one-sided. Random filters start 1 dB lower and take minutes to come back.
    """
    params = FOE.inner.init(key, weight=weight, smoothing=WIDTH_PSI, dtype=jnp.float32)
    centre, steps = FOE.inner.size // 2, np.array(NEIGHBOURS)
    half = 0.02 * params["filters"][: len(steps)]
    half = half.at[:, centre, centre].add(-1 / math.sqrt(2))
    half = half.at[np.arange(len(steps)), centre + steps[:, 0], centre + steps[:, 1]].add(1 / math.sqrt(2))
    return params | {"filters": jnp.concatenate([half, -half])}


def icnn_from(foe):
    """The network that reads each feature of these experts at its own pixel: a sum of nearly the same energies."""
    weights = jnp.exp(foe["log_weights"] - jnp.mean(foe["log_weights"]))
    outputs, hidden, size = ICNN.inner.outputs, ICNN.inner.hidden, ICNN.inner.size
    each, centre = jnp.arange(hidden), size // 2
    second = jnp.full((outputs, hidden, size, size), 1e-3, jnp.float32)
    second = second.at[each % outputs, each, centre, centre].set(weights)
    return {
        "log_weight": foe["log_weight"] + jnp.mean(foe["log_weights"]), "first": foe["filters"], "second": second,
    }  # fmt: skip


class Experiment:
    """Rows of the table, each with reconstructions of the test slices and of the drawn one."""

    def __init__(self, args, recorder, scans: Scans):
        self.args, self.recorder, self.scans = args, recorder, scans
        self.smooth = {R: jb.variational(scans.operator, R, form="smooth") for R in (FOE, ICNN)}
        self.saddle = {R: jb.variational(scans.operator, R, form="saddle") for R in (TV, FOE, ICNN)}
        self.judges = {R: Judge(problem) for R, problem in self.smooth.items()}
        self.judges[TV] = Judge(self.saddle[TV], SOLVER)

    def row(self, name: str, reconstruct: Callable, figures: dict) -> None:
        found = quality(reconstruct(self.scans.test), self.scans.test)
        picture = page.encoded(reconstruct(self.scans.shown)[0])
        self.recorder.add({"method": name}, found | figures | {"picture": picture})
        self.recorder.write()
        print(f"{name}: {found['psnr'].mean():.3f} dB, {found['ssim'].mean():.3f}", flush=True)

    def classical(self) -> None:
        scans, A = self.scans, self.scans.operator.operator
        backprojected = lambda window: lambda scan: np.asarray(A.fbp(scans.norm * scan["y"], window))  # noqa: E731
        self.row("FBP, ram-lak", backprojected("ram-lak"), {})
        train = {w: quality(backprojected(w)(scans.train), scans.train)["psnr"].mean() for w in WINDOWS}
        best = max(train, key=train.get)
        self.row("FBP, best window", backprojected(best), {"window": best})
        theta = lambda w: jnp.log(jnp.array([w], jnp.float32))  # noqa: E731
        weight, curve = best_weight(self.judges[TV], theta, TV_WEIGHT * np.array(GRID), scans.train)
        self.row("TV", partial(self.judges[TV], theta(weight)), {"parameters": 1, "weight": weight, "grid": curve})

    def scaled(self, R, params_of: Callable, middle: float):
        """The start whose weight suits the training slices."""
        weight, curve = best_weight(self.judges[R], params_of, middle * np.array(GRID), self.scans.train)
        return params_of(weight), {"start": weight, "grid": curve}

    def adam(self, R, rate: float, projection=None):
        oracle = jb.implicit.Oracle(self.smooth[R], jb.losses.squared_error(), estimate=False)
        return jb.FirstOrder(oracle, optax.adam(rate), tol=LOOSE, adjoint_tol=LOOSE, projection=projection)

    def maid(self, R):
        return jb.MAID(jb.piggyback.Oracle(self.saddle[R], jb.losses.squared_error(part=0), solver=SOLVER))

    def learned(self, name: str, R, start, method, seconds: float, *, chosen: dict):
        best = Best(self.judges[R], self.scans.validation, seconds, self.args.every, self.args.patience)
        print(name, flush=True)
        best.look(0, start)
        result = jb.fit(method, start, self.scans.train, steps=10**6, callback=best)
        if result.status == jb.FitStatus.FAILED:
            raise SystemExit(f"{name} failed: {result.message}")
        figures = chosen | {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(start)), "steps": result.steps,
            "seconds": best.spent, "work": result.work / len(self.scans.train["x"]), "validation": best.value,
            "curve": best.curve, "losses": result.history["value"], "message": result.message,
            "params": common.as_lists(best.params),
        }  # fmt: skip
        self.row(name, partial(self.judges[R], best.params), figures)

    def adversarial(self) -> None:
        """Adam on `jb.losses.Adversarial` to the plateau of the validation slices, each time at its best weight."""
        scans, args, A = self.scans, self.args, self.scans.operator.operator
        naive = np.asarray(A.fbp(scans.norm * scans.train["y"]))
        clean, count = np.asarray(scans.train["x"]), min(8, args.batch[0])

        def batch(step: int) -> dict:
            rng = np.random.default_rng([args.seed, step])
            chosen, mix = rng.choice(len(clean), count, replace=False), rng.random(count).astype(np.float32)
            return {"x": jnp.asarray(clean[chosen]), "naive": jnp.asarray(naive[chosen]), "mix": jnp.asarray(mix)}

        def weighted(params):
            params_of = lambda w: params | {"log_weight": params["log_weight"] + math.log(w)}  # noqa: E731
            judge, train = self.judges[ICNN], {k: v[:2] for k, v in scans.train.items()}
            coarse, _ = best_weight(judge, params_of, 4.0 ** np.arange(-5, 2), train)
            return params_of(best_weight(judge, params_of, coarse * 4.0 ** np.array([-0.5, -0.25, 0, 0.25, 0.5]),
                                         scans.train)[0])  # fmt: skip

        start = ICNN.inner.init(jax.random.key(args.seed), weight=0.1, dtype=jnp.float32)
        oracle = jb.explicit.Oracle(jb.losses.Adversarial(ICNN))
        method = jb.FirstOrder(oracle, optax.adam(args.network_rate), projection=nonnegative)
        best = Best(self.judges[ICNN], scans.validation, args.seconds, args.adversarial // 10, 4, weighted)
        print("ICNN, adversarial", flush=True)
        best.look(0, start)
        result = jb.fit(method, start, batch, steps=args.adversarial, callback=best)
        if result.status == jb.FitStatus.FAILED:
            raise SystemExit(f"adversarial training failed: {result.message}")
        figures = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(start)), "steps": result.steps,
            "seconds": best.spent, "validation": best.value, "curve": best.curve, "message": result.message,
            "losses": result.history["value"],
        }  # fmt: skip
        self.row("ICNN, adversarial", partial(self.judges[ICNN], best.params), figures)

    def primal_dual(self, name: str, net) -> None:
        """Adam on the squared error, the average of the iterates that is best on the validation slices."""
        f, start = jb.nets.from_flax(net)
        reconstruct = lambda params, y: f(params, self.scans.norm * y)  # noqa: E731
        params, figures = networks.trained(
            self.args, lambda params, data: networks.LOSS(None, reconstruct(params, data["y"]), data), start,
            self.scans, self.args.seed, min(4, self.args.batch[0]), steps=self.args.lpd_steps, rate=self.args.lpd_rate,
        )  # fmt: skip
        figures |= {"steps": self.args.lpd_steps, "seconds": figures["train_s"]}
        run = jax.jit(jax.vmap(partial(reconstruct, params)))
        self.row(name, lambda scan: np.asarray(run(scan["y"])), figures)

    def solvers(self, R, params) -> None:
        """Iterations of the saddle form for each balance of the steps, and the smooth form on the same slices."""
        scan = {k: v[:2] for k, v in self.scans.train.items()}
        exact = self.judges[R](params, scan)
        options = {"tol": 1e-3, "max_steps": self.args.limit}
        for ratio in self.args.ratios:
            one = partial(jb.solve, self.saddle[R], params, **options, solver=jb.solvers.PDHG(ratio=ratio))
            solve = jax.jit(jax.vmap(one))
            jax.block_until_ready(solve({"y": scan["y"]}))
            began = time.perf_counter()
            pair, info = jax.block_until_ready(solve({"y": scan["y"]}))
            seconds = time.perf_counter() - began
            distance = np.linalg.norm(np.asarray(image_of(pair)) - exact, axis=(1, 2)).max()
            steps = int(info.steps.max())
            self.recorder.add(
                {"solver": type(getattr(R, "inner", R)).__name__, "ratio": ratio},
                {"steps": steps, "converged": bool(jnp.all(info.status == 0)), "distance": distance,
                 "ms": 1e3 * seconds / (steps * len(scan["y"]))},
            )  # fmt: skip
        self.recorder.write()

    def hypergradients(self, params) -> None:
        """Piggyback against implicit differentiation at the start, both at tight tolerances, and their time."""
        scan = {k: v[:2] for k, v in self.scans.train.items()}
        squared = jb.losses.squared_error
        oracles = {
            "piggyback": jb.piggyback.Oracle(self.saddle[FOE], squared(part=0), solver=SOLVER, estimate=False,
                                             max_steps=20000, max_adjoint_steps=20000),
            "implicit": jb.implicit.Oracle(self.smooth[FOE], squared(), estimate=False),
        }  # fmt: skip
        found, seconds = {}, {}
        for name, oracle in oracles.items():
            call = jax.jit(lambda params, oracle=oracle: oracle(params, scan, tol=1e-5, adjoint_tol=1e-5))
            jax.block_until_ready(call(params))
            began = time.perf_counter()
            found[name] = jax.block_until_ready(call(params))
            seconds[name] = time.perf_counter() - began
        a, b = (ravel_pytree(found[name].grad)[0] for name in oracles)
        figures = {f"seconds_{name}": value for name, value in seconds.items()}
        figures |= {f"status_{name}": int(found[name].status) for name in oracles}
        figures |= {"difference": float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))}
        self.recorder.add({"hypergradient": "FoE"}, figures)
        self.recorder.write()


def learned_experts(recorder):
    """Params of the row that this run or, with ``--keep``, an earlier one wrote."""
    rows = common.read_rows(recorder.path) if recorder.path.exists() else []
    for row in rows:
        if row["case"].get("method") == "FoE" and "params" in row["figures"]:
            return common.as_arrays(row["figures"]["params"])
    raise SystemExit("--parts network starts from the experts: add the part experts, or --keep to the run after one")


def measure(args, recorder) -> None:
    recorder.options["data"] = args.data and Path(args.data).stem
    scans = load(args)
    experiment = Experiment(args, recorder, scans)
    parts, share = set(args.parts), args.seconds / 2
    if "classical" in parts:
        recorder.add({"picture": "ground truth"}, {"picture": page.encoded(scans.shown["x"][0])})
        experiment.classical()
    if parts & {"maid", "experts", "compared"}:
        first, chosen = experiment.scaled(FOE, partial(foe_start, jax.random.key(args.seed)), FOE_WEIGHT)
    if "maid" in parts:
        experiment.learned("FoE, MAID on piggyback", FOE, first, experiment.maid(FOE), share / 2, chosen=chosen)
    if "experts" in parts:
        experiment.learned("FoE", FOE, first, experiment.adam(FOE, args.rate), share, chosen=chosen)
    if parts & {"network", "compared"}:
        near = icnn_from(learned_experts(recorder))
        scale = lambda w: near | {"log_weight": near["log_weight"] + math.log(w)}  # noqa: E731
        start, start_chosen = experiment.scaled(ICNN, scale, 1.0)
    if "network" in parts:
        method = experiment.adam(ICNN, args.network_rate, nonnegative)
        experiment.learned("ICNN, bilevel", ICNN, start, method, args.seconds, chosen=start_chosen)
    if "adversarial" in parts:
        experiment.adversarial()
    if "primal-dual" in parts:
        A, rngs = scans.operator.operator, nnx.Rngs(args.seed)
        experiment.primal_dual("LPD, 2 layers", jb.nets.LPD.named("pdnet", operator=A, rngs=rngs))
        deeper = jb.nets.LPD(A, rngs=rngs, layers=6, filter="hann", **networks.SMALL)
        experiment.primal_dual("LPD, 6 layers", deeper)
    if "compared" in parts:
        experiment.hypergradients(first)
        experiment.solvers(FOE, first)
        experiment.solvers(ICNN, start)


render, figures = page.render, page.figures


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "dtype": ["float32"], "sizes": [64], "batch": [16], "validation": 8, "test": 16, "views": 25, "noise": 2.0,
            "seconds": 300.0, "every": 10, "patience": 12, "adversarial": 1000, "rate": 1e-2, "network_rate": 1e-3,
            "lpd_steps": 1000, "lpd_rate": 2e-3, "limit": 1000, "ratios": (1.0, 3.0, 10.0, 30.0), "parts": PARTS,
        },
        quick={
            "sizes": [16], "batch": [2], "validation": 1, "test": 2, "views": 10, "seconds": 0.1, "every": 1,
            "adversarial": 10, "lpd_steps": 2, "limit": 20, "ratios": (10.0,),
        },
    )  # fmt: skip
    options.add_argument("--data", metavar="FILE", help="npz of `hu` (n, 256, 256) and `patient` (default: phantoms)")
    options.add_argument("--validation", type=int, help="slices to stop by")
    options.add_argument("--test", type=int, help="slices to judge on")
    options.add_argument("--views", type=int, help="angles in half a turn")
    options.add_argument("--noise", type=float, help="standard deviation on the line integrals")
    options.add_argument("--seconds", type=float, help="of learning, for the bilevel network; half for the others")
    options.add_argument("--every", type=int, help="steps between validations")
    options.add_argument("--patience", type=int, help="validations without a better one before stopping")
    options.add_argument("--adversarial", type=int, help="Adam steps of the adversarial network at most")
    options.add_argument("--rate", type=float, help="of Adam for the experts")
    options.add_argument("--network-rate", type=float, help="of Adam for the two networks")
    options.add_argument("--lpd-steps", type=int, help="Adam steps of the learned primal-dual networks")
    options.add_argument("--lpd-rate", type=float, help="greatest rate of Adam for them")
    options.add_argument("--parts", nargs="+", choices=PARTS, help="rows to measure; with --keep beside earlier ones")
    options.add_argument("--limit", type=int, help="of iterations in the scan of steps")
    options.add_argument("--ratios", nargs="+", type=float, help="of steps in that scan")
    common.run(f"papers/{NAME}", options, measure, render, figures, argv)


if __name__ == "__main__":
    main()
