"""Proven bounds of more than 10,000 solves, rounding included: is any of them ever broken?

Each problem is drawn with its constants in float32 or float64, with conditions up to 1e6, and solved to a random
tolerance between 1 and 1e-8, plain and with a Newton correction. The truth is the unrounded solution of the problem as
it is stored, by another method in extended precision. Distances are `info.error` against ||x - x_hat||, values
`value_bound` (and the `bound` of a value from a warm start), gradients `bound`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common
from benchmarks.violation_problems import FAMILIES, LONG, Family, loss

NAME, PAGE = Path(__file__).stem, "certificates"
SOLVERS = {  # of smooth problems; the others have one each
    "default": None,
    "AGD": jb.solvers.AGD(),
    "APG": jb.solvers.NonmonotoneAPG(),
}
WITH_SOLVERS = ("quadratic, L unknown", "ridge, log cosh")
KINDS = ("distance", "value", "gradient")
FAR = 1e4  # roundings of size eps above which an error is one of a solve


def call(problem, correct: bool, solver) -> jax.stages.Wrapped:
    """Compiled (params, data, tol) -> what is told of every problem, each of a batch of its own."""
    options = {} if solver is None else {"solver": solver}
    oracle = problem.oracle(loss, loss_smoothness=1.0, correct=correct, estimate=False, **options)

    def one(params, data, tol):
        batch = jax.tree.map(lambda leaf: leaf[None], data)
        hg = oracle(params, batch, tol=tol)
        again = oracle.value(params, batch, hg.warm, tol=tol)
        return {
            "x": jb.image_of(jax.tree.map(lambda leaf: leaf[0], hg.warm.x)),
            "distance": hg.lower.error[0],
            "value at": hg.value,
            "value": hg.value_bound,
            "again at": again.value,
            "again": again.bound,
            "gradient at": hg.grad,
            "gradient": hg.bound,
        }

    # one after the other: in lockstep all would take the steps of the hardest
    return jax.jit(lambda *problems: jax.lax.map(lambda problem: one(*problem), problems))


def measured(family: Family, size: int, count: int, dtype: str, seed: int, solver=None) -> list[dict]:
    """For plain and corrected results: arrays of true errors and their bounds, of ``count`` problems."""
    rng = np.random.default_rng([seed, size, *dtype.encode(), *family.problem.__class__.__name__.encode()])
    drawn, exact = [], []
    while len(drawn) < count:
        problem = family.draw(rng, size, np.dtype(dtype))
        if (found := family.exact(*problem)) is not None:
            drawn.append(problem)
            exact.append(found)
    params, data = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
    rows = []
    for correct in (False, True):
        tol = (10.0 ** rng.uniform(-8, 0, count)).astype(dtype)
        found = jax.tree.map(np.asarray, call(family.problem, correct, solver)(params, data, tol))
        rows.append(compared(exact, found, correct, np.finfo(dtype).eps))
    return rows


def compared(exact: Sequence, found: dict, correct: bool, eps: float) -> dict:
    """True errors over bounds, where there is a bound; ``far``: those errors that are not rounding."""
    count = len(exact)
    flat = lambda tree: np.stack(  # noqa: E731
        [np.concatenate([np.ravel(leaf[k]) for leaf in jax.tree.leaves(tree)]) for k in range(count)]
    ).astype(LONG)
    x = flat(found["x"]) - np.stack([e.x.ravel() for e in exact])
    values = np.stack([e.value for e in exact])
    size = {"distance": np.array([np.linalg.norm(e.x) for e in exact]), "value": np.abs(values)}
    error = {
        "distance": np.linalg.norm(x, axis=1),
        "value": np.abs(found["value at"].astype(LONG) - values),
        "again": np.abs(found["again at"].astype(LONG) - values),
    }
    if exact[0].gradient is not None:
        gradients = np.stack([e.gradient for e in exact])
        size["gradient"] = np.linalg.norm(gradients, axis=1)
        error["gradient"] = np.linalg.norm(flat(found["gradient at"]) - gradients, axis=1)
    row = {"correct": correct, "cases": int(np.sum(np.isfinite(found["distance"])))}
    for name, true in error.items():
        proven = np.isfinite(found[name])
        bound, true = found[name][proven].astype(LONG), true[proven]
        far = true > FAR * eps * size["value" if name == "again" else name][proven]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(true > 0, true / bound, 0)
        row[name] = {"share": share.astype(float), "loose": (bound[far] / true[far]).astype(float)}
    return row


def judged(row: dict) -> dict:
    found = {"cases": row["cases"]}
    for name in KINDS:
        parts = [row[part] for part in (name, "again") if part in row and (part == name or name == "value")]
        share = np.concatenate([part["share"] for part in parts]) if parts else np.zeros(0)
        loose = np.concatenate([part["loose"] for part in parts]) if parts else np.zeros(0)
        found |= {
            f"{name}_bounds": int(share.size),
            f"{name}_violations": int(np.sum(share > 1)),
            f"{name}_largest": float(share.max()) if share.size else None,
            f"{name}_median": float(np.median(loose)) if loose.size else None,
        }
    return found


def measure(args, recorder) -> None:
    for name, family in FAMILIES.items():
        if args.families and name not in args.families:
            continue
        for solver in SOLVERS if name in WITH_SOLVERS else ("default",):
            for size in family.sizes[: args.limit]:
                for dtype in args.dtype:
                    with common.precision(dtype):
                        rows = measured(family, size, args.batch[0], dtype, args.seed, SOLVERS[solver])
                        for row in rows:
                            case = {"family": name, "solver": solver, "size": size, "dtype": dtype}
                            recorder.add(case | {"correct": row["correct"]}, judged(row))
        recorder.write()
        print(name, flush=True)


# ----------------------------------------------------------------------------------------------------------------- page


def total(rows: Sequence[dict], figure: str) -> int:
    return sum(row["figures"][figure] for row in rows)


def known(rows: Sequence[dict], figure: str) -> list[float]:
    return [common.number(row["figures"][figure]) for row in rows if row["figures"][figure] is not None]


def render(rows: Sequence[dict]) -> str:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        case = row["case"]
        kind = case["family"] if case["solver"] == "default" else f"{case['family']}, {case['solver']}"
        groups.setdefault((kind, case["dtype"], "yes" if case["correct"] else ""), []).append(row)
    header = ["problem", "dtype", "corrected", "cases"]
    header += [f"{kind}: {what}" for kind in KINDS for what in ("bounds", "broken", "bound/true")]
    lines = []
    for key, own in groups.items():
        cells = []
        for kind in KINDS:
            medians = known(own, f"{kind}_median")
            middle = common.scientific(np.median(medians)) if medians else "–"
            cells += [total(own, f"{kind}_bounds"), total(own, f"{kind}_violations"), middle]
        lines.append([*key, total(own, "cases"), *cells])
    bounds, broken = (sum(total(rows, f"{kind}_{what}") for kind in KINDS) for what in ("bounds", "violations"))
    largest = max(share for kind in KINDS for share in known(rows, f"{kind}_largest"))
    return common.table(header, lines) + (
        f"\n{broken} of {bounds} bounds of {total(rows, 'cases')} cases were broken; the largest error was "
        f"{common.rounded(largest)} of its bound. bound/true: median over the errors that are more than {FAR:.0e} "
        "roundings (of rows of several sizes, the median of theirs).\n"
    )


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={"dtype": ["float32", "float64"], "batch": [200], "families": None, "limit": None},
        quick={"batch": [4], "limit": 1},
    )
    options.add_argument("--families", nargs="+", choices=FAMILIES, metavar="NAME", help=f"of {'; '.join(FAMILIES)}")
    options.add_argument("--limit", type=int, help="sizes of each family")
    args = common.parse(options, argv)
    recorder = common.recorder_of(PAGE, NAME, args)
    measure(args, recorder)
    recorder.write()
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
