"""How descents end where nothing is to be gained: CONVERGED only where something was shown to be small.

    python benchmarks/endings.py

Each case once ended as CONVERGED, or is of the same kind. It is right if the descent is not called converged, or is and
has arrived: 1e-6 of the first gap is left, or the hypergradient is exactly zero. Then certified descents, whose exact
values must never rise, judged by solves to 1e-10.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common, upper_level_problems

NAME, PAGE = Path(__file__).stem, "reliability"
STEPS = 600
ARRIVED = 1e-6  # of the first gap
ONE = jnp.zeros((1, 2))  # a batch that holds nothing


class Case(NamedTuple):
    """``oracle`` at ``start``; ``value`` is exact, ``least`` its minimum; ``options`` of methods that have them."""

    oracle: Any
    start: Any
    value: Callable
    least: float = 0.0
    batch: Any = ONE
    options: dict = {}
    only: tuple[str, ...] = ()


METHODS: dict[str, Callable] = {
    "QuasiNewton": jb.QuasiNewton,
    "Stochastic": jb.Stochastic,
    "MAID": jb.MAID,
    "MAID, paper": partial(jb.MAID, rule="paper"),
    "HOAG": jb.HOAG,
    "NBA": jb.NBA,
}


def explicit(value: Callable):
    return jb.explicit.Oracle(lambda p, d: value(p))


def implicit(value: Callable, **options):
    """The lower level gives x = p, by iterations."""
    problem = jb.SmoothProblem(
        lambda p, x, d: 0.5 * jnp.sum((x - p) ** 2), lambda p, d: jnp.zeros(2), strong_convexity=1.0, smoothness=1.0
    )
    return problem.oracle(lambda p, x, d: value(x), loss_smoothness=1.0, solver=jb.solvers.AGD(), **options)


def valley(p):
    """A quadratic of condition 1e8, least at (1, 1)."""
    return 0.5 * (1e8 * (p[0] - 1.0) ** 2 + (p[1] - 1.0) ** 2)


def bowl(p):
    return 0.5 * jnp.sum((p - 1.0) ** 2)


def kinked(p):
    """Its gradient is NaN where p_0 = 0.5, its value is not."""
    return jnp.sqrt((p[0] - 0.5) ** 2) + 0.5 * p[1] ** 2


def wrong(value: Callable) -> Callable:
    """The same values with a gradient of the wrong sign."""

    @jax.custom_vjp
    def f(p):
        return value(p)

    f.defvjp(lambda p: (value(p), p), lambda p, c: (-c * jax.grad(value)(p),))
    return f


def unsolved(max_steps: int) -> Case:
    """The lower level gets too few iterations."""
    pair = common.images(16, 1)
    batch = {"x": jnp.asarray(pair.clean), "y": jnp.asarray(pair.noisy)}
    problem, loss = jb.variational(None, jb.regularizers.SmoothedTV()), jb.losses.squared_error()
    tight = jb.implicit.Oracle(problem, loss, estimate=False)
    value = lambda p: tight.value(p, batch, tol=1e-8).value  # noqa: E731
    start = jnp.array([-5.0, -5.0])
    best = jb.fit(jb.QuasiNewton(jb.implicit.Oracle(problem, loss)), start, batch, steps=400).best
    return Case(jb.implicit.Oracle(problem, loss, max_steps=max_steps), start, value, float(value(best)), batch)


def cases() -> dict[str, Case]:
    steep, far = jnp.array([1.0001, 50.0]), jnp.array([3.0, 2.0])
    too_long = {"options": {"step_size": 1e30}, "only": ("MAID", "MAID, paper", "HOAG")}
    return {
        "condition 1e8": Case(explicit(valley), steep, valley),
        "condition 1e8, through a solve": Case(implicit(valley), steep, valley),
        "gradient of the wrong sign": Case(explicit(wrong(bowl)), far, bowl),
        "gradient of the wrong sign, through a solve": Case(implicit(wrong(bowl)), far, bowl),
        "first step 1e30 times too long": Case(explicit(bowl), far, bowl, **too_long),
        "first step 1e30 times too long, through a solve": Case(implicit(bowl), far, bowl, **too_long),
        "no iteration in the lower level": unsolved(0),
        "one iteration in the lower level": unsolved(1),
        "NaN in the gradient alone": Case(explicit(kinked), jnp.array([0.5, 1.0]), kinked),
        "NaN in the gradient alone, through a solve": Case(implicit(kinked), jnp.array([0.5, 1.0]), kinked),
        "nothing depends on params": Case(explicit(lambda p: 1.0 + 0.0 * p[0]), far, lambda p: 1.0, 1.0),
        "arrived before it began": Case(implicit(bowl), jnp.ones(2), bowl),
        "a benign one": Case(implicit(bowl), far, bowl),
    }


def ending(name: str, case: Case) -> dict[str, Any]:
    method = METHODS[name](case.oracle, **case.options)
    result = jb.fit(method, case.start, case.batch, steps=STEPS, progress=False)
    first, last = (float(case.value(p)) - case.least for p in (case.start, result.best))
    slopes = result.history["grad_norm"]
    arrived = last <= ARRIVED * first or (slopes.size > 0 and not np.any(slopes))
    return {
        "status": result.status.name,
        "steps": result.steps,
        "work": result.work,
        "gap": last / first if first > 0 else last,
        "false": bool(result.status is jb.FitStatus.CONVERGED and not arrived),
    }


# --------------------------------------------------------------------------------------------------- certified descents


def certified(kind: str, make: Callable, total: int) -> dict[str, Any]:
    """``total`` steps of descents from several starts, none of which may make the exact value rise."""
    steps = rises = descents = 0
    largest, work = -np.inf, 0.0
    tv = upper_level_problems.tv
    starts = [tv(start, photograph) for photograph in (0, 1) for start in upper_level_problems.TV_STARTS]
    for setting in starts:
        if steps >= total:
            break
        seen: list[Any] = []
        result = jb.fit(
            make(setting.oracle, certified=True), setting.start, setting.batch, steps=total - steps, progress=False,
            callback=lambda step, state, info, seen=seen: seen.append(state.params),
        )  # fmt: skip
        judge = replace(setting, tight=1e-10).judge()
        exact = np.array([judge(params) for params in (setting.start, *seen)])
        change = np.diff(exact)
        steps, work = steps + result.steps, work + result.work
        rises += int(np.sum(change > 0))
        largest = max(largest, float(np.max(change / exact[:-1])))
        descents += 1
    return {"steps": steps, "rises": rises, "largest": largest, "descents": descents, "work": work}


def measure(args, recorder: common.Recorder) -> None:
    posed = cases()
    for what in list(posed)[:2] if args.quick else posed:
        for name in METHODS:
            if posed[what].only and name not in posed[what].only:
                continue
            recorder.add({"ending": what, "method": name}, ending(name, posed[what]))
    for name, make in {"QuasiNewton": jb.QuasiNewton, "MAID": jb.MAID}.items():
        recorder.add({"certified": name}, certified(name, make, 20 if args.quick else 1000))
    recorder.write()


def render(rows: Sequence[dict]) -> str:
    ended = [row for row in rows if "ending" in row["case"]]
    certain = [row for row in rows if "certified" in row["case"]]
    methods = list(dict.fromkeys(row["case"]["method"] for row in ended))
    cells = {(row["case"]["ending"], row["case"]["method"]): row["figures"] for row in ended}

    def told(figures: dict | None) -> str:
        if figures is None:
            return "–"
        gap = "unknown" if figures["gap"] is None else f"{figures['gap']:.1g}"
        said = f"{figures['status']}, gap {gap}, work {figures['work']:,.0f}"
        return f"**{said}**" if figures["false"] else said

    body = [[what, *(told(cells.get((what, name))) for name in methods)] for what in dict.fromkeys(w for w, _ in cells)]
    false = sum(row["figures"]["false"] for row in ended)
    parts = [
        common.table(["", *methods], body),
        f"Gaps are shares of the first one. False CONVERGED (bold): {false} of {len(ended)}.\n",
        "**Certified descents**, two-parameter TV of two photographs, `certified=True`\n",
        common.table(
            ["method", "descents", "steps", "exact values that rose", "largest relative change"],
            [
                [row["case"]["certified"], *(row["figures"][k] for k in ("descents", "steps", "rises")),
                 f"{row['figures']['largest']:.1e}"]
                for row in certain
            ],
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parse(common.parser(__doc__, defaults={}, quick={}), argv)
    jax.config.update("jax_enable_x64", True)
    recorder = common.recorder_of(PAGE, NAME, args)
    measure(args, recorder)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
