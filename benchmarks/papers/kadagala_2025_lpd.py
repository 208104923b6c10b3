"""Learned primal-dual reconstruction of low-dose, few-view scans, its stochastic and sketched forms; and of digits.

Every network starts as the best filtered backprojection and trains by the same steps of Adam; what is judged is the
average of the iterates that is best on validation data. Drawn abdomens have closed-form line integrals; real slices
(--data) are measured on the finer grid that they have and split by patient. Digits (--digits) are measured without
noise by the operator that reconstructs them, as in the thesis, and scikit-learn's, enlarged, stand in for MNIST.
Volumes (--rows volumes) are seen by a cone beam, and filtered backprojection is that of Feldkamp, Davis and Kress.
PSNR and SSIM take the range 2 for densities relative to water and 1 for digits; "CPU" counts the time of all
cores, that of training with compilation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common, networks

NAME = "kadagala_2025_lpd"
TITLE = "Kadagala 2025: learned primal-dual reconstruction, LSPD and sketched LSPD"
TV = jb.regularizers.SmoothedTV(eps=0.003)
TV_WEIGHTS = tuple(1e-3 * 2.0**k for k in range(-2, 3))
CASE = ("data", "size", "views", "photons")
VOLUMES = "volumes of a cone beam"
VOLUME = {"memory": (2, 2), "width": 8}  # a network for volumes
GAIN, LOSS_OF_SUBSETS = 3.0, 0.5  # dB: LPD over the best filter, LSPD under LPD


def family(args) -> dict[str, dict]:
    """The settings in which the networks differ; two thirds of the sketched one's layers see the coarse grid."""
    K, m = args.layers, args.subsets
    coarse = 2 * K // 3
    return {
        "LPD": {},
        f"LSPD, m = {m}": {"subsets": m},
        f"sketched LSPD, m = {m}": {"subsets": m, "sketch": [2] * coarse + [1] * (K - coarse), "sketched": "residual"},
    }


def compared(args, recorder, data: networks.Scans, case: dict, models: dict, *, batch, tv=False, data_range) -> None:
    """Rows for filters, total variation and networks on one data set."""
    A, test = data.operator, data.test
    window = networks.scans.best_filter(A, data.validation)
    seed, calls, cost = case["seed"], {}, {}

    def add(name, f, params, figures):
        run = jax.jit(f)
        calls[name] = lambda: run(params, test["y"][0])
        found = jnp.stack([run(params, y) for y in test["y"]])
        cost[name] = figures | networks.quality(found, test["x"], data_range)

    for name in dict.fromkeys(("ram-lak", window)):
        add(f"FBP, {name}", lambda params, y, name=name: A.fbp(y, name), None, {"best": name == window})
    if tv:
        add("TV, best weight", *total_variation(args, data))
    for name, settings in models.items():
        settings = networks.SMALL | {"layers": args.layers, "filter": window} | settings
        net = jb.nets.LPD(A, rngs=nnx.Rngs(seed), **settings)
        f, params = jb.nets.from_flax(net)
        loss = lambda params, data, f=f: networks.LOSS(None, f(params, data["y"]), data)  # noqa: E731
        params, figures = networks.trained(args, loss, params, data, seed, batch)
        add(name, f, params, figures)
        print(name, {k: round(v, 3) for k, v in cost[name].items()}, flush=True)
    times = networks.inference(calls, args.repeats)
    for name, figures in cost.items():
        recorder.add(case | {"method": name}, figures | times[name])
    recorder.write()


def total_variation(args, data: networks.Scans):
    """(f, parameters, figures) of smoothed TV with the weight that is best on two training slices."""
    norm = data.operator.norm()
    problem = jb.variational((1 / norm) * data.operator, TV)
    few = {"x": data.train["x"][:2], "y": data.train["y"][:2] / norm}
    oracle = jb.implicit.Oracle(problem, networks.LOSS)
    values = [float(oracle.value(_log(w), few, tol=0.1).value) for w in TV_WEIGHTS]
    weight = TV_WEIGHTS[int(np.nanargmin(values))]

    def reconstruct(theta, y):
        return jb.solve(problem, theta, {"y": y / norm}, tol=0.1)[0]

    return reconstruct, _log(weight), {"weight": weight, "parameters": 1}


def _log(weight: float):
    return jnp.log(jnp.array([weight], jnp.float32))


def digits(args, rng) -> networks.Scans:
    count = args.train_digits + args.validation + args.test_digits
    images = _digits(args.digits, count)
    images = images[rng.permutation(len(images))[:count]]
    if len(images) < count:
        raise SystemExit(f"--digits: {len(images)} images, {count} are needed for training, validation and test.")
    A = networks.scans.geometry(images.shape[1:], 24, 1.0)
    parts = np.split(np.arange(count), np.cumsum([args.train_digits, args.validation]))
    return networks.parted(A, images, A(jnp.asarray(images)), parts)


def _digits(path, count: int) -> np.ndarray:
    """Images (n, 28, 28) in [0, 1]: a folder of idx files, an .npz with bytes under "x", or scikit-learn's."""
    if path is None:
        small = common.peer("sklearn.datasets").load_digits().images.astype(np.float32) / 16
        return np.asarray(jax.image.resize(jnp.asarray(small), (len(small), 28, 28), "linear"))
    if Path(path).is_dir():
        return jb.data.mnist(path, limit=count).images
    return np.load(path, allow_pickle=False)["x"].astype(np.float32) / 255


def render(rows: Sequence[dict]) -> str:
    text = "PSNR and SSIM as mean ± standard deviation where there are several seeds.\n"
    means = networks.gathered(rows, (*CASE, "method"))
    for case in dict.fromkeys(key[:-1] for key in means):
        own = {key[-1]: v for key, v in means.items() if key[:-1] == case}
        data, size, views, photons = case
        settings = next(r["settings"] for r in rows if all(r["case"][k] == v for k, v in zip(CASE, case, strict=True)))
        dose = "no noise" if photons is None else f"{photons:g} photons per ray"
        side = f"{size}³" if data == VOLUMES else f"{size}²"
        batch = settings["digits_batch"] if photons is None else settings["batch"][0]  # digits have no noise
        text += (
            f"\n**{data}, {side}, {views} views, {dose}**: {settings['layers']} layers, {settings['steps']} steps of "
            f"{batch} images\n\n"
        )
        lines = [
            [
                name, networks.spread(v["psnr"]), networks.spread(v["psnr_of_mean_mse"]), networks.spread(v["ssim"], 3),
                common.whole(v["parameters"][0]) if "parameters" in v else "–", common.rounded(v["ms"].mean()),
                common.rounded(v["cpu_ms"].mean()), networks.spread(v.get("train_s"), 0),
                networks.spread(v.get("train_cpu_s"), 0),
            ]
            for name, v in own.items()
        ]  # fmt: skip
        header = ["", "PSNR", "of mean MSE", "SSIM", "parameters", "ms per image", "CPU ms", "training s", "CPU s"]
        text += common.table(header, lines) + criteria(own)
    return text


def criteria(own: dict) -> str:
    """Where the aims are met: per seed, so that differences do not see what the seeds share."""
    if "LPD" not in own:
        return ""
    best = np.max([v["psnr"] for name, v in own.items() if name.startswith("FBP")], axis=0)
    lspd, sketched = (next((k for k in own if k.startswith(start)), None) for start in ("LSPD", "sketched"))
    gain = own["LPD"]["psnr"] - best
    text = f"\n- LPD over the best filter: {networks.spread(gain)} dB; aim {GAIN:g}: {_met(gain.mean() >= GAIN)}.\n"
    if lspd:
        lost = own["LPD"]["psnr"] - own[lspd]["psnr"]
        text += f"- LSPD under LPD: {networks.spread(lost)} dB; aim at most {LOSS_OF_SUBSETS:g}: "
        text += f"{_met(lost.mean() <= LOSS_OF_SUBSETS)}.\n"
    if sketched:
        lost = own["LPD"]["psnr"] - own[sketched]["psnr"]
        faster, learnt = (own["LPD"][k].mean() / own[sketched][k].mean() for k in ("cpu_ms", "train_cpu_s"))
        text += f"- Sketched LSPD: {networks.spread(lost)} dB under LPD, inference {faster:.2f} and training "
        text += f"{learnt:.2f} times cheaper in CPU time; aim above 1: {_met(min(faster, learnt) > 1)}.\n"
    return text


def _met(holds) -> str:
    return "met" if holds else "NOT met"


def measure(args, recorder) -> None:
    for seed in args.seeds:
        case = {"size": args.sizes[0], "views": args.views, "seed": seed}
        for photons in args.photons:
            draw = partial(np.random.default_rng, seed)
            if {"networks", "tv"} & set(args.rows):
                data = (networks.slices if args.data else networks.drawn)(args, photons, draw())
                own = case | {"data": "real slices" if args.data else "drawn abdomens", "photons": photons}
                models = family(args) if "networks" in args.rows else {}
                compared(args, recorder, data, own, models, batch=args.batch[0], tv="tv" in args.rows, data_range=2.0)
            if "volumes" in args.rows:
                data, own = networks.volumes(args, photons, draw()), case | {"data": VOLUMES, "photons": photons}
                compared(args, recorder, data, own, {"LPD": VOLUME}, batch=args.batch[0], data_range=2.0)
        if "digits" in args.rows:
            data = digits(args, np.random.default_rng(seed))
            own = {"data": "MNIST" if args.digits else "enlarged digits", "size": 28, "views": 24, "photons": None}
            compared(args, recorder, data, own | {"seed": seed}, {"LPD": {}}, batch=args.digits_batch, data_range=1.0)


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [64], "batch": [4], "dtype": ["float32"], "views": 30, "photons": [7e4], "layers": 4, "subsets": 2,
            "steps": 150, "rate": 2e-3, "train": 100, "validation": 8, "test": 16, "seeds": [0],
            "rows": ["networks", "tv", "digits"], "train_digits": 2000, "test_digits": 1000, "digits_batch": 16,
        },
        quick={
            "sizes": [16], "batch": [2], "views": 8, "layers": 2, "steps": 2, "train": 4, "validation": 2, "test": 2,
            "train_digits": 4, "test_digits": 4, "repeats": 2, "digits_batch": 2,
            "rows": ["networks", "tv", "digits", "volumes"],
        },
    )  # fmt: skip
    options.add_argument("--data", help="real slices: .npz with hu, patient and pixel_mm")
    options.add_argument("--digits", help="MNIST: folder of its idx files, or .npz with bytes under x")
    options.add_argument("--rows", nargs="+", choices=("networks", "tv", "digits", "volumes"), help="what to compare")
    options.add_argument("--seeds", type=int, nargs="+", help="of data, noise, first parameters and order")
    options.add_argument("--photons", type=float, nargs="+", help="per ray before the patient")
    for name, what in {
        "views": "angles in half a turn", "layers": "of each network", "subsets": "of the angles",
        "steps": "of training", "train": "drawn images to learn from", "validation": "images to choose the best by",
        "test": "drawn images to judge on", "train-digits": "to learn from", "test-digits": "to judge on",
        "digits-batch": "digits per step",
    }.items():  # fmt: skip
        options.add_argument(f"--{name}", type=int, help=what)
    options.add_argument("--rate", type=float, help="greatest learning rate")
    common.run(f"papers/{NAME}", options, measure, render, argv=argv)


if __name__ == "__main__":
    main()
