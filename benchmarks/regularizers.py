"""Every regulariser of the library: are its hypergradients exact, are their estimated errors right, what do they cost?

Denoising of photographs with noise 0.1 at the first parameters of each, moved at random. Exactness: central differences
of tightly solved values along random directions. Estimates: true errors against a tight reference at loose tolerances.
Cost: one cold hypergradient at equal error, interleaved with jaxopt's L-BFGS and implicit differentiation of the same
energy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common, peers, tuning, tv

NAME = "regularizers"
TITLE = "Regularisers: exactness, error estimates and cost"
EXACT = 1e-11
STEP = 1e-5  # of central differences, along directions of norm 1; also a tenth of it
ROUGH = "psi"  # in the names of energies whose second derivative jumps
FD_TARGET = 1e-6
TOLERANCES = (1e-1, 1e-2, 1e-3)
FINEST = 1e-10


class Model(NamedTuple):
    regularizer: Any
    params: Any
    solver: Any = None


def models() -> dict[str, Model]:
    R = jb.regularizers
    key = jax.random.key(0)
    every = {
        "SmoothedTV": R.SmoothedTV(), "WeightedTV, 8 x 8": R.WeightedTV(grid=(8, 8), eps=1e-2),
        "FoE, 48 of 7 x 7": R.FoE(), "FoE, 16 of 5 x 5": R.FoE(count=16, size=5), "CRR": R.CRR(), "WCRR": R.WCRR(),
        "ICNN": R.ICNN(potential="smoothstep"), "ICNN, psi": R.ICNN(),
    }  # fmt: skip
    first = {name: regularizer.init(key) for name, regularizer in every.items()}
    first["SmoothedTV"] = jnp.asarray(tv.THETA)
    return {name: Model(regularizer, _moved(first[name], regularizer)) for name, regularizer in every.items()}


def _moved(params, regularizer, size: float = 0.02):
    """params moved by 2 per cent at random: at a start that is symmetric, errors could hide."""
    flat, back = ravel_pytree(params)
    noise = np.random.default_rng(0).standard_normal(flat.size)
    return getattr(regularizer, "project", lambda p: p)(back(flat * (1 + size * noise)))


def problem_of(model: Model) -> jb.SmoothProblem:
    return jb.variational(None, model.regularizer)


def flat(tree) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


# ---------------------------------------------------------------------------------------------------------- measuring


def differences(oracle, model: Model, batch, exact: np.ndarray, directions: int, step: float) -> list[float]:
    """Relative errors of directional derivatives against central differences of values solved to EXACT."""
    start, back = ravel_pytree(model.params)
    rng = np.random.default_rng(1)
    value = jax.jit(lambda theta: oracle.value(back(theta), batch, tol=EXACT).value)
    errors = []
    for _ in range(directions):
        # towards the gradient: along a random direction in thousands of dimensions nothing would change
        direction = exact / np.linalg.norm(exact) + rng.standard_normal(start.size) / np.sqrt(start.size)
        direction = jnp.asarray(direction / np.linalg.norm(direction))
        slope = float(value(start + step * direction) - value(start - step * direction)) / (2 * step)
        errors.append(abs(slope - float(direction @ exact)) / abs(slope))
    return errors


def estimates(problem, model: Model, batch) -> tuple[list[float], list[float]]:
    """Estimated over true error, of crop after crop at each tolerance; and the relative errors."""
    oracle = jb.implicit.Oracle(problem, tv.loss)
    call = jax.jit(lambda data, tol: oracle(model.params, data, tol=tol))
    ratios, relative = [], []
    for k in range(batch["y"].shape[0]):
        data = jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], batch)
        exact = flat(call(data, EXACT).grad)
        for tol in TOLERANCES:
            hg = call(data, tol)
            true = np.linalg.norm(flat(hg.grad) - exact)
            ratios.append(float(hg.error) / true)
            relative.append(true / np.linalg.norm(exact))
    return ratios, relative


def cost(args, problem, model: Model, data, exact: np.ndarray) -> dict[str, dict]:
    """Figures of both libraries at equal error on one image."""
    one = jax.tree.map(lambda leaf: leaf[None], data)
    oracle = jb.implicit.Oracle(problem, tv.loss, estimate=False)
    theirs = peers.jaxopt_lbfgs(problem.energy, tv.loss, problem.smoothness)
    calls = {
        "jbilevel": lambda theta, tol, adjoint: oracle(theta, one, tol=tol, adjoint_tol=adjoint).grad,
        "jaxopt": lambda theta, tol, adjoint: theirs(theta, data["y"], data, tol, adjoint)[0],
    }
    runs, figures = {}, {}
    for name, call in calls.items():
        compiled = common.compile_apart(call, model.params, jnp.asarray(1.0), jnp.asarray(1.0))

        def error(tol, adjoint, compiled=compiled):
            grad = flat(compiled.call(model.params, jnp.asarray(tol), jnp.asarray(adjoint)))
            return float(np.linalg.norm(grad - exact) / np.linalg.norm(exact)) if np.all(np.isfinite(grad)) else np.inf

        tol, adjoint, reached = tuning.tune(error, args.target, FINEST)
        runs[name] = partial(compiled.call, model.params, jnp.asarray(tol), jnp.asarray(adjoint))
        figures[name] = {"error": reached, "compile_s": compiled.seconds, "temp_bytes": compiled.temp_bytes}
    for name, seconds in common.interleave(runs, args.repeats, args.seed).items():
        figures[name] |= common.spread(seconds)
    return figures


def export(folder: Path, name: str, model: Model, batch, exact: np.ndarray) -> None:
    """The one-image problem and its gradient as arrays, for a library in an environment of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"params.{key}": np.asarray(leaf) for key, leaf in _leaves(model.params)}
    arrays |= {"y": np.asarray(batch["y"][0]), "clean": np.asarray(batch["clean"][0]), "gradient": exact}
    np.savez(folder / f"{name.split(',')[0].replace(' ', '_')}_{exact.size}.npz", **arrays)


def _leaves(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf


def measure(args, recorder, name: str, model: Model) -> None:
    crops = common.crops(args.sizes[0], args.batch[0], args.images, args.seed)
    batch = {"y": jnp.asarray(crops.noisy), "clean": jnp.asarray(crops.clean)}
    problem = problem_of(model)
    first = jax.tree.map(lambda leaf: leaf[:1], batch)
    oracle = jb.implicit.Oracle(problem, tv.loss, estimate=False)
    hg = oracle(model.params, first, tol=EXACT)
    if int(hg.status) > jb.Status.PRECISION:
        raise SystemExit(f"{name}: the reference ended {jb.Status(int(hg.status)).name}")
    exact = flat(hg.grad)
    ratios, relative = estimates(problem, model, batch)
    recorder.add(
        {"part": "errors", "regularizer": name},
        {
            "parameters": exact.size, "difference": differences(oracle, model, first, exact, args.directions, STEP),
            "difference_finer": differences(oracle, model, first, exact, args.directions, STEP / 10),
            "estimate_over_true": ratios, "relative_error": relative,
        },
    )  # fmt: skip
    if args.export:
        export(Path(args.export), name, model, batch, exact)
    figures = cost(args, problem, model, jax.tree.map(lambda leaf: leaf[0], batch), exact)
    for library, own in figures.items():
        recorder.add({"part": "cost", "regularizer": name, "library": library}, own)
    recorder.write()
    ratio = common.times_faster(figures["jbilevel"], figures["jaxopt"])
    print(f"{name}: differences {max(recorder.rows[-3]['figures']['difference']):.1e}, estimate/true "
          f"{np.median(ratios):.2f}, {figures['jbilevel']['ms']:.0f} ms, {ratio:.1f} x jaxopt", flush=True)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- page


def render(rows: Sequence[dict]) -> str:
    settings = rows[0]["settings"]
    header = ["regulariser", "parameters", "worst against differences", "estimate/true", "at least half", "ms"]
    header += ["jaxopt, ms", "times faster", "temporary memory", "jaxopt's"]
    lines, worst, ratios, rough = [], {}, [], ""
    for name in dict.fromkeys(row["case"]["regularizer"] for row in rows):
        own = [row for row in rows if row["case"]["regularizer"] == name]
        errors = next(row["figures"] for row in own if row["case"]["part"] == "errors")
        ours, theirs = (
            next(row["figures"] for row in own if row["case"].get("library") == library)
            for library in ("jbilevel", "jaxopt")
        )
        ratio = np.array(errors["estimate_over_true"])
        worst[name] = max(errors["difference"])
        if ROUGH in name:
            rough += (
                f"- {name}: its second derivative jumps, and differences cross the jumps: "
                f"{common.scientific(worst[name])} with steps of {STEP:g}, "
                f"{common.scientific(max(errors['difference_finer']))} with a tenth of that.\n"
            )
        ratios.append(ratio)
        reached = theirs["error"] <= settings["target"]
        lines.append([
            name, errors["parameters"], common.scientific(worst[name]),
            f"{np.median(ratio):.2f} ({ratio.min():.2f}–{ratio.max():.2f})", f"{100 * np.mean(ratio >= 0.5):.0f} %",
            common.rounded(ours["ms"]), common.rounded(theirs["ms"]) + ("" if reached else " (target not reached)"),
            common.rounded(common.times_faster(ours, theirs), 2),
            *(f"{(own['temp_bytes'] or 0) / 2**20:.0f} MiB" for own in (ours, theirs)),
        ])  # fmt: skip
    every = np.concatenate(ratios)
    smooth = max(error for name, error in worst.items() if ROUGH not in name)
    met = "met" if smooth <= FD_TARGET else "NOT met"
    crops = f"{settings['batch'][0]} crops of {settings['sizes'][0]} x {settings['sizes'][0]} pixels"
    intro = f"{crops}, float64; costs at a relative error of {common.scientific(settings['target'], 0)}.\n"
    verdict = (
        f"- Hypergradients of twice differentiable energies against central differences: at worst "
        f"{common.scientific(smooth)}; criterion <= {FD_TARGET:g}: {met}.\n{rough}"
        f"- Estimates over all {every.size} cases: median {np.median(every):.2f}, at least half the true error in "
        f"{100 * np.mean(every >= 0.5):.1f} %.\n"
    )
    return "\n".join([intro, common.table(header, lines), verdict])


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={"sizes": [64], "batch": [5], "directions": 3, "target": 1e-4, "models": None, "export": None},
        quick={"sizes": [24], "batch": [1], "repeats": 2, "directions": 1, "models": ["SmoothedTV", "ICNN"]},
    )
    options.add_argument("--models", nargs="+", help="names of some regularisers (default: all)")
    options.add_argument("--export", metavar="DIR", help="also write the problems there, for regularizers_torch.py")
    options.add_argument("--directions", type=int, help="random directions of central differences")
    options.add_argument("--target", type=float, help="relative error of the hypergradients that are timed")
    args = common.parse(options, argv)
    recorder = common.Recorder(NAME, args)
    with common.precision("float64"):
        for name, model in models().items():
            if args.models is None or name in args.models:
                measure(args, recorder, name, model)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
