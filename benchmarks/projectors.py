"""How fast are the X-ray transform and its adjoint, and how much memory do they take, against ASTRA?

Parallel beam, N x N pixels, unit bins, float32; forward (FP) and backprojection (BP). ASTRA's CPU projector 'linear'
has the same matrix as ours, uses one thread and has no batch, so a batch there is a loop. Times are interleaved, ratios
medians over the repeats.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common

NAME = "projectors"
TITLE = "X-ray transforms against ASTRA"
OURS, REFERENCE = "pure JAX", "ASTRA CPU"


class Case(NamedTuple):
    """What one comparison is about."""

    size: int
    angles: int
    batch: int
    direction: str  # "FP" or "BP"

    @property
    def bins(self) -> int:
        return math.ceil(math.sqrt(2) * self.size) + 1


class Method(NamedTuple):
    """A call that runs once over the batch, and what is known of it before it is timed."""

    call: Callable
    figures: dict


def ours(case: Case, data: np.ndarray) -> Method:
    A = jb.operators.ParallelBeam(case.size, angles(case), case.bins)
    operator = A if case.direction == "FP" else A.T
    v = jnp.asarray(data if case.batch > 1 else data[0])
    compiled = common.compile_apart(operator, v)
    figures = {"temp_bytes": compiled.temp_bytes, "compile_s": compiled.seconds, "output": np.asarray(compiled.call(v))}
    return Method(partial(compiled.call, v), figures)


def astra_2d(case: Case, data: np.ndarray, projector: str) -> Method:
    """ASTRA on the host's arrays: one call per image; 'cuda' copies them to the GPU and back."""
    import astra

    volume = astra.create_vol_geom(case.size, case.size)
    beams = astra.create_proj_geom("parallel", 1.0, case.bins, angles(case))
    handle = astra.create_projector(projector, beams, volume)
    shape = (case.angles, case.bins) if case.direction == "FP" else (case.size, case.size)
    run = astra.projector.direct_FP if case.direction == "FP" else astra.projector.direct_BP

    def call():
        out = np.zeros((case.batch, *shape), np.float32)
        for image, result in zip(data, out, strict=True):
            run(handle, image, out=result)
        return out

    output = call()
    return Method(call, {"output": output if case.batch > 1 else output[0]})


def angles(case: Case) -> np.ndarray:
    return np.pi * np.arange(case.angles) / case.angles


def available() -> dict[str, Callable]:
    """The methods that this machine has; ASTRA is GPL and optional, its CUDA part needs a GPU."""
    methods = {OURS: ours}
    if importlib.util.find_spec("astra") is None:
        print("ASTRA is not installed (pip install 'jbilevel[ct]'): only our own times", flush=True)
        return methods
    import astra

    methods[REFERENCE] = partial(astra_2d, projector="linear")
    if astra.use_cuda():
        methods["ASTRA CUDA, host arrays"] = partial(astra_2d, projector="cuda")
    else:
        print("ASTRA sees no GPU: no CUDA rows", flush=True)
    return methods


def measure(recorder: common.Recorder, case: Case, methods: dict[str, Callable], args) -> None:
    """Rows of all methods for one case: times, temporary memory, distance of the results, and the ratio."""
    shape = (case.size, case.size) if case.direction == "FP" else (case.angles, case.bins)
    data = np.random.default_rng(args.seed).random((case.batch, *shape), dtype=np.float32)
    made = {name: make(case, data) for name, make in methods.items()}
    seconds = common.interleave({name: method.call for name, method in made.items()}, args.repeats, args.seed)
    spreads = {name: common.spread(values) for name, values in seconds.items()}
    for name, method in made.items():
        figures = {k: v for k, v in method.figures.items() if k != "output"} | spreads[name]
        if REFERENCE in made:
            exact = made[REFERENCE].figures["output"]
            figures["times_faster"] = common.times_faster(spreads[name], than=spreads[REFERENCE])
            figures["distance"] = float(np.linalg.norm(method.figures["output"] - exact) / np.linalg.norm(exact))
        figures["data_bytes"] = 4 * case.batch * (case.angles * case.bins + case.size**2)
        recorder.add({"method": name, **case._asdict()}, figures)


def render(rows: Sequence[dict]) -> str:
    header = ["case", "method", "ms", "quartiles", "times ASTRA CPU", "temporary memory", "share", "distance"]
    lines = []
    for row in rows:
        case, figures = row["case"], row["figures"]
        memory = figures.get("temp_bytes")
        size, share = 1e-6 * common.number(memory), common.number(memory) / figures["data_bytes"]
        lines.append([
            f"{case['direction']} {case['size']}² × {case['angles']}, batch {case['batch']}", case["method"],
            common.rounded(figures["ms"]), f"{common.rounded(figures['ms_q1'])}–{common.rounded(figures['ms_q3'])}",
            common.rounded(figures.get("times_faster"), 2), f"{common.rounded(size, 2)} MB" if memory else "–",
            common.rounded(share, 2), common.scientific(figures.get("distance")),
        ])  # fmt: skip
    note = (
        "Milliseconds per call, which is the whole batch; temporary memory as XLA reports it, also as a multiple "
        "of images and sinograms together; distance of the result to ASTRA's, relative, in float32.\n"
    )
    return "\n".join([common.table(header, lines), note])


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={"sizes": [512], "batch": [1, 8], "angles": [90, 200], "dtype": ["float32"]},
        quick={"sizes": [32], "batch": [2], "angles": [10], "repeats": 1},
    )
    options.add_argument("--angles", nargs="+", type=int, help="numbers of angles over half a turn")
    args = common.parse(options, argv)
    recorder = common.Recorder(NAME, args)
    methods = available()
    for size in args.sizes:
        for count in args.angles:
            for batch in args.batch:
                for direction in ("FP", "BP"):
                    with common.precision("float32"):
                        measure(recorder, Case(size, count, batch, direction), methods, args)
                    recorder.write()
                    print(f"{direction} {size} x {count}, batch {batch}", flush=True)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
