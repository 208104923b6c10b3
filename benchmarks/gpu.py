"""Minutes of one GPU: hypergradients in every way, an iteration of PDHG, projectors, learned primal-dual, MAID.

Nothing is searched for on the device: tolerances and step numbers that reach the target error, and the gradients that
errors are measured against, were found on a CPU (``--prepare``) and lie beside this script. Parts run in the order of
what matters most, rows are written as they come, and no part begins after ``--seconds``.

It needs jax with CUDA, numpy, optax, tqdm, scikit-image, flax and jaxopt. On a machine without network bring what is
missing as wheels,

    python -m pip download --no-deps --only-binary=:all: -d wheels jaxopt
    python -m pip install --no-index --no-deps --target site wheels/*.whl     # there, then PYTHONPATH=site

and name the commit by ``--commit`` where the copy is no git checkout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common, gpu_page, gpu_profile, hypergradients, projectors, tv

NAME = "gpu"
TITLE = "Costs on one device, float32"
PREPARED = Path(__file__).with_name("gpu_prepared.json")
DTYPE = "float32"
ROWS = (
    "implicit", "implicit, AGD", "piggyback", "piggyback, simultaneous", "unrolled", "unrolled, checkpointed",
    "unrolled PDHG", "unrolled PDHG, checkpointed", "one step", "jaxopt L-BFGS",
)  # fmt: skip
NEEDED = {"jaxopt L-BFGS": "jaxopt"}
PARTS = ("hypergradients", "pdhg", "projectors", "networks", "maid")
COMPILERS = 8  # programs compiled at a time, where there are as many cores

render = gpu_page.render


def late(args) -> bool:
    return time.perf_counter() > args.until


def say(text: str) -> None:
    print(time.strftime("%X"), text, flush=True)


# ------------------------------------------------------------------------------------------------------ hypergradients


def case_of(args, size: int, count: int, exact) -> hypergradients.Case:
    options = argparse.Namespace(images=None, target=None, unrolled_steps=None, memory_limit=args.memory_limit)
    return hypergradients.Case(options, size, count, DTYPE, "user", np.asarray(exact))


def key(size: int, count: int) -> str:
    return f"{size} x {size}, batch {count}"


def prepare(args) -> None:
    """Find settings and references for every size and batch, and keep them in the file that travels."""
    found = json.loads(PREPARED.read_text(encoding="utf-8")) if PREPARED.exists() else {}
    for size in args.sizes:
        known: dict[str, dict] = {}
        for count in args.batch:
            exact = tv.reference(size, count)
            case = case_of(args, size, count, exact)
            for name in args.rows:
                row = hypergradients.ROWS[name]
                # two that compute the same take the same steps
                start = {"guess": 60} | known.get(row.lean if row.tuned == "steps" else name, {})
                entry = case.prepare(row, start)
                known[name] = known[row.lean] = entry.settings
                say(f"{key(size, count)}: {name} {entry.settings}, error {entry.error:.1e}")
                one = found.setdefault(key(size, count), {"exact": exact.tolist(), "settings": {}})
                one["settings"][name] = entry.settings
                PREPARED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def prepared(size: int, count: int) -> dict[str, Any]:
    found = json.loads(PREPARED.read_text(encoding="utf-8")).get(key(size, count))
    if found is None:
        raise SystemExit(f"no settings for {key(size, count)}: run benchmarks/gpu.py --device cpu --prepare first")
    return found


def measure_hypergradients(args, recorder: common.Recorder) -> None:
    for size in args.sizes:
        for count in args.batch:
            if late(args):
                return say(f"no time left for {key(size, count)}")
            _measure_case(args, recorder, size, count)


def _measure_case(args, recorder, size: int, count: int) -> None:
    found = prepared(size, count)
    case = case_of(args, size, count, found["exact"])
    rows = {name: hypergradients.ROWS[name] for name in args.rows if _present(name)}

    def compiled(name):
        try:
            return case.compile(rows[name], found["settings"][name].get("steps"))
        except hypergradients.TooLarge as reason:
            return str(reason)

    # XLA compiles outside Python's lock
    with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:
        programs = dict(zip(rows, pool.map(compiled, rows), strict=True))
    say(f"{key(size, count)}: {len(programs)} programs compiled")
    entries = {
        name: case.ready(rows[name], found["settings"][name], program)
        for name, program in programs.items()
        if not isinstance(program, str)
    }
    seconds = common.interleave({name: entry.run for name, entry in entries.items()}, args.repeats, args.seed)
    for name, row in rows.items():
        shape = {"part": "hypergradients", "row": name, "kind": row.kind, "energy": "user"}
        shape |= {"size": size, "batch": count, "dtype": DTYPE}
        if name not in entries:
            recorder.add(shape, {"skipped": programs[name]})
            continue
        entry = entries[name]
        figures = common.spread(seconds[name]) | hypergradients.figures_of(entry, case.exact)
        if args.profile:
            figures |= gpu_profile.profile(entry.run)
        recorder.add(shape, figures, {**entry.settings, "target": case.target})
    recorder.write()
    say(f"{key(size, count)}: measured")


def _present(name: str) -> bool:
    package = NEEDED.get(name)
    if package is None or importlib.util.find_spec(package):
        return True
    say(f"{package} is missing: no row {name!r} (the docstring says how to bring it)")
    return False


# --------------------------------------------------------------------------------------------------------------- parts


def timed(args, recorder, part: str, calls: dict[tuple, Callable], more: Callable[[tuple, dict], dict], names) -> None:
    """Rows of ``calls``, timed in turn; ``more(key, figures)`` says what else is known."""
    seconds = common.interleave(calls, args.repeats, args.seed)
    for values, call in calls.items():
        figures = common.spread(seconds[values])
        figures |= more(values, figures)
        if args.profile:
            figures |= gpu_profile.profile(call)
        recorder.add({"part": part, **dict(zip(names, values, strict=True))}, figures)
    recorder.write()


def measure_pdhg(args, recorder) -> None:
    """Bytes that an iteration of PDHG for total variation moves, at the speed of a copy, in images."""
    R = jb.regularizers.TV()
    problem, theta = jb.variational(None, R), R.init(weight=0.1)
    calls, images = {}, {}
    for size, count in zip(args.pdhg_sizes, args.pdhg_batch, strict=True):
        y = jax.random.uniform(jax.random.key(args.seed), (count, size, size), jnp.float32)
        # a tolerance of 0 takes all the steps
        each = lambda y: jb.solve(problem, theta, {"y": y}, tol=0.0, max_steps=args.pdhg_steps)  # noqa: E731
        solve, copy = jax.jit(jax.vmap(each)), jax.jit(jnp.negative)
        calls["PDHG", size, count] = lambda solve=solve, y=y: solve(y)
        calls["copy", size, count] = lambda copy=copy, y=y: copy(y)
        images[size, count] = int(jnp.max(solve(y)[1].steps))

    def more(values, figures):
        what, *shape = values
        size, count = shape
        return {"steps": images[size, count]} if what == "PDHG" else {"bytes": 8 * count * size**2}

    timed(args, recorder, "pdhg", calls, more, ("row", "size", "batch"))


def measure_projectors(args, recorder) -> None:
    calls, known = {}, {}
    for count in args.projector_batch:
        for direction in ("FP", "BP"):
            case = projectors.Case(args.projector_size, args.projector_views, count, direction)
            shape = (case.size, case.size) if direction == "FP" else (case.angles, case.bins)
            method = projectors.ours(case, np.random.default_rng(args.seed).random((count, *shape), dtype=np.float32))
            calls[tuple(case)] = method.call
            known[tuple(case)] = {k: v for k, v in method.figures.items() if k != "output"}
    timed(args, recorder, "projectors", calls, lambda values, _: known[values], projectors.Case._fields)


def measure_networks(args, recorder) -> None:
    from benchmarks import learned_reconstruction as learned

    A = learned.geometry(args.projector_size, args.projector_views)
    data, calls, known = learned.batch_of(A, 1), {}, {}
    f, params = learned.network(A, args.layers)
    functions = {
        "inference": (jax.vmap(f, (None, 0)), (params, data["y"])),
        "training": (learned.gradient(f), (params, data)),
    }
    for precision in ("highest", "tensorfloat32"):
        for what, (function, arguments) in functions.items():
            with jax.default_matmul_precision(precision):
                compiled = common.compile_apart(lambda *a, function=function: function(*a), *arguments)
            values = (f"LPD, {what}", precision, args.projector_size, args.projector_views, args.layers)
            calls[values] = lambda compiled=compiled, arguments=arguments: compiled.call(*arguments)
            known[values] = {"temp_bytes": compiled.temp_bytes, "compile_s": compiled.seconds}
    names = ("row", "precision", "size", "views", "layers")
    timed(args, recorder, "networks", calls, lambda values, _: known[values], names)


def measure_maid(args, recorder) -> None:
    """A whole run, compilation apart: Fields of Experts on crops with noise 0.1."""
    R = jb.regularizers.FoE(count=args.filters, size=5)
    crops = common.crops(args.maid_size, args.maid_batch, seed=args.seed)
    batch = {"x": jnp.asarray(crops.clean, jnp.float32), "y": jnp.asarray(crops.noisy, jnp.float32)}
    oracle = jb.implicit.Oracle(jb.variational(None, R), jb.losses.squared_error())
    params = R.init(jax.random.key(args.seed), dtype=jnp.float32)
    result = jb.fit(jb.MAID(oracle), params, batch, steps=args.maid_steps, progress=False)
    history = result.history
    case = {"part": "maid", "row": "MAID, FoE", "filters": args.filters, "size": args.maid_size}
    recorder.add(
        case | {"batch": args.maid_batch},
        {
            "steps": result.steps, "seconds": float(history["seconds"].sum()), "compile_s": result.compile_seconds,
            "work": result.work, "first": history["value"][0], "last": history["value"][-1],
            "status": result.status.name,
        },
    )  # fmt: skip
    recorder.write()


MEASURES = {
    "hypergradients": measure_hypergradients,
    "pdhg": measure_pdhg,
    "projectors": measure_projectors,
    "networks": measure_networks,
    "maid": measure_maid,
}


def main(argv: Sequence[str] | None = None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "device": "gpu", "dtype": [DTYPE], "repeats": 5, "sizes": [256], "batch": [1, 8, 64], "rows": list(ROWS),
            "parts": list(PARTS), "seconds": 300.0, "memory_limit": 64.0, "pdhg_sizes": [256, 2048],
            "pdhg_batch": [64, 1], "pdhg_steps": 200, "projector_size": 512, "projector_views": 90,
            "projector_batch": [1, 8], "layers": 12, "filters": 8, "maid_size": 64, "maid_batch": 64, "maid_steps": 20,
        },
        quick={
            "repeats": 1, "sizes": [16], "batch": [2], "pdhg_sizes": [16], "pdhg_batch": [2], "pdhg_steps": 20,
            "projector_size": 16, "projector_views": 6, "projector_batch": [1], "layers": 2, "filters": 2,
            "maid_size": 12, "maid_batch": 2, "maid_steps": 2,
        },
    )  # fmt: skip
    options.add_argument("--parts", nargs="+", choices=PARTS, help="in this order")
    options.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"some of: {'; '.join(ROWS)}")
    options.add_argument("--seconds", type=float, help="after which no part begins (default: 300)")
    options.add_argument("--commit", help="what this is a copy of, where git cannot tell")
    options.add_argument("--profile", action="store_true", help="count kernels and host copies of every call too")
    options.add_argument("--prepare", action="store_true", help="find settings and references instead (on a CPU)")
    args = common.parse(options, argv)
    # one precision for every part, whatever the caller's session has
    with common.precision(DTYPE):
        if args.prepare:
            return prepare(args)
        recorder = common.Recorder(NAME, args)
        args.until = time.perf_counter() + args.seconds
        recorder.common["commit"] = args.commit or recorder.common["commit"]
        for part in args.parts:
            if late(args):
                say(f"no time left for {part}")
                continue
            MEASURES[part](args, recorder)
            say(f"{part} done")
    if recorder.rows:
        print(render(recorder.rows))


if __name__ == "__main__":
    main()
