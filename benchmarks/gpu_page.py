"""Section of `benchmarks.gpu`, from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks import hypergradients_page
from benchmarks.common import number, rounded, scientific, table, times_faster, whole

FAMILIES = {"implicit": "implicit", "piggyback": "piggyback", "unrolled": "unrolled", "jaxopt": "jaxopt L-BFGS + CG"}
FASTEST = 10.0  # ms of an inference of LPD at 512 x 512, 90 views, 12 layers, on a GPU
# images that an iteration of PDHG for TV denoising moves if each kernel is fused with the next: x, y (2), K x (2), K*y
# and the data in, x, y (2), K x (2) and K*y out
LEAST = 13


def of_part(rows: Sequence[dict], part: str) -> list[dict]:
    return [row for row in rows if row["case"]["part"] == part]


def render(rows: Sequence[dict]) -> str:
    parts = {
        "hypergradients": hypergradients,
        "pdhg": pdhg,
        "projectors": projectors,
        "networks": networks,
        "maid": maid,
    }
    text = "\n".join(write(own) for part, write in parts.items() if (own := of_part(rows, part)))
    if rows[0]["device"]["platform"] == "cpu":
        text = (
            f"These rows are a CPU's, with the settings that a GPU gets: what a GPU's will be compared with.\n\n{text}"
        )
    return text


def hypergradients(rows: Sequence[dict]) -> str:
    text = (
        "One cold hypergradient of smoothed TV written in plain JAX (piggyback and unrolled PDHG: the same problem as "
        "a saddle point), noise 0.1. Every row with a tolerance or a number of steps has the loosest that reached the "
        "target on a CPU. Times are for the whole batch.\n"
    )
    for size, count, dtype in hypergradients_page.cases(rows):
        found = [r for r in rows if (r["case"]["size"], r["case"]["batch"]) == (size, count)]
        summary = hypergradients_page.summary(found, size, count, dtype).split("\n\n", 1)[1]
        target = next(r["settings"]["target"] for r in found if "target" in r["settings"])
        text += f"\n#### {size} x {size}, batch {count}, {dtype}, target {scientific(target, 0)}\n\n{summary}"
        text += _families(found, target) + _profiled(found, lambda r: r["case"]["row"])
    return text


def _families(rows: Sequence[dict], target: float) -> str:
    """The fastest row of each way to differentiate that reaches the target, against the fastest of all."""
    fastest: dict[str, dict] = {}
    for row in rows:
        family = next((f for f in FAMILIES if row["case"]["row"].startswith(f)), None)
        figures = row["figures"]
        if family is None or "skipped" in figures or not number(figures["error"]) <= target:
            continue
        if family not in fastest or figures["ms"] < fastest[family]["figures"]["ms"]:
            fastest[family] = row
    if not fastest:
        return ""
    best = min(fastest.values(), key=lambda row: row["figures"]["ms"])
    lines = [
        f"{FAMILIES[family]} {rounded(row['figures']['ms'])} ms ({row['case']['row']}, "
        f"{times_faster(best['figures'], row['figures']):.1f} times the fastest)"
        for family, row in fastest.items()
    ]
    return f"\n- At the target error: {'; '.join(lines)}.\n"


def _profiled(rows: Sequence[dict], name: Callable[[dict], str]) -> str:
    seen = [row for row in rows if "kernels" in row["figures"]]
    if not seen:
        return ""
    lines = []
    for row in seen:
        figures = row["figures"]
        longest = "; ".join(f"{kernel} {ms} ms" for kernel, ms in figures["longest"])
        busy = 100 * figures["kernel_ms"] / figures["ms"]
        lines.append([name(row), figures["kernels"], rounded(busy), figures["host_copies"], longest])
    return "\n" + table(["", "kernels", "busy %", "copies to the host", "longest kernels"], lines)


def pdhg(rows: Sequence[dict]) -> str:
    copies = {(r["case"]["size"], r["case"]["batch"]): r["figures"] for r in rows if r["case"]["row"] == "copy"}
    lines = []
    for row in rows:
        if row["case"]["row"] != "PDHG":
            continue
        size, batch = row["case"]["size"], row["case"]["batch"]
        copy, image = copies[size, batch], 4 * batch * size**2
        speed = copy["bytes"] / copy["ms"]  # bytes in a millisecond
        iteration = row["figures"]["ms"] / row["figures"]["steps"]
        moved = iteration * speed / image
        lines.append([
            f"{size}², batch {batch}", rounded(1e3 * iteration), rounded(1e-6 * speed), rounded(moved),
            rounded(moved / LEAST, 2),
        ])  # fmt: skip
    header = ["", "µs per iteration", "copy GB/s", "images moved in that time", f"times the {LEAST} of its state"]
    return (
        "An iteration of PDHG for total variation, residuals included, against a copy of as many images (which reads "
        "and writes each once). What fits into a cache copies faster than memory.\n\n"
        + table(header, lines)
        + _profiled(rows, lambda r: f"{r['case']['row']} {r['case']['size']}²")
    )


def projectors(rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        case, figures = row["case"], row["figures"]
        each = figures["ms"] / (case["batch"] * case["size"] ** 2 * case["angles"])
        lines.append([
            f"{case['direction']} {case['size']}² x {case['angles']}, batch {case['batch']}", rounded(figures["ms"]),
            rounded(1e6 * each), rounded(1e-6 * number(figures["temp_bytes"])), rounded(figures["compile_s"], 2),
        ])  # fmt: skip
    text = table(["parallel beam", "ms", "ns per pixel and view", "temporary MB", "compile s"], lines)
    return text + _profiled(rows, lambda r: f"{r['case']['direction']}, batch {r['case']['batch']}")


def networks(rows: Sequence[dict]) -> str:
    lines = [
        [
            row["case"]["row"], row["case"]["precision"], rounded(row["figures"]["ms"]),
            rounded(1e-6 * number(row["figures"]["temp_bytes"])), rounded(row["figures"]["compile_s"], 2),
        ]
        for row in rows
    ]  # fmt: skip
    first = rows[0]["case"]
    shape = (first["size"], first["views"], first["layers"])
    text = "{}², {} views, {} layers, 5 x 5 convolutions of 32 filters, batch 1:\n\n".format(*shape)
    text += table(["", "products", "ms", "temporary MB", "compile s"], lines)
    if shape == (512, 90, 12) and rows[0]["device"]["platform"] == "gpu":
        fastest = min(r["figures"]["ms"] for r in rows if r["case"]["row"] == "LPD, inference")
        met = "met" if fastest <= FASTEST else "NOT met"
        text += f"\n- LPD: {fastest:.2f} ms per image; criterion <= {FASTEST:g}: {met}.\n"
    return text + _profiled(rows, lambda r: f"{r['case']['row']}, {r['case']['precision']}")


def maid(rows: Sequence[dict]) -> str:
    lines = [
        [
            f"{row['case']['filters']} filters, {row['case']['batch']} crops of {row['case']['size']}²",
            row["figures"]["steps"], rounded(row["figures"]["seconds"]), rounded(row["figures"]["compile_s"], 2),
            whole(row["figures"]["work"]),
            f"{rounded(row['figures']['first'], 4)} to {rounded(row['figures']['last'], 4)}",
            row["figures"]["status"],
        ]
        for row in rows
    ]  # fmt: skip
    return "A whole run of MAID, from a cold start:\n\n" + table(
        ["", "steps", "s", "compile s", "gradient-equivalents", "value", "ended"], lines
    )
