"""Section of `benchmarks.hypergradients_torch`, from its rows alone; imports nothing that its environment lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.torch_alternatives import STEP_LIMIT

ENERGIES = {"autograd": "energy by its value", "closed form": "gradient by hand"}


def render(rows: Sequence[dict], ours: Sequence[dict] = ()) -> str:
    """Markdown of these rows; ``ours``, rows of `benchmarks.hypergradients`, adds how they compare."""
    first = rows[0]
    versions, settings = first["versions"], first["settings"]
    threads = dict.fromkeys(n for row in rows for n in row["figures"]["ms_by_threads"])
    parts = [
        f"The same problem in PyTorch {versions['torch']} and deepinv {versions['deepinv']}, float64, one image, "
        f"cold start at y; number of threads: {' or '.join(threads)}, whichever is faster. **Error**: relative 2-norm "
        "distance to the reference. What has a tolerance has the loosest on a grid of two per decade that reaches the "
        f"target ({settings['target']:.0e}), what is unrolled the fewest steps, at most {STEP_LIMIT}; rows above the "
        "target are the best that was reached. *Energy by its value*: a torch function that autograd differentiates; "
        "*gradient by hand*: deepinv's SmoothedTVPrior, or the same formula. Times are medians with quartiles. "
        "*Memory*: how much resident memory rises at most during a call. *Constant momentum*: the strongly convex "
        "problem's, which deepinv's FISTA takes as a list of its parameter a.\n"
    ]
    for size in dict.fromkeys(row["case"]["size"] for row in rows):
        here = [row for row in rows if row["case"]["size"] == size]
        parts += [f"### {size} x {size}, PyTorch\n", _table(here), _conclusion(here, size, ours)]
    return "\n".join(parts)


def _table(rows: Sequence[dict]) -> str:
    energies = [e for e in ENERGIES if any(row["case"]["energy"] == e for row in rows)]
    header = ["", *(f"ms, {ENERGIES[e]}" for e in energies), "error", "iterations", "memory MB", "tolerance or steps"]
    lines = [header, [":--"] + ["--:"] * (len(header) - 1)]
    for name in dict.fromkeys(row["case"]["row"] for row in rows):
        found = {row["case"]["energy"]: row for row in rows if row["case"]["row"] == name}
        lines.append([name, *(_time(found.get(e)) for e in energies), *_cells(next(iter(found.values())))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _time(row: dict | None) -> str:
    if row is None:
        return "–"
    return "{} ({}–{})".format(*(_rounded(row["figures"][k]) for k in ("ms", "ms_q1", "ms_q3")))


def _cells(row: dict) -> list[str]:
    figures, settings = row["figures"], row["settings"]
    error, peak = float(figures["error"]), figures["peak_bytes"]
    chosen = f"{settings['steps']} steps" if "steps" in settings else "defaults"
    if "tol" in settings:
        chosen = " / ".join(dict.fromkeys(f"{settings[k]:.1e}" for k in ("tol", "adjoint_tol")))
    steps = " + ".join(str(figures[k]) for k in ("lower", "adjoint") if k in figures)
    return [f"{error:.1e}", steps, "–" if peak is None else _rounded(peak / 1e6), chosen]


def _rounded(value: float) -> str:
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, digits)}f}"


def _conclusion(rows: Sequence[dict], size: int, ours: Sequence[dict]) -> str:
    """The fastest on target: of deepinv, by hand, and of jbilevel where its rows were handed over."""
    good = [row for row in rows if float(row["figures"]["error"]) <= row["settings"]["target"]]
    best = {}
    for library in ("deepinv", "torch"):
        own = [row for row in good if row["case"]["row"].startswith(library)]
        if own:
            best[library] = min(own, key=lambda row: row["figures"]["ms"])
    lines = [f"- Fastest of {library}: {_named(row)}." for library, row in best.items()]
    fastest = _fastest_of_ours(ours, size)
    if fastest is not None:
        times = {library: row["figures"]["ms"] / fastest["figures"]["ms"] for library, row in best.items()}
        ratios = [f"the fastest of {library} **{ratio:.1f} times** as long" for library, ratio in times.items()]
        lines.append(f"- jbilevel takes {', '.join([_named(fastest), *ratios])}.")
    return "\n".join(lines) + "\n"


def _named(row: dict) -> str:
    return f"{_rounded(row['figures']['ms'])} ms ({row['case']['row']}, {row['case']['energy']})"


def _fastest_of_ours(rows: Sequence[dict], size: int) -> dict | None:
    """Cold, on target, one image in float64 on a CPU, with the energy that the user wrote."""
    wanted = {"kind": "jbilevel", "energy": "user", "size": size, "batch": 1, "dtype": "float64"}
    found = [
        row
        for row in rows
        if wanted.items() <= row["case"].items()
        and row["device"]["platform"] == "cpu"
        and "warm" not in row["case"]["row"]
        and "ms" in row["figures"]
        and float(row["figures"]["error"]) <= row["settings"]["target"]
    ]
    return min(found, key=lambda row: row["figures"]["ms"]) if found else None
