"""One cold hypergradient of smoothed TV: jbilevel's oracles against other libraries and unrolling, at equal error.

Every alternative with a tolerance gets the loosest one whose measured error, against a tight float64 reference, is at
most the target; then all are timed in turn within each repeat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common, hypergradients_page, peers, tuning, tv

NAME = "hypergradients"
TARGET = {"float64": 1e-6, "float32": 1e-3}  # relative error asked of everything that can be tuned
FINEST = {"float64": 1e-12, "float32": 1e-6}
STEP_LIMIT = 400  # of unrolling
WARM_SHIFT = 0.05  # x and q of theta - 0.05 are the warm start, as after a 5 per cent change of both parameters

# ------------------------------------------------------------------------------------------------------ alternatives


class Row(NamedTuple):
    """An alternative. ``make(problem, steps) -> f(theta, batch, warm, tol, adjoint_tol) -> (gradient, report)``."""

    make: Callable
    kind: str  # "jbilevel", "peer", "unrolled" or "biased" (its error does not vanish with the tolerance)
    tuned: str = "tolerances"  # or "steps", or "nothing"
    warm: bool = False
    lean: str = "unrolled, checkpointed"  # with tuned="steps": the row that computes the same in less memory


def _report(hg) -> dict[str, Any]:
    return {
        "estimate": hg.error,
        "lower": jnp.mean(hg.lower.steps),
        "adjoint": jnp.mean(hg.adjoint.steps),
        "work": jnp.mean(hg.lower.work + hg.adjoint.work),
        "status": hg.status,
    }


def _oracle(kind=jb.implicit.Oracle, *, with_steps=False, truncate=None, saddle=False, **options):
    """Row.make of one of the library's oracles; ``saddle``: of the same problem in the saddle form."""

    def make(problem, steps):
        own = {"steps": steps} if with_steps else {}
        if truncate:
            own["truncate"] = max(1, steps // truncate)
        oracle = kind(*((tv.SADDLE, tv.pair_loss) if saddle else (problem, tv.loss)), **own, **options)

        def hypergradient(theta, batch, warm, tol, adjoint_tol):
            hg = oracle(theta, batch, warm, tol=tol, adjoint_tol=adjoint_tol)
            return hg.grad, _report(hg)

        return hypergradient

    return make


def _peer(build):
    """Row.make of another library, which knows one image; a batch is treated as the library's oracles treat it.

    That is image after image on a CPU (in lockstep all take the steps of the slowest), all at once elsewhere.
    """

    def make(problem, steps):
        gradient = build(problem.energy, tv.loss, tv.smoothness)
        mapped = jax.lax.map if jax.default_backend() == "cpu" else lambda f, batch: jax.vmap(f)(batch)

        def hypergradient(theta, batch, warm, tol, adjoint_tol):
            each = lambda data: gradient(theta, data["y"], data, tol, adjoint_tol)  # noqa: E731
            if batch["y"].shape[0] == 1:
                return each(jax.tree.map(lambda leaf: leaf[0], batch))
            grads, report = mapped(each, batch)
            return jnp.mean(grads, axis=0), jax.tree.map(jnp.mean, report)

        return hypergradient

    return make


AGD = jb.solvers.AGD()
_unrolled = partial(_oracle, jb.unroll.Oracle, with_steps=True, solver=AGD)
_piggyback = partial(_oracle, jb.piggyback.Oracle, saddle=True)
_unrolled_pdhg = partial(_unrolled, saddle=True, solver=jb.solvers.PDHG(stride=1))
PDHG = "unrolled PDHG, checkpointed"
ROWS: dict[str, Row] = {
    "implicit": Row(_oracle(estimate=False), "jbilevel"),
    "implicit, error estimated": Row(_oracle(), "jbilevel"),
    "implicit, AGD": Row(_oracle(estimate=False, solver=AGD), "jbilevel"),
    "implicit, L-BFGS": Row(_oracle(estimate=False, solver=jb.solvers.LBFGS()), "jbilevel"),
    "corrected": Row(_oracle(correct=True), "jbilevel"),
    "corrected, AGD": Row(_oracle(correct=True, solver=AGD), "jbilevel"),
    "warm": Row(_oracle(estimate=False), "jbilevel", warm=True),
    "warm, corrected": Row(_oracle(correct=True), "jbilevel", warm=True),
    "piggyback": Row(_piggyback(estimate=False), "jbilevel"),
    "piggyback, error estimated": Row(_piggyback(), "jbilevel"),
    "piggyback, corrected": Row(_piggyback(correct=True), "jbilevel"),
    "piggyback, simultaneous": Row(_piggyback(estimate=False, mode="simultaneous"), "jbilevel"),
    "one step": Row(_oracle(jb.unroll.OneStep, estimate=False), "biased", tuned="nothing"),
    "one step, corrected": Row(_oracle(jb.unroll.OneStep, correct=True), "biased", tuned="nothing"),
    "unrolled": Row(_unrolled(), "unrolled", tuned="steps"),
    "unrolled, checkpointed": Row(_unrolled(checkpoint=True), "unrolled", tuned="steps"),
    "unrolled PDHG": Row(_unrolled_pdhg(), "unrolled", tuned="steps", lean=PDHG),
    PDHG: Row(_unrolled_pdhg(checkpoint=True), "unrolled", tuned="steps", lean=PDHG),
    "truncated, last quarter": Row(_unrolled(truncate=4), "biased", tuned="steps"),
    **{name: Row(_peer(build), "peer") for name, build in peers.PEERS.items()},
}
QUICK = ["implicit", "corrected", "unrolled", "jaxopt L-BFGS"]


# --------------------------------------------------------------------------------------------------------- measuring


class Entry(NamedTuple):
    """An alternative compiled and tuned for one case."""

    row: Row
    compiled: common.Compiled
    arguments: tuple
    settings: dict
    error: float
    report: dict[str, float]

    def run(self):
        return self.compiled.call(*self.arguments)


class TooLarge(Exception):
    """The compiled function wants more temporary memory than allowed."""


class Case:
    """One size, batch, dtype and energy: its data, reference, and the preparation of each alternative."""

    def __init__(self, args, size: int, count: int, dtype: str, energy: str, exact: np.ndarray):
        self.problem, self.exact, self.dtype = tv.PROBLEMS[energy], exact, dtype
        self.limit = args.memory_limit * 2**30
        self.target = TARGET[dtype] if args.target is None else args.target
        self.theta = jnp.asarray(tv.THETA, dtype)
        self.batch = tv.batch(size, count, dtype, args.images)
        self.steps = args.unrolled_steps

    @cached_property
    def warm(self) -> jb.Warm:
        oracle = jb.implicit.Oracle(self.problem, tv.loss, estimate=False)
        return oracle(self.theta - WARM_SHIFT, self.batch, tol=self.target).warm

    def compile(self, row: Row, steps: int | None) -> common.Compiled:
        function = row.make(self.problem, steps)
        tolerance = jnp.asarray(self.target, self.dtype)
        compiled = common.compile_apart(function, self.theta, self.batch, self._warm(row), tolerance, tolerance)
        if (compiled.temp_bytes or 0) > self.limit:
            raise TooLarge(f"{compiled.temp_bytes / 2**30:.1f} GiB of temporary memory")
        return compiled

    def _warm(self, row: Row):
        return self.warm if row.warm else None

    def arguments(self, row: Row, tol: float, adjoint_tol: float) -> tuple:
        tolerances = (jnp.asarray(t, self.dtype) for t in (tol, adjoint_tol))
        return (self.theta, self.batch, self._warm(row), *tolerances)

    def error(self, row: Row, compiled: common.Compiled, tol: float, adjoint_tol: float) -> float:
        gradient, _ = compiled.call(*self.arguments(row, tol, adjoint_tol))
        error = tv.relative_error(gradient, self.exact)
        return error if np.isfinite(error) else np.inf

    def ready(self, row: Row, settings: Mapping[str, Any], compiled: common.Compiled | None = None) -> Entry:
        """Compile (unless that was done before) and run once with settings that were found before."""
        compiled = compiled or self.compile(row, settings.get("steps"))
        arguments = self.arguments(row, settings.get("tol", self.target), settings.get("adjoint_tol", self.target))
        gradient, report = compiled.call(*arguments)
        report = {name: float(value) for name, value in report.items()}
        return Entry(row, compiled, arguments, dict(settings), tv.relative_error(gradient, self.exact), report)

    def prepare(self, row: Row, known: Mapping[str, Any]) -> Entry:
        """Compile and tune; ``known`` are settings found before, kept where they still reach the target."""
        tol = adjoint_tol = self.target
        steps = None
        if row.tuned == "steps":
            steps = self.steps or known.get("steps") or self._fewest_steps(ROWS[row.lean], known["guess"])
        compiled = self.compile(row, steps)
        error = partial(self.error, row, compiled)
        if row.tuned == "tolerances":
            tol, adjoint_tol = known.get("tol", 0.0), known.get("adjoint_tol", 0.0)
            if not tol or not error(tol, adjoint_tol) <= self.target:
                tol, adjoint_tol, _ = tuning.tune(error, self.target, FINEST[self.dtype])
        settings = {"tol": tol, "adjoint_tol": adjoint_tol} if steps is None else {"steps": steps}
        return self.ready(row, settings, compiled)

    def _fewest_steps(self, row: Row, guess: int) -> int:
        def error(steps):
            return self.error(row, self.compile(row, steps), self.target, self.target)

        return tuning.fewest(error, self.target, guess, STEP_LIMIT)[0]


def measure(args, recorder: common.Recorder, size: int, count: int, dtype: str) -> None:
    """Prepare every alternative for one size, batch and dtype, time them in turn, and record one row for each."""
    exact = tv.reference(size, count, args.images)
    distance = tv.published_distance(size, count, args.images, exact)
    guess = {"guess": next((r["settings"]["steps"] for r in recorder.rows[::-1] if "steps" in r["settings"]), 130)}
    entries: dict[tuple[str, str], Entry | str] = {}
    with common.precision(dtype):
        jax.block_until_ready(jax.jit(jnp.sum)(jnp.ones(3)))  # start the compiler before anything is timed
        for energy in args.energies:
            case = Case(args, size, count, dtype, energy, exact)
            for name in args.rows:
                try:
                    entries[name, energy] = case.prepare(ROWS[name], guess | _known(entries, name))
                except TooLarge as reason:
                    entries[name, energy] = str(reason)
        runs = {key: entry.run for key, entry in entries.items() if isinstance(entry, Entry)}
        seconds = common.interleave(runs, args.repeats, args.seed)
        drawn = curves(args, case, entries) if args.curves and count == 1 else {}
        for (name, energy), entry in entries.items():
            shape = {"row": name, "kind": ROWS[name].kind, "energy": energy}
            shape |= {"size": size, "batch": count, "dtype": dtype}
            if isinstance(entry, str):
                recorder.add(shape, {"skipped": entry})
                continue
            figures = common.spread(seconds[name, energy]) | figures_of(entry, exact)
            figures |= {"published_distance": distance, "curve": drawn.get((name, energy))}
            recorder.add(shape, figures, {**entry.settings, "target": case.target})
    recorder.write()


def curves(args, case: Case, entries: Mapping) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(error, milliseconds) of each alternative with the last energy, from loose to tight tolerances or few steps."""
    points: dict[tuple, Callable] = {}
    errors: dict[tuple, float] = {}
    tolerances = [10.0**-k for k in range(1, 9) if 10.0**-k >= 10 * FINEST[case.dtype]]
    for (name, energy), entry in entries.items():
        if energy != args.energies[-1] or not isinstance(entry, Entry) or entry.row.kind == "biased":
            continue
        for call in _variations(case, entry, tolerances):
            key = name, energy, len(points)
            points[key], errors[key] = call, tv.relative_error(call()[0], case.exact)
    seconds = common.interleave(points, max(2, args.repeats // 2), args.seed)
    drawn: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (name, energy, number), times in seconds.items():
        drawn.setdefault((name, energy), []).append((errors[name, energy, number], common.spread(times)["ms"]))
    return drawn


def _variations(case: Case, entry: Entry, tolerances):
    """The same alternative at other tolerances, or unrolled over fewer steps."""
    if entry.row.tuned == "tolerances":
        for tol in tolerances:
            yield partial(entry.compiled.call, *case.arguments(entry.row, tol, tol))
    elif entry.row.tuned == "steps":
        for share in (0.25, 0.5, 0.75):
            compiled = case.compile(entry.row, max(1, round(share * entry.settings["steps"])))
            yield partial(compiled.call, *entry.arguments)
        yield entry.run


def _known(entries, name: str) -> dict:
    """Settings found for the same alternative with another energy, or steps of one that computes the same."""
    known = {}
    for (other, _), entry in entries.items():
        same = other == name or ROWS[other].lean == ROWS[name].lean
        if isinstance(entry, Entry) and same and ("steps" in entry.settings or other == name):
            known |= entry.settings
    return known


def figures_of(entry: Entry, exact: np.ndarray) -> dict[str, Any]:
    """What is known of an alternative besides its times."""
    report = dict(entry.report)
    estimate = report.pop("estimate", np.inf)
    status = report.pop("status", None)
    if entry.row.kind != "jbilevel":  # of oracles without a stopping rule the status says nothing
        status = None
    return {
        "error": entry.error,
        "estimated_error": estimate / float(np.linalg.norm(exact)) if np.isfinite(estimate) else None,
        "compile_s": entry.compiled.seconds,
        "temp_bytes": entry.compiled.temp_bytes,
        "status": None if status is None else jb.Status(int(status)).name,
        **report,
    }


# -------------------------------------------------------------------------------------------------------------- page

render, figures = hypergradients_page.render, hypergradients_page.figures


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [64, 256], "batch": [1, 8], "energies": list(tv.PROBLEMS), "rows": list(ROWS), "memory_limit": 8.0,
            "curves": True,
        },
        quick={"sizes": [16], "batch": [1], "repeats": 2, "energies": ["user"], "rows": QUICK, "curves": False},
    )  # fmt: skip
    options.add_argument("--energies", nargs="+", choices=list(tv.PROBLEMS), help="who wrote the energy")
    options.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help=f"some of: {'; '.join(ROWS)}")
    options.add_argument("--target", type=float, help="relative error that tolerances are tuned for")
    options.add_argument("--unrolled-steps", type=int, help="of unrolling (default: the fewest that reach the target)")
    options.add_argument("--memory-limit", type=float, help="GiB of temporary memory above which a row is left out")
    options.add_argument("--curves", action=argparse.BooleanOptionalAction, help="also time other tolerances")
    args = common.parse(options, argv)
    recorder = common.Recorder(NAME, args)
    for dtype in args.dtype:
        for size in args.sizes:
            for count in args.batch:
                measure(args, recorder, size, count, dtype)
                print(hypergradients_page.summary(recorder.rows, size, count, dtype), flush=True)
    if args.out is None:
        figures(recorder.rows, common.FIGURES)


if __name__ == "__main__":
    main()
