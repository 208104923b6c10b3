"""What a change of the library's structure cost: the same hypergradients and runs with an earlier commit.

Five cases run in fresh processes, earlier and present version in turn. Counts (steps, products, work, statuses) must be
equal and values agree to 1e-10 in float64 and 1e-4 in float32; equations of the traced program, CPU seconds to compile
and CPU seconds to run are compared. One case was wrong before: HOAG with ``alternate=`` trained the task on
reconstructions at its first accuracy in every step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

NAME = "versions"
TITLE = "The same numbers as before a change of structure"
CASES = ("implicit", "corrected", "piggyback", "nonsmooth", "MAID")
ALTERNATE = "HOAG with alternate"
CLOSE = {"float64": 1e-10, "float32": 1e-4}
SLOWER = 1.1  # CPU seconds at most, in times of the earlier version's


# ------------------------------------------------------------------------------------- one version, in its own process


def measured(dtype: str, size: int, repeats: int) -> dict[str, dict]:
    """Counts, values and costs of every case with the `jbilevel` that is imported."""
    import jax

    jax.config.update("jax_enable_x64", dtype == "float64")
    found = {}
    for name in CASES:
        call, arguments, read = case(name, size)
        equations = count(jax.make_jaxpr(call)(*arguments).jaxpr)
        started = time.process_time()
        compiled = jax.jit(call).lower(*arguments).compile()
        compile_s = time.process_time() - started
        result = jax.device_get(compiled(*arguments))
        seconds = []
        for _ in range(repeats):
            started = time.process_time()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.process_time() - started)
        costs = {"equations": equations, "compile_cpu_s": compile_s, "run_cpu_s": statistics.median(seconds)}
        found[name] = read(result) | costs
    return found | {ALTERNATE: alternate()}


def alternate() -> dict[str, list]:
    """HOAG's accuracy in each step, and that of the reconstructions on which the task learns in the next one."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    import jbilevel as jb

    R, noisy = jb.regularizers.SmoothedTV(eps=0.1), np.random.default_rng(0).random((2, 8, 8))
    own, task = [], []

    def watch(step, state, info):
        own.append(float(info.tol))
        task.append(float(state.reconstruction.tol))

    jb.task_adapted(
        jb.variational(None, R),
        lambda net, x: net["slope"] * (x - 0.5),
        jb.losses.cross_entropy,
        regularizer=R.init(weight=0.01),
        task_params={"slope": jnp.asarray(8.0)},
        batches={"y": jnp.asarray(noisy, float), "labels": jnp.asarray(noisy > 0.5, int)},
        steps=6,
        method=lambda oracle: jb.HOAG(oracle, schedule="cubic"),
        finetune=lambda path, leaf: True,
        alternate=optax.adam(1e-2),
        callback=watch,
        progress=False,
    )
    return {"own": own, "task": task}


def count(jaxpr) -> int:
    """Equations, those inside loops and calls too."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for part in value if isinstance(value, (list, tuple)) else (value,):
                inner = getattr(part, "jaxpr", part)
                total += count(inner) if hasattr(inner, "eqns") else 0
    return total


def case(name: str, size: int):
    """(function, arguments, what to read from its result)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jbilevel as jb

    rng = np.random.default_rng(0)
    clean = rng.random((2, size, size)).cumsum(1) / size
    noisy = clean + 0.1 * rng.standard_normal(clean.shape)
    batch = {"x": jnp.asarray(clean, float), "y": jnp.asarray(noisy, float)}
    R = jb.regularizers.SmoothedTV()
    theta, loss = R.init(), jb.losses.squared_error()
    smooth = jb.variational(None, R)
    if name == "MAID":
        method = jb.MAID(jb.implicit.Oracle(smooth, loss, loss_smoothness=1.0))

        def run(theta, batch):
            def step(state, _):
                state, info = method.step(state, batch)
                return state, info

            return jax.lax.scan(step, method.init(theta, batch), length=4)[1]

        return run, (theta, batch), lambda info: told(info.value, info.grad_norm, counts=(info.work, info.status))
    if name == "nonsmooth":
        A = rng.standard_normal((2, 20, 30)) / 4
        data = {"A": jnp.asarray(A, float), "b": jnp.asarray(A[:, :, :5].sum(2), float)}
        theta = jnp.full((30,), -2.0)
        problem = jb.WeightedL1Problem(
            lambda p, x, d: 0.5 * jnp.sum((d["A"] @ x - d["b"]) ** 2) + 0.05 * jnp.sum(x**2),
            lambda p, d: jnp.zeros(30),
            strong_convexity=0.1,
        )
        batch, oracle = data, jb.nonsmooth.Oracle(problem, lambda p, x, d: 0.5 * jnp.sum((x - 1.0) ** 2))
    elif name == "piggyback":
        saddle = jb.variational(None, R, form="saddle")
        oracle = jb.piggyback.Oracle(saddle, jb.losses.squared_error(part=0))
    else:
        oracle = jb.implicit.Oracle(smooth, loss, correct=name == "corrected", loss_smoothness=1.0)
    tol = 1e-2

    def hypergradient(theta, batch):
        return oracle(theta, batch, tol=tol, adjoint_tol=tol)

    def read(hg):
        solves = (hg.lower, hg.adjoint)
        counts = [c for s in solves for c in (s.steps, s.status, *s.evaluations)]
        return told(hg.value, hg.grad, hg.error, hg.value_error, counts=counts)

    return hypergradient, (theta, batch), read


def told(*values, counts) -> dict[str, list]:
    import numpy as np

    flat = [float(v) for leaf in values for v in np.ravel(leaf)]
    return {"values": flat, "counts": [int(c) for leaf in counts for c in np.ravel(leaf)]}


# ---------------------------------------------------------------------------------------------------------- comparison


def measure(args, recorder) -> None:
    from benchmarks import common

    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier"
        git = ["git", "-C", str(common.ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(earlier), args.against], check=True)
        try:
            for dtype in args.dtype:
                rounds = [(child(earlier, dtype, args), child(common.ROOT, dtype, args)) for _ in range(args.repeats)]
                for name in CASES:
                    recorder.add({"case": name, "dtype": dtype}, compared(name, rounds), {"against": args.against})
                before, after = (found[ALTERNATE] for found in rounds[0])
                figures = {"own": after["own"], "before": before["task"], "after": after["task"]}
                recorder.add({"case": ALTERNATE, "dtype": dtype}, figures, {"against": args.against})
                recorder.write()
        finally:
            subprocess.run([*git, "remove", "--force", str(earlier)], check=True)


def child(library: Path, dtype: str, args) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", dtype, str(args.sizes[0]), str(args.runs)]
    environment = os.environ | {"PYTHONPATH": str(library), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, cwd=library, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the cases failed with {library.name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    if not found.pop("library").startswith(str(library)):
        raise SystemExit(f"not the library of {library.name} was imported")
    return found


def compared(name: str, rounds: Sequence) -> dict:
    import numpy as np

    first, last = rounds[0][0][name], rounds[0][1][name]
    one, two = np.array(first["values"]), np.array(last["values"])
    finite = np.isfinite(one)
    scale = np.maximum(np.abs(one[finite]), 1e-12 * np.max(np.abs(one[finite])))
    same = np.array_equal(finite, np.isfinite(two))
    figures = {
        "counts_equal": first["counts"] == last["counts"],
        "distance": float(np.max(np.abs(one - two)[finite] / scale)) if same else np.inf,
    }
    for cost in ("equations", "compile_cpu_s", "run_cpu_s"):
        before, after = ([r[k][name][cost] for r in rounds] for k in (0, 1))
        figures |= {f"{cost}_before": statistics.median(before), f"{cost}_after": statistics.median(after)}
        figures[f"{cost}_ratio"] = statistics.median(b / a for a, b in zip(before, after, strict=True))
    return figures


def render(rows: Sequence[dict]) -> str:
    from benchmarks import common

    lines, alternated = [], [row for row in rows if row["case"]["case"] == ALTERNATE]
    rows = [row for row in rows if row not in alternated]
    for row in rows:
        case, f = row["case"], row["figures"]
        lines.append([
            case["case"], case["dtype"], "equal" if f["counts_equal"] else "DIFFERENT",
            common.scientific(f["distance"]),
            f"{f['equations_before']} to {f['equations_after']}",
            f"{common.rounded(f['compile_cpu_s_before'])} to {common.rounded(f['compile_cpu_s_after'])}",
            f"{common.rounded(1e3 * f['run_cpu_s_before'])} to {common.rounded(1e3 * f['run_cpu_s_after'])}",
            common.rounded(f["run_cpu_s_ratio"]),
        ])  # fmt: skip
    header = ["", "", "counts", "largest relative difference", "equations", "compile CPU s", "run CPU ms", "ratio"]
    text = f"Against commit {rows[0]['settings']['against']}:\n\n" + common.table(header, lines)
    equal = all(r["figures"]["counts_equal"] for r in rows)
    close = all(common.number(r["figures"]["distance"]) <= CLOSE[r["case"]["dtype"]] for r in rows)
    slower = max(r["figures"]["run_cpu_s_ratio"] for r in rows)
    more = [r["case"]["case"] for r in rows if r["figures"]["equations_after"] > r["figures"]["equations_before"]]
    met = {True: "met", False: "NOT met"}
    text += f"\n- Counts equal: {met[equal]}; values within 1e-10 (float64) and 1e-4 (float32): {met[close]}.\n"
    text += f"- CPU seconds of a run at most {SLOWER:g} times: {met[slower <= SLOWER]} (largest {slower:.2f}).\n"
    which = f" ({', '.join(dict.fromkeys(more))})" if more else ""
    text += f"- No more equations: {met[not more]}{which}.\n"
    f = alternated[0]["figures"]
    steps = [[name, *map(common.scientific, values)] for name, values in (
        ("HOAG's own accuracy in this step", f["own"]),
        ("of the task's reconstructions in the next step, before", f["before"]),
        ("the same, now", f["after"]),
    )]  # fmt: skip
    text += "\nHOAG with `alternate=`, schedule cubic, by step:\n\n"
    return text + common.table(["", *map(str, range(1, len(f["own"]) + 1))], steps)


def main(argv: Sequence[str] | None = None) -> None:
    from benchmarks import common

    options = common.parser(
        __doc__,
        defaults={"dtype": ["float64", "float32"], "repeats": 5, "sizes": [32], "runs": 9, "against": "HEAD"},
        quick={"dtype": ["float64"], "repeats": 1, "sizes": [8], "runs": 2},
    )
    options.add_argument("--against", metavar="COMMIT", help="the earlier version (default: HEAD, without changes)")
    options.add_argument("--runs", type=int, help="timed runs in each process")
    args = common.parse(options, argv)
    recorder = common.Recorder(NAME, args)
    measure(args, recorder)
    print(render(recorder.rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
        import jbilevel

        figures = measured(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        print(json.dumps({"library": jbilevel.__file__} | figures))
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        main()
