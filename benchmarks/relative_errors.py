"""Hypergradients asked for by their relative error, ``rtol``: is the true error below, and what does that cost?
Random problems: the kinds of benchmarks/estimates.py, in batches of two, and those of benchmarks/error_problems.py, on
crops of photographs at parameters near theirs; saddle points one by one. The truth is that of dense linear algebra in
double precision. For one problem of some kinds the work is compared with the least over a grid of tolerances of both
solves whose true error is at most ``rtol``: a choice that needs the truth.

    python benchmarks/relative_errors.py           # all kinds
    python benchmarks/relative_errors.py --quick   # some problems of one kind
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common, error_problems, estimates, estimates_saddle, tv

NAME = Path(__file__).stem
TITLE = "Hypergradients by their relative error"
SMOOTH = tuple(kind for kind in estimates.KINDS if kind != "quadratic, n = 1000")
PHOTOGRAPHS = tuple(f"{kind}, photographs" for kind in error_problems.ESTIMATED)
KINDS = (*SMOOTH, *PHOTOGRAPHS, *estimates.SADDLE)
SINGLE = ("quadratic, n = 30", "log-cosh ridge", "smoothed TV", "fields of experts", "weighted l1", "Huber-TV")
RTOLS = {"float64": (1e-1, 1e-2, 1e-4, 1e-6), "float32": (1e-1, 1e-2, 1e-3)}
BY_HAND = (
    "quadratic, n = 30", "quadratic, n = 300", "log-cosh ridge", "psi ridge", "smoothed TV", "fields of experts",
    "ridge filters", "weighted l1", "TV (-3, -6), photographs", *estimates.SADDLE,
)  # fmt: skip
SAMPLES, SIDE = 2, 16
GRID = 2  # tolerances per decade


class Case(NamedTuple):
    """A problem, and its hypergradient."""

    oracle: Any
    params: Any
    batch: Any
    exact: np.ndarray


@cache
def crops(seed: int) -> common.Images:
    return common.crops(SIDE, 64, seed=seed)


def photographs(kind: str, seed: int) -> estimates.Setup:
    """Random crops, and parameters near those of the problem."""
    problem, params, _ = error_problems.ESTIMATED[kind.removesuffix(", photographs")]

    def draw(rng):
        i = rng.integers(len(crops(seed).clean))
        near = jax.tree.map(lambda leaf: leaf * (1 + 0.1 * rng.standard_normal(np.shape(leaf))), params)
        return near, {"y": crops(seed).noisy[i], "clean": crops(seed).clean[i]}

    return estimates.Setup(problem, tv.loss, draw)


def cases(kind: str, dtype: str, count: int, seed: int) -> Iterator[Case]:
    if kind in estimates.SADDLE:
        each = len(estimates_saddle.TOLERANCES)
        for case in islice(estimates_saddle.cases(kind, dtype, each * count, seed), 0, None, each):
            yield Case(case.oracle, case.params, case.batch, case.exact)
        return
    setup = photographs(kind, seed) if kind in PHOTOGRAPHS else estimates.KINDS[kind]()
    oracle, rng = setup.problem.oracle(setup.loss), np.random.default_rng([seed, KINDS.index(kind)])
    found = 0
    while found < count:
        (params, first), *others = (setup.draw(rng) for _ in range(SAMPLES))
        data = [first, *(other for _, other in others)]
        params, data = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), (params, data))
        with common.precision("float64"):
            truths = [estimates.truth(setup, params, one) for one in data]
        if any(truth is None for truth in truths):
            continue
        exact = np.mean([truth.grad for truth in truths], axis=0)
        with common.precision(dtype):
            batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)
            yield Case(oracle, jax.tree.map(jnp.asarray, params), batch, exact)
        found += 1


def relative(grad, case: Case) -> float:
    return float(np.linalg.norm(estimates.flat(grad) - case.exact) / np.linalg.norm(case.exact))


def per_sample(hg, case: Case) -> float:
    return float(hg.work) / len(jax.tree.leaves(case.batch)[0])


def asked(case: Case, rtol: float) -> dict[str, Any]:
    hg = case.oracle(case.params, case.batch, rtol=rtol)
    return {
        "true": relative(hg.grad, case),
        "estimate": float(hg.error) / float(np.linalg.norm(estimates.flat(hg.grad))),
        "status": jb.Status(int(hg.status)).name,
        "work": per_sample(hg, case),
    }


def tried(case: Case, decades: int) -> dict[str, list[tuple[float, float]]]:
    """(true error, work) at all pairs of tolerances of a grid, of the oracle without its estimate and with it."""
    scales, found = case.oracle.scales(case.params, case.batch), {}
    for name, oracle in {"without": replace(case.oracle, estimate=False), "with": case.oracle}.items():
        found[name] = []
        for tol in 10.0 ** (-np.arange(decades * GRID + 1) / GRID):
            for adjoint_tol in 10.0 ** (-np.arange(decades * GRID + 1) / GRID):
                tolerances = {"tol": tol * scales.solution, "adjoint_tol": adjoint_tol * scales.adjoint}
                hg = oracle(case.params, case.batch, **tolerances)
                found[name].append((relative(hg.grad, case), per_sample(hg, case)))
    return found


def measure(args, recorder: common.Recorder) -> None:
    for dtype in args.dtype:
        for kind in args.kinds:
            if dtype == "float32" and kind not in SINGLE:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # tolerances that are met at the start
                figures: dict[float, dict[str, Any]] = {rtol: {} for rtol in RTOLS[dtype]}
                for number, case in enumerate(cases(kind, dtype, args.problems, args.seed)):
                    with common.precision(dtype):
                        for rtol, own in figures.items():
                            for name, value in asked(case, rtol).items():
                                own.setdefault(name, []).append(value)
                        if number or kind not in BY_HAND or dtype == "float32":
                            continue
                        for name, pairs in tried(case, args.decades).items():
                            for rtol, own in figures.items():
                                enough = [work for error, work in pairs if error <= rtol]
                                own[f"by hand, {name}"] = min(enough, default=np.nan)
            with common.precision(dtype):
                for rtol, own in figures.items():
                    recorder.add({"kind": kind, "dtype": dtype, "rtol": rtol}, own)
            recorder.write()
            jax.clear_caches()


def render(rows: Sequence[dict]) -> str:
    rtols = sorted({row["case"]["rtol"] for row in rows}, reverse=True)
    by = {(row["case"]["kind"], row["case"]["dtype"], row["case"]["rtol"]): row["figures"] for row in rows}
    lines = []
    for kind, dtype in dict.fromkeys(key[:2] for key in by):
        own = [by.get((kind, dtype, rtol)) for rtol in rtols]
        count = sum(len(figures["true"]) for figures in own if figures)
        lines.append((kind, dtype, count, *map(met, own, rtols)))
    header = ["lower level", "", "cases", *map(heading, rtols)]
    hand = [row for row in rows if "by hand, with" in row["figures"]]
    return "\n".join([
        overall(rows),
        "Share CONVERGED; of these, share with a true error of at most rtol; median of true error / rtol:\n",
        common.table(header, lines),
        by_hand(hand) if hand else "",
    ])  # fmt: skip


def met(figures: dict | None, rtol: float) -> str:
    if figures is None:
        return "–"
    ratios = converged(figures, rtol)
    share = ratios.size / len(figures["true"])
    return f"{share:.0%}; " + (f"{np.mean(ratios <= 1):.0%}; {np.median(ratios):.1g}" if ratios.size else "–")


def converged(figures: dict, rtol: float) -> np.ndarray:
    """True errors over rtol, of what ended CONVERGED."""
    both = zip(figures["true"], figures["status"], strict=True)
    return np.array([common.number(true) / rtol for true, status in both if status == "CONVERGED"])


def overall(rows: Sequence[dict]) -> str:
    text = []
    for dtype in dict.fromkeys(row["case"]["dtype"] for row in rows):
        own = [row for row in rows if row["case"]["dtype"] == dtype]
        ratios = np.concatenate([converged(row["figures"], row["case"]["rtol"]) for row in own])
        names = Counter(name for row in own for name in row["figures"]["status"])
        others = ", ".join(f"{n} {name}" for name, n in names.items() if name != "CONVERGED") or "none"
        below = int(np.sum(ratios <= 1))
        fine = sum(common.number(true) <= row["case"]["rtol"] for row in own for true in row["figures"]["true"]) - below
        text.append(
            f"{dtype}: of {names.total()} cases, {ratios.size} ({ratios.size / names.total():.1%}) ended CONVERGED, "
            f"and of these {below} ({below / max(ratios.size, 1):.1%}) have a true error of at most rtol; the largest "
            f"is {np.max(ratios, initial=0):.2g} rtol. The others: {others}; {fine} of them have such an error all the "
            "same.\n"
        )
    return "\n".join(text)


def by_hand(rows: Sequence[dict]) -> str:
    rtols = sorted({row["case"]["rtol"] for row in rows}, reverse=True)
    ratios: dict[tuple, tuple[float, float]] = {}
    works = {}
    for row in rows:
        key, figures = (row["case"]["kind"], row["case"]["rtol"]), row["figures"]
        works[key] = figures["work"][0] if figures["status"][0] == "CONVERGED" else np.nan
        least = (common.number(figures[f"by hand, {name}"]) for name in ("without", "with"))
        ratios[key] = tuple(works[key] / work for work in least)

    def cell(kind: str, rtol: float) -> str:
        two = "; ".join(common.rounded(ratio, 2) for ratio in ratios[kind, rtol])
        return f"{common.whole(works[kind, rtol])}; {two}"

    def medians(some) -> list[str]:
        columns = (np.array(column) for column in zip(*some, strict=True))
        return [common.rounded(np.median(c[np.isfinite(c)]) if np.isfinite(c).any() else np.nan, 2) for c in columns]

    lines = [(kind, *(cell(kind, rtol) for rtol in rtols)) for kind in dict.fromkeys(kind for kind, _ in ratios)]
    each = (medians(ratio for (_, asked), ratio in ratios.items() if asked == rtol) for rtol in rtols)
    lines.append(("median of the ratios", *("; ".join(both) for both in each)))
    without, told = medians(ratios.values())
    return (
        "One problem each: work per sample by rtol; that over the least by hand without an estimate; over the least by "
        "hand with one, which tells its error too (a dash: not CONVERGED, or not reached by hand). Medians of all: "
        f"{without} and {told}.\n\n" + common.table(["lower level", *map(heading, rtols)], lines)
    )


def heading(rtol: float) -> str:
    return f"rtol = {common.scientific(rtol, 0)}"


def main(argv: Sequence[str] | None = None) -> None:
    options = common.parser(
        __doc__,
        defaults={"problems": 8, "kinds": KINDS, "dtype": ["float64", "float32"], "decades": 8},
        quick={"problems": 2, "kinds": ["quadratic, n = 30"], "dtype": ["float64"], "decades": 2},
    )
    options.add_argument("--problems", type=int, help="of each kind")
    options.add_argument("--kinds", nargs="+", choices=KINDS, help="lower levels (default: all)")
    options.add_argument("--decades", type=int, help="of the tolerances that are tried by hand")
    common.run(NAME, options, measure, render, argv=argv)


if __name__ == "__main__":
    main()
